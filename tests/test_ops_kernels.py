"""What `router_gemm` does around a kernel: on which platform it runs, under vmap, exported, differentiated."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ops import BF16, F32, arrays, primitives

import jax_router as jr
from jax_router import dispatch, implementations, ops
from jax_router.implementations import xla


# A kernel is whatever `router_gemm` of its module is. This one runs anywhere, and is told apart by its cosine.
@pytest.fixture
def kernel(cuda_module, monkeypatch) -> list[tuple[int, ...]]:
    """Put a recognisable kernel in the place of `cuda`, on a device that looks like an H200. Collects traced shapes."""
    traced: list[tuple[int, ...]] = []

    def router_gemm(x, weight, bias, *, config=None, **options):
        traced.append(x.shape)
        return jnp.cos(xla.router_gemm(x, weight, bias, **options))

    monkeypatch.setattr(cuda_module, "router_gemm", router_gemm)
    return traced


def test_a_kernel_that_was_picked_gives_way_to_xla_under_jit_for_another_platform(kernel) -> None:
    with jax.default_device(jax.devices("cpu")[0]):
        operands = arrays(3, hidden=8, x=BF16, weight=BF16)
        assert dispatch.choose(dispatch.Problem(3, 8, 5), ops._device()).implementation == "cuda"
        np.testing.assert_array_equal(jr.router_gemm(*operands), jr.router_gemm(*operands, implementation="xla"))
        traced = jax.jit(jr.router_gemm).trace(*operands)
        for_cpu, for_cuda = traced.lower(), traced.lower(lowering_platforms=("cuda",))
        assert "cosine" not in for_cpu.as_text()
        assert "cosine" in for_cuda.as_text()
        # One branch each, which the compiler inlines: a choice at run time would keep the kernel out of CUDA graphs.
        assert for_cpu.as_text().count("stablehlo.dot_general") == 1
        assert for_cuda.as_text().count("stablehlo.dot_general") == 1
        assert "conditional" not in for_cpu.compile().as_text()


def test_a_named_kernel_is_lowered_on_every_platform(kernel) -> None:
    operands = arrays(3, hidden=8, x=BF16, weight=BF16)
    named = jax.jit(lambda *a: jr.router_gemm(*a, implementation="cuda"))
    assert "cosine" in named.lower(*operands).as_text()
    np.testing.assert_allclose(named(*operands), jnp.cos(jr.router_gemm(*operands, implementation="xla")), rtol=1e-6)


def test_vmap_over_a_kernel_folds_tokens_and_loops_over_weights(kernel) -> None:
    x, weight, bias = arrays(4, 3, hidden=8, x=BF16, weight=BF16)
    named = lambda *a: jr.router_gemm(*a, implementation="cuda")  # noqa: E731
    expected = jnp.cos(jr.router_gemm(x, weight, bias, implementation="xla"))
    # A GPU adds the eight products of another shape in another order: at most eight roundings of their magnitudes.
    atol = 8 * 2.0**-23 * float(jnp.max(jnp.abs(x.astype(F32)) @ jnp.abs(weight.astype(F32)).T))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=atol)
    close(jax.vmap(named, (0, None, None))(x, weight, bias), expected)
    assert (12, 8) in kernel
    stacked = jnp.stack([weight] * 4)
    close(jax.vmap(named, (0, 0, None))(x, stacked, bias), expected)
    assert "scan" in [name for name, _ in primitives(jax.vmap(named, (0, 0, None)), x, stacked, bias)]
    twice = jax.vmap(jax.vmap(named, (0, None, None)), (None, 0, None))(x, stacked, bias)
    close(twice, jnp.stack([expected] * 4))


def test_vmap_over_a_kernel_keeps_the_layout_of_the_weight(kernel) -> None:
    x, weight, bias = arrays(4, 3, hidden=8, experts=16, x=BF16, weight=BF16)
    named = functools.partial(jr.router_gemm, implementation="cuda", weight_layout="hidden_experts")
    expected = jnp.cos(jr.router_gemm(x, weight, bias, implementation="xla"))
    # As above.
    atol = 8 * 2.0**-23 * float(jnp.max(jnp.abs(x.astype(F32)) @ jnp.abs(weight.astype(F32)).T))
    for in_axes, stored in (((0, None, None), weight.T), ((0, 0, None), jnp.stack([weight.T] * 4))):
        np.testing.assert_allclose(jax.vmap(named, in_axes)(x, stored, bias), expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize(("examples", "tokens", "folded"), [(4096, 3, "xla"), (64, 1, "cuda")])
def test_vmap_decides_for_all_tokens_together(kernel, examples, tokens, folded) -> None:
    x, weight, _ = arrays(examples, tokens, hidden=8, x=BF16, weight=BF16)

    def chosen(function, x) -> str:
        lowered = jax.jit(function).trace(x, weight).lower(lowering_platforms=("cuda",))
        return "cuda" if "cosine" in lowered.as_text() else "xla"

    assert chosen(jr.router_gemm, x[0]) != folded == chosen(jr.router_gemm, x)
    assert chosen(jax.vmap(jr.router_gemm, (0, None)), x) == folded
    assert chosen(jax.grad(lambda *a: jax.vmap(jr.router_gemm, (0, None))(*a).sum()), x) == "xla"  # needs no logits


def test_a_kill_switch_reaches_a_call_under_vmap_that_was_traced_before(kernel, monkeypatch) -> None:
    x, weight, _ = arrays(64, 1, hidden=8, x=BF16, weight=BF16)

    def lowered() -> str:
        vmapped = jax.vmap(lambda *a: jr.router_gemm(*a), (0, None))
        return jax.jit(lambda *a: vmapped(*a)).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()

    assert "cosine" in lowered()
    monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "cuda")
    assert "cosine" not in lowered()


def test_vmap_refuses_more_tokens_than_a_named_kernel_takes(kernel, monkeypatch) -> None:
    monkeypatch.setattr(implementations.load("cuda"), "MAX_TOKENS", 8)
    x, weight, _ = arrays(3, 3, hidden=8, x=BF16, weight=BF16)
    named = jax.vmap(lambda *a: jr.router_gemm(*a, implementation="cuda"), (0, None))
    with pytest.raises(NotImplementedError, match="at most 8 tokens"):
        jax.jit(named)(x, weight)


def test_a_symbolic_number_of_tokens_is_exported_with_xla(kernel) -> None:
    (tokens,) = jax.export.symbolic_shape("tokens")
    x, *others = arrays(6, hidden=8, x=BF16, weight=BF16)
    for name in (None, "xla"):
        function = jax.jit(functools.partial(jr.router_gemm, implementation=name))
        export = jax.export.export(function, platforms=("cpu", "cuda"))
        exported = export(jax.ShapeDtypeStruct((tokens, 8), BF16), *others)
        with jax.default_device(jax.devices("cpu")[0]):  # on a GPU the function takes the kernel
            cpu = [jax.device_put(operand, jax.devices("cpu")[0]) for operand in (x, *others)]
            for some in (cpu[0], cpu[0][:1]):
                np.testing.assert_array_equal(exported.call(some, *cpu[1:]), function(some, *cpu[1:]))


def test_vmap_over_nothing_is_empty_without_a_launch(kernel) -> None:
    x, weight, bias = arrays(0, 3, hidden=8, x=BF16, weight=BF16)
    named = jax.vmap(lambda *a: jr.router_gemm(*a, implementation="cuda"), (0, None, None))
    assert jax.jit(named)(x, weight, bias).shape == (0, 3, 5)
    assert all(tokens > 0 for tokens, _ in kernel), "the kernel was given no tokens"


def test_gradients_do_not_depend_on_the_implementation(kernel) -> None:
    operands = arrays(3, hidden=8, x=BF16, weight=BF16)
    by_name = [
        jax.vjp(lambda *a, name=name: jr.router_gemm(*a, implementation=name), *operands)[1](jnp.ones((3, 5)))
        for name in ("cuda", "xla")
    ]
    for kernels, specifications in zip(*by_name, strict=True):
        np.testing.assert_array_equal(kernels, specifications)
