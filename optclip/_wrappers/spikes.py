"""Steps that are outliers by their norm or their loss: skipped whole."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _mesh
from optclip._clip import ClipState, clip_by
from optclip._methods.historical_norm import window_zscore
from optclip._rules import Threshold, fixed
from optclip._transformation import takes_extra_args, transformation
from optclip._wrappers.guard import any_of, keep, nonfinite, withhold
from optclip.measures import Measure, global_norm


class SpikeState(NamedTuple):
    """The state of `skip_spikes`.

    Attributes:
      inner_state: the state of what is guarded, as of the last accepted step.
      norm: `ClipState`: the memory of the rule as of the last accepted step, and what the last step measured and
        allowed, skipped or not.
      loss: likewise for the loss; () without a rule for it.
      total: int32, steps skipped since the start.
      consecutive: int32, steps skipped in a row up to now.
      streak: int32, those of them that were finite: what patience counts.
    """

    inner_state: Any
    norm: ClipState
    loss: Any
    total: jax.Array
    consecutive: jax.Array
    streak: jax.Array


def skip_spikes(
    inner: optax.GradientTransformation,
    rule: Any = None,
    *,
    loss_rule: Any = None,
    measure: Measure | None = None,
    patience: int | None = 50,
) -> optax.GradientTransformationExtraArgs:
    """Skips a step whose gradient norm, or loss, is an outlier by a rule; by default 6 sigma over 128 steps.

    if ||g|| <= limit of the rule (and loss <= limit of its rule): u, s' = inner(g, s), else: u = 0, s' = s

    When to use: long runs with rare bad batches, whose gradient says nothing worth a clipped step. Inside
    `skip_nonfinite` if updates or states may overflow; the gradient itself is checked here too.

    Args:
      inner: the optimizer to guard, clipping included.
      rule: what is allowed, from `optclip.thresholds`; None is ``window_zscore(6.0, 128, warmup=63, ddof=1)``, that of
        OLMo. Any rule will do (its own patience never runs out here); a number is a limit on the norm itself.
      loss_rule: likewise for the loss, which is then passed as ``update(..., value=loss)``; None ignores the loss.
        For a loss that may be zero or negative make the rule with ``patience=None``.
      measure: the scope, see `optclip.measures`; None for `global_norm`. A step is skipped if any size is beyond
        its limit. Inside ``shard_map(check_vma=False)`` and ``pmap`` give it its axes:
        ``partial(global_norm, axis_name="data")``.
      patience: finite steps skipped in a row, after which the rules start afresh and the step is accepted, so that a
        new level is; None for never.

    State: `SpikeState`: the inner state, the memories of the rules (128 float32 each by default) and three counts.

    Guarantees: a skipped step changes nothing but the counts: the optimizer and the memories of the rules stay
      bit-equal, so that what was skipped poisons no history. The norm is that of a clipper inside, and the compiled
      program computes it once. At most ``patience`` finite steps in a row are skipped.

    Edge cases: the first steps, while the rule warms up, pass, unless they are not finite. A norm or a loss that is not
      finite is always skipped and does not count towards ``patience``. A loss that differs between devices is averaged.

    Departures: OLMo, Levanter and MaxText keep skipped values in their windows, which widens them after a burst and
      lets a NaN stay for 128 steps; here they are left out, and ``patience`` accepts a new level.

    References: OLMo-core, ``SkipStepOptimizer``; OLMo 2, arXiv:2501.00656; Chowdhery et al., "PaLM", arXiv:2204.02311,
      section 5.1, for skipping by hand.

    Example:
      >>> tx = skip_spikes(optax.sgd(0.1), 10.0)
      >>> updates, state = tx.update(jnp.full(4, 100.0), tx.init(jnp.ones(4)))
      >>> updates.tolist(), int(state.total)
      ([0.0, 0.0, 0.0, 0.0], 1)
    """
    measure = measure or global_norm
    _checks.check_transformation("skip_spikes", "inner", inner)
    if patience is not None:
        _checks.check_steps("skip_spikes", "patience", patience, 1)
    if rule is None:
        rule = window_zscore(6.0, 128, warmup=63, ddof=1)  # OLMo counts the current step in the least history
    guarded = takes_extra_args(inner)
    norm_judge: Any = clip_by(measure, _rule("rule", rule), _pass)
    loss_judge = None if loss_rule is None else clip_by(lambda loss: loss, _rule("loss_rule", loss_rule), _pass)

    def init(params: Any) -> SpikeState:
        loss = loss_judge.init(jnp.zeros((), jnp.float32)) if loss_judge else ()
        counts = (jnp.zeros((), jnp.int32) for _ in range(3))  # buffers of their own, to be donated
        return SpikeState(guarded.init(params), norm_judge.init(params), loss, *counts)

    def update(updates: Any, state: SpikeState, params: Any = None, **extra: Any) -> tuple[Any, SpikeState]:
        stuck = jnp.asarray(False) if patience is None else state.streak >= patience
        norm, beyond, finite = _judge(norm_judge, updates, state.norm, stuck, params, extra)
        loss: Any = ()
        if loss_judge:
            loss, too_high, known = _judge(loss_judge, _loss(extra), state.loss, stuck, None, extra)
            beyond, finite = beyond | too_high, finite & known
        skip = ~finite | (beyond & ~stuck)
        after, inner_state = guarded.update(updates, state.inner_state, params, **extra)
        return withhold(skip, after), SpikeState(
            keep(skip, state.inner_state, inner_state),
            norm._replace(rule=keep(skip, state.norm.rule, norm.rule)),
            loss._replace(rule=keep(skip, state.loss.rule, loss.rule)) if loss_judge else (),
            total=jnp.where(skip, optax.safe_increment(state.total), state.total),
            consecutive=jnp.where(skip, optax.safe_increment(state.consecutive), 0),
            streak=jnp.where(skip, jnp.where(finite, optax.safe_increment(state.streak), state.streak), 0),
        )

    return transformation(init, update, SpikeState)


def _rule(name: str, rule: Any) -> Threshold:
    return rule if isinstance(rule, Threshold) else fixed(rule, call="skip_spikes", name=name)


def _pass(update: jax.Array, size: jax.Array, limit: jax.Array) -> jax.Array:
    del size, limit
    return update


def _judge(
    judge: Any, updates: Any, state: ClipState, stuck: jax.Array, params: Any, extra: Any
) -> tuple[Any, jax.Array, jax.Array]:
    """The state of the judge after this step, whether any size is beyond its limit, whether all are finite."""
    start = state._replace(rule=keep(stuck, judge.init(updates).rule, state.rule))
    seen: Any = judge.update(updates, start, params, **extra)[1]
    sizes, limits = seen.stats.sizes, seen.stats.limits
    if jax.tree.structure(sizes).num_leaves <= jax.tree.structure(limits).num_leaves:
        wide = jax.tree.broadcast(sizes, limits)
    else:
        wide, limits = sizes, jax.tree.broadcast(limits, sizes)
    beyond = jax.tree.map(lambda s, x: ~(s <= x), wide, limits)
    # One size for a whole leaf is the same on every device; sizes of units are each device's own.
    over = None if any(map(jnp.ndim, jax.tree.leaves(sizes))) else ()
    return seen, _mesh.agree(any_of(jax.tree.leaves(beyond)), over), ~_mesh.agree(any_of(nonfinite(sizes)), over)


def _loss(extra: Any) -> jax.Array:
    value = extra.get("value")
    if value is None:
        raise ValueError("skip_spikes(loss_rule=...) needs the loss: call update(updates, state, params, value=loss)")
    if jnp.ndim(value):
        raise ValueError(f"skip_spikes: value must be the scalar loss, got shape {jnp.shape(value)}")
    return _mesh.average(jnp.asarray(value).astype(jnp.float32))
