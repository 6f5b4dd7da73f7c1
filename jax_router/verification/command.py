"""`jax-router verify` and `jax_router.verify`: does an implementation compute what it should, on this GPU?"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jax_router.verification import gate
from jax_router.verification.plan import IDENTITY, Options, defaults, identity
from jax_router.verification.report import failures, markdown, print_record
from jax_router.verification.supervisor import Event, Record, supervise

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit statuses


def verify(
    implementation: Annotated[list[str] | None, typer.Option(help="only this one; may be repeated")] = None,
    operation: Annotated[list[str] | None, typer.Option(help="only router_gemm or only route")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="a preset, awkward, or all; may be repeated (default: some, and awkward)")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="only this number of tokens; may be repeated")] = None,
    check: Annotated[list[str] | None, typer.Option(help="only this check; may be repeated")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="of everything together, but for what runs once (default: 5; quick 0.75)")
    ] = None,
    launches: Annotated[
        int | None,
        typer.Option(help="under load, per router and implementation, if time allows (default: 1000000; quick 500000)"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="under a minute: one model, fewer of everything")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="folder of a Hugging Face checkpoint: its routers")] = None,
    activations: Annotated[
        Path | None, typer.Option(help=".npy of recorded inputs [tokens, hidden], with --checkpoint")
    ] = None,
    sanitizers: Annotated[
        bool, typer.Option("--sanitizers", help="compute-sanitizer on the CUDA kernels too: minutes")
    ] = False,
    seed: Annotated[int, typer.Option(help="of all data")] = 0,
    replay: Annotated[Path | None, typer.Option(help="a saved failing case: run it again, and nothing else")] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder of the record (default: docs/results; sweep-results without a GPU)")
    ] = None,
) -> None:
    """Verify implementations on this machine's GPU: accuracy, experts, bits, memory, neighbours, graphs, load.

    Exit status: 0; 1 if a check failed, each case saved for --replay, if one that cuda or pallas needs for a table
    could not run or came to no verdict, or if none ran; 2 for bad input; 130 when interrupted, with what was verified
    so far kept.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 160))
    try:
        options = Options(
            tuple(implementation or ()), tuple(operation or ()), tuple(model or ()), tuple(tokens or ()),
            tuple(check or ()), *defaults(minutes, launches, quick=quick), seed, quick,
            None if checkpoint is None else str(checkpoint), None if activations is None else str(activations),
            sanitizers,
        )  # fmt: skip
        status = run_again(replay, console) if replay is not None else run(options, output, console)
    except ValueError as error:
        _print_error(error)
        status = BAD_INPUT
    except RuntimeError as error:  # the process ended before it began
        _print_error(error)
        status = FAILED
    raise typer.Exit(status)


def _print_error(error: Exception) -> None:
    Console(stderr=True).print(f"error: {escape(str(error))}", style="red", highlight=False, soft_wrap=True)


def run(options: Options, output: Path | None, console: Console) -> int:
    """What the command does; returns its exit status.

    Raises:
      ValueError: options that make no sense, or a folder that cannot be written.
    """
    options.check()
    if output is not None and output.exists() and not output.is_dir():  # not after minutes of verifying
        raise ValueError(f"output is {output}, a file. Expected a folder of records; name another.")
    record = supervise_with_progress(options, console)
    if "provenance" not in record:  # interrupted before anything was known
        return INTERRUPTED
    folder = output or Path("docs/results" if record["provenance"]["gpu"] else "sweep-results")
    path = write(record, folder)
    print_record(console, record)
    for case in save_failures(record, folder):
        console.print(f"saved a failing case; run it again with: jax-router verify --replay {case}", soft_wrap=True)
    console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    if record["interrupted"]:
        return INTERRUPTED
    outcomes = [subject["passed"] for subject in record["subjects"]]
    return FAILED if failures(record) or False in outcomes or True not in outcomes else 0


