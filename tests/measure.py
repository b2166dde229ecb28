"""What a run is worth, in numbers: read from its files, with 95 % intervals over prompts. report.py and tables.py share
it; `python tests/report.py RUN` prints it."""
import collections
import json
import math
import statistics
from pathlib import Path

import torch
import toy

NAMES = {"none": "frozen RM", "save": "SAVE", "mean_reward": "Mean Reward", "hl_bt": "HL-BT"}  # of --rm_update

def read_rows(file):
    """The rows of a .jsonl file, none if it is not there."""
    file = Path(file)
    return list(map(json.loads, file.read_text(encoding="utf-8").splitlines())) if file.is_file() else []

def world_task(data):
    """The task of a world's folder, for toy.gold; none if it is no world of ours."""
    file = Path(data, "world.json")
    world = json.loads(file.read_text()).get("world", "few") if file.is_file() else ""
    return toy.WORLDS[world].task if world in toy.WORLDS else None

def spans(seeds):
    """"1 to 3, 7": seeds in order, those that follow on each other together."""
    runs = []
    for seed in sorted(seeds):
        runs, run = (runs[:-1], runs[-1]) if runs and runs[-1][-1] == seed - 1 else (runs, [])
        runs.append([*run, seed])
    return ", ".join(" to ".join(map(str, dict.fromkeys([run[0], run[-1]]))) for run in runs)

