"""Gradients of `route`: of the weights with the selection fixed, and of the logits, whatever the implementation."""

from __future__ import annotations

import functools
import importlib.util

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_cases as cases
from jax.test_util import check_grads
from routing_cases import CASES
from test_ops import BF16, F32, dtype_id
from test_route import GRID, SPEC, VECTORS, assert_same, route, six

import jax_router as jr
from jax_router import routing
from jax_router.implementations import xla

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="PyTorch is not installed: its autograd is not compared. The specification and float64 differences are.",
)
pytestmark = pytest.mark.usefixtures("compiled_in_haste")
every_case = pytest.mark.parametrize("name", CASES)
TOKENS, HIDDEN = 5, 24


@functools.cache
def problem(name: str) -> tuple[list[np.ndarray | None], np.ndarray, np.ndarray]:
    """x, weight, bias, correction_bias, expert_scale of a case in float32, and cotangents of weights and logits."""
    case, generator = CASES[name], np.random.default_rng(7)
    x, weight = generator.standard_normal((TOKENS, HIDDEN)), generator.standard_normal((case.experts, HIDDEN))
    bias = None if case.bias is None else generator.standard_normal(case.experts)
    arrays = [None if a is None else a.astype(np.float32) for a in (x, weight / 2, bias, *case.vectors())]
    of_weights = generator.standard_normal((TOKENS, case.spec.top_k)).astype(np.float32)
    return arrays, of_weights, generator.standard_normal((TOKENS, case.experts)).astype(np.float32)


def called(spec: jr.RoutingSpec, arrays, experts=None, **options) -> jr.Routing:
    x, weight, bias, correction_bias, expert_scale = arrays
    vectors = {"correction_bias": correction_bias, "expert_scale": expert_scale, "experts": experts}
    return jr.route(x, weight, bias, spec=spec, **vectors, **options)


def pulled_back(function, arrays, of_weights, of_logits=None) -> tuple[list[np.ndarray | None], jr.Routing]:
    """Cotangents of the arrays, of a function that returns a Routing, and that Routing."""
    present = [index for index, array in enumerate(arrays) if array is not None]

    def of_present(*values):
        each = list(arrays)
        for index, value in zip(present, values, strict=True):
            each[index] = value
        routing = function(each)
        return (routing.weights if of_logits is None else (routing.weights, routing.logits)), routing

    _, pullback, routing = jax.vjp(of_present, *(jnp.asarray(arrays[index]) for index in present), has_aux=True)
    cotangents = pullback(jnp.asarray(of_weights) if of_logits is None else (of_weights, jnp.asarray(of_logits)))
    found = dict(zip(present, cotangents, strict=True))
    return [np.asarray(found[index]) if index in found else None for index in range(len(arrays))], routing


def scored(name: str, logits) -> bounds.Real:
    """What a case scores, of logits of x in float32: its own, so that what they are off by is no error of a gradient.

    Where XLA picks kernels they are only known within their roundings.
    """
    if bounds.xla_picks_kernels():
        (x, weight, bias, *_), _, _ = problem(name)
        return bounds.gemm(x, weight, bias)
    return bounds.given(logits)


@every_case
@pytest.mark.parametrize("with_logits", [False, True], ids=["weights", "weights and logits"])
def test_gradients_are_those_of_the_plain_specification(name, with_logits) -> None:
    spec, (arrays, of_weights, of_logits) = CASES[name].spec, problem(name)
    cotangents = (of_weights, of_logits if with_logits else None)
    actual, routed = pulled_back(lambda each: called(spec, each, return_logits=with_logits), arrays, *cotangents)

    def specification(each):
        return xla.route(*each, None, spec=spec, return_logits=with_logits)

    plain, _ = pulled_back(specification, arrays, *cotangents)
    logits = called(spec, arrays, return_logits=True).logits
    at = scored(name, logits), np.asarray(routed.experts), arrays[4], spec
    truth = bounds.gradients(*arrays[:2], *at, *cotangents)
    for gradients in (actual, plain):
        for index in (0, 1, 2, 4):
            assert (gradients[index] is None) == (arrays[index] is None)
            if arrays[index] is not None:
                bounds.within(gradients[index], truth[index])
        assert arrays[3] is None or not gradients[3].any(), "the correction bias has a gradient"


