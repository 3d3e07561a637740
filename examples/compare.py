"""Which clipper is worth its limit on a heavy-tailed run with bad batches in it?

A small Flax transformer learns to predict the next character of the documentation that comes with Python
(``pydoc_data.topics``). Each batch is one passage read on, so that tables, grammar and prose make gradients of very
different length. A few batches are bad: random characters, with a loss divided by a wrong count, a hundred times too
large. Eight adaptive clippers, four with fixed limits, and none at all see the same batches from the same start, in
front of the same AdamW.

A spike is a stretch of steps during which the loss on held-out text is more than 0.1 above the lowest so far; its
height is by how much; the steps it lasts are lost. Numbers are means over the seeds.

Typical answer: without a clipper a third of the steps is lost, and the run ends at 2.60 nats, for the spikes linger in
Adam's second moment. A limit on the norm of the tree or of each leaf, fixed or adaptive, ends between 2.02 and 2.05 (of
one seed: read no rank into the last digit). The well-chosen fixed 1.0 is not beaten; what the adaptive ones save is the
choice. AGC ends at 2.12. Clipping single elements is not enough (`clip` 2.39, `spam_clip` 2.50). The numbers are in
docs/compare.json, the curves in docs/compare.png.

    python examples/compare.py                 # 13 runs, at most 8 minutes on 2 cores
    python examples/compare.py --steps 100     # a first look
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import optclip

BATCH, LENGTH, WIDTH, LAYERS, HEADS, VOCABULARY = 16, 64, 64, 2, 4, 128
PROBE, SPIKE, TOO_LARGE = 8, 0.1, 100.0

CLIPPERS: dict[str, Callable[[], Any]] = {
    "none": optax.identity,
    "clip_by_global_norm(1.0)": lambda: optclip.clip_by_global_norm(1.0),
    "clip_by_leaf_norm(0.2)": lambda: optclip.clip_by_leaf_norm(0.2),
    "clip(0.05)": lambda: optclip.clip(0.05),
    "adaptive_grad_clip(0.1)": lambda: optclip.adaptive_grad_clip(0.1, record=True),
    "autoclip(10)": lambda: optclip.autoclip(10.0),
    "clip_by_percentile(95)": lambda: optclip.clip_by_percentile(95.0, window=100, max_norm=jnp.inf),
    "clip_by_median(2)": lambda: optclip.clip_by_median(2.0),
    "clip_by_quantile(0.9)": lambda: optclip.clip_by_quantile(0.9),
    "zclip()": lambda: optclip.zclip(),
    "clip_by_ema_sigma()": lambda: optclip.clip_by_ema_sigma(),
    "adagc()": lambda: optclip.adagc(),
    "spam_clip()": lambda: optclip.spam_clip(),
}


class Block(nnx.Module):
    """Causal attention and a two-layer network, each behind a norm and around a shortcut."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.qkv, self.out = (nnx.Linear(WIDTH, n * WIDTH, use_bias=False, rngs=rngs) for n in (3, 1))
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(self.norms[0](x)).reshape(*x.shape[:2], 3 * HEADS, -1), 3, axis=2)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.characters, self.places = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.characters(tokens) + self.places(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.characters.attend(self.norm(x))


def text() -> tuple[np.ndarray, np.ndarray]:
    """Characters to learn from, and every twentieth topic to measure on."""
    parts = [topics[name].encode("ascii", "replace") for name in sorted(topics)]
    join = lambda some: np.frombuffer(b"\n\n".join(some), np.uint8).astype(np.int32)
    return join(p for i, p in enumerate(parts) if i % 20), join(parts[::20])


def passages(characters: np.ndarray, rows: int, start: int) -> np.ndarray:
    """``rows`` windows that follow each other, one character longer than the model reads."""
    return np.stack([characters[start + i * LENGTH :][: LENGTH + 1] for i in range(rows)])


def batches(characters: np.ndarray, steps: int, seed: int, bad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The batches of a run and the factors on their losses."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(characters) - BATCH * LENGTH - 1, steps)
    tokens = np.stack([passages(characters, BATCH, s) for s in starts])
    tokens[bad] = rng.integers(0, VOCABULARY, tokens[bad].shape)
    factors = np.ones(steps, np.float32)
    factors[bad] = TOO_LARGE
    return tokens, factors


def make_learn(graph: Any, probe: jax.Array) -> Callable[..., Any]:
    """Gradients of a batch and the held-out loss before the step, for all seeds; compiled once for all clippers."""

    def loss_fn(params: Any, tokens: jax.Array, factor: Any = 1.0) -> jax.Array:
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return factor * optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def learn(params: Any, tokens: jax.Array, factor: jax.Array) -> tuple[Any, jax.Array]:
        return jax.grad(loss_fn)(params, tokens, factor), loss_fn(params, probe)

    return jax.jit(jax.vmap(learn))


def make_apply(tx: Any) -> Callable[..., Any]:
    """One step of the optimizer for all seeds, and the fraction of sizes that its clipper found beyond their limits."""

    def apply(grads: Any, params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        updates, state = tx.update(grads, state, params)
        clipped = optclip.summary(state).get("clip/clipped_fraction", jnp.asarray(jnp.nan))
        return optax.apply_updates(params, updates), state, clipped

    return jax.jit(jax.vmap(apply), donate_argnums=(1, 2))


def cost(tx: Any, params: Any, repeats: int = 50) -> float:
    """Milliseconds that the clipper alone takes for a gradient of this model."""
    grads = jax.tree.map(jnp.ones_like, params)

    def step(carry: Any, _: Any) -> Any:
        updates, state = carry
        return tx.update(updates, state, params), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=repeats)[0])
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(run((grads, tx.init(params))))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:]) / repeats


