"""`route` keeps its contract under every transformation of JAX. Gradients are in test_route_grad.py."""

from __future__ import annotations

import functools
import itertools
import re

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_cases as cases
from test_ops import BF16, F16, F32, NO_LAUNCH, arrays, primitives

import jax_router as jr
from jax_router import computation, dispatch, ops, parity

pytestmark = pytest.mark.usefixtures("compiled_in_haste")
SPEC = jr.RoutingSpec(2, "sigmoid", renormalize=True, num_groups=3, group_topk=2)
VECTORS = {
    "correction_bias": jnp.array([0.5, -0.25, 0.0, 0.25, -0.5, 0.125]),
    "expert_scale": jnp.array([1.0, 0.5, 2.0, 1.5, 0.25, 3.0]),
}
six = functools.partial(arrays, experts=6)


def route(*operands, **options) -> jr.Routing:
    return jr.route(*operands, **{"spec": SPEC} | VECTORS | options)


def assert_same(actual: jr.Routing, expected: jr.Routing, *operands) -> None:
    """The same bits; of two programs of x, weight and bias, if given, within roundings where XLA picks kernels."""
    if operands and bounds.xla_picks_kernels():
        assert_close(actual, expected, *operands)
        return
    assert (actual.logits is None) == (expected.logits is None)
    for result, truth in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (result.dtype, result.shape) == (truth.dtype, truth.shape)
        np.testing.assert_array_equal(result, truth)


def assert_close(actual: jr.Routing, expected: jr.Routing, x, weight, bias, expert_scale=None) -> None:
    """The same experts; logits and weights that lie within their roundings, in whatever order things were added."""
    np.testing.assert_array_equal(actual.experts, expected.experts)
    assert (actual.logits is None) == (expected.logits is None)
    assert actual.weights.shape == expected.weights.shape
    scale = VECTORS["expert_scale"] if expert_scale is None else expert_scale
    logits = bounds.gemm(np.reshape(x, (-1, x.shape[-1])), weight, bias)
    experts = np.reshape(actual.experts, (-1, SPEC.top_k))
    for routing in (actual, expected):
        scored = logits
        if routing.logits is not None:
            bounds.within(np.reshape(routing.logits, logits.value.shape), logits)
            scored = bounds.given(np.reshape(routing.logits, logits.value.shape))
        bounds.within(np.reshape(routing.weights, experts.shape), bounds.weights(scored, experts, scale, SPEC))


GRID = [
    (x, weight, bias, vector)
    for x in (BF16, F16, F32)
    for weight, bias, vector in itertools.product(*(dict.fromkeys(d) for d in ((x, F32), (x, F32, None), (x, F32))))
]


def dtype_id(dtype) -> str:
    return "none" if dtype is None else jnp.dtype(dtype).name


@pytest.mark.parametrize(("x", "weight", "bias", "vector"), GRID, ids=dtype_id)
def test_every_dtype_of_the_grid_is_taken(x, weight, bias, vector) -> None:
    operands = six(5, x=x, weight=weight, bias=bias)
    vectors = {name: array.astype(vector) for name, array in VECTORS.items()}
    routing = route(*operands, **vectors, return_logits=True)
    shapes = [(result.shape, result.dtype) for result in routing]
    assert shapes == [((5, 2), F32), ((5, 2), jnp.int32), ((5, 6), F32)]
    logits = np.asarray(routing.logits)
    platform = dispatch.Device.default().platform
    if platform == "cpu":  # on a GPU the two may be computed by different kernels
        np.testing.assert_array_equal(logits, jr.router_gemm(*operands))
    multiplied = "float32" if F32 in (x, weight) else jnp.dtype(x).name
    accumulation = parity.accumulation_of("xla", hidden=24, dtype=multiplied, platform=platform)
    truth = parity.reference(*(None if array is None else np.asarray(array) for array in operands))
    assert parity.compare(logits, truth, accumulation).ok
    correction, scale = (np.asarray(array, np.float64) for array in vectors.values())
    np.testing.assert_array_equal(routing.experts, cases.select(logits.astype(np.float64), correction, SPEC))
    bounds.within(routing.weights, bounds.weights(bounds.given(logits), np.asarray(routing.experts), scale, SPEC))


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("return_logits", [False, True])
def test_leading_axes_are_tokens(leading, return_logits) -> None:
    x, weight, bias = six(*leading)
    routing = route(x, weight, bias, return_logits=return_logits)
    flat = route(x.reshape(-1, 24), weight, bias, return_logits=return_logits)
    assert_same(routing, jax.tree.map(lambda result: result.reshape(*leading, -1), flat), x, weight, bias)
    replayed = route(x, weight, bias, experts=routing.experts, return_logits=return_logits)
    assert_same(replayed, routing, x, weight, bias)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("implementation", [None, *dispatch.IMPLEMENTATIONS])
