"""Four devices in two rows: how the standard tree lies on them, and the ways jax has to run a function there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

SHAPES = {"dense": {"bias": (4,), "kernel": (4, 4)}, "head": {"kernel": (8, 2), "scale": ()}}
SPECS = {"dense": {"bias": P("model"), "kernel": P("data", "model")}, "head": {"kernel": P("model"), "scale": P()}}
# The mesh axes to sum over: where leaves are measured whole, and where only their units (of NFNets) are.
WHOLE = {"dense": {"bias": "model", "kernel": ("data", "model")}, "head": {"kernel": "model", "scale": None}}
UNITS = {"dense": {"bias": "model", "kernel": "data"}, "head": {"kernel": "model", "scale": None}}
ROWS = {"dense": {"bias": None, "kernel": "row"}, "head": {"kernel": "row", "scale": None}}

is_spec = lambda x: isinstance(x, P)


def devices(n: int) -> list[jax.Device]:
    """The first ``n`` devices; where there are fewer, the test that asks is skipped."""
    if jax.device_count() < n:
        pytest.skip(f"needs {n} devices")
    return jax.devices()[:n]


def mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind), devices=devices(4))


def draw(seed: int, scale: float = 0.3) -> Any:
    """A float32 tree of normal numbers."""
    rng = np.random.default_rng(seed)
    leaf = lambda shape: np.asarray(rng.normal(scale=scale, size=shape), np.float32)
    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def steps(specs: Any) -> Any:
    """Specs of a tree of which several steps are stacked."""
    return jax.tree.map(lambda s: P(None, *s), specs, is_leaf=is_spec)


def place(tree: Any, specs: Any, on: jax.sharding.Mesh) -> Any:
    return jax.device_put(tree, jax.tree.map(lambda s: NamedSharding(on, s), specs, is_leaf=is_spec))


def on_jit(run: Callable[..., Any], params: Any, grads: Any, kind: AxisType) -> Any:
    """``run(params, grads)`` under jit, with sharded arrays."""
    where = mesh(kind)
    with jax.set_mesh(where):
        return jax.jit(run)(place(params, SPECS, where), place(grads, steps(SPECS), where))


def on_shard_map(run: Callable[..., Any], params: Any, grads: Any, checked: bool) -> Any:
    """``run(params, grads) -> (stacked updates, replicated)`` on shards."""
    return jax.jit(
        jax.shard_map(
            run, mesh=mesh(), in_specs=(SPECS, steps(SPECS)), out_specs=(steps(SPECS), P()), check_vma=checked
        )
    )(params, grads)


def on_pmap(run: Callable[..., Any], params: Any, grads: Any) -> Any:
    """``run(params, grads)`` on two devices, which split the rows of kernels and share everything else."""
    split = lambda x, name, axis: np.stack(np.split(x, 2, axis) if name else [x, x])
    none = lambda x: x is None
    params = jax.tree.map(lambda a, x: split(x, a, 0), ROWS, params, is_leaf=none)
    grads = jax.tree.map(lambda a, x: split(x, a, 1), ROWS, grads, is_leaf=none)
    updates, rest = jax.pmap(run, axis_name="row", devices=devices(2))(params, grads)
    for x in jax.tree.leaves(rest):
        np.testing.assert_array_equal(x[0], x[1])
    join = lambda a, x: np.concatenate(list(x), 1) if a else np.asarray(x[0])
    return jax.tree.map(join, ROWS, updates, is_leaf=none), jax.tree.map(lambda x: x[0], rest)


WAYS: dict[str, tuple[Callable[..., Any], Any, Any]] = {  # how to run, axis_name for whole leaves, and for units
    "auto": (partial(on_jit, kind=AxisType.Auto), None, None),
    "explicit": (partial(on_jit, kind=AxisType.Explicit), None, None),
    "checked": (partial(on_shard_map, checked=True), None, UNITS),
    "unchecked": (partial(on_shard_map, checked=False), WHOLE, UNITS),
    "pmap": (on_pmap, ROWS, ROWS),
}


def run_steps(tx: Any, params: Any, grads: Any) -> Any:
    """All updates of consecutive steps, and those numbers of the last state that all devices must share."""

    def step(state: Any, grad: Any) -> Any:
        updates, state = tx.update(grad, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(params), grads)
    return updates, [x for x in jax.tree.leaves(state) if jnp.ndim(x) == 0]
