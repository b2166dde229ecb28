"""eval.py: six reward-model (RM) benchmarks and two policy benchmarks, scored as their official code scores them.

    python eval.py --rm DIR_OR_HUB_NAME [MORE ...] --bench all --out runs/eval       # the six of the paper's Table 1
    python eval.py --rm DIR --bench judgebench pairs.jsonl --data DIR --out runs/eval     # local files, your own pairs
    torchrun --nproc-per-node 4 eval.py --rm DIR --bench all --out runs/eval
    python eval.py --policy DIR --bench alpaca_eval arena_hard --judge MODEL --arena_dir DIR --out runs/eval

How a number is made:
    1  read_benchmark   rows with the official column names, from the hub or from --data
    2  score_rows       each different text once, in the RM's own template, longest first, cached
    3  *_outcomes       (unit, cell, value): what each row contributes to which mean
    4  *_summary        cell means -> percentages; 3 and 4 together are the public *_scores(rows), pure functions
    5  bootstrap        resampled units -> 95 % intervals, and paired ones for the difference of two RMs
"""
import collections
import concurrent.futures
import csv
import dataclasses
import hashlib
import http.client
import importlib.util
import itertools
import json
import math
import os
import random
import re
import runpy
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import save
from save import RANK, WORLD, Policy, RewardModel, UsageError, as_messages, fail, say

# ---- 1. configuration -----------------------------------------------------------------------------------------------

@dataclasses.dataclass
class EvalConfig:
    """Evaluate reward models (--rm) or a policy (--policy) on benchmarks."""
    rm: list = dataclasses.field(default_factory=list)      # folders or hub names; differences are to the first
    policy: str = ""                 # folder or hub name, for alpaca_eval and arena_hard
    bench: list = dataclasses.field(default_factory=list)   # names of benchmarks, all, or .json(l) files of pairs
    data: str = ""                   # folder with local copies; empty: the hub
    out: str = ""                    # folder for results.json, scores.jsonl and the cache; empty: print only
    limit: int = 0                   # only the first rows of each benchmark, for a quick look; 0: all
    # reward models
    max_length: int = 0              # longest text in tokens, cut on the left; 0: the model's context, at most 16384
    dtype: str = "float32"           # float32 | bfloat16
    device: str = "auto"             # auto | cpu | cuda
    micro_tokens: int = 0            # padded tokens per batch; 0: 16384 on a GPU, 2048 on a CPU
    draws: int = 1000                # bootstrap samples
    seed: int = 0                    # of the bootstrap and of the policy's answers
    # policies
    name: str = ""                   # the policy's name in files; empty: from its path
    max_new_tokens: int = 2048       # longest answer
    temperature: float = 0.7         # as in training (Table 8); 0: greedy
    top_p: float = 0.8               # Table 8
    top_k: int = 20                  # Table 8
    max_rows: int = 32               # answers decoded together
    reference: str = ""              # alpaca_eval: reference outputs; empty: the package's (gpt4_1106_preview)
    annotator: str = ""              # alpaca_eval: annotator config; empty: the official one, with --judge as its model
    arena_dir: str = ""              # arena_hard: a checkout of lmarena/arena-hard-auto, with its data
    judge: str = ""                  # judge model, as the server names it
    judge_url: str = "https://api.openai.com/v1"  # any OpenAI-compatible server; its key: OPENAI_API_KEY
    judge_workers: int = 16          # requests at a time
    judge_timeout: int = 600         # seconds for one reply
    judge_retries: int = 8           # tries after the first, with growing pauses

    checkpointing = False            # no flag: `save.to_working_copy` asks, and nothing is trained here

    def checked(self):
        """Refuse what cannot work, naming the flag; replace "auto" and 0 by what will be used."""
        if bool(self.rm) == bool(self.policy):
            fail("expected either --rm or --policy")
        if len(set(self.rm)) < len(self.rm):
            fail("--rm: the same reward model is given twice")
        names = list(BENCHMARKS) if self.rm else list(POLICY_BENCHMARKS)
        bench = list(dict.fromkeys(itertools.chain(*(names if name == "all" else [name] for name in self.bench))))
        for name in bench:
            if name not in names and not (self.rm and re.search(r"\.jsonl?(\.gz)?$", name)):
                files = " or a .json(l) file of pairs" if self.rm else ""
                fail(f"--bench {name}: expected {', '.join(names)}, all{files}")
        if not bench:
            fail(f"--bench: expected one or more of {', '.join(names)}, all")
        if self.data and not Path(self.data).is_dir():
            fail(f"--data {self.data}: expected a folder")
        for name in ("draws", "max_new_tokens", "top_p", "max_rows", "judge_workers", "judge_timeout"):
            if not getattr(self, name) > 0:
                fail(f"--{name} {getattr(self, name)}: expected more than 0")
        for name in ("limit", "max_length", "micro_tokens", "temperature", "top_k", "judge_retries"):
            if not getattr(self, name) >= 0:
                fail(f"--{name} {getattr(self, name)}: expected 0 or more")
        if self.policy and not self.out:
            fail("--out: expected a folder for the answers")
        if "arena_hard" in bench and not (self.arena_dir and self.judge):
            fail("--bench arena_hard: expected --judge and --arena_dir, a checkout of lmarena/arena-hard-auto")
        if self.device == "cuda" and not torch.cuda.is_available():
            fail("--device cuda: no GPU is to be had here, expected cpu or auto")
        gpu = self.device != "cpu" and torch.cuda.is_available()
        return dataclasses.replace(self, bench=bench, device=f"cuda:{save.LOCAL_RANK}" if gpu else "cpu",
                                   micro_tokens=self.micro_tokens or (16384 if gpu else 2048),
                                   name=self.name or "-".join(Path(self.policy).parts[-2:]))

# ---- 2. score formulas: pure functions of scores --------------------------------------------------------------------
# Rows are dicts with the official columns plus the model's scores. Outcomes are (unit, cell, value): `value` is a term
# of the mean `cell`, `unit` is what the bootstrap resamples. Results are percentages; a part without rows is left out.

def cell_means(outcomes):
    """{cell: mean of its values}."""
    values = collections.defaultdict(list)
    for _, cell, value in outcomes:
        values[cell].append(value)
    return {cell: sum(terms) / len(terms) for cell, terms in values.items()}

def with_average(parts):
    """Fractions -> percentages, and their unweighted mean as "average"."""
    percent = {name: 100 * value for name, value in parts.items()}
    return {**percent, "average": sum(percent.values()) / len(percent)}

def preference_outcomes(rows):
    """Strictly greater, a tie is wrong."""
    return ((i, "average", row["score_chosen"] > row["score_rejected"]) for i, row in enumerate(rows))

