"""The record of routers in models has every test of them, passed, and none skipped."""

from __future__ import annotations

import ast
import json
import math
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import models_record
import pytest
from typer.testing import CliRunner

from jax_router.provenance import gpu_name

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
NAMES = ("xla", "cuda", "pallas")
# The files with GPU tests, and the kernels in their ids. A command takes the name of any implementation alike.
KERNELS_OF = dict.fromkeys(
    ("deepseek_v3", "export", "gpt_oss", "nnx", "nnx_lora", "nnx_lora_grad", "sharding"), ("cuda", "pallas")
) | {"gpt_oss_command": ("cuda",)}
# Options of pytest that neither choose tests nor change what they do, with what each is followed by.
HARMLESS = r"-ra|-n[ =]?\w+|--dist[ =]\w+|-p[ =]?no:cacheprovider|--durations[ =]\d+|--maxfail[ =]\d+"


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


class Collected(NamedTuple):
    """Ids of tests of the recorded files that this session has collected; none of a file that it was not given."""

    tests: set[str]
    on_gpu: set[str]  # those of them that are GPU tests


NONE = Collected(set(), set())


def lacking(tests: dict, collected: Collected) -> list[str]:
    """What keeps it from showing that every test has passed, those collected among them, and both kernels on a GPU."""
    arguments = " ".join(tests["arguments"])
    selecting = [] if re.fullmatch(f"((?:{HARMLESS})(?: |$))*", arguments) else [arguments]
    passed = set(tests["passed"])
    functions = {f"{Path(file).name}::{name}" for file in models_record.files() for name in test_functions(file)}
    functions -= {each.split("[")[0] for each in passed}
    gpu_tests = collected.on_gpu - (passed & set(tests["on_gpu"]))
    kernels = {
        f"{file} with {kernel}"
        for file, kernels in KERNELS_OF.items()
        for kernel in kernels
        if not models_record.passed_on_gpu(tests, f"test_{file}.py", kernel)
    }
    left_out = functions | (collected.tests - passed) | gpu_tests | kernels
    return selecting + tests["failed"] + tests["skipped"] + sorted(left_out)


def of_other_gpus(path: Path, record: dict) -> list[str]:
    """The GPUs in a record, or their absence, that are not what its file is named after."""
    parts = [record[part] for part in ("tests",) if part in record] + record.get("decode", [])
    names = [part["provenance"]["gpu"] and gpu_name(part["provenance"]) for part in parts]
    return [str(name) for name in names if f"models-{name}" != path.stem]


def lacking_of_decode(rows: list[dict]) -> list[str]:
    """What keeps rows from being the decode steps of all of gpt-oss-20b, with every implementation, timed often."""
    expected = [(tokens, name) for tokens in models_record.BATCHES for name in models_record.IMPLEMENTATIONS]
    found = [(row["tokens_per_step"], row["implementation"]) for row in rows]
    lacking = [] if sorted(found) == sorted(expected) else [f"rows of {found}"]
    whole = {"num_hidden_layers": 24, "hidden_size": 2880, "num_local_experts": 32}
    for case, row in zip(found, rows, strict=True):
        lacking += [f"{case}: {name}" for name, value in whole.items() if row["config"][name] != value]
        lacking += [f"{case}: {name}" for name, least in (("context", 1024), ("steps", 50)) if row[name] < least]
        if row["rounds"] < 10 or len(row["blocks"]) != row["rounds"]:
            lacking.append(f"{case}: {len(row['blocks'])} blocks of {row['rounds']}")
        elif not math.isclose(statistics.median(row["blocks"]), row["ms_per_step"]["median"]):
            lacking.append(f"{case}: the median")
    return lacking


@pytest.fixture
def collected(request) -> Collected:
    items = [item for item in request.session.items if item.nodeid.split("::")[0] in models_record.files()]
    on_gpu = [item for item in items if ("gpu", "true") in item.user_properties]
    return Collected(*({item.nodeid.removeprefix("tests/") for item in each} for each in (items, on_gpu)))


def test_every_test_of_every_use_has_passed_on_a_gpu(collected) -> None:
    for tests in of_every("tests"):
        assert lacking(tests, collected) == [], "run python scripts/models_record.py --no-decode on a GPU"


def test_the_files_with_gpu_tests_are_those_whose_kernels_are_asked_for(collected) -> None:
    asked_for = {(f"test_{file}.py", kernel) for file, kernels in KERNELS_OF.items() for kernel in kernels}
    ids = [each.split("::", 1) for each in collected.on_gpu]
    assert {(file, kernel) for file, name in ids for kernel in ("cuda", "pallas") if kernel in name} <= asked_for
    assert {file for file, _ in ids} <= {file for file, _ in asked_for}


