"""Run by tests/test_sharding.py in a process with 8 virtual CPU devices: what is sharded is what one device computes.

Argument: a key of CHECKS. What one device computes is the same for all of them, and is compiled once.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_router as jr
from jax_router.nnx import Router, RouterLoRA

COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)
BATCH, SEQUENCE, HIDDEN, EXPERTS = 8, 4, 32, 16
SPECS = {
    "softmax": jr.RoutingSpec(4, "softmax", renormalize=True),
    "groups": jr.RoutingSpec(4, "sigmoid", renormalize=True, num_groups=4, group_topk=2),
}
LAYOUTS = {  # of tokens and of experts
    "tokens": (P(("data", "sequence", "model")), P()),
    "experts": (P(), P("model")),
    "both": (P("data", "sequence"), P("model")),
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
CHECKS = {  # the types of the mesh's axes, and of LAYOUTS those that are checked with them
    "jit": [
        ((AUTO, AUTO, AUTO), ("tokens", "experts", "both")),
        ((EXPLICIT, EXPLICIT, EXPLICIT), ("both",)),
        ((EXPLICIT, EXPLICIT, AUTO), ("tokens",)),
    ],
    "shard_map": [((AUTO, AUTO, AUTO), ("experts",)), ((EXPLICIT, EXPLICIT, EXPLICIT), ("both",))],
}


def compiled(function: Callable[..., Any], *operands: jax.Array) -> tuple[Any, list[str]]:
    """The results, and the names of the collectives that it took."""
    executable = jax.jit(function).lower(*operands).compile()
    return executable(*operands), COLLECTIVE.findall(executable.as_text())


def arrays() -> tuple[jax.Array, ...]:
    """x, weight, bias, correction_bias, expert_scale, ids to replay.

    The second half of the experts has the weights of the first: each ties with one of another device.
    """
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = ((EXPERTS // 2, HIDDEN), *[(EXPERTS // 2,)] * 3)
    halves = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False)]
    x = jax.random.normal(keys[4], (BATCH, SEQUENCE, HIDDEN))
    ids = jax.random.randint(keys[5], (BATCH, SEQUENCE, 4), 0, EXPERTS)
    return (x, *(jnp.concatenate([half, half]) for half in halves), ids)


def operation(name: str, axis_name: str | None = None) -> Callable[..., Any]:
    """`router_gemm`; `route` by one of SPECS or replayed, with logits; of a stack of weights; with LoRA."""
    if name == "lora":  # here: jax.distributed must come before the first array
        vectors = dict.fromkeys(("use_bias", "use_correction_bias", "use_expert_scale"), True)
        base = Router(HIDDEN, EXPERTS, spec=SPECS["softmax"], **vectors, rngs=nnx.Rngs(0))
        adapted = RouterLoRA(base, 2, b_initializer=nnx.initializers.ones, rngs=nnx.Rngs(1))

    def function(x, weight, bias, correction_bias, expert_scale, ids):
        if name == "logits":
            return jr.router_gemm(x, weight, bias)
        if name == "lora":
            router = nnx.clone(adapted)
            base = router.base
            variables = base.kernel, base.bias, base.correction_bias, base.expert_scale
            for variable, value in zip(variables, (weight, bias, correction_bias, expert_scale), strict=True):
                variable.set_value(value)
            return router(x, return_logits=True)
        vectors = {"correction_bias": correction_bias, "expert_scale": expert_scale}
        if name == "stack":
            options = {"spec": SPECS["softmax"], "axis_name": axis_name, "return_logits": True}
            of_each = jax.vmap(lambda weight: jr.route(x, weight, bias, **vectors, **options))
            return jax.tree.map(lambda results: results[1], of_each(jnp.stack([2 * weight, weight])))
        spec, vectors["experts"] = (SPECS["softmax"], ids) if name == "replay" else (SPECS[name], None)
        return jr.route(x, weight, bias, spec=spec, **vectors, return_logits=True, axis_name=axis_name)

    return function


@functools.cache
def of_one_device(name: str) -> tuple[Callable[..., Any], Any, tuple[jax.Array, ...]]:
    """The operation, jitted; what it computes of `arrays`; and the gradients of its loss."""
    function = jax.jit(operation(name))
    return function, function(*arrays()), jax.jit(jax.grad(loss(function), range(5)))(*arrays())


def loss(function: Callable[..., Any]) -> Callable[..., jax.Array]:
    """A number that depends on every logit, or weight."""

    def scalar(*operands):
        results = function(*operands)
        terms = [results.weights, results.logits] if isinstance(results, jr.Routing) else [results]
        return sum((jnp.sin(each) * jnp.arange(1.0, 1 + each.shape[-1])).sum() for each in terms)

    return scalar


def gathers_of(name: str, how: str) -> int:
    """How many all-gathers split experts take: of logits; where these are not the router's own, of both vectors too."""
    return {"logits": 0, "stack": 3 if how == "jit" else 1, "lora": 3}.get(name, 1)


