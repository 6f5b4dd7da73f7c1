"""Runs the verification in a process of its own, watches it, and puts what it says into a record.

A kernel that hangs, crashes or touches unmapped memory ends that process and becomes a failed check; another process
goes on with the next subject.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from jax_router.verification import gate
from jax_router.verification.plan import Options, checks_of
from jax_router.verification.process import Child, Event

HANG_SECONDS = 150.0  # without a sign of life: compiling takes some tens
WORKER = (sys.executable, "-m", "jax_router.verification.worker")

Record = dict[str, Any]


class RefusedError(ValueError):
    """Nothing of what was asked for can be verified here."""


def supervise(
    options: Options, on_event: Callable[[Event], None] = lambda _: None, *, hang_seconds: float = HANG_SECONDS
) -> Record:
    """Run everything and return its record; with what is there if interrupted.

    Args:
      options: what to verify.
      on_event: called with every event of the worker, and with the results that are found for a dead one.
      hang_seconds: without any event, after which the worker counts as hung.

    Raises:
      RefusedError: nothing can run here; says why.
      RuntimeError: the worker ended before it began; with what it said.
    """
    record: Record = {"options": dataclasses.asdict(options), "interrupted": False, "subjects": [], "sanitizers": []}
    watch = _Watch(options, record, on_event)
    started = time.monotonic()
    try:
        while not watch.ended:
            minutes = max(options.minutes - (time.monotonic() - started) / 60, 0.1)
            watch.follow({"options": dataclasses.asdict(options), "skip": watch.skip, "minutes": minutes}, hang_seconds)
    except KeyboardInterrupt:
        record["interrupted"] = True
    for subject in record["subjects"]:
        subject["launches"] = sum(check["launches"] for check in subject["checks"])
        subject["passed"] = gate.outcome(subject)
    return record


class _Watch:
    """What the events so far have said."""

    def __init__(self, options: Options, record: Record, on_event: Callable[[Event], None]):
        self.record, self.on_event = record, on_event
        self.options = options
        self.described: list[dict[str, Any]] = []
        self.skip, self.ended = 0, False
        self.check: str | None = None
        self.subject: int | None = None
        self.case: Event = {}
        self.began = False

    def follow(self, request: dict[str, Any], hang_seconds: float) -> None:
        """One worker, from its start to its end."""
        self.check, self.case = None, {}
        # JAX takes most of the GPU's memory at its start unless told otherwise; a user's process may have it already.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        with Child(WORKER, request, environment, sys.stderr.write) as worker:
            for event in worker.events(hang_seconds):
                unlike = self._why_of_another_machine(event)
                if unlike is not None:
                    worker.how_it_ended = unlike
                    break
                self.take(event)
        if self.ended:
            return
        died = worker.how_it_ended
        if not self.began:
            raise RuntimeError(f"the process that verifies ended before its first check: {died}")
        before_any_check = self.check is None
        if before_any_check:  # after others that were good for checks: the next one would fare no better
            died = f"the process that was to go on {died}"
            self.subject = self.skip if self.skip < len(self.record["subjects"]) else None
            self.check = "sanitizers" if self.subject is None else next(iter(checks_of(self.options)))
        self.take(self._result_of_the_dead(died))
        if self.subject is None or before_any_check:  # the sanitizers come last
            self.ended = True
        else:
            self.take({"event": "done", "subject": self.subject})

    def _why_of_another_machine(self, event: Event) -> str | None:
        """Why a worker cannot go on where the one before it ended, as after the loss of the GPU, or None.

        Raises:
          RefusedError: the first worker can run nothing.
        """
        if event["event"] == "refused":
            if not self.began:
                raise RefusedError(event["reason"])
            return f"was refused: {event['reason']}"
        if event["event"] == "begin" and self.began and event["subjects"] != self.described:
            return f"finds other subjects, {len(event['subjects'])} of them: is the GPU lost?"
        return None

    def take(self, event: Event) -> None:
        kind = event["event"]
        if kind == "begin" and not self.began:
            self.began, self.described = True, event["subjects"]
            self.record.update(provenance=event["provenance"], library=event["library"], refused=event["refused"])
            date = event["provenance"]["date"]
            self.record["subjects"] = [
                {**subject, "date": date, "complete": False, "checks": []} for subject in event["subjects"]
            ]
        elif kind == "check":
            self.check, self.subject, self.case = event["check"], event["subject"], {}
        elif kind == "case":
            self.case = event
        elif kind == "result":
            result = {name: value for name, value in event.items() if name not in ("event", "subject")}
            where = event["subject"]
            if where is None:
                self.record["sanitizers"].append({"tool": result.pop("check"), **result})
            else:
                self.record["subjects"][where]["checks"].append(result)
        elif kind == "done":
            self.record["subjects"][event["subject"]]["complete"] = True
            self.skip = event["subject"] + 1
            self.ended = self.skip == len(self.record["subjects"]) and not self.options.sanitizers
        elif kind == "end":
            self.ended = True
        self.on_event(event)

    def _result_of_the_dead(self, died: str) -> Event:
        tokens, data = self.case.get("tokens"), self.case.get("data")
        failure = None
        if tokens is not None:
            failure = {"tokens": tokens, "data": data, "seed": self.options.seed, "launch": 0, "row": None,
                       "expected": "an end", "got": died.splitlines()[0]}  # fmt: skip
        return {"event": "result", "subject": self.subject, "check": self.check, "passed": False, "launches": 0,
                "seconds": 0.0, "figures": {}, "reason": died, "failure": failure}  # fmt: skip
