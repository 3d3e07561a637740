"""What the clipping does with limits, rules, masks, microbatches, keys and bad examples; what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optclip import per_example as pe

from . import oracle

random = np.random.RandomState(0)
PARAMS = {
    "head": {"w": jnp.asarray(random.randn(8, 3), jnp.float32), "b": jnp.zeros(3)},
    "body": {"w": jnp.asarray(random.randn(5, 8), jnp.float32)},
}
BATCH = jnp.asarray(random.randn(7, 2, 5), jnp.float32), jnp.asarray(random.randn(7, 2, 3), jnp.float32)


def loss_fn(params, batch):
    x, y = batch
    h = jnp.tanh(x @ params["body"]["w"])
    return jnp.mean((h @ params["head"]["w"] + params["head"]["b"] - y) ** 2)


GRADS = jax.jit(lambda batch: oracle.per_example_gradients(loss_fn, PARAMS, batch))(BATCH)[1]
NORMS = oracle.norms_of(GRADS)


def rows(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def close(got, wanted, tolerance=1e-5):
    assert oracle.distance(got, wanted) <= tolerance


def test_sum_and_mean_and_infinite_limit():
    (_, seen), mean = pe.clipped_value_and_grad(loss_fn, jnp.inf)(PARAMS, BATCH)
    close(mean, jax.grad(loss_fn)(PARAMS, BATCH))
    assert seen.clipped_fraction == 0 and np.all(seen.coefs == 1)
    (loss, _), total = pe.clipped_value_and_grad(loss_fn, jnp.inf, reduction="sum")(PARAMS, BATCH)
    close(jax.tree.map(lambda g: g / 7, total), mean)
    np.testing.assert_allclose(loss, 7 * loss_fn(PARAMS, BATCH), rtol=1e-5)


@pytest.mark.parametrize(
    "rule, formula",
    [
        (pe.hard, lambda n, c: np.minimum(1, c / n)),
        (pe.normalize, lambda n, c: c / n),
        (pe.automatic(0.5), lambda n, c: c / (n + 0.5)),
        (pe.psac(0.3), lambda n, c: c / (n + 0.3 / (n + 0.3))),
    ],
)
def test_rules(rule, formula):
    (_, seen), grads = pe.clipped_value_and_grad(loss_fn, 0.7, rule, reduction="sum")(PARAMS, BATCH)
    coefs = formula(np.asarray(NORMS, np.float64), 0.7)
    np.testing.assert_allclose(seen.coefs, coefs, rtol=1e-5)
    close(grads, jax.tree.map(lambda g: np.tensordot(coefs, g, 1), GRADS))


@pytest.mark.parametrize("rule", [pe.hard, pe.normalize, pe.automatic(), pe.psac()])
def test_rules_at_the_edges(rule):
    norms = jnp.array([0, 1e-30, 1e-8, 1, 1e8, 1e19])
    coefs = rule(norms, jnp.float32(0.5))
    assert np.all(np.isfinite(coefs)) and np.all(coefs >= 0)
    assert np.all(norms * coefs <= 0.5 * (1 + 1e-6))
    assert np.all(np.isfinite(jax.grad(lambda n: jnp.sum(rule(n, jnp.float32(0.5))))(norms[3:])))


def test_limits_per_group_and_per_leaf():
    for limit in (
        {"head": 0.5, "body": 0.1},
        jax.tree.map(lambda _: 0.2, PARAMS),
        {"head": {"w": 0.5, "b": 0.1}, "body": 2.0},
    ):
        (_, seen), grads = pe.clipped_value_and_grad(loss_fn, limit)(PARAMS, BATCH)
        groups, tree = jax.tree.flatten(limit)
        parts = tree.flatten_up_to(GRADS)
        close(grads, tree.unflatten([oracle.clipped_mean(p, c) for p, c in zip(parts, groups, strict=True)]))
        close(seen.norms, tree.unflatten([oracle.norms_of(p) for p in parts]))
        assert jax.tree.structure(seen.clipped_fraction) == tree
    _, norms = pe.value_and_norms(loss_fn, groups={"head": 0, "body": 0})(PARAMS, BATCH)
    close(norms["head"], oracle.norms_of(GRADS["head"]))


def test_limit_is_traced_and_follows_a_quantile():
    traces = []

    @jax.jit
    def step(limit):
        traces.append(1)
        (_, seen), _ = pe.clipped_value_and_grad(loss_fn, limit)(PARAMS, BATCH)
        return limit * jnp.exp(-0.3 * (pe.unclipped_fraction(seen) - 0.5))

    limit = jnp.float32(1e-3)
    for _ in range(100):
        limit = step(limit)
    assert len(traces) == 1
    assert np.sum(limit >= NORMS) in (3, 4)


def test_example_mask_leaves_padding_out():
    mask = jnp.array([1, 1, 0, 1, 0, 1, 1], bool)
    padded = jax.tree.map(lambda x: x.at[2].set(jnp.nan).at[4].set(jnp.inf), BATCH)
    f = pe.clipped_value_and_grad(loss_fn, 0.5)
    (loss, seen), grads = jax.jit(f)(PARAMS, padded, example_mask=mask)
    (wanted_loss, _), wanted = f(PARAMS, rows(BATCH, mask))
    close([loss, grads], [wanted_loss, wanted])
    assert seen.num_examples == 5 and seen.num_nonfinite == 0
    (loss, _), grads = f(PARAMS, BATCH, example_mask=jnp.zeros(7, bool))
    assert loss == 0 and all(np.all(g == 0) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_nonfinite_examples_are_dropped_or_loud(bad):
    batch = jax.tree.map(lambda x: x.at[3].set(bad), BATCH)
    (loss, seen), grads = pe.clipped_value_and_grad(loss_fn, 0.5, drop_nonfinite=True, reduction="sum")(PARAMS, batch)
    keep = np.arange(7) != 3
    (wanted_loss, _), wanted = pe.clipped_value_and_grad(loss_fn, 0.5, reduction="sum")(PARAMS, rows(BATCH, keep))
    close([loss, grads], [wanted_loss, wanted])
    assert seen.num_nonfinite == 1 and seen.num_examples == 7 and seen.coefs[3] == 0
    _, grads = pe.clipped_value_and_grad(loss_fn, 0.5)(PARAMS, batch)
    assert all(np.all(np.isnan(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("microbatch", [1, 3, 7, 100])
def test_microbatches_change_nothing(microbatch):
    mask = jnp.array([1, 1, 0, 1, 0, 1, 1], bool)
    for kwargs in ({}, {"example_mask": mask}):
        whole = pe.clipped_value_and_grad(loss_fn, 0.5)(PARAMS, BATCH, **kwargs)
        parts = pe.clipped_value_and_grad(loss_fn, 0.5, microbatch=microbatch)(PARAMS, BATCH, **kwargs)
        close(parts, whole)
    close(pe.value_and_norms(loss_fn, microbatch=microbatch)(PARAMS, BATCH)[1], NORMS)


def test_arguments():
    """Several differentiated and batch arguments, aux, keyword arguments, no batch axis, a key per example."""

    def loss(w, flag, x, b, key, *, scale):
        assert flag == "static" and x["x"].shape == (5,)
        noise = jax.random.normal(key, (3,))
        y = (x["x"] @ w + b) * scale + noise
        return jnp.sum(y**2), {"noise": noise, "y": y}

    w, b, x = PARAMS["body"]["w"][:, :3], jnp.ones(3), {"x": BATCH[0][:, 0]}
    options = {"argnums": (0, 3), "batch_argnums": 2, "key_argnums": -1, "has_aux": True, "keep_batch_dim": False}
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        (_, seen), grads = pe.clipped_value_and_grad(loss, 1.0, **options)(w, "static", x, b, key, scale=2.0)
        keys = jax.random.split(key, 7)
        single = jax.grad(lambda w, b, x, k: loss(w, "static", {"x": x}, b, k, scale=2.0)[0], (0, 1))
        wanted = jax.vmap(single, (None, None, 0, 0))(w, b, x["x"], keys)
        close(grads, oracle.clipped_mean(wanted, 1.0))
        assert seen.aux["y"].shape == (7, 3) and len(np.unique(seen.aux["noise"])) == 21
        (losses, aux), norms = pe.value_and_norms(loss, **options)(w, "static", x, b, key, scale=2.0)
        close([losses, aux, norms], [seen.losses, seen.aux, seen.norms])


def test_in_loops_and_accumulation():
    """In scan, with donation, and summed over steps."""
    f = pe.clipped_value_and_grad(loss_fn, 0.5, reduction="sum")
    parts = jax.tree.map(lambda x: jnp.stack([x[:3], x[3:6]]), BATCH)

    def step(total, batch):
        return jax.tree.map(jnp.add, total, f(PARAMS, batch)[1]), None

    total = jax.jit(lambda p: jax.lax.scan(step, p, parts)[0], donate_argnums=0)(jax.tree.map(jnp.zeros_like, PARAMS))
    close(total, f(PARAMS, rows(BATCH, slice(0, 6)))[1])


def test_differentiable():
    value = lambda limit: pe.clipped_value_and_grad(loss_fn, limit)(PARAMS, BATCH)[1]["head"]["b"][0]
    slope = (value(0.5 + 1e-2) - value(0.5 - 1e-2)) / 2e-2
    np.testing.assert_allclose(jax.grad(value)(0.5), slope, rtol=1e-2)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-6, 1.0, 1e6, 1e30, np.inf, np.nan]),
    limit=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
def test_one_example_moves_the_sum_by_at_most_the_limit(seed, scale, limit, dtype):
    random = np.random.RandomState(seed)
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)
    batch = jax.tree.map(lambda x: jnp.asarray(random.randn(*x.shape), jnp.float32).at[0].multiply(scale), BATCH)
    total = clipped_sum(params, batch, limit, jnp.ones(7, bool))
    without = clipped_sum(params, batch, limit, jnp.arange(7) != 0)
    alone = clipped_sum(params, batch, limit, jnp.arange(7) == 0)
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)))
    rounding = 8 * float(jnp.finfo(dtype).eps)
    assert norm(alone) <= limit * (1 + rounding) + 1e-6
    difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), total, without)
    assert norm(difference) <= limit * (1 + rounding) + rounding * norm(total) + 1e-6


@jax.jit
def clipped_sum(params, batch, limit, mask):
    def loss(params, batch):
        batch = jax.tree.map(lambda a: a.astype(params["head"]["b"].dtype), batch)
        return loss_fn(params, batch).astype(jnp.float32)

    f = pe.clipped_value_and_grad(loss, limit, reduction="sum", drop_nonfinite=True)
    return f(params, batch, example_mask=mask)[1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    """Norms of half-precision gradients are summed in float32; the aggregate keeps the dtype."""
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    batch = jax.tree.map(lambda x: x.astype(dtype), BATCH)
    (_, seen), grads = jax.jit(pe.clipped_value_and_grad(loss_fn, 0.5))(params, batch)
    assert seen.norms.dtype == jnp.float32 and {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (params, batch))
    (_, wanted), wanted_grads = pe.clipped_value_and_grad(loss_fn, 0.5)(*exact)
    close(seen.norms, wanted.norms, 4 * float(jnp.finfo(dtype).eps))
    close(grads, wanted_grads, 4 * float(jnp.finfo(dtype).eps))


def test_large_half_precision_norm():
    """300 in float16 squares to infinity."""
    loss = lambda w, x: jnp.sum(w * x).astype(jnp.float32)
    _, norms = pe.value_and_norms(loss)(jnp.ones(100, jnp.float16), jnp.full((2, 100), 300, jnp.float16))
    np.testing.assert_allclose(norms, 3000, rtol=1e-3)


def product(w, batch):
    """Per example ``sum_t x_t (x) g_t`` as the gradient: out of range in its factors, not in itself."""
    x, g = batch
    return jnp.sum((x[0] @ w) * g[0])


@pytest.mark.parametrize("positions", [1, 4, 64])  # outer, gram, direct
@pytest.mark.parametrize(
    ("x", "g"), [(1e18, 1e-20), (1e20, 1e-20), (1e-20, 1e18), (1e18, 1e-18), (1.0, 1e-19), (1.0, 3e-20), (1e-10, 1e-10)]
)
def test_limits_hold_where_squares_underflow(positions, x, g):
    draw = np.random.default_rng(positions)
    batch = [jnp.asarray(draw.normal(size=(1, 1, positions, 32)) * scale, jnp.float32) for scale in (x, g)]
    for rule, limit in ((pe.hard, 1e-3), (pe.normalize, 1.0), (pe.psac(0.1), 1e-3)):
        f = pe.clipped_value_and_grad(product, limit, rule, reduction="sum", drop_nonfinite=True)
        contribution = np.linalg.norm(np.asarray(jax.jit(f)(jnp.zeros((32, 32)), batch)[1], np.float64))
        assert contribution <= limit * (1 + 1e-5)


@pytest.mark.parametrize(("x", "g"), [(1e18, 1e-20), (1e-20, 1e18), (1.0, 3e-20), (1.0, 1.0)])
def test_limits_hold_where_squares_of_a_parameter_used_twice_underflow(x, g):
    draw = np.random.default_rng(0)
    batch = [jnp.asarray(draw.normal(size=(1, 2, 4, 32)) * scale, jnp.float32) for scale in (x, g)]
    twice = lambda w, batch: (
        jnp.sum((batch[0][0, 0] @ w) * batch[1][0, 0]) + jnp.sum((batch[0][0, 1] @ w) * batch[1][0, 1])
    )
    for rule, limit in ((pe.hard, 1e-3), (pe.normalize, 1.0)):
        f = pe.clipped_value_and_grad(twice, limit, rule, reduction="sum", drop_nonfinite=True)
        contribution = np.linalg.norm(np.asarray(jax.jit(f)(jnp.zeros((32, 32)), batch)[1], np.float64))
        assert contribution <= limit * (1 + 1e-5)
        assert x != g or contribution > 0.9 * limit


def test_sums_of_small_numbers_and_zeros():
    x = np.full((1, 1000), 1e-19, np.float32)
    x[0, 0] = 1.2e-19  # the one square that does not underflow
    total = pe.clipped_value_and_grad(lambda p, x: jnp.sum(p * x[0]), 1.0, pe.normalize, reduction="sum")
    assert np.linalg.norm(np.asarray(total(jnp.zeros(1000), x)[1], np.float64)) <= 1 + 1e-5
    zeros = jnp.ones((2, 1, 4, 32)), jnp.zeros((2, 1, 4, 32))
    np.testing.assert_array_equal(pe.value_and_norms(product)(jnp.zeros((32, 32)), zeros)[1], np.zeros(2))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float16, jnp.float32])
def test_parameters_of_any_float_with_strict_promotion_and_no_leaks(dtype):
    w, batch = PARAMS["body"]["w"].astype(dtype), BATCH[0]
    for loss in (
        lambda w, x: jnp.mean(jnp.tanh(x @ w.astype(jnp.float32)) ** 2),
        lambda w, x: jnp.mean((x * w[:, 0].astype(jnp.float32)) ** 2),
    ):
        with jax.numpy_dtype_promotion("strict"), jax.checking_leaks():
            _, norms = pe.value_and_norms(loss)(w, batch)
            _, grads = pe.clipped_value_and_grad(loss, 0.1)(w, batch)
        assert grads.dtype == dtype
        wide = lambda w, loss=loss: jnp.stack([loss(w, x[None]) for x in batch])
        exact = jax.jacrev(wide)(w.astype(jnp.float32))
        np.testing.assert_allclose(norms, jnp.linalg.norm(exact.reshape(len(batch), -1), axis=1), rtol=0.1)


def test_no_tracer_leaks_from_a_loop_or_a_checkpoint():
    layer = lambda h, w: (jnp.tanh(h @ w), None)
    for body in (layer, jax.checkpoint(layer)):
        loss = lambda w, x, body=body: jnp.mean(jax.lax.scan(body, x, w)[0] ** 2)
        once = lambda w, x, loss=loss: jax.checkpoint(loss)(w, x)
        for f in (loss, once):
            with jax.checking_leaks():
                pe.value_and_norms(f)(jnp.ones((3, 8, 8)), jnp.ones((4, 8)))
                pe.clipped_value_and_grad(f, 0.1)(jnp.ones((3, 8, 8)), jnp.ones((4, 8)))


def test_a_negative_limit_is_loud():
    traced = jax.jit(lambda limit: pe.clipped_value_and_grad(loss_fn, limit)(PARAMS, BATCH)[1])
    assert all(np.isnan(x).all() for x in jax.tree.leaves(traced(-1.0)))


@pytest.mark.parametrize(("x", "g"), [(1e5, 1e-19), (1e10, 9e-20), (1.0, 1.0)])
@pytest.mark.parametrize("positions", [1, 2])
def test_limits_hold_for_kernels_with_several_axes(positions, x, g):
    heads = lambda w, batch: jnp.sum(jnp.einsum("btd,dhe->bthe", batch[0], w) * batch[1])
    batch = jnp.full((1, positions, 16), x), jnp.full((1, positions, 32, 32), g)
    f = pe.clipped_value_and_grad(heads, 1e-12, reduction="sum")
    contribution = np.linalg.norm(np.asarray(jax.jit(f)(jnp.zeros((16, 32, 32)), batch)[1], np.float64))
    assert contribution <= 1e-12 * (1 + 1e-5)


def test_complex_factors_of_real_parameters():
    draw = np.random.default_rng(3)
    w, x = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((24, 30), (2, 3, 24)))
    spectrum = lambda w, x: jnp.fft.fft(x, axis=x.ndim - 2) @ w.astype(jnp.complex64)
    for loss in (
        lambda w, x: jnp.sum(jnp.abs(spectrum(w, x)) ** 2),
        lambda w, x: jnp.sum(jnp.abs(jnp.fft.fft(x[:, :1], axis=2) @ w.astype(jnp.complex64) + 1) ** 2),
        lambda w, x: jnp.sum(jnp.abs(spectrum(w, x) + spectrum(w, 2 * x[:, ::-1]) ** 2)),
    ):
        exact = jax.vmap(lambda row, loss=loss: jnp.linalg.norm(jax.grad(loss)(w, row[None])))(x)
        np.testing.assert_allclose(jax.jit(pe.value_and_norms(loss))(w, x)[1], exact, rtol=1e-5)
        _, total = jax.jit(pe.clipped_value_and_grad(loss, 1.0, reduction="sum"))(w, x[:1])
        np.testing.assert_allclose(jnp.linalg.norm(total), 1.0, rtol=1e-5)
