"""Groups, exemptions and stacked layers: each line of the README's table does what it says, for every kind of tree."""

import warnings
from functools import partial
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

import optclip
from optclip import by_leaf, by_path
from optclip.selection import path_strings
from tests.meshes import draw

PARAMS, GRADS = draw(0), draw(1, 5.0)


def norm(*leaves):
    return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in leaves))


def apply(tx, grads=GRADS, params=PARAMS):
    return tx.update(grads, tx.init(params), params)[0]


def scaled(tree, factor):
    return jax.tree.map(lambda x: x * factor, tree)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ((DictKey("a"), SequenceKey(0), DictKey("kernel")), "a/0/kernel"),
        ((DictKey("a"), DictKey("kernel"), GetAttrKey("value")), "a/kernel"),
        ((DictKey("attention"), DictKey("value")), "attention/value"),  # a parameter of that name
        ((GetAttrKey("value"),), "value"),
        ((), ""),
    ],
)
def test_paths(path, expected):
    assert path_strings([path]) == [expected]


class Projections(NamedTuple):
    query: object
    value: object


def test_a_value_with_siblings_is_no_wrapper():
    tree = {"attn": Projections(jnp.ones(2), jnp.ones(2)), "scale": nn.Partitioned(jnp.ones(2), ("x",))}
    label = by_path({"attn/value$": "V", "^scale$": "S"}, "rest")(tree)
    assert label == {"attn": Projections("rest", "V"), "scale": nn.Partitioned("S", ("x",))}
    for gap in (None, optax.MaskedNode()):
        assert by_path({"attn/value$": "V"}, "rest")({"attn": Projections(gap, 1.0)})["attn"].value == "V"
    tx = optclip.clip_by_leaf_norm(1.0)
    state = tx.init(tree)
    assert {k for k in optclip.summary(state, per_leaf=True) if "preclip_norm/" in k} == {
        f"clip/preclip_norm/{path}" for path in ("attn/query", "attn/value", "scale")
    }


def test_the_first_pattern_wins():
    label = by_path({"kernel$": "matrix", "^dense/": "dense"}, "rest")
    expected = {"dense": {"bias": "dense", "kernel": "matrix"}, "head": {"kernel": "matrix", "scale": "rest"}}
    assert label(GRADS) == expected
    assert by_path({}, None)({"a": 1.0}) == {"a": None}
    assert by_path({"a": "x"}, "y")({}) == {}


def test_one_norm_across_the_groups_of_partition():
    label = by_path({"^dense/": "slow"}, "fast")
    tx = optax.chain(
        optclip.clip_by_global_norm(1.0), optax.partition({"slow": optax.sgd(0.1), "fast": optax.sgd(1.0)}, label)
    )
    factor = 1 / norm(*jax.tree.leaves(GRADS))
    expected = {"dense": scaled(GRADS["dense"], -0.1 * factor), "head": scaled(GRADS["head"], -factor)}
    chex.assert_trees_all_close(apply(tx), expected, rtol=1e-6)


def test_frozen_leaves_stay_out_of_the_norm():
    free = scaled(GRADS["head"], 1 / norm(*jax.tree.leaves(GRADS["head"])))
    masked = optax.masked(optclip.clip_by_global_norm(1.0), by_path({"^dense/": False}, True))
    chex.assert_trees_all_close(apply(masked), {"dense": GRADS["dense"], "head": free}, rtol=1e-6)
    parts = {"train": optclip.clip_by_global_norm(1.0), "frozen": optax.set_to_zero()}
    split = optax.partition(parts, by_path({"^dense/": "frozen"}, "train"))
    chex.assert_trees_all_close(apply(split), {"dense": scaled(GRADS["dense"], 0.0), "head": free}, rtol=1e-6)


def test_agc_without_the_last_layer():
    updates = apply(optax.masked(optclip.adaptive_grad_clip(0.01), by_path({"^head/": False}, True)))
    chex.assert_trees_all_equal(updates["head"], GRADS["head"])
    chex.assert_trees_all_equal(updates["dense"], apply(optclip.adaptive_grad_clip(0.01))["dense"])
    for name, update in updates["dense"].items():
        size, most = (np.linalg.norm(x, axis=0) for x in (update, PARAMS["dense"][name]))
        np.testing.assert_allclose(size, 0.01 * np.maximum(most, 1e-3), rtol=1e-5)  # all gradients are far beyond


