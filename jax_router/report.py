"""`jax-router report`: plots, tables and the generated parts of README.md, all from one rows file of the sweep."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from jax_router import agreement_report, sweep_float32, sweep_layout, sweep_speed
from jax_router.report_plots import write_plots
from jax_router.sweep import BAD_INPUT, gpu_name
from jax_router.sweep_bars import SGEMM, evaluate, headline_shapes, route_headline
from jax_router.sweep_figures import median
from jax_router.sweep_points import BOTH, HEADLINE_MODELS, IMPLEMENTATIONS, NO_ROUTING, PEERS, ROUTE_PEERS, Shape
from jax_router.sweep_rows import Row, RowsError, by_problem, by_weights, comparable, problem_of, read_rows, shape_of
from jax_router.sweep_summary import floors, show
from jax_router.tables import OPERATIONS

RECORD, README = Path("docs/results"), Path("README.md")
TABLE_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
_BLOCK = re.compile(
    r"(<!-- generated: (?P<name>[\w-]+) -->\n)(?P<old>.*?)(<!-- end generated: (?P=name) -->)", re.DOTALL
)
_MARKER = re.compile(r"<!-- (?:end )?generated: ([\w-]+) -->")


def report(
    rows: Annotated[Path | None, typer.Argument(help="rows file; default: the only sweep-*.jsonl in --results")] = None,
    results: Annotated[Path, typer.Option(help="folder of the rows, plots and tables")] = RECORD,
    readme: Annotated[Path, typer.Option(help="file with generated parts")] = README,
) -> None:
    """Regenerate plots, tables and the generated parts of README.md from the rows of a sweep."""
    console = Console()
    try:
        source = rows or only_rows_file(results)
        if (results.resolve() == RECORD.resolve() or readme.resolve() == README.resolve()) and not any(
            row["provenance"].get("gpu") for row in comparable(read_rows(source))[0]
        ):
            raise ValueError(
                f"rows file {source} was measured without a GPU. Expected a GPU, as for {RECORD} and {README}. The "
                "sweep has drawn its plots; to make a report of it, name other places with --results and --readme."
            )
        written = write_report(source, results, readme)
    except OSError as error:
        Console(stderr=True).print(
            f"error: the report cannot be written: {error}. Expected a folder that can be written; name another with "
            "--results.", style="red", highlight=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(BAD_INPUT) from None
    except (RowsError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
    except ImportError as error:
        Console(stderr=True).print(
            f'report needs {error.name}. Run pip install ".[sweep]" in its checkout.', style="red", markup=False
        )
        raise typer.Exit(BAD_INPUT) from None
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if not readme.exists():
        console.print(f"{readme} does not exist: no generated part was rewritten", style="yellow", soft_wrap=True)


def only_rows_file(results: Path) -> Path:
    """The one sweep-*.jsonl of a folder. Raises ValueError if there is none or more than one."""
    found = sorted(results.glob("sweep-*.jsonl"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"rows file is not given and {results} holds {names}. Expected one sweep-*.jsonl; name the file."
        )
    return found[0]


def write_report(rows_file: Path, results: Path, readme: Path) -> list[Path]:
    """Write the rows that belong together, the plots, the markdown tables, and the generated parts of `readme`.

    Running it again on its own output changes nothing.

    Returns:
      The files written.

    Raises:
      RowsError: the rows file cannot be used.
      ValueError: it holds no times, or `readme` has markers that do not match.
    """
    rows, _ = comparable(read_rows(rows_file))
    if not any(by_problem(rows, operation) for operation in OPERATIONS):
        raise ValueError(f"rows file {rows_file} holds no times. Expected the rows of a sweep; run `jax-router sweep`.")
    name = gpu_name(rows[-1]["provenance"])
    results.mkdir(parents=True, exist_ok=True)
    record = results / f"sweep-{name}.jsonl"
    record.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows), encoding="utf-8")
    plots = write_plots(rows, results, name)
    counted = results / f"agreement-{name}.json"
    agreement = agreement_report.read_record(counted)
    parts = generated_parts(rows, plots, readme.parent, agreement)
    tables = results / f"sweep-{name}.md"
    text = "\n".join(
        f"<!-- generated: {part} -->\n{text}<!-- end generated: {part} -->\n"
        for part, text in parts.items()
        if part != "agreement"
    )
    tables.write_text(f"# Shape sweep\n\n{_relative_images(text, readme.parent, results)}", encoding="utf-8")
    written = [record, *(path for paths in plots.values() for path in paths), tables]
    if agreement is not None:
        written.append(counted.with_suffix(".md"))
        written[-1].write_text(f"# Agreement with float64\n\n{parts['agreement']}", encoding="utf-8")
    if readme.exists():
        readme.write_text(rewrite(readme.read_text(encoding="utf-8"), parts, readme), encoding="utf-8")
        written.append(readme)
    return written


def rewrite(text: str, parts: dict[str, str], path: Path) -> str:
    """`text` with the parts between `<!-- generated: NAME -->` and `<!-- end generated: NAME -->` replaced.

    Raises:
      ValueError: a marker with an unknown name, or without its other half.
    """
    markers = _MARKER.findall(text)
    for name in markers:
        if name not in parts:
            raise ValueError(
                f"{path} has a marker for {name!r}. Expected one of {', '.join(parts)}; correct the marker."
            )
    if len(markers) != 2 * len(_BLOCK.findall(text)):
        raise ValueError(
            f"{path} has a marker without its other half. Expected `<!-- generated: NAME -->` and later `<!-- end "
            "generated: NAME -->`, each on a line of its own; add the missing one."
        )
    return _BLOCK.sub(lambda block: f"{block[1]}{parts[block['name']]}{block[4]}", text)


def generated_parts(
    rows: Sequence[Row], plots: dict[str, list[Path]], base: Path, agreement: agreement_report.Record | None = None
) -> dict[str, str]:
    """Markdown by the name of its marker.

    provenance, table, plot, models-plot, winners, chain, host, bars, accuracy; of routing: route-table, route-plot,
    route-chain, agreement; of weights [hidden, experts]: layout-table; of float32 weights, which are in no other part
    but provenance and bars: float32-table, float32-accuracy.

    Args:
      base: the folder that links to plots start from.
      agreement: the record of `jax-router agreement` on the same GPU, if there is one.
    """

    def image(plot: str, text: str) -> str:
        if plot not in plots:
            return "Not measured.\n"
        return f"![{text}]({Path(os.path.relpath(plots[plot][0], base)).as_posix()})\n"

    device = rows[-1]["provenance"]["gpu"] or "CPU"
    usual, float32 = by_weights(rows)
    made: dict[str, Callable[[], str]] = {
        "provenance": lambda: _provenance(rows),
        "table": lambda: _headline_table(usual),
        "plot": lambda: image("time-headline", f"Time of the router GEMM against tokens on {device}, with the bounds"),
        "models-plot": lambda: image(
            "time-models", f"Time of the router GEMM against tokens for other models on {device}"
        ),
        "winners": lambda: image("winners", f"Fastest implementation by shape and number of tokens on {device}"),
        "chain": lambda: _chain(usual),
        "host": lambda: _host(usual),
        "bars": lambda: _bars(rows, agreement),
        "accuracy": lambda: _accuracy(usual),
        "layout-table": lambda: _layout_table(usual),
        "float32-table": lambda: _float32_table(float32),
        "float32-accuracy": lambda: _accuracy(float32),
        "route-table": lambda: _route_table(usual),
        "route-plot": lambda: image("route", f"Time of the whole routing against tokens on {device}"),
        "route-chain": lambda: _chain(usual, OPERATIONS[1]),
        "agreement": lambda: "Not measured.\n" if agreement is None else agreement_report.markdown(agreement),
    }
    return {part: make() for part, make in made.items()}


def _relative_images(text: str, start: Path, end: Path) -> str:
    """Links that start from one folder as links that start from another."""

    def moved(match: re.Match[str]) -> str:
        return f"]({Path(os.path.relpath(start / match[1], end)).as_posix()})"

    return re.sub(r"\]\(([^)]+)\)", moved, text)


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    rules = ["---" if column < left else "---:" for column in range(len(header))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rules, *body))


def _provenance(rows: Sequence[Row]) -> str:
    facts = rows[-1]["provenance"]
    dates = sorted(row["provenance"]["date"] for row in rows)
    versions = ", ".join(
        f"{name} {facts[name]}" for name in ("jax", "torch", "numpy", "python", "nvcc") if facts.get(name)
    )
    days = " to ".join(sorted({dates[0][:10], dates[-1][:10]}))
    driver = f", driver {facts['driver']}" if facts.get("driver") else ""
    return f"{facts['gpu'] or 'CPU'}{driver}; {versions}; {days}; sources `{facts['source_hash'][:12]}`.\n"


def _headline_table(rows: Sequence[Row]) -> str:
    """The headline shapes: launches in graph replay beside kernel time through JAX. Cells are warm / cold."""
    problems = by_problem(rows)
    replay = {"cuda": ("cuda",), "cuBLAS": PEERS}
    header = [
        "model", "T", *(f"{name}, replay" for name in replay), "read of the weights, replay",
        *(f"{name}, CUPTI" for name in IMPLEMENTATIONS),
    ]  # fmt: skip
    body = []
    for model, key in headline_shapes(rows).items():
        label = f"{model} ({Shape(key[0], key[1], key[2], (model,)).label})"
        for problem, candidates in sorted(problems.items(), key=lambda item: item[0][5] or 0):
            if problem[:3] != key or problem[5] not in TABLE_TOKENS:
                continue
            cells = [label, str(problem[5])]
            for names in replay.values():
                cells.append(_fastest(candidates, names, ("graph_replay", "torch_replay")))
            cells.append(show(floors(problems, problem)))
            cells += [_fastest(candidates, (name,), ("cupti", "wall")) for name in IMPLEMENTATIONS]
            body.append(cells)
            label = ""
    if not body:
        return f"No rows of {' or '.join(HEADLINE_MODELS)}.\n"
    note = (
        "Microseconds, medians, warm / cold weights. cuBLAS: the faster of PyTorch's bf16 `linear` and its fp32 `mm`."
    )
    return f"{_markdown(header, body)}\n{note}\n"


def _fastest(candidates: dict[str, dict[tuple[str, str], Row]], names: Sequence[str], methods: Sequence[str]) -> str:
    def best(weights: str) -> float | None:
        times = [median(candidates.get(name), method, weights) for name in names for method in methods]
        return min((time for time in times if time is not None), default=None)

    return show((best("warm"), best("cold")))


def _route_table(rows: Sequence[Row]) -> str:
    """The headline models' routing: every implementation, PyTorch, and the router GEMM alone. Cells are warm / cold."""
    gemms, routes = (by_problem(rows, operation) for operation in OPERATIONS)
    replayed = any(("graph_replay", "warm") in candidates.get("cuda", {}) for candidates in routes.values())
    columns = {
        **({"cuda, replay": (("cuda",), ("graph_replay",))} if replayed else {}),
        **{f"{name}, CUPTI": ((name,), ("cupti", "wall")) for name in IMPLEMENTATIONS},
        "PyTorch, replay": (ROUTE_PEERS[:1], ("torch_replay",)),
        "PyTorch compiled, replay": (ROUTE_PEERS[1:], ("torch_replay",)),
    }
    body = []
    headline = route_headline(rows)
    for model in dict.fromkeys(headline.values()):
        label = model
        for problem in sorted((each for each in headline if headline[each] == model), key=lambda each: each[5]):
            if problem not in routes:
                continue
            cells = [_fastest(routes[problem], *column) for column in columns.values()]
            alone = _fastest(gemms.get(problem._replace(rule=None), {}), ("cuda",), ("cupti",))
            body.append([label, str(problem[5]), *cells, alone])
            label = ""
    if not body:
        return "Not measured.\n"
    note = (
        "Microseconds, medians, warm / cold weights, from x to experts and weights. PyTorch: bf16 `linear`, then "
        "scores, `topk` and weights. The last column is the router GEMM alone."
    )
    return f"{_markdown(['model', 'T', *columns, 'cuda, logits alone, CUPTI'], body)}\n{note}\n"


