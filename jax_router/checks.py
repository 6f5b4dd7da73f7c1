"""Every input check of the public functions. A message says the argument, what it was, what is accepted, what to do."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router.implementations import NAMES, WEIGHT_LAYOUTS, experts_axis

if TYPE_CHECKING:
    from jax_router.routing import RoutingSpec

INPUT_DTYPES = ("bfloat16", "float16", "float32")
NUMBERS_OF_A_SPEC = ("renormalize_epsilon", "renormalize_min", "scaling_factor", "masked_choice")


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
            f"{name} is {describe(value)}. Expected a JAX or numpy array; convert it first, for example with "
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
    native_bytes(name, value)
    return jnp.asarray(value)


def native_bytes(name: str, value: jax.Array | np.ndarray) -> None:
    """Check that an array is in this machine's byte order.

    Raises:
      ValueError: it is not.
    """
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        raise ValueError(
            f"{name} is an array of {value.dtype.str}, bytes swapped. Expected this machine's byte order; convert it "
            f"with {name}.astype({name}.dtype.newbyteorder('='))."
        )


def router_gemm_inputs(
    x: Any, weight: Any, bias: Any, out_dtype: Any, weight_layout: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None, str]:
    """The checked arrays of `router_gemm` and the name of its output dtype.

    Raises:
      TypeError: x, weight or bias is no array, or weight_layout no text.
      ValueError: shapes or dtypes that do not fit each other or are not taken, or an unknown layout.
    """
    layout(weight_layout)
    x, weight = as_array("x", x), as_array("weight", weight)
    bias = None if bias is None else as_array("bias", bias)
    _check_shapes(x, weight, bias, weight_layout)
    out_dtype = input_dtype("out_dtype", out_dtype)
    bias_dtype = None if bias is None else bias.dtype.name
    dtypes_fit(x.dtype.name, weight=weight.dtype.name, bias=bias_dtype, out_dtype=out_dtype)
    return x, weight, bias, out_dtype


def layout(weight_layout: Any) -> str:
    """`weight_layout`, if it is one.

    Raises:
      TypeError: it is no text.
      ValueError: it is another one.
    """
    _choice("weight_layout", weight_layout, WEIGHT_LAYOUTS)
    return weight_layout


def shape_of_weight(weight_layout: str, hidden: Any) -> str:
    """For messages: "(experts, 2880)", or of the other layout "(2880, experts)"."""
    return f"({', '.join(('experts', str(hidden))[:: 1 - 2 * experts_axis(weight_layout)])})"


def one_per_expert(name: str, vector: jax.Array, experts: int) -> None:
    """Check that an array has one value for every expert.

    Raises:
      ValueError: it has another shape.
    """
    if vector.shape != (experts,):
        raise ValueError(
            f"{name} has shape {vector.shape} but weight has experts={experts}. Expected {name} of shape ({experts},); "
            "pass one value per expert, or None."
        )


def flag(name: str, value: Any) -> None:
    """Check that an option is True or False.

    Raises:
      TypeError: it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {describe(value)}. Expected True or False; pass one of them.")


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


def _check_shapes(x: jax.Array, weight: jax.Array, bias: jax.Array | None, weight_layout: str) -> None:
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
            f"weight has shape {weight.shape}, {weight.ndim} axes. Expected 2, "
            f"{shape_of_weight(weight_layout, hidden)}; for a stack of routers use jax.vmap."
        )
    of_experts = experts_axis(weight_layout)
    experts, weight_hidden = weight.shape[of_experts], weight.shape[1 - of_experts]
    if weight_hidden != hidden:
        other = WEIGHT_LAYOUTS[1 - of_experts]
        transposed = "it looks transposed" if experts == hidden else f"if yours is {shape_of_weight(other, 'hidden')}"
        raise ValueError(
            f"weight has hidden={weight_hidden} but x has hidden={hidden}. Expected weight of shape "
            f'{shape_of_weight(weight_layout, hidden)}; {transposed}, pass weight_layout="{other}".'
        )
    if experts == 0:
        each = ("row", "column")[of_experts]
        raise ValueError(
            f"weight has shape {weight.shape}, experts=0. Expected at least 1 expert; pass one {each} per expert."
        )
    if bias is not None:
        one_per_expert("bias", bias, experts)


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
            f"implementation is {describe(implementation)}. Expected None, one of {_one_of(NAMES)}, or a sequence of "
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
        raise TypeError(f"{name} is {describe(value)}. {expected}") from None
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
        found = describe(value) if dtype is None else dtype
        raise ValueError(f"{name} is {found}. Expected {_one_of(INPUT_DTYPES)}; pass its name or the jnp dtype.")
    return dtype


