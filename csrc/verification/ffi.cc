// Binds the neighbours (neighbours.cu) to XLA, so that any implementation can stand between them.
//
// Custom calls, platform CUDA; not captured in CUDA graphs, where nothing overlaps:
//   "jax_router_verification_produce"  operands wrong, n buffers, n sources; results: the buffers, aliased
//   "jax_router_verification_consume"  operands wrong, n outputs, n expected; results: wrong and the outputs, aliased
//                                      attribute launch (int32)
// `wrong` is uint32[8], jr_wrong. That one call takes it from the other keeps them in order.
#include <string>

#include "verification.h"
#include "xla/ffi/api/ffi.h"

namespace jax_router_verification {
namespace {

namespace ffi = xla::ffi;

// The parts behind the first operand: half of the others are written or compared, the other half is read.
ffi::Error collect(ffi::RemainingArgs rest, jr_part (&parts)[JR_MAX_PARTS], int& count) {
  count = int(rest.size() / 2);
  if (rest.size() % 2 != 0 || count < 1 || count > JR_MAX_PARTS)
    return ffi::Error::InvalidArgument("expected 1 to 8 buffers and as many sources");
  for (int i = 0; i < count; ++i) {
    ffi::ErrorOr<ffi::AnyBuffer> to = rest.get<ffi::AnyBuffer>(size_t(i)),
                                 from = rest.get<ffi::AnyBuffer>(size_t(i + count));
    if (!to.has_value()) return to.error();
    if (!from.has_value()) return from.error();
    if (to->size_bytes() != from->size_bytes())
      return ffi::Error::InvalidArgument("part " + std::to_string(i) + " differs in size from its source");
    parts[i] = {to->untyped_data(), from->untyped_data(), int64_t(to->size_bytes())};
  }
  return ffi::Error::Success();
}

ffi::Error finish(int status, const char* message) {
  return status == JR_OK ? ffi::Error::Success() : ffi::Error::Internal(std::string("verification: ") + message);
}

ffi::Error produce(void* stream, ffi::AnyBuffer, ffi::RemainingArgs rest, ffi::RemainingRets) {
  jr_part parts[JR_MAX_PARTS] = {};
  int count = 0;
  if (ffi::Error error = collect(rest, parts, count); error.failure()) return error;
  char message[512] = "";
  return finish(jr_neighbour_produce(parts, count, stream, message, sizeof(message)), message);
}

ffi::Error consume(void* stream, ffi::AnyBuffer wrong, ffi::RemainingArgs rest, int32_t launch, ffi::RemainingRets) {
  jr_part parts[JR_MAX_PARTS] = {};
  int count = 0;
  if (ffi::Error error = collect(rest, parts, count); error.failure()) return error;
  if (wrong.size_bytes() != sizeof(jr_wrong)) return ffi::Error::InvalidArgument("wrong is no uint32[8]");
  char message[512] = "";
  jr_wrong* const found = static_cast<jr_wrong*>(wrong.untyped_data());
  return finish(jr_neighbour_consume(parts, count, launch, found, stream, message, sizeof(message)), message);
}

}  // namespace

extern "C" JR_EXPORT XLA_FFI_Error* jr_ffi_verification_produce(XLA_FFI_CallFrame* call_frame);
extern "C" JR_EXPORT XLA_FFI_Error* jr_ffi_verification_consume(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jr_ffi_verification_produce, produce,
    ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jr_ffi_verification_consume, consume,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Attr<int32_t>("launch")
                                  .RemainingRets());

}  // namespace jax_router_verification
