"""What a run of the verification covers: subjects by models, implementations and operations; checks in their order."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jax_router import dispatch, implementations
from jax_router.models import models
from jax_router.routing import RoutingSpec
from jax_router.sweep_points import FLOAT32_WEIGHTS, IMPLEMENTATIONS, ROUTE_HEADLINE_MODELS, Shape, route_shapes, shapes
from jax_router.tables import OPERATIONS
from jax_router.verification import bits, fence, gate, load, neighbours, numerics
from jax_router.verification.data import Operands, Subject
from jax_router.verification.result import Context, Programs, Result

ALL = "all"  # as a model: every preset
QUICK_MODEL = "gpt-oss-120b"
# hidden is no multiple of a tile of K, the experts are none of a tile of experts, nor, of the first, of four.
AWKWARD = "awkward"
_AWKWARD_SPEC = RoutingSpec(top_k=6, score_function="sigmoid", renormalize=True, num_groups=2, group_topk=1)
AWKWARD_SHAPES = (
    Shape(1000, 46, True, (AWKWARD,)),
    Shape(2824, 136, True, (AWKWARD,)),  # kernels with large tiles from 128 tokens on, and weights [hidden, experts]
    Shape(1000, 46, True, (AWKWARD,), _AWKWARD_SPEC, correction_bias=True),
)
# Weights are verified in float32 too, of the routers that the sweep measures so, and in sizes that fill no tile, whose
# experts are a multiple of 8, so that both layouts are taken. By default each operation has both dtypes of x.
_FLOAT32_GEMM = Shape(1000, 40, True, (AWKWARD,))
_FLOAT32_ROUTE = Shape(1000, 40, True, (AWKWARD,), _AWKWARD_SPEC, correction_bias=True)
FLOAT32_AWKWARD = ((_FLOAT32_GEMM, "float32"), (_FLOAT32_ROUTE, "bfloat16"), (_FLOAT32_ROUTE, "float32"))
DEFAULT_FLOAT32 = (AWKWARD, "MiniMax-M2")

IDENTITY = (*gate.SUBJECT, "source", "models")  # of the subjects in a record
MINUTES, LAUNCHES = 5.0, 1_000_000
QUICK_MINUTES, QUICK_LAUNCHES = 0.75, 500_000
MOST_SEED = 2**31 - 1


def defaults(minutes: float | None, launches: int | None, *, quick: bool) -> tuple[float, int]:
    """What was asked for, or what a run has that did not ask."""
    if minutes is None:
        minutes = QUICK_MINUTES if quick else MINUTES
    return minutes, launches if launches is not None else QUICK_LAUNCHES if quick else LAUNCHES


@dataclass(frozen=True)
class Options:
    """What the command was asked for; JSON holds all of it. Empty tuples ask for everything, or for the default.

    `subject`, as a record holds it, is the only one of those that the rest asks for.
    """

    implementations: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    checks: tuple[str, ...] = ()
    minutes: float = MINUTES
    launches: int = LAUNCHES
    seed: int = 0
    quick: bool = False
    checkpoint: str | None = None
    activations: str | None = None
    sanitizers: bool = False
    subject: dict[str, Any] | None = None

    @classmethod
    def of(cls, document: dict[str, Any]) -> Options:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in document.items()
        }
        return cls(**values)

    def check(self) -> None:
        """Raise ValueError for what makes no sense, without looking at any device."""
        known = {
            "implementation": (self.implementations, IMPLEMENTATIONS),
            "operation": (self.operations, OPERATIONS),
            "model": (self.models, (*_names(), AWKWARD, ALL)),
            "check": (self.checks, tuple(CHECKS)),
        }
        for name, (asked, accepted) in known.items():
            for value in asked:
                if value not in accepted:
                    raise ValueError(
                        f"{name} is {value!r}. Expected one of {', '.join(accepted)}; pass one of these to --{name}."
                    )
        for name, number in {"minutes": self.minutes, "launches": self.launches}.items():
            if not number > 0:
                raise ValueError(f"{name} is {number}. Expected more than 0; pass a positive number to --{name}.")
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"seed is {self.seed}. Expected 0 to {MOST_SEED}; pass one of these to --seed.")
        for count in self.tokens:
            if count < 1:
                raise ValueError(f"tokens is {count}. Expected 1 or more; pass a positive number to --tokens.")
        if self.checkpoint and self.models:
            raise ValueError("checkpoint and model are both given. Expected one of them; leave out --model.")
        if self.activations and not self.checkpoint:
            raise ValueError(
                "activations are given without a checkpoint. Expected the router they were recorded before; add "
                "--checkpoint."
            )


def _names() -> list[str]:
    return [model for shape in route_shapes(models) for model in shape.models]


def all_shapes(options: Options) -> list[Shape]:
    """The shapes of the presets that are asked for: router GEMMs, then routing, and awkward ones of each."""
    gemms, routes = ([shape for shape in AWKWARD_SHAPES if (shape.spec is None) == bare] for bare in (True, False))
    known = [*gemms, *shapes(models), *routes, *route_shapes(models)]
    wanted = set(options.models) or {AWKWARD, *((QUICK_MODEL,) if options.quick else ROUTE_HEADLINE_MODELS)}
    found = [shape for shape in known if ALL in wanted or wanted.intersection(shape.models)]
    return [shape for shape in found if not options.operations or shape.operation in options.operations]


def float32_routers(options: Options) -> list[Subject]:
    """Those with float32 weights that are asked for; a quick run has none unless they are named."""
    wanted = set(options.models) or set(() if options.quick else DEFAULT_FLOAT32)
    named = {name for name, _ in FLOAT32_WEIGHTS} if ALL in wanted else wanted
    known = [
        (dataclasses.replace(shape, models=(name,)), dtype)
        for name, dtype in FLOAT32_WEIGHTS
        for shape in (*shapes(models), *route_shapes(models))
        if name in named.intersection(shape.models)
    ]
    if wanted.intersection((ALL, AWKWARD)):
        known += FLOAT32_AWKWARD
    return [
        Subject("", shape, dtype, weight_dtype=None if dtype == "float32" else "float32")
        for shape, dtype in known
        if not options.operations or shape.operation in options.operations
    ]


def subjects(options: Options, device: jax.Device) -> tuple[list[Subject], dict[str, str]]:
    """Everything to verify on a device, and why each implementation that is left out does not run here.

    Raises:
      ValueError: `options.subject` is none of it.
    """
    if options.checkpoint:
        routers = _of_checkpoint(options)
        # As MiniMax-M2 has them: x in bfloat16 beside float32 weights.
        of_cuda = [
            dataclasses.replace(router, dtype="bfloat16", weight_dtype="float32")
            for router in routers
            if router.dtype == "float32"
        ]
    else:
        routers, of_cuda = [Subject("", shape) for shape in all_shapes(options)], float32_routers(options)
    found: list[Subject] = []
    refused: dict[str, str] = {}
    default = ("cuda", "pallas", "xla") if device.platform == "gpu" else ("xla",)
    for name in options.implementations or default:
        if options.quick and not options.implementations and found:
            break  # one that runs here is what a minute is enough for
        for router in (*routers, *(of_cuda if name == "cuda" else ())):
            subject = _as_taken(dataclasses.replace(router, implementation=name))
            if options.subject is not None and identity(describe(subject)) != identity(options.subject):
                continue
            why = dispatch.why_unsupported(subject.problem(1), dispatch.Device.of(device), name)
            why = why or implementations.load(name).unavailable()
            if why is None:
                found.append(subject)
            else:
                refused[name] = why
    if options.subject is not None and not (found or refused):
        raise ValueError(
            f"subject is {gate.label(options.subject)} of {', '.join(options.subject['models'])}, "
            f"{options.subject['source']}. Expected one that this version verifies; run jax-router verify without "
            "--replay."
        )
    return found, refused


def _as_taken(subject: Subject) -> Subject:
    """`pallas` multiplies 16-bit weights: a checkpoint's in float32 are rounded for it, which the source says.

    Biases and scales stay as they are stored, or become float32, which is exact, beside weights of another dtype.
    """
    given, dtype, source = subject.given, subject.dtype, subject.source
    if given is None:
        return subject
    if dtype == "float32" and subject.implementation == "pallas":
        narrow = np.dtype(ml_dtypes.bfloat16)
        given, dtype = given._replace(weight=given.weight.astype(narrow)), narrow.name
        source = f"{source}, in bfloat16"
    wide = {
        name: value.astype(np.float32)
        for name, value in given._asdict().items()
        if name not in ("x", "weight") and value is not None and value.dtype.name not in (dtype, "float32")
    }
    return dataclasses.replace(subject, given=given._replace(**wide), dtype=dtype, source=source)


def _of_checkpoint(options: Options) -> list[Subject]:
    """The first and the last router of a checkpoint, and every one of another form, as router GEMM and as routing."""
    from jax_router.verification import checkpoints

    assert options.checkpoint is not None

    @functools.cache
    def recorded(hidden: int) -> NDArray[Any] | None:
        return None if options.activations is None else checkpoints.activations(Path(options.activations), hidden)

    routers = checkpoints.routers(Path(options.checkpoint))
    found: dict[Any, Subject] = {}
    for router in (*routers[:1], *routers[::-1]):
        experts, hidden = router.weight.shape
        given = Operands(None, router.weight, router.bias, router.correction_bias, router.expert_scale)
        for spec in (None, router.spec):
            shape = Shape(
                hidden, experts, router.bias is not None, (router.name,), spec, router.correction_bias is not None
            )
            of_operation = given if spec is not None else given._replace(correction_bias=None, expert_scale=None)
            key = (dataclasses.replace(shape, models=()), router.layer == routers[0].layer)
            dtype = router.weight.dtype.name
            subject = Subject(
                "", shape, dtype, of_operation, recorded(hidden), source=f"checkpoint {options.checkpoint}"
            )
            found.setdefault(key, subject)
    return [subject for subject in found.values() if not options.operations or subject.operation in options.operations]


@dataclass(frozen=True)
class Check:
    """One check: what it is called with, and the executables it will ask for."""

    run: Callable[[Subject, Context], Result | list[Result]]
    programs: Callable[[Subject, Context], Programs]


_NUMERICS = Check(numerics.check_numerics, numerics.programs)
# By name, in the order in which they run: what is cheap and sees most first, what repeats until the time is up last.
CHECKS = {
    "accuracy": _NUMERICS,
    "experts": _NUMERICS,  # of routing
    "bits": Check(bits.check_bits, bits.programs_of_bits),
    "memory": Check(bits.check_memory, bits.programs_of_memory),
    "fence": Check(fence.check_fence, fence.programs),
    "neighbours": Check(neighbours.check_neighbours, neighbours.programs),
    "graphs": Check(load.check_graphs, load.programs),
    "load": Check(load.check_load, load.programs),
}


def checks_of(options: Options) -> dict[str, Check]:
    """The checks that are asked for, by the first name of each."""
    found: dict[str, Check] = {}
    for name, check in CHECKS.items():
        if (not options.checks or name in options.checks) and check not in found.values():
            found[name] = check
    return found


def describe(subject: Subject) -> dict[str, Any]:
    """The subject as a record holds it."""
    shape = subject.shape
    return {
        "operation": subject.operation,
        "implementation": subject.implementation,
        "models": list(shape.models),
        "source": subject.source,
        "hidden": shape.hidden,
        "experts": shape.experts,
        "bias": shape.bias,
        "dtype": subject.dtype,
        "weight_dtype": subject.weight_dtype,
        "out_dtype": "float32",
        "rule": shape.rule,
    }


def identity(subject: Mapping[str, Any]) -> str:
    """What tells a subject of a record, or as `describe` returns it, from the others."""
    return json.dumps([subject.get(name) for name in IDENTITY], sort_keys=True)
