"""Input that makes no sense is refused while tracing, and the message says what, what was expected and what to do."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router as jr
from jax_router import dispatch, implementations

X, WEIGHT, BIAS = jnp.ones((3, 16), jnp.bfloat16), jnp.ones((4, 16), jnp.bfloat16), jnp.ones(4, jnp.bfloat16)
CPU = dispatch.Device("cpu", "cpu")
A100 = dispatch.Device("gpu", "NVIDIA A100", "8.0")

VALUE_ERRORS = {
    "x is a scalar": (
        {"x": jnp.float32(1)},
        "x has shape (), a scalar. Expected shape (..., hidden), tokens in the leading axes; pass one token as "
        "(hidden,).",
    ),
    "x has no hidden": (
        {"x": X[:, :0]},
        "x has shape (3, 0), hidden=0. Expected hidden of at least 1; put the hidden axis last.",
    ),
    "weight has one axis": (
        {"weight": WEIGHT[0]},
        "weight has shape (16,), 1 axes. Expected 2, (experts, 16); for a stack of routers use jax.vmap.",
    ),
    "weight is a stack": (
        {"weight": WEIGHT[None]},
        "weight has shape (1, 4, 16), 3 axes. Expected 2, (experts, 16); for a stack of routers use jax.vmap.",
    ),
    "weight is transposed": (
        {"weight": WEIGHT.T},
        "weight has hidden=4 but x has hidden=16. Expected weight of shape (experts, 16); it looks transposed, pass "
        'weight_layout="hidden_experts".',
    ),
    "weight has another hidden": (
        {"weight": WEIGHT[:, :9]},
        "weight has hidden=9 but x has hidden=16. Expected weight of shape (experts, 16); if yours is (hidden, "
        'experts), pass weight_layout="hidden_experts".',
    ),
    "weight [hidden, experts] is transposed": (
        {"weight": WEIGHT, "weight_layout": "hidden_experts"},
        "weight has hidden=4 but x has hidden=16. Expected weight of shape (16, experts); it looks transposed, pass "
        'weight_layout="experts_hidden".',
    ),
    "weight [hidden, experts] has another hidden": (
        {"weight": WEIGHT.T[:9], "weight_layout": "hidden_experts"},
        "weight has hidden=9 but x has hidden=16. Expected weight of shape (16, experts); if yours is (experts, "
        'hidden), pass weight_layout="experts_hidden".',
    ),
    "weight [hidden, experts] is a stack": (
        {"weight": WEIGHT.T[None], "weight_layout": "hidden_experts"},
        "weight has shape (1, 16, 4), 3 axes. Expected 2, (16, experts); for a stack of routers use jax.vmap.",
    ),
    "weight [hidden, experts] has no experts": (
        {"weight": WEIGHT.T[:, :0], "weight_layout": "hidden_experts"},
        "weight has shape (16, 0), experts=0. Expected at least 1 expert; pass one column per expert.",
    ),
    "weight_layout is misspelt": (
        {"weight_layout": "hidden_expert"},
        "weight_layout is 'hidden_expert'. Expected experts_hidden or hidden_experts; did you mean \"hidden_experts\"?",
    ),
    "weight_layout is something else": (
        {"weight_layout": "row major"},
        "weight_layout is 'row major'. Expected experts_hidden or hidden_experts; pass one of these.",
    ),
    "weight has no experts": (
        {"weight": WEIGHT[:0]},
        "weight has shape (0, 16), experts=0. Expected at least 1 expert; pass one row per expert.",
    ),
    "bias is too short": (
        {"bias": BIAS[:3]},
        "bias has shape (3,) but weight has experts=4. Expected bias of shape (4,); pass one value per expert, "
        "or None.",
    ),
    "bias has two axes": (
        {"bias": BIAS[None]},
        "bias has shape (1, 4) but weight has experts=4. Expected bias of shape (4,); pass one value per expert, or "
        "None.",
    ),
    "x is integer": (
        {"x": X.astype(jnp.int32)},
        "x is an array of int32. Expected bfloat16, float16 or float32; cast it, for example with "
        "x.astype(jnp.float32).",
    ),
    "x is float8": (
        {"x": X.astype(jnp.float8_e4m3fn)},
        "x is an array of float8_e4m3fn. Expected bfloat16, float16 or float32; cast it, for example with "
        "x.astype(jnp.float32).",
    ),
    "weight is complex": (
        {"weight": WEIGHT.astype(jnp.complex64)},
        "weight is an array of complex64. Expected bfloat16, float16 or float32; cast it, for example with "
        "weight.astype(jnp.float32).",
    ),
    "x has its bytes swapped": (
        {"x": np.ones((3, 16), ">f4"), "weight": WEIGHT.astype(jnp.float32), "bias": None},
        "x is an array of >f4, bytes swapped. Expected this machine's byte order; convert it with "
        "x.astype(x.dtype.newbyteorder('=')).",
    ),
    "x is float64 of numpy": (
        {"x": np.ones((3, 16))},
        "x is an array of float64. Expected bfloat16, float16 or float32; cast it, for example with "
        "x.astype(jnp.float32).",
    ),
    "bias is boolean": (
        {"bias": BIAS.astype(bool)},
        "bias is an array of bool. Expected bfloat16, float16 or float32; cast it, for example with "
        "bias.astype(jnp.float32).",
    ),
    "weight is narrower than x": (
        {"x": X.astype(jnp.float32)},
        "weight is bfloat16 but x is float32. Expected float32; pass weight.astype(x.dtype).",
    ),
    "weight is in the other 16 bits": (
        {"weight": WEIGHT.astype(jnp.float16)},
        "weight is float16 but x is bfloat16. Expected bfloat16 or float32; pass weight.astype(x.dtype).",
    ),
    "bias is in the other 16 bits": (
        {"bias": BIAS.astype(jnp.float16)},
        "bias is float16 but x is bfloat16. Expected bfloat16 or float32; pass bias.astype(x.dtype).",
    ),
    "out_dtype is in the other 16 bits": (
        {"out_dtype": jnp.float16},
        "out_dtype is float16 but x is bfloat16. Expected bfloat16 or float32; cast the logits afterwards.",
    ),
    "out_dtype is integer": (
        {"out_dtype": "int32"},
        "out_dtype is int32. Expected bfloat16, float16 or float32; pass its name or the jnp dtype.",
    ),
    "out_dtype is float": (
        {"out_dtype": float},
        "out_dtype is float64. Expected bfloat16, float16 or float32; pass its name or the jnp dtype.",
    ),
    "out_dtype is nonsense": (
        {"out_dtype": "banana"},
        "out_dtype is 'banana' (str). Expected bfloat16, float16 or float32; pass its name or the jnp dtype.",
    ),
    "out_dtype is None": (
        {"out_dtype": None},
        "out_dtype is None (NoneType). Expected bfloat16, float16 or float32; pass its name or the jnp dtype.",
    ),
    "implementation is misspelt": (
        {"implementation": "palas"},
        "implementation names 'palas'. Expected cuda, pallas or xla; did you mean \"pallas\"?",
    ),
    "implementation is in capitals": (
        {"implementation": "XLA"},
        "implementation names 'XLA'. Expected cuda, pallas or xla; did you mean \"xla\"?",
    ),
    "implementation is unknown": (
        {"implementation": "triton"},
        "implementation names 'triton'. Expected cuda, pallas or xla; pass one of these, or leave it out.",
    ),
    "one of implementation is unknown": (
        {"implementation": ("xla", "")},
        "implementation names ''. Expected cuda, pallas or xla; pass one of these, or leave it out.",
    ),
    "implementation is empty": (
        {"implementation": ()},
        "implementation is an empty sequence. Expected at least one of cuda, pallas or xla; leave it None to let the "
        "dispatcher choose.",
    ),
}

TYPE_ERRORS = {
    "weight_layout is None": (
        {"weight_layout": None},
        "weight_layout is None (NoneType). Expected experts_hidden or hidden_experts; pass its name.",
    ),
    "x is a list": (
        {"x": [[1.0]]},
        "x is [[1.0]] (list). Expected a JAX or numpy array; convert it first, for example with jnp.asarray(x, "
        "dtype=jnp.bfloat16).",
    ),
    "x is None": (
        {"x": None},
        "x is None (NoneType). Expected a JAX or numpy array; convert it first, for example with jnp.asarray(x, "
        "dtype=jnp.bfloat16).",
    ),
    "bias is masked": (
        {"bias": np.ma.masked_equal(np.arange(4, dtype=np.float32), 2)},
        "bias is a masked array. Expected an array without a mask, which JAX would drop; fill it, for example with "
        "bias.filled(0).",
    ),
    "weight is a string": (
        {"weight": "w" * 99},
        "weight is a str. Expected a JAX or numpy array; convert it first, for example with jnp.asarray(weight, "
        "dtype=jnp.bfloat16).",
    ),
    "weight is only a shape": (
        {"weight": jax.ShapeDtypeStruct((4, 16), jnp.bfloat16)},
        "weight is a jax.ShapeDtypeStruct. Expected a JAX or numpy array; convert it first, for example with "
        "jnp.asarray(weight, dtype=jnp.bfloat16).",
    ),
    "bias is a number": (
        {"bias": 0.5},
        "bias is 0.5 (float). Expected a JAX or numpy array; convert it first, for example with jnp.asarray(bias, "
        "dtype=jnp.bfloat16).",
    ),
    "implementation is a number": (
        {"implementation": 3},
        "implementation is 3 (int). Expected None, one of cuda, pallas or xla, or a sequence of these; leave it None "
        "to let the dispatcher choose.",
    ),
    "one of implementation is None": (
        {"implementation": ("xla", None)},
        "implementation is ('xla', None) (tuple). Expected None, one of cuda, pallas or xla, or a sequence of these; "
        "leave it None to let the dispatcher choose.",
    ),
    "implementation is a set": (
        {"implementation": {"xla"}},
        "implementation is {'xla'} (set). Expected None, one of cuda, pallas or xla, or a sequence of these; leave it "
        "None to let the dispatcher choose.",
    ),
}


def call(arguments: dict) -> jax.Array:
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS} | arguments
    return jr.router_gemm(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        *(pytest.param(ValueError, *case, id=name) for name, case in VALUE_ERRORS.items()),
        *(pytest.param(TypeError, *case, id=name) for name, case in TYPE_ERRORS.items()),
    ],
)
def test_bad_input_is_refused_with_what_it_was_what_is_accepted_and_what_to_do(error, arguments, message) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(arguments)


@pytest.mark.parametrize("case", ["weight is transposed", "bias is too short", "x is integer", "out_dtype is integer"])
def test_bad_input_is_refused_while_tracing(case) -> None:
    arguments, message = VALUE_ERRORS[case]
    traced = {name: value for name, value in arguments.items() if isinstance(value, jax.Array)}
    static = {name: value for name, value in arguments.items() if name not in traced}
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.jit(lambda traced: call(traced | static)).trace(traced)


def test_bad_input_is_refused_without_tokens_too() -> None:
    for arguments in ({"weight": WEIGHT.T}, {"out_dtype": "int32"}, {"implementation": "triton"}):
        with pytest.raises(ValueError, match="Expected"):
            call({"x": X[:0]} | arguments)


def test_named_implementation_never_falls_back() -> None:
    message = (
        'implementation="cuda" needs an NVIDIA GPU of compute capability 9.0, this device is cpu. Use '
        'implementation="xla", or leave it None.'
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        dispatch.choose(dispatch.Problem(3, 16, 4), CPU, implementation="cuda")


def test_the_message_names_the_device_that_is_not_enough() -> None:
    message = (
        'implementation="cuda" needs compute capability 9.0, this device is NVIDIA A100 (8.0). Use '
        'implementation="xla", or leave it None.'
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        dispatch.choose(dispatch.Problem(3, 16, 4), A100, implementation="cuda")


def test_every_reason_is_listed_when_a_whole_sequence_refuses() -> None:
    with pytest.raises(NotImplementedError) as caught:
        dispatch.choose(dispatch.Problem(3, 16, 4), CPU, implementation=("pallas", "cuda"))
    pallas = implementations.load("pallas").why_unsupported(dispatch.Problem(3, 16, 4), CPU)
    cuda = implementations.load("cuda").why_unsupported(dispatch.Problem(3, 16, 4), CPU)
    expected = f'implementation="pallas" {pallas}; implementation="cuda" {cuda}. Use implementation="xla", or leave'
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("variable", [dispatch.PREFER_VARIABLE, dispatch.DISABLE_VARIABLE])
def test_an_unknown_name_in_the_environment_is_refused(variable, monkeypatch) -> None:
    monkeypatch.setenv(variable, "palas")
    message = (
        f"the environment variable {variable} names 'palas'. Expected cuda, pallas or xla; did you mean \"pallas\"?"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call({})


def test_xla_cannot_be_switched_off(monkeypatch) -> None:
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "cuda,xla")
    message = (
        "the environment variable JAX_ROUTER_DISABLE lists xla. Expected cuda or pallas: xla is what is left when "
        "nothing else runs; to prefer another, name it in JAX_ROUTER_IMPLEMENTATION."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call({})


EXPLAIN_ERRORS = {
    "tokens is negative": (
        ValueError,
        {"tokens": -1},
        "tokens is -1. Expected an integer of at least 0; pass the problem's size.",
    ),
    "hidden is zero": (
        ValueError,
        {"hidden": 0},
        "hidden is 0. Expected an integer of at least 1; pass the problem's size.",
    ),
    "experts is a float": (
        TypeError,
        {"experts": 4.0},
        "experts is 4.0 (float). Expected an integer of at least 1; pass a number.",
    ),
    "dtype is int8": (
        ValueError,
        {"dtype": "int8"},
        "dtype is int8. Expected bfloat16, float16 or float32; pass its name or the jnp dtype.",
    ),
    "bias is nonsense": (
        ValueError,
        {"bias": "yes"},
        "bias is 'yes' (str). Expected bfloat16, float16 or float32; pass its name or the jnp dtype.",
    ),
    "bias is an array": (
        ValueError,
        {"bias": np.ones((4, 100))},
        "bias is a numpy.ndarray. Expected bfloat16, float16 or float32; pass its name or the jnp dtype.",
    ),
    "device is a word": (
        TypeError,
        {"device": "cpu"},
        "device is 'cpu'. Expected a jax.Device, a jax_router.dispatch.Device or None; pass jax.devices()[0], or "
        'Device("gpu", "NVIDIA H200", "9.0") for a machine that is not here.',
    ),
    "weight does not fit x": (
        ValueError,
        {"weight_dtype": "float16"},
        "weight is float16 but x is bfloat16. Expected bfloat16 or float32; pass weight.astype(x.dtype).",
    ),
}


@pytest.mark.parametrize(("error", "arguments", "message"), EXPLAIN_ERRORS.values(), ids=EXPLAIN_ERRORS)
def test_explain_refuses_what_describes_no_problem(error, arguments, message) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        jr.explain(**{"tokens": 8, "hidden": 16, "experts": 4} | arguments)
