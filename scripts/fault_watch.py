"""Follows the processes of fault_trials.py, and puts what they say, or how they end, into its record."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_router import build
from jax_router.verification import gate
from jax_router.verification.process import OF_MEMORY, OF_THE_DEVICE, Child, Event, kill
from jax_router.verification.report import failures, totals

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = "shipped"
COMMAND = (sys.executable, str(ROOT / "scripts" / "fault_worker.py"))
# One launch on an idle stream, against float64 and beside PyTorch.
PARITY = (
    sys.executable, "-m", "pytest", "tests/test_parity.py", "tests/test_torch_ref.py", "-q", "-k", "cuda or yardstick",
)  # fmt: skip
QUICK = (sys.executable, "-m", "jax_router", "verify", "--quick")
MISSES = 2
MACHINE_SECONDS = 600.0  # compiling libraries says nothing meanwhile
PARITY_SECONDS, QUICK_SECONDS = 300.0, 200.0
KILLED_ITSELF = re.compile(r"ended with signal SIG(ILL|ABRT|BUS|FPE|SEGV):")

Record = dict[str, Any]


class TrialsError(RuntimeError):
    """Nothing can be measured here."""


class Stopped(Exception):
    """Everything was told to end."""


class Outcome:
    """One trial while it goes on: checks that ran, and their results."""

    def __init__(self, asked: Record):
        self.asked, self.started = asked, time.monotonic()
        self.checks: list[Record] = []
        self.case: Record = {}
        self.known = 0  # launches of the check that runs
        self.crash: str | None = None

    def take(self, event: Event) -> None:
        kind = event["event"]
        if kind == "check":
            self.case, self.known = {}, 0
            self.checks.append({"subject": event["subject"], "check": event["check"], "results": []})
        elif kind == "case":
            self.case = {name: event[name] for name in ("tokens", "data")}
        elif kind == "alive":
            self.known += event["launches"]
        elif kind == "result":
            failure = event["failure"] and {
                name: event["failure"][name] for name in ("tokens", "data", "launch", "row")
            }
            facts = {name: event[name] for name in ("check", "passed", "launches", "seconds")}
            reason = event["reason"] and event["reason"][:500]
            self.checks[-1]["results"].append({**facts, "reason": reason, "failure": failure})
        elif kind == "crash":
            self.crash = event["reason"]

    def ended(self, how: str | None = None) -> Record:
        """The trial as a record has it; `how` its process ended, if that ended the trial.

        Raises:
          TrialsError: it ended by something that is no finding about the kernels.
        """
        how = self.crash if how is None else how
        results = [result for check in self.checks for result in check["results"]]
        failed = [result for result in results if result["passed"] is False]
        launches = sum(_launches(check["results"]) for check in self.checks)
        by = failed[0]["check"] if failed else None
        if how is not None and not failed:
            by = _kind_of_end(how)
            if by is None or not self.checks:
                raise TrialsError(how)
            launches += self.known
        found = {
            "trial": self.asked["trial"],
            "caught_by": by,
            "during": self.checks[-1]["check"] if by is not None else None,
            "subject": self.checks[-1]["subject"] if by is not None else None,
            "launches": launches,
            "seconds": round(time.monotonic() - self.started, 3),
            "ran": any(result["passed"] is not None for result in results) or by is not None,
            "reason": failed[0]["reason"] if failed else how and how[:500],
            "checks": self.checks,
        }
        return found if failed or how is None else {**found, "case": self.case}


def _launches(results: Sequence[Record]) -> int:
    """Of one call: until it failed if it did, as results of one call share their launches."""
    failed = [result["launches"] for result in results if result["passed"] is False]
    return failed[0] if failed else max((result["launches"] for result in results), default=0)


def _kind_of_end(how: str) -> str | None:
    """What the verification would report: "hang", "crash", or None for what has nothing to do with a kernel."""
    if how.startswith("hung:"):
        return "hang"
    if OF_MEMORY.search(how):  # other processes may have it
        return None
    return "crash" if OF_THE_DEVICE.search(how) or KILLED_ITSELF.match(how) else None


def is_given_up(entry: Record) -> bool:
    """Whether the first trials all missed a fault: each takes the default minutes, and more would say the same."""
    trials = entry["trials"]
    return len(trials) >= MISSES and all(trial["caught_by"] is None for trial in trials)


class Run:
    """Processes that run at the moment, and the record that they add to. Its methods may be called from threads."""

    def __init__(
        self, libraries: Path, hang: float, *, command: Sequence[str] = COMMAND, parity: Sequence[str] = PARITY,
        quick: Sequence[str] = QUICK, gpus: Sequence[str] = (),
    ):  # fmt: skip
        self.libraries, self.hang, self.command = libraries, hang, command
        self.gpus = tuple(gpus) or (None,)
        self._of_thread = threading.local()
        self.parity_command, self.quick_command = parity, quick
        self.record: Record = {}
        self.on_done: Callable[[str], None] = lambda _: None
        self._path, self._started, self._before = Path(), 0.0, 0.0
        self._lock, self._stopped = threading.Lock(), False
        self._processes: set[subprocess.Popen[str]] = set()

    def begin(self, path: Path, record: Record, started: float) -> None:
        """Take `record`, which is saved at `path` from now on."""
        self._path, self.record = path, record
        self._started, self._before = started, record["elapsed_seconds"]
        path.parent.mkdir(parents=True, exist_ok=True)

    def entry(self, name: str) -> Record:
        """Of a fault, or of the shipped library."""
        found = self.record["faults"].get(name)
        return found if found is not None else {"trials": [], "survey": [], "parity": None}

    def save(self) -> None:
        """Write the record, in one step."""
        with self._lock:
            self.record["elapsed_seconds"] = round(self._before + time.monotonic() - self._started, 1)
            unfinished = self._path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.record, indent=1) + "\n")
            os.replace(unfinished, self._path)

    def stop(self) -> None:
        """Kill what runs; nothing else starts, and what ends by this is not recorded."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                kill(process)

    def _begun(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._processes.add(process)
            if self._stopped:
                kill(process)

    def _over(self, process: subprocess.Popen[str]) -> None:
        """Raise Stopped if it may have ended by `stop`."""
        with self._lock:
            self._processes.discard(process)
            if self._stopped:
                raise Stopped

    def use(self, gpu: str | None) -> None:
        """From now on the processes of this thread see only this GPU; with None all that this process sees."""
        self._of_thread.gpu = gpu

    def machine(self, implementation: str) -> Event:
        """What a process without trials says of the machine, which is one whatever GPU the process has.

        Raises:
          TrialsError: the implementation does not run here, or the GPUs differ; says why.
        """
        found = []
        for gpu in self.gpus:
            self.use(gpu)
            found.append(self._machine(implementation))
        names = sorted({each["provenance"]["gpu"] for each in found})
        if len(names) > 1:
            raise TrialsError(f"gpu names {' and '.join(names)}. Expected GPUs of one kind, as a record is of one.")
        return found[0]

    def _machine(self, implementation: str) -> Event:
        request = {"implementation": implementation, "operations": [], "models": [], "trials": []}
        with Child(self.command, request, self._of_child(SHIPPED)) as child:
            for event in child.events(MACHINE_SECONDS):
                if event["event"] == "begin":
                    return event
                if event["event"] == "refused":
                    raise TrialsError(f"nothing can be measured here: {event['reason']}")
        raise TrialsError(f"the process that runs trials ended before it began: {child.how_it_ended}")

    def environment(self, name: str) -> Mapping[str, str]:
        """Of a process that has the library of a fault, and the GPU of this thread."""
        found = {} if name == SHIPPED else {build.LIBRARY_VARIABLE: str(self.libraries / f"{name}.so")}
        gpu = getattr(self._of_thread, "gpu", None)
        return found if gpu is None else {**found, "CUDA_VISIBLE_DEVICES": gpu}

    def _of_child(self, name: str) -> Mapping[str, str]:
        # JAX takes most of the GPU's memory at its start unless told otherwise; there are others beside this one.
        return {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **self.environment(name)}

    def follow(self, name: str, request: Record, trials: Sequence[Record], into: str) -> None:
        """Run trials in as many processes as it takes, into the list `into` of the entry.

        A survey ends with a hang, and a fault that is given up with its last miss.
        """
        left = list(trials)
        while left:
            if self._stopped:
                raise Stopped
            if into == "trials" and name != SHIPPED and is_given_up(self.entry(name)):
                return
            outcome = None
            with Child(self.command, {**request, "trials": left}, self._of_child(name)) as child:
                self._begun(child.process)
                for event in child.events(self.hang):
                    kind = event["event"]
                    if kind == "trial":
                        outcome = Outcome(left[0])
                    elif outcome is not None:
                        outcome.take(event)
                    if kind == "done" and outcome is not None:
                        self._add(name, into, left.pop(0), outcome.ended())
                        outcome = None
                        if into == "trials" and name != SHIPPED and is_given_up(self.entry(name)):
                            left.clear()
                            break
                    elif kind in ("end", "crash", "refused"):
                        child.how_it_ended = event.get("reason", "")
                        break
            self._over(child.process)
            if not left:
                return
            try:
                if outcome is None:
                    raise TrialsError(child.how_it_ended)
                found = outcome.ended(child.how_it_ended)
            except TrialsError as error:  # other faults go on
                self.entry(name)["error"] = str(error)[-2000:]
                self.save()
                self.on_done(f"{name}: cannot be measured: {error}")
                return
            self._add(name, into, left.pop(0), found)
            if into == "survey" and found["caught_by"] == "hang":
                return

    def _add(self, name: str, into: str, asked: Record, found: Record) -> None:
        if into == "survey":
            found = {"operation": asked["operations"][0], "asked": asked["checks"][0], **found}
        self.entry(name)[into].append(found)
        self.save()
        by, what = found["caught_by"], f"trial {found['trial']}" if into == "trials" else "survey"
        ended = f"caught by {by}" + f" in {found['during']}" * (by != found["during"])
        ended = ended if by is not None else "not caught" if found["ran"] else "no check ran"
        where = f"{found.get('asked', '')} {found['subject'] or ''}".strip()
        text = f"{name}: {what} {where}: {ended}, {found['launches']:,} launches, {found['seconds']:.1f} s"
        self.on_done(" ".join(text.split()))

    def parity(self, name: str) -> None:
        """Run the plain parity tests with a library; the shipped one first, without which they mean nothing."""
        if self._stopped:
            raise Stopped
        if name != SHIPPED and not (self.entry(SHIPPED)["parity"] or {}).get("passed"):
            self.on_done(f"{name}: parity tests do not run: they did not pass with the shipped library")
            return
        status, said, seconds = self._ended(self.parity_command, name, PARITY_SECONDS)
        counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", said)}
        missed = status == 0 and counts.get("passed", 0) > 0  # all of some, not all of none
        found = {"passed": missed, "counts": counts, "seconds": seconds, "tests": list(self.parity_command[2:])}
        self.entry(name)["parity"] = found if missed else {**found, "said": said[-2000:]}
        self.save()
        self.on_done(f"{name}: parity tests {'pass' if missed else 'do not pass'}: {counts}, {seconds:.1f} s")

    def quick(self, name: str, number: int) -> None:
        """Run `jax-router verify --quick` with a library, as a user would; the number is its seed."""
        with tempfile.TemporaryDirectory() as folder:
            command = [*self.quick_command, "--seed", str(number), "--output", folder]
            status, said, seconds = self._ended(command, name, QUICK_SECONDS)
            records = [json.loads(path.read_text()) for path in Path(folder).glob("verify-*.json")]
        if status not in (0, 1) or len(records) != 1:
            outcome = f"ended with status {status}: {said[-2000:]}"
            self.entry(name)["error"] = f"verify --quick {outcome}"
        else:
            found = [f"{check['check']} of {gate.label(subject)}" for subject, check in failures(records[0]) if subject]
            facts = {"trial": number, "failed": found, "under_load": totals(records[0])["launches"], "seconds": seconds}
            self.entry(name)["quick"].append(facts)
            outcome = f"finds {', '.join(found) or 'nothing'}"
        self.save()
        self.on_done(f"{name}: verify --quick {number} {outcome}")

    def _ended(self, command: Sequence[str], name: str, limit: float) -> tuple[int, str, float]:
        """Run a command with a library: its exit status, what it said, and its seconds.

        Raises:
          Stopped: everything was told to end.
        """
        if self._stopped:
            raise Stopped
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **self.environment(name)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._begun(process)
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            kill(process)
            said, _ = process.communicate()
            said += f"\nno end after {limit:.0f} s"
        self._over(process)
        return process.returncode, said, round(time.monotonic() - started, 1)
