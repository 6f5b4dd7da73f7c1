"""Routing in numpy, written from the formulas in the docstring of `RoutingSpec`; the specs that tests go through.

Selection is exact for any choice given. `undecided` says where float32 scores may order experts in another way than
these float64 ones do.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jax_router import RoutingSpec

Array = np.ndarray


def score(logits: Array, score_function: str) -> Array:
    """Scores in the dtype of the logits, of "softmax_topk" the logits."""
    with np.errstate(all="ignore"):
        if score_function == "softmax":
            powers = np.exp(logits - logits.max(-1, keepdims=True))
            return powers / powers.sum(-1, keepdims=True)
        if score_function == "sigmoid":
            return np.where(logits > 0, 1 / (1 + np.exp(-logits)), np.exp(logits) / (1 + np.exp(logits)))
        if score_function == "sqrtsoftplus":
            return np.sqrt(np.maximum(logits, 0) + np.log1p(np.exp(-np.abs(logits))))
        return logits


def choose(logits: Array, correction_bias: Array | None, spec: RoutingSpec) -> Array:
    """What experts compete with, before groups are masked."""
    by_score = spec.select_on == "scores" and (correction_bias is not None or spec.num_groups is not None)
    choice = score(logits, spec.score_function) if by_score else logits
    return choice if correction_bias is None else choice + correction_bias.astype(logits.dtype)


def keys(values: Array) -> Array:
    """Integers ordered as `jax.lax.top_k` orders numbers, every NaN highest."""
    bits = np.where(np.isnan(values), np.abs(np.array(np.nan, values.dtype)), values).view(f"i{values.itemsize}")
    return np.where(bits < 0, ~(bits & np.iinfo(bits.dtype).max), bits).astype(np.int64)


def best(values: Array, count: int) -> Array:
    """Places of the highest, in descending order, the first of equals first."""
    return np.argsort(~keys(values), axis=-1, kind="stable")[..., :count]


def group_choice(choice: Array, spec: RoutingSpec) -> Array:
    """What groups compete with."""
    grouped = choice.reshape(len(choice), spec.num_groups, -1)
    highest = np.take_along_axis(grouped, best(grouped, 1 if spec.group_score == "max" else 2), -1)
    with np.errstate(invalid="ignore"):
        return highest[..., 0] if spec.group_score == "max" else highest[..., 0] + highest[..., 1]


def masked(choice: Array, spec: RoutingSpec) -> Array:
    """The choice that experts are picked from."""
    if spec.num_groups is None:
        return choice
    kept = np.zeros((len(choice), spec.num_groups), bool)
    np.put_along_axis(kept, best(group_choice(choice, spec), spec.group_topk), True, -1)
    kept = kept.repeat(choice.shape[-1] // spec.num_groups, -1)
    return np.where(kept, choice, np.array(spec.masked_choice, choice.dtype))


def select(logits: Array, correction_bias: Array | None, spec: RoutingSpec) -> Array:
    """Experts `[T, k]` of logits `[T, E]`, in the arithmetic of their dtype."""
    return best(masked(choose(logits, correction_bias, spec), spec), spec.top_k)


def weigh(logits: Array, experts: Array, expert_scale: Array | None, spec: RoutingSpec) -> Array:
    """Weights `[T, k]` in the dtype of the logits."""
    if spec.score_function == "softmax_topk":
        weights = score(np.take_along_axis(logits, experts, -1), "softmax")
    else:
        weights = np.take_along_axis(score(logits, spec.score_function), experts, -1)
    if spec.renormalize:
        weights = weights / (
            np.maximum(weights.sum(-1, keepdims=True), spec.renormalize_min) + spec.renormalize_epsilon
        )
    scale = 1 if expert_scale is None else expert_scale.astype(logits.dtype)[experts]
    return weights * spec.scaling_factor * scale


def tolerance(logits: Array, experts: Array, spec: RoutingSpec) -> Array:
    """What weights `[T, k]` may be off by, relatively: a few roundings, one per addend, an exponential's argument."""
    selected = np.take_along_axis(logits.astype(np.float64), experts, -1)
    over_all = spec.score_function == "softmax"
    highest = logits.max(-1, keepdims=True) if over_all else selected.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        argument = highest - selected if spec.score_function.startswith("softmax") else np.abs(selected)
    argument = np.where(np.isfinite(argument), argument, 0)  # the exponential of infinity is exact
    of_sum = np.sqrt(logits.shape[-1]) / 2 if over_all else 0
    return 2.0**-24 * (8 + spec.top_k + of_sum + 2 * argument.max(-1, keepdims=True))


def exact_choice(correction_bias: Array | None, spec: RoutingSpec) -> bool:
    """Whether what is compared is the logits, or a single float32 sum: nothing that implementations may round apart."""
    return (
        spec.select_on == "logits"
        or spec.score_function == "softmax_topk"
        or (correction_bias is None and spec.num_groups is None)
    )


