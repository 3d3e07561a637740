"""On a CPU: the largest magnitude, NaN included, in one pass over the gradient.

The maximum of XLA:CPU drops NaN, and a select that tells of one is a pass of its own and a copy. As integers, the bits
of numbers >= 0 are in their order, and those of NaN come last. What XLA:CPU reduces it stores first where more than 32
numbers make one, to do it in windows of 32. So here rows of numbers side by side, which are compared at once, are
reduced in windows of at most 32 rows. On the shapes of GPT-2 that is as fast as the Euclidean norm: 22 ms instead of
56 ms.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optclip._slots import Plan, bits_without_sign, by_group, kept_shape, leading, slots_of, stacked
from optclip._vectors import stack

SIDE = 8  # numbers side by side
WINDOW = 32


def largest(leaves: Sequence[jax.Array], plan: Plan, dtype: Any) -> tuple[list[jax.Array], Plan]:
    """The largest magnitudes of parts of groups, infinity for NaN; and a plan that says of which groups."""
    slots = slots_of(leaves, plan, meshed=False)
    if not any(plan.mesh) and not any(slot.dims for slot in slots):
        slots = stacked(slots)
    parts, rows = [], []
    for slot in slots:
        tops = [_top(x, slot.dims, dtype) for x in slot.arrays]
        top = lax.bitcast_convert_type(tops[0] if len(tops) == 1 else jnp.max(stack(tops)), dtype)
        top = jnp.where(jnp.isnan(top), jnp.inf, top)
        for group, part in by_group(slot.groups, top).items():
            parts.append(part)
            rows.append((slot.dims, group, slot.mesh))
    return parts, Plan(*zip(*rows, strict=True))


def _top(x: jax.Array, dims: tuple[int, ...] | None, dtype: Any) -> jax.Array:
    """The largest over ``dims``, or over all, as the bits of a number."""
    bits = bits_without_sign((jnp.abs(x) if jnp.iscomplexobj(x) else x).astype(dtype))
    if dims is None:
        flat = jnp.ravel(bits)
        whole = flat.size - flat.size % SIDE
        tops = _columns(jnp.reshape(flat[:whole], (-1, SIDE)), dtype)
        return jnp.max(jnp.concatenate([tops, flat[whole:]]), initial=0)
    if not leading(dims):
        return jnp.max(bits, dims, keepdims=True, initial=0)
    kept = kept_shape(x, dims)
    rows = math.prod(x.shape[: len(dims)])
    return jnp.reshape(_columns(jnp.reshape(bits, (rows, math.prod(kept))), dtype), kept)


def _columns(bits: jax.Array, dtype: Any) -> jax.Array:
    """The largest of each column of a matrix."""
    rows = bits.shape[0]
    window = min(WINDOW, (rows - 1) // WINDOW)  # more than 32 windows, for fewer are fused into what follows
    if window > 1:
        window = next((n for n in range(window, window // 2, -1) if rows % n == 0), window)
        whole = rows - rows % window
        windows = jnp.max(jnp.reshape(bits[:whole], (whole // window, window, bits.shape[1])), axis=1)
        # As numbers and back, or XLA makes one maximum of both; jax 0.10 drops the barrier before it does.
        numbers = lax.bitcast_convert_type(lax.optimization_barrier(windows), dtype)
        bits = jnp.concatenate([lax.bitcast_convert_type(numbers, bits.dtype), bits[whole:]])
    return jnp.max(bits, axis=0, initial=0)
