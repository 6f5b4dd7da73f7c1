"""From rows to the dispatcher's table of this GPU: every candidate's raw times and the verified winner."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_router.sweep_points import IMPLEMENTATIONS, ProblemKey, geometric_mean
from jax_router.sweep_rows import Row, by_problem, comparable, place_in_table, problem_of
from jax_router.tables import OPERATIONS, file_name, load_table
from jax_router.verification import gate

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


def table_of(rows: Sequence[Row], record: gate.Record | None, record_name: str = "") -> dict[str, Any]:
    """The table of the GPU that the last row was measured on, in the format that `jax_router.dispatch` reads.

    Args:
      rows: of a sweep.
      record: of that GPU's verification. What it does not prove cannot win; None proves nothing, and `xla` is left.
      record_name: of its file, for the table to name.

    Raises:
      ValueError: no problem has `xla` or a verified kernel with warm and cold CUPTI times.
    """
    rows, _ = comparable(rows)
    provenance = rows[-1]["provenance"] if rows else {}
    circumstances = {"source_hash": provenance.get("source_hash"), "gpu": provenance.get("gpu")}
    entries, accepted = [], []
    every = [(operation, *each) for operation in OPERATIONS for each in by_problem(rows, operation).items()]
    for operation, problem, candidates in every:
        shape = {
            "operation": operation,
            **({} if problem.rule is None else {"rule": json.loads(problem.rule)}),
            "hidden": problem.hidden,
            "experts": problem.experts,
            "dtype": problem.dtype,
            **({} if problem.weight_dtype == problem.dtype else {"weight_dtype": problem.weight_dtype}),
            "bias": problem.bias,
            "out_dtype": problem.out_dtype,
        }
        found = figures(candidates)
        reasons = {
            name: gate.why_unverified(record, {**shape, "implementation": name}, **circumstances) for name in found
        }
        verified = {name: found[name] for name, reason in reasons.items() if reason is None}
        if not verified:
            continue
        times = {
            name: {
                "verified": reason is None,
                **({} if reason is None else {"reason": reason}),
                "worst_error": candidates[name]["cupti", "warm"]["check"]["worst_error"],
                "cupti_warm_us": candidates[name]["cupti", "warm"]["samples_us"],
                "cupti_cold_us": candidates[name]["cupti", "cold"]["samples_us"],
            }
            for name, reason in reasons.items()
        }
        winner = min(verified, key=lambda name: verified[name])
        entries.append({**shape, "tokens": problem.tokens, "winner": winner, "candidates": times})
        accepted += [{**shape, "implementation": name} for name in verified if name in gate.KERNELS]
    if not entries:
        raise ValueError(
            "the rows hold neither xla nor a verified kernel with warm and cold CUPTI times. Expected a sweep on a GPU "
            "that has them; run `jax-router sweep --suite headline --write-table` there."
        )
    entries.sort(key=place_in_table)
    return {
        "gpu": provenance["gpu"],
        "provenance": provenance,
        "source_hash": provenance["source_hash"],
        "metric": METRIC,
        "verification": None if record is None or not accepted else gate.accepted(record, record_name, accepted),
        "entries": entries,
    }


def refusals(table: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """What a table did not accept: a line per implementation and reason, and one that says how to verify it."""
    models = {_without_tokens(row): row["models"][0] for row in rows}
    shapes: dict[tuple[str, str], dict[str, str]] = {}  # label and model of each, by implementation and reason
    for entry in table["entries"]:
        for name, candidate in entry["candidates"].items():
            if not candidate["verified"]:
                shape = {gate.label(entry): models[_without_tokens(entry)]}
                shapes.setdefault((name, candidate["reason"]), {}).update(shape)
    lines = [f"{name} on {', '.join(of_reason)}: {reason}" for (name, reason), of_reason in shapes.items()]
    if not lines:
        return []
    names = dict.fromkeys(name for name, _ in shapes)
    wanted = dict.fromkeys(model for of_reason in shapes.values() for model in of_reason.values())
    return [*lines, f"To verify: {gate.how_to_verify(names, wanted)}"]


def _without_tokens(found: Mapping[str, Any]) -> ProblemKey:
    return problem_of(found)._replace(tokens=None)


def table_path(gpu: str, folder: Path = TABLES) -> Path:
    return folder / file_name(gpu)


def write_table(table: dict[str, Any], folder: Path = TABLES) -> Path:
    """Write a table, whole or not at all; the dispatcher reads it from then on. `configs` that are there stay."""
    path = table_path(table["gpu"], folder)
    folder.mkdir(parents=True, exist_ok=True)
    there = read_table(path)
    kept = {} if there is None or "configs" not in there else {"configs": there["configs"]}
    return _replace(path, {**table, **kept})


def write_configs(configs: dict[str, Any], gpu: str, folder: Path = TABLES) -> Path:
    """Write the configurations of a GPU into its table, which must be there; everything else in it stays."""
    path = table_path(gpu, folder)
    table = read_table(path)
    if table is None:
        raise ValueError(
            f"there is no table {path} that can be read. Expected that of this GPU, for the configurations to stand "
            "in; run `jax-router sweep --suite headline --write-table` first."
        )
    return _replace(path, {**table, "configs": configs})


def read_table(path: Path) -> dict[str, Any] | None:
    """The table in a file; None if there is none, or a broken one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "entries" in found else None


def _replace(path: Path, table: dict[str, Any]) -> Path:
    partial = path.with_suffix(".json.partial")
    parts = {name: value for name, value in table.items() if name not in ("entries", "configs")}
    text = f"{_open(parts, indent=1)},\n {_lines(table['entries'])}"
    if "configs" in table:
        facts = {name: value for name, value in table["configs"].items() if name != "entries"}
        text += f',\n "configs": {_open(facts)}, {_lines(table["configs"]["entries"])}\n }}'
    partial.write_text(f"{text}\n}}\n", encoding="utf-8")
    os.replace(partial, path)
    load_table.cache_clear()
    return path


def _open(facts: dict[str, Any], indent: int | None = None) -> str:
    """An object in JSON to which more can be added."""
    return json.dumps(facts, indent=indent).removesuffix("}").rstrip()


def _lines(entries: Sequence[Any]) -> str:
    """One entry per line: a new measurement of one problem is then a small change to read."""
    return '"entries": [\n  ' + ",\n  ".join(json.dumps(entry) for entry in entries) + "\n ]"
