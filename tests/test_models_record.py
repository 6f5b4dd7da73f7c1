"""The record of routers in models has every test of them, passed, and none skipped."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import models_record
import pytest
from typer.testing import CliRunner

ROOT = models_record.ROOT
RECORDS = {path: json.loads(path.read_text()) for path in sorted(ROOT.glob("docs/results/models-*.json"))}
REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_nnx" name="test_a[cuda]">
<properties><property name="gpu" value="true"/></properties></testcase>
<testcase classname="tests.test_nnx" name="test_lowers[cuda]">
<properties><property name="seed" value="0"/></properties></testcase>
<testcase classname="tests.test_nnx" name="test_a[pallas]">
<properties><property name="gpu" value="true"/></properties><failure message="no"/></testcase>
<testcase classname="tests.test_nnx" name="test_b"><skipped message="why"/></testcase>
<testcase classname="tests.test_export" name="test_c"><error message="no"/></testcase>
</testsuite></testsuites>"""
# The files with GPU tests, and the kernels in their ids. A command takes the name of any implementation alike.
KERNELS_OF = dict.fromkeys(
    ("deepseek_v3", "export", "gpt_oss", "nnx", "nnx_lora", "nnx_lora_grad", "sharding"), ("cuda", "pallas")
) | {"gpt_oss_command": ("cuda",)}
SELECTING = re.compile("-[km]|--deselect")  # pytest's options that leave out tests


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


def lacking(tests: dict, gpu_tests: set[str]) -> list[str]:
    """What keeps it from showing that every test has passed, these GPU tests among them, and both kernels on a GPU."""
    selecting = [each for each in tests["arguments"] if SELECTING.match(each)]
    functions = {f"{Path(file).name}::{name}" for file in models_record.files() for name in test_functions(file)}
    functions -= {each.split("[")[0] for each in tests["passed"]}
    gpu_tests = gpu_tests - (set(tests["passed"]) & set(tests["on_gpu"]))
    kernels = {
        f"{file} with {kernel}"
        for file, kernels in KERNELS_OF.items()
        for kernel in kernels
        if not models_record.passed_on_gpu(tests, f"test_{file}.py", kernel)
    }
    return selecting + tests["failed"] + tests["skipped"] + sorted(functions | gpu_tests | kernels)


@pytest.fixture
def collected(request) -> set[str]:
    """The GPU tests of the recorded files that this session has collected; none of a file that it was not given."""
    ids = {item.nodeid for item in request.session.items if ("gpu", "true") in item.user_properties}
    return {each.removeprefix("tests/") for each in ids if each.split("::")[0] in models_record.files()}


def test_every_test_of_every_use_has_passed_on_a_gpu(collected) -> None:
    for tests in of_every("tests"):
        assert lacking(tests, collected) == [], "run python scripts/models_record.py --no-decode on a GPU"


def test_the_files_with_gpu_tests_are_those_whose_kernels_are_asked_for(collected) -> None:
    asked_for = {(f"test_{file}.py", kernel) for file, kernels in KERNELS_OF.items() for kernel in kernels}
    ids = [each.split("::", 1) for each in collected]
    assert {(file, kernel) for file, name in ids for kernel in ("cuda", "pallas") if kernel in name} <= asked_for
    assert {file for file, _ in ids} <= {file for file, _ in asked_for}


