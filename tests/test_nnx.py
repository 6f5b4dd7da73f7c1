"""`Router` and `GateLinear` are `route` and `router_gemm` with their parameters, under every transformation of NNX."""

from __future__ import annotations

import functools

import bounds
import jax
import jax.numpy as jnp
import nnx_cases as cases
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_cases import BF16, EXPERTS, F32, HIDDEN, SPEC, WITH_ALL, every_implementation, router, with_float32

import jax_router as jr
from jax_router.nnx import CorrectionBias, GateLinear, Router

pytestmark = pytest.mark.usefixtures("compiled_in_haste")
LAYERS = 3


@every_implementation
@pytest.mark.parametrize("leading", [(), (2, 3)], ids=str)
def test_a_router_is_route_with_its_parameters(implementation, leading) -> None:
    x, held = cases.hidden_states(*leading, dtype=BF16), cases.parameters(BF16)
    routing = router(implementation, BF16)(x, return_logits=True)
    assert routing.experts.shape == routing.weights.shape == (*leading, 2)
    cases.assert_routing(routing, cases.logits_in_float64(x, held["kernel"], held["bias"]), SPEC, **held)
    options = {"correction_bias": held["correction_bias"], "expert_scale": held["expert_scale"]}
    options |= {"implementation": implementation, "return_logits": True}
    cases.assert_same(routing, jr.route(x, held["kernel"], held["bias"], spec=SPEC, **options))
    assert router(implementation, BF16)(x).logits is None


@every_implementation
def test_a_gate_is_router_gemm_with_its_parameters(implementation) -> None:
    x, held = cases.hidden_states(6, dtype=BF16), cases.parameters(BF16)
    truth = cases.logits_in_float64(x, held["kernel"], held["bias"])
    for out_dtype in (F32, BF16):
        logits = cases.gate(implementation, BF16, out_dtype=out_dtype)(x)
        assert logits.dtype == out_dtype
        np.testing.assert_array_equal(logits, truth.astype(out_dtype))


@with_float32
def test_a_kernel_in_either_layout_is_read_as_it_is(implementation) -> None:
    x, held = cases.hidden_states(6), cases.parameters()
    turned = Router(
        HIDDEN, EXPERTS, spec=SPEC, weight_layout="hidden_experts", implementation=implementation, rngs=nnx.Rngs(0)
    )
    nnx.update(turned, {"kernel": held["kernel"].T})
    cases.assert_routing(turned(x, return_logits=True), cases.logits_in_float64(x, held["kernel"]), SPEC)
    transposes = [shapes for name, shapes in cases.primitives(turned, x) if name == "transpose"]
    assert not transposes, "the kernel is transposed in every call"


@every_implementation
def test_a_recorded_selection_is_replayed(implementation) -> None:
    x, recorded = cases.hidden_states(3, dtype=BF16), np.array([[7, 0], [3, 3], [1, 2]])
    routing = router(implementation, BF16)(x, experts=recorded, return_logits=True)
    np.testing.assert_array_equal(routing.experts, recorded)
    scale = cases.parameters(BF16)["expert_scale"]
    bounds.within(routing.weights, bounds.weights(bounds.given(routing.logits), recorded, scale, SPEC))


@pytest.mark.parametrize("param_dtype", [F32, BF16])
def test_parameters_begin_as_those_of_linear(param_dtype) -> None:
    linear = nnx.Linear(HIDDEN, EXPERTS, param_dtype=param_dtype, rngs=nnx.Rngs(7))
    for weight_layout, kernel in (("experts_hidden", linear.kernel[...].T), ("hidden_experts", linear.kernel[...])):
        options = {"use_bias": True, "weight_layout": weight_layout, "param_dtype": param_dtype}
        gate = GateLinear(HIDDEN, EXPERTS, rngs=nnx.Rngs(7), **options)
        for layer in (gate, Router(HIDDEN, EXPERTS, spec=SPEC, rngs=nnx.Rngs(7), **options)):
            assert layer.kernel.dtype == layer.bias.dtype == param_dtype
            np.testing.assert_array_equal(layer.kernel[...], kernel)
            np.testing.assert_array_equal(layer.bias[...], linear.bias[...])


