"""The dispatcher is a pure function of data, says why, and goes on when a kernel or a table is broken."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_router as jr
from jax_router import dispatch, implementations, ops, tables
from jax_router.dispatch import Device, Problem, choose

H200 = Device("gpu", "NVIDIA H200", "9.0")
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", "8.0")
CPU = Device("cpu", "cpu")
PROBLEM = Problem(tokens=8, hidden=2880, experts=128, bias_dtype="bfloat16")


def times(warm: float, cold: float, verified: bool = True) -> dict:
    return {"verified": verified, "cupti_warm_us": [9 * warm, warm, warm], "cupti_cold_us": [cold, cold, cold / 9]}


def entry(tokens: int, winner: str, /, **candidates: dict) -> dict:
    shape = {"hidden": 2880, "experts": 128, "dtype": "bfloat16", "bias": True, "out_dtype": "float32"}
    return {**shape, "tokens": tokens, "winner": winner, "candidates": candidates}


DOCUMENT = {
    "gpu": "NVIDIA H200",
    "entries": [
        entry(1, "cuda", cuda=times(2, 8), xla=times(5, 5), pallas=times(3, 12)),
        entry(8, "pallas", cuda=times(4, 4), xla=times(6, 6), pallas=times(3, 3)),
        entry(64, "xla", cuda=times(1, 1, verified=False), xla=times(5, 5)),
    ],
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch) -> None:
    """Both kernels take every problem on an H200 and only there, whatever JAX or record of a verification is here."""
    monkeypatch.setattr(dispatch, "standings", lambda device, table: {})
    for name in ("cuda", "pallas"):
        refuse = lambda problem, device: None if device.compute_capability == "9.0" else f"needs 9.0, not {device}"  # noqa: E731
        monkeypatch.setattr(implementations.load(name), "why_unsupported", refuse)
        monkeypatch.setattr(implementations.load(name), "unavailable", lambda: None)
    for variable in (dispatch.PREFER_VARIABLE, dispatch.DISABLE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    dispatch._warn_once.cache_clear()


def test_an_explicit_argument_beats_the_environment_the_table_and_the_heuristic() -> None:
    environment = {dispatch.PREFER_VARIABLE: "cuda"}
    table = tables.Table.parse(DOCUMENT)
    for name in dispatch.IMPLEMENTATIONS:
        choice = choose(PROBLEM, H200, implementation=name, environment=environment, table=table)
        assert (choice.implementation, choice.reason) == (name, "named by the argument implementation")


def test_the_environment_beats_the_table() -> None:
    table = tables.Table.parse(DOCUMENT)
    for name in dispatch.IMPLEMENTATIONS:
        choice = choose(PROBLEM, H200, environment={dispatch.PREFER_VARIABLE: name}, table=table)
        assert (choice.implementation, choice.reason) == (name, f"JAX_ROUTER_IMPLEMENTATION={name}")


def test_a_symbolic_number_of_tokens_is_left_to_xla_where_nothing_is_named() -> None:
    (tokens,) = jax.export.symbolic_shape("tokens")
    problem = dataclasses.replace(PROBLEM, tokens=tokens)
    table = tables.Table.parse(DOCUMENT)
    choice = choose(problem, H200, environment={}, table=table)
    assert choice.implementation == "xla"
    assert dict(choice.rejected) == {
        "cuda": "takes a symbolic number of tokens where it is named",
        "pallas": "needs a fixed number of tokens, it is the symbolic tokens",
    }
    for named in ({"implementation": "cuda"}, {"environment": {dispatch.PREFER_VARIABLE: "cuda"}}):
        choice = choose(problem, H200, **{"environment": {}} | named, table=table)
        assert (choice.implementation, choice.config_name) == ("cuda", None)
    problem = dataclasses.replace(PROBLEM, tokens=np.int64(8))
    assert choose(problem, H200, environment={}).implementation == choose(PROBLEM, H200, environment={}).implementation


def test_the_table_beats_the_heuristic() -> None:
    choice = choose(PROBLEM, H200, environment={}, table=tables.Table.parse(DOCUMENT, "nvidia_h200.json"))
    assert (choice.implementation, choice.reason) == ("pallas", "3.00 us at tokens=8 in nvidia_h200.json")
    assert choice.rejected == (
        ("cuda", "took 4.00 us at tokens=8 in nvidia_h200.json"),
        ("xla", "took 6.00 us at tokens=8 in nvidia_h200.json"),
    )


@pytest.mark.parametrize(
    ("tokens", "nearest"),
    [(1, 1), (2, 1), (3, 8), (8, 8), (22, 8), (23, 64), (64, 64), (10**6, 64)],
)
def test_the_nearest_measured_tokens_decide_in_log2_and_ties_go_to_the_fewer(tokens, nearest) -> None:
    assert tables.Table.parse(DOCUMENT).nearest(Problem(tokens, 2880, 128, bias_dtype="float32")).tokens == nearest


def test_halfway_in_log2_goes_to_the_fewer_tokens() -> None:
    document = {"entries": [entry(tokens, "xla", xla=times(1, 1)) for tokens in (64, 16)]}
    assert tables.Table.parse(document).nearest(Problem(32, 2880, 128, bias_dtype="float32")).tokens == 16


def test_the_table_of_one_layout_serves_the_other_and_says_so() -> None:
    problem = dataclasses.replace(PROBLEM, weight_layout="hidden_experts")
    table = tables.Table.parse(DOCUMENT, "nvidia_h200.json")
    choice = choose(problem, H200, environment={}, table=table)
    where = "at tokens=8 in nvidia_h200.json, with a weight [experts, hidden]"
    assert (choice.implementation, choice.reason) == ("pallas", f"3.00 us {where}")
    assert dict(choice.rejected)["cuda"] == f"took 4.00 us {where}"
    assert "[experts" not in str(choose(PROBLEM, H200, environment={}, table=table))


def test_the_next_best_of_the_table_is_taken_when_the_winner_cannot_run() -> None:
    table = tables.Table.parse(DOCUMENT)
    choice = choose(PROBLEM, H200, environment={}, table=table, unavailable={"pallas": "is broken"})
    assert (choice.implementation, dict(choice.rejected)["pallas"]) == ("cuda", "is broken")
    choice = choose(PROBLEM, H200, environment={dispatch.DISABLE_VARIABLE: "cuda, pallas"}, table=table)
    assert choice.implementation == "xla"
    assert dict(choice.rejected)["cuda"] == "is switched off by JAX_ROUTER_DISABLE=cuda, pallas"


def test_the_metric_is_the_geometric_mean_of_warm_and_cold_medians() -> None:
    row = tables.Table.parse(DOCUMENT).nearest(Problem(1, 2880, 128, bias_dtype="float32"))
    assert dict(row.microseconds) == pytest.approx({"cuda": 4, "xla": 5, "pallas": 6})
    assert list(row.microseconds) == ["cuda", "xla", "pallas"]


def test_what_was_not_verified_is_never_picked() -> None:
    table = tables.Table.parse(DOCUMENT)
    for unavailable in ({}, {"pallas": "is broken"}):
        choice = choose(
            Problem(64, 2880, 128, bias_dtype="float32"), H200, environment={}, table=table, unavailable=unavailable
        )
        assert choice.implementation == "xla"
        assert dict(choice.rejected)["cuda"] == "has no verified time at tokens=64 in table"


@pytest.mark.parametrize(
    "other",
    [
        Problem(8, 2880, 128),
        Problem(8, 2880, 32, bias_dtype="float32"),
        Problem(8, 2888, 128, bias_dtype="float32"),
        Problem(8, 2880, 128, "float16", bias_dtype="float32"),
        Problem(8, 2880, 128, bias_dtype="float32", out_dtype="bfloat16"),
        Problem(8, 2880, 128, weight_dtype="float32", bias_dtype="float32"),
    ],
    ids=str,
)
def test_the_table_says_nothing_about_another_shape(other) -> None:
    assert tables.Table.parse(DOCUMENT).nearest(other) is None
    assert choose(other, H200, environment={}, table=tables.Table.parse(DOCUMENT)).implementation == "cuda"


def test_elsewhere_than_on_a_gpu_xla_runs_even_if_a_kernel_could(monkeypatch) -> None:
    monkeypatch.setattr(implementations.load("pallas"), "why_unsupported", lambda problem, device: None)
    choice = choose(Problem(64, 2880, 128), CPU, environment={})
    assert (choice.implementation, choice.reason) == ("xla", "the kernels are for GPUs; xla runs everywhere")


@given(
    tokens=st.integers(1, 2**20),
    hidden=st.integers(1, 2**17),
    experts=st.integers(1, 2**12),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    device=st.sampled_from([H200, A100, CPU, Device("tpu", "TPU v6"), Device("gpu", "gfx942", "gfx942")]),
    environment=st.fixed_dictionaries(
        {},
        optional={
            dispatch.PREFER_VARIABLE: st.sampled_from(dispatch.IMPLEMENTATIONS),
            dispatch.DISABLE_VARIABLE: st.sampled_from(["cuda", "pallas", "cuda,pallas", ""]),
        },
    ),
    unavailable=st.dictionaries(st.sampled_from(["cuda", "pallas"]), st.just("is broken")),
    measured=st.booleans(),
)
def test_none_always_works_and_gives_a_reason_for_and_against_everything(
    tokens, hidden, experts, dtype, device, environment, unavailable, measured
) -> None:
    problem = Problem(tokens, hidden, experts, dtype)
    table = tables.Table.parse(DOCUMENT) if measured else None
    arguments = {"environment": environment, "table": table, "unavailable": unavailable}
    choice = choose(problem, device, **arguments)
    assert choice == choose(problem, device, **arguments)
    assert sorted([choice.implementation, *dict(choice.rejected)]) == sorted(dispatch.IMPLEMENTATIONS)
    assert choice.implementation not in unavailable
    assert choice.implementation not in environment.get(dispatch.DISABLE_VARIABLE, "")
    assert choice.reason
    assert all(reason for _, reason in choice.rejected)


def test_a_sequence_is_tried_in_order() -> None:
    broken = {"cuda": "is broken"}
    for names, expected in ((("cuda", "pallas"), "cuda"), (["pallas", "cuda"], "pallas"), (("xla", "cuda"), "xla")):
        assert choose(PROBLEM, H200, implementation=names, environment={}).implementation == expected
    choice = choose(PROBLEM, H200, implementation=("cuda", "xla"), environment={}, unavailable=broken)
    assert choice.implementation == "xla"
    assert dict(choice.rejected) == {"cuda": "is broken", "pallas": "is not named by the argument implementation"}


def test_a_switched_off_implementation_does_not_run_even_if_named() -> None:
    environment = {dispatch.DISABLE_VARIABLE: "cuda"}
    message = 'implementation="cuda" is switched off by JAX_ROUTER_DISABLE=cuda. Use implementation="xla", or leave'
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        choose(PROBLEM, H200, implementation="cuda", environment=environment)
    assert choose(PROBLEM, H200, implementation=("cuda", "pallas"), environment=environment).implementation == "pallas"
    assert choose(PROBLEM, H200, environment=environment).implementation == "xla"


def test_a_named_implementation_that_fails_to_build_is_an_error_with_the_reason() -> None:
    reason = "could not be built or loaded: no nvcc. Install it"
    with pytest.raises(NotImplementedError, match=re.escape(f'implementation="cuda" {reason}. Use')):
        choose(PROBLEM, H200, implementation="cuda", environment={}, unavailable={"cuda": reason})


@pytest.fixture
def on_h200(monkeypatch, tmp_path) -> Iterator[Path]:
    """Dispatch as if on an H200, with tables in an empty folder."""
    monkeypatch.setattr(Device, "default", classmethod(lambda cls: H200))
    monkeypatch.setattr(tables.importlib.resources, "files", lambda package: tmp_path)
    tables.load_table.cache_clear()
    yield tmp_path
    tables.load_table.cache_clear()


def test_a_failed_build_warns_once_says_what_to_install_and_the_library_goes_on(on_h200, monkeypatch) -> None:
    reason = "could not be built or loaded: no nvcc. Run\n  pip install nvidia-cuda-nvcc"
    monkeypatch.setattr(implementations.load("cuda"), "unavailable", lambda: reason)
    x, weight = jnp.ones((8, 16), jnp.bfloat16), jnp.ones((4, 16), jnp.bfloat16)
    with pytest.warns(RuntimeWarning) as caught:
        logits = jax.jit(jr.router_gemm)(x, weight)  # tracing asks for the default device
    assert [str(warning.message) for warning in caught] == [
        f'jax_router goes on without implementation="cuda", which {reason}'
    ]
    np.testing.assert_array_equal(logits, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda x: jr.router_gemm(x, weight))(x)


def test_a_preference_that_cannot_be_followed_warns_once_and_the_library_goes_on(monkeypatch) -> None:
    monkeypatch.setenv(dispatch.PREFER_VARIABLE, "cuda")
    monkeypatch.setattr(ops, "_device", lambda *arrays: CPU)
    x, weight = jnp.ones((8, 16), jnp.bfloat16), jnp.ones((4, 16), jnp.bfloat16)
    message = "JAX_ROUTER_IMPLEMENTATION=cuda is not followed, xla runs instead: cuda needs 9.0, not cpu"
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(message)}$"):
        jr.router_gemm(x, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jr.router_gemm(x, weight)


def test_the_table_of_the_device_is_read_from_the_package(on_h200) -> None:
    (on_h200 / "nvidia_h200.json").write_text(json.dumps(DOCUMENT))
    choice = jr.explain(tokens=8, hidden=2880, experts=128, bias=True)
    assert (choice.implementation, choice.reason) == ("pallas", "3.00 us at tokens=8 in nvidia_h200.json")
    assert jr.explain(tokens=8, hidden=2880, experts=128, bias=True, device=A100).implementation == "xla"


def test_a_device_without_a_table_takes_that_of_its_twin(on_h200) -> None:
    """An H100 and an H200 are one processor with different memory."""
    (on_h200 / "nvidia_h100_80gb_hbm3.json").write_text(json.dumps(DOCUMENT))
    choice = jr.explain(tokens=8, hidden=2880, experts=128, bias=True)
    assert (choice.implementation, choice.reason) == ("pallas", "3.00 us at tokens=8 in nvidia_h100_80gb_hbm3.json")
    (on_h200 / "nvidia_h200.json").write_text("{}")  # its own comes first, broken or not
    tables.load_table.cache_clear()
    with pytest.warns(RuntimeWarning, match="nvidia_h200.json is broken"):
        assert "no measurements of this shape" in jr.explain(tokens=8, hidden=2880, experts=128, bias=True).reason


def broken_documents() -> Iterator[tuple[str, str]]:
    yield "empty", ""
    yield "cut off", json.dumps(DOCUMENT)[:200]
    yield "a list", "[]"
    yield "without entries", "{}"
    yield "binary", "\0"
    for name in ("hidden", "tokens", "winner", "candidates"):
        document = copy.deepcopy(DOCUMENT)
        del document["entries"][1][name]
        yield f"without {name}", json.dumps(document)
    for name, value in {
        "tokens": 0,
        "winner": "triton",
        "candidates": [],
        "hidden": [1],
    }.items():
        document = copy.deepcopy(DOCUMENT)
        document["entries"][0][name] = value
        yield f"{name} is {value}", json.dumps(document)
    unverified = copy.deepcopy(DOCUMENT)
    unverified["entries"][0]["candidates"]["cuda"]["verified"] = False
    yield "unverified winner", json.dumps(unverified)
    text = copy.deepcopy(DOCUMENT)
    text["entries"][0]["candidates"]["cuda"]["cupti_warm_us"] = ["fast"]
    yield "times are words", json.dumps(text)
    for time in (float("nan"), float("inf"), -1.0):
        wrong = copy.deepcopy(DOCUMENT)
        wrong["entries"][0]["candidates"]["xla"]["cupti_warm_us"] = [time]
        yield f"a time is {time}", json.dumps(wrong)
    yield "nested", "[" * 100_000


@pytest.mark.parametrize(("name", "document"), list(broken_documents()), ids=lambda value: value[:20])
def test_a_broken_table_warns_once_and_the_heuristic_chooses(name, document, on_h200) -> None:
    (on_h200 / "nvidia_h200.json").write_text(document)
    with pytest.warns(RuntimeWarning, match=r"^The dispatch table .*nvidia_h200.json is broken \(") as caught:
        choices = [jr.explain(tokens=8, hidden=2880, experts=128, bias=True) for _ in range(2)]
    assert len(caught) == 1
    assert "run that again, or reinstall jax-router" in str(caught[0].message)
    assert [choice.implementation for choice in choices] == ["cuda", "cuda"]
    assert "no measurements" in choices[0].reason


def test_the_checked_in_tables_can_be_read() -> None:
    for path in Path(tables.__file__).parent.glob("*.json"):
        document = json.loads(path.read_text())
        assert tables.file_name(document["gpu"]) == path.name
        assert tables.Table.parse(document, path.name).rows


def test_explain_prints_the_choice_its_reason_and_why_each_other_one_was_not_chosen() -> None:
    choice = jr.explain(tokens=8, hidden=16, experts=4, device=CPU)
    assert str(choice).splitlines() == [
        "xla: the kernels are for GPUs; xla runs everywhere",
        "  not cuda: needs 9.0, not cpu",
        "  not pallas: needs 9.0, not cpu",
    ]


def test_explain_describes_the_same_problem_as_router_gemm(monkeypatch) -> None:
    seen = []

    def resolve(problem, device, implementation=None):
        seen.append((problem, device, implementation))
        return choose(problem, device, implementation=implementation, environment={})

    monkeypatch.setattr(dispatch, "resolve", resolve)
    for x, weight, bias, out in (
        ("bfloat16", "bfloat16", "bfloat16", "float32"),
        ("float16", "float32", None, "float16"),
        ("float32", "float32", "float32", "float32"),
    ):
        layout = "hidden_experts" if bias is None else "experts_hidden"
        jr.router_gemm(
            jnp.ones((2, 3, 16), x),
            jnp.ones((16, 4) if bias is None else (4, 16), weight),
            None if bias is None else jnp.ones(4, bias),
            out_dtype=out,
            weight_layout=layout,
            implementation="xla",
        )
        jr.explain(
            tokens=6,
            hidden=16,
            experts=4,
            dtype=x,
            weight_dtype=weight,
            bias=bias is not None and bias,
            out_dtype=out,
            weight_layout=layout,
            implementation="xla",
        )
        assert seen[-2] == seen[-1]


def test_bias_true_means_a_bias_in_the_dtype_of_x() -> None:
    table = tables.Table.parse(DOCUMENT)
    assert table.nearest(Problem(8, 2880, 128, bias_dtype="bfloat16")) is not None
    for bias in (True, "bfloat16", jnp.bfloat16):
        assert jr.explain(tokens=8, hidden=2880, experts=128, bias=bias, device=CPU).implementation == "xla"


def test_a_device_is_described_from_jax() -> None:
    device = jax.devices()[0]
    assert Device.of(device).platform == device.platform
    assert Device.of(device).kind == device.device_kind
    assert str(H200) == H200.description == "NVIDIA H200 (9.0)"
    with jax.default_device(jax.devices("cpu")[0]):
        assert Device.default().platform == "cpu"
