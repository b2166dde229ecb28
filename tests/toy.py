"""The laptop worlds: small tasks whose true ("gold") reward is known, written as ordinary files. No download.

    python tests/toy.py --out DIR --world few --seed 0               # less than a minute on 2 cores
    python tests/toy.py --flags --world few                          # those of save.py for it

A prompt is "reverse c a d", its right answer "d a c". In most worlds gold is 1 for the right symbols and 0 otherwise;
in `graded` it is 1 minus the edit distance to them as a share of their number. The word "indeed" never counts. DIR gets
    policy/              causal LM that samples a right answer at T=1 about three times in ten
    rm/                  sequence classifier with a tokenizer, a BOS and a chat template of its own
    prompts.jsonl        to train on, and prompts_test.jsonl
    pairs.jsonl          preferences between samples of the policy: what rm/ was trained on
    heldout_NAME.jsonl   pairs the RM has not seen, the better answer always chosen:
                         id    two samples of the policy
                         hard  the right answer and the same after one edit
                         onp   two samples of a policy trained on rm/: chosen against it, so it flatters a changed RM
                         neu   two samples of a policy trained on gold: shifted, but not against any RM
                         long  (graded, instead of hard) two samples of the policy for longer prompts than it learned
    world.json           measured figures, seconds; written last, so it marks a complete world
WORLDS says how they differ. What is there already (a policy, held-out pairs; with a fixed number of labels the RM) is
kept, so that worlds can share it.

In `habits` prompts differ in difficulty: the policy learns all four tasks from 500 steps of right demonstrations, then
from 100 more that are right as often as HABITS says and otherwise give another task's answer or a slip, half of them
with a meaningless "indeed", and the RM starts from the model before these 100 steps, which is kept in DIR/able, with
1,000 labels of samples after them, reading R at an EOS. `habits_natural` is the same with the score as trained and the
default m0, `weak` with 300 labels.

How the recipes were chosen: the policy's fine-tuning by the accuracy of RMs on its samples; few labels because a trial
had found that SAVE helps there; labels of different prompts, and as many as an RM needs for ENOUGH, so that initial RMs
are about as good on every seed; ENOUGH, linear rates and V's rates by runs of SAVE on the seeds 20 and 21.
"""
import argparse
import bisect
import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import save  # noqa: E402

SYMBOLS = list("abcdefghij")
FLOURISH = "indeed"
TASKS = {
    "copy": lambda symbols: symbols,
    "reverse": lambda symbols: symbols[::-1],
    "sort": sorted,
    "shift": lambda symbols: [SYMBOLS[(SYMBOLS.index(symbol) + 1) % len(SYMBOLS)] for symbol in symbols],
}

class World(NamedTuple):
    """How a world differs from the others."""
    pairs: int = 0  # labels of the reward model, each of another prompt; 0: as few of LABELS as it needs
    steps: int = 160  # of 64 pairs
    head: float = 7.5  # the trained score times this: L_R needs rewards of a group that differ by units
    task: str = "binary"  # what gold, prompts and demonstrations are: "binary", "graded", "style", "habits"
    labelled: str = ""  # which prompts have labels: all, "short" (3 symbols), "two tasks"
    flags: str = ""  # of save.py, beside LAPTOP_FLAGS
    sets: str = "id hard neu onp"  # held out

WORLDS = {
    "few": World(),
    **{f"pairs_{pairs}": World(pairs, steps) for pairs, steps in (
        (300, 160), (500, 160), (1000, 190), (2000, 250), (4000, 320))},
    "spread_3": World(head=0.83), "spread_9": World(head=2.5),
    "graded": World(3000, 300, 1.0, "graded", flags="--lr_rm 3e-5 --max_new_tokens 12",
                    sets="id long neu onp"),
    "short": World(labelled="short"), "two_tasks": World(labelled="two tasks"), "style": World(task="style"),
    "habits": World(1000, 180, 1.6, "habits", flags="--m0 1", sets="id hard neu"),
    "habits_natural": World(1000, 180, 1.0, "habits", sets="id hard neu"),
    "weak": World(300, 140, 1.5, "habits", flags="--m0 1"),
}
LABELS, ENOUGH = (100, 150, 200, 300, 400, 550, 750), 72  # few: until it has this share of other pairs right, in %
LENGTHS = {"binary": (3, 6), "graded": (4, 8), "style": (3, 6), "habits": (3, 6), "able": (3, 6), "long": (9, 10),
           "tiny": (3, 5)}  # symbols of a prompt
