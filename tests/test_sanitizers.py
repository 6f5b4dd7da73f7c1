"""Which compute-sanitizer runs, and what is made of what it says. Shell scripts stand for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from jax_router import build, toolchain
from jax_router.verification import report, sanitizers
from jax_router.verification.result import Result

SAID = "NVIDIA (R) Compute Sanitizer\nVersion {} (build 1) (public-release)"
RACES = """========= Warning: Race reported between Write access at barrier_init and Read access at barrier_arrive
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
checked 4 cases, 9 launches"""
CLEAN = """checked 4 cases, 9 launches
routed 2 cases, 5 launches
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"""
OLD, NEW = (sanitizers.Sanitizer(Path("compute-sanitizer"), version) for version in ("2025.3.1.0", "2026.4.0.0"))


def run(tool: Path, name: str, seconds: float) -> Result:
    sanitizer = sanitizers.Sanitizer(tool, "2026.4.0.0")
    alive: list[int] = []
    result = sanitizers._run(sanitizer, name, Path("program"), seconds, alive.append, threading.Event())
    assert alive
    return result


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("said", "status", "passed"),
    [
        (CLEAN, 0, True),
        ("usage", 0, None),
        ("========= Invalid __global__ read of size 4", 9, False),
        ("checked 4 cases, 9 launches\n========= ERROR SUMMARY: 2 errors", 0, False),
        ("FAILED bits differ", 1, False),
        ("check.cu:7: cudaDeviceSynchronize() failed: an illegal memory access", 2, False),
        ("========= Error: attaching failed: no device", 1, None),  # of the tool itself, so of no kernel
    ],
)
def test_a_sanitizer_passes_what_it_saw(tmp_path, said, status, passed):
    tool = script(tmp_path / "compute-sanitizer", f"cat <<'END'\n{said}\nEND\nexit {status}")
    result = run(tool, "memcheck", 60.0)
    assert result.passed is passed
    assert result.passed or said.splitlines()[-1] in result.reason
    assert result.launches == (14 if passed else 9 if "9 launches" in said else 0)
    text = report.markdown(
        {"subjects": [], "provenance": {"gpu": "G", "date": "2026", "source_hash": "a"},
         "sanitizers": [{"tool": "memcheck", "passed": result.passed, "reason": "", "figures": result.figures}]}
    )  # fmt: skip
    assert "compute-sanitizer 2026.4.0.0 memcheck: " in text


def test_the_record_says_that_racecheck_ran_on_an_edited_copy(tmp_path):
    result = run(script(tmp_path / "compute-sanitizer", f"echo '{CLEAN}'"), "racecheck", 60.0)
    tool = {"tool": "racecheck", "passed": result.passed, "reason": None, "figures": result.figures}
    record = {"subjects": [], "provenance": {"gpu": "G", "date": "2026", "source_hash": "a"}, "sanitizers": [tool]}
    assert "racecheck (edited sm90_router_gemm_many_tokens.cu): ok." in report.markdown(record)


def test_races_that_an_old_racecheck_reports_say_nothing():
    assert sanitizers.judge(OLD, "racecheck", 0, CLEAN) == (True, None)
    for status in (None, 0, 1, sanitizers.FOUND):
        passed, reason = sanitizers.judge(OLD, "racecheck", status, RACES)
        assert passed is None
        assert 'may take barriers for races, as 2025.3 does. Run pip install "nvidia-cuda-sanitizer-api' in reason
        assert sanitizers.judge(NEW, "racecheck", status, RACES)[0] is False
        assert sanitizers.judge(OLD, "synccheck", status, RACES)[0] is False
        assert sanitizers.judge(OLD, "racecheck", status, f"{RACES}\nFAILED bits differ")[0] is False


def test_what_the_program_says_counts_too_when_it_was_ended():
    assert sanitizers.judge(NEW, "memcheck", None, "FAILED bits differ")[0] is False


def test_the_newest_one_that_runs_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    places = [tmp_path / name / "compute-sanitizer" for name in ("path", "toolkit", "cu13/bin", "cu12/bin")]
    monkeypatch.setattr(toolchain, "wheel_toolkits", lambda: [tmp_path / "cu13", tmp_path / "cu12"])
    toolkit = toolchain.Compiler(tmp_path / "toolkit/nvcc", "PATH", "", "13.0", tmp_path, "", ())
    monkeypatch.setattr(toolchain, "find_compiler", lambda: toolkit)
    assert sanitizers.find_sanitizer() is None
    assert [result.passed for result in sanitizers.check_sanitizers(lambda _: None)] == [None] * 4
    versions = ("2025.3.1.0", "2025.10.0.0", "2026.4.0.0", "2025.9.0.0")
    for number, (place, version) in enumerate(zip(places, versions, strict=True)):
        script(place, f"echo '{SAID.format(version)}'")
        found = sanitizers.find_sanitizer()
        assert found is not None
        assert found.path == places[min(number, 2)]
    script(places[2], "echo no driver >&2; exit 1")
    assert sanitizers.find_sanitizer() == sanitizers.Sanitizer(places[1], "2025.10.0.0")


@pytest.mark.parametrize(("said", "passed"), [("", None), ("========= COMPUTE-SANITIZER", None), (RACES, False)])
def test_one_that_takes_too_long_is_ended_with_its_program_and_what_it_had_reported_counts(tmp_path, said, passed):
    text = f"cat <<'END'\n{said}\nEND\n(sleep 1.5; touch {tmp_path}/ended) & wait"
    result = run(script(tmp_path / "compute-sanitizer", text), "racecheck", 0.5)
    assert result.passed is passed
    assert ("Race reported" if passed is False else "was ended before it came to its end") in result.reason
    time.sleep(1.5)
    assert not (tmp_path / "ended").exists()


def test_all_that_run_are_ended_when_nobody_wants_to_know(tmp_path, monkeypatch):
    tool = script(tmp_path / "compute-sanitizer", f'[ "$2" = memcheck ] && echo "{CLEAN}" || sleep 60')
    monkeypatch.setattr(sanitizers, "find_sanitizer", lambda: sanitizers.Sanitizer(tool, "2026.4.0.0"))
    monkeypatch.setattr(sanitizers, "build_program", lambda *_: Path("program"))
    started = time.monotonic()
    results = sanitizers.check_sanitizers(lambda _: None)
    assert next(results).passed
    results.close()
    assert time.monotonic() - started < 30


def test_racecheck_gets_a_copy_that_waits_early_and_the_others_what_is_shipped(tmp_path, monkeypatch):
    ran = {}

    def build_program(csrc):
        return csrc / file

    def run(_, tool, program, *__):
        ran[tool] = program.read_text()
        return Result(tool, True, 1)

    file = sanitizers.WAITS_EARLY[0].file
    monkeypatch.setattr(sanitizers, "find_sanitizer", lambda: NEW)
    monkeypatch.setattr(sanitizers, "build_program", build_program)
    monkeypatch.setattr(sanitizers, "_run", run)
    assert all(result.passed for result in sanitizers.check_sanitizers(lambda _: None))
    shipped = (build.csrc_directory() / file).read_text()
    waits = [edit.new for edit in sanitizers.WAITS_EARLY]
    assert {tool: text == shipped for tool, text in ran.items()} == {
        "memcheck": True, "synccheck": True, "initcheck": True, "racecheck": False,
    }  # fmt: skip
    assert all(text in ran["racecheck"] for text in waits)
    assert len(ran["racecheck"].splitlines()) == len(shipped.splitlines())  # so that reports name the shipped lines

    broken = tmp_path / "csrc"
    broken.mkdir()
    (broken / file).write_text(shipped.replace("shared.cluster_sum.arrive(log2_tiles);", ""))
    results = list(sanitizers.check_sanitizers(lambda _: None, csrc=broken))
    assert [result.passed for result in results] == [True, True, True, None]
    assert f"{file} in {broken} has the text below 0 times" in results[3].reason
