"""skip_spikes: outliers are skipped whole, poison nothing, and a new level is accepted."""

import re
from collections import Counter
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optclip
from optclip import clip_by_global_norm, skip_spikes
from optclip.thresholds import ema_ratio, window_zscore
from tests.meshes import devices


class Oracle:
    """Skips values beyond mean + z * std (unbiased) of the last accepted ones, in float64."""

    def __init__(self, z=6.0, window=128, least=64, patience=50):
        self.z, self.window, self.least, self.patience = z, window, least, patience
        self.seen, self.streak = [], 0

    def limit(self):
        past = np.asarray(self.seen[-self.window :], np.float64)
        return past.mean() + self.z * max(past.std(ddof=1), 1e-6) if len(past) + 1 >= self.least else np.inf

    def skips(self, value):
        if not np.isfinite(value):
            return True
        outlier = value > self.limit()
        if outlier and self.streak < self.patience:
            self.streak += 1
            return True
        if outlier:
            self.seen = []
        self.seen.append(value)
        self.streak = 0
        return False


def norms(steps=700, seed=0):
    """A healthy level with spikes, NaN and infinity, then a permanent tenfold shift."""
    rng = np.random.default_rng(seed)
    n = np.exp(rng.normal(scale=0.2, size=steps)) * np.where(np.arange(steps) < 400, 1.0, 10.0)
    n[[70, 90, 91, 200]] = 40.0
    n[[5, 95, 300]] = np.nan
    n[[96, 420]] = np.inf
    n[250] = 1e-30
    n[64] = 40.0  # the 64th finite one: 63 before it are enough
    n = np.asarray(n, np.float32)
    oracle = Oracle()
    for step, value in enumerate(n):
        if step in (110, 150, 350):
            n[step] = value = oracle.limit() * 0.9995  # just within; the population's deviation is 0.4 % smaller
        if step in (120, 160, 360):
            n[step] = value = oracle.limit() * 1.0005
        oracle.skips(value)
    return n


def follow(tx, values, **extra):
    def one(state, n):
        updates, state = tx.update(n[None], state, **{k: n for k in extra})
        return state, (updates[0], state)

    return jax.jit(lambda: jax.lax.scan(one, tx.init(jnp.zeros(1)), jnp.asarray(values)))()


@pytest.mark.parametrize("patience", [50, 3])
def test_against_numpy(patience):
    values = norms()
    tx = skip_spikes(optax.identity(), patience=patience)
    _, (updates, states) = follow(tx, values)
    oracle = Oracle(patience=patience)
    wanted = [oracle.skips(v) for v in values]
    np.testing.assert_array_equal(updates, np.where(wanted, 0, values))
    np.testing.assert_array_equal(states.total, np.cumsum(wanted))
    assert 40 < sum(wanted[400:]) < 60 if patience == 50 else sum(wanted[400:]) < 6  # the shift was accepted
    assert all(wanted[i] for i in (5, 64, 70, 90, 91, 95, 96, 200, 300, 420))


def test_a_skipped_step_is_as_if_it_had_never_been():
    inner = optax.chain(clip_by_global_norm(1.0), optax.adam(1e-2))
    values = norms()[:100].copy()
    values[[10, 70]] = np.nan
    tx = skip_spikes(inner)
    _, (updates, states) = follow(tx, values)
    skipped = np.diff(np.asarray(states.total), prepend=0) > 0
    assert skipped.sum() >= 6
    clean, (kept, _) = follow(tx, values[~skipped])
    last = jax.tree.map(lambda x: x[-1], states)
    chex.assert_trees_all_equal((last.inner_state, last.norm.rule), (clean.inner_state, clean.norm.rule))
    np.testing.assert_array_equal(np.asarray(updates)[~skipped], kept)


def test_a_nan_never_escapes():
    """Patience accepts a level, not a NaN, and steps that are not finite do not use it up."""
    tx = skip_spikes(optax.identity(), 2.0, patience=3)
    values = [1.0] + [np.nan] * 10 + [5.0, np.nan, 5.0, 5.0, np.nan, 5.0, 5.0]
    _, (updates, states) = follow(tx, values)
    assert np.asarray(updates).tolist() == [1] + [0] * 15 + [5, 0]
    assert states.consecutive.tolist() == [0, *range(1, 16), 0, 1]


@pytest.mark.parametrize("rule", [ema_ratio(2.0, feeding=optclip.thresholds.clipped), window_zscore(4.0, warmup=5)])
def test_any_rule_is_kept_clean(rule):
    tx = skip_spikes(optax.identity(), rule, patience=None)
    values = np.abs(1 + 0.1 * np.random.default_rng(0).normal(size=80)).astype(np.float32)
    values[60:] = 30.0
    _, (updates, states) = follow(tx, values)
    assert not np.any(updates[60:]) and int(states.total[-1]) == 20
    frozen = jax.tree.map(lambda x: x[59:], states.norm.rule)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), frozen)


