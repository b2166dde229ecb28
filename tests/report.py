"""What a run of save.py did: its picture, one SVG file for any browser, and of a run of run.sh the numbers.

    python tests/report.py RUN                                   # writes RUN/report.svg, of any run
    python tests/report.py RUN --control FROZEN --world DIR      # beside the frozen RM: what run.sh does
    python tests/report.py RUN --svg tests/results/laptop.svg    # the picture elsewhere

Gold is that of the world (tests/toy.py) in the folder of the run's --prompts, or --world; elsewhere nobody knows it.
"""
import argparse
import math
import textwrap
from pathlib import Path

from measure import Logs, r2, report, world_task
from svg import BLUE, FONTS, GREEN, GREY, INK, ORANGE, SOFT, YELLOW, Panel, around, bold, clean, tag, text

import save

SIDES = {"+": ("Y+", BLUE), "-": ("Y-", ORANGE), "": ("set aside", GREY)}

def learned(top, run, control):
    """RM accuracy, and gold of the responses (their reward where gold is unknown), over the steps."""
    gold, curves, parts = any("gold" in row for row in run.samples), ({}, {}), []
    for logs, style in ((control, (SOFT, "6 4")), (run, (BLUE, "none")))[control is None:]:
        flat = dict.fromkeys((0, run.last), run.mean_accuracy().get(0)) if logs.name == "frozen RM" else {}
        points = logs.curve(logs.samples, *(("gold", 100) if gold else ("reward",)))
        for found, points in zip(curves, (list((logs.mean_accuracy() or flat).items()), points)):
            found |= {logs.name: (*style, points)} if points and points[0][1] is not None else {}
    titles = "RM accuracy on held-out pairs, %", "gold of the responses, %" if gold else "reward of the responses"
    for x, title, found in zip((60, 560), titles, curves):
        if found:
            ys = around([y for *_, points in found.values() for _, y in points])
            panel = Panel(x, top + 30, 300, 170, (0, run.last or 1), ys)
            parts += panel.axes(title, "step") + panel.curves(found)
    return 270 if parts else 0, parts

def group(panel, rows, mu):
    """A group of responses: dots on the line of rewards, V, and the band in which the filter sets aside."""
    value, half = rows[0]["value"], math.log(mu / (1 - mu))
    left, right = (min(max(panel.at(x)[0], panel.x), panel.x + panel.width) for x in (value - half, value + half))
    parts = [tag("rect", class_="band", x=left, y=panel.y, width=right - left, height=panel.height, fill=YELLOW),
             tag("path", d=f"M{panel.x} {panel.y + panel.height}h{panel.width}", stroke=GREY),
             tag("path", class_="anchor", d=f"M{panel.at(value)[0]:.1f} {panel.y}v{panel.height}", stroke=INK)]
    places = []  # (x, level): dots that would hide each other are stacked
    for x in (panel.at(row["reward"])[0] for row in rows):
        taken = {level for other, level in places if abs(other - x) < 11}
        places.append((x, min({*range(len(rows))} - taken)))
    step = min(10, (panel.height - 16) / (1 + max(level for _, level in places)))
    for row, (x, level) in zip(rows, places):
        gold, (side, colour) = row.get("gold") == 1, SIDES[row["side"]]
        said = f"R {row['reward']:.2f}, {side}{', gold' * gold}: {row['response']}"
        parts.append(tag("circle", tag("title", clean(said)), class_="ring" if gold else "dot", cx=x, r=5, fill=colour,
                         cy=panel.y + panel.height - 8 - level * step, stroke=INK if gold else "#fff",
                         stroke_width=2 if gold else 1))
    return parts

