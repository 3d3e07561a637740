"""Reading what was recorded: names, numbers, and every place an optimizer state can hide a clipper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optclip
from tests import oracles
from tests.cases import GRADS, PARAMS
from tests.harness import assert_close

KEYS = {"preclip_norm", "limit", "scale", "clipped", "clipped_fraction", "worst_leaf_index"}


def state_after(tx, grads=GRADS[0], params=PARAMS):
    return tx.update(grads, tx.init(params), params)[1]


def keys(summary, name="clip"):
    return {key.split("/")[-1] for key in summary if key.rsplit("/", 1)[0] == name}


def test_numbers_at_tree_scope():
    size = oracles.global_norm(GRADS[0])
    got = optclip.summary(state_after(optclip.clip_by_global_norm(0.5)))
    want = {"preclip_norm": size, "limit": 0.5, "scale": 0.5 / size, "clipped": 1, "clipped_fraction": 1}
    want["worst_leaf_index"] = 0
    assert set(got) == {f"clip/{k}" for k in want}
    for key, value in want.items():
        np.testing.assert_allclose(got[f"clip/{key}"], value, rtol=1e-6)
    calm = optclip.summary(state_after(optclip.clip_by_global_norm(100.0)))
    assert float(calm["clip/clipped"]) == 0 and float(calm["clip/scale"]) == 1


def test_numbers_at_leaf_scope():
    sizes = np.array(jax.tree.leaves(oracles.leaf_norm(GRADS[0])))
    limit = float(np.sort(sizes)[1:3].mean())
    state = state_after(optclip.clip_by_leaf_norm(limit))
    got = optclip.summary(state, per_leaf=True)
    np.testing.assert_allclose(got["clip/preclip_norm"], sizes.max(), rtol=1e-6)
    np.testing.assert_allclose(got["clip/scale"], limit / sizes.max(), rtol=1e-6)
    assert float(got["clip/clipped_fraction"]) == 0.5
    assert int(got["clip/worst_leaf_index"]) == sizes.argmax()
    paths = ["dense/bias", "dense/kernel", "head/kernel", "head/scale"]
    for path, size in zip(paths, sizes, strict=True):
        np.testing.assert_allclose(got[f"clip/preclip_norm/{path}"], size, rtol=1e-6)
    ((name, (path, ratio)),) = optclip.worst_leaf(state).items()
    assert (name, path) == ("clip", paths[sizes.argmax()])
    np.testing.assert_allclose(ratio, sizes.max() / limit, rtol=1e-6)


def test_the_largest_need_not_be_the_worst():
    grads = {"a": jnp.zeros(3), "b": jnp.array([3.0, 4.0]), "c": jnp.full(4, 1.0)}
    state = state_after(optclip.clip_by_leaf_norm({"a": jnp.zeros(()), "b": 10.0, "c": 0.5}), grads, grads)
    got = optclip.summary(state)
    want = {"preclip_norm": 5, "limit": 10, "scale": 0.25, "clipped": 1, "clipped_fraction": 1 / 3}
    np.testing.assert_allclose([got[f"clip/{key}"] for key in want], list(want.values()), rtol=1e-6)
    assert int(got["clip/worst_leaf_index"]) == 2
    assert optclip.worst_leaf(state) == {"clip": ("c", 4.0)}


def test_limits_may_be_shallower_or_deeper_than_sizes_and_both():
    limits = {"dense": {"bias": 1.0, "kernel": np.inf}, "head": 2.0}
    tx = optclip.clip_by_group_norm(limits, {"dense": 0, "head": {"kernel": 1, "scale": 2}})
    got = optclip.summary(state_after(tx), per_leaf=True)
    assert float(got["clip/limit/dense/kernel"]) == np.inf and float(got["clip/limit/head/scale"]) == 2.0
    single = {"w": jnp.array([3.0, 4.0])}
    one = optclip.summary(state_after(optclip.clip_by_leaf_norm(1.0), single, single))
    assert float(one["clip/preclip_norm"]) == 5.0


def test_bad_empty_and_fresh_states():
    bad = {**GRADS[0], "head": jax.tree.map(lambda x: x * np.nan, GRADS[0]["head"])}
    got = optclip.summary(state_after(optclip.clip_by_leaf_norm(0.1), bad))
    assert np.isnan(got["clip/preclip_norm"]) and np.isnan(got["clip/scale"]) and got["clip/clipped"] == 1
    assert int(got["clip/worst_leaf_index"]) == 2
    fresh = optclip.summary(optclip.clip_by_global_norm(1.0).init(PARAMS))
    assert float(fresh["clip/clipped"]) == 0 and float(fresh["clip/limit"]) == np.inf
    nothing = {"w": jnp.zeros((3, 0))}
    optclip.summary(state_after(optclip.clip_by_unit_norm(1.0, record=True), nothing, nothing))
    zero = jax.tree.map(np.zeros_like, PARAMS)
    still = optclip.summary(state_after(optclip.adaptive_grad_clip(0.1, eps=0.0, record=True), zero, zero))
    assert float(still["clip/clipped"]) == 0 and int(still["clip/worst_leaf_index"]) == 0
    assert optclip.summary(optax.adam(1e-3).init(PARAMS)) == {} and optclip.worst_leaf(()) == {}


@pytest.mark.parametrize(("wrap", "names"), [
    (lambda tx: optax.chain(tx, optax.adam(1e-3), tx), {"clip", "clip_1"}),
    (lambda tx: optax.named_chain(("first", tx), ("sgd", optax.sgd(1.0)), ("last", tx)), {"clip/first", "clip/last"}),
    (lambda tx: optax.masked(tx, {"dense": True, "head": False}), {"clip"}),
    (lambda tx: optax.partition({"a": tx, "b": tx}, {"dense": "a", "head": "b"}), {"clip/a", "clip/b"}),
    (lambda tx: optax.partition({"a": tx, "none": tx}, {"dense": "a", "head": "a"}), {"clip/a", "clip/none"}),
    (lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(), {"clip"}),
    (lambda tx: optax.apply_if_finite(optax.chain(tx, optax.sgd(0.1)), 3), {"clip"}),
    (lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.sgd(rate)))(0.1), {"clip"}),
])  # fmt: skip
def test_names_are_stable_wherever_the_clipper_is(wrap, names):
    tx = wrap(optclip.clip_by_leaf_norm(0.1))
    start = tx.init(PARAMS)
    after = tx.update(GRADS[0], start, PARAMS)[1]
    for state in (start, after):
        got = optclip.summary(state)
        assert {key.rsplit("/", 1)[0] for key in got} == names
        assert all(keys(got, name) == KEYS and all(np.ndim(v) == 0 for v in got.values()) for name in names)
    assert_close(jax.jit(optclip.summary)(after), optclip.summary(after), rtol=1e-6)


def test_an_nnx_optimizer_is_read_through_its_variables():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optclip.clip_by_leaf_norm(0.1), optax.adam(1e-3)), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((4, 3))) ** 2))(model)
    optimizer.update(model, grads)
    got = optclip.summary(optimizer.opt_state, per_leaf=True)
    kernel = nnx.to_pure_dict(grads)["kernel"]
    np.testing.assert_allclose(got["clip/preclip_norm/kernel"], oracles.norm(kernel), rtol=1e-5)
    assert set(got) >= {f"clip/{key}" for key in KEYS}
    assert set(optclip.worst_leaf(optimizer.opt_state)) == {"clip"}
    inside = nnx.jit(lambda o: optclip.summary(o.opt_state))(optimizer)
    np.testing.assert_allclose(inside["clip/preclip_norm"], got["clip/preclip_norm"], rtol=1e-6)


def test_reading_moves_nothing_between_host_and_device():
    guarded = optclip.skip_nonfinite(optclip.skip_spikes(optclip.clip_by_leaf_norm(0.1), loss_rule=10.0))
    for tx in (guarded, optclip.clip_by_global_norm(0.1), optclip.zero_nonfinite()):
        params = jax.device_put(PARAMS)
        _, state = tx.update(params, tx.init(params), value=jnp.float32(1))
        with jax.transfer_guard("disallow"):
            optclip.summary(state, per_leaf=True)
            optclip.worst_leaf(state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_size_that_is_not_finite_counts_as_clipped_under_any_limit(bad):
    for limit in (1.0, np.inf):
        tx = optclip.clip_by_global_norm(limit)
        _, state = tx.update(jnp.array([1.0, bad]), tx.init(jnp.ones(2)))
        told = optclip.summary(state)
        assert told["clip/clipped"] == told["clip/clipped_fraction"] == 1.0 and np.isnan(told["clip/scale"])


def test_leaves_whose_paths_read_alike_have_a_row_each():
    tree = {"a/b": jnp.ones(4), "a": {"b": jnp.full(4, 3.0)}, "": jnp.full(4, 0.5)}
    tx = optclip.clip_by_leaf_norm(1.0)
    got = optclip.summary(tx.update(tree, tx.init(tree))[1], per_leaf=True)
    sizes = {key: float(value) for key, value in got.items() if key.startswith("clip/preclip_norm/")}
    assert sizes == {"clip/preclip_norm/": 1.0, "clip/preclip_norm/a/b": 6.0, "clip/preclip_norm/a/b#2": 2.0}


def test_of_equal_sizes_the_smallest_limit_is_told():
    tree = {"m": jnp.ones((2, 2)), "v": jnp.ones(4)}
    tx = optclip.clip_by_global_norm(optclip.by_leaf(lambda path, x: jnp.inf if x.ndim == 2 else 1.0))
    said = optclip.summary(tx.update(tree, tx.init(tree))[1])
    assert said["clip/limit"] == 1.0 and said["clip/clipped"] == 1.0
