"""The Pallas kernel: interpreted on the CPU under a race detector, lowered for CUDA without a GPU.

A deadlock in the interpreter hangs, so everything interpreted runs in a process of its own with a time limit. Functions
named `check_...` are what these processes run. Parity and row bits on a GPU are in test_parity.py and test_row_bits.py.
"""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_router as jr
from jax_router import parity
from jax_router.implementations import pallas, pallas_gemm
from jax_router.implementations.pallas_gemm import Config, Slices

mosaic = pytest.mark.skipif(
    jax.__version_info__[:2] < pallas.FIRST_JAX, reason=f"needs jax 0.11 or newer, this is jax {jax.__version__}"
)
TOKENS = (1, 2, 3, 7, 8, 9, 17, 63, 64, 65, 255, 1024)
EXPERTS = (1, 3, 8, 31, 33, 72, 160, 384, 896)
HIDDEN = (8, 72, 720, 2688, 2880, 7168, 16384)
# Indices of configurations that differ in more than the width of their tiles.
ONE_OF_A_KIND = {(each.split, each.warpgroups): index for index, each in enumerate(pallas_gemm.CONFIGS)}.values()


def in_interpreter(check: str, module: str = "test_pallas") -> None:
    """Run a function of a test file in a process that interprets the kernels."""
    here = pathlib.Path(__file__).parent
    environment = os.environ | {pallas.INTERPRET_VARIABLE: "1", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent)])
    command = [sys.executable, "-c", f"import {module}; {module}.{check}()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def random_problem(tokens: int, hidden: int, experts: int, dtype: Any = ml_dtypes.bfloat16) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(0)
    shapes = ((tokens, hidden), (experts, hidden), (experts,))
    return tuple(generator.standard_normal(shape).astype(dtype) for shape in shapes)


def float32_bound(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Error allowed to float32 logits: each of hidden + 2 additions may truncate, that is lose 2^-23 of the sum so far.

    No partial sum is larger than the sum of the magnitudes. Products of 16-bit numbers are exact in float32.
    """
    magnitudes = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    if bias is not None:
        magnitudes = magnitudes + np.abs(bias.astype(np.float64))
    return (x.shape[1] + 2) * 2.0**-23 * magnitudes


def interpret(x: np.ndarray, weight: np.ndarray, config: Config, slices: Slices) -> tuple[np.ndarray, bool]:
    """The kernel's sums, and whether the race detector found a race. A failing kernel may still report its race."""
    import jax.experimental.pallas.mosaic_gpu as plgpu
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    interpreter.reset_gpu_interpret_mode_state()
    detector = plgpu.InterpretGPUParams(detect_races=True)
    try:
        sums = np.asarray(
            pallas_gemm.group_sums(jnp.asarray(x), jnp.asarray(weight), config, slices, interpret=detector)
        )
    except jax.errors.JaxRuntimeError:
        sums = np.zeros(0)
    return sums, interpreter.get_races().races_found


def let_the_detector_see_wgmma() -> None:
    """The interpreter does not check what wgmma reads from shared memory: read it before, in a way that is checked."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    multiply = plgpu.wgmma

    def checked(accumulator: Any, a: Any, b: Any) -> None:
        a[...], b[...]
        plgpu.commit_smem()  # these reads, unlike wgmma's, are not ordered before a later TMA copy by themselves
        multiply(accumulator, a, b)

    plgpu.wgmma = checked


def check_no_race() -> None:
    let_the_detector_see_wgmma()
    small = (Config(8, split=16), Config(16, split=1), Config(16, split=4, warpgroups=2))
    cases = [(9, 136, 72, pallas_gemm.slices_of(136), config) for config in small]
    # Shared memory is filled several times over, by blocks with a slice, a quarter and everything.
    cases += [(9, 1152, 3, Slices(3, 6), Config(16, split, max_stages=2)) for split in (16, 1)]
    cases += [(9, 1152, 3, Slices(6, 3), Config(8, split=4, warpgroups=2, max_stages=2))]
    cases += [(9, 1152, 65, Slices(3, 6), Config(8, split=1, warpgroups=number, max_stages=5)) for number in (1, 2)]
    for tokens, hidden, experts, slices, config in cases:
        x, weight, _ = random_problem(tokens, hidden, experts)
        sums, races_found = interpret(x, weight, config, slices)
        assert not races_found, (config, slices)
        total = sums.astype(np.float64).sum(0)
        error = np.abs(total[:tokens, :experts] - x.astype(np.float64) @ weight.astype(np.float64).T)
        assert (error <= float32_bound(x, weight)).all(), (config, slices)
        assert not total[tokens:].any(), "padding tokens are not zero"
        assert not total[:, experts:].any(), "padding experts are not zero"


def check_races_are_found() -> None:
    """Break the kernel in four ways. The detector that found nothing above must find each of them.

    Not seen by it: a missing `wgmma_wait`, because the interpreter's wgmma is synchronous.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    let_the_detector_see_wgmma()
    x, weight, _ = random_problem(9, 1152, 3)
    wait, axis_index = plgpu.barrier_wait, jax.lax.axis_index

    def never_wait() -> None:
        plgpu.barrier_wait = lambda barrier: None

    def wait_for_the_first_stage_only() -> None:  # what the reverted vLLM kernel did
        waits = itertools.count()
        plgpu.barrier_wait = lambda barrier: wait(barrier) if next(waits) == 0 else None

    def copy_over_what_is_still_read() -> None:  # the copying warpgroup is traced first, and its wait is one
        waits = itertools.count()
        plgpu.barrier_wait = lambda barrier: wait(barrier) if next(waits) > 0 else None

    def write_all_groups_to_one_place() -> None:
        jax.lax.axis_index = lambda name: axis_index(name) * (name != "group")

    unrolled, looping = Config(16, split=16), Config(16, split=16, max_stages=2)
    copying = Config(8, split=1, warpgroups=2, max_stages=2)
    for breakage, config in (
        (never_wait, unrolled),
        (never_wait, looping),
        (wait_for_the_first_stage_only, unrolled),  # in a loop, the one wait that is traced runs for every tile
        (write_all_groups_to_one_place, unrolled),
        (write_all_groups_to_one_place, looping),
        (copy_over_what_is_still_read, copying),
    ):
        breakage()
        _, races_found = interpret(x, weight, config, Slices(3, 6))
        assert races_found, (breakage.__name__, config)
        plgpu.barrier_wait, jax.lax.axis_index = wait, axis_index


def check_parity() -> None:
    dtypes = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
    sizes = ((1, 1, 8), (9, 33, 72), (17, 3, 200), (8, 72, 8), (3, 65, 136), (33, 8, 72))
    for number, (tokens, experts, hidden) in enumerate(sizes):
        dtype = ("bfloat16", "float16")[number // 3]
        x, weight, bias = random_problem(tokens, hidden, experts, dtypes[dtype])
        bias = (None, bias, bias.astype(np.float32))[number % 3]
        out_dtype = (dtype, "float32")[number % 2]
        operands = [None if array is None else jnp.asarray(array) for array in (x, weight, bias)]
        logits = jr.router_gemm(*operands, out_dtype=out_dtype, implementation="pallas")
        assert logits.dtype == out_dtype
        expected = x.astype(np.float64) @ weight.astype(np.float64).T
        if bias is not None:
            expected += bias.astype(np.float64)
        rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 0.0}[out_dtype] * np.abs(expected)
        error = np.abs(np.asarray(logits, np.float64) - expected)
        bound = (1 + 2.0**-8) * float32_bound(x, weight, bias) + rounding + 2.0**-24  # the last one: float16 subnormals
        assert (error <= bound).all(), (tokens, experts, hidden, dtype, number)


def check_tree() -> None:
    """Tiles of 64 products that are exact in any order, of magnitudes that differ: only adding up tiles rounds."""
    tokens, experts = 9, 20
    generator = np.random.default_rng(0)

    def in_order(terms: Iterable[np.ndarray]) -> np.ndarray:
        return functools.reduce(np.add, terms)

    for tiles, slices, per_quarter in ((5, Slices(5, 1), 2), (18, Slices(9, 2), 3)):
        hidden = (tiles - 1) * 64 + 8
        scale = np.repeat(2.0 ** np.resize([0, 3, 7, 1, 5, 2], tiles), 64)[:hidden]
        x = (generator.integers(-255, 256, (tokens, hidden)) * scale).astype(ml_dtypes.bfloat16)
        weight = generator.integers(-255, 256, (experts, hidden)).astype(ml_dtypes.bfloat16)
        assert pallas_gemm.slices_of(hidden) == slices
        products = [
            (x[:, first : first + 64].astype(np.float64) @ weight[:, first : first + 64].astype(np.float64).T).astype(
                np.float32
            )
            for first in range(0, hidden, 64)
        ]
        sums = [in_order(products[first : first + slices.tiles]) for first in range(0, tiles, slices.tiles)]
        quarters = [in_order(sums[first : first + per_quarter]) for first in range(0, len(sums), per_quarter)]
        expected = in_order(quarters)
        for other in (in_order(sums), in_order(reversed(quarters)), quarters[0] + in_order(quarters[1:])):
            assert (expected != other).any(), "this data cannot tell the order of the slices"
        assert slices.tiles == 1 or (expected != in_order(products)).any(), "cannot tell slices from one chain"
        for config in range(len(pallas_gemm.CONFIGS)):
            run = functools.partial(pallas.router_gemm, out_dtype=jnp.float32, config=config)
            np.testing.assert_array_equal(run(jnp.asarray(x), jnp.asarray(weight), None), expected, str(config))


def check_nan_and_inf_stay_in_their_rows() -> None:
    hidden = 264
    assert pallas_gemm.slices_of(hidden).of_block(split=1) == (2, 2, 1), "no quarter adds slices"
    x, weight, bias = (jnp.asarray(array) for array in random_problem(19, hidden, 3))
    poisoned = x.at[5, 258].set(jnp.nan).at[16].set(jnp.inf)
    for config in ONE_OF_A_KIND:
        run = functools.partial(pallas.router_gemm, out_dtype=jnp.float32, config=config)
        clean, dirty = (np.asarray(run(array, weight, bias)) for array in (x, poisoned))
        others = np.delete(np.arange(19), (5, 16))
        np.testing.assert_array_equal(dirty[others], clean[others])
        assert not np.isfinite(dirty[[5, 16]]).any()


def check_no_sum_is_minus_zero() -> None:
    """The tensor core gives -0 for what underflows from below: here, slices that sum up to -1."""
    import jax.experimental.pallas as pl

    scoped, add = pl.run_scoped, jax.lax.add_p.bind

    def unfolded(x: Any, y: Any, **parameters: Any) -> Any:
        """XLA makes x of x + 0, of -0 too: let it not see the zero."""
        floats = jnp.issubdtype(jax.typeof(x).dtype, jnp.floating)
        return add(*(jax.lax.optimization_barrier((x, y)) if floats else (x, y)), **parameters)

    def underflowing(*arguments: Any) -> jax.Array:
        total = scoped(*arguments)
        return jnp.where(total == -1, jnp.float32(-0.0), total)

    pl.run_scoped, jax.lax.add_p.bind = underflowing, unfolded
    hidden = 5 * pallas_gemm.TILE_HIDDEN
    x = np.tile(np.arange(pallas_gemm.TILE_HIDDEN) == 0, (9, 5)).astype(ml_dtypes.bfloat16)
    weight = -np.ones((3, hidden), ml_dtypes.bfloat16)
    for config in ONE_OF_A_KIND:  # a block of one quarter of slices has one beyond the last, which is +0
        logits = pallas.router_gemm(jnp.asarray(x), jnp.asarray(weight), None, out_dtype=jnp.float32, config=config)
        np.testing.assert_array_equal(parity.bits(logits), 0, str(config))


@mosaic
@pytest.mark.parametrize(
    "check",
    [
        "check_no_race",
        "check_races_are_found",
        "check_parity",
        "check_tree",
        "check_nan_and_inf_stay_in_their_rows",
        "check_no_sum_is_minus_zero",
    ],
)
def test_interpreted_kernel(check: str) -> None:
    in_interpreter(check)


def lower(tokens: int, hidden: int, experts: int, *, number: int = 0, config: int | None = None) -> str:
    """Lower for CUDA, all of Mosaic's Python passes included. `number` cycles through the dtypes."""
    dtype = (jnp.bfloat16, jnp.float16)[number % 2]
    bias_dtype, out_dtype = (None, dtype, jnp.float32)[number % 3], (jnp.float32, dtype)[number // 3 % 2]
    x, weight = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((tokens, hidden), (experts, hidden)))
    bias = None if bias_dtype is None else jax.ShapeDtypeStruct((experts,), bias_dtype)
    function = jax.jit(functools.partial(pallas.router_gemm, out_dtype=out_dtype, config=config))
    return function.trace(x, weight, bias).lower(lowering_platforms=("cuda",)).as_text()


# Every size of the three lists, and every pair of awkward neighbours: the whole product is 756 shapes and two minutes.
SHAPES = list(dict.fromkeys((
    *((tokens, HIDDEN[i % len(HIDDEN)], EXPERTS[-1 - i % len(EXPERTS)]) for i, tokens in enumerate(TOKENS)),
    *((17, hidden, experts) for hidden, experts in itertools.product(HIDDEN[:4], EXPERTS[:6])),
    *((tokens, hidden, experts) for tokens in (1, 64, 65, 1024) for hidden, experts in ((2880, 128), (7168, 256))),
)))  # fmt: skip


@mosaic
@pytest.mark.parametrize("part", range(4))
def test_lowers_for_cuda(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pallas.INTERPRET_VARIABLE, raising=False)
    for number, shape in enumerate(SHAPES):
        if number % 4 == part:
            assert "mosaic_gpu" in lower(*shape, number=number // 4), shape


@mosaic
@pytest.mark.parametrize("config", range(len(pallas_gemm.CONFIGS)))
def test_every_configuration_lowers_for_cuda(config: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pallas.INTERPRET_VARIABLE, raising=False)
    for number, (tokens, hidden, experts) in enumerate(((1, 8, 1), (17, 2880, 128), (65, 16384, 384))):
        assert "mosaic_gpu" in lower(tokens, hidden, experts, number=number, config=config)


@mosaic
def test_lowers_for_cuda_where_x64_is_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pallas.INTERPRET_VARIABLE, raising=False)
    with jax.enable_x64(True):
        for config in range(len(pallas_gemm.CONFIGS)):
            assert "mosaic_gpu" in lower(17, 2880, 128, config=config)


@pytest.mark.parametrize("hidden", [*HIDDEN, 64, 1032, 4096, 65536])
def test_slices_cover_hidden_once(hidden: int) -> None:
    slices = pallas_gemm.slices_of(hidden)
    slice_size = slices.tiles * pallas_gemm.TILE_HIDDEN
    assert (slices.count - 1) * slice_size < hidden <= slices.count * slice_size
    assert slices.count <= pallas_gemm.MAX_SLICES


@mosaic
@pytest.mark.parametrize(("hidden", "experts"), [(2880, 128), (7168, 256), (16384, 896)])
def test_group_sums_are_never_larger_than_allowed(hidden: int, experts: int) -> None:
    for tokens in (*TOKENS, 16384, 10**6):
        config = pallas_gemm.pick_config(tokens, hidden, experts)
        sums = jax.eval_shape(
            functools.partial(pallas_gemm.group_sums, config=config, slices=pallas_gemm.slices_of(hidden)),
            *(jax.ShapeDtypeStruct((rows, hidden), jnp.bfloat16) for rows in (tokens, experts)),
        )
        assert sums.shape[0] == 1 or sums.size * 4 <= pallas_gemm.GROUP_SUM_BYTES, config


@pytest.mark.parametrize(
    ("tokens", "hidden", "experts", "config"),
    [
        (1, 7168, 256, Config(8, split=16)),
        (64, 2880, 128, Config(16, split=16)),
        (64, 7168, 256, Config(32, split=16)),
        (64, 4096, 512, Config(64, split=16)),
        (512, 2880, 128, Config(32, split=4)),
        (1024, 2880, 128, Config(64, split=4)),
        (1024, 7168, 256, Config(64, split=4, warpgroups=2)),
        (2048, 7168, 256, Config(128, split=4, warpgroups=2)),
        (4096, 2048, 128, Config(64, split=1)),
        (4096, 4096, 512, Config(64, split=1, warpgroups=2)),
    ],
)
def test_picks_the_same_configurations_as_before(tokens: int, hidden: int, experts: int, config: Config) -> None:
    """A snapshot of the choice, which no record of times stands behind: what changes `pick_config` changes it here."""
    assert pallas_gemm.pick_config(tokens, hidden, experts) == config
