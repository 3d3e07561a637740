"""Does clipping make a network train that otherwise diverges, and how much larger may the learning rate be?

A recurrent network reads scikit-learn's handwritten digits pixel by pixel, so its gradients pass through 64 steps of
time and really explode. It is trained by SGD with momentum without clipping, with clipnorm, with clipvalue and with
AGC, over a range of learning rates, from the same start and on the same batches.

Typical answer: without clipping the largest learning rate that trains is 0.003; with clipnorm and clipvalue it is 0.03,
with AGC 0.1 to 0.3; at their best they end as accurate or more so, to what the seed decides. The limits lie at the low
end of the norms, so most steps are clipped: in this network the size of the gradient says more about explosion than
about how far to go.

    python examples/quickstart.py            # about a minute on two cores; writes out/quickstart.png and .json
"""

import argparse
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import optclip

MAX_NORM, MAX_VALUE, RATIO = 1.0, 0.01, 0.01
METHODS = {
    "no clipping": optax.identity,
    "clipnorm": lambda: optclip.clip_by_global_norm(MAX_NORM),
    "clipvalue": lambda: optclip.clip(MAX_VALUE),
    "AGC": lambda: optclip.adaptive_grad_clip(RATIO, record=True),
}
COLORS = {"no clipping": "#d55e00", "clipnorm": "#0072b2", "clipvalue": "#009e73", "AGC": "#cc79a7"}
RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
TRAINS = 0.8  # the test accuracy that counts as "this learning rate trains"


class Reader(nnx.Module):
    """A plain recurrent network: one pixel in per step, ten classes out at the end."""

    def __init__(self, hidden: int, rngs: nnx.Rngs):
        init = nnx.initializers.orthogonal(1.2)
        self.rnn = nnx.RNN(nnx.SimpleCell(1, hidden, recurrent_kernel_init=init, rngs=rngs))
        self.head = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:  # (batch, time, 1) -> (batch, 10)
        return self.head(self.rnn(pixels)[:, -1])


