"""A weight stored [hidden, experts] gives what its transpose gives, and is never transposed. Bits: test_row_bits.py."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_ops import arrays, primitives

import jax_router as jr
from jax_router import dispatch, ops
from jax_router.implementations import cuda

pytestmark = pytest.mark.usefixtures("compiled_in_haste")
BF16, F32 = jnp.bfloat16, jnp.float32
SPEC = jr.RoutingSpec(2, "sigmoid", renormalize=True)
router_gemm = functools.partial(jr.router_gemm, weight_layout="hidden_experts")
route = functools.partial(jr.route, spec=SPEC, weight_layout="hidden_experts", return_logits=True)


def within_bounds(routing: jr.Routing, x, weight, bias, scale=None) -> None:
    """Logits and weights of a routing, each beside float64's for its experts."""
    logits = bounds.gemm(np.reshape(x, (-1, x.shape[-1])), weight, bias)
    experts = np.reshape(routing.experts, (-1, SPEC.top_k))
    bounds.within(np.reshape(routing.logits, logits.value.shape), logits)
    bounds.within(np.reshape(routing.weights, experts.shape), bounds.weights(logits, experts, scale, SPEC))


@pytest.mark.parametrize(("x", "weight", "bias"), [(F32, F32, F32), (BF16, BF16, None), (BF16, F32, BF16)])
def test_both_layouts_have_the_same_logits(x, weight, bias) -> None:
    operands = arrays(2, 3, hidden=72, x=x, weight=weight, bias=bias)
    rows, matrix, offset = operands
    truth = bounds.gemm(rows.reshape(6, 72), matrix, offset)
    for logits in (router_gemm(rows, matrix.T, offset), jr.router_gemm(*operands)):
        assert (logits.shape, logits.dtype) == ((2, 3, 5), F32)
        bounds.within(logits.reshape(6, 5), truth)


def test_both_layouts_have_the_same_routing() -> None:
    x, weight, bias = arrays(2, 3)
    vectors = {"correction_bias": bias, "expert_scale": bias}
    ours, theirs = route(x, weight.T, bias, **vectors), jr.route(x, weight, bias, spec=SPEC, **vectors)
    np.testing.assert_array_equal(ours.experts, theirs.experts)
    within_bounds(ours, x, weight, bias, bias)
    empty = route(x[:0], weight.T, bias)
    assert [each.shape for each in empty] == [(0, 3, 2), (0, 3, 2), (0, 3, 5)]
    assert router_gemm(x[:0], weight.T).shape == (0, 3, 5)


# What losses are sums of: cotangents that are exact, so that gradients have no errors but their own.
OF_LOGITS, OF_WEIGHTS = (np.random.default_rng(0).integers(-4, 5, (6, count)).astype(np.float32) for count in (5, 2))


def loss(gemm, *operands) -> jax.Array:
    return (gemm(*operands) * OF_LOGITS).sum()


def loss_of_route(routed, x, weight, bias) -> jax.Array:
    routing = routed(x, weight, bias, expert_scale=bias)
    return (routing.weights * OF_WEIGHTS).sum() + (routing.logits * OF_LOGITS).sum()


@pytest.mark.parametrize("of", [loss, loss_of_route])
def test_gradients_have_the_layout_of_their_primals(of) -> None:
    operands = x, weight, bias = arrays(6, hidden=8, x=BF16, weight=BF16)
    if of is loss:
        expected = gradients_of_logits(x, weight, OF_LOGITS)
        gradients = jax.grad(functools.partial(of, router_gemm), (0, 1, 2))(x, weight.T, bias)
    else:
        experts = np.asarray(jr.route(*operands, spec=SPEC).experts)
        logits = bounds.gemm(*operands)
        truth = bounds.gradients(x, weight, logits, experts, bias, SPEC, OF_WEIGHTS, OF_LOGITS)
        expected = truth.x, truth.weight, truth.bias + truth.scale
        gradients = jax.grad(functools.partial(of, route), (0, 1, 2))(x, weight.T, bias)
    for gradient, truth, operand in zip(gradients, expected, (x, weight.T, bias), strict=True):
        assert (gradient.shape, gradient.dtype) == (operand.shape, operand.dtype)
        stored = gradient.T if operand.shape == weight.T.shape else gradient
        bounds.within(stored, truth, rounded_to=operand.dtype)


def gradients_of_logits(x, weight, of_logits) -> tuple[bounds.Real, bounds.Real, bounds.Real]:
    """Of x, weight and bias, of a router GEMM whose logits have this exact cotangent."""
    of_each, transposed = bounds.given(of_logits), bounds.given(of_logits.T)
    return bounds.matmul(of_each, np.float64(weight)), bounds.matmul(transposed, np.float64(x)), of_each.sum(0)


@pytest.mark.parametrize(("of", "operation"), [(loss, router_gemm), (loss_of_route, route)])
def test_xla_transposes_no_weight_and_no_gradient(of, operation) -> None:
    x, weight, bias = arrays(6, hidden=8, x=BF16, weight=BF16)
    traced = primitives(lambda *operands: operation(*operands), x, weight.T, bias)
    assert "transpose" not in {name for name, _ in traced}
    differentiated = jax.jit(jax.grad(functools.partial(of, operation), (0, 1, 2)))
    compiled = differentiated.lower(x, weight.T, bias).compile().as_text()
    assert " dot(" in compiled
    assert " transpose(" not in compiled  # JAX's, behind the product, is folded into it