@pytest.mark.parametrize(
    "limits",
    [
        by_path({"^dense/kernel$": jnp.inf, "^head/kernel$": jnp.inf}, 1.0),
        by_leaf(lambda path, x: jnp.inf if x.ndim == 2 else 1.0),
    ],
)
def test_leaves_that_count_in_the_norm_but_are_not_scaled(limits):
    factor = 1 / norm(*jax.tree.leaves(GRADS))
    expected = jax.tree.map(lambda x: x if x.ndim == 2 else x * np.float32(factor), GRADS)
    for limit in (limits, limits(PARAMS)):
        chex.assert_trees_all_close(apply(optclip.clip_by_global_norm(limit)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        optclip.clip_by_group_norm({"dense": 1.0, "head": 0.1}),
        optclip.clip_by_group_norm(by_path({"^dense/": 1.0}, 0.1)(PARAMS), by_path({"^dense/": "dense"}, "head")),
        optclip.clip_by_group_norm(by_path({"^dense/": 1.0}, 0.1), by_path({"^dense/": "dense"}, "head")),
        optax.partition(
            {"dense": optclip.clip_by_global_norm(1.0), "head": optclip.clip_by_global_norm(0.1)},
            by_path({"^dense/": "dense"}, "head"),
        ),
    ],
    ids=["prefix", "tree of patterns", "patterns", "partition"],
)
def test_a_limit_for_each_group(tx):
    expected = {
        k: scaled(v, limit / norm(*jax.tree.leaves(v))) for (k, v), limit in zip(GRADS.items(), [1.0, 0.1], strict=True)
    }
    chex.assert_trees_all_close(apply(tx), expected, rtol=1e-6)


LIMIT_TREE = {"dense": {"bias": 0.2, "kernel": 0.3}, "head": 0.3}
LIMITED = {
    "clip": optclip.clip,
    "clip, upper": lambda limit: optclip.clip(lower=-0.1, upper=limit),
    "leaf": optclip.clip_by_leaf_norm,
    "unit": optclip.clip_by_unit_norm,
    "block": optclip.clip_by_block_rms,
    "delta": optclip.delta_gclip,
    "mars": optclip.mars_clip,
    "median": optclip.track_median,
    "normalize": optclip.normalize_by_update_norm,
    "stable": lambda limit: optclip.stable_adamw_clip(optax.sgd(1.0), limit),
    "spikes": lambda limit: optclip.skip_spikes(optax.sgd(1.0), limit),
    "masked": lambda limit: optax.masked(optclip.clip_by_leaf_norm(limit), True),
    "observed": lambda limit: optclip.observe(optclip.clip_by_leaf_norm(limit)),
}


@pytest.mark.parametrize("make", list(LIMITED.values()), ids=list(LIMITED))
def test_limits_by_path_are_those_of_the_tree_it_makes(make):
    tx = make(by_path({"bias$": 0.2}, 0.3))
    state = tx.init(PARAMS)
    update, after = jax.jit(tx.update)(GRADS, state, PARAMS)
    chex.assert_trees_all_close(update, apply(make(LIMIT_TREE)), rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, after), after)


def test_limits_by_path_may_be_schedules_and_are_checked():
    tx = optclip.clip_by_leaf_norm(by_path({"bias$": lambda step: 0.1 * (step + 1)}, 0.3))
    state = tx.init(PARAMS)
    for limit in (0.1, 0.2):
        update, state = tx.update(GRADS, state)
        np.testing.assert_allclose(norm(update["dense"]["bias"]), limit, rtol=1e-6)
        np.testing.assert_allclose(norm(update["dense"]["kernel"]), 0.3, rtol=1e-6)
    with pytest.raises(ValueError, match=r"clip_by_leaf_norm\(max_norm=-1.0\): max_norm must be > 0"):
        optclip.clip_by_leaf_norm(by_path({"bias$": -1.0}, 1.0)).init(PARAMS)


def test_a_choice_per_leaf_is_no_schedule():
    choice = by_path({"bias$": 0.2}, 0.3)
    for make in (optclip.adaptive_grad_clip, optclip.zclip, optax.inject_hyperparams(optclip.clip_by_leaf_norm)):
        with pytest.raises(TypeError, match="by_path and by_leaf give a value to each leaf of a tree"):
            apply(make(choice))
    with pytest.raises(TypeError, match=r"clip_tree: max_norm must be a number.*got PerLeaf"):
        optclip.clip_tree(GRADS, choice)


