"""LoRA for routers: a low-rank update of the logits of a layer that stays as it is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jax_router import checks, checks_nnx, partitioning
from jax_router.implementations import experts_axis
from jax_router.nnx.layers import NO_METADATA, GateLinear, Initializer, Router
from jax_router.ops import route, router_gemm
from jax_router.routing import Routing, RoutingSpec, is_each, round_logits

Base = TypeVar("Base", GateLinear, Router)
default_a_initializer: Initializer = nnx.initializers.he_uniform()  # these two are those of nnx.LoRA
default_b_initializer: Initializer = nnx.initializers.zeros_init()


@jax.custom_jvp
def _with_gradient_of(value: jax.Array, path: jax.Array) -> jax.Array:
    """`value`, bit for bit, differentiated as if it were `path`."""
    del path
    return value


@_with_gradient_of.defjvp
def _(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _with_gradient_of(*primals), tangents[1]


# By A and by B, to float32 accuracy. The backward pass keeps x in its own dtype.
_product = functools.partial(router_gemm, weight_layout="hidden_experts", implementation="xla")


@functools.partial(jax.jit, static_argnames="scale")
def _with_update(
    logits: jax.Array,
    x: jax.Array,
    adapter: jax.Array | None,
    lora_a: jax.Array,
    lora_b: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The base's logits with the update, and which tokens have one `[..., 1]`; the others have the base's bits.

    The gradient is everywhere that of the sum: B gets one while it is still zero.
    """
    if adapter is None:
        update, silent = _product(_product(x, lora_a), lora_b), (lora_b == 0).all()
    else:
        update, silent = _update_of_each(x, adapter, lora_a, lora_b)
    update = scale * update
    total = logits + update
    # A zero B is silent also where x is infinite and the product NaN.
    has_update = (update != 0).any(-1, keepdims=True) & ~silent
    return _with_gradient_of(jnp.where(has_update, total, logits), total), has_update


