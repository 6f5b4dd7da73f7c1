"""The process of fault_trials.py that runs checks of `jax-router verify`, trial after trial, on the library it has.

    python scripts/fault_worker.py < request.json

Events go to standard output as from jax_router.verification.worker, one JSON line each. A request has
`implementation`, `operations` and `models` of its subjects, and `trials`, each a `Trial`. Without trials it says what
the machine is, having compiled what trials need.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jax_router.verification.process import conversation
from jax_router.verification.worker import COMPILE_THREADS

if TYPE_CHECKING:
    from jax_router.verification.data import Subject
    from jax_router.verification.result import Context

LAUNCHES = 1_000_000  # the default of `jax-router verify`


@dataclass(frozen=True)
class Trial:
    """Checks one after the other until one fails.

    Attributes:
      trial: its number, and the seed of all data.
      operations: of the subjects that take part.
      checks: of plan.CHECKS, in this order.
      seconds: for the checks of one subject, the share that `jax-router verify` gives it.
      ends: seconds after which no other subject begins.
      launches, quick: as of `jax-router verify`.
      multiplied: only subjects that multiply in this dtype, as `Subject.multiplied`; None for all.
      first: only the first subject of these.
    """

    trial: int
    operations: tuple[str, ...]
    checks: tuple[str, ...]
    seconds: float
    ends: float = 300.0
    launches: int = LAUNCHES
    quick: bool = False
    multiplied: str | None = None
    first: bool = False


def main() -> None:
    request, emit = conversation()
    pool = ThreadPoolExecutor(max(1, min(COMPILE_THREADS, os.cpu_count() or 1)))
    try:
        run(request, emit, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run(request: dict[str, Any], emit: Callable[..., None], pool: Executor) -> None:
    """Emit "begin", then for each trial "trial", what its checks say, and "done"; "crash" ends it early."""
    emit("alive", launches=0)
    import jax

    from jax_router.verification import plan
    from jax_router.verification.result import Context

    alive = Alive(emit)
    # Compiling says nothing for as long as it takes; what was compiled is a sign of life.
    jax.monitoring.register_event_duration_secs_listener(lambda *_, **__: alive(0))
    device = jax.local_devices()[0]
    options = plan.Options(
        (request["implementation"],), operations=tuple(request["operations"]), models=tuple(request["models"])
    )
    options.check()
    found, refused = plan.subjects(options, device)
    if not found:
        emit("refused", reason="; ".join(f"{name} {why}" for name, why in refused.items()) or "no subject is left")
        return
    if not request["trials"]:
        emit("begin", **_machine(device))

    def doing(tokens: int, data: str) -> None:
        emit("case", tokens=tokens, data=data)

    contexts = [Context(device, doing=doing, alive=alive, pool=pool) for _ in found]
    for document in request["trials"]:
        each = {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}
        if not run_trial(Trial(**each), list(zip(found, contexts, strict=True)), emit, alive):
            return
    emit("end")


def _machine(device: Any) -> dict[str, Any]:
    """The provenance, what a subject has of the default minutes, and the default numbers of tokens of each check."""
    from jax_router.provenance import provenance
    from jax_router.verification import bits, fence, gpu_tools, load, neighbours, numerics, plan

    if device.platform == "gpu":
        gpu_tools.loaded()
    default = plan.Options()
    tokens = {
        "accuracy, experts": numerics.MORE_TOKENS, "bits": bits.TOKENS, "memory": bits.MEMORY_TOKENS,
        "fence": fence.TOKENS, "neighbours": neighbours.TOKENS, "graphs, load": load.TOKENS,
    }  # fmt: skip
    seconds = 60 * default.minutes / len(plan.subjects(default, device)[0])
    return {"provenance": provenance(), "seconds": seconds, "tokens": tokens, "launches": default.launches}


class Alive:
    """Passes launches on, a few times per second at most, for any thread."""

    def __init__(self, emit: Callable[..., None]):
        self.emit, self.launches, self.at, self.lock = emit, 0, 0.0, threading.Lock()

    def __call__(self, launches: int) -> None:
        with self.lock:
            self.launches += launches
            if time.monotonic() - self.at > 0.2:
                self._pass_on()

    def flush(self) -> None:
        """Pass on what is left."""
        with self.lock:
            self._pass_on()

    def _pass_on(self) -> None:
        self.emit("alive", launches=self.launches)
        self.launches, self.at = 0, time.monotonic()


def run_trial(trial: Trial, found: list[tuple[Subject, Context]], emit: Callable[..., None], alive: Alive) -> bool:
    """Run a trial on its subjects, each with the context that has its executables; whether another one can follow.

    What a trial compiled the next ones of this process take as it is: nothing in it depends on the data.
    """
    from jax_router.verification import plan

    emit("trial", trial=trial.trial)
    started = time.monotonic()
    taking_part = [
        pair
        for pair in found
        if pair[0].operation in trial.operations and trial.multiplied in (None, pair[0].multiplied)
    ]
    checks: dict[str, plan.Check] = {}
    for name in trial.checks:
        if plan.CHECKS[name] not in checks.values():
            checks[name] = plan.CHECKS[name]
    for subject, kept in taking_part[:1] if trial.first else taking_part:
        if time.monotonic() - started >= trial.ends:
            break
        context = dataclasses.replace(
            kept, seed=trial.trial, launches=trial.launches, deadline=time.monotonic() + trial.seconds,
            quick=trial.quick, chains=[],
        )  # fmt: skip
        for check in checks.values():
            context.ahead(check.programs(subject, context))
        for name, check in checks.items():
            emit("check", subject=subject.label, check=name)
            try:
                outcome = check.run(subject, context)
            except Exception as error:  # the device may be lost to this process
                alive.flush()
                emit("crash", reason=f"{type(error).__name__}: {error}"[:2000])
                return False
            alive.flush()
            results = outcome if isinstance(outcome, list) else [outcome]
            for result in results:
                emit("result", **dataclasses.asdict(result))
            if any(result.passed is False for result in results):
                emit("done", trial=trial.trial)
                return True
    emit("done", trial=trial.trial)
    return True


if __name__ == "__main__":
    main()
