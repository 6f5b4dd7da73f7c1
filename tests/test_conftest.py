"""A test that is skipped where there is a GPU is a failure that is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
TESTS = """
import pytest

def test_that_passes():
    pass

@pytest.mark.skip(reason="no reason")
def test_that_is_skipped():
    pass

@pytest.mark.gpu
def test_that_needs_a_gpu():
    pass

def test_that_asks_for_the_gpu(gpu):
    pass
"""


def run(folder: Path, has_gpu: bool, *arguments: str) -> subprocess.CompletedProcess[str]:
    fake = f"def has_gpu(): return {has_gpu}\n@pytest.fixture\ndef gpu(): return None\n"
    (folder / "conftest.py").write_text(f"{CONFTEST.read_text()}\n{fake}")
    (folder / "test_some.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.parametrize("arguments", [(), ("-n1",)], ids=["one process", "xdist"])
def test_a_skip_where_there_is_a_gpu_is_a_failure_that_is_named_and_gpu_tests_are_reported_as_such(
    tmp_path, arguments
) -> None:
    finished = run(tmp_path, True, "--junitxml=report.xml", *arguments)
    assert finished.returncode == pytest.ExitCode.TESTS_FAILED, finished.stdout
    _, _, summary = finished.stdout.partition("skipped although there is a GPU: this counts as failure")
    assert "test_some.py::test_that_is_skipped" in summary
    assert "test_that_needs_a_gpu" not in summary
    reported = ET.parse(tmp_path / "report.xml").findall(".//property[@name='gpu']/../..")
    assert {each.attrib["name"] for each in reported} == {"test_that_needs_a_gpu", "test_that_asks_for_the_gpu"}


def test_without_a_gpu_its_tests_are_skipped_with_the_reason(tmp_path) -> None:
    finished = run(tmp_path, False)
    assert finished.returncode == pytest.ExitCode.OK, finished.stdout
    assert "1 passed, 3 skipped" in finished.stdout
    assert "needs a GPU, JAX has" in finished.stdout


def test_no_skip_no_failure(tmp_path) -> None:
    finished = run(tmp_path, True, "-k", "passes or gpu")
    assert finished.returncode == pytest.ExitCode.OK, finished.stdout
    assert "3 passed" in finished.stdout
