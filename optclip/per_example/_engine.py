"""The two passes.

First pass: the gradient of one example is traced, and run under ``vmap`` with gradients left as factors; what comes
out is, per parameter leaf, the squared norm and whatever its weighted sum will need. Between the passes the norms
become coefficients. Second pass: one contraction over examples and positions per leaf, and a second run of checkpoint
regions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip.per_example._again import rerun
from optclip.per_example._batch import Lifted, contract, run_batched
from optclip.per_example._block import Block, flatten
from optclip.per_example._front import Call
from optclip.per_example._jax import bind
from optclip.per_example._limits import Weights
from optclip.per_example._norms import Cost
from optclip.per_example._regions import Again, Regions, measure
from optclip.per_example._terms import Factored, Rerun

__all__ = ["clip", "measure_norms", "price"]


class _First(NamedTuple):
    losses: jax.Array
    aux: Any
    squares: list[jax.Array]
    leaves: list[Any]  # Factored or Rerun
    again: list[Again]
    label: int
    costs: list[Cost]


def measure_norms(call: Call, examples: list[jax.Array]) -> tuple[jax.Array, Any, list[jax.Array]]:
    """Losses [B], aux [B, ...] and, per parameter leaf, the squared norm [B] of each example's gradient."""
    first = _first_pass(call, examples, norms_only=True)
    return first.losses, first.aux, first.squares


def clip(
    call: Call,
    examples: list[jax.Array],
    weigh: Callable[[jax.Array, list[jax.Array]], Weights],
    group: list[int],
) -> tuple[jax.Array, Any, Weights, list[jax.Array]]:
    """Losses, aux, weights, and per leaf the sum over examples of factor times gradient (float32 or wider)."""
    first = _first_pass(call, examples, norms_only=False)
    weights = weigh(first.losses, first.squares)
    coefs = [weights.factors[g] for g in group]
    sums: list[Any] = [None] * len(first.leaves)
    for i, leaf in enumerate(first.leaves):
        if isinstance(leaf, Factored):
            sums[i] = contract(leaf, first.label, coefs[i], weights.keep)
    for number, again in enumerate(first.again):
        mine = [i for i, leaf in enumerate(first.leaves) if isinstance(leaf, Rerun) and leaf.region == number]
        found = rerun(again, {first.leaves[i].output: coefs[i] for i in mine}, weights.keep)
        for i in mine:
            sums[i] = _replay(first.leaves[i], found[first.leaves[i].output])
    return first.losses, first.aux, weights, sums


def _replay(leaf: Rerun, array: jax.Array) -> jax.Array:
    for eqn in leaf.replay:
        if eqn.primitive.name != "convert_element_type":  # sums stay wide until the end
            (array,) = bind(eqn, [array])
    return array


def _first_pass(call: Call, examples: list[jax.Array], norms_only: bool) -> _First:
    gradient = jax.value_and_grad(call.loss, has_aux=True)
    program, shapes = jax.make_jaxpr(gradient, return_shape=True)(call.params, call.example_types())
    program = flatten(program, unfold_remat=False)
    outputs, leaves = len(program.jaxpr.outvars), len(call.params)
    block = Block(program, range(outputs - leaves, outputs))
    again: list[Again] = []
    costs: list[Cost] = []
    regions = Regions(norms_only, again)

    def finish(out: list[Any]) -> list[Any]:
        measured = [measure(leaf) for leaf in out[outputs - leaves :]]
        costs[:] = [_named(cost, block, outputs - leaves + i) for i, (*_, cost) in enumerate(measured)]
        kept = [] if norms_only else [leaf for _, leaf, _ in measured]
        flat_values = [v for region in again for v in region.values]
        for region in again:
            region.values = [None] * len(region.values)  # what belongs to one example may not outlive it
        reruns[:] = [dataclasses.replace(leaf, square=None) if isinstance(leaf, Rerun) else None for leaf in kept]
        kept = [Factored((), (), jnp.float32) if isinstance(leaf, Rerun) else leaf for leaf in kept]
        return [*out[: outputs - leaves], *(square for square, *_ in measured), *kept, *flat_values]

    reruns: list[Rerun | None] = []
    inputs = [Lifted(p, False) for p in call.params] + [Lifted(x, True) for x in examples]
    got, label = run_batched(block, inputs, regions.rules, finish)
    size = examples[0].shape[0]
    results = [_rows(v, size) for v in got[: outputs - leaves]]
    (losses, aux), _ = jax.tree.unflatten(jax.tree.structure(shapes), [*results, *range(leaves)])
    got = got[outputs - leaves :]
    squares, got = [_rows(v, size) for v in got[:leaves]], got[leaves:]
    kept, got = [r or v for r, v in zip(reruns, got, strict=False)], got[len(reruns) :]
    for region in again:
        region.values, got = got[: len(region.values)], got[len(region.values) :]
    return _First(losses, aux, squares, kept, again, label, costs)


def _named(cost: Cost, block: Block, output: int) -> Cost:
    """An unrecognised gradient is named by the primitive that made it."""
    return cost._replace(rule=f"{cost.rule} ({block.maker(output)})") if cost.rule == "as it stands" else cost


def price(call: Call, norms_only: bool) -> list[Cost]:
    """Per parameter leaf, for one example, how its norm is found. Traces the first pass without running it."""
    costs: list[Cost] = []
    jax.eval_shape(lambda examples: costs.extend(_first_pass(call, examples, norms_only).costs), call.examples)
    return costs


def _rows(value: Lifted, size: int) -> jax.Array:
    return value.array if value.stacked else jnp.broadcast_to(value.array, (size, *jnp.shape(value.array)))
