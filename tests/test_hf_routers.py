"""Every router of the installed Hugging Face transformers selects what its RoutingSpec selects, or is refused.

The logits have the same bits in PyTorch and in JAX: states of -1, 0 and 1 and weights of few bits, whose sums are exact
in float32 in every order. So experts must be equal, except where the last selected and the first rejected choice are so
close that the float32 scores of the two libraries may be in another order.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hf_cases import CASES, NO_ROUTER, REFUSED, Case, call_hash_router, takes_correction  # noqa: E402

import jax_router as jr  # noqa: E402
from jax_router import checks, hf, routing  # noqa: E402
from jax_router.implementations import xla  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_in_haste")
PINNED = "5.23.0"  # of constraints.txt; with another version the classes that it has must agree
TOKENS = 256
route_logits = jax.jit(routing.route_logits, static_argnames=("spec", "dtype"))
ULP = 2.0**-23
MODELS = Path(transformers.__file__).parent / "models"
# Of the logits. exp(-46) is 1e-20, the usual epsilon; sqrt(exp(-80)) is 4e-18, as float32 has no exp(-92).
MEANS = {"plain": 0.0, "negative choices": 0.0, "small scores": -46.0, "tiny scores": -80.0}

# Each library may be off by 2 ulps in a score and by half in adding the bias, on both sides of the gap: 10 in all, and
# twice that for a group's sum of two.
GAP_ULPS = 20


@pytest.fixture(autouse=True)
def on_cpu() -> Any:
    with jax.default_device(jax.devices("cpu")[0]):
        yield


OTHER_USES = r"Attention|Indexer|Model$|For[A-Z]"  # of topk, in classes named for a Mixture-of-Experts model


def router_classes() -> dict[tuple[str, str], str]:
    """(model, class) of everything that may be a router in the installed version, and the file that has it."""
    found = {}
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        text = file.read_text()
        if not re.search(r"^class \w*(Router|Gat)", text, re.MULTILINE) and "topk(" not in text:
            continue
        for name, block in re.findall(r"^(?=class (\w+))(.*(?:\n(?!\w|@).*)*)", text, re.MULTILINE):
            named = re.search(r"Router|Gat(e|ing)$", name)
            layer = re.search(r"MoE|Moe|FFN|Expert", name) and not re.search(OTHER_USES, name)
            # To parse every file takes five seconds.
            if named or (layer and "topk" in block and any(map(_is_topk, ast.walk(ast.parse(block))))):
                found[file.parent.name, name] = file.name
    return found


def _is_topk(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "topk"


FOUND = router_classes()
INSTALLED = [case for case in CASES if (case.model, case.router) in FOUND]


def test_every_router_class_is_expressed_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    known = {(case.model, case.router) for case in CASES} | set(REFUSED) | set(NO_ROUTER)
    assert len(known) == len(CASES) + len(REFUSED) + len(NO_ROUTER)
    new, gone = sorted(FOUND.keys() - known), sorted(known - FOUND.keys())
    if transformers.__version__ == PINNED:
        assert (new, gone) == ([], [])
        assert len(INSTALLED) >= 50
    else:
        with capsys.disabled():
            print(f"\ntransformers {transformers.__version__}: {len(INSTALLED)} of {len(CASES)} routers of {PINNED}")
            print(f"not in it: {gone}\nonly in it: {new}")
        assert len(INSTALLED) >= 30


@pytest.mark.parametrize(("model", "router"), REFUSED, ids=":".join)
def test_the_others_are_refused(model: str, router: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^model_type is '{REFUSED[model, router]}', whose router "):
        jr.RoutingSpec.from_hf_config({"model_type": REFUSED[model, router], "num_experts_per_tok": 2})


def test_every_family_has_a_case() -> None:
    model_types = {_config(case, case.variants[0]).model_type for case in INSTALLED}
    expressed = {name for name, row in hf.FAMILIES.items() if not isinstance(row, hf.Refused)}
    if transformers.__version__ == PINNED:
        assert expressed - model_types == {"kimi_k2"}  # another name of deepseek_v3
    assert model_types <= expressed


def _precision(model_type: str) -> str:
    row = hf.FAMILIES[model_type]
    return (next(iter(row.cases.values())) if isinstance(row, hf.Switch) else row).precision


def _config(case: Case, variant: dict[str, Any]) -> Any:
    module = importlib.import_module(f"transformers.models.{case.model}.configuration_{case.model}")
    return getattr(module, case.config)(**{name: value for name, value in variant.items() if name != "data"})


@functools.lru_cache(maxsize=8)
def _states_and_weight(hidden: int, experts: int, mean: float, bits: int) -> tuple[np.ndarray, np.ndarray, float]:
    """x [T, H] and weight [E, H] in float32 whose products have exact sums in any order, and the unit of these sums."""
    random = np.random.default_rng(hidden * experts)
    x = random.choice(np.array([-1, 0, 1], np.int8), (TOKENS, hidden), p=[0.3, 0.4, 0.3])
    limit = 2 ** (bits - 1)
    weight = random.integers(1 - limit, limit, (experts, hidden))
    unit = 2.0 ** round(np.log2(1.3 / (limit / np.sqrt(3) * np.sqrt(0.6 * hidden))))
    x[:, 0] = 1
    weight[:, 0] = round(mean / unit)
    assert (np.abs(x) @ np.abs(weight).T.astype(np.float64)).max() < 2**23  # and so is every partial sum
    return x.astype(np.float32), (weight * unit).astype(np.float32), unit


def _correction_bias(spec: jr.RoutingSpec, experts: int, data: str) -> np.ndarray:
    """[E] of the size that moves the selection of some experts, with both signs."""
    random = np.random.default_rng(experts)
    size = 1.0 if spec.select_on == "logits" else 1 / experts if spec.score_function == "softmax" else 0.3
    bias = random.uniform(-2.2, -1.2, experts) if data == "negative choices" else size * random.normal(size=experts)
    return bias.astype(jnp.bfloat16).astype(np.float32)


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


SCORES = {
    "softmax": _softmax,
    "softmax_topk": lambda logits: logits,
    "sigmoid": lambda logits: 1 / (1 + np.exp(-logits)),
    "sqrtsoftplus": lambda logits: np.sqrt(np.log1p(np.exp(logits))),
}


def _is_clear(logits: np.ndarray, correction: np.ndarray | None, spec: jr.RoutingSpec) -> np.ndarray:
    """Per token, whether no rounding of float32 scores can change the selection of float64 logits [T, E]."""
    scores = logits if spec.select_on == "logits" else SCORES[spec.score_function](logits)
    choice = scores + (0 if correction is None else correction.astype(np.float64))
    limit = GAP_ULPS * ULP * (np.abs(scores).max(-1) + (0 if correction is None else np.abs(correction).max()))
    clear = np.ones(len(logits), bool)
    if spec.num_groups is not None:
        in_groups = choice.reshape(len(choice), spec.num_groups, -1)
        best = np.sort(in_groups, axis=-1)[..., -1 if spec.group_score == "max" else -2 :].sum(-1)
        order = np.sort(best, axis=-1)[:, ::-1]
        if spec.group_topk < spec.num_groups:
            clear &= order[:, spec.group_topk - 1] - order[:, spec.group_topk] > limit
        kept = best >= order[:, [spec.group_topk - 1]]
        choice = np.where(kept[..., None], in_groups, spec.masked_choice).reshape(choice.shape)
    order = np.sort(choice, axis=-1)[:, ::-1]
    if spec.top_k < choice.shape[-1]:
        with np.errstate(invalid="ignore"):  # -inf - -inf would be two experts of masked groups; not clear
            clear &= order[:, spec.top_k - 1] - order[:, spec.top_k] > limit
    return clear


class Router:
    """One PyTorch router with seeded parameters, and the same numbers for JAX."""

    def __init__(self, case: Case, variant: dict[str, Any], *, bits: int = 12, round_logits: bool = False) -> None:
        config, data = _config(case, variant), variant.get("data", "plain")
        self.case, self.spec = case, jr.RoutingSpec.from_hf_config(config, round_logits=round_logits)
        module = importlib.import_module(f"transformers.models.{case.model}.modeling_{case.model}")
        self.module = case.build(getattr(module, case.router), config).eval()
        parameters = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        [self.linear] = [tensor for name, tensor in parameters.items() if name.endswith("weight")]
        self.experts, hidden = self.linear.shape
        checks.spec_fits(self.spec, self.experts)
        self.x, self.weight, unit = _states_and_weight(hidden, self.experts, MEANS[data], bits)
        random = np.random.default_rng(1)
        correction = _correction_bias(self.spec, self.experts, data)
        # All in values of bfloat16, so that a 16-bit copy of the module computes with the same numbers.
        values = {
            "weight": self.weight,
            "bias": unit * random.integers(-127, 128, self.experts),
            "per_expert_scale": random.integers(64, 192, self.experts) / 128,
            "e_score_correction_bias": correction,
        }
        with torch.no_grad():
            for name, tensor in parameters.items():
                last = name.rpartition(".")[2]
                if last in values:
                    tensor.copy_(torch.from_numpy(values[last]).reshape(tensor.shape))
                else:
                    assert last in ("scale", "tid2eid"), f"what is {name} of {case.router}?"
        in_module = {name.rpartition(".")[2] for name in parameters}
        self.bias, self.scale = (
            values[name].astype(np.float32) if name in in_module else None for name in ("bias", "per_expert_scale")
        )
        from_block = takes_correction(self.module) and getattr(config, "use_expert_bias", True)
        self.correction = correction if from_block or "e_score_correction_bias" in in_module else None
        self.replay = None
        if case.call is call_hash_router:
            self.replay = np.argsort(random.random((TOKENS, self.experts)), axis=-1)[:, : self.spec.top_k]

    def in_torch(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, experts) of the module."""
        correction, replay = (
            None if value is None else torch.from_numpy(value) for value in (self.correction, self.replay)
        )
        return self.case.call(self.module, x, correction, replay)

    def in_jax(self, dtype: Any = jnp.float32) -> jr.Routing:
        """The specification, in two steps: routers with one spec share what XLA compiles for the second."""
        x, weight = jnp.asarray(self.x, dtype), jnp.asarray(self.weight, dtype)
        logits = xla.router_gemm(x, weight, self.bias, out_dtype=jnp.float32)
        experts = None if self.replay is None else jnp.asarray(self.replay, jnp.int32)
        weights, experts = route_logits(
            logits, self.correction, self.scale, experts, spec=self.spec, dtype=jnp.dtype(dtype).name
        )
        return jr.Routing(weights, experts, logits)

    def compare(self, weights: torch.Tensor, experts: torch.Tensor, ours: jr.Routing, *, at_least: float) -> float:
        """Assert that both selected the same experts with the same weights; the largest error of a weight in ulps.

        Args:
          weights, experts: of the module.
          ours: of the specification.
          at_least: the share of tokens whose selection no rounding can change: all others are not compared.
        """
        logits = self.x.astype(np.float64) @ self.weight.T.astype(np.float64)
        logits += 0 if self.bias is None else self.bias
        assert np.array_equal(ours.logits, logits), "the logits are not exact"
        if self.spec.round_logits:
            logits = logits.astype(jnp.bfloat16).astype(np.float64)
        clear = _is_clear(logits, self.correction, self.spec) | (self.replay is not None)
        assert clear.mean() >= at_least, f"{clear.mean():.3f} of the tokens have a clear selection"
        theirs, mine = (np.argsort(choice, axis=-1)[clear] for choice in (experts.numpy(), ours.experts))
        selected = np.take_along_axis(experts.numpy()[clear], theirs, -1)
        np.testing.assert_array_equal(selected, np.take_along_axis(np.asarray(ours.experts)[clear], mine, -1))
        expected = np.take_along_axis(weights.float().numpy()[clear], theirs, -1).astype(np.float64)
        found = np.take_along_axis(np.asarray(ours.weights)[clear], mine, -1)
        return float((np.abs(found - expected) / np.abs(expected)).max() / ULP)

    @property
    def bound(self) -> float:
        """What two libraries may differ by in a weight, in ulps.

        Each has a score within 2 ulps; it is divided, scaled and scaled by expert, half an ulp each. A sum of n
        positive terms has n roundings of at most half an ulp, of random signs. 3.7 were seen on CPUs.
        """
        summed = self.experts if self.spec.score_function == "softmax" else 0
        summed += self.spec.top_k if self.spec.renormalize or self.spec.score_function == "softmax_topk" else 0
        return 2 * (2 + 3 * 0.5) + np.sqrt(summed) / 2


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(case, variant, id=f"{case.router}-{number}")
        for case in INSTALLED
        for number, variant in enumerate(case.variants)
    ],
)
def test_a_router_in_float32_selects_the_same_experts_with_the_same_weights(
    case: Case, variant: dict[str, Any]
) -> None:
    router = Router(case, variant)
    with torch.no_grad():
        weights, experts = router.in_torch(torch.from_numpy(router.x))
    assert router.compare(weights, experts, router.in_jax(), at_least=0.99) <= router.bound


