"""`jax-router sweep` as a command: what it writes, resumes, refuses, and keeps when it is interrupted."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from jax_router import report_plots, sweep
from jax_router.sweep_points import (
    points,
)
from jax_router.sweep_rows import comparable, key, read_rows

SCRIPT = Path(__file__).parent.parent / "scripts" / "shape_sweep.py"


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
    timed = [repr(key(row)) for row in rows if "samples_us" in row]
    assert sorted(timed) == sorted(repr(point.key(*each)) for point in expected for each in point.measurements)


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
    assert sweep.own_command("sweep") == again


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


def test_ctrl_c_while_the_plots_are_drawn_is_an_interruption_too(tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report_plots, "write_plots", interrupted)
    result = small_sweep(tmp_path, "--implementation", "xla")
    assert result.exit_code == 130
    (path,) = tmp_path.iterdir()
    assert f"--resume {path}" in " ".join(result.output.split())
    assert len(read_rows(path)) > 2
