"""What float32 may be off by in logits, weights, gradients and losses: every rounding counted on the way.

A `Real` is a float64 value and how far float32 may be from it. Each operation adds to what its operands bring the
roundings that it makes itself, in units of `ROUNDING` = 2^-24, half the spacing of float32 (running error analysis,
Higham, Accuracy and Stability of Numerical Algorithms, section 3.3), and `FLUSHED`, as small results may become zero:

    a + b, a - b, a b    1, of the result; adding a zero and multiplying by one cost nothing
    a / b                4: 2 ulp, the fastest division that CUDA has
    sqrt                 2: 1 ulp
    log, log1p, cos      4: 2 ulp of the result
    exp(z)               2 (2 + |z|): 2 ulp, and z log2(e) rounded
    sums of n terms      each term goes through at most n - 1 additions, n with its product, in any order: n times the
                         sum of magnitudes A in the worst case. In random order, and all but surely (`parity`), at most
                         lambda sqrt(n (S^2 + V)) with S the sum and V the sum of squares. The smaller of the two counts

The formulas below are those of `routing_weights`, of the losses, and of their derivatives as JAX writes them.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from jax_router import RoutingSpec, parity
from jax_router.dispatch import Device
from jax_router.parity import FALSE_ALARM, FLUSHED, ROUNDING

Array = np.ndarray
EXPONENTIAL, DIVISION, ROOT, LOGARITHM, COSINE = 4, 4, 2, 4, 4  # the constants above
FLOAT64 = 2.0**-29  # a rounding of float64 in units of one of float32: 29 bits more


def xla_picks_kernels() -> bool:
    """Whether XLA picks kernels anew for every program, by timing them: two agree within roundings, not bit for bit."""
    return Device.default().platform == "gpu"


@dataclasses.dataclass(frozen=True)
class Real:
    """A float64 value and an absolute bound on float32's distance from it."""

    value: Array
    error: Array

    @classmethod
    def of(cls, value: Array, inherited: Array, roundings: Array | float = 1, *, exact: Array | bool = False) -> Real:
        """A result with what the operands' errors make of it, and its own roundings; NaN and infinity are exact."""
        with np.errstate(invalid="ignore"):
            error = inherited + np.where(exact, 0, roundings * ROUNDING * (np.abs(value) + inherited) + FLUSHED)
        return cls(value, np.where(np.isfinite(value) & np.isfinite(error), error, 0))

    def __add__(self, other: Real | Array | float) -> Real:
        other = real(other)
        zero = (self.value == 0) & (self.error == 0) | (other.value == 0) & (other.error == 0)
        return Real.of(self.value + other.value, self.error + other.error, exact=zero)

    def __neg__(self) -> Real:
        return Real(-self.value, self.error)

    def __sub__(self, other: Real | Array | float) -> Real:
        return self + -real(other)

    def __mul__(self, other: Real | Array | float) -> Real:
        a, b = self, real(other)
        inherited = np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error
        trivial = [(np.abs(c.value) == 1) & (c.error == 0) | (c.value == 0) & (c.error == 0) for c in (a, b)]
        return Real.of(a.value * b.value, inherited, exact=trivial[0] | trivial[1])

    def __truediv__(self, other: Real | Array | float) -> Real:
        other = real(other)
        value = self.value / other.value
        inherited = (self.error + np.abs(value) * other.error) / (np.abs(other.value) - other.error)
        return Real.of(value, inherited, DIVISION)

    def __getitem__(self, index) -> Real:
        return Real(self.value[index], self.error[index])

    def reshape(self, *shape: int) -> Real:
        return Real(self.value.reshape(*shape), self.error.reshape(*shape))

    def take(self, index: Array) -> Real:
        return Real(np.take_along_axis(self.value, index, -1), np.take_along_axis(self.error, index, -1))

    def sum(self, axis: int | tuple[int, ...] = -1, *, keepdims: bool = False) -> Real:
        how = {"axis": axis, "keepdims": keepdims}
        value, inherited = self.value.sum(**how), self.error.sum(**how)
        terms = ((self.value != 0) | (self.error != 0)).sum(**how)
        count = np.maximum(terms - 1, 0)
        worst = count * np.abs(self.value).sum(**how)
        likely = likelihood(value.size) * np.sqrt(count * (value**2 + (self.value**2).sum(**how)))
        rounded = ROUNDING * (np.minimum(worst, likely) + count * inherited) + FLUSHED * count
        return Real.of(value, inherited + rounded, 0, exact=True)

    def exp(self) -> Real:
        value, finite = np.exp(self.value), np.where(np.isfinite(self.value), np.abs(self.value), 0)
        return Real.of(value, value * np.expm1(self.error), EXPONENTIAL + 2 * finite)

    def sqrt(self) -> Real:
        value = np.sqrt(self.value)
        low, high = np.sqrt(np.maximum(self.value - self.error, 0)), np.sqrt(self.value + self.error)
        return Real.of(value, np.maximum(value - low, high - value), ROOT)

    def log(self) -> Real:
        return Real.of(np.log(self.value), -np.log1p(-self.error / self.value), LOGARITHM)

    def log1p(self) -> Real:
        return Real.of(np.log1p(self.value), self.error / (1 + self.value - self.error), LOGARITHM)


