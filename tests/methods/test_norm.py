"""Fixed limits on a norm, against float64 and against Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import optclip
from tests import oracles
from tests.cases import GRADS, PARAMS
from tests.harness import assert_bits, assert_close


def apply(tx, grads, params=None):
    return tx.update(grads, tx.init(grads), params)[0]


def ulps(got, want):
    """The largest distance in units in the last place of ``want``."""
    apart = lambda a, b: np.max(np.abs(np.asarray(a) - np.asarray(b)) / np.spacing(np.abs(np.asarray(b))), initial=0)
    return max(map(apart, jax.tree.leaves(got), jax.tree.leaves(want)))


@pytest.mark.parametrize("ord", [1, 2, 3.5, np.inf])
@pytest.mark.parametrize("grads", GRADS[:2])
def test_global_norm(ord, grads):
    size = oracles.global_norm(grads, ord)
    got = apply(optclip.clip_by_global_norm(0.5, ord), grads)
    assert_close(got, jax.tree.map(lambda g: oracles.rescale(g, size, 0.5), grads), rtol=1e-6)


@pytest.mark.parametrize("ord", [1, 2, np.inf])
def test_leaf_norm(ord):
    got = apply(optclip.clip_by_leaf_norm(0.4, ord), GRADS[0])
    assert_close(got, jax.tree.map(lambda g: oracles.rescale(g, oracles.norm(g, ord), 0.4), GRADS[0]), rtol=1e-6)


@pytest.mark.parametrize("ord", [1, 2, np.inf])
def test_unit_norm(ord):
    got = apply(optclip.clip_by_unit_norm(0.3, ord=ord), GRADS[0])
    unit = lambda g: oracles.norm(g, ord, oracles.fan_in(g.shape), keepdims=True)
    assert_close(got, jax.tree.map(lambda g: oracles.rescale(g, unit(g), 0.3), GRADS[0]), rtol=1e-6)


def test_group_norm_with_one_limit_per_group():
    got = apply(optclip.clip_by_group_norm({"dense": 0.5, "head": 0.1}), GRADS[0])
    for name, limit in (("dense", 0.5), ("head", 0.1)):
        scale = min(1.0, limit / oracles.global_norm(GRADS[0][name]))
        assert_close(got[name], jax.tree.map(lambda g, s=scale: g * s, GRADS[0][name]), rtol=1e-6)


def test_groups_with_equal_labels_share_a_norm():
    labels = {"dense": "body", "head": {"kernel": "body", "scale": "own"}}
    state = optclip.clip_by_group_norm(0.1, labels)
    got, after = state.update(GRADS[0], state.init(PARAMS))
    body = [GRADS[0]["dense"], GRADS[0]["head"]["kernel"]]
    np.testing.assert_allclose(after.stats.sizes["dense"], oracles.global_norm(body), rtol=1e-6)
    np.testing.assert_allclose(oracles.global_norm([got["dense"], got["head"]["kernel"]]), 0.1, rtol=1e-6)


def test_a_limit_of_infinity_exempts_a_leaf_that_counts():
    tx = optclip.clip_by_global_norm({"dense": 0.5, "head": np.inf})
    got = apply(tx, GRADS[0])
    assert_bits(jax.tree.map(np.asarray, got["head"]), GRADS[0]["head"])
    scale = 0.5 / oracles.global_norm(GRADS[0])
    assert_close(got["dense"], jax.tree.map(lambda g: g * scale, GRADS[0]["dense"]), rtol=1e-6)


def test_layers_of_a_stack_are_clipped_each_on_its_own():
    stack = {"w": np.stack([GRADS[0]["dense"]["kernel"], 0.1 * GRADS[1]["dense"]["kernel"]])}
    got = apply(optclip.clip_by_leaf_norm(0.4, stack_axis=0), stack)["w"]
    for layer, grad in zip(got, stack["w"], strict=True):
        np.testing.assert_allclose(layer, oracles.rescale(grad, oracles.norm(grad), 0.4), rtol=1e-6)
    units = apply(optclip.clip_by_unit_norm(0.3, stack_axis=0), stack)["w"]
    for layer, grad in zip(units, stack["w"], strict=True):
        size = oracles.norm(grad, axis=0, keepdims=True)
        np.testing.assert_allclose(layer, oracles.rescale(grad, size, 0.3), rtol=1e-6)


_leaves = hnp.arrays(np.float32, st.integers(1, 5), elements=st.floats(-8, 8, width=16))
_trees = st.lists(_leaves, min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(tree=_trees, limit=st.floats(0.125, 16, width=16))
def test_right_to_two_ulp_and_to_the_bit_below_the_limit(tree, limit):
    """Optax's result, as right, may lie on the other side of the truth, so 2 ulp of that one and 2 of this."""
    got, theirs = apply(optclip.clip_by_global_norm(limit), tree), apply(optax.clip_by_global_norm(limit), tree)
    size, ulp = oracles.global_norm(tree), np.finfo(np.float32).eps
    assert_close(got, jax.tree.map(lambda g: oracles.rescale(g, size, limit), tree), rtol=2 * ulp)
    assert_close(got, theirs, rtol=3 * ulp)
    if size <= limit * (1 - 1e-6):
        assert_bits(jax.tree.map(np.asarray, got), tree)


