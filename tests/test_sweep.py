"""The sweep: its rows, what it refuses to time, what it goes on after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_rows
from test_sweep_command import run_sweep, small_sweep

from jax_router import dispatch, sweep_run, timing, timing_launcher
from jax_router.sweep_data import ShapeData, rms_errors
from jax_router.sweep_points import (
    Point,
    Shape,
    points,
)
from jax_router.sweep_rows import RowsError, RowsWriter, comparable, finished, key, read_rows

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
    samples = timing.Samples("graph_replay", "warm", (1.0,), 1, "")
    monkeypatch.setattr(timing_launcher, "graph_replay", lambda *_, **__: samples)
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
