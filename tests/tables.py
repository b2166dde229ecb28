"""The paper's tables on the laptop world: every row a run of save.py or a fork, over fresh seeds, in parallel.

    python tests/tables.py table1 --out runs/tables                  # methods and ablations, three worlds
    python tests/tables.py table2 --out runs/tables                  # RL algorithms
    python tests/tables.py table3 --out runs/tables                  # the policy, R2M and PRIME among them
    python tests/tables.py sweeps --out runs/tables                  # group size, m0, learning rates
    python tests/tables.py table1 --out runs/tables --worlds noisy --seeds 10 11 --jobs 2

Each world and seed is built once; its value head is fitted once and shared by all rows; a row that is in several tables
is run once. results.jsonl holds every number of all tables so far, a line a run, results.md each table's mean and
standard error over seeds, the paired difference to the initial RM and the seeds that improved, and the paired
difference of the policy's gold reward to GRPO with the frozen RM. Seeds 0 to 2, and the reward model of seed 10, were
looked at when the world was made; none for what SAVE does on it.
"""
import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import toy
import transformers
from figures import read_results
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent / "forks")]
import balanced  # noqa: E402
import ensemble  # noqa: E402
import hl_bt  # noqa: E402
import offline  # noqa: E402
import prime  # noqa: E402
import r2m  # noqa: E402
import reinforce_pp  # noqa: E402

import save  # noqa: E402

SEEDS = [10, 11, 12, 13, 14, 15]
FROZEN = {"GRPO, frozen RM": ["--rm_update", "none"]}  # the first row of each table: its RM is the initial one
OTHERS = ["--lr_rm", "3e-5", "--label_rms", "{others}"]
ROWS = {  # {save}: the reward model that the row SAVE made; {others}: the two more that the world has on the same pairs
    "table1": {
        **FROZEN, "continual offline": ["tests/forks/offline.py"], "HL-BT": ["tests/forks/hl_bt.py"],
        "Mean Reward": ["--rm_update", "mean_reward"], "SAVE": [], "SAVE w/o curriculum": ["--m0", "0"],
        "SAVE w/o policy optimisation": ["--lr_policy", "0"],
        "GRPO, frozen RM of SAVE": ["--rm_update", "none", "--rm", "{save}"],
        "balanced loss": ["tests/forks/balanced.py"],
        "balanced, ensemble labels": ["tests/forks/ensemble.py", *OTHERS],
        "the same, policy frozen": ["tests/forks/ensemble.py", *OTHERS, "--lr_policy", "0"],
        "the ensemble itself": ["ensemble", "{others}"],
    },
    "table2": {
        **FROZEN, "SAVE with GRPO": [], "SAVE with RLOO": ["--algo", "rloo"],
        "SAVE with GSPO": ["--algo", "gspo", "--num_minibatches", "4"],
        "SAVE with REINFORCE++": ["tests/forks/reinforce_pp.py"],
    },
    "table3": {  # the policy
        **FROZEN, "REINFORCE++, frozen RM": ["tests/forks/reinforce_pp.py", "--rm_update", "none"],
        "PRIME": ["tests/forks/prime.py", "--lr_prm", "1e-5"], "R2M": ["tests/forks/r2m.py"], "SAVE": [],
        "GRPO, frozen RM of SAVE": ["--rm_update", "none", "--rm", "{save}"],
    },
    "sweeps": {
        **FROZEN, "SAVE": [], **{f"G = {g}": ["--group", str(g)] for g in (4, 16)},
        **{f"m0 = {m0}": ["--m0", m0] for m0 in ("0.3", "0.7")},
        **{f"RM learning rate x {x}": ["--lr_rm", rate] for x, rate in (("1/3", "3.3e-6"), ("3", "3e-5"))},
        **{f"value head learning rate x {x}": ["--lr_value", rate] for x, rate in (("1/5", "2e-4"), ("10", "1e-2"))},
        "Mean Reward, RM learning rate x 3": ["--rm_update", "mean_reward", "--lr_rm", "3e-5"],
    },
}
DIAGNOSTICS = ("reward_spread", "value_bias", "kept", "valid")  # of metrics.jsonl, kept for the figures
MAINS = {"save.py": save.main, "tests/toy.py": toy.main, **{f"tests/forks/{fork.__name__}.py": fork.main for fork in (
    balanced, ensemble, hl_bt, offline, prime, r2m, reinforce_pp)}}
BLOCK = 10  # steps that a point of a diagnostic is the mean of


def call(script, *words):
    """main() of one of our scripts in this process; its output goes to the file that error messages name."""
    log = Path(tempfile.gettempdir(), f"tables_{os.getpid()}.log")
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            MAINS[script](list(map(str, words)))
        except SystemExit as stop:
            raise RuntimeError(f"{script} {' '.join(map(str, words))}: exit code {stop.code}, see {log}") from None


