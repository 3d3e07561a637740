"""The hall: a clipper measures the updates, asks a threshold how much is allowed, and responds.

    sizes = measure(updates)
    limits, rule = threshold.update(sizes, state.rule, params)
    updates = response(updates, sizes, limits)

Sizes and limits are prefix trees of the updates; their depth is the scope.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _mesh, _numerics
from optclip._recorded import ClipStats, cast_tree, check_sizes, stats_after, stats_of
from optclip._rules import Threshold, fixed
from optclip._transformation import transformation
from optclip._vectors import apart, shared, stack
from optclip.measures import Measure, Sizes, Updates
from optclip.responses import Response, factors, multiplied, rescale


class ClipState(NamedTuple):
    """The state of a clipper.

    Attributes:
      rule: the memory of the threshold, for its next step.
      stats: `ClipStats` for people, or None if they are not recorded. Nothing in the clipper reads them.
    """

    rule: Any
    stats: ClipStats | None


def clip_by(
    measure: Measure, threshold: Threshold | Any, response: Response | None = None, *, record: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Mix your own clipper: a measure, a threshold and a response.

    Args:
      measure: maps updates to sizes (see `optclip.measures`).
      threshold: a rule (see `optclip.thresholds`), or a number, schedule or prefix tree of them for a fixed limit.
      response: what happens to an update given its size and limit (see `optclip.responses`); None for `rescale`.
      record: whether the state keeps the sizes and limits of the last step, for `optclip.summary`.

    Returns:
      An Optax transformation with a `ClipState`. Where the threshold remembers nothing, ``update`` also takes None or
      Optax's ``EmptyState`` for a state, as Optax's own clips do; it then records nothing, and returns that.

    Guarantees:
      Structure, shapes, dtypes and weak types of updates and state never change. Leaves without a gradient (integers,
      float0, None, masked) pass untouched. A size that is not finite turns the updates of its scope into NaN.

    Example:
      >>> tx = clip_by(leaf_norm, ema_ratio(1.05), rescale)
    """
    response = response or rescale
    _checks.check_callable("clip_by", measure=measure, response=response)
    _checks.check_takes("clip_by", "response", response, "update", "size", "limit")
    rule = threshold if isinstance(threshold, Threshold) else fixed(threshold, call="clip_by", name="threshold")

    def measured(updates: Updates) -> Sizes:
        return one_at_least(measure(updates))

    def rule_for(updates: Updates) -> Threshold:
        return rule.at(updates) if rule.at else rule

    def allowed(rule: Threshold, sizes: Sizes, memory: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        made = rule.update(sizes, memory, params, **extra)
        if not isinstance(made, tuple) or len(made) != 2:
            raise TypeError(f"clip_by: the update of a threshold must return (limits, memory), got {made!r}")
        limits, memory = made
        return limits if jax.tree.leaves(limits) else jnp.full((), jnp.inf, jnp.float32), memory

    def init(params: Any) -> ClipState:
        with _mesh.shapes_only():
            sizes, here = jax.eval_shape(measured, params), rule_for(params)
            memory = here.init(sizes)
            if not record:
                return ClipState(memory, None)
            limits, _ = jax.eval_shape(partial(allowed, here), sizes, memory, params)
        if hasattr(response, "factor") and jax.tree.leaves(params):  # not so for Optax's placeholder for parameters
            _check_shapes(zip(_spread("sizes", sizes, params), _spread("limits", limits, params), strict=True))
        fill = lambda tree, value: jax.tree.map(lambda s: _mesh.like(jnp.full(s.shape, value, s.dtype), s), tree)
        return ClipState(memory, stats_of(fill(sizes, 0), fill(limits, jnp.inf)))

    def update(updates: Updates, state: ClipState, params: Any = None, **extra: Any) -> tuple[Updates, ClipState]:
        sizes, here = measured(updates), rule_for(updates)
        own = own_state(state, lambda: here.init(sizes))
        if own.stats is not None:
            check_sizes(sizes, own.stats)
        try:
            limits, memory = allowed(here, sizes, own.rule, params, **extra)
            memory = cast_tree(memory, own.rule, "numbers the rule remembers")
        except (AttributeError, TypeError, ValueError):
            _check_memory(own.rule, jax.eval_shape(here.init, sizes))
            raise
        after = ClipState(memory, stats_after(sizes, limits, own.stats))
        return respond(response, updates, sizes, limits), after if own is state else state

    return transformation(init, update)


def own_state(state: Any, memory: Callable[[], Any]) -> ClipState:
    """The state of a clipper; None and Optax's ``EmptyState`` do for one whose ``memory`` is empty."""
    if hasattr(state, "stats"):
        return state
    none = state is None or isinstance(state, optax.EmptyState)
    if none and not jax.tree.leaves(fresh := memory()):
        return ClipState(fresh, None)
    which = "but remembers something: pass what init returned" if none else "the state of another transformation"
    raise TypeError(f"a clipper was given a {type(state).__name__}, {which}")


def _check_memory(memory: Any, fresh: Any) -> None:
    """Raises unless the memory of a rule has the form of a fresh one."""
    had, own = (jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree) for tree in (memory, fresh))
    if had != own:
        raise TypeError(f"a clipper was given the state of another one, which remembers {had}; this one {own}")


def of_parameters(clipper: optax.GradientTransformationExtraArgs, call: str) -> optax.GradientTransformationExtraArgs:
    """The clipper whose limits are relative to the parameters, if these have the shapes of the updates."""

    def update(updates: Updates, state: Any, params: Any = None, **extra: Any) -> tuple[Updates, Any]:
        _checks.check_params(call, params, "its limit is relative to their size", updates)
        return clipper.update(updates, state, params, **extra)

    return transformation(clipper.init, update)


