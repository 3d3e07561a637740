"""The contract, item 6: every kind of leaf and container works or raises one clear error, and none changes its type."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import optclip
from tests import meshes
from tests.cases import GRADS, PARAMS
from tests.harness import assert_close, avals, cases, each_case, finite, standard_run

BARE = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([[0.5, 2.0], [-1.0, 0.1]])}


@jax.tree_util.register_pytree_with_keys_class
class Pair:
    """A container that jax knows only because it is registered."""

    def __init__(self, left, right):
        self.left, self.right = left, right

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return ((key("left"), self.left), (key("right"), self.right)), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def step(case, grads, compiled=True):
    tx = case.make()
    state = tx.init(grads)
    update, after = (jax.jit(tx.update) if compiled else tx.update)(grads, state, grads)
    assert avals(after) == avals(state)
    return update


@each_case
def test_leaves_without_a_gradient_pass_untouched_and_count_for_nothing(case):
    others = {
        "none": None,
        "int": jnp.arange(3),
        "bool": np.array([True, False]),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "masked": optax.MaskedNode(),
        "no": {},
        "number": 7,
    }
    update = step(case, {"x": BARE, "y": others}, compiled=False)
    for name, other in others.items():
        assert type(update["y"][name]) is type(other) or isinstance(update["y"][name], jax.Array), name
        if name not in ("none", "masked", "no"):
            if name == "number":
                assert jnp.result_type(update["y"][name]) == jnp.int32  # what a Python 7 is to jax
            else:
                assert np.asarray(update["y"][name]).dtype == np.asarray(other).dtype, name
            np.testing.assert_array_equal(update["y"][name], other)
    assert_close(update["x"], step(case, {"x": BARE})["x"], rtol=1e-6)


@each_case
def test_floats_of_every_kind_keep_shape_and_type(case):
    empty = {"none": jnp.zeros((0,)), "wide": jnp.zeros((2, 0, 3)), "scalar": jnp.asarray(0.5, jnp.float16)}
    grads = {**BARE, **empty, "weak": jnp.asarray(2.0), "numpy": np.array([1.0, 2.0], np.float32)}
    assert grads["weak"].weak_type
    update = step(case, grads)
    assert avals(update) == avals(grads)
    assert finite(update)
    plain = step(case, {"w": BARE, "number": 2.0}, compiled=False)
    assert plain["number"].weak_type and plain["number"].dtype == jnp.float32, "a Python float stays a weak float"


@each_case
def test_complex_leaves_work_or_raise_one_clear_error(case):
    grads = {"z": jnp.array([3.0 + 4.0j, 1.0j]), "x": jnp.array([1.0])}
    if not case.takes_complex:
        with pytest.raises(TypeError, match="complex"):
            step(case, grads)
        return
    update = step(case, grads)
    assert update["z"].dtype == jnp.complex64
    if case.keeps_direction:
        ratio = np.asarray(update["z"]) / np.asarray(grads["z"])
        np.testing.assert_allclose(ratio.imag, 0, atol=1e-6)


@each_case
def test_the_empty_tree_and_a_single_array_work(case):
    for nothing in ({}, None, {"a": optax.MaskedNode(), "b": None}):
        if nothing is None and case.needs_params:
            continue  # not to be told from parameters that were left out
        assert jax.tree.structure(step(case, nothing)) == jax.tree.structure(nothing)
    one = BARE["b"]
    assert avals(step(case, one)) == avals(one)


@each_case
def test_containers_come_back_as_they_were(case):
    want = jax.tree.leaves(step(case, (BARE["a"], BARE["b"])))
    for grads in (Pair(BARE["a"], BARE["b"]), flax.core.freeze(BARE)):
        if case.scope == "group" and isinstance(grads, flax.core.FrozenDict):
            continue  # the labels of the row know plain dicts
        update = step(case, grads)
        assert type(update) is type(grads)
        assert_close(jax.tree.leaves(update), want, rtol=1e-6)


@each_case
def test_nnx_states_come_back_as_they_were(case):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    grads = nnx.state(model, nnx.Param)
    update = step(case, grads)
    assert jax.tree.structure(update) == jax.tree.structure(grads)
    assert avals(update) == avals(grads)


@each_case
def test_mesh_axes_noted_on_parameters_go_on_to_arrays_of_their_shape_alone(case):
    tx, is_box = case.make(), lambda x: isinstance(x, nn.Partitioned)
    params = jax.tree.map(lambda x: nn.Partitioned(x, ("data", "model")[: x.ndim]), PARAMS)
    state = jax.eval_shape(tx.init, params)
    update, after = jax.eval_shape(tx.update, params, state, params)
    assert avals(update) == avals(params) and avals(after) == avals(state)
    shapes = {x.shape for x in jax.tree.leaves(PARAMS)}
    boxes = [x for x in jax.tree.leaves(state, is_leaf=is_box) if is_box(x)]
    assert all(x.value.shape in shapes and len(x.names) == x.value.ndim for x in boxes)


class Sharded(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((2, 4, 4)), out_sharding=(None, "data", "model"))
        self.bias = nnx.Param(jnp.ones((2, 4)), out_sharding=(None, "model"))


@pytest.mark.parametrize("tx", [
    optclip.clip_by_global_norm(0.1), optclip.clip_by_leaf_norm(0.1, stack_axis=0), optclip.clip_by_leaf_norm(0.1),
    optclip.adaptive_grad_clip(0.1, record=True), optclip.adagc(warmup=1),
    optclip.percentile_clipping(measure=optclip.measures.unit_norm), optclip.observe(history=2),
])  # fmt: skip
def test_sharded_variables_of_nnx(tx):
    with jax.set_mesh(meshes.mesh()):
        model = Sharded()
        optimizer = nnx.Optimizer(model, optax.chain(tx, optax.adam(0.1)), wrt=nnx.Param)
        for _ in range(2):
            nnx.jit(lambda m, o: o.update(m, nnx.state(m)))(model, optimizer)
        for x, spec in zip(
            *map(jax.tree.leaves, (nnx.state(optimizer), nnx.get_partition_spec(nnx.state(optimizer)))), strict=True
        ):
            jax.sharding.NamedSharding(meshes.mesh(), spec).shard_shape(x.shape)  # raises where it does not fit
    optclip.summary(optimizer.opt_state)


@cases(history=False)
def test_float8_leaves_are_clipped_in_float8(case):
    grads = {"w": jnp.array([3.0, -4.0], jnp.float8_e4m3fn), "b": jnp.array([1.0])}
    update = step(case, grads)
    assert avals(update) == avals(grads) and finite(update)


def test_keys_pass():
    key = {"key": jax.random.key(0), "w": jnp.array([3.0, 4.0])}
    tx = optclip.clip_by_leaf_norm(1.0)
    update, _ = tx.update(key, tx.init(key))
    assert update["key"] is key["key"]


@cases(needs_params=True)
def test_missing_parameters_are_named(case):
    tx = case.make()
    with pytest.raises(ValueError, match=rf"{case.public} needs the parameters, because .*update\(updates, state, par"):
        tx.update(GRADS[0], tx.init(PARAMS))


@cases(needs_params=False, wrapper=False)
def test_parameters_are_not_needed(case):
    tx = case.make()
    assert_close(jax.jit(tx.update)(GRADS[0], tx.init(PARAMS))[0], standard_run(case)[0][0], rtol=2e-6)


@each_case
def test_unknown_extra_arguments_are_accepted(case):
    tx = case.make()
    update, _ = jax.jit(tx.update)(GRADS[0], tx.init(PARAMS), PARAMS, value=jnp.float32(1), grad=GRADS[0], anything=3)
    assert_close(update, standard_run(case)[0][0], rtol=2e-6)


@cases(scope=lambda scope: scope in ("leaf", "unit", "group"), wrapper=False)
def test_updates_of_another_structure_than_init_saw_are_refused(case):
    tx = case.make()
    state = tx.init(PARAMS)
    if not jax.tree.leaves(state):
        return  # nothing is kept, so nothing can be mismatched
    other = {"dense": PARAMS["dense"], "third": PARAMS["head"]}
    with pytest.raises((ValueError, TypeError)) as error:
        tx.update(other, state, other)
    assert len(str(error.value)) < 2000


def test_what_does_not_fit_the_state_is_shown():
    tx = optclip.clip_by_leaf_norm(1.0)
    with pytest.raises(ValueError, match=r"updates do not fit the state.*'third'.*had.*'head'"):
        tx.update({"third": jnp.ones(2)}, tx.init({"head": jnp.ones(2)}))
    tx = optclip.clip_by_unit_norm(1.0, record=True)
    with pytest.raises(ValueError, match=r"updates do not fit the state.*\(1, 3\).*had.*\(1, 2\)"):
        tx.update(jnp.ones((4, 3)), tx.init(jnp.ones((4, 2))))


@each_case
def test_init_takes_shapes_for_parameters(case):
    tx = case.make()
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert avals(shapes) == avals(tx.init(PARAMS))
