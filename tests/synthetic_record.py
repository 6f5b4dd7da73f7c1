"""Verification records of runs that never were, for the tests of what reads them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import synthetic_rows

from jax_router.verification import gate


def check(name: str, passed: bool | None = True, reason: str | None = None, launches: int = 40) -> dict[str, Any]:
    return {"check": name, "passed": passed, "launches": launches, "seconds": 1.0, "figures": {}, "reason": reason}


def subject(operation: str = "router_gemm", implementation: str = "cuda", **more: Any) -> dict[str, Any]:
    """One that passed everything, 1,000,000 launches under load."""
    names = [name for name in gate.REQUIRED if operation == "route" or name not in gate.OF_ROUTE]
    return {
        "operation": operation,
        "implementation": implementation,
        "models": ["gpt-oss-120b"],
        "source": "random",
        "hidden": 2880,
        "experts": 128,
        "bias": True,
        "dtype": "bfloat16",
        "weight_dtype": None,
        "out_dtype": "float32",
        "rule": {"top_k": 4, "correction_bias": False} if operation == "route" else None,
        "passed": True,
        "launches": 1_000_400,
        "checks": [check(name, launches=1_000_000 if name == "load" else 40) for name in names],
        **more,
    }


def with_check(of: dict[str, Any], name: str, passed: bool | None, reason: str | None = None) -> dict[str, Any]:
    """`of` with the result of one check changed."""
    changed = copy.deepcopy(of)
    (found,) = [each for each in changed["checks"] if each["check"] == name]
    found |= {"passed": passed, "reason": reason}
    return {**changed, "passed": False if passed is False else changed["passed"]}


def record(*subjects: dict[str, Any], **more: Any) -> dict[str, Any]:
    provenance = {**synthetic_rows.PROVENANCE, **more.pop("provenance", {})}
    return {
        "provenance": provenance,
        "library": None,
        "seed": 0,
        "quick": False,
        "minutes": 5.0,
        "interrupted": False,
        "subjects": list(subjects),
        "sanitizers": [{"tool": "memcheck", "passed": True, "reason": None}],
        **more,
    }


def record_of(rows: Iterable[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """One in which both kernels passed on every shape of `rows`."""
    shapes = {}
    for row in rows:
        fields = {name: row.get(name) for name in gate.SUBJECT if name != "implementation"}
        if fields.get("weight_dtype") == row["dtype"]:
            fields["weight_dtype"] = None  # as records have it
        shapes[repr(fields)] = fields
    subjects = [
        subject(**{**fields, "implementation": kernel}) for fields in shapes.values() for kernel in gate.KERNELS
    ]
    return record(*subjects, **more)