def test_a_record_that_leaves_something_out_is_refused() -> None:
    names = [f"{Path(file).name}::{name}" for file in models_record.files() for name in test_functions(file)]
    on_gpu = [f"test_{file}.py::test_a[{kernel}]" for file, kernels in KERNELS_OF.items() for kernel in kernels]
    tests = {"arguments": ["-n", "8", "--maxfail=1"], "failed": [], "skipped": []}
    tests |= {"passed": [*names, *on_gpu, "test_nnx.py::test_lowers[cuda]"], "on_gpu": on_gpu}
    assert lacking(tests, {on_gpu[0]}) == []
    for arguments in (["-k", "cuda"], ["-mgpu"], ["--deselect=tests/test_nnx.py"]):
        assert lacking(tests | {"arguments": arguments}, set()) == arguments[:1]
    for outcome in ("failed", "skipped"):
        assert lacking(tests | {outcome: ["test_nnx.py::test_b"]}, set()) == ["test_nnx.py::test_b"]
    assert lacking(tests | {"passed": tests["passed"][1:]}, set()) == names[:1]
    assert lacking(tests, {"test_nnx.py::test_a[cuda-1]"}) == ["test_nnx.py::test_a[cuda-1]"]
    assert lacking(tests, {"test_nnx.py::test_lowers[cuda]"}) == ["test_nnx.py::test_lowers[cuda]"]
    without_cuda = [each for each in on_gpu if each != "test_nnx.py::test_a[cuda]"]
    assert lacking(tests | {"on_gpu": without_cuda}, set()) == ["nnx with cuda"]
    assert lacking(tests | {"passed": [*names, *without_cuda]}, set()) == ["nnx with cuda"]


def test_decode_steps_are_of_the_whole_model() -> None:
    for rows in of_every("decode"):
        assert {row["implementation"] for row in rows if row["tokens_per_step"] == 1} >= {"xla", "cuda"}
        for row in rows:
            assert (row["config"]["num_hidden_layers"], row["config"]["hidden_size"]) == (24, 2880)
            assert row["rounds"] == len(row["blocks"]) >= 10


def test_every_page_is_that_of_its_record() -> None:
    for path, record in RECORDS.items():
        assert path.with_suffix(".md").read_text() == models_record.page(record)


def test_every_test_file_that_imports_the_layers_or_an_example_is_recorded() -> None:
    texts = {f"tests/{path.name}": path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    importing = re.compile("^from (jax_router[.]nnx|examples|nnx_cases|gpt_oss_cases)", re.MULTILINE)
    assert {file for file, text in texts.items() if importing.search(text)} <= set(models_record.files())


def test_a_failed_a_broken_and_a_skipped_test_are_told_apart_from_a_passed_one(tmp_path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert models_record.outcomes(tmp_path / "report.xml") == {
        "passed": ["test_nnx.py::test_a[cuda]", "test_nnx.py::test_lowers[cuda]"],
        "failed": ["test_export.py::test_c", "test_nnx.py::test_a[pallas]"],
        "skipped": ["test_nnx.py::test_b"],
        "on_gpu": ["test_nnx.py::test_a[cuda]", "test_nnx.py::test_a[pallas]"],
    }


def test_a_folder_that_is_missing_is_refused_before_anything_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(models_record, "run_tests", lambda _: pytest.fail("tests run"))
    result = CliRunner().invoke(models_record.app, [f"--output={tmp_path / 'missing'}"])
    assert result.exit_code == 2
    assert "--output" in result.output


def test_the_page_counts_what_the_record_has() -> None:
    facts = dict.fromkeys(("driver", "jax", "torch", "python", "nvcc")) | {"gpu": None, "date": "2026-11-27T00:00"}
    tests = {"provenance": facts | {"source_hash": "0" * 64}, "failed": [], "skipped": ["test_b.py::test_c"]}
    on_gpu = [
        "test_a.py::test_x[cuda-1]",
        "test_a.py::test_x[cuda-2]",
        "test_a.py::test_x[pallas]",
        "test_b.py::test_c",
    ]
    tests |= {"gpus": 1, "arguments": [], "on_gpu": on_gpu}
    tests["passed"] = [*on_gpu[:3], "test_a.py::test_lowers[cuda]", "test_a.py::test_y"]
    text = models_record.page({"tests": tests})
    assert "| test_a.py | 5 | 2 | 1 | 0 | 0 |" in text
    assert "| test_b.py | 0 | 0 | 0 | 0 | 1 |" in text
