"""Runs the points of the tuner: every configuration that fits is verified, then timed in rounds; one row per point."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jax_router import sweep_points, timing, tune_choice
from jax_router.sweep_points import BOTH, HEADLINE_MODELS, Point
from jax_router.sweep_rows import Row, RowsWriter
from jax_router.sweep_run import DeviceLost, assert_computes
from jax_router.tune_launch import LAUNCHES, Operands, Outputs, ShapePool

MEASUREMENT = ("tune", "warm and cold")  # method and weights of a row
ROUNDS = (
    3  # each with buffers at other places: the same kernel differs by up to 15% between processes (docs/kernels.md)
)
REPLAYS = (3, 10)  # at least and at most, of a configuration, a round and a state of the weights
BUDGET_US = 25_000.0  # of these replays, together
LONG_REPLAY_US = 2_000.0  # from where on a graph has no more launches than weights
HOPELESS = 1.5  # times the pick's time in the first round: not measured again


def points(models: Sequence[str], tokens: Sequence[int], operations: Sequence[str]) -> list[Point]:
    """The points of the full suite of the sweep; of the headline models if none is named.

    Raises:
      ValueError: as `sweep_points.points`.
    """
    found = sweep_points.points(
        "full",
        gpu=True,
        torch_gpu=False,
        only_models=models or HEADLINE_MODELS,
        only_tokens=tokens,
        only_candidates=["cuda"],
        only_operations=operations,
    )
    return [Point(point.shape, point.tokens, point.candidate, (MEASUREMENT,)) for point in found]


class Tuner:
    """Tunes points and appends their rows. A point that breaks becomes a failed row and does not end the run."""

    def __init__(
        self,
        writer: RowsWriter,
        *,
        provenance: Row,
        device: jax.Device,
        done: frozenset[Any] | set[Any] = frozenset(),
        advance: Callable[[int, str], None] = lambda *_: None,
    ):
        """
        Args:
          done: keys of points that need no second measurement.
          advance: told how many points are done since the last call, and what comes next.
        """
        self.writer, self.provenance, self.device, self.done = writer, provenance, device, done
        self.advance = advance

    def missing(self, points: Iterable[Point]) -> list[Point]:
        return [point for point in points if point.key(*MEASUREMENT) not in self.done]

    def run(self, points: Iterable[Point]) -> None:
        """Tune the points that are not done.

        Raises:
          DeviceLost: the device computes no more.
        """
        for shape, of_shape in itertools.groupby(self.missing(points), lambda point: point.shape):
            todo = list(of_shape)
            self.advance(0, f"{shape.label}: data")
            pool = ShapePool(shape, max(point.tokens or 1 for point in todo), self.device)
            for point in todo:
                self._run_point(point, pool)
                self.advance(1, point.label)

    def _run_point(self, point: Point, pool: ShapePool) -> None:
        try:
            found = self._measure(point, pool)
        except Exception as error:  # whatever one point does, the others are still worth measuring
            reason = f"{type(error).__name__}: {error}"[:1000]
            self._write(point, status="failed", reason=reason)
        else:
            reasons = tune_choice.unverified(found)
            reason = "; ".join(f"{name}: {why}" for name, why in reasons.items())
            status = {"status": "failed", "reason": reason} if reasons else {"status": "ok"}
            self._write(point, **status, **found)
        if not reason:
            return
        try:
            assert_computes(self.device)
        except Exception as error:
            raise DeviceLost(f"{point.label}: {reason}. Now the device refuses everything: {error}") from error

    def _measure(self, point: Point, pool: ShapePool) -> Row:
        """What a row says of the configurations."""
        assert point.tokens is not None
        places = [pool.operands(point.tokens, place) for place in range(ROUNDS)]
        numbers, pick = places[0].fitting()
        references = [operands.reference() for operands in places]
        found = {}
        for name, config in numbers.items():
            self.advance(0, f"{point.label}: {name}, bits")
            found[name] = verified(places, references, config)
        del references
        row: Row = {"pick": pick, "rounds": ROUNDS, "configs": found}
        if not found[pick]["verified"]:
            return {**row, "winner": pick, "gain": 0.0}
        launches, repeats = self._size(places[0], numbers[pick])
        order = random.Random(point.label)
        for number, operands in enumerate(places):
            names = [name for name in found if found[name]["verified"] and not hopeless(row, name, number)]
            for name in order.sample(names, len(names)):
                self.advance(0, f"{point.label}: {name}, round {number + 1} of {ROUNDS}")
                try:
                    times = {weights: operands.time(numbers[name], weights, launches, repeats) for weights in BOTH}
                except RuntimeError as error:
                    if name == pick:
                        raise
                    found[name] |= {"verified": False, "reason": f"round {number + 1}: {error}"}
                    continue
                for weights, samples in times.items():
                    found[name].setdefault(f"{weights}_us", []).append([round(sample, 4) for sample in samples])
        winner = tune_choice.winner(row)
        gain = round(tune_choice.gain(row, winner), 4)
        return {**row, "calls_per_sample": launches, "winner": winner, "gain": gain}

    def _size(self, operands: Operands, pick: int) -> tuple[int, int]:
        """Launches in a graph and replays of it, the same for all configurations, by the time of the pick."""
        launches = timing.launches_of(operands.weights)
        estimate = statistics.median(operands.time(pick, "cold", launches, REPLAYS[0]))
        if estimate * launches > LONG_REPLAY_US:
            launches = len(operands.weights)
        fewest, most = REPLAYS
        return launches, max(fewest, min(most, int(BUDGET_US / (estimate * launches))))

    def _write(self, point: Point, **more: Any) -> None:
        method, weights = MEASUREMENT
        measured = {"method": method, "weights": weights, **more}
        self.writer.write({**point.fields, **measured, "provenance": self.provenance})


def verified(places: Sequence[Operands], references: Sequence[Sequence[Outputs]], config: int) -> dict[str, Any]:
    """Whether a configuration gives the reference's bits in every round's buffers, and why not."""
    for operands, reference in zip(places, references, strict=True):
        reason = operands.why_wrong(config, reference)
        if reason is not None:
            return {"verified": False, "reason": reason}
    return {"verified": True, "launches": LAUNCHES * len(places)}


def hopeless(row: Row, name: str, number: int) -> bool:
    """Whether a configuration took so long in the first round that the round `number` goes on without it."""
    if number == 0:
        return False
    return tune_choice.rounds(row, name)[0] > HOPELESS * tune_choice.rounds(row, row["pick"])[0]
