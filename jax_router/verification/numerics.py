"""Accuracy and experts: every kind of data through the subject, judged against float64 and the specification."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_router.timing import Operands as TimedOperands
from jax_router.timing_torch import as_torch, operators
from jax_router.verification.bits import calls, row_bits
from jax_router.verification.data import NUMERIC_TOKENS, Operands, Subject, compile_call, draw, put
from jax_router.verification.judge import Verdict, judge_logits, judge_routing
from jax_router.verification.result import Context, Failure, Programs, Result

MORE_TOKENS, QUICK_TOKENS = (1, 64, 257, 1024), (1,)  # of the usual kind, besides NUMERIC_TOKENS
PEER = "cuBLAS"
PEERS = {"bfloat16": "torch_mm_float32", "float32": "torch_linear"}  # of timing_torch.operators, by what is multiplied


def programs(subject: Subject, context: Context) -> Programs:
    """What `check_numerics` runs."""
    counts = (NUMERIC_TOKENS, *_tokens(context))
    judged: Programs = {
        ("logits", tokens): functools.partial(compile_call, subject, tokens, return_logits=True) for tokens in counts
    }
    return judged | calls(subject, counts) if _compares_bits(subject, context) else judged


def _compares_bits(subject: Subject, context: Context) -> bool:
    """Whether routing that returns no logits, which cannot be judged alone, must be that which returns them."""
    return subject.spec is not None and subject.promises_bits and context.on_gpu


def _tokens(context: Context) -> tuple[int, ...]:
    return context.tokens or (QUICK_TOKENS if context.quick else MORE_TOKENS)


def check_numerics(subject: Subject, context: Context) -> list[Result]:
    """The checks "accuracy" and, of routing, "experts": one launch per kind and number of tokens, be it late or not."""
    started = time.monotonic()
    made = programs(subject, context)
    flushes = not context.on_gpu  # XLA's code for a CPU takes subnormal inputs as zeros
    cases = [(kind, NUMERIC_TOKENS) for kind in subject.kinds if not (kind == "subnormals" and flushes)]
    cases += [(subject.usual, tokens) for tokens in _tokens(context)]
    of_logits: dict[str, Any] = {}
    of_routing: dict[str, Any] = {}
    failures: dict[str, Result] = {}
    launches = 0
    for kind, tokens in cases:
        context.doing(tokens, kind)
        operands = draw(subject, kind, tokens, context.seed)
        on_device = put(operands, context.device)
        run = context.program(key := ("logits", tokens), made[key])
        outputs = [np.asarray(output) for output in run(on_device)]
        platform, logits = context.device.platform, outputs[-1]
        verdicts = {"accuracy": judge_logits(subject, kind, operands, logits, platform)}
        _collect(of_logits, kind, verdicts["accuracy"].figures)
        if context.torch is not None and subject.multiplied in PEERS and kind == subject.usual:
            _collect(of_logits, PEER, _peer(subject, kind, operands, on_device, context))
        if subject.spec is not None:
            weights, experts = outputs[:2]
            verdicts["experts"] = judge_routing(subject, kind, operands, weights, experts, logits, platform)
            if _compares_bits(subject, context) and verdicts["experts"].passed:
                alone = context.program(key := ("call", tokens), made[key])(on_device)
                verdicts["experts"] = _same_without_logits(verdicts["experts"], kind, outputs[:2], alone)
            _collect(of_routing, kind, verdicts["experts"].figures)
        for check, verdict in verdicts.items():
            if not verdict.passed and check not in failures:
                failures[check] = _failed(check, verdict, kind, tokens, context, launches)
        launches += 1
        context.alive(1)
    seconds = time.monotonic() - started
    found = {"accuracy": of_logits} | ({"experts": of_routing} if subject.spec is not None else {})
    return [failures.get(check) or Result(check, True, launches, seconds, figures) for check, figures in found.items()]


def _collect(figures: dict[str, Any], kind: str, found: dict[str, Any]) -> None:
    """The worst over the batches of a kind; counts add up."""
    kept = figures.setdefault(kind, {})
    for name, value in found.items():
        kept[name] = kept.get(name, 0) + value if isinstance(value, int) else max(kept.get(name, value), value)


def _failed(check: str, verdict: Verdict, kind: str, tokens: int, context: Context, launches: int) -> Result:
    failure = Failure(tokens, kind, context.seed, launches, verdict.row, verdict.expected, verdict.got)
    return Result(check, False, launches + 1, 0.0, verdict.figures, verdict.reason, failure)


def _same_without_logits(
    verdict: Verdict, kind: str, outputs: Sequence[np.ndarray], alone: Sequence[jax.Array]
) -> Verdict:
    wanted, got = row_bits(outputs), row_bits(alone)
    wrong = np.argwhere(wanted != got)
    if not len(wrong):
        return verdict
    row, place = map(int, wrong[0])
    reason = f"weights or experts of {kind} data are others where no logits are returned"
    return Verdict(verdict.figures, reason, row, f"0x{wanted[row, place]:08x}", f"0x{got[row, place]:08x}")


def _peer(subject: Subject, kind: str, operands: Operands, on_device: Operands, context: Context) -> dict[str, Any]:
    """What cuBLAS's product with a float32 output, of float32 in float32, is off by on the same data."""
    torch = context.torch
    assert torch is not None
    of_gemm = on_device[:3]
    if subject.multiplied == "float32":
        torch.backends.cuda.matmul.allow_tf32 = False
        of_gemm = jax.tree.map(lambda array: array.astype(np.float32), of_gemm)
    timed = TimedOperands(of_gemm[0], of_gemm[1:2], of_gemm[2])
    jax.block_until_ready(of_gemm)
    x, (weight,), bias = as_torch(torch, timed)
    with torch.no_grad():
        logits = operators(torch)[PEERS[subject.multiplied]](x, weight, bias).float().cpu().numpy()
    return judge_logits(subject, kind, operands, logits, context.device.platform).figures
