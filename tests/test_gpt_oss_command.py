"""The commands of the example gpt-oss: decoding a checkpoint, and the benchmark of decode steps."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpt_oss_cases as cases
import jax
import numpy as np
import pytest

pytest.importorskip("safetensors")
typer_testing = pytest.importorskip("typer.testing")

from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from examples.gpt_oss import __main__ as command_line  # noqa: E402
from examples.gpt_oss import benchmark  # noqa: E402
from examples.gpt_oss.config import Config  # noqa: E402
from examples.gpt_oss.generate import Decoded, generate  # noqa: E402
from examples.gpt_oss.model import Cache, load  # noqa: E402
from jax_router import dispatch  # noqa: E402

CONFIG = replace(cases.CONFIG, num_hidden_layers=1, layer_types=(), eos_token_ids=(61, 63))
pytestmark = pytest.mark.usefixtures("compiled_in_haste")
PROMPT = ",".join(map(str, cases.PROMPT))


def run(*arguments: Any) -> Any:
    return typer_testing.CliRunner().invoke(command_line.app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "config.json").write_text(json.dumps(cases.hf_fields(CONFIG)))
    save_file(cases.tensors(CONFIG), directory / "model.safetensors")
    return directory


def test_generate_prints_the_ids_of_greedy_decoding_and_loading_shows_its_progress(checkpoint: Path) -> None:
    result = run("generate", checkpoint, "--prompt-ids", PROMPT, "--steps", 5, "--implementation", "xla")
    assert result.exit_code == 0, result.output
    progress = Progress(console=Console(quiet=True))
    model = load(str(checkpoint), implementation="xla", progress=progress)
    assert progress.finished
    [made] = generate(model, cases.PROMPT[None], 5)
    assert result.stdout.split() == list(map(str, made))


def test_generate_ends_at_the_ids_of_the_config(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(model: Any, prompt: np.ndarray, steps: int, *, end: tuple[int, ...]) -> Iterator[np.ndarray]:
        return iter([np.array([each]) for each in end])

    monkeypatch.setattr(command_line, "stream", ends)
    assert run("generate", checkpoint, "--prompt-ids", PROMPT).stdout.split() == ["61", "63"]


def test_generate_reads_and_writes_text_with_the_tokenizer_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(checkpoint / name)
    words = {f"w{index}": index for index in range(CONFIG.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = "--steps", 5, "--implementation", "xla"
    ids = run("generate", tmp_path, "--prompt-ids", PROMPT, *options).stdout.split()
    text = " ".join(f"w{index}" for index in cases.PROMPT)
    said = run("generate", tmp_path, "--text", text, *options).stdout.splitlines()
    assert said == [" ".join(ids) + " ", " ".join(f"w{index}" for index in ids)]
    empty = run("generate", tmp_path, "--text", "")
    assert (empty.exit_code, empty.stderr) == (
        2,
        "gpt_oss generate: --text is '', which has no token. Expected one or more.\n",
    )
    (tmp_path / "tokenizer.json").write_text("{")
    broken = run("generate", tmp_path, "--text", text)
    assert broken.exit_code == 2
    assert re.match(r"gpt_oss generate: \S*tokenizer\.json cannot be read: .+\. Expected a tok.*\n$", broken.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt-ids and --text: expected one of the two"),
        (["--prompt-ids", "1", "--text", "a"], "--prompt-ids and --text: expected one of the two"),
        (["--prompt-ids", "1,a"], "--prompt-ids is '1,a'. Expected token ids, separated by commas"),
        (["--prompt-ids", "1,64"], "--prompt-ids has ids from 1 to 64. Expected ids in [0, 64)"),
        (["--prompt-ids", "1,99999999999999999999"], "ids from 1 to 99999999999999999999. Expected ids in [0, 64)"),
        (["--prompt-ids", "1,9223372036854775808"], "ids from 1 to 9223372036854775808. Expected ids in [0, 64)"),
        (["--prompt-ids", "1", "--steps", "0"], "--steps is 0. Expected at least 1"),
        (["--prompt-ids", "1", "--dtype", "foo"], "--dtype is 'foo' (str). Expected bfloat16, float16 or float32"),
        (["--prompt-ids", "1", "--dtype", "int8"], "--dtype is int8. Expected bfloat16, float16 or float32"),
        (["--prompt-ids", "1", "--dtype", "float64"], "--dtype is float64. Expected bfloat16, float16 or float32"),
        (
            ["--prompt-ids", "1", "--implementation", "none"],
            "--implementation names 'none'. Expected cuda, pallas or xla",
        ),
        (
            ["--prompt-ids", "1", "--implementation", "cuda"],
            "--implementation is 'cuda'. implementation=\"cuda\" needs an",
        ),
    ],
)
def test_generate_says_what_is_wrong_with_its_arguments_before_it_reads_the_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(dispatch.Device, "default", lambda: dispatch.Device("cpu"))
    monkeypatch.setattr(command_line, "load", lambda *_, **__: pytest.fail("the checkpoint is read"))
    result = run("generate", checkpoint, *arguments)
    assert result.exit_code == 2
    assert result.stderr.lstrip().startswith("gpt_oss generate: ")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {"dtype": None, "implementation": None, "round_logits": False}),
        (
            ["--dtype", "float16", "--implementation", "xla", "--round-logits"],
            {"dtype": "float16", "implementation": "xla", "round_logits": True},
        ),
    ],
)
def test_generate_loads_what_its_options_say(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], options: dict[str, Any]
) -> None:
    given: dict[str, Any] = {}

    def loaded(directory: Path, *, progress: Progress, **options: Any) -> None:
        given.update(options, directory=directory, progress=type(progress))

    def streamed(model: None, prompt: np.ndarray, steps: int, *, end: tuple[int, ...]) -> Iterator[np.ndarray]:
        given.update(prompt=prompt.tolist(), steps=steps, end=end)
        return iter(())

    monkeypatch.setattr(command_line, "load", loaded)
    monkeypatch.setattr(command_line, "stream", streamed)
    assert run("generate", checkpoint, "--prompt-ids", "7,8", "--steps", 5, *arguments).exit_code == 0
    expected = {"directory": checkpoint, "progress": Progress, "prompt": [[7, 8]], "steps": 5, "end": (61, 63)}
    assert given == expected | options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is int8. Expected"),
        ({"implementation": "none"}, "implementation names 'none'. Expected"),
    ],
)
def test_load_refuses_its_options_before_it_reads_tensors(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(cases.hf_fields(CONFIG)))
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path), **options)


def test_generate_says_what_a_checkpoint_lacks(checkpoint: Path, tmp_path: Path) -> None:
    assert "config.json cannot be read" in run("generate", tmp_path, "--prompt-ids", "1").stderr
    (tmp_path / "config.json").symlink_to(checkpoint / "config.json")
    assert "tokenizer.json, which is not there" in _no_tokenizer(tmp_path)
    lacking = run("generate", tmp_path, "--prompt-ids", "1")
    assert lacking.exit_code == 2
    assert "safetensors" in lacking.stderr


def _no_tokenizer(directory: Path) -> str:
    pytest.importorskip("tokenizers")
    return run("generate", directory, "--text", "a").stderr


def test_generate_that_is_interrupted_has_printed_what_it_made(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[np.ndarray]:
        yield np.array([7])
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "stream", interrupted)
    result = run("generate", checkpoint, "--prompt-ids", "1")
    assert (result.exit_code, result.stdout.split()) == (130, ["7"])
    assert "interrupted" in result.stderr


@pytest.mark.parametrize("command", ["generate", "benchmark"])
def test_a_device_that_is_out_of_memory_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def exhausted(*_: Any, **__: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")

    monkeypatch.setattr(command_line, "load", exhausted)
    monkeypatch.setattr(benchmark, "measure", exhausted)
    options = ["--implementations", "xla", "--output", tmp_path / "rows.jsonl", "--config"]
    result = run(command, *(["--prompt-ids", 1] if command == "generate" else options), checkpoint)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"gpt_oss {command}: the device is out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
    )
    assert "more" not in result.stderr


@pytest.mark.parametrize("implementations", ["xla", pytest.param("xla,cuda", marks=pytest.mark.gpu)])
def test_the_benchmark_writes_a_row_per_block_and_a_summary(
    checkpoint: Path, tmp_path: Path, implementations: str
) -> None:
    rows_file = tmp_path / "rows.jsonl"
    options = {"tokens": 2, "context": 8, "implementations": implementations, "rounds": 2, "steps": 3}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    result = run("benchmark", "--config", checkpoint, *arguments, "--output", rows_file)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    names = implementations.split(",")
    assert [(row["kind"], row["implementation"]) for row in rows] == [
        *(("block", name) for turn in (names, names[::-1]) for name in turn),
        *(("summary", name) for name in names),
    ]
    for row in rows:
        assert row["config"]["hidden_size"] == CONFIG.hidden_size
        assert len(row["provenance"]["source_hash"]) == 64
        assert (row["tokens_per_step"], row["context"], row["steps"]) == (2, 8, 3)
        if row["kind"] == "block":
            assert np.shape(row["tokens"]) == (benchmark.WARM_UP + 3, 2)
            assert row["tokens"] == rows[0]["tokens"]
            assert row["ms_per_step"] >= row["host_ms_per_step"] > 0
        else:
            assert (row["tokens_differing"], row["sequences_differing"], row["rounds"]) == (0, 0, 2)


def test_a_block_starts_behind_its_context_and_its_time_has_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are started at once and take a while to finish, as on a device."""
    seconds, context, steps = 0.1, 8, 2
    positions: list[int] = []

    class SlowDecoder:
        def __init__(self, model: Any, *, length: int):
            self.parameters: list[Any] = []
            assert length == context + benchmark.WARM_UP + steps

        def step(self, parameters: list[Any], tokens: Any, cache: Cache) -> Decoded:
            positions.append(int(cache.position))
            assert all(each.keys.any() for each in cache.layers), "no context"
            return Decoded(np.asarray(tokens).view(Slow), tokens, Cache(cache.position + 1, cache.layers))

    class Slow(np.ndarray):
        def block_until_ready(self) -> None:
            time.sleep(seconds)

    monkeypatch.setattr(benchmark, "Decoder", SlowDecoder)
    [row] = benchmark.measure(CONFIG, batch=2, context=context, implementations=["xla"], rounds=1, steps=steps)
    assert positions == [*range(context, context + benchmark.WARM_UP + steps)] * 2
    assert row["ms_per_step"] >= seconds * 1e3 / steps > row["host_ms_per_step"]


