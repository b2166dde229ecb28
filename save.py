"""SAVE: a reward model (RM) that improves itself while it trains a policy (arXiv 2605.30888).

    bash run.sh                                           # laptop: a small world, the whole pipeline
    python save.py --policy DIR --rm DIR --prompts FILE   # one process, your models and prompts
    torchrun --nproc-per-node 4 save.py                   # the paper's main run

Algorithm 2, step t of T                       here                     its lines    equations
    threshold mu(t)                            curriculum_threshold     2            14
    G responses for each of P prompts          sample                   3-5
    R(x,y) and V(x) from one forward           score_batch              7            13: a = R - V
    keep |a| large enough, split by sign       label, partition         8-11         15-17
    contrastive loss -> backbone, reward head  reward_model_step        13           18-20
    score again, V towards the group mean      value_step               14           21
    filter again with the improved RM          label, partition         15-16
    GRPO | RLOO | GSPO on the survivors        policy_step              17

pi_theta is `policy`, R `rewards` (P,G), V `values` (P,), Y+ and Y- `positive` and `negative` (P,G), B~ `valid` (P,):
P prompts of a step on all ranks, G responses each (`group`), N = P*G rows, T tokens, H hidden size.
Sections 1 to 5 are the method, the others are machinery. To fork it: a loss is a row of RM_UPDATES, an advantage one of
ALGORITHMS, `label` is for judges (tests/forks/).
"""
import argparse
import contextlib
import dataclasses
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
from pathlib import Path
from typing import Callable, NamedTuple

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch is imported
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

# ---- 1. configuration -------------------------------------------------------
@dataclasses.dataclass
class Config:
    """Every knob, as a flag of the same name. "Table 8" marks the paper's value."""
    stage: str = ""  # preference, value, save; none: value if the RM has no head, then save
    algo: str = "grpo"  # how the policy learns, a row of ALGORITHMS
    rm_update: str = "save"  # how the reward model learns, a row of RM_UPDATES
    policy: str = "Qwen/Qwen3-4B-Instruct-2507"  # folder or hub name, causal LM
    rm: str = "Skywork/Skywork-Reward-V2-Llama-3.2-3B"  # the same, classifier, 1 label
    prompts: str = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # .json(l)(.gz), .parquet, hub name
    pairs: str = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # the same, with chosen and rejected
    heldout: list = dataclasses.field(default_factory=list)  # pairs to log the RM's accuracy on
    out: str = "out"  # folder for models, logs and checkpoints
    # the method
    steps: int = None  # T; none: 320 (Table 8), in stage preference one pass over the pairs
    batch: int = 32  # prompts (or pairs) per step over all ranks (Table 8)
    group: int = 16  # G responses per prompt (Table 8)
    m0: float = 0.5  # initial margin of the curriculum, Eq. 14 (Table 8); 0: all are kept
    kl_coef: float = 0.04  # beta, KL to the initial policy (Table 8)
    lr_rm: float = None  # backbone, reward head; none: 1e-7 (Table 8), 1e-5 in stage preference
    lr_value: float = 1e-5  # value head (Table 8)
    lr_policy: float = 2e-6  # policy (Table 8); 0: it stays as it is
    value_k: int = 16  # K responses per prompt in stage value (Table 8)
    value_lr: float = 2e-4  # value head in stage value (Table 8)
    value_batch: int = 32  # prompts per step in stage value (Table 8)
    value_epochs: int = 1  # passes in stage value (Table 8)
    value_prompts: int = 0  # prompts in stage value; 0: as many as SAVE will use
    # sampling
    max_new_tokens: int = 1024  # longest response (Table 8), known ones in the data too (F.1)
    temperature: float = 0.7  # Table 8; log-probs are taken at it too
    top_p: float = 0.8  # Table 8
    top_k: int = 20  # Table 8; 0: off
    # where the paper is silent
    num_minibatches: int = 1  # optimizer steps per rollout; 1: all ratios are 1, GSPO equals GRPO
    lr_schedule: str = "constant"  # constant, linear (to 0)
    max_prompt_tokens: int = 1024  # longest prompt, template included, in policy tokens
    # machine
    dtype: str = "auto"  # working copy, masters are fp32; auto: bfloat16 on a GPU, else float32
    device: str = "auto"  # auto: a GPU where there is one; cpu
    offload: bool = False  # masters and moments in host memory, and the optimizer step too
    micro_tokens: int = None  # padded tokens per micro-batch; none: 8192 on a GPU, 2048 on a CPU
    cache_tokens: int = 0  # decoded together; 0: on a GPU what its free memory holds, else all
    seed: int = 0  # randomness is a function of (seed, purpose, step, row)
    save_every: int = 40  # steps between checkpoints, the last two are kept; 0: none
    eval_every: int = 0  # steps between accuracies on --heldout; 0: start and end
    resume: bool = False  # from the newest checkpoint under --out, if there is one

    def checked(self):
        """Refuse what cannot work; replace every "auto" and none by what will be used."""
        for name, value in vars(self).items():
            if type(value) in (int, float):
                expect(0 <= value < math.inf, f"--{name} {value}: expected 0 or more")
        for name in "steps batch group value_k value_batch value_epochs max_new_tokens temperature top_p".split():
            expect(getattr(self, name) != 0, f"--{name} 0: expected more than 0")
        for name in ("m0", "top_p"):
            expect(getattr(self, name) <= 1, f"--{name} {getattr(self, name)}: expected at most 1")
        ranks = WORLD * self.num_minibatches
        fine = ranks and self.batch % ranks == 0
        expect(fine, f"--batch {self.batch}: expected a multiple of {ranks}, ranks x minibatches")
        expect(self.group > 1 or self.stage in ("preference", "value"), f"--group {self.group}: expected 2 or more")
        gpu, preference = self.device == "auto" and torch.cuda.is_available(), self.stage == "preference"
        used = {"device": f"cuda:{LOCAL_RANK}" if gpu else "cpu", "dtype": "bfloat16" if gpu else "float32",
                "micro_tokens": 8192 if gpu else 2048, "steps": None if preference else 320,
                "lr_rm": 1e-5 if preference else 1e-7}
        unset = {name: x for name, x in used.items() if getattr(self, name) in (None, "auto")}
        return dataclasses.replace(self, **unset)

def parse_config(argv=None, kind=Config):
    """Flags from the fields of a dataclass; the comment behind each is its help text."""
    choices = {"stage": ["preference", "value", "save"], "algo": [*ALGORITHMS], "rm_update": [*RM_UPDATES],
               "lr_schedule": ["constant", "linear"], "dtype": ["auto", "float32", "bfloat16"], "device": ["auto", "cpu"]}
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: expect(False, message + " (--help lists the flags)")
    source = "".join(inspect.getsource(part) for part in reversed(kind.__mro__[:-1]))  # a fork's Config too
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.M))
    for field in dataclasses.fields(kind):
        default = "none" if field.default in (None, "", dataclasses.MISSING) else field.default
        plain = {"type": field.type, "choices": choices.get(field.name)}
        options = {bool: {"action": argparse.BooleanOptionalAction}, list: {"nargs": "+"}}.get(field.type, plain)
        parser.add_argument("--" + field.name, help=f"{comments[field.name]} [{default}]", **options)
    return kind(**vars(parser.parse_args(argv)))

# ---- 2. the maths of the reward model: pure functions of tensors ------------
def at_least_fp32(*tensors):
    """Losses are taken in fp32 or better. One tensor -> one, several -> a list."""
    exact = [x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in tensors]
    return exact if len(exact) > 1 else exact[0]

def masked_mean(x, mask, dim=None):
    """Mean of x where mask, 0 where nothing is; the mask may hide inf and nan."""
    return torch.where(mask, x, 0).sum(dim) / mask.sum(dim).clamp(min=1)

def curriculum_threshold(step, total_steps, m0):
    """Eq. 14: mu(t) = (2 - p) / 2 with p = min(1 - m0 + t/T, 1); t counts from 1."""
    return (2 - min(1 - m0 + step / total_steps, 1)) / 2

