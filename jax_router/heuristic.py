"""Which implementation is assumed to be the fastest where no table has measured the shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jax_router.implementations import NAMES

if TYPE_CHECKING:
    from jax_router.dispatch import Device, Problem


def rank(problem: Problem, device: Device) -> dict[str, tuple[str, str]]:
    """Every implementation, best first: why it is chosen, and why not where it could run but another one is chosen."""
    guess = f"no measurements of this shape on {device.description}; "
    slower = f"{guess}assumed slower"
    if device.platform != "gpu":
        return dict.fromkeys(("xla", *NAMES), ("the kernels are for GPUs; xla runs everywhere", slower))
    ranking = {}
    fewest_tokens = 2 if problem.bias_dtype is None else 1
    # The kernels with large tiles are for 16 units of 64 elements of K and more.
    most_tokens = 4096 if problem.hidden > 960 else 256
    if problem.dtypes[1] == "float32":
        # As on an H200 with 256 experts: then XLA comes to be faster, and at one token it is, but for routing.
        most_tokens = 512 if problem.dtype == "bfloat16" else 256
        fewest_tokens = 1 if problem.spec is not None else 2
        if fewest_tokens <= problem.tokens <= most_tokens and problem.tokens * problem.experts <= 256 * most_tokens:
            ranking["cuda"] = (f"{guess}the CUDA kernel for float32 weights up to {most_tokens} tokens", slower)
    elif problem.spec is not None:
        if problem.tokens > 0:
            fused = "kernel, where XLA needs four to eight and a sort"
            ranking = {"cuda": (f"{guess}the CUDA {fused}", slower), "pallas": (f"{guess}the Pallas {fused}", slower)}
    # As on an H200: one token without a bias is a matrix-vector product that XLA fuses into one small kernel, and from
    # about 2^20 logits on cuBLAS fills the GPU.
    elif fewest_tokens <= problem.tokens <= most_tokens and problem.tokens * problem.experts <= 2**19:
        ranking["cuda"] = (f"{guess}the CUDA kernel up to {most_tokens} tokens and 2^19 logits", slower)
        if 16 <= problem.tokens <= 256:
            ranking["pallas"] = (f"{guess}the Pallas kernel for 16 to 256 tokens", slower)
    ranking["xla"] = (f"{guess}xla where the kernels do not run or are slower", slower)
    return ranking | {name: ("", slower) for name in NAMES if name not in ranking}
