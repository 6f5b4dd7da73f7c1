"""The input checks of `route` and of the losses. A message says what it was, what is accepted and what to do."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router.checks import (
    as_array,
    describe,
    dtypes_fit,
    native_bytes,
    one_per_expert,
    router_gemm_inputs,
    size,
    spec_fits,
)
from jax_router.implementations import experts_axis


def route_inputs(
    x: Any,
    weight: Any,
    bias: Any,
    spec: Any,
    correction_bias: Any,
    expert_scale: Any,
    experts: Any,
    weight_layout: Any,
    shards: int = 1,
) -> tuple[Any, ...]:
    """The checked arrays of `route`: x, weight, bias, correction_bias, expert_scale, experts in int32; None where None.

    Of `shards` devices each has as many experts as this weight, and ids and spec are of all of them.

    Raises:
      TypeError: one is no array, spec no `RoutingSpec`, or weight_layout no text.
      ValueError: shapes or dtypes that do not fit each other or are not taken, an unknown layout, or an id in experts
        out of range.
    """
    x, weight, bias, _ = router_gemm_inputs(x, weight, bias, "float32", weight_layout)
    count = weight.shape[experts_axis(weight_layout)]
    spec_fits(spec, shards * count)
    vectors = {"correction_bias": correction_bias, "expert_scale": expert_scale}
    for name, vector in vectors.items():
        if vector is not None:
            vectors[name] = as_array(name, vector)
            one_per_expert(name, vectors[name], count)
            dtypes_fit(x.dtype.name, **{name: vectors[name].dtype.name})
    ids = None if experts is None else expert_ids(experts, (*x.shape[:-1], spec.top_k), shards * count)
    return x, weight, bias, *vectors.values(), ids


def shards(axis_name: Any) -> int:
    """How many devices experts are split over, inside a `shard_map` over the axes `axis_name`; 1 for None.

    Raises:
      TypeError: it is neither None, nor a name, nor a tuple of names.
      ValueError: there is no such axis here.
    """
    if axis_name is None:
        return 1
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"axis_name is {describe(axis_name)}. Expected None, the name of an axis of the mesh or a tuple of names; "
            "pass the axes that experts are split over."
        )
    if len(set(names)) < len(names):
        raise ValueError(
            f"axis_name is {axis_name}. Expected every axis once; pass the axes that experts are split over."
        )
    here = jax.sharding.get_abstract_mesh().manual_axes
    for name in names:
        if name not in here:
            raise ValueError(
                f"axis_name names {name!r}, and the axes that are mapped here are {', '.join(here) or 'none'}. "
                "Expected axes of an enclosing jax.shard_map; leave it None under jit, where a sharded weight says it."
            )
    return math.prod(jax.lax.axis_size(name) for name in names)


def same_along(axis_name: Any, **arrays: jax.Array | None) -> None:
    """Check that arrays do not differ between the devices of the axes `axis_name`, as far as their types say it.

    Raises:
      ValueError: one does.
    """
    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    for name, array in arrays.items():
        for axis in names:
            if array is not None and axis in jax.typeof(array).manual_axis_type.varying:
                raise ValueError(
                    f"{name} varies over the axis {axis!r}, which axis_name names. Expected the same tokens on every "
                    f"device that has some of their experts; gather {name} over {axis!r}, or split experts over "
                    "another axis."
                )


def expert_ids(experts: Any, shape: tuple[int, ...], count: int) -> jax.Array:
    """`experts` as an int32 array of this shape. Ids that are concrete are checked; of traced ones nothing is known.

    Raises:
      TypeError: it is no array.
      ValueError: it has another shape or no integers, or an id that is no expert.
    """
    experts = integers("experts", experts)
    if experts.shape != shape:
        raise ValueError(
            f"experts has shape {experts.shape} but x and spec ask for {shape}. Expected the tokens of x in the "
            f"leading axes and top_k={shape[-1]} ids in the last; pass one id for every weight."
        )
    if not isinstance(experts, jax.core.Tracer) and getattr(experts, "is_fully_addressable", True):
        wrong = np.argwhere((np.asarray(experts) < 0) | (np.asarray(experts) >= count))
        if len(wrong):
            place = tuple(map(int, wrong[0]))
            raise ValueError(
                f"experts has the id {int(experts[place])} at {place} but weight has experts={count}. Expected ids "
                f"from 0 to {count - 1}; pass ids that were recorded with this router."
            )
    return int32_ids(experts)


def experts_and_mask(experts: Any, num_experts: Any, mask: Any) -> tuple[jax.Array, jax.Array | None]:
    """The checked arrays of `tokens_per_expert`: experts in int32, the mask as bool in the shape of the tokens.

    Raises:
      TypeError: one is no array, or num_experts no integer.
      ValueError: a shape or dtype that does not fit.
    """
    size("num_experts", num_experts)
    experts = int32_ids(integers("experts", experts))
    if experts.ndim < 1:
        raise ValueError(
            "experts has shape (), a scalar. Expected shape (..., k), tokens in the leading axes; pass the experts of "
            "one token as (k,)."
        )
    return experts, _mask(mask, experts.shape[:-1])


def probabilities_and_experts(
    probabilities: Any, experts: Any, mask: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The checked arrays of `load_balancing_loss`, probabilities in float32.

    Raises:
      TypeError: one is no array.
      ValueError: shapes or dtypes that do not fit each other.
    """
    probabilities = _of_tokens("probabilities", probabilities)
    experts, mask = experts_and_mask(experts, probabilities.shape[-1], mask)
    tokens = probabilities.shape[:-1]
    if experts.shape[:-1] != tokens:
        raise ValueError(
            f"experts has shape {experts.shape} but probabilities has shape {probabilities.shape}. Expected the same "
            f"tokens, {tokens}, in their leading axes; pass what one call of route returned."
        )
    return probabilities, experts, mask