def test_initialisers_get_the_shapes_of_linear_and_variables_their_metadata() -> None:
    seen = []

    def init(key, shape, dtype):
        seen.append(shape)
        return jnp.ones(shape, dtype)

    options = {"kernel_init": init, "bias_init": init, "param_dtype": BF16}
    metadata = {"kernel_metadata": {"note": "kernel"}, "bias_metadata": {"note": "bias"}}
    layer = Router(HIDDEN, EXPERTS, spec=SPEC, rngs=nnx.Rngs(0), **WITH_ALL, **options, **metadata)
    assert seen == [(HIDDEN, EXPERTS), (EXPERTS,)]
    assert (layer.kernel.get_metadata("note"), layer.bias.get_metadata("note")) == ("kernel", "bias")
    np.testing.assert_array_equal(layer.expert_scale[...], np.ones(EXPERTS, BF16))
    np.testing.assert_array_equal(layer.correction_bias[...], np.zeros(EXPERTS, np.float32))
    assert (layer.expert_scale.dtype, layer.correction_bias.dtype) == (BF16, F32)


def test_dtype_casts_x_kernel_and_bias_and_without_one_nothing_is_rounded() -> None:
    x, held = cases.hidden_states(6), cases.parameters()
    rough = np.float32(1 + 2.0**-12)  # 1 in bfloat16
    off = {"kernel": held["kernel"] * rough, "bias": held["bias"] * rough}
    as_it_is, cast = (router(dtype=F32, compute_dtype=dtype) for dtype in (None, BF16))
    for layer in (as_it_is, cast):
        nnx.update(layer, off)
    rounded = cases.logits_in_float64(x, held["kernel"], held["bias"])
    np.testing.assert_array_equal(cast(x * rough, return_logits=True).logits, rounded)
    exact = cases.logits_in_float64(x, off["kernel"], off["bias"])
    for each in (x, x.astype(BF16)):
        np.testing.assert_array_equal(as_it_is(each, return_logits=True).logits, exact)
    widened = router(dtype=BF16, compute_dtype=F32)
    off_by_x = cases.logits_in_float64(x * rough, held["kernel"], held["bias"])
    np.testing.assert_array_equal(widened(x * rough, return_logits=True).logits, off_by_x)


def test_a_checkpoint_is_loaded_as_it_is_and_state_goes_round() -> None:
    held = cases.parameters(BF16)
    layer = router(dtype=BF16)
    state = nnx.to_pure_dict(nnx.state(layer))
    assert {name: (type(array), array.dtype.name) for name, array in state.items()} == {
        name: (np.ndarray, array.dtype.name) for name, array in held.items()
    }
    x = cases.hidden_states(4, dtype=BF16)
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
    assert {name for name, *_ in nnx.to_flat_state(rest).paths} == {"correction_bias"}
    cases.assert_same(nnx.merge(graph, parameters, rest)(x), layer(x))
    assert graph == nnx.graphdef(router(dtype=BF16))
    assert hash(graph) == hash(nnx.graphdef(router(dtype=BF16)))
    assert graph != nnx.graphdef(router(dtype=BF16, spec=jr.RoutingSpec(2)))


def test_a_router_is_made_abstract_and_filled() -> None:
    made = functools.partial(Router, HIDDEN, EXPERTS, spec=SPEC, implementation=["pallas", "xla"], **WITH_ALL)
    abstract = nnx.eval_shape(lambda: made(rngs=nnx.Rngs(0)))
    assert isinstance(abstract.kernel.get_value(), jax.ShapeDtypeStruct)
    graph, state = nnx.split(abstract)
    assert graph == nnx.graphdef(nnx.eval_shape(lambda: made(rngs=nnx.Rngs(1))))
    assert isinstance(hash(graph), int)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, cases.parameters()))
    x, held = cases.hidden_states(6), cases.parameters()
    filled = nnx.merge(graph, state)
    cases.assert_routing(filled(x), cases.logits_in_float64(x, held["kernel"], held["bias"]), SPEC, **held)


