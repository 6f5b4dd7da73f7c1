"""What a verification record proves, what it does not, and how the user's own is kept."""

from __future__ import annotations

import copy
import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from synthetic_record import check, record, subject, with_check
from synthetic_rows import PROVENANCE

from jax_router import build, provenance, sweep
from jax_router.dispatch import Device, Problem
from jax_router.implementations import cuda, pallas
from jax_router.verification import gate

HERE = {"source_hash": PROVENANCE["source_hash"], "gpu": "NVIDIA H200"}
GEMM, ROUTE = subject(), subject("route")


def why(found: dict[str, Any] | None, about: dict[str, Any] = GEMM, **here: Any) -> str | None:
    return gate.why_unverified(found, about, **{**HERE, **here})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    gate.kept.cache_clear()
    yield tmp_path / "cache"
    gate.kept.cache_clear()


# The rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["router_gemm", "route"])
@pytest.mark.parametrize("name", gate.KERNELS)
def test_a_kernel_that_passed_every_required_check_on_this_shape_is_proven(operation: str, name: str) -> None:
    about = subject(operation, name)
    assert why(record(about), about) is None
    assert why(record(about, interrupted=True), about) is None  # of what is complete


def test_every_pair_of_dtypes_that_a_kernel_takes_has_a_standing(monkeypatch) -> None:
    monkeypatch.setattr(pallas, "FIRST_JAX", (0, 0))
    dtypes = ("bfloat16", "float16", "float32")
    for module in (cuda, pallas):
        taken = {
            pair
            for pair in itertools.product(dtypes, dtypes)
            if module.why_unsupported(
                Problem(8, 2880, 128, pair[0], weight_dtype=pair[1]), Device("gpu", "NVIDIA H200", "9.0")
            )
            is None
        }
        assert taken == set(gate.OPERANDS[module.__name__.rpartition(".")[2]])


def test_xla_needs_no_verification() -> None:
    assert why(None, subject("route", "xla")) is None


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "there is no verification record of this GPU"),
        (record(GEMM, provenance={"gpu": "NVIDIA H100 80GB HBM3"}), "of another GPU, NVIDIA H100 80GB HBM3"),
        (record(GEMM, provenance={"gpu": None}), "of another GPU, None"),
        (record(GEMM, provenance={"source_hash": "f" * 64}), "of other sources, ffffffffffff, these are 0123456789ab"),
        (record(GEMM, library="/tmp/mine.so"), "of the library /tmp/mine.so, whose sources nobody knows"),
        (record(GEMM, quick=True), "of --quick, too short for a table"),
        (record(ROUTE), "does not have this shape"),
        (record(subject(implementation="pallas")), "does not have this shape"),
        (record(), "does not have this shape"),
        (record(with_check(GEMM, "load", False, "3 wrong")), "load failed (3 wrong), router_gemm of 2880x128 +bias"),
        (record({**GEMM, "passed": False}), "it failed, router_gemm of 2880x128 +bias, 2026-01-02"),
        (record(with_check(GEMM, "memory", None, "out of memory.")), "memory was not run (out of memory)"),
        (record({**GEMM, "checks": []}, interrupted=True), "accuracy was not run, the run was interrupted"),
    ],
)
def test_what_does_not_prove_a_kernel_says_why(found: dict[str, Any] | None, reason: str) -> None:
    assert reason in str(why(found))


def test_an_interrupted_run_failed_nothing() -> None:
    part = {**GEMM, "complete": False, "passed": False, "checks": GEMM["checks"][:2]}
    none = {**part, "checks": []}
    for each in (part, none):
        assert gate.outcome(each) is False
        assert gate.failure(record(each, interrupted=True), "router_gemm", "cuda") is None
        assert "was not run, the run was interrupted" in str(why(record(each, interrupted=True)))


def test_a_subject_passed_if_all_it_needs_ran_and_something_did() -> None:
    whole, of_xla = ({**subject(implementation=name), "complete": True} for name in ("cuda", "xla"))
    assert gate.outcome(whole) is True
    assert gate.outcome(with_check(whole, "load", False, "wrong")) is False
    assert gate.outcome(with_check(whole, "load", None, "no compiler")) is False
    assert gate.outcome(with_check(of_xla, "load", None, "there is no GPU")) is True
    assert gate.outcome({**of_xla, "checks": [{"check": "bits", "passed": None}]}) is None
    assert gate.outcome({**whole, "checks": [{"check": "fence", "passed": None}]}) is None


