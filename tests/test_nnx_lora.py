"""LoRA adds its update to the base's logits, and where there is none every bit is the base's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import nnx_cases as cases
import numpy as np
import pytest
from flax import nnx
from nnx_cases import (
    ADAPTERS,
    BF16,
    EXPERTS,
    F32,
    HIDDEN,
    RANK,
    SPEC,
    assert_same,
    every_implementation,
    with_adapter,
    with_float32,
)

import jax_router as jr
from jax_router.implementations import xla
from jax_router.nnx import GateLinear, GateLinearLoRA, Router, RouterLoRA
from jax_router.routing import route_logits

pytestmark = pytest.mark.usefixtures("compiled_in_haste")
SCALE = 2.0  # alpha / rank
CHOSEN = np.array([1, -1, 0, 2, -7, 1])


def logits_in_float64(x, held, *matrices) -> np.ndarray:
    x = np.asarray(x).astype(np.float64)
    update = 0 if not matrices else SCALE * (x @ matrices[0]) @ matrices[1]
    return cases.logits_in_float64(x, held["kernel"], held["bias"]) + update


def logits_of_chosen(x, held, sign: int = 1) -> np.ndarray:
    """Those of `CHOSEN` among several adapters."""
    lora_a, lora_b = cases.matrices(ADAPTERS)
    each = [() if chosen < 0 else (lora_a[chosen], sign * lora_b[chosen]) for chosen in CHOSEN]
    return np.stack([logits_in_float64(row, held, *matrices) for row, matrices in zip(x, each, strict=True)])


@every_implementation
def test_the_update_is_added_to_the_logits(implementation) -> None:
    x, held = cases.hidden_states(2, 3, dtype=BF16), cases.parameters(BF16)
    base = cases.router(implementation, BF16)
    truth = logits_in_float64(x, held, *cases.matrices())
    cases.assert_routing(with_adapter(base)(x, return_logits=True), truth, SPEC, **held)
    assert (truth != base(x, return_logits=True).logits).any(-1).all(), "a token without an update"
    assert with_adapter(base)(x).logits is None
    in_16_bits = with_adapter(cases.gate())
    lora_a, lora_b = (each.astype(BF16) for each in cases.matrices())
    nnx.update(in_16_bits, {"lora_a": lora_a, "lora_b": lora_b})
    exact = logits_in_float64(x, cases.parameters(), *cases.matrices())
    np.testing.assert_array_equal(in_16_bits(x.astype(F32)), exact)
    for out_dtype in (F32, BF16):
        logits = with_adapter(cases.gate(implementation, BF16, out_dtype=out_dtype))(x)
        assert logits.dtype == out_dtype
        np.testing.assert_array_equal(logits, truth.astype(out_dtype))


@every_implementation
def test_each_token_has_the_update_of_its_adapter_and_a_negative_one_none(implementation) -> None:
    x, held = cases.hidden_states(6, dtype=BF16), cases.parameters(BF16)
    base, truth = cases.router(implementation, BF16), logits_of_chosen(x, held)
    x, adapter = x.reshape(2, 3, HIDDEN), jnp.asarray(CHOSEN.reshape(2, 3), jnp.int8)
    routing = with_adapter(base, num_adapters=ADAPTERS)(x, adapter=adapter, return_logits=True)
    cases.assert_routing(routing, truth, SPEC, **held)
    without = jax.tree.map(lambda result: result[adapter < 0], (routing, base(x, return_logits=True)))
    assert_same(*without)
    gate = with_adapter(cases.gate(implementation, BF16), num_adapters=ADAPTERS)
    np.testing.assert_array_equal(gate(x, adapter=adapter).reshape(6, EXPERTS), truth)


@every_implementation
def test_a_zero_adapter_has_every_bit_of_the_base(implementation) -> None:
    """Also beside infinities and NaN in x, and with an expert that its bias switches off."""
    x = cases.hidden_states(6, dtype=BF16).at[1, 3].set(jnp.inf).at[2, 5].set(jnp.nan)
    base = cases.router(implementation, BF16, spec=jr.RoutingSpec(3, "softmax", renormalize=True))
    base.bias[...] = jnp.asarray(base.bias[...]).at[4].set(-jnp.inf)
    plain = base(x, return_logits=True)
    assert np.isnan(plain.logits).any()
    assert (plain.logits[0] == -np.inf).any()
    one, many = with_adapter(base), with_adapter(base, num_adapters=ADAPTERS)
    one.lora_b[...] *= 0
    assert_same(one(x, return_logits=True), plain)
    assert_same(many(x, adapter=np.full(6, -1), return_logits=True), plain)
    many.lora_b[...] = many.lora_b[...].at[1].set(0)
    assert_same(many(x, adapter=np.full(6, 1), return_logits=True), plain)
    gate = cases.gate(implementation, BF16)
    layer = with_adapter(gate)
    layer.lora_b[...] *= 0
    np.testing.assert_array_equal(layer(x), gate(x))


@pytest.fixture
def signed_kernel(cuda_module, monkeypatch) -> None:
    """In the place of `cuda` one whose first logits are -0.0 and 0.0, and whose experts and weights are not XLA's."""

    def router_gemm(*operands, config=None, **options):
        logits = xla.router_gemm(*operands, **options)
        return logits.at[:, 0].set(-0.0).at[:, 1].set(0.0)

    def route(x, weight, bias, correction_bias, expert_scale, experts, *, config=None, spec, **options):
        logits = router_gemm(x, weight, bias, out_dtype=F32, weight_layout=options["weight_layout"])
        if experts is None:
            experts = jnp.flip(route_logits(logits, correction_bias, None, None, spec=spec)[1], -1)
        weights, selected = route_logits(logits, None, expert_scale, experts, spec=spec)
        return jr.Routing(jnp.nextafter(weights, 2.0), selected, logits if options["return_logits"] else None)

    monkeypatch.setattr(cuda_module, "router_gemm", router_gemm)
    monkeypatch.setattr(cuda_module, "route", route)
    monkeypatch.setattr(cuda_module, "why_unsupported", lambda problem, device: None)


