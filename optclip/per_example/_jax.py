"""Everything that depends on the version of jax or on its intermediate language, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

__all__ = ["REMAT", "ClosedJaxpr", "Jaxpr", "JaxprEqn", "Literal", "Var", "bind", "called", "drop_leading", "is_remat"]


def drop_leading(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of one row of ``x``."""
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


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
