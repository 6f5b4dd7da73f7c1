"""The implementations: `xla`, `pallas` and `cuda`, three modules with one signature.

Each module has

    router_gemm(x, weight, bias, *, out_dtype, weight_layout="experts_hidden", config=None)
        x [T, H] with T >= 1, weight [E, H] or, as weight_layout says, [H, E], bias [E] or None -> logits [T, E] in
        out_dtype; traceable
    route(x, weight, bias, correction_bias, expert_scale, experts, *, spec, return_logits,
          weight_layout="experts_hidden", config=None)
        x, weight and bias as above, correction_bias [E] or None, expert_scale [E] or None, experts [T, k] (int32) to
        replay or None to select, spec a RoutingSpec that fits E -> Routing; logits None unless return_logits
    why_unsupported(problem, device)
        what this implementation does not take, from static facts; None if it takes it
    unavailable()
        why it cannot run on this machine although the problem fits; None if it can. May build, and remembers

A reason completes a sentence that starts with the implementation: "needs compute capability 9.0, this device is ...".
Nothing heavy is imported with the package: a module is loaded when the dispatcher first asks for it.
"""

import importlib
from types import ModuleType

NAMES = ("cuda", "pallas", "xla")
WEIGHT_LAYOUTS = ("experts_hidden", "hidden_experts")  # the axes of a weight; the other order holds its transpose


def experts_axis(weight_layout: str) -> int:
    """Which axis of a weight is experts, in one of `WEIGHT_LAYOUTS`, and its number in `jr_weight_layout`."""
    return WEIGHT_LAYOUTS.index(weight_layout)


def load(name: str) -> ModuleType:
    """The module of the implementation called `name`, one of `NAMES`."""
    return importlib.import_module(f"jax_router.implementations.{name}")
