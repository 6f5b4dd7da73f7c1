"""examples/deepseek_v3 beside `DeepseekV3MoE` of transformers, forward and backward; float64 judges both."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as reference  # noqa: E402

import jax_router as jr  # noqa: E402
from examples.deepseek_v3.moe import Experts, MoE  # noqa: E402
from jax_router import parity  # noqa: E402
from jax_router.dispatch import Device  # noqa: E402

CONFIG = transformers.DeepseekV3Config(
    hidden_size=64,
    moe_intermediate_size=24,
    n_routed_experts=16,
    n_shared_experts=2,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=3,
)
SHAPE = (3, 16, CONFIG.hidden_size)  # of x
CORRECTION = "gate.e_score_correction_bias"
# RMS. The same products are added up in another order, and exponentials are those of another library; PyTorch rounds a
# sum of experts after every one. On a CPU 1.43 times was the most (gate.weight in bfloat16). Two: errors no larger than
# PyTorch's, and room for another order of additions on a GPU.
TIMES_THE_ERROR_OF_TORCH = 2.0


@functools.cache
def problem(dtype: str) -> SimpleNamespace:
    """Parameters by the names of the state dict, x and the cotangent of the output, in a dtype."""
    random = np.random.default_rng(4)
    shapes = {name: tuple(array.shape) for name, array in reference.DeepseekV3MoE(CONFIG).state_dict().items()}
    state = {name: random.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in shapes.items()}
    state[CORRECTION] = 0.3 * random.normal(size=shapes[CORRECTION])
    x, cotangent = random.normal(size=(2, *SHAPE))
    rounded = {name: array.astype(jnp.dtype(dtype)) for name, array in state.items()}
    rounded[CORRECTION] = state[CORRECTION].astype(np.float32)
    x, cotangent = (array.astype(jnp.dtype(dtype)) for array in (x, cotangent))
    return SimpleNamespace(state=rounded, x=x, cotangent=cotangent)


def leaf(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64)).to(dtype).requires_grad_()


def pulled_back(output: torch.Tensor, leaves: dict[str, torch.Tensor], cotangent: np.ndarray) -> dict[str, np.ndarray]:
    """The output, and the gradients of what has one, in float64."""
    output.backward(torch.from_numpy(cotangent.astype(np.float64)).to(output.dtype))
    found = {name: each.grad for name, each in leaves.items() if each.grad is not None} | {"output": output.detach()}
    return {name: array.double().numpy() for name, array in found.items()}


@functools.cache
def in_float64(dtype: str) -> SimpleNamespace:
    """The block, written out: every expert computes every token. Also the choices, and which experts were selected."""
    given = problem(dtype)
    leaves = {name: leaf(array, torch.float64) for name, array in (given.state | {"x": given.x}).items()}
    x, experts = leaves["x"].reshape(-1, CONFIG.hidden_size), CONFIG.n_routed_experts
    scores = (x @ leaves["gate.weight"].T).sigmoid()
    choice = scores + leaves[CORRECTION]
    groups = choice.detach().reshape(len(x), CONFIG.n_group, -1)
    of_groups = groups.topk(2).values.sum(-1)
    kept = torch.zeros_like(of_groups, dtype=torch.bool).scatter(1, of_groups.topk(CONFIG.topk_group).indices, True)
    in_kept = groups.masked_fill(~kept[..., None], -torch.inf).reshape(len(x), experts)
    selected = in_kept.topk(CONFIG.num_experts_per_tok).indices
    chosen = torch.zeros(len(x), experts, dtype=torch.bool).scatter(1, selected, True)
    weights = scores * chosen
    weights = CONFIG.routed_scaling_factor * weights / (weights.sum(-1, keepdim=True) + 1e-20)

    def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    shared = [leaves[f"shared_experts.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")]
    output = mlp(x, *shared)
    for expert in range(experts):
        gate, up = leaves["experts.gate_up_proj"][expert].chunk(2)
        output = output + weights[:, [expert]] * mlp(x, gate, up, leaves["experts.down_proj"][expert])
    found = pulled_back(output.reshape(SHAPE), leaves, given.cotangent)
    margins = [
        (-np.sort(-values.numpy(), -1))[:, count - 1 : count + 1]
        for values, count in ((of_groups, CONFIG.topk_group), (in_kept, CONFIG.num_experts_per_tok))
    ]
    margins = [between[:, 0] - between[:, 1] for between in margins]
    return SimpleNamespace(found=found, chosen=chosen.numpy(), margins=margins)


@functools.cache
def of_torch(dtype: str) -> SimpleNamespace:
    """What transformers computes: output and gradients, and the weights of the experts, 0 where not selected."""
    given, of_dtype = problem(dtype), getattr(torch, dtype)
    module = reference.DeepseekV3MoE(CONFIG)
    for name, array in given.state.items():
        owner, _, attribute = name.rpartition(".")
        tensor = leaf(array, torch.float32 if name == CORRECTION else of_dtype)
        kind = torch.nn.Buffer(tensor.detach()) if name == CORRECTION else torch.nn.Parameter(tensor.detach())
        setattr(module.get_submodule(owner), attribute, kind)
    x = leaf(given.x, of_dtype)
    _, weights, experts = module.gate(x)
    dense = torch.zeros(len(weights), CONFIG.n_routed_experts).scatter(1, experts, weights)
    found = pulled_back(module(x), dict(module.named_parameters()) | {"x": x}, given.cotangent)
    return SimpleNamespace(found=found, weights=dense.detach().double().numpy())


def block(dtype: str, implementation: str) -> MoE:
    return nnx.eval_shape(lambda: MoE(CONFIG, param_dtype=dtype, implementation=implementation, rngs=nnx.Rngs(0)))


@functools.cache
def of_jax(dtype: str, implementation: str) -> SimpleNamespace:
    """What the example computes, as `of_torch`, and the gradient of the correction bias."""
    given = problem(dtype)
    module = block(dtype, implementation)
    module.load(given.state)
    graph, state = nnx.split(module)

    @jax.jit
    def run(state, x, cotangent):
        routing = nnx.merge(graph, state).router(x.reshape(-1, CONFIG.hidden_size))
        output, pullback = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
        return routing, output, *pullback(cotangent)

    routing, output, of_state, of_x = run(state, given.x, given.cotangent)
    assert output.dtype == given.x.dtype
    assert output.shape == given.x.shape
    dense = np.zeros((len(routing.weights), CONFIG.n_routed_experts))
    np.put_along_axis(dense, np.asarray(routing.experts), np.asarray(routing.weights, np.float64), axis=-1)
    found = {
        name: np.asarray(variable[...].mT if transposed else variable[...], np.float64)
        for name, (variable, transposed) in nnx.merge(graph, of_state).places().items()
    }
    correction = found.pop(CORRECTION)
    found |= {"output": np.asarray(output, np.float64), "x": np.asarray(of_x, np.float64)}
    return SimpleNamespace(found=found, weights=dense, correction=correction, routing=routing)


pytestmark = pytest.mark.usefixtures("compiled_in_haste")
ROUTERS = [
    ("float32", "xla"),
    ("bfloat16", "xla"),
    pytest.param("float32", "cuda", marks=pytest.mark.gpu),
    pytest.param("bfloat16", "cuda", marks=pytest.mark.gpu),
    pytest.param("bfloat16", "pallas", marks=pytest.mark.gpu),
]
every_router = pytest.mark.parametrize(("dtype", "implementation"), ROUTERS)


def logits(dtype: str, implementation: str, platform: str) -> bounds.Real:
    given = problem(dtype)
    truth = parity.reference(given.x.reshape(-1, CONFIG.hidden_size), given.state["gate.weight"])
    options = {"hidden": CONFIG.hidden_size, "dtype": dtype, "platform": platform}
    accumulation = parity.accumulation_of(implementation, **options)
    return bounds.Real(truth.logits, parity.logit_bound(truth, accumulation, truth.logits.size))


@every_router
def test_no_choice_of_the_data_is_so_near_another_that_rounding_decides(dtype, implementation) -> None:
    computed = logits(dtype, implementation, Device.default().platform)
    choice = bounds.scores(computed, "sigmoid") + bounds.given(problem(dtype).state[CORRECTION])
    error = choice.error.max()
    of_groups, of_experts = in_float64(dtype).margins
    assert of_groups.min() > 2 * 3 * error  # two sums of two choices and a rounding
    assert of_experts.min() > 2 * error
    assert not in_float64(dtype).chosen.any(0).all(), "every expert has a token: empty ones are not tested"


@every_router
def test_the_routing_is_that_of_transformers(dtype, implementation) -> None:
    ours, theirs, truth = of_jax(dtype, implementation), of_torch(dtype), in_float64(dtype)
    np.testing.assert_array_equal(ours.weights > 0, truth.chosen)
    np.testing.assert_array_equal(theirs.weights > 0, truth.chosen)
    experts, spec = np.asarray(ours.routing.experts), jr.RoutingSpec.from_hf_config(CONFIG)
    computed = logits(dtype, implementation, Device.default().platform)
    bounds.within(ours.routing.weights, bounds.weights(computed, experts, None, spec))
    of_torch_alone = bounds.weights(logits(dtype, "torch", "cpu"), experts, None, spec)
    bounds.within(np.take_along_axis(theirs.weights, experts, -1), of_torch_alone)


@every_router
def test_output_and_gradients_are_as_near_to_float64_as_those_of_transformers(dtype, implementation) -> None:
    ours, theirs, truth = of_jax(dtype, implementation).found, of_torch(dtype).found, in_float64(dtype).found
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, expected in truth.items():
        assert ours[name].shape == expected.shape
        assert np.abs(expected).max() > 0
        error, of_torch_alone = (np.sqrt(np.mean((each[name] - expected) ** 2)) for each in (ours, theirs))
        assert error <= TIMES_THE_ERROR_OF_TORCH * of_torch_alone, f"{name}: {error} and {of_torch_alone} of PyTorch"


def test_experts_are_weighted_and_added_in_float32_and_rounded_once() -> None:
    experts, hidden, tokens = 5, 16, 8
    random = np.random.default_rng(5)
    x = random.integers(1, 16, (tokens, hidden))
    x[:, 0] = 32  # the gate: its silu is itself in float32 and bfloat16
    gate_up, down = np.zeros((experts, hidden, 2)), random.integers(-8, 9, (experts, 1, hidden))
    gate_up[:, 0, 0] = gate_up[:, 1, 1] = 1
    of_experts = x[:, 1, None, None] * down[:, 0]  # [T, E, H], at most 120: exact in bfloat16, unlike the weights
    module = nnx.eval_shape(lambda: Experts(experts, hidden, 1, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    module.gate_up_proj.set_value(jnp.asarray(gate_up, jnp.bfloat16))
    module.down_proj.set_value(jnp.asarray(down / 32, jnp.bfloat16))
    selected = np.argsort(random.random((tokens, experts)))[:, :3].astype(np.int32)
    weights = random.integers(1, 1 << 12, selected.shape) / (1 << 12)
    routing = jr.Routing(jnp.asarray(weights, jnp.float32), jnp.asarray(selected))
    output = jax.jit(lambda x, routing: module(x, routing))(jnp.asarray(x, jnp.bfloat16), routing)
    exact = (np.take_along_axis(of_experts, selected[..., None], 1) * weights[..., None]).sum(1)
    np.testing.assert_array_equal(exact, exact.astype(np.float32))
    np.testing.assert_array_equal(output, exact.astype(jnp.bfloat16))


@every_router
def test_the_correction_bias_has_no_gradient(dtype, implementation) -> None:
    assert not of_jax(dtype, implementation).correction.any()
    assert CORRECTION not in of_torch(dtype).found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("gate.weight"), r"state lacks \['gate.weight'\] and has the unknown \[\]"),
        (lambda state: state.update(bias=0), r"state lacks \[\] and has the unknown \['bias'\]\. Expected \['experts"),
        (
            lambda state: state.update({"experts.down_proj": np.zeros((16, 24, 64))}),
            r"state\['experts.down_proj'\] has shape \(16, 24, 64\)\. Expected \(16, 64, 24\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(change, words) -> None:
    module, state = block("float32", "xla"), dict(problem("float32").state)
    change(state)
    with pytest.raises(ValueError, match=words):
        module.load(state)
    assert isinstance(module.router.kernel.get_value(), jax.ShapeDtypeStruct)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_tokens_have_no_output_and_no_gradient(shape) -> None:
    module = block("float32", "xla")
    module.load(problem("float32").state)
    graph, state = nnx.split(module)
    x = jnp.zeros(shape)
    output, pullback = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
    of_state, of_x = pullback(output)
    assert (output.shape, of_x.shape) == (shape, shape)
    assert not any(each.any() for each in jax.tree.leaves(of_state))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'\. Expected 'silu'"),
        ({"hidden_act": "silu", "n_shared_experts": 0}, r"n_shared_experts is 0\. Expected at least 1"),
    ],
)
def test_a_block_of_another_form_is_refused(fields, words) -> None:
    with pytest.raises(NotImplementedError, match=words):
        MoE(SimpleNamespace(**fields), rngs=nnx.Rngs(0))
