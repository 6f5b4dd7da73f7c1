"""Gradients of LoRA are those of the formula in float64, also where B is zero and the values are the base's."""

from __future__ import annotations

import bounds
import jax
import jax.numpy as jnp
import nnx_cases as cases
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_cases import ADAPTERS, BF16, EXPERTS, F32, HIDDEN, RANK, SPEC, every_implementation, with_adapter, with_float32

import jax_router as jr
from jax_router.nnx import Router, RouterLoRA

pytestmark = pytest.mark.usefixtures("compiled_in_haste")
CHOSEN = np.array([1, -1, 0, 2, -7, 1])
OF_WEIGHTS, OF_LOGITS = cases.numbers(20, 6, 2), cases.numbers(21, 6, EXPERTS)


def loss(layer, x, adapter=None) -> tuple[jax.Array, jr.Routing]:
    routing = layer(x, adapter=adapter, return_logits=True)
    return (routing.weights * OF_WEIGHTS).sum() + (routing.logits * OF_LOGITS).sum(), routing


@nnx.jit
def gradients(layer, x, adapter=None):
    """Of every parameter and of x, and the routing."""
    return nnx.grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1), has_aux=True)(layer, x, adapter)


def of_logits(routing: jr.Routing, scored, spec=SPEC) -> bounds.Real:
    """What float64 makes of the cotangents at the logits, `[T, E]`."""
    scale = cases.parameters(F32)["expert_scale"]
    at = bounds.given(scored), np.asarray(routing.experts), scale, spec
    return bounds.gradients(np.zeros((6, EXPERTS)), np.eye(EXPERTS), *at, OF_WEIGHTS, OF_LOGITS).x


def transposed(real: bounds.Real) -> bounds.Real:
    return bounds.Real(real.value.T, real.error.T)


def assert_of_adapter(gradients, x, cotangent: bounds.Real, lora_a, lora_b) -> None:
    """Those of `2 x @ A @ B`."""
    x = np.asarray(x).astype(np.float64)
    of_b = transposed(bounds.matmul(transposed(cotangent), 2 * x @ lora_a))
    of_a = bounds.matmul(transposed(bounds.matmul(cotangent, 2 * lora_b.T.astype(np.float64))), x)
    bounds.within(gradients[0], transposed(of_a))
    bounds.within(gradients[1], of_b)
    assert np.abs(of_b.value).max() > 1


@every_implementation
@pytest.mark.parametrize("factor", [0, 1], ids=["zero B", "B"])
def test_gradients_are_those_of_the_formula(implementation, factor) -> None:
    x, base = cases.hidden_states(6, dtype=BF16), cases.router(implementation, BF16)
    layer = with_adapter(base)
    layer.lora_b[...] *= factor
    (found, _), routing = gradients(layer, x)
    lora_a, lora_b = cases.matrices()
    cotangent = of_logits(routing, routing.logits)
    assert_of_adapter((found.lora_a[...], found.lora_b[...]), x, cotangent, lora_a, factor * lora_b)
    of_kernel = bounds.matmul(transposed(cotangent), np.asarray(x).astype(np.float64))
    bounds.within(found.base.kernel[...], of_kernel, rounded_to=BF16)
    bounds.within(found.base.bias[...], cotangent.sum(0), rounded_to=BF16)


@every_implementation
def test_gradients_reach_the_adapter_of_each_token(implementation) -> None:
    x = cases.hidden_states(6, dtype=BF16)
    layer = with_adapter(cases.router(implementation, BF16), num_adapters=ADAPTERS)
    layer.lora_b[...] = layer.lora_b[...].at[1].set(0)
    (found, _), routing = gradients(layer, x, jnp.asarray(CHOSEN))
    cotangent = of_logits(routing, routing.logits)
    for i, (lora_a, lora_b) in enumerate(zip(*cases.matrices(ADAPTERS), strict=True)):
        mine = (i == CHOSEN)[:, None]
        part = bounds.Real(cotangent.value * mine, cotangent.error * mine)
        assert_of_adapter((found.lora_a[i], found.lora_b[i]), x, part, lora_a, lora_b * (i != 1))


@with_float32
def test_the_gradient_of_x_flows_through_base_and_update_and_freezing_stops_it_only_at_the_base(implementation) -> None:
    x, base = cases.hidden_states(6), cases.router(implementation)
    lora_a, lora_b = cases.matrices()
    for freeze_base in (False, True):
        (of_layer, of_x), routing = gradients(with_adapter(base, freeze_base=freeze_base), x)
        cotangent = of_logits(routing, routing.logits)
        assert_of_adapter((of_layer.lora_a[...], of_layer.lora_b[...]), x, cotangent, lora_a, lora_b)
        update = bounds.matmul(bounds.matmul(cotangent, 2 * lora_b.T.astype(np.float64)), lora_a.T.astype(np.float64))
        bounds.within(of_x, bounds.matmul(cotangent, cases.parameters()["kernel"].astype(np.float64)) + update)
        of_base = nnx.to_pure_dict(of_layer.base)
        assert set(of_base) == {"kernel", "bias", "expert_scale"}
        assert all(np.any(gradient) != freeze_base for gradient in of_base.values())


