"""The observer against NumPy float64 over a nasty run, its cost against a bare norm, and the advice it gives."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optclip
from optclip import sketch
from optclip.measures import global_norm, group_norm, leaf_norm

STEPS = 400
NONE = np.finfo(np.float32).max  # no limit, as states keep it
SHAPES = {"dense": {"bias": (3,), "kernel": (2, 3)}, "head": (4,)}
EVIL = {10: np.nan, 11: np.inf, 12: 0.0, 13: 1e30, 14: 1e-30, 15: 3e19, 16: 2e-22, 200: np.nan, 201: -np.inf}
WIDTH = 2 ** (1 / 8)  # of a bin


def nasty(seed: int = 0, steps: int = STEPS, evil: dict[int, float] = EVIL):
    """A run of float32 gradients, heavy in the tail, with NaN, infinity, zero, huge and tiny steps."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=steps))
    for step, value in evil.items():
        scale[step % steps] = value
    with np.errstate(invalid="ignore"):
        draw = lambda shape: (rng.normal(size=(*shape, steps)) * scale).T.astype(np.float32)
        return jax.tree.map(lambda shape: draw(shape[::-1]), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def watch(tx, grads):
    """The last state, and every update, of one compiled scan."""
    state = tx.init(jax.tree.map(lambda x: x[0], grads))
    step = lambda state, grad: tx.update(grad, state)[::-1]
    return jax.jit(lambda state, grads: jax.lax.scan(step, state, grads))(state, grads)


def true_norms(grads):
    """float64 norms: of all, (T,), and of each leaf, (T, n)."""
    with np.errstate(invalid="ignore", over="ignore"):
        flat = [np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(grads)]
        parts = np.stack([np.sqrt(np.square(x).sum(1)) for x in flat], 1)
        return np.sqrt(np.square(parts).sum(1)), parts


@pytest.fixture(scope="module")
def seen():
    grads = nasty()
    state, updates = watch(optclip.observe(history=50), grads)
    return grads, state, updates


def test_changes_nothing(seen):
    grads, _, updates = seen
    jax.tree.map(np.testing.assert_array_equal, updates, jax.tree.map(np.asarray, grads))


@pytest.mark.parametrize("q", [0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_against_numpy(seen, q):
    grads, state, _ = seen
    norms, parts = true_norms(grads)
    inside = lambda x: np.clip(x[np.isfinite(x)], 2.0**-40, 2.0**40) if 0 < q < 1 else x[np.isfinite(x)]
    want = np.quantile(inside(norms), q, method="inverted_cdf")
    rel = 1e-6 if q in (0, 1) else WIDTH - 1
    assert max(float(sketch.quantile(state.norm, q)), 2.0**-40 * (0 < q < 1)) == pytest.approx(want, rel=rel)
    got = np.maximum(sketch.quantile(state.parts, q), 2.0**-40 * (0 < q < 1))
    want = [np.quantile(inside(parts[:, i]), q, method="inverted_cdf") for i in range(parts.shape[1])]
    np.testing.assert_allclose(np.log2(np.maximum(got, 1e-38)), np.log2(np.maximum(want, 1e-38)), atol=1.0001)


def test_histogram_extremes_and_counts_against_numpy(seen):
    grads, state, _ = seen
    norms, parts = true_norms(grads)
    finite = norms[np.isfinite(norms)]
    edges = sketch.edges(state.norm)
    want, _ = np.histogram(np.clip(finite, edges[0], edges[-1] * 0.999), edges)
    off = np.asarray(state.norm.counts) - want  # a float32 norm may round over an edge, into the neighbouring bin
    assert np.abs(off).sum() <= 4 and np.abs(np.cumsum(off)).max() <= 1
    assert int(state.norm.nonfinite) == 4 and np.asarray(state.parts.nonfinite).tolist() == [4, 4, 4]
    assert int(state.norm.counts.sum()) == STEPS - 4
    assert float(state.norm.low) == 0 and float(state.norm.high) == pytest.approx(finite.max(), rel=1e-6)
    np.testing.assert_allclose(state.parts.high, np.where(np.isfinite(parts), parts, 0).max(0), rtol=1e-6)


def test_shares_against_numpy(seen):
    grads, state, _ = seen
    norms, parts = true_norms(grads)
    kept = np.isfinite(norms)
    shares = np.square(parts[kept] / np.where(norms[kept] > 0, norms[kept], 1)[:, None])
    np.testing.assert_allclose(state.share, shares.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.peak, shares[np.argmax(norms[kept])], rtol=1e-5)


def test_course_against_numpy(seen):
    grads, state, _ = seen
    norms, _ = true_norms(grads)
    stride = int(state.course.stride)
    assert stride == 16 and int(state.course.step) == STEPS
    for i in range(STEPS // stride):
        part = norms[i * stride : (i + 1) * stride]
        logs = np.log2(part[np.isfinite(part) & (part > 0)])
        assert int(state.course.entered[i]) == len(logs)
        assert float(state.course.level[i]) == pytest.approx(logs.mean(), abs=1e-4)


@pytest.mark.parametrize("limit", [0.3, 1.0, 2.0, 5.0, 20.0, 1e31])
def test_fraction_above_against_numpy(seen, limit):
    grads, state, _ = seen
    norms, _ = true_norms(grads)
    finite = norms[np.isfinite(norms)]
    got = float(sketch.fraction_above(state.norm, limit))
    assert np.mean(finite > limit * WIDTH) <= got + 1e-9 and got <= np.mean(finite > limit / WIDTH) + 1e-9


def test_history_is_the_last_steps_in_order(seen):
    grads, state, _ = seen
    norms, parts = true_norms(grads)
    order = np.arange(STEPS - 50, STEPS)
    np.testing.assert_allclose(state.recent.norm[order % 50], norms[order], rtol=1e-5)
    np.testing.assert_allclose(state.recent.parts[order % 50], parts[order], rtol=1e-5)
    assert (np.asarray(state.recent.limit) == NONE).all() and not state.recent.clipped.any()


def test_watches_a_clipper_inside():
    grads = nasty(evil={})
    tx = optclip.observe(optclip.clip_by_global_norm(2.0), history=STEPS)
    state, updates = watch(tx, grads)
    _, plain = watch(optclip.clip_by_global_norm(2.0), grads)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), updates, plain)
    norms, _ = true_norms(grads)
    np.testing.assert_array_equal(state.recent.clipped, norms > 2.0)
    np.testing.assert_array_equal(state.recent.limit, np.full(STEPS, 2.0))
    assert float(optclip.summary(state)["clip/limit"]) == 2.0
    state, _ = watch(optclip.observe(optclip.clip_by_leaf_norm(1.0), history=STEPS), grads)
    np.testing.assert_array_equal(state.recent.clipped, (true_norms(grads)[1] > 1.0).any(1))
    assert (np.asarray(state.recent.limit) == NONE).all()  # three limits are not one


@pytest.mark.parametrize(
    ("measure", "names"),
    [
        (global_norm, ["all"]),
        (partial(group_norm, groups={"dense": "a", "head": "b"}), ["dense", "head"]),
        (leaf_norm, ["dense/bias", "dense/kernel", "head"]),
        (partial(leaf_norm, stack_axis={"dense": {"bias": None, "kernel": 0}, "head": None}),
         ["dense/bias", "dense/kernel/0", "dense/kernel/1", "head"]),
    ],
)  # fmt: skip
def test_any_scope_has_the_same_norm_and_names(seen, measure, names):
    grads, state, _ = seen
    other, _ = watch(optclip.observe(measure=measure), grads)
    np.testing.assert_array_equal(other.norm.nonfinite, state.norm.nonfinite)
    np.testing.assert_allclose(other.norm.high, state.norm.high, rtol=1e-6)
    assert np.abs(np.cumsum(other.norm.counts - state.norm.counts)).max() <= 1
    assert [p.name for p in sorted(optclip.advise(other).parts)] == sorted(names)


def test_merge_is_the_run_of_both():
    a, b = nasty(1), nasty(2, steps=100)
    both = jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b)
    tx = optclip.observe()
    merged = jax.jit(optclip.merge)(watch(tx, a)[0], watch(tx, b)[0])
    want = watch(tx, both)[0]
    exact = lambda state: (state.norm, state.parts, state.peak)
    jax.tree.map(np.testing.assert_array_equal, exact(merged), exact(want))
    np.testing.assert_allclose(merged.share, want.share, rtol=1e-5)
    assert int(merged.course.entered.sum()) == int(want.course.entered.sum())
    total = lambda c: float((c.level * c.entered).sum())
    assert total(merged.course) == pytest.approx(total(want.course), rel=1e-4)
    again, _ = jax.jit(tx.update)(jax.tree.map(lambda x: x[0], a), merged)[::-1]  # it goes on
    assert int(again.norm.counts.sum()) == int(merged.norm.counts.sum()) + 1
    with pytest.raises(ValueError, match="one measure"):
        optclip.merge(merged, watch(optclip.observe(measure=global_norm), a)[0])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(width=32).map(abs), min_size=1, max_size=8))
