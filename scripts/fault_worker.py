"""The process of fault_trials.py that runs checks of `jax-router verify`, trial after trial, on the library it has.

    python scripts/fault_worker.py < request.json

Events go to standard output as from jax_router.verification.worker, one JSON line each. A request has
`implementation`, `operations` and `models` of its subjects, and `trials`, each a `Trial`. Without trials it says what
the machine is, having compiled what trials need.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LAUNCHES = 1_000_000  # the default of `jax-router verify`
ON_CHAINS = ("graphs", "load")  # whose chains take seconds to compile, one per number of tokens


@dataclass(frozen=True)
class Trial:
    """Checks one after the other until one fails.

    Attributes:
      trial: its number, and the seed of all data.
      operations: of the subjects that take part.
      checks: of plan.CHECKS, in this order.
      tokens: those of a fault: of the default ones of a check on chains only these are launched, each as often as by
        default. Empty for all.
      seconds: for the checks of one subject, the share that `jax-router verify` gives it.
      ends: seconds after which no other subject begins.
      launches, quick: as of `jax-router verify`.
      first: only the first subject of the operations.
    """

    trial: int
    operations: tuple[str, ...]
    checks: tuple[str, ...]
    seconds: float
    ends: float = 300.0
    tokens: tuple[int, ...] = ()
    launches: int = LAUNCHES
    quick: bool = False
    first: bool = False


def main() -> None:
    request = json.load(sys.stdin)
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def emit(event: str, **facts: Any) -> None:
        events.write(json.dumps({"event": event, **facts}) + "\n")

    run(request, emit)


def run(request: dict[str, Any], emit: Callable[..., None]) -> None:
    """Emit "begin", then for each trial "trial", what its checks say, and "done"; "crash" ends it early."""
    emit("alive", launches=0)
    import jax

    from jax_router.verification import plan

    alive = _Alive(emit)
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
    for document in request["trials"]:
        each = {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}
        if not run_trial(Trial(**each), found, device, emit, alive):
            return
    emit("end")


def _machine(device: Any) -> dict[str, Any]:
    """The provenance, what a subject has of the default minutes, and the default numbers of tokens of each check."""
    from jax_router.provenance import provenance
    from jax_router.verification import bits, fence, library, load, neighbours, numerics, plan

    if device.platform == "gpu":
        library.library()
    default = plan.Options()
    tokens = {
        "accuracy, experts": numerics.MORE_TOKENS, "bits": bits.TOKENS, "memory": bits.MEMORY_TOKENS,
        "fence": fence.TOKENS, "neighbours": neighbours.TOKENS, "graphs, load": load.TOKENS,
    }  # fmt: skip
    seconds = 60 * default.minutes / len(plan.subjects(default, device)[0])
    return {"provenance": provenance(), "seconds": seconds, "tokens": tokens, "launches": default.launches}


class _Alive:
    """Passes launches on, a few times per second at most."""

    def __init__(self, emit: Callable[..., None]):
        self.emit, self.launches, self.at = emit, 0, 0.0

    def __call__(self, launches: int) -> None:
        self.launches += launches
        if time.monotonic() - self.at > 0.2:
            self.flush()

    def flush(self) -> None:
        self.emit("alive", launches=self.launches)
        self.launches, self.at = 0, time.monotonic()


def run_trial(trial: Trial, found: list[Any], device: Any, emit: Callable[..., None], alive: _Alive) -> bool:
    """Whether this process can go on with another one."""
    from jax_router.verification import plan
    from jax_router.verification.result import Context

    emit("trial", trial=trial.trial)
    started = time.monotonic()
    taking_part = [subject for subject in found if subject.operation in trial.operations]
    checks = [(name, plan.CHECKS[name]) for name in trial.checks]
    checks = [pair for i, pair in enumerate(checks) if pair[1] not in [check for _, check in checks[:i]]]
    for subject in taking_part[:1] if trial.first else taking_part:
        if time.monotonic() - started >= trial.ends:
            break
        context = Context(
            device, trial.trial, deadline=time.monotonic() + trial.seconds, quick=trial.quick, alive=alive,
            doing=lambda tokens, data: emit("case", tokens=tokens, data=data),
        )  # fmt: skip
        for name, check in checks:
            context.tokens, context.launches = of_chains(trial) if name in ON_CHAINS else ((), trial.launches)
            emit("check", subject=subject.label, check=name, tokens=context.tokens, launches=context.launches)
            try:
                results = check(subject, context)
            except Exception as error:  # the device may be lost to this process
                alive.flush()
                emit("crash", reason=f"{type(error).__name__}: {error}"[:2000])
                return False
            alive.flush()
            for result in results:
                emit("result", **dataclasses.asdict(result))
            if any(result.passed is False for result in results):
                emit("done", trial=trial.trial)
                return True
    emit("done", trial=trial.trial)
    return True


def of_chains(trial: Trial) -> tuple[tuple[int, ...], int]:
    """Numbers of tokens of the chains (empty for the default ones), and launches of all together."""
    from jax_router.verification import load

    default = load.QUICK_TOKENS if trial.quick else load.TOKENS
    tokens = tuple(count for count in default if count in trial.tokens)
    return tokens, trial.launches * len(tokens) // len(default) if tokens else trial.launches


if __name__ == "__main__":
    main()