@pytest.mark.parametrize("case", INSTALLED, ids=lambda case: case.router)
def test_a_router_in_bfloat16_is_the_specification_of_rounded_logits_or_refused(case: Case) -> None:
    config = _config(case, case.variants[0])
    if _precision(config.model_type) == hf.ROUNDED_SCORES:
        with pytest.raises(NotImplementedError, match=r"^round_logits is True but a 16-bit "):
            jr.RoutingSpec.from_hf_config(config, round_logits=True)
        return
    router = Router(case, case.variants[0], bits=8, round_logits=True)
    float32_weight = case.model == "inkling2"  # is in _keep_in_fp32_modules_strict, and its forward relies on that
    router.module.to(torch.bfloat16)
    if float32_weight:
        router.module.weight.data = router.module.weight.data.float()
    with torch.no_grad():
        weights, experts = router.in_torch(torch.from_numpy(router.x).bfloat16())
    # Rounded logits tie often, and then the order of torch.topk is its own.
    at_least = 0.3 if router.spec.round_logits else 0.9
    last_rounding = 2.0**-8 / ULP if weights.dtype == torch.bfloat16 else 0
    found = router.compare(weights, experts, router.in_jax(jnp.bfloat16), at_least=at_least)
    assert found <= router.bound + last_rounding


