"""What a kernel broken on purpose is: edits of the sources, and where they show. The kernels are in fault_list.py."""

from __future__ import annotations

from dataclasses import dataclass

from jax_router.verification.edits import Edit

# Checks of `jax-router verify`. "hang" is its watchdog; "memory" has poisoned outputs, canaries and buffers that end
# where nothing is mapped.
CHECKS = ("accuracy", "experts", "bits", "memory", "load", "graphs", "neighbours", "sanitizers", "hang")


@dataclass(frozen=True)
class Fault:
    """One way to break the kernels, and where it shows.

    `shapes` are presets of `jax_router.models` or "hidden x experts", such as "720x33": the broken code runs for each
    of them, in each of `operations`, with some of `tokens`, which pick the kernel. `extends_to` says how far it goes
    and what else it takes.
    """

    name: str
    what: str
    edits: tuple[Edit, ...]
    seen_by: tuple[str, ...]  # any of these checks must see it, the likeliest first
    extends_to: str
    operations: tuple[str, ...] = ("router_gemm", "route")
    shapes: tuple[str, ...] = ("gpt-oss-120b", "DeepSeek-V3")
    tokens: tuple[int, ...] = (1, 16, 64, 256)
    missed_by_parity: bool = False  # the tests that compare with float64 pass with it
    found_by_quick: bool = False  # `jax-router verify --quick` finds it, but for one run of ten