def routing_spec(spec: RoutingSpec) -> None:
    """Check that the fields of a `RoutingSpec` make sense, alone and together.

    Raises:
      TypeError: an integer field is no integer, a flag no bool, a number no number.
      ValueError: a value that is not taken, or that the other fields rule out.
    """
    from jax_router import routing

    size("top_k", spec.top_k)
    _choice("score_function", spec.score_function, routing.SCORE_FUNCTIONS)
    _choice("group_score", spec.group_score, routing.GROUP_SCORES)
    _choice("select_on", spec.select_on, routing.SELECT_ON)
    for name in ("renormalize", "round_logits"):
        flag(name, getattr(spec, name))
    for name in NUMBERS_OF_A_SPEC:
        value = getattr(spec, name)
        if not isinstance(value, int | float | np.floating) or isinstance(value, bool):
            raise TypeError(f"{name} is {describe(value)}. Expected a number; pass a Python float.")
    for name in ("renormalize_epsilon", "renormalize_min"):
        value = getattr(spec, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}. Expected a finite number of at least 0; pass the model's.")
        if value != 0 and not spec.renormalize:
            raise ValueError(
                f"{name} is {value} but renormalize is False. Expected 0, because nothing is divided; set "
                f"renormalize=True or leave {name} out."
            )
    if not math.isfinite(spec.scaling_factor) or spec.scaling_factor == 0:
        raise ValueError(f"scaling_factor is {spec.scaling_factor}. Expected a finite number other than 0; fix it.")
    if spec.masked_choice not in (0.0, -math.inf):
        raise ValueError(
            f"masked_choice is {spec.masked_choice}. Expected -inf or 0.0; pass what the model fills the scores of the "
            "other groups with."
        )
    if (spec.num_groups is None) != (spec.group_topk is None):
        raise ValueError(
            f"num_groups is {spec.num_groups} and group_topk is {spec.group_topk}. Expected both or neither; pass the "
            "other one too, or None for both."
        )
    if spec.num_groups is not None:
        groups = size("num_groups", spec.num_groups)
        kept = size("group_topk", spec.group_topk)
        if kept > groups:
            raise ValueError(
                f"group_topk is {kept} but num_groups is {groups}. Expected at most {groups}; fix one of them."
            )


def spec_fits(spec: Any, experts: int) -> None:
    """Check that `spec` is a `RoutingSpec` and can select among this many experts.

    Raises:
      TypeError: it is no `RoutingSpec`.
      ValueError: it selects more experts than there are or than its groups hold, or its groups do not divide them.
    """
    from jax_router import routing

    if not isinstance(spec, routing.RoutingSpec):
        raise TypeError(
            f"spec is {describe(spec)}. Expected a jax_router.RoutingSpec; make one, for example "
            'RoutingSpec(top_k=4, score_function="softmax_topk").'
        )
    if spec.top_k > experts:
        raise ValueError(
            f"spec has top_k={spec.top_k} but weight has experts={experts}. Expected at most {experts}; fix the spec."
        )
    if spec.num_groups is None or spec.group_topk is None:
        return
    if experts % spec.num_groups != 0:
        raise ValueError(
            f"spec has num_groups={spec.num_groups} but weight has experts={experts}. Expected a number that divides "
            "them; fix the spec."
        )
    group_experts = experts // spec.num_groups
    if spec.group_score == "top2_sum" and group_experts < 2:
        raise ValueError(
            f'spec has group_score="top2_sum" but its groups have {group_experts} expert each. Expected at least 2; '
            'use fewer groups or group_score="max".'
        )
    if spec.group_topk * group_experts < spec.top_k:
        raise ValueError(
            f"spec has top_k={spec.top_k} but group_topk={spec.group_topk} groups hold "
            f"{spec.group_topk * group_experts} experts. Expected at most that; keep more groups."
        )


def _choice(name: str, value: Any, accepted: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {describe(value)}. Expected {_one_of(accepted)}; pass its name.")
    if value not in accepted:
        close = difflib.get_close_matches(value.strip().lower(), accepted, 1)
        remedy = f'did you mean "{close[0]}"?' if close else "pass one of these."
        raise ValueError(f"{name} is {value!r}. Expected {_one_of(accepted)}; {remedy}")


def _one_of(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def describe(value: Any) -> str:
    """A value in a message: its text if short, always its type."""
    text = repr(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"{text} ({kind})" if len(text) <= 40 and "\n" not in text else f"a {kind}"
