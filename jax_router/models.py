"""Published routers by name, each with the source of its numbers."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jax_router.routing import RoutingSpec


@dataclass(frozen=True)
class Model:
    """The router of a published model: `logits[T, experts] = x[T, hidden] @ weight[experts, hidden].T (+ bias)`."""

    name: str
    hidden: int
    experts: int  # routed ones; a shared expert has no logit
    spec: RoutingSpec  # what its router does with the logits
    repository: str  # on Hugging Face; its config.json is where the numbers belong
    fields: tuple[str, ...]  # of config.json: hidden, experts, top_k, and what else the spec depends on
    read_in: str  # the public file in which they were read
    spec_read_in: str = ""  # that of the fields after top_k, where it is another
    bias: bool = False  # added to the logits. Correction biases, which only move the selection, are not
    dtype: str = "bfloat16"  # of the hidden states

    @property
    def top_k(self) -> int:
        """Experts chosen per token."""
        return self.spec.top_k

    @property
    def source(self) -> str:
        """Where the numbers come from, in words."""
        found = f"config.json of {self.repository} ({', '.join(self.fields)}), read in {self.read_in}"
        return found + (f", the spec in {self.spec_read_in}" if self.spec_read_in else "")


class UnknownModelError(KeyError):
    """A name that is not in `models`. The message has the names that come close."""

    def __init__(self, name: object, known: tuple[str, ...]) -> None:
        super().__init__(name)
        lowered = {candidate.lower(): candidate for candidate in known}
        close = [lowered[match] for match in difflib.get_close_matches(str(name).lower(), lowered, 3)]
        remedy = f"did you mean {' or '.join(close)}?" if close else "for another model, pass its hidden and experts."
        self.message = f"model is {name!r}. Expected one of {', '.join(known)}; {remedy}"

    def __str__(self) -> str:  # that of KeyError is the repr of the message
        return self.message


class Models(Mapping[str, Model]):
    """A read-only mapping from names to models.

    Raises:
      UnknownModelError: the name is not in it; a KeyError that suggests close names.
    """

    def __init__(self, *models: Model) -> None:
        self._models = {model.name: model for model in models}

    def __getitem__(self, name: str) -> Model:
        if name not in self._models:
            raise UnknownModelError(name, tuple(self._models))
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def __repr__(self) -> str:
        return f"Models({', '.join(self._models)})"


def _model(
    name: str, hidden: int, experts: int, repository: str, config: dict[str, Any], read_in: str, **more: Any
) -> Model:
    """A model by the fields of its config.json, which `RoutingSpec.from_hf_config` reads.

    `config` has model_type, the name of the field with the number of experts as "experts", top_k's field and others.
    """
    config = dict(config)
    fields = ("hidden_size", config.pop("experts"), *(field for field in config if field != "model_type"))
    return Model(name, hidden, experts, RoutingSpec.from_hf_config(config), repository, fields, read_in, **more)


def _deepseek_v3(model_type: str, top_k: int, scaling: float, groups: int = 1, kept: int = 1) -> dict[str, Any]:
    return {
        "model_type": model_type, "experts": "n_routed_experts", "num_experts_per_tok": top_k, "norm_topk_prob": True,
        "routed_scaling_factor": scaling, "n_group": groups, "topk_group": kept,
    }  # fmt: skip


def _qwen(model_type: str, top_k: int, norm: bool | None) -> dict[str, Any]:
    """None where the family normalizes without being asked."""
    config = {"model_type": model_type, "experts": "num_experts", "num_experts_per_tok": top_k}
    return config if norm is None else {**config, "norm_topk_prob": norm}


def _local(model_type: str, top_k: int) -> dict[str, Any]:
    return {"model_type": model_type, "experts": "num_local_experts", "num_experts_per_tok": top_k}


def _transformers(name: str) -> str:
    return f"the defaults of huggingface/transformers src/transformers/models/{name}/configuration_{name}.py"


def _slime(name: str) -> str:
    return f"THUDM/slime scripts/models/{name}.sh"


def _megatron(name: str) -> str:
    return f"NVIDIA/Megatron-LM examples/post_training/modelopt/conf/{name}.sh"


def _primus(name: str) -> str:
    return f"AMD-AIG-AIMA/Primus primus/configs/models/megatron/{name}.yaml"


# gpt-oss is alone in having a bias: its gate is a torch.nn.Linear with one in openai/gpt-oss gpt_oss/torch/model.py.
models = Models(
    _model(
        "gpt-oss-20b", 2880, 32, "openai/gpt-oss-20b", _local("gpt_oss", 4),
        "EchoCog/gpt-oss-20b docs/gpt-oss-20b-architecture.md", bias=True,
    ),
    _model(
        "gpt-oss-120b", 2880, 128, "openai/gpt-oss-120b", _local("gpt_oss", 4), _transformers("gpt_oss"), bias=True,
    ),
    _model(
        "DeepSeek-V3", 7168, 256, "deepseek-ai/DeepSeek-V3", _deepseek_v3("deepseek_v3", 8, 2.5, 8, 4),
        _transformers("deepseek_v3"),
    ),
    _model(
        "Kimi-K2", 7168, 384, "moonshotai/Kimi-K2-Instruct", _deepseek_v3("kimi_k2", 8, 2.827),
        _megatron("moonshotai/Kimi-K2-Instruct"),
    ),
    _model(
        "Qwen3-30B-A3B", 2048, 128, "Qwen/Qwen3-30B-A3B", _qwen("qwen3_moe", 8, True), _transformers("qwen3_moe"),
        spec_read_in=_slime("qwen3-30B-A3B"),
    ),
    _model(
        "Qwen3-235B-A22B", 4096, 128, "Qwen/Qwen3-235B-A22B", _qwen("qwen3_moe", 8, True), _slime("qwen3-235B-A22B"),
    ),
    _model(
        "Qwen3-Next-80B-A3B", 2048, 512, "Qwen/Qwen3-Next-80B-A3B-Instruct", _qwen("qwen3_next", 10, True),
        _transformers("qwen3_next"),
    ),
    _model(
        "Qwen3.5-397B-A17B", 4096, 512, "Qwen/Qwen3.5-397B-A17B", _qwen("qwen3_5_moe_text", 10, None),
        _slime("qwen3.5-397B-A17B"),
    ),
    _model("GLM-4.5", 5120, 160, "zai-org/GLM-4.5", _deepseek_v3("glm4_moe", 8, 2.5), _slime("glm4.5-355B-A32B")),
    _model(
        "GLM-4.5-Air", 4096, 128, "zai-org/GLM-4.5-Air", _deepseek_v3("glm4_moe", 8, 1.0), _transformers("glm4_moe"),
    ),
    _model("MiniMax-M2", 3072, 256, "MiniMaxAI/MiniMax-M2", _local("minimax_m2", 8), _transformers("minimax_m2")),
    _model("Mixtral-8x7B", 4096, 8, "mistralai/Mixtral-8x7B-v0.1", _local("mixtral", 2), _transformers("mixtral")),
    _model(
        "Llama-4-Maverick", 5120, 128, "meta-llama/Llama-4-Maverick-17B-128E-Instruct", _local("llama4_text", 1),
        _megatron("meta-llama/Llama-4-Maverick-17B-128E-Instruct"),
    ),
    _model("OLMoE-1B-7B", 2048, 64, "allenai/OLMoE-1B-7B-0924", _qwen("olmoe", 8, False), _transformers("olmoe")),
    _model(
        "Nemotron-3-Nano-30B-A3B", 2688, 128, "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        _deepseek_v3("nemotron_h", 6, 2.5), _slime("nemotron-nano-30B-A3B"),
        spec_read_in=f"{_transformers('nemotron3_5_transcribe')}, which has it as its text model",
    ),
    _model(
        "DeepSeek-V2", 5120, 160, "deepseek-ai/DeepSeek-V2",
        {
            "model_type": "deepseek_v2", "experts": "n_routed_experts", "num_experts_per_tok": 6, "n_group": 8,
            "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
        },
        _primus("deepseek_v2"),
    ),
    _model(
        "DeepSeek-V3.2", 7168, 256, "deepseek-ai/DeepSeek-V3.2-Exp", _deepseek_v3("deepseek_v32", 8, 2.5, 8, 4),
        _transformers("deepseek_v32"),
    ),
    _model(
        "DeepSeek-V4-Flash", 4096, 256, "deepseek-ai/DeepSeek-V4-Flash-Base",
        {
            "model_type": "deepseek_v4", "experts": "n_routed_experts", "num_experts_per_tok": 6,
            "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5,
        },
        _transformers("deepseek_v4"),
    ),
    _model(
        "Kimi-Linear-48B-A3B", 2304, 256, "moonshotai/Kimi-Linear-48B-A3B-Instruct",
        {
            "model_type": "kimi_linear", "experts": "num_experts", "num_experts_per_token": 8, "moe_renormalize": True,
            "routed_scaling_factor": 2.446, "num_expert_group": 1, "topk_group": 1,
        },
        _transformers("kimi_linear"),
    ),
    _model("GLM-5", 6144, 256, "zai-org/GLM-5", _deepseek_v3("glm_moe_dsa", 8, 2.5), _transformers("glm_moe_dsa")),
    _model(
        "LongCat-Flash", 6144, 768, "meituan-longcat/LongCat-Flash-Chat",
        {
            "model_type": "longcat_flash", "experts": "n_routed_experts + zero_expert_num", "moe_topk": 12,
            "routed_scaling_factor": 6.0,
        },
        _transformers("longcat_flash"),
    ),
    _model(
        "ERNIE-4.5-21B-A3B", 2560, 64, "baidu/ERNIE-4.5-21B-A3B-PT",
        {"model_type": "ernie4_5_moe", "experts": "moe_num_experts", "moe_k": 6, "moe_norm_min": 1e-12},
        _transformers("ernie4_5_moe"),
    ),
    _model(
        "MiMo-V2-Flash", 4096, 256, "XiaomiMiMo/MiMo-V2-Flash", _deepseek_v3("mimo_v2_flash", 8, 1.0),
        _transformers("mimo_v2_flash"),
    ),
    _model(
        "LFM2-8B-A1B", 2048, 32, "LiquidAI/LFM2-8B-A1B",
        {**_qwen("lfm2_moe", 4, True), "routed_scaling_factor": 1.0}, _transformers("lfm2_moe"),
    ),
    _model(
        "Hy3", 4096, 192, "tencent/Hy3-preview",
        {
            "model_type": "hy_v3", "experts": "num_experts", "num_experts_per_tok": 8,
            "router_scaling_factor": 2.826,
        },
        _transformers("hy_v3"),
    ),
    _model(
        "Gemma-4-26B-A4B", 2816, 128, "google/gemma-4-26B-A4B-it",
        {"model_type": "gemma4_text", "experts": "num_experts", "top_k_experts": 8, "enable_moe_block": True},
        _slime("gemma4-26B-A4B"),
    ),
)  # fmt: skip
