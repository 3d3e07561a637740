"""Control flow: programs inside equations. Their gradients are found inside, and either carried out or found again.

*Carried out* (book-keeping): the factors leave a loop with the loop axis as one more label, an index for a stack of
layers, a summed label for a weight that all steps share. No second backward pass, at the memory of the cotangents.

*Found again*: only the squared norm leaves. When the coefficients are known the region runs a second time and sums over
the examples inside. That is for checkpoint regions, whose whole point is not to hold their activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optclip.per_example._batch import Lifted, as_factored, pack, read_output
from optclip.per_example._block import Block, Region, barrier, evaluate, flatten
from optclip.per_example._jax import REMAT, ClosedJaxpr, JaxprEqn, Var, called, is_remat, zeros
from optclip.per_example._norms import Cost, densify, is_direct, squared_norm
from optclip.per_example._terms import Axis, Dense, Factored, Rerun, Term, dense, materialize, new_label

__all__ = ["Again", "Regions", "Scan", "measure"]


class Scan:
    """A scan equation taken apart. ``sums`` are carries that are only added to and that are gradients."""

    def __init__(self, eqn: JaxprEqn, wanted: Sequence[int]) -> None:
        p = eqn.params
        self.length, self.reverse, self.unroll = p["length"], p["reverse"], p["unroll"]
        program = flatten(p["jaxpr"], unfold_remat=True)
        self.consts, self.carries = _counts(eqn, program)
        plain = Block(program, ())
        self.sums = [i for i in wanted if i < self.carries and _only_added_to(plain, self.consts + i, i)]
        self.stacks = [i for i in wanted if i >= self.carries]
        self.block = Block(program, [*self.sums, *self.stacks])
        self.moving = [i for i in range(self.carries) if i not in self.sums]

    def split(self, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        end = self.consts + self.carries
        return list(values[: self.consts]), list(values[self.consts : end]), list(values[end:])

    def carry_in(self, moving: Sequence[Any]) -> list[Any]:
        """The values of all carries in the body: a sum starts as nothing."""
        by_index = dict(zip(self.moving, moving, strict=True))
        avals = [v.aval for v in self.block.jaxpr.invars[self.consts : self.consts + self.carries]]
        return [by_index.get(i, Factored((), a.shape, a.dtype)) for i, a in enumerate(avals)]


def _counts(eqn: JaxprEqn, body: ClosedJaxpr) -> tuple[int, int]:
    """Numbers of constants and carries: what is not scanned has the same rank inside and outside.

    There are parameters that say so, but they vary with the version of jax.
    """
    same = lambda outer, inner: sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outer, inner, strict=True))
    carries = same(eqn.outvars, body.jaxpr.outvars)
    return same(eqn.invars, body.jaxpr.invars) - carries, carries


def _only_added_to(block: Block, invar: int, output: int) -> bool:
    v = block.jaxpr.invars[invar]
    while True:
        uses = block.uses.get(v, [])
        if len(uses) != 1:
            return False
        if isinstance(uses[0], int):
            return uses[0] == output
        if uses[0].primitive.name not in ("add", "add_any"):
            return False
        v = uses[0].outvars[0]


@dataclasses.dataclass
class Again:
    """A region to run again: its equation, taken apart, and its inputs, `Lifted` once the first pass is over."""

    eqn: JaxprEqn
    body: Any  # Scan, or Block for a checkpoint region
    values: list[Any]


class Regions:
    """The rules for regions in the first pass (under ``vmap``).

    ``norms_only``: nobody will ask for the sum, so the norm is all that ever leaves. ``again`` collects, at the top
    level, the regions that must run a second time; nested regions carry their factors out.
    """

    def __init__(self, norms_only: bool, again: list[Again] | None) -> None:
        self.norms_only = norms_only
        self.again = again

    @property
    def rules(self) -> dict[str, Region]:
        return {"scan": self.scan, "cond": self.cond, **dict.fromkeys(REMAT, self.remat)}

    def nested(self, to_be_measured: bool) -> dict[str, Region]:
        """The rules inside. Mere norms leave those regions only where all that leaves this one is measured at once."""
        return Regions(self.norms_only and to_be_measured, None).rules

    def _norm_leaves(self, block: Block, eqn: JaxprEqn, i: int, has_remat: bool) -> bool:
        again = self.norms_only or (has_remat and self.again is not None)
        return again and eqn.outvars[i] in block.sole

    def _register(self, eqn: JaxprEqn, body: Any, values: list[Any]) -> int:
        if self.norms_only or self.again is None:
            return -1
        self.again.append(Again(eqn, body, values))
        return len(self.again) - 1

    def remat(self, block: Block, eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
        wanted = _wanted(block, eqn)
        program: Any = called(eqn)
        body = Block(flatten(program, unfold_remat=True), wanted)
        env = dict(zip(body.jaxpr.constvars, body.program.consts, strict=True))
        env.update(zip(body.jaxpr.invars, barrier(eqn, values), strict=True))
        again = [i for i in wanted if self._norm_leaves(block, eqn, i, True)]
        evaluate(body, body.live, env, self.nested(again == wanted))
        out = [read_output(body, env, i) for i in range(len(eqn.outvars))]
        number = self._register(eqn, body, values) if again else -1
        for i in again:
            square, _, cost = measure(out[i])
            out[i] = Rerun(square, number, i, cost)
        return out

    def cond(self, block: Block, eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
        """One conditional per branch, with zeros as the other arm: terms of different branches need not look alike."""
        wanted = _wanted(block, eqn)
        index, *operands = values
        plain = [i for i in range(len(eqn.outvars)) if i not in wanted]
        result: list[Any] = [None] * len(eqn.outvars)
        terms: dict[int, tuple[Term, ...]] = {i: () for i in wanted}
        for k, branch in enumerate(eqn.params["branches"]):
            body = Block(flatten(branch, unfold_remat=True), wanted)
            unpack: list[Any] = []

            def arm(operands: list[Any], body: Block = body, unpack: list[Any] = unpack) -> tuple[list[Any], list[Any]]:
                env = dict(zip(body.jaxpr.constvars, body.program.consts, strict=True))
                env.update(zip(body.jaxpr.invars, operands, strict=True))
                evaluate(body, body.live, env, self.nested(False))
                out = [read_output(body, env, i) for i in range(len(eqn.outvars))]
                # Every factor crosses, and so is zero in the other arm: zero times something infinite would not be.
                crossing, back = pack([_leaving(out[i], True) for i in wanted], {})
                unpack.append(back)
                return [materialize(out[i]) for i in plain], crossing

            shapes = jax.eval_shape(arm, operands)
            nothing = lambda _, shapes=shapes: jax.tree.map(zeros, shapes)
            others, arrays = jax.lax.cond(index == k, arm, nothing, operands)
            for i, value in zip(wanted, unpack[-1](arrays, None), strict=True):
                terms[i] += value.terms
            for i, value in zip(plain, others, strict=True):
                result[i] = value if k == 0 else jax.lax.select_n(index == k, result[i], value)
        for i in wanted:
            result[i] = Factored(terms[i], eqn.outvars[i].aval.shape, eqn.outvars[i].aval.dtype)
        return result

    def scan(self, block: Block, eqn: JaxprEqn, values: list[Any]) -> list[Any] | None:
        wanted = _wanted(block, eqn)
        body = Scan(eqn, wanted)
        has_remat = _contains_remat(eqn)
        norms = [i for i in body.stacks if self._norm_leaves(block, eqn, i, has_remat)]
        carried = [i for i in (*body.sums, *body.stacks) if i not in norms]
        plain = [i for i in range(body.carries, len(eqn.outvars)) if i not in body.stacks]
        consts, init, xs = body.split(values)
        costs: dict[int, Cost] = {}
        unpack: list[Any] = []

        def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], Any]:
            env = dict(zip(body.block.jaxpr.constvars, body.block.program.consts, strict=True))
            env.update(zip(body.block.jaxpr.invars, [*consts, *body.carry_in(carry), *x], strict=True))
            evaluate(body.block, body.block.live, env, self.nested(not carried))
            out = [read_output(body.block, env, i) for i in range(len(eqn.outvars))]
            squares = []
            for i in norms:
                square, _, costs[i] = measure(out[i])
                squares.append(square)
            outside = {id(c): Lifted(c, False) for c in (*consts, *body.block.program.consts)}
            outside.update({id(a): Lifted(b, True) for a, b in zip(x, xs, strict=True)})
            crossing, back = pack([_leaving(out[i], i in body.stacks) for i in carried], outside)
            unpack.append(back)
            moving = [materialize(out[i]) for i in body.moving]
            return moving, ([materialize(out[i]) for i in plain], squares, crossing)

        moving, (ys, squares, arrays) = jax.lax.scan(
            step, [init[i] for i in body.moving], xs, body.length, body.reverse, body.unroll
        )
        label = new_label()
        result: dict[int, Any] = dict(zip(body.moving, moving, strict=True)) | dict(zip(plain, ys, strict=True))
        number = self._register(eqn, body, values) if norms else -1
        for i, square in zip(norms, squares, strict=True):
            cost = Cost(f"{costs[i].rule}, in a loop", costs[i].flops * body.length, 0)
            result[i] = Rerun(jnp.sum(square), number, i, cost)
        for i, value in zip(carried, unpack[-1](arrays, label), strict=True):
            aval = eqn.outvars[i].aval
            terms = [_with_loop(t, label, body.length, i in body.stacks) for t in value.terms]
            if i in body.sums and not _is_zero(block, eqn.invars[body.consts + i]):
                terms += dense(init[i]).terms
            result[i] = Factored(tuple(terms), aval.shape, aval.dtype)
        return [result[i] for i in range(len(eqn.outvars))]


def measure(value: Any) -> tuple[jax.Array, Any, Cost]:
    if isinstance(value, Rerun):
        return value.square, value, value.rule
    return squared_norm(as_factored(value))


def _wanted(block: Block, eqn: JaxprEqn) -> list[int]:
    return [i for i, v in enumerate(eqn.outvars) if v in block.bound]


def _is_zero(block: Block, v: Any) -> bool:
    return isinstance(v, Var) and v in block.zeros


def _contains_remat(eqn: JaxprEqn) -> bool:
    return any(is_remat(e) or _contains_remat(e) for p in jax.tree.leaves(eqn.params) for e in _eqns(p))


def _eqns(param: Any) -> list[JaxprEqn]:
    return list(getattr(getattr(param, "jaxpr", param), "eqns", ()))


def _leaving(value: Any, stacked: bool) -> Factored:
    """What goes out of a region. Layers of a stack are independent: where a gradient is small it goes instead."""
    value = as_factored(value)
    return densify(value) if stacked and value.terms and is_direct(value) else value


def _with_loop(term: Term, label: int, length: int, stacked: bool) -> Term:
    factors = term.factors
    if not any(label in f.labels for f in factors):
        factors = (*factors, Dense(jnp.ones(length, jnp.float32), (label,)))
    axes = (Axis((label,)), *term.axes) if stacked else term.axes
    return dataclasses.replace(term, factors=factors, axes=axes)