@pytest.mark.parametrize("field", ["hidden", "experts", "bias", "dtype", "weight_dtype", "out_dtype", "rule"])
def test_another_shape_proves_nothing(field: str) -> None:
    other = {"bias": False, "rule": {"top_k": 8, "correction_bias": False}}.get(field, "other")
    assert why(record(ROUTE), {**ROUTE, field: other}) == "the record does not have this shape"


def test_a_record_from_before_weights_had_a_dtype_proves_those_of_the_dtype_of_x(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record({name: value for name, value in GEMM.items() if name != "weight_dtype"})))
    found = gate.read_record(path)
    assert why(found) is None
    assert why(found, {**GEMM, "weight_dtype": "float32"}) == "the record does not have this shape"


@pytest.mark.parametrize(
    ("dtypes", "words"),
    [
        ({}, "router_gemm of 2880x128 +bias"),
        ({"weight_dtype": "float32"}, "router_gemm of 2880x128 +bias with a float32 weight"),
        ({"dtype": "float32"}, "router_gemm of 2880x128 +bias in float32"),
    ],
)
def test_a_label_says_what_is_float32(dtypes: dict[str, str], words: str) -> None:
    assert gate.label({**GEMM, **dtypes}) == words


@pytest.mark.parametrize("name", gate.REQUIRED)
def test_every_check_is_required(name: str) -> None:
    for passed, word in ((None, "was not run"), (False, "failed")):
        assert f"{name} {word}" in str(why(record(with_check(ROUTE, name, passed)), ROUTE))
    left_out = {**ROUTE, "checks": [each for each in ROUTE["checks"] if each["check"] != name]}
    assert why(record(left_out), ROUTE) == f"{name} was not run"


def test_the_router_gemm_selects_no_experts() -> None:
    assert "experts" not in {each["check"] for each in GEMM["checks"]}
    assert "experts" in {each["check"] for each in ROUTE["checks"]}
    assert why(record(GEMM)) is None


def test_a_check_that_is_not_required_may_be_missing_and_may_not_fail() -> None:
    for passed, reason in ((True, None), (None, None), (False, "extra failed")):
        extra = {**GEMM, "checks": [*GEMM["checks"], check("extra", passed)]}
        assert (why(record(extra)) is None) == (reason is None)
        assert reason is None or reason in str(why(record(extra)))


def test_what_is_wrong_on_one_shape_is_trusted_on_none_of_the_operation() -> None:
    wrong = with_check({**GEMM, "hidden": 7168}, "load", False)
    assert "load failed, router_gemm of 7168x128 +bias" in str(why(record(GEMM, ROUTE, wrong)))
    assert why(record(GEMM, ROUTE, wrong), ROUTE) is None
    pallas = subject(implementation="pallas")
    assert why(record(GEMM, ROUTE, wrong, pallas), pallas) is None
    assert "load failed" in str(why(record(GEMM, wrong, quick=True)))  # which says more than that it was quick


def test_of_two_runs_of_a_shape_one_has_to_be_complete() -> None:
    short = with_check({**GEMM, "source": "checkpoint a"}, "load", None)
    assert why(record(short, GEMM)) is None
    assert why(record(short)) == "load was not run"


def test_a_sanitizer_that_found_something_distrusts_the_cuda_kernels_alone() -> None:
    pallas = subject(implementation="pallas")
    for passed, reason in ((False, "compute-sanitizer's memcheck failed (2 errors)"), (None, None)):
        found = record(GEMM, pallas, sanitizers=[{"tool": "memcheck", "passed": passed, "reason": "2 errors"}])
        assert why(found) == reason
        assert why(found, pallas) is None


def test_the_command_that_verifies_can_be_pasted() -> None:
    assert gate.how_to_verify(["cuda"]) == "jax-router verify --implementation cuda"
    assert gate.how_to_verify(["cuda", "pallas"], ["Kimi-K2"], quick=True) == (
        'jax-router verify --quick --implementation cuda --implementation pallas --model "Kimi-K2"'
    )


def test_the_hash_of_missing_sources_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise build.BuildError("the kernel sources are missing")

    assert gate.present_hash() == provenance.source_hash()
    gate.present_hash.cache_clear()
    monkeypatch.setattr(provenance, "source_hash", missing)
    assert gate.present_hash() is None
    gate.present_hash.cache_clear()
    assert "these are unknown" in str(why(record(GEMM), source_hash=None))


# Records on the disk ---------------------------------------------------------------------------------------------


def test_a_record_has_one_name_per_gpu() -> None:
    for gpu in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        assert gate.file_name(gpu) == f"verify-{sweep.gpu_name({'gpu': gpu})}.json"
    assert gate.file_name("NVIDIA H100 80GB HBM3") == "verify-h100_80gb_hbm3.json"


