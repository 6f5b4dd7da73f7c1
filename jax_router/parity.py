"""How well logits agree with the truth: errors against float64 in units of the float32 bound, and row bits.

numpy only, so that the same yardstick measures every implementation, PyTorch and a deliberately broken kernel. One
logit is `sum_i p_i + b` with products `p_i = x_i * weight_i`, `S = sum p_i`, `A = sum |p_i|`, `V = sum p_i^2`.

**The unit.** `unit = sqrt(hidden) * 2^-23 * (A + |b|)`: what `hidden` float32 additions lose when their errors are
unrelated (Higham & Mary 2019, SIAM J. Sci. Comput. 41(5)). 2^-23 is the spacing of float32 and not half of it, because
tensor cores truncate where IEEE additions round. Errors are reported as multiples of it, whatever the output dtype.

**The tolerance** has no constant of its own. It follows from how an implementation adds (`Accumulation`: the number of
rounded additions `d` and of truncating tensor-core steps `m` on the way of a product) and from `FALSE_ALARM`:

1. Every logit. An addition errs by at most `u = 2^-24` of its result, which is at most `(1 + u)^d A`. If errors have
   mean zero given the ones before them, the error of a logit is a martingale and stays below
   `lambda sqrt(d) u (1 + u)^d A` but for a probability `2 exp(-lambda^2 / 2)` (Azuma's inequality; Ipsen & Zhou 2020,
   SIAM J. Matrix Anal. Appl. 41(4)). For N logits to do so but for a probability FALSE_ALARM,
   `lambda = sqrt(2 log(2 N / FALSE_ALARM))`, which is 7.5 for N = 1000.
   Truncation is no random walk, its errors have one sign: each step is granted its largest error. A Hopper step adds 16
   products to the accumulator with at least 2 extra bits (Li et al. 2024, arXiv 2403.00232): 17 addends lose at most
   2^-25 of the largest one each, the sum at most 2^-23, together `(1 + 17 / 4) 2^-23` of A.
   Rounding to the output dtype is monotone, so a logit is right exactly when it lies between the rounded ends of
   `[reference - error, reference + error]`. That covers half an ulp, subnormals and the overflow to inf at once.
2. All logits together. (1) must allow every p_i to push the same way; data in no particular order does not. If each
   order of the p_i is as likely as any other, the mean square of the error `sum p_i theta_i`, theta_i the rounding on
   the way of product i, is at most `d u^2 (S^2 + V)`: common additions of two products act on S^2, those of one on V.
   Likewise `(m (1 + 17 / 4) 2^-23)^2 (S^2 + V)` for truncation. For sub-Gaussian errors the mean over N logits of
   `error^2 / bound^2` exceeds `1 + 2 sqrt(a / N) + 2 a / N`, `a = log(1 / FALSE_ALARM)`, with probability FALSE_ALARM
   at most (Hsu, Kakade & Zhang 2012, Electron. Commun. Probab. 17). This one is sqrt(hidden) times tighter than (1) on
   random data and sees logits rounded to 16 bits or one lost product.

>>> import numpy as np
>>> x, weight = np.ones((2, 8), np.float32), np.ones((3, 8), np.float32)
>>> truth = reference(x, weight)
>>> compare(x @ weight.T, truth, float32_chain(hidden=8)).ok
True
>>> compare(x[:, :7] @ weight[:, :7].T, truth, float32_chain(hidden=8)).ok
False
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FALSE_ALARM = 1e-9  # probability that a right implementation fails one comparison: once in millions of test runs

UNIT_SPACING = 2.0**-23  # relative spacing of float32
ROUNDING = 2.0**-24  # largest relative error of one float32 operation that rounds to nearest
TENSOR_CORE_PRODUCTS = 16  # products that one step adds to the accumulator
TRUNCATION = (1 + (TENSOR_CORE_PRODUCTS + 1) / 4) * 2.0**-23  # largest relative error of one such step
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLUSHED = 2.0**-126  # CPUs and GPUs may turn float32 values below this into zero

# Significand bits and the exponent of the smallest subnormal. numpy's finfo does not know bfloat16.
_SIGNIFICAND_AND_SUBNORMAL = {"float32": (24, -149), "float16": (11, -24), "bfloat16": (8, -133)}


@dataclass(frozen=True)
class Accumulation:
    """How a float32 accumulation goes wrong: operations that a product passes on its way to the output, at most."""

    rounded: int  # float32 operations that round to nearest; their errors are unrelated
    truncated: int = 0  # tensor-core steps in one chain; their errors have one sign
    infinities: bool = True  # an infinite logit comes as what it is; else it may come as NaN


def float32_chain(hidden: int) -> Accumulation:
    """Any order of float32 multiplications and additions: one multiplication, hidden - 1 additions, the bias."""
    return Accumulation(rounded=hidden + 1)


def tensor_core_chain(hidden: int) -> Accumulation:
    """16-bit inputs on tensor cores, K in one chain or in splits of any kind: XLA's and cuBLAS's choice, not ours."""
    steps = math.ceil(hidden / TENSOR_CORE_PRODUCTS)
    return Accumulation(rounded=steps + 1, truncated=steps)


def slice_tree(hidden: int, *, slice_products: int = 128, groups: int = 16) -> Accumulation:
    """The tree of csrc/reduction_tree.cuh: slices by the tensor core; slices, pair, pairs and bias added in float32."""
    slices_per_group = math.ceil(math.ceil(hidden / groups) / slice_products) + 1  # a cut off the slice grid adds one
    truncated = math.ceil(min(hidden, slice_products) / TENSOR_CORE_PRODUCTS)
    return Accumulation(rounded=slices_per_group + 1 + groups // 2 + 1, truncated=truncated)


def split_tree(hidden: int) -> Accumulation:
    """The same tree over slices of 64 products of float32, each split into products of bfloat16 terms.

    `v = v1 + v2 + v3` by rounding to nearest, so that |v2| <= 2^-8 |v| and |v3| <= 2^-16 |v|. Of a slice every step
    sums up x1 w1 from zero, and float32 additions join the steps. One chain adds the smaller products, at most
    2^-7 (1 + 2^-6) of |x w|, in at most twenty steps, and one addition joins both. What the steps lose to
    |x1 w1| > |x w|, what the chain loses, and what is left out (x2 w3, x3 w2, x3 w3, at most 2^-23 of |x w|) are
    together less than one more step of x1 w1 may lose.
    Exact splits need elements whose last bit counts 2^-133 at least, as every float32 from 2^-110 on has.
    """
    tree = slice_tree(hidden, slice_products=64)
    joined = tree.truncated  # additions: between the steps of a slice, and the chain
    return Accumulation(rounded=tree.rounded + joined, truncated=1 + 1, infinities=False)


def accumulation_of(implementation: str, *, hidden: int, dtype: str, platform: str) -> Accumulation:
    """What may be expected of an implementation ("cuda", "pallas", "xla", "torch") on "cpu" or "gpu".

    Args:
      implementation: any name; only "cuda" promises more than its platform does.
      hidden: columns of x.
      dtype: what is multiplied: "float32" as soon as x or weight is.
      platform: "cpu" or "gpu".
    """
    if platform == "gpu" and implementation == "cuda":
        return split_tree(hidden) if dtype == "float32" else slice_tree(hidden)
    return float32_chain(hidden) if platform == "cpu" or dtype == "float32" else tensor_core_chain(hidden)


@dataclass(frozen=True)
class Reference:
    """The truth about one problem, float64 arrays [tokens, experts]. Compute it once, compare many logits with it."""

    hidden: int
    logits: NDArray[np.float64]
    magnitude: NDArray[np.float64]  # |x| @ |weight|.T + |bias|
    spread: NDArray[np.float64]  # sqrt(S^2 + V) of the module's docstring

    @property
    def unit(self) -> NDArray[np.float64]:
        """The float32 bound of every logit, `sqrt(hidden) * 2^-23 * (|x| @ |weight|.T + |bias|)`."""
        return math.sqrt(self.hidden) * UNIT_SPACING * self.magnitude


def reference(x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> Reference:
    """`x @ weight.T + bias` in float64, where every product of two inputs of at most 24 bits is exact.

    Args:
      x: [tokens, hidden], bfloat16, float16 or float32; inf and NaN allowed.
      weight: [experts, hidden].
      bias: [experts] or None.

    Raises:
      ValueError: x or weight is not two-dimensional.
    """
    x, weight = _float64(x), _float64(weight)
    for name, value in (("x", x), ("weight", weight)):
        if value.ndim != 2:
            raise ValueError(f"{name} has shape {value.shape}. Expected 2 dimensions; flatten the leading ones.")
    bias = np.zeros(weight.shape[0]) if bias is None else _float64(bias)
    with np.errstate(invalid="ignore", over="ignore"):
        products = x @ weight.T
        return Reference(
            hidden=x.shape[1],
            logits=products + bias,
            magnitude=np.abs(x) @ np.abs(weight).T + np.abs(bias),
            spread=np.sqrt(products**2 + (x**2) @ (weight**2).T),
        )


def output_rounding(values: NDArray[np.float64], dtype: np.dtype) -> NDArray[np.float64]:
    """Half an ulp of `dtype` at most, at `values`: relative where the dtype is normal, absolute where it is not."""
    significand, subnormal = _SIGNIFICAND_AND_SUBNORMAL[np.dtype(dtype).name]
    return 2.0**-significand * np.abs(values) + 2.0 ** (subnormal - 1)


def logit_bound(truth: Reference, accumulation: Accumulation, logits: int) -> NDArray[np.float64]:
    """What float32 logits [tokens, experts] may be off by, on data in random order: the smaller of two bounds.

    (1) holds for any data. By (2) the error of sub-Gaussian roundings deviates from the truth by `lambda` times what
    its mean square may be, with the same probability FALSE_ALARM over all `logits` that are compared. The arrays of
    `truth` may be those of another namespace, as JAX's.
    """
    xp = truth.logits.__array_namespace__()
    lambda_, flushed = _deviations(logits), _flushed(truth.hidden)
    rounded = 2 * ROUNDING * abs(truth.logits)  # the addition of the bias, and the last one of all
    by_spread = lambda_ * _random_order(accumulation) * truth.spread + rounded
    return xp.minimum(truth.magnitude * _any_order(accumulation, lambda_), by_spread) + flushed


def _deviations(logits: int) -> float:
    """lambda: all of that many errors stay below so many deviations but for a probability FALSE_ALARM."""
    return math.sqrt(2 * math.log(2 * max(logits, 1) / FALSE_ALARM))


def _flushed(hidden: int) -> float:
    """Flushing loses at most 2^-126 for each multiplication and addition."""
    return (2 * hidden + 2) * FLUSHED


def _any_order(accumulation: Accumulation, lambda_: float) -> float:
    """(1), in units of the magnitude."""
    walk = lambda_ * math.sqrt(accumulation.rounded) * ROUNDING * (1 + ROUNDING) ** accumulation.rounded
    return walk + accumulation.truncated * TRUNCATION


def _random_order(accumulation: Accumulation) -> float:
    """Root of the mean square of (2), in units of the spread."""
    return ROUNDING * math.sqrt(accumulation.rounded) + TRUNCATION * accumulation.truncated


@dataclass(frozen=True)
class Agreement:
    """How logits compare with a `Reference`. `ok` is the verdict; `str()` says what is wrong."""

    logits: int  # compared
    unjudged: int  # not compared: a partial sum may overflow float32, and which one depends on the order
    worst_error: float  # largest |logits - reference|; inf and NaN, where they belong, are no error
    rms_error: float
    worst_units: float  # the same in units of the float32 bound of each logit
    rms_units: float
    worst_at: tuple[int, int] | None  # (token, expert) of worst_units; a logit outside its interval comes first
    outside: int  # logits outside the interval that the accumulation allows, wrong inf and NaN among them
    mean_square: float  # of the errors, in units of what the accumulation gives on data in random order
    mean_square_limit: float

    @property
    def ok(self) -> bool:
        return self.outside == 0 and self.mean_square <= self.mean_square_limit

    def __str__(self) -> str:
        text = (
            f"worst {self.worst_units:.3g} and rms {self.rms_units:.3g} units of the float32 bound at {self.worst_at}, "
            f"mean square {self.mean_square:.3g} of at most {self.mean_square_limit:.3g}, "
            f"{self.outside} of {self.logits} logits out of bounds"
        )
        return f"{text}, {self.unjudged} not judged" if self.unjudged else text


def compare(logits: ArrayLike, truth: Reference, accumulation: Accumulation) -> Agreement:
    """Judge logits [tokens, experts] of any dtype by the two criteria of the module's docstring.

    inf and NaN are compared by class (NaN, +inf, -inf), where `accumulation` promises infinities. The sign and payload
    of a NaN are for `differing_rows`.

    Raises:
      ValueError: logits is not of the shape of the reference.
    """
    logits = np.asarray(logits)
    if logits.shape != truth.logits.shape:
        raise ValueError(
            f"logits has shape {logits.shape} but the reference has {truth.logits.shape}. Expected the same; pass "
            "logits as [tokens, experts]."
        )
    actual, expected = logits.astype(np.float64), truth.logits
    finite = np.isfinite(expected)
    judged = ~(finite & (truth.magnitude > FLOAT32_MAX))
    measured = finite & judged & np.isfinite(actual)  # where there is a number to subtract
    count = int(judged.sum())

    lambda_, flushed = _deviations(count), _flushed(truth.hidden)
    with np.errstate(invalid="ignore", over="ignore"):
        slack = truth.magnitude * _any_order(accumulation, lambda_) + flushed
        lower = (expected - slack).astype(logits.dtype).astype(np.float64)
        upper = (expected + slack).astype(logits.dtype).astype(np.float64)
        right_class = _same_class(actual, expected) | (np.isnan(actual) & (not accumulation.infinities))
        inside = np.where(finite, (lower <= actual) & (actual <= upper), right_class)
        error = np.where(measured, np.abs(actual - expected), 0.0)
        units = _ratio(error, np.where(measured, truth.unit, 1.0))

        # What the last rounding explains is no error of the accumulation; neither is the addition of the bias.
        significand = _SIGNIFICAND_AND_SUBNORMAL[logits.dtype.name][0]
        explained = output_rounding(expected, logits.dtype) + ROUNDING * np.abs(expected) + flushed
        unexplained = np.where(measured, np.maximum(error - explained, 0.0) / (1 + 2.0**-significand), 0.0)
        squares = _ratio(unexplained, np.where(measured, _random_order(accumulation) * truth.spread, 1.0)) ** 2

    wrong = judged & ~inside
    tail = math.log(1 / FALSE_ALARM) / max(count, 1)
    ranking = np.where(wrong, np.inf, np.where(measured, units, -1.0))
    return Agreement(
        logits=count,
        unjudged=int(judged.size) - count,
        worst_error=float(error.max(initial=0.0)),
        rms_error=_root_mean(error**2, count),
        worst_units=float(units.max(initial=0.0)),
        rms_units=_root_mean(units**2, count),
        worst_at=_position(ranking) if count else None,
        outside=int(wrong.sum()),
        mean_square=float(squares.sum()) / max(count, 1),
        mean_square_limit=1 + 2 * math.sqrt(tail) + 2 * tail,
    )


def bits(values: ArrayLike) -> NDArray[np.unsignedinteger]:
    """The bit patterns of an array as unsigned integers, so that -0.0 differs from 0.0 and NaN equals itself."""
    values = np.ascontiguousarray(values)
    return values.view(np.dtype(f"u{values.dtype.itemsize}"))


def differing_rows(actual: ArrayLike, expected: ArrayLike, *, nan_payloads: bool = True) -> NDArray[np.intp]:
    """Indices of the rows whose bits differ; empty when every bit is the same.

    Args:
      actual, expected: [rows, columns] of one dtype.
      nan_payloads: False to take any NaN for any other.

    Raises:
      ValueError: the shapes or dtypes differ.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ValueError(
            f"actual is {actual.dtype}{list(actual.shape)} but expected is {expected.dtype}{list(expected.shape)}. "
            "Expected the same shape and dtype; rows of other dtypes have no bits in common."
        )
    differs = bits(actual) != bits(expected)
    if not nan_payloads:
        differs &= ~(np.isnan(actual.astype(np.float64)) & np.isnan(expected.astype(np.float64)))
    return np.flatnonzero(differs.any(axis=tuple(range(1, differs.ndim))))


def _float64(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values).astype(np.float64)


def _same_class(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.where(np.isnan(expected), np.isnan(actual), actual == expected)


def _ratio(error: NDArray[np.float64], bound: NDArray[np.float64]) -> NDArray[np.float64]:
    """error / bound, where no error of no bound is 0 and some error of no bound is inf."""
    return np.divide(error, bound, out=np.where(error > 0, np.inf, 0.0), where=bound > 0)


def _root_mean(squares: NDArray[np.float64], count: int) -> float:
    return math.sqrt(float(squares.sum()) / max(count, 1))


def _position(ranking: NDArray[np.float64]) -> tuple[int, int]:
    token, expert = np.unravel_index(int(ranking.argmax()), ranking.shape)
    return int(token), int(expert)
