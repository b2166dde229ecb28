"""The map: where SAVE helps and where it hurts, on the laptop worlds. Every row a run of save.py or a fork.

    python tests/tables.py labels --out runs/map         # RMs trained on 300 to 4,000 pairs
    python tests/tables.py spread --out runs/map         # rewards of a group that differ by 3, 9 or 30
    python tests/tables.py quality --out runs/map        # right or wrong, or graded
    python tests/tables.py shift --out runs/map          # labels on other prompts or another style than the policy's
    python tests/tables.py group --out runs/map          # G = 2 to 16 at the same number of rows
    python tests/tables.py control --out runs/map        # perfect labels: is it the labels or the loss?
    python tests/tables.py algorithms --out runs/map     # the paper's Tables 2 and 3: RL algorithms, R2M, PRIME
    python tests/tables.py rates --out runs/map          # learning rates, m0
    python tests/tables.py bf16 --out runs/map           # what the loop sees of its RM: fp32, bf16 to nearest, dither
    python tests/tables.py kept --out runs/map           # guards: an anchor to the initial rewards, the best checkpoint
    python tests/tables.py habits --out runs/map         # prompts that differ in difficulty, the filter at work
    python tests/tables.py habits_natural --out runs/map # the same, the score as trained and the default m0
    python tests/tables.py weak --out runs/map           # the same, an RM of 300 labels
    python tests/tables.py purity --out runs/map         # how many labels are right, by the anchor: purity.py
    python tests/tables.py compare --seeds 0 --out runs/compare        # what `bash run.sh compare` runs

Worlds and rows that are there are not run again, so a killed table goes on, and tables share what they have in common.
--rows runs some of the rows. results.jsonl gets a line for every run under --out, results.md each table's means and
standard errors over seeds, paired with the same seed's initial RM, or with the policy trained on the frozen RM.
"""
import argparse
import concurrent.futures
import contextlib
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import measure
import torch
import toy
import transformers
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent / "forks")]
import balanced  # noqa: E402, F401  a row of RM_UPDATES, as centred and hl_bt
import best  # noqa: E402
import centred  # noqa: E402, F401
import hl_bt  # noqa: E402, F401
import kept  # noqa: E402
import offline  # noqa: E402
import prime  # noqa: E402
import purity  # noqa: E402
import r2m  # noqa: E402
import reinforce_pp  # noqa: E402

import eval as evaluation  # noqa: E402
import save  # noqa: E402

SEEDS = [110, 111, 112, 113, 114, 115]
LATER = dict.fromkeys(("habits", "habits_natural", "weak", "kept", "purity"), [306, 307, 308, 309, 310, 311])  # seeds
FROZEN = {"frozen RM": ["--rm_update", "none"]}
UPDATES = {name: ["--rm_update", row] for name, row in (
    ("HL-BT", "hl_bt"), ("Mean Reward", "mean_reward"), ("balanced", "balanced"), ("centred", "centred"))}
METHODS = {  # the paper's Table 1 with its ablations, then the balanced and the centred loss
    **FROZEN, "SAVE": [], "SAVE w/o curriculum": ["--m0", "0"], "SAVE, policy frozen": ["--lr_policy", "0"],
    "HL-BT": UPDATES["HL-BT"], "Mean Reward": UPDATES["Mean Reward"], "continual offline": ["tests/forks/offline.py"],
    "balanced": UPDATES["balanced"], "centred": UPDATES["centred"]}
save.RM_UPDATES["centred_mean"] = save.RMUpdate(centred.centred_loss, "group mean")
CENTRED = {  # what is left of it without one of its parts
    "centred w/o curriculum": [*UPDATES["centred"], "--m0", "0"],
    "centred, policy frozen": [*UPDATES["centred"], "--lr_policy", "0"],
    "centred, group mean as anchor": ["--rm_update", "centred_mean"],
    "centred, constant as anchor": ["constant anchor", "--rm_update", "centred_mean"]}