def test_no_tokens_give_empty_arrays_without_a_launch(leading, implementation) -> None:
    operands = six(*leading, x=BF16, weight=BF16)
    for experts in (None, jnp.zeros((*leading, 2), jnp.int32)):
        routing = route(*operands, experts=experts, implementation=implementation, return_logits=True)
        shapes = [(result.shape, result.dtype) for result in routing]
        assert shapes == [((*leading, 2), F32), ((*leading, 2), jnp.int32), ((*leading, 6), F32)]
    assert route(*operands, implementation=implementation).logits is None
    launched = primitives(functools.partial(route, implementation=implementation), *operands)
    assert {name for name, _ in launched} <= NO_LAUNCH


def test_the_logits_are_those_of_router_gemm_and_are_not_rounded() -> None:
    operands = six(7, x=BF16, weight=BF16)
    spec = jr.RoutingSpec(2, "softmax", round_logits=True)
    routing = jr.route(*operands, spec=spec, return_logits=True, implementation="xla")
    np.testing.assert_array_equal(routing.logits, jr.router_gemm(*operands, implementation="xla"))
    rounded = bounds.given(routing.logits.astype(BF16))
    bounds.within(routing.weights, bounds.weights(rounded, np.asarray(routing.experts), None, spec))


def test_equal_rounded_logits_tie_to_the_lowest_expert() -> None:
    x, weight = jnp.ones((1, 8), BF16), jnp.zeros((3, 8), BF16)
    bias = jnp.array([1.0, 1 + 2.0**-10, 1 + 2.0**-9], F32)  # all of them 1 in bfloat16
    for round_logits, experts in ((False, [[2, 1]]), (True, [[0, 1]])):
        spec = jr.RoutingSpec(2, "softmax_topk", round_logits=round_logits)
        assert jr.route(x, weight, bias, spec=spec).experts.tolist() == experts


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_recorded_ids_of_any_integer_dtype_are_replayed(dtype) -> None:
    operands = six(4)
    recorded = route(*operands)
    experts = np.asarray(recorded.experts).astype(dtype)
    assert_same(route(*operands, experts=experts), recorded, *operands)
    with jax.enable_x64(True):
        traced = jax.jit(lambda *operands: route(*operands[:-1], experts=operands[-1]))
        assert_close(traced(*operands, jnp.asarray(experts)), recorded, *operands)
        beyond = jnp.asarray(experts).at[0, 0].set(min(jnp.iinfo(dtype).max, 2**32 + 1))  # not 1, as in 32 bits
        assert jnp.isnan(traced(*operands, beyond).weights[0, 0])


def test_replay_takes_the_ids_as_given_whatever_the_spec_would_select() -> None:
    operands = six(3)
    experts = jnp.array([[0, 0], [5, 1], [2, 4]])  # twice the same, and experts of any group
    routing = route(*operands, experts=experts, return_logits=True)
    np.testing.assert_array_equal(routing.experts, experts)
    logits = bounds.given(routing.logits)
    bounds.within(routing.weights, bounds.weights(logits, np.asarray(experts), VECTORS["expert_scale"], SPEC))
    replayed = route(*operands, experts=experts, correction_bias=None, return_logits=True)
    assert_same(replayed, routing, *operands)


