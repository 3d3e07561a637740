"""From a norm and a limit to a coefficient: the four published rules, one function each.

A rule is any function ``(norm, limit) -> coefficient`` of float arrays that broadcast. It keeps the promise of
`clipped_value_and_grad` when ``norm * coefficient <= limit`` for every norm in [0, inf].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["automatic", "hard", "normalize", "psac"]

Rule = Callable[[jax.Array, jax.Array], jax.Array]


def hard(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """``min(1, C / n)``: the gradient as it is up to the limit C, and rescaled to it above.

    Abadi et al., Deep learning with differential privacy, 2016, algorithm 1 (arXiv 1607.00133).
    """
    return jnp.where(norm > limit, limit / jnp.where(norm > limit, norm, 1), 1).astype(norm.dtype)


def normalize(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """``C / n``: every example weighs the same; a zero gradient stays zero.

    The limit AUTO-V of Bu et al., Automatic clipping, NeurIPS 2023, eq. 4.1 (arXiv 2206.07136).
    """
    return jnp.where(norm > 0, limit / jnp.where(norm > 0, norm, 1), 0).astype(norm.dtype)


def automatic(gamma: float = 0.01) -> Rule:
    """``C / (n + gamma)``: AUTO-S, normalising, but small gradients stay small and keep their order.

    Args:
      gamma: stability constant, > 0, in the unit of a gradient norm; 0.01 is the paper's default.

    Bu et al., Automatic clipping, NeurIPS 2023, eq. 4.2 (arXiv 2206.07136).
    """
    if not gamma > 0:
        raise ValueError(f"automatic(gamma={gamma}): gamma must be > 0; for gamma = 0 use per_example.normalize")
    return lambda norm, limit: (limit / (norm + gamma)).astype(norm.dtype)


def psac(r: float = 0.1) -> Rule:
    """``C / (n + r / (n + r))``: like AUTO-S, without inflating the weight of examples whose gradient is tiny.

    Args:
      r: > 0, in the unit of a gradient norm; 0.1 is one of the values the paper searches.

    Xia et al., Differentially private learning with per-sample adaptive clipping, AAAI 2023, eq. 6 (arXiv 2212.00328).
    """
    if not r > 0:
        raise ValueError(f"psac(r={r}): r must be > 0")
    return lambda norm, limit: (limit / (norm + r / (norm + r))).astype(norm.dtype)