def rm_advantages(rewards, values):
    """Eq. 13: a = R - V. rewards (P,G), values (P,) -> (P,G)."""
    return rewards - values[:, None]

def partition(advantages, threshold, usable=None):
    """Eq. 15-17. advantages (P,G) -> positive (P,G), negative (P,G), valid (P,), all bool. a = 0 is positive."""
    keep = torch.sigmoid(advantages.double().abs()) >= threshold  # fp64: no |a| below 36 saturates
    keep = keep if usable is None else keep & usable
    positive, negative = keep & (advantages >= 0), keep & (advantages < 0)
    return positive, negative, positive.any(1) & negative.any(1)

def bradley_terry_loss(chosen, rejected):
    """Eq. 2 and 11: mean of -log sigmoid(R_w - R_l) over pairs. chosen, rejected (n,)."""
    return -F.logsigmoid(torch.sub(*at_least_fp32(chosen, rejected))).mean()

def contrastive_loss(rewards, values, positive, negative, usable=None):
    """Eq. 18-20, mean over valid prompts, 0 if there is none. rewards, masks (P,G); values (P,), without gradient.
    L+ = log(e^V + sum_{Y+} e^R) - mean_{Y+} R        dL+/dR = e^R / (e^V + sum_{Y+} e^R) - 1/|Y+|
    L- = log(e^V + sum_{Y-} e^R) - V                  dL-/dR = e^R / (e^V + sum_{Y-} e^R)"""
    rewards, anchor = at_least_fp32(rewards, values.detach())
    sides = (rewards.masked_fill(~side, -math.inf) for side in (positive, negative))
    up, down = (torch.cat([anchor[:, None], side], 1).logsumexp(1) for side in sides)
    loss = up - masked_mean(rewards, positive, 1) + down - anchor
    return masked_mean(loss, positive.any(1) & negative.any(1))

def centred_loss(rewards, values, positive, negative, usable):
    """Ours: contrastive_loss without its common push: dL/dR sums to 0 in a group.
    With Z the sum of e^(R-V) over a side it is Z-/(1 + Z-) - 1/(1 + Z+): mostly down."""
    rewards = at_least_fp32(rewards)
    mean = masked_mean(rewards, usable, 1)[:, None]
    return contrastive_loss(rewards - mean + mean.detach(), values, positive, negative)

def value_loss(values, rewards, usable=None):
    """Eq. 12 and 21: mean of (V - mean_G R)^2 over prompts with usable rows. values (P,), rewards (P,G)."""
    usable = torch.ones_like(rewards, dtype=torch.bool) if usable is None else usable
    values, rewards = at_least_fp32(values, rewards.detach())
    return masked_mean((values - masked_mean(rewards, usable, 1)) ** 2, usable.any(1))

class RMUpdate(NamedTuple):
    """A row of RM_UPDATES: how the reward model learns from the rewards of a batch."""
    loss: Callable | None  # loss(rewards, values, positive, negative, usable) -> scalar; none: frozen
    anchor: str  # what V is: "value head" | "group mean" | "" (none, nothing is filtered)

RM_UPDATES = {
    "save": RMUpdate(contrastive_loss, "value head"),
    "mean_reward": RMUpdate(contrastive_loss, "group mean"),  # a baseline of Table 1
    "centred": RMUpdate(centred_loss, "value head"),
    "none": RMUpdate(None, ""),                               # plain RL
}

# ---- 3. the maths of the policy: pure functions of tensors ------------------
def grpo_advantages(rewards, keep):
    """(r - mean) / (std + 1e-4) over the kept rows of each group, 0 where not kept or alone. (P,G) -> (P,G).
    fp64: the fp32 mean of equal numbers may differ from them."""
    dtype, rewards, count = rewards.dtype, rewards.double(), keep.sum(1, keepdim=True)
    centred = rewards - masked_mean(rewards, keep, 1)[:, None]
    variance = torch.where(keep, centred ** 2, 0).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return torch.where(keep & (count > 1), centred / (variance.sqrt() + 1e-4), 0).to(dtype)

def rloo_advantages(rewards, keep):
    """r minus the mean of the other kept rows of its group; 0 as in grpo_advantages. (P,G) -> (P,G)."""
    dtype, rewards, count = rewards.dtype, rewards.double(), keep.sum(1, keepdim=True)
    others = torch.where(keep, rewards, 0).sum(1, keepdim=True) - rewards
    return torch.where(keep & (count > 1), rewards - others / (count - 1).clamp(min=1), 0).to(dtype)

class Algorithm(NamedTuple):
    """A row of ALGORITHMS: how the policy learns from the rewards of the survivors."""
    advantages: Callable  # advantages(rewards, keep) -> (P,G)
    ratio: str  # log-ratio of a row: "token" by token | "mean" of its tokens | their "sum"
    kl: str  # "loss": k3 per token in the loss | "reward": k1 of a response in its reward
    clip: tuple  # (low, high): the ratio stays within 1 - low and 1 + high

ALGORITHMS = {
    "grpo": Algorithm(grpo_advantages, "token", "loss", (0.2, 0.2)),
    "rloo": Algorithm(rloo_advantages, "sum", "reward", (0.2, 0.2)),
    "gspo": Algorithm(grpo_advantages, "mean", "loss", (3e-4, 4e-4)),
}

def policy_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, *, algo, kl_coef):
    """Clipped surrogate, mean over a row's tokens, then rows. Log-probs, mask (N,T), advantages (N,) or (N,T),
    algo a row of ALGORITHMS -> loss, {"kl": k3 = exp(ref - lp) - (ref - lp) - 1, "clipped": share of tokens}."""
    mask, log_probs = mask.bool(), at_least_fp32(log_probs)
    log_ratio = torch.where(mask, log_probs - at_least_fp32(old_log_probs.detach()), 0)
    of_row = log_ratio.sum(1, keepdim=True)
    mean = of_row / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = {"token": log_ratio, "mean": mean, "sum": of_row}[algo.ratio]
    ratio = ratio.clamp(max=80).exp()  # not inf, which times a zero advantage would be nan
    advantages = torch.where(mask, advantages[:, None] if advantages.dim() == 1 else advantages, 0)
    free, clipped = ratio * advantages, ratio.clamp(1 - algo.clip[0], 1 + algo.clip[1]) * advantages
    # a masked 0 - 0 = 0 keeps whatever the padding holds out of exp
    gap = torch.where(mask, at_least_fp32(ref_log_probs.detach()) - log_probs, 0)
    k3 = gap.exp() - gap - 1
    per_token = {"loss": kl_coef * k3, "reward": 0}[algo.kl] - torch.minimum(free, clipped)
    per_token = per_token, k3.detach(), (clipped < free).float()
    loss, kl, share = (masked_mean(masked_mean(x, mask, 1), mask.any(1)) for x in per_token)
    return loss, {"kl": kl, "clipped": share}

# ---- 4. a step of Algorithm 2, top down -------------------------------------
@dataclasses.dataclass
class Run:
    """What a stage works with."""
    cfg: Config
    rm: "RewardModel"
    policy: "Policy" = None
    log: "Log" = None
    optimizers: dict = dataclasses.field(default_factory=dict)  # those in training: rm, value, policy
    step: int = 1  # under way
    lr_scale: float = 1.0  # of all learning rates, --lr_schedule
    inputs: dict = dataclasses.field(default_factory=dict)  # digest of what was read, for the checkpoint

@dataclasses.dataclass
class Batch:
    """One step's responses: tensors (P,G) of all ranks, lists of this rank's rows, prompt by prompt."""
    prompts: list  # (messages, policy ids) of this rank's prompts
    texts: list  # responses, decoded
    chats: list  # (ids, prompt_length) of prompt and response in the reward model's tokens
    sequences: list  # the same in the policy's tokens
    lengths: torch.Tensor  # (P,G) response tokens
    ended: torch.Tensor  # (P,G) bool: by EOS, not by --max_new_tokens; only these train the reward model
    rewards: torch.Tensor = None  # (P,G)
    features: torch.Tensor = None  # (P,H) at the end of the prompt, for V

