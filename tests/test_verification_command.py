"""`jax-router verify` and `jr.verify`: what they ask for, write, join, save, run again, and how they end."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from synthetic_record import subject, with_check
from synthetic_rows import PROVENANCE

import jax_router as jr
from jax_router import build, cli
from jax_router.verification import Verification, gate, report, supervisor
from jax_router.verification.plan import IDENTITY, Options

pytest.importorskip("typer")

from typer.testing import CliRunner

from jax_router.verification import command

CASE = {"tokens": 17, "data": "ties", "seed": 4, "launch": 2, "row": 5, "expected": "0x00000001", "got": "0x00000002"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    gate.kept.cache_clear()
    yield tmp_path / "cache"
    gate.kept.cache_clear()


def complete(**more: Any) -> dict[str, Any]:
    return subject(**{"source": "random", "complete": True, "date": PROVENANCE["date"], **more})


def found(*subjects: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As `supervise` returns it."""
    options = dataclasses.asdict(Options(**more.pop("options", {})))
    return {"options": options, "interrupted": False, "provenance": PROVENANCE, "library": None, "refused": {},
            "subjects": list(subjects), "sanitizers": [], **more}  # fmt: skip


WRONG = with_check(complete(), "load", False, "launch 7 is wrong under load, with 17 tokens")
next(check for check in WRONG["checks"] if check["check"] == "load")["failure"] = CASE


def verify(*arguments: str):
    return CliRunner().invoke(cli.application(), ["verify", *arguments])


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch):
    """What `supervise` returns, and the options that it was given."""
    given: list[Options] = []

    def returns(record: dict[str, Any] | Exception) -> list[Options]:
        def supervise(options: Options, *_: Any, **__: Any) -> dict[str, Any]:
            given.append(options)
            if isinstance(record, Exception):
                raise record
            return {**copy.deepcopy(record), "options": dataclasses.asdict(options)}

        monkeypatch.setattr(command, "supervise", supervise)
        monkeypatch.setattr(supervisor, "supervise", supervise)
        return given

    return returns


# What is asked for.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"implementations": ("cublas",)}, "implementation is 'cublas'. Expected one of cuda, pallas, xla; pass one of "
                                           "these to --implementation."),
        ({"operations": ("gemm",)}, "operation is 'gemm'. Expected one of router_gemm, route; pass"),
        ({"models": ("gpt-5",)}, "model is 'gpt-5'. Expected one of "),
        ({"checks": ("speed",)}, "check is 'speed'. Expected one of accuracy, experts, bits, memory, fence, "
                                 "neighbours, graphs, load; pass one of these to --check."),
        ({"minutes": 0.0}, "minutes is 0.0. Expected more than 0; pass a positive number to --minutes."),
        ({"minutes": float("nan")}, "minutes is nan. Expected more than 0"),
        ({"seed": -1}, "seed is -1. Expected 0 to 2147483647; pass one of these to --seed."),
        ({"launches": -1}, "launches is -1. Expected more than 0; pass a positive number to --launches."),
        ({"tokens": (8, 0)}, "tokens is 0. Expected 1 or more; pass a positive number to --tokens."),
        ({"checkpoint": "here", "models": ("all",)}, "checkpoint and model are both given. Expected one of them; leave "
                                                     "out --model."),
        ({"activations": "x.npy"}, "activations are given without a checkpoint. Expected the router they were recorded "
                                   "before; add --checkpoint."),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_four_parts(options, words, supervised):
    given = supervised(found(complete()))
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        Options(**options).check()
    assert str(refused.value).startswith(words)
    (name, value), *_ = options.items()
    flag = "--" + name.removesuffix("s") if isinstance(value, tuple) and name != "tokens" else f"--{name}"
    values = value if isinstance(value, tuple) else (value,)
    more = ("--model", "all") if name == "checkpoint" else ()
    result = verify(*(part for each in values for part in (flag, str(each))), *more)
    assert result.exit_code == command.BAD_INPUT
    assert result.stderr.startswith(f"error: {words[:40]}")
    assert given == []


def test_options_survive_json():
    options = Options(("cuda",), ("route",), ("all",), (1, 2), ("bits",), 1.5, 7, 3, True, "a", "b", True)
    assert Options.of(json.loads(json.dumps(dataclasses.asdict(options)))) == options


