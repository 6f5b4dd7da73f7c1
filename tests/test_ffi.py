"""csrc/ffi.cc on the CPU: the same handler, bound without a stream, in front of a C stub of the kernel.

Shows what needs no GPU: which operand becomes which argument, what is refused and in which words, how a status becomes
an error, and that the handler declares itself fit for CUDA graphs.
"""

import ctypes
import itertools
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_router import RoutingSpec, build
from jax_router.implementations import WEIGHT_LAYOUTS, cuda, experts_axis

ON_CPU, ROUTE_ON_CPU = "jax_router_test_router_gemm_on_cpu", "jax_router_test_route_on_cpu"

# config -1 computes x @ weight.T + bias from bfloat16 and a float32 bias; 1 and 2 fail; 3 writes what it was given; 4
# writes the workspace.
SHIM = r"""
#include "ffi.cc"

#include <cstdio>
#include <cstring>

static float widen(const void* array, int64_t index) {
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(array)[index]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

extern "C" int jr_router_gemm(const jr_router_gemm_args* args, void*, char* message, size_t message_bytes) {
  float* out = static_cast<float*>(args->out);
  if (args->config == 1 || args->config == 2) {
    std::snprintf(message, message_bytes, "stub says %d", args->config);
    return args->config == 1 ? JR_UNSUPPORTED : JR_CUDA_ERROR;
  }
  if (args->config == 4) {
    out[0] = float(args->workspace_bytes);
    if (args->workspace != nullptr) std::memset(args->workspace, 7, size_t(args->workspace_bytes));
    return JR_OK;
  }
  if (args->config == 3) {
    const int64_t facts[] = {args->tokens,     args->hidden,    args->experts,       args->dtype,
                             args->bias_dtype, args->out_dtype, args->weight_layout, args->weight_dtype};
    for (int i = 0; i < 8; ++i) out[i] = float(facts[i]);
    return JR_OK;
  }
  for (int64_t t = 0; t < args->tokens; ++t) {
    for (int64_t e = 0; e < args->experts; ++e) {
      float sum = args->bias == nullptr ? 0.f : static_cast<const float*>(args->bias)[e];
      for (int64_t h = 0; h < args->hidden; ++h) {
        const bool transposed = args->weight_layout == JR_HIDDEN_EXPERTS;
        const int64_t place = transposed ? h * args->experts + e : e * args->hidden + h;
        sum += widen(args->x, t * args->hidden + h) * widen(args->weight, place);
      }
      out[t * args->experts + e] = sum;
    }
  }
  return JR_OK;
}

// Writes what it was given: numbers into the weights, the first of every array that is there into the logits.
extern "C" int jr_route(const jr_route_args* args, void*, char* message, size_t message_bytes) {
  const jr_router_gemm_args& gemm = args->gemm;
  const jr_routing_spec& spec = args->spec;
  if (args->config == 1) {
    std::snprintf(message, message_bytes, "stub says %d", args->config);
    return JR_UNSUPPORTED;
  }
  const float facts[] = {float(gemm.tokens), float(gemm.hidden), float(gemm.experts), float(args->return_logits),
                         float(args->config), float(args->correction_bias_dtype), float(args->expert_scale_dtype),
                         float(spec.score_function), float(spec.renormalize), float(spec.select_on_logits),
                         float(spec.round_logits), float(spec.num_groups), float(spec.group_topk),
                         float(spec.group_score), spec.renormalize_epsilon, spec.renormalize_min,
                         spec.scaling_factor, spec.masked_choice, float(gemm.workspace_bytes),
                         float(gemm.weight_layout)};
  std::memcpy(args->weights, facts, sizeof(facts));
  for (int64_t i = 0; i < gemm.tokens * spec.top_k; ++i)
    args->experts[i] = args->replay == nullptr ? -1 : args->replay[i];
  float* out = static_cast<float*>(gemm.out);
  out[0] = gemm.bias == nullptr ? -1.f : static_cast<const float*>(gemm.bias)[0];
  out[1] = args->correction_bias == nullptr ? -1.f : static_cast<const float*>(args->correction_bias)[0];
  out[2] = args->expert_scale == nullptr ? -1.f : widen(args->expert_scale, 0);
  return JR_OK;
}

namespace jax_router {

static ffi::Error route_on_cpu_without_stream(ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::RemainingArgs rest,
                                              int32_t operands, int32_t return_logits, int32_t config,
                                              int32_t layout, ffi::Span<const int32_t> integers,
                                              ffi::Span<const float> floats, ffi::Result<ffi::AnyBuffer> weights,
                                              ffi::RemainingRets more) {
  return route(nullptr, x, weight, rest, operands, return_logits, config, layout, integers, floats, weights, more);
}
extern "C" JR_EXPORT XLA_FFI_Error* route_on_cpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(route_on_cpu, route_on_cpu_without_stream,
                              ffi::Ffi::Bind()
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
                                  .RemainingRets());

static ffi::Error on_cpu(ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::RemainingArgs rest, int32_t config,
                         int32_t layout, ffi::Result<ffi::AnyBuffer> out, ffi::RemainingRets more) {
  return router_gemm(nullptr, x, weight, rest, config, layout, out, more);
}

extern "C" JR_EXPORT XLA_FFI_Error* router_gemm_on_cpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(router_gemm_on_cpu, on_cpu,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Attr<int32_t>("config")
                                  .Attr<int32_t>("weight_layout")
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets());

// Asks the real handlers for their traits, as XLA does when they are registered.
extern "C" JR_EXPORT uint32_t handler_traits(int routes) {
  XLA_FFI_Metadata metadata = {};
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  metadata.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension extension = {};
  extension.extension_base.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE;
  extension.extension_base.type = XLA_FFI_Extension_Metadata;
  extension.metadata = &metadata;
  XLA_FFI_CallFrame call_frame = {};
  call_frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  call_frame.extension_start = &extension.extension_base;
  routes ? jr_ffi_route(&call_frame) : jr_ffi_router_gemm(&call_frame);
  return metadata.traits;
}

}  // namespace jax_router
"""


