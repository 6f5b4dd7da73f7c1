"""What a record of the verification says, in the terminal and in markdown."""

from __future__ import annotations

import io
from typing import Any

import pytest
import synthetic_record
from synthetic_record import with_check

from jax_router.verification import gate, plan, report

pytest.importorskip("typer")

from rich.console import Console
from test_verification_command import WRONG, complete, found


def printed(record: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    report.print_record(console, record)
    return console.file.getvalue()


def test_the_report_shows_failures_and_what_was_not_run():
    not_run = with_check(complete(operation="route"), "memory", None, "XLA copies [here]")
    tools = [{"tool": "memcheck", "passed": False, "reason": "a leak"},
             {"tool": "racecheck", "passed": None, "reason": "is not installed"}]  # fmt: skip
    record = found(WRONG, not_run, not_run, sanitizers=tools, refused={"pallas": "needs jax 0.11"})
    for text in (printed(record), report.markdown(record)):
        assert "FAILED" in text
        assert "cuda 2880x128 +bias gpt-oss-120b, load: launch 7 is wrong under load, with 17 tokens" in text
        assert "tokens 17, data ties, seed 4, launch 2, row 5, expected 0x00000001, got 0x00000002" in text
        assert "compute-sanitizer memcheck: a leak" in text
        for count, reason in ((2, "memory: XLA copies [here]"), (1, "racecheck: is not installed")):
            assert f"({count}){':' * (text[0] == '|')} {reason}" in text
        assert "pallas: needs jax 0.11" in text
    assert report.totals(record) == {"launches": 3_000_000, "wrong": 1}
    assert "not run" not in report.markdown(found(complete()))
    assert "failed" not in printed(found(complete()))


def test_the_table_has_every_check():
    assert tuple(plan.CHECKS) == report.CHECKS
    assert set(gate.REQUIRED) <= set(plan.CHECKS)
    [row] = report.rows(found(synthetic_record.subject("route", models=["a", "b"])))
    assert len(row) == len(report.header())
    assert row[:3] == ["route", "cuda", "2880x128 +bias a and 1 more"]
    assert row[-2:] == ["1,000,240", "1,000,000"]
