"""How large is it? The shelf of measures: each maps a pytree of updates to its sizes.

Sizes are float32 (float64 where a leaf is) and non-negative, in a pytree that is a *prefix* of the updates and
broadcasts against them below it; the depth of that prefix is the scope of a clipper. Every sum is formed in float32
whatever the dtype of the leaf, and is right for every finite gradient, also where a square would overflow or
underflow. Leaves without a size (integers, booleans, float0, None, masked) count as nothing.

============== ========================= =========================================
measure        scope                     size
============== ========================= =========================================
`global_norm`  tree                      one p-norm over all leaves
`group_norm`   group                     one p-norm per label of a prefix tree
`leaf_norm`    leaf (layer of a stack)   one p-norm per leaf
`leaf_rms`     leaf (layer of a stack)   root mean square per leaf
`unit_norm`    unit (output neuron)      one p-norm per unit, ``keepdims``
`magnitude`    element                   the absolute value
============== ========================= =========================================

Arguments per leaf (``groups``, ``axis``, ``stack_axis``, ``axis_name``) are prefix trees of the updates, or functions
from the updates to one, such as `optclip.by_path`. To pass arguments on to `clip_by`, use
``functools.partial(global_norm, ord=1)``.

On a mesh the sizes are those of one device. Under ``jit`` with sharded arrays nothing is to be done. Inside
``shard_map`` with checked varying axes, sums run over exactly the mesh axes a leaf varies over; only where units or
stacked layers are measured say with ``axis_name`` over which axes the *reduced* dimensions are sharded. Inside
``shard_map(check_vma=False)`` and ``pmap`` always say so; leaving it out raises ValueError. Nothing can be told, and
every device measures its own, in a ``vmap`` over shards and in the ``pmap`` of ``jax_pmap_shmap_merge=False``.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from optclip import _checks, _mesh, _numerics

Updates = Any  # a pytree of arrays
Sizes = Any  # a prefix tree of the updates, non-negative float32 (float64)
Measure = Callable[[Updates], Sizes]

__all__ = ["Measure", "global_norm", "group_norm", "leaf_norm", "leaf_rms", "magnitude", "unit_norm"]


def global_norm(tree: Updates, ord: float = 2, *, axis_name: Any = None) -> jax.Array:
    """The p-norm of all leaves taken as one vector, exact in every dtype: (sum |x|^p)^(1/p).

    Args:
      tree: a pytree of arrays.
      ord: p > 0, or infinity for the largest magnitude.
      axis_name: mesh axes to sum over inside ``shard_map(check_vma=False)`` and ``pmap``: a name, a tuple of names, or
        a prefix tree of these with None for replicated leaves.

    Returns:
      A float32 scalar (float64 if a leaf is). 0 for an empty tree, with derivative 0 at 0. Elements below 1.2e-38 count
      as 0 where the device flushes subnormal numbers.

    Example:
      >>> float(global_norm({"w": jnp.full((2, 2), 300.0, jnp.float16)}))
      600.0
    """
    ord = _checks.check_ord("global_norm", ord)
    leaves, axes = _gradients(tree, axis_name)
    if not leaves:
        return jnp.zeros((), jnp.float32)
    n = len(leaves)
    plan = _numerics.Plan((None,) * n, (0,) * n, tuple(axes))
    return _numerics.norms(leaves, plan, ord)[0]


def group_norm(tree: Updates, groups: Any, ord: float = 2, *, axis_name: Any = None) -> Sizes:
    """One p-norm per group: leaves under equal labels share a norm.

    Args:
      tree: a pytree of arrays.
      groups: a prefix tree of the updates with a hashable label at each leaf, as ``optax.partition`` takes them, or a
        function from the updates to such a tree.
      ord: p > 0, or infinity.
      axis_name: see `global_norm`.

    Returns:
      Scalars in the structure of ``groups``, for equal labels one and the same array, by which sums over sizes count
      it once; 0 for a group without gradient leaves.

    Example:
      >>> sizes = group_norm({"a": jnp.ones(4), "b": jnp.ones(9)}, {"a": 0, "b": 1})
      >>> {k: float(v) for k, v in sizes.items()}
      {'a': 2.0, 'b': 3.0}
    """
    ord = _checks.check_ord("group_norm", ord)
    groups = groups(tree) if callable(groups) else groups
    labels, treedef = jax.tree.flatten(groups)
    leaves = jax.tree.leaves(tree)
    wide = _wide("groups", groups, tree)
    axes = _mesh.sum_axes(tree, axis_name)
    rows = [(x, g, a) for x, g, a in zip(leaves, wide, axes, strict=True) if _numerics.is_gradient(x)]
    index: dict[Hashable, int] = {}
    for _, label, _ in rows:
        index.setdefault(label, len(index))
    plan = _numerics.Plan((None,) * len(rows), tuple(index[g] for _, g, _ in rows), tuple(a for _, _, a in rows))
    sizes = _numerics.norms([x for x, _, _ in rows], plan, ord)
    dtype, found = _numerics.accumulator(*(x for x, _, _ in rows)), {label: sizes[i] for label, i in index.items()}
    found |= {label: jnp.zeros((), dtype) for label in labels if label not in found}
    return treedef.unflatten([found[label] for label in labels])


def leaf_norm(tree: Updates, ord: float = 2, *, stack_axis: Any = None, axis_name: Any = None) -> Sizes:
    """One p-norm per leaf, or per layer of a leaf that stacks layers.

    Args:
      tree: a pytree of arrays.
      ord: p > 0, or infinity.
      stack_axis: the axis along which a leaf stacks layers (``nn.scan``, ``nnx.vmap``): an int, a tuple of ints, or a
        prefix tree of these with None for leaves that are one layer. Sizes then keep that axis, the others have
        length 1.
      axis_name: see `global_norm`.

    Returns:
      The tree of the updates with a scalar (or an array of ``keepdims`` shape) at each leaf.

    Example:
      >>> leaf_norm({"w": jnp.ones((3, 2, 2))}, stack_axis=0)["w"].shape
      (3, 1, 1)
    """
    ord = _checks.check_ord("leaf_norm", ord)
    dims = _stacked_dims(tree, stack_axis)
    return _per_leaf(tree, dims, ord, _axes_for(tree, dims, axis_name))


def leaf_rms(tree: Updates, *, stack_axis: Any = None, axis_name: Any = None) -> Sizes:
    """The root mean square of each leaf (or layer): norm / sqrt(number of elements), infinite where the norm is.

    Args:
      tree: a pytree of arrays.
      stack_axis: see `leaf_norm`.
      axis_name: see `global_norm`; the elements of all shards are counted.

    Returns:
      The tree of the updates with a scalar (or an array of ``keepdims`` shape) at each leaf; 0 for an empty leaf.

    Example:
      >>> float(leaf_rms({"w": jnp.full((16,), 3.0)})["w"])
      3.0
    """
    dims = _stacked_dims(tree, stack_axis)
    axes = _axes_for(tree, dims, axis_name)
    parts, treedef = jax.tree.flatten(_per_leaf(tree, dims, 2, axes))
    counts = [
        jnp.size(x) // max(jnp.size(s), 1) * _mesh.axes_size(names)
        for x, s, names in zip(jax.tree.leaves(tree), parts, axes, strict=True)
    ]
    return treedef.unflatten([s / max(n, 1) ** 0.5 for s, n in zip(parts, counts, strict=True)])


def unit_norm(
    tree: Updates, axis: Any = None, ord: float = 2, *, stack_axis: Any = None, axis_name: Any = None
) -> Sizes:
    """One p-norm per unit (output neuron or filter), as ``keepdims`` arrays.

    Args:
      tree: a pytree of arrays.
      axis: the axes that make up one unit and are reduced: an int, a tuple of ints, or a prefix tree of these. None
        means fan-in as NFNets count it for the layouts of JAX: all of a leaf of rank 0 or 1 (or with at most one axis
        longer than 1), the first axis at rank 2 and 3, all but the last at rank 4 and more.
      ord: p > 0, or infinity.
      stack_axis: axes that stack layers, kept apart; the default of ``axis`` then counts the axes of one layer. See
        `leaf_norm`.
      axis_name: the mesh axes over which the *reduced* dimensions are sharded (see `global_norm`). It must be given
        wherever a leaf varies over a mesh axis.

    Returns:
      The tree of the updates with an array of ``keepdims`` shape at each leaf.

    Example:
      >>> unit_norm({"kernel": jnp.ones((4, 2)), "bias": jnp.ones(4)})["kernel"].tolist()
      [[2.0, 2.0]]
    """
    ord = _checks.check_ord("unit_norm", ord)
    stacks = _axes_per_leaf("stack_axis", stack_axis, tree)
    given = _axes_per_leaf("axis", axis, tree)
    dims = [_fan_in(x, a, s) for x, a, s in zip(jax.tree.leaves(tree), given, stacks, strict=True)]
    axes = _axes_for(tree, dims, axis_name)
    for x, a, d, names in zip(jax.tree.leaves(tree), given, dims, axes, strict=True):
        if a is None and jnp.ndim(x) == len(d) > 1 and (names or _mesh.varying_axes(x)):
            raise ValueError(
                f"unit_norm: a shard of shape {jnp.shape(x)} does not tell which axes of the whole leaf make up a unit "
                "(it has at most one axis longer than 1): pass axis="
            )
    return _per_leaf(tree, dims, ord, axes)


def magnitude(tree: Updates) -> Sizes:
    """The absolute value of each element, in float32 (float64).

    Args:
      tree: a pytree of real arrays.

    Returns:
      The tree of the updates, in full shapes.

    Example:
      >>> magnitude([jnp.array([-2.0, 1.0])])[0].tolist()
      [2.0, 1.0]
    """

    def size(x: Any) -> Any:
        if not _numerics.is_gradient(x):
            return jnp.zeros((), jnp.float32)
        return jnp.abs(jnp.asarray(x)).astype(_numerics.accumulator(x))

    return jax.tree.map(size, tree)


def _per_leaf(tree: Updates, dims: list[Any], ord: float, axes: list[tuple[str, ...]]) -> Sizes:
    leaves, treedef = jax.tree.flatten(tree)
    rows = [i for i, x in enumerate(leaves) if _numerics.is_gradient(x)]
    plan = _numerics.Plan(tuple(dims[i] for i in rows), tuple(range(len(rows))), tuple(axes[i] for i in rows))
    sizes = _numerics.norms([leaves[i] for i in rows], plan, ord)
    made = dict(zip(rows, sizes, strict=True))
    return treedef.unflatten([made[i] if i in made else jnp.zeros((), jnp.float32) for i in range(len(leaves))])


def _axes_for(tree: Updates, dims: list[Any], axis_name: Any) -> list[tuple[str, ...]]:
    """The mesh axes over which each leaf is summed, where ``dims`` are the axes to reduce; None for all."""
    pairs = zip(jax.tree.leaves(tree), dims, strict=True)
    whole = [d is None or len(d) == jnp.ndim(x) or not _numerics.is_gradient(x) for x, d in pairs]
    return _mesh.sum_axes(tree, axis_name, whole)


def _gradients(tree: Updates, axis_name: Any) -> tuple[list[Any], list[tuple[str, ...]]]:
    axes = _mesh.sum_axes(tree, axis_name)
    rows = [(x, a) for x, a in zip(jax.tree.leaves(tree), axes, strict=True) if _numerics.is_gradient(x)]
    return [x for x, _ in rows], [a for _, a in rows]


def _is_axes(x: Any) -> bool:
    return x is None or isinstance(x, int) or (isinstance(x, tuple) and all(isinstance(a, int) for a in x))


def _axes_per_leaf(name: str, spec: Any, tree: Updates) -> list[tuple[int, ...] | None]:
    """``spec`` (an int, a tuple, None, a prefix tree or a function making one) for each leaf, as a tuple or None."""
    spec = spec(tree) if callable(spec) else spec
    n = len(jax.tree.leaves(tree))
    specs = [spec] * n if _is_axes(spec) else _wide(name, spec, tree, is_leaf=_is_axes)
    if not all(map(_is_axes, specs)):
        raise ValueError(f"{name} must be an int, a tuple of ints, None, or a prefix tree of these, got {spec!r}")
    return [(s,) if isinstance(s, int) else s for s in specs]


def _wide(name: str, prefix: Any, tree: Updates, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """The entry of a prefix tree for each leaf of ``tree``; a tree without leaves asks for no structure."""
    wide: list[Any] = []
    if jax.tree.leaves(tree):
        spread = lambda entry, below: wide.extend([entry] * len(jax.tree.leaves(below)))
        try:
            jax.tree.map(spread, prefix, tree, is_leaf=is_leaf)
        except ValueError as error:
            trees = f"{jax.tree.structure(prefix, is_leaf=is_leaf)} for {jax.tree.structure(tree)}"
            raise ValueError(f"{name} must be a prefix tree of the updates, got {trees}") from error
    return wide


def _positive(axes: tuple[int, ...], x: Any) -> tuple[int, ...]:
    rank = jnp.ndim(x)
    if any(not -rank <= a < rank for a in axes):
        raise ValueError(f"axes {axes} are out of range for a leaf of shape {jnp.shape(x)}")
    return tuple(sorted({a % rank for a in axes}))


def _others(stack: tuple[int, ...] | None, x: Any) -> tuple[int, ...] | None:
    """All axes but those that stack layers; None (a scalar size) if nothing is stacked."""
    if stack is None:
        return None
    kept = _positive(stack, x)
    return tuple(a for a in range(jnp.ndim(x)) if a not in kept)


def _stacked_dims(tree: Updates, stack_axis: Any) -> list[tuple[int, ...] | None]:
    stacks = _axes_per_leaf("stack_axis", stack_axis, tree)
    return [_others(s, x) for s, x in zip(stacks, jax.tree.leaves(tree), strict=True)]


def _fan_in(x: Any, axis: tuple[int, ...] | None, stack: tuple[int, ...] | None) -> tuple[int, ...]:
    kept = _positive(stack, x) if stack is not None else ()
    if axis is not None:
        return tuple(a for a in _positive(axis, x) if a not in kept)
    layer = [a for a in range(jnp.ndim(x)) if a not in kept]
    if sum(jnp.shape(x)[a] > 1 for a in layer) <= 1:
        return tuple(layer)
    return tuple(layer[:1] if len(layer) <= 3 else layer[:-1])
