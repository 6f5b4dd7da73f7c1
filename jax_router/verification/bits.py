"""The bits of a token: the same whatever the batch, the position, the neighbours and the run; and what is written."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jax_router import parity
from jax_router.verification.data import (
    Operands,
    Subject,
    as_stored,
    compile_call,
    draw,
    in_its_layouts,
    in_other_layout,
    put,
    structure,
    with_garbage,
)
from jax_router.verification.result import Context, Failure, Programs, Result

Array = NDArray[Any]

TOKENS = (1, 2, 7, 8, 16, 33, 64, 127, 128, 257, 1024)
QUICK_TOKENS = (1, 7, 64, 128, 257)
REFERENCE_TOKENS = 1087  # the batch whose rows are the reference: larger than the others, and of an odd size
RUNS = 8  # of every number of tokens, each on other rows
OTHER_RUNS = 2  # more of them, with the weight stored [hidden, experts]
MEMORY_TOKENS, QUICK_MEMORY_TOKENS = (1, 7, 16, 127, 1024), (1, 7, 128)
POISONS = (0xFF, 0x2A)  # bytes
GUARD_BYTES = 4096
ATTEMPTS = 32  # to find three neighbouring pieces of memory


def row_bits(outputs: Sequence[Any]) -> Array:
    """The bits of a call's outputs, one row per token."""
    return np.concatenate([parity.bits(np.asarray(output)) for output in outputs], axis=1)


def calls(subject: Subject, tokens: Iterable[int]) -> Programs:
    """Single calls of these numbers of tokens, which many checks share."""
    return {key_of("call", subject, count): functools.partial(compile_call, subject, count) for count in tokens}


def key_of(program: str, subject: Subject, tokens: int) -> tuple[str, int]:
    """Under which name a context has a program of the subject in its layout."""
    return program if subject.weight_layout == "experts_hidden" else f"{program} {subject.weight_layout}", tokens


def launched_alone(subject: Subject, context: Context) -> list[Subject]:
    """The subject in the layouts that "memory" and "neighbours" launch: a quick run has the usual one alone."""
    return [subject] if context.quick else in_its_layouts(subject, context.device)


def layout_in_words(form: Subject) -> str:
    """For messages: nothing of the usual layout."""
    return "" if form.weight_layout == "experts_hidden" else ", with the weight stored [hidden, experts]"


def programs_of_bits(subject: Subject, context: Context) -> Programs:
    """What `check_bits` runs."""
    if not subject.promises_bits:
        return {}
    tokens, other = _tokens(context), in_other_layout(subject, context.device)
    of_other = {} if other is None else calls(other, tokens)
    return calls(subject, (*tokens, _reference_tokens(tokens))) | of_other


def programs_of_memory(subject: Subject, context: Context) -> Programs:
    """What `check_memory` runs."""
    tokens = _memory_tokens(context)
    into = {
        key_of("into", form, count): functools.partial(_compile_into, form, count)
        for form in launched_alone(subject, context)
        for count in tokens
    }
    return (calls(subject, tokens) if subject.promises_bits else {}) | into


def _tokens(context: Context) -> tuple[int, ...]:
    return context.tokens or (QUICK_TOKENS if context.quick else TOKENS)


def _memory_tokens(context: Context) -> tuple[int, ...]:
    return context.tokens or (QUICK_MEMORY_TOKENS if context.quick else MEMORY_TOKENS)


def _reference_tokens(tokens: Iterable[int]) -> int:
    """The same whatever was asked for, so that a single number of tokens is checked on the same rows again."""
    return max(REFERENCE_TOKENS, max(tokens) + 63)


