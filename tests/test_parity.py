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
from collections.abc import Collection

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


# A right implementation next to every fault that a tolerance of 1e-2 or a cosine cannot see.
def exact(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    logits = x.astype(np.float32) @ weight.astype(np.float32).T
    return logits if bias is None else logits + bias.astype(np.float32)


def last_k_tile_dropped(x, weight, bias):
    return exact(x[:, :-64], weight[:, :-64], bias)


def one_product_lost(x, weight, bias):
    return exact(x[:, :-1], weight[:, :-1], bias)


def one_stale_k_tile_of_one_token(x, weight, bias):
    logits = exact(x, weight, bias)
    stale = np.concatenate([x[:1, :64], x[:1, :64], x[:1, 128:]], 1)  # the tile of the stage before
    logits[0] = exact(stale, weight, bias)[0]
    return logits


def logits_rounded_to_bfloat16(x, weight, bias):
    return exact(x, weight, bias).astype(ml_dtypes.bfloat16).astype(np.float32)


def sum_of_halves_in_bfloat16(x, weight, bias):
    half = x.shape[1] // 2
    parts = exact(x[:, :half], weight[:, :half], None), exact(x[:, half:], weight[:, half:], bias)
    return sum(part.astype(ml_dtypes.bfloat16).astype(np.float32) for part in parts)


def bias_of_the_next_expert(x, weight, bias):
    return exact(x, weight, np.roll(bias, 1))


def last_expert_not_written(x, weight, bias):
    logits = exact(x, weight, bias)
    logits[:, -1] = 0
    return logits


def nan_becomes_zero(x, weight, bias):
    return np.nan_to_num(exact(x, weight, bias))


FAULTS = (
    last_k_tile_dropped,
    one_product_lost,
    one_stale_k_tile_of_one_token,
    logits_rounded_to_bfloat16,
    sum_of_halves_in_bfloat16,
    bias_of_the_next_expert,
    last_expert_not_written,
)


# What each implementation is granted on each platform, so that no allowance hides a fault.
ALLOWANCES = (parity.float32_chain, parity.tensor_core_chain, parity.slice_tree, parity.split_tree)


@pytest.mark.parametrize("data", ["random", "mean", "cancelling"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_sees(fault, data: str) -> None:
    for case in (dataclasses.replace(HEADLINE[2], data=data), dataclasses.replace(HEADLINE[5], data=data, bias="x")):
        x, weight, bias, _ = data_of(case)
        for allowance in ALLOWANCES:
            accumulation = allowance(case.hidden)
            assert disagreement(exact(x, weight, bias), case, accumulation) is None
            assert disagreement(fault(x, weight, bias), case, accumulation) is not None, (allowance, case)


@pytest.mark.parametrize("kept_bits", [7, 10], ids=["one bfloat16 pass", "TF32"])
def test_the_check_sees_float32_multiplied_in_fewer_bits(kept_bits: int) -> None:
    case = dataclasses.replace(HEADLINE[5], dtypes=("float32", "float32"))

    def shortened(values: np.ndarray) -> np.ndarray:
        return (values.view(np.uint32) & np.uint32(-(1 << (23 - kept_bits)) & 0xFFFFFFFF)).view(np.float32)

    x, weight, bias, _ = data_of(case)
    chain = parity.float32_chain(case.hidden)
    assert disagreement(exact(x, weight, bias), case, chain) is None
    assert disagreement(exact(shortened(x), shortened(weight), bias), case, chain) is not None


def bfloat16_terms(values: np.ndarray) -> list[np.ndarray]:
    """v1, v2 and v3 of a float32, which add up to it."""
    terms, rest = [], values.astype(np.float32)
    for _ in range(3):
        terms.append(rest.astype(ml_dtypes.bfloat16).astype(np.float32))
        rest = rest - terms[-1]
    assert not rest.any()
    return terms


SMALLER = ((0, 1), (1, 0), (0, 2), (1, 1), (2, 0))  # products of x's terms i and the weight's j, from 0, beside (0, 0)


def split_product(x: np.ndarray, weight: np.ndarray, left_out: Collection[tuple[int, int]] = ()) -> np.ndarray:
    """Slices of 64, high + low in float32; high is of the terms (0, 0), low of `SMALLER` but for what is left out."""
    logits = np.zeros((len(x), len(weight)), np.float32)
    for start in range(0, x.shape[1], 64):
        of_x, of_weight = (bfloat16_terms(values[:, start : start + 64]) for values in (x, weight))
        high, low = np.zeros_like(logits), np.zeros_like(logits)
        for step in range(0, 64, 16):
            high += of_x[0][:, step : step + 16] @ of_weight[0][:, step : step + 16].T
        for i, j in SMALLER:
            if (i, j) not in left_out:
                low += of_x[i] @ of_weight[j].T
        logits += high + low
    return logits


@pytest.mark.parametrize("data", ["random", "mean", "cancelling"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_check_sees_products_of_split_float32_left_out(dtype: str, data: str) -> None:
    case = dataclasses.replace(HEADLINE[3], tokens=64, experts=64, hidden=2048, dtypes=(dtype, "float32"), data=data)
    x, weight, _, truth = data_of(case)
    tree, of_one = parity.split_tree(case.hidden), parity.split_tree(1)
    assert disagreement(split_product(x, weight), case, tree) is None
    assert disagreement(split_product(x, weight, SMALLER), case, tree) is not None
    one = np.where(np.arange(case.hidden) == np.arange(case.tokens)[:, None], x, np.zeros_like(x))
    truth_of_one = parity.reference(one, weight)
    assert parity.compare(split_product(one, weight), truth_of_one, of_one).ok
    for smallest in ((0, 2), (1, 1), (2, 0)) if dtype == "float32" else ((0, 2),):
        # Thousands are sums far above their spread, or cancel, and what is left out of them with them.
        agreement = parity.compare(split_product(x, weight, [smallest]), truth, tree)
        assert (agreement.outside, agreement.ok) == (0, data != "random"), agreement
        assert parity.compare(split_product(one, weight, [smallest]), truth_of_one, of_one).outside > 0


def additions_of_the_tree(hidden: int, slice_units: int) -> int:
    """Of csrc/reduction_tree.cuh, as it is walked there: the most additions that a product passes on its way."""
    units = -(-hidden // 64)
    begins = [units * group // 16 for group in range(17)]
    per_group = [-(-(end - begin) // slice_units) for begin, end in itertools.pairwise(begins)]
    # A group starts with its first slice; each of four levels adds neighbours; the bias comes last.
    return max(per_group) - 1 + 4 + 1


@pytest.mark.parametrize("hidden", [8, 16, 720, 1024, 1032, 2048, 2056, 2880, 3072, 7168, 16384, 65536])
def test_the_bounds_count_the_additions_of_the_trees(hidden: int) -> None:
    tree, split = parity.slice_tree(hidden), parity.split_tree(hidden)
    assert tree == parity.Accumulation(additions_of_the_tree(hidden, 2), min(-(-hidden // 16), 8))
    # Of a slice of one unit up to four steps, and its smaller products.
    assert split.rounded == additions_of_the_tree(hidden, 1) + min(-(-hidden // 16), 4)
    assert (split.truncated, split.infinities) == (2, False)


def test_the_tree_of_split_float32_is_that_of_cuda_on_a_gpu() -> None:
    assert parity.accumulation_of("cuda", hidden=3072, dtype="float32", platform="gpu") == parity.split_tree(3072)
    for name, platform in (("xla", "gpu"), ("torch", "gpu"), ("cuda", "cpu")):
        chain = parity.accumulation_of(name, hidden=3072, dtype="float32", platform=platform)
        assert chain == parity.float32_chain(3072)


def test_what_splits_float32_may_answer_infinity_with_nan_and_with_nothing_else() -> None:
    x, weight = np.array([[1, 1], [np.inf, 1], [-np.inf, 1], [np.nan, 1]], np.float32), np.ones((2, 2), np.float32)
    truth, tree = parity.reference(x, weight), parity.split_tree(2)
    logits = exact(x, weight, None)
    assert parity.compare(logits, truth, tree).ok
    of_nan = np.where(np.isinf(logits), np.float32(np.nan), logits)
    assert parity.compare(of_nan, truth, tree).ok
    assert parity.compare(of_nan, truth, parity.float32_chain(2)).outside == 4
    for wrong in (-logits, np.nan_to_num(logits), np.where(np.isnan(logits), np.float32(np.inf), logits)):
        assert not parity.compare(wrong, truth, tree).ok
    assert parity.compare(np.full_like(logits, np.nan), truth, tree).outside == 2


def test_nan_is_not_zero_and_inf_has_a_sign() -> None:
    x = np.array([[1, np.nan], [1, 1], [np.inf, 1], [-np.inf, 1], [np.inf, -np.inf]], np.float32)
    weight, chain = np.ones((2, 2), np.float32), parity.float32_chain(2)
    truth = parity.reference(x, weight)
    with np.errstate(invalid="ignore"):
        logits = exact(x, weight, None)
        assert parity.compare(logits, truth, chain).ok
        assert parity.compare(nan_becomes_zero(x, weight, None), truth, chain).outside == 8
        assert parity.compare(-logits, truth, chain).outside == 6


def test_float16_overflows_where_the_cast_does_and_nowhere_else() -> None:
    values = np.array([[65504.0, 65519.0, 65520.0, 70000.0, -70000.0]], np.float32)
    x, chain = np.ones((1, 1), np.float32), parity.float32_chain(1)
    truth = parity.reference(x, values.T)
    with np.errstate(over="ignore"):
        logits = values.astype(np.float16)
    assert np.isinf(logits).tolist() == [[False, False, True, True, True]]
    assert parity.compare(logits, truth, chain).ok
    clipped = np.clip(logits, -65504, 65504)
    assert parity.compare(clipped, truth, chain).outside == 2  # 65520 is on the edge: both are right
