"""Measure save.py against the plain way of doing the same, alternating in one run.

    python tests/bench.py rollout --policy DIR     tokens per second beside transformers' generate
    python tests/bench.py memory                   peak memory of each phase at full size, computed without a GPU
    python tests/bench.py rm_memory --rm DIR       peak memory and time of the RM update, half the rows filtered
    python tests/bench.py steps --policy DIR --rm DIR --prompts FILE   a SAVE step beside a step with the RM frozen
    python tests/bench.py trl --policy DIR --rm DIR                    a GRPO and a SAVE step beside TRL's GRPOTrainer
    python tests/bench.py log_probs --policy DIR   log-probs and their gradient beside whole logits
    python tests/bench.py gains --policy DIR --rm DIR    each technique beside the same code without it
    python tests/bench.py models --out DIR [--size full]               random weights, of the paper's shapes or tiny
    python tests/bench.py phases --policy DIR --rm DIR --prompts FILE  seconds, memory and utilisation of each phase
    python tests/bench.py growth --policy DIR --rm DIR --prompts FILE  a step by group size, response length and ranks
    python tests/bench.py scoring --rm DIR --pairs FILE --rewardbench DIR   eval.py beside the rewardbench package

Each figure is the median over --repeats; ratios are taken pair by pair. CPU seconds are those of the whole process.
"""
import argparse
import contextlib
import importlib.util
import inspect
import itertools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
import warnings

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding,
                          LlamaConfig, LlamaForSequenceClassification, Qwen3Config, Qwen3ForCausalLM)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import eval as evaluation  # noqa: E402
import save  # noqa: E402
import toy  # noqa: E402
from pretend_gpu import Pretence  # noqa: E402

SHORT = ["Name three rivers in Europe.", "What is the capital of Australia?", "Why is the sky blue?"]
# freed blocks go back to the system at once, so that resident memory is what is in use
HONEST_MALLOC = dict.fromkeys(["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"], "65536")
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def compare(ours, theirs, repeats, name="generate", warm_up=1):
    """Run the two in turn, after `warm_up` rounds. Each returns a count; prints and returns counts per second."""
    rates = []
    for _ in tqdm(range(repeats + warm_up), leave=False):
        pair = []
        for run in (ours, theirs):
            cpu, wall = time.process_time(), time.perf_counter()
            count = run()
            pair += [count / (time.process_time() - cpu), count / (time.perf_counter() - wall)]
        rates.append(pair)
    rates = rates[warm_up:]
    for kind, i in (("CPU", 0), ("wall", 1)):
        ratios = [rate[i] / rate[i + 2] for rate in rates]
        print(f"  per {kind} second: ours {statistics.median(r[i] for r in rates):.4g}  "
              f"{name} {statistics.median(r[i + 2] for r in rates):.4g}  "
              f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} repeats)")
    return rates  # [CPU ours, wall ours, CPU theirs, wall theirs] of each repeat


def bench_rollout(args):
    """Useful response tokens per second, G = 16, our rollout and generate(num_return_sequences=16)."""
    policy = save.Policy.from_pretrained(args.policy).float()
    tokenizer = policy.tokenizer
    filler = " ".join(f"Item {i}: the quick brown fox jumps over the lazy dog." for i in range(60))
    long = [tokenizer.decode(tokenizer(filler)["input_ids"][i:i + 270]) for i in (0, 40)]
    cases = {"short": ("3 short prompts", SHORT, 48), "long": ("2 prompts of about 300 tokens", long, 24)}
    for name, prompts, new in (cases[case] for case in args.cases):
        ids = [save.encode_chats(tokenizer, [[{"role": "user", "content": text}]], True)[0] for text in prompts]
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


def bench_rm_memory(args):
    """Each variant in its own process: peak resident memory above that before the update, and CPU seconds."""
    results = {}
    for _ in range(args.repeats):
        for variant in ("held", "ours"):
            out = subprocess.run([sys.executable, __file__, "rm_memory", "--rm", args.rm, "--variant", variant,
                                  "--layers", str(args.layers)],
                                 env=os.environ | HONEST_MALLOC, capture_output=True, text=True, check=True).stdout
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


def rm_memory_variant(args):
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
        save.accumulate(rm, save.micro_batches(weights.nonzero()[:, 0].tolist(), chats, 256), lambda model, rows: ((
            model(*save.model_inputs([chats[row] for row in rows], "cpu"))[0] * weights[rows]).sum(), ()))
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


