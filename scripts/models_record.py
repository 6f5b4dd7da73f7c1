"""Routers in models on this GPU, as a record: the tests of every use, and decode steps of gpt-oss-20b.

    python scripts/models_record.py                 docs/results/models-h200.json, and .md as a page
    python scripts/models_record.py --no-decode     the tests alone; what the record has of decoding stays, also what
                                                    a run with --no-tests beside it writes

Of the tests a skipped one counts as a failure, and those that run on the GPU (`pytest.mark.gpu`, or the fixture `gpu`)
are listed: the name of a kernel stands in ids of tests too that only lower it on a CPU. Every part of the record has
its own provenance, and a GPU may have a record of one part alone. It is written after the tests and after the decode
steps of every number of tokens, so that what is done is kept where a later part fails; tests/test_models_record.py
wants all of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree as ET

import jax
import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jax_router.provenance import gpu_name, provenance  # noqa: E402

RESULTS = ROOT / "docs/results"
PATTERNS = ("nnx*", "bad_nnx", "gpt_oss*", "deepseek_v3", "sharding", "export", "using")
OUTCOME_NAMES = ("passed", "failed", "skipped")
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}
BATCHES = (1, 16, 64)  # tokens of a decode step
IMPLEMENTATIONS = ("xla", "cuda", "pallas")  # of its routers
PACKAGES = ("flax", "transformers")  # that tests depend on, beside those of every provenance


def files() -> list[str]:
    """The test files whose outcome is recorded, from the root of the repository."""
    found = {path for pattern in PATTERNS for path in (ROOT / "tests").glob(f"test_{pattern}.py")}
    return sorted(str(path.relative_to(ROOT)) for path in found)


def outcomes(report: Path) -> dict[str, list[str]]:
    """The ids of tests, `test_nnx.py::test_name[case]`, by outcome, of a report in JUnit's XML.

    `on_gpu` has those among them that are GPU tests, as tests/conftest.py says by the property `gpu`.
    """
    found: dict[str, list[str]] = {kind: [] for kind in (*OUTCOME_NAMES, "on_gpu")}
    for case in ET.parse(report).getroot().iter("testcase"):
        outcome = next((OUTCOMES[part.tag] for part in case if part.tag in OUTCOMES), "passed")
        name = f"{case.attrib['classname'].removeprefix('tests.')}.py::{case.attrib['name']}"
        found[outcome].append(name)
        if case.find("properties/property[@name='gpu']") is not None:
            found["on_gpu"].append(name)
    return {kind: sorted(ids) for kind, ids in found.items()}


def passed_on_gpu(tests: dict[str, Any], file: str, kernel: str) -> list[str]:
    """The GPU tests of a file, `test_nnx.py`, that have the kernel in what follows the file's name, and have passed."""
    names = sorted(set(tests["passed"]) & set(tests["on_gpu"]))
    return [each for each in names if each.startswith(f"{file}::") and kernel in each.removeprefix(file)]


def run_tests(arguments: list[str]) -> dict[str, Any]:
    """What pytest says of the files, on this machine.

    Raises:
      ImportError: one of PACKAGES is missing.
      RuntimeError: it did not come to its end, or ran no test.
    """
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *files(), *arguments]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status not in (0, 1):
            raise RuntimeError(f"pytest ended with {status}: nothing is recorded.")
        found = outcomes(report)
        if not any(found.values()):
            raise RuntimeError("pytest ran no test: nothing is recorded.")
        facts = {"provenance": provenance() | versions, "gpus": len(jax.local_devices()), "arguments": arguments}
        return facts | found