def test_a_zero_adapter_keeps_the_weights_of_the_kernel_and_the_sign_of_zero(signed_kernel) -> None:
    x = jnp.zeros((6, HIDDEN), BF16)
    base = cases.router("cuda", BF16, spec=jr.RoutingSpec(EXPERTS, "softmax", renormalize=True))
    plain = base(x, return_logits=True)
    assert np.signbit(plain.logits[:, 0]).all()
    layer = with_adapter(base)  # x is zero, and so is the update
    assert_same(layer(x, return_logits=True), plain)
    recorded = np.tile(np.arange(EXPERTS), (6, 1))
    assert_same(layer(x, experts=recorded, return_logits=True), base(x, experts=recorded, return_logits=True))
    gate = cases.gate("cuda", BF16)
    assert np.signbit(with_adapter(gate)(x)[:, 0]).all()
    updated = layer(x + 1)
    apart = updated.weights != base(x + 1).weights
    assert apart.any(), "an update that changes nothing"


@every_implementation
def test_a_recorded_selection_is_replayed_with_the_weights_of_the_sum(implementation) -> None:
    x, held = cases.hidden_states(3, dtype=BF16), cases.parameters(BF16)
    recorded = np.array([[7, 0], [3, 3], [1, 2]])
    layer = with_adapter(cases.router(implementation, BF16))
    truth = logits_in_float64(x, held, *cases.matrices())
    cases.assert_weights(layer(x, experts=recorded), truth, recorded, SPEC, held["expert_scale"])


@every_implementation
def test_the_sum_is_rounded_and_not_the_update(implementation) -> None:
    x, held = cases.hidden_states(6, dtype=BF16), cases.parameters(BF16)
    spec = jr.RoutingSpec(2, "sigmoid", select_on="logits", round_logits=True)
    layer = with_adapter(cases.router(implementation, BF16, spec=spec))
    layer.lora_b[...] *= 1 + 2.0**-6
    exact = logits_in_float64(x, held, cases.matrices()[0], np.asarray(layer.lora_b[...], np.float64))
    rounded = exact.astype(BF16).astype(np.float64)
    assert (rounded != exact).any()
    result = layer(x, return_logits=True)
    np.testing.assert_array_equal(result.logits, exact)
    cases.assert_routing(result._replace(logits=None), rounded, spec, **held)


def test_the_update_is_computed_in_float32_whatever_the_default_precision() -> None:
    x, held, fine = cases.hidden_states(6), cases.parameters(), 1 + 2.0**-14
    layer = with_adapter(cases.gate("xla"))
    layer.lora_a[...] *= fine
    with jax.default_matmul_precision("bfloat16"):
        logits, program = layer(x), str(jax.make_jaxpr(layer)(x))
    lora_a, lora_b = cases.matrices()
    np.testing.assert_array_equal(logits, logits_in_float64(x, held, lora_a * fine, lora_b))
    # A CPU has no product in fewer bits, a GPU has: both operands of all three are marked.
    assert (program.count("dot_general["), program.count("Precision.HIGHEST")) == (3, 6)


