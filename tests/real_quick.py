"""SAVE, its rivals and controls on a small real model, for two CPU cores: `tests/real.py --quick`.

The reward model is the chat model cut after LAYERS layers; its head is fitted to GPT-4's preferences (Bradley-Terry and
ridge). Answers are sampled once, by a policy that stays as it is, and shared by all runs. Of the reward model only the
last TOP layers, norm and head learn: what enters them is computed once and stands in an embedding, so that a run is
save.py's own loop on row numbers of that table for token ids. All is resumable: what is in --out is not made again.
"""
import collections
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
FLAGS = ("--device cpu --dtype float32 --save_every 0 --steps 20 --eval_every 10 --batch 4 --max_new_tokens 64 "
         "--max_prompt_tokens 80 --value_k 4 --value_epochs 60 --micro_tokens 1024")

def made(out, name, make):
    """The file out/NAME, if it is not there from make(); its CPU seconds are a line of out/cpu.jsonl."""
    path, start = Path(out, name), sum(os.times()[:4])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = f"{path}.{os.getpid()}"  # two processes may make it at once
        torch.save(make(), mine)
        os.replace(mine, path)
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
def lower(rm, chats):
    """What enters the last TOP layers: a (length,H) tensor of each of `chats`."""
    base, states = rm.model.base_model, [None] * len(chats)
    with mock.patch.multiple(base, layers=base.layers[:-TOP], norm=nn.Identity()):
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
        made(out, f"hidden/{name}_{i:05d}.pt", lambda i=i: torch.cat(lower(rm, keys[i:i + 128])))
    ends = dict(zip(keys, itertools.accumulate(len(ids) for ids, _ in keys)))
    return [(range(end - len(ids), end), n) for ids, n in chats for end in [ends[tuple(ids), n]]]

def table_of(out, names):
    """(tokens,H) of some names, and where each begins."""
    files = [sorted(Path(out, "hidden").glob(f"{name}_*.pt")) for name in names]
    parts = [[torch.load(file, mmap=True) for file in own] for own in files]
    sizes = [sum(map(len, tables)) for tables in parts]
    return torch.cat(sum(parts, [])), dict(zip(names, [0, *itertools.accumulate(sizes)]))

def world_of(out, names):
    """The table of some names, {name: chats on it}, {name: items of `stored`}, the index of `prepare`."""
    index = torch.load(Path(out, "index.pt"), weights_only=False)
    table, begins = table_of(out, names)
    chats = {name: [(range(ids.start + begins[name], ids.stop + begins[name]), n) for ids, n in index[name]["chats"]]
             for name in names}
    items = {name: [(chat, [next(own) for _ in ended], ended) for chat, ended in index[name]["items"]]
             for name in names if "items" in index[name] for own in [iter(chats[name])]}
    return table, chats, items, index

def prepare(args, out):
    """Pairs, answers, hidden states -> {name: {"chats", "prompts" of pairs | "items" of answers}}."""
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

# ---- the reward model: a head in closed form, V
def bradley_terry_fit(gaps, weights, strength):
    """argmin_w of sum_i weights_i * -log sigmoid(gaps_i w) + strength / 2 |w|^2, convex, by Newton. gaps (n,H): chosen
    minus rejected, weights (n,), both fp64 -> (H,)."""
    w, weight = gaps.new_zeros(gaps.shape[1]), strength * torch.eye(gaps.shape[1], dtype=gaps.dtype)
    for _ in range(100):
        wrong = torch.sigmoid(-gaps @ w)
        hessian = gaps.T @ (gaps * (weights * wrong * (1 - wrong))[:, None]) + weight
        step = torch.linalg.solve(hessian, strength * w - gaps.T @ (weights * wrong))
        w = w - step
        if step.norm() <= 1e-12 + 1e-10 * w.norm():
            return w
    raise ArithmeticError("no minimum was found")

def even(longer):
    """Weights (n,) that sum to 1, half of it on the pairs whose chosen answer is the longer one, bool (n,)."""
    counts = [side.sum().double().clamp(min=1) for side in (longer, ~longer)]
    return torch.where(longer, 0.5 / counts[0], 0.5 / counts[1])

def longer_first(chats):
    """(n,) bool of pairs, chats two by two: whether the first answer has more tokens."""
    lengths = [len(ids) - n for ids, n in chats]
    return torch.tensor([a > b for a, b in zip(lengths[0::2], lengths[1::2])])

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
    read_only(rm)
    if head is not None:
        rm.model.score.weight.data = factor * head.float()[None]
    if value_head:
        rm.value_head.load_state_dict(value_head)
    return rm

