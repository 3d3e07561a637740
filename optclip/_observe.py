"""Watching the norm without touching the gradient: a transformation whose only effect is its state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip import _checks, _course, _mesh, sketch
from optclip._clip import cast_tree
from optclip._course import Course
from optclip._finite import kept
from optclip._recorded import plain
from optclip._transformation import takes_extra_args, transformation
from optclip._vectors import concatenate, stack
from optclip.measures import Measure, leaf_norm
from optclip.selection import path_strings
from optclip.sketch import Sketch
from optclip.stats import recorded, rows


class Recent(NamedTuple):
    """The last H steps, in rings: step t lies at t % H. Entries of steps that have not come yet are 0.

    Attributes:
      norm: float32[H], as measured: NaN and infinity stay.
      parts: float32[H, n], the sizes it was made from.
      limit: float32[H], the limit of the inner clipper if it has a single one, else the largest float32.
      clipped: bool[H], whether the inner clipper clipped anything.
    """

    norm: jax.Array
    parts: jax.Array
    limit: jax.Array
    clipped: jax.Array


class ObserveState(NamedTuple):
    """What `observe` saw; n is the number of sizes.

    Attributes:
      norm: `optclip.sketch.Sketch` of the norm, 8 bins per octave.
      parts: a sketch of shape (n,), 1 bin per octave, in ``jax.tree.leaves`` order of the sizes.
      share: float32[n], each size's share of the squared norm, the mean over all finite steps.
      peak: float32[n], the shares at the largest finite norm.
      course: the level of the norm over the run.
      recent: the last steps, or None without ``history``.
      names: a tuple of ``{path: ()}`` for each size: the names are in the structure, which holds no arrays.
      inner: the state of the inner transformation.
    """

    norm: Sketch
    parts: Sketch
    share: jax.Array
    peak: jax.Array
    course: Course
    recent: Recent | None
    names: Any
    inner: Any


def observe(
    inner: optax.GradientTransformation | None = None, *, measure: Measure | None = None, history: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Keeps a small sketch of the gradient norm, whole and per leaf, and changes nothing.

    n_t = sqrt(sum_i s_{t,i}^2) for sizes s_t = measure(g_t): counted in log-spaced bins

    When to use: before choosing a limit. Train for a while with ``optax.chain(observe(), optimizer)``, then read
    `advise`; or leave it in for good, at the price of one look at the gradient.

    Args:
      inner: a transformation to run on the gradient that was seen, commonly a clipper: its limit then enters the
        history. None passes the gradient on as it is.
      measure: 2-norms of parts that make up the gradient, see `optclip.measures`: `leaf_norm` for each leaf,
        ``partial(group_norm, groups=...)``, or `global_norm` for the whole alone; None for `leaf_norm`.
      history: how many of the last steps to keep one by one, for `plot`; a fixed number of steps.

    State: `ObserveState`: 3 kB, 340 bytes per size, and 4 (n + 2) + 1 bytes per step of history.

    Guarantees: without ``inner`` the updates are the gradient itself. Quantiles of the norm are right to 9 %
      (2^(1/8)), extremes and counts are exact. `merge` adds up states of processes, restarts and runs.

    Edge cases: NaN and infinite norms count in ``nonfinite`` and enter nothing else (the history shows them). Sizes
      below 9e-13 (zero too) and above 1.1e12 share a bin each. A norm beyond 3.4e38 counts as infinite.

    Departures: none; there is no paper to depart from.

    References: logarithmic histograms with a bounded relative error are as in Masson, Rim, Lee, "DDSketch", VLDB 2019,
      arXiv:1908.10693, section 2.

    Example:
      >>> tx = optax.chain(observe(), optax.sgd(0.1))
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(g, tx.init(g))
      >>> float(state[0].norm.high)
      5.0
    """
    measure = measure or leaf_norm
    _checks.check_count("observe", "history", history)
    _checks.check_callable("observe", measure=measure)
    if inner is not None:
        _checks.check_transformation("observe", "inner", inner)
    within = takes_extra_args(optax.identity() if inner is None else inner)

    def init(params: Any) -> ObserveState:
        with _mesh.shapes_only():
            sizes = jax.eval_shape(lambda tree: _distinct(measure(tree)), params)
        n = sum(s.size for s in jax.tree.leaves(sizes))
        recent = Recent(
            jnp.zeros(history, jnp.float32),
            jnp.zeros((history, n), jnp.float32),
            jnp.zeros(history, jnp.float32),
            jnp.zeros(history, bool),
        )
        return ObserveState(
            norm=sketch.empty(),
            parts=sketch.empty((n,), per_octave=1),
            share=jnp.zeros(n, jnp.float32),
            peak=jnp.zeros(n, jnp.float32),
            course=_course.start(),
            recent=recent if history else None,
            # An array where there are no sizes, for by that Optax tells what is no parameter (see `one_at_least`).
            names=tuple({name: ()} for name in _names(sizes)) or jnp.zeros((), jnp.int32),
            inner=within.init(params),
        )

    def update(updates: Any, state: ObserveState, params: Any = None, **extra: Any) -> tuple[Any, ObserveState]:
        sizes = measure(updates)
        if sum(map(jnp.size, jax.tree.leaves(sizes))) != state.share.size:  # init, which traces, saw some shared
            sizes = _distinct(sizes)
        sizes = [jnp.ravel(_mesh.replicated(s)).astype(jnp.float32) for s in jax.tree.leaves(sizes)]
        parts = concatenate(sizes) if sizes else jnp.zeros(0, jnp.float32)
        _checks.check_fits("updates", parts, state.share)
        norm = _root_of_squares(parts)
        updates, after = within.update(updates, state.inner, params, **extra)
        seen = _see(state, norm, parts)._replace(inner=after)
        if history:
            seen = seen._replace(recent=_remember(state, norm, parts, after))
        return updates, cast_tree(seen, state)

    return transformation(init, update, ObserveState)