def save_step(run, prompts):
    """One step of Algorithm 2 on the next prompts."""
    prompts = draw(prompts, run.cfg.seed, "prompts", (run.step - 1) * run.cfg.batch, run.cfg.batch)
    learn(run, sample(run, prompts, run.cfg.group, run.step))

def learn(run, batch):
    """What a step learns from its responses: the three steps of Algorithm 2."""
    row = RM_UPDATES[run.cfg.rm_update]
    score_batch(run, batch)
    positive, negative, valid = filtered(run, batch, batch.ended)  # 1: adaptive feedback filtering
    record(run, batch, positive, negative, valid)
    before = batch.rewards
    if row.loss and reward_model_step(run, batch, positive, negative):  # 2: the reward model
        score_batch(run, batch)
        run.log.put(reward_shift=(batch.rewards - before).abs().mean(), spread_after=batch.rewards.std(1).mean())
    if row.anchor == "value head" and batch.ended.any():
        run.log.put(value_loss=value_step(run, batch.rewards, batch.features, batch.ended))
    positive, negative, _ = filtered(run, batch)  # 3: the policy, with truncated responses
    policy_step(run, batch, positive | negative)

def sample(run, prompts, group, step, purpose="rollout"):
    """`group` responses to each of this rank's `prompts`."""
    cfg, own = run.cfg, mine(prompts)
    seeds = [seed_for(cfg.seed, purpose, step, p, g) for p in mine(range(len(prompts))) for g in range(group)]
    options = {name: getattr(cfg, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "cache_tokens")}
    with run.log.time("rollout"):
        responses, ended = rollout(run.policy, [ids for _, ids in own], group, seeds, **options)
    # the policy's tokens mean nothing to the reward model
    texts = run.policy.tokenizer.batch_decode(responses, skip_special_tokens=True)
    chats = [chat for i, (messages, _) in enumerate(own)
             for chat in encode_responses(run.rm.tokenizer, messages, texts[i * group:(i + 1) * group])]
    asked = [ids for _, ids in own for _ in range(group)]
    sequences = [(ids + response, len(ids)) for ids, response in zip(asked, responses)]
    numbers = torch.tensor([ended, [len(ids) for ids in responses]], device=cfg.device)
    ended, lengths = gather(numbers.view(2, -1, group).transpose(0, 1)).unbind(1)
    return Batch(own, texts, chats, sequences, lengths, ended.bool())

@torch.no_grad()
def score(rm, sequences, budget):
    """[(ids, prompt_length)] -> rewards (N,) and prompt features (N,H) for V, without gradients."""
    head, count, first = rm.value_head.weight, len(sequences), {}  # equal ones once: rounding must not rank
    same = [first.setdefault((tuple(ids), length), row) for row, (ids, length) in enumerate(sequences)]
    rewards, features = head.new_empty(count), head.new_empty(count, head.shape[1])
    for rows in micro_batches(first.values(), sequences, budget):
        last, features[rows] = rm.features(*model_inputs([sequences[row] for row in rows], head.device))
        rewards[rows] = rm.model.score(last).squeeze(-1)
    return rewards[same], features[same]

def score_batch(run, batch):
    """Fill in R (P,G) and the features (P,H) that V is read from, of all ranks."""
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
    ended = batch.ended | ~batch.ended.any(1, keepdim=True)  # a group in which none ended: the mean of all
    return masked_mean(batch.rewards, ended, 1)

def label(run, batch):
    """(P,G): the sign makes Y+ and Y-, the size decides what is kept. Eq. 13, R - V.
    A verifier, a judge or an ensemble goes here (tests/forks/); inf and -inf are always kept."""
    return rm_advantages(batch.rewards, anchor(run, batch))

def filtered(run, batch, usable=None):
    """Step 1, Eq. 14-17: positive, negative (P,G), valid (P,). Without an anchor all are kept."""
    if not RM_UPDATES[run.cfg.rm_update].anchor:
        keep = torch.ones_like(batch.ended) if usable is None else usable
        return keep, torch.zeros_like(keep), keep.any(1)
    return partition(label(run, batch), curriculum_threshold(run.step, run.cfg.steps, run.cfg.m0), usable)

def reward_model_step(run, batch, positive, negative):
    """Step 2, Eq. 18-20, on backbone and reward head. True if there was anything to learn from.
    The loss needs all rewards of a group, memory holds a few rows: take dL/dR on the (P,G) rewards of the scoring,
    then back-propagate sum(R * dL/dR) in any micro-batches. Exact, and rows whose dL/dR is 0 cost nothing."""
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
    """Eq. 12 and 21 on the value head, the same step on every rank. Returns the loss before it."""
    run.rm.value_head.requires_grad_(True)  # see `train_on`
    loss = value_loss(run.rm.value(features), rewards, usable)
    loss.backward()
    run.optimizers["value"].step(run.lr_scale)
    return loss.item()

@torch.no_grad()
def response_log_probs(run, batch, batches):
    """Log-probs (N/W,R), 0 past the end. In the micro-batches of training: others round differently."""
    result = torch.zeros(len(batch.sequences), int(batch.lengths.max()), device=run.cfg.device)
    for part in batches:
        inputs = model_inputs([batch.sequences[row] for row in part], run.cfg.device)
        log_probs, _ = run.policy(*inputs, run.cfg.temperature)
        result[part, :log_probs.shape[1]] = log_probs
    return result

def policy_advantages(run, batch, trained, old, reference):
    """Of this rank's rows, (N/W,) or one per token (N/W,R), over those that are `trained` (P,G)."""
    algorithm, rewards = ALGORITHMS[run.cfg.algo], batch.rewards
    if algorithm.kl == "reward" and run.cfg.kl_coef:  # k1 of the whole response
        rewards = rewards - run.cfg.kl_coef * gather((old - reference).sum(1).view(-1, trained.shape[1]))
    return mine(algorithm.advantages(rewards, trained)).flatten()

def policy_step(run, batch, keep):
    """Step 3: the row of ALGORITHMS on the survivors `keep` (P,G), with the improved rewards."""
    cfg, algorithm, optimizer = run.cfg, ALGORITHMS[run.cfg.algo], run.optimizers["policy"]
    trained = keep & (keep.sum(1, keepdim=True) >= 2)  # one alone has nothing to be compared with
    if not trained.any():
        return
    # ranks hold every WORLD-th prompt, so a slice of a rank's rows is its share of a slice of all prompts
    parts = mine(trained).flatten().chunk(cfg.num_minibatches)
    rows = [(part.nonzero()[:, 0] + i * len(part)).tolist() for i, part in enumerate(parts)]
    batches = [micro_batches(part, batch.sequences, cfg.micro_tokens) for part in rows]
    every, old, reference = sum(batches, []), None, None
    with run.log.time("log_probs"):
        if cfg.num_minibatches > 1 or algorithm.kl == "reward":
            old = response_log_probs(run, batch, every)
        if cfg.kl_coef:
            optimizer.publish(optimizer.initial)  # for now the working copy is the reference model
            reference = response_log_probs(run, batch, every)
            optimizer.publish(optimizer.masters)
    advantages = policy_advantages(run, batch, trained, old, reference)

    def micro_loss(model, rows):
        log_probs, mask = model(*model_inputs([batch.sequences[row] for row in rows], cfg.device), cfg.temperature)
        width = log_probs.shape[1]
        own = advantages[rows] if advantages.dim() == 1 else advantages[rows, :width]
        # a single update: the ratio is exactly 1
        before = log_probs if cfg.num_minibatches == 1 else old[rows, :width]
        initial = log_probs if reference is None else reference[rows, :width]
        loss, stats = policy_loss(log_probs, before, initial, own, mask, algo=algorithm, kl_coef=cfg.kl_coef)
        return loss * (len(rows) / count), [x * (len(rows) / count) for x in (loss, stats["kl"], stats["clipped"])]

    sums = []
    for part, micro in zip(trained.chunk(cfg.num_minibatches), batches):
        count = part.sum().item()  # rows of this minibatch on all ranks
        sums += [train_on(run, "policy", micro, micro_loss)] if count else []
    loss, kl, clipped = (sum(column) / len(sums) for column in zip(*sums))
    run.log.put(policy_loss=loss, kl=kl, clipped=clipped, survivors=trained.float().mean())

