"""On a CPU: one pass in the body of a loop that turns again, at another scale, where a sum was out of range."""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optclip import _mesh
from optclip._slots import SMALL, Slot, bits_without_sign, far_scale, kept_shape, leading, lossless, square
from optclip._vectors import alike, pack, stack

ROWS, SIDE = 8, 32  # numbers added up, and numbers side by side; of more, jax 0.9 stores the wide form of bfloat16


def norms_in_loops(slots: list[Slot], dtype: Any, meshed: bool) -> list[jax.Array]:
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
    low, high = (x**0.5 for x in lossless(dtype))
    far = far_scale(dtype)
    first = [_start(slot, dtype, meshed) for slot in slots]
    # Scalars side by side, if they are of one type: a hundred selects less.
    together = not meshed and len(set(map(_mesh.varying_axes, first))) == 1
    join = pack if together else lambda sizes: (sizes, list)
    lanes = together and not large and not _mesh.may_be_partitioned() and sum(x.ndim == 0 for x in first) > 1

    def unscaled(_: Any) -> list[jax.Array]:
        return [sum_of_squares(slot, dtype, lanes=lanes) for slot in slots]

    def scaled(scale: jax.Array) -> list[jax.Array]:
        # A scale per array: of a common one XLA would store a broadcast for each shape, 368 MB for GPT-2 124M. Tied to
        # its array, for else those of bfloat16 would be widened in memory, before the loop.
        tied = [[lax.optimization_barrier((x, scale)) for x in slot.arrays] for slot in slots]
        return [
            sum_of_squares(slot._replace(arrays=[x for x, _ in pairs]), dtype, [k for _, k in pairs], lanes)
            for slot, pairs in zip(slots, tied, strict=True)
        ]

    # The first turn of large slots has a branch without the scale, for the library kernels, which jax 0.9 has not.
    branch = large and jax.__version_info__ >= (0, 10)
    # By turn: the scale, what it is undone by, and which norms n are kept: those with sign * n >= bound. Carried, for
    # else each kernel looks them up again.
    rows = [1, 1, 0, 1], [far, 1 / far, 1, low], [1 / far, far, -1, -high]
    turns = [[jnp.asarray(x, dtype) for x in row] for row in rows]

    def once(carry: Any) -> Any:
        turn, (scale, *rest), sizes = carry
        new = lax.cond(turn == 0, unscaled, scaled, scale) if branch else scaled(scale)
        new = _added_up(new, first) if lanes else join(new)[0]
        following = [lax.select(turn == 0, second, third) for second, third in zip(*turns[1:], strict=True)]
        if not large and not meshed:
            # A call of the library, for jax 0.12 makes one kernel of a loop over small leaves that has none: 5.5 s to
            # compile a hundred, instead of 2.3 s. Not a sort, for XLA:CPU cannot serialize one that has run.
            turn = lax.top_k(jnp.stack([turn, -1]).astype(jnp.float32), 1)[0][0].astype(jnp.int32)
        return turn + 1, following, [_better(n, s, *rest) for n, s in zip(sizes, new, strict=True)]

    def again(carry: Any) -> jax.Array:
        turn, _, sizes = carry
        return _turns(sizes, low, high, dtype, meshed) >= turn.astype(dtype)

    sizes, unjoin = join(first)
    *_, sizes = lax.while_loop(again, once, (jnp.int32(0), turns[0], sizes))
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
def _better(size: jax.Array, total: jax.Array, back: jax.Array, sign: jax.Array, bound: jax.Array) -> jax.Array:
    return lax.select(size * sign >= bound, size, jnp.sqrt(total) * back)


def _nothing(slot: Slot, dtype: Any) -> jax.Array:
    """Zero, with the type of a sum over the slot, its mesh axes included: the sum over an empty part of it."""
    if not _mesh.partitioned(slot.arrays) and not any(map(_mesh.varying_axes, slot.arrays)):
        return jnp.zeros(kept_shape(slot.arrays[0], slot.dims), dtype)
    arrays = list({jax.typeof(x): x for x in slot.arrays}.values())
    dims = None if slot.dims is None else (0, *(a + 1 for a in slot.dims))
    zero = sum_of_squares(Slot([x[None][:0] for x in arrays], dims, slot.groups, slot.mesh), dtype)
    return zero if dims is None else zero[0]


