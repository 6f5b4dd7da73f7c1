"""The CUDA kernels called from PyTorch: on a GPU the bits that JAX gets, in CUDA graphs of both and on other streams.

What can be seen without a GPU is in test_torch_arguments.py. One part runs in a process of its own, in which no backend
of JAX can start:

    python tests/test_torch_kernels.py FOLDER
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from routing_cases import CASES  # noqa: E402
from torch_cases import DTYPES, numbers, pretend_a_gpu  # noqa: E402

import jax_router as jr  # noqa: E402
import jax_router.torch as jrt  # noqa: E402
import torch_ref  # noqa: E402
from jax_router import parity, sweep_points  # noqa: E402
from jax_router.models import models  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TOKENS, MANY_TOKENS = (1, 7, 64, 257), (1024,)  # the latter in the headline models
PLAIN = jr.RoutingSpec(4, "softmax_topk")
V3 = models["DeepSeek-V3"].spec

every_router = pytest.mark.parametrize("shape", sweep_points.route_shapes(models), ids=lambda shape: shape.models[0])
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def torch_gpu(gpu) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"PyTorch {torch.__version__} has no CUDA")


def on_gpu(*arrays):
    return [None if array is None else torch_ref.to_torch(np.asarray(array), "cuda") for array in arrays]


def differing(ours, theirs) -> dict[int, list[int]]:
    """Rows whose bits differ, by place: logits or a routing, what was not returned is None on both sides."""
    if not isinstance(ours, tuple):
        ours, theirs = (ours,), (theirs,)
    assert [one is None for one in ours] == [other is None for other in theirs]
    pairs = [(one, other) for one, other in zip(ours, theirs, strict=True) if one is not None]
    rows = [parity.differing_rows(torch_ref.to_numpy(one), np.asarray(other)).tolist() for one, other in pairs]
    return {place: found for place, found in enumerate(rows) if found}


@functools.partial(jax.jit, static_argnames=("spec", "sizes"))
def in_jax(x, weight, bias, correction_bias, *, spec, sizes):
    """Logits and routing of the first tokens of x, for several numbers of them: one compilation."""
    options = {"spec": spec, "correction_bias": correction_bias, "return_logits": True, "implementation": "cuda"}
    return [
        (
            jr.router_gemm(x[:tokens], weight, bias, implementation="cuda"),
            jr.route(x[:tokens], weight, bias, **options),
        )
        for tokens in sizes
    ]


@every_router
def test_a_published_router_gets_the_bits_of_jax(torch_gpu, shape) -> None:
    sizes = TOKENS + (MANY_TOKENS if shape.headline else ())
    x, weight, bias, correction, _ = numbers(max(sizes), shape.hidden, shape.experts)
    arrays = x, weight, bias if shape.bias else None, correction if shape.correction_bias else None
    x, weight, bias, correction = on_gpu(*arrays)
    for tokens, (logits, routing) in zip(sizes, in_jax(*arrays, spec=shape.spec, sizes=sizes), strict=True):
        options = {"spec": shape.spec, "correction_bias": correction, "return_logits": True}
        assert not differing(jrt.router_gemm(x[:tokens], weight, bias), logits), tokens
        ours = jrt.route(x[:tokens], weight, bias, **options)
        assert not differing(ours, routing), tokens
        alone = jrt.route(x[:tokens], weight, bias, **options | {"return_logits": False})
        assert alone.logits is None
        assert not differing(alone, routing._replace(logits=None)), tokens


@every_case
def test_any_routing_gets_the_bits_of_jax_and_replays_what_jax_recorded(torch_gpu, name) -> None:
    case, tokens = CASES[name], 33
    x, weight, bias, correction, scale = numbers(tokens, case.hidden, case.experts, dtype=case.dtype)
    bias = None if case.bias is None else bias.astype(DTYPES[case.bias])
    vectors = {
        "correction_bias": correction if case.correction_bias else None,
        "expert_scale": scale.astype(x.dtype) if case.expert_scale else None,
    }
    of_jax = functools.partial(jr.route, spec=case.spec, return_logits=True, implementation="cuda")
    recorded = jax.jit(of_jax)(x, weight, bias, **vectors)
    x, weight, bias = on_gpu(x, weight, bias)
    vectors = dict(zip(vectors, on_gpu(*vectors.values()), strict=True))
    ours = jrt.route(x, weight, bias, spec=case.spec, return_logits=True, **vectors)
    assert not differing(ours, recorded)
    (experts,) = on_gpu(recorded.experts)
    del vectors["correction_bias"]  # which selects nothing now
    for given in (experts, experts.to(torch.int64)):
        replayed = jrt.route(x, weight, bias, spec=case.spec, experts=given, return_logits=True, **vectors)
        assert not differing(replayed, recorded)


@pytest.mark.parametrize("model", ["gpt-oss-120b", "DeepSeek-V3"])
def test_a_weight_stored_hidden_by_experts_gets_the_same_bits_in_both(torch_gpu, model) -> None:
    preset = models[model]
    x, weight, *_ = numbers(257, preset.hidden, preset.experts)
    options = {"spec": preset.spec, "return_logits": True}
    of_jax = functools.partial(jr.route, implementation="cuda", weight_layout="hidden_experts", **options)
    rows, matrix, stored = on_gpu(x, weight, np.ascontiguousarray(weight.T))
    for tokens in TOKENS:
        expected = jax.jit(of_jax)(x[:tokens], weight.T)
        for given, layout in ((matrix, "experts_hidden"), (stored, "hidden_experts")):
            assert not differing(jrt.router_gemm(rows[:tokens], given, weight_layout=layout), expected.logits), tokens
            ours = jrt.route(rows[:tokens], given, weight_layout=layout, **options)
            assert not differing(ours, expected), (tokens, layout)


@pytest.mark.parametrize("tokens", [5, 300])
def test_jax_replays_what_pytorch_recorded(torch_gpu, tokens) -> None:
    arrays = numbers(tokens, 7168, 256)
    x, weight, _, correction, scale = on_gpu(*arrays)
    recorded = jrt.route(x, weight, spec=V3, correction_bias=correction, expert_scale=scale)
    others = (recorded.experts.flip(-1) + 1) % 256
    for experts in (recorded.experts, others):
        ours = jrt.route(x, weight, spec=V3, expert_scale=scale, experts=experts)
        given = {"expert_scale": arrays[4], "experts": torch_ref.to_numpy(experts)}
        assert not differing(ours, jr.route(*arrays[:2], spec=V3, implementation="cuda", **given))


def test_replayed_ids_out_of_range_come_back_with_a_weight_of_nan(torch_gpu) -> None:
    x, weight, bias, *_ = on_gpu(*numbers(3, 72, 16))
    experts = torch.tensor([[0, 1], [-1, 3], [5, 16]], device="cuda")
    routing = jrt.route(x, weight, bias, spec=jr.RoutingSpec(2, "sigmoid"), experts=experts)
    assert routing.experts.tolist() == experts.tolist()
    assert routing.weights.isnan().tolist() == [[False, False], [True, False], [False, True]]


@pytest.mark.parametrize(
    ("dtype", "of_weight"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32"), ("float32", "float32")],
)
def test_every_dtype_of_bias_and_logits_gets_the_bits_of_jax(torch_gpu, dtype, of_weight) -> None:
    x, _, bias, bias32, _ = numbers(257, 2880, 130, dtype=dtype)
    weight = numbers(1, 2880, 130, dtype=of_weight)[1]
    biases, dtypes = [None, bias, bias32], (dtype, "float32")

    def of_every_kind(x, weight, biases):
        options = [{"out_dtype": out, "implementation": "cuda"} for out in dtypes]
        return [[jr.router_gemm(x, weight, added, **option) for option in options] for added in biases]

    expected = jax.jit(of_every_kind)(x, weight, biases)
    x, weight, *biases = on_gpu(x, weight, *biases)
    for added, of_bias in zip(biases, expected, strict=True):
        for out, logits in zip(dtypes, of_bias, strict=True):
            ours = jrt.router_gemm(x, weight, added, out_dtype=getattr(torch, out))
            assert not differing(ours, logits), (None if added is None else added.dtype, out)


def chain(namespace, operations, x, weights, biases, corrections, *, spec):
    """Logits, weights and experts of layers that need each other's results.

    A layer turns the sign of some tokens, which is exact: so the bits do not depend on how it is compiled.
    """
    results = []
    for weight, bias, correction_bias in zip(weights, biases, corrections, strict=True):
        logits = operations.router_gemm(x, weight, bias)
        x = namespace.where(logits[:, :1] > 0, -x, x)
        routing = operations.route(x, weight, bias, spec=spec, correction_bias=correction_bias)
        x = namespace.where(routing.experts[:, :1] % 2 == 0, -x, x)
        results += [logits, routing.weights, routing.experts]
    return results


JAX_CUDA = types.SimpleNamespace(
    router_gemm=functools.partial(jr.router_gemm, implementation="cuda"),
    route=functools.partial(jr.route, implementation="cuda"),
)
jitted_chain = jax.jit(functools.partial(chain, jnp, JAX_CUDA), static_argnames="spec")


def layers(seed: int, tokens: int, hidden: int, experts: int, count: int = 4) -> tuple:
    """x, and lists of weights, biases and correction biases."""
    each = [numbers(tokens, hidden, experts, seed=seed * count + layer) for layer in range(count)]
    return each[0][0], *([arrays[place] for arrays in each] for place in (1, 2, 3))


@pytest.mark.parametrize("sizes", [(8, 2880, 128), (300, 7168, 256)], ids=["gpt-oss, 8", "DeepSeek-V3, 300"])
def test_graphs_of_both_frameworks_replay_the_same_bits_with_changing_contents(torch_gpu, sizes) -> None:
    """XLA puts five and more custom calls in a row into a CUDA graph (test_cuda_graph.py); here they are eight."""
    spec = PLAIN if sizes[2] == 128 else V3
    x, *parameters = layers(0, *sizes)
    static = on_gpu(x)[0], *(on_gpu(*arrays) for arrays in parameters)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        chain(torch, jrt, *static, spec=spec)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX's threads go on calling CUDA
        results = chain(torch, jrt, *static, spec=spec)
    for seed in range(3):
        contents = layers(seed, *sizes)
        static[0].copy_(on_gpu(contents[0])[0])
        for tensors, arrays in zip(static[1:], contents[1:], strict=True):
            for tensor, array in zip(tensors, arrays, strict=True):
                tensor.copy_(on_gpu(array)[0])
        for result in results:
            result.fill_(-7)
        graph.replay()
        for place, (ours, theirs) in enumerate(zip(results, jitted_chain(*contents, spec=spec), strict=True)):
            assert not differing(ours, theirs), (seed, place)
    graph.reset()


def test_a_launch_goes_to_the_current_stream(torch_gpu) -> None:
    """x is written on a side stream, late: only what is behind it on that stream sees it."""
    x, weight, bias, correction, _ = numbers(257, 2880, 128)
    (expected, routing), *_ = in_jax(x, weight, bias, correction, spec=PLAIN, sizes=(257,))
    x, weight, bias, correction = on_gpu(x, weight, bias, correction)
    late, side = torch.zeros_like(x), torch.cuda.Stream()
    for cycles in (1, 200_000_000):  # the first time kernels are loaded and memory is allocated
        late.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(cycles)
            late.copy_(x)
            results = [jrt.router_gemm(late, weight, bias) for _ in range(20)]
            routings = [jrt.route(late, weight, bias, spec=PLAIN, correction_bias=correction) for _ in range(20)]
            del results[1:19], routings[1:19]  # what is freed is used again while the launches wait
            results.append(jrt.router_gemm(late, weight, bias))
            waiting = not side.query()
    assert waiting, "x was there before the launches, so this shows nothing"
    assert not differing(jrt.router_gemm(x, weight, bias), expected)  # meanwhile, on the default stream
    torch.cuda.current_stream().wait_stream(side)
    assert [differing(logits, expected) for logits in results] == [{}] * 3
    assert [differing(each, routing._replace(logits=None)) for each in routings] == [{}] * 2


def test_strided_and_misaligned_rows_and_leading_axes_get_the_same_bits_on_every_gpu(torch_gpu) -> None:
    arrays = numbers(90, 2880, 128)
    _, (_, expected) = in_jax(*arrays[:4], spec=PLAIN, sizes=(1, 90))
    for index in range(torch.cuda.device_count()):
        x, weight, bias, correction = (tensor.to(f"cuda:{index}") for tensor in on_gpu(*arrays[:4]))
        views = []
        for columns, rows, offset in ((2880, 90, 0), (5760, 90, 0), (2881, 90, 0), (2880, 91, 1)):
            storage = torch.full((rows * columns + 8,), torch.nan, dtype=x.dtype, device=x.device)
            views.append(storage[offset : offset + 90 * columns].view(90, columns)[:, :2880].copy_(x))
        views += [x.t().contiguous().t(), x.clone()]
        spare = torch.empty(129, dtype=bias.dtype, device=x.device)[1:].copy_(bias)  # 2 bytes behind a multiple of 4
        for view in views:
            for shape in ((90,), (9, 10), (3, 1, 30)):
                options = {"spec": PLAIN, "correction_bias": correction, "return_logits": True}
                routing = jrt.route(view.unflatten(0, shape), weight, spare, **options)
                assert [tensor.shape[:-1] for tensor in routing] == [shape] * 3
                flat = jrt.Routing(*(tensor.flatten(0, -2) for tensor in routing))
                assert not differing(flat, expected), (index, view.stride(), shape)
        one = jrt.router_gemm(x[3], weight, bias)
        assert one.shape == (128,)
        assert not differing(one[None], np.asarray(expected.logits)[3:4])


def in_a_process_without_a_backend(folder: Path, arrays) -> dict[str, np.ndarray]:
    """What `route` of PyTorch returns where JAX cannot start a backend."""
    x, weight, bias, *_ = arrays
    np.savez(folder / "given.npz", x=x.view(np.uint16), weight=weight.view(np.uint16), bias=bias)
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(folder / "found.npz") as found:
        return dict(found)


def alone(folder: Path) -> None:
    with np.load(folder / "given.npz") as given:
        x, weight = (torch_ref.to_torch(given[name].view(DTYPES["bfloat16"])) for name in ("x", "weight"))
        bias = torch_ref.to_torch(given["bias"])
    if torch.cuda.is_available():
        x, weight, bias = x.cuda(), weight.cuda(), bias.cuda()
    else:
        pretend_a_gpu(pytest.MonkeyPatch())
    routing = jrt.route(x, weight, bias, spec=PLAIN)
    np.savez(folder / "found.npz", weights=torch_ref.to_numpy(routing.weights), experts=torch_ref.to_numpy(routing[1]))
    with contextlib.suppress(RuntimeError):
        sys.exit(f"JAX could start a backend, so this shows nothing: {jax.devices()}")


def test_no_backend_of_jax_is_started(tmp_path) -> None:
    """A GPU backend would take most of the memory of a PyTorch server. Where there is a GPU, the kernels run so."""
    x, weight, bias, *_ = numbers(20, 2880, 128)
    arrays = x, weight, bias.astype(np.float32)
    found = in_a_process_without_a_backend(tmp_path, arrays)
    assert found["experts"].shape == found["weights"].shape == (20, 4)
    if torch.cuda.is_available():
        ours = jrt.route(*on_gpu(*arrays), spec=PLAIN)
        assert not differing(ours, (found["weights"], found["experts"], None))


if __name__ == "__main__":
    alone(Path(sys.argv[1]))