# ---- 5. stages --------------------------------------------------------------
def train(run, rows, heldout, saved):
    """Run the stages asked for. `prepare` has refused what cannot work."""
    cfg, rm, saving = run.cfg, run.rm, run.cfg.stage in ("", "save")
    anchored = RM_UPDATES[cfg.rm_update].anchor == "value head"
    run.log = Log(cfg, saved)
    if cfg.stage == "preference":
        rm.has_value_head = False  # one that it had belongs to other rewards
        for _ in each_step(run, heldout, "preference", saved):
            preference_step(run, rows)
    if cfg.stage == "value" or saving and anchored and not rm.has_value_head and not saved:
        value_stage(run, rows)
    if saving and anchored:
        run.optimizers["value"], rm.has_value_head = ShardedAdamW(rm.value_head, cfg.lr_value, cfg), True
    if saving:
        for _ in each_step(run, heldout, "save", saved):
            save_step(run, rows)
    out = Path(cfg.out)
    if cfg.stage == "value":  # all but the head as it was before --dtype rounded it
        rm.model = RewardModel.from_pretrained(cfg.rm).model if RANK == 0 else rm.model
    if "rm" in run.optimizers:
        rm.model.float()
        run.optimizers["rm"].publish(run.optimizers["rm"].masters)
    if run.optimizers.keys() & {"rm", "value"}:
        rm.save_pretrained(out / "rm")
    if "policy" in run.optimizers:
        with replaced_folder(out / "policy", run.policy.model, run.policy.tokenizer):
            pass
    say("models:", *sorted(file.parent for file in out.glob("*/config.json")))