def run_decode(tokens: int, layers: int | None, rounds: int, steps: int) -> list[dict[str, Any]]:
    """The summaries of decode steps of some tokens, each with the time of every block, in a process of its own.

    Raises:
      RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "rows.jsonl")
        command = [sys.executable, "-m", "examples.gpt_oss", "benchmark", f"--output={output}", f"--tokens={tokens}"]
        command += [f"--rounds={rounds}", f"--steps={steps}", f"--implementations={','.join(IMPLEMENTATIONS)}"]
        command += [] if layers is None else [f"--layers={layers}"]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            raise RuntimeError(f"decode steps of {tokens} tokens ended with {status}: they are not recorded.")
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row.pop("tokens", None)
    blocks = [row for row in rows if row["kind"] == "block"]
    return [row | {"blocks": _blocks_of(row, blocks)} for row in rows if row["kind"] == "summary"]


def _blocks_of(summary: dict[str, Any], blocks: list[dict[str, Any]]) -> list[float]:
    return [row["ms_per_step"] for row in blocks if row["implementation"] == summary["implementation"]]


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    tests, decode = record.get("tests"), record.get("decode", [])
    gpu = (tests or decode[0])["provenance"]["gpu"]
    lines = [f"# Routers in models on {gpu}", "", "Written by `python scripts/models_record.py`."]
    if tests is not None:
        lines += [
            "",
            f"## Tests, on {tests['gpus']} of them",
            "",
            "| file | passed | of them on the GPU with cuda | with pallas | failed | skipped |",
        ]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for file in sorted({name.split("::")[0] for outcome in OUTCOME_NAMES for name in tests[outcome]}):
            passed, failed, skipped = (
                sum(name.startswith(f"{file}::") for name in tests[outcome]) for outcome in OUTCOME_NAMES
            )
            with_kernels = (len(passed_on_gpu(tests, file, kernel)) for kernel in ("cuda", "pallas"))
            counts = (passed, *with_kernels, failed, skipped)
            lines.append(f"| {file} | {' | '.join(map(str, counts))} |")
        lines += ["", _measured_with(tests["provenance"])]
    if decode:
        lines += ["", "## A decode step of gpt-oss with random weights in bfloat16", ""]
        config = decode[0]["config"]
        lines += [
            f"{config['num_hidden_layers']} layers, hidden {config['hidden_size']}, {config['num_local_experts']} "
            f"experts, {decode[0]['context']} tokens of context; {decode[0]['rounds']} blocks of {decode[0]['steps']} "
            "steps of each implementation, in turn. Medians (quartiles; least to most); the ratio is that of the times "
            "of one round.",
            "",
            "| tokens | routing | ms per step | tokens per second | time beside xla | tokens other than xla's |",
            "| ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for row in decode:
            cells = (_cell(row[name], digits) for name, digits in TABLE)
            differing = f"{row['tokens_differing']}, in {row['sequences_differing']} sequences"
            lines.append(f"| {row['tokens_per_step']} | {row['implementation']} | {' | '.join(cells)} | {differing} |")
        lines += ["", _measured_with(decode[0]["provenance"])]
    return "\n".join(lines) + "\n"


def _measured_with(facts: dict[str, Any]) -> str:
    names = ("driver", "jax", "torch", *PACKAGES, "python", "nvcc")
    named = (f"{name} {facts[name]}" for name in names if facts.get(name))
    return f"{', '.join(named)}; {facts['date'][:10]}; sources `{facts['source_hash'][:12]}`."


TABLE = (("ms_per_step", 3), ("tokens_per_second", 0), ("ratio", 4))


def _cell(spread: dict[str, float], digits: int) -> str:
    least, first, median, third, most = (f"{spread[name]:.{digits}f}" for name in spread)
    return f"{median} ({first} to {third}; {least} to {most})"


def main(
    context: typer.Context,
    tests: Annotated[bool, typer.Option(help="Run the tests.")] = True,
    decode: Annotated[bool, typer.Option(help="Time decode steps; they need 45 GB on the GPU.")] = True,
    layers: Annotated[int | None, typer.Option(help="Of gpt-oss-20b's; left out, all.")] = None,
    rounds: Annotated[int, typer.Option(help="Blocks of steps, of each implementation.")] = 15,
    steps: Annotated[int, typer.Option(help="Steps of a block.")] = 50,
    output: Annotated[Path, typer.Option(exists=True, file_okay=False, help="The folder of the record.")] = RESULTS,
) -> None:
    """Write the record of this GPU. Arguments behind -- go to pytest."""
    try:
        here = provenance()
        if here["gpu"] is None:
            raise RuntimeError("JAX has no GPU here. A record is of one.")
        if not (tests or decode):
            raise RuntimeError("--no-tests and --no-decode: expected one of them at most.")
        path = output / f"models-{gpu_name(here)}.json"
        record = _read(path)
        if tests:
            record = _write(path, "tests", run_tests(context.args))
        if decode:
            rows: list[dict[str, Any]] = []
            for tokens in BATCHES:
                rows += run_decode(tokens, layers, rounds, steps)
                record = _write(path, "decode", rows)
    except (RuntimeError, ImportError) as error:
        typer.echo(f"models_record: {error}", err=True)
        raise typer.Exit(2) from error
    Console().print(path.with_suffix(".md").read_text(encoding="utf-8"), soft_wrap=True)
    if tests and (record["tests"]["failed"] or record["tests"]["skipped"]):
        raise typer.Exit(1)


def _read(path: Path) -> dict[str, Any]:
    """The record that is there, or an empty one.

    Raises:
      RuntimeError: it is broken.
    """
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RuntimeError(f"{path} is no JSON: {error}. Expected a record; move it away.") from error
    if not isinstance(record, dict):
        raise RuntimeError(f"{path} holds a {type(record).__name__}. Expected a record; move it away.")
    return record


def _write(path: Path, part: str, measured: Any) -> dict[str, Any]:
    """The record as it is now, with this part: the other one may be written meanwhile, on another GPU."""
    record = _read(path) | {part: measured}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(record), encoding="utf-8")
    return record


app = typer.Typer(add_completion=False)
app.command(context_settings={"allow_extra_args": True})(main)

if __name__ == "__main__":
    app()
