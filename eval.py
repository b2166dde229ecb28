"""eval.py: six reward-model (RM) benchmarks, scored as their official code does; answers for two policy benchmarks.

    python eval.py --rm DIR_OR_HUB_NAME [MORE ...] --bench all --out OUT     # the six of the paper's Table 1
    python eval.py --rm DIR --bench judgebench pairs.jsonl --data DIR --out OUT     # local files, your own pairs
    torchrun --nproc-per-node 4 eval.py --rm DIR --bench all --out OUT
    python eval.py --policy DIR --bench alpaca_eval arena_hard --data DIR --out OUT     # answers, to be judged

How a number is made:
    1  read_benchmark   rows with the official column names, from the hub or from --data
    2  score_texts      each different text once, in the RM's own template, longest first, cached
    3  *_scores         rows -> percentages: pure functions, importable without loading a model
    4  bootstrap        resampled units -> 95 % intervals, and paired ones for the difference of two RMs
"""
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import save
from save import RANK, Policy, RewardModel, UsageError, blamed, expect, say

# ---- 1. configuration
@dataclasses.dataclass
class EvalConfig:
    """Evaluate reward models (--rm) or a policy (--policy) on benchmarks."""
    rm: list = dataclasses.field(default_factory=list)  # folders or hub names; differences are to the first
    policy: str = ""  # folder or hub name, for alpaca_eval and arena_hard
    bench: list = dataclasses.field(default_factory=list)  # benchmarks, all, or .json(l), .parquet files of pairs
    data: str = ""  # folder with local copies; empty: the hub
    out: str = ""  # folder for results.json, scores.jsonl and the cache; empty: print only
    limit: int = 0  # only the first rows of each benchmark, for a quick look; 0: all
    # reward models
    max_length: int = 0  # tokens of the longest text; 0: the model's context, at most 16384
    dtype: str = "float32"  # bfloat16 makes ties; auto: bfloat16 on a GPU
    device: str = "auto"  # auto: a GPU where there is one; cpu
    micro_tokens: int = 0  # padded tokens per batch; 0: 16384 on a GPU, 2048 on a CPU
    draws: int = 1000  # bootstrap samples
    seed: int = 0  # of the bootstrap and of the policy's answers
    # policies
    name: str = ""  # the policy's name in files; empty: from its path
    max_new_tokens: int = 2048  # longest answer
    temperature: float = 0.7  # as in training (Table 8); 0: greedy
    top_p: float = 0.8  # Table 8
    top_k: int = 20  # Table 8
    max_rows: int = 32  # answers decoded together

    def checked(self):
        """Refuse what cannot work, naming the flag; replace "auto" and 0 by what will be used."""
        expect(bool(self.rm) != bool(self.policy), "expected either --rm or --policy")
        for flag, given in (("rm", self.rm), ("bench", [Path(name).name for name in self.bench])):
            expect(len(set(given)) == len(given), f"--{flag} {' '.join(given)}: expected different names")
        names = list(BENCHMARKS if self.rm else QUESTIONS)
        bench = list(dict.fromkeys(itertools.chain(*(names if name == "all" else [name] for name in self.bench))))
        wrong = [name for name in bench if name not in names and not (self.rm and re.search(DATA_FILE, name))]
        files = " or a .json(l) or .parquet file of pairs" if self.rm else ""
        expect(bench and not wrong, f"{' '.join(['--bench', *wrong])}: expected one or more of {', '.join(names)}, "
               f"all{files}")
        expect(not self.data or Path(self.data).is_dir(), f"--data {self.data}: expected a folder")
        for name in ("draws", "max_new_tokens", "top_p", "max_rows"):
            expect(getattr(self, name) > 0, f"--{name} {getattr(self, name)}: expected more than 0")
        for name in ("limit", "max_length", "micro_tokens", "temperature", "top_k"):
            expect(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: expected 0 or more")
        fine = self.rm or self.data and self.out
        expect(fine, "--policy: expected --data, a folder with the questions, and --out, one for the answers")
        gpu = self.device == "auto" and torch.cuda.is_available()
        used = {"bench": bench, "device": f"cuda:{save.LOCAL_RANK}" if gpu else "cpu",
                "dtype": self.dtype.replace("auto", "bfloat16" if gpu else "float32"),
                "micro_tokens": self.micro_tokens or (16384 if gpu else 2048),
                "name": self.name or "-".join(Path(self.policy).parts[-2:])}
        return dataclasses.replace(self, **used)

# ---- 2. score formulas: pure functions of scores
# Rows are dicts with the official columns plus the model's scores, the result is a dict of percentages; a part without
# rows is left out. A formula's body yields (unit, cell, value): `value` is a term of the mean `cell`, `unit` is what
# the bootstrap resamples.

def cell_means(outcomes):
    """{cell: mean of its values}."""
    values = collections.defaultdict(list)
    for _, cell, value in outcomes:
        values[cell].append(value)
    return {cell: sum(terms) / len(terms) for cell, terms in values.items()}

def formula(summary):
    """Make scores(rows) = summary({cell: mean}) of a generator of outcomes."""
    def decorate(outcomes):
        @functools.wraps(outcomes)
        def scores(rows):
            return summary(cell_means(outcomes(rows)))
        scores.outcomes, scores.summary = outcomes, summary
        return scores
    return decorate

def with_average(parts):
    """Fractions -> percentages, and their unweighted mean as "average"."""
    percent = {name: 100 * value for name, value in parts.items()}
    return {**percent, "average": sum(percent.values()) / len(percent)}

@formula(with_average)
def preference_scores(rows):
    """Your own pairs. Rows: score_chosen, score_rejected -> average. A tie is wrong. A unit is a prompt."""
    for number, row in enumerate(rows):
        yield str(row.get("prompt", number)), "average", row["score_chosen"] > row["score_rejected"]

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

def rewardbench_summary(cells):
    """Sections weighted by the official counts, then their plain mean; the prior sets are not in it."""
    sections = {}
    for section, counts in REWARDBENCH_SECTIONS.items():
        present = {subset: count for subset, count in counts.items() if subset in cells}
        if present:
            right = sum(count * cells[subset] for subset, count in present.items())
            sections[section] = right / sum(present.values())
    return with_average(sections)

@formula(rewardbench_summary)
def rewardbench_scores(rows):
    """RewardBench. Rows: subset, score_chosen, score_rejected -> Chat, Chat Hard, Safety, Reasoning, average.
    A tie is wrong. A section without rows is left out, for --limit; officially it counts 0."""
    for unit, row in enumerate(rows):
        yield unit, row["subset"], row["score_chosen"] > row["score_rejected"]

def rewardbench2_summary(cells):
    """Plain mean of the six subsets. Ties is 0.3, 0.3, 0.2, 0.2 and 0.01 of its five parts: 101 % is possible."""
    weights = {"tied": 0.3, "ref": 0.3, "prefers right to spread": 0.2, "in both forms": 0.2, "margin": 0.01}
    subsets = {cell: mean for cell, mean in cells.items() if isinstance(cell, str)}
    for name in dict.fromkeys(cell[0] for cell in cells if not isinstance(cell, str)):
        subsets[name] = sum(weight * cells.get((name, part), 0) for part, weight in weights.items())
    return with_average(subsets)

@formula(rewardbench2_summary)
def rewardbench2_scores(rows):
    """RewardBench 2. Rows: id, subset, num_correct, scores (right ones first) -> each subset, average.
    The first completion shares its credit with those that tie with it at the top. A Ties prompt comes as "ref:N" (one
    right answer) and "tied:N" (many): together one unit.
    gap = worst right - best wrong answer, spread = best - worst right answer of the tied form."""
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

def rmbench_summary(cells):
    """Domain: mean of easy, normal and hard. Level: mean over domains. Average: mean of either."""
    domains = [name for name in ("chat", "math", "code", "safety") if (name, "hard") in cells]
    levels = ("easy", "normal", "hard")
    by_domain = {name: sum(cells[name, level] for level in levels) / 3 for name in domains}
    by_level = {level: 100 * sum(cells[name, level] for name in domains) / len(domains) for level in levels}
    return {**by_level, **with_average(by_domain)}

@formula(rmbench_summary)
def rmbench_scores(rows):
    """RM-Bench. Rows: domain, score_chosen [3], score_rejected [3] -> chat, math, code, safety, easy, normal, hard,
    average.
    3x3 comparisons of chosen i and rejected j, a tie is wrong; 0 concise, 1 detailed, 2 with markdown.
    hard: the rejected one has the fancier style (i < j). The two safety domains are pooled by row."""
    for unit, row in enumerate(rows):
        domain = re.match("chat|math|code|safety", row["domain"])[0]
        better = [[chosen > rejected for rejected in row["score_rejected"]] for chosen in row["score_chosen"]]
        yield unit, (domain, "easy"), (better[1][0] + better[2][0] + better[2][1]) / 3
        yield unit, (domain, "normal"), (better[0][0] + better[1][1] + better[2][2]) / 3
        yield unit, (domain, "hard"), (better[0][1] + better[0][2] + better[1][2]) / 3

@formula(with_average)
def ppe_preference_scores(rows):
    """PPE Preference. Rows: winner, score_1, score_2 -> average.
    Only rows that model_a or model_b wins; a tie of the scores is wrong."""
    for unit, row in enumerate(rows):
        sign = {"model_a": 1, "model_b": -1}.get(row["winner"], 0)
        if sign:
            yield unit, "average", sign * row["score_1"] > sign * row["score_2"]

@formula(with_average)
def ppe_correctness_scores(rows):
    """PPE Correctness. Rows: benchmark, scores (bool per response), sampled_conflict_pairs, rewards -> each benchmark,
    average: the plain mean of the sets.
    The sampled pairs (i, j), 0-based, are of a right and a wrong response; a tie is wrong."""
    for unit, row in enumerate(rows):
        for i, j in row["sampled_conflict_pairs"]:
            right, wrong = (i, j) if row["scores"][i] > row["scores"][j] else (j, i)
            yield unit, row["benchmark"], row["rewards"][right] > row["rewards"][wrong]

JUDGEBENCH_CATEGORIES = {"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning", "livebench-math": "math",
                         "livecodebench": "coding"}

def judgebench_summary(cells):
    """average: over rows, the official number. macro: mean of the categories, which Skywork publishes.
    The paper's 69.2 is Skywork's macro, 237/350 = 67.7 over rows. What it measured itself is k/350."""
    categories = with_average({name: cells[name] for name in JUDGEBENCH_CATEGORIES.values() if name in cells})
    return {**categories, "average": 100 * cells["all"], "macro": categories["average"]}

@formula(judgebench_summary)
def judgebench_scores(rows):
    """JudgeBench. Rows: source, label, score_A, score_B -> knowledge, reasoning, math, coding, average (micro) and
    macro.
    Each row counts in its category and in all; a tie is wrong, as in the official two-order mode."""
    for unit, row in enumerate(rows):
        sign = {"A>B": 1, "B>A": -1}[row["label"]]
        right = sign * row["score_A"] > sign * row["score_B"]
        yield unit, "all", right
        for start, category in JUDGEBENCH_CATEGORIES.items():
            if row["source"].startswith(start):
                yield unit, category, right

# the first player's points: a strong verdict counts as three entries
ARENA_POINTS = {"A>>B": [1] * 3, "A>B": [1], "A=B": [0.5], "A<B": [0], "A<<B": [0] * 3,
                "B>>A": [0] * 3, "B>A": [0], "B=A": [0.5], "B<A": [1], "B<<A": [1] * 3}

@formula(lambda cells: {category: 100 * mean for category, mean in cells.items()})
def arena_hard_scores(rows):
    """Arena-Hard-v2.0 without style control. Rows: uid, category, games [{score}, {score}] -> hard_prompt,
    creative_writing: there is no official mean of the two.
    games[0]: the baseline is A; games[1]: the model is A. A question with a game without verdict is left out. The
    official script prints a mean of 100 unseeded bootstraps of this, +-0.1."""
    for unit, row in enumerate(rows):
        verdicts = [game and ARENA_POINTS.get(game["score"]) for game in row["games"]]
        if all(verdicts):
            for points in [1 - p for p in verdicts[0]] + verdicts[1]:
                yield unit, row["category"], points

# ---- 3. intervals
def bootstrap(scores, rows, draws, seed):
    """{key: (draws,)}: the scores of resampled units, the same ones for two RMs on the same rows.
    Units are resampled among those that count in the same cells: the make-up of a benchmark stays."""
    units = collections.defaultdict(lambda: collections.defaultdict(lambda: [0.0, 0]))
    for unit, cell, value in scores.outcomes(rows):
        units[unit][cell][0] += value
        units[unit][cell][1] += 1
    strata = collections.defaultdict(list)
    for cells in units.values():
        names = sorted(cells, key=repr)
        strata[tuple(names)].append([cells[name] for name in names])
    rng, sums = np.random.default_rng(seed), collections.defaultdict(float)
    for cells, table in strata.items():
        table = np.array(table, dtype=float)  # (units, cells, sum and count)
        counts = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), size=draws)
        for cell, resampled in zip(cells, np.moveaxis(np.tensordot(counts, table, 1), 1, 0)):
            sums[cell] = sums[cell] + resampled  # (draws, sum and count)
    return scores.summary({cell: x[:, 0] / x[:, 1] for cell, x in sums.items()})

