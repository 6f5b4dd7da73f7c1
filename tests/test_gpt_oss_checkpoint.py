"""A checkpoint of gpt-oss is read whole, tensor by tensor, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("safetensors")

from rich.progress import Progress
from safetensors.numpy import save_file

from examples.gpt_oss import checkpoint, mxfp4
from jax_router import safetensors_files

EXPERTS, HIDDEN, INTERMEDIATE = 2, 64, 32
LAYER = "model.layers.0.mlp."
ROUTER, UP, DOWN = f"{LAYER}router.weight", f"{LAYER}experts.gate_up_proj", f"{LAYER}experts.down_proj"
SHAPES = {
    ROUTER: (EXPERTS, HIDDEN), UP: (EXPERTS, HIDDEN, 2 * INTERMEDIATE), DOWN: (EXPERTS, INTERMEDIATE, HIDDEN),
}  # fmt: skip
EXPECTED = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in SHAPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Tensors = dict[str, np.ndarray]


def floats(dtype: Any = ml_dtypes.bfloat16) -> Tensors:
    random = np.random.default_rng(7)
    return {name: random.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def quantized(*names: str) -> Tensors:
    """Blocks and scales of tensors."""
    random = np.random.default_rng(8)
    parts = {}
    for name in names:
        experts, into, out = SHAPES[name]
        parts[f"{name}_blocks"] = random.integers(0, 256, (experts, out, into // 32, 16), np.uint8)
        parts[f"{name}_scales"] = random.integers(118, 130, (experts, out, into // 32), np.uint8)
    return parts


def dequantized(parts: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return np.asarray(mxfp4.dequantize(parts[f"{name}_blocks"], parts[f"{name}_scales"]))


def write(folder: Path, files: Mapping[str, Tensors], index: Mapping[str, str] | None = None) -> Path:
    """A folder with these files, each with these tensors, and an index of them unless it is one file or given."""
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    if index is None and SINGLE not in files:
        index = {tensor: name for name, tensors in files.items() for tensor in tensors}
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: value for name, value in tensors.items() if name not in names}


def same(found: Mapping[str, jax.Array], expected: Mapping[str, np.ndarray]) -> None:
    """Every tensor has its bits, and they come in the order of the model."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert isinstance(found[name], jax.Array), name
        array = np.asarray(found[name])
        assert (array.dtype, array.shape, array.tobytes()) == (value.dtype, value.shape, value.tobytes()), name


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The file and the name of every tensor that is read, in order."""
    events: list[tuple[str, str]] = []
    real = safetensors_files.opened

    @contextmanager
    def opened(file: Path, names: Any = ()) -> Iterator[Any]:
        with real(file, names) as tensors:

            def get_tensor(name: str) -> np.ndarray:
                events.append((file.name, name))
                return tensors.get_tensor(name)

            yield SimpleNamespace(keys=tensors.keys, get_slice=tensors.get_slice, get_tensor=get_tensor)

    monkeypatch.setattr(safetensors_files, "opened", opened)
    return events


@pytest.mark.parametrize("held", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_a_tensor_is_held_in_the_dtype_that_the_model_asks_for(stored: str, held: str, tmp_path: Path) -> None:
    tensors = floats(jnp.dtype(stored))
    expected = {name: jax.ShapeDtypeStruct(shape, held) for name, shape in SHAPES.items()}
    found = checkpoint.read_checkpoint(write(tmp_path, {SINGLE: tensors}), expected)
    same(found, {name: value.astype(np.float32).astype(jnp.dtype(held)) for name, value in tensors.items()})


def test_experts_in_mxfp4_are_dequantized(tmp_path: Path) -> None:
    parts, router = quantized(UP, DOWN), floats()[ROUTER]
    found = checkpoint.read_checkpoint(str(write(tmp_path, {SINGLE: parts | {ROUTER: router}})), EXPECTED)
    same(found, {ROUTER: router, UP: dequantized(parts, UP), DOWN: dequantized(parts, DOWN)})


def test_each_tensor_is_read_once_file_after_file_also_with_blocks_and_scales_apart(
    reads: list[tuple[str, str]], tmp_path: Path
) -> None:
    parts, tensors = quantized(UP), floats()
    files = {
        "b.safetensors": {f"{UP}_blocks": parts[f"{UP}_blocks"], ROUTER: tensors[ROUTER]},
        "a.safetensors": {f"{UP}_scales": parts[f"{UP}_scales"], DOWN: tensors[DOWN]},
    }
    found = checkpoint.read_checkpoint(write(tmp_path, files), EXPECTED)
    same(found, tensors | {UP: dequantized(parts, UP)})
    assert [file for file, _ in reads] == ["a.safetensors"] * 2 + ["b.safetensors"] * 2
    assert sorted(name for _, name in reads) == sorted([f"{UP}_blocks", f"{UP}_scales", ROUTER, DOWN])


def test_of_a_tensor_in_two_shards_the_index_says_which(reads: list[tuple[str, str]], tmp_path: Path) -> None:
    tensors = floats()
    a = tensors | {ROUTER: tensors[ROUTER].T.copy()}
    b = tensors | {UP: tensors[UP][0], DOWN: tensors[DOWN][0]}
    index = dict.fromkeys((UP, DOWN), "a.safetensors") | {ROUTER: "b.safetensors"}
    write(tmp_path, {"a.safetensors": a, "b.safetensors": b}, index)
    same(checkpoint.read_checkpoint(tmp_path, EXPECTED), tensors)
    assert len(reads) == len(tensors)


def test_progress_counts_the_bytes_of_every_tensor_when_it_is_on_the_device(
    reads: list[tuple[str, str]], tmp_path: Path
) -> None:
    files = {SINGLE: quantized(UP) | without(floats(), UP)}
    seen = []

    class Seen(Progress):
        def advance(self, task_id: Any, advance: float = 1) -> None:
            seen.append((len(reads), advance))
            super().advance(task_id, advance)

    progress = Seen()
    checkpoint.read_checkpoint(write(tmp_path, files), EXPECTED, progress=progress)
    [task] = progress.tasks
    total = sum(value.nbytes for value in files[SINGLE].values())
    assert (task.description, task.total, task.completed) == ("reading 4 tensors", total, total)
    assert seen == [(count, files[SINGLE][name].nbytes) for count, (_, name) in enumerate(reads, 1)]


def test_without_progress_it_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint.read_checkpoint(write(tmp_path, {SINGLE: floats()}), EXPECTED)
    assert capfd.readouterr() == ("", "")


def refused(kind: type[Exception], pattern: str, directory: Path, expected: Any = EXPECTED) -> None:
    with pytest.raises(kind, match=pattern):
        checkpoint.read_checkpoint(directory, expected)


def test_no_directory_or_one_without_tensors_is_refused(tmp_path: Path) -> None:
    none = r"^directory is '.*/none', which is no directory\. Expected .*; pass "
    refused(FileNotFoundError, none, tmp_path / "none")
    refused(FileNotFoundError, r"^directory is .*, which has no tensors in .*\. Expected .*; download ", tmp_path)


def test_missing_and_extra_tensors_are_counted_and_the_first_named_before_any_is_read(
    reads: list[tuple[str, str]], tmp_path: Path
) -> None:
    extra = {f"model.layers.{layer}.norm": np.zeros(1, np.int8) for layer in range(1, 5)}
    write(tmp_path, {SINGLE: without(floats(), UP, DOWN) | extra})
    misses = r"misses 2 of its 3 tensors: model\S*gate_up_proj, model\S*down_proj"
    four = r"model\.layers\.1\.norm, model\.layers\.2\.norm, model\.layers\.3\.norm and 1 more"
    remedy = r"Expected its tensors and no others; pass "
    both = rf"{misses}; it has no place for 4 of the 5 tensors: {four}"
    refused(ValueError, rf"^directory is '.*', where the model {both}\. {remedy}", tmp_path)
    write(tmp_path, {SINGLE: without(floats(), UP, DOWN)})
    refused(ValueError, rf"^directory is '.*', where the model {misses}\. {remedy}", tmp_path)
    write(tmp_path, {SINGLE: floats() | extra})
    extra_alone = rf"has no place for 4 of the 7 tensors: {four}"
    refused(ValueError, rf"^directory is '.*', where the model {extra_alone}\. {remedy}", tmp_path)
    assert not reads


@pytest.mark.parametrize("extra", [f"{UP}_blocks", "lm_head.weight"])
def test_a_tensor_twice_or_one_that_the_index_does_not_name_is_extra(extra: str, tmp_path: Path) -> None:
    tensors = floats()
    content = {"a.safetensors": tensors | {extra: np.zeros((EXPERTS, 1, 1, 16), np.uint8)}}
    write(tmp_path, content, dict.fromkeys(tensors, "a.safetensors"))
    refused(ValueError, rf" where the model has no place for 1 of the 4 tensors: {extra}\. Expected ", tmp_path)


def test_of_other_tensors_than_experts_mxfp4_has_no_place(tmp_path: Path) -> None:
    """A square one would fit, transposed: MXFP4 is [out, in], as is the model's weight of two axes."""
    square = EXPECTED | {ROUTER: jax.ShapeDtypeStruct((HIDDEN, HIDDEN), jnp.bfloat16)}
    parts = {name.replace(UP, ROUTER): value[0] for name, value in quantized(UP).items()}
    pattern = r"misses 1 of its 3 tensors: \S*router\.weight; it has no place for 2 of .*router\.weight_blocks, "
    refused(ValueError, pattern, write(tmp_path, {SINGLE: without(floats(), ROUTER) | parts}), square)