def test_a_broken_adapter_reaches_its_own_tokens_alone() -> None:
    x = cases.hidden_states(6)
    whole, broken = (with_adapter(cases.router(), num_adapters=ADAPTERS) for _ in range(2))
    broken.lora_b[...] = broken.lora_b[...].at[0, 0, 3].set(jnp.nan).at[0, 1, 5].set(jnp.inf)
    broken.lora_a[...] = broken.lora_a[...].at[2].set(jnp.nan)
    expected = whole(x, adapter=CHOSEN, return_logits=True)
    actual = broken(x, adapter=CHOSEN, return_logits=True)
    others = ~np.isin(CHOSEN, (0, 2))
    assert_same(*(jax.tree.map(lambda result: result[others], each) for each in (actual, expected)))
    np.testing.assert_array_equal(np.isnan(actual.logits[2]), np.isin(np.arange(EXPERTS), (3, 5)))
    assert np.isnan(actual.logits[3]).all()
    of_x = nnx.grad(lambda layer, x: layer(x, adapter=CHOSEN).weights[:, 0].sum(), argnums=1)
    np.testing.assert_array_equal(of_x(broken, x)[others], of_x(whole, x)[others])
    missing = jax.jit(lambda adapter: whole(x, adapter=adapter, return_logits=True))
    for dtype, wrong in ((jnp.int32, 3), (jnp.uint32, 2**32 - 1)):
        found = missing(jnp.array([1, 2, wrong, 2, 0, 1], dtype)).logits
        assert np.isnan(found[2]).all()
        np.testing.assert_array_equal(found[0], expected.logits[0])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "uint32", "uint64"])
def test_adapters_of_any_integer_dtype_are_taken(dtype) -> None:
    x, layer = cases.hidden_states(4), with_adapter(cases.router(), num_adapters=ADAPTERS)
    ids = np.array([0, 2, 1, 0])
    assert_same(layer(x, adapter=ids.astype(dtype)), layer(x, adapter=ids))
    assert layer(x[:0], adapter=ids[:0].astype(dtype)).weights.shape == (0, 2)


def test_several_merged_adapters_are_told_by_any_integer() -> None:
    layer = with_adapter(cases.router(), num_adapters=ADAPTERS)
    np.testing.assert_array_equal(layer.merge(np.int8(1)).kernel[...], layer.merge(1).kernel[...])
    np.testing.assert_array_equal(layer.merge(True).kernel[...], layer.merge(1).kernel[...])


def test_several_adapters_take_no_memory_by_token_hidden_and_rank() -> None:
    tokens = 64
    layer = with_adapter(cases.router("xla"), num_adapters=ADAPTERS)
    x, adapter = cases.hidden_states(tokens), np.arange(tokens) % ADAPTERS
    seen = cases.primitives(lambda x, adapter: layer(x, adapter=adapter), x, adapter)
    assert max(np.prod(shape) for _, shapes in seen for shape in shapes) < tokens * HIDDEN * RANK


def test_the_logits_are_multiplied_for_once() -> None:
    with jax.default_device(jax.devices("cpu")[0]):  # where a product is a dot in the compiled text
        layer, x = with_adapter(cases.router()), cases.hidden_states(64)
        compiled = jax.jit(lambda x: layer(x, return_logits=True)).lower(x).compile().as_text()
    assert compiled.count(" dot(") == 3, compiled  # the base's, by A, by B


@with_float32
@pytest.mark.parametrize("weight_layout", ["experts_hidden", "hidden_experts"])
def test_merged_layers_have_the_kernel_of_the_sum(implementation, weight_layout) -> None:
    x, held = cases.hidden_states(6), cases.parameters()
    options = {"weight_layout": weight_layout, "implementation": implementation, "rngs": nnx.Rngs(0)}
    turn = np.transpose if weight_layout == "hidden_experts" else np.asarray
    lora_a, lora_b = cases.matrices(ADAPTERS)
    for base in (Router(HIDDEN, EXPERTS, spec=SPEC, **options), GateLinear(HIDDEN, EXPERTS, **options)):
        nnx.update(base, {"kernel": turn(held["kernel"])})
        layer = with_adapter(base, num_adapters=ADAPTERS)
        merged = layer.merge(adapter=2)
        kernel = held["kernel"] + SCALE * (lora_a[2] @ lora_b[2]).T
        assert type(merged) is type(base)
        np.testing.assert_array_equal(merged.kernel[...], turn(kernel))
        np.testing.assert_array_equal(base.kernel[...], turn(held["kernel"]))
        logits = merged(x) if isinstance(base, GateLinear) else merged(x, return_logits=True).logits
        np.testing.assert_array_equal(logits, cases.logits_in_float64(x, kernel))


