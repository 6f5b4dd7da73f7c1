"""The CUDA kernels on CUDA tensors of PyTorch: the launchers that JAX calls, so the bits that JAX gets.

They are launched through the C interface on PyTorch's current stream. Nothing of PyTorch's is built, no JAX backend is
started, and both operations can be captured in CUDA graphs once the same call has run outside of a capture.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, NamedTuple

import torch

from jax_router import checks
from jax_router.dispatch import Device, Problem
from jax_router.implementations import WEIGHT_LAYOUTS, cuda, experts_axis
from jax_router.routing import RoutingSpec

ALIGNMENT = 16  # bytes, of x and weight: csrc/router_gemm.h


class Routing(NamedTuple):
    """What `route` returns: for every token k experts, the best first, and their weights."""

    weights: torch.Tensor  # float32 [..., k]
    experts: torch.Tensor  # int32 [..., k]
    logits: torch.Tensor | None = None  # float32 [..., E], if asked for


def router_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
    weight_layout: str = "experts_hidden",
) -> torch.Tensor:
    """`logits[..., E] = x[..., H] @ weight[E, H].T + bias[E]`, bit for bit as `jr.router_gemm(implementation="cuda")`.

    Args:
      x: hidden states `[..., H]`, bfloat16, float16 or float32. Leading axes are tokens: any number of them, or none.
        If it is not contiguous or not at a multiple of 16 bytes, it is copied on the GPU first.
      weight: `[E, H]` in x's dtype, or in float32 beside x in bfloat16; contiguous and at a multiple of 16 bytes,
        because it is never copied.
      bias: `[E]` in x's dtype or float32, contiguous, or None.
      out_dtype: float32 or x's dtype.
      weight_layout: "experts_hidden" for a weight `[E, H]`, "hidden_experts" for one `[H, E]`, contiguous as such.

    Returns:
      Logits `[..., E]` in `out_dtype` on x's device, written on its current stream. There is no gradient.

    Raises:
      TypeError: an argument is no tensor, out_dtype no dtype, or weight_layout no text.
      ValueError: tensors on several devices, that require a gradient, or that do not fit each other; an unknown layout.
      NotImplementedError: the kernel does not take this problem or this device; says why.
      RuntimeError: the library could not be built, or CUDA refused the launch.

    Source: `jax_router.router_gemm`, whose docstring has the contract.
    """
    problem = _checked(x, weight, {"bias": bias}, out_dtype, None, weight_layout)
    logits = torch.empty((*x.shape[:-1], problem.experts), dtype=out_dtype, device=x.device)
    if problem.tokens > 0:
        with torch.cuda.device(x.device):
            # Both are kept until the launch is enqueued. What is freed then is reused behind it on the same stream.
            rows, workspace = _rows(x, problem), _workspace(x, problem)
            arguments = _gemm_arguments(problem, rows, weight, bias, logits, workspace)
            cuda.call("jr_router_gemm", ctypes.byref(arguments), torch.cuda.current_stream(x.device).cuda_stream)
    return logits


def route(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    spec: RoutingSpec,
    correction_bias: torch.Tensor | None = None,
    expert_scale: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
    weight_layout: str = "experts_hidden",
    return_logits: bool = False,
) -> Routing:
    """The experts of every token and their weights, bit for bit as `jr.route(implementation="cuda")`.

    Args:
      x: hidden states `[..., H]`, bfloat16, float16 or float32. Leading axes are tokens: any number of them, or none.
        If it is not contiguous or not at a multiple of 16 bytes, it is copied on the GPU first.
      weight: `[E, H]` in x's dtype, or in float32 beside x in bfloat16; contiguous and at a multiple of 16 bytes,
        because it is never copied.
      bias: `[E]` in x's dtype or float32, contiguous, or None. Part of the logits.
      spec: the rule.
      correction_bias: `[E]` in x's dtype or float32, contiguous, or None. Moves the selection and not the weights.
      expert_scale: `[E]` in x's dtype or float32, contiguous, or None. Multiplies the weights.
      experts: `[..., k]` in int32 or int64, or None. The selection as given, to replay what was recorded here or in
        JAX. Ids are not checked, for that would wait for the GPU: one out of range comes back as it was given, its
        weight and every weight it is normalised with as NaN.
      weight_layout: as in `router_gemm`.
      return_logits: return the logits too, those of `router_gemm` bit for bit.

    Returns:
      `Routing(weights, experts, logits)`: float32 `[..., k]`, int32 `[..., k]` with the best expert first, and float32
      `[..., E]` or None, on x's device, written on its current stream. There are no gradients.

    Raises:
      TypeError: an argument is no tensor, spec no `RoutingSpec`, weight_layout no text, or return_logits no bool.
      ValueError: tensors on several devices, that require a gradient, or that do not fit each other; a spec that does
        not fit the number of experts; an unknown layout.
      NotImplementedError: the kernels do not take this problem or this device; says why.
      RuntimeError: the library could not be built, or CUDA refused the launch.

    Source: `jax_router.route`, whose docstring has the contract.
    """
    checks.flag("return_logits", return_logits)
    vectors = {"bias": bias, "correction_bias": correction_bias, "expert_scale": expert_scale}
    problem = _checked(x, weight, vectors, torch.float32, spec, weight_layout, experts)
    of_each = (*x.shape[:-1], spec.top_k)
    weights = torch.empty(of_each, dtype=torch.float32, device=x.device)
    selected = torch.empty(of_each, dtype=torch.int32, device=x.device)
    logits = torch.empty((*x.shape[:-1], problem.experts), dtype=torch.float32, device=x.device)
    if problem.tokens > 0:
        with torch.cuda.device(x.device):
            # As in router_gemm: kept until the launch is enqueued.
            rows, workspace = _rows(x, problem), _workspace(x, problem)
            replay = None if experts is None else experts.to(torch.int32).contiguous()
            arguments = cuda.RouteArgs.of(
                problem,
                gemm=_gemm_arguments(problem, rows, weight, bias, logits, workspace),
                weights=weights.data_ptr(),
                experts=selected.data_ptr(),
                correction_bias=_vector(correction_bias),
                expert_scale=_vector(expert_scale),
                replay=_address(replay),
                return_logits=return_logits,
            )
            cuda.call("jr_route", ctypes.byref(arguments), torch.cuda.current_stream(x.device).cuda_stream)
    return Routing(weights, selected, logits if return_logits else None)


# ---- Arguments of a launch ----------------------------------------------------------------------------------------


def _rows(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """x as contiguous, aligned rows `[tokens, hidden]`; a copy only where it has to be one."""
    rows = x.detach().reshape(problem.tokens, problem.hidden).contiguous()
    return rows if rows.data_ptr() % ALIGNMENT == 0 else rows.clone()


def _workspace(x: torch.Tensor, problem: Problem) -> torch.Tensor | None:
    lent = cuda.workspace_bytes(problem.tokens, problem.experts)
    return torch.empty(lent, dtype=torch.uint8, device=x.device) if lent else None


def _gemm_arguments(
    problem: Problem,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logits: torch.Tensor,
    workspace: torch.Tensor | None,
) -> cuda.RouterGemmArgs:
    return cuda.RouterGemmArgs.of(
        problem,
        x=rows.data_ptr(),
        weight=weight.data_ptr(),
        bias=_address(bias),
        out=logits.data_ptr(),
        workspace=_address(workspace),
        workspace_bytes=0 if workspace is None else workspace.numel(),
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _vector(tensor: torch.Tensor | None) -> tuple[int, str] | None:
    return None if tensor is None else (tensor.data_ptr(), _name(tensor.dtype))


def _name(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


# ---- Checks -------------------------------------------------------------------------------------------------------


def _device(device: torch.device) -> Device:
    """What the kernels' limits depend on."""
    return _cuda_device(device.index) if device.type == "cuda" else Device(device.type)