@pytest.mark.parametrize(("name", "rows"), [("DeepSeek-V3", 7), ("rounded logits", 257), ("Gemma-4", 1)])
def test_replay_gives_the_same_bits_under_jit_and_outside(name, rows) -> None:
    case = cases.CASES[name]
    correction, scale = case.vectors()
    given = {"spec": case.spec, "correction_bias": correction, "expert_scale": scale, "implementation": "xla"}
    dtypes = {"x": case.dtype, "weight": case.dtype, "bias": case.bias}
    with jax.default_device(jax.devices("cpu")[0]):  # XLA may compile the two apart on a GPU
        operands = arrays(rows, hidden=case.hidden, experts=case.experts, **dtypes)
        for transform in (lambda function: function, jax.jit):
            recorded = transform(functools.partial(jr.route, **given))(*operands)
            replayed = transform(functools.partial(jr.route, **given, experts=recorded.experts))(*operands)
            assert_same(replayed, recorded)


def test_ids_out_of_range_are_refused_where_they_are_known() -> None:
    operands = six(2, 3)
    for wrong, dtype in ((6, jnp.int32), (-1, jnp.int8), (2**32 + 1, np.int64), (2**32 - 1, np.uint32)):
        experts = np.zeros((2, 3, 2), dtype)
        experts[1, 0, 1] = experts[1, 2, 0] = wrong
        message = (
            f"experts has the id {wrong} at (1, 0, 1) but weight has experts=6. Expected ids from 0 to 5; pass ids "
            "that were recorded with this router."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            route(*operands, experts=experts)
        with pytest.raises(ValueError, match=re.escape(message)):
            jax.jit(lambda *operands, experts=experts: route(*operands, experts=experts))(*operands)


def test_ids_out_of_range_under_jit_have_a_weight_of_nan() -> None:
    operands, experts = six(3), jnp.array([[0, 6], [-1, 5], [2**30, -(2**31)]])
    for spec, bad in (
        (jr.RoutingSpec(2, "sigmoid"), [[False, True], [True, False], [True, True]]),
        (jr.RoutingSpec(2, "softmax_topk"), [[True, True]] * 3),
    ):
        routing = jax.jit(lambda experts, spec=spec: route(*operands, spec=spec, experts=experts))(experts)
        np.testing.assert_array_equal(routing.experts, experts)
        np.testing.assert_array_equal(jnp.isnan(routing.weights), bad)


def test_numpy_arrays_and_wrapped_parameters_are_taken() -> None:
    class Parameter:
        def __init__(self, value):
            self.value = value

        def __jax_array__(self):
            return self.value

    operands = six(3, x=BF16, weight=BF16)
    expected = route(*operands)
    as_numpy = {name: np.asarray(vector) for name, vector in VECTORS.items()}
    assert_same(route(*map(np.asarray, operands), **as_numpy), expected)
    wrapped = {name: Parameter(vector) for name, vector in VECTORS.items()}
    experts = Parameter(expected.experts)
    assert_same(route(operands[0], *map(Parameter, operands[1:]), **wrapped, experts=experts), expected, *operands)


def test_named_implementation_never_falls_back(monkeypatch) -> None:
    monkeypatch.delenv("JAX_ROUTER_PALLAS_INTERPRET", raising=False)  # with it pallas would be taken on a CPU
    operands = six(3, hidden=8, x=BF16, weight=BF16)
    cpu = dispatch.Device("cpu", "cpu")
    for name in ("cuda", "pallas"):
        problem = dispatch.Problem(3, 8, 6, bias_dtype="float32", spec=SPEC)
        reason = dispatch.why_unsupported(problem, cpu, name)
        with jax.default_device(jax.devices("cpu")[0]), pytest.raises(NotImplementedError, match=re.escape(reason)):
            jax.jit(functools.partial(route, implementation=name)).trace(*operands)
    assert_same(route(*operands, implementation=["xla"]), route(*operands, implementation="xla"))


def test_vmap_over_x_folds_into_tokens_and_does_not_copy_the_weight() -> None:
    x, weight, bias = six(4, 3)
    batched = jax.vmap(functools.partial(route, return_logits=True), (0, None, None))
    assert_close(batched(x, weight, bias), route(x, weight, bias, return_logits=True), x, weight, bias)
    seen = list(primitives(batched, x, weight, bias))
    assert [shapes for name, shapes in seen if name == "dot_general"] == [[(4, 3, 6)]]
    copies = [(name, shapes) for name, shapes in seen if any(shape[-2:] == (6, 24) for shape in shapes)]
    assert not copies, f"the weight was copied: {copies}"


@pytest.mark.parametrize("in_axes", [(0, 0), (None, 0), (0, None), (1, 1)], ids=str)
def test_vmap_over_x_and_experts_folds_into_tokens(in_axes) -> None:
    x, weight, bias = six(3, 3)
    experts = jax.random.randint(jax.random.key(1), (3, 3, 2), 0, 6)
    operands = [a if axis is not None else a[0] for a, axis in zip((x, experts), in_axes, strict=True)]
    replay = lambda x, experts: route(x, weight, bias, experts=experts)  # noqa: E731
    batched = jax.vmap(replay, in_axes)
    rows = [
        [a if axis is None else jnp.take(a, i, axis) for a, axis in zip(operands, in_axes, strict=True)]
        for i in range(3)
    ]
    looped = jax.tree.map(lambda *each: jnp.stack(each), *(replay(*row) for row in rows))
    assert_close(batched(*operands), looped, jnp.stack([row[0] for row in rows]), weight, bias)
    assert [shapes for name, shapes in primitives(batched, *operands) if name == "dot_general"] == [[(3, 3, 6)]]


@pytest.mark.parametrize("batched", ["weight", "bias", "correction_bias", "expert_scale", "x, weight and experts"])
def test_vmap_over_anything_is_a_loop_over_routers(batched) -> None:
    names = ("x", "weight", "bias", "correction_bias", "expert_scale", "experts")
    values = dict(zip(names, (*six(3), *VECTORS.values(), jnp.array([[0, 1], [5, 2], [3, 3]])), strict=True))
    if batched != "x, weight and experts":
        del values["experts"]
    axes = {name: 0 if name in batched.replace(",", "").split() else None for name in values}
    stacked = {name: a if axes[name] is None else jnp.stack([a, a[::-1], a]) for name, a in values.items()}

    def run(values: dict) -> jr.Routing:
        return jr.route(**values, spec=SPEC, return_logits=True)

    batched_routing = jax.vmap(run, (axes,))(stacked)
    for i in range(3):
        each = {n: a if axes[n] is None else a[i] for n, a in stacked.items()}
        operands = (each[name] for name in ("x", "weight", "bias", "expert_scale"))
        assert_close(jax.tree.map(lambda result, i=i: result[i], batched_routing), run(each), *operands)


def test_vmap_over_nothing_is_empty() -> None:
    x, weight, bias = six(0, 3)
    routing = jax.jit(jax.vmap(route, (0, None, None)))(x, weight, bias)
    assert [(result.shape, result.dtype) for result in routing[:2]] == [((0, 3, 2), F32), ((0, 3, 2), jnp.int32)]


def test_jit_scan_and_remat_change_nothing() -> None:
    x, weight, bias = six(4, 3)
    expected = route(x, weight, bias, return_logits=True)
    with_logits = functools.partial(route, return_logits=True)
    assert_same(jax.jit(with_logits)(x, weight, bias), expected, x, weight, bias)
    assert_same(jax.checkpoint(with_logits)(x, weight, bias), expected, x, weight, bias)
    _, scanned = jax.lax.scan(lambda carry, row: (carry, route(row, weight, bias)), None, x)
    assert_close(scanned, expected._replace(logits=None), x, weight, bias)


def test_donated_buffers_are_given_up_and_the_routing_is_right() -> None:
    x, weight, bias = six(4)
    expected, kept = route(x, weight, bias), np.array(x)
    donating = jax.jit(lambda x: (2 * x, route(x, weight, bias)), donate_argnums=0)
    doubled, routing = donating(x)
    assert_same(routing, expected, kept, weight, bias)
    np.testing.assert_array_equal(doubled, 2 * kept)
    assert x.is_deleted()


def test_abstract_values_are_enough_to_trace_in_32_and_64_bits() -> None:
    operands = six(2, 3, x=BF16, weight=BF16)
    for enabled in (False, True):
        with jax.enable_x64(enabled):
            routing = jax.eval_shape(functools.partial(route, return_logits=True), *operands)
            dtypes = [(result.shape, result.dtype) for result in routing]
            assert dtypes == [((2, 3, 2), F32), ((2, 3, 2), jnp.int32), ((2, 3, 6), F32)]
            assert [result.dtype for result in route(operands[0][:0], *operands[1:])[:2]] == [F32, jnp.int32]


def test_a_symbolic_number_of_tokens_is_exported_with_xla() -> None:
    (tokens,) = jax.export.symbolic_shape("tokens")
    x, *others = six(6)
    experts = jax.random.randint(jax.random.key(1), (6, 2), 0, 6)
    shapes = jax.ShapeDtypeStruct((tokens, 24), F32), jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
    select = jax.jit(lambda x: route(x, *others, return_logits=True))
    replay = jax.jit(lambda x, experts: route(x, *others, experts=experts))
    exported = jax.export.export(select)(shapes[0]), jax.export.export(replay)(*shapes)
    for count in (6, 1):
        few, ids = x[:count], experts[:count]
        assert_close(jr.Routing(*exported[0].call(few)), select(few), few, *others)
        assert_close(jr.Routing(*exported[1].call(few, ids)), replay(few, ids), few, *others)


def test_a_symbolic_batch_of_tokens_with_recorded_experts_is_exported() -> None:
    (batch,) = jax.export.symbolic_shape("batch")
    x, *others = six(6)
    experts = jax.random.randint(jax.random.key(1), (6, 2), 0, 6)
    replay = jax.jit(jax.vmap(lambda x: route(x, *others, experts=experts)))
    exported = jax.export.export(replay)(jax.ShapeDtypeStruct((batch, 6, 24), F32))
    actual = jr.Routing(*(None if each is None else each[1] for each in exported.call(jnp.stack([0 * x, x]))))
    assert_close(actual, route(x, *others, experts=experts), x, *others)


def test_shapes_on_a_mesh_of_one_device_that_is_not_there_are_exported() -> None:
    """As without a mesh: what calls JAX back to partition needs the devices."""
    x, weight, *_ = six(4)
    place = jax.sharding.NamedSharding(jax.sharding.AbstractMesh((1,), ("data",)), jax.sharding.PartitionSpec("data"))
    on_the_mesh = (jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=place) for each in (x, weight))
    select = functools.partial(jr.route, spec=SPEC, implementation="xla")
    exported = jax.export.export(jax.jit(lambda *operands: select(*operands).experts))(*on_the_mesh)
    np.testing.assert_array_equal(exported.call(x, weight), select(x, weight).experts)


