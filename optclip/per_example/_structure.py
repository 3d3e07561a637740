"""Structural operations: linear, they move the numbers of a gradient about. On a term they only move labels.

Each rule takes the equation and its inputs (at least one of them `Factored`) and returns the outputs, or None to
decline: then the inputs are materialised and the equation is executed as it stands.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from optclip.per_example._jax import JaxprEqn, Literal
from optclip.per_example._labels import along, cut, regroup, scale
from optclip.per_example._terms import Axis, Factored, Term, dense

__all__ = ["NORM_PRESERVING", "STRUCTURE"]

Outputs = list[Any] | None


def _each(value: Factored, eqn: JaxprEqn, rule: Callable[[Term], Term | None]) -> Outputs:
    terms = [rule(term) for term in value.terms]
    if any(term is None for term in terms):
        return None
    out = eqn.outvars[0].aval
    return [Factored(tuple(terms), out.shape, out.dtype)]  # type: ignore[arg-type]


def _transpose(eqn: JaxprEqn, value: Factored) -> Outputs:
    order = eqn.params["permutation"]
    return _each(value, eqn, lambda t: dataclasses.replace(t, axes=tuple(t.axes[i] for i in order)))


def _same(eqn: JaxprEqn, value: Factored) -> Outputs:
    return _each(value, eqn, lambda t: t)


def _convert(eqn: JaxprEqn, value: Factored) -> Outputs:
    return _same(eqn, value) if jnp.issubdtype(eqn.params["new_dtype"], jnp.floating) else None


def _reshape(eqn: JaxprEqn, value: Factored) -> Outputs:
    if eqn.params.get("dimensions") is not None:
        return None
    return _each(value, eqn, lambda t: regroup(t, eqn.outvars[0].aval.shape))


def _broadcast_in_dim(eqn: JaxprEqn, value: Any, *dynamic: Any) -> Outputs:
    """Only where it inserts axes of size one."""
    shape = eqn.outvars[0].aval.shape
    if dynamic or math.prod(shape) != math.prod(value.shape):
        return None
    return _each(value, eqn, lambda t: regroup(t, shape))


def _neg(eqn: JaxprEqn, value: Factored) -> Outputs:
    return _each(value, eqn, lambda t: scale(t, -1))


def _mul(eqn: JaxprEqn, a: Any, b: Any) -> Outputs:
    if isinstance(a, Factored) and isinstance(b, Factored):
        return None
    value, other = (a, b) if isinstance(a, Factored) else (b, a)
    return _each(value, eqn, lambda t: scale(t, other)) if jnp.ndim(other) == 0 else None


def _div(eqn: JaxprEqn, a: Any, b: Any) -> Outputs:
    if isinstance(b, Factored) or jnp.ndim(b) != 0:
        return None
    return _each(a, eqn, lambda t: scale(t, 1 / b))


def _add(eqn: JaxprEqn, a: Any, b: Any) -> Outputs:
    out = eqn.outvars[0].aval
    parts = [x if isinstance(x, Factored) else dense(x) for x in (a, b)]
    if any(part.shape != out.shape for part in parts):
        return None
    return [Factored((*parts[0].terms, *parts[1].terms), out.shape, out.dtype)]


def _sub(eqn: JaxprEqn, a: Any, b: Any) -> Outputs:
    if not isinstance(b, Factored):
        return _add(eqn, a, -b)
    minus = Factored(tuple(scale(t, -1) for t in b.terms), b.shape, b.dtype)
    return _add(eqn, a, minus)


def _reduce_sum(eqn: JaxprEqn, value: Factored) -> Outputs:
    """The labels of a summed axis stop being indices: they join the other summed ones."""
    gone = eqn.params["axes"]

    def rule(term: Term) -> Term:
        return dataclasses.replace(term, axes=tuple(a for i, a in enumerate(term.axes) if i not in gone))

    return _each(value, eqn, rule)


def _slice(eqn: JaxprEqn, value: Factored) -> Outputs:
    p = eqn.params
    strides = p["strides"] or (1,) * len(value.shape)
    return _each(value, eqn, lambda t: cut(t, p["start_indices"], p["limit_indices"], strides))


def _split(eqn: JaxprEqn, value: Factored) -> Outputs:
    axis, outputs, start = eqn.params["axis"], [], 0
    for var, size in zip(eqn.outvars, eqn.params["sizes"], strict=True):
        lo, hi = [0] * len(value.shape), list(value.shape)
        lo[axis], hi[axis] = start, start + size
        start += size
        terms = [cut(t, lo, hi, [1] * len(lo)) for t in value.terms]
        if any(t is None for t in terms):
            return None
        outputs.append(Factored(tuple(terms), var.aval.shape, var.aval.dtype))  # type: ignore[arg-type]
    return outputs


def _rev(eqn: JaxprEqn, value: Factored) -> Outputs:
    """Turning an axis around turns the factors that hold its one label."""

    def rule(term: Term) -> Term | None:
        for i in eqn.params["dimensions"]:
            axis = term.axes[i]
            if axis.placed or len(axis.labels) > 1:
                return None
            flipped = along(term, axis.labels[0], jnp.flip) if axis.labels else term
            if flipped is None:
                return None
            term = flipped
        return term

    return _each(value, eqn, rule)


def _pad(eqn: JaxprEqn, value: Factored, _: Any) -> Outputs:
    """Zeros around a gradient are its place in a larger one. Needs a literal zero, no negative and no inner padding."""
    config, padding = eqn.params["padding_config"], eqn.invars[1]
    if not (isinstance(padding, Literal) and padding.val == 0) or any(
        lo < 0 or hi < 0 or inner for lo, hi, inner in config
    ):
        return None

    def rule(term: Term) -> Term:
        axes = []
        for a, (lo, hi, _) in zip(term.axes, config, strict=True):
            axes.append(Axis(a.labels, a.before + int(lo), a.after + int(hi)))
        return dataclasses.replace(term, axes=tuple(axes))

    return _each(value, eqn, rule)


def _concatenate(eqn: JaxprEqn, *values: Any) -> Outputs:
    """Gradients side by side: a sum of gradients, each in its place."""
    axis, out, terms, start = eqn.params["dimension"], eqn.outvars[0].aval, [], 0
    for value in values:
        size = value.shape[axis]
        for term in (value if isinstance(value, Factored) else dense(value)).terms:
            old = term.axes[axis]
            new = Axis(old.labels, old.before + start, old.after + out.shape[axis] - start - size)
            terms.append(dataclasses.replace(term, axes=(*term.axes[:axis], new, *term.axes[axis + 1 :])))
        start += size
    return [Factored(tuple(terms), out.shape, out.dtype)]


# Primitive -> rule. `NORM_PRESERVING` holds those that change no number (or only signs and dtype).
STRUCTURE: dict[str, Callable[..., Outputs]] = {
    "add": _add,
    "add_any": _add,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    "div": _div,
    "mul": _mul,
    "neg": _neg,
    "pad": _pad,
    "reduce_sum": _reduce_sum,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "sub": _sub,
    "transpose": _transpose,
}
NORM_PRESERVING = {"convert_element_type", "copy", "copy_p", "neg", "reshape", "rev", "squeeze", "transpose"}
