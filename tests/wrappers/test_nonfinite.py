"""skip_nonfinite: a bad step is as if it had never been; and nothing but bad steps is skipped."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import optclip
from optclip import clip_by_ema, clip_by_global_norm, skip_nonfinite
from tests.meshes import devices

PARAMS = {"a": jnp.linspace(-1, 1, 6).reshape(2, 3), "h": jnp.ones(3, jnp.float16), "b": jnp.ones(2, jnp.bfloat16),
          "n": jnp.arange(2), "none": None}  # fmt: skip
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


def grads(step: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(step)
    number = lambda p: rng.normal(size=p.shape) * (scale if p.dtype != jnp.int32 else 0)
    return jax.tree.map(lambda p: jnp.asarray(number(p), p.dtype), PARAMS)


def guarded(**kwargs):
    return skip_nonfinite(optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-2)), **kwargs)


@functools.cache
def step(tx):
    def one(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), updates

    return jax.jit(one)


TX = guarded()


def run(sequence, tx=TX, params=PARAMS):
    carry = (params, tx.init(params))
    for g in sequence:
        carry, _ = step(tx)(carry, g)
    return carry


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from([None, "nan", "inf", "-inf"]), min_size=1, max_size=6),
    st.sampled_from(["a", "h", "b"]),
)
def test_a_bad_step_is_as_if_it_had_never_been(kinds, leaf):
    sequence, good = [], []
    for i, kind in enumerate(kinds):
        g = grads(i)
        if kind is None:
            good.append(g)
        else:
            g = {**g, leaf: g[leaf].at[..., 1].set(BAD[kind])}
        sequence.append(g)
    params, state = run(sequence)
    want, clean = run(good)
    chex.assert_trees_all_equal((params, state.inner_state), (want, clean.inner_state))
    assert int(state.total) == len(sequence) - len(good)
    assert int(state.consecutive) == next((i for i, k in enumerate(reversed(kinds)) if k is None), len(kinds))


def test_types_are_stable_in_scan_and_cond_under_strict_promotion():
    floats = {k: PARAMS[k] for k in "ahb"}  # optax multiplies integers by floats, which is not strict
    sequence = [{k: grads(i)[k] for k in "ahb"} for i in range(3)]
    sequence[1]["h"] = jnp.full(3, jnp.inf, jnp.float16)
    with jax.numpy_dtype_promotion("strict"):
        tx = skip_nonfinite(optax.chain(clip_by_global_norm(1.0), optax.trace(0.9), optax.scale(-1.0)))

        def one(state, g):
            state = jax.lax.cond(True, lambda s: tx.update(g, s, floats)[1], lambda s: s, state)
            updates, state = tx.update(g, state, floats)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, g)
            return state, updates

        stacked = jax.tree.map(lambda *x: jnp.stack(x), *sequence)
        state, updates = jax.jit(lambda s, g: jax.lax.scan(one, s, g))(tx.init(floats), stacked)
    assert int(state.total) == 2 and int(state.consecutive) == 0
    assert not any(np.any(np.asarray(u[1], np.float32)) for u in jax.tree.leaves(updates))


def test_the_state_keeps_its_dtype_where_the_inner_one_drifts():
    params = jnp.ones(3, jnp.bfloat16)
    inner = optax.scale_by_adam()
    g = jnp.full(3, 0.1, jnp.float32)
    assert inner.update(g, inner.init(params))[1].mu.dtype == jnp.float32  # the drift
    tx = skip_nonfinite(inner)
    state, _ = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(params), jnp.stack([g, g * jnp.nan]))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


def test_random_keys_in_the_state_are_rolled_back():
    tx = skip_nonfinite(optax.add_noise(0.1, 0.5, key=jax.random.key(3)))
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    before = tx.init(PARAMS["a"])
    _, after = jax.jit(tx.update)(jnp.full((2, 3), jnp.nan), before)
    chex.assert_trees_all_equal(*(jax.tree.map(plain, state.inner_state) for state in (before, after)))


def test_an_update_that_overflows_is_skipped():
    g = jnp.array([1e3, 1.0], jnp.float16)
    tx = skip_nonfinite(optax.scale(100.0))
    updates, state = tx.update(g, tx.init(g))
    assert updates.tolist() == [0, 0] and updates.dtype == g.dtype and int(state.total) == 1


def test_a_state_that_overflows_is_skipped():
    g = jnp.array([1e25, 1.0])
    inner = optax.scale_by_adam()
    updates, spoiled = inner.update(g, inner.init(g))
    assert np.all(np.isfinite(updates)) and not np.all(np.isfinite(spoiled.nu))  # silent, and for ever
    updates, state = skip_nonfinite(inner).update(g, skip_nonfinite(inner).init(g))
    assert updates.tolist() == [0, 0]
    chex.assert_trees_all_equal(state.inner_state, inner.init(g))


def test_infinities_that_belong_to_a_state_do_not_lock_it():
    """Limits and windows go from finite back to infinite when a rule starts afresh; a hyper-parameter may too."""
    rate = lambda count: jnp.where(count < 2, 1.0, jnp.inf)
    tx = skip_nonfinite(
        optax.chain(
            clip_by_ema(1.1, warmup=1, patience=2),
            optclip.observe(optclip.clip_by_historical_norm(1.0, window=2, warmup=1, patience=2), history=2),
            optax.inject_hyperparams(clip_by_global_norm)(max_norm=rate),
        )
    )
    sizes = jnp.array([1.0, 1.0, 50.0, 50.0, 50.0, 50.0, 50.0])
    state, _ = jax.lax.scan(lambda s, n: (tx.update(n[None], s)[1], None), tx.init(jnp.zeros(1)), sizes)
    assert int(state.total) == 0
    assert float(state.inner_state[2].hyperparams["max_norm"]) == np.inf


def test_with_a_limit_it_becomes_loud_and_stays_whole():
    g = jnp.array([1.0, jnp.nan])
    for most in (2, jnp.int32(2)):
        tx = skip_nonfinite(optax.trace(0.9), max_consecutive=most)
        _, state = tx.update(jnp.ones(2), tx.init(g))
        seen = []
        for _ in range(4):
            updates, state = tx.update(g, state)
            seen.append(np.isnan(np.asarray(updates)).all())
        assert seen == [False, False, True, True]
        assert state.inner_state.trace.tolist() == [1, 1] and int(state.total) == int(state.consecutive) == 4
        updates, state = tx.update(jnp.ones(2), state)
        np.testing.assert_allclose(updates, 1.9, rtol=1e-6)
        assert int(state.consecutive) == 0
    integers = {"n": jnp.arange(2), "x": g}
    tx = skip_nonfinite(optax.identity(), max_consecutive=0)
    updates, _ = tx.update(integers, tx.init(integers))
    assert updates["n"].tolist() == [0, 0] and np.isnan(updates["x"]).all()


def test_never_gives_up_by_default():
    g = jnp.array([1.0, jnp.nan])
    tx = skip_nonfinite(optax.trace(0.9))
    state, updates = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(g), jnp.tile(g, (1000, 1)))
    assert int(state.total) == int(state.consecutive) == 1000 and not np.any(updates)


@pytest.mark.parametrize("outside", [False, True])
def test_multi_steps(outside):
    """A bad micro-batch is left out of the accumulation, and never reaches the accumulator of Optax, which could not
    get rid of it (it resets by multiplying with zero)."""
    sgd = optax.sgd(1.0)
    if outside:
        multi = optax.MultiSteps(skip_nonfinite(sgd), 2, should_skip_update_fn=optax.skip_not_finite)
        tx = multi.gradient_transformation()
    else:
        tx = skip_nonfinite(optax.MultiSteps(sgd, 2).gradient_transformation())
    sequence = jnp.array([[1.0], [jnp.nan], [3.0], [5.0], [7.0]])
    _, updates = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(jnp.zeros(1)), sequence)
    assert updates[:, 0].tolist() == [0, 0, -2, 0, -6]


def test_multi_steps_are_handed_extra_arguments():
    """Which Optax itself drops on the way to them."""
    inner = optclip.skip_spikes(optax.sgd(1.0), loss_rule=10.0)
    for tx in (optax.MultiSteps(inner, 1), optax.MultiSteps(inner, 1).gradient_transformation()):
        for wrap in (skip_nonfinite, optclip.observe, optclip.u_clip, optclip.stable_adamw_clip, optclip.skip_spikes):
            guarded = wrap(tx)
            for loss, expected in ((1.0, -1.0), (11.0, 0.0)):
                update, _ = guarded.update(jnp.ones(1), guarded.init(jnp.ones(1)), jnp.ones(1), value=jnp.float32(loss))
                assert update.tolist() == [expected], (wrap, loss)


def test_lanes_of_vmap_decide_for_themselves():
    tx = skip_nonfinite(optax.sgd(1.0))
    g = jnp.array([[1.0, 2.0], [jnp.nan, 2.0]])
    updates, state = jax.vmap(lambda g: tx.update(g, tx.init(g)))(g)
    assert updates.tolist() == [[-1, -2], [0, 0]] and state.total.tolist() == [0, 1]


@pytest.mark.parametrize("checked", [True, False])
def test_devices_decide_together(checked):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices(2))
    tx = skip_nonfinite(optax.trace(0.9))
    g = jnp.array([1.0, 2.0, jnp.nan, 4.0])
    specs = (P("data"), optax.tree.map_params(tx, lambda _: P("data"), tx.init(g), transform_non_params=lambda _: P()))
    update = jax.shard_map(lambda g, s: tx.update(g, s), mesh=mesh, in_specs=specs, out_specs=specs, check_vma=checked)
    updates, state = jax.jit(update)(g, tx.init(g))
    assert updates.tolist() == [0] * 4 and state.inner_state.trace.tolist() == [0] * 4 and int(state.total) == 1
    alone = jax.pmap(lambda g: skip_nonfinite(optax.identity(), axis_name=()).update(
        g, skip_nonfinite(optax.identity()).init(g))[0], axis_name="i", devices=devices(2))  # fmt: skip
    assert alone(g.reshape(2, 2)).tolist() == [[1, 2], [0, 0]]


def test_extra_arguments_reach_the_inner_optimizer():
    inner = optax.GradientTransformationExtraArgs(lambda p: (), lambda u, s, p=None, *, value, **e: (u * value, s))
    tx = skip_nonfinite(inner)
    assert float(tx.update(jnp.ones(()), tx.init(0.0), value=3.0, other=1)[0]) == 3


@pytest.mark.parametrize("bad", [-1, True, "3"])
def test_a_bad_limit_is_named(bad):
    with pytest.raises((ValueError, TypeError), match=r"skip_nonfinite\(max_consecutive=.*must be >= 0"):
        skip_nonfinite(optax.identity(), max_consecutive=bad)


def test_summary_reports_the_guard():
    tx = guarded()
    update = jax.jit(tx.update)
    _, state = update(grads(0), tx.init(PARAMS), PARAMS)
    said = optclip.summary(state)
    assert {k: float(said[k]) for k in ("skip/skipped", "skip/consecutive", "skip/total")} == {
        "skip/skipped": 0, "skip/consecutive": 0, "skip/total": 0}  # fmt: skip
    _, state = update({**grads(1), "a": jnp.full((2, 3), jnp.nan)}, state, PARAMS)
    again = optclip.summary(state)
    assert (float(again["skip/skipped"]), int(again["skip/consecutive"]), int(again["skip/total"])) == (1, 1, 1)
    assert float(again["clip/preclip_norm"]) == float(said["clip/preclip_norm"])  # of the last good step
    later = optclip.summary(update(grads(2), state, PARAMS)[1])
    assert (float(later["skip/skipped"]), int(later["skip/consecutive"]), int(later["skip/total"])) == (0, 0, 1)


def test_never_giving_up_can_be_said():
    tx = skip_nonfinite(optax.identity(), max_consecutive=np.inf)
    assert np.all(np.isfinite(tx.update(jnp.full(2, jnp.nan), tx.init(jnp.ones(2)))[0]))


@pytest.mark.parametrize("guard", [optclip.skip_nonfinite, optclip.skip_spikes])
def test_random_keys_among_the_updates_pass(guard):
    tx = guard(optax.identity())
    for value in (1.0, jnp.nan):
        updates = {"w": jnp.full(2, value), "key": jax.random.key(0)}
        out, _ = tx.update(updates, tx.init(updates))
        assert jnp.array_equal(jax.random.key_data(out["key"]), jax.random.key_data(updates["key"]))
        np.testing.assert_array_equal(out["w"], np.zeros(2) if np.isnan(value) else np.ones(2))
