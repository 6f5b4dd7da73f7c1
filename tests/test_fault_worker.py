"""The process that runs trials of broken kernels, mostly within this one: subjects of xla, checks of the tests."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import pytest

from jax_router.verification import plan
from jax_router.verification.result import Context, Failure, Result

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import fault_watch
import fault_worker


@pytest.fixture
def child(monkeypatch):
    device, events = jax.devices("cpu")[0], []
    subjects, _ = plan.subjects(plan.Options(("xla",), models=("gpt-oss-120b", "DeepSeek-V3")), device)
    # Last, as the real ones come: behind those with weights in bfloat16.
    wide = plan.float32_routers(plan.Options(models=("MiniMax-M2",)))
    subjects += [dataclasses.replace(subject, implementation="xla") for subject in wide]

    def emit(event: str, **facts: object) -> None:
        events.append({"event": event, **json.loads(json.dumps(facts))})

    alive = fault_worker.Alive(emit)
    found = [(subject, Context(device, alive=alive)) for subject in subjects]

    def run(checks: dict, **trial: object) -> tuple[bool, list[dict]]:
        for name, check in checks.items():
            monkeypatch.setitem(plan.CHECKS, name, check)
        defaults = {"trial": 3, "operations": ("router_gemm", "route"), "checks": tuple(checks), "seconds": 5.0}
        return fault_worker.run_trial(fault_worker.Trial(**{**defaults, **trial}), found, emit, alive), events

    return run


def check(name: str, passed: bool, seen: list, programs: dict | None = None) -> plan.Check:
    def run(subject, context):
        for key, made in (programs or {}).items():
            context.program(key, made)
        context.chains.append("of this trial")
        seen.append((name, subject.label, context))
        return Result(name, passed, 5, failure=None if passed else Failure(8, "normal", 3, 1, 0, "0x0", "0x1"))

    return plan.Check(run, lambda subject, context: programs or {})


def test_a_trial_runs_its_checks_in_order_on_each_router_and_ends_at_the_first_failure(child):
    seen: list = []
    numerics = check("experts", True, seen)
    goes_on, events = child({"experts": numerics, "accuracy": numerics, "bits": check("bits", False, seen)})
    assert goes_on
    assert [(name, label) for name, label, _ in seen] == [
        ("experts", "router_gemm xla gpt-oss-120b"), ("bits", "router_gemm xla gpt-oss-120b"),
    ], "accuracy and experts are one check"  # fmt: skip
    kinds = [event["event"] for event in events if event["event"] != "alive"]
    assert kinds == ["trial", "check", "result", "check", "result", "done"]


def test_trials_have_the_defaults_of_the_command_and_seeds_of_their_own_and_share_executables(child):
    seen: list = []
    compiled = []
    checks = {"load": check("load", True, seen, {("chain", 8): lambda: compiled.append("chain")})}
    began = time.monotonic()
    child(checks, trial=3)
    child(checks, trial=4)
    contexts = [context for _, _, context in seen]
    assert [context.seed for context in contexts] == [3] * 6 + [4] * 6, "three routers, two operations"
    default = Context(contexts[0].device)
    for context in contexts:
        assert (context.tokens, context.launches, context.quick) == (default.tokens, default.launches, default.quick)
        assert began + 5.0 <= context.deadline <= time.monotonic() + 5.0
        assert context.chains == ["of this trial"]
    assert len(compiled) == 6, "once for each subject"


def test_a_survey_takes_the_first_router_of_its_operation_and_less_of_everything(child):
    seen: list = []
    child({"load": check("load", True, seen)}, operations=("route",), first=True, quick=True, launches=9)
    ((_, label, context),) = seen
    assert (label, context.quick, context.launches) == ("route xla gpt-oss-120b", True, 9)


def test_a_trial_of_float32_weights_takes_the_routers_that_have_them(child):
    seen: list = []
    load = {"load": check("load", True, seen)}
    child(load, multiplied="float32")
    assert [label for _, label, _ in seen] == ["router_gemm xla MiniMax-M2", "route xla MiniMax-M2"]


@pytest.mark.parametrize(
    ("multiplied", "first"),
    [("bfloat16", "router_gemm xla gpt-oss-120b"), ("float32", "router_gemm xla MiniMax-M2")],
)
def test_a_survey_takes_the_first_router_of_its_dtype(child, multiplied, first):
    seen: list = []
    child({"load": check("load", True, seen)}, multiplied=multiplied, first=True)
    assert [label for _, label, _ in seen] == [first]


def test_no_router_begins_after_the_default_minutes(child):
    seen: list = []
    child({"bits": check("bits", True, seen)}, ends=0.0)
    assert seen == []


def test_a_check_that_raises_ends_the_process_of_the_trial(child):
    def run(subject, context):
        context.alive(7)
        context.alive(5)  # right after, so not yet passed on
        raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED")

    goes_on, events = child({"bits": plan.Check(run, lambda subject, context: {})})
    assert not goes_on
    assert events[-1] == {"event": "crash", "reason": "RuntimeError: CUDA_ERROR_LAUNCH_FAILED"}
    assert sum(event["launches"] for event in events if event["event"] == "alive") == 12


def test_the_child_says_what_the_machine_is_and_refuses_what_does_not_run_there(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    run = fault_watch.Run(tmp_path, 30.0)
    machine = run.machine("xla")
    assert machine["provenance"]["gpu"] is None
    assert machine["launches"] == fault_worker.LAUNCHES == plan.Options().launches
    assert machine["seconds"] == 300 / 9, "five router GEMMs, four routers, and only xla runs"
    with pytest.raises(fault_watch.TrialsError, match=r"nothing can be measured here: cuda .*compute capability"):
        run.machine("cuda")