def spikes(losses: np.ndarray) -> tuple[int, float, int]:
    """How many spikes a run had, the highest, and the steps they lasted."""
    above = losses - np.fmin.accumulate(losses)
    inside = ~(above <= SPIKE)  # a loss that is NaN is lost as well
    count = int(np.sum(inside & ~np.concatenate([[False], inside[:-1]])))
    return count, float(np.max(np.nan_to_num(above, nan=np.inf))) if count else 0.0, int(inside.sum())


def train(name: str, starts: Any, learn: Callable[..., Any], data: Any, bar: Any) -> dict[str, Any]:
    """One clipper over all seeds, summed up."""
    steps = data[0].shape[1]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, max(steps // 20, 1), steps, 5e-4)
    clip = CLIPPERS[name]()
    tx = optax.chain(clip, optax.adamw(schedule, b2=0.98))
    apply, params, state = make_apply(tx), jax.tree.map(jnp.copy, starts), jax.vmap(tx.init)(starts)
    losses, clipped = [], []
    for at in range(steps):
        grads, loss = learn(params, *(x[:, at] for x in data))
        params, state, fraction = apply(grads, params, state)
        losses.append(loss)
        clipped.append(fraction)
        bar.update()
        if at % 20 == 19:
            bar.set_postfix_str(f"{name}, loss {loss.mean():.2f}")
    curves = np.stack(losses, axis=1)
    counts, heights, lost = zip(*map(spikes, curves), strict=True)
    return {
        "clipper": name, "final_loss": float(curves[:, -20:].mean()), "spikes": float(np.mean(counts)),
        "highest_spike": float(np.max(heights)), "steps_lost": float(np.mean(lost)),
        "clip_rate": None if np.isnan(clipped).any() else float(np.mean(clipped)),
        "cost_ms": cost(clip, jax.tree.map(lambda x: x[0], starts)),
        "losses": np.round(curves.astype(float), 3).tolist(),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = ["| clipper | final loss | spikes | highest | steps lost | clipped | cost per step |", "|" + "---|" * 7]
    for r in rows:
        rate = "-" if r["clip_rate"] is None else f"{r['clip_rate']:.1%}"
        lines.append(
            f"| {r['clipper']} | {r['final_loss']:.3f} | {r['spikes']:.1f} | {r['highest_spike']:.2f} | "
            f"{r['steps_lost']:.0f} | {rate} | {r['cost_ms']:.2f} ms |"
        )
    return "\n".join(lines)


def picture(result: dict[str, Any], path: pathlib.Path) -> None:
    """One panel per clipper: the held-out loss of its first seed, before the same run without a clipper."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["runs"]
    high = -(-(len(rows) - 1) // 4)
    grid, panels = plt.subplots(
        high, 4, figsize=(13, 0.6 + 2.3 * high), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    plain = np.asarray(rows[0]["losses"][0])
    low = min(np.nanmin(r["losses"]) for r in rows)
    for panel, row in zip(panels.flat, rows[1:], strict=False):
        losses = np.asarray(row["losses"][0])
        for at in result["bad_steps"]:
            panel.axvline(at, color="#d55e00", lw=0.8, alpha=0.5, zorder=0)
        panel.plot(plain, color="0.72", lw=1.0)
        panel.plot(losses, color="#0072b2", lw=1.4)
        panel.set_title(row["clipper"], fontsize=10, loc="left")
        note = f"final {row['final_loss']:.3f}\n{row['steps_lost']:.0f} steps lost"
        panel.text(0.97, 0.95, note, transform=panel.transAxes, ha="right", va="top", backgroundcolor="white")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(low - 0.1, low + 2.6)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    for panel in panels[:, 0]:
        panel.set_ylabel("held-out loss (nats)")
    grid.suptitle(
        f"One transformer, the same batches: loss with each clipper (blue) and with none (grey, final "
        f"{rows[0]['final_loss']:.3f}, {rows[0]['steps_lost']:.0f} steps lost); bad batches in orange",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    grid.savefig(path, dpi=120)
    plt.close(grid)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains with every clipper, prints the table, and writes table, numbers and picture."""
    names = [name for name in CLIPPERS if name != "none"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--clippers", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args(argv)
    started = time.perf_counter()

    characters, held_out = text()
    probe = jnp.asarray(passages(held_out, PROBE * 8, 0)[::8])
    bad = np.linspace(args.steps // 4, args.steps - 1 - args.steps // 10, max(args.steps // 100, 1)).astype(int)
    runs = [batches(characters, args.steps, seed, bad) for seed in range(args.seeds)]
    data = tuple(np.stack(x) for x in zip(*runs, strict=True))
    graph = nnx.split(Transformer(nnx.Rngs(0)))[0]
    models = [nnx.split(Transformer(nnx.Rngs(seed)))[1] for seed in range(args.seeds)]
    starts = jax.tree.map(lambda *x: jnp.stack(x), *models)

    learn, data = make_learn(graph, probe), tuple(map(jnp.asarray, data))
    chosen = ["none", *args.clippers]
    with tqdm(total=args.steps * len(chosen), unit="step", mininterval=1) as bar:
        rows = [train(name, starts, learn, data, bar) for name in chosen]
    result = {
        "made_by": f"python examples/compare.py --steps {args.steps} --seeds {args.seeds}",
        "machine": f"{jax.default_backend()}, jax {jax.__version__}", "minutes": (time.perf_counter() - started) / 60,
        "parameters": sum(x.size for x in jax.tree.leaves(models[0])), "bad_steps": bad.tolist(), "runs": rows,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "compare.json").write_text(json.dumps(result))
    (args.out / "compare.md").write_text(table(rows) + "\n")
    picture(result, args.out / "compare.png")
    print(table(rows))
    print(f"{args.out / 'compare.png'}, {result['minutes']:.1f} minutes")
    return result


if __name__ == "__main__":
    main()
