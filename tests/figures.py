"""The figure of README.md, from results.jsonl of tests/tables.py. Needs matplotlib, which requirements.txt leaves out.

    python tests/figures.py --results tests/results/results.jsonl --out tests/results

laptop.png: over the steps of a run, the reward model's accuracy beside that of the initial one, and the gold reward of
the policy's responses, SAVE beside the frozen RM; one row of panels a world. Lines are means over seeds, bands one
standard error of them.
"""
import argparse
import statistics
import sys
from pathlib import Path

from tables import BLOCK, read_results

STYLES = {  # a line of its own for each: they survive greyscale
    "frozen RM": {"color": "#9a9a9a", "ls": "-"}, "HL-BT": {"color": "#7aa6c2", "ls": "--"},
    "centred": {"color": "#d1495b", "ls": ":", "lw": 2}, "SAVE": {"color": "black", "ls": "-", "lw": 2}}
WORLDS = {"few": "few labels, right or wrong", "graded": "graded quality"}

def band(axes, name, x, runs):
    """The mean of `runs`, equally long lists of numbers, and a band of one standard error."""
    means = [statistics.mean(column) for column in zip(*runs)]
    errors = [statistics.stdev(column) / len(column) ** 0.5 if len(column) > 1 else 0 for column in zip(*runs)]
    axes.plot(x, means, label=name, **{"lw": 1.4, **STYLES[name]})
    axes.fill_between(x, [m - e for m, e in zip(means, errors)], [m + e for m, e in zip(means, errors)],
                      color=STYLES[name]["color"], alpha=0.15, lw=0)

def draw(plt, results):
    """A row of two panels for each of WORLDS."""
    figure, panels = plt.subplots(len(WORLDS), 2, figsize=(8.4, 5.6), squeeze=False)
    for (accuracy, gold), (world, title) in zip(panels, WORLDS.items()):
        for name in filter(results[world].get, STYLES):
            runs = results[world][name].values()
            curves = [{int(step): x for step, x in run["accuracy"].items()} for run in runs]
            band(accuracy, name, list(curves[0]), [[x - curve[0] for x in curve.values()] for curve in curves])
            golds = [run["gold_curve"] for run in runs]
            band(gold, name, [BLOCK * i + BLOCK / 2 for i in range(len(golds[0]))], golds)
        accuracy.set_title(f"{title}: RM accuracy minus initial RM's (points)", fontsize=9)
        gold.set_title(f"{title}: gold of the policy's samples (%)", fontsize=9)
        for axes in (accuracy, gold):
            axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, handlelength=3.5)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure

def main(argv=None):
    """Read results.jsonl, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", help="results.jsonl of tables.py; by default the one under --out")
    parser.add_argument("--out", default="runs/map")
    args = parser.parse_args(argv)
    results = Path(args.results or Path(args.out, "results.jsonl"))
    try:
        import matplotlib
    except ImportError:
        sys.exit("figures: matplotlib is not installed: pip install matplotlib")
    if not results.is_file():
        sys.exit(f"figures: --results {results}: no such file, expected results.jsonl of run.sh tables quality")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    Path(args.out).mkdir(parents=True, exist_ok=True)
    draw(plt, read_results(results)).savefig(Path(args.out, "laptop.png"), dpi=110)
    print(Path(args.out, "laptop.png"))

if __name__ == "__main__":
    main()
