"""States and guards on a mesh: shardings that stay, states from in and outside, one decision for all devices."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from optclip import measures
from tests import meshes
from tests.meshes import SPECS, UNITS, WHOLE

PARAMS = meshes.draw(0)
GRADS = [meshes.draw(i + 1, 3.0 if i == 2 else 0.5) for i in range(4)]
STACKED = jax.tree.map(lambda *x: np.stack(x), *GRADS)

TXS = {
    "tree": lambda axes: optclip.clip_by_ema(1.2, warmup=1, measure=partial(measures.global_norm, axis_name=axes)),
    "leaf": lambda axes: optclip.clip_by_ema(1.2, warmup=1, measure=partial(measures.leaf_norm, axis_name=axes)),
    "unit": lambda axes: optclip.clip_by_ema(1.2, warmup=1, measure=partial(measures.unit_norm, axis_name=axes)),
    "agc": lambda axes: optclip.adaptive_grad_clip(0.1, axis_name=axes, record=True),
    "buffer": lambda axes: optclip.u_clip(optclip.clip_by_global_norm(0.5, axis_name=axes), axis_name=axes),
}
UNIT_WISE = ("unit", "agc")


@pytest.mark.parametrize("name", TXS)
def test_explicit_shardings_never_change(name: str):
    mesh, tx = meshes.mesh(AxisType.Explicit), TXS[name](None)
    params, grads = (meshes.place(tree, SPECS, mesh) for tree in (PARAMS, GRADS[0]))
    traces = []

    @jax.jit
    def step(grads: Any, state: Any, params: Any) -> Any:
        traces.append(1)
        return tx.update(grads, state, params)

    with jax.set_mesh(mesh):
        state = tx.init(params)
        expected = jax.tree.map(jax.typeof, (params, state))
        for _ in range(3):
            updates, state = step(grads, state, params)
            assert jax.tree.map(jax.typeof, (updates, state)) == expected
        assert jax.tree.map(jax.typeof, (params, jax.jit(tx.init)(params))) == expected
    assert len(traces) == 1


def test_explicit_shardings_are_read_and_observed():
    mesh, grads = meshes.mesh(AxisType.Explicit), meshes.place(GRADS[2], SPECS, meshes.mesh(AxisType.Explicit))
    stacked = {"dense": {"bias": None, "kernel": 0}, "head": {"kernel": 1, "scale": None}}
    for tx in (
        TXS["agc"](None),
        optclip.clip_by_leaf_norm(0.1, stack_axis=stacked),
        optclip.skip_spikes(optax.identity(), 1e3, measure=measures.unit_norm),
    ):
        _, expected = tx.update(GRADS[2], tx.init(PARAMS), PARAMS)
        with jax.set_mesh(mesh):
            _, state = jax.jit(tx.update)(grads, tx.init(grads), meshes.place(PARAMS, SPECS, mesh))
            for read in (optclip.summary, partial(optclip.summary, per_leaf=True), jax.jit(optclip.summary)):
                chex.assert_trees_all_close(read(state), jax.jit(read)(expected), rtol=2e-6)
            worst = optclip.worst_leaf(state)
        assert [path for path, _ in worst.values()] == [path for path, _ in optclip.worst_leaf(expected).values()]
    tx = optclip.observe(optclip.clip_by_unit_norm(0.1, record=True), measure=measures.unit_norm, history=2)
    _, expected = tx.update(GRADS[2], tx.init(PARAMS))
    with jax.set_mesh(mesh):
        _, state = jax.jit(tx.update)(grads, tx.init(grads))
    chex.assert_trees_all_close(state, expected, rtol=2e-6)


@pytest.mark.parametrize("name", TXS)
def test_automatic_shardings_settle_after_one_step(name: str):
    mesh, tx = meshes.mesh(), TXS[name](None)
    params, grads = (meshes.place(tree, SPECS, mesh) for tree in (PARAMS, GRADS[0]))
    step = jax.jit(tx.update)
    updates, state = step(grads, tx.init(params), params)
    for x, spec in zip(jax.tree.leaves(updates), jax.tree.leaves(SPECS, is_leaf=meshes.is_spec), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
    if name in ("tree", "leaf"):
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(step(grads, state, params)[1]), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("name", ["tree", "leaf"])
def test_a_state_made_outside_the_mesh(name: str, checked: bool):
    alone, tx = TXS[name](None), TXS[name](None if checked else WHOLE)
    state, expected = tx.init(PARAMS), alone.init(PARAMS)
    chex.assert_trees_all_equal(state, expected)
    step = jax.jit(
        jax.shard_map(
            tx.update, mesh=meshes.mesh(), in_specs=(SPECS, P(), SPECS), out_specs=(SPECS, P()), check_vma=checked
        )
    )
    for grads in GRADS:
        updates, state = step(grads, state, PARAMS)
        right, expected = jax.jit(alone.update)(grads, expected, PARAMS)
        chex.assert_trees_all_close((updates, state), (right, expected), rtol=2e-6)


@pytest.mark.parametrize("checked", [True, False])
def test_a_state_of_units_made_outside_the_mesh(checked: bool):
    tx = TXS["agc"](UNITS)
    units = {"dense": {"bias": P(), "kernel": P(None, "model")}, "head": {"kernel": P(), "scale": P()}}
    state = tx.init(PARAMS)
    specs = state._replace(stats=optclip.ClipStats(units, units))
    step = jax.shard_map(
        tx.update, mesh=meshes.mesh(), in_specs=(SPECS, specs, SPECS), out_specs=(SPECS, specs), check_vma=checked
    )
    alone = TXS["agc"](None)
    result = jax.jit(step)(GRADS[2], state, PARAMS)
    chex.assert_trees_all_close(result, jax.jit(alone.update)(GRADS[2], alone.init(PARAMS), PARAMS), rtol=2e-6)


def poisoned(step: int) -> Any:
    """Gradients of which one shard alone holds a NaN, in one step."""
    bad = STACKED["dense"]["kernel"].copy()
    bad[step, 3, 3] = np.nan
    return {**STACKED, "dense": {**STACKED["dense"], "kernel": bad}}


GUARDS = {
    "skip_nonfinite": lambda whole, axes: optclip.skip_nonfinite(
        optax.chain(optclip.clip_by_global_norm(0.5, axis_name=whole), optax.adam(0.1)), axis_name=axes
    ),
    "skip_spikes": lambda whole, axes: optclip.skip_spikes(
        optax.chain(optclip.clip_by_global_norm(0.5, axis_name=whole), optax.adam(0.1)),
        5.0,
        measure=partial(measures.global_norm, axis_name=whole),
    ),
    "skip_spikes[per leaf]": lambda whole, axes: optclip.skip_spikes(
        optax.adam(0.1), 5.0, measure=partial(measures.leaf_norm, axis_name=whole)
    ),
}


@pytest.mark.parametrize("way", meshes.WAYS)
@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_decides_once_for_all_devices(guard: str, way: str):
    on, whole, _ = meshes.WAYS[way]
    names = {"unchecked": ("data", "model"), "pmap": "row"}.get(way)
    make = GUARDS[guard]
    updates, counts = on(partial(meshes.run_steps, make(whole, names)), PARAMS, poisoned(1))
    expected, numbers = jax.jit(partial(meshes.run_steps, make(None, None)))(PARAMS, poisoned(1))
    chex.assert_trees_all_close(updates, expected, rtol=2e-6, atol=1e-7)
    chex.assert_trees_all_close(counts, numbers, rtol=2e-6)
    for x in jax.tree.leaves(updates):
        np.testing.assert_array_equal(x[1], np.zeros_like(x[1]))
        assert np.all(x[3] != 0)


@pytest.mark.parametrize("checked", [True, False])
def test_spikes_of_single_units_are_skipped_everywhere(checked: bool):
    tx = optclip.skip_spikes(optax.sgd(1.0), 5.0, measure=partial(measures.unit_norm, axis_name=UNITS))
    grads = {**GRADS[0], "dense": {**GRADS[0]["dense"], "kernel": GRADS[0]["dense"]["kernel"].copy()}}
    grads["dense"]["kernel"][3, 3] = 50.0

    def step(grads: Any, params: Any) -> Any:
        updates, state = tx.update(grads, tx.init(params), params)
        return updates, state.total

    run = jax.shard_map(step, mesh=meshes.mesh(), in_specs=(SPECS, SPECS), out_specs=(SPECS, P()), check_vma=checked)
    updates, total = jax.jit(run)(grads, PARAMS)
    assert int(total) == 1 and not any(np.any(x) for x in jax.tree.leaves(updates))


def test_independent_replicas_guard_themselves():
    """With ``axis_name=()`` each device decides alone."""
    tx = optclip.skip_nonfinite(optax.sgd(1.0), axis_name=())

    def step(x: Any) -> Any:
        updates, state = tx.update(x, tx.init(x), x)
        return updates, jnp.reshape(state.total, (1,))

    run = jax.shard_map(step, mesh=meshes.mesh(), in_specs=P(("data", "model")), out_specs=P(("data", "model")))
    updates, totals = jax.jit(run)(np.float32([1, np.nan, 3, 4]))
    np.testing.assert_array_equal(updates, [-1, 0, -3, -4])
    np.testing.assert_array_equal(totals, [0, 1, 0, 0])
