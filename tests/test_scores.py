"""The score formulas and the bootstrap of eval.py against answers that come from elsewhere: fractions worked by hand,
published arithmetic, real scores with their official results, slow versions of other shape, known standard errors."""

import copy
import gzip
import json
import math
import pathlib
import random
from fractions import Fraction

import numpy as np
import pytest

import eval as ev

ORACLE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "oracles" / "judgebench"

def percent(**parts):
    return pytest.approx({name: 100 * float(part) for name, part in parts.items()}, abs=1e-9)

def fraction(text):
    return float(Fraction(text))

def resampled(name, rows, draws, seed=0):
    return ev.bootstrap(getattr(ev, f"{name}_scores"), rows, draws, seed)

def pair(subset, chosen, rejected):
    return {"subset": subset, "score_chosen": chosen, "score_rejected": rejected}

def best_of(subset, *scores):
    return {"id": "7", "subset": subset, "num_correct": 1, "scores": list(scores)}

def ties(name, right, wrong, subset="Ties"):
    return {"id": name, "subset": subset, "num_correct": len(right), "scores": [*right, *wrong]}

def styles(domain, chosen, rejected):
    return {"domain": domain, "score_chosen": list(chosen), "score_rejected": list(rejected)}

def verdict(source, label, score_a, score_b):
    return {"source": source, "label": label, "score_A": score_a, "score_B": score_b}

def question(baseline_first, model_first, category="hard_prompt"):
    return {"uid": "u", "category": category, "games": [{"score": baseline_first}, {"score": model_first}]}

# ---------------------------------------------------------------- pairs of your own
def test_a_pair_is_right_only_if_the_chosen_one_is_strictly_higher():
    scores = [(2.0, 1.0), (-1.0, -1.5), (0.0, 0.0), (1, 2), (-3, 0)]
    rows = [{"score_chosen": chosen, "score_rejected": rejected} for chosen, rejected in scores]
    assert ev.preference_scores(rows) == percent(average=fraction("2/5"))
    assert ev.preference_scores(rows[2:3]) == percent(average=0)

# ---------------------------------------------------------------- RewardBench
SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
                  "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
                  "hep-rust": 164},
}
SIZES = {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}  # 447 rows of math-prm weigh 984
SUBSETS = [(section, subset) for section, subsets in SECTIONS.items() for subset in subsets]

@pytest.mark.parametrize("section, subset", SUBSETS)
def test_each_rewardbench_subset_weighs_its_official_count(section, subset):
    got = ev.rewardbench_scores([pair(other, other == subset, 0) for _, other in SUBSETS])
    share = SECTIONS[section][subset] / SIZES[section]
    assert got == percent(**{**dict.fromkeys(SECTIONS, 0), section: share, "average": share / 4})

