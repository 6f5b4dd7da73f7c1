"""scripts/counters.py with a script for ncu: what it asks for, what its table says, and how it fails."""

import sys
from pathlib import Path

import pytest
import typer.testing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import counters
import typer

NAMES = [counter for _, counter, _ in counters.COUNTERS]
KERNEL = "void jax_router::sm90_router_gemm_few_tokens<__nv_bfloat16, 1, 4, 0>(jax_router::Problem)"


def page(*kernels: str) -> str:
    """ncu's CSV with the numbers 1000, 1001, ... as it writes them, after a line that is not part of it."""
    header = ["ID", "Kernel Name", *NAMES]
    rows = [[str(i), kernel, *(f"{1000 + j:,}" for j in range(len(NAMES)))] for i, kernel in enumerate(kernels)]
    lines = [header, ["", "", *["unit"] * len(NAMES)], *rows]
    return "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines) + "\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script with an ncu that prints `output`, ends with `status` and leaves its arguments in a file."""
    app = typer.Typer()
    app.command()(counters.main)
    asked = tmp_path / "asked"

    def runs(*arguments: str, output: str = page(KERNEL), status: int = 0):
        (tmp_path / "output").write_text(output)
        ncu = tmp_path / "ncu"
        ncu.write_text(f'#!/bin/sh\necho "$@" >> {asked}\ncat {tmp_path / "output"}\nexit {status}\n')
        ncu.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        result = typer.testing.CliRunner().invoke(app, list(arguments))
        return result, asked.read_text().splitlines() if asked.exists() else []

    return runs


def test_every_model_and_number_of_tokens_is_a_run_and_a_row(run):
    result, asked = run("--model", "gpt-oss-120b", "--tokens", "1", "--tokens", "64", "--cold")
    assert result.exit_code == 0
    assert [line.split()[-2:] for line in asked] == [["gpt-oss-120b", "1"], ["gpt-oss-120b", "64"]]
    assert all("--clock-control none" in line and "--cache-control all" in line for line in asked)
    assert all(",".join(NAMES) in line for line in asked)
    rows = result.stdout.splitlines()[2:]
    assert [row.split(" | ")[:4] for row in rows] == [
        ["| gpt-oss-120b", tokens, "`sm90_router_gemm_few_tokens<__nv_bfloat16, 1, 4, 0>`", "1,000"]
        for tokens in ("1", "64")
    ]


def test_units_of_a_column():
    ((_, numbers),) = counters.parse(page(KERNEL).splitlines())
    assert numbers["MB from L2"] == (1000 + NAMES.index("l1tex__m_xbar2l1tex_read_bytes.sum")) / 1e6
    assert list(numbers) == [column for column, _, _ in counters.COUNTERS]


@pytest.mark.parametrize(("output", "status"), [(page(), 0), ("", 0), ("==ERROR== ERR_NVGPUCTRPERM\n", 1)])
def test_a_run_without_counters_says_what_ncu_said(run, output, status):
    result, _ = run("--tokens", "1", output=output, status=status)
    assert result.exit_code == 1
    assert f"status {status}" in result.stderr
    assert output.strip() in result.stderr


def test_without_ncu_and_without_such_a_model(run, monkeypatch):
    result, asked = run("--model", "gpt-5")
    assert (result.exit_code, asked) == (2, [])
    assert "gpt-5" in result.stderr
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    result, asked = run()
    assert (result.exit_code, asked) == (1, [])
    assert "ncu is not on PATH" in result.stderr
