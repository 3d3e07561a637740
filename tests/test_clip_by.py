"""Mix your own: any measure with any threshold and any response, states and errors of `clip_by` itself."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import optclip
from optclip import measures, responses, thresholds
from tests import oracles
from tests.cases import GRADS, PARAMS
from tests.harness import assert_close, avals, finite

MEASURES = ["global_norm", "leaf_norm", "leaf_rms", "unit_norm", "magnitude"]


@pytest.mark.parametrize("name", MEASURES)
def test_a_named_method_is_what_a_user_could_write(name):
    tx = optclip.clip_by(getattr(measures, name), 0.3)
    update, state = tx.update(GRADS[0], tx.init(PARAMS))
    sizes = oracles.MEASURES[name](GRADS[0])
    assert_close(state.stats.sizes, jax.tree.map(np.float32, sizes), rtol=1e-6)
    assert float(state.stats.limits) == np.float32(0.3)
    wide = jax.tree.broadcast(sizes, GRADS[0])
    assert_close(update, jax.tree.map(lambda g, s: oracles.rescale(g, s, 0.3), GRADS[0], wide), rtol=1e-6)


@pytest.mark.parametrize(
    ("measure", "rule"), list(itertools.product(MEASURES, ["fixed", "ratio", "history", "window"]))
)
def test_every_rule_works_at_every_scope(measure, rule):
    how = getattr(measures, measure)
    rules = {
        "fixed": 0.3,
        "ratio": thresholds.param_ratio(0.1, how),
        "history": thresholds.ema_ratio(1.2, warmup=1),
        "window": thresholds.percentile(50.0, window=5),
    }
    tx = optclip.clip_by(how, rules[rule])
    state = tx.init(PARAMS)
    update, after = tx.update(GRADS[0], state, PARAMS)
    assert avals(after) == avals(state) and avals(update) == avals(GRADS[0]) and finite(update)


# XLA:CPU takes subnormal numbers for zero, so the updates below are zero or normal.
_sizes = st.just(0.0) | st.floats(2.0**-124, 2.0**100, width=32)
_limits = st.floats(2.0**-40, 2.0**100, width=32)


@settings(max_examples=60, deadline=None)
@given(size=_sizes, limit=_limits)
@example(size=1.00001, limit=1.0)
@example(size=0.99999, limit=1.0)
def test_responses_bound_the_size_and_never_turn_the_direction(size, limit):
    unit = np.array([0.6, -0.8], np.float32)
    size, limit = np.float32(size), np.float32(limit)
    update = unit * size
    want = {
        "rescale": min(size, limit),
        "smooth": size / (1 + np.float64(size) / limit),
        "normalize": limit if size else 0.0,
        "zero": size if size <= limit else 0.0,
    }
    for name, target in want.items():
        got = getattr(responses, name)(*map(jnp.asarray, (update, size, limit)))
        np.testing.assert_allclose(got, unit * np.float64(target), rtol=2e-6, atol=1e-37, err_msg=name)


@pytest.mark.parametrize("response", ["rescale", "smooth", "normalize", "zero", "clamp"])
def test_a_limit_of_infinity_only_measures_and_has_a_derivative(response):
    tx = optclip.clip_by(measures.global_norm, jnp.inf, getattr(responses, response))
    slope = jax.grad(lambda g: jnp.sum(tx.update(g, tx.init(g))[0]))(jnp.array([3.0, 4.0]))
    np.testing.assert_array_equal(slope, [1, 1])


@pytest.mark.parametrize("response", ["rescale", "smooth", "normalize", "zero"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_size_or_a_limit_that_is_no_number_is_loud(response, bad):
    respond = getattr(responses, response)
    assert np.all(np.isnan(respond(jnp.ones(2), jnp.float32(bad), jnp.float32(1))))
    assert np.all(np.isnan(respond(jnp.ones(2), jnp.float32(1), jnp.float32(np.nan))))


def test_the_derivative_of_a_clip_is_that_of_its_formula():
    grad = {"a": jnp.array([3.0, -1.0]), "b": jnp.array([2.0])}
    tx = optclip.clip_by_global_norm(1.0)
    got = jax.jacobian(lambda g: tx.update(g, tx.init(g))[0])(grad)
    formula = lambda g: jax.tree.map(lambda x: x / jnp.sqrt(sum(jnp.sum(y**2) for y in jax.tree.leaves(g))), g)
    assert_close(got, jax.jacobian(formula)(grad), rtol=1e-5)


def test_the_derivative_of_a_clip_per_leaf_is_that_of_its_formula():
    grad = {"a": jnp.array([3.0, -1.0]), "b": jnp.array([2.0, 1.0]), "c": jnp.array([0.5, 4.0])}
    tx = optclip.clip_by_leaf_norm(1.0)
    got = jax.jacobian(lambda g: tx.update(g, tx.init(g))[0])(grad)
    formula = lambda g: jax.tree.map(lambda x: x / jnp.sqrt(jnp.sum(x**2)), g)
    assert_close(got, jax.jacobian(formula)(grad), rtol=1e-5)


def test_without_a_record_the_state_is_the_memory_alone():
    tx = optclip.clip_by(measures.leaf_norm, 0.3, record=False)
    assert tx.init(PARAMS) == optclip.ClipState((), None)


def test_sizes_per_leaf_are_no_parameters_for_optax():
    for tx in (
        optclip.clip_by_leaf_norm(0.3),
        optclip.clip_by_group_norm({"dense": 0.5, "head": 0.1}),
        optclip.clip_by(measures.unit_norm, thresholds.ema_ratio(1.2)),
        optclip.clip_by(partial(measures.leaf_norm, stack_axis={"dense": 0, "head": None}), 0.3),
    ):
        marked = optax.tree.map_params(tx, lambda x: "touched", tx.init(PARAMS), transform_non_params=lambda x: "kept")
        assert "touched" not in jax.tree.leaves(marked)


def test_map_params_with_mesh_axes_per_leaf():
    tx = optclip.clip_by_global_norm(1.0, axis_name={"dense": "data", "head": None})
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: "touched", state), state)


@pytest.mark.parametrize("tx", [
    optclip.acclip(), optclip.spam_clip(), optclip.spamp(), optclip.mars_clip(), optclip.zero_nonfinite(),
    optclip.stable_adamw_clip(optax.sgd(0.1)), optclip.skip_nonfinite(optax.sgd(0.1)), optclip.observe(),
    optclip.skip_spikes(optax.sgd(0.1)), optclip.u_clip(optax.identity()),
])  # fmt: skip
def test_a_state_that_init_did_not_return_is_named(tx):
    for state in (None, (), {"inner_state": ()}):
        with pytest.raises(TypeError, match=f"State that init returned, got a {type(state).__name__}"):
            tx.update(PARAMS, state, PARAMS)


def test_the_state_of_another_transformation_is_named():
    for tx in (optclip.clip_by_global_norm(1.0), optclip.clip(1.0), optclip.clippy()):
        for state in (optax.ScaleByScheduleState(jnp.int32(0)), ()):
            name = type(state).__name__
            with pytest.raises(TypeError, match=f"was given a {name}, the state of another transformation"):
                tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("state", [None, optax.EmptyState()])
def test_a_clipper_without_a_memory_takes_the_states_of_optax_own(state):
    methods = optclip.clip, optclip.clip_by_global_norm, optclip.clip_by_block_rms, optclip.adaptive_grad_clip
    for method in (*methods, optclip.clippy):
        tx = method(0.1)
        update, after = jax.jit(tx.update)(GRADS[0], state, PARAMS)
        assert_close(update, tx.update(GRADS[0], tx.init(PARAMS), PARAMS)[0], rtol=1e-6)
        assert after == state
    for tx in (optclip.zclip(), optclip.clip_by_global_norm(lambda count: 1.0), optclip.clip(lambda count: 1.0)):
        with pytest.raises(TypeError, match="but remembers something: pass what init returned"):
            tx.update(GRADS[0], state, PARAMS)


def test_bad_thresholds_are_named():
    with pytest.raises(ValueError, match=r"clip_by\(threshold=-1.0\): threshold must be > 0"):
        optclip.clip_by(measures.global_norm, -1.0)
    with pytest.raises(TypeError, match=r"clip_by\(threshold='a'\): threshold must be > 0, got str"):
        optclip.clip_by(measures.global_norm, "a")


def test_a_limit_of_one_element_and_limits_by_element():
    params = {"w": jnp.full((3, 2), 3.0), "b": jnp.ones(2)}
    for limit in (np.array([1.0]), jnp.array([1.0]), lambda count: jnp.ones(1)):
        tx = optclip.clip_by_global_norm(limit)
        update, _ = tx.update(params, tx.init(params))
        np.testing.assert_allclose(optclip.global_norm(update), 1.0, rtol=1e-6)
    bounds = {"w": jnp.array([[1.0, 2.0]] * 3), "b": jnp.array([0.5, 2.0])}
    tx = optclip.clip_by(measures.global_norm, bounds, responses.clamp)
    update, _ = tx.update(params, tx.init(params))
    np.testing.assert_array_equal(update["w"], bounds["w"])
    np.testing.assert_array_equal(update["b"], [0.5, 1.0])


def test_a_rule_that_is_told_its_limit_needs_it_at_updates_only():
    told = thresholds.Threshold(lambda sizes: (), lambda sizes, memory, params=None, *, value, **extra: (value, memory))
    tx = optclip.clip_by(measures.global_norm, told, record=False)
    update, _ = tx.update(jnp.full(4, 2.0), tx.init(jnp.ones(4)), value=jnp.float32(1.0))
    np.testing.assert_allclose(update, np.full(4, 0.5), rtol=1e-6)
    with pytest.raises(ValueError, match="does not fit its size"):
        tx.update(jnp.full(4, 2.0), tx.init(jnp.ones(4)), value=jnp.ones(4))


def test_the_state_of_another_clipper_is_refused():
    fixed, moving, steps = (optclip.clip_by_global_norm(1.0), optclip.clip_by_ema(2.0), lambda count: 1.0)
    for tx, other in ((fixed, moving), (moving, fixed), (optclip.clip_by_global_norm(steps), fixed)):
        with pytest.raises(TypeError, match="the state of another one, which remembers"):
            tx.update(GRADS[0], other.init(PARAMS))


def test_a_rule_that_breaks_its_form_is_told():
    tell = lambda rule: jax.eval_shape(
        lambda g: (tx := optclip.clip_by(measures.global_norm, rule)).update(g, tx.init(g)), GRADS[0]
    )
    with pytest.raises(TypeError, match="memory of a rule was int32 and would become float32"):
        tell(thresholds.Threshold(lambda s: jnp.zeros((), jnp.int32), lambda s, m, p, **e: (jnp.inf, 0.9 * m + s)))
    with pytest.raises(TypeError, match=r"must return \(limits, memory\)"):
        tell(thresholds.Threshold(lambda s: (), lambda s, m, p, **e: s))
    with pytest.raises(
        ValueError, match=r"numbers the rule remembers do not fit the state.*got \[\(3,\)\], had \[\(2,\)\]"
    ):
        tell(thresholds.Threshold(lambda s: jnp.zeros(2), lambda s, m, p, **e: (s, jnp.zeros(3))))
    with pytest.raises(TypeError, match=r"zscore.*makes a rule and is none: call it"):
        tell(thresholds.zscore)


def test_a_response_that_is_not_made_yet_is_refused():
    with pytest.raises(TypeError, match=r"response must be a function of \(update, size, limit\).*does it make one"):
        optclip.clip_by(measures.global_norm, 1.0, responses.floored)