def read_only(rm):
    """The last layer's MLP, most of its work, for the tokens that R and V are read from: no other has an effect."""
    mlp, read = rm.model.base_model.layers[-1].mlp, []
    every, features = mlp.forward, rm.features
    def features_of(input_ids, lengths, prompt_lengths):
        read[:] = [torch.arange(len(input_ids)).repeat(2), torch.cat([lengths, prompt_lengths]) - 1]
        return features(input_ids, lengths, prompt_lengths)
    mlp.forward = lambda x: torch.zeros_like(x).index_put(tuple(read), every(x[tuple(read)]))
    rm.features = features_of

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
    words = [*FLAGS.split(), "--batch", "32", "--value_prompts", str(len(items)), "--out", str(out), *flags]
    cfg = save.parse_config(words).checked()
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

# ---- numbers
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

def splits(rewards, values, spread, prompts):
    """Of pairs (n,2) that V (n,) splits, both answers `margin` spreads or more from it: how many, and the share, in %,
    with the chosen one in Y+: {margin: [count, share, low, high]}."""
    found, a = {}, save.rm_advantages(rewards, values)
    for margin in (0.0, 0.5, 1.0):
        rows = ((a[:, 0] * a[:, 1] < 0) & (a.abs() >= margin * spread).all(1)).nonzero()[:, 0].tolist()
        share = with_interval([prompts[row] for row in rows], 100.0 * (a[rows, 0] > 0)) if rows else []
        found[f"{margin:g}"] = [len(rows), *share]
    return found

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
    lr_value: float = 3e-5  # 6e-4: V follows what an update of SAVE does to all rewards of a group

MAIN = [("save", "own"), ("centred", "own"), ("hl_bt", "own"), ("mean_reward", "own"), ("offline", "gpt4"),
        ("centred", "random"), ("centred", "flipped"), ("centred", "gpt4")]
PLAN = [Spec(*pair, seed=seed) for pair in MAIN for seed in (0, 1)]
PLAN += [Spec(seed=seed, lr_value=6e-4) for seed in (0, 1)]
PLAN += [Spec(*pair, seed=seed) for pair in (("save", "random"), ("centred", "gpt4 random")) for seed in (0, 1)]
KEPT = [(0.03, 0), (0.1, 0), (0.1, 1), (0.3, 0), (1.0, 0), (1.0, 1)]  # lambda, seed
PLAN += [Spec("centred", keep=keep, seed=seed) for keep, seed in KEPT]
PLAN += [Spec(keep=keep, lr_value=6e-4, seed=seed) for keep, seed in KEPT]
PLAN += [Spec(*pair, lr=1e-5, seed=seed) for pair in MAIN[:5] for seed in (0, 1)]
PLAN += [Spec(update, **more) for more in ({"rm": "even"}, {"head": 5.0}) for update in ("save", "centred")]

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

def start_of(out, table, spec):
    """The reward model that a run starts from, on `table`."""
    head, value = made(out, "heads.pt", None)[spec.rm]["head"], made(out, f"value/{spec.rm}_{spec.head:g}.pt", None)
    return top_of(Path(out, "start"), table, head, value["state"], spec.head)

def name_of(spec):
    """The name of a run's files."""
    return "_".join(map(str, spec)).replace(" ", "-")