def test_nothing_but_its_count_knows_what_is_not_finite(norms):
    add = _add
    clean = dirty = sketch.empty()
    for x in norms:
        dirty = add(dirty, np.float32(x))
        clean = add(clean, np.float32(x)) if np.isfinite(x) else clean
    assert int(dirty.nonfinite) == sum(not np.isfinite(x) for x in norms)
    jax.tree.map(np.testing.assert_array_equal, dirty._replace(nonfinite=0), clean._replace(nonfinite=0))


_add = jax.jit(sketch.add)


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def bytes_accessed(f, *args):
    return compiled(f, *args).cost_analysis()["bytes accessed"]


LARGE = {f"layer_{i}": jax.ShapeDtypeStruct((512, 512), jnp.float32) for i in range(6)}


@pytest.mark.parametrize("measure", [global_norm, leaf_norm])
@pytest.mark.parametrize("history", [0, 1000])
def test_costs_at_most_five_percent_over_the_bare_norm(measure, history):
    tx = optclip.observe(measure=measure, history=history)
    state = jax.eval_shape(tx.init, LARGE)
    bare = bytes_accessed(measure, LARGE)
    assert bytes_accessed(lambda g, s: tx.update(g, s)[1], LARGE, state) <= 1.05 * bare
    assert bare <= 1.1 * bytes_accessed(global_norm, LARGE)


