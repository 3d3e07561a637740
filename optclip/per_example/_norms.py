"""Squared norms of gradients that are written as sums of products, without forming them when that is dearer.

For one term, with the labels of its two factors sorted into blocks n (kept, in both), t (summed), d and k (kept, in
one of them), there are two ways::

    direct   form G[n, d, k], square, add           2 T d k products, d k numbers of memory
    gram     sum_ts (x_t . x_s) (g_t . g_s)         2 T^2 (d + k) products, 2 T^2 numbers

Direct is taken exactly when G is not larger than its factors, ``d k <= T (d + k)``: the gradient is then kept in place
of them. That rule needs no more products than the other way round, and bounds what either way holds by the size of
the layer's own activations and cotangents: otherwise ``T < d k / (d + k)``, so ``2 T^2 <= T (d + k)``.

Several terms (a parameter used more than once) give ``sum_ij <G_i, G_j>`` by the same products between two terms: the
cross terms are exact. A one-hot factor never becomes a matrix: against an array it is a row lookup, against
another one-hot a comparison of the ids.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip.per_example._labels import regroup
from optclip.per_example._terms import (
    Axis,
    Dense,
    Factored,
    OneHot,
    Term,
    dense,
    einsum,
    materialize_term,
    new_label,
    wide,
)  # fmt: skip

__all__ = ["Cost", "densify", "inner", "is_direct", "squared_norm"]


class Cost(NamedTuple):
    """How a norm was found, for one example: the rule, multiply-adds times two, and numbers kept between the passes."""

    rule: str
    flops: int
    numbers: int


def squared_norm(value: Factored) -> tuple[jax.Array, Factored, Cost]:
    """The squared norm of the gradient, the form in which it is best kept, and what that took."""
    dtype = wide(value.dtype)
    if not value.terms:
        return jnp.zeros((), dtype), value, Cost("zero", 0, 0)
    cost = price(value)
    if is_dense(value) or is_direct(value):
        value = densify(value)
        (term,) = value.terms
        square = _sum_of_squares(term.factors[0].array, dtype)
        return _bound(square, _tiny(dtype, term.factors[0].array.size)), value, cost
    total, lost = jnp.zeros((), dtype), jnp.zeros((), dtype)
    for i, a in enumerate(value.terms):
        for b in value.terms[:i]:
            total += 2 * inner(a, b).astype(dtype)
        total += (_rows_squared(a) if _is_rows(a) else inner(a, a)).astype(dtype)
        lost += _lost(a, dtype, alone=len(value.terms) == 1)
    # A sum of squares in exact arithmetic; rounding may leave it just below zero when tokens cancel.
    return _bound(jnp.maximum(total, 0), len(value.terms) * lost), value, cost


def _sum_of_squares(array: jax.Array, dtype: Any) -> jax.Array:
    return jnp.sum(jnp.square(array.astype(dtype)))


def _bound(total: jax.Array, lost: Any) -> jax.Array:
    """What a squared norm may be at most, of which ``lost`` may have underflowed: a limit then holds for every input.

    Zero stays zero where less than 2^-80 may be lost, a norm of 1e-12: too little for a limit.
    """
    return jnp.where((total > 0) | (lost > 2.0**-80), total + lost, total)


def _tiny(dtype: Any, n: int) -> float:
    """What ``n`` products that underflow may add up to."""
    return n * float(jnp.finfo(dtype).tiny)


def _lost(term: Term, dtype: Any, alone: bool) -> jax.Array:
    """What may be missing from ``|G|^2`` because products of numbers out of range underflowed.

    A product over n numbers loses at most n * tiny, and that is multiplied by what it meets in the other factors. By
    itself (`_gram`) a term forms the product of its cotangents first, which meets the activation twice.
    """
    kept, factors = set(term.kept), [f for f in term.factors if isinstance(f, Dense)]
    met = [_sum_of_squares(f.array, dtype) for f in (factors[:1] if alone and _tokens(term) > 1 else factors)]
    length = max(math.prod(n for x, n in zip(f.labels, f.array.shape, strict=True) if x in kept) for f in factors) + 1
    sizes = sum(f.array.size for f in factors)
    return _tiny(dtype, _tokens(term) * length) * (sum(met, jnp.zeros((), dtype)) + sizes)


def is_direct(value: Factored) -> bool:
    """Whether the gradient is no larger than its factors, or these are complex, and its norm not that of a product."""
    return is_complex(value) or math.prod(value.shape) <= sum(f.array.size for t in value.terms for f in t.factors)


def is_complex(value: Factored) -> bool:
    return any(jnp.iscomplexobj(f.array) for t in value.terms for f in t.factors)


def is_dense(value: Factored) -> bool:
    return len(value.terms) == 1 and value.terms[0].is_dense


def densify(value: Factored) -> Factored:
    """The same gradient as one array (in float32 or wider)."""
    if is_dense(value) and not any(a.placed for a in value.terms[0].axes):
        return value
    if len(value.terms) == 1 and not any(a.placed for a in value.terms[0].axes) and not is_complex(value):
        return Factored((_one_array(value.terms[0]),), value.shape, value.dtype)
    arrays = [materialize_term(t, t.precision) for t in value.terms]
    array = sum(arrays[1:], arrays[0])
    (term,) = dense(array if jnp.issubdtype(value.dtype, jnp.complexfloating) else array.real).terms
    return Factored((dataclasses.replace(term, rule="direct"),), value.shape, value.dtype)


def _one_array(term: Term) -> Term:
    """The product of a term's factors with the axes in whatever order is cheapest: those of the cotangent first."""
    if _is_rows(term):
        array = materialize_term(Term(term.factors, _singles(term)))
        return Term((Dense(array, term.kept),), term.axes, rule="direct")
    kept = set(term.kept)
    order = tuple(dict.fromkeys(x for f in reversed(term.factors) for x in f.labels if x in kept))
    return Term((Dense(einsum(term.factors, order, term.precision), order),), term.axes, term.precision, "direct")


