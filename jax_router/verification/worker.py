"""The process that runs checks, one JSON line per event on its standard output; everything else goes to its error.

    python -m jax_router.verification.worker < request.json

A request has `options` (plan.Options), `minutes`, and `skip`, how many subjects were done by the process before. A
kernel that hangs or touches what it must not takes this process down and not the one that reports it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from jax_router.toolchain import BuildError
from jax_router.verification.process import OF_MEMORY, OF_THE_DEVICE, conversation

if TYPE_CHECKING:  # JAX is imported after the first sign of life
    from jax_router.verification.result import Result

COMPILE_THREADS = 8
TICK_SECONDS = 5.0


def main() -> None:
    """Run the request; exit status 0 however the checks end."""
    request, emit = conversation()
    try:
        run(request, emit)
    except ValueError as error:  # what was asked for makes no sense here
        emit("refused", reason=str(error))


def run(request: dict[str, Any], emit: Any) -> None:
    """Emit "begin", then "check", "case", "alive" and "result" as they come, and "end".

    Raises:
      ValueError: nothing of what was asked for can run here; says why.
    """
    pool = ThreadPoolExecutor(max(1, min(COMPILE_THREADS, os.cpu_count() or 1)))
    try:
        _run(request, emit, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _run(request: dict[str, Any], emit: Any, pool: Executor) -> None:
    emit("alive", launches=0)
    import jax

    from jax_router import build
    from jax_router.provenance import provenance
    from jax_router.timing_torch import torch_with_gpu
    from jax_router.verification import plan
    from jax_router.verification.data import Subject
    from jax_router.verification.result import Context
    from jax_router.verification.sanitizers import check_sanitizers

    options = plan.Options.of(request["options"])
    device = jax.local_devices()[0]
    try:
        with _signs_of_life(emit):
            found, refused = plan.subjects(options, device)
    except (ImportError, NotImplementedError, OSError) as error:  # of a checkpoint
        raise ValueError(str(error)) from error
    if not found:
        reasons = "; ".join(f"{name} {why}" for name, why in refused.items()) or "no subject is left"
        raise ValueError(
            f"nothing can be verified here: {reasons}. Name another --implementation, --model or --operation."
        )
    facts = provenance()
    library = os.environ.get(build.LIBRARY_VARIABLE)
    described = [plan.describe(subject) for subject in found]
    emit("begin", provenance=facts, library=library, subjects=described, refused=refused)
    alive_at = 0.0

    case: tuple[int, str] | None = None

    def doing(tokens: int, data: str) -> None:
        nonlocal case
        case = tokens, data
        emit("case", tokens=tokens, data=data)

    launches_since = 0

    def alive(launches: int) -> None:
        nonlocal alive_at, launches_since
        launches_since += launches
        if time.monotonic() - alive_at > 0.2:
            emit("alive", launches=launches_since)
            alive_at, launches_since = time.monotonic(), 0

    torch = torch_with_gpu() if device.platform == "gpu" and not options.quick else None
    ends = time.monotonic() + 60 * request.get("minutes", options.minutes)
    checks = plan.checks_of(options)
    remaining = list(enumerate(found))[request["skip"] :]

    def prepared(subject: Subject) -> Context:
        """A context whose executables are being compiled."""
        context = Context(
            device, options.seed, options.launches, quick=options.quick, tokens=options.tokens, torch=torch,
            doing=doing, alive=alive, pool=pool,
        )  # fmt: skip
        for check in checks.values():
            context.ahead(check.programs(subject, context))
        return context

    following = prepared(remaining[0][1]) if remaining else None
    for position, (index, subject) in enumerate(remaining):
        assert following is not None
        context = following
        share = max(ends - time.monotonic(), 0.0) / (len(remaining) - position)
        context.deadline = time.monotonic() + share
        following = prepared(remaining[position + 1][1]) if position + 1 < len(remaining) else None
        for name, check in checks.items():
            emit("check", subject=index, check=name)
            case = None
            try:
                found_here = check.run(subject, context)
            except Exception as error:
                raised = _raised(name, error, case, options.seed)
                if raised is None:
                    raise
                found_here = raised
            for result in found_here if isinstance(found_here, list) else [found_here]:
                emit("result", subject=index, **dataclasses.asdict(result))
        emit("done", subject=index)
    if options.sanitizers:
        emit("check", subject=None, check="sanitizers")
        for result in check_sanitizers(alive):
            emit("result", subject=None, **dataclasses.asdict(result))
    emit("end")


@contextlib.contextmanager
def _signs_of_life(emit: Any) -> Iterator[None]:
    """For as long as nothing is launched: to compile the kernels at first use may take longer than a hang."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(TICK_SECONDS):
            emit("alive", launches=0)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _raised(check: str, error: Exception, case: tuple[int, str] | None, seed: int) -> Result | None:
    """What an exception says of the kernel; None if the device is lost to this process, whose end is the finding."""
    from jax_router.verification.result import Failure, Result

    text = f"{type(error).__name__}: {error}"
    if isinstance(error, (BuildError, MemoryError)) or OF_MEMORY.search(text):  # nothing, so it failed nothing
        return Result(check, None, reason=text[:2000])
    if OF_THE_DEVICE.search(text):
        return None
    failure = None if case is None else Failure(*case, seed, 0, None, "an end", text.splitlines()[0][:500])
    return Result(check, False, reason=text[:2000], failure=failure)


if __name__ == "__main__":
    main()