def test_where_optax_is_wrong_this_is_right():
    for leaf, size in ((jnp.full((4, 4), 300.0, jnp.float16), 1200.0), (jnp.full((4, 4), 1e-5, jnp.float16), 4e-5)):
        got = apply(optclip.clip_by_global_norm(size / 2), leaf)
        np.testing.assert_allclose(oracles.global_norm(got), size / 2, rtol=2e-3)


@pytest.mark.parametrize("method", ["global", "leaf", "group", "unit"])
@pytest.mark.parametrize("value", [0, -1.0, np.nan, None, True, "1", [-1.0, 1.0]])
def test_bad_limits_are_refused_with_their_value(method, value):
    with pytest.raises((ValueError, TypeError), match=rf"clip_by_{method}_norm\(max_norm=.*\): max_norm must be > 0"):
        getattr(optclip, f"clip_by_{method}_norm")(value)


@pytest.mark.parametrize("method", ["global", "leaf", "group", "unit"])
@pytest.mark.parametrize("ord", [0, -2, np.nan, "fro", jnp.float32(-1)])
def test_bad_orders_are_refused_at_construction(method, ord):
    with pytest.raises((ValueError, TypeError), match=rf"clip_by_{method}_norm\(ord=.*\): ord must be > 0"):
        getattr(optclip, f"clip_by_{method}_norm")(1.0, ord=ord)


def test_a_traced_order_names_the_way_out():
    with pytest.raises(TypeError, match="static_args='ord'"):
        jax.jit(lambda ord: apply(optclip.clip_by_global_norm(1.0, ord), GRADS[0]))(2)


@pytest.mark.parametrize(("tx", "message"), [
    (optclip.clip_by_global_norm({"dense": 1.0}), "limits must be a prefix tree of the updates"),
    (optclip.clip_by_leaf_norm({"dense": 1.0, "tail": 1.0}), "limits must be a prefix tree of the updates"),
    (optclip.clip_by_group_norm(1.0, {"dense": "a", "tail": "b"}), "groups must be a prefix tree of the updates"),
    (optclip.clip_by_unit_norm(1.0, {"dense": 0, "tail": 0}), "axis must be a prefix tree of the updates"),
    (optclip.clip_by_unit_norm(1.0, axis=5), r"axes \(5,\) are out of range for a leaf of shape"),
    (optclip.clip_by_leaf_norm(1.0, stack_axis=1), r"axes \(1,\) are out of range for a leaf of shape"),
    (optclip.clip_by_unit_norm(1.0, axis="rows"), "axis must be an int, a tuple of ints, None, or a prefix tree"),
])  # fmt: skip
def test_what_does_not_fit_the_updates_is_named(tx, message):
    with pytest.raises(ValueError, match=message):
        apply(tx, GRADS[0])
