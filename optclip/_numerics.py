"""The cellar: norms that are right for every finite gradient, in every dtype, on every mesh.

Sums are formed in float32 (float64 where a leaf is). `_squares` has the Euclidean norm, which is nearly all there is;
the others are here, and the derivatives of all.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives

from optclip import _mesh, _squares
from optclip._largest import largest
from optclip._slots import Plan, in_shape, rows_of
from optclip._vectors import concatenate, shared


def is_gradient(leaf: Any) -> bool:
    """Whether ``leaf`` has a size: real or complex floating point. Integers, booleans, float0 and keys have none."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        dtype = jnp.result_type(leaf)
    return dtype != jax.dtypes.float0 and jnp.issubdtype(dtype, jnp.inexact)


def accumulator(*leaves: Any) -> Any:
    """float64 if a leaf is float64 or complex128, else float32."""
    wide = any(jnp.result_type(x) in (jnp.float64, jnp.complex128) for x in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widen(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` in ``dtype``, or in the complex dtype of its precision. Explicit, for float8 does not promote itself."""
    return x.astype(complex_of(dtype) if jnp.iscomplexobj(x) else dtype)


def complex_of(dtype: Any) -> Any:
    """The complex dtype of the precision of a real one."""
    return jnp.dtype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)


def cast_like(x: jax.Array, like: Any) -> jax.Array:
    """``x`` with the dtype and weak type of ``like``."""
    dtype = jnp.result_type(like)
    if isinstance(like, (bool, int, float, complex)) or getattr(jax.typeof(like), "weak_type", False):
        return primitives.convert_element_type_p.bind(x, new_dtype=dtype, weak_type=True, sharding=None)
    return x.astype(dtype)


def times(factor: Any, sizes: Any) -> Any:
    """``factor * size`` for a tree of sizes; infinite for an infinite factor, also where a size is 0."""
    off = factor == jnp.inf
    scale, lift = jnp.where(off, 1, factor), jnp.where(off, jnp.inf, 0)
    return jax.tree.map(lambda s: scale.astype(s.dtype) * s + lift.astype(s.dtype), sizes)


def over(x: jax.Array, largest: jax.Array) -> jax.Array:
    """``x / largest``, for ``largest`` > 0 of the precision of ``x`` and no smaller than it.

    Compilers turn the division into a product with 1 / largest, which is subnormal, and so 0, for the largest numbers.
    """
    half = jnp.where(largest > 2.0**64, 2.0**-64, 1.0).astype(largest.dtype)
    return (x * half) / (largest * half)


def finite(x: Any) -> jax.Array:
    """Whether all of a gradient leaf is finite: a boolean."""
    x = jnp.asarray(x)
    if jax.default_backend() == "cpu":
        return jnp.isfinite(_squares.scaled_down(x, accumulator(x)))
    return jnp.all(jnp.isfinite(x))


def norms(leaves: Sequence[Any], plan: Plan, ord: float = 2.0) -> list[jax.Array]:
    """The p-norm of each group of leaves, p = ``ord`` > 0 or infinity.

    The derivative at a zero norm is 0. A norm is inf or NaN only where a leaf is, or where the norm itself is beyond
    the accumulator's largest number.
    """
    return list(_norms(tuple(jnp.asarray(x) for x in leaves), float(ord), plan)) if leaves else []


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norms(leaves: tuple[jax.Array, ...], ord: float, plan: Plan) -> tuple[jax.Array, ...]:
    return _measured(leaves, ord, plan, (jax.default_backend(), _mesh.may_be_partitioned()))


# Under jit, so that equal shapes are traced once, and a call outside of jit does not compile its loop anew.
@partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _measured(
    leaves: tuple[jax.Array, ...], ord: float, plan: Plan, machine: tuple[str, bool]
) -> tuple[jax.Array, ...]:
    del machine  # of which the program depends
    dtype = accumulator(*leaves)
    if ord == 2:
        return tuple(_squares.norms(leaves, plan, dtype))
    # Behind a barrier, for two passes that share the wide form of a leaf make XLA:CPU store it: twice the gradient for
    # bfloat16. The clip itself is one of them.
    apart = [lax.optimization_barrier(x) for x in leaves]
    if ord == 1:
        return tuple(_reduce([_magnitude(x, dtype) for x in apart], plan, "sum"))
    maxima = _maxima(apart, plan, dtype)
    if ord == np.inf:
        return tuple(maxima)
    safe = [shared(jnp.where((m > 0) & jnp.isfinite(m), m, 1)) for m in maxima]
    tied = [lax.optimization_barrier((x, safe[g])) for x, g in zip(leaves, plan.group, strict=True)]
    powers = _reduce([over(_magnitude(x, dtype), m) ** ord for x, m in tied], plan, "sum")
    return tuple(jnp.where(jnp.isfinite(m), m * s ** (1 / ord), m) for m, s in zip(maxima, powers, strict=True))


@_norms.defjvp
def _norms_jvp(ord: float, plan: Plan, primals: Any, tangents: Any) -> Any:
    (leaves,), (dots,) = primals, tangents
    sizes = _norms(leaves, ord, plan)
    parts = []
    for x, dx, g in zip(leaves, dots, plan.group, strict=True):
        size = sizes[g]
        unit = over(widen(x, size.dtype), jnp.where(size == 0, 1, size))
        magnitude = jnp.abs(unit)
        sign = jnp.where(magnitude == 0, 0, unit / jnp.where(magnitude == 0, 1, magnitude))
        if ord == np.inf:
            weight = (_magnitude(x, size.dtype) == size).astype(size.dtype)
        else:
            weight = jnp.where(magnitude == 0, 0, jnp.where(magnitude == 0, 1, magnitude) ** (ord - 1))
        parts.append((jnp.conj(sign) * widen(dx, size.dtype)).real * weight)
    if ord == np.inf:  # share the derivative between ties
        ties = [
            (_magnitude(x, sizes[g].dtype) == sizes[g]).astype(sizes[g].dtype)
            for x, g in zip(leaves, plan.group, strict=True)
        ]
        counts = _reduce(ties, plan, "sum")
        parts = [p / jnp.maximum(counts[g], 1) for p, g in zip(parts, plan.group, strict=True)]
    slopes = _reduce(parts, plan, "sum")
    return sizes, tuple(s.astype(n.dtype) for s, n in zip(slopes, sizes, strict=True))


def _magnitude(x: jax.Array, dtype: Any) -> jax.Array:
    return jnp.abs(x).astype(dtype) if jnp.iscomplexobj(x) else jnp.abs(x.astype(dtype))


def _maxima(leaves: Sequence[jax.Array], plan: Plan, dtype: Any) -> list[jax.Array]:
    """The largest magnitude of each group; infinity for NaN, which XLA's maximum may drop, as no infinity is."""
    if jax.default_backend() == "cpu" and not _mesh.may_be_partitioned():
        return in_shape(_across(*largest(leaves, plan, dtype), "max"), leaves, plan)
    instead = shared(jnp.asarray(jnp.inf, dtype))
    sizes = [_magnitude(x, dtype) for x in leaves]
    return _reduce([jnp.where(jnp.isnan(m), instead, m) for m in sizes], plan, "max")


def _reduce(parts: Sequence[jax.Array], plan: Plan, op: str) -> list[jax.Array]:
    """Reduces each part over its axes, adds up groups, and crosses the mesh once."""
    if jax.default_backend() != "cpu" and not _mesh.partitioned(parts):
        parts, plan = _by_rows(parts, plan, op)
    return _across(_local(parts, plan, op), plan, op)


def _local(parts: Sequence[jax.Array], plan: Plan, op: str) -> list[jax.Array]:
    reduce = {"sum": jnp.sum, "max": partial(jnp.max, initial=0)}[op]
    return [reduce(x, axis=d, keepdims=d is not None) for x, d in zip(parts, plan.dims, strict=True)]


def _by_rows(parts: Sequence[jax.Array], plan: Plan, op: str) -> tuple[list[jax.Array], Plan]:
    """Whole leaves of one group as one vector, of the rows of the large; XLA:GPU takes two kernels for each of them."""
    slots: dict[Any, list[int]] = {}
    for i, key in enumerate(zip(plan.dims, plan.group, plan.mesh, strict=True)):
        slots.setdefault(key if key[0] is None else i, []).append(i)
    reduce = {"sum": jnp.sum, "max": jnp.max}[op]
    rows = lambda x: jnp.ravel(reduce(x, rows_of(x)) if rows_of(x) else x)
    first = [same[0] for same in slots.values()]
    joined = [
        parts[same[0]] if plan.dims[same[0]] is not None else concatenate([rows(parts[i]) for i in same])
        for same in slots.values()
    ]
    take = lambda field: tuple(field[i] for i in first)
    return joined, Plan(take(plan.dims), take(plan.group), take(plan.mesh))


def _across(local: Sequence[jax.Array], plan: Plan, op: str) -> list[jax.Array]:
    # Leaves of one group that cross the same mesh axes are added up before they cross.
    slots: dict[tuple[int, tuple[str, ...]], list[jax.Array]] = {}
    for part, group, mesh in zip(local, plan.group, plan.mesh, strict=True):
        slots.setdefault((group, mesh), []).append(part)
    merged = [_total(members, op) for members in slots.values()]
    crossed = _mesh.all_reduce(merged, [mesh for _, mesh in slots], op)
    groups: dict[int, list[jax.Array]] = {}
    for (group, _), part in zip(slots, crossed, strict=True):
        groups.setdefault(group, []).append(part)
    return [_total(groups[g], op) for g in range(len(groups))]


def _total(parts: list[jax.Array], op: str) -> jax.Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part if op == "sum" else jnp.maximum(total, part)
    return total
