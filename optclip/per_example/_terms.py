"""The values of the interpreter: gradients that are written down as sums of products, and not computed.

A `Term` is an einsum that has not been run. Its factors are arrays whose axes carry labels; a label that appears in
``axes`` is an index of the gradient, every other label is summed::

    dense layer    G[d, k] = sum_t  x[t, d] g[t, k]        factors x(t, d), g(t, k); axes (d), (k)
    embedding      G[v, d] = sum_t  [ids[t] = v] g[t, d]   factors OneHot(ids(t), v), g(t, d); axes (v), (d)
    anything else  G[d, k]                                 one factor, no summed label

An axis of the gradient is a group of labels, so that reshapes need no arithmetic, with a number of zeros before and
after, so that a slice of a stack of layers knows its place. `Factored` is a sum of terms: a parameter used twice.
Where it can be told, the activation is the first factor and the cotangent the second.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optclip import _numerics

__all__ = [
    "Axis", "Dense", "Factored", "OneHot", "Rerun", "Term", "dense", "einsum", "leader", "materialize",
    "materialize_term", "new_label", "wide",
]  # fmt: skip

new_label = itertools.count().__next__


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """An array, one label per axis."""

    array: Any
    labels: tuple[int, ...]

    @property
    def sizes(self) -> dict[int, int]:
        return dict(zip(self.labels, self.array.shape, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class OneHot:
    """``[array[labels] = row]`` with ``row`` running over ``size`` values: integers that stand for rows of a matrix."""

    array: Any
    labels: tuple[int, ...]
    row: int
    size: int

    @property
    def sizes(self) -> dict[int, int]:
        return {**dict(zip(self.labels, self.array.shape, strict=True)), self.row: self.size}


@dataclasses.dataclass(frozen=True)
class Axis:
    labels: tuple[int, ...]
    before: int = 0
    after: int = 0

    @property
    def placed(self) -> bool:
        return bool(self.before or self.after)


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    factors: tuple[Dense | OneHot, ...]
    axes: tuple[Axis, ...]
    precision: Any = None  # of the product it stands for, as the user asked for it
    rule: str = ""  # how a term of one factor was computed, where that was by a rule

    @property
    def sizes(self) -> dict[int, int]:
        sizes: dict[int, int] = {}
        for factor in self.factors:
            sizes.update(factor.sizes)
        return sizes

    @property
    def kept(self) -> tuple[int, ...]:
        """The labels that index the gradient, in its order."""
        return tuple(label for axis in self.axes for label in axis.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = self.sizes
        return tuple(math.prod(sizes[x] for x in a.labels) + a.before + a.after for a in self.axes)

    @property
    def is_dense(self) -> bool:
        """One factor and nothing to sum: the gradient itself."""
        return len(self.factors) == 1 and isinstance(self.factors[0], Dense) and set(self.kept) == set(self.sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class Factored:
    """A gradient of the given shape and dtype: the sum of its terms (none: zero)."""

    terms: tuple[Term, ...]
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Rerun:
    """A gradient of which only the squared norm is known; the region it came from is to be run again for its sum.

    ``replay`` holds the equations between that region's output ``output`` and the parameter.
    """

    square: Any
    region: int
    output: int
    rule: Any
    replay: tuple[Any, ...] = ()


def dense(array: Any) -> Factored:
    labels = tuple(new_label() for _ in array.shape)
    return Factored((Term((Dense(array, labels),), tuple(Axis((x,)) for x in labels)),), array.shape, array.dtype)


def wide(*dtypes: Any) -> Any:
    """The dtype in which numbers of these dtypes are multiplied and summed: float32, float64, or complex likewise."""
    real = _numerics.accumulator(*dtypes)
    return _numerics.complex_of(real) if any(jnp.issubdtype(d, jnp.complexfloating) for d in dtypes) else real


def einsum(
    factors: Sequence[Any], out: Iterable[int], precision: Any = jax.lax.Precision.HIGHEST, in_place: bool = False
) -> jax.Array:
    """``jnp.einsum`` over labels, summed in float32 or wider, contracted in the cheapest order.

    XLA:CPU takes the transposition of a result into the product, and has no such product of bfloat16 with a sum in
    float32. Under ``vmap`` any may be transposed; ``in_place`` says that this one is not.
    """
    names: dict[int, int] = {}
    operands: list[Any] = []
    dtypes = {f.array.dtype for f in factors}
    dtype = wide(*dtypes)
    widened = len(dtypes) > 1 or (not in_place and jax.default_backend() == "cpu")
    for factor in factors:
        array = factor.array.astype(dtype) if widened else factor.array
        operands += [array, [names.setdefault(x, len(names)) for x in factor.labels]]
    out = [names[x] for x in out]
    return jnp.einsum(*operands, out, optimize="optimal", precision=precision, preferred_element_type=dtype)


def materialize_term(term: Term, precision: Any = None, in_place: bool = False) -> jax.Array:
    """The array a term stands for, in float32 or wider; ``in_place`` as in `einsum`."""
    onehots = [f for f in term.factors if isinstance(f, OneHot)]
    if not onehots:
        lead = set(term.factors[leader(term)].labels)
        order = sorted(term.kept, key=lambda x: (x not in lead, sum(x not in f.labels for f in term.factors)))
        array = einsum(term.factors, order, precision, in_place)
        array = jnp.transpose(array, [order.index(x) for x in term.kept])
    else:
        array = _add_rows(onehots[0], [f for f in term.factors if isinstance(f, Dense)], term.kept)
    sizes = term.sizes
    array = array.reshape([math.prod(sizes[x] for x in axis.labels) for axis in term.axes])
    if any(axis.placed for axis in term.axes):
        array = jnp.pad(array, [(axis.before, axis.after) for axis in term.axes])
    return array


def leader(term: Term) -> int:
    """The factor that had better come first in the product of a term.

    The first of two is transposed, to put its summed labels last; so is the result, unless it starts with that factor.
    In 16 bits it has to (see `einsum`).
    """
    narrow = any(f.array.dtype.itemsize < 4 for f in term.factors)
    result = math.inf if narrow else math.prod(n for x, n in term.sizes.items() if x in term.kept)

    def transposed(i: int) -> float:
        factor = term.factors[i].sizes
        return math.prod(factor.values()) + (0 if set(term.kept[:1]) <= set(factor) else result)

    return min(range(len(term.factors)), key=transposed)


def _add_rows(onehot: OneHot, rest: Sequence[Dense], kept: tuple[int, ...]) -> jax.Array:
    """``sum_t [ids_t = v] rest[t, ...]`` as one scatter-add; blocks (kept labels of the ids) become offsets."""
    sizes = {**onehot.sizes, **{k: v for f in rest for k, v in f.sizes.items()}}
    columns = tuple(x for x in kept if x not in onehot.sizes)
    blocks = tuple(x for x in kept if x in onehot.labels)
    summed = tuple(x for x in onehot.labels if x not in blocks)
    rows = Dense(jnp.ones([sizes[x] for x in onehot.labels], rest[0].array.dtype), onehot.labels)
    missing = set(onehot.labels) - {x for f in rest for x in f.labels}
    updates = einsum([*rest, rows] if missing else rest, (*blocks, *summed, *columns), None)
    ids = jnp.transpose(onehot.array, [onehot.labels.index(x) for x in (*blocks, *summed)])
    count = math.prod(sizes[x] for x in blocks)
    ids = ids.reshape(count, -1) + onehot.size * jnp.arange(count, dtype=ids.dtype)[:, None]
    width = [sizes[x] for x in columns]
    zeros = jnp.zeros([count * onehot.size, *width], updates.dtype)
    table = zeros.at[ids.reshape(-1)].add(updates.reshape(-1, *width), mode="promise_in_bounds")
    table = table.reshape([*(sizes[x] for x in blocks), onehot.size, *width])
    order = (*blocks, onehot.row, *columns)
    return jnp.transpose(table, [order.index(x) for x in kept])


def materialize(value: Any) -> Any:
    """The array a value stands for, in its own dtype."""
    if not isinstance(value, Factored):
        return value
    total = sum((materialize_term(t, t.precision) for t in value.terms), jnp.zeros((), jnp.float32))
    return jnp.broadcast_to(total, value.shape).astype(value.dtype)
