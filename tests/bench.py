"""Measure save.py against the plain way of doing the same, alternating in one run.

    python tests/bench.py memory --policy DIR_OR_NAME --rm DIR_OR_NAME --ranks 2 [--offload]   what fits, without a GPU
    python tests/bench.py memory                   peak memory of each phase for the paper's sizes of models
    python tests/bench.py rollout --policy DIR     tokens per second beside transformers' generate
    python tests/bench.py cache --policy DIR       rollout on the cache of tests/forks/fast_rollout.py, and on save.py's
    python tests/bench.py rm_memory --rm DIR       peak memory and time of the RM update, half the rows filtered
    python tests/bench.py steps --policy DIR --rm DIR --prompts FILE   a SAVE step beside a step with the RM frozen
    python tests/bench.py trl --policy DIR --rm DIR                    a GRPO and a SAVE step beside TRL's GRPOTrainer
    python tests/bench.py log_probs --policy DIR   log-probs and their gradient beside whole logits
    python tests/bench.py models --out DIR [--size full]               random weights, of the paper's shapes or tiny
    python tests/bench.py phases --policy DIR --rm DIR --prompts FILE  seconds, memory and utilisation of each phase
    python tests/bench.py scoring --rm DIR --pairs FILE --rewardbench DIR   eval.py beside the rewardbench package

Each figure is the median over --repeats; ratios are taken pair by pair. CPU seconds are those of the whole process.
Flags that are not of this file go to save.py.
"""
import argparse
import dataclasses
import importlib.util
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
import transformers
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          BatchEncoding, LlamaConfig, LlamaForSequenceClassification, Qwen3Config, Qwen3ForCausalLM)

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1]), str(pathlib.Path(__file__).with_name("forks"))]
import eval as evaluation  # noqa: E402
import save  # noqa: E402
import toy  # noqa: E402
import pretend_gpu  # noqa: E402
from pretend_gpu import PHASES, memory_peaks, what_fits  # noqa: E402

SHORT = ["Name three rivers in Europe.", "What is the capital of Australia?", "Why is the sky blue?"]
# freed blocks go back to the system at once, so that resident memory is what is in use
HONEST_MALLOC = dict.fromkeys(["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"], "65536")
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}

def spread(values, digits=".2f"):
    """Median (least to largest)."""
    return f"{statistics.median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"

def compare(ours, theirs, repeats, name="generate"):
    """Run the two in turn, after a round to warm up. Each returns a count; prints counts per second."""
    rates = []
    for _ in tqdm(range(repeats + 1), leave=False):
        rates.append([])
        for run in (ours, theirs):
            cpu, wall = time.process_time(), time.perf_counter()
            count = run()
            rates[-1] += [count / (time.process_time() - cpu), count / (time.perf_counter() - wall)]
    for kind, i in (("CPU", 0), ("wall", 1)):
        us, them = ([rate[i + j] for rate in rates[1:]] for j in (0, 2))
        print(f"  per {kind} second: ours {statistics.median(us):.4g}  {name} {statistics.median(them):.4g}  "
              f"ratio {spread([a / b for a, b in zip(us, them)])}, {repeats} repeats")

