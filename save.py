"""SAVE: a reward model (RM) that improves itself while it trains a policy (arXiv 2605.30888), in one file.

    bash run.sh                                               # laptop: builds a small world, runs the whole pipeline
    python save.py --policy DIR --rm DIR --prompts FILE       # one process, your models and your prompts
    torchrun --nproc-per-node 4 save.py                       # the paper's main run: the defaults are its Table 8
    torchrun --nproc-per-node 4 save.py --algo rloo           # the same with RLOO, as in its Table 2

Algorithm 2, step t of T                             here                     lines    equations
    1  threshold mu(t)                               curriculum_threshold     2        14
    2  G responses for each of P prompts             sample, rollout          3-5
    3  R(x,y) and V(x) from one forward              score_batch              7        a = R - V, 13
    4  keep |a| large enough, split by sign          label, partition         8-11     15-17
    5  contrastive loss -> backbone, reward head     reward_model_step        13       18-20
    6  score the same responses again                score_batch
    7  value head towards the group mean             value_step               14       21
    8  filter again with the improved RM             label, partition         15-16
    9  GRPO | RLOO | GSPO on the survivors           policy_step              17

Symbols                                              Shapes
    pi_theta       the policy        `policy`        P   prompts of a step, all ranks together
    R_omega,phi    the reward        `rewards` (P,G)     G   responses per prompt (`group`)
    V_omega,psi    the value anchor  `values` (P,)       N   rows = P*G, T tokens, H hidden size
    Y+, Y-, B~     `positive`, `negative` (P,G), `valid` (P,)

To fork it: a loss is a row of RM_UPDATES, an advantage a row of ALGORITHMS, a judge takes the place of `label`; also
from a file that imports this one (tests/forks/). Every rank works on its own prompts (RANK::WORLD) but sees the (P,G)
numbers of all, so a loss over groups, its denominators and every logged mean are computed once, over all ranks.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import gzip
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Callable, NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          DynamicCache)

# ---- 1. configuration -----------------------------------------------------------------------------------------------

class UsageError(Exception):
    """Bad input. Printed as one line, exit code 2, before anything is written."""

def fail(message):
    """Stop with one clear line: name the flag, the file and the row, and say what was expected."""
    raise UsageError(" ".join(str(message).split()))

@dataclasses.dataclass
class Config:
    """Every knob, as a flag of the same name. "Table 8" marks the paper's value."""
    # what to run, on what
    stage: str = ""                  # preference, value or save; empty: value (if the RM has no value head), then save
    algo: str = "grpo"               # how the policy learns, a row of ALGORITHMS
    rm_update: str = "save"          # how the reward model learns, a row of RM_UPDATES
    policy: str = "Qwen/Qwen3-4B-Instruct-2507"                           # folder or hub name, causal LM
    rm: str = "Skywork/Skywork-Reward-V2-Llama-3.2-3B"                    # the same, sequence classifier, 1 label
    prompts: str = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"    # .json(l)(.gz), .parquet or hub name[:split]
    pairs: str = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"      # the same, with chosen and rejected
    heldout: list = dataclasses.field(default_factory=list)               # pair files to log the RM's accuracy on
    out: str = "out"                 # folder for rm/, policy/, metrics.jsonl, samples.jsonl, checkpoints/
    # the method
    steps: int = None                # T; none: 320 (Table 8), or one pass over the pairs in stage preference
    batch: int = 32                  # prompts (or pairs) per step over all ranks (Table 8)
    group: int = 16                  # G responses per prompt (Table 8)
    m0: float = 0.5                  # initial margin of the curriculum, Eq. 14 (Table 8); 0: no curriculum, all are kept
    kl_coef: float = 0.04            # beta, KL to the initial policy (Table 8)
    lr_rm: float = None              # backbone and reward head; none: 1e-7 (Table 8), 1e-5 in stage preference
    lr_value: float = 1e-5           # value head during SAVE (Table 8)
    lr_policy: float = 2e-6          # policy (Table 8); 0: its responses are fresh, but it stays as it is
    value_k: int = 16                # K responses per prompt in stage value (Table 8)
    value_lr: float = 2e-4           # value head in stage value (Table 8)
    value_batch: int = 32            # prompts per value-head step in stage value (Table 8)
    value_epochs: int = 1            # passes in stage value (Table 8)
    value_prompts: int = 0           # prompts used in stage value; 0: as many as SAVE will use, steps * batch
    # sampling
    max_new_tokens: int = 1024       # longest response (Table 8); known responses of --prompts and --pairs too (F.1)
    temperature: float = 0.7         # Table 8; log-probs are taken at this temperature too
    top_p: float = 0.8               # Table 8
    top_k: int = 20                  # Table 8; 0: off
    # where the paper is silent
    num_minibatches: int = 1         # optimizer steps per rollout; 1: ratios are exactly 1 and GSPO equals GRPO
    clip_low: float = None           # none: that of the row of ALGORITHMS, 0.2 or 3e-4 (gspo)
    clip_high: float = None          # none: the same, 0.2 or 4e-4 (gspo)
    lr_schedule: str = "constant"    # constant or linear (to 0), for all learning rates of a stage
    max_prompt_tokens: int = 1024    # longest prompt, template included, in policy tokens
    # machine
    dtype: str = "auto"              # working copy (masters are fp32); auto: bfloat16 on GPUs, else float32
    device: str = "auto"             # auto: a GPU where there is one
    offload: bool = False            # keep masters and moments in host memory and step there, as ZeRO-offload does
    micro_tokens: int = None         # padded tokens per micro-batch; none: 8192 on a GPU, 2048 on a CPU
    cache_tokens: int = None         # rows decoded together x their full length; none: 155648 on a GPU; 0: all rows
    seed: int = 0                    # randomness is a function of (seed, purpose, step, row)
    save_every: int = 40             # steps between checkpoints, the last two are kept; 0: none
    eval_every: int = 0              # steps between accuracies on --heldout; 0: start and end only
    resume: bool = False             # continue from the newest checkpoint under --out, if there is one

    @property
    def on_gpu(self):
        """Whether the models are on a GPU (after `checked`)."""
        return self.device.startswith("cuda")

    def checked(self):
        """Refuse what cannot work, naming the flag to change; replace every "auto" and none by what will be used."""
        positive = ("steps", "batch", "group", "value_k", "value_batch", "value_epochs", "max_new_tokens",
                    "num_minibatches", "max_prompt_tokens", "temperature", "top_p")
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                fail(f"--{name} {value}: expected a finite number, 0 or more")
            if name in positive and value == 0 or name in ("top_p", "m0") and value > 1:
                fail(f"--{name} {value}: expected {'more than 0' if value == 0 else 'at most 1'}")
        if self.batch % WORLD or self.batch // WORLD % self.num_minibatches:
            fail(f"--batch {self.batch}: expected a multiple of ranks ({WORLD}) x --num_minibatches "
                 f"({self.num_minibatches})")
        if self.group < 2 and self.stage in ("", "save"):
            fail(f"--group {self.group}: expected 2 or more, a group is compared with itself")
        if self.device == "cuda" and not torch.cuda.is_available():
            fail("--device cuda: no GPU is to be had here, expected cpu or auto")
        gpu = self.device != "cpu" and torch.cuda.is_available()
        low, high = ALGORITHMS[self.algo].clip
        used = {"device": f"cuda:{LOCAL_RANK}" if gpu else "cpu", "dtype": "bfloat16" if gpu else "float32",
                "micro_tokens": 8192 if gpu else 2048, "cache_tokens": 155648 if gpu else 0,
                "clip_low": low, "clip_high": high, "lr_rm": 1e-5 if self.stage == "preference" else 1e-7}
        if self.stage != "preference":
            used["steps"] = 320
        return dataclasses.replace(self, **{name: value for name, value in used.items()
                                            if getattr(self, name) in (None, "auto", "cuda")})

def parse_config(argv=None, kind=Config):
    """Flags from a dataclass: name, type and default of each field; the comment behind it is the help text."""
    choices = {"stage": ["preference", "value", "save"], "algo": list(ALGORITHMS), "rm_update": list(RM_UPDATES),
               "lr_schedule": ["constant", "linear"], "dtype": ["auto", "float32", "bfloat16"],
               "device": ["auto", "cpu", "cuda"]}
    parser = argparse.ArgumentParser(description=kind.__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(message + " (--help lists the flags)")
    source = "".join(inspect.getsource(part) for part in reversed(kind.__mro__[:-1]))  # a fork may add flags
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.M))
    for field in dataclasses.fields(kind):
        default = "none" if field.default in (None, "", dataclasses.MISSING) else field.default
        options = {"help": f"{comments[field.name]} [{default}]", "default": argparse.SUPPRESS}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=str if field.type is list else field.type, nargs="+" if field.type is list else None,
                           choices=choices.get(field.name), metavar=None if field.name in choices else
                           field.type.__name__)
        parser.add_argument("--" + field.name, **options)
    return kind(**vars(parser.parse_args(argv)))

