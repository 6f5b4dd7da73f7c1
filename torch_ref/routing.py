"""Scoring and selection of published routers, behind given logits, on any device. Vectorised over tokens.

Ties are decided here and not by torch: every number becomes an integer of the same order, and the best expert is taken
k times, the first of equals. So NaN counts as the highest, +0.0 as above -0.0, and equals go to the lowest expert.
"""

from __future__ import annotations

import math

import torch


def scores_of(logits: torch.Tensor, score_function: str) -> torch.Tensor:
    """Scores `[T, E]` of logits `[T, E]`; of "softmax_topk", which scores the selected experts only, the logits."""
    if score_function == "softmax":
        powers = torch.exp(logits - logits.amax(-1, keepdim=True))
        return powers / powers.sum(-1, keepdim=True)
    if score_function == "sigmoid":
        return torch.sigmoid(logits)
    if score_function == "sqrtsoftplus":
        return torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()
    if score_function == "softmax_topk":
        return logits
    raise ValueError(f"score_function is {score_function!r}. Expected a published one; see RoutingSpec.")


def ordered_keys(values: torch.Tensor) -> torch.Tensor:
    """int64 keys that are ordered as the numbers are, any NaN highest and -0.0 below +0.0; none is the lowest int64."""
    values = torch.where(values.isnan(), torch.full_like(values, math.nan).abs(), values)
    bits, lowest = (torch.int64, -(2**63)) if values.dtype == torch.float64 else (torch.int32, -(2**31))
    signed = values.contiguous().view(bits).to(torch.int64)
    return torch.where(signed < 0, lowest - signed - 1, signed)


def first_of_highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Positions `[..., count]` of the highest values `[..., N]`, in descending order, the first of equals first."""
    keys, positions = ordered_keys(values), []
    places = torch.arange(keys.shape[-1], device=keys.device)
    for _ in range(count):
        is_highest = keys == keys.amax(-1, keepdim=True)
        first = torch.where(is_highest, places, keys.shape[-1]).amin(-1, keepdim=True)
        keys = keys.scatter(-1, first, torch.iinfo(torch.int64).min)
        positions.append(first)
    return torch.cat(positions, -1)


def group_scores(choice: torch.Tensor, num_groups: int, group_score: str) -> torch.Tensor:
    """What groups of neighbouring experts compete with: `[T, num_groups]` of the choice `[T, E]`."""
    grouped = choice.unflatten(-1, (num_groups, -1))
    if group_score == "max":
        return grouped.gather(-1, first_of_highest(grouped, 1))[..., 0]
    best = grouped.gather(-1, first_of_highest(grouped, 2))
    return best[..., 0] + best[..., 1]


def route_float64(
    logits64: torch.Tensor,
    *,
    top_k: int,
    score_function: str,
    renormalize: bool,
    renormalize_epsilon: float,
    renormalize_min: float,
    scaling_factor: float,
    num_groups: int | None,
    group_topk: int | None,
    group_score: str,
    masked_choice: float,
    select_on: str,
    correction_bias: torch.Tensor | None = None,
    expert_scale: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, experts and what was compared, of logits in float64, or in float32 throughout if they are.

    Without groups and correction bias the logits are compared, in whose order scores are: no two that differ tie.
    Differentiable in the logits and in expert_scale by autograd, with the selection fixed.

    Args:
      logits64: `[T, E]`, rounded already where the model rounds them.
      top_k: and the other options: as the fields of `jax_router.RoutingSpec`, whose docstring has the formulas.
      correction_bias: `[E]` or None.
      expert_scale: `[E]` or None.
      experts: `[T, k]` or None; the selection as given.

    Returns:
      weights `[T, k]` in the logits' dtype, NaN for an expert that does not exist; experts `[T, k]` in int64; the
      choice `[T, E]` that the experts were picked from, experts of other groups masked.

    >>> options = dict(renormalize=False, renormalize_epsilon=0.0, renormalize_min=0.0, scaling_factor=1.0)
    >>> groups = dict(num_groups=None, group_topk=None, group_score="max", masked_choice=0.0, select_on="scores")
    >>> logits = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)
    >>> route_float64(logits, top_k=2, score_function="softmax_topk", **options, **groups)[:2]
    (tensor([[0.5000, 0.5000]], dtype=torch.float64), tensor([[1, 2]]))
    """
    with torch.no_grad():
        by_score = select_on == "scores" and (correction_bias is not None or num_groups is not None)
        choice = scores_of(logits64, score_function) if by_score else logits64
        if correction_bias is not None:
            choice = choice + correction_bias.to(logits64.dtype)
        if num_groups is not None and group_topk is not None:
            kept = first_of_highest(group_scores(choice, num_groups, group_score), group_topk)
            is_kept = torch.zeros(*choice.shape[:-1], num_groups, dtype=torch.bool, device=choice.device)
            is_kept.scatter_(-1, kept, True)
            is_kept = is_kept.repeat_interleave(choice.shape[-1] // num_groups, -1)
            choice = torch.where(is_kept, choice, masked_choice)
        if experts is None:
            experts = first_of_highest(choice, top_k)
    exists = (experts >= 0) & (experts < logits64.shape[-1])
    index = torch.where(exists, experts, 0).to(torch.int64)

    def of_experts(values: torch.Tensor) -> torch.Tensor:
        return torch.where(exists, values.gather(-1, index), math.nan)

    weights = of_experts(scores_of(logits64, score_function))
    if score_function == "softmax_topk":
        weights = scores_of(weights, "softmax")
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True).clamp(min=renormalize_min) + renormalize_epsilon)
    weights = weights * scaling_factor
    if expert_scale is not None:
        weights = weights * of_experts(expert_scale.to(logits64.dtype).expand_as(logits64))
    return weights, experts.to(torch.int64), choice
