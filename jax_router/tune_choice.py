"""Which configuration wins at a point: pure functions of a row of the tuner.

A row of `jax-router tune` is one point, with the fields that a row of the sweep has and

    pick      the configuration that the launcher takes
    winner    that of `winner`
    gain      how much less time the winner takes than the pick, as a fraction
    rounds    how many there were; what was hopeless in the first is in no other
    calls_per_sample   launches in the graph that one raw time is the mean of
    configs   by name: `verified`, with the `launches` that were compared or the `reason` why not, and `warm_us` and
              `cold_us`: the raw times of each round, microseconds per call
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from jax_router.sweep_points import BOTH, geometric_mean
from jax_router.sweep_rows import Row

LEAST_GAIN = 0.02  # what a configuration must be faster by, if rounds agree better than that
METRIC = "geometric mean over rounds, warm and cold weights, of median microseconds in graph replay"


def rounds(row: Row, name: str) -> list[float]:
    """Microseconds of a configuration in each round that it was measured in: geometric mean of its medians."""
    times = row["configs"][name]
    by_round = zip(*(times[f"{weights}_us"] for weights in BOTH), strict=True)
    return [geometric_mean(map(statistics.median, of_round)) for of_round in by_round]


def medians(row: Row, name: str) -> tuple[float, float]:
    """Microseconds of a configuration, warm and cold: geometric mean of the medians of the rounds."""
    warm, cold = (geometric_mean(map(statistics.median, row["configs"][name][f"{weights}_us"])) for weights in BOTH)
    return warm, cold


def timed(row: Row) -> list[str]:
    """The configurations that have times."""
    return [name for name, found in row["configs"].items() if "warm_us" in found]


def complete(row: Row) -> dict[str, float]:
    """Microseconds by METRIC of the verified configurations that were measured in every round."""
    times = {name: rounds(row, name) for name in timed(row) if row["configs"][name]["verified"]}
    return {name: geometric_mean(of_rounds) for name, of_rounds in times.items() if len(of_rounds) == row["rounds"]}


def apart(row: Row, name: str, other: str) -> tuple[float, float]:
    """How much more time `other` takes than `name`, as a logarithm, and the noise of that.

    The noise is the range of the same figure over the rounds, and LEAST_GAIN at least.
    """
    ratios = [math.log(b / a) for a, b in zip(rounds(row, name), rounds(row, other), strict=True)]
    return statistics.fmean(ratios), max(max(ratios) - min(ratios), -math.log1p(-LEAST_GAIN))


def winner(row: Row) -> str:
    """The pick, or the fastest configuration that is faster than it by more than the noise, and so in every round.

    Where the pick itself is not verified nothing is left to compare with, and it stays.
    """
    times = complete(row)
    pick: str = row["pick"]
    if pick not in times:
        return pick
    better = [name for name in times if name != pick and _exceeds(apart(row, name, pick))]
    return min(better, key=lambda name: times[name], default=pick)


def gain(row: Row, name: str) -> float:
    """How much less time `name` takes than the pick, as a fraction of the pick's."""
    return 0.0 if name == row["pick"] else -math.expm1(-apart(row, name, row["pick"])[0])


def regret(row: Row) -> float | None:
    """The pick's time over that of the fastest verified configuration; None if the pick is not verified."""
    times = complete(row)
    return times[row["pick"]] / min(times.values()) if row["pick"] in times else None


def unverified(row: Row) -> Mapping[str, Any]:
    """Why, by configuration, some are not verified."""
    return {name: found["reason"] for name, found in row.get("configs", {}).items() if not found["verified"]}


def _exceeds(difference: tuple[float, float]) -> bool:
    return difference[0] > difference[1]
