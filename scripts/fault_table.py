"""What a record of fault_trials.py says, for the terminal and for markdown, and whether it is as it should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from fault_list import FAULTS
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jax_router.verification.report import CHECKS

HEADER = ("fault", "caught", "by", "launches", "seconds", "parity tests")
ALL, SHIPPED = "all faults", "shipped"
CAUGHT, PASSED, NOT_RUN = "caught", "ok", "-"

Record = dict[str, Any]


def entries(record: Record) -> dict[str, Record]:
    """What a record has of each fault, in the order of the list; without the shipped library."""
    found = record["faults"]
    return {fault.name: found[fault.name] for fault in FAULTS if fault.name in found}


def is_missed(entry: Record) -> bool:
    """Whether a trial missed the fault; what a sanitizer says stands beside it and makes up for none."""
    return any(trial["caught_by"] is None for trial in entry["trials"])


def is_found_by_quick(entry: Record) -> bool:
    """Whether no more than one run in ten of `verify --quick` missed the fault."""
    return 10 * sum(not run["failed"] for run in entry["quick"]) <= len(entry["quick"])


def is_shipped_right(entry: Record) -> bool:
    """Whether no check sees anything in the shipped library, and in every trial some did look."""
    looked = all(trial["ran"] for trial in entry["trials"])
    return looked and all(trial["caught_by"] is None for trial in [*entry["trials"], *entry["survey"]])


def as_it_should_be(record: Record) -> bool:
    """Whether no trial misses a fault, the parity tests miss what they should, and the shipped library is right."""
    shipped = record["faults"].get(SHIPPED)
    whole = [*entries(record).values(), *([shipped] if shipped else [])]
    return (
        not any(is_missed(entry) or not is_found_by_quick(entry) for entry in entries(record).values())
        and (shipped is None or is_shipped_right(shipped))
        and all(entry["error"] is None and (entry["parity"] or {}).get("passed", True) for entry in whole)
    )


def rows(record: Record) -> list[list[str]]:
    """One per fault, one over all of them, and one of the shipped library."""
    of_faults = entries(record)
    every = {"trials": [trial for entry in of_faults.values() for trial in entry["trials"]], "parity": None}
    found = [_row(name, entry) for name, entry in of_faults.items()]
    found += [_row(ALL, every)] if len(of_faults) > 1 else []
    shipped = record["faults"].get(SHIPPED)
    return found + ([_row(SHIPPED, shipped)] if shipped and (shipped["trials"] or shipped["parity"]) else [])


def _row(name: str, entry: Record) -> list[str]:
    trials = entry["trials"]
    caught = [trial for trial in trials if trial["caught_by"] is not None]
    by = [*Counter(_by(trial) for trial in caught).items()]
    by_text = ", ".join(f"{how} {count}" if len(by) > 1 else how for how, count in by)
    for tool in entry.get("sanitizers", []):
        said = "" if tool["passed"] is False else ": nothing" if tool["passed"] else ": did not run"
        by_text += f"{', ' if by_text else ''}{tool['tool']}{said}"
    if name == ALL:
        by_text = ""
    launches = [trial["launches"] for trial in caught or trials]
    seconds = [trial["seconds"] for trial in caught or trials]
    parity = entry["parity"]
    tests = NOT_RUN if parity is None else "pass" if parity["passed"] else "FAIL"
    if parity is not None:
        tests += f" ({', '.join(f'{count} {word}' for word, count in parity['counts'].items())})"
    return [name, f"{len(caught)} of {len(trials)}", by_text or NOT_RUN, _spread(launches, "{:,.0f}"),
            _spread(seconds, "{:.1f}"), tests]  # fmt: skip


def _by(trial: Record) -> str:
    by, during = trial["caught_by"], trial["during"]
    return f"{by} in {during}" if by in ("hang", "crash") else by


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return NOT_RUN
    middle, least, most = (form.format(value) for value in (median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least} to {most})"


def quick_lines(record: Record) -> list[str]:
    """What `jax-router verify --quick` finds, a line per fault."""
    return [
        f"`jax-router verify --quick` finds {name} in {sum(bool(run['failed']) for run in entry['quick'])} of "
        f"{len(entry['quick'])} runs, of {_spread([run['seconds'] for run in entry['quick']], '{:.0f}')} seconds."
        for name, entry in entries(record).items()
        if entry["quick"]
    ]


def survey_rows(record: Record) -> list[list[str]]:
    """One per fault and one of the shipped library: what each check says in a short run."""
    named = {**entries(record), **({SHIPPED: record["faults"][SHIPPED]} if SHIPPED in record["faults"] else {})}
    return [[name, *(_cell(entry, check) for check in CHECKS)] for name, entry in named.items() if entry["survey"]]


def _cell(entry: Record, check: str) -> str:
    """Over the operations. What came with another check counts for itself."""
    results = [
        result["passed"]
        for each in entry["survey"]
        for run in each["checks"]
        for result in run["results"]
        if result["check"] == check
    ]
    ended = [each["caught_by"] for each in entry["survey"] if each["during"] == check]
    ended = [how for how in ended if how in ("hang", "crash")]
    if False in results or ended:
        return ended[0] if ended and False not in results else CAUGHT
    return PASSED if True in results else NOT_RUN


def markdown(record: Record) -> str:
    """Both tables, and what was run."""
    facts, parameters = record["provenance"], record["parameters"]
    lines = [f"# Kernels broken on purpose, on {facts['gpu']}", "", *_table(HEADER, rows(record)), ""]
    lines += [
        "Launches and seconds until it was caught: the median, and the least and the most. A hang takes "
        f"{parameters['hang_seconds']:.0f} seconds without a sign of life. A trial runs the checks that must see the "
        "fault, on the routers and operations it is in, with the parameters of `jax-router verify` and its own seed; "
        f"each router has its share of the default minutes, {parameters['seconds']:.1f} seconds. Trials of one "
        "process share what was compiled.",
        "",
    ]  # fmt: skip
    lines += [text for line in quick_lines(record) for text in (line, "")]
    found = survey_rows(record)
    if found:
        lines += ["## Every check, shortly", "", *_table(("fault", *CHECKS), found), ""]
    errors = {name: entry["error"] for name, entry in record["faults"].items() if entry["error"]}
    lines += [f"{name} could not be measured: {error.splitlines()[0]}\n" for name, error in errors.items()]
    versions = f"driver {facts['driver']}; jax {facts['jax']}, nvcc {facts['nvcc']}"
    lines += [f"{facts['gpu']}, {versions}; {facts['date'][:10]}; sources `{facts['source_hash'][:12]}`."]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]


def print_record(console: Console, record: Record) -> None:
    """Both tables, and what went wrong."""
    styles = {CAUGHT: "green", "hang": "green", "crash": "green", NOT_RUN: "dim"}
    tables = (HEADER, rows(record)), (("fault", *CHECKS), survey_rows(record))
    for header, cells in tables:
        if not cells:
            continue
        table = Table(*header, box=box.SIMPLE_HEAD)
        for row in cells:
            table.add_row(*(f"[{styles[cell]}]{cell}[/]" if cell in styles else escape(cell) for cell in row))
        console.print(table)
    for line in quick_lines(record):
        console.print(line, highlight=False, soft_wrap=True)
    for name, entry in record["faults"].items():
        if name != SHIPPED and is_missed(entry):
            console.print(f"[bold red]not caught in every trial[/] {name}", highlight=False)
        if name != SHIPPED and not is_found_by_quick(entry):
            console.print(f"[bold red]missed by verify --quick[/] {name}", highlight=False)
        if entry["error"]:
            console.print(f"[bold red]not measured[/] {name}: {escape(entry['error'])}", soft_wrap=True)
    shipped = record["faults"].get(SHIPPED)
    if shipped and not is_shipped_right(shipped):
        console.print("[bold red]a check sees something in the shipped library, or none ran[/]")
