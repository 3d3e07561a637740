"""ZClip against its paper, with the authors' warm-up, order of updates and cap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from optclip import thresholds
from tests.methods import norms


def oracle(z_max, alpha, kind, warmup, cap=np.inf, skip=False):
    buffer, state = [], {}

    def step(size):
        if len(buffer) < warmup:
            buffer.append(size)
            if len(buffer) == warmup:
                state["mean"], state["var"] = np.mean(buffer), np.var(buffer)
            return cap
        mean, std = state["mean"], np.sqrt(state["var"])
        z = (size - mean) / (std + 1e-6)
        if z > z_max:
            target = {"reciprocal": mean + z_max**2 / z * std, "to_max": mean + z_max * std, "to_mean": mean}[kind]
        else:
            target = mean + z_max * (std + 1e-6)
        if not (skip and z > z_max):
            value = min(size, target)
            state["mean"] = alpha * mean + (1 - alpha) * value
            state["var"] = alpha * state["var"] + (1 - alpha) * (value - state["mean"]) ** 2
        return min(target, cap)

    return step


@pytest.mark.parametrize(
    "z, alpha, kind, warmup, cap",
    [
        (2.5, 0.97, "reciprocal", 25, np.inf),
        (2.5, 0.97, "reciprocal", 25, 1.0),
        (2.0, 0.9, "to_max", 10, np.inf),
        (3.0, 0.99, "to_mean", 1, np.inf),
    ],
)
def test_every_step(z, alpha, kind, warmup, cap):
    tx = optclip.zclip(z, alpha, target=getattr(thresholds, kind), warmup=warmup, max_norm=cap, patience=None)
    norms.check(tx, oracle(z, alpha, kind, warmup, cap), norms.eventful(), rtol=5e-5)


def test_every_step_without_feeding_spikes():
    tx = optclip.zclip(feeding=thresholds.accepted, patience=None)
    norms.check(tx, oracle(2.5, 0.97, "reciprocal", 25, skip=True), norms.eventful(), rtol=5e-5)


def test_the_mend_leaves_a_healthy_run_alone():
    norms.check_healthy(optclip.zclip)
    norms.check_healthy(optclip.zclip, max_norm=1.0)


@pytest.mark.parametrize("level", [10.0, 1e4])
def test_the_paper_locks_out_a_higher_level_and_the_mend_accepts_it(level):
    before = norms.healthy(300)
    assert norms.first_pass(optclip.zclip(patience=None), before, level, 3000) == 3000
    assert norms.first_pass(optclip.zclip(), before, level, 3000) < 50
    assert norms.first_pass(optclip.zclip(patience=10), before, level, 3000) < 10


def test_raw_sizes_and_clipping_to_the_maximum_do_not_lock_out():
    before = norms.healthy(300)
    for how in ({"feeding": thresholds.raw}, {"feeding": thresholds.winsorized(3.0)}, {"target": thresholds.to_max}):
        assert norms.first_pass(optclip.zclip(**how, patience=None), before, 10.0, 400) < 200


def test_at_leaf_scope_each_leaf_has_its_own_averages():
    tx = optclip.zclip(measure=optclip.measures.leaf_norm, warmup=5, patience=None)
    sizes = np.exp(np.random.default_rng(0).normal(scale=0.3, size=(60, 2))) * [1.0, 100.0]
    sizes[30, 0] *= 20
    oracles = [oracle(2.5, 0.97, "reciprocal", 5) for _ in range(2)]
    state = tx.init({"a": jnp.zeros(3), "b": jnp.zeros(())})
    update = jax.jit(tx.update)
    for a, b in sizes.astype(np.float32):
        updates, state = update({"a": jnp.asarray([0, a, 0]), "b": jnp.asarray(b)}, state)
        assert float(updates["a"][1]) == pytest.approx(min(a, oracles[0](float(a))), rel=1e-5)
        assert float(updates["b"]) == pytest.approx(min(b, oracles[1](float(b))), rel=1e-5)
