"""What is read of a checkpoint are the tensors of the model that transformers saved, of every family."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

from hf_cases import CASES, Case  # noqa: E402

import jax_router as jr  # noqa: E402
from jax_router import hf  # noqa: E402
from jax_router.verification import checkpoints  # noqa: E402
from torch_ref.convert import to_numpy  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_in_haste")
PINNED = "5.23.0"  # of constraints.txt: the families of another version are compared as far as it has them

# What makes a model small, where its configuration has the field; and what some need besides.
SMALL = {
    "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "vocab_size": 64, "num_hidden_layers": 4,
    "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0,
    "n_routed_experts": 16, "num_experts": 16, "num_local_experts": 16, "moe_num_experts": 16, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "index_head_dim": 16, "index_n_heads": 2, "ffn_hidden_size": 16, "expert_ffn_hidden_size": 16, "depth": 2,
    "num_heads": 2, "image_size": 56, "out_hidden_size": 32, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "DbrxConfig": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "Dots1Config": {"n_shared_experts": 1},
    "Dots3NoteTextConfig": {"num_hidden_layers": 2},
    "Dots3NoteVisionConfig": {
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "adapter_in_dim": 32, "adapter_out_dim": 32,
    },
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [16, 16], "head_dim": 128},
    "Gemma4TextConfig": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0},
    "GraniteMoeHybridConfig": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "Lfm2MoeConfig": {"layer_types": ["full_attention", "conv", "full_attention", "conv"]},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 16},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 64, "split_ngram_parts": 4,
    },
}  # fmt: skip


def is_installed(case: Case) -> bool:
    """Whether this version of transformers has the router; older ones have another, or no such model."""
    file = Path(transformers.__file__).parent / "models" / case.model / f"modeling_{case.model}.py"
    return file.is_file() and f"class {case.router}(" in file.read_text()


# One case per configuration class; of the models of many parts those whose names differ from the text model's alone.
INSTALLED = [case for case in CASES if is_installed(case)]
TEXT_MODELS = list({case.config: case for case in INSTALLED}.values())
WHOLE_MODELS = {
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "step3p7": "Step3p7ForConditionalGeneration",
}
CASE_OF = {case.model: case for case in CASES}


def small(config: Any, needed: dict[str, Any]) -> dict[str, Any]:
    """What makes a configuration of a class small, and the parts that the model has besides."""
    needed = NEEDED.get(config.__name__, {}) | needed
    usual = config()
    known = usual.to_dict()
    parts = {  # by their usual values: the class may say no more of a part than AutoConfig
        name: small(type(getattr(usual, name)), needed.get(name, {}))
        for name in config.sub_configs
        if known.get(name) is not None
    }
    return {name: value for name, value in SMALL.items() if name in known} | needed | parts


def modeling(case: Case) -> Any:
    return importlib.import_module(f"transformers.models.{case.model}.modeling_{case.model}")


def variant(case: Case) -> dict[str, Any]:
    return {name: value for name, value in case.variants[0].items() if name != "data" and name not in SMALL}


def text_config(case: Case) -> Any:
    module = importlib.import_module(f"transformers.models.{case.model}.configuration_{case.model}")
    config = getattr(module, case.config)
    return config(**small(config, variant(case)))


def text_model(case: Case) -> Any:
    config = text_config(case)
    candidates = [
        found
        for found in vars(modeling(case)).values()
        if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)
    ]
    own = [found for found in candidates if found.config_class is type(config)]
    # Some text models do not say which part's configuration is theirs.
    named = [found for found in candidates if re.search(r"Text(Model)?$", found.__name__)]
    choice = [found for found in own or named if not found.__name__.endswith("PreTrainedModel")]
    return max(choice, key=lambda found: found.__name__.endswith("ForCausalLM"))(config)


def whole_model(case: Case) -> Any:
    found = getattr(modeling(case), WHOLE_MODELS[case.model])
    return found(found.config_class(**small(found.config_class, {"text_config": variant(case)})))


def router_modules(model: Any, case: Case) -> list[tuple[int, Any, Any]]:
    """(layer, router, block) of the text model, in the order of the layers."""
    classes = {each.router for each in CASES if each.model == case.model}
    modules = sorted((name, module) for name, module in model.named_modules() if type(module).__name__ in classes)
    found = [
        (int(re.search(r"\d+", name)[0]), module, model.get_submodule(name.rpartition(".")[0]))
        for name, module in modules
        if "vision_moe" not in name
    ]
    return sorted(found, key=lambda router: router[0])


def parameters(router: Any, block: Any) -> dict[str, Any]:
    """The PyTorch tensors of a router by their role; some have the correction bias in the block around it."""
    own = {name.rpartition(".")[2]: tensor for name, tensor in router.state_dict(keep_vars=True).items()}
    around = dict(block.named_parameters(recurse=False)) | dict(block.named_buffers(recurse=False))
    found = {
        "weight": own["weight"], "bias": own.get("bias"), "expert_scale": own.get("per_expert_scale"),
        "correction_bias": next(
            (
                tensors[name]
                for tensors in (own, around)
                for name in ("e_score_correction_bias", "expert_bias")
                if name in tensors
            ),
            None,
        ),
    }  # fmt: skip
    return {role: tensor for role, tensor in found.items() if tensor is not None}


def seed(modules: list[tuple[int, Any, Any]]) -> None:
    """Other numbers in every tensor: many are zeros at first."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, router, block in modules:
            for tensor in parameters(router, block).values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


