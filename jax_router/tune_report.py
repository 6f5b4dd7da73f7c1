"""What the tuner prints and writes: a table per run, and two runs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from jax_router import tune_choice
from jax_router.sweep_points import geometric_mean
from jax_router.sweep_rows import Row, identity, key, shape_of
from jax_router.sweep_summary import show

Cells = list[list[str]]
HEADER = ("shape", "T", "pick", "us", "winner", "us", "gain", "fastest", "x pick", "slowest", "x pick")
SIDE_BY_SIDE = ("shape", "T", "winner of A", "winner of B", "B's over A's in A", "in B", "noise", "verdict")
NUMBERS = ("T", "us", "gain", "x pick", "B's over A's in A", "in B", "noise")
NOTE = (
    f"Microseconds per call in graph replay, warm / cold weights. A configuration replaces the launcher's pick if it "
    f"takes less time by more than the noise, which is {tune_choice.LEAST_GAIN:.0%} or the range of that gain over the "
    f"rounds. Fastest and slowest: of all that fit, over the pick. The slowest are measured in one round."
)
SIDE_BY_SIDE_NOTE = (
    "How much more time B's winner takes than A's, as measured in either run. A winner changed by more than noise "
    f"where these two figures are further apart than the noise: {tune_choice.LEAST_GAIN:.0%}, or the range of the "
    "figure over the rounds of a run."
)


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows whose configurations have times."""
    return [row for row in rows if "calls_per_sample" in row]


def points_of(rows: Sequence[Row]) -> Cells:
    """A line per measured point, under HEADER."""
    body = []
    for row in measured(rows):
        times = {name: geometric_mean(tune_choice.rounds(row, name)) for name in tune_choice.timed(row)}
        best, worst = (choose(times, key=lambda name: times[name]) for choose in (min, max))
        pick, winner = row["pick"], row["winner"]
        body.append([
            shape_of(row).label, str(row["tokens"]),
            pick, show(tune_choice.medians(row, pick)),
            *(("=", "", "") if winner == pick else
              (winner, show(tune_choice.medians(row, winner)), f"{row['gain']:.1%}")),
            best, f"{times[best] / times[pick]:.3f}", worst, f"{times[worst] / times[pick]:.3f}",
        ])  # fmt: skip
    return body


def summary(rows: Sequence[Row]) -> str:
    """The launcher's regret, in a sentence."""
    regrets = {_label(row): tune_choice.regret(row) for row in measured(rows)}
    found = {label: regret for label, regret in regrets.items() if regret is not None}
    if not found:
        return "No point was measured."
    worst = max(found, key=lambda label: found[label])
    better = sum(row["winner"] != row["pick"] for row in measured(rows))
    return (
        f"The launcher's pick takes {geometric_mean(found.values()):.4f} times as long as the fastest configuration "
        f"(geometric mean of {len(found)} points), at worst {found[worst]:.3f} ({worst}). At {better} of them another "
        "configuration is faster by more than the noise."
    )


def print_points(console: Console, rows: Sequence[Row]) -> None:
    """The table of a run, what failed in it, and the regret."""
    _print(console, "configurations of the CUDA kernels", HEADER, points_of(rows))
    console.print(NOTE, soft_wrap=True, highlight=False)
    for row in rows:
        if row["status"] != "ok":
            console.print("[red]failed[/]", end=" ")
            console.print(f"{_label(row)}: {row['reason']}", highlight=False, markup=False, soft_wrap=True)
    console.print(summary(rows), highlight=False, soft_wrap=True)


# Two runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The winners of one point in two runs."""

    label: str
    tokens: int
    winners: tuple[str, str]
    more: tuple[float, float] | None = None  # time that B's winner takes more than A's in A and in B, as logarithms
    noise: float = 0.0  # of these, as a logarithm
    missing: str = ""  # where one of the winners has no time in every round

    @property
    def changed(self) -> bool:
        return self.winners[0] != self.winners[1]

    @property
    def beyond_noise(self) -> bool:
        """Whether the runs differ about the two winners by more than noise."""
        return self.changed and (self.more is None or abs(self.more[0] - self.more[1]) > self.noise)

    @property
    def verdict(self) -> str:
        if not self.changed:
            return "same"
        return self.missing or ("changed by more than noise" if self.beyond_noise else "within noise")