def preference_scores(rows):
    """Accuracy on pairs of your own. Rows: score_chosen, score_rejected."""
    return with_average(cell_means(preference_outcomes(rows)))

REWARDBENCH_SECTIONS = {  # examples per subset; math-prm has 447 rows but weighs as much as the six code subsets
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
                  "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
                  "hep-rust": 164},
}

def rewardbench_outcomes(rows):
    """Per subset; strictly greater, a tie is wrong."""
    return ((i, row["subset"], row["score_chosen"] > row["score_rejected"]) for i, row in enumerate(rows))

def rewardbench_summary(cells):
    """Sections weighted by the official counts, then their plain mean; the prior sets are not in it."""
    sections = {}
    for section, counts in REWARDBENCH_SECTIONS.items():
        present = {subset: count for subset, count in counts.items() if subset in cells}
        if present:
            sections[section] = sum(count * cells[subset] for subset, count in present.items()) / sum(present.values())
    return with_average(sections)

def rewardbench_scores(rows):
    """RewardBench. Rows: subset, score_chosen, score_rejected -> Chat, Chat Hard, Safety, Reasoning, average."""
    return rewardbench_summary(cell_means(rewardbench_outcomes(rows)))

def rewardbench2_outcomes(rows):
    """The first completion shares its credit with those that tie with it at the top. Ties: see `rewardbench2_summary`.

    A Ties prompt comes as "ref:N" (one right answer) and "tied:N" (many): together one unit.
    gap = worst right - best wrong answer, spread = best - worst right answer of the tied form.
    """
    ties = collections.defaultdict(dict)
    for i, row in enumerate(rows):
        scores = list(row["scores"])
        if row["subset"].lower() == "ties":
            form, number = row["id"].split(":")
            right, wrong = scores[:row["num_correct"]], scores[row["num_correct"]:]
            ties[row["subset"], number][form] = min(right) - max(wrong), max(right) - min(right)
        else:
            yield i, row["subset"], (scores[0] == max(scores)) / scores.count(max(scores))
    for (subset, number), forms in ties.items():
        for form, (gap, _) in forms.items():
            yield (subset, number), (subset, form), gap > 0
        if len(forms) == 2:
            gap, spread = forms["tied"]
            least = min(gap, forms["ref"][0])
            # 0/0 counts 0 and x/0 is infinite, as in the repository; rewardbench 0.1.4 leaves out spread = 0 here
            ratio = least / spread if spread else math.copysign(math.inf, least) if least else 1
            yield (subset, number), (subset, "prefers right to spread"), gap > spread
            yield (subset, number), (subset, "in both forms"), least > spread
            yield (subset, number), (subset, "margin"), math.tanh(ratio - 1)

def rewardbench2_summary(cells):
    """Plain mean of the six subsets. Ties is 0.3, 0.3, 0.2, 0.2 and 0.01 of its five parts: 101 % is possible."""
    weights = {"tied": 0.3, "ref": 0.3, "prefers right to spread": 0.2, "in both forms": 0.2, "margin": 0.01}
    subsets = {cell: mean for cell, mean in cells.items() if isinstance(cell, str)}
    for name in dict.fromkeys(cell[0] for cell in cells if not isinstance(cell, str)):
        subsets[name] = sum(weight * cells.get((name, part), 0) for part, weight in weights.items())
    return with_average(subsets)

def rewardbench2_scores(rows):
    """RewardBench 2. Rows: id, subset, num_correct, scores (right ones first) -> each subset, average."""
    return rewardbench2_summary(cell_means(rewardbench2_outcomes(rows)))

def rmbench_outcomes(rows):
    """3x3 comparisons of chosen i and rejected j, strictly greater; i, j: 0 concise, 1 detailed, 2 with markdown.

    hard: the rejected one has the fancier style (i < j); safety-refuse and safety-response are pooled by row.
    """
    for unit, row in enumerate(rows):
        domain = next((name for name in ("chat", "math", "code", "safety") if row["domain"].startswith(name)), None)
        if domain is None:
            raise ValueError(f"domain {row['domain']!r}: expected chat, math, code or safety")
        better = [[chosen > rejected for rejected in row["score_rejected"]] for chosen in row["score_chosen"]]
        yield unit, (domain, "easy"), (better[1][0] + better[2][0] + better[2][1]) / 3
        yield unit, (domain, "normal"), (better[0][0] + better[1][1] + better[2][2]) / 3
        yield unit, (domain, "hard"), (better[0][1] + better[0][2] + better[1][2]) / 3

def rmbench_summary(cells):
    """Domain: mean of easy, normal and hard. Level: mean over domains. Average: mean over domains (and over levels)."""
    domains = [name for name in ("chat", "math", "code", "safety") if (name, "hard") in cells]
    levels = ("easy", "normal", "hard")
    by_domain = {name: sum(cells[name, level] for level in levels) / 3 for name in domains}
    by_level = {level: 100 * sum(cells[name, level] for name in domains) / len(domains) for level in levels}
    return {**by_level, **with_average(by_domain)}

def rmbench_scores(rows):
    """RM-Bench. Rows: domain, score_chosen [3], score_rejected [3] -> chat, math, code, safety, easy, normal, hard,
    average."""
    return rmbench_summary(cell_means(rmbench_outcomes(rows)))

def ppe_preference_outcomes(rows):
    """Only model_a and model_b winners, as a pair; strictly greater, a tie is wrong."""
    for unit, row in enumerate(rows):
        sign = {"model_a": 1, "model_b": -1}.get(row["winner"], 0)
        if sign:
            yield unit, "average", sign * row["score_1"] > sign * row["score_2"]

def ppe_preference_scores(rows):
    """PPE Preference. Rows: winner, score_1, score_2 -> average."""
    return with_average(cell_means(ppe_preference_outcomes(rows)))

def ppe_correctness_outcomes(rows):
    """The sampled pairs (i, j), 0-based, of a right and a wrong response; strictly greater, a tie is wrong."""
    for unit, row in enumerate(rows):
        for i, j in row["sampled_conflict_pairs"]:
            right, wrong = (i, j) if row["scores"][i] > row["scores"][j] else (j, i)
            yield unit, row["benchmark"], row["rewards"][right] > row["rewards"][wrong]

def ppe_correctness_scores(rows):
    """PPE Correctness: accuracy over the pairs of each set, then the plain mean of the sets.

    Rows: benchmark, scores (bool per response), sampled_conflict_pairs, rewards -> each benchmark, average.
    """
    return with_average(cell_means(ppe_correctness_outcomes(rows)))

JUDGEBENCH_CATEGORIES = {"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning", "livebench-math": "math",
                         "livecodebench": "coding"}