def weights_in_float64(spec: jr.RoutingSpec, arrays, experts) -> np.ndarray:
    x, weight, bias, _, scale = (None if array is None else array.astype(np.float64) for array in arrays)
    return cases.weigh(x @ weight.T + (0 if bias is None else bias), experts, scale, spec)


@every_case
def test_the_float64_gradients_agree_with_differences(name) -> None:
    """What gradients are compared with above."""
    spec, (arrays, of_weights, _) = CASES[name].spec, problem(name)
    experts = np.asarray(called(spec, arrays).experts)
    x, weight, bias, _, scale = arrays
    logits = bounds.gemm(x, weight, bias)
    truth = bounds.gradients(x, weight, bounds.given(logits.value), experts, scale, spec, of_weights)
    weighted = (bounds.weights(logits, experts, scale, spec) * bounds.given(of_weights)).sum((0, 1))
    rounding = weighted.error * bounds.FLOAT64
    generator, step = np.random.default_rng(1), 2.0**-12
    for index in (0, 1, 2, 4):
        if arrays[index] is None:
            continue
        direction = generator.standard_normal(arrays[index].shape)

        def moved(steps: int, index=index, direction=direction) -> float:
            each = [None if array is None else array.astype(np.float64) for array in arrays]
            each[index] = each[index] + steps * step * direction
            return float((of_weights * weights_in_float64(spec, each, experts)).sum())

        def slope(steps: int, moved=moved) -> float:
            """Of fourth order: it errs by c steps^4, and by 18 / 12 of the rounding over the step."""
            near, far = (moved(each) - moved(-each) for each in (steps, 2 * steps))
            return (8 * near - far) / (12 * steps * step)

        allowed = abs(slope(1) - slope(2)) + (1.5 + 0.75) * rounding / step  # 15 c, but for their rounding
        assert abs((truth[index].value * direction).sum() - slope(1)) <= allowed, index


@needs_torch
@every_case
def test_gradients_are_those_of_torch_autograd(name) -> None:

    import torch_ref

    case = CASES[name]
    arrays, of_weights, of_logits = problem(name)
    cast = [None if array is None else jnp.asarray(array, case.dtype) for array in arrays]
    tensors = [None if a is None else torch_ref.to_torch(np.asarray(a, np.float64)).requires_grad_() for a in cast]
    x, weight, bias, _, scale = tensors
    actual, routed = pulled_back(lambda each: called(case.spec, each, return_logits=True), cast, of_weights, of_logits)
    logits = torch_ref.router_gemm_float64(x, weight, bias)
    options = {field: getattr(case.spec, field) for field in case.spec.__dataclass_fields__ if field != "round_logits"}
    scored = routing.round_logits(routed.logits, case.dtype) if case.spec.round_logits else routed.logits
    # Autograd at the logits that were scored: what the GEMM or rounding moved them by is the identity to it.
    at = logits + (torch_ref.to_torch(np.asarray(scored)) - logits).detach()
    experts = torch_ref.to_torch(np.asarray(routed.experts))
    weights, _, _ = torch_ref.route_float64(at, **options, expert_scale=scale, experts=experts)
    (weights * torch_ref.to_torch(of_weights)).sum().add((logits * torch_ref.to_torch(of_logits)).sum()).backward()
    expected = [None if tensor is None else tensor.grad for tensor in tensors]
    assert expected[3] is None
    allowed = bounds.gradients(
        *cast[:2], bounds.given(scored), np.asarray(routed.experts), cast[4], case.spec, of_weights, of_logits
    )
    for index in (0, 1, 2, 4):
        if tensors[index] is not None:
            truth = bounds.Real(expected[index].numpy(), allowed[index].error)
            bounds.within(actual[index], truth, rounded_to=case.dtype)


