"""The kernels' promise: a token's bits depend on nothing but the token. Compared as integers, without any tolerance.

`xla` makes no such promise and is not tested for it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_parity import in_interpreter, interpreted

import jax_router as jr
from jax_router import dispatch, parity
from jax_router.implementations import cuda, pallas, pallas_gemm

Function = Callable[[np.ndarray], np.ndarray]  # x [T, H] -> logits [T, E]
FEW = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)
MIXED = ("bfloat16", "float32")
MANY = (63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000)

# (hidden, experts, dtype, bias, out_dtype): the models' shapes, and sizes that fill no tile. Of two dtypes one is of x.
SHAPES = (
    (2880, 128, "bfloat16", "bfloat16", "float32"),
    (7168, 256, "bfloat16", None, "float32"),
    (2688, 384, "float16", "float32", "float16"),
    (2824, 136, "bfloat16", "float32", "float32"),
    (720, 33, "bfloat16", "float32", "bfloat16"),
    (16384, 31, "float16", None, "float32"),
    (72, 3, "bfloat16", None, "float32"),
    (8, 1, "float16", "float16", "float32"),
    (3072, 256, MIXED, None, "float32"),
    (1000, 40, "float32", "float32", "float32"),
    (72, 3, MIXED, "bfloat16", "bfloat16"),
)


def problem_of(tokens: int, shape: tuple) -> dispatch.Problem:
    hidden, experts, dtype, bias, out_dtype = shape
    return dispatch.Problem(tokens, hidden, experts, *dtypes_of(dtype), bias, out_dtype)


def dtypes_of(dtype: str | tuple[str, str]) -> tuple[str, str]:
    """Of x and weight."""
    return (dtype, dtype) if isinstance(dtype, str) else dtype


def arrays(
    tokens: int, hidden: int, experts: int, dtype: str | tuple[str, str], bias: str | None
) -> tuple[np.ndarray, ...]:
    """x with rows of very different size, weight, and bias or None."""
    generator = np.random.default_rng([tokens, hidden, experts])
    scale = np.exp2(generator.integers(-6, 7, (tokens, 1)))
    of_x, of_weight = map(dtype_of, dtypes_of(dtype))
    x = (generator.standard_normal((tokens, hidden)) * scale).astype(of_x)
    weight = (generator.standard_normal((experts, hidden)) / np.sqrt(hidden)).astype(of_weight)
    return x, weight, None if bias is None else generator.standard_normal(experts).astype(dtype_of(bias))


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)


def violations(function: Function, x: np.ndarray, sizes: Sequence[int], *, alone: int | None = None) -> Iterator[str]:
    """Every way in which the bits of a row of `function(x)` turn out to depend on something else than the row.

    Args:
      function: logits [T, E] of x [T, H] for any T.
      x: finite rows.
      sizes: batches to cut x into, or to repeat its rows in; each is the shape of one compilation.
      alone: how many rows to compute one by one; None for all.
    """
    tokens = len(x)
    expected = function(x)
    generator = np.random.default_rng(tokens)

    def differences(what: str, actual: np.ndarray, rows: np.ndarray) -> Iterator[str]:
        differing = parity.differing_rows(actual, expected[rows])
        if len(differing):
            yield f"{what}: {len(differing)} of {len(rows)} rows differ, the first is {rows[differing[0]]}"

    every = np.arange(tokens)
    yield from differences("run again", function(x), every)
    order = generator.permutation(tokens)
    yield from differences("shuffled", function(x[order]), order)
    for row in every[:alone]:
        yield from differences("alone", function(x[row : row + 1]), every[row : row + 1])
    for size in sizes:
        for start in sorted({0, (tokens - size) // 2, tokens - size} if size < tokens else ()):
            rows = every[start : start + size]
            yield from differences(f"in a batch of {size} from row {start}", function(x[rows]), rows)
        rows = generator.integers(tokens, size=size)  # a row may be its own neighbour
        yield from differences(f"in a batch of {size} rows at random", function(x[rows]), rows)
    for name, garbage in (("NaN", np.nan), ("inf", np.inf), ("the largest number", ml_dtypes.finfo(x.dtype).max)):
        for kept in (every[::2], every[1::2]):
            among = np.full_like(x, garbage)
            among[kept] = x[kept]
            yield from differences(f"next to {name}", function(among)[kept], kept)


def jitted(implementation: str, weight: np.ndarray, bias: np.ndarray | None, out_dtype: str) -> Function:
    compute = jax.jit(functools.partial(jr.router_gemm, out_dtype=out_dtype, implementation=implementation))
    weight = jnp.asarray(weight)
    return lambda x: np.asarray(compute(x, weight, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_bits_of_cuda_do_not_depend_on_the_batch(shape: tuple) -> None:
    x, weight, bias = arrays(1031, *shape[:4])
    function = jitted("cuda", weight, bias, shape[4])
    assert list(violations(function, x, FEW + MANY + (4096,), alone=300)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_row_bits_of_pallas_do_not_depend_on_the_batch(shape: tuple) -> None:
    out_dtype = shape[4]
    assert dispatch.why_unsupported(problem_of(257, shape), dispatch.Device.default(), "pallas") is None
    x, weight, bias = arrays(257, *shape[:4])
    function = jitted("pallas", weight, bias, out_dtype)
    assert list(violations(function, x, (1, 7, 8, 9, 17, 64, 65, 128, 1025), alone=40)) == []
    for config in range(len(pallas_gemm.CONFIGS)):
        compute = jax.jit(functools.partial(pallas.router_gemm, out_dtype=dtype_of(out_dtype), config=config))
        assert not len(parity.differing_rows(compute(x, weight, bias), function(x))), pallas_gemm.CONFIGS[config]


@pytest.mark.gpu
def test_every_configuration_gives_the_bits_of_the_naive_kernel() -> None:
    assert cuda.unavailable() is None
    library = cuda.shared_library()
    names = [
        library.jr_router_gemm_config_name(config).decode() for config in range(library.jr_router_gemm_num_configs())
    ]
    compared, differing = set(), []
    for shape in SHAPES:
        for tokens in (1, 7, 8, 9, 16, 17, 64, 65, 200, 1025):
            problem = problem_of(tokens, shape)
            operands = tuple(map(jax.device_put, arrays(tokens, *shape[:4])))
            expected = launch("jr_router_gemm_naive", problem, operands)
            for config, name in enumerate(names):
                if library.jr_router_gemm_config_fits(config, ctypes.byref(launch_args(problem, operands, config))):
                    rows = parity.differing_rows(launch("jr_router_gemm", problem, operands, config), expected)
                    differing += [f"{name}, {problem}: rows {rows}"] * bool(len(rows))
                    compared.add(name)
    assert not differing, "\n".join(differing)
    assert compared == set(names)


def what_underflows(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Six values of x and a weight [128, 2880] of one value, whose products are zeros and subnormals of both signs."""
    tiny = float(ml_dtypes.finfo(dtype_of(dtype)).smallest_subnormal)
    values = np.array([0.0, -0.0, tiny, -tiny, 1e-30, -1e-30], dtype_of(dtype))
    return values, np.full((128, 2880), -1e-30 if dtype == "bfloat16" else -tiny, dtype_of(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_underflows_has_one_sign_in_every_batch_of_pallas(dtype: str) -> None:
    assert pallas.unavailable() is None
    values, weight = what_underflows(dtype)
    compute = jax.jit(functools.partial(jr.router_gemm, implementation="pallas"))
    groups, expected = set(), None
    for repeats in (1, 8, 50, 100, 300, 1000):
        config = pallas_gemm.pick_config(6 * repeats, 2880, 128)
        groups.add(config.split)
        logits = np.asarray(compute(np.repeat(values, repeats)[:, None].repeat(2880, axis=1), weight))
        bits = logits.view(np.uint32).reshape(6, repeats, 128)
        expected = bits[:, :1] if expected is None else expected
        assert (bits == expected).all(), config
    assert len(groups) == 3, "one block per tile, four and sixteen"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_underflows_has_the_sign_that_the_naive_kernel_gives(dtype: str) -> None:
    # A kernel whose sums start from -0 breaks it; what the tensor core makes of an underflow only a GPU shows.
    assert cuda.unavailable() is None
    values, weight = what_underflows(dtype)
    x, weight = jax.device_put((np.repeat(values, 50)[:, None].repeat(2880, axis=1), weight))
    problem = dispatch.Problem(len(x), 2880, 128, dtype)
    expected = launch("jr_router_gemm_naive", problem, (x, weight, None))
    for config in range(cuda.shared_library().jr_router_gemm_num_configs()):
        arguments = launch_args(problem, (x, weight, None), config)
        if cuda.shared_library().jr_router_gemm_config_fits(config, ctypes.byref(arguments)):
            got = launch("jr_router_gemm", problem, (x, weight, None), config)
            assert not len(parity.differing_rows(got, expected)), config


STORED_SHAPES = (
    *(shape for shape in SHAPES if shape[1] % 8 == 0),
    (1000, 48, "bfloat16", None, "float32"),
    (16384, 8, "float16", "float32", "float32"),
    (8, 16, "bfloat16", "bfloat16", "bfloat16"),
)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", STORED_SHAPES, ids=str)
def test_a_weight_stored_hidden_by_experts_has_the_same_bits(shape: tuple) -> None:
    assert cuda.unavailable() is None
    library, differing = cuda.shared_library(), []
    for tokens in (1, 7, 8, 9, 16, 17, 64, 65, 200, 1025):
        problem = problem_of(tokens, shape)
        x, weight, bias = map(jax.device_put, arrays(tokens, *shape[:4]))
        expected = launch("jr_router_gemm_naive", problem, (x, weight, bias))
        stored, operands = dataclasses.replace(problem, weight_layout="hidden_experts"), (x, weight.T.copy(), bias)
        for config in (None, *range(library.jr_router_gemm_num_configs())):
            args = ctypes.byref(launch_args(stored, operands, config))
            if config is None or library.jr_router_gemm_config_fits(config, args):
                rows = parity.differing_rows(launch("jr_router_gemm", stored, operands, config), expected)
                differing += [f"{config}, {tokens} tokens: rows {rows}"] * bool(len(rows))
        compute = functools.partial(jr.router_gemm, implementation="cuda", weight_layout="hidden_experts")
        logits = jax.jit(functools.partial(compute, out_dtype=problem.out_dtype))(*operands)
        assert not len(parity.differing_rows(np.asarray(logits), expected)), tokens
    assert not differing, "\n".join(differing)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_configurations_have_the_same_bits_through_the_custom_call(shape: tuple) -> None:
    assert cuda.unavailable() is None
    problem = problem_of(65, shape)
    operands = tuple(map(jax.device_put, arrays(65, *shape[:4])))
    expected = launch("jr_router_gemm_naive", problem, operands)
    for config in (None, *range(cuda.shared_library().jr_router_gemm_num_configs())):
        args = launch_args(problem, operands, config)
        if config is None or cuda.shared_library().jr_router_gemm_config_fits(config, ctypes.byref(args)):
            out_dtype = dtype_of(problem.out_dtype)
            compute = jax.jit(functools.partial(cuda.router_gemm, out_dtype=out_dtype, config=config))
            assert parity.differing_rows(np.asarray(compute(*operands)), expected).size == 0, config


def launch_args(
    problem: dispatch.Problem, operands: tuple, config: int | None, out: int = 0, workspace: int | None = None
) -> cuda.RouterGemmArgs:
    """The arguments of a launch on JAX's own buffers, without JAX."""
    x, weight, bias = (None if array is None else array.unsafe_buffer_pointer() for array in operands)
    return cuda.RouterGemmArgs.of(
        problem,
        x=x,
        weight=weight,
        bias=bias,
        out=out,
        workspace=workspace,
        workspace_bytes=cuda.workspace_bytes(problem.tokens, problem.experts),
        config=-1 if config is None else config,
    )


def launch(function: str, problem: dispatch.Problem, operands: tuple, config: int | None = None) -> np.ndarray:
    """Logits from the C interface, which must write every one of them."""
    out = jax.device_put(np.full((problem.tokens, problem.experts), np.nan, dtype_of(problem.out_dtype)))
    scratch = cuda.workspace_bytes(problem.tokens, problem.experts)
    workspace = jax.device_put(np.full(scratch, 0xFF, np.uint8)) if scratch else None
    jax.block_until_ready((operands, out, workspace))
    pointers = (out.unsafe_buffer_pointer(), None if workspace is None else workspace.unsafe_buffer_pointer())
    cuda.call(function, ctypes.byref(launch_args(problem, operands, config, *pointers)), None)
    assert ctypes.CDLL("libcuda.so.1").cuCtxSynchronize() == 0  # the launch was on CUDA's default stream, not on JAX's
    logits = np.asarray(out)
    assert np.isfinite(logits.astype(np.float32)).all()
    return logits


def check_interpreted_pallas() -> None:
    """Run by the test below in a process with a time limit.

    The interpreter multiplies tiles with numpy, whose rounding depends on the width of the tile. So every tile of 64
    products is a sum of small integers, exact in any order, and tiles differ by powers of two: what rounds is the
    kernel's own tree.
    """
    hidden, generator = 1160, np.random.default_rng(0)  # 19 tiles: two for each slice but the last
    scale = np.exp2(generator.integers(-20, 1, -(-hidden // 64))).repeat(64)[:hidden]
    x = (generator.integers(-8, 9, (11, hidden)) * scale).astype(ml_dtypes.bfloat16)
    weight = generator.integers(-8, 9, (3, hidden)).astype(ml_dtypes.bfloat16)
    bias = generator.standard_normal(3, np.float32)
    function = jitted("pallas", weight, bias, "float32")
    found = list(violations(function, x, (2, 9), alone=2))
    assert not found, found
    for config in range(len(pallas_gemm.CONFIGS)):
        logits = jax.jit(functools.partial(pallas.router_gemm, out_dtype=jnp.float32, config=config))(x, weight, bias)
        assert not len(parity.differing_rows(logits, function(x))), pallas_gemm.CONFIGS[config]


@interpreted
def test_row_bits_of_interpreted_pallas_do_not_depend_on_the_batch() -> None:
    in_interpreter("test_row_bits.check_interpreted_pallas()")


# A right function next to every way of breaking the promise.
def row_by_row(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.stack([(row.astype(np.float32) * weight).sum(1, dtype=np.float32) for row in x])


def splits_k_by_batch_size(x, weight):
    half = x.shape[1] // 2 if len(x) > 16 else x.shape[1]
    return row_by_row(x[:, :half], weight[:, :half]) + row_by_row(x[:, half:], weight[:, half:])


def adds_backwards_in_odd_rows(x, weight):
    logits = row_by_row(x, weight)
    logits[1::2] = row_by_row(x[1::2, ::-1], weight[:, ::-1]) if len(x) > 1 else logits[1::2]
    return logits


def scales_by_the_largest_row(x, weight):
    scale = np.abs(np.nan_to_num(x.astype(np.float32))).max()
    return row_by_row(x.astype(np.float32) / scale, weight) * scale


def multiplies_the_neighbour_by_zero(x, weight):
    return row_by_row(x, weight) + 0 * row_by_row(np.roll(x, 1, 0), weight)


def changes_from_run_to_run(x, weight):
    order = changing_order.permutation(x.shape[1])
    return row_by_row(x[:, order], weight[:, order])


def misses_the_last_row_of_a_tile(x, weight):
    logits = row_by_row(x, weight)
    logits[15::16] = 0
    return logits


changing_order = np.random.default_rng(0)
FAULTS = (
    splits_k_by_batch_size,
    adds_backwards_in_odd_rows,
    scales_by_the_largest_row,
    multiplies_the_neighbour_by_zero,
    changes_from_run_to_run,
    misses_the_last_row_of_a_tile,
)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the garbage rows
def test_a_row_by_row_function_keeps_the_promise() -> None:
    x, weight, _ = arrays(40, 136, 9, "bfloat16", None)
    function = functools.partial(row_by_row, weight=weight.astype(np.float32))
    assert list(violations(function, x, (1, 8, 17, 33, 50))) == []


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_sees(fault: Callable) -> None:
    x, weight, _ = arrays(40, 136, 9, "bfloat16", None)
    function = functools.partial(fault, weight=weight.astype(np.float32))
    assert list(violations(function, x, (1, 8, 17, 33)))
