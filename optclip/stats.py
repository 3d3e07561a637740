"""Reading what was recorded: a flat dict of scalars for a logger, and the worst leaf by its path."""

from typing import Any

import jax
import jax.numpy as jnp

from optclip._clip import ClipState

__all__ = ["summary", "worst_leaf"]


def summary(opt_state: Any, *, per_leaf: bool = False) -> dict[str, Any]:
    """Finds every clipper in an optimizer state and says what it did in the last step.

    Looks through ``optax.chain``, ``named_chain``, ``masked``, ``partition``, ``MultiSteps``, optclip's wrappers, and
    the variables of ``nnx.Optimizer``. Nothing is computed until this is called, and it may be called under jit.

    Args:
      opt_state: any optimizer state.
      per_leaf: whether to add the size and limit of every group, leaf or unit array under its path.

    Returns:
      A flat dict of scalars. For the first clipper found the keys are

      ================================ ===========================================================================
      ``clip/preclip_norm``            size before the clip; over several groups, leaves or units the largest
      ``clip/limit``                   the limit of that size
      ``clip/scale``                   min(1, limit / size), the smallest over all sizes; NaN if a size is not finite
      ``clip/clipped``                 1.0 if any size was beyond its limit, else 0.0
      ``clip/clipped_fraction``        the fraction of sizes (groups, leaves, units) beyond their limits
      ``clip/worst_leaf_index``        which size exceeds its limit most, in ``jax.tree.leaves`` order
      ================================ ===========================================================================

      and with ``per_leaf`` also ``clip/preclip_norm/<path>`` and ``clip/limit/<path>``. Further clippers are named
      ``clip_1``, ``clip_2``, ...; a name from ``named_chain`` or ``partition`` comes between: ``clip/<name>/...``.
      Clippers that record nothing (unit and element scope by default) are left out.

    Example:
      >>> tx = optclip.clip_by_global_norm(1.0)
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(g, tx.init(g))
      >>> float(optclip.summary(state)["clip/preclip_norm"])
      5.0
    """
    out: dict[str, Any] = {}
    for name, state in recorded(opt_state):
        rows = _rows(state)
        if not rows:
            continue
        sizes = jnp.concatenate([jnp.ravel(s) for _, s, _ in rows])
        limits = jnp.concatenate([jnp.ravel(jnp.broadcast_to(x, jnp.shape(s))) for _, s, x in rows])
        excess = _excess(sizes, limits)
        largest = jnp.argmax(sizes)
        beyond = ~(sizes <= limits)
        out[f"{name}/preclip_norm"] = sizes[largest]
        out[f"{name}/limit"] = limits[largest]
        scales = jnp.where(jnp.isfinite(sizes), jnp.where(beyond, limits / jnp.where(sizes == 0, 1, sizes), 1), jnp.nan)
        out[f"{name}/scale"] = jnp.min(scales)
        out[f"{name}/clipped"] = jnp.any(beyond).astype(sizes.dtype)
        out[f"{name}/clipped_fraction"] = jnp.mean(beyond.astype(sizes.dtype))
        out[f"{name}/worst_leaf_index"] = _row_of(rows)[jnp.argmax(excess)]
        if per_leaf:
            for path, size, limit in rows:
                out[f"{name}/preclip_norm/{path}"] = size
                out[f"{name}/limit/{path}"] = limit
    return out


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
        ratios = [(float(jnp.max(_excess(s, x), initial=0.0)), path) for path, s, x in _rows(state)]
        if ratios:
            ratio, path = max(ratios, key=lambda r: r[0])
            worst[name] = (path, ratio)
    return worst


def path_string(path: Any) -> str:
    """A key path as names joined by slashes, without the ``value`` that wrapped variables add."""
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    if len(names) > 1 and names[-1] == "value":
        names.pop()
    return "/".join(names)


def _excess(size: Any, limit: Any) -> jax.Array:
    """size / limit; infinite where the size is not finite."""
    return jnp.where(jnp.isfinite(size), size / limit, jnp.inf)


def _rows(state: ClipState) -> list[tuple[str, Any, Any]]:
    """Path, size and limit of every recorded size; a limit deeper than its size makes a row of its own."""
    assert state.stats is not None
    sizes, limits = plain(state.stats.sizes), plain(state.stats.limits)
    if jax.tree.structure(sizes).num_leaves <= jax.tree.structure(limits).num_leaves:
        sizes = jax.tree.broadcast(sizes, limits)
    else:
        limits = jax.tree.broadcast(limits, sizes)
    pairs = jax.tree.leaves_with_path(sizes)
    return [(path_string(p), s, x) for (p, s), x in zip(pairs, jax.tree.leaves(limits), strict=True)]


def _row_of(rows: list[tuple[str, Any, Any]]) -> jax.Array:
    return jnp.concatenate([jnp.full(max(jnp.size(s), 0), i, jnp.int32) for i, (_, s, _) in enumerate(rows)])


def recorded(opt_state: Any) -> list[tuple[str, ClipState]]:
    found = jax.tree.leaves_with_path(opt_state, is_leaf=lambda x: isinstance(x, ClipState))
    out: list[tuple[str, ClipState]] = []
    for path, state in found:
        if isinstance(state, ClipState) and state.stats is not None:
            keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
            keys = [k for k in keys if k not in ("inner_states",)]
            out.append(("/".join(keys), state))
    counts: dict[str, int] = {}
    named = []
    for keys, state in out:
        n = counts[keys] = counts.get(keys, -1) + 1
        named.append(("clip" + (f"_{n}" if n else "") + (f"/{keys}" if keys else ""), state))
    return named


def plain(tree: Any) -> Any:
    """The tree with the variables that frameworks wrap around arrays (``nnx``) taken off."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: hasattr(x, "get_value"))
    return treedef.unflatten([x.get_value() if hasattr(x, "get_value") else x for x in leaves])
