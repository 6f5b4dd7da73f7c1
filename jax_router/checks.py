"""Every input check of the public functions. A message says the argument, what it was, what is accepted, what to do."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router.implementations import NAMES

INPUT_DTYPES = ("bfloat16", "float16", "float32")


def dtype_name(value: Any) -> str | None:
    """The name of a dtype ("bfloat16"), or None for what is no dtype. numpy takes None for float64; here it is none."""
    if value is None:
        return None
    try:
        return jnp.dtype(value).name
    except TypeError:
        return None


def as_array(name: str, value: Any) -> jax.Array:
    """`value` as a JAX array, with its dtype kept.

    Takes JAX arrays and tracers, numpy arrays, and wrappers with `__jax_array__` (Flax parameters).

    Raises:
      TypeError: `value` is no array, or a masked one.
      ValueError: its dtype is not bfloat16, float16 or float32, or not in this machine's byte order.
    """
    if not isinstance(value, jax.Array) and hasattr(value, "__jax_array__"):
        value = value.__jax_array__()
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} is {_describe(value)}. Expected a JAX or numpy array; convert it first, for example with "
            f"jnp.asarray({name}, dtype=jnp.bfloat16)."
        )
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array. Expected an array without a mask, which JAX would drop; fill it, for example "
            f"with {name}.filled(0)."
        )
    # Before jnp.asarray, which would quietly turn numpy's float64 into float32 or not, depending on jax_enable_x64.
    if value.dtype.name not in INPUT_DTYPES:
        raise ValueError(
            f"{name} is an array of {value.dtype.name}. Expected {_one_of(INPUT_DTYPES)}; cast it, for example with "
            f"{name}.astype(jnp.float32)."
        )
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        raise ValueError(
            f"{name} is an array of {value.dtype.str}, bytes swapped. Expected this machine's byte order; convert it "
            f"with {name}.astype({name}.dtype.newbyteorder('='))."
        )
    return jnp.asarray(value)


def router_gemm_inputs(
    x: Any, weight: Any, bias: Any, out_dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None, str]:
    """The checked arrays of `router_gemm` and the name of its output dtype.

    Raises:
      TypeError: x, weight or bias is no array.
      ValueError: shapes or dtypes that do not fit each other or are not taken.
    """
    x, weight = as_array("x", x), as_array("weight", weight)
    bias = None if bias is None else as_array("bias", bias)
    _check_shapes(x, weight, bias)
    out_dtype = input_dtype("out_dtype", out_dtype)
    bias_dtype = None if bias is None else bias.dtype.name
    dtypes_fit(x.dtype.name, weight=weight.dtype.name, bias=bias_dtype, out_dtype=out_dtype)
    return x, weight, bias, out_dtype


def dtypes_fit(x_dtype: str, **others: str | None) -> None:
    """Check that weight, bias and the output are in x's dtype or in float32.

    Raises:
      ValueError: one is not.
    """
    accepted = dict.fromkeys((x_dtype, "float32"))
    for name, dtype in others.items():
        if dtype is None or dtype in accepted:
            continue
        remedy = "cast the logits afterwards" if name == "out_dtype" else f"pass {name}.astype(x.dtype)"
        raise ValueError(f"{name} is {dtype} but x is {x_dtype}. Expected {_one_of(accepted)}; {remedy}.")


def _check_shapes(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> None:
    if x.ndim < 1:
        raise ValueError(
            "x has shape (), a scalar. Expected shape (..., hidden), tokens in the leading axes; pass one token as "
            "(hidden,)."
        )
    hidden = x.shape[-1]
    if hidden == 0:
        raise ValueError(f"x has shape {x.shape}, hidden=0. Expected hidden of at least 1; put the hidden axis last.")
    if weight.ndim != 2:
        raise ValueError(
            f"weight has shape {weight.shape}, {weight.ndim} axes. Expected 2, (experts, {hidden}); for a stack of "
            "routers use jax.vmap."
        )
    experts, weight_hidden = weight.shape
    if weight_hidden != hidden:
        transposed = "it looks transposed" if experts == hidden else "if yours is (hidden, experts)"
        raise ValueError(
            f"weight has hidden={weight_hidden} but x has hidden={hidden}. Expected weight of shape (experts, {hidden})"
            f"; {transposed}, pass weight.T."
        )
    if experts == 0:
        raise ValueError(
            f"weight has shape {weight.shape}, experts=0. Expected at least 1 expert; pass one row per expert."
        )
    if bias is not None and bias.shape != (experts,):
        raise ValueError(
            f"bias has shape {bias.shape} but weight has experts={experts}. Expected bias of shape ({experts},); pass "
            "one value per expert, or None."
        )


def implementation_names(implementation: Any) -> tuple[str, ...] | None:
    """The implementations to try, in order; None to choose automatically.

    Raises:
      TypeError: neither None, nor a name, nor a sequence of names.
      ValueError: an unknown name, or no name at all.
    """
    if implementation is None:
        return None
    names = (implementation,) if isinstance(implementation, str) else implementation
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"implementation is {_describe(implementation)}. Expected None, one of {_one_of(NAMES)}, or a sequence of "
            "these; leave it None to let the dispatcher choose."
        )
    if not names:
        raise ValueError(
            f"implementation is an empty sequence. Expected at least one of {_one_of(NAMES)}; leave it None to let the "
            "dispatcher choose."
        )
    for name in names:
        known_implementation("implementation", name)
    return tuple(names)


def known_implementation(argument: str, name: str) -> str:
    """`name`, if it is an implementation. `argument` says in the message where it came from.

    Raises:
      ValueError: it is not.
    """
    if name in NAMES:
        return name
    close = difflib.get_close_matches(name.strip().lower(), NAMES, 1)
    remedy = f'did you mean "{close[0]}"?' if close else "pass one of these, or leave it out."
    raise ValueError(f"{argument} names {name!r}. Expected {_one_of(NAMES)}; {remedy}")


def size(name: str, value: Any, *, at_least: int = 1) -> int:
    """`value` as an int that counts something.

    Raises:
      TypeError: it is no integer.
      ValueError: it is below `at_least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        expected = f"Expected an integer of at least {at_least}; pass a number."
        raise TypeError(f"{name} is {_describe(value)}. {expected}") from None
    if number < at_least:
        raise ValueError(f"{name} is {number}. Expected an integer of at least {at_least}; pass the problem's size.")
    return number


def input_dtype(name: str, value: Any) -> str:
    """The name of a dtype that the router GEMM takes.

    Raises:
      ValueError: it is not one.
    """
    dtype = dtype_name(value)
    if dtype not in INPUT_DTYPES:
        found = _describe(value) if dtype is None else dtype
        raise ValueError(f"{name} is {found}. Expected {_one_of(INPUT_DTYPES)}; pass its name or the jnp dtype.")
    return dtype


def _one_of(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _describe(value: Any) -> str:
    """A value in a message: its text if short, always its type."""
    text = repr(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"{text} ({kind})" if len(text) <= 40 and "\n" not in text else f"a {kind}"
