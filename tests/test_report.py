"""The report: everything it writes comes from one rows file, and writing it again changes nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import synthetic_rows
import typer
from typer.testing import CliRunner

from jax_router import cli, report, report_plots, sweep_table
from jax_router.report import rewrite, write_report
from jax_router.sweep_rows import by_problem, by_weights

PARTS = (
    *("provenance", "table", "plot", "models-plot", "winners", "chain", "host", "bars", "accuracy"),
    *("route-table", "route-plot", "route-chain", "layout-table", "float32-table", "float32-accuracy"),
)
PLOTS = ("time-headline", "time-models", "winners", "route")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    pytest.importorskip("matplotlib")
    return synthetic_rows.headline_rows(only_models=["gpt-oss-120b", "DeepSeek-V3", "Kimi-K2"])


@pytest.fixture
def usual(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of 16-bit weights."""
    return by_weights(rows)[0]


@pytest.fixture(autouse=True)
def no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may depend on the table that is checked in."""
    monkeypatch.setattr(sweep_table, "TABLES", tmp_path)


def readme_with(path: Path, *parts: str) -> Path:
    blocks = [f"<!-- generated: {part} -->\nstale text\n<!-- end generated: {part} -->\n" for part in parts]
    path.write_text("# Title\n\nText before.\n\n" + "\nText between.\n\n".join(blocks) + "\nText after.\n")
    return path


def run_report(*arguments: str) -> Any:
    app = typer.Typer()
    report.register(app)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_plots_tables_and_readme_are_written_and_again_the_same(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    source = synthetic_rows.write(tmp_path / "raw.jsonl", rows)
    results, readme = tmp_path / "docs" / "results", readme_with(tmp_path / "README.md", *PARTS)
    written = write_report(source, results, readme)
    assert {path.name for path in written} == {
        "sweep-h200.jsonl",
        "sweep-h200.md",
        "README.md",
        *(f"h200-{plot}.{suffix}" for plot in PLOTS for suffix in ("png", "svg")),
    }
    for path in written:
        assert path.stat().st_size > 1000, path
    first = contents(tmp_path)
    assert write_report(results / "sweep-h200.jsonl", results, readme) == written
    assert contents(tmp_path) == first


def test_the_generated_parts_say_where_they_come_from(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    source = synthetic_rows.write(tmp_path / "raw.jsonl", rows)
    readme = readme_with(tmp_path / "README.md", *PARTS)
    write_report(source, tmp_path / "docs" / "results", readme)
    text = readme.read_text()
    for fact in ("NVIDIA H200, driver 1.2.3", "jax 0.11.2", "torch 2.11.0", "2026-01-02", "`0123456789ab`"):
        assert fact in text
    assert "| gpt-oss-120b (2880x128 +bias) | 1 | 2.50 / 3.00 | 6.00 / 7.20 | 1.60 / 1.92 |" in text
    assert "](docs/results/h200-time-headline.png)" in text
    assert "](h200-time-headline.png)" in (tmp_path / "docs" / "results" / "sweep-h200.md").read_text()
    assert "| met | worst 0.417 x at T=" in text
    assert "| 2880x128 | zero mean | 2.0e-07 |" in text
    assert "stale text" not in text
    assert text.startswith("# Title\n\nText before.\n")
    assert text.endswith("Text after.\n")
    assert text.count("Text between.") == len(PARTS) - 1


def test_the_chain_slopes_show_their_spread(rows: list[dict[str, Any]]) -> None:
    changed = [
        row | {"samples_us": [1.0 * n for n in range(11)]}
        if (row["method"], row["candidate"], row["weights"]) == ("chain_slope", "cuda", "warm")
        and row["hidden"] == 7168
        else row
        for row in rows
    ]
    text = report.generated_parts(changed, {}, Path())["chain"]
    slope = r"\d\.\d \(\d\.\d to \d\.\d\)"
    assert re.search(rf"^\| 7168x256 \| 64 \| warm \| 5\.0 \(1\.0 to 9\.0\) \| {slope} \| {slope} \| 3\.5 ", text, re.M)
    assert text.count("\n| 2880x128 |") == 4  # 1 and 64 tokens, warm and cold
    assert report.generated_parts([rows[0]], {}, Path())["chain"] == "Not measured.\n"


def test_rows_of_other_sources_are_left_out(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    stale = {**rows[0], "provenance": {**synthetic_rows.PROVENANCE, "source_hash": "stale"}}
    source = synthetic_rows.write(tmp_path / "raw.jsonl", [stale, *rows])
    write_report(source, tmp_path / "results", tmp_path / "README.md")
    record = (tmp_path / "results" / "sweep-h200.jsonl").read_text()
    assert "stale" not in record
    assert record.count("\n") == len(rows)


def test_rows_of_a_machine_without_a_gpu_make_a_report_too(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    facts = {**synthetic_rows.PROVENANCE, "gpu": None, "driver": None, "compute_capability": None}
    cpu = [
        {**row, "method": "wall", "provenance": facts}
        for row in rows
        if row["candidate"] == "xla" and row["method"] == "cupti" and row["weights"] == "warm"
    ]
    source = synthetic_rows.write(tmp_path / "raw.jsonl", cpu)
    readme = readme_with(tmp_path / "README.md", "provenance", "table", "winners", "bars")
    written = {path.name for path in write_report(source, tmp_path / "results", readme)}
    assert {"cpu-time-headline.png", "cpu-time-models.svg", "sweep-cpu.jsonl"} <= written
    assert "CPU; jax" in readme.read_text()
    assert "Not measured." in readme.read_text()


def test_rows_of_a_machine_without_a_gpu_do_not_replace_the_record(tmp_path: Path, rows, monkeypatch) -> None:
    facts = {**synthetic_rows.PROVENANCE, "gpu": None}
    source = synthetic_rows.write(tmp_path / "raw.jsonl", [{**row, "provenance": facts} for row in rows])
    readme = readme_with(tmp_path / "README.md", "provenance")
    before = readme.read_text()
    monkeypatch.chdir(tmp_path)
    for options in ([], ["--results", "elsewhere"], ["--results", "elsewhere", "--readme", str(readme)]):
        result = CliRunner().invoke(cli.application(), ["report", str(source), *options])
        assert result.exit_code == 2
        assert "measured without a GPU" in " ".join(result.output.split())
    assert readme.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "raw.jsonl"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    source = synthetic_rows.write(tmp_path / "raw.jsonl", rows)
    options = ["--results", str(source / "results"), "--readme", str(tmp_path / "README.md")]
    result = CliRunner().invoke(cli.application(), ["report", str(source), *options])
    assert result.exit_code == 2
    assert "the report cannot be written" in " ".join(result.output.split())


def test_every_panel_shows_all_of_its_lines(usual: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    # The first panel is a hundred times slower than the last, and both share an axis.
    slow = [row | {"samples_us": [200.0]} if row["hidden"] == 2880 and "samples_us" in row else row for row in usual]
    problems = by_problem(slow)
    shapes = report_plots._shapes(slow, problems)
    figure = report_plots._time_figure(plt, problems, shapes, [report_plots.KERNELS], 3, synthetic_rows.PROVENANCE)
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert len(panels) == len(shapes) == 3
    for axis in panels:
        low, high = axis.get_ylim()
        assert len(axis.lines) >= 6
        assert all(low < time < high for line in axis.lines for time in line.get_ydata())
    plt.close(figure)


def test_the_routing_has_a_table_and_a_chain_of_its_own(rows: list[dict[str, Any]]) -> None:
    parts = report.generated_parts(rows, {}, Path())
    table = parts["route-table"]
    assert (
        "| gpt-oss-120b | 1 | 3.00 / 3.60 | 3.00 / 3.60 | 5.00 / 6.00 | 12.0 / 14.4 | 30.0 / 36.0 | 20.0 / 24.0 "
        "| 2.50 / 3.00 |" in table
    )
    assert "|  | 16 | 3.00 / 3.60 | 3.00 / 3.60 | 5.00 / 6.00 | 12.0 / 14.4 | 30.0 / 36.0 | - | 2.50 / 3.00 |" in table
    assert "| DeepSeek-V3 | 1 |" in table
    assert "Kimi" not in table
    unreplayed = [row for row in rows if row["operation"] == "router_gemm" or row["method"] != "graph_replay"]
    before = report.generated_parts(unreplayed, {}, Path())["route-table"]
    assert "| model | T | cuda, CUPTI |" in before
    assert "|  | 16 | 3.00 / 3.60 | 5.00 / 6.00 | 12.0 / 14.4 | 30.0 / 36.0 | - | 2.50 / 3.00 |" in before
    slope = r"\d+\.\d \(\d+\.\d to \d+\.\d\)"
    line = rf"^\| DeepSeek-V3 \| 4096 \| warm \| 6\.5 \(.*\) \| {slope} \| 15\.5 \(.*\) \| 3\.5 "
    assert re.search(line, parts["route-chain"], re.M)
    assert parts["route-chain"].count("\n| gpt-oss-120b |") == 8  # four numbers of tokens, warm and cold
    assert "2880x128" not in parts["route-chain"]
    gemms = [row for row in rows if row["operation"] == "router_gemm"]
    without = report.generated_parts(gemms, {}, Path())
    assert {without[part] for part in ("route-table", "route-plot", "route-chain")} == {"Not measured.\n"}
    for part in ("table", "chain"):
        assert without[part] == parts[part]


def test_the_routing_is_drawn_beside_pytorch_and_the_logits_alone(usual: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    routes = by_problem(usual, "route")
    shapes = [shape for shape in report_plots._shapes(usual, routes) if shape.headline]
    problems = by_problem(usual) | routes
    figure = report_plots._time_figure(plt, problems, shapes, [report_plots.ROUTE], 3, synthetic_rows.PROVENANCE)
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title().split("\n")[0] for axis in panels] == ["gpt-oss-120b", "DeepSeek-V3"]
    assert "Routing on NVIDIA H200" in figure.get_suptitle()
    for axis in panels:
        names = {text.get_text() for text in axis.texts}
        assert {"cuda", "pallas", "xla", "PyTorch", "PyTorch, compiled", "logits alone", "read of the weights"} <= names
        (alone,) = [line for line in axis.lines if set(line.get_ydata()) == {3.0} and line.get_linestyle() == "--"]
        assert list(alone.get_xdata()) == [1, 16, 64, 256, 1024, 4096]
    plt.close(figure)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- generated: tabel -->\n<!-- end generated: tabel -->\n",
            "marker for 'tabel'. Expected one of table, plot",
        ),
        ("<!-- generated: table -->\nno end\n", "without its other half"),
        ("<!-- end generated: table -->\n<!-- generated: table -->\n", "without its other half"),
        ("<!-- generated: table -->\n<!-- end generated: plot -->\n", "without its other half"),
    ],
)
def test_markers_that_do_not_match_are_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewrite(text, {"table": "new\n", "plot": "new\n"}, Path("README.md"))


def test_text_outside_the_markers_is_kept_as_it_is() -> None:
    text = "a\\1\n<!-- generated: table -->\nold \\g<0>\n<!-- end generated: table -->\nb\n"
    assert rewrite(text, {"table": "new \\1\n"}, Path("x")) == text.replace("old \\g<0>", "new \\1")
    assert rewrite("no markers\n", {"table": ""}, Path("x")) == "no markers\n"


def test_the_command_finds_the_only_rows_file(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    places = ("--results", str(results), "--readme", str(readme))
    none = run_report(*places)
    assert none.exit_code == 2
    assert "holds none" in none.output
    synthetic_rows.write(results / "sweep-h200.jsonl", rows)
    found = run_report(*places)
    assert found.exit_code == 0, found.output
    assert "h200-winners.svg" in found.output
    assert "README.md does not exist" in found.output
    synthetic_rows.write(results / "sweep-b200.jsonl", rows[:1])
    several = run_report(*places)
    assert several.exit_code == 2
    assert "name the file" in several.output


@pytest.mark.parametrize("content", ["", "oops\n"])
def test_a_rows_file_without_times_is_explained(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    result = run_report(str(path), "--results", str(tmp_path / "results"), "--readme", str(tmp_path / "README.md"))
    assert result.exit_code == 2
    assert "Expected" in result.output
    assert not (tmp_path / "results").exists()