def preference_step(run, pairs):
    """Stage preference: one step of Eq. 11 on the next pairs."""
    cfg = run.cfg
    batch = mine(draw(pairs, cfg.seed, "pairs", (run.step - 1) * cfg.batch, cfg.batch))
    longer = [max(pair, key=lambda side: len(side[0])) for pair in batch]

    def micro_loss(model, index):
        rewards, _ = model(*model_inputs([side for i in index for side in batch[i]], cfg.device))
        loss = bradley_terry_loss(rewards[0::2], rewards[1::2]) * len(index) / cfg.batch
        return loss, (loss, (rewards[0::2] > rewards[1::2]).sum() / cfg.batch)

    batches = micro_batches(range(len(batch)), longer, cfg.micro_tokens // 2)
    loss, accuracy = train_on(run, "rm", batches, micro_loss)
    run.log.put(rm_loss=loss, rm_accuracy=accuracy)

def value_stage(run, prompts):
    """Stage value, Eq. 12: V towards the mean reward of K responses; R is frozen. A tenth of the prompts is kept out
    of the fit: on it V is judged, and what the first threshold would keep."""
    cfg, batches = run.cfg, []
    count = cfg.value_prompts or min(len(prompts), cfg.batch * cfg.steps)
    count = max(1, count // cfg.batch) * cfg.batch  # whole batches
    chosen = draw(prompts, cfg.seed, "value prompts", 0, count)
    for start in tqdm(range(0, count, cfg.batch), "value: sample, score", disable=NO_BAR):
        batch = sample(run, chosen[start:start + cfg.batch], cfg.value_k, start, "value")
        score_batch(run, batch)
        batches.append((batch.rewards, batch.features, batch.ended))
    data = [torch.cat(tensors) for tensors in zip(*batches)]
    run.optimizers["value"] = ShardedAdamW(run.rm.value_head, cfg.value_lr, cfg)
    tenth = count // 10  # of fewer than 10: none
    parts = torch.arange(count - tenth).split(cfg.value_batch) * cfg.value_epochs
    for done, part in enumerate(parts):
        run.lr_scale = 1 - (cfg.lr_schedule == "linear") * done / len(parts)
        rewards, features, ended = (x[part] for x in data)
        if ended.any():
            value_step(run, rewards, features, ended)
    run.rm.has_value_head = True
    rewards, features, ended = (x[-tenth:] for x in data)
    values, targets, fitted = run.rm.value(features).detach(), masked_mean(rewards, ended, 1), ended.any(1)
    error = value_loss(values, rewards, ended)
    variance = masked_mean((targets - masked_mean(targets, fitted)) ** 2, fitted)
    threshold = curriculum_threshold(1, cfg.steps, cfg.m0)
    positive, negative, _ = partition(rm_advantages(rewards, values), threshold, ended)
    run.log.put(value_loss=error, value_target_variance=variance, kept=(positive | negative).float().mean())
    if variance > 0:
        run.log.put(value_r2=1 - error / variance)
    if rewards.shape[1] > 1:
        run.log.put(reward_spread=rewards.std(1).mean())
    run.log.write(0, "value")

def each_step(run, heldout, stage, saved):
    """Yield at each step; around them resume, evaluate, log and save."""
    cfg, asked, done = run.cfg, [], saved[0]["step"] if saved else 0
    for name, optimizer in run.optimizers.items() if saved else ():
        for state in saved:  # of however many ranks there were
            optimizer.load_state_dict(state["optimizers"][name])
        optimizer.publish(optimizer.masters)
    before = {number: signal.signal(number, lambda *_: asked.append(True)) for number in (signal.SIGTERM, signal.SIGINT)}
    if not done:
        heldout_accuracy(run, heldout)
        run.log.write(0, stage)
    for run.step in tqdm(range(done + 1, cfg.steps + 1), stage, disable=NO_BAR):
        start = time.perf_counter()
        run.lr_scale = 1 - (cfg.lr_schedule == "linear") * (run.step - 1) / cfg.steps
        yield
        run.log.put(step_seconds=time.perf_counter() - start)
        if run.step == cfg.steps or cfg.eval_every and run.step % cfg.eval_every == 0:
            heldout_accuracy(run, heldout)
        run.log.write(run.step, stage)
        stopping = total(len(asked))[0] > 0  # a signal to one rank stops all
        if stopping or cfg.save_every and run.step % cfg.save_every == 0:
            save_checkpoint(run)
        if stopping:
            say(f"stopped by a signal after step {run.step}: --resume goes on")
            sys.exit(0)
    for number, handler in before.items():
        signal.signal(number, handler)

def heldout_accuracy(run, heldout):
    """Percentage of pairs with R(chosen) > R(rejected), of each --heldout file; a tie is wrong."""
    for name, pairs in heldout.items():
        rewards, _ = score(run.rm, [side for pair in mine(pairs) for side in pair], run.cfg.micro_tokens)
        accuracy = 100 * total((rewards[0::2] > rewards[1::2]).sum())[0] / len(pairs)
        run.log.put(**{f"accuracy_{name}": accuracy})
        say(f"  accuracy on {name}: {accuracy:.2f} % of {len(pairs)} pairs")

# ---- 6. the two models ------------------------------------------------------
def load(kind, path, device):
    """A model of a folder or hub name in its own precision, without dropout, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # none of its code is run
    expect(tokenizer.chat_template, "its tokenizer has no chat template")
    with open(f"{tempfile.gettempdir()}/save_{os.getuid()}", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # one rank after the other: host memory holds the weights once
        model, info = kind.from_pretrained(path, dtype="auto", output_loading_info=True, trust_remote_code=False)
        model = model.eval().to(device)
    expect(not info["missing_keys"], f"it lacks {', '.join(sorted(info['missing_keys']))[:80]}")
    for module in model.modules():  # two passes over a row must give the same
        rates = [name for name, x in vars(module).items() if isinstance(x, float) and ("drop" in name or name == "p")]
        vars(module).update(dict.fromkeys(rates, 0.0))
    return model, tokenizer

class RewardModel(nn.Module):
    """f_omega `model.base_model`, h_phi `model.score`, v_psi `value_head`; fp32 heads: bf16 would make ties."""
    def __init__(self, model, tokenizer, value_head=None):
        super().__init__()
        self.model, self.tokenizer, self.has_value_head = model, tokenizer, bool(value_head)
        [(ids, start)] = encode_responses(tokenizer, [{"role": "user", "content": "a"}], ["b"])
        expect(len(ids) > start, "its chat template leaves out the response")
        self.model.score.float()
        width = model.score.in_features
        self.value_head = nn.Linear(width, 1)
        self.value_head.load_state_dict(value_head or {"weight": torch.zeros(1, width), "bias": torch.zeros(1)})

    @classmethod
    def from_pretrained(cls, path, device="cpu"):
        """A folder or hub name of a causal classifier with one label, with or without value_head.safetensors."""
        with blamed(f"--rm {path}: expected a folder or hub name of a reward model"):
            model, tokenizer = load(AutoModelForSequenceClassification, path, device)
            one = isinstance(getattr(model, "score", None), nn.Linear) and model.score.out_features == 1
            expect(one, "it is not causal with a linear `score` head for 1 label")
            head = Path(path, "value_head.safetensors")
            return cls(model, tokenizer, safetensors.torch.load_file(head) if head.is_file() else None).to(device)

    def features(self, input_ids, lengths, prompt_lengths):
        """Hidden states (N,H), fp32: at the last token for R, at the end of the prompt for V."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return hidden[rows, lengths - 1].float(), hidden[rows, prompt_lengths - 1].float()

    def value(self, features):
        """V from prompt features (N,H), which get no gradient: SG[omega] of Eq. 21."""
        return self.value_head(features.detach()).squeeze(-1)

    def forward(self, input_ids, lengths, prompt_lengths):
        """input_ids (N,T) right-padded, lengths and prompt_lengths (N,) -> rewards (N,), values (N,)."""
        last, prompt = self.features(input_ids, lengths, prompt_lengths)
        return self.model.score(last).squeeze(-1), self.value(prompt)

    def save_pretrained(self, path):
        """A stock AutoModelForSequenceClassification folder in fp32 and value_head.safetensors."""
        model, tokenizer = self.model.float(), self.tokenizer
        # stock pooling reads the last token that is not the pad id: it must not end a chat
        [(chat, _)] = encode_responses(tokenizer, [{"role": "user", "content": "a"}], ["b"])
        spare = model.config.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, 0, 1
        model.config.pad_token_id = next(i for i in spare if i not in (None, chat[-1]))
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
        with replaced_folder(path, model, tokenizer) as folder:
            if self.has_value_head and RANK == 0:
                safetensors.torch.save_model(self.value_head, folder / "value_head.safetensors")

class Policy(nn.Module):
    """A causal LM whose forward gives log-probs of responses, never the whole logits."""
    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        eos = model.generation_config.eos_token_id
        self.eos_ids = sorted({*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None})

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, path, device="cpu"):
        """A folder or hub name of a causal LM with a plain output layer: a scale or cap would spoil every ratio."""
        with blamed(f"--policy {path}: expected a folder or hub name of a causal language model"):
            policy = cls(*load(AutoModelForCausalLM, path, device))
            expect([*map(int, policy.eos_ids)], "it has no EOS token")
            ids = torch.arange(8, device=device)[None] % policy.model.config.vocab_size
            ours, _ = policy(ids, torch.tensor([8], device=device), torch.tensor([1], device=device), 1.0)
            own = policy.model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
            expect(torch.allclose(ours.T, own, atol=0.02), "its output layer scales or caps, or has NaN")
            return policy

    def forward(self, input_ids, lengths, prompt_lengths, temperature, chunk=512):
        """input_ids (n,T) right-padded -> log_probs over the full vocabulary and mask (n,R) of response tokens.
        There are never more logits than of `chunk` tokens."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        counts = lengths - prompt_lengths
        mask = torch.arange(int(counts.max()), device=input_ids.device) < counts[:, None]
        rows, offsets = mask.nonzero(as_tuple=True)
        position = prompt_lengths[rows] + offsets  # a token is predicted by the state before it
        hidden, targets = hidden[rows, position - 1].split(chunk), input_ids[rows, position].split(chunk)
        head = self.model.get_output_embeddings()
        log_probs = [checkpoint(lambda h, t: -F.cross_entropy(head(h).float() / temperature, t, reduction="none"),
                                *part, use_reentrant=False) for part in zip(hidden, targets)]
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(log_probs)), mask

def to_working_copy(module, cfg):
    """To the device, in --dtype but for reward heads and buffers; masters are taken before."""
    for p in (module.model.base_model if isinstance(module, RewardModel) else module.model).parameters():
        p.data = p.data.to(cfg.device, getattr(torch, cfg.dtype))
    if cfg.device != "cpu":  # recompute activations in the backward pass
        model = module.model  # the older name is that of transformers before 5.23
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    return module.to(cfg.device)

# ---- 7. rollout -------------------------------------------------------------
def sample_tokens(logits, uniforms, temperature, top_p, top_k):
    """A token per row, at `uniforms`: temperature (0: greedy), top-k, then top-p. (n,V), (n,) -> (n,)."""
    if temperature == 0:
        return logits.argmax(-1)
    ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    if top_k or top_p < 1:
        logits, ids = logits.topk(min(top_k or sys.maxsize, logits.shape[-1]))
    probs = (logits.double() / temperature).softmax(-1)
    probs = torch.where(probs.cumsum(-1) - probs < top_p, probs, 0)  # the smallest set that reaches top_p
    cumulative = probs.cumsum(-1)
    uniforms = uniforms[:, None].double() * cumulative[:, -1:]
    return ids.gather(1, torch.searchsorted(cumulative, uniforms, right=True))[:, 0]

@torch.no_grad()
def rollout(policy, prompt_ids, group, seeds, *, max_new_tokens, temperature, top_p, top_k, cache_tokens=0):
    """`group` responses to each of P token lists -> P*group token lists (with EOS), and whether each ended."""
    responses, ended = [None] * len(seeds), [None] * len(seeds)
    if not cache_tokens and policy.model.device.type == "cuda":  # what is free, a fifth of it for the rest
        kept = [len(p) * p.itemsize for name, p in policy.named_parameters() if re.search("[kv]_proj.weight", name)]
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        cache_tokens = int(0.8 * free) // max(sum(kept), 1)
    caches = [(range(group * (len(ids) + max_new_tokens)), 0) for ids in prompt_ids]  # all rows of a prompt
    for wave in micro_batches(range(len(prompt_ids)), caches, cache_tokens or sys.maxsize):
        rows = [prompt * group + g for prompt in wave for g in range(group)]
        prompts, own = [prompt_ids[prompt] for prompt in wave], [seeds[row] for row in rows]
        tokens, done = decode(policy, prompts, group, own, max_new_tokens, temperature, top_p, top_k)
        for row, ids, end in zip(rows, tokens.tolist(), done.tolist()):
            responses[row], ended[row] = [token for token in ids if token >= 0], end
    return responses, ended

def decode(policy, prompt_ids, group, seeds, max_new_tokens, *sampling):
    """One wave, each prompt prefilled once. -> tokens (n,R), -1 after the end; ended (n,)."""
    model, device = policy.model, policy.model.device
    lengths = torch.tensor([len(ids) for ids in prompt_ids], device=device)
    width = int(lengths.max())
    # left-padded: every row's next token goes into the same column
    ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompt_ids], device=device)
    mask = torch.arange(width + max_new_tokens, device=device) >= width - lengths[:, None]
    cache = transformers.DynamicCache(config=model.config)
    position = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask[:, :width].long(), position_ids=position, past_key_values=cache,
                   logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(group)
    logits, mask, position = (x.repeat_interleave(group, 0) for x in (logits, mask, lengths))
    numbers = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniforms = torch.stack([torch.rand(max_new_tokens, generator=own) for own in numbers]).to(device)
    stop_ids = torch.tensor(policy.eos_ids, device=device)
    tokens = torch.full((len(seeds), max_new_tokens), -1, device=device)
    ended = torch.zeros(len(seeds), dtype=torch.bool, device=device)
    rows = torch.arange(len(seeds), device=device)  # the rows still in the batch
    for t in range(max_new_tokens):
        token = sample_tokens(logits, uniforms[rows, t], *sampling)
        tokens[rows, t] = torch.where(ended[rows], -1, token)
        ended[rows] |= torch.isin(token, stop_ids)
        running = (~ended[rows]).nonzero()[:, 0]
        if len(running) == 0 or t == max_new_tokens - 1:
            break
        if len(running) <= len(rows) * 7 // 8:  # it copies the cache, so not for every row
            cache.batch_select_indices(running)
            rows, token, mask, position = (x[running] for x in (rows, token, mask, position))
        logits = model(input_ids=token[:, None], attention_mask=mask[:, :width + t + 1].long(), past_key_values=cache,
                       position_ids=position[:, None], logits_to_keep=1).logits[:, -1]
        position = position + 1
    return tokens, ended

# ---- 8. optimizer and offload -----------------------------------------------
class ShardedAdamW:
    """AdamW on fp32 masters, whole parameters dealt to ranks (ZeRO-1): a bf16 model would not move at lr 1e-7.
    `keep_initial`: the initial weights too, published they make the reference model."""
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
        initial, dtype = self.masters if keep_initial else {}, getattr(torch, cfg.dtype)
        self.initial = {name: p.to(dtype, copy=True) for name, p in initial.items()}
        self.adamw = torch.optim.AdamW(self.masters.values() or [torch.zeros(1)], lr, weight_decay=0.0, fused=True)

    def publish(self, source):
        """Write `source`, this rank's masters or initial weights, into all working copies."""
        for name, p in self.named:
            if self.owner[name] == RANK:
                p.data.copy_(source[name])
            broadcast(p.data, self.owner[name])

    def step(self, lr_scale=1.0):
        """One step from p.grad, the same on every rank. Returns the gradient norm before clipping."""
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for _, p in self.named if p.grad is not None]
        norm = torch.stack(norms).norm().item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}, nothing was updated")
        scale = min(1.0, self.max_norm / (norm + 1e-6))  # as torch clips
        for name, p in self.named:
            if self.owner[name] == RANK and p.grad is not None:
                self.masters[name].grad = p.grad.to(self.device, torch.float32) * scale
            p.grad = None
        self.adamw.param_groups[0]["lr"] = self.lr * lr_scale
        self.adamw.step()
        self.adamw.zero_grad()
        self.publish(self.masters)
        return norm

    def state_dict(self):
        """This rank's {name: {"master", "step", "exp_avg", "exp_avg_sq"}}."""
        return {name: {"master": p.detach(), **self.adamw.state[p]} for name, p in self.masters.items()}

    def load_state_dict(self, state):
        """Take this rank's part out of a state_dict of any rank."""
        for name in state.keys() & self.masters.keys():
            master, moments = self.masters[name], dict(state[name])
            master.data.copy_(moments.pop("master"))
            self.adamw.state[master] = {key: x.to(self.device, copy=True) for key, x in moments.items()}