def interval(draws):
    """The middle 95 % of bootstrap draws."""
    return [float(x) for x in np.percentile(draws, [2.5, 97.5])]

# ---- 4. benchmarks
def check_row(row, where, columns):
    """The row if it has these columns: {name: type, [str] for texts, or the pattern of a string}."""
    for name, kind in columns.items():
        value = row.get(name) if isinstance(row, dict) else None
        if isinstance(kind, str):
            fits = isinstance(value, str) and re.fullmatch(kind, value)
        elif kind == [str]:
            fits = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
        else:
            fits = isinstance(value, kind)
        wanted = "list of str" if kind == [str] else kind.__name__ if isinstance(kind, type) else kind
        expect(fits, f"{where}: expected a column {name} ({wanted}), got {value!r:.80}")
    return row

@dataclasses.dataclass
class Benchmark:
    """Where a benchmark's rows are, what they hold, and how their scores become numbers."""
    scores: callable  # the formula
    responses: dict  # {score column: column of the response or list of responses}
    columns: dict  # what a row must have, see `check_row`
    hub: dict = dataclasses.field(default_factory=dict)  # {label: "name:split"}
    files: tuple = ()  # patterns below --data, the first that finds anything
    size: int = 0  # rows of the official set; 0: not known
    prompt: str = "prompt"  # column
    side: str = "left"  # where its official script cuts a text that is too long
    prepare: callable = lambda row, where, label: row  # -> the row to score; None: leave it out
    compared: callable = None  # row -> pairs of scores, to count ties; None: all with all

    def texts(self, row):
        """[(where the row is from, prompt, response)], in the order in which `attach` takes their scores."""
        columns = (row[column] for column in self.responses.values())
        texts = itertools.chain(*([value] if isinstance(value, str) else value for value in columns))
        return [(row["where"], row[self.prompt], text) for text in texts if text is not None]

    def attach(self, row, scores):
        """The row with its score columns; scores: an iterator. A response that is None gets none."""
        return {**row, **{name: next(scores) if isinstance(row[column], str) else
                          [None if text is None else next(scores) for text in row[column]]
                          for name, column in self.responses.items()}}

    def ties(self, row):
        """How many of the comparisons are exact ties."""
        columns = [np.ravel(row[name]).tolist() for name in self.responses]
        return sum(a == b for a, b in (self.compared(row) if self.compared else itertools.product(*columns)))

