"""Statistics: kept as vectors, read as trees, whatever is done to a state in between."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import chex
import cloudpickle
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from jax import lax

import optclip
from optclip.measures import leaf_norm
from tests import oracles
from tests.cases import GRADS, PARAMS
from tests.harness import assert_bits, assert_close

NORMS = jax.tree.map(np.float32, oracles.leaf_norm(GRADS[0]))
STACKED = {"layers": jnp.arange(24.0).reshape(2, 3, 4), "bias": jnp.ones(3), "scale": jnp.full(2, 2.0)}


def per_leaf(grads=GRADS[0], tx=None):
    tx = tx or optclip.clip_by_leaf_norm(0.5)
    return tx.update(grads, tx.init(grads))[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: optclip.clip_by_leaf_norm(1.0),
        lambda: optclip.clip_by_block_rms(1.0),
        lambda: optclip.adagc(),
        lambda: optclip.autoclip(measure=leaf_norm),
        lambda: optclip.clip_by_group_norm(1.0, lambda tree: {k: int(k) % 7 for k in tree}),
        lambda: optclip.larc_clip(0.1),
    ],
)
def test_a_state_has_as_many_buffers_for_two_leaves_as_for_forty(make):
    def buffers(n):
        tree = {str(i): jnp.ones(i + 1) for i in range(n)}
        tx = make()
        state = jax.jit(tx.update)(tree, tx.init(tree), tree)[1]
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(tree))
        return len(jax.tree.leaves(state))

    assert buffers(2) == buffers(40)


def test_statistics_are_read_as_trees():
    stats = per_leaf().stats
    assert_close(stats.sizes, NORMS, rtol=1e-6)
    assert stats.limits.shape == () and float(stats.limits) == 0.5
    bias = stats.sizes["dense"]["bias"]
    assert isinstance(bias, jax.Array) and bias.shape == ()
    assert_bits(optclip.ClipStats(stats.sizes, stats.limits).sizes, stats.sizes)
    assert repr(stats).startswith("ClipStats(kept_sizes=Packed_") and repr(jax.tree.map(jnp.sum, stats))


LOADS = """
import pickle, sys, jax, jax.numpy as jnp, optclip
optclip.clip_by_leaf_norm(1.0).init({"some": 1.0, "other": 1.0, "state": 1.0})
treedef = jax.tree.structure(optclip.clip_by_leaf_norm(1.0).init({"a": jnp.ones(3), "b": jnp.ones(2)}))
for treedefs in map(pickle.loads, eval(sys.stdin.read())):
    assert treedefs == [treedef, treedef]
