"""Steps with NaN or infinity: skipped whole, with the optimizer as it was."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optclip import _checks, _mesh, _numerics
from optclip._transformation import takes_extra_args, transformation
from optclip._wrappers.guard import any_of, keep, nonfinite, withhold


class SkipState(NamedTuple):
    """The state of `skip_nonfinite`.

    Attributes:
      inner_state: the state of what is guarded, as of the last good step.
      total: int32, steps skipped since the start.
      consecutive: int32, steps skipped in a row up to now; 0 after a good step.
    """

    inner_state: Any
    total: jax.Array
    consecutive: jax.Array


def skip_nonfinite(
    inner: optax.GradientTransformation, *, max_consecutive: Any = None, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Skips a step whose gradient, update or new optimizer state is not finite, as if it had never been.

    if all of (g, u, s') are finite: u, s' = inner(g, s), else: u = 0, s' = s

    When to use: around the whole optimizer, clipping included, of any run that must survive a bad batch; always in
    float16. One bad step costs one step; nothing else notices it.

    Args:
      inner: the optimizer to guard, for example ``optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-3))``.
      max_consecutive: >= 0, how many bad steps in a row are skipped quietly; every further one makes the updates NaN,
        while the optimizer state stays good. An integer or a traced scalar. None, the default, never gives up.
      axis_name: mesh axes over which devices must decide together. None reads the types inside ``shard_map``, and
        takes every manual axis where these are not tracked (``check_vma=False``, ``pmap``). ``()`` lets each device
        decide by itself, for independent replicas.

    State: `SkipState`: the inner state and two int32 counts. The new update and state are read once more than without
      the guard, for they must be seen whole before they are accepted.

    Guarantees: a skipped step changes nothing but the counts: parameters, moments, step counts and histories stay
      bit-equal. The choice is a select, so that no NaN passes through a product with 0, and it is the same on every
      device. Dtypes and weak types of the inner state never change, even where those of ``inner`` would.

    Edge cases: an array of the inner state counts as bad where it was finite and no longer is, so that infinities that
      belong there do no harm; what optclip itself keeps, and hyper-parameters, are not looked at. Finite but huge
      gradients pass: clip them, or use `skip_spikes`. Put it around `optax.MultiSteps`, and a bad micro-batch is left
      out of the accumulation; inside, it comes too late: the accumulator keeps a NaN for good, unless
      ``should_skip_update_fn=optax.skip_not_finite`` keeps it out.

    Departures: `optax.apply_if_finite` looks at the gradient alone, decides per device under ``shard_map``, and lets
      every NaN through after its limit.

    References: none; every large training code has such a guard.

    Example:
      >>> tx = skip_nonfinite(optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-3)))
      >>> p = jnp.ones(2)
      >>> updates, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(p), p)
      >>> updates.tolist(), int(state.total)
      ([0.0, 0.0], 1)
    """
    _checks.check_transformation("skip_nonfinite", "inner", inner)
    if max_consecutive is not None:
        _checks.check(
            "skip_nonfinite",
            "max_consecutive",
            max_consecutive,
            lambda n: (n >= 0) & (np.floor(n) == n),
            ">= 0, an integer, or None",
        )
    guarded = takes_extra_args(inner)

    def init(params: Any) -> SkipState:
        return SkipState(guarded.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: SkipState, params: Any = None, **extra: Any) -> tuple[Any, SkipState]:
        after, inner_state = guarded.update(updates, state.inner_state, params, **extra)
        bad = any_of([*nonfinite(updates), *nonfinite(after), _spoiled(inner_state, state.inner_state)])
        bad = _mesh.agree(bad, axis_name)
        consecutive = jnp.where(bad, optax.safe_increment(state.consecutive), 0)
        fill = 0.0 if max_consecutive is None else jnp.where(consecutive > max_consecutive, jnp.nan, 0.0)
        total = jnp.where(bad, optax.safe_increment(state.total), state.total)
        return withhold(bad, after, fill), SkipState(keep(bad, state.inner_state, inner_state), total, consecutive)

    return transformation(init, update, SkipState)


def _spoiled(new: Any, old: Any) -> jax.Array:
    """Whether an array was finite and no longer is. The old one is read only if the new one is not."""
    pairs = [(n, o) for n, o in zip(_memories(new), _memories(old), strict=True) if _numerics.is_gradient(n)]
    return _lost(any_of(nonfinite([n for n, _ in pairs])), pairs)


@functools.partial(jax.jit, inline=True)  # a branch is else compiled anew by each call outside of jit
def _lost(odd: jax.Array, pairs: list[tuple[Any, Any]]) -> jax.Array:
    lost = lambda: any_of([jnp.isfinite(o) & ~jnp.isfinite(n) for n, o in pairs])
    return lax.cond(odd, lost, lambda: odd)


_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def _memories(state: Any) -> Iterator[Any]:
    """The arrays of a state but for those of this package, which take in nothing that is not finite and hold infinities
    of their own (limits, extremes, empty windows), and for hyper-parameters, which the user sets."""
    for node in jax.tree.leaves(state, is_leaf=_own):
        if _own(node):
            yield from _memories(getattr(node, "inner_state", getattr(node, "inner", ())))
        else:
            yield node


def _own(node: Any) -> bool:
    return isinstance(node, _INJECTED) or (hasattr(node, "_fields") and type(node).__module__.startswith("optclip."))
