"""`router_gemm` keeps its contract under every transformation of JAX. Values are compared in tests/test_parity.py."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_router as jr
from jax_router import computation, dispatch, ops

pytestmark = pytest.mark.usefixtures("compiled_in_haste")
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def arrays(
    *leading: int, hidden: int = 24, experts: int = 5, x=F32, weight=F32, bias=F32
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (*leading, hidden), x),
        jax.random.normal(keys[1], (experts, hidden), weight),
        None if bias is None else jax.random.normal(keys[2], (experts,), bias),
    )


def reference(x, weight, bias) -> np.ndarray:
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    return x @ weight.T + (0 if bias is None else np.asarray(bias, np.float64))


def assert_same(actual, expected, x, weight, bias) -> None:
    """The logits of two programs in float32: the same bits of XLA on a CPU, or within what a GPU's programs are."""
    if bounds.xla_picks_kernels():
        for logits in (actual, expected):
            assert_right(logits, x, weight, bias)
    else:
        np.testing.assert_array_equal(actual, expected)


def assert_right(logits, x, weight, bias) -> None:
    """Logits `[..., E]` in float32 of an implementation that the dispatcher picks are within its bound."""
    truth = bounds.logits(np.reshape(x, (-1, x.shape[-1])), weight, bias)
    assert logits.shape == (*x.shape[:-1], weight.shape[0])
    bounds.within(np.reshape(logits, truth.value.shape), truth)


GRID = [
    (x, weight, bias, out)
    for x in (BF16, F16, F32)
    for weight, bias, out in itertools.product(*(dict.fromkeys(d) for d in ((x, F32), (x, F32, None), (x, F32))))
]


def dtype_id(dtype) -> str:
    return "none" if dtype is None else jnp.dtype(dtype).name


@pytest.mark.parametrize(("x", "weight", "bias", "out"), GRID, ids=dtype_id)
def test_every_dtype_of_the_grid_is_taken(x, weight, bias, out) -> None:
    operands = arrays(6, x=x, weight=weight, bias=bias)
    logits = jr.router_gemm(*operands, out_dtype=out)
    assert (logits.shape, logits.dtype) == ((6, 5), out)
    # 24 products below 4 * 4 in float32, then one rounding to out_dtype of values below 2**5
    tolerance = 24 * 24 * 16 * 2.0**-24 + (0 if out == F32 else 2.0**5 * float(jnp.finfo(out).eps) / 2)
    assert np.abs(np.asarray(logits, np.float64) - reference(*operands)).max() <= tolerance


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_axes_are_tokens(leading) -> None:
    x, weight, bias = arrays(*leading)
    logits = jr.router_gemm(x, weight, bias)
    assert logits.shape == (*leading, 5)
    flat = x.reshape(-1, 24), weight, bias
    assert_same(logits.reshape(-1, 5), jr.router_gemm(*flat), *flat)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("implementation", [None, *dispatch.IMPLEMENTATIONS])
def test_no_tokens_give_empty_logits_without_a_launch(leading, implementation) -> None:
    operands = arrays(*leading, x=BF16, weight=BF16)
    for out_dtype in (F32, BF16):
        gemm = functools.partial(jr.router_gemm, out_dtype=out_dtype, implementation=implementation)
        logits = gemm(*operands)
        assert (logits.shape, logits.dtype) == ((*leading, 5), out_dtype)
        assert {name for name, _ in primitives(gemm, *operands)} <= NO_LAUNCH


# Of a traced function: calls of inner functions, and what makes an empty array.
NO_LAUNCH = {"jit", "pjit", "custom_vjp_call", "custom_vmap_call", "custom_partitioning", "broadcast_in_dim"}


def test_no_tokens_have_zero_gradients() -> None:
    gradients = jax.grad(lambda *operands: jr.router_gemm(*operands).sum(), (0, 1, 2))(*arrays(0))
    assert [gradient.shape for gradient in gradients] == [(0, 24), (5, 24), (5,)]
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize(("hidden", "experts"), [(1, 1), (7, 3), (1, 31)])
def test_any_hidden_and_any_number_of_experts(hidden, experts) -> None:
    operands = arrays(3, hidden=hidden, experts=experts)
    assert_right(jr.router_gemm(*operands), *operands)


def test_float32_inputs_are_computed_to_float32_accuracy_whatever_the_default_precision() -> None:
    operands = arrays(6, hidden=512)
    for precision in ("bfloat16", "tensorfloat32", "float32"):
        with jax.default_matmul_precision(precision):
            xla = functools.partial(jr.router_gemm, implementation="xla")
            hlo = jax.jit(xla).lower(*operands).as_text()
            assert "precision = [HIGHEST, HIGHEST]" in hlo, f"{precision}:\n{hlo}"
            # In TF32, of 10 bits, they would be off by fifty times what is allowed.
            bounds.within(xla(*operands), bounds.gemm(*operands))
            assert_right(jr.router_gemm(*operands), *operands)