def assert_the_tensors_are_those_of(model: Any, modules: list[tuple[int, Any, Any]], found: Any) -> None:
    assert [router.layer for router in found] == [layer for layer, _, _ in modules]
    for router, (_, module, block) in zip(found, modules, strict=True):
        expected = {name: to_numpy(tensor.detach()) for name, tensor in parameters(module, block).items()}
        for role in ("weight", "bias", "expert_scale", "correction_bias"):
            stored = getattr(router, role)
            assert (stored is None) == (role not in expected), f"{role} of {router.name}"
            if stored is not None:
                assert bits(stored) == bits(expected[role].reshape(stored.shape)), f"{role} of {router.name}"
        assert router.spec == jr.RoutingSpec.from_hf_config(model.config)


def saved_and_read(model: Any, case: Case, folder: Path) -> None:
    modules = router_modules(model, case)
    assert modules
    seed(modules)
    model.save_pretrained(folder / "sharded", max_shard_size="50KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
    assert_the_tensors_are_those_of(model, modules, checkpoints.routers(folder / "sharded"))
    model.to(torch.bfloat16).save_pretrained(folder / "one")
    assert (folder / "one" / "model.safetensors").exists()
    assert_the_tensors_are_those_of(model, modules, checkpoints.routers(folder / "one"))


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Any:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("case", TEXT_MODELS, ids=lambda case: case.config)
def test_the_tensors_of_a_saved_text_model_are_read_bit_for_bit(case: Case, tmp_path: Path) -> None:
    saved_and_read(text_model(case), case, tmp_path)


@pytest.mark.parametrize(
    "case", [case for case in INSTALLED if case.model in WHOLE_MODELS], ids=lambda case: case.model
)
def test_the_tensors_of_a_saved_model_of_many_parts_are_those_of_its_text_model(case: Case, tmp_path: Path) -> None:
    saved_and_read(whole_model(case), case, tmp_path)


def test_every_family_that_is_expressed_has_names_and_is_saved_here() -> None:
    expressed = {name for name, row in hf.FAMILIES.items() if not isinstance(row, hf.Refused)}
    named = {family for layout in checkpoints.LAYOUTS for family in layout.families}
    assert named == expressed
    of = {name: [row for row in checkpoints.LAYOUTS if name in row.families] for name in ("deepseek_v3", "kimi_k2")}
    assert of["deepseek_v3"] == of["kimi_k2"]  # another name of the same model
    if transformers.__version__ == PINNED:
        saved = {text_config(case).model_type for case in TEXT_MODELS}
        assert saved == expressed - {"kimi_k2"}


def test_dense_layers_have_no_router_and_count_as_layers(tmp_path: Path) -> None:
    model = text_model(CASE_OF["deepseek_v3"])
    model.save_pretrained(tmp_path)
    found = checkpoints.routers(tmp_path)
    assert [(router.layer, router.name, router.model_type) for router in found] == [
        (layer, f"model.layers.{layer}.mlp.gate", "deepseek_v3") for layer in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    "model", ["deepseek_v3", "gemma4", "gpt_oss", "llama4", "longcat_flash", "minimax_m2", "mixtral", "qwen3_moe"]
)
def test_what_is_read_routes_as_the_module_does(model: str, tmp_path: Path) -> None:
    case = CASE_OF[model]
    built = text_model(case).eval()
    modules = router_modules(built, case)
    seed(modules)
    built.save_pretrained(tmp_path)
    x = np.random.default_rng(5).normal(size=(64, 32)).astype(np.float32)
    for router, (_, module, block) in zip(checkpoints.routers(tmp_path), modules, strict=True):
        with torch.no_grad():
            correction = parameters(module, block).get("correction_bias")
            weights, experts = case.call(module, torch.from_numpy(x), correction, None)
        ours = jr.route(
            jnp.asarray(x), router.weight, router.bias, spec=router.spec, correction_bias=router.correction_bias,
            expert_scale=router.expert_scale, implementation="xla",
        )  # fmt: skip
        np.testing.assert_array_equal(np.sort(ours.experts), np.sort(experts.numpy()))
        # Weights of one and the same expert: 2^-16 is far above what rounding does to them, and far below any mistake.
        in_order = np.take_along_axis(np.asarray(ours.weights), np.argsort(ours.experts), -1)
        expected = np.take_along_axis(weights.numpy(), np.argsort(experts.numpy()), -1)
        np.testing.assert_allclose(in_order, expected, rtol=2**-16)


def test_only_router_tensors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_model(CASE_OF["gpt_oss"]).save_pretrained(tmp_path)
    read = []
    opens = safetensors.safe_open

    class Watched:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.opened = opens(*arguments, **named)

        def __enter__(self) -> Watched:
            self.opened.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.opened.__exit__(*error)

        def get_tensor(self, name: str) -> Any:
            read.append(name)
            return self.opened.get_tensor(name)

        def __getattr__(self, name: str) -> Any:
            assert name in ("keys", "get_slice")
            return getattr(self.opened, name)

    monkeypatch.setattr(safetensors, "safe_open", Watched)
    assert len(checkpoints.routers(tmp_path)) == 4
    assert sorted(read) == [f"model.layers.{n}.mlp.router.{role}" for n in range(4) for role in ("bias", "weight")]


def test_shards_without_router_tensors_are_not_opened(tmp_path: Path) -> None:
    model = text_model(CASE_OF["gpt_oss"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    others = sorted(set(names.values()) - {shard for name, shard in names.items() if ".router." in name})
    assert len(others) >= 2
    (tmp_path / others[0]).unlink()
    (tmp_path / others[1]).write_bytes((tmp_path / others[1]).read_bytes()[:100])
    assert_the_tensors_are_those_of(model, router_modules(model, CASE_OF["gpt_oss"]), checkpoints.routers(tmp_path))
