"""Whatever becomes of the process that verifies, the record says so, and what can go on goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
from synthetic_rows import PROVENANCE

from jax_router.verification import Verification, supervisor
from jax_router.verification.plan import Options
from jax_router.verification.supervisor import RefusedError, supervise

# Workers of a test: each is given the request and emits what the real one would.
HEAD = """
import json, os, signal, subprocess, sys, time
request = json.load(sys.stdin)
skip = request["skip"]

def emit(event, **facts):
    print(json.dumps({"event": event, **facts}), flush=True)

def begin(count=2):
    emit("begin", provenance=PROVENANCE, library=None, refused={}, subjects=[{"name": i} for i in range(count)])

def check(subject, name="accuracy", tokens=None, passed=True):
    emit("check", subject=subject, check=name)
    if tokens is not None:
        emit("case", tokens=tokens, data="normal")
    if passed is not None:
        emit("result", subject=subject, check=name, passed=passed, launches=5, seconds=1.0, figures={}, reason=None,
             failure=None)

def whole(subject):
    check(subject)
    emit("done", subject=subject)
"""


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch):
    def put(body: str) -> None:
        script = HEAD.replace("PROVENANCE", repr(PROVENANCE)) + body
        monkeypatch.setattr(supervisor, "WORKER", (sys.executable, "-S", "-c", script))

    return put


def outcomes(record: dict[str, Any]) -> list[list[tuple[str, bool | None]]]:
    return [[(check["check"], check["passed"]) for check in subject["checks"]] for subject in record["subjects"]]


def test_a_record_holds_what_the_worker_says(worker):
    worker("""
begin()
whole(0)
check(1)
check(1, "bits", passed=False)
emit("alive", launches=3)
emit("done", subject=1)
emit("end")
""")
    events = []
    record = supervise(Options(seed=3), events.append)
    assert outcomes(record) == [[("accuracy", True)], [("accuracy", True), ("bits", False)]]
    assert [(each["name"], each["complete"], each["passed"], each["launches"]) for each in record["subjects"]] == [
        (0, True, True, 5), (1, True, False, 10)
    ]  # fmt: skip
    assert record["provenance"] == PROVENANCE
    assert {subject["date"] for subject in record["subjects"]} == {PROVENANCE["date"]}
    assert record["options"]["seed"] == 3
    assert not record["interrupted"]
    assert [event["event"] for event in events if event["event"] in ("begin", "done", "alive", "end")] == [
        "begin", "done", "alive", "done", "end"
    ]  # fmt: skip
    assert not Verification(record).passed


@pytest.mark.parametrize(
    ("end", "reason", "got"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended with signal SIGSEGV", "ended with signal SIGSEGV:"),
        ("print('CUDA error: an illegal address', file=sys.stderr); sys.exit(3)",
         "ended with status 3:\nCUDA error: an illegal address", "ended with status 3:"),
        ("time.sleep(60)", "hung: no sign of life for 2 s", "hung: no sign of life for 2 s"),
        ("print('no JSON', flush=True)", "said what is no event: 'no JSON\\n'", "said what is no event: 'no JSON\\n'"),
        ("print(7, flush=True)", "said what is no event: '7\\n'", "said what is no event: '7\\n'"),
        ("emit('refused', reason='a bad shape')", "was refused: a bad shape", "was refused: a bad shape"),
    ],
)  # fmt: skip
def test_a_worker_that_dies_in_a_check_fails_it_and_another_goes_on(worker, end, reason, got):
    worker(f"""
begin()
if skip == 0:
    check(0)
    check(0, "bits", tokens=17, passed=None)
    {end}
else:
    whole(1)
    emit("end")
""")
    record = supervise(Options(seed=3), hang_seconds=2.0 if "hung" in reason else 60.0)
    assert outcomes(record) == [[("accuracy", True), ("bits", False)], [("accuracy", True)]]
    failed = record["subjects"][0]["checks"][1]
    assert failed["reason"].startswith(reason)
    assert failed["failure"] == {
        "tokens": 17, "data": "normal", "seed": 3, "launch": 0, "row": None, "expected": "an end", "got": got
    }  # fmt: skip
    assert [subject["passed"] for subject in record["subjects"]] == [False, True]
    assert all(subject["complete"] for subject in record["subjects"])


def test_a_case_of_the_check_before_is_not_that_of_the_failure(worker):
    worker("""
