"""The tuner: every configuration is compared bit for bit and timed in rounds, and nothing that failed can win."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import synthetic_rows
import typer
from fake_kernels import Kernels
from typer.testing import CliRunner

from jax_router import sweep_points, sweep_table, timing, tune, tune_launch, tune_run
from jax_router.implementations import cuda
from jax_router.sweep_rows import read_rows
from jax_router.tune_launch import COMPARED_WEIGHTS, LAUNCHES
from jax_router.tune_run import ROUNDS

ONE = ("--model", "OLMoE-1B-7B", "--tokens", "3")
GEMM = (*ONE, "--operation", "router_gemm")
TUNER = tune_run.Tuner


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    library = Kernels()
    monkeypatch.setattr(cuda, "shared_library", lambda: library)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(tune_launch, "synchronize", lambda: None)
    return library


@pytest.fixture
def on_a_gpu(kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The command as on an H200, whose memory is the host's and whose table is in a folder of the test."""
    cpu = jax.local_devices(backend="cpu")[0]
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    monkeypatch.setattr(tune, "provenance", lambda: dict(synthetic_rows.PROVENANCE))
    monkeypatch.setattr(tune, "Tuner", lambda writer, **more: TUNER(writer, **{**more, "device": cpu}))
    for function in (sweep_table.write_configs, sweep_table.table_path):
        monkeypatch.setattr(function, "__defaults__", (tmp_path / "tables",))
    monkeypatch.chdir(tmp_path)
    return kernels


def run_tune(*arguments: str) -> Any:
    app = typer.Typer()
    tune.register(app)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "250"})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("sweep-results/tune-h200-*.jsonl")
    return read_rows(path)


# What is measured ------------------------------------------------------------------------------------------------


def test_the_default_is_the_headline_models_at_all_the_tokens_of_the_sweep() -> None:
    found = tune_run.points([], [], [])
    assert {model for point in found for model in point.shape.models} >= {"gpt-oss-120b", "DeepSeek-V3"}
    assert {(point.shape.size, point.shape.operation) for point in found} == {
        (size, operation)
        for size in ("2880x128 +bias", "7168x256", "7168x256 with a float32 weight")
        for operation in ("router_gemm", "route")
    }
    for operation, tokens, of_float32 in (
        ("router_gemm", sweep_points.ALL_TOKENS, sweep_points.SPARSE_TOKENS),
        ("route", sweep_points.ROUTE_TOKENS, sweep_points.ROUTE_FEW_TOKENS),
    ):
        of_operation = [point.tokens for point in found if point.shape.operation == operation]
        assert of_operation == [*tokens, *tokens, *of_float32]


def test_every_configuration_that_fits_is_compared_and_timed_in_every_round(on_a_gpu: Kernels, tmp_path: Path) -> None:
    result = run_tune(*GEMM)
    assert result.exit_code == 0, result.output
    (row,) = rows_of(tmp_path)
    assert (row["status"], row["pick"], row["winner"]) == ("ok", "few", "one")
    assert row["gain"] == pytest.approx(0.2)
    assert set(row["configs"]) == {"one", "few", "many"}  # "wide" does not fit
    for found in row["configs"].values():
        assert (found["verified"], found["launches"]) == (True, ROUNDS * LAUNCHES)
        for weights in ("warm", "cold"):
            assert [len(of_round) for of_round in found[f"{weights}_us"]] == [10] * ROUNDS
    # All rounds' buffers hold other weights.
    assert len(on_a_gpu.seen_weights) == ROUNDS * COMPARED_WEIGHTS
    measurements = on_a_gpu.timed[1:]  # the first one sizes the graph
    assert len(measurements) == ROUNDS * 3 * 2
    assert {each[2:] for each in measurements} == {(1, 192, 10), (timing.CALLS, 192, 10)}
    rounds = [tuple(each[1] for each in measurements[start : start + 6 : 2]) for start in (0, 6, 12)]
    assert all(set(each) == {"one", "few", "many"} for each in rounds)
    assert len(set(rounds)) > 1, "the order is shuffled"
    assert "takes 1.2500 times as long as the fastest configuration" in result.output


def test_long_kernels_are_replayed_less_often_and_hopeless_ones_only_in_one_round(
    on_a_gpu: Kernels, tmp_path: Path
) -> None:
    on_a_gpu.microseconds = lambda name, before: 1900.0 if name == "many" else 1000.0
    assert run_tune(*GEMM).exit_code == 0
    (row,) = rows_of(tmp_path)
    assert row["calls_per_sample"] == timing.CALLS
    assert {name: [len(each) for each in found["warm_us"]] for name, found in row["configs"].items()} == {
        "one": [3] * ROUNDS, "few": [3] * ROUNDS, "many": [3]
    }  # fmt: skip
    assert row["winner"] == "few"


