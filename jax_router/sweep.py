"""`jax-router sweep`: check and time every implementation on the shapes of published models."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jax_router import sweep_points
from jax_router.provenance import gpu_name
from jax_router.sweep_rows import Row, RowsError, RowsWriter, comparable, finished, identity, read_rows
from jax_router.tables import load_table
from jax_router.timing_torch import torch_with_gpu
from jax_router.verification import gate

RESULTS = Path("docs/results")
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit statuses


def sweep(
    suite: Annotated[str, typer.Option(help="quick, headline or full")] = "quick",
    model: Annotated[list[str] | None, typer.Option(help="only shapes of this model; may be repeated")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="only this number of tokens; may be repeated")] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="only this candidate; may be repeated")] = None,
    operation: Annotated[list[str] | None, typer.Option(help="only router_gemm or only route")] = None,
    output: Annotated[Path, typer.Option(help="folder of the rows file")] = Path("sweep-results"),
    resume: Annotated[Path | None, typer.Option(help="rows file to go on with; measured points are skipped")] = None,
    write_table: Annotated[
        bool, typer.Option("--write-table", help="write the dispatcher's table of this GPU")
    ] = False,
    verification: Annotated[
        Path | None,
        typer.Option(
            help="record of this GPU's verification, for --write-table (default: docs/results or the rows' folder)"
        ),
    ] = None,
    compile_threads: Annotated[
        int | None, typer.Option(help="executables compiled at a time (default: by cores)")
    ] = None,
) -> None:
    """Check and time router GEMMs and routing: models x tokens x implementations, on a GPU beside PyTorch and bounds.

    Rows are appended to a JSON-lines file as they come; plots are drawn beside it. The table accepts only what
    `jax-router verify` passed on this GPU. Exit status: 0; 1 if a point failed, a result could not be written or the
    table did not accept an implementation; 2 for bad input; 130 when interrupted, with everything measured so far kept.
    """
    console = wide_console()
    filters: dict[str, list[Any]] = {
        "model": model or [],
        "tokens": tokens or [],
        "implementation": implementation or [],
        "operation": operation or [],
    }
    try:
        with _interpreted_pallas():
            status = run(suite, filters, output, resume, write_table, verification, compile_threads, console)
    except (RowsError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        status = BAD_INPUT
    raise typer.Exit(status)


def wide_console() -> Console:
    """Of a terminal as it is; a log is not cut at the width of some terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


@contextlib.contextmanager
def _interpreted_pallas() -> Iterator[None]:
    """Pallas in its interpreter meanwhile, should JAX compute on the CPU; only the tiny shapes ask for it there."""
    from jax_router.implementations.pallas import INTERPRET_VARIABLE

    asked = INTERPRET_VARIABLE in os.environ
    os.environ.setdefault(INTERPRET_VARIABLE, "1")
    try:
        yield
    finally:
        if not asked:
            del os.environ[INTERPRET_VARIABLE]


