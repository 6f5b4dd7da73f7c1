"""The trials of broken kernels, with children that are scripts: what is caught by what, what is kept, and what is not.

What a GPU says of the faults is measured elsewhere (scripts/fault_trials.py).
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from jax_router import build
from jax_router.verification import sanitizers
from jax_router.verification.result import Result

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import fault_list
import fault_table
import fault_trials
import fault_watch
import faults

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
    emit("begin", provenance=behaviour["provenance"], seconds=12.5, tokens={}, launches=1000000)
with open(folder / "processes", "a") as log:
    log.write(json.dumps([name, os.getpid(), [trial["trial"] for trial in request["trials"]]]) + "\\n")
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


class Bench:
    """A folder with a fake child, fake parity tests and a record."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "child.py").write_text(CHILD)
        self.parity({})
        self.behave({})

    def behave(self, behaviour: dict, **provenance: str) -> None:
        document = {"provenance": {**PROVENANCE, **provenance}, **behaviour}
        (self.folder / "behaviour").write_text(json.dumps(document))

    def parity(self, said: dict[str, tuple[str, int]]) -> None:
        (self.folder / "parity.py").write_text(PARITY.format(said=said))

    def measure(self, *names: str, trials: int = 3, again: bool = False, survey: bool = False, hang: float = 30) -> int:
        run = fault_watch.Run(
            self.folder, hang, command=(sys.executable, str(self.folder / "child.py")),
            parity=(sys.executable, str(self.folder / "parity.py")),
        )  # fmt: skip
        (self.folder / "processes").write_text("")
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


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def test_a_failed_check_a_hang_a_crash_and_a_death_all_catch_and_the_next_trial_goes_on(bench):
    does = ["sees it", "hangs", "raises JaxRuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS", "aborts", "passes", "sees it"]
    bench.behave({"rounded-logits": {str(i): each for i, each in enumerate(does)}})
    assert bench.measure("rounded-logits", trials=6, hang=1.0) == 1, "a trial missed it"
    found = bench.trials("rounded-logits")
    assert [trial["caught_by"] for trial in found] == ["experts", "hang", "crash", "crash", None, "experts"]
    assert [trial["during"] for trial in found] == ["experts"] * 4 + [None, "experts"]
    assert [trial["launches"] for trial in found] == [40, 100, 100, 100, 40, 40]
    assert found[1]["seconds"] >= 1.0
    assert found[1]["case"] == {"tokens": 8, "data": "normal"}
    assert found[0]["reason"] == "row 3 is wrong"
    assert found[0]["checks"][0]["results"][0]["failure"] == {"tokens": 8, "data": "normal", "launch": 7, "row": 3}
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in found[2]["reason"]
    assert [trials for _, _, trials in bench.processes] == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [3, 4, 5], [4, 5]]


@pytest.mark.parametrize(
    "does", ["fails to import", "raises RESOURCE_EXHAUSTED: CUDA_ERROR_OUT_OF_MEMORY", "raises TypeError: no list"]
)
def test_what_is_no_finding_about_a_kernel_catches_nothing_and_is_measured_by_the_next_call(bench, does):
    bench.behave({"rounded-logits": {"0": "sees it", "1": does, "2": "sees it"}})
    assert bench.measure("rounded-logits") == 1
    assert [trial["trial"] for trial in bench.trials("rounded-logits")] == [0]
    error = bench.record["faults"]["rounded-logits"]["error"]
    assert ("No module named 'no_such_module'" if "import" in does else does.removeprefix("raises ")) in error
    assert "not measured rounded-logits" in bench.console.export_text()
    bench.behave({"rounded-logits": {str(i): "sees it" for i in range(3)}})
    assert bench.measure("rounded-logits") == 0
    assert [trials for _, _, trials in bench.processes] == [[1, 2]]
    assert bench.record["faults"]["rounded-logits"]["error"] is None


def test_a_second_call_goes_on_and_again_measures_again(bench):
    bench.behave({name: {str(i): "sees it" for i in range(5)} for name in ("rounded-logits", "negative-keys")})
    assert bench.measure("rounded-logits", trials=2) == 0
    assert bench.measure("rounded-logits", "negative-keys", trials=3) == 0
    assert sorted((name, trials) for name, _, trials in bench.processes) == [
        ("negative-keys", [0, 1, 2]), ("rounded-logits", [2]),
    ]  # fmt: skip
    assert bench.measure("rounded-logits", trials=3, again=True) == 0
    assert [(name, trials) for name, _, trials in bench.processes] == [("rounded-logits", [0, 1, 2])]
    assert len(bench.trials("negative-keys")) == 3, "it was not named"


@pytest.mark.parametrize("changed", [{"source_hash": "b" * 64}, {"jax": "0.1"}, {"gpu": "NVIDIA TEST"}])
def test_what_was_measured_on_something_else_is_not_kept(bench, changed):
    bench.behave({"rounded-logits": {"0": "sees it"}})
    bench.measure("rounded-logits", trials=1)
    bench.behave({"negative-keys": {"0": "sees it"}}, **changed)
    bench.measure("negative-keys", trials=1)
    assert "rounded-logits" not in bench.record["faults"]