# ---- 2. the maths of the reward model: pure functions of tensors ----------------------------------------------------
def at_least_fp32(x):
    """Losses are taken in fp32 or better."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

def masked_mean(x, mask, dim=None):
    """Mean of x where mask, 0 where nothing is; what the mask hides may be anything, inf and nan too."""
    dims = tuple(range(x.dim())) if dim is None else dim
    return torch.where(mask, x, 0).sum(dims) / mask.sum(dims).clamp(min=1)

def curriculum_threshold(step, total_steps, m0):
    """Eq. 14: mu(t) = (2 - p) / 2 with p = min(1 - m0 + t/T, 1); t counts from 1."""
    return (2 - min(1 - m0 + step / total_steps, 1)) / 2

def rm_advantages(rewards, values):
    """Eq. 13: a = R - V. rewards (P,G), values (P,) -> (P,G)."""
    return rewards - values[:, None]

def partition(advantages, threshold, usable=None):
    """Eq. 15-17. advantages (P,G) -> positive (P,G), negative (P,G), valid (P,), all bool.

    Kept are rows with sigmoid(|a|) >= threshold (and `usable`); a = 0 counts as positive; a prompt is valid (in B~)
    if it has both signs. Taken in fp64, where sigmoid(0) is exactly 1/2 and no |a| below 36 saturates.
    """
    keep = torch.sigmoid(advantages.double().abs()) >= threshold
    if usable is not None:
        keep = keep & usable
    positive, negative = keep & (advantages >= 0), keep & (advantages < 0)
    return positive, negative, positive.any(1) & negative.any(1)

def bradley_terry_loss(chosen, rejected):
    """Eq. 2 and 11: mean of -log sigmoid(R_w - R_l) over pairs. chosen, rejected (n,)."""
    return -F.logsigmoid(at_least_fp32(chosen) - at_least_fp32(rejected)).mean()

def contrastive_loss(rewards, values, positive, negative, usable=None):
    """Eq. 18-20, mean over valid prompts, 0 if there is none. rewards, masks (P,G); values (P,), no gradient to them.

    L+ = log(e^V + sum_{Y+} e^R) - mean_{Y+} R        dL+/dR = e^R / (e^V + sum_{Y+} e^R) - 1/|Y+|
    L- = log(e^V + sum_{Y-} e^R) - V                  dL-/dR = e^R / (e^V + sum_{Y-} e^R)
    `usable` is what every loss of RM_UPDATES is given; here Y+ and Y- are within it already.
    """
    rewards, anchor = at_least_fp32(rewards), at_least_fp32(values.detach())

    def log_sum(mask):
        return torch.cat([anchor[:, None], rewards.masked_fill(~mask, -math.inf)], 1).logsumexp(1)

    loss = log_sum(positive) - masked_mean(rewards, positive, 1) + log_sum(negative) - anchor
    return masked_mean(loss, positive.any(1) & negative.any(1))

def value_loss(values, rewards, usable=None):
    """Eq. 12 and 21: mean of (V - mean_G R)^2 over prompts; the target carries no gradient.

    values (P,), rewards (P,G). With `usable` (P,G) the group mean is over usable rows, and prompts without any are
    left out of the outer mean.
    """
    usable = torch.ones_like(rewards, dtype=torch.bool) if usable is None else usable
    target = masked_mean(at_least_fp32(rewards.detach()), usable, 1)
    return masked_mean((at_least_fp32(values) - target) ** 2, usable.any(1))

class RMUpdate(NamedTuple):
    """A row of RM_UPDATES: how the reward model learns from the rewards of a batch."""
    loss: Callable | None            # loss(rewards, values, positive, negative, usable) -> scalar; none: it stays frozen
    anchor: str                      # what V is: "value head" | "group mean" | "" (none: nothing is filtered)

RM_UPDATES = {
    "save": RMUpdate(contrastive_loss, "value head"),
    "mean_reward": RMUpdate(contrastive_loss, "group mean"),  # a baseline of the paper's Table 1
    "none": RMUpdate(None, ""),                               # plain RL with a frozen reward model
}

# ---- 3. the maths of the policy: pure functions of tensors ----------------------------------------------------------
def grpo_advantages(rewards, keep):
    """(r - mean) / (std + 1e-4) over the kept rows of each group. rewards, keep (P,G) -> (P,G).

    std with Bessel's correction. 0 where not kept, and in groups with fewer than two kept rows or with equal rewards:
    fp64 because the fp32 mean of equal numbers may differ from them, which 1e-4 would blow up to an advantage of 0.01.
    """
    dtype, rewards = rewards.dtype, rewards.double()
    count = keep.sum(1, keepdim=True)
    centred = rewards - masked_mean(rewards, keep, 1)[:, None]
    variance = torch.where(keep, centred ** 2, 0).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return torch.where(keep & (count > 1), centred / (variance.sqrt() + 1e-4), 0).to(dtype)

def rloo_advantages(rewards, keep):
    """r minus the mean of the other kept rows of its group. rewards, keep (P,G) -> (P,G); 0 as in grpo_advantages."""
    dtype, rewards = rewards.dtype, rewards.double()
    count = keep.sum(1, keepdim=True)
    others = torch.where(keep, rewards, 0).sum(1, keepdim=True) - rewards
    return torch.where(keep & (count > 1), rewards - others / (count - 1).clamp(min=1), 0).to(dtype)

class Algorithm(NamedTuple):
    """A row of ALGORITHMS: how the policy learns from the rewards of the survivors."""
    advantages: Callable             # advantages(rewards, keep) -> (P,G)
    ratio: str                       # log-ratio of a row: "token" by token | "mean" over its tokens | their "sum"
    kl: str                          # "loss": k3 per token in the loss | "reward": k1 of the response in its reward
    clip: tuple                      # (low, high) unless --clip_low and --clip_high say otherwise

ALGORITHMS = {
    "grpo": Algorithm(grpo_advantages, "token", "loss", (0.2, 0.2)),
    "rloo": Algorithm(rloo_advantages, "sum", "reward", (0.2, 0.2)),
    "gspo": Algorithm(grpo_advantages, "mean", "loss", (3e-4, 4e-4)),  # grpo while all ratios are 1
}

def policy_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, *, algo, clip_low, clip_high, kl_coef):
    """Clipped surrogate, mean over a row's tokens, then over rows with any. Log-probs and mask (N,T), advantages (N,)
    or (N,T); `algo` is a row of ALGORITHMS.

    With algo.kl "loss", kl_coef * k3 is added per token, k3 = exp(ref - lp) - (ref - lp) - 1.
    Returns (loss, {"kl": k3 per token, "clipped": share of tokens whose ratio is clipped}).
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, at_least_fp32(log_probs) - at_least_fp32(old_log_probs.detach()), 0)
    of_row = log_ratio.sum(1, keepdim=True)
    log_ratio = {"token": log_ratio, "mean": of_row / mask.sum(1, keepdim=True).clamp(min=1), "sum": of_row}[algo.ratio]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    advantages = torch.where(mask, advantages, 0)
    ratio = log_ratio.clamp(max=20).exp()  # beyond any clip; inf times a zero advantage would be nan
    free, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    per_token = -torch.minimum(free, clipped)
    # a masked 0 - 0 = 0 keeps whatever the padding holds out of exp
    gap = torch.where(mask, at_least_fp32(ref_log_probs.detach()) - at_least_fp32(log_probs), 0)
    k3 = gap.exp() - gap - 1
    if {"loss": True, "reward": False}[algo.kl]:
        per_token = per_token + kl_coef * k3
    rows = mask.any(1)
    stats = {"kl": masked_mean(masked_mean(k3.detach(), mask, 1), rows),
             "clipped": masked_mean(masked_mean((clipped < free).float(), mask, 1), rows)}
    return masked_mean(masked_mean(per_token, mask, 1), rows), stats