def load(seed: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Digits as sequences of 64 pixels in [0, 1], shuffled: 1,500 to train, 297 to test."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    x, y = (data.data[order] / 16).astype(np.float32)[..., None], data.target[order]
    return (x[:1500], y[:1500]), (x[1500:], y[1500:])


def loss_fn(model: Reader, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model: Reader, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    clipped = optclip.summary(optimizer.opt_state).get("clip/clipped", jnp.nan)
    return {
        "loss": loss,
        "norm": optclip.global_norm(grads),  # before the clip
        "largest": optclip.global_norm(grads, jnp.inf),
        "clipped": jnp.asarray(clipped),
    }


@nnx.jit
def accuracy(model: Reader, x: jax.Array, y: jax.Array) -> jax.Array:
    return (model(x).argmax(-1) == y).mean()


def run(method: str, rate: float, steps: int, seed: int, bar: tqdm, *, batch: int = 64, hidden: int = 64) -> dict:
    """Trains once; returns what happened at each step, and the test accuracy at the end."""
    (x, y), test = load(seed)
    model = Reader(hidden, nnx.Rngs(seed))
    sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=jnp.float32(rate), momentum=0.9)
    optimizer = nnx.Optimizer(model, optax.chain(METHODS[method](), sgd), wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    steps_seen = []
    for _ in range(steps):
        rows = rng.integers(0, len(y), batch)
        steps_seen.append(train_step(model, optimizer, x[rows], y[rows]))
        bar.update()
    seen = jax.device_get(steps_seen)
    out = {k: [float(s[k]) for s in seen] for k in seen[0]}
    if method == "clipvalue":  # it records nothing: a step is clipped if any component was
        out["clipped"] = [float(v > MAX_VALUE) for v in out.pop("largest")]
    final = float(np.mean(out["loss"][-20:]))
    return {**out, "method": method, "rate": rate, "final loss": final, "accuracy": float(accuracy(model, *test))}


def table(runs: list[dict]) -> str:
    """One row per method, at its own best learning rate."""
    head = ["", "largest rate that trains", "best accuracy", "at rate", "its final loss", "steps clipped"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method in METHODS:
        mine = [r for r in runs if r["method"] == method]
        best = max(mine, key=lambda r: r["accuracy"])
        trains = [r["rate"] for r in mine if r["accuracy"] >= TRAINS]
        rate = np.mean(best["clipped"])
        lines.append(
            f"| {method} | {max(trains) if trains else 'none'} | {best['accuracy']:.1%} | {best['rate']} "
            f"| {best['final loss']:.2f} | {'-' if math.isnan(rate) else f'{rate:.0%}'} |"
        )
    return "\n".join(lines)


def picture(runs: list[dict], rate: float, path: pathlib.Path) -> None:
    """Loss and gradient norm over time at one learning rate, and the accuracy over all of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.9), constrained_layout=True)
    for method, color in COLORS.items():
        mine = [r for r in runs if r["method"] == method]
        (shown,) = [r for r in mine if r["rate"] == rate]
        smooth = np.convolve(shown["loss"], np.ones(10) / 10, "valid")
        left.plot(np.arange(len(smooth)) + 10, smooth, color=color, lw=1.8, label=method)
        middle.plot(shown["norm"], color=color, lw=0.9, alpha=0.9, zorder=3 if method == "no clipping" else 2)
        right.plot([r["rate"] for r in mine], [100 * r["accuracy"] for r in mine], "o-", color=color, lw=1.8, ms=4)
    left.axhline(math.log(10), color="0.6", lw=1, ls=":")
    left.text(1, math.log(10), " chance", color="0.45", va="bottom", fontsize=8)
    left.set(title=f"Training loss at learning rate {rate}", xlabel="step", ylabel="cross-entropy (mean of 10 steps)")
    left.set_ylim(0, 5)
    left.legend(frameon=False, loc="upper right")
    middle.axhline(MAX_NORM, color=COLORS["clipnorm"], lw=1.5, ls="--")
    middle.text(1, MAX_NORM * 0.93, f" clipnorm limit {MAX_NORM}", color=COLORS["clipnorm"], va="top", fontsize=8)
    middle.set_ylim(bottom=MAX_NORM / 3)
    middle.set(title="Gradient norm before the clip", xlabel="step", ylabel="L2 norm", yscale="log")
    right.axhline(100 * TRAINS, color="0.6", lw=1, ls=":")
    right.text(
        1,
        100 * TRAINS,
        "counts as trained",
        color="0.45",
        va="bottom",
        ha="right",
        fontsize=8,
        transform=right.get_yaxis_transform(),
    )
    right.set(
        title="Test accuracy over learning rates", xlabel="learning rate", ylabel="%", xscale="log", ylim=(0, 100)
    )
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--show", type=float, help="the learning rate drawn over time (default: 0.03 or the largest)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    with tqdm(total=len(METHODS) * len(args.rates) * args.steps, unit="step") as bar:
        for method in METHODS:
            for rate in args.rates:
                bar.set_description(f"{method} at {rate}")
                runs.append(run(method, rate, args.steps, args.seed, bar))
    print(f"\n{args.steps} steps; a learning rate trains if the test accuracy reaches {TRAINS:.0%}.\n\n{table(runs)}\n")
    show = args.show or (0.03 if 0.03 in args.rates else max(args.rates))
    picture(runs, show, args.out / "quickstart.png")
    numbers = [{k: r[k] for k in ("method", "rate", "final loss", "accuracy")} for r in runs]
    result = {"steps": args.steps, "seed": args.seed, "jax": jax.__version__, "runs": numbers}
    (args.out / "quickstart.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{args.out / 'quickstart.png'} shows it at a glance; {args.out / 'quickstart.json'} has the numbers.")


if __name__ == "__main__":
    main()
