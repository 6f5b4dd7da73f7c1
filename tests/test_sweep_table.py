"""The dispatch table that a sweep writes: the fastest of what was checked, timed and verified."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import synthetic_rows
import typer
from synthetic_record import record, record_of, subject, with_check
from typer.testing import CliRunner

from jax_router import build, dispatch, provenance, sweep, sweep_run, sweep_table
from jax_router.sweep_points import Point, geometric_mean
from jax_router.sweep_table import refusals, table_of, table_path, write_table
from jax_router.tables import Table, Verification
from jax_router.verification import gate


def test_the_table_names_the_fastest_by_the_geometric_mean_of_warm_and_cold() -> None:
    def time(point: Point, method: str, weights: str) -> float:
        if method == "cupti" and point.tokens in (16, 64):
            # pallas wins warm, xla wins cold; the arithmetic mean would give xla both.
            pallas = (1.0, 6.0) if point.tokens == 16 else (1.0, 12.0)
            return {"cuda": (20.0, 20.0), "pallas": pallas, "xla": (3.0, 3.0)}[point.candidate][weights == "cold"]
        return synthetic_rows.constant_time(point, method, weights)

    rows = synthetic_rows.headline_rows(time, only_models=["Kimi-K2"])
    table = table_of(rows, record_of(rows))
    winners = {entry["tokens"]: entry["winner"] for entry in table["entries"]}
    assert winners == {1: "cuda", 16: "pallas", 64: "xla", 256: "cuda", 1024: "cuda", 4096: "cuda"}
    assert table["gpu"] == "NVIDIA H200"
    assert table["source_hash"] == synthetic_rows.PROVENANCE["source_hash"]
    entry = table["entries"][0]
    assert set(entry["candidates"]) == {"cuda", "pallas", "xla"}  # no peer ever wins
    assert entry["candidates"]["cuda"]["cupti_warm_us"] == [2.5 * factor for factor in (0.99, 1.0, 1.05)]
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2)


def test_only_checked_candidates_with_warm_and_cold_times_can_win() -> None:
    rows = synthetic_rows.headline_rows(only_models=["Kimi-K2"], only_tokens=[16], only_operations=["router_gemm"])
    for row in rows:
        if row["candidate"] == "cuda" and row["method"] == "cupti":
            row["check"] = {"passed": False, "worst_error": 99.0}
    rows = [row for row in rows if (row["candidate"], row["method"], row["weights"]) != ("pallas", "cupti", "cold")]
    (entry,) = table_of(rows, record_of(rows))["entries"]
    assert entry["winner"] == "xla"
    assert set(entry["candidates"]) == {"xla"}


def test_the_dispatcher_follows_the_written_table(tmp_path: Path) -> None:
    def time(point: Point, method: str, weights: str) -> float:
        # Not pallas: whether it runs at all depends on the version of JAX.
        slow = point.candidate in ("cuda", "pallas") and point.tokens is not None and point.tokens > 256
        return 50.0 if slow else synthetic_rows.constant_time(point, method, weights)

    rows = synthetic_rows.headline_rows(time)
    path = write_table(table_of(rows, record_of(rows)), tmp_path)
    assert path == tmp_path / "nvidia_h200.json" == table_path("NVIDIA H200", tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    document = json.loads(path.read_text())
    table = Table.parse(document)
    device = dispatch.Device("gpu", "NVIDIA H200", "9.0")
    for tokens, expected in ((1, "cuda"), (200, "cuda"), (900, "xla")):
        problem = dispatch.Problem(tokens, 7168, 256)
        assert dispatch.choose(problem, device, environment={}, table=table).implementation == expected


def test_rows_without_kernel_times_make_no_table() -> None:
    rows = [row for row in synthetic_rows.headline_rows(only_models=["Kimi-K2"]) if row["method"] != "cupti"]
    with pytest.raises(ValueError, match="Expected a sweep on a GPU"):
        table_of(rows, record_of(rows))


# What is accepted ------------------------------------------------------------------------------------------------

ONE = {"only_models": ["Kimi-K2"], "only_tokens": [16]}
ONE_MILLION = {
    "shapes": 1,
    "launches": 1_000_000,
    "by_dtypes": [{"dtype": "bfloat16", "weight_dtype": "bfloat16", "launches": 1_000_000}],
}


def winners(table: dict[str, Any]) -> dict[str, str]:
    return {entry["operation"]: entry["winner"] for entry in table["entries"]}


def test_a_table_names_the_record_that_it_went_by_and_the_launches_of_what_was_accepted() -> None:
    rows = synthetic_rows.headline_rows(**ONE)
    found = record_of(rows)
    found["subjects"].append(subject(hidden=24, experts=6))  # verified and not measured
    assert table_of(rows, found, "docs/results/verify-h200.json")["verification"] == {
        "record": "verify-h200.json",
        "gpu": "NVIDIA H200",
        "date": synthetic_rows.PROVENANCE["date"],
        "source_hash": synthetic_rows.PROVENANCE["source_hash"],
        "launches": 4_000_000,
        "accepted": {
            operation: dict.fromkeys(("cuda", "pallas"), ONE_MILLION) for operation in ("route", "router_gemm")
        },
    }
    assert Table.parse(table_of(rows, found)).verification.launches["route", "cuda", gate.IN_BFLOAT16] == 1_000_000


def test_without_a_record_only_xla_is_accepted() -> None:
    rows = synthetic_rows.headline_rows(**ONE)
    table = table_of(rows, None)
    assert table["verification"] is None
    assert winners(table) == {"router_gemm": "xla", "route": "xla"}
    for entry in table["entries"]:
        assert entry["candidates"]["xla"]["verified"] is True
        for name in gate.KERNELS:
            refused = entry["candidates"][name]
            assert refused["verified"] is False
            assert refused["reason"] == "there is no verification record of this GPU"
            assert refused["cupti_warm_us"]  # the raw times stay
    parsed = Table.parse(table)
    assert {tuple(row.microseconds) for (row,) in parsed.rows.values()} == {("xla",)}


@pytest.mark.parametrize(
    "change",
    [
        {"quick": True},
        {"library": "/tmp/mine.so"},
        {"provenance": {"gpu": "NVIDIA H100 80GB HBM3"}},
        {"provenance": {"source_hash": "f" * 64}},
    ],
    ids=str,
)
def test_a_record_that_proves_nothing_is_not_named(change: dict[str, Any]) -> None:
    rows = synthetic_rows.headline_rows(**ONE)
    table = table_of(rows, record_of(rows, **change))
    assert table["verification"] is None
    assert set(winners(table).values()) == {"xla"}


def test_an_implementation_is_accepted_for_the_shapes_that_it_was_verified_on() -> None:
    rows = synthetic_rows.headline_rows(only_models=["Kimi-K2", "OLMoE-1B-7B"], only_tokens=[16])
    found = record_of(rows)
    kimi = [each for each in found["subjects"] if each["hidden"] == 7168]
    partly = {**found, "subjects": [each for each in kimi if each["implementation"] == "cuda"]}
    by_hidden = {(entry["operation"], entry["hidden"]): entry for entry in table_of(rows, partly)["entries"]}
    assert {place: entry["winner"] for place, entry in by_hidden.items()} == {
        ("router_gemm", 2048): "xla", ("router_gemm", 7168): "cuda", ("route", 2048): "xla", ("route", 7168): "cuda"
    }  # fmt: skip
    assert by_hidden["route", 2048]["candidates"]["cuda"]["reason"] == "the record does not have this shape"
    assert by_hidden["route", 7168]["candidates"]["pallas"]["reason"] == "the record does not have this shape"
    assert table_of(rows, partly)["verification"]["accepted"]["route"] == {"cuda": ONE_MILLION}


def test_the_rule_of_a_route_is_part_of_what_is_verified() -> None:
    rows = synthetic_rows.headline_rows(**ONE, only_operations=["route"])
    found = record_of(rows)
    for each in found["subjects"]:
        each["rule"] = {**each["rule"], "top_k": 2}
    assert winners(table_of(rows, found)) == {"route": "xla"}


def test_what_failed_is_not_accepted_on_any_shape_of_the_operation() -> None:
    rows = synthetic_rows.headline_rows(only_models=["Kimi-K2", "OLMoE-1B-7B"], only_tokens=[16])
    found = record_of(rows)
    index = next(i for i, each in enumerate(found["subjects"]) if each["operation"] == "route")
    assert found["subjects"][index]["implementation"] == "cuda"
    found["subjects"][index] = with_check(found["subjects"][index], "load", False, "3 wrong")
    table = table_of(rows, found)
    assert winners(table) == {"router_gemm": "cuda", "route": "pallas"}
    assert set(table["verification"]["accepted"]["route"]) == {"pallas"}


def test_rows_of_kernels_alone_make_no_table_without_a_record() -> None:
    rows = [row for row in synthetic_rows.headline_rows(**ONE) if row["candidate"] != "xla"]
    assert table_of(rows, record_of(rows))["entries"]
    with pytest.raises(
        ValueError, match=r"neither xla nor a verified kernel .* Expected a sweep on a GPU that has them"
    ):
        table_of(rows, None)


def test_refusals_say_what_why_and_how_to_verify() -> None:
    rows = synthetic_rows.headline_rows(only_models=["Kimi-K2", "gpt-oss-120b"], only_tokens=[16, 64])
    whole = record_of(rows)
    assert refusals(table_of(rows, whole), rows) == []
    lines = refusals(table_of(rows, None), rows)
    places = "router_gemm of 2880x128 +bias, router_gemm of 7168x384, route of 2880x128 +bias, route of 7168x384"
    assert lines == [
        *(f"{name} on {places}: there is no verification record of this GPU" for name in ("cuda", "pallas")),
        "To verify: jax-router verify --implementation cuda --implementation pallas "
        '--model "gpt-oss-120b" --model "Kimi-K2"',
    ]
    partly = {**whole, "subjects": [each for each in whole["subjects"] if each["hidden"] == 2880]}
    partly["subjects"] += [each for each in whole["subjects"] if each["implementation"] == "pallas"]
    assert refusals(table_of(rows, partly), rows) == [
        "cuda on router_gemm of 7168x384, route of 7168x384: the record does not have this shape",
        'To verify: jax-router verify --implementation cuda --model "Kimi-K2"',
    ]


def test_launches_are_counted_by_dtypes_of_what_was_multiplied() -> None:
    wide = subject(weight_dtype="float32")
    found = gate.accepted(record(subject(), wide, subject(dtype="float32")), "verify-h200.json", [subject(), wide])
    assert found["accepted"]["router_gemm"]["cuda"]["by_dtypes"] == [
        {"dtype": "bfloat16", "weight_dtype": each, "launches": 1_000_000} for each in ("bfloat16", "float32")
    ]


# The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Complete rows of one model as on the H200 that measured them; a second measurement fails the test."""
    rows = synthetic_rows.headline_rows(only_models=["Kimi-K2"])
    (tmp_path / "rows").mkdir()
    path = synthetic_rows.write(tmp_path / "rows" / "sweep-h200.jsonl", rows)
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    monkeypatch.setattr(provenance, "provenance", lambda: dict(synthetic_rows.PROVENANCE))
    monkeypatch.setattr(sweep, "torch_with_gpu", lambda: SimpleNamespace())
    monkeypatch.setattr(sweep_run.Runner, "_run_shape", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(sweep_table.write_table, "__defaults__", (tmp_path / "tables",))
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    gate.kept.cache_clear()
    yield path
    gate.kept.cache_clear()


def resume(path: Path, *more: str) -> Any:
    app = typer.Typer()
    sweep.register(app)
    arguments = ("--suite", "headline", "--model", "Kimi-K2", "--resume", str(path), *more)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tables" / "nvidia_h200.json").read_text())


def record_file(path: Path, rows: Path, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = rows.read_text().splitlines()
    path.write_text(json.dumps(record_of(map(json.loads, lines), **more)))
    return path


def test_finished_rows_become_a_table_and_nothing_is_measured_again(finished: Path, tmp_path: Path) -> None:
    record_file(tmp_path / "record.json", finished)
    before = finished.read_bytes()
    result = resume(finished, "--write-table", "--verification", "record.json")
    assert result.exit_code == 0, result.output
    assert finished.read_bytes() == before
    assert "verification: record record.json" in result.output
    assert "not accepted" not in result.output
    assert written(tmp_path)["verification"]["record"] == "record.json"
    assert {entry["winner"] for entry in written(tmp_path)["entries"]} == {"cuda"}


@pytest.mark.parametrize("folder", ["docs/results", "rows", "cache"])
def test_the_record_is_looked_for_in_the_results_beside_the_rows_and_in_the_cache(finished, tmp_path, folder) -> None:
    record_file(tmp_path / folder / "verify-h200.json", finished)
    result = resume(finished, "--write-table")
    assert result.exit_code == 0, result.output
    assert written(tmp_path)["verification"]["record"] == "verify-h200.json"


@pytest.mark.parametrize("stale", [True, False])
@pytest.mark.parametrize("verified", [True, False])
def test_no_table_of_xla_alone_displaces_a_verified_one(
    verified: bool, stale: bool, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stale:
        other = {**synthetic_rows.PROVENANCE, "source_hash": "1" * 64}
        record_file(tmp_path / "rows" / "verify-h200.json", finished, provenance=other)
    here = synthetic_rows.PROVENANCE["source_hash"] if verified else "0" * 64
    in_use = Table("nvidia_h100.json", {}, Verification("NVIDIA H100 80GB HBM3", "2026-11-27", here, {}))
    monkeypatch.setattr(sweep, "load_table", lambda gpu: in_use if gpu == "NVIDIA H200" else None)
    result = resume(finished, "--write-table")
    assert (result.exit_code, (tmp_path / "tables").exists()) == ((2, False) if verified else (1, True))
    why = "the record is of other sources, 111111111111" if stale else "there is no verification record of this GPU"
    refusal = f"--write-table is given, {why}"
    assert (refusal in result.output) == verified


def test_what_is_not_accepted_is_printed_and_the_exit_status_says_so(finished: Path, tmp_path: Path) -> None:
    result = resume(finished, "--write-table")
    assert result.exit_code == 1
    assert "verification: no record of this GPU: of the implementations only xla is accepted" in result.output
    for name in gate.KERNELS:
        assert (
            f"not accepted in the table {name} on router_gemm of 7168x384, route of 7168x384: there is no"
            in result.output
        )
    command = 'jax-router verify --implementation cuda --implementation pallas --model "Kimi-K2"'
    assert f"To verify: {command}\n" in result.output
    assert {entry["winner"] for entry in written(tmp_path)["entries"]} == {"xla"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--write-table", "--verification", "none.json"),
            "--verification: verification record none.json cannot be used",
        ),
        (("--write-table", "--verification", "broken.json"), "record broken.json cannot be used (JSONDecodeError"),
        (("--write-table", "--verification", "rows"), "--verification: verification record rows cannot be used"),
        (
            ("--verification", "broken.json"),
            "--verification is broken.json and --write-table is missing. Expected both",
        ),
    ],
)
def test_a_record_that_is_none_is_refused_before_anything_runs(finished, tmp_path, options, message) -> None:
    (tmp_path / "broken.json").write_text('{"provenance": {}')
    result = resume(finished, *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "tables").exists()


def test_a_broken_record_in_the_results_is_refused_too(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "docs/results/verify-h200.json").write_text("{}")
    result = resume(finished, "--write-table")
    assert result.exit_code == 2
    assert "docs/results/verify-h200.json cannot be used (KeyError: 'provenance'). Expected what" in result.output


def test_the_command_to_go_on_names_the_record(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "_run_with_progress", interrupted)
    record_file(tmp_path / "record.json", finished)
    result = resume(finished, "--write-table", "--verification", "record.json")
    assert result.exit_code == 130
    assert "--write-table --verification record.json" in result.output
