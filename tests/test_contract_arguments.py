"""The contract: a number out of range raises when the method is made; call, argument and bound are named."""

import re
from functools import partial

import numpy as np
import optax
import pytest

import optclip
from optclip import measures, responses, thresholds
from tests.cases import CASES

INNER = {"inner": optax.identity()}
MEMORY = {"warmup": -1, "warmup_limit": 0.0, "patience": 0}  # of whatever stands on `thresholds.history`
WRONG = {  # for each method what it cannot do without, and a wrong value for each of its numbers
    "acclip": ({}, {"b1": 1.0, "b2": -0.1, "alpha": 2.5, "eps": -1.0}),
    "adaclip": ({}, {"decay": 1.0, "patience": 0, "ord": 0}),
    "adagc": ({}, {"ratio": 0.0, "decay": 1.0, "max_norm": 0.0, "warmup": -1, "patience": 0}),
    "adagn": ({}, {"b1": 1.0, "b2": 1.0, "eps": -1.0, "patience": 0}),
    "adaptive_grad_clip": ({"clipping": 0.1}, {"clipping": 0.0, "eps": -1.0}),
    "aggc": ({"groups": 0}, {"high": 0.0, "low": 0.0, "decay": 1.0, "max_down": 1.1, "max_up": 0.9}),
    "autoclip": ({}, {"percent": 101.0, "window": 0, **MEMORY}),
    "clip": ({}, {"max_delta": 0.0}),
    "clip_by": ({"measure": measures.global_norm}, {"threshold": 0.0}),
    "clip_by_block_rms": ({}, {"threshold": 0.0}),
    "clip_by_ema": ({}, {"ratio": 0.0, "decay": 1.0, **MEMORY}),
    "clip_by_ema_sigma": ({}, {"sigmas": 0.0, "decay": 1.0, "first_limit": 0.0, "patience": 0}),
    "clip_by_global_norm": ({"max_norm": 1.0}, {"max_norm": 0.0, "ord": 0}),
    "clip_by_group_norm": ({"max_norm": 1.0}, {"max_norm": 0.0, "ord": 0}),
    "clip_by_historical_norm": ({}, {"z": 0.0, "window": 1, **MEMORY}),
    "clip_by_leaf_norm": ({"max_norm": 1.0}, {"max_norm": 0.0, "ord": 0}),
    "clip_by_median": ({}, {"ratio": 0.0, "window": 3, **MEMORY}),
    "clip_by_percentile": ({}, {"percent": -1.0, "window": 0, "max_norm": 0.0, **MEMORY}),
    "clip_by_quantile": ({}, {"quantile": 1.0, "rate": 0.0, "ratio": 0.0, **MEMORY}),
    "clip_by_unit_norm": ({"max_norm": 1.0}, {"max_norm": 0.0, "ord": 0}),
    "clippy": ({}, {"relative": 0.0, "absolute": -1.0}),
    "delta_gclip": ({"max_norm": 1.0}, {"max_norm": 0.0}),
    "gradient_stabilizer": ({}, {"b1": 1.0, "b2": 1.0, "patience": 0}),
    "lamb_clip": ({}, {"ratio": 0.0, "cap": 0.0}),
    "larc_clip": ({"learning_rate": 1.0}, {"learning_rate": 0.0, "trust_coefficient": 0.0, "weight_decay": -1.0}),
    "mars_clip": ({}, {"max_norm": 0.0, "gamma": -1.0, "b1": 1.0}),
    "norm_growth_limiter": ({}, {"ratio": 0.0, "patience": 0}),
    "normalize_by_update_norm": ({}, {"scale_factor": 0.0}),
    "observe": ({}, {"history": -1}),
    "percentile_clipping": ({}, {"percentile": -1, "window": 0, **MEMORY}),
    "skip_nonfinite": (INNER, {"max_consecutive": -1}),
    "skip_spikes": (INNER, {"rule": 0.0, "loss_rule": 0.0, "patience": 0}),
    "spam_clip": ({}, {"theta": 0.0, "decay": 1.0, "warmup": -1}),
    "spamp": ({}, {"decay": 1.0, "least": 0.0, "patience": 0}),
    "stable_adamw_clip": (INNER, {"max_rms": 0.0, "decay": 1.0, "eps": 0.0}),
    "track_median": ({"limit": 1.0}, {"limit": 0.0, "decay": 1.0}),
    "u_clip": (INNER, {"max_carry": 0.0}),
    "zclip": ({}, {"z": 0.0, "decay": 1.0, "max_norm": 0.0, "eps": -1.0, **MEMORY, "warmup": 0}),
}
SHELVES = [
    (thresholds.param_ratio, {"ratio": 1.0, "measure": measures.global_norm}, {"ratio": 0.0, "eps": -1.0}),
    (thresholds.window_zscore, {}, {"ddof": -1, "eps": -1.0}),
    (thresholds.past_percentile, {"percent": 50.0}, {"cap": 0.0}),
    (thresholds.ema_from_min, {}, {"warmup_limit": 0.0}),
    (thresholds.zscore, {}, {"cap": 0.0}),
    (thresholds.winsorized, {}, {"factor": 0.0}),
    (responses.floored, {}, {"delta": 1.5}),
    *[(getattr(measures, f"{scope}_norm"), {"tree": {}}, {"ord": 0}) for scope in ("global", "leaf", "unit")],
    (measures.group_norm, {"tree": {}, "groups": {}}, {"ord": 0}),
    (optclip.clip_tree, {"tree": {}, "max_norm": 1.0}, {"max_norm": 0.0}),
]
ROWS = [(getattr(optclip, name), *row) for name, row in WRONG.items()] + SHELVES
FREE = {"clip21", "zero_nonfinite"}  # take no numbers


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        pytest.param(partial(f, **needed), name, value, id=f"{f.__name__}-{name}")
        for f, needed, wrong in ROWS
        for name, value in wrong.items()
    ],
)
def test_a_wrong_number_is_refused_by_name(make, name, value):
    call = make.func.__name__
    with pytest.raises(ValueError, match=rf"^{call}\({name}={re.escape(repr(value))}\): {name} must be "):
        make(**{name: value})
    if isinstance(value, float):
        with pytest.raises((ValueError, TypeError), match=rf"^{call}\({name}=nan\): {name} must be "):
            make(**{name: np.nan})


def test_every_transformation_has_a_row():
    assert {case.public for case in CASES} - FREE == set(WRONG)
