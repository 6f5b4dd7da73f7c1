"""Does an implementation compute what it should, on this machine's GPU? `verify` here, `jax-router verify` beside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `record` is what `jax-router verify` writes; `str()` is its table."""

    record: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether nothing failed, and every subject was verified; a sanitizer that is not installed is no failure."""
        subjects = self.record["subjects"]
        tools = self.record["sanitizers"]
        whole = bool(subjects) and all(subject["passed"] for subject in subjects)
        return whole and not self.record["interrupted"] and all(tool["passed"] is not False for tool in tools)

    def __str__(self) -> str:
        from jax_router.verification.report import markdown

        return markdown(self.record)


def verify(
    implementation: str | Sequence[str] | None = None,
    *,
    operation: str | None = None,
    model: str | Sequence[str] | None = None,
    tokens: Sequence[int] = (),
    minutes: float | None = None,
    launches: int | None = None,
    quick: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    activations: str | os.PathLike[str] | None = None,
    sanitizers: bool = False,
    seed: int = 0,
) -> Verification:
    """Verify implementations of `router_gemm` and `route` on this machine's GPU: what docs/verification.md lists.

    Everything runs in a process of its own: a kernel that hangs or crashes becomes a failed check. Without a GPU only
    what a CPU can show of `xla` runs.

    Args:
      implementation: "cuda", "pallas", "xla", several of them, or None for all that run here.
      operation: "router_gemm", "route", or None for both.
      model: names of `jax_router.models`, "awkward" (sizes no tile divides), "all", or None for some and "awkward".
      tokens: numbers of tokens, instead of those of each check.
      minutes: for everything together; what runs once runs at least once. 5 unless given, 0.75 if quick.
      launches: under load, per router and implementation, if the time allows. 1,000,000 unless given, 500,000 if quick.
      quick: one model, and less of everything that repeats: under a minute.
      checkpoint: folder of a Hugging Face checkpoint, whose routers are verified instead of a model's.
      activations: .npy of recorded inputs [tokens, hidden] of these routers.
      sanitizers: run compute-sanitizer on the CUDA kernels too, some minutes more.
      seed: of all data.

    Returns:
      What was found, as a record, which is neither written nor kept for the dispatcher: that the command does.

    Raises:
      ValueError: an argument that makes no sense, or nothing that can run here; says what to pass instead.
      RuntimeError: the process ended before it began.
    """
    from jax_router.verification.plan import Options, defaults
    from jax_router.verification.supervisor import supervise

    def several(value: str | Sequence[str] | None) -> tuple[str, ...]:
        return () if value is None else (value,) if isinstance(value, str) else tuple(value)

    options = Options(
        several(implementation), several(operation), several(model), tuple(tokens), (),
        *defaults(minutes, launches, quick=quick), seed, quick,
        None if checkpoint is None else os.fspath(checkpoint), None if activations is None else os.fspath(activations),
        sanitizers,
    )  # fmt: skip
    options.check()
    return Verification(supervise(options))
