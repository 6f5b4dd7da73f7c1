"""Input of `route` that makes no sense is refused, and the message says what, what was expected and what to do."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_router as jr

X, WEIGHT = jnp.ones((3, 16), jnp.bfloat16), jnp.ones((4, 16), jnp.bfloat16)
SPEC = jr.RoutingSpec(2, "sigmoid")
IDS = jnp.zeros((3, 2), jnp.int32)

ERRORS = {
    "weight is transposed": (
        ValueError, {"weight": WEIGHT.T},
        "weight has hidden=4 but x has hidden=16. Expected weight of shape (experts, 16); it looks transposed, pass "
        'weight_layout="hidden_experts".',
    ),
    "weight [hidden, experts] is transposed": (
        ValueError, {"weight_layout": "hidden_experts"},
        "weight has hidden=4 but x has hidden=16. Expected weight of shape (16, experts); it looks transposed, pass "
        'weight_layout="experts_hidden".',
    ),
    "weight_layout is unknown": (
        ValueError, {"weight_layout": "rows"},
        "weight_layout is 'rows'. Expected experts_hidden or hidden_experts; pass one of these.",
    ),
    "bias is too short": (
        ValueError, {"bias": jnp.ones(3)},
        "bias has shape (3,) but weight has experts=4. Expected bias of shape (4,); pass one value per expert, or "
        "None.",
    ),
    "spec is a dict": (
        TypeError, {"spec": {"top_k": 4}},
        "spec is {'top_k': 4} (dict). Expected a jax_router.RoutingSpec; make one, for example RoutingSpec(top_k=4, "
        'score_function="softmax_topk").',
    ),
    "spec selects too many": (
        ValueError, {"spec": jr.RoutingSpec(5)},
        "spec has top_k=5 but weight has experts=4. Expected at most 4; fix the spec.",
    ),
    "correction_bias is too long": (
        ValueError, {"correction_bias": jnp.ones(5)},
        "correction_bias has shape (5,) but weight has experts=4. Expected correction_bias of shape (4,); pass one "
        "value per expert, or None.",
    ),
    "correction_bias is a list": (
        TypeError, {"correction_bias": [0.0] * 4},
        "correction_bias is [0.0, 0.0, 0.0, 0.0] (list). Expected a JAX or numpy array; convert it first, for example "
        "with jnp.asarray(correction_bias, dtype=jnp.bfloat16).",
    ),
    "correction_bias is in the other 16 bits": (
        ValueError, {"correction_bias": jnp.ones(4, jnp.float16)},
        "correction_bias is float16 but x is bfloat16. Expected bfloat16 or float32; pass "
        "correction_bias.astype(x.dtype).",
    ),
    "expert_scale has two axes": (
        ValueError, {"expert_scale": jnp.ones((1, 4))},
        "expert_scale has shape (1, 4) but weight has experts=4. Expected expert_scale of shape (4,); pass one value "
        "per expert, or None.",
    ),
    "expert_scale is integer": (
        ValueError, {"expert_scale": jnp.ones(4, jnp.int32)},
        "expert_scale is an array of int32. Expected bfloat16, float16 or float32; cast it, for example with "
        "expert_scale.astype(jnp.float32).",
    ),
    "experts is a list": (
        TypeError, {"experts": [[0, 1]] * 3},
        "experts is [[0, 1], [0, 1], [0, 1]] (list). Expected a JAX or numpy array of integers; convert it first, for "
        "example with jnp.asarray(experts, dtype=jnp.int32).",
    ),
    "experts is masked": (
        TypeError, {"experts": np.ma.masked_equal(np.zeros((3, 2), np.int32), 1)},
        "experts is a numpy.ma.MaskedArray. Expected a JAX or numpy array of integers; convert it first, for example "
        "with jnp.asarray(experts, dtype=jnp.int32).",
    ),
    "experts are floats": (
        ValueError, {"experts": IDS.astype(jnp.float32)},
        "experts is an array of float32. Expected integers; cast it, for example with experts.astype(jnp.int32).",
    ),
    "experts are bools": (
        ValueError, {"experts": IDS.astype(bool)},
        "experts is an array of bool. Expected integers; cast it, for example with experts.astype(jnp.int32).",
    ),
    "experts of other tokens": (
        ValueError, {"experts": IDS[:2]},
        "experts has shape (2, 2) but x and spec ask for (3, 2). Expected the tokens of x in the leading axes and "
        "top_k=2 ids in the last; pass one id for every weight.",
    ),
    "more experts than top_k": (
        ValueError, {"experts": jnp.zeros((3, 3), jnp.int32)},
        "experts has shape (3, 3) but x and spec ask for (3, 2). Expected the tokens of x in the leading axes and "
        "top_k=2 ids in the last; pass one id for every weight.",
    ),
    "an id is out of range": (
        ValueError, {"experts": IDS.at[1, 1].set(4)},
        "experts has the id 4 at (1, 1) but weight has experts=4. Expected ids from 0 to 3; pass ids that were "
        "recorded with this router.",
    ),
    "return_logits is a number": (
        TypeError, {"return_logits": 1}, "return_logits is 1 (int). Expected True or False; pass one of them."
    ),
    "implementation is misspelt": (
        ValueError, {"implementation": "palas"},
        "implementation names 'palas'. Expected cuda, pallas or xla; did you mean \"pallas\"?",
    ),
}  # fmt: skip


def call(arguments: dict) -> jr.Routing:
    return jr.route(**{"x": X, "weight": WEIGHT, "spec": SPEC} | arguments)


@pytest.mark.parametrize(("error", "arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_refused_with_what_it_was_what_is_accepted_and_what_to_do(error, arguments, message) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(arguments)


def test_bad_input_is_refused_while_tracing_and_without_tokens() -> None:
    for name in (
        "weight is transposed",
        "correction_bias is too long",
        "experts of other tokens",
        "experts are floats",
    ):
        _, arguments, message = ERRORS[name]
        with pytest.raises(ValueError, match=re.escape(message)):
            jax.jit(call).trace(arguments)
    for arguments in ({"spec": jr.RoutingSpec(5)}, {"expert_scale": jnp.ones(3)}, {"experts": IDS}):
        with pytest.raises(ValueError, match="Expected"):
            call({"x": X[:0]} | arguments)


EXPLAIN_ERRORS = {
    "spec is a name": (
        TypeError, {"spec": "softmax"},
        "spec is 'softmax' (str). Expected a jax_router.RoutingSpec; make one, for example RoutingSpec(top_k=4, "
        'score_function="softmax_topk").',
    ),
    "spec does not fit": (
        ValueError, {"spec": jr.RoutingSpec(5)},
        "spec has top_k=5 but weight has experts=4. Expected at most 4; fix the spec.",
    ),
    "logits are not float32": (
        ValueError, {"spec": SPEC, "out_dtype": "bfloat16"},
        "out_dtype is bfloat16 but there is a spec. Expected float32, which the logits of route are; leave out_dtype "
        "out, and to round logits before scoring set round_logits=True in the spec.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("error", "arguments", "message"), EXPLAIN_ERRORS.values(), ids=EXPLAIN_ERRORS)
def test_explain_refuses_what_describes_no_routing(error, arguments, message) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        jr.explain(**{"tokens": 8, "hidden": 16, "experts": 4} | arguments)


@pytest.mark.parametrize(
    ("axis_name", "error", "message"),
    [
        (3, TypeError, "axis_name is 3 (int). Expected None, the name of an axis of the mesh or a tuple of names"),
        ((), TypeError, "axis_name is () (tuple). Expected None, the name of an axis"),
        ("data", ValueError, "axis_name names 'data', and the axes that are mapped here are none. Expected axes of an"),
        (("model", "model"), ValueError, "axis_name is ('model', 'model'). Expected every axis once"),
    ],
)
def test_an_axis_name_that_names_no_axis(axis_name, error, message) -> None:
    x, weight = jnp.ones((3, 8)), jnp.ones((4, 8))
    with pytest.raises(error, match=re.escape(message)):
        jr.route(x, weight, spec=jr.RoutingSpec(2), axis_name=axis_name)


@pytest.mark.parametrize(("of_x", "named"), [(P("model"), "x"), (P(), "experts")])
def test_tokens_that_differ_along_the_axis_of_experts(of_x, named) -> None:
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    local = functools.partial(jr.route, spec=jr.RoutingSpec(2), axis_name="model")
    in_specs = (of_x, P("model"), P("model"))
    mapped = jax.shard_map(lambda x, w, ids: local(x, w, experts=ids), mesh=mesh, in_specs=in_specs, out_specs=P())
    with pytest.raises(ValueError, match=f"{named} varies over the axis 'model', which axis_name names. Expected the"):
        mapped(jnp.ones((3, 8)), jnp.ones((4, 8)), jnp.zeros((3, 2), jnp.int32))
