"""Devices: over which mesh axes a partial sum must still be added up, and the one collective that does it.

Under ``jit`` with sharded arrays there is nothing to do: the compiler sees whole arrays. Under ``shard_map`` and
``pmap`` a function sees its own shard. With checked varying axes (``check_vma=True``) the type of an array says over
which axes its shards differ; without, only the user knows, and says so with ``axis_name``.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

AxisName = Any  # None (read the types), a name, a tuple of names, or a prefix tree of these

_local = threading.local()


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, no collective is made: ``init`` asks for shapes, often outside the mesh."""
    before = getattr(_local, "shapes_only", False)
    _local.shapes_only = True
    try:
        yield
    finally:
        _local.shapes_only = before


def varying_axes(x: Any) -> tuple[str, ...]:
    """The manual mesh axes over which ``x`` is known to differ, sorted."""
    aval = jax.typeof(x)
    axes = getattr(aval, "vma", None)
    if axes is None:  # jax >= 0.10
        axes = getattr(getattr(aval, "manual_axis_type", None), "varying", ())
    return tuple(sorted(axes))


def _unchecked_axes() -> tuple[str, ...]:
    """The manual axes whose varying values are not tracked (``check_vma=False``, ``pmap``)."""
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return tuple(a for a in manual if not varying_axes(lax.axis_index(a)))


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, str) or (isinstance(x, tuple) and all(isinstance(a, str) for a in x))


def sum_axes(tree: Any, axis_name: AxisName, *, whole: bool = True) -> list[tuple[str, ...]]:
    """For each leaf of ``tree`` the mesh axes to sum over.

    Args:
      tree: the updates.
      axis_name: None reads the types of the leaves; otherwise a name, a tuple of names, or a prefix tree of these in
        which None means "replicated". Names the user gives are taken at their word.
      whole: whether a leaf is measured whole. Where only some of its axes are (units), a type does not say whether
        the measured axes are the sharded ones, so a varying leaf needs ``axis_name``.
    """
    leaves = jax.tree.leaves(tree)
    if getattr(_local, "shapes_only", False):
        return [()] * len(leaves)
    if axis_name is not None:
        if _is_spec(axis_name):
            specs = [axis_name] * len(leaves)
        else:
            wide = jax.tree.map(lambda a, sub: jax.tree.map(lambda _: _Spec(a), sub), axis_name, tree, is_leaf=_is_spec)
            specs = [s.axes for s in jax.tree.leaves(wide)]
        return [() if s is None else (s,) if isinstance(s, str) else s for s in specs]
    unchecked = _unchecked_axes()
    if unchecked and leaves:
        raise ValueError(
            f"a norm was asked for inside shard_map(check_vma=False) or pmap over the mesh axes {unchecked}, where "
            "types do not say which leaves are sharded: pass axis_name= (a name, a tuple of names, or a prefix tree "
            "of them with None for replicated leaves; axis_name=() if every leaf is replicated)"
        )
    axes = [varying_axes(x) for x in leaves]
    if not whole and any(axes):
        raise ValueError(
            f"unit-wise sizes of a leaf that varies over the mesh axes {max(axes)} need axis_name=: the axes over "
            "which the measured dimensions are sharded, or () if none of them is"
        )
    return axes


class _Spec:  # a leaf, so that a tuple of names survives tree.map
    def __init__(self, axes: Any):
        self.axes = axes


def all_reduce(parts: Sequence[jax.Array], axes: Sequence[tuple[str, ...]], op: str = "sum") -> list[jax.Array]:
    """Reduces each part over its own axes, with one collective for all of them.

    Parts with fewer axes than the union are counted on one index of each other axis (zero elsewhere), so the sum is
    exact; a maximum of non-negative parts needs no such care.
    """
    union = tuple(sorted({a for names in axes for a in names}))
    if not union:
        return list(parts)
    picked = [i for i, names in enumerate(axes) if names]
    flat = []
    for i in picked:
        part = jnp.ravel(parts[i])
        if op == "sum":
            for axis in union:
                if axis not in axes[i]:
                    part = jnp.where(lax.axis_index(axis) == 0, part, jnp.zeros_like(part))
        flat.append(part)
    sizes = [part.size for part in flat]
    packed = jnp.concatenate(flat) if len(flat) > 1 else flat[0]
    packed = _vary(packed, union)
    packed = lax.psum(packed, union) if op == "sum" else lax.pmax(packed, union)
    out, start = list(parts), 0
    for i, size in zip(picked, sizes, strict=True):
        out[i] = jnp.reshape(packed[start : start + size], jnp.shape(parts[i]))
        start += size
    return out


def _vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Marks ``x`` as varying over ``axes``, which a collective over them asks for where types are checked."""
    missing = tuple(a for a in axes if a not in varying_axes(x) and varying_axes(lax.axis_index(a)))
    return lax.pcast(x, missing, to="varying") if missing else x


def agree(flag: jax.Array) -> jax.Array:
    """True on every device if ``flag`` is true on any that may differ: for ``lax.cond``, which must branch together."""
    axes = varying_axes(flag) or (() if getattr(_local, "shapes_only", False) else _unchecked_axes())
    return lax.pmax(flag.astype(jnp.int32), axes).astype(bool) if axes else flag