def compile_here(folder, source: str, *arguments: str) -> None:
    """Compile a C++ text with the flags of the library and warnings as errors."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler (g++, c++) to compile csrc/ffi.cc with")
    (folder / "source.cc").write_text(source)
    include = ["-isystem", str(build.ffi_include_directory()), "-I", str(build.csrc_directory())]
    command = [compiler, *build.HOST_FLAGS, "-Werror", *include, *arguments, "source.cc", "-o", "output"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ffi")
    compile_here(folder, SHIM, "-shared")
    library = ctypes.CDLL(str(folder / "output"))
    jax.ffi.register_ffi_target(ON_CPU, jax.ffi.pycapsule(library.router_gemm_on_cpu), platform="cpu")
    jax.ffi.register_ffi_target(ROUTE_ON_CPU, jax.ffi.pycapsule(library.route_on_cpu), platform="cpu")
    return library


def array(*shape: int, dtype=jnp.bfloat16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.fixture
def call(shim):
    cpu = jax.local_devices(backend="cpu")[0]

    def run(*operands, out=(4, 6), out_dtype=jnp.float32, config=-1, layout=0, scratch=()):
        result = jax.ShapeDtypeStruct(out, out_dtype)
        if scratch:
            result = [result, *(jax.ShapeDtypeStruct((size,), np.uint8) for size in scratch)]
        with jax.default_device(cpu):
            operands = [jax.device_put(operand, cpu) for operand in operands]
            kernel = jax.ffi.ffi_call(ON_CPU, result)
            return jax.block_until_ready(kernel(*operands, config=np.int32(config), weight_layout=np.int32(layout)))

    return run


def test_operands_become_the_arguments_of_the_kernel(call):
    x, weight, bias = array(4, 8), array(6, 8, seed=1), array(6, dtype=jnp.float32, seed=2)
    product = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T
    # 8 products of 8-bit mantissas, summed in float32 in some order: 8 roundings of 2**-24 of sums below 100.
    np.testing.assert_allclose(call(x, weight), product, atol=8 * 100 * 2.0**-24)
    np.testing.assert_allclose(call(x, weight, bias), product + np.asarray(bias), atol=9 * 100 * 2.0**-24)
    np.testing.assert_array_equal(call(x, weight.T, bias, layout=1), call(x, weight, bias))


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "codes"),
    [
        (jnp.bfloat16, jnp.bfloat16, (0, 0)),
        (jnp.float16, jnp.float16, (1, 1)),
        (jnp.bfloat16, jnp.float32, (0, 2)),
        (jnp.float32, jnp.float32, (2, 2)),
    ],
)
@pytest.mark.parametrize(("bias_dtype", "bias_code"), [(None, -1), (jnp.float32, 2), ("same", None)])
def test_sizes_and_dtypes_reach_the_kernel(call, dtype, weight_dtype, codes, bias_dtype, bias_code):
    operands, (code, weight_code) = [array(4, 8, dtype=dtype), array(6, 8, dtype=weight_dtype)], codes
    if bias_dtype is not None:
        operands.append(array(6, dtype=dtype if bias_dtype == "same" else bias_dtype))
    expected = [4, 8, 6, code, code if bias_dtype == "same" else bias_code, 2]
    assert call(*operands, config=3).ravel()[:8].tolist() == [*expected, 0, weight_code]
    operands[1] = operands[1].T
    assert call(*operands, config=3, layout=1).ravel()[:8].tolist() == [*expected, 1, weight_code]


def test_second_result_is_the_workspace(call):
    operands = array(4, 8), array(6, 8)
    assert np.asarray(call(*operands, config=4))[0, 0] == 0
    logits, workspace = call(*operands, config=4, scratch=(48,))
    assert np.asarray(logits)[0, 0] == 48
    assert np.asarray(workspace).tolist() == [7] * 48
    with pytest.raises(Exception, match=r"got 3 results. Expected at most one workspace behind the first 1"):
        call(*operands, config=4, scratch=(48, 48))


X, WEIGHT, WIDE = array(4, 8), array(6, 8), (array(4, 8, dtype=jnp.float32), array(6, 8, dtype=jnp.float32))
TRANSPOSED, WANTED = {"layout": 1}, "Expected the dtype of x, which is"


@pytest.mark.parametrize(
    ("operands", "out", "words"),
    [
        ((array(8), WEIGHT), {}, "x is bf16[8]. Expected two axes, (tokens, hidden)"),
        ((X, array(6, 8, 1)), {}, "weight is bf16[6,8,1]. Expected two axes"),
        ((X, array(8, 6)), {}, "weight is bf16[8,6]. Expected (experts, 8) to go with x bf16[4,8]"),
        ((X, WEIGHT), TRANSPOSED, "weight is bf16[6,8]. Expected (8, experts) to go with x bf16[4,8]"),
        ((X, array(8)), TRANSPOSED, "weight is bf16[8]. Expected two axes, (hidden, experts)"),
        ((X, WEIGHT), {"layout": 2}, "weight_layout is 2. Expected 0 for (experts, hidden) or 1 for"),
        ((array(4, 8, dtype=jnp.int8), WEIGHT), {}, "x is dtype2[4,8]. Expected bf16, f16 or f32"),
        ((X, array(6, 8, dtype=jnp.float16)), {}, f"weight is f16[6,8]. {WANTED} bf16[4,8], or f32. Call"),
        ((X, array(6, 8, dtype=jnp.int8)), {}, f"weight is dtype2[6,8]. {WANTED} bf16[4,8], or f32. Call"),
        ((WIDE[0], WEIGHT), {}, f"weight is bf16[6,8]. {WANTED} f32[4,8]. Call"),
        ((array(4, 8, dtype=jnp.float16), WIDE[1]), {}, f"weight is f32[6,8]. {WANTED} f16[4,8]. Call"),
        ((*WIDE, array(6)), {}, "bias is bf16[6]. Expected f32 or the dtype of x, which is f32[4,8]"),
        (
            WIDE,
            {"out_dtype": jnp.bfloat16},
            "the result is bf16[4,6]. Expected f32 or the dtype of x, which is f32[4,8]",
        ),
        ((X, WEIGHT), {"out": (4, 5)}, "the result is f32[4,5]. Expected shape (4, 6)"),
        ((X, WEIGHT), {"out": (24,)}, "the result is f32[24]. Expected shape (4, 6)"),
        ((X, WEIGHT), {"out_dtype": jnp.float16}, "the result is f16[4,6]. Expected f32 or the"),
        ((X, WEIGHT, array(5)), {}, "bias is bf16[5]. Expected shape (6), one per expert"),
        ((X, WEIGHT, array(1, 6)), {}, "bias is bf16[1,6]. Expected shape (6), one per expert"),
        ((X, WEIGHT, array(6, dtype=jnp.float16)), {}, "bias is f16[6]. Expected f32 or the dtype of x"),
        ((X, WEIGHT, array(6), array(6)), {}, "got 4 operands. Expected x, weight and at most one bias"),
    ],
)
def test_wrong_operands_are_refused_by_name_and_value(call, operands, out, words):
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as refused:
        call(*operands, **out)
    assert words in str(refused.value)


def test_status_of_the_kernel_becomes_an_error_with_its_words(call):
    operands = array(4, 8), array(6, 8)
    with pytest.raises(Exception, match="UNIMPLEMENTED") as refused:
        call(*operands, config=1)
    assert "with x bf16[4,8], weight bf16[6,8], config 1: stub says 1" in str(refused.value)
    with pytest.raises(Exception, match=r"INTERNAL.*stub says 2"):
        call(*operands, config=2)


@pytest.mark.parametrize("routes", [0, 1])
def test_handlers_are_command_buffer_compatible(shim, routes):
    # COMMAND_BUFFER_COMPATIBLE is 1 << 0
    assert shim.handler_traits(routes) & 1, "XLA would not capture it in a CUDA graph"


@pytest.fixture
def route(shim, monkeypatch):
    """`cuda.route` with the handler on the CPU in the place of the GPU's."""
    monkeypatch.setattr(cuda, "ROUTE_TARGET", ROUTE_ON_CPU)
    cpu = jax.local_devices(backend="cpu")[0]

    def run(*operands, spec, config=None, weight_layout="experts_hidden"):
        with jax.default_device(cpu):
            operands = [None if operand is None else jax.device_put(operand, cpu) for operand in operands]
            options = {"spec": spec, "return_logits": True, "weight_layout": weight_layout, "config": config}
            routing = cuda.route(*operands, **options)
            return jax.tree.map(np.asarray, routing)

    return run


