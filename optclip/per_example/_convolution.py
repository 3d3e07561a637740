"""The gradient of a convolution kernel, for one example, as a sum over positions.

Differentiated by its kernel a convolution is one more convolution, whose window y runs over the few positions of
the kernel and whose sum r runs over the many positions of the image::

    G[b, o, y] = sum_{i, r} x[b, i, y * stride + r * dilation] g[o, i, r]

Seen from position y of the kernel, x is a strided slice of itself: a *piece*. All pieces together are the patches,
and G is the matrix product of patches and cotangent. Groups, of either kind, are blocks of it. Pieces along the last
axis of the kernel alone are a third of the patches of a 3 x 3 kernel, and a slice of them is one row of it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
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
    dims: tuple[int, ...]  # the axis of x along each axis of the kernel
    starts: tuple[tuple[int, ...], ...]  # for each axis of the kernel, by position
    extent: tuple[int, ...]  # of a piece, before its steps are taken
    steps: tuple[int, ...]
    split: tuple[int, ...]  # shape of a piece with its groups as axes of their own
    labels_x: tuple[int, ...]
    labels_g: tuple[int, ...]
    window: tuple[int, ...]
    where: int  # the axis of a piece before which the window goes,
    before: int  # and the axis of x that this is made of
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
    steps, extent, starts = [1] * x.ndim, list(x.shape), []
    names_x, parts_x = [()] * x.ndim, [(n,) for n in x.shape]
    for s, dim in enumerate(numbers.lhs_spec[2:]):
        config[dim] = (*p["padding"][s], p["lhs_dilation"][s] - 1)
        steps[dim], count = p["rhs_dilation"][s], g.shape[numbers.rhs_spec[2 + s]]
        extent[dim] = (count - 1) * steps[dim] + 1
        starts.append(tuple(y * p["window_strides"][s] for y in range(kernel[s])))
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
        kernel, tuple(numbers.lhs_spec[2:]), tuple(starts), tuple(extent), tuple(steps),
        tuple(itertools.chain(*parts_x)), labels_x, tuple(itertools.chain(*names_g)), window, labels_x.index(group_b),
        numbers.lhs_spec[0], p["precision"],
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


def _cut(geometry: _Geometry, x: jax.Array, positions: Iterable[tuple[int, int]], shift: int = 0) -> jax.Array:
    """What pairs of an axis and a position of the kernel see of x, whose axes from ``before`` on moved by ``shift``."""
    for axis, y in positions:
        dim, start = geometry.dims[axis], geometry.starts[axis][y]
        at = dim + shift if dim >= geometry.before else dim
        x = jax.lax.slice_in_dim(x, start, start + geometry.extent[dim], geometry.steps[dim], at)
    return x


def _patches(geometry: _Geometry, x: jax.Array) -> Dense:
    positions = itertools.product(*map(range, geometry.kernel))
    pieces = [_cut(geometry, x, enumerate(position)).reshape(geometry.split) for position in positions]
    where, stack = geometry.where, jnp.stack(pieces, geometry.where)
    array = stack.reshape(*stack.shape[:where], *geometry.kernel, *stack.shape[where + 1 :])
    return Dense(array, (*geometry.labels_x[:where], *geometry.window, *geometry.labels_x[where:]))


def _by_example(geometry: _Geometry, order: tuple[int, ...], x: jax.Array, g: jax.Array) -> jax.Array:
    """One example after the other: what is copied of it stays in the cache. XLA:CPU is slow at grouped convolutions."""
    return jax.custom_batching.sequential_vmap(functools.partial(_by_row, geometry, order))(x, g)


def _by_row(geometry: _Geometry, order: tuple[int, ...], x: jax.Array, g: jax.Array) -> jax.Array:
    if not geometry.kernel:
        return einsum([_patches(geometry, x), Dense(g, geometry.labels_g)], order, geometry.precision)
    *outer, last = range(len(geometry.kernel))
    pieces = jnp.stack([_cut(geometry, x, [(last, y)]) for y in range(geometry.kernel[last])], geometry.before)
    where, above = geometry.where, geometry.window[:last]
    labels = (*geometry.labels_x[:where], geometry.window[last], *geometry.labels_x[where:])
    rest, rows = tuple(label for label in order if label not in above), []
    for position in itertools.product(*(range(geometry.kernel[axis]) for axis in outer)):
        row = _cut(geometry, pieces, zip(outer, position, strict=True), shift=1)
        row = row.reshape(*geometry.split[:where], geometry.kernel[last], *geometry.split[where:])
        rows.append(einsum([Dense(row, labels), Dense(g, geometry.labels_g)], rest, geometry.precision))
    at = order.index(geometry.window[0])
    stack = jnp.stack(rows, at)
    return stack.reshape(*stack.shape[:at], *geometry.kernel[:last], *stack.shape[at + 1 :])


def _by_position(geometry: _Geometry, order: tuple[int, ...], x: jax.Array, g: jax.Array) -> jax.Array:
    """One position of the kernel after the other, all examples at once: no more than one piece is held."""
    window = set(geometry.window)
    rest = tuple(label for label in order if label not in window)

    starts = np.zeros((math.prod(geometry.kernel), x.ndim), np.int32)
    starts[:, list(geometry.dims)] = list(itertools.product(*geometry.starts))

    def step(_: None, start: jax.Array) -> tuple[None, jax.Array]:
        piece = jax.lax.dynamic_slice(x, list(start), geometry.extent)
        piece = jax.lax.slice(piece, [0] * x.ndim, geometry.extent, geometry.steps).reshape(geometry.split)
        return None, einsum([Dense(piece, geometry.labels_x), Dense(g, geometry.labels_g)], rest, geometry.precision)

    _, stack = jax.lax.scan(step, None, jnp.asarray(starts))
    stack = stack.reshape(*geometry.kernel, *stack.shape[1:])
    have = (*geometry.window, *rest)
    return jnp.transpose(stack, [have.index(label) for label in order])
