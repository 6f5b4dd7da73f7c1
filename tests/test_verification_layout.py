"""Bits, memory, fence, neighbours, graphs and load find what is wrong with a weight stored [hidden, experts] alone."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_verification_bits import ALONE, SHORT, context, counted, exact
from verification_cases import CPU, EXPERTS, GEMM, GPT_OSS, HIDDEN

from jax_router import ops, timing
from jax_router.implementations import cuda
from jax_router.routing import Routing
from jax_router.sweep_points import Shape
from jax_router.verification import bits, data, fence, gpu_tools, load, neighbours
from jax_router.verification.data import Operands, Subject
from jax_router.verification.result import Context

pytestmark = pytest.mark.usefixtures("on_the_cpu", "compiled_in_haste")

IN_WORDS = ", with the weight stored [hidden, experts]"


@pytest.fixture
def both_layouts(monkeypatch) -> Callable[..., Subject]:
    """A subject whose operations are taken in both layouts, and what is wrong with the logits of the other one."""

    def of(wrong: Callable[[jax.Array], jax.Array], shape: Shape) -> Subject:
        def logits_of(x, weight, _bias, *, weight_layout, **_):
            other = weight_layout == "hidden_experts"
            assert weight.shape == ((HIDDEN, EXPERTS) if other else (EXPERTS, HIDDEN))
            logits = exact(Operands(x, weight.T if other else weight))
            return wrong(logits) if other else logits

        def route(*operands, spec, return_logits, **options):
            logits = logits_of(*operands, **options)
            return Routing(*jax.lax.top_k(logits, spec.top_k), logits if return_logits else None)

        monkeypatch.setattr(ops, "router_gemm", logits_of)
        monkeypatch.setattr(ops, "route", route)
        monkeypatch.setattr(cuda, "why_unsupported", lambda problem, device: None)
        return Subject("cuda", shape)

    return of


def from_eight_tokens_on(logits: jax.Array) -> jax.Array:
    return logits.at[7:, 3].add(1)


@pytest.mark.parametrize("shape", [GEMM, GPT_OSS], ids=["router_gemm", "route"])
def test_bits_of_the_other_layout_that_differ_are_found(both_layouts, shape):
    right = bits.check_bits(both_layouts(lambda logits: logits, shape), context())
    assert right.passed, right.reason
    turns = bits.RUNS + bits.OTHER_RUNS
    assert right.figures["batches"] == turns * len(SHORT) == right.launches - 1
    assert 0 < right.figures["rows of the other layout"] <= bits.OTHER_RUNS * sum(SHORT)
    wrong = bits.check_bits(both_layouts(from_eight_tokens_on, shape), context())
    assert (wrong.passed, wrong.failure.tokens, wrong.failure.row) == (False, 8, 7)
    assert f"of a batch of 8{IN_WORDS}: 1 of 8 rows" in wrong.reason


def test_a_layout_that_is_not_taken_is_not_asked_for(both_layouts, monkeypatch):
    subject = both_layouts(from_eight_tokens_on, GEMM)
    refuse = lambda problem, _: "no" if problem.weight_layout == "hidden_experts" else None  # noqa: E731
    monkeypatch.setattr(cuda, "why_unsupported", refuse)
    result = bits.check_bits(subject, context())
    assert (result.passed, result.figures["rows of the other layout"]) == (True, 0)
    assert data.in_other_layout(Subject("xla", GEMM), CPU) is None, "it promises no bits"


@pytest.mark.parametrize("shape", [GEMM, GPT_OSS], ids=["router_gemm", "route"])
def test_memory_launches_both_layouts_unless_it_is_a_quick_run(both_layouts, shape, monkeypatch):
    poisoned = bits._poisoned

    def guarded(shapes, poison, device):
        guard = jax.numpy.full(bits.GUARD_BYTES, poison, "uint8")
        return poisoned(shapes, poison, device)[0], [[guard] * 2] * len(shapes)

    monkeypatch.setattr(bits, "_poisoned", guarded)
    right = bits.check_memory(both_layouts(lambda logits: logits, shape), context())
    assert (right.passed, right.launches) == (True, 2 * len(bits.POISONS) * len(SHORT)), right.reason
    wrong = bits.check_memory(both_layouts(from_eight_tokens_on, shape), context())
    assert (wrong.passed, wrong.failure.tokens) == (False, 8)
    assert wrong.reason == f"row 7 is not what it was in another launch{IN_WORDS}"
    quick = bits.check_memory(both_layouts(from_eight_tokens_on, shape), context(quick=True))
    assert (quick.passed, quick.launches) == (True, len(bits.POISONS) * len(SHORT)), quick.reason


class Launcher:
    """`cuda.call` and the fenced memory on the host; `wrong` does something to a launch, given its arguments."""

    def __init__(self, wrong: Callable[[cuda.RouterGemmArgs], None] = lambda _: None):
        self.wrong, self.memory, self.launched = wrong, {}, []

    def fence(self, name: str, *arguments: Any) -> None:
        if name == "jr_fence_create":
            size, canary, address, before = arguments
            # Aligned, behind the canaries.
            whole = np.full(fence.CANARY_BYTES + size + fence.ALIGNMENT, canary, np.uint8)
            start = whole.ctypes.data + fence.CANARY_BYTES
            address._obj.value = start + -start % fence.ALIGNMENT
            before._obj.value = fence.CANARY_BYTES
            self.memory[address._obj.value] = whole
        elif name == "jr_fence_free":
            del self.memory[arguments[0]]
        else:
            ctypes.memmove(*arguments)

    def launch(self, name: str, args: Any, _stream: None) -> None:
        assert name == "jr_router_gemm"
        given = args._obj
        other = given.weight_layout == 1
        self.launched.append((given.tokens, given.workspace_bytes > 0, other))
        sizes = (given.hidden, given.experts) if other else (given.experts, given.hidden)
        x, weight = (
            at(address, shape, "uint16").view(ml_dtypes.bfloat16)
            for address, shape in ((given.x, (given.tokens, given.hidden)), (given.weight, sizes))
        )
        out = at(given.out, (given.tokens, given.experts), "float32")
        out[:] = exact(Operands(jnp.asarray(x), jnp.asarray(weight.T if other else weight)))
        if other:
            self.wrong(given)


def at(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The memory at an address, as it is."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


def other_bits(given: cuda.RouterGemmArgs) -> None:
    at(given.out, (given.tokens, given.experts), "float32")[-1, 3] += 1


def before_x(given: cuda.RouterGemmArgs) -> None:
    at(given.x - 5, (1,), "uint8")[:] = 0


def into_the_weight(given: cuda.RouterGemmArgs) -> None:
    at(given.weight, (1,), "uint16")[:] += 1


@pytest.fixture
def fenced(both_layouts, monkeypatch):
    def check(launcher: Launcher, **changes):
        monkeypatch.setattr(gpu_tools, "call", launcher.fence)
        monkeypatch.setattr(cuda, "call", launcher.launch)
        found = fence.check_fence(both_layouts(lambda logits: logits, GEMM), context(tokens=(7, 65), **changes))
        assert not launcher.memory, "all of it is given back"
        return found

    return check


@pytest.mark.parametrize("quick", [False, True])
def test_the_fence_is_around_launches_of_both_layouts(fenced, quick):
    right = fenced(launcher := Launcher(), quick=quick)
    assert right.passed, right.reason
    scratch = [(7, False), (65, False), (65, True)]
    assert right.launches == len(launcher.launched) == 2 * len(scratch)
    assert set(launcher.launched) == {(*each, other) for each, other in itertools.product(scratch, (False, True))}


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (other_bits, "row 6 is not what the custom call gives"),
        (before_x, "5 bytes before x something was written"),
        (into_the_weight, "the launch changed its input weight"),
    ],
)
def test_the_fence_names_the_other_layout(fenced, wrong, what):
    result = fenced(Launcher(wrong))
    assert (result.passed, result.reason, result.failure.tokens) == (False, f"{what}{IN_WORDS}", 7)


def test_neighbours_surround_both_layouts_unless_it_is_a_quick_run(both_layouts, monkeypatch):
    monkeypatch.setattr(gpu_tools, "loaded", lambda: None)
    subject, operands = both_layouts(lambda logits: logits, GEMM), []

    class Between:
        """An executable in which this many words are wrong after a wait."""

        def __init__(self, waited: int):
            self.found = jax.numpy.array([waited, 0, 7, 0, 12 * EXPERTS, 1, 2, 0], "uint32")

        def as_text(self) -> str:
            return ""

        def __call__(self, wrong, buffers, sources, expected):
            operands.append(sources[0][1].shape)
            return self.found, buffers

    def checked(of_other: Between, **changes):
        where = context(tokens=(16,), **changes)
        compiled = {("between", 16): lambda: Between(0), ("between hidden_experts", 16): lambda: of_other}
        where.ahead(compiled)
        operands.clear()
        with jax.default_device(CPU):
            return neighbours.check_neighbours(subject, where)

    right = checked(Between(0))
    assert (right.passed, right.launches) == (True, 2 * neighbours.LAUNCHES)
    assert set(operands) == {(EXPERTS, HIDDEN), (HIDDEN, EXPERTS)}
    wrong = checked(Between(3))
    assert wrong.passed is False
    assert wrong.reason.endswith(IN_WORDS)
    assert checked(Between(3), quick=True).passed
    assert set(operands) == {(EXPERTS, HIDDEN)}


def test_chains_hold_launches_of_both_layouts(both_layouts):
    right = load.check_graphs(both_layouts(lambda logits: logits, GPT_OSS), Context(CPU, tokens=(8,)))
    assert right.passed, right.reason
    wrong = load.check_graphs(both_layouts(from_eight_tokens_on, GEMM), Context(CPU, tokens=(8,)))
    assert (wrong.passed, wrong.reason) == (False, f"{ALONE}{IN_WORDS}")
    assert (wrong.failure.launch, wrong.failure.row) == (load.XS - 1, 7)


LATER = 9  # of the launches with the other layout: every chain of eight has two


def test_a_launch_of_the_other_layout_that_is_wrong_later_is_named(both_layouts, monkeypatch):
    differing = load._differing
    monkeypatch.setattr(gpu_tools, "loaded", lambda: None)
    monkeypatch.setattr(gpu_tools, "load", lambda _: contextlib.nullcontext({}))
    monkeypatch.setattr(load, "_differing", lambda outputs, expected, _: differing(outputs, expected, Context(CPU)))
    monkeypatch.setattr(load, "MOST_CALLS", 8)

    def wrong_once() -> Subject:
        change = counted(lambda run: run == LATER)
        return both_layouts(lambda logits: change(None, logits), GEMM)

    graphs = load.check_graphs(wrong_once(), Context(CPU, tokens=(8,)))
    assert (graphs.passed, graphs.failure.launch % load.XS) == (False, load.XS - 1)
    assert graphs.reason == f"a replayed chain of launches with 8 tokens is wrong{IN_WORDS}"
    under_load = load.check_load(wrong_once(), context(tokens=(8,)))
    assert (under_load.passed, under_load.failure.launch % load.XS) == (False, load.XS - 1)
    assert under_load.reason == f"launch {under_load.launches} is wrong under load, with 8 tokens{IN_WORDS}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chains_of_float32_weights_rotate_as_many_as_four_bytes_ask_for(dtype):
    wanted = timing.cold_copies(4096 * 224 * 4)
    assert load.FEWEST_CALLS < wanted < min(load.MOST_CALLS, timing.cold_copies(4096 * 224 * 2))
    assert (
        load._launches(Subject("cuda", Shape(4096, 224, False, ()), dtype, weight_dtype="float32"), context()) == wanted
    )
