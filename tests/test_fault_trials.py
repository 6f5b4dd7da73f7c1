"""The trials of broken kernels, with children that are scripts: what is caught by what, what is kept, and what is not.

What a GPU says of the faults is measured elsewhere (scripts/fault_trials.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from fault_bench import ROOT, Bench
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
    whole["faults"]["obsolete-barrier"]["parity"] = None
    del whole["faults"]["obsolete-barrier"]["quick"][0]
    whole["faults"]["ties-to-highest"]["digest"] = "of another edit"
    assert fault_trials.lacks(whole, trials=2) == [
        "obsolete-barrier: no parity tests",
        "obsolete-barrier: 1 runs of verify --quick of 2",
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


@pytest.mark.parametrize(("misses", "status"), [((), 0), ((4,), 0), ((4, 7), 1)])
def test_quick_may_miss_one_run_of_ten(bench, misses, status):
    bench.behave({"obsolete-barrier": {str(number): "sees it" for number in range(10)}})
    bench.quick(misses)
    assert bench.measure("obsolete-barrier", "shipped", trials=10) == status
    runs = bench.record["faults"]["obsolete-barrier"]["quick"]
    assert [run["trial"] for run in runs] == list(range(10))
    assert [run["trial"] for run in runs if not run["failed"]] == list(misses)
    assert runs[0]["failed"] == ["load of route of 2880x128 +bias"]
    assert runs[0]["under_load"] == 500_000
    assert bench.record["faults"]["shipped"]["quick"] == []
    for text in (bench.console.export_text(), (bench.folder / "faults-test.md").read_text()):
        assert f"`jax-router verify --quick` finds obsolete-barrier in {10 - len(misses)} of 10 runs, of " in text


def test_a_quick_run_that_dies_is_no_miss_and_is_run_again(bench):
    bench.behave({"obsolete-barrier": {"0": "sees it", "1": "sees it"}})
    bench.quick(dies=(1,))
    assert bench.measure("obsolete-barrier", trials=2) == 1
    entry = bench.record["faults"]["obsolete-barrier"]
    assert [run["trial"] for run in entry["quick"]] == [0]
    assert "no GPU is left" in entry["error"]
    bench.quick()
    assert bench.measure("obsolete-barrier", trials=2) == 0
    assert [run["trial"] for run in bench.record["faults"]["obsolete-barrier"]["quick"]] == [0, 1]


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


def test_processes_are_spread_over_the_gpus_which_are_of_one_kind(bench):
    bench.measure("rounded-logits", "negative-keys", "shipped", trials=1, gpus=("GPU-a", "GPU-b"))
    assert bench.gpus == {"GPU-a", "GPU-b"}
    bench.behave({"gpus": {"GPU-b": {"gpu": "NVIDIA Other"}}})
    with pytest.raises(fault_watch.TrialsError, match="NVIDIA Other and NVIDIA Test"):
        bench.measure("rounded-logits", gpus=("GPU-a", "GPU-b"))
    bench.measure("rounded-logits", trials=2, gpus=("GPU-a",))
    assert bench.gpus == {"GPU-a"}


@pytest.mark.parametrize("options", [{"gpu": ["0", "0"]}, {"gpu": ["1"], "sanitizers": ["probe-once"]}])
def test_a_gpu_is_named_once_and_not_for_sanitizers(tmp_path, options):
    with pytest.raises(typer.BadParameter, match=r"gpu is [01]"):
        fault_trials.main(tmp_path, **{"sanitizers": None, **options})


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

    def build_program(csrc):
        compiled.append((csrc / fault.edits[0].file).read_text())
        return csrc / "program"

    monkeypatch.setattr(sanitizers, "find_sanitizer", lambda: sanitizers.Sanitizer(Path("tool"), "2026.4.0.0"))
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
