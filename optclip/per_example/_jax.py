"""Everything that depends on the version of jax or on its intermediate language, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType

from optclip._mesh import varying_axes

if TYPE_CHECKING:
    JaxprEqn = Literal = Var = Any  # types of variables are declared to have no shape
else:
    from jax.extend.core import JaxprEqn, Literal, Var

__all__ = [
    "REMAT", "ClosedJaxpr", "Jaxpr", "JaxprEqn", "Literal", "Var", "bind", "called", "is_remat", "placed_as",
    "row_types", "sum_over_shards", "vary_as", "zeros",
]  # fmt: skip


def row_types(arrays: Sequence[jax.Array]) -> list[Any]:
    """The types of one row of each array, as ``vmap`` makes them: without what concerns the leading axis."""
    types: list[Any] = []

    def row(*rows: jax.Array) -> None:
        types.extend(map(jax.typeof, rows))

    jax.eval_shape(jax.vmap(row), *arrays)
    return types


def vary_as(array: jax.Array, others: Sequence[jax.Array]) -> jax.Array:
    """``array``, typed as different on every device over which ``others`` differ (inside a checked ``shard_map``).

    Otherwise the transpose of "the same on every device" is a sum over devices, in the middle of a gradient.
    """
    axes = {axis for other in others for axis in varying_axes(other)} - set(varying_axes(array))
    return jax.lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array


def zeros(aval: Any) -> jax.Array:
    """Zeros of a type that may say that the array varies over devices."""
    axes = manual_axes(aval)
    array = jnp.zeros(aval.shape, aval.dtype)
    return jax.lax.pcast(array, axes, to="varying") if axes else array


def sum_over_shards(function: Callable[..., jax.Array], arrays: Any) -> jax.Array:
    """``function(arrays)``, which sums over an axis that may be sharded.

    On a mesh with explicit axes the type of such a sum is ambiguous; here it is: the whole sum on every device.
    """
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(arrays)]
    mesh = next((s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types), None)
    if mesh is None:
        return function(arrays)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    summed: Any = jax.sharding.auto_axes(function, out_sharding=whole)
    return summed(arrays)


def placed_as(array: jax.Array, other: jax.Array) -> jax.Array:
    """``array``, on a mesh with explicit axes sharded as ``other`` is."""
    sharding = jax.typeof(other).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types or jax.typeof(array).sharding == sharding:
        return array
    return jax.sharding.reshard(array, sharding)


def manual_axes(aval: Any) -> tuple[str, ...]:
    if hasattr(aval, "vma"):  # jax < 0.10
        return tuple(sorted(aval.vma or ()))
    return tuple(sorted(getattr(getattr(aval, "manual_axis_type", None), "varying", None) or ()))


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Executes one equation as it stands."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def is_remat(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in REMAT


REMAT = ("checkpoint", "remat", "remat2")

# Primitives that only call another program, and the parameter that holds it. Once differentiated, custom rules have
# done their work, so what is left of them is a call.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": None,
}


def called(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The program a call-like equation stands for, or None if it is not one."""
    if is_remat(eqn):
        return _closed(eqn.params["jaxpr"])
    name = _CALLS.get(eqn.primitive.name)
    if name is None or name not in eqn.params or _places_shardings(eqn):
        return None
    return _closed(eqn.params[name])


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _places_shardings(eqn: JaxprEqn) -> bool:
    """A jit with in_shardings or out_shardings is more than a call."""
    places = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    return any(isinstance(place, jax.sharding.Sharding) for place in places)
