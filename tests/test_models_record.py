"""The record of routers in models has every test of them, passed, and none skipped."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import models_record

ROOT = models_record.ROOT
RECORDS = {path: json.loads(path.read_text()) for path in sorted(ROOT.glob("docs/results/models-*.json"))}
REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_nnx" name="test_a[cuda]"/>
<testcase classname="tests.test_nnx" name="test_a[pallas]"><failure message="no"/></testcase>
<testcase classname="tests.test_nnx" name="test_b"><skipped message="why"/></testcase>
<testcase classname="tests.test_export" name="test_c"><error message="no"/></testcase>
</testsuite></testsuites>"""


def test_functions(file: str) -> set[str]:
    """The names of the tests in a file, from its text: nothing is imported, so nothing is skipped."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


test_functions.__test__ = False  # type: ignore[attr-defined]


def of_every(part: str) -> list:
    """That part of every record that has it."""
    found = [record[part] for record in RECORDS.values() if part in record]
    assert found, f"no record of {part}: run python scripts/models_record.py on a GPU and commit what it writes"
    return found


def test_every_test_of_every_use_has_passed_on_a_gpu() -> None:
    for tests in of_every("tests"):
        assert (tests["failed"], tests["skipped"]) == ([], [])
        passed = {each.split("[")[0] for each in tests["passed"]}
        present = {f"{Path(file).name}::{name}" for file in models_record.files() for name in test_functions(file)}
        assert present - passed == set(), "these are not in the record: run python scripts/models_record.py --no-decode"
        for kernel in ("cuda", "pallas"):
            assert any(kernel in each for each in tests["passed"])


def test_decode_steps_are_of_the_whole_model() -> None:
    for rows in of_every("decode"):
        assert {row["implementation"] for row in rows if row["tokens_per_step"] == 1} >= {"xla", "cuda"}
        for row in rows:
            assert (row["config"]["num_hidden_layers"], row["config"]["hidden_size"]) == (24, 2880)
            assert row["rounds"] == len(row["blocks"]) >= 10


def test_every_page_is_that_of_its_record() -> None:
    for path, record in RECORDS.items():
        assert path.with_suffix(".md").read_text() == models_record.page(record)


def test_a_failed_a_broken_and_a_skipped_test_are_told_apart_from_a_passed_one(tmp_path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert models_record.outcomes(tmp_path / "report.xml") == {
        "passed": ["test_nnx.py::test_a[cuda]"],
        "failed": ["test_export.py::test_c", "test_nnx.py::test_a[pallas]"],
        "skipped": ["test_nnx.py::test_b"],
    }


def test_the_page_counts_what_the_record_has() -> None:
    facts = dict.fromkeys(("driver", "jax", "torch", "python", "nvcc")) | {"gpu": None, "date": "2026-11-27T00:00"}
    tests = {"provenance": facts | {"source_hash": "0" * 64}, "failed": [], "skipped": ["test_b.py::test_c"]}
    tests["gpus"], tests["passed"] = 1, ["test_a.py::test_x[cuda-1]", "test_a.py::test_x[pallas]", "test_a.py::test_y"]
    text = models_record.page({"tests": tests})
    assert "| test_a.py | 3 | 1 | 1 | 0 | 0 |" in text
    assert "| test_b.py | 0 | 0 | 0 | 0 | 1 |" in text