SPEC = RoutingSpec(
    5, "sigmoid", True, 0.25, 0.5, -2.0, num_groups=3, group_topk=2, group_score="max", masked_choice=0.0,
    select_on="logits", round_logits=True,
)  # fmt: skip


def test_the_spec_and_sizes_reach_the_kernel_that_routes(route):
    no_dtype, config = -1, -1
    facts = [7, 8, 6, 1, config, no_dtype, no_dtype, 2, 1, 1, 1, 3, 2, 1, 0.25, 0.5, -2, 0, 0]
    for layout, shape in (("experts_hidden", (6, 8)), ("hidden_experts", (8, 6))):
        found = route(array(7, 8), array(*shape), *[None] * 4, spec=SPEC, weight_layout=layout).weights.ravel()[:20]
        assert found.tolist() == [*facts, experts_axis(layout)]
    assert route(array(70, 8), array(6, 8), *[None] * 4, spec=SPEC, config=3).weights.ravel()[4] == 3
    lent = route(array(70, 8), array(6, 8), *[None] * 4, spec=SPEC).weights.ravel()[18]
    assert lent == cuda.workspace_bytes(70, 6) > 0


def test_a_symbolic_number_of_tokens_reaches_the_kernel_as_the_number_of_the_call(shim, monkeypatch):
    monkeypatch.setattr(cuda, "ROUTE_TARGET", ROUTE_ON_CPU)
    shapes = jax.export.symbolic_args_specs((array(7, 8), array(256, 8)), ("t, _", None))
    check = jax.export.DisabledSafetyCheck.custom_call(ROUTE_ON_CPU)

    def call(x, weight):
        return cuda.route(x, weight, *[None] * 4, spec=SPEC, return_logits=True)

    exported = jax.export.export(jax.jit(call), platforms=("cpu",), disabled_checks=[check])(*shapes)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for tokens in (7, 64, 65, 4096, 4097):
            facts = np.asarray(exported.call(array(tokens, 8), array(256, 8)).weights).ravel()
            assert facts[:5].tolist() == [tokens, 8, 256, 1, -1]
            assert facts[18] == cuda.workspace_bytes(tokens, 256) + 16  # so that it is never empty, with an address


