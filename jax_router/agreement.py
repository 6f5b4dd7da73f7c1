"""`jax-router agreement`: millions of random tokens through every router, their experts compared with float64's."""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jax_router import dispatch, implementations, parity
from jax_router import parity_routing as judged
from jax_router.agreement_report import ASKED, COUNTED, Record, bar, print_record
from jax_router.models import models
from jax_router.sweep import BAD_INPUT, FAILED, INTERRUPTED, gpu_name
from jax_router.sweep_points import DTYPE, IMPLEMENTATIONS, Shape, route_shapes
from jax_router.sweep_route import correction_bias, route_calls
from jax_router.timing_torch import route_operator, torch_with_gpu

CHUNK = 65_536  # tokens at a time: of hidden 7168 they take 4 GB in float64
LOGIT_DEVIATION = 1.5
# Sums of positive products on tensor cores, of squares in bfloat16: what they may be too small by.
MAGNITUDE_MARGIN, SQUARES_MARGIN = 1 + 2.0**-10, 1 + 2.0**-6
# As XLA keeps it: it may leave out a cast there and back, for the precision gained.
TO_BFLOAT16 = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
XLA_PATHS = ("xla, bf16 logits", "xla, float32")
TORCH_PATHS = ("PyTorch, bf16", "PyTorch, float32")

Counts = dict[str, dict[str, int]]


