"""The specification of routing: scoring and selection in plain JAX, behind the logits of the router GEMM.

Everything else, the kernels and the PyTorch routers in the tests, is compared with these functions.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_router import checks

SCORE_FUNCTIONS = ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("top2_sum", "max")
SELECT_ON = ("scores", "logits")


@dataclass(frozen=True)
class RoutingSpec:
    """How logits become experts and weights. Hashable: static under jit.

    With logits `l[E]`, scores `s = score_function(l)`, a correction bias `c[E]` and a per-expert scale `a[E]`:

        choice  = s + c                              what is compared; `select_on="logits"`: l + c
        experts = top_k of choice, in the groups that group_topk keeps, ties to the lowest expert
        weights = s[experts]
        renormalize: weights / (max(sum(weights), renormalize_min) + renormalize_epsilon)
        weights * scaling_factor * a[experts]

    >>> RoutingSpec(top_k=4, score_function="softmax_topk")
    RoutingSpec(top_k=4, score_function='softmax_topk')

    Args:
      top_k: experts per token, k.
      score_function: "softmax" over all experts; "softmax_topk" over the selected logits, where `s = l` until then;
        "sigmoid"; "sqrtsoftplus", the square root of log(1 + exp(l)).
      renormalize: divide the weights by their sum.
      renormalize_epsilon: added to that sum.
      renormalize_min: the least that sum counts for.
      scaling_factor: multiplies the weights.
      num_groups: experts are in this many groups of neighbours, and only those of the best groups can be selected.
        None for no groups.
      group_topk: groups that are kept; ties to the lowest group. If that is all of them there are no groups.
      group_score: of a group: "top2_sum", the sum of its two highest choices, or "max", its highest.
      masked_choice: what experts of the other groups compete with: -inf, or 0.0 as some models have it.
      select_on: what is compared, "scores" or "logits". Scores grow with logits, so this matters only with a correction
        bias or with groups.
      round_logits: round the logits to x's dtype before anything else, as models do whose router is a 16-bit linear
        layer. It moves some per cent of tokens to other experts.

    Raises:
      TypeError, ValueError: an argument that makes no sense, alone or with the others.

    Source: the names are those of TransformerEngine's fused router and of Tokamax where these have one.
    """

    top_k: int
    score_function: str = "softmax"
    renormalize: bool = False
    renormalize_epsilon: float = 0.0
    renormalize_min: float = 0.0
    scaling_factor: float = 1.0
    num_groups: int | None = None
    group_topk: int | None = None
    group_score: str = "top2_sum"
    masked_choice: float = -math.inf
    select_on: str = "scores"
    round_logits: bool = False

    def __post_init__(self) -> None:
        checks.routing_spec(self)
        for name in checks.NUMBERS_OF_A_SPEC:  # numpy's are equal to these and hash alike, but float64's make float64
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.num_groups is not None and self.num_groups == self.group_topk:
            object.__setattr__(self, "num_groups", None)
            object.__setattr__(self, "group_topk", None)

    @classmethod
    def from_hf_config(cls, config: Any, round_logits: bool = False) -> RoutingSpec:
        """The spec that computes what the router of a Hugging Face transformers model computes in float32.

        >>> RoutingSpec.from_hf_config({"model_type": "mixtral", "num_experts_per_tok": 2})
        RoutingSpec(top_k=2, renormalize=True)

        Args:
          config: a configuration of transformers, or the dict of a config.json. Its `model_type` decides; of a model of
            many parts, that of its text model.
          round_logits: do as a model in 16 bits: True rounds the logits where the family's router is a 16-bit linear
            layer, and leaves them where it computes in float32.

        The router's bias, its correction bias and its per-expert scale are arguments of `route`. What a block
        multiplies the sum of its experts with is not in the spec.

        Raises:
          NotImplementedError: a family, or a value in the config, that no spec expresses exactly; says why.
          ValueError: an unknown `model_type`, or a field that the config lacks; says what to set by hand.

        Source: the modeling files of Hugging Face transformers 5.23, family by family in docs/models.md.
        """
        from jax_router import hf

        return hf.spec_from_hf_config(config, round_logits)

    def __repr__(self) -> str:
        changed = [
            f"{name}={value!r}"
            for name, field in self.__dataclass_fields__.items()
            if (value := getattr(self, name)) != field.default
        ]
        return f"RoutingSpec({', '.join(changed)})"


class Routing(NamedTuple):
    """What `route` returns: for every token k experts, the best first, and their weights."""

    weights: jax.Array  # float32 [..., k]
    experts: jax.Array  # int32 [..., k]
    logits: jax.Array | None = None  # float32 [..., E], if asked for


jax.export.register_namedtuple_serialization(Routing, serialized_name="jax_router.Routing")


def scores(logits: jax.Array, spec: RoutingSpec) -> jax.Array:
    """Scores `[..., E]` of float32 logits `[..., E]` before selection: of "softmax_topk", the logits themselves."""
    if spec.score_function == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    if spec.score_function == "sigmoid":
        return jax.nn.sigmoid(logits)
    if spec.score_function == "sqrtsoftplus":
        return jnp.sqrt(jax.nn.softplus(logits))
    return logits


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def round_logits(logits: jax.Array, dtype: DTypeLike) -> jax.Array:
    """float32 logits rounded to bfloat16, float16 or float32 and back. The derivative is that of the identity."""
    # Not a cast there and back, which XLA leaves out for the precision gained. Nor are float16's exponents left to
    # reduce_precision, which knows no subnormal numbers.
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(logits, exponent_bits=8, mantissa_bits=info.nmant)
    if info.nexp == 8:
        return rounded
    spacing = float(info.smallest_subnormal)
    subnormal = spacing * jax.lax.round(logits / spacing, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    rounded = jnp.where(jnp.abs(rounded) > float(info.max), jnp.copysign(jnp.inf, logits), rounded)
    return jnp.where(jnp.abs(logits) < float(info.tiny), subnormal, rounded)


@round_logits.defjvp
def _round_logits_jvp(dtype: DTypeLike, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return round_logits(*primals, dtype), *tangents


def select_experts(logits: jax.Array, correction_bias: jax.Array | None, spec: RoutingSpec) -> jax.Array:
    """The experts `[..., k]` (int32) of float32 logits `[..., E]`, in exactly the order of `jax.lax.top_k`.

    Where there are neither groups nor a correction bias the logits are compared: the same order, but of experts whose
    scores round to the same float32 the one with the higher logit wins. NaN counts as the highest, whatever its sign.
    """
    by_score = spec.select_on == "scores" and (correction_bias is not None or spec.num_groups is not None)
    choice = scores(logits, spec) if by_score else logits
    if correction_bias is not None:
        of_each = correction_bias.astype(jnp.float32)
        choice = choice + jnp.expand_dims(of_each, range(choice.ndim - of_each.ndim))
    choice = jnp.where(jnp.isnan(choice), jnp.nan, choice)
    if spec.num_groups is not None and spec.group_topk is not None:
        in_groups = choice.reshape(*choice.shape[:-1], spec.num_groups, choice.shape[-1] // spec.num_groups)
        highest = jax.lax.top_k(in_groups, 1 if spec.group_score == "max" else 2)[0]
        best = highest[..., 0] if spec.group_score == "max" else highest[..., 0] + highest[..., 1]
        kept = jax.lax.top_k(jnp.where(jnp.isnan(best), jnp.nan, best), spec.group_topk)[1]
        is_kept = is_each(kept, spec.num_groups).any(-2)
        choice = jnp.where(is_kept[..., None], in_groups, spec.masked_choice).reshape(choice.shape)
    return jax.lax.top_k(choice, spec.top_k)[1]


def routing_weights(
    logits: jax.Array, experts: jax.Array, expert_scale: jax.Array | None, spec: RoutingSpec
) -> jax.Array:
    """The weights `[..., k]` (float32) of given experts `[..., k]`; NaN for an expert that does not exist."""
    index = _none_from_the_end(experts, logits.shape[-1])
    of_experts = functools.partial(jnp.take_along_axis, indices=index, axis=-1, mode="fill", fill_value=jnp.nan)
    if spec.score_function == "softmax":
        weights = of_experts(scores(logits, spec))
    elif spec.score_function == "softmax_topk":
        weights = jax.nn.softmax(of_experts(logits), axis=-1)
    else:  # only the selected are scored: the slope at the others, infinite at a score of 0, makes no gradient NaN
        weights = scores(of_experts(logits), spec)
    if spec.renormalize:
        total = jnp.maximum(weights.sum(-1, keepdims=True), spec.renormalize_min)
        weights = weights / (total + spec.renormalize_epsilon)
    weights = weights * spec.scaling_factor
    return weights if expert_scale is None else weights * scale_of_experts(expert_scale, experts)


def scale_of_experts(expert_scale: jax.Array, experts: jax.Array) -> jax.Array:
    """What a per-expert scale `[E]`, or one of every token `[..., E]`, multiplies the weights `[..., k]` with."""
    count, scale = expert_scale.shape[-1], expert_scale.astype(jnp.float32)
    if expert_scale.ndim == 1:  # not scale[experts]: of tokens that do not fill a mesh XLA adds the padding's gradient
        of_each = jnp.where(is_each(experts, count), jnp.expand_dims(scale, range(experts.ndim)), 0)
        return jnp.where((experts >= 0) & (experts < count), of_each.sum(-1), jnp.nan)
    return jnp.take_along_axis(scale, _none_from_the_end(experts, count), axis=-1, mode="fill", fill_value=jnp.nan)


def is_each(ids: jax.Array, count: int) -> jax.Array:
    """Which of the numbers from 0 to count - 1 an id is: bool `[..., count]` of integers `[...]`."""
    return ids[..., None] == jnp.expand_dims(jnp.arange(count, dtype=ids.dtype), range(ids.ndim))


def _none_from_the_end(experts: jax.Array, count: int) -> jax.Array:
    return jnp.where(experts < 0, count, experts)  # JAX would count negative ones from the end


def route_logits(
    logits: jax.Array,
    correction_bias: jax.Array | None,
    expert_scale: jax.Array | None,
    experts: jax.Array | None,
    *,
    spec: RoutingSpec,
    dtype: str = "float32",
) -> tuple[jax.Array, jax.Array]:
    """The specification behind the GEMM: (weights, experts) of float32 logits `[..., E]`.

    Args:
      logits: `[..., E]`.
      correction_bias: `[E]`, or of every token `[..., E]`, or None.
      expert_scale: likewise.
      experts: `[..., k]`, the selection as given, or None to select.
      spec: the rule.
      dtype: that of x, to which `spec.round_logits` rounds.
    """
    if spec.round_logits:
        logits = round_logits(logits, dtype)
    if experts is None:
        experts = jax.lax.stop_gradient(select_experts(jax.lax.stop_gradient(logits), correction_bias, spec))
    # The weights of one selection have the same bits whoever made it: XLA sees the same program behind the barrier.
    logits, experts = jax.lax.optimization_barrier((logits, experts))
    return routing_weights(logits, experts, expert_scale, spec), experts