def test_a_record_that_leaves_something_out_is_refused() -> None:
    names = [f"{Path(file).name}::{name}" for file in models_record.files() for name in test_functions(file)]
    on_gpu = [f"test_{file}.py::test_a[{kernel}]" for file, kernels in KERNELS_OF.items() for kernel in kernels]
    tests = {"arguments": ["-n", "8", "--maxfail=1", "-p", "no:cacheprovider", "-ra"], "failed": [], "skipped": []}
    lowers, another = "test_nnx.py::test_lowers[cuda]", "test_nnx.py::test_a[cuda-1]"
    tests |= {"passed": [*names, *on_gpu, lowers], "on_gpu": on_gpu}
    assert lacking(tests, Collected({*names, lowers, on_gpu[0]}, {on_gpu[0]})) == []
    assert lacking(tests | {"arguments": []}, NONE) == []
    for arguments in (
        "-k cuda",
        "-mgpu",
        "--lf",
        "-n 8 -qk cuda",
        "--deselect=a",
        "@args",
        "-ra tests/test_nnx.py",
        "-x",
    ):
        assert lacking(tests | {"arguments": arguments.split()}, NONE) == [arguments]
    for outcome in ("failed", "skipped"):
        assert lacking(tests | {outcome: ["test_nnx.py::test_b"]}, NONE) == ["test_nnx.py::test_b"]
    assert lacking(tests | {"passed": tests["passed"][1:]}, NONE) == names[:1]
    assert lacking(tests, Collected({another}, set())) == [another]
    assert lacking(tests, Collected(set(), {lowers})) == [lowers]
    without_cuda = [each for each in on_gpu if each != "test_nnx.py::test_a[cuda]"]
    assert lacking(tests | {"on_gpu": without_cuda}, NONE) == ["nnx with cuda"]
    assert lacking(tests | {"passed": [*names, *without_cuda]}, NONE) == ["nnx with cuda"]


def test_every_record_is_of_the_gpu_that_it_is_named_after() -> None:
    for path, record in RECORDS.items():
        assert of_other_gpus(path, record) == []
    h200, cpu, path = {"provenance": {"gpu": "NVIDIA H200"}}, {"provenance": {"gpu": None}}, Path("models-h200.json")
    assert of_other_gpus(path, {"tests": h200, "decode": [h200, h200]}) == []
    assert of_other_gpus(path, {"tests": cpu, "decode": [h200, cpu]}) == ["None", "None"]
    assert of_other_gpus(Path("models-cpu.json"), {"tests": cpu}) == ["None"]
    assert of_other_gpus(Path("models-h100.json"), {"decode": [h200]}) == ["h200"]


def test_decode_steps_are_of_the_whole_model() -> None:
    for rows in of_every("decode"):
        assert lacking_of_decode(rows) == [], "run python scripts/models_record.py --no-tests on a GPU"


@pytest.mark.parametrize(
    ("changed", "lacks"),
    [
        ({"config": {"num_hidden_layers": 24, "hidden_size": 2880, "num_local_experts": 1}}, "num_local_experts"),
        ({"context": 1023}, "context"),
        ({"steps": 49}, "steps"),
        ({"rounds": 9, "blocks": [1.0] * 9}, "9 blocks of 9"),
        ({"blocks": [1.0] * 9}, "9 blocks of 10"),
        ({"blocks": [0.0] * 10}, "the median"),
    ],
)
def test_decode_steps_of_less_are_refused(changed, lacks) -> None:
    config = {"num_hidden_layers": 24, "hidden_size": 2880, "num_local_experts": 32}
    good = {"config": config, "context": 1024, "steps": 50, "rounds": 10, "blocks": [1.0] * 10}
    good |= {"ms_per_step": {"median": 1.0}}
    rows = [good | {"tokens_per_step": n, "implementation": name} for n in (1, 16, 64) for name in NAMES]
    assert lacking_of_decode(rows) == []
    assert lacking_of_decode(rows[:6])[0].startswith("rows of ")
    assert lacking_of_decode([rows[0] | changed, *rows[1:]]) == [f"(1, 'xla'): {lacks}"]


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


def test_a_folder_that_is_missing_is_refused_before_anything_runs(on_a_gpu, tmp_path) -> None:
    result = run(tmp_path / "missing")
    assert result.exit_code == 2
    assert "--output" in result.output


FACTS = dict.fromkeys(("driver", "jax", "torch", "python", "nvcc")) | {"date": "2026-11-27T00:00", "gpu": "NVIDIA H200"}
FACTS |= {"source_hash": "0" * 64}


@pytest.fixture
def on_a_gpu(monkeypatch) -> None:
    """A machine with one, where nothing that takes long may run."""
    monkeypatch.setattr(models_record, "provenance", lambda: FACTS)
    monkeypatch.setattr(models_record, "subprocess", SimpleNamespace(run=lambda *_, **__: pytest.fail("it runs")))


def run(output: Path, *arguments: str):
    return CliRunner().invoke(models_record.app, [f"--output={output}", *arguments])