@functools.cache
def _cuda_device(index: int) -> Device:
    major, minor = torch.cuda.get_device_capability(index)
    return Device("gpu", torch.cuda.get_device_name(index), f"{major}.{minor}")


def _checked(
    x: Any,
    weight: Any,
    vectors: dict[str, Any],
    out_dtype: Any,
    spec: RoutingSpec | None,
    weight_layout: Any,
    experts: Any = None,
) -> Problem:
    """The problem that the arguments state, if they fit each other and the kernels take it."""
    of_experts = experts_axis(checks.layout(weight_layout))
    given = {"x": x, "weight": weight, **vectors, "experts": experts}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None or name in ("x", "weight")}
    for name, tensor in tensors.items():
        _is_usable(name, tensor, x)
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(
            f"out_dtype is {checks.describe(out_dtype)}. Expected torch.float32 or x's dtype; pass a torch.dtype."
        )
    if x.ndim < 1 or weight.ndim != 2 or weight.shape[1 - of_experts] != x.shape[-1] or 0 in weight.shape:
        other = WEIGHT_LAYOUTS[1 - of_experts]
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight has shape {tuple(weight.shape)}. Expected (..., hidden) and "
            f"{checks.shape_of_weight(weight_layout, 'hidden')}, both numbers at least 1; if your weight is "
            f'{checks.shape_of_weight(other, "hidden")}, pass weight_layout="{other}".'
        )
    tokens, hidden, count = math.prod(x.shape[:-1]), x.shape[-1], weight.shape[of_experts]
    for name in vectors.keys() & tensors.keys():
        checks.one_per_expert(name, tensors[name], count)
    for name in tensors.keys() - {"x", "experts"}:
        _is_in_place(name, tensors[name])
    for name in tensors.keys() & {"correction_bias", "expert_scale"}:
        if tensors[name].dtype not in (x.dtype, torch.float32):
            raise ValueError(
                f"{name} is {tensors[name].dtype} but x is {x.dtype}. Expected x's dtype or torch.float32; pass "
                f"{name}.to(x.dtype)."
            )
    bias = tensors.get("bias")
    problem = Problem(
        tokens=tokens,
        hidden=hidden,
        experts=count,
        dtype=_name(x.dtype),
        weight_dtype=_name(weight.dtype),
        bias_dtype=None if bias is None else _name(bias.dtype),
        out_dtype=_name(out_dtype),
        spec=spec,
        weight_layout=weight_layout,
    )
    if spec is not None:
        checks.spec_fits(spec, count)
        _are_ids(experts, (*x.shape[:-1], spec.top_k))
    if (reason := cuda.why_unsupported(problem, _device(x.device))) is not None:
        raise NotImplementedError(
            f"{problem.operation} of these tensors {reason}. Pass what it takes, or use PyTorch's own operations, "
            "whose bits are others."
        )
    return problem


