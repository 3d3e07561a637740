"""Euclidean norms of any finite gradient, in one pass over it.

A sum of squares leaves the range of float32 for numbers beyond about 1e19 or below 1e-19, although the norm does not.
A second measure at another scale is right, but its code stands in the program of everybody, run or not. So:

* On a CPU (`_loop`) the pass is the body of a loop that runs once, and again, scaled by 2^88 and 2^-88, where a sum was
  out of range. One body is one set of fusions, bytes and collectives; a second measure under `lax.cond` has two of each
  (1365 MB instead of 499 MB on the shapes of GPT-2 124M). The first turn has a branch without the scale, for XLA's
  library kernel for a plain sum of squares is twice as fast. Not so where arrays may be partitioned: each branch would
  hold an all-reduce. Inside ``shard_map`` the norms of devices are exact, and their squares at three scales add up.
* Elsewhere (`_at_once`) three sums, at the scales 2^-88, 1 and 2^88, come from one read.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optclip import _mesh
from optclip._at_once import sums_at_once
from optclip._loop import norms_in_loops, sum_of_squares
from optclip._slots import Plan, Slot, Sums, by_group, far_scale, in_shape, lossless, slots_of, stacked


def norms(leaves: Sequence[jax.Array], plan: Plan, dtype: Any) -> list[jax.Array]:
    """The Euclidean norm of each group of leaves, in ``dtype``."""
    meshed, manual = _mesh.partitioned(leaves), any(plan.mesh)
    slots = slots_of(leaves, plan, meshed)
    if jax.default_backend() != "cpu":
        if not meshed and not manual:
            slots = stacked(slots)
        sizes = _across(sums_at_once(slots, dtype, meshed))
    elif manual:
        sizes = _across(_local_sums(slots, dtype, meshed))
    else:
        units = any(slot.dims is not None for slot in slots)
        if not meshed and not (units and _mesh.may_be_partitioned()):  # their shards would move
            slots = stacked(slots, units)
        sizes = {}
        for slot, size in zip(slots, norms_in_loops(slots, dtype, meshed), strict=True):
            sizes |= by_group(slot.groups, size)
    return in_shape([size for _, size in sorted(sizes.items())], leaves, plan)


def scaled_down(x: jax.Array, dtype: Any) -> jax.Array:
    """The sum of squares of all of x, at a scale where it is finite if x is.

    One read at memory speed; to test each number and reduce the flags takes XLA:CPU two to three times as long.
    """
    # Behind a barrier, for of a constant XLA makes (x k)^2 = x^2 k^2.
    x, scale = lax.optimization_barrier((x, jnp.asarray(1 / far_scale(dtype), dtype)))
    return sum_of_squares(Slot([x], None, (0,), ()), dtype, scale)


def _local_sums(slots: list[Slot], dtype: Any, meshed: bool) -> list[Sums]:
    """The sums of a device, from norms that are exact: so that they can be added up over devices."""
    far = far_scale(dtype)
    # Behind a barrier, for of constants XLA makes (x k)^2 = x^2 k^2, and the range is lost.
    down, up = lax.optimization_barrier((jnp.asarray(1 / far, dtype), jnp.asarray(far, dtype)))
    three = lambda n: [jnp.square(n * down), jnp.square(n), jnp.square(n * up)]
    local = norms_in_loops(slots, dtype, meshed)
    return [Sums(three(n), slot.groups, slot.mesh) for slot, n in zip(slots, local, strict=True)]


def _across(sums: list[Sums]) -> dict[int, jax.Array]:
    """Adds up sums at three scales over slots and devices, in one collective, and makes norms of them."""
    flat = _mesh.all_reduce([x for one in sums for x in one.three], [one.mesh for one in sums for _ in range(3)])
    totals: dict[tuple[int, ...], list[jax.Array]] = {}
    for i, one in enumerate(sums):
        three, before = flat[3 * i : 3 * i + 3], totals.get(one.groups)
        totals[one.groups] = three if before is None else [a + b for a, b in zip(before, three, strict=True)]
    sizes = {}
    for groups, (down, middle, up) in totals.items():
        (low, high), far = lossless(middle.dtype), far_scale(middle.dtype)
        size = jnp.sqrt(jnp.where(middle < low, up, jnp.where(middle <= high, middle, down)))
        scale = jnp.where(middle < low, 1 / far, jnp.where(middle <= high, 1, far)).astype(size.dtype)
        sizes |= by_group(groups, size * scale)
    return sizes
