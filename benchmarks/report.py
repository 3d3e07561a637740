"""Renders the result files: the tables of the README, and a picture.

Text between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->`` in the README is replaced by the table NAME.

    python -m benchmarks.report             # rewrites README.md and docs/benchmarks.png
    python -m benchmarks.report --print     # prints the tables
"""

import argparse
import json
import operator
import pathlib
import re
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks._harness import RESULTS

ROOT = pathlib.Path(__file__).parents[1]
GPT2 = "GPT-2 124M, float32"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(r)} |" for r in rows)])


def _x(value: Any) -> str:
    return "–" if value is None or value != value else f"{value:.2f}×"


OURS, PEER = "optclip clip_by_global_norm", "optax clip_by_global_norm"
AGC, PEER_AGC = "optclip adaptive_grad_clip", "optax adaptive_grad_clip"
GOALS = ["what", "to reach", "optclip", "optax"]


def over(rows: dict[str, Any], a: str, b: str, column: str = "ms by round") -> str:
    """``a`` over ``b``; of the times the median of the ratios round by round, for a machine's speed drifts."""
    over, under = rows[a][column], rows[b][column]
    return _x(statistics.median(map(operator.truediv, over, under)) if isinstance(over, list) else over / under)


def floor(results: dict[str, Any]) -> str:
    """The clip against its floor and its peers, on the shapes of GPT-2 124M."""
    result = results["floor"]["result"]
    alone, behind = result[GPT2]["standalone"], result[GPT2]["with adamw"]
    bf16 = result["GPT-2 124M, bfloat16"]
    torch = "torch clip_grad_norm_ (foreach)"
    step, temp = "clip + adamw, against adamw + one read of the gradient", "temporary memory, of the gradient's size"
    rows = [
        [step, "≤ 1.05×", _x(behind[f"{OURS} + adamw"]["of floor"]), _x(behind[f"{PEER} + adamw"]["of floor"])],
        ["standalone global-norm clip, against optax", "≤ 1.0×", over(alone, OURS, PEER), "1"],
        ["AGC: time", "≤ 0.8×", over(alone, AGC, PEER_AGC), "1"],
        ["AGC: bytes accessed", "≤ 0.8×", over(alone, AGC, PEER_AGC, "bytes"), "1"],
        ["AGC: trace + compile", "≤ 1.0×", over(alone, AGC, PEER_AGC, "trace + compile s"), "1"],
        ["speed of the max-norm pass, of the L2 pass", "≥ 0.8×", over(alone, "norm, ord=2", "norm, ord=inf"), "–"],
        [temp, "< 1 %", f"{alone[OURS]['temp / gradient']:.2%}", f"{alone[PEER]['temp / gradient']:.2%}"],
        ["bfloat16: standalone clip", "–", over(bf16["standalone"], OURS, PEER), "1"],
        ["bfloat16: AGC: time", "–", over(bf16["standalone"], AGC, PEER_AGC), "1"],
        ["bfloat16: AGC: bytes accessed", "–", over(bf16["standalone"], AGC, PEER_AGC, "bytes"), "1"],
        [
            "bfloat16: speed of the norm, of memory",
            "≥ 0.9×",
            _x(bf16["memory"]["read"]["ms"] / bf16["standalone"]["norm, ord=2"]["ms"]),
            "–",
        ],
    ]
    if torch in alone:
        rows.insert(2, ["… against torch foreach", "≤ 1.0×", over(alone, OURS, torch), over(alone, PEER, torch)])
    return table(GOALS, rows)


