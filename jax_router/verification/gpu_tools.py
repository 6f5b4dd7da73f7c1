"""The library that verification runs beside the kernels: neighbours, load, fenced memory (csrc/verification)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator

import jax

from jax_router import build
from jax_router.implementations import cuda

_PREFIX = "jax_router_verification_"
PRODUCE, CONSUME, FIND_DIFFERING = (_PREFIX + name for name in ("produce", "consume", "find_differing"))


class LoadDone(ctypes.Structure):
    """`jr_load_done` of csrc/verification/verification.h."""

    _fields_ = [("device_bytes", ctypes.c_int64), ("host_bytes", ctypes.c_int64), ("busy_launches", ctypes.c_int64)]


class Calls(ctypes.Structure):
    """`jr_calls`: of `find_differing` by XLA, to launch and into a CUDA graph."""

    _fields_ = [("launched", ctypes.c_int64), ("captured", ctypes.c_int64)]


_lock = threading.Lock()


def loaded() -> ctypes.CDLL:
    """The compiled library with its C interface declared; its custom calls are registered. Once per process.

    Raises:
      BuildError: it cannot be built; says what to install.
    """
    with _lock:  # threads that compile ask at the same time
        return _load_once()


@functools.cache
def _load_once() -> ctypes.CDLL:
    found = ctypes.CDLL(str(build.build(library=build.VERIFICATION)))
    address, text, status = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_size_t), ctypes.c_int
    signatures = {
        "jr_load_start": (ctypes.c_int, *text),
        "jr_load_stop": (ctypes.POINTER(LoadDone), *text),
        "jr_fence_create": (
            ctypes.c_int64, ctypes.c_int, ctypes.POINTER(address), ctypes.POINTER(ctypes.c_int64), *text
        ),
        "jr_fence_free": (address, *text),
        "jr_fence_write": (address, address, ctypes.c_int64, *text),
        "jr_fence_read": (address, address, ctypes.c_int64, *text),
    }  # fmt: skip
    found.jr_find_differing_calls.restype, found.jr_find_differing_calls.argtypes = None, (ctypes.POINTER(Calls),)
    for name, arguments in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = status, arguments
    jax.local_devices(backend="cuda")  # starts the backend, or raises
    for target in (PRODUCE, CONSUME, FIND_DIFFERING):
        symbol = getattr(found, f"jr_ffi_verification_{target.removeprefix(_PREFIX)}")
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(symbol), platform="CUDA")
    return found


def call(name: str, *arguments: object) -> None:
    """Call a function of the library, as `cuda.call_in`.

    Raises:
      NotImplementedError: this machine does not have what it needs.
      RuntimeError: it failed, or the library could not be built.
    """
    cuda.call_in(loaded(), name, *arguments)


def calls() -> Calls:
    """How often `find_differing` was called so far: not by the replay of a graph, whose capture called it."""
    found = Calls()
    loaded().jr_find_differing_calls(ctypes.byref(found))
    return found


@contextlib.contextmanager
def load(device: jax.Device) -> Iterator[dict[str, int]]:
    """Copies and busy multiprocessors on streams of their own, while the context lasts; what they did is in it then."""
    done: dict[str, int] = {}
    call("jr_load_start", device.local_hardware_id or 0)
    try:
        yield done
    finally:
        total = LoadDone()
        call("jr_load_stop", ctypes.byref(total))
        done.update({field[0]: getattr(total, field[0]) for field in LoadDone._fields_})
