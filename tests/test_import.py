"""Importing jax_router is quick, brings in nothing that is not needed, and the examples of its docstrings run."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys

import pytest

MEASURE = """
import json, sys, time
import jax, jax.numpy
before = set(sys.modules)
started = time.perf_counter()
import jax_router
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""
BAR_SECONDS = 0.2  # what importing jax_router may add to importing jax
RUNS = 3  # the quickest counts: other processes can only make an import slower
HEAVY = ("torch", "flax", "typer", "rich", "click", "matplotlib", "filelock", "platformdirs")


@pytest.fixture(scope="module")
def imports() -> list[dict]:
    command = [sys.executable, "-c", MEASURE]
    return [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(RUNS)]


def test_import_adds_under_a_fifth_of_a_second_to_jax(imports) -> None:
    assert min(run["seconds"] for run in imports) < BAR_SECONDS


def test_import_brings_in_nothing_heavy(imports) -> None:
    modules = imports[0]["modules"]
    heavy = [name for name in modules if name.split(".")[0] in HEAVY or "mosaic" in name or "pallas" in name]
    assert not heavy, f"imported with jax_router: {heavy}"
    kernels = [name for name in modules if name.startswith("jax_router.implementations.")]
    assert not kernels, f"loaded before they are asked for: {kernels}"


def test_the_public_names_are_there() -> None:
    import jax_router

    assert all(hasattr(jax_router, name) for name in jax_router.__all__)
    assert {"router_gemm", "route", "RoutingSpec", "explain", "models", "load_balancing_loss", "verify"} <= set(
        jax_router.__all__
    )


@pytest.mark.parametrize("name", ["ops", "dispatch", "losses", "routing", "nnx.layers", "nnx.lora"])
def test_the_examples_of_the_docstrings_run(name) -> None:
    result = doctest.testmod(importlib.import_module(f"jax_router.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


VERIFY = """
import json, sys
for name in ("torch", "typer", "click", "rich", "matplotlib", "safetensors"):
    sys.modules[name] = None  # as if it were not installed
from jax_router.verification import Verification, supervisor, worker
facts = {"gpu": None, "date": "2026-11-26", "source_hash": "0" * 64}
print(Verification({"subjects": [], "sanitizers": [], "provenance": facts, "interrupted": False}))
worker.run({"options": {"implementations": ["xla"], "models": ["awkward"], "operations": ["router_gemm"],
                        "tokens": [1], "checks": ["bits"]}, "skip": 0}, lambda event, **_: print(event))
"""


def test_verify_needs_nothing_beside_jax_and_numpy() -> None:
    said = subprocess.run([sys.executable, "-c", VERIFY], check=True, capture_output=True, text=True).stdout
    assert "0 launches under load" in said
    assert said.splitlines()[-3:] == ["result", "done", "end"]