def run_once(out, spec):
    """out/runs/NAME.pt: rewards of the held-out pairs at every test, at the end also of pairs of the head's fit and of
    groups; out/base/NAME.pt: the same before."""
    torch.set_num_threads(1)
    if Path(out, f"runs/{name_of(spec)}.pt").exists():
        return
    table, chats, items, index = world_of(out, ["heldout", "train", str(spec.seed)])
    pairs, of_pairs = list(zip(chats["train"][0::2], chats["train"][1::2])), "gpt4" in spec.labels
    items = [([{"role": "user", "content": prompt}], pair, [True, True]) for prompt, pair
             in zip(index["train"]["prompts"], pairs)] if of_pairs else items[str(spec.seed)]
    named = {"rm_update": spec.update, "lr_rm": spec.lr, "lr_value": spec.lr_value, "keep": spec.keep,
             "seed": spec.seed, "out": Path(out, "logs", name_of(spec)), "group": 2 if of_pairs else GROUP}
    flags = [*FLAGS.split(), *(word for name, x in named.items() for word in (f"--{name}", str(x)))]
    flags += ["--m0", "0"] * (spec.head == 1) + ["--batch", "16"] * of_pairs  # as many answers
    cfg = save.parse_config(flags, kept.Config).checked()
    run = save.Run(cfg, start_of(out, table, spec))

    def rewards(chats, columns=2):
        return save.score(run.rm, chats, cfg.micro_tokens)[0].view(-1, columns)
    def rest():
        return {"own": rewards(chats["train"][:2 * OWN]), "groups": rewards(chats[str(spec.seed)][:20 * GROUP], GROUP)}
    before = made(out, f"base/{spec.rm}_{spec.head:g}_{spec.seed}.pt",
                  lambda: {"heldout": rewards(chats["heldout"]), **rest()})
    curve = []

    def heldout_accuracy(*_):
        curve.append(rewards(chats["heldout"]) if curve else before["heldout"])
    def trained():
        run.log, run.initial = save.Log(cfg), start_of(out, table, spec)
        run.optimizers["rm"] = save.ShardedAdamW(run.rm.model, cfg.lr_rm, cfg)
        if save.RM_UPDATES[spec.update].anchor == "value head":
            run.optimizers["value"] = save.ShardedAdamW(run.rm.value_head, cfg.lr_value, cfg)
        parts = {"sample": stored, "score_batch": score_batch, "label": labels_of(spec.labels),
                 "policy_step": lambda *_: None, "heldout_accuracy": heldout_accuracy}
        parts |= {"reward_model_step": kept.reward_model_step} if spec.keep else {}
        if spec.update == "offline":
            parts["reward_model_step"] = lambda run, *_: save.preference_step(run, pairs) or True
        with mock.patch.multiple(save, **parts):
            save.each_step(run, "save", items, {}, [])
        rows = measure.Logs(cfg.out).steps
        logs = {name: [row[name] for row in rows if name in row] for name in ("moved", "kept", "valid", "common_push")}
        return {**rest(), "curve": torch.stack(curve), "logs": logs}
    made(out, f"runs/{name_of(spec)}.pt", trained)

# ---- stages
def heads_of(out):
    """{"all" | "even": {"head": (H,), "strength", "cv_nll", "cv_accuracy"}}."""
    table, chats, _, index = world_of(out, ["train"])
    states = last_states(top_of(Path(out, "start"), table), chats["train"]).double()
    gaps, longer = states[0::2] - states[1::2], longer_first(chats["train"])
    weights = {"all": torch.full((len(gaps),), 1 / len(gaps), dtype=torch.double), "even": even(longer)}
    found = {name: head_of(gaps, share, index["train"]["prompts"]) for name, share in weights.items()}
    return {name: {"head": head, **row} for name, (head, row) in found.items()}

def value_and_facts(out, name, factor):
    """The value head for a head; of both accuracy, R2 on the prompts of the steps, pairs that V splits ->
    {"state", "line"}."""
    table, chats, items, index = world_of(out, [*PROMPTS, "heldout"])
    head = made(out, "heads.pt", None)[name]
    once, rm = (top_of(Path(out, "start"), table, head["head"], None, factor) for _ in range(2))
    scored = {key: save.score(rm, own, 1024) for key, own in chats.items()}
    rewards, features = ({key: x[i] for key, x in scored.items()} for i in (0, 1))
    means, prompts, used = {}, {}, {}
    for key, own in items.items():
        ended = torch.tensor([ended for *_, ended in own])
        used[key], prompts[key] = ended.any(1), features[key][::ended.shape[1]]
        means[key] = save.masked_mean(rewards[key].view(ended.shape), ended, 1)
    tested, target, some = (torch.cat([x["0"], x["1"]]) for x in (prompts, means, used))
    for rm_, flags in ((once, ["--value_epochs", "1"]), (rm, [])):
        value_of(Path(out, "logs", f"value_{name}_{factor:g}_{len(flags)}"), rm_, items["value"], flags)
    guesses = {"1 epoch": once.value(tested), "60 epochs": rm.value(tested),
               "ridge": ridge_of(prompts["value"][used["value"]], means["value"][used["value"]])(tested)}
    held, asked, longer = rewards["heldout"].view(-1, 2), index["heldout"]["prompts"], longer_first(chats["heldout"])
    ahead, spread = 100 * longer.float(), torch.cat([rewards[i].view(-1, GROUP).std(1) for i in "01"]).mean().item()
    line = {"cv_accuracy": head["cv_accuracy"], "accuracy": with_interval(asked, right(held)),
            "even": with_interval(asked, right(held), longer.tolist()), "longer": with_interval(asked, ahead),
            "minus_longer": with_interval(asked, right(held) - ahead), "nll": with_interval(asked, loss_at_best(held)),
            "pairs": len(held), "prompts": len({*asked}), "spread": spread, "v_prompts": int(some.sum()),
            "r2": {key: r2_of(x[some], target[some]) for key, x in guesses.items()},
            "splits": splits(held, rm.value(features["heldout"][::2]), spread, asked)}
    return {"state": rm.value_head.state_dict(), "line": line}

