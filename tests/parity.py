"""Do two checkouts train the same, to the bit? For changes that move or remove code and must not change a number.

    python tests/parity.py --before CHECKOUT --out DIR [--cases grpo rloo ...] [--jobs 2]

A case runs a script of CHECKOUT and one of this checkout on the same world and compares metrics.jsonl (not times and
memory), samples.jsonl (bytes) and the tensors of rm/ and policy/ (bits). It prints "equal" or what differs first; exit
code 1 if anything does. Runs of CHECKOUT stay in DIR and are reused while its save.py is the same.
"""
import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors.torch import load_file
from toy import tiny_world

HERE = Path(__file__).resolve().parents[1]
# learning rates so high that a step changes the responses of the next, and that several minibatches clip
TINY = ("--steps 6 --batch 4 --group 4 --m0 0.7 --seed 5 --max_new_tokens 12 --max_prompt_tokens 32 --temperature 1 "
        "--top_k 0 --top_p 1 --value_prompts 16 --value_k 4 --value_epochs 40 --value_lr 0.02 --lr_rm 1e-4 "
        "--lr_value 1e-3 --lr_policy 1e-3 --micro_tokens 128 --save_every 0 --device cpu")
PAIRS = "--pairs {0}/tiny0/pairs.jsonl"
LABELS = "--rm {0}/before/value/rm --label_rms {0}/before/value1/rm {0}/before/value2/rm"
CASES = {  # flags; ensemble takes models of the cases value*
    "grpo": "", "rloo": "--algo rloo", "gspo4": "--algo gspo --num_minibatches 4", "offload": "--offload",
    "mean_reward": "--rm_update mean_reward", "none": "--rm_update none",
    "kl0": "--kl_coef 0", "linear": "--lr_schedule linear", "bf16": "--dtype bfloat16", "m0": "--m0 0",
    "value": "--stage value", "value1": "--stage value --rm {0}/tiny1/rm", "value2": "--stage value --rm {0}/tiny2/rm",
    "preference": f"--stage preference {PAIRS}", "frozen_policy": "--lr_policy 0", "micro": "--micro_tokens 40",
    "waves": "--cache_tokens 60", "two_ranks": "", "two_ranks_gspo2": "--algo gspo --num_minibatches 2",
    "two_ranks_preference": f"--stage preference {PAIRS}", "resume": "--save_every 3", "hl_bt": "", "balanced": "",
    "reinforce_pp": "", "verifier": "", "offline": PAIRS, "ensemble": LABELS, "r2m": "--r2m_width 8",
    "prime": "--lr_prm 1e-3", "laptop": "", "laptop_rloo": "--algo rloo --steps 20",
    "laptop_gspo4": "--algo gspo --num_minibatches 4 --steps 20"}
FORKS = "hl_bt balanced reinforce_pp verifier offline ensemble r2m prime".split()
# columns that one of the two may lack
MAY_LACK = set("usable deflation common_push value_rmse spread_after kept reward_spread reward response_tokens "
               "truncated positive valid value_bias value_loss value_target_variance value_r2 threshold "
               "learned".split())

def python(checkout, words, log):
    """Run this interpreter in a checkout -> its output, which `log` gets too."""
    command = ["env", "-u", "PYTHONPATH", "OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1", sys.executable, *map(str, words)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(command, cwd=checkout, stdout=file, stderr=file)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}, see {log}")
    return log.read_text()

def run(args, side, name):
    """A case on one side, "before" or "after" -> its folder."""
    checkout, folder = HERE if side == "after" else args.before, args.out / side / name
    script = f"tests/forks/{name}.py" if name in FORKS else "save.py"
    log, done = Path(f"{folder}.log"), folder / "done"
    if not (checkout / script).is_file():
        raise RuntimeError(f"missing: {script}")
    world = args.out / ("laptop" if "laptop" in name else "tiny0")
    settings = python(checkout, ["tests/toy.py", "--flags"], folder.with_suffix(".flags")) if "laptop" in name else TINY
    own = CASES[name].format(args.out)
    ranks = "-m torch.distributed.run --standalone --nproc-per-node 2" if "two_ranks" in name else ""
    words = [*ranks.split(), script, "--policy", world / "policy", "--rm", world / "rm", "--prompts",
             world / "prompts.jsonl", "--heldout", *sorted(world.glob("heldout_*")), *settings.split(), *own.split()]
    key = f"{words} {(checkout / 'save.py').read_text()}"
    if side == "before" and done.is_file() and done.read_text() == key:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    python(checkout, [*words, "--out", folder], log)
    if name == "resume":  # as if killed after step 3
        for lost in ("checkpoints/step_000006", "rm", "policy"):
            shutil.rmtree(folder / lost)
        (folder / "samples.jsonl").write_text("")  # fills with steps 4 to 6; with 1 to 3 too if it began anew
        python(checkout, [*words, "--out", folder, "--resume"], log)
    done.write_text(key)
    return folder

def records(folder, file):
    """Rows of a .jsonl file, if there is one, without the configuration, warnings and what measures the machine."""
    left_out = ("_seconds", "_gb", "tokens_per_second")
    return [{name: x for name, x in row.items() if not name.endswith(left_out)}
            for path in folder.glob(file) for row in map(json.loads, path.open()) if "step" in row]

def compare(args, name):
    """Run a case on both sides -> its line: "equal", or what differs first. RuntimeError if a side fails."""
    found, both = [], [run(args, side, name) for side in ("before", "after")]
    for file in ("metrics.jsonl", "samples.jsonl"):
        rows = zip_longest(*(records(folder, file) for folder in both), fillvalue={})
        found += [f"{file} step {a.get('step')} {name}: {a.get(name)} before, {b.get(name)} after"
                  for a, b in rows for name in {**a, **b}
                  if not ((name in MAY_LACK or name.startswith("loss_")) and (name in a) != (name in b))
                  if json.dumps(a.get(name)) != json.dumps(b.get(name))][:1]
    old, new = ({f"{file.parent.name}/{file.name} {name}": x for file in folder.glob("*/*.safetensors")
                 for name, x in load_file(file).items()} for folder in both)
    none = torch.tensor([float("inf")])  # in place of a tensor that the other side lacks
    pairs = [(old.get(name, none), new.get(name, none)) for name in {**old, **new}]
    apart = [(a.double() - b.double()).abs().max().item() for a, b in pairs
             if not torch.equal(*(x.flatten().view(torch.uint8) for x in (a, b)))]
    if apart or not pairs:
        found.append(f"{len(apart)} of {len(pairs)} tensors, by {max(apart, default=0)} at most")
    return "; ".join(found) or f"equal, {len(pairs)} tensors"

def main():
    """Build the worlds that are missing, run the cases, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--before", "--out"):
        parser.add_argument(flag, type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    if not (args.before / "save.py").is_file():
        parser.error(f"--before {args.before}: expected a checkout with save.py")
    for seed in [seed for seed in range(3) if not (args.out / f"tiny{seed}/heldout_id.jsonl").is_file()]:
        tiny_world(args.out / f"tiny{seed}", seed)
    if "laptop" in str(args.cases) and not (args.out / "laptop/world.json").is_file():
        python(args.before, ["tests/toy.py", "--out", args.out / "laptop"], args.out / "laptop.log")
    pool, failed = ThreadPoolExecutor(args.jobs), 0
    for name, future in [(name, pool.submit(compare, args, name)) for name in args.cases]:
        line = str(future.exception() or future.result())
        failed += not line.startswith("equal")
        print(f"{name:<18}{line}", flush=True)
    sys.exit(failed > 0)

if __name__ == "__main__":
    main()
