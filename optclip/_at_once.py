"""On an accelerator: sums of squares at three scales from one read, in few kernels.

A loop that may turn again would wait for the host. Three sums of what is read once take as long as one; but each kernel
has a cost of its own. XLA:GPU makes 200 for a plain norm of GPT-2 124M, two for each large leaf and one for each small
one, and takes 0.47 ms on an H200, which reads as many bytes in 0.13 ms. Here it is 0.19 ms. So:

* A first kernel sums parts of a leaf, rows or blocks of columns, and the sums of all parts are summed together.
* Before, leaves of one shape that make one size are added up, element by element: 12 kernels, and 1.7 ms instead of
  2.8 ms for 1.5B. Not where the compiler may partition them.
* First kernels read the scales from one and the same vector, for XLA merges kernels that share an array. Not those of
  the largest leaves: merged, their norms take 2.6 ms instead of 1.9 ms for 1.5B.
* The three sums are one reduction, for XLA reads the leaf again for each, or stores its squares, where it is over
  columns.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optclip import _mesh
from optclip._slots import Slot, Sums, far_scale, leading, rows_of, square
from optclip._vectors import alike, concatenate, stack

Three = Sequence[jax.Array]  # at the scales 2^-88, 1 and 2^88 (of float32)

BLOCK = 32  # rows of a block of columns: more are fewer threads, fewer are more sums to write and to read
FUSED = 48  # arrays added up in one kernel, as many as a network may have layers; XLA:GPU allows 96 operands
LARGE = 2**22  # elements of a leaf whose kernels are not to be merged with those of others
WARP = 32  # threads that read side by side: of fewer columns they would read apart


def sums_at_once(slots: Sequence[Slot], dtype: Any, meshed: bool) -> list[Sums]:
    """The sums of each slot; ``meshed``, array by array, for the compiler partitions them."""
    squares_of = _squares([x for slot in slots for x in slot.arrays], dtype)
    add_up = not _mesh.may_be_partitioned()  # else leaves of one shape may be sharded apart, and would move
    done, parts = [], []
    for slot in slots:
        squares = [next(squares_of) for _ in slot.arrays]
        if meshed or not (slot.dims is None or _columns(slot)):
            sums = [_one_by_one(three, slot.dims) for three in squares]
            done.append(Sums(functools.reduce(_add, sums), slot.groups, slot.mesh))
        elif slot.dims is None:
            if add_up:
                squares = [functools.reduce(_add, same) for same in alike(squares, map(jax.typeof, slot.arrays), FUSED)]
            rows = [[jnp.ravel(x) for x in _together(three, rows_of(three[0]))] for three in squares]
            parts.append((slot, [concatenate(each) for each in zip(*rows, strict=True)]))
        else:
            parts.append((slot, _blocks(squares[0], len(slot.dims))))
    return done + _sums_of_parts(parts)


def _sums_of_parts(parts: list[tuple[Slot, Three]]) -> list[Sums]:
    """The sums over the first axis of the parts of each slot; slots with parts of one shape as rows of one array."""
    # Not so those that are still to be added up, among themselves or, in one collective, over a mesh.
    alone = len({slot.groups for slot, _ in parts}) == len(parts) and not any(slot.mesh for slot, _ in parts)
    kinds = [tuple(map(jax.typeof, three)) if alone else i for i, (slot, three) in enumerate(parts)]
    done = []
    for same in alike(parts, kinds):
        if len(same) == 1:
            ((slot, three),) = same
            done.append(Sums(_together(three, (0,)), slot.groups, slot.mesh))
        else:
            joined = [stack(each) for each in zip(*(three for _, three in same), strict=True)]
            done.append(Sums(_together(joined, (1,)), tuple(g for slot, _ in same for g in slot.groups), ()))
    return done


def _columns(slot: Slot) -> bool:
    """Whether the slot has the sums of the columns of a matrix, once its first axes are taken as one."""
    axes, shape = len(slot.dims or ()), slot.arrays[0].shape
    return axes > 0 and leading(slot.dims or ()) and math.prod(shape[axes:]) >= WARP


def _squares(arrays: list[jax.Array], dtype: Any) -> Iterator[Three]:
    """The squares of each array at each scale."""
    far = far_scale(dtype)
    tied: dict[int, Any] = {}
    for same in alike(range(len(arrays)), map(_mesh.varying_axes, arrays), len(arrays)):
        # Behind a barrier, for of constants, arrays or scales, XLA makes (x k)^2 = x^2 k^2, and the range is lost.
        scalars = [jnp.asarray(k, dtype) for k in (1 / far, far)]
        behind, scalars, vector = lax.optimization_barrier(([arrays[i] for i in same], scalars, jnp.stack(scalars)))
        tied |= {i: (x, scalars if x.size >= LARGE else vector) for i, x in zip(same, behind, strict=True)}
    for _, (x, scales) in sorted(tied.items()):
        yield [square(x, dtype, k) for k in (scales[0], None, scales[1])]


def _blocks(squares: Three, axes: int) -> Three:
    """The sums of blocks of each column, as [blocks, columns]; the first ``axes`` make up a column."""
    shape = squares[0].shape
    rows, columns = math.prod(shape[:axes]), math.prod(shape[axes:])
    block = max(1, min(rows, BLOCK))
    flat = [jnp.pad(jnp.reshape(x, (rows, columns)), ((0, -rows % block), (0, 0))) for x in squares]
    zero = [jnp.zeros((), x.dtype) for x in flat]
    return lax.reduce_window(flat, zero, _add, (block, 1), (block, 1), "VALID")


def _together(three: Three, dims: Sequence[int]) -> Three:
    """The sums over some axes, as one reduction."""
    if not dims:
        return three
    return lax.reduce(list(three), [jnp.zeros((), x.dtype) for x in three], _add, tuple(dims))


def _one_by_one(three: Three, dims: Sequence[int] | None) -> Three:
    """The sums over some axes, or all, as reductions that the compiler can partition."""
    return [jnp.sum(x, dims, keepdims=dims is not None) for x in three]


def _add(a: Three, b: Three) -> Three:
    return [x + y for x, y in zip(a, b, strict=True)]
