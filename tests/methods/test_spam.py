"""SPAM's spike clip against float64, element by element."""

import numpy as np
import pytest

import optclip
from optclip import measures
from tests.methods import gradients, norms


def oracle(theta, decay, warmup, wake):
    state = {}

    def step(g):
        v, t = state.get("v", np.zeros_like(g)), state.get("t", 0)
        spike = (g**2 > theta * v) & (t >= warmup)
        spike &= (v > 0) | (not wake)
        out = np.where(spike, np.sign(g) * np.sqrt(theta * v), g)
        state.update(v=decay * v + (1 - decay) * out**2, t=t + 1)
        return out

    return step


@pytest.mark.parametrize("theta, decay, warmup, wake", [(5000, 0.999, 19, False), (20, 0.9, 5, True)])
def test_every_step(theta, decay, warmup, wake):
    tx = optclip.spam_clip(theta, decay, warmup=warmup, wake=wake)
    gradients.check(tx, gradients.by_leaf(lambda: oracle(theta, decay, warmup, wake)), gradients.eventful(), rtol=2e-5)


def test_nineteen_free_steps_by_default():
    for step, free in ((18, True), (19, False)):
        sizes = np.ones(30, np.float32)
        sizes[step] = 1e6
        assert (scan(optclip.spam_clip(), sizes)[0][step] == 1e6) == free


def scan(tx, sizes):
    updates, state = gradients.run(tx, {"a": sizes[:, None], "b": -sizes[:, None]})
    np.testing.assert_array_equal(updates["a"], -updates["b"])
    return updates["a"][:, 0], state


def test_an_element_that_was_always_zero_wakes():
    sizes = np.append(np.zeros(60), np.ones(10)).astype(np.float32)
    assert np.all(scan(optclip.spam_clip(), sizes)[0] == sizes)
    assert np.all(scan(optclip.spam_clip(wake=False), sizes)[0] == 0)


@pytest.mark.parametrize("level", [10.0, 1e12, 1e30])
def test_a_new_level_is_accepted(level):
    sizes = np.append(np.ones(100), np.full(100, level)).astype(np.float32)
    passed = scan(optclip.spam_clip(), sizes)[0][100:] == np.float32(level)
    assert np.argmax(passed) <= 80 and passed[-1]


def test_the_healthy_run_is_that_of_the_paper():
    updates, _ = gradients.run(optclip.spam_clip(), gradients.healthy())
    paper, _ = gradients.run(optclip.spam_clip(wake=False), gradients.healthy())
    for k in updates:
        np.testing.assert_array_equal(updates[k], paper[k])


def test_a_leaf_with_a_nan_keeps_its_memory():
    tx = optclip.spam_clip(20.0, warmup=2)
    good = gradients.healthy(60)
    bad = {k: np.insert(x, 30, x[5], axis=0) for k, x in good.items()}
    bad["a"][30, 0, 0] = np.inf
    want, _ = gradients.run(tx, good)
    got, _ = gradients.run(tx, bad)
    assert np.all(np.isnan(got["a"][30])) and not np.any(np.isnan(got["b"]))
    np.testing.assert_array_equal(np.delete(got["a"], 30, axis=0), want["a"])


def test_the_rule_at_leaf_scope():
    tx = optclip.clip_by(measures.leaf_norm, optclip.thresholds.spike_ratio(9.0, 0.9, warmup=5))
    after, _, _ = norms.run(tx, np.append(np.ones(40), [100.0]).astype(np.float32))
    assert after[-1] == pytest.approx(3 * np.sqrt(1 - 0.9**40), rel=1e-5)
