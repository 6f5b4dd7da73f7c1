"""What is verified, and the data it is verified on: random kinds that a right router must get right, by seed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jax_router.dispatch import Device, Problem, why_unsupported
from jax_router.routing import RoutingSpec
from jax_router.sweep_points import Shape

Array = NDArray[Any]

LOGIT_DEVIATION = 1.5
NUMERIC_TOKENS = 127  # of every kind: no multiple of a tile, and a remainder of 7 by eight
ONE_PRODUCT = "one product"  # of float32 alone: a term left out shows in single logits, not in their mean square alone
# Kinds whose products come in no particular order: the tighter of parity's two criteria holds for these alone.
IN_RANDOM_ORDER = ("normal", "with a mean", "negative", "ties", ONE_PRODUCT, "as given")
KINDS = (
    "normal", "with a mean", "negative", "cancellation", "wide exponents", "subnormals", "near ties", "ties",
    "infinities and NaN",
)  # fmt: skip
SAME_BITS = ("cuda", "pallas")  # implementations that promise a row the same bits in every batch, on the GPU


class Operands(NamedTuple):
    """x [T, H], weight [E, H] or, of a subject of that layout, [H, E], and, each [E] or None, what else there is."""

    x: Any
    weight: Any
    bias: Any = None
    correction_bias: Any = None
    expert_scale: Any = None


@dataclass(frozen=True)
class Subject:
    """One operation by one implementation on one router.

    Attributes:
      implementation: a name, for reports; what is called unless there is a `function`.
      shape: of the weight; with a spec it is its routing.
      dtype: of x.
      weight_dtype: None means dtype.
      given: weights of a checkpoint, x of None; random ones without.
      activations: recorded x [tokens, hidden], or None.
      source: where the weights come from, for reports.
      weight_layout: as the operands have the weight; what is `given` is [E, H].
      function: what to call instead, as `calls` below returns it.
    """

    implementation: str
    shape: Shape
    dtype: str = "bfloat16"
    given: Operands | None = None
    activations: Array | None = None
    source: str = "random"
    weight_layout: str = "experts_hidden"
    weight_dtype: str | None = None
    function: Callable[..., tuple[jax.Array, ...]] | None = None

    @property
    def operation(self) -> str:
        return self.shape.operation

    @property
    def spec(self) -> RoutingSpec | None:
        return self.shape.spec

    @property
    def multiplied(self) -> str:
        """The dtype of the weight, in which x is multiplied too: float32 as soon as one of them is."""
        return self.weight_dtype or self.dtype

    @property
    def label(self) -> str:
        name = self.shape.models[0] if self.shape.models else self.shape.size
        return f"{self.operation} {self.implementation} {name}"

    @property
    def promises_bits(self) -> bool:
        return self.implementation in SAME_BITS

    @property
    def kinds(self) -> tuple[str, ...]:
        more = (ONE_PRODUCT,) if self.multiplied == "float32" else ()
        return (*KINDS, *more, *(("as given",) if self.given is not None else ()))

    @property
    def usual(self) -> str:
        """The kind that stands for what the model computes."""
        return "normal" if self.given is None else "as given"

    def problem(self, tokens: int) -> Problem:
        """As the dispatcher and the kernels see it."""
        bias_dtype = self.dtype if self.shape.bias else None
        if self.given is not None and self.given.bias is not None:
            bias_dtype = self.given.bias.dtype.name
        return Problem(
            tokens=tokens, hidden=self.shape.hidden, experts=self.shape.experts, dtype=self.dtype,
            weight_dtype=self.weight_dtype, bias_dtype=bias_dtype, spec=self.spec, weight_layout=self.weight_layout,
        )  # fmt: skip

    def call(self, operands: Operands, *, return_logits: bool = False) -> tuple[jax.Array, ...]:
        """(logits,) of the router GEMM; (weights, experts) of routing, and its logits if asked for. Traceable."""
        if self.function is not None:
            return self.function(operands, return_logits=return_logits)
        from jax_router.ops import route, router_gemm

        x, weight, bias, correction_bias, expert_scale = operands
        options: dict[str, Any] = {"implementation": self.implementation, "weight_layout": self.weight_layout}
        if self.spec is None:
            return (router_gemm(x, weight, bias, **options),)
        routing = route(
            x, weight, bias, spec=self.spec, correction_bias=correction_bias, expert_scale=expert_scale,
            return_logits=return_logits, **options,
        )  # fmt: skip
        found = (routing.weights, routing.experts)
        return found if routing.logits is None else (*found, routing.logits)


def in_other_layout(subject: Subject, device: jax.Device) -> Subject | None:
    """The subject with its weight stored [H, E], which must give the same bits; None where it is not taken so."""
    other = replace(subject, weight_layout="hidden_experts")
    if not subject.promises_bits or subject.function is not None:
        return None
    where = Device.of(device)
    return None if why_unsupported(other.problem(1), where, subject.implementation) else other


def in_its_layouts(subject: Subject, device: jax.Device) -> list[Subject]:
    """The subject and, where it is taken, the one with its weight in the other layout."""
    other = in_other_layout(subject, device)
    return [subject] if other is None else [subject, other]


def as_stored(weight: Array | jax.Array, subject: Subject) -> Any:
    """A weight [E, H] in the layout of the subject."""
    return weight if subject.weight_layout == "experts_hidden" else weight.T.copy()


def structure(subject: Subject, tokens: int) -> Operands:
    """Shapes and dtypes of the operands of one call."""
    template = draw(subject, subject.usual, 1, 0)
    shapes = (jax.ShapeDtypeStruct(each.shape, each.dtype) if each is not None else None for each in template)
    operands = Operands(*shapes)
    return operands._replace(x=jax.ShapeDtypeStruct((tokens, subject.shape.hidden), template.x.dtype))


def compile_call(subject: Subject, tokens: int, *, return_logits: bool = False) -> jax.stages.Compiled:
    """The compiled call of one number of tokens: operands -> outputs."""
    call = jax.jit(lambda operands: subject.call(operands, return_logits=return_logits))
    return call.lower(structure(subject, tokens)).compile()


def draw(subject: Subject, kind: str, tokens: int, seed: int) -> Operands:
    """Operands of one kind, on the host: the same for the same seed, and of each kind with the same dtypes."""
    random = np.random.default_rng([seed, zlib.crc32(f"{kind} {subject.shape.label}".encode())])
    shape, spec = subject.shape, subject.spec
    hidden, experts = shape.hidden, shape.experts
    dtype, half = dtype_named(subject.dtype), subject.dtype == "float16"
    of_weight = dtype_named(subject.multiplied)
    if kind == "as given":
        assert subject.given is not None
        x = random.standard_normal((tokens, hidden), np.float32)
        if subject.activations is not None:
            x = subject.activations[random.integers(0, len(subject.activations), tokens)]
        return subject.given._replace(x=x.astype(dtype), weight=as_stored(subject.given.weight, subject))

    x = random.standard_normal((tokens, hidden), np.float32)
    weight = random.standard_normal((experts, hidden), np.float32) * np.float32(LOGIT_DEVIATION / np.sqrt(hidden))
    bias = random.standard_normal(experts, np.float32)
    correction = random.normal(0.0, 1 / experts if spec and spec.score_function == "softmax" else 0.1, experts)
    if kind == "with a mean":
        x, weight = x + 0.5, weight + np.float32(0.5 * LOGIT_DEVIATION / np.sqrt(hidden))
    elif kind == "negative":  # every logit, around -3 with the bias, and every score with its correction
        x, bias, correction = np.abs(x), -np.abs(bias), correction - 1.5
        weight = -np.abs(weight) * np.float32(3 / np.sqrt(hidden))
    elif kind == "cancellation":  # neighbours that nearly cancel: logits far smaller than their products
        x[:, 1::2] = -x[:, 0 : hidden - 1 : 2]
        weight = weight.astype(of_weight).astype(np.float32)
        some = random.random(weight[:, 1::2].shape) < 1 / 16
        weight[:, 1::2] = _nudged(weight[:, 0 : hidden - 1 : 2], some, of_weight)
    elif kind == "wide exponents":
        widest = 6 if half else 24
        x = np.ldexp(x, random.integers(-widest, widest + 1, x.shape).astype(np.int32))
        weight = np.ldexp(weight, random.integers(-widest, widest + 1, weight.shape).astype(np.int32))
    elif kind == "subnormals":  # of x, times weights so large that they count
        smallest, steps, largest = (-24, 1 << 10, 8) if half else (-133, 1 << 7, 124)
        x[:, ::2] = np.ldexp(random.integers(1 - steps, steps, x[:, ::2].shape).astype(np.float32), smallest)
        weight[:, ::2] = np.ldexp(weight[:, ::2], largest)
    elif kind in ("ties", "near ties"):
        second = np.arange(experts) % 3 == 1  # each equals the expert before it
        first = np.flatnonzero(second) - 1
        weight = weight.astype(of_weight).astype(np.float32)
        weight[second], bias[second], correction[second] = weight[first], bias[first], correction[first]
        if kind == "near ties":
            # The smaller the element, the smaller its spacing: from far above the spacing of float32 logits to below.
            rank = (hidden ** random.random((int(second.sum()), 1))).astype(int) - 1
            one = abs(weight[second]).argsort(-1, kind="stable").argsort(-1, kind="stable") == rank
            weight[second] = _nudged(weight[second], one, of_weight)
        else:
            x[::8] = 0  # every expert with the same bias
    elif kind == ONE_PRODUCT:
        x[np.arange(hidden) != random.integers(0, hidden, (tokens, 1))] = 0
    elif kind == "infinities and NaN":
        where = random.integers(0, hidden, tokens)
        for remainder, value in ((1, np.nan), (3, np.inf), (5, -np.inf), (7, np.inf)):
            rows = np.arange(remainder, tokens, 8)
            x[rows, where[rows]] = value
        rows = np.arange(7, tokens, 8)  # infinities of both signs
        x[rows, (where[rows] + 1) % hidden] = -np.inf
    given = subject.given or Operands(None, None)
    of_bias, of_correction = (
        default if each is None else each.dtype
        for each, default in ((given.bias, dtype), (given.correction_bias, np.dtype(np.float32)))
    )
    return Operands(
        x.astype(dtype),
        as_stored(weight.astype(of_weight), subject),
        bias.astype(of_bias) if shape.bias else None,
        correction.astype(of_correction) if shape.correction_bias else None,
        given.expert_scale,
    )


def dtype_named(name: str) -> np.dtype:
    """The numpy dtype of a name, "bfloat16" too."""
    return np.dtype(getattr(ml_dtypes, name, name))


def _nudged(values: NDArray[np.float32], where: Array, dtype: np.dtype) -> NDArray[np.float32]:
    """Values of the dtype, one spacing larger in magnitude where asked for."""
    integers = np.dtype(f"u{dtype.itemsize}")
    bits = np.ascontiguousarray(values.astype(dtype)).view(integers)
    return (bits + where.astype(integers)).view(dtype).astype(np.float32)


def put(operands: Operands, device: jax.Device) -> Operands:
    """The operands on a device."""
    return Operands(*(None if each is None else jax.device_put(each, device) for each in operands))


def with_garbage(x: Array, rows: Sequence[int] | Array, random: np.random.Generator) -> Array:
    """x with other contents in some rows: NaN, infinities, huge numbers, zeros."""
    x = x.copy()
    for row in rows:
        value = random.choice([np.nan, np.inf, -np.inf, 3e38, 0.0])
        x[row] = np.float32(value).astype(x.dtype) if x.dtype != np.float16 or abs(value) != 3e38 else 6e4
    return x


def random_weights(subject: Subject, count: int, seed: int, device: jax.Device) -> list[Operands]:
    """Operands without x: `count` different routers of the shape on a device; of a checkpoint, its own in rotation."""
    if subject.given is not None:
        given = put(subject.given, device)
        weights = [given.weight] + [
            jnp.roll(given.weight, -shift, axis=0) for shift in range(1, min(count, subject.shape.experts))
        ]
        return [given._replace(weight=weights[i % len(weights)]) for i in range(count)]
    template = draw(subject, "normal", 1, seed)
    scale = LOGIT_DEVIATION / np.sqrt(subject.shape.hidden)

    @jax.jit
    def one(key: jax.Array) -> jax.Array:
        values = jax.random.normal(key, template.weight.shape, jnp.float32) * scale
        return values.astype(template.weight.dtype)

    with jax.default_device(device):
        keys = jax.random.split(jax.random.key(seed), count)
        others = put(template._replace(x=None, weight=None), device)
        return [others._replace(weight=one(key)) for key in keys]