class Logs:
    """metrics.jsonl and samples.jsonl of a run. task: of its world, which knows gold; without, rows have no gold."""

    def __init__(self, run, task=None):
        rows = read_rows(Path(run, "metrics.jsonl"))
        self.config, self.samples = rows[0]["config"], read_rows(Path(run, "samples.jsonl"))
        self.name = NAMES.get(self.config["rm_update"], self.config["rm_update"])
        self.steps = [row for row in rows if "step" in row and row["stage"] != "value"]
        end = next((row for row in reversed(rows) if "closing" in row), {"closing": {}, "try": []})
        self.words = [f"{name}: {first:.3g}, in the last quarter {last:.3g}" for name, (first, last)
                      in end["closing"].items()] + end["try"]
        self.last = max((row["step"] for row in self.steps), default=0)
        golds = [toy.gold(row["prompt"][-1]["content"], row["response"], task) for row in self.samples] if task else []
        level = 0.5 if {*golds} <= {0, 1} else statistics.mean(golds)  # the labels of graded answers: above the mean
        self.groups = {}  # (step, prompt) -> rows
        for i, row in enumerate(self.samples):
            row.update({"gold": golds[i]} if golds else {})
            row.update({"right": (golds[i] >= level) == (row["side"] == "+")} if golds and row["side"] else {})
            self.groups.setdefault((row["step"], row["prompt"][-1]["content"]), []).append(row)

    def accuracy(self):
        """{step: {held-out set: accuracy in %}} of the steps that were tested."""
        found = {row["step"]: {key.removeprefix("accuracy_").removeprefix("heldout_"): x for key, x in row.items()
                               if key.startswith("accuracy_")} for row in self.steps}
        return {step: row for step, row in found.items() if row}

    def mean_accuracy(self):
        """{step: the mean over held-out sets}."""
        return {step: statistics.mean(row.values()) for step, row in self.accuracy().items()}

    def curve(self, rows, column, scale=1):
        """[(step, mean of a column)] of about 16 blocks of steps, each at its middle, from the rows that have it."""
        every = max(1, math.ceil(self.last / 16))
        means = blocks([(row["step"], scale * row[column]) for row in rows if row["step"] and column in row], every)
        return [(every * block + (every + 1) / 2, x) for block, x in means.items()]

    def ends(self):
        """{"1 to 8": [(V, mean reward)] of the groups of the first tenth of the steps, "73 to 80": of the last}."""
        tenth, found = max(1, self.last // 10), {}
        for first, last in ((1, tenth), (self.last - tenth + 1, self.last)):
            groups = [[row for row in rows if not row["truncated"]] for (step, _), rows in self.groups.items()
                      if first <= step <= last]
            found[f"{first} to {last}"] = [(rows[0]["value"], statistics.mean(row["reward"] for row in rows))
                                           for rows in groups if rows]
        return {steps: points for steps, points in found.items() if points}

    def telling(self):
        """Four steps, two groups each: of the two prompts that come most often, if both come four times; else of a step
        that with the most set aside, then the most different responses, and another with the most even split."""
        often = collections.Counter(prompt for _, prompt in self.groups).most_common(2)
        if len(often) == 2 and often[1][1] >= 4:
            of = [sorted(step for step, prompt in self.groups if prompt == name) for name, _ in often]
            return [(steps[i * (len(steps) - 1) // 3], name) for i in range(4) for steps, (name, _) in zip(of, often)]
        chosen, steps = [], sorted({step for step, _ in self.groups})
        for step in (steps[i * (len(steps) - 1) // 3] for i in range(4)):
            sides = {key: [row["side"] for row in rows] for key, rows in self.groups.items() if key[0] == step}
            texts = {key: len({row["response"] for row in self.groups[key]}) for key in sides}
            chosen.append(max(sides, key=lambda key: (sides[key].count(""), texts[key])))
            chosen.append(max(sides, key=lambda key: (key != chosen[-1], min(map(sides[key].count, "+-")))))
        return chosen

def r2(points):
    """Share of the variance of the group means that V explains, below 0: less than their mean does. [(V, mean)]."""
    mean = statistics.mean(m for _, m in points)
    variance = sum((m - mean) ** 2 for _, m in points)
    return 1 - sum((m - v) ** 2 for v, m in points) / variance if variance else 0.0

def blocks(points, every=10):
    """[(step, number)] -> {0: the mean of the first `every` steps, 1: of the next, ...}, of those that have any."""
    by_block = {}
    for step, x in points:
        by_block.setdefault((step - 1) // every, []).append(float(x))
    return {block: statistics.mean(numbers) for block, numbers in sorted(by_block.items())}

def right_pairs(file):
    """scores.jsonl of eval.py -> {reward model: {held-out set: (prompts, (n,) 1 where chosen is ahead)}}."""
    right, prompts = {}, {}
    for row in read_rows(file):
        name = Path(row["bench"]).stem.removeprefix("heldout_")
        prompts[name] = prompts.get(name) or toy.read_prompts(row["bench"])
        right.setdefault(row["rm"], {}).setdefault(name, []).append(row["score_chosen"] > row["score_rejected"])
    return {rm: {name: (prompts[name], torch.tensor(pairs).double()) for name, pairs in sets.items()}
            for rm, sets in right.items()}

def changes(before, after):
    """Of two such {set: (prompts, numbers)}: a list of (prompts, differences)."""
    return [(prompts, after[name][1] - numbers) for name, (prompts, numbers) in before.items()]

def interval(sets, draws=2000):
    """95 % bootstrap interval of the mean over sets of their mean change, in points.
    sets: [(n prompts, their n changes)]. Prompts are drawn again, each with its pairs in all sets (onp and neu share
    prompts), among those that are in the same sets."""
    rows = {prompt: i for i, prompt in enumerate(dict.fromkeys(p for prompts, _ in sets for p in prompts))}
    table = torch.zeros(2, len(rows), len(sets), dtype=torch.double)  # sums and counts
    for i, (prompts, change) in enumerate(sets):
        of = torch.tensor([rows[prompt] for prompt in prompts])
        table[0, :, i].index_add_(0, of, change)
        table[1, :, i].index_add_(0, of, torch.ones_like(change))
    generator, totals = torch.Generator().manual_seed(0), 0
    kinds, kind_of = (table[1] > 0).unique(dim=0, return_inverse=True)
    for kind in range(len(kinds)):
        members = table[:, kind_of == kind]
        drawn = torch.randint(members.shape[1], (draws, members.shape[1]), generator=generator)
        times = torch.zeros(drawn.shape, dtype=torch.double).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
        totals = totals + times @ members
    means = (totals[0] / totals[1]).mean(1)
    return (100 * means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype))).tolist()

def change_and_interval(sets):
    """"+1.81 [+1.32, +2.30]": the mean over sets of their mean change in points, and its interval."""
    low, high = interval(sets)
    return f"{100 * statistics.mean(x.mean().item() for _, x in sets):+.2f} [{low:+.2f}, {high:+.2f}]"

def verdict(what, sets, than=""):
    """The start of a sentence: better or worse only where the interval of the mean leaves 0 out."""
    low, high = interval(sets)
    how = "got better" if low > 0 else "got worse" if high < 0 else "did not clearly change"
    if than:
        how = f"is {'better than' if low > 0 else 'worse than' if high < 0 else 'not clearly different from'} {than}"
    return f"{what} {how}: {change_and_interval(sets)} points"

def trend(values):
    """Numbers as block characters from their lowest to their highest, then the first and the last number."""
    low, high = min(values), max(values)
    marks = "".join("▁▂▃▄▅▆▇█"[round(7 * (x - low) / (high - low)) if high > low else 3] for x in values)
    return f"{marks}  {values[0]:.2f} to {values[-1]:.2f}"

def report(data, run, control):
    """Print what a run of save.py on the world `data` changed, beside the same run with the frozen RM, `control`. eval/
    of `data` and `run` is eval.py's of their reward models."""
    logs, task, prompts = Logs(run), world_task(data), toy.read_prompts(Path(data, "prompts_test.jsonl"))
    [before], [after] = (right_pairs(Path(folder, "eval", "scores.jsonl")).values() for folder in (data, run))
    golds = [toy.golds(Path(folder, "policy"), prompts, task=task) for folder in (data, control, run)]
    rows = [(f"RM accuracy, {key}", [sets[key] for sets in (before, before, after)]) for key in before]
    rows += [(f"policy gold reward, {key}", [(prompts, gold[key].mean(1)) for gold in golds]) for key in golds[0]]
    lines = [(label, [100 * x.mean().item() for _, x in columns], [(columns[1][0], columns[2][1] - columns[1][1])])
             for label, columns in rows]
    means = [statistics.mean(line[1][i] for line in lines[:len(before)]) for i in range(3)]
    lines.insert(len(before), ("RM accuracy, mean", means, changes(before, after)))
    print(f"\n{'%':<28}{'before':>8}{logs.name:>13}{'frozen RM':>11}   minus frozen RM, 95 % interval, paired")
    for label, (first, frozen, last), sets in lines:
        print(f"{label:<28}{first:>8.2f}{last:>13.2f}{frozen:>11.2f}   {change_and_interval(sets)}")
    accuracy = logs.mean_accuracy()
    bias = [(row["step"], row["value_bias"]) for row in logs.steps if "value_bias" in row]
    print(f"\nRM accuracy at steps {', '.join(map(str, accuracy))}:  {trend(list(accuracy.values()))}")
    if bias:
        every = math.ceil(len(bias) / 10)
        print(f"V minus group mean, {every} steps a block:  {trend([*blocks(bias, every).values()])}")
    learned = torch.cat([x for _, x in changes(before, after)])
    print(f"\n{verdict('The reward model', changes(before, after))};\nof {len(learned)} held-out pairs "
          f"{int((learned > 0).sum())} became right and {int((learned < 0).sum())} wrong.")
    print(verdict("The policy's sampled gold", lines[-2][2], "that on the frozen RM") + ".\n"
          "Intervals are over prompts: another seed trains another reward model and another policy.\n"
          f"In {run}: rm/, policy/, metrics.jsonl, samples.jsonl, eval/ and its table eval.txt")
