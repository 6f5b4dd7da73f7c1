// The one file that knows XLA: binds jr_router_gemm and jr_route to typed FFI handlers. Host code only, compiled by the
// host compiler against the headers of the jaxlib that loads it (jax.ffi.include_dir()).
//
// Custom call "jax_router_sm90_router_gemm", platform CUDA:
//   operands   x [T, H], weight [E, H] or [H, E] in x's dtype, or f32 beside bf16, and, if there is one, bias [E]
//   results    out [T, E] and, if there is one, a workspace of any dtype and shape: scratch, its contents mean nothing
//   attributes config (int32), -1: the launcher picks; weight_layout (int32), of jr_weight_layout
// Custom call "jax_router_sm90_route", platform CUDA:
//   operands   x, weight and, as far as they are there, bias, correction_bias, expert_scale [E] and replay [T, k]
//   results    weights [T, k], experts [T, k], logits [T, E] and, if there is one, a workspace
//   attributes operands (bits), return_logits, config, weight_layout (int32); integers and floats of jr_routing_spec,
//              in its order
// The handlers are command-buffer compatible: XLA calls one once to record a CUDA graph and may replay that graph for
// ever. So it launches on the stream it is given and does nothing else: no allocation, no synchronisation, no state.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

#include "route.h"
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
  return ffi::Error::InvalidArgument("jax_router cuda: " + argument + " is " + describe(array) + ". Expected " +
                                     accepted + ". Call jax_router.router_gemm or route, which check first.");
}

ffi::Error check_shape(const char* argument, const ffi::AnyBuffer& array, std::initializer_list<int64_t> shape,
                       const char* meaning) {
  if (std::equal(shape.begin(), shape.end(), array.dimensions().begin(), array.dimensions().end()))
    return ffi::Error::Success();
  std::string expected = "shape (";
  for (const int64_t size : shape) expected += (expected.back() == '(' ? "" : ", ") + std::to_string(size);
  return invalid(argument, array, expected + "), " + meaning);
}

// One value per expert, in float32 or in x's dtype.
ffi::Error describe_per_expert(const char* argument, const ffi::AnyBuffer& array, const ffi::AnyBuffer& x,
                               int64_t experts, const void*& data, int32_t& dtype) {
  if (ffi::Error error = check_shape(argument, array, {experts}, "one per expert"); error.failure()) return error;
  data = array.untyped_data();
  dtype = dtype_of(array);
  if (dtype == JR_FLOAT32 || dtype == dtype_of(x)) return ffi::Error::Success();
  return invalid(argument, array, "f32 or the dtype of x, which is " + describe(x));
}

// Fills in what the operands x and weight, an optional bias and the logits say, once they fit each other.
ffi::Error describe_gemm(const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight, const ffi::AnyBuffer* bias,
                         const ffi::AnyBuffer& out, int32_t weight_layout, jr_router_gemm_args& args) {
  if (weight_layout != JR_EXPERTS_HIDDEN && weight_layout != JR_HIDDEN_EXPERTS) {
    return ffi::Error::InvalidArgument("jax_router cuda: weight_layout is " + std::to_string(weight_layout) +
                                       ". Expected 0 for (experts, hidden) or 1 for (hidden, experts).");
  }
  const size_t experts_axis = weight_layout == JR_EXPERTS_HIDDEN ? 0 : 1;
  const auto shape_of_weight = [&](const std::string& hidden) {
    return experts_axis == 0 ? "(experts, " + hidden + ")" : "(" + hidden + ", experts)";
  };
  if (x.dimensions().size() != 2) return invalid("x", x, "two axes, (tokens, hidden)");
  if (weight.dimensions().size() != 2) return invalid("weight", weight, "two axes, " + shape_of_weight("hidden"));

  args.x = x.untyped_data();
  args.weight = weight.untyped_data();
  args.out = out.untyped_data();
  args.tokens = x.dimensions()[0];
  args.hidden = x.dimensions()[1];
  args.experts = weight.dimensions()[experts_axis];
  args.dtype = dtype_of(x);
  args.bias_dtype = JR_NONE;
  args.out_dtype = dtype_of(out);
  args.config = -1;
  args.weight_layout = weight_layout;
  args.weight_dtype = dtype_of(weight);

  if (args.dtype == JR_NONE) return invalid("x", x, "bf16, f16 or f32");
  const bool widened = args.dtype == JR_BFLOAT16 && args.weight_dtype == JR_FLOAT32;
  if (args.weight_dtype != args.dtype && !widened) {
    return invalid("weight", weight,
                   "the dtype of x, which is " + describe(x) + (args.dtype == JR_BFLOAT16 ? ", or f32" : ""));
  }
  if (weight.dimensions()[1 - experts_axis] != args.hidden) {
    return invalid("weight", weight, shape_of_weight(std::to_string(args.hidden)) + " to go with x " + describe(x));
  }
  if (ffi::Error error = check_shape("the result", out, {args.tokens, args.experts}, "(tokens, experts)");
      error.failure()) {
    return error;
  }
  if (args.out_dtype != JR_FLOAT32 && args.out_dtype != args.dtype) {
    return invalid("the result", out, "f32 or the dtype of x, which is " + describe(x));
  }
  return bias == nullptr ? ffi::Error::Success()
                         : describe_per_expert("bias", *bias, x, args.experts, args.bias, args.bias_dtype);
}

