"""`jax.export` of `route` and `router_gemm`: what is serialised, and what it computes in the process that loads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_cases as cases

import jax_router as jr
import jax_router.export
from jax_router import dispatch
from jax_router.implementations import cuda, pallas

BF16, HIDDEN, EXPERTS = jnp.bfloat16, 64, 16
SPEC = jr.RoutingSpec(2, "sigmoid", renormalize=True, num_groups=4, group_topk=2)
VECTORS = {
    "correction_bias": np.linspace(-0.5, 0.5, EXPERTS, dtype=np.float32),
    "expert_scale": np.linspace(0.25, 3, EXPERTS, dtype=np.float32),
}
KERNELS = ("cuda", "pallas") if jax.__version_info__ >= pallas.FIRST_JAX else ("cuda",)  # those that this jax lowers
ON_A_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "pallas")]
BOTH = ("cpu", "cuda")

# Calls every artifact of a folder on every set of operands there, and differentiates those that can be.
LOAD = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import jax_router as jr, jax_router.export

folder, kernels = Path(sys.argv[1]), sys.argv[2:]
for name in kernels:
    jax_router.export.register(name)
for artifact in sorted(folder.glob("*.artifact")):
    exported = jax.export.deserialize(bytearray(artifact.read_bytes()))
    for path in sorted(folder.glob(artifact.stem + "-operands-*.npz")):
        operands = list(np.load(path).values())
        results = exported.call(*operands)
        assert isinstance(results, jr.Routing | jax.Array), type(results)
        results = jax.tree.leaves(results)
        if exported.has_vjp():
            weigh = lambda *operands: (exported.call(*operands).weights * np.float32(range(1, 3))).sum()
            results += jax.grad(weigh, range(len(operands)))(*operands)
        np.savez(path.with_name(path.name.replace("operands", "results")), *results)
"""


def problem(tokens: int) -> tuple[np.ndarray, ...]:
    """x, weight and bias in float32; x and weight are numbers of bfloat16."""
    generator = np.random.default_rng(tokens)
    x, weight = (generator.standard_normal((rows, HIDDEN)).astype(BF16) for rows in (tokens, EXPERTS))
    return x.astype(np.float32), weight.astype(np.float32) / 4, generator.standard_normal(EXPERTS).astype(np.float32)


def router(implementation: str | None = None):
    """A function of x, weight and bias. Not traced before: it sees the environment of now."""

    def function(x, weight, bias):
        options = {"return_logits": True, "implementation": implementation}
        return jr.route(x.astype(BF16), weight.astype(BF16), bias, spec=SPEC, **VECTORS, **options)

    return jax.jit(function)


def logits_of(implementation: str | None = None):
    def function(x, weight, bias):
        return jr.router_gemm(x.astype(BF16), weight.astype(BF16), bias, implementation=implementation)

    return jax.jit(function)


def export(function, tokens, platforms, checks=jax_router.export.DISABLED_CHECKS) -> jax.export.Exported:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((tokens, HIDDEN), (EXPERTS, HIDDEN), (EXPERTS,))]
    return jax.export.export(function, platforms=platforms, disabled_checks=checks)(*shapes)


def symbolic():
    return jax.export.symbolic_shape("tokens")[0]


def write(folder: Path, name: str, exported: jax.export.Exported, *problems, vjp_order: int = 0) -> None:
    (folder / f"{name}.artifact").write_bytes(exported.serialize(vjp_order))
    for index, operands in enumerate(problems):
        np.savez(folder / f"{name}-operands-{index}.npz", *operands)


def load(folder: Path, *kernels: str, on_the_cpu: bool = False) -> subprocess.CompletedProcess[str]:
    """Call what is in a folder in a new process that registers these kernels, on the CPU or where JAX is by default."""
    cpu_in_haste = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = os.environ | (cpu_in_haste if on_the_cpu else {})
    command = [sys.executable, "-W", "error", "-c", LOAD, str(folder), *kernels]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def results(folder: Path, name: str, index: int = 0) -> list[np.ndarray]:
    return list(np.load(folder / f"{name}-results-{index}.npz").values())


