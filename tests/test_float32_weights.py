"""Float32 weights, beside x in bfloat16 or float32: what JAX's transformations make of them, and what `cuda` computes.

Bits by batch, layout and configuration are in test_row_bits.py, all dtypes against float64 in test_parity.py.

What breaks each test of the GPU, as an edit of csrc that test_emulation.py was seen to fail with:

    every kind of data          sm90_float32.cuh without `add(low, low, 0, 2)`: normal data, by the mean square
    the same bits               sm90_router_gemm_float32.cu, `(lane / 4 * 4)` for a place in a column
    the error                   sm90_float32.cuh, `total()` is `high` alone
    not rounded                 route.cu without `spec.round_logits = 0` (test_emulation_route.py)
    times a power of two        sm90_float32.cuh without `add(low, low, 0, 2)`; for x in float32 (2, 0)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_router as jr
from jax_router import dispatch, ops, parity
from jax_router.implementations import cuda
from jax_router.sweep_points import Shape
from jax_router.verification.bits import check_bits
from jax_router.verification.data import Subject, draw
from jax_router.verification.numerics import check_numerics
from jax_router.verification.result import Context

BF16, F32 = jnp.bfloat16, jnp.float32
MINIMAX = Shape(3072, 256, False, ("MiniMax-M2",), jr.models["MiniMax-M2"].spec, correction_bias=True)
ERNIE = Shape(2560, 64, False, ("ERNIE-4.5-21B-A3B",), jr.models["ERNIE-4.5-21B-A3B"].spec, correction_bias=True)
SUBJECTS = [Subject("cuda", MINIMAX, weight_dtype="float32"), Subject("cuda", ERNIE, "float32")]
both = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.shape.models[0])
dtypes_of_x = pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])


def routed(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jr.route(x, weight, spec=jr.RoutingSpec(4), implementation="cuda").weights


def multiplied(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jr.router_gemm(x, weight, implementation="cuda")


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower for a Hopper GPU, whatever is here."""
    monkeypatch.setattr(ops, "_device", lambda *_: dispatch.Device("gpu", "NVIDIA H200 of a test", "9.0"))
    monkeypatch.setattr(cuda, "unavailable", lambda: None)


@dtypes_of_x
@pytest.mark.parametrize(("operation", "target"), [(multiplied, cuda.TARGET), (routed, cuda.ROUTE_TARGET)])
def test_no_transformation_rounds_or_widens_what_the_kernel_gets(on_hopper, operation, target, dtype) -> None:
    x, weight = jnp.ones((8, 64), dtype), jnp.ones((16, 64), F32)

    def taken(function, *operands) -> list[str]:
        """The dtypes of x and weight in every custom call."""
        text = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        calls = [line.rpartition(" : (")[2].split(", ") for line in text.splitlines() if f"@{target}(" in line]
        return ["".join(operand.rstrip(">)").rpartition("x")[2] for operand in call[:2]) for call in calls]

    gradients = jax.grad(lambda *operands: jnp.sin(operation(*operands)).sum(), (0, 1))
    assert [each.dtype for each in jax.eval_shape(gradients, x, weight)] == [dtype, F32]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices("cpu")[:1])
    expected = ["bf16f32" if dtype == BF16 else "f32f32"]
    assert taken(operation, x, weight) == taken(gradients, x, weight) == expected
    assert taken(jax.vmap(operation, (0, None)), jnp.stack([x] * 3), weight) == expected
    assert taken(jax.vmap(operation), jnp.stack([x] * 3), jnp.stack([weight] * 3)) == expected
    with jax.set_mesh(mesh):
        placed = [jax.device_put(each, NamedSharding(mesh, spec)) for each, spec in ((x, P("data")), (weight, P()))]
        assert taken(operation, *placed) == expected


@pytest.mark.gpu
@both
def test_every_kind_of_data_gets_right_logits_and_experts(gpu, subject: Subject) -> None:
    for result in check_numerics(subject, Context(gpu, tokens=(1, 64, 257))):
        assert result.passed, result.reason


@pytest.mark.gpu
@both
def test_a_token_has_the_same_bits_in_every_batch_and_layout(gpu, subject: Subject) -> None:
    result = check_bits(subject, Context(gpu, tokens=(1, 7, 64, 129, 512)))
    assert result.passed, result.reason
    assert result.figures["rows of the other layout"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("subject", "kind"),
    [(subject, kind) for subject in SUBJECTS for kind in ("normal", "with a mean")],
    ids=lambda each: each if isinstance(each, str) else each.shape.models[0],
)
def test_the_error_is_at_most_that_of_a_float32_product(gpu, subject: Subject, kind: str) -> None:
    gemm = dataclasses.replace(subject, shape=dataclasses.replace(subject.shape, spec=None, correction_bias=False))
    x, weight, *_ = draw(gemm, kind, 256, 0)
    truth = parity.reference(x, weight)
    ours, theirs = (
        parity.compare(
            np.asarray(jr.router_gemm(x, weight, implementation=name)), truth, parity.float32_chain(x.shape[1])
        ).rms_error
        for name in ("cuda", "xla")
    )
    assert ours <= theirs


@pytest.mark.gpu
def test_logits_of_float32_are_not_rounded_before_they_are_compared(gpu) -> None:
    spec = jr.RoutingSpec(8, round_logits=True)
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal(shape, np.float32) for shape in ((257, 512), (256, 512)))
    found = jr.route(x, weight, spec=spec, return_logits=True, implementation="cuda")
    assert jnp.array_equal(found.experts, jax.lax.top_k(found.logits, 8)[1])


@pytest.mark.gpu
@dtypes_of_x
@pytest.mark.parametrize("tokens", [1, 16, 128, 512])
def test_a_float32_times_a_power_of_two_is_exact(gpu, tokens: int, dtype) -> None:
    random = np.random.default_rng(tokens)
    weight = np.ldexp(random.standard_normal((48, 512), np.float32), random.integers(-30, 31, (48, 512)))
    places, powers = random.integers(0, 512, tokens), np.exp2(random.integers(-20, 21, tokens)).astype(np.float32)
    x = np.zeros((tokens, 512), np.float32)
    x[np.arange(tokens), places] = powers
    expected = (weight[:, places] * powers).T
    np.testing.assert_array_equal(jr.router_gemm(x.astype(dtype), weight, implementation="cuda"), expected)
    if dtype == F32:
        np.testing.assert_array_equal(
            jr.router_gemm(weight, np.eye(512, dtype=F32)[:tokens], implementation="cuda"), weight[:, :tokens]
        )
