"""Open-Sora Plan's adaptive clip: mean + 3 standard deviations, both standing still on a clipped step."""

import numpy as np
import pytest

import optclip
from tests.methods import norms


def oracle(sigmas, decay, first):
    state = {}

    def step(size):
        if not state:
            state.update(mean=min(first, 3 * size), var=0.0)
            limit, bound = first, state["mean"]
        else:
            limit = bound = state["mean"] + sigmas * np.sqrt(state["var"])
        if size <= bound:
            state["mean"] = decay * state["mean"] + (1 - decay) * size
            state["var"] = decay * state["var"] + (1 - decay) * (state["mean"] - size) ** 2
        return limit

    return step


@pytest.mark.parametrize("sigmas, decay, first", [(3.0, 0.99, 1.0), (3.0, 0.99, np.inf), (1.5, 0.9, 10.0)])
def test_every_step(sigmas, decay, first):
    tx = optclip.clip_by_ema_sigma(sigmas, decay, first_limit=first, patience=None)
    norms.check(tx, oracle(sigmas, decay, first), norms.eventful(), rtol=2e-5)


def test_the_mend_leaves_a_healthy_run_alone():
    norms.check_healthy(optclip.clip_by_ema_sigma, first_limit=np.inf)
    norms.check_healthy(optclip.clip_by_ema_sigma, norms.healthy() / 5)


def test_a_start_above_the_first_limit_is_held_there():
    norms_out, _, _ = norms.run(optclip.clip_by_ema_sigma(), np.full(40, 7.0, np.float32))
    np.testing.assert_allclose(norms_out, 1.0, rtol=1e-3)


@pytest.mark.parametrize("before", [norms.healthy(200) / 8, np.full(3, 7.0)], ids=["run", "start"])
def test_the_reference_locks_out_a_higher_level_and_the_mend_accepts_it(before):
    assert norms.first_pass(optclip.clip_by_ema_sigma(patience=None), before, 10.0, 3000) == 3000
    assert norms.first_pass(optclip.clip_by_ema_sigma(), before, 10.0, 3000) <= 51
