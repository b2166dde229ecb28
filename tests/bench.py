"""Measure save.py against the plain way of doing the same, alternating in one run.

    python tests/bench.py rollout --policy DIR     tokens per second beside transformers' generate
    python tests/bench.py memory --rm DIR          peak memory and time of the RM update, half the rows filtered
    python tests/bench.py steps --policy DIR --rm DIR --prompts FILE   a SAVE step beside a step with the RM frozen

Each figure is the median over --repeats; ratios are taken pair by pair. CPU seconds are those of the whole process.
"""
import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import save  # noqa: E402

SHORT = ["Name three rivers in Europe.", "What is the capital of Australia?", "Why is the sky blue?"]
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def compare(ours, theirs, repeats):
    """Run the two in turn. Each returns a count; the result is (count per CPU second, per wall second) of both."""
    rates = []
    for _ in tqdm(range(repeats + 1), leave=False):  # the first is a warm-up
        pair = []
        for run in (ours, theirs):
            cpu, wall = time.process_time(), time.perf_counter()
            count = run()
            pair += [count / (time.process_time() - cpu), count / (time.perf_counter() - wall)]
        rates.append(pair)
    rates = rates[1:]
    for kind, i in (("CPU", 0), ("wall", 1)):
        ratios = [rate[i] / rate[i + 2] for rate in rates]
        print(f"  per {kind} second: ours {statistics.median(r[i] for r in rates):.1f}  "
              f"generate {statistics.median(r[i + 2] for r in rates):.1f}  "
              f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)")


def bench_rollout(args):
    """Useful response tokens per second, G = 16, our rollout and generate(num_return_sequences=16)."""
    policy = save.Policy.from_pretrained(args.policy)
    tokenizer = policy.tokenizer
    filler = " ".join(f"Item {i}: the quick brown fox jumps over the lazy dog." for i in range(60))
    long = [tokenizer.decode(tokenizer(filler)["input_ids"][i:i + 270]) for i in (0, 40)]
    cases = {"short": ("3 short prompts", SHORT, 48), "long": ("2 prompts of about 300 tokens", long, 24)}
    for name, prompts, new in (cases[case] for case in args.cases):
        ids = [save.encode_chat(tokenizer, [{"role": "user", "content": text}], True) for text in prompts]
        print(f"{name} ({', '.join(str(len(x)) for x in ids)} tokens) x 16, at most {new} new tokens")
        step = iter(range(10 ** 6))

        def ours():
            seeds = [save.seed_for(next(step)) for _ in range(len(ids) * 16)]
            responses, _ = save.rollout(policy, ids, 16, seeds, max_new_tokens=new, **SAMPLING)
            return sum(map(len, responses))

        def theirs():
            torch.manual_seed(next(step))
            width = max(map(len, ids))
            batch = torch.tensor([[tokenizer.pad_token_id] * (width - len(x)) + x for x in ids])
            mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids])
            out = policy.model.generate(input_ids=batch, attention_mask=mask, do_sample=True, max_new_tokens=new,
                                        num_return_sequences=16, repetition_penalty=1.0, **SAMPLING)
            ended = torch.isin(out[:, width:], torch.tensor(policy.eos_ids)).int()
            return int(((ended.cumsum(1) - ended) == 0).sum())  # up to and including the first EOS

        compare(ours, theirs, args.repeats)


