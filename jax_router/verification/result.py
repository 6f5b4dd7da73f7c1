"""What a check of the verification gets and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
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
    """The outcome of one check of one subject.

    `passed` is None for a check that did not run, or came to no verdict; `reason` says why.
    """

    check: str
    passed: bool | None
    launches: int = 0
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    failure: Failure | None = None


Programs = dict[tuple[str, int], Callable[[], Any]]


@dataclass
class Context:
    """What the checks of one subject share.

    Attributes:
      device: where everything runs.
      seed: of all data.
      launches: under load, per subject.
      deadline: on `time.monotonic`'s clock: from then on launches under load end, with what there is.
      quick: less of everything that repeats.
      tokens: numbers of tokens to check instead of the default ones.
      torch: the module if it has the GPU.
      doing: called before launches, with their number of tokens and their kind of data.
      alive: called with launches done since the last call, at least every few seconds.
      pool: of threads that compile ahead, or None.
      chains: what two checks share (load.py).
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
    pool: Executor | None = None
    chains: list[Any] = field(default_factory=list)
    _programs: dict[Any, Future[Any]] = field(default_factory=dict)

    def program(self, key: tuple[str, int], build: Callable[[], Any]) -> Any:
        """What `build` makes for the subject of this context, once: an executable by its name and number of tokens."""
        if key not in self._programs:
            self.ahead({key: build})
        return self._programs[key].result()

    def ahead(self, programs: Programs) -> None:
        """Begin to make these, in their order."""
        for key, build in programs.items():
            if key not in self._programs:
                self._programs[key] = self.pool.submit(build) if self.pool is not None else _at_once(build)

    @property
    def on_gpu(self) -> bool:
        return self.device.platform == "gpu"


def _at_once(build: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(build())
    except BaseException as error:
        future.set_exception(error)
    return future
