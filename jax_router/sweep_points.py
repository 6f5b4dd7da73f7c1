"""What the sweep measures: shapes of published models, numbers of tokens, candidates, three suites. Data only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_router.implementations import NAMES as IMPLEMENTATIONS
from jax_router.models import models

PEERS = ("torch_linear", "torch_mm_float32")  # names of jax_router.timing.torch_operators
BOUNDS = ("empty", "read_weight")  # operations of timing.graph_replay: an empty launch, a read of the weight bytes
NO_ROUTING = "no_routing"  # the chain of chain_slope with nothing in it
ACCURACY = "accuracy"
CANDIDATES = (*BOUNDS, *IMPLEMENTATIONS, *PEERS, NO_ROUTING, ACCURACY)
SUITES = ("quick", "headline", "full")

# What the records on GPUs have. More models would be more shapes to measure.
MODELS = (
    "gpt-oss-20b", "gpt-oss-120b", "DeepSeek-V3", "Kimi-K2", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Next-80B-A3B",
    "Qwen3.5-397B-A17B", "GLM-4.5", "GLM-4.5-Air", "MiniMax-M2", "Mixtral-8x7B", "Llama-4-Maverick", "OLMoE-1B-7B",
    "Nemotron-3-Nano-30B-A3B",
)  # fmt: skip
HEADLINE_MODELS = ("gpt-oss-120b", "DeepSeek-V3")
ALL_TOKENS = tuple(2**power for power in range(15))  # 1 to 16384
SPARSE_TOKENS = (1, 16, 64, 256, 1024, 4096)
QUICK_TOKENS = (1, 8, 64, 512)
CHAIN_TOKENS = (1, 64)
BOTH = ("warm", "cold")
DTYPE, OUT_DTYPE = "bfloat16", "float32"


@dataclass(frozen=True)
class Shape:
    """One router weight [experts, hidden] with or without a bias, and every model that has it."""

    hidden: int
    experts: int
    bias: bool
    models: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.hidden}x{self.experts}{' +bias' if self.bias else ''}"

    @property
    def headline(self) -> bool:
        return any(_same_name(model, headline) for model in self.models for headline in HEADLINE_MODELS)


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
        return (shape.hidden, shape.experts, shape.bias, DTYPE, OUT_DTYPE, self.tokens, self.candidate, method, weights)

    @property
    def label(self) -> str:
        return f"{self.shape.label} T={self.tokens if self.tokens is not None else '-'} {self.candidate}"


def _same_name(left: str, right: str) -> bool:
    return left.lower() == right.lower()


def shapes(presets: Mapping[str, Any] | None = None) -> tuple[Shape, ...]:
    """The distinct shapes of `presets` (None: of MODELS), headline first. Models that share one are listed together."""
    presets = {name: models[name] for name in MODELS} if presets is None else presets
    names: dict[tuple[int, int, bool], list[str]] = {}
    for name, preset in presets.items():
        names.setdefault((preset.hidden, preset.experts, bool(preset.bias)), []).append(name)
    found = [Shape(*key, tuple(models_of_key)) for key, models_of_key in names.items()]
    order = [name.lower() for name in HEADLINE_MODELS]

    def rank(shape: Shape) -> tuple[int, int]:
        places = [order.index(model.lower()) for model in shape.models if model.lower() in order]
        return min(places, default=len(order)), shape.hidden * shape.experts

    return tuple(sorted(found, key=rank))


def points(
    suite: str,
    *,
    gpu: bool,
    torch_gpu: bool,
    only_models: Sequence[str] = (),
    only_tokens: Sequence[int] = (),
    only_candidates: Sequence[str] = (),
    all_shapes: Sequence[Shape] | None = None,
) -> list[Point]:
    """The points of a suite, in the order in which they run: shape by shape, then by tokens.

    Args:
      suite: "quick", "headline" or "full".
      gpu: whether JAX has a GPU; without one only `xla` runs, and interpreted `pallas` on tiny shapes.
      torch_gpu: whether PyTorch has the GPU too.
      only_models, only_tokens, only_candidates: filters; empty takes everything. Numbers of tokens that the suite does
        not have are added to it; a shape that shares its numbers with a wanted model is wanted.

    Raises:
      ValueError: an unknown suite, model or candidate, or tokens below 1.
    """
    known = tuple(shapes() if all_shapes is None else all_shapes)
    _check_filters(suite, known, only_models, only_tokens, only_candidates)
    wanted = [shape for shape in known if not only_models or _has_model(shape, only_models)]
    if gpu and suite == "quick" and not only_models:
        wanted = [shape for shape in wanted if shape.headline]
    found: list[Point] = []
    for shape in wanted:
        if gpu:
            found += [
                Point(shape, None, bound, tuple(("graph_replay", weights) for weights in BOTH)) for bound in BOUNDS
            ]
        for tokens in only_tokens or _tokens(suite, shape):
            found += _candidates(suite, shape, tokens, gpu=gpu, torch_gpu=torch_gpu)
        if gpu and shape.headline and suite != "quick":
            found.append(Point(shape, None, ACCURACY, (("rms", "zero mean"), ("rms", "with a mean"))))
    if not gpu and not only_models:
        tiny = [tokens for tokens in TINY_TOKENS if not only_tokens or tokens in only_tokens]
        found += [
            Point(shape, tokens, candidate, (("wall", "warm"),))
            for shape in TINY_SHAPES
            for tokens in tiny
            for candidate in ("pallas", "xla")
        ]
    return [point for point in found if not only_candidates or point.candidate in only_candidates]


def _tokens(suite: str, shape: Shape) -> tuple[int, ...]:
    if suite == "quick":
        return QUICK_TOKENS
    return ALL_TOKENS if suite == "full" or shape.headline else SPARSE_TOKENS


def _candidates(suite: str, shape: Shape, tokens: int, *, gpu: bool, torch_gpu: bool) -> list[Point]:
    if not gpu:
        return [Point(shape, tokens, "xla", (("wall", "warm"),))]
    with_chain = suite != "quick" and tokens in CHAIN_TOKENS and (shape.headline or suite == "full")
    chains = tuple(("chain_slope", weights) for weights in BOTH) if with_chain else ()
    kernel_time = tuple(("cupti", weights) for weights in BOTH)
    replay = tuple(("graph_replay", weights) for weights in BOTH)
    found = [
        Point(shape, tokens, name, (*(replay if name == "cuda" else ()), *chains, *kernel_time))
        for name in IMPLEMENTATIONS
    ]
    if torch_gpu:
        found += [Point(shape, tokens, peer, tuple(("torch_replay", weights) for weights in BOTH)) for peer in PEERS]
    if chains:
        found.append(Point(shape, tokens, NO_ROUTING, chains))
    return found


def _has_model(shape: Shape, wanted: Iterable[str]) -> bool:
    return any(_same_name(model, name) for model in shape.models for name in wanted)


def _check_filters(
    suite: str, known: Sequence[Shape], names: Sequence[str], tokens: Sequence[int], candidates: Sequence[str]
) -> None:
    if suite not in SUITES:
        raise ValueError(f"suite is {suite!r}. Expected one of {', '.join(SUITES)}; use --suite quick to try it out.")
    for name in names:
        if not any(_has_model(shape, [name]) for shape in known):
            every = ", ".join(model for shape in known for model in shape.models)
            raise ValueError(f"model is {name!r}. Expected one of {every}; pass one of these to --model.")
    for count in tokens:
        if count < 1:
            raise ValueError(f"tokens is {count}. Expected 1 or more; pass a positive number to --tokens.")
    for name in candidates:
        if name not in CANDIDATES:
            every = ", ".join(CANDIDATES)
            raise ValueError(f"implementation is {name!r}. Expected one of {every}; pass one to --implementation.")


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values; the metric that weighs warm and cold alike."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))
