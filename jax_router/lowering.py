"""Kernels of Pallas in a module that is lowered for several platforms, as `jax.export` may ask for.

Imported where such a kernel is picked: `jax.extend` imports Pallas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import mlir

_for_cuda_p = core.Primitive("jax_router_for_cuda")
_for_cuda_p.multiple_results = True


def for_cuda_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, lowered as if for CUDA alone, to be a branch of `platform_dependent` that nothing else runs.

    Pallas looks at the platforms of the whole module, not at those of the branch that it is in, and refuses several.
    """

    def called(*operands: Any) -> Any:
        flat, structure = jax.tree.flatten(operands)
        trace = jax.make_jaxpr(lambda *flat: function(*jax.tree.unflatten(structure, flat)), return_shape=True)
        jaxpr, results = trace(*flat)
        return jax.tree.unflatten(jax.tree.structure(results), _for_cuda_p.bind(*flat, jaxpr=jaxpr))

    return called


@_for_cuda_p.def_impl
def _run(*operands: jax.Array, jaxpr: core.ClosedJaxpr) -> Any:
    return core.jaxpr_as_fun(jaxpr)(*operands)


@_for_cuda_p.def_abstract_eval
def _results(*_: Any, jaxpr: core.ClosedJaxpr) -> Any:
    return jaxpr.out_avals


def _lower(context: Any, *operands: Any, jaxpr: core.ClosedJaxpr) -> Any:
    return mlir.lower_fun(core.jaxpr_as_fun(jaxpr))(context.replace(platforms=("cuda",)), *operands)


mlir.register_lowering(_for_cuda_p, _lower)
