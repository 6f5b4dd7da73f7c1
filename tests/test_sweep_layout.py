"""The sweep measures weights stored [hidden, experts] as they are and behind a transpose; the report shows both."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
import synthetic_rows
from test_sweep import HEADLINE, SMALL, WALL

from jax_router import ops, report, sweep_run
from jax_router.sweep_data import ShapeData
from jax_router.sweep_layout import layout_calls
from jax_router.sweep_points import HIDDEN_EXPERTS, LAYOUT_TOKENS, Point, points
from jax_router.sweep_rows import RowsWriter, read_rows
from jax_router.sweep_summary import lines


def test_the_headline_suite_measures_both_ways_on_the_headline_shapes() -> None:
    found = [point for point in points("headline", **HEADLINE) if point.candidate in HIDDEN_EXPERTS]
    assert {point.shape.models[0] for point in found} == {"gpt-oss-120b", "DeepSeek-V3"}
    assert {point.tokens for point in found} == set(LAYOUT_TOKENS)
    assert {point.measurements for point in found} == {(("cupti", "warm"), ("cupti", "cold"))}
    assert len(found) == 2 * len(LAYOUT_TOKENS) * len(HIDDEN_EXPERTS)
    assert not {point.candidate for point in points("quick", **HEADLINE)} & HIDDEN_EXPERTS.keys()


def test_each_candidate_is_called_on_the_stored_weight_in_its_way(monkeypatch) -> None:
    seen: dict[str, tuple] = {}

    def router_gemm(x, weight, bias, *, weight_layout, implementation):
        return weight.shape, weight_layout, implementation

    monkeypatch.setattr(ops, "router_gemm", router_gemm)
    operands = ShapeData(SMALL, [2], jax.devices("cpu")[0]).hidden_experts(2)
    assert operands.x.shape == (2, 64)
    for name, call in layout_calls().items():
        seen[name] = call(operands.x, operands.weights[0], operands.bias)
    assert seen == {
        "cuda_hidden_experts": ((64, 16), "hidden_experts", "cuda"),
        "xla_hidden_experts": ((64, 16), "hidden_experts", "xla"),
        "cuda_transposed": ((16, 64), "experts_hidden", "cuda"),
    }


def test_their_points_are_checked_like_any_other_and_refused_like_any_other(tmp_path: Path) -> None:
    writer = RowsWriter(tmp_path / "rows.jsonl")
    runner = sweep_run.Runner(writer, provenance={"gpu": None}, device=jax.devices("cpu")[0])
    runner.run([Point(SMALL, 8, name, WALL) for name in HIDDEN_EXPERTS])
    writer.close()
    rows = {(row["candidate"], row["method"]): row for row in read_rows(writer.path)}
    assert {place: row["status"] for place, row in rows.items()} == {
        ("cuda_hidden_experts", "check"): "skipped",
        ("cuda_transposed", "check"): "skipped",
        ("xla_hidden_experts", "check"): "ok",
        ("xla_hidden_experts", "wall"): "ok",
    }
    assert "needs an NVIDIA GPU" in rows["cuda_transposed", "check"]["reason"]


def test_the_report_has_a_table_of_them() -> None:
    rows = synthetic_rows.headline_rows(only_operations=["router_gemm"])
    text = report.generated_parts(rows, {}, Path())["layout-table"]
    header, _, *body = text.split("\n\n")[0].splitlines()
    assert header.startswith(
        "| model | T | cuda, [H, E] | cuda behind a transpose, [H, E] | xla, [H, E] | cuda, [E, H] |"
    )
    times = "2.60 / 3.12 | 4.50 / 5.40 | 7.50 / 9.00 | 2.50 / 3.00 | 7.00 / 8.40"
    models = ("gpt-oss-120b", "DeepSeek-V3")
    assert body == [f"| {model} | {tokens} | {times} |" for model in models for tokens in LAYOUT_TOKENS]
    without = [row for row in rows if row["candidate"] not in HIDDEN_EXPERTS]
    assert report.generated_parts(without, {}, Path())["layout-table"] == "Not measured.\n"


@pytest.mark.parametrize("candidate", ["cuda", "xla"])
def test_they_are_no_rivals_of_what_runs_on_the_other_layout(candidate) -> None:
    rows = synthetic_rows.headline_rows(only_models=["gpt-oss-120b"], only_tokens=[16])
    without = [row for row in rows if row["candidate"] not in HIDDEN_EXPERTS]

    def ratios(rows):
        return [line.to_best_other for line in lines(rows) if line.candidate == candidate and line.shape.spec is None]

    assert ratios(rows) == ratios(without) != []
