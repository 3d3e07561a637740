"""Steps that must not happen: skipped whole, with the optimizer as it was."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _mesh, _numerics
from optclip._clip import ClipState, clip_by
from optclip._methods.historical_norm import window_zscore
from optclip._rules import Threshold, fixed
from optclip.measures import Measure, global_norm


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

    State: `SkipState`: the inner state and two int32 counts.

    Guarantees: a skipped step changes nothing but the counts: parameters, moments, step counts and histories stay
      bit-equal. The choice is a select, so that no NaN passes through a product with 0, and it is the same on every
      device. Dtypes and weak types of the inner state never change, even where those of ``inner`` would.

    Edge cases: an array of the inner state counts as bad where it was finite and no longer is, so that infinities that
      belong there (limits, extremes) do no harm; memories of clippers and hyper-parameters are not looked at. Finite
      but huge gradients pass: clip them, or use `skip_spikes`. Put it around `optax.MultiSteps`, and a bad micro-batch
      is left out of the accumulation; inside, it comes too late: the accumulator keeps a NaN for good, unless
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
    if max_consecutive is not None:
        _checks.check("skip_nonfinite", "max_consecutive", max_consecutive, lambda n: n >= 0, ">= 0, or None")
    guarded = optax.with_extra_args_support(inner)

    def init(params: Any) -> SkipState:
        return SkipState(guarded.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: SkipState, params: Any = None, **extra: Any) -> tuple[Any, SkipState]:
        after, inner_state = guarded.update(updates, state.inner_state, params, **extra)
        bad = _nonfinite(updates) | _nonfinite(after) | _spoiled(inner_state, state.inner_state)
        bad = _mesh.agree(bad, (axis_name,) if isinstance(axis_name, str) else axis_name)
        consecutive = jnp.where(bad, optax.safe_increment(state.consecutive), 0)
        fill = 0.0 if max_consecutive is None else jnp.where(consecutive > max_consecutive, jnp.nan, 0.0)
        total = jnp.where(bad, optax.safe_increment(state.total), state.total)
        return _withhold(bad, after, fill), SkipState(_keep(bad, state.inner_state, inner_state), total, consecutive)

    return optax.GradientTransformationExtraArgs(init, update)


def skip_spikes(
    inner: optax.GradientTransformation,
    rule: Any = None,
    *,
    loss_rule: Any = None,
    measure: Measure = global_norm,
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
      measure: the scope, see `optclip.measures`; a step is skipped if any size is beyond its limit. Inside
        ``shard_map(check_vma=False)`` and ``pmap`` give it its axes: ``partial(global_norm, axis_name="data")``.
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
    if patience is not None:
        _checks.check_count("skip_spikes", "patience", patience, 1)
    if rule is None:
        rule = window_zscore(6.0, 128, warmup=63, ddof=1)  # OLMo counts the current step in the least history
    elif not isinstance(rule, Threshold):
        rule = fixed(rule, call="skip_spikes", name="rule")
    guarded = optax.with_extra_args_support(inner)
    norm_judge = clip_by(measure, rule, _pass)
    loss_judge = None if loss_rule is None else clip_by(lambda loss: loss, loss_rule, _pass)

    def init(params: Any) -> SpikeState:
        loss = loss_judge.init(jnp.zeros((), jnp.float32)) if loss_judge else ()
        zero = jnp.zeros((), jnp.int32)
        return SpikeState(guarded.init(params), norm_judge.init(params), loss, zero, zero, zero)

    def update(updates: Any, state: SpikeState, params: Any = None, **extra: Any) -> tuple[Any, SpikeState]:
        stuck = jnp.asarray(False) if patience is None else state.streak >= patience
        norm, beyond, finite = _judge(norm_judge, updates, state.norm, stuck, params, extra)
        loss: Any = ()
        if loss_judge:
            loss, too_high, known = _judge(loss_judge, _loss(extra), state.loss, stuck, None, extra)
            beyond, finite = beyond | too_high, finite & known
        skip = ~finite | (beyond & ~stuck)
        after, inner_state = guarded.update(updates, state.inner_state, params, **extra)
        return _withhold(skip, after), SpikeState(
            _keep(skip, state.inner_state, inner_state),
            norm._replace(rule=_keep(skip, state.norm.rule, norm.rule)),
            loss._replace(rule=_keep(skip, state.loss.rule, loss.rule)) if loss_judge else (),
            total=jnp.where(skip, optax.safe_increment(state.total), state.total),
            consecutive=jnp.where(skip, optax.safe_increment(state.consecutive), 0),
            streak=jnp.where(skip, jnp.where(finite, optax.safe_increment(state.streak), state.streak), 0),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _pass(update: jax.Array, size: jax.Array, limit: jax.Array) -> jax.Array:
    del size, limit
    return update


def _judge(
    judge: optax.GradientTransformationExtraArgs, updates: Any, state: ClipState, stuck: jax.Array, params: Any,
    extra: Any,
) -> tuple[Any, jax.Array, jax.Array]:  # fmt: skip
    """The state of the judge after this step, whether any size is beyond its limit, whether all are finite."""
    start = state._replace(rule=_keep(stuck, judge.init(updates).rule, state.rule))
    _, seen = judge.update(updates, start, params, **extra)
    sizes, limits = seen.stats
    if jax.tree.structure(sizes).num_leaves <= jax.tree.structure(limits).num_leaves:
        wide = jax.tree.broadcast(sizes, limits)
    else:
        wide, limits = sizes, jax.tree.broadcast(limits, sizes)
    beyond = jax.tree.map(lambda s, x: ~(s <= x), wide, limits)
    return seen, _any(jax.tree.leaves(beyond)), ~_nonfinite(sizes)


def _loss(extra: Any) -> jax.Array:
    value = extra.get("value")
    if value is None:
        raise ValueError("skip_spikes(loss_rule=...) needs the loss: call update(updates, state, params, value=loss)")
    if jnp.ndim(value):
        raise ValueError(f"skip_spikes: value must be the scalar loss, got shape {jnp.shape(value)}")
    return _mesh.average(jnp.asarray(value).astype(jnp.float32))


def _any(flags: list[jax.Array]) -> jax.Array:
    return jnp.any(jnp.stack([jnp.any(f) for f in flags])) if flags else jnp.asarray(False)


def _nonfinite(tree: Any) -> jax.Array:
    return _any([~jnp.isfinite(x) for x in jax.tree.leaves(tree) if _numerics.is_gradient(x)])


def _spoiled(new: Any, old: Any) -> jax.Array:
    """Whether an array of the state was finite and no longer is."""
    pairs = zip(_memories(new), _memories(old), strict=True)
    return _any([jnp.isfinite(o) & ~jnp.isfinite(n) for n, o in pairs if _numerics.is_gradient(n)])


_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def _memories(state: Any) -> Iterator[Any]:
    """The arrays of a state but for the memories of clippers, which take in nothing that is not finite and hold
    infinities of their own, and for hyper-parameters, which the user sets."""
    own = (ClipState, SpikeState, *_INJECTED)
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, own)):
        if isinstance(node, (SpikeState, *_INJECTED)):
            yield from _memories(node.inner_state)
        elif not isinstance(node, ClipState):
            yield node


def _withhold(bad: jax.Array, updates: Any, fill: Any = 0.0) -> Any:
    """The updates, or ``fill`` in their place (0 for those that are no gradients)."""

    def one(u: Any) -> Any:
        if getattr(u, "dtype", None) == jax.dtypes.float0:
            return u
        u = jnp.asarray(u)
        other = jnp.asarray(fill if _numerics.is_gradient(u) else 0).astype(u.dtype)
        return _numerics.cast_like(jnp.where(bad, other, u), u)

    return jax.tree.map(one, updates)


def _keep(bad: jax.Array, old: Any, new: Any) -> Any:
    """``old`` if ``bad``, else ``new`` in the dtypes and weak types of ``old``."""

    def one(o: Any, n: Any) -> Any:
        dtype = jnp.result_type(o)
        if dtype == jax.dtypes.float0:
            return o
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            return jnp.where(bad, o, n)
        return _numerics.cast_like(jnp.where(bad, jnp.asarray(o), jnp.asarray(n).astype(dtype)), o)

    return jax.tree.map(one, old, new)