def microscope(top, run):
    """Eight groups, four steps down."""
    groups = [(key, sorted(run.groups[key], key=lambda row: row["reward"])) for key in run.telling()]
    xs = around([row[name] for _, rows in groups for row in rows for name in ("reward", "value")])
    parts = [bold(60, top, "The method under the microscope", 16), text(
        60, top + 20, "A dot: a response, at its reward R before the update. The line: V, the anchor. Shaded: nearer "
        "to V than the threshold, set aside.", fill=SOFT)]
    legend = [*SIDES.values()] + [("ringed: right by gold, which the method does not see", "#fff")] * (
        "gold" in run.samples[0])
    for x, (name, colour) in zip((66, 126, 186, 286), legend):
        parts += [tag("circle", cx=x, cy=top + 41, r=5, fill=colour, stroke=INK if colour == "#fff" else colour,
                      stroke_width=2), text(x + 11, top + 45, name)]
    for i, ((step, prompt), rows) in enumerate(groups):
        panel, right = Panel(60 + 480 * (i % 2), top + 86 + 82 * (i // 2), 420, 50, xs), [
            row["right"] for row in rows if "right" in row]
        parts += [text(panel.x, panel.y - 7, f"step {step}: {' '.join(prompt.split())[:40]}" + (
            f", {sum(right)} of {len(right)} labels right" if right else "")), *panel.axis("reward R" if i > 5 else "")]
        parts += group(panel, rows, save.curriculum_threshold(step, run.config["steps"], run.config["m0"]))
    return 450, parts

def anchor(top, run):
    """V against the group means in the first and the last tenth; what was kept, valid and right in between."""
    ends, parts = run.ends(), []
    span = around([x for points in ends.values() for point in points for x in point])
    for x, (steps, points) in zip((60, 360), ends.items()):
        panel = Panel(x, top + 30, 210, 210, span, span)
        parts += [*panel.axes(f"group mean by V, steps {steps}", "V"),
                  tag("path", d=f"M{x} {top + 240}l210 -210", stroke=SOFT, stroke_dasharray="4 4"),
                  text(x + 8, top + 48, f"R2 {r2(points):.2f}", font_weight="bold")]
        parts += [tag("circle", class_="mean", cx=a, cy=b, r=2.5, fill=BLUE) for a, b in
                  (panel.at(*point) for point in points[::1 + len(points) // 200])]
    curves = {"kept": (SOFT, "6 4", run.curve(run.steps, "kept", 100)),
              "valid": (GREEN, "2 3", run.curve(run.steps, "valid", 100)),
              "labels right": (BLUE, "none", run.curve(run.samples, "right", 100))}
    panel = Panel(660, top + 30, 210, 210, (0, run.last), (0, 105))
    parts += panel.axes("% of responses, groups, labels", "step")
    return 310, parts + panel.curves({name: row for name, row in curves.items() if row[2]})

def picture(run, control=None):
    """The whole page; what the run has no numbers for is left out."""
    head = f"{run.name}: {run.last} steps of {run.config['batch']} prompts x {run.config['group']} responses"
    height, parts = learned(70, run, control)
    parts, top = [bold(60, 40, head, 20), *parts], 70 + height
    for draw in (microscope, anchor) if any(row["side"] == "-" for row in run.samples) else ():
        height, drawn = draw(top, run)
        top, parts = top + height, parts + drawn
    for line in (line for words in run.words for line in textwrap.wrap(words, 125)):
        parts, top = [*parts, text(60, top, line)], top + 20
    parts = [tag("title", clean(head)), tag("rect", width=1000, height=top, fill="#fff"), *parts]
    return tag("svg", "\n".join(parts), xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 1000 {top}", width=1000,
               height=top, font_family=FONTS)

def main(argv=None):
    """The numbers of a run that run.sh made, the picture, and as the last line its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--control", type=Path, help="the same run with --rm_update none")
    parser.add_argument("--world", type=Path, help="its folder; by default that of the prompts of the run")
    parser.add_argument("--svg", type=Path, help="by default RUN/report.svg")
    args = parser.parse_args(argv)
    folders = [folder for folder in (args.run, args.control) if folder]
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            parser.error(f"{folder}: no metrics.jsonl, expected --out of save.py")
    world = args.world or Path(Logs(args.run).config["prompts"]).parent
    evaluated = all((folder / "eval" / "scores.jsonl").is_file() for folder in (args.run, world))
    if args.control and evaluated and world_task(world):
        report(world, *folders)
    file = args.svg or args.run / "report.svg"
    file.write_text(picture(*(Logs(folder, world_task(world)) for folder in folders)) + "\n", encoding="utf-8")
    print(f"the picture of the run, for a browser: {file}")

if __name__ == "__main__":
    main()