@pytest.mark.parametrize("in_axes", [(0, None, None), (None, 0, None), (0, 0, 0)], ids=str)
def test_vmap_of_the_other_layout(in_axes) -> None:
    x, weight, bias = arrays(3)
    operands = [
        operand if axis is None else jnp.stack([operand, -2 * operand])
        for operand, axis in zip((x, weight.T, bias), in_axes, strict=True)
    ]
    batched = jax.vmap(router_gemm, in_axes)(*operands)
    routing = jax.vmap(route, in_axes)(*operands)
    for i in range(2):
        x, stored, bias = (each if axis is None else each[i] for each, axis in zip(operands, in_axes, strict=True))
        bounds.within(batched[i], bounds.gemm(x, stored.T, bias))
        within_bounds(jax.tree.map(lambda each: each[i], routing), x, stored.T, bias)  # noqa: B023


def test_jit_scan_and_export_take_the_layout() -> None:
    x, weight, bias = arrays(4, 3)
    truth = bounds.gemm(x.reshape(12, 24), weight, bias)
    jitted = jax.jit(jr.router_gemm, static_argnames="weight_layout")
    bounds.within(jitted(x, weight.T, bias, weight_layout="hidden_experts").reshape(12, 5), truth)
    _, scanned = jax.lax.scan(lambda carry, row: (carry, router_gemm(row, weight.T, bias)), None, x)
    bounds.within(scanned.reshape(12, 5), truth)
    tokens = jax.export.symbolic_shape("tokens, 24")
    structures = [
        jax.ShapeDtypeStruct(tokens, F32),
        *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (weight.T, bias)),
    ]
    exported = jax.export.export(jax.jit(router_gemm))(*structures)
    bounds.within(exported.call(x[0], weight.T, bias), bounds.gemm(x[0], weight, bias))


def check_sharded() -> None:
    """Run by the test below in a process that has four devices."""
    x, weight, bias = arrays(6, hidden=8, experts=6)
    x, of_logits = x[:4], np.arange(24, dtype=np.float32).reshape(4, 6) % 5 - 2
    of_weights = OF_WEIGHTS[:4]

    def router(*operands):
        return route(*operands), router_gemm(*operands)

    def loss(router, *operands):
        routing, logits = router(*operands)
        return (routing.weights * of_weights).sum() + ((routing.logits + 2 * logits) * of_logits).sum()

    truth = bounds.gemm(x, weight, bias)
    experts = np.asarray(route(x, weight.T, bias).experts)
    routed = bounds.gradients(x, weight, truth, experts, None, SPEC, of_weights, of_logits)
    of_gemm = gradients_of_logits(x, weight, 2 * of_logits)
    gradients = [a + b for a, b in zip((routed.x, routed.weight, routed.bias), of_gemm, strict=True)]
    operands = x, weight.T, bias
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2)
        for how, of_weight in (("jit", P()), ("jit", P(None, "model")), ("shard_map", P())):
            specs = (P("data"), of_weight, P(*of_weight[1:]))
            sharded = router
            if how == "shard_map":
                sharded = jax.shard_map(router, mesh=mesh, in_specs=specs, out_specs=P("data"))
            with jax.set_mesh(mesh):
                placed = [jax.device_put(a, NamedSharding(mesh, each)) for a, each in zip(operands, specs, strict=True)]
                routing, logits = jax.jit(sharded)(*placed)
                found = jax.jit(jax.grad(functools.partial(loss, sharded), (0, 1, 2)))(*placed)
            for result in routing[:2]:
                assert result.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2), result.sharding
            # A routing has gathered its logits; those of the router GEMM stay where the experts are.
            for each, columns in ((routing.logits, ()), (logits, of_weight[1:])):
                rows = NamedSharding(mesh, P("data", *columns))
                assert each.sharding.is_equivalent_to(rows, 2), each.sharding
            np.testing.assert_array_equal(routing.experts, experts)
            within_bounds(routing, x, weight, bias)
            bounds.within(logits, truth)
            for gradient, expected in zip((found[0], found[1].T, found[2]), gradients, strict=True):
                bounds.within(gradient, expected)


def test_sharded_results_and_gradients_are_those_of_one_device() -> None:
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    cpus = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    command = [sys.executable, "-c", "import test_weight_layout; test_weight_layout.check_sharded()"]
    finished = subprocess.run(command, env=os.environ | cpus, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("operation", [router_gemm, route])
def test_cuda_lowers_with_the_layout_as_an_attribute_and_no_transpose(axis_type, operation, monkeypatch) -> None:
    monkeypatch.setattr(ops, "_device", lambda *_: dispatch.Device("gpu", "NVIDIA H200 of a test", "9.0"))
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(axis_type,), devices=jax.devices("cpu")[:1])
    x, weight, bias = arrays(8, hidden=64, experts=16, x=BF16, weight=BF16)
    placed = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip((x, weight.T, bias), (P("data"), P(), P()), strict=True)
    ]
    with jax.set_mesh(mesh):
        call = jax.jit(functools.partial(operation, implementation="cuda"))
        text = call.trace(*placed).lower(lowering_platforms=("cuda",)).as_text()
    custom_call = next(line for line in text.splitlines() if "custom_call @jax_router" in line)
    assert "weight_layout = 1 : i32" in custom_call
    assert "tensor<64x16xbf16>" in custom_call
    assert "transpose" not in text