WHOLE = {"save_1e-06": ["save.py", "--lr_rm", "1e-6"], "save_1e-07": ["save.py", "--lr_rm", "1e-7"],
         "centred_1e-06": ["tests/forks/centred.py", "--lr_rm", "1e-6"]}  # all layers, and the policy learns

def whole_run(out, name, model):
    """save.py itself, on all layers, with the policy in training: two steps, 60 held-out pairs."""
    more = f"{FLAGS} --lr_value 3e-5 --steps 2 --eval_every 0 --m0 0 --group {GROUP}"
    words = ["--policy", model, "--rm", out / "rm", "--prompts", out / "prompts.jsonl", "--heldout",
             out / "some.jsonl", *more.split()]
    def run():
        shutil.rmtree(out / "whole" / name, ignore_errors=True)  # of a run that was killed
        real.call(*WHOLE[name], *words, "--out", out / "whole" / name)
    made(out, f"whole/{name}.pt", run)

def run_and_start(out, spec):
    """What a run wrote and what was known before it; held-out pairs: changes in accuracy and loss, (n,) each."""
    start, end = made(out, f"base/{spec.rm}_{spec.head:g}_{spec.seed}.pt", None), made(
        out, f"runs/{name_of(spec)}.pt", None)
    old, new = start["heldout"], end["curve"][-1]
    return start, end, {"gain": right(new) - right(old), "nll": loss_at_best(new) - loss_at_best(old)}

