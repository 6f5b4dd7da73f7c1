"""Launches by the million, in CUDA graphs and under load, every result compared on the GPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import timing
from jax_router.verification import gate, gpu_tools
from jax_router.verification.bits import calls, layout_in_words
from jax_router.verification.data import (
    Operands,
    Subject,
    as_stored,
    draw,
    dtype_named,
    in_its_layouts,
    put,
    random_weights,
    structure,
)
from jax_router.verification.result import Context, Failure, Programs, Result

# Each a chain of its own. From 127 tokens on every preset's kernels have a ring of barriers.
TOKENS = (1, 8, 64, 128, 512)
QUICK_TOKENS = (1, 64, 128)
# Of one executable, each with a weight of its own. The copies of the load keep the weights out of L2 in any case.
MOST_CALLS, FEWEST_CALLS = 64, 32
XS = 4  # different x. Launches of the last one have their weights stored [hidden, experts], where these are taken
LEAST = gate.FEWEST_LAUNCHES  # whatever the time
IN_FLIGHT = 16  # executions whose verdict is read at once
WORDS, FIRST, EXPECTED, GOT = range(4)  # of jr_differing
GRAPH_TURNS = 24


@dataclass
class Chain:
    """One executable of many calls, each with a weight of its own, and what they must give.

    `run(xs, routers, expected)` returns how the outputs of all calls differ from `expected`, uint32 [calls, parts, 4]
    as jr_differing of csrc/verification, and the outputs themselves of a subject that promises no bits.
    """

    tokens: int
    xs: list[jax.Array]
    routers: list[Operands]
    run: Callable[..., tuple[jax.Array, Any]]
    expected: Any

    @property
    def calls(self) -> int:
        return len(self.routers)

    def execute(self) -> jax.Array:
        return self.run(self.xs, self.routers, self.expected)[0]


def programs(subject: Subject, context: Context) -> Programs:
    """What both checks run."""
    tokens = _tokens(context)
    chains = {("chain", count): functools.partial(_compile_chain, subject, context, count) for count in tokens}
    return calls(subject, tokens) | chains


def _tokens(context: Context) -> tuple[int, ...]:
    return context.tokens or (QUICK_TOKENS if context.quick else TOKENS)


def _launches(subject: Subject, context: Context) -> int:
    """Of one chain."""
    cold = timing.cold_copies(subject.shape.hidden * subject.shape.experts * dtype_named(subject.multiplied).itemsize)
    return min(max(cold, FEWEST_CALLS), MOST_CALLS) if context.on_gpu else 8


def _compile_chain(subject: Subject, context: Context, tokens: int) -> jax.stages.Compiled:
    """(xs, routers, expected) -> how the outputs differ, and the outputs of who promises no bits."""
    if context.on_gpu:
        gpu_tools.loaded()
    forms = in_its_layouts(subject, context.device)
    operands = [structure(form, tokens) for form in forms]
    outputs = [tuple(jax.eval_shape(subject.call, operands[0]))] * _launches(subject, context)
    ones = [jax.jit(form.call) for form in forms]  # each traced once

    def chain(xs: Sequence[jax.Array], routers: Sequence[Operands], expected: Any) -> tuple[jax.Array, Any]:
        outputs = [tuple(ones[_form(forms, i)](router._replace(x=xs[i % XS]))) for i, router in enumerate(routers)]
        return _differing(outputs, expected, context), () if subject.promises_bits else outputs

    routers = [operands[_form(forms, i)]._replace(x=None) for i in range(len(outputs))]
    return jax.jit(chain).lower([operands[0].x] * XS, routers, outputs).compile()


def _form(forms: Sequence[Subject], launch: int) -> int:
    """Which of these a launch of a chain has."""
    return int(len(forms) > 1 and launch % XS == XS - 1)


def make_chain(subject: Subject, tokens: int, context: Context) -> Chain:
    """A chain with its data, and what it must give: what single launches give, or the chain itself on an idle GPU.

    Raises:
      WrongAloneError: it does not give it although the GPU is idle.
    """
    context.doing(tokens, subject.usual)
    made = programs(subject, context)
    one = context.program(key := ("call", tokens), made[key])
    run = context.program(key := ("chain", tokens), made[key])
    routers = random_weights(subject, _launches(subject, context), context.seed, context.device)
    xs = [put(draw(subject, subject.usual, tokens, context.seed + i), context.device).x for i in range(XS)]
    expected = [tuple(one(router._replace(x=xs[i % XS]))) for i, router in enumerate(routers)]
    forms = in_its_layouts(subject, context.device)
    routers = [
        router._replace(weight=as_stored(router.weight, forms[_form(forms, i)])) for i, router in enumerate(routers)
    ]
    chain = Chain(tokens, xs, routers, run, expected)
    if not subject.promises_bits:  # what the same executable gives counts, not what another one gives
        chain.expected = jax.block_until_ready(run(xs, routers, expected)[1])
    wrong = _first_wrong(subject, context, chain, np.asarray(chain.execute()), 0)
    context.alive(2 * chain.calls)
    if wrong is not None:
        failure, layout = wrong
        what = f"launches in one executable, with {tokens} tokens, are not what they are alone"
        raise WrongAloneError(failure, f"{what}{layout}")
    return chain


def _chains(subject: Subject, context: Context) -> list[Chain]:
    """One for every number of tokens, made once for both checks.

    Raises:
      WrongAloneError: as `make_chain`.
    """
    if not context.chains:
        context.chains = [make_chain(subject, count, context) for count in _tokens(context)]
    return list(context.chains)


class WrongAloneError(Exception):
    """Launches are wrong without any load."""

    def __init__(self, failure: Failure, reason: str):
        super().__init__(reason)
        self.failure, self.reason = failure, reason


def check_load(subject: Subject, context: Context) -> Result:
    """The check "load": a million launches beside copies and busy multiprocessors, weights in rotation.

    Figures: launches by number of tokens, and what the load did meanwhile.
    """
    if not context.on_gpu:
        return Result("load", None, reason="there is no GPU")
    started = time.monotonic()
    figures: dict[str, Any] = {"by tokens": {}}
    launches = 0
    try:
        chains = _chains(subject, context)
        share = (context.deadline - time.monotonic()) / len(chains)
        with gpu_tools.load(context.device) as by_load:
            for chain in chains:
                context.doing(chain.tokens, subject.usual)
                until = min(time.monotonic() + share, context.deadline)
                wanted, least = (min(each, context.launches) / len(chains) for each in (context.launches, LEAST))
                for count, wrong in _executions(subject, context, chain):
                    launches += count
                    figures["by tokens"][str(chain.tokens)] = figures["by tokens"].get(str(chain.tokens), 0) + count
                    if wrong is not None:
                        failure, layout = wrong
                        reason = f"launch {launches} is wrong under load, with {chain.tokens} tokens{layout}"
                        return Result("load", False, launches, time.monotonic() - started, figures, reason, failure)
                    done = figures["by tokens"][str(chain.tokens)]
                    if done >= wanted or (done >= least and time.monotonic() >= until):
                        break
        figures.update(by_load)
        idle = [name for name, done in by_load.items() if not done]
        if idle:
            reason = f"the load did nothing of {', '.join(idle)}"
            return Result("load", None, launches, time.monotonic() - started, figures, reason)
    except WrongAloneError as alone:
        return Result("load", False, 1, time.monotonic() - started, figures, alone.reason, alone.failure)
    return Result("load", True, launches, time.monotonic() - started, figures)


def check_graphs(subject: Subject, context: Context) -> Result:
    """The check "graphs": chains that XLA replays as CUDA graphs.

    With changing contents and buffers, two executables in turn, and two Python threads. Figures of a GPU: how many
    executions recorded a graph, or recorded it again for other buffers, and how many replayed one as it was.
    """
    started = time.monotonic()
    launches, executions, first = 0, 0, None
    figures = {}
    try:
        at_first = gpu_tools.calls() if context.on_gpu else None
        chains = (_chains(subject, context) * 2)[:2]  # of one number of tokens, the same twice
        before = gpu_tools.calls() if context.on_gpu else None
        for verdicts in (
            _changing(subject, context, chains[0]),
            _in_turn(subject, context, chains),
            _threads(subject, context, chains),
        ):
            for count, wrong in verdicts:
                launches += count
                executions += 1
                first = first or wrong
                context.alive(count)
    except WrongAloneError as alone:
        return Result("graphs", False, 1, time.monotonic() - started, {}, alone.reason, alone.failure)
    if at_first is not None and before is not None:
        now = gpu_tools.calls()
        called = now.launched + now.captured - before.launched - before.captured
        figures = {"recorded": now.captured - at_first.captured, "replayed": executions - called}
    if first is not None:
        failure, layout = first
        reason = f"a replayed chain of launches with {failure.tokens} tokens is wrong{layout}"
        return Result("graphs", False, launches, time.monotonic() - started, figures, reason, failure)
    idle = [what for what, count in figures.items() if count <= 0]
    if idle:
        reason = f"XLA {' and '.join(idle)} no CUDA graph of these launches"
        return Result("graphs", None, launches, time.monotonic() - started, figures, reason)
    return Result("graphs", True, launches, time.monotonic() - started, figures)


Wrong = tuple[Failure, str]  # and the layout of the weight, as `layout_in_words`
Verdicts = Iterator[tuple[int, Wrong | None]]


def _changing(subject: Subject, context: Context, chain: Chain) -> Verdicts:
    """The same executable on other buffers (the routers one place on), and on other contents of its own."""
    expected, routers = chain.expected, chain.routers
    step = len(chain.xs)  # keeps each router with its x
    for turn in range(GRAPH_TURNS):
        at = turn * step % len(routers)
        moved = Chain(chain.tokens, chain.xs, routers[at:] + routers[:at], chain.run, expected[at:] + expected[:at])
        for _ in range(2):  # XLA records the graph for other buffers, then it can replay it
            yield from _judged(subject, context, [(moved, moved.execute())])
    # A permutation of the tokens, written into the same memory.
    turned = jax.jit(lambda x: jnp.flip(x, 0), donate_argnums=0)
    rows = jax.jit(lambda outputs: jax.tree.map(lambda each: jnp.flip(each, 0), outputs))  # of every output
    for _ in range(2):
        chain.xs[:] = [turned(x) for x in chain.xs]
        chain.expected = rows(chain.expected)
        if subject.promises_bits:
            yield from _judged(subject, context, [(chain, chain.execute())])


def _in_turn(subject: Subject, context: Context, chains: Sequence[Chain]) -> Verdicts:
    """Not waited for: launches of both executables are in flight."""
    yield from _judged(subject, context, [(chain, chain.execute()) for _ in range(GRAPH_TURNS) for chain in chains])


def _threads(subject: Subject, context: Context, chains: Sequence[Chain]) -> Verdicts:
    def run(chain: Chain) -> list[tuple[Chain, Any]]:
        return [(chain, chain.execute()) for _ in range(GRAPH_TURNS)]

    with ThreadPoolExecutor(len(chains)) as pool:
        for executions in pool.map(run, chains):
            yield from _judged(subject, context, executions)


def _judged(subject: Subject, context: Context, executions: Sequence[tuple[Chain, jax.Array]]) -> Verdicts:
    for chain, differing in executions:
        yield chain.calls, _first_wrong(subject, context, chain, np.asarray(differing), 0)


def _executions(subject: Subject, context: Context, chain: Chain) -> Verdicts:
    """Endless executions, some in flight at any time: how many launches, and the first wrong one."""
    launches = 0
    while True:
        verdicts = np.asarray(jnp.stack([chain.execute() for _ in range(IN_FLIGHT)]))
        for differing in verdicts:
            yield chain.calls, _first_wrong(subject, context, chain, differing, launches)
            launches += chain.calls
        context.alive(chain.calls * IN_FLIGHT)


def _first_wrong(
    subject: Subject, context: Context, chain: Chain, differing: np.ndarray, launches: int
) -> Wrong | None:
    """Of `differing` [calls, parts, 4] of one execution."""
    wrong = np.argwhere(differing[..., WORDS] > 0)
    if not len(wrong):
        return None
    launch, part = map(int, wrong[0])
    found = differing[launch, part]
    words_per_row = chain.expected[launch][part].size // chain.tokens
    forms = in_its_layouts(subject, context.device)
    failure = Failure(
        chain.tokens, subject.usual, context.seed, launches + launch, int(found[FIRST]) // words_per_row,
        f"0x{found[EXPECTED]:08x}", f"0x{found[GOT]:08x}",
    )  # fmt: skip
    return failure, layout_in_words(forms[_form(forms, launch)])


def _differing(outputs: Sequence[Any], expected: Sequence[Any], context: Context) -> jax.Array:
    """How each launch's outputs differ, uint32 [launches, parts, 4]: by one kernel on a GPU."""
    flat, wanted = jax.tree.leaves(list(outputs)), jax.tree.leaves(list(expected))
    result = jax.ShapeDtypeStruct((len(flat), 4), jnp.uint32)
    if context.on_gpu:
        differing = jax.ffi.ffi_call(gpu_tools.FIND_DIFFERING, result)(*flat, *wanted)
    else:
        differing = jnp.stack([_differs(*pair) for pair in zip(flat, wanted, strict=True)])
    return differing.reshape(len(outputs), -1, 4)


def _differs(output: jax.Array, expected: jax.Array) -> jax.Array:
    got, wanted = (jax.lax.bitcast_convert_type(each, jnp.uint32).ravel() for each in (output, expected))
    differs = got != wanted
    first = differs.argmax()
    return jnp.stack([differs.sum(dtype=jnp.uint32), first.astype(jnp.uint32), wanted[first], got[first]])