@pytest.mark.parametrize("case", INSTALLED, ids=lambda case: case.router)
def test_a_config_json_gives_the_spec_of_the_configuration(case: Case) -> None:
    for variant in case.variants:
        config = _config(case, variant)
        stored = json.loads(config.to_json_string())
        assert jr.RoutingSpec.from_hf_config(stored) == jr.RoutingSpec.from_hf_config(config)


def test_presets_read_in_the_defaults_are_the_defaults() -> None:
    """Of those whose model_type has such a file in the installed version."""
    compared = 0
    for preset in jr.models.values():
        found = re.search(r"/models/(\w+)/configuration_\w+\.py$", preset.read_in)
        if found is None or preset.spec_read_in or not (MODELS / found[1]).exists():
            continue
        [case, *_] = [case for case in INSTALLED if case.model == found[1]]
        config = _config(case, {})
        zero_experts = getattr(config, "zero_expert_num", None) or 0  # of LongCat, routed as the others are
        assert (preset.hidden, preset.spec) == (config.hidden_size, jr.RoutingSpec.from_hf_config(config)), preset.name
        numbers = {config.to_dict().get(field) for field in ("n_routed_experts", "num_experts", "num_local_experts")}
        numbers |= {config.to_dict().get("moe_num_experts")}
        assert preset.experts - zero_experts in numbers, preset.name
        compared += 1
    assert compared >= 15