def assert_bits(actual, expected) -> None:
    for result, truth in zip(actual, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(result, truth)


def assert_routed(routing: jr.Routing, x, weight, bias) -> None:
    """Logits and weights within their roundings of float64, the experts those of the logits."""
    logits = np.asarray(routing.logits)
    bounds.within(logits, bounds.gemm(x, weight, bias))
    experts = cases.select(logits.astype(np.float64), VECTORS["correction_bias"].astype(np.float64), SPEC)
    np.testing.assert_array_equal(routing.experts, experts)
    weights = bounds.weights(bounds.given(logits), experts, VECTORS["expert_scale"].astype(np.float64), SPEC)
    bounds.within(routing.weights, weights)


def test_a_new_process_on_a_cpu_computes_what_was_exported(tmp_path, cuda_module, monkeypatch) -> None:
    """A fixed and a symbolic number of tokens, gradients, and artifacts that have a kernel for another platform."""
    problems = {name: [problem(tokens) for tokens in (6, 1)] for name in ("xla", "xla, gradients", *KERNELS)}
    problems["xla, gradients"] = [problem(6)]
    artifacts = {
        "xla": export(router("xla"), symbolic(), ("cpu",), checks=()),
        "xla, gradients": export(router("xla"), 6, ("cpu",), checks=()),
    }
    for name in KERNELS:
        monkeypatch.setenv(dispatch.PREFER_VARIABLE, name)
        artifacts[name] = export(router(), 6, BOTH)
        target = cuda.ROUTE_TARGET if name == "cuda" else "mosaic_gpu_v2"
        assert target in artifacts[name].mlir_module(), f"{name} is not in the artifact"
        problems[name] = [problem(6)]
    monkeypatch.delenv(dispatch.PREFER_VARIABLE)
    for name, exported in artifacts.items():
        write(tmp_path, name, exported, *problems[name], vjp_order=int("gradients" in name))
    done = load(tmp_path, on_the_cpu=True)
    assert done.returncode == 0, done.stderr

    for name in artifacts:
        for index, operands in enumerate(problems[name]):
            weights, experts, logits, *gradients = results(tmp_path, name, index)
            assert_routed(jr.Routing(weights, experts, logits), *operands)
            assert len(gradients) == (3 if "gradients" in name else 0)
    x, weight, _ = problem(6)
    of_weights = np.tile(np.float32([1, 2]), (6, 1))
    weights, experts, logits, *gradients = results(tmp_path, "xla, gradients")
    truth = bounds.gradients(x, weight, bounds.given(logits), experts, VECTORS["expert_scale"], SPEC, of_weights)
    for index, gradient in enumerate(gradients):
        bounds.within(gradient, truth[index], rounded_to=BF16 if index < 2 else None)


def test_jax_serialises_a_kernel_only_with_the_documented_checks_disabled(cuda_module) -> None:
    for function, target in ((router("cuda"), cuda.ROUTE_TARGET), (logits_of("cuda"), cuda.TARGET)):
        with pytest.raises(ValueError, match=rf"custom calls whose targets have no\s+compatibility(?s:.*){target}"):
            export(function, 6, ("cuda",), checks=())
        assert target in export(function, 6, ("cuda",)).mlir_module()


def test_a_named_kernel_for_two_platforms_is_an_error_on_the_other(cuda_module) -> None:
    exported = export(router("cuda"), 6, BOTH)
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(Exception, match=f"(?i){cuda.ROUTE_TARGET} (on a|for) platform Host"),
    ):
        exported.call(*problem(6))
    if "pallas" in KERNELS:
        with pytest.raises(NotImplementedError, match="multi-platform"):
            export(router("pallas"), 6, BOTH)


@pytest.mark.parametrize("function", [router, logits_of])
def test_a_symbolic_number_of_tokens_takes_cuda_where_it_is_named(cuda_module, monkeypatch, function) -> None:
    target = cuda.ROUTE_TARGET if function is router else cuda.TARGET
    exported = export(function("cuda"), symbolic(), ("cuda",))
    assert f"custom_call @{target}" in exported.mlir_module()
    assert "tensor<?xui8>" in exported.mlir_module(), "nothing is lent as a workspace"
    assert target not in export(function(), symbolic(), BOTH).mlir_module()
    monkeypatch.setenv(dispatch.PREFER_VARIABLE, "cuda")
    assert target in export(function(), symbolic(), BOTH).mlir_module()
    monkeypatch.delenv(dispatch.PREFER_VARIABLE)
    with pytest.raises(NotImplementedError, match=r"pallas.*needs a fixed number of tokens, it is the symbolic tokens"):
        export(function("pallas"), symbolic(), ("cuda",))


