"""Devices: over which mesh axes a partial sum must still be added up, and the one collective that does it.

Under ``jit`` with sharded arrays there is nothing to do: the compiler sees whole arrays. Under ``shard_map`` and
``pmap`` a function sees its own shard. With checked varying axes (``check_vma=True``) the type of an array says over
which axes its shards differ; without, only the user knows, and says so with ``axis_name``. Whatever differs between
releases of jax in this is here.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from optclip._vectors import concatenate

AxisName = Any  # None (read the types), a name, a tuple of names, a prefix tree of these, or a function making one

_local = threading.local()


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, names that are not bound are passed over: ``init`` asks for shapes, often outside the mesh."""
    before = getattr(_local, "shapes_only", False)
    _local.shapes_only = True
    try:
        yield
    finally:
        _local.shapes_only = before


def varying_axes(x: Any) -> tuple[str, ...]:
    """The manual mesh axes over which ``x`` is known to differ, sorted."""
    return tuple(sorted(_manual_type(x, "varying")))


def partitioned(leaves: Iterable[Any]) -> bool:
    """Whether the compiler is known to partition arrays (automatic or explicit axes).

    Types tell, for arguments with a NamedSharding as for ``jax.set_mesh``; ``jit(in_shardings=...)`` alone does not.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in leaves)]
    return any(map(_has_axes_to_partition, meshes))


def may_be_partitioned() -> bool:
    """Whether the compiler might partition arrays, known or not: with several devices, but for a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return _has_axes_to_partition(mesh) or (jax.device_count() > 1 and mesh.empty)


def _has_axes_to_partition(mesh: jax.sharding.AbstractMesh) -> bool:
    return not mesh.empty and len(mesh.manual_axes) < len(mesh.axis_names)


def _manual_type(x: Any, field: str) -> Iterable[str]:
    aval = jax.typeof(x)
    if hasattr(aval, "vma"):  # jax < 0.10
        return aval.vma if field == "varying" else ()
    return getattr(getattr(aval, "manual_axis_type", None), field, ())


def _tracked(axis: str) -> bool:
    """Whether types say what varies over ``axis``; not so with ``check_vma=False``, ``pmap`` and ``vmap``."""
    return axis in varying_axes(lax.axis_index(axis))


def _unchecked_axes() -> tuple[str, ...]:
    return tuple(a for a in jax.sharding.get_abstract_mesh().manual_axes if not _tracked(a))


def sum_axes(tree: Any, axis_name: AxisName, whole: Sequence[bool] | None = None) -> list[tuple[str, ...]]:
    """For each leaf of ``tree`` the mesh axes to sum over.

    Args:
      tree: the updates.
      axis_name: None reads the types of the leaves; otherwise a name, a tuple of names, a prefix tree of these in which
        None means "replicated", or a function from the tree to one. Where types are checked, a name counts only for
        leaves that vary over it: the others are whole already. Elsewhere names are taken at their word.
      whole: for each leaf, whether it is measured whole (all are by default). Where only some of its axes are (units,
        stacked layers), a type does not say whether those are the sharded ones, so a varying leaf needs ``axis_name``.
    """
    leaves = jax.tree.leaves(tree)
    for leaf in leaves:
        _check_reduced(leaf)
    if axis_name is not None:
        specs = _specs(axis_name, tree)
        bound = _bound({a for names in specs for a in names})
        return [
            tuple(a for a in names if a in bound and (not bound[a] or a in varying_axes(x)))
            for names, x in zip(specs, leaves, strict=True)
        ]
    unchecked = _unchecked_axes() if leaves else ()
    if unchecked:
        raise ValueError(
            f"a norm was asked for inside shard_map(check_vma=False) or pmap over the mesh axes {unchecked}, where "
            "types do not say which leaves are sharded: pass axis_name= (a name, a tuple of names, or a prefix tree "
            "of them with None for replicated leaves; axis_name=() if every leaf is replicated), or, to a method with "
            "measure=, a partial(measure, axis_name=...)"
        )
    axes = [varying_axes(x) for x in leaves]
    for names, all_of_it in zip(axes, whole or [True] * len(axes), strict=True):
        if names and not all_of_it:
            raise ValueError(
                f"sizes of units or layers of a leaf that varies over the mesh axes {names} need axis_name=: the axes "
                "over which the measured dimensions are sharded, or () if none of them is"
            )
    return axes


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, str) or (isinstance(x, tuple) and all(isinstance(a, str) for a in x))


def _specs(axis_name: AxisName, tree: Any) -> list[tuple[str, ...]]:
    axis_name = axis_name(tree) if callable(axis_name) else axis_name
    specs: list[Any] = []
    spread = lambda spec, below: specs.extend([spec] * len(jax.tree.leaves(below)))
    if _is_spec(axis_name):
        spread(axis_name, tree)
    elif jax.tree.leaves(tree):  # a tree without leaves asks for no structure
        try:
            jax.tree.map(spread, axis_name, tree, is_leaf=_is_spec)
        except ValueError as error:
            raise ValueError(
                f"axis_name={axis_name!r} must be a name, a tuple of names, or a prefix tree of these, here of "
                f"{jax.tree.structure(tree)}"
            ) from error
    return [() if s is None else (s,) if isinstance(s, str) else s for s in specs]


