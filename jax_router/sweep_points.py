"""What the sweep measures: shapes of published models, numbers of tokens, candidates, three suites. Data only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from jax_router.implementations import NAMES as IMPLEMENTATIONS
from jax_router.models import models
from jax_router.routing import RoutingSpec
from jax_router.tables import OPERATIONS

PEERS = ("torch_linear", "torch_mm_float32")  # names of timing_torch.operators
COMPILED_PEER = "torch_route_compiled"
ROUTE_PEERS = ("torch_route", COMPILED_PEER)  # timing_torch.route_operator
FLOAT32_PEER = "torch_linear_float32"  # of float32 weights, in timing_torch.operators too
READ_WEIGHT = "read_weight"
BOUNDS = ("empty", READ_WEIGHT)  # operations of graph_replay: an empty launch, a read of the weight bytes
NO_ROUTING = "no_routing"  # the chain of chain_slope with nothing in it
ACCURACY = "accuracy"
# Of a weight stored [hidden, experts], and what runs them: on it as it is, or behind a transpose in every call.
TRANSPOSED = "cuda_transposed"
HIDDEN_EXPERTS = {"cuda_hidden_experts": "cuda", "xla_hidden_experts": "xla", TRANSPOSED: "cuda"}
CANDIDATES = (*BOUNDS, *IMPLEMENTATIONS, *PEERS, *ROUTE_PEERS, FLOAT32_PEER, NO_ROUTING, ACCURACY, *HIDDEN_EXPERTS)
SUITES = ("quick", "headline", "full")

# What the records on GPUs have. More models would be more shapes to measure.
MODELS = (
    "gpt-oss-20b", "gpt-oss-120b", "DeepSeek-V3", "Kimi-K2", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Next-80B-A3B",
    "Qwen3.5-397B-A17B", "GLM-4.5", "GLM-4.5-Air", "MiniMax-M2", "Mixtral-8x7B", "Llama-4-Maverick", "OLMoE-1B-7B",
    "Nemotron-3-Nano-30B-A3B",
)  # fmt: skip
HEADLINE_MODELS = ("gpt-oss-120b", "DeepSeek-V3")
ROUTE_HEADLINE_MODELS = (*HEADLINE_MODELS, "Qwen3-235B-A22B")
# Families with a bias that moves the selection and not the weights: e_score_correction_bias or expert_bias of
# their modules in transformers.
CORRECTION_BIAS = (
    "DeepSeek-V3", "DeepSeek-V4", "Kimi-K2", "Kimi-Linear", "GLM-4.5", "GLM-5", "MiniMax-M2", "Nemotron-3", "LongCat",
    "ERNIE-4.5", "MiMo-V2", "LFM2", "Hy3",
)  # fmt: skip
ALL_TOKENS = tuple(2**power for power in range(15))  # 1 to 16384
SPARSE_TOKENS = (1, 16, 64, 256, 1024, 4096)
QUICK_TOKENS = (1, 8, 64, 512)
CHAIN_TOKENS = (1, 64)
HOST_TOKENS = (1, 64, 1024, 4096)  # of the headline; kernels for many tokens need descriptions of their arrays
LAYOUT_TOKENS = (1, 16, 64, 512, 4096)
ROUTE_TOKENS = tuple(2**power for power in range(13))  # 1 to 4096
ROUTE_QUICK_TOKENS = (1, 64)
ROUTE_FEW_TOKENS = (1, 64, 4096)  # of models that are not in the headline, and of what takes long to compile
ROUTE_CHAIN_TOKENS = (1, 64, 256, 4096)  # the ends of the ranges that have a bar
BOTH = ("warm", "cold")
RMS = (("rms", "zero mean"), ("rms", "with a mean"))  # the measurements of ACCURACY
DTYPE, OUT_DTYPE = "bfloat16", "float32"
FLOAT32 = "float32"
# Routers measured with float32 weights too, and the dtype of x. All three multiply in float32: transformers widens x
# and weight of DeepSeek-V3's and ERNIE's (hf.py), vLLM keeps MiniMax-M2's weight in float32.
FLOAT32_WEIGHTS = (("DeepSeek-V3", DTYPE), ("MiniMax-M2", DTYPE), ("ERNIE-4.5-21B-A3B", FLOAT32))


class ProblemKey(NamedTuple):
    """One problem of the sweep, as a part of the keys of its rows."""

    hidden: int
    experts: int
    bias: bool
    dtype: str  # of x and of the bias
    out_dtype: str
    tokens: Any  # a number, or None for what depends on the weight alone
    rule: str | None  # a `rule_key`
    weight_dtype: str


@dataclass(frozen=True)
class Shape:
    """One router weight [experts, hidden] with or without a bias, and every model that has it.

    With a spec it is the routing of these models, which share the rule too.
    """

    hidden: int
    experts: int
    bias: bool
    models: tuple[str, ...]
    spec: RoutingSpec | None = None
    correction_bias: bool = False
    dtype: str = DTYPE  # of x and of the bias
    weight_dtype: str = DTYPE

    @property
    def dtypes(self) -> str:
        """What labels say of the dtypes: nothing of the usual one."""
        if self.weight_dtype == DTYPE:
            return ""
        return f" in {self.dtype}" if self.dtype == self.weight_dtype else f" with a {self.weight_dtype} weight"

    @property
    def size(self) -> str:
        return f"{self.hidden}x{self.experts}{' +bias' if self.bias else ''}{self.dtypes}"

    @property
    def label(self) -> str:
        return self.size if self.spec is None else f"route {self.size} of {self.models[0]}"

    @property
    def headline(self) -> bool:
        headline = HEADLINE_MODELS if self.spec is None else ROUTE_HEADLINE_MODELS
        return any(_same_name(model, name) for model in self.models for name in headline)

    @property
    def operation(self) -> str:
        return OPERATIONS[self.spec is not None]

    @property
    def rule(self) -> dict[str, Any] | None:
        """The spec for JSON: what differs from the defaults, and whether there is a correction bias."""
        if self.spec is None:
            return None
        pairs = {field.name: (getattr(self.spec, field.name), field.default) for field in fields(RoutingSpec)}
        changed = {name: value for name, (value, default) in pairs.items() if value != default}
        return changed | {"correction_bias": self.correction_bias}


# The Pallas interpreter takes seconds per call, so without a GPU it runs on these alone.
TINY_SHAPES = (Shape(64, 32, False, ("tiny",)), Shape(128, 64, True, ("tiny with bias",)))
TINY_TOKENS = (1, 8)


@dataclass(frozen=True)
class Point:
    """One candidate on one problem, and the (method, weights) to measure it with."""

    shape: Shape
    tokens: int | None  # None for the bounds, which depend on the weight alone
    candidate: str
    measurements: tuple[tuple[str, str], ...]

    def key(self, method: str, weights: str) -> tuple[Any, ...]:
        """Identity of one row in a rows file."""
        shape = self.shape
        sizes = (shape.hidden, shape.experts, shape.bias, shape.dtype, OUT_DTYPE, self.tokens)
        return (*ProblemKey(*sizes, rule_key(shape.rule), shape.weight_dtype), self.candidate, method, weights)

    @property
    def fields(self) -> dict[str, Any]:
        """What every row of this point says of it."""
        shape = self.shape
        return {
            "operation": shape.operation, **({} if shape.rule is None else {"rule": shape.rule}),
            "models": shape.models, "hidden": shape.hidden, "experts": shape.experts, "bias": shape.bias,
            "dtype": shape.dtype, "weight_dtype": shape.weight_dtype, "out_dtype": OUT_DTYPE, "tokens": self.tokens,
            "candidate": self.candidate,
        }  # fmt: skip

    @property
    def implementation(self) -> str:
        """What runs it, or the candidate's own name if that is no implementation."""
        return HIDDEN_EXPERTS.get(self.candidate, self.candidate)

    @property
    def label(self) -> str:
        return f"{self.shape.label} T={self.tokens if self.tokens is not None else '-'} {self.candidate}"


