"""The figures of tests/results/README.md from results.jsonl.

Needs matplotlib, which requirements.txt leaves out.

    python tests/figures.py --results runs/tables/results.jsonl --out runs/tables

accuracy.png     the reward model's accuracy over training steps, beside that of the initial RM, one panel a world
diagnostics.png  what explains it: reward spread, value bias, kept and valid fractions, purity of Y+ and Y- against gold
Lines are means over seeds, bands one standard error of them.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

STYLES = {  # colours of falling luminance, and a line or marker of its own for each: they survive greyscale
    "continual offline": {"color": "#c9b458", "ls": "-", "marker": "s"},
    "HL-BT": {"color": "#7aa6c2", "ls": "--", "marker": "^"},
    "Mean Reward": {"color": "#d1495b", "ls": ":", "marker": "v"},
    "SAVE": {"color": "black", "ls": "-", "marker": "o", "lw": 2},
    "SAVE w/o curriculum": {"color": "#9a9a9a", "ls": "-.", "marker": None},
    "SAVE w/o policy optimisation": {"color": "#6b8e4e", "ls": (0, (6, 2)), "marker": None},
    "balanced loss": {"color": "#2a6f4e", "ls": "-", "marker": "D"},
    "balanced, ensemble labels": {"color": "#4b2e83", "ls": "--", "marker": "P"},
}
PANELS = {"reward_spread": "reward spread within a group (SD)", "value_bias": "V minus group mean",
          "kept": "kept fraction of responses", "valid": "valid fraction of prompts (B~)",
          "positive_purity": "share of Y+ that is right (gold 1)",
          "negative_purity": "share of Y- that is wrong (gold 0)"}
DIAGNOSED = ("SAVE", "Mean Reward", "SAVE w/o policy optimisation", "balanced loss")


def read_results(file):
    """results.jsonl of tables.py, a line a run -> {table: {world: {"seeds", "flags", "rows": {method: [run]}}}}."""
    tables = {}
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        world = tables.setdefault(run.pop("table"), {}).setdefault(
            run.pop("world"), {"seeds": [], "flags": run["flags"], "rows": {}})
        seed = run.pop("seed")
        world["seeds"] += [seed] if seed not in world["seeds"] else []
        world["rows"].setdefault(run.pop("row"), []).append(run)
    return tables


def band(axes, name, x, runs, label=True):
    """The mean of `runs`, equally long lists of numbers, and a band of one standard error."""
    means = [statistics.mean(column) for column in zip(*runs)]
    errors = [statistics.stdev(column) / len(column) ** 0.5 if len(column) > 1 else 0 for column in zip(*runs)]
    style = {"lw": 1.4, "ms": 4, **STYLES[name]}
    axes.plot(x, means, label=name if label else None, **style)
    axes.fill_between(x, [m - e for m, e in zip(means, errors)], [m + e for m, e in zip(means, errors)],
                      color=style["color"], alpha=0.15, lw=0)


def accuracy_figure(plt, worlds):
    """Accuracy minus that of the same seed's initial RM: seeds differ more at the start than methods do later."""
    figure, panels = plt.subplots(1, len(worlds), figsize=(3.6 * len(worlds), 3.6), squeeze=False)
    for axes, (world, result) in zip(panels[0], worlds.items()):
        for name in filter(result["rows"].get, STYLES):
            curves = [{int(step): x for step, x in run["curves"]["accuracy"].items()} for run in result["rows"][name]]
            band(axes, name, list(curves[0]), [[curve[step] - curve[0] for step in curve] for curve in curves])
        axes.axhline(0, color="black", lw=0.6)
        axes.set_title(f"{world}, {len(result['seeds'])} seeds")
        axes.set_xlabel("SAVE step")
    panels[0][0].set_ylabel("RM accuracy minus initial RM (points)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, handlelength=3.5)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    return figure


def diagnostics_figure(plt, result, world):
    """Two rows of three panels, of one world."""
    figure, panels = plt.subplots(2, 3, figsize=(10.8, 5.8))
    for axes, (key, title) in zip(panels.flat, PANELS.items()):
        for name in filter(result["rows"].get, DIAGNOSED):
            series = [run["curves"][key] for run in result["rows"][name]]
            length = max(map(len, series))
            if length:
                full = [i for i in range(length) if all(i < len(one) and one[i] is not None for one in series)]
                band(axes, name, [10 * i + 5 for i in full], [[one[i] for i in full] for one in series])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("SAVE step")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, handlelength=3.5)
    figure.suptitle(f"{world} world, {len(result['seeds'])} seeds", fontsize=11)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def main(argv=None):
    """Read results.jsonl, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", help="results.jsonl of tables.py; by default the one under --out")
    parser.add_argument("--out", default="runs/tables")
    args = parser.parse_args(argv)
    results = Path(args.results or Path(args.out, "results.jsonl"))
    try:
        import matplotlib
    except ImportError:
        sys.exit("figures: matplotlib is not installed: pip install matplotlib")
    if not results.is_file():
        sys.exit(f"figures: --results {results}: no such file, expected results.jsonl of run.sh tables table1")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    worlds = read_results(results)["table1"]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    accuracy_figure(plt, worlds).savefig(out / "accuracy.png", dpi=110)
    first = next(iter(worlds))
    diagnostics_figure(plt, worlds[first], first).savefig(out / "diagnostics.png", dpi=110)
    print(f"{out / 'accuracy.png'}\n{out / 'diagnostics.png'}")


if __name__ == "__main__":
    main()
