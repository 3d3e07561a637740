"""Elements that are not finite, one by one to zero."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _mesh, _numerics
from optclip._transformation import transformation
from optclip._vectors import stack

_MOST = 2**31 - 1


class ZeroState(NamedTuple):
    """The state of `zero_nonfinite`: int32 counts of elements since the start, and in the last step.

    Attributes:
      nan: elements that were NaN.
      posinf: elements that were +inf.
      neginf: elements that were -inf.
      last: elements of any of these kinds in the last step.
    """

    nan: jax.Array
    posinf: jax.Array
    neginf: jax.Array
    last: jax.Array


def zero_nonfinite(*, axis_name: Any = None) -> optax.GradientTransformationExtraArgs:
    """Sets every element that is NaN, +inf or -inf to zero, and counts them.

    g_j <- g_j if g_j is finite, else 0

    When to use: in front of a clipper, where single elements are known to break while the rest of the gradient is
    good. It hides the cause; if in doubt, take `skip_nonfinite`, which leaves out the whole step.

    Args:
      axis_name: mesh axes over which to count inside ``shard_map(check_vma=False)`` and ``pmap``, see
        `measures.global_norm`.

    State: `ZeroState`, four int32 counts.

    Guarantees: the result is finite; finite elements are bit-equal to the input.

    Edge cases: a complex element is zeroed whole if either part is not finite, and counts as NaN if a part is NaN, else
      as +inf if a part is +inf. Counts stop at 2^31 - 1, and those of one step are rounded beyond 2^24.

    Departures: `optax.zero_nans` leaves infinities, and keeps flags in place of counts.

    References: none.

    Example:
      >>> tx = optax.chain(zero_nonfinite(), clip_by_global_norm(1.0))
      >>> g = jnp.array([0.5, jnp.nan, jnp.inf])
      >>> tx.update(g, tx.init(g))[0].tolist()
      [0.5, 0.0, 0.0]
    """

    def init(params: Any) -> ZeroState:
        del params
        return ZeroState(*(jnp.zeros((), jnp.int32) for _ in ZeroState._fields))

    def update(updates: Any, state: ZeroState, params: Any = None, **extra: Any) -> tuple[Any, ZeroState]:
        del params, extra
        leaves, treedef = jax.tree.flatten(updates)
        axes = _mesh.sum_axes(updates, axis_name)
        rows = [i for i, x in enumerate(leaves) if _numerics.is_gradient(x)]
        seen = jnp.zeros(3, jnp.float32)
        if rows:
            counts = [_count(jnp.asarray(leaves[i])) for i in rows]
            seen = jnp.sum(stack(_mesh.all_reduce(counts, [axes[i] for i in rows])), axis=0)
            for i, count in zip(rows, counts, strict=True):
                leaves[i] = _finite_part(leaves[i], jnp.sum(count) == 0)
        totals = [_add(old, n) for old, n in zip(state[:3], seen, strict=True)]
        last = _add(jnp.zeros_like(state.last), sum(seen))
        return treedef.unflatten(leaves), ZeroState(*totals, last=last)

    return transformation(init, update, ZeroState)


def _count(x: jax.Array) -> jax.Array:
    """How many elements are NaN, +inf and -inf: float32[3]."""
    if jax.default_backend() != "cpu" or _mesh.partitioned([x]):
        return _kinds(x)
    # The usual answer at memory speed: XLA:CPU takes 20 times as long to tell the kinds apart.
    return _kinds_if(~_numerics.finite(x), x)


@functools.partial(jax.jit, inline=True)  # a branch is else compiled anew by each call outside of jit
def _kinds_if(bad: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.cond(bad, _kinds, lambda x: jnp.stack([bad] * 3).astype(jnp.float32), x)


def _kinds(x: jax.Array) -> jax.Array:
    parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    nan, up, down = (
        functools.reduce(jnp.logical_or, [test(p) for p in parts]) for test in (jnp.isnan, jnp.isposinf, jnp.isneginf)
    )
    return jnp.stack([jnp.sum(k, dtype=jnp.float32) for k in (nan, up & ~nan, down & ~up & ~nan)])


def _add(total: jax.Array, n: Any) -> jax.Array:
    """The sum, or the largest int32."""
    room = _MOST - total
    return total + jnp.minimum(jnp.minimum(n, 2.0**31 - 128).astype(jnp.int32), room)


def _finite_part(x: Any, fine: jax.Array) -> Any:
    """``x`` with zeros for what is not finite. ``fine`` says that all is, and that x was read before it is overwritten:
    else XLA:CPU copies x for the count."""
    array = jnp.asarray(x)
    wide = _numerics.widen(array, _numerics.accumulator(array))  # a bfloat16 select loses denormals on jax 0.12
    return _numerics.cast_like(jnp.where(fine | jnp.isfinite(wide), wide, jnp.zeros_like(wide)), x)