def real(value: Real | Array | float) -> Real:
    """What is given: exact."""
    return value if isinstance(value, Real) else Real(np.asarray(value, np.float64), np.float64(0))


def given(array) -> Real | None:
    """An operand in any dtype, exact."""
    return None if array is None else Real(a := np.asarray(array).astype(np.float64), np.zeros(a.shape))


def likelihood(results: int) -> float:
    """The lambda of `parity`, for this many results."""
    return math.sqrt(2 * math.log(2 * max(results, 1) / FALSE_ALARM))


def matmul(a: Real, b: Array) -> Real:
    """`a [M, N] @ b [N, P]`, b exact: N products and their sum."""
    magnitude, inherited = np.abs(a.value) @ np.abs(b), a.error @ np.abs(b)
    value, squares = a.value @ b, a.value**2 @ b**2
    count = ((a.value != 0) | (a.error != 0)).astype(float) @ (b != 0)
    likely = likelihood(value.size) * np.sqrt(count * (value**2 + squares))
    rounded = ROUNDING * (np.minimum(count * magnitude, likely) + count * inherited) + FLUSHED * count
    return Real(value, inherited + rounded)


def gemm(x, weight, bias=None) -> Real:
    """Logits `[T, E]`."""
    logits = matmul(given(x), given(weight).value.T)
    return logits if bias is None else logits + given(bias)


def logits(x, weight, bias=None) -> Real:
    """Logits `[T, E]` of an x or weight in float32 by what the dispatcher picks: on a GPU `cuda`'s tree may be it."""
    chain = gemm(x, weight, bias)
    if Device.default().platform != "gpu":
        return chain
    truth = parity.reference(x, weight, bias)
    of_tree = parity.logit_bound(truth, parity.split_tree(truth.hidden), truth.logits.size)
    return Real(chain.value, np.maximum(chain.error, of_tree))


def exponentials(logits: Real) -> tuple[Real, Array]:
    highest = logits.value.max(-1, keepdims=True)
    return (logits - highest).exp(), highest


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # infinities and NaN go through
def softmax(logits: Real, spec: RoutingSpec | None = None) -> Real:
    """An error of the sum scales all scores of a token alike: of a spec that renormalises them it cancels."""
    powers, _ = exponentials(logits)
    total = powers.sum(keepdims=True)
    # A sum of selected scores is at least k / E of 1, far above such a least sum.
    cancels = spec is not None and spec.renormalize and spec.renormalize_epsilon == 0 and spec.renormalize_min < 1e-6
    return powers / (real(total.value) if cancels else total)


def softplus(logits: Real) -> Real:
    return Real(np.maximum(logits.value, 0), logits.error) + Real(-np.abs(logits.value), logits.error).exp().log1p()


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # infinities and NaN go through
def scores(logits: Real, score_function: str) -> Real:
    if score_function == "softmax":
        return softmax(logits)
    if score_function == "sigmoid":
        return real(1) / ((-logits).exp() + 1)
    return softplus(logits).sqrt() if score_function == "sqrtsoftplus" else logits


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # infinities and NaN go through
def weights(logits: Real, experts: Array, expert_scale, spec: RoutingSpec) -> Real:
    """Weights `[T, k]` of logits `[T, E]`."""
    selected, total = selected_scores(logits, experts, spec)
    weights = (selected / total if spec.renormalize else selected) * spec.scaling_factor
    return weights if expert_scale is None else weights * given(expert_scale)[experts]


def selected_scores(logits: Real, experts: Array, spec: RoutingSpec) -> tuple[Real, Real]:
    """Scores `[T, k]`, and what renormalising divides them by."""
    if spec.score_function == "softmax_topk":
        selected = softmax(logits.take(experts), spec)
    elif spec.score_function == "softmax":
        selected = softmax(logits, spec).take(experts)
    else:
        selected = scores(logits, spec.score_function).take(experts)
    total = selected.sum(keepdims=True)
    total = Real(np.maximum(total.value, spec.renormalize_min), total.error)
    return selected, total + spec.renormalize_epsilon


