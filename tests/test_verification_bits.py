"""The checks of bits, memory, graphs and load find what depends on more than the token."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verification_cases import CPU, EXPERTS, GEMM, GPT_OSS, OnGpu

from jax_router.verification import bits, load
from jax_router.verification.data import Subject, draw, put, random_weights, with_garbage
from jax_router.verification.gpu_tools import Calls
from jax_router.verification.result import Context

pytestmark = pytest.mark.usefixtures("on_the_cpu", "compiled_in_haste")

SHORT = (1, 8, 17)


def context(**changes: Any) -> OnGpu:
    return OnGpu(CPU, **{"tokens": SHORT, **changes})


def exact(operands) -> jax.Array:
    """Logits of a kind whose bits are those of the row on any machine: XLA's matrix product promises none."""
    return operands.x[:, :EXPERTS].astype(jnp.float32) * operands.weight[:, 0].astype(jnp.float32)


def kernel(change: Callable[[Any, jax.Array], jax.Array] = lambda _, logits: logits, shape=GEMM) -> Subject:
    """A subject that promises bits, and what is wrong with its logits [T, E]."""

    def call(operands, *, return_logits=False):
        logits = change(operands, exact(operands))
        if shape.spec is None:
            return (logits,)
        values, experts = jax.lax.top_k(logits, shape.spec.top_k)
        return (values, experts, logits) if return_logits else (values, experts)

    return Subject("cuda", shape, function=call)


def counted(changes_at: Callable[[int], bool]) -> Callable[[Any, jax.Array], jax.Array]:
    """Logits that change in some launches."""
    count = itertools.count()

    def change(_, logits):
        wrong = jax.pure_callback(
            lambda _: np.float32(changes_at(next(count))), jax.ShapeDtypeStruct((), jnp.float32), logits[0, 0]
        )
        return logits.at[-1, 3].add(wrong)

    return change


def a_little(condition) -> jax.Array:
    return jnp.where(condition, jnp.float32(1 + 2**-22), jnp.float32(1))


DEPENDENT = {
    "on how many tokens there are": lambda _, logits: logits * a_little(len(logits) == 8),
    "on the position": lambda _, logits: logits * a_little(jnp.arange(len(logits)) % 8 == 7)[:, None],
    "on the mean of the batch": lambda operands, logits: logits + operands.x.astype(jnp.float32).mean(),
    "on NaN in the row before": lambda operands, logits: (
        logits * a_little(jnp.isnan(jnp.roll(operands.x[:, 0], 1)))[:, None]
    ),
    "on the run": counted(lambda run: run == 9),
}


@pytest.mark.parametrize("name", DEPENDENT)
@pytest.mark.parametrize("shape", [GEMM, GPT_OSS], ids=["router_gemm", "route"])
def test_bits_that_depend_on_more_than_the_token_are_found(name, shape):
    change = counted(lambda run: run == 9) if name == "on the run" else DEPENDENT[name]
    result = bits.check_bits(kernel(change, shape), context())
    assert result.passed is False
    failure = result.failure
    assert 0 <= failure.row < failure.tokens
    assert failure.launch == result.launches - 1
    assert failure.expected != failure.got
    assert f"has other bits at place {failure.row} of a batch of {failure.tokens}" in result.reason
    if name == "on how many tokens there are":
        assert failure.tokens == 8
    if name == "on the run":
        assert (failure.launch, failure.row) == (9, failure.tokens - 1)


@pytest.mark.parametrize("shape", [GEMM, GPT_OSS], ids=["router_gemm", "route"])
def test_bits_of_the_token_alone_pass(shape):
    result = bits.check_bits(kernel(shape=shape), context())
    assert result.passed
    assert result.figures["batches"] == bits.RUNS * len(SHORT) == result.launches - 1
    assert 0.7 * bits.RUNS * sum(SHORT) < result.figures["rows"] < bits.RUNS * sum(SHORT)


def test_bits_are_checked_in_whole_when_the_time_is_up():
    assert bits.check_bits(kernel(), context(deadline=0.0)).figures["batches"] == bits.RUNS * len(SHORT)


def test_one_number_of_tokens_alone_is_checked_as_beside_others():
    """What --replay needs: the rows of a batch hang on its size and the seed alone."""
    seen: list[list[float]] = []

    def batches(*tokens: int) -> list[list[float]]:
        seen.clear()
        result = bits.check_bits(kernel(watched), context(tokens=tokens))
        assert result.passed
        return [batch for batch in seen if len(batch) == 8]

    def watched(operands, logits):
        jax.debug.callback(lambda x: seen.append(x[:, 0].astype(float).tolist()), operands.x, ordered=True)
        return logits

    np.testing.assert_equal(batches(8), alone := batches(1, 8, 17))
    assert len(alone) == bits.RUNS


