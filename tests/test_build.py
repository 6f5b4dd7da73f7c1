"""The kernels compile once, for every process, and whatever goes wrong is said and survived.

The cache is tested with compilers that are shell scripts: they write a file and log their calls. test_library.py
compiles the real kernels.
"""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jax_router import build, toolchain

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for path in build.source_files() if path.suffix in (".cu", ".cc")]

PTXAS_LINES = """ptxas info    : Compiling entry function '_Z4slowv' for 'sm_90a'
ptxas info    : Function properties for _Z4slowv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 528 bytes smem
ptxas info    : Compiling entry function '_Z4fastv' for 'sm_90a'
ptxas info    : Function properties for _Z4fastv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


class FakeCompilers:
    """nvcc and g++ as scripts. `calls()` lists what they were called with, `payload` is what they write as library."""

    def __init__(self, folder: Path):
        self.folder, self.log, self.payload, self.says = (folder / name for name in ("", "log", "payload", "says"))
        (folder / "bin").mkdir(parents=True)
        self.log.touch()
        self.says.touch()
        self.payload.write_bytes(b"a library")
        for path in (folder / "bin" / "nvcc", folder / "g++"):
            path.write_text(
                '#!/bin/sh\nif [ "$1" = --version ]; then echo "fake, release 13.0, V13.0.88"; exit 0; fi\n'
                f'echo "$@" >> {self.log}\nsleep 0.1\ncat {self.says}\n'
                f"if grep -q 'error:' {self.says}; then exit 3; fi\n"
                f'for word; do [ "$last" = -o ] && cp {self.payload} "$word"; last=$word; done\n'
            )
            path.chmod(0o755)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    def links(self) -> int:
        return sum("-shared" in call for call in self.calls())


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    fake = FakeCompilers(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(fake.folder))
    monkeypatch.setenv("CXX", str(fake.folder / "g++"))
    monkeypatch.setenv("JAX_ROUTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_ROUTER_LIBRARY", raising=False)
    return fake


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    for variable in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "wheel_toolkits", list)


def a_real_library() -> bytes:
    """Some shared library that this process has loaded, so that a copy of it loads too."""
    mapped = re.search(r"(/\S*libm[.-]\S*)", Path("/proc/self/maps").read_text())
    assert mapped, "this Python has no libm mapped"
    return Path(mapped[1]).read_bytes()


# The cache


def test_the_second_build_comes_from_the_cache(compilers, capfd):
    path = build.build()
    assert path.read_bytes() == b"a library"
    assert len(compilers.calls()) == len(SOURCES) + 1
    message = capfd.readouterr().err
    assert len(message.splitlines()) == 1
    assert re.search(r"compiling the CUDA kernels for sm_90a with nvcc 13.0, .* done in \d+\.\d s", message)
    assert build.build() == path
    assert len(compilers.calls()) == len(SOURCES) + 1
    assert capfd.readouterr().err == ""
    build.build(force=True)
    assert compilers.links() == 2


def test_cached_library_needs_no_writable_folder(compilers, monkeypatch):
    path = build.build()
    monkeypatch.setattr(build, "_writable_directory", lambda: pytest.fail("asked for a folder to write to"))
    assert build.build() == path


def test_whatever_a_library_depends_on_is_in_its_name(compilers, tmp_path, monkeypatch):
    names = [build.build().name]
    for target, name, value in (
        (build, "HOST_FLAGS", (*build.HOST_FLAGS, "-g")),
        (build, "ffi_version", lambda: 7),
        (build, "version", lambda package: "9.9.9"),
        (build, "source_files", lambda: SOURCES[:1]),
    ):
        monkeypatch.setattr(target, name, value)
        names.append(build.build().name)
    script = compilers.folder / "bin" / "nvcc"
    script.write_text(script.read_text().replace("V13.0.88", "V13.0.99"))
    names.append(build.build().name)
    assert len(set(names)) == len(names)


def test_processes_that_start_at_once_compile_once(compilers):
    command = [sys.executable, "-c", "from jax_router import build; print(build.build())"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert len({path for path, _ in outputs}) == 1
    assert compilers.links() == 1
    assert sum("compiling the CUDA kernels" in message for _, message in outputs) == 1


@pytest.mark.parametrize("damage", ["truncated", "changed byte", "no record", "broken record"])
def test_damaged_library_is_compiled_again(compilers, capfd, damage):
    path = build.build()
    record = path.with_suffix(".json")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "changed byte":
        path.write_bytes(b"A library")
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text("{")
    capfd.readouterr()
    assert build.build().read_bytes() == b"a library"
    assert compilers.links() == 2
    assert f"{path} is damaged" in capfd.readouterr().err
    build.build()
    assert compilers.links() == 2


def test_library_that_does_not_load_is_compiled_again_once(compilers, capfd):
    compilers.payload.write_bytes(b"no ELF file")
    with pytest.raises(build.BuildError, match="compiles and does not load"):
        build.load_library()
    assert compilers.links() == 2
    assert "does not load" in capfd.readouterr().err

    compilers.payload.write_bytes(a_real_library())
    assert isinstance(build.load_library(), ctypes.CDLL)
    assert compilers.links() == 3


def test_unwritable_cache_falls_back_to_a_temporary_folder(compilers, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_ROUTER_CACHE", str(tmp_path / "file" / "cache"))  # not even root can write there
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.warns(RuntimeWarning, match=r"cache folder .* cannot be written .* Set JAX_ROUTER_CACHE"):
        path = build.build()
    assert path.parent.parent == tmp_path
    assert path.parent.stat().st_mode & 0o077 == 0
    with pytest.warns(RuntimeWarning):
        assert build.build() == path
    assert compilers.links() == 1


def test_temporary_folder_that_others_can_write_to_is_refused(compilers, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_ROUTER_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    planted = tmp_path / f"jax_router-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    with pytest.raises(build.BuildError, match="can be written by others"):
        build.build()


def test_no_writable_folder_is_an_error_that_names_the_variable(compilers, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_ROUTER_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="Set JAX_ROUTER_CACHE to a writable folder"):
        build.build()


def test_lock_that_cannot_be_opened_is_an_error_that_names_the_variable(compilers):
    path = build.build()
    path.unlink()
    path.with_suffix(".lock").unlink()
    path.with_suffix(".lock").mkdir()
    with pytest.raises(build.BuildError, match=r"cannot lock .*Set JAX_ROUTER_CACHE"):
        build.build()


def test_prebuilt_library_is_used_or_refused(compilers, tmp_path, monkeypatch):
    library = tmp_path / "prebuilt.so"
    library.write_bytes(a_real_library())
    monkeypatch.setenv("JAX_ROUTER_LIBRARY", str(library))
    assert isinstance(build.load_library(), ctypes.CDLL)
    monkeypatch.setenv("JAX_ROUTER_LIBRARY", str(tmp_path / "missing.so"))
    with pytest.raises(build.BuildError, match=r"JAX_ROUTER_LIBRARY=.*missing.so does not load.*unset it"):
        build.load_library()
    assert compilers.calls() == []


# The compilers


def test_failing_compiler_is_reported_with_command_output_and_advice(compilers, tmp_path, capfd):
    compilers.says.write_text("line of noise\n" * 100 + "error: the kernel is wrong\n")
    with pytest.raises(build.BuildError) as failure:
        build.build()
    message = str(failure.value)
    assert "exit status 3" in message
    assert "-gencode=arch=compute_90a,code=sm_90a" in message or "-isystem" in message
    assert "error: the kernel is wrong" in message
    assert message.count("line of noise") < 40
    assert "pip install" in message
    assert "failed" in capfd.readouterr().err
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_no_compiler_says_where_it_looked_and_what_to_install(no_compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_ROUTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "empty"))
    with pytest.raises(build.BuildError) as failure:
        build.build()
    for part in (
        "CUDA_HOME (not set)",
        "CUDA_PATH",
        "has no bin/nvcc",
        "PATH (no nvcc)",
        "pip install nvidia-cuda-nvcc",
    ):
        assert part in str(failure.value)


def test_library_compiled_ahead_needs_no_compiler(compilers, request):
    path = build.build()
    request.getfixturevalue("no_compiler")
    assert build.build() == path
    path.write_bytes(b"damaged")
    with pytest.raises(build.BuildError, match="no CUDA compiler") as failure:
        build.build()
    assert f"{path}, compiled ahead, is damaged (" in str(failure.value)


def test_a_user_without_a_home_is_told_to_name_a_folder(compilers, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("JAX_ROUTER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.Path, "home", no_home)
    with pytest.raises(build.BuildError, match=r"Could not determine home directory.*Set JAX_ROUTER_CACHE"):
        build.build()


def test_old_compiler_is_refused(compilers):
    script = compilers.folder / "bin" / "nvcc"
    script.write_text(script.read_text().replace("release 13.0", "release 11.8"))
    with pytest.raises(
        build.BuildError, match=r"from CUDA_HOME\) is release 11.8, and the kernels need nvcc 12.5 or newer"
    ):
        build.build()


def test_host_compiler_of_cxx_must_run(compilers, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CXX=no-such-compiler is no program"):
        build.build()


def test_pypi_compiler_is_found_and_its_missing_piece_named(no_compiler, tmp_path, monkeypatch):
    toolkit = tmp_path / "nvidia" / "cu13"
    fake = FakeCompilers(toolkit)
    monkeypatch.setattr(toolchain, "wheel_toolkits", lambda: [toolkit])
    monkeypatch.setenv("CXX", str(toolkit / "g++"))
    for piece in toolchain.WHEEL_PIECES:
        (toolkit / piece).parent.mkdir(parents=True, exist_ok=True)
        (toolkit / piece).touch()
    found = toolchain.find_compiler()
    assert (found.nvcc, found.origin) == (fake.folder / "bin" / "nvcc", "PyPI")
    assert found.link_flags == (f"-L{toolkit / 'lib'}",)
    (toolkit / "include/cccl/nv/target").unlink()
    with pytest.raises(build.BuildError, match=r"pip install nvidia-cuda-cccl$"):
        toolchain.find_compiler()


# The command


@pytest.fixture
def command(monkeypatch):
    app = typer.Typer()
    app.callback()(lambda: None)  # a second level, as in the whole command line
    build.register(app)
    return lambda *arguments: CliRunner().invoke(app, ["build", *arguments])


def test_build_command_prints_the_library_and_its_kernels(compilers, command, tmp_path):
    compilers.says.write_text(PTXAS_LINES)
    result = command("--verbose", "--output", str(tmp_path / "copy.so"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "copy.so").read_bytes() == b"a library"
    assert re.search(r"255 +528 +16 +12  slow\(\)|255 +528 +16 +12  _Z4slowv", result.output)
    assert compilers.links() == 1
    command("--force")
    assert compilers.links() == 2


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (PTXAS_LINES, "spills 12 bytes"),
        ("ffi.cc:7:1: warning: unused parameter\n", "unused parameter"),
        ("ptxas warning : Registers are spilled\n", "Registers are spilled"),
    ],
)
def test_check_fails_on_a_warning_or_a_spill(compilers, command, said, fault):
    compilers.says.write_text(said)
    result = command("--check")
    assert result.exit_code == 1
    assert fault in result.output
    assert command("--check").exit_code == 1, "the log of a cached library counts too"


def test_check_passes_a_clean_build(compilers, command):
    compilers.says.write_text("".join(PTXAS_LINES.splitlines(keepends=True)[4:]))
    assert command("--check").exit_code == 0


def test_build_command_without_a_compiler_exits_with_the_reason(no_compiler, command, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_ROUTER_CACHE", str(tmp_path / "cache"))
    result = command()
    assert result.exit_code == 2
    assert "there is no CUDA compiler" in result.output