# ---------------------------------------------------------------- a step beside TRL's
# answered in more than 32 tokens
ASKED = ["Explain in detail how a steam engine works.", "Tell me a long story about a lighthouse keeper."]
STEP = {"group": 8, "max_new_tokens": 32, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "lr_policy": 2e-6,
        "kl_coef": 0.04}


def bench_trl(args):
    """Process CPU seconds and peak memory of one step, each variant in its own process, in turn."""
    results = {variant: [] for variant in (*args.variants, "trl")}
    for _ in tqdm(range(args.repeats), leave=False):
        for variant, runs in results.items():
            done = subprocess.run([sys.executable, __file__, "trl", "--policy", args.policy, "--rm", args.rm,
                                   "--variant", variant], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{variant}: {done.stderr[-2000:]}")
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    trl = results["trl"]
    for variant, runs in results.items():
        ratios = [run["cpu"] / peer["cpu"] for run, peer in zip(runs, trl)]
        print(f"{variant:<5} {statistics.median(run['cpu'] for run in runs):6.2f} CPU seconds a step, ratio to TRL "
              f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(runs)} repeats); "
              f"{statistics.median(run['mb'] for run in runs):.0f} MB at the peak; "
              f"{statistics.mean(run['tokens'] for run in runs):.1f} tokens a response")


def trl_variant(args):
    """The second step of a run: {"cpu": its process seconds, "mb": peak memory of the run, "tokens": a response's}."""
    marks, tokens = [], []
    with tempfile.TemporaryDirectory() as out:
        if args.variant == "trl":
            train_with_trl(args, out, marks, tokens)
        else:
            step, sample, prompts = save.save_step, save.sample, pathlib.Path(out, "prompts.jsonl")
            prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ASKED))

            def timed(run, *inputs):
                marks.append(time.process_time())
                step(run, *inputs)
                marks.append(time.process_time())
                tokens.append(run.log.record["response_tokens"])
                if (args.variant != "grpo") is not ("rm_update_seconds" in run.log.record):
                    raise RuntimeError(f"variant {args.variant}: expected an update of the reward model in SAVE alone")

            def usable(*inputs):  # responses cut at 32 tokens would not train the reward model
                batch = sample(*inputs)
                batch.usable = torch.ones_like(batch.usable)
                batch.usable[:, 1::2] = args.variant != "half"
                return batch
            flags = [word for name, x in STEP.items() for word in (f"--{name}", str(x))]
            with unittest.mock.patch.multiple(save, save_step=timed, sample=usable):  # --m0 0: no response is filtered
                save.main(["--policy", args.policy, "--rm", args.rm, "--prompts", str(prompts), "--out", f"{out}/run",
                           "--rm_update", "none" if args.variant == "grpo" else "save", "--batch", "2", "--steps", "2",
                           "--save_every", "0", "--m0", "0", "--value_prompts", "2", "--value_k", "8", "--value_epochs",
                           "100", "--value_lr", "0.05", "--lr_rm", "1e-7", "--max_prompt_tokens", "64", *flags])
    print(json.dumps({"cpu": marks[3] - marks[2], "mb": memory_mb("VmHWM"), "tokens": tokens[1]}))


