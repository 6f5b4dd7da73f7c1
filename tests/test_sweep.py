"""The sweep: its rows, its command, what it refuses to time, what survives an interruption."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_rows
import typer
from typer.testing import CliRunner

from jax_router import dispatch, report_plots, sweep, sweep_run, timing
from jax_router.sweep_data import ShapeData, rms_errors
from jax_router.sweep_points import (
    Point,
    Shape,
    points,
)
from jax_router.sweep_rows import RowsError, RowsWriter, comparable, finished, key, read_rows

SCRIPT = Path(__file__).parent.parent / "scripts" / "shape_sweep.py"
SMALL = Shape(64, 16, True, ("small",))
WALL = (("wall", "warm"),)
HALVES = (slice(0, 32), slice(32, 64))
HEADLINE = {"gpu": True, "torch_gpu": True}


# Rows ------------------------------------------------------------------------------------------------------------


def test_a_row_that_a_killed_sweep_did_not_finish_is_dropped(tmp_path: Path) -> None:
    rows = synthetic_rows.headline_rows(only_models=["Kimi-K2"])[:3]
    path = synthetic_rows.write(tmp_path / "rows.jsonl", rows)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert read_rows(path) == rows[:2]
    writer = RowsWriter(path)
    writer.write(rows[2])
    writer.close()
    assert path.read_bytes().count(b"\n") == 3
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}\n", "line 1, has no 'hidden'"), ("not json\n", "line 1, is not JSON"), ("3\n", "line 1, has no 'hidden'")],
)
def test_a_broken_rows_file_is_explained(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(RowsError, match=message):
        read_rows(path)
    result = run_sweep("--resume", str(path), "--model", "OLMoE-1B-7B", "--tokens", "1")
    assert result.exit_code == 2
    assert "delete that line" in " ".join(result.output.split())
    assert path.read_text() == content


def test_a_missing_rows_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(RowsError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")


def test_only_rows_of_the_same_sources_and_gpu_count_as_finished() -> None:
    rows = synthetic_rows.headline_rows(only_models=["Kimi-K2"])
    facts = synthetic_rows.PROVENANCE
    assert finished(rows, facts) == {key(row) for row in rows}
    assert finished(rows, {**facts, "source_hash": "other"}) == set()
    assert finished(rows, {**facts, "gpu": "NVIDIA H100"}) == set()
    assert finished(rows, {**facts, "date": "2030"}) == {key(row) for row in rows}
    assert finished([{**rows[0], "status": "failed"}], facts) == set()
    foreign = {**rows[0], "provenance": {**facts, "source_hash": "other"}}
    assert comparable([foreign, *rows]) == (rows, 1)


# The command -----------------------------------------------------------------------------------------------------


def run_sweep(*arguments: str) -> Any:
    app = typer.Typer()
    sweep.register(app)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def small_sweep(folder: Path, *more: str) -> Any:
    return run_sweep("--model", "OLMoE-1B-7B", "--tokens", "1", "--tokens", "3", "--output", str(folder), *more)


def test_the_command_checks_times_and_records(tmp_path: Path) -> None:
    result = small_sweep(tmp_path, "--implementation", "xla", "--implementation", "pallas")
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.jsonl")
    rows = read_rows(path)
    timed = [row for row in rows if "samples_us" in row and row["candidate"] == "xla"]
    assert {row["tokens"] for row in timed} == {1, 3}
    for row in timed:
        assert row["check"]["passed"]
        assert 0 <= row["check"]["worst_error"] < 1
        assert row["median_us"] == pytest.approx(np.median(row["samples_us"]), abs=1e-3)
        assert row["measured"]
        assert {"source_hash", "date", "jax", "gpu"} <= set(row["provenance"])
    assert "OLMoE-1B-7B" in result.output
    if jax.default_backend() != "gpu":
        assert "No GPU" in result.output


def test_resume_measures_only_what_is_missing(tmp_path: Path) -> None:
    small_sweep(tmp_path, "--implementation", "xla")
    (path,) = tmp_path.glob("*.jsonl")
    before = path.read_text().splitlines(keepends=True)
    assert small_sweep(tmp_path, "--implementation", "xla", "--resume", str(path)).exit_code == 0
    assert path.read_text().splitlines(keepends=True) == before
    kept = [line for line in before if '"tokens":3' not in line]
    path.write_text("".join(kept))
    result = small_sweep(tmp_path, "--implementation", "xla", "--resume", str(path))
    after = path.read_text().splitlines(keepends=True)
    assert result.exit_code == 0
    assert after[: len(kept)] == kept
    # With a GPU the kernel times of all points stand at the end of a run, so a resumed file has another order.
    assert sorted(map(repr, map(key, map(json.loads, after)))) == sorted(map(repr, map(key, map(json.loads, before))))
    assert list(tmp_path.glob("*.jsonl")) == [path]


@pytest.mark.parametrize("fact", ["source_hash", "jax"])
def test_resume_measures_again_after_a_change(tmp_path: Path, fact: str) -> None:
    small_sweep(tmp_path, "--implementation", "xla")
    (path,) = tmp_path.glob("*.jsonl")
    stale = path.read_text().replace(f'"{fact}":"', f'"{fact}":"old')
    path.write_text(stale)
    result = small_sweep(tmp_path, "--implementation", "xla", "--resume", str(path))
    assert "of other sources" in result.output
    rows = read_rows(path)
    assert len(rows) == 2 * len(stale.splitlines())
    assert comparable(rows) == (rows[len(rows) // 2 :], len(rows) // 2)


def test_an_empty_selection_is_an_error() -> None:
    result = run_sweep("--model", "OLMoE-1B-7B", "--implementation", "no_routing", "--tokens", "7")
    assert result.exit_code == 2
    assert "no point is left" in result.output


def test_ctrl_c_keeps_the_rows_and_resume_finishes(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, str(SCRIPT), "--suite", "quick", "--model", "Kimi-K2", "--model", "OLMoE-1B-7B"]
    # A job in the background ignores SIGINT and hands that down; a handler of its own is not handed down.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*command, "--output", "results"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, inherited)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        found = list(tmp_path.glob("results/*.jsonl"))
        if found and found[0].read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    (path,) = tmp_path.glob("results/*.jsonl")
    kept = read_rows(path)
    assert len(kept) >= 2
    (printed,) = (line for line in output.splitlines() if f"--resume {path.relative_to(tmp_path)}" in line)
    done = subprocess.run(
        shlex.split(printed), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(path)
    assert rows[: len(kept)] == kept
    expected = points("quick", gpu=False, torch_gpu=False, only_models=["Kimi-K2", "OLMoE-1B-7B"])
    timed = [key(row) for row in rows if "samples_us" in row]
    assert sorted(timed) == sorted(point.key(*each) for point in expected for each in point.measurements)


@pytest.mark.parametrize(
    ("called", "arguments", "again"),
    [
        (["python3", "-m", "jax_router", "sweep"], ["sweep"], ["python3", "-m", "jax_router", "sweep"]),
        (["python3", "/bin/jax-router", "sweep"], ["sweep"], ["python3", "/bin/jax-router", "sweep"]),
        (["python3", "scripts/shape_sweep.py"], [], ["python3", "scripts/shape_sweep.py"]),
    ],
)
def test_the_command_to_go_on_is_the_one_that_was_called(called, arguments, again, monkeypatch) -> None:
    options = ["--suite", "full"]
    monkeypatch.setattr(sys, "orig_argv", [*called, *options])
    monkeypatch.setattr(sys, "argv", ["a path", *arguments, *options])
    assert sweep._own_command() == again


@pytest.mark.parametrize("option", ["--output", "--resume"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "folder"
    result = run_sweep("--model", "OLMoE-1B-7B", "--tokens", "1", option, str(place))
    assert result.exit_code == 2
    flat = " ".join(result.output.split())
    assert ("Expected a place that can be written" if option == "--output" else "cannot be read") in flat
    assert str(place) in flat


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--write-table"], "JAX has no GPU"),
        (["--compile-threads", "-3"], "is -3. Expected at least 1"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(tmp_path: Path, options, message, monkeypatch) -> None:
    cpus = jax.devices("cpu")
    monkeypatch.setattr(jax, "local_devices", lambda: cpus)
    result = small_sweep(tmp_path, *options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_plots_stand_beside_the_rows(tmp_path: Path) -> None:
    result = small_sweep(tmp_path, "--implementation", "xla")
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.jsonl")
    plots = {plot.name.removeprefix(path.stem) for plot in tmp_path.iterdir() if plot != path}
    assert {"-time-models.png", "-time-models.svg"} <= plots


def test_what_cannot_be_written_loses_no_row_and_no_summary(tmp_path: Path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(report_plots, "write_plots", full)
    result = small_sweep(tmp_path, "--implementation", "xla")
    assert result.exit_code == 1
    flat = " ".join(result.output.split())
    assert "not everything could be written: No space left on device" in flat
    assert "OLMoE-1B-7B" in flat
    (path,) = tmp_path.iterdir()
    assert len(read_rows(path)) > 2


# Checks come before times ----------------------------------------------------------------------------------------


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[sweep_run.Runner]:
    writer = RowsWriter(tmp_path / "rows.jsonl")
    yield sweep_run.Runner(writer, provenance={"gpu": None}, device=jax.devices("cpu")[0])
    writer.close()


def small_points(candidate: str = "xla", measurements: Any = WALL) -> list[Point]:
    return [Point(SMALL, tokens, candidate, measurements) for tokens in (2, 8)]


def test_a_point_that_fails_its_check_is_not_timed(runner: sweep_run.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    right = runner.calls["xla"]

    def wrong(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        logits = right(x, weight, bias)
        return logits if x.shape[0] == 2 else logits.at[5, 3].add(0.01)

    runner.calls["xla"] = wrong
    monkeypatch.setattr(timing, "wall", lambda *_, **__: timing.Samples("wall", "warm", (1.0,), 1, ""))
    runner.run(small_points())
    rows = read_rows(runner.writer.path)
    assert [(row["tokens"], row["method"], row["status"]) for row in rows] == [
        (2, "check", "ok"),
        (2, "wall", "ok"),
        (8, "check", "failed"),
    ]
    assert rows[-1]["check"]["worst_error"] > 1
    assert "(5, 3)" in rows[-1]["reason"]
    assert len(runner.failed) == 1


def test_a_failed_point_makes_the_exit_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        return jnp.zeros((x.shape[0], weight.shape[0]))

    monkeypatch.setattr(sweep_run, "implementation_calls", lambda: dict.fromkeys(dispatch.IMPLEMENTATIONS, wrong))
    result = small_sweep(tmp_path, "--implementation", "xla")
    assert result.exit_code == 1, result.output
    assert "2 failed" in result.output


def test_one_broken_point_does_not_end_the_sweep(runner: sweep_run.Runner) -> None:
    right = runner.calls["xla"]

    def broken(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        if x.shape[0] == 2:
            raise RuntimeError("out of luck")
        return right(x, weight, bias)

    runner.calls["xla"] = broken
    runner.run(small_points())
    rows = read_rows(runner.writer.path)
    assert [(row["tokens"], row["status"]) for row in rows] == [(2, "failed"), (8, "ok"), (8, "ok")]
    assert rows[0]["reason"] == "RuntimeError: out of luck"


def test_what_this_machine_does_not_run_is_skipped_with_its_reason(runner: sweep_run.Runner) -> None:
    runner.run(small_points("cuda"))
    rows = read_rows(runner.writer.path)
    assert {row["status"] for row in rows} == {"skipped"}
    assert "compute capability 9.0" in rows[0]["reason"]
    assert not runner.failed


def test_a_lost_device_ends_the_sweep_and_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xla = sweep_run.implementation_calls()["xla"]

    def faulty(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        if x.shape[0] == 3:
            raise RuntimeError("an illegal memory access was encountered")
        return xla(x, weight, bias)

    def refuse(device: jax.Device) -> None:
        raise RuntimeError("Callback registry is closed")

    monkeypatch.setattr(sweep_run, "implementation_calls", lambda: dict.fromkeys(dispatch.IMPLEMENTATIONS, faulty))
    monkeypatch.setattr(sweep_run, "assert_computes", refuse)
    result = small_sweep(tmp_path, "--tokens", "5", "--implementation", "xla")
    assert result.exit_code == 1, result.output
    flat = " ".join(result.output.split())
    assert "illegal memory access was encountered. Now the device refuses everything: RuntimeError: Callback" in flat
    (path,) = tmp_path.glob("*.jsonl")
    assert f"--resume {path}" in flat
    rows = read_rows(path)
    assert {row["tokens"] for row in rows} == {1, 3}, "nothing is measured after the fault"
    assert [row["status"] for row in rows if row["tokens"] == 3] == ["failed"]
    monkeypatch.undo()
    assert small_sweep(tmp_path, "--tokens", "5", "--implementation", "xla", "--resume", str(path)).exit_code == 0
    timed = {row["tokens"] for row in comparable(read_rows(path))[0] if "samples_us" in row}
    assert timed == {1, 3, 5}


def test_a_replay_that_writes_other_bits_fails(runner: sweep_run.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "graph_replay", lambda *_, **__: timing.Samples("graph_replay", "warm", (1.0,), 1, ""))
    runner.run(small_points(measurements=(("graph_replay", "warm"), *WALL))[:1])
    rows = read_rows(runner.writer.path)
    assert [(row["method"], row["status"]) for row in rows] == [
        ("check", "ok"),
        ("graph_replay", "failed"),
        ("wall", "ok"),
    ]
    assert "other bits" in rows[1]["reason"]


def test_the_progress_reaches_its_total(runner: sweep_run.Runner) -> None:
    steps = []
    runner.advance = lambda cost, label: steps.append(cost)
    todo = [*small_points(), *small_points("cuda")]
    total = runner.cost(todo)
    runner.run(todo)
    assert sum(steps) == total > 0
    assert runner.cost([]) == 0


class FakeGpu:
    platform = "gpu"


def test_row_bits_are_compared_between_batches() -> None:
    data = ShapeData(SMALL, [2, 8], jax.devices("cpu")[0])
    x, weight = data.x.astype(np.float64), data.weight.astype(np.float64)
    assert data.bias is not None
    logits = (x @ weight.T + data.bias.astype(np.float64)).astype(np.float32)
    data.device = FakeGpu()  # type: ignore[assignment]  # the promise holds there
    assert data.check("cuda", logits[:2])["passed"]
    assert data.check("cuda", logits)["passed"]
    other = logits.copy()
    other[1, 3] = np.nextafter(other[1, 3], np.float32(9))
    assert data.check("xla", other)["passed"]
    result = data.check("cuda", other)
    assert not result["passed"]
    assert "row 1 has other bits" in result["reason"]


def test_checked_rows_reach_the_last_token() -> None:
    data = ShapeData(SMALL, [1, 512], jax.devices("cpu")[0])
    logits = (data.x.astype(np.float32) @ data.weight.astype(np.float32).T) + data.bias.astype(np.float32)
    assert data.check("xla", logits)["passed"]
    logits[-1, -1] += 0.01
    assert not data.check("xla", logits)["passed"]


def test_a_peer_may_round_to_bfloat16_but_not_compute_something_else() -> None:
    data = ShapeData(SMALL, [64], jax.devices("cpu")[0])
    logits = (data.x.astype(np.float32) @ data.weight.astype(np.float32).T) + data.bias.astype(np.float32)
    rounded = logits.astype(jnp.bfloat16)
    assert data.check("torch_linear", rounded)["passed"]
    assert not data.check("torch_linear", rounded - data.bias)["passed"]
    halves = [data.x[:, part].astype(np.float32) @ data.weight[:, part].astype(np.float32).T for part in HALVES]
    split = sum((half.astype(jnp.bfloat16) for half in halves), start=data.bias)  # what cuBLAS may do
    assert data.check("torch_linear", split)["passed"]
    assert not data.check("xla", split)["passed"]


@pytest.mark.parametrize("kind", ["zero mean", "with a mean"])
def test_rms_errors_compare_with_float32_sgemm(kind: str) -> None:
    calls = {"xla": sweep_run.implementation_calls()["xla"]}
    errors = rms_errors(SMALL, kind, jax.devices("cpu")[0], calls, None, tokens=64)
    assert set(errors) == {"xla", "float32_sgemm"}
    assert all(0 < error < 1e-5 for error in errors.values())


def test_cupti_is_attached_after_everything_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has attached CUPTI is not one to time other launches in."""
    order: list[str] = []

    class Recorder(sweep_run.Runner):
        def _compile(self, data, points):
            return {}

        def _refused(self, point):
            return None

        def _run_point(self, point, missing, data, executables):
            self.passed[point] = None
            self._time(point, missing, data, executables, None)

        def _time(self, point, missing, data, executables, check, logits=None):
            order.extend(method for method, _ in missing)

    monkeypatch.setattr(sweep_run, "ShapeData", lambda *arguments: None)
    todo = points("headline", **HEADLINE, only_models=["gpt-oss-120b", "OLMoE-1B-7B"], only_tokens=[1, 64])
    writer = RowsWriter(tmp_path / "rows.jsonl")
    Recorder(writer, provenance={}, device=jax.devices()[0]).run(todo)
    writer.close()
    first = order.index("cupti")
    assert set(order[first:]) == {"cupti"}
    assert {"graph_replay", "torch_replay", "chain_slope"} <= set(order[:first])