@pytest.mark.parametrize(("x", "weight", "bias", "vector"), GRID, ids=dtype_id)
def test_cotangents_have_the_dtypes_of_the_primals(x, weight, bias, vector) -> None:
    operands = six(5, x=x, weight=weight, bias=bias)
    vectors = {name: array.astype(vector) for name, array in VECTORS.items()}
    gradients = jax.grad(lambda operands, vectors: route(*operands, **vectors).weights[:, 0].sum(), (0, 1))
    of_operands, of_vectors = gradients(operands, vectors)
    assert [None if a is None else a.dtype for a in of_operands] == [None if a is None else a.dtype for a in operands]
    assert [a.dtype for a in of_vectors.values()] == [vector, vector]


def test_no_cotangent_is_rounded_on_its_way() -> None:
    """Of rounded logits neither, through which JAX would send it in 16 bits."""
    x, weight, _ = six(5, x=BF16, weight=F32, bias=None)
    spec = jr.RoutingSpec(2, "softmax", renormalize=True, round_logits=True)
    weights, pullback = jax.vjp(lambda weight: jr.route(x, weight, spec=spec, return_logits=True)[::2], weight)
    (gradient,) = pullback((jnp.zeros_like(weights[0]), jnp.full((5, 6), 1 + 2.0**-12)))
    ones = bounds.given(np.full((6, 5), 1 + 2.0**-12))
    bounds.within(gradient, bounds.matmul(ones, np.asarray(x, np.float64)))
    _, of_rounded = jax.vjp(lambda bias: jr.route(x, weight, bias, spec=spec).weights, jnp.zeros(6))
    logits = jr.route(x, weight, spec=spec, return_logits=True).logits
    scored, experts = routing.round_logits(logits, BF16), jr.route(x, weight, spec=spec).experts
    _, plain = jax.vjp(lambda scored: routing.routing_weights(scored, experts, None, spec), scored)
    cotangent = jax.random.normal(jax.random.key(0), (5, 2))
    truth = bounds.gradients(x, weight, bounds.given(scored), np.asarray(experts), None, spec, cotangent)
    for of_bias in (of_rounded(cotangent)[0], plain(cotangent)[0].sum(0)):
        bounds.within(of_bias, truth.bias)


def test_recorded_ids_have_no_gradient_and_those_of_the_weights_do() -> None:
    operands, experts = six(3), jnp.array([[0, 1], [5, 5], [2, 3]])
    weights, pullback = jax.vjp(lambda experts: route(*operands, experts=experts).weights, experts)
    assert pullback(jnp.ones_like(weights))[0].dtype == jax.dtypes.float0
    for index in (0, 1, 2):
        moved = jax.grad(lambda *operands: route(*operands, experts=experts).weights[:, 0].sum(), index)(*operands)
        assert jnp.abs(moved).max() > 0


@every_case
def test_the_bits_inside_a_gradient_are_those_outside(name) -> None:
    spec, (arrays, of_weights, _) = CASES[name].spec, problem(name)

    def loss(arrays, return_logits):
        inside = called(spec, arrays, return_logits=return_logits)
        return (inside.weights * of_weights).sum(), inside

    with jax.default_device(jax.devices("cpu")[0]):  # XLA may compile the two apart on a GPU
        for return_logits, transform in ((False, jax.jit), (True, lambda function: function)):
            outside = called(spec, arrays, return_logits=return_logits)
            gradient = transform(jax.grad(functools.partial(loss, return_logits=return_logits), has_aux=True))
            assert_same(gradient([None if a is None else jnp.asarray(a) for a in arrays])[1], outside)