def prepare_pair(row, where, label):
    """Strings or whole chats, as save.py trains on them."""
    with blamed(where):
        prompt, (chosen, rejected) = save.as_pair(row)
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}

def prepare_rewardbench2(row, where, label):
    """Right answers first; a prompt of Ties comes in two forms."""
    if row["subset"].lower() == "ties":
        check_row(row, where, {"id": r"(ref|tied):\d+"})
    return {**row, "num_correct": len(row["chosen"]), "responses": row["chosen"] + row["rejected"]}

def prepare_rmbench(row, where, label):
    """The domain is a column on the hub and the file's name in the repository."""
    three = len(row["chosen"]) == len(row["rejected"]) == 3
    expect(three, f"{where}: expected three chosen and three rejected responses")
    row = {**row, "domain": row.get("domain") or Path(label).name.split("_")[0]}
    return check_row(row, where, {"domain": "(chat|math|code|safety).*"})

def prepare_ppe_correctness(row, where, label):
    """One row of a Best-of-K set, with the responses that occur in a pair: at most 10 of 32.
    The set's name is the label or a column of its own."""
    responses = [None] * len(row["scores"])
    for pair in row["sampled_conflict_pairs"]:
        both = {row["scores"][k] for k in pair if k in range(len(responses))} == {False, True}
        expect(both, f"{where}: pair {pair} of sampled_conflict_pairs: expected a right and a wrong response")
        for k in pair:
            responses[k] = check_row(row, where, {f"response_{k + 1}": str})[f"response_{k + 1}"]
    name = row.get("benchmark") or re.sub(r"^PPE-|-Best-of-K.*$", "", label, flags=re.S)
    row = check_row({**row, "benchmark": name, "responses": responses}, where, {"benchmark": "|".join(PPE_SETS)})
    return row if row["sampled_conflict_pairs"] else None

