"""The command line says what the library would do, and what to install where it cannot."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import jax_router as jr
from jax_router import cli, dispatch, implementations

typer_testing = pytest.importorskip("typer.testing")


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    for variable in (dispatch.PREFER_VARIABLE, dispatch.DISABLE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)


def run(*arguments: str):
    return typer_testing.CliRunner().invoke(cli.application(), arguments)


def test_explain_prints_the_choice_and_why_each_other_one_was_not_chosen() -> None:
    result = run("explain", "--model", "gpt-oss-120b", "--tokens", "8", "--device", "cpu")
    assert result.exit_code == 0, result.output
    choice = jr.explain(tokens=8, hidden=2880, experts=128, bias=True, device=cli.DEVICES["cpu"])
    assert result.stdout.splitlines() == [
        "tokens=8, hidden=2880, experts=128, dtype=bfloat16, bias=True on cpu",
        *str(choice).splitlines(),
        f"gpt-oss-120b: {jr.models['gpt-oss-120b'].source}",
    ]


def test_explain_takes_a_shape_instead_of_a_model() -> None:
    result = run("explain", "--hidden", "16", "--experts", "4", "--tokens", "3", "--dtype", "float32", "--bias")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("tokens=3, hidden=16, experts=4, dtype=float32, bias=True on ")


def test_explain_follows_its_options(monkeypatch) -> None:
    monkeypatch.setattr(implementations.load("pallas"), "why_unsupported", lambda problem, device: None)
    arguments = ("explain", "--model", "DeepSeek-V3", "--tokens", "8", "--device", "h200")
    assert run(*arguments, "--implementation", "pallas,xla").stdout.splitlines()[1].startswith("pallas: named by")
    assert "bias=True" in run(*arguments, "--bias").stdout
    assert (
        "bias=False" in run("explain", "--model", "gpt-oss-20b", "--tokens", "8", "--no-bias", "--device", "cpu").stdout
    )
    narrow = run(*arguments, "--dtype", "float16", "--weight-dtype", "float32")
    assert "they are float16 and float32" in narrow.stdout
    shape = ("explain", "--hidden", "16", "--experts", "12", "--tokens", "8", "--device", "h200")
    assert "in weights [hidden, experts], they are 12" in run(*shape, "--weight-layout", "hidden_experts").stdout
    assert "weight_layout is 'rows'. Expected experts_hidden" in run(*shape, "--weight-layout", "rows").stderr


def test_explain_takes_spaces_between_names() -> None:
    result = run("explain", "--model", "Kimi-K2", "--tokens", "8", "--device", "cpu", "--implementation", "cuda, xla")
    assert "xla: named by the argument implementation" in result.stdout, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt-os-20b"), "did you mean gpt-oss-20b"),
        (("--hidden", "16"), "--model is missing. Expected it, or both --hidden and --experts"),
        (("--model", "Kimi-K2", "--hidden", "16"), "--model is given with --hidden or --experts"),
        (("--model", "Kimi-K2", "--device", "v100"), "--device is 'v100'. Expected one of cpu, a100, h100, h200, b200"),
        (("--model", "Kimi-K2", "--dtype", "int8"), "dtype is int8. Expected bfloat16, float16 or float32"),
        (("--model", "Kimi-K2", "--implementation", "triton"), "implementation names 'triton'"),
        (("--model", "Kimi-K2", "--implementation", "cuda", "--device", "a100"), "needs compute capability 9.0"),
        (("--model", "Kimi-K2", "--tokens", "-1"), "tokens is -1. Expected an integer of at least 0"),
    ],
)
def test_bad_options_are_refused_with_a_message_and_status_2(arguments, message) -> None:
    result = run("explain", "--tokens", "8", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not result.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_other_commands_are_there(name) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0, result.output
    assert "Usage" in result.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_whose_extra_is_missing_says_what_to_install(name, monkeypatch) -> None:
    module, extra = cli.COMMANDS[name]
    monkeypatch.setitem(sys.modules, f"jax_router.{module}", None)
    result = run(name, "--some-option", "value")
    assert result.exit_code == 2
    assert f'Run pip install ".[{extra}]" in its checkout.' in result.stderr
    assert run("--help").exit_code == 0


def test_without_typer_the_message_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(cli, "typer", None)
    with pytest.raises(SystemExit, match=r'Run pip install "\.\[cli\]" in its checkout\.'):
        cli.main()


def test_python_dash_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "jax_router", "explain", "--model", "Kimi-K2", "--tokens", "1", "--device", "cpu"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("tokens=1, hidden=7168, experts=384")


def test_route_asks_about_the_rule_of_the_model(monkeypatch) -> None:
    spec, asked, explain = jr.RoutingSpec(2), [], cli.dispatch.explain
    toy = types.SimpleNamespace(
        name="toy", hidden=16, experts=4, dtype="bfloat16", bias=False, spec=spec, source="here"
    )
    monkeypatch.setattr(cli, "models", {"toy": toy})
    monkeypatch.setattr(cli.dispatch, "explain", lambda **given: asked.append(given["spec"]) or explain(**given))
    for arguments in (("--route",), ()):
        result = run("explain", "--model", "toy", "--tokens", "8", "--device", "cpu", *arguments)
        assert result.exit_code == 0, result.stderr
    assert asked == [spec, None]


def test_route_without_a_model_is_refused() -> None:
    result = run("explain", "--hidden", "16", "--experts", "4", "--tokens", "3", "--route")
    assert result.exit_code == 2
    assert "--route is given without --model. Expected a model, whose rule is asked about; name one." in result.stderr
