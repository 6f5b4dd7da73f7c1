"""The CUDA kernels as they are, run on the CPU: every configuration gives the bits of the naive kernel, in any batch.

tests/emulation puts CUDA's runtime and the two headers with PTX on fibers; everything else is compiled from csrc. That
shows wrong indices, phases and sizes, most wrong barriers, reads before the copies have come and copies from beyond x
and weight. It cannot show what depends on memory order or on time (order within a warp, wgmma in flight, proxy fences,
launch overlap), nor other accesses outside global memory, nor how the tensor core rounds (here a step is exact and
rounds once): for that there is the GPU.
"""

from __future__ import annotations

import ctypes
import re

import ml_dtypes
import numpy as np
import pytest
from emulated import WORKSPACE_BYTES, aligned, answer, in_a_process

from jax_router import parity
from jax_router.dispatch import Problem
from jax_router.implementations.cuda import RouterGemmArgs

# tokens, hidden, experts: whole and partial tiles, units and slices; rings that go round; several passes of one block.
PROBLEMS = (
    (1, 8, 1), (2, 4104, 9), (3, 720, 5), (8, 2880, 33), (17, 2824, 18), (70, 2824, 41), (129, 1000, 33),
    (33, 720, 18), (48, 720, 9), (65, 4096, 34), (1, 16384, 1), (4, 17408, 2),
    (3, 2048, 5), (3, 4096, 5), (2, 7168, 6), (2, 8192, 6), (2, 8200, 3),
    (19, 1096, 136), (66, 2824, 24),
    # float32 weights, and the dtype of x
    (33, 1096, 40, "float32"), (18, 2824, 24, "bfloat16"), (3, 200, 5, "float32"), (1, 17416, 3, "bfloat16"),
    (19, 264, 8, "bfloat16"),
    (8, 2568, 3, "float32"), (5, 4104, 6, "bfloat16"), (1, 8192, 4, "float32"), (2, 8, 1, "bfloat16"),
    (7, 72, 9, "bfloat16"), (4, 2056, 2, "float32"), (6, 136, 3, "bfloat16"),
)  # fmt: skip

UNITS = {
    "sm90_slice_sums.cuh": ("sm90_router_gemm_few_tokens.cu",),
    "sm90_float32.cuh": (
        "sm90_router_gemm_float32.cu",
        "sm90_router_gemm_float32_one_token.cu",
        "sm90_router_gemm_naive.cu",
    ),
}
# What to break: file, old, new, and a problem that shows it; of PROBLEMS, where the kernels as they are pass.
FAULTS = {
    "waits on the first stage's barrier": (
        "sm90_router_gemm_many_tokens.cu",
        "barrier_wait(filled_of(stage), i / M::kRingStages);",
        "barrier_wait(filled_of(stage_of(ring, 0)), 0);",
        (70, 2824, 41),
    ),
    "multiplies before the copies have come": (
        "sm90_router_gemm_few_tokens.cu",
        "    wait_for_copies<0>();\n",
        "",
        (2, 4104, 9),
    ),
    "adds slices that no warp has": (
        "sm90_router_gemm_one_token.cu",
        "if (i * kUnitsPerSlice * kGroups < units) groups",
        "if (true) groups",
        (8, 2880, 33),
    ),
    "multiplies a step by its neighbour": (
        "sm90_router_gemm_one_token.cu",
        "load_matrices(a, (weight_chunk ^ step * 32)",
        "load_matrices(a, (weight_chunk ^ step / 2 * 64)",
        (3, 2048, 5),
    ),
    "reads tokens that do not exist": (
        "sm90_router_gemm_few_tokens.cu",
        "exists && rows + row < x_rows",
        "exists",
        (17, 2824, 18),
    ),
    "reads experts that do not exist": (
        "sm90_router_gemm_few_tokens.cu",
        "exists && rows < weight_rows",
        "exists",
        (17, 2824, 18),
    ),
    "leaves while copies are under way": (
        "sm90_router_gemm_one_token.cu",
        "    wait_for_copies<0>();  // zeros\n",
        "",
        (8, 2880, 33),
    ),
    "sends sums of tokens that do not exist": (
        "sm90_router_gemm_many_tokens.cu",
        "if (quad < M::Cluster::quads(log2_tiles)) ",
        "",
        (17, 2824, 18),
    ),
    "forgets the half of the tree that waits in shared memory": (
        "sm90_router_gemm_many_tokens.cu",
        "const float4 both = mine + right;",
        "const float4 both = right;",
        (70, 2824, 41),
    ),
    "adds groups in another order": (
        "sm90_slice_sums.cuh",
        "cluster_sum.push(rank, log2_tiles, quad, groups[0] + groups[1]);",
        "cluster_sum.push((rank + 1) % 8, log2_tiles, quad, groups[0] + groups[1]);",
        (17, 2824, 18),
    ),
    "drops the last partial unit": (
        "sm90_router_gemm_few_tokens.cu",
        "const unsigned units = units_of(p.hidden)",
        "const unsigned units = p.hidden / kUnit",
        (17, 2824, 18),
    ),
    "takes float32 weights of a column as if it lay straight": (
        "sm90_router_gemm_float32.cu",
        "(lane / 4 * 4 ^ lane % 4 * 32)",
        "(lane / 4 * 4)",
        (33, 1096, 40, "float32"),
    ),
    "leaves out the smallest terms of a weight": (
        "sm90_float32.cuh",
        "add(low, low, 0, 1);\n      add(low, low, 0, 2);",
        "add(low, low, 0, 1);",
        (19, 264, 8, "bfloat16"),
    ),
    "adds the first unit of the next group": (
        "sm90_router_gemm_float32_one_token.cu",
        "settled(group_begin(units, group + 1) - begin)",
        "settled(ceil_div(units, kGroups))",
        (8, 2568, 3, "float32"),
    ),
    "multiplies half a unit before it has come": (
        "sm90_router_gemm_float32_one_token.cu",
        "  multiply_half(0);\n  wait_for_copies<0>();\n  __syncwarp();\n  multiply_half(1);\n",
        "  multiply_half(0);\n  multiply_half(1);\n  wait_for_copies<0>();\n",
        (7, 72, 9, "bfloat16"),
    ),
    "deals a column out as if it lay straight": (
        "sm90_router_gemm_few_tokens.cu",
        "(weight_chunk ^ n * kTurn * 16)",
        "weight_chunk",
        (66, 2824, 24),
    ),
    "a barrier that one warp does not reach": (
        "sm90_router_gemm_few_tokens.cu",
        "  __syncthreads();  // every slice sum",
        "  if (stage > 0) __syncthreads();  // every slice sum",
        (17, 2824, 18),
    ),
}


