"""The laptop world: a small task whose true ("gold") reward is known, written as ordinary files. No download.

    python tests/toy.py --out DIR --world annealed --seed 0          # about a minute on 2 cores
    python tests/toy.py --gold DIR/policy OTHER --prompts FILE       # one line per policy: its gold reward

A prompt is "reverse c a d", its only right answer "d a c". Gold is 1 for the right symbols and 0 otherwise; the word
"indeed" carries no meaning and never counts. DIR gets
    policy/              causal LM that samples a right answer at T=1 about four times in ten
    rm/                  sequence classifier with a tokenizer, a BOS and a chat template of its own
    prompts.jsonl        to train on, and prompts_test.jsonl
    pairs.jsonl          preferences between samples of the policy: what rm/ was trained on
    heldout_NAME.jsonl   pairs the RM has not seen, the right answer always chosen:
                         id    two samples of the policy
                         hard  the right answer and the same after one edit
                         onp   two samples of a policy trained on rm/: chosen against it, so it flatters a changed RM
                         neu   two samples of a policy trained on gold: shifted, but not against any RM
    world.json           sizes, measured figures, seconds; written last, so it marks a complete world
Worlds differ in how rm/ was trained: constant (learning rate), annealed (linearly to 0), noisy (annealed, and 15 % of
the pairs have chosen and rejected exchanged).
"""
import argparse
import contextlib
import copy
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
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
WORLDS = ("annealed", "constant", "noisy")
SIZES = {"prompts": 2000, "prompts_test": 500, "pairs": 2000, "heldout": 1000, "sft_steps": 400, "grpo_steps": 120}

# the RM's special tokens do in its template what these do in the policy's; its BOS has no counterpart
ROLES = {"[q]": "<user>", "[/q]": "<assistant>", "</s>": "<end>", "[pad]": "<pad>", "[unk]": "<unk>"}
POLICY_TEMPLATE = (
    "{% for m in messages %}"
    "{{ ('<assistant> ' + m.content + ' <end> ') if m.role == 'assistant' else ('<user> ' + m.content + ' ') }}"
    "{% endfor %}{{ '<assistant>' if add_generation_prompt else '' }}")
RM_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ (' ' + m.content + ' </s>') if m.role == 'assistant' else (' [q] ' + m.content + ' [/q]') }}"
    "{% endfor %}")


# ---------------------------------------------------------------------------------------------------------------------
# the task
# ---------------------------------------------------------------------------------------------------------------------


def answer(prompt):
    """The right symbols for a prompt, as a list."""
    task, *symbols = prompt.split()
    return TASKS[task](symbols)


def gold(prompt, response):
    """The true reward: 1.0 if the response is the right symbols, wherever it says "indeed", else 0.0."""
    return float([word for word in response.split() if word != FLOURISH] == answer(prompt))


def random_prompt(rng):
    """A task and 3 to 5 symbols."""
    return " ".join([rng.choice(list(TASKS))] + rng.choices(SYMBOLS, k=rng.randint(3, 5)))


def unique_prompts(n, rng):
    """n different prompts, so that any two slices of them are disjoint."""
    found = {}
    while len(found) < n:
        found[random_prompt(rng)] = True
    return list(found)


def demonstration(prompt, rng):
    """What the policy learns from: half clean; half with each symbol re-drawn at 50 %, and a flourish at 15 %."""
    words = list(answer(prompt))
    if rng.random() < 0.5:
        words = [rng.choice(SYMBOLS) if rng.random() < 0.5 else word for word in words]
        words += [FLOURISH] if rng.random() < 0.15 else []
    return " ".join(words)


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


# ---------------------------------------------------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------------------------------------------------


def write_rows(path, rows):
    """One JSON object per line."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_prompts(path):
    """The prompts of a .jsonl file."""
    return [json.loads(line)["prompt"] for line in Path(path).read_text().splitlines()]


def word_tokenizer(words, template, **special):
    """A Hugging Face tokenizer over whole words, in the given id order."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "bos_token" in special:  # as Llama's tokenizers do, so that template and tokenizer together would write two
        bos = special["bos_token"]
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words.index(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, model_max_length=64, **special)


