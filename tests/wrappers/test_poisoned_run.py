"""One batch in a hundred poisoned with NaN, infinity or a factor of 1e6: the run ends within noise of the clean one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optclip

STEPS, SEEDS, HELD_OUT = 300, 4, 400
POISON = np.ones(STEPS, np.float32)
POISON[[40, 140, 240]] = np.nan, np.inf, 1e6


def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return np.asarray(x[order] / 16, np.float32), y[order].astype(np.int32)


X, Y = digits()


def loss(params, x, y, factor=1.0):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return factor * optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(tx):
    """From the factors on the loss to the held-out loss of each seed, and how many steps were skipped."""

    def one(seed, factors):
        keys = jax.random.split(jax.random.key(seed), 3)
        params = {"w1": jax.random.normal(keys[0], (64, 32)) / 8, "b1": jnp.zeros(32),
                  "w2": jax.random.normal(keys[1], (32, 10)) / 6, "b2": jnp.zeros(10)}  # fmt: skip
        batches = jax.random.randint(keys[2], (STEPS, 32), HELD_OUT, len(X))

        def step(carry, batch):
            params, state = carry
            rows, factor = batch
            grads = jax.grad(loss)(params, jnp.asarray(X)[rows], jnp.asarray(Y)[rows], factor)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), (batches, factors))
        return loss(params, X[:HELD_OUT], Y[:HELD_OUT]), state.total

    run = jax.jit(jax.vmap(one, (0, None)))
    return lambda factors: map(np.asarray, run(jnp.arange(SEEDS), factors))


def test_a_poisoned_run_ends_within_noise_of_the_clean_one():
    run = train(optclip.skip_nonfinite(optax.chain(optclip.clip_by_global_norm(1.0), optax.adamw(3e-3))))
    clean, none = run(np.ones_like(POISON))
    poisoned, some = run(POISON)
    assert none.tolist() == [0] * SEEDS and some.tolist() == [2] * SEEDS
    assert abs(poisoned.mean() - clean.mean()) < clean.std(ddof=1) / 2
    assert clean.mean() < 0.3
    print(f"held-out loss: clean {clean.mean():.4f} +- {clean.std(ddof=1):.4f}, poisoned {poisoned.mean():.4f}")
