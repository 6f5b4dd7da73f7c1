"""The losses of a router are those of Hugging Face transformers and of Megatron-LM, written here from formulas."""

from __future__ import annotations

import functools
import importlib.util
import re

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router as jr
from jax_router import losses

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="PyTorch or transformers is not installed: their function is not compared. Its formula is, in numpy.",
)
TOKENS, EXPERTS, TOP_K = (3, 20), 6, 2


@functools.cache
def routed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, experts, and an attention mask with padding at the ends."""
    generator = np.random.default_rng(0)
    logits = (2 * generator.standard_normal((*TOKENS, EXPERTS))).astype(np.float32)
    experts = np.argsort(-logits, axis=-1)[..., :TOP_K].astype(np.int32)
    return logits, experts, (np.arange(TOKENS[1]) < np.array([[20], [13], [1]])).astype(np.int32)


def probabilities_of(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(-1, keepdims=True)


def balance_bound(logits: np.ndarray, experts: np.ndarray) -> tuple[bounds.Real, bounds.Real]:
    """The loss of the tokens that count, by softmax, and its gradient in their logits."""
    probabilities = bounds.softmax(bounds.given(logits))
    loss, of_each = bounds.load_balancing(probabilities, experts)
    return loss, bounds.softmax_pulled_back(probabilities, of_each)


masked = pytest.mark.parametrize("with_mask", [False, True], ids=["all", "masked"])


def kept(with_mask: bool) -> tuple[np.ndarray, np.ndarray]:
    """Logits and experts of the tokens that count, flat."""
    logits, experts, mask = routed()
    chosen = mask == 1 if with_mask else np.ones(TOKENS, bool)
    return logits[chosen], experts[chosen]


def mask_if(with_mask: bool) -> np.ndarray | None:
    return routed()[2] if with_mask else None


@masked
def test_tokens_per_expert_are_counted(with_mask) -> None:
    _, experts = kept(with_mask)
    counts = jr.tokens_per_expert(routed()[1], EXPERTS, mask=mask_if(with_mask))
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, np.bincount(experts.ravel(), minlength=EXPERTS))


def test_ids_of_any_dtype_are_counted_and_those_out_of_range_are_not() -> None:
    for dtype in (np.int8, np.uint16, np.int32):
        experts = np.array([[0, 2], [2, 6], [5, np.iinfo(dtype).max]], dtype)
        assert jr.tokens_per_expert(experts, 6).tolist() == [1, 0, 2, 0, 0, 1]
    assert jr.tokens_per_expert(jnp.array([-1, 1]), 2).tolist() == [0, 1]
    assert jr.tokens_per_expert(np.zeros((0, 2), np.int32), 3).tolist() == [0, 0, 0]


@masked
def test_load_balancing_is_that_of_transformers_as_a_formula(with_mask) -> None:
    logits, experts = kept(with_mask)
    probabilities = probabilities_of(logits)
    one_hot = np.eye(EXPERTS)[experts]  # [tokens, k, E]
    expected = EXPERTS * (one_hot.mean(0) * probabilities.mean(0)).sum()
    actual = jr.load_balancing_loss(jax.nn.softmax(routed()[0]), routed()[1], mask=mask_if(with_mask))
    assert (actual.shape, actual.dtype) == ((), jnp.float32)
    bounds.within(actual, bounds.Real(expected, balance_bound(logits, experts)[0].error))


@needs_transformers
@masked
def test_load_balancing_is_the_function_of_transformers_over_layers(with_mask) -> None:
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits, experts, mask = routed()
    layers = np.stack([logits, -logits[:, ::-1]])
    of_layers = np.stack([experts, np.argsort(layers[1] * -1, axis=-1)[..., :TOP_K]])
    flat = tuple(torch.tensor(layer.reshape(-1, EXPERTS), requires_grad=True) for layer in layers)
    attention = torch.tensor(mask) if with_mask else None
    expected = load_balancing_loss_func(flat, EXPERTS, TOP_K, attention)
    expected.backward()

    def loss(layers):
        return jr.load_balancing_loss(jax.nn.softmax(layers), of_layers, mask=mask_if(with_mask))

    value, gradient = jax.value_and_grad(loss)(layers)
    chosen = np.broadcast_to(mask == 1 if with_mask else True, layers.shape[:-1])
    truth, of_logits = balance_bound(layers[chosen], of_layers[chosen])
    of_torch = np.stack([layer.grad.numpy() for layer in flat]).reshape(layers.shape)
    for loss_found, gradient_found in ((value, gradient), (expected.item(), of_torch)):
        bounds.within(loss_found, truth)
        bounds.within(gradient_found[chosen], of_logits)
        assert not gradient_found[~chosen].any()


@masked
def test_load_balancing_over_k_is_that_of_megatron(with_mask) -> None:
    logits, experts = kept(with_mask)
    probabilities, tokens = probabilities_of(logits), len(logits)
    counts = np.bincount(experts.ravel(), minlength=EXPERTS)
    expected = (probabilities.sum(0) * counts).sum() * EXPERTS / (TOP_K * tokens * tokens)
    actual = jr.load_balancing_loss(jax.nn.softmax(routed()[0]), routed()[1], mask=mask_if(with_mask)) / TOP_K
    halved = balance_bound(logits, experts)[0].error / TOP_K  # exactly
    bounds.within(actual, bounds.Real(expected, halved))


@masked
def test_the_z_loss_is_that_of_megatron(with_mask) -> None:
    logits, _ = kept(with_mask)
    expected = np.square(np.log(np.exp(logits.astype(np.float64)).sum(-1))).mean()
    actual = jr.router_z_loss(routed()[0], mask=mask_if(with_mask))
    assert (actual.shape, actual.dtype) == ((), jnp.float32)
    bounds.within(actual, bounds.Real(expected, bounds.z_loss(bounds.given(logits))[0].error))


def test_balanced_tokens_cost_the_number_of_experts_each_has() -> None:
    experts = jnp.array([[0, 1], [2, 3], [4, 5]])
    probabilities = jnp.full((3, 6), 1 / 6)
    loss, _ = bounds.load_balancing(bounds.given(probabilities), np.asarray(experts))
    assert abs(float(loss.value) - 2) <= 2 * 2.0**-24  # by as much as 1 / 6 is off in float32
    bounds.within(jr.load_balancing_loss(probabilities, experts), loss)
    assert float(jr.load_balancing_loss(jnp.eye(6)[:1], jnp.array([[0]]))) == 6


@masked
def test_gradients_agree_with_float64(with_mask) -> None:
    logits, experts, mask = routed()
    chosen = mask == 1 if with_mask else np.ones(TOKENS, bool)
    balance = lambda logits: jr.load_balancing_loss(jax.nn.softmax(logits), experts, mask=mask_if(with_mask))  # noqa: E731
    z_loss = functools.partial(jr.router_z_loss, mask=mask_if(with_mask))
    of_balance, of_z = balance_bound(logits[chosen], experts[chosen])[1], bounds.z_loss(bounds.given(logits[chosen]))[1]
    for function, truth in ((balance, of_balance), (z_loss, of_z)):
        gradient = np.asarray(jax.grad(function)(logits))
        bounds.within(gradient[chosen], truth)
        assert not gradient[~chosen].any()


def test_the_float64_gradients_agree_with_differences() -> None:
    logits, experts = (array.astype(np.float64) for array in kept(False))
    experts, direction, step = experts.astype(int), np.random.default_rng(1).standard_normal(logits.shape), 2.0**-12
    for loss_and_gradient in (
        lambda moved: balance_bound(moved, experts),
        lambda moved: bounds.z_loss(bounds.given(moved)),
    ):
        loss, gradient = loss_and_gradient(logits)

        def slope(steps: int, function=loss_and_gradient) -> float:
            """Of fourth order: it errs by c steps^4, and by 18 / 12 of the rounding over the step."""
            moved = [float(function(logits + each * steps * step * direction)[0].value) for each in (-2, -1, 1, 2)]
            return (8 * (moved[2] - moved[1]) - (moved[3] - moved[0])) / (12 * steps * step)

        rounding = float(loss.error) * bounds.FLOAT64
        allowed = abs(slope(1) - slope(2)) + (1.5 + 0.75) * rounding / step
        assert abs((gradient.value * direction).sum() - slope(1)) <= allowed


def test_padding_may_be_anything() -> None:
    logits, experts, mask = map(jnp.asarray, routed())
    garbage = jnp.where(mask[..., None] == 1, logits, jnp.nan)
    wrong = jnp.where(mask[..., None] == 1, experts, 1 << 20)
    for function in (
        lambda logits, ids: jr.load_balancing_loss(jax.nn.softmax(logits), ids, mask=mask),
        lambda logits, ids: jr.router_z_loss(logits, mask=mask),
    ):
        value, gradient = jax.value_and_grad(function)(logits, experts)
        np.testing.assert_array_equal(function(garbage, wrong), value)
        of_garbage = jax.grad(function)(garbage, wrong)
        np.testing.assert_array_equal(jnp.where(mask[..., None] == 1, of_garbage, 0), gradient)
    assert jnp.isfinite(jax.grad(lambda logits: jr.router_z_loss(logits, mask=mask))(garbage)).all()


def test_masks_are_bools_or_integers_and_broadcast() -> None:
    logits, experts, mask = routed()
    expected = jr.router_z_loss(logits, mask=mask)
    assert expected == jr.router_z_loss(logits, mask=mask == 1) == jr.router_z_loss(logits, mask=7 * mask)
    twice = np.concatenate([logits[mask == 1]] * 2)
    bounds.within(jr.router_z_loss(np.stack([logits, logits]), mask=mask), bounds.z_loss(bounds.given(twice))[0])
    column = np.array([[True], [False], [False]])
    np.testing.assert_array_equal(
        jr.tokens_per_expert(experts, EXPERTS, mask=column), jr.tokens_per_expert(experts[0], EXPERTS)
    )


def test_no_token_costs_nothing() -> None:
    logits, experts, mask = routed()
    for tokens, counted in ((TOKENS, 0 * mask), ((0, 20), None)):
        some, ids = np.resize(logits, (*tokens, EXPERTS)), np.resize(experts, (*tokens, TOP_K))
        assert jr.router_z_loss(some, mask=counted) == 0
        assert jr.load_balancing_loss(jax.nn.softmax(jnp.asarray(some)), ids, mask=counted) == 0


def test_a_symbolic_number_of_tokens_is_exported() -> None:
    logits, experts, _ = routed()
    logits, experts = logits.reshape(-1, EXPERTS), experts.reshape(-1, TOP_K)
    both = jax.jit(lambda logits, ids: (jr.load_balancing_loss(logits, ids), jr.router_z_loss(logits)))
    (tokens,) = jax.export.symbolic_shape("tokens")
    exported = jax.export.export(both)(
        jax.ShapeDtypeStruct((tokens, EXPERTS), np.float32), jax.ShapeDtypeStruct((tokens, TOP_K), np.int32)
    )
    for found, expected in zip(exported.call(logits, experts), both(logits, experts), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2.0**-20)


def test_half_precision_is_summed_in_float32_and_jit_changes_nothing() -> None:
    logits, experts, mask = routed()
    half = jnp.asarray(logits, jnp.bfloat16)
    widened = half.astype(jnp.float32)
    assert jr.router_z_loss(half) == jr.router_z_loss(widened)
    probabilities = jax.nn.softmax(widened).astype(jnp.bfloat16)
    balance = jax.jit(jr.load_balancing_loss)
    counted = np.asarray(probabilities.astype(jnp.float32))[mask == 1], experts[mask == 1]
    truth, _ = bounds.load_balancing(bounds.given(counted[0]), counted[1])
    for form in (probabilities, probabilities.astype(jnp.float32)):
        bounds.within(balance(form, experts, mask=mask), truth)
    bounds.within(jr.load_balancing_loss(probabilities, experts, mask=mask), truth)


def test_a_router_is_trained_towards_balance() -> None:
    x, weight = jax.random.normal(jax.random.key(0), (256, 8)), jax.random.normal(jax.random.key(1), (4, 8))
    spec = jr.RoutingSpec(1, "softmax")

    @jax.jit
    @jax.value_and_grad
    def loss(weight):
        routing = jr.route(x + 1, weight, spec=spec, return_logits=True)
        return jr.load_balancing_loss(jax.nn.softmax(routing.logits), routing.experts)

    before, _ = loss(weight)
    for _ in range(20):
        weight = weight - 0.1 * loss(weight)[1]
    assert loss(weight)[0] < 0.5 + before / 2


P, IDS, LOGITS = jnp.ones((3, 4)), jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 4))
ERRORS = {
    "experts is a list": (
        TypeError, lambda: jr.tokens_per_expert([[0]], 4),
        "experts is [[0]] (list). Expected a JAX or numpy array of integers; convert it first, for example with "
        "jnp.asarray(experts, dtype=jnp.int32).",
    ),
    "experts are floats": (
        ValueError, lambda: jr.load_balancing_loss(P, IDS.astype(jnp.float32)),
        "experts is an array of float32. Expected integers; cast it, for example with experts.astype(jnp.int32).",
    ),
    "experts is a scalar": (
        ValueError, lambda: jr.tokens_per_expert(jnp.int32(1), 4),
        "experts has shape (), a scalar. Expected shape (..., k), tokens in the leading axes; pass the experts of one "
        "token as (k,).",
    ),
    "num_experts is zero": (
        ValueError, lambda: jr.tokens_per_expert(IDS, 0),
        "num_experts is 0. Expected an integer of at least 1; pass the problem's size.",
    ),
    "experts of other tokens": (
        ValueError, lambda: jr.load_balancing_loss(P, IDS[:2]),
        "experts has shape (2, 2) but probabilities has shape (3, 4). Expected the same tokens, (3,), in their leading "
        "axes; pass what one call of route returned.",
    ),
    "probabilities are integers": (
        ValueError, lambda: jr.load_balancing_loss(IDS, IDS),
        "probabilities is an array of int32. Expected bfloat16, float16 or float32; cast it, for example with "
        "probabilities.astype(jnp.float32).",
    ),
    "logits have no experts": (
        ValueError, lambda: jr.router_z_loss(LOGITS[:, :0]),
        "logits has shape (3, 0). Expected (..., experts) with at least 1 expert, tokens in the leading axes; put the "
        "axis of experts last.",
    ),
    "mask is of floats": (
        ValueError, lambda: jr.router_z_loss(LOGITS, mask=jnp.ones(3)),
        "mask is an array of float32. Expected integers or bools; cast it, for example with mask.astype(bool).",
    ),
    "mask is a list": (
        TypeError, lambda: jr.router_z_loss(LOGITS, mask=[True]),
        "mask is [True] (list). Expected a JAX or numpy array of integers or bools; convert it first, for example with "
        "jnp.asarray(mask, dtype=bool).",
    ),
    "mask is of other tokens": (
        ValueError, lambda: jr.router_z_loss(LOGITS, mask=np.ones(4, bool)),
        "mask has shape (4,) but the tokens have (3,). Expected a shape that broadcasts to that; pass one value per "
        "token.",
    ),
    "mask is larger than the tokens": (
        ValueError, lambda: jr.router_z_loss(LOGITS, mask=np.ones((2, 3), bool)),
        "mask has shape (2, 3) but the tokens have (3,). Expected a shape that broadcasts to that; pass one value per "
        "token.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("error", "call", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_refused_with_what_to_do(error, call, message) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_the_losses_are_public() -> None:
    assert {"load_balancing_loss", "router_z_loss", "tokens_per_expert"} <= set(jr.__all__)
    assert jr.router_z_loss is losses.router_z_loss