# ---- 4. the two models ----------------------------------------------------------------------------------------------
class RewardModel(nn.Module):
    """A stock sequence classifier with one label, plus the value head V(x) on the same causal pass (section 4.1).

    `model.base_model` is f_omega, `model.score` h_phi, `value_head` v_psi. Both heads are fp32 and read
    hidden.float(), so that bf16 does not put rewards on a coarse grid with ties.
    """

    def __init__(self, model, tokenizer, value_head=None):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.model.score.float()
        self.has_value_head = value_head is not None
        self.value_head = nn.Linear(model.score.in_features, 1)
        weights = value_head or {name: torch.zeros_like(p) for name, p in self.value_head.named_parameters()}
        self.value_head.load_state_dict(weights)
        remove_dropout(self)
        self.eval()

    @classmethod
    def from_pretrained(cls, path, new_head=False, seed=0):
        """Load a folder or hub name in the checkpoint's own precision; `new_head`: a causal LM will do."""
        tokenizer, config = load_tokenizer(path, "rm"), load(path, "rm", AutoConfig)
        is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
        if not is_classifier and not new_head:
            fail(f"--rm {path}: {config.architectures} has no reward head, expected a sequence classifier with 1 label "
                 "(--stage preference makes one of a causal language model)")
        if is_classifier and config.num_labels != 1:
            fail(f"--rm {path}: it has {config.num_labels} labels, expected a reward model with 1")
        model = load(path, "rm", AutoModelForSequenceClassification, num_labels=1, dtype="auto",
                     may_miss=() if is_classifier else ("score.weight",))
        if not isinstance(getattr(model, "score", None), nn.Linear):
            fail(f"--rm {path}: {type(model).__name__} is no causal model with a linear `score` head, expected one: "
                 "V is read at the end of the prompt in the same causal pass")
        if not is_classifier:
            noise = torch.randn(model.score.weight.shape, generator=generator(seed, "reward head"))
            model.score.weight.data = noise / (model.score.in_features + 1) ** 0.5
        encode_responses(tokenizer, [{"role": "user", "content": "a"}], ["b"])
        head = Path(path) / "value_head.safetensors"
        return cls(model, tokenizer, safetensors.torch.load_file(head) if head.is_file() else None)

    def features(self, input_ids, lengths, prompt_lengths):
        """Hidden states (N,H), fp32, at the last real token (for R) and at the last prompt token (for V)."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return hidden[rows, lengths - 1].float(), hidden[rows, prompt_lengths - 1].float()

    def reward(self, features):
        """R from the features at the last token."""
        return self.model.score(features).squeeze(-1)

    def value(self, features):
        """V from the features at the end of the prompt, which get no gradient: SG[omega] of Eq. 21."""
        return self.value_head(features.detach()).squeeze(-1)

    def forward(self, input_ids, lengths, prompt_lengths):
        """input_ids (N,T) right-padded, lengths and prompt_lengths (N,) -> rewards (N,), values (N,)."""
        last, prompt = self.features(input_ids, lengths, prompt_lengths)
        return self.reward(last), self.value(prompt)

    def save_pretrained(self, path, masters=None):
        """A stock AutoModelForSequenceClassification folder in fp32 plus value_head.safetensors, written atomically.

        `masters`: fp32 weights by name, where the working copy has less precision.
        """
        state = {name: (masters or {}).get(name, x).detach().cpu() for name, x in self.model.state_dict().items()}
        state = {name: x.float() if x.is_floating_point() else x for name, x in state.items()}
        config, tokenizer = copy.deepcopy(self.model.config), copy.deepcopy(self.tokenizer)
        # stock pooling reads the last token that is not the pad id: the pad id must never end a rendered chat
        chat = encode_chat(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}])
        if config.pad_token_id in (None, chat[-1]):
            config.pad_token_id = next(i for i in (tokenizer.bos_token_id, tokenizer.unk_token_id, 0, 1)
                                       if i not in (None, chat[-1]))
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        config.dtype = torch.float32
        with torch.device("meta"):
            stock = type(self.model)(config)
        stock.load_state_dict(state, assign=True)
        with replaced_folder(path) as folder:
            write_model(folder, stock, tokenizer)
            if self.has_value_head:  # weight (1,H) and bias (1,), fp32
                head = {name: p.detach().cpu().contiguous() for name, p in self.value_head.state_dict().items()}
                safetensors.torch.save_file(head, folder / "value_head.safetensors")

class Policy(nn.Module):
    """A causal language model whose forward gives the log-probs of its responses, never the whole logits."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        eos = model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        self.eos_ids = sorted({i for i in (*eos, tokenizer.eos_token_id) if i is not None})
        remove_dropout(self)
        self.eval()

    @classmethod
    def from_pretrained(cls, path):
        """Load a folder or hub name in the checkpoint's own precision."""
        names = load(path, "policy", AutoConfig).architectures or []
        if any("SequenceClassification" in name for name in names):
            fail(f"--policy {path}: {names} has no output layer, expected a causal language model")
        policy = cls(load(path, "policy", AutoModelForCausalLM, dtype="auto"), load_tokenizer(path, "policy"))
        return policy if policy.eos_ids else fail(f"--policy {path}: expected an EOS token in its tokenizer")

    def logits(self, hidden):
        """The output layer alone, fp32: hidden (...,H) -> (...,vocabulary)."""
        return self.model.get_output_embeddings()(hidden).float()

    @torch.no_grad()
    def check_logits(self, path):
        """Compare `logits` with the model's own forward: a scaling behind the output layer would spoil every ratio."""
        ids = torch.arange(3, 11, device=next(self.parameters()).device)[None] % self.model.config.vocab_size
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if not torch.allclose(self.logits(hidden), self.model(ids).logits.float(), rtol=1e-2, atol=1e-2):
            fail(f"--policy {path}: {type(self.model).__name__} changes its logits after the output layer (a scale or "
                 "a soft cap, as Cohere, Granite and Gemma 2 have), expected a plain one: Policy.logits is the place")

    def token_log_probs(self, hidden, targets, temperature):
        """log pi(target) at the sampling temperature over the full vocabulary. hidden (M,H), targets (M,) -> (M,)."""
        return -F.cross_entropy(self.logits(hidden) / temperature, targets, reduction="none")

    def forward(self, input_ids, lengths, prompt_lengths, temperature, chunk=512):
        """input_ids (n,T) right-padded prompt + response -> log_probs (n,R) and mask (n,R) of the response tokens.

        The vocabulary is only ever expanded for `chunk` tokens at a time, in the backward pass too.
        """
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        counts = lengths - prompt_lengths
        mask = torch.arange(int(counts.max()), device=input_ids.device) < counts[:, None]
        rows, offsets = mask.nonzero(as_tuple=True)
        position = prompt_lengths[rows] + offsets
        hidden, targets = hidden[rows, position - 1], input_ids[rows, position]  # the state before a token predicts it
        pieces = [checkpoint(self.token_log_probs, h, t, temperature, use_reentrant=False)
                  for h, t in zip(hidden.split(chunk), targets.split(chunk))]
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(pieces)), mask

def load(path, flag, kind, may_miss=(), **options):
    """kind.from_pretrained(path), or one line that says why not; no code of a model's repository is run."""
    parent = Path(path).parent
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or (parent.parts and parent.is_dir())):
        fail(f"--{flag} {path}: no such folder")
    is_model = kind in (AutoModelForCausalLM, AutoModelForSequenceClassification)
    try:
        options = {**options, "output_loading_info": True} if is_model else options
        loaded = kind.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # transformers and the hub client raise many types: all mean that it cannot be had
        fail(f"--{flag} {path}: expected a model folder or hub name for {kind.__name__} ({first_line(error)})")
    if not is_model:
        return loaded
    missing = sorted(set(loaded[1]["missing_keys"]) - set(may_miss))
    return loaded[0] if not missing else fail(f"--{flag} {path}: it has no weights for {', '.join(missing)[:80]}")

def load_tokenizer(path, flag):
    """The tokenizer of a model folder or hub name; it must carry a chat template."""
    tokenizer = load(path, flag, AutoTokenizer)
    return tokenizer if tokenizer.chat_template else fail(f"--{flag} {path}: its tokenizer has no chat template")

def remove_dropout(model):
    """Set every dropout rate to 0: two passes over the same rows must give the same numbers."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (isinstance(module, nn.Dropout) and name == "p")):
                setattr(module, name, 0.0)

def to_working_copy(module, cfg):
    """Move to the device, parameters in --dtype. Buffers keep theirs: rotary frequencies in bf16 would be wrong.

    Call after ShardedAdamW took its masters. The two fp32 heads of a reward model stay as they are. On a GPU,
    activations are recomputed in the backward pass.
    """
    heads = {id(p) for head in ("value_head", "model.score") if isinstance(module, RewardModel)
             for p in module.get_submodule(head).parameters()}
    for p in module.parameters():
        p.data = p.data.to(cfg.device, p.dtype if id(p) in heads else getattr(torch, cfg.dtype))
    if cfg.device.startswith("cuda"):
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return module.to(cfg.device)

# ---- 5. rollout -----------------------------------------------------------------------------------------------------
def sample_tokens(logits, uniforms, temperature, top_p, top_k):
    """One token per row by inverting the cumulative distribution at `uniforms` (n,). logits (n,V) -> ids (n,).

    Order as in transformers: temperature, top-k, top-p over what is left. Top-k first means 20 numbers are sorted
    instead of the vocabulary. Temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if top_k or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    else:
        ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    probs = (logits.double() / temperature).softmax(-1)
    probs = torch.where(probs.cumsum(-1) - probs < top_p, probs, 0)  # the smallest set that reaches top_p
    cumulative = probs.cumsum(-1)
    pick = torch.searchsorted(cumulative, uniforms[:, None].double() * cumulative[:, -1:], right=True)
    return ids.gather(1, pick)[:, 0]

@torch.no_grad()
def rollout(policy, prompt_ids, group, seeds, *, max_new_tokens, temperature, top_p, top_k, cache_tokens=0):
    """`group` responses for each of P prompts -> P*group token lists (EOS included) and whether each one ended.

    prompt_ids: P token lists; seeds: P*group ints, one for each row, so that a response depends on its own seed and
    not on what else is in the batch; cache_tokens: decode in waves of prompts whose cache holds at most so many tokens
    (at least one prompt; 0: one wave).
    """
    responses, ended = [None] * len(seeds), [None] * len(seeds)
    caches = [(range(group * (len(ids) + max_new_tokens)), 0) for ids in prompt_ids]
    for wave in micro_batches(range(len(prompt_ids)), caches, cache_tokens or sys.maxsize):
        rows = [prompt * group + g for prompt in wave for g in range(group)]
        tokens, done = decode(policy, [prompt_ids[prompt] for prompt in wave], group, [seeds[row] for row in rows],
                              max_new_tokens, temperature, top_p, top_k)
        for row, ids, end in zip(rows, tokens.tolist(), done.tolist()):
            responses[row], ended[row] = [token for token in ids if token >= 0], end
    return responses, ended

def decode(policy, prompt_ids, group, seeds, max_new_tokens, *sampling):
    """One wave: prefill each prompt once, then decode all rows. -> tokens (n,R), -1 after the end; ended (n,)."""
    model, device = policy.model, next(policy.parameters()).device
    lengths = torch.tensor([len(ids) for ids in prompt_ids], device=device)
    width = int(lengths.max())
    ids = torch.zeros(len(prompt_ids), width, dtype=torch.long)
    for i, prompt in enumerate(prompt_ids):  # left-padded: every row's next token goes into the same column
        ids[i, width - len(prompt):] = torch.tensor(prompt)
    mask = torch.arange(width + max_new_tokens, device=device) >= width - lengths[:, None]
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=ids.to(device), attention_mask=mask[:, :width].long(), past_key_values=cache,
                   position_ids=(mask[:, :width].cumsum(1) - 1).clamp(min=0), logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(group)
    logits, mask, position = (x.repeat_interleave(group, 0) for x in (logits, mask, lengths))

    uniforms = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed))
                            for seed in seeds]).to(device)
    stop_ids = torch.tensor(policy.eos_ids, device=device)
    tokens = torch.full((len(seeds), max_new_tokens), -1, device=device)
    ended = torch.zeros(len(seeds), dtype=torch.bool, device=device)
    rows = torch.arange(len(seeds), device=device)  # the rows still in the batch
    for t in progress(range(max_new_tokens), "rollout", leave=False, delay=10):
        token = sample_tokens(logits, uniforms[rows, t], *sampling)
        tokens[rows, t] = torch.where(ended[rows], -1, token)
        ended[rows] |= torch.isin(token, stop_ids)
        running = (~ended[rows]).nonzero()[:, 0]
        if len(running) == 0 or t == max_new_tokens - 1:
            break
        if len(running) <= len(rows) * 7 // 8:  # dropping copies the cache, so not for every single row
            cache.batch_select_indices(running)
            rows, token, mask, position = rows[running], token[running], mask[running], position[running]
        logits = model(input_ids=token[:, None], attention_mask=mask[:, :width + t + 1].long(), past_key_values=cache,
                       position_ids=position[:, None], logits_to_keep=1).logits[:, -1]
        position = position + 1
    return tokens, ended

