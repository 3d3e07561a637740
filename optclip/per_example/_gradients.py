"""Equations that make gradients: a product of an activation and a cotangent, summed over positions.

Each rule takes the equation and its inputs (arrays) and returns the `Factored` output, or None to decline.
Adding one is a function here and a row in `GRADIENTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from optclip.per_example._convolution import convolution
from optclip.per_example._jax import JaxprEqn
from optclip.per_example._labels import regroup
from optclip.per_example._terms import Axis, Dense, Factored, OneHot, Term, dense, new_label

__all__ = ["GRADIENTS"]


def _dot_general(eqn: JaxprEqn, x: Any, y: Any) -> Factored | None:
    """``G[b, m, n] = sum_t x[b, t, m] y[b, t, n]`` in every order of dimensions."""
    (contract_x, contract_y), (batch_x, batch_y) = eqn.params["dimension_numbers"]
    labels_x = [new_label() for _ in x.shape]
    labels_y = [new_label() for _ in y.shape]
    for i, j in (*zip(contract_x, contract_y, strict=True), *zip(batch_x, batch_y, strict=True)):
        labels_y[j] = labels_x[i]
    free_x = [labels_x[i] for i in range(x.ndim) if i not in (*contract_x, *batch_x)]
    free_y = [labels_y[i] for i in range(y.ndim) if i not in (*contract_y, *batch_y)]
    kept = [*(labels_x[i] for i in batch_x), *free_x, *free_y]
    factors = (Dense(x, tuple(labels_x)), Dense(y, tuple(labels_y)))
    term = Term(factors, tuple(Axis((label,)) for label in kept), eqn.params["precision"])
    out = eqn.outvars[0].aval
    return Factored((term,), out.shape, out.dtype)


def _scatter_add(eqn: JaxprEqn, operand: Any, indices: Any, updates: Any) -> Factored | None:
    """``G[v, d] = operand[v, d] + sum_t [indices[t] = v] updates[t, d]``: whole rows, picked along one axis."""
    numbers = eqn.params["dimension_numbers"]
    picked = numbers.scatter_dims_to_operand_dims
    window = [i for i in range(len(operand.shape)) if i not in picked]
    whole_rows = (
        len(picked) == 1
        and numbers.inserted_window_dims == picked
        and not numbers.operand_batching_dims
        and [updates.shape[i] for i in numbers.update_window_dims] == [operand.shape[i] for i in window]
    )
    mode = str(eqn.params["mode"])
    if not whole_rows or not any(known in mode for known in ("FILL_OR_DROP", "CLIP", "PROMISE_IN_BOUNDS")):
        return None
    rows = operand.shape[picked[0]]
    ids = jnp.squeeze(indices, -1)
    if "FILL_OR_DROP" in mode:
        inside = (ids >= 0) & (ids < rows)
        where = [i for i in range(updates.ndim) if i in numbers.update_window_dims]
        updates = jnp.where(jnp.expand_dims(inside, where), updates, 0)
    ids = jnp.clip(ids, 0, rows - 1).astype(jnp.int32)

    labels = [new_label() for _ in updates.shape]
    tokens = tuple(x for i, x in enumerate(labels) if i not in numbers.update_window_dims)
    columns = [labels[i] for i in numbers.update_window_dims]
    row = new_label()
    columns.insert(picked[0], row)
    factors = (OneHot(ids, tokens, row, rows), Dense(updates, tuple(labels)))
    term = Term(factors, tuple(Axis((label,)) for label in columns))
    onto = operand if isinstance(operand, Factored) else dense(operand)
    return Factored((*onto.terms, term), operand.shape, operand.dtype)


def _reduce_sum(eqn: JaxprEqn, x: Any) -> Factored | None:
    """Carried out, but without axes of length 1, as a batch of one has: with them XLA:CPU takes seven times as long."""
    if 1 not in x.shape:
        return None
    axes = [i for i, n in enumerate(x.shape) if n > 1]
    gone = tuple(axes.index(i) for i in eqn.params["axes"] if i in axes)
    out = eqn.outvars[0].aval
    term = regroup(dense(jnp.sum(jnp.squeeze(x), gone)).terms[0], out.shape)
    return None if term is None else Factored((term,), out.shape, out.dtype)


GRADIENTS: dict[str, Callable[..., Factored | None]] = {
    "conv_general_dilated": convolution,
    "dot_general": _dot_general,
    "reduce_sum": _reduce_sum,
    "scatter-add": _scatter_add,
}
