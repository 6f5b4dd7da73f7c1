"""`jax.export` of functions that route: what it must be told, and what a process that loads an artifact must do.

    exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda"), disabled_checks=DISABLED_CHECKS)

docs/using/export.md has what runs where.
"""

from __future__ import annotations

import jax

from jax_router import checks, implementations
from jax_router.dispatch import Device
from jax_router.implementations import cuda

DISABLED_CHECKS = tuple(map(jax.export.DisabledSafetyCheck.custom_call, (cuda.TARGET, cuda.ROUTE_TARGET)))
"""The custom calls of `cuda`. JAX has that of `pallas`, `mosaic_gpu_v2`, on its own list of what stays compatible.

Nothing is promised of the others from version to version: an artifact is for the jax_router that exported it.
"""


def register(implementation: str = "cuda") -> None:
    """Make the custom calls of an implementation known to this process, before it calls a loaded artifact on a GPU.

    `route` and `router_gemm` do so when they are traced, and a process that only loads an artifact traces neither.
    The first call may compile the library of `cuda`, as `jax-router build` does ahead.

    Args:
      implementation: which kernels the artifact has, "cuda" or "pallas". "xla" has none and needs nothing.

    Raises:
      ValueError: an unknown name.
      RuntimeError: this process has no GPU that runs the kernels, or they cannot be built or loaded; says why.
    """
    checks.known_implementation("the argument implementation", implementation)
    if implementation == "xla":
        return
    failure = _no_device() or implementations.load(implementation).unavailable()
    if failure is not None:
        raise RuntimeError(
            f'implementation="{implementation}" {failure}. Register it where the artifact runs it; one for '
            '("cpu", "cuda") that names no implementation runs xla on a CPU.'
        )


def _no_device() -> str | None:
    wanted = f"needs an NVIDIA GPU of compute capability {cuda.COMPUTE_CAPABILITY}"
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError as error:
        return f"{wanted}, and JAX has none: {error}"
    found = list(map(Device.of, devices))
    if any(device.compute_capability == cuda.COMPUTE_CAPABILITY for device in found):
        return None
    return f"{wanted}, this process has {', '.join(map(str, found))}"
