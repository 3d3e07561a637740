"""Clipping before the mean: every example's gradient bounded by itself, at close to the price of an ordinary gradient.

    (loss, per_example), grads = clipped_value_and_grad(loss_fn, max_norm=1.0)(params, batch)
    losses, norms = value_and_norms(loss_fn)(params, batch)

    print(explain(loss_fn)(params, batch))        # which rule each parameter got, and what it costs
    check(loss_fn)(params, batch)                 # raises if the loss couples examples

``loss_fn`` is any function that ``jax.grad`` accepts, from any framework, unchanged. `clipped_value_and_grad` stands in
for ``jax.value_and_grad(loss_fn, has_aux=True)``; its second output `PerExample` holds losses, norms, coefficients.

* rules, ``(norm, limit) -> coefficient``: `hard`, `normalize`, ``automatic(gamma)``, ``psac(r)``
* limits: a float, a traced scalar (from a schedule or from optimizer state), or a prefix tree of them, one per group
* an adaptive limit: ``adapt_limit(limit, unclipped_fraction(per_example))`` from one step to the next
* for private training: `add_gaussian_noise` as an Optax transformation, `split_budget` for a limit per layer

No privacy accounting is done or promised here: this package bounds the sensitivity of the sum; noise, sampling and the
(epsilon, delta) that follows from them are the caller's (for instance with the dp_accounting library).
"""

from optclip.per_example._clipping import PerExample, clipped_value_and_grad, unclipped_fraction, value_and_norms
from optclip.per_example._explain import Checked, Explained, LeafCost, check, explain
from optclip.per_example._noise import (
    GaussianNoiseState,
    adapt_limit,
    add_gaussian_noise,
    split_budget,
    split_budget_by_size,
)
from optclip.per_example._rules import automatic, hard, normalize, psac

__all__ = [
    "Checked",
    "Explained",
    "GaussianNoiseState",
    "LeafCost",
    "PerExample",
    "adapt_limit",
    "add_gaussian_noise",
    "automatic",
    "check",
    "clipped_value_and_grad",
    "explain",
    "hard",
    "normalize",
    "psac",
    "split_budget",
    "split_budget_by_size",
    "unclipped_fraction",
    "value_and_norms",
]
