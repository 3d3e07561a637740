"""The contract, items 7 and 8: inside everything Optax wraps around a transformation, and through every checkpoint."""

import inspect
import pickle

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optclip
from optclip.stats import recorded
from tests.cases import CASES, GRADS, PARAMS
from tests.harness import (
    assert_bits,
    assert_close,
    avals,
    cases,
    each_case,
    finite,
    limit_value,
    run,
    some_of_the_cases,
    standard_run,
)

MASK = {"dense": True, "head": False}


def two_steps(tx, grads=GRADS[:2]):
    """Two updates; the state must keep its types."""
    updates, states = run(tx, grads)
    assert avals(states[-1]) == avals(tx.init(PARAMS))
    return updates, states[-1]


@each_case
def test_chains_and_names_change_nothing(case):
    tx = optax.chain(optax.identity(), optax.named_chain(("clipper", case.make()), ("scale", optax.scale(1.0))))
    updates, state = two_steps(tx)
    assert_close(updates, standard_run(case)[0][:2], rtol=2e-6)
    keys = optclip.summary(standard_run(case)[1][0])
    assert set(optclip.summary(state)) == {key.replace("/", "/clipper/", 1) for key in keys}


@some_of_the_cases(0)
def test_masks_groups_and_conditions(case):
    alone, _ = two_steps_of_dense(case)
    masked, _ = two_steps(optax.masked(case.make(), MASK))
    labels = {"dense": "clip", "head": "free"}
    parts = {"clip": case.make(), "free": optax.identity(), "nobody": case.make()}
    split, _ = two_steps(optax.partition(parts, labels))
    for got in (masked, split):
        assert_bits([u["head"] for u in got], [jax.tree.map(jnp.asarray, g["head"]) for g in GRADS[:2]])
        assert_close([u["dense"] for u in got], alone, rtol=2e-6)
    sometimes = optax.conditionally_transform(case.make(), lambda step, **extra: step >= 1)
    first, second = two_steps(sometimes, [GRADS[1], GRADS[0]])[0]
    assert_bits(jax.tree.map(np.asarray, first), GRADS[1])
    assert_close(second, standard_run(case)[0][0], rtol=2e-6)


def two_steps_of_dense(case):
    only = lambda tree: {"dense": tree["dense"]}
    updates, states = run(case.make(), map(only, GRADS[:2]), only(PARAMS))
    return [update["dense"] for update in updates], states[-1]


@some_of_the_cases(1)
def test_accumulation_and_finiteness_guards(case):
    steps = optax.MultiSteps(case.make(), 2)
    guarded = optax.apply_if_finite(case.make(), 3)

    @jax.jit
    def both(a, b, params):
        multi, once = steps.init(params), guarded.init(params)
        nothing, multi = steps.update(a, multi, params)
        mean, multi = steps.update(b, multi, params)
        good, once = guarded.update(a, once, params)
        bad, once = guarded.update(jax.tree.map(lambda x: x * jnp.nan, a), once, params)
        return nothing, mean, good, bad, multi, once

    nothing, mean, good, bad, multi, _ = both(GRADS[0], GRADS[0], PARAMS)
    want = standard_run(case)[0][0]
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(nothing))
    assert_close([mean, good], [want, want], rtol=5e-6)
    assert finite(bad)
    assert avals(optclip.summary(multi)) == avals(optclip.summary(standard_run(case)[1][0]))


@cases(limit=lambda name: name is not None, wrapper=False)
def test_hyper_parameters_can_be_injected(case):
    method = getattr(optclip, case.public)
    static = [name for name in inspect.signature(method).parameters if name != case.limit]
    value = limit_value(case)
    injected = optax.inject_hyperparams(method, static_args=static)(**{**case.kwargs, case.limit: value})
    state = injected.init(PARAMS)
    step = jax.jit(injected.update)
    update, state = step(GRADS[0], state, PARAMS)
    assert_close(update, standard_run(case)[0][0], rtol=2e-6)
    state.hyperparams[case.limit] = jnp.full((), value / 2, jnp.float32)  # not weak, as Optax keeps it
    update, after = step(GRADS[0], state, PARAMS)
    assert avals(after) == avals(state) and finite(update)


