"""The gradient of a convolution kernel, for one example, as a sum over positions.

Differentiated by its kernel a convolution is one more convolution, whose window y runs over the few positions of
the kernel and whose sum r runs over the many positions of the image::

    G[b, o, y] = sum_{i, r} x[b, i, y * stride + r * dilation] g[o, i, r]

Seen from position y of the kernel, x is a strided slice of itself: a *piece*. All pieces together are the patches,
and G is the matrix product of patches and cotangent. Groups, of either kind, are blocks of it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip.per_example._jax import JaxprEqn
from optclip.per_example._terms import Axis, Dense, Factored, Term, einsum, new_label

__all__ = ["convolution"]

_MOST_POSITIONS = (
    64  # of a kernel; with more the patches are out of proportion, and the equation is executed as it stands
)


class _Geometry(NamedTuple):
    """Where the pieces lie in the padded x, and the labels of everything, in the order of the axes in memory."""

    kernel: tuple[int, ...]
    starts: np.ndarray  # [positions, rank of x]
    extent: tuple[int, ...]  # of a piece, before its steps are taken
    steps: tuple[int, ...]
    split: tuple[int, ...]  # shape of a piece with its groups as axes of their own
    labels_x: tuple[int, ...]
    labels_g: tuple[int, ...]
    window: tuple[int, ...]
    where: int  # the axis of a piece before which the window goes
    precision: Any


def convolution(eqn: JaxprEqn, x: Any, g: Any) -> Factored | None:
    p, out = eqn.params, eqn.outvars[0].aval
    numbers = p["dimension_numbers"]
    kernel = tuple(out.shape[i] for i in numbers.out_spec[2:])
    if math.prod(kernel) > _MOST_POSITIONS:
        return None
    batches, features = p["batch_group_count"], p["feature_group_count"]
    group_b, b, group_f, i, o = (new_label() for _ in range(5))
    window, places = tuple(new_label() for _ in kernel), tuple(new_label() for _ in kernel)

    config = [(0, 0, 0)] * x.ndim
    starts, steps, extent = np.zeros((math.prod(kernel), x.ndim), np.int32), [1] * x.ndim, list(x.shape)
    names_x, parts_x = [()] * x.ndim, [(n,) for n in x.shape]
    for s, dim in enumerate(numbers.lhs_spec[2:]):
        config[dim] = (*p["padding"][s], p["lhs_dilation"][s] - 1)
        steps[dim], count = p["rhs_dilation"][s], g.shape[numbers.rhs_spec[2 + s]]
        extent[dim] = (count - 1) * steps[dim] + 1
        starts[:, dim] = [y[s] * p["window_strides"][s] for y in itertools.product(*map(range, kernel))]
        names_x[dim], parts_x[dim] = (places[s],), (count,)
    names_x[numbers.lhs_spec[0]] = (group_b, b)
    parts_x[numbers.lhs_spec[0]] = (batches, x.shape[numbers.lhs_spec[0]] // batches)
    names_x[numbers.lhs_spec[1]] = (group_f, i)
    parts_x[numbers.lhs_spec[1]] = (features, x.shape[numbers.lhs_spec[1]] // features)
    labels_x = tuple(itertools.chain(*names_x))

    names_g, parts_g = [()] * g.ndim, [(n,) for n in g.shape]
    for dim, name in zip(numbers.rhs_spec, [(group_f, group_b, o), (i,), *((r,) for r in places)], strict=True):
        names_g[dim] = name
    parts_g[numbers.rhs_spec[0]] = (features, batches, g.shape[numbers.rhs_spec[0]] // (features * batches))
    geometry = _Geometry(
        kernel, starts, tuple(extent), tuple(steps), tuple(itertools.chain(*parts_x)), labels_x,
        tuple(itertools.chain(*names_g)), window, labels_x.index(group_b), p["precision"],
    )  # fmt: skip

    x = jax.lax.pad(x, jnp.zeros((), x.dtype), config)
    g = g.reshape(tuple(itertools.chain(*parts_g)))
    axes: list[Any] = [None] * len(out.shape)
    for dim, name in zip(numbers.out_spec, [(b,), (group_f, group_b, o), *((w,) for w in window)], strict=True):
        axes[dim] = Axis(name)
    if out.size <= x.size + g.size:
        order = (group_f, group_b, o, *window, b)
        array = jax.lax.platform_dependent(
            x,
            g,
            cpu=functools.partial(_by_example, geometry, order),
            default=functools.partial(_by_position, geometry, order),
        )
        term = Term((Dense(array, order),), tuple(axes), p["precision"], rule="direct")
    else:
        term = Term((_patches(geometry, x), Dense(g, geometry.labels_g)), tuple(axes), p["precision"])
    return Factored((term,), out.shape, out.dtype)


def _piece(geometry: _Geometry, x: jax.Array, start: Sequence[Any]) -> jax.Array:
    piece = jax.lax.dynamic_slice(x, start, geometry.extent)
    return jax.lax.slice(piece, [0] * x.ndim, geometry.extent, geometry.steps).reshape(geometry.split)


def _patches(geometry: _Geometry, x: jax.Array) -> Dense:
    where = geometry.where
    stack = jnp.stack([_piece(geometry, x, list(start)) for start in geometry.starts], where)
    array = stack.reshape(*stack.shape[:where], *geometry.kernel, *stack.shape[where + 1 :])
    return Dense(array, (*geometry.labels_x[:where], *geometry.window, *geometry.labels_x[where:]))


def _by_example(geometry: _Geometry, order: tuple[int, ...], x: jax.Array, g: jax.Array) -> jax.Array:
    """One example after the other: its patches stay in the cache. Grouped convolutions are slow on XLA:CPU."""

    @jax.custom_batching.sequential_vmap
    def product(x: jax.Array, g: jax.Array) -> jax.Array:
        return einsum([_patches(geometry, x), Dense(g, geometry.labels_g)], order, geometry.precision)

    return product(x, g)


def _by_position(geometry: _Geometry, order: tuple[int, ...], x: jax.Array, g: jax.Array) -> jax.Array:
    """One position of the kernel after the other, all examples at once: no more than one piece is held."""
    window = set(geometry.window)
    rest = tuple(label for label in order if label not in window)

    def step(_: None, start: jax.Array) -> tuple[None, jax.Array]:
        piece = Dense(_piece(geometry, x, list(start)), geometry.labels_x)
        return None, einsum([piece, Dense(g, geometry.labels_g)], rest, geometry.precision)

    _, stack = jax.lax.scan(step, None, jnp.asarray(geometry.starts))
    stack = stack.reshape(*geometry.kernel, *stack.shape[1:])
    have = (*geometry.window, *rest)
    return jnp.transpose(stack, [have.index(label) for label in order])
