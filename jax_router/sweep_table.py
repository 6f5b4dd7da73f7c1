"""From rows to the dispatcher's table of this GPU: every candidate's raw times and the checked winner."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_router.sweep_points import IMPLEMENTATIONS, geometric_mean
from jax_router.sweep_rows import Row, by_problem, comparable
from jax_router.tables import OPERATIONS, file_name, load_table

METRIC = "geometric mean of warm and cold CUPTI microseconds"
TABLES = Path(__file__).parent / "tables"

Measurements = dict[tuple[str, str], Row]


def metric(measurements: Measurements) -> float | None:
    """The dispatcher's figure of merit of one candidate, microseconds; None if warm or cold is missing or unchecked."""
    rows = [measurements.get(("cupti", weights)) for weights in ("warm", "cold")]
    if any(row is None or not row["check"]["passed"] for row in rows):
        return None
    return geometric_mean(statistics.median(row["samples_us"]) for row in rows if row is not None)


def figures(candidates: dict[str, Measurements]) -> dict[str, float]:
    """The metric of every implementation that has one. Peers and bounds never run in the library, so they never win."""
    found = {name: metric(candidates[name]) for name in IMPLEMENTATIONS if name in candidates}
    return {name: value for name, value in found.items() if value is not None}


def table_of(rows: Sequence[Row]) -> dict[str, Any]:
    """The table of the GPU that the last row was measured on, in the format that `jax_router.dispatch` reads.

    Raises:
      ValueError: no problem has a checked candidate with warm and cold CUPTI times.
    """
    rows, _ = comparable(rows)
    entries = []
    every = [(operation, *each) for operation in OPERATIONS for each in by_problem(rows, operation).items()]
    for operation, (hidden, experts, bias, dtype, out_dtype, tokens, rule), candidates in every:
        found = figures(candidates)
        if not found:
            continue
        times = {
            name: {
                "verified": True,
                "worst_error": candidates[name]["cupti", "warm"]["check"]["worst_error"],
                "cupti_warm_us": candidates[name]["cupti", "warm"]["samples_us"],
                "cupti_cold_us": candidates[name]["cupti", "cold"]["samples_us"],
            }
            for name in found
        }
        entries.append(
            {
                "operation": operation,
                **({} if rule is None else {"rule": json.loads(rule)}),
                "hidden": hidden,
                "experts": experts,
                "dtype": dtype,
                "bias": bias,
                "out_dtype": out_dtype,
                "tokens": tokens,
                "winner": min(found, key=lambda name: found[name]),
                "candidates": times,
            }
        )
    if not entries:
        raise ValueError(
            "the rows hold no checked implementation with warm and cold CUPTI times. Expected a sweep on a GPU; run "
            "`jax-router sweep --suite headline --write-table` there."
        )
    by_size = ("hidden", "experts", "bias", "tokens")
    entries.sort(key=lambda entry: (OPERATIONS.index(entry["operation"]), *map(entry.get, by_size)))
    provenance = rows[-1]["provenance"]
    return {
        "gpu": provenance["gpu"],
        "provenance": provenance,
        "source_hash": provenance["source_hash"],
        "metric": METRIC,
        "entries": entries,
    }


def table_path(gpu: str, folder: Path = TABLES) -> Path:
    return folder / file_name(gpu)


def write_table(rows: Sequence[Row], folder: Path = TABLES) -> Path:
    """Write the table of the rows' GPU, whole or not at all; the dispatcher reads it from then on.

    Raises:
      ValueError: as `table_of`.
    """
    table = table_of(rows)
    path = table_path(table["gpu"], folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    # One entry per line: a new measurement of one problem is then a small change to read.
    head = json.dumps({name: value for name, value in table.items() if name != "entries"}, indent=1)
    lines = ",\n  ".join(json.dumps(entry) for entry in table["entries"])
    text = f'{head.removesuffix("}").rstrip()},\n "entries": [\n  {lines}\n ]\n}}\n'
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    load_table.cache_clear()
    return path
