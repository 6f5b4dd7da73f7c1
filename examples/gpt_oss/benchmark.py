"""A decode step of gpt-oss-20b with random weights, with one router implementation and with another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.gpt_oss.attention import LayerCache
from examples.gpt_oss.config import Config
from examples.gpt_oss.generate import Decoder
from examples.gpt_oss.model import Cache, GptOss, check_options, from_tensors, named_tensors
from jax_router.provenance import provenance

Row = dict[str, Any]
BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses of both commands
WARM_UP = 4  # steps before a block is timed, for what first calls with new buffers cost, recording CUDA graphs too


@contextmanager
def in_one_line(command: str, interrupted: str) -> Iterator[None]:
    """End a command that cannot go on, or Ctrl-C, with a line on stderr and an exit status."""
    try:
        yield
        return
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        message = str(error)
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        message = f"the device is out of memory: {message}"
    except KeyboardInterrupt:
        typer.echo(f"\n{interrupted}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(f"gpt_oss {command}: {message}", err=True)
    raise typer.Exit(BAD_INPUT)


def measure(
    config: Config,
    *,
    batch: int,
    context: int,
    implementations: Sequence[str],
    rounds: int,
    steps: int,
    seed: int = 0,
    advance: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Time blocks of decode steps: every round has one block of each implementation, in turning order.

    All implementations have the same weights, made on the device, and start every block with the same tokens and the
    same random keys and values in the place of `context` tokens read before.

    Args:
      batch: sequences, so tokens of a step.
      steps: of a block, timed together: from a device that is idle until the last step is done.
      advance: told what comes next, before compiling and before every block.

    Yields:
      A row per block: implementation, round, ms_per_step, host_ms_per_step (until the host had started the last step),
      tokens (`[steps + WARM_UP][batch]`).
    """
    length = context + WARM_UP + steps
    tensors = named_tensors(GptOss(config, rngs=nnx.Rngs(seed)))
    decoders = {
        name: Decoder(from_tensors(config, tensors, implementation=name), length=length) for name in implementations
    }
    key_of_tokens, key_of_cache = jax.random.split(jax.random.key(seed + 1))
    start = jax.random.randint(key_of_tokens, (batch,), 0, config.vocab_size, jnp.int32)

    # Drawn outside of the function that cuts it, whose 48 results XLA would compile with the whole generator each.
    shape = config.num_hidden_layers, 2, batch, length, config.num_key_value_heads, config.head_dim
    drawn = jax.random.normal(key_of_cache, shape, jnp.dtype(config.dtype))

    @jax.jit
    def cache(drawn: jax.Array) -> Cache:
        return Cache(jnp.int32(context), tuple(LayerCache(*pair) for pair in drawn))

    def block(decoder: Decoder) -> tuple[float, float, list[jax.Array]]:
        tokens, holding, made = start, cache(drawn), []
        started = 0.0
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                jax.block_until_ready(tokens)
                started = time.perf_counter()
            decoded = decoder.step(decoder.parameters, tokens, holding)
            tokens, holding = decoded.tokens, decoded.cache
            made.append(tokens)
        dispatched = time.perf_counter()
        jax.block_until_ready(tokens)
        return time.perf_counter() - started, dispatched - started, made

    for name, decoder in decoders.items():
        advance(f"compiling {name}")
        block(decoder)
    for round_number in range(rounds):
        turn = round_number % len(implementations)
        for name in (*implementations[turn:], *implementations[:turn]):
            advance(f"round {round_number + 1}, {name}")
            seconds, host_seconds, made = block(decoders[name])
            yield {
                "kind": "block",
                "implementation": name,
                "round": round_number,
                "ms_per_step": seconds / steps * 1e3,
                "host_ms_per_step": host_seconds / steps * 1e3,
                "tokens": np.stack(made).tolist(),
            }


def summarize(blocks: Sequence[Row], batch: int) -> list[Row]:
    """A row per implementation: time of a step, tokens per second, and both beside the implementation named first.

    ratio is that of the two times of one round. tokens_differing counts tokens that are not those of the first block
    of the first implementation, where greedy decoding, once apart, stays apart; sequences_differing counts sequences.
    """
    by_name: dict[str, list[Row]] = {}
    for row in sorted(blocks, key=lambda row: row["round"]):
        by_name.setdefault(row["implementation"], []).append(row)
    base = by_name[blocks[0]["implementation"]]
    summary = []
    for name, rows in by_name.items():
        times = [row["ms_per_step"] for row in rows]
        ratios = [row["ms_per_step"] / other["ms_per_step"] for row, other in zip(rows, base, strict=True)]
        differing = np.any([np.array(row["tokens"]) != np.array(base[0]["tokens"]) for row in rows], axis=0)
        summary.append(
            {
                "kind": "summary",
                "implementation": name,
                "rounds": len(rows),
                "ms_per_step": _spread(times),
                "host_ms_per_step": _spread([row["host_ms_per_step"] for row in rows]),
                "tokens_per_second": _spread([batch / time * 1e3 for time in times]),
                "ratio": _spread(ratios),
                "ratio_to": base[0]["implementation"],
                "tokens_differing": int(differing.sum()),
                "sequences_differing": int(differing.any(0).sum()),
            }
        )
    return summary