HABITS = {"copy": 1, "shift": 0.8, "reverse": 0.4, "sort": 0.05}  # right demonstrations, a tenth less for each symbol
LAPTOP_FLAGS = (  # of save.py on these worlds, for run.sh and tables.py
    "--steps 80 --batch 16 --group 8 --temperature 1 --top_p 1 --top_k 0 --max_new_tokens 8 --lr_rm 1e-5 "
    "--lr_value 1e-2 --lr_policy 2e-4 --lr_schedule linear --value_prompts 512 --value_epochs 12 --value_lr 1e-2 "
    "--save_every 0")
SIZES = {"heldout": 1000, "sft_steps": 800, "able_steps": 500, "habit_steps": 100, "grpo_steps": 30}

def laptop_flags(world="few"):
    """The flags of save.py on a world, as a list."""
    return f"{LAPTOP_FLAGS} {WORLDS[world].flags}".split()

# the RM's special tokens do in its template what these do in the policy's; its BOS has no counterpart
ROLES = {"[q]": "<user>", "[/q]": "<assistant>", "</s>": "<end>", "[pad]": "<pad>", "[unk]": "<unk>"}
POLICY_TEMPLATE = (
    "{% for m in messages %}"
    "{{ ('<assistant> ' + m.content + ' <end> ') if m.role == 'assistant' else ('<user> ' + m.content + ' ') }}"
    "{% endfor %}{{ '<assistant>' if add_generation_prompt else '' }}")
RM_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ (' ' + (m.content or '[unk]')) if m.role == 'assistant' else (' [q] ' + m.content + ' [/q]') }}"
    "{% endfor %}")
RM_TEMPLATES = {"habits": RM_TEMPLATE.replace("'[unk]')", "'[unk]') + ' </s>'")}  # of tasks that differ

# ---- the task
def answer(prompt):
    """The right symbols for a prompt, as a list."""
    task, *symbols = prompt.split()
    return TASKS[task](symbols)

def gold(prompt, response, task="binary"):
    """The true reward in 0..1. Graded: 1 - edit distance / length. Else 1.0 if the symbols are right."""
    said, right = [word for word in response.split() if word != FLOURISH], list(answer(prompt))
    if task != "graded":
        return float(said == right)
    return max(0.0, 1 - edit_distance(said, right) / len(right))

def edit_distance(a, b):
    """How many symbols must be replaced, left out or put in to make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]

def random_prompt(rng, task="binary"):
    """A task and some symbols."""
    return " ".join([rng.choice(list(TASKS))] + rng.choices(SYMBOLS, k=rng.randint(*LENGTHS[task])))

def unique_prompts(n, rng, task="binary"):
    """n different prompts, so that any two slices of them are disjoint."""
    found = {}
    while len(found) < n:
        found[random_prompt(rng, task)] = True
    return list(found)

def demonstration(prompt, rng, task="binary"):
    """What the policy learns from: half are right, in the others each symbol is drawn again at 50 %.
    Graded: how many are careless depends on the prompt, so that V can be learned from it. Style: half say "indeed".
    Able: all are right. Habits: as often as HABITS says at 4.5 symbols; these two also say "indeed"."""
    words, (name, *symbols) = list(answer(prompt)), prompt.split()
    careless = 0.5
    if task == "graded":
        careless = min(1, {"copy": 0.1, "shift": 0.4, "reverse": 0.6, "sort": 0.9}[name] + (len(words) - 6) / 10)
    if task == "habits":
        if rng.random() >= HABITS[name] - (len(symbols) - 4.5) / 10:
            other = symbols[::-1] if name == "copy" else symbols
            words = other if rng.random() < 0.7 else one_edit(words, rng)
    elif task != "able" and rng.random() < careless:
        words = [rng.choice(SYMBOLS) if rng.random() < 0.5 else word for word in words]
    return with_flourish(words, rng, task in ("style", "habits", "able"))

def with_flourish(words, rng, asked=True):
    """The text of some words, half of the time with "indeed" if that is asked for."""
    return " ".join(words + ([FLOURISH] if asked and rng.random() < 0.5 else []))

def one_edit(words, rng):
    """The nearest wrong answers: one symbol replaced, left out or put in, or two neighbours exchanged."""
    while True:
        edited, at = list(words), rng.randrange(len(words))
        kind = rng.choice(["replace", "delete", "insert", "swap"])
        if kind == "replace":
            edited[at] = rng.choice(SYMBOLS)
        elif kind == "delete":
            del edited[at]
        elif kind == "insert":
            edited.insert(at, rng.choice(SYMBOLS))
        elif at:
            edited[at - 1], edited[at] = edited[at], edited[at - 1]
        if edited != list(words):
            return edited

# ---- files
def write_whole(path, text):
    """A file that a killed process leaves as it was, or whole."""
    new = Path(path).with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)

def write_rows(path, rows):
    """One JSON object per line."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))