@dataclass
class Router:
    """One router with its data on the device, and everything that is compiled for it."""

    shape: Shape
    device: jax.Device
    tokens: int  # of a chunk
    key: jax.Array
    torch: Any | None = None
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.shape.spec is not None
        self.spec = self.shape.spec
        random = np.random.default_rng(zlib.crc32(f"agreement of {self.shape.label}".encode()))
        scale = LOGIT_DEVIATION / np.sqrt(self.shape.hidden)
        weight = random.standard_normal((self.shape.experts, self.shape.hidden), np.float32) * scale
        bias = random.standard_normal(self.shape.experts, np.float32) if self.shape.bias else None
        put = functools.partial(jax.device_put, device=self.device)
        self.key = put(self.key)
        self.weight = put(weight.astype(jnp.bfloat16))
        self.biases = (None if bias is None else put(bias.astype(jnp.bfloat16)), put(correction_bias(self.shape)))
        self.paths = self._paths()
        self.torch_paths = {} if self.torch is None else self._torch_paths(self.torch)

    @property
    def names(self) -> list[str]:
        return [*self.paths, *self.torch_paths]

    def _paths(self) -> dict[str, Callable[..., jax.Array]]:
        """(x, weight, biases) -> experts [T, k], by name: what implementations run here, and XLA in other dtypes."""
        problem = dispatch.Problem(
            tokens=self.tokens,
            hidden=self.shape.hidden,
            experts=self.shape.experts,
            dtype=DTYPE,
            bias_dtype=DTYPE if self.shape.bias else None,
            spec=self.spec,
        )
        calls = route_calls(self.spec)
        found: dict[str, Callable[..., jax.Array]] = {}
        for name in IMPLEMENTATIONS:
            refusal = dispatch.why_unsupported(problem, dispatch.Device.of(self.device), name)
            refusal = refusal or implementations.load(name).unavailable()
            if refusal is None:
                found[name] = lambda *operands, name=name: calls[name](*operands)[1]
            else:
                self.refused[name] = refusal

        with_rounding = route_calls(replace(self.spec, round_logits=True))["xla"]

        def rounded(*operands: Any) -> jax.Array:
            return with_rounding(*operands)[1]

        def widened(x: jax.Array, weight: jax.Array, biases: Any) -> jax.Array:
            return calls["xla"](*jax.tree.map(lambda array: array.astype(jnp.float32), (x, weight, biases)))[1]

        return found | dict(zip(XLA_PATHS, (rounded, widened), strict=True))

    def _torch_paths(self, torch: Any) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """x -> experts [T, k], by name."""
        operator = route_operator(torch, self.spec)
        torch.backends.cuda.matmul.allow_tf32 = False
        weight, biases = jax.tree.map(torch.from_dlpack, jax.block_until_ready((self.weight, self.biases)))

        def run(x: jax.Array, dtype: Any) -> jax.Array:
            bias, correction = biases
            operands = torch.from_dlpack(jax.block_until_ready(x)).to(dtype), weight.to(dtype)
            with torch.no_grad():
                experts = operator(*operands, (None if bias is None else bias.to(dtype), correction))[1]
                experts = experts.to(torch.int32).contiguous()
            if experts.is_cuda:
                torch.cuda.synchronize()
            return jnp.from_dlpack(experts)

        dtypes = torch.bfloat16, torch.float32
        return {name: functools.partial(run, dtype=dtype) for name, dtype in zip(TORCH_PATHS, dtypes, strict=True)}

    def accumulation(self, path: str) -> parity.Accumulation:
        """How the logits of a path are added; of a path that rounds them, how they were before."""
        dtype = "float32" if path.endswith("float32") else DTYPE
        return parity.accumulation_of(path, hidden=self.shape.hidden, dtype=dtype, platform=self.device.platform)

    def draw(self, key: jax.Array) -> jax.Array:
        """x [T, H] of one chunk."""
        return jax.random.normal(key, (self.tokens, self.shape.hidden), jnp.float32).astype(jnp.bfloat16)

    def judge(
        self, x: jax.Array, weight: jax.Array, biases: Any, experts: dict[str, jax.Array], *, comparisons: int
    ) -> Counts:
        """Counts by path, traced with 64-bit types. The bounds hold for `comparisons` logits together."""
        truth, correction = self._truth(x, weight, biases)
        exact = judged.exact_choice(truth.logits, correction, self.spec, TO_BFLOAT16)
        counts = {}
        for name, selected in experts.items():
            slack = parity.logit_bound(truth, self.accumulation(name), comparisons)  # type: ignore[arg-type]
            logits = judged.logit_interval(truth.logits, slack, self.spec, TO_BFLOAT16)
            choice = judged.choice_interval(logits, correction, self.spec)
            verdict = judged.judge_selection(selected, exact, choice)
            found = verdict.differs, verdict.impossible, verdict.undecided
            counts[name] = {kind: each.sum() for kind, each in zip(COUNTED, found, strict=True)}
        return counts

    def _truth(self, x: jax.Array, weight: jax.Array, biases: Any) -> tuple[Any, jax.Array | None]:
        """What `parity.reference` computes: logits exactly, magnitude and spread at most little too large."""

        def product(left: jax.Array, right: jax.Array, dtype: Any) -> jax.Array:
            return jnp.matmul(left, right.T, preferred_element_type=dtype).astype(jnp.float64)

        bias, correction = (None if each is None else each.astype(jnp.float64) for each in biases)
        logits = product(x.astype(jnp.float64), weight.astype(jnp.float64), jnp.float64)
        magnitude = product(abs(x), abs(weight), jnp.float32) * MAGNITUDE_MARGIN
        squares = product(x * x, weight * weight, jnp.float32) * SQUARES_MARGIN
        spread = jnp.sqrt(logits**2 + squares)
        if bias is not None:
            logits, magnitude = logits + bias, magnitude + abs(bias)
        return parity.Reference(self.shape.hidden, logits, magnitude, spread), correction  # type: ignore[arg-type]

    def compiled(self, pool: ThreadPoolExecutor, comparisons: int) -> dict[str, Future[Any]]:
        """Every executable, compiled by the pool."""
        x = jax.ShapeDtypeStruct((self.tokens, self.shape.hidden), jnp.bfloat16)
        experts = jax.ShapeDtypeStruct((self.tokens, self.spec.top_k), jnp.int32)
        operands = x, self.weight, self.biases

        def compile_one(function: Callable[..., Any], *arguments: Any) -> Any:
            with jax.default_device(self.device):
                return jax.jit(function).lower(*arguments).compile()

        def compile_judge() -> Any:
            judge = functools.partial(self.judge, comparisons=comparisons)
            with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
                return compile_one(judge, *operands, dict.fromkeys(self.names, experts))

        futures = {name: pool.submit(compile_one, path, *operands) for name, path in self.paths.items()}
        return futures | {"draw": pool.submit(compile_one, self.draw, self.key), "judge": pool.submit(compile_judge)}

    def chunks(self, executables: dict[str, Future[Any]], count: int) -> Iterator[Counts]:
        """The counts of `count` chunks, one by one."""
        ready = {name: future.result() for name, future in executables.items()}
        for chunk in range(count):
            x = ready["draw"](jax.random.fold_in(self.key, chunk))
            operands = x, self.weight, self.biases
            experts = {name: ready[name](*operands) for name in self.paths}
            experts |= {name: path(x) for name, path in self.torch_paths.items()}
            yield jax.tree.map(int, ready["judge"](*operands, experts))


def routers(shapes: Sequence[Shape], device: jax.Device, tokens: int, seed: int, torch: Any | None) -> list[Router]:
    """One router per shape, each with a key of its own."""
    key = jax.random.key(seed)
    keys = [jax.random.fold_in(key, zlib.crc32(shape.label.encode()) >> 1) for shape in shapes]
    return [Router(shape, device, tokens, each, torch) for shape, each in zip(shapes, keys, strict=True)]