# Every score function, with and without groups, renormalization, its clamp, a correction bias: router and variant.
DIFFERENTIATED = {
    "DeepseekV2TopkRouter": (1,), "DeepseekV3TopkRouter": (0, 2, 3), "DeepseekV4TopKRouter": (0,),
    "DeepseekV4HashRouter": (0,), "Gemma4TextRouter": (0,), "Ernie4_5_MoeTopKRouter": (0, 1), "GptOssTopKRouter": (1,),
    "Kolibri1TopKRouter": (2,), "Llama4Router": (2,), "LongcatFlashTopkRouter": (1,), "Mistral4TopkRouter": (2,),
    "Qwen3MoeTopKRouter": (1, 2),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "number"),
    [pytest.param(case, n, id=f"{case.router}-{n}") for case in INSTALLED for n in DIFFERENTIATED.get(case.router, ())],
)
def test_the_gradients_are_those_of_the_module(case: Case, number: int) -> None:
    router = Router(case, case.variants[number])
    random = np.random.default_rng(2)
    # A loss of fixed random coefficients per token and expert; the selection is PyTorch's on both sides.
    coefficients = random.normal(size=(TOKENS, router.experts)).astype(np.float32)
    x = torch.from_numpy(router.x).requires_grad_()
    weights, experts = router.in_torch(x)
    (weights * torch.from_numpy(coefficients).gather(1, experts)).sum().backward()

    @functools.partial(jax.jit, static_argnums=2)
    def loss(x: jax.Array, weight: jax.Array, spec: jr.RoutingSpec, *rest: Any) -> jax.Array:
        bias, correction, scale, experts = rest
        weights = xla.route(x, weight, bias, correction, scale, experts, spec=spec, return_logits=False).weights
        return (weights * jnp.take_along_axis(coefficients, experts, axis=-1)).sum()

    rest = router.bias, router.correction, router.scale, jnp.asarray(experts.numpy(), jnp.int32)
    ours = jax.grad(loss, argnums=(0, 1))(jnp.asarray(router.x), jnp.asarray(router.weight), router.spec, *rest)
    # A derivative is off by some ulps, and by the random roundings of a sum over the experts or the tokens.
    bound = 8 + np.sqrt(max(router.experts, TOKENS)) / 2
    for expected, found in zip((x.grad, router.linear.grad), ours, strict=True):
        largest = np.abs(expected.numpy()).max()
        assert largest > 0
        assert np.abs(found - expected.numpy()).max() <= bound * ULP * largest