def test_the_backward_pass_needs_no_gemm_for_the_logits() -> None:
    with jax.default_device(jax.devices("cpu")[0]):  # where a GEMM is a dot in the compiled text
        operands, vectors = six(64, hidden=64), jax.device_put(VECTORS, jax.devices("cpu")[0])
        weights, pullback = jax.vjp(lambda *operands: route(*operands, **vectors).weights, *operands)
        backward = jax.jit(lambda pullback, cotangent: pullback(cotangent))  # what was kept is an argument
        compiled = backward.lower(pullback, jnp.ones_like(weights)).compile().as_text()
    assert compiled.count(" dot(") == 2, compiled  # one for each of x and weight


def test_second_derivatives_agree_with_finite_differences() -> None:
    operands, experts = six(3, hidden=8), jnp.array([[0, 1], [5, 4], [2, 3]])
    for spec in (SPEC, jr.RoutingSpec(2, "softmax_topk"), jr.RoutingSpec(2, "sqrtsoftplus")):

        def both(*operands, spec=spec):
            return route(*operands, spec=spec, experts=experts, return_logits=True)[::2]

        check_grads(both, operands, order=2, modes=["rev"], eps=1e-2, rtol=2e-2, atol=2e-2)


def loss(x, weight, bias) -> jax.Array:
    return jnp.sin(route(x, weight, bias).weights * jnp.arange(1.0, 3)).sum()


def check_gradients_of_loss(gradients, x, weight, bias) -> None:
    x, experts = np.reshape(x, (-1, x.shape[-1])), np.asarray(route(x, weight, bias).experts).reshape(-1, 2)
    logits, scale, factors = bounds.gemm(x, weight, bias).value, VECTORS["expert_scale"], np.arange(1.0, 3)
    np.testing.assert_array_equal(logits, logits.astype(np.float32))  # exact in any order
    logits = bounds.given(logits)
    angle = bounds.weights(logits, experts, scale, SPEC) * factors
    of_weights = bounds.Real.of(np.cos(angle.value), angle.error, bounds.COSINE) * factors
    truth = bounds.gradients(x, weight, logits, experts, scale, SPEC, of_weights)
    for gradient, expected in zip(gradients, (truth.x, truth.weight, truth.bias), strict=True):
        bounds.within(np.reshape(gradient, expected.value.shape), expected)


def test_gradients_through_vmap_scan_and_remat_are_those_in_float64() -> None:
    x, weight, bias = (jnp.round(32 * array) / 32 for array in six(4, 3))  # logits have 19 bits: no GEMM rounds them
    gradients = functools.partial(jax.grad, argnums=(0, 1, 2))
    check_gradients_of_loss(gradients(loss)(x, weight, bias), x, weight, bias)
    batched = gradients(lambda *a: jax.vmap(loss, (0, None, None))(*a).sum())
    check_gradients_of_loss(batched(x, weight, bias), x, weight, bias)

    def scanned(x, weight, bias):
        step = jax.checkpoint(lambda total, row: (total + loss(row, weight, bias), None))
        return jax.lax.scan(step, jnp.float32(0), x)[0]

    check_gradients_of_loss(jax.jit(gradients(scanned))(x, weight, bias), x, weight, bias)
    of_each = jax.vmap(gradients(loss), (0, None, None))(x, weight, bias)
    for i in range(4):
        check_gradients_of_loss([gradient[i] for gradient in of_each], x[i], weight, bias)
    stacked = jnp.stack([weight, -weight])
    of_routers = jax.vmap(gradients(loss), (None, 0, None))(x, stacked, bias)
    for i in range(2):
        check_gradients_of_loss([gradient[i] for gradient in of_routers], x, stacked[i], bias)


def test_no_tokens_have_zero_gradients() -> None:
    gradients = jax.grad(lambda *operands: route(*operands).weights.sum(), (0, 1, 2))(*six(0))
    assert [gradient.shape for gradient in gradients] == [(0, 24), (6, 24), (6,)]
    assert all(not gradient.any() for gradient in gradients)
