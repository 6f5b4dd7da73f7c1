"""The Hopper kernel: CUDA C++ behind an XLA FFI custom call that is captured in CUDA graphs.

Importing this module compiles and loads nothing. The library is built or loaded when it is first asked for, and the
custom call is registered only once the CUDA backend runs: registered before, a refused handler takes the backend down.
"""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.typing import DTypeLike

from jax_router.implementations import experts_axis
from jax_router.routing import Routing, RoutingSpec

if TYPE_CHECKING:
    from jax_router.dispatch import Device, Problem

TARGET, ROUTE_TARGET = "jax_router_sm90_router_gemm", "jax_router_sm90_route"
COMPUTE_CAPABILITY = "9.0"  # sm_90a code runs on nothing else, newer GPUs included
# As csrc/router_gemm.cu takes them.
MAX_HIDDEN, MAX_EXPERTS, MAX_TOKENS = 65536, 65536, 2**27
MAX_TILED_LOGITS = 2**34
# As csrc/route.cu takes them.
MAX_TOP_K, MAX_GROUPS, MAX_ROUTED_EXPERTS = 32, 32, 1024
DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2}  # enum jr_dtype; none is -1
# Of x and weight. A float32 is split into three bfloat16 terms, which multiply bfloat16 and no float16.
MULTIPLIED = (("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32"), ("float32", "float32"))
SCORE_FUNCTIONS = {"softmax": 0, "softmax_topk": 1, "sigmoid": 2, "sqrtsoftplus": 3}  # enum jr_score_function
GROUP_SCORES = {"top2_sum": 0, "max": 1}  # enum jr_group_score
OPERATIONS = {"router_gemm": 0, "empty": 1, "read_weight": 2}  # enum jr_operation, of jr_time_graph


