"""How fast `cuda` is to be beside its peers and the read of the weights: bars, and geometric means of all ratios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_router.sweep_figures import Bar, Problems, median, worst
from jax_router.sweep_points import (
    ALL_TOKENS,
    BOTH,
    PEERS,
    READ_WEIGHT,
    ROUTE_FEW_TOKENS,
    SPARSE_TOKENS,
    ProblemKey,
    geometric_mean,
)
from jax_router.sweep_rows import Row, by_problem, by_weights, comparable
from jax_router.tables import OPERATIONS

READ, CUBLAS, XLA = "the read of the weights", "cuBLAS", "xla"
FEW_TOKENS = 64


@dataclass(frozen=True)
class Limit:
    """The most that `cuda` may take beside `peer`, from `fewest` to `most` tokens."""

    fewest: int
    most: int
    peer: str
    ratio: float


# CUDA-graph replay, like everything against cuBLAS.
ROUTER_GEMM = {
    "gpt-oss-120b": (
        Limit(1, 32, READ, 1.6), Limit(1, FEW_TOKENS, CUBLAS, 0.5), Limit(128, 128, CUBLAS, 0.5),
        Limit(512, 512, CUBLAS, 0.75), Limit(1024, 16384, CUBLAS, 1.0),
    ),
    "DeepSeek-V3": (
        Limit(1, 16, READ, 1.6), Limit(32, 32, READ, 1.8), Limit(1, FEW_TOKENS, CUBLAS, 0.5),
        Limit(128, 128, CUBLAS, 0.7), Limit(512, 512, CUBLAS, 0.9), Limit(1024, 16384, CUBLAS, 1.0),
    ),
}  # fmt: skip
OTHER_ROUTER_GEMM = (Limit(1, FEW_TOKENS, CUBLAS, 0.6), Limit(1, 16384, CUBLAS, 1.0))
# Replay beside the read, CUPTI beside XLA, which has no replay here.
ROUTE = {
    "gpt-oss-120b": (Limit(1, FEW_TOKENS, READ, 2.2), Limit(4096, 4096, XLA, 0.4)),
    "DeepSeek-V3": (Limit(1, FEW_TOKENS, READ, 2.4), Limit(4096, 4096, XLA, 0.5)),
}
OTHER_ROUTE = (Limit(1, FEW_TOKENS, XLA, 1 / 3),)

_REPLAY, _CUPTI = "graph_replay", "cupti"


def router_gemm_bars(problems: Problems, headline: Mapping[str, tuple[Any, ...]]) -> list[Bar]:
    """Bars of `router_gemm`: of the headline models, {model: (hidden, experts, bias)}, and of all other shapes."""
    bars = []
    for model, limits in ROUTER_GEMM.items():
        of_model = {key: found for key, found in problems.items() if key[:3] == headline.get(model)}
        bars += [_bar("router_gemm", model, limit, of_model, problems, _REPLAY, ALL_TOKENS) for limit in limits]
    others = {key: found for key, found in problems.items() if key[:3] not in headline.values()}
    of = "every other shape"
    return bars + [
        _bar("router_gemm", of, limit, others, problems, _REPLAY, SPARSE_TOKENS) for limit in OTHER_ROUTER_GEMM
    ]


def route_bars(routes: Problems, problems: Problems, headline: Mapping[ProblemKey, str]) -> list[Bar]:
    """Bars of `route`: of the headline models, {problem: model}, and of all other routers."""
    bars = []
    for model, limits in ROUTE.items():
        of_model = {key: found for key, found in routes.items() if headline.get(key) == model}
        for limit in limits:
            method = _beside_the_read(of_model) if limit.peer == READ else _CUPTI
            bars.append(_bar("route", model, limit, of_model, problems, method, SPARSE_TOKENS))
    others = {key: found for key, found in routes.items() if headline.get(key) not in ROUTE}
    of = "every other router"
    return bars + [_bar("route", of, limit, others, problems, _CUPTI, ROUTE_FEW_TOKENS) for limit in OTHER_ROUTE]


def _beside_the_read(routes: Problems) -> str:
    """How `route` is measured beside the read: in rows from before it was replayed, by CUPTI."""
    measured = {method for candidates in routes.values() for method, _ in candidates.get("cuda", {})}
    return _CUPTI if _CUPTI in measured and _REPLAY not in measured else _REPLAY


def _bar(
    operation: str, of: str, limit: Limit, measured: Problems, gemms: Problems, method: str, of_suite: Sequence[int]
) -> Bar:
    """The read of the weights is found in `gemms`. Every shape of the suite has at least the tokens `of_suite`."""
    ratios, points = {}, 0
    for key, candidates in measured.items():
        if key[5] is not None and limit.fewest <= key[5] <= limit.most:
            points += len(BOTH)
            for weights, ratio in _ratios(key, measured, gemms, limit.peer, method):
                place = "" if of in ROUTER_GEMM else f"{_place(key, candidates)} "  # one model needs no name
                ratios[f"{place}T={key[5]} {weights}"] = ratio
    in_suite = len(BOTH) * sum(limit.fewest <= tokens <= limit.most for tokens in of_suite)
    by_cupti = "CUPTI; the read by replay" if limit.peer == READ else "CUPTI for both"
    how = "graph replay" if method == _REPLAY else by_cupti
    tokens = f"T = {limit.fewest}" if limit.fewest == limit.most else f"T = {limit.fewest}..{limit.most}"
    claim = f"{operation}: cuda at most {limit.ratio:.3g}x {limit.peer}, {of}, {tokens}, warm and cold ({how})"
    return worst(claim, ratios, limit.ratio, max(points, in_suite), "x")


def _place(key: ProblemKey, candidates: dict[str, dict[tuple[str, str], Row]]) -> str:
    """Of a problem, for figures: sizes of a router GEMM, the first model of a router."""
    if key[6] is None:
        return f"{key[0]}x{key[1]}{' +bias' if key[2] else ''}"
    return next(row["models"][0] for found in candidates.values() for row in found.values())


def _ratios(
    key: ProblemKey, measured: Problems, gemms: Problems, peer: str, method: str
) -> Iterator[tuple[str, float]]:
    """("warm" or "cold", cuda over the peer) of one problem, as far as both were measured."""
    for weights in BOTH:
        ours, theirs = median(measured[key].get("cuda"), method, weights), _peer(peer, key, measured, gemms, weights)
        if ours is not None and theirs is not None:
            yield weights, ours / theirs


def _peer(peer: str, key: ProblemKey, measured: Problems, gemms: Problems, weights: str) -> float | None:
    if peer == READ:
        return median(gemms.get(key._replace(tokens=None, rule=None), {}).get(READ_WEIGHT), _REPLAY, weights)
    candidates = measured[key]
    if peer == XLA:
        return median(candidates.get("xla"), _CUPTI, weights)
    # Against the faster of both, so one of them alone says nothing.
    times = [median(candidates.get(each), "torch_replay", weights) for each in PEERS]
    return None if None in times else min(time for time in times if time is not None)


@dataclass(frozen=True)
class Mean:
    """The geometric mean of `count` ratios of `cuda` to a peer."""

    what: str
    ratio: float
    count: int


def geometric_means(rows: Sequence[Row]) -> list[Mean]:
    """Of `cuda` to each peer, over all shapes and numbers of tokens, warm and cold; those that were measured.

    Not those with float32 weights.
    """
    rows, _ = by_weights(comparable(rows)[0])
    gemms, routes = (by_problem(rows, operation) for operation in OPERATIONS)
    compared = (
        ("router_gemm to cuBLAS, replay", gemms, CUBLAS, _REPLAY),
        ("router_gemm to jitted xla, CUPTI", gemms, XLA, _CUPTI),
        ("route to jitted xla, CUPTI", routes, XLA, _CUPTI),
    )
    means = []
    for what, problems, peer, method in compared:
        tokens = [key for key in problems if key[5] is not None]
        ratios = [ratio for key in tokens for _, ratio in _ratios(key, problems, gemms, peer, method)]
        if ratios:
            means.append(Mean(what, geometric_mean(ratios), len(ratios)))
    return means


def sentence(means: Sequence[Mean]) -> str:
    """All of them in one sentence, or that there are none."""
    if not means:
        return "Geometric means: not measured."
    each = "; ".join(f"{mean.what} {mean.ratio:.3f} ({mean.count} figures)" for mean in means)
    return f"Geometric means of cuda's time over a peer's, all shapes and numbers of tokens, warm and cold: {each}."