def test_the_command_line_asks_for_what_it_says(supervised, tmp_path):
    given = supervised(found(complete()))
    result = verify("--implementation", "cuda", "--implementation", "xla", "--operation", "route", "--tokens", "8",
                    "--check", "load", "--model", "Kimi-K2", "--minutes", "2", "--launches", "9", "--seed", "4",
                    "--sanitizers", "--output", str(tmp_path))  # fmt: skip
    assert result.exit_code == 0, result.output
    verify("--quick", "--output", str(tmp_path))
    verify("--checkpoint", "folder", "--activations", "x.npy", "--output", str(tmp_path))
    assert given == [
        Options(("cuda", "xla"), ("route",), ("Kimi-K2",), (8,), ("load",), 2.0, 9, 4, sanitizers=True),
        Options(minutes=0.75, launches=500_000, quick=True),
        Options(checkpoint="folder", activations="x.npy"),
    ]


def test_the_function_asks_for_the_same(supervised):
    given = supervised(found(complete(), WRONG))
    result = jr.verify("cuda", operation="route", model=["all"], tokens=[8], minutes=2, quick=True, seed=4)
    jr.verify()
    jr.verify(quick=True)
    assert given == [
        Options(("cuda",), ("route",), ("all",), (8,), minutes=2, launches=500_000, quick=True, seed=4), Options(),
        Options(minutes=0.75, launches=500_000, quick=True),
    ]  # fmt: skip
    assert isinstance(result, Verification)
    assert not result.passed
    assert str(result) == report.markdown(result.record)
    with pytest.raises(ValueError, match="implementation is 'tpu'"):
        jr.verify(["cuda", "tpu"])


def test_a_verification_passes_if_all_of_it_did():
    assert Verification(found(complete())).passed
    not_run = with_check(complete(), "memory", None, "XLA copies here")
    tool = {"tool": "memcheck", "reason": None}
    assert Verification(found(not_run, sanitizers=[{**tool, "passed": None}])).passed
    assert not Verification(found()).passed
    assert not Verification(found(complete(), WRONG)).passed
    assert not Verification(found(complete(), interrupted=True)).passed
    assert not Verification(found(complete(), sanitizers=[{**tool, "passed": False}])).passed


# How it ends.


def test_every_end_has_its_status(supervised, tmp_path, cache):
    folder = tmp_path / "records"
    supervised(found(complete()))
    result = verify("--output", str(folder))
    assert result.exit_code == 0, result.output
    assert f"wrote {folder / 'verify-h200.json'}" in result.output
    assert gate.read_record(folder / "verify-h200.json") == json.loads((cache / "verify-h200.json").read_text())
    assert (folder / "verify-h200.md").read_text() == report.markdown(gate.read_record(folder / "verify-h200.json"))

    supervised(found(complete(), interrupted=True))
    assert verify("--output", str(folder)).exit_code == command.INTERRUPTED
    assert gate.read_record(folder / "verify-h200.json")["interrupted"]
    started = found(complete(), interrupted=True)
    del started["provenance"]
    supervised(started)
    assert verify("--output", str(tmp_path / "none")).exit_code == command.INTERRUPTED
    assert not (tmp_path / "none").exists()

    supervised(found(WRONG))
    assert verify("--output", str(folder)).exit_code == command.FAILED
    supervised(found(complete(), sanitizers=[{"tool": "memcheck", "passed": False, "reason": "a leak"}]))
    assert verify("--output", str(folder)).exit_code == command.FAILED

    supervised(supervisor.RefusedError("nothing can be verified here [now]"))
    result = verify("--output", str(folder))
    assert result.exit_code == command.BAD_INPUT
    assert result.stderr == "error: nothing can be verified here [now]\n"
    supervised(RuntimeError("the process that verifies ended before its first check: hung"))
    result = verify("--output", str(folder))
    assert (result.exit_code, result.stderr[:30]) == (command.FAILED, "error: the process that verifi")


def test_what_did_not_run_is_no_success(supervised, tmp_path):
    lacking = {**with_check(complete(), "load", None, "no compiler"), "passed": False}
    nothing = {**with_check(only(complete(implementation="xla"), "bits"), "bits", None, "no bits"), "passed": None}
    for subjects, status in (([lacking], 1), ([nothing], 1), ([nothing, only(complete(), "bits")], 0)):
        supervised(found(*subjects))
        assert verify("--output", str(tmp_path / "records")).exit_code == status


