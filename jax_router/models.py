"""Published routers by name, each with the source of its numbers."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """The router of a published model: `logits[T, experts] = x[T, hidden] @ weight[experts, hidden].T (+ bias)`."""

    name: str
    hidden: int
    experts: int  # routed ones; a shared expert has no logit
    top_k: int  # experts chosen per token
    repository: str  # on Hugging Face; its config.json is where the numbers belong
    fields: tuple[str, str, str]  # of config.json: hidden, experts, top_k
    read_in: str  # the public file in which they were read
    bias: bool = False  # added to the logits. Correction biases, which only move the selection, are not
    dtype: str = "bfloat16"  # of the hidden states

    @property
    def source(self) -> str:
        """Where the numbers come from, in words."""
        return f"config.json of {self.repository} ({', '.join(self.fields)}), read in {self.read_in}"


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


_NUM_EXPERTS = ("hidden_size", "num_experts", "num_experts_per_tok")
_LOCAL_EXPERTS = ("hidden_size", "num_local_experts", "num_experts_per_tok")
_ROUTED_EXPERTS = ("hidden_size", "n_routed_experts", "num_experts_per_tok")


def _transformers(name: str) -> str:
    return f"the defaults of huggingface/transformers src/transformers/models/{name}/configuration_{name}.py"


def _slime(name: str) -> str:
    return f"THUDM/slime scripts/models/{name}.sh"


def _megatron(name: str) -> str:
    return f"NVIDIA/Megatron-LM examples/post_training/modelopt/conf/{name}.sh"


# gpt-oss is alone in having a bias: its gate is a torch.nn.Linear with one in openai/gpt-oss gpt_oss/torch/model.py.
models = Models(
    Model(
        "gpt-oss-20b", 2880, 32, 4, "openai/gpt-oss-20b", _LOCAL_EXPERTS,
        "EchoCog/gpt-oss-20b docs/gpt-oss-20b-architecture.md", bias=True,
    ),
    Model(
        "gpt-oss-120b", 2880, 128, 4, "openai/gpt-oss-120b", _LOCAL_EXPERTS, _transformers("gpt_oss"), bias=True,
    ),
    Model("DeepSeek-V3", 7168, 256, 8, "deepseek-ai/DeepSeek-V3", _ROUTED_EXPERTS, _transformers("deepseek_v3")),
    Model(
        "Kimi-K2", 7168, 384, 8, "moonshotai/Kimi-K2-Instruct", _ROUTED_EXPERTS,
        _megatron("moonshotai/Kimi-K2-Instruct"),
    ),
    Model("Qwen3-30B-A3B", 2048, 128, 8, "Qwen/Qwen3-30B-A3B", _NUM_EXPERTS, _transformers("qwen3_moe")),
    Model("Qwen3-235B-A22B", 4096, 128, 8, "Qwen/Qwen3-235B-A22B", _NUM_EXPERTS, _slime("qwen3-235B-A22B")),
    Model(
        "Qwen3-Next-80B-A3B", 2048, 512, 10, "Qwen/Qwen3-Next-80B-A3B-Instruct", _NUM_EXPERTS,
        _transformers("qwen3_next"),
    ),
    Model("Qwen3.5-397B-A17B", 4096, 512, 10, "Qwen/Qwen3.5-397B-A17B", _NUM_EXPERTS, _slime("qwen3.5-397B-A17B")),
    Model("GLM-4.5", 5120, 160, 8, "zai-org/GLM-4.5", _ROUTED_EXPERTS, _slime("glm4.5-355B-A32B")),
    Model("GLM-4.5-Air", 4096, 128, 8, "zai-org/GLM-4.5-Air", _ROUTED_EXPERTS, _transformers("glm4_moe")),
    Model("MiniMax-M2", 3072, 256, 8, "MiniMaxAI/MiniMax-M2", _LOCAL_EXPERTS, _transformers("minimax_m2")),
    Model("Mixtral-8x7B", 4096, 8, 2, "mistralai/Mixtral-8x7B-v0.1", _LOCAL_EXPERTS, _transformers("mixtral")),
    Model(
        "Llama-4-Maverick", 5120, 128, 1, "meta-llama/Llama-4-Maverick-17B-128E-Instruct", _LOCAL_EXPERTS,
        _megatron("meta-llama/Llama-4-Maverick-17B-128E-Instruct"),
    ),
    Model("OLMoE-1B-7B", 2048, 64, 8, "allenai/OLMoE-1B-7B-0924", _NUM_EXPERTS, _transformers("olmoe")),
    Model(
        "Nemotron-3-Nano-30B-A3B", 2688, 128, 6, "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", _ROUTED_EXPERTS,
        _slime("nemotron-nano-30B-A3B"),
    ),
)  # fmt: skip
