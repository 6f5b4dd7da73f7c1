"""Routing with Pallas: interpreted on the CPU under a race detector, lowered for CUDA without a GPU, and its refusals.

What is interpreted runs in a process of its own with a time limit, as in test_pallas.py: functions named `check_...`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_pallas import ONE_OF_A_KIND, in_interpreter

import jax_router as jr
from jax_router import parity
from jax_router.dispatch import Device, Problem
from jax_router.implementations import pallas, pallas_gemm, pallas_routing
from jax_router.routing import Routing, RoutingSpec, route_logits, routing_weights

mosaic = pytest.mark.skipif(
    jax.__version_info__[:2] < pallas.FIRST_JAX, reason=f"needs jax 0.11 or newer, this is jax {jax.__version__}"
)
H200 = Device("gpu", "NVIDIA H200", "9.0")
GPT_OSS = RoutingSpec(4, "softmax_topk")
QWEN3 = RoutingSpec(8, "softmax", renormalize=True)
DEEPSEEK_V3 = RoutingSpec(8, "sigmoid", True, renormalize_epsilon=1e-20, scaling_factor=2.5, num_groups=8, group_topk=4)
GROUPS = {"num_groups": 8, "group_topk": 3}
# experts, dtypes of bias, correction bias and scale (None for none), spec
CASES: dict[str, tuple[int, str | None, str | None, str | None, RoutingSpec]] = {
    "gpt-oss": (128, "bfloat16", None, None, GPT_OSS),
    "qwen3": (128, None, None, None, QWEN3),
    "deepseek-v3": (256, None, "float32", None, DEEPSEEK_V3),
    "masked with zero": (64, "float32", "bfloat16", None, RoutingSpec(8, "sigmoid", **GROUPS, masked_choice=0.0)),
    "best group": (160, None, None, None, RoutingSpec(6, "softmax", **GROUPS, group_score="max", scaling_factor=16.0)),
    "sqrtsoftplus": (72, None, "float32", None, RoutingSpec(6, "sqrtsoftplus", True, 0.25, scaling_factor=1.5)),
    "on logits": (33, "float32", "float32", None, RoutingSpec(6, "sigmoid", True, 0.0, 6.0, select_on="logits")),
    "rounded": (40, "bfloat16", None, "bfloat16", RoutingSpec(8, "softmax", True, round_logits=True)),
    "scaled": (8, None, "bfloat16", "float32", RoutingSpec(2, "softmax_topk")),
    "one": (1, "float32", None, "float32", RoutingSpec(1, "sqrtsoftplus")),
}


def operands(case: str, tokens: int, hidden: int, dtype: str = "bfloat16") -> tuple[Any, ...]:
    """x, weight, bias, correction bias and scale."""
    experts, *dtypes, _ = CASES[case]
    generator = np.random.default_rng(0)
    x = generator.standard_normal((tokens, hidden)).astype(dtype)
    weight = (generator.standard_normal((experts, hidden)) / hidden**0.5).astype(dtype)
    per_expert = [None if kind is None else generator.standard_normal(experts).astype(kind) for kind in dtypes]
    return tuple(None if array is None else jnp.asarray(array) for array in (x, weight, *per_expert))


def route(case: str, arrays: tuple[Any, ...], given: Any = None, config: int | None = None) -> Routing:
    return pallas.route(*arrays, given, spec=CASES[case][-1], return_logits=True, config=config)


def assert_close(weights: Any, expected: Any, experts: int, case: str) -> None:
    """Equal up to the rounding of the functions, some units each, and of the sum over the experts."""
    np.testing.assert_allclose(weights, expected, rtol=(experts + 32) * 2.0**-24, atol=1e-37, err_msg=case)


def check_agrees_with_the_specification() -> None:
    """Of its own logits, which are those of router_gemm, bit for bit. Tokens one by one, and four at a time."""
    for number, (case, (experts, *_, spec)) in enumerate(CASES.items()):
        dtype = "float16" if number % 2 and CASES[case][1] != "bfloat16" else "bfloat16"
        arrays = operands(case, (1, 4, 5)[number % 3], 72, dtype)
        x, weight, bias, correction, scale = arrays
        weights, selected, logits = route(case, arrays)
        gemm = pallas.router_gemm(x, weight, bias, out_dtype=jnp.float32)
        np.testing.assert_array_equal(np.asarray(logits).view(np.int32), np.asarray(gemm).view(np.int32), case)
        expected, chosen = route_logits(logits, correction, scale, None, spec=spec, dtype=x.dtype.name)
        np.testing.assert_array_equal(selected, chosen, case)
        assert_close(weights, expected, experts, case)
        assert selected.dtype == jnp.int32


def check_replay() -> None:
    """Given experts, in another order and repeated, get the specification's weights; those that do not exist, NaN."""
    for number, case in enumerate(("gpt-oss", "deepseek-v3", "rounded", "scaled")):
        experts, *_, spec = CASES[case]
        arrays = operands(case, (4, 5)[number % 2], 72)
        given = np.random.default_rng(0).integers(experts, size=(len(arrays[0]), spec.top_k), dtype=np.int32)
        given[1, :2] = (-1, 3)
        given[2, :2] = (3, experts)
        weights, returned, logits = route(case, arrays, jnp.asarray(given))
        np.testing.assert_array_equal(returned, given)
        rounded = logits.astype("bfloat16").astype(jnp.float32) if spec.round_logits else logits
        expected = routing_weights(rounded, jnp.asarray(given), arrays[4], spec)
        assert np.isnan(np.asarray(expected)).any()
        assert_close(weights, expected, experts, case)


SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 0.5, 3e38, -3e38], np.float32)


def check_order_is_that_of_top_k() -> None:
    """Ties, zeros and NaN of both signs, infinities, subnormal numbers; straight into the second kernel."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    grouped = RoutingSpec(8, "sigmoid", select_on="logits", num_groups=8, group_topk=4)
    specs = (
        (RoutingSpec(8, "sigmoid"), 33, False),
        (RoutingSpec(5, "sqrtsoftplus", select_on="logits"), 64, True),
        (RoutingSpec(4, "softmax"), 72, False),
        (grouped, 128, True),
        (dataclasses.replace(grouped, group_score="max", masked_choice=0.0), 128, False),
    )
    for (spec, experts, corrected), tokens in zip(specs, (64, 63, 64, 64, 63), strict=True):
        generator = np.random.default_rng(experts)
        sums = np.zeros((1, 64, -(-experts // 64) * 64), np.float32)
        sums[0, :, :experts] = generator.choice(SPECIAL, (64, experts))
        sums[0, :16, :experts] = generator.choice(SPECIAL[:4], (16, experts))
        sums[0, 16:22, :experts] = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 0.5], np.float32)[:, None]
        sums[0, 22:26, : experts // 2].view(np.int32)[...] = -1  # NaN with a sign
        logits = jnp.asarray(sums[0, :tokens, :experts])
        correction = jnp.asarray(generator.choice([0.0, 0.25], experts).astype(np.float32)) if corrected else None
        sizes = {"tokens": tokens, "experts": experts, "dtype": jnp.bfloat16}
        options = {"return_logits": False, "interpret": plgpu.InterpretGPUParams()}
        arrays = jnp.asarray(sums), None, correction, None, None
        weights, selected, none = pallas_routing.route_sums(*arrays, spec=spec, **sizes, **options)
        assert none is None
        expected, chosen = route_logits(logits, correction, None, None, spec=spec)
        np.testing.assert_array_equal(selected, chosen, str(spec))
        assert_close(weights, expected, experts, str(spec))


def exact_problem(tokens: int, experts: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """x, weight and logits: products exact in any order, and slices of magnitudes that tell in which they are added."""
    hidden, generator = 5 * 64 + 8, np.random.default_rng(0)
    scale = np.repeat(2.0 ** np.array([0, 3, 7, 1, 5, 2]), 64)[:hidden]
    x = generator.integers(-255, 256, (tokens, hidden)) * scale
    weight = generator.integers(-255, 256, (experts, hidden))
    slices = [(x[:, k : k + 64] @ weight[:, k : k + 64].T).astype(np.float32) for k in range(0, hidden, 64)]
    assert pallas_gemm.slices_of(hidden) == pallas_gemm.Slices(6, 1)
    logits = functools.reduce(np.add, [slices[k] + slices[k + 1] for k in (0, 2, 4)])  # pairs are the quarters of six
    assert (logits != functools.reduce(np.add, slices)).any(), "this data cannot tell the order"
    return jnp.asarray(x.astype(ml_dtypes.bfloat16)), jnp.asarray(weight.astype(ml_dtypes.bfloat16)), logits


def check_every_kind_of_configuration_routes_the_same_logits() -> None:
    x, weight, logits = exact_problem(9, 72)
    for config in ONE_OF_A_KIND:
        chosen = pallas_gemm.CONFIGS[config]
        got = pallas.route(x, weight, *[None] * 4, spec=RoutingSpec(3), return_logits=True, config=config)
        np.testing.assert_array_equal(got.logits, logits, str(chosen))
        np.testing.assert_array_equal(got.experts, jax.lax.top_k(jnp.asarray(logits), 3)[1], str(chosen))


def interpret(spec: RoutingSpec, tokens: int) -> tuple[bool, Routing]:
    """Whether the race detector found a race in the second kernel, and its result."""
    import jax.experimental.pallas.mosaic_gpu as plgpu
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    sums = np.random.default_rng(0).standard_normal((2, 64, 128), np.float32)
    sizes = {"tokens": tokens, "experts": 72, "dtype": jnp.bfloat16}
    options = {"return_logits": True, "interpret": plgpu.InterpretGPUParams(detect_races=True)}
    interpreter.reset_gpu_interpret_mode_state()
    results = pallas_routing.route_sums(jnp.asarray(sums), *[None] * 4, spec=spec, **sizes, **options)
    result = Routing(*jax.block_until_ready(results))
    return interpreter.get_races().races_found, result


def check_no_race() -> None:
    """Tokens one by one, and four at a time. And where all write to one place, the same detector must find a race."""
    for spec, tokens in itertools.product((QWEN3, DEEPSEEK_V3), (5, 20)):
        races_found, result = interpret(spec, tokens)
        assert not races_found, (spec, tokens)
        expected, chosen = route_logits(result.logits, None, None, None, spec=spec)
        np.testing.assert_array_equal(result.experts, chosen)
        assert_close(result.weights, expected, 72, str(spec))
    axis_index = jax.lax.axis_index
    jax.lax.axis_index = lambda name: axis_index(name) * 0
    for tokens in (5, 20):
        assert interpret(QWEN3, tokens)[0], tokens


CHECKS = [name for name in dict(globals()) if name.startswith("check_")]


@mosaic
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(check: str) -> None:
    in_interpreter(check, "test_pallas_route")


def lower(spec: RoutingSpec, hidden: int, experts: int, number: int, tokens: int, config: int | None = None) -> None:
    """Lower for CUDA, all of Mosaic's Python passes included. `number` cycles through dtypes, operands and results."""
    dtype = ("bfloat16", "float16")[number % 2]
    x, weight = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((tokens, hidden), (experts, hidden)))
    bias, correction, scale = (
        None if kind is None else jax.ShapeDtypeStruct((experts,), kind)
        for kind in ((None, dtype, "float32")[(number + shift) % 3] for shift in range(3))
    )
    given = jax.ShapeDtypeStruct((tokens, spec.top_k), "int32") if number % 4 == 3 else None
    function = jax.jit(functools.partial(pallas.route, spec=spec, return_logits=number % 2 == 1, config=config))
    arrays = x, weight, bias, correction, scale, given
    text = function.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 2, "not as many launches as expected"


