"""`GateLinear` and `Router`: the operations with their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jax_router import checks, checks_nnx
from jax_router.implementations import experts_axis
from jax_router.ops import route, router_gemm
from jax_router.routing import Routing, RoutingSpec

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
default_kernel_init: Initializer = nnx.initializers.lecun_normal()  # that of nnx.Linear
default_bias_init: Initializer = nnx.initializers.zeros_init()
NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class CorrectionBias(nnx.Variable):
    """The bias that balances experts without a loss: `[E]` float32, moved by assignment and by no gradient.

    It is no `nnx.Param`: an optimizer or `nnx.grad` over `nnx.Param` leaves it as it is.

    >>> import jax_router as jr
    >>> spec = RoutingSpec(top_k=1, score_function="sigmoid")
    >>> router = Router(8, 4, spec=spec, use_correction_bias=True, rngs=nnx.Rngs(0))
    >>> @nnx.jit
    ... def balance(router, x):
    ...     counts = jr.tokens_per_expert(router(x).experts, router.experts).astype(jnp.float32)
    ...     router.correction_bias[...] += 0.5 * jnp.sign(counts.mean() - counts)
    >>> balance(router, jnp.ones((16, 8)))  # all tokens to one expert, whose bias falls
    >>> router.correction_bias[...].sort()
    Array([-0.5,  0.5,  0.5,  0.5], dtype=float32)

    Source: "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664).
    """


class _Gate(nnx.Module):
    """The parameters of a router GEMM and what its calls have in common."""

    def __init__(
        self,
        hidden: int,
        experts: int,
        *,
        use_bias: bool,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        kernel_init: Initializer,
        bias_init: Initializer,
        kernel_metadata: Mapping[str, Any],
        bias_metadata: Mapping[str, Any],
        weight_layout: str,
        implementation: str | Sequence[str] | None,
        rngs: nnx.Rngs,
    ) -> None:
        self.hidden = checks.size("hidden", hidden)
        self.experts = checks.size("experts", experts)
        checks.flag("use_bias", use_bias)
        self.dtype = None if dtype is None else jnp.dtype(checks.input_dtype("dtype", dtype))
        self.param_dtype = jnp.dtype(checks.input_dtype("param_dtype", param_dtype))
        checks_nnx.initializer("kernel_init", kernel_init)
        checks_nnx.initializer("bias_init", bias_init)
        self.weight_layout = checks.layout(weight_layout)
        checks_nnx.metadata(kernel_metadata=kernel_metadata, bias_metadata=bias_metadata)
        checks_nnx.rngs("rngs", rngs)
        names = checks.implementation_names(implementation)
        self.implementation = implementation if isinstance(implementation, str) else names  # a list is no static field
        made = kernel_init(rngs.params(), (hidden, experts), self.param_dtype)
        kernel = checks_nnx.initial("kernel_init", made, "kernel_metadata")
        self.kernel = nnx.Param(kernel.T if experts_axis(weight_layout) == 0 else kernel, **kernel_metadata)
        self.bias: nnx.Param | None = nnx.data(None)
        if use_bias:
            bias = checks_nnx.initial(
                "bias_init", bias_init(rngs.params(), (experts,), self.param_dtype), "bias_metadata"
            )
            self.bias = nnx.Param(bias, **bias_metadata)

    def _operands(self, x: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """x, kernel and bias as `route` takes them."""
        x = checks_nnx.hidden_states(x, self.hidden, self.dtype)
        kernel = checks_nnx.kernel(self.kernel[...], self.hidden, self.experts, self.weight_layout)
        bias = None if self.bias is None else checks.as_array("bias", self.bias[...])
        if self.dtype is None:
            checks_nnx.parameters_fit(x, kernel=kernel, bias=bias)
            return x, kernel, bias
        return x, kernel.astype(self.dtype), None if bias is None else bias.astype(self.dtype)

    def _options(self) -> dict[str, Any]:
        """What `router_gemm` and `route` have in common."""
        return {"weight_layout": self.weight_layout, "implementation": self.implementation}


class GateLinear(_Gate):
    """The logits of a router: `jax_router.router_gemm` with its parameters.

        logits[..., E] = x[..., H] @ kernel[E, H].T + bias[E]

    >>> layer = GateLinear(8, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    >>> logits = layer(jnp.ones((3, 8)))
    >>> layer.kernel.shape, logits.shape, logits.dtype
    ((4, 8), (3, 4), dtype('float32'))

    Args:
      hidden, experts: H and E.
      use_bias: whether there is a bias.
      dtype: bfloat16, float16 or float32, to which x, kernel and bias are cast. None takes them as they are: kernel and
        bias in x's dtype or in float32.
      param_dtype: of kernel and bias when they are made; float32 unless said otherwise, as in `nnx.Linear`.
      out_dtype: of the logits: float32 or that of x after the cast.
      kernel_init: called with the shape (H, E) whatever the layout, as that of `nnx.Linear`.
      bias_init: called with the shape (E,).
      kernel_metadata, bias_metadata: of the variables, for example a sharding, by axes of the kernel as stored.
      weight_layout: "experts_hidden" for a kernel `[E, H]`, as checkpoints hold it, "hidden_experts" for one `[H, E]`,
        as that of `nnx.Linear` is.
      implementation: as in `jax_router.router_gemm`.
      rngs: its stream `params` makes the parameters.

    Attributes: `kernel` and `bias` (`nnx.Param`, bias None without one); all others are static.

    Raises:
      TypeError, ValueError: an argument that makes no sense; when called, an x or a parameter that does not fit.
      NotImplementedError: when called, if no implementation named takes the problem; says why.
    """

    def __init__(
        self,
        hidden: int,
        experts: int,
        *,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        out_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        weight_layout: str = "experts_hidden",
        implementation: str | Sequence[str] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.out_dtype = jnp.dtype(checks.input_dtype("out_dtype", out_dtype))
        super().__init__(
            hidden,
            experts,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            weight_layout=weight_layout,
            implementation=implementation,
            rngs=rngs,
        )

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Logits `[..., E]` in `out_dtype` of hidden states `[..., H]`."""
        return router_gemm(*self._operands(x), out_dtype=self.out_dtype, **self._options())


class Router(_Gate):
    """A router: `jax_router.route` with its parameters.

        logits[..., E] = x[..., H] @ kernel[E, H].T + bias[E], then the rule of spec

    >>> spec = RoutingSpec(top_k=2, score_function="softmax_topk")
    >>> router = Router(8, 4, spec=spec, use_bias=True, rngs=nnx.Rngs(0))
    >>> routing = router(jnp.ones((3, 8)))
    >>> routing.experts.shape, routing.weights.dtype
    ((3, 2), dtype('float32'))
    >>> {name: each.shape for name, each in nnx.to_pure_dict(nnx.state(router)).items()}
    {'bias': (4,), 'kernel': (4, 8)}

    Args:
      hidden, experts: H and E.
      spec: the rule.
      use_bias: whether there is a bias, part of the logits.
      use_correction_bias: whether there is a correction bias, a `CorrectionBias` of zeros. It moves the selection and
        not the weights, and is not trained.
      use_expert_scale: whether there is a scale that multiplies the weights of each expert, of ones when made.
      dtype: bfloat16, float16 or float32, to which x, kernel and bias are cast. None takes them as they are: kernel and
        bias in x's dtype or in float32.
      param_dtype: of kernel, bias and expert_scale when they are made; correction_bias is float32.
      kernel_init: called with the shape (H, E) whatever the layout, as that of `nnx.Linear`.
      bias_init: called with the shape (E,).
      kernel_metadata, bias_metadata: of the variables, for example a sharding, by axes of the kernel as stored.
      weight_layout: "experts_hidden" for a kernel `[E, H]`, as checkpoints hold it, "hidden_experts" for one `[H, E]`,
        as that of `nnx.Linear` is.
      implementation: as in `jax_router.route`.
      rngs: its stream `params` makes the parameters.

    Attributes: `kernel`, `bias` and `expert_scale` (`nnx.Param`) and `correction_bias` (`CorrectionBias`), None where
    there is none; all others are static.

    Raises:
      TypeError, ValueError: an argument that makes no sense; when called, an array that does not fit.
      NotImplementedError: when called, if no implementation named takes the problem; says why.
    """

    def __init__(
        self,
        hidden: int,
        experts: int,
        *,
        spec: RoutingSpec,
        use_bias: bool = False,
        use_correction_bias: bool = False,
        use_expert_scale: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        weight_layout: str = "experts_hidden",
        implementation: str | Sequence[str] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            hidden,
            experts,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            weight_layout=weight_layout,
            implementation=implementation,
            rngs=rngs,
        )
        checks.spec_fits(spec, experts)
        checks.flag("use_correction_bias", use_correction_bias)
        checks.flag("use_expert_scale", use_expert_scale)
        self.spec = spec
        self.correction_bias: CorrectionBias | None = nnx.data(None)
        if use_correction_bias:
            self.correction_bias = CorrectionBias(jnp.zeros(experts, jnp.float32))
        self.expert_scale: nnx.Param | None = nnx.data(None)
        if use_expert_scale:
            self.expert_scale = nnx.Param(jnp.ones(experts, self.param_dtype))

    def __call__(self, x: ArrayLike, *, experts: ArrayLike | None = None, return_logits: bool = False) -> Routing:
        """`Routing(weights, experts, logits)` of hidden states, as `jax_router.route` returns it.

        Args:
          x: `[..., H]`.
          experts: `[..., k]`, a recorded selection to replay, or None to select.
          return_logits: return the float32 logits `[..., E]` too.
        """
        x, kernel, bias = self._operands(x)
        vectors = {"correction_bias": self._correction_bias(), "expert_scale": self._expert_scale()}
        options = {**vectors, **self._options()}
        return route(x, kernel, bias, spec=self.spec, experts=experts, return_logits=return_logits, **options)

    # Both in float32, in which route computes with them anyway: they fit x in any dtype.
    def _correction_bias(self) -> jax.Array | None:
        return None if self.correction_bias is None else _in_float32("correction_bias", self.correction_bias)

    def _expert_scale(self) -> jax.Array | None:
        return None if self.expert_scale is None else _in_float32("expert_scale", self.expert_scale)


def _in_float32(name: str, variable: nnx.Variable) -> jax.Array:
    return checks.as_array(name, variable[...]).astype(jnp.float32)
