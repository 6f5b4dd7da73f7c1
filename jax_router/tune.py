"""`jax-router tune`: verify and time every configuration of the CUDA kernels, beside the one their launcher picks."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console

from jax_router import sweep_table, tune_report
from jax_router.implementations import cuda
from jax_router.provenance import gpu_name, provenance
from jax_router.sweep import BAD_INPUT, FAILED, open_rows, own_command, progress_bar, stopped, wide_console
from jax_router.sweep_rows import Row, RowsError, comparable, finished, read_rows
from jax_router.sweep_run import DeviceLost
from jax_router.tune_run import MEASUREMENT, Tuner, points
from jax_router.tune_table import configs_of


def tune(
    model: Annotated[
        list[str] | None, typer.Option(help="only shapes of this model (default: the headline models); may be repeated")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="only this number of tokens; may be repeated")] = None,
    operation: Annotated[list[str] | None, typer.Option(help="only router_gemm or only route")] = None,
    output: Annotated[
        Path | None, typer.Option(help="rows file to write (default: a new one in sweep-results)")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="rows file to go on with; measured points are skipped")] = None,
    write_table: Annotated[
        bool, typer.Option("--write-table", help="write the winners into the dispatcher's table of this GPU")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.jsonl B.jsonl", help="measure nothing: compare the winners of two runs"),
    ] = None,
    results: Annotated[Path | None, typer.Option(help="with --compare: folder for a page, tune-<gpu>.md")] = None,
) -> None:
    """Find the fastest configuration of the CUDA kernels at each point; all of them give the same bits.

    Every configuration is compared bit for bit, of logits with the naive kernel and of routing with its two launches,
    then timed in graph replay, warm and cold, in rounds. Rows with all raw times are appended to a JSON-lines file as
    they come. Exit status: 0; 1 if a configuration or a point failed, or with --compare if a winner changed by more
    than noise or a point was measured in one run only; 2 for bad input; 130 when interrupted, with everything measured
    so far kept.
    """
    console = wide_console()
    try:
        if compare is not None:
            status = run_compare(compare, results, console)
        elif results is not None:
            raise ValueError(
                f"--results is {results} and --compare is missing. Expected both; add two runs to compare."
            )
        else:
            filters: dict[str, list[Any]] = {
                "model": model or [], "tokens": tokens or [], "operation": operation or [],
            }  # fmt: skip
            status = run(filters, output, resume, write_table, console)
    except (RowsError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        status = BAD_INPUT
    raise typer.Exit(status)


def run(
    filters: dict[str, list[Any]], output: Path | None, resume: Path | None, write_table: bool, console: Console
) -> int:
    """What the command does without --compare; returns its exit status.

    Raises:
      ValueError: a filter that names nothing, no GPU, files that do not fit.
      RowsError: `resume` cannot be used.
    """
    todo = points(filters["model"], filters["tokens"], filters["operation"])
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        raise ValueError(
            f"JAX has no GPU, only {device.platform}. Expected one of compute capability {cuda.COMPUTE_CAPABILITY}, "
            "whose kernels are tuned; run it there, or compare two runs with --compare."
        )
    refused = cuda.unavailable()
    if refused is not None:
        raise ValueError(f"cuda {refused}. Expected its kernels, which are tuned.")
    if output is not None and (resume is not None or output.exists()):
        what = "--resume is given too" if resume is not None else "it exists"
        raise ValueError(f"--output is {output} and {what}. Expected a new file, or --resume FILE alone to go on.")
    facts = provenance()
    if write_table and sweep_table.read_table(sweep_table.table_path(facts["gpu"])) is None:
        raise ValueError(
            f"--write-table is given and {facts['gpu']} has no table. Expected one for the winners to stand in; run "
            "`jax-router verify --model all` and `jax-router sweep --suite headline --write-table` first."
        )
    done = finished(_tuned(resume), facts) if resume is not None else set()
    now = dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S")
    path = resume or output or Path("sweep-results") / f"tune-{gpu_name(facts)}-{now}.jsonl"
    console.print(
        f"{len(todo)} points on {facts['gpu']}, sources {facts['source_hash'][:12]}, rows in {path}", soft_wrap=True
    )
    command = [*own_command("tune"), "--resume", str(path), *(["--write-table"] if write_table else [])]
    for name, values in filters.items():
        command += [part for value in values for part in (f"--{name}", str(value))]
    writer = open_rows(path, resumed=resume is not None)
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("preparing")
            tuner = Tuner(
                writer,
                provenance=facts,
                device=device,
                done=done,
                advance=lambda count, label: progress.update(task, advance=count, description=label),
            )
            progress.update(task, total=len(tuner.missing(todo)))
            tuner.run(todo)
    except (KeyboardInterrupt, DeviceLost) as stop:
        return stopped(console, stop, path, command)
    finally:
        writer.close()
    rows, _ = comparable(_tuned(path))
    tune_report.print_points(console, rows)
    written = not write_table or _write_configs(console, rows, facts["gpu"])
    return FAILED if any(row["status"] == "failed" for row in rows) or not written else 0


def _tuned(path: Path) -> list[Row]:
    """The tuner's rows in a file.

    Raises:
      RowsError: it cannot be read, or holds rows and none of the tuner's.
    """
    rows = read_rows(path)
    found = [row for row in rows if row["method"] == MEASUREMENT[0]]
    if rows and not found:
        raise RowsError(f"rows file {path} holds no rows of the tuner. Expected a file that `jax-router tune` wrote.")
    return found


def _write_configs(console: Console, rows: Sequence[Row], gpu: str) -> bool:
    """Write the section of the GPU's table; says why if it could not be written."""
    try:
        there = sweep_table.read_table(sweep_table.table_path(gpu)) or {}
        written = sweep_table.write_configs(configs_of(rows, there.get("configs")), gpu)
    except (OSError, ValueError) as error:
        console.print(f"the table was not written: {error}", style="red", markup=False, soft_wrap=True)
        return False
    console.print(f"wrote {written}", highlight=False, soft_wrap=True)
    return True


def run_compare(paths: tuple[Path, Path], results: Path | None, console: Console) -> int:
    """What --compare does; returns its exit status.

    Raises:
      ValueError: runs that cannot be compared.
      RowsError: files that cannot be used.
    """
    runs = [comparable(_tuned(path))[0] for path in paths]
    for path, rows in zip(paths, runs, strict=True):
        if not rows:
            raise ValueError(f"--compare names {path}, which holds no row. Expected a run of `jax-router tune`.")
    found = tune_report.compare(*runs)
    tune_report.print_comparison(console, found)
    if results is not None:
        page = results / f"tune-{gpu_name(runs[0][-1]['provenance'])}.md"
        try:
            results.mkdir(parents=True, exist_ok=True)
            page.write_text(tune_report.page([path.name for path in paths], runs, found), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--results leads to {page}: {error}. Expected a folder that can be written.") from error
        console.print(f"wrote {page}", highlight=False, soft_wrap=True)
    return FAILED if any(each.beyond_noise for each in found) else 0


def register(app: typer.Typer) -> None:
    """Add the command to `jax-router`."""
    app.command("tune")(tune)
