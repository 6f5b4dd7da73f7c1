#!/usr/bin/env python3
"""Hardware counters of the kernels by Nsight Compute (ncu), as a table: `python scripts/counters.py --tokens 64`.

Each model and number of tokens is one call of `jax_router.route` in a process of its own under ncu, which runs every
kernel once per set of counters and leaves the clocks alone. Its times are of a launch alone on an idle GPU and longer
than those of the sweep; the ratios are what the table is for. Needs ncu and the right to read the counters.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jax_router.models import models  # noqa: E402

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
# Column of the table, counter, how many of the counter's units are one of the column's.
COUNTERS = (
    ("cycles", "sm__cycles_active.max", 1.0),
    ("issuing %", "sm__inst_issued.avg.pct_of_peak_sustained_active", 1.0),
    ("tensor cores %", "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", 1.0),
    ("MB from L2", "l1tex__m_xbar2l1tex_read_bytes.sum", 1e6),
    ("L2 %", "lts__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    ("MB from HBM", "dram__bytes_read.sum", 1e6),
    ("bank conflicts", "l1tex__data_bank_conflicts_pipe_lsu.sum", 1.0),
    ("wait: memory", STALLED.format("long_scoreboard"), 1.0),
    ("shared memory", STALLED.format("short_scoreboard"), 1.0),
    ("barrier", STALLED.format("barrier"), 1.0),
    ("instruction before", STALLED.format("wait"), 1.0),
    ("code", STALLED.format("no_instruction"), 1.0),
)
CALL = "import sys; from scripts.counters import launch; launch(sys.argv[1], int(sys.argv[2]))"


class CountersError(Exception):
    """ncu measured nothing; the message says why and what to do."""


def launch(model: str, tokens: int) -> None:
    """What ncu watches: one routing of `tokens` tokens by the CUDA kernels, in bfloat16."""
    import jax
    import jax.numpy as jnp

    import jax_router

    router = models[model]
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (tokens, router.hidden), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (router.experts, router.hidden), jnp.bfloat16)
    bias = jnp.ones(router.experts, jnp.bfloat16) if router.bias else None
    jax.block_until_ready(jax_router.route(x, weight, bias, spec=router.spec, implementation="cuda"))


def counters(ncu: str, model: str, tokens: int, cold: bool) -> list[tuple[str, dict[str, float]]]:
    """Every kernel of one routing in order, with its counters by column.

    Raises:
      CountersError: ncu failed, or saw none of our kernels.
    """
    command = [ncu, "--csv", "--page", "raw", "--clock-control", "none", "-k", "regex:sm90_"]
    command += ["--cache-control", "all" if cold else "none"]
    command += ["--metrics", ",".join(counter for _, counter, _ in COUNTERS)]
    command += [sys.executable, "-c", CALL, model, str(tokens)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False
    )
    found = parse(run.stdout.splitlines())
    if run.returncode != 0 or not found:
        raise CountersError(
            f"ncu ended with status {run.returncode} and {len(found)} kernels for {model}, {tokens} tokens. Expected a "
            f"GPU that cuda takes, and the right to read its counters. It said:\n{(run.stdout + run.stderr)[-1500:]}"
        )
    return found


def parse(lines: Iterable[str]) -> list[tuple[str, dict[str, float]]]:
    """Kernels and their counters from ncu's CSV page `raw`: a header, a row of units, a row per launch."""
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    found = []
    for row in rows[2:]:
        values = dict(zip(rows[0], row, strict=True))
        name = re.search(r"sm90_\w+(<.*>)?(?=\()", values["Kernel Name"])
        numbers = {column: float(values[counter].replace(",", "")) / unit for column, counter, unit in COUNTERS}
        found.append((name[0] if name else values["Kernel Name"], numbers))
    return found


def table(rows: Sequence[tuple[str, int, str, dict[str, float]]]) -> str:
    """Markdown, one line per model, number of tokens and kernel."""
    columns = ["model", "T", "kernel", *(column for column, _, _ in COUNTERS)]
    lines = [f"| {' | '.join(columns)} |", "| --- | ---: | --- |" + " ---: |" * len(COUNTERS)]
    for model, tokens, kernel, numbers in rows:
        cells = [f"{number:,.0f}" if number >= 100 else f"{number:.3g}" for number in numbers.values()]
        lines.append(f"| {model} | {tokens} | `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    model: Annotated[list[str] | None, typer.Option(help="A preset; may be repeated.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated.")] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Empty the caches, of code too, before every run.")] = False,
) -> None:
    """Print the table. Exits with 1 if nothing could be measured."""
    chosen = model or ["gpt-oss-120b", "DeepSeek-V3"]
    if unknown := [name for name in chosen if name not in models]:
        raise typer.BadParameter(f"model is {', '.join(unknown)}. Expected presets: {', '.join(models)}.")
    ncu = shutil.which("ncu")
    if ncu is None:
        typer.echo("counters: ncu is not on PATH. Install Nsight Compute, which comes with the CUDA toolkit.", err=True)
        raise typer.Exit(1)
    rows = []
    try:
        with Console(stderr=True).status("ncu") as status:
            for name in chosen:
                for count in tokens or [1, 64]:
                    status.update(f"{name}, {count} tokens")
                    rows += [(name, count, *kernel) for kernel in counters(ncu, name, count, cold)]
    except CountersError as error:
        typer.echo(f"counters: {error}", err=True)
        raise typer.Exit(1) from None
    finally:
        if rows:
            print(table(rows))


if __name__ == "__main__":
    typer.run(main)
