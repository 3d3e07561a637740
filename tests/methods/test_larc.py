"""LARC's clip mode against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from tests.methods import gradients

PARAMS = {"a": np.float32([[0.1, 1e-3, -0.2], [0.5, 0.1, -0.1]]), "b": np.zeros(4, np.float32)}


def oracle(rate, trust, decay):
    step = [0]

    def one(grads):
        lr = rate(step[0]) if callable(rate) else rate
        step[0] += 1
        out = {}
        for k, g in grads.items():
            w = PARAMS[k].astype(np.float64)
            n, p = np.linalg.norm(g), np.linalg.norm(w)
            if not np.isfinite(n):
                out[k] = np.full_like(g, np.nan)
            elif n == 0 or p == 0:
                out[k] = g
            else:
                out[k] = (g + decay * w) * min(1.0, trust * p / (n + decay * p + 1e-8) / lr)
        return out

    return one


@pytest.mark.parametrize("rate", [0.1, lambda count: 0.01 * (1 + count)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_step(rate, decay):
    tx = optclip.larc_clip(rate, 0.02, weight_decay=decay)
    gradients.check(tx, oracle(rate, 0.02, decay), gradients.eventful(), PARAMS)


def test_without_decay_small_gradients_pass_bit_for_bit():
    grads = {k: 1e-4 * x for k, x in gradients.healthy(5).items()}
    got, _ = gradients.run(optclip.larc_clip(0.1), grads, PARAMS)
    np.testing.assert_array_equal(got["a"], grads["a"])


def test_half_precision_is_rounded_once():
    g, w = jnp.full(4, 1.0, jnp.bfloat16), jnp.full(4, 0.75, jnp.bfloat16)
    tx = optclip.larc_clip(0.5, 0.7, weight_decay=2**-8)
    got = tx.update(g, tx.init(w), w)[0]
    want = (1 + 0.75 / 2**8) * min(1, 0.7 * 1.5 / (2 + 1.5 / 2**8) / 0.5)
    assert got.dtype == jnp.bfloat16 and float(got[0]) == float(jnp.bfloat16(want))
