"""SPAM's spike-aware clip: elements far beyond their own second moment (Huang et al., 2025)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _elementwise, _numerics
from optclip._clip import ClipState, cast_tree, respond
from optclip._history import Feed, clipped
from optclip._rules import Threshold, scheduled
from optclip._transformation import transformation
from optclip.measures import magnitude
from optclip.responses import rescale


class Spikes(NamedTuple):
    """The memory of `spike_ratio`.

    Attributes:
      step: an int32 step count if theta is a schedule; else ().
      entered: int32[leaves], updates that entered.
      rms: the tree of the sizes, float32: the square root of the moving average of the square, from 0.
    """

    step: Any
    entered: jax.Array
    rms: Any


def spike_ratio(
    theta: Any = 5000.0,
    decay: float = 0.999,
    *,
    feeding: Feed = clipped,
    warmup: int = 19,
    wake: bool = True,
    call: str = "spike_ratio",
) -> Threshold:
    """A limit of sqrt(theta * EMA of the square of the sizes before this one); a leaf that is not finite gets NaN.

    Args:
      theta: > 1: a number, a traced scalar, or a schedule.
      decay: in [0, 1), of the second moment, which starts at 0.
      feeding: what enters the second moment, see `optclip.thresholds`.
      warmup: updates that pass first, for the moment starts at 0.
      wake: whether a size whose second moment is still 0 passes; if not, it can never move.
      call: the name of the method, for error messages.

    Memory: one float32 array of the shape of the sizes per leaf (`Spikes`).

    Example:
      >>> tx = clip_by(leaf_norm, spike_ratio(25.0))  # clips norms beyond 5 times their root mean square
    """
    _checks.check_above_one(call, "theta", theta)
    _checks.check_fraction(call, "decay", decay)
    _checks.check_steps(call, "warmup", warmup)
    _checks.check_callable(call, feeding=feeding)
    schedule = scheduled((theta,))

    def init(sizes: Any) -> Spikes:
        return Spikes(schedule.init(sizes), _elementwise.counts(sizes), _elementwise.zeros(sizes))

    def update(sizes: Any, memory: Spikes, params: Any = None, **extra: Any) -> tuple[Any, Spikes]:
        del params, extra
        (value,), after = schedule.update(sizes, memory.step)
        leaves, treedef = jax.tree.flatten(sizes)
        fine = _elementwise.finite(leaves)
        limits, moments = [], []
        for i, (size, rms) in enumerate(zip(leaves, treedef.flatten_up_to(memory.rms), strict=True)):
            free = memory.entered[i] < warmup
            free = free | (rms == 0) if wake else free
            allowed = jnp.where(free, jnp.inf, _numerics.times(jnp.sqrt(value), rms))
            fed = feeding(size, allowed)
            moment = _elementwise.root_mean(decay, rms, jnp.where(jnp.isfinite(fed), fed, rms))
            limits.append(jnp.where(fine[i], allowed, jnp.nan))
            moments.append(jnp.where(fine[i], moment, rms))
        count = memory.entered + fine.astype(jnp.int32)
        return treedef.unflatten(limits), Spikes(after, count, treedef.unflatten(moments))

    return Threshold(init, update)


def spam_clip(
    theta: Any = 5000.0, decay: float = 0.999, *, feeding: Feed | None = None, warmup: int = 19, wake: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Clips each element whose square is beyond ``theta`` times its own second moment (SPAM).

    g_j <- sign(g_j) * min(|g_j|, sqrt(theta * v_j)),  v_j <- decay * v_j + (1 - decay) * g_j^2

    When to use: against spikes in single elements, 70 times their usual size, before Adam. It costs the memory of
    Adam's second moment.

    Args:
      theta: > 1 (paper: 5000), in units of the second moment: a number, a traced scalar, or a schedule.
      decay: in [0, 1) (beta_2; paper: 0.999), per step.
      feeding: what enters the moment: the clipped element, as in the authors' code; None for `clipped`.
      warmup: updates that pass first (authors' code: 19).
      wake: whether an element whose moment is still 0 passes.

    State: `ClipState` without statistics; ``rule`` is a `Spikes`: one float32 array per leaf and one int32.

    Guarantees: never stuck: a clipped element lets its limit grow by a factor of sqrt(1 + (1 - decay) * (theta - 1)),
      2.4 by default, so a level 1e15 times the old is accepted within 40 steps.

    Edge cases: an element that was always 0 passes when it wakes. A NaN or an infinity makes the updates of its leaf
      NaN, and leaves the memory of that leaf untouched.

    Departures: the moment is the clip's own, not Adam's, and SPAM's resets of Adam's moments and its warm-up after each
      are not part of it. ``wake=False`` gives the authors' rule, which keeps an element at 0 if it was 0 through the
      warm-up (a rare token).

    References: Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset", ICLR 2025, arXiv:2501.06842, Section 3.

    Example:
      >>> tx = optax.chain(spam_clip(), optax.adam(1e-3))
    """
    feeding = feeding or clipped
    rule = spike_ratio(theta, decay, feeding=feeding, warmup=warmup, wake=wake, call="spam_clip")

    def init(params: Any) -> ClipState:
        return ClipState(rule.init(params), None)

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        sizes = magnitude(updates)
        limits, memory = rule.update(sizes, state.rule, params, **extra)
        return respond(rescale, updates, sizes, limits), ClipState(cast_tree(memory, state.rule), None)

    return transformation(init, update, ClipState)
