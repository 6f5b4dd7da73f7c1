"""A weight stored [hidden, experts] gives what its transpose gives, and is never transposed. Bits: test_row_bits.py."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

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
    np.testing.assert_allclose(ours.weights, theirs.weights, rtol=1e-5)
    np.testing.assert_allclose(ours.logits, jr.router_gemm(x, weight, bias), rtol=1e-5, atol=1e-5)
    empty = route(x[:0], weight.T, bias)
    assert [each.shape for each in empty] == [(0, 3, 2), (0, 3, 2), (0, 3, 5)]
    assert router_gemm(x[:0], weight.T).shape == (0, 3, 5)


def loss(gemm, *operands) -> jax.Array:
    return jnp.sin(gemm(*operands)).sum()


def loss_of_route(routed, x, weight, bias) -> jax.Array:
    routing = routed(x, weight, bias, expert_scale=bias)
    return jnp.sin(routing.weights).sum() + jnp.cos(routing.logits).sum()


@pytest.mark.parametrize("of", [loss, loss_of_route])
def test_gradients_have_the_layout_of_their_primals(of) -> None:
    x, weight, bias = arrays(6, hidden=8, x=BF16, weight=BF16)
    plain = jr.router_gemm if of is loss else functools.partial(jr.route, spec=SPEC, return_logits=True)
    ours, theirs = (router_gemm, plain) if of is loss else (route, plain)
    gradients = jax.grad(functools.partial(of, ours), (0, 1, 2))(x, weight.T, bias)
    of_x, of_weight, of_bias = jax.grad(functools.partial(of, theirs), (0, 1, 2))(x, weight, bias)
    for gradient, expected in zip(gradients, (of_x, of_weight.T, of_bias), strict=True):
        assert (gradient.shape, gradient.dtype) == (expected.shape, expected.dtype)
        # Computed in float32 and rounded once: two bfloat16 spacings.
        np.testing.assert_allclose(np.float32(gradient), np.float32(expected), rtol=2.0**-7, atol=1e-5)


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
    stored = jnp.swapaxes(operands[1], -1, -2)
    expected = jax.vmap(jr.router_gemm, in_axes)(operands[0], stored, operands[2])
    np.testing.assert_allclose(batched, expected, rtol=1e-5, atol=1e-5)
    routing = jax.vmap(route, in_axes)(*operands)
    np.testing.assert_allclose(routing.logits, expected, rtol=1e-5, atol=1e-5)


def test_jit_scan_and_export_take_the_layout() -> None:
    x, weight, bias = arrays(4, 3)
    expected = jr.router_gemm(x, weight, bias)
    jitted = jax.jit(jr.router_gemm, static_argnames="weight_layout")
    np.testing.assert_allclose(
        jitted(x, weight.T, bias, weight_layout="hidden_experts"), expected, rtol=1e-5, atol=1e-5
    )
    _, scanned = jax.lax.scan(lambda carry, row: (carry, router_gemm(row, weight.T, bias)), None, x)
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-5)
    tokens = jax.export.symbolic_shape("tokens, 24")
    structures = [
        jax.ShapeDtypeStruct(tokens, F32),
        *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (weight.T, bias)),
    ]
    exported = jax.export.export(jax.jit(router_gemm))(*structures)
    np.testing.assert_allclose(exported.call(x[0], weight.T, bias), expected[0], rtol=1e-5, atol=1e-5)


SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax_router as jr

spec = jr.RoutingSpec(2, "sigmoid", renormalize=True)
x, weight, bias = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(4, 8), (6, 8), (6,)]))

def router(layout):
    def call(*operands):
        logits = jr.router_gemm(*operands, weight_layout=layout)
        return jr.route(*operands, spec=spec, weight_layout=layout, return_logits=True), logits
    return call

def loss(router):
    def scalar(*operands):
        routing, logits = router(*operands)
        return jnp.sin(logits).sum() + jnp.cos(routing.weights).sum() + jnp.sin(routing.logits).sum()
    return scalar

expected = router("experts_hidden")(x, weight, bias)
of_x, of_weight, of_bias = jax.grad(loss(router("experts_hidden")), (0, 1, 2))(x, weight, bias)
expected = jax.tree.leaves((expected, (of_x, of_weight.T, of_bias)))
operands = x, weight.T, bias
for axis_type in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    for how, of_weight in (("jit", P()), ("jit", P(None, "model")), ("shard_map", P())):
        specs = (P("data"), of_weight, P(*of_weight[1:]))
        sharded = router("hidden_experts")
        if how == "shard_map":
            sharded = jax.shard_map(sharded, mesh=mesh, in_specs=specs, out_specs=P("data"))
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, NamedSharding(mesh, each)) for a, each in zip(operands, specs)]
            results = jax.jit(sharded)(*placed)
            gradients = jax.jit(jax.grad(loss(sharded), (0, 1, 2)))(*placed)
        for result in results[0][:2]:
            assert result.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2), result.sharding
        rows = NamedSharding(mesh, P("data", *of_weight[1:]))
        for logits in (results[0].logits, results[1]):
            assert logits.sharding.is_equivalent_to(rows, 2), logits.sharding
        for result, truth in zip(jax.tree.leaves((results, gradients)), expected, strict=True):
            np.testing.assert_allclose(result, truth, rtol=1e-5, atol=1e-5)
"""


def test_sharded_results_and_gradients_are_those_of_one_device() -> None:
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    cpus = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | cpus, capture_output=True, text=True, check=False
    )
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
