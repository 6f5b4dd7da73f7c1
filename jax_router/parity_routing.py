"""How well a selection agrees with the truth: which experts rounding may swap, and how far weights may be off.

An implementation's float32 logits lie within `logit_bound` of the float64 ones. Every step behind them is monotone in
each logit, so intervals are carried through it end by end and widened by what float32 loses in that step:

    exp(z)        (2 + |z|) 2^-23 relative: 2 ulp of ex2.approx or libdevice, |z| ulp for rounding z log2(e)
    division      2^-22 relative, as the fastest one that CUDA has; a sum or a product 2^-24
    sigmoid       exp, one addition, one division: (5 + |l|) 2^-23 relative
    sqrtsoftplus  log(1 + exp(l)), with a plain logarithm: (3 + (5 + |l|) softplus) 2^-23 absolute, then 2^-23 relative
    softmax       with z = l - max: (6 + 1.5 |z| + 1.5 log(E) + E / 2) 2^-23 relative, as a mean of |z| under the
                  softmax is at most log(E), and a sum of E terms in any order errs by E 2^-24

The exact choice lies inside its interval too, so a selection C is possible only if no rejected expert is certainly
better than a selected one: `high[i] >= low[j]` for all i in C and j outside. A token is undecided if this does not hold
for the exact selection the other way round, `low[i] > high[j]`: its gap at the boundary is within the bound. Group
scores are intervals as well; experts of a group that may be kept or not count as both.

Written for numpy and for whatever else has its functions: the arrays' own namespace computes. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from jax_router.parity import FLUSHED, ROUNDING, UNIT_SPACING

if TYPE_CHECKING:
    from jax_router.routing import RoutingSpec


Rounding = Callable[[Any], Any]  # of float64 values to what a 16-bit dtype holds


class Interval(NamedTuple):
    """What a float32 value may be, [tokens, anything]."""

    low: Any
    high: Any

    def widened(self, relative: Any, absolute: Any = FLUSHED) -> Interval:
        low, high = self
        return Interval(low - abs(low) * relative - absolute, high + abs(high) * relative + absolute)

    def map(self, function: Any) -> Interval:
        """The image under an increasing function."""
        return Interval(function(self.low), function(self.high))


class Selection(NamedTuple):
    """The verdict on each token, bool [tokens]."""

    differs: Any  # another expert set than the exact one
    undecided: Any  # the exact one is within the bound of another
    impossible: Any  # no logits within the bound lead to this one


def logit_interval(logits: Any, slack: Any, spec: RoutingSpec, rounded: Rounding) -> Interval:
    """Float32 logits within `slack` of the exact ones, rounded by `rounded`, to x's dtype, if the rule says so."""
    interval = Interval(logits - slack, logits + slack)
    return interval.map(rounded) if spec.round_logits else interval


def exact_choice(logits: Any, correction_bias: Any | None, spec: RoutingSpec, rounded: Rounding) -> Any:
    """What the rule compares, [tokens, experts], of exact logits [tokens, experts]."""
    xp = logits.__array_namespace__()
    logits = logit_interval(logits, 0.0, spec, rounded).low
    choice = _exact_scores(logits, spec) if _by_score(correction_bias, spec) else logits
    if correction_bias is not None:
        choice = choice + correction_bias
    groups = _groups(spec)
    if groups is None:
        return choice
    number, best = groups
    in_groups = choice.reshape(len(choice), number, -1)
    kept = _members(_best(_group_score(in_groups, spec), best), number)
    return xp.where(kept[..., None], in_groups, spec.masked_choice).reshape(choice.shape)


def exact_weights(logits: Any, experts: Any, spec: RoutingSpec, rounded: Rounding) -> Any:
    """The weights [tokens, k] of given experts, of exact logits."""
    xp = logits.__array_namespace__()
    scores = _exact_scores(logit_interval(logits, 0.0, spec, rounded).low, spec)
    selected = xp.take_along_axis(scores, experts, axis=-1)
    if spec.score_function == "softmax_topk":
        selected = _softmax(selected)
    if spec.renormalize:
        total = xp.maximum(selected.sum(-1, keepdims=True), spec.renormalize_min)
        selected = selected / (total + spec.renormalize_epsilon)
    return selected * spec.scaling_factor


def choice_interval(logits: Interval, correction_bias: Any | None, spec: RoutingSpec) -> Interval:
    """What the rule compares, of float32 logits."""
    choice = score_interval(logits, spec) if _by_score(correction_bias, spec) else logits
    if correction_bias is not None:
        choice = choice.map(lambda end: end + correction_bias).widened(ROUNDING)
    groups = _groups(spec)
    return choice if groups is None else _in_kept_groups(choice, spec, *groups)


def score_interval(logits: Interval, spec: RoutingSpec) -> Interval:
    """Float32 scores before selection, of float32 logits."""
    xp = logits.low.__array_namespace__()
    largest = xp.maximum(abs(logits.low), abs(logits.high))
    if spec.score_function == "softmax":
        return softmax_interval(logits)
    if spec.score_function == "sigmoid":
        return logits.map(_sigmoid).widened((5 + largest) * UNIT_SPACING)
    if spec.score_function == "sqrtsoftplus":
        under_root = logits.map(_softplus).widened((5 + largest) * UNIT_SPACING, 3 * UNIT_SPACING)
        return under_root.map(lambda end: xp.sqrt(xp.maximum(end, 0.0))).widened(UNIT_SPACING)
    return logits