def test_rewardbench_by_hand():
    right, wrong, tie = (1.5, 1.0), (1.0, 1.5), (1.0, 1.0)
    rows = [pair("alpacaeval-easy", *right), pair("alpacaeval-easy", *tie), pair("alpacaeval-length", *right),
            pair("alpacaeval-hard", *wrong), pair("mt-bench-easy", *right), *[pair("mt-bench-med", *right)] * 3,
            pair("mt-bench-med", *wrong),                                   # 50 + 95 + 0 + 28 + 30 of 358
            *[pair(subset, *right) for subset in SECTIONS["Chat Hard"]],
            *[pair(subset, *tie) for subset in SECTIONS["Safety"]],
            pair("math-prm", *right), pair("math-prm", *tie), pair("math-prm", *wrong), pair("hep-cpp", *right),
            pair("hep-go", *wrong), pair("hep-java", *right), pair("hep-java", *wrong), pair("hep-js", *tie),
            pair("hep-python", *right), pair("hep-rust", *right),           # 328 + 164 + 0 + 82 + 0 + 164 + 164 of 1968
            *[pair(prior, *right) for prior in ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")]]
    chat, reasoning = fraction("203/358"), fraction("902/1968")
    want = {"Chat": chat, "Chat Hard": 1, "Safety": 0, "Reasoning": reasoning, "average": (chat + 1 + reasoning) / 4}
    assert ev.rewardbench_scores(rows) == percent(**want)

def test_a_part_of_rewardbench_is_averaged_over_what_is_there():
    rows = [pair("mt-bench-med", 1, 0), pair("alpacaeval-hard", 0, 1), pair("math-prm", 1, 0)]
    chat = fraction("40/135")
    assert ev.rewardbench_scores(rows) == percent(Chat=chat, Reasoning=1, average=(chat + 1) / 2)

# ---------------------------------------------------------------- RewardBench 2
@pytest.mark.parametrize("scores, credit", [
    ((3, 1, 2, 0), "1"), ((0, 1, 1, 1), "0"), ((2, 3, 1, 1), "0"), ((-1.0, -2.0, -2.0, -2.0), "1"),
    ((2, 2, 1, 0), "1/2"), ((2, 0, 2, 2), "1/3"), ((5, 5, 5, 5), "1/4"), ((1, 0, 0, 0, 0, 1), "1/2")])
def test_rewardbench2_shares_the_credit_among_completions_tied_at_the_top(scores, credit):
    credit = fraction(credit)
    assert ev.rewardbench2_scores([best_of("Focus", *scores)]) == percent(Focus=credit, average=credit)

def test_rewardbench2_is_the_plain_mean_of_its_subsets():
    rows = [best_of("Focus", 1, 0), best_of("Focus", 1, 1), best_of("Focus", 0, 1), best_of("Math", 2, 2, 2)]
    rows += [ties("ref:1", [1], [0]), ties("tied:1", [1, 4], [0])]  # gaps 1, 1; spread 3; ratio 1/3
    tied = 0.6 + 0.01 * math.tanh(-2 / 3)
    assert ev.rewardbench2_scores(rows) == percent(Focus=0.5, Math=1 / 3, Ties=tied, average=(1 / 2 + 1 / 3 + tied) / 3)

TANH = math.tanh
TIES = {  # ref: right, wrong; tied: right, wrong; score
    "perfect: ratio 6 / 1": ([9], [3, 2], [9, 8], [2, 1], 1.0 + 0.01 * TANH(5)),
    "the worst right one counts, not the mean": ([9], [0], [9, 5, 1], [2], 0.3 + 0.01 * TANH(-1 / 8 - 1)),
    "gap = spread is not greater": ([5], [3], [6, 4], [2, 0], 0.6),
    "least gap = spread is not greater": ([5], [3], [6, 4], [1, 0], 0.8),
    "the ref gap is the least": ([5], [4], [6, 4], [1, 0], 0.8 + 0.01 * TANH(1 / 2 - 1)),
    "ref tie is wrong": ([5], [5], [6, 4], [1, 0], 0.3 + 0.2 + 0.01 * TANH(-1)),
    "tied tie is wrong": ([5], [1], [6, 4], [4, 0], 0.3 + 0.01 * TANH(-1)),
    "everything wrong: ratio -3 / 1": ([0], [2], [1, 0], [3], 0.01 * TANH(-4)),
    "no spread: x / 0 is +1": ([5], [4], [2, 2], [1], 1.01),
    "no spread: 0 / 0 is 0": ([5], [5], [2, 2], [1], 0.3 + 0.2),
    "no spread: -x / 0 is -1": ([5], [6], [2, 2], [1], 0.3 + 0.2 - 0.01),
    "no spread: all the same": ([5], [5], [2, 2], [2], 0.0),
    "no spread: ref right, tied a draw": ([5], [4], [2, 2], [2], 0.3),
    "one right answer in the tied form": ([5], [4], [2], [0], 1.01),
}

@pytest.mark.parametrize("case", TIES)
def test_one_prompt_of_ties_by_hand(case):
    ref_right, ref_wrong, tied_right, tied_wrong, want = TIES[case]
    rows = [ties("ref:3", ref_right, ref_wrong), ties("tied:3", tied_right, tied_wrong)]
    for rows in (rows, rows[::-1]):
        assert ev.rewardbench2_scores(rows) == percent(Ties=want, average=want)

def test_each_part_of_ties_is_a_mean_over_its_own_prompts():
    rows = [ties("ref:1", [3], [0]), ties("tied:1", [3, 2], [0]),       # least gap 2, spread 1, ratio 2
            ties("ref:2", [3], [4]), ties("tied:2", [9, 7], [4]),       # gaps -1 and 3, spread 2, ratio -1/2
            ties("tied:3", [1, 0], [2]), ties("tied:4", [1, 0], [2]),   # wrong, and without ref: no margins
            ties("ref:5", [3], [1]), ties("ref:6", [3], [1]), ties("ref:7", [3], [1])]
    want = 0.3 * 2 / 4 + 0.3 * 4 / 5 + 0.2 * 2 / 2 + 0.2 * 1 / 2 + 0.01 * (TANH(1) + TANH(-3 / 2)) / 2
    assert ev.rewardbench2_scores(rows) == percent(Ties=want, average=want)
    assert ev.rewardbench2_scores(rows[4:6]) == percent(Ties=0, average=0)
    assert ev.rewardbench2_scores([ties("tied:8", [1, 1], [0])]) == percent(Ties=0.3, average=0.3)
    assert ev.rewardbench2_scores(rows[-3:]) == percent(Ties=0.3, average=0.3)

@pytest.mark.parametrize("spelling", ["Ties", "ties", "TIES"])
def test_ties_is_recognised_however_it_is_spelled(spelling):
    rows = [ties("ref:1", [2], [1], spelling), ties("tied:1", [2, 2], [1], spelling)]
    assert ev.rewardbench2_scores(rows) == percent(**{spelling: 1.01}, average=1.01)

def ties_by_quantifiers(rows):
    """Ties in words: every right answer beats every wrong one, by more than any two right ones differ."""
    forms = {"ref": {}, "tied": {}}
    for row in rows:
        form, _, number = row["id"].partition(":")
        forms[form][number] = row["scores"][:row["num_correct"]], row["scores"][row["num_correct"]:]

    def gaps(form, number):
        return [good - bad for good in forms[form][number][0] for bad in forms[form][number][1]]

    total = 0.0
    for form in forms:
        right = sum(all(gap > 0 for gap in gaps(form, number)) for number in forms[form])
        total += 0.3 * right / len(forms[form]) if forms[form] else 0
    both = sorted(set(forms["ref"]) & set(forms["tied"]))
    for number in both:
        spreads = [abs(a - b) for a in forms["tied"][number][0] for b in forms["tied"][number][0]]
        for margins in (gaps("tied", number), gaps("tied", number) + gaps("ref", number)):
            total += 0.2 / len(both) * all(gap > spread for gap in margins for spread in spreads)
        if max(spreads) > 0:
            bonus = min(TANH(gap / max(spreads) - 1) for gap in margins)
        else:
            bonus = min((gap > 0) - (gap < 0) for gap in margins)  # tanh of infinity; 0 / 0 counts 0
        total += 0.01 / len(both) * bonus
    return total

@pytest.mark.parametrize("seed", range(40))
def test_ties_is_what_its_words_say(seed):
    rng = random.Random(seed)
    rows = []
    for number in range(rng.randint(1, 8)):
        top = rng.choice([0, 0, 3])  # an even start in two of three, so that draws and wrong answers are common
        for form, most in (("ref", 1), ("tied", 4)):
            right = [rng.randint(1, 3) + top for _ in range(rng.randint(1, most))]
            rows.append(ties(f"{form}:{number}", right, [rng.randint(0, 3) for _ in range(rng.randint(1, 3))]))
    rows = [row for row in rows if rng.random() < 0.85] or rows
    want = ties_by_quantifiers(rows)
    assert ev.rewardbench2_scores(rows) == percent(Ties=want, average=want)

# ---------------------------------------------------------------- RM-Bench
@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("j", range(3))
def test_each_cell_of_the_style_matrix_counts_in_its_level(i, j):
    chosen, rejected = [1 if k == i else -1 for k in range(3)], [0 if k == j else 2 for k in range(3)]
    want = dict(chat=1 / 9, easy=0, normal=0, hard=0, average=1 / 9)
    want["hard" if i < j else "easy" if i > j else "normal"] = 1 / 3  # i < j: the wrong one is dressed up more
    assert ev.rmbench_scores([styles("chat", chosen, rejected)]) == percent(**want)

def test_rmbench_by_hand():
    rows = [styles("math", (1, 3, 2), (2, 0, 3)),    # 010 / 110 / 010, two exact ties
            styles("code_x", (0, 1, 2), (0, 1, 2)),  # 000 / 100 / 110: style decides, the diagonal is tied
            styles("code_y", (2, 2, 2), (1, 1, 1))]
    want = dict(math=fraction("4/9"), code=fraction("6/9"), easy=fraction("5/6"), normal=fraction("5/12"),
                hard=fraction("5/12"), average=fraction("5/9"))
    assert ev.rmbench_scores(rows) == percent(**want)

def test_rmbench_pools_safety_by_row_and_weighs_domains_alike():
    rows = [*[styles("safety-refuse", (1, 1, 1), (0, 0, 0))] * 3, styles("safety-response", (0, 0, 0), (0, 0, 0)),
            *[styles("chat", (0, 2, 4), (0, 2, 4))] * 8]
    want = dict(safety=3 / 4, chat=1 / 3, easy=7 / 8, normal=3 / 8, hard=3 / 8, average=13 / 24)
    assert ev.rmbench_scores(rows) == percent(**want)
    assert ev.rmbench_scores(rows[3:4])["safety"] == 0 and ev.rmbench_scores(rows[:1])["safety"] == 100

def rmbench_by_counting(rows):
    """All comparisons in one list; shares of it."""
    domains = sorted({row["domain"].partition("-")[0] for row in rows})
    seen = [(row["domain"].partition("-")[0], (i > j) - (i < j), c > r) for row in rows
            for i, c in enumerate(row["score_chosen"]) for j, r in enumerate(row["score_rejected"])]

    def share(domain, *levels):
        results = [right for d, level, right in seen if d == domain and level in levels]
        return results.count(True) / len(results)

    def over_domains(*levels):
        return sum(share(domain, *levels) for domain in domains) / len(domains)

    return {**{domain: share(domain, -1, 0, 1) for domain in domains}, "hard": over_domains(-1),
            "normal": over_domains(0), "easy": over_domains(1), "average": over_domains(-1, 0, 1)}

@pytest.mark.parametrize("seed", range(40))
def test_rmbench_is_the_count_and_its_average_that_of_the_levels(seed):
    rng = random.Random(seed)
    rows = [styles(rng.choice(["chat", "math", "code", "safety-refuse", "safety-response"]),
                   [rng.randint(0, 3) for _ in range(3)], [rng.randint(0, 3) for _ in range(3)]) for _ in range(25)]
    got = ev.rmbench_scores(rows)
    assert got == percent(**rmbench_by_counting(rows))
    assert got["average"] == pytest.approx((got["easy"] + got["normal"] + got["hard"]) / 3, abs=1e-9)

# ---------------------------------------------------------------- PPE
def test_ppe_preference_by_hand():
    rows = [("model_a", 2, 1), ("model_b", -2, -1), ("model_a", 1, 1), ("model_b", 1, 1), ("model_a", 1, 2),
            ("model_b", 2, 1), ("model_b", 0, 3), ("tie", 2, 1), ("tie", 1, 1), ("tie (bothbad)", 1, 2)]
    rows = [dict(zip(("winner", "score_1", "score_2"), row)) for row in rows]
    assert ev.ppe_preference_scores(rows) == percent(average=fraction("3/7"))
    assert ev.ppe_preference_scores(rows[2:4]) == percent(average=0)

def best_of_k(benchmark, scores, pairs, rewards):
    return {"benchmark": benchmark, "scores": scores, "sampled_conflict_pairs": pairs, "rewards": rewards}

def test_ppe_correctness_by_hand():
    # the last response is in no pair and has no reward; pair (1, 3) is a tie, whichever comes first
    pairs = [[0, 1], [1, 0], [2, 3], [1, 3], [3, 1]]
    rows = [best_of_k("MATH", [True, False, False, True, True], pairs, [2.0, 1.0, 3.0, 1.0, None]),
            best_of_k("MATH", [False, True], [[0, 1]], [0.5, 0.25]),
            best_of_k("GPQA", [False, True], [[0, 1]], [-1.0, 0.0])]
    assert ev.ppe_correctness_scores(rows) == percent(MATH=fraction("2/6"), GPQA=1, average=fraction("2/3"))

def test_ppe_correctness_counts_pairs_within_a_set_and_sets_alike():
    wrong = best_of_k("IFEval", [True, False, False, False], [[0, 1], [0, 2], [0, 3]], [0, 1, 1, 1])
    right = best_of_k("IFEval", [True, False], [[0, 1]], [1, 0])
    rows = [wrong, right, *[best_of_k(name, [True, False], [[1, 0]], [1, 0]) for name in ("MMLU-Pro", "MBPP-Plus")]]
    want = {"IFEval": 1 / 4, "MMLU-Pro": 1, "MBPP-Plus": 1, "average": 3 / 4}
    assert ev.ppe_correctness_scores(rows) == percent(**want)

# ---------------------------------------------------------------- JudgeBench
@pytest.mark.parametrize("source, category", [
    ("mmlu-pro-law", "knowledge"), ("mmlu-pro-computer science", "knowledge"), ("livebench-reasoning", "reasoning"),
    ("livebench-math", "math"), ("livecodebench", "coding")])
def test_judgebench_by_hand(source, category):
    rows = [verdict(source, "A>B", 2, 1), verdict(source, "B>A", 1, 2), verdict(source, "A>B", 1, 2),
            verdict(source, "B>A", 2, 1), verdict(source, "A>B", 1, 1), verdict(source, "B>A", 1, 1),  # ties: wrong
            verdict(source, "B>A", -2, -1)]
    share = fraction("3/7")
    assert ev.judgebench_scores(rows) == percent(**{category: share}, average=share, macro=share)
    assert ev.judgebench_scores(rows[5:6]) == percent(**{category: 0}, average=0, macro=0)

def test_judgebench_average_is_over_rows_and_macro_over_the_categories_there():
    rows = [verdict("livebench-math", "A>B", 1, 0), *[verdict("mmlu-pro-law", "A>B", 0, 1)] * 3]
    assert ev.judgebench_scores(rows) == percent(math=1, knowledge=0, average=1 / 4, macro=1 / 2)

def oracle_models():
    return json.loads((ORACLE / "expected.json").read_text()) if (ORACLE / "expected.json").exists() else {"none": None}

@pytest.mark.parametrize("model", oracle_models())
def test_judgebench_gives_the_official_numbers_of_real_reward_models(model):
    if not ORACLE.is_dir():
        pytest.skip(f"no real scores at {ORACLE}")
    with gzip.open(ORACLE / "scores.json.gz", "rt") as file:
        got = ev.judgebench_scores(json.load(file)[model])
    want = oracle_models()[model]
    official = {"knowledge": "mmlu-pro", "reasoning": "livebench-reasoning", "math": "livebench-math",
                "coding": "livecodebench", "average": "overall"}
    assert len(got) == 6
    assert {key: got[key] for key in official} == pytest.approx(
        {key: want[name]["two_games"] for key, name in official.items()}, abs=1e-9)
    macro = [value for name, value in want.items() if name.startswith("macro")]
    assert [got["macro"]] == pytest.approx(macro, abs=1e-9)

# ---------------------------------------------------------------- Arena-Hard
@pytest.mark.parametrize("label, mirrored, first_player", [
    ("A>>B", "B<<A", "7/8"), ("A>B", "B<A", "3/4"), ("A=B", "B=A", "1/2"), ("A<B", "B>A", "1/4"),
    ("A<<B", "B>>A", "1/8")])
def test_an_arena_verdict_beside_a_draw(label, mirrored, first_player):
    share = fraction(first_player)  # strong: 3 entries of 1 and one of 1/2; slight: one of each
    for label in (label, mirrored):
        assert ev.arena_hard_scores([question("A=B", label)]) == percent(hard_prompt=share)
        assert ev.arena_hard_scores([question(label, "A=B")]) == percent(hard_prompt=1 - share)

def test_arena_hard_by_hand():
    rows = [question("A>B", "A>>B"),                                     # strong win, slight loss: 3 of 4, not half
            question("A<<B", "A>>B"), question("A>B", "A<B"),            # 6 of 6 and 0 of 2
            question("B>A", "B<A", "creative_writing"), question("B=A", "A<<B", "creative_writing")]  # 2 of 2, 1/2 of 4
    assert ev.arena_hard_scores(rows[:1]) == percent(hard_prompt=3 / 4)
    assert ev.arena_hard_scores(rows[1:3]) == percent(hard_prompt=6 / 8)  # entries count, not questions
    assert ev.arena_hard_scores(rows) == percent(hard_prompt=9 / 12, creative_writing=2.5 / 6)

@pytest.mark.parametrize("label", [None, "", "A", "B", "A>>>B", "A>A", "A==B", "a>b", "ERROR"])
def test_a_question_with_a_game_without_verdict_is_left_out(label):
    good = question("A>B", "A>B")
    for bad in (question("A<<B", label), question(label, "A>>B")):
        assert ev.arena_hard_scores([bad, good]) == percent(hard_prompt=1 / 2)
        assert ev.arena_hard_scores([bad]) == {}
    for games in ([None, {"score": "A>>B"}], [{"score": "A<<B"}, None], [None, None]):
        assert ev.arena_hard_scores([{**good, "games": games}, good]) == percent(hard_prompt=1 / 2)

def arena_by_reading_the_labels(rows):
    """Half-points won and played, from the characters of each label."""
    tally = {}
    for row in rows:
        won = played = 0
        for game, model in zip(row["games"], "BA"):
            label = game["score"] if game else None
            sides = label and {label[0], label[-1]}
            if not label or sides != {"A", "B"} or label[1:-1] not in (">", ">>", "=", "<", "<<"):
                break
            entries = 3 if len(label) == 4 else 1
            winner = label[0] if ">" in label else label[-1] if "<" in label else None
            won += entries * (1 if winner is None else 2 if winner == model else 0)
            played += 2 * entries
        else:
            before = tally.get(row["category"], (0, 0))
            tally[row["category"]] = before[0] + won, before[1] + played
    return {category: won / played for category, (won, played) in tally.items()}

@pytest.mark.parametrize("seed", range(40))
def test_arena_hard_is_what_the_labels_say(seed):
    rng = random.Random(seed)
    labels = ["A>>B", "A>B", "A=B", "A<B", "A<<B"] * 4 + ["B>>A", "B>A", "B=A", "B<A", "B<<A"]
    labels += [None, "A", "A>>>B", "B=B"]
    rows = [question(rng.choice(labels), rng.choice(labels), rng.choice(["hard_prompt", "creative_writing"]))
            for _ in range(rng.randint(1, 30))]
    for row in rows:
        row["games"] = [game if rng.random() < 0.95 else None for game in row["games"]]
    assert ev.arena_hard_scores(rows) == percent(**arena_by_reading_the_labels(rows))

# ---------------------------------------------------------------- published arithmetic (Skywork-Reward-V2-Llama-3.2-3B)
def test_published_judgebench_is_the_macro_number():
    """What the paper copied, 69.2, beside the micro number that its own rows are to be compared with."""
    counts = {"mmlu-pro-x": (99, 154), "livebench-reasoning": (64, 98), "livebench-math": (49, 56),
              "livecodebench": (25, 42)}
    rows = [verdict(source, "A>B", n < right, 0) for source, (right, size) in counts.items() for n in range(size)]
    got = ev.judgebench_scores(rows)
    assert got == percent(knowledge=99 / 154, reasoning=64 / 98, math=49 / 56, coding=25 / 42, average=237 / 350,
                          macro=(99 / 154 + 64 / 98 + 49 / 56 + 25 / 42) / 4)
    assert got["average"] == pytest.approx(67.714, abs=5e-4) and got["macro"] == pytest.approx(69.15, abs=5e-3)
    over_rows = {round(100 * k / 350, 1) for k in range(351)}
    measured = {60.9, 67.7, 68.3, 68.6, 68.9, 69.1, 69.4, 70.0, 71.4}  # JudgeBench in Tables 1, 2 and 4 to 6
    assert measured <= over_rows and 69.2 not in over_rows

def test_published_rewardbench2_is_the_plain_mean():
    rights = {"Factuality": 762, "Precise IF": 456, "Math": 694, "Safety": 931, "Focus": 960}
    rows = [best_of(name, n < right, 0.5, 0, 0) for name, right in rights.items() for n in range(1000)]
    for n in range(1010):  # without spread a right prompt is worth 1.01 and one of draws 0, so 677 of 1010 are 67.7 %
        rows += [ties(f"ref:{n}", [n < 677], [0]), ties(f"tied:{n}", [n < 677] * 3, [0])]
    want = {name: right / 1000 for name, right in rights.items()}
    got = ev.rewardbench2_scores(rows)
    assert got == percent(**want, Ties=0.677, average=448.0 / 600) and round(got["average"], 2) == 74.67

def test_published_rmbench_is_the_mean_of_the_levels():
    kinds = [(678, (1, 1, 1), (0, 0, 0)), (841, (1, 3, 5), (0, 2, 4)), (915, (0, 2, 4), (0, 2, 4)),
             (1000, (0, 0, 0), (1, 1, 1))]
    rows = [styles("chat", *next(scores for upto, *scores in kinds if n < upto)) for n in range(1000)]
    average = (0.915 + 0.841 + 0.678) / 3
    assert ev.rmbench_scores(rows) == percent(easy=0.915, normal=0.841, hard=0.678, chat=average, average=average)

# ---------------------------------------------------------------- all of them: names, purity, order
def random_pair(rng):
    return {"score_chosen": rng.randint(0, 4), "score_rejected": rng.randint(0, 3)}

def random_ties(rng, number):
    right = [[rng.randint(1, 5) for _ in range(n)] for n in (1, 3)]
    return [ties(f"{form}:{number}", scores, [rng.randint(0, 2)] * 2) for form, scores in zip(("ref", "tied"), right)]

def random_best_of_k(rng, benchmark):
    scores = [True, False] + [rng.random() < 0.5 for _ in range(6)]
    pairs = [[i, j] for i in range(7) for j in range(7) if scores[i] != scores[j]]
    return best_of_k(benchmark, scores, rng.sample(pairs, 4), [rng.randint(0, 4) + s for s in scores[:7]] + [None])

def random_rows(name, seed=0):
    """Every subset, domain or category of a benchmark, with exact ties."""
    rng = random.Random(seed)
    if name == "preference":
        return [random_pair(rng) for _ in range(60)]
    if name == "rewardbench":
        return [{"subset": subset, **random_pair(rng)} for _, subset in SUBSETS for _ in range(6)]
    if name == "rewardbench2":
        return [best_of(subset, *[rng.randint(0, 4) for _ in range(4)]) for _ in range(20)
                for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus")] + [
                    row for number in range(20) for row in random_ties(rng, number)]
    if name == "rmbench":
        return [styles(domain, *[[rng.randint(0, 3) for _ in range(3)] for _ in range(2)]) for _ in range(20)
                for domain in ("chat", "math", "code", "safety-refuse", "safety-response")]
    if name == "ppe_preference":
        return [{"winner": winner, "score_1": rng.randint(0, 3), "score_2": rng.randint(0, 3)} for _ in range(20)
                for winner in ("model_a", "model_b", "tie", "tie (bothbad)")]
    if name == "ppe_correctness":
        return [random_best_of_k(rng, benchmark) for benchmark in ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")
                for _ in range(20)]
    if name == "judgebench":
        sources = ("mmlu-pro-law", "mmlu-pro-math", "livebench-reasoning", "livebench-math", "livecodebench")
        return [verdict(source, rng.choice(["A>B", "B>A"]), rng.randint(0, 3), rng.randint(0, 3)) for source in sources
                for _ in range(20)]
    return [question(rng.choice(list(ev.ARENA_POINTS)), rng.choice(["A>B", "A=B", "A<<B", None]), category)
            for _ in range(40) for category in ("hard_prompt", "creative_writing")]

KEYS = {
    "preference": {"average"},
    "rewardbench": {"Chat", "Chat Hard", "Safety", "Reasoning", "average"},
    "rewardbench2": {"Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties", "average"},
    "rmbench": {"chat", "math", "code", "safety", "easy", "normal", "hard", "average"},
    "ppe_preference": {"average"},
    "ppe_correctness": {"MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus", "average"},
    "judgebench": {"knowledge", "reasoning", "math", "coding", "average", "macro"},
    "arena_hard": {"hard_prompt", "creative_writing"},
}

@pytest.mark.parametrize("name", KEYS)
def test_every_score_function_is_pure_names_its_parts_and_takes_rows_in_any_order(name):
    score, rows = getattr(ev, f"{name}_scores"), random_rows(name)
    before = copy.deepcopy(rows)
    got = score(rows)
    assert set(got) == KEYS[name] and all(isinstance(value, float) and 0 < value < 101 for value in got.values())
    assert rows == before and score(rows) == got
    random.Random(1).shuffle(rows)
    assert score(rows) == pytest.approx(got, abs=1e-9)

@pytest.mark.parametrize("name, part, keys", [
    ("rewardbench", lambda row: row["subset"].startswith("hep"), {"Reasoning"}),
    ("rewardbench2", lambda row: row["subset"] in ("Math", "Ties"), {"Math", "Ties"}),
    ("rmbench", lambda row: row["domain"] in ("math", "safety-refuse"), {"math", "safety", "easy", "normal", "hard"}),
    ("ppe_correctness", lambda row: row["benchmark"] in ("MATH", "GPQA"), {"MATH", "GPQA"}),
    ("judgebench", lambda row: row["source"].startswith("live"), {"reasoning", "math", "coding", "macro"}),
    ("arena_hard", lambda row: row["category"] == "hard_prompt", {"hard_prompt"})])
def test_a_part_of_a_benchmark_has_only_the_keys_of_that_part(name, part, keys):
    score, rows = getattr(ev, f"{name}_scores"), random_rows(name)
    whole, got = score(rows), score([row for row in rows if part(row)])
    assert set(got) == keys | {"average"} & KEYS[name]
    parts = [got[key] for key in keys - {"easy", "normal", "hard", "macro"}]
    assert got.get("macro", got.get("average", parts[0])) == pytest.approx(sum(parts) / len(parts), abs=1e-9)
    if name not in ("rewardbench", "rmbench"):  # a category is the same number with and without the others
        assert all(got[key] == whole[key] for key in keys - {"macro"})

# ---------------------------------------------------------------- bootstrap
RMS = [name for name in KEYS if name in ev.BENCHMARKS]

def numbers(draws):
    return np.concatenate([np.asarray(draws[key]) for key in sorted(draws)])

@pytest.mark.parametrize("name", RMS)
def test_draws_are_repeatable_paired_and_centred_on_the_score(name):
    rows, point = random_rows(name, seed=2), getattr(ev, f"{name}_scores")(random_rows(name, seed=2))
    draws = resampled(name, rows, 1000)
    assert set(draws) == set(point) and all(x.shape == (1000,) and np.isfinite(x).all() for x in draws.values())
    for key, x in draws.items():
        assert 0 < x.std() < 25 and abs(x.mean() - point[key]) < 0.15 * x.std(), key
    other = resampled(name, copy.deepcopy(rows), 1000)  # another model that happens to agree
    assert not any((draws[key] - other[key]).any() for key in draws)
    assert (numbers(draws) != numbers(resampled(name, rows, 1000, seed=1))).mean() > 0.5

def test_a_model_that_is_right_once_more_is_never_behind():
    rows = [pair("donotanswer", n < 30, 0.5) for n in range(50)]
    better = copy.deepcopy(rows)
    better[40]["score_chosen"] = 1
    ahead = resampled("rewardbench", better, 2000)["average"] - resampled("rewardbench", rows, 2000)["average"]
    times = ahead / 2  # how often the row was drawn: 1 of 50 rows is 2 points
    assert times == pytest.approx(times.round(), abs=1e-9) and times.min() == 0
    assert times.mean() == pytest.approx(1, abs=0.1) and times.std() == pytest.approx(math.sqrt(49 / 50), rel=0.1)

@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_standard_error_of_an_accuracy_is_the_textbooks(p):
    rows = [{"score_chosen": n < 200 * p, "score_rejected": 0} for n in range(200)]
    draws = resampled("preference", rows, 2000)["average"]
    assert draws.std() == pytest.approx(100 * math.sqrt(p * (1 - p) / 200), rel=0.1)
    low, high = ev.interval(draws)
    assert high - low == pytest.approx(2 * 1.96 * 100 * math.sqrt(p * (1 - p) / 200), rel=0.15)

def test_rows_of_a_category_are_resampled_among_themselves():
    rows = [verdict("livebench-math", "A>B", 1, 0)] * 50 + [verdict("livecodebench", "A>B", 0, 1)] * 50
    draws = resampled("judgebench", rows, 200)
    assert numbers(draws) == pytest.approx([50] * 200 + [0] * 200 + [50] * 200 + [100] * 200, abs=1e-9)
    rows[:10] = [verdict("livebench-math", "A>B", 0, 1)] * 10
    draws = resampled("judgebench", rows, 2000)["average"]  # only the 50 of math vary: not sqrt(.4 * .6 / 100)
    assert draws.std() == pytest.approx(100 * math.sqrt(50 * 0.2 * 0.8) / 100, rel=0.1)

def test_no_draw_loses_a_small_subset():
    rows = [pair(subset, 1, 0) for _, subset in SUBSETS] + [pair("hep-go", n % 2, 0) for n in range(99)]
    draws = resampled("rewardbench", rows, 500)
    assert set(draws) == KEYS["rewardbench"] and np.isfinite(numbers(draws)).all()
    assert all((draws[key] == 100).all() for key in ("Chat", "Chat Hard", "Safety"))  # subsets of one row do not vary
    share = 164 / 1968 * math.sqrt(0.5 * 0.5 / 100)
    assert draws["Reasoning"].std() == pytest.approx(100 * share, rel=0.1)

def test_a_row_with_several_pairs_is_resampled_whole():
    pairs = [[0, 1], [0, 2], [0, 3], [0, 4], [0, 5]]
    rows = [best_of_k("MATH", [True] + [False] * 5, pairs, [n < 60, 0, 0, 0, 0, 0]) for n in range(100)]
    draws = resampled("ppe_correctness", rows, 2000)["MATH"]
    assert draws.std() == pytest.approx(100 * math.sqrt(0.6 * 0.4 / 100), rel=0.1)  # of 100 rows, not of 500 pairs

def test_a_row_with_more_pairs_weighs_more_in_a_draw_too():
    rows = [best_of_k("MATH", [True, False, False, False], pairs, [n % 2, 0.5, 0.5, 0.5])
            for n in range(100) for pairs in [[[0, 1], [0, 2], [0, 3]] if n % 2 else [[0, 1]]]]
    draws = resampled("ppe_correctness", rows, 2000)["MATH"]
    # right share 3k / (3k + n - k) of k ~ Bin(100, 1/2): mean 3/4, slope 3 n / (n + 2k)^2 = 0.0075 a row
    assert draws.mean() == pytest.approx(75, abs=0.5) and draws.std() == pytest.approx(100 * 0.0075 * 5, rel=0.1)

def test_the_two_forms_of_a_ties_prompt_are_resampled_together():
    rows = []
    for n in range(100):  # right in both forms or in none; the spread of 5 leaves only accuracies and a bit of margin
        gap = 1 if n < 50 else -1
        rows += [ties(f"ref:{n}", [gap], [0]), ties(f"tied:{n}", [gap, gap + 5], [0])]
    draws = resampled("rewardbench2", rows, 2000)["Ties"]
    apart = 0.6 + 0.01 * (TANH(1 / 5 - 1) - TANH(-1 / 5 - 1))
    assert draws.std() == pytest.approx(100 * apart * math.sqrt(0.25 / 100), rel=0.1)

def test_arena_questions_are_resampled_whole_and_categories_apart():
    rows = [question("A<<B", "A>>B") if n < 80 else question("A>>B", "A<<B") for n in range(100)]
    rows += [question("A=B", "A=B", "creative_writing")] * 100
    draws = resampled("arena_hard", rows, 2000)
    assert draws["hard_prompt"].std() == pytest.approx(100 * math.sqrt(0.8 * 0.2 / 100), rel=0.1)  # not of 600 entries
    assert draws["creative_writing"] == pytest.approx(np.full(2000, 50.0), abs=1e-9)

def test_the_interval_is_the_middle_95_percent():
    draws = list(range(1001))
    random.Random(0).shuffle(draws)
    low, high = ev.interval(np.array(draws))
    assert (low, high) == (25.0, 975.0) and type(low) is float and type(high) is float