def bench_memory(args):
    """Each variant in its own process: peak resident memory above that before the update, and CPU seconds."""
    results = {}
    for _ in range(args.repeats):
        for variant in ("held", "ours"):
            # freed blocks go back to the system at once, so that resident memory is what is in use
            out = subprocess.run([sys.executable, __file__, "memory", "--rm", args.rm, "--variant", variant,
                                  "--layers", str(args.layers)],
                                 env=os.environ | dict.fromkeys(["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"],
                                                                "65536"),
                                 capture_output=True, text=True, check=True).stdout
            results.setdefault(variant, []).append(json.loads(out))
    for key, unit in (("mb", "MB above the base"), ("cpu", "CPU seconds")):
        held, ours = ([r[key] for r in results[v]] for v in ("held", "ours"))
        ratios = [a / b for a, b in zip(ours, held)]
        print(f"RM update, {unit}: ours {statistics.median(ours):.1f}  whole graph {statistics.median(held):.1f}  "
              f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    error = max(abs(a["norm"] / b["norm"] - 1) for a, b in zip(results["held"], results["ours"]))
    print(f"relative difference of the gradient norms: {error:.1e}")


def memory_mb(what):
    """Resident memory now (VmRSS) or its peak (VmHWM), in MB, as Linux counts it."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+)", status)[1]) / 1024


def memory_variant(args):
    """One backward pass of the contrastive loss, 2 prompts x 16 responses of about 120 tokens, half filtered."""
    rm = save.RewardModel.from_pretrained(args.rm, new_head=True)
    rm.model.model.layers = rm.model.model.layers[:args.layers]  # all 30 would need 10 GB for the whole graph
    rm.value_head.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    chats = [(torch.randint(10, 1000, (int(n),), generator=generator).tolist(), 20)
             for n in torch.randint(60, 180, (32,), generator=generator)]
    rewards, _ = save.score(rm, chats, 1024)
    rewards = rewards.view(2, 16)
    values = rewards.median(1).values
    distance = (rewards - values[:, None]).abs()
    keep = distance >= distance.median(1, keepdim=True).values  # half of each group is near its anchor
    positive, negative = keep & (rewards >= values[:, None]), keep & (rewards < values[:, None])
    for p in rm.parameters():  # the gradient buffers belong to the base: both variants need them
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here, without that of loading
    base, cpu = memory_mb("VmRSS"), time.process_time()
    if args.variant == "held":
        live, _ = rm(*save.model_inputs(chats, "cpu"))
        save.contrastive_loss(live.view(2, 16), values, positive, negative).backward()
    else:
        leaf = rewards.clone().requires_grad_()
        weights = torch.autograd.grad(save.contrastive_loss(leaf, values, positive, negative), leaf)[0].flatten()
        save.accumulate(rm, save.micro_batches(weights.nonzero()[:, 0].tolist(), chats, 256), lambda model, rows: (
            model(*save.model_inputs([chats[row] for row in rows], "cpu"))[0] * weights[rows]).sum())
    norm = torch.stack([p.grad.norm() for p in rm.parameters() if p.requires_grad]).norm().item()
    print(json.dumps({"mb": memory_mb("VmHWM") - base, "cpu": time.process_time() - cpu, "norm": norm}))


def bench_steps(args):
    """Seconds per step of --rm_update save and none, runs in turn, the first step of each run left out."""
    times = {"save": [], "none": []}
    for repeat in range(args.repeats):
        for update in times:
            with tempfile.TemporaryDirectory() as out:
                save.main(["--policy", args.policy, "--rm", args.rm, "--prompts", args.prompts, "--out", out, "--steps",
                           "4", "--rm_update", update, "--save_every", "0", "--seed", str(repeat), *args.flags])
                records = [json.loads(line) for line in open(pathlib.Path(out, "metrics.jsonl"), encoding="utf-8")]
                times[update].append(statistics.mean(r["step_seconds"] for r in records if r.get("step", 0) > 1))
    ratios = [a / b for a, b in zip(times["save"], times["none"])]
    print(f"seconds per step: SAVE {statistics.median(times['save']):.2f}  "
          f"RM frozen {statistics.median(times['none']):.2f}  ratio {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rollout", "memory", "steps"])
    parser.add_argument("--policy")
    parser.add_argument("--rm")
    parser.add_argument("--prompts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=["short", "long"], default=["short", "long"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--variant", choices=["held", "ours"], help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    args.flags = flags
    if args.what == "memory":
        memory_variant(args) if args.variant else bench_memory(args)
    else:
        {"rollout": bench_rollout, "steps": bench_steps}[args.what](args)
