"""The paper's tables on the laptop world: every row one run of save.py, over fresh seeds, resumable, in parallel.

    python tests/tables.py table1 --out runs/tables                  # methods and ablations, three worlds
    python tests/tables.py table2 --out runs/tables                  # RL algorithms
    python tests/tables.py table3 --out runs/tables                  # R2M and PRIME
    python tests/tables.py sweeps --out runs/tables                  # group size, m0, learning rates
    python tests/tables.py table1 --out runs/tables --worlds noisy --seeds 10 11 --jobs 2

Each world and seed is built once; its value head is fitted once and shared by all rows. A run that is there is not run
again. Results: runs/tables/TABLE.json (every number) and TABLE.md (mean, standard error over seeds, paired difference
to the initial RM, seeds that improved). Seeds 0 to 2 were looked at when the world was made: the default seeds are not.
"""
import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import toy
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SEEDS = [10, 11, 12, 13, 14, 15]
ROWS = {
    "table1": {
        "GRPO, frozen RM": ["--rm_update", "none"],
        "continual offline": ["--rm_update", "offline", "--freeze_policy"],
        "HL-BT": ["--rm_update", "hl_bt"],
        "Mean Reward": ["--rm_update", "mean_reward"],
        "SAVE": [],
        "SAVE w/o curriculum": ["--no_curriculum"],
        "SAVE w/o policy optimisation": ["--freeze_policy"],
        "balanced loss": ["--rm_update", "balanced"],
        # `run_row` adds the paths
        "balanced, ensemble labels": ["--rm_update", "balanced", "--lr_rm", "3e-5", "--label_rms"],
        "the same, policy frozen": ["--rm_update", "balanced", "--lr_rm", "3e-5", "--freeze_policy", "--label_rms"],
    },
    "table2": {
        "SAVE with GRPO": [], "SAVE with RLOO": ["--algo", "rloo"],
        "SAVE with GSPO": ["--algo", "gspo", "--num_minibatches", "4"],
        "SAVE with REINFORCE++": ["--algo", "reinforce++"],
    },
    "table3": {  # other methods that update the reward model, as forks of save.py
        "GRPO, frozen RM": ["--rm_update", "none"], "SAVE": [],
        "R2M": ["tests/rivals/r2m.py"], "PRIME": ["tests/rivals/prime.py", "--lr_prm", "1e-5"],
    },
    "sweeps": {
        "SAVE": [], **{f"G = {g}": ["--group", str(g)] for g in (4, 16)},
        **{f"m0 = {m0}": ["--m0", m0] for m0 in ("0.3", "0.7")},
        **{f"RM learning rate x {x}": ["--lr_rm", rate] for x, rate in (("1/3", "3.3e-6"), ("3", "3e-5"))},
        **{f"value head learning rate x {x}": ["--lr_value", rate] for x, rate in (("1/5", "2e-4"), ("3", "3e-3"))},
        "Mean Reward, RM learning rate x 3": ["--rm_update", "mean_reward", "--lr_rm", "3e-5"],
        "HL-BT, RM learning rate x 3": ["--rm_update", "hl_bt", "--lr_rm", "3e-5"],
    },
}


def call(script, *words):
    """One process of one thread; its output is shown only if it fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(map(str, words))}\n{done.stderr[-2000:]}")


def anchored(data, rm, out, args, seed):
    """The RM folder with a value head for the world's policy; fitted if it is not there."""
    if not (out / "rm" / "value_head.safetensors").is_file():
        call("save.py", "--stage", "value", "--rm", rm, "--policy", data / "policy", "--prompts",
             data / "prompts.jsonl", "--out", out, "--seed", seed, *toy.LAPTOP_FLAGS, *args.flags)
    return out / "rm"