def _layout_table(rows: Sequence[Row]) -> str:
    """What a weight stored [hidden, experts] costs as it is, and what its transpose would cost."""
    body = sweep_layout.table(rows)
    note = (
        "Microseconds of kernels, medians, warm / cold weights (CUPTI). [H, E]: the weight is stored as Flax does, "
        "[hidden, experts]. Behind a transpose: `jr.router_gemm(x, weight.T)` under jit, the transpose in every call."
    )
    table = _markdown(["model", "T", *sweep_layout.COLUMNS], body)
    return f"{table}\n{note}\n" if body else "Not measured.\n"


def _float32_table(rows: Sequence[Row]) -> str:
    """The float32 weights: router GEMMs and routing, beside cuBLAS and XLA in float32."""
    body = sweep_float32.table(rows)
    note = (
        "Microseconds, medians, warm / cold weights. A call in float32 has x in float32 too. cuBLAS: PyTorch's float32 "
        "`linear` without TF32, behind the widening of a bfloat16 x. xla multiplies in float32 too."
    )
    return f"{_markdown(['call', 'T', *sweep_float32.COLUMNS], body)}\n{note}\n" if body else "Not measured.\n"


def _chain(rows: Sequence[Row], operation: str = OPERATIONS[0]) -> str:
    """What a decode step pays: the slope over a jitted chain, with its spread, beside the chain without routing."""
    names = (*IMPLEMENTATIONS, NO_ROUTING)
    body = []
    shapes = {problem_of(row): shape_of(row) for row in rows}
    for problem, candidates in by_problem(rows, operation).items():
        shape = shapes[problem]
        label = f"{shape.hidden}x{shape.experts}" if shape.spec is None else shape.models[0]
        for weights in BOTH:
            cells = []
            for name in names:
                row = candidates.get(name, {}).get(("chain_slope", weights))
                low, middle, high = np.percentile(row["samples_us"], [10, 50, 90]) if row is not None else (0, 0, 0)
                cells.append("-" if row is None else f"{middle:.1f} ({low:.1f} to {high:.1f})")
            if set(cells) != {"-"}:
                body.append([label, str(problem[5]), weights, *cells])
    if not body:
        return "Not measured.\n"
    note = (
        "Microseconds that one more call adds to a jitted chain of routers: medians, 10th to 90th percentile. The last "
        "column is the chain's own elementwise kernel, which the others contain."
    )
    what = "shape" if operation == OPERATIONS[0] else "model"
    table = _markdown([what, "T", "weights", *names[:-1], "chain without routing"], body)
    return f"{table}\n{note}\n"


