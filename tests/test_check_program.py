"""csrc/check.cu, the check that needs no Python: it compiles everywhere, and on a GPU it finds nothing wrong.

Its routing on the CPU, by which it judges the kernels, is itself judged here, by the specification.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_cases

from jax_router import build, routing, toolchain
from jax_router.implementations import cuda
from jax_router.verification import edits, sanitizers

Array = np.ndarray
RIGHT, OPEN, WRONG = range(3)
TOKENS = 200
TIED = np.isin(np.arange(TOKENS) % 20, (0, 1, 5, 10, 15))  # tokens of `a_batch` with many equal logits

CASES = routing_cases.CASES | {
    "logits of a float32 x": dataclasses.replace(routing_cases.CASES["rounded logits"], dtype="float32")
}

# What tests/test_check_program.py calls of csrc/check_route_reference.cu.
JUDGE = """
#include "check_route_reference.h"
using namespace jax_router_check;
extern "C" void judge(const jr_routing_spec* spec, int experts, int dtype, const float* correction, const float* scale,
                      int tokens, const float* logits, const int32_t* replay, const float* weights,
                      const int32_t* selected, int* verdicts) {
  RoutingRule rule = {*spec, experts, dtype, {}, {}};
  if (correction != nullptr) rule.correction.assign(correction, correction + experts);
  if (scale != nullptr) rule.scale.assign(scale, scale + experts);
  for (int token = 0; token < tokens; ++token) {
    const int first = token * spec->top_k;
    RoutingFault fault;
    verdicts[token] = int(judge_routing(rule, logits + token * experts, replay == nullptr ? nullptr : replay + first,
                                        weights + first, selected + first, fault));
  }
}
"""


def nvcc(folder: Path, *arguments: str) -> str:
    """Run nvcc as the head of check.cu says, with the host compiler's warnings; returns what it said."""
    try:
        compiler = toolchain.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"the kernels cannot be compiled here: {error}")
    flags = ("-O3", "-std=c++20", build.GENERATE, "-Xcompiler=-Wall,-Wextra", "--threads=0", *compiler.link_flags)
    return toolchain.run([str(compiler.nvcc), "-ccbin", str(compiler.host), *flags, *arguments], str(folder))


def test_the_standalone_program_compiles_without_a_warning(tmp_path: Path) -> None:
    sources = [name for name in build.STANDALONE_PROGRAM if name.endswith(".cu")]
    log = nvcc(tmp_path, "-c", *(str(build.csrc_directory() / name) for name in sources))
    assert toolchain.compiler_warnings(log) == []
    assert {path.stem for path in tmp_path.glob("*.o")} == {Path(name).stem for name in sources}


def test_the_kernels_that_racecheck_gets_compile_without_a_warning(tmp_path: Path) -> None:
    edits.copy_edited(build.csrc_directory(), tmp_path / "copy", sanitizers.WAITS_EARLY)
    files = {edit.file for edit in sanitizers.WAITS_EARLY}
    for path in (tmp_path / "copy").glob("*.[ch]*"):
        of_csrc = set(re.findall(r'^#include "((?!xla/)[^"]+)"', path.read_text(), re.MULTILINE))
        assert of_csrc <= {copied.name for copied in path.parent.iterdir()}, "a copy holds all it is compiled from"
    log = nvcc(tmp_path, "-c", *(str(tmp_path / "copy" / file) for file in files))
    assert toolchain.compiler_warnings(log) == []


