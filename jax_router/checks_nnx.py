"""The input checks of `jax_router.nnx`. A message says the argument, what it was, what is accepted, what to do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_router.checks import as_array, describe, dtype_name
from jax_router.implementations import experts_axis


def callable_argument(name: str, value: Any) -> None:
    """Check that an initializer can be called.

    Raises:
      TypeError: it cannot.
    """
    if not callable(value):
        raise TypeError(
            f"{name} is {describe(value)}. Expected an initializer, a function of (key, shape, dtype); pass one of "
            "flax.nnx.initializers."
        )


def hidden_states(x: Any, hidden: int, dtype: jnp.dtype | None) -> jax.Array:
    """`x` as an array `[..., hidden]`, cast to the layer's dtype if it has one.

    Raises:
      TypeError: it is no array.
      ValueError: a dtype that is not taken, or another size of the last axis.
    """
    x = as_array("x", x)
    if x.ndim < 1 or x.shape[-1] != hidden:
        raise ValueError(
            f"x has shape {x.shape} but the layer has hidden={hidden}. Expected (..., {hidden}), tokens in the leading "
            "axes; put the hidden axis last."
        )
    return x if dtype is None else x.astype(dtype)


def kernel_of_layer(kernel: Any, hidden: int, experts: int, weight_layout: str) -> jax.Array:
    """`kernel` as an array of the shape that the layer was made with.

    Raises:
      TypeError: it is no array.
      ValueError: it has another shape, or a dtype that is not taken.
    """
    kernel = as_array("kernel", kernel)
    shape = (experts, hidden) if experts_axis(weight_layout) == 0 else (hidden, experts)
    if kernel.shape == shape:
        return kernel
    if kernel.shape == shape[::-1]:
        other = "experts_hidden" if weight_layout == "hidden_experts" else "hidden_experts"
        remedy = f'it looks transposed, make the layer with weight_layout="{other}"'
    elif kernel.shape[1:] == shape:
        remedy = "call a stack of layers through nnx.vmap or nnx.scan"
    else:
        remedy = "load the kernel of a router of this size"
    raise ValueError(
        f"kernel has shape {kernel.shape} but the layer has hidden={hidden}, experts={experts} and "
        f'weight_layout="{weight_layout}". Expected {shape}; {remedy}.'
    )


def parameters_fit(x: jax.Array, **parameters: jax.Array | None) -> None:
    """Check that parameters of a layer that casts nothing are in x's dtype or in float32.

    Raises:
      ValueError: one is not.
    """
    x_dtype = dtype_name(x.dtype)
    for name, parameter in parameters.items():
        if parameter is None or dtype_name(parameter.dtype) in (x_dtype, "float32"):
            continue
        raise ValueError(
            f"{name} is {dtype_name(parameter.dtype)} but x is {x_dtype}. Expected x in the dtype of {name}, or {name} "
            f"in float32; make the layer with dtype=jnp.{x_dtype}, which casts both."
        )