PAIRS = Benchmark(preference_scores, {"score_chosen": "chosen", "score_rejected": "rejected"}, columns={},
                  prepare=prepare_pair)
PPE_SETS = ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")
BENCHMARKS = {
    "rewardbench": Benchmark(
        rewardbench_scores, PAIRS.responses, size=2985, hub={"": "allenai/reward-bench:filtered"},
        files=("reward-bench/**/filtered*", "rewardbench.*"), columns={
            "prompt": str, "chosen": str, "rejected": str,
            "subset": "|".join(itertools.chain(*REWARDBENCH_SECTIONS.values()))}),
    "rewardbench2": Benchmark(
        rewardbench2_scores, {"scores": "responses"}, size=1865, side="right",
        hub={"": "allenai/reward-bench-2:test"}, files=("reward-bench-2/**/test*", "rewardbench2.*"),
        prepare=prepare_rewardbench2,
        columns={"id": str, "prompt": str, "chosen": [str], "rejected": [str],
                 "subset": "(?i:Factuality|Precise IF|Math|Safety|Focus|Ties)"},
        compared=lambda row: itertools.product(row["scores"][:row["num_correct"]], row["scores"][row["num_correct"]:])),
    "rmbench": Benchmark(
        rmbench_scores, PAIRS.responses, size=1327, hub={"": "THU-KEG/RM-Bench:train"},
        files=("**/total_dataset.json*", "**/*_filtered.json*", "rmbench.*"), prepare=prepare_rmbench,
        columns={"prompt": str, "chosen": [str], "rejected": [str]}),
    "ppe_preference": Benchmark(
        ppe_preference_scores, {"score_1": "response_1", "score_2": "response_2"},
        hub={"": "lmarena-ai/PPE-Human-Preference-V1:test"},
        files=("PPE-Human-Preference-V1/**/test*", "ppe_preference.*"),
        columns={"prompt": str, "response_1": str, "response_2": str, "winner": str},
        prepare=lambda row, where, label: row if row["winner"] in ("model_a", "model_b") else None),
    "ppe_correctness": Benchmark(
        ppe_correctness_scores, {"rewards": "responses"}, size=2555,
        hub={name: f"lmarena-ai/PPE-{name}-Best-of-K:train" for name in PPE_SETS},
        files=("PPE-*-Best-of-K/**/train*", "ppe_correctness.*"), prepare=prepare_ppe_correctness,
        columns={"prompt": str, "scores": list, "sampled_conflict_pairs": list},
        compared=lambda row: [(row["rewards"][i], row["rewards"][j]) for i, j in row["sampled_conflict_pairs"]]),
    "judgebench": Benchmark(
        judgebench_scores, {"score_A": "response_A", "score_B": "response_B"}, size=350, prompt="question",
        hub={"": "ScalerLab/JudgeBench:gpt"}, files=("**/gpt.jsonl*", "**/*gpt-4o*.jsonl*", "JudgeBench/**/gpt*"),
        columns={"question": str, "response_A": str, "response_B": str, "label": "A>B|B>A",
                 "source": f"({'|'.join(JUDGEBENCH_CATEGORIES)}).*"}),
}
KEPT_COLUMNS = {  # of scores.jsonl: what the formulas read, and ids
    "id", "question_id", "pair_id", "subset", "domain", "benchmark", "source", "winner", "label", "num_correct",
    "sampled_conflict_pairs", "scores", "rewards", "score_chosen", "score_rejected", "score_1", "score_2", "score_A",
    "score_B"}