def test_route_is_compared_with_two_launches_and_timed_without_logits(on_a_gpu: Kernels, tmp_path: Path) -> None:
    on_a_gpu.microseconds = lambda name, before: {"fused": 3.0, "two_launches": 4.0}[name]
    result = run_tune(*ONE, "--operation", "route")
    assert result.exit_code == 0, result.output
    (row,) = rows_of(tmp_path)
    assert (row["pick"], row["winner"], row["rule"]["top_k"]) == ("two_launches", "fused", 8)
    assert set(on_a_gpu.returned_logits) == {0, 1}


# What fails ------------------------------------------------------------------------------------------------------


def one_bit(name: str, outputs: list[np.ndarray]) -> None:
    if name in ("one", "fused"):
        outputs[0][-1:, -1:].view(np.uint32)[:] ^= 1


def unwritten(name: str, outputs: list[np.ndarray]) -> None:
    if name in ("one", "fused"):
        outputs[0][-1, -1] = np.nan


def other_expert(name: str, outputs: list[np.ndarray]) -> None:
    if name == "fused":
        outputs[1][-1, -1] ^= 1


def other_logit(name: str, outputs: list[np.ndarray]) -> None:
    if name == "fused":
        outputs[2][-1, -1] += 1


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        ("router_gemm", one_bit), ("router_gemm", unwritten),
        ("route", one_bit), ("route", unwritten), ("route", other_expert), ("route", other_logit),
    ],
)  # fmt: skip
def test_one_wrong_bit_disqualifies_a_configuration_and_the_status_says_so(
    operation: str, fault: Any, on_a_gpu: Kernels, tmp_path: Path
) -> None:
    on_a_gpu.break_outputs = fault
    result = run_tune(*ONE, "--operation", operation)
    assert result.exit_code == 1, result.output
    (row,) = rows_of(tmp_path)
    name = {"router_gemm": "one", "route": "fused"}[operation]
    assert row["configs"][name] == {
        "verified": False,
        "reason": "row 2 of launch 0 has other bits than the reference (1 of 3 rows differ)",
    }
    assert (row["status"], row["winner"]) == ("failed", row["pick"])
    assert name not in {each[1] for each in on_a_gpu.timed}
    assert f"{name}: row 2 of launch 0 has other bits" in result.output


def test_the_last_launch_of_the_last_round_is_compared_too(on_a_gpu: Kernels, tmp_path: Path) -> None:
    launches = []

    def late(name: str, outputs: list[np.ndarray]) -> None:
        launches.append(name)
        if launches.count("one") == ROUNDS * LAUNCHES:
            one_bit(name, outputs)

    on_a_gpu.break_outputs = late
    assert run_tune(*GEMM).exit_code == 1
    assert f"row 2 of launch {LAUNCHES - 1} has" in rows_of(tmp_path)[0]["configs"]["one"]["reason"]


def test_a_refused_launch_disqualifies_a_configuration(on_a_gpu: Kernels, tmp_path: Path) -> None:
    on_a_gpu.refused = {"one"}
    assert run_tune(*GEMM).exit_code == 1
    (row,) = rows_of(tmp_path)
    assert row["configs"]["one"] == {"verified": False, "reason": "launch 0: jr_router_gemm: no room"}
    assert (row["status"], row["winner"]) == ("failed", "few")


def test_a_configuration_that_cannot_be_timed_is_disqualified_alone(on_a_gpu: Kernels, tmp_path: Path) -> None:
    def microseconds(name: str, before: int) -> float:
        if name == "one":
            raise RuntimeError("no cluster of this size")
        return 3.0

    on_a_gpu.microseconds = microseconds
    assert run_tune(*GEMM).exit_code == 1
    (row,) = rows_of(tmp_path)
    one = row["configs"]["one"]
    assert (one["verified"], one["reason"]) == (False, "round 1: no cluster of this size")
    assert len(row["configs"]["few"]["warm_us"]) == ROUNDS
    assert (row["status"], row["winner"]) == ("failed", "few")


def test_nothing_is_timed_beside_a_pick_that_is_wrong(on_a_gpu: Kernels, tmp_path: Path) -> None:
    on_a_gpu.refused = {"few"}
    result = run_tune(*GEMM)
    assert result.exit_code == 1
    assert "No point was measured." in result.output
    assert rows_of(tmp_path)[0]["winner"] == "few"
    assert not on_a_gpu.timed


@pytest.mark.parametrize(
    ("operation", "fault", "message"),
    [
        ("route", lambda name, outputs: outputs[2].fill(1), "the logits of two_launches are not those of the naive"),
        ("route", lambda name, outputs: outputs[0].fill(np.nan), "the kernel that all are compared with leaves NaN"),
    ],
)
def test_without_a_right_reference_nothing_is_judged(
    operation: str, fault: Any, message: str, on_a_gpu: Kernels, tmp_path: Path
) -> None:
    on_a_gpu.break_outputs = fault
    result = run_tune(*ONE, "--operation", operation)
    assert result.exit_code == 1
    assert message in rows_of(tmp_path)[0]["reason"]
    assert message in result.output


