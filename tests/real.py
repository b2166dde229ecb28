"""SAVE and its rivals on a real model and real preferences, judged on real benchmarks with paired intervals.

    python tests/real.py --model DIR --data DIR --out runs/real            # one GPU: all pairs, 100 steps, G = 16
    OMP_NUM_THREADS=1 python tests/real.py --model DIR --data DIR --out runs/real --quick --jobs 2   # two CPU cores:
        # other methods and controls, on the last layers alone; see real_quick.py

--model: a small chat model (a causal LM), policy and start of the reward model. --data: a folder with
preferences/preferences_{train,heldout}.jsonl.gz (prompt, chosen, rejected) and the files of `eval.py --data`.
The reward model is trained on the pairs (or given: --rm), then its value head, then each method starts from both.
--head 3 multiplies the trained head, and so the spread of rewards within a group; give it an --out of its own. The
first row of the result is the frozen RM. A stage whose folder is there is not run again.
"""
import argparse
import concurrent.futures
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"save": ["save.py"], "centred": ["tests/forks/centred.py"],
           "balanced": ["tests/forks/balanced.py"],
           "hl_bt": ["tests/forks/hl_bt.py"], "mean_reward": ["save.py", "--rm_update", "mean_reward"]}
FULL = {
    "tokens": 1024, "prompt": 512, "pairs": 10 ** 6, "suffix": "", "bench": ["judgebench", "rmbench"],
    "preference": "--batch 32 --lr_rm 2e-5 --lr_schedule linear --max_prompt_tokens 512",
    "save": "--steps 100 --batch 8 --group 16 --max_new_tokens 256 --lr_rm 1e-6 --value_lr 2e-3 "
            "--value_epochs 10 --lr_value 1e-4"}
def call(script, *words):
    """Run a script of the repository in this environment."""
    print("$", script, *words, flush=True)
    subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], check=True)

def pairs(args, size, name, limit):
    """The pairs of at most size["tokens"] tokens, in a fixed random order, as out/NAME.jsonl."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with gzip.open(Path(args.data, "preferences", f"preferences_{name}.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if len(tokenizer(row["prompt"])["input_ids"]) + max(
        len(tokenizer(row[side])["input_ids"]) for side in ("chosen", "rejected")) <= size["tokens"]]
    random.Random(0).shuffle(rows)
    path = Path(args.out, f"{name}.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:limit]))
    return path

def asked(args, size, train):
    """The prompts of `train` that fit size["prompt"] tokens in the chat template, as out/prompts.jsonl."""
    tokenizer, path = AutoTokenizer.from_pretrained(args.model), Path(args.out, "prompts.jsonl")
    prompts = [json.loads(line)["prompt"] + size["suffix"] for line in train.read_text().splitlines()]
    short = [prompt for prompt in prompts if len(tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True)["input_ids"]) <= size["prompt"]]
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in short))
    return path

def scaled(rm, path, factor):
    """A copy of a reward model folder whose rewards are `factor` times as large: the same ranking, another spread."""
    model = AutoModelForSequenceClassification.from_pretrained(rm)
    model.score.weight.data *= factor
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(rm).save_pretrained(path)
    return path

def main(argv=None):
    """Preference stage, value stage, the methods, eval.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="runs/real")
    parser.add_argument("--rm", help="a reward model folder instead of the preference stage")
    parser.add_argument("--head", type=float, default=1.0, help="factor of the reward head")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="methods trained side by side")
    args, flags = parser.parse_known_args(argv)  # the rest goes to save.py's joint training
    if args.quick:
        import real_quick  # it imports this file
        if flags or args.rm or args.head != 1 or args.methods != list(METHODS):
            parser.error("--quick has reward models, heads, methods and flags of its own")
        return real_quick.main(args)
    size, out = FULL, Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    train, heldout = pairs(args, size, "train", size["pairs"]), pairs(args, size, "heldout", 10 ** 6)
    rm = args.rm or out / "preference" / "rm"
    if not Path(rm).is_dir():
        start = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1)
        start.save_pretrained(out / "start")
        AutoTokenizer.from_pretrained(args.model).save_pretrained(out / "start")
        call("save.py", "--stage", "preference", "--rm", out / "start", "--pairs", train, "--heldout", heldout, "--out",
             out / "preference", *size["preference"].split())
    if args.head != 1:
        rm = scaled(rm, out / "scaled", args.head)
    prompts = asked(args, size, train)
    common = ["--policy", args.model, "--prompts", prompts, "--max_prompt_tokens", size["prompt"], "--save_every", "0",
              *size["save"].split(), *flags]
    if not (out / "value" / "rm").is_dir():
        call("save.py", "--stage", "value", "--rm", rm, "--out", out / "value", *common)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda method: call(*METHODS[method], "--stage", "save", "--rm", out / "value" / "rm", "--out",
                                          out / method, *common),
                      [method for method in args.methods if not (out / method / "rm").is_dir()]))
    trained = [out / method / "rm" for method in args.methods]
    call("eval.py", "--rm", out / "value" / "rm", *trained, "--bench", heldout, *size["bench"], "--data", args.data,
         "--out", out / "eval")

if __name__ == "__main__":
    main()
