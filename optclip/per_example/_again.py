"""The second run of a region of which only norms were kept: the same program, now summing over examples inside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optclip.per_example._batch import Lifted, as_factored, contract, run_batched
from optclip.per_example._block import Block
from optclip.per_example._jax import Var
from optclip.per_example._regions import Again, Regions, Scan
from optclip.per_example._terms import materialize

__all__ = ["rerun"]


def rerun(again: Again, coefs: dict[int, jax.Array], keep: jax.Array | None) -> dict[int, jax.Array]:
    """Runs a region again, for all examples, and returns the weighted sums of the outputs ``coefs`` names."""
    nested = Regions(False, None).rules
    outputs, values = list(coefs), again.values
    if isinstance(again.body, Block):
        # With the coefficients behind the same barrier the recomputation waits for them and is not merged with the
        # first.
        arrays, coefs = jax.lax.optimization_barrier(([v.array for v in values], coefs))
        values = [Lifted(a, v.stacked) for a, v in zip(arrays, values, strict=True)]
        got, label = run_batched(again.body, values, nested, lambda out: [as_factored(out[i]) for i in outputs])
        return {i: contract(v, label, coefs[i], keep) for i, v in zip(outputs, got, strict=True)}

    body: Scan = again.body
    size = next(v.array.shape[0] for v in values if v.stacked)
    consts, init, xs = body.split(values)
    flags = _moving_flags(body, [v.stacked for v in consts], [v.stacked for v in init], [v.stacked for v in xs])
    start = [_stacked(init[i], flags[i], size) for i in body.moving]
    rows = [jnp.moveaxis(v.array, 0, 1) if v.stacked else v.array for v in xs]

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        by_index = {i: Lifted(c, flags[i]) for i, c in zip(body.moving, carry, strict=True)}
        carries = [by_index.get(i, Lifted(c, False)) for i, c in enumerate(body.carry_in(carry))]
        inputs = [*consts, *carries, *(Lifted(a, v.stacked) for a, v in zip(x, xs, strict=True))]
        got, label = run_batched(
            body.block, inputs, nested,
            lambda out: [materialize(out[i]) for i in body.moving] + [as_factored(out[i]) for i in outputs],
        )  # fmt: skip
        split = len(body.moving)
        moving = [_stacked(v, flags[i], size) for v, i in zip(got[:split], body.moving, strict=True)]
        return moving, [contract(v, label, coefs[i], keep) for v, i in zip(got[split:], outputs, strict=True)]

    _, sums = jax.lax.scan(step, start, rows, body.length, body.reverse, body.unroll)
    return dict(zip(outputs, sums, strict=True))


def _moving_flags(body: Scan, consts: list[bool], init: list[bool], xs: list[bool]) -> list[bool]:
    """Which carries depend on the example, once the loop has gone round."""
    flags = [flag and i in body.moving for i, flag in enumerate(init)]
    while True:
        depends = body.block.depends([*consts, *flags, *xs])
        outs = body.block.jaxpr.outvars[: body.carries]
        new = [
            f or (i in body.moving and isinstance(v, Var) and v in depends)
            for i, (f, v) in enumerate(zip(flags, outs, strict=True))
        ]
        if new == flags:
            return flags
        flags = new


def _stacked(value: Lifted, wanted: bool, size: int) -> jax.Array:
    if wanted and not value.stacked:
        return jnp.broadcast_to(value.array, (size, *jnp.shape(value.array)))
    return value.array
