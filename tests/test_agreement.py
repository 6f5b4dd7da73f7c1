"""Random tokens against float64: what is counted, what the bar makes of it, what an interruption leaves."""

from __future__ import annotations

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_rows
import typer
from typer.testing import CliRunner

from jax_router import agreement, agreement_report, report
from jax_router import parity_routing as judged
from jax_router.agreement import Router, measure, routers
from jax_router.agreement_report import ASKED, bar, markdown, read_record, totals
from jax_router.routing import RoutingSpec
from jax_router.sweep_points import Shape
from jax_router.sweep_route import to_bfloat16

GROUPED = RoutingSpec(4, "sigmoid", renormalize=True, num_groups=4, group_topk=2, masked_choice=0.0)
SHAPES = (
    Shape(64, 16, True, ("small", "its twin"), RoutingSpec(2, "softmax_topk")),
    Shape(128, 32, False, ("grouped",), GROUPED, True),
)
CPU = jax.devices("cpu")[0]


def small_routers(torch: Any = None, tokens: int = 64) -> list[Router]:
    return routers(SHAPES, CPU, tokens, 0, torch)


def counted(found: list[Router], chunks: int = 3) -> dict[str, Any]:
    record: dict[str, Any] = {"provenance": synthetic_rows.PROVENANCE, "routers": []}
    measure(record, found, chunks, 1, lambda *_: None)
    return record


def run_agreement(*arguments: str) -> Any:
    app = typer.Typer()
    agreement.register(app)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def record_of(**outside: int) -> dict[str, Any]:
    """A record of a GPU that never ran."""
    paths = {
        name: {"differing": 9, "outside": outside.get(name, 0), "undecided": 40} for name in ("xla", "cuda", "pallas")
    }
    paths["PyTorch, bf16"] = {"differing": 90_000, "outside": 80_000, "undecided": 40}
    entry = {"models": ["DeepSeek-V3"], "size": "7168x256", "rule": {}, "tokens": ASKED, "refused": {}, "paths": paths}
    return {"provenance": synthetic_rows.PROVENANCE, "seed": 0, "asked": ASKED, "routers": [entry]}


# Counting --------------------------------------------------------------------------------------------------------


def test_the_implementations_agree_and_16_bit_logits_do_not() -> None:
    record = counted(small_routers(tokens=512), chunks=8)
    assert [router["tokens"] for router in record["routers"]] == [8 * 512] * 2
    for name, counts in totals(record).items():
        assert counts["tokens"] == 2 * 8 * 512
        assert (counts["outside"] > 20) == ("bf16" in name), record
        assert counts["outside"] <= counts["differing"]
    assert record["routers"][0]["refused"].keys() == {"cuda", "pallas"}


def test_the_judgement_is_that_of_the_sweep_in_numpy() -> None:
    """On the CPU in float64, step by step as `sweep_route` does it."""
    for router in small_routers(tokens=256):
        x = router.draw(router.key)
        experts = np.array(jax.jit(router.paths["xla, bf16 logits"])(x, router.weight, router.biases))
        experts[3, 0] = experts[3, 1]
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            judge = jax.jit(lambda *arguments, r=router: r.judge(*arguments, comparisons=1000))
            found = jax.tree.map(int, judge(x, router.weight, router.biases, {"xla": jnp.asarray(experts)}))["xla"]
        bias, correction = (None if each is None else np.asarray(each) for each in router.biases)
        truth = agreement.parity.reference(np.asarray(x), np.asarray(router.weight), bias)
        slack = agreement.parity.logit_bound(truth, router.accumulation("xla"), 1000)
        exact = judged.exact_choice(truth.logits, correction, router.spec, to_bfloat16)
        logits = judged.logit_interval(truth.logits, slack, router.spec, to_bfloat16)
        verdict = judged.judge_selection(experts, exact, judged.choice_interval(logits, correction, router.spec))
        assert found["differing"] == verdict.differs.sum() > 1
        assert found["outside"] == verdict.impossible.sum() > 1
        assert abs(found["undecided"] - verdict.undecided.sum()) <= 1  # its margins are a little wider


def test_magnitude_and_spread_are_never_too_small() -> None:
    for router in small_routers(tokens=64):
        x = router.draw(router.key)
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            computed = jax.jit(lambda *operands, r=router: _fields(r._truth(*operands)[0]))
            logits, *others = map(np.asarray, computed(x, router.weight, router.biases))
        expected = agreement.parity.reference(np.asarray(x), np.asarray(router.weight), _host(router.biases[0]))
        np.testing.assert_allclose(logits, expected.logits, rtol=1e-12, atol=1e-12)
        for found, exact in zip(others, (expected.magnitude, expected.spread), strict=True):
            assert (found >= exact * (1 - 1e-12)).all()
            assert (found <= exact * 1.03).all()