def _is_usable(name: str, tensor: Any, x: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"{name} is {checks.describe(tensor)}. Expected a torch.Tensor on a GPU; convert it, for example with "
            f'torch.as_tensor({name}, device="cuda").'
        )
    if tensor.device != x.device:
        raise ValueError(
            f"{name} is on {tensor.device} but x is on {x.device}. Expected one device; pass {name}.to(x.device)."
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient. Expected tensors without, because the kernels have none; call under "
            "torch.no_grad(), or differentiate jax_router.route in JAX."
        )


def _is_in_place(name: str, tensor: torch.Tensor) -> None:
    """Check that the kernels can read a parameter where it is: to copy it in every call would go unnoticed."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}. Expected it to be contiguous; call "
            f"{name}.contiguous() once, where it is loaded."
        )
    if name == "weight" and tensor.data_ptr() % ALIGNMENT != 0:
        raise ValueError(
            f"weight begins {tensor.data_ptr() % ALIGNMENT} bytes behind a multiple of {ALIGNMENT}. Expected none; "
            "call weight.clone() once, where it is loaded."
        )


def _are_ids(experts: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if experts is None:
        return
    if experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"experts is {experts.dtype}. Expected torch.int32 or torch.int64; pass experts.to(torch.int32)."
        )
    if experts.shape != shape:
        raise ValueError(
            f"experts has shape {tuple(experts.shape)} but x and spec ask for {shape}. Expected the tokens of x in the "
            f"leading axes and top_k={shape[-1]} ids in the last; pass one id for every weight."
        )
