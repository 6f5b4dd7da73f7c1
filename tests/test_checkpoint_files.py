"""What is no checkpoint and what are no activations is refused with the reason, and other layouts of files are read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("safetensors")

from safetensors.numpy import save_file

from jax_router.verification import checkpoints

# Of the checkpoints here, written tensor by tensor.
EXPERTS, HIDDEN = 8, 16
CONFIG = {"model_type": "gpt_oss", "hidden_size": HIDDEN, "num_experts_per_tok": 2}
WEIGHT, BIAS = "model.layers.0.mlp.router.weight", "model.layers.0.mlp.router.bias"


def bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


def tensors(**changes: np.ndarray) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    found = {
        "weight": random.normal(size=(EXPERTS, HIDDEN)).astype(ml_dtypes.bfloat16),
        "bias": random.normal(size=EXPERTS).astype(np.float32),
    }
    return {f"model.layers.0.mlp.router.{name}": value for name, value in (found | changes).items()}


def write(folder: Path, content: dict[str, dict[str, np.ndarray]], config: Any = CONFIG, index: Any = None) -> Path:
    """A folder with these files, each with these tensors."""
    for name, values in content.items():
        save_file(values, folder / name)
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


def one(folder: Path, config: Any = CONFIG, **changes: np.ndarray) -> Path:
    return write(folder, {"model.safetensors": tensors(**changes)}, config)


def test_several_files_without_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    values = tensors()
    write(tmp_path, {"b.safetensors": {WEIGHT: values[WEIGHT]}, "a.safetensors": {BIAS: values[BIAS]}})
    [router] = checkpoints.routers(tmp_path)
    assert (bits(router.weight), bits(router.bias)) == (bits(values[WEIGHT]), bits(values[BIAS]))


def test_routers_come_in_the_order_of_the_layers(tmp_path: Path) -> None:
    values = tensors()
    content = {name.replace(".0.", f".{layer}."): value for layer in (0, 2, 10) for name, value in values.items()}
    found = checkpoints.routers(write(tmp_path, {"model.safetensors": content}))
    assert [router.layer for router in found] == [0, 2, 10]


def test_the_hidden_size_of_dbrx_is_that_of_the_model(tmp_path: Path) -> None:
    config = {
        "model_type": "dbrx", "d_model": HIDDEN,
        "ffn_config": {"hidden_size": 6144, "moe_top_k": 2, "moe_normalize_expert_weights": 1.0},
    }  # fmt: skip
    content = {"transformer.blocks.0.ffn.router.layer.weight": tensors()[WEIGHT]}
    [router] = checkpoints.routers(write(tmp_path, {"model.safetensors": content}, config))
    assert bits(router.weight) == bits(tensors()[WEIGHT])


@pytest.mark.parametrize("part", ["talker.model", "model.visual", "vision_tower.encoder", "audio_tower"])
def test_routers_of_other_parts_are_left_out(part: str, tmp_path: Path) -> None:
    values = tensors()
    others = {name.replace("model", part, 1): value for name, value in values.items()}
    [router] = checkpoints.routers(write(tmp_path, {"model.safetensors": values | others}))
    assert router.name == "model.layers.0.mlp.router"


def refused(kind: type[Exception], pattern: str, directory: Path) -> None:
    with pytest.raises(kind, match=pattern):
        checkpoints.routers(directory)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    refused(
        FileNotFoundError, r"^directory is '.*/none', which is no directory\. Expected .*; pass ", tmp_path / "none"
    )


def test_a_missing_or_broken_configuration_is_named(tmp_path: Path) -> None:
    refused(FileNotFoundError, r"^config\.json is missing in .*\. Expected .*; download ", one(tmp_path, config=None))
    refused(ValueError, r"^config\.json in .* is no JSON: .*\. Expected .*; download ", one(tmp_path, config="{"))


def test_a_family_that_is_unknown_or_refused_is_told_by_from_hf_config(tmp_path: Path) -> None:
    refused(ValueError, r"^model_type is 'gpt_os'\. Expected .*", one(tmp_path, CONFIG | {"model_type": "gpt_os"}))
    refused(NotImplementedError, r"^model_type is 'phimoe', whose ", one(tmp_path, CONFIG | {"model_type": "phimoe"}))


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    refused(FileNotFoundError, r"^directory is .*no tensors in \*\.safetensors\. Expected .*; d", write(tmp_path, {}))


def test_a_shard_with_routers_that_is_missing_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {WEIGHT: "a.safetensors", BIAS: "b.safetensors"}}
    write(tmp_path, {"a.safetensors": {WEIGHT: tensors()[WEIGHT]}}, index=index)
    refused(FileNotFoundError, r"^b\.safetensors is missing in .*, but has .*\. Expected .*; download ", tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_link_to_nothing_and_a_folder_are_no_files_and_no_index_is_blamed(
    tmp_path: Path, name: str, kind: str
) -> None:
    write(tmp_path, {})
    if kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(
        FileNotFoundError, match=rf"^{name} in .* is a folder, or a link to .*\. Expected .*; d"
    ) as caught:
        checkpoints.routers(tmp_path)
    assert "index" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "what"),
    [
        ("{", "is no JSON: .*"),
        ({}, "has no weight_map of file names"),
        ([], "has no weight_map of file names"),
        ({"weight_map": {WEIGHT: 1}}, "has no weight_map of file names"),
    ],
)
def test_an_index_that_is_none_is_refused(index: Any, what: str, tmp_path: Path) -> None:
    write(tmp_path, {"a.safetensors": tensors()}, index=index)
    refused(ValueError, rf"^model\.safetensors\.index\.json in .* {what}.*\. Expected .*; download ", tmp_path)


def test_an_index_of_other_shards_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": dict.fromkeys((WEIGHT, BIAS), "a.safetensors")}
    write(tmp_path, {"a.safetensors": {WEIGHT: tensors()[WEIGHT]}}, index=index)
    refused(ValueError, r"router\.bias is not in a\.safetensors, where .*\. Expected .*; download ", tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = one(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(ValueError, r"^model\.safetensors in .* is no whole safetensors file: .*\. Expected .*; d", tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(("a.safetensors", "b.safetensors"), tensors()))
    refused(ValueError, r" is both in a\.safetensors and in b\.safetensors of .*\. Expected .*; move ", tmp_path)


def test_a_checkpoint_without_routers_says_what_was_looked_for(tmp_path: Path) -> None:
    directory = one(tmp_path, CONFIG | {"model_type": "jetmoe"})
    refused(
        ValueError,
        r"^directory is .*, where none of 2 tensors is a router of 'jetmoe'\. Expected "
        r"layers\.N\.mlp\.router\.layer\.weight or layers\.N\.self_attention\.experts\.router\.layer\.weight .*; pass ",
        directory,
    )


def test_half_a_router_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": {WEIGHT: tensors()[WEIGHT]}})
    refused(ValueError, r"router\.weight has no bias: there is no .*router\.bias\. Expected .*; pass ", tmp_path)


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pattern = r"router\.weight has shape \(8, 16\) but config\.json has hidden=32\. Expected \('experts', 32\); use "
    refused(ValueError, pattern, one(tmp_path, CONFIG | {"hidden_size": 32}))
    short = one(tmp_path, bias=np.zeros(EXPERTS - 1, np.float32))
    pattern = r"router\.bias has shape \(7,\) but .*router\.weight has experts=8\. Expected shape \(8,\); use "
    refused(ValueError, pattern, short)
    refused(
        ValueError, r"^spec has top_k=9 but weight has experts=8", one(tmp_path, CONFIG | {"num_experts_per_tok": 9})
    )


def test_a_quantized_router_is_refused(tmp_path: Path) -> None:
    directory = one(tmp_path, weight=np.zeros((EXPERTS, HIDDEN), np.uint8))
    refused(
        ValueError, r"router\.weight is stored as U8 in model\.safetensors\. Expected BF16, F16, F32; save ", directory
    )


def test_without_safetensors_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(ImportError, r'needs safetensors, which is missing\. Run pip install "\.\[verify\]"', tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(HIDDEN,), (3, HIDDEN), (2, 3, HIDDEN)])
def test_activations_are_read_bit_for_bit_with_all_leading_axes_as_tokens(
    dtype: Any, shape: tuple[int, ...], tmp_path: Path
) -> None:
    x = np.random.default_rng(4).normal(size=shape).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    assert bits(checkpoints.activations(tmp_path / "x.npy", HIDDEN)) == bits(x.reshape(-1, HIDDEN))


def test_activations_in_fortran_order_are_the_same_tokens(tmp_path: Path) -> None:
    x = np.random.default_rng(4).normal(size=(2, 3, HIDDEN)).astype(np.float32)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    assert bits(checkpoints.activations(tmp_path / "x.npy", HIDDEN)) == bits(x.reshape(-1, HIDDEN))


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.zeros((3, HIDDEN + 1), np.float32), r"an array of shape \(3, 17\)\. Expected \[\.\.\., 16\], .*; record "),
        (np.float32(1), r"an array of shape \(\)\. Expected \[\.\.\., 16\], .*; record "),
        (np.zeros((0, HIDDEN), np.float32), r"an array of shape \(0, 16\), without tokens\. Expected .*; record "),
        (np.zeros((3, HIDDEN), np.uint16), r"an array of uint16, which may be bfloat16 .*\. Expected .*; if it is "),
        (np.zeros((3, HIDDEN), np.float64), r"an array of <f8\. Expected float32, float16 or bfloat16; save "),
        (np.zeros((3, HIDDEN), ">f4"), r"an array of >f4\. Expected float32, float16 or bfloat16; save "),
        (np.zeros((3, HIDDEN), ml_dtypes.float8_e4m3fn), r"an array of .*1\. Expected float32, float16 or .*; save "),
        (np.array([None] * HIDDEN), r"which is no whole \.npy file of numbers: Object arrays .*\. Expected .*; write "),
    ],
)
def test_other_activations_are_refused(array: Any, what: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=rf"^path is '.*x\.npy', {what}"):
        checkpoints.activations(tmp_path / "x.npy", HIDDEN)


def test_activations_of_no_npy_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^path is '.*x\.npy', which is no file\. Expected .*; write "):
        checkpoints.activations(tmp_path / "x.npy", HIDDEN)
    np.savez(tmp_path / "x.npz", np.zeros((3, HIDDEN), np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((3, HIDDEN), np.float32))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-1])
    (tmp_path / "empty.npy").touch()
    for name in ("x.npz", "cut.npy", "empty.npy"):
        with pytest.raises(
            ValueError, match=rf"^path is '.*{name}', which is no whole \.npy file of numbers: .*; write "
        ):
            checkpoints.activations(tmp_path / name, HIDDEN)