def call(
    library: ctypes.CDLL, x, weight, bias, out_dtype, config: int | None, layout: str = "experts_hidden"
) -> np.ndarray | None:
    """Logits by one configuration, by the naive kernel for None; None if it does not take the problem."""
    stored = weight if layout == "experts_hidden" else aligned(weight.T)
    out = aligned(np.full((len(x), len(weight)), np.nan, out_dtype))
    workspace = aligned(np.full(WORKSPACE_BYTES // 4, np.nan, np.float32))
    bias_dtype = None if bias is None else bias.dtype.name
    problem = Problem(*x.shape, len(weight), x.dtype.name, weight.dtype.name, bias_dtype, out.dtype.name)
    arguments = RouterGemmArgs.of(
        problem,
        x=x.ctypes.data,
        weight=stored.ctypes.data,
        bias=None if bias is None else bias.ctypes.data,
        out=out.ctypes.data,
        workspace=workspace.ctypes.data,
        workspace_bytes=WORKSPACE_BYTES,
        config=-1 if config is None else config,
    )
    arguments.weight_layout = int(layout != "experts_hidden")
    if config is not None and config >= 0 and not library.jr_router_gemm_config_fits(config, ctypes.byref(arguments)):
        return None
    function = library.jr_router_gemm_naive if config is None else library.jr_router_gemm
    message = ctypes.create_string_buffer(512)
    status = function(ctypes.byref(arguments), None, message, ctypes.c_size_t(len(message)))
    assert status == 0, message.value.decode()
    return out


def of_one_product(library: ctypes.CDLL, x: np.ndarray, weight: np.ndarray) -> str:
    """What is wrong where each logit is one product of float32: there every term of it counts."""
    random = np.random.default_rng(1)
    one = aligned(np.where(np.arange(x.shape[1]) == random.integers(0, x.shape[1], (len(x), 1)), x, np.zeros_like(x)))
    expected = one.astype(np.float64) @ weight.astype(np.float64).T
    off = abs(call(library, one, weight, None, np.float32, -1) - expected)
    # 2^-23 is left out; one addition rounds, high + low, as do those of low, which is below 2^-6 of high.
    return "" if (off <= 2.0**-22 * abs(expected)).all() else "a term is missing"


def terms(values: np.ndarray, units: int) -> list[np.ndarray]:
    """v1, v2 and v3 of bfloat16 or float32, in float64, and zeros up to the end of the last unit of K."""
    found, rest = [], np.zeros((len(values), units * 64), np.float32)
    rest[:, : values.shape[1]] = values
    for _ in range(3):
        found.append(rest.astype(ml_dtypes.bfloat16).astype(np.float64))
        rest = rest - found[-1].astype(np.float32)
    return found


def float32_tree(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The tree of docs/numerics.md for float32 weights, with steps that are exact and round once."""
    units = -(-x.shape[1] // 64)
    of_x, of_weight = terms(x, units), terms(weight, units)
    smaller = ((0, 1), (1, 0), (0, 2), (1, 1), (2, 0)) if x.dtype == np.float32 else ((0, 1), (0, 2))
    sums = [np.zeros((len(x), len(weight)), np.float32) for _ in range(16)]
    for group in range(16):
        for unit in range(units * group // 16, units * (group + 1) // 16):
            high, low = np.zeros_like(sums[0]), np.zeros_like(sums[0])
            for step in (slice(k, k + 16) for k in range(unit * 64, unit * 64 + 64, 16)):
                high += (of_x[0][:, step] @ of_weight[0][:, step].T).astype(np.float32)
                for i, j in smaller:
                    low = (low + of_x[i][:, step] @ of_weight[j][:, step].T).astype(np.float32)
            sums[group] += high + low
    while len(sums) > 1:
        sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def examine(path: str, tokens: int, hidden: int, experts: int, with_float32: str | None = None) -> dict[str, str]:
    """What is wrong, by configuration; "" for nothing. In a process of its own: a fault in a kernel ends it."""
    library = ctypes.CDLL(path)
    library.jr_router_gemm_config_name.restype = ctypes.c_char_p
    dtype = (ml_dtypes.bfloat16, np.float16)[experts % 2] if with_float32 is None else np.dtype(with_float32).type
    kinds = ((np.float32, np.float32), (np.float32, dtype), (np.float32, None), (dtype, np.float32))
    out_dtype, bias_dtype = kinds[tokens % 4]
    random = np.random.default_rng(0)
    x = aligned(random.standard_normal((tokens, hidden)).astype(dtype))
    weight = aligned(random.standard_normal((experts, hidden)).astype(np.float32 if with_float32 else dtype))
    bias = None if bias_dtype is None else aligned(random.standard_normal(experts).astype(bias_dtype))
    naive = call(library, x, weight, bias, out_dtype, None)
    truth = x.astype(np.float64) @ weight.astype(np.float64).T + (0 if bias is None else bias.astype(np.float64))
    # Each operation of the tree rounds once, here also those of the tensor core; then one rounding to out_dtype.
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    magnitude += 0 if bias is None else np.abs(bias.astype(np.float64))
    if with_float32:  # a step of high; 2^-23, which is left out; what low loses and high has more of than |x w|
        roundings = parity.split_tree(hidden).rounded + 1 + 2 + 1
    else:
        tree = parity.slice_tree(hidden)
        roundings = tree.rounded + tree.truncated
    bound = roundings * 2.0**-24 * magnitude
    bound += np.abs(truth) * float(ml_dtypes.finfo(out_dtype).eps) / 2
    found = {"naive": "" if np.all(np.abs(naive.astype(np.float64) - truth) <= bound) else "wrong logits"}
    if with_float32:
        tree = float32_tree(x, weight) + (0 if bias is None else bias.astype(np.float32))
        found["the tree"] = "" if tree.astype(out_dtype).tobytes() == naive.tobytes() else "other bits than stated"
    for layout in ("experts_hidden", "hidden_experts")[: 1 + (experts % 8 == 0)]:
        for config in (None, *range(library.jr_router_gemm_num_configs())):
            logits = call(library, x, weight, bias, out_dtype, config, layout)
            if logits is not None:
                name = "naive" if config is None else library.jr_router_gemm_config_name(config).decode()
                found[f"{name} {layout}"] = "" if logits.tobytes() == naive.tobytes() else "other bits than naive"
    alone = [call(library, x[row : row + 1], weight, bias, out_dtype, -1) for row in {0, tokens - 1}]
    same = all(
        logits.tobytes() == naive[row : row + 1].tobytes() for row, logits in zip({0, tokens - 1}, alone, strict=True)
    )
    found |= {"a row alone": "" if same else "other bits than in the batch"}
    return found | ({"one product": of_one_product(library, x, weight)} if with_float32 else {})


def test_every_configuration_gives_the_bits_of_the_naive_kernel(sources) -> None:
    library = sources.link("kernels.so")
    found, said = in_a_process(__file__, library, *PROBLEMS)
    for problem, each in zip(PROBLEMS, found, strict=False):
        assert not any(each.values()), f"{problem}: {each}"
    assert len(found) == len(PROBLEMS), f"{PROBLEMS[len(found)]}: {said}"
    examined = {name for each in found for name in each if name.endswith("experts_hidden")}
    assert len(examined) == 1 + ctypes.CDLL(str(library)).jr_router_gemm_num_configs()
    either = [name.split()[0] for name in examined]
    takes_both = {
        name
        for name in either
        if name.startswith(("naive", "few_16x16", "many", "float32")) and not re.search("x80_|_one_", name)
    }
    assert {name.split()[0] for each in found for name in each if name.endswith("hidden_experts")} == takes_both


def test_token_tiles_beyond_one_row_of_the_grid_are_computed_once(sources) -> None:
    library = sources.faulty("router_gemm.cu", "constexpr int kMaxGridY = 65535;", "constexpr int kMaxGridY = 2;")
    (found,), said = in_a_process(__file__, library, (140, 968, 8))
    assert not any(found.values()), f"{found}: {said}"
    assert any(name.startswith("many_") for name in found)


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_kernels_are_seen(sources, fault) -> None:
    file, old, new, problem = FAULTS[fault]
    assert problem in PROBLEMS
    library = sources.faulty(file, old, new, UNITS.get(file, ()))
    found, said = in_a_process(__file__, library, problem)
    assert any(any(each.values()) for each in found) or "emulation: " in said, "not seen"


if __name__ == "__main__":
    answer(examine)