def weight_layout_of(candidate: str) -> str:
    """The layout in which the weight reaches what runs a candidate."""
    return "hidden_experts" if candidate in HIDDEN_EXPERTS and candidate != TRANSPOSED else "experts_hidden"


def rule_key(rule: Mapping[str, Any] | None) -> str | None:
    """A rule as a part of keys; None for the router GEMM alone."""
    return None if rule is None else json.dumps(rule, sort_keys=True)


def spec_of(key: str | None) -> RoutingSpec | None:
    """The spec of a `rule_key`."""
    if key is None:
        return None
    return RoutingSpec(**{name: value for name, value in json.loads(key).items() if name != "correction_bias"})


def _same_name(left: str, right: str) -> bool:
    return left.lower() == right.lower()


def shapes(presets: Mapping[str, Any] | None = None) -> tuple[Shape, ...]:
    """The distinct shapes of `presets` (None: of MODELS), headline first. Models that share one are listed together."""
    presets = {name: models[name] for name in MODELS} if presets is None else presets
    names: dict[tuple[int, int, bool], list[str]] = {}
    for name, preset in presets.items():
        names.setdefault((preset.hidden, preset.experts, bool(preset.bias)), []).append(name)
    found = [Shape(*key, tuple(models_of_key)) for key, models_of_key in names.items()]
    return tuple(sorted(found, key=lambda shape: _rank(shape, HEADLINE_MODELS)))