# ---- 6. the updates of Algorithm 2 ----------------------------------------------------------------------------------
@dataclasses.dataclass
class Run:
    """What a stage works with, and what a checkpoint holds."""
    cfg: Config
    rm: RewardModel
    policy: Policy = None
    log: "Log" = None
    optimizers: dict = dataclasses.field(default_factory=dict)  # of "rm", "value" and "policy" those that are trained
    checkpoint: Path = None          # to resume from

    def lr_scale(self, step):
        """Learning-rate factor of step 1 .. T."""
        return 1 - (step - 1) / self.cfg.steps if self.cfg.lr_schedule == "linear" else 1.0

@dataclasses.dataclass
class Batch:
    """One step's responses. (P,G) tensors cover all ranks; lists cover this rank's rows, prompt by prompt."""
    step: int
    prompts: list                    # (messages, policy ids) of this rank's prompts
    texts: list                      # responses, decoded
    chats: list                      # (ids, prompt_length) of prompt and response in the reward model's tokens
    sequences: list                  # the same in the policy's tokens
    lengths: torch.Tensor            # (P,G) response tokens
    ended: torch.Tensor              # (P,G) bool: stopped by EOS, not by --max_new_tokens
    usable: torch.Tensor             # (P,G) bool: ended, and short enough for the reward model's update
    rewards: torch.Tensor = None     # (P,G)
    features: torch.Tensor = None    # (P,H) at the end of the prompt, for V