def run_row(data, out, flags, args, seed):
    """One row on one world and seed -> {"init", "after", "gold"}, kept in out/result.json."""
    if (out / "result.json").is_file():
        return json.loads((out / "result.json").read_text())
    rm = anchored(data, data / "rm", data / "value", args, seed)
    if flags[-1:] == ["--label_rms"]:
        flags = [*flags, *(anchored(data, data / f"rm_{k}", data / f"value_{k}", args, seed) for k in (1, 2))]
    script, flags = (flags[0], flags[1:]) if flags[:1] and flags[0].endswith(".py") else ("save.py", flags)
    call(script, "--stage", "save", "--rm", rm, "--policy", data / "policy", "--prompts", data / "prompts.jsonl",
         "--pairs", data / "pairs.jsonl", "--heldout", *sorted(data.glob("heldout_*.jsonl")), "--out", out, "--seed",
         seed, "--resume", *toy.LAPTOP_FLAGS, *flags, *args.flags)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    accuracy = [{key.removeprefix("accuracy_heldout_"): x for key, x in row.items() if key.startswith("accuracy_")}
                for row in records]
    accuracy = [row for row in accuracy if row]
    policy = out / "policy" if (out / "policy").is_dir() else data / "policy"
    gold = toy.gold_reward(policy, toy.read_prompts(data / "prompts_test.jsonl"))
    result = {"init": accuracy[0], "after": accuracy[-1], "gold": {name: 100 * x for name, x in gold.items()}}
    (out / "result.json").write_text(json.dumps(result))
    return result


def build(data, world, seed):
    """A world, and two more reward models on the same pairs for the rows with ensemble labels."""
    if not (data / "world.json").is_file():
        call("tests/toy.py", "--out", data, "--world", world, "--seed", seed)
    for k in (1, 2):
        if not (data / f"rm_{k}" / "config.json").is_file():
            call("tests/toy.py", "--out", data, "--world", world, "--seed", seed, "--extra_rm", k)


def one_seed(args, world, seed, bar):
    """All rows of a world and seed, one after the other."""
    data, results = Path(args.out, f"{world}-{seed}"), {}
    build(data, world, seed)
    for name, flags in ROWS[args.table].items():
        folder = data / "rows" / "_".join([args.table, *name.split()]).replace("/", ":")
        results[name] = run_row(data, folder, flags, args, seed)
        bar.update()
    return results


def mean_and_error(values):
    """"12.34 ±0.56", the standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.2f} ±{error:.2f}"


def table(rows, world):
    """Markdown lines of one world. rows: {method: [result of each seed]}."""
    first = next(iter(rows.values()))
    sets, golds, seeds = sorted(first[0]["init"]), sorted(first[0]["gold"]), first
    lines = [f"| {world}, {len(seeds)} seeds, % | {' | '.join(sets)} | mean | minus initial | better | "
             f"{' | '.join('gold, ' + name for name in golds)} |", "|---" * (4 + len(sets) + len(golds)) + "|"]

    def add(name, runs, key):
        means = [statistics.mean(run[key].values()) for run in runs]
        gains = [after - statistics.mean(run["init"].values()) for after, run in zip(means, runs)]
        cells = [mean_and_error([run[key][s] for run in runs]) for s in sets] + [mean_and_error(means)]
        better = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
        cells += [mean_and_error(gains), better] if key == "after" else ["", ""]
        cells += [mean_and_error([run["gold"][g] for run in runs]) if key == "after" else "" for g in golds]
        lines.append(f"| {name} | {' | '.join(cells)} |")

    add("initial RM", first, "init")
    for name, runs in rows.items():
        add(name, runs, "after")
    return lines


def main():
    """Every world and seed in parallel, then the tables of those that are complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=ROWS)
    parser.add_argument("--out", default="runs/tables")
    parser.add_argument("--worlds", nargs="+", choices=toy.WORLDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args, args.flags = parser.parse_known_args()  # the rest goes to save.py
    worlds = args.worlds or (toy.WORLDS if args.table == "table1" else toy.WORLDS[:1])
    todo = [(world, seed) for seed in args.seeds for world in worlds]
    with tqdm(total=len(todo) * len(ROWS[args.table]), desc=args.table, smoothing=0) as bar, \
            concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(one_seed, args, world, seed, bar) for world, seed in todo]
        results = {key: future.result() for key, future in zip(todo, futures)}
    by_world = {world: {name: [results[world, seed][name] for seed in args.seeds] for name in ROWS[args.table]}
                for world in worlds}
    lines = [line for world in worlds for line in [*table(by_world[world], world), ""]]
    out = Path(args.out)
    (out / f"{args.table}.json").write_text(json.dumps({"seeds": args.seeds, "worlds": by_world}, indent=1) + "\n")
    (out / f"{args.table}.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