def sum_of_squares(slot: Slot, dtype: Any, scale: Any = None, lanes: bool = False) -> jax.Array:
    """The sum of (scale * x)^2 over a slot, one number of it in `_lanes`; ``scale`` may come once per array."""
    scales = scale if isinstance(scale, list) else [scale] * len(slot.arrays)
    total: Any = None
    for x, k in zip(slot.arrays, scales, strict=True):
        each = square(x, dtype, k)
        if lanes and slot.dims is None:
            part = _lanes(each)
        elif _stored(x) and (slot.dims is None or leading(slot.dims)):
            part = _sum_in_two_steps(each, slot.dims)
        else:
            part = _short(each, jnp.sum) if slot.dims is None else jnp.sum(each, slot.dims, keepdims=True)
        total = part if total is None else total + part
    return total


def _stored(x: jax.Array) -> bool:
    """Whether XLA:CPU, for want of a library kernel for their sum, would store the squares of ``x``, and it is large.

    Not where the compiler may partition ``x``, for its blocks would move.
    """
    library = jax.__version_info__ >= (0, 10) and x.dtype in (jnp.float32, jnp.float64, jnp.bfloat16)
    return not library and x.size >= SMALL and not _mesh.may_be_partitioned()


def _sum_in_two_steps(x: jax.Array, dims: tuple[int, ...] | None) -> jax.Array:
    """The sum over all or the first axes; what is stored is an eighth of the numbers.

    All squares of float16, in float32, are twice the gradient: a clip of GPT-2 takes 161 ms instead of 67 ms.
    """
    kept = kept_shape(x, dims)
    columns = SIDE if dims is None else math.prod(kept)
    flat = jnp.ravel(x)
    whole = flat.size - flat.size % (ROWS * columns)
    blocks = jnp.reshape(flat[:whole], (-1, ROWS, columns))
    added = functools.reduce(lax.add, (blocks[:, i] for i in range(ROWS)))
    # As bits without a sign, or XLA makes one sum of both; jax 0.10 drops the barrier before it does.
    added = lax.optimization_barrier(lax.bitcast_convert_type(bits_without_sign(added), x.dtype))
    rest = flat[whole:]
    if dims is None:
        return jnp.sum(added) + jnp.sum(rest)
    return jnp.reshape(jnp.sum(added, 0) + jnp.sum(jnp.reshape(rest, (-1, columns)), 0), kept)


def _lanes(x: jax.Array) -> jax.Array:
    """Of a small array, 32 numbers with the same sum, in one kernel."""
    blocks = max(1, -(-x.size // 1024))
    rows = -(-x.size // (32 * blocks))
    flat = jnp.pad(jnp.ravel(x), (0, blocks * rows * 32 - x.size))
    return jnp.sum(functools.reduce(lax.add, list(jnp.reshape(flat, (blocks, rows, 32)))), 0)


def _added_up(totals: list[jax.Array], first: list[jax.Array]) -> list[jax.Array]:
    """The sums as `pack` joins them, the lanes of all numbers added up at once.

    Each number alone takes a kernel more: AGC's 98 vectors of GPT-2 then have 1320 kernels on jax 0.12 instead of 1076.
    """
    rows = [total for total, size in zip(totals, first, strict=True) if size.ndim == 0]
    return [jnp.sum(stack(rows), 1), *(total for total, size in zip(totals, first, strict=True) if size.ndim)]


def _short(x: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """The sum or maximum of ``x``; of a small array in steps of at most 32 numbers.

    XLA:CPU stores what it sums, to cut a longer sum into windows of 32 itself: three fusions instead of two.
    """
    while 32 < x.size < SMALL and not _mesh.partitioned([x]):
        rows = next((r for r in range(32, 1, -1) if x.size % r == 0), 1)
        if rows == 1:
            break
        x = lax.optimization_barrier(reduce(jnp.reshape(x, (rows, -1)), 0))
    return reduce(x)