def test_a_merged_kernel_is_rounded_once_to_its_dtype() -> None:
    layer = with_adapter(cases.router(dtype=BF16))
    layer.lora_b[...] *= 1 + 2.0**-6
    lora_a, lora_b = cases.matrices()
    kernel = cases.parameters(BF16)["kernel"].astype(np.float32) + SCALE * (lora_a @ (lora_b * (1 + 2.0**-6))).T
    merged = layer.merge()
    assert merged.kernel.dtype == BF16
    np.testing.assert_array_equal(merged.kernel[...], kernel.astype(BF16))
    assert (kernel.astype(BF16) != kernel).any()
    np.testing.assert_array_equal(merged.correction_bias[...], layer.base.correction_bias[...])


def test_a_and_b_begin_as_those_of_flax_and_each_adapter_as_one_alone() -> None:
    theirs = nnx.LoRA(HIDDEN, RANK, EXPERTS, rngs=nnx.Rngs(5))
    ours = RouterLoRA(cases.router(), RANK, rngs=nnx.Rngs(5))
    np.testing.assert_array_equal(ours.lora_a[...], theirs.lora_a[...])
    assert not ours.lora_b[...].any()
    assert ours.scale == 1.0
    assert {type(ours.lora_a), type(ours.lora_b)} == {nnx.LoRAParam}
    shapes = []

    def init(key, shape, dtype):
        shapes.append(shape)
        return jax.random.normal(key, shape, dtype)

    metadata = {"a_metadata": {"note": "a"}, "b_metadata": {"note": "b"}}
    options = {"a_initializer": init, "b_initializer": init, "param_dtype": BF16, "rngs": nnx.Rngs(0)}
    many = GateLinearLoRA(cases.gate(), RANK, num_adapters=ADAPTERS, **options, **metadata)
    assert shapes == [(HIDDEN, RANK), (RANK, EXPERTS)]
    assert (many.lora_a.shape, many.lora_b.shape) == ((ADAPTERS, HIDDEN, RANK), (ADAPTERS, RANK, EXPERTS))
    assert many.lora_a.dtype == many.lora_b.dtype == BF16
    assert (many.lora_a[0] != many.lora_a[1]).any()
    assert (many.lora_a.get_metadata("note"), many.lora_b.get_metadata("note")) == ("a", "b")


@every_implementation
def test_no_tokens_and_one_token_without_an_axis(implementation) -> None:
    layer = with_adapter(cases.router(implementation, BF16), num_adapters=ADAPTERS)
    none = layer(cases.hidden_states(2, 0, dtype=BF16), adapter=np.zeros((2, 0), np.int32), return_logits=True)
    assert [each.shape for each in none] == [(2, 0, 2), (2, 0, 2), (2, 0, EXPERTS)]
    x, held = cases.hidden_states(dtype=BF16), cases.parameters(BF16)
    one = layer(x, adapter=jnp.int32(2), return_logits=True)
    truth = logits_in_float64(x, held, *(each[2] for each in cases.matrices(ADAPTERS)))
    cases.assert_routing(one, truth, SPEC, **held)


@every_implementation
def test_adapters_go_through_jit_vmap_and_scan(implementation) -> None:
    held, x = cases.parameters(BF16), cases.hidden_states(6, dtype=BF16)
    graph, state = nnx.split(with_adapter(cases.router(implementation, BF16), num_adapters=ADAPTERS))
    stack = nnx.merge(graph, jax.tree.map(lambda array: jnp.stack([array, array]), state))
    lora_b = cases.matrices(ADAPTERS)[1]
    stack.lora_b[...] = jnp.stack([jnp.asarray(lora_b), jnp.asarray(-lora_b)])

    def call(x, layer):
        return layer(x, adapter=jnp.asarray(CHOSEN), return_logits=True)

    scanned = nnx.scan(lambda x, layer: (x, call(x, layer)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    batched = nnx.vmap(call, in_axes=(None, 0))
    for routing in (nnx.jit(scanned)(x, stack)[1], batched(x, stack)):
        for i, sign in enumerate((1, -1)):
            of_layer = jax.tree.map(lambda array, i=i: array[i], routing)
            cases.assert_routing(of_layer, logits_of_chosen(x, held, sign), SPEC, **held)
