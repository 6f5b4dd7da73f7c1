"""Bad input to the layers of `jax_router.nnx` gets an error that says what it was, what is accepted and what to do."""

from __future__ import annotations

import importlib
import re
import sys

import jax
import jax.numpy as jnp
import nnx_cases as cases
import numpy as np
import pytest
from flax import nnx
from nnx_cases import ADAPTERS, BF16, EXPERTS, HIDDEN, RANK, SPEC, with_adapter

import jax_router as jr
from jax_router.nnx import GateLinear, GateLinearLoRA, Router, RouterLoRA

RNGS = nnx.Rngs(0)


def made(hidden=HIDDEN, experts=EXPERTS, **options) -> Router:
    return Router(hidden, experts, **{"spec": SPEC, "rngs": RNGS} | options)


def adapted(**options) -> RouterLoRA:
    return RouterLoRA(cases.router(), **{"rank": RANK, "rngs": RNGS} | options)


CONSTRUCTION = {
    "hidden": (lambda: made(hidden=0), ValueError, "hidden is 0. Expected an integer of at least 1"),
    "experts": (lambda: made(experts=8.0), TypeError, "experts is 8.0 (float). Expected an integer"),
    "spec": (lambda: made(spec="softmax"), TypeError, "spec is 'softmax' (str). Expected a jax_router.RoutingSpec"),
    "spec and experts": (lambda: made(spec=jr.RoutingSpec(9)), ValueError, "spec has top_k=9 but weight has experts=8"),
    "use_bias": (lambda: made(use_bias=1), TypeError, "use_bias is 1 (int). Expected True or False"),
    "use_correction_bias": (lambda: made(use_correction_bias=None), TypeError, "use_correction_bias is None"),
    "use_expert_scale": (lambda: made(use_expert_scale="no"), TypeError, "use_expert_scale is 'no' (str)"),
    "dtype": (lambda: made(dtype="float64"), ValueError, "dtype is float64. Expected bfloat16, float16 or float32"),
    "param_dtype": (lambda: made(param_dtype=None), ValueError, "param_dtype is None (NoneType). Expected bfloat16"),
    "kernel_init": (lambda: made(kernel_init=0.02), TypeError, "kernel_init is 0.02 (float). Expected an initializer"),
    "bias_init": (lambda: made(bias_init=jnp.zeros(2)), TypeError, "bias_init is "),
    "weight_layout": (
        lambda: made(weight_layout="HE"),
        ValueError,
        "weight_layout is 'HE'. Expected experts_hidden or",
    ),
    "implementation": (
        lambda: made(implementation="cudaa"),
        ValueError,
        "implementation names 'cudaa'. Expected cuda,",
    ),
    "out_dtype": (
        lambda: GateLinear(HIDDEN, EXPERTS, out_dtype=jnp.int8, rngs=RNGS),
        ValueError,
        "out_dtype is int8. Expected bfloat16, float16 or float32",
    ),
    "rngs": (lambda: made(rngs=jax.random.key(0)), TypeError, "rngs is a jax"),
    "rngs without params": (
        lambda: made(rngs=nnx.Rngs(dropout=0)),
        TypeError,
        "with the stream params, or one for all",
    ),
    "metadata in kernel_init": (
        lambda: made(kernel_init=nnx.with_partitioning(nnx.initializers.zeros, (None, "model"))),
        TypeError,
        "Expected an array; pass a plain initializer, and what it would say of the variable, as nnx.with_partitioning "
        "does, in kernel_metadata.",
    ),
    "metadata in a_initializer": (
        lambda: adapted(num_adapters=2, a_initializer=nnx.with_partitioning(nnx.initializers.zeros, (None, "model"))),
        TypeError,
        "a_initializer returned a flax.nnx.variablelib.VariableMetadata. Expected an array",
    ),
    "kernel_metadata": (
        lambda: made(kernel_metadata=None),
        TypeError,
        "kernel_metadata is None (NoneType). Expected a",
    ),
    "a_metadata": (lambda: adapted(a_metadata="model"), TypeError, "a_metadata is 'model' (str). Expected a dict"),
    "base": (
        lambda: RouterLoRA(cases.gate(), RANK, rngs=RNGS),
        TypeError,
        "base is a jax_router.nnx.layers.GateLinear. Expected a jax_router.nnx.Router; make one and load",
    ),
    "base of a gate": (
        lambda: GateLinearLoRA(nnx.Linear(8, 8, rngs=RNGS), RANK, rngs=RNGS),
        TypeError,
        "base is a flax.nnx.nn.linear.Linear. Expected a jax_router.nnx.GateLinear",
    ),
    "rank": (lambda: adapted(rank=0), ValueError, "rank is 0. Expected an integer of at least 1"),
    "alpha": (lambda: adapted(alpha="16"), TypeError, "alpha is '16' (str). Expected a number"),
    "alpha that float32 does not hold": (lambda: adapted(alpha=1e39), ValueError, "alpha is 1e+39. Expected a finite"),
    "infinite alpha": (lambda: adapted(alpha=np.inf), ValueError, "alpha is inf. Expected a finite number"),
    "num_adapters": (lambda: adapted(num_adapters=0), ValueError, "num_adapters is 0. Expected an integer of at least"),
    "freeze_base": (
        lambda: adapted(freeze_base="yes"),
        TypeError,
        "freeze_base is 'yes' (str). Expected True or False",
    ),
    "a_initializer": (lambda: adapted(a_initializer=1), TypeError, "a_initializer is 1 (int). Expected an initializer"),
    "b_initializer": (lambda: adapted(b_initializer=None), TypeError, "b_initializer is None (NoneType). Expected an"),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_an_argument_that_makes_no_sense_is_refused_when_a_layer_is_made(case) -> None:
    make, kind, message = CONSTRUCTION[case]
    with pytest.raises(kind, match=re.escape(message)):
        make()


def holding(name: str, array, layer=None):
    layer = layer or cases.router()
    getattr(layer, name).set_value(array)
    return layer


X, ONE, SEVERAL = (
    cases.hidden_states(3),
    with_adapter(cases.router()),
    with_adapter(cases.router(), num_adapters=ADAPTERS),
)
IDS = np.zeros(3, np.int32)
CALLS = {
    "x": (lambda: cases.router()([1.0]), TypeError, "x is [1.0] (list). Expected a JAX or numpy array"),
    "shape of x": (
        lambda: cases.gate()(X[:, :8]),
        ValueError,
        "x has shape (3, 8) but the layer has hidden=16. Expected (..., 16), tokens in the leading axes; put the",
    ),
    "dtype of x": (lambda: cases.router()(IDS), ValueError, "x is an array of int32. Expected bfloat16, float16 or"),
    "kernel in 16 bits": (
        lambda: cases.router(dtype=BF16)(X),
        ValueError,
        "kernel is bfloat16 but x is float32. Expected x in the dtype of kernel, or kernel in float32; make the layer "
        "with dtype=jnp.float32, which casts both.",
    ),
    "transposed kernel": (
        lambda: holding("kernel", np.zeros((HIDDEN, EXPERTS), np.float32))(X),
        ValueError,
        "kernel has shape (16, 8) but the layer was made for (8, 16). Expected that; it looks transposed, make the "
        'layer with weight_layout="hidden_experts".',
    ),
    "kernel of another size": (
        lambda: holding("kernel", np.zeros((4, HIDDEN), np.float32))(X),
        ValueError,
        "kernel has shape (4, 16) but the layer was made for (8, 16). Expected that; load one of this size.",
    ),
    "stacked kernel": (
        lambda: holding("kernel", np.zeros((2, EXPERTS, HIDDEN), np.float32))(X),
        ValueError,
        "kernel has shape (2, 8, 16) but the layer was made for (8, 16). Expected that; call a stack of layers through",
    ),
    "bias": (
        lambda: holding("bias", np.zeros(4, np.float32))(X),
        ValueError,
        "bias has shape (4,) but weight has experts=8. Expected bias of shape (8,)",
    ),
    "correction_bias": (
        lambda: holding("correction_bias", np.zeros(EXPERTS))(X),
        ValueError,
        "correction_bias is an array of float64. Expected bfloat16, float16 or float32",
    ),
    "out_dtype": (
        lambda: with_adapter(cases.gate(out_dtype=BF16))(X),
        ValueError,
        "out_dtype is bfloat16 but x is float32. Expected float32",
    ),
    "recorded experts": (
        lambda: ONE(X, experts=np.full((3, 2), EXPERTS)),
        ValueError,
        "experts has the id 8 at (0, 0) but weight has experts=8",
    ),
    "return_logits": (lambda: ONE(X, return_logits=1), TypeError, "return_logits is 1 (int). Expected True or False"),
    "lora_a of peft": (
        lambda: holding("lora_a", np.zeros((RANK, HIDDEN), np.float32), with_adapter(cases.router()))(X),
        ValueError,
        "lora_a has shape (2, 16) but the layer was made for (16, 2). Expected that; it looks transposed, load it with "
        "its last two axes swapped.",
    ),
    "lora_b of another rank": (
        lambda: holding("lora_b", np.zeros((4, EXPERTS), np.float32), with_adapter(cases.router()))(X),
        ValueError,
        "lora_b has shape (4, 8) but the layer was made for (2, 8). Expected that; load one of this size.",
    ),
    "adapter of one": (
        lambda: ONE(X, adapter=IDS),
        ValueError,
        "but the layer has one adapter. Expected None; make the layer with num_adapters to choose among several.",
    ),
    "no adapter of several": (
        lambda: SEVERAL(X),
        ValueError,
        "adapter is None but the layer has num_adapters=3. Expected ids from 0 to 2; pass which one to use.",
    ),
    "adapter that is no array": (lambda: SEVERAL(X, adapter=[0, 1, 2]), TypeError, "adapter is [0, 1, 2] (list)."),
    "adapter of floats": (
        lambda: SEVERAL(X, adapter=X[:, 0]),
        ValueError,
        "adapter is an array of float32. Expected int",
    ),
    "shape of adapter": (
        lambda: SEVERAL(X, adapter=IDS[:2]),
        ValueError,
        "adapter has shape (2,) but x has the tokens (3,). Expected (3,); pass an id for every token, a negative one",
    ),
    "adapter with bytes swapped": (
        lambda: SEVERAL(X, adapter=IDS.astype(IDS.dtype.newbyteorder())),
        ValueError,
        "adapter is an array of >i4, bytes swapped. Expected this machine's byte order",
    ),
    "unsigned adapter out of range": (
        lambda: SEVERAL(X, adapter=IDS.astype(np.uint32) - 1),
        ValueError,
        "adapter has the id 4294967295 but the layer has num_adapters=3.",
    ),
    "adapter out of range": (
        lambda: SEVERAL(X, adapter=IDS + 3),
        ValueError,
        "adapter has the id 3 but the layer has num_adapters=3. Expected ids up to 2, or negative for no adapter",
    ),
    "merged adapter out of range": (
        lambda: SEVERAL.merge(3),
        ValueError,
        "adapter is 3 but the layer has num_adapters=3. Expected 0 to 2; pass one of these.",
    ),
    "merged negative adapter": (
        lambda: SEVERAL.merge(-1),
        ValueError,
        "adapter is -1. Expected an integer of at least 0",
    ),
    "no merged adapter": (lambda: SEVERAL.merge(), ValueError, "adapter is None but the layer has num_adapters=3"),
    "merged adapter of one": (lambda: ONE.merge(0), ValueError, "adapter is 0 (int) but the layer has one adapter"),
}


@pytest.mark.parametrize("case", CALLS)
def test_an_array_that_does_not_fit_is_refused_when_a_layer_is_called(case) -> None:
    call, kind, message = CALLS[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_without_flax_the_import_says_what_to_install(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("jax_router.nnx")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("flax", "flax.nnx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"jax_router.nnx needs flax, .* pip install 'jax-router\[flax\]'"):
        importlib.import_module("jax_router.nnx")