def route_shapes(presets: Mapping[str, Any] | None = None) -> tuple[Shape, ...]:
    """The distinct routers of `presets` (None: of MODELS), weight and rule, headline models first."""
    presets = {name: models[name] for name in MODELS} if presets is None else presets
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, preset in presets.items():
        correction_bias = any(name.lower().startswith(family.lower()) for family in CORRECTION_BIAS)
        key = (preset.hidden, preset.experts, bool(preset.bias), preset.spec, correction_bias)
        names.setdefault(key, []).append(name)
    found = [
        Shape(hidden, experts, bias, tuple(of_key), spec, corrected)
        for (hidden, experts, bias, spec, corrected), of_key in names.items()
    ]
    return tuple(sorted(found, key=lambda shape: _rank(shape, ROUTE_HEADLINE_MODELS)))


def float32_shapes() -> tuple[Shape, ...]:
    """The routers of FLOAT32_WEIGHTS: their router GEMMs, then their routing."""
    return tuple(
        replace(shape, dtype=dtype, weight_dtype=FLOAT32)
        for of_operation in (shapes, route_shapes)
        for model, dtype in FLOAT32_WEIGHTS
        for shape in of_operation({model: models[model]})
    )


def _rank(shape: Shape, headline: Sequence[str]) -> tuple[int, int]:
    """Headline shapes in their order, then by size."""
    places = [index for index, name in enumerate(headline) if _has_model(shape, [name])]
    return min(places, default=len(headline)), shape.hidden * shape.experts