def sample(run, prompts, group, step, purpose="rollout"):
    """Draw `group` responses for each of this rank's share of `prompts` and put them into the reward model's words."""
    cfg, own = run.cfg, mine(prompts)
    seeds = [seed_for(cfg.seed, purpose, step, p, g) for p in mine(range(len(prompts))) for g in range(group)]
    with run.log.time("rollout"):
        responses, ended = rollout(run.policy, [ids for _, ids in own], group, seeds, top_p=cfg.top_p, top_k=cfg.top_k,
                                   temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens,
                                   cache_tokens=cfg.cache_tokens)
    texts = run.policy.tokenizer.batch_decode(responses, skip_special_tokens=True)
    # the policy's tokens mean nothing to the reward model: decode, apply its template, tokenize with its tokenizer
    chats = [chat for i, (messages, _) in enumerate(own)
             for chat in encode_responses(run.rm.tokenizer, messages, texts[i * group:(i + 1) * group])]
    sequences = [(own[i // group][1] + response, len(own[i // group][1])) for i, response in enumerate(responses)]
    short = [len(ids) - length <= cfg.max_new_tokens + 32 for ids, length in chats]  # 32: the template's own tokens
    context = getattr(run.rm.model.config, "max_position_embeddings", None) or sys.maxsize
    chats = [(ids[:context], min(length, context)) for ids, length in chats]

    def table(values):
        return gather(torch.tensor(values, device=cfg.device).view(len(own), group))

    ended = table(ended)
    lengths = table([len(ids) for ids in responses])
    return Batch(step, own, texts, chats, sequences, lengths, ended, usable=ended & table(short))

@torch.no_grad()
def score(rm, sequences, budget):
    """sequences [(ids, prompt_length)] -> rewards (N,) and prompt features (N,H) for V, without gradients.

    Equal sequences are scored once: rounding, which differs between batches, must not rank equal responses.
    """
    device, count, first = rm.value_head.weight.device, len(sequences), {}
    same = [first.setdefault((tuple(ids), length), row) for row, (ids, length) in enumerate(sequences)]
    rewards, features = torch.empty(count, device=device), torch.empty(count, rm.value_head.in_features, device=device)
    for rows in progress(micro_batches(first.values(), sequences, budget), "score", leave=False, delay=10):
        last, prompt = rm.features(*model_inputs([sequences[row] for row in rows], device))
        rewards[rows], features[rows] = rm.reward(last), prompt
    return rewards[same], features[same]

def score_batch(run, batch):
    """Fill in R and the features that V is read from, for all ranks."""
    with run.log.time("score"):
        rewards, features = score(run.rm, batch.chats, run.cfg.micro_tokens)
        group = batch.lengths.shape[1]
        batch.rewards = gather(rewards.view(-1, group))
        if not batch.rewards.isfinite().all():  # on every rank at once
            raise FloatingPointError(f"{int((~batch.rewards.isfinite()).sum())} rewards are not finite")
        batch.features = gather(features.view(-1, group, features.shape[1])[:, 0])  # one V a prompt: its first row's

@torch.no_grad()
def anchor(run, batch):
    """V (P,), as the row of RM_UPDATES has it; for a row without an anchor the group mean, which only the logs show."""
    return run.rm.value(batch.features) if RM_UPDATES[run.cfg.rm_update].anchor == "value head" \
        else masked_mean(batch.rewards, batch.usable, 1)

def label(run, batch):
    """(P,G): their signs make Y+ and Y-, their sizes decide which are kept. Eq. 13 with the reward model's own R and V.

    A verifier, a judge or an ensemble goes here: -inf and inf are always kept (tests/forks/verifier.py).
    """
    return rm_advantages(batch.rewards, anchor(run, batch))

def filtered(run, batch, usable=None):
    """Step 1, Eq. 14-17: positive, negative (P,G), valid (P,). Updates without an anchor keep every response."""
    if not RM_UPDATES[run.cfg.rm_update].anchor:
        everything = torch.ones_like(batch.ended) if usable is None else usable
        return everything, torch.zeros_like(everything), everything.any(1)
    return partition(label(run, batch), curriculum_threshold(batch.step, run.cfg.steps, run.cfg.m0), usable)

def reward_model_step(run, batch, positive, negative):
    """Step 2, Eq. 18-20: one step on backbone and reward head. True if there was anything to learn from.

    The loss needs all rewards of a group at once, memory holds only a few rows. But the scoring pass already has the
    rewards: take dL/dR on those (P,G) numbers, then back-propagate sum(R * dL/dR) in any micro-batches. Exact, and rows
    whose dL/dR is 0 (filtered, one-sided prompts) cost nothing.
    """
    rewards = batch.rewards.clone().requires_grad_()
    loss = RM_UPDATES[run.cfg.rm_update].loss(rewards, anchor(run, batch), positive, negative, batch.usable)
    weights = torch.autograd.grad(loss, rewards)[0]
    run.log.put(rm_loss=loss)
    if not weights.any():
        return False
    own = mine(weights).flatten()
    rows = own.nonzero()[:, 0].tolist() or [0]  # a rank with nothing to train on takes part with weight 0

    def micro_loss(model, rows):
        return (model(*model_inputs([batch.chats[row] for row in rows], own.device))[0] * own[rows]).sum()

    with run.log.time("rm_update"), frozen(run.rm.value_head):
        accumulate(run.rm, micro_batches(rows, batch.chats, run.cfg.micro_tokens), micro_loss)
        run.log.put(rm_grad_norm=run.optimizers["rm"].step(run.lr_scale(batch.step)))
    return True

def value_step(run, rewards, features, usable, lr_scale=1.0):
    """Eq. 12 and 21: one step on the value head, from features that carry no gradient. Returns the loss before it.

    Every rank has all (P,H) features and takes the same step, so there is nothing to exchange.
    """
    loss = value_loss(run.rm.value(features), rewards, usable)
    loss.backward()
    run.optimizers["value"].step(lr_scale)
    return loss.item()

@torch.no_grad()
def response_log_probs(run, batch, rows):
    """Log-probs of this rank's `rows` under the working copy -> (N/W, R), 0 elsewhere."""
    result = torch.zeros(len(batch.sequences), int(batch.lengths.max()), device=run.cfg.device)
    for part in micro_batches(rows, batch.sequences, run.cfg.micro_tokens):
        inputs = model_inputs([batch.sequences[row] for row in part], run.cfg.device)
        log_probs, _ = run.policy(*inputs, run.cfg.temperature)
        result[part, :log_probs.shape[1]] = log_probs
    return result

def policy_advantages(run, batch, trained, old, reference):
    """The advantages of this rank's rows, (N/W,), or (N/W,R) for one per token; over the rows that are `trained` (P,G).

    With a row's kl "reward", k1 of the whole response is taken off its reward.
    """
    algorithm, rewards = ALGORITHMS[run.cfg.algo], batch.rewards
    if algorithm.kl == "reward" and run.cfg.kl_coef:
        rewards = rewards - run.cfg.kl_coef * gather((old - reference).sum(1).view(-1, trained.shape[1]))
    return mine(algorithm.advantages(rewards, trained)).flatten()

def policy_step(run, batch, keep):
    """Step 3: GRPO, RLOO or GSPO on the survivors `keep` (P,G) with the improved reward model's rewards."""
    cfg, algorithm, group = run.cfg, ALGORITHMS[run.cfg.algo], keep.shape[1]
    trained = keep & (keep.sum(1, keepdim=True) >= 2)  # a single survivor has nothing to be compared with
    if not trained.any():
        return
    rows = mine(trained).flatten().nonzero()[:, 0].tolist()
    old = reference = None
    with run.log.time("log_probs"):
        if cfg.num_minibatches > 1 or algorithm.kl == "reward":
            old = response_log_probs(run, batch, rows)
        if cfg.kl_coef:
            with run.optimizers["policy"].swapped():
                reference = response_log_probs(run, batch, rows)
    advantages = policy_advantages(run, batch, trained, old, reference)
    sums, updates = torch.zeros(3), 0

    def micro_loss(model, rows):
        log_probs, mask = model(*model_inputs([batch.sequences[row] for row in rows], cfg.device), cfg.temperature)
        width = log_probs.shape[1]
        # a single update: the ratio is exactly 1, where a second bf16 pass would put noise into it
        before = log_probs if cfg.num_minibatches == 1 else old[rows, :width]
        loss, stats = policy_loss(
            log_probs, before, log_probs if reference is None else reference[rows, :width],
            advantages[rows] if advantages.dim() == 1 else advantages[rows, :width], mask,
            algo=algorithm, clip_low=cfg.clip_low, clip_high=cfg.clip_high, kl_coef=cfg.kl_coef)
        weight = len(rows) / count if part_rows else 0  # 0 for a rank that only takes part
        sums.add_(torch.tensor([loss.item(), stats["kl"].item(), stats["clipped"].item()]) * weight)
        return loss * weight

    with run.log.time("policy_update"):
        for part in torch.arange(len(keep)).chunk(cfg.num_minibatches):  # by prompt, in the global order
            count = int(trained[part].sum())  # rows of this minibatch on all ranks, the mean's denominator
            if count == 0:
                continue
            part_rows = [row for row in rows if RANK + WORLD * (row // group) in part]
            accumulate(run.policy, micro_batches(part_rows or [0], batch.sequences, cfg.micro_tokens), micro_loss)
            run.log.put(policy_grad_norm=run.optimizers["policy"].step(run.lr_scale(batch.step)))
            updates += 1
    loss, kl, clipped = (x / updates for x in total(*sums))
    run.log.put(policy_loss=loss, kl=kl, clipped=clipped, survivors=trained.float().mean())

def save_step(run, step, prompts):
    """One step of Algorithm 2 on this step's `prompts`, those of all ranks."""
    batch = sample(run, prompts, run.cfg.group, step)  # lines 3 to 5
    with stops_at_bad_values(run, step, lambda: rows_of(batch)):
        learn(run, batch)

def learn(run, batch):
    """Algorithm 2, lines 7 to 17: what is learned from the responses of one step."""
    log, update = run.log, RM_UPDATES[run.cfg.rm_update]
    score_batch(run, batch)
    positive, negative, valid = filtered(run, batch, batch.usable)  # its step 1: adaptive feedback filtering
    record_scores(run, batch, positive, negative, valid)
    record_samples(run, batch, positive, negative)

    if update.loss:  # its step 2: the reward model
        before = batch.rewards
        if reward_model_step(run, batch, positive, negative):
            score_batch(run, batch)
            log.deflation *= (batch.rewards.std(1).mean() / before.std(1).mean()).item()
            log.put(reward_shift=(batch.rewards - before).abs().mean(), deflation=log.deflation)
    if update.anchor == "value head":
        log.put(value_loss=value_step(run, batch.rewards, batch.features, batch.usable, run.lr_scale(batch.step)))

    positive, negative, _ = filtered(run, batch)  # its step 3: the policy, which keeps truncated responses
    policy_step(run, batch, positive | negative)
    log.put(health=health(run))

# ---- 7. stages ------------------------------------------------------------------------------------------------------
def preference_stage(run, pairs, heldout):
    """Stage 1, Eq. 11: Bradley-Terry on chosen and rejected."""
    run.rm.has_value_head = False  # a value head it may have had belongs to other rewards
    for step in each_step(run, heldout, "preference"):
        bradley_terry_step(run, pairs, step)
    save_models(run)

def bradley_terry_step(run, pairs, step):
    """One step of Eq. 11 on this step's pairs, those of all ranks."""
    cfg = run.cfg
    batch = mine(draw(pairs, cfg.seed, "pairs", (step - 1) * cfg.batch, cfg.batch))
    longer, sums = [max(pair, key=lambda side: len(side[0])) for pair in batch], torch.zeros(2)

    def micro_loss(model, index):
        rewards = model(*model_inputs([side for i in index for side in batch[i]], cfg.device))[0]
        loss = bradley_terry_loss(rewards[0::2], rewards[1::2]) * len(index) / cfg.batch
        sums.add_(torch.tensor([loss.item(), (rewards[0::2] > rewards[1::2]).sum().item() / cfg.batch]))
        return loss

    with run.log.time("rm_update"), frozen(run.rm.value_head), stops_at_bad_values(
            run, step, lambda: [[run.rm.tokenizer.decode(ids) for ids, _ in pair] for pair in batch]):
        accumulate(run.rm, micro_batches(range(len(batch)), longer, cfg.micro_tokens // 2), micro_loss)
        run.log.put(rm_grad_norm=run.optimizers["rm"].step(run.lr_scale(step)))
    loss, accuracy = total(*sums)
    run.log.put(rm_loss=loss, rm_accuracy=accuracy)

def value_stage(run, prompts):
    """Stage 2, Eq. 12: fit V to the mean reward of K responses of the sampling policy; the reward model is frozen.

    Each prompt is sampled and scored once; rewards and features are kept, so further epochs cost nothing.
    """
    cfg, batches = run.cfg, []
    count = cfg.value_prompts or min(len(prompts), cfg.batch * cfg.steps)
    count = max(1, count // cfg.batch) * cfg.batch  # whole batches: every rank has the same number of prompts
    chosen = draw(prompts, cfg.seed, "value prompts", 0, count)
    for start in progress(range(0, count, cfg.batch), "value: sample and score"):
        batch = sample(run, chosen[start:start + cfg.batch], cfg.value_k, start, "value")
        with stops_at_bad_values(run, 0, lambda: rows_of(batch)):
            score_batch(run, batch)
        batches.append((batch.rewards, batch.features, batch.usable))
    rewards, features, usable = (torch.cat(tensors) for tensors in zip(*batches))
    run.optimizers["value"] = ShardedAdamW(run.rm.value_head, cfg.value_lr, cfg)
    for _ in range(cfg.value_epochs):
        for part in torch.arange(count).split(cfg.value_batch):
            value_step(run, rewards[part], features[part], usable[part])
    run.rm.has_value_head = True
    targets = masked_mean(rewards, usable, 1)
    error, variance = value_loss(run.rm.value(features), rewards, usable).item(), targets.var(correction=0).item()
    run.log.put(value_loss=error, value_target_variance=variance)
    run.log.write(0, "value")
    say(f"value head: mean squared error {error:.4g} on its own {count} prompts x {cfg.value_k} responses; "
        f"the variance of their mean rewards is {variance:.4g}")

def save_stage(run, prompts, heldout):
    """Algorithm 2: the reward model and the policy train each other for T steps."""
    for step in each_step(run, heldout, "save"):
        save_step(run, step, draw(prompts, run.cfg.seed, "prompts", (step - 1) * run.cfg.batch, run.cfg.batch))
    save_models(run)

def each_step(run, heldout, stage):
    """Yield the steps of a stage; around them resume, evaluate, log and save."""
    steps, done = run.cfg.steps, load_checkpoint(run)
    if not done:
        heldout_accuracy(run, heldout)
        run.log.write(0, stage)
    for step in progress(range(done + 1, steps + 1), stage, initial=done, total=steps):
        start = time.perf_counter()
        yield step
        run.log.put(step_seconds=time.perf_counter() - start)
        if step == steps or (run.cfg.eval_every and step % run.cfg.eval_every == 0):
            heldout_accuracy(run, heldout)
        run.log.write(step, stage)
        stopping = asked_to_stop()
        if stopping or (run.cfg.save_every and step % run.cfg.save_every == 0):
            save_checkpoint(run, step)
        if stopping:
            say(f"stopped by a signal after step {step}: --resume goes on from there")
            sys.exit(0)

def heldout_accuracy(run, heldout):
    """Share of pairs with R(chosen) > R(rejected), in percent, for each --heldout file; a tie counts as wrong."""
    for name, pairs in heldout.items():
        own = [side for pair in mine(pairs) for side in pair]
        rewards, _ = score(run.rm, own, run.cfg.micro_tokens)
        accuracy = 100 * total((rewards[0::2] > rewards[1::2]).sum())[0] / len(pairs)
        run.log.put(**{f"accuracy_{name}": accuracy})
        say(f"  accuracy on {name}: {accuracy:.2f} % of {len(pairs)} pairs")

# ---- 8. optimizer and offload ---------------------------------------------------------------------------------------
class ShardedAdamW:
    """AdamW on fp32 masters, whole parameters dealt to ranks (ZeRO-1); the model keeps a working copy in any precision.

    The masters are torch.optim.AdamW's own parameters. A bf16 model without them would not move at lr 1e-7. Each rank
    holds masters and moments of its parameters only: 12 bytes per parameter / WORLD. With `keep_initial` it also keeps
    its share of the initial weights, from which `swapped` makes the reference model in the policy's own storage.
    """
    max_norm = 1.0  # gradients are clipped to this norm, for each optimizer on its own

    def __init__(self, model, lr, cfg, keep_initial=False):
        self.lr, self.device = lr, "cpu" if cfg.offload else cfg.device
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        load, self.owner = [0] * WORLD, {}
        for name, p in sorted(self.named, key=lambda item: -item[1].numel()):  # largest first, to the emptiest rank
            self.owner[name] = load.index(min(load))
            load[self.owner[name]] += p.numel()
        own = [(name, p) for name, p in self.named if self.owner[name] == RANK]
        self.masters = {name: p.detach().to(self.device, torch.float32, copy=True) for name, p in own}
        self.initial = {name: p.to(getattr(torch, cfg.dtype), copy=True)
                        for name, p in self.masters.items() if keep_initial}
        self.adamw = torch.optim.AdamW(self.masters.values() or [torch.zeros(1)], lr, betas=(0.9, 0.999), eps=1e-8,
                                       weight_decay=0.0, fused=True)  # torch's own weight decay would be 0.01

    def publish(self, source):
        """Write `source` (this rank's masters or initial weights) into the working copy, on every rank."""
        for name, p in self.named:
            if self.owner[name] == RANK:
                p.data.copy_(source[name])
            broadcast(p.data, self.owner[name])

    @contextlib.contextmanager
    def swapped(self):
        """Inside, the working copy holds the initial weights: the reference model, without a second one in memory."""
        self.publish(self.initial)
        yield
        self.publish(self.masters)

    def step(self, lr_scale=1.0):
        """One AdamW step from p.grad (the same on every rank). Returns the gradient norm before clipping."""
        grads = [p.grad for _, p in self.named if p.grad is not None]
        norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]).norm().item()
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

    def full_state(self):
        """The masters of all ranks, name -> tensor in host memory, on rank 0; other ranks get {}."""
        state = {}
        for name, p in self.named:
            x = torch.empty(p.shape, device=p.device)
            if self.owner[name] == RANK:
                x.copy_(self.masters[name].detach())
            broadcast(x, self.owner[name])
            if RANK == 0:
                state[name] = x.to("cpu", copy=True)
        return state

    def state_dict(self):
        """This rank's masters and moments: {name: {"master", "step", "exp_avg", "exp_avg_sq"}}."""
        return {name: {"master": master.detach(), **self.adamw.state[master]} for name, master in self.masters.items()}

    def load_state_dict(self, state):
        """Take what belongs to this rank out of a state_dict of any rank, of however many there were."""
        for name in state.keys() & self.masters.keys():
            master, moments = self.masters[name], dict(state[name])
            master.data.copy_(moments.pop("master"))
            self.adamw.state[master] = {key: x.to(self.device, copy=True) for key, x in moments.items()}

# ---- 9. ranks: the only place that knows torch.distributed ----------------------------------------------------------
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))

def start_ranks(device):
    """Join the other ranks that torchrun started. A long timeout: one rank may decode much longer than another."""
    if device != "cpu":
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        # after a restart torchrun's store still holds the addresses of the dead ranks (pytorch issue 135712)
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("gloo" if device == "cpu" else "nccl", store=store, rank=RANK, world_size=WORLD,
                                timeout=timedelta(hours=2))

def stop_ranks():
    """Leave the process group, on errors too."""
    if WORLD > 1 and dist.is_initialized():
        dist.destroy_process_group()

def barrier():
    """Wait for every rank."""
    if WORLD > 1:
        dist.barrier()

def one_rank_at_a_time(load):
    """load() on rank 0, then rank 1, ...: host memory holds the weights being read by one rank only."""
    error = None
    for rank in range(WORLD):
        if rank == RANK:
            try:
                result = load()
            except UsageError as refusal:  # raised when all ranks are through, so that none waits for another
                error = refusal
        barrier()
    if error:
        raise error
    return result

def mine(items):
    """This rank's share of a list or tensor over prompts. Strided, so that shares join into the same global order."""
    return items[RANK::WORLD]

def gather(share):
    """(P/W, ...) on each rank -> (P, ...) on every rank, in the order that `mine` took the shares from."""
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
    if WORLD == 1:
        return [float(n) for n in numbers]
    sums = torch.tensor([float(n) for n in numbers], dtype=torch.float64,
                        device="cpu" if dist.get_backend() == "gloo" else "cuda")
    dist.all_reduce(sums)
    return sums.tolist()

def accumulate(model, batches, micro_loss):
    """Back-propagate micro_loss(model, rows) for each micro-batch; leave the sum over all of them in p.grad.

    DistributedDataParallel exists only inside this function, so its gradient buckets do too. Ranks may have different
    numbers of micro-batches (at least one): gradients are exchanged once, in the last backward. DDP averages over
    ranks while our losses are divided by global counts, hence the factor WORLD.
    """
    model.zero_grad()
    model.train()  # only because transformers recomputes activations in training mode alone: dropout is removed at load
    wrapped = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True) if WORLD > 1 else model
    for i, rows in enumerate(batches):
        if WORLD > 1:
            wrapped.require_backward_grad_sync = i == len(batches) - 1
        (micro_loss(wrapped, rows) * WORLD).backward()
    model.eval()

@contextlib.contextmanager
def frozen(module):
    """DDP waits for the gradient of every parameter that requires one: take the value head out while L_R trains."""
    module.requires_grad_(False)
    yield
    module.requires_grad_(True)

# ---- 10. text and data ----------------------------------------------------------------------------------------------
DATE = "26 Jul 2024"  # Llama-3.2's template prints today's date unless told otherwise: scores would change overnight

def encode_chats(tokenizer, chats, generation_prompt=False):
    """Lists of messages -> lists of token ids, with exactly one BOS where the tokenizer wants one.

    All chat templating is done here.
    """
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=generation_prompt,
                                          date_string=DATE)
    texts = [text.encode("utf-8", "replace").decode() for text in texts]  # lone surrogates cannot be tokenized
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    wants_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return [[bos] + ids if wants_bos and ids[:1] != [bos] else ids for ids in rows]

def encode_chat(tokenizer, messages, generation_prompt=False):
    """One chat -> token ids."""
    return encode_chats(tokenizer, [messages], generation_prompt)[0]

def encode_responses(tokenizer, messages, responses):
    """One prompt, many response texts -> [(ids, prompt_length)] in the reward model's own template.

    V is read at the last token of the prompt rendered without generation prompt, which must be a token prefix of the
    whole: true for the Llama-3, Qwen and ChatML templates, checked here for every other.
    """
    answered = [messages + [{"role": "assistant", "content": text}] for text in responses]
    prompt, *rows = encode_chats(tokenizer, [messages, *answered])
    if any(row[:len(prompt)] != prompt or len(row) == len(prompt) for row in rows):
        fail("--rm: its chat template does not render the prompt as a token prefix of prompt and response, so one "
             "causal pass cannot give both R and V")
    return [(row, len(prompt)) for row in rows]

def read_rows(source, flag):
    """Yield (where, row) of a .json, .jsonl (plain or .gz) or .parquet file, or of a hub dataset `name[:split]`.

    JSON is read here because the reader in `datasets` changes texts: dates, and strings in columns of mixed types.
    """
    lines = source.removesuffix(".gz").endswith(".jsonl")
    try:
        if lines or source.removesuffix(".gz").endswith(".json"):
            with (gzip.open if source.endswith(".gz") else open)(source, "rt", encoding="utf-8") as file:
                rows = list(file) if lines else json.load(file)
        elif Path(source).is_file() and not source.endswith(".parquet"):
            raise ValueError("its name does not end in .json, .jsonl, .gz or .parquet")
        else:
            from datasets import load_dataset  # imported here: JSON files do not need it
            name, _, split = source.partition(":")
            rows = load_dataset("parquet", data_files=source, split="train") if source.endswith(".parquet") else \
                load_dataset(name, split=split or "train")
    except Exception as error:  # as in `load`
        fail(f"--{flag} {source}: expected a .json, .jsonl or .parquet file or a hub dataset ({first_line(error)})")
    if isinstance(rows, (dict, str)) or not len(rows):
        fail(f"--{flag} {source}: expected a list of one row or more")
    for number, row in enumerate(rows, 1):
        where = f"--{flag} {source} row {number}"
        try:
            yield where, json.loads(row) if lines else row
        except ValueError as error:
            fail(f"{where}: not valid JSON ({first_line(error)})")

def as_messages(value, where):
    """A chat from a string or from a list of {"role", "content"}."""
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        messages = [{key: message.get(key) for key in ("role", "content")} for message in value]
        if all(isinstance(text, str) for message in messages for text in message.values()):
            return messages
    fail(f'{where}: expected a non-empty string or a list of {{"role", "content"}} messages, got {repr(value)[:80]}')

def last_reply(value, where):
    """The text of a response given as a string or as a whole chat that ends with it."""
    return value if isinstance(value, str) else as_messages(value, where)[-1]["content"]

def read_all(source, flag, parse):
    """parse(row, where) of every row. A bad row of your own file stops the run; from a hub set it is dropped."""
    parsed, count, why = [], 0, ""
    for where, row in progress(read_rows(source, flag), flag, delay=5):
        count += 1
        try:
            parsed.append(parse(row, where))
        except (UsageError, TemplateError) as error:
            message = str(error) if isinstance(error, UsageError) else \
                f"{where}: the chat template refuses it ({first_line(error)})"
            if Path(source).exists():
                fail(message)
            why = why or f"; the first: {message}"
    kept = [item for item in parsed if item is not None]
    say(f"{len(kept)} of {count} rows of {source} are used")
    return kept or fail(f"--{flag} {source}: none of its {count} rows can be used{why}")

def read_prompts(cfg, tokenizer):
    """[(messages, policy token ids)] of --prompts: rows are strings, message lists, or {"prompt": either}."""
    def parse(row, where):
        messages = as_messages(row.get("prompt", row.get("messages")) if isinstance(row, dict) else row, where)
        if messages[-1]["role"] == "assistant":
            fail(f"{where}: the prompt ends with an assistant message, expected the user's")
        ids = encode_chat(tokenizer, messages, generation_prompt=True)
        if len(ids) > cfg.max_prompt_tokens:
            fail(f"{where}: a prompt of {len(ids)} tokens, expected at most --max_prompt_tokens "
                 f"{cfg.max_prompt_tokens}")
        # F.1 on responses and 1024 tokens is read as R2M has it: leave out prompts whose known responses are longer
        replies = [last_reply(row[side], where) for side in ("chosen", "rejected")
                   if isinstance(row, dict) and side in row]
        short = all(len(reply.encode("utf-8", "replace")) <= cfg.max_new_tokens  # a token has a byte or more
                    or len(tokenizer(reply)["input_ids"]) <= cfg.max_new_tokens for reply in replies)
        return (messages, ids) if short else None
    return read_all(cfg.prompts, "prompts", parse)

def read_pairs(cfg, source, flag, tokenizer):
    """Rows of prompt, chosen, rejected -> [(chosen, rejected)], each (ids, prompt_length) in the RM's template."""
    limit = cfg.max_prompt_tokens + cfg.max_new_tokens if flag == "pairs" else tokenizer.model_max_length

    def parse(row, where):
        missing = [side for side in ("chosen", "rejected") if not isinstance(row, dict) or not row.get(side)]
        if missing:
            fail(f"{where}: a pair needs both sides, {' and '.join(missing)} missing or empty")
        prompt = row.get("prompt") or (row["chosen"][:-1] if isinstance(row["chosen"], list) else None)
        sides = encode_responses(tokenizer, as_messages(prompt, where),
                                 [last_reply(row[side], where) for side in ("chosen", "rejected")])
        longest = max(len(ids) for ids, _ in sides)
        if longest > limit:
            fail(f"{where}: a pair of {longest} tokens, expected at most {limit}" + (
                ", --max_prompt_tokens + --max_new_tokens" if flag == "pairs" else ", the reward model's context"))
        return sides
    return read_all(source, flag, parse)

def model_inputs(sequences, device):
    """[(ids, prompt_length)] -> input_ids (n,T) right-padded with 0, lengths (n,), prompt_lengths (n,).

    For both models: causal ones never look at what is to the right.
    """
    ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in sequences], batch_first=True)
    lengths, prompt_lengths = torch.tensor([(len(ids), length) for ids, length in sequences], device=device).T
    return ids.to(device), lengths, prompt_lengths