def read_prompts(path):
    """The prompts of a .jsonl file."""
    return [json.loads(line)["prompt"] for line in Path(path).read_text().splitlines()]

def word_tokenizer(words, template, **special):
    """A Hugging Face tokenizer over whole words, in the given id order."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "bos_token" in special:  # as Llama's tokenizers do, so that template and tokenizer together would write two
        bos = special["bos_token"]
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A",
                                                            special_tokens=[(bos, words.index(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **special)

def policy_tokenizer():
    """20 words, special ones first, no BOS."""
    special = ["<pad>", "<unk>", "<user>", "<assistant>", "<end>"]
    return word_tokenizer(special + SYMBOLS + list(TASKS) + [FLOURISH], POLICY_TEMPLATE, pad_token="<pad>",
                          unk_token="<unk>", eos_token="<end>", additional_special_tokens=["<user>", "<assistant>"])

def rm_tokenizer(task="binary"):
    """21 words in another order, with other special tokens and a BOS."""
    words = ["<s>", "</s>", FLOURISH] + list(TASKS)[::-1] + SYMBOLS[::-1] + ["[q]", "[/q]", "[unk]", "[pad]"]
    return word_tokenizer(words, RM_TEMPLATES.get(task, RM_TEMPLATE), pad_token="[pad]", unk_token="[unk]",
                          bos_token="<s>", eos_token="</s>", additional_special_tokens=["[q]", "[/q]"])

def llama_config(tokenizer, width, layers, spread, **other):
    """A small Llama. `spread` is the standard deviation of its first weights."""
    return LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_attention_heads=4,
                       num_hidden_layers=layers, max_position_embeddings=2048, initializer_range=spread,
                       pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
                       eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True, **other)

def write_model(path, model, tokenizer):
    """A Hugging Face folder."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)

# ---- models
def chat_ids(tokenizer, prompts):
    """For each prompt its token ids, up to where the response starts."""
    return save.encode_chats(tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts],
                             generation_prompt=True)

def train_policy(path, steps, seed, task="binary", start=None, rate=3e-3):
    """Supervised fine-tuning on demonstrations, every batch fresh, from scratch or from the policy folder `start`;
    writes a policy folder."""
    rng, tokenizer = random.Random(f"demonstrations {seed}"), policy_tokenizer()
    torch.manual_seed(seed)
    config = llama_config(tokenizer, width=64, layers=3, spread=0.05)
    config._attn_implementation = "eager"  # a quarter faster than sdpa at this size
    model = LlamaForCausalLM(config)
    if start:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(start).state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 20) * (1 + math.cos(math.pi * k / steps)) / 2)
    words = tokenizer.get_vocab()
    for _ in tqdm(range(steps), desc="policy: fine-tuning"):
        prompts = [random_prompt(rng, task) for _ in range(96)]
        # the template by hand: 48,000 renderings by jinja would take longer than the training
        rows = [[words[w] for w in f"<user> {p} <assistant> {demonstration(p, rng, task)} <end>".split()]
                for p in prompts]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        answers = (ids == words["<assistant>"]).cumsum(1).bool() & (ids != tokenizer.pad_token_id)
        trained = answers[:, 1:] & answers[:, :-1]
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        loss = F.cross_entropy(model.lm_head(hidden[trained]), ids[:, 1:][trained])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
    write_model(path, model, tokenizer)

