"""The input checks of `jax_router.nnx`. A message says the argument, what it was, what is accepted, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router.checks import as_array, describe, size
from jax_router.checks_route import int32_ids, integers
from jax_router.implementations import experts_axis


def initializer(name: str, value: Any) -> None:
    """Check that an initializer can be called.

    Raises:
      TypeError: it cannot.
    """
    if not callable(value):
        raise TypeError(
            f"{name} is {describe(value)}. Expected an initializer, a function of (key, shape, dtype); pass one of "
            "flax.nnx.initializers."
        )


def rngs(name: str, value: Any) -> None:
    """Check that `value` makes keys as `flax.nnx.Rngs` does.

    Raises:
      TypeError: it does not.
    """
    if not callable(getattr(value, "params", None)):
        raise TypeError(
            f"{name} is {describe(value)}. Expected a flax.nnx.Rngs with the stream params, or one for all; pass "
            "nnx.Rngs(0)."
        )


def initial(name: str, value: Any, metadata: str) -> jax.Array:
    """What the initializer `name` has returned, if it is an array.

    Raises:
      TypeError: it is not.
    """
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} returned {describe(value)}. Expected an array; pass a plain initializer, and what it would say of "
            f"the variable, as nnx.with_partitioning does, in {metadata}."
        )
    return jnp.asarray(value)


def metadata(**given: Any) -> None:
    """Check that the metadata of variables are mappings.

    Raises:
      TypeError: one is not.
    """
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise TypeError(
                f"{name} is {describe(value)}. Expected a dict of a variable's metadata; pass {{}} for none."
            )


def finite_number(name: str, value: Any) -> float:
    """`value` as a float.

    Raises:
      TypeError: it is no number.
      ValueError: it is infinite, in float32 at least, or NaN.
    """
    if not isinstance(value, int | float | np.floating) or isinstance(value, bool):
        raise TypeError(f"{name} is {describe(value)}. Expected a number; pass a Python float.")
    if not abs(float(value)) <= float(jnp.finfo(jnp.float32).max):
        raise ValueError(
            f"{name} is {value}. Expected a finite number, in float32 too; pass the one the adapter was trained with."
        )
    return float(value)


def layer(name: str, value: Any, kind: type) -> None:
    """Check that `value` is a layer of this kind.

    Raises:
      TypeError: it is not.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} is a {type(value).__module__}.{type(value).__qualname__}. Expected a jax_router.nnx."
            f"{kind.__name__}; make one and load its parameters."
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


def kernel(value: Any, hidden: int, experts: int, weight_layout: str) -> jax.Array:
    """`value` as an array of the shape that the kernel of a layer has.

    Raises:
      TypeError: it is no array.
      ValueError: it has another shape, or a dtype that is not taken.
    """
    shape = (experts, hidden) if experts_axis(weight_layout) == 0 else (hidden, experts)
    other = "experts_hidden" if weight_layout == "hidden_experts" else "hidden_experts"
    return parameter("kernel", value, shape, f'make the layer with weight_layout="{other}"')


def parameter(name: str, value: Any, shape: tuple[int, ...], remedy: str = "") -> jax.Array:
    """`value` as an array of this shape; `remedy` helps if it is transposed.

    Raises:
      TypeError: it is no array.
      ValueError: it has another shape, or a dtype that is not taken.
    """
    array = as_array(name, value)
    if array.shape == shape:
        return array
    *stack, rows, columns = shape
    if array.shape == (*stack, columns, rows):
        remedy = f"it looks transposed, {remedy or 'load it with its last two axes swapped'}"
    elif array.shape[1:] == shape:
        remedy = "call a stack of layers through nnx.vmap or nnx.scan"
    else:
        remedy = "load one of this size"
    raise ValueError(f"{name} has shape {array.shape} but the layer was made for {shape}. Expected that; {remedy}.")


def parameters_fit(x: jax.Array, **parameters: jax.Array | None) -> None:
    """Check that parameters of a layer that casts nothing are in x's dtype or in float32.

    Raises:
      ValueError: one is not.
    """
    for name, array in parameters.items():
        if array is not None and array.dtype.name not in (x.dtype.name, "float32"):
            raise ValueError(
                f"{name} is {array.dtype.name} but x is {x.dtype.name}. Expected x in the dtype of {name}, or {name} "
                f"in float32; make the layer with dtype=jnp.{x.dtype.name}, which casts both."
            )


def one_adapter(adapter: Any, num_adapters: int | None) -> int | None:
    """`adapter` as an int, if it names one of the adapters of a layer, and None if the layer has only one.

    Raises:
      TypeError: it is no integer.
      ValueError: it is out of range, given without need, or missing.
    """
    _adapter_is_given_or_not(adapter, num_adapters)
    if num_adapters is None:
        return None
    index = size("adapter", adapter, at_least=0)
    if index >= num_adapters:
        raise ValueError(
            f"adapter is {adapter} but the layer has num_adapters={num_adapters}. Expected 0 to {num_adapters - 1}; "
            "pass one of these."
        )
    return index


def adapters(adapter: Any, tokens: tuple[int, ...], num_adapters: int | None) -> jax.Array | None:
    """`adapter` as an int32 array with an id for every token; None if the layer has one adapter. Negative is none.

    Raises:
      TypeError: it is no array.
      ValueError: it has another shape or no integers, an id is out of range where it is concrete, or it is given
        without need or missing.
    """
    _adapter_is_given_or_not(adapter, num_adapters)
    if num_adapters is None:
        return None
    adapter = integers("adapter", adapter)
    if adapter.shape != tokens:
        raise ValueError(
            f"adapter has shape {adapter.shape} but x has the tokens {tokens}. Expected {tokens}; pass an id for every "
            "token, a negative one for no adapter."
        )
    if not isinstance(adapter, jax.core.Tracer) and getattr(adapter, "is_fully_addressable", True):
        highest = int(np.asarray(adapter).max()) if adapter.size else -1
        if highest >= num_adapters:
            raise ValueError(
                f"adapter has the id {highest} but the layer has num_adapters={num_adapters}. Expected ids up to "
                f"{num_adapters - 1}, or negative for no adapter; pass ids of this layer."
            )
    return int32_ids(adapter)


def _adapter_is_given_or_not(adapter: Any, num_adapters: int | None) -> None:
    if num_adapters is None and adapter is not None:
        raise ValueError(
            f"adapter is {describe(adapter)} but the layer has one adapter. Expected None; make the layer with "
            "num_adapters to choose among several."
        )
    if num_adapters is not None and adapter is None:
        raise ValueError(
            f"adapter is None but the layer has num_adapters={num_adapters}. Expected ids from 0 to "
            f"{num_adapters - 1}; pass which one to use."
        )