def measure(
    record: Record, found: Sequence[Router], chunks: int, threads: int, advance: Callable[[int, str], None]
) -> None:
    """Route `chunks` chunks through every router and add up the counts in `record`, which is whole at any time."""
    pool = ThreadPoolExecutor(threads)
    try:
        compiled = [router.compiled(pool, chunks * router.tokens * router.shape.experts) for router in found]
        for router, executables in zip(found, compiled, strict=True):
            entry: Record = {
                "models": list(router.shape.models),
                "size": router.shape.size,
                "rule": router.shape.rule,
                "tokens": 0,
                "refused": router.refused,
                "paths": {name: dict.fromkeys(COUNTED, 0) for name in router.names},
            }
            record["routers"].append(entry)
            advance(0, router.shape.models[0])
            for counts in router.chunks(executables, chunks):
                for name, of_path in counts.items():
                    for kind, count in of_path.items():
                        entry["paths"][name][kind] += count
                entry["tokens"] += router.tokens
                advance(router.tokens, router.shape.models[0])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def agreement(
    tokens: Annotated[int, typer.Option(help="of all models together, at least")] = ASKED,
    chunk: Annotated[int, typer.Option(help="tokens at a time")] = CHUNK,
    seed: Annotated[int, typer.Option(help="of the tokens")] = 0,
    model: Annotated[list[str] | None, typer.Option(help="only this model; may be repeated")] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder of the record (default: docs/results; sweep-results without a GPU)")
    ] = None,
) -> None:
    """Compare the experts of random tokens with float64's, for every model and implementation, XLA and PyTorch.

    Exit status: 0; 1 if an implementation chose experts that rounding does not explain; 2 for bad input; 130 when
    interrupted, with what was counted so far kept.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 140))
    try:
        status = run(tokens, chunk, seed, model or [], output, console)
    except ValueError as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        status = BAD_INPUT
    raise typer.Exit(status)


def run(tokens: int, chunk: int, seed: int, names: Sequence[str], output: Path | None, console: Console) -> int:
    """What the command does; returns its exit status.

    Raises:
      ValueError: a number below 1, an unknown model, or a folder that cannot be written.
    """
    from jax_router.provenance import provenance

    for option, value in (("tokens", tokens), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{option} is {value}. Expected 1 or more; pass a positive number to --{option}.")
    shapes = route_shapes(models)
    known = [model for shape in shapes for model in shape.models]
    for name in names:
        if name not in known:
            raise ValueError(f"model is {name!r}. Expected one of {', '.join(known)}; pass one of these to --model.")
    shapes = tuple(shape for shape in shapes if not names or set(names).intersection(shape.models))
    device = jax.local_devices()[0]
    gpu = device.platform == "gpu"
    facts = provenance()
    folder = output or Path("docs/results" if gpu else "sweep-results")
    path = folder / f"agreement-{gpu_name(facts)}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output leads to {path}: {error}. Expected a place that can be written; name another."
        ) from error
    chunks = -(-tokens // (chunk * len(shapes)))
    record: Record = {
        "provenance": facts, "seed": seed, "logit_deviation": LOGIT_DEVIATION, "asked": tokens, "routers": [],
    }  # fmt: skip
    total = chunks * chunk * len(shapes)
    console.print(
        f"{total} tokens, {len(shapes)} routers on {facts['gpu'] or 'the CPU'}, "
        f"sources {facts['source_hash'][:12]}, record in {path}", soft_wrap=True,
    )  # fmt: skip
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left")
    interrupted = False
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            task = progress.add_task("compiling", total=total)
            found = routers(shapes, device, chunk, seed, torch_with_gpu() if gpu else None)
            threads = max(1, (os.cpu_count() or 1) // 2)
            measure(
                record, found, chunks, threads,
                lambda done, label: progress.update(task, advance=done, description=label),
            )  # fmt: skip
    except KeyboardInterrupt:
        interrupted = True
        console.print("\ninterrupted: what was counted so far is kept")
    _write(path, record)
    print_record(console, record)
    verdict = bar(record)
    console.print(f"{verdict.verdict}: {verdict.claim}; {verdict.figures}", highlight=False, soft_wrap=True)
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    outside = any(
        router["paths"].get(name, {}).get("outside") for router in record["routers"] for name in IMPLEMENTATIONS
    )
    return INTERRUPTED if interrupted else FAILED if outside else 0


def _write(path: Path, record: Record) -> None:
    """Whole or not at all, one router per line."""
    head = json.dumps({name: value for name, value in record.items() if name != "routers"}, indent=1)
    lines = ",\n  ".join(json.dumps(router) for router in record["routers"])
    partial = path.with_suffix(".json.partial")
    partial.write_text(f'{head.removesuffix("}").rstrip()},\n "routers": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    os.replace(partial, path)


def register(app: typer.Typer) -> None:
    """Add the command to `jax-router`."""
    app.command("agreement")(agreement)
