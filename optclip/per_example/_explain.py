"""`explain`: which rule every leaf got and what it costs. `check`: whether the loss may be taken apart at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip.per_example import _engine, _reference
from optclip.per_example._front import Call, Signature, prepare
from optclip.per_example._terms import wide

__all__ = ["Checked", "Explained", "LeafCost", "check", "explain"]


class LeafCost(NamedTuple):
    leaf: str  # key path
    shape: tuple[int, ...]
    rule: str
    flops: int  # of the norm, whole batch
    bytes: int  # kept from the first pass to the second, whole batch
    materialized_bytes: int  # what vmap(grad) would hold for this leaf


class Explained(NamedTuple):
    """A row per parameter leaf; prints as a table."""

    rows: tuple[LeafCost, ...]

    def __str__(self) -> str:
        head = ("leaf", "shape", "rule", "Mflop", "MiB kept", "MiB vmap(grad)")
        lines = [head] + [
            (r.leaf, "x".join(map(str, r.shape)) or "scalar", r.rule, *(f"{n:.2f}" for n in _in_millions(r)))
            for r in (*self.rows, self.total)
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = []
        for line in lines:
            cells = [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            text.append("  ".join(cells).rstrip())
        return "\n".join(text)

    @property
    def total(self) -> LeafCost:
        sums = (sum(column) for column in zip(*(row[3:] for row in self.rows), strict=True))
        return LeafCost("total", (sum(math.prod(row.shape) for row in self.rows),), "", *sums)


def _in_millions(row: LeafCost) -> tuple[float, float, float]:
    return row.flops / 1e6, row.bytes / 2**20, row.materialized_bytes / 2**20


def explain(
    loss_fn: Callable,
    *,
    norms_only: bool = False,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    key_argnums: int | Sequence[int] = (),
    has_aux: bool = False,
    keep_batch_dim: bool = True,
) -> Callable[..., Explained]:
    """A table of how the gradient of each parameter leaf is measured, and at what cost. Nothing is computed.

    The rules:

    * ``outer``: one position; the norm of an outer product is the product of two norms
    * ``gram``: products between positions, no gradient is formed
    * ``direct``: the gradient is no larger than what it is a product of, so it is formed and kept instead
    * ``one-hot``: rows of a table, found by comparing ids
    * ``joint``: a parameter used more than once; all cross terms
    * ``..., in a loop``: measured inside a checkpoint region's loop, which runs a second time for the gradient
    * ``as it stands (primitive)``: not recognised; the gradient is formed per example. Usual, and cheap, for biases
    and scales; for a
      large leaf it is the thing to look at. Exact all the same.
    * ``zero``: the loss does not depend on the leaf

    Args: ``norms_only`` asks about `value_and_norms` instead; the others as in `clipped_value_and_grad`.

    Returns: ``f(*args, **kwargs) -> Explained``.

    >>> import jax.numpy as jnp
    >>> def loss_fn(params, x):
    ...     return jnp.mean((x @ params["w"] + params["b"]) ** 2)
    >>> print(explain(loss_fn)({"b": jnp.zeros(256), "w": jnp.zeros((512, 256))}, jnp.ones((32, 512))))
    leaf   shape    rule                       Mflop  MiB kept  MiB vmap(grad)
    ['b']  256      as it stands (reduce_sum)   0.02      0.03            0.03
    ['w']  512x256  outer                       0.05      0.09           16.00
    total  131328                               0.07      0.12           16.03
    """
    signature = Signature(argnums, batch_argnums, key_argnums, has_aux, keep_batch_dim)

    def f(*args: Any, **kwargs: Any) -> Explained:
        call = prepare("explain", loss_fn, signature, args, kwargs)
        rows = []
        for name, param, cost in zip(call.names, call.params, _engine.price(call, norms_only), strict=True):
            size = call.size * param.dtype.itemsize
            kept = 0 if norms_only else cost.numbers * size
            rows.append(LeafCost(name, param.shape, cost.rule, cost.flops * call.size, kept, param.size * size))
        return Explained(tuple(rows))

    return f


class Checked(NamedTuple):
    """What `check` found; errors are relative."""

    reduction: str  # "mean" or "sum": how the loss function reduces over its batch
    loss_error: float  # the batch loss against the reduced losses of the examples
    grad_error: float  # likewise of the gradient
    norm_error: float  # norms against vmap(grad), on at most four examples


def check(
    loss_fn: Callable,
    *,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    tolerance: float = 1e-3,
) -> Callable[..., Checked]:
    """Whether the loss of a batch is the mean, or the sum, of the losses of its examples. Run it once, before training.

    Per-example clipping sees one example at a time. A loss that couples examples (batch normalisation in training
    mode, contrastive losses, in-batch negatives, a division by the number of tokens in the batch) is a different
    function then. Randomness that differs between examples couples them too: switch dropout off for this.

    Returns: ``f(*args, **kwargs) -> Checked``, for at least two examples, with the batch axis kept
    (``keep_batch_dim``).

    Raises: ValueError if examples are coupled, or if norms disagree with ``vmap(grad)`` by more than ``tolerance``
    (relative; loosen it for bfloat16).

    >>> import jax.numpy as jnp
    >>> checked = check(lambda w, x: jnp.sum((x @ w) ** 2))(jnp.ones(3), jnp.eye(3))
    >>> checked.reduction
    'sum'
    """
    signature = Signature(argnums, batch_argnums, (), has_aux, True)

    def f(*args: Any, **kwargs: Any) -> Checked:
        call = prepare("check", loss_fn, signature, args, kwargs)
        if call.size < 2:
            raise ValueError("check: needs at least two examples to see whether they are coupled")
        loss, grads = _whole_batch(loss_fn, call, signature, args, kwargs)
        losses, means = _one_by_one(call)
        found = []
        for reduction, factor in (("mean", 1), ("sum", call.size)):
            loss_error = _relative([loss], [jnp.mean(losses) * factor])
            found.append((reduction, loss_error, _relative(grads, [m * factor for m in means])))
        fits = lambda row: row[1] <= tolerance and row[2] <= tolerance  # NaN does not fit
        reduction, loss_error, grad_error = next((row for row in found if fits(row)), found[0])
        if not fits((reduction, loss_error, grad_error)):
            raise ValueError(
                "check: the loss couples examples: on the whole batch it is neither the mean nor the sum of the losses "
                f"of its examples (relative difference from the mean: loss {loss_error:.1e}, gradient "
                f"{grad_error:.1e}). Usual reasons: batch normalisation in training mode, contrastive losses, a "
                "division by a count over the batch, dropout"
            )
        few = [x[:4] for x in call.examples]
        norm_error = _relative(_engine.measure_norms(call, few)[2], _reference.measure_norms(call, few)[2])
        if not norm_error <= tolerance:
            raise ValueError(f"check: norms differ from those of vmap(grad) by {norm_error:.1e} (relative)")
        return Checked(reduction, loss_error, grad_error, norm_error)

    return f


def _whole_batch(
    loss_fn: Callable, call: Call, signature: Signature, args: tuple, kwargs: dict
) -> tuple[jax.Array, list[jax.Array]]:
    numbers = [signature.argnums] if isinstance(signature.argnums, int) else list(signature.argnums)
    numbers = tuple(i % len(args) for i in numbers)
    value, grads = jax.value_and_grad(loss_fn, argnums=numbers, has_aux=signature.has_aux)(*args, **kwargs)
    return (value[0] if signature.has_aux else value), jax.tree.leaves(grads)


def _one_by_one(call: Call) -> tuple[jax.Array, list[jax.Array]]:
    """Losses [B] and mean gradient, in constant memory."""
    gradient = jax.value_and_grad(call.loss, has_aux=True)

    def step(total: list[jax.Array], example: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        (loss, _), grads = gradient(call.params, example)
        return [t + g for t, g in zip(total, grads, strict=True)], loss

    total, losses = jax.lax.scan(step, [jnp.zeros_like(p) for p in call.params], call.examples)
    return losses, [t / call.size for t in total]


def _relative(got: Sequence[jax.Array], wanted: Sequence[jax.Array]) -> float:
    def norm(arrays: Sequence[jax.Array]) -> jax.Array:
        return jnp.sqrt(sum(jnp.sum(jnp.square(a.astype(wide(a.dtype)))) for a in arrays))

    scale = jnp.maximum(norm(got), norm(wanted))
    difference = norm([a - b for a, b in zip(got, wanted, strict=True)])
    return float(jnp.where(difference == 0, 0, difference / jnp.where(scale > 0, scale, 1)))
