"""A tuned configuration runs at exactly the problem it was measured on, with exactly the kernels that were measured."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_dispatch import H200, PROBLEM, entry, kernels, times

import jax_router as jr
from jax_router import build, dispatch, tables
from jax_router.dispatch import Problem, choose
from jax_router.verification import gate

__all__ = ["kernels"]  # the fixture: both kernels take every problem on an H200

HERE, ELSEWHERE = "a" * 64, "b" * 64
SHAPE = {"hidden": 2880, "experts": 128, "dtype": "bfloat16", "bias": True, "out_dtype": "float32"}
RULE = {"top_k": 4, "score_function": "softmax_topk", "correction_bias": False}
SPEC = jr.RoutingSpec(top_k=4, score_function="softmax_topk")
ROUTE = dataclasses.replace(PROBLEM, spec=SPEC)
REASON = "4.00 us at tokens=8 in t.json; configuration few, measured 5.0% faster than the launcher's one at tokens=8"


def tuned(tokens: int, winner: str, pick: str = "one", **more: Any) -> dict[str, Any]:
    found = {name: {"verified": True, "warm_us": [[1.0]], "cold_us": [[1.0]]} for name in ("one", "few", "fused")}
    shape = {"operation": "router_gemm", **SHAPE, "tokens": tokens}
    return {**shape, "pick": pick, "winner": winner, "gain": 0.05, "configs": found, **more}


DOCUMENT = {
    "gpu": "NVIDIA H200",
    "entries": [
        entry(8, "cuda", cuda=times(4, 4), xla=times(6, 6)),
        entry(64, "xla", cuda=times(9, 9), xla=times(6, 6)),
        {**entry(8, "cuda", cuda=times(4, 4), xla=times(6, 6)), "operation": "route", "rule": RULE},
    ],
    "configs": {
        "provenance": {"gpu": "NVIDIA H200"},
        "source_hash": HERE,
        "entries": [
            tuned(8, "few"),
            tuned(16, "one"),
            tuned(64, "few"),
            tuned(8, "fused", pick="two_launches", operation="route", rule=RULE),
        ],
    },
}
TABLE = tables.Table.parse(DOCUMENT, "t.json")


def chosen(problem: Problem, table: tables.Table = TABLE, source_hash: str | None = HERE, **more: Any) -> Any:
    return choose(problem, H200, environment={}, table=table, source_hash=source_hash, **more)


def test_the_winner_of_exactly_this_problem_runs_and_the_reason_says_so() -> None:
    choice = chosen(PROBLEM)
    assert (choice.implementation, choice.config_name, choice.config) == ("cuda", "few", None)
    assert choice.reason == f"{REASON} in t.json"
    assert chosen(ROUTE).config_name == "fused"


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(PROBLEM, tokens=7),
        dataclasses.replace(PROBLEM, weight_dtype="float32"),
        dataclasses.replace(PROBLEM, dtype="float32"),
        dataclasses.replace(PROBLEM, tokens=16),  # the pick won
        dataclasses.replace(PROBLEM, hidden=2888),
        dataclasses.replace(PROBLEM, experts=32),
        dataclasses.replace(PROBLEM, dtype="float16", bias_dtype="float16"),
        dataclasses.replace(PROBLEM, bias_dtype=None),
        dataclasses.replace(PROBLEM, out_dtype="bfloat16"),
        dataclasses.replace(PROBLEM, weight_layout="hidden_experts"),  # which a configuration may not take
        dataclasses.replace(ROUTE, tokens=9),
        dataclasses.replace(ROUTE, spec=jr.RoutingSpec(top_k=8, score_function="softmax_topk")),
    ],
    ids=str,
)
def test_everything_else_is_left_to_the_launcher(other: Problem) -> None:
    choice = chosen(other, implementation="cuda")
    assert (choice.implementation, choice.config_name) == ("cuda", None)
    assert "configuration" not in choice.reason


def test_configurations_of_a_twin_are_left_alone() -> None:
    twin = dataclasses.replace(H200, kind="NVIDIA H100 80GB HBM3")
    choice = choose(PROBLEM, twin, environment={}, table=TABLE, source_hash=HERE)
    assert (choice.implementation, choice.config_name) == ("cuda", None)


def test_a_configuration_is_for_the_kernel_that_has_it() -> None:
    problem = dataclasses.replace(PROBLEM, tokens=64)
    assert chosen(problem, implementation="cuda").config_name == "few"
    for choice in (chosen(problem), chosen(PROBLEM, implementation="pallas"), chosen(PROBLEM, implementation="xla")):
        assert choice.implementation != "cuda"
        assert choice.config_name is None
        assert "configuration" not in choice.reason


@pytest.mark.parametrize("source_hash", [ELSEWHERE, None])
def test_configurations_of_other_kernels_are_ignored(source_hash: str | None) -> None:
    choice = chosen(PROBLEM, source_hash=source_hash)
    assert (choice.implementation, choice.reason) == ("cuda", "4.00 us at tokens=8 in t.json")
    assert choice.config_name is None


@pytest.mark.parametrize("place", [0, 4])
def test_where_two_rules_of_one_spec_disagree_the_launcher_picks(place: int) -> None:
    document = copy.deepcopy(DOCUMENT)
    rule = {**RULE, "correction_bias": True}
    other = tuned(8, "two_launches", pick="two_launches", operation="route", rule=rule)
    document["configs"]["entries"].insert(place, other)
    table = tables.Table.parse(document)
    assert chosen(ROUTE, table).config_name is None
    assert chosen(PROBLEM, table).config_name == "few"


def test_an_unverified_winner_makes_the_table_a_broken_one() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["configs"]["entries"][0]["configs"]["few"] = {"verified": False, "reason": "row 0 has other bits"}
    with pytest.raises(ValueError, match="configuration 'few' won without being verified"):
        tables.Table.parse(document)


# In this process -------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(cuda_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The table of the GPU of `cuda_module` in a folder, and a library with three configurations of sources HERE."""
    monkeypatch.setattr(tables.importlib.resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(cuda_module, "config_names", lambda operation: ("one", "fused", "few"))
    monkeypatch.setattr(gate, "present_hash", lambda: HERE)
    monkeypatch.delenv(build.LIBRARY_VARIABLE, raising=False)
    path = tmp_path / "nvidia_h200_of_a_test.json"
    document = copy.deepcopy(DOCUMENT) | {"gpu": "NVIDIA H200 of a test"}
    document["configs"]["provenance"]["gpu"] = "NVIDIA H200 of a test"
    path.write_text(json.dumps(document))
    tables.load_table.cache_clear()
    yield path
    tables.load_table.cache_clear()


def traced(tokens: int, spec: jr.RoutingSpec | None = None) -> set[str]:
    """The numbers of configurations in what JAX traces."""
    operands = [jnp.zeros(shape, jnp.bfloat16) for shape in ((tokens, 2880), (128, 2880), 128)]
    operation = jr.router_gemm if spec is None else functools.partial(jr.route, spec=spec)
    return set(re.findall(r"\('config', (?:np\.int32\()?(-?\d+)", str(jax.make_jaxpr(operation)(*operands))))


def test_the_custom_call_gets_the_number_of_the_configuration(installed: Path) -> None:
    assert (traced(8), traced(8, SPEC)) == ({"2"}, {"1"})
    assert (traced(9), traced(9, SPEC)) == ({"-1"}, {"-1"})


@pytest.mark.parametrize("change", ["sources", "library"])
def test_kernels_of_unknown_or_other_sources_are_left_to_their_launcher(
    change: str, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "sources":
        monkeypatch.setattr(gate, "present_hash", lambda: ELSEWHERE)
    else:
        monkeypatch.setenv(build.LIBRARY_VARIABLE, "/tmp/mine.so")
    device = dispatch.Device("gpu", "NVIDIA H200 of a test", "9.0")
    assert dispatch.resolve(PROBLEM, device).config is None
    assert jr.explain(tokens=8, hidden=2880, experts=128, bias=True, device=device).config_name is None


def test_explain_shows_the_configuration(installed: Path) -> None:
    device = dispatch.Device("gpu", "NVIDIA H200 of a test", "9.0")
    choice = jr.explain(tokens=8, hidden=2880, experts=128, bias=True, device=device)
    assert "configuration few, measured 5.0% faster than the launcher's one at tokens=8 in" in str(choice)


def test_a_configuration_that_the_library_lacks_warns_once_and_is_left_to_the_launcher(
    installed: Path, cuda_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_module, "config_names", lambda operation: ("one",))
    device = dispatch.Device("gpu", "NVIDIA H200 of a test", "9.0")
    with pytest.warns(RuntimeWarning, match="configuration few of router_gemm, which the kernels do not have") as said:
        assert [dispatch.resolve(PROBLEM, device).config for _ in range(2)] == [None, None]
    assert len(said) == 1
