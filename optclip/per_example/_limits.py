"""Limits as a prefix tree of the parameters, and coefficients from the squared norms of the leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import _checks
from optclip.per_example._rules import Rule
from optclip.selection import PerLeaf

__all__ = ["Limits", "Weights", "check_norms", "resolve", "weigh"]


class Limits(NamedTuple):
    """``values[g]`` limits the joint norm of the leaves with ``group[leaf] == g``; ``tree`` is the caller's prefix."""

    values: list
    group: list[int]
    tree: Any


class Weights(NamedTuple):
    """What each example is worth: one coefficient per group, and which examples count at all."""

    norms: list[jax.Array]  # per group, shape [B]
    coefs: list[jax.Array]  # per group, shape [B]; 0 where not kept
    factors: list[jax.Array]  # per group, shape [B]: the coefficient, divided by the number of examples for a mean
    keep: jax.Array | None  # bool[B]; None: all of them
    nonfinite: jax.Array  # bool[B]


def resolve(name: str, max_norm: Any, params_tree: Any, what: str = "max_norm") -> Limits:
    """Matches a scalar or a prefix tree of scalars with the parameters; ``what`` the argument is called."""
    placeholder = jax.tree.unflatten(params_tree, range(params_tree.num_leaves))
    values, tree = jax.tree.flatten(max_norm)
    try:
        subtrees = tree.flatten_up_to(placeholder)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {what} must be a prefix of the parameter tree: {error}") from None
    group = [0] * params_tree.num_leaves
    for g, subtree in enumerate(subtrees):
        for leaf in jax.tree.leaves(subtree):
            group[leaf] = g
    return Limits(values, group, tree)


def check_norms(name: str, max_norm: Any) -> None:
    """Raises unless every limit is a number > 0 or a traced scalar."""
    check_no_pattern(name, max_norm)
    for value in jax.tree.leaves(max_norm):
        if callable(value):
            raise TypeError(f"{name}: max_norm must be > 0, not a schedule: pass its value at this step")
        _checks.check_positive(name, "max_norm", value)


def check_no_pattern(name: str, max_norm: Any) -> None:
    if isinstance(max_norm, PerLeaf):
        raise TypeError(f"{name}: max_norm must be a tree here: pass by_path(...)(params)")


def weigh(
    limits: Limits,
    rule: Rule,
    squares: Sequence[jax.Array],
    losses: jax.Array,
    mask: jax.Array | None = None,
    drop: bool = False,
    count: Any = 1,
) -> Weights:
    """Norms and coefficients from the squared norm [B] of every leaf.

    A non-finite norm or a negative limit gives the coefficient NaN, so that the aggregate is loudly NaN, or drops the
    example (``drop``). The ``count`` of a mean goes into the factors, B numbers, and not into the gradient.
    """
    norms = []
    for g in range(len(limits.values)):
        parts = [s for s, leaf_group in zip(squares, limits.group, strict=True) if leaf_group == g]
        norms.append(jnp.sqrt(sum(parts)) if parts else jnp.zeros(losses.shape, jnp.float32))
    finite = jnp.isfinite(losses)
    for norm in norms:
        finite &= jnp.isfinite(norm)
    keep = mask
    if drop:
        keep = finite if mask is None else finite & mask
    coefs = []
    for norm, limit in zip(norms, limits.values, strict=True):
        coef = rule(norm, jnp.asarray(limit, norm.dtype))
        coef = jnp.where(jnp.isfinite(norm) & ~(jnp.asarray(limit) < 0), coef, jnp.nan)
        coefs.append(coef if keep is None else jnp.where(keep, coef, 0))
    factors = [c / jnp.asarray(count, c.dtype) for c in coefs]
    return Weights(norms, coefs, factors, keep, ~finite if mask is None else ~finite & mask)