def test_a_fault_that_changed_is_measured_again(bench, monkeypatch):
    bench.behave({"rounded-logits": {"0": "sees it"}, "negative-keys": {"0": "sees it"}})
    bench.measure("rounded-logits", "negative-keys", trials=1)
    path = bench.folder / "faults-test.json"
    record = bench.record
    record["faults"]["rounded-logits"]["digest"] = "of another edit"
    path.write_text(json.dumps(record))
    bench.measure("rounded-logits", "negative-keys", trials=1)
    assert [(name, trials) for name, _, trials in bench.processes] == [("rounded-logits", [0])]


def test_a_record_says_what_it_lacks(bench):
    bench.behave({fault.name: {"0": "sees it", "1": "sees it"} for fault in fault_list.FAULTS})
    bench.measure(*(fault.name for fault in fault_list.FAULTS), "shipped", trials=2)
    whole = bench.record
    whole["faults"]["shipped"]["trials"] *= 2  # two of three
    assert fault_trials.lacks(whole, trials=2) == ["shipped: no control"]
    del whole["faults"]["shipped"]["trials"][3]
    assert fault_trials.lacks(whole, trials=2) == []
    whole["faults"]["a-fault-of-old"] = whole["faults"]["rounded-logits"]
    del whole["faults"]["rounded-logits"], whole["faults"]["negative-keys"]["trials"][0]
    whole["faults"]["arrival-order"]["parity"] = None
    whole["faults"]["ties-to-highest"]["digest"] = "of another edit"
    assert fault_trials.lacks(whole, trials=2) == [
        "arrival-order: no parity tests",
        "ties-to-highest: another fault was measured under this name",
        "rounded-logits: not measured",
        "negative-keys: 1 trials of 2",
        "a-fault-of-old: no fault of the list",
    ]