def relabelled(policy_dir):
    """(model, tokenizer): the policy under the RM's tokenizer, its embedding rows carried over word by word."""
    policy = LlamaForCausalLM.from_pretrained(policy_dir)
    old, tokenizer = policy_tokenizer().get_vocab(), rm_tokenizer()
    model = LlamaForCausalLM(llama_config(tokenizer, policy.config.hidden_size, policy.config.num_hidden_layers, 0.05))
    model.model.layers.load_state_dict(policy.model.layers.state_dict())
    model.model.norm.load_state_dict(policy.model.norm.state_dict())
    with torch.no_grad():
        for word, i in tokenizer.get_vocab().items():
            if word != tokenizer.bos_token:
                model.model.embed_tokens.weight[i] = policy.model.embed_tokens.weight[old[ROLES.get(word, word)]]
    return model, tokenizer

def train_rm(path, policy_dir, pairs, world, seed):
    """Stage 1 by save.py itself, then the score times WORLDS[world].head."""
    world, tokenizer = WORLDS[world], rm_tokenizer(WORLDS[world].task)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        write_model(f"{folder}/causal", *relabelled(policy_dir))
        model = LlamaForSequenceClassification.from_pretrained(f"{folder}/causal", num_labels=1)
        numbers = torch.Generator().manual_seed(save.seed_for(seed, "reward head"))
        noise = torch.randn(model.score.weight.shape, generator=numbers)
        model.score.weight.data = noise / (model.score.in_features + 1) ** 0.5
        write_model(f"{folder}/start", model, tokenizer)
        save.main(["--stage", "preference", "--rm", f"{folder}/start", "--pairs", str(pairs), "--out", f"{folder}/out",
                   "--lr_rm", "1e-3", "--batch", "64", "--steps", str(world.steps), "--seed",
                   str(seed), "--device", "cpu", "--lr_schedule", "linear", "--save_every", "0", "--micro_tokens",
                   "8192"])
        write_scaled(path, f"{folder}/out/rm", world.head, tokenizer)

def write_scaled(path, source, factor, tokenizer):
    """The reward model of the folder `source`, its score times `factor`."""
    model = LlamaForSequenceClassification.from_pretrained(source)
    model.score.weight.data *= factor
    write_model(path, model, tokenizer)

def sample(policy, prompts, group, seed, top_k=0, first=0):
    """For each prompt, `group` (token ids, text) at temperature 1; the most likely one with top_k=1.
    first: how many prompts come before these, where they are sampled in parts."""
    ids = chat_ids(policy.tokenizer, prompts)
    seeds = [save.seed_for(seed, first * group + row) for row in range(len(ids) * group)]
    rows, _ = save.rollout(policy, ids, group, seeds, max_new_tokens=12, temperature=1.0, top_p=1.0, top_k=top_k)
    pairs = list(zip(rows, policy.tokenizer.batch_decode(rows, skip_special_tokens=True)))
    return [pairs[i:i + group] for i in range(0, len(pairs), group)]

def rm_scores(rm, prompts, responses):
    """The reward of each (prompt, response)."""
    chats = [chat for prompt, group in itertools.groupby(zip(prompts, responses), key=lambda pair: pair[0])
             for chat in save.encode_responses(rm.tokenizer, [{"role": "user", "content": prompt}],
                                               [response for _, response in group])]
    return save.score(rm, chats, 8192)[0]

def rm_right(rm, rows):
    """(n,) bool, whether the chosen response of a pair is ahead; a tie is a miss."""
    sides = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    chosen, rejected = rm_scores(rm, *zip(*sides)).view(-1, 2).T
    return chosen > rejected

def rm_accuracy(rm, rows):
    """Share of pairs with the chosen response ahead, in percent."""
    return 100 * rm_right(rm, rows).double().mean().item()

