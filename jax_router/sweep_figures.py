"""A bar, and the figures that bars are judged by: medians of rows, the worst of several ratios."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from jax_router.sweep_points import ProblemKey
from jax_router.sweep_rows import Row

# by_problem() of the rows: {problem: {candidate: {(method, weights): row}}}
Problems = dict[ProblemKey, dict[str, dict[tuple[str, str], Row]]]


@dataclass(frozen=True)
class Bar:
    """One claim and its figures. `met` is None when the rows do not cover it."""

    claim: str
    met: bool | None
    figures: str

    @property
    def verdict(self) -> str:
        return {True: "met", False: "not met", None: "not measured"}[self.met]


def median(measurements: dict[tuple[str, str], Row] | None, method: str, weights: str) -> float | None:
    row = (measurements or {}).get((method, weights))
    return None if row is None else statistics.median(row["samples_us"])


def worst(claim: str, ratios: dict[str, float], limit: float, expected: int | None, unit: str) -> Bar:
    """A bar on the largest of `ratios`, {where: ratio}. Fewer than `expected` of them can refute it, not prove it."""
    if not ratios:
        return Bar(claim, None, "no rows")
    where = max(ratios, key=lambda name: ratios[name])
    over = sum(ratio > limit for ratio in ratios.values())
    text = f"worst {ratios[where]:.3f} {unit} at {where}; {over} of {len(ratios)} over {limit:.3g}"
    missing = 0 if expected is None else expected - len(ratios)
    if missing > 0:
        text += f"; {missing} of {expected} not measured"
    return Bar(claim, False if over else None if missing > 0 else True, text)