def _singles(term: Term) -> tuple[Axis, ...]:
    return tuple(Axis((x,)) for x in term.kept)


def price(value: Factored) -> Cost:
    size = math.prod(value.shape)
    if is_dense(value):
        return Cost(value.terms[0].rule or "as it stands", 2 * size, size)
    if is_direct(value):
        return Cost("direct", sum(2 * math.prod(t.sizes.values()) for t in value.terms), size)
    numbers = sum(f.array.size for t in value.terms for f in t.factors)
    flops = 0
    for i, a in enumerate(value.terms):
        for b in value.terms[: i + 1]:
            ta, tb = _tokens(a), _tokens(b)
            flops += 2 * ta * tb * sum(f.array.size for f in a.factors if isinstance(f, Dense)) // max(ta, 1)
    if len(value.terms) > 1:
        return Cost("joint", flops, numbers)
    term = next(iter(value.terms))
    rule = "one-hot" if _is_rows(term) else "gram" if _tokens(term) > 1 else "outer"
    return Cost(rule, flops, numbers)


def _tokens(term: Term) -> int:
    kept = set(term.kept)
    return math.prod(size for label, size in term.sizes.items() if label not in kept)


def _is_rows(term: Term) -> bool:
    return any(isinstance(f, OneHot) for f in term.factors)


def inner(a: Term, b: Term) -> jax.Array:
    """``<G_a, G_b>`` of two terms of one shape."""
    if any(x.before + s <= y.before or y.before + s2 <= x.before for x, s, y, s2 in _places(a, b)):
        return jnp.zeros((), jnp.float32)  # they do not overlap
    matched = _match(a, b)
    if matched is None:
        a, b, matched = b, a, _match(b, a)
    if matched is None:
        return jnp.sum(materialize_term(a) * materialize_term(b))
    b = _rename_summed(a, matched)
    if a.factors is matched.factors and len(a.factors) == 2 and not _is_rows(a):
        return _gram(a, b)
    return einsum(_look_up(list(a.factors), list(b.factors)), ())


def _gram(a: Term, b: Term) -> jax.Array:
    """``|G|^2`` of ``G = sum_t x_t g_t``; ``b`` is the same term with its own summed labels."""
    (x, g), (x2, g2) = a.factors, b.factors
    if _tokens(a) == 1 and not set(x.labels) & set(g.labels) & set(a.kept):  # |x g^T| = |x| |g|
        return _sum_of_squares(x.array, wide(x.array.dtype)) * _sum_of_squares(g.array, wide(g.array.dtype))
    # The activation x is used as it lies in memory: sum_t x_t . (sum_s (g_t . g_s) x_s). The form sum_ts (x_t . x_s)
    # (g_t . g_s) needs it transposed as well, a copy that XLA:CPU makes as early as in the forward pass.
    between = [i for i in dict.fromkeys((*g.labels, *g2.labels)) if i in x.labels or i in x2.labels]
    mixed = einsum([Dense(einsum([g, g2], between, in_place=True), tuple(between)), x2], x.labels)
    return jnp.sum(mixed * x.array.astype(mixed.dtype))


def _places(a: Term, b: Term) -> list[tuple[Axis, int, Axis, int]]:
    sa, sb = a.sizes, b.sizes
    return [
        (x, math.prod(sa[i] for i in x.labels), y, math.prod(sb[i] for i in y.labels))
        for x, y in zip(a.axes, b.axes, strict=True)
    ]


