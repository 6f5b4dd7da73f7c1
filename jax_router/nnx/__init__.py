"""The router as layers of Flax NNX, with LoRA. Needs flax, which `import jax_router` does not import."""

try:
    import flax.nnx as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"jax_router.nnx needs flax, but importing it failed: {error}. Install it, for example with "
        "pip install 'jax-router[flax]'."
    ) from error

from jax_router.nnx.layers import CorrectionBias, GateLinear, Router
from jax_router.nnx.lora import GateLinearLoRA, RouterLoRA

__all__ = ["CorrectionBias", "GateLinear", "GateLinearLoRA", "Router", "RouterLoRA"]