def _bound(names: Iterable[str]) -> dict[str, bool]:
    """Those of ``names`` that are bound here, each with whether types track it; others raise."""
    bound = {}
    for name in names:
        try:
            bound[name] = _tracked(name)
        except NameError:
            if not getattr(_local, "shapes_only", False):
                raise ValueError(
                    f"axis_name={name!r} names no axis that is bound here: it is for shard_map, pmap and vmap; under "
                    "jit with sharded arrays norms are global without it"
                ) from None
    return bound


def _check_reduced(leaf: Any) -> None:
    if not hasattr(leaf, "dtype") or leaf.dtype == jax.dtypes.float0:
        return
    spec = getattr(getattr(jax.typeof(leaf), "sharding", None), "spec", None)
    axes = tuple(getattr(spec, "unreduced", None) or ()) + tuple(_manual_type(leaf, "unreduced"))
    if axes:
        raise ValueError(
            f"a leaf of type {jax.typeof(leaf)} is unreduced over the mesh axes {axes}: its sum is still to be made, "
            "and a norm is not linear. Reduce it first, with jax.reshard or lax.psum"
        )


def axes_size(axes: tuple[str, ...]) -> int:
    """How many shards a sum over ``axes`` joins."""
    size = 1
    for axis in axes:
        size *= lax.axis_size(axis)
    return size


def all_reduce(parts: Sequence[jax.Array], axes: Sequence[tuple[str, ...]], op: str = "sum") -> list[jax.Array]:
    """Reduces each part over its own axes; all scalars share one collective.

    A scalar with fewer axes than the others is the same along those it lacks, so it is counted on one index of them.
    Arrays hold sizes that may well differ along axes they are not reduced over; they share a collective with parts of
    the same axes. Parts are non-negative if ``op`` is "max"; a NaN comes back as infinity from that.
    """
    union = tuple(sorted({a for names in axes for a in names}))
    shared: dict[Any, list[int]] = {}
    for i, (part, own) in enumerate(zip(parts, axes, strict=True)):
        apart = {a for a in varying_axes(part) if a not in own}  # what is packed together varies together, by its type
        names = union if jnp.ndim(part) == 0 and apart.isdisjoint(union) else tuple(sorted(own))
        alone = i if any(jax.typeof(part).sharding.spec) else None  # such arrays join only if sharded alike
        shared.setdefault((names, frozenset(apart), alone), []).append(i)
    out = list(parts)
    for (names, *_), rows in shared.items():
        if not names:
            continue
        once = [_once(parts[i], [a for a in names if a not in axes[i]]) for i in rows]
        if len(rows) == 1:
            out[rows[0]] = _reduced(once[0], names, op)
            continue
        packed, start = _reduced(concatenate([jnp.ravel(x) for x in once]), names, op), 0
        for i in rows:
            out[i] = jnp.reshape(packed[start : start + parts[i].size], jnp.shape(parts[i]))
            start += parts[i].size
    return out


def _reduced(part: jax.Array, names: tuple[str, ...], op: str) -> jax.Array:
    if op == "sum":
        return lax.psum(part, names)
    # The largest of a NaN and a number is often the number, from device to device.
    return lax.pmax(jnp.where(jnp.isnan(part), jnp.inf, part), names)


def _once(part: jax.Array, axes: Iterable[str]) -> jax.Array:
    """``part`` on the first index of ``axes``, zero elsewhere."""
    for axis in axes:
        part = jnp.where(lax.axis_index(axis) == 0, part, jnp.zeros_like(part))
    return part


def agree(flag: jax.Array, axis_name: str | tuple[str, ...] | None = None) -> jax.Array:
    """True on every device if ``flag`` is true on any: for decisions that devices must take together.

    Args:
      flag: a boolean scalar.
      axis_name: the axes over which to agree; None for all over which ``flag`` may differ.
    """
    axes = _may_differ(flag, axis_name)
    return lax.pmax(flag.astype(jnp.int32), axes).astype(bool) if axes else flag


def average(x: jax.Array) -> jax.Array:
    """The mean of ``x`` over all devices on which it may differ."""
    axes = _may_differ(x, None)
    return lax.pmean(x, axes) if axes else x


def _may_differ(x: jax.Array, axis_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    varying = varying_axes(x)
    if axis_name is None:
        return (*varying, *_unchecked_axes())
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    return tuple(a for a, tracked in _bound(set(names)).items() if not tracked or a in varying)


def replicated(x: Any) -> Any:
    """``x``, whole on every device if it is sharded over explicit axes: such arrays join only if sharded alike."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.reshard(x, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()))


def like(tree: Any, size: Any) -> Any:
    """``tree``, whose shapes start with that of ``size``, with the explicit sharding and the varying axes of ``size``.

    So a fresh state has the type it will keep. Where there is no mesh yet (an ``init`` outside of ``jit`` and
    ``jax.set_mesh``) types are left open.
    """
    varying, sharding = varying_axes(size), jax.typeof(size).sharding
    explicit = bool(sharding.mesh.explicit_axes) and any(sharding.spec)

    def one(x: Any) -> Any:
        missing = tuple(a for a in varying if a not in varying_axes(x))
        x = lax.pcast(x, missing, to="varying") if missing else x
        open_ = jax.sharding.get_abstract_mesh().empty and not isinstance(x, Tracer)
        if not explicit or open_ or jnp.ndim(x) == 0:
            return x
        spec = (*sharding.spec, *[None] * (jnp.ndim(x) - len(sharding.spec)))
        return jax.reshard(x, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec)))

    return jax.tree.map(one, tree)