def test_an_output_that_cannot_be_written_is_refused(supervised, tmp_path):
    given = supervised(found(complete()))
    (tmp_path / "file").write_text("")
    result = verify("--output", str(tmp_path / "file"))
    assert result.exit_code == command.BAD_INPUT
    assert (
        result.stderr == f"error: output is {tmp_path / 'file'}, a file. Expected a folder of records; name another.\n"
    )
    assert (result.exit_code, given) == (command.BAD_INPUT, []), "it takes minutes"
    result = verify("--output", str(tmp_path / "file" / "folder"))
    assert result.exit_code == command.BAD_INPUT
    assert f"error: output leads to {tmp_path / 'file' / 'folder' / 'verify-h200.json'}: " in result.stderr
    assert "Expected a place that can be written; name another." in result.stderr


def test_it_runs_here_in_a_process_of_its_own(tmp_path):
    checks = ("bits", "memory", "experts", "accuracy")
    result = verify("--implementation", "xla", "--model", "awkward", "--operation", "route", "--tokens", "8",
                    "--minutes", "0.01", *(part for name in checks for part in ("--check", name)),
                    "--output", str(tmp_path))  # fmt: skip
    assert result.exit_code == 0, result.output
    [path] = tmp_path.glob("verify-*-quick.json")  # of one number of tokens
    [verified] = gate.read_record(path)["subjects"]
    assert verified["passed"]
    assert [(check["check"], check["passed"]) for check in verified["checks"]] == [
        ("accuracy", True), ("experts", True), ("bits", None), ("memory", True)
    ]  # fmt: skip
    assert verified["launches"] == sum(check["launches"] for check in verified["checks"]) > 10
    assert "xla promises no bits here" in result.output


# Records.


def write(folder: Path, *subjects: dict[str, Any], **more: Any) -> dict[str, Any]:
    path = command.write(found(*subjects, **more), folder)
    return gate.read_record(path)


def parts(record: dict[str, Any]) -> dict[str, dict[str, tuple[bool | None, int]]]:
    return {f"{each['operation']} {each['hidden']}": {
        check["check"]: (check["passed"], check["launches"]) for check in each["checks"]
    } for each in record["subjects"]}  # fmt: skip


