"""Every implementation against float64, over dtypes, shapes and data, with the derived tolerance of `parity`.

The reference here is numpy's; test_torch_ref.py shows that PyTorch's oracle agrees with it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import pathlib
import random
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import jax_router as jr
from jax_router import dispatch, parity

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
IMPLEMENTATIONS = ("xla", pytest.param("pallas", marks=pytest.mark.gpu), pytest.param("cuda", marks=pytest.mark.gpu))

# Every value of the grid of support; "x" is x's dtype.
FACTORS = {
    "dtypes": (
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
    ),
    "bias": (None, "x", "float32"),
    "out_dtype": ("float32", "x"),
    "data": ("random", "mean", "cancelling", "large"),
    "tokens": (0, 1, 2, 3, 7, 8, 9, 17, 63, 64, 65, 255, 1024),
    "experts": (1, 3, 8, 31, 33, 72, 160, 384, 896),
    "hidden": (8, 72, 720, 2688, 2880, 7168, 16384),
}
# Multiply-adds of one case, so that float64 on two cores takes seconds. 1024 tokens of 16384 fit with 8 experts.
LARGEST = 2**27


interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason=f"Pallas' interpreter needs jax 0.11 for this kernel, this is {jax.__version__}",
)


def in_interpreter(call: str) -> None:
    """Run `module.function()` of these tests with Pallas' interpreter. A deadlock there hangs: hence the time limit."""
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    environment = os.environ | {"JAX_ROUTER_PALLAS_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-c", f"import {call.split('.')[0]}; {call}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclasses.dataclass(frozen=True)
class Case:
    dtypes: tuple[str, str]
    bias: str | None
    out_dtype: str
    data: str
    tokens: int
    experts: int
    hidden: int

    @property
    def problem(self) -> dispatch.Problem:
        dtype, weight_dtype = self.dtypes
        bias, out_dtype = (dtype if name == "x" else name for name in (self.bias, self.out_dtype))
        return dispatch.Problem(self.tokens, self.hidden, self.experts, dtype, weight_dtype, bias, out_dtype)

    def accumulation(self, implementation: str) -> parity.Accumulation:
        multiplied = "float32" if "float32" in self.dtypes else self.dtypes[0]
        platform = dispatch.Device.default().platform
        return parity.accumulation_of(implementation, hidden=self.hidden, dtype=multiplied, platform=platform)


BFLOAT16 = ("bfloat16", "bfloat16")
HEADLINE = tuple(
    Case(BFLOAT16, bias, "float32", "random", tokens, experts, hidden)
    for hidden, experts, bias in ((2880, 128, "x"), (7168, 256, None))
    for tokens in (1, 8, 64)
)


@functools.cache
def covering_cases() -> tuple[Case, ...]:
    """The headline shapes, and cases in which every two values of two factors meet at least once."""
    names, choose = list(FACTORS), random.Random(0)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i, j in itertools.product(range(len(FACTORS[names[a]])), range(len(FACTORS[names[b]])))
    }

    def pairs(row: list[int]) -> set:
        return set(itertools.combinations(enumerate(row), 2)) & missing

    def affordable(row: list[int]) -> bool:
        values = {name: FACTORS[name][i] for name, i in zip(names, row, strict=True)}
        return values["tokens"] * values["experts"] * values["hidden"] <= LARGEST

    cases = list(HEADLINE)
    while missing:
        best = None
        first, second = min(missing)
        while best is None:
            rows = [[choose.randrange(len(FACTORS[name])) for name in names] for _ in range(50)]
            for row in rows:
                row[first[0]], row[second[0]] = first[1], second[1]
            best = max(filter(affordable, rows), key=lambda row: len(pairs(row)), default=None)
        missing -= pairs(best)
        cases.append(Case(**{name: FACTORS[name][i] for name, i in zip(names, best, strict=True)}))
    return tuple(cases)


def cases_of(hidden: int) -> list[Case]:
    return [case for case in covering_cases() if case.hidden == hidden]


@functools.lru_cache(maxsize=40)  # all cases of one hidden size: its implementations run one after another
def data_of(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, parity.Reference]:
    """x, weight, bias and the reference. Columns are in random order, which the second criterion of `parity` needs."""
    generator = np.random.default_rng([case.tokens, case.experts, case.hidden])
    normal = functools.partial(generator.standard_normal, dtype=np.float32)
    x, weight = normal((case.tokens, case.hidden)), normal((case.experts, case.hidden))
    if case.data == "mean":  # partial sums grow all the way
        x, weight = x + 1, weight + 1
    elif case.data == "cancelling":  # products come in opposite pairs but for one pair in eight
        half = case.hidden // 2
        x[:, half:], weight[:, half:] = x[:, :half], -weight[:, :half]
        weight[:, :half:8] *= 1.125
        order = generator.permutation(case.hidden)
        x, weight = x[:, order], weight[:, order]
    if case.data == "large":  # float16: overflows its logits and no input. Others: logits of 2^100.
        scale = 2.0**7 if "float16" in case.dtypes else 2.0**50
        x, weight = x * scale, weight * scale
    else:
        weight = weight / np.sqrt(case.hidden)  # logits of standard deviation 1
    bias = None
    if case.bias is not None:
        bias = normal(case.experts).astype(DTYPES[case.problem.bias_dtype])
    x, weight = (values.astype(DTYPES[dtype]) for values, dtype in zip((x, weight), case.dtypes, strict=True))
    return x, weight, bias, parity.reference(x, weight, bias)