def _spread(values: Sequence[float]) -> dict[str, float]:
    names = ("min", "quartile_1", "median", "quartile_3", "max")
    return dict(zip(names, map(float, np.quantile(values, (0, 0.25, 0.5, 0.75, 1))), strict=True))


def table_of(summary: Sequence[Row]) -> Table:
    """For the terminal: median (quartiles; least to most)."""
    table = Table("routing", "ms per step", "host ms per step", "tokens per second", "time ratio", "differing tokens")

    def cell(spread: dict[str, float], digits: int) -> str:
        least, first, median, third, most = (f"{spread[name]:.{digits}f}" for name in spread)
        return f"{median} ({first} to {third}; {least} to {most})"

    for row in summary:
        table.add_row(
            row["implementation"],
            cell(row["ms_per_step"], 4),
            cell(row["host_ms_per_step"], 4),
            cell(row["tokens_per_second"], 1),
            f"{cell(row['ratio'], 4)} of {row['ratio_to']}",
            f"{row['tokens_differing']}, in {row['sequences_differing']} sequences",
        )
    return table


def command(
    layers: Annotated[int | None, typer.Option(help="Layers; left out, the config's.")] = None,
    tokens: Annotated[int, typer.Option(help="Sequences decoded together, so tokens per step.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens that every sequence has before.")] = 1024,
    implementations: Annotated[str, typer.Option(help="Of the routers, separated by commas.")] = "xla,cuda",
    rounds: Annotated[int, typer.Option(help="Blocks of each implementation.")] = 15,
    steps: Annotated[int, typer.Option(help="Steps of a block.")] = 50,
    seed: Annotated[int, typer.Option(help="Of weights, tokens and context.")] = 0,
    config: Annotated[Path | None, typer.Option(help="A directory with config.json; left out, gpt-oss-20b.")] = None,
    output: Annotated[Path, typer.Option(help="Rows are appended, one JSON object a line.")] = Path(
        "gpt-oss-decode.jsonl"
    ),
) -> None:
    """Time decode steps with random weights, for each implementation of the routers in turn."""
    with in_one_line("benchmark", f"interrupted; what was measured is in {output}"):
        chosen = _config(config, layers)
        names = tuple(name.strip() for name in implementations.split(","))
        if not all(names) or len(set(names)) < len(names):
            raise ValueError(
                f"--implementations is {implementations!r}. Expected different names, separated by commas."
            )
        for name, value in (("tokens", tokens), ("context", context), ("rounds", rounds), ("steps", steps)):
            if value < 1:
                raise ValueError(f"--{name} is {value}. Expected at least 1.")
        for name in names:
            try:
                check_options(chosen, implementation=name)
            except (NotImplementedError, ValueError) as error:
                raise ValueError(f"--implementations is {implementations!r}: {error}") from error
        console = Console()
        console.print(_benchmark(chosen, names, tokens, context, rounds, steps, seed, output, console))
        console.print(f"rows: {output}", soft_wrap=True)


def _config(directory: Path | None, layers: int | None) -> Config:
    config = Config() if directory is None else Config.read(directory)
    if layers is None:
        return config
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"--layers is {layers}. Expected 1 to {config.num_hidden_layers}, those of the config.")
    return replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers])


def _benchmark(
    config: Config,
    names: tuple[str, ...],
    tokens: int,
    context: int,
    rounds: int,
    steps: int,
    seed: int,
    output: Path,
    console: Console,
) -> Table:
    """The table, with every row in the file already; a run that is interrupted keeps what it has."""
    facts = {
        "config": asdict(config),
        "tokens_per_step": tokens,
        "context": context,
        "steps": steps,
        "seed": seed,
        "provenance": provenance(),
    }
    blocks: list[Row] = []
    with output.open("a", encoding="utf-8") as file, Progress(console=console, transient=True) as progress:
        task = progress.add_task("making weights", total=len(names) * (rounds + 1) + 1)

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=what)

        def write(row: Row) -> None:
            file.write(json.dumps(row | facts) + "\n")
            file.flush()

        measured = measure(
            config,
            batch=tokens,
            context=context,
            implementations=names,
            rounds=rounds,
            steps=steps,
            seed=seed,
            advance=advance,
        )
        for row in measured:
            write(row)
            blocks.append(row)
        summary = summarize(blocks, tokens)
        for row in summary:
            write(row)
    return table_of(summary)
