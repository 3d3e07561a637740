"""Values that cross the border of a ``vmap`` or of a loop, and the sum over examples at the end.

Inside, a factor is the array of one example (of one step). Outside it has one more axis; the label of that axis is
put in front. Values that do not depend on the example (the step) are not carried across: they are the same on both
sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip.per_example._block import Block, Region, evaluate
from optclip.per_example._jax import Literal, bind, sum_over_shards
from optclip.per_example._terms import Dense, Factored, Term, dense, leader, materialize_term, new_label, wide

__all__ = ["Lifted", "as_factored", "contract", "pack", "run_batched"]


Unpack = Callable[[Sequence[Any], "int | None"], list[Any]]


class Lifted(NamedTuple):
    """An array outside the border, and whether it has the extra leading axis."""

    array: Any
    stacked: bool


def as_factored(value: Any) -> Factored:
    return value if isinstance(value, Factored) else dense(jnp.asarray(value))


def pack(values: Sequence[Any], outside: dict[int, Lifted]) -> tuple[list[Any], Unpack]:
    """The arrays that must cross a border, and how to put the values together on the other side.

    ``outside`` maps the id of an array that is known on the other side to what it is there. The second result takes the
    arrays that crossed, all of them stacked, and the label of the new axis (None: no axis was added); arrays come
    back as `Lifted`.
    """
    crossing: list[Any] = []
    place: dict[int, int] = {}

    def note(array: Any) -> Lifted | int:
        if id(array) in outside:
            return outside[id(array)]
        if id(array) not in place:
            place[id(array)] = len(crossing)
            crossing.append(array)
        return place[id(array)]

    def note_factors(term: Term) -> Term:
        return dataclasses.replace(
            term, factors=tuple(dataclasses.replace(f, array=note(f.array)) for f in term.factors)
        )

    # What waits for the other side holds places, not arrays: these belong to this side, and may not outlive it.
    noted = [
        dataclasses.replace(v, terms=tuple(map(note_factors, v.terms))) if isinstance(v, Factored) else note(v)
        for v in values
    ]

    def unpack(arrays: Sequence[Any], label: int | None) -> list[Any]:
        def lift(at: Lifted | int) -> Lifted:
            return at if isinstance(at, Lifted) else Lifted(arrays[at], label is not None)

        def lift_factor(factor: Any) -> Any:
            array, stacked = lift(factor.array)
            labels = (label, *factor.labels) if stacked else factor.labels
            return dataclasses.replace(factor, array=array, labels=labels)

        def lift_value(value: Any) -> Any:
            if not isinstance(value, Factored):
                return lift(value)
            terms = (dataclasses.replace(t, factors=tuple(map(lift_factor, t.factors))) for t in value.terms)
            return dataclasses.replace(value, terms=tuple(terms))

        return list(map(lift_value, noted))

    return crossing, unpack


def run_batched(
    block: Block,
    inputs: Sequence[Lifted],
    regions: dict[str, Region],
    finish: Callable[[list[Any]], list[Any]],
) -> tuple[list[Any], int]:
    """Runs a block for all examples at once: what depends on no example once, the rest under ``vmap``.

    ``finish`` is applied, for one example, to the values of all outputs. Its results come back lifted, with the label
    of the example axis.
    """
    env = dict(zip(block.jaxpr.constvars, block.program.consts, strict=True))
    depends = block.depends([x.stacked for x in inputs])
    shared = [e for e in block.live if not any(isinstance(v, Literal) is False and v in depends for v in e.invars)]
    for v, x in zip(block.jaxpr.invars, inputs, strict=True):
        if not x.stacked:
            env[v] = x.array
    for eqn in shared:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        env.update(zip(eqn.outvars, bind(eqn, values), strict=True))
    outside = {id(array): Lifted(array, False) for array in env.values()}
    done = set(map(id, shared))
    per_example = [e for e in block.live if id(e) not in done]
    stacked_vars = [v for v, x in zip(block.jaxpr.invars, inputs, strict=True) if x.stacked]
    unpack: list[Callable] = []

    def one(rows: list[Any]) -> list[Any]:
        local = {**env, **dict(zip(stacked_vars, rows, strict=True))}
        evaluate(block, per_example, local, regions)
        crossing, back = pack(finish([read_output(block, local, i) for i in range(len(block.jaxpr.outvars))]), outside)
        unpack.append(back)
        return crossing

    arrays = jax.vmap(one)([x.array for x in inputs if x.stacked])
    label = new_label()
    return unpack[-1](arrays, label), label


def read_output(block: Block, env: dict, i: int) -> Any:
    """Output ``i``; a gradient that is known to be zero is an empty sum."""
    v = block.jaxpr.outvars[i]
    if isinstance(v, Literal):
        return jnp.asarray(v.val, v.aval.dtype)
    if i in block.gradients and v in block.zeros:
        return Factored((), v.aval.shape, v.aval.dtype)
    return env[v]


def contract(value: Factored, label: int, coefs: jax.Array, keep: jax.Array | None) -> jax.Array:
    """``sum_i c_i G_i``, in float32 or wider: the example axis is one more summed label."""

    def total(arrays: tuple[list[Any], jax.Array, jax.Array | None]) -> jax.Array:
        factors, coefs, keep = arrays
        result = jnp.zeros(value.shape, wide(value.dtype))
        for term, new in zip(value.terms, factors, strict=True):
            pairs = zip(term.factors, new, strict=True)
            term = dataclasses.replace(term, factors=tuple(dataclasses.replace(f, array=a) for f, a in pairs))
            term = _weighted(term, label, coefs, keep)
            result += materialize_term(term, term.precision, in_place=True).astype(result.dtype)
        return result

    return sum_over_shards(total, ([[f.array for f in t.factors] for t in value.terms], coefs, keep))


def _weighted(term: Term, label: int, coefs: jax.Array, keep: jax.Array | None) -> Term:
    factors = list(term.factors)
    arrays = [i for i, f in enumerate(factors) if isinstance(f, Dense) and label in f.labels]
    if keep is not None:
        for i in arrays:  # zero times inf is not zero: what is dropped must go from every factor
            array = factors[i].array
            factors[i] = dataclasses.replace(factors[i], array=jnp.where(_along(keep, array), array, 0))
    if not arrays:
        weights = Dense(coefs.astype(wide(coefs.dtype)), (label,))
        return dataclasses.replace(term, factors=(*factors, weights))
    if len(factors) == 1:
        return dataclasses.replace(term, factors=(_weighted_rows(factors[0], coefs),))
    # The coefficient goes into the factor that the product has to transpose anyway.
    lead = leader(term)
    i = lead if lead in arrays else arrays[0]
    array = factors[i].array
    product = _along(coefs, array).astype(wide(array.dtype)) * array
    factors[i] = dataclasses.replace(factors[i], array=product.astype(array.dtype))
    return dataclasses.replace(term, factors=tuple(factors))


def _weighted_rows(gradient: Any, coefs: jax.Array) -> Dense:
    """``sum_i c_i G_i`` of gradients that are there, as a product of a vector and a matrix.

    XLA:CPU takes 30 times as long for a sum over examples of a product, and 4 times for one with many axes.
    """
    array = gradient.array.astype(wide(gradient.array.dtype))
    rows = array.reshape(len(array), -1)
    total = jnp.matmul(coefs.astype(rows.dtype), rows, precision=jax.lax.Precision.HIGHEST)
    return Dense(total.reshape(array.shape[1:]), gradient.labels[1:])


def _along(vector: jax.Array, array: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector, range(1, array.ndim))
