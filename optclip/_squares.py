"""The deepest cellar: Euclidean norms of any finite gradient, in one pass over it.

A sum of squares leaves the range of float32 for numbers beyond about 1e19 or below 1e-19, although the norm does not.
A second measure at another scale is right, but its code stands in the program of everybody, run or not. So:

* On a CPU the pass is the body of a loop that runs once, and again, scaled by 2^88 and 2^-88, where a sum was out of
  range. One body is one set of fusions, bytes and collectives; a second measure under `lax.cond` has two of each
  (1365 MB instead of 499 MB on the shapes of GPT-2 124M). The first turn has a branch without the scale, for XLA's
  library kernel for a plain sum of squares is twice as fast. Not so where arrays may be partitioned: each branch would
  hold an all-reduce.
* Elsewhere three sums, at the scales 2^-88, 1 and 2^88, come from one read: a loop would wait for the host.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optclip import _mesh
from optclip._vectors import alike, apart, pack

# Leaves below so many elements are packed. Alone, each takes XLA:CPU three fusions; from here on, one.
SMALL = 4096


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


def norms(leaves: Sequence[jax.Array], plan: Plan, dtype: Any) -> list[jax.Array]:
    """The Euclidean norm of each group of leaves, in ``dtype``."""
    slots, far = _slots(leaves, plan), _far(dtype)
    # Behind a barrier, for of constants XLA makes (x k)^2 = x^2 k^2, and the range is lost.
    down, up = lax.optimization_barrier((jnp.asarray(1 / far, dtype), jnp.asarray(far, dtype)))
    if jax.default_backend() != "cpu":
        sizes = _across(slots, [[_sum(slot, dtype, k) for k in (down, None, up)] for slot in slots], far)
    elif any(plan.mesh):
        local = _in_loops(slots, dtype, meshed=False)
        sizes = _across(slots, [[jnp.square(n * down), jnp.square(n), jnp.square(n * up)] for n in local], far)
    else:
        meshed = _mesh.partitioned(leaves)
        slots = slots if meshed or any(slot.dims for slot in slots) else _stacked(slots)
        local = _in_loops(slots, dtype, meshed)
        sizes = {}
        for slot, size in zip(slots, local, strict=True):
            sizes |= zip(slot.groups, [size] if len(slot.groups) == 1 else apart(jnp.ravel(size)), strict=True)
    for x, dims, group in zip(leaves, plan.dims, plan.group, strict=True):
        if dims is not None and sizes[group].ndim == 0:
            sizes[group] = jnp.reshape(sizes[group], (1,) * x.ndim)
    return [size for _, size in sorted(sizes.items())]


def scaled_down(x: jax.Array, dtype: Any) -> jax.Array:
    """The sum of squares of all of x, at a scale where it is finite if x is.

    One read at memory speed; to test each number and reduce the flags takes XLA:CPU two to three times as long.
    """
    scale = jnp.asarray(1 / _far(dtype), dtype)
    x, scale = lax.optimization_barrier((x, scale)) if x.dtype != dtype else (x, lax.optimization_barrier(scale))
    return _sum(Slot([x], None, (0,), ()), dtype, scale)


def _slots(leaves: Sequence[jax.Array], plan: Plan) -> list[Slot]:
    slots: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for i, key in enumerate(zip(plan.group, plan.mesh, strict=True)):
        slots.setdefault(key, []).append(i)
    meshed, out = _mesh.partitioned(leaves), []
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


def _sum(slot: Slot, dtype: Any, scale: Any = None) -> jax.Array:
    """The sum of (scale * x)^2 over a slot; ``scale`` may come once per array."""
    scales = scale if isinstance(scale, list) else [scale] * len(slot.arrays)
    total: Any = None
    for x, k in zip(slot.arrays, scales, strict=True):
        parts = [p.astype(dtype) for p in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
        squares = [jnp.square(p if k is None else p * k) for p in parts]
        square = squares[0] if len(squares) == 1 else squares[0] + squares[1]
        part = _short(square, jnp.sum) if slot.dims is None else jnp.sum(square, slot.dims, keepdims=True)
        total = part if total is None else total + part
    return total


def _stacked(slots: list[Slot]) -> list[Slot]:
    """Small leaves of one shape as the rows of one array: a third of the time for a hundred of them, and one kernel."""
    kinds = [
        (x.size, x.dtype, _mesh.varying_axes(x)) if len(slot.arrays) == 1 and x.size < SMALL else i
        for i, (slot, x) in enumerate((slot, slot.arrays[0]) for slot in slots)
    ]
    return [
        Slot([jnp.stack([jnp.ravel(slot.arrays[0]) for slot in same])], (1,), tuple(s.groups[0] for s in same), ())
        if len(same) > 1
        else same[0]
        for same in alike(slots, kinds)
    ]


def _short(x: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """The sum or maximum of ``x``; of a small array in steps of at most 32 numbers.

    XLA:CPU stores what it sums, to cut a longer sum into windows of 32 itself: three fusions instead of two.
    """
    while jax.default_backend() == "cpu" and 32 < x.size < SMALL and not _mesh.partitioned([x]):
        rows = next((r for r in range(32, 1, -1) if x.size % r == 0), 1)
        if rows == 1:
            break
        x = lax.optimization_barrier(reduce(jnp.reshape(x, (rows, -1)), 0))
    return reduce(x)


def _far(dtype: Any) -> float:
    """The other scale: 2^88 for float32. Squares of what is out of range at scale 1 are well within range at this."""
    return 2.0 ** (jnp.finfo(dtype).maxexp * 11 // 16)


def _range(dtype: Any) -> tuple[float, float]:
    """Sums of squares that lost nothing: below, 2^40 elements that underflowed may matter."""
    info = jnp.finfo(dtype)
    return float(info.tiny) * 2.0**66, float(info.max) / 4


def _in_loops(slots: list[Slot], dtype: Any, meshed: bool) -> list[jax.Array]:
    """The norm of each slot, on this device or, ``meshed``, as the compiler partitions it.

    Large slots have loops apart, by their size: zeros look like an underflow, and a leaf of zeros should not have all
    others read again. ``meshed``, one loop: the compiler then puts their sums into one collective.
    """
    sized = [max(x.size for x in slot.arrays) if len(slot.groups) == 1 and not meshed else 0 for slot in slots]
    kinds = [n.bit_length() if n >= SMALL else 0 for n in sized]
    sizes: dict[int, jax.Array] = {}
    for which in alike(range(len(slots)), kinds, len(slots)):
        local = _in_a_loop([slots[i] for i in which], dtype, meshed, large=kinds[which[0]] > 0)
        sizes |= zip(which, local, strict=True)
    return [sizes[i] for i in range(len(slots))]


def _in_a_loop(slots: list[Slot], dtype: Any, meshed: bool, large: bool) -> list[jax.Array]:
    low, high = (x**0.5 for x in _range(dtype))
    far = _far(dtype)

    def unscaled(_: Any) -> list[jax.Array]:
        return [_sum(slot, dtype) for slot in slots]

    def scaled(scale: jax.Array) -> list[jax.Array]:
        # A scale per array: of a common one XLA would store a broadcast for each shape, 368 MB for GPT-2 124M. Tied to
        # its array, for else those of bfloat16 would be widened in memory, before the loop.
        tied = [[lax.optimization_barrier((x, scale)) for x in slot.arrays] for slot in slots]
        return [
            _sum(slot._replace(arrays=[x for x, _ in pairs]), dtype, [k for _, k in pairs])
            for slot, pairs in zip(slots, tied, strict=True)
        ]

    # The first turn of large slots has a branch without the scale. Jax 0.9 stores the squares in both: nothing to gain.
    branch = large and jax.__version_info__ >= (0, 10)
    # By turn: the scale, what it is undone by, and which norms n are kept: those with sign * n >= bound.
    table = jnp.asarray([[1, 1, 0, 1], [far, 1 / far, 1, low], [1 / far, far, -1, -high]], dtype)

    def once(carry: Any) -> Any:
        turn, sizes = carry
        # In order already; but XLA does not look through a sort. Else each kernel looks the row up again, and jax 0.12
        # makes one kernel of the loop where leaves are small: 5.5 s to compile a hundred, instead of 2.3 s.
        scale, *rest = lax.sort((jnp.arange(4), table[turn]), num_keys=1)[1]
        new, _ = join(lax.cond(turn == 0, unscaled, scaled, scale) if branch else scaled(scale))
        return turn + 1, [_better(n, s, *rest) for n, s in zip(sizes, new, strict=True)]

    def again(carry: Any) -> jax.Array:
        turn, sizes = carry
        return _turns(sizes, low, high, dtype, meshed) >= turn.astype(dtype)

    first = [_start(slot, dtype, meshed) for slot in slots]
    # Scalars side by side, if they are of one type: a hundred selects less.
    join = pack if not meshed and len(set(map(_mesh.varying_axes, first))) == 1 else lambda sizes: (sizes, list)
    sizes, unjoin = join(first)
    _, sizes = lax.while_loop(again, once, (jnp.int32(0), sizes))
    return unjoin(sizes)


def _turns(sizes: list[jax.Array], low: float, high: float, dtype: Any, meshed: bool) -> jax.Array:
    """The turns wanted after the first: 1 for what may be too small, 2 for what is too large or NaN.

    Sizes of one shape are looked at together: AGC on 50 kernels compiles in 0.8 s instead of 1.2 s. Not where shards
    would move.
    """
    some = [n for n in sizes if n.size]
    wanted = jnp.zeros((), dtype)
    for same in alike(some, range(len(some)) if meshed else map(jax.typeof, some), 16):
        small = functools.reduce(lax.min, same) < low
        large = ~(functools.reduce(lax.max, same) <= high)  # a NaN beside it may hide what is too large
        code = jnp.where(large, 2.0, jnp.where(small, 1.0, 0.0)).astype(dtype)
        wanted = jnp.maximum(wanted, _short(code, jnp.max))
    return wanted


def _start(slot: Slot, dtype: Any, meshed: bool) -> jax.Array:
    """A number to be replaced: a size before the first turn."""
    none, x = _nothing(slot, dtype), slot.arrays[0]
    if meshed or none.ndim == 0 or not x.size:
        return none
    # Made of an element: of a constant XLA would copy a broadcast for each array of units.
    first = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)
    return jnp.broadcast_to(first.real.astype(dtype), none.shape)


@partial(jax.jit, inline=True)  # traced once per shape
def _better(size: jax.Array, square: jax.Array, back: jax.Array, sign: jax.Array, bound: jax.Array) -> jax.Array:
    return lax.select(size * sign >= bound, size, jnp.sqrt(square) * back)


def _nothing(slot: Slot, dtype: Any) -> jax.Array:
    """Zero, with the type of a sum over the slot, its mesh axes included: the sum over an empty part of it."""
    if not _mesh.partitioned(slot.arrays) and not any(map(_mesh.varying_axes, slot.arrays)):
        units = () if slot.dims is None else enumerate(slot.arrays[0].shape)
        return jnp.zeros([1 if axis in (slot.dims or ()) else length for axis, length in units], dtype)
    arrays = list({jax.typeof(x): x for x in slot.arrays}.values())
    dims = None if slot.dims is None else (0, *(a + 1 for a in slot.dims))
    zero = _sum(Slot([x[None][:0] for x in arrays], dims, slot.groups, slot.mesh), dtype)
    return zero if dims is None else zero[0]


def _across(slots: list[Slot], sums: list[list[jax.Array]], far: float) -> dict[int, jax.Array]:
    """Adds up sums at three scales over slots and devices, in one collective, and makes norms of them."""
    flat = _mesh.all_reduce([s for three in sums for s in three], [slot.mesh for slot in slots for _ in range(3)])
    totals: dict[int, list[jax.Array]] = {}
    for i, slot in enumerate(slots):
        three, before = flat[3 * i : 3 * i + 3], totals.get(slot.groups[0])
        totals[slot.groups[0]] = three if before is None else [a + b for a, b in zip(before, three, strict=True)]
    sizes = {}
    for group, (down, middle, up) in totals.items():
        low, high = _range(middle.dtype)
        size = jnp.sqrt(jnp.where(middle < low, up, jnp.where(middle <= high, middle, down)))
        sizes[group] = size * jnp.where(middle < low, 1 / far, jnp.where(middle <= high, 1, far)).astype(size.dtype)
    return sizes
