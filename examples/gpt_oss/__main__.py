"""The command line: `python -m examples.gpt_oss generate | benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from examples.gpt_oss import benchmark
from examples.gpt_oss.config import Config
from examples.gpt_oss.generate import prompt_ids as checked_ids
from examples.gpt_oss.generate import stream
from examples.gpt_oss.model import check_options, load
from jax_router import checks

app = typer.Typer(name="gpt_oss", help="gpt-oss in JAX.", no_args_is_help=True, add_completion=False)
app.command("benchmark")(benchmark.command)


@app.command("generate")
def generate_command(
    directory: Annotated[Path, typer.Argument(help="A checkpoint: config.json, safetensors.")],
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids, separated by commas.")] = None,
    text: Annotated[str | None, typer.Option(help="Instead: text, for the checkpoint's tokenizer.json.")] = None,
    steps: Annotated[int, typer.Option(help="Tokens to make at most.")] = 64,
    implementation: Annotated[str | None, typer.Option(help="Of the routers; left out, the dispatcher's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; left out, config.json's.")] = None,
    round_logits: Annotated[bool, typer.Option("--round-logits", help="Round them, as transformers does.")] = False,
) -> None:
    """Decode greedily, until a token of config.json's eos_token_id or for --steps tokens; prints their ids."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with benchmark.in_one_line("generate", "interrupted"):
        if (prompt_ids is None) == (text is None):
            raise ValueError("--prompt-ids and --text: expected one of the two.")
        tokenizer = None if text is None else _tokenizer(directory)
        ids = _ids(prompt_ids) if tokenizer is None else tokenizer.encode(text).ids
        if not ids:
            raise ValueError(f"--text is {text!r}, which has no token. Expected one or more.")
        config = Config.read(directory)
        prompt = checked_ids("--prompt-ids" if tokenizer is None else "--text", np.array([ids], object), config)
        _check(config, steps, implementation, dtype)
        with Progress(*columns, console=console, transient=True) as progress:
            model = load(
                directory, round_logits=round_logits, implementation=implementation, dtype=dtype, progress=progress
            )
        made: list[int] = []
        for tokens in stream(model, prompt, steps, end=config.eos_token_ids):
            made.append(int(tokens[0]))
            typer.echo(made[-1], nl=False)
            typer.echo(" ", nl=False)
        typer.echo()
        if tokenizer is not None:
            typer.echo(tokenizer.decode(made))


def _ids(prompt_ids: str | None) -> list[int]:
    try:
        return [int(each) for each in (prompt_ids or "").split(",")]
    except ValueError as error:
        raise ValueError(f"--prompt-ids is {prompt_ids!r}. Expected token ids, separated by commas.") from error


def _check(config: Config, steps: int, implementation: str | None, dtype: str | None) -> None:
    """Refuse, by the names of the options, what decoding would refuse after the checkpoint is read."""
    if steps < 1:
        raise ValueError(f"--steps is {steps}. Expected at least 1.")
    if dtype is not None:
        checks.input_dtype("--dtype", dtype)
    if implementation is not None:
        checks.known_implementation("--implementation", implementation)
    try:
        check_options(config, implementation=implementation, dtype=dtype)
    except NotImplementedError as error:
        raise ValueError(f"--implementation is {implementation!r}. {error}") from error


def _tokenizer(directory: Path):  # type: ignore[no-untyped-def]  # tokenizers.Tokenizer, which is imported only here
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not file.exists():
        raise ValueError(f"--text needs {file}, which is not there. Expected a tokenizer; or pass --prompt-ids.")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no other
        raise ValueError(f"{file} cannot be read: {error}. Expected a tokenizer; or pass --prompt-ids.") from error


if __name__ == "__main__":
    app()
