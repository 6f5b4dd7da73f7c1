"""Router weights of a Hugging Face safetensors checkpoint, and recorded activations: a user's own model to verify on.

Only the router tensors are read, and only the files that have them are opened: a checkpoint has hundreds of gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jax_router import checks, hf, safetensors_files
from jax_router.routing import RoutingSpec

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Names of parts of a model whose routers are not those of its text model, and have another spec.
OTHER_PARTS = re.compile(r"(^|\.)(talker|code2wav|visual|vision|audio)")


@dataclass(frozen=True, eq=False)
class CheckpointRouter:
    """One router as a checkpoint has it: what `jax_router.route` takes, in the stored dtypes.

    Gemma 4's norm and scale before the router and the tables of DeepSeek-V4's hash layers are not in it.
    """

    name: str  # of the weight, without its last part: "model.layers.3.mlp.router"
    layer: int  # the number in the name
    model_type: str  # in jax_router.hf
    weight: np.ndarray  # [experts, hidden]
    bias: np.ndarray | None  # [experts], added to the logits
    correction_bias: np.ndarray | None  # [experts], added to the scores for the selection alone
    expert_scale: np.ndarray | None  # [experts]
    spec: RoutingSpec


@dataclass(frozen=True)
class Layout:
    """The tensors of a router, each with its name behind "layers.N.", in the checkpoints of some families."""

    families: tuple[str, ...]
    weight: str
    correction_bias: str = ""
    bias: str = ""
    expert_scale: str = ""
    optional: tuple[str, ...] = ()  # which of them an option of the model leaves out
    transposed: bool = False  # the weight is [hidden, experts]


GATE, GATE_CORRECTION = "mlp.gate.weight", "mlp.gate.e_score_correction_bias"

# What save_pretrained of transformers 5.23 writes, which is what the published checkpoints have: a family has a second
# row if its text model alone is saved with other names than the whole. tests/test_checkpoints.py saves every family.
LAYOUTS = (
    Layout(
        (
            "cohere2_moe", "deepseek_ocr2_text", "deepseek_v2", "flex_olmo", "flint", "mellum", "mistral4", "olmoe",
            "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe_talker_text",
            "qwen3_omni_moe_text", "qwen3_vl_moe_text", "qwen4_exp_text", "unlimited_ocr_text",
        ),
        GATE,
    ),
    Layout(
        (
            "axk1", "axk2", "beam", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note_text", "glm4_moe",
            "glm4_moe_lite", "glm4v_moe_text", "glm5_next_text", "glm_moe_dsa", "hy_v4", "kimi_k2", "mimo_v2_flash",
            "minimax_m3_vl_text", "muse_spark_text", "solar_open", "step3p5",
        ),
        GATE, GATE_CORRECTION,
    ),
    Layout(("bailing_hybrid",), GATE, "mlp.gate.expert_bias"),
    Layout(("ernie4_5_moe",), GATE, "mlp.moe_statics.e_score_correction_bias"),
    Layout(("exaone_moe",), GATE, "mlp.e_score_correction_bias"),
    Layout(("dots3_note_vision_encoder",), "mlp.gate_weight", "mlp.router_bias"),
    Layout(("inkling2_text",), GATE, "mlp.gate.bias"),
    Layout(("kolibri1",), GATE, "moe.router.expert_bias"),
    Layout(("laguna",), GATE, "mlp.experts.e_score_correction_bias"),
    Layout(("hunyuan_v1_moe",), "mlp.gate.wg.weight"),
    Layout(("afmoe", "hy_v3"), "mlp.router.gate.weight", "mlp.expert_bias"),
    Layout(("aria_text",), "mlp.router.weight"),
    Layout(("gpt_oss", "openai_privacy_filter"), "mlp.router.weight", bias="mlp.router.bias"),
    Layout(("jetmoe",), "mlp.router.layer.weight"),
    Layout(("jetmoe",), "self_attention.experts.router.layer.weight"),
    Layout(
        ("longcat_flash",), "mlp.router.classifier.weight", "mlp.router.e_score_correction_bias",
        bias="mlp.router.classifier.bias", optional=("bias",),
    ),
    Layout(("minimax", "mixtral"), "block_sparse_moe.gate.weight"),
    Layout(
        ("minimax_m2", "minimax_m3_vl_text"),
        "block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias",
    ),
    Layout(("kimi_linear",), "block_sparse_moe.gate.weight", "block_sparse_moe.gate.e_score_correction_bias"),
    Layout(("granitemoe", "granitemoehybrid", "granitemoeshared"), "block_sparse_moe.router.layer.weight"),
    Layout(("granitemoe_swa",), "block_sparse_moe.router.weight"),
    Layout(("jamba", "llama4_text"), "feed_forward.router.weight"),
    Layout(
        ("lfm2_moe",), "feed_forward.gate.weight", "feed_forward.expert_bias", optional=("correction_bias",),
    ),
    Layout(("nemotron_h",), "mixer.gate.weight", "mixer.gate.e_score_correction_bias"),
    Layout(("step3p5",), "moe.gate.weight", "moe.router_bias"),
    Layout(("deepseek_v4",), "ffn.gate.weight", "ffn.gate.bias", optional=("correction_bias",)),  # of hash layers
    Layout(("dbrx",), "ffn.router.layer.weight"),
    Layout(("mistral_large4_text",), "gate.weight"),
    Layout(
        ("diffusion_gemma_text", "gemma4_text"), "router.proj.weight", expert_scale="router.per_expert_scale",
    ),
    Layout(
        ("ernie4_5_vl_moe_text",), "mlp.text_moe.gate.weight", "mlp.text_moe.gate.moe_statics.e_score_correction_bias",
    ),
    # Of the whole model: its correction bias has a row for text and one for vision.
    Layout(("ernie4_5_vl_moe_text",), GATE, "mlp.moe_statics.e_score_correction_bias", transposed=True),
)  # fmt: skip


def routers(directory: str | Path) -> tuple[CheckpointRouter, ...]:
    """Every router of the text model in a checkpoint, in the order of the layers.

    Args:
      directory: with config.json and model.safetensors, or the shards and model.safetensors.index.json, or other
        *.safetensors. With an index, shards without router tensors may be missing.

    Returns:
      One `CheckpointRouter` per router, those of multi-token prediction too if they are named as the others are.

    Raises:
      FileNotFoundError: no such directory, no config.json, no safetensors file, or a shard is missing.
      ImportError: the package safetensors is missing.
      NotImplementedError: no RoutingSpec expresses the routers of this model.
      ValueError: an unknown model_type, a broken file, no router tensors, or tensors that do not fit.

    Source: save_pretrained and conversion_mapping.py of transformers 5.23.
    """
    directory = safetensors_files.folder(directory)
    config = safetensors_files.read_json(
        directory / "config.json", "the configuration of the model; download or copy it too"
    )
    spec = RoutingSpec.from_hf_config(config)
    model_type, part = hf.text_model(config)
    hidden = hf.read_field(config if model_type == "dbrx" else part, model_type, ("hidden_size", "d_model"))
    files = safetensors_files.tensor_files(directory)
    found = list(_find(files, model_type))
    if not found:
        names = " or ".join(f"layers.N.{layout.weight}" for layout in LAYOUTS if model_type in layout.families)
        raise ValueError(
            f"directory is {str(directory)!r}, where none of {len(files)} tensors is a router of {model_type!r}. "
            f"Expected {names} with any prefix; pass the whole model, as transformers saves it."
        )
    tensors = _tensors({name: files[name] for _, _, names in found for name in names.values()})
    return tuple(
        _router(layout, layer, {role: (name, tensors[name]) for role, name in names.items()}, model_type, hidden, spec)
        for layout, layer, names in found
    )


def activations(path: str | Path, hidden: int) -> np.ndarray:
    """Recorded hidden states of a .npy file: [tokens, hidden] in float32, float16 or bfloat16.

    Args:
      path: written by numpy.save: [..., hidden], leading axes are tokens. numpy stores bfloat16 of ml_dtypes as two
        bytes without a type, which are taken for bfloat16.
      hidden: of the router.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no .npy file, a pickled one, another last axis than hidden, no tokens, or another dtype.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"path is {str(path)!r}, which is no file. Expected a .npy file of [..., {hidden}]; write one with "
            "numpy.save."
        )
    with path.open("rb") as file:
        try:
            array = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise ValueError(
                f"path is {str(path)!r}, which is no whole .npy file of numbers: {error}. Expected one of "
                f"[..., {hidden}]; write it with numpy.save from an array of float32, float16 or bfloat16."
            ) from None
    if array.dtype == np.dtype("V2"):
        array = array.view(BFLOAT16)
    if array.dtype == np.uint16:
        raise ValueError(
            f"path is {str(path)!r}, an array of uint16, which may be bfloat16 or numbers. Expected float32, float16 "
            "or bfloat16; if it is bfloat16, save array.view(ml_dtypes.bfloat16)."
        )
    if array.dtype not in (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16):
        raise ValueError(
            f"path is {str(path)!r}, an array of {array.dtype.str}. Expected float32, float16 or bfloat16; save "
            "array.astype(numpy.float32)."
        )
    if array.shape[-1:] != (hidden,):
        raise ValueError(
            f"path is {str(path)!r}, an array of shape {array.shape}. Expected [..., {hidden}], as the router has "
            f"hidden={hidden}; record what goes into the router of this model."
        )
    if array.size == 0:
        raise ValueError(
            f"path is {str(path)!r}, an array of shape {array.shape}, without tokens. Expected at least one; record "
            "some."
        )
    return np.ascontiguousarray(array.reshape(-1, hidden))