@with_float32
def test_gradients_are_of_the_parameters_and_not_of_the_correction_bias(implementation) -> None:
    layer, x, cotangent = router(implementation), cases.hidden_states(6), cases.numbers(9, 6, EXPERTS)
    held = cases.parameters()

    def loss(layer):
        return (layer(x, return_logits=True).logits * cotangent).sum()

    @nnx.jit
    def differentiated(layer):
        of_scale = nnx.grad(lambda layer: layer(x).weights.sum())(layer).expert_scale
        return *nnx.value_and_grad(loss)(layer), of_scale, layer(x)

    value, gradients, of_scale, routing = differentiated(layer)
    assert value == loss(layer)
    np.testing.assert_array_equal(gradients.kernel[...], cotangent.T @ np.asarray(x))
    np.testing.assert_array_equal(gradients.bias[...], cotangent.sum(0))
    assert "correction_bias" not in gradients
    at = bounds.given(cases.logits_in_float64(x, held["kernel"], held["bias"])), np.asarray(routing.experts)
    truth = bounds.gradients(x, held["kernel"], *at, held["expert_scale"], SPEC, np.ones((6, 2)))
    bounds.within(of_scale[...], truth.scale)


@with_float32
def test_an_optimizer_trains_the_parameters_and_the_correction_bias_moves_by_assignment(implementation) -> None:
    layer, x, cotangent = router(implementation), cases.hidden_states(6), cases.numbers(9, 6, EXPERTS)
    optimizer = nnx.Optimizer(layer, optax.sgd(1.0), wrt=nnx.Param)
    before, counts = cases.parameters(), jr.tokens_per_expert(layer(x).experts, EXPERTS)

    @nnx.jit
    def step(layer, optimizer):
        def loss(layer):
            routing = layer(x, return_logits=True)
            return (routing.logits * cotangent).sum(), routing.experts

        (_, experts), gradients = nnx.value_and_grad(loss, has_aux=True)(layer)
        optimizer.update(layer, gradients)
        counts = jr.tokens_per_expert(experts, EXPERTS).astype(F32)
        layer.correction_bias[...] += 0.5 * jnp.sign(counts.mean() - counts)

    step(layer, optimizer)
    assert isinstance(layer.correction_bias, CorrectionBias)
    np.testing.assert_array_equal(layer.kernel[...], before["kernel"] - cotangent.T @ np.asarray(x))
    np.testing.assert_array_equal(layer.expert_scale[...], before["expert_scale"])
    moved = before["correction_bias"] + 0.5 * np.sign(12 / EXPERTS - np.asarray(counts))
    np.testing.assert_array_equal(layer.correction_bias[...], moved)
    assert (moved != before["correction_bias"]).all()


@every_implementation
def test_a_stack_of_layers_is_made_by_vmap_and_called_by_scan_and_by_vmap(implementation) -> None:
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        options = {"spec": SPEC, "param_dtype": BF16, "implementation": implementation}
        return Router(HIDDEN, EXPERTS, rngs=rngs, **options, **WITH_ALL)

    stack = make(nnx.Rngs(0))
    assert stack.kernel.shape == (LAYERS, EXPERTS, HIDDEN)
    assert stack.correction_bias.shape == (LAYERS, EXPERTS)
    assert (stack.kernel[0] != stack.kernel[1]).any()
    held = [cases.parameters(BF16, seed) for seed in range(LAYERS)]
    nnx.update(stack, jax.tree.map(lambda *each: jnp.stack(each), *held))
    x = cases.hidden_states(6, dtype=BF16)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def scanned(x, layer):
        routing = layer(x, return_logits=True)
        return x, routing

    batched = nnx.vmap(lambda layer, x: layer(x, return_logits=True), in_axes=(0, None))
    for routing in (scanned(x, stack)[1], batched(stack, x)):
        for i, each in enumerate(held):
            truth = cases.logits_in_float64(x, each["kernel"], each["bias"])
            cases.assert_routing(jax.tree.map(lambda array, i=i: array[i], routing), truth, SPEC, **each)


@with_float32
def test_gradients_reach_every_layer_of_a_scanned_stack(implementation) -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return GateLinear(HIDDEN, EXPERTS, implementation=implementation, rngs=rngs)

    stack, cotangent = make(nnx.Rngs(0).split(LAYERS)), cases.numbers(9, LAYERS, 6, EXPERTS)
    x = cases.hidden_states(6)

    def loss(stack):
        scanned = nnx.scan(lambda x, layer: (x, layer(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        return (scanned(x, stack)[1] * cotangent).sum()

    gradients = nnx.jit(nnx.grad(loss))(stack)
    np.testing.assert_array_equal(gradients.kernel[...], np.swapaxes(cotangent, 1, 2) @ np.asarray(x))
