"""The obvious way, ``vmap(grad)``: the definition of what this package computes, and what its tests compare with.

Costs a whole gradient of memory per example. Same contract as `optclip.per_example._engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optclip.per_example._front import Call
from optclip.per_example._limits import Weights
from optclip.per_example._terms import wide

__all__ = ["clip", "measure_norms"]


def _gradients(call: Call, examples: list[jax.Array]) -> tuple[jax.Array, Any, list[jax.Array], list[jax.Array]]:
    grad = jax.value_and_grad(call.loss, has_aux=True)
    (losses, aux), grads = jax.vmap(lambda example: grad(call.params, example))(examples)
    grads = [g.astype(wide(g.dtype)) for g in grads]
    return losses, aux, grads, [jnp.sum(jnp.square(g), axis=range(1, g.ndim)) for g in grads]


def measure_norms(call: Call, examples: list[jax.Array]) -> tuple[jax.Array, Any, list[jax.Array]]:
    """Losses [B], aux [B, ...] and, per parameter leaf, the squared norm [B] of each example's gradient."""
    losses, aux, _, squares = _gradients(call, examples)
    return losses, aux, squares


def clip(
    call: Call,
    examples: list[jax.Array],
    weigh: Callable[[jax.Array, list[jax.Array]], Weights],
    group: list[int],
) -> tuple[jax.Array, Any, Weights, list[jax.Array]]:
    """Losses, aux, weights, and per leaf the sum over examples of factor times gradient (float32 or wider)."""
    losses, aux, grads, squares = _gradients(call, examples)
    weights = weigh(losses, squares)
    sums = []
    for g, index in zip(grads, group, strict=True):
        if weights.keep is not None:
            g = jnp.where(jnp.expand_dims(weights.keep, range(1, g.ndim)), g, 0)
        sums.append(jnp.tensordot(weights.factors[index].astype(g.dtype), g, 1, precision=jax.lax.Precision.HIGHEST))
    return losses, aux, weights, sums
