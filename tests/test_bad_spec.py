"""A `RoutingSpec` that makes no sense, alone or with the experts it meets, is refused with what to do about it."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from jax_router import RoutingSpec, checks

NONSENSE = {
    "top_k is zero": (
        ValueError, {"top_k": 0}, "top_k is 0. Expected an integer of at least 1; pass the problem's size."
    ),
    "top_k is a float": (
        TypeError, {"top_k": 4.0}, "top_k is 4.0 (float). Expected an integer of at least 1; pass a number."
    ),
    "score_function is misspelt": (
        ValueError, {"score_function": "softmx"},
        "score_function is 'softmx'. Expected softmax, softmax_topk, sigmoid or sqrtsoftplus; did you mean "
        '"softmax"?',
    ),
    "score_function is unknown": (
        ValueError, {"score_function": "relu"},
        "score_function is 'relu'. Expected softmax, softmax_topk, sigmoid or sqrtsoftplus; pass one of these.",
    ),
    "score_function is None": (
        TypeError, {"score_function": None},
        "score_function is None (NoneType). Expected softmax, softmax_topk, sigmoid or sqrtsoftplus; pass its name.",
    ),
    "group_score is unknown": (
        ValueError, {"group_score": "mean"}, "group_score is 'mean'. Expected top2_sum or max; pass one of these."
    ),
    "select_on is unknown": (
        ValueError, {"select_on": "score"}, "select_on is 'score'. Expected scores or logits; did you mean \"scores\"?"
    ),
    "renormalize is a number": (
        TypeError, {"renormalize": 1}, "renormalize is 1 (int). Expected True or False; pass one of them."
    ),
    "round_logits is a dtype": (
        TypeError, {"round_logits": "bfloat16"},
        "round_logits is 'bfloat16' (str). Expected True or False; pass one of them.",
    ),
    "scaling_factor is text": (
        TypeError, {"scaling_factor": "2"}, "scaling_factor is '2' (str). Expected a number; pass a Python float."
    ),
    "scaling_factor is zero": (
        ValueError, {"scaling_factor": 0.0},
        "scaling_factor is 0.0. Expected a finite number other than 0; fix it.",
    ),
    "scaling_factor is NaN": (
        ValueError, {"scaling_factor": math.nan},
        "scaling_factor is nan. Expected a finite number other than 0; fix it.",
    ),
    "epsilon is negative": (
        ValueError, {"renormalize": True, "renormalize_epsilon": -1e-9},
        "renormalize_epsilon is -1e-09. Expected a finite number of at least 0; pass the model's.",
    ),
    "epsilon without renormalize": (
        ValueError, {"renormalize_epsilon": 1e-20},
        "renormalize_epsilon is 1e-20 but renormalize is False. Expected 0, because nothing is divided; set "
        "renormalize=True or leave renormalize_epsilon out.",
    ),
    "minimum is infinite": (
        ValueError, {"renormalize": True, "renormalize_min": math.inf},
        "renormalize_min is inf. Expected a finite number of at least 0; pass the model's.",
    ),
    "masked_choice is something else": (
        ValueError, {"masked_choice": -1.0},
        "masked_choice is -1.0. Expected -inf or 0.0; pass what the model fills the scores of the other groups with.",
    ),
    "num_groups alone": (
        ValueError, {"num_groups": 4},
        "num_groups is 4 and group_topk is None. Expected both or neither; pass the other one too, or None for both.",
    ),
    "num_groups is zero": (
        ValueError, {"num_groups": 0, "group_topk": 1},
        "num_groups is 0. Expected an integer of at least 1; pass the problem's size.",
    ),
    "more groups kept than there are": (
        ValueError, {"num_groups": 4, "group_topk": 5},
        "group_topk is 5 but num_groups is 4. Expected at most 4; fix one of them.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("error", "options", "message"), NONSENSE.values(), ids=NONSENSE)
def test_a_spec_that_makes_no_sense_is_refused(error, options, message) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        RoutingSpec(**{"top_k": 2} | options)


MISFITS = {
    "more than there are": (
        RoutingSpec(5), "spec has top_k=5 but weight has experts=4. Expected at most 4; fix the spec."
    ),
    "groups that do not divide": (
        RoutingSpec(1, num_groups=3, group_topk=1),
        "spec has num_groups=3 but weight has experts=4. Expected a number that divides them; fix the spec.",
    ),
    "groups of one": (
        RoutingSpec(1, num_groups=4, group_topk=1),
        'spec has group_score="top2_sum" but its groups have 1 expert each. Expected at least 2; use fewer groups or '
        'group_score="max".',
    ),
    "more than the groups hold": (
        RoutingSpec(3, num_groups=2, group_topk=1),
        "spec has top_k=3 but group_topk=1 groups hold 2 experts. Expected at most that; keep more groups.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "message"), MISFITS.values(), ids=MISFITS)
def test_a_spec_that_does_not_fit_the_experts_is_refused(spec, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checks.spec_fits(spec, 4)


def test_what_is_no_spec_is_refused() -> None:
    message = (
        "spec is {'top_k': 4} (dict). Expected a jax_router.RoutingSpec; make one, for example RoutingSpec(top_k=4, "
        'score_function="softmax_topk").'
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        checks.spec_fits({"top_k": 4}, 8)


def test_numbers_of_numpy_are_those_of_python() -> None:
    """Equal specs share what was compiled: one with float64 would have given float64 to the others, under x64."""
    spec = RoutingSpec(2, "sigmoid", True, np.float64(1e-20), np.float32(0.5), np.float64(2.5))
    assert {type(value) for value in (spec.renormalize_epsilon, spec.renormalize_min, spec.scaling_factor)} == {float}
    assert spec == RoutingSpec(2, "sigmoid", True, 1e-20, 0.5, 2.5)


def test_groups_that_are_all_kept_are_no_groups() -> None:
    spec = RoutingSpec(2, "sigmoid", num_groups=4, group_topk=4)
    assert spec == RoutingSpec(2, "sigmoid")
    assert (spec.num_groups, spec.group_topk) == (None, None)
    assert RoutingSpec(2, num_groups=4, group_topk=3).num_groups == 4
