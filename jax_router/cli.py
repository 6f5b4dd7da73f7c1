"""The command line: `jax-router explain | build | verify | sweep | tune | agreement | report`.

Each command but explain lives in a module of its own.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import jax_router
from jax_router import dispatch
from jax_router.models import UnknownModelError, models

try:
    import typer
except ImportError:  # annotations are not evaluated, so that main() can say what to install
    typer = None  # type: ignore[assignment]

# By command: the module with `register(app)`, which adds it, and the extra that brings what that imports.
COMMANDS = {
    "build": ("build", "cuda"),
    "verify": ("verification.command", "verify"),
    "sweep": ("sweep", "sweep"),
    "tune": ("tune", "sweep"),
    "agreement": ("agreement", "sweep"),
    "report": ("report", "sweep"),
}

# Devices that can be asked about without having them, as JAX describes them.
DEVICES = {
    "cpu": dispatch.Device("cpu", "cpu"),
    "a100": dispatch.Device("gpu", "NVIDIA A100-SXM4-80GB", "8.0"),
    "h100": dispatch.Device("gpu", "NVIDIA H100 80GB HBM3", "9.0"),
    "h200": dispatch.Device("gpu", "NVIDIA H200", "9.0"),
    "b200": dispatch.Device("gpu", "NVIDIA B200", "10.0"),
}


def main() -> None:
    """Run the command line."""
    if typer is None:
        raise SystemExit(
            'jax-router: the command line needs typer, which is missing. Run pip install ".[cli]" in its checkout.'
        )
    application()()


def application() -> typer.Typer:
    """The typer application. A command whose module cannot be imported says what to install."""
    app = typer.Typer(name="jax-router", help=jax_router.__doc__, no_args_is_help=True, add_completion=False)
    app.command("explain")(explain)
    for name, (module_name, extra) in COMMANDS.items():
        try:
            module = importlib.import_module(f"jax_router.{module_name}")
        except ImportError as error:
            _register_missing(app, name, f'needs {error.name}. Run pip install ".[{extra}]" in its checkout.')
        else:
            module.register(app)
    return app


def _register_missing(app: typer.Typer, name: str, reason: str) -> None:
    # Whatever options the real command has must lead to the reason and not to "no such option".
    any_options = {"allow_extra_args": True, "ignore_unknown_options": True}

    @app.command(name, help=f"Not installed: {reason}", context_settings=any_options)
    def missing() -> None:
        typer.echo(f"jax-router {name} {reason}", err=True)
        raise typer.Exit(2)


def explain(
    tokens: Annotated[int, typer.Option(help="Rows of x.")],
    model: Annotated[str | None, typer.Option(help="A published model; gives hidden, experts, dtype and bias.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Columns of x and weight, without --model.")] = None,
    experts: Annotated[int | None, typer.Option(help="Rows of weight, without --model.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of x: bfloat16, float16 or float32.")] = None,
    weight_dtype: Annotated[str | None, typer.Option(help="Of weight; left out, x's.")] = None,
    bias: Annotated[bool | None, typer.Option(help="Whether there is a bias.")] = None,
    route: Annotated[
        bool, typer.Option("--route", help="The model's whole routing, not its router GEMM alone.")
    ] = False,
    weight_layout: Annotated[
        str, typer.Option(help="experts_hidden or hidden_experts, as the weight is stored.")
    ] = "experts_hidden",
    out_dtype: Annotated[str, typer.Option(help="Of the logits: float32 or x's.")] = "float32",
    device: Annotated[str | None, typer.Option(help=f"One of {', '.join(DEVICES)}; left out, this machine's.")] = None,
    implementation: Annotated[
        str | None, typer.Option(help="As the argument of the operation; commas separate.")
    ] = None,
) -> None:
    """Say which implementation of the router GEMM, or of the routing, runs, why, and why each other one does not."""
    try:
        if model is None and (hidden is None or experts is None):
            raise ValueError("--model is missing. Expected it, or both --hidden and --experts; see jax_router.models.")
        if model is not None and (hidden, experts) != (None, None):
            raise ValueError("--model is given with --hidden or --experts. Expected one or the other; leave one out.")
        if device is not None and device.lower() not in DEVICES:
            known = ", ".join(DEVICES)
            raise ValueError(f"--device is {device!r}. Expected one of {known}; leave it out for this machine.")
        if route and model is None:
            raise ValueError("--route is given without --model. Expected a model, whose rule is asked about; name one.")
        preset = None if model is None else models[model]
        problem: dict[str, Any] = {
            "tokens": tokens,
            "hidden": hidden if preset is None else preset.hidden,
            "experts": experts if preset is None else preset.experts,
            "dtype": dtype or ("bfloat16" if preset is None else preset.dtype),
            "bias": bool(preset is not None and preset.bias) if bias is None else bias,
        }
        choice = dispatch.explain(
            **problem,
            weight_dtype=weight_dtype,
            weight_layout=weight_layout,
            out_dtype=out_dtype,
            spec=preset.spec if route and preset is not None else None,
            device=None if device is None else DEVICES[device.lower()],
            implementation=None if implementation is None else tuple(map(str.strip, implementation.split(","))),
        )
    except (ValueError, TypeError, NotImplementedError, UnknownModelError) as error:
        typer.echo(f"jax-router explain: {error}", err=True)
        raise typer.Exit(2) from error
    where = DEVICES[device.lower()] if device is not None else dispatch.Device.default()
    typer.echo(f"{', '.join(f'{name}={value}' for name, value in problem.items())} on {where}")
    typer.echo(str(choice))
    if preset is not None:
        typer.echo(f"{preset.name}: {preset.source}")
