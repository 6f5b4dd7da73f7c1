"""The example gpt-oss computes what transformers' GptOssForCausalLM computes from the same checkpoint.

Every comparison has the same model in float64 as its judge. Both sides round the same intermediates to the same dtypes,
but for the sum over a token's experts: transformers adds in the model's dtype, the example in float32 and rounds once.
Sums have another order, and XLA may leave a rounding out where it fuses. So the errors are of one size: on a CPU the
RMS error was found at most 1.01 times that of transformers, and the largest, of one element of many that recur, at most
1.15 times. What RMS and LARGEST leave beyond that is for the order of sums on other devices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import gpt_oss_cases as cases  # noqa: E402
from transformers.models.gpt_oss import modeling_gpt_oss as modeling  # noqa: E402

from examples.gpt_oss import rotary  # noqa: E402
from examples.gpt_oss.attention import LayerCache, attend  # noqa: E402
from examples.gpt_oss.config import Config, Yarn  # noqa: E402
from examples.gpt_oss.experts import Experts  # noqa: E402
from examples.gpt_oss.generate import Decoder  # noqa: E402
from examples.gpt_oss.model import GptOss, Output, load  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_in_haste")
STEPS = 200
RMS, LARGEST = 1.5, 2  # the errors here, at most, in those of transformers
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
BY_DTYPE = {"float32": ("xla", "cuda"), "bfloat16": ("xla", "cuda", "pallas")}
CASES = [
    pytest.param(dtype, implementation, rounded, marks=[] if implementation == "xla" else [pytest.mark.gpu])
    for dtype, implementations in BY_DTYPE.items()
    for implementation in implementations
    for rounded in ((False,) if dtype == "float32" else (False, True))
]


class Reference(NamedTuple):
    """transformers in one dtype, on the prompt and the tokens that it makes of it, everything widened to float64."""

    layers: list[np.ndarray]  # [T, H] that each layer returns
    router_logits: list[np.ndarray]  # [T, E]
    logits: np.ndarray  # [T, V]
    tokens: np.ndarray | None  # [STEPS] of its greedy decoding with its cache


class Ours(NamedTuple):
    model: GptOss
    output: Output  # of prompt and tokens


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch is slower with threads at this size, and other tests have the other cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by transformers in several files with their index."""
    directory = tmp_path_factory.mktemp("checkpoint")
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**cases.hf_fields(cases.CONFIG)))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in cases.tensors().items()})
    model.save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 2
    return directory


def hf_model(checkpoint: Path, dtype: Any) -> Any:
    """transformers' model. Some of its releases (5.17) have gpt-oss' own alpha and limit, whatever config.json says."""
    model = transformers.GptOssForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    for layer in model.model.layers:
        layer.mlp.experts.alpha, layer.mlp.experts.limit = cases.CONFIG.swiglu_alpha, cases.CONFIG.swiglu_limit
    return model


@pytest.fixture(scope="module")
def references(checkpoint: Path) -> dict[str, Reference]:
    """By dtype. The tokens are made in float32 and bfloat16, and read in float64 as well."""
    models = {name: hf_model(checkpoint, dtype) for name, dtype in DTYPES.items()}
    # transformers turns heads by float32 angles in every dtype; the judge does it in float64.
    rotary_embedding = models["float64"].model.rotary_emb

    def rotate_in_float64(x: Any, position_ids: Any) -> tuple[Any, Any]:
        angles = position_ids[..., None].double() * rotary_embedding.original_inv_freq.double()
        scale = rotary_embedding.attention_scaling
        return angles.cos() * scale, angles.sin() * scale

    rotary_embedding.forward = rotate_in_float64
    prompt = torch.tensor(cases.PROMPT)[None]
    made = {
        name: models[name].generate(prompt, do_sample=False, min_new_tokens=STEPS, max_new_tokens=STEPS)[0]
        for name in BY_DTYPE
    }
    return {name: read(model, made["float32"], made.get(name)) for name, model in models.items()}


def read(model: Any, ids: Any, made: Any) -> Reference:
    layers: list[np.ndarray] = []

    def widened(tensor: Any) -> np.ndarray:
        return tensor.detach().double().numpy()

    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: layers.append(widened(output[0])))
    with torch.no_grad():
        output = model(ids[None], output_router_logits=True)
    tokens = None if made is None else made[len(cases.PROMPT) :].numpy()
    return Reference(layers, list(map(widened, output.router_logits)), widened(output.logits[0]), tokens)


@pytest.fixture(scope="module")
def ours(checkpoint: Path, references: dict[str, Reference], request: pytest.FixtureRequest) -> Ours:
    """The example's model of a case, and what it computes of prompt and tokens."""
    dtype, implementation, rounded = request.param
    model = load(checkpoint, dtype=dtype, implementation=implementation, round_logits=rounded)
    ids = np.concatenate((cases.PROMPT, references["float32"].tokens))
    graph, state = nnx.split(model)
    return Ours(model, jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, jnp.asarray(ids[None])))