def test_shares_its_pass_over_the_gradient_with_a_clipper():
    """In the entry computation (outside the rare branches) no further kernel reads a leaf."""

    def readers(tx):
        text = compiled(tx.update, LARGE, jax.eval_shape(tx.init, LARGE)).as_text()
        entry = text[text.index("ENTRY") :]
        return sum("fusion(" in line and "%updates__layer_3" in line for line in entry.splitlines())

    clipper = optclip.clip_by_leaf_norm(1.0)
    assert readers(optax.chain(optclip.observe(), clipper)) == readers(clipper) > 0


def test_size_is_as_stated():
    size = lambda tx: sum(x.nbytes for x in jax.tree.leaves(tx.init(jax.tree.map(np.zeros, SHAPES, is_leaf=_is_shape))))
    assert size(optclip.observe()) <= 3000 + 340 * 3
    assert size(optclip.observe(history=10)) - size(optclip.observe()) == 10 * (4 * (3 + 2) + 1)


def _is_shape(x):
    return isinstance(x, tuple)


def test_found_wherever_it_is_nested():
    params = jax.tree.map(lambda s: jnp.ones(s), SHAPES, is_leaf=_is_shape)
    inner = optax.chain(optclip.observe(), optax.adam(1e-3))
    for tx in (
        optclip.observe(),
        optax.named_chain(("watch", optclip.observe()), ("adam", optax.adam(1e-3))),
        optax.MultiSteps(inner, 2).gradient_transformation(),
        optclip.skip_nonfinite(inner),
        optax.masked(optclip.observe(), {"dense": True, "head": False}),
    ):
        state = tx.init(params)
        for _ in range(4):
            _, state = jax.jit(tx.update)(params, state, params)
        advice = optclip.advise(state)
        assert advice.steps == 4 - 2 * isinstance(state, optax.MultiStepsState)
        assert {"dense/bias", "dense/kernel"} <= {p.name for p in advice.parts}
    with pytest.raises(ValueError, match="observe"):
        optclip.advise(optax.adam(1e-3).init(params))


def test_an_inner_state_may_hold_a_random_key():
    noise = optclip.per_example.add_gaussian_noise(1.0, 1.0, 8, key=0)
    tx, grads = optclip.observe(noise), {"w": jnp.ones(4)}
    update, state = tx.update(grads, tx.init(grads))
    chex.assert_trees_all_close(update, noise.update(grads, noise.init(grads))[0], rtol=1e-6)
    assert not jnp.array_equal(jax.random.key_data(state.inner.key), jax.random.key_data(noise.init(grads).key))


def test_goes_on_from_a_state_of_numpy_arrays():
    params = {"w": jnp.ones(3)}
    tx = optclip.observe(history=2)
    state = tx.init(params)
    _, on_device = tx.update(params, state)
    _, from_host = tx.update(params, jax.device_get(state))
    chex.assert_trees_all_equal(from_host, on_device)


def test_history_must_be_a_count():
    with pytest.raises(ValueError, match=r"observe\(history=-1\): history must be an integer >= 0"):
        optclip.observe(history=-1)


def run_of(norms, parts=6, lead=None):
    """The state after a run whose norms are given; ``lead`` is the share of the first leaf."""
    norms = np.asarray(norms, np.float32)
    shares = (
        np.full((len(norms), parts), 1 / parts)
        if lead is None
        else np.broadcast_to([lead] + [(1 - lead) / (parts - 1)] * (parts - 1), (len(norms), parts))
    )
    grads = {f"leaf_{i}": (norms * np.sqrt(shares[:, i])).astype(np.float32) for i in range(parts)}
    return watch(optclip.observe(), grads)[0]


