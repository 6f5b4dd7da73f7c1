"""The table of float32 weights in the report."""

from __future__ import annotations

from collections.abc import Sequence

from jax_router.sweep_figures import median
from jax_router.sweep_points import BOTH, FLOAT32_PEER
from jax_router.sweep_rows import Row, by_problem, problem_of, shape_of
from jax_router.sweep_summary import floors, show
from jax_router.tables import OPERATIONS

# The columns of times but for the read of the weights, and the candidate and the method of each.
TIMES = {
    "cuda, replay": ("cuda", "graph_replay"),
    "cuBLAS, replay": (FLOAT32_PEER, "torch_replay"),
    "cuda, CUPTI": ("cuda", "cupti"),
    "xla, CUPTI": ("xla", "cupti"),
}
COLUMNS = (*TIMES, "read of the weights, replay")


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line per call and number of tokens of rows with float32 weights: both, then microseconds by COLUMNS."""
    gemms, body = by_problem(rows), []
    shapes = {problem_of(row): shape_of(row) for row in rows}
    for operation in OPERATIONS:
        for problem, candidates in by_problem(rows, operation).items():
            times = [
                [median(candidates.get(name), method, weights) for weights in BOTH] for name, method in TIMES.values()
            ]
            if problem.tokens is not None:
                cells = [*(show((warm, cold)) for warm, cold in times), show(floors(gemms, problem))]
                body.append([shapes[problem].label, str(problem.tokens), *cells])
    return body
