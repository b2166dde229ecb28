"""SAVE: a reward model (RM) that improves itself while it trains a policy (arXiv 2605.30888).

    bash run.sh  # a laptop, a small world
    python save.py --policy DIR --rm DIR --prompts FILE  # one process, your models and prompts
    torchrun --nproc-per-node 4 save.py  # the paper's main run

Step t of T, Algorithm 2 (lines; equations):
    curriculum_threshold  mu(t) (2; 14)
    sample                G responses for each of P prompts (3-5)
    score_batch           R(x,y) and V(x) from one forward, a = R - V (7; 13)
    label, partition      keep |a| large enough, split by sign (8-11; 15-17)
    reward_model_step     contrastive loss on backbone and reward head (13; 18-20)
    value_step            score again, V towards the group mean (14; 21)
    label, partition      filter again with the improved RM (15-16)
    policy_step           GRPO | RLOO | GSPO on the survivors (17)
R is `rewards` (P,G), V `values` (P,), Y+ and Y- `positive`, `negative` (P,G), B~ `valid` (P,): P prompts a step on all
ranks, G responses each, N = P*G rows, T tokens, H hidden size.
Forks: a loss is a row of RM_UPDATES, an advantage one of ALGORITHMS, a judge's labels go into `label`.
"""
import argparse
import atexit
import datetime
import fcntl
import gzip
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Callable, NamedTuple
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

# ---- 1. configuration
@dataclass
class Config:
    """All flags. Defaults from steps to top_k: the paper's Table 8."""
    stage: str = ""  # preference, value, save (value first if the RM has no V)
    algo: str = "grpo"  # a row of ALGORITHMS
    rm_update: str = "save"  # a row of RM_UPDATES
    policy: str = "Qwen/Qwen3-4B-Instruct-2507"  # folder or hub name, causal LM
    rm: str = "Skywork/Skywork-Reward-V2-Llama-3.2-3B"  # the same, classifier, 1 label
    prompts: str = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # .json(l)(.gz), .parquet, hub
    pairs: str = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # the same, of pairs
    heldout: list = field(default_factory=list)  # files of pairs to test on
    out: str = "out"  # folder of the results
    steps: int = None  # T; none: 320, stage preference: one pass
    batch: int = 32  # prompts or pairs a step
    group: int = 16  # G responses to a prompt
    m0: float = 0.5  # Eq. 14; 0: all are kept
    kl_coef: float = 0.04  # beta, KL to the initial policy
    lr_rm: float = None  # the RM; none: 1e-7, stage preference: 1e-5
    lr_value: float = 1e-5  # value head
    lr_policy: float = 2e-6  # 0: it stays as it is
    value_k: int = 16  # stage value: K responses to a prompt
    value_lr: float = 2e-4  # its rate
    value_epochs: int = 1  # its passes
    value_prompts: int = 0  # its prompts; 0: as many as SAVE uses
    max_new_tokens: int = 1024  # longest response, in the data too (F.1)
    temperature: float = 0.7  # of the log-probs too
    top_p: float = 0.8  # the smallest set that reaches it
    top_k: int = 20  # 0: off
    num_minibatches: int = 1  # policy updates a rollout
    lr_schedule: str = "constant"  # constant, linear (to 0)
    max_prompt_tokens: int = 1024  # longest prompt, with its template
    dtype: str = "auto"  # auto: bfloat16 on a GPU
    device: str = "auto"  # auto: a GPU where there is one
    offload: bool = False  # masters and moments on the host
    micro_tokens: int = None  # of a micro-batch; none: 8192 on a GPU, else 2048
    cache_tokens: int = 0  # decoded together; 0: what fits a GPU
    seed: int = 0  # of all randomness
    save_every: int = 40  # steps between checkpoints; 0: none
    eval_every: int = 0  # steps between --heldout tests; 0: start, end
    resume: bool = False  # from the newest checkpoint

    def checked(self):
        """Refuse what cannot work, fill in "auto" and none."""
        least = dict.fromkeys("steps batch num_minibatches max_new_tokens value_k".split(), 1)
        least |= {"group": 2, "temperature": 1e-3, "top_p": 1e-3}
        for name, x in vars(self).items():
            low, high = least.get(name, 0), 1 if name in ("m0", "top_p") else 1e15
            expect(not isinstance(x, int | float) or low <= x <= high, f"--{name} {x}: expected {low} to {high:g}")
        ranks = WORLD * self.num_minibatches
        expect(self.batch % ranks == 0, f"--batch {self.batch}: expected a multiple of {ranks} (ranks x minibatches)")
        known = ["value head", "group mean", ""], ["token", "mean", "sum"], ["loss", "reward"]
        for x, words in zip((RM_UPDATES[self.rm_update].anchor, *ALGORITHMS[self.algo][1:3]), known):
            expect(x in words, f"--rm_update, --algo: a row has {x!r}, expected one of {words}")
        gpu = self.device == "auto" and torch.cuda.is_available()
        used = [f"cuda:{LOCAL_RANK}", "bfloat16", 8192] if gpu else ["cpu", "float32", 2048]
        used += [None, 1e-5] if self.stage == "preference" else [320, 1e-7]
        named = zip(("device", "dtype", "micro_tokens", "steps", "lr_rm"), used)
        return replace(self, **{name: x for name, x in named if getattr(self, name) in (None, "auto")})

def parse_config(argv=None, kind=Config):
    """A flag for each field; the comment behind it is its help."""
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: expect(False, message)
    choices = {"lr_schedule": ["constant", "linear"], "dtype": ["auto", "float32", "bfloat16"], "algo": ALGORITHMS,
               "stage": ["preference", "value", "save"], "rm_update": RM_UPDATES, "device": ["auto", "cpu"]}
    source = "".join(map(inspect.getsource, kind.__mro__[-2::-1]))  # a fork's too
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.M))
    for flag in fields(kind):
        default = getattr(kind, flag.name, None)
        plain = {"type": flag.type, "choices": choices.get(flag.name)}
        options = {bool: {"action": argparse.BooleanOptionalAction}, list: {"nargs": "+"}}.get(flag.type, plain)
        text = f"{comments[flag.name]} [{'none' if default in (None, '') else default}]"
        parser.add_argument("--" + flag.name, help=text, **options)
    return kind(**vars(parser.parse_args(argv)))