def line_of(out, spec, index):
    """A line of real.jsonl: the run minus the reward model it started from, paired, [change, low, high]."""
    start, end, change = run_and_start(out, spec)
    prompts, chats, own = index["heldout"]["prompts"], index["heldout"]["chats"], index["train"]["prompts"][:OWN]
    lengths = torch.tensor([float(len(ids) - n) for ids, n in chats])
    (guarded, chosen), old = best_of(end["curve"], prompts), start["heldout"]
    spread = [x["groups"].std(1).mean().item() for x in (start, end)]
    length = torch.corrcoef(torch.stack([lengths, end["curve"][-1].flatten()]))[0, 1].item()
    return {**spec._asdict(), "accuracy": [round(right(x).mean().item(), 2) for x in end["curve"]],
            **{name: with_interval(prompts, x) for name, x in change.items()},
            "even_gain": with_interval(prompts, change["gain"], longer_first(chats).tolist()),
            "own": with_interval(own, right(end["own"]) - right(start["own"])),
            "best": with_interval(prompts, right(guarded) - right(old)), "checkpoints": chosen,
            "best_nll": with_interval(prompts, loss_at_best(guarded) - loss_at_best(old)),
            "spread": round(spread[1] / spread[0], 3), "length": round(length, 3), "learned": len(end["logs"]["moved"]),
            **{name: [round(row[i], 4) for i in (0, len(row) // 2, -1)] for name, row in end["logs"].items() if row}}

def pooled(out, specs, index):
    """Lines of runs with both seeds: the mean of their changes, and how much better the RM's own labels did."""
    found, lines = {}, []
    for spec in specs:
        found.setdefault(spec._replace(seed=0), {})[spec.seed] = run_and_start(out, spec)[2]
    for spec, seeds in ((spec, seeds) for spec, seeds in found.items() if len(seeds) == 2):
        own = found.get(spec._replace(labels="own"), {}) if spec.labels != "own" else {}
        for name, others in (("mean of seeds", None), ("own minus these", own)):
            if others is None or len(others) == 2:
                changes = {x: sum((others[i][x] - seeds[i][x] if others else seeds[i][x]) for i in (0, 1)) / 2
                           for x in ("gain", "nll")}
                lines.append({name: name_of(spec), **{x: with_interval(index["heldout"]["prompts"], change)
                                                      for x, change in changes.items()}})
    return lines

LABELS = {"random": ", random labels", "flipped": ", labels flipped", "gpt4": ", GPT-4's verdicts",
          "gpt4 random": ", random verdicts"}
HEAD = ("update; lr_rm is 3e-5 where it is not named | accuracy, change: by seed, mean | NLL, change: by seed, mean | "
        "spread x | length | own pairs | moved, % | guard")

def row_name(spec):
    """What a run is called in `table`."""
    name = measure.NAMES.get(spec.update, spec.update) if spec.update != "offline" else "continual offline"
    name += LABELS.get(spec.labels, "") if spec.update != "offline" else ""
    words = {f", lambda {spec.keep:g}": spec.keep, f", lr_rm {spec.lr:g}": spec.lr != 3e-5,
             f", `--lr_value {spec.lr_value:g}`": spec.lr_value != 3e-5, f", head x {spec.head:g}": spec.head != 1,
             f", {spec.rm} head": spec.rm != "all"}
    return name + "".join(word for word, there in words.items() if there)

def table(lines):
    """Markdown lines of the runs among the lines of real.jsonl; both seeds of a run are one."""
    means = {line["mean of seeds"]: line for line in lines if "mean of seeds" in line}
    rows, shown = {}, [f"| {HEAD} |", "|---" * 8 + "|"]
    for line in (line for line in lines if "update" in line):
        spec = Spec(**{name: line[name] for name in Spec._fields})
        rows.setdefault(spec._replace(seed=0), []).append(line)
    for spec, own in rows.items():
        def each(text, number):
            return ", ".join(text.format(number(line)) for line in own)
        def change(name):
            mean = means[name_of(spec)][name] if len(own) == 2 else own[0][name]
            seeds = each("{:+.1f}", lambda line: line[name][0]) + ": " if len(own) == 2 else ""
            return seeds + "{:+.1f} [{:+.1f}, {:+.1f}]".format(*mean)
        cells = [row_name(spec) + (f" (seed {own[0]['seed']})" if len(own) == 1 else ""), change("gain"), change("nll"),
                 each("{:.2f}", lambda line: line["spread"]), each("{:.2f}", lambda line: line["length"]),
                 each("{:+.1f}", lambda line: line["own"][0]),
                 each("{:.0f}", lambda line: 100 * line.get("moved", [0])[0]),  # not there: it never learned
                 each("{:+.1f}", lambda line: line["best"][0])]
        shown.append(f"| {' | '.join(cells)} |")
    return shown

def write(out, index):
    """out/real.jsonl of what is there, and the table of its runs."""
    specs = [spec for spec in PLAN if Path(out, f"runs/{name_of(spec)}.pt").exists()]
    runs = [line_of(out, spec, index) for spec in specs]
    lines = [{"frozen": {file.stem: made(out, f"value/{file.name}", None)["line"]
                         for file in sorted(Path(out, "value").glob("*.pt"))}}, *runs, *pooled(out, specs, index)]
    columns = "accuracy_some loss_some reward_shift reward_spread spread_after kl kept common_push".split()
    for name in (name for name in WHOLE if (out / f"whole/{name}.pt").exists()):
        steps = measure.Logs(out / "whole" / name).steps
        lines.append({"whole": name, **{x: [round(row[x], 5) for row in steps if x in row] for x in columns}})
    minutes = collections.Counter()
    for row in measure.read_rows(out / "cpu.jsonl"):
        minutes[row["stage"]] += row["cpu_s"] / 60
    lines.append({"cpu_minutes": {name: round(x, 1) for name, x in minutes.items()}})
    (out / "real.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print("\n".join(table(lines)))

def at_work(out, task):
    """One of (function, arguments after `out`), in a process of its own."""
    task[0](out, *task[1:])

def main(args):
    """All stages -> out/real.jsonl."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.jobs)
    index = None if (out / "index.pt").exists() else prepare(args, out)
    index = made(out, "index.pt", lambda: index)
    made(out, "heads.pt", lambda: heads_of(out))
    for name, factor in dict.fromkeys((spec.rm, spec.head) for spec in PLAN):
        made(out, f"value/{name}_{factor:g}.pt", lambda x=(name, factor): value_and_facts(out, *x))
    if not (out / "rm").is_dir():
        whole_of(out / "start", start_of(out, torch.zeros(1, 1), Spec()), out / "rm")
    files = {"prompts": [{"prompt": chat} for chat, _ in index["0"]["items"]],
             "some": map(json.loads, (out / "heldout.jsonl").read_text().splitlines()[:60])}
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    todo = [(whole_run, name, args.model) for name in WHOLE] + [(run_once, spec) for spec in PLAN]
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(at_work, [out] * len(todo), todo))
    write(out, index)
