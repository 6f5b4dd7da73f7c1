"""The dispatcher leaves out what its verification does not vouch for, says so once, and shows what there is."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import pytest
from synthetic_record import record, subject, with_check
from test_dispatch import A100, CPU, DOCUMENT, H200, PROBLEM, entry, kernels, times

import jax_router as jr
from jax_router import build, dispatch, provenance, tables
from jax_router.dispatch import Device, Problem, choose
from jax_router.tables import Table
from jax_router.verification import gate, standing

__all__ = ["kernels"]  # the fixture: both kernels take every problem on an H200, of which no verification is known
STANDINGS = dispatch.standings

HERE, OTHER = "0123456789abcdef" * 4, "f" * 64
H100 = "NVIDIA H100 80GB HBM3"
ROUTE = Problem(8, 2880, 128, bias_dtype="bfloat16", spec=jr.RoutingSpec(4))
EVERY = [subject(operation, name) for operation in tables.OPERATIONS for name in gate.KERNELS]
BF16, F16, MIXED, F32 = gate.OPERANDS["cuda"]


def verification(**more: Any) -> dict[str, Any]:
    def launches(of: Mapping[gate.Dtypes, int]) -> dict[str, Any]:
        by_dtypes = [
            {"dtype": dtype, "weight_dtype": weight_dtype, "launches": count}
            for (dtype, weight_dtype), count in of.items()
        ]
        return {"shapes": 12, "launches": sum(of.values()), "by_dtypes": by_dtypes}

    cuda, pallas = launches({BF16: 12_040_000, MIXED: 200_000, F32: 100_000}), launches({BF16: 900})
    accepted = {operation: {"cuda": cuda, "pallas": pallas} for operation in tables.OPERATIONS}
    facts = {"record": "verify-h200.json", "gpu": "NVIDIA H200", "date": "2026-11-26T01:02:03+00:00"}
    return {**facts, "source_hash": HERE, "launches": 48_000_000, "accepted": accepted, **more}


def document(*, float32: tuple[bool, bool] = (True, True), **more: Any) -> dict[str, Any]:
    """A table whose record passed everything; `float32` says which operations have verified float32 weights."""
    route = {**entry(8, "pallas", cuda=times(9, 9), xla=times(7, 7), pallas=times(3, 3)), "operation": "route"}
    wide = [
        {**entry(8, "xla", cuda=times(9, 9, verified=verified), xla=times(7, 7)), "operation": operation, **dtypes}
        for operation, verified in zip(tables.OPERATIONS, float32, strict=True)
        for dtypes in ({"weight_dtype": "float32"}, {"dtype": "float32"})
    ]
    return {"entries": [*DOCUMENT["entries"], route, *wide], "verification": verification(**more)}


def judge(table: dict[str, Any] | None, own: Any = None, gpu: str = "NVIDIA H200", **more: Any) -> standing.Standings:
    parsed = None if table is None else Table.parse(table, "nvidia_h200.json")
    return standing.judge(gpu, parsed, own, **{"source_hash": HERE, **more})


def chosen(table: dict[str, Any] | None, own: Any = None, problem: Problem = PROBLEM, **more: Any) -> dispatch.Choice:
    parsed = None if table is None else Table.parse(table, "nvidia_h200.json")
    return choose(problem, H200, **{"environment": {}, "table": parsed, "verification": judge(table, own), **more})


# What is known ---------------------------------------------------------------------------------------------------


def test_a_table_of_these_sources_vouches_for_what_its_record_passed() -> None:
    found = judge(document())
    assert not any(each.distrusted for each in found.values())
    for operation in tables.OPERATIONS:
        assert str(found[operation, "cuda", BF16]) == (
            "is verified: 12.0 million launches under load, 0 wrong, 2026-11-26, sources 0123456789ab"
        )
        assert "is verified: 900 launches under load" in str(found[operation, "pallas", BF16])
        assert "is verified: 0.2 million launches under load" in str(found[operation, "cuda", MIXED])
        assert "is verified: 0.1 million launches under load" in str(found[operation, "cuda", F32])


def test_the_record_of_the_twin_is_called_so() -> None:
    found = judge(document(), gpu=H100)
    assert str(found["route", "cuda", BF16]).startswith("is verified on NVIDIA H200, the same processor: 12.0 million")
    assert not found["route", "cuda", BF16].distrusted


ONE_OF_EACH = [{"dtype": dtype, "weight_dtype": weight, "launches": 1} for dtype, weight in (BF16, MIXED, F32)]
ONLY_CUDA = {"router_gemm": {"cuda": {"shapes": 3, "launches": 3, "by_dtypes": ONE_OF_EACH}}}


@pytest.mark.parametrize(
    ("table", "trusted", "reason"),
    [
        (DOCUMENT, (), "nvidia_h200.json names no verification record"),
        (
            document(source_hash=OTHER),
            (),
            "the verification record of nvidia_h200.json is of sources ffffffffffff, these are 0123456789ab",
        ),
        (
            document(accepted=ONLY_CUDA),
            (("router_gemm", "cuda"),),
            "nvidia_h200.json has no verified time of it for {operation}{dtypes}",
        ),
    ],
    ids=["absent", "stale", "not passed"],
)
def test_a_table_without_a_record_of_these_sources_vouches_for_nothing(table, trusted, reason) -> None:
    found = judge(table)
    assert len(found) == 12
    for (operation, name, dtypes), each in found.items():
        assert each.distrusted == ((operation, name) not in trusted)
        if each.distrusted:
            why = reason.format(operation=operation, dtypes=gate.in_words(*dtypes))
            assert str(each) == f"is not verified ({why}); run jax-router verify --implementation {name}"


def test_where_nothing_is_known_nothing_is_distrusted() -> None:
    for (_, name, dtypes), each in judge(None).items():
        assert not each.distrusted
        how = "--implementation cuda"  # a quick run has no float32 weights
        if dtypes in (BF16, F16):
            how = "--quick" if name == "cuda" else "--quick --implementation pallas"
        assert str(each) == f"is not verified on this GPU; run jax-router verify {how}"


def test_missing_sources_are_not_those_of_the_record() -> None:
    found = judge(document(), source_hash=None)
    assert all(each.distrusted for each in found.values())
    assert "these are unknown" in str(found["route", "cuda", BF16])


def test_the_users_own_failure_beats_the_table_for_the_operation_that_failed() -> None:
    own = record(*EVERY, with_check(subject("route", hidden=7168), "load", False, "3 wrong"))
    for table in (document(), DOCUMENT, None):
        found = judge(table, own)
        failed = [key for key, each in found.items() if "failed its verification" in str(each)]
        assert failed == [("route", "cuda", dtypes) for dtypes in gate.OPERANDS["cuda"]]
        assert found["route", "cuda", BF16].distrusted
        assert str(found["route", "cuda", BF16]) == (
            "failed its verification on this GPU (load failed (3 wrong), route of 7168x128 +bias, 2026-01-02); run "
            "jax-router verify --implementation cuda"
        )


def test_a_short_run_that_failed_counts() -> None:
    own = record(with_check(subject(), "bits", False), quick=True)
    assert judge(document(), own)["router_gemm", "cuda", BF16].distrusted


def test_the_users_own_success_makes_up_for_a_stale_table() -> None:
    for table in (DOCUMENT, document(source_hash=OTHER), None):
        found = judge(table, record(subject()))
        assert not found["router_gemm", "cuda", BF16].distrusted
        assert str(found["router_gemm", "cuda", BF16]) == (
            "is verified on this GPU: 1.0 million launches under load, 0 wrong, 2026-01-02, sources 0123456789ab"
        )
        assert found["route", "cuda", BF16].distrusted == (table is not None)


def test_a_short_run_makes_up_for_nothing_and_is_shown_where_there_is_nothing_else() -> None:
    own = record(*EVERY, quick=True)
    assert "is verified on this GPU by --quick: 1.0 million" in str(judge(None, own)["route", "pallas", BF16])
    assert judge(DOCUMENT, own)["route", "pallas", BF16].distrusted
    assert judge(document(), own) == judge(document())


@pytest.mark.parametrize(
    "more",
    [{"provenance": {"source_hash": OTHER}}, {"provenance": {"gpu": H100}}, {"library": "/tmp/mine.so"}],
    ids=str,
)
@pytest.mark.parametrize("passed", [True, False])
def test_an_own_record_of_something_else_says_nothing(passed: bool, more: dict[str, Any]) -> None:
    own = record(*[each if passed else with_check(each, "load", False) for each in EVERY], **more)
    for table in (document(), DOCUMENT, None):
        assert judge(table, own) == judge(table)


def test_an_own_record_that_is_not_complete_says_nothing() -> None:
    own = record(with_check(subject(), "load", None), interrupted=True)
    assert judge(DOCUMENT, own) == judge(DOCUMENT)


def test_a_named_library_is_the_users_choice_and_not_verified() -> None:
    for table in (document(), DOCUMENT):
        found = judge(table, library="/tmp/mine.so")
        expected = "comes from JAX_ROUTER_LIBRARY=/tmp/mine.so, which no verification is of"
        assert found["route", "cuda", BF16] == standing.Standing(expected)
        assert found["route", "pallas", BF16] == judge(table)["route", "pallas", BF16]


# The choice ------------------------------------------------------------------------------------------------------


def test_what_is_distrusted_is_not_chosen_by_its_time() -> None:
    assert chosen(document()).implementation == "pallas"
    assert chosen(document(), problem=ROUTE).implementation == "pallas"
    choice = chosen(document(accepted=ONLY_CUDA))
    assert (choice.implementation, choice.reason) == ("cuda", "4.00 us at tokens=8 in nvidia_h200.json")
    assert dict(choice.rejected)["pallas"] == str(judge(document(accepted=ONLY_CUDA))["router_gemm", "pallas", BF16])
    assert chosen(document(source_hash=OTHER)).implementation == "xla"
    assert chosen(document(source_hash=OTHER), problem=ROUTE).implementation == "xla"


def test_what_is_distrusted_is_not_chosen_by_the_heuristic() -> None:
    other = Problem(64, 7168, 256)
    assert chosen(document(), problem=other).implementation == "cuda"
    assert chosen(DOCUMENT, problem=other).implementation == "xla"
    failed = record(with_check(subject(), "load", False))
    assert chosen(None, problem=other).implementation == "cuda"
    assert chosen(None, failed, problem=other).implementation == "pallas"
    assert chosen(None, failed, problem=Problem(64, 7168, 256, spec=jr.RoutingSpec(4))).implementation == "cuda"


def test_what_is_named_runs_all_the_same() -> None:
    for more in (
        {"implementation": "cuda"},
        {"implementation": ("cuda", "xla")},
        {"environment": {dispatch.PREFER_VARIABLE: "cuda"}},
    ):
        choice = chosen(DOCUMENT, **more)
        assert choice.implementation == "cuda"
        assert ("cuda", str(judge(DOCUMENT)["router_gemm", "cuda", BF16])) in choice.verification


def test_another_reason_comes_before_the_verification() -> None:
    choice = chosen(DOCUMENT, environment={dispatch.DISABLE_VARIABLE: "cuda"}, unavailable={"pallas": "is broken"})
    assert dict(choice.rejected) == {"cuda": "is switched off by JAX_ROUTER_DISABLE=cuda", "pallas": "is broken"}
    assert choice.verification == ()
    assert choose(PROBLEM, A100, environment={}, verification=judge(DOCUMENT)).verification == ()


def test_the_explanation_has_a_line_for_every_kernel_that_could_run() -> None:
    assert str(chosen(document())).splitlines() == [
        "pallas: 3.00 us at tokens=8 in nvidia_h200.json",
        "  not cuda: took 4.00 us at tokens=8 in nvidia_h200.json",
        "  not xla: took 6.00 us at tokens=8 in nvidia_h200.json",
        "  cuda is verified: 12.0 million launches under load, 0 wrong, 2026-11-26, sources 0123456789ab",
        "  pallas is verified: 900 launches under load, 0 wrong, 2026-11-26, sources 0123456789ab",
    ]
    lines = str(chosen(DOCUMENT)).splitlines()
    why = "is not verified (nvidia_h200.json names no verification record); run jax-router verify --implementation"
    assert lines == [
        "xla: 6.00 us at tokens=8 in nvidia_h200.json",
        f"  not pallas: {why} pallas",
        f"  not cuda: {why} cuda",
    ]
    named = str(chosen(DOCUMENT, implementation="cuda")).splitlines()
    assert named[0] == "cuda: named by the argument implementation"
    assert named[-1] == f"  cuda {why} cuda"


# The process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Dispatch as if on an H200 with sources HERE; tables and kept records in two empty folders."""
    folder = tmp_path / "tables"
    folder.mkdir()
    monkeypatch.setattr(Device, "default", classmethod(lambda cls: H200))
    monkeypatch.setattr(tables.importlib.resources, "files", lambda package: folder)
    monkeypatch.setattr(dispatch, "standings", STANDINGS)
    monkeypatch.setattr(provenance, "source_hash", lambda: HERE)
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(build.LIBRARY_VARIABLE, raising=False)
    caches = (tables.load_table, gate.present_hash, gate.kept)
    for cache in caches:
        cache.cache_clear()
    yield folder
    for cache in caches:
        cache.cache_clear()


