"""The bars that the project sets itself, evaluated from rows: met, not met, or not measured, with the worst case."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from jax_router import dispatch, sweep_speed
from jax_router.sweep_figures import Bar, Problems, median, worst
from jax_router.sweep_points import (
    BOTH,
    FLOAT32_WEIGHTS,
    HEADLINE_MODELS,
    NO_ROUTING,
    RMS,
    ROUTE_CHAIN_TOKENS,
    ROUTE_HEADLINE_MODELS,
    SPARSE_TOKENS,
    ProblemKey,
    spec_of,
)
from jax_router.sweep_rows import Row, by_problem, by_weights, comparable, problem_of, shape_of
from jax_router.sweep_table import figures, table_path
from jax_router.tables import OPERATIONS
from jax_router.verification import gate, standing

SMALL_TOKENS = (1, 2, 4, 8, 16, 32, 64)
PALLAS_TOKENS = (16, 32, 64, 128, 256)
ROUTE_SPEEDUPS = ((1, 64, 3), (256, 4096, 2))  # from, to tokens: how many times faster than xla
ROUTE_OVER_GEMM = 1.6
SAME_KERNEL = ("cuda", "pallas")  # implementations whose routing stands behind their router GEMM
SGEMM = "float32_sgemm"

Chooser = Callable[[ProblemKey], str]


def evaluate(rows: Sequence[Row], chosen: Chooser | None = None) -> list[Bar]:
    """Every bar of the headline suite. `chosen` maps a problem's key to an implementation; None asks the dispatcher."""
    rows, float32 = by_weights(comparable(rows)[0])
    problems = by_problem(rows)
    headline = headline_shapes(rows)
    bars = [_checks("every point passes its check against float64 before it is timed", rows)]
    bars.append(_never_slower_than_xla(problems))
    for model in HEADLINE_MODELS:
        of_model = [row for row in rows if (row["hidden"], row["experts"], row["bias"]) == headline.get(model)]
        bars.append(_rms(f"cuda's RMS error at most float32 SGEMM's, {model}, two kinds of data", of_model, 1))
    for model in HEADLINE_MODELS:
        bars.append(_pallas(problems, model, headline.get(model)))
    bars += sweep_speed.router_gemm_bars(problems, headline)
    chooser, note = chosen or _dispatcher(rows), "" if chosen else _which_table(rows)
    bars.append(_dispatch("the dispatcher's choice within", problems, chooser, note))
    routes = by_problem(rows, OPERATIONS[1])
    routed = route_headline(rows)
    for fewest, most, times in ROUTE_SPEEDUPS:
        for method in ("cupti", "chain_slope"):
            bars.append(_route_versus_xla(routes, routed, method, fewest, most, times))
    for name in SAME_KERNEL:
        bars.append(_route_versus_gemm(routes, problems, routed, name))
    bars += sweep_speed.route_bars(routes, problems, routed)
    bars.append(_dispatch("the dispatcher's choice for route within", routes, chooser, note))
    of_float32 = "float32 weights: "
    bars.append(_checks(f"{of_float32}no point fails its check against float64", float32))
    claim = f"{of_float32}cuda's RMS error at most float32 SGEMM's, every shape, two kinds of data"
    bars.append(_rms(claim, float32, len(FLOAT32_WEIGHTS)))
    return bars


def headline_shapes(rows: Iterable[Row]) -> dict[str, tuple[Any, ...]]:
    """(hidden, experts, bias) of each headline model in the rows."""
    found = {}
    for row in rows:
        for model in HEADLINE_MODELS:
            if model in row["models"] and row.get("rule") is None:
                found[model] = (row["hidden"], row["experts"], row["bias"])
    return found


def route_headline(rows: Iterable[Row]) -> dict[ProblemKey, str]:
    """The headline models of `route` in the rows by their problems."""
    return {
        problem_of(row): model
        for row in rows
        for model in ROUTE_HEADLINE_MODELS
        if model in row["models"] and row.get("rule") is not None
    }


def _checks(claim: str, rows: Sequence[Row]) -> Bar:
    checks = [row for row in rows if row["method"] == "check" and row["status"] != "skipped"]
    failed = [row for row in checks if row["status"] == "failed"]
    if not checks:
        return Bar(claim, None, "no rows")
    names = ", ".join(f"{row['candidate']} {_place(row)}" for row in failed[:3])
    return Bar(claim, not failed, f"{len(failed)} of {len(checks)} failed{': ' + names if names else ''}")


def _place(row: Row) -> str:
    route = "" if row.get("rule") is None else f"route of {row['models'][0]} "
    return f"{route}{row['hidden']}x{row['experts']} T={row['tokens']}"


def _versus_xla(problems: Problems, name: str, wanted: Callable[[ProblemKey], bool]) -> dict[str, float]:
    ratios = {}
    for problem, candidates in problems.items():
        for weights in BOTH:
            ours, xla = (median(candidates.get(each), "cupti", weights) for each in (name, "xla"))
            if wanted(problem) and ours is not None and xla is not None:
                ratios[f"{problem[0]}x{problem[1]} T={problem[5]} {weights}"] = ours / xla
    return ratios


def _never_slower_than_xla(problems: Problems) -> Bar:
    def wanted(problem: ProblemKey) -> bool:
        return problem[5] is not None and problem[5] <= 1024

    with_xla = [
        (problem, weights)
        for problem, candidates in problems.items()
        if wanted(problem)
        for weights in BOTH
        if median(candidates.get("xla"), "cupti", weights) is not None
    ]
    claim = "cuda never slower than xla on any shape, T <= 1024 (CUPTI)"
    return worst(claim, _versus_xla(problems, "cuda", wanted), 1.0, len(with_xla), "x")


