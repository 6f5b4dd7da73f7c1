"""What `route` does around a kernel: on which platform it runs, under vmap, differentiated."""

from __future__ import annotations

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ops import BF16
from test_route import SPEC, VECTORS, route, six

import jax_router as jr
from jax_router import implementations, ops
from jax_router.implementations import xla


@pytest.fixture
def kernel(cuda_module, monkeypatch) -> list[tuple[int, ...]]:
    """Put a kernel in the place of `cuda`, told apart by weights of negative sign. Collects traced shapes."""
    traced: list[tuple[int, ...]] = []

    def kernel(x, *others, config=None, **options):
        traced.append(x.shape)
        routing = xla.route(x, *others, **options)
        return routing._replace(weights=-jnp.abs(jnp.cos(routing.weights)))

    monkeypatch.setattr(cuda_module, "route", kernel)
    monkeypatch.setattr(cuda_module, "why_unsupported", lambda problem, device: None)
    return traced


def operands(*leading: int) -> tuple:
    return six(*leading, hidden=8, x=BF16, weight=BF16)


def assert_cosines(actual: jr.Routing, experts, x, weight, bias) -> None:
    """The experts, and the weights of the kernel put in the place of `cuda`, within their roundings."""
    np.testing.assert_array_equal(actual.experts, experts)
    experts = np.reshape(experts, (-1, SPEC.top_k))
    logits = bounds.gemm(np.reshape(x, (-1, x.shape[-1])), weight, bias)
    weights = bounds.weights(logits, experts, VECTORS["expert_scale"], SPEC)
    cosines = bounds.Real.of(-np.abs(np.cos(weights.value)), weights.error, bounds.COSINE)
    bounds.within(np.reshape(actual.weights, experts.shape), cosines)


def test_a_kernel_that_was_picked_gives_way_to_xla_under_jit_for_another_platform(kernel) -> None:
    with jax.default_device(jax.devices("cpu")[0]):
        arrays = operands(3)
        picked, named = route(*arrays), route(*arrays, implementation="xla")
        np.testing.assert_array_equal(picked.weights, named.weights)
        traced = jax.jit(route).trace(*arrays)
        assert "cosine" not in traced.lower().as_text()
        assert "cosine" in traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "conditional" not in traced.lower().compile().as_text()


def test_a_named_kernel_is_used_on_every_platform(kernel) -> None:
    assert (route(*operands(3), implementation="cuda").weights < 0).all()
    assert kernel == [(3, 8)]


@pytest.mark.parametrize("replay", [False, True])
def test_vmap_over_a_kernel_folds_tokens_and_loops_over_weights(kernel, replay) -> None:
    x, weight, bias = operands(4, 3)
    experts = jax.random.randint(jax.random.key(0), (4, 3, 2), 0, 6) if replay else None

    def named(x, weight, experts):
        return route(x, weight, bias, experts=experts, implementation="cuda")

    expected = route(x, weight, bias, experts=experts, implementation="xla").experts
    by_token = 0 if replay else None
    assert_cosines(jax.vmap(named, (0, None, by_token))(x, weight, experts), expected, x, weight, bias)
    assert kernel[-1] == (12, 8)
    stacked = jnp.stack([weight] * 4)
    assert_cosines(jax.vmap(named, (0, 0, by_token))(x, stacked, experts), expected, x, weight, bias)
    assert kernel.count((12, 8)) == 1


def test_a_kernel_that_takes_no_spec_is_refused_with_its_reason(kernel, monkeypatch) -> None:
    module = implementations.load("cuda")
    monkeypatch.setattr(module, "why_unsupported", lambda problem, _: "does not route" if problem.spec else None)
    with pytest.raises(NotImplementedError, match='implementation="cuda" does not route'):
        route(*operands(3), implementation="cuda")
    assert route(*operands(3)).weights.min() > 0
    assert kernel == []


def test_gradients_do_not_depend_on_the_implementation_and_go_by_its_own_experts(kernel, monkeypatch) -> None:
    arrays = operands(3)

    def gradients(name: str):
        return jax.vjp(lambda *a: route(*a, implementation=name).weights, *arrays)[1](jnp.ones((3, 2)))

    for of_kernel, of_specification in zip(gradients("cuda"), gradients("xla"), strict=True):
        np.testing.assert_array_equal(of_kernel, of_specification)
    shifted = (route(*arrays, implementation="xla").experts + 1) % 6
    original = implementations.load("cuda").route

    def shifts(*operands, **options):
        routing = original(*operands, **options)
        return routing._replace(experts=(routing.experts + 1) % 6)

    monkeypatch.setattr(implementations.load("cuda"), "route", shifts)
    ops._forward.cache_clear()
    ops._operation.cache_clear()
    replay = jax.vjp(lambda *a: route(*a, experts=shifted, implementation="xla").weights, *arrays)[1](jnp.ones((3, 2)))
    for of_kernel, of_replay in zip(gradients("cuda"), replay, strict=True):
        np.testing.assert_array_equal(of_kernel, of_replay)


def test_logits_are_asked_of_a_kernel_only_where_they_are_needed(kernel, monkeypatch) -> None:
    asked, original = [], implementations.load("cuda").route
    monkeypatch.setattr(
        implementations.load("cuda"), "route", lambda *a, **o: asked.append(o["return_logits"]) or original(*a, **o)
    )
    arrays = operands(3)
    assert route(*arrays, implementation="cuda").logits is None
    assert asked == [False]
    jax.grad(lambda x: route(x, *arrays[1:], implementation="cuda").weights.sum())(arrays[0])
    assert asked == [False, True]