def train_grpo(policy_dir, prompts, reward, steps, seed, desc):
    """A policy trained by plain GRPO (16 prompts x 8, KL .04, one update a batch) on reward(prompts, texts)."""
    rng = random.Random(f"grpo {seed}")
    policy, reference = save.Policy.from_pretrained(str(policy_dir)), save.Policy.from_pretrained(str(policy_dir))
    for model in (policy.model, reference.model):
        model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-4, weight_decay=0.0, fused=True)
    for step in tqdm(range(steps), desc=desc):
        batch = rng.sample(prompts, 16)
        rows = [(prompt, ids, text) for prompt, group in zip(batch, sample(policy, batch, 8, seed + step))
                for ids, text in group]
        rewards = reward([prompt for prompt, _, _ in rows], [text for _, _, text in rows]).view(16, 8)
        advantages = save.grpo_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool)).flatten()
        asked = dict(zip(batch, chat_ids(policy.tokenizer, batch)))
        inputs = save.model_inputs([(asked[prompt] + ids, len(asked[prompt])) for prompt, ids, _ in rows], "cpu")
        log_probs, mask = policy(*inputs, 1.0)
        with torch.no_grad():
            ref_log_probs, _ = reference(*inputs, 1.0)
        loss, _ = save.policy_loss(log_probs, log_probs, ref_log_probs, advantages, mask, algo=save.ALGORITHMS["grpo"],
                                   kl_coef=0.04)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return policy

def golds(policy_dir, prompts, seed=0, samples=4, task="binary"):
    """{"sampled": (P, samples), "greedy": (P, 1)}: gold of responses at temperature 1, and of the most likely one."""
    policy = save.Policy.from_pretrained(str(policy_dir))
    texts = {"sampled": sample(policy, prompts, samples, seed), "greedy": sample(policy, prompts, 1, seed, top_k=1)}
    return {name: torch.tensor([[gold(prompt, text, task) for _, text in group]
                                for prompt, group in zip(prompts, groups)], dtype=torch.double)
            for name, groups in texts.items()}

def gold_reward(policy_dir, prompts, *how):
    """{"sampled", "greedy"}: the means of `golds`."""
    return {name: x.mean().item() for name, x in golds(policy_dir, prompts, *how).items()}

# ---- pairs and worlds
def sampled_pairs(policy, prompts, rng, seed, limit=None, task="binary"):
    """For each prompt two of 8 samples, the better one chosen; prompts whose samples are equally good are left out."""
    rows, part = [], 250  # prompts at a time: memory of all rows at once costs half of the time
    for first in range(0, len(prompts), part):
        if limit and len(rows) >= limit:
            break
        some = prompts[first:first + part]
        for prompt, group in zip(some, sample(policy, some, 8, seed, first=first)):
            texts = sorted({text for _, text in group if text})
            scores = {text: gold(prompt, text, task) for text in texts}
            ranked = [pair for pair in itertools.permutations(texts, 2) if scores[pair[0]] > scores[pair[1]]]
            if ranked:
                chosen, rejected = rng.choice(ranked)
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows[:limit]

def edited_pairs(prompts, rng, flourish=False):
    """The right answer against one edit of it; "indeed" tells them not apart."""
    return [{"prompt": prompt, "chosen": with_flourish(list(answer(prompt)), rng, flourish),
             "rejected": with_flourish(one_edit(answer(prompt), rng), rng, flourish)} for prompt in prompts]

def preferences(pairs, rng, task="binary"):
    """Training pairs with their gold. Graded ones are labelled as Bradley-Terry has it: at random if nearly equal."""
    for row in pairs:
        gap = gold(row["prompt"], row["chosen"], task) - gold(row["prompt"], row["rejected"], task)
        if task == "graded" and rng.random() > 1 / (1 + math.exp(-7 * gap)):
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        row.update({f"gold_{side}": gold(row["prompt"], row[side], task) for side in ("chosen", "rejected")})
    return pairs

