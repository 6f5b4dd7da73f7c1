"""The library of the real kernels, compiled here: its build, its C interface, what the launcher says without a GPU."""

import ctypes
import itertools
import re
import resource
import subprocess

import pytest
import test_cuda_graph

from jax_router import build, dispatch, sweep_points, toolchain
from jax_router.implementations import cuda


@pytest.fixture(scope="session")
def compiler():
    try:
        return toolchain.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"the kernels cannot be compiled here: {error}")


@pytest.fixture(scope="session")
def timed_build(compiler, tmp_path_factory):
    """The library from the real compilers, compiled in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ROUTER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("JAX_ROUTER_LIBRARY", raising=False)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        path = build.build()
        return path, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


@pytest.fixture(scope="session")
def real_build(timed_build):
    return timed_build[0]


def test_real_build_is_quick_small_and_clean(timed_build):
    real_build, seconds = timed_build
    log = build.compiler_log(real_build)
    # The bar is a minute on two cores: processor time, because other tests run beside it.
    assert 0 < seconds < 120
    assert real_build.stat().st_size < 5_000_000  # the bar
    assert toolchain.compiler_warnings(log) == []
    kernels = toolchain.kernel_resources(log)
    assert kernels
    assert [kernel for kernel in kernels if kernel.spill_bytes] == []


def exports(path) -> set[str]:
    listing = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listing.splitlines()}


def declarations(*headers: str) -> set[str]:
    text = "".join((build.csrc_directory() / name).read_text() for name in headers)
    return set(re.findall(r"JR_EXPORT[\w\s*]+?\b(jr_\w+)\(", text))


def test_library_exports_the_c_interface_and_nothing_else(real_build):
    calls = {"jr_ffi_router_gemm", "jr_ffi_route", "jr_ffi_api_version"}
    assert exports(real_build) == declarations("router_gemm.h", "route.h") | calls


@pytest.fixture(scope="session")
def verification_build(compiler, tmp_path_factory):
    """What runs beside the kernels while they are verified."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ROUTER_CACHE", str(tmp_path_factory.mktemp("verification")))
        return build.build(library=build.VERIFICATION)


def test_the_library_of_the_verification_is_clean(verification_build):
    log = build.compiler_log(verification_build)
    assert toolchain.compiler_warnings(log) == []
    kernels = toolchain.kernel_resources(log)
    assert len(kernels) == 6
    assert [kernel for kernel in kernels if kernel.spill_bytes] == []


def test_the_library_of_the_verification_exports_its_interface_and_nothing_else(verification_build):
    declared = declarations("verification/verification.h")
    calls = {f"jr_ffi_verification_{name}" for name in ("produce", "consume", "find_differing")}
    assert exports(verification_build) == declared | calls
    assert {"jr_load_start", "jr_neighbour_produce"} < declared


@pytest.fixture
def library(real_build, monkeypatch):
    monkeypatch.setenv("JAX_ROUTER_LIBRARY", str(real_build))
    monkeypatch.setattr(cuda, "_library", None)
    return cuda.shared_library()


def config_names(library) -> list[str]:
    return [
        library.jr_router_gemm_config_name(config).decode() for config in range(library.jr_router_gemm_num_configs())
    ]


def pick(library, tokens: int, hidden: int, experts: int, *dtypes: str) -> str:
    """The configuration that a call through JAX gets, with the workspace that it lends."""
    lent = cuda.workspace_bytes(tokens, experts)
    problem = dispatch.Problem(tokens, hidden, experts, *dtypes)
    args = cuda.RouterGemmArgs.of(
        problem, x=16, weight=16, bias=None, out=16, workspace=16 if lent else None, workspace_bytes=lent
    )
    return config_names(library)[library.jr_router_gemm_pick_config(ctypes.byref(args))]


def test_c_interface_answers_without_a_gpu(library):
    assert library.jr_ffi_api_version() == build.ffi_version()
    names = config_names(library)
    assert names
    assert len(set(names)) == len(names)


