"""A kernel is trusted with operands of the dtypes that its verification passed, and with no others."""

from __future__ import annotations

import pytest
from synthetic_record import record, subject, with_check
from test_dispatch import DOCUMENT, H200, kernels
from test_standing import BF16, EVERY, F16, F32, HERE, MIXED, ONLY_CUDA, OTHER, chosen, document, judge

from jax_router import dispatch
from jax_router.dispatch import Problem
from jax_router.tables import Table
from jax_router.verification import standing

__all__ = ["kernels"]  # the fixture: both kernels take every problem on an H200

FLOAT32 = [subject(weight_dtype="float32"), subject("route", dtype="float32")]


def test_what_passed_in_16_bits_is_not_trusted_with_float32_weights() -> None:
    found = judge(document(float32=(True, False)))
    assert {key for key, each in found.items() if each.distrusted} == {("route", "cuda", MIXED), ("route", "cuda", F32)}
    assert str(found["route", "cuda", F32]) == (
        "is not verified (nvidia_h200.json has no verified time of it for route in float32); run jax-router verify "
        "--implementation cuda"
    )
    own = record(*EVERY, FLOAT32[0], with_check(FLOAT32[1], "load", None))
    for table in (DOCUMENT, document(source_hash=OTHER)):
        found = judge(table, own)
        assert {key for key, each in found.items() if not each.distrusted} == {
            *((each["operation"], each["implementation"], dtypes) for each in EVERY for dtypes in (BF16, F16)),
            ("router_gemm", "cuda", MIXED),
        }  # fmt: skip


def test_what_passed_with_float32_weights_is_not_trusted_in_16_bits() -> None:
    found = judge(DOCUMENT, record(*FLOAT32))
    trusted = {key for key, each in found.items() if not each.distrusted}
    assert trusted == {("router_gemm", "cuda", MIXED), ("route", "cuda", F32)}


def test_float16_stands_as_bfloat16_does_whose_source_it_is_and_says_so() -> None:
    half = Problem(64, 7168, 256, "float16")
    assert chosen(document(), problem=half).implementation == "cuda"
    assert chosen(DOCUMENT, problem=half).implementation == "xla"
    found = judge(document())
    said = f"{found['route', 'cuda', BF16]}, in bfloat16; float16 is the same source, not run"
    assert str(found["route", "cuda", F16]) == said
    stale = judge(DOCUMENT)
    assert stale["route", "cuda", F16] == stale["route", "cuda", BF16]


def test_a_record_of_float16_is_of_float16_alone() -> None:
    found = judge(DOCUMENT, record(subject("route", dtype="float16")))
    assert {key for key, each in found.items() if not each.distrusted} == {("route", "cuda", F16)}
    assert "is verified on this GPU: 1.0 million" in str(found["route", "cuda", F16])
    assert "not run" not in str(found["route", "cuda", F16])


def test_the_choice_warns_of_what_is_left_out_with_these_dtypes(monkeypatch) -> None:
    """So once for each kind of operands that a process has."""
    table = Table.parse(document(accepted=ONLY_CUDA, float32=(False, True)), "nvidia_h200.json")
    monkeypatch.setattr(dispatch, "load_table", lambda _: table)
    monkeypatch.setattr(dispatch, "standings", lambda *_: standing.judge("NVIDIA H200", table, None, source_hash=HERE))
    with pytest.warns(RuntimeWarning, match="vouch for: pallas is not verified") as seen:
        dispatch.resolve(Problem(64, 7168, 256), H200)
    assert "float32" not in str(seen.list[0].message)
    with pytest.warns(RuntimeWarning, match="vouch for: cuda is not verified .* for router_gemm with a float32 weight"):
        dispatch.resolve(Problem(64, 7168, 256, weight_dtype="float32"), H200)


def test_the_dtypes_of_a_problem_decide_whose_verification_counts() -> None:
    table = document(float32=(False, True))
    gemm, wide = Problem(64, 7168, 256), Problem(64, 7168, 256, weight_dtype="float32")
    assert [chosen(table, problem=each).implementation for each in (gemm, wide)] == ["cuda", "xla"]
    assert chosen(document(), problem=wide).implementation == "cuda"


def test_the_warning_is_of_what_is_left_out_with_these_dtypes() -> None:
    found = judge(document(accepted=ONLY_CUDA))
    why = "cuda is not verified (nvidia_h200.json has no verified time of it for route in float32)"
    assert f"vouch for: {why}. Run jax-router verify --implementation cuda there" in standing.warning(
        "H200", found, F32
    )
    in_16_bits = standing.warning("H200", found, BF16)
    assert "float32" not in in_16_bits
    assert "Run jax-router verify --implementation pallas --implementation cuda there" in in_16_bits
