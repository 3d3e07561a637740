"""The training examples at a small size: they train, they resume bit for bit after a kill, and they say what is so."""

import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale

import optclip
from optclip.flax import TrainState

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kill_between_saves(script, out, at, *args):
    """Runs a script and kills it for real when it reports a step: no handler, no flush, no farewell."""
    command = [sys.executable, EXAMPLES / script, "--out", out, *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if line.startswith(f"step {at}:"):
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["linen_train", "nnx_train"])
def test_a_killed_run_resumes_bit_for_bit(name, tmp_path, capsys):
    size = ["--steps", "200", "--save-every", "20"]
    main = load(name).main
    whole = main(["--out", str(tmp_path / "whole"), *size])
    said = capsys.readouterr().out
    assert "resumed" not in said and "skipped so far 2" in said
    assert float(re.search(r"test accuracy ([\d.]+)%", said)[1]) > 90

    kill_between_saves(f"{name}.py", tmp_path / "killed", 70, *size)
    again = main(["--out", str(tmp_path / "killed"), *size])
    resumed = int(re.search(r"resumed at step (\d+)", capsys.readouterr().out)[1])
    assert 20 <= resumed < 200 and resumed % 20 == 0
    assert again == whole


def test_a_run_that_resumes_from_less_than_everything_is_told_apart(tmp_path):
    """The checksum sees the state of guards and clippers, not the parameters alone."""
    linen = load("linen_train")
    state = linen.make_state()
    other = state.replace(opt_state=state.opt_state._replace(total=jnp.int32(1)))
    assert linen.checksum((state.params, state.opt_state)) != linen.checksum((other.params, other.opt_state))


def test_float16_unscale_then_clip_then_skip():
    results = load("fp16_loss_scale").main(["--steps", "150"])
    accuracy, skipped, scale = results["unscale_clip_skip"]
    assert accuracy > 0.9 and 1 <= skipped < 20 and np.isfinite(scale)
    assert results["clip_unscale_skip"][0] < 0.5


def test_gradients_of_300_in_float16_train():
    """Their squares overflow float16; a norm taken in float16 is infinite, and the update is lost."""
    params = {"w": jnp.full(64, 4.0, jnp.float16)}
    loss = lambda p: jnp.sum(75.0 * p["w"].astype(jnp.float32) ** 2) / 2  # gradient 75 w = 300
    tx = optclip.skip_nonfinite(optax.chain(optclip.clip_by_global_norm(10.0), optax.sgd(0.1)))
    scale = DynamicScale(scale=jnp.float32(1), fin_steps=jnp.int32(0))

    def step(carry, _):
        params, state = carry
        _, _, _, grads = scale.value_and_grad(loss)(params)
        grads = jax.tree.map(lambda g: g.astype(jnp.float16), grads)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (loss(params), optclip.global_norm(grads))

    (params, state), (losses, norms) = jax.lax.scan(step, (params, tx.init(params)), length=45)
    assert params["w"].dtype == jnp.float16 and norms[0] == 2400  # 300 * sqrt(64)
    assert losses[-1] < losses[0] / 1000 and int(state.total) == 0
    bare = optax.clip_by_global_norm(10.0)
    lost, _ = bare.update({"w": jnp.full(64, 300.0, jnp.float16)}, bare.init(params))
    assert not np.any(lost["w"])  # what this is for


def test_accumulation_once_and_each():
    results = load("accumulation").main(["--steps", "60"])
    assert results["clean once"]["off"] < 1e-4 < results["clean each"]["off"]
    assert results["clean each"]["clipped"] > results["clean once"]["clipped"]
    assert results["wild each"]["accuracy"] > results["wild once"]["accuracy"] - 0.01


def test_the_train_state_of_flax_with_more():
    """Steps, fields to replace, overwritten parameters (fp8): as in Flax; extra arguments reach the optimizer."""
    seen = optax.GradientTransformationExtraArgs(
        lambda p: jnp.zeros(()), lambda u, s, p=None, *, value=0.0, **e: (u, jnp.asarray(value) + 0 * s)
    )

    class Mine(TrainState):
        extra: int = 0

    params = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.ones(1)}}
    grads = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.full(1, 7.0)}}
    state = Mine.create(apply_fn=None, params=params, tx=optax.chain(optclip.clip_by_global_norm(1.0), seen))
    plain = train_state.TrainState.create(apply_fn=None, params=params, tx=state.tx)
    new = jax.jit(lambda s, g: s.apply_gradients(grads=g, extra_args={"value": 3.0}, extra=5))(state, grads)
    old = plain.apply_gradients(grads=grads)
    assert isinstance(new, Mine) and new.extra == 5 and int(new.step) == 1 and new.tx is state.tx
    chex.assert_trees_all_close(new.params, old.params)
    assert float(new.opt_state[1]) == 3 and float(old.opt_state[1]) == 0
    assert float(new.summary()["clip/preclip_norm"]) == pytest.approx(2**0.5)
    assert float(state.apply_gradients(grads=grads).opt_state[1]) == 0
    with pytest.raises(TypeError):
        state.apply_gradients(grads=grads, valeu=3.0)  # a misspelt field is not swallowed


def test_optclip_does_not_import_flax():
    code = "import optclip, sys; assert not {'flax', 'orbax', 'matplotlib'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
