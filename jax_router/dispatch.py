"""Which implementation computes a problem: data, and one pure function.

Order: the argument `implementation`, then the environment (`JAX_ROUTER_IMPLEMENTATION` names the one to use,
`JAX_ROUTER_DISABLE` lists those that must not run), then the measured table of this GPU or its twin, then a heuristic,
then `xla`. A kernel that failed its verification, or whose measured table is not of verified sources or has verified no
operands of these dtypes, is chosen by argument or environment only.
Both variables are read while tracing: a function that is already compiled keeps what it was compiled with.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jax_router import checks, checks_route, heuristic, implementations
from jax_router.routing import RoutingSpec
from jax_router.tables import Table, load_table
from jax_router.verification import gate, standing
from jax_router.verification.standing import Standings

IMPLEMENTATIONS = implementations.NAMES
PREFER_VARIABLE = "JAX_ROUTER_IMPLEMENTATION"
DISABLE_VARIABLE = "JAX_ROUTER_DISABLE"

_NOTHING: Mapping[str, str] = MappingProxyType({})
_UNKNOWN: Standings = MappingProxyType({})


@dataclass(frozen=True)
class Problem:
    """One router GEMM, x [tokens, hidden] @ weight [experts, hidden].T. Sizes in elements, dtypes by name.

    With a spec it is a `route`: the router GEMM to float32 logits, then scoring and selection. With the layout
    "hidden_experts" the weight is stored as [hidden, experts].
    """

    tokens: int
    hidden: int
    experts: int
    dtype: str = "bfloat16"  # of x
    weight_dtype: str | None = None  # None means dtype
    bias_dtype: str | None = None  # None means no bias
    out_dtype: str = "float32"
    spec: RoutingSpec | None = None  # None means the router GEMM alone
    weight_layout: str = "experts_hidden"  # one of implementations.WEIGHT_LAYOUTS

    @property
    def operation(self) -> str:
        """ "router_gemm" or "route"."""
        return "router_gemm" if self.spec is None else "route"

    @property
    def dtypes(self) -> gate.Dtypes:
        """Of x and weight."""
        return self.dtype, self.weight_dtype or self.dtype

    @property
    def symbolic(self) -> bool:
        """Whether the number of tokens is open: a dimension variable of `jax.export`."""
        return not isinstance(self.tokens, int | np.integer)


@dataclass(frozen=True)
class Device:
    """What the choice depends on. `Device.of(jax.devices()[0])` reads it from a JAX device."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str = ""  # JAX's device_kind, "NVIDIA H200"
    compute_capability: str | None = None  # "9.0" on NVIDIA GPUs

    @classmethod
    def of(cls, device: jax.Device) -> Device:
        return cls(device.platform, device.device_kind, getattr(device, "compute_capability", None))

    @classmethod
    def default(cls) -> Device:
        """The device that JAX would put a new array on."""
        configured = jax.config.jax_default_device  # type: ignore[attr-defined]  # untyped before jax 0.11
        if configured is None or isinstance(configured, str):
            configured = jax.local_devices(backend=configured)[0]
        return cls.of(configured)

    @property
    def description(self) -> str:
        """For messages: "NVIDIA H200 (9.0)"."""
        return (self.kind or self.platform) + (f" ({self.compute_capability})" if self.compute_capability else "")

    def __str__(self) -> str:
        return self.description


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, why, and why each other one does not. `str()` of it is a readable explanation."""

    implementation: str
    reason: str
    rejected: tuple[tuple[str, str], ...]  # (name, why not)
    config: int | None = None  # of the kernel; None lets its launcher pick. All configurations give the same bits
    verification: tuple[tuple[str, str], ...] = ()  # (name, its standing) of the kernels that could run
    config_name: str | None = None  # as a table has it; `resolve` finds its number in the library

    def __str__(self) -> str:
        rejected = [f"not {name}: {reason}" for name, reason in self.rejected]
        # What is left out for its verification has said so.
        verified = [f"{name} {text}" for name, text in self.verification if (name, text) not in self.rejected]
        return "\n  ".join([f"{self.implementation}: {self.reason}", *rejected, *verified])


def why_unsupported(problem: Problem, device: Device, implementation: str) -> str | None:
    """What `implementation` cannot do about this problem on this device, or None. Nothing is built to find out."""
    if problem.symbolic and implementation == "pallas":
        return f"needs a fixed number of tokens, it is the symbolic {problem.tokens}"
    return implementations.load(implementation).why_unsupported(problem, device)


def choose(
    problem: Problem,
    device: Device,
    *,
    implementation: str | Sequence[str] | None = None,
    environment: Mapping[str, str] = os.environ,
    table: Table | None = None,
    unavailable: Mapping[str, str] = _NOTHING,
    verification: Standings = _UNKNOWN,
    source_hash: str | None = None,
) -> Choice:
    """Choose the implementation of one problem. Pure: everything it depends on is an argument.

    Args:
      problem: the sizes and dtypes.
      device: where it runs.
      implementation: None to choose; a name, or a sequence of names tried in order, to use one of these or raise.
      environment: where the two variables are looked up.
      table: times measured on this kind of device or its twin, from `load_table`; None for none.
      unavailable: implementations that this machine cannot run, and why.
      verification: of the kernels on this kind of device, from `standings`. What it distrusts runs only if it is named.
      source_hash: of the kernels that would run, from `kernels_hash`. Configurations in the table are for no others.

    Returns:
      The choice, with a reason for it and against every other implementation.

    Raises:
      TypeError: `implementation` is neither None, nor a name, nor a sequence of names.
      ValueError: an unknown name in `implementation` or in a variable, or `JAX_ROUTER_DISABLE` lists xla.
      NotImplementedError: none of the implementations named by `implementation` can run; lists every reason.
    """
    named = checks.implementation_names(implementation)
    preferred, disabled = _read_environment(environment)
    ranking = _rank(problem, device, table)
    if named is not None:
        ranking = dict.fromkeys(named, ("named by the argument implementation", "is named later"))
    elif preferred is not None:
        del ranking[preferred]
        ranking = {preferred: (f"{PREFER_VARIABLE}={preferred}", "")} | ranking

    chosen: str | None = None
    rejected: dict[str, str] = {}
    shown: list[tuple[str, str]] = []
    for name, (_, otherwise) in ranking.items():
        if name in disabled:
            refusal: str | None = f"is switched off by {DISABLE_VARIABLE}={environment[DISABLE_VARIABLE]}"
        else:
            refusal = why_unsupported(problem, device, name) or unavailable.get(name)
        known = verification.get((problem.operation, name, problem.dtypes))
        if refusal is None and known is not None:
            shown.append((name, str(known)))
            refusal = str(known) if known.distrusted and named is None and name != preferred else None
        if refusal is None and chosen is None:
            chosen = name
        else:
            rejected[name] = refusal or otherwise
    if chosen is None:
        raise NotImplementedError(_all_refuse(rejected))
    rejected |= {name: "is not named by the argument implementation" for name in IMPLEMENTATIONS if name not in ranking}
    reason, config_name = ranking[chosen][0], None
    winner = table.winner(problem, device.kind, source_hash) if table is not None and chosen == "cuda" else None
    if table is not None and winner is not None:
        reason += f"; configuration {winner} at tokens={problem.tokens} in {table.name}"
        config_name = winner.config
    found = tuple(rejected.items())
    return Choice(chosen, reason, found, verification=tuple(sorted(shown)), config_name=config_name)


def resolve(problem: Problem, device: Device, implementation: str | Sequence[str] | None = None) -> Choice:
    """`choose` with this process's environment, the checked-in table, and what turns out not to run on this machine.

    A chosen kernel is built or loaded here. If that fails, the next choice is taken and one warning says why, unless
    `implementation` leaves no other: then it is the error.

    Raises:
      TypeError, ValueError, NotImplementedError: as `choose`.
    """
    table = load_table(device.kind)
    verification = standings(device, table)
    source_hash = kernels_hash(table)
    unavailable: dict[str, str] = {}
    while True:
        choice = choose(
            problem,
            device,
            implementation=implementation,
            table=table,
            unavailable=unavailable,
            verification=verification,
            source_hash=source_hash,
        )
        failure = implementations.load(choice.implementation).unavailable()
        if failure is None:
            break
        unavailable[choice.implementation] = failure
    for name, failure in unavailable.items():
        _warn_once(f'jax_router goes on without implementation="{name}", which {failure}')
    if any(each in choice.rejected for each in choice.verification):
        _warn_once(standing.warning(device.kind, verification, problem.dtypes))
    preferred, _ = _read_environment(os.environ)
    if implementation is None and preferred not in (None, choice.implementation):
        refusal = f"{preferred} {dict(choice.rejected)[preferred]}"
        _warn_once(f"{PREFER_VARIABLE}={preferred} is not followed, {choice.implementation} runs instead: {refusal}")
    return choice if choice.config_name is None else _with_its_number(choice, problem.operation)


def _with_its_number(choice: Choice, operation: str) -> Choice:
    """The choice with the number that its configuration has in the library, which is loaded."""
    names = implementations.load(choice.implementation).config_names(operation)
    if choice.config_name in names:
        return replace(choice, config=names.index(choice.config_name))
    _warn_once(f"the table names configuration {choice.config_name} of {operation}, which the kernels do not have")
    return choice


def explain(
    *,
    tokens: int,
    hidden: int,
    experts: int,
    dtype: Any = "bfloat16",
    weight_dtype: Any = None,
    bias: Any = False,
    out_dtype: Any = "float32",
    spec: RoutingSpec | None = None,
    weight_layout: str = "experts_hidden",
    device: Device | jax.Device | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Choice:
    """Which implementation `router_gemm`, or with a spec `route`, would run, why, and why not the others.

    >>> choice = explain(tokens=8, hidden=2880, experts=128, device=Device("cpu"))
    >>> choice.implementation
    'xla'
    >>> print(choice)  # doctest: +ELLIPSIS
    xla: ...
      not cuda: ...
      not pallas: ...

    Args:
      tokens: rows of x, all leading axes together.
      hidden: of x and of weight.
      experts: of weight.
      dtype: of x; bfloat16, float16 or float32.
      weight_dtype: None means that of x.
      bias: False, True (in x's dtype), or the dtype of the bias.
      out_dtype: of the logits; float32 with a spec.
      spec: a `RoutingSpec` for the choice of `route`, None for that of `router_gemm`.
      weight_layout: "experts_hidden" or "hidden_experts", as in `router_gemm`.
      device: where it would run; None for JAX's default device, on which a kernel is then built or loaded as
        the operation would. Any other device is judged from static facts and the checked-in tables.
      implementation: as in `router_gemm`.

    Returns:
      A `Choice`; printing it shows every reason.

    Raises:
      TypeError, ValueError: arguments that describe no problem.
      NotImplementedError: no implementation named by `implementation` can run.
    """
    dtype = checks.input_dtype("dtype", dtype)
    if isinstance(bias, bool | np.bool_) or bias is None:
        bias_dtype = dtype if bias else None
    else:
        bias_dtype = checks.input_dtype("bias", bias)
    problem = Problem(
        tokens=checks.size("tokens", tokens, at_least=0),
        hidden=checks.size("hidden", hidden),
        experts=checks.size("experts", experts),
        dtype=dtype,
        weight_dtype=dtype if weight_dtype is None else checks.input_dtype("weight_dtype", weight_dtype),
        bias_dtype=bias_dtype,
        out_dtype=checks.input_dtype("out_dtype", out_dtype),
        spec=spec,
        weight_layout=checks.layout(weight_layout),
    )
    if spec is not None:
        checks.spec_fits(spec, problem.experts)
        checks_route.logits_of_route(problem.out_dtype)
    checks.dtypes_fit(dtype, weight=problem.weight_dtype, bias=problem.bias_dtype, out_dtype=problem.out_dtype)
    if device is None:
        return resolve(problem, Device.default(), implementation)
    if isinstance(device, jax.Device):
        device = Device.of(device)
    elif not isinstance(device, Device):
        raise TypeError(
            f"device is {device!r}. Expected a jax.Device, a jax_router.dispatch.Device or None; pass "
            'jax.devices()[0], or Device("gpu", "NVIDIA H200", "9.0") for a machine that is not here.'
        )
    table = load_table(device.kind)
    return choose(
        problem,
        device,
        implementation=implementation,
        table=table,
        verification=standings(device, table),
        source_hash=kernels_hash(table),
    )


def standings(device: Device, table: Table | None) -> Standings:
    """What is known of the kernels' verification on a device whose table, or whose twin's, is `table`."""
    return standing.standings(device.kind, table) if device.platform == "gpu" else _UNKNOWN


def kernels_hash(table: Table | None) -> str | None:
    """The hash of the sources of the kernels that would run; None if `table` needs none or nobody knows them."""
    if table is None or table.configs is None:
        return None
    from jax_router import build

    return None if os.environ.get(build.LIBRARY_VARIABLE) else gate.present_hash()


def _rank(problem: Problem, device: Device, table: Table | None) -> dict[str, tuple[str, str]]:
    """Every implementation, best first: why it is chosen, and why not where it could run but another one is chosen."""
    if problem.symbolic:
        reasons = "needs no library where it is loaded", "takes a symbolic number of tokens where it is named"
        return dict.fromkeys(("xla", *IMPLEMENTATIONS), reasons)
    row = table.nearest(problem) if table is not None else None
    if table is not None and row is not None:
        where = f"at tokens={row.tokens} in {table.name}"
        where = where if problem.spec is None else f"for route {where}"
        where = where if problem.weight_layout == "experts_hidden" else f"{where}, with a weight [experts, hidden]"
        times = {name: f"{time:.2f} us {where}" for name, time in row.microseconds.items()}
        measured = {name: (time, f"took {time}") for name, time in times.items()}
        # xla runs everything, so what stands behind it is never chosen: nothing unverified runs unasked.
        unmeasured = dict.fromkeys(("xla", *IMPLEMENTATIONS), ("runs everything", f"has no verified time {where}"))
        return measured | {name: why for name, why in unmeasured.items() if name not in measured}
    return heuristic.rank(problem, device)


def _read_environment(environment: Mapping[str, str]) -> tuple[str | None, tuple[str, ...]]:
    """The implementation that the environment asks for, if any, and those that it switches off."""
    preferred = environment.get(PREFER_VARIABLE, "").strip()
    disabled = tuple(name.strip() for name in environment.get(DISABLE_VARIABLE, "").split(",") if name.strip())
    if preferred:
        checks.known_implementation(f"the environment variable {PREFER_VARIABLE}", preferred)
    for name in disabled:
        checks.known_implementation(f"the environment variable {DISABLE_VARIABLE}", name)
    if "xla" in disabled:
        raise ValueError(
            f"the environment variable {DISABLE_VARIABLE} lists xla. Expected cuda or pallas: xla is what is left when "
            f"nothing else runs; to prefer another, name it in {PREFER_VARIABLE}."
        )
    return preferred or None, disabled


def _all_refuse(refusals: Mapping[str, str]) -> str:
    message = "; ".join(f'implementation="{name}" {reason.rstrip(".")}' for name, reason in refusals.items())
    return f'{message}. Use implementation="xla", or leave it None.'


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
