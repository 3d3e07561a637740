"""AdaClip, AdaGN and GradientStabilizer against float64, and their ways out of a freak gradient."""

import numpy as np
import pytest

import optclip
from optclip import measures
from tests.methods import gradients, norms


def adaclip(decay):
    total, t = 0.0, 0

    def step(g):
        nonlocal total, t
        largest, t = np.max(np.abs(g)), t + 1
        total = decay * total + (1 - decay) * largest
        limit = total / (1 - decay**t)
        return np.where(np.abs(g) > limit, g / (largest or 1) * limit, g)

    return step


def moments(b1, b2, debias, eps):
    m, v, t = 0.0, 0.0, 0

    def step(g):
        nonlocal m, v, t
        n = np.linalg.norm(g)
        if n == 0:
            return g
        m, v, t = b1 * m + (1 - b1) * n, b2 * v + (1 - b2) * n**2, t + 1
        c1, c2 = (1 - b1**t, 1 - b2**t) if debias else (1, 1)
        return g / n * (m / c1) / (np.sqrt(v / c2) + eps)

    return step


@pytest.mark.parametrize("decay", [0.999, 0.9])
def test_every_step_of_adaclip(decay):
    grads = gradients.eventful()
    grads["b"] = grads["b"] + (grads["b"] == 0)
    gradients.check(optclip.adaclip(decay, patience=None), gradients.by_leaf(lambda: adaclip(decay)), grads)


@pytest.mark.parametrize("b1, b2", [(0.7, 0.9), (0.85, 0.99999)])
def test_every_step_of_adagn(b1, b2):
    grads = {k: x[:180] for k, x in gradients.eventful().items()}
    gradients.check(optclip.adagn(b1, b2), gradients.by_leaf(lambda: moments(b1, b2, True, 1e-8)), grads, rtol=2e-5)


@pytest.mark.parametrize("debias", [False, True])
def test_every_step_of_gradient_stabilizer(debias):
    tx = optclip.gradient_stabilizer(debias=debias)
    gradients.check(tx, gradients.by_leaf(lambda: moments(0.6, 0.999, debias, 0.0)), gradients.eventful(), rtol=2e-5)


def test_gradient_stabilizer_over_all_leaves():
    grads = gradients.healthy(40)
    updates, _ = gradients.run(optclip.gradient_stabilizer(measure=measures.global_norm), grads)
    joint = np.concatenate([grads["a"].reshape(40, -1), grads["b"]], axis=1).astype(np.float64)
    step = moments(0.6, 0.999, False, 0.0)
    want = np.stack([step(g) for g in joint])
    np.testing.assert_allclose(updates["b"], want[:, 6:], rtol=1e-5)


def test_the_mends_leave_a_healthy_run_alone():
    gradients.check_healthy(optclip.adaclip)
    for method in (optclip.adagn, optclip.gradient_stabilizer):
        gradients.check_healthy(method, rtol=5e-7)


def test_the_first_step_of_each():
    norm = lambda tx: norms.run(tx, np.full(1, 7.0, np.float32))[0][0]
    assert norm(optclip.adaclip()) == 7
    assert norm(optclip.adagn()) == pytest.approx(1)
    assert norm(optclip.gradient_stabilizer()) == pytest.approx(0.4 / 0.001**0.5)  # the cold start of the paper
    assert norm(optclip.gradient_stabilizer(debias=True)) == pytest.approx(1)


def test_adaclip_accepts_a_new_level():
    before = norms.healthy(200)
    assert norms.first_pass(optclip.adaclip(), before, 100.0, 60) == 49
    assert norms.first_pass(optclip.adaclip(patience=None), before, 100.0, 1000) == 1000
    tiny = np.append(np.full(1000, 1e-12), np.ones(60)).astype(np.float32)
    assert norms.run(optclip.adaclip(), tiny)[0][-10:] == pytest.approx(1)
    assert np.all(norms.run(optclip.adaclip(patience=None), tiny)[0] < 0.1)
    assert norms.first_pass(optclip.adaclip(), np.zeros(30), 1.0, 60) == 0


def test_adaclip_leaves_elements_within_alone():
    grads = gradients.healthy()
    updates, _ = gradients.run(optclip.adaclip(0.9), grads)
    same = updates["b"] == grads["b"]
    pressed = ~same.all(1)
    assert pressed.any() and np.mean(same[pressed]) > 0.3
    assert np.all(np.abs(updates["b"]) <= np.abs(grads["b"]))


@pytest.mark.parametrize("method", [optclip.adagn, optclip.gradient_stabilizer])
def test_one_huge_gradient_does_not_throttle(method):
    sizes = np.ones(400, np.float32)
    sizes[50] = 1e9
    mended, paper = norms.run(method(b2=0.999), sizes)[0], norms.run(method(b2=0.999, patience=None), sizes)[0]
    np.testing.assert_array_equal(mended[:140], paper[:140])
    assert np.all(paper[150:] < 1e-4)
    assert np.all(np.abs(mended[180:] - 1) < 0.02)


def test_a_fall_of_the_level():
    """To a third it is the paper's business; to a tenth, a thousand of its steps would be short."""

    def run(level, **kwargs):
        sizes = np.append(np.ones(300), np.full(200, level)).astype(np.float32)
        return norms.run(optclip.gradient_stabilizer(debias=True, **kwargs), sizes)[0]

    np.testing.assert_allclose(run(0.4), run(0.4, patience=None), rtol=1e-6)
    assert run(0.1)[-90:] == pytest.approx(1, rel=1e-2) and np.all(run(0.1, patience=None)[310:] < 0.2)


def test_an_idle_leaf_wakes_unharmed():
    sizes = np.append(np.zeros(300), np.ones(20)).astype(np.float32)
    assert norms.run(optclip.adagn(), sizes)[0][300:] == pytest.approx(1)
    assert norms.run(optclip.gradient_stabilizer(debias=True), sizes)[0][300:] == pytest.approx(1)
    again = np.concatenate([np.ones(300), np.zeros(300), np.ones(20)]).astype(np.float32)
    assert norms.run(optclip.adagn(), again)[0][600:] == pytest.approx(1)
