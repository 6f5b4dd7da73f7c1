"""The checks "accuracy" and "experts" find what is wrong, in the right row, and let what is right pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from verification_cases import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V4,
    EXPERTS,
    GEMM,
    GPT_OSS,
    HIDDEN,
    QWEN3,
    SCALED,
    SUBJECTS,
    broken,
    caught,
    context,
    function,
    product,
    right_logits,
)

from jax_router import parity, routing
from jax_router.verification import data
from jax_router.verification.data import IN_RANDOM_ORDER, KINDS, NUMERIC_TOKENS, ONE_PRODUCT, Subject, draw
from jax_router.verification.judge import judge_logits
from jax_router.verification.numerics import check_numerics

pytestmark = pytest.mark.usefixtures("on_the_cpu", "compiled_in_haste")

select, weigh = routing.select_experts, routing.routing_weights


def rounded(values: jax.Array, mantissa_bits: int) -> jax.Array:
    return jax.lax.reduce_precision(values, 8, mantissa_bits)


def integers(values: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(values, jnp.int32)


def top_k(choice: jax.Array, spec: routing.RoutingSpec) -> jax.Array:
    return jax.lax.top_k(choice, spec.top_k)[1]


def failures(subject: Subject) -> dict[str, tuple[str, int | None, str]]:
    """Data, row and reason of every check that fails."""
    found = check_numerics(subject, context())
    return {
        result.check: (result.failure.data, result.failure.row, result.reason) for result in found if result.failure
    }


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_is_right_passes_with_every_kind_of_data(name):
    subject = SUBJECTS[name]
    found = check_numerics(subject, context())
    assert {result.check: result.passed for result in found} == {"accuracy": True} | (
        {"experts": True} if subject.spec is not None else {}
    )
    for result in found:
        assert set(result.figures) == set(subject.kinds) - {"subnormals"}
        assert result.launches == len(result.figures) + 1
    assert 0 < found[0].figures["normal"]["worst"] < 1
    if subject.spec is not None:
        assert found[1].figures["normal"]["tokens"] == NUMERIC_TOKENS * (subject.given is None) + NUMERIC_TOKENS
        assert 0 < found[1].figures["normal"]["weight"] < 1


WRONG_LOGITS = {
    "rounded to bfloat16": (lambda operands: rounded(right_logits(operands), 7), None),
    "without one product": (lambda operands: right_logits(operands._replace(x=operands.x.at[:, 17].set(0))), None),
    "without the last tile of K": (
        lambda operands: right_logits(operands._replace(x=operands.x.at[:, HIDDEN // 64 * 64 :].set(0))), None
    ),
    "with the bias of another expert": (
        lambda operands: right_logits(operands._replace(bias=jnp.roll(operands.bias, 1))), None
    ),
    "rounded to tf32 before the bias": (
        lambda operands: rounded(product(operands.x, operands.weight), 10) + operands.bias.astype(jnp.float32), None
    ),
    "of rounded x": (
        lambda operands: right_logits(operands._replace(x=rounded(operands.x.astype(jnp.float32), 6))), None
    ),
    "of a row that is zero": (lambda operands: right_logits(operands).at[5].set(0), 5),
    "of swapped rows": (lambda operands: right_logits(operands)[jnp.arange(NUMERIC_TOKENS).at[3].set(4).at[4].set(3)],
                        3),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_LOGITS)
def test_wrong_logits_fail_the_accuracy(name):
    logits, row = WRONG_LOGITS[name]
    found = failures(broken(GEMM, logits=logits))
    assert set(found) == {"accuracy"}
    kind, at, reason = found["accuracy"]
    assert kind == "normal"
    assert "logits of normal data are wrong" in reason
    if row is not None:
        assert at == row


def test_float32_inputs_multiplied_as_tf32_fail_the_accuracy():
    def tf32(operands):
        return product(*(rounded(each.astype(jnp.float32), 10) for each in operands[:2])) + operands.bias

    # draw makes float32 operands of a checkpoint alone: these kinds are of 16 bits, which tf32 holds.
    weight = SCALED.given.weight.astype(np.float32) * np.float32(1 + 2**-12)
    given = data.Operands(None, weight, SCALED.given.bias)
    right = Subject("xla", GEMM, "float32", given, function=function(None))
    assert set(caught_as_given(right)) == set()
    assert set(caught_as_given(dataclasses.replace(right, function=function(None, logits=tf32)))) == {"as given"}


def caught_as_given(subject: Subject) -> set[str]:
    operands = draw(subject, "as given", NUMERIC_TOKENS, 0)
    verdict = judge_logits(subject, "as given", operands, np.asarray(subject.call(operands)[0]), "cpu")
    return set() if verdict.passed else {"as given"}


@pytest.mark.parametrize("name", ["of a row that is zero", "of swapped rows"])
def test_experts_of_wrong_logits_are_none_that_rounding_explains(name):
    found = failures(broken(GPT_OSS, logits=WRONG_LOGITS[name][0]))
    assert set(found) == {"accuracy", "experts"}
    assert found["experts"] == (
        "normal",
        WRONG_LOGITS[name][1],
        "experts of normal data are none that rounding explains",
    )


OF_THEIR_LOGITS = "experts of {} data are not those of their logits"
TIE, NO_EXPERT = "a tie of {} data did not go to the lowest expert", "there is no such expert"
NOT_FINITE = "experts of infinite or NaN logits are not the specification's"


def other(**changes):
    """The selection of another spec."""
    return lambda logits, correction, spec: select(logits, correction, dataclasses.replace(spec, **changes))


def at(row, place, expert):
    return lambda logits, correction, spec: select(logits, correction, spec).at[row, place].set(expert)


def highest_of_ties(logits, correction, spec):
    return EXPERTS - 1 - select(logits[:, ::-1], None if correction is None else correction[::-1], spec)


WRONG_EXPERTS = {
    "the worst first": (GPT_OSS, lambda *args: select(*args)[:, ::-1], "normal", 0, OF_THEIR_LOGITS),
    "the last two swapped": (GPT_OSS, lambda *args: select(*args)[:, jnp.array([0, 1, 3, 2])], "normal", 0,
                             OF_THEIR_LOGITS),
    "of logits in bfloat16": (GPT_OSS, lambda logits, *args: select(rounded(logits, 7), *args), "normal", None,
                              OF_THEIR_LOGITS),
    "ties to the highest": (GPT_OSS, highest_of_ties, "ties", None, TIE),
    "corrected ties to the highest": (DEEPSEEK_V4, highest_of_ties, "ties", None, TIE),
    "correction ignored": (DEEPSEEK_V3, lambda logits, _, spec: select(logits, None, spec), "normal", None,
                           OF_THEIR_LOGITS),
    "groups ignored": (DEEPSEEK_V3, other(num_groups=None, group_topk=None), "normal", None, OF_THEIR_LOGITS),
    "groups of a softmax ignored": (DEEPSEEK_V2, other(num_groups=None, group_topk=None), "normal", None,
                                    OF_THEIR_LOGITS),
    "groups by their highest": (DEEPSEEK_V3, other(group_score="max"), "normal", None, OF_THEIR_LOGITS),
    "logits corrected": (DEEPSEEK_V4, other(select_on="logits"), "normal", None, OF_THEIR_LOGITS),
    "one past the last": (GPT_OSS, at(3, 1, EXPERTS), "normal", 3, NO_EXPERT),
    "one before the first": (GPT_OSS, at(9, 3, -1), "normal", 9, NO_EXPERT),
    "one twice": (GPT_OSS, lambda *args: select(*args).at[3, 1].set(select(*args)[3, 0]), "normal", 3,
                  OF_THEIR_LOGITS),
    "NaN the lowest": (GPT_OSS, lambda logits, *args: select(jnp.where(jnp.isnan(logits), -jnp.inf, logits), *args),
                       "infinities and NaN", 7, NOT_FINITE),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_EXPERTS)
def test_wrong_experts_fail_the_experts_alone(name):
    shape, wrong, kind, row, reason = WRONG_EXPERTS[name]
    found = failures(broken(shape, select=wrong))
    assert set(found) == {"experts"}
    assert found["experts"][0] in ((kind, "near ties") if kind == "ties" else (kind,))  # some of which are equal
    assert found["experts"][2] == reason.format(found["experts"][0])
    if row is not None:
        assert found["experts"][1] == row


def of_other(**changes):
    """The weights of another spec."""
    return lambda logits, experts, scale, spec: weigh(logits, experts, scale, dataclasses.replace(spec, **changes))


def exponentials(logits, experts, scale, spec):
    """Without subtracting the largest first."""
    found = jnp.exp(jnp.take_along_axis(logits, experts, -1))
    return found / found.sum(-1, keepdims=True)


def quarters_of_infinity(logits, *args):
    return jnp.where(jnp.isinf(logits).all(-1, keepdims=True), 0.25, weigh(logits, *args))


WRONG_WEIGHTS = {
    "not renormalised": (DEEPSEEK_V3, of_other(renormalize=False, renormalize_epsilon=0.0), "normal", 0),
    "not scaled": (DEEPSEEK_V3, of_other(scaling_factor=1.0), "normal", 0),
    "scaled by a little more": (DEEPSEEK_V4, of_other(scaling_factor=1.5 * (1 + 2**-19)), "normal", None),
    "in bfloat16": (GPT_OSS, lambda *args: rounded(weigh(*args), 7), "normal", 0),
    "of one row": (GPT_OSS, lambda *args: weigh(*args).at[9].multiply(1.001), "normal", 9),
    "without the scale of the experts": (SCALED, lambda logits, experts, _, spec: weigh(logits, experts, None, spec),
                                         "normal", 0),
    "of exponentials that overflow": (QWEN3, exponentials, "wide exponents", None),
    "of infinite logits": (DEEPSEEK_V3, quarters_of_infinity, "infinities and NaN", None),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_wrong_weights_fail_the_experts_alone(name):
    of, wrong, kind, row = WRONG_WEIGHTS[name]
    shape, given = (of.shape, of.given) if isinstance(of, Subject) else (of, None)
    found = failures(dataclasses.replace(broken(shape, weigh=wrong), given=given))
    assert set(found) == {"experts"}
    assert found["experts"][0] == kind
    assert found["experts"][2].startswith("weights of ")
    if row is not None:
        assert found["experts"][1] == row


def test_a_correction_bias_in_the_weights_fails_the_experts():
    def call(operands, *, return_logits=False):
        weights, experts, logits = function(DEEPSEEK_V3.spec)(operands, return_logits=True)
        scores = routing.scores(logits, DEEPSEEK_V3.spec) + operands.correction_bias
        weights = jnp.take_along_axis(scores, experts, -1)
        return (2.5 * weights / weights.sum(-1, keepdims=True), experts, logits)[: 3 if return_logits else 2]

    found = failures(Subject("xla", DEEPSEEK_V3, function=call))
    assert found["experts"] == ("normal", 0, "weights of normal data are not those of their logits")


# Why there are other kinds than "normal": what each finds that "normal" does not. Of "subnormals" a test of its own
# says it, as XLA's code for a CPU takes them as zeros; for "cancellation" nothing was found, its bound being that of
# any order.


def in_chain(mantissa_bits):
    """Sums in a chain of so many bits."""

    def logits(operands):
        x, weight = (each.astype(jnp.float32) for each in (operands.x, operands.weight))

        def add(place, total):
            return rounded(total + x[:, place, None] * weight[None, :, place], mantissa_bits)

        total = jax.lax.fori_loop(0, HIDDEN, add, jnp.zeros((len(x), len(weight))))
        return total + operands.bias.astype(jnp.float32)

    return logits


def hidden_index(logits, correction, spec):
    """Keys with the expert in their lowest bits."""
    keys = (integers(logits) & ~31) | (31 - jnp.arange(EXPERTS))
    return top_k(jax.lax.bitcast_convert_type(keys, jnp.float32), spec)


def highest_group(logits, correction, spec):
    turned = logits.reshape(len(logits), 4, 8)[:, ::-1].reshape(logits.shape)
    experts = select(turned, None, spec)
    return (3 - experts // 8) * 8 + experts % 8


FOUND_BY = {
    "sums of 21 bits": (broken(GEMM, logits=in_chain(20)), "with a mean"),
    "negative keys in reverse": (
        broken(GPT_OSS, select=lambda logits, _, spec: top_k(integers(logits), spec)), "negative"
    ),
    "experts padded with zeros": (
        broken(GPT_OSS, select=lambda logits, _, spec: top_k(jnp.pad(logits, ((0, 0), (0, 8))), spec)), "negative"
    ),
    "experts of other groups count as zero": (broken(DEEPSEEK_V3, select=other(masked_choice=0.0)), "negative"),
    "x by way of float16": (
        broken(GEMM, logits=lambda operands: right_logits(operands._replace(x=operands.x.astype(jnp.float16)))),
        "wide exponents",
    ),
    "exponentials that overflow": (broken(QWEN3, weigh=exponentials), "wide exponents"),
    "an index in the mantissa": (broken(GPT_OSS, select=hidden_index), "near ties"),
    "ties to the highest": (broken(GPT_OSS, select=highest_of_ties), "ties"),
    "tied groups to the highest": (broken(DEEPSEEK_V2, select=highest_group), "ties"),
    "NaN as zero": (broken(GEMM, logits=lambda operands: jnp.nan_to_num(right_logits(operands))),
                    "infinities and NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND_BY)
def test_every_kind_of_data_finds_what_normal_data_does_not(name):
    subject, kind = FOUND_BY[name]
    found = caught(subject)
    assert kind in found
    assert "normal" not in found


def test_subnormals_find_what_flushes_them():
    subject = SUBJECTS["router GEMM"]
    operands = draw(subject, "subnormals", NUMERIC_TOKENS, 0)
    x, weight = operands.x.astype(np.float64), operands.weight.astype(np.float64)
    bias = operands.bias.astype(np.float64)
    flushed = np.where(abs(x) < parity.FLUSHED, 0, x)
    right, wrong = ((each @ weight.T + bias).astype(np.float32) for each in (x, flushed))
    assert judge_logits(subject, "subnormals", operands, right, "gpu").passed
    assert not judge_logits(subject, "subnormals", operands, wrong, "gpu").passed
    assert {kind for _, kind in FOUND_BY.values()} | {"normal", "subnormals", "cancellation"} == set(KINDS)


# The data.


@pytest.mark.parametrize("name", ["router GEMM", "DeepSeek-V3", "scaled", "float16"])
def test_data_are_those_of_their_seed(name):
    subject = SUBJECTS[name]
    for kind in subject.kinds:
        one, again, other_one = (draw(subject, kind, 9, seed) for seed in (7, 7, 8))
        for field, left, right in zip(one._fields, one, again, strict=True):
            assert (left is None) == (right is None), field
            assert left is None or left.tobytes() == right.tobytes(), (kind, field)
        assert one.x.tobytes() != other_one.x.tobytes(), kind
        assert one.x.dtype.name == subject.dtype
    assert draw(subject, "normal", 9, 7).x.tobytes() != draw(subject, "with a mean", 9, 7).x.tobytes()
    wider = dataclasses.replace(subject, shape=dataclasses.replace(subject.shape, hidden=HIDDEN + 8))
    assert (draw(subject, "normal", 1, 7).x[0, :8] != draw(wider, "normal", 1, 7).x[0, :8]).any()


def test_every_kind_of_data_has_the_operands_of_the_checkpoint():
    def forms(operands):
        return [None if each is None else (each.shape[each.ndim - 1 :], each.dtype) for each in operands]

    corrected = dataclasses.replace(SCALED.shape, correction_bias=True)
    bias = np.zeros(EXPERTS, ml_dtypes.bfloat16)
    subject = dataclasses.replace(SCALED, shape=corrected, given=SCALED.given._replace(correction_bias=bias))
    for kind in KINDS:
        assert forms(draw(subject, kind, 4, 0)) == forms(draw(subject, "as given", 4, 0)), kind


def truth(operands):
    return parity.reference(operands.x, operands.weight, operands.bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kinds_are_what_they_are_called(dtype):
    subject = Subject("xla", dataclasses.replace(GPT_OSS, correction_bias=True), dtype)
    drawn = {kind: draw(subject, kind, 64, 0) for kind in KINDS}

    assert (truth(drawn["negative"]).logits < 0).all()
    assert (drawn["negative"].correction_bias < 0).all()
    assert truth(drawn["with a mean"]).logits.mean() > 10 * abs(truth(drawn["normal"]).logits.mean())

    without_bias = drawn["cancellation"]._replace(bias=None)
    assert np.median(abs(truth(without_bias).logits) / truth(without_bias).magnitude) < 1e-3
    assert np.median(abs(truth(drawn["normal"]._replace(bias=None)).logits) / truth(drawn["normal"]).magnitude) > 1e-2

    magnitudes = abs(drawn["wide exponents"].x.astype(np.float64))
    assert magnitudes.max() / magnitudes[magnitudes > 0].min() > 2.0 ** (15 if dtype == "float16" else 50)

    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)
    halves = drawn["subnormals"].x[:, ::2].astype(np.float64)
    assert (abs(halves) < smallest).all()
    assert (halves != 0).mean() > 0.9
    without = drawn["subnormals"]._replace(x=np.where(abs(drawn["subnormals"].x.astype(np.float64)) < smallest, 0, 1))
    assert without.x.mean() == 0.5

    second = np.arange(EXPERTS) % 3 == 1
    first = np.flatnonzero(second) - 1
    for kind in ("ties", "near ties"):
        operands = drawn[kind]
        logits = truth(operands).logits
        assert (operands.correction_bias[second] == operands.correction_bias[first]).all()
        equal = logits[:, second] == logits[:, first]
        assert equal.all() if kind == "ties" else not equal.any()
    gaps = abs(logits[:, second] - logits[:, first])
    assert gaps.min() < 2.0**-22 < 2.0**-14 < gaps.max()
    assert (truth(drawn["ties"]).logits[::8] == drawn["ties"].bias.astype(np.float64)).all()

    logits = truth(drawn["infinities and NaN"]).logits
    kinds = [np.isfinite(logits).all(-1), np.isnan(logits).all(-1), np.isinf(logits).all(-1)]
    assert [bool(each[row::8].all()) for row, each in ((0, kinds[0]), (1, kinds[1]), (3, kinds[2]), (5, kinds[2]))]
    assert np.isnan(logits[7::8]).any(-1).all()


def test_kinds_in_random_order_are_kinds():
    assert set(IN_RANDOM_ORDER) <= {*KINDS, ONE_PRODUCT, "as given"}
    assert SCALED.kinds == (*KINDS, "as given")
    assert (SCALED.usual, SUBJECTS["router GEMM"].usual) == ("as given", "normal")