DATA_FILE = r"\.(jsonl?(\.gz)?|parquet)$"

def local_files(cfg, name, patterns):
    """{label: path} below --data by the first pattern that finds any. No set may be there twice."""
    for pattern in patterns:
        found = {}
        for path in sorted(path for path in Path(cfg.data).glob(pattern) if re.search(DATA_FILE, path.name)):
            label = str(path.relative_to(cfg.data)) if name == "ppe_correctness" else path.name  # its sets are folders
            label = re.sub(DATA_FILE, "", label)
            expect(label not in found, f"--data: expected one of {found.get(label)} and {path} for --bench {name}")
            found[label] = str(path)
        if found:
            return found
    expect(False, f"--data {cfg.data}: nothing for --bench {name}, expected {' or '.join(patterns)}")

def read_benchmark(cfg, name):
    """The rows of a benchmark or of a file of pairs, checked: a bad row stops the run."""
    bench = BENCHMARKS.get(name, PAIRS)
    sources = {name: name} if bench is PAIRS else local_files(cfg, name, bench.files) if cfg.data else bench.hub
    rows = [(where, bench.prepare(check_row(row, where, bench.columns), where, label))
            for label, source in sources.items() for where, row in save.read_rows(source, "bench")]
    rows = [{**row, "where": where} for where, row in rows if row]
    return expect(rows[:cfg.limit or None], f"--bench {name}: no rows")

# ---- 5. scoring
def encode(tokenizer, prompt, response, max_length, side="left"):
    """Token ids in the RM's own template, exactly one BOS; too long: cut on that side, BOS kept."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = save.encode_chats(tokenizer, [messages + [{"role": "assistant", "content": response}]])[0]
    start = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    if side == "right":
        return ids[:max_length]
    return ids if len(ids) <= max_length else start + ids[len(ids) - max_length + len(start):]

def fingerprint(module, *also):
    """sha256 of class, configuration and weights as they will run: what cached numbers depend on."""
    settings = {key: value for key, value in module.model.config.to_dict().items()
                if key not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")}
    digest = hashlib.sha256(repr((type(module.model).__name__, sorted(settings.items()), also)).encode())
    for name, p in module.model.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]

class Cache:
    """{key: value} of one model, appended to a file of this rank; every rank's files are read at start."""

    def __init__(self, folder, name):
        self.values, self.path = {}, folder and Path(folder, f"{name}.{RANK}.jsonl")
        for path in sorted(Path(folder).glob(f"{name}.*.jsonl")) if folder else []:
            for line in path.read_bytes().split(b"\n"):
                try:
                    self.values.update(json.loads(line))
                except ValueError:
                    pass  # empty, or cut short by a kill: its texts are scored again
        save.total(0)  # nobody appends before everybody has read

    def append(self, new):
        """Remember `new`, in the file too."""
        self.values.update(new)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:  # a line feed first: the last line may have been cut short
                file.write(b"\n" + json.dumps(new).encode())