def test_half_a_tensor_in_mxfp4_is_refused(tmp_path: Path) -> None:
    for absent, present in (("scales", "blocks"), ("blocks", "scales")):
        files = {SINGLE: without(floats(), UP) | without(quantized(UP), f"{UP}_{absent}")}
        pattern = rf"gate_up_proj_{present} is half of .*: there is no .*gate_up_proj_{absent}\. Expected .*; download "
        refused(ValueError, pattern, write(tmp_path, files))


def test_a_misshaped_tensor_is_refused(reads: list[tuple[str, str]], tmp_path: Path) -> None:
    tensors, parts = floats(), quantized(UP)
    files = {SINGLE: tensors | {ROUTER: tensors[ROUTER].T.copy()}}
    pattern = r"router\.weight has shape \(64, 2\) in .*model\.safetensors' but the model has \(2, 64\)\. Expected .*; "
    refused(ValueError, pattern, write(tmp_path, files))

    wider = EXPECTED | {UP: jax.ShapeDtypeStruct((EXPERTS, 2 * HIDDEN, 2 * INTERMEDIATE), jnp.bfloat16)}
    pattern = r"gate_up_proj has shape \(2, 64, 64\) in .* but the model has \(2, 128, 64\)\. Expected .*; make "
    refused(ValueError, pattern, write(tmp_path, {SINGLE: without(tensors, UP) | parts}), wider)

    other = {f"{UP}_scales": parts[f"{UP}_scales"][:1]}
    pattern = r"gate_up_proj_scales has shape \(1, 64, 2\) but .*gate_up_proj_blocks has shape .*\. Expected .*; pass "
    refused(ValueError, pattern, write(tmp_path, {SINGLE: without(tensors, UP) | parts | other}))

    other = {f"{UP}_blocks": parts[f"{UP}_blocks"][..., :8].copy()}
    pattern = r"gate_up_proj_blocks has shape \(2, 64, 2, 8\)\. Expected .*; pass "
    refused(ValueError, pattern, write(tmp_path, {SINGLE: without(tensors, UP) | parts | other}))
    assert not reads