def test_bits_are_of_those_who_promise_them_on_a_gpu():
    for subject, where in ((Subject("xla", GEMM), context()), (kernel(), Context(CPU))):
        result = bits.check_bits(subject, where)
        assert (result.passed, result.reason) == (None, f"{subject.implementation} promises no bits here")


def test_garbage_is_garbage_and_the_rest_is_left_alone():
    for dtype in ("bfloat16", "float16"):
        x = draw(Subject("xla", GEMM, dtype), "normal", 200, 0).x
        rows = np.arange(0, 200, 2)
        changed = with_garbage(x, rows, np.random.default_rng(0))
        assert (changed[1::2] == x[1::2]).all()
        kinds = changed[rows, 0].astype(np.float64)
        assert np.isnan(kinds).any()
        assert {np.inf, -np.inf, 0.0} <= set(kinds)
        assert (np.isfinite(kinds) & (abs(kinds) > 5e4)).any()


# Memory.


@pytest.mark.parametrize("guards", [0, 2])
@pytest.mark.parametrize("shape", [GEMM, GPT_OSS], ids=["router_gemm", "route"])
def test_what_writes_its_outputs_passes_if_guards_lay_beside_them(shape, guards, monkeypatch):
    poisoned = bits._poisoned

    def beside(shapes, poison, device):
        guard = jnp.full(bits.GUARD_BYTES, poison, jnp.uint8)
        return poisoned(shapes, poison, device)[0], [[guard] * guards] * len(shapes)

    monkeypatch.setattr(bits, "_poisoned", beside)
    result = bits.check_memory(kernel(shape=shape), context(deadline=0.0))
    assert result.passed is (True if guards else None)
    assert result.launches == len(bits.POISONS) * len(SHORT)
    assert result.figures["guarded"] == (result.launches if guards else 0)
    assert guards or "no guard" in result.reason


def test_launches_that_differ_are_found_by_their_outputs():
    result = bits.check_memory(kernel(counted(lambda run: run == 4)), context())
    assert result.passed is False
    assert result.reason == "row 7 is not what it was in another launch"
    assert (result.failure.tokens, result.failure.row, result.failure.launch) == (8, 7, 2)


def test_outputs_that_xla_puts_elsewhere_are_not_judged(monkeypatch):
    elsewhere = jax.jit(lambda _, operands: kernel().call(operands), keep_unused=True)
    monkeypatch.setattr(bits, "_compile_into", lambda *_: elsewhere)
    result = bits.check_memory(kernel(), context())
    assert (result.passed, result.reason) == (None, "XLA does not write into the donated outputs here")


@pytest.fixture
def launched():
    """What a right launch leaves: outputs, their bits, guards, inputs on the device and on the host."""
    subject = kernel(shape=GPT_OSS)
    host = draw(subject, "normal", 4, 0)
    operands = put(host, CPU)
    outputs = subject.call(operands)
    guards = [[jnp.full(16, 0xFF, jnp.uint8)] * 2, []]
    return {"outputs": outputs, "expected": bits.row_bits(outputs), "guards": guards, "poison": 0xFF,
            "operands": operands, "host": host}  # fmt: skip


def test_memory_as_it_should_be_is_no_finding(launched):
    assert bits._judge_memory(**launched) is None


def test_a_row_that_was_not_written_is_named(launched):
    weights, experts = launched["outputs"]
    poison = jax.lax.bitcast_convert_type(jnp.uint32(0xFFFFFFFF), jnp.int32)
    launched["outputs"] = (weights, experts.at[2].set(poison))
    assert bits._judge_memory(**launched) == (
        "row 2 was not written", 2, f"0x{int(experts[2, 0]):08x}", "0xffffffff"
    )  # fmt: skip


