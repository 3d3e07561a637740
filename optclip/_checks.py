"""Argument checks: they raise at construction, and step aside for anything traced, scheduled or on a device."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check(call: str, name: str, value: Any, holds: Callable[[Any], Any], bound: str, *, tree: bool = False) -> None:
    """Raises unless ``value`` is a scalar or a schedule, and ``bound`` if it is static.

    With ``tree`` it may also be an array, or a pytree of all these. The message reads
    ``call(name=value): name must be bound``.
    """
    leaves = jax.tree.leaves(value, is_leaf=lambda x: x is None or _is_pair(x)) if tree else [value]
    for leaf in leaves or [value]:
        if isinstance(leaf, (jax.Array, np.ndarray)) and leaf.ndim and not tree:
            raise ValueError(f"{call}({name}={leaf!r}): {name} must be a scalar, got shape {leaf.shape}")
        if isinstance(leaf, jax.Array) or callable(leaf):
            continue  # dynamic: its value may change from step to step, and reading it would wait for the device
        said = f"{call}({name}={leaf!r}): {name} must be {bound}"
        if isinstance(leaf, (bool, np.bool_)) or not isinstance(leaf, (int, float, np.number, np.ndarray)):
            raise (ValueError if leaf is None else TypeError)(f"{said}, got {type(leaf).__name__}")
        if not np.all(holds(np.asarray(leaf))):
            raise ValueError(said)


def check_limits(call: str, name: str, value: Any) -> None:
    """Every limit of a prefix tree > 0; infinity is allowed, NaN and None are not."""
    check(call, name, value, lambda x: x > 0, "> 0", tree=True)


def check_positive(call: str, name: str, value: Any) -> None:
    """``value`` > 0; infinity is allowed, NaN and None are not."""
    check(call, name, value, lambda x: x > 0, "> 0")


def check_nonnegative(call: str, name: str, value: Any) -> None:
    """0 <= ``value`` < infinity."""
    check(call, name, value, lambda x: (x >= 0) & (x < np.inf), "finite and >= 0")


def check_fraction(call: str, name: str, value: Any) -> None:
    """0 <= ``value`` < 1, as decays of moving averages are."""
    check(call, name, value, lambda x: (x >= 0) & (x < 1), "in [0, 1)")


def check_above_one(call: str, name: str, value: Any) -> None:
    """``value`` > 1, as a factor on what was must be to let it grow."""
    check(call, name, value, lambda x: x > 1, "> 1")


def check_steps(call: str, name: str, value: Any, least: int = 0) -> None:
    """``value`` counts steps: an integer >= ``least``, or a traced one."""
    if not (isinstance(value, jax.Array) and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer)):
        check_count(call, name, value, least)


def check_count(call: str, name: str, value: Any, least: int = 0) -> None:
    """``value`` is a Python integer >= ``least``, for it fixes a shape."""
    if isinstance(value, jax.Array):
        raise TypeError(f"{call}: {name} must be a Python integer; in optax.inject_hyperparams, static_args={name!r}")
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{call}({name}={value!r}): {name} must be an integer >= {least}")


def check_callable(call: str, **named: Any) -> None:
    """Every argument is a function."""
    for name, value in named.items():
        if not callable(value):
            raise TypeError(f"{call}({name}={value!r}): {name} must be a function, got {type(value).__name__}")


def check_takes(call: str, name: str, function: Any, *arguments: str) -> None:
    """A function takes these arguments, by position."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built in, perhaps
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        said = f"{call}: {name} must be a function of ({', '.join(arguments)}), got {function!r}"
        raise TypeError(f"{said}; does it make one? then call it") from error


def check_transformation(call: str, name: str, value: Any) -> None:
    """``value`` is an Optax transformation, or has its two functions."""
    if not _is_pair(value):
        hint = f"; call it: {value.__name__}(...)" if inspect.isfunction(value) else ""
        raise TypeError(f"{call}({name}={value!r}): {name} must be an Optax transformation{hint}")


def _is_pair(value: Any) -> bool:
    """Whether this is a transformation or a rule: functions ``init`` and ``update``."""
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def check_ord(call: str, ord: Any) -> float:
    """The order of a norm as a Python float > 0; it decides what is computed, so it cannot be traced."""
    if isinstance(ord, Tracer):
        raise TypeError(f"{call}: ord must be a number, not traced; in optax.inject_hyperparams, static_args='ord'")
    as_in_torch = isinstance(ord, str) and ord == "inf"
    if as_in_torch or (isinstance(ord, jax.Array) and ord.ndim == 0):
        ord = float(ord)
    check(call, "ord", ord, lambda p: p > 0, "> 0, a number or infinity")
    return float(ord)


def check_fits(what: str, new: Any, old: Any) -> None:
    """Raises unless ``new`` has the structure and shapes of ``old``, a part of the state."""
    trees = jax.tree.structure(new), jax.tree.structure(old)
    shapes = [[np.shape(x) for x in jax.tree.leaves(tree)] for tree in (new, old)]
    if trees[0] != trees[1] or shapes[0] != shapes[1]:
        got, had = trees if trees[0] != trees[1] else shapes
        raise ValueError(f"the {what} do not fit the state, which init made for other ones: got {got}, had {had}")


def check_params(call: str, params: Any, why: str, updates: Any = ()) -> None:
    """Raises if ``params`` was not passed to ``update``, or has other shapes than ``updates`` of its structure."""
    if params is None:
        raise ValueError(f"{call} needs the parameters, because {why}: call update(updates, state, params)")
    if jax.tree.structure(updates) == jax.tree.structure(params):
        for x, w in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            if np.shape(x) != np.shape(w):
                raise ValueError(f"{call}: a parameter of shape {np.shape(w)} for an update of shape {np.shape(x)}")
