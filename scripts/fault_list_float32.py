"""Kernels broken on purpose, part of fault_list.py: those of float32 weights, which no call in 16 bits runs."""

from __future__ import annotations

from fault_base import Fault

from jax_router.verification.edits import Edit

KERNEL = "sm90_router_gemm_float32.cu"
TERMS = "sm90_float32.cuh"
FILES = (KERNEL, TERMS, "sm90_router_gemm_float32_one_token.cu")  # code that only calls with float32 weights run
MODELS = ("MiniMax-M2", "ERNIE-4.5-21B-A3B")  # x in bfloat16, in float32

FLOAT32_FAULTS = (
    Fault(
        name="term-left-out",
        what="the products of the weights' smallest terms are not added: 16 of the 24 bits of a float32 count",
        edits=(Edit(TERMS, "      add(low, low, 0, 2);\n", "", count=2),),
        seen_by=("accuracy",),  # normal data by the mean square; single logits where each is one product
        shapes=MODELS,
        extends_to="every launch with float32 weights, the naive kernel's too, so that all bits agree",
    ),
    Fault(
        name="barrier-left-out",
        what="the warps of a block do not meet before they add up what each of them left in shared memory",
        edits=(
            Edit(
                KERNEL, "  __syncthreads();  // every slice sum of the block, and the bias, are in shared memory\n", ""
            ),
        ),
        seen_by=("accuracy", "bits", "load"),
        shapes=MODELS,
        extends_to="every configuration of the kernel for float32 weights, as its warps have units of K of their own",
    ),
)