def test_an_overwritten_guard_is_named(launched):
    launched["guards"][0][1] = launched["guards"][0][1].at[3].set(0x12)
    assert bits._judge_memory(**launched) == (
        "byte 3 of a guard beside an output was overwritten", None, "0xff", "0x12"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_a_changed_input_is_named(launched, name):
    value = getattr(launched["operands"], name)
    zero = jnp.zeros((), value.dtype)
    launched["operands"] = launched["operands"]._replace(**{name: value.at[(0,) * value.ndim].set(zero)})
    assert bits._judge_memory(**launched)[0] == f"the launch changed its input {name}"


def test_poison_fills_every_byte():
    shapes = [jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((3, 2), jnp.int32)]
    arrays, guards = bits._poisoned(shapes, 0x2A, CPU)
    assert [(array.shape, array.dtype) for array in arrays] == [(shape.shape, shape.dtype) for shape in shapes]
    for array in [*arrays, *itertools.chain(*guards)]:
        assert (np.asarray(array).view(np.uint8) == 0x2A).all()


# Chains: CUDA graphs, and load.

ALONE = "launches in one executable, with 8 tokens, are not what they are alone"
CALLS = 8  # of a chain without a GPU


@pytest.mark.parametrize("shape", [GEMM, GPT_OSS], ids=["router_gemm", "route"])
def test_chains_that_give_the_same_again_pass(shape):
    for subject in (kernel(shape=shape), Subject("xla", shape)):
        result = load.check_graphs(subject, Context(CPU, tokens=(8,)))
        assert result.passed, result.reason
        turns = load.GRAPH_TURNS * 6 + 2 * subject.promises_bits
        assert result.launches == turns * CALLS


@pytest.mark.parametrize(
    ("wrong_at", "reason"),
    [
        (CALLS + 3, ALONE),
        (2 * CALLS + 5, "a replayed chain of launches with 8 tokens is wrong"),
        ((2 + load.GRAPH_TURNS * 5) * CALLS, "a replayed chain of launches with 8 tokens is wrong"),  # a thread's
    ],
)
def test_a_chain_that_changes_between_executions_is_found(wrong_at, reason):
    result = load.check_graphs(kernel(counted(lambda run: run == wrong_at)), Context(CPU, tokens=(8,)))
    assert (result.passed, result.reason) == (False, reason)
    assert (result.failure.tokens, result.failure.row) == (8, 7)
    assert 0 <= result.failure.launch < CALLS


def test_what_promises_no_bits_must_agree_with_its_own_chain():
    wrong = kernel(counted(lambda run: run == 2 * CALLS + 1))
    subject = Subject("xla", GEMM, function=wrong.function)
    result = load.check_graphs(subject, Context(CPU, tokens=(8,)))
    assert (result.passed, result.reason) == (False, ALONE)


EXECUTIONS = load.GRAPH_TURNS * 6 + 2


@pytest.mark.parametrize(
    ("recorded", "replayed", "reason"),
    [
        (7, EXECUTIONS - 8, None),
        (0, EXECUTIONS - 1, "XLA recorded no CUDA graph of these launches"),
        (EXECUTIONS - 1, 0, "XLA replayed no CUDA graph of these launches"),
    ],
)
def test_graphs_that_were_not_recorded_or_not_replayed_are_not_checked(recorded, replayed, reason, monkeypatch):
    calls = iter([Calls(4, 0), Calls(5, 0), Calls(6, recorded)])
    monkeypatch.setattr(load.gpu_tools, "calls", lambda: next(calls))
    monkeypatch.setattr(load.gpu_tools, "loaded", lambda: None)
    differing = load._differing
    monkeypatch.setattr(load, "_differing", lambda outputs, expected, _: differing(outputs, expected, Context(CPU)))
    monkeypatch.setattr(load, "MOST_CALLS", CALLS)
    result = load.check_graphs(kernel(), context(tokens=(8,)))
    assert (result.passed, result.reason) == (None if reason else True, reason)
    assert result.figures == {"recorded": recorded, "replayed": replayed}


def test_other_contents_of_the_same_buffers_are_judged():
    result = load.check_graphs(kernel(DEPENDENT["on the position"]), Context(CPU, tokens=(8,)))
    assert result.passed is False
    assert result.failure.row in (0, 7)


def test_two_threads_execute_at_once():
    meet = threading.Barrier(2, timeout=30)
    verdicts = np.zeros((3, 1, 4), np.uint32)

    class Meeting:
        calls, tokens = 3, 8

        def execute(self):
            meet.wait()
            return verdicts

    found = list(load._threads(kernel(), context(), [Meeting(), Meeting()]))
    assert found == [(3, None)] * 2 * load.GRAPH_TURNS


def test_the_first_wrong_launch_and_row_are_named():
    subject, where = kernel(shape=GPT_OSS), Context(CPU, tokens=(8,))
    [chain] = load._chains(subject, where)
    assert load._chains(subject, where)[0] is chain, "it was compiled again"
    differing = np.zeros((CALLS, 2, 4), np.uint32)
    assert load._first_wrong(subject, where, chain, differing, 0) is None
    differing[5, 1] = (2, 4 * 6 + 1, 17, 19)  # of the experts
    differing[6, 0] = (1, 0, 1, 2)
    failure, _ = load._first_wrong(subject, where, chain, differing, 1000)
    assert (failure.launch, failure.row, failure.expected, failure.got) == (1005, 6, "0x00000011", "0x00000013")
    assert (failure.tokens, failure.data, failure.seed) == (8, "normal", 0)


def test_differing_words_are_counted_and_the_first_is_shown():
    expected = jnp.arange(12, dtype=jnp.int32).reshape(3, 4)
    other = expected.at[1, 2].set(40).at[2, 3].set(41)
    assert load._differs(other, expected).tolist() == [2, 6, 6, 40]
    assert load._differs(expected, expected).tolist()[0] == 0
    zeros = jnp.zeros(4, jnp.float32)
    assert load._differs(-zeros, zeros).tolist() == [4, 0, 0, 0x80000000]
    nans = jnp.full(4, jnp.nan)
    assert load._differs(nans, nans).tolist()[0] == 0
    both = load._differing([(other, zeros), (expected, zeros)], [(expected, zeros)] * 2, Context(CPU))
    assert both.shape == (2, 2, 4)
    assert both[..., load.WORDS].tolist() == [[2, 0], [0, 0]]


def test_weights_of_a_chain_are_all_different():
    for subject in (kernel(), Subject("xla", GEMM, given=draw(kernel(), "normal", 1, 0)._replace(x=None))):
        weights = {np.asarray(each.weight).tobytes() for each in random_weights(subject, 6, 0, CPU)}
        assert len(weights) == 6


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The check "load" on the CPU; what starts and ends."""
    said: list[str] = []
    differing = load._differing

    @contextlib.contextmanager
    def of_nothing(_):
        said.append("start")
        done: dict[str, int] = {}
        yield done
        done["busy_launches"] = 3
        said.append("stop")

    monkeypatch.setattr(load.gpu_tools, "loaded", lambda: None)
    monkeypatch.setattr(load.gpu_tools, "load", of_nothing)
    monkeypatch.setattr(load, "_differing", lambda outputs, expected, _: differing(outputs, expected, Context(CPU)))
    monkeypatch.setattr(load, "MOST_CALLS", CALLS)
    monkeypatch.setattr(load, "LEAST", 0)
    return said


def test_launches_under_load_are_counted_by_tokens(loaded):
    result = load.check_load(kernel(), context(tokens=(1, 8), launches=300))
    assert result.passed
    assert result.figures == {"by tokens": {"1": 152, "8": 152}, "busy_launches": 3}
    assert result.launches == 304, "those on an idle GPU count as well"
    assert loaded == ["start", "stop"]


def test_every_chain_has_its_least_launches_when_the_time_is_up(loaded, monkeypatch):
    monkeypatch.setattr(load, "LEAST", 2 * CALLS)
    result = load.check_load(kernel(), context(tokens=(1, 8), deadline=0.0))
    assert result.figures["by tokens"] == {"1": CALLS, "8": CALLS}


def test_a_launch_that_is_wrong_under_load_is_found(loaded):
    result = load.check_load(kernel(counted(lambda run: run == 2 * CALLS + 60)), context(tokens=(8,)))
    assert result.passed is False
    assert result.reason == f"launch {8 * CALLS} is wrong under load, with 8 tokens"
    assert 56 <= result.failure.launch < 64
    assert result.failure.row == 7
    alone = load.check_load(kernel(counted(lambda run: run == CALLS + 1)), context(tokens=(8,)))
    assert (alone.passed, alone.reason, alone.launches) == (False, ALONE, 1)


def test_a_load_that_does_nothing_is_none(loaded, monkeypatch):
    @contextlib.contextmanager
    def of_nothing(_: Any) -> Any:
        yield (done := {})
        done |= {"device_bytes": 1, "host_bytes": 0, "busy_launches": 3}

    monkeypatch.setattr(load.gpu_tools, "load", of_nothing)
    result = load.check_load(kernel(), context(tokens=(8,), launches=300))
    assert (result.passed, result.reason) == (None, "the load did nothing of host_bytes")


def test_there_is_no_load_without_a_gpu():
    result = load.check_load(kernel(), Context(CPU))
    assert (result.passed, result.reason) == (None, "there is no GPU")
