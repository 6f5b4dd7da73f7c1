"""What is sharded is what one device computes, with no collective too many: jit and shard_map, one process and two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_router as jr
from jax_router import dispatch, ops
from jax_router.implementations import cuda, pallas

TESTS = Path(__file__).parent


def cpus(devices: int) -> dict[str, str]:
    """The environment of a process with this many virtual CPU devices."""
    # How well XLA optimises what it has partitioned is not asked here, and takes a third of the time.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


@pytest.mark.parametrize("how", sharded.CHECKS)
def test_sharded_results_and_gradients_are_those_of_one_device_without_a_needless_collective(how) -> None:
    command = [sys.executable, sharded.__file__, how]
    finished = subprocess.run(command, env=cpus(8), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_two_processes_route_as_one_device() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, TESTS / "sharded_processes.py", address]
    options = {"env": cpus(4), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(index)], **options) for index in range(2)]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
        assert "as one device" in text


NAMES = (None, "cuda", "pallas") if jax.__version_info__ >= pallas.FIRST_JAX else (None, "cuda")
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SPEC = jr.RoutingSpec(2, "sigmoid", renormalize=True)
meshes = pytest.mark.parametrize("axis_types", [(AUTO, AUTO), (EXPLICIT, EXPLICIT), (EXPLICIT, AUTO)], ids=str)
ways = pytest.mark.parametrize("how", ["jit", "shard_map"])
names = pytest.mark.parametrize("implementation", NAMES)
operations = pytest.mark.parametrize("spec", [None, SPEC], ids=["logits", "route"])


def on_a_mesh(devices: list[jax.Device], axis_types: tuple[AxisType, AxisType], how: str, implementation, spec):
    """The operation and its gradients with tokens over all devices, the operation, operands, these placed, the mesh."""
    mesh = jax.make_mesh((len(devices), 1), ("data", "model"), axis_types=axis_types, devices=devices)
    keys, shapes = jax.random.split(jax.random.key(0), 5), ((8, 64), (4, 64), (4,), (4,), (4,))
    operands = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    specs = (P("data"), *[P()] * 4)

    def router(x, weight, bias, correction_bias, expert_scale):
        if spec is None:
            return jr.router_gemm(x, weight, bias, implementation=implementation)
        options = {"correction_bias": correction_bias, "implementation": implementation, "return_logits": True}
        return jr.route(x, weight, bias, spec=spec, expert_scale=expert_scale, **options)

    sharded = jax.shard_map(router, mesh=mesh, in_specs=specs, out_specs=P("data")) if how == "shard_map" else router
    loss = lambda *operands: jnp.sin(jax.tree.leaves(sharded(*operands))[0]).sum()  # noqa: E731
    gradients = jax.grad(loss, range(3 if spec is None else 5))
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(operands, specs, strict=True)]
    return lambda *operands: (sharded(*operands), *gradients(*operands)), router, operands, placed, mesh


@pytest.fixture
def _like_an_h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The dispatcher sees a GPU without a table; what takes a kernel's place is not remembered afterwards."""
    monkeypatch.setattr(ops, "_device", lambda *_: dispatch.Device("gpu", "NVIDIA H200 of a test", "9.0"))
    monkeypatch.setattr(dispatch, "load_table", lambda kind: None)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    yield
    ops._forward.cache_clear()
    ops._operation.cache_clear()


@pytest.mark.usefixtures("_like_an_h200")
@meshes
@ways
@names
@operations
def test_kernels_lower_on_a_mesh(axis_types, how, implementation, spec) -> None:
    function, _, _, placed, mesh = on_a_mesh(jax.devices("cpu")[:1], axis_types, how, implementation, spec)
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",)).as_text()
    target = cuda.TARGET if spec is None else cuda.ROUTE_TARGET
    assert ("mosaic_gpu" if implementation == "pallas" else target) in lowered


KERNEL_ON_EIGHT = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import jax_router as jr
from jax_router import dispatch, ops
from jax_router.implementations import cuda, xla
from sharded import SPECS, compiled

