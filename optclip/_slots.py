"""Leaves sorted into slots: arrays whose sums of squares are added up."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optclip import _mesh
from optclip._vectors import alike, apart, stack

# Leaves below so many elements are packed. Alone, each takes XLA:CPU three fusions; from here on, one.
SMALL = 4096
# Numbers in a row, at least: its sums at three scales are then 0.6 % of what is read in float32.
ROW = 512


class Plan(NamedTuple):
    """How leaves make sizes; hashable, so that it can be a static argument."""

    dims: tuple[tuple[int, ...] | None, ...]  # per leaf: the axes to reduce with keepdims, or None for all
    group: tuple[int, ...]  # per leaf: the size it counts towards; with dims, its own
    mesh: tuple[tuple[str, ...], ...]  # per leaf: the manual mesh axes to sum over


class Slot(NamedTuple):
    """Arrays whose sums of squares are added up."""

    arrays: list[jax.Array]
    dims: tuple[int, ...] | None  # the axes to reduce with keepdims, or None for all
    groups: tuple[int, ...]  # the size this counts towards; several if each row of the array counts towards its own
    mesh: tuple[str, ...]


class Sums(NamedTuple):
    """Sums of squares of numbers times 2^-88, 1 and 2^88 (float64: 2^-704, 1 and 2^704)."""

    three: Sequence[jax.Array]
    groups: tuple[int, ...]  # the size these count towards; several if each row of the arrays counts towards its own
    mesh: tuple[str, ...]  # the mesh axes they are still to be added up over


def slots_of(leaves: Sequence[jax.Array], plan: Plan, meshed: bool) -> list[Slot]:
    slots: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for i, key in enumerate(zip(plan.group, plan.mesh, strict=True)):
        slots.setdefault(key, []).append(i)
    out = []
    for (group, mesh), rows in slots.items():
        arrays, dims = [leaves[i] for i in rows], plan.dims[rows[0]]
        if dims is not None and len(dims) == arrays[0].ndim:
            dims = None
        out.append(Slot(_packed(arrays, meshed) if dims is None else arrays, dims, (group,), mesh))
    return out


def _packed(arrays: list[jax.Array], meshed: bool) -> list[jax.Array]:
    """Small arrays as one; under a mesh only those of one type, side by side, for to concatenate would move shards."""
    kind = jax.typeof if meshed else lambda x: (x.dtype, _mesh.varying_axes(x))
    kinds = [kind(x) if x.size < SMALL else i for i, x in enumerate(arrays)]
    join = jnp.stack if meshed else lambda same: jnp.concatenate([jnp.ravel(x) for x in same])
    return [same[0] if len(same) == 1 else join(same) for same in alike(arrays, kinds)]


def stacked(slots: list[Slot], units: bool = False) -> list[Slot]:
    """Small leaves of one shape as the rows of one array: a third of the time for a hundred of them, and one kernel.

    Those with one size each, or those with ``units``. Of both, the first would be read, written and read again: for
    GPT-2's AGC 0.1 % of its bytes, which are then more than Optax's.
    """
    kinds = [_kind(slot) if (slot.dims is not None) == units else None for slot in slots]
    groups = alike(slots, [i if kind is None else kind for i, kind in enumerate(kinds)])
    return [_as_rows(same) if len(same) > 1 else same[0] for same in groups]


def _kind(slot: Slot) -> Any:
    """What leaves have in common that can be stacked; None for one that is not small."""
    x = slot.arrays[0]
    if len(slot.arrays) > 1 or not 0 < x.size < SMALL:
        return None
    return x.size if slot.dims is None else x.shape, slot.dims, x.dtype, _mesh.varying_axes(x)


def _as_rows(slots: list[Slot]) -> Slot:
    rows, dims = [slot.arrays[0] for slot in slots], slots[0].dims
    if dims is None:
        rows, dims = [jnp.ravel(x) for x in rows], (0,)
    return Slot([stack(rows)], tuple(axis + 1 for axis in dims), tuple(slot.groups[0] for slot in slots), ())


def by_group(groups: tuple[int, ...], sizes: jax.Array) -> dict[int, jax.Array]:
    """Of several groups each has its row."""
    rows = [sizes] if len(groups) == 1 else apart(jnp.ravel(sizes) if sizes.size == len(groups) else sizes)
    return dict(zip(groups, rows, strict=True))


def in_shape(sizes: Sequence[jax.Array], leaves: Sequence[jax.Array], plan: Plan) -> list[jax.Array]:
    """The size of each group as `Plan.dims` of its leaves says: with ``keepdims``, or a scalar."""
    made = list(sizes)
    for x, dims, group in zip(leaves, plan.dims, plan.group, strict=True):
        made[group] = jnp.reshape(made[group], kept_shape(x, dims))
    return made


def kept_shape(x: jax.Array, dims: tuple[int, ...] | None) -> list[int]:
    """The shape of ``x`` reduced over ``dims`` with ``keepdims``, or of a scalar."""
    return [] if dims is None else [1 if axis in dims else n for axis, n in enumerate(x.shape)]


def leading(dims: tuple[int, ...]) -> bool:
    """Whether these are the first axes: taken as one, what is reduced are the columns of a matrix."""
    return dims == tuple(range(len(dims)))


def bits_without_sign(x: jax.Array) -> jax.Array:
    """The bits of each magnitude, as integers: in the order of the magnitudes, those of NaN last."""
    ints = jnp.dtype(f"int{jnp.finfo(x.dtype).bits}")
    return lax.bitcast_convert_type(x, ints) & jnp.asarray(jnp.iinfo(ints).max, ints)


def rows_of(x: jax.Array) -> tuple[int, ...]:
    """The axes of the rows of a large array, for sums in two steps; none of a small one, all of one without rows."""
    if x.size < SMALL:
        return ()
    kept = next((k for k in range(x.ndim - 1, 0, -1) if math.prod(x.shape[k:]) >= ROW), 0)
    return tuple(range(kept, x.ndim))


def square(x: jax.Array, dtype: Any, scale: Any = None) -> jax.Array:
    """|scale * x|^2 of each element, in the real ``dtype``."""
    parts = [p.astype(dtype) for p in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    squares = [jnp.square(p if scale is None else p * scale) for p in parts]
    return squares[0] if len(squares) == 1 else squares[0] + squares[1]


def far_scale(dtype: Any) -> float:
    """The other scale: 2^88 for float32. Squares of what is out of range at scale 1 are well within range at this."""
    return 2.0 ** (jnp.finfo(dtype).maxexp * 11 // 16)


def lossless(dtype: Any) -> tuple[float, float]:
    """Sums of squares that lost nothing: below, 2^40 elements that underflowed may matter."""
    info = jnp.finfo(dtype)
    return float(info.tiny) * 2.0**66, float(info.max) / 4