def logits_and_mask(logits: Any, mask: Any) -> tuple[jax.Array, jax.Array | None]:
    """The checked arrays of `router_z_loss`, logits in float32.

    Raises:
      TypeError: one is no array.
      ValueError: a shape or dtype that does not fit.
    """
    logits = _of_tokens("logits", logits)
    return logits, _mask(mask, logits.shape[:-1])


def _of_tokens(name: str, value: Any) -> jax.Array:
    array = as_array(name, value)
    if array.ndim < 1 or array.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {array.shape}. Expected (..., experts) with at least 1 expert, tokens in the leading "
            "axes; put the axis of experts last."
        )
    return array.astype(jnp.float32)


def _mask(mask: Any, tokens: tuple[int, ...]) -> jax.Array | None:
    if mask is None:
        return None
    mask = integers("mask", mask)
    try:
        fits = np.broadcast_shapes(mask.shape, tokens) == tokens
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask has shape {mask.shape} but the tokens have {tokens}. Expected a shape that broadcasts to that; pass "
            "one value per token."
        )
    return jnp.broadcast_to(jnp.asarray(mask).astype(bool), tokens)


def integers(name: str, value: Any) -> jax.Array | np.ndarray:
    """`value`, if it is an array of integers, or as a mask of bools."""
    if not isinstance(value, jax.Array) and hasattr(value, "__jax_array__"):
        value = value.__jax_array__()
    what, example = ("integers or bools", "bool") if name == "mask" else ("integers", "jnp.int32")
    if not isinstance(value, jax.Array | np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is {describe(value)}. Expected a JAX or numpy array of {what}; convert it first, for example with "
            f"jnp.asarray({name}, dtype={example})."
        )
    if not jnp.issubdtype(value.dtype, jnp.integer) and not (name == "mask" and value.dtype == bool):
        raise ValueError(
            f"{name} is an array of {value.dtype.name}. Expected {what}; cast it, for example with "
            f"{name}.astype({example})."
        )
    native_bytes(name, value)
    return value


def int32_ids(ids: jax.Array | np.ndarray) -> jax.Array:
    """Ids of any integer dtype in int32. One that it does not hold becomes the nearest, and is no id either."""
    limits = jnp.iinfo(jnp.int32)
    array = jnp.asarray(ids)
    if jnp.iinfo(array.dtype).max > limits.max:
        array = jnp.clip(array, max(limits.min, jnp.iinfo(array.dtype).min), limits.max)
    return array.astype(jnp.int32)


def logits_of_route(out_dtype: str) -> None:
    """Check that a problem with a spec has float32 logits.

    Raises:
      ValueError: they are in another dtype.
    """
    if out_dtype != "float32":
        raise ValueError(
            f"out_dtype is {out_dtype} but there is a spec. Expected float32, which the logits of route are; leave "
            "out_dtype out, and to round logits before scoring set round_logits=True in the spec."
        )