def _update_of_each(
    x: jax.Array, adapter: jax.Array, lora_a: jax.Array, lora_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """x @ A @ B of each token's adapter `[..., E]`, zero without one, and which tokens' B is zero `[..., 1]`."""
    # All adapters for every token, and the others' columns masked: A is copied once, to [H, n*r], and h is [T, n*r].
    # Gathering A would write and read [T, H, r], more than that from T = n tokens on; ragged_dot needs tokens sorted by
    # adapter, and where XLA has no kernel for it JAX makes n masked copies of x. For many tokens this multiplies n
    # times as often as needed, as much as a router of n * r experts.
    number, hidden, rank = lora_a.shape
    mine = is_each(adapter, number)
    # 0 * NaN is NaN: one adapter's infinities and NaN would reach the tokens of all, or their gradients. They stay with
    # its own.
    finite_a, finite_b = jnp.isfinite(lora_a), jnp.isfinite(lora_b)
    h = _product(x, jnp.where(finite_a, lora_a, 0).transpose(1, 0, 2).reshape(hidden, number * rank))
    h = jnp.where(mine[..., None], h.reshape(*mine.shape, rank), 0).reshape(h.shape)
    update = _product(h, jnp.where(finite_b, lora_b, 0).reshape(number * rank, -1))
    broken_columns = (~finite_b).any(1) | (~finite_a).any((1, 2))[:, None]
    broken = _product(mine.astype(jnp.float32), broken_columns.astype(jnp.float32)) > 0
    broken |= (adapter >= number)[..., None]
    silent = (mine & (lora_b == 0).all((1, 2))).any(-1, keepdims=True)
    return jnp.where(partitioning.sharded_as(broken, update), jnp.nan, update), silent


@functools.partial(jax.jit, static_argnames=("replayed", "spec", "scale", "weight_layout"))
def _route_with_update(
    routing: Routing,
    operands: tuple[jax.Array, jax.Array, jax.Array | None],
    vectors: tuple[jax.Array | None, jax.Array | None],
    adapters: tuple[jax.Array | None, jax.Array, jax.Array],
    *,
    replayed: bool,
    spec: RoutingSpec,
    scale: float,
    weight_layout: str,
) -> Routing:
    """The base's routing where a token has no update, else the specification of the sum; the gradient is of the sum.

    The routing comes without a gradient, and nothing is kept for one. That of its logits is taken from another router
    GEMM, whose value nothing reads, so that it is not computed: through `route` the weights' would go along, NaN where
    the base's weights are.
    """
    (x, *_), (correction_bias, expert_scale) = operands, vectors
    path = router_gemm(*operands, weight_layout=weight_layout, implementation="xla")
    assert routing.logits is not None
    path = partitioning.sharded_as(path, routing.logits)  # which is on every device, however experts are split
    logits, has_update = _with_update(_with_gradient_of(routing.logits, path), x, *adapters, scale=scale)
    rounded, rule = logits, replace(spec, round_logits=False)
    if spec.round_logits:
        rounded = round_logits(logits, x.dtype)
    experts = routing.experts
    if not replayed:
        frozen = jax.lax.stop_gradient(rounded)
        _, selected = partitioning.route_by_tokens(frozen, correction_bias, None, None, spec=rule, dtype="float32")
        experts = jnp.where(has_update, selected, experts)
    weights, _ = partitioning.route_by_tokens(rounded, None, expert_scale, experts, spec=rule, dtype="float32")
    weights = _with_gradient_of(jnp.where(has_update, weights, routing.weights), weights)
    return Routing(weights, experts, logits)


class _LoRA(nnx.Module, Generic[Base]):
    """A layer with adapters beside it, and their update of its logits."""

    kind: ClassVar[type]  # of base

    def __init__(
        self,
        base: Base,
        rank: int,
        *,
        alpha: float | None = None,
        num_adapters: int | None = None,
        freeze_base: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        a_metadata: Mapping[str, Any] = NO_METADATA,
        b_metadata: Mapping[str, Any] = NO_METADATA,
        rngs: nnx.Rngs,
    ) -> None:
        checks_nnx.layer("base", base, self.kind)
        self.base: Base = base
        self.rank = checks.size("rank", rank)
        self.alpha = float(rank) if alpha is None else checks_nnx.finite_number("alpha", alpha)
        self.num_adapters = None if num_adapters is None else checks.size("num_adapters", num_adapters)
        checks.flag("freeze_base", freeze_base)
        self.freeze_base = freeze_base
        self.param_dtype = jnp.dtype(checks.input_dtype("param_dtype", param_dtype))
        checks_nnx.initializer("a_initializer", a_initializer)
        checks_nnx.initializer("b_initializer", b_initializer)
        checks_nnx.metadata(a_metadata=a_metadata, b_metadata=b_metadata)
        checks_nnx.rngs("rngs", rngs)

        def initial(name: str, initializer: Initializer, *shape: int) -> jax.Array:
            def of_one(key: jax.Array) -> jax.Array:
                made = initializer(key, shape, self.param_dtype)
                return checks_nnx.initial(f"{name}_initializer", made, f"{name}_metadata")

            if num_adapters is None:
                return of_one(rngs.params())
            keys = jax.random.split(rngs.params(), num_adapters)  # each as one alone: the fan-in is H, not n * H
            return jax.vmap(of_one)(keys)

        self.lora_a = nnx.LoRAParam(initial("a", a_initializer, base.hidden, rank), **a_metadata)
        self.lora_b = nnx.LoRAParam(initial("b", b_initializer, rank, base.experts), **b_metadata)

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied with: alpha / rank."""
        return self.alpha / self.rank

    def merge(self, adapter: int | None = None) -> Base:
        """A plain layer with the kernel `kernel + scale * (A @ B)`, in the layout and dtype of the base's.

        It has variables of its own, which may share buffers with those of the base: donate neither. The sum is computed
        in float32 and rounded once to the kernel's dtype: of a 16-bit kernel that makes other logits than the update
        beside the base, and so at times other experts.

        Args:
          adapter: which one, from 0, if there are several.

        Raises:
          TypeError, ValueError: adapter is no adapter of this layer, or missing.
        """
        adapter = checks_nnx.one_adapter(adapter, self.num_adapters)
        lora_a, lora_b = (each if adapter is None else each[adapter] for each in self._matrices())
        merged = nnx.clone(self.base)
        kernel = checks.as_array("kernel", merged.kernel[...])
        update = self.scale * _product(lora_a, lora_b)
        update = update.T if experts_axis(merged.weight_layout) == 0 else update
        merged.kernel.set_value((kernel.astype(jnp.float32) + update).astype(kernel.dtype))
        return merged

    def _matrices(self) -> tuple[jax.Array, jax.Array]:
        """A `[H, r]` and B `[r, E]`, or of several adapters `[n, H, r]` and `[n, r, E]`, in float32."""
        stack: tuple[int, ...] = () if self.num_adapters is None else (self.num_adapters,)
        lora_a = checks_nnx.parameter("lora_a", self.lora_a[...], (*stack, self.base.hidden, self.rank))
        lora_b = checks_nnx.parameter("lora_b", self.lora_b[...], (*stack, self.rank, self.base.experts))
        return lora_a.astype(jnp.float32), lora_b.astype(jnp.float32)

    def _operands(self, x: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """x, kernel and bias as `route` takes them."""
        hidden_states, kernel, bias = self.base._operands(x)
        if self.freeze_base:
            kernel, bias = jax.lax.stop_gradient((kernel, bias))
        return hidden_states, kernel, bias

    def _adapters(self, x: jax.Array, adapter: Any) -> tuple[jax.Array | None, jax.Array, jax.Array]:
        """Which adapter each token has, None of one for all, and A and B."""
        return checks_nnx.adapters(adapter, x.shape[:-1], self.num_adapters), *self._matrices()


class GateLinearLoRA(_LoRA[GateLinear]):
    """A `GateLinear` with a low-rank update beside it.

        logits[..., E] = base(x) + alpha / rank * x[..., H] @ A[H, r] @ B[r, E]

    >>> base = GateLinear(8, 4, rngs=nnx.Rngs(0))
    >>> layer = GateLinearLoRA(base, 2, rngs=nnx.Rngs(1))
    >>> x = jnp.ones((3, 8))
    >>> bool((layer(x) == base(x)).all())  # B is zero
    True
    >>> layer.lora_b[...] += 1
    >>> bool(jnp.allclose(layer(x), layer.merge()(x), rtol=1e-5))
    True

    The arguments are those of `RouterLoRA`, but that base is a `GateLinear`. The update is computed and added in
    float32, and the sum rounded once to the base's out_dtype.
    """

    kind = GateLinear

    def __call__(self, x: ArrayLike, *, adapter: ArrayLike | None = None) -> jax.Array:
        """Logits `[..., E]` in the base's out_dtype of hidden states `[..., H]`.

        Args:
          x: `[..., H]`.
          adapter: `[...]` as in `RouterLoRA`.
        """
        hidden_states, kernel, bias = self._operands(x)
        checks.dtypes_fit(hidden_states.dtype.name, out_dtype=self.base.out_dtype.name)
        adapters = self._adapters(hidden_states, adapter)
        logits = router_gemm(hidden_states, kernel, bias, **self.base._options())
        return _with_update(logits, hidden_states, *adapters, scale=self.scale)[0].astype(self.base.out_dtype)


class RouterLoRA(_LoRA[Router]):
    """A `Router` with a low-rank update of its logits, of one adapter or of one of several chosen per token.

        logits[..., E] = base's logits + alpha / rank * x[..., H] @ A[H, r] @ B[r, E], then the rule of base.spec

    >>> from jax_router import RoutingSpec
    >>> base = Router(8, 4, spec=RoutingSpec(top_k=1), rngs=nnx.Rngs(0))
    >>> router = RouterLoRA(base, 2, num_adapters=3, b_initializer=nnx.initializers.ones, rngs=nnx.Rngs(1))
    >>> router.lora_a.shape, router.lora_b.shape
    ((3, 8, 2), (3, 2, 4))
    >>> x, adapter = jnp.ones((5, 8)), jnp.array([0, 2, -1, 1, -1])  # the third and the last token have none
    >>> bool((router(x, adapter=adapter).weights == base(x).weights)[jnp.array([2, 4])].all())
    True

    The logits and weights of the base are computed by its implementation. A token without an adapter, or whose update
    is zero, has the base's own logits, experts and weights, bit for bit as `base(x, return_logits=True)` has them (XLA
    may compile the two apart on a GPU). Others have the specification's of the sum. The update is computed and added in
    float32; `base.spec.round_logits` rounds the sum. An adapter with infinities or NaN gives its own tokens NaN logits
    and leaves those of others alone.

    The gradient is that of the formula, also where B is still zero, with the selection fixed. In x it flows through the
    base and through the update.

    Args:
      base: a `Router`. It is used, not copied.
      rank: r.
      alpha: a number; the update is scaled by alpha / rank. None: rank, a scale of 1 as in `nnx.LoRA`.
      num_adapters: n. None is one adapter, for every token.
      freeze_base: stop gradients into the base's kernel, bias and expert_scale. Without it, `nnx.grad` with
        `argnums=nnx.DiffState(0, nnx.LoRAParam)` asks for those of the adapters alone.
      param_dtype: of A and B when they are made.
      a_initializer, b_initializer: called with (H, r) and (r, E), once for each adapter. B begins as zeros.
      a_metadata, b_metadata: of the variables.
      rngs: its stream `params` makes A and B.

    Attributes: `base`; `lora_a` `[H, r]` and `lora_b` `[r, E]`, or `[n, H, r]` and `[n, r, E]` (`nnx.LoRAParam`); all
    others are static.

    Raises:
      TypeError, ValueError: an argument that makes no sense; when called, an array that does not fit.
      NotImplementedError: when called, if no implementation that base names takes the problem; says why.

    Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685); names as in `flax.nnx.LoRA`.
    """

    kind = Router

    def __call__(
        self,
        x: ArrayLike,
        *,
        adapter: ArrayLike | None = None,
        experts: ArrayLike | None = None,
        return_logits: bool = False,
    ) -> Routing:
        """`Routing(weights, experts, logits)` of hidden states, as `jax_router.route` returns it.

        Args:
          x: `[..., H]`.
          adapter: `[...]` of any integer dtype, for several adapters and only for them: which one each token has, a
            negative number for none. Ids are checked where they are concrete; under jit the logits of a token with an
            id out of range are NaN.
          experts: `[..., k]`, a recorded selection to replay, or None to select.
          return_logits: return the float32 logits `[..., E]`, with the update, too.
        """
        checks.flag("return_logits", return_logits)
        base, operands = self.base, self._operands(x)
        adapters = self._adapters(operands[0], adapter)
        vectors = base._correction_bias(), base._expert_scale()
        if self.freeze_base:
            vectors = jax.lax.stop_gradient(vectors)
        (x, kernel, bias), (correction_bias, expert_scale) = jax.lax.stop_gradient((operands, vectors))
        options = {"correction_bias": correction_bias, "expert_scale": expert_scale, **base._options()}
        routing = route(x, kernel, bias, spec=base.spec, experts=experts, return_logits=True, **options)
        rule = {"spec": base.spec, "scale": self.scale, "weight_layout": base.weight_layout}
        routing = _route_with_update(routing, operands, vectors, adapters, replayed=experts is not None, **rule)
        return routing if return_logits else routing._replace(logits=None)
