"""Rules: what a threshold is, the fixed one, and how a rule for one size becomes a rule for any scope."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _mesh, _numerics
from optclip._finite import kept, meant
from optclip._recorded import plain
from optclip._vectors import pack
from optclip.selection import PerLeaf


class Threshold(NamedTuple):
    """A rule in Optax's own shape: two pure functions.

    Attributes:
      init: ``sizes -> memory``, where only shapes and dtypes of ``sizes`` may be used.
      update: ``(sizes, memory, params, **extra) -> (limits, memory)``. A limit is one number or has the shape of its
        size (any that fits the update, for responses that go by element); limits may lie deeper in the tree.
      at: ``updates -> rule``, for a rule that depends on their tree; None for one that does not.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    at: Callable[[Any], Any] | None = None


def fixed(limit: Any, *, call: str = "fixed", name: str = "limit") -> Threshold:
    """A limit that no gradient changes.

    Args:
      limit: > 0; a number, a traced scalar, a schedule from the step count, or a prefix tree of the updates of these
        (one limit per group; ``inf`` for leaves that are measured but not scaled), or `optclip.by_path` or
        `optclip.by_leaf`, which make such a tree of the updates.
      call: the name of the method, for error messages.
      name: the name of its argument, likewise.

    Memory:
      An int32 step count if there is a schedule or a function of the updates, else nothing.

    Example:
      >>> rule = fixed(1.0)
      >>> float(rule.update(jnp.float32(3), rule.init(jnp.float32(3)), None)[0])
      1.0
    """
    _checks.check_limits(call, name, limit)
    if not isinstance(limit, PerLeaf):
        return scheduled(limit)

    def at(updates: Any) -> Threshold:
        limits = limit(updates)
        if jax.tree.leaves(limits):
            _checks.check_limits(call, name, limits)
        return scheduled(limits, counted=True)

    return scheduled(limit)._replace(at=at)


def scheduled(limit: Any, counted: bool = False) -> Threshold:
    """A tree of numbers and schedules as a rule; the memory is a step count if there is a schedule, or ``counted``."""
    limit = plain(limit)
    counted = counted or any(callable(x) for x in jax.tree.leaves(limit))

    def init(sizes: Any) -> Any:
        del sizes
        return jnp.zeros((), jnp.int32) if counted else ()

    def update(sizes: Any, memory: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del params, extra
        dtype = _numerics.accumulator(*jax.tree.leaves(sizes))
        limits = jax.tree.map(lambda x: jnp.asarray(resolve(x, memory)).astype(dtype), limit)
        return limits, optax.safe_increment(memory) if counted else ()

    return Threshold(init, update)


def resolve(value: Any, count: Any) -> Any:
    """The value of a schedule at ``count``, or the value itself."""
    if not callable(value):
        return value
    now = value(count)
    if isinstance(now, Threshold):
        raise TypeError(f"{value!r} makes a rule and is none: call it")
    if not (isinstance(now, (int, float)) or hasattr(now, "dtype") or hasattr(now, "__jax_array__")):
        raise TypeError(f"a schedule must return a number, got {now!r} from {value!r}")
    return now


def per_size(init: Callable[..., Any], update: Callable[..., tuple[Any, Any]]) -> Threshold:
    """Makes a threshold of any scope from a rule for one array of sizes.

    All scalar sizes are handled together, as one vector (a single one as a scalar); sizes that are arrays (units,
    stacked layers) each as it is. A size that is not finite leaves its memory untouched.

    Args:
      init: ``size -> memory`` for an array of sizes of any shape S; every array in the memory has a shape that starts
        with S. For infinities the state keeps the largest number of the dtype.
      update: ``(size, memory, **extra) -> (limit, memory)``, elementwise over S.

    Returns:
      A threshold. Its memory is that of the rule: one vector per field, in ``jax.tree.leaves`` order of the sizes, if
      all sizes are scalars, else a tuple of arrays per field.
    """

    def start(sizes: Any) -> Any:
        packs, _ = pack([_mesh.like(jnp.zeros(jnp.shape(s), s.dtype), s) for s in jax.tree.leaves(sizes)])
        return _join([kept(_mesh.like(init(size), size)) for size in packs])

    def step(sizes: Any, memory: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del params
        leaves, treedef = jax.tree.flatten(sizes)
        packs, unpack = pack(leaves)
        limits, after = [], []
        for size, old in zip(packs, _split(memory, init, packs), strict=True):
            limit, new = update(size, meant(old), **extra)
            limits.append(limit)
            after.append(select(jnp.isfinite(size), kept(new), old))
        return treedef.unflatten(unpack(limits)), _join(after)

    return Threshold(start, step)


def _join(memories: list[Any]) -> Any:
    return memories[0] if len(memories) == 1 else jax.tree.map(lambda *arrays: arrays, *memories)


def _split(memory: Any, init: Callable[..., Any], packs: list[jax.Array]) -> list[Any]:
    if len(packs) == 1:
        return [memory]
    fields = jax.tree.structure(jax.eval_shape(init, packs[0]))
    columns = fields.flatten_up_to(memory)
    return [fields.unflatten(row) for row in zip(*columns, strict=True)]


def select(where: jax.Array, new: Any, old: Any) -> Any:
    """``new`` where true, else ``old``, for trees of arrays whose shapes start with that of ``where``."""

    new, old = _mesh.like((new, old), where)

    def pick(n: jax.Array, o: jax.Array) -> jax.Array:
        return jnp.where(where.reshape(where.shape + (1,) * (jnp.ndim(o) - where.ndim)), n, o)

    return jax.tree.map(pick, new, old)
