"""The Mixture-of-Experts block of DeepSeek-V3: router, routed experts and shared experts, without capacity limits.

    routing = router(x)                                  # sigmoid, groups, correction bias: jax_router.nnx.Router
    y = sum over the k experts of weight * MLP(x) + shared MLP(x),  MLP(x) = down(silu(gate(x)) * up(x))

Parity with `DeepseekV3MoE` of Hugging Face transformers 5.23, forward and backward, is in tests/test_deepseek_v3.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

import jax_router as jr
from jax_router.nnx import Router

HIGHEST = jax.lax.Precision.HIGHEST  # float32 is multiplied as float32; 16-bit operands do not ask


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), without biases, in x's dtype between the products."""

    def __init__(self, hidden: int, intermediate: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        options: dict[str, Any] = {"use_bias": False, "param_dtype": param_dtype, "precision": HIGHEST, "rngs": rngs}
        self.gate_proj = nnx.Linear(hidden, intermediate, **options)
        self.up_proj = nnx.Linear(hidden, intermediate, **options)
        self.down_proj = nnx.Linear(intermediate, hidden, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nnx.Module):
    """The routed experts. Every pair of a token and one of its experts is a row; rows are sorted by expert.

    Attributes:
      gate_up_proj: `[E, H, 2 I]`, the gate's columns before those of up.
      down_proj: `[E, I, H]`.
    Both are transposed against the checkpoint, as `jax.lax.ragged_dot` multiplies rows.
    """

    def __init__(self, experts: int, hidden: int, intermediate: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        initializer = nnx.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        self.gate_up_proj = nnx.Param(initializer(rngs.params(), (experts, hidden, 2 * intermediate), param_dtype))
        self.down_proj = nnx.Param(initializer(rngs.params(), (experts, intermediate, hidden), param_dtype))

    def __call__(self, x: jax.Array, routing: jr.Routing) -> jax.Array:
        """`[T, H]`, the weighted sum in float32 of the experts of each token, rounded to x's dtype once."""
        (tokens, top_k), hidden = routing.experts.shape, x.shape[-1]
        expert_of_pair = routing.experts.reshape(-1)
        order = jnp.argsort(expert_of_pair)
        rows_of_expert = jnp.bincount(expert_of_pair, length=self.gate_up_proj.shape[0])

        def multiply(rows: jax.Array, matrices: nnx.Param) -> jax.Array:
            options = {"precision": HIGHEST, "preferred_element_type": jnp.float32}
            return jax.lax.ragged_dot(rows, matrices[...], rows_of_expert, **options).astype(x.dtype)

        rows = jnp.repeat(x, top_k, axis=0).at[order].get(unique_indices=True)
        gate, up = jnp.split(multiply(rows, self.gate_up_proj), 2, axis=-1)
        outputs = multiply(jax.nn.silu(gate) * up, self.down_proj).astype(jnp.float32)
        of_pairs = jnp.zeros_like(outputs).at[order].set(outputs, unique_indices=True).reshape(tokens, top_k, hidden)
        return (of_pairs * routing.weights[..., None]).sum(axis=1).astype(x.dtype)


class MoE(nnx.Module):
    """The block of a configuration.

    Args:
      config: a `DeepseekV3Config` of transformers, or anything with its fields.
      param_dtype: of all parameters but the router's correction bias, which is float32.
      implementation: of the router, as in `jax_router.route`.
      rngs: its stream `params` makes the parameters.

    Attributes: `router`, `experts`, `shared_experts`.

    Raises:
      NotImplementedError: an activation other than silu, no shared expert, or a router that no `RoutingSpec` expresses.
    """

    def __init__(
        self,
        config: Any,
        *,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | Sequence[str] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if config.hidden_act != "silu":
            raise NotImplementedError(f"hidden_act is {config.hidden_act!r}. Expected 'silu', as DeepSeek-V3 has it.")
        if not config.n_shared_experts:
            raise NotImplementedError(f"n_shared_experts is {config.n_shared_experts!r}. Expected at least 1.")
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        hidden, experts, intermediate = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        self.router = Router(
            hidden,
            experts,
            spec=jr.RoutingSpec.from_hf_config(config),
            use_correction_bias=True,
            implementation=implementation,
            **options,
        )
        self.experts = Experts(experts, hidden, intermediate, **options)
        self.shared_experts = MLP(hidden, intermediate * config.n_shared_experts, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., H]` in x's dtype, of hidden states `[..., H]` in that of the parameters."""
        tokens = x.reshape(-1, x.shape[-1])
        routed = self.experts(tokens, self.router(tokens))
        return routed.reshape(x.shape) + self.shared_experts(x)

    def load(self, state: Mapping[str, ArrayLike]) -> None:
        """Take the parameters of a `DeepseekV3MoE`, by the names and in the layout of its `state_dict()`.

        A block made by `nnx.eval_shape` takes them too, and so need not make its own first.

        Args:
          state: arrays; they are cast to the dtypes of the parameters.

        Raises:
          ValueError: a name that is missing or unknown, or a shape that does not fit.
        """
        places = self.places()
        missing, unknown = sorted(places.keys() - state.keys()), sorted(state.keys() - places.keys())
        if missing or unknown:
            raise ValueError(f"state lacks {missing} and has the unknown {unknown}. Expected {sorted(places)}.")
        loaded = {}
        for name, (variable, transposed) in places.items():
            array = jnp.asarray(state[name])
            expected = variable.shape[:-2] + variable.shape[:-3:-1] if transposed else variable.shape
            if array.shape != expected:
                raise ValueError(f"state[{name!r}] has shape {array.shape}. Expected {expected}.")
            loaded[name] = (array.mT if transposed else array).astype(variable.dtype)
        for name, (variable, _) in places.items():
            variable.set_value(loaded[name])

    def places(self) -> dict[str, tuple[nnx.Variable, bool]]:
        """By the name in the checkpoint, the variable, and whether its last two axes are swapped there."""
        router, experts = self.router, self.experts
        assert router.correction_bias is not None  # it is made with one
        places: dict[str, tuple[nnx.Variable, bool]] = {
            "gate.weight": (router.kernel, False),
            "gate.e_score_correction_bias": (router.correction_bias, False),
            "experts.gate_up_proj": (experts.gate_up_proj, True),
            "experts.down_proj": (experts.down_proj, True),
        }
        for name in ("gate_proj", "up_proj", "down_proj"):
            places[f"shared_experts.{name}.weight"] = (getattr(self.shared_experts, name).kernel, True)
        return places