def noise(sigma, steps=500):
    return np.exp(sigma * np.random.default_rng(0).normal(size=steps))


@pytest.mark.parametrize(
    ("state", "method", "words"),
    [
        (lambda: run_of(noise(0.2)), "optclip.clip_by_global_norm(", ["light", "near p99"]),
        (lambda: run_of(noise(0.7)), "optclip.clip_by_global_norm(", ["medium", "near p95"]),
        (lambda: run_of(noise(1.5)), "optclip.clip_by_global_norm(", ["heavy", "near p90"]),
        (lambda: run_of(noise(0.2) * np.linspace(1, 0.1, 500)), "optclip.zclip(", ["moved over the run", "quarters"]),
        (lambda: run_of(noise(1.5) * np.geomspace(1, 0.01, 500)), "optclip.autoclip(90)", ["moved", "window"]),
        (lambda: run_of(noise(0.2), lead=0.8), "optclip.adagc(", ["leaf_0 makes 80.0 %"]),
        (lambda: run_of(np.where(np.arange(500) % 100 == 50, np.nan, noise(0.2))), "optclip.skip_nonfinite(",
         ["5 steps (1.0 %)", "skip_nonfinite"]),
        (lambda: run_of(noise(0.2, 50)), "optclip.clip_by_global_norm(", ["Only 50 steps"]),
    ],
)  # fmt: skip
def test_advice_fits_the_run_and_its_code_works(state, method, words):
    advice = optclip.advise(state())
    text = str(advice)
    assert advice.suggestion.startswith(method) and f"Suggestion: {method}" in text
    assert all(word in text for word in words), text
    scope = {"optclip": optclip, "optax": optax, "optimizer": optax.sgd(0.1)}
    tx = eval(advice.suggestion, scope)
    tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}), {"w": jnp.ones(3)})


@pytest.mark.parametrize("norms", [[], [0.0] * 50, [1.0] * 5, [np.nan] * 50])
def test_no_advice_without_evidence(norms):
    advice = optclip.advise(run_of(norms) if len(norms) else optclip.observe().init({"w": jnp.ones(3)}))
    assert advice.suggestion is None and advice.threshold is None and "Suggestion: none" in str(advice)


def test_advice_counts_what_a_limit_would_have_clipped():
    norms = noise(0.7)
    advice = optclip.advise(run_of(norms))
    assert {"1"} <= {f"{r.limit:g}" for r in advice.limits}
    for row in advice.limits:
        near = np.mean(norms > row.limit / WIDTH), np.mean(norms > row.limit * WIDTH)
        assert near[1] <= row.clipped <= near[0]
        assert row.strongest == pytest.approx(min(1, row.limit / norms.max()), rel=1e-5)
    assert advice.quantiles[1.0] == pytest.approx(norms.max(), rel=1e-5)
    assert sum(p.share for p in advice.parts) == pytest.approx(1, rel=1e-5)


def test_what_equal_labels_share_counts_once():
    grad = {f"layer{i}": {"kernel": jnp.full(4, 2.0)} for i in range(4)}
    labels = lambda tree: optclip.by_path({"layer[01]": "first"}, "last")(tree)
    tx = optclip.observe(measure=partial(group_norm, groups=labels))
    _, state = jax.jit(tx.update)(grad, tx.init(grad))
    np.testing.assert_allclose(state.norm.high, 8.0, rtol=1e-6)
    assert [row.name for row in optclip.advise(state).parts] == ["layer0/kernel", "layer2/kernel"]
    np.testing.assert_allclose(state.share, [0.5, 0.5], rtol=1e-6)
    rule = optclip.adagc(max_norm=1.0, measure=partial(group_norm, groups=labels))
    update, _ = jax.jit(rule.update)(grad, rule.init(grad))
    np.testing.assert_allclose(global_norm(update), 1.0, rtol=1e-6)


def test_labels_without_gradients_stay_apart():
    tree = {"a": jnp.ones(4), "i": jnp.arange(2), "j": jnp.arange(3)}
    tx = optclip.observe(measure=partial(group_norm, groups={"a": "x", "i": "y", "j": "z"}))
    state = tx.init(tree)
    assert [name for row in state.names for name in row] == ["a", "i", "j"]
    figure = optclip.plot(tuple([{"obs": tx.update(tree, state)[1]}]))
    assert figure.axes


def test_updates_of_another_tree_are_refused():
    tx = optclip.observe()
    with pytest.raises(ValueError, match="the updates do not fit the state"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2), "b": jnp.ones(1)}))
    chain = optax.chain(optclip.observe())
    with pytest.raises(TypeError, match="merge needs two states of observe"):
        optclip.merge(chain.init(jnp.ones(2)), chain.init(jnp.ones(2)))