# ---- 2. the maths of the reward model: pure functions of tensors
def at_least_fp32(x):
    """Losses are in fp32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def masked_mean(x, mask, dim=None):
    """Mean of x where mask, or 0; the mask may hide inf and nan."""
    return torch.where(mask, x, 0).sum(dim) / mask.sum(dim).clamp(min=1)

def curriculum_threshold(step, total_steps, m0):
    """Eq. 14: mu(t) = (2 - p) / 2 with p = min(1 - m0 + t/T, 1); t counts from 1."""
    return (2 - min(1 - m0 + step / total_steps, 1)) / 2

def rm_advantages(rewards, values):
    """Eq. 13: a = R - V. rewards (P,G), values (P,) -> (P,G)."""
    return rewards - values[:, None]

def partition(advantages, threshold, usable=None):
    """Eq. 15-17. advantages (P,G) -> positive, negative (P,G), valid (P,), all bool. a = 0 is positive."""
    keep = torch.sigmoid(advantages.double().abs()) >= threshold  # fp64: no |a| below 36 saturates
    keep = keep if usable is None else keep & usable
    positive, negative = keep & (advantages >= 0), keep & (advantages < 0)
    return positive, negative, positive.any(1) & negative.any(1)

def bradley_terry_loss(chosen, rejected):
    """Eq. 2 and 11: mean of -log sigmoid(R_w - R_l) over pairs. chosen, rejected (n,)."""
    return -F.logsigmoid(at_least_fp32(chosen) - at_least_fp32(rejected)).mean()

def contrastive_loss(rewards, values, positive, negative, usable=None):
    """Eq. 18-20, mean over valid prompts, 0 if there is none. rewards, masks (P,G); values (P,), no gradient.
    L+ = log(e^V + sum_{Y+} e^R) - mean_{Y+} R and L- = log(e^V + sum_{Y-} e^R) - V."""
    rewards, anchor = at_least_fp32(rewards), at_least_fp32(values.detach())
    sides = (rewards.masked_fill(~side, -math.inf) for side in (positive, negative))
    up, down = (torch.cat([anchor[:, None], side], 1).logsumexp(1) for side in sides)
    loss = up - masked_mean(rewards, positive, 1) + down - anchor
    return masked_mean(loss, positive.any(1) & negative.any(1))

def value_loss(values, rewards, usable=None):
    """Eq. 12 and 21: mean of (V - mean_G R)^2 over prompts with usable rows. (P,), (P,G)."""
    usable = torch.ones_like(rewards, dtype=torch.bool) if usable is None else usable
    targets = masked_mean(at_least_fp32(rewards.detach()), usable, 1)
    return masked_mean((at_least_fp32(values) - targets) ** 2, usable.any(1))

class RMUpdate(NamedTuple):
    """A row of RM_UPDATES: how the reward model learns."""
    loss: Callable | None  # loss(rewards, values, positive, negative, usable) -> scalar; none: frozen
    anchor: str  # V: "value head" | "group mean" | "" (none, nothing is filtered)
RM_UPDATES = {
    "save": RMUpdate(contrastive_loss, "value head"),
    "mean_reward": RMUpdate(contrastive_loss, "group mean"),  # a baseline of Table 1
    "none": RMUpdate(None, ""),  # plain RL
}

# ---- 3. the maths of the policy: pure functions of tensors
def grpo_advantages(rewards, keep):
    """(r - mean) / (std + 1e-4) of a group's kept rows, 0 where not kept or alone, in fp64: equal ones get 0. (P,G)."""
    dtype, rewards, count = rewards.dtype, rewards.double(), keep.sum(1, keepdim=True)
    centred = rewards - masked_mean(rewards, keep, 1)[:, None]
    variance = torch.where(keep, centred ** 2, 0).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return torch.where(keep & (count > 1), centred / (variance.sqrt() + 1e-4), 0).to(dtype)

def rloo_advantages(rewards, keep):
    """r minus the mean of the other kept rows of its group; 0 as above. (P,G) -> (P,G)."""
    dtype, rewards, count = rewards.dtype, rewards.double(), keep.sum(1, keepdim=True)
    others = torch.where(keep, rewards, 0).sum(1, keepdim=True) - rewards
    return torch.where(keep & (count > 1), rewards - others / (count - 1).clamp(min=1), 0).to(dtype)

class Algorithm(NamedTuple):
    """A row of ALGORITHMS: how the policy learns."""
    advantages: Callable  # advantages(rewards, keep) -> (P,G)
    ratio: str  # log-ratio of a row: by "token" | "mean" of its tokens | their "sum"
    kl: str  # "loss": k3 of tokens in the loss | "reward": k1 of a response in its reward
    clip: tuple  # (low, high): the ratio stays within 1 - low and 1 + high
ALGORITHMS = {
    "grpo": Algorithm(grpo_advantages, "token", "loss", (0.2, 0.2)),
    "rloo": Algorithm(rloo_advantages, "sum", "reward", (0.2, 0.2)),
    "gspo": Algorithm(grpo_advantages, "mean", "loss", (3e-4, 4e-4)),
}

def policy_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, *, algo, kl_coef):
    """Clipped surrogate, mean over tokens, then rows. Log-probs, mask (N,T), advantages (N,) or (N,T), algo a row of
    ALGORITHMS -> loss, {"kl": k3 = exp(ref - lp) - (ref - lp) - 1, "clipped": share of tokens}."""
    mask, log_probs = mask.bool(), at_least_fp32(log_probs)
    log_ratio = torch.where(mask, log_probs - at_least_fp32(old_log_probs.detach()), 0)
    of_row = log_ratio.sum(1, keepdim=True)
    mean = of_row / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = {"token": log_ratio, "mean": mean, "sum": of_row}[algo.ratio].clamp(max=80).exp()  # inf times 0 is nan
    advantages = torch.where(mask, advantages[:, None] if advantages.dim() == 1 else advantages, 0)
    free, clipped = ratio * advantages, ratio.clamp(1 - algo.clip[0], 1 + algo.clip[1]) * advantages
    gap = torch.where(mask, at_least_fp32(ref_log_probs.detach()) - log_probs, 0)
    k3 = gap.exp() - gap - 1
    per_token = {"loss": kl_coef * k3, "reward": 0}[algo.kl] - torch.minimum(free, clipped)
    per_token = per_token, k3.detach(), (clipped < free).float()
    loss, kl, share = (masked_mean(masked_mean(x, mask, 1), mask.any(1)) for x in per_token)
    return loss, {"kl": kl, "clipped": share}

# ---- 4. a step of Algorithm 2, top down
@dataclass
class Run:
    """What a stage works with."""
    cfg: Config
    rm: "RewardModel"
    policy: "Policy" = None
    log: "Log" = None
    optimizers: dict = field(default_factory=dict)  # of rm, value, policy
    step: int = 1
    lr_scale: float = 1.0  # of all rates, --lr_schedule
    idle: int = 0  # steps in a row that trained no RM
    fixed: dict = field(default_factory=dict)  # what --resume must meet again

@dataclass
class Batch:
    """Responses of a step: tensors (P,G) of all ranks, lists of this rank's rows."""
    prompts: list  # (messages, policy ids)
    texts: list  # responses
    chats: list  # (ids, prompt_length) in the RM's tokens
    sequences: list  # the same in the policy's
    lengths: torch.Tensor  # (P,G) response tokens
    ended: torch.Tensor  # (P,G) bool: by EOS; others do not train the RM
    rewards: torch.Tensor = None  # (P,G)
    features: torch.Tensor = None  # (P,H) at the end of the prompt, for V

def save_step(run, prompts):
    """One step of Algorithm 2 on the next prompts."""
    prompts = draw(prompts, run.cfg.seed, "prompts", (run.step - 1) * run.cfg.batch, run.cfg.batch)
    learn(run, sample(run, prompts, run.cfg.group, run.step))

def learn(run, batch):
    """Its three steps on a batch."""
    row = RM_UPDATES[run.cfg.rm_update]
    score_batch(run, batch)
    positive, negative, valid = filtered(run, batch, batch.ended)  # 1: filter
    record(run, batch, positive, negative, valid)
    before, run.idle = batch.rewards, run.idle + 1
    if row.loss and reward_model_step(run, batch, positive, negative):  # 2: the reward model
        run.idle = 0
        score_batch(run, batch)
        run.log.put(reward_shift=(batch.rewards - before).abs(), spread_after=batch.rewards.std(1))
    run.log.put(**{"learned": not run.idle} if row.loss else {})
    if row.loss and run.idle == 5:
        say("five steps in a row trained no RM: Ctrl-C shows what to try")
    if row.anchor == "value head" and batch.ended.any():
        value_step(run, batch.rewards, batch.features, batch.ended)
    positive, negative, _ = filtered(run, batch)  # 3: the policy, with truncated responses
    policy_step(run, batch, positive | negative)

