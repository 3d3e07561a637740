"""Many numbers as one vector, so that a program for a thousand leaves is not a thousand programs."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# XLA:CPU reads all that it joins in one kernel, and compiles that in the square of their number: 3.6 s for 5,000.
WIDTH = 128


def alike(items: Iterable[Any], kinds: Iterable[Hashable], most: int = WIDTH) -> list[list[Any]]:
    """The items of equal kind, at most so many together."""
    found: dict[Hashable, list[Any]] = {}
    for item, kind in zip(items, kinds, strict=True):
        found.setdefault(kind, []).append(item)
    return [same[i : i + most] for same in found.values() for i in range(0, len(same), most)]


def concatenate(arrays: Sequence[jax.Array]) -> jax.Array:
    """The arrays one after the other, however many."""
    while len(arrays) > WIDTH:
        groups = [arrays[i : i + WIDTH] for i in range(0, len(arrays), WIDTH)]
        arrays = lax.optimization_barrier([jnp.concatenate(group) for group in groups])
    return jnp.concatenate(arrays)


def stack(arrays: Sequence[Any]) -> jax.Array:
    """Arrays of one shape as the rows of one, however many."""
    return concatenate([jnp.expand_dims(x, 0) for x in arrays])


def pack(leaves: list[Any]) -> tuple[list[jax.Array], Callable[[list[jax.Array]], list[jax.Array]]]:
    """All scalars as one vector (a single one as it is), the arrays as they are; and the way back."""
    scalars = [i for i, x in enumerate(leaves) if jnp.ndim(x) == 0]
    arrays = [i for i, x in enumerate(leaves) if jnp.ndim(x) > 0]
    head = [stack([leaves[i] for i in scalars]) if len(scalars) > 1 else leaves[scalars[0]]] if scalars else []

    def unpack(packs: list[jax.Array]) -> list[jax.Array]:
        out: list[Any] = [None] * len(leaves)
        alone = apart(packs[0]) if len(scalars) > 1 else packs[: len(head)]
        for i, x in zip(scalars + arrays, [*alone, *packs[len(head) :]], strict=True):
            out[i] = x
        return out

    return head + [leaves[i] for i in arrays], unpack


@jax.custom_jvp
def apart(array: jax.Array) -> list[jax.Array]:
    """The numbers of a vector, each as a scalar; the rows of an array.

    XLA:CPU fuses a vector into all that reads a part of it, computes it again in each, and compiles each anew, for the
    constant place of the part: AdaGC on 100 leaves made 300 kernels of 60 operations, 6 s. It does not look through a
    loop, although this one never turns, so behind it neither vector nor places are known, and kernels are alike.
    XLA:GPU makes a kernel of each slice, but one for a hundred of them at places that are read from one array.
    """
    if jax.default_backend() != "cpu":
        if array.ndim > 1:
            return _split(array)
        places = _split(lax.optimization_barrier(jnp.arange(array.size, dtype=jnp.uint32)))
        return [lax.reshape(lax.dynamic_slice(array, [i], [1]), ()) for i in places]
    return _rows(array)


def shared(number: Any) -> Any:
    """A number that many kernels read, as a part of an array; arrays as they are.

    XLA:GPU merges kernels that read one array, not so those that share a scalar: it scales GPT-2's 148 leaves in 9
    kernels instead of 148, and has adamw behind that in 17 instead of 150.
    """
    if jax.default_backend() == "cpu" or jnp.ndim(number):
        return number
    return lax.optimization_barrier(jnp.broadcast_to(number, (2,)))[0]


@partial(jax.jit, inline=True)  # compiled once, where a clip is not: a loop is else compiled anew by each call
def _rows(array: jax.Array) -> list[jax.Array]:
    # A place is a row and a column, for a loop that carried a thousand would be slow to compile itself.
    n, width = len(array), math.isqrt(len(array))
    padded = jnp.pad(array, [(0, -n % width)] + [(0, 0)] * (array.ndim - 1))
    table = jnp.reshape(padded, (-1, width, *array.shape[1:]))
    rows, columns = ([jnp.uint32(i) for i in range(length)] for length in table.shape[:2])
    first = lambda carry: lax.reshape(lax.slice(carry[0], [0] * table.ndim, [1] * table.ndim), ())
    never = lambda carry: (first(carry) < 0) & (first(carry) >= 0)
    turn = lambda carry: (carry[0] + 1, carry[1][1:] + carry[1][:1], carry[2][1:] + carry[2][:1])
    table, rows, columns = lax.while_loop(never, turn, (table, rows, columns))
    return [_row(table, rows[i // width], columns[i % width]) for i in range(n)]


@partial(jax.jit, inline=True)  # traced once
def _row(table: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    shape, none = table.shape[2:], jnp.uint32(0)
    return lax.reshape(lax.dynamic_slice(table, [row, column] + [none] * len(shape), (1, 1, *shape)), shape)


@apart.defjvp
def _apart_jvp(primals: Any, tangents: Any) -> Any:
    return apart(*primals), _split(*tangents)


def _split(array: jax.Array) -> list[jax.Array]:
    return [jnp.reshape(x, array.shape[1:]) for x in lax.split(array, [1] * len(array))]