def test_nothing_is_broadcast_to_more_axes_where_jax_is_told_to_refuse_it() -> None:
    operands, others = six(3), {"implementation": "xla"}
    routing = route(*operands, **others)
    with jax.numpy_rank_promotion("raise"):
        assert_same(jax.jit(lambda *operands: route(*operands, **others))(*operands), routing, *operands)


def test_inf_and_nan_stay_in_their_rows() -> None:
    x, weight, bias = six(4)
    clean = route(x, weight, bias)
    routing = route(x.at[1, 2].set(jnp.nan).at[2, 3].set(jnp.inf), weight, bias)
    assert jnp.isnan(routing.weights[1]).all()
    for row in (0, 3):
        assert_same(jax.tree.map(lambda a, row=row: a[row], routing), jax.tree.map(lambda a, row=row: a[row], clean))


def test_a_repeated_call_does_not_trace_again() -> None:
    operands = six(3)
    route(*operands)
    request = computation.Request.now(None, dispatch.Device.default(), "float32", SPEC)
    function = ops._operation(computation.decide(*operands, request))
    before = function._cache_size()
    assert before > 0
    route(*operands)
    assert function._cache_size() == before


def test_the_dispatcher_is_asked_about_the_spec(monkeypatch) -> None:
    asked, resolve = [], dispatch.resolve
    monkeypatch.setattr(dispatch, "resolve", lambda problem, *rest: asked.append(problem) or resolve(problem, *rest))
    operands = six(3, x=BF16, weight=BF16)
    route(*operands)
    jr.router_gemm(*operands)
    problem = dispatch.Problem(3, 24, 6, weight_dtype="bfloat16", bias_dtype="float32")
    assert asked == [dispatch.Problem(**vars(problem) | {"spec": SPEC}), problem]
    jr.explain(tokens=3, hidden=24, experts=6, bias="float32", spec=SPEC)
    assert asked[2] == asked[0]