def check_bits(subject: Subject, context: Context) -> Result:
    """The check "bits": rows of one large batch, again in batches of every size, in other places, beside garbage.

    And with the weight stored [hidden, experts], where that is taken.
    """
    if not (subject.promises_bits and context.on_gpu):
        return Result("bits", None, reason=f"{subject.implementation} promises no bits here")
    started = time.monotonic()
    tokens, made = _tokens(context), programs_of_bits(subject, context)
    everything = draw(subject, subject.usual, _reference_tokens(tokens), context.seed)
    other = in_other_layout(subject, context.device)
    turns = [subject] * RUNS + ([] if other is None else [other] * OTHER_RUNS)
    fixed = {
        form.weight_layout: put(everything._replace(x=None, weight=as_stored(everything.weight, form)), context.device)
        for form in (subject, *turns[RUNS:])
    }

    def bits_of(x: Array, form: Subject) -> Array:
        run = context.program(key := key_of("call", form, len(x)), made[key])
        return row_bits(run(fixed[form.weight_layout]._replace(x=jax.device_put(x, context.device))))

    expected, launches = bits_of(everything.x, subject), 1
    figures = {"batches": 0, "rows": 0, "rows of the other layout": 0}
    for count in tokens:
        context.doing(count, subject.usual)
        random = np.random.default_rng([context.seed, count])
        for turn, form in enumerate(turns):
            rows = random.permutation(len(expected))[:count]
            garbage = np.flatnonzero(random.random(count) < (0.25 if turn % 2 and count > 1 else 0))
            got = bits_of(with_garbage(everything.x[rows], garbage, random), form)
            judged = np.setdiff1d(np.arange(count), garbage)
            wrong = judged[(got[judged] != expected[rows[judged]]).any(-1)]
            launches += 1
            if len(wrong):
                row = int(wrong[0])
                place = int((got[row] != expected[rows[row]]).argmax())
                failure = Failure(
                    count, subject.usual, context.seed, launches - 1, row, f"0x{expected[rows[row], place]:08x}",
                    f"0x{got[row, place]:08x}",
                )  # fmt: skip
                reason = (
                    f"token {rows[row]} of {len(expected)} has other bits at place {row} of a batch of {count}"
                    f"{layout_in_words(form)}: {len(wrong)} of {len(judged)} rows"
                )
                return Result("bits", False, launches, time.monotonic() - started, figures, reason, failure)
            figures["batches"] += 1
            figures["rows" if form is subject else "rows of the other layout"] += len(judged)
        context.alive(len(turns))
    return Result("bits", True, launches, time.monotonic() - started, figures)


def check_memory(subject: Subject, context: Context) -> Result:
    """The check "memory": into poisoned outputs; every element is written, nothing beside them, and no input changes.

    The outputs are donated, so that XLA lets the subject write into them. Guards of GUARD_BYTES lie right before and
    behind them, as far as the allocator puts them there; `guarded` counts the launches where it did. Launches of the
    other layout must write what those of the subject's own do.
    """
    started = time.monotonic()
    figures = {"guarded": 0}
    launches = 0
    made = programs_of_memory(subject, context)

    forms = launched_alone(subject, context)

    for tokens in _memory_tokens(context):
        context.doing(tokens, subject.usual)
        # Who promises no bits must at least agree with itself: what is not written differs as the poison does.
        expected = None
        if subject.promises_bits:
            operands = put(draw(subject, subject.usual, tokens, context.seed), context.device)
            expected = row_bits(context.program(key := key_of("call", subject, tokens), made[key])(operands))

        for form, poison in itertools.product(forms, POISONS):
            host = draw(form, subject.usual, tokens, context.seed)
            operands = put(host, context.device)
            run = context.program(key := key_of("into", form, tokens), made[key])
            poisoned, guards = _poisoned(jax.eval_shape(form.call, operands), poison, context.device)
            addresses = [array.unsafe_buffer_pointer() for array in poisoned]
            outputs = jax.block_until_ready(run(tuple(poisoned), operands))
            launches += 1
            if [array.unsafe_buffer_pointer() for array in outputs] != addresses:
                return Result("memory", None, launches, reason="XLA does not write into the donated outputs here")
            figures["guarded"] += all(len(pair) == 2 for pair in guards)
            expected = row_bits(outputs) if expected is None else expected
            found = _judge_memory(outputs, expected, guards, poison, operands, host)
            if found is not None:
                what, row, wanted, got = found
                reason = what + layout_in_words(form)
                failure = Failure(tokens, subject.usual, context.seed, launches - 1, row, wanted, got)
                return Result("memory", False, launches, time.monotonic() - started, figures, reason, failure)
        context.alive(len(forms) * len(POISONS))
    if context.on_gpu and not figures["guarded"]:
        reason = "the allocator put no guard beside an output; every element was written, and no input changed"
        return Result("memory", None, launches, time.monotonic() - started, figures, reason)
    return Result("memory", True, launches, time.monotonic() - started, figures)