def compare(first: Sequence[Row], second: Sequence[Row]) -> list[Comparison]:
    """The points that the runs measured; one that only one of them has counts as a change.

    Raises:
      ValueError: they have none in common, or the runs are of other sources, GPUs or versions.
    """
    if identity(first[-1]["provenance"]) != identity(second[-1]["provenance"]):
        raise ValueError(
            "--compare names runs of different sources, GPUs or versions. Expected two runs of the same; measure one "
            "of them again."
        )
    a, b = ({key(row): row for row in measured(rows)} for rows in (first, second))
    if not a.keys() & b.keys():
        raise ValueError(
            "--compare names runs without a measured point in common. Expected two runs of the same points."
        )
    return [
        _compared(a[each], b[each]) if each in a and each in b else _lone(a.get(each), b.get(each)) for each in a | b
    ]


def _lone(a: Row | None, b: Row | None) -> Comparison:
    """A point that only one run has."""
    row, name = (a, "B") if a is not None else (b, "A")
    assert row is not None
    winners = tuple("none" if each is None else each["winner"] for each in (a, b))
    return Comparison(shape_of(row).label, row["tokens"], (winners[0], winners[1]), missing=f"not measured in {name}")


def _compared(a: Row, b: Row) -> Comparison:
    winners = a["winner"], b["winner"]
    label, tokens = shape_of(a).label, a["tokens"]
    for name, row in (("A", a), ("B", b)):
        for winner in winners:
            if winner not in tune_choice.complete(row):
                return Comparison(label, tokens, winners, missing=f"{winner} was not measured to the end in {name}")
    in_a, in_b = (tune_choice.apart(row, *winners) for row in (a, b))
    return Comparison(label, tokens, winners, (in_a[0], in_b[0]), max(in_a[1], in_b[1]))


def compared_cells(found: Sequence[Comparison]) -> Cells:
    """A line per point, under SIDE_BY_SIDE."""
    body = []
    for each in found:
        figures = ["", "", ""]
        if each.changed and each.more is not None:
            figures = [*(f"{math.expm1(more):+.1%}" for more in each.more), f"{math.expm1(each.noise):.1%}"]
        body.append([each.label, str(each.tokens), *each.winners, *figures, each.verdict])
    return body


def verdict(found: Sequence[Comparison]) -> str:
    changed, beyond = sum(each.changed for each in found), sum(each.beyond_noise for each in found)
    return f"Of {len(found)} points {changed} have another winner in the second run, {beyond} by more than noise."


def print_comparison(console: Console, found: Sequence[Comparison]) -> None:
    _print(console, "winners of two runs", SIDE_BY_SIDE, compared_cells(found))
    console.print(SIDE_BY_SIDE_NOTE, soft_wrap=True, highlight=False)
    console.print(verdict(found), highlight=False)


def page(names: Sequence[str], runs: Sequence[Sequence[Row]], found: Sequence[Comparison]) -> str:
    """The markdown of two runs."""
    facts = runs[0][-1]["provenance"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("driver", "nvcc", "jax") if facts.get(name))
    text = (
        f"# Configurations of the CUDA kernels\n\n{facts['gpu']}, {versions}; sources `{facts['source_hash'][:12]}`.\n"
    )
    for letter, name, rows in zip("AB", names, runs, strict=True):
        text += f"\n## Run {letter}\n\n`{name}`, {rows[-1]['provenance']['date']}.\n\n"
        text += f"{_markdown(HEADER, points_of(rows))}\n{NOTE}\n\n{summary(rows)}\n"
    both = _markdown(SIDE_BY_SIDE, compared_cells(found))
    return f"{text}\n## Both\n\n{both}\n{SIDE_BY_SIDE_NOTE}\n\n{verdict(found)}\n"


def _markdown(header: Sequence[str], body: Cells) -> str:
    rules = ["---:" if name in NUMBERS else "---" for name in header]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rules, *body))


def _print(console: Console, title: str, header: Sequence[str], body: Cells) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in header:
        table.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
    for cells in body:
        table.add_row(*cells)
    console.print(table)


def _label(row: Row) -> str:
    return f"{shape_of(row).label} T={row['tokens']}"
