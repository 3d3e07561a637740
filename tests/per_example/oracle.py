"""What must come out, by definition: ``vmap(grad)``, norms, coefficients, mean."""

import jax
import jax.numpy as jnp
import numpy as np


def per_example_gradients(loss, params, batch):
    one = lambda example: jax.value_and_grad(loss)(params, jax.tree.map(lambda x: x[None], example))
    return jax.vmap(one)(batch)


def norms_of(grads):
    squares = [jnp.sum(jnp.square(g), axis=range(1, g.ndim)) for g in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(squares))


def clipped_mean(grads, limit):
    coefs = jnp.minimum(1, limit / norms_of(grads))
    return jax.tree.map(lambda g: jnp.tensordot(coefs, g, 1) / coefs.shape[0], grads)


def distance(got, wanted):
    """Of two trees, relative to the second."""
    got, wanted = jax.tree.leaves(got), jax.tree.leaves(wanted)
    assert [g.shape for g in got] == [w.shape for w in wanted]
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in tree))
    difference = norm([np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in zip(got, wanted, strict=True)])
    return difference / max(norm(wanted), 1e-300)