def sample(run, prompts, group, step, purpose="rollout"):
    """`group` responses to each of this rank's `prompts`."""
    cfg, own = run.cfg, mine(prompts)
    seeds = [seed_for(cfg.seed, purpose, step, p, g) for p in mine(range(len(prompts))) for g in range(group)]
    knobs = {name: getattr(cfg, name) for name in "max_new_tokens temperature top_p top_k cache_tokens".split()}
    with run.log.time("rollout"):
        responses, ended = rollout(run.policy, [ids for _, ids in own], group, seeds, **knobs)
    texts, chats = run.policy.tokenizer.batch_decode(responses, skip_special_tokens=True), []
    for i, (messages, _) in enumerate(own):
        chats += encode_responses(run.rm.tokenizer, messages, texts[i * group:(i + 1) * group])
    chats = [(ids[:getattr(run.rm.model, "positions", None)], n) for ids, n in chats]
    sequences = [(own[i // group][1] + ids, len(own[i // group][1])) for i, ids in enumerate(responses)]
    numbers = torch.tensor([ended, [len(ids) for ids in responses]], device=cfg.device)
    ended, lengths = gather(numbers.view(2, -1, group).transpose(0, 1)).unbind(1)
    return Batch(own, texts, chats, sequences, lengths, ended.bool())

@torch.no_grad()
def score(rm, sequences, budget):
    """[(ids, prompt_length)] -> rewards (N,), prompt features (N,H)."""
    head, count, first = rm.value_head.weight, len(sequences), {}  # equal ones once: rounding must not rank
    same = [first.setdefault((tuple(ids), length), row) for row, (ids, length) in enumerate(sequences)]
    rewards, features = head.new_empty(count), head.new_empty(count, head.shape[1])
    for rows in micro_batches(first.values(), sequences, budget):
        last, features[rows] = rm.features(*model_inputs([sequences[row] for row in rows], head.device))
        rewards[rows] = rm.model.score(last).squeeze(-1)
    return rewards[same], features[same]

def score_batch(run, batch):
    """Fill in R (P,G) and what V is read from (P,H), of all ranks."""
    with run.log.time("score"):
        scores = score(run.rm, batch.chats, run.cfg.micro_tokens)
        rewards, features = (x.unflatten(0, (len(batch.prompts), -1)) for x in scores)
        batch.rewards, batch.features = gather(rewards), gather(features[:, 0])  # one V a prompt
    if not batch.rewards.isfinite().all():
        raise FloatingPointError("a reward is not finite")

@torch.no_grad()
def anchor(run, batch):
    """V (P,): of the value head, or the group mean."""
    if RM_UPDATES[run.cfg.rm_update].anchor == "value head":
        return run.rm.value(batch.features)
    ended = batch.ended | ~batch.ended.any(1, keepdim=True)  # where none ended: the mean of all
    return masked_mean(batch.rewards, ended, 1)

def label(run, batch):
    """(P,G): the sign makes Y+ and Y-, the size decides what is kept. Eq. 13. A judge goes here; +-inf is kept."""
    return rm_advantages(batch.rewards, anchor(run, batch))

def filtered(run, batch, usable=None):
    """Step 1, Eq. 14-17: positive, negative, valid. Without an anchor all are kept."""
    if not RM_UPDATES[run.cfg.rm_update].anchor:
        keep = torch.ones_like(batch.ended) if usable is None else usable
        return keep, torch.zeros_like(keep), keep.any(1)
    labels, threshold = label(run, batch), curriculum_threshold(run.step, run.cfg.steps, run.cfg.m0)
    expect(labels.is_floating_point() and labels.shape == batch.ended.shape, "label: expected floats of (P,G)")
    return partition(labels, threshold, usable)

def reward_model_step(run, batch, positive, negative):
    """Step 2, Eq. 18-20, on backbone and reward head; True if it learned. A loss needs all rewards of a group: dL/dR at
    the scored ones, then sum(R * dL/dR) in micro-batches, is exact, and rows with dL/dR = 0 cost nothing."""
    rewards = batch.rewards.clone().requires_grad_()
    loss = RM_UPDATES[run.cfg.rm_update].loss(rewards, anchor(run, batch), positive, negative, batch.ended)
    weights = torch.autograd.grad(loss, rewards)[0]
    run.log.put(rm_loss=loss, common_push=weights.sum())
    if not weights.any():
        return False
    own = mine(weights).flatten()
    batches = micro_batches(own.nonzero()[:, 0].tolist(), batch.chats, run.cfg.micro_tokens)
    train_on(run, "rm", batches, lambda model, rows: (
        (model(*model_inputs([batch.chats[row] for row in rows], own.device))[0] * own[rows]).sum(), ()))
    return True

def value_step(run, rewards, features, usable):
    """Eq. 12 and 21 on the value head, the same on all ranks."""
    loss = value_loss(run.rm.value(features), rewards, usable)
    loss.backward()
    run.optimizers["value"].step(run.lr_scale)
    run.log.put(value_loss=loss)

@torch.no_grad()
def response_log_probs(run, batch, batches):
    """(N/W,R), 0 past the end; micro-batches unlike those of training round differently."""
    result = torch.zeros(len(batch.sequences), int(batch.lengths.max()), device=run.cfg.device)
    for rows in batches:
        inputs = model_inputs([batch.sequences[row] for row in rows], run.cfg.device)
        log_probs, _ = run.policy(*inputs, run.cfg.temperature)
        result[rows, :log_probs.shape[1]] = log_probs
    return result

def policy_advantages(run, batch, trained, old, reference):
    """Of this rank's rows, (N/W,) or by token (N/W,R), among those `trained` (P,G)."""
    algorithm, rewards = ALGORITHMS[run.cfg.algo], batch.rewards
    if algorithm.kl == "reward" and run.cfg.kl_coef:  # k1 of the whole response
        rewards = rewards - run.cfg.kl_coef * gather((old - reference).sum(1).view(-1, trained.shape[1]))
    return mine(algorithm.advantages(rewards, trained)).flatten()

def policy_step(run, batch, keep):
    """Step 3: the row of ALGORITHMS on the survivors `keep` (P,G)."""
    cfg, algorithm, optimizer = run.cfg, ALGORITHMS[run.cfg.algo], run.optimizers["policy"]
    trained = keep & (keep.sum(1, keepdim=True) >= 2)  # one alone has no rival
    if not trained.any():
        return
    parts = mine(trained).flatten().chunk(cfg.num_minibatches)
    rows = [(part.nonzero()[:, 0] + i * len(part)).tolist() for i, part in enumerate(parts)]
    batches = [micro_batches(part, batch.sequences, cfg.micro_tokens) for part in rows]
    every, old, reference = sum(batches, []), None, None
    with run.log.time("log_probs"):
        if cfg.num_minibatches > 1 or algorithm.kl == "reward" and cfg.kl_coef:
            old = response_log_probs(run, batch, every)
        if cfg.kl_coef:
            optimizer.publish(optimizer.initial)  # the reference model
            reference = response_log_probs(run, batch, every)
            optimizer.publish(optimizer.masters)
    advantages = policy_advantages(run, batch, trained, old, reference)
    old = old if cfg.num_minibatches > 1 else None  # or the ratio is exactly 1
    def micro_loss(model, rows):
        log_probs, mask = model(*model_inputs([batch.sequences[row] for row in rows], cfg.device), cfg.temperature)
        width, share = log_probs.shape[1], len(rows) / count
        own = advantages[rows] if advantages.dim() == 1 else advantages[rows, :width]
        before, initial = (log_probs if x is None else x[rows, :width] for x in (old, reference))
        loss, stats = policy_loss(log_probs, before, initial, own, mask, algo=algorithm, kl_coef=cfg.kl_coef)
        return loss * share, [x * share for x in (loss, stats["kl"], stats["clipped"])]
    sums = []
    for part, micro in zip(trained.chunk(cfg.num_minibatches), batches):
        count = part.sum().item()  # of all ranks
        sums += [train_on(run, "policy", micro, micro_loss)] if count else []
    loss, kl, clipped = (sum(column) / len(sums) for column in zip(*sums))
    run.log.put(policy_loss=loss, kl=kl, clipped=clipped, survivors=trained)

# ---- 5. stages
def train(run, rows, heldout, saved):
    """The stages asked for; nothing is refused here."""
    cfg, rm, out, optimizers = run.cfg, run.rm, Path(run.cfg.out), run.optimizers
    anchored, saving = RM_UPDATES[cfg.rm_update].anchor == "value head", cfg.stage in ("", "save")
    run.log = Log(cfg, saved)
    if cfg.stage == "preference":
        each_step(run, "preference", rows, heldout, saved)
    if cfg.stage == "value" or saving and anchored and not rm.has_value_head and not saved:
        value_stage(run, rows)
    if saving and anchored:
        optimizers["value"] = ShardedAdamW(rm.value_head, cfg.lr_value, cfg)
    if saving:
        each_step(run, "save", rows, heldout, saved)
    if cfg.stage == "value" and RANK == 0:  # all but the head as it came
        rm.model = RewardModel.from_pretrained(cfg.rm).model
    if "rm" in optimizers:
        rm.model.float()
        optimizers["rm"].publish(optimizers["rm"].masters)
    if optimizers.keys() & {"rm", "value"}:
        rm.has_value_head = "value" in optimizers  # else it is of other rewards
        rm.save_pretrained(out / "rm")
    if "policy" in optimizers:
        with replaced_folder(out / "policy", run.policy.model, run.policy.tokenizer):
            pass
    say("models:", *sorted(file.parent for file in out.glob("*/config.json")))

def preference_step(run, pairs):
    """Stage preference: one step of Eq. 11 on the next pairs."""
    cfg, batch = run.cfg, mine(draw(pairs, run.cfg.seed, "pairs", (run.step - 1) * run.cfg.batch, run.cfg.batch))
    longer = [max(pair, key=lambda side: len(side[0])) for pair in batch]
    def micro_loss(model, index):
        rewards, _ = model(*model_inputs([side for i in index for side in batch[i]], cfg.device))
        loss = bradley_terry_loss(rewards[0::2], rewards[1::2]) * len(index) / cfg.batch
        return loss, (loss, (rewards[0::2] > rewards[1::2]).sum() / cfg.batch)
    batches = micro_batches(range(len(batch)), longer, cfg.micro_tokens // 2)
    loss, accuracy = train_on(run, "rm", batches, micro_loss)
    run.log.put(rm_loss=loss, rm_accuracy=accuracy)

def value_stage(run, prompts):
    """Stage value, Eq. 12: V from 0 towards the mean of K rewards, judged on a tenth kept out."""
    cfg, batches, head = run.cfg, [], run.rm.value_head
    count = max(1, (cfg.value_prompts or min(len(prompts), cfg.batch * cfg.steps)) // cfg.batch) * cfg.batch
    known = draw(prompts, cfg.seed, "value prompts", 0, min(count, len(prompts)))
    tenth = len(known) // 10  # of fewer than 10: none
    chosen = [known[i % (len(known) - tenth)] for i in range(count - tenth)] + known[len(known) - tenth:]
    for start in tqdm(range(0, count, cfg.batch), "value: sample, score", disable=NO_BAR):
        done = Path(cfg.out, f".value_{seed_for(run.fixed, WORLD)}/{start}/{RANK}.pt")
        if not done.exists():
            batch = sample(run, chosen[start:start + cfg.batch], cfg.value_k, start, "value")
            score_batch(run, batch)
            with replaced_folder(done.parent) as folder:
                torch.save([batch.lengths, batch.ended, batch.rewards, batch.features], folder / f"{RANK}.pt")
        batches.append(torch.load(done, "cpu"))
    lengths, *data = [torch.cat(tensors).to(cfg.device) for tensors in zip(*batches)]
    head.load_state_dict({name: 0 * x for name, x in head.state_dict().items()})
    run.optimizers["value"] = ShardedAdamW(head, cfg.value_lr, cfg)
    parts = torch.arange(count - tenth).split(32) * cfg.value_epochs
    for done, part in enumerate(parts):
        run.lr_scale = 1 - (cfg.lr_schedule == "linear") * done / len(parts)
        ended, rewards, features = (x[part] for x in data)
        if ended.any():
            value_step(run, rewards, features, ended)
    batch = Batch([], [], [], [], lengths, *(x[-tenth:] for x in data))
    advantages = rm_advantages(batch.rewards, run.rm.value(batch.features).detach())
    record(run, batch, *partition(advantages, curriculum_threshold(1, cfg.steps, cfg.m0), batch.ended))
    run.log.write(0, "value")
    say(f"V is judged on {tenth} prompts kept out{', too few' * (tenth < 50)}")
    closing_words(run, "value" if tenth >= 50 else "")

def each_step(run, stage, rows, heldout, saved):
    """The steps of a stage: resume, train, evaluate, log, save."""
    cfg, asked, done = run.cfg, [], saved[0]["step"] if saved else 0
    for name, optimizer in run.optimizers.items() if saved else ():
        parts = {key: state for rank in saved for key, state in rank["optimizers"][name].items()}
        for key, p in optimizer.masters.items():
            p.data.copy_(parts[key].pop("master"))
            optimizer.adamw.state[p] = {kind: x.to(p.device, copy=True) for kind, x in parts[key].items()}
        optimizer.publish(optimizer.masters)
    parts = saved.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))
    if not done:
        heldout_accuracy(run, heldout)
        run.log.write(0, stage)
    say(f"{stage}: from step {done + 1} on")
    for run.step in tqdm(range(done + 1, cfg.steps + 1), stage, disable=NO_BAR):
        run.lr_scale = 1 - (cfg.lr_schedule == "linear") * (run.step - 1) / cfg.steps
        with run.log.time("step"):
            save_step(run, rows) if stage == "save" else preference_step(run, rows)
        if run.step == cfg.steps or cfg.eval_every and run.step % cfg.eval_every == 0:
            heldout_accuracy(run, heldout)
        run.log.write(run.step, stage)
        stopping = total(len(asked))[0] > 0  # a signal to one rank stops all
        if stopping or cfg.save_every and run.step % cfg.save_every == 0:
            save_checkpoint(run)
        if stopping:
            closing_words(run, stage)
            say(f"stopped after step {run.step}: --resume goes on")
            sys.exit(0)
    closing_words(run, stage)

def heldout_accuracy(run, heldout):
    """% of pairs with R(chosen) > R(rejected) in each --heldout file, and Eq. 11."""
    for name, pairs in heldout.items():
        rewards, _ = score(run.rm, [side for pair in mine(pairs) for side in pair], run.cfg.micro_tokens)
        margins = rewards[0::2] - rewards[1::2]
        right, loss = (x / len(pairs) for x in total((margins > 0).sum(), -F.logsigmoid(margins).sum()))
        run.log.put(**{f"accuracy_{name}": 100 * right, f"loss_{name}": loss})
        say(f"  accuracy on {name}: {100 * right:.2f} %, loss {loss:.4f}")

# ---- 6. the two models
def load(kind, path, device):
    """A model in its own precision, without dropout, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    with open(f"/tmp/save_{os.getuid()}", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        model, info = kind.from_pretrained(path, dtype="auto", output_loading_info=True, trust_remote_code=False)
        model = model.to(device)
    expect(not info["missing_keys"], f"it lacks {sorted(info['missing_keys'])[:3]}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict={})
    for own in map(vars, model.modules()):  # two passes must be equal
        own |= {name: 0.0 for name, x in own.items() if isinstance(x, float) and re.search("drop|jitter|^p$", name)}
    model.positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    return model, tokenizer

class RewardModel(nn.Module):
    """f_omega `model.base_model`, h_phi `model.score`, v_psi `value_head`. Heads in fp32: bf16 makes ties."""
    def __init__(self, model, tokenizer, value_head=None):
        super().__init__()
        self.model, self.tokenizer, self.has_value_head = model.eval(), tokenizer, bool(value_head)
        self.model.score.float()
        [(chat, start)] = encode_responses(tokenizer, [{"role": "user", "content": "a"}], ["b"])
        expect(len(chat) > start, "its chat template leaves out the response")
        config, known = model.config.get_text_config(), tokenizer.added_tokens_decoder.items()
        special = [i for i, x in known if x.special and x.content[1:] and chat[-1] != i < config.vocab_size]
        pads = sorted(special, key=lambda i: (i != tokenizer.pad_token_id, i != config.pad_token_id, i in chat))
        config.pad_token_id = tokenizer.pad_token_id = expect(pads, "it needs a pad_token")[0]  # pooling skips it
        self.value_head = nn.Linear(model.score.in_features, 1)
        zeros = {"weight": torch.zeros(1, model.score.in_features), "bias": torch.zeros(1)}
        self.value_head.load_state_dict(value_head or zeros)

    @classmethod
    def from_pretrained(cls, path, device="cpu"):
        """A causal classifier with 1 label, perhaps a value head."""
        with blamed(f"--rm {path}: expected a reward model"):
            model, tokenizer = load(AutoModelForSequenceClassification, path, device)
            expect(getattr(getattr(model, "score", 0), "out_features", 0) == 1, "no linear `score` head of 1 label")
            head = Path(path, "value_head.safetensors")
            return cls(model, tokenizer, safetensors.torch.load_file(head) if head.is_file() else None).to(device)

    def features(self, input_ids, lengths, prompt_lengths):
        """Hidden states (N,H), fp32: at the last token for R, the end of the prompt for V."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return hidden[rows, lengths - 1].float(), hidden[rows, prompt_lengths - 1].float()

    def value(self, features):
        """V from prompt features (N,H), which get no gradient: SG[omega] of Eq. 21."""
        return self.value_head(features.detach()).squeeze(-1)

    def forward(self, input_ids, lengths, prompt_lengths):
        """input_ids (N,T) right-padded, lengths, prompt_lengths (N,) -> rewards, values (N,)."""
        last, prompt = self.features(input_ids, lengths, prompt_lengths)
        return self.model.score(last).squeeze(-1), self.value(prompt)

    def save_pretrained(self, path):
        """A stock classification folder in fp32 and value_head.safetensors."""
        with replaced_folder(path, self.model.float(), self.tokenizer) as folder:
            if self.has_value_head and RANK == 0:
                safetensors.torch.save_model(self.value_head, folder / "value_head.safetensors")

class Policy(nn.Module):
    """A causal LM whose forward gives log-probs of responses."""
    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer, eos = model.eval(), tokenizer, model.generation_config.eos_token_id
        self.eos_ids = sorted({*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None})

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, path, device="cpu"):
        """A causal LM."""
        with blamed(f"--policy {path}: expected a causal language model"):
            policy = cls(*load(AutoModelForCausalLM, path, device))
            expect([*map(int, policy.eos_ids)], "it has no EOS token")
            prompts, knobs = [[*range(8)], [*range(3, 8)]], {"temperature": 1, "top_p": 1, "top_k": 0}
            for i, answer in enumerate(rollout(policy, prompts, 2, range(4), max_new_tokens=8, **knobs)[0]):
                inputs = model_inputs([(prompts[i // 2] + answer, len(prompts[i // 2]))], device)
                logits = policy.model(input_ids=inputs[0]).logits[0, -len(answer) - 1:-1]
                said, own = torch.tensor(answer, device=device), policy(*inputs, 1.0)[0][0]
                fine = torch.allclose(own, -F.cross_entropy(logits.float(), said, reduction="none"), atol=0.02)
                uniforms = torch.rand(8, generator=torch.Generator().manual_seed(i))[:len(said)].to(device)
                same = (sample_tokens(logits, uniforms, **knobs) == said).float().mean()
                fine &= same == 1 or same > 0.7 and logits.dtype != own.dtype
                expect(fine, "its cache is not supported, or its logits are scaled")
            return policy

    def forward(self, input_ids, lengths, prompt_lengths, temperature, chunk=512):
        """input_ids (n,T) right-padded -> log_probs, mask (n,R) of responses, by `chunk` tokens."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        counts, head = lengths - prompt_lengths, self.model.get_output_embeddings()
        mask = torch.arange(int(counts.max()), device=input_ids.device) < counts[:, None]
        rows, offsets = mask.nonzero(as_tuple=True)
        position = prompt_lengths[rows] + offsets  # a token is predicted by the state before it
        parts = zip(hidden[rows, position - 1].split(chunk), input_ids[rows, position].split(chunk))
        log_probs = [checkpoint(lambda h, t: -F.cross_entropy(head(h).float() / temperature, t, reduction="none"),
                                *part, use_reentrant=False) for part in parts]
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(log_probs)), mask

def dithered(target, source, name):
    """Copy; to bf16 so that every change shows and bf16 numbers stay: add 16 random bits, fixed by the name, cut 16."""
    numbers = torch.Generator(target.device).manual_seed(seed_for(name))
    for to, x in zip(target.view(-1).split(2 ** 24), source.view(-1).split(2 ** 24)):
        x = x.to(target.device, torch.float32)
        if target.dtype == torch.bfloat16:
            bits = torch.randint(2 ** 16, x.shape, generator=numbers, dtype=torch.int32, device=x.device)
            x = (x.view(torch.int32) + bits & -2 ** 16).view(torch.float32)
        to.copy_(x)
    return target

def to_working_copy(module, cfg):
    """To --dtype, but for the reward head and buffers."""
    for name, p in module.model.named_parameters():
        dtype = torch.float32 if name == "score.weight" else getattr(torch, cfg.dtype)
        p.data = p.data if p.dtype == dtype else dithered(torch.empty_like(p, dtype=dtype), p.data, name)
    if cfg.device != "cpu":
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    return module.to(cfg.device)

# ---- 7. rollout
def sample_tokens(logits, uniforms, temperature, top_p, top_k):
    """Temperature (0: greedy), top-k, top-p. logits (n,V), uniforms (n,) -> tokens (n,)."""
    if temperature == 0:
        return logits.argmax(-1)
    ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    if top_k or top_p < 1:
        logits, ids = logits.topk(min(top_k or sys.maxsize, logits.shape[-1]))
    probs = (logits.double() / temperature).softmax(-1)
    probs = torch.where(probs.cumsum(-1) - probs < top_p, probs, 0)
    cumulative = probs.cumsum(-1)
    uniforms = uniforms[:, None].double() * cumulative[:, -1:]
    return ids.gather(1, torch.searchsorted(cumulative, uniforms, right=True).clamp(max=ids.shape[1] - 1))[:, 0]

@torch.no_grad()
def rollout(policy, prompt_ids, group, seeds, *, max_new_tokens, temperature, top_p, top_k, cache_tokens=0):
    """`group` responses to P token lists -> P*group token lists, with EOS, whether each ended."""
    responses, ended = [None] * len(seeds), [None] * len(seeds)
    if not cache_tokens and policy.model.device.type == "cuda":  # 0.8 of what is free
        sizes = [len(p) * p.itemsize for name, p in policy.named_parameters() if re.search("[kv]_proj.weight", name)]
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        cache_tokens = int(0.8 * free) // max(sum(sizes), 1)
    caches = [(range(group * (len(ids) + max_new_tokens)), 0) for ids in prompt_ids]  # all rows of a prompt
    for wave in micro_batches(range(len(prompt_ids)), caches, cache_tokens or sys.maxsize):
        rows = [prompt * group + g for prompt in wave for g in range(group)]
        prompts, own = [prompt_ids[prompt] for prompt in wave], [seeds[row] for row in rows]
        tokens, done = decode(policy, prompts, group, own, max_new_tokens, temperature, top_p, top_k)
        for row, ids, end in zip(rows, tokens.tolist(), done.tolist()):
            responses[row], ended[row] = [token for token in ids if token >= 0], end
    return responses, ended

def decode(policy, prompt_ids, group, seeds, max_new_tokens, *sampling):
    """Each prompt prefilled once -> tokens (n,R), -1 after the end; ended (n,)."""
    device, cache = policy.model.device, transformers.DynamicCache(config=policy.model.config)
    lengths = torch.tensor([len(ids) for ids in prompt_ids], device=device)
    width = int(lengths.max())  # left-padded
    ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompt_ids], device=device)
    mask = torch.arange(width + max_new_tokens, device=device) >= width - lengths[:, None]
    position = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    draws = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    uniforms, stop_ids = torch.stack(draws).to(device), torch.tensor(policy.eos_ids, device=device)
    tokens = torch.full((len(seeds), max_new_tokens), -1, device=device)
    rows, ended = torch.arange(len(seeds), device=device), torch.zeros(len(seeds), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        logits = policy.model(input_ids=ids, attention_mask=mask[:, :width + t].long(), position_ids=position,
                              past_key_values=cache, logits_to_keep=1).logits[:, -1]
        if t == 0:
            cache.reorder_cache(torch.arange(len(ids), device=device).repeat_interleave(group))
            logits, mask, position = (x.repeat_interleave(group, 0) for x in (logits, mask, position[:, -1:]))
        token = sample_tokens(logits, uniforms[rows, t], *sampling)
        tokens[rows, t] = torch.where(ended[rows], -1, token)
        ended[rows] |= torch.isin(token, stop_ids)
        running = (~ended[rows]).nonzero()[:, 0]
        if not len(running):
            break
        if len(running) <= len(rows) * 7 // 8:  # it copies the cache
            cache.reorder_cache(running)
            rows, token, mask, position = (x[running] for x in (rows, token, mask, position))
        ids, position = token[:, None], position + 1
    return tokens, ended

# ---- 8. optimizer and offload
class ShardedAdamW:
    """AdamW on fp32 masters (bf16 would not move at lr 1e-7), dealt to ranks whole (ZeRO-1)."""
    max_norm = 1.0  # gradients are clipped to it

    def __init__(self, model, lr, cfg, keep_initial=False):
        self.lr, self.device = lr, "cpu" if cfg.offload else cfg.device
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        load, self.owner = [0] * WORLD, {}
        for name, p in sorted(self.named, key=lambda item: -item[1].numel()):  # to the emptiest rank
            self.owner[name] = load.index(min(load))
            load[self.owner[name]] += p.numel()
        own = [(name, p.detach()) for name, p in self.named if self.owner[name] == RANK]
        self.masters = {name: p.to(self.device, torch.float32, copy=True) for name, p in own}
        first, dtype = own * keep_initial, getattr(torch, cfg.dtype)
        self.initial = {name: dithered(torch.empty_like(p, dtype=dtype), p, name).to(self.device) for name, p in first}
        self.adamw = torch.optim.AdamW(self.masters.values() or [torch.zeros(1)], lr, weight_decay=0.0, fused=True)

    def publish(self, source):
        """Write `source` (masters or initial) into all working copies."""
        for name, p in self.named:
            if name in source:
                dithered(p.data, source[name], name)
            broadcast(p.data, self.owner[name])

    def step(self, lr_scale=1.0):
        """A step from p.grad, equal on all ranks -> its norm before clipping."""
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for _, p in self.named if p.grad is not None]
        norm = torch.stack(norms).norm().item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}")
        scale = min(1.0, self.max_norm / (norm + 1e-6))
        for name, p in self.named:
            if name in self.masters and p.grad is not None:
                self.masters[name].grad = p.grad.to(self.device, torch.float32) * scale
            p.grad = None
        self.adamw.param_groups[0]["lr"] = self.lr * lr_scale
        self.adamw.step()
        self.adamw.zero_grad()
        self.publish(self.masters)
        return norm

# ---- 9. ranks: the only place that knows torch.distributed
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(x, x == "WORLD_SIZE")) for x in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
NO_BAR = None if RANK == 0 else True  # of tqdm: bars on rank 0's terminal

def start_ranks(device):
    """Join the ranks that torchrun started."""
    if device != "cpu":
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():  # one may decode longer
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=datetime.timedelta(hours=2))
        atexit.register(dist.destroy_process_group)

def together(work):
    """work() on every rank; what one refuses all refuse."""
    result, refusals = None, [""] * WORLD
    try:
        result = work()
    except UsageError as error:
        refusals[RANK] = str(error)
    if WORLD > 1:
        dist.all_gather_object(refusals, refusals[RANK])
    expect(not any(refusals), max(refusals))
    return result

def mine(items):
    """This rank's share of a list or tensor over prompts."""
    return items[RANK::WORLD]

def gather(share):
    """(P/W, ...) of each rank -> (P, ...), the reverse of `mine`."""
    if WORLD == 1:
        return share
    shares = [torch.empty_like(share, dtype=torch.float32) for _ in range(WORLD)]
    dist.all_gather(shares, share.float().contiguous())
    return torch.stack(shares, 1).flatten(0, 1).to(share.dtype)

def broadcast(tensor, source):
    """`tensor` of rank `source` on all ranks."""
    if WORLD > 1:
        dist.broadcast(tensor, source)

def total(*numbers):
    """Each number summed over the ranks, as floats."""
    sums = torch.tensor([*map(float, numbers)], dtype=torch.float64)
    if WORLD > 1 and numbers:
        sums = sums if dist.get_backend() == "gloo" else sums.cuda()
        dist.all_reduce(sums)
    return sums.tolist()

def train_on(run, name, batches, micro_loss):
    """A step of model `name` on micro_loss(model, rows) -> (loss, numbers), summed over all ranks -> their sums.
    A rank without micro-batches takes part with row 0 at weight 0."""
    model, sums, weight = getattr(run, name), [], bool(batches)
    with run.log.time(f"{name}_update"):
        wrapped = model.train()  # or activations are kept
        if WORLD > 1:  # its buckets become these gradients
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            cap = {"bucket_cap_mb_list": [25]} if torch.__version__ >= "2.13" else {}  # or one for all
            knobs = {"init_sync": False, "gradient_as_bucket_view": True, "find_unused_parameters": True, **cap}
            wrapped = nn.parallel.DistributedDataParallel(model, **knobs)
        for rows in batches or [[0]]:
            wrapped.require_backward_grad_sync = not batches or rows is batches[-1]
            loss, numbers = micro_loss(wrapped, rows)
            (loss * weight * WORLD).backward()  # DDP averages over ranks
            sums.append([number.detach() * weight for number in numbers])
        del wrapped, loss, numbers  # and the buckets
        model.eval()
        sums = total(*map(sum, zip(*sums)))
        run.log.put(**{f"{name}_grad_norm": run.optimizers[name].step(run.lr_scale)})
    return sums

# ---- 10. text and data
def encode_chats(tokenizer, chats, generation_prompt=False):
    """Chats -> lists of token ids, with one BOS if the tokenizer wants one."""
    special = "|".join(re.escape(x.content) for x in tokenizer.added_tokens_decoder.values() if x.special) or "(?!)"
    plain, apart = re.compile(special).sub, lambda m: m[0][0] + " " + m[0][1:]  # a space makes them text
    chats = [[{"role": plain(apart, x["role"]), "content": plain(apart, x["content"])} for x in chat] for chat in chats]
    date, template = datetime.datetime(2024, 7, 26), tokenizer.get_chat_template()
    pinned = "".join(f"|replace('%{c}', '{date:%{c}}')" for c in "aAbBdHIjmMpSyYeF")
    template = "{% macro strftime_now(format) %}{{ format" + pinned + " }}{% endmacro %}" + template
    knobs = {"add_generation_prompt": generation_prompt, "date_string": "26 Jul 2024", "tokenize": False}
    texts = tokenizer.apply_chat_template(chats, chat_template=template, **knobs)
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    rows, bos = tokenizer(texts, add_special_tokens=False)["input_ids"], [tokenizer.bos_token_id]
    wants_bos = tokenizer("")["input_ids"][:1] == bos
    return [bos + ids if wants_bos and ids[:1] != bos else ids for ids in rows]

def encode_responses(tokenizer, messages, responses):
    """A prompt and responses -> [(ids, prompt_length)] in the RM's template."""
    answered = [messages + [{"role": "assistant", "content": text}] for text in responses]
    prompt, *rows = encode_chats(tokenizer, [messages, *answered])
    expect(all(x[:len(prompt)] == prompt for x in rows), "expected a chat template that renders the prompt as a prefix")
    return [(row, len(prompt)) for row in rows]

def read_rows(source, flag):
    """(where, row) of .json(l)(.gz), which `datasets` would change, .parquet or hub `name[:split]`."""
    kind, number = Path(source.removesuffix(".gz")).suffix, 0
    try:
        if kind in (".json", ".jsonl"):
            file = (gzip.open if source.endswith(".gz") else open)(source, "rt", encoding="utf-8")
            rows = map(json.loads, file) if kind == ".jsonl" else json.load(file)
            expect(not isinstance(rows, dict | str), "a list of rows")
        else:
            import datasets
            datasets.disable_progress_bars()
            name, _, split = source.partition(":")
            name, file = ("parquet", source) if kind == ".parquet" else (name, None)
            rows = datasets.load_dataset(name, data_files=file, split=split or "train")
        for number, row in enumerate(rows, 1):
            yield f"--{flag} {source} row {number}", row
    except Exception as error:
        where = f" row {number + 1}" * isinstance(error, ValueError)
        expect(False, f"--{flag} {source}{where}: expected JSON, parquet or a hub dataset: {error}")

def used_rows(source, flag, use):
    """use(row) of all rows, joined. Bad rows of a file are refused, of a hub set left out."""
    used, number = [], 0
    for number, (where, row) in enumerate(read_rows(source, flag), 1):
        with blamed(where, refuse=Path(source).exists()):
            used += use(row)
    say(f"{len(used)} of {number} rows of {source} are used")
    return expect(used, f"--{flag} {source}: expected rows that can be used")

def as_messages(value, where, role="user"):
    """A chat from text or a list of {"role", "content"}."""
    with blamed(f'{where}: expected text or {{"role", "content"}} messages, got {value!r:.80}'):
        chat = [{"role": role, "content": value}] if isinstance(value, str) and value.strip() else value
        others = {x for m in chat for x in (*m, m["role"]) if m.get(x, 1)}
        others -= {*"role content system user assistant tool".split()}
        expect(not others, f"{others} would be lost")
        chat = [{"role": m["role"], "content": m["content"]} for m in chat]
        expect(chat and {type(x) for m in chat for x in m.values()} == {str}, "not text")
        return chat

def prompt_of(row, cfg, policy, rm):
    """[(messages, policy ids)] of text, messages or {"prompt": either}; [] if known responses are long (F.1)."""
    row = row if isinstance(row, dict) else {"prompt": row}
    expect({"prompt", "chosen"} & {*row}, f"expected a column prompt, got {', '.join(row)}")
    messages, known = as_pair(row) if {"chosen", "rejected"} <= {*row} else (as_messages(row["prompt"], "prompt"), [])
    expect(messages[-1]["role"] != "assistant", "expected no answer at its end")
    [ids] = encode_chats(policy.tokenizer, [messages], generation_prompt=True)
    [(chat, _)] = encode_responses(rm.tokenizer, messages, [""])  # what the RM cannot read
    room = min(policy.model.positions, rm.model.positions + len(ids) - len(chat)) - cfg.max_new_tokens
    limit = min(cfg.max_prompt_tokens, room)
    expect(0 < len(ids) <= limit, f"{len(ids)} tokens, expected at most {limit}: --max_prompt_tokens, contexts")
    lengths = [len(policy.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in known]
    return [(messages, ids)] if max(lengths, default=0) <= cfg.max_new_tokens else []

def as_pair(row):
    """A row -> prompt messages, [chosen, rejected] texts."""
    expect({"chosen", "rejected"} <= {*row}, f"expected columns prompt, chosen, rejected, got {', '.join(row)}")
    chats = [as_messages(row[side], side, "assistant") for side in ("chosen", "rejected")]
    prompt = as_messages(row["prompt"], "prompt") if row.get("prompt") else []
    head, other = (chat[:-1] or prompt for chat in chats)
    fine = head == other and all(x[-1]["role"] == "assistant" for x in chats)
    fine = fine and head and head[0]["role"] != "assistant" and all(m in head for m in prompt)
    expect(fine, "expected chosen and rejected to answer the same chat; expected a prompt, or chats with it in them")
    return head, [chat[-1]["content"] for chat in chats]

def pair_of(row, rm, limit=sys.maxsize):
    """[(chosen, rejected)] of a row, each (ids, prompt_length)."""
    pair, limit = encode_responses(rm.tokenizer, *as_pair(row)), min(limit, rm.model.positions)
    expect(max(len(ids) for ids, _ in pair) <= limit, f"expected at most {limit} tokens")
    return [pair]

def model_inputs(sequences, device):
    """[(ids, prompt_length)] -> input_ids (n,T) right-padded, lengths, prompt_lengths (n,)."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in sequences], batch_first=True)
    lengths = torch.tensor([(len(ids), length) for ids, length in sequences], device=device)
    return ids.to(device), lengths[:, 0], lengths[:, 1]

def micro_batches(rows, sequences, budget):
    """Rows in lists of at most `budget` padded tokens, or one row, longest first."""
    batches, width = [], 0
    for row in sorted(rows, key=lambda row: -len(sequences[row][0])):
        if not batches or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
            width = len(sequences[row][0])
        batches[-1].append(row)
    return batches

def seed_for(*purpose):
    """A seed of (seed, purpose, step, row): no state, no replay."""
    return int.from_bytes(hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest(), "big") >> 1

def draw(items, seed, purpose, start, count):
    """Items start .. start+count-1 of endless shuffled epochs."""
    order = []
    for epoch in range(start // len(items), (start + count - 1) // len(items) + 1):
        numbers = torch.Generator().manual_seed(seed_for(seed, purpose, epoch))
        order += torch.randperm(len(items), generator=numbers).tolist()
    return [items[i] for i in order[start % len(items):][:count]]

# ---- 11. checkpoints and logs
STEPS = "checkpoints/step_" + 6 * "[0-9]"
@contextmanager
def replaced_folder(path, *parts):
    """Write beside `path`, then rename: a kill leaves all or nothing."""
    new = Path(path).with_name(f".{Path(path).name}.new")
    if RANK == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for part in parts:
            part.save_pretrained(new)
    total(0)  # a barrier
    yield new
    total(0)
    if RANK == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(new, path)
    total(0)

def save_checkpoint(run):
    """checkpoints/step_000123/rank_00000.pt of each rank. Two are kept."""
    out = Path(run.cfg.out)
    state = {"step": run.step, "world": WORLD, "config": run.fixed, "optimizers": {},
             "logs": [(out / name).stat().st_size for name in Log.files]}
    for name, x in run.optimizers.items():
        state["optimizers"][name] = {key: {"master": p.detach(), **x.adamw.state[p]} for key, p in x.masters.items()}
    with replaced_folder(out / f"checkpoints/step_{run.step:06d}") as folder, blamed("no checkpoint"):
        torch.save(state, folder / f"rank_{RANK:05d}.pt")
    for old in [*out.glob(".value*"), *sorted(out.glob(STEPS))[:-2]] if RANK == 0 else ():
        shutil.rmtree(old)

def read_checkpoint(run):
    """What the ranks saved last, by the same flags and inputs."""
    folder = max(Path(run.cfg.out).glob(STEPS), default=None)
    if not folder:
        return []
    with blamed(f"--resume: {folder} is damaged, remove it"):
        saved = [torch.load(file, "cpu", mmap=True, weights_only=True) for file in sorted(folder.glob("*.pt"))]
        was = saved[0]["config"]
        expect(len(saved) == saved[0]["world"], "a rank's file is missing")
    changed = [f"--{name} was {was.get(name)!r}, is {x!r}" for name, x in run.fixed.items() if was.get(name) != x]
    expect(not changed, f"--resume: {folder} is of other flags: {'; '.join(changed)}")
    return saved

def say(*words, sep=" "):
    """Print on rank 0, around progress bars."""
    if RANK == 0:
        tqdm.write(sep.join(map(str, words)))
        sys.stdout.flush()

class Log:
    """Two files under --out, and the console."""
    files = "metrics.jsonl", "samples.jsonl"
    shown = "rm_loss rm_accuracy reward reward_spread kept valid kl step_seconds".split()
    def __init__(self, cfg, saved=()):
        self.cfg, self.record = cfg, {}
        if RANK == 0:
            Path(cfg.out).mkdir(parents=True, exist_ok=True)
            for name, size in zip(Log.files, saved[0]["logs"] if saved else (0, 0)):  # later steps come again
                with open(Path(cfg.out, name), "a") as file:
                    file.truncate(min(file.tell(), size))
        script = Path(getattr(sys.modules["__main__"], "__file__", __file__)).read_bytes()
        versions = {x.__name__: x.__version__ for x in (torch, transformers)}
        self.append(Log.files[0], {"config": asdict(cfg), "world": WORLD, **versions, "argv": sys.argv,
                                   "rows": [*RM_UPDATES, *ALGORITHMS], "sha256": hashlib.sha256(script).hexdigest()})

    def append(self, name, record):
        """Add a JSON line to a file, on rank 0."""
        if RANK == 0:
            with open(Path(self.cfg.out, name), "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def put(self, **values):
        """Finite numbers, of tensors means, for the record of the step."""
        values = {name: x.float().mean().item() if torch.is_tensor(x) else x for name, x in values.items()}
        self.record |= {name: x for name, x in values.items() if math.isfinite(x)}

    @contextmanager
    def time(self, phase):
        """Seconds of a phase."""
        start, name = time.perf_counter(), f"{phase}_seconds"
        yield
        if self.cfg.device != "cpu":
            torch.cuda.synchronize()
        self.record[name] = self.record.get(name, 0) + time.perf_counter() - start

    def write(self, step, stage):
        """End the record of a step; every tenth is printed."""
        record, self.record = {"step": step, "stage": stage, **self.record}, {}
        self.append("metrics.jsonl", record)
        if step % 10 == 0 or step in (1, self.cfg.steps):
            say(stage, step, *(f" {name} {record[name]:.4g}" for name in Log.shown if name in record))

TRY = (  # a number, its least and most, what to try beyond
    ("learned", 0.5, 1, "lower --m0; a loss with a gradient where R+ - R- >= 2 logit(mu)"),
    ("kept", 0.05, 1, "lower --m0"), ("valid", 0.05, 1, "lower --m0, raise --lr_value, signed labels"),
    ("value_r2", 0, 1, "raise --value_epochs, --lr_value"), ("value_bias", -1e9, 1e9, ""),
    ("reward_spread", 0, 1e9, ""), ("common_push", -0.1, 0.1, "tests/forks/centred.py"),
    ("spread_times", 0, 1.1, "it sharpens: lower --lr_rm"))
def closing_words(run, stage):
    """Medians of a stage's first and last quarter, and what to try; they end metrics.jsonl."""
    lines = open(Path(run.cfg.out, Log.files[0])) if RANK == 0 else ()
    rows = [row for row in map(json.loads, lines) if row.get("stage") == stage]
    times, x = [row["spread_after"] / (row["reward_spread"] or 1) for row in rows if "spread_after" in row], {}
    for name, *_ in TRY:
        numbers = [row[name] for row in rows if name in row]
        few = len(numbers) // 4 + 1
        x |= {name: [sorted(part)[few // 2] for part in (numbers[:few], numbers[-few:])]} if numbers else {}
    x |= {"spread_times": [1, math.prod(times)]} if times else {}
    tries = [f"try: {words} ({name})" for name, low, high, words in TRY if name in x
             and not low <= min(x[name]) <= max(x[name]) <= high]
    said = f"the RM learned in {len(times)} of {len(rows) - 1} steps; " * ("learned" in x) + "first and last quarter: "
    if x:
        say(said + "; ".join(f"{name} {a:.3g}, {b:.3g}" for name, (a, b) in x.items()), *tries[:5], sep="\n")
        run.log.append(Log.files[0], {"closing": x, "try": tries})

def record(run, batch, positive, negative, valid):
    """What the filter did, how far V is off; samples.jsonl."""
    cfg, rewards, values, sides = run.cfg, batch.rewards, anchor(run, batch), positive.int() - negative.int()
    run.log.put(reward=rewards, reward_spread=rewards.std(1), kept=sides.abs(), positive=positive, valid=valid,
                response_tokens=batch.lengths, truncated=~batch.ended)
    if RM_UPDATES[cfg.rm_update].anchor == "value head":
        means, some = masked_mean(rewards, batch.ended, 1), batch.ended.any(1)
        error, variance = (masked_mean((means - x) ** 2, some) for x in (values, masked_mean(means, some)))
        bias, threshold = masked_mean(values - means, some), curriculum_threshold(run.step, cfg.steps, cfg.m0)
        run.log.put(value_bias=bias, value_loss=error, value_target_variance=variance, threshold=threshold,
                    value_r2=1 - error / variance)
    prompts = [messages for messages, _ in batch.prompts for _ in range(cfg.group)]
    columns = rewards, ~batch.ended, values[:, None].expand_as(rewards), sides.abs() > 0, sides
    names = "prompt response reward truncated value kept".split()
    for *row, side in zip(prompts, batch.texts, *(mine(x).flatten().tolist() for x in columns)):
        run.log.append("samples.jsonl", {"step": run.step, "side": ("", "+", "-")[side], **dict(zip(names, row))})

# ---- 12. errors and main
class UsageError(Exception):
    """Bad input: one line, exit code 2, nothing is written."""

def expect(fine, message):
    """`fine`, or stop: the flag, file or row, and what was expected."""
    if not fine:
        raise UsageError(message)
    return fine

@contextmanager
def blamed(what, refuse=True):
    """Errors inside become a UsageError that begins so."""
    try:
        yield
    except Exception as error:
        expect(not refuse, f"{what}: {error}")

def prepare(cfg):
    """Load, check all, write nothing -> Run, rows, held-out pairs, checkpoint."""
    preference, saving = cfg.stage == "preference", cfg.stage in ("", "save")
    models = [Path(path).resolve() for path in (cfg.rm, cfg.policy)]
    results = [Path(cfg.out, name).resolve() for name in ("rm", "policy", "checkpoints", *Log.files)]
    taken = any(path in models or path.exists() and not cfg.resume for path in results) or Path(cfg.out).is_file()
    expect(cfg.out and not taken, f"--out {cfg.out}: expected a new folder, or --resume")
    rm = RewardModel.from_pretrained(cfg.rm, cfg.device)
    run = Run(cfg, rm, None if preference else Policy.from_pretrained(cfg.policy, cfg.device))
    if preference or saving and RM_UPDATES[cfg.rm_update].loss:  # before --dtype rounds
        run.optimizers["rm"] = ShardedAdamW(rm.model, cfg.lr_rm, cfg)
    if saving:
        run.optimizers["policy"] = ShardedAdamW(run.policy.model, cfg.lr_policy, cfg, keep_initial=cfg.kl_coef > 0)
    for module in filter(None, (rm, run.policy)):
        to_working_copy(module, cfg)
    heldout = {Path(x).name.split(".")[0]: used_rows(x, "heldout", lambda row: pair_of(row, rm)) for x in cfg.heldout}
    expect(len(heldout) == len(cfg.heldout), "--heldout: expected different names")
    if preference:
        rows = used_rows(cfg.pairs, "pairs", lambda row: pair_of(row, rm, cfg.max_prompt_tokens + cfg.max_new_tokens))
        run.cfg = replace(cfg, steps=cfg.steps or max(1, len(rows) // cfg.batch))
    else:
        rows = used_rows(cfg.prompts, "prompts", lambda row: prompt_of(row, cfg, run.policy, rm))
    may_change = "out resume save_every eval_every heldout device offload micro_tokens cache_tokens".split()
    run.fixed = {name: x for name, x in asdict(run.cfg).items() if name not in may_change}
    files = [(file.name, file.stat().st_size) for path in models for file in sorted(path.glob("*"))]
    run.fixed["rm, --policy, --pairs or --prompts (contents)"] = seed_for(files, rows)
    return run, rows, heldout, read_checkpoint(run)

def main(argv=None, kind=Config):
    """What a user can cause ends as one line on stderr."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prepared = None
    try:
        cfg = parse_config(argv, kind).checked()
        start_ranks(cfg.device)
        prepared = together(lambda: prepare(cfg))
        train(*prepared)
    except (UsageError, KeyboardInterrupt, FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        hint = "lower --micro_tokens, --cache_tokens, --max_new_tokens or --offload: "
        line = hint * isinstance(error, torch.OutOfMemoryError) + (str(error) or "stopped by Ctrl-C")
        line = f"rank {RANK}: " * bool(prepared) + " ".join(line.split())[:400]
        if RANK == 0 or prepared or not isinstance(error, UsageError):
            print("save.py: error:", line, file=sys.stderr, flush=True)
        code = {UsageError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
        os._exit(code) if WORLD > 1 else sys.exit(code)  # others may wait

if __name__ == "__main__":
    main()
