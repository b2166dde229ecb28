"""SAVE, its rivals and controls on a small real model, for two CPU cores: `tests/real.py --quick`.

The reward model is the chat model cut after LAYERS layers; its head is fitted to GPT-4's preferences (Bradley-Terry and
ridge). Answers are sampled once, by a policy that stays as it is, and shared by all runs. Of the reward model only the
last TOP layers, norm and head learn: what enters them is computed once and stands in an embedding, so that a run is
save.py's own loop on row numbers of that table for token ids. All is resumable: what is in --out is not made again.
"""
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import real
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "forks")]
import centred  # noqa: E402, F401  a row of RM_UPDATES
import hl_bt  # noqa: E402, F401  a row of RM_UPDATES
import kept  # noqa: E402
import measure  # noqa: E402
import offline  # noqa: E402, F401  a row of RM_UPDATES
import purity  # noqa: E402

import eval as evaluation  # noqa: E402
import save  # noqa: E402

TOP, LAYERS, GROUP, BLOCK, OWN = 2, 22, 8, 16, 150  # OWN: pairs of the head's fit that runs are tested on
SIZE = {"tokens": 320, "prompt": 80, "pairs": 10 ** 6, "suffix": " Answer in one short sentence."}
PROMPTS = {"value": 128, "0": 80, "1": 80}  # those of V, then those of each seed's steps
FLAGS = ("--device cpu --dtype float32 --save_every 0 --steps 20 --eval_every 5 --batch 4 --max_new_tokens 64 "
         "--max_prompt_tokens 80 --value_k 4 --value_epochs 60 --lr_value 3e-5 --micro_tokens 4096")

def made(out, name, make):
    """The file out/NAME, if it is not there from make(); its CPU seconds are a line of out/cpu.jsonl."""
    path, start = Path(out, name), sum(os.times()[:4])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), f"{path}.new")
        os.replace(f"{path}.new", path)
        with open(Path(out, "cpu.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": name.split("/")[0], "cpu_s": sum(os.times()[:4]) - start}) + "\n")
    return torch.load(path, weights_only=False, mmap=True)