def test_another_stored_dtype_is_refused(reads: list[tuple[str, str]], tmp_path: Path) -> None:
    tensors, parts = floats(), quantized(UP)
    for dtype, name in ((np.float64, "F64"), (ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.uint8, "U8")):
        files = {SINGLE: tensors | {ROUTER: np.zeros(SHAPES[ROUTER], dtype)}}
        pattern = rf"router\.weight is stored as {name} in model\.safetensors\. Expected BF16, F16, F32; save "
        refused(ValueError, pattern, write(tmp_path, files))
    for part in ("blocks", "scales"):
        files = {SINGLE: without(tensors, UP) | parts | {f"{UP}_{part}": parts[f"{UP}_{part}"].astype(np.int8)}}
        pattern = rf"gate_up_proj_{part} is stored as I8 in model\.safetensors\. Expected U8; save "
        refused(ValueError, pattern, write(tmp_path, files))
    assert not reads


def test_another_dtype_to_hold_is_refused(tmp_path: Path) -> None:
    expected = EXPECTED | {ROUTER: jax.ShapeDtypeStruct(SHAPES[ROUTER], jnp.int32)}
    pattern = r"^the dtype of .*router\.weight is int32\. Expected bfloat16, float16 or float32; pass "
    refused(ValueError, pattern, write(tmp_path, {SINGLE: floats()}), expected)


