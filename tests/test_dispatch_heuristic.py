"""What the dispatcher takes where no table has the shape."""

from __future__ import annotations

import pytest
from test_dispatch import A100, DOCUMENT, H200, kernels

import jax_router as jr
from jax_router import tables
from jax_router.dispatch import Problem, choose

__all__ = ["kernels"]  # the fixture: both kernels take every problem on an H200


@pytest.mark.parametrize(
    ("tokens", "experts", "bias", "chosen", "without_cuda"),
    [
        (0, 128, "bfloat16", "xla", "xla"),
        (1, 128, None, "xla", "xla"),
        (1, 128, "bfloat16", "cuda", "xla"),
        (2, 128, None, "cuda", "xla"),
        (15, 128, None, "cuda", "xla"),
        (16, 128, None, "cuda", "pallas"),
        (256, 128, None, "cuda", "pallas"),
        (257, 128, None, "cuda", "xla"),
        (4096, 128, None, "cuda", "xla"),
        (4096, 129, None, "xla", "xla"),
        (4097, 8, "bfloat16", "xla", "xla"),
    ],
)
def test_the_heuristic_takes_the_kernels_between_a_bare_product_and_many_logits(
    tokens, experts, bias, chosen, without_cuda
) -> None:
    problem = Problem(tokens, 2880, experts, bias_dtype=bias)
    assert choose(problem, H200, environment={}).implementation == chosen
    assert choose(problem, H200, environment={}, unavailable={"cuda": "is broken"}).implementation == without_cuda
    assert choose(problem, A100, environment={}).implementation == "xla"


@pytest.mark.parametrize(("dtypes", "most"), [(("bfloat16", "float32"), 512), (("float32", None), 256)])
@pytest.mark.parametrize("spec", [None, jr.RoutingSpec(top_k=4)])
@pytest.mark.parametrize(("more", "chosen"), [(None, "xla"), (-512, "cuda"), (0, "cuda"), (1, "xla"), (4096, "xla")])
def test_the_heuristic_takes_the_kernel_for_float32_weights_of_some_hundred_tokens(
    more, chosen, dtypes, most, spec
) -> None:
    fewest = 2 if spec is None else 1  # XLA's product for one token is faster than ours
    tokens = 0 if more is None else max(fewest, most + more)
    problem = Problem(tokens, 3072, 256, *dtypes, spec=spec)
    for table in (None, tables.Table.parse(DOCUMENT)):
        choice = choose(problem, H200, environment={}, table=table, unavailable={"pallas": "is broken"})
        assert choice.implementation == chosen
        assert choice.reason.startswith("no measurements of this shape on NVIDIA H200 (9.0); ")
        assert (f"the CUDA kernel for float32 weights up to {most} tokens" in choice.reason) == (chosen == "cuda")
    assert choose(problem, A100, environment={}).implementation == "xla"
    for fewer in (fewest - 1, most):
        other = Problem(fewer, 3072, 256 if fewer < most else 257, *dtypes, spec=spec)
        assert choose(other, H200, environment={}, unavailable={"pallas": "is broken"}).implementation == "xla"


@pytest.mark.parametrize(("hidden", "most"), [(960, 256), (968, 4096)])
def test_tiles_for_many_tokens_want_sixteen_units_of_k(hidden: int, most: int) -> None:
    for tokens, chosen in ((most, "cuda"), (most + 1, "xla")):
        assert choose(Problem(tokens, hidden, 64), H200, environment={}).implementation == chosen