def one_at_least(sizes: Sizes) -> Sizes:
    """The sizes; a tree without leaves has the one size 0 at every scope.

    So its state differs from that of a filled tree in no parameter-shaped part, which is how Optax tells
    (`optax.tree.map_params`) that sizes per leaf are no parameters; ``transform_non_params`` is given all as one tree.
    """
    return sizes if jax.tree.leaves(sizes) else jnp.zeros((), jnp.float32)


def respond(response: Response, updates: Updates, sizes: Sizes, limits: Any) -> Updates:
    """Applies ``response`` to every gradient leaf, in float32 or wider, and casts back."""
    every_limit, every_size = _spread("limits", limits, updates), _spread("sizes", sizes, updates)
    leaves, treedef = jax.tree.flatten(updates)
    rows = [i for i, x in enumerate(leaves) if _numerics.is_gradient(x)]
    pairs = [(every_size[i], every_limit[i]) for i in rows]
    if hasattr(response, "factor"):  # those without may go by element whatever the scope
        _check_shapes(pairs)
        new = [_multiply(leaves[i], *made) for i, made in zip(rows, _factors(response.factor, pairs), strict=True)]
    else:
        distinct = {id(limit): limit for _, limit in pairs}
        limits_of = {key: shared(limit) for key, limit in distinct.items()}
        new = [_respond(response, leaves[i], s, limits_of[id(c)]) for i, (s, c) in zip(rows, pairs, strict=True)]
    for i, x in zip(rows, new, strict=True):
        leaves[i] = x
    return treedef.unflatten(leaves)


def _factors(factor: Any, pairs: list[Any]) -> list[Any]:
    """The factors of each pair of size and limit. Single numbers are computed together."""
    alike: dict[Any, dict[Any, Any]] = {}
    for size, limit in pairs:
        ids = id(size), id(limit)
        size, limit = jnp.asarray(size), jnp.asarray(limit)
        kind: Any = ids
        if size.size == limit.size == 1:
            size, limit = (jnp.reshape(x, ()) for x in (size, limit))
            kind = size.dtype, limit.dtype, _mesh.varying_axes(size), _mesh.varying_axes(limit)
        alike.setdefault(kind, {})[ids] = size, limit
    made, one = {}, shared(jnp.ones((), jnp.float32))  # so that all kernels have an array in common
    for found in alike.values():
        size, limit = (stack(x) if len(found) > 1 else x[0] for x in zip(*found.values(), strict=True))
        each = _factor(factor, size, limit)
        each = apart(each) if len(found) > 1 else [shared(each)]
        made |= zip(found, [factors(x, one.astype(x.dtype)) for x in each], strict=True)
    return [made[id(size), id(limit)] for size, limit in pairs]


# Inlined, these leave no mark in the program, but leaves of one shape are traced once: tracing the clip of GPT-2's 148
# leaves takes 0.16 s instead of 0.26 s.
@partial(jax.jit, static_argnums=0, inline=True)
def _factor(factor: Any, size: jax.Array, limit: jax.Array) -> jax.Array:
    dtype = _numerics.accumulator(size, limit)
    return factor(size.astype(dtype), limit.astype(dtype))


@partial(jax.jit, inline=True)
def _multiply(update: Any, same: jax.Array, first: jax.Array, second: jax.Array) -> Any:
    update = jnp.asarray(update)
    _check_broadcasts(update, first)
    dtype = _numerics.accumulator(update, first)
    wide = multiplied(_numerics.widen(update, dtype), same, first.astype(dtype), second.astype(dtype))
    return _numerics.cast_like(wide, update)


@partial(jax.jit, static_argnums=0, inline=True)
def _respond(response: Response, update: Any, size: Any, limit: Any) -> Any:
    dtype = _numerics.accumulator(update, size, limit)
    update, size, limit = (jnp.asarray(x) for x in (update, size, limit))
    size, limit = (jnp.reshape(x, ()) if x.size == 1 else x for x in (size, limit))
    _check_broadcasts(update, size, limit)
    wide = _numerics.widen(update, dtype)
    return _numerics.cast_like(response(wide, size.astype(dtype), limit.astype(dtype)), update)


def _check_shapes(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Raises unless every limit is one number, or fits the shape of its size: others would limit single columns."""
    for size, limit in pairs:
        had, got = jnp.shape(size), jnp.shape(limit)
        if not _fits(got, had) and math.prod(got) != 1:
            raise ValueError(f"a limit of shape {got} does not fit its size, of shape {had}")


def _check_broadcasts(update: jax.Array, *sizes: jax.Array) -> None:
    """Raises unless sizes and limits, taken with the update, leave it its shape."""
    for size in sizes:
        if not _fits(size.shape, update.shape):
            raise ValueError(f"a size or limit of shape {size.shape} does not fit its update, of shape {update.shape}")


def _fits(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    return len(shape) <= len(into) and all(n in (1, m) for n, m in zip(shape[::-1], into[::-1], strict=False))


def _spread(name: str, prefix: Any, updates: Updates) -> list[Any]:
    try:
        return jax.tree.leaves(jax.tree.broadcast(prefix, updates))
    except ValueError as error:
        trees = f"{jax.tree.structure(prefix)} for updates {jax.tree.structure(updates)}"
        raise ValueError(f"the {name} must be a prefix tree of the updates, got {trees}") from error