@mosaic
@pytest.mark.parametrize("case", CASES)
def test_every_spec_lowers_for_cuda(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number with one token in half of the cases, and with 64 in the others."""
    monkeypatch.delenv(pallas.INTERPRET_VARIABLE, raising=False)
    experts, *_, spec = CASES[case]
    for number in range(6):
        lower(spec, 2880, experts, number, (1, 64)[(number + list(CASES).index(case)) % 2])


@mosaic
def test_the_largest_problems_lower_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pallas.INTERPRET_VARIABLE, raising=False)
    for number, spec in enumerate((RoutingSpec(32), RoutingSpec(32, "sigmoid", num_groups=32, group_topk=4))):
        lower(spec, 2048, 1024, number, (1, 4096)[number])


@mosaic
@pytest.mark.parametrize("enable_x64", [False, True])
def test_every_configuration_lowers_for_cuda(enable_x64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pallas.INTERPRET_VARIABLE, raising=False)
    with jax.enable_x64(enable_x64):
        for config in range(len(pallas_gemm.CONFIGS)):
            if config % 2 == enable_x64:
                lower(GPT_OSS, 2880, 128, config, 33, config)
            else:
                lower(DEEPSEEK_V3, 7168, 256, config, 4096, config)


@mosaic
@pytest.mark.parametrize("case", ["on logits", "deepseek-v3"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_maxima_are_of_signed_integers(case: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What jnp.where(mask, constant, keys) returns is unsigned to Mosaic in jax 0.11.2, and so would be its maximum."""
    from jax.experimental.mosaic.gpu.utils import arith, nvvm

    monkeypatch.delenv(pallas.INTERPRET_VARIABLE, raising=False)
    emitted = set()

    def watch(module: Any, name: str, what: Callable[..., str]) -> None:
        emit = getattr(module, name)

        def watched(*args: Any, **others: Any) -> Any:
            emitted.add(what(*args))
            return emit(*args, **others)

        monkeypatch.setattr(module, name, watched)

    watch(nvvm, "redux_sync", lambda value, kind, *_: f"redux.sync {kind.name}")
    watch(arith, "maxsi", lambda *_: "maxsi")
    watch(arith, "maxui", lambda *_: "maxui")
    experts, *_, spec = CASES[case]
    lower(spec, 64, experts, 2, tokens)
    assert emitted == {"redux.sync MAX", "maxsi"}


@pytest.mark.parametrize(
    ("spec", "experts", "reason"),
    [
        (RoutingSpec(4), 1025, "routes to at most 1024 experts (registers hold a token's), they are 1025"),
        (RoutingSpec(33), 64, "selects at most 32 experts (one unrolled round each), top_k is 33"),
        (
            RoutingSpec(4, num_groups=64, group_topk=8),
            256,
            "takes at most 32 groups (one unrolled step each), num_groups is 64",
        ),
    ],
)
def test_refuses_with_a_reason(spec: RoutingSpec, experts: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert pallas.why_unsupported(Problem(8, 2880, experts, spec=spec), H200) == reason


def test_takes_what_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    largest = (1024, RoutingSpec(32, num_groups=32, group_topk=1))
    for experts, spec in (largest, *((experts, spec) for experts, *_, spec in CASES.values())):
        assert pallas.why_unsupported(Problem(8, 2880, experts, spec=spec), H200) is None
        # What the router GEMM refuses is refused here too.
        assert pallas.why_unsupported(Problem(8, 2880, experts, "float32", spec=spec), H200) is not None


def test_sqrtsoftplus_is_accurate_where_its_exponential_is_lost_in_one() -> None:
    logits = np.concatenate([np.linspace(-80, 80, 1601), np.geomspace(1e-9, 1, 100)]).astype(np.float32)
    found = pallas_routing._sqrt_softplus(jnp.asarray(logits))
    expected = np.sqrt(np.logaddexp(logits.astype(np.float64), 0))
    np.testing.assert_allclose(found, expected, rtol=8 * 2.0**-24)


def packed(routing: Routing) -> np.ndarray:
    experts = np.asarray(routing.experts).view(np.float32)
    return np.concatenate([np.asarray(routing.weights), experts, np.asarray(routing.logits)], axis=1)


def on_gpu(case: str, tokens: int, config: int | None = None) -> tuple[Callable[[Any], Routing], tuple[Any, ...]]:
    x, *others = operands(case, tokens, 2880)
    compute = jax.jit(functools.partial(pallas.route, spec=CASES[case][-1], return_logits=True, config=config))
    return lambda x, given=None: compute(x, *others, given), (x, *others)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_specification_on_a_gpu(case: str) -> None:
    experts, *_, spec = CASES[case]
    compute, (x, weight, bias, correction, scale) = on_gpu(case, 257)
    weights, selected, logits = compute(x)
    gemm = jax.jit(functools.partial(jr.router_gemm, implementation="pallas"))(x, weight, bias)
    assert not len(parity.differing_rows(np.asarray(logits), np.asarray(gemm)))
    expected, chosen = route_logits(logits, correction, scale, None, spec=spec, dtype=x.dtype.name)
    np.testing.assert_array_equal(selected, chosen)
    assert_close(weights, expected, experts, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_row_bits_do_not_depend_on_the_batch(case: str) -> None:
    from test_row_bits import violations

    compute, (x, *_) = on_gpu(case, 257)
    assert list(violations(lambda x: packed(compute(x)), np.asarray(x), (1, 3, 4, 8, 64, 256, 1024), alone=20)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_replay_and_every_configuration_give_the_same_bits(case: str) -> None:
    for tokens in (256, 257):
        compute, (x, *_) = on_gpu(case, tokens)
        expected = compute(x)
        replayed = compute(x, expected.experts)
        assert not len(parity.differing_rows(packed(replayed), packed(expected)))
        for config, chosen in enumerate(pallas_gemm.CONFIGS):
            other = on_gpu(case, tokens, config)[0](x)
            assert not len(parity.differing_rows(packed(other), packed(expected))), chosen
