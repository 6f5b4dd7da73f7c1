"""Plots of the report, PNG and SVG: time against tokens with the bounds drawn, and the winner over all shapes.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; every line also carries its name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_router.sweep_figures import Problems, median
from jax_router.sweep_points import IMPLEMENTATIONS, PEERS, ROUTE_PEERS, Shape, rule_key
from jax_router.sweep_rows import Row, by_problem, by_weights, problem_of, shape_of
from jax_router.sweep_table import figures
from jax_router.tables import OPERATIONS

COLORS = {
    "cuda": "#0072B2",
    "pallas": "#E69F00",
    "xla": "#009E73",
    "torch_linear": "#D55E00",
    "torch_mm_float32": "#CC79A7",
    "torch_route": "#D55E00",
    "torch_route_compiled": "#CC79A7",
}
GREY = "#666666"
LABELS = {
    "torch_linear": "cuBLAS, bf16 out",
    "torch_mm_float32": "cuBLAS, fp32 out",
    "torch_route": "PyTorch",
    "torch_route_compiled": "PyTorch, compiled",
}
REPLAY, KERNELS, WALL = "CUDA-graph replay", "GPU kernel time through JAX (CUPTI)", "wall time"
ROUTE = "GPU kernel time through JAX (CUPTI), PyTorch in CUDA-graph replay"
METHODS = {REPLAY: ("graph_replay", "torch_replay"), KERNELS: ("cupti",), WALL: ("wall",)}
ROUTE_METHODS = {ROUTE: ("cupti", "torch_replay"), WALL: ("wall",)}
GEMM_ALONE = "logits alone"

End = tuple[tuple[int, float], str, str]  # of a line: its last (tokens, microseconds), its name, its colour


def write_plots(rows: Sequence[Row], folder: Path, name: str) -> dict[str, list[Path]]:
    """Write every plot that the rows allow, as PNG and SVG, without what has float32 weights.

    Args:
      rows: of one GPU and one source hash.
      name: of the GPU, the beginning of the file names.

    Returns:
      {"time-headline" | "time-models" | "winners" | "route": paths}, without those that the rows hold nothing for.
    """
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    facts = rows[-1]["provenance"]
    rows, _ = by_weights(rows)
    problems, routes = (by_problem(rows, operation) for operation in OPERATIONS)
    shapes, routers = _shapes(rows, problems), _shapes(rows, routes)
    methods = _methods(problems, METHODS)
    headline = [shape for shape in shapes if shape.headline]
    others = [shape for shape in shapes if not shape.headline]
    style: Any = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "jax_router",
        "svg.fonttype": "none", "axes.titlesize": 10, "axes.titlelocation": "left", "font.family": "DejaVu Sans",
    }  # fmt: skip
    written = {}
    with plt.rc_context(style):
        drawn = {
            "time-headline": _time_figure(plt, problems, headline, methods, 2, facts),
            "time-models": _time_figure(plt, problems, others, methods[-1:], 3, facts),
            "winners": _winners_figure(plt, problems, shapes, facts),
            "route": _time_figure(
                plt,
                problems | routes,
                [shape for shape in routers if shape.headline],
                _methods(routes, ROUTE_METHODS)[:1],
                3,
                facts,
            ),
        }
        for plot, figure in drawn.items():
            if figure is None:
                continue
            written[plot] = [folder / f"{name}-{plot}.{suffix}" for suffix in ("png", "svg")]
            for path in written[plot]:
                # Without a date, so that the same rows give the same file.
                figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
            plt.close(figure)
    return written


def _shapes(rows: Sequence[Row], problems: Problems) -> list[Shape]:
    found = dict.fromkeys(shape_of(row) for row in rows if problem_of(row) in problems)
    # The tiny shapes of the interpreter say nothing about time.
    return [shape for shape in found if not shape.models[0].startswith("tiny")]


def _methods(problems: Problems, known: dict[str, tuple[str, ...]]) -> list[str]:
    measured = {method for candidates in problems.values() for rows in candidates.values() for method, _ in rows}
    return [title for title, methods in known.items() if measured.intersection(methods)]


def _time_figure(
    plt: Any, problems: Problems, shapes: list[Shape], methods: list[str], columns: int, facts: Row
) -> Any:
    """One panel per shape and method."""
    panels = [(shape, method) for shape in shapes for method in methods]
    if not panels:
        return None
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = (5.4, 3.7) if columns < 3 else (4.1, 2.9)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows + 0.5), squeeze=False, sharey="all"
    )
    ends = []
    for axis, (shape, method) in zip(axes.flat, panels, strict=False):
        ends.append((axis, _time_panel(axis, problems, shape, method)))
    every = [time for axis, _ in ends for line in axis.lines for time in line.get_ydata()]
    axes[0, 0].set_ylim(min(every) * 0.8, max(every) * 1.3)  # the panels share it
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("microseconds per call")
    for index in range(columns):
        bottom = [axis for axis in axes[:, index] if axis.get_visible()][-1]
        bottom.set_xlabel("tokens")
    states = "solid: cold weights (from memory), thin: warm (in L2)" if methods != [WALL] else "warm weights"
    what = "" if len(methods) > 1 else f"{methods[0]}, "
    operation = "Router GEMM" if shapes[0].spec is None else "Routing"
    figure.suptitle(f"{operation} on {facts['gpu'] or 'a CPU'}, {what}{states}", x=0.01, ha="left", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.99), h_pad=1.5, w_pad=2.0)
    for axis, of_axis in ends:
        _place_labels(axis, of_axis)
    return figure


def _time_panel(axis: Any, problems: Problems, shape: Shape, title: str) -> list[End]:
    """Draw one shape by one method; returns where the lines end."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    of_shape = {p: c for p, c in problems.items() if p[:3] == (shape.hidden, shape.experts, shape.bias)}
    mine = {p[5]: c for p, c in of_shape.items() if p[6] == rule_key(shape.rule)}
    bounds = next((c for p, c in of_shape.items() if p[5] is None), {})
    tokens = sorted(count for count in mine if count is not None)
    methods = (METHODS | ROUTE_METHODS)[title]
    ends: list[End] = []
    for candidate in (*IMPLEMENTATIONS, *PEERS, *ROUTE_PEERS):
        for weights in ("cold", "warm"):
            found = [(count, _time(mine[count].get(candidate), methods, weights)) for count in tokens]
            times = [(count, time) for count, time in found if time is not None]
            if not times:
                continue
            solid = weights == "cold" or title == WALL
            axis.plot(
                *zip(*times, strict=True), color=COLORS[candidate], linewidth=1.9 if solid else 0.9,
                alpha=1 if solid else 0.65, marker="o" if solid else None, markersize=3, zorder=3,
            )  # fmt: skip
            if solid:
                ends.append((times[-1], LABELS.get(candidate, candidate), COLORS[candidate]))
    if shape.spec is not None:
        alone = {p[5]: _time(c.get("cuda"), methods, "cold") for p, c in of_shape.items() if p[6] is None}
        times = [(count, time) for count in tokens if (time := alone.get(count)) is not None]
        if times:
            axis.plot(*zip(*times, strict=True), color=COLORS["cuda"], linestyle="--", linewidth=1.2, zorder=2)
            ends.append((times[-1], GEMM_ALONE, COLORS["cuda"]))
    for name, text, line in (("read_weight", "read of the weights", "--"), ("empty", "empty launch", ":")):
        for weights in ("cold", "warm"):
            floor = median(bounds.get(name), "graph_replay", weights)
            if floor is None or (name == "empty" and weights == "cold"):
                continue
            axis.axhline(floor, color=GREY, linestyle=line, linewidth=1.2 if weights == "cold" else 0.8, zorder=1)
            if name == "empty" or weights == "cold":
                # At the right end, where the curves are far above.
                axis.annotate(
                    text,
                    (0.995, floor),
                    (0, 2),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    color=GREY,
                    fontsize=7.5,
                    ha="right",
                    va="bottom",
                )
    method = f", {title}" if shape.headline and shape.spec is None else ""
    axis.set_title(f"{', '.join(shape.models)}\n{shape.size}{method}")
    ticks = tokens if len(tokens) <= 6 else [count for count in tokens if math.log2(count) % 2 == 0] or tokens
    axis.set_xticks(ticks, [str(count) for count in ticks])
    axis.minorticks_off()
    if tokens:  # room for the names of the lines, as a share of the panel
        names = {name for _, name, _ in ends}
        room = 0.34 if GEMM_ALONE in names else 0.27 if names.intersection(LABELS.values()) else 0.17
        span = max(math.log2(tokens[-1] / tokens[0]), 1.0)
        axis.set_xlim(tokens[0] * 2 ** (-0.04 * span), tokens[-1] * 2 ** (span * room / (1 - room)))
    axis.set_yticks([10.0**power for power in range(-1, 6)], [f"{10.0**power:g}" for power in range(-1, 6)])
    axis.grid(True, axis="y", color="#dddddd", linewidth=0.6)
    return ends


