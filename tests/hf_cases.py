"""Every router class of Hugging Face transformers 5.23: how to build and call it, or why it is not compared."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

Outputs = tuple[torch.Tensor, torch.Tensor]  # weights and experts, [T, k] each


def takes_correction(router: torch.nn.Module) -> bool:
    """Whether the block has the correction bias and hands it to the router."""
    return any(name.endswith("bias") for name in inspect.signature(router.forward).parameters)


def call_router(router: Any, x: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor | None) -> Outputs:
    """The usual signature: logits, weights and experts of the states, in some with the correction bias of the block.

    Their order depends on the version of transformers; their types and shapes do not.
    """
    outputs = router(x, bias) if takes_correction(router) else router(x)
    [chosen] = [output for output in outputs if not output.is_floating_point()]
    [weights] = [output for output in outputs if output.is_floating_point() and output.shape == chosen.shape]
    return weights, chosen


def call_afmoe(router: Any, x: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor | None) -> Outputs:
    return router(x[None], bias)[1:]


def call_hash_router(router: Any, x: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor) -> Outputs:
    """Token t has the id t, and the table the experts that the test gives."""
    router.tid2eid[: len(experts)] = experts
    return router(x, torch.arange(len(experts)))[1:]


def call_llama4(router: Any, x: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor | None) -> Outputs:
    """It returns scores of all experts, 0 for those that are not selected."""
    scores, _ = router(x)
    assert ((scores > 0).sum(-1) == router.top_k).all()
    return torch.topk(scores, router.top_k, dim=-1)


def call_jetmoe(router: Any, x: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor | None) -> Outputs:
    """It returns the pairs of tokens and experts sorted by expert."""
    order, tokens, gates, sizes, _ = router(x)
    assert torch.equal(order // router.top_k, tokens)
    expert_of_pair = torch.repeat_interleave(torch.arange(router.num_experts), torch.tensor(sizes))
    back = torch.argsort(order)
    return gates[back].reshape(len(x), -1), expert_of_pair[back].reshape(len(x), -1)


def call_gemma(router: Any, x: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor | None) -> Outputs:
    """The vocabulary begins behind its norm and scale: x takes the place of the normed states."""
    with router.proj.register_forward_pre_hook(lambda module, arguments: (x,)):
        return router(x)[1:]


def call_dbrx(router: Any, x: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor | None) -> Outputs:
    return router.block.route_tokens_to_experts(router.ffn, router(x))


def build_router(router: Any, config: Any) -> torch.nn.Module:
    return router(config, layer_idx=0) if "layer_idx" in inspect.signature(router).parameters else router(config)


def build_last_layer(router: Any, config: Any) -> torch.nn.Module:
    return router(config.per_layer_config[config.num_hidden_layers - 1])


def build_jetmoe(router: Any, config: Any) -> torch.nn.Module:
    return router(config.hidden_size, config.num_local_experts, config.num_experts_per_tok)


def build_dbrx(router: Any, config: Any) -> torch.nn.Module:
    """The router has the logits alone. The rest is a method of a block whose experts take gigabytes: it is borrowed."""
    built = router(config.ffn_config)
    built.block = importlib.import_module(router.__module__).DbrxFFN
    norm, top_k = config.ffn_config.moe_normalize_expert_weights, config.ffn_config.moe_top_k
    built.ffn = SimpleNamespace(moe_normalize_expert_weights=norm, top_k=top_k)
    return built


@dataclass(frozen=True)
class Case:
    """One router class, and the configurations with which it is compared."""

    model: str  # the folder in transformers/models
    router: str
    config: str
    variants: tuple[dict[str, Any], ...]  # changes to the default configuration; "data" picks that of the test
    call: Callable[..., Outputs] = call_router
    build: Callable[..., torch.nn.Module] = build_router


NORMS = ({}, {"norm_topk_prob": False}, {"norm_topk_prob": True})
SMALL = {"data": "small scores"}  # where an epsilon matters
TINY = {"data": "tiny scores"}  # where it matters to square roots
GROUPED = ({}, SMALL, {"norm_topk_prob": False, "routed_scaling_factor": 1.75})


def _grouped(experts: int) -> tuple[dict[str, Any], ...]:
    """With groups and without; biases that make every choice negative, where what masks the other groups matters."""
    groups = {"n_group": 8, "topk_group": 3, "norm_topk_prob": True}
    return (
        *GROUPED,
        groups,
        {**groups, "n_group": 16 if experts % 16 == 0 else 8, "topk_group": 5, "data": "negative choices"},
    )


def _v3(model: str, name: str, config: str = "Config", experts: int = 128, **needed: Any) -> Case:
    variants = tuple({**needed, **variant} for variant in _grouped(experts))
    return Case(model, f"{name}TopkRouter", f"{name}{config}", variants)


def _v2(model: str, name: str, **needed: Any) -> Case:
    needed = {"num_experts_per_tok": 6, **needed}
    groups = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
    return Case(
        model,
        f"{name}TopkRouter",
        f"{name}Config",
        (needed, {**needed, **groups}, {**needed, "routed_scaling_factor": 2.5}),
    )


def _plain(model: str, router: str, *variants: dict[str, Any], config: str | None = None, **how: Any) -> Case:
    stem = router.removesuffix("TopKRouter").removesuffix("TopkRouter").removesuffix("Router")
    return Case(model, router, config or f"{stem}Config", variants or ({},), **how)


CASES = (
    _plain(
        "afmoe", "AfmoeTokenChoiceRouter", {}, SMALL, {"route_scale": 2.5}, config="AfmoeConfig", call=call_afmoe,
    ),
    _plain("aria", "AriaTextTopKRouter"),
    _v3("axk1", "AXK1", experts=192),
    _plain(
        "axk2", "AXK2TopkRouter", *GROUPED, {"n_group": 8, "topk_group": 3},
        # The 8 experts of the one masked group are the k best: they have 0 and all others less.
        {"n_group": 16, "topk_group": 15, "data": "negative choices"},
    ),
    _v3("bailing_hybrid", "BailingHybrid", experts=512),
    _plain(
        "beam", "BeamTopKRouter", {}, SMALL, {"norm_topk_prob": False}, {"n_group": 1, "topk_group": 1},
        {"n_group": 16, "topk_group": 5, "data": "negative choices"},
    ),
    _plain(
        "cohere2_moe", "Cohere2MoeTopKRouter", {}, {"norm_topk_prob": False},
        {"expert_selection_fn": "sigmoid", "num_experts": 64, "num_experts_per_tok": 6},
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}, {"expert_selection_fn": "sigmoid", **SMALL},
    ),
    _plain(
        "dbrx", "DbrxRouter", {}, {"ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}},
        {"ffn_config": {"moe_num_experts": 16, "moe_top_k": 4, "moe_normalize_expert_weights": None}},
        build=build_dbrx, call=call_dbrx,
    ),
    _v2("deepseek_ocr2", "DeepseekOcr2Text"),
    _v2("deepseek_v2", "DeepseekV2", n_routed_experts=160, hidden_size=5120),
    _v3("deepseek_v3", "DeepseekV3", experts=256),
    _v3("deepseek_v32", "DeepseekV32", experts=256),
    _plain(
        "deepseek_v4", "DeepseekV4TopKRouter", {}, TINY,
        {"scoring_func": "sigmoid", "routed_scaling_factor": 2.0, **SMALL},
    ),
    _plain(
        "deepseek_v4", "DeepseekV4HashRouter", {}, TINY, {"scoring_func": "sigmoid"}, config="DeepseekV4Config",
        call=call_hash_router,
    ),
    _plain(
        "diffusion_gemma", "DiffusionGemmaTextRouter", {"num_experts": 128, "top_k_experts": 8}, call=call_gemma,
    ),
    _v3("dots1", "Dots1", num_experts_per_tok=6, n_routed_experts=128),
    _v3("dots3_note", "Dots3NoteText", experts=256),
    _plain(
        "dots3_note", "Dots3NoteVisionTopKRouter", {}, SMALL, {"router_scaling_factor": 2.5}, build=build_last_layer,
    ),
    _plain(
        "ernie4_5_moe", "Ernie4_5_MoeTopKRouter", {}, {"moe_norm_min": 0.125}, {"moe_norm_min": 0.5, "moe_k": 8},
        config="Ernie4_5_MoeConfig",
    ),
    _plain(
        "ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeTopKRouter", {}, {"moe_norm_min": 0.125},
        config="Ernie4_5_VLMoeTextConfig",
    ),
    _v3("exaone_moe", "ExaoneMoe"),
    _plain("flex_olmo", "FlexOlmoTopKRouter", *NORMS),
    _plain("flint", "FlintTopKRouter", *NORMS, SMALL),
    _plain(
        "gemma4", "Gemma4TextRouter", {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8},
        call=call_gemma,
    ),
    _v3("glm4_moe", "Glm4Moe"),
    _v3("glm4_moe_lite", "Glm4MoeLite"),
    _v3("glm4v_moe", "Glm4vMoeText"),
    _v3("glm5_next", "Glm5NextText", experts=288),
    _v3("glm_moe_dsa", "GlmMoeDsa", experts=256),
    _plain("gpt_oss", "GptOssTopKRouter", {}, {"num_local_experts": 32}),
    _plain("granitemoe", "GraniteMoeTopKRouter", {}, {"num_local_experts": 40, "num_experts_per_tok": 8}),
    _plain("granitemoe_swa", "GraniteMoeSWATopKRouter", {"num_local_experts": 40, "num_experts_per_tok": 8}),
    _plain("granitemoehybrid", "GraniteMoeHybridTopKRouter", {"num_local_experts": 64, "num_experts_per_tok": 6}),
    _plain("granitemoeshared", "GraniteMoeSharedTopKRouter", {"num_local_experts": 40, "num_experts_per_tok": 8}),
    _plain(
        "hunyuan_v1_moe", "HunYuanMoEV1Gate", {"num_experts": 64, "moe_topk": 8},
        {"num_experts": 16, "moe_topk": [3, 3]}, config="HunYuanMoEV1Config",
    ),
    _plain("hy_v3", "HYV3TopKRouter", {}, SMALL, {"router_scaling_factor": 1.0}),
    _v3("hy_v4", "HYV4", experts=256),
    _plain(
        "inkling2", "Inkling2TopKRouter", {}, SMALL, {"scoring_func": "sqrtsoftplus"},
        {"scoring_func": "sqrtsoftplus", **TINY}, config="Inkling2TextConfig",
    ),
    _plain("jamba", "JambaTopKRouter"),
    _plain(
        "jetmoe", "JetMoeTopKGating", config="JetMoeConfig", build=build_jetmoe, call=call_jetmoe,
    ),
    _v3("kimi_linear", "KimiLinear", experts=256),
    _plain("kolibri1", "Kolibri1TopKRouter", *NORMS, SMALL, {"norm_topk_prob": True, **SMALL}),
    _plain("laguna", "LagunaTopKRouter", {}, SMALL),
    _plain(
        "lfm2_moe", "Lfm2MoeTopKRouter", {}, SMALL, {"use_expert_bias": False}, {"norm_topk_prob": False},
        {"use_expert_bias": False, "routed_scaling_factor": 2.5, **SMALL},
    ),
    _plain(
        "llama4", "Llama4Router", {}, {"num_local_experts": 128}, {"num_experts_per_tok": 2},
        config="Llama4TextConfig", call=call_llama4,
    ),
    _plain("longcat_flash", "LongcatFlashTopkRouter", {}, {"zero_expert_num": 0, "routed_scaling_factor": 1.0}),
    _plain("mellum", "MellumTopKRouter", *NORMS),
    _v3("mimo_v2_flash", "MiMoV2Flash", experts=256),
    _plain("minimax", "MiniMaxTopKRouter", {}, {"num_local_experts": 32}),
    _plain("minimax_m2", "MiniMaxM2TopKRouter", {}, SMALL),
    _plain("minimax_m3_vl", "MiniMaxM3VLTopKRouter", {}, SMALL, config="MiniMaxM3VLTextConfig"),
    _plain(
        "mistral4", "Mistral4TopkRouter", {}, {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
        {"n_group": 8, "topk_group": 3}, {"n_group": 8, "topk_group": 3, "norm_topk_prob": False},
    ),
    _plain(
        "mistral_large4", "MistralLarge4TextTopkRouter", {}, {"n_group": 8, "topk_group": 3},
        {"n_group": 16, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    _plain("mixtral", "MixtralTopKRouter"),
    _plain(
        "muse_spark", "MuseSparkTopkRouter", {"output_multiplier": 1.0},
        {"output_multiplier": 1.0, "data": "small scores", "routed_scaling_factor": 2.5}, config="MuseSparkTextConfig",
    ),
    _v3("nemotron_h", "NemotronH", n_routed_experts=128, num_experts_per_tok=6),
    _plain("olmoe", "OlmoeTopKRouter", *NORMS),
    _plain("openai_privacy_filter", "OpenAIPrivacyFilterTopKRouter", {}, {"num_experts_per_tok": 3}),
    _plain("qwen2_moe", "Qwen2MoeTopKRouter", *NORMS),
    _plain("qwen3_5_moe", "Qwen3_5MoeTopKRouter", config="Qwen3_5MoeTextConfig"),
    _plain("qwen3_moe", "Qwen3MoeTopKRouter", *NORMS),
    _plain("qwen3_next", "Qwen3NextTopKRouter", *NORMS),
    # The class without the field is in the file and in no model: it is the router of a config with norm_topk_prob.
    _plain("qwen3_omni_moe", "Qwen3OmniMoeTextTopKRouter", {}),
    _plain("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextTopKRouter", *NORMS, config="Qwen3OmniMoeTextConfig"),
    _plain("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextTopKRouter", *NORMS),
    _plain("qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter"),
    _plain("qwen4_exp", "Qwen4ExpTextTopKRouter", *NORMS),
    _v3("solar_open", "SolarOpen"),
    _plain("step3p7", "Step3p7TopKRouter", {}, SMALL, config="Step3p7TextConfig"),
    _v2("unlimited_ocr", "UnlimitedOcrText"),
)  # fmt: skip

# Routers of Mixture-of-Experts layers that no RoutingSpec expresses: the model_type that is refused.
REFUSED = {
    ("doge", "DogeCDMoE"): "doge",
    ("inkling", "InklingTopkRouter"): "inkling_text",
    ("nllb_moe", "NllbMoeTop2Router"): "nllb-moe",
    ("phimoe", "PhimoeTopKRouter"): "phimoe",
    ("switch_transformers", "SwitchTransformersTop1Router"): "switch_transformers",
    ("zaya", "ZayaRouter"): "zaya",
    ("zaya", "ZayaRouterMLP"): "zaya",
}

# Classes with such a name that select no experts.
NO_ROUTER = {
    ("bailing_hybrid", "BailingHybridForgetGate"): "a gate of linear attention",
    ("d_fine", "DFineGate"): "mixes two states",
    ("dbrx", "DbrxFFN"): "compared as a part of DbrxRouter",
    ("deimv2", "Deimv2Gate"): "mixes two states",
    ("glm5_next", "Glm5NextTextForgetGate"): "a gate of linear attention",
    ("granite_docling", "GraniteDoclingDensityRouter"): "a regression over an image",
    ("kimi_linear", "KimiLinearForgetGate"): "a gate of linear attention",
    ("muse_spark", "MuseSparkResidualGate"): "scales a residual",
}
