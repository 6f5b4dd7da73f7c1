// Binds the neighbours (neighbours.cu) to XLA, so that any implementation can stand between them.
//
// Custom calls, platform CUDA; not captured in CUDA graphs, where nothing overlaps:
//   "jax_router_verification_produce"  operands wrong, n buffers, n sources; results: the buffers, aliased
//   "jax_router_verification_consume"  operands wrong, n outputs, n expected; results: wrong and the outputs, aliased
//                                      attribute launch (int32)
//   "jax_router_verification_find_differing"  operands n outputs, n expected; result uint32[n]. Captured in CUDA
//   graphs
// `wrong` is uint32[8], jr_wrong. That one call takes it from the other keeps them in order.
#include <string>
#include <vector>

#include "verification.h"
#include "xla/ffi/api/ffi.h"

namespace jax_router_verification {
namespace {

namespace ffi = xla::ffi;

// The parts: half of the operands are written or compared, the other half is read.
ffi::Error collect(ffi::RemainingArgs rest, std::vector<jr_part>& parts) {
  if (rest.size() % 2 != 0) return ffi::Error::InvalidArgument("expected as many buffers as sources");
  const int count = int(rest.size() / 2);
  parts.resize(size_t(count));
  for (int i = 0; i < count; ++i) {
    ffi::ErrorOr<ffi::AnyBuffer> to = rest.get<ffi::AnyBuffer>(size_t(i)),
                                 from = rest.get<ffi::AnyBuffer>(size_t(i + count));
    if (!to.has_value()) return to.error();
    if (!from.has_value()) return from.error();
    if (to->size_bytes() != from->size_bytes())
      return ffi::Error::InvalidArgument("part " + std::to_string(i) + " differs in size from its source");
    parts[size_t(i)] = {to->untyped_data(), from->untyped_data(), int64_t(to->size_bytes())};
  }
  return ffi::Error::Success();
}

ffi::Error finish(int status, const char* message) {
  return status == JR_OK ? ffi::Error::Success() : ffi::Error::Internal(std::string("verification: ") + message);
}

ffi::Error produce(void* stream, ffi::AnyBuffer, ffi::RemainingArgs rest, ffi::RemainingRets) {
  std::vector<jr_part> parts;
  if (ffi::Error error = collect(rest, parts); error.failure()) return error;
  char message[512] = "";
  return finish(jr_neighbour_produce(parts.data(), int(parts.size()), stream, message, sizeof(message)), message);
}

ffi::Error consume(void* stream, ffi::AnyBuffer wrong, ffi::RemainingArgs rest, int32_t launch, ffi::RemainingRets) {
  std::vector<jr_part> parts;
  if (ffi::Error error = collect(rest, parts); error.failure()) return error;
  if (wrong.size_bytes() != sizeof(jr_wrong)) return ffi::Error::InvalidArgument("wrong is no uint32[8]");
  char message[512] = "";
  jr_wrong* const found = static_cast<jr_wrong*>(wrong.untyped_data());
  return finish(jr_neighbour_consume(parts.data(), int(parts.size()), launch, found, stream, message, sizeof(message)),
                message);
}

ffi::Error find_differing(void* stream, ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> differing) {
  std::vector<jr_part> parts;
  if (ffi::Error error = collect(rest, parts); error.failure()) return error;
  if (differing->size_bytes() != parts.size() * sizeof(jr_differing))
    return ffi::Error::InvalidArgument("expected one jr_differing per part");
  char message[512] = "";
  return finish(
      jr_find_differing(parts.data(), int(parts.size()), static_cast<jr_differing*>(differing->untyped_data()), stream,
                        message, sizeof(message)),
      message);
}

}  // namespace

extern "C" JR_EXPORT XLA_FFI_Error* jr_ffi_verification_find_differing(XLA_FFI_CallFrame* call_frame);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(jr_ffi_verification_find_differing, find_differing,
                              ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().RemainingArgs().Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_router_verification
