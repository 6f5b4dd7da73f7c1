"""Launch overlap with real neighbours, around any implementation (csrc/verification/neighbours.cu)."""

from __future__ import annotations

import functools
import itertools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router.verification import gpu_tools
from jax_router.verification.bits import calls, key_of, launched_alone, layout_in_words
from jax_router.verification.data import Operands, Subject, draw, put, structure
from jax_router.verification.result import Context, Failure, Programs, Result

TOKENS, QUICK_TOKENS = (1, 16, 64, 257), (1, 64, 128)
VARIANTS = 4
CALLS = 24  # of one executable
LAUNCHES, QUICK_LAUNCHES = 6_000, 1_200  # per number of tokens
WAITED, UNWAITED, LAUNCH, PART, WORD, EXPECTED, GOT = range(7)  # of jr_wrong
READ_EVERY = 10  # executions
BLOCK = READ_EVERY * CALLS  # launches
# PTX promises nothing to a reader that does not wait, so a few late words alone are no fault: while several busy
# processes share a GPU, three of 25 blocks and more have some now and then. But with a GPU to itself a launch that
# stores first has none, so they are no pass either.
FEWEST_LATE, LATE_SHARE = 3, 1 / 3

# Launched one by one: in a CUDA graph each custom call is a graph of its own, and none overlaps.
WITHOUT_GRAPHS = {"xla_gpu_graph_min_graph_size": 1_000_000}


def programs(subject: Subject, context: Context) -> Programs:
    """What `check_neighbours` runs."""
    if not (context.on_gpu and subject.promises_bits):
        return {}
    tokens = _tokens(context)
    made: Programs = {}
    for form in launched_alone(subject, context):
        compiled = {
            key_of("between", form, count): functools.partial(_compile_between, form, count) for count in tokens
        }
        made |= calls(form, tokens) | compiled
    return made


def _tokens(context: Context) -> tuple[int, ...]:
    return context.tokens or (QUICK_TOKENS if context.quick else TOKENS)


def check_neighbours(subject: Subject, context: Context) -> Result:
    """The check "neighbours": launches between a producer and a consumer, programmatic and slow at the worst point.

    The producer writes x, the weights and the biases right before, the consumer reads the outputs right after. In both
    layouts of the weight, where these are taken.
    """
    if not context.on_gpu:
        return Result("neighbours", None, reason="there is no GPU")
    if not subject.promises_bits:
        return Result("neighbours", None, reason=f"{subject.implementation} promises no bits to compare")
    gpu_tools.loaded()
    started = time.monotonic()
    launches = late = 0
    blocks = (QUICK_LAUNCHES if context.quick else LAUNCHES) // BLOCK
    made = programs(subject, context)
    for form, tokens in itertools.product(launched_alone(subject, context), _tokens(context)):
        context.doing(tokens, subject.usual)
        found = _check_tokens(form, tokens, context, made, blocks)
        if isinstance(found, Result):
            return found
        count, late_here, failure, what = found
        launches, late = launches + count, max(late, late_here)
        if failure is not None:
            reason = f"{what}{layout_in_words(form)}"
            return Result("neighbours", False, launches, time.monotonic() - started, {}, reason, failure)
    seconds, figures = time.monotonic() - started, {"late_blocks": late, "blocks": blocks}
    if late == 0:
        return Result("neighbours", True, launches, seconds, figures)
    reason = (
        f"a warp that did not wait read something else in {late} of {blocks} times {BLOCK} launches, where 0 pass and "
        f"{least_late(blocks)} are a fault: verify on a GPU that nothing else uses"
    )
    return Result("neighbours", None, launches, seconds, figures, reason)


def least_late(blocks: int) -> int:
    """Blocks with late words, of so many, that are a fault."""
    return max(FEWEST_LATE, math.ceil(blocks * LATE_SHARE))