// The workspace is the result behind `results` others, if it is there.
ffi::Error describe_workspace(ffi::RemainingRets more_results, size_t results, jr_router_gemm_args& args) {
  if (more_results.size() > results + 1) {
    return ffi::Error::InvalidArgument("jax_router cuda: got " + std::to_string(1 + more_results.size()) +
                                       " results. Expected at most one workspace behind the first " +
                                       std::to_string(1 + results) + ".");
  }
  if (more_results.size() <= results) return ffi::Error::Success();
  ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> workspace = more_results.get<ffi::AnyBuffer>(results);
  if (!workspace.has_value()) return workspace.error();
  args.workspace = (*workspace)->untyped_data();
  args.workspace_bytes = int64_t((*workspace)->size_bytes());
  return ffi::Error::Success();
}

ffi::Error finish(int status, const char* message, const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight,
                  int32_t config) {
  if (status == JR_OK) return ffi::Error::Success();
  const std::string text = "jax_router cuda with x " + describe(x) + ", weight " + describe(weight) + ", config " +
                           std::to_string(config) + ": " + message;
  return ffi::Error(status == JR_UNSUPPORTED ? ffi::ErrorCode::kUnimplemented : ffi::ErrorCode::kInternal, text);
}

ffi::Error router_gemm(void* stream, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::RemainingArgs rest, int32_t config,
                       int32_t weight_layout, ffi::Result<ffi::AnyBuffer> result, ffi::RemainingRets more_results) {
  if (rest.size() > 1) {
    return ffi::Error::InvalidArgument("jax_router cuda: got " + std::to_string(2 + rest.size()) +
                                       " operands. Expected x, weight and at most one bias.");
  }
  ffi::ErrorOr<ffi::AnyBuffer> bias = ffi::Unexpected(ffi::Error::Success());
  if (rest.size() == 1) {
    bias = rest.get<ffi::AnyBuffer>(0);
    if (!bias.has_value()) return bias.error();
  }
  jr_router_gemm_args args = {};
  ffi::Error error = describe_gemm(x, weight, rest.size() == 1 ? &bias.value() : nullptr, *result, weight_layout, args);
  if (error.success()) error = describe_workspace(more_results, 0, args);
  if (error.failure()) return error;
  args.config = config;
  char message[512] = "";
  const int status = jr_router_gemm(&args, stream, message, sizeof(message));
  return finish(status, message, x, weight, config);
}

// Operands behind x and weight, in this order, as far as the bits of `operands` say that they are there.
enum { kBias = 1, kCorrectionBias = 2, kExpertScale = 4, kReplay = 8 };