def leaves(results: dict[str, Any]) -> str:
    """What many leaves cost, and a rule per leaf."""
    result = results["leaves"]["result"]
    thousand, gpt2 = result["1000 leaves of 1,000"], result["GPT-2, 148 leaves"]
    half, whole = (result[f"{n} leaves of 1,000"] for n in (2500, 5000))
    both, scale = "trace + compile s", "optax scale"
    growth = lambda name: _x(whole[name][both] / half[name][both])
    rows = [
        ["1,000 leaves of 1,000 elements: trace + compile", "≤ 0.35×", over(thousand, OURS, PEER, both), "1"],
        ["1,000 leaves of 1,000 elements: run", "≤ 0.6×", over(thousand, OURS, PEER), "1"],
        ["… of a program that only scales them", "–", "–", over(thousand, scale, PEER)],
        ["5,000 leaves against 2,500: trace + compile", "2× (linear)", growth(OURS), "not measured"],
        ["… of a program that only scales them", "–", "–", growth(scale)],
        ["GPT-2's 148 leaves: trace + compile", "≤ 1.0×", over(gpt2, OURS, PEER, both), "1"],
        ["AdaGC on 148 leaves, against our global-norm clip", "≤ 1.1×", over(gpt2, "optclip adagc", OURS), "–"],
        ["AutoClip per leaf on 148 leaves", "≤ 1.1×", over(gpt2, "optclip autoclip per leaf", OURS), "–"],
        ["AdaGC on 1,000 leaves", "≤ 1.1×", over(thousand, "optclip adagc", OURS), "–"],
        ["AutoClip per leaf on 1,000 leaves", "≤ 1.1×", over(thousand, "optclip autoclip per leaf", OURS), "–"],
        ["AdaGC on 148 leaves: trace + compile", "–", over(gpt2, "optclip adagc", OURS, both), "–"],
    ]
    return table(GOALS, rows)


def steps(results: dict[str, Any]) -> str:
    """A training step with each clipper, against the same step without."""
    result = results["step"]["result"]
    names = list(next(iter(result.values())))
    rows = []
    for name in names[1:]:
        cells = [f"{_x(model[name]['ratio'])} / {_x(model[name]['compile ratio'])}" for model in result.values()]
        rows.append([f"`{name}`", *cells])
    return table(["run / compile time, against no clipping", *result], rows)


def mesh(results: dict[str, Any]) -> str:
    result = results["mesh"]["result"]
    rows = [[title, *(f"{row['all-reduces']:.0f}" for row in case.values())] for title, case in result.items()]
    return table(["all-reduces in the program", *next(iter(result.values()))], rows)


def per_example(results: dict[str, Any]) -> str:
    """Time and memory of per-example clipping, against a plain gradient."""
    result = results["per_example"]["result"]
    columns = list(dict.fromkeys(name for case in result.values() for name in case if name != "plain gradient"))
    cell = lambda row: f"{_x(row.get('ratio'))} / {_x(row.get('memory ratio'))}" if row else "–"
    rows = [[title, *(cell(case.get(name)) for name in columns)] for title, case in result.items()]
    return table(["time / memory, against a plain gradient", *columns], rows)


def gpu(results: dict[str, Any]) -> str:
    """What a clip costs on a GPU, by size of the network: times of one step, speeds and fusions."""
    rows, torch = [], "torch clip_grad_norm_ (foreach)"
    for size, case in results["floor"]["result"].items():
        memory, alone, behind = (case[name] for name in ("memory", "standalone", "with adamw"))
        ms = lambda name, rows=alone: f"{rows[name]['ms']:.2f} ms"
        both = lambda name, ms=ms, rows=alone: f"{ms(name)}, {rows[name]['fusions']} fusions"
        speed = lambda name, rows=alone, read=memory["read"]["ms"]: _x(read / rows[name]["ms"])
        step = lambda name, rows=behind, ms=ms: (
            f"{ms(f'{name} + adamw', rows)}, {_x(rows[f'{name} + adamw']['of floor'])}"
        )
        rows += [
            [f"{size}: global-norm clip", "≤ 1.0× optax", both(OURS), both(PEER)],
            ["… in front of adamw, of adamw + one read", "≤ 1.05×", step(OURS), step(PEER)],
            ["… adamw alone", "–", ms("adamw", behind), ms("adamw", behind)],
            ["… speed of the norm, of memory", "≥ 0.9×", speed("norm, ord=2"), speed("optax global_norm")],
        ]
        if "norm, ord=inf" in alone:
            largest = over(alone, "norm, ord=2", "norm, ord=inf")
            rows.append(["… speed of the max-norm pass, of the L2 pass", "≥ 0.8×", largest, "–"])
        if torch in alone:
            rows.append(
                [f"… against torch foreach, {ms(torch)}", "≤ 1.0×", over(alone, OURS, torch), over(alone, PEER, torch)]
            )
        if AGC in alone:  # only the global norm is measured at every size
            rows += [
                ["… AGC", "≤ 0.8× optax", both(AGC), both(PEER_AGC)],
                ["… AGC: bytes accessed", "≤ 0.8×", over(alone, AGC, PEER_AGC, "bytes"), "1"],
                ["… AGC: trace + compile", "≤ 1.0×", over(alone, AGC, PEER_AGC, "trace + compile s"), "1"],
                ["… AGC in front of adamw, of adamw + one read", "–", step(AGC), step(PEER_AGC)],
                ["… a norm per leaf", "–", both("optclip clip_by_leaf_norm"), "–"],
                ["… value clip", "≤ 1.0× optax", both("optclip clip"), both("optax clip")],
            ]
    return table(GOALS, rows)


