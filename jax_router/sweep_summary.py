"""What the terminal and the report print of a sweep: one line per candidate, with its ratios."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from jax_router.sweep_figures import Bar, Problems, median
from jax_router.sweep_points import BOTH, BOUNDS, HIDDEN_EXPERTS, NO_ROUTING, READ_WEIGHT, ProblemKey, Shape
from jax_router.sweep_rows import Row, by_problem, problem_of, shape_of
from jax_router.tables import OPERATIONS

# Methods whose times can be compared with each other.
FAMILIES = {
    "graph replay": ("graph_replay", "torch_replay"),
    "CUPTI": ("cupti",),
    "chain slope": ("chain_slope",),
    "wall": ("wall",),
}

NOT_RIVALS = (*BOUNDS, NO_ROUTING, *HIDDEN_EXPERTS)  # they compute no logits, or on another weight
Pair = tuple[float | None, float | None]  # warm, cold


@dataclass(frozen=True)
class Line:
    """Medians of one candidate on one problem by one method, and how they compare."""

    shape: Shape
    tokens: int | None
    candidate: str
    method: str
    microseconds: Pair
    to_best_other: Pair  # over the fastest other candidate by the same method
    to_floor: Pair  # over a read of the weight bytes
    worst_error: float | None  # in units of the float32 bound


def lines(rows: Sequence[Row]) -> list[Line]:
    """Every timed candidate, in the order of the rows."""
    gemms = by_problem(rows)
    shapes = {problem_of(row): shape_of(row) for row in rows}
    found = []
    for problem, candidates in [each for operation in OPERATIONS for each in by_problem(rows, operation).items()]:
        floor = floors(gemms, problem)
        for family, methods in FAMILIES.items():
            times: dict[str, Pair] = {}
            for candidate, measurements in candidates.items():
                for method in methods:
                    warm, cold = (median(measurements, method, weights) for weights in BOTH)
                    if (warm, cold) != (None, None):
                        times[candidate] = warm, cold
            for candidate, pair in times.items():
                others = [times[other] for other in times if other not in (candidate, *NOT_RIVALS)]
                if candidate in NOT_RIVALS:
                    others = []
                best_others = [_smallest(other[state] for other in others) for state in (0, 1)]
                check = next(iter(candidates[candidate].values())).get("check")
                found.append(
                    Line(
                        shapes[problem],
                        problem[5],
                        candidate,
                        family,
                        pair,
                        _over(pair, best_others),
                        _over(pair, floor),
                        check["worst_error"] if check else None,
                    )
                )
    return found


def floors(problems: Problems, problem: ProblemKey) -> Pair:
    """Microseconds of a read of the weight bytes of this problem's shape, warm and cold, from the router GEMMs'."""
    bound = problems.get(problem._replace(tokens=None, rule=None), {}).get(READ_WEIGHT)
    warm, cold = (median(bound, "graph_replay", weights) for weights in BOTH)
    return warm, cold


def _smallest(times: Iterable[float | None]) -> float | None:
    return min((time for time in times if time is not None), default=None)


def _over(pair: Sequence[float | None], other: Sequence[float | None]) -> Pair:
    warm, cold = (None if a is None or not b else a / b for a, b in zip(pair, other, strict=True))
    return warm, cold


def show(pair: Pair, empty: str = "-") -> str:
    """`warm / cold`, or the one there is, with three digits or so."""
    warm, cold = (empty if value is None else _digits(value) for value in pair)
    return warm if pair[1] is None else f"{warm} / {cold}"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def print_lines(console: Console, found: Sequence[Line]) -> None:
    """The table of a sweep. Cells are warm / cold."""
    table = Table(title="microseconds, medians, warm / cold weights", box=box.SIMPLE_HEAD)
    for name in ("shape", "T", "candidate", "method", "us", "x best other", "x floor", "worst error"):
        table.add_column(name, justify="left" if name in ("shape", "candidate", "method") else "right", no_wrap=True)
    previous: Line | None = None
    for line in found:
        same_shape = previous is not None and previous.shape == line.shape
        if previous is not None and not same_shape:
            table.add_section()
        ratios = [ratio for ratio in line.to_best_other if ratio is not None]
        fastest = "[green]" if ratios and max(ratios) < 1 else ""
        table.add_row(
            "" if same_shape else line.shape.label,
            "" if previous is not None and same_shape and previous.tokens == line.tokens else _tokens(line.tokens),
            line.candidate,
            line.method,
            show(line.microseconds),
            fastest + show(line.to_best_other),
            show(line.to_floor),
            "-" if line.worst_error is None else f"{line.worst_error:.2g}",
        )
        previous = line
    console.print(table)
    shared = {line.shape.label: ", ".join(line.shape.models) for line in found}
    for label, models in shared.items():
        console.print(f"{label}: {models}")
    console.print(
        "worst error: largest |logits - float64|, in units of the float32 accumulation bound; of route that of the"
    )
    console.print("weights over their bound. x floor: over a graph replay that only reads the weight bytes; x best")
    console.print("other: by the same method.")


def _tokens(tokens: int | None) -> str:
    return "-" if tokens is None else str(tokens)


def print_bars(console: Console, bars: Sequence[Bar]) -> None:
    table = Table(title="bars", box=box.SIMPLE_HEAD)
    for name in ("", "bar", "figures"):
        table.add_column(name, overflow="fold")
    style = {True: "green", False: "red", None: "yellow"}
    for bar in bars:
        table.add_row(f"[{style[bar.met]}]{bar.verdict}[/]", bar.claim, bar.figures)
    console.print(table)


def print_accuracy(console: Console, rows: Sequence[Row]) -> None:
    """RMS errors against float64, if they were measured."""
    measured = [row for row in rows if row["method"] == "rms" and row["status"] == "ok"]
    if not measured:
        return
    names = list(dict.fromkeys(name for row in measured for name in row["rms_error"]))
    table = Table(
        title="root-mean-square error against float64, logits of standard deviation near 1", box=box.SIMPLE_HEAD
    )
    for column in ("shape", "data", *names):
        table.add_column(column, justify="left" if column in ("shape", "data") else "right")
    for row in measured:
        errors = [f"{row['rms_error'][name]:.1e}" if name in row["rms_error"] else "-" for name in names]
        table.add_row(f"{row['hidden']}x{row['experts']}{shape_of(row).dtypes}", row["weights"], *errors)
    console.print(table)
