"""A program in straight lines, what in it is a gradient and nothing else, and its execution.

`flatten` unfolds calls. `Block` finds the *bound* variables: those whose every use leads, through structural
operations, to an output named as a gradient. An equation with a bound result is offered to the rules; every other
equation, and every equation that the rules decline, is executed as it stands. Recognising is therefore never a matter
of correctness.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from optclip.per_example._gradients import GRADIENTS
from optclip.per_example._jax import ClosedJaxpr, JaxprEqn, Literal, Var, bind, called, is_remat
from optclip.per_example._structure import NORM_PRESERVING, STRUCTURE
from optclip.per_example._terms import Factored, Rerun, materialize

__all__ = ["Block", "evaluate", "flatten"]


def flatten(program: ClosedJaxpr, unfold_remat: bool, avals: Sequence[Any] | None = None) -> ClosedJaxpr:
    """The same program without calls; with ``unfold_remat`` also without checkpoint regions."""
    avals = [v.aval for v in program.jaxpr.invars] if avals is None else avals
    return jax.make_jaxpr(lambda *args: _unfold(program, args, unfold_remat))(*avals)


def _unfold(program: ClosedJaxpr, args: Sequence[Any], unfold_remat: bool) -> list[Any]:
    env: dict[Var, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    env.update(zip(program.jaxpr.invars, args, strict=True))
    for eqn in program.jaxpr.eqns:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        inner = called(eqn)
        if inner is None or (is_remat(eqn) and not unfold_remat):
            out = bind(eqn, values)
        else:
            out = _unfold(inner, barrier(eqn, values), unfold_remat)
        env.update(zip(eqn.outvars, out, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in program.jaxpr.outvars]


def barrier(eqn: JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    """What a checkpoint region does when it is compiled: keeps its recomputation apart from the first computation."""
    if is_remat(eqn) and eqn.params["differentiated"] and eqn.params["prevent_cse"]:
        return jax.lax.optimization_barrier(list(values))
    return values


class Block:
    """A flat program and the outputs (by number) that are gradients."""

    def __init__(self, program: ClosedJaxpr, gradients: Sequence[int]) -> None:
        self.program = program
        self.jaxpr = program.jaxpr
        self.gradients = tuple(gradients)
        self.live: list[JaxprEqn] = []
        self.uses: dict[Var, list[JaxprEqn | int]] = {}
        for i, v in enumerate(self.jaxpr.outvars):
            if isinstance(v, Var):
                self.uses.setdefault(v, []).append(i)
        for eqn in reversed(self.jaxpr.eqns):
            if eqn.effects or any(v in self.uses for v in eqn.outvars):
                self.live.insert(0, eqn)
                for v in eqn.invars:
                    if isinstance(v, Var):
                        self.uses.setdefault(v, []).append(eqn)
        self.zeros: set[Var] = set()
        for eqn in self.live:
            copied = eqn.invars[0] if eqn.primitive.name in _COPIES else None
            if _makes_zeros(eqn) or (isinstance(copied, Var) and copied in self.zeros):
                self.zeros.add(eqn.outvars[0])
        self.forward = self._ancestors(v for i, v in enumerate(self.jaxpr.outvars) if i not in self.gradients)
        self.bound: set[Var] = set()
        self.sole: set[Var] = set()  # bound, to one gradient, by one use, through operations that keep the norm
        for eqn in reversed(self.live):
            for v in eqn.outvars:
                self._classify(v)

    def _ancestors(self, outputs: Iterable[Any]) -> set[Var]:
        """What the given variables are computed from. Of the loss: activations, as against cotangents."""
        found = {v for v in outputs if isinstance(v, Var)}
        for eqn in reversed(self.live):
            if any(v in found for v in eqn.outvars):
                found.update(v for v in eqn.invars if isinstance(v, Var))
        return found

    def _classify(self, v: Var) -> None:
        uses = self.uses.get(v, [])
        if uses and all(self._leads_to_gradient(v, use) for use in uses):
            self.bound.add(v)
            if len(uses) == 1 and (
                isinstance(uses[0], int)
                or (uses[0].primitive.name in NORM_PRESERVING and uses[0].outvars[0] in self.sole)
                or (_inserts_ones(uses[0]) and uses[0].outvars[0] in self.sole)
            ):
                self.sole.add(v)

    def _leads_to_gradient(self, v: Var, use: JaxprEqn | int) -> bool:
        if isinstance(use, int):
            return use in self.gradients
        if use.primitive.name not in STRUCTURE or not all(o in self.bound or o not in self.uses for o in use.outvars):
            return False
        if use.primitive.name in ("mul", "div"):
            others = [x for x in use.invars if x is not v]
            return (
                len(others) == 1 and others[0].aval.shape == () and (use.invars[0] is v or use.primitive.name == "mul")
            )
        if use.primitive.name == "broadcast_in_dim":
            return _inserts_ones(use)
        if use.primitive.name == "pad":
            return use.invars[0] is v
        return True

    def maker(self, i: int) -> str:
        """The primitive that made output ``i``, behind operations that only move numbers about."""
        makers = {v: e for e in self.live for v in e.outvars}
        eqn = makers.get(self.jaxpr.outvars[i]) if isinstance(self.jaxpr.outvars[i], Var) else None
        while eqn and eqn.primitive.name in NORM_PRESERVING and eqn.invars[0] in makers:
            eqn = makers[eqn.invars[0]]
        return eqn.primitive.name if eqn else "constant"

    def depends(self, batched: Sequence[bool]) -> set[Var]:
        """The variables that depend on the inputs marked as batched."""
        found = {v for v, flag in zip(self.jaxpr.invars, batched, strict=True) if flag}
        for eqn in self.live:
            if any(isinstance(v, Var) and v in found for v in eqn.invars):
                found.update(eqn.outvars)
        return found


_COPIES = ("convert_element_type", "copy", "pcast", "pvary")


def _makes_zeros(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != "broadcast_in_dim":
        return False
    value = eqn.invars[0]
    return isinstance(value, Literal) and getattr(value.val, "ndim", 0) == 0 and bool(value.val == 0)


def _inserts_ones(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name == "broadcast_in_dim" and eqn.outvars[0].aval.size == eqn.invars[0].aval.size


Region = Callable[[Block, JaxprEqn, list[Any]], "list[Any] | None"]


def evaluate(block: Block, eqns: Sequence[JaxprEqn], env: dict[Var, Any], regions: dict[str, Region]) -> None:
    """Runs equations, extending ``env``. Bound results may come out as `Factored` or `Rerun`."""
    for eqn in eqns:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        out = None
        if any(v in block.bound for v in eqn.outvars):
            out = _by_rule(block, eqn, values, regions)
        if out is None:
            out = bind(eqn, [materialize(v) for v in values])
        env.update(zip(eqn.outvars, out, strict=True))


def _by_rule(block: Block, eqn: JaxprEqn, values: list[Any], regions: dict[str, Region]) -> list[Any] | None:
    name = eqn.primitive.name
    if any(isinstance(v, Rerun) for v in values):
        (value,) = values
        return [Rerun(value.square, value.region, value.output, value.rule, (*value.replay, eqn))]
    # A known zero is an empty sum.
    for i, v in enumerate(eqn.invars):
        if isinstance(v, Var) and v in block.zeros and name in ("add", "add_any", "concatenate", "scatter-add"):
            values[i] = Factored((), v.aval.shape, v.aval.dtype)
    if name in regions:
        return regions[name](block, eqn, [materialize(v) for v in values])
    if name in STRUCTURE and any(isinstance(v, Factored) for v in values):
        return STRUCTURE[name](eqn, *values)
    if name in GRADIENTS:
        out = GRADIENTS[name](eqn, *values)
        return None if out is None else [_activation_first(block, eqn, out)]
    return None


def _activation_first(block: Block, eqn: JaxprEqn, value: Factored) -> Factored:
    if eqn.primitive.name != "dot_general":
        return value
    x, y = (isinstance(v, Var) and v in block.forward for v in eqn.invars[:2])
    if x or not y:
        return value
    (term,) = value.terms
    return dataclasses.replace(value, terms=(dataclasses.replace(term, factors=term.factors[::-1]),))