def test_a_benchmark_that_is_interrupted_keeps_its_rows(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield {"kind": "block"}
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure", interrupted)
    rows_file = tmp_path / "rows.jsonl"
    result = run("benchmark", "--config", checkpoint, "--implementations", "xla", "--output", rows_file)
    assert result.exit_code == 130
    assert f"what was measured is in {rows_file}" in result.stderr
    assert [json.loads(line)["kind"] for line in rows_file.read_text().splitlines()] == ["block"]


def test_the_benchmark_of_gpt_oss_20b_has_its_dimensions() -> None:
    assert benchmark._config(None, None) == Config()
    assert benchmark._config(None, 3).layer_types == Config().layer_types[:3]


def test_the_summary_compares_blocks_of_one_round_and_counts_tokens_that_differ() -> None:
    def block(name: str, number: int, time: float, tokens: list[list[int]]) -> dict[str, Any]:
        times = {"ms_per_step": time, "host_ms_per_step": time / 2}
        return {"kind": "block", "implementation": name, "round": number, "tokens": tokens, **times}

    same, other = [[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 9], [5, 8]]
    blocks = [block("xla", 0, 2.0, same), block("cuda", 0, 1.0, same)]
    blocks += [block("cuda", 1, 3.0, other), block("xla", 1, 4.0, same)]
    xla, cuda = benchmark.summarize(blocks, batch=2)
    assert (xla["ms_per_step"]["median"], xla["tokens_differing"], xla["ratio"]["max"]) == (3.0, 0, 1.0)
    assert cuda["ratio"] == {"min": 0.5, "quartile_1": 0.5625, "median": 0.625, "quartile_3": 0.6875, "max": 0.75}
    assert cuda["tokens_per_second"]["max"] == 2000.0
    assert (cuda["ratio_to"], cuda["tokens_differing"], cuda["sequences_differing"]) == ("xla", 2, 1)
    console = Console(width=300, file=io.StringIO())
    console.print(benchmark.table_of([xla, cuda]))
    assert "0.6250 (0.5625 to 0.6875; 0.5000 to 0.7500) of xla" in console.file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 0], "--steps is 0. Expected at least 1"),
        (["--layers", 2], "--layers is 2. Expected 1 to 1"),
        (["--implementations", "xla,,"], "--implementations is 'xla,,'. Expected different names"),
        (["--implementations", "xla,xla"], "--implementations is 'xla,xla'. Expected different names"),
        (["--implementations", "xla,foo"], "--implementations is 'xla,foo': implementation names 'foo'. Expected cuda"),
        (["--implementations", "xla,cuda"], "--implementations is 'xla,cuda': implementation=\"cuda\" needs an"),
    ],
)
def test_the_benchmark_says_what_is_wrong_with_its_arguments_before_it_makes_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[Any], message: str
) -> None:
    monkeypatch.setattr(dispatch.Device, "default", lambda: dispatch.Device("cpu"))
    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: pytest.fail("weights are made"))
    result = run("benchmark", "--config", checkpoint, "--output", tmp_path / "rows.jsonl", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "rows.jsonl").exists()