def anchored(data, rm, out, args, seed):
    """The RM folder with a value head for the world's policy; fitted if it is not there."""
    if not (out / "rm" / "value_head.safetensors").is_file():
        call("save.py", "--stage", "value", "--rm", rm, "--policy", data / "policy", "--prompts",
             data / "prompts.jsonl", "--out", out, "--seed", seed, *toy.LAPTOP_FLAGS, *args.flags)
    return out / "rm"


def slug(flags):
    """A folder name for the flags of a row: the same flags, the same folder."""
    return "_".join(re.sub(r"[^\w.+-]", "", flag.removeprefix("--")) for flag in flags) or "save"


def run_row(data, flags, args, seed):
    """One row on one world and seed, kept in rows/SLUG/result.json.

    -> {"init", "after": accuracy by held-out set, "gold": the policy's by way of sampling, all in percent;
        "curves": {"accuracy": {step: mean over the sets}, diagnostic: [mean of each BLOCK steps]}}
    """
    out = data / "rows" / slug(flags)
    if (out / "result.json").is_file():
        return json.loads((out / "result.json").read_text())
    rm, heldout = anchored(data, data / "rm", data / "value", args, seed), sorted(data.glob("heldout_*.jsonl"))
    others = [data / f"rm_{k}" for k in (1, 2)]
    if flags[0:1] == ["ensemble"]:
        result = mean_of([data / "rm", *others], heldout)
    else:
        if "{others}" in flags:
            others = [anchored(data, path, data / path.name.replace("rm", "value"), args, seed) for path in others]
        script = flags[0] if flags[:1] and flags[0].endswith(".py") else "save.py"
        words = [word for flag in flags if flag != script for word in
                 (others if flag == "{others}" else [data / "rows" / "save" / "rm"] if flag == "{save}" else [flag])]
        call(script, "--stage", "save", "--rm", rm, "--policy", data / "policy", "--prompts", data / "prompts.jsonl",
             "--pairs", data / "pairs.jsonl", "--heldout", *heldout, "--out", out, "--seed", seed, "--resume",
             "--eval_every", 20, *toy.LAPTOP_FLAGS, *words, *args.flags)
        result = read_run(out)
    policy = out / "policy" if (out / "policy").is_dir() else data / "policy"
    gold = toy.gold_reward(policy, toy.read_prompts(data / "prompts_test.jsonl"))
    result["gold"] = {name: 100 * x for name, x in gold.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result))
    return result


def read_run(out):
    """Accuracies and diagnostics from the logs of a run."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    accuracy = {row["step"]: {key.removeprefix("accuracy_heldout_"): x for key, x in row.items()
                              if key.startswith("accuracy_")} for row in records if "step" in row}
    accuracy = {step: row for step, row in accuracy.items() if row}
    steps = [row for row in records if row.get("step")]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()] \
        if (out / "samples.jsonl").is_file() else []
    right = {"+": lambda row: true_reward(row) == 1, "-": lambda row: true_reward(row) == 0}
    series = {name: [(row["step"], row[name]) for row in steps if name in row] for name in DIAGNOSTICS}
    for name, side in (("positive_purity", "+"), ("negative_purity", "-")):
        series[name] = [(row["step"], right[side](row)) for row in samples if row["side"] == side]
    return {"init": accuracy[0], "after": accuracy[max(accuracy)],
            "curves": {"accuracy": {step: round(statistics.mean(row.values()), 3) for step, row in accuracy.items()},
                       **{name: blocks(points) for name, points in series.items()}}}


def true_reward(row):
    """Gold of a row of samples.jsonl."""
    return toy.gold(row["prompt"][-1]["content"], row["response"])


def blocks(points):
    """[(step, number)] -> the mean of each BLOCK steps; none for a block without any."""
    by_block = {}
    for step, x in points:
        by_block.setdefault((step - 1) // BLOCK, []).append(float(x))
    return [round(statistics.mean(by_block[i]), 4) if i in by_block else None
            for i in range(max(by_block, default=-1) + 1)]


def mean_of(paths, heldout):
    """The mean reward of several reward models as a reward model."""
    models = [save.RewardModel.from_pretrained(str(path)) for path in paths]
    accuracy = []
    for rms in (models[:1], models):
        accuracy.append({})
        for file in heldout:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            chosen, rejected = (sum(toy.rm_scores(rm, [row["prompt"] for row in rows], [row[side] for row in rows])
                                    for rm in rms) for side in ("chosen", "rejected"))
            accuracy[-1][file.stem.removeprefix("heldout_")] = 100 * (chosen > rejected).double().mean().item()
    return {"init": accuracy[0], "after": accuracy[1], "curves": {}}


def build(data, world, seed):
    """A world, and two more reward models on the same pairs for the rows with ensemble labels."""
    if not (data / "world.json").is_file():
        call("tests/toy.py", "--out", data, "--world", world, "--seed", seed)
    for k in (1, 2):
        if not (data / f"rm_{k}" / "config.json").is_file():
            call("tests/toy.py", "--out", data, "--world", world, "--seed", seed, "--extra_rm", k)


def one_seed(args, world, seed):
    """All rows of a world and seed, one after the other, in a process of its own."""
    torch.set_num_threads(1)  # models this small are slower on two
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    data = Path(args.out, f"{world}-{seed}")
    build(data, world, seed)
    return {name: run_row(data, flags, args, seed) for name, flags in ROWS[args.table].items()}


def mean_and_error(values):
    """"12.34 ±0.56", the standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.2f} ±{error:.2f}"