@pytest.mark.parametrize("there", [*itertools.product([False, True], repeat=4)])
def test_optional_operands_reach_the_kernel_that_routes_whichever_others_are_there(route, there):
    values = (
        array(6, dtype=jnp.float32, seed=1),
        array(6, dtype=jnp.float32, seed=2),
        array(6, seed=3),
        np.arange(35, dtype=np.int32).reshape(7, 5),
    )
    given = [value if wanted else None for value, wanted in zip(values, there, strict=True)]
    routing = route(array(7, 8), array(6, 8), *given, spec=SPEC)
    expected = [-1.0 if value is None else float(value[0]) for value in given[:3]]
    assert routing.logits.ravel()[:3].tolist() == expected
    assert routing.experts.tolist() == (values[3] if there[3] else np.full((7, 5), -1)).tolist()
    assert routing.weights.ravel()[5:7].tolist() == [2 if there[1] else -1, 0 if there[2] else -1]


@pytest.mark.parametrize(
    ("operands", "words"),
    [
        ((None, array(5), None, None), "correction_bias is bf16[5]. Expected shape (6), one per expert"),
        ((None, None, array(6, dtype=jnp.float16), None), "expert_scale is f16[6]. Expected f32 or the dtype of x"),
        ((None, None, None, np.zeros((7, 4), np.int32)), "the experts to replay is dtype4[7,4]. Expected shape (7, 5)"),
        ((None, None, None, np.zeros((7, 5), np.float32)), "the experts to replay is f32[7,5]. Expected s32"),
        ((array(5), None, None, None), "bias is bf16[5]. Expected shape (6), one per expert"),
    ],
)
def test_wrong_operands_of_routing_are_refused_by_name_and_value(route, operands, words):
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as refused:
        route(array(7, 8), array(6, 8), *operands, spec=SPEC)
    assert words in str(refused.value)