DRIVER = """
import signal, sys
from functools import partial
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
sys.path[:0] = [{scripts!r}, {root!r}]
import fault_trials, fault_watch, faults
import typer
faults.is_built = lambda *_: True
child = (sys.executable, {child!r})
fault_trials.Run = partial(fault_watch.Run, command=child, parity=(sys.executable, "-c", "import time; time.sleep(60)"))
typer.run(fault_trials.main)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_was_measured_and_ends_the_children(bench, sent):
    bench.behave({"rounded-logits": {"0": "sees it", "1": "hangs"}, "arrival-order": {"0": "hangs"}})
    places = {"scripts": str(ROOT / "scripts"), "root": str(ROOT), "child": str(bench.folder / "child.py")}
    options = ["--libraries", str(bench.folder), "--output", str(bench.folder), "--trials", "2", "--no-survey"]
    command = [sys.executable, "-c", DRIVER.format(**places), *options, "rounded-logits", "arrival-order"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path = bench.folder / "faults-test.json"
    until = time.monotonic() + 30
    while not (path.is_file() and len(bench.processes) == 2) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert [trial["caught_by"] for trial in bench.trials("rounded-logits")] == ["experts"]
    assert bench.trials("arrival-order") == []
    assert all(entry["error"] is None for entry in bench.record["faults"].values())
    assert "1 of 1" in (bench.folder / "faults-test.md").read_text()
    for _, child, _ in bench.processes:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


@pytest.mark.parametrize("said", [("84 deselected in 1s", 5), ("12 skipped in 1s", 0), ("1 failed, 2 passed", 1)])
def test_parity_tests_must_pass_with_the_shipped_library_before_they_mean_anything(bench, said):
    bench.behave({"arrival-order": {"0": "sees it"}})
    bench.parity({"shipped": said})
    assert bench.measure("arrival-order", trials=1) == 1
    assert bench.record["faults"]["arrival-order"]["parity"] is None
    bench.parity({})
    assert bench.measure("arrival-order", trials=1) == 0
    for name in ("shipped", "arrival-order"):
        assert bench.record["faults"][name]["parity"]["counts"] == {"passed": 12}


def test_parity_tests_that_see_a_fault_they_are_said_to_miss_are_reported(bench):
    bench.behave({"arrival-order": {"0": "sees it"}, "rounded-logits": {"0": "sees it"}})
    bench.parity({"arrival-order": ("1 failed, 3 passed in 2s", 1), "rounded-logits": ("1 failed in 2s", 1)})
    assert bench.measure("arrival-order", "rounded-logits", trials=1) == 1
    found = bench.record["faults"]["arrival-order"]["parity"]
    assert (found["passed"], found["counts"]) == (False, {"failed": 1, "passed": 3})
    assert bench.record["faults"]["rounded-logits"]["parity"] is None, "nobody says that it is missed"
    assert "FAIL (1 failed, 3 passed)" in bench.console.export_text()


def test_a_fault_that_its_first_trials_miss_is_given_up_until_it_is_to_be_measured_again(bench):
    bench.behave({"rounded-logits": {"0": "passes", "1": "passes", "2": "sees it", "3": "sees it"}})
    assert bench.measure("rounded-logits", trials=4) == 1
    assert [trial["trial"] for trial in bench.trials("rounded-logits")] == [0, 1]
    assert bench.measure("rounded-logits", trials=4) == 1
    assert bench.processes == []
    bench.behave({"rounded-logits": {"1": "sees it", "2": "passes", "3": "passes"}})
    bench.measure("rounded-logits", trials=4, again=True)
    assert [trial["caught_by"] for trial in bench.trials("rounded-logits")] == [None, "experts", None, None]


def test_trials_that_may_cost_their_process_run_at_the_same_time(bench):
    for name in ("bias-unguarded", "barrier-not-reached"):
        bench.behave({name: {str(i): "aborts" for i in range(6)}})
        assert bench.measure(name, trials=6) == 0
        assert [trial["trial"] for trial in bench.trials(name)] == list(range(6))
    begun = [trials for _, _, trials in bench.processes]
    assert sorted(begun) == [[i] for i in range(6)], "of the last one, which may hang"


def test_the_shipped_library_must_not_be_caught(bench):
    assert bench.measure("shipped", trials=2) == 0
    assert sorted(trials for _, _, trials in bench.processes) == [[0], [1]]
    assert bench.measure("shipped", trials=10) == 0
    assert [trials for _, _, trials in bench.processes] == [[2]], "one for each kind of router, and never given up"
    bench.behave({"shipped": {"1": "sees it"}})
    assert bench.measure("shipped", again=True) == 1
    assert "a check sees something in the shipped library" in bench.console.export_text()


def test_a_survey_asks_every_check_of_each_operation_and_ends_with_a_hang(bench):
    bench.behave({"split-by-tokens": {"0": "sees it", "bits": "sees it", "fence": "aborts"}})
    assert bench.measure("split-by-tokens", trials=1, survey=True) == 0
    (cells,) = fault_table.survey_rows(bench.record)
    assert dict(zip(("fault", *fault_table.CHECKS), cells, strict=True)) == {
        "fault": "split-by-tokens", "accuracy": "ok", "experts": "-", "bits": "caught", "memory": "ok",
        "fence": "crash", "neighbours": "ok", "graphs": "ok", "load": "ok",
    }  # fmt: skip
    bench.behave({"rounded-logits": {"0": "sees it", "memory": "hangs"}})
    assert bench.measure("rounded-logits", trials=1, survey=True, hang=1.0) == 0
    asked = [each["asked"] for each in bench.record["faults"]["rounded-logits"]["survey"]]
    assert asked == ["accuracy", "bits", "memory"]
    bench.measure("rounded-logits", trials=1, survey=True)
    assert bench.processes == [], "what hung is not tried again"


def test_the_table_has_median_and_ends_of_what_it_took_and_a_row_over_all(bench):
    bench.behave({name: {str(i): "sees it" for i in range(3)} for name in ("rounded-logits", "negative-keys")})
    bench.behave({"rounded-logits": {"0": "sees it", "1": "aborts", "2": "sees it"}, "negative-keys": {"0": "sees it"}})
    bench.measure("negative-keys", "rounded-logits", "shipped")
    rows = fault_table.rows(bench.record)
    assert [row[:4] for row in rows] == [
        ["rounded-logits", "3 of 3", "experts 2, crash in experts 1", "40 (40 to 100)"],
        ["negative-keys", "1 of 3", "experts", "40"],
        ["all faults", "4 of 6", "-", "40 (40 to 100)"],
        ["shipped", "0 of 3", "-", "40"],
    ]
    text = (bench.folder / "faults-test.md").read_text()
    assert "| rounded-logits | 3 of 3 | experts 2, crash in experts 1 | 40 (40 to 100) | " in text
    assert "share of the default minutes, 12.5 seconds" in text
    assert "NVIDIA Test, driver 1; jax 0.0, nvcc 2; 2026-01-01; sources `aaaaaaaaaaaa`." in text
    assert "not caught in every trial negative-keys" in bench.console.export_text()


def test_the_sanitizer_gets_the_faulty_sources_and_what_it_says_is_recorded(bench, monkeypatch):
    (fault,) = faults.named(["barrier-not-reached"])
    compiled = []

    def build_program(folder, csrc=None):
        compiled.append((csrc / fault.edits[0].file).read_text())
        return folder / "program"

    monkeypatch.setattr(sanitizers, "find_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitizers, "build_program", build_program)
    monkeypatch.setattr(
        sanitizers, "_run", lambda _, tool, *__: Result(tool, False, 3, 1.0, reason="divergent threads")
    )
    run = fault_watch.Run(bench.folder, 30.0, command=(sys.executable, str(bench.folder / "child.py")))
    assert fault_trials.measure(run, [], [], [fault], 1, False, 1, bench.folder, Console(quiet=True)) == 0
    assert fault.edits[0].new in compiled[0]
    assert fault.edits[0].new not in (build.csrc_directory() / fault.edits[0].file).read_text()
    (tool,) = bench.record["faults"]["barrier-not-reached"]["sanitizers"]
    assert (tool["tool"], tool["passed"], tool["reason"]) == ("synccheck", False, "divergent threads")
    assert fault_table.rows(bench.record)[0][:3] == ["barrier-not-reached", "0 of 0", "synccheck"]
