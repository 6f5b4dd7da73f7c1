"""Settings of every test: strict dtype promotion, and GPU tests that never disappear in silence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from types import ModuleType

# PyTorch and JAX share the GPU in parity tests: JAX must not take most of its memory at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


def has_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """No test leaves a variable of ours, JAX's or XLA's behind: which tests share a process is chance."""

    def variables() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))}

    before = variables()
    yield
    assert variables() == before


@pytest.fixture
def gpu() -> jax.Device:
    """The first GPU. A test that asks for it is a GPU test, with or without the marker."""
    return jax.devices("gpu")[0]


@pytest.fixture(scope="module")
def on_the_cpu() -> Iterator[None]:
    """Everything without a device runs on a CPU, also where there is a GPU."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@pytest.fixture(scope="module")
def compiled_in_haste() -> Iterator[None]:
    """XLA without its optimisations on a CPU, for tests that hang on none and whose time is that of compiling."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before or not has_gpu())
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # no other file runs what was compiled here


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The CUDA kernels, compiled for the CPU once per session, with pytest-xdist too: `emulated.Sources`."""
    from emulated import Sources

    if shutil.which("g++") is None:
        pytest.skip("the emulation needs g++")
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Sources(session / "emulation", tmp_path_factory.mktemp("emulation-of-a-worker"))


@pytest.fixture
def cuda_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The implementation `cuda` as on a device that looks like an H200, for kernels to be put into."""
    from jax_router import dispatch, implementations, ops

    module = implementations.load("cuda")
    monkeypatch.setattr(module, "unavailable", lambda: None)
    monkeypatch.setattr(ops, "_device", lambda *_: dispatch.Device("gpu", "NVIDIA H200 of a test", "9.0"))

    def forget() -> None:
        ops._forward.cache_clear()
        ops._operation.cache_clear()

    forget()
    yield module
    forget()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests have the property `gpu` in reports (JUnit's XML has it), and are skipped where there is none."""
    skip = pytest.mark.skip(reason=f"needs a GPU, JAX has {jax.devices()[0].platform} only")
    for item in items:
        if item.get_closest_marker("gpu") or "gpu" in getattr(item, "fixturenames", ()):
            item.user_properties.append(("gpu", "true"))
            if not has_gpu():
                item.add_marker(skip)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where there is a GPU, a skipped test is a failure."""
    if hasattr(session.config, "workerinput"):  # a worker of pytest-xdist; the controller sees every report
        return
    if _skipped(session.config) and has_gpu() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    skipped = _skipped(config)
    if skipped and has_gpu():
        terminalreporter.section("skipped although there is a GPU: this counts as failure", red=True)
        for name in skipped:
            terminalreporter.line(name, red=True)


def _skipped(config: pytest.Config) -> list[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return [report.nodeid for report in reporter.stats.get("skipped", [])] if reporter is not None else []
