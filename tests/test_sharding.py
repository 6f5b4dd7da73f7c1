"""Sharded logits and gradients are those of one device: Auto and Explicit meshes, and shard_map. Kernels too."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_router as jr
from jax_router import dispatch, ops
from jax_router.implementations import cuda, pallas

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax_router as jr

axis_type, mapped = AxisType[sys.argv[1]], sys.argv[2] == "shard_map"
operands = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(4, 8), (6, 8), (6,)])]

def loss(router):
    return lambda *operands: jnp.sin(router(*operands)).sum()

expected = jr.router_gemm(*operands), *jax.grad(loss(jr.router_gemm), (0, 1, 2))(*operands)
mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
specs = (P("data"), P(), P())
router = jr.router_gemm
if mapped:
    router = jax.shard_map(router, mesh=mesh, in_specs=specs, out_specs=P("data"))
with jax.set_mesh(mesh):
    operands = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(operands, specs)]
    logits = jax.jit(router)(*operands)
    assert logits.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2), logits.sharding
    results = logits, *jax.jit(jax.grad(loss(router), (0, 1, 2)))(*operands)
for result, truth in zip(results, expected):
    np.testing.assert_allclose(result, truth, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize("how", ["jit", "shard_map"])
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_sharded_logits_and_gradients_are_those_of_one_device(axis_type, how) -> None:
    # How well XLA optimises what it has partitioned is not asked here, and takes a third of the time.
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    cpus = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", SCRIPT, axis_type, how]
    finished = subprocess.run(command, env=os.environ | cpus, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


NAMES = (None, "cuda", "pallas") if jax.__version_info__ >= pallas.FIRST_JAX else (None, "cuda")


def on_a_mesh_of_one(device: jax.Device, axis_types: tuple[AxisType, AxisType], how: str, implementation: str | None):
    """`router_gemm` and its gradients, operands on a mesh of one device, and the mesh."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=axis_types, devices=[device])
    keys, shapes = jax.random.split(jax.random.key(0), 3), ((8, 64), (4, 64), (4,))
    operands = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    specs = (P("data"), P(), P())

    def router(*operands):
        return jr.router_gemm(*operands, implementation=implementation)

    sharded = jax.shard_map(router, mesh=mesh, in_specs=specs, out_specs=P("data")) if how == "shard_map" else router
    gradients = jax.grad(lambda *operands: jnp.sin(sharded(*operands)).sum(), (0, 1, 2))
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(operands, specs, strict=True)]
    return lambda *operands: (sharded(*operands), *gradients(*operands)), router, operands, placed, mesh


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
meshes = pytest.mark.parametrize("axis_types", [(AUTO, AUTO), (EXPLICIT, EXPLICIT), (EXPLICIT, AUTO)], ids=str)
ways = pytest.mark.parametrize("how", ["jit", "shard_map"])
names = pytest.mark.parametrize("implementation", NAMES)


@meshes
@ways
@names
def test_kernels_lower_on_a_mesh(axis_types, how, implementation, monkeypatch) -> None:
    monkeypatch.setattr(ops, "_device", lambda *_: dispatch.Device("gpu", "NVIDIA H200 of a test", "9.0"))
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    function, _, _, placed, mesh = on_a_mesh_of_one(jax.devices("cpu")[0], axis_types, how, implementation)
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" if implementation == "pallas" else cuda.TARGET) in lowered


@pytest.mark.gpu
@meshes
@ways
@names
def test_kernels_give_the_same_bits_on_a_mesh(gpu, axis_types, how, implementation) -> None:
    function, router, operands, placed, mesh = on_a_mesh_of_one(gpu, axis_types, how, implementation)
    expected = router(*operands)
    with jax.set_mesh(mesh):
        logits, *_ = jax.jit(function)(*placed)
    np.testing.assert_array_equal(logits, expected)
