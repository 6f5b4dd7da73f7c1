"""The rows file of the sweep: JSON lines, appended as they come, read by `--resume`, the table writer and the report.

A row is one measurement or one check (`status` "ok"), one of these that failed ("failed", with the reason; what fails
its check is not timed), or one candidate that this machine does not run ("skipped", with the reason). It is of one
operation, `router_gemm` if it does not say, and of `route` it has the rule. Without a `weight_dtype` its weight has
the dtype of x. Every row carries its provenance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from jax_router.sweep_points import FLOAT32, ProblemKey, Shape, rule_key, spec_of
from jax_router.tables import OPERATIONS

Row = dict[str, Any]
_KEY = ("hidden", "experts", "bias", "dtype", "out_dtype", "tokens", "candidate", "method", "weights")
_REQUIRED = (*_KEY, "status", "models", "provenance")


class RowsError(ValueError):
    """A rows file that cannot be used; the message says which line and what to do."""


def key(row: Row) -> tuple[Any, ...]:
    """Identity of a measurement, as `Point.key`."""
    return (*problem_of(row), *(row[name] for name in _KEY[6:]))


def problem_of(row: Mapping[str, Any]) -> ProblemKey:
    """The problem of a row, or of an entry of a table."""
    sizes = (row[name] for name in _KEY[:6])
    return ProblemKey._make((*sizes, rule_key(row.get("rule")), row.get("weight_dtype", row["dtype"])))


def place_in_table(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the entries of a table are sorted by."""
    problem = problem_of(entry)
    sizes = (problem.hidden, problem.experts, problem.bias, problem.weight_dtype, problem.dtype, problem.tokens)
    return (OPERATIONS.index(entry["operation"]), *sizes)


def by_weights(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of 16-bit weights and those of float32 weights, which are judged and shown apart."""
    found: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        found[problem_of(row).weight_dtype == FLOAT32].append(row)
    return found


def identity(provenance: Row) -> tuple[Any, ...]:
    """Rows are comparable when they have the same sources, GPU, driver, nvcc, jax and torch."""
    return tuple(provenance.get(name) for name in ("source_hash", "gpu", "driver", "nvcc", "jax", "jaxlib", "torch"))


class RowsWriter:
    """Appends rows to a file. A row is on the disk when `write` returns, so that a killed sweep loses nothing."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_partial_line(path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        self._file.write(json.dumps(row, separators=(",", ":"), allow_nan=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _drop_partial_line(path: Path) -> None:
    """Cut off a last line that a killed sweep did not finish: the next row would be appended to it."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file. A last line without its newline is what a killed sweep leaves, and is ignored.

    Raises:
      RowsError: no such file, or a line that is not a row.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        message = f"rows file {path} cannot be read ({error}). Expected the .jsonl file of a sweep; check the path."
        raise RowsError(message) from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RowsError(_broken(path, number, f"is not JSON ({error.msg})")) from None
        missing = [name for name in _REQUIRED if not isinstance(row, dict) or name not in row]
        if missing:
            raise RowsError(_broken(path, number, f"has no {missing[0]!r}"))
        rows.append(row)
    return rows


def _broken(path: Path, number: int, what: str) -> str:
    return (
        f"rows file {path}, line {number}, {what}. Expected one JSON object per line as the sweep writes it; delete "
        "that line, or start a new file by leaving out --resume."
    )


def finished(rows: Iterable[Row], provenance: Row) -> set[tuple[Any, ...]]:
    """Keys that `--resume` skips: measured under the same circumstances. Failed and skipped ones run again."""
    return {key(row) for row in rows if row["status"] == "ok" and identity(row["provenance"]) == identity(provenance)}


def comparable(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The rows measured in the circumstances of the last one, the last of each key, and how many others there were."""
    if not rows:
        return [], 0
    wanted = identity(rows[-1]["provenance"])
    latest = {key(row): row for row in rows if identity(row["provenance"]) == wanted}
    return list(latest.values()), sum(identity(row["provenance"]) != wanted for row in rows)


def shape_of(row: Row) -> Shape:
    """What a row was measured on."""
    rule = row.get("rule")
    corrected = rule is not None and rule["correction_bias"]
    problem = problem_of(row)
    return Shape(
        problem.hidden,
        problem.experts,
        problem.bias,
        tuple(row["models"]),
        spec_of(problem.rule),
        corrected,
        problem.dtype,
        problem.weight_dtype,
    )


def by_problem(
    rows: Iterable[Row], operation: str = OPERATIONS[0]
) -> dict[ProblemKey, dict[str, dict[tuple[str, str], Row]]]:
    """Timed rows of one operation as {problem_of(row): {candidate: {(method, weights): row}}}."""
    found: dict[ProblemKey, dict[str, dict[tuple[str, str], Row]]] = {}
    for row in rows:
        if row["status"] == "ok" and "samples_us" in row and row.get("operation", OPERATIONS[0]) == operation:
            found.setdefault(problem_of(row), {}).setdefault(row["candidate"], {})[row["method"], row["weights"]] = row
    return found
