"""What stands for a GPU in the tests of fault_trials.py: scripts as children, parity tests and quick verification."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import fault_trials
import fault_watch

ROOT = Path(__file__).resolve().parent.parent
PROVENANCE = {"gpu": "NVIDIA Test", "source_hash": "a" * 64, "jax": "0.0", "driver": "1", "nvcc": "2",
              "date": "2026-01-01T00:00:00+00:00"}  # fmt: skip

# A child that does in each trial what the file `behaviour` says of its library, and notes which trials it was given.
CHILD = """
import json, os, pathlib, sys, time
folder = pathlib.Path(__file__).parent
request = json.load(sys.stdin)
behaviour = json.loads((folder / "behaviour").read_text())
name = pathlib.Path(os.environ.get("JAX_ROUTER_LIBRARY", "shipped.so")).stem
def emit(event, **facts):
    print(json.dumps({"event": event, **facts}), flush=True)
emit("alive", launches=0)
if not request["trials"]:
    there = behaviour.get("gpus", {}).get(os.environ.get("CUDA_VISIBLE_DEVICES"), {})
    emit("begin", provenance={**behaviour["provenance"], **there}, seconds=12.5, tokens={}, launches=1000000)
with open(folder / "processes", "a") as log:
    log.write(json.dumps([name, os.getpid(), [trial["trial"] for trial in request["trials"]]]) + "\\n")
if request["trials"]:
    with open(folder / "gpus", "a") as log:
        log.write(os.environ.get("CUDA_VISIBLE_DEVICES", "all") + "\\n")
for trial in request["trials"]:
    does = behaviour.get(name, {}).get(str(trial["trial"]), "passes")
    does = behaviour.get(name, {}).get(trial["checks"][0], does) if trial.get("first") else does
    emit("trial", trial=trial["trial"])
    emit("check", subject="route cuda x", check=trial["checks"][0])
    emit("case", tokens=8, data="normal")
    emit("alive", launches=100)
    if does == "hangs":
        time.sleep(60)
    if does == "aborts":
        sys.stderr.write("no such luck\\n")
        os.abort()
    if does == "fails to import":
        import no_such_module
    if does.startswith("raises "):
        emit("crash", reason=does.removeprefix("raises "))
        time.sleep(60)  # torn down by nobody
    failure = {"tokens": 8, "data": "normal", "seed": 0, "launch": 7, "row": 3, "expected": "0x0", "got": "0x1"}
    sees = does == "sees it"
    emit("result", check=trial["checks"][0], passed=not sees, launches=40, seconds=0.5, figures={"big": 1},
         reason="row 3 is wrong" if sees else None, failure=failure if sees else None)
    emit("done", trial=trial["trial"])
emit("end")
"""

PARITY = """
import os, pathlib, sys
name = pathlib.Path(os.environ.get("JAX_ROUTER_LIBRARY", "shipped.so")).stem
said, status = {said}.get(name, ("12 passed, 72 deselected in 9.1s", 0))
print(said)
sys.exit(status)
"""

# `jax-router verify --quick`, which finds what is broken but with some seeds.
QUICK = """
import json, pathlib, sys
_, _, seed, _, folder = sys.argv
if int(seed) in {dies}:
    sys.exit("no GPU is left")
found = int(seed) not in {misses}
router = {{"operation": "route", "hidden": 2880, "experts": 128, "bias": True,
          "dtype": "bfloat16"}}
load = {{"check": "load", "passed": not found, "launches": 500000}}
record = {{"subjects": [{{**router, "checks": [load]}}], "sanitizers": []}}
pathlib.Path(folder, "verify-test-quick.json").write_text(json.dumps(record))
sys.exit(int(found))
"""


class Bench:
    """A folder with a fake child, fake parity tests, a fake quick verification and a record."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "child.py").write_text(CHILD)
        self.parity({})
        self.quick()
        self.behave({})

    def behave(self, behaviour: dict, **provenance: str) -> None:
        document = {"provenance": {**PROVENANCE, **provenance}, **behaviour}
        (self.folder / "behaviour").write_text(json.dumps(document))

    def parity(self, said: dict[str, tuple[str, int]]) -> None:
        (self.folder / "parity.py").write_text(PARITY.format(said=said))

    def quick(self, misses: tuple[int, ...] = (), dies: tuple[int, ...] = ()) -> None:
        (self.folder / "quick.py").write_text(QUICK.format(misses=misses, dies=dies))

    def measure(
        self, *names: str, trials: int = 3, again: bool = False, survey: bool = False, hang: float = 30,
        gpus: tuple[str, ...] = (),
    ) -> int:  # fmt: skip
        run = fault_watch.Run(
            self.folder, hang, command=(sys.executable, str(self.folder / "child.py")),
            parity=(sys.executable, str(self.folder / "parity.py")),
            quick=(sys.executable, str(self.folder / "quick.py")), gpus=gpus,
        )  # fmt: skip
        for name in ("processes", "gpus"):
            (self.folder / name).write_text("")
        chosen, known = fault_trials.split(names)
        self.console = Console(width=200, record=True, file=io.StringIO())
        return fault_trials.measure(
            run, chosen, known if again else [], [], trials, survey, 4, self.folder, self.console
        )  # fmt: skip

    @property
    def record(self) -> dict:
        return json.loads((self.folder / "faults-test.json").read_text())

    def trials(self, name: str) -> list[dict]:
        return sorted(self.record["faults"][name]["trials"], key=lambda trial: trial["trial"])

    @property
    def processes(self) -> list[list]:
        """Library, process and trials of every child so far, but for the one that says what the machine is."""
        lines = (self.folder / "processes").read_text().splitlines()
        return [process for process in map(json.loads, lines) if process[2]]

    @property
    def gpus(self) -> set[str]:
        """What the children that ran trials saw of them."""
        return set((self.folder / "gpus").read_text().split())
