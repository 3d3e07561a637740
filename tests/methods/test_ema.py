"""A multiple of the moving average of the norm, with a plain mean at the start."""

import numpy as np
import pytest

import optclip
from optclip import thresholds
from tests.methods import norms

FEEDS = {
    "raw": (thresholds.raw, lambda size, limit: size),
    "clipped": (thresholds.clipped, min),
    "accepted": (thresholds.accepted, lambda size, limit: size if size <= limit else None),
    "winsorized": (thresholds.winsorized(3.0), lambda size, limit: min(size, 3 * limit)),
}


def oracle(ratio, decay, warmup, feed):
    state = {"count": 0, "mean": 0.0}

    def step(size):
        learning = state["count"] < warmup
        limit = np.inf if learning or state["count"] == 0 else ratio * state["mean"]
        value = size if learning else feed(size, limit)
        if value is not None:
            weight = max(1 - decay, 1 / (state["count"] + 1))
            state["mean"] += weight * (value - state["mean"])
            state["count"] += 1
        return limit

    return step


@pytest.mark.parametrize("ratio, decay, warmup, name", [
    (2.0, 0.99, 25, "clipped"), (1.5, 0.9, 0, "raw"), (1.3, 0.97, 10, "accepted"), (1.5, 0.95, 5, "winsorized"),
])  # fmt: skip
def test_every_step(ratio, decay, warmup, name):
    feeding, feed = FEEDS[name]
    tx = optclip.clip_by_ema(ratio, decay, feeding=feeding, warmup=warmup, patience=None)
    norms.check(tx, oracle(ratio, decay, warmup, feed), norms.eventful(), rtol=1e-5)


def test_the_mend_leaves_a_healthy_run_alone():
    norms.check_healthy(optclip.clip_by_ema)


def test_a_higher_level_is_accepted_sooner_than_by_climbing():
    before = norms.healthy(200)
    assert norms.first_pass(optclip.clip_by_ema(), before, 10.0, 400) <= 50
    assert norms.first_pass(optclip.clip_by_ema(1.2, patience=None), before, 10.0, 400) == 400


def test_a_leaf_at_zero_wakes_up():
    idle = np.concatenate([norms.healthy(100), np.zeros(250)])
    tiny = np.concatenate([norms.healthy(100), np.full(250, 1e-30)])
    assert norms.first_pass(optclip.clip_by_ema(), idle, 1.0, 60) == 0
    assert norms.first_pass(optclip.clip_by_ema(decay=0.5), tiny, 1.0, 60) <= 50
