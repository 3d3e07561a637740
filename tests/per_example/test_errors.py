"""Wrong calls raise one clear error; coupled losses are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optclip import per_example as pe

W, X = jnp.ones((3, 2)), jnp.ones((4, 3))


def loss(w, x):
    return jnp.mean((x @ w) ** 2)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda f: f({"w": W, "n": jnp.arange(3)}, X), TypeError, r"\['n'\] is not of a floating type \(int32\)"),
        (lambda f: f(W.astype(complex), X), TypeError, "complex"),
        (lambda f: f({"w": W, "act": jax.nn.relu}, X), TypeError, r"\['act'\] is not an array"),
        (lambda f: f(W, X[:0]), ValueError, "the batch is empty"),
        (lambda f: f(W, (X, X[:3])), ValueError, r"disagree on the number of examples \(leading axis\): \[3, 4\]"),
        (lambda f: f(W, (X, 1.0)), ValueError, "a leaf of the batch is a scalar"),
        (lambda f: f(W, ()), ValueError, "names no array"),
        (lambda f: f(W), ValueError, "batch_argnums=1 points beyond the 1 positional"),
        (lambda f: f(W, X, example_mask=jnp.ones(3, bool)), ValueError, r"example_mask must be bool of shape \(4,\)"),
    ],
)
def test_calls(call, error, words):
    with pytest.raises(error, match=words):
        call(pe.clipped_value_and_grad(loss, 1.0))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: pe.clipped_value_and_grad(loss, 0.0)(W, X), ValueError, "max_norm must be > 0"),
        (lambda: pe.clipped_value_and_grad(loss, float("nan"))(W, X), ValueError, "max_norm must be > 0"),
        (lambda: pe.clipped_value_and_grad(loss, {"v": 1.0})({"w": W}, X), ValueError, "prefix of the parameter tree"),
        (lambda: pe.clipped_value_and_grad(loss, jnp.ones(2))(W, X), ValueError, "must be a scalar"),
        (lambda: pe.clipped_value_and_grad(loss, 1.0, reduction="max"), ValueError, "'mean' or 'sum', not 'max'"),
        (lambda: pe.clipped_value_and_grad(loss, 1.0, microbatch=0), ValueError, "microbatch must be a positive int"),
        (lambda: pe.clipped_value_and_grad(loss, 1.0, batch_argnums=0)(W, X), ValueError, "named by both"),
        (lambda: pe.clipped_value_and_grad(loss, 1.0, has_aux=True)(W, X), TypeError, r"pair \(loss, aux\)"),
        (lambda: pe.value_and_norms(lambda w, x: x @ w)(W, X), TypeError, r"must be a scalar, not of shape \(1, 2\)"),
        (lambda: pe.value_and_norms(loss, key_argnums=2)(W, X, X), TypeError, "single random key"),
        (lambda: pe.automatic(0.0), ValueError, "gamma must be > 0"),
        (lambda: pe.psac(-1.0), ValueError, "r must be > 0"),
    ],
)
def test_settings(make, error, words):
    with pytest.raises(error, match=words):
        make()


def batch_norm(w, x):
    y = x @ w
    return jnp.mean(jnp.tanh((y - y.mean(0)) / jnp.sqrt(y.var(0) + 1e-3)) ** 2)


def contrastive(w, x):
    y = x @ w
    return jnp.mean(jax.nn.logsumexp(y @ y.T, axis=1))


def token_mean(w, x):
    mask = x[..., :1] > 0
    return jnp.sum(mask * (x @ w) ** 2) / jnp.sum(mask)


@pytest.mark.parametrize("coupled", [batch_norm, contrastive, token_mean])
def test_coupled_examples_are_found(coupled):
    x = jnp.asarray(np.random.RandomState(0).randn(*((6, 5, 3) if coupled is token_mean else (6, 3))), jnp.float32)
    with pytest.raises(ValueError, match="couples examples"):
        pe.check(coupled)(W, x)


def test_check_tells_mean_from_sum():
    x = jnp.asarray(np.random.RandomState(0).randn(6, 3), jnp.float32)
    assert pe.check(loss)(W, x).reduction == "mean"
    found = pe.check(lambda w, x: (jnp.sum((x @ w) ** 2), x), has_aux=True)(W, x)
    assert found.reduction == "sum" and found.norm_error < 1e-5
    with pytest.raises(ValueError, match="at least two"):
        pe.check(loss)(W, x[:1])


def test_check_sees_a_wrong_norm(monkeypatch):
    engine = pe._explain._engine
    right = engine.measure_norms
    wrong = lambda *args: (*right(*args)[:2], [1.1 * s for s in right(*args)[2]])
    monkeypatch.setattr(engine, "measure_norms", wrong)
    with pytest.raises(ValueError, match="norms differ"):
        pe.check(loss)(W, jnp.asarray(np.random.RandomState(0).randn(6, 3), jnp.float32))


def test_what_is_wrong_is_named_before_the_first_call():
    for bad in (0.0, -1.0, np.nan, True, "1", [1.0, 0.0], {"a": 0}, lambda count: 1.0):
        with pytest.raises((TypeError, ValueError), match=r"clipped_value_and_grad.*max_norm must be > 0"):
            pe.clipped_value_and_grad(loss, bad)
    with pytest.raises(TypeError, match=r"not tuple; for a pair \(loss, aux\) pass has_aux=True"):
        pe.clipped_value_and_grad(lambda w, x: (jnp.sum(w * x), 1.0), 1.0)(jnp.ones(3), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="value_and_norms: groups must be a prefix of the parameter tree"):
        pe.value_and_norms(lambda p, x: jnp.sum(p["w"] * x), groups={"v": 0})({"w": jnp.ones(3)}, jnp.ones((2, 3)))
    for call in (pe.split_budget, pe.split_budget_by_size):
        with pytest.raises(ValueError, match=r"\(max_norm=-1.0\): max_norm must be > 0"):
            call(-1.0, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"adapt_limit\(limit=-1.0\)"):
        pe.adapt_limit(-1.0, 0.5)