def _find(files: Mapping[str, Path], model_type: str) -> Iterator[tuple[Layout, int, dict[str, str]]]:
    """The layout, the layer and the tensors of every router by their role, in the order of the layers."""
    found = []
    for layout in (layout for layout in LAYOUTS if model_type in layout.families):
        pattern = re.compile(rf"((?:.+\.)?(?:layers|blocks))\.(\d+)\.{re.escape(layout.weight)}")
        for match in filter(None, map(pattern.fullmatch, files)):
            if not OTHER_PARTS.search(match[1]):
                found.append((match[1], int(match[2]), layout))
    for stack, layer, layout in sorted(found, key=lambda router: (*router[:2], router[2].weight)):
        names = {
            role: f"{stack}.{layer}.{name}"
            for role in ("weight", "correction_bias", "bias", "expert_scale")
            if (name := getattr(layout, role))
        }
        missing = [role for role, name in names.items() if name not in files]
        for role in missing:
            if role not in layout.optional:
                raise ValueError(
                    f"{names['weight']} has no {role}: there is no {names[role]}. Expected one in a checkpoint of "
                    f"{model_type!r}; pass the whole model, as transformers saves it."
                )
        yield layout, layer, {role: name for role, name in names.items() if role not in missing}


def _tensors(files: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """These tensors and no others, each file opened once."""
    tensors = {}
    for file, names in safetensors_files.by_file(files).items():
        with safetensors_files.opened(file, names) as stored:
            for name in names:
                safetensors_files.stored_as(name, stored.get_slice(name).get_dtype(), file)
                tensors[name] = stored.get_tensor(name)
    return tensors


def _router(
    layout: Layout,
    layer: int,
    tensors: Mapping[str, tuple[str, np.ndarray]],
    model_type: str,
    hidden: int,
    spec: RoutingSpec,
) -> CheckpointRouter:
    """The router of its tensors, each with its name, by role.

    Raises:
      ValueError: shapes that do not fit each other, the configuration or the spec.
    """
    name, weight = tensors["weight"]
    if layout.transposed:
        weight = weight.T
    if weight.ndim != 2 or weight.shape[1] != hidden:
        raise ValueError(
            f"{name} has shape {tensors['weight'][1].shape} but config.json has hidden={hidden}. Expected "
            f"{(hidden, 'experts') if layout.transposed else ('experts', hidden)}; use this checkpoint's config.json."
        )
    experts = len(weight)
    checks.spec_fits(spec, experts)
    vectors: dict[str, np.ndarray | None] = dict.fromkeys(("bias", "correction_bias", "expert_scale"))
    for role in tensors.keys() & vectors.keys():
        vector_name, stored = tensors[role]
        vector = stored[0] if role == "correction_bias" and stored.ndim == 2 else stored
        if vector.shape != (experts,):
            raise ValueError(
                f"{vector_name} has shape {stored.shape} but {name} has experts={experts}. Expected shape "
                f"({experts},); use the shards of one checkpoint."
            )
        vectors[role] = vector
    return CheckpointRouter(
        name.removesuffix("weight")[:-1], layer, model_type, np.ascontiguousarray(weight), spec=spec, **vectors
    )