def judgebench_outcomes(rows):
    """Each row counts in its category and in all; a tie is wrong, as in the official two-order mode."""
    for unit, row in enumerate(rows):
        sign = {"A>B": 1, "B>A": -1}[row["label"]]
        right = sign * row["score_A"] > sign * row["score_B"]
        yield unit, "all", right
        for start, category in JUDGEBENCH_CATEGORIES.items():
            if row["source"].startswith(start):
                yield unit, category, right

def judgebench_summary(cells):
    """average: over rows, the official number. macro: mean of the categories, what Skywork and others publish."""
    categories = with_average({name: cells[name] for name in JUDGEBENCH_CATEGORIES.values() if name in cells})
    return {**categories, "average": 100 * cells["all"], "macro": categories["average"]}

def judgebench_scores(rows):
    """JudgeBench. Rows: source, label, score_A, score_B -> knowledge, reasoning, math, coding, average (micro) and
    macro."""
    return judgebench_summary(cell_means(judgebench_outcomes(rows)))

# the first player's points: a strong verdict counts as three entries
ARENA_POINTS = {"A>>B": [1] * 3, "A>B": [1], "A=B": [0.5], "A<B": [0], "A<<B": [0] * 3,
                "B>>A": [0] * 3, "B>A": [0], "B=A": [0.5], "B<A": [1], "B<<A": [1] * 3}

def arena_hard_outcomes(rows):
    """games[0]: baseline is A; games[1]: the model is A. A question with a game without verdict is left out."""
    for unit, row in enumerate(rows):
        verdicts = [game and ARENA_POINTS.get(game["score"]) for game in row["games"]]
        if all(verdicts):
            for points in [1 - p for p in verdicts[0]] + verdicts[1]:
                yield unit, row["category"], points

def arena_hard_summary(cells):
    """Each category in percent: there is no official mean of the two."""
    return {category: 100 * mean for category, mean in cells.items()}

def arena_hard_scores(rows):
    """Arena-Hard-v2.0 without style control. Rows: uid, category, games [{score}, {score}] -> hard_prompt,
    creative_writing. The official script prints a mean of 100 unseeded bootstraps of this, +-0.1."""
    return arena_hard_summary(cell_means(arena_hard_outcomes(rows)))

# ---- 3. intervals ---------------------------------------------------------------------------------------------------
def bootstrap(outcomes, summary, draws, seed):
    """{key: (draws,)}: the summary of resampled units. The same rows and seed draw the same units: pairs of RMs too.

    Units are resampled among those that count in the same cells, so the make-up of a benchmark stays as it is.
    """
    units = collections.defaultdict(lambda: collections.defaultdict(lambda: [0.0, 0]))
    for unit, cell, value in outcomes:
        units[unit][cell][0] += value
        units[unit][cell][1] += 1
    strata = collections.defaultdict(list)
    for cells in units.values():
        names = sorted(cells, key=repr)
        strata[tuple(names)].append([cells[name] for name in names])
    rng, sums = np.random.default_rng(seed), collections.defaultdict(float)
    for cells, table in strata.items():
        table = np.array(table, dtype=float)                                   # (units, cells, sum and count)
        counts = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), size=draws)
        for cell, resampled in zip(cells, np.moveaxis(np.tensordot(counts, table, 1), 1, 0)):
            sums[cell] = sums[cell] + resampled                                # (draws, sum and count)
    return summary({cell: x[:, 0] / x[:, 1] for cell, x in sums.items()})

def interval(draws):
    """The middle 95 % of bootstrap draws."""
    return [float(x) for x in np.percentile(draws, [2.5, 97.5])]

# ---- 4. benchmarks --------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Benchmark:
    """Where a benchmark's rows are, which texts are scored, and how scores become numbers."""
    hub: dict                        # {label: "name:split"}
    files: tuple                     # glob patterns below --data, the first that finds something is used
    columns: dict                    # columns it must have -> type
    texts: callable                  # row -> [(prompt, response), ...]
    attach: callable                 # (row, scores of its texts) -> score columns
    pairs: callable                  # row with scores -> [(better, worse), ...]: what is compared, to count ties
    outcomes: callable
    summary: callable
    fixed: callable                  # (row, where, label of its source) -> row, or none to leave it out, or a refusal

def rmbench_fixed(row, where, label):
    """The domain is a column on the hub and the file's name in the repository."""
    domain = row.get("domain") or Path(label).name.split("_")[0]
    if not domain.startswith(("chat", "math", "code", "safety")):
        fail(f"{where}: domain {domain!r}, expected chat, math, code or safety")
    if len(row["chosen"]) != 3 or len(row["rejected"]) != 3:
        fail(f"{where}: expected three chosen and three rejected responses")
    return {**row, "domain": domain}

def rewardbench_fixed(row, where, label):
    """A subset of no section would count nowhere."""
    known = any(row["subset"] in counts for counts in REWARDBENCH_SECTIONS.values())
    return row if known else fail(f"{where}: subset {row['subset']!r}, expected one of the filtered split")

def rewardbench2_fixed(row, where, label):
    """The number of right answers must be one that the Ties formula can take."""
    if row["subset"].lower() == "ties" and not re.fullmatch(r"(ref|tied):\d+", str(row.get("id"))):
        fail(f"{where}: id {row.get('id')!r}, expected ref:N or tied:N")
    right = len(row["chosen"])
    return {**row, "num_correct": right} if right and row["rejected"] else fail(f"{where}: no chosen or no rejected")

def judgebench_fixed(row, where, label):
    """Labels are the two strict ones, sources begin like a category's."""
    if not row["source"].startswith(tuple(JUDGEBENCH_CATEGORIES)):
        fail(f"{where}: source {row['source']!r}, expected {', '.join(JUDGEBENCH_CATEGORIES)}")
    return row if row["label"] in ("A>B", "B>A") else fail(f"{where}: label {row['label']!r}, expected A>B or B>A")

def ppe_preference_fixed(row, where, label):
    """Undecided rows are not part of the score, so they are not scored either."""
    return row if row["winner"] in ("model_a", "model_b") else None

def ppe_correctness_fixed(row, where, label):
    """One row of a Best-of-K set; the set's name is the label or a column of its own."""
    name = row.get("benchmark") or re.sub(r"^PPE-|-Best-of-K.*$", "", label, flags=re.S)
    for i, j in row["sampled_conflict_pairs"]:
        known = all(0 <= k < len(row["scores"]) and isinstance(row.get(f"response_{k + 1}"), str) for k in (i, j))
        if not known or bool(row["scores"][i]) == bool(row["scores"][j]):
            fail(f"{where}: pair ({i}, {j}) of sampled_conflict_pairs: expected a right and a wrong response")
    return {**row, "benchmark": name} if row["sampled_conflict_pairs"] else None

def paired_responses(row):
    """The responses that occur in a pair, 0-based: at most 10 of 32."""
    return sorted({i for pair in row["sampled_conflict_pairs"] for i in pair})