def same_but_for_rounding(result: Any, truth: Any, case: str) -> None:
    """What is added up in another order: 64 units in the last place of the largest, where a sum has 32 addends.

    A device whose part is missing, or is added twice, makes tenths of it.
    """
    largest = float(np.abs(np.asarray(truth)).max())
    np.testing.assert_allclose(result, truth, rtol=0, atol=64 * 2.0**-24 * largest, err_msg=case)


def of_shards(
    function: Callable[..., Any], operands: tuple[jax.Array, ...], tokens: Any, mesh: Any
) -> list[np.ndarray]:
    """What one device computes of the tokens that each has, put together."""
    x, *matrices, ids = operands
    whole: list[np.ndarray] = []
    for index in NamedSharding(mesh, tokens).devices_indices_map(x.shape).values():
        pieces = jax.tree.leaves(function(x[index], *matrices, ids[index]))
        whole = whole or [np.zeros((*x.shape[:-1], piece.shape[-1]), piece.dtype) for piece in pieces]
        for result, piece in zip(whole, pieces, strict=True):
            result[index] = piece
    return whole


def check(how: str, axis_types: tuple[AxisType, ...], layout: str) -> None:
    """Raises AssertionError, with the case in its message."""
    tokens, experts = LAYOUTS[layout]
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "model"), axis_types=axis_types)
    operands, placement = arrays(), (tokens, *[experts] * 4, tokens)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(operands, placement, strict=True)]
    split = experts != P()
    gathers = ["all-gather"] if split else []
    for name in ("logits", *SPECS, "replay", "stack", "lora"):
        if name == "lora" and how == "shard_map" and split:
            continue  # the layer has all experts
        function, expected, truths = of_one_device(name)
        mapped = operation(name)
        if how == "shard_map":
            local = operation(name, "model" if split and name != "logits" else None)
            out = P(*tokens, *[None] * (2 - len(tokens)), "model") if split and name == "logits" else tokens
            mapped = jax.shard_map(local, mesh=mesh, in_specs=placement, out_specs=out)
        case = f"{name}, {layout}, {axis_types}"
        with jax.set_mesh(mesh):
            results, forward = compiled(mapped, *placed)
        # The experts exactly, ties and all.
        for result, truth in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
            same_but_for_rounding(result, truth, case)
        if name != "logits":
            np.testing.assert_array_equal(results.experts, expected.experts, err_msg=case)
            assert results.weights.sharding.is_equivalent_to(NamedSharding(mesh, tokens), 3), results.weights.sharding
        if not split:
            alone = of_shards(function, operands, tokens, mesh)
            for result, truth in zip(jax.tree.leaves(results), alone, strict=True):
                np.testing.assert_array_equal(result, truth, err_msg=f"{case}: other bits than those of one device")
        expected_gathers = gathers * gathers_of(name, how)
        assert forward == expected_gathers, f"{case}: {forward}"
        if name == "groups":
            continue  # differentiated as the others are
        with jax.set_mesh(mesh):
            gradients, backward = compiled(jax.grad(loss(mapped), range(5)), *placed)
        for result, truth in zip(gradients, truths, strict=True):
            same_but_for_rounding(result, truth, case)
        # Sums over tokens, for the weights; over experts, for x and for the scale of those that are selected.
        sums = [each for each in backward if each == "all-reduce"]
        if name in ("stack", "lora"):
            continue
        assert sorted(backward) == sorted(sums + expected_gathers), f"{case}: {backward}"
        assert layout != "experts" or len(sums) <= 2, f"{case}: {backward}"