def softmax_interval(logits: Interval) -> Interval:
    """Float32 softmax over the last axis: each value against all the others at their other end."""
    xp = logits.low.__array_namespace__()
    largest = logits.high.max(-1, keepdims=True)
    low, high = logits.map(lambda end: xp.exp(end - largest))
    others_low, others_high = low.sum(-1, keepdims=True) - low, high.sum(-1, keepdims=True) - high
    count = logits.low.shape[-1]
    relative = 6 + 1.5 * (largest - logits.low) + 1.5 * math.log(count) + count / 2
    lowest, highest = low + others_high, high + others_low
    # Where logits are so uncertain that both underflow, the score may be anything.
    low = xp.where(lowest > 0, low / xp.where(lowest > 0, lowest, 1.0), 0.0)
    high = xp.where(highest > 0, high / xp.where(highest > 0, highest, 1.0), 1.0)
    return Interval(low, high).widened(relative * UNIT_SPACING)


def weight_interval(scores: Interval, experts: Any, spec: RoutingSpec) -> Interval:
    """Float32 weights [tokens, k] of given experts [tokens, k], of float32 scores [tokens, experts]."""
    xp = scores.low.__array_namespace__()
    selected = scores.map(lambda end: xp.take_along_axis(end, experts, axis=-1))
    if spec.score_function == "softmax_topk":
        selected = softmax_interval(selected)
    if spec.renormalize:
        low, high = selected.map(lambda end: xp.maximum(end, 0.0))
        with_low = low + (high.sum(-1, keepdims=True) - high)
        with_high = high + (low.sum(-1, keepdims=True) - low)

        def divisor(total: Any) -> Any:
            return xp.maximum(total, spec.renormalize_min) + spec.renormalize_epsilon

        selected = Interval(low / divisor(with_low), high / divisor(with_high))
    scaled = selected.map(lambda end: end * spec.scaling_factor)
    # A sum of k in any order, the epsilon, a division, the scaling.
    return scaled.widened((experts.shape[-1] / 2 + 4) * UNIT_SPACING)


def judge_selection(experts: Any, exact: Any, choice: Interval) -> Selection:
    """Compare selected experts [tokens, k] with the exact choice [tokens, experts] and the interval around it."""
    xp = exact.__array_namespace__()
    selected, expected = (_members(ids, exact.shape[-1]) for ids in (experts, _best(exact, experts.shape[-1])))

    def ends(members: Any, of_members: Any, of_others: Any) -> tuple[Any, Any]:
        worst_member = xp.where(members, of_members, xp.inf).min(-1)
        return worst_member, xp.where(members, -xp.inf, of_others).max(-1)

    worst_selected, best_rejected = ends(selected, choice.high, choice.low)
    worst_expected, best_other = ends(expected, choice.low, choice.high)
    distinct = selected.sum(-1) == experts.shape[-1]
    return Selection(
        differs=(selected != expected).any(-1),
        undecided=worst_expected <= best_other,
        impossible=~distinct | (worst_selected < best_rejected),
    )


def _by_score(correction_bias: Any | None, spec: RoutingSpec) -> bool:
    return spec.select_on == "scores" and (correction_bias is not None or spec.num_groups is not None)


def _groups(spec: RoutingSpec) -> tuple[int, int] | None:
    """(how many groups, how many of them are kept), or None."""
    return None if spec.num_groups is None or spec.group_topk is None else (spec.num_groups, spec.group_topk)


def _in_kept_groups(choice: Interval, spec: RoutingSpec, number: int, kept: int) -> Interval:
    """The choice with the experts of other groups masked; of groups that may be kept or not, both."""
    xp, shape, masked = choice.low.__array_namespace__(), choice.low.shape, spec.masked_choice
    in_groups = choice.map(lambda end: end.reshape(shape[0], number, -1))
    group = in_groups.map(lambda end: _group_score(end, spec)).widened(ROUNDING)
    certain = xp.ones(group.low.shape, bool)
    possible = group.high >= -xp.sort(-group.low, axis=-1)[:, kept - 1 : kept]
    if kept < number:
        certain = group.low > -xp.sort(-group.high, axis=-1)[:, kept : kept + 1]
    certain, possible = certain[..., None], possible[..., None]
    low = xp.where(certain, in_groups.low, xp.where(possible, xp.minimum(in_groups.low, masked), masked))
    high = xp.where(certain, in_groups.high, xp.where(possible, xp.maximum(in_groups.high, masked), masked))
    return Interval(low.reshape(shape), high.reshape(shape))


def _group_score(in_groups: Any, spec: RoutingSpec) -> Any:
    xp = in_groups.__array_namespace__()
    count = 1 if spec.group_score == "max" else 2
    return xp.sort(in_groups, axis=-1)[..., -count:].sum(-1)


def _best(values: Any, count: int) -> Any:
    """Indices of the largest, ties to the lowest index."""
    xp = values.__array_namespace__()
    return xp.argsort(-values, axis=-1, stable=True)[..., :count]


def _members(ids: Any, count: int) -> Any:
    """Which of `count` are in `ids` [..., k]: bool [..., count]."""
    xp = ids.__array_namespace__()
    return (ids[..., None] == xp.arange(count, dtype=ids.dtype)).any(-2)


def _exact_scores(logits: Any, spec: RoutingSpec) -> Any:
    xp = logits.__array_namespace__()
    functions = {"softmax": _softmax, "sigmoid": _sigmoid, "sqrtsoftplus": lambda values: xp.sqrt(_softplus(values))}
    return functions.get(spec.score_function, lambda values: values)(logits)


def _softmax(values: Any) -> Any:
    xp = values.__array_namespace__()
    exponentials = xp.exp(values - values.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def _sigmoid(values: Any) -> Any:
    xp = values.__array_namespace__()
    small = xp.exp(-abs(values))
    return xp.where(values >= 0, 1.0, small) / (1 + small)


def _softplus(values: Any) -> Any:
    xp = values.__array_namespace__()
    return xp.maximum(values, 0.0) + xp.log1p(xp.exp(-abs(values)))
