"""The specification of routing: the order of `jax.lax.top_k`, groups, scores, and which specs make no sense.

Compared with formulations in numpy (routing_cases.py) and in PyTorch (torch_ref), neither of which knows JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import pickle

import bounds
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import routing_cases as cases
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import CASES

from jax_router import RoutingSpec, checks, routing
from jax_router.implementations import xla

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="PyTorch is not installed: its reference is not compared. numpy's formulation is.",
)
SPECIAL = np.array([np.nan, np.inf, 3.0, 1.0, 0.0, -0.0, -1.0, -2.5, -np.inf], np.float32)
SUBNORMAL = np.array([1e-45, -1e-45], np.float32)  # may count for 0 where numbers are added


def special_rows(tokens: int, experts: int, special: np.ndarray = SPECIAL) -> np.ndarray:
    """Rows full of ties, of zeros of both signs, of NaN and infinities."""
    generator = np.random.default_rng(experts)
    few = [generator.choice(special, 1 + token % len(special), replace=False) for token in range(tokens)]
    return np.stack([generator.choice(values, experts) for values in few])


def ordinary(tokens: int, experts: int, deviation: float = 2.0) -> np.ndarray:
    return (deviation * np.random.default_rng(experts).standard_normal((tokens, experts))).astype(np.float32)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 2), (33, 8), (128, 4), (1024, 32)])
@pytest.mark.parametrize("score_function", routing.SCORE_FUNCTIONS)
def test_selection_is_exactly_in_the_order_of_top_k(score_function, experts, top_k) -> None:
    logits = special_rows(200, experts, np.concatenate([SPECIAL, SUBNORMAL]))
    selected = routing.select_experts(jnp.asarray(logits), None, RoutingSpec(top_k, score_function))
    assert selected.dtype == jnp.int32
    np.testing.assert_array_equal(selected, jax.lax.top_k(logits, top_k)[1])
    np.testing.assert_array_equal(selected, cases.best(logits, top_k))


def test_ties_go_to_the_lowest_expert_and_zeros_have_signs() -> None:
    spec = RoutingSpec(4, "softmax_topk")
    logits = jnp.array([[1.0, 2.0, 1.0, 2.0, 1.0], [-0.0, 0.0, -0.0, 0.0, -1.0], [np.nan, np.inf, 0, -np.inf, np.nan]])
    assert routing.select_experts(logits, None, spec).tolist() == [[1, 3, 0, 2], [1, 3, 0, 2], [0, 4, 1, 2]]


def test_nan_is_the_highest_whatever_its_sign() -> None:
    negative = np.copysign(np.float32(np.nan), np.float32(-1))
    logits = jnp.array([[negative, 5.0, np.nan, np.inf, negative]], jnp.float32)
    for spec in (RoutingSpec(4), RoutingSpec(4, num_groups=1, group_topk=1, group_score="max", select_on="logits")):
        assert routing.select_experts(logits, None, spec).tolist() == [[0, 2, 4, 3]]


@pytest.mark.parametrize("masked_choice", [0.0, -math.inf])
@pytest.mark.parametrize("group_score", routing.GROUP_SCORES)
@pytest.mark.parametrize(
    ("experts", "groups", "kept", "top_k"), [(12, 4, 2, 5), (160, 5, 1, 32), (8, 4, 4, 8), (6, 3, 1, 2)]
)
def test_groups_are_selected_exactly(experts, groups, kept, top_k, group_score, masked_choice) -> None:
    spec = RoutingSpec(
        top_k, "sigmoid", num_groups=groups, group_topk=kept, group_score=group_score, masked_choice=masked_choice,
        select_on="logits",
    )  # fmt: skip
    logits = np.concatenate([special_rows(300, experts), ordinary(100, experts)])
    correction = np.random.default_rng(0).choice(np.array([0.0, -0.0, 0.5, -2.0], np.float32), experts)
    for correction_bias in (None, correction):
        selected = routing.select_experts(jnp.asarray(logits), correction_bias, spec)
        np.testing.assert_array_equal(selected, cases.select(logits, correction_bias, spec))


def test_groups_keep_the_best_and_break_ties_as_experts_do() -> None:
    spec = functools.partial(RoutingSpec, 2, num_groups=3, group_topk=1, select_on="logits")
    logits = jnp.array([[4.0, 0.0, 3.0, 2.0, 2.5, 2.5], [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]])
    assert routing.select_experts(logits, None, spec(group_score="top2_sum")).tolist() == [[2, 3], [0, 1]]
    assert routing.select_experts(logits, None, spec(group_score="max")).tolist() == [[0, 1], [0, 1]]


def test_masked_experts_can_be_selected_where_they_count_for_zero() -> None:
    logits = jnp.array([[-1.0, -2.0, -3.0, -4.0]])
    spec = functools.partial(RoutingSpec, 2, num_groups=2, group_topk=1, select_on="logits")
    assert routing.select_experts(logits, None, spec()).tolist() == [[0, 1]]
    assert routing.select_experts(logits, None, spec(masked_choice=0.0)).tolist() == [[2, 3]]


def test_zeros_of_groups_keep_their_signs() -> None:
    logits = jnp.array([[-0.0, -0.0, 0.0, -0.0]])
    for group_score in routing.GROUP_SCORES:
        spec = RoutingSpec(1, num_groups=2, group_topk=1, group_score=group_score, select_on="logits")
        assert routing.select_experts(logits, None, spec).tolist() == [[2]], group_score


@pytest.mark.parametrize("score_function", routing.SCORE_FUNCTIONS)
def test_scores_agree_with_float64(score_function) -> None:
    logits = np.concatenate([ordinary(64, 96), ordinary(64, 96, 20.0)])
    truth = bounds.scores(bounds.given(logits), score_function)
    in_float64 = bounds.Real(truth.value, 2 * bounds.FLOAT64 * truth.error)  # both sides are rounded
    bounds.within(cases.score(logits.astype(np.float64), score_function), in_float64)
    bounds.within(routing.scores(jnp.asarray(logits), RoutingSpec(2, score_function)), truth)


def test_scores_at_infinity_and_of_nan() -> None:
    logits = jnp.array([[np.inf, -np.inf, np.nan, 0.0]])
    for score_function, expected in {
        "softmax": [np.nan] * 4,
        "softmax_topk": [np.inf, -np.inf, np.nan, 0],
        "sigmoid": [1, 0, np.nan, 0.5],
        "sqrtsoftplus": [np.inf, 0, np.nan, math.sqrt(math.log(2))],
    }.items():
        scores = routing.scores(logits, RoutingSpec(1, score_function))
        np.testing.assert_array_equal(scores[0, :3], expected[:3], err_msg=score_function)
        at_zero = bounds.Real(np.array(expected[3]), bounds.scores(bounds.given(np.zeros(1)), score_function).error[0])
        bounds.within(scores[0, 3], at_zero)


def test_the_correction_bias_moves_the_selection_and_not_the_weights() -> None:
    logits, correction = jnp.array([[2.0, 1.0, 0.0, -1.0]]), jnp.array([0.0, 0.0, 0.0, 1.0], jnp.bfloat16)
    spec = RoutingSpec(2, "sigmoid")
    weights, experts = routing.route_logits(logits, correction, None, None, spec=spec)
    assert experts.tolist() == [[3, 0]]
    np.testing.assert_array_equal(weights, jax.nn.sigmoid(logits)[:, jnp.array([3, 0])])


def specification(logits: np.ndarray, correction, scale, spec: RoutingSpec, dtype: str = "float32"):
    """Weights and experts of the specification, from numpy to numpy."""
    arrays = (None if array is None else jnp.asarray(array) for array in (logits, correction, scale))
    return map(np.asarray, routing.route_logits(*arrays, None, spec=spec, dtype=dtype))


@pytest.mark.parametrize("name", CASES)
def test_the_specification_agrees_with_numpy(name) -> None:
    case = CASES[name]
    spec, (correction, scale) = case.spec, case.vectors()
    logits = ordinary(400, case.experts)
    weights, experts = specification(logits, correction, scale, spec, case.dtype)
    assert (weights.dtype, experts.dtype) == (np.float32, np.int32)
    rounded = np.asarray(jnp.asarray(logits).astype(case.dtype).astype(jnp.float32)) if spec.round_logits else logits
    exact = cases.exact_choice(correction, spec)
    undecided = np.zeros(400, bool) if exact else cases.undecided(rounded, correction, spec, ulps=8)
    assert undecided.mean() < 0.05
    expected = cases.select(rounded if exact else rounded.astype(np.float64), correction, spec)
    np.testing.assert_array_equal(experts[~undecided], expected[~undecided])
    truth = cases.weigh(rounded.astype(np.float64), experts, scale, spec)
    bound = cases.tolerance(rounded, experts, spec) * np.abs(truth)
    np.testing.assert_array_less(np.abs(weights - truth), bound + 1e-30)


def test_the_undecided_are_those_whose_scores_are_close() -> None:
    spec, correction = RoutingSpec(2, "sigmoid"), np.zeros(4, np.float32)
    logits = np.array([[3, 2, 1, 0], [3, 3, 1, 0], [3, 2, 2, 0], [3, 2, 1, 1], [9, 2, 1, 0]], np.float32)
    assert not cases.undecided(logits, correction, spec, ulps=8).any(), "apart, or the same numbers"
    logits[:, 1] = np.nextafter(logits[:, 0], np.float32(0))
    assert cases.undecided(logits, correction, spec, ulps=8).all()
    groups = RoutingSpec(1, "sigmoid", num_groups=2, group_topk=1)
    logits = np.array([[2, 0, 1, 1], [0.5, 0.5, 1 + 2**-23, 0]], np.float32)
    assert cases.undecided(logits, None, groups, ulps=8).tolist() == [False, False]
    logits = np.array([[3, -1, -1.0, np.float32(3 + 2**-21)]], np.float32)
    assert cases.undecided(logits, None, groups, ulps=8).tolist() == [True]


def torch_route(logits: np.ndarray, correction, scale, experts, spec: RoutingSpec):
    """Weights, experts and choice of torch_ref, as numpy arrays."""
    import torch_ref

    tensors = {"correction_bias": correction, "expert_scale": scale, "experts": experts}
    given = {name: None if array is None else torch_ref.to_torch(array) for name, array in tensors.items()}
    options = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    del options["round_logits"]
    return [
        torch_ref.to_numpy(each) for each in torch_ref.route_float64(torch_ref.to_torch(logits), **options, **given)
    ]


@needs_torch
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_the_torch_reference_agrees_with_numpy(name, dtype) -> None:
    case = CASES[name]
    spec, (correction, scale) = case.spec, case.vectors()
    logits = np.concatenate([ordinary(300, case.experts), special_rows(100, case.experts)]).astype(dtype)
    weights, experts, choice = torch_route(logits, correction, scale, None, spec)
    assert (weights.dtype, experts.dtype, choice.shape) == (dtype, np.int64, logits.shape)
    chosen = cases.select(logits, correction, spec)
    if cases.exact_choice(correction, spec):
        np.testing.assert_array_equal(experts, chosen)
        np.testing.assert_array_equal(choice, cases.masked(cases.choose(logits, correction, spec), spec))
    ordinary_ones = slice(0, 300) if dtype == np.float64 else slice(0, 0)
    np.testing.assert_array_equal(experts[ordinary_ones], chosen[ordinary_ones])
    with np.errstate(invalid="ignore"):
        truth = cases.weigh(logits.astype(np.float64), experts, scale, spec)
    roundings = bounds.weights(bounds.given(logits), experts, scale, spec).error
    if dtype == np.float64:  # then both sides are rounded
        roundings = 2 * bounds.FLOAT64 * roundings
    bounds.within(weights, bounds.Real(truth, roundings))
    replayed = torch_route(logits, None, scale, experts.astype(np.int32), spec)
    np.testing.assert_array_equal(replayed[0], weights)
    np.testing.assert_array_equal(replayed[1], experts)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounded_logits_are_rounded_wherever_xla_would_rather_not(dtype) -> None:
    x, weight = jnp.asarray(ordinary(257, 64), dtype), jnp.asarray(ordinary(64, 64), dtype)
    # In jax 0.10.2 XLA drops the cast there and back from such a function on the CPU, through a barrier too.
    product, rounded = jax.jit(lambda x, weight: (logits := xla.router_gemm(x, weight, None, out_dtype=jnp.float32),
        jax.nn.softmax(routing.round_logits(logits, dtype))))(x, weight)  # fmt: skip
    truth = np.asarray(product).astype(np.dtype(getattr(ml_dtypes, dtype, dtype))).astype(np.float32)
    bounds.within(rounded, bounds.softmax(bounds.given(truth)))
    assert (truth != product).any() == (dtype != "float32")


def test_rounding_logits_keeps_what_is_not_normal() -> None:
    values = np.array([1e-7, -3e-6, 65519, 65520, np.inf, -np.inf, np.nan, -0.0], np.float32)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    for round_logits in (routing.round_logits, jax.jit(routing.round_logits, static_argnums=1)):
        np.testing.assert_array_equal(round_logits(jnp.asarray(values), "float16"), expected)


@needs_torch
def test_the_torch_reference_has_nan_for_an_expert_that_does_not_exist() -> None:
    logits, experts = ordinary(2, 4), np.array([[0, 4], [-1, 3]])
    weights, given, _ = torch_route(logits, None, None, experts, RoutingSpec(2, "sigmoid"))
    np.testing.assert_array_equal(np.isnan(weights), [[False, True], [True, False]])
    np.testing.assert_array_equal(given, experts)


@st.composite
def specs(draw) -> tuple[RoutingSpec, int]:
    """Any spec that makes sense, and a number of experts that it fits."""
    groups = draw(st.none() | st.integers(1, 6))
    in_a_group = draw(st.integers(2, 9))
    experts = (groups or 1) * in_a_group
    kept = None if groups is None else draw(st.integers(1, groups))
    renormalize = draw(st.booleans())
    spec = RoutingSpec(
        draw(st.integers(1, in_a_group * (kept or 1))),
        draw(st.sampled_from(routing.SCORE_FUNCTIONS)),
        renormalize=renormalize,
        renormalize_epsilon=draw(st.sampled_from([0.0, 1e-20, 1e-3])) if renormalize else 0.0,
        renormalize_min=draw(st.sampled_from([0.0, 1e-12, 2.0])) if renormalize else 0.0,
        scaling_factor=draw(st.sampled_from([1.0, 2.5, -16.0])),
        num_groups=groups,
        group_topk=kept,
        group_score=draw(st.sampled_from(routing.GROUP_SCORES)),
        masked_choice=draw(st.sampled_from([0.0, -math.inf])),
        select_on=draw(st.sampled_from(routing.SELECT_ON)),
    )
    return spec, experts


@needs_torch
@settings(deadline=None, max_examples=40, derandomize=True)
@given(specs(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_any_spec_agrees_with_the_torch_reference(spec_and_experts, corrected, scaled, seed) -> None:
    spec, count = spec_and_experts
    checks.spec_fits(spec, count)
    generator = np.random.default_rng(seed)
    logits = (2 * generator.standard_normal((16, count))).astype(np.float32)
    correction = generator.choice(np.array([-1, -0.25, 0, 0.5], np.float32), count) if corrected else None
    scale = generator.uniform(0.5, 2, count).astype(np.float32) if scaled else None
    weights, experts = specification(logits, correction, scale, spec)
    exact = cases.exact_choice(correction, spec)
    decided = exact | ~cases.undecided(logits, correction, spec, ulps=8)
    assert decided.sum() >= 12
    _, expected, _ = torch_route(logits if exact else logits.astype(np.float64), correction, scale, None, spec)
    np.testing.assert_array_equal(experts[decided], expected[decided])
    truth = torch_route(logits.astype(np.float64), correction, scale, experts, spec)[0]
    # a sum of softplus and sigmoid values has no cancellation: relative errors only
    bound = cases.tolerance(logits, experts, spec) * np.abs(truth)
    np.testing.assert_array_less(np.abs(weights - truth), bound + 1e-30)


def test_experts_that_do_not_exist_have_no_weight() -> None:
    logits = jnp.zeros((2, 4))
    for score_function in routing.SCORE_FUNCTIONS:
        spec = RoutingSpec(2, score_function)
        weights, experts = routing.route_logits(logits, None, jnp.ones(4), jnp.array([[0, 4], [-1, 3]]), spec=spec)
        assert experts.tolist() == [[0, 4], [-1, 3]]
        expected = [[True, True]] * 2 if score_function == "softmax_topk" else [[False, True], [True, False]]
        assert jnp.isnan(weights).tolist() == expected, score_function


def test_an_expert_that_is_not_selected_puts_no_nan_into_the_gradient() -> None:
    logits = jnp.array([[1.0, 0.0, -200.0, -jnp.inf]])
    for score_function in routing.SCORE_FUNCTIONS:
        spec = RoutingSpec(2, score_function)
        gradient = jax.grad(
            lambda logits, spec=spec: routing.route_logits(logits, None, None, None, spec=spec)[0][0, 0]
        )
        assert jnp.isfinite(gradient(logits)).all(), score_function


def test_a_spec_is_hashable_static_and_says_only_what_is_not_the_default() -> None:
    spec = RoutingSpec(4, "sigmoid", renormalize=True, num_groups=2, group_topk=1)
    same = pickle.loads(pickle.dumps(spec))
    assert spec == same
    assert hash(spec) == hash(same)
    assert spec != dataclasses.replace(spec, group_score="max")
    assert repr(spec) == "RoutingSpec(top_k=4, score_function='sigmoid', renormalize=True, num_groups=2, group_topk=1)"
    assert eval(repr(spec)) == spec
    traced = []

    @functools.partial(jax.jit, static_argnames="spec")
    def select(logits, spec):
        traced.append(spec)
        return routing.select_experts(logits, None, spec)

    select(jnp.ones((1, 8)), spec)
    select(jnp.ones((1, 8)), same)
    assert traced == [spec]