def table(rows, world):
    """Markdown lines of one world. rows: {method: [result of each seed]}; the first method's RM is the initial one."""
    first = next(iter(rows.values()))
    sets = sorted(first[0]["init"])
    initial = [statistics.mean(run["init"].values()) for run in first]
    lines = [f"| {world}, {len(first)} seeds, % | {' | '.join(sets)} | mean | minus initial | better | gold | "
             "minus frozen RM | gold, greedy |", "|---" * (len(sets) + 7) + "|",
             f"| initial RM | {' | '.join(mean_and_error([run['init'][s] for run in first]) for s in sets)} | "
             f"{mean_and_error(initial)} | | | | | |"]
    for name, runs in rows.items():
        gains = [statistics.mean(run["after"].values()) - before for run, before in zip(runs, initial)]
        golds = [run["gold"]["sampled"] - frozen["gold"]["sampled"] for run, frozen in zip(runs, first)]
        cells = [mean_and_error([run["after"][s] for run in runs]) for s in sets]
        cells += [mean_and_error([statistics.mean(run["after"].values()) for run in runs]), mean_and_error(gains),
                  f"{sum(gain > 0 for gain in gains)} of {len(gains)}"]
        cells += [mean_and_error([run["gold"]["sampled"] for run in runs]), mean_and_error(golds),
                  mean_and_error([run["gold"]["greedy"] for run in runs])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def overview(worlds):
    """Markdown lines: each method's accuracy minus the initial RM's, and its policy's gold reward, for all worlds."""
    names = [name for name in next(iter(worlds.values()))["rows"] if all(name in w["rows"] for w in worlds.values())]
    lines = [f"| mean of the sets minus initial RM, seeds better; gold reward | {' | '.join(worlds)} |",
             "|---" * (len(worlds) + 1) + "|"]
    for name in names:
        cells = []
        for result in worlds.values():
            first = next(iter(result["rows"].values()))
            gains = [statistics.mean(run["after"].values()) - statistics.mean(start["init"].values())
                     for run, start in zip(result["rows"][name], first)]
            gold = statistics.mean(run["gold"]["sampled"] for run in result["rows"][name])
            cells.append(f"{mean_and_error(gains)}, {sum(gain > 0 for gain in gains)} of {len(gains)}; {gold:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main():
    """Every world and seed in parallel, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=ROWS)
    parser.add_argument("--out", default="runs/tables")
    parser.add_argument("--worlds", nargs="+", choices=toy.WORLDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args, args.flags = parser.parse_known_args()  # the rest goes to save.py
    worlds = args.worlds or (toy.WORLDS if args.table == "table1" else toy.WORLDS[:1])
    todo = [(world, seed) for seed in args.seeds for world in worlds]
    with tqdm(total=len(todo), desc=args.table, unit="world") as bar, \
            concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(one_seed, args, world, seed) for world, seed in todo]
        for future in concurrent.futures.as_completed(futures):
            if future.exception():
                pool.shutdown(cancel_futures=True)  # what is done is kept for the next call
            future.result()
            bar.update()
        results = {key: future.result() for key, future in zip(todo, futures)}
    write(Path(args.out), args.table, {
        world: {"seeds": args.seeds, "flags": args.flags,
                "rows": {name: [results[world, seed][name] for seed in args.seeds] for name in ROWS[args.table]}}
        for world in worlds})


def write(out, name, worlds):
    """Put one table's worlds into results.jsonl beside what is there, and all of it into results.md."""
    file = out / "results.jsonl"
    tables = read_results(file) if file.is_file() else {}
    tables.setdefault(name, {}).update(worlds)
    lines = [json.dumps({"table": table, "world": world, "row": row, "seed": seed, **run, "flags": result["flags"]})
             for table, worlds in tables.items() for world, result in worlds.items()
             for row, runs in result["rows"].items() for seed, run in zip(result["seeds"], runs, strict=True)]
    (out / ".results.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(out / ".results.jsonl", file)
    text = "\n".join(shown(tables))
    (out / "results.md").write_text(text, encoding="utf-8")
    print(text)


def shown(tables):
    """Markdown lines of all tables."""
    lines = []
    for name in sorted(tables, key=list(ROWS).index):
        lines += [f"## {name}", "", *overview(tables[name]), ""]
        for world, result in tables[name].items():
            lines += [*table(result["rows"], world), ""]
    return lines


if __name__ == "__main__":
    main()