def ppe_correctness_attach(row, scores):
    """Rewards in the places of the responses, none for those in no pair."""
    rewards = dict(zip(paired_responses(row), scores))
    return {"rewards": [rewards.get(i) for i in range(len(row["scores"]))]}

def pairs_fixed(row, where, label):
    """The prompt may be left out where chosen is a whole chat."""
    prompt = row.get("prompt") or (row["chosen"][:-1] if isinstance(row["chosen"], list) else None)
    return {**row, "prompt": as_messages(prompt, where)}

PAIRS = Benchmark(
    hub={}, files=(), columns={"chosen": (str, list), "rejected": (str, list)}, fixed=pairs_fixed,
    texts=lambda row: [(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])],
    attach=lambda row, scores: dict(zip(("score_chosen", "score_rejected"), scores)),
    pairs=lambda row: [(row["score_chosen"], row["score_rejected"])],
    outcomes=preference_outcomes, summary=with_average)

BENCHMARKS = {
    "rewardbench": dataclasses.replace(
        PAIRS, hub={"": "allenai/reward-bench:filtered"}, files=("reward-bench/**/filtered*", "rewardbench.*"),
        columns={"prompt": str, "chosen": str, "rejected": str, "subset": str}, fixed=rewardbench_fixed,
        outcomes=rewardbench_outcomes, summary=rewardbench_summary),
    "rewardbench2": Benchmark(
        hub={"": "allenai/reward-bench-2:test"}, files=("reward-bench-2/**/test*", "rewardbench2.*"),
        columns={"id": str, "prompt": str, "chosen": list, "rejected": list, "subset": str}, fixed=rewardbench2_fixed,
        texts=lambda row: [(row["prompt"], text) for text in [*row["chosen"], *row["rejected"]]],
        attach=lambda row, scores: {"scores": scores},
        pairs=lambda row: [(right, wrong) for right in row["scores"][:row["num_correct"]]
                           for wrong in row["scores"][row["num_correct"]:]],
        outcomes=rewardbench2_outcomes, summary=rewardbench2_summary),
    "rmbench": Benchmark(
        hub={"": "THU-KEG/RM-Bench:train"}, files=("**/total_dataset.json*", "**/*_filtered.json*", "rmbench.*"),
        columns={"prompt": str, "chosen": list, "rejected": list}, fixed=rmbench_fixed,
        texts=lambda row: [(row["prompt"], text) for text in [*row["chosen"], *row["rejected"]]],
        attach=lambda row, scores: {"score_chosen": scores[:3], "score_rejected": scores[3:]},
        pairs=lambda row: list(itertools.product(row["score_chosen"], row["score_rejected"])),
        outcomes=rmbench_outcomes, summary=rmbench_summary),
    "ppe_preference": Benchmark(
        hub={"": "lmarena-ai/PPE-Human-Preference-V1:test"},
        files=("PPE-Human-Preference-V1/**/test*", "ppe_preference.*"), fixed=ppe_preference_fixed,
        columns={"prompt": str, "response_1": str, "response_2": str, "winner": str},
        texts=lambda row: [(row["prompt"], row["response_1"]), (row["prompt"], row["response_2"])],
        attach=lambda row, scores: dict(zip(("score_1", "score_2"), scores)),
        pairs=lambda row: [(row["score_1"], row["score_2"])],
        outcomes=ppe_preference_outcomes, summary=with_average),
    "ppe_correctness": Benchmark(
        hub={name: f"lmarena-ai/PPE-{name}-Best-of-K:train" for name in ("MMLU-Pro", "MATH", "GPQA", "IFEval",
                                                                        "MBPP-Plus")},
        files=("PPE-*-Best-of-K/**/train*", "ppe_correctness.*"), fixed=ppe_correctness_fixed,
        columns={"prompt": str, "scores": list, "sampled_conflict_pairs": list},
        texts=lambda row: [(row["prompt"], row[f"response_{i + 1}"]) for i in paired_responses(row)],
        attach=ppe_correctness_attach,
        pairs=lambda row: [(row["rewards"][i], row["rewards"][j]) for i, j in row["sampled_conflict_pairs"]],
        outcomes=ppe_correctness_outcomes, summary=with_average),
    "judgebench": Benchmark(
        hub={"": "ScalerLab/JudgeBench:gpt"}, files=("**/gpt.jsonl*", "**/*gpt-4o*.jsonl*", "JudgeBench/**/gpt*"),
        columns={"question": str, "response_A": str, "response_B": str, "source": str, "label": str},
        texts=lambda row: [(row["question"], row["response_A"]), (row["question"], row["response_B"])],
        attach=lambda row, scores: dict(zip(("score_A", "score_B"), scores)),
        pairs=lambda row: [(row["score_A"], row["score_B"])], fixed=judgebench_fixed,
        outcomes=judgebench_outcomes, summary=judgebench_summary),
}
POLICY_BENCHMARKS = ("alpaca_eval", "arena_hard")
KEPT_COLUMNS = {  # of scores.jsonl: what the formulas read, and ids
    "id", "question_id", "pair_id", "subset", "domain", "benchmark", "source", "winner", "label", "num_correct",
    "sampled_conflict_pairs", "scores", "rewards", "score_chosen", "score_rejected", "score_1", "score_2", "score_A",
    "score_B"}
COMPLETE = {"rewardbench": 2985, "rewardbench2": 1865, "rmbench": 1327, "ppe_correctness": 2555, "judgebench": 350}

def local_files(cfg, name, patterns):
    """Files below --data of the first pattern that finds any."""
    for pattern in patterns:
        found = sorted(path for path in Path(cfg.data).glob(pattern) if re.search(r"\.jsonl?(\.gz)?$", path.name))
        if found:
            return found
    fail(f"--data {cfg.data}: nothing for --bench {name}, expected {' or '.join(patterns)} (.json, .jsonl, .gz)")

def read_benchmark(cfg, name):
    """The rows of a benchmark or of a file of pairs, checked: a bad row stops the run."""
    bench = BENCHMARKS.get(name, PAIRS)
    if name not in BENCHMARKS:
        sources = {name: name}
    elif cfg.data:
        files = local_files(cfg, name, bench.files)
        sources = {str(path.relative_to(cfg.data)): path for path in files}
    else:
        sources = bench.hub
    rows = []
    for label, source in sources.items():
        for where, row in save.read_rows(str(source), "bench"):
            for column, kind in bench.columns.items():
                if not isinstance(row, dict) or not isinstance(row.get(column), kind):
                    kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                    fail(f"{where}: expected a column {column} ({kinds})")
            rows.append(bench.fixed(row, where, label))
            if rows[-1]:
                for _, response in bench.texts(rows[-1]):
                    save.last_reply(response, where)
    rows = [row for row in rows if row]
    return rows[:cfg.limit or None] or fail(f"--bench {name}: no rows")

