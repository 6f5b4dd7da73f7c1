"""Which points a suite has, and what filters leave of them."""

from __future__ import annotations

from typing import Any

import pytest

from jax_router.models import models
from jax_router.sweep_points import (
    ALL_TOKENS,
    MODELS,
    PEERS,
    SPARSE_TOKENS,
    TINY_SHAPES,
    points,
    shapes,
)

HEADLINE = {"gpu": True, "torch_gpu": True}


def test_every_model_on_record_is_measured_and_shared_shapes_only_once() -> None:
    found = shapes()
    assert sorted(name for shape in found for name in shape.models) == sorted(MODELS)
    assert set(MODELS) < set(models)
    assert len({(shape.hidden, shape.experts, shape.bias) for shape in found}) == len(found) < len(MODELS)
    assert [shape.models[0] for shape in found[:2]] == ["gpt-oss-120b", "DeepSeek-V3"]


def test_headline_suite_covers_the_bars() -> None:
    found = points("headline", **HEADLINE)
    for shape in shapes():
        of_shape = [point for point in found if point.shape == shape]
        tokens = {point.tokens for point in of_shape if point.candidate == "cuda"}
        assert tokens == set(ALL_TOKENS if shape.headline else SPARSE_TOKENS)
        for count in tokens:
            candidates = {point.candidate: dict(point.measurements) for point in of_shape if point.tokens == count}
            assert {"cuda", "pallas", "xla", *PEERS} <= set(candidates)
            assert ("chain_slope" in candidates["xla"]) == (shape.headline and count in (1, 64))
        bounds = {point.candidate for point in of_shape if point.tokens is None}
        assert bounds == {"empty", "read_weight"} | ({"accuracy", "no_routing"} if shape.headline else set())
    keys = [point.key(*each) for point in found for each in point.measurements]
    assert len(set(keys)) == len(keys)


def test_full_suite_has_every_point_of_the_others() -> None:
    def keys(suite: str) -> set[Any]:
        return {point.key(*each) for point in points(suite, **HEADLINE) for each in point.measurements}

    assert keys("quick") < keys("headline") < keys("full")


def test_without_a_gpu_only_xla_runs_and_pallas_on_tiny_shapes() -> None:
    found = points("quick", gpu=False, torch_gpu=False)
    assert {point.candidate for point in found} == {"xla", "pallas"}
    assert {point.shape for point in found if point.candidate == "pallas"} == set(TINY_SHAPES)
    assert {each for point in found for each in point.measurements} == {("wall", "warm")}


def test_filters_select_models_tokens_and_candidates() -> None:
    found = points(
        "headline",
        **HEADLINE,
        only_models=["glm-4.5-air"],
        only_tokens=[3],
        only_candidates=["cuda", "torch_linear"],
        only_operations=["router_gemm"],
    )
    assert {(point.shape.label, point.tokens, point.candidate) for point in found} == {
        ("4096x128", 3, "cuda"),
        ("4096x128", 3, "torch_linear"),
    }
    assert found[0].shape.models == ("Qwen3-235B-A22B", "GLM-4.5-Air")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suite": "huge"}, "suite is 'huge'. Expected one of quick, headline, full"),
        ({"only_models": ["gpt-5"]}, "model is 'gpt-5'. Expected one of gpt-oss"),
        ({"only_tokens": [0]}, "tokens is 0. Expected 1 or more"),
        ({"only_candidates": ["triton"]}, "implementation is 'triton'. Expected one of"),
        ({"only_operations": ["topk"]}, "operation is 'topk'. Expected router_gemm or route; pass one to --operation"),
    ],
)
def test_unknown_filters_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        points(**{"suite": "quick", **HEADLINE, **arguments})