def device(capability: str | None) -> SimpleNamespace:
    return SimpleNamespace(platform="gpu", device_kind="NVIDIA of a test", compute_capability=capability)


@pytest.mark.parametrize("name", ["cuda", "pallas"])
def test_register_says_why_a_kernel_cannot_be_had(monkeypatch, name) -> None:
    module = {"cuda": cuda, "pallas": pallas}[name]
    answers: list[str | None] = []
    monkeypatch.setattr(module, "unavailable", lambda: answers.pop())
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device("8.0"), device("9.0")])
    answers.append(None)
    jax_router.export.register(name)
    assert not answers, "the kernels were not asked for"
    answers.append("could not be built: there is no nvcc")
    with pytest.raises(RuntimeError, match=f'implementation="{name}" could not be built: there is no nvcc'):
        jax_router.export.register(name)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device("8.0")])
    with pytest.raises(RuntimeError, match=r"needs an NVIDIA GPU.*9\.0, this process has NVIDIA of a test \(8\.0\)"):
        jax_router.export.register(name)

    def none(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", none)
    with pytest.raises(RuntimeError, match=r"compute capability 9\.0, and JAX has none: Unknown backend cuda"):
        jax_router.export.register(name)
    jax_router.export.register("xla")
    with pytest.raises(ValueError, match=r"the argument implementation names 'kuda'.*did you mean"):
        jax_router.export.register("kuda")


@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_new_process_on_a_gpu_has_the_bits_of_the_kernel(name, tmp_path, monkeypatch) -> None:
    """Named for CUDA alone, and picked in an artifact that a CPU runs with xla."""
    few, many = problem(5), problem(200)
    write(tmp_path, "few", export(router(name), 5, ("cuda",)), few)
    write(tmp_path, "gradients", export(router(name), 5, ("cuda",)), few, vjp_order=1)
    write(tmp_path, "many", export(router(name), 200, ("cuda",)), many)
    write(tmp_path, "logits", export(logits_of(name), 200, ("cuda",)), many)
    portable = tmp_path / "portable"
    portable.mkdir()
    monkeypatch.setenv(dispatch.PREFER_VARIABLE, name)
    write(portable, "picked", export(router(), 5, BOTH), few)
    monkeypatch.delenv(dispatch.PREFER_VARIABLE)

    for folder in (tmp_path, portable):
        done = load(folder, name)
        assert done.returncode == 0, done.stderr
    assert_bits(results(tmp_path, "few"), router(name)(*few))
    assert_bits(results(tmp_path, "many"), router(name)(*many))
    assert_bits(results(tmp_path, "logits"), logits_of(name)(*many))
    assert_bits(results(portable, "picked"), router(name)(*few))
    weights, experts, logits, *gradients = results(tmp_path, "gradients")
    assert_bits((weights, experts, logits), router(name)(*few))
    of_weights = np.tile(np.float32([1, 2]), (5, 1))
    x, weight, _ = few
    truth = bounds.gradients(x, weight, bounds.given(logits), experts, VECTORS["expert_scale"], SPEC, of_weights)
    for index, gradient in enumerate(gradients):
        bounds.within(gradient, truth[index], rounded_to=BF16 if index < 2 else None)

    done = load(portable, on_the_cpu=True)
    assert done.returncode == 0, done.stderr
    assert_routed(jr.Routing(*results(portable, "picked")), *few)


@pytest.mark.gpu
def test_one_artifact_of_cuda_has_the_bits_of_every_number_of_tokens(tmp_path) -> None:
    problems = [problem(tokens) for tokens in (1, 5, 64, 200)]
    write(tmp_path, "route", export(router("cuda"), symbolic(), ("cuda",)), *problems)
    write(tmp_path, "logits", export(logits_of("cuda"), symbolic(), ("cuda",)), *problems)
    done = load(tmp_path, "cuda")
    assert done.returncode == 0, done.stderr
    for index, operands in enumerate(problems):
        assert_bits(results(tmp_path, "route", index), router("cuda")(*operands))
        assert_bits(results(tmp_path, "logits", index), logits_of("cuda")(*operands))


@pytest.mark.gpu
def test_a_custom_call_that_nobody_registered_is_an_error_that_names_it(tmp_path) -> None:
    write(tmp_path, "route", export(router("cuda"), 5, ("cuda",)), problem(5))
    done = load(tmp_path)
    assert done.returncode != 0
    assert cuda.ROUTE_TARGET in done.stderr
