"""Which configuration wins, what a table keeps of it, and what two runs say of each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import synthetic_rows
import typer
from synthetic_record import record_of
from typer.testing import CliRunner

from jax_router import sweep_table, tune, tune_choice, tune_report, tune_run
from jax_router.sweep_rows import read_rows
from jax_router.tables import Table
from jax_router.tune_table import configs_of

Times = dict[str, tuple[float, ...]]  # of each round, by configuration


def tuned(times: Times, tokens: int = 8, pick: str = "pick", unverified: tuple[str, ...] = (), **more: Any) -> Any:
    """A row; cold weights take twice the time of warm ones."""
    (point,) = tune_run.points(["gpt-oss-120b"], [tokens], ["router_gemm"])
    row = synthetic_rows.row(point, *tune_run.MEASUREMENT, pick=pick, rounds=max(map(len, times.values())), **more)
    row["calls_per_sample"] = 192
    row["configs"] = {
        name: {
            "verified": name not in unverified,
            **({"reason": "other bits"} if name in unverified else {"launches": 48}),
            # The median counts: what one replay in three takes is thrown away.
            "warm_us": [[99.0, time / 2**0.5, time / 2**0.5] for time in rounds],
            "cold_us": [[time * 2**0.5, time * 2**0.5, 0.1] for time in rounds],
        }
        for name, rounds in times.items()
    }
    row["winner"] = tune_choice.winner(row)
    row["gain"] = tune_choice.gain(row, row["winner"])
    return row


# The rule --------------------------------------------------------------------------------------------------------


def test_the_metric_is_the_geometric_mean_of_warm_and_cold_medians_over_the_rounds() -> None:
    row = tuned({"pick": (1.0, 4.0)})
    assert tune_choice.rounds(row, "pick") == pytest.approx([1, 4])
    assert tune_choice.complete(row) == pytest.approx({"pick": 2})
    assert tune_choice.medians(row, "pick") == pytest.approx((2 / 2**0.5, 2 * 2**0.5))


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"pick": (10, 10, 10), "other": (9.79, 9.79, 9.79)}, "other"),
        ({"pick": (10, 10, 10), "other": (9.81, 9.81, 9.81)}, "pick"),  # by less than 2%
        ({"pick": (10, 11, 12), "other": (9.5, 10.45, 11.4)}, "other"),  # drift that both have
        ({"pick": (10, 10, 10), "other": (9.5, 9.5, 8.0)}, "pick"),  # by less than rounds differ
        ({"pick": (10, 10, 10), "other": (8, 8, 10.1)}, "pick"),  # not in every round
        ({"pick": (10, 10, 10), "other": (9.0, 9.0, 9.0), "best": (8.9, 8.9, 8.9)}, "best"),
        ({"pick": (10, 10, 10), "other": (9.5, 9.5, 9.5), "unsteady": (9.8, 9.4, 8.0)}, "other"),
        ({"pick": (10, 10, 10), "hopeless": (5,)}, "pick"),  # not measured to the end
    ],
)
def test_a_configuration_replaces_the_pick_if_it_is_faster_by_more_than_the_noise(times: Times, winner: str) -> None:
    assert tuned(times)["winner"] == winner


def test_only_a_verified_configuration_wins_and_only_over_a_verified_pick() -> None:
    times = {"pick": (10, 10, 10), "wrong": (5, 5, 5), "other": (9, 9, 9)}
    row = tuned(times, unverified=("wrong",))
    assert (row["winner"], row["gain"]) == ("other", pytest.approx(0.1))
    assert tune_choice.regret(row) == pytest.approx(10 / 9)
    row = tuned(times, unverified=("pick",))
    assert (row["winner"], row["gain"], tune_choice.regret(row)) == ("pick", 0.0, None)


def test_the_regret_of_a_run_is_the_geometric_mean_of_the_pick_over_the_fastest() -> None:
    rows = [tuned({"pick": (10, 10), "other": (5, 5)}), tuned({"pick": (10, 10), "other": (11, 11)}, tokens=16)]
    assert tune_report.summary(rows) == (
        "The launcher's pick takes 1.4142 times as long as the fastest configuration (geometric mean of 2 points), at "
        "worst 2.000 (2880x128 +bias T=8). At 1 of them another configuration is faster by more than the noise."
    )
    us = "7.07 / 14.1"
    first, second = tune_report.points_of(rows)
    assert first == [
        "2880x128 +bias",
        "8",
        "pick",
        us,
        "other",
        "3.54 / 7.07",
        "50.0%",
        "other",
        "0.500",
        "pick",
        "1.000",
    ]
    assert second == ["2880x128 +bias", "16", "pick", us, "=", "", "", "pick", "1.000", "other", "1.100"]


# The table -------------------------------------------------------------------------------------------------------


def test_the_table_keeps_all_raw_times_and_what_the_sweep_wrote(tmp_path: Path) -> None:
    rows = synthetic_rows.headline_rows(only_models=["Kimi-K2"], only_tokens=[16])
    swept = sweep_table.table_of(rows, record_of(rows))
    path = sweep_table.write_table(swept, tmp_path)
    row = tuned({"pick": (10, 10), "other": (5, 5)})
    sweep_table.write_configs(configs_of([row], None), "NVIDIA H200", tmp_path)
    for _ in range(2):
        document = json.loads(path.read_text())
        assert {name: value for name, value in document.items() if name != "configs"} == swept
        assert document["configs"]["source_hash"] == synthetic_rows.PROVENANCE["source_hash"]
        assert document["configs"]["provenance"] == synthetic_rows.PROVENANCE
        (entry,) = document["configs"]["entries"]
        assert entry["configs"] == row["configs"]
        (winner,) = Table.parse(document).configs.winners.values()
        assert (winner.config, winner.pick, winner.gain) == ("other", "pick", 0.5)
        sweep_table.write_table(swept, tmp_path)  # another sweep
    assert list(tmp_path.iterdir()) == [path]


def test_points_that_were_not_measured_again_stay_if_they_are_of_the_same_kernels() -> None:
    row, other = tuned({"pick": (10, 10)}), tuned({"pick": (9, 9)}, tokens=16)
    there = configs_of([row, other], None)
    again = tuned({"pick": (8, 8)})
    found = configs_of([again], there)["entries"]
    assert [(entry["tokens"], entry["configs"]) for entry in found] == [(8, again["configs"]), (16, other["configs"])]
    again["provenance"] = {**again["provenance"], "source_hash": "f" * 64}
    assert [entry["tokens"] for entry in configs_of([again], there)["entries"]] == [8]


def test_rows_without_times_make_no_table() -> None:
    failed = tuned({"pick": (10, 10)})
    del failed["calls_per_sample"]
    with pytest.raises(ValueError, match="the rows hold no measured point"):
        configs_of([failed], None)


def test_configurations_need_a_table_to_stand_in(tmp_path: Path) -> None:
    configs = configs_of([tuned({"pick": (10, 10)})], None)
    for content in (None, "{", "[]", "{}"):
        if content is not None:
            (tmp_path / "nvidia_h200.json").write_text(content)
        with pytest.raises(
            ValueError, match=r"no table .*nvidia_h200.json that can be read. Expected that of this GPU"
        ):
            sweep_table.write_configs(configs, "NVIDIA H200", tmp_path)


def test_a_sweep_replaces_a_broken_table(tmp_path: Path) -> None:
    (tmp_path / "nvidia_h200.json").write_text("{")
    path = sweep_table.write_table({"gpu": "NVIDIA H200", "entries": []}, tmp_path)
    assert json.loads(path.read_text()) == {"gpu": "NVIDIA H200", "entries": []}


# Two runs --------------------------------------------------------------------------------------------------------


def run_compare(folder: Path, first: list[Any], second: list[Any], *more: str) -> Any:
    paths = [synthetic_rows.write(folder / f"{name}.jsonl", rows) for name, rows in (("a", first), ("b", second))]
    app = typer.Typer()
    tune.register(app)
    return CliRunner().invoke(app, ["--compare", *map(str, paths), *more], env={"COLUMNS": "250"})


@pytest.mark.parametrize(
    ("first", "second", "verdict", "status"),
    [
        ((9.5, 9.5), (9.5, 9.5), "same", 0),
        ((9.79, 9.79), (9.81, 9.81), "within noise", 0),  # the threshold was crossed, the measurements agree
        ((9.5, 9.5), (9.9, 9.9), "changed by more than noise", 1),
        ((9.5, 9.5), (10.5, 10.5), "changed by more than noise", 1),
        ((9.0, 9.0), (9.0, 10.5), "within noise", 0),  # which is more there, as its rounds differ by more
    ],
)
def test_a_winner_changed_by_more_than_noise_where_the_runs_disagree_about_the_two(
    first: tuple[float, ...], second: tuple[float, ...], verdict: str, status: int, tmp_path: Path
) -> None:
    rows = [[tuned({"pick": (10, 10), "other": times})] for times in (first, second)]
    result = run_compare(tmp_path, *rows)
    assert result.exit_code == status, result.output
    assert tune_report.compare(*rows)[0].verdict == verdict
    assert verdict in result.output


def test_a_changed_winner_shows_how_far_apart_the_two_are_in_each_run(tmp_path: Path) -> None:
    runs = [[tuned({"pick": (10, 10), "other": (times, times)})] for times in (8.0, 12.5)]
    (cells,) = tune_report.compared_cells(tune_report.compare(*runs))
    assert cells[1:] == ["8", "other", "pick", "+25.0%", "-20.0%", "2.0%", "changed by more than noise"]


def test_a_point_that_one_run_lacks_is_a_change(tmp_path: Path) -> None:
    both, more = tuned({"pick": (10, 10)}), tuned({"pick": (10, 10)}, 16)
    for runs, missing in (([both, more], [both]), "B"), (([both], [both, more]), "A"):
        result = run_compare(tmp_path, *runs)
        assert result.exit_code == 1
        assert f"not measured in {missing}" in result.output


def test_a_winner_that_the_other_run_did_not_measure_to_the_end_is_a_change(tmp_path: Path) -> None:
    first, second = tuned({"pick": (10, 10), "other": (9, 9)}), tuned({"pick": (10, 10), "other": (16,)})
    result = run_compare(tmp_path, [first], [second])
    assert result.exit_code == 1
    assert "other was not measured to the end in B" in result.output


def test_the_page_has_both_runs_and_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    rows = [tuned({"pick": (10, 10), "other": (9, 9)}), tuned({"pick": (10, 10)}, tokens=16)]
    assert run_compare(tmp_path, rows, rows).exit_code == 0
    assert not list(tmp_path.rglob("*.md"))
    result = run_compare(tmp_path, rows, rows[:1], "--results", str(tmp_path / "results"))
    assert result.exit_code == 1, result.output
    text = (tmp_path / "results" / "tune-h200.md").read_text()
    assert "`a.jsonl`" in text
    assert "`b.jsonl`" in text
    assert text.count("| 2880x128 +bias | 8 | pick | 7.07 / 14.1 | other | 6.36 / 12.7 | 10.0% |") == 2
    assert "Of 2 points 1 have another winner in the second run, 1 by more than noise." in text
    assert read_rows(tmp_path / "a.jsonl") == json.loads(json.dumps(rows))


def test_runs_of_other_kernels_or_points_are_not_compared(tmp_path: Path) -> None:
    rows = [tuned({"pick": (10, 10)})]
    other = [{**rows[0], "provenance": {**synthetic_rows.PROVENANCE, "driver": "9"}}]
    for second, message in (
        (other, "different sources, GPUs"),
        ([tuned({"pick": (10, 10)}, 16)], "without a measured point"),
    ):
        result = run_compare(tmp_path, rows, second)
        assert result.exit_code == 2
        assert message in result.output
