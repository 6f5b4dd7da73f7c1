"""What every implementation of `route` must do, on every case of routing_cases.py.

Its logits are those of its `router_gemm`, bit for bit. Experts and weights are those of the specification applied to
these very logits: experts exactly, but for tokens so close that a few ulps of a score decide, which are counted;
weights within derived roundings of float64. Replay gives the same bits. A token's bits depend on the token alone.
"""

from __future__ import annotations

import functools

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_cases as cases
from routing_cases import CASES
from test_row_bits import dtype_of, violations

import jax_router as jr
from jax_router import dispatch, parity, routing

pytestmark = pytest.mark.usefixtures("compiled_in_haste")
KERNELS = tuple(pytest.param(name, marks=pytest.mark.gpu) for name in ("pallas", "cuda"))
every_implementation = pytest.mark.parametrize("implementation", ["xla", *KERNELS])
every_case = pytest.mark.parametrize("name", CASES)
TOKENS = (1, 16, 257)
ULPS = 8  # what a score may be off by before the order of experts is compared


@functools.cache
def operands(name: str, tokens: int) -> tuple[jax.Array | None, ...]:
    """x, weight, bias, correction_bias and expert_scale of a case."""
    case, generator = CASES[name], np.random.default_rng(tokens)
    x = generator.standard_normal((tokens, case.hidden))
    weight = 2 * generator.standard_normal((case.experts, case.hidden)) / np.sqrt(case.hidden)
    bias = (
        None if case.bias is None else jnp.asarray(generator.standard_normal(case.experts).astype(dtype_of(case.bias)))
    )
    vectors = (None if vector is None else jnp.asarray(vector) for vector in case.vectors())
    return *(jnp.asarray(array.astype(dtype_of(case.dtype))) for array in (x, weight)), bias, *vectors


def refusal(implementation: str, name: str, tokens: int) -> str | None:
    case = CASES[name]
    problem = dispatch.Problem(tokens, case.hidden, case.experts, case.dtype, None, case.bias, spec=case.spec)
    return dispatch.why_unsupported(problem, dispatch.Device.default(), implementation)


@functools.cache
def compiled(implementation: str, spec: jr.RoutingSpec, return_logits: bool):
    def route(x, weight, bias, correction_bias, expert_scale, experts):
        vectors = {"correction_bias": correction_bias, "expert_scale": expert_scale, "experts": experts}
        options = {"spec": spec, "implementation": implementation, "return_logits": return_logits}
        return jr.route(x, weight, bias, **vectors, **options)

    return jax.jit(route)


def routed(implementation: str, name: str, arrays, experts=None, *, return_logits: bool = True) -> jr.Routing:
    """The routing of a case as numpy arrays."""
    return jax.tree.map(np.asarray, compiled(implementation, CASES[name].spec, return_logits)(*arrays, experts))


def taken(implementation: str, name: str) -> list[int]:
    """The numbers of tokens that the implementation takes. Those that it does not it must refuse with the reason."""
    reasons = {tokens: refusal(implementation, name, tokens) for tokens in TOKENS}
    for tokens, reason in reasons.items():
        if reason is not None:
            with pytest.raises(NotImplementedError) as caught:
                routed(implementation, name, operands(name, tokens))
            assert reason.rstrip(".") in str(caught.value)
    return [tokens for tokens, reason in reasons.items() if reason is None]


def same_bits(actual: np.ndarray, expected: np.ndarray, **options) -> bool:
    return not len(parity.differing_rows(actual, expected, **options))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("implementation", "names"),
    [("cuda", CASES), ("pallas", ("gpt-oss", "Qwen3", "DeepSeek-V3"))],
    ids=["cuda", "pallas"],
)
def test_these_routers_are_taken(implementation, names) -> None:
    refusals = {name: refusal(implementation, name, 64) for name in names}
    assert not any(refusals.values()), refusals