@cases(wrapper=False)
def test_what_optax_injects_without_being_told_what_is_static(case):
    method = getattr(optclip, case.public)
    mine = [name for name, value in case.kwargs.items() if name != case.limit and not isinstance(value, float)]
    names = inspect.signature(method).parameters
    shapes = [name for name in names if name in ("window", "history", "ddof")]
    mine += [name for name in names if name == "ord"]
    tx = optax.inject_hyperparams(method, static_args={*mine, *shapes})(**case.kwargs)
    update, _ = jax.jit(tx.update)(GRADS[0], tx.init(PARAMS), PARAMS)
    assert_close(update, standard_run(case)[0][0], rtol=1e-4)  # 1 - 0.999 has four digits in float32
    for name in shapes:
        with pytest.raises((TypeError, ValueError), match=f"static_args='{name}'"):
            optax.inject_hyperparams(method, static_args={*mine, *shapes} - {name})(**case.kwargs).init(PARAMS)


@each_case
def test_optax_finds_statistics_and_knows_parameters_by_their_shape(case):
    tx, state = case.make(), standard_run(case)[1][1]
    for _, clipper in recorded(state):
        if not case.wrapper:
            found = optax.tree.get(state, "ClipStats")
            assert_bits(found, clipper.stats)

    def check(x, param):
        assert np.shape(x) == np.shape(param), "shaped as its parameter"
        return jnp.asarray(x)

    same = optax.tree.map_params(tx, check, state, PARAMS)
    assert_bits(same, state)


@each_case
def test_states_hold_no_infinity_and_may_be_picked_by_arithmetic(case):
    """Such as ``cond * a + (1 - cond) * b``."""
    states = [case.make().init(PARAMS), *standard_run(case)[1]]
    for state in states:
        chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("name", ["autoclip", "clip_by_quantile", "clip_by_median", "clip_by_historical_norm"])
def test_inside_sam(name):
    """Sharpness-aware minimization: every second step is its inner optimizer's."""
    tx = getattr(optclip, name)()
    sam = optax.contrib.sam(optax.chain(tx, optax.sgd(0.1)), optax.sgd(0.05), sync_period=2, opaque_mode=False)
    state, alone = sam.init(PARAMS), tx.init(PARAMS)
    for i in range(8):
        grads = GRADS[i % len(GRADS)]
        updates, state = jax.jit(sam.update)(grads, state, PARAMS)
        if i % 2:
            _, alone = tx.update(grads, alone)
        assert finite(updates)
    assert_close(state.opt_state[0].stats.limits, alone.stats.limits, rtol=1e-6)


@each_case
def test_optax_gets_through_a_state_to_set_what_lies_behind_it(case):
    tx = optax.chain(case.make(), optax.inject_hyperparams(optax.sgd)(0.1))
    state = jax.jit(tx.update)(GRADS[0], tx.init(PARAMS), PARAMS)[1]
    after = optax.tree.set(state, learning_rate=jnp.float32(0.2))
    assert optax.tree.get(after, "learning_rate") == jnp.float32(0.2)
    chex.assert_trees_all_equal_structs(after, state)
    assert_bits(optax.tree.set(after, learning_rate=jnp.float32(0.1)), state)


@cases(wrapper=False)
def test_optax_finds_the_count_of_the_optimizer_alone(case):
    state = optax.chain(case.make(), optax.scale_by_adam()).init(PARAMS)
    assert optax.tree.get(state, "count") == 0
    after = optax.tree.set(state, count=jnp.int32(3))
    assert_bits(after[0], state[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """All states after three steps, saved and restored at once: by flax, pickle and orbax."""
    states = {case.name: jax.device_get(standard_run(case)[1][2]) for case in CASES}
    blank = {case.name: case.make().init(PARAMS) for case in CASES}
    path = tmp_path_factory.mktemp("orbax") / "states"
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, list(map(jax.device_get, states.values())))
        saver.wait_until_finished()
        orbax = dict(zip(states, saver.restore(path, list(blank.values())), strict=True))
    flaxed = {n: flax.serialization.from_bytes(blank[n], flax.serialization.to_bytes(s)) for n, s in states.items()}
    pickled = {n: pickle.loads(pickle.dumps(s)) for n, s in states.items()}
    return {"orbax": orbax, "flax": flaxed, "pickle": pickled}


@each_case
def test_a_restored_run_goes_on_bit_for_bit(case, saved):
    updates, states = standard_run(case)
    step = jax.jit(case.make().update)
    for name, restored in saved.items():
        assert_bits(jax.device_get(restored[case.name]), jax.device_get(states[2]), where=f"{name}: ")
    state = jax.tree.map(jnp.asarray, saved["orbax"][case.name])
    update, state = step(GRADS[3], state, PARAMS)
    assert_bits(update, updates[3])
    assert_bits(state, states[3])