def test_what_is_kept_is_found_again(cache: Path) -> None:
    assert gate.kept("NVIDIA H200") is None
    path = gate.keep(record(GEMM))
    assert path == cache / "verify-h200.json"
    assert gate.kept("NVIDIA H200") == record(GEMM)
    assert gate.kept("NVIDIA H100 80GB HBM3") is None
    gate.keep(record(ROUTE))
    assert gate.kept("NVIDIA H200") == record(ROUTE)
    assert list(cache.iterdir()) == [path]


def test_records_of_no_gpu_and_of_foreign_libraries_are_not_kept(cache: Path) -> None:
    assert gate.keep(record(GEMM, provenance={"gpu": None})) is None
    assert gate.keep(record(GEMM, library="/tmp/mine.so")) is None
    assert not cache.exists()


def test_a_failure_is_remembered_until_a_full_run_passes_it() -> None:
    wrong = with_check(GEMM, "load", False, "3 wrong")
    gate.keep(record(wrong, sanitizers=[{"tool": "racecheck", "passed": False, "reason": None}]))
    later = {"provenance": {"date": "2026-03-04T00:00:00+00:00"}}
    for other in (record(ROUTE, **later), record(GEMM, quick=True, **later), record({**GEMM, "hidden": 8}, **later)):
        before = gate.kept("NVIDIA H200")
        gate.keep(other)
        assert gate.kept("NVIDIA H200")["subjects"][0] == (before if other["quick"] else other)["subjects"][0]
        assert "load failed (3 wrong), router_gemm of 2880x128 +bias, 2026-01-02" in str(why(gate.kept("NVIDIA H200")))
    gate.keep(record(GEMM, **later))
    assert why(gate.kept("NVIDIA H200")) == "compute-sanitizer's racecheck failed"
    gate.keep(record(GEMM, sanitizers=[{"tool": "racecheck", "passed": None, "reason": "no tool"}]))
    assert why(gate.kept("NVIDIA H200")) == "compute-sanitizer's racecheck failed"
    gate.keep(record(GEMM, sanitizers=[{"tool": "racecheck", "passed": True, "reason": None}]))
    assert why(gate.kept("NVIDIA H200")) is None


def test_what_fails_again_is_kept_once() -> None:
    wrong = with_check(GEMM, "load", False, "3 wrong")
    worse = with_check(GEMM, "bits", False, "row 5")
    for later, reason in ((record(wrong, ROUTE), "load failed (3 wrong)"), (record(worse), "bits failed (row 5)"),
                          (record(worse, quick=True), "load failed (3 wrong)")):  # fmt: skip
        gate.keep(record(wrong))
        gate.keep(later)
        kept = gate.kept("NVIDIA H200")
        assert [gate.label(each) for each in kept["subjects"] if not each["passed"]] == [gate.label(GEMM)]
        assert reason in str(why(kept))
        gate.keep(record(GEMM))


def test_a_sanitizer_that_fails_in_a_short_run_is_remembered_too() -> None:
    def tools(passed: bool) -> list[dict]:
        return [{"tool": "racecheck", "passed": passed, "reason": None}]

    for before in ([], tools(True)):
        gate.keep(record(GEMM, sanitizers=before))
        gate.keep(record(GEMM, quick=True, sanitizers=tools(False)))
        assert why(gate.kept("NVIDIA H200")) == "compute-sanitizer's racecheck failed"
        gate.keep(record(GEMM, quick=True, sanitizers=tools(True)))
        assert gate.kept("NVIDIA H200")["sanitizers"] == tools(False)
        gate.keep(record(GEMM, sanitizers=tools(True)))
        assert why(gate.kept("NVIDIA H200")) is None


def test_a_short_run_replaces_no_long_one_but_adds_what_it_failed() -> None:
    gate.keep(record(GEMM, ROUTE))
    gate.keep(record(GEMM, quick=True))
    assert gate.kept("NVIDIA H200") == record(GEMM, ROUTE)
    wrong = with_check(GEMM, "load", False, "1 wrong")
    gate.keep(record(wrong, ROUTE, quick=True))
    assert gate.kept("NVIDIA H200")["subjects"] == [GEMM, ROUTE, wrong]
    assert "load failed (1 wrong)" in str(why(gate.kept("NVIDIA H200")))


