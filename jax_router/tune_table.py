"""From rows of the tuner to the `configs` of the dispatcher's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax_router.sweep_rows import Row, identity, place_in_table, problem_of
from jax_router.tune_choice import METRIC

PLACE = ("operation", "rule", "hidden", "experts", "dtype", "weight_dtype", "bias", "out_dtype", "tokens")
FOUND = ("pick", "winner", "gain", "rounds", "calls_per_sample", "configs")


def configs_of(rows: Sequence[Row], there: Mapping[str, Any] | None) -> dict[str, Any]:
    """The section of a table: every measured point, with all raw times, in the format that the dispatcher reads.

    Args:
      rows: of one run.
      there: the section that the table has, if any. Its points that were not measured again stay, where they are of
        the same sources, GPU and versions.

    Raises:
      ValueError: no point was measured.
    """
    measured = [row for row in rows if "calls_per_sample" in row]
    if not measured:
        raise ValueError("the rows hold no measured point. Expected those of `jax-router tune` on a GPU.")
    provenance = rows[-1]["provenance"]
    kept = there["entries"] if there is not None and identity(there["provenance"]) == identity(provenance) else []
    entries = {problem_of(entry): entry for entry in kept}
    entries |= {problem_of(row): {name: row[name] for name in (*PLACE, *FOUND) if name in row} for row in measured}
    return {
        "provenance": provenance,
        "source_hash": provenance["source_hash"],
        "metric": METRIC,
        "entries": sorted(entries.values(), key=place_in_table),
    }