# ---- 9. ranks: the only place that knows torch.distributed ------------------
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
NO_BAR = None if RANK == 0 else True  # of tqdm: bars are for rank 0, on a terminal

def start_ranks(device):
    """Join the ranks that torchrun started."""
    if device != "cpu":
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        patience = datetime.timedelta(hours=2)  # one rank may decode much longer than another
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=patience)

def together(work):
    """work() on every rank; what one refuses all refuse, and rank 0 says it."""
    result, refusals = None, [""] * WORLD
    try:
        result = work()
    except UsageError as error:
        refusals[RANK] = str(error)
    if WORLD > 1:
        dist.all_gather_object(refusals, refusals[RANK])
    if any(refusals) and RANK > 0:
        sys.exit(2)
    expect(not any(refusals), max(refusals))
    return result

def mine(items):
    """This rank's share of a list or tensor over prompts, strided."""
    return items[RANK::WORLD]

def gather(share):
    """(P/W, ...) on each rank -> (P, ...) on every rank, the reverse of `mine`."""
    if WORLD == 1:
        return share
    shares = [torch.empty_like(share, dtype=torch.float32) for _ in range(WORLD)]
    dist.all_gather(shares, share.float().contiguous())
    return torch.stack(shares, 1).flatten(0, 1).to(share.dtype)

def broadcast(tensor, source):
    """Overwrite `tensor` on every rank with that of rank `source`."""
    if WORLD > 1:
        dist.broadcast(tensor, source)

def total(*numbers):
    """Each number summed over the ranks, as floats."""
    sums = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    if WORLD > 1 and numbers:
        sums = sums if dist.get_backend() == "gloo" else sums.cuda()
        dist.all_reduce(sums)
    return sums.tolist()

def accumulate(model, batches, micro_loss):
    """The gradient of micro_loss(model, rows) -> (loss, numbers), summed, into p.grad -> sums of numbers.
    Ranks may have different numbers of micro-batches; one without any takes part with row 0 at weight 0."""
    model.zero_grad()
    wrapped, sums, weight = model.train(), [], bool(batches)  # activations are recomputed in no other mode
    if isinstance(model, RewardModel):  # V has a step of its own
        model.value_head.requires_grad_(False)
    if WORLD > 1:  # gradients that are there become views of DDP's buckets
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.grad = torch.zeros_like(p)
        # otherwise its first bucket is the whole model
        newer = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
        sizes = {"bucket_cap_mb_list": [25]} if newer else {}
        ddp = nn.parallel.DistributedDataParallel
        wrapped = ddp(model, init_sync=False, gradient_as_bucket_view=True, **sizes)
    for rows in batches or [[0]]:
        wrapped.require_backward_grad_sync = not batches or rows is batches[-1]  # gradients are exchanged once
        loss, numbers = micro_loss(wrapped, rows)
        (loss * weight * WORLD).backward()  # DDP averages over ranks
        sums.append([number.detach() * weight for number in numbers])
    model.eval()
    return total(*map(sum, zip(*sums)))

def train_on(run, name, batches, micro_loss):
    """One step of the model `name` on all ranks' micro-batches -> the sums of micro_loss's numbers."""
    with run.log.time(f"{name}_update"):
        sums = accumulate(getattr(run, name), batches, micro_loss)
        run.log.put(**{f"{name}_grad_norm": run.optimizers[name].step(run.lr_scale)})
    return sums

# ---- 10. text and data ------------------------------------------------------
DATE = datetime.datetime(2024, 7, 26)  # some templates print today's date otherwise

def encode_chats(tokenizer, chats, generation_prompt=False):
    """Lists of messages -> lists of token ids, with one BOS where the tokenizer wants one."""
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    pattern = re.compile("|".join(special) or "(?!)")  # in messages a space makes them text
    chats = [[{key: pattern.sub(lambda m: m[0][0] + " " + m[0][1:], text) for key, text in message.items()}
              for message in chat] for chat in chats]
    texts = tokenizer.apply_chat_template(
        chats, tokenize=False, date_string=f"{DATE:%d %b %Y}", add_generation_prompt=generation_prompt)
    texts = [text.encode("utf-8", "replace").decode() for text in texts]  # without lone surrogates
    rows, bos = tokenizer(texts, add_special_tokens=False)["input_ids"], [tokenizer.bos_token_id]
    wants_bos = tokenizer("")["input_ids"][:1] == bos
    return [bos + ids if wants_bos and ids[:1] != bos else ids for ids in rows]

def encode_responses(tokenizer, messages, responses):
    """A prompt and response texts -> [(ids, prompt_length)] in the reward model's own template.
    V is read at the end of the prompt: a token prefix of the whole, as in Llama-3, Qwen and ChatML."""
    answered = [messages + [{"role": "assistant", "content": text}] for text in responses]
    prompt, *rows = encode_chats(tokenizer, [messages, *answered])
    expect(all(row[:len(prompt)] == prompt for row in rows), "--rm: expected a chat template that renders the "
           "prompt as a token prefix of prompt and response")
    return [(row, len(prompt)) for row in rows]

