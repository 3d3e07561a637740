"""Measures on shards: which axes are summed over, what is never mixed, what is refused."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from optclip import _mesh, by_path, measures
from tests import meshes
from tests.meshes import SPECS, UNITS, WHOLE

TREE = meshes.draw(0, 2.0)
UNIT_SPECS = {"dense": {"bias": P(), "kernel": P(None, "model")}, "head": {"kernel": P(), "scale": P()}}
AXES = {"dense": {"bias": 0, "kernel": 1}, "head": {"kernel": (0, 1), "scale": ()}}
AXES_SPECS = {"dense": {"bias": P(), "kernel": P("data")}, "head": {"kernel": P(), "scale": P()}}
GROUPS = {"dense": {"bias": "vector", "kernel": "matrix"}, "head": "matrix"}
NAMED = by_path({"^dense/kernel": ("data", "model"), "scale": None}, "model")  # WHOLE, as a function


def on_shards(f: Any, tree: Any = TREE, out: Any = None, checked: bool = True, mesh: Any = None, **options: Any) -> Any:
    mesh, out = mesh or meshes.mesh(), P() if out is None else out
    specs = options.pop("in_specs", SPECS)
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=checked, **options))(tree)


def all_sizes(tree: Any, whole: Any = None, units: Any = None, across: Any = None) -> dict[str, Any]:
    """Every measure of a tree, told its mesh axes: for whole leaves, for units, and for units of `AXES`."""
    return {
        "global": {p: measures.global_norm(tree, p, axis_name=whole) for p in (1, 2, 3, np.inf)},
        "group": measures.group_norm(tree, GROUPS, axis_name=whole),
        "leaf": measures.leaf_norm(tree, axis_name=whole),
        "largest": measures.leaf_norm(tree, np.inf, axis_name=whole),
        "rms": measures.leaf_rms(tree, axis_name=whole),
        "units": measures.unit_norm(tree, axis_name=units),
        "rows": measures.unit_norm(tree, AXES, axis_name=across),
    }


def all_specs() -> dict[str, Any]:
    return {k: P() for k in ("global", "group", "leaf", "largest", "rms")} | {"units": UNIT_SPECS, "rows": AXES_SPECS}


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
@pytest.mark.parametrize("way", ["auto", "explicit", "checked", "unchecked", "named"])
def test_all_measures(way: str, scale: float):
    tree = jax.tree.map(lambda x: x * np.float32(scale), TREE)
    expected = all_sizes(tree)
    across = {"dense": {"bias": "model", "kernel": "model"}, "head": {"kernel": "model", "scale": None}}
    if way in ("auto", "explicit"):
        kind = AxisType.Auto if way == "auto" else AxisType.Explicit
        sizes = jax.jit(all_sizes)(meshes.place(tree, SPECS, meshes.mesh(kind)))
    else:
        whole = {"checked": None, "unchecked": WHOLE, "named": NAMED}[way]
        run = partial(all_sizes, whole=whole, units=UNITS, across=across)
        sizes = on_shards(run, tree, all_specs(), checked=way == "checked")
    chex.assert_trees_all_close(sizes, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("way", ["auto", "checked", "unchecked"])
def test_what_is_not_finite_on_one_shard_reaches_all(way: str, bad: float):
    def not_finite(tree: Any, whole: Any = None) -> list[Any]:
        norms = [measures.global_norm(tree, p, axis_name=whole) for p in (1, 2, np.inf)]
        return [jnp.isfinite(n) for n in norms]

    shards = []
    for row in (0, 3):  # the first and the last shard: a maximum forgets a NaN in either, or in all but one
        tree = {**TREE, "head": {**TREE["head"], "kernel": TREE["head"]["kernel"].copy()}}
        tree["head"]["kernel"][2 * row, 1] = bad
        if way == "auto":
            shards += jax.jit(not_finite)(meshes.place(tree, SPECS, meshes.mesh()))
        else:
            run = partial(not_finite, whole=None if way == "checked" else WHOLE)
            shards += on_shards(run, tree, checked=way == "checked")
    assert not any(map(bool, shards))


def test_where_types_are_checked_names_count_for_leaves_that_vary():
    expected = measures.global_norm(TREE)
    for names in (("data", "model"), ("model", "data"), WHOLE):
        size = on_shards(partial(measures.global_norm, axis_name=names))
        np.testing.assert_allclose(size, expected, rtol=1e-6)


@pytest.mark.parametrize("checked", [True, False])
def test_axes_that_are_not_named_keep_replicas_apart(checked: bool):
    """A gradient that differs along the data axis makes a norm for each replica, unless its types are read."""

    def per_replica(tree: Any) -> Any:
        mine = {"w": tree["w"] * (1.0 + lax.axis_index("data")), "b": tree["b"]}
        return jnp.reshape(measures.global_norm(mine, axis_name={"w": "model", "b": None}), (1,))

    tree = {"w": np.arange(4, dtype=np.float32), "b": np.ones(3, np.float32)}
    sizes = on_shards(per_replica, tree, P("data"), checked, in_specs={"w": P("model"), "b": P()})
    np.testing.assert_allclose(sizes, [np.sqrt(14 + 3), np.sqrt(56 + 3)], rtol=1e-6)


def test_sizes_of_units_are_not_mixed_along_axes_that_shard_the_units():
    tree = {
        "a": np.float32(np.random.default_rng(0).normal(size=(4, 4))),
        "b": np.float32(np.random.default_rng(1).normal(size=(4, 4))),
    }
    specs, names = {"a": P("data"), "b": P("model", "data")}, {"a": "data", "b": "model"}
    out = {"a": P(), "b": P(None, "data")}
    for checked in (True, False):
        sizes = on_shards(partial(measures.unit_norm, axis_name=names), tree, out, checked, in_specs=specs)
        chex.assert_trees_all_close(sizes, measures.unit_norm(tree), rtol=1e-6)


@pytest.mark.parametrize("measure", [measures.leaf_norm, measures.leaf_rms])
def test_layers_may_be_sharded(measure: Any):
    tree = {"layers": np.float32(np.random.default_rng(0).normal(size=(4, 2, 6))), "head": np.ones((4, 2), np.float32)}
    specs = {"layers": P("data", None, "model"), "head": P("model")}
    measure = partial(measure, stack_axis={"layers": 0, "head": None})
    names = {"layers": "model", "head": "model"}
    for checked in (True, False):
        sizes = on_shards(
            partial(measure, axis_name=names), tree, {"layers": P("data"), "head": P()}, checked, in_specs=specs
        )
        chex.assert_trees_all_close(sizes, measure(tree), rtol=1e-6)
    with pytest.raises(ValueError, match=r"layers of a leaf that varies over the mesh axes.*need axis_name="):
        on_shards(measure, tree, in_specs=specs)


def grads_of(tree: Any, p: float) -> Any:
    return jax.grad(lambda t: measures.global_norm(t, p))(tree)


@pytest.mark.parametrize("p", [1, 2, np.inf])
def test_derivatives_where_types_are_checked(p: float):
    chex.assert_trees_all_close(on_shards(partial(grads_of, p=p), out=SPECS), grads_of(TREE, p), rtol=1e-6)


@pytest.mark.parametrize("checked", [True, False])
def test_inside_vmap_jit_and_scan(checked: bool):
    measure = partial(measures.global_norm, axis_name=None if checked else WHOLE)
    one, many = float(measures.global_norm(TREE)), jax.tree.map(lambda x: np.stack([x, 2 * x]), TREE)
    pair = on_shards(jax.vmap(measure), many, checked=checked, in_specs=meshes.steps(SPECS))
    np.testing.assert_allclose(pair, [one, 2 * one], rtol=1e-6)
    np.testing.assert_allclose(on_shards(jax.jit(measure), checked=checked), one, rtol=1e-6)
    loop = lambda trees: lax.scan(lambda c, t: (c + measure(t), None), jnp.zeros(()), trees)[0]
    np.testing.assert_allclose(on_shards(loop, many, checked=checked, in_specs=meshes.steps(SPECS)), 3 * one, rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("checked", [True, False])
def test_some_axes_manual_and_some_not(kind: AxisType, checked: bool):
    mesh = meshes.mesh(kind)
    manual = {"dense": {"bias": P(), "kernel": P("data")}, "head": {"kernel": P(), "scale": P()}}
    names = {"dense": {"bias": None, "kernel": "data"}, "head": None}
    size = on_shards(
        partial(measures.global_norm, axis_name=None if checked else names),
        meshes.place(TREE, SPECS, mesh), checked=checked, mesh=mesh, in_specs=manual, axis_names={"data"},
    )  # fmt: skip
    np.testing.assert_allclose(size, measures.global_norm(TREE), rtol=1e-6)
    units = on_shards(
        partial(measures.unit_norm, axis_name=names),
        meshes.place(TREE, SPECS, mesh), checked=checked, mesh=mesh, in_specs=manual, axis_names={"data"},
    )  # fmt: skip
    chex.assert_trees_all_close(units, measures.unit_norm(TREE), rtol=1e-6)


def test_a_named_vmap_is_a_mesh_too():
    many = jax.tree.map(lambda x: np.stack([x, 2 * x]), TREE)
    sizes = jax.vmap(partial(measures.global_norm, axis_name="shard"), axis_name="shard")(many)
    np.testing.assert_allclose(sizes, np.sqrt(5) * measures.global_norm(TREE), rtol=1e-6)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(
    "measure",
    [
        measures.global_norm,
        partial(measures.global_norm, ord=np.inf),
        measures.leaf_norm,
        partial(measures.group_norm, groups=GROUPS),
    ],
)
def test_one_collective_in_all(measure: Any, checked: bool):
    run = partial(measure, axis_name=None if checked else WHOLE)
    f = jax.shard_map(run, mesh=meshes.mesh(), in_specs=(SPECS,), out_specs=P(), check_vma=checked)
    assert jax.jit(f).lower(TREE).as_text().count("stablehlo.all_reduce") == 1


@pytest.mark.parametrize("measure", [measures.global_norm, measures.leaf_norm, measures.leaf_rms, measures.unit_norm])
def test_refused_where_types_are_not_checked(measure: Any):
    with pytest.raises(
        ValueError, match=r"shard_map\(check_vma=False\) or pmap over the mesh axes \('data', 'model'\)"
    ):
        on_shards(measure, checked=False)
    with pytest.raises(ValueError, match="pass axis_name="):
        jax.pmap(measure, axis_name="row")(jax.tree.map(lambda x: np.stack([x, x]), TREE))
    with pytest.raises(ValueError, match="pass axis_name="):
        jax.pmap(measure)(jax.tree.map(lambda x: np.stack([x, x]), TREE))


def test_replicated_gradients_in_pmap():
    twice = jax.tree.map(lambda x: np.stack([x, x]), TREE)
    sizes = jax.pmap(partial(measures.global_norm, axis_name=()), devices=meshes.devices(2))(twice)
    np.testing.assert_allclose(sizes, [measures.global_norm(TREE)] * 2, rtol=1e-6)


def test_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"axis_name='rows' names no axis that is bound here.*under jit"):
        jax.jit(partial(measures.global_norm, axis_name="rows"))(TREE)
    with pytest.raises(ValueError, match=r"axis_name=.* must be a name, a tuple of names, or a prefix tree"):
        on_shards(partial(measures.global_norm, axis_name={"dense": "model"}))
    with pytest.raises(ValueError, match=r"sizes of units .* varies over the mesh axes .* need axis_name="):
        on_shards(measures.unit_norm)
    with pytest.raises(ValueError, match=r"a shard of shape \(1, 4\) does not tell .* pass axis="):
        on_shards(
            partial(measures.unit_norm, axis_name="data"), {"w": TREE["dense"]["kernel"][:2]}, in_specs={"w": P("data")}
        )
    flat = {"w": np.ones((1, 4), np.float32)}
    kept = on_shards(
        partial(measures.unit_norm, axis=0, axis_name=()), flat, {"w": P(None, "data")}, in_specs={"w": P(None, "data")}
    )
    np.testing.assert_array_equal(kept["w"], np.ones((1, 4)))


def test_an_unreduced_gradient_is_refused():
    mesh = meshes.mesh(AxisType.Explicit)
    weights = jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, P(None, None, reduced={"data"})))
    rows = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)))(weights, rows)
        for f in (measures.global_norm, measures.unit_norm, optclip.clip_by_leaf_norm(1.0).init):
            with pytest.raises(ValueError, match=r"is unreduced over the mesh axes .*'data'"):
                f({"w": grad})
        whole = jax.reshard(grad, NamedSharding(mesh, P()))
        np.testing.assert_allclose(measures.global_norm({"w": whole}), np.linalg.norm(np.asarray(whole)), rtol=1e-6)


def test_decisions_and_averages():
    def decide(x: Any) -> Any:
        return (
            _mesh.agree(x[0] > 2.5),
            _mesh.agree(x[0] > 9),
            jnp.reshape(_mesh.agree(x[0] > 2.5, ()), (1,)),
            _mesh.average(x[0]),
        )

    for checked in (True, False):
        some, none, own, mean = on_shards(decide, np.arange(4.0), (P(), P(), P(("data", "model")), P()), checked,
                                          in_specs=P(("data", "model")))  # fmt: skip
        assert bool(some) and not bool(none) and float(mean) == 1.5
        np.testing.assert_array_equal(own, [False, False, False, True])
    assert bool(_mesh.agree(jnp.asarray(True))) and float(_mesh.average(jnp.float32(3))) == 3


def test_units_of_small_leaves_move_no_shards():
    """Where ``in_shardings`` alone says how leaves are sharded, what types do not tell."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    columns = [NamedSharding(mesh, P(None, "d"))] * 6
    tree = [jax.ShapeDtypeStruct((64, 32), jnp.float32)] * 6
    sizes = jax.jit(measures.unit_norm, in_shardings=(columns,), out_shardings=columns)
    text = sizes.lower(tree).compile().as_text()
    assert not [move for move in ("all-gather", "all-to-all", "collective-permute") if f" {move}(" in text]