def _pallas(problems: Problems, model: str, shape: tuple[Any, ...] | None) -> Bar:
    ratios = _versus_xla(problems, "pallas", lambda problem: problem[:3] == shape and problem[5] in PALLAS_TOKENS)
    return worst(f"pallas faster than xla, {model}, T = 16..256 (CUPTI)", ratios, 1.0, len(PALLAS_TOKENS) * 2, "x")


def _rms(claim: str, rows: Sequence[Row], shapes: int) -> Bar:
    """Of so many shapes; of several the figures name each."""
    ratios = {}
    for row in rows:
        errors = row["rms_error"] if row["method"] == "rms" and row["status"] == "ok" else {}
        if "cuda" in errors and SGEMM in errors:
            place = row["weights"] if shapes == 1 else f"{shape_of(row).size} {row['weights']}"
            figures = f"(cuda {errors['cuda']:.2e}, float32 SGEMM {errors[SGEMM]:.2e})"
            ratios[f"{place} {figures}"] = errors["cuda"] / errors[SGEMM]
    return worst(claim, ratios, 1.0, shapes * len(RMS), "x")


def _route_versus_xla(
    routes: Problems, headline: dict[ProblemKey, str], method: str, fewest: int, most: int, times: int
) -> Bar:
    ratios = {}
    for problem, model in headline.items():
        candidates = routes.get(problem, {})
        for weights in BOTH:
            ours, xla = (median(candidates.get(name), method, weights) for name in ("cuda", "xla"))
            # The chain's own kernel is in both; nothing is in kernel times but the call.
            chain = median(candidates.get(NO_ROUTING), method, weights) if method == "chain_slope" else 0.0
            if fewest <= problem[5] <= most and None not in (ours, xla, chain):
                net, net_xla = ours - chain, xla - chain  # type: ignore[operator]
                ratios[f"{model} T={problem[5]} {weights}"] = net / net_xla if net_xla > 0 else float("inf")
    tokens = ROUTE_CHAIN_TOKENS if method == "chain_slope" else SPARSE_TOKENS
    expected = len(ROUTE_HEADLINE_MODELS) * sum(fewest <= count <= most for count in tokens) * len(BOTH)
    how = {"cupti": "CUPTI for both", "chain_slope": "chain slope without the chain's own kernel"}[method]
    claim = f"route: cuda at least {times}x faster than xla, T = {fewest}..{most}, warm and cold ({how})"
    return worst(claim, ratios, 1 / times, expected, "x")


def _route_versus_gemm(routes: Problems, problems: Problems, headline: dict[ProblemKey, str], name: str) -> Bar:
    ratios = {}
    for problem, model in headline.items():
        gemm = problems.get(problem._replace(rule=None), {})
        for weights in BOTH:
            route, alone = (median(each.get(name), "cupti", weights) for each in (routes.get(problem, {}), gemm))
            if problem[5] <= SMALL_TOKENS[-1] and route is not None and alone is not None:
                ratios[f"{model} T={problem[5]} {weights}"] = route / alone
    expected = len(ROUTE_HEADLINE_MODELS) * sum(count <= SMALL_TOKENS[-1] for count in SPARSE_TOKENS) * len(BOTH)
    claim = f"route at most {ROUTE_OVER_GEMM}x router_gemm, both {name}, T = 1..64 (CUPTI)"
    return worst(claim, ratios, ROUTE_OVER_GEMM, expected, "x")


def _dispatch(claim: str, problems: Problems, chosen: Chooser, note: str) -> Bar:
    ratios = {}
    for problem, candidates in problems.items():
        found = figures(candidates)
        if found:
            name = chosen(problem)
            # A choice that was not measured here is as bad as it gets: nothing vouches for it.
            ratio = found[name] / min(found.values()) if name in found else float("inf")
            ratios[f"{problem[0]}x{problem[1]} T={problem[5]} ({name})"] = ratio
    bar = worst(f"{claim} 3% of the best implementation (CUPTI)", ratios, 1.03, None, "x")
    return replace(bar, figures=bar.figures + note) if ratios else bar


def _which_table(rows: Sequence[Row]) -> str:
    """What the dispatcher knew: a table of these very rows agrees with them by construction."""
    if not rows or not rows[-1]["provenance"].get("gpu"):
        return ""
    provenance = rows[-1]["provenance"]
    path = table_path(provenance["gpu"])
    if not path.exists():
        twin = dispatch.load_table(provenance["gpu"])
        return "; no table, by the heuristic" if twin is None else f"; by {twin.name}"
    measured = json.loads(path.read_text(encoding="utf-8")).get("provenance", {}).get("date")
    return "; table written from this run" if measured == provenance["date"] else f"; table of {measured}"


def _dispatcher(rows: Sequence[Row]) -> Chooser:
    """The choice on the rows' GPU with the tables of this tree, and without this process's environment."""
    provenance = rows[-1]["provenance"] if rows else {}
    kind = provenance.get("gpu") or ""
    device = dispatch.Device("gpu", kind, provenance.get("compute_capability"))
    table = dispatch.load_table(kind)
    # The user's own record, like the environment, is not of the machine that was measured.
    verification = standing.judge(kind, table, None, source_hash=gate.present_hash())

    def chosen(key: ProblemKey) -> str:
        problem = dispatch.Problem(
            tokens=key.tokens,
            hidden=key.hidden,
            experts=key.experts,
            dtype=key.dtype,
            weight_dtype=key.weight_dtype,
            bias_dtype=key.dtype if key.bias else None,
            out_dtype=key.out_dtype,
            spec=spec_of(key.rule),
        )
        choice = dispatch.choose(problem, device, environment={}, table=table, verification=verification)
        return choice.implementation

    return chosen