def run(
    suite: str,
    filters: dict[str, list[Any]],
    output: Path,
    resume: Path | None,
    write_table: bool,
    verification: Path | None,
    compile_threads: int | None,
    console: Console,
) -> int:
    """What the command does; returns its exit status.

    Raises:
      ValueError: a filter or a suite that does not exist, no point left, or a verification record that is none.
      RowsError: `resume` cannot be used.
    """
    import jax

    from jax_router import provenance as provenance_module

    device = jax.local_devices()[0]
    gpu = device.platform == "gpu"
    torch = torch_with_gpu() if gpu else None
    points = sweep_points.points(
        suite,
        gpu=gpu,
        torch_gpu=torch is not None,
        only_models=filters["model"],
        only_tokens=filters["tokens"],
        only_candidates=filters["implementation"],
        only_operations=filters["operation"],
    )
    if not points:
        raise ValueError(
            "no point is left. Expected filters that leave some; drop one of --model, --tokens, --implementation, "
            "--operation."
        )
    if write_table and not gpu:
        raise ValueError("--write-table is given and JAX has no GPU. Expected a GPU, whose table it is; leave it out.")
    if verification is not None and not write_table:
        raise ValueError(
            f"--verification is {verification} and --write-table is missing. Expected both, as the record is for the "
            "table; add it, or leave --verification out."
        )
    if compile_threads is not None and compile_threads < 1:
        raise ValueError(f"--compile-threads is {compile_threads}. Expected at least 1, or leave it out.")
    facts = provenance_module.provenance()
    earlier = read_rows(resume) if resume is not None else []
    done = finished(earlier, facts)
    now = dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S")
    path = resume or output / f"sweep-{gpu_name(facts)}-{suite}-{now}.jsonl"

    record = None
    if write_table:
        record = find_record(facts, verification, path.parent)
        _refuse_to_displace(facts, record)

    console.print(
        f"{suite} suite on {facts['gpu'] or 'the CPU'}, sources {facts['source_hash'][:12]}, rows in {path}",
        soft_wrap=True,
    )
    if not gpu:
        console.print("No GPU: running xla, and interpreted pallas on tiny shapes where jax has its interpreter.")
        console.print("These times say nothing about a GPU.")
    elif torch is None:
        console.print("PyTorch does not have the GPU here: cuBLAS is not measured.")
    if resume is not None:
        others = sum(identity(row["provenance"]) != identity(facts) for row in earlier)
        note = (
            f"; {others} are of other sources, another GPU or other versions and are measured again" if others else ""
        )
        console.print(f"resuming: {len(done)} measurements are there{note}")

    if write_table:
        where = (
            f"record {record[1]}" if record else "no record of this GPU: of the implementations only xla is accepted"
        )
        console.print(f"verification: {where}", soft_wrap=True, highlight=False, markup=False)

    command = [
        *own_command("sweep"),
        "--suite",
        suite,
        "--resume",
        str(path),
        *(["--write-table"] if write_table else []),
    ]
    command += [] if verification is None else ["--verification", str(verification)]
    for name, values in filters.items():
        command += [part for value in values for part in (f"--{name}", str(value))]
    threads = compile_threads or (max(1, (os.cpu_count() or 1) // 2) if gpu else 1)
    from jax_router.sweep_run import DeviceLost

    writer = open_rows(path, resumed=resume is not None)
    try:
        runner = _run_with_progress(console, writer, points, facts, device, torch, done, threads)
        return _finish(console, runner, path, gpu, write_table, record)
    except (KeyboardInterrupt, DeviceLost) as stop:
        return stopped(console, stop, path, command)
    finally:
        writer.close()


def own_command(name: str) -> list[str]:
    """How this process was called, up to its options, as the command called `name`."""
    command = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    return [*command, name] if sys.argv[1:2] == [name] else command


def _refuse_to_displace(facts: Row, record: tuple[gate.Record, str] | None) -> None:
    """A table that accepts xla alone takes no verified one's place, be that of this GPU or its twin's."""
    why: str | None = "there is no verification record of this GPU"
    if record is not None:
        why = gate.why_of_other(record[0], source_hash=facts["source_hash"], gpu=facts["gpu"])
    in_use = load_table(facts["gpu"]) if why is not None and facts["gpu"] is not None else None
    verified = in_use.verification if in_use is not None else None
    if in_use is not None and verified is not None and verified.source_hash == facts["source_hash"]:
        raise ValueError(
            f"--write-table is given, {why}, and {in_use.name} has kernels that were verified with these sources. "
            "Expected a record that a table can go by, as without one it accepts xla alone; run `jax-router verify "
            "--model all` first, or leave out --write-table."
        )


def find_record(facts: Row, named: Path | None, folder: Path) -> tuple[gate.Record, str] | None:
    """The verification record by which a table accepts implementations, and where it is; None if there is none.

    Raises:
      ValueError: the named record cannot be read, or the found one.
    """
    if named is None:
        return gate.find_record(facts["gpu"], (RESULTS, folder), source_hash=facts["source_hash"])
    try:
        return gate.read_record(named), str(named)
    except ValueError as error:
        raise ValueError(f"--verification: {error}") from error


def _finish(
    console: Console, runner: Any, path: Path, gpu: bool, write_table: bool, record: tuple[gate.Record, str] | None
) -> int:
    """Print the summary and write plots and table; returns the exit status."""
    rows, _ = comparable(read_rows(path))
    _print_summary(console, rows, gpu)
    for place, reason in runner.skipped.items():
        console.print(f"[yellow]skipped[/] {place}: {reason}", highlight=False, soft_wrap=True)
    for failure in runner.failed:
        console.print("[red]failed[/]", end=" ")
        console.print(failure, highlight=False, markup=False, soft_wrap=True)
    written = _write_results(console, rows, path, write_table, record)
    console.print(f"{runner.written} rows written, {len(runner.failed)} failed, in {path}", soft_wrap=True)
    return FAILED if runner.failed or not written else 0


def _write_results(
    console: Console, rows: Sequence[Row], path: Path, write_table: bool, record: tuple[gate.Record, str] | None
) -> bool:
    """Draw the plots beside the rows, and the table if asked for. Says what is missing in them; True if nothing is."""
    from jax_router import sweep_table
    from jax_router.report_plots import write_plots

    paths: list[Path] = []
    refusals: list[str] = []
    try:
        if write_table:
            table = sweep_table.table_of(rows, *(record or (None, "")))
            paths.append(sweep_table.write_table(table))
            refusals = sweep_table.refusals(table, rows)
        if any("samples_us" in row for row in rows):
            paths += [plot for pair in write_plots(rows, path.parent, path.stem).values() for plot in pair]
    except (OSError, ImportError, ValueError) as error:
        console.print(
            f"not everything could be written: {error}. The rows are complete; mend that and go on with --resume.",
            style="red", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        return False
    finally:
        for written in paths:
            console.print(f"wrote {written}", highlight=False, soft_wrap=True)
        for refusal in refusals:
            console.print("[yellow]not accepted in the table[/]", end=" ")
            console.print(refusal, highlight=False, markup=False, soft_wrap=True)
    return not refusals


def open_rows(path: Path, *, resumed: bool) -> RowsWriter:
    """The rows file of a run.

    Raises:
      ValueError: it cannot be written.
    """
    try:
        return RowsWriter(path)
    except OSError as error:
        option = "--resume" if resumed else "--output"
        raise ValueError(
            f"{option} leads to {path}: {error}. Expected a place that can be written; name another."
        ) from error


def stopped(console: Console, stop: BaseException, path: Path, command: Sequence[str]) -> int:
    """Say that a run ended early, where its rows are and how to go on; the exit status."""
    interrupted = isinstance(stop, KeyboardInterrupt)
    console.print("\ninterrupted" if interrupted else f"\n{stop}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"Every row so far is in {path}. Go on with\n", soft_wrap=True)
    console.print(f"  {shlex.join(command)}\n", soft_wrap=True, highlight=False, markup=False)
    return INTERRUPTED if interrupted else FAILED


def progress_bar(console: Console) -> Progress:
    """What is under way, how much is done, and the time left; gone at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _run_with_progress(
    console: Console,
    writer: RowsWriter,
    points: Sequence[Any],
    facts: Row,
    device: Any,
    torch: Any,
    done: Any,
    threads: int,
) -> Any:
    from jax_router.sweep_run import Runner

    with progress_bar(console) as progress:
        task = progress.add_task("preparing")
        runner = Runner(
            writer,
            provenance=facts,
            device=device,
            torch=torch,
            done=done,
            compile_threads=threads,
            advance=lambda cost, label: progress.update(task, advance=cost, description=label),
        )
        progress.update(task, total=runner.cost(points))
        runner.run(points)
    return runner


def _print_summary(console: Console, rows: Sequence[Row], gpu: bool) -> None:
    from jax_router import sweep_speed, sweep_summary
    from jax_router.sweep_bars import evaluate

    sweep_summary.print_lines(console, sweep_summary.lines(rows))
    if gpu:
        sweep_summary.print_accuracy(console, rows)
        sweep_summary.print_bars(console, evaluate(rows))
        console.print(sweep_speed.sentence(sweep_speed.geometric_means(rows)))


def register(app: typer.Typer) -> None:
    """Add the command to `jax-router`."""
    app.command("sweep")(sweep)


def main() -> None:
    """The command alone, for scripts/shape_sweep.py."""
    app = typer.Typer(add_completion=False)
    register(app)
    app(args=sys.argv[1:])