def test_status_of_the_kernel_that_routes_becomes_an_error_with_its_words(route):
    with pytest.raises(Exception, match="UNIMPLEMENTED") as refused:
        route(array(7, 8), array(6, 8), *[None] * 4, spec=SPEC, config=1)
    assert "with x bf16[7,8], weight bf16[6,8], config 1: stub says 1" in str(refused.value)


def test_ctypes_structures_have_the_layout_of_the_c_headers(tmp_path):
    lines = []
    for name, structure in {"jr_router_gemm_args": cuda.RouterGemmArgs, "jr_route_args": cuda.RouteArgs}.items():
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});")
        for member, *_ in structure._fields_:
            field = getattr(structure, member)
            inside = {"integers": "spec.top_k", "floats": "spec.renormalize_epsilon"}.get(member, member)
            lines.append(f"static_assert(offsetof({name}, {inside}) == {field.offset});")
            if inside == member:
                lines.append(f"static_assert(sizeof({name}::{member}) == {field.size});")
    integers = ("top_k", "score_function", "renormalize", "select_on_logits", "round_logits", "num_groups")
    integers += ("group_topk", "group_score", "renormalize_epsilon", "renormalize_min", "scaling_factor")
    for place, member in enumerate((*integers, "masked_choice")):
        lines.append(f"static_assert(offsetof(jr_routing_spec, {member}) == {4 * place});")
    layouts = {name: experts_axis(name) for name in WEIGHT_LAYOUTS}
    for name, code in (cuda.DTYPES | layouts | cuda.SCORE_FUNCTIONS).items():
        lines.append(f"static_assert(JR_{name.upper()} == {code});")
    lines += [f"static_assert(JR_TOP2_SUM == {cuda.GROUP_SCORES['top2_sum']});"]
    lines += [f"static_assert(JR_GROUP_MAX == {cuda.GROUP_SCORES['max']});"]
    lines += [f"static_assert(JR_OP_{name.upper()} == {code});" for name, code in cuda.OPERATIONS.items()]
    compile_here(tmp_path, '#include "route.h"\n' + "\n".join(lines) + "\n", "-c")
