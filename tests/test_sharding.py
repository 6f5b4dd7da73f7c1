"""Sharded logits and gradients are those of one device: Auto and Explicit meshes, and shard_map."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
    cpus = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", SCRIPT, axis_type, how]
    finished = subprocess.run(command, env=os.environ | cpus, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