class RouterGemmArgs(ctypes.Structure):
    """`jr_router_gemm_args` of csrc/router_gemm.h: device pointers, sizes in elements, dtypes and layouts as above."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("config", ctypes.c_int32),
        ("weight_layout", ctypes.c_int32),
        ("weight_dtype", ctypes.c_int32),
    ]

    @classmethod
    def of(
        cls,
        problem: Problem,
        *,
        x: int,
        weight: int,
        bias: int | None,
        out: int,
        workspace: int | None = None,
        workspace_bytes: int = 0,
        config: int = -1,
    ) -> RouterGemmArgs:
        """The arguments of one launch, from a problem and the addresses of its arrays on the device."""
        bias_dtype = -1 if problem.bias_dtype is None else DTYPES[problem.bias_dtype]
        dtypes = (DTYPES[problem.dtype], bias_dtype, DTYPES[problem.out_dtype])
        sizes = (problem.tokens, problem.hidden, problem.experts)
        of_weight = (experts_axis(problem.weight_layout), DTYPES[problem.dtypes[1]])
        return cls(x, weight, bias, out, workspace, workspace_bytes, *sizes, *dtypes, config, *of_weight)


class RouteArgs(ctypes.Structure):
    """`jr_route_args` of csrc/route.h."""

    _fields_ = [
        ("gemm", RouterGemmArgs),
        ("return_logits", ctypes.c_int32),
        ("integers", ctypes.c_int32 * 8),
        ("floats", ctypes.c_float * 4),
        ("correction_bias", ctypes.c_void_p),
        ("expert_scale", ctypes.c_void_p),
        ("correction_bias_dtype", ctypes.c_int32),
        ("expert_scale_dtype", ctypes.c_int32),
        ("replay", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("experts", ctypes.c_void_p),
        ("config", ctypes.c_int32),
    ]

    @classmethod
    def of(
        cls,
        problem: Problem,
        *,
        gemm: RouterGemmArgs,
        weights: int,
        experts: int,
        correction_bias: tuple[int, str] | None = None,
        expert_scale: tuple[int, str] | None = None,
        replay: int | None = None,
        return_logits: bool,
        config: int = -1,
    ) -> RouteArgs:
        """The arguments of one launch of a problem with a spec. A vector is its address on the device and its dtype."""
        assert problem.spec is not None, "a problem without a spec is a router GEMM"
        integers, floats = spec_numbers(problem.spec)
        pairs = (correction_bias, expert_scale)
        addresses = (None if pair is None else pair[0] for pair in pairs)
        dtypes = (-1 if pair is None else DTYPES[pair[1]] for pair in pairs)
        spec = ((ctypes.c_int32 * 8)(*integers), (ctypes.c_float * 4)(*floats))
        return cls(gemm, return_logits, *spec, *addresses, *dtypes, replay, weights, experts, config)


def spec_numbers(spec: RoutingSpec) -> tuple[np.ndarray, np.ndarray]:
    """The int32 and the float32 members of `jr_routing_spec` (csrc/route.h), in its order."""
    integers = (
        spec.top_k,
        SCORE_FUNCTIONS[spec.score_function],
        spec.renormalize,
        spec.select_on == "logits",
        spec.round_logits,
        spec.num_groups or 0,
        spec.group_topk or 0,
        GROUP_SCORES[spec.group_score],
    )
    floats = (spec.renormalize_epsilon, spec.renormalize_min, spec.scaling_factor, spec.masked_choice)
    return np.array(integers, np.int32), np.array(floats, np.float32)


MAX_WORKSPACE_BYTES = 16 << 20
MOST_TOKENS_WITHOUT_WORKSPACE = 64


def workspace_bytes(tokens: int, experts: int) -> int:
    """How much scratch to lend the kernel: four float32 partial sums of every logit, experts rounded up to four.

    Only an offer. With none, or with less than a configuration needs, the launcher takes another one; the bits are the
    same. Up to 64 tokens no configuration that needs it is the fastest, and where four partial sums are too large there
    are tiles enough without it (docs/kernels.md).
    """
    sums = _sums_of_a_token(experts) * tokens
    return sums if tokens > MOST_TOKENS_WITHOUT_WORKSPACE and sums <= MAX_WORKSPACE_BYTES else 0


def _sums_of_a_token(experts: int) -> int:
    return 4 * 4 * (-(-experts // 4) * 4)


def _workspace(tokens: int, experts: int) -> list[jax.ShapeDtypeStruct]:
    """What a call lends the kernel, if anything: a result, because a recorded CUDA graph uses what XLA's scratch frees.

    For a symbolic number of tokens it is `workspace_bytes` of the real one, and 16 bytes that are too few for any
    configuration: the launcher refuses an empty workspace that has an address.
    """
    if not jax.export.is_symbolic_dim(tokens):
        lent = workspace_bytes(tokens, experts)
        return [jax.ShapeDtypeStruct((lent,), np.uint8)] if lent else []
    sums = _sums_of_a_token(experts)
    wanted = jax.core.min_dim((tokens - 1) // MOST_TOKENS_WITHOUT_WORKSPACE, 1)
    fits = jax.core.min_dim(MAX_WORKSPACE_BYTES // sums // tokens, 1)
    return [jax.ShapeDtypeStruct((sums * tokens * wanted * fits + 16,), np.uint8)]


def router_gemm(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    *,
    out_dtype: DTypeLike,
    weight_layout: str = "experts_hidden",
    config: int | None = None,
) -> jax.Array:
    """`logits[T, E] = x[T, H] @ weight[E, H].T + bias[E]` by the Hopper kernel; a row's bits depend on the row alone.

    x and weight have one of the pairs of dtypes in MULTIPLIED; float32 is computed to float32 accuracy. A weight [H, E]
    is read as it is. `config` is a kernel configuration, None lets the launcher pick. Every layout and configuration
    gives the same bits. Tracing needs no library: lowering for CUDA works on any machine.
    """
    shape = x.shape[0], weight.shape[experts_axis(weight_layout)]
    results = [jax.ShapeDtypeStruct(shape, out_dtype), *_workspace(*shape)]
    kernel = jax.ffi.ffi_call(TARGET, results, vmap_method="sequential")
    operands = (x, weight) if bias is None else (x, weight, bias)
    attributes = {
        "config": np.int32(-1 if config is None else config),
        "weight_layout": np.int32(experts_axis(weight_layout)),
    }
    return kernel(*operands, **attributes)[0]


def route(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    correction_bias: jax.Array | None,
    expert_scale: jax.Array | None,
    experts: jax.Array | None,
    *,
    spec: RoutingSpec,
    return_logits: bool,
    weight_layout: str = "experts_hidden",
    config: int | None = None,
) -> Routing:
    """`routing.route_logits` of `router_gemm`'s logits, in one launch or two; a row's bits depend on the row alone.

    `config` is a configuration of routing, None lets the launcher pick; every configuration gives the same bits.
    """
    tokens, num_experts = x.shape[0], weight.shape[experts_axis(weight_layout)]
    results = [
        jax.ShapeDtypeStruct((tokens, spec.top_k), np.float32),
        jax.ShapeDtypeStruct((tokens, spec.top_k), np.int32),
        jax.ShapeDtypeStruct((tokens, num_experts), np.float32),
        *_workspace(tokens, num_experts),
    ]
    optional = (bias, correction_bias, expert_scale, experts)
    integers, floats = spec_numbers(spec)
    kernel = jax.ffi.ffi_call(ROUTE_TARGET, results, vmap_method="sequential")
    weights, selected, logits, *_ = kernel(
        x,
        weight,
        *(operand for operand in optional if operand is not None),
        operands=np.int32(sum(1 << i for i, operand in enumerate(optional) if operand is not None)),
        return_logits=np.int32(return_logits),
        config=np.int32(-1 if config is None else config),
        weight_layout=np.int32(experts_axis(weight_layout)),
        integers=integers,
        floats=floats,
    )
    return Routing(weights, selected, logits if return_logits else None)


def why_unsupported(problem: Problem, device: Device) -> str | None:
    """What the kernel does not take, from static facts; None if it takes the problem."""
    if device.platform != "gpu" or device.compute_capability is None:
        return f"needs an NVIDIA GPU of compute capability {COMPUTE_CAPABILITY}, this device is {device.description}"
    if device.compute_capability != COMPUTE_CAPABILITY:
        return f"needs compute capability {COMPUTE_CAPABILITY}, this device is {device.description}"
    if problem.dtypes not in MULTIPLIED:
        return (
            "needs x and weight both bfloat16, both float16 or both float32, or x in bfloat16 and weight in float32, "
            f"they are {' and '.join(problem.dtypes)}"
        )
    if problem.bias_dtype not in (None, problem.dtype, "float32"):
        return f"needs a bias in float32 or in x's dtype, it is {problem.bias_dtype}"
    if problem.out_dtype not in (problem.dtype, "float32"):
        return f"needs out_dtype float32 or x's dtype, it is {problem.out_dtype}"
    if problem.hidden % 8 != 0 or problem.hidden > MAX_HIDDEN:
        return f"needs hidden to be a multiple of 8 up to {MAX_HIDDEN}, it is {problem.hidden}"
    if problem.experts > MAX_EXPERTS:
        return f"needs at most {MAX_EXPERTS} experts, they are {problem.experts}"
    if problem.weight_layout == "hidden_experts" and problem.experts % 8 != 0:
        return f"needs experts to be a multiple of 8 in weights [hidden, experts], they are {problem.experts}"
    tiled = problem.tokens * -(-problem.experts // 8) * 8
    if not problem.symbolic and (problem.tokens > MAX_TOKENS or tiled >= MAX_TILED_LOGITS):
        return (
            f"needs at most {MAX_TOKENS} tokens and fewer than {MAX_TILED_LOGITS} logits, experts rounded up to eight, "
            f"they are {problem.tokens} and {tiled}"
        )
    return None if problem.spec is None else _why_not_routed(problem, problem.spec)


def _why_not_routed(problem: Problem, spec: RoutingSpec) -> str | None:
    """What the kernels behind the router GEMM do not take."""
    if problem.experts > MAX_ROUTED_EXPERTS:
        return f"routes among at most {MAX_ROUTED_EXPERTS} experts, they are {problem.experts}"
    if spec.top_k > MAX_TOP_K:
        return f"selects at most {MAX_TOP_K} experts, top_k is {spec.top_k}"
    if spec.num_groups is not None and spec.num_groups > MAX_GROUPS:
        return f"takes at most {MAX_GROUPS} groups, num_groups is {spec.num_groups}"
    return None


_lock = threading.RLock()
_library: ctypes.CDLL | None = None
_unavailable: str | None = None
_asked = False


def unavailable() -> str | None:
    """Why the kernel cannot run on this machine, with what to install, or None. The first call may compile it."""
    global _unavailable, _asked
    with _lock:
        if not _asked:
            try:
                _register(shared_library())
                _unavailable = None
            except Exception as error:  # whatever it is, the library goes on without this implementation
                _unavailable = f"could not be built or loaded: {error}"
            _asked = True
        return _unavailable


def shared_library() -> ctypes.CDLL:
    """The compiled library, loaded once, with its C interface declared: csrc/router_gemm.h, csrc/route.h.

    Raises:
      BuildError: it cannot be built or loaded; says what to install.
    """
    global _library
    with _lock:
        if _library is None:
            from jax_router import build

            _library = _declare(build.load_library())
        return _library


def config_names(operation: str) -> tuple[str, ...]:
    """The configurations of "router_gemm" or "route" by name; the place of one is what `config` takes.

    Raises:
      BuildError: as `shared_library`.
    """
    library = shared_library()
    count = getattr(library, f"jr_{operation}_num_configs")()
    return tuple(getattr(library, f"jr_{operation}_config_name")(index).decode() for index in range(count))


def call(name: str, *arguments: object) -> None:
    """Call a function of the kernels' library, as `call_in`.

    Raises:
      NotImplementedError: the kernel does not take the problem.
      RuntimeError: a CUDA call failed, or the library could not be built.
    """
    call_in(shared_library(), name, *arguments)


def call_in(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    """Call a function that returns a `jr_status` and writes a message: the last two arguments are added here.

    Raises:
      NotImplementedError: JR_UNSUPPORTED.
      RuntimeError: it failed.
    """
    message = ctypes.create_string_buffer(512)
    status = getattr(library, name)(*arguments, message, len(message))
    if status != 0:
        text = f"{name}: {message.value.decode(errors='replace')}"
        raise NotImplementedError(text) if status == 1 else RuntimeError(text)


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    args, route_args = ctypes.POINTER(RouterGemmArgs), ctypes.POINTER(RouteArgs)
    text, status = (ctypes.c_char_p, ctypes.c_size_t), ctypes.c_int
    # How many calls or launches and repeats; where the times go.
    timed = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_float), *text)
    signatures = {
        "jr_router_gemm": (status, (args, ctypes.c_void_p, *text)),
        "jr_router_gemm_naive": (status, (args, ctypes.c_void_p, *text)),
        "jr_router_gemm_num_configs": (ctypes.c_int, ()),
        "jr_router_gemm_config_name": (ctypes.c_char_p, (ctypes.c_int,)),
        "jr_router_gemm_config_fits": (ctypes.c_int, (ctypes.c_int, args)),
        "jr_router_gemm_pick_config": (ctypes.c_int, (args,)),
        "jr_route_num_configs": (ctypes.c_int, ()),
        "jr_route": (status, (route_args, ctypes.c_void_p, *text)),
        "jr_route_config_name": (ctypes.c_char_p, (ctypes.c_int,)),
        "jr_route_config_fits": (ctypes.c_int, (ctypes.c_int, route_args)),
        "jr_route_pick_config": (ctypes.c_int, (route_args,)),
        "jr_time_graph": (status, (ctypes.c_int, args, ctypes.c_int, *timed)),
        "jr_time_route_graph": (status, (route_args, ctypes.c_int, *timed)),
        "jr_time_host": (status, (ctypes.c_int, args, *timed)),
        "jr_time_route_host": (status, (route_args, *timed)),
        "jr_ffi_api_version": (ctypes.c_int, ()),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def _register(loaded: ctypes.CDLL) -> None:
    """Make the custom call known to XLA.

    Raises:
      RuntimeError: there is no CUDA backend, or the library was built for another FFI.
    """
    from jax_router import build

    built, running = loaded.jr_ffi_api_version(), build.ffi_version()
    if built != running:
        raise RuntimeError(
            f"the library was built for FFI version {built // 1000}.{built % 1000} and this jaxlib has "
            f"{running // 1000}.{running % 1000}. Run `jax-router build` with this jaxlib, and unset or renew "
            f"{build.LIBRARY_VARIABLE}."
        )
    jax.local_devices(backend="cuda")  # starts the backend, or raises
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(loaded.jr_ffi_router_gemm), platform="CUDA")
    jax.ffi.register_ffi_target(ROUTE_TARGET, jax.ffi.pycapsule(loaded.jr_ffi_route), platform="CUDA")
