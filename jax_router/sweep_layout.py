"""Weights stored [hidden, experts] in the sweep: read as they are, or transposed in front of every call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from jax_router.sweep_bars import headline_shapes
from jax_router.sweep_figures import median
from jax_router.sweep_points import BOTH, HIDDEN_EXPERTS, LAYOUT_TOKENS, TRANSPOSED, weight_layout_of
from jax_router.sweep_rows import Row, by_problem
from jax_router.sweep_summary import show
from jax_router.timing import Call

# The columns of times, and the candidate of each.
COLUMNS = {
    "cuda, [H, E]": "cuda_hidden_experts",
    "cuda behind a transpose, [H, E]": TRANSPOSED,
    "xla, [H, E]": "xla_hidden_experts",
    "cuda, [E, H]": "cuda",
    "xla, [E, H]": "xla",
}


def layout_calls() -> dict[str, Call]:
    """The public operation on a weight [H, E], as (x, weight, bias) -> logits, by candidate."""
    from jax_router.ops import router_gemm

    def call(candidate: str, x: jax.Array, weight: jax.Array, bias: Any) -> jax.Array:
        given = weight.T if candidate == TRANSPOSED else weight
        layout = weight_layout_of(candidate)
        return router_gemm(x, given, bias, weight_layout=layout, implementation=HIDDEN_EXPERTS[candidate])

    return {name: functools.partial(call, name) for name in HIDDEN_EXPERTS}


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line per headline model and number of tokens: both, then CUPTI microseconds, warm / cold, by COLUMNS."""
    problems, body = by_problem(rows), []
    for model, shape in headline_shapes(rows).items():
        measured = {key[5]: found for key, found in problems.items() if key[:3] == shape}
        for tokens in LAYOUT_TOKENS:
            found = measured.get(tokens, {})
            if HIDDEN_EXPERTS.keys() & found.keys():
                times = [[median(found.get(name), "cupti", weights) for weights in BOTH] for name in COLUMNS.values()]
                body.append([model, str(tokens), *(show((warm, cold)) for warm, cold in times)])
    return body