def undecided(logits: Array, correction_bias: Array | None, spec: RoutingSpec, ulps: float) -> Array:
    """Which tokens `[T]` have experts or groups so close that an error of this many ulps in each score reorders them.

    Equal logits with equal corrections stay equal whatever computes them, and so does what is masked.
    """
    exact = logits.astype(np.float64)
    choice = choose(exact, correction_bias, spec)
    correction = 0 if correction_bias is None else correction_bias.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = ulps * 2.0**-24 * (np.abs(choice - correction) + np.abs(correction))
        error = np.where(np.isfinite(choice), error, 0)
    same = np.empty(exact.shape, complex)  # equal where what goes into the choice is
    same.real, same.imag = exact, correction
    close = np.zeros(len(exact), bool)
    picked = masked(choice, spec)
    if spec.num_groups is not None:
        of_groups = group_choice(choice, spec)
        error_of_group = 2 * error.reshape(len(exact), spec.num_groups, -1).max(-1)
        order = best(of_groups, spec.num_groups)
        edge = order[:, spec.group_topk - 1 : spec.group_topk + 1]
        if edge.shape[-1] == 2:
            no_two = np.broadcast_to(np.arange(spec.num_groups), of_groups.shape)
            close |= within(of_groups, error_of_group, edge, no_two)[:, 0]
        hidden = picked != choice
        error, same = np.where(hidden, 0, error), np.where(hidden, np.inf, same)
    return close | within(picked, error, best(picked, spec.top_k + 1), same).any(-1)


def within(values: Array, error: Array, order: Array, same: Array) -> Array:
    """Which neighbours in an order lie within their errors, and are neither the same nor the same NaN or infinity."""
    values, error, same = (np.take_along_axis(array, order, -1) for array in (values, error, same))
    higher, lower = values[:, :-1], values[:, 1:]
    with np.errstate(invalid="ignore"):
        apart = higher - lower > error[:, :-1] + error[:, 1:]
    alike = ~np.isfinite(higher) & ((higher == lower) | (np.isnan(higher) & np.isnan(lower)))
    return ~(apart | alike | (same[:, :-1] == same[:, 1:]) | (np.isnan(higher) & ~np.isnan(lower)))


@dataclasses.dataclass(frozen=True)
class Case:
    """A router: a spec, and what goes with it."""

    spec: RoutingSpec
    experts: int
    bias: str | None = None
    correction_bias: bool = False
    expert_scale: bool = False
    hidden: int = 72
    dtype: str = "bfloat16"

    def vectors(self) -> tuple[Array | None, Array | None]:
        """The correction bias, near the scores of which it decides, negative here and there, and the expert scale."""
        generator = np.random.default_rng(self.experts)
        correction = (generator.standard_normal(self.experts) / 8).astype(np.float32)
        scale = generator.uniform(0.5, 2, self.experts).astype(np.float32)
        return correction if self.correction_bias else None, scale if self.expert_scale else None


CASES = {
    "gpt-oss": Case(RoutingSpec(4, "softmax_topk"), 128, bias="bfloat16", hidden=2880),
    "Qwen3": Case(RoutingSpec(8, "softmax", renormalize=True), 128),
    "Qwen3-Next": Case(RoutingSpec(10, "softmax", renormalize=True), 512),
    "Mixtral": Case(RoutingSpec(2, "softmax_topk"), 8, dtype="float16"),
    "OLMoE": Case(RoutingSpec(8, "softmax"), 64, bias="float32"),
    "Llama-4": Case(RoutingSpec(1, "sigmoid"), 16),
    "Ernie-4.5": Case(RoutingSpec(6, "softmax", renormalize=True, renormalize_min=1e-12), 64, correction_bias=True),
    "Gemma-4": Case(RoutingSpec(8, "softmax", renormalize=True), 128, expert_scale=True),
    "DeepSeek-V2": Case(
        RoutingSpec(
            6, "softmax", scaling_factor=16.0, num_groups=8, group_topk=3, group_score="max", masked_choice=0.0,
        ),
        160,
    ),
    "DeepSeek-V3": Case(
        RoutingSpec(
            8, "sigmoid", renormalize=True, renormalize_epsilon=1e-20, scaling_factor=2.5, num_groups=8, group_topk=4,
            masked_choice=0.0,
        ),
        256, correction_bias=True, hidden=7168,
    ),
    "DeepSeek-V4": Case(
        RoutingSpec(6, "sqrtsoftplus", renormalize=True, scaling_factor=1.5), 384, correction_bias=True
    ),
    "MiniMax-M2": Case(
        RoutingSpec(8, "sigmoid", renormalize=True, renormalize_epsilon=1e-20), 256, correction_bias=True,
    ),
    "groups of 32, the others at -inf": Case(
        RoutingSpec(8, "sigmoid", num_groups=5, group_topk=2), 160, correction_bias=True, expert_scale=True
    ),
    "groups of 9": Case(
        RoutingSpec(32, "sqrtsoftplus", renormalize=True, num_groups=8, group_topk=5, group_score="max"), 72
    ),
    "as many as the groups hold": Case(
        RoutingSpec(20, "softmax", renormalize=True, num_groups=4, group_topk=2, masked_choice=0.0), 40,
        correction_bias=True,
    ),
    "one group": Case(RoutingSpec(3, "sigmoid", num_groups=1, group_topk=1), 33, bias="float32"),
    "logits are compared": Case(
        RoutingSpec(6, "sigmoid", renormalize=True, num_groups=4, group_topk=2, select_on="logits"), 96,
        correction_bias=True,
    ),
    "rounded logits": Case(RoutingSpec(8, "softmax", renormalize=True, round_logits=True), 128, bias="bfloat16"),
    "rounded logits, corrected": Case(
        RoutingSpec(4, "sqrtsoftplus", renormalize=True, round_logits=True), 65, correction_bias=True, dtype="float16"
    ),
    "one expert": Case(RoutingSpec(1, "softmax"), 1),
    "1024 experts": Case(RoutingSpec(32, "softmax", renormalize=True), 1024),
    "1024 experts, corrected": Case(RoutingSpec(32, "sigmoid"), 1024, correction_bias=True),
    "all experts": Case(RoutingSpec(5, "softmax_topk", scaling_factor=-0.5), 5, expert_scale=True),
}  # fmt: skip