def test_a_lost_device_ends_the_run(on_a_gpu: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: Any) -> None:
        raise RuntimeError("an illegal memory access")

    on_a_gpu.refused = {"one"}
    monkeypatch.setattr(tune_run, "assert_computes", lost)
    result = run_tune(*GEMM, "--tokens", "4")
    assert result.exit_code == 1
    assert "Now the device refuses everything: an illegal memory access" in result.output
    assert "Go on with" in result.output


# The command -----------------------------------------------------------------------------------------------------


def test_resume_measures_only_what_is_missing_or_failed(on_a_gpu: Kernels, tmp_path: Path) -> None:
    on_a_gpu.refused = {"one"}
    path = tmp_path / "rows.jsonl"
    assert run_tune(*GEMM, "--output", str(path)).exit_code == 1
    on_a_gpu.refused = set()
    assert run_tune(*GEMM, "--tokens", "4", "--resume", str(path)).exit_code == 0
    assert [(row["tokens"], row["status"]) for row in read_rows(path)] == [(3, "failed"), (3, "ok"), (4, "ok")]
    before = path.read_bytes()
    assert run_tune(*GEMM, "--tokens", "4", "--resume", str(path)).exit_code == 0
    assert path.read_bytes() == before


def test_ctrl_c_keeps_what_was_measured_and_says_how_to_go_on(on_a_gpu: Kernels, tmp_path: Path) -> None:
    def time(name: str, before: int) -> float:
        if before > 20:
            raise KeyboardInterrupt
        return 5.0

    on_a_gpu.microseconds = time
    result = run_tune(
        *GEMM, "--tokens", "4", "--tokens", "5", "--tokens", "6", "--tokens", "7", "--output", "rows.jsonl"
    )
    assert result.exit_code == 130, result.output
    kept = [row["tokens"] for row in read_rows(tmp_path / "rows.jsonl")]
    assert kept == [3, 4, 5]
    assert "--resume rows.jsonl --model OLMoE-1B-7B --tokens 3 --tokens 4" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt-5"), "model is 'gpt-5'. Expected one of"),
        (("--tokens", "0"), "tokens is 0. Expected 1 or more"),
        (("--operation", "gemm"), "operation is 'gemm'. Expected router_gemm or route"),
        (("--results", "here"), "--results is here and --compare is missing"),
        (("--output", "there.jsonl"), "--output is there.jsonl and it exists. Expected a new file"),
        (("--output", "new.jsonl", "--resume", "there.jsonl"), "--output is new.jsonl and --resume is given too"),
        (("--resume", "sweep.jsonl"), "rows file sweep.jsonl holds no rows of the tuner"),
        (("--resume", "missing.jsonl"), "missing.jsonl cannot be read"),
        (("--output", "there.jsonl/new.jsonl"), "Expected a place that can be written"),
        (("--write-table",), "--write-table is given and NVIDIA H200 has no table"),
        (("--compare", "there.jsonl", "sweep.jsonl"), "sweep.jsonl holds no rows of the tuner"),
        (("--compare", "there.jsonl", "there.jsonl"), "--compare names there.jsonl, which holds no row"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    arguments, message, on_a_gpu: Kernels, tmp_path: Path
) -> None:
    (tmp_path / "there.jsonl").write_text("")
    synthetic_rows.write(tmp_path / "sweep.jsonl", synthetic_rows.headline_rows(only_models=["Kimi-K2"])[:2])
    result = run_tune(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not on_a_gpu.timed


def test_without_a_gpu_the_command_says_that_it_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = jax.devices("cpu")
    monkeypatch.setattr(jax, "local_devices", lambda: cpus)
    result = run_tune()
    assert result.exit_code == 2
    assert "JAX has no GPU, only cpu. Expected one of compute capability 9.0" in result.output


def test_without_its_kernels_the_command_says_why(on_a_gpu: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda: "could not be built or loaded: no nvcc")
    result = run_tune()
    assert result.exit_code == 2
    assert "cuda could not be built or loaded: no nvcc. Expected its kernels" in result.output


def test_the_winners_are_written_into_the_table_of_the_gpu(on_a_gpu: Kernels, tmp_path: Path) -> None:
    path = tmp_path / "tables" / "nvidia_h200.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"gpu": "NVIDIA H200", "entries": [{"tokens": 1}]}))
    result = run_tune(*GEMM, "--write-table")
    assert result.exit_code == 0, result.output
    table = json.loads(path.read_text())
    assert table["entries"] == [{"tokens": 1}]
    (entry,) = table["configs"]["entries"]
    assert (entry["tokens"], entry["pick"], entry["winner"]) == (3, "few", "one")
    assert f"wrote {path}" in result.output