ffi::Error route(void* stream, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::RemainingArgs rest, int32_t operands,
                 int32_t return_logits, int32_t config, int32_t weight_layout, ffi::Span<const int32_t> integers,
                 ffi::Span<const float> floats, ffi::Result<ffi::AnyBuffer> weights, ffi::RemainingRets more_results) {
  constexpr size_t kResults = 2;  // besides the weights: experts and logits
  if (integers.size() != 8 || floats.size() != 4 || more_results.size() < kResults)
    return ffi::Error::InvalidArgument(
        "jax_router cuda route: expected 8 integers and 4 floats of a spec and three "
        "results; call jax_router.route.");
  jr_route_args args = {};
  args.spec = {integers[0], integers[1], integers[2], integers[3], integers[4], integers[5],
               integers[6], integers[7], floats[0],   floats[1],   floats[2],   floats[3]};
  args.return_logits = return_logits;
  args.config = config;
  args.correction_bias_dtype = args.expert_scale_dtype = JR_NONE;

  size_t next = 0;
  const auto take = [&](int32_t which) -> ffi::ErrorOr<ffi::AnyBuffer> {
    if ((operands & which) == 0) return ffi::Unexpected(ffi::Error::Success());
    return rest.get<ffi::AnyBuffer>(next++);
  };
  const ffi::ErrorOr<ffi::AnyBuffer> bias = take(kBias), correction = take(kCorrectionBias), scale = take(kExpertScale),
                                     replay = take(kReplay);
  if (next != rest.size())
    return ffi::Error::InvalidArgument("jax_router cuda route: got " + std::to_string(2 + rest.size()) +
                                       " operands. Expected " + std::to_string(2 + next) + ".");
  ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> experts = more_results.get<ffi::AnyBuffer>(0),
                                            logits = more_results.get<ffi::AnyBuffer>(1);
  if (!experts.has_value()) return experts.error();
  if (!logits.has_value()) return logits.error();

  ffi::Error error =
      describe_gemm(x, weight, bias.has_value() ? &bias.value() : nullptr, **logits, weight_layout, args.gemm);
  if (error.success() && correction.has_value())
    error = describe_per_expert("correction_bias", correction.value(), x, args.gemm.experts, args.correction_bias,
                                args.correction_bias_dtype);
  if (error.success() && scale.has_value())
    error = describe_per_expert("expert_scale", scale.value(), x, args.gemm.experts, args.expert_scale,
                                args.expert_scale_dtype);
  const std::initializer_list<int64_t> selected = {args.gemm.tokens, args.spec.top_k};
  if (error.success()) error = check_shape("weights", *weights, selected, "(tokens, top_k)");
  if (error.success()) error = check_shape("experts", **experts, selected, "(tokens, top_k)");
  if (error.success() && replay.has_value()) {
    error = check_shape("the experts to replay", replay.value(), selected, "(tokens, top_k)");
    if (error.success() && replay.value().element_type() != ffi::DataType::S32)
      error = invalid("the experts to replay", replay.value(), "s32");
    args.replay = static_cast<const int32_t*>(replay.value().untyped_data());
  }
  if (error.success() && weights->element_type() != ffi::DataType::F32) error = invalid("weights", *weights, "f32");
  if (error.success() && (*experts)->element_type() != ffi::DataType::S32) error = invalid("experts", **experts, "s32");
  if (error.success()) error = describe_workspace(more_results, kResults, args.gemm);
  if (error.failure()) return error;
  args.weights = static_cast<float*>(weights->untyped_data());
  args.experts = static_cast<int32_t*>((*experts)->untyped_data());

  char message[512] = "";
  const int status = jr_route(&args, stream, message, sizeof(message));
  return finish(status, message, x, weight, config);
}

}  // namespace

// Major and minor version of the FFI headers this file was compiled with, asked before the handler is registered:
// XLA refuses a handler that is newer than itself.
extern "C" JR_EXPORT int jr_ffi_api_version(void) { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// The C symbol is declared first so that it is visible although the library hides everything else.
extern "C" JR_EXPORT XLA_FFI_Error* jr_ffi_router_gemm(XLA_FFI_CallFrame* call_frame);
extern "C" JR_EXPORT XLA_FFI_Error* jr_ffi_route(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jr_ffi_router_gemm, router_gemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Attr<int32_t>("config")
                                  .Attr<int32_t>("weight_layout")
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jr_ffi_route, route,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Attr<int32_t>("operands")
                                  .Attr<int32_t>("return_logits")
                                  .Attr<int32_t>("config")
                                  .Attr<int32_t>("weight_layout")
                                  .Attr<ffi::Span<const int32_t>>("integers")
                                  .Attr<ffi::Span<const float>>("floats")
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_router
