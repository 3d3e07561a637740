"""Argument checks: they raise at construction, and step aside for anything traced, scheduled or on a device."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def check(call: str, name: str, value: Any, holds: Callable[[Any], Any], bound: str) -> None:
    """Raises unless every static number in ``value`` (a number, a schedule, an array, or a pytree of them) holds.

    The message reads ``call(name=value): name must be bound``.
    """
    leaves = jax.tree.leaves(value, is_leaf=lambda x: x is None)
    for leaf in leaves or [value]:
        if isinstance(leaf, jax.Array) or callable(leaf):
            continue  # dynamic: its value may change from step to step, and reading it would wait for the device
        if isinstance(leaf, (bool, np.bool_, str, bytes)) or not isinstance(leaf, (int, float, np.number, np.ndarray)):
            kind = ValueError if leaf is None else TypeError
            raise kind(f"{call}({name}={leaf!r}): {name} must be {bound}, got {type(leaf).__name__}")
        if not np.all(holds(np.asarray(leaf))):
            raise ValueError(f"{call}({name}={leaf!r}): {name} must be {bound}")


def check_positive(call: str, name: str, value: Any) -> None:
    """``value`` > 0; infinity is allowed, NaN and None are not."""
    check(call, name, value, lambda x: x > 0, "> 0")


def check_nonnegative(call: str, name: str, value: Any) -> None:
    """0 <= ``value`` < infinity."""
    check(call, name, value, lambda x: (x >= 0) & (x < np.inf), "finite and >= 0")


def check_fraction(call: str, name: str, value: Any) -> None:
    """0 <= ``value`` < 1, as decays of moving averages are."""
    check(call, name, value, lambda x: (x >= 0) & (x < 1), "in [0, 1)")


def check_count(call: str, name: str, value: Any, least: int = 0) -> None:
    """``value`` is a Python integer >= ``least``: it fixes a shape or counts steps."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{call}({name}={value!r}): {name} must be an integer >= {least}")


def check_ord(call: str, ord: Any) -> float:
    """The order of a norm as a Python float > 0; it decides what is computed, so it cannot be traced."""
    if isinstance(ord, Tracer):
        raise TypeError(f"{call}: ord must be a number, not traced; in optax.inject_hyperparams, static_args='ord'")
    ord = float(ord) if isinstance(ord, jax.Array) and ord.ndim == 0 else ord
    check(call, "ord", ord, lambda p: p > 0, "> 0")
    return float(ord)


def check_fits(what: str, new: Any, old: Any) -> None:
    """Raises unless ``new`` has the structure and shapes of ``old``, a part of the state."""
    trees = jax.tree.structure(new), jax.tree.structure(old)
    shapes = [[np.shape(x) for x in jax.tree.leaves(tree)] for tree in (new, old)]
    if trees[0] != trees[1] or shapes[0] != shapes[1]:
        got, had = trees if trees[0] != trees[1] else shapes
        raise ValueError(f"the {what} do not fit the state, which init made for other ones: got {got}, had {had}")


def check_params(call: str, params: Any, why: str) -> None:
    """Raises if ``params`` was not passed to ``update``."""
    if params is None:
        raise ValueError(f"{call} needs the parameters, because {why}: call update(updates, state, params)")