@every_implementation
@every_case
def test_logits_are_those_of_router_gemm_bit_for_bit(implementation, name) -> None:
    gemm = jax.jit(functools.partial(jr.router_gemm, implementation=implementation))
    for tokens in taken(implementation, name):
        arrays = operands(name, tokens)
        routing_with, routing_without = (
            routed(implementation, name, arrays, return_logits=return_logits) for return_logits in (True, False)
        )
        assert routing_without.logits is None
        if implementation == "xla" and bounds.xla_picks_kernels():
            truth = parity.reference(*(None if array is None else np.asarray(array) for array in arrays[:3]))
            dtype, hidden = CASES[name].dtype, CASES[name].hidden
            accumulation = parity.accumulation_of("xla", hidden=hidden, dtype=dtype, platform="gpu")
            assert parity.compare(routing_with.logits, truth, accumulation).ok
            continue
        assert same_bits(routing_with.logits, np.asarray(gemm(*arrays[:3]))), tokens
        assert same_bits(routing_without.weights, routing_with.weights), f"{tokens}: logits change the weights"
        assert same_bits(routing_without.experts, routing_with.experts), f"{tokens}: logits change the experts"


def rounded(name: str, logits: np.ndarray) -> np.ndarray:
    case = CASES[name]
    return logits.astype(dtype_of(case.dtype)).astype(np.float32) if case.spec.round_logits else logits


@every_implementation
@every_case
def test_experts_and_weights_are_those_of_the_specification(implementation, name) -> None:
    case = CASES[name]
    spec, (correction, scale) = case.spec, case.vectors()
    specification = jax.jit(functools.partial(routing.route_logits, spec=spec, dtype=case.dtype))
    for tokens in taken(implementation, name):
        arrays = operands(name, tokens)
        weights, experts, logits = routed(implementation, name, arrays)
        assert (weights.dtype, experts.dtype, logits.dtype) == (np.float32, np.int32, np.float32)
        expected = np.asarray(specification(logits, *arrays[3:], None)[1])
        scored = rounded(name, logits)
        decided = np.ones(tokens, bool)
        if not cases.exact_choice(correction, spec):
            decided = ~cases.undecided(scored, correction, spec, ULPS)
            assert (~decided).sum() <= max(1, 0.05 * tokens), f"{(~decided).sum()} of {tokens} tokens are not compared"
        np.testing.assert_array_equal(experts[decided], expected[decided])
        assert all(len(set(row)) == spec.top_k and set(row) <= set(range(case.experts)) for row in experts.tolist())
        truth = cases.weigh(scored.astype(np.float64), experts, scale, spec)
        bound = cases.tolerance(scored, experts, spec) * np.abs(truth)
        np.testing.assert_array_less(np.abs(weights - truth), bound + 1e-30)


@every_implementation
def test_logits_are_rounded_as_float16_does_at_both_ends_of_its_range(implementation) -> None:
    """Ties of subnormal numbers and of the largest, overflow and -0.0: all that a shorter mantissa alone gets wrong."""
    spec = jr.RoutingSpec(8, "sqrtsoftplus", round_logits=True)
    of_columns = np.array([256, 1, 2.0**-12])
    wanted = np.array([65504, 65519, 65520, 2.0**-24, 1.25 * 2.0**-24, -(2.0**-26), 0, 2.0**-26])
    weight = np.zeros((8, 4096), np.float16)
    weight[:, 0] = wanted // 256 * (wanted > 1)
    weight[:, 1] = wanted % 256 * (wanted > 1)
    weight[:, 2] = wanted / 2.0**-12 * (wanted < 1)
    for tokens in TOKENS:
        x = np.zeros((tokens, 4096), np.float16)
        x[:, :3] = of_columns
        arrays = jnp.asarray(x), jnp.asarray(weight), None, None, None, None
        weights, experts, logits = jax.tree.map(np.asarray, compiled(implementation, spec, True)(*arrays))
        np.testing.assert_array_equal(logits, np.broadcast_to(wanted, logits.shape))
        with np.errstate(over="ignore"):
            scored = logits.astype(np.float16).astype(np.float64)
        np.testing.assert_array_equal(experts, cases.select(scored, None, spec))
        assert (experts[0] != cases.select(wanted[None], None, spec)).any()
        bounds.within(weights, bounds.weights(bounds.given(scored.astype(np.float32)), experts, np.ones(8), spec))


