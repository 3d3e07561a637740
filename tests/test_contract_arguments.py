"""The contract: a number out of range raises when the method is made; call, argument and bound are named."""

import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import measures, responses, thresholds
from tests.cases import CASES, GRADS, PARAMS
from tests.harness import cases

INNER = {"inner": optax.identity()}
MEMORY = {"warmup": -1, "warmup_limit": 0.0, "patience": 0}  # of whatever stands on `thresholds.history`
WRONG = {  # for each method what it cannot do without, and a wrong value for each of its numbers
    "acclip": ({}, {"b1": 1.0, "b2": -0.1, "alpha": 2.5, "eps": -1.0}),
    "adaclip": ({}, {"decay": 1.0, "patience": 0, "ord": 0}),
    "adagc": ({}, {"ratio": 1.0, "decay": 1.0, "max_norm": 0.0, "warmup": -1, "patience": 0}),
    "adagn": ({}, {"b1": 1.0, "b2": 1.0, "eps": -1.0, "patience": 0}),
    "adaptive_grad_clip": ({"clipping": 0.1}, {"clipping": 0.0, "eps": -1.0}),
    "aggc": ({"groups": 0}, {"high": 0.0, "low": 0.7, "decay": 1.0, "max_down": 1.1, "max_up": 0.9}),
    "autoclip": ({}, {"percent": 101.0, "window": 0, **MEMORY}),
    "clip": ({}, {"max_delta": 0.0}),
    "clip_by": ({"measure": measures.global_norm}, {"threshold": 0.0}),
    "clip_by_block_rms": ({}, {"threshold": 0.0}),
    "clip_by_ema": ({}, {"ratio": 1.0, "decay": 1.0, **MEMORY}),
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
    "norm_growth_limiter": ({}, {"ratio": 1.0, "patience": 0}),
    "normalize_by_update_norm": ({}, {"scale_factor": 0.0}),
    "observe": ({}, {"history": -1}),
    "percentile_clipping": ({}, {"percentile": -1, "window": 0, **MEMORY}),
    "skip_nonfinite": (INNER, {"max_consecutive": -1}),
    "skip_spikes": (INNER, {"rule": 0.0, "loss_rule": 0.0, "patience": 0}),
    "spam_clip": ({}, {"theta": 1.0, "decay": 1.0, "warmup": -1}),
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


TREES = {"clip": {"max_delta"}, "clip_by": {"threshold"}, "delta_gclip": {"max_norm"}, "track_median": {"limit"}}
TREES |= {f"clip_by_{scope}_norm": {"max_norm"} for scope in ("global", "group", "leaf", "unit")}
TREES |= {"clip_by_block_rms": {"threshold"}, "normalize_by_update_norm": {"scale_factor"}}
TREES |= {"skip_spikes": {"rule", "loss_rule"}, "mars_clip": {"max_norm"}, "stable_adamw_clip": {"max_rms"}}


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, (_, wrong) in WRONG.items() for argument in wrong],
)
def test_one_number_is_meant_where_no_tree_is(name, argument):
    make = partial(getattr(optclip, name), **WRONG[name][0])
    bad = [optclip.clip_by_global_norm(1.0), "1"]
    if argument not in TREES.get(name, ()):
        bad += [[1.5, 2.0], {"w": 1.5}, np.array([1.5, 2.0]), jnp.array([1.5, 2.0])]
    for value in bad:
        with pytest.raises(
            (ValueError, TypeError), match=rf"^{name}\({argument}=|^{name}: {argument} must be a Python"
        ):
            make(**{argument: value})


@pytest.mark.parametrize("name", sorted(WRONG))
def test_functions_are_functions_and_optimizers_are_made(name):
    method, needed = getattr(optclip, name), WRONG[name][0] | ({"threshold": 1.0} if name == "clip_by" else {})
    for argument in inspect.signature(method).parameters:
        if argument in ("measure", "feeding", "target", "response"):
            with pytest.raises(TypeError, match=rf"\({argument}='global'\): {argument} must be a function, got str"):
                method(**{**needed, argument: "global"})
        if argument == "inner":
            with pytest.raises(TypeError, match=rf"{name}\(inner=5.0\): inner must be an Optax transformation"):
                method(**{**needed, argument: 5.0})
            with pytest.raises(TypeError, match=r"inner must be an Optax transformation; call it: adamw\(...\)"):
                method(**{**needed, argument: optax.adamw})


def test_a_limit_has_the_shape_of_its_size_and_a_place_in_the_tree():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    for make in (optclip.clip_by_global_norm, optclip.clip_by_leaf_norm, optclip.normalize_by_update_norm):
        with pytest.raises(ValueError, match=r"a limit of shape \(2,\) does not fit its size, of shape \(\)"):
            make(jnp.array([1.0, 2.0])).init(params)
        with pytest.raises(ValueError, match="the limits must be a prefix tree"):
            make({"w": 1.0}).init(params)
    with pytest.raises(ValueError, match="does not fit"):  # the arguments of torch's clip_grad_norm_
        optclip.clip_by_global_norm(jnp.ones((3, 2)), 1.0).init(params)
    for limit in (np.ones((2, 2, 2)), np.ones((4, 1, 1)), np.ones(3)):
        for tx in (optclip.clip(limit), optclip.clip_by(measures.magnitude, limit, responses.clamp)):
            with pytest.raises(ValueError, match=r"does not fit its update, of shape \(2, 2\)"):
                tx.update(jnp.ones((2, 2)), tx.init(jnp.ones((2, 2))))
    tx = optclip.clip_by(lambda tree: jnp.ones((3, 1, 2)), 0.5)
    with pytest.raises(ValueError, match=r"of shape \(3, 1, 2\) does not fit its update, of shape \(2, 2\)"):
        tx.update(jnp.ones((2, 2)), tx.init(jnp.ones((2, 2))))
    per_column = optclip.clip_by_unit_norm({"w": jnp.array([[1.0, 2.0]]), "b": 1.0})
    update, _ = per_column.update({"w": jnp.full((3, 2), 3.0), "b": jnp.ones(2)}, per_column.init(params))
    np.testing.assert_allclose(jnp.linalg.norm(update["w"], axis=0), [1.0, 2.0], rtol=1e-6)


@cases(needs_params=True)
def test_parameters_have_the_shapes_of_the_updates(case):
    tx = case.make()
    other = jax.tree.map(lambda x: x[..., None], PARAMS)
    with pytest.raises(ValueError, match=rf"{case.public}: a parameter of shape \(.*1\) for an update of shape"):
        tx.update(GRADS[0], tx.init(PARAMS), other)


def test_every_transformation_has_a_row():
    assert {case.public for case in CASES} - FREE == set(WRONG)


@pytest.mark.parametrize("value", [None, "1.0", [1.0]])
def test_a_schedule_returns_a_number(value):
    tx, tree = optclip.clip_by_global_norm(lambda count: value), {"w": jnp.ones(3)}
    with pytest.raises(TypeError, match=r"^a schedule must return a number, got "):
        tx.update(tree, tx.init(tree))


@pytest.mark.parametrize(
    "value", [1, 1.0, np.float16(1), jnp.bfloat16(1), np.asarray(1, jnp.bfloat16)[()], jnp.ones(())]
)
def test_a_schedule_returns_any_number(value):
    tx, tree = optclip.clip_by_global_norm(lambda count: value), {"w": jnp.full(4, 2.0)}
    np.testing.assert_allclose(tx.update(tree, tx.init(tree))[0]["w"], 0.5)
