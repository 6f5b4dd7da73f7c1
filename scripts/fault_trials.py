"""Which check of `jax-router verify` sees each kernel broken on purpose, how soon, and in how many of ten trials.

    python scripts/fault_trials.py --libraries DIR [NAME...]

Needs a GPU that the kernels run on. NAMEs are faults of fault_list.py, or "shipped", the control. Writes
faults-<gpu>.json and a table beside it; Ctrl-C keeps what was measured, and a second call goes on from there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fault_list_float32
import faults
from fault_list import FAULTS, Fault
from fault_table import as_it_should_be, markdown, print_record
from fault_watch import ROOT, SHIPPED, Run, Stopped, TrialsError

from jax_router import build
from jax_router.provenance import gpu_name
from jax_router.verification.report import CHECKS

INTERRUPTED = 130
CONTROL = ("gpt-oss-120b", "DeepSeek-V3", "awkward")  # one trial of the shipped library on each
TOGETHER = {"accuracy", "experts", "bits", "memory", "sanitizers"}  # see the same whatever else runs on the GPU
SURVEY_SEED, SURVEY_SECONDS, SURVEY_LAUNCHES = 1000, 20.0, 20_000
SURVEY_CHECKS = tuple(name for name in CHECKS if name != "experts")  # comes with the accuracy
SAME = ("gpu", "source_hash", "jax")  # of what goes into one record

Record = dict[str, Any]
Task = Callable[[], None]


def digest(fault: Fault) -> str:
    """Of a fault as it is measured: a record of another one says nothing about it."""
    return hashlib.sha256(repr(fault).encode()).hexdigest()[:16]


def checks_of(fault: Fault) -> tuple[str, ...]:
    """The checks of plan.CHECKS that must see a fault; all of them for one that any of them may hang on."""
    stands_for = {"memory": ("memory", "fence"), "hang": (), "sanitizers": ()}
    found = tuple(name for each in fault.seen_by for name in stands_for.get(each, (each,)))
    return found or CHECKS


def models_of(fault: Fault) -> tuple[str, ...]:
    """As `jax-router verify --model`: sizes that no preset has stand for awkward ones."""
    from jax_router.models import models

    return tuple(dict.fromkeys(shape if shape in models else "awkward" for shape in fault.shapes))


def multiplied_of(fault: Fault) -> str | None:
    """What `jax-router verify` has to multiply for the broken code to run; None for anything."""
    return "float32" if {edit.file for edit in fault.edits} <= set(fault_list_float32.FILES) else None


def entry_of(fault: Fault | None) -> Record:
    """What a record has of a fault, or of the shipped library, before anything is measured."""
    facts: Record = {"digest": None, "what": "the shipped library", "seen_by": [], "missed_by_parity": True}
    if fault is not None:
        facts = {"digest": digest(fault), "what": fault.what, "seen_by": list(fault.seen_by),
                 "missed_by_parity": fault.missed_by_parity}  # fmt: skip
    return {**facts, "trials": [], "quick": [], "survey": [], "parity": None, "sanitizers": [], "error": None}


class Plan:
    """What is left to do for a record, as tasks: those that may run at the same time, one phase after the other."""

    def __init__(self, run: Run, trials: int, survey: bool, implementation: str = "cuda"):
        self.run, self.trials, self.survey, self.implementation = run, trials, survey, implementation
        self.total = 0

    def phases(self, chosen: Sequence[Fault | None], jobs: int) -> list[tuple[list[Task], int]]:
        """Tasks of each phase, and how many run at once."""
        together, alone, hanging, last = [], [], [], []
        for fault in chosen:
            if fault is None:
                for number in self._left(SHIPPED, min(self.trials, len(CONTROL))):
                    request = self._request(("router_gemm", "route"), (CONTROL[number],))
                    together.append(self._trials(SHIPPED, request, [self._trial(number, request, CHECKS, None)]))
            else:
                request = self._request(fault.operations, models_of(fault))
                left = [
                    self._trial(number, request, checks_of(fault), multiplied_of(fault))
                    for number in self._left(fault.name, self.trials)
                ]
                # A hang costs a trial its process and a wait in which the GPU does nothing, an illegal address its
                # process: these at the same time.
                hangs = fault.seen_by[0] == "hang"
                parts = len(left) if hangs else jobs if "memory" in fault.seen_by else 1
                phase = hanging if hangs else together if set(fault.seen_by) <= TOGETHER else alone
                phase += [self._trials(fault.name, request, left[i::parts]) for i in range(min(parts, len(left)))]
            last += self._survey(fault) if self.survey else []
        parity = self._parity(chosen)
        alone += self._quick(chosen)
        found = [(parity[:1] + together, jobs), (alone, 1), (hanging, jobs), (parity[1:] + last, jobs)]
        return [(tasks, at_once) for tasks, at_once in found if tasks]

    def _left(self, name: str, count: int) -> list[int]:
        done = {trial["trial"] for trial in self.run.entry(name)["trials"]}
        return [number for number in range(count) if number not in done]

    def _request(self, operations: Sequence[str], models: Sequence[str]) -> Record:
        return {"implementation": self.implementation, "operations": list(operations), "models": list(models)}

    def _trial(self, number: int, request: Record, checks: Sequence[str], multiplied: str | None) -> Record:
        seconds = self.run.record["parameters"]["seconds"]
        return {"trial": number, "operations": request["operations"], "checks": list(checks), "seconds": seconds,
                "multiplied": multiplied}  # fmt: skip

    def _trials(self, name: str, request: Record, trials: list[Record]) -> Task:
        self.total += len(trials)
        return lambda: self.run.follow(name, request, trials, "trials")

    def _survey(self, fault: Fault | None) -> list[Task]:
        """All checks, shortly, on one subject of each operation: what else sees the fault."""
        name, operations = (SHIPPED, ("router_gemm", "route")) if fault is None else (fault.name, fault.operations)
        request = self._request(operations, CONTROL[:1] if fault is None else models_of(fault))
        surveyed = self.run.entry(name)["survey"]
        if any(each["caught_by"] == "hang" for each in surveyed):  # the other checks would hang too
            return []
        done = {(each["operation"], each["asked"]) for each in surveyed}
        left = [
            {"trial": SURVEY_SEED, "operations": [operation], "checks": [check], "seconds": SURVEY_SECONDS,
             "launches": SURVEY_LAUNCHES, "quick": True, "first": True,
             "multiplied": None if fault is None else multiplied_of(fault)}
            for operation in operations
            for check in SURVEY_CHECKS
            if (operation, check) not in done
        ]  # fmt: skip
        self.total += len(left)
        return [lambda: self.run.follow(name, request, left, "survey")] if left else []

    def _quick(self, chosen: Sequence[Fault | None]) -> list[Task]:
        tasks: list[Task] = []
        for fault in chosen:
            if fault is not None and fault.found_by_quick:
                done = {run["trial"] for run in self.run.entry(fault.name)["quick"]}
                left = [number for number in range(self.trials) if number not in done]
                tasks += [lambda name=fault.name, number=number: self.run.quick(name, number) for number in left]  # type: ignore[misc]
        self.total += len(tasks)
        return tasks

    def _parity(self, chosen: Sequence[Fault | None]) -> list[Task]:
        """The shipped library first: with it the tests must pass, and not be none."""
        names = [fault.name for fault in chosen if fault is not None and fault.missed_by_parity]
        done = {name for name in names if self.run.entry(name)["parity"] is not None}
        known = (self.run.entry(SHIPPED)["parity"] or {}).get("passed", False)
        left = [*([] if known or not names else [SHIPPED]), *(name for name in names if name not in done)]
        self.total += len(left)
        return [lambda name=name: self.run.parity(name) for name in left]  # type: ignore[misc]


def resumed(path: Path, provenance: Record, again: Sequence[str]) -> Record:
    """The faults of the record at `path` that are still these, but for those to measure again; none of another GPU."""
    if not path.is_file():
        return {"faults": {}, "elapsed_seconds": 0.0}
    record = json.loads(path.read_text())
    if any(record["provenance"].get(name) != provenance.get(name) for name in SAME):
        return {"faults": {}, "elapsed_seconds": 0.0}
    digests = {fault.name: digest(fault) for fault in FAULTS} | {SHIPPED: None}
    kept = {
        name: {**entry, "error": None}
        for name, entry in record["faults"].items()
        if name not in again and name in digests and entry["digest"] == digests[name]
    }
    return {"faults": kept, "elapsed_seconds": record["elapsed_seconds"]}


def lacks(record: Record, trials: int = 10) -> list[str]:
    """What a record does not have, or has of a fault that is another one by now."""
    missing = []
    for fault in FAULTS:
        entry = record["faults"].get(fault.name)
        if entry is None:
            missing.append(f"{fault.name}: not measured")
            continue
        if entry["digest"] != digest(fault):
            missing.append(f"{fault.name}: another fault was measured under this name")
        if len(entry["trials"]) < trials:
            missing.append(f"{fault.name}: {len(entry['trials'])} trials of {trials}")
        if fault.missed_by_parity and entry["parity"] is None:
            missing.append(f"{fault.name}: no parity tests")
        if fault.found_by_quick and len(entry["quick"]) < trials:
            missing.append(f"{fault.name}: {len(entry['quick'])} runs of verify --quick of {trials}")
    control = record["faults"].get(SHIPPED)
    known = {SHIPPED, *(fault.name for fault in FAULTS)}
    missing += [f"{name}: no fault of the list" for name in record["faults"] if name not in known]
    return missing + ([] if control and len(control["trials"]) == len(CONTROL) else [f"{SHIPPED}: no control"])


def run_phases(run: Run, phases: list[tuple[list[Task], int]]) -> None:
    """Run everything, as much at once on each GPU; what runs is killed when one task raises, or on Ctrl-C."""
    for tasks, at_once in phases:
        gpus = itertools.cycle(run.gpus)
        with ThreadPoolExecutor(at_once * len(run.gpus), initializer=lambda: run.use(next(gpus))) as pool:  # noqa: B023
            futures = [pool.submit(task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                run.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def sanitize(run: Run, chosen: Sequence[Fault], console: Console) -> None:
    """compute-sanitizer on the standalone program of the faulty sources: on barriers if it may hang, else on memory."""
    from jax_router.verification.sanitizers import check_sanitizers

    for fault in chosen:
        tool = "synccheck" if "hang" in fault.seen_by else "memcheck"
        with tempfile.TemporaryDirectory() as folder:
            faults.apply(fault, build.csrc_directory(), Path(folder, "csrc"))
            (result,) = check_sanitizers(lambda _: None, tools=(tool,), csrc=Path(folder, "csrc"))
        said = {True: "passed", False: "caught it", None: "did not run"}[result.passed]
        console.print(f"{fault.name}: {tool} {said}, {result.seconds:.0f} s: {result.reason}", markup=False)
        facts = {"tool": tool, "passed": result.passed, "launches": result.launches, "seconds": result.seconds,
                 "reason": result.reason, **result.figures}  # fmt: skip
        run.entry(fault.name)["sanitizers"] = [facts]
        run.save()


def ready_libraries(chosen: Sequence[Fault], folder: Path, console: Console) -> None:
    """Compile those that `folder` lacks, or has of other sources."""
    missing = [fault for fault in chosen if not faults.is_built(fault, folder)]
    for fault, _, _ in faults.build_libraries(missing, folder) if missing else ():
        console.print(f"compiled {fault.name}", highlight=False)


def split(names: Sequence[str]) -> tuple[list[Fault | None], list[str]]:
    """What is named, None for the shipped library, and all of it without names; and the names.

    Raises:
      FaultError: a name is none of them.
    """
    if not names:
        return [None, *FAULTS], [SHIPPED, *(fault.name for fault in FAULTS)]
    of_faults = [name for name in names if name != SHIPPED]
    return [*([None] if SHIPPED in names else []), *(faults.named(of_faults) if of_faults else [])], list(names)


def main(
    libraries: Annotated[Path, typer.Option(help="Folder of faulty libraries, compiled there if they are not.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Which; all without names.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Of every fault.")] = 10,
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = ROOT / "docs" / "results",
    hang: Annotated[float, typer.Option(help="Seconds without a sign of life that count as a hang.")] = 40.0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once, of what load does not matter to.")] = 4,
    gpu: Annotated[
        list[str] | None, typer.Option(help="For CUDA_VISIBLE_DEVICES; may be repeated, for GPUs of one kind.")
    ] = None,
    survey: Annotated[bool, typer.Option(help="Also every check, shortly, on every fault.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Measure again what the record has of these.")] = False,
    sanitizers: Annotated[
        list[str] | None, typer.Option(help="Only compute-sanitizer on this fault; may be repeated.")
    ] = None,
) -> None:
    """Measure. Exits with 1 if a fault is missed or the shipped library is not right, with 130 when interrupted."""
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    os.environ.pop(build.LIBRARY_VARIABLE, None)
    gpus = gpu or []
    if len(set(gpus)) < len(gpus) or (gpus and sanitizers):
        raise typer.BadParameter(
            f"gpu is {', '.join(gpus)}. Expected each once, and none beside --sanitizers, which use the first GPU; "
            "leave out the others."
        )
    run = Run(libraries.resolve(), hang, gpus=gpus)
    # A time limit that ends this process must not leave children on the GPU.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        chosen, known = split(names or [])
        of_sanitizers = faults.named(sanitizers) if sanitizers else []
        broken = [fault for fault in chosen if fault is not None]
        if not sanitizers:
            ready_libraries(broken, run.libraries, console)
        status = measure(run, chosen, known if again else [], of_sanitizers, trials, survey, jobs, output, console)
    except (faults.FaultError, build.BuildError, TrialsError) as error:
        typer.echo(f"fault_trials: {error}", err=True)
        status = 2
    except KeyboardInterrupt:
        status = INTERRUPTED
    raise typer.Exit(status)


def measure(
    run: Run, chosen: Sequence[Fault | None], again: Sequence[str], of_sanitizers: Sequence[Fault], trials: int,
    survey: bool, jobs: int, output: Path, console: Console, implementation: str = "cuda",
) -> int:  # fmt: skip
    """Measure what is left, with progress; returns the exit status.

    Raises:
      TrialsError: nothing can be measured here; says why.
    """
    started, interrupted = time.monotonic(), False
    machine = run.machine(implementation)
    path = output / f"faults-{gpu_name(machine['provenance'])}.json"
    kept = resumed(path, machine["provenance"], again)
    parameters = {**{name: machine[name] for name in ("seconds", "tokens", "launches")}, "hang_seconds": run.hang}
    run.begin(path, {"provenance": machine["provenance"], "parameters": parameters, **kept}, started)
    for fault in [None, *chosen, *of_sanitizers]:
        name = SHIPPED if fault is None else fault.name
        run.record["faults"].setdefault(name, entry_of(fault))
    try:
        if of_sanitizers:
            sanitize(run, of_sanitizers, console)
        else:
            plan = Plan(run, trials, survey, implementation)
            phases = plan.phases(chosen, jobs)
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            with Progress(*columns, console=console) as progress:
                bar = progress.add_task("measuring", total=plan.total)

                def on_done(said: str) -> None:
                    progress.console.print(said, markup=False, highlight=False, soft_wrap=True)
                    progress.advance(bar)

                run.on_done = on_done
                run_phases(run, phases)
    except (KeyboardInterrupt, Stopped):
        interrupted = True
    finally:
        run.save()
        path.with_suffix(".md").write_text(markdown(run.record))
    print_record(console, run.record)
    console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return INTERRUPTED if interrupted else 0 if as_it_should_be(run.record) else 1


if __name__ == "__main__":
    typer.run(main)