def disagreement(logits: np.ndarray, case: Case, accumulation: parity.Accumulation) -> str | None:
    """What is wrong with the logits of a case, or None. The one check that right and broken implementations meet."""
    agreement = parity.compare(logits, data_of(case)[3], accumulation)
    if logits.dtype != DTYPES[case.problem.out_dtype]:
        return f"{case}: dtype is {logits.dtype}"
    return None if agreement.ok and agreement.unjudged == 0 else f"{case}: {agreement}"


def run(implementation: str, case: Case) -> np.ndarray:
    x, weight, bias, _ = data_of(case)
    out_dtype = DTYPES[case.problem.out_dtype]
    return np.asarray(jr.router_gemm(x, weight, bias, out_dtype=out_dtype, implementation=implementation))


def disagreements(implementation: str, cases: list[Case]) -> list[str]:
    """Run cases. One that the implementation does not take must raise, and say why, unless there is nothing to run."""
    device, wrong = dispatch.Device.default(), []
    for case in cases:
        if case.tokens and dispatch.why_unsupported(case.problem, device, implementation):
            with pytest.raises(NotImplementedError, match=implementation):
                run(implementation, case)
            continue
        wrong.append(disagreement(run(implementation, case), case, case.accumulation(implementation)))
    return [text for text in wrong if text]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("hidden", FACTORS["hidden"])
def test_logits_agree_with_float64(implementation: str, hidden: int) -> None:
    wrong = disagreements(implementation, cases_of(hidden))
    assert not wrong, "\n".join(wrong)


def check_interpreted_pallas() -> None:
    """Run by the test below in a process with a time limit. Sizes below and across one tile of the kernel."""
    halves = (("bfloat16", "bfloat16"), ("float16", "float16"))
    choose = itertools.cycle(itertools.product(halves, FACTORS["bias"], FACTORS["out_dtype"], FACTORS["data"]))
    sizes = itertools.product((0, 1, 9, 17), (1, 8, 72), (8, 72))
    wrong = disagreements("pallas", [Case(*factors, *size) for factors, size in zip(choose, sizes, strict=False)])
    assert not wrong, "\n".join(wrong)


@interpreted
def test_logits_of_interpreted_pallas_agree_with_float64() -> None:
    in_interpreter("test_parity.check_interpreted_pallas()")


def test_every_two_values_of_the_grid_meet() -> None:
    cases = covering_cases()
    for (name_a, values_a), (name_b, values_b) in itertools.combinations(FACTORS.items(), 2):
        met = {(getattr(case, name_a), getattr(case, name_b)) for case in cases}
        assert met >= set(itertools.product(values_a, values_b)), (name_a, name_b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inf_and_nan_stay_in_their_rows(implementation: str, dtype: str) -> None:
    case = Case((dtype, dtype), "float32", "float32", "random", 33, 33, 720)
    x, weight, bias, _ = data_of(case)
    x = x.copy()
    x[3], x[5, 17], x[9, 0], x[11, 8], x[20, 719] = np.nan, np.inf, -np.inf, np.nan, np.inf
    x[20, 718] = -np.inf
    spoiled = [3, 5, 9, 11, 20]
    logits = np.asarray(jr.router_gemm(x, weight, bias, implementation=implementation))
    accumulation = case.accumulation(implementation)
    agreement = parity.compare(logits, parity.reference(x, weight, bias), accumulation)
    assert agreement.ok, agreement
    assert np.flatnonzero(~np.isfinite(logits).all(1)).tolist() == spoiled
    assert np.isnan(logits[[3, 11]]).all()
    assert np.isinf(logits[[5, 9]]).all()

    weight = weight.copy()
    weight[[2, 30], [5, 700]] = np.nan, np.inf  # and in the columns of their experts
    logits = np.asarray(jr.router_gemm(data_of(case)[0], weight, bias, implementation=implementation))
    assert np.flatnonzero(~np.isfinite(logits).all(0)).tolist() == [2, 30]
    kept = np.delete(np.arange(33), [2, 30])
    kept_truth = parity.reference(data_of(case)[0], weight[kept], bias[kept])
    assert parity.compare(logits[:, kept], kept_truth, accumulation).ok