def _time(measurements: dict[tuple[str, str], Row] | None, methods: Sequence[str], weights: str) -> float | None:
    return next((t for method in methods if (t := median(measurements, method, weights)) is not None), None)


def _place_labels(axis: Any, labels: Sequence[End]) -> None:
    """Write every line's name beside its end, pushed apart where the ends are close to each other."""
    gap = 10.5  # points between two names
    pixels = axis.figure.dpi / 72
    ends = sorted((axis.transData.transform(end)[1] / pixels, end, text, color) for end, text, color in labels)
    heights = [end[0] for end in ends]
    for _ in range(50):
        for index in range(1, len(heights)):
            overlap = gap - (heights[index] - heights[index - 1])
            if overlap > 0:
                heights[index - 1] -= overlap / 2
                heights[index] += overlap / 2
    for height, (natural, end, text, color) in zip(heights, ends, strict=True):
        axis.annotate(
            text, end, (6, height - natural), textcoords="offset points", color=color, fontsize=8.5, va="center",
            annotation_clip=False, fontweight="bold" if text == "cuda" else None,
        )  # fmt: skip


def _winners_figure(plt: Any, problems: Problems, shapes: list[Shape], facts: Row) -> Any:
    """A cell per shape and number of tokens: the fastest implementation, and how much faster than the next."""
    times = {problem: figures(candidates) for problem, candidates in problems.items()}
    by_place = {(*problem[:3], problem[5]): found for problem, found in times.items() if found}
    tokens = sorted({place[3] for place in by_place})
    if not tokens:
        return None
    figure, axis = plt.subplots(figsize=(2.6 + 0.62 * len(tokens), 1.7 + 0.42 * len(shapes)))
    for row, shape in enumerate(shapes):
        for column, count in enumerate(tokens):
            found = by_place.get((shape.hidden, shape.experts, shape.bias, count))
            if not found:
                continue
            ranked = sorted(found, key=lambda name: found[name])
            color, ink = COLORS[ranked[0]], "black" if ranked[0] == "pallas" else "white"
            axis.add_patch(plt.Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5))
            text = f"{found[ranked[1]] / found[ranked[0]]:.2f}x" if len(ranked) > 1 else ranked[0]
            axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=ink)
    axis.set_xlim(0, len(tokens))
    axis.set_ylim(len(shapes), 0)
    axis.set_xticks([column + 0.5 for column in range(len(tokens))], [str(count) for count in tokens])
    names = [f"{', '.join(shape.models)}  ({shape.label})" for shape in shapes]
    axis.set_yticks([row + 0.5 for row in range(len(shapes))], names)
    axis.set_xlabel("tokens (empty: not measured)")
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_title(
        f"Fastest implementation on {facts['gpu']}, and how many times the next one takes\n"
        "geometric mean of cold and warm GPU kernel time (CUPTI)"
    )
    seen = [name for name in IMPLEMENTATIONS if any(name in found for found in times.values())]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in seen]
    axis.legend(handles, seen, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.tight_layout()
    return figure