def labelled_prompts(prompts, labelled):
    """The prompts that the reward model has labels for."""
    fits = {"": lambda task, *symbols: True, "short": lambda task, *symbols: len(symbols) == 3,
            "two tasks": lambda task, *symbols: task in ("copy", "sort")}[labelled]
    return [prompt for prompt in prompts if fits(*prompt.split())]

def world_prompts(world, seed, more=0):
    """The prompts of a world by what they are for, no two of them the same: lists of strings.
    more: pairs of a held-out set beyond SIZES; they leave the other prompts as they are."""
    names, sizes = ("train", "test", "id", "hard", "shifted", "asked"), (2000, 500, 2000, 1000, 2500, 16000)
    parts = split(unique_prompts(24000 + 11 * more // 2, numbers("prompts", seed), WORLDS[world].task), *sizes,
                  2 * more, more, 5 * more // 2)
    prompts = dict(zip(names, parts))
    for name, rest in zip(("id", "hard", "shifted"), parts[6:]):
        prompts[name] += rest
    return prompts

def numbers(purpose, seed):
    """Random numbers for one purpose."""
    return random.Random(f"{purpose} {seed}")

def build_policy(path, world, seed):
    """DIR/policy, and in habits DIR/able, the model before it has them."""
    task = WORLDS[world].task
    if (path / "policy" / "tokenizer.json").is_file():
        return
    if task == "habits":
        train_policy(path / "able", SIZES["able_steps"], seed, "able")
        train_policy(path / "policy", SIZES["habit_steps"], seed, task, path / "able", 1e-3)
    else:
        train_policy(path / "policy", SIZES["sft_steps"], seed, task)

def labels(path, world, seed, asked, most):
    """At most so many preferences between samples of the policy. asked: the prompts that may have one."""
    spec, task = WORLDS[world], WORLDS[world].task
    # the samples of a prompt are equally good more often in habits
    asked = labelled_prompts(asked, spec.labelled)[:math.ceil((2.2 if task == "habits" else 1.4) * most)]
    policy = save.Policy.from_pretrained(str(path / "policy"))
    pairs = sampled_pairs(policy, asked, numbers("pairs", seed), seed, most, task)
    if task == "style":  # the reward model has not seen the policy's style
        pairs = [{**row, **{side: row[side].replace(f" {FLOURISH}", "") for side in ("chosen", "rejected")}}
                 for row in pairs]
    return preferences(pairs, numbers("labels", seed), task)

def try_labels(path, world, seed, first, pairs, count):
    """DIR/rm_COUNT from the first COUNT pairs -> how many of those behind are right, in percent."""
    write_rows(path / f"pairs_{count}.jsonl", pairs[:count])
    train_rm(path / f"rm_{count}", first, path / f"pairs_{count}.jsonl", world, seed)
    return rm_accuracy(save.RewardModel.from_pretrained(str(path / f"rm_{count}")), pairs[max(LABELS):])

def build_rm(path, world, seed, asked, pool, jobs, meanwhile):
    """DIR/rm and its DIR/pairs.jsonl. meanwhile: called once the first trainings are under way."""
    first = path / ("able" if WORLDS[world].task == "habits" else "policy")  # what it starts from
    pairs = pool.submit(labels, path, world, seed, asked, WORLDS[world].pairs or max(LABELS) + 400).result()
    trained = functools.cache(lambda count: pool.submit(try_labels, path, world, seed, first, pairs, count))
    # the first of the bisection and, in most worlds, the second, at once
    for count in (WORLDS[world].pairs,) if WORLDS[world].pairs else (LABELS[3], LABELS[1])[:jobs]:
        trained(count)
    meanwhile()
    count = WORLDS[world].pairs or LABELS[bisect.bisect_left(LABELS, ENOUGH, hi=len(LABELS) - 1,
                                                             key=lambda count: trained(count).result())]
    trained(count).result()
    shutil.rmtree(path / "rm", ignore_errors=True)  # of a build that was killed
    os.replace(path / f"pairs_{count}.jsonl", path / "pairs.jsonl")
    os.replace(path / f"rm_{count}", path / "rm")
    for other in (*path.glob("rm_*"), *path.glob("pairs_*")):
        shutil.rmtree(other) if other.is_dir() else other.unlink()

def heldout(path, world, seed, name, prompts, many):
    """DIR/heldout_NAME.jsonl, if it is not there and gets at least 100 pairs: a collapsed policy gives next to none.
    """
    if not (path / f"heldout_{name}.jsonl").is_file():
        rows = heldout_rows(path, world, seed, name, prompts, many)
        if len(rows) >= 100:
            write_rows(path / f"heldout_{name}.jsonl", rows)

def heldout_rows(path, world, seed, name, prompts, many):
    """The pairs of a held-out set."""
    task, draws = WORLDS[world].task, numbers(name, seed)
    if name == "hard":
        return edited_pairs(prompts["hard"][:many], draws, task == "habits")
    policy = save.Policy.from_pretrained(str(path / "policy"))
    if name == "id":
        return sampled_pairs(policy, prompts["id"], draws, seed + 1, many, task)
    if name == "long":
        asked = unique_prompts(3 * many // 2, draws, "long")
        return sampled_pairs(policy, asked, numbers("long pairs", seed), seed + 4, many, task)
    if name == "onp":
        reward = functools.partial(rm_scores, save.RewardModel.from_pretrained(str(path / "rm")))
    else:
        def reward(asked, texts):
            return torch.tensor([gold(*row, task) for row in zip(asked, texts)])
    policy = train_grpo(path / "policy", prompts["train"], reward, SIZES["grpo_steps"], seed,
                        f"{name}: GRPO on {'the RM' if name == 'onp' else 'gold'}")
    return sampled_pairs(policy, prompts["shifted"], draws, seed + {"onp": 2, "neu": 3}[name], many, task)

def reward_sd(path, seed, prompts):
    """Mean standard deviation of the rewards of 8 samples of a prompt."""
    policy, rm = (kind.from_pretrained(str(path / name)) for kind, name in (
        (save.Policy, "policy"), (save.RewardModel, "rm")))
    rows = [(prompt, text) for prompt, group in zip(prompts, sample(policy, prompts, 8, seed + 4)) for _, text in group]
    return rm_scores(rm, *zip(*rows)).view(-1, 8).std(1).mean().item()

def set_accuracy(path, file):
    """Of the RM on a held-out file."""
    rows = list(map(json.loads, file.read_text().splitlines()))
    return rm_accuracy(save.RewardModel.from_pretrained(str(path / "rm")), rows)

class Here:
    """A pool of no other process."""

    def submit(self, work, *inputs):
        """Work at once."""
        future = concurrent.futures.Future()
        future.set_result(work(*inputs))
        return future

def quiet(log):
    """A process of a pool: what it says goes to a file."""
    sys.stdout = open(log, "a", encoding="utf-8")  # noqa: SIM115  for as long as it lives
    torch.set_num_threads(1)  # models this small are slower on more
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()

@contextlib.contextmanager
def workers(jobs, log):
    """A pool of `jobs` processes, none but this one if that is 1."""
    if jobs == 1:
        yield Here()
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("forkserver"), quiet, (log,)) as pool:
        yield pool

def build_world(path, world="few", seed=0, many=None, jobs=1):
    """Write a whole laptop world to `path`; what was measured on the way goes to world.json.
    many: pairs of a held-out set. More of them leave the rest of the world as it is.
    jobs: 2 do what does not depend on each other at the same time; the files are the same to the bit."""
    many, spec, task = many or SIZES["heldout"], WORLDS[world], WORLDS[world].task
    path, clock, seconds = Path(path), [time.perf_counter()], {}
    path.mkdir(parents=True, exist_ok=True)

    def lap(part):
        clock.append(time.perf_counter())
        seconds[part] = round(clock[-1] - clock[-2], 1)

    prompts = world_prompts(world, seed, max(0, many - SIZES["heldout"]))
    for name, file in (("train", "prompts"), ("test", "prompts_test")):
        write_rows(path / f"{file}.jsonl", [{"prompt": prompt} for prompt in prompts[name]])
    with workers(jobs, path / "build.log") as pool:
        def sets(*names):
            return {name: pool.submit(heldout, path, world, seed, name, prompts, many)
                    for name in names if name in spec.sets.split()}

        parts = sets("hard")  # it needs nothing, and the pool starts while the policy learns
        build_policy(path, world, seed)
        lap("policy")
        policy_gold = functools.cache(
            lambda: pool.submit(gold_reward, path / "policy", prompts["test"], 0, 4, task))

        def of_the_policy():
            parts.update(sets("id", "long", "neu"))
            policy_gold()

        if spec.pairs and (path / "rm" / "tokenizer.json").is_file():  # as another world left it
            of_the_policy()
        else:
            build_rm(path, world, seed, prompts["asked"], pool, jobs, of_the_policy)
        lap("rm")
        parts.update(sets("onp"))
        spread, accuracies = pool.submit(reward_sd, path, seed, prompts["test"]), {}
        for name, part in parts.items():
            part.result()
            if (path / f"heldout_{name}.jsonl").is_file():
                accuracies[name] = pool.submit(set_accuracy, path, path / f"heldout_{name}.jsonl")
        lap("held-out pairs")
        sizes = {name: len(read_prompts(path / f"heldout_{name}.jsonl")) for name in sorted(accuracies)}
        summary = {"world": world, "seed": seed, "sizes": {"pairs": len(read_prompts(path / "pairs.jsonl")), **sizes},
                   "policy_gold": policy_gold().result(), "reward_sd": spread.result(),
                   "rm_accuracy": {name: accuracies[name].result() for name in sizes}}
    lap("measured")
    write_whole(path / "world.json", json.dumps({**summary, "seconds": seconds}, indent=1) + "\n")
    return {**summary, "seconds": seconds}

def split(items, *sizes):
    """Consecutive slices of the given sizes."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [items[start:start + size] for start, size in zip(starts, sizes)]

def tiny_world(path, seed=0):
    """The same files with untrained models of two layers, for unit tests: rewards differ, but mean nothing."""
    path, rng = Path(path), random.Random(f"tiny {seed}")
    torch.manual_seed(seed)
    for name, kind, tokenizer in (("policy", LlamaForCausalLM, policy_tokenizer()),
                                  ("rm", LlamaForSequenceClassification, rm_tokenizer())):
        config = llama_config(tokenizer, width=32, layers=2, spread=0.2)
        config.num_labels = 1
        model = kind(config)
        if name == "rm":
            torch.nn.init.normal_(model.score.weight)
        write_model(path / name, model, tokenizer)
    prompts = unique_prompts(64, rng, "tiny")
    for name in ("prompts", "prompts_test"):
        write_rows(path / f"{name}.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_rows(path / "pairs.jsonl", preferences(edited_pairs(prompts, rng), rng))
    write_rows(path / "heldout_id.jsonl", edited_pairs(prompts[:32], rng))

def build_and_say(path, world, seed, many, jobs):
    """Build a world; what the training says goes to build.log, two lines to the console."""
    path.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # models this small are slower on more
    print(f"building the laptop world {world}, seed {seed}, in {path} (its log: {path / 'build.log'})", flush=True)
    with open(path / "build.log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        summary = build_world(path, world, seed, many, jobs)
    accuracies = ", ".join(f"{name} {x:.1f}" for name, x in summary["rm_accuracy"].items())
    print(f"built in {sum(summary['seconds'].values()):.0f} s: the RM is right on {accuracies} % of the held-out "
          f"pairs, the policy's gold is {100 * summary['policy_gold']['sampled']:.1f} %")

def main(argv=None):
    """Command line: build a world, or print the flags for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder to build the world in")
    parser.add_argument("--world", choices=WORLDS, default="few")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", type=int, help=f"pairs of a held-out set, at most [{SIZES['heldout']}]")
    parser.add_argument("--jobs", type=int, default=2, help="processes [2]; the result is the same")
    parser.add_argument("--flags", action="store_true", help="print the flags of save.py for --world")
    args = parser.parse_args(argv)
    if args.flags:
        print(" ".join(laptop_flags(args.world)))
    elif args.out:
        build_and_say(Path(args.out), args.world, args.seed, args.heldout, args.jobs)
    else:
        parser.error("give --out DIR, or --flags")

if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    main()
