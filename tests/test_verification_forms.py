"""The checks "accuracy" and "experts" in every form of a call: weights of any dtype, logits returned or not."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from verification_cases import CPU, GEMM, GPT_OSS, SCALED, OnGpu, caught, context, function, right_logits

from jax_router.verification import data, plan
from jax_router.verification.data import NUMERIC_TOKENS, Subject, draw
from jax_router.verification.numerics import check_numerics

pytestmark = pytest.mark.usefixtures("on_the_cpu", "compiled_in_haste")


def test_a_float32_checkpoint_has_every_kind_of_data_and_passes():
    wide = SCALED.given._replace(weight=SCALED.given.weight.astype(np.float32))
    subject = plan._as_taken(dataclasses.replace(SCALED, dtype="float32", given=wide))
    assert {each.dtype.name for each in subject.given if each is not None} == {"float32"}, "the scale was in bfloat16"
    assert {str(draw(subject, kind, 4, 0).weight.dtype) for kind in subject.kinds} == {"float32"}
    nudged = draw(subject, "near ties", 4, 0).weight
    spacings = abs(nudged[1::3] - nudged[0:-1:3]) / np.spacing(abs(nudged[0:-1:3]))
    assert (spacings.max(-1) == 1).all()
    assert ((spacings != 0).sum(-1) == 1).all()
    assert all(result.passed for result in check_numerics(subject, context()))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", None)])
def test_the_smallest_term_of_a_float32_weight_is_missed_in_a_single_product(dtypes):
    def without_it(operands):
        first = operands.weight.astype(jnp.bfloat16).astype(jnp.float32)
        second = (operands.weight - first).astype(jnp.bfloat16).astype(jnp.float32)
        return right_logits(operands._replace(weight=first + second))

    def of_cuda(logits):
        return Subject("cuda", GEMM, dtypes[0], weight_dtype=dtypes[1], function=function(None, logits=logits))

    assert caught(of_cuda(right_logits), platform="gpu") == {}
    assert "one product" in caught(of_cuda(without_it), platform="gpu")
    assert data.ONE_PRODUCT not in Subject("cuda", GEMM).kinds


@pytest.mark.parametrize("bias", [False, True])
def test_float32_is_shown_beside_a_float32_product_of_pytorch(monkeypatch, bias):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(data, "KINDS", ("normal",))
    subject = Subject("xla", dataclasses.replace(GEMM, bias=bias), weight_dtype="float32", function=function(None))
    [accuracy] = check_numerics(subject, context(torch=torch))
    assert accuracy.passed
    assert 0 < accuracy.figures["cuBLAS"]["worst"] < 1, "in units of what float32 may be off by"


@pytest.mark.parametrize("part", [0, 1])
def test_routing_without_logits_must_be_that_with_them(monkeypatch, part):
    def call(operands, *, return_logits=False):
        routed = list(right(operands, return_logits=return_logits))
        if not return_logits:
            routed[part] = routed[part].at[5, -1].set(routed[part][5, 0])
        return tuple(routed)

    right = function(GPT_OSS.spec)
    monkeypatch.setattr(data, "KINDS", ("normal",))
    right_one, wrong_one = (Subject("cuda", GPT_OSS, function=each) for each in (right, call))
    here = OnGpu(CPU, tokens=(NUMERIC_TOKENS,))
    assert [result.passed for result in check_numerics(right_one, here)] == [True, True]
    accuracy, experts = check_numerics(wrong_one, OnGpu(CPU, tokens=(NUMERIC_TOKENS,)))
    assert accuracy.passed
    assert (experts.passed, experts.failure.data, experts.failure.row) == (False, "normal", 5)
    assert experts.reason == "weights or experts of normal data are others where no logits are returned"