def test_nothing_of_the_standalone_program_is_in_the_library() -> None:
    of_library = {path.name for path in build.source_files()}
    in_csrc = {path.name for path in build.csrc_directory().iterdir()}
    assert {name for name in in_csrc if name.startswith("check")} == set(build.STANDALONE_PROGRAM)
    assert of_library.isdisjoint(build.STANDALONE_PROGRAM)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The routing on the CPU of the check program, as a library."""
    folder = tmp_path_factory.mktemp("judge")
    (folder / "judge.cu").write_text(JUDGE)
    csrc = build.csrc_directory()
    sources = (str(folder / "judge.cu"), str(csrc / "check_route_reference.cu"))
    nvcc(folder, "-I", str(csrc), "-Xcompiler=-fPIC", "-shared", *sources, "-o", "judge.so")
    return ctypes.CDLL(str(folder / "judge.so"))


def verdicts(
    judge: ctypes.CDLL, case: routing_cases.Case, logits: Array, replay: Array | None, weights: Array, experts: Array
) -> Array:
    """What the check program says of each token."""
    spec = b"".join(numbers.tobytes() for numbers in cuda.spec_numbers(case.spec))
    arrays = [
        None if array is None else np.ascontiguousarray(array)
        for array in (*case.vectors(), logits, replay, weights, experts)
    ]
    pointers = [None if array is None else array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
    said = np.full(len(logits), -1, np.int32)
    judge.judge(
        spec, case.experts, cuda.DTYPES[case.dtype], *pointers[:2], len(logits), *pointers[2:],
        said.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    return said


def a_batch(case: routing_cases.Case) -> Array:
    """Logits with ties: all equal, twins that are neighbours and twins that are far; with NaN and infinities."""
    generator = np.random.default_rng(3)
    logits = generator.standard_normal((TOKENS, case.experts)).astype(np.float32)
    logits[TIED] = np.round(logits[TIED])
    logits[1::20] = 0.25
    if case.experts > 2:
        logits[2::20, 2] = logits[2::20, 1]
        logits[3::20, -1] = logits[3::20, 0]
        logits[4::20, 1] = np.nan
        logits[6::20, -1], logits[6::20, 0] = np.inf, -np.inf
    return logits


def by_specification(case: routing_cases.Case, logits: Array, replay: Array | None = None) -> tuple[Array, Array]:
    """Weights and experts, by routing.route_logits."""
    operands = [None if array is None else jnp.asarray(array) for array in (*case.vectors(), replay)]
    specification = jax.jit(routing.route_logits, static_argnames=("spec", "dtype"))
    weights, experts = specification(jnp.asarray(logits), *operands, spec=case.spec, dtype=case.dtype)
    return np.asarray(weights), np.asarray(experts)


@pytest.mark.parametrize("name", CASES)
def test_the_check_program_agrees_with_the_specification(judge: ctypes.CDLL, name: str) -> None:
    case = CASES[name]
    logits = a_batch(case)
    weights, experts = by_specification(case, logits)
    said = verdicts(judge, case, logits, None, weights, experts)
    assert (said != WRONG).all(), np.flatnonzero(said == WRONG)
    assert (said == OPEN)[~TIED].mean() < 0.1
    if routing_cases.exact_choice(case.vectors()[0], case.spec):
        assert (said == RIGHT).all()

    recorded = np.random.default_rng(4).integers(0, case.experts, experts.shape).astype(np.int32)
    recorded[7, 0], recorded[8, -1] = -1, case.experts
    weights, experts = by_specification(case, logits, recorded)
    assert (verdicts(judge, case, logits, recorded, weights, experts) == RIGHT).all()


@pytest.mark.parametrize("name", CASES)
def test_the_check_program_sees_what_is_wrong(judge: ctypes.CDLL, name: str) -> None:
    case = CASES[name]
    logits = a_batch(case)
    weights, experts = by_specification(case, logits)
    right = verdicts(judge, case, logits, None, weights, experts) == RIGHT
    assert right[~TIED].mean() > 0.9

    def caught(wrong_weights: Array, wrong_experts: Array, replay: Array | None = None) -> None:
        said = verdicts(judge, case, logits, replay, wrong_weights, wrong_experts)
        assert (said[right] == WRONG).all(), np.flatnonzero(right & (said != WRONG))

    k = case.spec.top_k
    changed = weights.copy()
    changed[:, -1] = np.where(np.isfinite(weights[:, -1]), weights[:, -1] * np.float32(1.001) + np.float32(1e-30), 1)
    caught(changed, experts)
    caught(weights, np.where(np.arange(k) == k - 1, case.experts, experts).astype(np.int32))
    caught(weights, np.where(np.arange(k) == 0, -1, experts).astype(np.int32))
    caught(weights, experts, np.where(np.arange(k) == 0, -1, experts).astype(np.int32))
    if k > 1:
        swapped = np.concatenate([np.arange(k - 2), [k - 1, k - 2]]).astype(np.int32)
        caught(weights[:, swapped], experts[:, swapped])
        twice = experts.copy()
        twice[:, -1] = experts[:, 0]
        caught(weights, twice)
    if k < case.experts:  # the best of those that were not selected, in the last place
        longer = dataclasses.replace(case, spec=dataclasses.replace(case.spec, top_k=k + 1))
        replaced = np.concatenate([experts[:, :-1], by_specification(longer, logits)[1][:, -1:]], -1)
        caught(by_specification(case, logits, replaced)[0], replaced)


@pytest.mark.gpu
def test_the_standalone_program_finds_nothing_wrong(tmp_path: Path) -> None:
    """Every configuration against the naive kernel and a CPU reference; then between programmatic neighbours.

    What compute-sanitizer gets, --small and racecheck's own sources with --tiny, finds nothing wrong without it.
    """
    copy = tmp_path / "copy"
    edits.copy_edited(build.csrc_directory(), copy, sanitizers.WAITS_EARLY)
    for csrc, runs in (
        (build.csrc_directory(), (["--check"], ["--small"], ["--overlap", "100"])),
        (copy, (["--tiny"],)),
    ):
        nvcc(tmp_path, *map(str, sorted(csrc.glob("*.cu"))), "-o", "router_gemm_check")
        for arguments in runs:
            done = subprocess.run(
                [tmp_path / "router_gemm_check", *arguments], capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