def read_rows(source, flag):
    """Yield (where, row) of a .json(l) (plain or .gz) or .parquet file, or of a hub dataset `name[:split]`.
    JSON is read here: the reader of `datasets` changes dates and, where types mix, strings."""
    kind, number = Path(source.removesuffix(".gz")).suffix, 0
    try:
        if kind in (".json", ".jsonl"):
            file = (gzip.open if source.endswith(".gz") else open)(source, "rt", encoding="utf-8")
            rows = map(json.loads, file) if kind == ".jsonl" else json.load(file)
            expect(not isinstance(rows, (dict, str)), "a list of rows")
        else:
            from datasets import load_dataset
            name, _, split = source.partition(":")
            files = {"path": "parquet", "data_files": source} if kind == ".parquet" else {"path": name}
            rows = load_dataset(**files, split=split or "train")
        for number, row in enumerate(rows, 1):
            yield f"--{flag} {source} row {number}", row
    except Exception as error:
        where = f" row {number + 1}" if isinstance(error, ValueError) else ""
        expect(False, f"--{flag} {source}{where}: expected JSON, parquet or a hub dataset ({first_line(error)})")
    expect(number, f"--{flag} {source}: expected one row or more")

def used_rows(source, flag, use):
    """use(row) of every row, joined. A bad row of a file stops the run, one of a hub set is left out."""
    used, number, own = [], 0, Path(source).exists()
    for number, (where, row) in enumerate(read_rows(source, flag), 1):
        with blamed(where, refuse=own):
            used += use(row)
    say(f"{len(used)} of {number} rows of {source} are used")
    return expect(used, f"--{flag} {source}: expected rows that can be used")

def as_messages(value, where):
    """A chat from a string or from a list of {"role", "content"}."""
    chat = [{"role": "user", "content": value}] if isinstance(value, str) and value.strip() else value
    fine = isinstance(chat, list) and chat and all(isinstance(message, dict) for message in chat) and all(
        isinstance(message.get(key), str) for message in chat for key in ("role", "content"))
    expect(fine, f'{where}: expected text or a list of {{"role", "content"}} messages, got {repr(value)[:80]}')
    return [{key: message[key] for key in ("role", "content")} for message in chat]