def equal_experts(name: str, arrays, twins: np.ndarray):
    """The operands with expert i's weights and biases replaced by those of expert twins[i]."""
    x, weight, bias, correction, scale = arrays
    bias, correction = (None if vector is None else vector[twins] for vector in (bias, correction))
    return x, weight[twins], bias, correction, scale


def decided_experts(name: str, arrays, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The experts of the specification for these logits, and the tokens for which no rounding can decide another."""
    spec, correction = CASES[name].spec, None if arrays[3] is None else np.asarray(arrays[3])
    specification = jax.jit(functools.partial(routing.route_logits, spec=spec, dtype=CASES[name].dtype))
    expected = np.asarray(specification(logits, *arrays[3:], None)[1])
    return expected, ~cases.undecided(rounded(name, logits), correction, spec, ULPS)


@every_implementation
@every_case
def test_of_equal_neighbours_the_lowest_is_taken(implementation, name) -> None:
    """All experts are pairs of equal ones."""
    tokens = 16
    if tokens not in taken(implementation, name):
        return
    arrays = equal_experts(name, operands(name, tokens), np.arange(CASES[name].experts) // 2 * 2)
    _, experts, logits = routed(implementation, name, arrays)
    expected, decided = decided_experts(name, arrays, logits)
    assert decided.sum() >= tokens - 2
    np.testing.assert_array_equal(experts[decided], expected[decided])


@every_implementation
@every_case
def test_a_tie_on_the_last_place_alone_goes_to_the_lower_expert(implementation, name) -> None:
    """The last expert that a token takes is made equal to a neighbour that it does not take."""
    tokens, number, seen = 16, CASES[name].experts, 0
    if tokens not in taken(implementation, name) or CASES[name].spec.top_k == number:
        return
    before = operands(name, tokens)
    selected = routed(implementation, name, before).experts
    for token in range(0, tokens, 3):
        last = selected[token, -1]
        neighbour = last ^ 1 if last ^ 1 < number else last - 1
        if neighbour in selected[token]:
            continue
        arrays = equal_experts(name, before, np.where(np.arange(number) == neighbour, last, np.arange(number)))
        _, experts, logits = routed(implementation, name, arrays)
        expected, decided = decided_experts(name, arrays, logits)
        np.testing.assert_array_equal(experts[decided], expected[decided])
        seen += decided[token] and experts[token, -1] == min(last, neighbour)
    assert seen or number < 8, "no token had such a tie"


@every_implementation
@every_case
def test_replay_gives_the_recorded_weights_bit_for_bit(implementation, name) -> None:
    spec, (_, scale) = CASES[name].spec, CASES[name].vectors()
    for tokens in taken(implementation, name):
        x, weight, bias, correction_bias, expert_scale = operands(name, tokens)
        recorded = routed(implementation, name, (x, weight, bias, correction_bias, expert_scale))
        for correction in {id(vector): vector for vector in (correction_bias, None)}.values():
            replayed = routed(implementation, name, (x, weight, bias, correction, expert_scale), recorded.experts)
            assert same_bits(replayed.experts, recorded.experts), tokens
            if implementation == "xla" and bounds.xla_picks_kernels():
                continue
            for field in ("weights", "logits"):
                assert same_bits(getattr(replayed, field), getattr(recorded, field)), (tokens, field)
        others = (recorded.experts[:, ::-1] + 1) % len(weight)
        replayed = routed(implementation, name, (x, weight, bias, correction_bias, expert_scale), others)
        np.testing.assert_array_equal(replayed.experts, others)
        scored = rounded(name, replayed.logits)
        truth = cases.weigh(scored.astype(np.float64), others, scale, spec)
        error, bound = np.abs(replayed.weights - truth), cases.tolerance(scored, others, spec) * np.abs(truth)
        np.testing.assert_array_less(error, bound + 1e-30)


@every_implementation
def test_replayed_ids_out_of_range_come_back_with_a_weight_of_nan(implementation) -> None:
    name = "Llama-4"
    for tokens in taken(implementation, name):
        experts = np.arange(tokens, dtype=np.int32)[:, None] % 20 - 2  # from -2 to 17, of 16 experts
        weights, given, _ = routed(implementation, name, operands(name, tokens), experts)
        np.testing.assert_array_equal(given, experts)
        np.testing.assert_array_equal(np.isnan(weights), (experts < 0) | (experts >= 16))


@every_implementation
@every_case
def test_nan_and_infinite_logits_are_routed_as_the_specification_says(implementation, name) -> None:
    case, tokens = CASES[name], 16
    if tokens not in taken(implementation, name):
        return
    x, weight, bias, correction_bias, expert_scale = operands(name, tokens)
    x = x.at[1, 2].set(jnp.nan).at[2, 3].set(jnp.inf)
    biases = [bias]
    for special in (np.nan, np.inf, -np.inf):
        mixed = np.random.default_rng(case.experts).standard_normal(case.experts).astype(np.float32)
        mixed[case.experts // 2 :: 3] = special
        biases.append(jnp.asarray(mixed))
    specification = jax.jit(functools.partial(routing.route_logits, spec=case.spec, dtype=case.dtype))
    for added in biases:
        if added is not None and case.bias not in (None, "float32"):
            added = added.astype(case.bias)
        weights, experts, logits = routed(implementation, name, (x, weight, added, correction_bias, expert_scale))
        gemm = jr.router_gemm(x, weight, added, implementation=implementation)
        assert same_bits(logits, np.asarray(gemm), nan_payloads=False)
        expected = np.asarray(specification(logits, correction_bias, expert_scale, None)[1])
        decided = np.ones(tokens, bool)
        if not cases.exact_choice(case.vectors()[0], case.spec):
            decided = ~cases.undecided(rounded(name, logits), case.vectors()[0], case.spec, ULPS)
            assert decided.sum() >= tokens - 2
        np.testing.assert_array_equal(experts[decided], expected[decided])
        expected_weights = np.asarray(specification(logits, correction_bias, expert_scale, experts)[0])
        # Both are rounded, from logits that were.
        allowed = 2 * cases.tolerance(rounded(name, logits), experts, case.spec)
        np.testing.assert_array_equal(np.isfinite(weights), np.isfinite(expected_weights))
        finite = np.isfinite(weights)
        error = np.abs(weights - expected_weights, where=finite, out=np.zeros_like(weights))
        assert (error <= allowed * np.abs(expected_weights, where=finite, out=np.zeros_like(weights))).all()
        np.testing.assert_array_equal(weights[~finite], expected_weights[~finite])


ROWS = ("gpt-oss", "DeepSeek-V3", "DeepSeek-V2", "groups of 9", "rounded logits, corrected", "one expert")


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("name", [*ROWS, "1024 experts, corrected"])
def test_a_token_is_routed_alike_in_every_batch(implementation, name) -> None:
    tokens = 1031 if implementation == "cuda" else 257
    x, *others = operands(name, tokens)
    generator = np.random.default_rng(0)
    x = (np.asarray(x, np.float32) * np.exp2(generator.integers(-3, 3, (tokens, 1)))).astype(x.dtype)

    def function(x: np.ndarray) -> np.ndarray:
        weights, experts, logits = routed(implementation, name, (x, *others))
        return np.concatenate([weights, experts.view(np.float32), logits], -1)

    sizes = (
        1,
        2,
        3,
        7,
        8,
        9,
        16,
        17,
        64,
        65,
        128,
        129,
        *((256, 512, 1000, 4096) if implementation == "cuda" else (1025,)),
    )
    if refusal(implementation, name, 1) is None:
        assert list(violations(function, x, sizes, alone=40)) == []
    else:
        assert implementation != "cuda", "cuda takes every number of tokens"
        sizes = [size for size in sizes if refusal(implementation, name, size) is None]
        assert list(violations(function, x, sizes, alone=0)) == []
