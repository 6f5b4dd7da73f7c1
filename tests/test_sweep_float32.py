"""Routers with float32 weights in the sweep: measured, judged, shown and looked up apart from those of 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_rows
from synthetic_record import record_of
from test_sweep import WALL
from test_sweep_results import bars, one

from jax_router import dispatch, parity, report, report_plots, sweep_run, timing_launcher, timing_torch, tune_launch
from jax_router.implementations import cuda
from jax_router.routing import RoutingSpec
from jax_router.sweep_data import ShapeData, rms_errors
from jax_router.sweep_points import (
    FLOAT32_PEER,
    FLOAT32_WEIGHTS,
    PEERS,
    ROUTE_FEW_TOKENS,
    SPARSE_TOKENS,
    Point,
    Shape,
    float32_shapes,
    points,
)
from jax_router.sweep_route import RouteData, route_calls
from jax_router.sweep_rows import RowsWriter, by_weights, finished, key, read_rows
from jax_router.sweep_speed import geometric_means
from jax_router.sweep_summary import lines
from jax_router.sweep_table import table_of
from jax_router.tables import Table
from jax_router.tune_table import configs_of

ON_GPU = {"gpu": True, "torch_gpu": True}
MIXED = Shape(64, 16, True, ("small",), weight_dtype="float32")
WIDE = Shape(64, 16, True, ("small",), dtype="float32", weight_dtype="float32")
ROUTED = Shape(64, 16, False, ("small",), RoutingSpec(4), dtype="bfloat16", weight_dtype="float32")
both_dtypes = pytest.mark.parametrize("shape", [MIXED, WIDE], ids=lambda shape: shape.dtype)
ROWS = synthetic_rows.headline_rows()
USUAL, FLOAT32 = by_weights(ROWS)


def cpu() -> jax.Device:
    return jax.devices("cpu")[0]


# Points ----------------------------------------------------------------------------------------------------------


def test_the_headline_suite_measures_them_last() -> None:
    found = points("headline", **ON_GPU)
    wanted = [point for point in found if point.shape.weight_dtype == "float32"]
    assert wanted == found[-len(wanted) :]
    assert list(dict.fromkeys(point.shape for point in wanted)) == list(float32_shapes())
    kinds = [(shape.models, shape.dtype, shape.operation) for shape in float32_shapes()]
    assert kinds == [
        ((model,), dtype, operation) for operation in ("router_gemm", "route") for model, dtype in FLOAT32_WEIGHTS
    ]
    for shape in float32_shapes():
        of_shape = [point for point in wanted if point.shape == shape]
        gemm = shape.spec is None
        tokens = SPARSE_TOKENS if gemm and shape.dtype == "bfloat16" else ROUTE_FEW_TOKENS
        assert {point.tokens for point in of_shape if point.candidate == "cuda"} == set(tokens)
        by_name = {point.candidate: {method for method, _ in point.measurements} for point in of_shape}
        expected = {"cuda": {"graph_replay", "cupti"}, "xla": {"cupti"}}
        more = {FLOAT32_PEER: {"torch_replay"}, "read_weight": {"graph_replay"}, "accuracy": {"rms"}}
        assert by_name == (expected | more if gemm else expected)


def test_other_suites_and_other_points_have_none() -> None:
    for suite, gpu in (("quick", True), ("headline", False), ("full", False)):
        assert {point.shape.weight_dtype for point in points(suite, gpu=gpu, torch_gpu=gpu)} == {"bfloat16"}
    assert FLOAT32_PEER not in {point.candidate for point in points("headline", gpu=True, torch_gpu=False)}
    usual = {point.candidate for point in points("headline", **ON_GPU) if point.shape.weight_dtype == "bfloat16"}
    assert FLOAT32_PEER not in usual
    assert {*PEERS, "cuda", "xla"} <= usual


# Checks and errors -----------------------------------------------------------------------------------------------


@both_dtypes
def test_they_are_checked_and_recorded_like_any_other(shape: Shape, tmp_path: Path, monkeypatch) -> None:
    asked = []
    refuse = dispatch.why_unsupported
    monkeypatch.setattr(dispatch, "why_unsupported", lambda *problem: (asked.append(problem[0]), refuse(*problem))[1])
    runner = sweep_run.Runner(RowsWriter(tmp_path / "rows.jsonl"), provenance={"gpu": None}, device=cpu())
    todo = [Point(shape, 8, name, WALL) for name in ("xla", "cuda")]
    runner.run(todo)
    runner.writer.close()
    rows = read_rows(runner.writer.path)
    assert [(row["candidate"], row["method"], row["status"]) for row in rows] == [
        ("xla", "check", "ok"), ("xla", "wall", "ok"), ("cuda", "check", "skipped")
    ]  # fmt: skip
    assert {(row["dtype"], row["weight_dtype"]) for row in rows} == {(shape.dtype, "float32")}
    assert {(each.dtype, each.weight_dtype, each.bias_dtype) for each in asked} == {
        (shape.dtype, "float32", shape.dtype)
    }
    assert key(rows[1]) == todo[0].key("wall", "warm")
    assert key(rows[1]) != Point(Shape(64, 16, True, ("small",)), 8, "xla", WALL).key("wall", "warm")


@both_dtypes
def test_a_product_of_fewer_bits_fails_its_check(shape: Shape) -> None:
    data = ShapeData(shape, [8], cpu())
    assert (data.x.dtype.name, data.weight.dtype.name, data.bias.dtype.name) == (shape.dtype, "float32", shape.dtype)
    x, bias = data.x.astype(np.float64), data.bias.astype(np.float64)
    assert data.check("cuda", (x @ data.weight.astype(np.float64).T + bias).astype(np.float32))["passed"]
    tf32 = (data.weight.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)
    for name in ("cuda", "xla", FLOAT32_PEER):
        assert not data.check(name, (x @ tf32.T + bias).astype(np.float32))["passed"], name


@both_dtypes
def test_what_an_implementation_may_lose_is_what_it_may_lose_of_float32(shape: Shape, monkeypatch) -> None:
    asked = []
    accumulation = parity.accumulation_of
    monkeypatch.setattr(
        parity, "accumulation_of", lambda name, **more: (asked.append(more["dtype"]), accumulation(name, **more))[1]
    )
    ShapeData(shape, [8], cpu()).check("xla", np.zeros((8, 16), np.float32))
    assert asked == ["float32"]


def test_routing_with_a_float32_weight_passes_its_check() -> None:
    data = RouteData(ROUTED, [8], cpu())
    operands = data.operands(8)
    call = jax.jit(route_calls(data.spec)["xla"])
    assert data.check("xla", jax.device_get(call(operands.x, operands.weights[0], operands.bias)))["passed"]
    narrow = operands.weights[0].astype(jnp.bfloat16)
    assert not data.check("xla", jax.device_get(call(operands.x, narrow, operands.bias)))["passed"]


@both_dtypes
def test_the_peer_multiplies_in_float32(shape: Shape) -> None:
    torch = pytest.importorskip("torch")
    data = ShapeData(shape, [8], cpu())
    x, weights, bias = timing_torch.as_torch(torch, data.operands(8))
    logits = data.peer(torch, FLOAT32_PEER)(x, weights[0], bias)
    assert logits.dtype == torch.float32
    assert data.check(FLOAT32_PEER, logits.numpy())["passed"]


@pytest.mark.parametrize("with_torch", [False, True])
@both_dtypes
def test_their_errors_are_those_of_float32(shape: Shape, with_torch: bool) -> None:
    torch = pytest.importorskip("torch") if with_torch else None
    xla = sweep_run.implementation_calls()["xla"]

    def narrow(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return xla(x, weight.astype(jnp.bfloat16).astype(weight.dtype), bias)

    errors = rms_errors(shape, "zero mean", cpu(), {"xla": xla, "cuda": narrow}, torch, tokens=64)
    assert set(errors) == {"cuda", "xla", "float32_sgemm"}
    assert all(0 < errors[name] < 1e-6 for name in ("xla", "float32_sgemm"))
    assert errors["cuda"] > 1e-4, "weights are drawn with all their bits"


# Bars ------------------------------------------------------------------------------------------------------------


def test_the_other_bars_and_the_means_are_the_same_without_them() -> None:
    """However slow and wrong they are."""
    wrong = [{**row, "samples_us": [1e6]} if "samples_us" in row else row for row in FLOAT32]
    wrong = [{**row, "rms_error": {"cuda": 1.0, "float32_sgemm": 1e-7}} if "rms_error" in row else row for row in wrong]
    wrong = [{**row, "status": "failed", "reason": "wrong"} if row["method"] == "check" else row for row in wrong]
    usual, found = bars(USUAL), bars([*wrong, *USUAL])
    apart = {claim for claim in found if claim.startswith("float32 weights:")}
    assert {claim: bar for claim, bar in found.items() if claim not in apart} == {
        claim: bar for claim, bar in usual.items() if claim not in apart
    }
    assert len(apart) == 2
    assert {found[claim].met for claim in apart} == {False}
    assert {usual[claim].met for claim in apart} == {None}
    assert geometric_means([*wrong, *USUAL]) == geometric_means(USUAL) != []


def test_the_bar_of_their_errors_names_its_worst_case() -> None:
    bar = one(bars(ROWS), "float32 weights:", "SGEMM")
    assert (bar.met, bar.figures[:14]) == (True, "worst 0.400 x ")
    assert bar.figures.endswith("0 of 6 over 1")
    rows = [dict(row) for row in FLOAT32]
    wrong = next(row for row in rows if row["method"] == "rms" and row["hidden"] == 3072)
    wrong["rms_error"] = {"cuda": 6e-7, "float32_sgemm": 5e-7}
    bar = one(bars(rows), "float32 weights:", "SGEMM")
    assert bar.met is False
    assert bar.figures == (
        "worst 1.200 x at 3072x256 with a float32 weight zero mean (cuda 6.00e-07, float32 SGEMM 5.00e-07); "
        "1 of 6 over 1"
    )
    rows.remove(wrong)
    bar = one(bars(rows), "float32 weights:", "SGEMM")
    assert bar.met is None
    assert bar.figures.endswith("; 1 of 6 not measured")


# Rows of before --------------------------------------------------------------------------------------------------


def test_rows_without_a_weight_dtype_are_of_the_dtype_of_x(tmp_path: Path) -> None:
    old = [{name: value for name, value in row.items() if name != "weight_dtype"} for row in USUAL]
    assert finished(old, synthetic_rows.PROVENANCE) == {key(row) for row in USUAL}
    assert bars(old) == bars(USUAL)
    assert table_of(old, record_of(old)) == table_of(USUAL, record_of(USUAL))
    assert report.generated_parts(old, {}, tmp_path) == report.generated_parts(USUAL, {}, tmp_path)
    read = read_rows(synthetic_rows.write(tmp_path / "rows.jsonl", old))
    assert by_weights(read) == (old, [])


# The table -------------------------------------------------------------------------------------------------------


def test_the_dispatcher_looks_up_the_dtype_of_the_weight_exactly() -> None:
    def time(point: Point, method: str, weights: str) -> float:
        slow = point.candidate == "cuda" and point.shape.weight_dtype == "float32" and point.tokens == 4096
        return 99.0 if slow else synthetic_rows.constant_time(point, method, weights)

    rows = synthetic_rows.headline_rows(time)
    document = table_of(rows, record_of(rows))
    said = {(entry["hidden"], entry["dtype"], entry.get("weight_dtype")) for entry in document["entries"]}
    assert {(7168, "bfloat16", None), (7168, "bfloat16", "float32"), (2560, "float32", None)} <= said
    table = Table.parse(document)

    def fastest(tokens: int, hidden: int, experts: int, dtype: str, weight: str | None, **more: Any) -> str | None:
        row = table.nearest(dispatch.Problem(tokens, hidden, experts, dtype, weight, **more))
        return None if row is None else next(iter(row.microseconds))

    for spec in (None, RoutingSpec(8)):
        for usual in (None, "bfloat16"):
            assert fastest(4096, 7168, 256, "bfloat16", usual, spec=spec) == "cuda"
        assert fastest(4096, 7168, 256, "bfloat16", "float32", spec=spec) == "xla"
        assert fastest(64, 7168, 256, "bfloat16", "float32", spec=spec) == "cuda"
        for wide in (None, "float32"):
            assert fastest(64, 2560, 64, "float32", wide, spec=spec) == "cuda"
        assert fastest(64, 2560, 64, "bfloat16", "float32", spec=spec) is None
        assert fastest(64, 7168, 256, "float32", "float32", spec=spec) is None
        assert fastest(64, 2880, 128, "bfloat16", "float32", spec=spec, bias_dtype="bfloat16") is None


def tuned(shape: Shape, winner: str) -> dict[str, Any]:
    configs = {name: {"verified": True, "launches": 1} for name in ("few", "one", "many")}
    found = {"pick": "few", "winner": winner, "gain": 0.2, "rounds": 3, "calls_per_sample": 8, "configs": configs}
    return synthetic_rows.row(Point(shape, 8, "cuda", ()), "tune", "warm and cold", **found)


def test_a_tuned_configuration_is_for_the_dtype_of_its_weight() -> None:
    usual = Shape(64, 16, True, ("small",))
    old = {name: value for name, value in tuned(usual, "many").items() if name != "weight_dtype"}
    there = {"provenance": synthetic_rows.PROVENANCE, "entries": [old]}
    configs = configs_of([tuned(MIXED, "one")], there)
    assert [entry.get("weight_dtype") for entry in configs["entries"]] == [None, "float32"]
    hash_ = synthetic_rows.PROVENANCE["source_hash"]
    table = Table.parse({"entries": [], "configs": configs})

    def winner(weight: str | None) -> str | None:
        problem = dispatch.Problem(8, 64, 16, "bfloat16", weight, "bfloat16")
        found = table.winner(problem, "NVIDIA H200", hash_)
        return None if found is None else found.config

    assert [winner(weight) for weight in (None, "bfloat16", "float32", "float16")] == ["many", "many", "one", None]


# Launches --------------------------------------------------------------------------------------------------------


@both_dtypes
def test_the_launchers_are_told_the_dtype_of_the_weight(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    of = cuda.RouterGemmArgs.of
    monkeypatch.setattr(
        cuda.RouterGemmArgs, "of", lambda problem, **more: (told.append(problem), of(problem, **more))[1]
    )
    operands = ShapeData(shape, [8], cpu()).operands(8)
    timing_launcher.launches(operands, timing_launcher.out_buffer(operands), weights="warm")
    of_tuner = tune_launch.ShapePool(shape, 8, cpu()).operands(8, 0)
    of_tuner.arguments(of_tuner.weights[0], of_tuner.outputs(), -1)
    expected = dispatch.Problem(8, 64, 16, shape.dtype, "float32", shape.dtype)
    assert told == [expected, expected]
    assert (of_tuner.x.dtype, of_tuner.weights[0].dtype, of_tuner.bias.dtype) == (shape.dtype, "float32", shape.dtype)


# What is shown ---------------------------------------------------------------------------------------------------


def test_the_report_has_a_table_of_them_and_nothing_of_them_elsewhere(tmp_path: Path) -> None:
    every, usual = (report.generated_parts(rows, {}, tmp_path) for rows in (ROWS, USUAL))
    assert {part for part in every if every[part] != usual[part]} == {"bars", "float32-table", "float32-accuracy"}
    assert usual["float32-table"] == usual["float32-accuracy"] == "Not measured.\n"
    header, _, *body = every["float32-table"].split("\n\n")[0].splitlines()
    assert header == (
        "| call | T | cuda, replay | cuBLAS, replay | cuda, CUPTI | xla, CUPTI | read of the weights, replay |"
    )
    name = "7168x256 with a float32 weight"
    assert body[:2] == [
        f"| {name} | {tokens} | 2.50 / 3.00 | 9.00 / 10.8 | 2.50 / 3.00 | 7.00 / 8.40 | 1.60 / 1.92 |"
        for tokens in (1, 16)
    ]
    assert body[-1] == (
        "| route 2560x64 in float32 of ERNIE-4.5-21B-A3B | 4096 | 3.00 / 3.60 | - | 3.00 / 3.60 | 12.0 / 14.4 "
        "| 1.60 / 1.92 |"
    )
    assert len(body) == 2 * len(SPARSE_TOKENS) + 4 * len(ROUTE_FEW_TOKENS)
    assert f"| {name} | zero mean | 2.0e-07 |" in every["float32-accuracy"]


def test_the_plots_are_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    for name in ("_time_figure", "_winners_figure"):
        monkeypatch.setattr(report_plots, name, lambda plt, problems, shapes, *more: drawn.extend((*problems, *shapes)))
    assert report_plots.write_plots(ROWS, tmp_path, "h200") == {}
    assert {each.weight_dtype for each in drawn} == {"bfloat16"}


def test_the_printed_lines_compare_them_with_each_other_alone() -> None:
    slow = [{**row, "samples_us": [1.5]} if row["candidate"] == "read_weight" else row for row in FLOAT32]
    found = {(line.shape, line.tokens, line.candidate, line.method): line for line in lines([*USUAL, *slow])}
    gemm, routed = float32_shapes()[0], float32_shapes()[3]
    assert found[gemm, 1, "cuda", "graph replay"].to_best_other[0] == pytest.approx(2.5 / 9.0)
    assert found[gemm, 1, "cuda", "graph replay"].to_floor[0] == pytest.approx(2.5 / 1.5)
    assert found[routed, 1, "cuda", "CUPTI"].to_floor[0] == pytest.approx(3.0 / 1.5)
    usual = next(shape for shape, *_ in found if shape.size == "7168x256" and shape.spec is None)
    assert found[usual, 1, "cuda", "graph replay"].to_floor[0] == pytest.approx(2.5 / 1.6)
