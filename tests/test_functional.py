"""Measure once, then clip, log and skip by one norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from tests import oracles
from tests.cases import GRADS
from tests.harness import assert_bits, assert_close


@pytest.mark.parametrize("ord", [1, 2, np.inf])
def test_clip_tree_returns_the_tree_and_the_norm_before(ord):
    clipped, norm = jax.jit(lambda tree: optclip.clip_tree(tree, 0.5, ord=ord))(GRADS[0])
    size = oracles.global_norm(GRADS[0], ord)
    np.testing.assert_allclose(norm, size, rtol=1e-6)
    assert_close(clipped, jax.tree.map(lambda g: oracles.rescale(g, size, 0.5), GRADS[0]), rtol=1e-6)


def test_a_norm_measured_before_serves_again():
    norm = optclip.global_norm(GRADS[0])
    split, same = optclip.clip_tree(GRADS[0], 0.5, norm=norm)
    assert_bits(split, optclip.clip_tree(GRADS[0], 0.5)[0])
    assert same is norm
    other, _ = optclip.clip_tree(GRADS[0]["dense"], 0.5, norm=norm)
    assert_bits(other, split["dense"])


def test_dtypes_zeros_and_bad_numbers():
    half = {"w": jnp.full((4,), 300.0, jnp.float16)}
    clipped, norm = optclip.clip_tree(half, 300.0)
    assert clipped["w"].dtype == jnp.float16 and norm.dtype == jnp.float32 and float(norm) == 600.0
    np.testing.assert_array_equal(clipped["w"], jnp.full((4,), 150.0, jnp.float16))
    zero = {"w": jnp.zeros(3)}
    np.testing.assert_array_equal(jax.grad(lambda t: optclip.clip_tree(t, 1.0)[1])(zero)["w"], np.zeros(3))
    assert np.all(np.isnan(optclip.clip_tree({"w": jnp.array([1.0, jnp.inf])}, 1.0)[0]["w"]))
    assert optclip.clip_tree({}, 1.0) == ({}, 0.0)


def test_a_given_norm_and_the_limit_keep_their_digits():
    tree = {"w": jnp.array([3.0, 4.0])}
    for norm in (5, np.int64(5), jnp.int32(5), jnp.float16(5), jnp.bfloat16(5)):
        for limit in (0.5, 1.005, 1e-8):
            clipped, same = optclip.clip_tree(tree, limit, norm=norm)
            assert same.dtype == jnp.float32
            np.testing.assert_allclose(clipped["w"], np.array([0.6, 0.8]) * limit, rtol=1e-6)
    assert optclip.clip_tree({"w": jnp.full(4, 1e5)}, 7e4, norm=jnp.float16(65504))[0]["w"][0] == 1e5
    for bad in (True, "5", [5.0], -1.0, np.ones(2)):
        with pytest.raises((TypeError, ValueError), match=r"clip_tree\(norm=.*: norm must be "):
            optclip.clip_tree(tree, 0.5, norm=bad)


def test_a_traced_limit_and_a_bad_one():
    clip = jax.jit(lambda limit: optclip.clip_tree(GRADS[0], limit)[0])
    for limit in (0.1, 0.7):
        np.testing.assert_allclose(oracles.global_norm(clip(limit)), limit, rtol=1e-6)
    with pytest.raises(ValueError, match=r"clip_tree\(max_norm=-1.0\): max_norm must be > 0"):
        optclip.clip_tree(GRADS[0], -1.0)
    with pytest.raises(TypeError, match="clip_tree: max_norm must be a number, for there is no step for a schedule"):
        optclip.clip_tree(GRADS[0], lambda step: 1.0)


def test_infinity_may_be_spelt_as_in_pytorch():
    assert optclip.global_norm([jnp.ones(2)], "inf") == 1


def test_the_derivative_through_the_norm_is_right_in_every_order():
    tree = {"a": jnp.array([3.0, -1.0]), "b": jnp.array([2.0, 0.5])}
    flat = np.array([3.0, -1.0, 2.0, 0.5])
    for ord in (1, 2, 3.5, np.inf):
        got = jax.grad(lambda t, p=ord: optclip.global_norm(t, ord=p))(tree)
        step = np.eye(4) * 1e-6
        want = [(oracles.norm(flat + s, ord) - oracles.norm(flat - s, ord)) / 2e-6 for s in step]
        np.testing.assert_allclose(np.concatenate([got["a"], got["b"]]), want, rtol=1e-4, atol=1e-5)
