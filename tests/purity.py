"""How many of SAVE's labels are right? The sign of R - V beside gold, for V and for other anchors.

    python tests/tables.py purity --out runs/map         # few, habits, graded, six seeds

First policy and first RM of a world, its held-out prompts (prompts_test.jsonl), G responses each. A label is right if
R >= anchor just where the response is good: gold 1, in `graded` gold at least its group's mean. Groups: all good (in
`graded` all equally good), all bad, mixed. Anchors, fitted on other prompts than these: the mean reward, save.py's
value head of stage value, a ridge fit of the features that it reads, the mean of G other responses to the same prompt
(an almost exact V), and the group mean. R2 is of the group means. What the filter keeps is that of the first step.
"""
import json
import statistics
from pathlib import Path

import toy
import torch
from measure import spans

import save

G, FITTED, STRENGTHS = 8, 512, (1000, 100, 10)  # responses of a group, prompts of a ridge fit, its strengths
COLUMNS = {"r2": "R2", "all": "labels right, %", "all good": "all good", "all bad": "all bad", "mixed": "mixed",
           "kept": "kept, %", "right of kept": "right of these", "right of others": "right of set aside",
           "one-sided": "kept rows of one-sided groups, %"}

def purity(rewards, anchors, good, threshold):
    """{column: number}, without those of no rows. rewards (P,G), anchors (P,), good (P,G) bool, mu of the filter."""
    advantages, means = save.rm_advantages(rewards, anchors), rewards.mean(1)
    right = (advantages >= 0) == good
    positive, negative, valid = save.partition(advantages, threshold)
    kept, one_sided = positive | negative, (good.all(1) | ~good.any(1))[:, None].expand_as(good)
    trains = kept & valid[:, None]
    shares = {"all": (right, torch.ones_like(good)), "all good": (right, good.all(1)),
              "all bad": (right, ~good.any(1)), "mixed": (right, ~one_sided),
              "kept": (kept, torch.ones_like(good)), "right of kept": (right, kept),
              "right of others": (right, ~kept), "one-sided": (one_sided, trains)}
    r2 = 1 - ((anchors - means) ** 2).mean().item() / means.var(correction=0).item()
    return {"r2": r2} | {name: 100 * what[rows].double().mean().item() for name, (what, rows) in shares.items()
                         if rows.any()}

def ridge(features, targets, strength):
    """A linear fit of targets (n,) with an intercept, its weights pulled to 0 -> a function of features (m,H)."""
    features, targets = features.double(), targets.double()
    centre, level = features.mean(0), targets.mean()
    x, weight = features - centre, strength * torch.eye(features.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(x.T @ x + weight, x.T @ (targets - level))
    return lambda others: ((others - centre) @ weights + level).float()

def rated(policy, rm, prompts, group, seed):
    """`group` samples of each prompt -> rewards (P,group), prompt features (P,H), texts by prompt."""
    texts = [[text for _, text in pairs] for pairs in toy.sample(policy, prompts, group, seed)]
    chats = [chat for prompt, own in zip(prompts, texts)
             for chat in save.encode_responses(rm.tokenizer, [{"role": "user", "content": prompt}], own)]
    rewards, features = save.score(rm, chats, 8192)
    return rewards.view(-1, group), features[::group], texts

@torch.no_grad()
def measure(data, world, seed):
    """DIR/purity.json of a built world with a value head: {anchor: {column: number}}. Kept if it is there."""
    if (data / "purity.json").is_file():
        return
    policy = save.Policy.from_pretrained(str(data / "policy"))
    rm, task = save.RewardModel.from_pretrained(str(data / "value" / "rm")), toy.WORLDS[world].task
    train, test = (toy.read_prompts(data / f"{name}.jsonl") for name in ("prompts", "prompts_test"))
    known, fitted, _ = rated(policy, rm, train[:FITTED], G, seed)
    rewards, features, texts = rated(policy, rm, test, 2 * G, seed + 1)
    golds = torch.tensor([[toy.gold(prompt, text, task) for text in own[:G]] for prompt, own in zip(test, texts)])
    good = golds >= (golds.mean(1, keepdim=True) if task == "graded" else 1)
    rewards, others = rewards.split(G, 1)
    anchors = {"a constant": known.mean().expand(len(test)), "V, as fitted by stage value": rm.value(features),
               **{f"V, ridge {x}": ridge(fitted, known.mean(1), x)(features) for x in STRENGTHS},
               f"V almost exact: mean of {G} others": others.mean(1), "the group mean": rewards.mean(1)}
    cfg = save.parse_config(toy.laptop_flags(world))
    threshold = save.curriculum_threshold(1, cfg.steps, cfg.m0)
    rows = {name: purity(rewards, anchor, good, threshold) for name, anchor in anchors.items()}
    toy.write_whole(data / "purity.json", json.dumps(rows))

def lines_of(world, runs):
    """Markdown lines of one world. runs: {seed: {anchor: {column: number}}}."""
    head = f"{world}, seeds {spans(runs)}"
    lines = [f"| {head} | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for anchor in next(iter(runs.values())):
        cells = []
        for column in COLUMNS:
            values = [run[anchor][column] for run in runs.values() if column in run[anchor]]
            cells.append(f"{statistics.mean(values):.{2 if column == 'r2' else 1}f}" if values else "")
        lines.append(f"| {anchor} | {' | '.join(cells)} |")
    return lines

def read(file):
    """purity.jsonl, a line a world and seed -> {world: {seed: {anchor: {column: number}}}}."""
    runs = {}
    for run in map(json.loads, Path(file).read_text(encoding="utf-8").splitlines()):
        runs.setdefault(run["world"], {})[run["seed"]] = run["anchors"]
    return runs

def write(out):
    """purity.jsonl of every world under `out` that was measured -> Markdown lines."""
    rows = []
    for file in out.glob("*-*/purity.json"):
        world, seed = file.parent.name.rsplit("-", 1)
        rows.append({"world": world, "seed": int(seed), "anchors": json.loads(file.read_text())})
    toy.write_rows(out / "purity.jsonl", sorted(rows, key=lambda row: (row["world"], row["seed"])))
    return [line for world, runs in read(out / "purity.jsonl").items() for line in [*lines_of(world, runs), ""]]