def explain(**more: Any) -> dispatch.Choice:
    return jr.explain(**{"tokens": 8, "hidden": 2880, "experts": 128, "bias": True, **more})


def test_a_stale_record_is_one_warning_that_says_how_to_verify(on_h200: Path) -> None:
    (on_h200 / "nvidia_h200.json").write_text(json.dumps(document(source_hash=OTHER)))
    with pytest.warns(RuntimeWarning) as caught:
        found = [explain(spec=spec).implementation for spec in (None, jr.RoutingSpec(4)) * 2]
    assert found == ["xla"] * 4
    why = "the verification record of nvidia_h200.json is of sources ffffffffffff, these are 0123456789ab"
    assert [str(each.message) for each in caught] == [
        f"jax_router chooses no kernel on NVIDIA H200 that its verification does not vouch for: cuda is not verified "
        f"({why}); pallas is not verified ({why}). Run jax-router verify --implementation cuda --implementation pallas "
        "there; what the argument implementation names is used all the same."
    ]


def test_a_failed_record_of_the_users_is_one_warning(on_h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (on_h200 / "nvidia_h200.json").write_text(json.dumps(document()))
    assert explain().implementation == "pallas"
    kept = record(with_check(subject(implementation="pallas"), "load", False))
    monkeypatch.setattr(gate, "kept", lambda gpu: kept)
    with pytest.warns(RuntimeWarning, match="pallas failed its verification on this GPU .load failed") as caught:
        assert [explain().implementation for _ in range(2)] == ["cuda", "cuda"]
    assert len(caught) == 1
    assert "Run jax-router verify --implementation pallas there" in str(caught[0].message)
    assert explain(spec=jr.RoutingSpec(4)).implementation == "pallas"


def test_what_does_not_matter_to_the_choice_is_not_warned_of(on_h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (on_h200 / "nvidia_h200.json").write_text(json.dumps(DOCUMENT))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("cuda", "xla", ("pallas", "xla")):
            explain(implementation=name)
        explain(device=H200)  # which is not here: the explanation says it
        monkeypatch.setenv(dispatch.DISABLE_VARIABLE, "cuda,pallas")
        assert explain().implementation == "xla"


def test_a_verified_table_and_a_gpu_without_one_warn_of_nothing(on_h200: Path) -> None:
    choice = explain()
    assert choice.implementation == "cuda"
    quick = "is not verified on this GPU; run jax-router verify --quick"
    assert choice.verification == (("cuda", quick), ("pallas", f"{quick} --implementation pallas"))
    (on_h200 / "nvidia_h100_80gb_hbm3.json").write_text(json.dumps(document(gpu=H100)))
    tables.load_table.cache_clear()
    choice = explain()
    assert choice.implementation == "pallas"
    assert dict(choice.verification)["cuda"].startswith(f"is verified on {H100}, the same processor: 12.0 million")


def test_what_verify_keeps_the_dispatcher_goes_by_from_then_on(on_h200: Path) -> None:
    assert explain().implementation == "cuda"
    gate.keep(record(with_check(subject(), "load", False)))
    with pytest.warns(RuntimeWarning, match="cuda failed its verification"):
        assert explain().implementation == "xla"
    gate.keep(record(subject()))
    assert explain().implementation == "cuda"
    assert "is verified on this GPU: 1.0 million" in dict(explain().verification)["cuda"]


def test_without_a_gpu_none_of_it_is_looked_at(on_h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (on_h200 / "cpu.json").write_text(json.dumps(DOCUMENT))
    for name in ("kept", "present_hash"):
        monkeypatch.setattr(gate, name, lambda *_: pytest.fail("looked at"))
    for device in (CPU, Device("tpu", "TPU v6"), jax.devices("cpu")[0]):
        assert explain(device=device).verification == ()


def test_without_a_table_and_a_record_no_source_is_hashed(on_h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "present_hash", lambda: pytest.fail("hashed"))
    assert explain().implementation == "cuda"


def test_it_is_judged_once_until_something_changes(on_h200: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, judge = [], standing.judge
    monkeypatch.setattr(standing, "judge", lambda *given, **more: asked.append(1) or judge(*given, **more))
    table = Table.parse(document())
    for changes in (
        lambda: dispatch.standings(H200, table),
        lambda: gate.keep(record(subject())),
        lambda: gate.keep(record(subject("route"))),
        lambda: monkeypatch.setenv(build.LIBRARY_VARIABLE, "/tmp/mine.so"),
    ):
        changes()
        before = len(asked)
        for _ in range(3):
            dispatch.standings(H200, table)
        assert len(asked) <= before + 1
    assert len(asked) == 4
    assert dispatch.standings(H200, table) == judge(
        "NVIDIA H200", table, gate.kept("NVIDIA H200"), source_hash=HERE, library="/tmp/mine.so"
    )


def test_the_import_brings_in_nothing_for_it() -> None:
    code = (
        "import sys, jax_router as jr; jr.explain(tokens=8, hidden=16, experts=4, device=jr.dispatch.Device('cpu')); "
        "print([name for name in ('build', 'provenance', 'toolchain') if f'jax_router.{name}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_table_with_a_broken_verification_is_a_broken_table(on_h200: Path) -> None:
    for broken in ([], {"accepted": []}, {**verification(), "accepted": {"route": {"cuda": {"launches": 1}}}}):
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
            Table.parse({**DOCUMENT, "verification": broken})
    (on_h200 / "nvidia_h200.json").write_text(json.dumps({**DOCUMENT, "verification": []}))
    with pytest.warns(RuntimeWarning, match="nvidia_h200.json is broken"):
        assert "no measurements" in explain().reason