def in_processes(args, what, variants, *words, env=None):
    """Each variant in a process of its own, in turn -> {variant: what it printed as JSON, of each repeat}."""
    results = {variant: [] for variant in variants}
    for _ in tqdm(range(args.repeats), leave=False):
        for variant, runs in results.items():
            done = subprocess.run([sys.executable, __file__, what, *map(str, words), "--variant", variant],
                                  env=os.environ | (env or {}), capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{variant}: {done.stderr[-2000:]}")
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    return results

def memory_mb(what):
    """Resident memory now (VmRSS) or its peak (VmHWM), in MB, as Linux counts it."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+)", status)[1]) / 1024

def print_measured(work, name):
    """What work() returns, its CPU seconds and its peak memory above that before it, as JSON."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here, without that of loading
    base, cpu = memory_mb("VmRSS"), time.process_time()
    result = work()
    print(json.dumps({name: result, "cpu": time.process_time() - cpu, "mb": memory_mb("VmHWM") - base}))

def chats_of(lengths, prompt):
    """[(random ids, length of the prompt)], the same ones every time."""
    numbers = torch.Generator().manual_seed(1)
    return [(torch.randint(10, 1000, (int(n),), generator=numbers).tolist(), prompt) for n in lengths]

def log_normal(count):
    """Lengths of `count` responses, about 74 tokens, 8 to 320."""
    return (4.3 + 0.7 * torch.randn(count, generator=torch.Generator().manual_seed(0))).exp().clamp(8, 320)

def new_reward_model(path):
    """A reward model in fp32 on any causal language model; its head is new where it has none."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    return save.RewardModel(model.eval(), AutoTokenizer.from_pretrained(path))

def back_propagate(rm, batches, chats, weights):
    """The gradient of the sum of weights (N,) * rewards, as save.py takes it, without the optimizer's step."""
    save.train_on(unittest.mock.MagicMock(rm=rm), "rm", batches, lambda model, rows: (
        (model(*save.model_inputs([chats[row] for row in rows], "cpu"))[0] * weights[rows]).sum(), ()))

def bench_rollout(args):
    """Useful response tokens per second, G = 16, our rollout and generate(num_return_sequences=16)."""
    policy = save.Policy.from_pretrained(args.policy).float()
    tokenizer = policy.tokenizer
    filler = " ".join(f"Item {i}: the quick brown fox jumps over the lazy dog." for i in range(60))
    long = [tokenizer.decode(tokenizer(filler)["input_ids"][i:i + 270]) for i in (0, 40)]
    for name, prompts, new in (("short prompts", SHORT, 48), ("long prompts", long, 24)):
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

def bench_cache(args):
    """CPU and wall seconds of 2 prompts x 16 responses of at most --new tokens, the two caches in turn."""
    import fast_rollout
    policy = save.Policy.from_pretrained(args.policy).float()
    caches = {"grown by 256": fast_rollout.growing_cache, "save.py's": save.transformers.DynamicCache}
    for width in (40, 300, 800):
        prompts = [ids for ids, _ in chats_of([width, width], 0)]
        times, tokens = {name: [] for name in caches}, {}
        for _, name in tqdm([*itertools.product(range(args.repeats + 1), caches)], leave=False):
            with unittest.mock.patch.object(save.transformers, "DynamicCache", caches[name]):
                cpu, wall = time.process_time(), time.perf_counter()
                tokens[name] = save.rollout(policy, prompts, 16, range(32), max_new_tokens=args.new, **SAMPLING)
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        save.expect(len({repr(x) for x in tokens.values()}) == 1, "cache: expected the same tokens")
        for kind, column in (("CPU", 0), ("wall", 1)):  # the first round warms up
            ours, theirs = ([row[column] for row in times[name][1:]] for name in caches)
            print(f"{width} prompt tokens, {kind} seconds: {spread(ours)} and {spread(theirs)}, ratio "
                  f"{spread([a / b for a, b in zip(ours, theirs)], '.3f')}, {len(ours)} repeats; the same "
                  f"{sum(map(len, tokens[name][0]))} tokens", flush=True)

def bench_rm_memory(args):
    """Each variant in its own process: peak resident memory above that before the update, and CPU seconds."""
    results = in_processes(args, "rm_memory", ("held", "ours"), "--rm", args.rm, "--layers", args.layers,
                           env=HONEST_MALLOC)
    for key, unit in (("mb", "MB above the base"), ("cpu", "CPU seconds")):
        held, ours = ([r[key] for r in results[v]] for v in ("held", "ours"))
        print(f"RM update, {unit}: ours {statistics.median(ours):.1f}  whole graph {statistics.median(held):.1f}  "
              f"ratio {spread([a / b for a, b in zip(ours, held)], '.3f')}")
    error = max(abs(a["norm"] / b["norm"] - 1) for a, b in zip(results["held"], results["ours"]))
    print(f"relative difference of the gradient norms: {error:.1e}")

def rm_memory_variant(args):
    """One backward pass of the contrastive loss, 2 prompts x 16 responses of about 120 tokens, half filtered."""
    rm = new_reward_model(args.rm)
    rm.model.model.layers = rm.model.model.layers[:args.layers]  # all 30 would need 10 GB for the whole graph
    rm.value_head.requires_grad_(False)
    chats = chats_of(torch.randint(60, 180, (32,), generator=torch.Generator().manual_seed(0)), 20)
    rewards = save.score(rm, chats, 1024)[0].view(2, 16)
    values = rewards.median(1).values
    advantages = save.rm_advantages(rewards, values)
    positive, negative, _ = save.partition(advantages, advantages.double().abs().median().sigmoid())
    for p in rm.parameters():  # the gradient buffers belong to the base: both variants need them
        p.grad = torch.zeros_like(p) if p.requires_grad else None

    def update():
        if args.variant == "held":
            live, _ = rm(*save.model_inputs(chats, "cpu"))
            save.contrastive_loss(live.view(2, 16), values, positive, negative).backward()
        else:
            leaf = rewards.clone().requires_grad_()
            weights = torch.autograd.grad(save.contrastive_loss(leaf, values, positive, negative), leaf)[0].flatten()
            back_propagate(rm, save.micro_batches(weights.nonzero()[:, 0].tolist(), chats, 256), chats, weights)
        return torch.stack([p.grad.norm() for p in rm.parameters() if p.requires_grad]).norm().item()
    print_measured(update, "norm")

def bench_steps(args):
    """Seconds per step of --rm_update save and none, runs in turn, the first step of each run left out."""
    times = {"save": [], "none": []}
    for repeat, update in itertools.product(range(args.repeats), times):
        times[update].append(phases(args, "--rm_update", update, "--seed", str(repeat), steps=4)["step_seconds"])
    print(f"seconds per step: SAVE {statistics.median(times['save']):.2f}  RM frozen "
          f"{statistics.median(times['none']):.2f}  ratio {spread([a / b for a, b in zip(*times.values())])}, "
          f"{args.repeats} pairs")

# ---------------------------------------------------------------- a step beside TRL's
# answered in more than 32 tokens
ASKED = ["Explain in detail how a steam engine works.", "Tell me a long story about a lighthouse keeper."]
STEP = {"group": 8, "max_new_tokens": 32, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "lr_policy": 2e-6,
        "kl_coef": 0.04}

def bench_trl(args):
    """Process CPU seconds and peak memory of one step, each variant in its own process, in turn."""
    results = in_processes(args, "trl", (*args.variants, "trl"), "--policy", args.policy, "--rm", args.rm)
    for variant, runs in results.items():
        ratios = [run["cpu"] / peer["cpu"] for run, peer in zip(runs, results["trl"])]
        print(f"{variant:<5} {statistics.median(run['cpu'] for run in runs):6.2f} CPU seconds a step, ratio to TRL "
              f"{spread(ratios, '.3f')}, {len(runs)} repeats; "
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

            def ended(*inputs):  # responses cut at 32 tokens would not train the reward model
                batch = sample(*inputs)
                batch.ended = torch.ones_like(batch.ended)
                batch.ended[:, 1::2] = args.variant != "half"
                return batch
            update = "none" if args.variant == "grpo" else "save --m0 0"  # 0: no response is filtered
            flags = (f"--batch 2 --steps 2 --save_every 0 --value_prompts 2 --value_k 8 --value_epochs 100 "
                     f"--value_lr 0.05 --max_prompt_tokens 64 --rm_update {update} "
                     f"{' '.join(f'--{name} {x}' for name, x in STEP.items())}")
            with unittest.mock.patch.multiple(save, save_step=timed, sample=ended):
                save.main(["--policy", args.policy, "--rm", args.rm, "--prompts", str(prompts), "--out", f"{out}/run",
                           *flags.split()])
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
    for what in ("forward", "backward"):
        words = "--policy", args.policy, "--layers", args.layers, "--direction", what
        ours, whole = in_processes(args, "log_probs", ("ours", "whole"), *words, env=HONEST_MALLOC).values()
        error = max(abs(a["sum"] / b["sum"] - 1) for a, b in zip(ours, whole))
        print(f"log-probs, {what}: {spread([b['cpu'] / a['cpu'] for a, b in zip(ours, whole)])} x the speed, "
              f"{spread([a['mb'] / b['mb'] for a, b in zip(ours, whole)])} of the memory; "
              f"ours {statistics.median(a['cpu'] for a in ours):.1f} CPU seconds, "
              f"{statistics.median(a['mb'] for a in ours):.0f} MB; relative difference of the sums {error:.0e}; "
              f"{len(ours)} repeats")

def log_probs_variant(args):
    """`ours`: sorted micro-batches, no mask, response positions only. `whole`: fours in order, mask, all logits."""
    policy = save.Policy.from_pretrained(args.policy).float()
    policy.model.model.layers = policy.model.model.layers[:args.layers]
    rows = chats_of(48 + log_normal(16), 48)
    longest = max(len(ids) for ids, _ in rows)
    batches = save.micro_batches(range(16), rows, 4 * longest) if args.variant == "ours" \
        else [range(i, i + 4) for i in range(0, 16, 4)]
    backward = args.direction == "backward"
    for p in policy.parameters():
        p.grad = torch.zeros_like(p) if backward else None

    def summed(batch):
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
        return result.item()
    with torch.set_grad_enabled(backward):
        print_measured(lambda: sum(map(summed, batches)), "sum")

# ---------------------------------------------------------------- phases, at full size and how they grow
def llm(layers, hidden, heads, inner, words, tied=True, kv_heads=8, head_dim=128):
    """The shape of a model of the Qwen3 or Llama family, as their configurations have it."""
    return {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": inner, "vocab_size": words,
            "tie_word_embeddings": tied}

MODELS = {  # policy and reward model: Qwen3-4B and Llama-3.2-3B (the paper's), Qwen3-8B and Llama-3.1-8B
    "4B + 3B": (llm(36, 2560, 32, 9728, 151936), llm(28, 3072, 24, 8192, 128256)),
    "8B + 8B": (llm(36, 4096, 32, 12288, 151936, False), llm(32, 4096, 32, 14336, 128256, False))}
SHAPES = {"full": MODELS["4B + 3B"], "tiny": (llm(2, 64, 4, 128, 512, kv_heads=2, head_dim=16),) * 2}

def make_models(args):
    """policy/, rm/ and prompts.jsonl with random weights, for --temperature 50: any word may come next.
    Every --mean_tokens-th word is an EOS, so that lengths vary and most responses end: the RM trains on those only."""
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
            model = kind(config(**shape, max_position_embeddings=4096, num_labels=1, dtype=dtype, pad_token_id=0,
                                bos_token_id=None, eos_token_id=4))
        torch.set_default_dtype(torch.float32)
        if name == "policy":
            model.generation_config.eos_token_id = list(range(4, shape["vocab_size"], args.mean_tokens))
        toy.write_model(out / name, model, tokenizer)
        del model
    numbers = torch.Generator().manual_seed(0)
    prompts = [" ".join(f"w{i}" for i in torch.randint(0, 500, (args.prompt_tokens - 2,), generator=numbers))
               for _ in range(64)]
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))

