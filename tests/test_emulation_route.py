"""The CUDA kernels that route, on the CPU (see test_emulation.py): one launch and two, and a reference of its own.

What this cannot show is what depends on the order of memory or on time, and how the GPU rounds exp and 1 / x.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import routing_cases
from emulated import WORKSPACE_BYTES, aligned, answer, in_a_process
from test_emulation import call as call_router_gemm

from jax_router import RoutingSpec
from jax_router.dispatch import Problem
from jax_router.implementations.cuda import DTYPES, RouteArgs, RouterGemmArgs, spec_numbers


@dataclass(frozen=True)
class Case:
    tokens: int
    hidden: int
    experts: int
    spec: RoutingSpec
    bias: bool = False
    correction: bool = False
    scale: bool = False
    special: bool = False  # rows of equal, NaN and infinite logits
    equal: int = 1  # how many neighbouring experts have the same logits
    with_float32: str | None = None  # the dtype of x beside a float32 weight; else both have that of x

    @property
    def dtype(self) -> np.dtype:
        """Of x."""
        return np.dtype(
            (ml_dtypes.bfloat16, np.float16)[self.tokens % 2] if not self.with_float32 else self.with_float32
        )


V3 = RoutingSpec(8, "sigmoid", True, 1e-20, scaling_factor=2.5, num_groups=8, group_topk=4)
# Every kind of kernel, tiles and clusters that are not full, groups of whole lanes and others, ties, every dtype.
CASES = {
    "gpt-oss": Case(17, 2880, 32, RoutingSpec(4, "softmax_topk"), bias=True, special=True),
    "DeepSeek-V3": Case(33, 968, 256, V3, correction=True, special=True),
    "three slices of K": Case(2, 4168, 96, RoutingSpec(8, "softmax", True), special=True),
    "groups of five": Case(3, 200, 40, RoutingSpec(6, "softmax", num_groups=8, group_topk=3), special=True),
    "masked with 0": Case(4, 72, 160, RoutingSpec(8, "sigmoid", num_groups=5, group_topk=2, masked_choice=0.0),
                          correction=True),
    "best expert of a group": Case(4, 72, 64, RoutingSpec(3, "sqrtsoftplus", num_groups=4, group_topk=2,
                                                          group_score="max"), correction=True, scale=True),
    "rounded": Case(5, 136, 384, RoutingSpec(7, "sigmoid", True, round_logits=True, renormalize_min=3.0), bias=True),
    "on logits": Case(5, 72, 500, RoutingSpec(32, "sqrtsoftplus", True, select_on="logits"), correction=True),
    "1024 experts": Case(2, 72, 1024, RoutingSpec(9, "softmax_topk"), scale=True, special=True),
    "twins": Case(9, 200, 70, RoutingSpec(1, "sigmoid"), equal=2),
    "triplets": Case(3, 72, 250, RoutingSpec(8, "softmax"), equal=3),
    "one expert": Case(1, 8, 1, RoutingSpec(1, "softmax")),
    "float32 is not rounded": Case(3, 72, 256, RoutingSpec(8, round_logits=True), bias=True, with_float32="float32"),
    "rounded beside a float32 weight": Case(3, 72, 256, RoutingSpec(8, round_logits=True), with_float32="bfloat16"),
}  # fmt: skip

HEADER = "sm90_route.cuh"
UNITS = {HEADER: ("sm90_route_select.cu", "sm90_route_fused.cu"), "sm90_sum_parts.cuh": ("sm90_route_select.cu",)}
# What to break: file, old, new, and the case that shows it.
FAULTS = {
    "ties are not noticed": (HEADER, "if (equal) {", "if (false) {", "gpt-oss"),
    "the last of several in a lane": (
        HEADER,
        "for (int j = kPerLane - 1; j >= 0; --j) expert =",
        "for (int j = 0; j < kPerLane; ++j) expert =",
        "twins",
    ),
    "a group is compared with one neighbour": (
        HEADER,
        "for (int first = 0; first < spec.num_groups; first += scorers)",
        "for (int first = 0; first < scorers; first += scorers)",
        "DeepSeek-V3",
    ),
    "parts in another order": (
        "sm90_sum_parts.cuh",
        "return parts[part]; });",
        "return parts[part % 3 == 0 ? part : 3 - part]; });",
        "DeepSeek-V3",
    ),
    "the second highest of a group is its highest": (
        HEADER,
        "highest = max(highest, key);\n      for",
        "second = highest = max(highest, key);\n      for",
        "DeepSeek-V3",
    ),
    "the correction bias leaks into the weights": (
        HEADER,
        "weight *= spec.scaling_factor;",
        "weight *= spec.scaling_factor; if (!kPlain) weight += correction.value(0, JR_FLOAT32);",
        "DeepSeek-V3",
    ),
    "an owner does not wait for the logits": (
        "sm90_route_fused.cu",
        "    barrier_wait_for_cluster(all_received, 0);\n",
        "",
        "gpt-oss",
    ),
    "a token's logits go to its neighbour": (
        "sm90_route_fused.cu",
        "shared_address(&last.received[rank][quad * 4]), token), group",
        "shared_address(&last.received[rank][quad * 4]), token ^ (tokens > 1)), group",
        "gpt-oss",
    ),
    "the last slice of K is dropped": (
        "sm90_route_fused.cu",
        "for (unsigned slice = slot; slice < slices; slice += kSlots) {",
        "for (unsigned slice = slot; slice < kSlots; slice += kSlots) {",
        "three slices of K",
    ),
}


def route(library, arrays, spec: RoutingSpec, replay, config: int, gemm_config: int = -1):
    """(weights, experts, logits) by one configuration; None if it does not take the problem."""
    x, weight, bias, correction, scale = arrays
    (tokens, hidden), experts = x.shape, len(weight)
    logits = aligned(np.full((tokens, experts), np.nan, np.float32))
    weights = aligned(np.full((tokens, spec.top_k), np.nan, np.float32))
    selected = aligned(np.full((tokens, spec.top_k), -7, np.int32))
    workspace = aligned(np.full(WORKSPACE_BYTES // 4, np.nan, np.float32))

    def address(array):
        return None if array is None else array.ctypes.data

    def dtype(array):
        return -1 if array is None else DTYPES[array.dtype.name]

    problem = Problem(
        tokens, hidden, experts, x.dtype.name, weight.dtype.name, None if bias is None else bias.dtype.name
    )
    gemm = RouterGemmArgs.of(
        problem,
        x=address(x),
        weight=address(weight),
        bias=address(bias),
        out=address(logits),
        workspace=address(workspace),
        workspace_bytes=WORKSPACE_BYTES,
        config=gemm_config,
    )
    integers, floats = spec_numbers(spec)
    arguments = RouteArgs(
        gemm, 1, (ctypes.c_int32 * 8)(*integers), (ctypes.c_float * 4)(*floats), address(correction), address(scale),
        dtype(correction), dtype(scale), address(replay), address(weights), address(selected), config,
    )  # fmt: skip
    if config >= 0 and not library.jr_route_config_fits(config, ctypes.byref(arguments)):
        return None
    message = ctypes.create_string_buffer(512)
    status = library.jr_route(ctypes.byref(arguments), None, message, ctypes.c_size_t(len(message)))
    assert status == 0, message.value.decode()
    return weights, selected, logits


def operands(case: Case):
    random = np.random.default_rng(case.experts)
    dtype, of_weight = case.dtype, np.float32 if case.with_float32 else case.dtype
    x = random.standard_normal((case.tokens, case.hidden)).astype(dtype)
    weight = (2 * random.standard_normal((case.experts, case.hidden)) / np.sqrt(case.hidden)).astype(of_weight)
    weight = weight[np.arange(case.experts) // case.equal * case.equal]
    if case.special:  # equal logits; infinite ones, and NaN where infinities of both signs meet
        x[0] = 0
        x[-1, :2] = np.inf
        weight[: case.experts // 2, 0] = weight[::3, 1] = 0.5
        weight[1::3, 1] = -0.5
    vectors = []
    small = ((case.bias, np.float32, 0, 8), (case.correction, np.float32, 0, 64), (case.scale, dtype, 1, 8))
    for wanted, kind, shift, divisor in small:
        values = np.round(random.standard_normal(case.experts) * 4) / divisor + shift  # with ties
        vectors.append(aligned(values.astype(kind)) if wanted else None)
    return aligned(x), aligned(weight), *vectors


def same_bits(result, other) -> bool:
    """Whether experts and weights have the same bits. Any NaN is as good as another: x86 gives some a sign."""
    one, two = (np.where(np.isnan(weights), np.float32(np.nan), weights) for weights in (result[0], other[0]))
    return one.tobytes() == two.tobytes() and result[1].tobytes() == other[1].tobytes()


def wrong(case: Case, result, naive, first) -> str:
    """What is wrong with a result, against the naive kernel's logits and the first configuration's result."""
    weights, experts, logits = result
    if logits.tobytes() != naive.tobytes():
        return "logits differ from those of the naive kernel"
    if first is not None and not same_bits(result, first):
        return "experts or weights differ from those of another configuration"
    *_, correction, scale = operands(case)
    if case.spec.round_logits:
        logits = logits.astype(case.dtype).astype(np.float32)
    with np.errstate(all="ignore"):
        expected = routing_cases.select(logits, correction, case.spec)
        undecided = routing_cases.undecided(logits, correction, case.spec, 4)
        if not (experts == expected)[~undecided].all() or (~undecided).sum() < case.tokens - 1:
            return f"experts {experts.tolist()} instead of {expected.tolist()}"
        exact = routing_cases.weigh(logits.astype(np.float64), experts, scale, case.spec)
        subnormal = 2.0**-126  # below it float32 has fewer digits
        allowed = np.abs(exact) * routing_cases.tolerance(logits, experts, case.spec) + subnormal
        close = np.where(np.isfinite(exact), np.abs(weights - exact) <= allowed, weights == exact)
    return "" if (close | (np.isnan(weights) & np.isnan(exact))).all() else f"weights {weights} instead of {exact}"


def examine(path: str, name: str, *only: str) -> dict[str, str]:
    """What is wrong, by configuration; "" for nothing. In a process of its own: a fault in a kernel ends it."""
    library = ctypes.CDLL(path)
    library.jr_route_config_name.restype = library.jr_router_gemm_config_name.restype = ctypes.c_char_p
    case, found, first = CASES[name], {}, None
    arrays = operands(case)
    naive = call_router_gemm(library, *arrays[:3], np.float32, None)
    for config in map(int, only or range(-1, library.jr_route_num_configs())):
        result = route(library, arrays, case.spec, None, config)
        if result is None:
            continue
        label = "picked" if config < 0 else library.jr_route_config_name(config).decode()
        found[label] = wrong(case, result, naive, first)
        first = result if first is None else first
        again = route(library, arrays, case.spec, result[1], config)
        if not same_bits(again, result):
            found[f"{label}, replayed"] = "other bits"
        beyond = aligned(np.where(np.arange(case.spec.top_k) == 0, case.experts, result[1]).astype(np.int32))
        weights, experts, _ = route(library, arrays, case.spec, beyond, config)
        if not np.isnan(weights[:, 0]).all() or experts.tobytes() != beyond.tobytes():
            found[f"{label}, replayed beyond the experts"] = f"weights {weights[:, 0]}"
    for gemm_config in range(library.jr_router_gemm_num_configs()):
        label = library.jr_router_gemm_config_name(gemm_config).decode()
        if "_s" in label and case.hidden > 960:  # leaves its sums to the launch that routes; has 16 units of K and more
            behind = route(library, arrays, case.spec, None, library.jr_route_num_configs() - 1, gemm_config)
            found[label] = wrong(case, behind, naive, first)
    alone = route(library, (arrays[0][-1:], *arrays[1:]), case.spec, None, -1)
    if not same_bits(alone, (first[0][-1:], first[1][-1:])):
        found["a token alone"] = "other bits than in the batch"
    return found


def test_every_configuration_routes_as_the_reference(sources) -> None:
    library = sources.link("routing.so")
    names = list(CASES)
    found, said = in_a_process(__file__, library, *([name] for name in names))
    for name, each in zip(names, found, strict=False):
        assert not any(each.values()), f"{name}: {each}"
    assert len(found) == len(names), f"{names[len(found)]}: {said}"
    examined = {label for each in found for label in each}
    splits = {"many_64x80_s4", "many_64x128_s4"}
    assert splits < examined
    assert len(examined - splits) == 1 + ctypes.CDLL(str(library)).jr_route_num_configs()


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_routing_is_seen(sources, fault) -> None:
    file, old, new, name = FAULTS[fault]
    library = sources.faulty(file, old, new, UNITS.get(file, ()))
    found, said = in_a_process(__file__, library, [name])
    assert any(any(each.values()) for each in found) or "emulation: " in said, "not seen"


def test_a_gpu_that_runs_no_cluster_of_16_gets_two_launches(sources, monkeypatch) -> None:
    library = sources.link("routing.so")
    for clusters in (0, -1):
        monkeypatch.setenv("EMULATED_CLUSTERS", str(clusters))
        found, said = in_a_process(__file__, library, ["gpt-oss", -1])
        assert found, said
        assert not any(found[0].values()), found
    _, said = in_a_process(__file__, library, ["gpt-oss", 0])
    assert "a cluster that this GPU cannot run" in said, "the case is not one that would be launched as a cluster"


if __name__ == "__main__":
    answer(examine)