def in_cases(*, rounded: tuple[bool, ...]) -> Callable[[Any], Any]:
    """Run a test with `ours` of every case, which stands in `case`."""
    chosen = [case for case in CASES if case.values[2] in rounded]
    both = [pytest.param(*[case.values] * 2, marks=case.marks, id="-".join(map(str, case.values))) for case in chosen]
    return pytest.mark.parametrize(("ours", "case"), both, indirect=["ours"], scope="module")


def test_both_clamps_of_the_experts_bite_in_every_layer(checkpoint: Path) -> None:
    """So that a clamp that is left out, or is on a side where there is none, changes what is compared."""
    model = hf_model(checkpoint, torch.float32)
    limit = cases.CONFIG.swiglu_limit
    seen: list[list[bool]] = []

    def look(gate_up: Any) -> Any:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        beyond = [side > limit for side in (gate, -gate, up, -up)]
        seen[-1] = [before or bool(each.any()) for before, each in zip(seen[-1], beyond, strict=True)]
        return type(model.model.layers[0].mlp.experts)._apply_gate(model.model.layers[0].mlp.experts, gate_up)

    for layer in model.model.layers:
        layer.mlp.experts._apply_gate = look
        layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append([False] * 4))
    model(torch.tensor(cases.PROMPT)[None])
    assert seen == [[True] * 4] * cases.CONFIG.num_hidden_layers


def assert_as_near(mine: Any, theirs: np.ndarray, exact: np.ndarray) -> None:
    """The errors are at most RMS and LARGEST times those of transformers."""
    own, other = (np.abs(np.asarray(each, np.float64).reshape(exact.shape) - exact) for each in (mine, theirs))
    assert np.sqrt((own**2).mean()) <= RMS * np.sqrt((other**2).mean())
    assert own.max() <= LARGEST * other.max()


def activations(dtype: str) -> list[np.ndarray]:
    """Of the experts of gpt-oss-20b: the example's and transformers' in a dtype, and in float64."""
    experts = Experts(replace(cases.CONFIG, swiglu_alpha=1.702, swiglu_limit=7.0), dtype=dtype, rngs=nnx.Rngs(0))
    of_torch = SimpleNamespace(alpha=1.702, limit=7.0)
    gate_up = (3 * np.random.default_rng(0).standard_normal((20000, 2))).astype(jnp.dtype(dtype))
    given = torch.from_numpy(gate_up.astype(np.float64))
    both = (modeling.GptOssExperts._apply_gate(of_torch, each) for each in (given.to(getattr(torch, dtype)), given))
    return [np.asarray(jax.jit(experts.activation)(gate_up)), *(each.double().numpy() for each in both)]


def attended(dtype: str) -> list[np.ndarray]:
    """Attention of heads of 48 dimensions, of all tokens to all: as `activations`."""
    random = np.random.default_rng(0)
    given = [scale * random.standard_normal((4, 16, 8, 48)) for scale in (4, 4, 1)] + [random.standard_normal(8)]
    queries, keys, values, sinks = (each.astype(jnp.dtype(dtype)) for each in given)
    found = [np.asarray(jax.jit(attend)(queries, LayerCache(keys, values), np.ones((16, 16), bool), sinks))]
    for wider in (getattr(torch, dtype), torch.float64):
        given = [torch.from_numpy(each.astype(np.float64)).to(wider) for each in (queries, keys, values, sinks)]
        layer = SimpleNamespace(num_key_value_groups=1, training=False, sinks=given.pop())
        heads = (each.transpose(1, 2) for each in given)
        found.append(modeling.eager_attention_forward(layer, *heads, None, 48**-0.5)[0].double().numpy())
    return found


