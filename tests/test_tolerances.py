"""The yardstick itself: bounds, units and bit comparison of `parity`."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from test_parity import DTYPES
from test_parity_check import exact

from jax_router import parity

shapes = st.tuples(st.integers(1, 9), st.integers(1, 200), st.integers(1, 9))
dtypes = st.sampled_from(sorted(DTYPES))
quick = hypothesis.settings(max_examples=60, deadline=None)


def problem(
    shape: tuple[int, int, int], dtype: str, scale: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, hidden, experts = shape
    generator = np.random.default_rng(seed)
    sizes = ((tokens, hidden), (experts, hidden), (experts,))
    x, weight, bias = (generator.standard_normal(size).astype(DTYPES[dtype]) for size in sizes)
    return np.ldexp(x.astype(np.float32), scale).astype(x.dtype), weight, bias


@quick
@hypothesis.given(shapes, dtypes, st.integers(-10, 10), dtypes, st.integers(0, 2**32 - 1))
def test_float32_arithmetic_agrees_in_every_order(shape, dtype, scale, out_dtype, seed) -> None:
    x, weight, bias = problem(shape, dtype, scale, seed)
    truth, chain = parity.reference(x, weight, bias), parity.float32_chain(shape[1])
    order = np.random.default_rng(seed).permutation(shape[1])
    one_by_one = np.zeros(truth.logits.shape, np.float32)
    for k in order:
        one_by_one += x[:, k, None].astype(np.float32) * weight[:, k].astype(np.float32)
    for logits in (exact(x, weight, bias), one_by_one + bias.astype(np.float32), truth.logits):
        with np.errstate(over="ignore"):
            agreement = parity.compare(logits.astype(DTYPES[out_dtype]), truth, chain)
        assert agreement.ok, agreement


@quick
@hypothesis.given(shapes, dtypes, dtypes, st.floats(1.01, 100), st.sampled_from([-1, 1]), st.integers(0, 2**32 - 1))
def test_an_error_above_the_tolerance_is_seen_and_located(shape, dtype, out_dtype, factor, sign, seed) -> None:
    x, weight, bias = problem(shape, dtype, 0, seed)
    truth, chain = parity.reference(x, weight, bias), parity.float32_chain(shape[1])
    at = (seed % shape[0], seed % shape[2])
    # sqrt(2 log(2 N / FALSE_ALARM)) <= 7.2 for N <= 81. The logit and the end of its interval are rounded to out_dtype.
    magnitude, expected = truth.magnitude[at], truth.logits[at]
    tolerance = 7.2 * np.sqrt(shape[1] + 1) * 2.0**-24 * magnitude + shape[1] * 2.0**-124
    tolerance += 2.1 * float(parity.output_rounding(abs(expected) + tolerance, DTYPES[out_dtype]))
    logits = truth.logits.copy()
    logits[at] += sign * factor * tolerance
    agreement = parity.compare(logits.astype(DTYPES[out_dtype]), truth, chain)
    assert (agreement.outside, agreement.worst_at, agreement.ok) == (1, at, False)


@quick
@hypothesis.given(shapes, st.integers(-20, 20), st.integers(0, 2**32 - 1))
def test_units_do_not_depend_on_scale_or_order(shape, scale, seed) -> None:
    x, weight, _ = problem(shape, "float32", 0, seed)
    logits, chain = exact(x, weight, None), parity.float32_chain(shape[1])
    plain = parity.compare(logits, parity.reference(x, weight), chain)
    scaled = parity.compare(np.ldexp(logits, scale), parity.reference(np.ldexp(x, scale), weight), chain)
    assert scaled.worst_units == pytest.approx(plain.worst_units)
    assert scaled.rms_units == pytest.approx(plain.rms_units)
    rows = np.random.default_rng(seed).permutation(shape[0])
    shuffled = parity.compare(logits[rows], parity.reference(x[rows], weight), chain)
    assert shuffled.worst_units == pytest.approx(plain.worst_units, abs=1e-6)
    assert plain.rms_units <= plain.worst_units * (1 + 1e-12)
    assert plain.rms_error <= plain.worst_error * (1 + 1e-12)


@quick
@hypothesis.given(dtypes, st.integers(1, 30), st.integers(1, 9), st.sets(st.integers(0, 29)), st.integers(0, 2**32 - 1))
def test_differing_rows_are_those_with_a_flipped_bit(dtype, rows, columns, flipped, seed) -> None:
    generator = np.random.default_rng(seed)
    unsigned = np.dtype(f"u{np.dtype(DTYPES[dtype]).itemsize}")
    pattern = generator.integers(0, np.iinfo(unsigned).max, (rows, columns), unsigned, endpoint=True)  # NaN, inf, all
    flipped = sorted(row for row in flipped if row < rows)
    other = pattern.copy()
    for row in flipped:
        other[row, generator.integers(columns)] ^= unsigned.type(1 << generator.integers(unsigned.itemsize * 8))
    assert parity.differing_rows(pattern.view(DTYPES[dtype]), other.view(DTYPES[dtype])).tolist() == flipped


def test_bits_tell_zeros_apart_and_nan_payloads_on_request() -> None:
    zeros = np.array([[0.0], [0.0]], np.float32), np.array([[0.0], [-0.0]], np.float32)
    assert parity.differing_rows(*zeros).tolist() == [1]
    nans = np.array([[0x7FC00000], [0x3F800000]], np.uint32).view(np.float32)
    others = np.array([[0x7FFFFFFF], [0x3F800000]], np.uint32).view(np.float32)
    assert parity.differing_rows(nans, others).tolist() == [0]
    assert parity.differing_rows(nans, others, nan_payloads=False).tolist() == []


def test_sizes_and_dtypes_that_do_not_fit_are_refused() -> None:
    x, weight = np.ones((2, 4), np.float32), np.ones((3, 4), np.float32)
    truth = parity.reference(x, weight)
    with pytest.raises(ValueError, match=r"logits has shape \(3, 2\).*\(2, 3\).*Expected.*pass"):
        parity.compare(np.ones((3, 2), np.float32), truth, parity.float32_chain(4))
    with pytest.raises(ValueError, match=r"x has shape \(4,\).*Expected 2 dimensions; flatten"):
        parity.reference(x[0], weight)
    with pytest.raises(ValueError, match=r"actual is float32\[2, 4\].*float16\[2, 4\].*Expected the same"):
        parity.differing_rows(x, x.astype(np.float16))


def test_sums_that_may_overflow_float32_are_not_judged() -> None:
    x, weight = np.array([[2.0**127, -(2.0**127), 1]], np.float32), np.ones((1, 3), np.float32) * 2
    truth = parity.reference(x, weight)
    agreement = parity.compare(np.array([[np.nan]], np.float32), truth, parity.float32_chain(3))
    assert agreement.logits == 0
    assert agreement.unjudged == 1
    assert agreement.ok
