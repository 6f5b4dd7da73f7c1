"""Whether logits and routing are right: against float64, and against what the specification makes of these logits.

Everything is numpy on the host. The bounds are those of `parity` and `parity_routing`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jax_router import parity, routing
from jax_router import parity_routing as judged
from jax_router.routing import RoutingSpec
from jax_router.verification.data import IN_RANDOM_ORDER, ONE_PRODUCT, Operands, Subject, dtype_named

Array = NDArray[Any]


@dataclass(frozen=True)
class Verdict:
    """Whether a batch is right, figures about it, and of a wrong one why, and the first row with both readings."""

    figures: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    row: int | None = None
    expected: Any = None
    got: Any = None

    @property
    def passed(self) -> bool:
        return self.reason is None


def judge_logits(subject: Subject, kind: str, operands: Operands, logits: Array, platform: str) -> Verdict:
    """Logits [T, E] against float64, in units of the float32 bound."""
    truth = parity.reference(operands.x, operands.weight, operands.bias)
    agreement = parity.compare(logits, truth, accumulation(subject, kind, platform))
    figures = {"worst": agreement.worst_units, "rms": agreement.rms_units}
    in_order = kind not in IN_RANDOM_ORDER
    if agreement.outside == 0 and (in_order or agreement.mean_square <= agreement.mean_square_limit):
        return Verdict(figures)
    assert agreement.worst_at is not None
    row, expert = agreement.worst_at
    return Verdict(
        figures, f"logits of {kind} data are wrong: {agreement}", row, float(truth.logits[row, expert]),
        float(logits[row, expert]),
    )  # fmt: skip


def accumulation(subject: Subject, kind: str, platform: str) -> parity.Accumulation:
    """What may be expected of the logits of a kind of data."""
    hidden = 1 if kind == ONE_PRODUCT else subject.shape.hidden  # adding zeros is exact
    return parity.accumulation_of(subject.implementation, hidden=hidden, dtype=subject.multiplied, platform=platform)


def judge_routing(
    subject: Subject, kind: str, operands: Operands, weights: Array, experts: Array, logits: Array, platform: str
) -> Verdict:
    """Weights and experts [T, k] against float64's logits, and against the specification on these logits [T, E].

    Figures: `differing` tokens whose expert set is not float64's, `undecided` ones that may differ, `widest` gap of a
    differing one, and the worst `weight`, both over their bounds.
    """
    assert subject.spec is not None
    spec = _without_rounding_to_float32(subject)
    finite = np.asarray(np.isfinite(logits).all(-1))
    verdict = _against_the_specification(subject, spec, kind, operands, weights, experts, logits, finite)
    if not verdict.passed:
        return verdict
    of_experts = _against_float64(subject, spec, kind, operands, experts, np.flatnonzero(finite), platform)
    return dataclasses.replace(of_experts, figures=verdict.figures | of_experts.figures)


def _without_rounding_to_float32(subject: Subject) -> RoutingSpec:
    assert subject.spec is not None
    return dataclasses.replace(subject.spec, round_logits=subject.spec.round_logits and subject.dtype != "float32")


def _against_the_specification(
    subject: Subject, spec: RoutingSpec, kind: str, operands: Operands, weights: Array, experts: Array, logits: Array,
    finite: Array,
) -> Verdict:  # fmt: skip
    right_weights, right_experts = _specification(subject, operands, logits)
    # Where scores are exact, so is their order, and that of groups: of infinities and NaN, and of nothing but ties.
    exactly = ~finite | _all_tied(logits, operands.correction_bias)
    wrong = exactly & (experts != right_experts).any(-1)
    if wrong.any():
        row = int(wrong.argmax())
        what = f"all experts of {kind} data, which tie," if finite[row] else "experts of infinite or NaN logits"
        return _wrong(f"{what} are not the specification's", row, right_experts, experts)
    scores_are_exact = ~np.isfinite(logits).any(-1, keepdims=True)
    close = np.isclose(weights, right_weights, rtol=_of_weights(spec), atol=0.0, equal_nan=True)
    same = np.isnan(weights) == np.isnan(right_weights)
    wrong = ~finite & ~np.where(scores_are_exact, close, same).all(-1)
    if wrong.any():
        row = int(wrong.argmax())
        return _wrong("weights of infinite or NaN logits are not the specification's", row, right_weights, weights)
    rows = np.flatnonzero(finite)
    if not len(rows):
        return Verdict()
    exact, chosen = logits[rows].astype(np.float64), experts[rows]
    if ((chosen < 0) | (chosen >= subject.shape.experts)).any():
        row = int(((chosen < 0) | (chosen >= subject.shape.experts)).any(-1).argmax())
        return _wrong("there is no such expert", int(rows[row]), right_experts, experts)
    correction = operands.correction_bias
    interval = judged.logit_interval(exact, 0.0, spec, _rounding(subject))
    choice = judged.choice_interval(interval, correction, spec)
    exact_choice = judged.exact_choice(exact, correction, spec, _rounding(subject))
    impossible = judged.judge_selection(chosen, exact_choice, choice).impossible
    # The best first: no later one is certainly better.
    high, low = (np.take_along_axis(end, chosen, -1) for end in (choice.high, choice.low))
    impossible |= (high[:, :-1] < low[:, 1:]).any(-1)
    if impossible.any():
        row = int(rows[impossible.argmax()])
        return _wrong(f"experts of {kind} data are not those of their logits", row, right_experts, experts)
    wrong = _higher_of_equals(spec, chosen, interval.low, correction)
    if wrong.any():
        row = int(rows[wrong.argmax()])
        return _wrong(f"a tie of {kind} data did not go to the lowest expert", row, right_experts, experts)
    allowed = judged.weight_interval(judged.score_interval(interval, spec), chosen, spec)
    scale = 1.0 if operands.expert_scale is None else np.asarray(operands.expert_scale, np.float64)[chosen]
    ends = np.sort(np.stack([allowed.low * scale, allowed.high * scale]), axis=0)
    slack = abs(ends).max(0) * parity.UNIT_SPACING if operands.expert_scale is not None else 0.0
    outside = ~((ends[0] - slack <= weights[rows]) & (weights[rows] <= ends[1] + slack))
    if outside.any():
        row = int(rows[outside.any(-1).argmax()])
        return _wrong(f"weights of {kind} data are not those of their logits", row, right_weights, weights)
    middle = (ends[0] + ends[1]) / 2
    worst = (abs(weights[rows] - middle) / np.maximum((ends[1] - ends[0]) / 2 + slack, 1e-300)).max(initial=0.0)
    return Verdict({"weight": float(worst)})


def _all_tied(logits: Array, correction: Array | None) -> Array:
    """Tokens [T] all of whose experts compete with the very same key."""
    tied = (logits == logits[:, :1]).all(-1)
    return tied if correction is None else tied & bool((correction == correction[0]).all())


def _of_weights(spec: RoutingSpec) -> float:
    """What two float32 weights of the same scores may differ by, relative (docs/numerics.md)."""
    return 2 * (spec.top_k / 2 + 4) * parity.UNIT_SPACING


def _higher_of_equals(spec: RoutingSpec, experts: Array, logits: Array, correction: Array | None) -> Array:
    """Tokens [T] where an expert was selected before, or instead of, a lower one with the very same key."""
    tokens, count = logits.shape
    rank = np.full((tokens, count), count)
    np.put_along_axis(rank, experts, np.arange(experts.shape[-1])[None], axis=-1)
    group = np.arange(count) // (count // spec.num_groups) if spec.num_groups else np.zeros(count, int)
    of_correction = np.zeros(count) if correction is None else np.asarray(correction)
    wrong = np.zeros(tokens, bool)
    for place in range(experts.shape[-1]):
        chosen = experts[:, place, None]
        twin = (logits == np.take_along_axis(logits, chosen, -1)) & (of_correction == of_correction[chosen])
        twin &= (group == group[chosen]) & (np.arange(count) < chosen)
        wrong |= (twin & (rank > place)).any(-1)
    return wrong


def _against_float64(
    subject: Subject, spec: RoutingSpec, kind: str, operands: Operands, experts: Array, rows: Array, platform: str
) -> Verdict:
    truth = parity.reference(np.asarray(operands.x)[rows], operands.weight, operands.bias)
    if not np.isfinite(truth.logits).all():  # of finite logits: a finding of the accuracy
        rows = rows[np.isfinite(truth.logits).all(-1)]
        truth = parity.reference(np.asarray(operands.x)[rows], operands.weight, operands.bias)
    if kind not in IN_RANDOM_ORDER:  # the bound that holds for any order alone
        truth = dataclasses.replace(truth, spread=np.full_like(truth.spread, np.inf))
    slack = parity.logit_bound(truth, accumulation(subject, kind, platform), truth.logits.size)
    correction = operands.correction_bias
    interval = judged.logit_interval(truth.logits, slack, spec, _rounding(subject))
    exact = judged.exact_choice(truth.logits, correction, spec, _rounding(subject))
    choice = judged.choice_interval(interval, correction, spec)
    selection = judged.judge_selection(experts[rows], exact, choice)
    figures: dict[str, Any] = {
        "differing": int(selection.differs.sum()), "undecided": int(selection.undecided.sum()), "tokens": len(rows)
    }  # fmt: skip
    if selection.differs.any():
        figures["widest"] = float(_gaps(exact, choice, experts.shape[-1])[selection.differs].max())
    if selection.impossible.any():
        row = int(selection.impossible.argmax())
        best = np.argsort(-exact[row], kind="stable")[: experts.shape[-1]]
        reason = f"experts of {kind} data are none that rounding explains"
        return Verdict(figures, reason, int(rows[row]), best.tolist(), experts[rows[row]].tolist())
    return Verdict(figures)


def _gaps(exact: Array, choice: judged.Interval, count: int) -> Array:
    """Between the last selected and the first rejected, over what rounding may move both by."""
    order = np.argsort(-exact, axis=-1, kind="stable")
    if count >= exact.shape[-1]:
        return np.zeros(len(exact))
    last, first = (np.take_along_axis(exact, order[:, i : i + 1], -1)[:, 0] for i in (count - 1, count))
    with np.errstate(invalid="ignore"):  # masked groups have no distance
        width = np.nan_to_num(choice.high - choice.low)
        half = [np.take_along_axis(width, order[:, i : i + 1], -1)[:, 0] / 2 for i in (count - 1, count)]
        return np.nan_to_num((last - first) / np.maximum(half[0] + half[1], 1e-300))


def _specification(subject: Subject, operands: Operands, logits: Array) -> tuple[Array, Array]:
    """(weights, experts) that the specification makes of these logits, on the host if there is one beside the GPU."""
    assert subject.spec is not None
    correction, scale = operands.correction_bias, operands.expert_scale
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        weights, experts = routing.route_logits(
            jnp.asarray(logits), None if correction is None else jnp.asarray(correction),
            None if scale is None else jnp.asarray(scale), None, spec=subject.spec, dtype=subject.dtype,
        )  # fmt: skip
    return np.asarray(weights), np.asarray(experts)


def _rounding(subject: Subject) -> Any:
    dtype = dtype_named(subject.dtype)

    def rounded(values: Array) -> Array:
        with np.errstate(over="ignore"):
            return values.astype(np.float32).astype(dtype).astype(np.float64)

    return rounded


def _wrong(reason: str, row: int, expected: Array, got: Array) -> Verdict:
    return Verdict({}, reason, row, np.asarray(expected)[row].tolist(), np.asarray(got)[row].tolist())