def micro_batches(rows, sequences, budget):
    """Split row numbers into lists of at most `budget` padded tokens (at least one row each), longest rows first.

    The longest come first so that too little memory shows at once; sorting keeps padding to a few percent.
    """
    batches, width = [], 0
    for row in sorted(rows, key=lambda row: (-len(sequences[row][0]), row)):
        if not batches or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
            width = len(sequences[row][0])
        batches[-1].append(row)
    return batches

def seed_for(*purpose):
    """A 63-bit seed from (seed, purpose, step, row, ...): no generator state to save, no replay on resume."""
    return int.from_bytes(hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest(), "big") >> 1

def generator(*purpose):
    """A CPU generator for one purpose, so that a GPU draws the same numbers."""
    return torch.Generator().manual_seed(seed_for(*purpose))

@functools.lru_cache(2)
def permutation(count, *purpose):
    """The order of `count` rows in one epoch."""
    return torch.randperm(count, generator=generator(*purpose)).tolist()

def draw(items, seed, purpose, start, count):
    """Items start .. start+count-1 of an endless stream of shuffled epochs."""
    return [items[permutation(len(items), seed, purpose, i // len(items))[i % len(items)]]
            for i in range(start, start + count)]

# ---- 11. checkpoints and logs ---------------------------------------------------------------------------------------
@contextlib.contextmanager
def replaced_folder(path):
    """On every rank: write into a temporary folder beside `path`; when all are through, rank 0 puts it in its place.

    A kill leaves the old folder or the new one.
    """
    path = Path(path)
    temporary, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "old"))
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    yield temporary
    barrier()
    if RANK == 0:
        for file in filter(Path.is_file, temporary.rglob("*")):  # tokenizers with several templates have a folder
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)