def points(
    suite: str,
    *,
    gpu: bool,
    torch_gpu: bool,
    only_models: Sequence[str] = (),
    only_tokens: Sequence[int] = (),
    only_candidates: Sequence[str] = (),
    only_operations: Sequence[str] = (),
) -> list[Point]:
    """The points of a suite, in the order in which they run: router GEMMs, routing, then both with float32 weights.

    Each is in order of shapes, then of tokens.

    Args:
      suite: "quick", "headline" or "full".
      gpu: whether JAX has a GPU; without one only `xla` runs, and interpreted `pallas` on tiny shapes.
      torch_gpu: whether PyTorch has the GPU too.
      only_models, only_tokens, only_candidates, only_operations: filters; empty takes everything. Numbers of tokens
        that the suite does not have are added to it; a shape that shares its numbers with a wanted model is wanted.

    Raises:
      ValueError: an unknown suite, model, candidate or operation, or tokens below 1.
    """
    known = (*shapes(), *route_shapes(), *(float32_shapes() if gpu and suite != "quick" else ()))
    _check_filters(suite, known, only_models, only_tokens, only_candidates, only_operations)
    wanted = [shape for shape in known if not only_models or _has_model(shape, only_models)]
    if suite == "quick" and not only_models:
        wanted = [shape for shape in wanted if shape.headline or not (gpu or shape.spec)]
    wanted = [shape for shape in wanted if not only_operations or shape.operation in only_operations]
    found: list[Point] = []
    for shape in wanted:
        if shape.weight_dtype == FLOAT32:
            found += _float32_points(shape, only_tokens, torch_gpu=torch_gpu)
            continue
        if shape.spec is not None:
            for tokens in only_tokens or _route_tokens(suite, shape):
                found += _route_candidates(suite, shape, tokens, gpu=gpu, torch_gpu=torch_gpu)
            continue
        if gpu:
            floors = _host(suite, shape)
            found += [Point(shape, None, bound, (*_both("graph_replay"), *floors.get(bound, ()))) for bound in BOUNDS]
            if NO_ROUTING in floors:
                found.append(Point(shape, None, NO_ROUTING, floors[NO_ROUTING]))
        for tokens in only_tokens or _tokens(suite, shape):
            found += _candidates(suite, shape, tokens, gpu=gpu, torch_gpu=torch_gpu)
        if gpu and shape.headline and suite != "quick":
            found.append(Point(shape, None, ACCURACY, RMS))
    if not gpu and not only_models and OPERATIONS[0] in (only_operations or OPERATIONS):
        tiny = [tokens for tokens in TINY_TOKENS if not only_tokens or tokens in only_tokens]
        found += [
            Point(shape, tokens, candidate, (("wall", "warm"),))
            for shape in TINY_SHAPES
            for tokens in tiny
            for candidate in ("pallas", "xla")
        ]
    return [point for point in found if not only_candidates or point.candidate in only_candidates]


def _both(method: str) -> tuple[tuple[str, str], ...]:
    """Measurements by one method, warm and cold."""
    return tuple((method, weights) for weights in BOTH)


def _float32_points(shape: Shape, only_tokens: Sequence[int], *, torch_gpu: bool) -> list[Point]:
    """With float32 weights: `cuda`, `xla` and cuBLAS, and of the router GEMM the read of the weights and the errors."""
    gemm = shape.spec is None
    found = [Point(shape, None, READ_WEIGHT, _both("graph_replay"))] if gemm else []
    for tokens in only_tokens or (SPARSE_TOKENS if gemm and shape.dtype == DTYPE else ROUTE_FEW_TOKENS):
        found.append(Point(shape, tokens, "cuda", (*_both("graph_replay"), *_both("cupti"))))
        found.append(Point(shape, tokens, "xla", _both("cupti")))
        if gemm and torch_gpu:
            found.append(Point(shape, tokens, FLOAT32_PEER, _both("torch_replay")))
    return [*found, Point(shape, None, ACCURACY, RMS)] if gemm else found


def _tokens(suite: str, shape: Shape) -> tuple[int, ...]:
    if suite == "quick":
        return QUICK_TOKENS
    return ALL_TOKENS if suite == "full" or shape.headline else SPARSE_TOKENS