@torch.no_grad()
def score_texts(cfg, rm, cache, texts, name, side="left"):
    """Benchmark.texts -> scores and the number of texts that were cut. Each different text is scored once."""
    limit = min(cfg.max_length or 16384, rm.model.positions)
    encoded, keys, cut = {}, [], 0
    for where, prompt, response in tqdm(texts, desc=f"{name}: tokenize", leave=False, delay=2, disable=save.NO_BAR):
        with blamed(f"{where}: the chat template of {rm.tokenizer.name_or_path}"):
            ids = encode(rm.tokenizer, prompt, response, limit, side)
            cut += len(ids) == limit and len(encode(rm.tokenizer, prompt, response, sys.maxsize)) > limit
        keys.append(hashlib.sha256(np.array(ids, np.int32).tobytes()).hexdigest()[:32])
        encoded[keys[-1]] = ids
    todo = [key for key in encoded if key not in cache.values]
    own = save.mine(sorted(todo, key=lambda key: -len(encoded[key])))
    sequences = [(encoded[key], 1) for key in own]
    batches = save.micro_batches(range(len(own)), sequences, cfg.micro_tokens)
    for rows in tqdm(batches, desc=name, disable=save.NO_BAR):
        rewards, _ = rm(*save.model_inputs([sequences[i] for i in rows], cfg.device))
        cache.append({own[i]: reward for i, reward in zip(rows, rewards.tolist())})
    # every text was scored by one rank; the others add 0
    cache.values.update(zip(todo, save.total(*(cache.values.get(key, 0) for key in todo))))
    scores = [cache.values[key] for key in keys]
    finite = all(map(math.isfinite, scores))  # seen by all ranks at once
    expect(finite, f"--rm: a score on {name} is not finite" + ", try --dtype float32" * (cfg.dtype != "float32"))
    return scores, cut

def evaluate(cfg, path, benchmarks, first):
    """One reward model on all benchmarks -> {bench: scores, interval, counts} and {bench: bootstrap draws}.
    benchmarks: {name: rows}; first: the draws of the first reward model, for paired differences."""
    rm = save.to_working_copy(save.together(lambda: RewardModel.from_pretrained(path, cfg.device)), cfg)
    cache = Cache(cfg.out and Path(cfg.out, "cache"), fingerprint(rm, cfg.device.split(":")[0]))
    results, draws = {}, {}
    for name, rows in benchmarks.items():
        bench = BENCHMARKS.get(name, PAIRS)
        texts = [text for row in rows for text in bench.texts(row)]
        scores, cut = score_texts(cfg, rm, cache, texts, Path(name).name, bench.side)
        scores, lengths = iter(scores), iter([len(response) for _, _, response in texts])
        scored, by_length = ([bench.attach(row, values) for row in rows] for values in (scores, lengths))
        result = bench.scores(scored)
        draws[name] = bootstrap(bench.scores, scored, cfg.draws, cfg.seed)
        units, count = len({unit for unit, _, _ in bench.scores.outcomes(scored)}), len(rows)
        results[name] = {**result, "interval": {key: interval(draws[name][key]) for key in result},
                         "length_only": bench.scores(by_length)["average"], "rows": count, "units": units,
                         "texts": len(texts), "truncated": cut, "ties": sum(map(bench.ties, scored))}
        say(f"{path} on {name}: {result['average']:.2f} %, {count} rows{f' of {units} prompts' * (units < count)}")
        if cfg.out and RANK == 0:
            with open(Path(cfg.out, "scores.jsonl"), "a", encoding="utf-8") as file:
                for number, row in enumerate(scored, 1):
                    kept = {key: value for key, value in row.items() if key in KEPT_COLUMNS}
                    file.write(json.dumps({"rm": path, "bench": name, "row": number, **kept}) + "\n")
    if set(BENCHMARKS) <= set(results):
        draws["all"] = {"average": np.mean([draws[name]["average"] for name in BENCHMARKS], 0)}
        results["all"] = {key: sum(results[name][key] for name in BENCHMARKS) / len(BENCHMARKS)
                          for key in ("average", "length_only")}
        results["all"]["interval"] = {"average": interval(draws["all"]["average"])}
    for name in results if first else ():
        results[name]["difference"] = {key: interval(x - first[name][key]) for key, x in draws[name].items()}
    return results, draws

