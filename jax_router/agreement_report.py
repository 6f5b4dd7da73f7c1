"""What a record of `jax-router agreement` says: the table, for the terminal and for markdown, and the bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jax_router.sweep_figures import Bar
from jax_router.sweep_points import IMPLEMENTATIONS

ASKED = 10_000_000  # tokens, by the bar
COUNTED = ("differing", "outside", "undecided")  # tokens of a path

Record = dict[str, Any]


def read_record(path: Path) -> Record | None:
    """The record in a file, None if there is no file.

    Raises:
      ValueError: the file holds something else.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        print_record(Console(quiet=True), record)
        bar(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"agreement record {path} is broken ({type(error).__name__}: {error}). Expected what jax-router agreement "
            "writes; run that again, or delete the file."
        ) from error
    return record


def path_names(record: Record) -> list[str]:
    """Every path of any router: the implementations first."""
    found = {name for router in record["routers"] for name in router["paths"]}
    first = [name for name in IMPLEMENTATIONS if name in found]
    return [*first, *sorted(found.difference(first), reverse=True)]


def totals(record: Record) -> dict[str, dict[str, int]]:
    """{path: {"tokens", "differing", "outside", "undecided"}} over all routers that have the path."""
    sums: dict[str, dict[str, int]] = {}
    for name in path_names(record):
        having = [router for router in record["routers"] if name in router["paths"]]
        kinds = {kind: sum(router["paths"][name][kind] for router in having) for kind in COUNTED}
        sums[name] = {"tokens": sum(router["tokens"] for router in having), **kinds}
    return sums


def table_of(record: Record) -> tuple[list[str], list[list[str]]]:
    """Header and rows. A cell is `differing / outside`, or why the path does not run."""
    names = path_names(record)
    body = []
    for router in record["routers"]:
        cells = [_cell(router["paths"].get(name)) for name in names]
        body.append([", ".join(router["models"]), router["size"], f"{router['tokens']:,}", *cells])
    sums = totals(record)
    tokens = sum(router["tokens"] for router in record["routers"])
    body.append(["all", "", f"{tokens:,}", *(_cell(sums[name]) for name in names)])
    return ["model", "shape", "tokens", *names], body


def _cell(counts: dict[str, int] | None) -> str:
    return "-" if counts is None else " / ".join(f"{counts[kind]:,}" for kind in COUNTED[:2])


NOTE = (
    "Tokens whose expert set is not that of float64 / those of them that the bound of float32 logits does not explain. "
    "bf16 paths are held to the same bound, which they are not meant to keep."
)


def markdown(record: Record) -> str:
    """The table, and how many tokens are too close to their boundary to be decided by the bound."""
    header, body = table_of(record)
    rules = ["---", "---", *(["---:"] * (len(header) - 2))]
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rules, *body))
    undecided = ", ".join(
        f"{name} {counts['undecided']:,}" for name, counts in totals(record).items() if name in IMPLEMENTATIONS
    )
    facts = record["provenance"]
    where = f"{facts['gpu'] or 'CPU'}, {facts['date'][:10]}, sources `{facts['source_hash'][:12]}`"
    return f"{lines}\n{NOTE} Tokens within the bound of their boundary: {undecided or 'none'}. {where}.\n"


def print_record(console: Console, record: Record) -> None:
    header, body = table_of(record)
    table = Table(title="differing / outside the bound", box=box.SIMPLE_HEAD)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < 2 else "right")
    for cells in body:
        table.add_row(*cells)
    console.print(table)
    refused: dict[tuple[str, str], list[str]] = {}
    for router in record["routers"]:
        for name, reason in router["refused"].items():
            refused.setdefault((name, reason), []).append(router["models"][0])
    for (name, reason), models in refused.items():
        where = "all routers" if len(models) == len(record["routers"]) else ", ".join(models)
        console.print(f"[yellow]skipped[/] {name} ({where}): {reason}", highlight=False, soft_wrap=True)


def bar(record: Record | None, source_hash: str | None = None) -> Bar:
    """The bar on expert sets. A record of other sources than `source_hash` proves nothing."""
    claim = f"every expert set is float64's but for tokens within the bound, {ASKED:,} tokens (cuda, pallas, xla)"
    if record is None or not record["routers"]:
        return Bar(claim, None, "no record")
    if source_hash not in (None, record["provenance"]["source_hash"]):
        return Bar(claim, None, f"record of other sources, {record['provenance']['source_hash'][:12]}")
    sums = totals(record)
    outside = {name: sums[name]["outside"] for name in IMPLEMENTATIONS if name in sums}
    tokens = min((sums[name]["tokens"] if name in sums else 0) for name in IMPLEMENTATIONS)
    figures = "; ".join(
        f"{name} {each['differing']:,} differing, {each['outside']:,} outside" for name, each in sums.items()
    )
    met = False if any(outside.values()) else True if tokens >= ASKED else None
    short = "" if tokens >= ASKED else f"; {tokens:,} tokens by all three"
    return Bar(claim, met, figures + short)
