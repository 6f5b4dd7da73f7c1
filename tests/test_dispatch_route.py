"""The choice for `route`: by its own times, and without them by what XLA makes of it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_dispatch import A100, CPU, DOCUMENT, H200, entry, kernels, times

import jax_router as jr
from jax_router import dispatch, implementations, tables
from jax_router.dispatch import Problem, choose

__all__ = ["kernels"]  # the fixture: both kernels take every problem on an H200

SPEC = jr.RoutingSpec(top_k=4, score_function="softmax_topk")
GEMM = Problem(tokens=8, hidden=2880, experts=128, bias_dtype="bfloat16")
ROUTE = dataclasses.replace(GEMM, spec=SPEC)
BOTH = {
    "entries": [
        *DOCUMENT["entries"],
        {**entry(8, "xla", cuda=times(9, 9), xla=times(7, 7)), "operation": "route", "rule": {"top_k": 8}},
        {**entry(64, "cuda", cuda=times(5, 5), xla=times(9, 9)), "operation": "route", "rule": {"top_k": 8}},
    ]
}


def test_each_operation_goes_by_its_own_times() -> None:
    table = tables.Table.parse(BOTH, "nvidia_h200.json")
    gemm, route = (choose(problem, H200, environment={}, table=table) for problem in (GEMM, ROUTE))
    assert (gemm.implementation, gemm.reason) == ("pallas", "3.00 us at tokens=8 in nvidia_h200.json")
    assert (route.implementation, route.reason) == ("xla", "7.00 us for route at tokens=8 in nvidia_h200.json")
    assert dict(route.rejected) == {
        "cuda": "took 9.00 us for route at tokens=8 in nvidia_h200.json",
        "pallas": "has no verified time for route at tokens=8 in nvidia_h200.json",
    }
    many = dataclasses.replace(ROUTE, tokens=200)
    assert (
        choose(many, H200, environment={}, table=table).reason == "5.00 us for route at tokens=64 in nvidia_h200.json"
    )


def test_the_rule_does_not_matter_for_the_choice_but_for_what_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    table = tables.Table.parse(BOTH)
    for spec in (SPEC, jr.RoutingSpec(top_k=1, score_function="sigmoid")):
        assert table.nearest(dataclasses.replace(ROUTE, spec=spec)).microseconds == {"xla": 7, "cuda": 9}
    too_many = lambda problem, device: f"takes k up to 2, not {problem.spec.top_k}" if problem.spec.top_k > 2 else None  # noqa: E731
    monkeypatch.setattr(implementations.load("cuda"), "why_unsupported", too_many)
    many = dataclasses.replace(ROUTE, tokens=64)
    choice = choose(many, H200, environment={}, table=table)
    assert (choice.implementation, dict(choice.rejected)["cuda"]) == ("xla", "takes k up to 2, not 4")
    fewer = dataclasses.replace(many, spec=jr.RoutingSpec(top_k=2))
    assert choose(fewer, H200, environment={}, table=table).implementation == "cuda"


def test_an_entry_without_an_operation_is_one_of_the_router_gemm() -> None:
    table = tables.Table.parse(DOCUMENT)
    assert table.nearest(GEMM).tokens == 8
    assert table.nearest(ROUTE) is None
    named = {"entries": [{**each, "operation": "router_gemm"} for each in DOCUMENT["entries"]]}
    assert tables.Table.parse(named) == table


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(ROUTE, experts=32),
        dataclasses.replace(ROUTE, hidden=2888),
        dataclasses.replace(ROUTE, dtype="float16"),
        dataclasses.replace(ROUTE, bias_dtype=None),
        dataclasses.replace(ROUTE, weight_dtype="float32"),
    ],
    ids=str,
)
def test_the_table_says_nothing_about_the_routing_of_another_shape(other: Problem) -> None:
    assert tables.Table.parse(BOTH).nearest(other) is None
    assert choose(other, H200, environment={}, table=tables.Table.parse(BOTH)).implementation == "cuda"


def test_an_unknown_operation_breaks_the_table() -> None:
    document = copy.deepcopy(BOTH)
    document["entries"][-1]["operation"] = "topk"
    with pytest.raises(ValueError, match="operation is 'topk', not one of router_gemm, route"):
        tables.Table.parse(document)


@pytest.mark.parametrize("tokens", [1, 15, 257, 4097, 2**20])
def test_the_heuristic_takes_a_fused_kernel_wherever_one_runs(tokens: int) -> None:
    problem = Problem(tokens, 2880, 256, spec=SPEC)
    choice = choose(problem, H200, environment={})
    assert choice.implementation == "cuda"
    assert "XLA needs four to eight and a sort" in choice.reason
    assert choose(problem, H200, environment={}, unavailable={"cuda": "is broken"}).implementation == "pallas"
    for device in (A100, CPU):
        assert choose(problem, device, environment={}).implementation == "xla"
    assert choose(Problem(0, 2880, 256, spec=SPEC), H200, environment={}).implementation == "xla"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setattr(tables.importlib.resources, "files", lambda package: tmp_path)
    tables.load_table.cache_clear()
    yield tmp_path
    tables.load_table.cache_clear()


def test_explain_of_a_spec_names_the_times_of_route(folder: Path) -> None:
    (folder / "nvidia_h200.json").write_text(json.dumps(BOTH))
    problem = {"tokens": 8, "hidden": 2880, "experts": 128, "bias": True, "device": H200}
    assert str(jr.explain(**problem, spec=SPEC)).splitlines() == [
        "xla: 7.00 us for route at tokens=8 in nvidia_h200.json",
        "  not cuda: took 9.00 us for route at tokens=8 in nvidia_h200.json",
        "  not pallas: has no verified time for route at tokens=8 in nvidia_h200.json",
    ]
    assert jr.explain(**problem).reason == "3.00 us at tokens=8 in nvidia_h200.json"
    assert dispatch.explain(**problem, spec=SPEC) == choose(
        ROUTE, H200, environment={}, table=tables.Table.parse(BOTH, "nvidia_h200.json")
    )
