"""The front end: what the caller passes, checked once and turned into one function of one example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip.per_example import _jax

__all__ = ["Call", "Signature", "prepare"]


class Signature(NamedTuple):
    """Which argument plays which part; the keyword arguments every entry of this package shares."""

    argnums: int | Sequence[int] = 0
    batch_argnums: int | Sequence[int] = 1
    key_argnums: int | Sequence[int] = ()
    has_aux: bool = False
    keep_batch_dim: bool = True


class Call(NamedTuple):
    """One call of the user's loss, taken apart.

    ``loss(params, example)`` takes the two flat lists below (of one example: without their leading axis) and returns
    ``(loss, aux)``.
    """

    loss: Callable[[list, list], tuple[jax.Array, Any]]
    params: list[jax.Array]
    examples: list[jax.Array]
    params_tree: Any  # treedef of the differentiated argument, or of the tuple of them
    names: list[str]  # one per parameter leaf, as in its key path
    size: int  # number of examples

    def example_types(self) -> list[Any]:
        return _jax.row_types(self.examples)


def prepare(name: str, loss_fn: Callable, signature: Signature, args: tuple, kwargs: dict) -> Call:
    """Checks the arguments of one call (errors name ``name``, the argument and what is expected) and flattens them."""
    diff = _numbers(name, "argnums", signature.argnums, len(args))
    batch = _numbers(name, "batch_argnums", signature.batch_argnums, len(args))
    keys = _numbers(name, "key_argnums", signature.key_argnums, len(args))
    _disjoint(name, argnums=diff, batch_argnums=batch, key_argnums=keys)

    wanted = args[diff[0]] if isinstance(signature.argnums, int) else tuple(args[i] for i in diff)
    paths, params_tree = jax.tree_util.tree_flatten_with_path(wanted)
    names = [jax.tree_util.keystr(path) or "parameter" for path, _ in paths]
    params = [_parameter(name, leaf_name, leaf) for leaf_name, (_, leaf) in zip(names, paths, strict=True)]

    batch_leaves, batch_tree = jax.tree.flatten(tuple(args[i] for i in batch))
    size = _leading_size(name, batch_leaves)
    examples = [jnp.asarray(x) for x in batch_leaves] + [_split(name, args[i], size) for i in keys]
    params = [_jax.vary_as(p, examples) for p in params]

    def loss(param_leaves: list, example_leaves: list) -> tuple[jax.Array, Any]:
        full = list(args)
        wanted = jax.tree.unflatten(params_tree, param_leaves)
        for i, value in zip(diff, (wanted,) if isinstance(signature.argnums, int) else wanted, strict=True):
            full[i] = value
        rows = example_leaves[: len(batch_leaves)]
        if signature.keep_batch_dim:
            rows = [jnp.expand_dims(x, 0) for x in rows]
        for i, value in zip(batch, jax.tree.unflatten(batch_tree, rows), strict=True):
            full[i] = value
        for i, value in zip(keys, example_leaves[len(batch_leaves) :], strict=True):
            full[i] = value
        result = loss_fn(*full, **kwargs)
        return _check_loss(name, result, signature.has_aux)

    return Call(loss, params, examples, params_tree, names, size)


def _numbers(name: str, which: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    for i in numbers:
        if not -count <= i < count:
            raise ValueError(f"{name}: {which}={value} points beyond the {count} positional arguments of this call")
    return tuple(i % count for i in numbers)


def _disjoint(name: str, **groups: tuple[int, ...]) -> None:
    seen: dict[int, str] = {}
    for which, numbers in groups.items():
        for i in numbers:
            if i in seen:
                raise ValueError(f"{name}: argument {i} is named by both {seen[i]} and {which}; it can be only one")
            seen[i] = which


def _parameter(name: str, leaf_name: str, leaf: Any) -> jax.Array:
    try:
        array = jnp.asarray(leaf)
    except TypeError:
        raise TypeError(
            f"{name}: {leaf_name} is not an array but {type(leaf).__name__}; split such leaves off first "
            "(equinox.partition, nnx.split) and close over them"
        ) from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        kind = "complex" if jnp.issubdtype(array.dtype, jnp.complexfloating) else "not of a floating type"
        raise TypeError(
            f"{name}: parameter {leaf_name} is {kind} ({array.dtype}); only real floating parameters can be clipped"
        )
    return array


def _leading_size(name: str, leaves: list) -> int:
    if not leaves:
        raise ValueError(f"{name}: batch_argnums names no array, so there is no example axis")
    shapes = [jnp.shape(x) for x in leaves]
    if any(len(shape) == 0 for shape in shapes):
        raise ValueError(f"{name}: a leaf of the batch is a scalar; every leaf needs a leading example axis")
    sizes = sorted({shape[0] for shape in shapes})
    if len(sizes) > 1:
        raise ValueError(f"{name}: leaves of the batch disagree on the number of examples (leading axis): {sizes}")
    if sizes[0] == 0:
        raise ValueError(f"{name}: the batch is empty (leading axis 0)")
    return sizes[0]


def _split(name: str, key: jax.Array, size: int) -> jax.Array:
    """One key per example. A raw ``uint32[2]`` key and a typed key both split to a leading example axis."""
    try:
        return jax.random.split(key, size)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: key_argnums must name a single random key, not {jnp.shape(key)}") from None


def _check_loss(name: str, result: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"{name}: with has_aux=True the loss function must return a pair (loss, aux)")
    pair: Any = result if has_aux else (result, None)
    loss, aux = pair
    if not jax.tree_util.all_leaves([loss]):
        kind = type(loss).__name__
        raise TypeError(f"{name}: the loss must be a scalar, not {kind}; for a pair (loss, aux) pass has_aux=True")
    if jnp.shape(loss) != ():
        raise TypeError(
            f"{name}: the loss of one example must be a scalar, not of shape {jnp.shape(loss)}; "
            "take the mean (with keep_batch_dim=True the loss function sees a batch of one)"
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(f"{name}: the loss must be real floating, not {jnp.result_type(loss)}")
    return loss, aux
