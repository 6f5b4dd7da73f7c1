// The one file that knows XLA: binds jr_router_gemm to a typed FFI handler. Host code only, compiled by the host
// compiler against the headers of the jaxlib that loads it (jax.ffi.include_dir()).
//
// Custom call "jax_router_sm90_router_gemm", platform CUDA:
//   operands   x [T, H], weight [E, H] and, if there is one, bias [E]
//   results    out [T, E] and, if there is one, a workspace of any dtype and shape: scratch, its contents mean nothing
//   attribute  config (int32), -1: the launcher picks
// The handler is command-buffer compatible: XLA calls it once to record a CUDA graph and may replay that graph for
// ever. So it launches on the stream it is given and does nothing else: no allocation, no synchronisation, no state.
#include <cstdint>
#include <sstream>
#include <string>

#include "router_gemm.h"
#include "xla/ffi/api/ffi.h"

namespace jax_router {
namespace {

namespace ffi = xla::ffi;

int32_t dtype_of(const ffi::AnyBuffer& array) {
  switch (array.element_type()) {
    case ffi::DataType::BF16:
      return JR_BFLOAT16;
    case ffi::DataType::F16:
      return JR_FLOAT16;
    case ffi::DataType::F32:
      return JR_FLOAT32;
    default:
      return JR_NONE;
  }
}

// "bf16[8,2880]": the array as XLA writes it, for messages. Other dtypes show the number of XLA_FFI_DataType.
std::string describe(const ffi::AnyBuffer& array) {
  std::ostringstream text;
  switch (dtype_of(array)) {
    case JR_BFLOAT16:
      text << "bf16";
      break;
    case JR_FLOAT16:
      text << "f16";
      break;
    case JR_FLOAT32:
      text << "f32";
      break;
    default:
      text << "dtype" << static_cast<int>(array.element_type());
  }
  const char* separator = "[";
  for (const int64_t size : array.dimensions()) {
    text << separator << size;
    separator = ",";
  }
  text << (array.dimensions().size() == 0 ? "[]" : "]");
  return text.str();
}

ffi::Error invalid(const std::string& argument, const ffi::AnyBuffer& array, const std::string& accepted) {
  return ffi::Error::InvalidArgument("jax_router cuda router_gemm: " + argument + " is " + describe(array) +
                                     ". Expected " + accepted + ". Call jax_router.router_gemm, which checks first.");
}

ffi::Error router_gemm(void* stream, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::RemainingArgs rest, int32_t config,
                       ffi::Result<ffi::AnyBuffer> result, ffi::RemainingRets more_results) {
  const ffi::AnyBuffer& out = *result;
  if (x.dimensions().size() != 2) return invalid("x", x, "two axes, (tokens, hidden)");
  if (weight.dimensions().size() != 2) return invalid("weight", weight, "two axes, (experts, hidden)");

  jr_router_gemm_args args = {};
  args.x = x.untyped_data();
  args.weight = weight.untyped_data();
  args.out = out.untyped_data();
  args.tokens = x.dimensions()[0];
  args.hidden = x.dimensions()[1];
  args.experts = weight.dimensions()[0];
  args.dtype = dtype_of(x);
  args.bias_dtype = JR_NONE;
  args.out_dtype = dtype_of(out);
  args.config = config;

  if (args.dtype != JR_BFLOAT16 && args.dtype != JR_FLOAT16) return invalid("x", x, "bf16 or f16");
  if (dtype_of(weight) != args.dtype) return invalid("weight", weight, "the dtype of x, which is " + describe(x));
  if (weight.dimensions()[1] != args.hidden) {
    return invalid("weight", weight, "(experts, " + std::to_string(args.hidden) + ") to go with x " + describe(x));
  }
  if (out.dimensions().size() != 2 || out.dimensions()[0] != args.tokens || out.dimensions()[1] != args.experts) {
    return invalid("the result", out,
                   "(" + std::to_string(args.tokens) + ", " + std::to_string(args.experts) + "), (tokens, experts)");
  }
  if (args.out_dtype != JR_FLOAT32 && args.out_dtype != args.dtype) {
    return invalid("the result", out, "f32 or the dtype of x, which is " + describe(x));
  }
  if (rest.size() > 1) {
    return ffi::Error::InvalidArgument("jax_router cuda router_gemm: got " + std::to_string(2 + rest.size()) +
                                       " operands. Expected x, weight and at most one bias.");
  }
  if (rest.size() == 1) {
    const ffi::ErrorOr<ffi::AnyBuffer> operand = rest.get<ffi::AnyBuffer>(0);
    if (!operand.has_value()) return operand.error();
    const ffi::AnyBuffer& bias = operand.value();
    if (bias.dimensions().size() != 1 || bias.dimensions()[0] != args.experts) {
      return invalid("bias", bias, "one axis of " + std::to_string(args.experts) + " experts");
    }
    args.bias = bias.untyped_data();
    args.bias_dtype = dtype_of(bias);
    if (args.bias_dtype != JR_FLOAT32 && args.bias_dtype != args.dtype) {
      return invalid("bias", bias, "f32 or the dtype of x, which is " + describe(x));
    }
  }

  if (more_results.size() > 1) {
    return ffi::Error::InvalidArgument("jax_router cuda router_gemm: got " + std::to_string(1 + more_results.size()) +
                                       " results. Expected the logits and at most one workspace.");
  }
  if (more_results.size() == 1) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> workspace = more_results.get<ffi::AnyBuffer>(0);
    if (!workspace.has_value()) return workspace.error();
    args.workspace = (*workspace)->untyped_data();
    args.workspace_bytes = int64_t((*workspace)->size_bytes());
  }

  char message[512] = "";
  const int status = jr_router_gemm(&args, stream, message, sizeof(message));
  if (status == JR_OK) return ffi::Error::Success();
  const std::string text = "jax_router cuda router_gemm with x " + describe(x) + ", weight " + describe(weight) +
                           ", config " + std::to_string(config) + ": " + message;
  return ffi::Error(status == JR_UNSUPPORTED ? ffi::ErrorCode::kUnimplemented : ffi::ErrorCode::kInternal, text);
}

}  // namespace

// Major and minor version of the FFI headers this file was compiled with, asked before the handler is registered:
// XLA refuses a handler that is newer than itself.
extern "C" JR_EXPORT int jr_ffi_api_version(void) { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// The C symbol is declared first so that it is visible although the library hides everything else.
extern "C" JR_EXPORT XLA_FFI_Error* jr_ffi_router_gemm(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jr_ffi_router_gemm, router_gemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Attr<int32_t>("config")
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_router
