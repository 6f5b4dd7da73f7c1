"""What `cuda` may take beside cuBLAS, XLA and the read of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import synthetic_rows
from test_sweep_results import bars, one

from jax_router import sweep, sweep_speed
from jax_router.report import generated_parts
from jax_router.sweep_points import Point


def at(
    model: str, tokens: int, weights: str, microseconds: float, *, route: bool = False, measured: str = "graph_replay"
) -> Any:
    """Constant times, but for one of `cuda`."""

    def time(point: Point, method: str, of_weights: str) -> float:
        is_it = point.candidate == "cuda" and model in point.shape.models and (point.shape.spec is not None) == route
        if is_it and (point.tokens, of_weights, method) == (tokens, weights, measured):
            return microseconds
        return synthetic_rows.constant_time(point, method, of_weights)

    return time


@pytest.mark.parametrize(
    ("model", "tokens", "words", "microseconds", "figures"),
    [
        ("gpt-oss-120b", 32, ("1.6x the", "gpt-oss"), 2.7, "1.688 x at T=32 warm; 1 of 12 over 1.6"),
        ("DeepSeek-V3", 16, ("1.6x the read", "DeepSeek"), 2.7, "1.688 x at T=16 warm; 1 of 10 over 1.6"),
        ("DeepSeek-V3", 32, ("1.8x the read",), 3.2, "2.000 x at T=32 warm; 1 of 2 over 1.8"),
        ("gpt-oss-120b", 128, ("0.5x cuBLAS", "T = 128"), 3.6, "0.600 x at T=128 warm; 1 of 2 over 0.5"),
        ("DeepSeek-V3", 128, ("0.7x cuBLAS",), 4.8, "0.800 x at T=128 warm; 1 of 2 over 0.7"),
        ("gpt-oss-120b", 512, ("0.75x cuBLAS",), 4.8, "0.800 x at T=512 warm; 1 of 2 over 0.75"),
        ("DeepSeek-V3", 512, ("0.9x cuBLAS",), 6.6, "1.100 x at T=512 warm; 1 of 2 over 0.9"),
        ("gpt-oss-120b", 1024, ("1x cuBLAS", "gpt-oss"), 6.6, "1.100 x at T=1024 warm; 1 of 10 over 1"),
        ("DeepSeek-V3", 16384, ("1x cuBLAS", "DeepSeek"), 6.6, "1.100 x at T=16384 warm; 1 of 10 over 1"),
        ("MiniMax-M2", 64, ("0.6x cuBLAS",), 4.2, "0.700 x at 3072x256 T=64 warm; 1 of 72 over 0.6"),
        ("MiniMax-M2", 4096, ("1x cuBLAS", "every other"), 6.6, "1.100 x at 3072x256 T=4096 warm; 1 of 144 over 1"),
    ],
)  # fmt: skip
def test_a_slow_router_gemm_misses_its_bar(
    model: str, tokens: int, words: tuple[str, ...], microseconds: float, figures: str
) -> None:
    found = bars(synthetic_rows.headline_rows(at(model, tokens, "warm", microseconds)))
    bar = one(found, "router_gemm: cuda", *words)
    assert (bar.met, bar.figures) == (False, f"worst {figures}")


@pytest.mark.parametrize(
    ("model", "tokens", "words", "microseconds", "figures"),
    [
        ("gpt-oss-120b", 64, ("2.2x the read",), 3.6, "2.250 x at T=64 warm; 1 of 6 over 2.2"),
        ("DeepSeek-V3", 1, ("2.4x the read",), 4.0, "2.500 x at T=1 warm; 1 of 6 over 2.4"),
        ("gpt-oss-120b", 4096, ("0.4x xla",), 6.0, "0.500 x at T=4096 warm; 1 of 2 over 0.4"),
        ("DeepSeek-V3", 4096, ("0.5x xla",), 7.2, "0.600 x at T=4096 warm; 1 of 2 over 0.5"),
        ("Mixtral-8x7B", 1, ("every other router",), 6.0, "0.500 x at Mixtral-8x7B T=1 warm; 1 of 54 over 0.333"),
    ],
)
def test_a_slow_routing_misses_its_bar(
    model: str, tokens: int, words: tuple[str, ...], microseconds: float, figures: str
) -> None:
    beside_xla = "xla" in words[0] or "other" in words[0]
    measured = "cupti" if beside_xla else "graph_replay"
    rows = synthetic_rows.headline_rows(at(model, tokens, "warm", microseconds, route=True, measured=measured))
    bar = one(bars(rows), "route: cuda at most", *words)
    assert (bar.met, bar.figures) == (False, f"worst {figures}")
    assert bar.claim.endswith("(CUPTI for both)" if beside_xla else "(graph replay)")


def test_rows_from_before_the_replay_of_routing_are_judged_by_cupti() -> None:
    rows = synthetic_rows.headline_rows(at("gpt-oss-120b", 16, "cold", 4.8, route=True, measured="cupti"))
    found = bars(rows)
    assert one(found, "2.2x the read").claim.endswith("(graph replay)")
    assert one(found, "2.2x the read").met is True
    before = bars([row for row in rows if row.get("rule") is None or row["method"] != "graph_replay"])
    bar = one(before, "2.2x the read")
    assert bar.claim.endswith("(CUPTI; the read by replay)")
    assert (bar.met, bar.figures) == (False, "worst 2.500 x at T=16 cold; 1 of 6 over 2.2")
    lost = next(
        row for row in rows if row["candidate"] == "cuda" and row.get("rule") and row["method"] == "graph_replay"
    )
    one_lost = [row for row in rows if row is not lost]
    assert one(bars(one_lost), "2.2x the read").figures.endswith("1 of 6 not measured")


def test_bars_without_all_their_figures_are_not_called_met() -> None:
    found = bars(synthetic_rows.headline_rows(only_tokens=[16, 128]))
    assert "10 of 12 not measured" in one(found, "1.6x the read", "gpt-oss").figures
    assert one(found, "1.6x the read", "gpt-oss").met is None
    assert one(found, "0.5x cuBLAS", "T = 128").met is True
    for without in ("read_weight", "torch_linear", "xla"):
        rows = [row for row in synthetic_rows.headline_rows() if row["candidate"] != without]
        words = {"read_weight": "the read", "torch_linear": "cuBLAS", "xla": "x xla"}[without]
        of_peer = [bar for bar in bars(rows).values() if words in bar.claim and ": cuda at most" in bar.claim]
        assert len(of_peer) >= 3
        assert {(bar.met, bar.figures) for bar in of_peer} == {(None, "no rows")}


def test_the_geometric_means_are_of_all_ratios() -> None:
    means = {mean.what: mean for mean in sweep_speed.geometric_means(synthetic_rows.headline_rows())}
    cublas = means["router_gemm to cuBLAS, replay"]
    assert (cublas.ratio, cublas.count) == (pytest.approx(2.5 / 6.0), 2 * (2 * 15 + 12 * 6))
    assert means["router_gemm to jitted xla, CUPTI"].ratio == pytest.approx(2.5 / 7.0)
    assert means["route to jitted xla, CUPTI"].ratio == pytest.approx(3.0 / 12.0)
    slow = synthetic_rows.headline_rows(at("DeepSeek-V3", 64, "cold", 3.0 * 2**10, route=True, measured="cupti"))
    (mean,) = [mean for mean in sweep_speed.geometric_means(slow) if mean.what.startswith("route to")]
    assert mean.ratio == pytest.approx(0.25 * (2**10 / 1.2) ** (1 / mean.count))
    assert sweep_speed.geometric_means([]) == []
    assert sweep_speed.sentence([]) == "Geometric means: not measured."


def test_the_geometric_means_are_printed_and_stand_in_the_readme(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    from rich.console import Console

    rows = synthetic_rows.headline_rows(only_models=["DeepSeek-V3"])
    expected = "router_gemm to cuBLAS, replay 0.417 (30 figures)"
    sweep._print_summary(Console(width=400), rows, True)
    assert expected in capsys.readouterr().out
    assert expected in generated_parts(rows, {}, tmp_path)["bars"]