def merge(a: ObserveState, b: ObserveState) -> ObserveState:
    """The sketches of two processes, restarts or runs of one model, read as one; exact but for the rounding of means.

    Where the runs were in step with each other, so is the course. The history and the inner state are those of ``a``.

    Args:
      a: a state of `observe`.
      b: a state of `observe` with the same measure on the same parameters.

    Returns:
      A state for `advise` and `plot`, and for `observe` to go on with.

    Example:
      >>> tx = optclip.observe()
      >>> g = {"w": jnp.ones(4)}
      >>> _, state = tx.update(g, tx.init(g))
      >>> int(optclip.merge(state, state).norm.counts.sum())
      2
    """
    if not (isinstance(a, ObserveState) and isinstance(b, ObserveState)):
        raise TypeError("merge needs two states of observe, not whole optimizer states")
    if jax.tree.structure(a.names) != jax.tree.structure(b.names) or a.share.shape != b.share.shape:
        raise ValueError("merge needs states of one measure on one tree of parameters")
    weights = [jnp.sum(s.norm.counts).astype(jnp.float32) for s in (a, b)]
    return a._replace(
        norm=sketch.merge(a.norm, b.norm),
        parts=sketch.merge(a.parts, b.parts),
        share=_course.mean(a.share, weights[0], b.share, weights[1]),
        peak=jnp.where(a.norm.high >= b.norm.high, a.peak, b.peak),
        course=_course.merge(a.course, b.course),
    )


def find(opt_state: Any) -> ObserveState:
    """The first state of `observe` in an optimizer state, wherever it is nested."""
    for state in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, ObserveState)):
        if isinstance(state, ObserveState):
            return plain(state)
    raise ValueError("no sketch in this optimizer state: put optclip.observe() in front, as in chain(observe(), ...)")


def part_names(state: ObserveState) -> list[str]:
    """The path of each size, in the order of the arrays."""
    return [name for row in state.names for name in row] if isinstance(state.names, tuple) else []


def _distinct(sizes: Any) -> list[dict[str, Any]]:
    """The sizes, each under its path. What equal labels share is one array, and counts once, at its first place."""
    leaves = jax.tree.leaves_with_path(sizes)
    names = path_strings([path for path, _ in leaves])
    first: dict[int, tuple[str, Any]] = {}
    for name, (_, size) in zip(names, leaves, strict=True):
        first.setdefault(id(size), (name or "all", size))
    return [{name: size} for name, size in first.values()]


def _names(sizes: list[dict[str, Any]]) -> list[str]:
    names = []
    for name, size in [item for row in sizes for item in row.items()]:
        names += [f"{name}/{i}" for i in range(size.size)] if size.ndim else [name]
    return names


def _see(state: ObserveState, norm: jax.Array, parts: jax.Array) -> ObserveState:
    finite = jnp.isfinite(norm)
    count = jnp.sum(state.norm.counts).astype(jnp.float32) + 1
    whole = finite & (norm > 0)
    shares = jnp.where(whole, jnp.square(parts / jnp.where(whole, norm, 1)), 0)
    return state._replace(
        norm=sketch.add(state.norm, norm),
        parts=sketch.add(state.parts, parts),
        share=jnp.where(finite, state.share + (shares - state.share) / count, state.share),
        peak=jnp.where(finite & (norm > state.norm.high), shares, state.peak),
        course=_course.walk(state.course, norm),
    )


def _root_of_squares(parts: jax.Array) -> jax.Array:
    largest = jnp.max(parts, initial=0)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(jnp.sum(jnp.square(parts / scale)))


def _remember(state: ObserveState, norm: jax.Array, parts: jax.Array, inner: Any) -> Recent:
    assert state.recent is not None
    limit, clipped = jnp.float32(jnp.inf), jnp.zeros((), bool)
    tables = [rows(clipper) for _, clipper in recorded(inner)]
    for table in filter(None, tables[:1]):
        clipped = jnp.any(stack([jnp.any(~((size <= limit) & jnp.isfinite(size))) for _, size, limit in table]))
        if len(table) == 1 and jnp.size(table[0][1]) == 1:  # otherwise there is no one limit to draw
            limit = jnp.reshape(table[0][2], ())
    at = state.course.step % state.recent.norm.shape[0]
    now = Recent(norm, parts, kept(jnp.asarray(limit)), clipped)
    return jax.tree.map(lambda ring, x: jnp.asarray(ring).at[at].set(x.astype(ring.dtype)), state.recent, now)
