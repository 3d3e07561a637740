"""Clipping without a chain: measure once, and let one norm serve clip, log and skip."""

from typing import Any

import jax
import jax.numpy as jnp

from optclip import _checks, _numerics
from optclip._clip import respond
from optclip.measures import Updates, global_norm
from optclip.responses import rescale

__all__ = ["clip_tree"]


def clip_tree(
    tree: Updates, max_norm: Any, *, norm: Any = None, ord: float = 2, axis_name: Any = None
) -> tuple[Updates, jax.Array]:
    """Scales ``tree`` down so that its norm does not exceed ``max_norm``; returns it with the pre-clip norm.

    tree * min(1, max_norm / norm)

    Args:
      tree: a pytree of arrays.
      max_norm: > 0, a number or a traced scalar.
      norm: the norm to go by, measured before by `global_norm`; None measures it here.
      ord: p > 0, or infinity.
      axis_name: mesh axes to sum over, see `global_norm`.

    Returns:
      ``(tree, norm)``: the clipped tree in its dtypes, and the pre-clip norm, a float32 scalar (float64 if a leaf is).
      A norm that is not finite turns every leaf into NaN.

    Example:
      >>> clipped, norm = clip_tree({"w": jnp.array([3.0, 4.0])}, 1.0)
      >>> float(norm), [round(float(x), 6) for x in clipped["w"]]
      (5.0, [0.6, 0.8])
    """
    if callable(max_norm):
        raise TypeError(f"clip_tree: max_norm must be a number, for there is no step for a schedule, got {max_norm!r}")
    _checks.check_positive("clip_tree", "max_norm", max_norm)
    if norm is None:
        norm = global_norm(tree, ord, axis_name=axis_name)
    else:
        _checks.check("clip_tree", "norm", norm, lambda x: ~(x < 0), ">= 0")
        leaves = filter(_numerics.is_gradient, jax.tree.leaves(tree))
        norm = jnp.asarray(norm).astype(_numerics.accumulator(norm, *leaves))
    return respond(rescale, tree, norm, jnp.asarray(max_norm).astype(norm.dtype)), norm
