"""An independent PyTorch reference of the router: what the library is checked against, and never a part of it.

Neither package imports the other, so that no mistake can be shared.
"""

from torch_ref.convert import to_numpy, to_torch
from torch_ref.linear import ReplicatedLinear, router_gemm_float64
from torch_ref.routing import route_float64

__all__ = ["ReplicatedLinear", "route_float64", "router_gemm_float64", "to_numpy", "to_torch"]
