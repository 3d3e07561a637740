"""Reading what was recorded: a flat dict of scalars for a logger, and the worst leaf by its path."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optclip import _mesh
from optclip._clip import ClipState
from optclip._recorded import ClipStats, plain
from optclip._vectors import concatenate
from optclip._wrappers.nonfinite import SkipState
from optclip._wrappers.spikes import SpikeState
from optclip._wrappers.zero import ZeroState
from optclip.selection import path_strings

__all__ = ["summary", "worst_leaf"]


def summary(opt_state: Any, *, per_leaf: bool = False) -> dict[str, Any]:
    """Finds every clipper and guard in an optimizer state and says what it did in the last step.

    Looks through ``optax.chain``, ``named_chain``, ``masked``, ``partition``, ``MultiSteps``, optclip's wrappers, and
    the variables of ``nnx.Optimizer``. Nothing is computed until this is called, and it may be called under jit.

    Args:
      opt_state: any optimizer state.
      per_leaf: whether to add the size and limit of every group, leaf or unit array (as an array) under its path.

    Returns:
      A flat dict of scalars; of a state stacked by ``jax.vmap`` ask for ``jax.vmap(summary)(state)``. For the first
      clipper found the keys are

      ================================ ===========================================================================
      ``clip/preclip_norm``            size before the clip; over several groups, leaves or units the largest
      ``clip/limit``                   the limit of that size; of equal sizes the smallest
      ``clip/scale``                   min(1, limit / size), the smallest over all sizes; NaN if a size is not finite
      ``clip/clipped``                 1.0 if any size was beyond its limit or not finite, else 0.0
      ``clip/clipped_fraction``        the fraction of sizes (groups, leaves, units) beyond their limits; a group whose
                                       label stands at several places counts at each
      ``clip/worst_leaf_index``        which size exceeds its limit most, in ``jax.tree.leaves`` order
      ================================ ===========================================================================

      and with ``per_leaf`` also ``clip/preclip_norm/<path>`` and ``clip/limit/<path>``. Further clippers are named
      ``clip_1``, ``clip_2``, ...; a name from ``named_chain`` or ``partition`` comes between: ``clip/<name>/...``.
      Clippers that record nothing (unit and element scope by default) are left out.

      Guards are named ``skip``, ``skip_1``, ... and ``zero``, ... in the same way, the outer before the inner. What
      lies inside a guard that has skipped tells of the last step it was given, so count by differences of ``total``:

      ================================ ===========================================================================
      ``skip/skipped``                 1.0 if the last step was skipped, else 0.0
      ``skip/consecutive``             steps skipped in a row up to now
      ``skip/total``                   steps skipped since the start
      ``skip/norm``, ``skip/limit``    of `skip_spikes`: what the last step measured and what was allowed, also if it
                                       was skipped (the clippers inside then still tell of the last accepted step)
      ``skip/loss``, ``skip/max_loss`` likewise for the loss
      ``zero/nan``, ``zero/posinf``,   elements set to zero since the start
      ``zero/neginf``
      ``zero/last``                    elements set to zero in the last step
      ================================ ===========================================================================

    Example:
      >>> tx = optclip.clip_by_global_norm(1.0)
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(g, tx.init(g))
      >>> float(optclip.summary(state)["clip/preclip_norm"])
      5.0
    """
    out: dict[str, Any] = {}
    for name, state in recorded(opt_state):
        said = _said(plain(state.stats))
        out |= {f"{name}/{key}": value for key, value in said.items()}
        if said and per_leaf:
            table = rows(state)
            for path, size, limit in [row for row in table if row[0] or len(table) > 1]:
                out[f"{name}/preclip_norm/{path}"] = size
                out[f"{name}/limit/{path}"] = limit
    for name, state in _named(opt_state, "skip", (SkipState, SpikeState)):
        out |= {f"{name}/{key}": value for key, value in _skips(state._replace(inner_state=())).items()}
    for name, state in _named(opt_state, "zero", ZeroState):
        out |= {f"{name}/{key}": value for key, value in plain(state)._asdict().items()}
    return out


# One program, compiled once: of a thousand leaves operation by operation 0.1 s.
@partial(jax.jit, inline=True)
def _said(stats: ClipStats) -> dict[str, jax.Array]:
    """What `summary` says of one clipper; nothing of one that has nothing but empty leaves."""
    table = _pairs(stats.sizes, stats.limits, ())
    if not sum(jnp.size(s) for _, s, _ in table):
        return {}
    sizes, limits = _flat(table)
    largest = sizes[jnp.argmax(sizes)]
    as_large = (sizes == largest) | (jnp.isnan(sizes) & jnp.isnan(largest))
    beyond = ~((sizes <= limits) & jnp.isfinite(sizes))
    scales = jnp.where(jnp.isfinite(sizes), jnp.where(beyond, limits / jnp.where(sizes == 0, 1, sizes), 1), jnp.nan)
    return {
        "preclip_norm": largest,
        "limit": jnp.min(jnp.where(as_large, limits, jnp.inf)),
        "scale": jnp.min(scales),
        "clipped": jnp.any(beyond).astype(sizes.dtype),
        "clipped_fraction": jnp.mean(beyond.astype(sizes.dtype)),
        "worst_leaf_index": _row_of(table)[jnp.argmax(_excess(sizes, limits))],
    }


@partial(jax.jit, inline=True)
def _skips(state: SkipState | SpikeState) -> dict[str, Any]:
    state = plain(state)
    said = {
        "skipped": (state.consecutive > 0).astype(jnp.float32),
        "consecutive": state.consecutive,
        "total": state.total,
    }
    if isinstance(state, SpikeState):
        for judge, size, limit in (state.norm, "norm", "limit"), (state.loss, "loss", "max_loss"):
            judged = _said(judge.stats) if judge else {}
            if judged:
                said |= {size: judged["preclip_norm"], limit: judged["limit"]}
    return said


def worst_leaf(opt_state: Any) -> dict[str, tuple[str, float]]:
    """Which group, leaf or unit exceeds its limit most, by path.

    Args:
      opt_state: any optimizer state, with concrete values (not under jit).

    Returns:
      For each clipper (named as in `summary`) the path and the ratio of size to limit. The path of a single norm over
      all leaves is empty.

    Example:
      >>> tx = optclip.clip_by_leaf_norm(1.0)
      >>> g = {"a": jnp.ones(1), "b": jnp.full(4, 3.0)}
      >>> optclip.worst_leaf(tx.update(g, tx.init(g))[1])
      {'clip': ('b', 6.0)}
    """
    worst = {}
    for name, state in recorded(opt_state):
        said = _said(plain(state.stats))
        if said:
            path, size, limit = rows(state)[int(said["worst_leaf_index"])]
            worst[name] = (path, float(jnp.max(_excess(size, limit))))
    return worst


@partial(jax.jit, inline=True)
def _excess(size: Any, limit: Any) -> jax.Array:
    """size / limit, 0 where both are 0; infinite where the size is not finite."""
    return jnp.where(jnp.isfinite(size), size / jnp.where((size == 0) & (limit == 0), 1, limit), jnp.inf)


def rows(state: ClipState) -> list[tuple[str, Any, Any]]:
    """Path, size and limit of every recorded size; a limit deeper than its size makes a row of its own.

    Of paths that read alike (a key ``a/b``, and ``b`` under ``a``) the second ends in ``#2``.
    """
    stats = plain(state.stats)
    pairs = _pairs(stats.sizes, stats.limits, ())
    names = _told_apart(path_strings([path for path, *_ in pairs]))
    return [(name, *pair) for name, (_, *pair) in zip(names, pairs, strict=True)]


def _told_apart(names: list[str]) -> Iterator[str]:
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"


def _pairs(size: Any, limit: Any, path: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], Any, Any]]:
    """Both are prefixes of the updates, but either may be the deeper one, here and there."""
    if jax.tree_util.all_leaves([size]):
        return [((*path, *p), size, x) for p, x in jax.tree.leaves_with_path(limit)]
    if jax.tree_util.all_leaves([limit]):
        return [((*path, *p), s, limit) for p, s in jax.tree.leaves_with_path(size)]
    children = lambda tree: jax.tree.leaves_with_path(tree, is_leaf=lambda x: x is not tree)
    both = zip(children(size), children(limit), strict=True)
    return [row for (p, s), (_, x) in both for row in _pairs(s, x, (*path, *p))]


def _flat(table: Sequence[tuple[Any, Any, Any]]) -> tuple[jax.Array, jax.Array]:
    """All sizes, and all limits, as vectors."""
    table = [(path, _mesh.replicated(s), _mesh.replicated(x)) for path, s, x in table]
    sizes = [jnp.ravel(s) for _, s, _ in table]
    limits = [jnp.ravel(jnp.broadcast_to(x, jnp.shape(s))) for _, s, x in table]
    return concatenate(sizes), concatenate(limits)


def _row_of(table: Sequence[tuple[Any, Any, Any]]) -> jax.Array:
    return concatenate([jnp.full(jnp.size(s), i, jnp.int32) for i, (_, s, _) in enumerate(table)])


def recorded(opt_state: Any) -> list[tuple[str, ClipState]]:
    """The clippers that record something, with their names."""
    return _named(opt_state, "clip", ClipState, lambda state: state.stats is not None)


def _named(opt_state: Any, label: str, kind: Any, counts: Any = lambda state: True) -> list[tuple[str, Any]]:
    """The nodes of a kind in an optimizer state, named by label, number and the names of chains around them."""
    seen: dict[str, int] = {}
    named = []
    for path, state in _nodes(opt_state, kind):
        if counts(state):
            names = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
            keys = "/".join(name for name in names if name != "inner_states")
            n = seen[keys] = seen.get(keys, -1) + 1
            named.append((label + (f"_{n}" if n else "") + (f"/{keys}" if keys else ""), state))
    return named


def _nodes(tree: Any, kind: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Also those inside guards, but for a guard's own records."""
    guards = (SkipState, SpikeState)
    for more, node in jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, (guards, kind))):
        if isinstance(node, kind):
            yield path + more, node
        if isinstance(node, guards):
            yield from _nodes(node.inner_state, kind, path + more)