@every_implementation
def test_rounding_the_sum_is_the_identity_to_gradients(implementation) -> None:
    x, spec = cases.hidden_states(6, dtype=BF16), jr.RoutingSpec(2, "sigmoid", select_on="logits", round_logits=True)
    layer = with_adapter(cases.router(implementation, BF16, spec=spec))
    layer.lora_b[...] *= 1 + 2.0**-6
    (found, _), routing = gradients(layer, x)
    scored = np.asarray(routing.logits).astype(BF16)
    lora_a, lora_b = cases.matrices()
    matrices = lora_a, np.asarray(lora_b * (1 + 2.0**-6), np.float64)
    assert_of_adapter((found.lora_a[...], found.lora_b[...]), x, of_logits(routing, scored, spec), *matrices)


def test_no_gradient_passes_through_weights_that_the_base_alone_would_have() -> None:
    """They are NaN here: the sigmoid of every logit of the base is zero, and they are divided by their sum."""
    base = Router(HIDDEN, EXPERTS, spec=jr.RoutingSpec(2, "sigmoid", renormalize=True), use_bias=True, rngs=nnx.Rngs(0))
    nnx.update(base, {"kernel": np.zeros((EXPERTS, HIDDEN), np.float32), "bias": np.full(EXPERTS, -256, np.float32)})
    layer = RouterLoRA(base, 1, rngs=nnx.Rngs(0))
    of_expert = np.arange(EXPERTS, dtype=np.float32)[None]
    nnx.update(layer, {"lora_a": np.ones((HIDDEN, 1), np.float32), "lora_b": 16 + of_expert / 16})
    x = jnp.ones((6, HIDDEN))
    assert np.isnan(base(x).weights).all()
    (found, of_x), routing = gradients(layer, x)
    np.testing.assert_array_equal(routing.logits[0], of_expert[0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found, of_x)))


@pytest.mark.parametrize("factor", [0, 1], ids=["zero B", "B"])
def test_second_derivatives_are_those_of_the_formula(factor) -> None:
    """Of weights that fixed experts have: with A and B in the kernel's place a plain router says what they are."""
    spec = jr.RoutingSpec(2, "sigmoid", renormalize=True)
    x, layer = cases.hidden_states(6), with_adapter(cases.router(spec=spec))
    layer.lora_b[...] *= factor
    base, experts = layer.base, layer(x).experts
    given = layer.lora_a[...], layer.lora_b[...], base.kernel[...]

    def adapted(lora_a, lora_b, kernel):
        changed = nnx.clone(layer)
        for variable, value in ((changed.lora_a, lora_a), (changed.lora_b, lora_b), (changed.base.kernel, kernel)):
            variable.set_value(value)
        return changed(x, experts=experts).weights

    def plain(lora_a, lora_b, kernel):
        vectors = {"bias": base.bias[...], "expert_scale": base.expert_scale[...], "experts": experts}
        update = layer.scale * jnp.matmul(lora_a, lora_b, precision="highest").T
        return jr.route(x, kernel + update, spec=spec, **vectors).weights

    def of_norm(function):
        slope = jax.grad(lambda *given: (function(*given) ** 2 * OF_WEIGHTS).sum(), (0, 1, 2))
        return jax.jit(jax.grad(lambda *given: sum((each**2).sum() for each in slope(*given)), (0, 1, 2)))(*given)

    for found, truth in zip(of_norm(adapted), of_norm(plain), strict=True):
        assert np.abs(truth).max() > 0
        np.testing.assert_allclose(found, truth, rtol=0, atol=2.0**-14 * np.abs(truth).max())


@with_float32
def test_an_optimizer_over_lora_params_trains_from_zero_and_leaves_the_base(implementation) -> None:
    x, base = cases.hidden_states(6), cases.router(implementation)
    before, target = nnx.to_pure_dict(nnx.state(base)), np.array([0, 1, 2, 3, 4, 5])
    layer = RouterLoRA(base, RANK, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.sgd(0.5), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(layer, optimizer):
        def loss(layer):
            logits = layer(x, return_logits=True).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

        value, found = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
        optimizer.update(layer, found)
        return value, found

    values = []
    for _ in range(20):
        value, found = step(layer, optimizer)
        values.append(float(value))
    assert set(nnx.to_pure_dict(found)) == {"lora_a", "lora_b"}
    assert values[-1] < values[0] / 2, values
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(base)), before)