# ---- data: pairs, answers, the hidden states of both
def questions(args):
    """{"value": chats, "0": chats, ...}: different training prompts that are short in the chat template."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    path = str(Path(args.data, "preferences", "preferences_train.jsonl.gz"))
    texts = sorted({row["prompt"] + SIZE["suffix"] for _, row in save.read_rows(path, "data")})
    chats = [[{"role": "user", "content": text}] for text in texts]
    short = [chat for chat, ids in zip(chats, save.encode_chats(tokenizer, chats, True)) if len(ids) <= SIZE["prompt"]]
    random.Random(0).shuffle(short)
    ends = list(itertools.accumulate(PROMPTS.values()))
    assert len(short) >= ends[-1], f"{len(short)} prompts, expected {ends[-1]}"
    return {name: short[end - count:end] for (name, count), end in zip(PROMPTS.items(), ends)}

def answers(out, cfg, policy, rm, name, chats, group):
    """[(chat, [(ids, prompt_length)] in the RM's tokens, ended)] of sampled answers, in blocks."""
    run = save.Run(cfg, rm, policy)
    run.log = types.SimpleNamespace(time=lambda phase: mock.MagicMock())
    def block(start):
        prompts = [(chat, save.encode_chats(policy.tokenizer, [chat], True)[0]) for chat in chats[start:start + BLOCK]]
        batch = save.sample(run, prompts, group, start, name)
        own = [batch.chats[i * group:(i + 1) * group] for i in range(len(prompts))]
        return [(chat, own[i], batch.ended[i].tolist()) for i, (chat, _) in enumerate(prompts)]
    return sum((made(out, f"answers/{name}_{i:03d}.pt", lambda i=i: block(i)) for i in range(0, len(chats), BLOCK)), [])

@torch.no_grad()
def lower(rm, chats, top):
    """What enters the last `top` layers: a (length,H) tensor of each of `chats`."""
    base, states = rm.model.base_model, [None] * len(chats)
    with mock.patch.multiple(base, layers=base.layers[:-top], norm=nn.Identity()):
        for rows in save.micro_batches(range(len(chats)), chats, 2048):
            ids, lengths, _ = save.model_inputs([chats[row] for row in rows], "cpu")
            hidden = base(input_ids=ids, use_cache=False).last_hidden_state
            for row, x, length in zip(rows, hidden, lengths):
                states[row] = x[:length].clone()
    return states

def numbered(out, rm, name, chats):
    """Hidden states of different chats, one after another, into out/hidden; all chats with their rows there for ids."""
    keys = list(dict.fromkeys((tuple(ids), n) for ids, n in chats))
    for i in range(0, len(keys), 128):
        made(out, f"hidden/{name}_{i:05d}.pt", lambda i=i: torch.cat(lower(rm, keys[i:i + 128], TOP)))
    ends = dict(zip(keys, itertools.accumulate(len(ids) for ids, _ in keys)))
    return [(range(end - len(ids), end), n) for ids, n in chats for end in [ends[tuple(ids), n]]]

def table_of(out, names):
    """(tokens,H) of some names, and where each begins."""
    parts = [[torch.load(file, mmap=True) for file in sorted(Path(out, "hidden").glob(f"{name}_*.pt"))] for name in names]
    sizes = [sum(map(len, files)) for files in parts]
    return torch.cat(sum(parts, [])), dict(zip(names, [0, *itertools.accumulate(sizes)]))

# ---- the reward model: a head in closed form, V
def bradley_terry_fit(gaps, weights, strength):
    """argmin_w of sum_i weights_i * -log sigmoid(gaps_i w) + strength / 2 |w|^2, convex, by Newton. gaps (n,H): chosen
    minus rejected, weights (n,), both fp64 -> (H,)."""
    w, weight = gaps.new_zeros(gaps.shape[1]), strength * torch.eye(gaps.shape[1], dtype=gaps.dtype)
    for _ in range(30):
        wrong = torch.sigmoid(-gaps @ w)
        hessian = gaps.T @ (gaps * (weights * wrong * (1 - wrong))[:, None]) + weight
        w = w - torch.linalg.solve(hessian, strength * w - gaps.T @ (weights * wrong))
    return w

def even(longer):
    """Weights (n,) that sum to 1, half of it on the pairs whose chosen answer is the longer one, bool (n,)."""
    counts = [side.sum().double().clamp(min=1) for side in (longer, ~longer)]
    return torch.where(longer, 0.5 / counts[0], 0.5 / counts[1])

def head_of(gaps, weights, prompts):
    """The ridge fit of gaps (n,H) at the strength with the lowest held-out loss in five folds over prompts ->
    w (H,), {"strength", "cv_accuracy", "cv_nll"}."""
    folds = torch.tensor([save.seed_for(prompt) % 5 for prompt in prompts])
    scale, found = (weights @ gaps ** 2).mean().item(), []
    for strength in (scale * 4.0 ** power for power in range(-3, 8)):
        margins = torch.zeros(len(gaps), dtype=gaps.dtype)
        for fold in folds.unique():
            rest, kept_out = folds != fold, folds == fold
            margins[kept_out] = gaps[kept_out] @ bradley_terry_fit(
                gaps[rest], weights[rest] / weights[rest].sum(), strength)
        nll, right = (weights @ x / weights.sum() for x in (-F.logsigmoid(margins), (margins > 0).double()))
        found.append({"cv_nll": nll.item(), "cv_accuracy": 100 * right.item(), "strength": strength})
    best = min(found, key=lambda row: row["cv_nll"])
    return bradley_terry_fit(gaps, weights, best["strength"]), best

def top_of(path, table, head=None, value_head=None, factor=1.0):
    """The reward model of a folder on the rows of `table` for tokens: its last TOP layers, norm and head are left."""
    rm = save.RewardModel.from_pretrained(str(path))
    base = rm.model.base_model
    base.layers, base.embed_tokens = base.layers[-TOP:], nn.Embedding.from_pretrained(table)  # frozen
    if head is not None:
        rm.model.score.weight.data = factor * head.float()[None]
    if value_head:
        rm.value_head.load_state_dict(value_head)
    return rm

def whole_of(path, rm, out):
    """A stock folder: the reward model of `path` with the trained part of `rm`."""
    whole = save.RewardModel.from_pretrained(str(path))
    base, top = whole.model.base_model, rm.model.base_model
    for old, new in ((base.layers[-TOP:], top.layers), (base.norm, top.norm), (whole.model.score, rm.model.score),
                     (whole.value_head, rm.value_head)):
        old.load_state_dict(new.state_dict())
    whole.has_value_head = True
    whole.save_pretrained(out)

@torch.no_grad()
def last_states(rm, chats):
    """(n,H) of what the head reads."""
    states = torch.empty(len(chats), rm.model.score.in_features)
    for rows in save.micro_batches(range(len(chats)), chats, 4096):
        states[rows], _ = rm.features(*save.model_inputs([chats[row] for row in rows], "cpu"))
    return states

def stored(run, items, group, *_):
    """In the place of save.sample: the first `group` answers of each item (chat, chats in the RM's tokens, ended)."""
    chats = [chat for _, own, _ in items for chat in own[:group]]
    lengths = torch.tensor([len(ids) - n for ids, n in chats]).view(-1, group)
    ended = torch.tensor([ended[:group] for *_, ended in items])
    return save.Batch([(chat, []) for chat, *_ in items], [""] * len(chats), chats, [], lengths, ended)

def value_of(out, rm, items, flags=()):
    """save.py's value stage on stored answers -> the state of the value head."""
    cfg = save.parse_config([*FLAGS.split(), "--batch", "32", "--value_prompts", str(len(items)), "--out", str(out), *flags],
                            save.Config).checked()
    run = save.Run(cfg, rm, log=save.Log(cfg))
    with mock.patch.object(save, "sample", stored):
        save.value_stage(run, items)
    return rm.value_head.state_dict()

def ridge_of(features, means):
    """purity.ridge at the strength with the lowest error in five folds."""
    folds = torch.arange(len(means)) % 5
    def error(strength):
        return sum(((purity.ridge(features[folds != i], means[folds != i], strength)(features[folds == i])
                     - means[folds == i]) ** 2).sum().item() for i in range(5))
    return purity.ridge(features, means, min((10.0 ** power for power in range(-1, 7)), key=error))

def r2_of(values, means):
    """R2 of V on prompts and its 95 % bootstrap interval. (P,), (P,)."""
    draws = torch.randint(len(means), (2000, len(means)), generator=torch.Generator().manual_seed(0))
    draws = torch.cat([torch.arange(len(means))[None], draws])
    values, means = values.double()[draws], means.double()[draws]
    r2 = 1 - ((values - means) ** 2).mean(1) / means.var(1, correction=0)
    return [r2[0].item(), *r2[1:].quantile(torch.tensor([0.025, 0.975]).double()).tolist()]

# ---- runs
class Spec(NamedTuple):
    """A run."""
    update: str = "save"  # a row of RM_UPDATES
    labels: str = "own"  # own, random, flipped: of sampled answers; gpt4, gpt4 random: of the fit's pairs
    lr: float = 3e-5
    seed: int = 0
    keep: float = 0.0  # of kept.py
    head: float = 1.0  # factor of the head; 1: all answers are kept, else Table 8's --m0
    rm: str = "all"  # weights of the pairs its head is fitted to: all, even (in length)

MAIN = [("save", "own"), ("centred", "own"), ("hl_bt", "own"), ("mean_reward", "own"), ("offline", "gpt4"),
        *itertools.product(["centred"], ["random", "flipped", "gpt4", "gpt4 random"])]
PLAN = [Spec(*pair, seed=seed) for seed in (0, 1) for pair in MAIN]  # what matters most comes first
PLAN += [Spec(update, keep=keep) for keep in (0.1, 1.0, 0.03, 0.3) for update in ("centred", "save")]
PLAN += [Spec("save", labels, seed=seed) for seed in (0, 1) for labels in ("random", "flipped", "gpt4")]
PLAN += [Spec(*pair, lr=1e-5, seed=seed) for seed in (0, 1) for pair in MAIN[:5]]
PLAN += [Spec(update, seed=seed, **more) for more in ({"rm": "even"}, {"head": 5.0}) for seed in (0, 1)
         for update in ("save", "centred")]
PLAN += [Spec(update, keep=keep, seed=1) for keep in (0.1, 1.0, 0.03, 0.3) for update in ("centred", "save")]

def score_batch(run, batch, plain=save.score_batch):
    """As in save.py; `moved`: what an update changed within a group over the spread before it."""
    before = batch.rewards
    plain(run, batch)
    if before is not None:
        run.log.put(moved=((batch.rewards - before).std(1) / before.std(1).clamp(min=1e-6)).median())

def labels_of(kind):
    """In the place of save.label: (P,G)."""
    def label(run, batch, plain=save.label):
        known = batch.rewards.new_tensor([[math.inf, -math.inf]]).expand_as(batch.rewards[:, :2])
        labels = known if "gpt4" in kind else plain(run, batch)
        if "random" in kind:  # as many of each sign in a group
            numbers = torch.Generator().manual_seed(save.seed_for(run.cfg.seed, "labels", run.step))
            labels = labels.gather(1, torch.rand(labels.shape, generator=numbers).argsort(1))
        return -labels if kind == "flipped" else labels
    return label

def judged(run, chats, *, seed):
    """Rewards of the held-out pairs (n,2), pairs of the head's fit (m,2), groups of the seed (P,G)."""
    parts = chats["heldout"], chats["train"][:2 * OWN], chats[seed][:20 * GROUP]
    held, own, groups = (save.score(run.rm, part, run.cfg.micro_tokens)[0] for part in parts)
    return {"heldout": held.view(-1, 2), "own": own.view(-1, 2), "groups": groups.view(-1, GROUP)}

def world_of(out, names):
    """The index of prepare and the table of some names -> table, {name: chats on it}, {name: items, stored's}."""
    index = torch.load(Path(out, "index.pt"), weights_only=False)
    table, begins = table_of(out, names)
    chats = {name: [(range(ids.start + begins[name], ids.stop + begins[name]), n) for ids, n in index[name]["chats"]]
             for name in names}
    items = {name: [(chat, [next(own) for _ in ended], ended) for chat, ended in index[name]["items"]]
             for name in names if "items" in index[name] for own in [iter(chats[name])]}
    return table, chats, items, index

def start_of(out, table, spec):
    """The reward model that a run starts from, on `table`."""
    heads, value = (torch.load(Path(out, name), weights_only=False) for name in (
        "heads.pt", f"value/{spec.rm}_{spec.head:g}.pt"))
    return top_of(Path(out, "start"), table, heads[spec.rm]["head"], value["state"], spec.head)

def name_of(spec):
    """The name of a run's files."""
    return "_".join(map(str, spec)).replace(" ", "-")

def run_once(out, spec):
    """out/runs/NAME.pt: what the RM says of pairs and groups, every few steps and at the end."""
    torch.set_num_threads(1)
    if Path(out, f"runs/{name_of(spec)}.pt").exists():
        return
    table, chats, items, index = world_of(out, ["heldout", "train", str(spec.seed)])
    items, of_pairs = items[str(spec.seed)], "gpt4" in spec.labels
    flags = [*FLAGS.split(), "--lr_rm", str(spec.lr), "--seed", str(spec.seed), "--rm_update", spec.update, "--keep",
             str(spec.keep), "--out", str(Path(out, "logs", name_of(spec))), "--group", str(2 if of_pairs else GROUP)]
    flags += ["--m0", "0"] * (spec.head == 1) + ["--batch", "16"] * of_pairs
    run = save.Run(save.parse_config(flags, kept.Config).checked(), start_of(out, table, spec))
    before = made(out, f"base/{spec.rm}_{spec.head:g}_{spec.seed}.pt", lambda: judged(run, chats, seed=str(spec.seed)))
    pairs = list(zip(chats["train"][0::2], chats["train"][1::2]))
    items = [([{"role": "user", "content": prompt}], list(pair), [True, True])
             for prompt, pair in zip(index["train"]["prompts"], pairs)] if of_pairs else items
    heldout, curve = chats["heldout"], []

    def heldout_accuracy(run, _):
        scored = save.score(run.rm, heldout, run.cfg.micro_tokens)[0].view(-1, 2) if curve else before["heldout"]
        curve.append(scored)

    def go():
        run.log, run.initial = save.Log(run.cfg), start_of(out, table, spec)
        run.optimizers["rm"] = save.ShardedAdamW(run.rm.model, run.cfg.lr_rm, run.cfg)
        if save.RM_UPDATES[spec.update].anchor == "value head":
            run.optimizers["value"] = save.ShardedAdamW(run.rm.value_head, run.cfg.lr_value, run.cfg)
        parts = {"sample": stored, "score_batch": score_batch, "policy_step": lambda *_: None,
                 "heldout_accuracy": heldout_accuracy, "label": labels_of(spec.labels)}
        parts |= {"reward_model_step": kept.reward_model_step} if spec.keep else {}
        if spec.update == "offline":
            parts["reward_model_step"] = lambda run, *_: save.preference_step(run, pairs) or True
        with mock.patch.multiple(save, **parts):
            save.each_step(run, "save", items, {}, [])
        rows = measure.Logs(run.cfg.out).steps
        logs = {name: [row[name] for row in rows if name in row] for name in ("moved", "kept", "valid", "common_push")}
        return {**judged(run, chats, seed=str(spec.seed)), "curve": torch.stack(curve), "logs": logs}
    made(out, f"runs/{name_of(spec)}.pt", go)

# ---- what came of it
def with_interval(prompts, numbers, cells=None):
    """[mean over cells of the mean of numbers (n,), its 95 % bounds]: prompts are drawn again, each with its pairs."""
    rows = list(zip(prompts, cells if cells is not None else [""] * len(prompts), numbers.tolist()))
    scores = types.SimpleNamespace(outcomes=lambda rows: rows, summary=lambda means: sum(means.values()) / len(means))
    means = [[x for _, own, x in rows if own == cell] for cell in {cell for _, cell, _ in rows}]
    bounds = evaluation.interval(evaluation.bootstrap(scores, rows, 2000, 0))
    return [round(x, 3) for x in (sum(sum(x) / len(x) for x in means) / len(means), *bounds)]

def right(rewards):
    """100 where the chosen answer (of two columns the first) is ahead."""
    return 100.0 * (rewards[:, 0] > rewards[:, 1])

def loss_at_best(rewards):
    """100 times Eq. 11 of each pair, rewards divided by the temperature that makes its mean least. (n,2) -> (n,)."""
    margins = (rewards[:, :1] - rewards[:, 1:]).double()
    share = torch.full((len(margins),), 1 / len(margins), dtype=torch.double)
    return -100 * F.logsigmoid(margins @ bradley_terry_fit(margins, share, 1e-9))

def best_of(curve, prompts):
    """The plainest guard. Rewards (checkpoints,n,2) -> (n,2) of the checkpoint with the lowest Eq. 11 on the other half
    of the prompts, and the two chosen checkpoints."""
    half = torch.tensor([save.seed_for(prompt) % 2 for prompt in prompts])
    losses = -F.logsigmoid(curve[..., 0] - curve[..., 1])
    chosen = [losses[:, half != side].mean(1).argmin().item() for side in (0, 1)]
    return torch.where((half == 0)[:, None], curve[chosen[0]], curve[chosen[1]]), chosen

def line_of(out, spec, index):
    """A line of real.jsonl: the run minus the reward model it started from, paired, [change, low, high]."""
    before, after = (torch.load(Path(out, name), weights_only=False) for name in (
        f"base/{spec.rm}_{spec.head:g}_{spec.seed}.pt", f"runs/{name_of(spec)}.pt"))
    prompts, own = index["heldout"]["prompts"], index["train"]["prompts"][:OWN]
    lengths = torch.tensor([len(ids) - n for ids, n in index["heldout"]["chats"]]).float()
    longer = (lengths[0::2] > lengths[1::2]).tolist()
    old, new = before["heldout"], after["heldout"]
    guarded, chosen = best_of(after["curve"], prompts)
    correlation = torch.corrcoef(torch.stack([lengths, new.flatten()]))[0, 1].item()
    spread = (after["groups"].std(1).mean() / before["groups"].std(1).mean()).item()
    short = {name: [round(x, 4) for x in (row[0], row[len(row) // 2], row[-1])]
             for name, row in after["logs"].items() if row}
    return {**spec._asdict(), "accuracy": round(right(new).mean().item(), 2),
            "gain": with_interval(prompts, right(new) - right(old)),
            "even_gain": with_interval(prompts, right(new) - right(old), longer),
            "nll": with_interval(prompts, loss_at_best(new) - loss_at_best(old)),
            "own": with_interval(own, right(after["own"]) - right(before["own"])),
            "best": with_interval(prompts, right(guarded) - right(old)),
            "best_nll": with_interval(prompts, loss_at_best(guarded) - loss_at_best(old)), "checkpoints": chosen,
            "curve": [round(right(x).mean().item(), 2) for x in after["curve"]],
            "spread": round(spread, 3), "length": round(correlation, 3), **short}

def splits(rewards, values, spread):
    """Of the pairs that V splits, both answers beyond `margin` spreads: {margin: [how many, % with the chosen in Y+]}."""
    found = {}
    for margin in (0, 0.5, 1):
        a = save.rm_advantages(rewards, values)
        split = (a[:, 0] * a[:, 1] < 0) & (a.abs() >= margin * spread).all(1)
        found[str(margin)] = [split.sum().item(), 100 * (a[split, 0] > 0).float().mean().item()]
    return found

WHOLE = {"save_1e-06": ["save.py", "--lr_rm", "1e-6"], "save_1e-07": ["save.py", "--lr_rm", "1e-7"],
         "centred_1e-06": ["tests/forks/centred.py", "--lr_rm", "1e-6"]}  # all layers, and the policy learns

def prepare(args, out):
    """Pairs, answers, hidden states -> out/index.pt: {name: {"chats", "prompts" | "items"}}."""
    if not (out / "start").is_dir():
        torch.manual_seed(0)
        start = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, num_hidden_layers=LAYERS)
        start.save_pretrained(out / "start")
        AutoTokenizer.from_pretrained(args.model).save_pretrained(out / "start")
    rm, policy = save.RewardModel.from_pretrained(str(out / "start")), save.Policy.from_pretrained(args.model)
    cfg, index = save.parse_config(FLAGS.split()).checked(), {}
    for name in ("heldout", "train"):
        rows = [row for _, row in save.read_rows(str(real.pairs(args, SIZE, name, SIZE["pairs"])), name)]
        pairs = [pair for row in rows for pair in save.pair_of(row, rm)]
        index[name] = {"chats": [chat for pair in pairs for chat in pair], "prompts": [row["prompt"] for row in rows]}
    for name, chats in questions(args).items():
        found = answers(out, cfg, policy, rm, name, chats, cfg.value_k if name == "value" else GROUP)
        index[name] = {"chats": [x for _, own, _ in found for x in own], "items": [(x[0], x[2]) for x in found]}
    for name, rows in index.items():
        rows["chats"] = numbered(out, rm, name, rows["chats"])
    return index

def heads_of(out):
    """{"all" | "even": {"head": (H,), "strength", "cv_nll", "cv_accuracy"}}."""
    table, chats, _, index = world_of(out, ["train"])
    rm, lengths = top_of(Path(out, "start"), table), torch.tensor([len(ids) - n for ids, n in chats["train"]])
    states = last_states(rm, chats["train"]).double()
    gaps, longer = states[0::2] - states[1::2], lengths[0::2] > lengths[1::2]
    weights = {"all": torch.full((len(gaps),), 1 / len(gaps), dtype=torch.double), "even": even(longer)}
    found = {name: head_of(gaps, share, index["train"]["prompts"]) for name, share in weights.items()}
    return {name: {"head": head, **row} for name, (head, row) in found.items()}

def value_and_facts(out, name, factor):
    """The value head for a head, and what is known of both: R2 on the prompts of the steps, the pairs that V splits."""
    names = [*PROMPTS, "heldout"]
    table, chats, items, index = world_of(out, names)
    rm = top_of(Path(out, "start"), table, torch.load(Path(out, "heads.pt"), weights_only=False)[name]["head"], None, factor)
    scored = {key: save.score(rm, chats[key], 4096) for key in names}
    tested = [(rewards.view(-1, GROUP), features[::GROUP], torch.tensor([ended for *_, ended in items[key]]))
              for key, (rewards, features) in scored.items() if key in "01"]
    rewards, features, ended = (torch.cat(parts) for parts in zip(*tested))
    some = ended.any(1)
    means = save.masked_mean(rewards, ended, 1)[some]
    k = len(scored["value"][0]) // PROMPTS["value"]
    fitted = [save.masked_mean(scored["value"][0].view(-1, k), torch.tensor([ended for *_, ended in items["value"]]), 1),
              scored["value"][1][::k]]
    once = top_of(Path(out, "start"), table, rm.model.score.weight[0])
    heads = [value_of(Path(out, "logs", f"value_{name}_{factor:g}_{i}"), one, items["value"], flags) for i, (one, flags)
             in enumerate(((once, ["--value_epochs", "1"]), (rm, [])))]
    guesses = {"1 epoch": once.value(features), "60 epochs": rm.value(features),
               "ridge": ridge_of(fitted[1], fitted[0])(features)}
    held, at = scored["heldout"]
    spread = rewards.std(1).mean().item()
    return {"state": heads[1], "spread": spread, "prompts": int(some.sum()),
            "r2": {key: r2_of(x[some], means) for key, x in guesses.items()},
            "splits": splits(held.view(-1, 2), rm.value(at[0::2]), spread), "heldout": held.view(-1, 2)}

def frozen_line(out, index):
    """The first line of real.jsonl: the reward models that runs start from, and V."""
    heads, line = torch.load(Path(out, "heads.pt"), weights_only=False), {}
    prompts, lengths = index["heldout"]["prompts"], [len(ids) - n for ids, n in index["heldout"]["chats"]]
    longer = [a > b for a, b in zip(lengths[0::2], lengths[1::2])]
    for file in sorted(Path(out, "value").glob("*.pt")):
        facts = torch.load(file, weights_only=False)
        correct, head = right(facts["heldout"]), heads[file.stem.split("_")[0]]
        ahead = torch.tensor(longer, dtype=torch.float)
        line[file.stem] = {
            "accuracy": with_interval(prompts, correct), "even": with_interval(prompts, correct, longer),
            "nll": with_interval(prompts, loss_at_best(facts["heldout"])), "longer": with_interval(prompts, 100 * ahead),
            "minus_longer": with_interval(prompts, correct - 100 * ahead), **facts, "cv": head["cv_accuracy"]}
        for name in ("state", "heldout"):
            del line[file.stem][name]
    return line

def main(args):
    """All stages -> out/real.jsonl."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    index = torch.load(out / "index.pt", weights_only=False) if (out / "index.pt").exists() else prepare(args, out)
    index = made(out, "index.pt", lambda: index)
    made(out, "heads.pt", lambda: heads_of(out))
    for name, factor in dict.fromkeys((spec.rm, spec.head) for spec in PLAN):
        made(out, f"value/{name}_{factor:g}.pt", lambda x=(name, factor): value_and_facts(out, *x))
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(run_once, [out] * len(PLAN), PLAN))
    whole_runs(args, out)
    write(out)

def whole_runs(args, out):
    """save.py itself, on all layers, with the policy in training: a few steps."""
    rows = {"prompts": [{"prompt": chat} for chat, _ in torch.load(out / "index.pt", weights_only=False)["0"]["items"]],
            "some": [json.loads(line) for line in (out / "heldout.jsonl").read_text().splitlines()[:100]]}
    for name, own in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    if not (out / "rm").is_dir():
        whole_of(out / "start", start_of(out, torch.zeros(1, 1), Spec()), out / "rm")
    for name, words in WHOLE.items():
        made(out, f"whole/{name}.pt", lambda words=words, name=name: shutil.rmtree(
            out / "whole" / name, ignore_errors=True) or real.call(
            *words, "--policy", args.model, "--rm", out / "rm", "--prompts", out / "prompts.jsonl", "--heldout",
            out / "some.jsonl", "--out", out / "whole" / name, *FLAGS.split(), "--steps", "4", "--group", "8", "--m0", "0",
            "--eval_every", "0"))

def write(out):
    """Lines of what is there: the frozen reward models, the runs, those on all layers, CPU minutes."""
    index, lines = torch.load(out / "index.pt", weights_only=False), []
    lines = [{"frozen": frozen_line(out, index)}]
    lines += [line_of(out, spec, index) for spec in PLAN if Path(out, f"runs/{name_of(spec)}.pt").exists()]
    for name in WHOLE:
        if (out / f"whole/{name}.pt").exists():
            steps = measure.Logs(out / "whole" / name).steps
            columns = "accuracy_some loss_some reward_shift reward_spread spread_after kl kept common_push".split()
            lines.append({"whole": name, **{column: [round(row[column], 5) for row in steps if column in row]
                                            for column in columns}})
    minutes = {}
    for row in measure.read_rows(out / "cpu.jsonl"):
        minutes[row["stage"]] = minutes.get(row["stage"], 0) + row["cpu_s"] / 60
    lines.append({"cpu_minutes": {name: round(x, 1) for name, x in minutes.items()}})
    (out / "real.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
