"""What does each method cost, against the static global norm?

Every public transformation of the table of cases that takes a plain gradient, on a transformer-like tree, jitted.

Typical answer on a CPU: one size for all leaves costs what the static clip costs; a size per leaf up to 1.6 times that;
a memory per element reads and writes that memory besides.

    python -m benchmarks.methods
"""

import jax

from benchmarks._harness import arguments, build, gpt2_shapes, interleave, random_tree, save, show
from tests.cases import CASES


def main() -> None:
    args = arguments(__doc__)
    tree = random_tree(gpt2_shapes(32, 2, 64, 16) if args.quick else gpt2_shapes(256, 6, 8192, 256))
    calls, compiler = {}, {}
    for case in CASES:
        tx = case.make()
        state = tx.init(tree)

        def update(g, s, tx=tx):
            return tx.update(g, s, g, value=0.0)

        program, compiler[case.name] = build(update, tree, state, donate=(1,))
        carried = [jax.tree.map(lambda x: x.copy() if hasattr(x, "copy") else x, state)]

        def call(program=program, carried=carried):
            updates, carried[0] = program(tree, carried[0])
            return updates

        calls[case.name] = call
    rows = interleave(calls, "clip_by_global_norm", args.rounds)
    for name, numbers in compiler.items():
        rows[name] |= numbers | {"bytes ratio": numbers["bytes"] / compiler["clip_by_global_norm"]["bytes"]}
    show("every method", rows, ["ms", "ratio", "bytes ratio", "fusions", "compile s"])
    save("methods", {"every method": rows}, args)


if __name__ == "__main__":
    main()
