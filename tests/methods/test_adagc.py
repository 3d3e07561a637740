"""AdaGC against its Algorithm 1 in float64, and its way out of what the paper's rule cannot leave."""

import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from optclip import measures
from tests.methods import gradients, norms


def oracle(ratio, decay, max_norm, warmup, zeros=True):
    gamma, count = {}, {}

    def step(grads):
        size = {k: np.linalg.norm(g) for k, g in grads.items()}
        total = np.sqrt(sum(n**2 for n in size.values() if np.isfinite(n)))
        out = {}
        for k, g in grads.items():
            n, t = size[k], count.get(k, 0)
            if not np.isfinite(n):
                out[k] = np.full_like(g, np.nan)
                continue
            limit = n * min(1, max_norm / total) if t < warmup and total > 0 else ratio * gamma.get(k, np.inf)
            out[k] = gradients.shrink(g, n, limit)
            after = min(n, limit)
            if zeros or after > 0:
                gamma[k] = min(gamma.get(k, np.inf), after) if t < warmup else decay * gamma[k] + (1 - decay) * after
                count[k] = t + 1
        return out

    return step


@pytest.mark.parametrize("ratio, decay, max_norm, warmup", [(1.05, 0.98, 1.0, 100), (1.5, 0.9, 0.6, 20)])
def test_every_step_of_the_paper(ratio, decay, max_norm, warmup):
    tx = optclip.adagc(ratio, decay, max_norm, warmup=warmup, patience=None)
    gradients.check(tx, oracle(ratio, decay, max_norm, warmup), gradients.eventful())


def test_every_step_without_zeros():
    grads = {k: x[:220] for k, x in gradients.eventful().items()}
    gradients.check(optclip.adagc(1.5, 0.9, 0.6, warmup=20), oracle(1.5, 0.9, 0.6, 20, zeros=False), grads)


def test_a_hundred_warm_up_steps_by_default():
    sizes = np.full(150, 0.5)
    sizes[[99, 100]] = 0.9
    after, limits, _ = norms.run(optclip.adagc(), sizes.astype(np.float32))
    assert np.isinf(limits[99]) and after[99] == np.float32(0.9)
    assert limits[100] == pytest.approx(1.05 * 0.5) == after[100]


def test_the_mend_leaves_a_healthy_run_alone():
    gradients.check_healthy(optclip.adagc)
    norms.check_healthy(optclip.adagc, norms.healthy(1500))


def free(**kwargs):
    return optclip.adagc(max_norm=np.inf, **kwargs)


def test_a_leaf_that_was_zero_wakes():
    idle = np.concatenate([np.zeros(150)])
    assert norms.first_pass(free(), idle, 1.0, 400) == 0
    assert norms.first_pass(free(patience=None), idle, 1.0, 400) == 400


def test_one_tiny_gradient_in_the_warm_up():
    sizes = norms.healthy(110)
    sizes[50] = 1e-12
    assert norms.first_pass(free(), sizes, 1.0, 1500) <= 50
    assert norms.first_pass(free(patience=None), sizes, 1.0, 1500) == 1500


def test_a_spike_elsewhere_in_the_warm_up():
    grads = gradients.healthy(400)
    grads["b"][50] *= 1e4  # the global clip shrinks leaf "a" with it, and the minimum remembers that
    size = lambda tx: np.linalg.norm(gradients.run(tx, grads)[0]["a"][300:].reshape(100, -1), axis=1)
    own = np.linalg.norm(grads["a"][300:].reshape(100, -1), axis=1)
    assert np.median(size(optclip.adagc()) / own) > 0.5
    assert np.median(size(optclip.adagc(patience=None)) / own) < 0.01


def test_a_new_level_is_accepted():
    before = norms.healthy(300)
    for level in (10.0, 1e6):
        assert norms.first_pass(free(), before, level, 100) == 49
        assert norms.first_pass(free(patience=None), before, level, 1500) == 1500
    assert norms.first_pass(free(), before, 0.01, 10) == 0


def test_in_the_warm_up_any_scope_is_clipped_by_the_norm_of_all():
    grads = {k: x[:10] for k, x in gradients.healthy().items()}
    want, _ = gradients.run(optclip.clip_by_global_norm(0.5), grads)
    for measure in (measures.leaf_norm, measures.global_norm, measures.unit_norm):
        got, _ = gradients.run(optclip.adagc(max_norm=0.5, measure=measure), grads)
        for k in want:
            np.testing.assert_allclose(got[k], want[k], rtol=1e-6)


def test_raw_sizes_give_the_minimum_of_paddle():
    tx = optclip.adagc(max_norm=0.1, feeding=optclip.thresholds.raw)
    _, _, state = norms.run(tx, np.full(50, 0.5, np.float32))
    assert jnp.max(state.rule.mean) == 0.5
