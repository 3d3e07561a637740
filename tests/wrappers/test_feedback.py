"""u_clip, clip21 and track_median against NumPy in float64, and what they promise beyond the papers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optclip
from optclip import clip as clip_values
from optclip import clip21, clip_by_global_norm, clip_by_leaf_norm, measures, track_median, u_clip

CLIPPERS = {
    "norm": (clip_by_global_norm, lambda x, c: x * min(1.0, c / max(np.linalg.norm(x), 1e-300))),
    "value": (clip_values, lambda x, c: np.clip(x, -c, c)),
}


def stream(steps=320, width=6, seed=0, scale=1.0):
    """Noise with heavy tails around a mean that turns round."""
    rng = np.random.default_rng(seed)
    mean = np.where(np.arange(steps)[:, None] < 200, 0.5, -0.5)
    return np.asarray(scale * (mean + rng.standard_t(2.0, size=(steps, width))), np.float32)


def tree(x):
    return {"a": x[..., :2], "b": x[..., 2:].reshape(*x.shape[:-1], 2, 2)}


def flat(tree_):
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(tree_)], axis=1)


def follow(tx, values):
    """Updates and buffers of every step."""

    def one(state, g):
        updates, state = tx.update(tree(g), state)
        return state, (updates, state.buffer)

    state = tx.init(tree(values[0]))
    after, seen = jax.jit(lambda v: jax.lax.scan(one, state, v))(jnp.asarray(values))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    return tuple(map(flat, seen))


@pytest.mark.parametrize("bound", [np.inf, 100.0, 3.0])
@pytest.mark.parametrize("kind", CLIPPERS)
def test_u_clip_against_numpy(kind, bound):
    make, clip = CLIPPERS[kind]
    limit = 4.0 if kind == "norm" else 1.5
    values = stream()
    updates, buffers = follow(u_clip(make(limit), bound), values)
    owed = np.zeros(6)
    bounded = 0
    for g, update, buffer in zip(values.astype(np.float64), updates, buffers, strict=True):
        want = clip(g + owed, limit)
        owed = g + owed - want
        if np.linalg.norm(owed) > bound * np.linalg.norm(want):
            owed, bounded = owed * bound * np.linalg.norm(want) / np.linalg.norm(owed), bounded + 1
        np.testing.assert_allclose(update, want, atol=2e-4)
        np.testing.assert_allclose(buffer, owed, atol=2e-4)
    assert (bounded > 0) == (bound == 3.0)  # the papers' trajectory on a healthy sequence by default


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e5m2])
def test_u_clip_owes_against_what_is_emitted(dtype):
    """A cast that the compiler may undo stands behind a barrier: what is emitted is what is subtracted."""
    tx = u_clip(clip_by_global_norm(1.0))
    g = jnp.ones(5, dtype)
    traced = jax.jit(tx.update).trace(g, tx.init(g)).jaxpr
    barriers = [e.outvars[0] for e in traced.eqns if e.primitive.name == "optimization_barrier"]
    (emitted,) = (v for v in barriers if v.aval.dtype == dtype)
    assert traced.jaxpr.outvars[0] is emitted


def test_u_clip_pays_all_it_owes():
    """The sum of the updates and the buffer is the sum of the gradients, rounding to bfloat16 included."""
    values = stream(300)
    g = tree(jnp.asarray(values, jnp.bfloat16))
    tx = u_clip(clip_by_global_norm(4.0))
    one = lambda s, g: tx.update(g, s)[::-1]
    state, updates = jax.jit(lambda g: jax.lax.scan(one, tx.init(jax.tree.map(lambda x: x[0], g)), g))(g)
    assert updates["a"].dtype == jnp.bfloat16 and state.buffer["a"].dtype == jnp.float32
    for leaf in "ab":
        paid = np.asarray(updates[leaf], np.float64).sum(0) + np.asarray(state.buffer[leaf], np.float64)
        np.testing.assert_allclose(paid, np.asarray(g[leaf], np.float64).sum(0), atol=1e-3)


def test_u_clip_is_bounded_where_the_clip_is_always_active():
    values = np.full((400, 6), 10.0, np.float32)
    for bound in (5.0, jnp.float32(5.0)):
        _, buffers = follow(u_clip(clip_by_global_norm(1.0), bound), values)
        assert np.linalg.norm(buffers, axis=1).max() <= 5.0001
    _, buffers = follow(u_clip(clip_by_global_norm(1.0), np.inf), values)
    assert np.linalg.norm(buffers[-1]) > 9000


def test_u_clip_around_a_clipper_that_drops_does_not_drop_for_ever():
    tx = u_clip(optclip.clip_by(optclip.global_norm, 5.0, optclip.responses.zero))
    values = np.full((4, 6), 1.0, np.float32)
    values[1] = 100.0
    updates, _ = follow(tx, values)
    assert updates[:, 0].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("decay", [0.0, 0.9, jnp.float32(0.9)])
@pytest.mark.parametrize("kind", CLIPPERS)
def test_track_median_and_clip21_against_numpy(kind, decay):
    make, clip = CLIPPERS[kind]
    values = stream()
    measure = {"norm": measures.global_norm, "value": measures.magnitude}[kind]
    updates, buffers = follow(track_median(0.5, decay, measure=measure), values)
    m, wanted = np.zeros(6), []
    for g in values.astype(np.float64):
        m = m + (1 - float(decay)) * clip(g - m, 0.5)
        wanted.append(m)
    np.testing.assert_allclose(updates, wanted, atol=1e-4)
    np.testing.assert_array_equal(buffers, updates)
    if isinstance(decay, float) and not decay:
        other, _ = follow(clip21(make(0.5)), values)
        np.testing.assert_array_equal(other, updates)


def test_the_median_is_tracked_where_the_mean_is_lost():
    """Contaminated noise, one in ten beyond 100: the tracker is near the median, momentum is not."""
    rng = np.random.default_rng(3)
    values = 1.0 + 0.3 * rng.normal(size=(600, 6))
    values = np.where(rng.random((600, 1)) < 0.1, 100.0 + values, values).astype(np.float32)
    ours, _ = follow(track_median(0.05, measure=measures.magnitude), values)
    momentum = optax.ema(0.95)
    _, theirs = jax.lax.scan(lambda s, g: momentum.update(g, s)[::-1], momentum.init(values[0]), values)
    assert np.abs(ours[200:] - 1).max() < 0.6 and np.abs(np.asarray(theirs)[200:] - 1).mean() > 5


@functools.cache
def loose(wrap):
    tx = wrap(clip_by_global_norm(1e9))
    return jax.jit(lambda v: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(v[0]), v)[1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=6, max_size=6), st.sampled_from([u_clip, clip21]))
def test_where_the_clip_is_not_active_nothing_changes(values, wrap):
    values = np.asarray(values, np.float32)
    np.testing.assert_array_equal(loose(wrap)(values), values)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("make", [clip_by_global_norm, clip_by_leaf_norm])
@pytest.mark.parametrize("wrap", [u_clip, clip21])
def test_what_is_not_finite_is_loud_and_not_remembered(wrap, make, bad):
    tx = wrap(make(1.0))
    g = {"a": jnp.array([3.0, 4.0]), "b": jnp.ones((2, 2))}
    _, before = tx.update(g, tx.init(g))
    updates, after = tx.update({**g, "a": jnp.array([bad, 1.0])}, before)
    assert np.isnan(updates["a"]).all()
    np.testing.assert_array_equal(after.buffer["a"], before.buffer["a"])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after.buffer))
    if make is clip_by_global_norm:
        chex.assert_trees_all_equal(after.buffer, before.buffer)
    else:
        assert np.all(np.isfinite(updates["b"])) and not np.array_equal(after.buffer["b"], before.buffer["b"])


@pytest.mark.parametrize("wrap", [u_clip, clip21])
def test_leaves_without_a_gradient_pass(wrap):
    g = {"x": jnp.array([3.0], jnp.float16), "n": jnp.arange(3), "f": np.zeros(2, jax.dtypes.float0), "none": None,
         "c": jnp.array([3 + 4j])}  # fmt: skip
    tx = wrap(clip_by_global_norm(1.0))
    updates, state = tx.update(g, tx.init(g))
    assert updates["n"].tolist() == [0, 1, 2] and updates["f"] is g["f"]
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(g))
    assert float(optclip.global_norm(updates)) == pytest.approx(1, abs=1e-3)


def test_the_clipper_inside_is_seen():
    for tx in (u_clip(clip_by_global_norm(1.0)), clip21(clip_by_global_norm(1.0)), track_median(1.0)):
        _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
        assert float(optclip.summary(state)["clip/preclip_norm"]) == 5


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: u_clip(optax.identity(), 0.0), r"u_clip\(max_carry=0.0\): max_carry must be > 0"),
        (lambda: track_median(-1.0), r"track_median\(limit=-1.0\): limit must be > 0"),
        (lambda: track_median(1.0, 1.0), r"track_median\(decay=1.0\): decay must be in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(make, text):
    with pytest.raises(ValueError, match=text):
        make()