called = []

def stub(specification):
    def kernel(x, weight, *others, config=None, **options):
        called.append((specification.__name__, x.shape, weight.shape))
        return specification(x, weight, *others, **options)
    return kernel

cuda.router_gemm, cuda.route = stub(xla.router_gemm), stub(xla.route)
cuda.why_unsupported = lambda problem, device: None
cuda.unavailable = lambda: None
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
x, weight = jnp.ones((4, 8, 32)), jnp.ones((16, 32))

def of_each_device(tokens, experts, function):
    called.clear()
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((x, tokens), (weight, experts))]
    _, collectives = compiled(function, *placed)
    return called[-1], collectives  # first it is traced for all operands

gemm = lambda x, weight: jr.router_gemm(x, weight, implementation="cuda")
route = lambda x, weight: jr.route(x, weight, spec=SPECS["groups"], implementation="cuda")
assert of_each_device(P("data"), P(), gemm) == (("router_gemm", (16, 32), (16, 32)), [])
assert of_each_device(P("data", "model"), P(), route) == (("route", (4, 32), (16, 32)), [])
assert of_each_device(P("data"), P(), route) == (("route", (16, 32), (16, 32)), [])
assert of_each_device(P("data"), P("model"), gemm) == (("router_gemm", (16, 32), (4, 32)), [])
assert of_each_device(P("data"), P("model"), route) == (("router_gemm", (16, 32), (4, 32)), ["all-gather"])
assert of_each_device(P("data"), P(None, "model"), gemm)[0] == ("router_gemm", (16, 32), (16, 32))
"""


def test_each_device_calls_the_kernel_with_its_own_tokens_and_experts() -> None:
    environment = cpus(8) | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", KERNEL_ON_EIGHT]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.gpu
@meshes
@ways
@names
@operations
def test_kernels_give_the_same_bits_on_a_mesh_of_all_gpus(axis_types, how, implementation, spec) -> None:
    gpus = jax.devices("gpu")[: 1 << (len(jax.devices("gpu")).bit_length() - 1)]
    function, router, operands, placed, mesh = on_a_mesh(gpus, axis_types, how, implementation, spec)
    expected = router(*operands)
    with jax.set_mesh(mesh):
        results, *_ = jax.jit(function)(*placed)
    for result, truth in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(result, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["jit", "shard_map"])
@pytest.mark.parametrize("implementation", ["cuda", "pallas"])
def test_kernels_on_gpus_that_have_some_experts_each_select_as_one_does(how, implementation) -> None:
    gpus = jax.devices("gpu")[: 1 << (len(jax.devices("gpu")).bit_length() - 1)]
    mesh = jax.make_mesh((len(gpus),), ("model",), axis_types=(AUTO,), devices=gpus)
    model = jr.models["gpt-oss-120b"]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 5, model.hidden), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (model.experts // 2, model.hidden), jnp.bfloat16)
    weight = jnp.concatenate([weight, weight])  # each expert ties with one of another device
    bias = jnp.concatenate([jax.random.normal(keys[2], (model.experts // 2,), jnp.bfloat16)] * 2)

    def router(axis_name):
        options = {"implementation": implementation, "return_logits": True, "axis_name": axis_name}
        return lambda *operands: jr.route(*operands, spec=model.spec, **options)

    expected, mapped, placement = router(None)(x, weight, bias), router(None), (P(), P("model"), P("model"))
    if how == "shard_map":
        mapped = jax.shard_map(router("model"), mesh=mesh, in_specs=placement, out_specs=P())
    placed = [jax.device_put(a, NamedSharding(mesh, p)) for a, p in zip((x, weight, bias), placement, strict=True)]
    routing = jax.jit(mapped)(*placed)
    np.testing.assert_array_equal(routing.logits, expected.logits)
    np.testing.assert_array_equal(routing.experts, expected.experts)
    np.testing.assert_allclose(routing.weights, expected.weights, rtol=2**-20)  # XLA's exponential function