def _candidates(suite: str, shape: Shape, tokens: int, *, gpu: bool, torch_gpu: bool) -> list[Point]:
    if not gpu:
        return [Point(shape, tokens, "xla", (("wall", "warm"),))]
    with_chain = suite != "quick" and tokens in CHAIN_TOKENS and (shape.headline or suite == "full")
    chains = _both("chain_slope") if with_chain else ()
    kernel_time, replay = _both("cupti"), _both("graph_replay")
    host = _host(suite, shape, tokens)
    found = [
        Point(shape, tokens, name, (*(replay if name == "cuda" else ()), *host.get(name, ()), *chains, *kernel_time))
        for name in IMPLEMENTATIONS
    ]
    if torch_gpu:
        found += [Point(shape, tokens, peer, _both("torch_replay")) for peer in PEERS]
    if chains:
        found.append(Point(shape, tokens, NO_ROUTING, chains))
    if suite != "quick" and shape.headline and tokens in LAYOUT_TOKENS:
        found += [Point(shape, tokens, name, kernel_time) for name in HIDDEN_EXPERTS]
    return found


def _host(suite: str, shape: Shape, tokens: int | None = None) -> dict[str, tuple[tuple[str, str], ...]]:
    """By candidate how to measure what a call costs the host; without tokens, what no call goes below."""
    if suite == "quick" or not shape.headline or tokens not in (None, *HOST_TOKENS):
        return {}
    launcher, jitted, eager = ((f"host_{what}", "warm") for what in ("launcher", "jit", "eager"))
    if tokens is None:
        return {"empty": (launcher,), NO_ROUTING: (jitted,)}
    return {"cuda": (launcher, jitted, eager), "xla": (jitted, eager)}


def _route_tokens(suite: str, shape: Shape) -> tuple[int, ...]:
    if suite == "quick":
        return ROUTE_QUICK_TOKENS
    return ROUTE_TOKENS if suite == "full" else SPARSE_TOKENS if shape.headline else ROUTE_FEW_TOKENS


def _route_candidates(suite: str, shape: Shape, tokens: int, *, gpu: bool, torch_gpu: bool) -> list[Point]:
    if not gpu:
        return [Point(shape, tokens, "xla", (("wall", "warm"),))]
    with_chain = suite != "quick" and shape.headline and tokens in ROUTE_CHAIN_TOKENS
    chains = _both("chain_slope") if with_chain else ()
    kernel_time, replay = _both("cupti"), _both("graph_replay")
    host = _host(suite, shape, tokens)
    found = [
        Point(shape, tokens, name, (*(replay if name == "cuda" else ()), *host.get(name, ()), *chains, *kernel_time))
        for name in IMPLEMENTATIONS
    ]
    if torch_gpu and shape.headline and suite != "quick":
        peers = [peer for peer in ROUTE_PEERS if peer != COMPILED_PEER or tokens in ROUTE_FEW_TOKENS]
        found += [Point(shape, tokens, peer, _both("torch_replay")) for peer in peers]
    if chains:
        found.append(Point(shape, tokens, NO_ROUTING, chains))
    return found


def _has_model(shape: Shape, wanted: Iterable[str]) -> bool:
    return any(_same_name(model, name) for model in shape.models for name in wanted)


def _check_filters(
    suite: str,
    known: Sequence[Shape],
    names: Sequence[str],
    tokens: Sequence[int],
    candidates: Sequence[str],
    operations: Sequence[str],
) -> None:
    if suite not in SUITES:
        raise ValueError(f"suite is {suite!r}. Expected one of {', '.join(SUITES)}; use --suite quick to try it out.")
    for name in names:
        if not any(_has_model(shape, [name]) for shape in known):
            every = ", ".join(dict.fromkeys(model for shape in known for model in shape.models))
            raise ValueError(f"model is {name!r}. Expected one of {every}; pass one of these to --model.")
    for count in tokens:
        if count < 1:
            raise ValueError(f"tokens is {count}. Expected 1 or more; pass a positive number to --tokens.")
    for name in candidates:
        if name not in CANDIDATES:
            every = ", ".join(CANDIDATES)
            raise ValueError(f"implementation is {name!r}. Expected one of {every}; pass one to --implementation.")
    for name in operations:
        if name not in OPERATIONS:
            every = " or ".join(OPERATIONS)
            raise ValueError(f"operation is {name!r}. Expected {every}; pass one to --operation.")


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values; the metric that weighs warm and cold alike."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))