def _check_tokens(
    subject: Subject, tokens: int, context: Context, made: Programs, blocks: int
) -> tuple[int, int, Failure | None, str | None] | Result:
    """Launches, blocks of them with late words, and what is wrong."""
    variants = [put(draw(subject, subject.usual, tokens, context.seed + i), context.device) for i in range(VARIANTS)]
    present = [name for name, value in variants[0]._asdict().items() if value is not None]
    sources = [tuple(getattr(variant, name) for name in present) for variant in variants]
    one = context.program(key := key_of("call", subject, tokens), made[key])
    expected = [tuple(one(variant)) for variant in variants]
    executable = context.program(key := key_of("between", subject, tokens), made[key])
    copies = re.findall(r"= \S+ copy(?:-start)?\(", executable.as_text() or "")
    if len(copies) > len(present) + 1:  # of the arguments, once
        return Result("neighbours", None, reason=f"XLA puts {len(copies)} copies between the neighbours")

    buffers = jax.block_until_ready(tuple(jnp.copy(source) for source in sources[-1]))
    late = 0
    for block in range(1, blocks + 1):
        wrong = jnp.zeros(8, jnp.uint32)
        for _ in range(READ_EVERY):
            wrong, buffers = executable(wrong, buffers, sources, expected)
        context.alive(BLOCK)
        found = np.asarray(wrong)
        late += int(found[UNWAITED] != 0)
        if found[WAITED] or late == least_late(blocks):
            return block * BLOCK, late, *_describe(subject, tokens, context, found, block, late, expected[0])
    return blocks * BLOCK, late, None, None


def _describe(
    subject: Subject, tokens: int, context: Context, found: np.ndarray, block: int, late: int,
    outputs: tuple[jax.Array, ...],
) -> tuple[Failure, str]:  # fmt: skip
    """What `found`, a jr_wrong, says of the last block of launches, and how many blocks had late words."""
    part, word = int(found[PART]), int(found[WORD])
    row = word * 4 // (outputs[part].nbytes // tokens)
    failure = Failure(
        tokens, subject.usual, context.seed, (block - 1) * BLOCK + int(found[LAUNCH].view(np.int32)), row,
        f"0x{found[EXPECTED]:08x}", f"0x{found[GOT]:08x}",
    )  # fmt: skip
    who = "threads that waited" if found[WAITED] else "a warp that did not wait"
    reason = (
        f"{who} read something else than a launch between its neighbours must give, with {tokens} tokens: "
        f"{found[WAITED]} words after a wait, {found[UNWAITED]} without one, in the last {BLOCK} launches; "
        f"some without one in {late} of {block} times {BLOCK}"
    )
    return failure, reason


def _compile_between(subject: Subject, tokens: int) -> jax.stages.Compiled:
    """(wrong, buffers, sources, expected) -> (wrong, buffers) of CALLS launches between their neighbours."""
    gpu_tools.loaded()
    return trace_between(subject, tokens).lower().compile()


def trace_between(subject: Subject, tokens: int) -> jax.stages.Traced:
    """What is compiled; to trace it needs no library."""
    operands = structure(subject, tokens)
    present = [name for name, value in operands._asdict().items() if value is not None]

    def like(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype)

    one = jax.jit(subject.call)  # traced once

    def run(wrong: jax.Array, buffers: Any, sources: Any, expected: Any) -> tuple[jax.Array, Any]:
        for launch in range(CALLS):
            source = sources[launch % VARIANTS]
            count = len(source)
            # It takes `wrong` only to come after the consumer before it.
            produce = jax.ffi.ffi_call(
                gpu_tools.PRODUCE, [like(each) for each in source],
                input_output_aliases={1 + part: part for part in range(count)}, has_side_effect=True,
            )  # fmt: skip
            buffers = tuple(produce(wrong, *buffers, *source))
            outputs = one(Operands(**dict(zip(present, buffers, strict=True))))
            consume = jax.ffi.ffi_call(
                gpu_tools.CONSUME, [like(wrong), *(like(each) for each in outputs)],
                input_output_aliases={part: part for part in range(1 + len(outputs))}, has_side_effect=True,
            )  # fmt: skip
            wrong, *_ = consume(wrong, *outputs, *expected[launch % VARIANTS], launch=np.int32(launch))
        return wrong, buffers

    buffers = tuple(getattr(operands, name) for name in present)
    outputs = tuple(like(each) for each in jax.eval_shape(subject.call, operands))
    function = jax.jit(run, donate_argnums=(0, 1), compiler_options=WITHOUT_GRAPHS)
    wrong = jax.ShapeDtypeStruct((8,), jnp.uint32)
    return function.trace(wrong, buffers, [buffers] * VARIANTS, [outputs] * VARIANTS)
