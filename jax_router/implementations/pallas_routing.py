"""Routing behind the router GEMM as a second Pallas kernel on Mosaic GPU: a token's experts lie in one warp.

Layout: the float32 sums [groups, T padded, E padded] that `pallas_gemm.group_sums` leaves, and bias, correction bias
and scale [E padded], are read from global memory into registers: lane l of a token's warp holds the experts l, l + 32,
and so on. Whatever is reduced over the experts is reduced by shuffles of that warp; a block shares nothing.

Numerics: the logits are `add_groups` of the sums, then the bias: the bits of this implementation's `router_gemm`. Keys
are int32 in the order of `jax.lax.top_k`, and a maximum over keys is exact. What is added in float32, the denominator
of softmax over the experts, follows the layout, which depends on E alone; sums over the selected go in their order. So
a token's experts and weights do not depend on its batch.

Work: a block is one warpgroup, with four tokens if these divide T, else with one token that its four warps all compute.
Selection is k rounds of two maxima over a warp, one of the keys and one of the places where the first is reached.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_router.implementations.pallas_gemm import add_up
from jax_router.routing import RoutingSpec

LANES = 32
WARPS = 4
# A key below those of all floats: no expert, or one that was taken. Always the last argument of jnp.where: with a
# constant as its second, jax 0.11.2 takes the result for unsigned, and the maximum of such keys is another.
LOWEST = -(2**31)
# Rounds and groups are unrolled, experts are held in registers.
MAX_TOP_K, MAX_GROUPS, MAX_EXPERTS = 32, 32, 1024

PerToken = jax.Array  # [tokens of a block], or a scalar where a block has one token
PerExpert = jax.Array  # [tokens of a block, E padded], or [E padded]


def why_unsupported(spec: RoutingSpec, experts: int) -> str | None:
    """What the kernel does not take of a spec that fits this many experts; None if it takes it."""
    if experts > MAX_EXPERTS:
        return f"routes to at most {MAX_EXPERTS} experts (registers hold a token's), they are {experts}"
    if spec.top_k > MAX_TOP_K:
        return f"selects at most {MAX_TOP_K} experts (one unrolled round each), top_k is {spec.top_k}"
    if spec.num_groups is not None and spec.num_groups > MAX_GROUPS:
        return f"takes at most {MAX_GROUPS} groups (one unrolled step each), num_groups is {spec.num_groups}"
    return None


def route_sums(
    sums: jax.Array,
    bias: jax.Array | None,
    correction_bias: jax.Array | None,
    expert_scale: jax.Array | None,
    given: jax.Array | None,
    *,
    spec: RoutingSpec,
    tokens: int,
    experts: int,
    dtype: Any,
    return_logits: bool,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The kernel: weights [T, k], experts [T, k] and logits [T, E] or None, from what `group_sums` returns.

    `given` are the experts [T, k] to replay or None; `dtype` is x's, to which `spec.round_logits` rounds.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    columns = -(-experts // LANES) * LANES
    rows = WARPS if tokens % WARPS == 0 else 1  # tokens of a block: all of them exist
    shape = (columns,) if rows == 1 else (rows, columns)
    warps = plgpu.Replicated(WARPS) if rows == 1 else -3
    tile = (LANES,) if rows == 1 else (WARPS, LANES)
    layout = plgpu.Layout.TILED(plgpu.Tiling((tile, (1,))), (warps,), (-2,), -1)

    def spread(values: PerToken) -> PerExpert:
        """Every token's value at each of its experts."""
        if rows == 1:
            return jnp.broadcast_to(values, shape)
        return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (0,)), layout)

    def load(ref: Any, layout: Any) -> jax.Array:
        return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # no idx since jax 0.11

    def load_per_expert(ref: Any) -> PerExpert:
        values = load(ref.at[pl.ds(0, columns)], layout if rows == 1 else layout.reduce(0)).astype(jnp.float32)
        return values if rows == 1 else plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (1,)), layout)

    def kernel(sums_ref: Any, *others: Any) -> None:
        refs = dict(zip((*operands, *out_types), others, strict=True))
        token = lax.axis_index("token_tile") * rows
        of_block = token if rows == 1 else pl.ds(token, rows)

        def load_given(slot: int) -> PerToken:
            if rows == 1:
                return refs["given"][token, slot]
            return load(refs["given"].at[of_block, slot], layout.reduce(1))

        of_groups = [sums_ref.at[group].at[of_block, pl.ds(0, columns)] for group in range(sums.shape[0])]
        logits = add_up([load(ref, layout) for ref in of_groups])
        if bias is not None:
            logits = logits + load_per_expert(refs["bias"])
        if return_logits:
            refs["logits"][of_block, pl.ds(0, columns)] = logits
        if spec.round_logits:
            logits = logits.astype(dtype).astype(jnp.float32)
        index = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1), layout)
        correction = None if correction_bias is None else load_per_expert(refs["correction_bias"])
        scale = None if expert_scale is None else load_per_expert(refs["expert_scale"])
        routing = _Routing(spec, experts, index, spread)
        chosen, weights = routing.route(logits, correction, scale, None if given is None else load_given)
        for slot in range(spec.top_k):
            if given is None:
                refs["experts"][of_block, slot] = chosen[slot]
            refs["weights"][of_block, slot] = weights[slot]

    per_expert = {"bias": bias, "correction_bias": correction_bias, "expert_scale": expert_scale}
    padding = (0, columns - experts)
    operands = {name: jnp.pad(values, padding) for name, values in per_expert.items() if values is not None}
    out_types = {"weights": jax.ShapeDtypeStruct((tokens, spec.top_k), jnp.float32)}
    if given is None:
        out_types["experts"] = jax.ShapeDtypeStruct((tokens, spec.top_k), jnp.int32)
    else:
        operands["given"] = given
    if return_logits:
        out_types["logits"] = jax.ShapeDtypeStruct((tokens, columns), jnp.float32)
    call = plgpu.kernel(
        kernel,
        out_type=tuple(out_types.values()),
        grid=(tokens // rows,),
        grid_names=("token_tile",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # Warpgroup semantics would choose the layouts
            unsafe_no_auto_barriers=True,  # warps share nothing, so there is nothing to order
        ),
        kernel_name="sm90_pallas_routing",
        interpret=interpret,
    )
    results = dict(zip(out_types, call(sums, *operands.values()), strict=True))
    selected = results["experts"] if given is None else given
    return results["weights"], selected, results["logits"][:, :experts] if return_logits else None


class _Routing:
    """`routing.route_logits` for the tokens of a block, in what Mosaic lowers: no sort, no gather, no argmax."""

    def __init__(
        self, spec: RoutingSpec, experts: int, index: PerExpert, spread: Callable[[PerToken], PerExpert]
    ) -> None:
        self.spec, self.experts, self.index, self.spread = spec, experts, index, spread
        self.columns = index.shape[-1]

    def route(
        self,
        logits: PerExpert,
        correction: PerExpert | None,
        scale: PerExpert | None,
        given: Callable[[int], PerToken] | None,
    ) -> tuple[list[PerToken], list[PerToken]]:
        """The chosen expert and the weight of every slot. `given` has the expert of a slot to replay."""
        spec = self.spec
        logits = _with_one_nan(logits)
        logit_keys = self._keys(logits)
        if self.columns != self.experts:  # softmax must not count experts that do not exist
            logits = jnp.where(self.index < self.experts, logits, -math.inf)
        scores = self._scores(logits, logit_keys)
        choice_keys = logit_keys
        if given is None and (correction is not None or spec.num_groups is not None):
            choice = scores(logits, self.spread) if spec.select_on == "scores" else logits
            choice = choice if correction is None else choice + correction
            choice_keys = self._in_kept_groups(self._keys(_with_one_nan(choice)))

        chosen, selected = [], []
        for slot in range(spec.top_k):
            if given is not None:
                expert = given(slot)
            else:
                best = choice_keys.max(-1)
                expert = self._first(choice_keys, best)
                choice_keys = jnp.where(self.index != self.spread(expert), choice_keys, LOWEST)
            chosen.append(expert)
            # An expert that does not exist has the lowest key, which is that of a NaN.
            selected.append(_value(self._at(expert, logit_keys)))
        weights = self._weights(scores, selected)
        if scale is not None:
            bits = lax.bitcast_convert_type(scale, jnp.int32)
            scales = [lax.bitcast_convert_type(self._at(expert, bits), jnp.float32) for expert in chosen]
            weights = [weight * factor for weight, factor in zip(weights, scales, strict=True)]
        return chosen, weights

    def _keys(self, values: PerExpert) -> PerExpert:
        keys = _key(values)
        return keys if self.columns == self.experts else jnp.where(self.index < self.experts, keys, LOWEST)

    def _first(self, keys: PerExpert, best: PerToken) -> PerToken:
        """The lowest expert whose key is `best`. By a maximum: the GPU has an instruction for that of a warp."""
        last = self.columns - 1
        return last - jnp.where(keys == self.spread(best), last - self.index, -1).max(-1)

    def _at(self, expert: PerToken, values: PerExpert) -> PerToken:
        """The int32 value at an expert, `LOWEST` if there is no such expert."""
        return jnp.where(self.index == self.spread(expert), values, LOWEST).max(-1)

    def _scores(self, logits: PerExpert, keys: PerExpert) -> Callable[..., jax.Array]:
        """`routing.scores` as a function of logits, and of what spreads a token's values to them."""
        if self.spec.score_function == "softmax":
            highest = _value(keys.max(-1))
            total = jnp.exp(logits - self.spread(highest)).sum(-1)
            return lambda values, spread: jnp.exp(values - spread(highest)) / spread(total)
        function = {"sigmoid": _sigmoid, "sqrtsoftplus": _sqrt_softplus}.get(self.spec.score_function, _itself)
        return lambda values, _: function(values)

    def _in_kept_groups(self, keys: PerExpert) -> PerExpert:
        """The keys, those of the groups that are not kept replaced by the key of `spec.masked_choice`."""
        spec = self.spec
        if spec.num_groups is None or spec.group_topk is None:
            return keys
        size = self.experts // spec.num_groups
        outside = [(self.index < group * size) | (self.index >= (group + 1) * size) for group in range(spec.num_groups)]
        inside = [(self.index >= group * size) & (self.index < (group + 1) * size) for group in range(spec.num_groups)]
        group_keys = [self._group_key(jnp.where(member, keys, LOWEST)) for member in inside]
        masked = _key_of_number(spec.masked_choice)
        for group, others in enumerate(outside):
            ahead = _ahead(group_keys, group)
            keys = jnp.where(others | (self.spread(ahead) < spec.group_topk), keys, masked)
        return keys

    def _group_key(self, keys: PerExpert) -> PerToken:
        """The key of a group's score, from the keys of its experts and `LOWEST` elsewhere."""
        highest = keys.max(-1)
        if self.spec.group_score == "max":
            return highest
        others = jnp.where(self.index != self.spread(self._first(keys, highest)), keys, LOWEST)
        return _key(_with_one_nan(_value(highest) + _value(others.max(-1))))

    def _weights(self, scores: Callable[..., jax.Array], selected: list[PerToken]) -> list[PerToken]:
        """`routing.routing_weights` of the selected logits, but for the scale of the experts."""
        spec = self.spec
        weights = [scores(logit, _itself) for logit in selected]
        if spec.score_function == "softmax_topk":
            highest = functools.reduce(jnp.maximum, weights)
            weights = [jnp.exp(weight - highest) for weight in weights]
            total = functools.reduce(jnp.add, weights)
            weights = [weight / total for weight in weights]
        if spec.renormalize:
            total = jnp.maximum(functools.reduce(jnp.add, weights), spec.renormalize_min) + spec.renormalize_epsilon
            weights = [weight / total for weight in weights]
        return [weight * spec.scaling_factor for weight in weights]


def _ahead(keys: list[PerToken], place: int) -> PerToken:
    """How many keys come before the one at `place`: higher ones, and equal ones before it."""
    mine = keys[place]
    before = [jnp.where(key >= mine, 1, 0) for key in keys[:place]]
    behind = [jnp.where(key > mine, 1, 0) for key in keys[place + 1 :]]
    return functools.reduce(jnp.add, [*before, *behind], jnp.zeros_like(mine))


def _with_one_nan(values: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(values), jnp.nan, values)


def _key(values: jax.Array) -> jax.Array:
    """int32 keys in the total order of float32: -0.0 below +0.0, NaN above inf."""
    return _flip(lax.bitcast_convert_type(values, jnp.int32))


def _value(keys: jax.Array) -> jax.Array:
    """The float32 of a key."""
    return lax.bitcast_convert_type(_flip(keys), jnp.float32)


def _flip(bits: jax.Array) -> jax.Array:
    """Reverse the order of negative floats, which is the wrong way round as integers. Its own inverse."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _key_of_number(value: float) -> int:
    bits = int(np.float32(value).view(np.int32))
    return bits ^ 0x7FFFFFFF if bits < 0 else bits


def _itself(values: jax.Array) -> jax.Array:
    return values


def _sigmoid(values: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-values))


def _sqrt_softplus(values: jax.Array) -> jax.Array:
    """sqrt(log(1 + exp(l))), as max(l, 0) + log(1 + e) with e = exp(-|l|). Mosaic has no log1p.

    1 + e is rounded to u, and log(1 + e) is log(u) e / (u - 1) to a few units in the last place, or e where u is 1.
    """
    small = jnp.exp(-jnp.abs(values))
    rounded = 1.0 + small
    is_one = rounded == 1.0
    log = jnp.where(is_one, small, jnp.log(rounded) * (small / jnp.where(is_one, 1.0, rounded - 1.0)))
    return jnp.sqrt(jnp.maximum(values, 0.0) + log)
