"""A kernel is trusted with operands of the dtypes that its verification passed, and with no others."""

from __future__ import annotations

from synthetic_record import record, subject, with_check
from test_dispatch import DOCUMENT, kernels
from test_standing import BF16, EVERY, F32, MIXED, ONLY_CUDA, OTHER, chosen, document, judge

from jax_router.dispatch import Problem
from jax_router.verification import gate, standing

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
            *((each["operation"], each["implementation"], BF16) for each in EVERY), ("router_gemm", "cuda", MIXED)
        }  # fmt: skip


def test_what_passed_with_float32_weights_is_not_trusted_in_16_bits() -> None:
    found = judge(DOCUMENT, record(*FLOAT32))
    trusted = {key for key, each in found.items() if not each.distrusted}
    assert trusted == {("router_gemm", "cuda", MIXED), ("route", "cuda", F32)}


def test_float16_stands_as_bfloat16_does_whose_code_it_takes() -> None:
    assert (
        gate.operands("float16", None) == gate.operands("float16", "float16") == gate.operands("bfloat16", None) == BF16
    )
    assert (gate.operands("bfloat16", "float32"), gate.operands("float32", None)) == (MIXED, F32)
    half = Problem(64, 7168, 256, "float16")
    assert chosen(document(), problem=half).implementation == "cuda"
    assert chosen(DOCUMENT, problem=half).implementation == "xla"


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