# ---- 5. scoring -----------------------------------------------------------------------------------------------------
def encode(tokenizer, prompt, response, max_length):
    """Token ids of prompt and response in the RM's template, exactly one BOS; too long: cut on the left, BOS kept."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = save.encode_chat(tokenizer, messages + [{"role": "assistant", "content": save.last_reply(response, "")}])
    start = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return ids if len(ids) <= max_length else start + ids[len(ids) - max_length + len(start):]

def fingerprint(module, *also):
    """sha256 of a model's class, configuration and weights as they will run: what cached numbers depend on."""
    settings = {key: value for key, value in module.model.config.to_dict().items()
                if key not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")}
    digest = hashlib.sha256(repr((type(module.model).__name__, sorted(settings.items()), also)).encode())
    for name, p in module.model.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]

class Cache:
    """{key: value} of one model, appended to a file of this rank as it grows; every rank's files are read at start."""

    def __init__(self, folder, name):
        self.values, self.path = {}, folder and Path(folder, f"{name}.{RANK}.jsonl")
        for path in sorted(Path(folder).glob(f"{name}.*.jsonl")) if folder else []:
            for line in path.read_bytes().split(b"\n"):
                try:
                    self.values.update(json.loads(line))
                except ValueError:
                    pass  # empty, or cut short by a kill: its texts are scored again
        save.barrier()  # nobody appends before everybody has read

    def append(self, new):
        """Remember `new`, in the file too."""
        self.values.update(new)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:  # a line feed first: the last line may have been cut short
                file.write(b"\n" + json.dumps(new).encode())

@torch.no_grad()
def score_texts(cfg, rm, cache, texts, name):
    """[(prompt, response)] -> scores and the number of texts that were cut. Each different text is scored once."""
    limit = min(cfg.max_length or 16384, getattr(rm.model.config, "max_position_embeddings", None) or sys.maxsize)
    encoded, keys, cut = {}, [], 0
    for prompt, response in tqdm(texts, desc=f"{name}: tokenize", leave=False, delay=2, disable=RANK > 0):
        ids = encode(rm.tokenizer, prompt, response, limit)
        cut += len(ids) == limit and len(encode(rm.tokenizer, prompt, response, sys.maxsize)) > limit
        keys.append(hashlib.sha256(np.array(ids, np.int32).tobytes()).hexdigest()[:32])
        encoded[keys[-1]] = ids
    todo = [key for key in encoded if key not in cache.values]
    own = save.mine(sorted(todo, key=lambda key: -len(encoded[key])))
    sequences = [(encoded[key], 1) for key in own]
    tokens = sum(len(ids) for ids, _ in sequences)
    with tqdm(total=tokens, desc=name, unit="tok", unit_scale=True, disable=RANK > 0) as bar:
        for rows in save.micro_batches(range(len(own)), sequences, cfg.micro_tokens):
            rewards = rm.reward(rm.features(*save.model_inputs([sequences[i] for i in rows], cfg.device))[0]).tolist()
            cache.append({own[i]: reward for i, reward in zip(rows, rewards)})
            bar.update(sum(len(sequences[i][0]) for i in rows))
    if WORLD > 1:  # every text was scored by one rank; the others add 0
        owned = set(own)
        cache.values.update(zip(todo, save.total(*(cache.values[key] if key in owned else 0 for key in todo))))
    scores = [cache.values[key] for key in keys]
    if not all(map(math.isfinite, scores)):  # seen by all ranks at once
        fail(f"--rm: a score on {name} is not finite" + ", try --dtype float32" * (cfg.dtype != "float32"))
    return scores, cut

def attach_scores(bench, rows, scores):
    """Rows with the score columns that the formula reads; `scores` in the order of the rows' texts."""
    scores = iter(scores)
    return [{**row, **bench.attach(row, [next(scores) for _ in bench.texts(row)])} for row in rows]

def evaluate(cfg, path, benchmarks, first):
    """One reward model on all benchmarks -> {bench: scores, interval, counts} and {bench: bootstrap draws}.

    benchmarks: {name: rows}; first: the draws of the first reward model, for paired differences.
    """
    rm = save.to_working_copy(save.one_rank_at_a_time(lambda: RewardModel.from_pretrained(path)), cfg)
    cache = Cache(cfg.out and Path(cfg.out, "cache"), fingerprint(rm, cfg.device.split(":")[0]))
    results, draws = {}, {}
    for name, rows in benchmarks.items():
        bench = BENCHMARKS.get(name, PAIRS)
        texts = [text for row in rows for text in bench.texts(row)]
        start = time.perf_counter()
        scores, cut = score_texts(cfg, rm, cache, texts, Path(name).name)
        scored = attach_scores(bench, rows, scores)
        by_length = attach_scores(bench, rows, [len(save.last_reply(reply, "")) for _, reply in texts])
        result = bench.summary(cell_means(bench.outcomes(scored)))
        draws[name] = bootstrap(bench.outcomes(scored), bench.summary, cfg.draws, cfg.seed)
        results[name] = {
            **result, "interval": {key: interval(draws[name][key]) for key in result},
            "length_only": bench.summary(cell_means(bench.outcomes(by_length)))["average"],
            "rows": len(rows), "texts": len(texts), "truncated": cut,
            "ties": sum(a == b for row in scored for a, b in bench.pairs(row))}
        say(f"{path} on {name}: {result['average']:.2f} %, {len(rows)} rows in {time.perf_counter() - start:.1f} s")
        if cfg.out and RANK == 0:
            with open(Path(cfg.out, "scores.jsonl"), "a", encoding="utf-8") as file:
                for number, row in enumerate(scored, 1):
                    kept = {key: value for key, value in row.items() if key in KEPT_COLUMNS}
                    file.write(json.dumps({"rm": path, "bench": name, "row": number, **kept}) + "\n")
    if set(BENCHMARKS) <= set(results):
        draws["all"] = {"average": sum(draws[name]["average"] for name in BENCHMARKS) / len(BENCHMARKS)}
        results["all"] = {"average": sum(results[name]["average"] for name in BENCHMARKS) / len(BENCHMARKS),
                          "interval": {"average": interval(draws["all"]["average"])}}
    for name in results if first else ():
        results[name]["difference"] = {key: interval(x - first[name][key]) for key, x in draws[name].items()}
    return results, draws

# arXiv 2605.30888, Table 1; its JudgeBench number is the mean of the four categories, `macro` here
PAPER = {"Skywork-Reward-V2-Llama-3.2-3B": {"rewardbench": 93.0, "rewardbench2": 74.7, "rmbench": 80.0, "all": 76.0,
                                            "ppe_preference": 68.4, "ppe_correctness": 70.7, "judgebench": 69.2}}

