"""A process that gets a request and says what it does, one JSON line per event: both sides of it.

A kernel that hangs, crashes or touches what it must not takes such a process down, and not the one that follows it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

STDERR_LINES = 40  # of a process that died, in how it ended
# How XLA and the C interfaces name a lost device, and memory that is not there.
OF_THE_DEVICE = re.compile(r"CUDA_ERROR_|cudaError|CUresult|illegal|misaligned|launch fail", re.IGNORECASE)
OF_MEMORY = re.compile(r"out[ _]of[ _]memory|RESOURCE_EXHAUSTED|cudaErrorMemoryAllocation", re.IGNORECASE)

Event = dict[str, Any]


def conversation() -> tuple[dict[str, Any], Callable[..., None]]:
    """The request, and `emit(event, **facts)` for any thread. Whatever else is printed goes to the error output."""
    request = json.load(sys.stdin)
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def emit(event: str, **facts: Any) -> None:
        with lock:
            events.write(json.dumps({"event": event, **facts}) + "\n")

    return request, emit


def kill(process: subprocess.Popen[Any]) -> None:
    """With its group and the other groups of its session, as a sanitizer has one; or what is left of them."""
    _kill_group(process.pid)  # first, so that it starts nothing more
    for group in _groups_of_session(process.pid):
        _kill_group(group)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _groups_of_session(session: int) -> set[int]:
    """Where the system tells, as Linux does in proc(5)."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            _, _, group, of_session = path.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(of_session) == session:
                found.add(int(group))
    return found


class Child:
    """A process that gets a request. `how_it_ended` once there are no more events; its error output is kept for that.

    Args:
      command: what to run.
      request: for its standard input, as JSON.
      environment: all of it.
      announce: called with every line that jax_router itself writes to the error output, as when it compiles.
    """

    def __init__(
        self, command: Sequence[str], request: dict[str, Any], environment: Mapping[str, str],
        announce: Callable[[str], object] = lambda _: None,
    ):  # fmt: skip
        self.announce = announce
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        self.said: list[str] = []
        self.how_it_ended = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        assert self.process.stdin is not None
        try:
            with self.process.stdin as stdin:
                json.dump(request, stdin)
        except BrokenPipeError:
            pass  # it died: how is read below
        self._readers = [threading.Thread(target=each, daemon=True) for each in (self._read_events, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.process)
        self.process.wait()
        for reader in self._readers:
            reader.join(timeout=5)

    def events(self, hang_seconds: float) -> Iterator[Event]:
        """Until it ends, says what is no event, or says nothing for so long."""
        while True:
            try:
                line = self._lines.get(timeout=hang_seconds)
            except queue.Empty:
                self.how_it_ended = f"hung: no sign of life for {hang_seconds:.0f} s"
                return
            if line is None:
                status = self.process.wait()
                self._readers[1].join(timeout=5)
                last = "\n".join(line for line in self.said if line)
                how = f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
                self.how_it_ended = f"ended with {how}:\n{last[-2000:]}"
                return
            event = _event(line)
            if event is None:
                self.how_it_ended = f"said what is no event: {line[:200]!r}"
                return
            yield event

    def _read_events(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                if line.startswith("jax_router: "):
                    self.announce(line)
                self.said = [*self.said[1 - STDERR_LINES :], line.rstrip()]


def _event(line: str) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