def policy_tokenizer():
    """20 words, special ones first, no BOS."""
    special = ["<pad>", "<unk>", "<user>", "<assistant>", "<end>"]
    return word_tokenizer(special + SYMBOLS + list(TASKS) + [FLOURISH], POLICY_TEMPLATE, pad_token="<pad>",
                          unk_token="<unk>", eos_token="<end>", additional_special_tokens=["<user>", "<assistant>"])


def rm_tokenizer():
    """21 words in another order, with other special tokens and a BOS."""
    words = ["<s>", "</s>", FLOURISH] + list(TASKS)[::-1] + SYMBOLS[::-1] + ["[q]", "[/q]", "[unk]", "[pad]"]
    return word_tokenizer(words, RM_TEMPLATE, pad_token="[pad]", unk_token="[unk]", bos_token="<s>", eos_token="</s>",
                          additional_special_tokens=["[q]", "[/q]"])


def llama_config(tokenizer, width, layers, spread, **other):
    """A small Llama. `spread` is the standard deviation of its first weights."""
    return LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_attention_heads=4,
                       num_hidden_layers=layers, max_position_embeddings=64, initializer_range=spread,
                       pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
                       eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True, **other)


def write_model(path, model, tokenizer):
    """A Hugging Face folder."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


# ---------------------------------------------------------------------------------------------------------------------
# models
# ---------------------------------------------------------------------------------------------------------------------


def chat_ids(tokenizer, prompt, response=None):
    """Token ids of a prompt up to where the response starts, or of a prompt and its response."""
    messages = [{"role": "user", "content": prompt}]
    if response is None:
        return save.encode_chat(tokenizer, messages, generation_prompt=True)
    return save.encode_chat(tokenizer, messages + [{"role": "assistant", "content": response}])


def train_policy(path, steps, seed):
    """Supervised fine-tuning from scratch on demonstrations, every batch fresh; writes a policy folder."""
    rng, tokenizer = random.Random(f"demonstrations {seed}"), policy_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(tokenizer, width=64, layers=3, spread=0.05))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 20) * (1 + math.cos(math.pi * k / steps)) / 2)
    words = tokenizer.get_vocab()
    for _ in tqdm(range(steps), desc="policy: fine-tuning"):
        prompts = [random_prompt(rng) for _ in range(96)]
        # the template by hand: 38,400 renderings by jinja would take longer than the training
        rows = [[words[w] for w in f"<user> {p} <assistant> {demonstration(p, rng)} <end>".split()] for p in prompts]
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


def untrained_rm(policy_dir):
    """(model, tokenizer): the policy's backbone under the RM's tokenizer, embedding rows carried over, the score 0."""
    policy = LlamaForCausalLM.from_pretrained(policy_dir)
    old, tokenizer = policy_tokenizer().get_vocab(), rm_tokenizer()
    config = copy.deepcopy(policy.config)
    config.update({"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id,
                   "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id})
    model = LlamaForSequenceClassification(config)
    weights = policy.model.state_dict()
    rows = model.model.embed_tokens.weight.detach().clone()
    for word, i in tokenizer.get_vocab().items():
        if word != tokenizer.bos_token:
            rows[i] = weights["embed_tokens.weight"][old[ROLES.get(word, word)]]
    weights["embed_tokens.weight"] = rows
    model.model.load_state_dict(weights)
    torch.nn.init.zeros_(model.score.weight)
    return model, tokenizer


def train_rm(path, policy_dir, pairs, world, seed):
    """Stage 1 by save.py itself, then the score times 4: that is the spread of rewards that SAVE needs to work on."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        write_model(f"{folder}/start", *untrained_rm(policy_dir))
        schedule = "constant" if world == "constant" else "linear"
        save.main(["--stage", "preference", "--rm", f"{folder}/start", "--pairs", str(pairs), "--out", f"{folder}/out",
                   "--lr_rm", "1e-3", "--batch", "64", "--epochs", "5", "--lr_schedule", schedule, "--seed", str(seed),
                   "--device", "cpu"])
        model = LlamaForSequenceClassification.from_pretrained(f"{folder}/out/rm")
    model.score.weight.data *= 4
    write_model(path, model, rm_tokenizer())


