"""The contract, item 10: strict promotion and ranks, x64, NaN and leak checks, no hidden transfers."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import optclip
from tests.cases import GRADS, PARAMS
from tests.harness import assert_close, avals, each_case, halves, some_of_the_cases, standard_run, total

COMPILED = []  # an event for each program


@jax.monitoring.register_event_duration_secs_listener
def _compiled(event, *_, **__):
    if event.endswith("backend_compile_duration"):
        COMPILED.append(event)


@some_of_the_cases(0, of=6)
def test_strict_promotion_ranks_leaks_and_nan_checks_on_mixed_trees(case):
    mixed = lambda tree: {**halves(tree), "full": tree["dense"]}
    grads, params = mixed(GRADS[0]), mixed(PARAMS)
    strict = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with strict[0], strict[1], jax.checking_leaks(), jax.debug_nans(True):
        tx = case.make()
        state = tx.init(params)

        def step(grads):
            update, after = tx.update(grads, state, params)
            return total(update), (update, after)

        slope, (update, after) = jax.jit(jax.grad(step, has_aux=True))(jax.tree.map(jnp.asarray, grads))
    assert avals(update) == avals(grads)
    assert avals(slope) == avals(grads)
    assert avals(after) == avals(state)


@some_of_the_cases(0)
def test_under_x64_float32_stays_float32(case):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        tx = case.make()
        for dtype in (np.float32, np.float64):
            grads, params = ({**tree, "head": jax.tree.map(dtype, tree["head"])} for tree in (GRADS[0], PARAMS))
            state = tx.init(params)
            update, after = jax.jit(tx.update)(grads, state, params)
            assert avals(update) == avals(grads)
            assert avals(after) == avals(state)
            if dtype is np.float32:
                assert_close(update, standard_run(case)[0][0], rtol=2e-6)


def test_under_x64_arguments_are_as_exact_as_the_leaves():
    with jax.enable_x64(True):
        one = np.ones(1)
        for tx, want in (
            (optclip.clippy(0.1, 0.0), 0.1),
            (optclip.track_median(np.inf, 0.9), 0.1),
            (optclip.adaptive_grad_clip(0.1), 0.1),
            (optclip.clip_by_global_norm(0.1), 0.1),
            (optclip.clip(0.1), 0.1),
        ):
            update, _ = tx.update(one, tx.init(one), one)
            np.testing.assert_allclose(update, [want], rtol=1e-14)
        tx = optclip.mars_clip(np.inf, 0.025, 0.9)
        _, state = tx.update(one, tx.init(one))
        np.testing.assert_allclose(tx.update(2 * one, state)[0], [2 + 0.025 * 0.9 / 0.1], rtol=1e-14)


@each_case
def test_a_compiled_step_moves_nothing_between_host_and_device(case):
    tx = case.make()
    step = jax.jit(tx.update)
    grad, params = jax.device_put((GRADS[0], PARAMS))
    state = jax.device_put(tx.init(PARAMS))
    with jax.transfer_guard("disallow"):
        update, _ = step(grad, state, params)
    assert_close(update, standard_run(case)[0][0], rtol=2e-6)


@each_case
def test_a_step_outside_of_jit_compiles_once_and_forms_no_nan(case):
    """What is compiled anew by each step is never freed."""
    tx = case.make()
    state = tx.init(PARAMS)
    with jax.debug_nans(True):
        for step in range(4):
            before = len(COMPILED)
            _, state = tx.update(GRADS[step], state, PARAMS)
    assert len(COMPILED) == before


@some_of_the_cases(1)
def test_without_jit(case):
    tx = case.make()
    with jax.disable_jit():
        update, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    assert_close(update, standard_run(case)[0][0], rtol=2e-6)


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_leaf_norm", "adaptive_grad_clip"])
def test_a_compiled_step_that_has_run_can_be_stored(name):
    tx = getattr(optclip, name)(0.1)
    tree = {"kernel": jnp.ones((7, 3)), "bias": jnp.ones(3)}  # of this test alone: XLA stores no step from a cache
    state = tx.init(tree)
    step = jax.jit(tx.update).lower(tree, state, tree).compile()
    want = step(tree, state, tree)
    stored = pickle.dumps(serialize(step))
    again = deserialize_and_load(*pickle.loads(stored), execution_devices=jax.devices()[:1])
    chex.assert_trees_all_equal(again(tree, state, tree), want)