def test_numpy_arrays_are_taken() -> None:
    operands = arrays(3, x=BF16, weight=BF16, bias=F32)
    logits = jr.router_gemm(*(np.asarray(operand) for operand in operands))
    assert isinstance(logits, jax.Array)
    np.testing.assert_array_equal(logits, jr.router_gemm(*operands))


def test_wrapped_parameters_are_taken() -> None:
    class Parameter:
        def __init__(self, value):
            self.value = value

        def __jax_array__(self):
            return self.value

    x, weight, bias = arrays(3)
    np.testing.assert_array_equal(
        jr.router_gemm(x, Parameter(weight), Parameter(bias)), jr.router_gemm(x, weight, bias)
    )


@pytest.mark.parametrize("enabled", [False, True], ids=["x32", "x64"])
def test_64_bit_mode_changes_no_dtype(enabled) -> None:
    def logits_and_gradients(*operands, out):
        logits, pullback = jax.vjp(lambda *a: jr.router_gemm(*a, out_dtype=out), *operands)
        return logits, *pullback(logits)

    with jax.enable_x64(enabled):
        for x, weight, bias, out in GRID:
            operands = arrays(3, x=x, weight=weight, bias=bias)
            results = jax.eval_shape(functools.partial(logits_and_gradients, out=out), *operands)
            dtypes = [out, *(operand.dtype for operand in operands if operand is not None)]
            assert [result.dtype for result in results if result is not None] == dtypes
        assert jr.router_gemm(*operands).dtype == jr.router_gemm(operands[0][:0], *operands[1:]).dtype == F32


@pytest.mark.parametrize("bias", [F32, None])
def test_gradients_agree_with_finite_differences(bias) -> None:
    *operands, offset = arrays(3, hidden=8, bias=bias)
    operands += [] if offset is None else [offset]
    # A bilinear function has no third derivative: central differences are exact, and a wide step drowns the rounding.
    check_grads(jr.router_gemm, operands, order=1, modes=["rev"], eps=0.5)
    check_grads(jr.router_gemm, operands, order=2, modes=["rev"], eps=1e-2)


@pytest.mark.parametrize(("x", "weight", "bias", "out"), GRID, ids=dtype_id)
def test_cotangents_have_the_dtypes_of_the_primals_and_float32_accuracy(x, weight, bias, out) -> None:
    operands = arrays(64, x=x, weight=weight, bias=bias)
    logits, pullback = jax.vjp(lambda *a: jr.router_gemm(*a, out_dtype=out), *operands)
    cotangent = jax.random.normal(jax.random.key(3), logits.shape, out)
    g = np.asarray(cotangent, np.float64)
    expected = (
        g @ np.asarray(operands[1], np.float64),
        g.T @ np.asarray(operands[0], np.float64),
        None if bias is None else g.sum(0),
    )
    for gradient, operand, truth in zip(pullback(cotangent), operands, expected, strict=True):
        if operand is None:
            assert gradient is None
            continue
        assert (gradient.shape, gradient.dtype) == (operand.shape, operand.dtype)
        # one rounding to the dtype (relative), on top of at most 64 float32 roundings of sums below 2**8
        np.testing.assert_allclose(
            np.asarray(gradient, np.float64),
            truth,
            rtol=float(jnp.finfo(operand.dtype).eps),
            atol=64 * 2.0**8 * 2.0**-24,
        )


def primitives(function, *operands) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """Every primitive of a traced function, inner ones too, and the shapes it makes."""
    pending = [jax.make_jaxpr(function)(*operands).jaxpr]
    while pending:
        for equation in pending.pop().eqns:
            yield equation.primitive.name, [variable.aval.shape for variable in equation.outvars]
            for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    pending.append(inner)


def test_vmap_over_x_folds_into_tokens_and_does_not_copy_the_weight() -> None:
    x, weight, bias = arrays(4, 3, hidden=24, experts=5)
    batched = jax.vmap(jr.router_gemm, (0, None, None))
    assert_right(batched(x, weight, bias), x, weight, bias)
    seen = list(primitives(batched, x, weight, bias))
    products = [shapes for name, shapes in seen if name == "dot_general"]
    assert products == [[(4, 3, 5)]], f"not one GEMM over all 12 tokens: {products}"
    copies = [(name, shapes) for name, shapes in seen if any(shape[-2:] == (5, 24) for shape in shapes)]
    assert not copies, f"the weight was copied: {copies}"


def test_nested_vmap_folds_into_tokens() -> None:
    x, weight, bias = arrays(2, 4, 3)
    batched = jax.vmap(jax.vmap(jr.router_gemm, (0, None, None)), (1, None, None), 1)
    assert_right(batched(x, weight, bias), x, weight, bias)
    products = [shapes for name, shapes in primitives(batched, x, weight, bias) if name == "dot_general"]
    assert products == [[(4, 2, 3, 5)]]


