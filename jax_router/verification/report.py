"""What a record of the verification says: a table, for the terminal and for markdown, and its failures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax_router.verification import gate

if TYPE_CHECKING:  # markdown needs no rich
    from rich.console import Console

Record = dict[str, Any]

CHECKS = ("accuracy", "experts", "bits", "memory", "fence", "neighbours", "graphs", "load")
PASSED, FAILED, NOT_RUN = "ok", "FAILED", "-"


def header() -> list[str]:
    return ["operation", "implementation", "router", *CHECKS, "launches", "under load"]


def rows(record: Record) -> list[list[str]]:
    """One row per subject."""
    return [_row(subject) for subject in record["subjects"]]


def _row(subject: dict[str, Any]) -> list[str]:
    by_check = {check["check"]: check for check in subject["checks"]}
    cells = [_cell(by_check.get(name)) for name in CHECKS]
    models = subject["models"]
    router = f"{gate.router(subject)} {models[0]}"
    router += f" and {len(models) - 1} more" if len(models) > 1 else ""
    launches = sum(check["launches"] for check in subject["checks"])
    under_load = by_check.get("load", {}).get("launches", 0)
    return [subject["operation"], subject["implementation"], router, *cells, f"{launches:,}", f"{under_load:,}"]


def _cell(check: dict[str, Any] | None) -> str:
    return NOT_RUN if check is None or check["passed"] is None else PASSED if check["passed"] else FAILED


def failures(record: Record) -> list[tuple[dict[str, Any] | None, dict[str, Any]]]:
    """Every failed check with its subject; None for a sanitizer."""
    of_subjects = [
        (subject, check) for subject in record["subjects"] for check in subject["checks"] if check["passed"] is False
    ]
    return [*of_subjects, *((None, tool) for tool in record["sanitizers"] if tool["passed"] is False)]


def not_run(record: Record) -> dict[str, int]:
    """Why checks were not run, and how many."""
    reasons: dict[str, int] = {}
    for subject in record["subjects"]:
        for check in subject["checks"]:
            if check["passed"] is None:
                reason = f"{check['check']}: {check['reason']}"
                reasons[reason] = reasons.get(reason, 0) + 1
    for tool in record["sanitizers"]:
        if tool["passed"] is None:
            reasons[f"{tool['tool']}: {tool['reason']}"] = 1
    return reasons


def totals(record: Record) -> dict[str, int]:
    """Launches under load that were checked, and those that were wrong, over all subjects."""
    loads = [check for subject in record["subjects"] for check in subject["checks"] if check["check"] == "load"]
    return {
        "launches": sum(check["launches"] for check in loads),
        "wrong": sum(check["passed"] is False for check in loads),
    }


def print_record(console: Console, record: Record) -> None:
    """The table, what failed and what was not run."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for place, name in enumerate(header()):
        table.add_column(name, justify="right" if place > 2 + len(CHECKS) else "left")
    styles = {PASSED: "green", FAILED: "bold red", NOT_RUN: "dim"}
    for cells in rows(record):
        table.add_row(*(f"[{styles[cell]}]{cell}[/]" if cell in styles else escape(cell) for cell in cells))
    console.print(table)
    for tool in record["sanitizers"]:
        outcome = _cell(tool)
        console.print(f"{_tool(tool)}: [{styles[outcome]}]{outcome}[/]", highlight=False)
    for where, reason, case in _failed(record):
        console.print(f"[bold red]failed[/] {escape(where)}: {escape(reason)}", highlight=False, soft_wrap=True)
        if case:
            console.print(f"  {escape(case)}", highlight=False, soft_wrap=True)
    for reason, count in not_run(record).items():
        console.print(f"[yellow]not run[/] ({count}) {escape(reason)}", highlight=False, soft_wrap=True)
    for name, reason in record.get("refused", {}).items():
        console.print(f"[yellow]left out[/] {name}: {escape(reason)}", highlight=False, soft_wrap=True)


def _failed(record: Record) -> list[tuple[str, str, str]]:
    """Of every failure what it was of, why, and the case as text, empty where there is none."""
    found = []
    for subject, check in failures(record):
        where = f"{' '.join(_row(subject)[:3])}, " if subject is not None else ""
        case = ", ".join(f"{key} {value}" for key, value in (check.get("failure") or {}).items())
        name = check.get("check") or _tool(check)
        found.append((f"{where}{name}", str(check["reason"]), case))
    return found


def markdown(record: Record) -> str:
    """The table, its provenance, what failed and what was not run."""
    rules = ["---"] * (3 + len(CHECKS)) + ["---:"] * 2
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in (header(), rules, *rows(record)))
    tools = "".join(f"{_tool(tool)}: {_cell(tool)}. " for tool in record["sanitizers"])
    facts = record["provenance"]
    sums = totals(record)
    where = f"{facts['gpu'] or 'CPU'}, {facts['date'][:10]}, sources `{facts['source_hash'][:12]}`"
    text = f"{lines}\n{sums['launches']:,} launches under load, {sums['wrong']} subjects wrong. {tools}{where}.\n"
    notes = [f"- failed: {of}: {_first_line(reason)}{f' ({case})' if case else ''}"
             for of, reason, case in _failed(record)]  # fmt: skip
    notes += [f"- not run ({count}): {_first_line(reason)}" for reason, count in not_run(record).items()]
    notes += [f"- left out: {name}: {reason}" for name, reason in record.get("refused", {}).items()]
    return text + "".join(f"{note}\n" for note in ["", *notes] if notes)


def _tool(result: dict[str, Any]) -> str:
    figures = result.get("figures", {})
    edited = "".join(f" (edited {file})" for file in figures.get("edited", ()))
    return " ".join(filter(None, ("compute-sanitizer", figures.get("version"), result["tool"]))) + edited


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
