"""Sharded routing and its gradients are those of one device: Auto and Explicit meshes, and shard_map. Kernels too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharding import meshes, ways

import jax_router as jr
from jax_router import dispatch, ops
from jax_router.implementations import cuda

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax_router as jr

how, experts_of_weight = sys.argv[1], P("model") if sys.argv[2] == "experts" else P()
keys = jax.random.split(jax.random.key(0), 6)
operands = [jax.random.normal(key, shape) for key, shape in zip(keys, [(8, 16), (8, 16), (8,), (8,), (8,)])]
operands.append(jax.random.randint(keys[5], (8, 2), 0, 8))
specs = (P("data"), *[experts_of_weight] * 4, P("data"))
grouped = jr.RoutingSpec(2, "sigmoid", renormalize=True, num_groups=4, group_topk=2)

plain = jr.RoutingSpec(2, "softmax_topk")

for spec, replay in ((grouped, False), (plain, False), (plain, True)):  # recorded experts are of no group
    def router(x, weight, bias, correction_bias, expert_scale, experts):
        vectors = {"correction_bias": correction_bias, "expert_scale": expert_scale}
        vectors["experts"] = experts if replay else None
        return jr.route(x, weight, bias, spec=spec, **vectors, return_logits=True)

    def loss(router):
        def scalar(*operands):
            routing = router(*operands)
            balance = jr.load_balancing_loss(jax.nn.softmax(routing.logits), routing.experts)
            return jnp.sin(routing.weights[:, 0]).sum() + jnp.cos(routing.logits).sum() + balance
        return scalar

    expected = router(*operands), jax.grad(loss(router), range(5))(*operands)
    for axis_types in ("Auto", "Auto"), ("Explicit", "Explicit"), ("Explicit", "Auto"):
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=tuple(AxisType[name] for name in axis_types))
        sharded = router
        if how == "shard_map":
            sharded = jax.shard_map(router, mesh=mesh, in_specs=specs, out_specs=P("data"))
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(operands, specs)]
            routing = jax.jit(sharded)(*placed)
            gradients = jax.jit(jax.grad(loss(sharded), range(5)))(*placed)
        for result in routing[:2]:
            assert result.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2), result.sharding
        np.testing.assert_array_equal(routing.experts, expected[0].experts)
        for result, truth in zip(jax.tree.leaves((routing, gradients)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(result, truth, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize(("how", "weight"), [("jit", "whole"), ("jit", "experts"), ("shard_map", "whole")])
def test_sharded_routing_and_gradients_are_those_of_one_device(how, weight) -> None:
    # How well XLA optimises what it has partitioned is not asked here, and takes a third of the time.
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    cpus = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", SCRIPT, how, weight]
    finished = subprocess.run(command, env=os.environ | cpus, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def on_a_mesh_of_one(device: jax.Device, axis_types: tuple[AxisType, AxisType], how: str, implementation: str | None):
    """`route` with its logits and its gradients, operands on a mesh of one device, and the mesh."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=axis_types, devices=[device])
    keys, shapes = jax.random.split(jax.random.key(0), 5), ((8, 64), (4, 64), (4,), (4,), (4,))
    operands = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    specs = (P("data"), P(), P(), P(), P())
    spec = jr.RoutingSpec(2, "sigmoid", renormalize=True)

    def router(x, weight, bias, correction_bias, expert_scale):
        options = {"spec": spec, "implementation": implementation, "return_logits": True}
        return jr.route(x, weight, bias, correction_bias=correction_bias, expert_scale=expert_scale, **options)

    sharded = jax.shard_map(router, mesh=mesh, in_specs=specs, out_specs=P("data")) if how == "shard_map" else router
    gradients = jax.grad(lambda *operands: jnp.sin(sharded(*operands).weights).sum(), range(5))
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(operands, specs, strict=True)]
    return lambda *operands: (sharded(*operands), *gradients(*operands)), router, operands, placed, mesh


@pytest.fixture
def _forgetful() -> Iterator[None]:
    """Whatever takes a kernel's place in a test is not remembered after it."""
    yield
    ops._forward.cache_clear()
    ops._operation.cache_clear()


@pytest.mark.usefixtures("_forgetful")
@meshes
@ways
@pytest.mark.parametrize("implementation", [None, "cuda"])
def test_kernels_lower_on_a_mesh(axis_types, how, implementation, monkeypatch) -> None:
    called = []

    def kernel(*operands, spec, return_logits, weight_layout, config=None):
        """Has the results of a custom call, which know of no mesh, and asks for the logits' GEMM."""
        called.append(operands[0].shape)
        x, weight, bias, *others = operands
        logits = cuda.router_gemm(x, weight, bias, out_dtype=jnp.float32, weight_layout=weight_layout)
        weights, experts = jr.routing.route_logits(logits, *others, spec=spec, dtype=x.dtype.name)
        return jr.Routing(weights, experts, logits if return_logits else None)

    monkeypatch.setattr(cuda, "route", kernel, raising=False)
    monkeypatch.setattr(cuda, "why_unsupported", lambda problem, device: None)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(dispatch, "load_table", lambda kind: None)
    monkeypatch.setattr(ops, "_device", lambda *_: dispatch.Device("gpu", "NVIDIA H200 of a test", "9.0"))
    function, _, _, placed, mesh = on_a_mesh_of_one(jax.devices("cpu")[0], axis_types, how, implementation)
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",)).as_text()
    assert cuda.TARGET in lowered
    assert (8, 64) in called


@pytest.mark.gpu
@meshes
@ways
@pytest.mark.parametrize("implementation", [None, "cuda"])
def test_kernels_give_the_same_bits_on_a_mesh(gpu, axis_types, how, implementation) -> None:
    function, router, operands, placed, mesh = on_a_mesh_of_one(gpu, axis_types, how, implementation)
    expected = router(*operands)
    with jax.set_mesh(mesh):
        routing, *_ = jax.jit(function)(*placed)
    for result, truth in zip(routing, expected, strict=True):
        np.testing.assert_array_equal(result, truth)