def softmax_pulled_back(probabilities: Real, cotangent: Real) -> Real:
    each = probabilities * cotangent
    return each - probabilities * each.sum(keepdims=True)


def scattered(values: Real, index: Array, count: int) -> Real:
    """`values [T, k]` added up at `index [T, k]` of `[T, count]`."""
    at = index[..., None] == np.arange(count)
    return Real(np.where(at, values.value[..., None], 0), np.where(at, values.error[..., None], 0)).sum(-2)


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Cotangents of the operands of `route`, in their order; that of the correction bias is zero."""

    x: Real
    weight: Real
    bias: Real
    scale: Real

    def __getitem__(self, index: int) -> Real:
        return (self.x, self.weight, self.bias, None, self.scale)[index]


def gradients(x, weight, logits: Real, experts: Array, expert_scale, spec: RoutingSpec, of_weights, of_logits=None):
    """`Gradients` of the weights and the logits with these cotangents, at given logits `[T, E]`."""
    count, cotangent = logits.value.shape[-1], of_weights if isinstance(of_weights, Real) else given(of_weights)
    selected, total = selected_scores(logits, experts, spec)
    normal = selected / total if spec.renormalize else selected
    of_scale = scattered((cotangent * (normal * spec.scaling_factor)).reshape(1, -1), experts.reshape(1, -1), count)
    if expert_scale is not None:
        cotangent = cotangent * given(expert_scale)[experts]
    cotangent = cotangent * spec.scaling_factor
    if spec.renormalize:
        of_total = (-cotangent * selected * (real(1) / (total * total))).sum(keepdims=True)
        is_sum = selected.value.sum(-1, keepdims=True) > spec.renormalize_min
        cotangent = cotangent / total + of_total * is_sum.astype(float)
    chosen = logits.take(experts)
    if spec.score_function == "softmax":
        of_each = softmax_pulled_back(softmax(logits, spec), scattered(cotangent, experts, count))
    else:
        if spec.score_function == "softmax_topk":
            cotangent = softmax_pulled_back(selected, cotangent)
        elif spec.score_function == "sigmoid":
            cotangent = cotangent * selected * (real(1) - selected)
        else:
            cotangent = (cotangent * 0.5 / selected) * (chosen - softplus(chosen)).exp()
        of_each = scattered(cotangent, experts, count)
    if of_logits is not None:
        of_each = of_each + given(of_logits)
    transposed = Real(of_each.value.T, of_each.error.T)
    of_x, of_weight = matmul(of_each, given(weight).value), matmul(transposed, given(x).value)
    return Gradients(of_x, of_weight, of_each.sum(0), of_scale[0])


def load_balancing(probabilities: Real, experts: Array) -> tuple[Real, Real]:
    """The loss of probabilities `[T, E]` and experts `[T, k]` that count, and its gradient `[E]` in every token's."""
    tokens, count = probabilities.value.shape
    shares = real(np.bincount(experts.ravel(), minlength=count)) / tokens
    return (shares * (probabilities.sum(0) / tokens)).sum() * count, shares * count / tokens


def z_loss(logits: Real) -> tuple[Real, Real]:
    """The loss of logits `[T, E]` that count, and its gradient."""
    tokens = len(logits.value)
    powers, highest = exponentials(logits)
    total = powers.sum(keepdims=True)
    logarithm = total.log() + highest
    return (logarithm * logarithm).sum(0)[0] / tokens, logarithm * 2 / tokens * (powers / total)


def within(actual, expected: Real, *, rounded_to=None) -> float:
    """Check that each element lies within its bound, of a result that was then rounded to a dtype if one is given.

    Infinities and NaN must be the same. Returns how much of the bound was used.
    """
    actual, value, allowed = np.asarray(actual).astype(np.float64), expected.value, expected.error
    assert actual.shape == np.shape(value)
    if rounded_to is not None:
        info = jnp.finfo(rounded_to)
        allowed = allowed + (np.abs(value) + allowed) * float(info.eps) / 2 + float(info.smallest_subnormal) / 2
    finite = np.isfinite(value)
    np.testing.assert_array_equal(np.where(finite, 0, actual), np.where(finite, 0, value))
    with np.errstate(invalid="ignore"):
        off = np.where(finite, np.abs(actual - value), 0)
    off = np.where(np.isnan(off), np.inf, off)
    used = float(np.divide(off, allowed, where=allowed > 0, out=np.where(off > 0, np.inf, 0.0)).max(initial=0))
    assert used <= 1, (
        f"{(off > allowed).sum()} of {off.size} are off, the worst {used:.3g} times what rounding explains"
    )
    return used
