"""What a check of the verification gets and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax


@dataclass(frozen=True)
class Failure:
    """One wrong result, with all that reproduces it.

    Attributes:
      tokens: of the launch.
      data: the kind of data, of `data.KINDS`.
      seed: of the data.
      launch: how many launches of this check came before.
      row: the first wrong row.
      expected, got: what stands there, as lists or texts.
    """

    tokens: int
    data: str
    seed: int
    launch: int
    row: int | None
    expected: Any
    got: Any


@dataclass(frozen=True)
class Result:
    """The outcome of one check of one subject. `passed` is None for a check that did not run; `reason` says why."""

    check: str
    passed: bool | None
    launches: int = 0
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    failure: Failure | None = None


@dataclass
class Context:
    """What all checks of one run share.

    Attributes:
      device: where everything runs.
      seed: of all data.
      launches: under load, per subject.
      deadline: on `time.monotonic`'s clock: from then on what repeats ends, with what it has.
      quick: less of everything that repeats.
      tokens: numbers of tokens to check instead of the default ones.
      torch: the module if it has the GPU.
      doing: called before launches, with their number of tokens and their kind of data.
      alive: called with launches done since the last call, at least every few seconds.
      made: what checks of one subject leave for each other.
    """

    device: jax.Device
    seed: int = 0
    launches: int = 1_000_000
    deadline: float = float("inf")
    quick: bool = False
    tokens: tuple[int, ...] = ()
    torch: Any | None = None
    doing: Callable[[int, str], None] = lambda *_: None
    alive: Callable[[int], None] = lambda *_: None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.platform == "gpu"

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.deadline