begin(1)
check(0, "accuracy", tokens=9)
check(0, "bits", passed=None)
sys.exit(1)
""")
    record = supervise(Options())
    assert record["subjects"][0]["checks"][1]["failure"] is None


def test_a_worker_that_dies_before_it_begins_is_an_error_with_what_it_said(worker):
    worker("print('no such module', file=sys.stderr); sys.exit(1)")
    with pytest.raises(RuntimeError, match="ended before its first check: ended with status 1:\nno such module"):
        supervise(Options())


def test_a_worker_that_dies_after_it_began_fails_the_first_check(worker):
    worker("begin(); sys.exit(1)")
    record = supervise(Options(checks=("memory", "bits")))
    assert outcomes(record) == [[("bits", False)], []]
    assert "the process that was to go on ended with status 1" in record["subjects"][0]["checks"][0]["reason"]
    assert record["sanitizers"] == []


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ("sys.exit(1)", "ended with status 1"),
        ("emit('refused', reason='there is no GPU')", "was refused: there is no GPU"),
        ("begin(1); whole(0)", "finds other subjects, 1 of them"),
    ],
)
def test_a_gpu_that_is_lost_with_a_worker_loses_no_record(worker, second, words):
    worker(f"""
if skip == 0:
    begin()
    check(0, tokens=1, passed=None)
    sys.exit(1)
{second}
""")
    record = supervise(Options())
    assert outcomes(record) == [[("accuracy", False)], [("accuracy", False)]]
    reason = record["subjects"][1]["checks"][0]["reason"]
    assert f"the process that was to go on {words}" in reason
    assert [subject["complete"] for subject in record["subjects"]] == [True, False]
    assert not any(subject["passed"] for subject in record["subjects"])


def test_what_is_refused_is_an_error_of_the_caller(worker):
    worker("emit('alive', launches=0); emit('refused', reason='nothing can be verified here: xla is slow')")
    with pytest.raises(RefusedError, match="nothing can be verified here: xla is slow"):
        supervise(Options())


def test_sanitizers_come_last_and_die_alone(worker):
    worker("""
begin(1)
whole(0)
emit("check", subject=None, check="sanitizers")
emit("result", subject=None, check="memcheck", passed=True, launches=1, seconds=1.0, figures={}, reason=None,
     failure=None)
sys.exit(1)
""")
    record = supervise(Options(sanitizers=True))
    assert outcomes(record) == [[("accuracy", True)]]
    assert [(tool["tool"], tool["passed"]) for tool in record["sanitizers"]] == [
        ("memcheck", True), ("sanitizers", False)
    ]  # fmt: skip
    assert not Verification(record).passed


def test_ctrl_c_keeps_what_is_there_and_ends_the_worker_with_its_children(worker):
    worker("""
begin()
check(0)
with open("/proc/self/comm", "wb") as name:
    name.write("verification-日本".encode())  # of which 15 bytes are kept, which are no UTF-8
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
children = [subprocess.Popen(["sleep", "60"], process_group=group, **quiet) for group in (None, 0)]
for child in children:
    emit("alive", launches=child.pid)
time.sleep(60)
""")
    found: list[int] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "alive":
            found.append(event["launches"])
        if len(found) == 2:
            raise KeyboardInterrupt

    record = supervise(Options(), on_event)
    assert record["interrupted"]
    assert outcomes(record) == [[("accuracy", True)], []]
    assert [subject["complete"] for subject in record["subjects"]] == [False, False]
    assert not Verification(record).passed
    deadline = time.monotonic() + 10
    while any(map(_runs, found)):
        assert time.monotonic() < deadline, "a child of the worker still runs"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # nobody may be there to take its status
    except OSError:
        return False


@pytest.mark.parametrize(("given", "seen"), [(None, "false"), ("true", "true")])
def test_the_worker_leaves_the_gpus_memory_to_others_unless_told(worker, monkeypatch, given, seen):
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    worker(f"emit('refused', reason=os.environ[{name!r}])")
    with pytest.raises(RefusedError, match=seen):
        supervise(Options())


def test_the_request_has_the_options_and_the_time_that_is_left(worker):
    worker("emit('refused', reason=json.dumps(request))")
    with pytest.raises(RefusedError) as refused:
        supervise(Options(models=("gpt-oss-120b",), minutes=2.0))
    request = json.loads(str(refused.value))
    assert Options.of(request["options"]) == Options(models=("gpt-oss-120b",), minutes=2.0)
    assert request["skip"] == 0
    assert 1.9 < request["minutes"] <= 2.0


def test_what_compiling_says_is_passed_on(worker, capfd):
    worker("""
print("jax_router: compiling the kernels", file=sys.stderr)
print("something else", file=sys.stderr)
emit("refused", reason="that was all")
""")
    with pytest.raises(RefusedError):
        supervise(Options())
    assert capfd.readouterr().err == "jax_router: compiling the kernels\n"


def test_the_real_worker_is_a_module_that_reads_a_request(tmp_path):
    request = {"options": {"checkpoint": str(tmp_path)}, "skip": 0}
    with subprocess.Popen(supervisor.WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        output, _ = process.communicate(json.dumps(request).encode())
    events = [json.loads(line) for line in output.splitlines()]
    assert [event["event"] for event in events] == ["alive", "refused"]
    assert str(tmp_path) in events[1]["reason"]