def test_shards_that_are_missing_truncated_or_of_another_index_are_refused(
    reads: list[tuple[str, str]], tmp_path: Path
) -> None:
    tensors = floats()
    files = {"a.safetensors": without(tensors, ROUTER), "b.safetensors": {ROUTER: tensors[ROUTER]}}
    b = write(tmp_path, files) / "b.safetensors"
    whole = b.read_bytes()
    b.write_bytes(whole[:-1])
    refused(ValueError, r"^b\.safetensors in .* is no whole safetensors file: .*\. Expected .*; download ", tmp_path)
    b.unlink()
    refused(FileNotFoundError, r"^b\.safetensors is missing in .*, but has .*\. Expected .*; download ", tmp_path)
    save_file({}, b)
    refused(ValueError, r"router\.weight is not in b\.safetensors, where .*\. Expected .*; download ", tmp_path)
    (tmp_path / INDEX).write_text("{}")
    refused(ValueError, r"^model\.safetensors\.index\.json in .* has no weight_map.*\. Expected .*; down", tmp_path)
    assert not reads


# What transformers writes and reads.


@pytest.fixture
def model() -> Any:
    """A small `GptOssForCausalLM` of random weights, in float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, num_experts_per_tok=2,
        num_hidden_layers=2, vocab_size=32, head_dim=16, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.GptOssForCausalLM(config)


def tensors_of(model: Any) -> Tensors:
    from torch_ref.convert import to_numpy

    return {name: to_numpy(value) for name, value in model.state_dict().items()}


def structs_of(tensors: Tensors) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in tensors.items()}


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_save_pretrained_writes_is_the_model(dtype: str, shard_size: str, model: Any, tmp_path: Path) -> None:
    import torch

    model.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_size == "40KB")
    tensors = tensors_of(model)
    same(checkpoint.read_checkpoint(tmp_path, structs_of(tensors)), tensors)


def test_transformers_reads_the_same_experts_of_mxfp4(model: Any, tmp_path: Path) -> None:
    import torch

    model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = tensors_of(model)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        parts = quantized(UP if "gate_up" in name else DOWN)
        stored |= {f"{name}_{part.rsplit('_', 1)[1]}": value for part, value in parts.items()}
        del stored[name]
    write(tmp_path, {SINGLE: stored})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "dequantize": True}
    (tmp_path / "config.json").write_text(json.dumps(config))

    expected = tensors_of(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert not np.array_equal(expected[UP], tensors_of(model)[UP])
    same(checkpoint.read_checkpoint(tmp_path, structs_of(expected)), expected)