def _match(a: Term, b: Term) -> Term | None:
    """``b`` with the kept labels of ``a``; None where the two split an axis differently or only overlap in part."""
    if any((x.before, x.after, n) != (y.before, y.after, m) for x, n, y, m in _places(a, b)):
        return None
    if a is b:
        return b
    sizes = a.sizes
    inside = [sizes[x] for x in a.kept]
    bare = Term(b.factors, tuple(Axis(axis.labels) for axis in b.axes), b.precision)
    renamed = regroup(bare, inside)
    if renamed is None or any(len(axis.labels) != (n > 1) for n, axis in zip(inside, renamed.axes, strict=True)):
        return None
    pairs = zip(a.kept, renamed.axes, strict=True)
    return _rename(renamed, {axis.labels[0]: x for x, axis in pairs if axis.labels}, a.axes)


def _rename(term: Term, names: dict[int, int], axes: tuple[Axis, ...]) -> Term:
    factors: list[Dense | OneHot] = []
    for f in term.factors:
        labels = tuple(names.get(x, x) for x in f.labels)
        if isinstance(f, OneHot):
            factors.append(OneHot(f.array, labels, names.get(f.row, f.row), f.size))
        else:
            factors.append(Dense(f.array, labels))
    return Term(tuple(factors), axes, term.precision)


def _rename_summed(a: Term, b: Term) -> Term:
    """Fresh summed labels for ``b``: the two sums run independently."""
    return _rename(b, {x: new_label() for x in b.sizes if x not in a.kept}, b.axes)


def _look_up(left: list[Dense | OneHot], right: list[Dense | OneHot]) -> list[Dense]:
    """Replaces one-hot factors: by a comparison with the other term's, or by a lookup in the array with that label."""
    factors: list[Dense | OneHot] = [*left, *right]
    while hot := next((f for f in factors if isinstance(f, OneHot)), None):
        factors.remove(hot)
        others = [f for f in factors if (f.row == hot.row if isinstance(f, OneHot) else hot.row in f.labels)]
        if not others:  # a table of one row
            factors.append(Dense(jnp.ones(hot.array.shape, jnp.float32), hot.labels))
        for other in others:
            factors.remove(other)
            factors.append(_same_rows(hot, other) if isinstance(other, OneHot) else _take(hot, other))
    return factors  # type: ignore[return-value]


def _same_rows(a: OneHot, b: OneHot) -> Dense:
    shared = [x for x in a.labels if x in b.labels]
    own_a, own_b = [x for x in a.labels if x not in shared], [x for x in b.labels if x not in shared]
    x = jnp.transpose(a.array, [a.labels.index(i) for i in (*shared, *own_a)])
    y = jnp.transpose(b.array, [b.labels.index(i) for i in (*shared, *own_b)])
    x = jnp.expand_dims(x, range(x.ndim, x.ndim + len(own_b)))
    y = jnp.expand_dims(y, range(len(shared), len(shared) + len(own_a)))
    return Dense((x == y).astype(jnp.float32), (*shared, *own_a, *own_b))


def _take(hot: OneHot, table: Dense) -> Dense:
    """``sum_v [ids = v] table[v, ...]``, with any label that both carry kept aligned."""
    shared = [x for x in hot.labels if x in table.labels]
    rest = [x for x in table.labels if x not in shared]
    own = [x for x in hot.labels if x not in shared]
    array = jnp.transpose(table.array, [table.labels.index(x) for x in (*shared, *rest)])
    ids = jnp.transpose(hot.array, [hot.labels.index(x) for x in (*shared, *own)])
    row = rest.index(hot.row)
    take = lambda table, ids: jnp.take(table, ids, axis=row, mode="clip")
    for _ in shared:
        take = jax.vmap(take)
    return Dense(take(array, ids), (*shared, *rest[:row], *own, *rest[row + 1 :]))


def _rows_squared(term: Term) -> jax.Array:
    """The norm of an embedding's gradient: compare all pairs of ids, or, for long inputs, add up equal rows first."""
    (hot,) = (f for f in term.factors if isinstance(f, OneHot))
    rest = [f for f in term.factors if isinstance(f, Dense)]
    kept = set(term.kept)
    tokens = math.prod(n for x, n in hot.sizes.items() if x not in kept)
    width = math.prod(n for x, n in term.sizes.items() if x in kept and x != hot.row)
    if tokens <= width or set(hot.labels) & kept:
        return inner(term, term)
    ids = hot.array.reshape(-1)
    order = jnp.argsort(ids)
    fresh = jnp.concatenate([jnp.zeros(1, bool), ids[order][1:] != ids[order][:-1]])
    slots = jnp.zeros_like(ids).at[order].set(jnp.cumsum(fresh).astype(ids.dtype)).reshape(hot.array.shape)
    compact = Term((OneHot(slots, hot.labels, hot.row, ids.size), *rest), term.axes, term.precision)
    flat = materialize_term(Term(compact.factors, _singles(term)))
    return jnp.sum(jnp.square(flat))
