"""Bits, graphs and load find what is wrong with a weight stored [hidden, experts] alone."""

from __future__ import annotations

from collections.abc import Callable

import jax
import pytest
from test_verification_bits import ALONE, SHORT, context, exact
from verification_cases import CPU, EXPERTS, GEMM, GPT_OSS, HIDDEN

from jax_router import ops, timing
from jax_router.implementations import cuda
from jax_router.routing import Routing
from jax_router.sweep_points import Shape
from jax_router.verification import bits, data, load
from jax_router.verification.data import Operands, Subject
from jax_router.verification.result import Context

pytestmark = pytest.mark.usefixtures("on_the_cpu", "compiled_in_haste")


@pytest.fixture
def both_layouts(monkeypatch) -> Callable[..., Subject]:
    """A subject whose operations are taken in both layouts, and what is wrong with the logits of the other one."""

    def of(wrong: Callable[[jax.Array], jax.Array], shape: Shape) -> Subject:
        def logits_of(x, weight, _bias, *, weight_layout, **_):
            other = weight_layout == "hidden_experts"
            assert weight.shape == ((HIDDEN, EXPERTS) if other else (EXPERTS, HIDDEN))
            logits = exact(Operands(x, weight.T if other else weight))
            return wrong(logits) if other else logits

        def route(*operands, spec, return_logits, **options):
            logits = logits_of(*operands, **options)
            return Routing(*jax.lax.top_k(logits, spec.top_k), logits if return_logits else None)

        monkeypatch.setattr(ops, "router_gemm", logits_of)
        monkeypatch.setattr(ops, "route", route)
        monkeypatch.setattr(cuda, "why_unsupported", lambda problem, device: None)
        return Subject("cuda", shape)

    return of


def from_eight_tokens_on(logits: jax.Array) -> jax.Array:
    return logits.at[7:, 3].add(1)


@pytest.mark.parametrize("shape", [GEMM, GPT_OSS], ids=["router_gemm", "route"])
def test_bits_of_the_other_layout_that_differ_are_found(both_layouts, shape):
    right = bits.check_bits(both_layouts(lambda logits: logits, shape), context())
    assert right.passed, right.reason
    turns = bits.RUNS + bits.OTHER_RUNS
    assert right.figures["batches"] == turns * len(SHORT) == right.launches - 1
    assert 0 < right.figures["rows of the other layout"] <= bits.OTHER_RUNS * sum(SHORT)
    wrong = bits.check_bits(both_layouts(from_eight_tokens_on, shape), context())
    assert (wrong.passed, wrong.failure.tokens, wrong.failure.row) == (False, 8, 7)
    assert "of a batch of 8, with the weight stored [hidden, experts]: 1 of 8 rows" in wrong.reason


def test_a_layout_that_is_not_taken_is_not_asked_for(both_layouts, monkeypatch):
    subject = both_layouts(from_eight_tokens_on, GEMM)
    refuse = lambda problem, _: "no" if problem.weight_layout == "hidden_experts" else None  # noqa: E731
    monkeypatch.setattr(cuda, "why_unsupported", refuse)
    result = bits.check_bits(subject, context())
    assert (result.passed, result.figures["rows of the other layout"]) == (True, 0)
    assert data.in_other_layout(Subject("xla", GEMM), CPU) is None, "it promises no bits"


def test_chains_hold_launches_of_both_layouts(both_layouts):
    right = load.check_graphs(both_layouts(lambda logits: logits, GPT_OSS), Context(CPU, tokens=(8,)))
    assert right.passed, right.reason
    wrong = load.check_graphs(both_layouts(from_eight_tokens_on, GEMM), Context(CPU, tokens=(8,)))
    assert (wrong.passed, wrong.reason) == (False, ALONE)
    assert (wrong.failure.launch, wrong.failure.row) == (load.XS - 1, 7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chains_of_float32_weights_rotate_as_many_as_four_bytes_ask_for(dtype):
    wanted = timing.cold_copies(4096 * 224 * 4)
    assert load.FEWEST_CALLS < wanted < min(load.MOST_CALLS, timing.cold_copies(4096 * 224 * 2))
    assert (
        load._launches(Subject("cuda", Shape(4096, 224, False, ()), dtype, weight_dtype="float32"), context()) == wanted
    )
