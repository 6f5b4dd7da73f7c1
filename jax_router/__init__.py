"""The routing step of a Mixture-of-Experts layer in JAX: the right experts, the same bits, then the fastest routing."""

from jax_router.dispatch import Choice, Device, Problem, explain
from jax_router.losses import load_balancing_loss, router_z_loss, tokens_per_expert
from jax_router.models import models
from jax_router.ops import route, router_gemm
from jax_router.routing import Routing, RoutingSpec
from jax_router.verification import verify

__version__ = "0.1.0"

__all__ = [
    "Choice",
    "Device",
    "Problem",
    "Routing",
    "RoutingSpec",
    "__version__",
    "explain",
    "load_balancing_loss",
    "models",
    "route",
    "router_gemm",
    "router_z_loss",
    "tokens_per_expert",
    "verify",
]