"""


def test_structures_and_states_are_pickled_for_another_process():
    """As those who store a compiled step, or call workers, do."""
    state = optclip.clip_by_leaf_norm(1.0).init({"a": jnp.ones(3), "b": jnp.ones(2)})
    treedef = jax.tree.structure(state)
    dumps = [dump([treedef, treedef]) for dump in (pickle.dumps, cloudpickle.dumps)]
    subprocess.run([sys.executable, "-c", LOADS], input=repr(dumps), text=True, check=True)
    for dump in (pickle.dumps, cloudpickle.dumps):
        again = pickle.loads(dump(state))
        assert jax.tree.structure(again) == treedef
        assert_bits(again, state)


def test_states_of_one_structure_are_of_one_type_whoever_made_them():
    with ThreadPoolExecutor(8) as pool:
        grads = [{f"made by {i // 8}": jnp.ones(2), "beside": jnp.ones(3)} for i in range(80)]
        kinds = list(pool.map(lambda g: jax.tree.structure(per_leaf(g)), grads))
    assert all(kinds[i] == kinds[i // 8 * 8] for i in range(80)) and len(set(kinds)) == 10


def test_scalars_and_arrays_side_by_side():
    tx = optclip.clip_by(lambda tree: leaf_norm(tree, stack_axis={"layers": 0, "bias": None, "scale": None}), 1.0)
    state = per_leaf(STACKED, tx)
    assert len(jax.tree.leaves(state.stats)) == 3  # two scalars as one vector, the layers, and the limit
    layers = np.linalg.norm(np.arange(24.0).reshape(2, 12), axis=1).reshape(2, 1, 1)
    assert_close(state.stats.sizes, {"layers": layers, "bias": np.sqrt(3), "scale": np.sqrt(8)}, rtol=1e-6)
    with pytest.raises(ValueError, match=r"updates do not fit the state.*\(3, 1, 1\).*had.*\(2, 1, 1\)"):
        tx.update(STACKED | {"layers": jnp.ones((3, 3, 4))}, state)


def test_sizes_of_two_dtypes_keep_them():
    with jax.enable_x64(True):
        tx = optclip.clip_by(lambda tree: jax.tree.map(lambda x: jnp.max(jnp.abs(x)), tree), 1.0)
        grads = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.float32), "c": jnp.ones(3, jnp.float32)}
        sizes = per_leaf(grads, tx).stats.sizes
        assert [x.dtype for x in sizes.values()] == [jnp.float64, jnp.float32, jnp.float32]


MEASURED = {
    "of the dtype of each leaf": lambda tree: jax.tree.map(lambda x: jnp.max(jnp.abs(x)), tree),
    "python": lambda tree: {k: 2.0 for k in tree},
    "numpy": lambda tree: {k: np.float32(i) if i else jnp.ones(()) for i, k in enumerate(tree)},
}


@pytest.mark.parametrize("measure", list(MEASURED.values()), ids=list(MEASURED))
def test_a_state_keeps_its_form_whatever_is_measured(measure):
    grads = {"a": jnp.ones(3), "b": jnp.ones(4), "c": jnp.ones(2)}
    tx = optclip.clip_by(measure, 1.0)
    state = tx.init(grads)
    for step in (grads, grads | {"b": jnp.ones(4, jnp.bfloat16)}):
        chex.assert_trees_all_equal_shapes_and_dtypes(tx.update(step, state)[1], state)


def test_a_state_stacked_along_another_axis_is_no_tree_of_leaves():
    states = [per_leaf(g).stats for g in GRADS[:3]]
    with pytest.raises(ValueError, match=r"last axis of a state holds 4 statistics, got one of shape \(4, 3\)"):
        jax.tree.map(lambda *x: jnp.stack(x, -1), *states).sizes  # noqa: B018


def test_a_state_is_a_pytree_like_any_other():
    state = per_leaf()
    leaves, treedef = jax.tree.flatten(state)
    for other in (leaves, [object() for _ in leaves], [None for _ in leaves], [np.asarray(x) for x in leaves]):
        again = treedef.unflatten(other)
        assert jax.tree.flatten(again, is_leaf=lambda x: x is None)[1] == treedef
    assert jax.tree.structure(jax.tree.map(jnp.sum, jax.tree.map(lambda x: x[None], state))) == treedef
    assert len({str(path) for path, _ in jax.tree.leaves_with_path(state)}) == len(leaves)
    assert jax.tree.structure(per_leaf({"other": jnp.ones(3), "names": jnp.ones(4), "x": 1.0, "y": 2.0})) != treedef


def test_what_stands_for_the_numbers_can_be_read_too():
    state = per_leaf()
    shapes = jax.eval_shape(lambda: state).stats.sizes
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: ((), x.dtype), NORMS)
    places = jax.tree.map(lambda x: x.sharding, state).stats.sizes
    assert jax.tree.structure(places) == jax.tree.structure(NORMS)
    host = jax.device_get(state).stats.sizes
    assert_bits(host, jax.device_get(state.stats.sizes))
    assert isinstance(host["dense"]["bias"], np.generic | np.ndarray)
    read = jax.jit(lambda s: s.stats.sizes["head"]["scale"])(state)
    assert_bits(read, state.stats.sizes["head"]["scale"])


def stacked():
    tx = optclip.adagc(warmup=1)
    many = jax.tree.map(lambda *x: jnp.stack(x), *GRADS[:3])
    return tx, many, jax.vmap(tx.init)(many)


def test_states_of_a_vmap():
    tx, many, state = stacked()
    after = jax.jit(jax.vmap(tx.update))(many, state)[1]
    alone = [per_leaf(g, tx) for g in GRADS[:3]]
    for field in ("sizes", "limits"):
        want = jax.tree.map(lambda *x: np.stack(x), *(getattr(a.stats, field) for a in alone))
        assert_close(getattr(after.stats, field), want, rtol=1e-6)
    got = jax.vmap(optclip.summary)(after)
    want = np.stack([optclip.summary(a)["clip/preclip_norm"] for a in alone])
    assert_close(got["clip/preclip_norm"], want, rtol=1e-6)


def ways():
    yield "flax", lambda x, like: flax.serialization.from_bytes(like, flax.serialization.to_bytes(x))
    yield "pickle", lambda x, like: pickle.loads(pickle.dumps(jax.device_get(x)))
    yield "copy", lambda x, like: copy.deepcopy(copy.copy(x))


def test_a_copy_of_a_vmapped_state_has_its_structure():
    state = stacked()[2]
    frozen = jax.vmap(optclip.clip_by_leaf_norm(1.0).init)(FrozenDict({"a": jnp.ones((3, 2)), "b": jnp.ones((3, 4))}))
    for one in (state, frozen):
        for again in (copy.deepcopy(one), copy.copy(one), pickle.loads(pickle.dumps(one))):
            assert jax.tree.structure(again) == jax.tree.structure(one)
            assert_bits(again, one)


@pytest.mark.parametrize(("name", "through"), list(ways()), ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("many", [False, True], ids=["one", "vmap"])
def test_restored_states_go_on_in_a_scan(name, through, many):
    tx, grads, start = stacked()
    update = jax.vmap(tx.update) if many else tx.update
    if not many:
        grads, start = GRADS[0], tx.init(GRADS[0])
    after = jax.jit(update)(grads, start)[1]
    back = through(after, start)
    assert jax.tree.structure(back) == jax.tree.structure(after)
    assert_bits(back.stats.sizes, after.stats.sizes)
    step = lambda state, _: update(grads, state)[::-1]
    steps = lambda state: lax.scan(step, jax.tree.map(jnp.asarray, state), None, 3)
    (end, updates), (want, right) = jax.jit(steps)(back), jax.jit(steps)(after)
    assert_bits((end.stats.sizes, end.rule, updates), (want.stats.sizes, want.rule, right))


def test_flax_saves_statistics_as_they_are_kept():
    state = per_leaf()
    saved = flax.serialization.to_state_dict(state)["stats"]
    assert_bits(saved["kept_sizes"]["numbers"], state.stats.kept_sizes.numbers)
    assert_bits(saved["kept_limits"], state.stats.limits)


def test_the_tree_may_be_of_any_kind():
    grads = FrozenDict({"a": jnp.ones(4), "b": (jnp.ones(9), [jnp.ones(16), None])})
    sizes = per_leaf(grads).stats.sizes
    assert jax.tree.structure(sizes) == jax.tree.structure(grads) and jax.tree.leaves(sizes) == [2, 3, 4]


def test_updates_of_another_tree_are_told_by_both():
    state, other = per_leaf(), {**PARAMS, "third": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"updates do not fit the state.*'third'.*had.*'head'"):
        optclip.clip_by_leaf_norm(0.5).update(other, state)