def prompt_of(row, cfg, policy, rm):
    """[(messages, policy token ids)] of a row: a string, messages, or {"prompt": either}; [] if its known responses
    are too long (F.1, read as R2M has it). What either model could not take later is refused now."""
    row = row if isinstance(row, dict) else {"prompt": row}
    expect({"prompt", "messages"} & {*row}, f"expected a column prompt, got {', '.join(row)}")
    messages = as_messages(row.get("prompt", row.get("messages")), "prompt")
    expect(messages[-1]["role"] != "assistant", "expected a prompt, not an answer at its end")
    [ids] = encode_chats(policy.tokenizer, [messages], generation_prompt=True)
    limit = cfg.max_prompt_tokens
    expect(0 < len(ids) <= limit, f"{len(ids)} tokens, expected at most --max_prompt_tokens {limit}")
    for tokens, model in ((ids, policy), (encode_responses(rm.tokenizer, messages, [""])[0][0], rm)):
        limit = getattr(model.model.config, "max_position_embeddings", None) or sys.maxsize
        expect(len(tokens) + cfg.max_new_tokens <= limit, f"{len(tokens)} tokens and --max_new_tokens: expected at most "
               f"{limit} together, the context of the {type(model).__name__}")
    known = [as_messages(row[side], side)[-1]["content"] for side in ("chosen", "rejected") if side in row]
    lengths = [len(policy.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in known]
    return [(messages, ids)] if max(lengths, default=0) <= cfg.max_new_tokens else []

def pair_of(row, tokenizer, limit):
    """[(chosen, rejected)] of a row of prompt, chosen, rejected; each (ids, prompt_length) of at most `limit` tokens."""
    there = isinstance(row, dict) and {"chosen", "rejected"} <= {*row}
    expect(there, f"expected columns prompt, chosen, rejected, got {', '.join(row)}")
    chats = {side: as_messages(row[side], side) for side in ("chosen", "rejected")}
    whole = [chat for side, chat in chats.items() if isinstance(row[side], list)]
    expect(all(chat[-1]["role"] == "assistant" and chat[:-1] == whole[0][:-1] for chat in whole),
           "expected chosen and rejected to be answers to the same chat")
    prompt = as_messages(row.get("prompt") or whole and whole[0][:-1], "prompt")
    pair = encode_responses(tokenizer, prompt, [chat[-1]["content"] for chat in chats.values()])
    expect(max(len(ids) for ids, _ in pair) <= limit, f"expected at most {limit} tokens")
    return [pair]

def model_inputs(sequences, device):
    """[(ids, prompt_length)] -> input_ids (n,T) right-padded, lengths (n,), prompt_lengths (n,)."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in sequences], batch_first=True)
    lengths = torch.tensor([(len(ids), length) for ids, length in sequences], device=device)
    return ids.to(device), lengths[:, 0], lengths[:, 1]

def micro_batches(rows, sequences, budget):
    """Rows in lists of at most `budget` padded tokens (or one row), longest first."""
    batches, width = [], 0
    for row in sorted(rows, key=lambda row: (-len(sequences[row][0]), row)):
        if not batches or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
            width = len(sequences[row][0])
        batches[-1].append(row)
    return batches

def seed_for(*purpose):
    """A seed from (seed, purpose, step, row, ...): no state to save, no replay on resume."""
    return int.from_bytes(hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest(), "big") >> 1

def draw(items, seed, purpose, start, count):
    """Items start .. start+count-1 of an endless stream of shuffled epochs."""
    order = []
    for epoch in range(start // len(items), (start + count - 1) // len(items) + 1):
        numbers = torch.Generator().manual_seed(seed_for(seed, purpose, epoch))
        order += torch.randperm(len(items), generator=numbers).tolist()
    return [items[i] for i in order[start % len(items):][:count]]

# ---- 11. checkpoints and logs -----------------------------------------------
@contextlib.contextmanager
def replaced_folder(path, *parts):
    """Write beside `path`, then rename: a kill leaves all or nothing. On all ranks."""
    new = Path(path).with_name(f".{Path(path).name}.new")
    if RANK == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for part in parts:  # a model, a tokenizer
            part.save_pretrained(new)
    total(0)  # wait for every rank
    yield new
    total(0)
    if RANK == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(new, path)

def checkpoints(out):
    """Complete checkpoints, oldest first."""
    return sorted(Path(out, "checkpoints").glob("step_" + 6 * "[0-9]"))

def save_checkpoint(run):
    """checkpoints/step_000123/rank_00000.pt of each rank. Two are kept."""
    out = Path(run.cfg.out)
    state = {"step": run.step, "world": WORLD, "config": {**dataclasses.asdict(run.cfg), **run.inputs},
             "logs": {name: (out / name).stat().st_size for name in Log.files if RANK == 0},
             "optimizers": {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()}}
    with replaced_folder(out / "checkpoints" / f"step_{run.step:06d}") as folder:
        try:
            torch.save(state, folder / f"rank_{RANK:05d}.pt")
        except RuntimeError as error:  # that is what a full disk is to torch
            raise OSError(f"{folder}: {first_line(error)}") from None
    for old in checkpoints(out)[:-2] if RANK == 0 else ():
        shutil.rmtree(old)

def read_checkpoint(cfg, inputs):
    """What the ranks saved last, [] if nothing; refused if other flags or inputs made it."""
    folders = checkpoints(cfg.out)
    if not folders:
        return []
    with blamed(f"--resume: {folders[-1]} is damaged, remove it"):
        saved = [torch.load(file, "cpu", mmap=True, weights_only=True) for file in sorted(folders[-1].glob("*.pt"))]
        was, now = saved[0]["config"], {**dataclasses.asdict(cfg), **inputs}
        expect(len(saved) == saved[0]["world"], "a rank's file is missing")
    for name in "out resume save_every eval_every heldout device offload micro_tokens cache_tokens".split():
        now.pop(name)  # may change
    changed = [f"--{name} was {was.get(name)!r}, is {x!r}" for name, x in now.items() if was.get(name) != x]
    expect(not changed, f"--resume: {folders[-1]} is of other flags: {'; '.join(changed)}")
    return saved

def say(*words):
    """Print on rank 0, at once and without breaking a progress bar."""
    if RANK == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()

class Log:
    """Two files under --out, and every tenth step a line on the console."""
    files = "metrics.jsonl", "samples.jsonl"

    def __init__(self, cfg, saved=()):
        self.cfg, self.record = cfg, {}
        if RANK == 0:
            Path(cfg.out).mkdir(parents=True, exist_ok=True)
            for name in Log.files:  # the steps after the checkpoint come again
                with open(Path(cfg.out, name), "a") as file:
                    file.truncate(min(file.tell(), saved[0]["logs"][name] if saved else 0))
        self.append("metrics.jsonl", {"config": dataclasses.asdict(cfg), "world": WORLD, "torch": torch.__version__,
                                      "transformers": transformers.__version__})

    def append(self, name, *records):
        """Add JSON lines to a file under --out, on rank 0."""
        if RANK == 0:
            with open(Path(self.cfg.out, name), "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def put(self, **values):
        """Add numbers to the record of the current step."""
        self.record.update({name: x.item() if torch.is_tensor(x) else x for name, x in values.items()})

    @contextlib.contextmanager
    def time(self, phase):
        """Add up the seconds of a phase, and note its peak memory on a GPU."""
        start, gpu = time.perf_counter(), self.cfg.device != "cpu"
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        if gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 1e9
            self.record[f"{phase}_gb"] = max(peak, self.record.get(f"{phase}_gb", 0))
        self.record[f"{phase}_seconds"] = self.record.get(f"{phase}_seconds", 0) + time.perf_counter() - start

    def write(self, step, stage):
        """Close the record of a step: to disk and, for every tenth, to the console."""
        record, self.record = {"step": step, "stage": stage, **self.record}, {}
        self.append("metrics.jsonl", record)
        if step % 10 == 0 or step in (1, self.cfg.steps):
            shown = ("rm_loss", "rm_accuracy", "reward", "reward_spread", "kept", "valid", "value_bias", "kl",
                     "common_push", "value_loss", "value_target_variance", "value_r2", "step_seconds")
            say(stage, step, *(f" {name} {record[name]:.4g}" for name in shown if name in record))

def record(run, batch, positive, negative, valid):
    """What the filter did and whether V is any good; rank 0's responses go to samples.jsonl."""
    cfg, rewards, values, sides = run.cfg, batch.rewards, anchor(run, batch), positive.int() - negative.int()
    means = {"reward": rewards, "reward_spread": rewards.std(1), "kept": sides.abs(), "positive": positive,
             "valid": valid, "response_tokens": batch.lengths, "truncated": ~batch.ended}
    run.log.put(**{name: x.float().mean() for name, x in means.items()},
                tokens_per_second=batch.lengths.sum().item() / run.log.record["rollout_seconds"])
    if RM_UPDATES[cfg.rm_update].anchor == "value head":
        bias, fitted = values - masked_mean(rewards, batch.ended, 1), batch.ended.any(1)
        run.log.put(value_bias=masked_mean(bias, fitted), value_rmse=masked_mean(bias ** 2, fitted).sqrt(),
                    threshold=curriculum_threshold(run.step, cfg.steps, cfg.m0))
    prompts = [messages for messages, _ in batch.prompts for _ in range(cfg.group)]
    columns = rewards, ~batch.ended, values[:, None].expand_as(rewards), sides
    rows = zip(prompts, batch.texts, *(mine(x).flatten().tolist() for x in columns))
    run.log.append("samples.jsonl", *(
        {"step": run.step, "prompt": prompt, "response": text, "reward": reward, "truncated": truncated,
         "value": value, "side": ("", "+", "-")[side], "kept": side != 0}
        for prompt, text, reward, truncated, value, side in rows))

# ---- 12. errors and main ----------------------------------------------------
class UsageError(Exception):
    """Bad input: one line, exit code 2, nothing is written."""

def expect(fine, message):
    """What is fine, or stop with one line: the flag, the file and the row, and what was expected."""
    if not fine:
        raise UsageError(" ".join(str(message).split()))
    return fine

def first_line(error):
    """The first non-empty line of an exception."""
    return next(filter(None, map(str.strip, str(error).split("\n"))), type(error).__name__)[:200]

@contextlib.contextmanager
def blamed(what, refuse=True):
    """Whatever goes wrong inside becomes one line that begins with `what`."""
    try:
        yield
    except Exception as error:
        expect(not refuse, f"{what}: {first_line(error)}")

def prepare(cfg):
    """Load and check everything. It may refuse and writes nothing -> Run, rows, held-out pairs, checkpoint."""
    preference, saving, row = cfg.stage == "preference", cfg.stage in ("", "save"), RM_UPDATES[cfg.rm_update]
    models = [Path(path).resolve() for path in (cfg.rm, cfg.policy)]
    results = [Path(cfg.out, name).resolve() for name in ("rm", "policy", *Log.files)]
    taken = any(path in models or path.exists() and not cfg.resume for path in results) or Path(cfg.out).is_file()
    expect(cfg.out and not taken, f"--out {cfg.out}: expected a new folder, or --resume")
    run = Run(cfg, RewardModel.from_pretrained(cfg.rm, cfg.device))
    lacking = cfg.stage == "save" and row.anchor == "value head" and not run.rm.has_value_head
    expect(not lacking, f"--rm {cfg.rm}: expected value_head.safetensors, run --stage value first")
    # masters are taken before --dtype rounds the working copies
    if preference or saving and row.loss:
        run.optimizers["rm"] = ShardedAdamW(run.rm.model, cfg.lr_rm, cfg)
    to_working_copy(run.rm, cfg)
    if not preference:
        run.policy = Policy.from_pretrained(cfg.policy, cfg.device)
        if saving:
            model, reference = run.policy.model, cfg.kl_coef > 0
            run.optimizers["policy"] = ShardedAdamW(model, cfg.lr_policy, cfg, keep_initial=reference)
        to_working_copy(run.policy, cfg)
    words, limit = run.rm.tokenizer, getattr(run.rm.model.config, "max_position_embeddings", None) or sys.maxsize
    heldout = {Path(file).name.split(".")[0]: used_rows(file, "heldout", lambda row: pair_of(row, words, limit))
               for file in cfg.heldout}
    expect(len(heldout) == len(cfg.heldout), f"--heldout {' '.join(cfg.heldout)}: expected files of different names")
    if preference:
        limit = min(limit, cfg.max_prompt_tokens + cfg.max_new_tokens)
        rows = used_rows(cfg.pairs, "pairs", lambda row: pair_of(row, words, limit))
        run.cfg = dataclasses.replace(cfg, steps=cfg.steps or max(1, len(rows) // cfg.batch))
    else:
        rows = used_rows(cfg.prompts, "prompts", lambda row: prompt_of(row, cfg, run.policy, run.rm))
    files = [(file.name, file.stat().st_size) for path in models for file in sorted(path.glob("*"))]
    digest = hashlib.sha256(repr((files, rows)).encode()).hexdigest()[:16]
    run.inputs = {"rm, --policy, --pairs or --prompts (contents)": digest}
    return run, rows, heldout, read_checkpoint(run.cfg, run.inputs)

def main(argv=None, kind=Config):
    """Parse, check, load, run. What a user can cause ends as one line on stderr."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cfg = None
    try:
        cfg = parse_config(argv, kind).checked()
        start_ranks(cfg.device)
        train(*together(lambda: prepare(cfg)))
    except (UsageError, KeyboardInterrupt, FloatingPointError, OSError, safetensors.SafetensorError,
            torch.OutOfMemoryError) as error:
        code = {UsageError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
        line = "stopped by Ctrl-C" if code == 130 else first_line(error)
        line = line if code > 1 else f"rank {RANK}: {line}"
        hint = "; lower --micro_tokens, --cache_tokens, --max_new_tokens, or --offload"
        hint = hint if isinstance(error, torch.OutOfMemoryError) else ""
        if RANK == 0 or cfg and code < 130:  # what all ranks refuse rank 0 says
            print(f"save.py: error: {line}{hint}", file=sys.stderr, flush=True)
        os._exit(code) if WORLD > 1 else sys.exit(code)  # leaving in order would wait for the other ranks

if __name__ == "__main__":
    main()