def refused(result, pattern: str) -> None:
    """With one line."""
    assert result.exit_code == 2
    assert re.fullmatch(f"models_record: {pattern}\n", result.stderr)


def test_a_machine_without_a_gpu_no_part_and_a_broken_record_are_refused_in_a_line(
    on_a_gpu, tmp_path, monkeypatch
) -> None:
    refused(run(tmp_path, "--no-tests", "--no-decode"), "--no-tests and --no-decode: expected one of them at most.")
    for text, what in (('{"tests": ', "is no JSON: .*"), ("[]", "holds a list.*")):
        (tmp_path / "models-h200.json").write_text(text)
        refused(run(tmp_path), rf"\S*models-h200\.json {what} Expected a record; move it away\.")
    monkeypatch.setattr(models_record, "provenance", lambda: FACTS | {"gpu": None})
    refused(run(tmp_path), r"JAX has no GPU here\. A record is of one\.")


def ran(report: str):
    """`subprocess.run` of a pytest that writes a report."""

    def run(command: list[str], **_):
        [path] = [each.removeprefix("--junitxml=") for each in command if each.startswith("--junitxml=")]
        Path(path).write_text(report)
        return SimpleNamespace(returncode=0)

    return SimpleNamespace(run=run)


def test_nothing_is_recorded_where_no_test_ran(on_a_gpu, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(models_record, "subprocess", ran("<testsuites><testsuite/></testsuites>"))
    refused(run(tmp_path, "--no-decode"), "pytest ran no test: nothing is recorded.")
    assert not list(tmp_path.iterdir())


def test_the_tests_are_recorded_with_the_versions_of_what_they_compare_with(on_a_gpu, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(models_record, "subprocess", ran(REPORT))
    monkeypatch.setattr(models_record.importlib.metadata, "version", lambda package: f"1.2 of {package}")
    assert run(tmp_path, "--no-decode").exit_code == 1, "one failed"
    facts = json.loads((tmp_path / "models-h200.json").read_text())["tests"]["provenance"]
    assert facts == FACTS | {"flax": "1.2 of flax", "transformers": "1.2 of transformers"}
    assert "flax 1.2 of flax, transformers 1.2 of transformers" in (tmp_path / "models-h200.md").read_text()


def test_a_part_that_is_written_while_the_other_runs_is_kept(on_a_gpu, tmp_path, monkeypatch) -> None:
    decode = json.loads(max(RECORDS).read_text())["decode"]

    def run_tests(_) -> dict:
        (tmp_path / "models-h200.json").write_text(json.dumps({"decode": decode}))
        return {
            "provenance": FACTS,
            "gpus": 1,
            "passed": ["test_a.py::test_b"],
            "on_gpu": [],
            "failed": [],
            "skipped": [],
        }

    monkeypatch.setattr(models_record, "run_tests", run_tests)
    assert run(tmp_path, "--no-decode").exit_code == 0
    assert json.loads((tmp_path / "models-h200.json").read_text()).keys() == {"tests", "decode"}


@pytest.mark.parametrize("failing", [KeyboardInterrupt, None])
def test_decode_steps_that_were_done_are_kept_where_later_ones_fail(on_a_gpu, tmp_path, monkeypatch, failing) -> None:
    started = []
    spread = dict.fromkeys(("min", "quartile_1", "median", "quartile_3", "max"), 1.0)
    row = {"kind": "summary", "implementation": "xla", "context": 1, "steps": 1, "rounds": 1, "provenance": FACTS}
    row |= {"config": {"num_hidden_layers": 24, "hidden_size": 2880, "num_local_experts": 32}}
    row |= dict.fromkeys(("ms_per_step", "tokens_per_second", "ratio"), spread)
    row |= {"tokens_differing": 0, "sequences_differing": 0}

    def benchmark(command: list[str], **_):
        options = dict(each.removeprefix("--").split("=") for each in command if "=" in each)
        started.append(int(options["tokens"]))
        if started[-1] == 64:
            if failing is not None:
                raise failing
            return SimpleNamespace(returncode=2)
        rows = row | {"tokens_per_step": started[-1]}, {"kind": "block", "implementation": "xla", "ms_per_step": 2.0}
        Path(options["output"]).write_text("".join(json.dumps(each) + "\n" for each in rows))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(models_record, "subprocess", SimpleNamespace(run=benchmark))
    result = run(tmp_path, "--no-tests")
    if failing is None:
        refused(result, "decode steps of 64 tokens ended with 2: they are not recorded.")
    assert result.exit_code != 0
    rows = json.loads((tmp_path / "models-h200.json").read_text())["decode"]
    assert [(each["tokens_per_step"], each["blocks"]) for each in rows] == [(1, [2.0]), (16, [2.0])]
    assert started == [1, 16, 64]


def test_the_page_counts_what_the_record_has() -> None:
    tests = {"provenance": FACTS, "failed": [], "skipped": ["test_b.py::test_c"]}
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