def _fields(truth: Any) -> Any:
    return truth.logits, truth.magnitude, truth.spread


def _host(array: Any) -> Any:
    return None if array is None else np.asarray(array)


def test_every_path_is_held_to_what_its_accumulation_promises() -> None:
    class FakeGpu:
        platform = "gpu"

    router = small_routers()[0]
    router.device = FakeGpu()  # type: ignore[assignment]  # where they differ
    tensor_cores, any_order = agreement.parity.tensor_core_chain(64), agreement.parity.float32_chain(64)
    expected = {"cuda": agreement.parity.slice_tree(64), "pallas": tensor_cores, "xla": tensor_cores}
    expected |= dict(zip(agreement.XLA_PATHS, (tensor_cores, any_order), strict=True))
    expected |= dict(zip(agreement.TORCH_PATHS, (tensor_cores, any_order), strict=True))
    assert {name: router.accumulation(name) for name in expected} == expected


def test_tokens_are_those_of_the_seed_and_other_in_every_chunk_and_router() -> None:
    first, second = small_routers()
    keys = [router.key for router in (*small_routers(), *routers(SHAPES, CPU, 64, 1, None))]
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == 4
    assert np.array_equal(first.draw(first.key), small_routers()[0].draw(first.key))
    drawn = []
    with ThreadPoolExecutor(1) as pool:
        executables = first.compiled(pool, 1000)
        draw = executables["draw"].result()
        executables["draw"] = pool.submit(lambda: lambda key: drawn.append(draw(key)) or drawn[-1])
        assert len(list(first.chunks(executables, 3))) == 3
    assert len({np.asarray(x).tobytes() for x in drawn}) == 3
    logits = np.asarray(second.draw(second.key)).astype(float) @ np.asarray(second.weight).astype(float).T
    assert 1 < logits.std() < 2


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_pytorch_takes_the_same_tokens() -> None:
    import torch

    sums = totals(counted(small_routers(torch, tokens=512), chunks=4))
    assert sums["PyTorch, float32"]["outside"] == 0
    assert sums["PyTorch, float32"]["differing"] <= sums["PyTorch, float32"]["undecided"]
    assert 10 < sums["PyTorch, bf16"]["outside"] < 400
    assert sums["PyTorch, bf16"]["tokens"] == 2 * 4 * 512


def test_an_implementation_that_swaps_experts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (router, _) = small_routers()
    right = router.paths["xla"]
    router.paths["xla"] = lambda *operands: right(*operands).at[5, 1].set((right(*operands)[5, 0] + 1) % 16)
    record = counted([router])
    assert record["routers"][0]["paths"]["xla"]["outside"] in (1, 2, 3)
    assert record["routers"][0]["paths"]["xla, float32"]["outside"] == 0
    assert bar(record).met is False


# The command -----------------------------------------------------------------------------------------------------


def test_the_command_counts_and_records(tmp_path: Path) -> None:
    result = run_agreement("--tokens", "60", "--chunk", "16", "--model", "OLMoE-1B-7B", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    record = read_record(path)
    assert record is not None
    assert path.name.startswith("agreement-")
    (router,) = record["routers"]
    assert (router["models"], router["tokens"]) == (["OLMoE-1B-7B"], 64)
    assert record["provenance"]["source_hash"]
    assert router["rule"]["top_k"] == 8
    assert "OLMoE-1B-7B" in result.output
    assert "not measured: every expert set" in " ".join(result.output.split())


def test_experts_that_nothing_explains_make_the_exit_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Router._paths

    def broken(router: Router) -> dict[str, Any]:
        paths = original(router)
        return paths | {"xla": lambda *operands: paths["xla"](*operands).at[0, 0].set(paths["xla"](*operands)[0, 1])}

    monkeypatch.setattr(Router, "_paths", broken)
    result = run_agreement("--tokens", "8", "--chunk", "8", "--model", "OLMoE-1B-7B", "--output", str(tmp_path))
    assert result.exit_code == 1, result.output
    assert "not met: every expert set" in " ".join(result.output.split())


def test_ctrl_c_keeps_what_was_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Router.chunks

    def interrupted(router: Router, executables: Any, count: int) -> Any:
        yield next(original(router, executables, count))
        raise KeyboardInterrupt

    monkeypatch.setattr(Router, "chunks", interrupted)
    result = run_agreement("--tokens", "48", "--chunk", "8", "--model", "OLMoE-1B-7B", "--output", str(tmp_path))
    assert result.exit_code == 130, result.output
    record = read_record(next(tmp_path.iterdir()))
    assert record is not None
    assert [router["tokens"] for router in record["routers"]] == [8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "0"), "tokens is 0. Expected 1 or more; pass a positive number to --tokens."),
        (("--chunk", "-1"), "chunk is -1. Expected 1 or more; pass a positive number to --chunk."),
        (("--model", "gpt-5"), "model is 'gpt-5'. Expected one of gpt-oss-120b, DeepSeek-V3"),
    ],
)
def test_bad_input_is_explained(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = run_agreement(*arguments, "--output", str(tmp_path / "folder"))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "folder").exists()


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run_agreement("--output", str(tmp_path / "file" / "folder"))
    assert result.exit_code == 2
    assert "Expected a place that can be written; name another." in " ".join(result.output.split())


