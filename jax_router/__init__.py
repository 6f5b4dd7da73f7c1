"""The routing step of a Mixture-of-Experts layer in JAX: the right experts, the same bits, then the fastest routing."""

from jax_router.dispatch import Choice, Device, Problem, explain
from jax_router.models import models
from jax_router.ops import router_gemm

__version__ = "0.1.0"

__all__ = ["Choice", "Device", "Problem", "__version__", "explain", "models", "router_gemm"]
