"""bitsandbytes' percentile clipping: a ring of a hundred squared norms per leaf, filled by the first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from tests.methods import norms


def oracle(index, window=100):
    ring = np.zeros(window)
    state = {"step": 0}

    def step(size):
        state["step"] += 1
        if state["step"] == 1:
            ring[:] = size**2
        else:
            ring[state["step"] % window] = size**2
        return np.sqrt(np.sort(ring)[index])

    return step


@pytest.mark.parametrize("index, window", [(5, 100), (50, 100), (0, 8), (7, 9)])
def test_every_step(index, window):
    tx = optclip.percentile_clipping(index, window, patience=None)
    norms.check(tx, oracle(index, window), norms.eventful())


def test_each_leaf_has_its_own_window():
    tx = optclip.percentile_clipping(1, 4)
    sizes = np.abs(np.random.default_rng(0).normal(size=(20, 2))) + [0.1, 10.0]
    oracles = oracle(1, 4), oracle(1, 4)
    state = tx.init({"a": jnp.zeros(3), "b": jnp.zeros(())})
    update = jax.jit(tx.update)
    for a, b in sizes.astype(np.float32):
        updates, state = update({"a": jnp.asarray([0, a, 0]), "b": jnp.asarray(b)}, state)
        assert float(updates["a"][1]) == pytest.approx(min(a, oracles[0](float(a))), rel=1e-6)
        assert float(updates["b"]) == pytest.approx(min(b, oracles[1](float(b))), rel=1e-6)


def test_the_mend_leaves_a_healthy_run_alone():
    norms.check_healthy(optclip.percentile_clipping)


def test_a_higher_level_is_accepted_and_idle_steps_are_forgiven():
    assert norms.first_pass(optclip.percentile_clipping(5), norms.healthy(150), 10.0, 200) == 94
    idle = np.concatenate([norms.healthy(20), np.zeros(150)])
    assert norms.first_pass(optclip.percentile_clipping(5), idle, 1.0, 200) <= 20
    assert norms.first_pass(optclip.percentile_clipping(5, patience=None), idle, 1.0, 200) == 94
