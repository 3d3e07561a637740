"""How does the cost of a clip grow with the number of leaves?

10 to 5,000 leaves of 1,000 elements, and a mix of sizes: trace, compile and run time, ours against optax's, and those
of a program that only scales the leaves, for no clip can be cheaper.

Typical answer on a CPU: at 1,000 leaves we take a third of optax's compile time and 0.7 to 1.0 of its run time, of
which scaling alone is 0.6; a norm per leaf costs a tenth more. From 2,500 to 5,000 leaves our compile time grows 2.3 to
2.8 times, that of scaling alone 2.5 to 3.0 times.

    python -m benchmarks.leaves
"""

import jax
import numpy as np
import optax

import optclip
from benchmarks._harness import arguments, build, gpt2_shapes, interleave, random_tree, save, show

MAKERS = {
    "optax clip_by_global_norm": lambda: optax.clip_by_global_norm(1e-3),
    "optclip clip_by_global_norm": lambda: optclip.clip_by_global_norm(1e-3),
    "optax scale": lambda: optax.scale(0.5),
    "optclip clip_by_leaf_norm": lambda: optclip.clip_by_leaf_norm(1e-3),
    "optclip adagc": lambda: optclip.adagc(),
    "optclip autoclip per leaf": lambda: optclip.autoclip(measure=optclip.measures.leaf_norm),
}
OURS, FLOOR = "optclip clip_by_global_norm", "optax scale"
SLOW, SLOW_RULES = 2000, 1000  # beyond so many leaves the compile time of all but these two is a minute and more


def measure(tree, rounds):
    calls, compiler = {}, {}
    for name, make in MAKERS.items():
        if len(tree) > (SLOW if "norm" in name else SLOW_RULES) and name not in (OURS, FLOOR):
            continue
        tx = make()
        state = tx.init(tree)
        program, compiler[name] = build(lambda s, g, tx=tx: tx.update(g, s, g)[::-1], state, tree, carry=1)
        calls[name] = lambda program=program, state=state: program(state, tree)
    rows = interleave(calls, next(iter(calls)), rounds)
    for name, numbers in compiler.items():
        rows[name] |= numbers
    base = rows[next(iter(rows))]["trace + compile s"]
    for row in rows.values():
        row["compile ratio"] = row["trace + compile s"] / base
    return rows


def main() -> None:
    args = arguments(__doc__)
    counts = [10, 30] if args.quick else [10, 100, 1000, 2500, 5000]
    trees = {f"{n} leaves of 1,000": random_tree([(1000,)] * n) for n in counts}
    sizes = np.random.default_rng(0).integers(1, 5000, 20 if args.quick else 300)
    trees["300 leaves of mixed sizes"] = random_tree([(int(n),) for n in sizes])
    trees["GPT-2, 148 leaves"] = random_tree(gpt2_shapes(32, 2, 64, 16) if args.quick else gpt2_shapes())
    result = {}
    for title, tree in trees.items():
        result[title] = measure(tree, args.rounds)
        show(title, result[title], ["ms", "ratio", "trace s", "compile s", "compile ratio", "fusions"])
        jax.clear_caches()
    save("leaves", result, args)


if __name__ == "__main__":
    main()