def table(results):
    """Lines: models down, benchmarks across, score and 95 % interval; then what a reader must know."""
    first = next(iter(results.values()))
    lines = [["", *(Path(name).name for name in first)]]
    for path, result in results.items():
        lines.append([path, *("{:.2f} [{:.1f}, {:.1f}]".format(x["average"], *x["interval"]["average"])
                              for x in result.values())])
        if result is not first:
            lines.append(["  minus the first, paired", *("{:+.2f} [{:+.2f}, {:+.2f}]".format(
                x["average"] - first[name]["average"], *x["difference"]["average"]) for name, x in result.items())])
    lines.append(["the longer answer wins", *(f"{x['length_only']:.2f}" for x in first.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    for path, result in results.items():
        for name, x in result.items():
            notes = [f"{x[key]} {words}" for key, words in (("ties", "exact ties"), ("truncated", "texts cut to fit"))
                     if x.get(key)]
            if name in BENCHMARKS and x["rows"] < BENCHMARKS[name].size:
                notes.append(f"only {x['rows']} of {BENCHMARKS[name].size} rows, not comparable with published numbers")
            if "macro" in x:
                notes.append(f"{x['macro']:.2f} as the mean of categories, which in the paper only 69.2 is")
            text += [f"{path} on {Path(name).name}: {'; '.join(notes)}"] * bool(notes)
    return text

def evaluate_reward_models(cfg):
    """All --rm on all --bench: the table, results.json, scores.jsonl."""
    benchmarks = {name: read_benchmark(cfg, name) for name in cfg.bench}
    if cfg.out and RANK == 0:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        Path(cfg.out, "scores.jsonl").write_text("")
    results, first = {}, None
    for path in cfg.rm:
        results[path], draws = evaluate(cfg, path, benchmarks, first)
        first = first or draws
        if cfg.out and RANK == 0:
            Path(cfg.out, "results.json").write_text(json.dumps(results, indent=1))
    say("\n".join(["", *table(results)]))

# ---- 6. policies: answers
def answers_of(cfg, policy, questions, name):
    """{id: question} -> {id: (answer, {} or the text with its thinking)}, sampled as in training, a share on each rank.
    A killed run goes on."""
    sampling = {key: getattr(cfg, key) for key in ("max_new_tokens", "temperature", "top_p", "top_k")}
    where = Path(cfg.out, name, "answers"), fingerprint(policy, sampling, cfg.seed)
    cache, prompts = Cache(*where), {}
    for key, question in questions.items():
        with blamed(f"--bench {name} question {key}: the chat template of {cfg.policy}"):
            [prompts[key]] = save.encode_chats(policy.tokenizer, [[{"role": "user", "content": question}]], True)
        expect(len(prompts[key]) + cfg.max_new_tokens <= policy.model.positions, f"--max_new_tokens "
               f"{cfg.max_new_tokens}: with question {key} of {name}, {len(prompts[key])} tokens, expected at most "
               f"{policy.model.positions} together, the policy's context")
    todo = save.mine(sorted(prompts.keys() - cache.values.keys(), key=lambda key: (len(prompts[key]), key)))
    for start in tqdm(range(0, len(todo), cfg.max_rows), desc=f"{name}: answers", disable=save.NO_BAR):
        keys = todo[start:start + cfg.max_rows]
        seeds = [save.seed_for(cfg.seed, "answer", key) for key in keys]
        tokens, ended = save.rollout(policy, [prompts[key] for key in keys], 1, seeds, **sampling)
        texts = policy.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        cache.append({key: [text, end] for key, text, end in zip(keys, texts, ended)})
    save.total(0)
    texts = Cache(*where).values  # those of the other ranks too
    opened = [key for key in questions if policy.tokenizer.decode(prompts[key]).rstrip().endswith("<think>")]
    answers = {key: without_thinking("<think>" * (key in opened) + texts[key][0]) for key in questions}
    cut, empty = sum(not texts[key][1] for key in questions), sum(not answer for answer, _ in answers.values())
    say(f"{name}: {len(questions)} answers, {cut} of them cut at --max_new_tokens {cfg.max_new_tokens}, {empty} empty")
    return answers

def without_thinking(text):
    """Of a text that begins with <think> what follows the last </think>, if any; and a column with the whole text."""
    if not text.lstrip().startswith("<think>"):
        return text, {}
    answer = text.rpartition("</think>")[2].strip()
    return "" if "<think>" in answer else answer, {"with_thinking": text}

def evaluate_policy(cfg):
    """All --bench of the policy: answers on every rank, files on rank 0."""
    questions = {name: read_questions(cfg, name) for name in cfg.bench}
    policy = save.to_working_copy(save.together(lambda: Policy.from_pretrained(cfg.policy, cfg.device)), cfg)
    for name, rows in questions.items():
        answers = answers_of(cfg, policy, {key: row["prompt"] for key, row in rows.items()}, name)
        if RANK == 0:
            (alpaca_eval if name == "alpaca_eval" else arena_hard)(cfg, rows, answers)

# ---- 7. policies: the files that the official tools read
QUESTIONS = {  # below --data, as in tatsu-lab/alpaca_eval and lmarena-ai/arena-hard-auto on the hub
    "alpaca_eval": (("**/alpaca_eval.json*", "alpaca_eval/instructions*.json*"), {"instruction": str}),
    "arena_hard": (("**/arena-hard-v2.0/question.jsonl*", "**/question.jsonl*"),
                   {"uid": str, "prompt": str, "category": "hard_prompt|creative_writing"})}

def read_questions(cfg, name):
    """{id: row with a "prompt"} in the set's order: AlpacaEval's package finds the difficulty by position."""
    patterns, columns = QUESTIONS[name]
    source, rows = next(iter(local_files(cfg, name, patterns).values())), {}
    for where, row in save.read_rows(source, "data"):
        row = check_row(row, where, columns)
        rows[row.get("uid", str(len(rows)))] = {"prompt": row.get("instruction"), **row}
    return dict(list(rows.items())[:cfg.limit or None])

REFERENCE, JUDGE = "gpt-5.2-2025-12-11", "gpt-4.1-mini-2025-04-14"  # of the paper; the official ones are older

def alpaca_eval(cfg, rows, answers):
    """AlpacaEval 2: model_outputs.json, and the commands that have it judged and scored, the official one first."""
    file, official = Path(cfg.out, "alpaca_eval", "model_outputs.json").resolve(), "weighted_alpaca_eval_gpt4_turbo"
    rows = [{"dataset": row.get("dataset", ""), "instruction": row["prompt"], "output": answers[key][0],
             "generator": cfg.name, **answers[key][1]} for key, row in rows.items()]
    file.write_text(json.dumps(rows, indent=1))
    command = f"  alpaca_eval --model_outputs '{file}' --output_path '{file.parent}' --annotators_config"
    say("alpaca_eval: for the win rates, after pip install alpaca_eval and with OPENAI_API_KEY\n"
        f"{command} {official}\n{command} JUDGE --reference_outputs FILE\n"
        f"  the second as in the paper: JUDGE a copy of the folder {official} with model_name: {JUDGE}, "
        f"FILE such a file of answers of {REFERENCE}")

def arena_hard(cfg, rows, answers):
    """Arena-Hard-v2.0: the model_answer file, and the commands that have it judged and scored.
    `arena_hard_scores` takes the rows of the model_judgment file that comes of them."""
    file = Path(cfg.out, "arena_hard", "model_answer", f"{cfg.name}.jsonl").resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"uid": uid, "ans_id": hashlib.sha256(f"{cfg.name} {uid}".encode()).hexdigest()[:22], "model": cfg.name,
              "messages": [{"role": "user", "content": row["prompt"]},
                           {"role": "assistant", "content": {"answer": answers[uid][0]}}],
              **style_metadata(answers[uid][0]), **answers[uid][1]} for uid, row in rows.items()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = "  python show_result.py --category hard_prompt --judge-names"
    say("arena_hard: for the win rates, in a checkout of lmarena/arena-hard-auto, with "
        f"model_list: [{cfg.name}] in config/arena-hard-v2.0.yaml\n  cp '{file}' data/arena-hard-v2.0/model_answer/\n"
        f"  python gen_judgment.py\n{command} gpt-4.1\n{command} {JUDGE}\n"
        f"  the second as in the paper: before gen_judgment.py judge_model: {JUDGE} in that file, "
        "and an entry of this name in config/api_config.yaml")

def style_metadata(text):
    """What style control reads: tokens, markdown outside code blocks. Nothing without tiktoken."""
    try:
        import tiktoken
        tokens = len(tiktoken.encoding_for_model("gpt-4o").encode(text, disallowed_special=()))
    except Exception:  # not installed, or its vocabulary cannot be fetched: only style control needs it
        return {}
    plain = text
    for inside in re.findall("```([^`]*)```", text):
        plain = plain.replace(inside, "")  # the official way: everywhere, and the fences stay
    patterns = {"header_count": {f"h{n}": rf"^#{{{n}}}\s" for n in range(1, 7)},
                "list_count": {"ordered": r"^\s*\d+\.\s", "unordered": r"^\s*[-*+]\s"},
                "bold_count": {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"}}
    counts = {kind: {name: len(re.findall(pattern, plain, re.M)) for name, pattern in some.items()}
              for kind, some in patterns.items()}
    return {"metadata": {"token_len": tokens, **counts}}

# ---- 8. main
def main(argv=None):
    """Parse, check, evaluate. Bad input: one line on stderr and exit code 2."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if save.NO_BAR or not sys.stderr.isatty():  # where ours are off
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    try:
        cfg = save.parse_config(argv, EvalConfig).checked()
        save.start_ranks(cfg.device)
        if cfg.device != "cpu":
            torch.set_float32_matmul_precision("high")  # TF32
        (evaluate_reward_models if cfg.rm else evaluate_policy)(cfg)
    except (UsageError, OSError) as error:  # OSError: a disk that is full or gone, perhaps of one rank
        if RANK == 0 or isinstance(error, OSError):
            print("eval.py: error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