# The table, the sections it is made of, and the device whose results it shows.
TABLES: dict[str, tuple[Callable[[dict[str, Any]], str], set[str], str]] = {
    "floor": (floor, {"floor"}, "cpu"),
    "leaves": (leaves, {"leaves"}, "cpu"),
    "steps": (steps, {"step"}, "cpu"),
    "mesh": (mesh, {"mesh"}, "cpu"),
    "per_example": (per_example, {"per_example"}, "cpu"),
    "gpu": (gpu, {"floor"}, "h200"),
}


def read(folder: pathlib.Path = RESULTS) -> dict[str, Any]:
    """The results of each device."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def rendered(results: dict[str, Any]) -> dict[str, str]:
    """Every table whose sections were measured."""
    return {
        name: render(results[device])
        for name, (render, sections, device) in TABLES.items()
        if sections <= set(results.get(device, ()))
    }


def picture(results: dict[str, Any], path: pathlib.Path) -> None:
    """Compile time over the number of leaves, and the run time of every method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), constrained_layout=True)
    cases = {k: v for k, v in results["leaves"]["result"].items() if k.endswith("of 1,000")}
    counts = {title: int(title.split()[0]) for title in cases}
    for name, color in {
        "optax clip_by_global_norm": "#d55e00",
        "optclip clip_by_global_norm": "#0072b2",
        "optclip adagc": "#009e73",
        "optax scale": "0.6",
    }.items():
        points = [(counts[t], rows[name]["trace + compile s"]) for t, rows in cases.items() if name in rows]
        left.plot(*zip(*points, strict=True), "o-", color=color, label=name)
    left.set(xscale="log", yscale="log", xlabel="leaves of 1,000 elements", ylabel="trace + compile, seconds")
    left.set_title("Compile time over the number of leaves")
    left.legend(frameon=False)
    methods = results["methods"]["result"]["every method"]
    order = sorted(methods, key=lambda name: methods[name]["ratio"])
    right.barh(range(len(order)), [methods[name]["ratio"] for name in order], color="#0072b2", height=0.7)
    right.set_yticks(range(len(order)), order, fontsize=7)
    right.axvline(1, color="0.5", lw=1, ls=":")
    right.set(xlabel="run time, as a multiple of clip_by_global_norm", title="Every method", ylim=(-1, len(order)))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def rewrite(readme: str, tables: dict[str, str]) -> str:
    """The README with each table in its place."""
    for name, text in tables.items():
        pattern = rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)"
        readme = re.sub(pattern, lambda m, text=text: m[1] + text + "\n" + m[2], readme, flags=re.S)
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    results = read(args.results)
    tables = rendered(results)
    if args.print:
        for name, text in tables.items():
            print(f"\n{name}\n\n{text}")
        return
    readme = ROOT / "README.md"
    readme.write_text(rewrite(readme.read_text(), tables))
    if {"leaves", "methods"} <= set(results.get("cpu", ())):
        picture(results["cpu"], ROOT / "docs" / "benchmarks.png")
    print("README.md is up to date")


if __name__ == "__main__":
    main()
