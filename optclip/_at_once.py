"""On an accelerator: sums of squares at three scales from one read, in few kernels.

A loop that may turn again would wait for the host. And a kernel costs 3 us whatever it does, as long as an H200 reads
12 MB: XLA:GPU makes 200 of them for a plain norm of GPT-2 124M, two for each large leaf and one for each small one. So:

* A first kernel sums parts of a leaf, rows or blocks of columns, and the sums of all parts are summed together.
* Each first kernel reads the scales from one and the same vector. XLA merges kernels that share an array.
* The three sums are one reduction, for XLA reads the leaf again for each, or stores its squares, where it is over
  columns.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optclip._slots import Slot, Sums, far_scale, rows_of, sum_of_squares
from optclip._vectors import alike, concatenate, stack

Three = Sequence[jax.Array]  # at the scales 2^-88, 1 and 2^88 (of float32)

BLOCK = 32  # rows of a block of columns; 16 are 9 % more to write and to read, 64 too few threads for a leaf


def sums_at_once(slots: Sequence[Slot], dtype: Any, meshed: bool) -> list[Sums]:
    """The sums of each slot; ``meshed``, array by array, for the compiler partitions them."""
    far = far_scale(dtype)
    # Behind a barrier, for of constants, a leaf or the scales, XLA makes (x k)^2 = x^2 k^2, and the range is lost.
    arrays, ends = lax.optimization_barrier(([slot.arrays for slot in slots], jnp.asarray([1 / far, far], dtype)))
    down, up = lax.split(ends, (1, 1))
    scales = jnp.reshape(down, ()), None, jnp.reshape(up, ())
    done, parts = [], []
    for slot in [slot._replace(arrays=same) for slot, same in zip(slots, arrays, strict=True)]:
        squares = [_squares(x, dtype, scales) for x in slot.arrays]
        if meshed or not (slot.dims is None or _columns(slot)):
            done.append(Sums([sum_of_squares(slot, dtype, k) for k in scales], slot.groups, slot.mesh))
        elif slot.dims is None:
            parts.append((slot, _joined(list(map(_rows, squares)))))
        else:
            parts.append((slot, _blocks(squares[0], len(slot.dims))))
    return done + _sums_of_parts(parts)


def _sums_of_parts(parts: list[tuple[Slot, Three]]) -> list[Sums]:
    """The sums over the first axis of the parts of each slot; slots with parts of one shape as rows of one array."""
    alone = len({slot.groups for slot, _ in parts}) == len(parts)  # else they are still to be added up
    kinds = [(slot.mesh, *map(jax.typeof, three)) if alone else i for i, (slot, three) in enumerate(parts)]
    done = []
    for same in alike(parts, kinds):
        together = [stack(each) for each in zip(*(three for _, three in same), strict=True)]
        groups = tuple(group for slot, _ in same for group in slot.groups)
        done.append(Sums(_add_up(together, (1,)), groups, same[0][0].mesh))
    return done


def _columns(slot: Slot) -> bool:
    """Whether the slot has the sums of the columns of a matrix, once its first axes are taken as one."""
    return slot.dims == tuple(range(len(slot.dims or ()))) and math.prod(slot.arrays[0].shape[len(slot.dims) :]) >= 32


def _squares(x: jax.Array, dtype: Any, scales: Sequence[jax.Array | None]) -> Three:
    parts = [p.astype(dtype) for p in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    squares = [[jnp.square(p if k is None else p * k) for p in parts] for k in scales]
    return [s[0] if len(s) == 1 else s[0] + s[1] for s in squares]


def _rows(squares: Three) -> Three:
    """The sums of the rows of a large array, and the numbers of a small one, as vectors."""
    return [jnp.ravel(x) for x in _add_up(squares, rows_of(squares[0]))]


def _blocks(squares: Three, axes: int) -> Three:
    """The sums of blocks of each column, as [blocks, columns]; the first ``axes`` make up a column."""
    shape = squares[0].shape
    rows, columns = math.prod(shape[:axes]), math.prod(shape[axes:])
    flat = [jnp.pad(jnp.reshape(x, (rows, columns)), ((0, -rows % BLOCK), (0, 0))) for x in squares]
    zero = [jnp.zeros((), x.dtype) for x in flat]
    return lax.reduce_window(flat, zero, _add, (BLOCK, 1), (BLOCK, 1), "VALID")


def _joined(threes: Sequence[Three]) -> Three:
    return threes[0] if len(threes) == 1 else [concatenate(each) for each in zip(*threes, strict=True)]


def _add_up(three: Three, dims: Sequence[int]) -> Three:
    if not dims:
        return three
    return lax.reduce(list(three), [jnp.zeros((), x.dtype) for x in three], _add, tuple(dims))


def _add(a: Three, b: Three) -> Three:
    return [x + y for x, y in zip(a, b, strict=True)]