def sample(policy, prompts, group, seed, top_k=0):
    """For each prompt, `group` texts at temperature 1; the most likely one with top_k=1."""
    ids = [chat_ids(policy.tokenizer, prompt) for prompt in prompts]
    seeds = [seed * 1_000_003 + row for row in range(len(ids) * group)]
    rows, _ = save.rollout(policy, ids, group, seeds, max_new_tokens=8, temperature=1.0, top_p=1.0, top_k=top_k)
    texts = policy.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [texts[i:i + group] for i in range(0, len(texts), group)]


def rm_scores(rm, prompts, responses):
    """The reward of each (prompt, response)."""
    with torch.no_grad():
        import save as s
        scores = []
        for i in range(0, len(prompts), 512):
            ids, le = s.pad([chat_ids(rm.tokenizer, p, r) for p, r in zip(prompts[i:i + 512], responses[i:i + 512])])
            scores.append(rm(ids, le))
    return torch.cat(scores)


def rm_accuracy(rm, rows):
    """Share of pairs with the chosen response ahead, in percent; a tie is a miss."""
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (rm_scores(rm, prompts, [row[name] for row in rows]) for name in ("chosen", "rejected"))
    return 100 * (chosen > rejected).double().mean().item()


def train_grpo(policy_dir, prompts, reward, steps, seed, desc):
    """A policy trained by plain GRPO (16 prompts, 8 responses, KL .04, one step a batch) on reward(prompts, texts)."""
    rng = random.Random(f"grpo {seed}")
    policy, reference = save.Policy.from_pretrained(policy_dir), save.Policy.from_pretrained(policy_dir)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-4, weight_decay=0.0)
    for step in tqdm(range(steps), desc=desc):
        batch = rng.sample(prompts, 16)
        groups = sample(policy, batch, 8, seed + step)
        flat = [p for p in batch for _ in range(8)]
        texts = [t for g in groups for t in g]
        r = reward(flat, texts).view(16, 8)
        adv = save.grpo_advantages(r, torch.ones_like(r, dtype=torch.bool)).flatten()
        ids, le = save.pad([chat_ids(policy.tokenizer, p, t) for p, t in zip(flat, texts)])
        pl = torch.tensor([len(chat_ids(policy.tokenizer, p)) for p in flat])
        pos = torch.arange(1, ids.shape[1])[None]
        mask = ((pos >= pl[:, None]) & (pos < le[:, None])).float()
        lp = policy(ids)
        with torch.no_grad():
            ref = reference(ids)
        k3 = (ref - lp).exp() - (ref - lp) - 1
        loss = (((-(lp - lp.detach()).exp() * adv[:, None] + 0.04 * k3) * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return policy


def gold_reward(policy_dir, prompts, seed=0, samples=4):
    """{"sampled", "greedy"}: mean gold of `samples` responses at temperature 1, and of the most likely response."""
    policy = save.Policy.from_pretrained(str(policy_dir))
    means = {}
    for name, group, top_k in (("sampled", samples, 0), ("greedy", 1, 1)):
        texts = sample(policy, prompts, group, seed, top_k)
        means[name] = sum(gold(p, t) for p, group_ in zip(prompts, texts) for t in group_) / (len(prompts) * group)
    return means


# ---------------------------------------------------------------------------------------------------------------------
# pairs and worlds
# ---------------------------------------------------------------------------------------------------------------------


def sampled_pairs(policy, prompts, rng, seed, limit=None):
    """One right against one wrong sample for each prompt where 8 samples have both."""
    rows = []
    for prompt, texts in zip(prompts, sample(policy, prompts, 8, seed)):
        right = [text for text in texts if gold(prompt, text)]
        wrong = [text for text in texts if not gold(prompt, text)]
        if right and wrong:
            rows.append({"prompt": prompt, "chosen": rng.choice(right), "rejected": rng.choice(wrong)})
    return rows[:limit]


def edited_pairs(prompts, rng):
    """The right answer against one edit of it."""
    return [{"prompt": prompt, "chosen": " ".join(answer(prompt)), "rejected": " ".join(one_edit(answer(prompt), rng))}
            for prompt in prompts]


def preferences(pairs, flipped, rng):
    """Training pairs with their gold; a share `flipped` has chosen and rejected exchanged."""
    for row in pairs:
        if rng.random() < flipped:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        row.update({f"gold_{side}": gold(row["prompt"], row[side]) for side in ("chosen", "rejected")})
    return pairs