def check_tokens_that_do_not_fill_the_mesh() -> None:
    """XLA's own partitioning of `scale[experts]` adds the gradient of the padding."""
    x, weight, _, _, scale, _ = arrays()
    x = x.reshape(-1, HIDDEN)[:7]
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AUTO, AUTO))

    def of_scale(scale, place):
        return jnp.sin(jr.route(place(x), weight, spec=SPECS["softmax"], expert_scale=scale).weights).sum()

    split = functools.partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, P("data")))
    found, truth = (jax.jit(jax.grad(functools.partial(of_scale, place=p)))(scale) for p in (split, lambda x: x))
    same_but_for_rounding(found, truth, "7 tokens on 2 devices")


def check_x_that_is_on_no_mesh() -> None:
    """Beside experts that are split over Explicit axes."""
    x, weight, *_ = arrays()
    mesh = jax.make_mesh((8,), ("model",), axis_types=(EXPLICIT,))
    split = jax.device_put(weight, NamedSharding(mesh, P("model")))
    gradient = jax.jit(jax.grad(lambda x, weight: jnp.sin(route(x, weight).weights).sum(), (0, 1)))
    route = jax.jit(lambda x, weight: jr.route(x, weight, spec=SPECS["softmax"]))
    np.testing.assert_array_equal(route(np.asarray(x), split).experts, route(x, weight).experts)
    for found, truth in zip(gradient(np.asarray(x), split), gradient(x, weight), strict=True):
        same_but_for_rounding(found, truth, "x on no mesh")


def check_adapters_of_split_experts() -> None:
    """On Explicit axes, tokens over both of them and B over one."""
    base = Router(HIDDEN, EXPERTS, spec=SPECS["softmax"], rngs=nnx.Rngs(0))
    layer = RouterLoRA(base, 2, num_adapters=3, b_initializer=nnx.initializers.ones, rngs=nnx.Rngs(1))
    x, ids = arrays()[0].reshape(-1, HIDDEN), np.arange(BATCH * SEQUENCE) % 4 - 1
    expected = layer(x, adapter=ids, return_logits=True)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(EXPLICIT, EXPLICIT))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P(("data", "model"))))
        layer.lora_b.set_value(jax.device_put(layer.lora_b[...], NamedSharding(mesh, P(None, None, "model"))))
        found = jax.jit(lambda x: layer(x, adapter=ids, return_logits=True))(placed)
    same_but_for_rounding(found.logits, expected.logits, "several adapters")


def check_gradients_of_untyped_shards() -> None:
    """check_vma=False: no type says what is the same on every device, and the gradient outside is the whole."""
    x, weight, bias, _, scale, _ = arrays()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AUTO, AUTO))

    def routed(x, weight, bias, scale, axis_name=None):
        return jr.route(x, weight, bias, spec=SPECS["softmax"], expert_scale=scale, axis_name=axis_name).weights

    operands, specs = (x, weight, bias, scale), (P("data"), *[P("model")] * 3)
    body = functools.partial(routed, axis_name="model")
    untyped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
    found, truth = (
        jax.jit(jax.grad(lambda *operands, f=f: jnp.sin(f(*operands)).sum(), range(4)))(*operands)
        for f in (untyped, routed)
    )
    for each, true in zip(found, truth, strict=True):
        same_but_for_rounding(each, true, "check_vma=False")


def check_gradients_of_no_tokens_in_shards() -> None:
    x, weight, *_ = arrays()
    mesh, in_specs = jax.make_mesh((8,), ("model",), axis_types=(AUTO,)), (P(), P("model"))
    for body, out in (
        (lambda x, weight: jr.route(x, weight, spec=SPECS["softmax"], axis_name="model").weights, P()),
        (jr.router_gemm, P(None, None, "model")),
    ):
        of_shards = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out)
        of_x, of_weight = jax.jit(jax.grad(lambda *o, f=of_shards: f(*o).sum(), (0, 1)))(x[:0], weight)
        assert of_x.shape == x[:0].shape
        assert not of_weight.any()


OTHERS = {
    "jit": (check_tokens_that_do_not_fill_the_mesh, check_x_that_is_on_no_mesh, check_adapters_of_split_experts),
    "shard_map": (check_gradients_of_untyped_shards, check_gradients_of_no_tokens_in_shards),
}

if __name__ == "__main__":
    (how,) = sys.argv[1:]
    for axis_types, layouts in CHECKS[how]:
        for layout in layouts:
            check(how, axis_types, layout)
    for other in OTHERS[how]:
        other()