LIMITS = {
    "tokens": (0, 1, 64, 2**20, 2**27, 2**27 + 1),
    "hidden": (8, 12, 960, 968, 2880, 65536, 65544),
    "experts": (1, 120, 121, 65536, 65537),
    "dtype": ("bfloat16", "float32"),
    "weight_layout": ("experts_hidden", "hidden_experts"),
}


def test_the_launcher_and_the_predicate_take_the_same_problems(library):
    hopper = dispatch.Device("gpu", "NVIDIA H200", "9.0")
    answers = set()
    for tokens, hidden, experts, dtype, layout in itertools.product(*LIMITS.values()):
        problem = dispatch.Problem(tokens, hidden, experts, dtype, weight_layout=layout)
        args = cuda.RouterGemmArgs.of(problem, x=16, weight=16, bias=None, out=16)
        takes = library.jr_router_gemm_pick_config(ctypes.byref(args)) >= 0
        assert takes == (cuda.why_unsupported(problem, hopper) is None), problem
        answers.add(takes)
    assert answers == {True, False}


def test_every_configuration_is_the_pick_of_some_published_router(library):
    between = tuple(3 * tokens // 2 for tokens in sweep_points.ALL_TOKENS)
    points = itertools.product(sweep_points.shapes(), sweep_points.ALL_TOKENS + between)
    dtypes = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
    picked = {
        pick(library, tokens, shape.hidden, shape.experts, *each)
        for (shape, tokens), each in itertools.product(points, dtypes)
    }
    assert picked == set(config_names(library))


def test_the_graph_tests_cover_calls_of_one_and_of_two_launches(library):
    one, two = (
        pick(library, *sizes)
        for sizes in (
            (test_cuda_graph.TOKENS, test_cuda_graph.HIDDEN, test_cuda_graph.EXPERTS),
            test_cuda_graph.TWO_LAUNCHES.values(),
        )
    )
    assert re.search(r"_s\d$", one) is None
    assert re.search(r"_s\d$", two), "split K is what takes a second launch"


@pytest.mark.parametrize("experts", [1, 8, 33, 97, 128, 160, 384, 896])
def test_the_workspace_holds_the_partial_sums_of_a_split_and_no_more(library, experts):
    splits = [number for number, name in enumerate(config_names(library)) if re.search(r"_s\d$", name)]
    assert splits

    def fits(tokens: int, lent: int) -> set[bool]:
        args = cuda.RouterGemmArgs.of(
            dispatch.Problem(tokens, 2880, experts), x=16, weight=16, bias=None, out=16, workspace=16,
            workspace_bytes=lent,
        )  # fmt: skip
        return {bool(library.jr_router_gemm_config_fits(split, ctypes.byref(args))) for split in splits}

    for tokens in (65, 128, 1000, 4096, 2**20):
        lent = cuda.workspace_bytes(tokens, experts)
        if lent:
            assert lent <= cuda.MAX_WORKSPACE_BYTES
            assert (fits(tokens, lent), fits(tokens, lent - 1)) == ({True}, {False})
        else:
            assert fits(tokens, cuda.MAX_WORKSPACE_BYTES) == {False}, "it was not lent although it would be enough"
    assert cuda.workspace_bytes(2**27, experts) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workspace_bytes": 4096}, "workspace is (nil) with 4096 bytes; expected device memory, or NULL and 0"),
        ({"workspace": 4096}, "workspace is 0x1000 with 0 bytes"),
        ({"workspace": 4096, "workspace_bytes": -1}, "workspace is 0x1000 with -1 bytes"),
        ({"workspace": 4104, "workspace_bytes": 64}, "workspace at 0x1008; expected 16-byte alignment"),
        ({"x": 24}, "x is at 0x18"),
        ({"out": 0}, "out (nil); expected device memory"),
    ],
)
def test_pointers_that_cannot_be_right_are_refused_before_cuda_is_called(library, change, words):
    pointers = {"x": 16, "weight": 16, "bias": None, "out": 16} | change
    args = cuda.RouterGemmArgs.of(dispatch.Problem(512, 2880, 128), **pointers)
    with pytest.raises(NotImplementedError) as refused:
        cuda.call("jr_router_gemm", ctypes.byref(args), None)
    assert words in str(refused.value)