def test_statistics_of_fp8_are_left_alone():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x)

    x = jnp.ones((2, 16))
    variables = Model().init(jax.random.key(0), x)
    grads = jax.grad(lambda v: jnp.sum(Model().apply(v, x) ** 2))(variables)
    assert "_overwrite_with_gradient" in grads
    tx = optax.masked(optclip.clip_by_global_norm(0.1), by_path({"_overwrite_with_gradient": False}, True))
    updates = apply(tx, grads, variables)
    chex.assert_trees_all_equal(updates["_overwrite_with_gradient"], grads["_overwrite_with_gradient"])
    np.testing.assert_allclose(norm(*jax.tree.leaves(updates["params"])), 0.1, rtol=1e-6)
    alone = apply(optclip.clip_by_global_norm(0.1), grads["params"], variables["params"])
    chex.assert_trees_all_equal(updates["params"], alone)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attn = nnx.Linear(4, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)


def test_paths_of_nnx():
    params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    grads = jax.tree.map(jnp.ones_like, params)
    assert sorted(jax.tree.leaves(by_leaf(lambda path, _: path)(params))) == [
        "attn/bias", "attn/kernel", "head/bias", "head/kernel",
    ]  # fmt: skip
    kernels = optax.masked(optclip.clip_by_global_norm(1.0), by_path({"kernel$": True}, False))
    updates = apply(kernels, grads, params)
    values = jax.tree.leaves(updates)
    np.testing.assert_allclose(norm(*(x for x in values if x.ndim == 2)), 1.0, rtol=1e-6)
    assert all(np.all(x == 1) for x in values if x.ndim == 1)
    limits = by_path({"^head": jnp.inf}, 1.0)
    for limit in (limits, limits(params)):
        exempt = apply(optclip.clip_by_global_norm(limit), grads, params)
        chex.assert_trees_all_equal(exempt["head"], grads["head"])
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optclip.clip_by_leaf_norm(limit), wrt=nnx.Param)
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        optimizer.update(model, grads)
        moved = jax.tree.map(lambda new, old: new - old, nnx.state(model, nnx.Param), before)
        chex.assert_trees_all_close(moved["head"], grads["head"], rtol=1e-5)
        np.testing.assert_allclose(norm(moved["attn"]["bias"][...]), 1.0, rtol=1e-5)
    groups = optclip.clip_by_group_norm(1.0, by_path({"^attn": "attn"}, "rest"))
    for part in apply(groups, grads, params).values():
        np.testing.assert_allclose(norm(*jax.tree.leaves(part)), 1.0, rtol=1e-6)


STACKED_RULES = {
    "leaf": partial(optclip.clip_by_leaf_norm, 0.5),
    "rms": partial(optclip.clip_by_block_rms, 0.05),
    "unit": partial(optclip.clip_by_unit_norm, 0.2),
    "agc": partial(optclip.adaptive_grad_clip, 0.01),
}


def linen_layers():
    """Parameters of three layers that ``nn.scan`` stacks, beside a leaf that is one layer."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(4)(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="layers")(
                x, None
            )
            return nn.Dense(2, name="head")(x)

    return Model().init(jax.random.key(0), jnp.ones((1, 4)))["params"]


def nnx_layers():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def layers(rngs: nnx.Rngs):
        return nnx.Linear(4, 4, rngs=rngs)

    params = {"layers": layers(nnx.Rngs(0)), "head": nnx.Linear(4, 2, rngs=nnx.Rngs(1))}
    return {k: nnx.to_pure_dict(nnx.state(v, nnx.Param)) for k, v in params.items()}


@pytest.mark.parametrize("layers", [linen_layers, nnx_layers])
@pytest.mark.parametrize("rule", STACKED_RULES)
def test_stacked_layers_are_clipped_one_by_one(rule, layers):
    params = layers()
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape), np.float32), params)
    grads["layers"] = jax.tree.map(
        lambda x: x * np.float32([1, 30, 1e-3]).reshape(3, *[1] * (x.ndim - 1)), grads["layers"]
    )
    stacked = apply(STACKED_RULES[rule](stack_axis=by_path({"^layers/": 0}, None)), grads, params)
    take = lambda tree, i: {k: jax.tree.map(lambda x: x[i], v) if k == "layers" else v for k, v in tree.items()}
    for i in range(3):
        one = apply(STACKED_RULES[rule](), take(grads, i), take(params, i))
        chex.assert_trees_all_close(take(stacked, i), one, rtol=1e-6)


def test_a_pattern_that_is_found_nowhere_is_warned_of():
    tree = {"params": {"head": jnp.ones(2), "body": jnp.ones(3)}}
    with pytest.warns(UserWarning, match=r"by_path: '\^head/' is found in no path.*such as 'params/body'"):
        by_path({"^head/": False, "body": False}, True)(tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_path({"head": False}, True)(tree)
        by_path({"head": False}, True)({"head": optax.MaskedNode(), "body": jnp.ones(2)})  # of another group
        by_path({"head": False}, True)({})