GROUPS = {f"{name}, G = {g}": [*flags, "--group", str(g), "--batch", str(128 // g)] for g in (2, 4, 16)
          for name, flags in (("SAVE", []), ("balanced", UPDATES["balanced"]), ("centred", UPDATES["centred"]))}
PERFECT = {f"{name}, perfect labels": ["perfect", *flags] for name, flags in (
    ("SAVE", []), ("balanced", UPDATES["balanced"]), ("centred", UPDATES["centred"]))}
BEST = "tests/forks/best.py"
GUARDS = {f"{name}, lambda {keep}": ["tests/forks/kept.py", "--keep", keep, *flags]
          for name, flags in (("SAVE", []), ("centred", UPDATES["centred"])) for keep in ("0.03", "0.1", "0.3", "1")}
GUARDS |= {"SAVE, lowest held-out loss": [BEST], "centred, lowest held-out loss": [BEST, *UPDATES["centred"]]}
BF16 = {f"{name}, lr_rm {rate}": ["grid", *flags, "--lr_rm", rate] for rate in ("1e-6", "3e-6", "1e-5")
        for name, flags in (("float32", []), ("bf16 to nearest", ["nearest", "--dtype", "bfloat16"]),
                            ("bf16, dither", ["--dtype", "bfloat16"]))}
TABLES = {  # {table: {world: {row: flags}}}
    "compare": {"few": {name: METHODS[name] for name in ("frozen RM", "HL-BT", "Mean Reward", "SAVE", "centred")}},
    "labels": {world: METHODS for world in ("few", "pairs_300", "pairs_500", "pairs_1000", "pairs_2000", "pairs_4000")},
    "spread": {world: METHODS for world in ("spread_3", "spread_9", "few")},
    "quality": {world: METHODS for world in ("few", "graded")},
    "shift": {world: METHODS for world in ("short", "two_tasks", "style")},
    "group": {"graded": {name: METHODS[name] for name in ("frozen RM", "SAVE", "balanced", "centred")} | GROUPS},
    "control": {world: {name: METHODS[name] for name in ("frozen RM", "SAVE", "balanced", "centred")} | PERFECT
                for world in ("few", "graded")},
    "algorithms": {"few": {
        **FROZEN, "SAVE": [], "SAVE with RLOO": ["--algo", "rloo"],
        "SAVE with GSPO": ["--algo", "gspo", "--num_minibatches", "4"],
        "SAVE with REINFORCE++": ["tests/forks/reinforce_pp.py"],
        "REINFORCE++, frozen RM": ["tests/forks/reinforce_pp.py", "--rm_update", "none"],
        "PRIME": ["tests/forks/prime.py", "--lr_prm", "1e-5"], "R2M": ["tests/forks/r2m.py"],
        "frozen RM of SAVE": ["--rm_update", "none", "--rm", "{save}"]}},
    "rates": {"few": {
        **FROZEN, "SAVE": [], **{f"m0 = {m0}": ["--m0", m0] for m0 in ("0.3", "0.7")},
        **{f"RM learning rate {rate}": ["--lr_rm", rate] for rate in ("3e-6", "3e-5")},
        **{f"value head learning rate {rate}": ["--lr_value", rate] for rate in ("1e-3", "1e-1")},
        "constant rates": ["--lr_schedule", "constant"]}},
    "bf16": {"few": BF16},
    "habits": {"habits": METHODS | CENTRED},
    "habits_natural": {"habits_natural": {name: (METHODS | CENTRED)[name] for name in (
        "frozen RM", "SAVE", "HL-BT", "Mean Reward", "centred", "centred, group mean as anchor")}},
    "weak": {"weak": {name: METHODS[name] for name in (
        "frozen RM", "SAVE", "SAVE w/o curriculum", "SAVE, policy frozen", "HL-BT", "Mean Reward")}},
    "kept": {world: {name: METHODS[name] for name in ("frozen RM", "SAVE", "centred")} | GUARDS
             for world in ("few", "habits", "habits_natural", "graded")},
    "purity": {world: {} for world in ("few", "habits", "graded")},  # not of runs
}
MAINS = {"save.py": save.main, "eval.py": evaluation.main, "tests/toy.py": toy.main, **{
    f"tests/forks/{fork.__name__}.py": fork.main for fork in (best, kept, offline, prime, r2m, reinforce_pp)}}
END = ("reward_spread", "value_bias", "kept", "valid", "kl")  # of metrics.jsonl, kept with a run

def call(script, *words):
    """main() of one of our scripts in this process; its output goes to the file that error messages name."""
    log = Path(tempfile.gettempdir(), f"tables_{os.getpid()}.log")
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            MAINS[script](list(map(str, words)))
        except SystemExit as stop:
            raise RuntimeError(f"{script} {' '.join(map(str, words))}: exit code {stop.code}, see {log}") from None

SHARED = {"binary": "few", "habits": "habits"}  # task: the world whose policy and pairs others take

def build(out, world, seed, heldout=None, there=None):
    """The folder of a world with a value head, DIR/value/rm. What SHARED has of the same seed is taken from there.
    heldout: how many pairs a held-out set of a world that is built has. there: a folder in which that of run.sh is
    copied if its sets are as large."""
    data, other = out / f"{world}-{seed}", Path(there or out, f"{world}-{seed}")
    if not (data / "world.json").is_file() and there and heldout and heldout == heldout_size(other):
        shutil.copytree(other, data, ignore=shutil.ignore_patterns("world.json"), dirs_exist_ok=True)
        shutil.copy(other / "world.json", data)  # last: it marks a complete world
    if not (data / "world.json").is_file():
        first = out / f"{SHARED.get(toy.WORLDS[world].task, world)}-{seed}"
        if first != data and (first / "world.json").is_file():
            take(first, data, world)
        many = ["--heldout", heldout] * bool(heldout)
        call("tests/toy.py", "--out", data, "--world", world, "--seed", seed, "--jobs", 1, *many)
    if not (data / "value" / "rm" / "value_head.safetensors").is_file():
        shutil.rmtree(data / "value", ignore_errors=True)
        call("save.py", "--stage", "value", "--rm", data / "rm", *common(data, world, seed), "--out", data / "value")
    return data

def take(first, data, world):
    """From a built world what is the same in `world`: policy, held-out pairs, of as many labels the reward model."""
    ours, theirs = toy.WORLDS[world], toy.WORLDS[first.name.rsplit("-", 1)[0]]
    for name in ("able", "policy"):
        if (first / name).is_dir():
            shutil.copytree(first / name, data / name, dirs_exist_ok=True)
    for name in ("id", "hard", "neu"):
        shutil.copy(first / f"heldout_{name}.jsonl", data)
    if ours.pairs and (ours.pairs, ours.steps) == (theirs.pairs, theirs.steps):
        shutil.copy(first / "pairs.jsonl", data)
        toy.write_scaled(data / "rm", first / "rm", ours.head / theirs.head, toy.rm_tokenizer(ours.task))

def heldout_size(data):
    """Pairs of the largest held-out set of a world, none if it is not there: a set may be short of what was asked."""
    sizes = json.loads((data / "world.json").read_text()).get("sizes", {}) if (data / "world.json").is_file() else {}
    return max((size for name, size in sizes.items() if name != "pairs"), default=None)

def common(data, world, seed):
    """The flags of save.py on a world."""
    return ["--policy", data / "policy", "--prompts", data / "prompts.jsonl", "--seed", seed,
            *toy.laptop_flags(world), *EXTRA]

EXTRA = []  # flags of the command line that are save.py's

def slug(flags):
    """A folder name for the flags of a row: the same flags, the same folder."""
    return "_".join(re.sub(r"[^\w.+-]", "", flag.removeprefix("--")) for flag in flags) or "save"

def run_row(data, world, seed, flags):
    """One row on one world and seed, kept in rows/SLUG/result.json: see `read_run`."""
    out, task = data / "rows" / slug(flags), toy.WORLDS[world].task
    if (out / "result.json").is_file():
        return
    script = flags[0] if flags[:1] and flags[0].endswith(".py") else "save.py"
    words = [data / "rows" / "save" / "rm" if flag == "{save}" else flag for flag in flags
             if flag not in (script, "perfect", "constant anchor", "grid", "nearest")]
    labels = functools.partial(perfect_label, task) if "perfect" in flags else save.label
    anchors = constant_anchor if "constant anchor" in flags else save.anchor
    rounded = (lambda target, source, name: target.copy_(source)) if "nearest" in flags else save.dithered
    rm = on_grid(data) if "grid" in flags else data / "value" / "rm"
    with mock.patch.object(save, "label", labels), mock.patch.object(save, "anchor", anchors), \
            mock.patch.object(save, "dithered", rounded):
        call(script, "--stage", "save", "--rm", rm, "--pairs", data / "pairs.jsonl", "--heldout",
             *sorted(data.glob("heldout_*.jsonl")), "--out", out, "--resume", "--eval_every",
             0 if flags == FROZEN["frozen RM"] else 20,  # nobody tests a frozen RM twice
             *common(data, world, seed), *words)
    gold = {name: 100 * statistics.mean(golds) for name, golds in policy_golds(data, out, task).items()}
    result = read_run(out, task) | {"half": script == BEST, "gold": gold}
    value = [row for row in measure.read_rows(data / "value" / "metrics.jsonl") if "step" in row][-1]
    result["value"] = {"value_r2": value["value_r2"], **result["value"]} if "value_r2" in value else result["value"]
    if "grid" in flags:  # the loop tested the working copy, this is rm/ in fp32
        saved = save.RewardModel.from_pretrained(str(out / "rm"))
        result["saved"] = {file.stem[8:]: toy.rm_accuracy(saved, measure.read_rows(file))
                           for file in sorted(data.glob("heldout_*.jsonl"))}
    toy.write_whole(out / "result.json", json.dumps(result))

def on_grid(data):
    """A world's reward model with weights that bf16 can hold, as a bf16 checkpoint has them; V stays."""
    if not (data / "grid" / "value_head.safetensors").is_file():
        rm = save.RewardModel.from_pretrained(str(data / "value" / "rm"))
        for p in rm.model.parameters():
            p.data = p.data.bfloat16().float()
        rm.save_pretrained(data / "grid")
    return data / "grid"

def policy_golds(data, out, task):
    """{"sampled", "greedy": the mean gold of each test prompt} of a row's policy, kept in golds.json."""
    file, policy = out / "golds.json", out / "policy" if (out / "policy").is_dir() else data / "policy"
    if not file.is_file():
        golds = toy.golds(policy, toy.read_prompts(data / "prompts_test.jsonl"), task=task)
        toy.write_whole(file, json.dumps({name: x.mean(1).tolist() for name, x in golds.items()}))
    return json.loads(file.read_text())

def heldout_right(data, out):
    """{set: (its prompts, (n,) 1 where a row's reward model has the chosen response ahead)}, kept in right.json."""
    rows = {path.stem[8:]: measure.read_rows(path) for path in sorted(data.glob("heldout_*.jsonl"))}
    file, folder = out / "right.json", out / "rm" if (out / "rm").is_dir() else data / "rm"
    if not file.is_file():
        rm = save.RewardModel.from_pretrained(str(folder))
        right = {name: toy.rm_right(rm, pairs).int().tolist() for name, pairs in rows.items()}
        toy.write_whole(file, json.dumps(right))
    return {name: ([pair["prompt"] for pair in rows[name]], torch.tensor(right).double())
            for name, right in json.loads(file.read_text()).items()}

def add_interval(data, flags):
    """result.json of a row gets the 95 % interval over prompts of its gain, in points."""
    out = data / "rows" / slug(flags)
    result = json.loads((out / "result.json").read_text())
    if "interval" not in result:
        sets = measure.changes(heldout_right(data, data), heldout_right(data, out))
        if result["half"]:  # the other pairs have chosen the checkpoint
            sets = [(prompts[1::2], change[1::2]) for prompts, change in sets]
        result["interval"] = measure.interval(sets)
        toy.write_whole(out / "result.json", json.dumps(result))

def guard_table(world, rows):
    """Markdown lines: of the rows with intervals how they did on their worst seed, against the initial RM."""
    initial = initial_accuracy(rows)
    lines = [f"| {world}: the same, seed by seed | RM gain | its worst seed, 95 % interval over prompts | worse beyond "
             "its interval | better beyond it |", "|---" * 5 + "|"]
    for name, row in rows.items():
        row = {seed: run for seed, run in row.items() if "interval" in run}
        if row:
            gains = gains_of(row, initial)
            ends = [run["interval"] for run in row.values()]
            worst = min(range(len(gains)), key=gains.__getitem__)
            low, high = ends[worst]
            lines.append(f"| {name} | {mean_and_error(gains, '+')} | {gains[worst]:+.2f} [{low:+.2f}, {high:+.2f}] | "
                         f"{sum(high < 0 for _, high in ends)} of {len(ends)} | {sum(low > 0 for low, _ in ends)} |")
    return lines if len(lines) > 2 else []

def perfect_label(task, run, batch):
    """(P,G) for save.label: inf for responses whose gold is at least their group's mean, -inf for the others."""
    asked = [messages[-1]["content"] for messages, _ in batch.prompts for _ in range(run.cfg.group)]
    golds = torch.tensor([toy.gold(*row, task) for row in zip(asked, batch.texts)]).view(-1, run.cfg.group)
    return torch.where(save.gather(golds >= golds.mean(1, keepdim=True)), math.inf, -math.inf)

def constant_anchor(run, batch):
    """(P,) for save.anchor: the mean reward of the batch, of responses that ended, for every prompt."""
    return save.masked_mean(batch.rewards, batch.ended).expand(len(batch.rewards))

def read_run(out, task):
    """The logs of a run -> {"init", "after": accuracy by held-out set, in percent; "accuracy": {step: their mean};
    "gold_curve": mean gold of the responses of each 10 steps; "kept_curve": the share that the filter kept; "end":
    numbers of the last step, and deflation, the product of all changes of the spread by updates of the RM; "value":
    what the first step says of the RM}."""
    logs = measure.Logs(out, task)
    accuracy, golds = logs.accuracy(), [(row["step"], row["gold"]) for row in logs.samples]
    kept_shares = [(row["step"], row["kept"]) for row in logs.steps if "kept" in row]
    spread = [row["spread_after"] / row["reward_spread"] for row in logs.steps if row.get("reward_spread", 0)
              and "spread_after" in row]
    return {"init": accuracy[0], "after": accuracy[max(accuracy)],
            "accuracy": {step: round(x, 3) for step, x in logs.mean_accuracy().items()},
            "gold_curve": [round(100 * x, 2) for x in measure.blocks(golds).values()],
            "kept_curve": [round(x, 4) for x in measure.blocks(kept_shares).values()],
            "value": {"reward_spread": next((row["reward_spread"] for row in logs.steps if "reward_spread" in row), 0)},
            "end": {**{name: x for name, x in logs.steps[-1].items() if name in END},
                    **({"deflation": math.prod(spread)} if spread else {})}}

def start(extra):
    """Set up a process that builds worlds and runs rows; extra: flags of save.py."""
    torch.set_num_threads(1)  # models this small are slower on two
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    EXTRA[:] = extra

def compare_row(data, world, seed, flags):
    """A row, and each held-out pair and each prompt of it for `paired`."""
    run_row(data, world, seed, flags)
    out = data / "rows" / slug(flags)
    if not (out / "eval" / "results.json").is_file():
        rm = out / "rm" if (out / "rm").is_dir() else data / "rm"
        call("eval.py", "--rm", rm, "--bench", *sorted(data.glob("heldout_*.jsonl")), "--out", out / "eval")

def outcomes(data, flags, world):
    """Of a row of `compare`: {"RM accuracy", "gold", "gold, greedy": {set: (prompts, numbers)}}, as `measure.changes`
    takes it."""
    out = data / "rows" / slug(flags)
    [right] = measure.right_pairs(out / "eval" / "scores.jsonl").values()
    prompts = toy.read_prompts(data / "prompts_test.jsonl")
    sampled, greedy = (torch.tensor(golds).double() for golds in policy_golds(
        data, out, toy.WORLDS[world].task).values())
    found = {"RM accuracy": right, "gold": {"": (prompts, sampled)}, "gold, greedy": {"": (prompts, greedy)}}
    return {what: {name: ([f"{data} {prompt}" for prompt in prompts], numbers)  # no prompts of another seed
                   for name, (prompts, numbers) in sets.items()} for what, sets in found.items()}

def paired(out, world, seeds, rows):
    """Markdown lines: rows minus the frozen RM on the same worlds, with the intervals of `measure.interval`."""
    lines = []
    for name, flags in rows.items():
        sets = {"RM accuracy": [], "gold": [], "gold, greedy": []}
        for data in (out / f"{world}-{seed}" for seed in seeds):
            frozen, row = outcomes(data, FROZEN["frozen RM"], world), outcomes(data, flags, world)
            for what, changes in sets.items():
                changes += measure.changes(frozen[what], row[what])
        lines.append(f"| {name} | {' | '.join(map(measure.change_and_interval, sets.values()))} |")
    head = f"| {world}: minus the frozen RM, 95 % interval over prompts | RM accuracy | gold | gold, greedy |"
    return ["", head, "|---" * 4 + "|", *lines]

def collect(out):
    """Every run under `out`: {world: {row: {seed: result}}}, in the order of TABLES."""
    runs = {}
    for world, rows in (item for table in TABLES.values() for item in table.items()):
        for name, flags in rows.items():
            files = {int(file.parts[-4].rsplit("-", 1)[1]): file
                     for file in out.glob(f"{world}-*/rows/{slug(flags)}/result.json")}
            for seed, file in sorted(files.items()):
                runs.setdefault(world, {}).setdefault(name, {})[seed] = json.loads(file.read_text())
    return runs

def read_results(file):
    """results.jsonl, a line a run -> {world: {row: {seed: result}}}."""
    runs = {}
    for run in map(json.loads, Path(file).read_text(encoding="utf-8").splitlines()):
        runs.setdefault(run["world"], {}).setdefault(run["row"], {})[run["seed"]] = run
    return runs

def mean_and_error(values, sign="", digits=2):
    """"12.34 ±0.56", the standard error over seeds; `sign` "+" writes that of the mean."""
    error = f" ±{statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{error}"

def initial_accuracy(rows):
    """{seed: mean accuracy over the held-out sets of the world's RM} from its first row, the frozen RM if that was run.
    Not every row starts from it: PRIME's reward model is at first a policy, which tells no pair apart."""
    accuracy = {}
    for row in rows.values():
        for seed, run in row.items():
            accuracy.setdefault(seed, statistics.mean(run["init"].values()))
    return accuracy

def bf16_table(rows):
    """Markdown lines: of each rate and precision the change of accuracy, as the loop sees it and of rm/ as saved."""
    lines = ["| few, its RM on the bf16 grid | RM gain, in the loop | of rm/ as saved | gold | seeds |",
             "|---" * 5 + "|"]
    for name in filter(rows.get, BF16):
        runs = rows[name]
        start = [statistics.mean(run["init"].values()) for run in runs.values()]
        loop, saved = ([statistics.mean(run[key].values()) - x for run, x in zip(runs.values(), start)]
                       for key in ("after", "saved"))
        gold = mean_and_error([run["gold"]["sampled"] for run in runs.values()])
        lines.append(f"| {name} | {mean_and_error(loop, '+')} | {mean_and_error(saved, '+')} | {gold} | "
                     f"{measure.spans(runs)} |")
    return lines

def gains_of(row, initial):
    """What each seed's run ends above the initial RM, mean accuracy over the held-out sets, in points; above the same
    half of the pairs where the other half has chosen the checkpoint."""
    return [statistics.mean(run["after"].values()) - (
        statistics.mean(run["init"].values()) if run.get("half") else initial[seed]) for seed, run in row.items()]

def table(runs, world, names):
    """Markdown lines: the rows of one world that have been run, each over its own seeds, which it names; the gains also
    by how good the initial RM is, where it is better than HALVES on some seeds."""
    rows = {name: runs[name] for name in names if runs.get(name)}
    frozen = rows.get("frozen RM", {})
    initial = initial_accuracy(rows)
    about = {seed: run["value"] for row in rows.values() for seed, run in row.items()}
    what = ", ".join(f"{label} {statistics.mean(x[key] for x in about.values() if key in x):.2f}" for key, label in (
        ("value_r2", "R2 of V"), ("reward_spread", "SD in a group"), ("kept", "kept"), ("common_push", "common push"))
        if any(key in x for x in about.values()))
    better = {seed for seed, accuracy in initial.items() if accuracy >= HALVES}
    halves = {}
    if 0 < len(better) < len(initial):
        halves = {f"RM below {HALVES} %": initial.keys() - better, "above": better}
    lines = [f"| {world}: initial RM {mean_and_error(list(initial.values()))} %; {what} | RM gain | better | "
             + "".join(f"{name} | " for name in halves)
             + "gold | minus frozen RM's | gold, greedy | spread x | seeds |",
             "|---" * (8 + len(halves)) + "|"]
    for name, row in rows.items():
        gains, golds = gains_of(row, initial), [run["gold"]["sampled"] for run in row.values()]
        by_half = [[gain for seed, gain in zip(row, gains) if seed in half] for half in halves.values()]
        by_half = "".join(f"{mean_and_error(half, '+') if half else ''} | " for half in by_half)
        pairs = [run["gold"]["sampled"] - frozen[seed]["gold"]["sampled"]
                 for seed, run in row.items() if seed in frozen]
        paired = mean_and_error(pairs, "+") if pairs and row is not frozen else ""
        spread = [run["end"]["deflation"] for run in row.values() if "deflation" in run["end"]]
        lines.append(f"| {name} | {mean_and_error(gains, '+')} | {sum(x > 0 for x in gains)} of {len(gains)} | "
                     f"{by_half}{mean_and_error(golds)} | {paired} | "
                     f"{mean_and_error([run['gold']['greedy'] for run in row.values()])} | "
                     f"{f'{statistics.mean(spread):.2f}' if spread else ''} | {measure.spans(row)} |")
    return lines

HALVES = 85  # % of pairs right: a better RM has next to nothing left to gain
CELLS = {  # the map of README.md
    "few": "few labels, spread 30: the laptop run",
    "habits": "prompts differ in difficulty, 1,000 labels, spread 6, m0 1",
    "habits_natural": "the same, spread 4, m0 0.5", "weak": "the same, 300 labels, m0 1",
    "spread_9": "few labels, spread 9", "spread_3": "few labels, spread 3",
    "pairs_300": "300 labels, spread 30", "pairs_1000": "1,000 labels", "pairs_4000": "4,000 labels",
    "graded": "graded quality, spread 1", "short": "few labels, of short prompts",
    "two_tasks": "few labels, of two of four tasks", "style": "few labels, of another style"}

def overview(runs):
    """Markdown lines of README.md's map: the RM's gain and the policy's gold in each cell."""
    lines = ["| | initial RM, % | SAVE | HL-BT | centred | gold: frozen RM | SAVE | centred |", "|---" * 8 + "|"]
    for world in filter(runs.get, CELLS):
        rows = runs[world]
        if rows.get("frozen RM") and rows.get("SAVE"):  # not every world has the other two
            frozen, initial = rows["frozen RM"], initial_accuracy(rows)
            cells = [mean_and_error(list(initial.values()), digits=1)]
            for name in ("SAVE", "HL-BT", "centred"):
                gains = gains_of(rows.get(name, {}), initial)
                better = f"({sum(x > 0 for x in gains)} of {len(gains)})"
                cells.append(f"{mean_and_error(gains, '+')} {better}" if gains else "")
            cells.append(f"{statistics.mean(run['gold']['sampled'] for run in frozen.values()):.1f}")
            cells += [mean_and_error([run["gold"]["sampled"] - frozen[seed]["gold"]["sampled"]
                                      for seed, run in rows[name].items()], "+", 1) if name in rows else ""
                      for name in ("SAVE", "centred")]
            lines.append(f"| {CELLS[world]} | {' | '.join(cells)} |")
    return lines

def shown(runs):
    """Markdown lines of the map, then of every world that has runs, its rows in the order of TABLES."""
    lines = [*overview(runs), ""]
    for world in runs:
        names = {name: 0 for rows in TABLES.values() for name in rows.get(world, ()) if name not in BF16}.keys()
        lines += [*table(runs[world], world, names), ""] if names & runs[world].keys() else []
        guarded = guard_table(world, runs[world])
        lines += [*guarded, ""] if guarded else []
        lines += [*bf16_table(runs[world]), ""] if BF16.keys() & runs[world] else []
    return lines

def write(out):
    """results.jsonl and results.md of every run under `out`."""
    runs = collect(out)
    lines = [json.dumps({"world": world, "row": name, "seed": seed, **run}) for world, rows in runs.items()
             for name, row in rows.items() for seed, run in row.items()]
    toy.write_whole(out / "results.jsonl", "".join(line + "\n" for line in lines))
    toy.write_whole(out / "results.md", "\n".join(shown(runs)))
    return runs

def main(argv=None):
    """Every world of a table in parallel, then every row of them, then all results so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--out", default="runs/map")
    parser.add_argument("--worlds", nargs="+", choices=toy.WORLDS)
    parser.add_argument("--rows", nargs="+", help="by name; frozen RM, SAVE, ...")
    parser.add_argument("--seeds", nargs="+", type=int, help="six: 110 to 115, those of the later tables 306 to 311")
    parser.add_argument("--heldout", type=int, help="pairs of a held-out set of the worlds that are built")
    parser.add_argument("--there", help="a folder whose worlds are copied instead of built, if their sets are as large")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args, extra = parser.parse_known_args(argv)  # the rest goes to save.py
    rows_of, work = TABLES[args.table], run_row
    if args.table == "compare":  # the same rows on any world
        rows_of, work = dict.fromkeys(args.worlds or rows_of, rows_of["few"]), compare_row
    known = dict.fromkeys(name for rows in rows_of.values() for name in rows)
    unknown = [name for name in args.rows or () if name not in known]
    if unknown:
        parser.error(f"--rows {' '.join(unknown)}: expected rows of {args.table}: {', '.join(known)}")
    if not set(args.worlds or ()) <= rows_of.keys():
        parser.error(f"--worlds {' '.join(args.worlds)}: expected worlds of {args.table}: {' '.join(rows_of)}")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of short texts cost more than they bring
    seeds = args.seeds or LATER.get(args.table, SEEDS)
    out, worlds = Path(args.out), [(world, seed) for world in args.worlds or rows_of for seed in seeds]
    todo = [(world, seed, name, flags) for world, seed in worlds for name, flags in rows_of[world].items()
            if name in (args.rows or known) or work is compare_row and name == "frozen RM"]
    with tqdm(total=len(worlds) + len(todo), desc=args.table, unit="run") as bar, concurrent.futures.\
            ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), start, (extra,)) as pool:
        def wait(futures):
            """{future: what it does}, until all are done."""
            for future in concurrent.futures.as_completed(futures):
                if future.exception():
                    pool.shutdown(cancel_futures=True)  # what is done is kept for the next call
                future.result()
                tqdm.write(futures[future])
                bar.update()

        wait({pool.submit(build, out, world, seed, args.heldout, args.there): f"{world}, seed {seed}: the world"
              for world, seed in worlds})
        for later in (False, True):  # what trains on another row's RM waits for it
            wait({pool.submit(work, out / f"{world}-{seed}", world, seed, flags): f"{world}, seed {seed}: {name}"
                  for world, seed, name, flags in todo if ("{save}" in flags) == later})
        if args.table == "purity":
            wait({pool.submit(purity.measure, out / f"{world}-{seed}", world, seed): f"{world}, seed {seed}: its labels"
                  for world, seed in worlds})
            return print("\n".join(purity.write(out)))
        if args.table == "kept":
            wait({pool.submit(add_interval, out / f"{world}-{seed}", flags): f"{world}, seed {seed}: {name}, interval"
                  for world, seed, name, flags in todo if flags != FROZEN["frozen RM"]})
    runs = write(out)
    for world in dict.fromkeys(world for world, _ in worlds):
        print("\n".join(bf16_table(runs[world]) if args.table == "bf16" else table(runs[world], world, rows_of[world])))
        if args.table == "kept":
            print("\n".join(guard_table(world, runs[world])))
        if args.table == "compare":
            rows = {name: flags for name, flags in rows_of[world].items()
                    if name in (args.rows or known) and flags != FROZEN["frozen RM"]}
            print("\n".join(paired(out, world, seeds, rows)))

if __name__ == "__main__":
    main()
