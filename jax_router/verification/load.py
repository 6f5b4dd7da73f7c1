"""Launches by the million, in CUDA graphs and under load, every result compared on the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import timing
from jax_router.verification import library
from jax_router.verification.bits import row_bits
from jax_router.verification.data import Operands, Subject, compiled, draw, put, random_weights
from jax_router.verification.result import Context, Failure, Result

TOKENS = (1, 8, 32, 64, 256)
QUICK_TOKENS = (1, 64, 256)
MOST_CALLS = 128  # of one executable, each with a weight of its own; more take long to compile
FEWEST_CALLS = 32
XS = 4  # different x
IN_FLIGHT_BYTES = 1 << 30  # of outputs that are kept until their verdict is read
MOST_IN_FLIGHT = 16
GRAPH_TURNS = 24
GRAPH_TOKENS = (8, 64)


@dataclass
class Chain:
    """One executable of many calls, each with a weight of its own, and what they must give.

    `run(xs, routers, expected)` returns the outputs of all calls and how many words of each differ from `expected`.
    """

    tokens: int
    xs: list[jax.Array]
    routers: list[Operands]
    run: Callable[..., tuple[Any, jax.Array]]
    expected: Any

    @property
    def calls(self) -> int:
        return len(self.routers)

    @property
    def output_bytes(self) -> int:
        return sum(each.nbytes for each in jax.tree.leaves(self.expected))

    def execute(self) -> tuple[Any, jax.Array]:
        return self.run(self.xs, self.routers, self.expected)


def make_chain(subject: Subject, tokens: int, context: Context, calls: int | None = None) -> Chain:
    """Compile a chain, and take what it gives on an idle GPU as what it must give.

    Where the subject promises bits, single launches must give the same.

    Raises:
      WrongAloneError: they do not.
    """
    context.doing(tokens, subject.usual)
    shape = subject.shape
    weight_bytes = shape.hidden * shape.experts * np.dtype(jnp.bfloat16).itemsize
    cold = timing.cold_copies(weight_bytes) if context.on_gpu else 4
    routers = random_weights(subject, calls or min(max(cold, FEWEST_CALLS), MOST_CALLS), context.seed, context.device)
    one = compiled(subject)
    xs = [put(draw(subject, subject.usual, tokens, context.seed + i), context.device).x for i in range(XS)]

    def chain(xs: Sequence[jax.Array], routers: Sequence[Operands], expected: Any) -> tuple[Any, jax.Array]:
        outputs = [one(router._replace(x=xs[i % len(xs)])) for i, router in enumerate(routers)]
        return outputs, jnp.stack([_differing(*pair) for pair in zip(outputs, expected, strict=True)])

    shapes = jax.eval_shape(one, routers[0]._replace(x=xs[0]))
    zeros = [tuple(jnp.zeros(each.shape, each.dtype) for each in shapes)] * len(routers)
    run = jax.jit(chain)
    outputs, _ = jax.block_until_ready(run(xs, routers, zeros))
    context.alive(len(routers))
    if subject.promises_bits:
        for i, router in enumerate(routers):
            alone = row_bits(one(router._replace(x=xs[i % XS])))
            got = row_bits(outputs[i])
            if not np.array_equal(alone, got):
                row = int((alone != got).any(-1).argmax())
                raise WrongAloneError(
                    _failure(subject, context, tokens, i, alone, got),
                    f"row {row} of launch {i} of {len(routers)} in one executable is not what the launch gives alone",
                )
    return Chain(tokens, xs, routers, run, outputs)


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
    tokens = context.tokens or (QUICK_TOKENS if context.quick else TOKENS)
    figures: dict[str, Any] = {"by tokens": {}}
    launches = 0
    try:
        chains = [make_chain(subject, count, context) for count in tokens]
        launches = sum(chain.calls for chain in chains)
        share = (context.deadline - time.monotonic()) / len(chains)
        with library.load(context.device) as done:
            for chain in chains:
                context.doing(chain.tokens, subject.usual)
                until = min(time.monotonic() + share, context.deadline)
                wanted = context.launches / len(chains)
                for count, failure in _executions(subject, context, chain):
                    launches += count
                    figures["by tokens"][str(chain.tokens)] = figures["by tokens"].get(str(chain.tokens), 0) + count
                    if failure is not None:
                        reason = f"launch {launches} is wrong under load, with {chain.tokens} tokens"
                        return Result("load", False, launches, time.monotonic() - started, figures, reason, failure)
                    if figures["by tokens"][str(chain.tokens)] >= wanted or time.monotonic() >= until:
                        break
        figures.update(done)
    except WrongAloneError as wrong:
        return Result("load", False, max(launches, 1), time.monotonic() - started, figures, wrong.reason, wrong.failure)
    return Result("load", True, launches, time.monotonic() - started, figures)


def check_graphs(subject: Subject, context: Context) -> Result:
    """The check "graphs": chains that XLA replays as CUDA graphs.

    With changing contents and buffers, two executables in turn, and two Python threads.
    """
    started = time.monotonic()
    launches, failed = 0, None
    tokens = (context.tokens or GRAPH_TOKENS)[:2]
    try:
        chains = [make_chain(subject, count, context, calls=8) for count in tokens]
        for verdicts in (
            _changing(subject, context, chains[0]),
            _in_turn(subject, context, chains),
            _threads(subject, context, chains),
        ):
            for count, failure in verdicts:
                launches += count
                failed = failed or failure
                context.alive(count)
    except WrongAloneError as wrong:
        return Result("graphs", False, 1, time.monotonic() - started, {}, wrong.reason, wrong.failure)
    if failed is not None:
        reason = f"a replayed chain of launches with {failed.tokens} tokens is wrong"
        return Result("graphs", False, launches, time.monotonic() - started, {}, reason, failed)
    return Result("graphs", True, launches, time.monotonic() - started)


Verdicts = Iterator[tuple[int, Failure | None]]


def _changing(subject: Subject, context: Context, chain: Chain) -> Verdicts:
    """The same executable on other buffers (the routers one place on), and on other contents of the same buffers."""
    expected, routers = chain.expected, chain.routers
    step = len(chain.xs)  # keeps each router with its x
    for turn in range(GRAPH_TURNS):
        at = turn * step % len(routers)
        moved = Chain(chain.tokens, chain.xs, routers[at:] + routers[:at], chain.run, expected[at:] + expected[:at])
        yield from _judged(subject, context, [(moved, moved.execute())])
    # A permutation of the tokens, written into the same memory.
    turned = jax.jit(lambda x: jnp.flip(x, 0), donate_argnums=0)
    rows = jax.jit(lambda outputs: jax.tree.map(lambda each: jnp.flip(each, 0), outputs))
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


def _judged(subject: Subject, context: Context, executions: Sequence[tuple[Chain, Any]]) -> Verdicts:
    for chain, (outputs, differing) in executions:
        yield chain.calls, _first_wrong(subject, context, chain, outputs, np.asarray(differing), 0)


def _executions(subject: Subject, context: Context, chain: Chain) -> Verdicts:
    """Endless executions, some in flight at any time: how many launches, and the first wrong one."""
    at_once = max(1, min(MOST_IN_FLIGHT, IN_FLIGHT_BYTES // max(chain.output_bytes, 1)))
    launches = 0
    while True:
        executions = [chain.execute() for _ in range(at_once)]
        verdicts = np.asarray(jnp.stack([differing for _, differing in executions]))
        for (outputs, _), differing in zip(executions, verdicts, strict=True):
            yield chain.calls, _first_wrong(subject, context, chain, outputs, differing, launches)
            launches += chain.calls
        context.alive(chain.calls * at_once)


def _first_wrong(
    subject: Subject, context: Context, chain: Chain, outputs: Any, differing: np.ndarray, launches: int
) -> Failure | None:
    if not differing.any():
        return None
    at = int(differing.argmax())
    return _failure(subject, context, chain.tokens, launches + at, row_bits(chain.expected[at]), row_bits(outputs[at]))


def _failure(
    subject: Subject, context: Context, tokens: int, launch: int, expected: np.ndarray, got: np.ndarray
) -> Failure:
    row, place = map(int, np.argwhere(expected != got)[0])
    wanted, read = f"0x{expected[row, place]:08x}", f"0x{got[row, place]:08x}"
    return Failure(tokens, subject.usual, context.seed, launch, row, wanted, read)


def _differing(outputs: Sequence[jax.Array], expected: Sequence[jax.Array]) -> jax.Array:
    """How many words of these outputs have other bits."""

    def bits(array: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(array, {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])

    counts = [(bits(a) != bits(b)).sum(dtype=jnp.int32) for a, b in zip(outputs, expected, strict=True)]
    return jnp.sum(jnp.stack(counts))