# The bar and the report ------------------------------------------------------------------------------------------


def test_the_bar_needs_ten_million_tokens_of_all_three_and_nothing_outside() -> None:
    assert bar(record_of()).verdict == "met"
    assert "cuda 9 differing, 0 outside; " in bar(record_of()).figures
    missed = bar(record_of(pallas=1))
    assert missed.verdict == "not met"
    assert "pallas 9 differing, 1 outside" in missed.figures
    fewer = record_of()
    fewer["routers"][0]["tokens"] = ASKED - 1
    assert bar(fewer).verdict == "not measured"
    assert "9,999,999 tokens by all three" in bar(fewer).figures
    without = record_of()
    del without["routers"][0]["paths"]["pallas"]
    assert bar(without).verdict == "not measured"
    assert bar(None).figures == "no record"
    assert bar(record_of(), "another hash").verdict == "not measured"
    assert "other sources" in bar(record_of(), "another hash").figures
    assert bar(record_of(), synthetic_rows.PROVENANCE["source_hash"]).met


def test_the_table_lists_the_implementations_first() -> None:
    text = markdown(record_of(cuda=2))
    assert "| model | shape | tokens | cuda | pallas | xla | PyTorch, bf16 |" in text
    assert "| DeepSeek-V3 | 7168x256 | 10,000,000 | 9 / 2 | 9 / 0 | 9 / 0 | 90,000 / 80,000 |" in text
    assert "| all |  | 10,000,000 | 9 / 2 |" in text
    assert "cuda 40, pallas 40, xla 40." in text


def test_the_report_takes_the_record_beside_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = synthetic_rows.write(tmp_path / "rows.jsonl", synthetic_rows.headline_rows(only_models=["Kimi-K2"]))
    readme = tmp_path / "README.md"
    markers = "<!-- generated: {0} -->\n<!-- end generated: {0} -->\n"
    readme.write_text(markers.format("agreement") + markers.format("bars"))
    written = report.write_report(source, tmp_path / "results", readme)
    assert "Not measured." in readme.read_text()
    assert "not measured | no record |" in readme.read_text()
    (tmp_path / "results" / "agreement-h200.json").write_text(json.dumps(record_of()))
    written = report.write_report(source, tmp_path / "results", readme)
    assert tmp_path / "results" / "agreement-h200.md" in written
    assert "| DeepSeek-V3 | 7168x256 | 10,000,000 |" in (tmp_path / "results" / "agreement-h200.md").read_text()
    assert "| DeepSeek-V3 | 7168x256 | 10,000,000 |" in readme.read_text()
    assert "10,000,000 tokens (cuda, pallas, xla) | met |" in readme.read_text()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"routers": [{}], "provenance": {}}'])
def test_a_broken_record_is_explained(content: str, tmp_path: Path) -> None:
    path = tmp_path / "agreement-h200.json"
    assert read_record(path) is None
    path.write_text(content)
    with pytest.raises(ValueError, match=r"is broken \(.*Expected what jax-router agreement writes; run that again"):
        agreement_report.read_record(path)


def test_gpu_every_path_of_every_router_is_counted(gpu: jax.Device) -> None:
    import torch

    found = routers(SHAPES, gpu, 4096, 0, torch)
    record = counted(found, chunks=2)
    for router in record["routers"]:
        assert {*agreement.XLA_PATHS, *agreement.TORCH_PATHS, "xla"} <= set(router["paths"])
        assert router["tokens"] == 2 * 4096
        for name, counts in router["paths"].items():
            assert (counts["outside"] > 20) == ("bf16" in name), router
