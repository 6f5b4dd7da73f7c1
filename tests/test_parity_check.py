"""The check of parity itself: it sees every planted fault beside a right implementation, and counts what trees add."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection

import ml_dtypes
import numpy as np
import pytest
from test_parity import HEADLINE, data_of, disagreement

from jax_router import parity


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
