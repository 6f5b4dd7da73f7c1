"""What the rows of a sweep are good for: the bars, the printed lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import synthetic_rows

from jax_router import dispatch, sweep_bars
from jax_router.sweep_bars import Bar, evaluate
from jax_router.sweep_points import Point
from jax_router.sweep_rows import key
from jax_router.sweep_summary import lines, show
from jax_router.tables import Table

# Bars ------------------------------------------------------------------------------------------------------------


def bars(rows: list[dict[str, Any]], chosen: str = "cuda") -> dict[str, Bar]:
    return {bar.claim: bar for bar in evaluate(rows, lambda problem: chosen)}


def one(found: dict[str, Bar], *words: str) -> Bar:
    (claim,) = [claim for claim in found if all(word in claim for word in words)]
    return found[claim]


def test_all_bars_are_met_by_rows_that_meet_them() -> None:
    found = bars(synthetic_rows.headline_rows())
    assert len(found) == 34
    assert {bar.verdict for bar in found.values()} == {"met"}, found


def test_a_missed_bar_names_its_worst_case() -> None:
    def time(point: Point, method: str, weights: str) -> float:
        if point.candidate == "cuda" and point.tokens == 32 and point.shape.headline and weights == "cold":
            return 3.7 * (2 if method == "cupti" else 1)
        if (point.candidate, point.tokens, method) == ("pallas", 128, "cupti") and not point.shape.bias:
            return 7.7 if weights == "warm" else 2.0
        if (point.candidate, point.tokens, method, point.shape.label) == ("cuda", 1024, "cupti", "2048x64"):
            return 9.0
        return synthetic_rows.constant_time(point, method, weights)

    rows = synthetic_rows.headline_rows(time)
    for row in rows:
        if row["method"] == "rms" and row["weights"] == "with a mean" and row["hidden"] == 7168:
            row["rms_error"]["cuda"] = 6e-7
    found = bars(rows)
    for model in ("gpt-oss-120b", "DeepSeek-V3"):
        bar = one(found, "0.5x cuBLAS", model, "T = 1..64")
        assert bar.verdict == "not met"
        assert "0.514 x at T=32 cold; 1 of 14 over" in bar.figures
    assert one(found, "never slower than xla").figures.startswith("worst 1.286 x at 2048x64 T=1024 warm")
    assert one(found, "RMS", "gpt-oss").met is True
    bar = one(found, "RMS", "DeepSeek")
    assert bar.met is False
    assert "1.200 x at with a mean" in bar.figures
    assert one(found, "pallas faster", "gpt-oss").met is True
    assert "1.100 x at 7168x256 T=128 warm" in one(found, "pallas faster", "DeepSeek").figures
    bar = one(found, "choice within")
    assert bar.met is False
    assert "2048x64 T=1024 (cuda)" in bar.figures


def test_bars_that_are_not_covered_are_not_called_met() -> None:
    rows = synthetic_rows.headline_rows(only_tokens=[1, 2, 16])
    found = bars(rows)
    bar = one(found, "0.5x cuBLAS", "gpt-oss", "T = 1..64")
    assert bar.verdict == "not measured"
    assert "8 of 14 not measured" in bar.figures
    without_peer = [row for row in synthetic_rows.headline_rows() if row["candidate"] != "torch_mm_float32"]
    assert one(bars(without_peer), "0.5x cuBLAS", "gpt-oss", "T = 1..64").met is None
    without_cuda = [
        row
        for row in synthetic_rows.headline_rows()
        if (row["candidate"], row["tokens"], row["hidden"]) != ("cuda", 64, 4096)
    ]
    assert one(bars(without_cuda), "never slower").met is None
    assert {bar.met for bar in bars([]).values()} == {None}


def test_a_failed_check_and_an_unmeasured_choice_miss_their_bars() -> None:
    rows = synthetic_rows.headline_rows()
    rows[0] = next({**row, "status": "failed", "reason": "worst 9 units"} for row in rows if row["method"] == "check")
    rows = [row for index, row in enumerate(rows) if index == 0 or key(row) != key(rows[0])]
    found = bars(rows)
    assert one(found, "every point passes").met is False
    assert "cuda 2880x128 T=1" in one(found, "every point passes").figures
    assert one(bars(synthetic_rows.headline_rows(), chosen="triton"), "choice within").met is False
    skipped = [{**row, "status": "skipped"} for row in rows if row["method"] == "check"]
    assert one(bars(skipped), "every point passes").met is None


def test_the_bar_of_the_dispatcher_asks_the_dispatcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dispatch, "load_table", lambda kind: None)
    monkeypatch.setattr(sweep_bars, "table_path", lambda gpu: tmp_path / "no table.json")
    monkeypatch.setenv("JAX_ROUTER_IMPLEMENTATION", "xla")  # of this process: not of the machine that was measured
    # Where the heuristic takes cuda and the synthetic cuda is the fastest, as it is everywhere.
    rows = synthetic_rows.headline_rows(only_tokens=[2, 16, 64], only_operations=["router_gemm"])
    (bar,) = [bar for bar in evaluate(rows) if "choice within" in bar.claim]
    assert bar.met, bar
    assert "(cuda)" in bar.figures
    assert bar.figures.endswith("; no table, by the heuristic")
    monkeypatch.setattr(dispatch, "load_table", lambda kind: Table("the twin's table.json", {}))
    (bar,) = [bar for bar in evaluate(rows) if "choice within" in bar.claim]
    assert bar.figures.endswith("; by the twin's table.json")


# What is printed -------------------------------------------------------------------------------------------------


def test_lines_compare_like_with_like() -> None:
    rows = synthetic_rows.headline_rows(only_models=["gpt-oss-120b"], only_tokens=[64], only_operations=["router_gemm"])
    found = lines(rows)
    by_name = {(line.candidate, line.method): line for line in found}
    replay, kernels = by_name["cuda", "graph replay"], by_name["cuda", "CUPTI"]
    assert replay.to_best_other == (pytest.approx(2.5 / 6.0), pytest.approx(2.5 / 6.0))  # cuBLAS
    assert kernels.to_best_other == (pytest.approx(2.5 / 4.0), pytest.approx(2.5 / 4.0))  # pallas
    assert replay.to_floor == (pytest.approx(2.5 / 1.6), pytest.approx(2.5 / 1.6))
    assert by_name["xla", "CUPTI"].to_best_other[0] == pytest.approx(7.0 / 2.5)
    assert replay.worst_error == 0.2
    assert by_name["no_routing", "chain slope"].to_best_other == (None, None)
    assert show((1.234, 12.34)) == "1.23 / 12.3"
    assert show((123.4, None)) == "123"
    assert show((None, None)) == "-"