def train_with_trl(args, out, marks, tokens):
    """Two steps of TRL's GRPOTrainer, the loss as in the paper, the reward model as its reward function."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append(time.process_time())

        def on_step_end(self, *_, **__):
            marks.append(time.process_time())
    rm = AutoModelForSequenceClassification.from_pretrained(args.rm, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.rm)
    config = GRPOConfig(
        output_dir=out, per_device_train_batch_size=2 * STEP["group"], num_generations=STEP["group"], max_steps=2,
        max_completion_length=STEP["max_new_tokens"], temperature=STEP["temperature"], top_p=STEP["top_p"],
        top_k=STEP["top_k"], beta=STEP["kl_coef"], learning_rate=STEP["lr_policy"], lr_scheduler_type="constant",
        loss_type="grpo", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none",
        logging_steps=1, disable_tqdm=True, model_init_kwargs={"dtype": "float32"})
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in ASKED])
    trainer = GRPOTrainer(args.policy, rm, config, data, reward_processing_classes=tokenizer, callbacks=[Clock()])
    trainer.train()
    tokens += [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]


# ---------------------------------------------------------------- log-probs beside whole logits
def bench_log_probs(args):
    """CPU seconds and peak memory of the log-probs of 16 responses and of their gradient, each in its own process."""
    results = {(variant, what): [] for what in ("forward", "backward") for variant in ("ours", "whole")}
    for _ in tqdm(range(args.repeats), leave=False):
        for (variant, what), runs in results.items():
            done = subprocess.run([sys.executable, __file__, "log_probs", "--policy", args.policy, "--layers",
                                   str(args.layers), "--variant", variant, "--direction", what],
                                  env=os.environ | HONEST_MALLOC, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    for what in ("forward", "backward"):
        ours, whole = results["ours", what], results["whole", what]
        speed = [b["cpu"] / a["cpu"] for a, b in zip(ours, whole)]
        memory = [a["mb"] / b["mb"] for a, b in zip(ours, whole)]
        print(f"log-probs, {what}: {statistics.median(speed):.2f} x the speed ({min(speed):.2f} to {max(speed):.2f}), "
              f"{statistics.median(memory):.2f} of the memory ({min(memory):.2f} to {max(memory):.2f}); "
              f"ours {statistics.median(a['cpu'] for a in ours):.1f} CPU seconds, "
              f"{statistics.median(a['mb'] for a in ours):.0f} MB; relative difference of the sums "
              f"{max(abs(a['sum'] / b['sum'] - 1) for a, b in zip(ours, whole)):.0e}; {len(ours)} repeats")


def log_probs_variant(args):
    """`ours`: sorted micro-batches, no mask, response positions only. `whole`: fours in order, mask, all logits."""
    policy = save.Policy.from_pretrained(args.policy).float()
    policy.model.model.layers = policy.model.model.layers[:args.layers]
    numbers = torch.Generator().manual_seed(0)
    rows = [(torch.randint(10, 1000, (48 + int(n),), generator=numbers).tolist(), 48)
            for n in (4.3 + 0.7 * torch.randn(16, generator=numbers)).exp().clamp(8, 320)]
    longest = max(len(ids) for ids, _ in rows)
    batches = save.micro_batches(range(16), rows, 4 * longest) if args.variant == "ours" \
        else [range(i, i + 4) for i in range(0, 16, 4)]
    backward = args.direction == "backward"
    for p in policy.parameters():
        p.grad = torch.zeros_like(p) if backward else None
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    base, cpu, summed = memory_mb("VmRSS"), time.process_time(), 0.0
    with torch.set_grad_enabled(backward):
        for batch in batches:
            ids, lengths, prompts = save.model_inputs([rows[row] for row in batch], "cpu")
            if args.variant == "ours":
                log_probs, mask = policy(ids, lengths, prompts, 0.7)
            else:
                mask = torch.arange(ids.shape[1]) < lengths[:, None]
                logits = policy.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1] / 0.7
                log_probs = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
                mask = mask[:, 1:] & (torch.arange(1, ids.shape[1]) >= prompts[:, None])
            result = torch.where(mask, log_probs, 0).sum()
            if backward:
                result.backward()
            summed += result.item()
    print(json.dumps({"mb": memory_mb("VmHWM") - base, "cpu": time.process_time() - cpu, "sum": summed}))


# ---------------------------------------------------------------- each technique beside the same code without it
def without(function, line, plain):
    """`function` of save.py with one expression of its source replaced."""
    source = inspect.getsource(function)
    if source.count(line) != 1:
        raise ValueError(f"{function.__name__} has {source.count(line)} times {line!r}, expected 1")
    names = dict(vars(save))
    exec(source.replace(line, plain), names)
    return names[function.__name__]


def bench_gains(args):
    """CPU seconds without each technique over those with it, in turn. Rollouts: seconds per token."""
    policy = save.Policy.from_pretrained(args.policy).float()
    rm = save.RewardModel.from_pretrained(args.rm, new_head=True).float()
    short = [save.encode_chats(policy.tokenizer, [[{"role": "user", "content": text}]], True)[0] for text in SHORT]
    long = [ids * 10 for ids in short[:1]]  # of about 350 tokens
    keep_all = without(save.decode, "len(running) <= len(rows) * 7 // 8", "False")
    numbers = torch.Generator().manual_seed(0)
    chats = [(torch.randint(10, 1000, (40 + int(n),), generator=numbers).tolist(), 40)
             for n in (4.3 + 0.7 * torch.randn(32, generator=numbers)).exp().clamp(8, 320)]

    def sampled(seed, group=16, ids=short, decode=save.decode, **change):
        seeds = [save.seed_for(seed, row) for row in range(len(ids) * 16)]
        prompts = ids if group > 1 else [prompt for prompt in ids for _ in range(16)]
        with unittest.mock.patch.object(save, "decode", decode):
            responses, _ = save.rollout(policy, prompts, group, seeds, max_new_tokens=48, **SAMPLING | change)
        return sum(map(len, responses))

    def scored(in_order=False):
        batches = (lambda rows, *_: [list(rows)[i:i + 8] for i in range(0, 32, 8)]) if in_order else save.micro_batches
        with unittest.mock.patch.object(save, "micro_batches", batches):
            save.score(rm, chats, 8 * 130)
        return 1

    def updated(rows):
        save.accumulate(rm, save.micro_batches(rows, chats, 1024), lambda model, rows: (model(
            *save.model_inputs([chats[row] for row in rows], "cpu"))[0].sum(), ()))
        return 1

    def values():  # V from a pass over the prompts alone, one for each group of 16
        save.score(rm, [(chat[:40], 40) for chat, _ in chats[::16]], 1024)
        return scored()

    cases = {
        "rollout": (sampled, {"a prefill for each response": lambda seed: sampled(seed, group=1),
                              "ended rows kept": lambda seed: sampled(seed, decode=keep_all),
                              "the whole vocabulary sorted": lambda seed: sampled(seed, top_k=0)}),
        "rollout, long prompts": (lambda seed: sampled(seed, ids=long), {
            "a prefill for each response": lambda seed: sampled(seed, group=1, ids=long)}),
        "score": (lambda seed: scored(), {"batches of 8 in order": lambda seed: scored(True),
                                          "V from a pass of its own": lambda seed: values()}),
        "RM update": (lambda seed: updated(range(0, 32, 2)),
                      {"rows without a gradient too": lambda seed: updated(range(32))})}
    ratios = {}
    for seed in tqdm(range(args.repeats), leave=False):
        for phase, (ours, plain) in cases.items():
            seconds = {}
            for name, run in {"": ours, **plain}.items():
                start = time.process_time()
                count = run(seed)
                seconds[name] = (time.process_time() - start) / count
            for name in plain:
                ratios.setdefault((phase, name), []).append(seconds[name] / seconds[""])
    for (phase, name), runs in ratios.items():
        print(f"{phase}, {name}: x {statistics.median(runs):.2f} ({min(runs):.2f} to {max(runs):.2f}, "
              f"{len(runs)} repeats)")


# ---------------------------------------------------------------- phases, at full size and how they grow
SHAPES = {  # of Qwen3-4B-Instruct-2507 and Skywork-Reward-V2-Llama-3.2-3B
    "full": ({"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
              "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
             {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
              "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}),
    "small": ({"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
               "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},) * 2,  # for `growth` on a CPU
    "tiny": ({"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},) * 2}


def make_models(args):
    """policy/, rm/ and prompts.jsonl with random weights, for --temperature 50: any word may come next.

    Every --mean_tokens-th word is an EOS, so that lengths vary and most responses end: the RM trains on those only.
    """
    out, (policy_shape, rm_shape) = pathlib.Path(args.out), SHAPES[args.size]
    dtype = torch.bfloat16 if args.size == "full" else torch.float32
    special = ["<pad>", "<unk>", "<user>", "<assistant>", "<end>"]
    for name, kind, config, shape in (("policy", Qwen3ForCausalLM, Qwen3Config, policy_shape),
                                      ("rm", LlamaForSequenceClassification, LlamaConfig, rm_shape)):
        words = special + [f"w{i}" for i in range(shape["vocab_size"] - len(special))]
        tokenizer = toy.word_tokenizer(words, toy.POLICY_TEMPLATE, pad_token="<pad>", unk_token="<unk>",
                                       eos_token="<end>", additional_special_tokens=["<user>", "<assistant>"])
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = kind(config(**shape, max_position_embeddings=4096, tie_word_embeddings=True, num_labels=1,
                                dtype=dtype, pad_token_id=0, bos_token_id=None, eos_token_id=4))
        torch.set_default_dtype(torch.float32)
        if name == "policy":
            model.generation_config.eos_token_id = list(range(4, shape["vocab_size"], args.mean_tokens))
        toy.write_model(out / name, model, tokenizer)
        del model
    numbers = torch.Generator().manual_seed(0)
    prompts = [" ".join(f"w{i}" for i in torch.randint(0, 500, (args.prompt_tokens - 2,), generator=numbers))
               for _ in range(64)]
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))


PHASES = ("rollout", "score", "rm_update", "log_probs", "policy_update")


def phases(args, *flags):
    """Over the steps after the first: the median of each *_seconds, the largest *_gb; "score" is both passes.

    "host_gb" is the peak resident memory of the largest process of the run.
    """
    with tempfile.TemporaryDirectory() as out:
        words = ["--policy", args.policy, "--rm", args.rm, "--prompts", args.prompts, "--out", out, "--steps",
                 str(args.repeats + 1), "--save_every", "0", *args.flags, *flags]
        ranks = args.ranks
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] \
            if ranks > 1 else [sys.executable]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen([*start, save.__file__, *words], stdout=subprocess.DEVNULL, stderr=errors)
            _, process.returncode, usage = os.wait4(process.pid, 0)
            errors.seek(0)
            if process.returncode:
                sys.exit(errors.read()[-2000:])
        lines = [json.loads(line) for line in pathlib.Path(out, "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("stage") == "save" and line["step"] > 1]
    result = {name: statistics.median(step[name] for step in steps if name in step) for name in steps[0]
              if name.endswith("_seconds")}
    result |= {name: max(step[name] for step in steps if name in step) for name in steps[0] if name.endswith("_gb")}
    seconds = [step["step_seconds"] for step in steps]
    return result | {"host_gb": usage.ru_maxrss * 1024 / 1e9,  # Linux counts in units of 1024 bytes
                     "tokens": statistics.mean(step["response_tokens"] for step in steps),
                     "usable": statistics.mean(step["usable"] for step in steps),
                     "spread": f"{min(seconds):.3f} to {max(seconds):.3f}"}


def bench_phases(args):
    """One line a phase. Utilisation counts 2 FLOPs a parameter and token forward, 8 with backward and recomputation."""
    result = phases(args)
    cfg = save.parse_config(["--policy", args.policy, "--rm", args.rm, *args.flags])
    rows = cfg.batch // args.ranks * cfg.group
    sizes = {name: sum(p.numel() for p in kind.from_pretrained(path).parameters()) for name, kind, path in
             (("policy", AutoModelForCausalLM, args.policy), ("rm", AutoModelForSequenceClassification, args.rm))}
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    asked = [json.loads(line)["prompt"] for line in open(args.prompts, encoding="utf-8")]
    prompt = statistics.mean(len(save.encode_chats(tokenizer, [[{"role": "user", "content": text}]], True)[0])
                             for text in asked)
    tokens = rows * (prompt + result["tokens"])
    flops = {"score": 4 * sizes["rm"] * tokens, "rm_update": 8 * sizes["rm"] * tokens,
             "log_probs": 2 * sizes["policy"] * tokens, "policy_update": 8 * sizes["policy"] * tokens}
    print(f"{rows} rows of {prompt:.0f} + {result['tokens']:.0f} tokens a rank; a step {result['step_seconds']:.2f} s "
          f"({result['spread']}, {args.repeats} steps), 320 steps "
          f"{result['step_seconds'] * 320 / 3600:.1f} h; host {result['host_gb']:.2f} GB a rank")
    for phase in PHASES:
        seconds = result.get(f"{phase}_seconds")
        if seconds:
            rate = f"{flops[phase] / seconds / 1e12:.3g} TFLOP/s if no row is filtered" if phase in flops else \
                f"{rows * result['tokens'] / seconds:.4g} tokens/s"
            print(f"  {phase:<14} {seconds:8.3f} s  {rate}  {result.get(phase + '_gb', float('nan')):.1f} GB")


def bench_growth(args):
    """Seconds a step and host memory: group size, response length, ranks; each beside the first of its kind.

    The models of `models --size small`; tokens are those of prompts and responses that the step went through.
    """
    for flag, sizes in {"--group": (4, 8, 16), "--max_new_tokens": (32, 64, 128), "ranks": (1, 2)}.items():
        first = None
        for n in sizes:
            words = ["--batch", "4", "--group", "8", "--max_new_tokens", "64", "--max_prompt_tokens", "64",
                     "--value_prompts", "4", "--value_k", "4", "--rm_update", "mean_reward", "--m0", "0",
                     "--temperature", "50", "--top_k", "0", "--top_p", "1"]
            args.ranks = n if flag == "ranks" else 1
            result = phases(args, *words, *([] if flag == "ranks" else [flag, str(n)]))
            result["count"] = 4 * (n if flag == "--group" else 8) * (args.prompt_tokens + result["tokens"])
            first = first or result
            print(f"{flag} {n}: {result['step_seconds']:.3f} s a step ({result['spread']}), "
                  f"x {result['step_seconds'] / first['step_seconds']:.2f} for x "
                  f"{result['count'] / first['count']:.2f} tokens ({result['count']:.0f}); "
                  f"{result['usable']:.0%} of the rows usable for the RM; {result['host_gb'] * 1000:.0f} MB",
                  flush=True)


def rewardbench_pipeline(folder, path):
    """RewardBenchPipeline of rewardbench 0.1.4 on the stock model, set up as scripts/run_rm.py does, in fp32."""
    file = pathlib.Path(folder, "rewardbench", "models", "pipeline.py")
    spec = importlib.util.spec_from_file_location("rewardbench_pipeline", file)  # the whole package imports far more
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = AutoTokenizer.from_pretrained(path, truncation_side="left")  # the padding side stays the tokenizer's
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = model.config.pad_token_id = tokenizer.eos_token_id
    elif model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return module.RewardBenchPipeline("text-classification", model=model, tokenizer=tokenizer)


def rewardbench_scores(pipe, rows, size):
    """Rows in their order, a batch of chosen texts, then one of rejected ones -> [chosen, rejected, chosen, ...]."""
    to, sides = BatchEncoding.to, {"chosen": [], "rejected": []}
    # the pipeline moves its inputs to "cuda" whatever the model is on: here that means the model's device
    here = unittest.mock.patch.object(BatchEncoding, "to", lambda inputs, device: to(
        inputs, pipe.model.device if device == "cuda" else device))
    with here:
        for start in range(0, len(rows), size):
            for side, scores in sides.items():
                texts = [rendered(pipe.tokenizer, row, side) for row in rows[start:start + size]]
                logits = pipe(texts, batch_size=size, truncation=True, padding=True, max_length=2048)
                scores += logits.float().flatten().tolist()
    return [score for pair in zip(*sides.values()) for score in pair]


def rendered(tokenizer, row, side):
    """One side of a pair in the chat template, as text."""
    reply = {"role": "assistant", "content": save.as_messages(row[side], side)[-1]["content"]}
    return tokenizer.apply_chat_template([*row["prompt"], reply], tokenize=False)


@torch.no_grad()
def one_by_one(pipe, rows):
    """The plain loop: no padding, no mask, the stock forward pass -> [chosen, rejected, chosen, ...]."""
    texts = [rendered(pipe.tokenizer, row, side) for row in rows for side in ("chosen", "rejected")]
    return [pipe.model(torch.tensor([pipe.tokenizer(text)["input_ids"]])).logits.item() for text in texts]


def bench_scoring(args):
    """Pairs scored per second by eval.py and by the rewardbench package, templates and tokenisation included."""
    cfg = evaluation.EvalConfig(rm=[args.rm], bench=[args.pairs], limit=args.count, device="cpu",
                                max_length=2048).checked()
    rows = evaluation.read_benchmark(cfg, args.pairs)
    rm = save.to_working_copy(save.RewardModel.from_pretrained(args.rm), cfg)
    pipe, scores = rewardbench_pipeline(args.rewardbench, args.rm), {}

    def ours(count=len(rows)):  # an empty cache each time: nothing is remembered from the repeat before
        texts = [text for row in rows[:count] for text in evaluation.PAIRS.texts(row)]
        scores["ours"], _ = evaluation.score_texts(cfg, rm, evaluation.Cache("", "x"), texts, "ours")
        return count

    def theirs(count=len(rows)):
        scores["theirs"] = rewardbench_scores(pipe, rows[:count], args.rewardbench_batch)
        return count

    every = [evaluation.encode(rm.tokenizer, *text, 2048) for row in rows for text in evaluation.PAIRS.texts(row)]
    different = list(map(list, dict.fromkeys(map(tuple, every))))
    print(f"{len(rows)} pairs, {len(every)} texts, {len(different)} of them different")
    ours(2), theirs(2)  # a short warm-up, as a repeat takes minutes
    rates = compare(ours, theirs, args.repeats, "rewardbench", warm_up=0)
    worst = max(abs(a - b) for a, b in zip(scores["ours"], scores["theirs"], strict=True))
    for kind, count in (("texts", len), ("real tokens", lambda rows: sum(map(len, rows)))):  # that went through the RM
        pair = [(r[0] * count(different) / len(rows), r[2] * count(every) / len(rows)) for r in rates]
        ratios = [a / b for a, b in pair]
        print(f"  without the gain from duplicates, {kind} per CPU second: "
              f"ours {statistics.median(a for a, _ in pair):.4g}  "
              f"rewardbench {statistics.median(b for _, b in pair):.4g}  "
              f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"largest difference of scores: {worst:.1e} to rewardbench ({len(every)} texts)")
    cpu, first = time.process_time(), rows[:16]
    plain = one_by_one(pipe, first)
    cpu = time.process_time() - cpu
    worst = max(abs(a - b) for a, b in zip(scores["ours"], plain))
    print(f"largest difference of scores: {worst:.1e} to one text at a time ({len(plain)} texts, "
          f"{sum(map(len, every[:len(plain)])) / cpu:.4g} real tokens per CPU second, once)")


# ---------------------------------------------------------------- memory at full size, without a GPU
def llm(layers, hidden, heads, inner, words, tied):
    """The shape of a model of the Qwen3 or Llama family, as their configurations have it."""
    return {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": inner, "vocab_size": words, "tie_word_embeddings": tied}


MODELS = {  # policy and reward model: Qwen3-4B and Llama-3.2-3B, Qwen3-8B and Llama-3.1-8B
    "4B + 3B": (llm(36, 2560, 32, 9728, 151936, True), llm(28, 3072, 24, 8192, 128256, True)),
    "8B + 8B": (llm(36, 4096, 32, 12288, 151936, False), llm(32, 4096, 32, 14336, 128256, False))}


def bench_memory(args):
    """GB of 10^9 bytes on rank 0 at the peak of each phase, without the 1 to 2 GB of a CUDA context."""
    import transformers
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print("| models, ranks | always |", *(f"{phase.replace('_', ' ')} |" for phase in PHASES), "\n|---|" + 6 * "---|")
    for models, ranks, offload in itertools.product(MODELS, (1, 2, 4, 8), (False, True)):
        peaks = full_size_peaks(*MODELS[models], ranks, offload)
        print(f"| {models}, {ranks}{', --offload' if offload else ''} |",
              *(f"{peaks[phase]:.1f} |" for phase in ("always", *PHASES)), flush=True)


def full_size_peaks(policy, rm, ranks, offload):
    """{phase: GB} of rank 0, the paper's settings: save.py's own functions on tensors without data.

    The cache is full (--cache_tokens, prompts of 192 tokens), and so are two micro-batches (--micro_tokens, rows of
    2048 tokens). DDP's reducer is the real one; attention takes what flash attention takes.
    """
    with torch.device("meta"):
        policy, rm = (kind(config(**shape, num_labels=1, pad_token_id=None)).bfloat16() for kind, config, shape in (
            (Qwen3ForCausalLM, Qwen3Config, policy), (LlamaForSequenceClassification, LlamaConfig, rm)))
    alone = {"WORLD": ranks, "broadcast": lambda *_: None, "total": lambda *numbers: [0.0] * len(numbers)}
    with contextlib.ExitStack() as stack:
        if ranks > 1:
            torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
            stack.callback(torch.distributed.destroy_process_group)
        stack.enter_context(unittest.mock.patch.multiple(save, **alone))
        stack.enter_context(unittest.mock.patch.object(
            torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, is_causal=False, **_:
            torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]))
        gpu, out = stack.enter_context(Pretence("meta")), stack.enter_context(tempfile.TemporaryDirectory())
        cfg = save.Config(offload=offload, out=out).checked()
        run = save.Run(cfg, save.RewardModel(rm, toy.rm_tokenizer()).to(cfg.device),
                       save.Policy(policy, toy.policy_tokenizer()).to(cfg.device), save.Log(cfg))
        for name, lr in (("rm", cfg.lr_rm), ("policy", cfg.lr_policy)):
            model = getattr(run, name)
            run.optimizers[name] = save.ShardedAdamW(model.model, lr, cfg, keep_initial=name == "policy")
            save.to_working_copy(model, cfg)
            for p in model.model.parameters():
                p.grad = torch.zeros_like(p)
            run.optimizers[name].step()  # from now on there are moments
        always = gpu.live / 1e9
        go_through_phases(run, gpu, min(8, cfg.batch // ranks))
        return {"always": always, **{phase: run.log.record[f"{phase}_gb"] for phase in PHASES}}


def go_through_phases(run, gpu, prompts):
    """The phases of a step; run.log notes the peak of each. gpu.numbers: the longest prompt, then response."""
    cfg, algorithm, rows = run.cfg, save.ALGORITHMS["grpo"], [([0] * 2048, 1024)] * 8
    gpu.numbers, width = {torch.bool: False, torch.long: 1214}, 1214  # all but the last two of 192 + 1024 tokens
    with run.log.time("rollout"), torch.no_grad():
        save.decode(run.policy, [[0] * width] * prompts, cfg.group, range(prompts * cfg.group), 2, 0.7, 0.8, 20)
    gpu.numbers[torch.long] = 1024
    with run.log.time("score"):
        save.score(run.rm, rows, cfg.micro_tokens)
    batches = save.micro_batches(range(len(rows)), rows, cfg.micro_tokens)

    def inputs(part):
        return save.model_inputs([rows[row] for row in part], cfg.device)
    save.train_on(run, "rm", batches, lambda model, part: (model(*inputs(part))[0].sum(), ()))
    batch = argparse.Namespace(sequences=rows, lengths=torch.full((len(rows),), 1024))
    with run.log.time("log_probs"), run.optimizers["policy"].swapped():
        reference = save.response_log_probs(run, batch, batches)
    advantages = torch.zeros(len(rows), device=cfg.device)

    def micro_loss(model, part):
        log_probs, mask = model(*inputs(part), cfg.temperature)
        loss, _ = save.policy_loss(log_probs, log_probs, reference[part], advantages[part], mask, algo=algorithm,
                                   clip_low=cfg.clip_low, clip_high=cfg.clip_high, kl_coef=cfg.kl_coef)
        return loss, ()
    save.train_on(run, "policy", batches, micro_loss)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("what", choices=["rollout", "memory", "rm_memory", "steps", "trl", "log_probs", "gains",
                                         "models", "phases", "growth", "scoring"])
    parser.add_argument("--policy")
    parser.add_argument("--rm")
    parser.add_argument("--prompts")
    parser.add_argument("--variants", nargs="+", choices=["grpo", "save", "half"], default=["grpo", "save", "half"],
                        help="trl: beside TRL; half: SAVE with every second row left out of the RM's update")
    parser.add_argument("--out", help="models: where to write")
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--prompt_tokens", type=int, default=256, help="models: length of the prompts")
    parser.add_argument("--mean_tokens", type=int, default=600, help="models: mean length of the responses")
    parser.add_argument("--ranks", type=int, default=1, help="phases: processes of torchrun")
    parser.add_argument("--pairs", help="scoring: .jsonl of prompt, chosen, rejected")
    parser.add_argument("--count", type=int, default=48, help="scoring: the first pairs of the file")
    parser.add_argument("--rewardbench", help="scoring: folder of the unpacked rewardbench 0.1.4 wheel")
    parser.add_argument("--rewardbench_batch", type=int, default=64, help="scoring: its scripts/run_rm.py has 64")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=["short", "long"], default=["short", "long"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--direction", help=argparse.SUPPRESS)
    args, args.flags = parser.parse_known_args()  # the rest goes to save.py
    variants = {"rm_memory": rm_memory_variant, "trl": trl_variant, "log_probs": log_probs_variant}
    benches = {"rollout": bench_rollout, "memory": bench_memory, "rm_memory": bench_rm_memory, "steps": bench_steps,
               "trl": bench_trl, "log_probs": bench_log_probs, "gains": bench_gains, "models": make_models,
               "phases": bench_phases, "growth": bench_growth, "scoring": bench_scoring}
    (variants if args.variant else benches)[args.what](args)
