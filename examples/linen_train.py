"""How do I train a linen model with a clipper and guards, and resume it bit for bit after the machine has died?

A small network learns scikit-learn's handwritten digits. One batch in a hundred is broken; the guards skip it. The
state is saved with Orbax every few steps, clippers and guards included. Start the script again with the same arguments,
after a crash or a kill, and it goes on from the last save; batches follow from the step number alone.

Typical answer: 98 % of the test digits are right after 400 steps, 4 steps were skipped, and the checksum of the final
state is the same whether or not the run was interrupted.

    python examples/linen_train.py --out out/linen     # half a minute
"""

import argparse
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from sklearn.datasets import load_digits

import optclip
from optclip.flax import TrainState

TRAIN = 1500


class Net(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


def load() -> tuple[np.ndarray, np.ndarray]:
    """Digits in [0, 1], shuffled."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return (x[order] / 16).astype(np.float32), y[order].astype(np.int32)


def batch(x: np.ndarray, y: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch of a step; each hundredth is broken."""
    rows = np.random.default_rng([1, step]).integers(0, TRAIN, 64)
    return x[rows] * (np.float32(np.nan) if step % 100 == 77 else np.float32(1)), y[rows]


def make_state() -> TrainState:
    """The loss goes to the optimizer, so that a guard may look at it."""
    net = Net()
    steps = optax.chain(optclip.clip_by_global_norm(0.5), optax.adamw(3e-3))
    tx = optclip.skip_nonfinite(optclip.skip_spikes(steps, loss_rule=optclip.thresholds.window_zscore(6.0)))
    params = net.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    return TrainState.create(apply_fn=net.apply, params=params, tx=tx)


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step, and what to log of it."""

    def loss_fn(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    state = state.apply_gradients(grads=grads, extra_args={"value": loss})
    return state, {"loss": loss, **state.summary()}


def checksum(tree: Any) -> str:
    """The same for the same bits."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> str:
    """Trains, from the last save if there is one; returns the checksum of the final state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/linen"))
    args = parser.parse_args(argv)

    x, y = load()
    state = make_state()
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=args.save_every)
    with ocp.CheckpointManager(args.out.resolve(), options=options) as saves:
        if saves.latest_step() is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = saves.restore(saves.latest_step(), args=ocp.args.StandardRestore(like))
            print(f"resumed at step {int(state.step)}", flush=True)
        for step in range(int(state.step), args.steps):
            state, said = train_step(state, *batch(x, y, step))
            saves.save(step + 1, args=ocp.args.StandardSave(state))
            if (step + 1) % 10 == 0:
                print(
                    f"step {step + 1}: loss {said['loss']:.3f}, norm {said['clip/preclip_norm']:.2f}, "
                    f"clipped {said['clip/clipped']:.0f}, skipped so far {said['skip/total'] + said['skip_1/total']}",
                    flush=True,
                )
    right = np.argmax(state.apply_fn({"params": state.params}, x[TRAIN:]), axis=1) == y[TRAIN:]
    print(f"test accuracy {right.mean():.1%}; checksum {checksum((state.params, state.opt_state))}")
    return checksum((state.params, state.opt_state))


if __name__ == "__main__":
    main()