def write_model(folder, model, tokenizer):
    """A stock Hugging Face folder."""
    model.save_pretrained(folder, max_shard_size="5GB")  # a file's bytes are copied in host memory
    tokenizer.save_pretrained(folder)

def save_models(run):
    """rm/ in fp32 from the masters, policy/ in the working precision, both stock Hugging Face folders."""
    masters = run.optimizers["rm"].full_state() if "rm" in run.optimizers else None
    if RANK == 0 and ("rm" in run.optimizers or "value" in run.optimizers):
        run.rm.save_pretrained(Path(run.cfg.out, "rm"), masters)
        say(f"reward model: {Path(run.cfg.out, 'rm')}")
    if RANK == 0 and "policy" in run.optimizers:
        with replaced_folder(Path(run.cfg.out, "policy")) as folder:
            write_model(folder, run.policy.model, run.policy.tokenizer)
        say(f"policy: {Path(run.cfg.out, 'policy')}")
    barrier()

RESUME_MAY_CHANGE = {"out", "resume", "save_every", "eval_every", "heldout", "device", "offload", "micro_tokens",
                     "cache_tokens"}

def checkpoints(out):
    """Complete checkpoints under --out, oldest first."""
    return sorted(Path(out, "checkpoints").glob("step_*"))

def save_checkpoint(run, step):
    """checkpoints/step_000123/rank_00000.pt of each rank; the rename is what makes it one. Two are kept."""
    state = {"step": step, "deflation": run.log.deflation, "config": dataclasses.asdict(run.cfg),
             "optimizers": {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()}}
    with replaced_folder(Path(run.cfg.out, "checkpoints", f"step_{step:06d}")) as folder:
        torch.save(state, folder / f"rank_{RANK:05d}.pt")
    if RANK == 0:
        for old in checkpoints(run.cfg.out)[:-2]:
            shutil.rmtree(old)

def read_checkpoint(file):
    """The state that one rank saved: tensors, strings and numbers, nothing that could run."""
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many types: all mean that it is not as it was written
        fail(f"--resume: {file} cannot be read ({first_line(error)}); without its folder, the one before it is used")

def checkpoint_to_resume(cfg):
    """The newest checkpoint if --resume asks for one and there is one; it must be of this configuration."""
    found = checkpoints(cfg.out) if cfg.resume else []
    if not found:
        return None
    saved, now = read_checkpoint(found[-1] / "rank_00000.pt")["config"], dataclasses.asdict(cfg)
    changed = [f"--{name} was {saved.get(name)!r}, is {now[name]!r}" for name in now
               if name not in RESUME_MAY_CHANGE and saved.get(name) != now[name]]
    return found[-1] if not changed else fail(f"--resume: {found[-1]} is of other flags: {'; '.join(changed)}")

def load_checkpoint(run):
    """Take over the state of the checkpoint to resume from. Returns its step, 0 if there is none."""
    if not run.checkpoint:
        return 0
    for file in sorted(run.checkpoint.glob("rank_*.pt")):  # of however many ranks there were
        state = read_checkpoint(file)
        for name, optimizer in run.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
    for optimizer in run.optimizers.values():
        optimizer.publish(optimizer.masters)
    run.log.deflation = state["deflation"]
    say(f"resumed from {run.checkpoint}")
    return state["step"]

def write_json(path, value):
    """Write and flush to disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())

def say(*words):
    """Print on rank 0, without breaking a progress bar."""
    if RANK == 0:
        tqdm.write(" ".join(str(word) for word in words))
        sys.stdout.flush()  # a log file shows it now, not when a buffer is full

def progress(items, desc, **options):
    """A progress bar on rank 0, where the output is a terminal."""
    return tqdm(items, desc=desc, disable=None if RANK == 0 else True, **options)

def versions():
    """What made this run."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "world": WORLD, "sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}

