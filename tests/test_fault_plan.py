"""What the trials of broken kernels are made of: checks and routers of a fault, libraries, the control."""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_build import FakeCompilers

from jax_router.verification import plan

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import fault_list
import fault_table
import fault_trials
import fault_watch
import fault_worker
import faults


def test_a_fault_goes_to_the_checks_and_routers_that_it_is_said_to_show_in():
    known = {fault.name: fault for fault in fault_list.FAULTS}
    assert fault_trials.checks_of(known["bias-unguarded"]) == ("memory", "fence")
    assert fault_trials.checks_of(known["obsolete-barrier"]) == ("load",)
    assert fault_trials.checks_of(known["barrier-not-reached"]) == fault_table.CHECKS, "any of them may hang"
    assert fault_trials.models_of(known["bias-unguarded"]) == ("awkward",)
    assert fault_trials.models_of(known["obsolete-barrier"]) == ("gpt-oss-120b", "DeepSeek-V3")
    for fault in fault_list.FAULTS:
        assert set(fault_trials.checks_of(fault)) <= set(plan.CHECKS)
        options = plan.Options(operations=fault.operations, models=fault_trials.models_of(fault))
        options.check()
        assert {shape.operation for shape in plan.all_shapes(options)} == set(fault.operations)


def test_what_is_broken_with_float32_weights_alone_goes_to_routers_that_have_them(tmp_path):
    run = fault_watch.Run(tmp_path, 30.0)
    run.begin(tmp_path / "record.json", {"parameters": {"seconds": 5.0}, "faults": {}, "elapsed_seconds": 0.0}, 0.0)
    requests = []
    run.follow = lambda name, request, trials, into: requests.append((name, request, trials))
    chosen = faults.named(["term-left-out", "obsolete-barrier"])
    for fault in chosen:
        run.record["faults"][fault.name] = fault_trials.entry_of(fault)
    for tasks, _ in fault_trials.Plan(run, 2, survey=True).phases(chosen, 4):
        for task in tasks:
            if task.__qualname__.startswith(("Plan._trials", "Plan._survey")):
                task()
    assert {name for name, _, _ in requests} == {"term-left-out", "obsolete-barrier"}
    for name, request, trials in requests:
        wanted = "float32" if name == "term-left-out" else None
        assert {fault_worker.Trial(**trial).multiplied for trial in trials} == {wanted}
        if wanted:
            options = plan.Options(operations=tuple(request["operations"]), models=tuple(request["models"]))
            found = {(each.operation, each.dtype) for each in plan.float32_routers(options)}
            assert found == set(itertools.product(("router_gemm", "route"), ("bfloat16", "float32")))


def test_a_library_of_other_sources_or_of_none_is_compiled_again(tmp_path, monkeypatch):
    fake = FakeCompilers(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(fake.folder))
    monkeypatch.setenv("CXX", str(fake.folder / "g++"))
    (fault,) = faults.named(["rounded-logits"])
    folder = tmp_path / "libraries"
    folder.mkdir()
    (folder / "rounded-logits.so").write_text("of somebody")
    console = Console(file=io.StringIO())
    fault_trials.ready_libraries([fault], folder, console)
    assert fake.links() == 1
    fault_trials.ready_libraries([fault], folder, console)
    assert fake.links() == 1
    (folder / "rounded-logits.digest").write_text("of others")
    fault_trials.ready_libraries([fault], folder, console)
    assert fake.links() == 2


def test_an_unknown_name_is_refused():
    with pytest.raises(faults.FaultError, match=r"NAME is no-such\. Expected some of obsolete-barrier"):
        fault_trials.split(["shipped", "no-such"])
    chosen, names = fault_trials.split(["shipped"])
    assert (chosen, names) == ([None], ["shipped"])
    assert len(fault_trials.split([])[0]) == 1 + len(fault_list.FAULTS)


def test_a_control_in_which_no_check_ran_shows_nothing():
    trial = {"caught_by": None, "ran": True}
    assert fault_table.is_shipped_right({"trials": [trial], "survey": [{**trial, "ran": False}]})
    assert not fault_table.is_shipped_right({"trials": [trial, {**trial, "ran": False}], "survey": []})
    assert not fault_table.is_shipped_right({"trials": [{**trial, "caught_by": "load"}], "survey": []})