@pytest.mark.parametrize("in_axes", [(0, 0, 0), (None, 0, None), (0, None, 0), (0, 0, None), (None, None, 0)], ids=str)
def test_vmap_over_anything_is_a_loop_over_routers(in_axes) -> None:
    x, weight, bias = arrays(3)
    operands = [
        operand if axis is None else jnp.stack([operand, 2 * operand, -operand])
        for operand, axis in zip((x, weight, bias), in_axes, strict=True)
    ]
    for i, logits in enumerate(jax.vmap(jr.router_gemm, in_axes)(*operands)):
        assert_right(logits, *(a if axis is None else a[i] for a, axis in zip(operands, in_axes, strict=True)))


def loss(x, weight, bias) -> jax.Array:
    return jnp.sin(jr.router_gemm(x, weight, bias)).sum()


def check_gradients_of_loss(gradients, x, weight, bias) -> None:
    """Of `loss` in x, weight and bias: against float64, within what float32 may be off by."""
    rows = np.reshape(x, (-1, x.shape[-1]))
    logits = bounds.logits(rows, weight, bias)
    cosines = bounds.Real.of(np.cos(logits.value), logits.error, bounds.COSINE)  # moves no more than its argument
    transposed = bounds.Real(cosines.value.T, cosines.error.T)
    of_x, of_weight = (
        bounds.matmul(cosines, bounds.given(weight).value),
        bounds.matmul(transposed, bounds.given(rows).value),
    )
    for gradient, operand, truth in zip(gradients, (x, weight, bias), (of_x, of_weight, cosines.sum(0)), strict=True):
        assert gradient.shape == operand.shape
        bounds.within(np.reshape(gradient, truth.value.shape), truth)


def test_gradient_of_vmap_is_the_gradient_of_the_flat_batch() -> None:
    operands = arrays(4, 3)
    batched = jax.grad(lambda *a: jax.vmap(loss, (0, None, None))(*a).sum(), (0, 1, 2))(*operands)
    check_gradients_of_loss(batched, *operands)
    check_gradients_of_loss(jax.grad(loss, (0, 1, 2))(*operands), *operands)


def test_vmap_of_gradient_is_one_gradient_per_example() -> None:
    x, weight, bias = arrays(4, 3)
    batched = jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, None))(x, weight, bias)
    for i in range(4):
        check_gradients_of_loss([gradient[i] for gradient in batched], x[i], weight, bias)


def test_jit_scan_and_remat_change_nothing() -> None:
    x, weight, bias = arrays(4, 3)
    expected = jr.router_gemm(x, weight, bias)
    assert_same(jax.jit(jr.router_gemm)(x, weight, bias), expected, x, weight, bias)
    _, scanned = jax.lax.scan(lambda carry, row: (carry, jr.router_gemm(row, weight, bias)), None, x)
    assert_right(scanned, x, weight, bias)  # xla's bits may depend on the batch
    assert_same(jax.checkpoint(jr.router_gemm)(x, weight, bias), expected, x, weight, bias)


def test_gradients_through_scan_and_remat_are_those_of_the_loop() -> None:
    x, weight, bias = arrays(4, 3)

    def scanned(x, weight, bias):
        step = jax.checkpoint(lambda total, row: (total + loss(row, weight, bias), None))
        return jax.lax.scan(step, jnp.float32(0), x)[0]

    check_gradients_of_loss(jax.jit(jax.grad(scanned, (0, 1, 2)))(x, weight, bias), x, weight, bias)


def test_donated_buffers_are_given_up_and_the_logits_are_right() -> None:
    x, weight, bias = arrays(4, hidden=8, experts=8)
    expected = bounds.given(np.array(x)) + bounds.logits(x, weight, bias)
    donating = jax.jit(lambda x, weight, bias: x + jr.router_gemm(x, weight, bias), donate_argnums=0)
    bounds.within(donating(x, weight, bias), expected)
    assert x.is_deleted()


def test_abstract_values_are_enough_to_trace() -> None:
    x, weight, bias = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays(2, 3, x=BF16, weight=BF16))
    logits = jax.eval_shape(jr.router_gemm, x, weight, bias)
    assert (logits.shape, logits.dtype) == ((2, 3, 5), F32)


@pytest.mark.parametrize(("dtype", "implementation"), [(BF16, None), (F32, "xla")], ids=["bfloat16", "float32 by xla"])
def test_inf_and_nan_stay_in_their_rows(dtype, implementation) -> None:
    x, weight, bias = arrays(4, x=dtype, weight=dtype)
    clean = jr.router_gemm(x, weight, bias, implementation=implementation)
    x = x.at[1, 2].set(jnp.nan).at[2, 3].set(jnp.inf)
    logits = jr.router_gemm(x, weight, bias, implementation=implementation)
    assert jnp.isnan(logits[1]).all()
    assert jnp.isinf(logits[2]).all()
    np.testing.assert_array_equal(logits[jnp.array([0, 3])], clean[jnp.array([0, 3])])


def test_a_repeated_call_does_not_trace_again() -> None:
    operands = arrays(3)
    jr.router_gemm(*operands)
    request = computation.Request.now(None, dispatch.Device.default(), "float32")
    function = ops._operation(computation.decide(*operands, request))
    before = function._cache_size()
    assert before > 0
    jr.router_gemm(*operands)
    assert function._cache_size() == before