def _host(rows: Sequence[Row]) -> str:
    """What a call costs the host, and what no call goes below."""
    columns = {
        "cuda, C launcher": ("host_launcher", ("cuda", "empty")),
        "cuda, jitted": ("host_jit", ("cuda", NO_ROUTING)),
        "xla, jitted": ("host_jit", ("xla",)),
        "cuda, eager": ("host_eager", ("cuda",)),
        "xla, eager": ("host_eager", ("xla",)),
    }
    body = []
    shapes = {problem_of(row): shape_of(row) for row in rows}
    for problem, candidates in [each for operation in OPERATIONS for each in by_problem(rows, operation).items()]:
        cells = [_fastest(candidates, names, (method,)) for method, names in columns.values()]
        if set(cells) != {"-"}:
            body.append([shapes[problem].label, "floor" if problem[5] is None else str(problem[5]), *cells])
    if not body:
        return "Not measured.\n"
    note = (
        "Microseconds, medians, that the host spends on a call, which waits for no kernel. The floors: a launch of an "
        "empty kernel, and a jitted function that adds one to one number."
    )
    return f"{_markdown(['call', 'T', *columns], body)}\n{note}\n"


def _bars(rows: Sequence[Row], agreement: agreement_report.Record | None) -> str:
    bars = [*evaluate(rows), agreement_report.bar(agreement, rows[-1]["provenance"]["source_hash"])]
    table = _markdown(["bar", "verdict", "figures"], [[bar.claim, bar.verdict, bar.figures] for bar in bars], left=3)
    return f"{table}\n{sweep_speed.sentence(sweep_speed.geometric_means(rows))}\n"


def _accuracy(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["method"] == "rms" and row["status"] == "ok"]
    if not measured:
        return "Not measured.\n"
    names = list(dict.fromkeys(name for row in measured for name in row["rms_error"]))
    titles = {SGEMM: "float32 SGEMM", "torch_linear": "cuBLAS, bf16 out", "torch_mm_float32": "cuBLAS, fp32 out"}
    body = [
        [
            f"{row['hidden']}x{row['experts']}{shape_of(row).dtypes}", row["weights"],
            *(f"{row['rms_error'][name]:.1e}" if name in row["rms_error"] else "-" for name in names),
        ]
        for row in measured
    ]  # fmt: skip
    return _markdown(["shape", "data", *(titles.get(name, name) for name in names)], body, left=2)


def register(app: typer.Typer) -> None:
    """Add the command to `jax-router`."""
    app.command("report")(report)