@pytest.mark.parametrize("level", [0.0, -3.0])
def test_the_loss_counts_too(level):
    tx = skip_spikes(optax.identity(), loss_rule=window_zscore(6.0, 128, warmup=63, ddof=1, patience=None))
    losses = (level + 0.1 * np.random.default_rng(1).normal(size=120)).astype(np.float32)
    losses[[90, 100]] = level + 5, np.nan

    def one(state, loss):
        updates, state = tx.update(jnp.ones(1), state, value=loss)
        return state, updates[0]

    state, updates = jax.lax.scan(one, tx.init(jnp.zeros(1)), losses)
    assert np.flatnonzero(np.asarray(updates) == 0).tolist() == [90, 100]
    said = optclip.summary(state)
    assert {"skip/norm", "skip/limit", "skip/loss", "skip/max_loss"} <= set(said)
    assert float(said["skip/loss"]) == losses[-1] and float(said["skip/max_loss"]) > level


def test_the_loss_is_asked_for():
    tx = skip_spikes(optax.identity(), loss_rule=4.0)
    state = tx.init(jnp.zeros(1))
    with pytest.raises(ValueError, match="value=loss"):
        tx.update(jnp.ones(1), state)
    with pytest.raises(ValueError, match="scalar loss"):
        tx.update(jnp.ones(1), state, value=jnp.ones(2))


def test_summary_tells_of_the_skipped_step():
    tx = skip_spikes(clip_by_global_norm(1.0), 10.0)
    _, state = tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))
    _, state = tx.update(jnp.array([30.0]), state)
    said = {k: float(v) for k, v in optclip.summary(state).items()}
    assert said["skip/norm"] == 30 and said["skip/limit"] == 10 and said["skip/skipped"] == said["skip/total"] == 1
    assert said["clip/preclip_norm"] == 3 and "clip_1/limit" not in said


@pytest.mark.parametrize("scope", [optclip.measures.leaf_norm, optclip.measures.unit_norm])
def test_any_size_of_any_scope(scope):
    tx = skip_spikes(optax.identity(), 2.0, measure=scope)
    g = {"a": jnp.ones((2, 2)), "b": jnp.ones(1)}
    updates, state = tx.update(g, tx.init(g))
    chex.assert_trees_all_equal(updates, g)
    updates, state = tx.update({**g, "b": jnp.full(1, 3.0)}, state)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))


def passes(tx, params):
    """The reductions, loops and branches of the compiled program: what a norm is made of."""
    state = tx.init(params)
    text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    return Counter(re.findall(r" (reduce|while|conditional|dot|reduce-window|sort)\(", text))


@pytest.mark.parametrize("n", [8, 128])
def test_one_norm_for_the_guard_and_the_clipper(n):
    params = {"a": jnp.ones((n, n)), "b": jnp.ones((n, n))}
    inner = optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-3))
    alone = passes(inner, params)
    assert sum(alone.values()) >= (2 if jax.default_backend() == "cpu" else 1)
    assert passes(skip_spikes(inner, 10.0), params) == alone
    assert passes(skip_spikes(inner, 10.0, measure=partial(optclip.global_norm, ord=1)), params) != alone


@pytest.mark.parametrize("checked", [True, False])
def test_devices_decide_together(checked):
    """One shard's spike, one shard's loss: all shards skip, and the memory stays replicated."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices(2))
    measure = partial(optclip.global_norm, axis_name=None if checked else "data")
    tx = skip_spikes(optax.trace(0.9), 10.0, loss_rule=2.0, measure=measure)
    with jax.ensure_compile_time_eval():
        state = tx.init(jnp.zeros(4))
    specs = optax.tree.map_params(tx, lambda _: P("data"), state, transform_non_params=lambda _: P())
    update = jax.jit(jax.shard_map(
        lambda g, loss, s: tx.update(g, s, value=loss[0]), mesh=mesh, in_specs=(P("data"), P("data"), specs),
        out_specs=(P("data"), specs), check_vma=checked,
    ))  # fmt: skip
    updates, after = update(jnp.array([1.0, 2.0, 300.0, 4.0]), jnp.zeros(2), state)
    assert updates.tolist() == [0] * 4 and after.inner_state.trace.tolist() == [0] * 4 and int(after.total) == 1
    updates, after = update(jnp.ones(4), jnp.array([1.0, 7.0]), after)
    assert updates.tolist() == [0] * 4 and float(after.loss.stats.sizes) == 4 and int(after.total) == 2
    updates, after = update(jnp.ones(4), jnp.array([1.0, 2.0]), after)
    assert updates.tolist() == [1] * 4 and int(after.total) == 2


@pytest.mark.parametrize("kwargs", [{"patience": 0}, {"rule": -1.0}, {"rule": np.nan}, {"loss_rule": "x"}])
def test_bad_arguments_are_named(kwargs):
    with pytest.raises((ValueError, TypeError), match=rf"skip_spikes\({next(iter(kwargs))}=.*must be"):
        skip_spikes(optax.identity(), **kwargs)