def _compile_into(subject: Subject, tokens: int) -> jax.stages.Compiled:
    """(outputs, operands) -> outputs, written where the donated ones were."""
    operands = structure(subject, tokens)
    into = jax.jit(lambda _, operands: subject.call(operands), donate_argnums=0, keep_unused=True)
    return into.lower(jax.eval_shape(subject.call, operands), operands).compile()


def _judge_memory(
    outputs: Sequence[jax.Array], expected: Array, guards: Sequence[Sequence[jax.Array]], poison: int,
    operands: Operands, host: Operands,
) -> tuple[str, int | None, str, str] | None:  # fmt: skip
    got = row_bits(outputs)
    wrong = np.argwhere(got != expected)
    if len(wrong):
        row, place = map(int, wrong[0])
        unwritten = got[row, place] == poison * 0x01010101
        what = "was not written" if unwritten else "is not what it was in another launch"
        return f"row {row} {what}", row, f"0x{expected[row, place]:08x}", f"0x{got[row, place]:08x}"
    for pair in guards:
        for guard in pair:
            bytes_ = np.asarray(guard)
            if (bytes_ != poison).any():
                at = int((bytes_ != poison).argmax())
                return f"byte {at} of a guard beside an output was overwritten", None, hex(poison), hex(bytes_[at])
    for name, before, after in zip(Operands._fields, host, operands, strict=True):
        if before is not None and not np.array_equal(
            np.ascontiguousarray(before).view(np.uint8), np.asarray(after).view(np.uint8)
        ):
            return f"the launch changed its input {name}", None, "the same bytes", "others"
    return None


def _poisoned(
    shapes: Sequence[jax.ShapeDtypeStruct], poison: int, device: jax.Device
) -> tuple[list[jax.Array], list[list[jax.Array]]]:
    """Arrays full of poison, and the guards of each: two where the allocator gave three neighbours, else none."""

    def own(contents: Array) -> jax.Array:
        # On a CPU JAX would take numpy's memory as it is; a copy there would leave holes where guards should be.
        array = jax.device_put(contents, device)
        return jax.block_until_ready(jnp.copy(array) if device.platform == "cpu" else array)

    arrays, guards = [], []
    guard = np.full(GUARD_BYTES, poison, np.uint8)
    for shape in shapes:
        filled = np.full(shape.size * shape.dtype.itemsize, poison, np.uint8).view(shape.dtype).reshape(shape.shape)
        held = []  # what did not fit, so that the allocator goes on
        for _ in range(ATTEMPTS):
            before, array, behind = (own(each) for each in (guard, filled, guard))
            starts = [each.unsafe_buffer_pointer() for each in (before, array, behind)]
            gaps = starts[1] - starts[0] - before.nbytes, starts[2] - starts[1] - array.nbytes
            adjacent = all(0 <= gap < 512 for gap in gaps)  # allocators round up
            if adjacent:
                break
            held.append((before, array, behind))
        arrays.append(array)
        guards.append([before, behind] if adjacent else [])
    return arrays, guards