def supervise_with_progress(options: Options, console: Console) -> Record:
    """The record, with a bar over checks and what runs on the way."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[launches]:,} launches")
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None, launches=0)
        labels: list[str] = []
        done = 0

        def on_event(event: Event) -> None:
            nonlocal done
            if event["event"] == "begin" and not labels:
                labels.extend(
                    f"{each['operation']} {each['implementation']} {each['models'][0]}" for each in event["subjects"]
                )
                progress.update(task, total=len(labels) + options.sanitizers)
            elif event["event"] == "check":
                where = "" if event["subject"] is None else labels[event["subject"]]
                progress.update(task, description=f"{where} {event['check']}")
            elif event["event"] == "alive":
                done += event["launches"]
                progress.update(task, launches=done)
            elif event["event"] == "done":
                progress.advance(task)
            elif event["event"] == "result" and event["passed"] is False:
                where = "" if event["subject"] is None else labels[event["subject"]]
                console.print(f"[bold red]failed[/] {where} {event['check']}", highlight=False)

        return supervise(options, on_event)


def write(record: Record, folder: Path) -> Path:
    """Write a record, joined with one of the same sources, GPU and versions that is there, and keep it.

    What was verified again replaces what was there; a quick record, or one of some numbers of tokens, stands beside.
    Of several processes at once each joins what the others wrote.

    Raises:
      ValueError: the folder cannot be written.
    """
    name = gate.file_name(record["provenance"]["gpu"])
    written = as_record(record)
    path = folder / (name.replace(".json", "-quick.json") if written["quick"] else name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            whole = joined(path, written)
            partial = path.with_suffix(".json.partial")
            partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, path)
            path.with_suffix(".md").write_text(markdown(whole), encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"output leads to {path}: {error}. Expected a place that can be written; name another."
        ) from error
    gate.keep(whole)
    return path


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. The system releases the lock of a process that is killed; Windows has none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def as_record(record: Record) -> Record:
    """The form that the gate reads."""
    options = record["options"]
    head = {name: record[name] for name in ("provenance", "library")}
    asked = {name: options[name] for name in ("seed", "quick", "minutes")}
    asked["quick"] = options["quick"] or bool(options["tokens"])  # with few numbers of tokens a run proves as little
    return {**head, **asked, "interrupted": record["interrupted"], "refused": record["refused"],
            "subjects": record["subjects"], "sanitizers": record["sanitizers"]}  # fmt: skip


def joined(path: Path, record: Record) -> Record:
    """`record`, and of the one in `path` what it does not have, if both are of one kind."""
    try:
        earlier = gate.read_record(path)
    except ValueError:
        return record
    same = ("gpu", "driver", "jax", "source_hash")
    if earlier["library"] != record["library"] or any(
        earlier["provenance"].get(name) != record["provenance"].get(name) for name in same
    ):
        return record

    subjects = {identity(subject): subject for subject in earlier["subjects"]}
    for subject in record["subjects"]:
        before = subjects.pop(identity(subject), None)
        subjects[identity(subject)] = subject if before is None else _verified_again(before, subject)
    whole = all(subject.get("complete", True) for subject in subjects.values())
    return {
        **record,
        "interrupted": record["interrupted"] or (earlier["interrupted"] and not whole),
        "subjects": list(subjects.values()),
        "sanitizers": record["sanitizers"] or earlier["sanitizers"],
    }


def _verified_again(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A subject of two runs: the later one if it has every check; else of each check what says more.

    A failure says most, then a pass of more launches: a few checks alone do not make up for one.
    """
    results = {check["check"]: [check] for check in now["checks"]}
    if all(check["check"] in results or check["passed"] is None for check in before["checks"]):
        return now
    for check in before["checks"]:
        results.setdefault(check["check"], []).append(check)
    checks = [max(each, key=lambda check: (check["passed"] is False, check["passed"] is True, check["launches"]))
              for each in results.values()]  # fmt: skip
    complete = now["complete"] or before.get("complete", True)
    launches = sum(check["launches"] for check in checks)
    whole = {**now, "checks": checks, "complete": complete, "launches": launches}
    return {**whole, "passed": gate.outcome(whole)}


def save_failures(record: Record, folder: Path) -> list[Path]:
    """Save every failing case that can be run again, beside those of earlier runs, and return where."""
    saved: list[Path] = []
    for subject, check in failures(record):
        if subject is None or not check.get("failure"):
            continue
        facts = {name: subject[name] for name in IDENTITY}
        case = {"provenance": record["provenance"], "options": record["options"], "subject": facts, **check}
        name = f"failure-{subject['operation']}-{subject['implementation']}-{check['check']}"
        numbered = (folder / f"{name}-{number}.json" for number in itertools.count())
        path = next(path for path in numbered if not path.exists())
        path.write_text(json.dumps(case, indent=1) + "\n", encoding="utf-8")
        saved.append(path)
    return saved


def run_again(path: Path, console: Console) -> int:
    """Run a saved case; returns FAILED if it fails again or cannot run here, else 0.

    Raises:
      ValueError: the file holds no case.
    """
    options, case = read_case(path)
    facts = {name: case["failure"][name] for name in ("tokens", "data", "launch", "row", "expected", "got")}
    console.print(f"{case['check']} of {gate.label(case['subject'])}, {case['subject']['implementation']}: {facts}",
                  highlight=False, soft_wrap=True)  # fmt: skip
    record = supervise_with_progress(options, console)
    if record["interrupted"]:
        return INTERRUPTED
    print_record(console, record)
    again = bool(failures(record))
    if all(check["passed"] is None for subject in record["subjects"] for check in subject["checks"]):
        console.print("It does not run here, which says nothing.")
        return FAILED
    console.print("It fails again." if again else "It does not fail here, or not this time.")
    return FAILED if again else 0


def read_case(path: Path) -> tuple[Options, dict[str, Any]]:
    """The options that run one saved case, and the case."""
    try:
        case = json.loads(path.read_text(encoding="utf-8"))
        subject = case["subject"]
        options = dataclasses.replace(
            Options.of(case["options"]),
            implementations=(subject["implementation"],),
            operations=(subject["operation"],),
            models=() if case["options"]["checkpoint"] else tuple(subject["models"][:1]),
            tokens=(case["failure"]["tokens"],),
            checks=(case["check"],),
            seed=case["failure"]["seed"],
            sanitizers=False,
            subject=subject,
        )
        options.check()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"replay leads to {path}, which cannot be used ({type(error).__name__}: {error}). Expected a case that "
            "jax-router verify saved; check the path."
        ) from error
    return options, case


def register(app: typer.Typer) -> None:
    """Add the command to `jax-router`."""
    app.command("verify")(verify)