@in_cases(rounded=(False, True))
def test_hidden_states_and_logits_are_as_near_to_float64_as_those_of_transformers(ours, case, references) -> None:
    exact, theirs = references["float64"], references[case[0]]
    output = ours.output
    for mine, other, true in zip(output.hidden_states[1:], theirs.layers, exact.layers, strict=True):
        assert_as_near(mine, other, true)
    assert_as_near(output.logits, theirs.logits, exact.logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("part", [activations, attended])
def test_alpha_and_the_scale_of_scores_are_not_rounded(part, dtype) -> None:
    """Neither is a number of 16 bits. On a CPU all roundings are those of transformers, but for sums in another order.

    So the results were found to differ by a fortieth of its error at most; with both rounded, by about all of it.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        mine, theirs, exact = part(dtype)
    difference, error = (np.sqrt(((each - theirs) ** 2).mean()) for each in (mine.astype(np.float64), exact))
    assert difference < 0.1 * error


@in_cases(rounded=(False, True))
def test_every_token_goes_to_the_experts_of_transformers_in_every_layer(ours, case, references) -> None:
    top_k = cases.CONFIG.num_experts_per_tok
    selected = [np.argsort(-logits, kind="stable")[:, :top_k] for logits in references[case[0]].router_logits]
    assert len({tuple(sorted(experts)) for layer in selected for experts in layer}) > 20
    for mine, other in zip(ours.output.routings, selected, strict=True):
        np.testing.assert_array_equal(np.sort(mine.experts), np.sort(other))


@in_cases(rounded=(False,))
def test_greedy_decoding_with_the_cache_makes_the_tokens_of_transformers(ours, case, references) -> None:
    decoder = Decoder(ours.model, length=len(cases.PROMPT) + STEPS - 1)
    decoded = [(each.tokens[0], each.logits[0]) for each in decoder.decode(cases.PROMPT[None])]
    tokens, logits = map(np.stack, zip(*decoded, strict=True))
    np.testing.assert_array_equal(tokens, references[case[0]].tokens)
    theirs, exact = (references[name].logits[len(cases.PROMPT) - 1 : -1] for name in (case[0], "float64"))
    assert_as_near(logits, theirs, exact)


@pytest.mark.parametrize("dtype", BY_DTYPE)
def test_no_selection_and_no_token_of_these_tests_hangs_on_rounding(dtype, references) -> None:
    """In float64 experts differ by more than twice the error of transformers' router logits, and tokens by more than
    twice the error that is allowed here: rounding moves neither side of a gap beyond the other."""
    exact, rounded = references["float64"], references[dtype]
    top_k = cases.CONFIG.num_experts_per_tok
    for true, other in zip(exact.router_logits, rounded.router_logits, strict=True):
        ranked = np.sort(true)[:, ::-1]
        assert (ranked[:, top_k - 1] - ranked[:, top_k] > 2 * np.abs(other - true).max()).all()
    ranked = np.sort(exact.logits[len(cases.PROMPT) - 1 : -1])
    assert (ranked[:, -1] - ranked[:, -2]).min() > 2 * LARGEST * np.abs(rounded.logits - exact.logits).max()
    assert len(set(rounded.tokens)) > 8


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        cases.CONFIG,
        replace(Config(), yarn=Yarn(16.0, 4096, 24.0, 2.0, truncate=True)),
        replace(cases.CONFIG, yarn=Yarn(8.0, 64, attention_factor=1.25)),
        replace(cases.CONFIG, yarn=Yarn(1.0, 64)),
    ],
    ids=["gpt-oss-20b", "small", "truncated", "attention factor", "factor 1"],
)
def test_the_rotary_embedding_has_the_frequencies_and_the_scale_of_transformers(config: Config) -> None:
    """transformers rounds to float32 at up to six steps behind a power that is good to one ulp; here it is once."""
    hf = transformers.GptOssConfig(**cases.hf_fields(config))
    frequencies, scale = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](hf)
    np.testing.assert_allclose(rotary.inverse_frequencies(config), frequencies.numpy(), rtol=8 * 2**-24, atol=0)
    assert config.yarn is not None
    assert config.yarn.scale == scale


def test_the_rotary_embedding_without_scaling_has_the_frequencies_of_transformers() -> None:
    hf = transformers.GptOssConfig(**cases.hf_fields(cases.CONFIG))
    theta = 500.0
    hf.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    embedding = transformers.models.gpt_oss.modeling_gpt_oss.GptOssRotaryEmbedding(hf)
    found = rotary.inverse_frequencies(replace(cases.CONFIG, rope_theta=theta, yarn=None))
    np.testing.assert_allclose(found, embedding.inv_freq.numpy(), rtol=4 * 2**-24, atol=0)
    assert embedding.attention_scaling == 1


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"rope_scaling": None, "rope_parameters": None},
        {"rope_scaling": {}},
        {"rope_parameters": {}},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 700.0}},
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        *({"rope_scaling": YARN | changed} for changed in ({}, {"truncate": None}, {"truncate": True})),
        *(
            {"rope_scaling": YARN | {"truncate": False} | changed}
            for changed in ({"beta_fast": None}, {"type": "linear"})
        ),
        {"rope_scaling": YARN, "original_max_position_embeddings": 64},
    ],
    ids=str,
)
def test_the_rotary_embedding_of_a_config_json_is_read_as_by_transformers(changed: dict[str, Any]) -> None:
    fields = cases.hf_fields(cases.CONFIG) | {"rope_theta": 500.0}
    del fields["rope_parameters"]
    config = Config.from_hf(fields | changed)
    hf = transformers.GptOssConfig(**fields | copy.deepcopy(changed))
    embedding = transformers.models.gpt_oss.modeling_gpt_oss.GptOssRotaryEmbedding(hf)
    np.testing.assert_allclose(rotary.inverse_frequencies(config), embedding.inv_freq.numpy(), rtol=8 * 2**-24, atol=0)
    assert (1 if config.yarn is None else config.yarn.scale) == embedding.attention_scaling