class Log:
    """metrics.jsonl (first record: configuration and versions), samples.jsonl, now and then a line on the console."""

    def __init__(self, cfg):
        self.cfg, self.record, self.failing, self.deflation = cfg, {}, set(), 1.0
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        self.append("metrics.jsonl", {"config": dataclasses.asdict(cfg), **versions()})

    def append(self, name, *records):
        """Add JSON lines to a file under --out, on rank 0."""
        if RANK == 0:
            with open(Path(self.cfg.out, name), "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def forget_after(self, step):
        """Drop what a broken run had logged after the checkpoint: those steps come again."""
        for path in (Path(self.cfg.out, name) for name in ("metrics.jsonl", "samples.jsonl")):
            if RANK > 0 or not path.is_file():
                continue
            temporary = path.with_suffix(".new")
            with open(path, encoding="utf-8") as old, open(temporary, "w", encoding="utf-8") as new:
                for line in old:
                    try:
                        new.write(line if json.loads(line).get("step", -1) <= step else "")  # configurations stay
                    except ValueError:
                        pass  # cut short by a kill
            os.replace(temporary, path)

    def put(self, **values):
        """Add numbers to the record of the current step."""
        self.record.update({name: x.item() if torch.is_tensor(x) else x for name, x in values.items()})

    @contextlib.contextmanager
    def time(self, phase):
        """Add up the seconds of a phase, and note its peak memory on a GPU."""
        start = time.perf_counter()
        if self.cfg.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.cfg.on_gpu:
            torch.cuda.synchronize()
            peak = max(torch.cuda.max_memory_allocated() / 1e9, self.record.get(f"{phase}_gb", 0))
            self.put(**{f"{phase}_gb": peak})
        self.put(**{f"{phase}_seconds": self.record.get(f"{phase}_seconds", 0) + time.perf_counter() - start})

    def write(self, step, stage):
        """Close the record of a step: to disk and, for every tenth, as one line to the console."""
        record, self.record = {"step": step, "stage": stage, **self.record}, {}
        self.append("metrics.jsonl", record)
        shown = {"loss": "rm_loss", "acc": "rm_accuracy", "R": "reward", "spread": "reward_spread", "kept": "kept",
                 "V bias": "value_bias", "valid": "valid", "truncated": "truncated", "R shift": "reward_shift",
                 "kl": "kl", "tok/s": "tokens_per_second", "s": "step_seconds"}
        if step == 1 or step == self.cfg.steps or step and step % 10 == 0:
            say(f"{stage} {step}", *(f" {label} {record[name]:.4g}" for label, name in shown.items() if name in record))

def record_scores(run, batch, positive, negative, valid):
    """The numbers that say what the filter did and whether the anchor is any good, over all ranks."""
    rewards, kept = batch.rewards, positive | negative
    run.log.put(reward=rewards.mean(), reward_spread=rewards.std(1).mean(), kept=kept.float().mean(),
                positive=positive.float().mean(), valid=valid.float().mean(), truncated=1 - batch.ended.float().mean(),
                usable=batch.usable.float().mean(), response_tokens=batch.lengths.float().mean(),
                tokens_per_second=batch.lengths.sum().item() / run.log.record["rollout_seconds"])
    if RM_UPDATES[run.cfg.rm_update].anchor == "value head":
        bias = anchor(run, batch) - masked_mean(rewards, batch.usable, 1)
        run.log.put(value_bias=bias.mean(), value_rmse=bias.square().mean().sqrt(),
                    threshold=curriculum_threshold(batch.step, run.cfg.steps, run.cfg.m0))

def rows_of(batch):
    """This rank's responses with what is known of them: of samples.jsonl, and of the file for bad values."""
    group = batch.lengths.shape[1]
    rewards = [None] * len(batch.texts) if batch.rewards is None else mine(batch.rewards).flatten().tolist()
    truncated = (~mine(batch.ended)).flatten().tolist()
    return [{"step": batch.step, "prompt": batch.prompts[i // group][0], "response": text, "reward": rewards[i],
             "truncated": truncated[i]} for i, text in enumerate(batch.texts)]

def record_samples(run, batch, positive, negative):
    """Append rank 0's responses of this step to samples.jsonl."""
    group, values = batch.lengths.shape[1], mine(anchor(run, batch)).tolist()
    sides = mine(positive.int() - negative.int()).flatten().tolist()
    run.log.append("samples.jsonl", *(
        {**row, "value": values[i // group], "side": {1: "+", 0: "", -1: "-"}[sides[i]], "kept": sides[i] != 0}
        for i, row in enumerate(rows_of(batch))))

@contextlib.contextmanager
def stops_at_bad_values(run, step, rows):
    """A reward, loss or gradient that is not finite ends the run before an optimizer sees it; rows() go to a file."""
    try:
        yield
    except FloatingPointError as error:
        file = Path(run.cfg.out, f"nonfinite_rank_{RANK}.json")
        write_json(file, {"step": step, "rank": RANK, "error": str(error), "rows": rows()})
        raise FloatingPointError(f"step {step} rank {RANK}: {error}; this rank's rows are in {file}") from None

def health(run):
    """Say, when it begins, in which way a run does nothing or drifts. Returns what is wrong now."""
    now = run.log.record
    checks = {
        "nothing is kept, every |R - V| is below the threshold: lower --m0": now["kept"] == 0,
        "no prompt has both signs, the reward model learns nothing: raise --group, or --value_epochs to fit V better":
            now["kept"] > 0 == now["valid"] and RM_UPDATES[run.cfg.rm_update].anchor != "",
        "V is off by more than the reward spread: raise --value_lr or --value_epochs, or --lr_value":
            abs(now.get("value_bias", 0)) > now["reward_spread"] > 0,
        "more than half of the responses are truncated: raise --max_new_tokens": now["truncated"] > 0.5,
        "the rewards of each group are equal, nothing to learn from: raise --temperature": now["reward_spread"] == 0,
        "the reward model did not change: raise --lr_rm or use --dtype float32": now.get("reward_shift") == 0,
        "updates have halved the spread of rewards of the same responses, L_R deflates: lower --lr_rm":
            now.get("deflation", 1) < 0.5}
    failing = {text for text, found in checks.items() if found}
    for text in sorted(failing - run.log.failing):
        say("  health: " + text)
    run.log.failing = failing
    return sorted(failing)

# ---- 12. main -------------------------------------------------------------------------------------------------------
ASKED_TO_STOP = []

def asked_to_stop():
    """Whether any rank got SIGTERM or Ctrl-C: all of them stop at the same step."""
    return total(len(ASKED_TO_STOP))[0] > 0

def first_line(error):
    """The first non-empty line of an exception."""
    return next((line.strip() for line in str(error).split("\n") if line.strip()), type(error).__name__)[:200]

def main(argv=None, kind=Config):
    """Parse, check, load, run. Bad input: one line on stderr and exit code 2, before anything is written."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    ASKED_TO_STOP.clear()
    try:
        cfg = parse_config(argv, kind).checked()
        start_ranks(cfg.device)
        train(cfg)
    except UsageError as error:
        if RANK == 0:
            print(f"save.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"save.py: error: rank {RANK} ran out of GPU memory: lower --micro_tokens (scores, log-probs, updates), "
              f"--cache_tokens (rollout) or --max_new_tokens, or set --offload ({first_line(error)})", file=sys.stderr)
        os._exit(1)  # other ranks may wait for this one: torchrun ends them
    except (FloatingPointError, SafetensorError, OSError) as error:  # bad values; a disk that is full or gone
        print(f"save.py: error: {error}; checkpoints are as they were", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if WORLD == 1 or not re.search("gloo|nccl|Connection (closed|reset)", str(error), re.I):
            raise
        print(f"save.py: error: rank {RANK} lost another rank, start again with --resume ({first_line(error)})",
              file=sys.stderr)
        os._exit(1)  # the process group is broken: leaving it in order would wait for the lost rank
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        stop_ranks()

def train(cfg):
    """Read all input before writing any output, then run the stages asked for."""
    if checkpoints(cfg.out) and not cfg.resume:
        fail(f"--out {cfg.out}: it holds checkpoints of an earlier run: --resume, or another --out")
    if Path(cfg.out).exists() and not Path(cfg.out).is_dir():
        fail(f"--out {cfg.out}: expected a folder, it is a file")
    preference, saving, update = cfg.stage == "preference", cfg.stage in ("", "save"), RM_UPDATES[cfg.rm_update]
    anchored = update.anchor == "value head"
    rm_tokenizer = load_tokenizer(cfg.rm, "rm")
    heldout = {name_of(file): read_pairs(cfg, file, "heldout", rm_tokenizer) for file in cfg.heldout}
    pairs = read_pairs(cfg, cfg.pairs, "pairs", rm_tokenizer) if preference else None
    prompts = None if preference else read_prompts(cfg, load_tokenizer(cfg.policy, "policy"))
    if preference and cfg.steps is None:
        cfg = dataclasses.replace(cfg, steps=max(1, len(pairs) // cfg.batch))
    found = checkpoint_to_resume(cfg)
    rm = one_rank_at_a_time(lambda: RewardModel.from_pretrained(cfg.rm, preference, cfg.seed).to(cfg.device))
    run = Run(cfg, rm, checkpoint=found)
    if anchored and cfg.stage == "save" and not rm.has_value_head:
        fail(f"--rm {cfg.rm}: it holds no value_head.safetensors; run --stage value first, or leave --stage out")
    # masters before working copies: they are taken in the checkpoint's precision, before it is rounded to --dtype
    if preference or (saving and update.loss):
        run.optimizers["rm"] = ShardedAdamW(rm.model, cfg.lr_rm, cfg)
    to_working_copy(rm, cfg)
    if not preference:
        run.policy = one_rank_at_a_time(lambda: Policy.from_pretrained(cfg.policy).to(cfg.device))
        check_context(cfg, run)
        if saving:
            run.optimizers["policy"] = ShardedAdamW(run.policy.model, cfg.lr_policy, cfg, keep_initial=cfg.kl_coef > 0)
        to_working_copy(run.policy, cfg).check_logits(cfg.policy)

    run.log = Log(cfg)
    if cfg.resume:
        run.log.forget_after(int(found.name.removeprefix("step_")) if found else -1)
    if preference:
        return preference_stage(run, pairs, heldout)
    if cfg.stage == "value" or (anchored and not rm.has_value_head and not found):
        value_stage(run, prompts)
    if cfg.stage == "value":  # nothing but the head was trained: the rest as it was before it was rounded to --dtype
        if cfg.dtype != "float32":
            rm.model = one_rank_at_a_time(lambda: RewardModel.from_pretrained(cfg.rm)).model
        return save_models(run)
    if anchored:
        run.optimizers["value"] = ShardedAdamW(rm.value_head, cfg.lr_value, cfg)
        rm.has_value_head = True
    save_stage(run, prompts, heldout)

def name_of(source):
    """data/heldout_id.jsonl.gz -> heldout_id."""
    return re.sub(r"(\.jsonl?|\.parquet)?(\.gz)?$", "", Path(source).name)

def check_context(cfg, run):
    """A prompt and the longest response must fit both models."""
    for flag, model in (("policy", run.policy.model), ("rm", run.rm.model)):
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit and cfg.max_prompt_tokens + cfg.max_new_tokens > limit:
            fail(f"--max_prompt_tokens {cfg.max_prompt_tokens} and --max_new_tokens {cfg.max_new_tokens}: expected at "
                 f"most {limit} together, the context of --{flag} {getattr(cfg, flag)}")

if __name__ == "__main__":
    main()
