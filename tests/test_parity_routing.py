"""The yardstick of selections: right ones pass, wrong ones are seen, and what rounding may swap is told apart."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_router import parity
from jax_router import parity_routing as judged
from jax_router.agreement import TO_BFLOAT16
from jax_router.routing import RoutingSpec, route_logits, select_experts
from jax_router.sweep_route import to_bfloat16

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EXPERTS, TOKENS = 32, 512
SLACK = 3e-6  # as of float32 logits of some thousand products
CORRECTION = np.random.default_rng(1).normal(0, 0.1, EXPERTS).astype(np.float32)
GROUPS = {"num_groups": 8, "group_topk": 3}
SPECS = [
    (RoutingSpec(4, "softmax_topk"), False),
    (RoutingSpec(4, "softmax", renormalize=True), False),
    (RoutingSpec(4, "softmax", scaling_factor=16.0, **GROUPS, group_score="max", masked_choice=0.0), False),
    (RoutingSpec(4, "softmax", renormalize=True, renormalize_min=1e-12), True),
    (RoutingSpec(6, "sigmoid", renormalize=True, renormalize_epsilon=1e-20, scaling_factor=2.5, **GROUPS), True),
    (RoutingSpec(6, "sigmoid", renormalize=True, masked_choice=0.0, **GROUPS), True),
    (RoutingSpec(1, "sigmoid"), False),
    (RoutingSpec(6, "sqrtsoftplus", renormalize=True, scaling_factor=1.5), True),
    (RoutingSpec(4, "sigmoid", select_on="logits"), True),
    (RoutingSpec(4, "softmax", round_logits=True), False),
]
every_spec = pytest.mark.parametrize(("spec", "corrected"), SPECS, ids=lambda value: str(value)[12:-1])


def logits_of(tokens: int = TOKENS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.5, (tokens, EXPERTS))


def judge(experts, logits, spec: RoutingSpec, corrected: bool, slack: float = SLACK, rounded=to_bfloat16):
    correction = CORRECTION if corrected else None
    exact = judged.exact_choice(logits, correction, spec, rounded)
    interval = judged.logit_interval(logits, slack, spec, rounded)
    return judged.judge_selection(experts, exact, judged.choice_interval(interval, correction, spec))


def routed(logits: np.ndarray, spec: RoutingSpec, corrected: bool) -> tuple[np.ndarray, np.ndarray]:
    """The specification in float32."""
    correction = jnp.asarray(CORRECTION) if corrected else None
    weights, experts = route_logits(
        jnp.asarray(logits, jnp.float32), correction, None, None, spec=spec, dtype="bfloat16"
    )
    return np.asarray(weights), np.asarray(experts)


def tied(spec: RoutingSpec, corrected: bool, gap: float) -> np.ndarray:
    """Logits with this gap at the boundary, between the last selected expert and the first rejected one."""
    logits = logits_of()
    order = np.argsort(-judged.exact_choice(logits, CORRECTION if corrected else None, spec, to_bfloat16), axis=-1)
    last, first = order[:, spec.top_k - 1], order[:, spec.top_k]
    rows = np.arange(len(logits))
    if corrected and spec.select_on == "logits":
        logits[rows, first] = logits[rows, last] + CORRECTION[last].astype(float) - CORRECTION[first].astype(float)
    else:
        logits[rows, first] = logits[rows, last]
    logits[rows, first] -= gap
    return logits


@every_spec
def test_the_specification_on_logits_within_the_bound_is_always_possible(spec: RoutingSpec, corrected: bool) -> None:
    random = np.random.default_rng(2)
    differing = 0
    for slack in (SLACK, 1e-2):
        logits = logits_of()
        perturbed = logits + random.uniform(-0.99, 0.99, logits.shape) * slack
        weights, experts = routed(perturbed, spec, corrected)
        verdict = judge(experts, logits, spec, corrected, slack)
        assert not verdict.impossible.any()
        assert (verdict.undecided | ~verdict.differs).all()
        differing += verdict.differs.sum()
        interval = judged.logit_interval(logits, slack, spec, to_bfloat16)
        low, high = judged.weight_interval(judged.score_interval(interval, spec), experts, spec)
        assert ((low <= weights) & (weights <= high)).all()
        assert ((high - low) <= 20 * slack * spec.scaling_factor + 1e-4 + (0.1 if spec.round_logits else 0)).all()
    assert differing, "no token was near its boundary: the test shows nothing"


@every_spec
def test_the_exact_choice_and_weights_are_those_of_the_specification_in_float64(spec, corrected) -> None:
    logits = logits_of()
    correction = CORRECTION if corrected else None
    best = judged._best(judged.exact_choice(logits, correction, spec, to_bfloat16), spec.top_k)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        in_jax = jnp.asarray(logits)
        if spec.round_logits:
            in_jax = in_jax.astype(jnp.bfloat16).astype(jnp.float64)
        expected = select_experts(in_jax, None if correction is None else jnp.asarray(correction), spec)
        weights = route_logits(in_jax, None, None, expected, spec=RoutingSpec(**rule(spec)))[0]
    np.testing.assert_array_equal(best, expected)
    np.testing.assert_allclose(
        judged.exact_weights(logits, np.asarray(expected), spec, to_bfloat16), weights, rtol=1e-12, atol=0
    )


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@every_spec
def test_the_exact_choice_and_weights_are_those_of_the_independent_reference(spec, corrected) -> None:
    import torch

    from torch_ref.routing import route_float64

    logits = logits_of()
    rounded = torch.from_numpy(logits).bfloat16().double() if spec.round_logits else torch.from_numpy(logits)
    correction = CORRECTION if corrected else None
    in_torch = None if correction is None else torch.from_numpy(correction).double()
    weights, experts, _ = route_float64(rounded, **rule(spec), correction_bias=in_torch)
    exact = judged.exact_choice(logits, correction, spec, to_bfloat16)
    np.testing.assert_array_equal(judged._best(exact, spec.top_k), experts)
    found = judged.exact_weights(logits, experts.numpy(), spec, to_bfloat16)
    np.testing.assert_allclose(found, weights, rtol=1e-12, atol=0)


def rule(spec: RoutingSpec) -> dict:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__ if name != "round_logits"}


@every_spec
def test_an_expert_taken_for_a_better_one_beyond_the_bound_is_impossible(spec, corrected) -> None:
    logits = logits_of()
    _, experts = routed(logits, spec, corrected)
    right = judge(experts, logits, spec, corrected)
    worst = judged.exact_choice(logits, CORRECTION if corrected else None, spec, to_bfloat16).argmin(-1)
    wrong = experts.copy()
    wrong[:, -1] = worst
    assert not right.impossible.any()
    assert judge(wrong, logits, spec, corrected).impossible.all()


def test_one_expert_twice_is_impossible() -> None:
    logits = logits_of()
    _, experts = routed(logits, SPECS[0][0], False)
    experts = experts.copy()
    experts[:, -1] = experts[:, -2]
    assert judge(experts, logits, SPECS[0][0], False).impossible.all()


@pytest.mark.parametrize(
    ("spec", "corrected"), [SPECS[0], SPECS[1], SPECS[8]], ids=["softmax_topk", "softmax", "l + c"]
)
def test_the_bound_is_the_sum_of_both_slacks_and_little_more(spec: RoutingSpec, corrected: bool) -> None:
    for gap, expected in ((1.9 * SLACK, True), (2.5 * SLACK, False)):
        logits = tied(spec, corrected, gap)
        swapped = swap_at_the_boundary(logits, spec, corrected)
        verdict = judge(swapped, logits, spec, corrected)
        assert (verdict.differs).all()
        assert (verdict.undecided == expected).all()
        assert (verdict.impossible != expected).all()


def swap_at_the_boundary(logits: np.ndarray, spec: RoutingSpec, corrected: bool) -> np.ndarray:
    choice = judged.exact_choice(logits, CORRECTION if corrected else None, spec, to_bfloat16)
    best = np.argsort(-choice, axis=-1)
    return np.concatenate([best[:, : spec.top_k - 1], best[:, spec.top_k : spec.top_k + 1]], axis=-1)


def test_experts_of_a_rejected_group_are_impossible_unless_the_groups_are_tied() -> None:
    spec = RoutingSpec(2, "sigmoid", num_groups=4, group_topk=1, group_score="top2_sum")
    logits = np.full((1, 16), -4.0)
    logits[0, [0, 1, 4, 5]] = 2.0, 1.0, 3.0, -3.0  # the first group has the better pair, the second the best expert
    right, wrong = np.array([[0, 1]]), np.array([[4, 5]])
    assert not judge(right, logits, spec, False).undecided
    assert not judge(right, logits, spec, False).impossible
    assert judge(wrong, logits, spec, False).impossible
    logits[0, [4, 5]] = 2.0, 1.0
    assert judge(right, logits, spec, False).undecided
    assert not judge(wrong, logits, spec, False).impossible
    assert judge(np.array([[0, 5]]), logits, spec, False).undecided


def test_experts_of_tied_groups_are_possible_masked_and_not_masked() -> None:
    """Masked with 0, which is better than a negative choice."""
    spec = RoutingSpec(5, "sigmoid", select_on="logits", num_groups=3, group_topk=2, masked_choice=0.0)
    logits = np.array([[0.9, -0.3, 0.8, -0.2, 0.9, -0.1]])  # the first two groups are tied, the third is kept
    for without in (1, 3):
        experts = np.delete(np.arange(6), without)[None]
        assert not judge(experts, logits, spec, False).impossible
    for without in (0, 4):
        experts = np.delete(np.arange(6), without)[None]
        assert judge(experts, logits, spec, False).impossible


def test_rounding_to_16_bits_is_seen() -> None:
    logits = logits_of(4096)
    for spec, corrected in SPECS[:5]:
        rounded = logits.astype(BFLOAT16).astype(np.float64)
        verdict = judge(routed(rounded, spec, corrected)[1], logits, spec, corrected)
        assert verdict.impossible.sum() > 10
        assert (verdict.differs | ~verdict.impossible).all()
        assert verdict.undecided.sum() < 10


def test_jax_arrays_get_the_same_verdict() -> None:
    for spec, corrected in SPECS:
        logits = logits_of(128)
        experts = routed(logits + np.random.default_rng(3).normal(0, 5e-2, logits.shape), spec, corrected)[1]
        expected = judge(experts, logits, spec, corrected, 1e-3)
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            in_jax = jax.jit(lambda *arrays, s=spec, c=corrected: judge(*arrays, s, c, 1e-3, TO_BFLOAT16))
            found = in_jax(experts, logits)
        for name, in_numpy, in_jax in zip(expected._fields, expected, found, strict=True):
            np.testing.assert_array_equal(in_numpy, in_jax, err_msg=f"{name} of {spec}")
        assert expected.differs.any()


@pytest.mark.parametrize("function", ["sigmoid", "sqrtsoftplus", "softmax"])
def test_scores_of_the_fast_instructions_are_within_the_bound(function: str) -> None:
    """exp as a power of two of a rounded product, log without log1p: as kernels have them."""
    logits = np.linspace(-20, 20, 4096).reshape(-1, EXPERTS).astype(np.float32)
    one, log2e = np.float32(1), np.float32(1.4426950408889634)

    def exp(values: np.ndarray) -> np.ndarray:
        return np.exp2(values * log2e)

    if function == "sigmoid":
        scores = one / (one + exp(-logits))
    elif function == "sqrtsoftplus":
        scores = np.sqrt(np.log(one + exp(logits)))
    else:
        powers = exp(logits - logits.max(-1, keepdims=True))
        scores = powers / np.cumsum(powers, axis=-1, dtype=np.float32)[:, -1:]
    assert scores.dtype == np.float32
    exact = logits.astype(np.float64)
    low, high = judged.score_interval(judged.Interval(exact, exact), RoutingSpec(2, function))
    assert ((low <= scores) & (scores <= high)).all()
    truth = judged._exact_scores(exact, RoutingSpec(2, function))
    assert (abs(scores - truth) > 0.02 * (high - low)).any(), "the bound is not within reach"
    tight = judged.Interval(low, high).map(np.asarray)
    assert ((tight.high - tight.low) < 1e-4 * truth + 2e-3 * (function == "sqrtsoftplus")).all()


def test_the_bound_of_the_logits_is_the_smaller_of_both() -> None:
    accumulation = parity.Accumulation(rounded=9, truncated=8)
    lambda_ = np.sqrt(2 * np.log(2 * 1000 / 1e-9))
    rounding, truncation = 3 * 2.0**-24, 8 * (1 + 17 / 4) * 2.0**-23

    def bound(magnitude: float, spread: float) -> float:
        one = np.ones((1, 1))
        return parity.logit_bound(parity.Reference(64, one, magnitude * one, spread * one), accumulation, 1000).item()

    assert bound(10.0, 1e6) == pytest.approx(10 * (lambda_ * rounding + truncation), rel=1e-5)
    assert bound(1e6, 10.0) == pytest.approx(10 * lambda_ * (rounding + truncation) + 2 * 2.0**-24, rel=1e-5)


@pytest.mark.parametrize("name", ["cuda", "xla"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_bound_of_the_logits_holds_in_random_order_and_sees_16_bits(name: str, platform: str) -> None:
    random = np.random.default_rng(4)
    x, weight = random.standard_normal((64, 2880)), random.standard_normal((128, 2880)) / np.sqrt(2880)
    x, weight = x.astype(BFLOAT16), weight.astype(BFLOAT16)
    truth = parity.reference(x, weight)
    accumulation = parity.accumulation_of(name, hidden=2880, dtype="bfloat16", platform=platform)
    bound = parity.logit_bound(truth, accumulation, truth.logits.size)
    logits = np.zeros(truth.logits.shape, np.float32)
    for column in range(2880):  # the longest chain there is
        logits += x[:, column : column + 1].astype(np.float32) * weight[:, column].astype(np.float32)
    assert (abs(logits - truth.logits) <= bound).all()
    assert (abs(logits.astype(BFLOAT16) - truth.logits) > bound).mean() > 0.2
    without_one = logits - x[:, :1].astype(np.float32) * weight[:, 0].astype(np.float32)
    assert (abs(without_one - truth.logits) > bound).mean() > 0.8