def only(of: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    """A subject of which only some checks were asked for."""
    checks = [check for check in of["checks"] if check["check"] in names]
    return {**of, "checks": checks, "launches": sum(check["launches"] for check in checks), **more}


def test_a_record_is_joined_with_an_earlier_one_of_the_same_sources(tmp_path):
    write(tmp_path, complete(), complete(hidden=8), sanitizers=[{"tool": "memcheck", "passed": True}])
    record = write(tmp_path, complete(hidden=8, date="2027-01-01"), complete(hidden=16))
    assert [(each["hidden"], each["date"][:4]) for each in record["subjects"]] == [
        (2880, "2026"), (8, "2027"), (16, "2026")
    ]  # fmt: skip
    assert record["sanitizers"] == [{"tool": "memcheck", "passed": True}]
    other = {**PROVENANCE, "source_hash": "1" * 64}
    assert [each["hidden"] for each in write(tmp_path, complete(hidden=4), provenance=other)["subjects"]] == [4]
    assert len(write(tmp_path, complete(hidden=5), provenance=other, library="mine.so")["subjects"]) == 1


def test_processes_that_write_at_once_join_what_the_others_wrote(tmp_path):
    ends = []

    def write_another() -> None:
        write(tmp_path, complete(hidden=8))
        ends.append(time.monotonic())

    with command._alone(tmp_path):
        thread = threading.Thread(target=write_another)
        thread.start()
        thread.join(0.3)
        (tmp_path / "verify-h200.json").write_text(json.dumps(command.as_record(found(complete()))))
        released = time.monotonic()
    thread.join()
    assert ends[0] >= released
    assert [each["hidden"] for each in gate.read_record(tmp_path / "verify-h200.json")["subjects"]] == [2880, 8]


def test_some_checks_again_do_not_replace_all_of_them(tmp_path):
    whole = write(tmp_path, complete())
    assert parts(write(tmp_path, only(complete(), "bits"))) == parts(whole)
    [again] = write(tmp_path, only(complete(), "bits", complete=False), interrupted=True)["subjects"]
    assert (again["complete"], again["passed"]) == (True, True)
    assert again["launches"] == sum(check["launches"] for check in complete()["checks"])
    assert gate.complete(gate.read_record(tmp_path / "verify-h200.json"), "router_gemm", "cuda")

    few = only(complete(), "load")
    few["checks"][0]["launches"] = 12
    assert parts(write(tmp_path, few))["router_gemm 2880"]["load"] == (True, 1_000_000)
    more = only(complete(), "load")
    more["checks"][0]["launches"] = 3_000_000
    assert parts(write(tmp_path, more))["router_gemm 2880"]["load"] == (True, 3_000_000)


def test_a_failure_stays_until_a_run_of_all_checks_passes(tmp_path):
    write(tmp_path, complete())
    [failed] = write(tmp_path, with_check(only(complete(), "load"), "load", False, "wrong"))["subjects"]
    assert not failed["passed"]
    [still] = write(tmp_path, only(complete(), "load"))["subjects"]
    assert [check["passed"] for check in still["checks"] if check["check"] == "load"] == [False]
    [passed] = write(tmp_path, complete())["subjects"]
    assert passed["passed"]


def test_a_record_is_interrupted_until_all_of_it_is_complete(tmp_path):
    rest = {**only(complete(hidden=8)), "complete": False, "passed": False}
    assert write(tmp_path, complete(), rest, interrupted=True)["interrupted"]
    assert write(tmp_path, complete())["interrupted"]
    assert not write(tmp_path, complete(hidden=8))["interrupted"]


@pytest.mark.parametrize("options", [{"quick": True}, {"tokens": (8,)}])
def test_a_run_that_proves_little_stands_beside_the_record(tmp_path, options):
    write(tmp_path, complete())
    assert write(tmp_path, complete(hidden=8), options=options)["quick"]
    assert {path.name for path in tmp_path.glob("*.json")} == {"verify-h200.json", "verify-h200-quick.json"}
    assert not gate.read_record(tmp_path / "verify-h200.json")["quick"]


# Failures.


def test_a_failure_is_saved_and_its_replay_asks_for_that_case_alone(supervised, tmp_path):
    supervised(found(complete(), WRONG))
    result = verify("--seed", "9", "--launches", "77", "--sanitizers", "--output", str(tmp_path))
    path = tmp_path / "failure-router_gemm-cuda-load-0.json"
    assert f"run it again with: jax-router verify --replay {path}" in result.output
    options, case = command.read_case(path)
    of_subject = {name: WRONG[name] for name in IDENTITY}
    assert options == Options(
        ("cuda",), ("router_gemm",), ("gpt-oss-120b",), (17,), ("load",), launches=77, seed=4, subject=of_subject
    )  # fmt: skip
    assert case["failure"] == CASE

    before = {each: each.read_bytes() for each in tmp_path.iterdir() if each.is_file()}
    given = supervised(found(only(WRONG, "load")))
    result = verify("--replay", str(path))
    assert result.exit_code == command.FAILED
    assert "'row': 5" in result.output
    assert "It fails again." in result.output
    supervised(found(only(complete(), "load")))
    result = verify("--replay", str(path))
    assert result.exit_code == 0
    assert "It does not fail here, or not this time." in result.output
    supervised(found(with_check(only(complete(), "load"), "load", None, "there is no GPU")))
    assert "It does not run here, which says nothing." in (result := verify("--replay", str(path))).output
    assert result.exit_code == command.FAILED
    supervised(found(interrupted=True))
    assert verify("--replay", str(path)).exit_code == command.INTERRUPTED
    assert given[1:] == [options] * 4
    assert before == {each: each.read_bytes() for each in tmp_path.iterdir() if each.is_file()}


def test_the_case_of_a_checkpoint_names_the_checkpoint_and_no_model(tmp_path):
    record = found(WRONG, options={"checkpoint": "folder"})
    [path] = command.save_failures(record, tmp_path)
    options, _ = command.read_case(path)
    assert (options.checkpoint, options.models) == ("folder", ())


def test_the_failure_of_an_earlier_run_is_kept(tmp_path):
    earlier = command.save_failures(found(WRONG), tmp_path)
    later = command.save_failures(found(WRONG, WRONG), tmp_path)
    assert len({*earlier, *later}) == 3 == len(list(tmp_path.iterdir()))


def test_failures_without_a_case_are_not_saved(tmp_path):
    wrong = with_check(complete(), "bits", False, "RuntimeError: refused")
    tool = {"tool": "memcheck", "passed": False, "reason": "a leak"}
    assert command.save_failures(found(wrong, sanitizers=[tool]), tmp_path) == []


@pytest.mark.parametrize("text", ["no JSON", "{}", '{"subject": {}, "options": []}', None])
def test_a_file_without_a_case_is_refused(tmp_path, text):
    path = tmp_path / "case.json"
    if text is not None:
        path.write_text(text)
    result = verify("--replay", str(path))
    assert result.exit_code == command.BAD_INPUT
    assert f"error: replay leads to {path}, which cannot be used (" in result.stderr
    assert "Expected a case that jax-router verify saved; check the path." in result.stderr
