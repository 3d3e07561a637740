"""Clippers turned off, on or replaced, and guards resumed, from checkpoints of Orbax and of Flax."""

import pickle
from collections import OrderedDict

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from optclip import clip_by_ema, clip_by_global_norm, clip_by_leaf_norm, skip_nonfinite, skip_spikes, u_clip

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}
GRADS = [jax.tree.map(lambda p, i=i: jnp.cos(p * (i + 2)) * (1.0 if i != 4 else jnp.nan), PARAMS) for i in range(8)]


def through_orbax(state, like, tmp_path):
    """Saved as it is, restored into the structure of ``like``."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, like))


def through_flax(state, like, tmp_path):
    del tmp_path
    if isinstance(state, OrderedDict):  # of named_chain, which Flax does not know
        got = flax.serialization.from_bytes(dict(like), flax.serialization.to_bytes(dict(state)))
        return OrderedDict((name, got[name]) for name in like)
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))


def through_pickle(state, like, tmp_path):
    del like, tmp_path
    return pickle.loads(pickle.dumps(jax.device_get(state)))


both = pytest.mark.parametrize("through", [through_orbax, through_flax])


def run(tx, grads, params=PARAMS, state=None):
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def chain(clip):
    return optax.named_chain(("clip", clip), ("adam", optax.adamw(1e-2)))


@both
def test_a_clipper_is_turned_off_and_on_with_the_same_state(through, tmp_path):
    on, off = chain(clip_by_global_norm(0.5)), chain(clip_by_global_norm(jnp.inf))
    params, state = run(on, GRADS[:3])
    restored = through(state, off.init(PARAMS), tmp_path)
    chex.assert_trees_all_equal(restored, state)
    got, after = run(off, GRADS[5:], params, restored)
    want, _ = run(optax.adamw(1e-2), GRADS[5:], params, state["adam"])
    chex.assert_trees_all_equal(got, want)
    assert float(after["clip"].stats.sizes) > 0.5 and float(after["clip"].stats.limits) == np.inf  # it still measures
    back = through(after, on.init(PARAMS), tmp_path / "back")
    chex.assert_trees_all_equal(back, after)


def test_within_a_run_the_limit_comes_from_outside():
    tx = chain(optax.inject_hyperparams(clip_by_global_norm)(max_norm=0.5))
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(PARAMS)
    sizes = {}
    for limit in (0.5, jnp.inf, 0.25):
        state["clip"].hyperparams["max_norm"] = jnp.float32(limit)
        _, state = update(GRADS[0], state, PARAMS)
        sizes[limit] = float(state["clip"].inner_state.stats.limits)
    assert sizes == {0.5: 0.5, jnp.inf: np.inf, 0.25: 0.25}

    traced = jax.jit(chex.assert_max_traces(lambda limit: run(chain(clip_by_global_norm(limit)), GRADS[:2])[1], n=1))
    for limit in (0.5, jnp.inf):
        assert float(traced(limit)["clip"].stats.limits) == limit


@both
@pytest.mark.parametrize("new_clip", [clip_by_ema(2.0), clip_by_leaf_norm(0.3), u_clip(clip_by_global_norm(0.5))])
def test_a_clipper_is_replaced(through, new_clip, tmp_path):
    """Restore with the old transformation, keep all parts but the new one."""
    old, new = chain(clip_by_global_norm(0.5)), chain(new_clip)
    params, saved = run(old, GRADS[:3])
    restored = through(saved, old.init(PARAMS), tmp_path)
    state = new.init(params)
    state["adam"] = restored["adam"]
    _, after = run(new, GRADS[5:], params, state)
    assert int(after["adam"][0].count) == 6
    chex.assert_trees_all_equal(state["adam"], saved["adam"])


@both
def test_a_clipper_is_put_in_front_and_a_guard_around(through, tmp_path):
    old = optax.chain(optax.scale_by_adam(), optax.scale(-1e-2))
    new = skip_nonfinite(optax.chain(clip_by_global_norm(0.5), optax.scale_by_adam(), optax.scale(-1e-2)))
    params, saved = run(old, GRADS[:3])
    restored = through(saved, old.init(PARAMS), tmp_path)
    fresh = new.init(params)
    state = fresh._replace(inner_state=(fresh.inner_state[0], *restored))
    chex.assert_trees_all_equal_structs(state, fresh)
    params, state = run(new, GRADS[3:], params, state)
    assert int(state.total) == 1 and int(state.inner_state[1].count) == 7
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("through", [through_orbax, through_flax, through_pickle])
def test_guards_and_feedback_resume_bit_for_bit(through, tmp_path):
    clip = u_clip(clip_by_global_norm(0.5))
    tx = skip_nonfinite(skip_spikes(optax.chain(clip, optax.adamw(1e-2)), 10.0))
    want = run(tx, GRADS)
    params, state = run(tx, GRADS[:5])
    assert int(state.total) == 1 and int(state.consecutive) == 1
    params, state = (through(x, y, tmp_path / n) for n, x, y in (("p", params, PARAMS), ("s", state, tx.init(PARAMS))))
    chex.assert_trees_all_equal(run(tx, GRADS[5:], params, state), want)
