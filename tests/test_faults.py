"""The kernels broken on purpose are still the shipped kernels but for what their fault names.

Compiled with compilers that are shell scripts (test_build.py): what nvcc and a GPU say of them is measured elsewhere.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
from test_build import FakeCompilers
from typer.testing import CliRunner

import jax_router as jr
from jax_router import build

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import fault_list_float32
import faults
from fault_list import CHECKS, FAULTS, Edit, Fault

CSRC = build.csrc_directory()
UNITS = [path for path in build.source_files() if path.suffix in (".cu", ".cc")]


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    fake = FakeCompilers(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(fake.folder))
    monkeypatch.setenv("CXX", str(fake.folder / "g++"))
    return fake


def fault(name: str) -> Fault:
    return faults.named([name])[0]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_applies_to_the_present_sources_and_changes_what_it_names(fault, tmp_path):
    faults.apply(fault, CSRC, tmp_path / "broken")
    shipped = {path.name: path.read_bytes() for path in CSRC.iterdir() if path.is_file()}
    broken = {path.name: path.read_bytes() for path in (tmp_path / "broken").iterdir()}
    assert broken.keys() == shipped.keys()
    changed = {name for name, text in broken.items() if text != shipped[name]}
    assert changed == {edit.file for edit in fault.edits}
    assert changed <= {path.name for path in build.source_files()}
    compiled = {path.name for unit in UNITS for path in faults.compiled_from(unit)}
    assert changed <= compiled, "what is changed is part of no library"


def test_faults_have_names_of_their_own_and_say_what_must_see_them():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for each in FAULTS:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", each.name)
        assert each.seen_by
        assert set(each.seen_by) <= set(CHECKS)
        assert each.operations
        assert set(each.operations) <= {"router_gemm", "route"}
        assert each.tokens
        assert each.shapes
        assert all(shape in jr.models or re.fullmatch(r"\d+x\d+", shape) for shape in each.shapes)


def test_some_faults_are_in_the_kernel_for_float32_weights_alone():
    kernels = [{edit.file for edit in each.edits} for each in FAULTS]
    assert {"sm90_float32.cuh"} in kernels
    assert {"sm90_router_gemm_float32.cu"} in kernels
    assert set(fault_list_float32.FILES) == {path.name for path in build.source_files() if "float32" in path.name}


def test_parity_tests_miss_the_faults_this_is_about():
    for name in ("obsolete-barrier", "weights-before-wait", "trigger-before-store"):
        assert fault(name).missed_by_parity


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (Edit("sm90_route.cuh", "no such text", ""), 0),
        (Edit("no_such_file.cu", "#pragma once", ""), 0),
        (Edit("sm90_route.cuh", "spec.round_logits", "1", count=2), 1),
        (Edit("sm90_sum_parts.cu", "load_bias<Element>", "0"), 4),
    ],
)
def test_an_edit_that_no_longer_applies_names_fault_file_and_text(edit, found, tmp_path):
    broken = dataclasses.replace(fault("rounded-logits"), name="gone-stale", edits=(edit,))
    with pytest.raises(faults.FaultError) as failure:
        faults.apply(broken, CSRC, tmp_path / "broken")
    message = str(failure.value)
    assert message.startswith("fault gone-stale of scripts/fault_list.py no longer applies: ")
    assert f": {edit.file} in {CSRC} has the text below {found} times. " in message
    assert f"Expected {edit.count}; bring the edit up to date" in message
    assert message.endswith(edit.old)
    assert not (tmp_path / "broken").exists()


def test_a_unit_is_compiled_from_its_headers_and_theirs():
    names = {path.name for path in faults.compiled_from(CSRC / "sm90_sum_parts.cu")}
    assert {"sm90_sum_parts.cu", "sm90_sum_parts.cuh", "sm90_primitives.cuh", "reduction_tree.cuh"} <= names
    assert not names & {"sm90_route.cuh", "sm90_wgmma.cuh"}


def test_only_what_a_fault_changes_is_compiled_for_it(compilers, tmp_path):
    wanted = [fault("rounded-logits"), fault("arrival-order")]
    compilers.says.write_text("ffi.cc:7:1: warning: unused parameter\n")
    built = list(faults.build_libraries(wanted, tmp_path / "libraries"))
    assert [(each, path.name) for each, path, _ in built] == [(each, f"{each.name}.so") for each in wanted]
    assert all(path.read_bytes() == b"a library" for _, path, _ in built)
    assert all(len(warned) == len(UNITS) + 1 for _, _, warned in built), "of objects compiled for another fault too"
    # Those who include the header of routing twice, broken and not, and the few-token kernel.
    routing = {unit.name for unit in UNITS if CSRC / "sm90_route.cuh" in faults.compiled_from(unit)}
    assert routing == {"route.cu", "sm90_route_fused.cu", "sm90_route_select.cu"}
    assert len(compilers.calls()) == len(UNITS) + len(routing) + 1 + len(wanted)
    assert len(compilers.calls()) - compilers.links() == len(list((tmp_path / "libraries" / "objects").glob("*.o")))

    list(faults.build_libraries(wanted, tmp_path / "libraries"))
    assert compilers.links() == 2 * len(wanted)
    assert len(compilers.calls()) == len(UNITS) + len(routing) + 1 + 2 * len(wanted)


def test_a_faulty_library_is_compiled_as_the_shipped_one_is(compilers, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ROUTER_CACHE", str(tmp_path / "cache"))
    build.build()
    shipped = compilers.calls()
    list(faults.build_libraries([fault("rounded-logits")], tmp_path / "libraries"))
    broken = compilers.calls()[len(shipped) :]

    def options(calls: list[str]) -> list[list[str]]:
        return sorted([word for word in call.split() if word.startswith("-")] for call in calls)

    assert len(broken) == len(UNITS) + 1
    assert options(broken) == options(shipped)


def test_a_fault_that_does_not_compile_is_named(compilers, tmp_path):
    compilers.says.write_text("error: no such function\n")
    with pytest.raises(faults.FaultError, match=r"fault rounded-logits does not compile; mend its edits") as failure:
        list(faults.build_libraries([fault("rounded-logits")], tmp_path / "libraries"))
    assert "no such function" in str(failure.value)
    assert not list((tmp_path / "libraries").glob("**/*.so"))
    assert not list((tmp_path / "libraries").glob("**/*.o"))


def test_the_command_lists_and_builds(compilers, tmp_path):
    listed = CliRunner().invoke(faults.app, ["list"])
    assert listed.exit_code == 0
    assert all(f"{each.name}: {each.what}" in listed.output for each in FAULTS)
    built = CliRunner().invoke(faults.app, ["build", "--output", str(tmp_path / "libraries"), "rounded-logits"])
    assert built.exit_code == 0, built.output
    assert "rounded-logits.so, 0 warnings" in built.output
    assert (tmp_path / "libraries" / "rounded-logits.so").read_bytes() == b"a library"


def test_an_unknown_fault_is_refused_with_the_known_ones(tmp_path):
    result = CliRunner().invoke(faults.app, ["build", "--output", str(tmp_path), "rounded-logit"])
    assert result.exit_code == 1
    assert "NAME is rounded-logit. Expected some of obsolete-barrier, " in result.output
    assert "see python scripts/faults.py list" in result.output