def test_a_failure_on_other_sources_is_forgotten() -> None:
    gate.keep(record(with_check(GEMM, "load", False), provenance={"source_hash": "f" * 64}))
    gate.keep(record(ROUTE))
    assert gate.kept("NVIDIA H200") == record(ROUTE)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ("\0", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'provenance'"),
        ("[" * 100_000, "RecursionError"),
        (json.dumps(record({**GEMM, "passed": "yes"})), "passed is 'yes'"),
        (json.dumps(record({**GEMM, "checks": [check("load", launches="many")]})), "launches is 'many'"),
        (json.dumps(record(GEMM, quick=None)), "quick is None"),
        (json.dumps(record(GEMM, provenance={"source_hash": None})), "source_hash is None"),
    ],
    ids=range(10),
)
def test_a_broken_kept_record_is_ignored_with_one_warning_that_says_what_to_delete(cache, content, what) -> None:
    cache.mkdir()
    path = cache / "verify-h200.json"
    path.write_text(content)
    with pytest.warns(RuntimeWarning, match=re.escape(f"delete {path} to be rid of it")) as caught:
        assert [gate.kept("NVIDIA H200") for _ in range(3)] == [None] * 3
    assert len(caught) == 1
    assert f"verification record {path} cannot be used (" in str(caught[0].message)
    assert what in str(caught[0].message)
    with pytest.warns(RuntimeWarning, match="to be rid of it"):
        gate.keep(record(GEMM))
    assert gate.kept("NVIDIA H200") == record(GEMM)


def test_every_part_that_is_read_has_to_be_there(tmp_path: Path) -> None:
    whole = record(GEMM)
    paths = [("provenance",), ("library",), ("quick",), ("interrupted",), ("subjects",), ("sanitizers",)]
    paths += [("provenance", name) for name in ("gpu", "date", "source_hash")]
    paths += [("subjects", 0, name) for name in (*gate.SUBJECT, "passed", "checks") if name != "weight_dtype"]
    paths += [("subjects", 0, "checks", 0, name) for name in ("check", "passed")]
    paths += [("sanitizers", 0, name) for name in ("tool", "passed")]
    for *parents, name in paths:
        broken = copy.deepcopy(whole)
        place = broken
        for parent in parents:
            place = place[parent]
        del place[name]
        path = tmp_path / "record.json"
        path.write_text(json.dumps(broken))
        with pytest.raises(
            ValueError, match=re.escape(f"(KeyError: '{name}'). Expected what jax-router verify writes")
        ):
            gate.read_record(path)


def test_without_a_cache_folder_nothing_is_kept_and_keeping_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise build.BuildError("there is no cache folder")

    monkeypatch.setattr(build, "cache_directory", none)
    assert gate.kept("NVIDIA H200") is None
    with pytest.warns(RuntimeWarning, match="no cache folder.*Set JAX_ROUTER_CACHE to a folder that can be written"):
        assert gate.keep(record(GEMM)) is None


def test_a_record_that_cannot_be_written_leaves_the_earlier_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.keep(record(GEMM))

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(gate.os, "replace", full)
    with pytest.warns(RuntimeWarning, match="is not kept for the dispatcher .No space left on device"):
        assert gate.keep(record(ROUTE)) is None
    assert gate.kept("NVIDIA H200") == record(GEMM)
    assert [path.name for path in cache.iterdir()] == ["verify-h200.json"]


def test_records_of_these_sources_come_before_others(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    stale, fresh = record(GEMM, provenance={"source_hash": "f" * 64}), record(GEMM)

    def found() -> tuple[dict[str, Any], str] | None:
        return gate.find_record("NVIDIA H200", (first, second), source_hash=HERE["source_hash"])

    assert found() is None
    path = gate.keep(fresh)
    assert found() == (fresh, str(path))
    for folder, content in ((first, stale), (second, fresh)):
        folder.mkdir()
        (folder / "verify-h200.json").write_text(json.dumps(content))
        assert found() == (fresh, str(path if folder == first else second / "verify-h200.json"))
    (first / "verify-h200.json").write_text(json.dumps(fresh))
    assert found() == (fresh, str(first / "verify-h200.json"))
    for kept in (path, second / "verify-h200.json"):
        kept.unlink()
    gate.kept.cache_clear()
    (first / "verify-h200.json").write_text(json.dumps(stale))
    assert found() == (stale, str(first / "verify-h200.json"))


def test_reading_a_kept_record_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gate.keep(record(GEMM))
    gate.kept("NVIDIA H200")
    monkeypatch.setattr(gate, "read_record", lambda path: pytest.fail("read again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gate.kept("NVIDIA H200") == record(GEMM)