def phases(args, *flags, steps=None):
    """Over the steps after the first: the median of each *_seconds, the largest *_gb; "score" is both passes.
    "host_gb" is the peak resident memory of the largest process of the run."""
    with tempfile.TemporaryDirectory() as out:
        words = ["--policy", args.policy, "--rm", args.rm, "--prompts", args.prompts, "--out", out, "--steps",
                 str(steps or args.repeats + 1), "--save_every", "0", *args.flags, *flags]
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        start = [sys.executable, *(start if args.ranks > 1 else [])]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen([*start, pretend_gpu.__file__, *words], stdout=subprocess.DEVNULL, stderr=errors)
            _, process.returncode, usage = os.wait4(process.pid, 0)
            errors.seek(0)
            if process.returncode:
                sys.exit(errors.read()[-2000:])
        lines = [json.loads(line) for line in pathlib.Path(out, "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line.get("stage") == "save" and line["step"] > 1]
    result = {"host_gb": usage.ru_maxrss * 1024 / 1e9,  # Linux counts in units of 1024 bytes
              "tokens": statistics.mean(line["response_tokens"] for line in lines),
              "ended": 1 - statistics.mean(line["truncated"] for line in lines),
              "spread": spread([line["step_seconds"] for line in lines], ".3f")}
    for kind, combine in (("_seconds", statistics.median), ("_gb", max)):
        for name in {name for line in lines for name in line if name.endswith(kind)}:
            result[name] = combine(line[name] for line in lines if name in line)
    return result

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
    print(f"{rows} rows of {prompt:.0f} + {result['tokens']:.0f} tokens a rank; a step {result['spread']} s, "
          f"{args.repeats} steps; 320 steps "
          f"{result['step_seconds'] * 320 / 3600:.1f} h; host {result['host_gb']:.2f} GB a rank")
    for phase in PHASES:
        seconds = result.get(f"{phase}_seconds")
        if seconds:
            rate = f"{flops[phase] / seconds / 1e12:.3g} TFLOP/s if no row is filtered" if phase in flops else \
                f"{rows * result['tokens'] / seconds:.4g} tokens/s"
            print(f"  {phase:<14} {seconds:8.3f} s  {rate}  {result.get(phase + '_gb', float('nan')):.1f} GB")

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

def bench_scoring(args):
    """Pairs scored per second by eval.py and by the rewardbench package, templates and tokenisation included."""
    cfg = evaluation.EvalConfig(rm=[args.rm], bench=[args.pairs], limit=args.count, device="cpu",
                                max_length=2048).checked()
    rows = evaluation.read_benchmark(cfg, args.pairs)
    texts = [text for row in rows for text in evaluation.PAIRS.texts(row)]
    rm = save.to_working_copy(save.RewardModel.from_pretrained(args.rm), cfg)
    pipe, scores, to = rewardbench_pipeline(args.rewardbench, args.rm), {}, BatchEncoding.to

    def ours():  # an empty cache each time: nothing is remembered from the repeat before
        scores["ours"], _ = evaluation.score_texts(cfg, rm, evaluation.Cache("", "x"), texts, "ours")
        return len(rows)

    def theirs():  # a batch of chosen texts, then one of rejected ones
        scores["theirs"] = [0.0] * len(texts)
        for start, side in itertools.product(range(0, len(texts), 2 * args.rewardbench_batch), (0, 1)):
            part = slice(start + side, start + 2 * args.rewardbench_batch, 2)
            chats = [[*prompt, {"role": "assistant", "content": text}] for _, prompt, text in texts[part]]
            rendered = pipe.tokenizer.apply_chat_template(chats, tokenize=False)
            logits = pipe(rendered, batch_size=args.rewardbench_batch, truncation=True, padding=True, max_length=2048)
            scores["theirs"][part] = logits.float().flatten().tolist()
        return len(rows)

    different = len({(str(prompt), text) for _, prompt, text in texts})
    print(f"{len(rows)} pairs, {len(texts)} texts, {different} of them different: the ratio without the gain from "
          f"duplicates is {different / len(texts):.3f} of that below")
    # the pipeline moves its inputs to "cuda" whatever the model is on: here that means the model's device
    with unittest.mock.patch.object(BatchEncoding, "to", lambda inputs, device: to(
            inputs, pipe.model.device if device == "cuda" else device)):
        compare(ours, theirs, args.repeats, "rewardbench")
    worst = max(abs(a - b) for a, b in zip(scores["ours"], scores["theirs"], strict=True))
    print(f"largest difference of scores: {worst:.1e}")

# ---------------------------------------------------------------- memory without a GPU
def bench_memory(args):
    """GB of 10^9 bytes on rank 0 at the peak of each phase, for two models or for the paper's sizes; then what fits."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print("| models, ranks | always |", *(f"{phase.replace('_', ' ')} |" for phase in PHASES), "\n|---|" + 6 * "---|")

    def row(name, policy, rm, ranks, cfg):
        peaks = memory_peaks(policy, rm, ranks, cfg)
        print(f"| {name}, {ranks}{', --offload' * cfg.offload} |",
              *(f"{peaks[phase]:.1f} |" for phase in ("always", *PHASES)), flush=True)
        return peaks
    cfg = save.parse_config(args.flags)
    save.expect(bool(args.policy) == bool(args.rm), "memory: expected both --policy and --rm, or neither")
    if args.policy:
        configs = [AutoConfig.from_pretrained(path) for path in (args.policy, args.rm)]
        name = " + ".join(pathlib.Path(path).name for path in (args.policy, args.rm))
        print(what_fits(row(name, *configs, args.ranks, cfg), args.ranks, cfg))
        return
    for models, ranks, offload in itertools.product(MODELS, (1, 2, 4, 8), (False, True)):
        policy, rm = MODELS[models]
        row(models, Qwen3Config(**policy), LlamaConfig(**rm), ranks, dataclasses.replace(cfg, offload=offload))

BENCHES = {"memory": bench_memory, "rollout": bench_rollout, "cache": bench_cache, "rm_memory": bench_rm_memory,
           "steps": bench_steps, "trl": bench_trl, "log_probs": bench_log_probs, "models": make_models,
           "phases": bench_phases, "scoring": bench_scoring}
VARIANTS = {"rm_memory": rm_memory_variant, "trl": trl_variant, "log_probs": log_probs_variant}

def main(argv=None):
    """Parse the flags and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("what", choices=[*BENCHES])
    parser.add_argument("--policy")
    parser.add_argument("--rm")
    parser.add_argument("--prompts")
    parser.add_argument("--variants", nargs="+", choices=["grpo", "save", "half"], default=["grpo", "save", "half"],
                        help="trl: beside TRL; half: SAVE with every second row left out of the RM's update")
    parser.add_argument("--out", help="models: where to write")
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--prompt_tokens", type=int, default=256, help="models: length of the prompts")
    parser.add_argument("--mean_tokens", type=int, default=600, help="models: mean length of the responses")
    parser.add_argument("--ranks", type=int, default=1, help="memory, phases: processes of torchrun")
    parser.add_argument("--pairs", help="scoring: .jsonl of prompt, chosen, rejected")
    parser.add_argument("--count", type=int, default=48, help="scoring: the first pairs of the file")
    parser.add_argument("--rewardbench", help="scoring: folder of the unpacked rewardbench 0.1.4 wheel")
    parser.add_argument("--rewardbench_batch", type=int, default=64, help="scoring: its scripts/run_rm.py has 64")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=24, help="cache: tokens of the longest response")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--direction", help=argparse.SUPPRESS)
    args, args.flags = parser.parse_known_args(argv)
    try:
        (VARIANTS if args.variant else BENCHES)[args.what](args)
    except (save.UsageError, OSError) as error:
        parser.exit(2, f"bench.py: error: {error}\n")

if __name__ == "__main__":
    main()
