"""NumPy in float64: what measures and the fixed methods should compute, written from their formulas."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def wide(tree: Any) -> Any:
    """The tree in float64 (complex128)."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64), tree)


def norm(x: Any, ord: float = 2, axis: Any = None, keepdims: bool = False) -> np.ndarray:
    """The p-norm over ``axis``, divided by the largest entry first so that no power leaves float64."""
    x = np.abs(np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64))
    largest = np.max(x, axis=axis, keepdims=True, initial=0.0)
    unit = x / np.where(largest > 0, largest, 1)
    size = largest * (1.0 if ord == np.inf else np.sum(unit**ord, axis=axis, keepdims=True) ** (1 / ord))
    return size if keepdims else np.squeeze(size, axis=axis)


def flat(tree: Any) -> np.ndarray:
    """All leaves as one vector."""
    leaves = [np.ravel(x) for x in jax.tree.leaves(wide(tree))]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def global_norm(tree: Any, ord: float = 2) -> np.ndarray:
    """The p-norm of all leaves as one vector."""
    return norm(flat(tree), ord)


def leaf_norm(tree: Any, ord: float = 2) -> Any:
    """The p-norm of each leaf."""
    return jax.tree.map(lambda x: norm(x, ord), tree)


def leaf_rms(tree: Any) -> Any:
    """The root mean square of each leaf; 0 for an empty one."""
    return jax.tree.map(lambda x: norm(x) / max(np.size(x), 1) ** 0.5, tree)


def fan_in(shape: tuple[int, ...]) -> tuple[int, ...]:
    """NFNets' units in the layouts of JAX: the axes that are summed."""
    if sum(n > 1 for n in shape) <= 1:
        return tuple(range(len(shape)))
    return (0,) if len(shape) <= 3 else tuple(range(len(shape) - 1))


def unit_norm(tree: Any, ord: float = 2) -> Any:
    """The p-norm of each unit."""
    return jax.tree.map(lambda x: norm(x, ord, axis=fan_in(np.shape(x)), keepdims=True), tree)


def magnitude(tree: Any) -> Any:
    """The absolute values."""
    return jax.tree.map(np.abs, wide(tree))


MEASURES: dict[str, Callable[..., Any]] = {
    "global_norm": global_norm,
    "leaf_norm": leaf_norm,
    "leaf_rms": leaf_rms,
    "unit_norm": unit_norm,
    "magnitude": magnitude,
}


def rescale(update: Any, size: Any, limit: Any) -> np.ndarray:
    """u * min(1, limit / size)."""
    return update * np.minimum(1.0, limit / np.where(size > 0, size, 1.0)) if np.size(update) else update


def pairs(sizes: Any, limits: Any) -> Iterator[tuple[Any, Any]]:
    """Sizes with their limits, where limits are one number or a tree like the sizes."""
    many = jax.tree.leaves(limits)
    leaves = jax.tree.leaves(sizes)
    yield from zip(leaves, many if len(many) == len(leaves) else many * len(leaves), strict=True)


def same_direction(updates: Any, grads: Any, scope: str) -> Any:
    """What ``updates`` are if each scope of ``grads`` was only scaled: the projection of the one on the other.

    At element scope: of the magnitude they have, with the signs of the gradient.
    """
    updates, grads = wide(updates), wide(grads)
    dot = lambda u, g, axis=None: np.sum(u * g, axis=axis, keepdims=axis is not None)
    ratio = lambda u, g, axis=None: dot(u, g, axis) / np.where(dot(g, g, axis) > 0, dot(g, g, axis), 1)
    if scope == "element":
        return jax.tree.map(lambda u, g: np.abs(u) * np.sign(g), updates, grads)
    if scope == "unit":
        return jax.tree.map(lambda u, g: np.maximum(ratio(u, g, fan_in(g.shape)), 0) * g, updates, grads)
    if scope == "leaf":
        return jax.tree.map(lambda u, g: max(ratio(u, g), 0) * g, updates, grads)
    parts = {"all": None} if scope == "tree" else dict.fromkeys(grads)
    pick = lambda tree, part: tree if scope == "tree" else tree[part]
    factors = {p: max(ratio(flat(pick(updates, p)), flat(pick(grads, p))), 0) for p in parts}
    if scope == "tree":
        return jax.tree.map(lambda g: factors["all"] * g, grads)
    return {p: jax.tree.map(lambda g, p=p: factors[p] * g, grads[p]) for p in grads}