def table(results):
    """Lines of one table: models down, benchmarks across, score and 95 % interval, and what to know when reading it."""
    first = next(iter(results.values()))
    lines = [["", *("average" if name == "all" else Path(name).name for name in first)]]
    for path, result in results.items():
        lines.append([path, *("{:.2f} [{:.1f}, {:.1f}]".format(x["average"], *x["interval"]["average"])
                              for x in result.values())])
        if result is not first:
            gains = {name: x["average"] - first[name]["average"] for name, x in result.items()}
            lines.append(["  minus the first, paired", *("{:+.2f} [{:+.2f}, {:+.2f}]".format(
                gains[name], *x["difference"]["average"]) for name, x in result.items())])
        paper = PAPER.get(Path(path).name)
        if paper:
            lines.append(["  the paper's number", *(str(paper.get(name, "")) for name in result)])
    lines.append(["the longer answer wins", *(f"{x['length_only']:.2f}" if "length_only" in x else ""
                                              for x in first.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    for path, result in results.items():
        for name, x in result.items():
            notes = [f"{x[key]} {words}" for key, words in (("ties", "exact ties"), ("truncated", "texts cut to fit"))
                     if x.get(key)]
            if x.get("rows", 0) < COMPLETE.get(name, 0):
                notes.append(f"only {x['rows']} of {COMPLETE[name]} rows, not comparable with published numbers")
            if "macro" in x:
                notes.append(f"{x['macro']:.2f} as the mean of categories, which the paper and Skywork publish")
            text += [f"{path} on {Path(name).name}: {'; '.join(notes)}"] * bool(notes)
    return text

def evaluate_reward_models(cfg):
    """All --rm on all --bench: the table, results.json and scores.jsonl. What is done is on disk at any time."""
    benchmarks = {name: read_benchmark(cfg, name) for name in cfg.bench}
    if cfg.out and RANK == 0:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        Path(cfg.out, "scores.jsonl").write_text("")
    results, first = {}, None
    for path in cfg.rm:
        results[path], draws = evaluate(cfg, path, benchmarks, first)
        first = first or draws
        write_results(cfg, results)
    say("\n".join(["", *table(results)]))

def write_results(cfg, results):
    """results.json, {model: {bench: {"average": ...}}}, in one move."""
    if cfg.out and RANK == 0:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        temporary = Path(cfg.out, "results.json.new")
        save.write_json(temporary, results)
        os.replace(temporary, Path(cfg.out, "results.json"))

# ---- 6. policies: answers -------------------------------------------------------------------------------------------
def answers_of(cfg, policy, questions, name):
    """{id: question} -> {id: answer}, sampled as in training; every rank answers its share, a killed run goes on."""
    sampling = {key: getattr(cfg, key) for key in ("max_new_tokens", "temperature", "top_p", "top_k")}
    where = Path(cfg.out, name, "answers"), fingerprint(policy, sampling, cfg.seed)
    cache, prompts = Cache(*where), {}
    context = getattr(policy.model.config, "max_position_embeddings", None) or sys.maxsize
    for key, question in questions.items():
        prompts[key] = save.encode_chat(policy.tokenizer, [{"role": "user", "content": question}], True)
        if len(prompts[key]) + cfg.max_new_tokens > context:
            fail(f"--max_new_tokens {cfg.max_new_tokens}: with question {key} of {name}, {len(prompts[key])} tokens, "
                 f"expected at most {context} together, the policy's context")
    todo = save.mine(sorted(prompts.keys() - cache.values.keys(), key=lambda key: (len(prompts[key]), key)))
    for start in tqdm(range(0, len(todo), cfg.max_rows), desc=f"{name}: answers", disable=RANK > 0):
        keys = todo[start:start + cfg.max_rows]
        seeds = [save.seed_for(cfg.seed, "answer", key) for key in keys]
        tokens, ended = save.rollout(policy, [prompts[key] for key in keys], 1, seeds, **sampling)
        texts = policy.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        cache.append({key: [text, end] for key, text, end in zip(keys, texts, ended)})
    save.barrier()
    answers = Cache(*where).values  # those of the other ranks too
    cut = sum(not answers[key][1] for key in questions)
    say(f"{name}: {len(questions)} answers, {cut} of them cut at --max_new_tokens {cfg.max_new_tokens}")
    return {key: answers[key][0] for key in questions}

def evaluate_policy(cfg):
    """All --bench of the policy: answers on every rank, judging on rank 0. What is done is on disk at any time."""
    steps = {"alpaca_eval": (alpaca_questions, alpaca_eval), "arena_hard": (arena_questions, arena_hard)}
    questions = {name: dict(list(steps[name][0](cfg).items())[:cfg.limit or None]) for name in cfg.bench}
    if "arena_hard" in cfg.bench and RANK == 0:  # refuse now, not after hours of answers
        arena_baselines(arena_settings(cfg), questions["arena_hard"])
        Judge(cfg).reply([{"role": "user", "content": "Answer with one word: are you there?"}])
    policy = save.to_working_copy(save.one_rank_at_a_time(lambda: Policy.from_pretrained(cfg.policy)), cfg)
    policy.check_logits(cfg.policy)
    results = {cfg.policy: {}}
    for name, rows in questions.items():
        answers = answers_of(cfg, policy, {key: row["prompt"] for key, row in rows.items()}, name)
        if RANK == 0:
            results[cfg.policy][name] = steps[name][1](cfg, rows, answers)
            write_results(cfg, results)
        save.barrier()

def write_rows(path, rows):
    """A .json or .jsonl file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "[" + ",\n".join(lines) + "]\n" if path.suffix == ".json" else "".join(line + "\n" for line in lines)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)

# ---- 7. AlpacaEval 2 ------------------------------------------------------------------------------------------------
def alpaca_questions(cfg):
    """The 805 instructions, in the dataset's order: the official package finds their difficulty by position."""
    if cfg.data:
        file = local_files(cfg, "alpaca_eval", ("**/alpaca_eval.json*", "alpaca_eval/instructions*.json*"))[0]
    else:
        from huggingface_hub import hf_hub_download  # comes with transformers
        try:
            file = hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset")
        except Exception as error:  # the hub client raises many types: all mean that it cannot be had
            fail(f"--bench alpaca_eval: its alpaca_eval.json is not on the hub, use --data ({save.first_line(error)})")
    rows = {}
    for where, row in save.read_rows(str(file), "data"):
        if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
            fail(f"{where}: expected a column instruction (str)")
        rows[str(len(rows))] = {"prompt": row["instruction"], "dataset": row.get("dataset", "")}
    return rows

def alpaca_annotator(cfg, folder, package):
    """The official annotator with --judge as its model: one token, m or M, weighted by its log-probs."""
    name = re.sub(r"[^\w.-]", "_", cfg.judge)
    prompt = Path(package.origin).parent / "evaluators_configs" / "alpaca_eval_clf_gpt4_turbo" / "alpaca_eval_clf.txt"
    (folder / "annotator" / name).mkdir(parents=True, exist_ok=True)
    save.write_json(folder / "annotator" / name / "configs.yaml", {name: {  # JSON is YAML too
        "prompt_template": str(prompt), "fn_completions": "openai_completions",
        "completions_kwargs": {"model_name": cfg.judge, "max_tokens": 1, "temperature": 1, "logprobs": True,
                               "top_logprobs": 5},
        "fn_completion_parser": "logprob_parser", "completion_key": "completions_all", "batch_size": 1,
        "completion_parser_kwargs": {"numerator_token": "m", "denominator_tokens": ["m", "M"], "is_binarize": False}}})
    return folder / "annotator" / name

def alpaca_eval(cfg, rows, answers):
    """model_outputs.json, then the official package for annotation, win rate and length-controlled win rate.

    Without the package, an optional install, the command to run is printed.
    """
    folder, package = Path(cfg.out, "alpaca_eval").resolve(), importlib.util.find_spec("alpaca_eval")
    write_rows(folder / "model_outputs.json", [
        {"dataset": row["dataset"], "instruction": row["prompt"], "output": answers[key], "generator": cfg.name}
        for key, row in rows.items()])
    annotator = cfg.annotator or "weighted_alpaca_eval_gpt4_turbo"
    if package and cfg.judge and not cfg.annotator:
        annotator = alpaca_annotator(cfg, folder, package)
    words = ["-m", "alpaca_eval.main", "evaluate", "--model_outputs", folder / "model_outputs.json", "--output_path",
             folder, "--annotators_config", annotator, "--is_overwrite_leaderboard", "True"]
    words += ["--reference_outputs", Path(cfg.reference).resolve()] if cfg.reference else []
    words = [str(word) for word in words]
    if not package:
        say("alpaca_eval: its package is not installed, the answers are kept. After pip install alpaca_eval: this "
            f"command again or, with the official judge,\n  python {' '.join(words)}")
        return {"command": " ".join(["python", *words])}
    environment = {**os.environ, "OPENAI_API_BASE": cfg.judge_url, "OPENAI_MAX_CONCURRENCY": str(cfg.judge_workers)}
    environment.setdefault("OPENAI_API_KEY", "none")  # local servers want none, the official client wants one
    if subprocess.run([sys.executable, *words], env=environment).returncode:
        fail(f"--bench alpaca_eval: the official package failed, see above; the answers are kept in {folder}")
    newest = max(folder.rglob("leaderboard.csv"), key=lambda path: path.stat().st_mtime)  # it may be one folder deeper
    with open(newest, encoding="utf-8", newline="") as file:
        board = {row[""]: row for row in csv.DictReader(file)}[cfg.name]
    return {name: float(board[name]) for name in ("length_controlled_winrate", "win_rate", "standard_error",
                                                  "avg_length", "n_total") if board.get(name)}

# ---- 8. Arena-Hard-v2.0 ---------------------------------------------------------------------------------------------
class Judge:
    """A client of an OpenAI-compatible chat server. The key is read from OPENAI_API_KEY and only put into a header."""

    pause = 1.0  # seconds before the second try, doubled each time up to a minute

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        """A redirect would carry the key to another host."""

        def redirect_request(self, *_):
            """Refuse: it becomes an HTTP error."""

    def __init__(self, cfg, **options):
        self.cfg, self.options = cfg, options
        if not re.match("https?://", cfg.judge_url):
            fail(f"--judge_url {cfg.judge_url}: expected http:// or https://")
        self.opener = urllib.request.build_opener(self.NoRedirect)  # verifies certificates

    def once(self, messages):
        """One request -> the text of the reply."""
        body = json.dumps({"model": self.cfg.judge, "messages": messages, **self.options}).encode()
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(self.cfg.judge_url.rstrip("/") + "/chat/completions", body, headers)
        with self.opener.open(request, timeout=self.cfg.judge_timeout) as response:
            text = json.load(response)["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise ValueError("no text")
        return text

    def reply(self, messages):
        """The text of the reply. A busy, broken or silent server is asked again, a refusal is final."""
        for attempt in range(self.cfg.judge_retries + 1):
            wait = min(self.pause * 2 ** attempt, 60) * random.uniform(0.5, 1)
            try:
                return self.once(messages)
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"
                if error.code in (401, 403):
                    fail(f"--judge_url {self.cfg.judge_url}: it refuses the key in OPENAI_API_KEY ({why})")
                if error.code < 500 and error.code not in (408, 409, 425, 429):
                    fail(f"--judge {self.cfg.judge}: {self.cfg.judge_url} refuses the request ({why})")
                after = error.headers.get("Retry-After", "")
                wait = max(wait, min(int(after), 600)) if after.isdigit() else wait
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                why = type(getattr(error, "reason", error)).__name__  # not its text, which may quote the request
            if attempt < self.cfg.judge_retries:
                time.sleep(wait)
        fail(f"--judge_url {self.cfg.judge_url}: no usable reply in {self.cfg.judge_retries + 1} tries ({why})")

def arena_settings(cfg):
    """The benchmark's own configuration and, by category, baseline and system prompt, from the checkout."""
    import yaml  # comes with transformers
    try:
        config = yaml.safe_load(Path(cfg.arena_dir, "config", "arena-hard-v2.0.yaml").read_text(encoding="utf-8"))
        patterns = config.get("regex_patterns") or [config["regex_pattern"], r"\[([AB<>=]+)\]"]
        return {"template": config["prompt_template"], "patterns": [re.compile(pattern) for pattern in patterns],
                "options": {"temperature": config["temperature"], "max_tokens": config["max_tokens"]},
                "folder": Path(cfg.arena_dir, "data", config["bench_name"]),
                "categories": runpy.run_path(str(Path(cfg.arena_dir, "utils", "judge_utils.py")))["JUDGE_SETTINGS"]}
    except Exception as error:  # runs a file of the checkout
        fail(f"--arena_dir {cfg.arena_dir}: expected a checkout of arena-hard-auto, with config/arena-hard-v2.0.yaml "
             f"and utils/judge_utils.py ({type(error).__name__}: {save.first_line(error)})")

def arena_questions(cfg):
    """{uid: row} of question.jsonl."""
    settings, rows = arena_settings(cfg), {}
    for where, row in save.read_rows(str(settings["folder"] / "question.jsonl"), "arena_dir"):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("uid", "category", "prompt")):
            fail(f"{where}: expected columns uid, category and prompt (str)")
        if row["category"] not in settings["categories"]:
            fail(f"{where}: category {row['category']!r}, expected one of {', '.join(settings['categories'])}")
        rows[row["uid"]] = row
    return rows

def arena_baselines(settings, rows):
    """{uid: (baseline's name, its answer)} from model_answer/BASELINE.jsonl."""
    names = {uid: settings["categories"][row["category"]]["baseline"] for uid, row in rows.items()}
    answers = {}
    for name in sorted(set(names.values())):
        for where, row in save.read_rows(str(settings["folder"] / "model_answer" / f"{name}.jsonl"), "arena_dir"):
            try:
                content = row["messages"][-1]["content"]
                answers[name, row["uid"]] = content["answer"] if isinstance(content, dict) else content
            except (LookupError, TypeError):
                fail(f"{where}: expected uid and messages")
    missing = [uid for uid, name in names.items() if (name, uid) not in answers]
    if missing:
        fail(f"--arena_dir: model_answer/{names[missing[0]]}.jsonl has no answer to question {missing[0]}")
    return {uid: (name, answers[name, uid]) for uid, name in names.items()}

def verdict(settings, text):
    """The last label of the first pattern that finds any; none for a label that show_result.py does not know."""
    for pattern in settings["patterns"]:
        labels = [label for label in pattern.findall(text.upper()) if label]
        if labels:
            return labels[-1] if labels[-1] in ARENA_POINTS else None
    return None

def arena_game(judge, settings, messages):
    """One game. A reply without verdict is asked for twice more; then its score is null, as in the official code."""
    for _ in range(3):
        text = judge.reply(messages)
        score = verdict(settings, text)
        if score:
            break
    return {"score": score, "judgment": {"answer": text}, "prompt": messages}

def arena_judgments(path, games):
    """{uid: row} of a model_judgment file, of those rows that judged exactly the messages in `games`."""
    done = {}
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        try:
            row = json.loads(line)
            if [game["prompt"] for game in row["games"]] == games.get(row["uid"]):
                done[row["uid"]] = row
        except (ValueError, LookupError, TypeError):
            pass  # empty, or cut short by a kill: the question is judged again
    return done

def arena_hard(cfg, rows, answers):
    """model_answer and model_judgment files that the checkout's own show_result.py reads, and the scores.

    A question is two games, written as one line when both are judged. A line counts as done only where it shows the
    same texts: a killed run goes on, another policy of the same name starts anew, and nothing is counted twice.
    """
    settings = arena_settings(cfg)
    baselines = arena_baselines(settings, rows)
    write_rows(settings["folder"] / "model_answer" / f"{cfg.name}.jsonl", [
        {"uid": uid, "ans_id": hashlib.sha256(f"{cfg.name} {uid}".encode()).hexdigest()[:22], "model": cfg.name,
         "messages": [{"role": "user", "content": row["prompt"]},
                      {"role": "assistant", "content": {"answer": answers[uid]}}],
         **style_metadata(answers[uid])} for uid, row in rows.items()])
    judge, games = Judge(cfg, **settings["options"]), {}
    for uid, row in rows.items():
        system = {"role": "system", "content": settings["categories"][row["category"]]["system_prompt"]}
        ours, theirs = answers[uid], baselines[uid][1]
        games[uid] = [[system, {"role": "user", "content": settings["template"].format(
            QUESTION=row["prompt"], ANSWER_A=a, ANSWER_B=b)}] for a, b in ((theirs, ours), (ours, theirs))]
    path = settings["folder"] / "model_judgment" / cfg.judge / f"{cfg.name}.jsonl"
    done = arena_judgments(path, games)
    write_rows(path, done.values())

    refusals = []

    def judged(uid):
        """One line of the file; nothing more is asked after a refusal, but what is under way is kept."""
        return None if refusals else {
            "uid": uid, "category": rows[uid]["category"], "judge": cfg.judge, "model": cfg.name,
            "baseline": baselines[uid][0], "games": [arena_game(judge, settings, game) for game in games[uid]]}

    with concurrent.futures.ThreadPoolExecutor(cfg.judge_workers) as pool, open(path, "a", encoding="utf-8") as file:
        futures = [pool.submit(judged, uid) for uid in games if uid not in done]
        for future in tqdm(concurrent.futures.as_completed(futures), "arena_hard: judge", len(futures)):
            try:
                row = future.result()
            except UsageError as refusal:
                refusals.append(refusal)
            else:
                if row:
                    done[row["uid"]] = row
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    if refusals:
        raise refusals[0]
    return arena_report(cfg, done.values())

def arena_report(cfg, rows):
    """Scores, intervals and what was left out."""
    outcomes = list(arena_hard_outcomes(rows))
    scores, draws = arena_hard_scores(rows), bootstrap(outcomes, arena_hard_summary, cfg.draws, cfg.seed)
    result = {**scores, "interval": {key: interval(x) for key, x in draws.items()}, "judge": cfg.judge,
              "questions": len(rows), "without_verdict": len(rows) - len({unit for unit, _, _ in outcomes})}
    for category, (low, high) in result["interval"].items():
        say(f"{cfg.name} on arena_hard {category}: {scores[category]:.1f} % [{low:.1f}, {high:.1f}] by {cfg.judge}, no "
            f"style control; in the checkout: python show_result.py -j {cfg.judge} -c {category}")
    if result["without_verdict"]:
        say(f"arena_hard: {result['without_verdict']} of {len(rows)} questions left out, a game has no verdict")
    return result

def style_metadata(text):
    """What the official style control reads: tokens, and markdown outside code blocks. Nothing without tiktoken."""
    try:
        import tiktoken
        tokens = len(tiktoken.encoding_for_model("gpt-4o").encode(text, disallowed_special=()))
    except Exception:  # not installed, or its vocabulary cannot be fetched: only style control needs it
        return {}
    plain = re.sub("```([^`]*)```", "", text)

    def count(pattern):
        return len(re.findall(pattern, plain, re.M))

    return {"metadata": {
        "token_len": tokens, "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")}}}

# ---- 9. main --------------------------------------------------------------------------------------------------------
def main(argv=None):
    """Parse, check, evaluate. Bad input: one line on stderr and exit code 2; what was done so far is kept."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        cfg = save.parse_config(argv, EvalConfig).checked()
        save.start_ranks(cfg.device)
        (evaluate_reward_models if cfg.rm else evaluate_policy)(cfg)
    except UsageError as error:
        if RANK == 0:
            print(f"eval.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a disk that is full or gone
        print(f"eval.py: error: {error}; what was done so far is kept", file=sys.stderr)
        sys.exit(2)
    finally:
        save.stop_ranks()

if __name__ == "__main__":
    main()
