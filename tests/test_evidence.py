"""What is measured and recorded in this repository was measured on these very sources."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from jax_router import build, provenance, tables
from jax_router.verification import gate, standing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import fault_table
import fault_trials

ROOT = Path(__file__).resolve().parent.parent
TABLES = sorted(ROOT.glob("jax_router/tables/*.json"))
RECORDS = sorted([*ROOT.glob("docs/results/**/*.json*"), *TABLES])


def test_there_are_records():
    assert RECORDS, (
        "no record in docs/results or jax_router/tables. Run the sweep on an H100 or H200 and commit what it writes: "
        "jax-router sweep --suite headline --write-table"
    )


def test_every_record_was_measured_on_these_sources():
    assert provenance.stale_records(RECORDS) == {}, "the kernels changed after the measurement: repeat it on a GPU"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_every_table_accepts_what_its_verification_of_these_sources_proves(path):
    document = json.loads(path.read_text())
    gpu, found = document["gpu"], document.get("verification")
    known = standing.judge(gpu, tables.Table.parse(document, path.name), None, source_hash=provenance.source_hash())
    distrusted = [f"{name} {each}" for (_, name, _), each in known.items() if each.distrusted]
    assert not distrusted, "verify there, commit the record, then jax-router sweep --resume ROWS_FILE --write-table"
    record = gate.read_record(ROOT / "docs/results" / found["record"])
    facts = ("gpu", "date", "source_hash")
    assert [record["provenance"][name] for name in facts] == [found[name] for name in facts]
    for entry in document["entries"]:
        for name, candidate in entry["candidates"].items():
            subject = {**entry, "implementation": name}
            why = gate.why_unverified(record, subject, source_hash=document["source_hash"], gpu=gpu)
            assert candidate["verified"] == (why is None), (gate.label(subject), name, why)


def test_every_record_of_broken_kernels_has_every_fault_as_it_is():
    records = {path.name: json.loads(path.read_text()) for path in sorted(ROOT.glob("docs/results/faults-*.json"))}
    assert records
    found = {name: set(fault_trials.lacks(record)) for name, record in records.items()}
    # The parity tests are there to be seen to miss a fault: on one GPU is enough.
    elsewhere = {lack for each in found.values() for lack in each if lack.endswith(": no parity tests")}
    elsewhere -= set.intersection(*found.values())
    assert all(lack <= elsewhere for lack in found.values()), f"measure them, python scripts/fault_trials.py: {found}"
    wrong = [name for name, record in records.items() if not fault_table.as_it_should_be(record)]
    assert wrong == [], "a fault was not caught in every trial, or the parity tests see one that they should miss"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("table.json", {"source_hash": "0" * 64, "entries": []}, "measured on sources 000000000000"),
        ("nested.json", [{"provenance": {"source_hash": "0" * 64}}], "measured on sources 000000000000"),
        ("hashless.json", {"entries": [{"tokens": 1}]}, "no source_hash"),
    ],
)
def test_stale_record_is_detected(tmp_path, name, content, reason):
    record = tmp_path / name
    record.write_text(json.dumps(content))
    assert reason in provenance.stale_records([record])[record]


def test_one_stale_row_makes_a_file_of_rows_stale(tmp_path):
    rows = [{"provenance": {"source_hash": provenance.source_hash()}}, {"provenance": {"source_hash": "f" * 64}}]
    record = tmp_path / "rows.jsonl"
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "ffffffffffff" in provenance.stale_records([record])[record]
    record.write_text(json.dumps(rows[0]) + "\n")
    assert provenance.stale_records([record]) == {}


def test_every_change_of_the_kernels_changes_the_hash(tmp_path, monkeypatch):
    sources = tmp_path / "csrc"
    shutil.copytree(build.csrc_directory(), sources)
    monkeypatch.setattr(build, "csrc_directory", lambda: sources)
    hashes = [provenance.source_hash()]
    for name in ("router_gemm.h", "ffi.cc", sorted(sources.glob("*.cu"))[0].name):
        path = sources / name
        path.write_bytes(path.read_bytes() + b"\n")
        hashes.append(provenance.source_hash())
    (sources / "router_gemm.h").rename(sources / "renamed.h")
    hashes.append(provenance.source_hash())
    monkeypatch.setattr(build, "NVCC_FLAGS", (*build.NVCC_FLAGS, "-G"))
    hashes.append(provenance.source_hash())
    assert len(set(hashes)) == len(hashes)


def test_the_standalone_program_does_not_change_the_hash(tmp_path, monkeypatch):
    sources = tmp_path / "csrc"
    shutil.copytree(build.csrc_directory(), sources)
    monkeypatch.setattr(build, "csrc_directory", lambda: sources)
    before = provenance.source_hash()
    (sources / build.STANDALONE_PROGRAM[0]).write_text("// not part of the library\n")
    assert provenance.source_hash() == before


def test_provenance_names_machine_versions_and_sources():
    facts = provenance.provenance()
    assert facts["source_hash"] == provenance.source_hash()
    for name in ("python", "jax", "jaxlib", "numpy", "jax_router", "date"):
        assert facts[name], name
    assert facts["date"].endswith("+00:00")
    for name in ("gpu", "driver", "compute_capability", "nvcc", "torch"):
        assert name in facts
