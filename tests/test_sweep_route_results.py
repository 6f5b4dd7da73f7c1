"""What rows of `route` are good for: the dispatch table, the bars, the printed lines."""

from __future__ import annotations

from typing import Any

import pytest
import synthetic_rows
from synthetic_record import record_of
from test_sweep_results import one

from jax_router import dispatch
from jax_router.routing import RoutingSpec
from jax_router.sweep_bars import evaluate
from jax_router.sweep_points import Point
from jax_router.sweep_rows import by_problem
from jax_router.sweep_summary import lines
from jax_router.sweep_table import table_of
from jax_router.tables import Table


def test_the_table_has_the_times_of_both_operations() -> None:
    def time(point: Point, method: str, weights: str) -> float:
        slow = point.shape.spec is not None and point.candidate in ("cuda", "pallas") and point.tokens == 4096
        return 99.0 if slow else synthetic_rows.constant_time(point, method, weights)

    rows = synthetic_rows.headline_rows(time, only_models=["DeepSeek-V3"])
    document = table_of(rows, record_of(rows))
    operations = [entry["operation"] for entry in document["entries"]]
    assert operations == sorted(operations, reverse=True)
    assert {"route", "router_gemm"} == set(operations)
    assert all(("rule" in entry) == (entry["operation"] == "route") for entry in document["entries"])
    table = Table.parse(document)
    gemm = dispatch.Problem(4096, 7168, 256)
    assert next(iter(table.nearest(gemm).microseconds)) == "cuda"
    routing = dispatch.Problem(4096, 7168, 256, spec=RoutingSpec(8))
    assert next(iter(table.nearest(routing).microseconds)) == "xla"


def bars(time: Any = synthetic_rows.constant_time, **only: Any) -> dict[str, Any]:
    return {bar.claim: bar for bar in evaluate(synthetic_rows.headline_rows(time, **only), lambda problem: "cuda")}


def test_the_bars_of_route_name_their_worst_case() -> None:
    def time(point: Point, method: str, weights: str) -> float:
        base = synthetic_rows.constant_time(point, method, weights)
        if point.shape.spec is None or point.candidate != "cuda":
            return base
        if (point.tokens, weights) == (16, "warm") and "DeepSeek-V3" in point.shape.models:
            return 4.2  # of xla's 12
        if (point.tokens, weights, method) == (4096, "warm", "chain_slope") and "gpt-oss-120b" in point.shape.models:
            return 3.5 + 6.6  # the chain's own 3.5 do not count
        return base

    found = bars(time)
    assert (
        one(found, "3x faster", "(CUPTI for both)").figures
        == "worst 0.350 x at DeepSeek-V3 T=16 warm; 1 of 18 over 0.333"
    )
    assert one(found, "3x faster", "chain slope").verdict == "met"
    assert one(found, "3x faster", "chain slope").figures.endswith("0 of 12 over 0.333")
    assert one(found, "2x faster", "(CUPTI for both)").verdict == "met"
    assert one(found, "2x faster", "chain").figures == "worst 0.550 x at gpt-oss-120b T=4096 warm; 1 of 12 over 0.5"
    assert one(found, "1.6x router_gemm", "cuda").figures == "worst 1.680 x at DeepSeek-V3 T=16 warm; 1 of 18 over 1.6"
    assert one(found, "1.6x router_gemm", "pallas").verdict == "met"
    assert one(found, "for route", "choice").verdict == "met"


def test_a_chain_that_costs_no_more_than_its_own_kernel_meets_no_bar() -> None:
    def time(point: Point, method: str, weights: str) -> float:
        noise = method == "chain_slope" and point.candidate == "xla" and point.tokens == 64
        return 1.0 if noise else synthetic_rows.constant_time(point, method, weights)

    bar = one(bars(time), "3x faster", "chain slope")
    assert bar.verdict == "not met"
    assert "6 of 12 over" in bar.figures


def test_bars_of_route_that_are_not_covered_are_not_called_met() -> None:
    found = bars(only_operations=["router_gemm"])
    of_route = [bar for claim, bar in found.items() if claim.startswith(("route:", "route at")) or "for route" in claim]
    assert len(of_route) == 12
    assert {(bar.verdict, bar.figures) for bar in of_route} == {("not measured", "no rows")}
    two = bars(only_models=["gpt-oss-120b", "DeepSeek-V3"])
    assert "6 of 18 not measured" in one(two, "3x faster", "(CUPTI for both)").figures
    assert one(two, "3x faster", "(CUPTI for both)").met is None


def test_router_gemms_and_routings_are_never_compared() -> None:
    rows = synthetic_rows.headline_rows(only_models=["gpt-oss-120b"], only_tokens=[64])
    assert set(by_problem(rows)).isdisjoint(by_problem(rows, "route"))
    found = {(line.shape.operation, line.candidate, line.method): line for line in lines(rows)}
    assert found["route", "cuda", "CUPTI"].to_best_other[0] == pytest.approx(3.0 / 5.0)
    assert found["router_gemm", "cuda", "CUPTI"].to_best_other[0] == pytest.approx(2.5 / 4.0)
    assert found["route", "torch_route", "graph replay"].to_best_other[0] == pytest.approx(30 / 3)
    assert found["route", "cuda", "graph replay"].to_best_other[0] == pytest.approx(3 / 20)
    assert found["route", "cuda", "graph replay"].to_floor[0] == pytest.approx(3.0 / 1.6)
    assert found["route", "cuda", "CUPTI"].to_floor[0] == pytest.approx(3.0 / 1.6)
    assert found["route", "no_routing", "chain slope"].to_best_other == (None, None)
