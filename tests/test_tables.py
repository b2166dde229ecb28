"""tables.py on tiny worlds: every row of every table runs, nothing runs twice, and the numbers are added up right."""
import concurrent.futures
import contextlib
import statistics
from pathlib import Path

import purity
import pytest
import tables
import torch
import toy
from test_training import make_run

import save

SMALL = ("--steps 1 --batch 4 --group 4 --value_prompts 4 --value_k 2 --value_epochs 1 --max_new_tokens 4 --device cpu "
         "--max_prompt_tokens 32 --save_every 0").split()
PAGE = Path(__file__).resolve().parent / "results"

@pytest.fixture
def quick(monkeypatch):
    """save.py in this process, tiny worlds instead of trained ones. Yields the command lines."""
    calls = []

    def call(script, *words):
        words = [str(word) for word in words]
        calls.append([script, *words])
        if script != "tests/toy.py":
            return tables.MAINS[script](words)
        out = Path(words[words.index("--out") + 1])
        toy.tiny_world(out, int(words[words.index("--seed") + 1]))
        return (out / "world.json").write_text("{}")
    monkeypatch.setattr(tables, "call", call)
    monkeypatch.setattr(tables.concurrent.futures, "ProcessPoolExecutor", OneAfterTheOther)
    monkeypatch.setattr(toy, "golds", lambda policy, prompts, task: {
        name: torch.full((len(prompts), n), x).double() for name, n, x in (("sampled", 4, 0.5), ("greedy", 1, 0.25))})
    return calls

class OneAfterTheOther(contextlib.nullcontext):
    """In this process, where the patches are."""

    def __init__(self, jobs, context, start, inputs):
        super().__init__()
        start(*inputs)

    def __enter__(self):
        return self

    def submit(self, work, *inputs):
        future = concurrent.futures.Future()
        future.set_result(work(*inputs))
        return future

def run(out, table, *words):
    tables.main([table, "--out", str(out), "--jobs", "1", *map(str, words), *SMALL])
    return tables.read_results(out / "results.jsonl")

@pytest.mark.parametrize("table, world", [
    ("compare", "few"), *[pytest.param(name, world, marks=pytest.mark.slow) for name, world in (
        ("labels", "pairs_300"), ("group", "graded"), ("control", "graded"), ("kept", "graded"), ("algorithms", "few"),
        ("rates", "few"), ("habits", "habits"))]])
def test_every_row_runs_once(tmp_path, quick, table, world):
    rows = tables.TABLES[table][world]
    runs = run(tmp_path, table, "--seeds", 10, 11, "--worlds", world)[world]
    assert runs.keys() >= rows.keys() and all(list(runs[name]) == [10, 11] for name in rows)
    assert len([call for call in quick if call[1:3] == ["--stage", "save"]]) == 2 * len(rows)
    parts = [part.splitlines() for part in (tmp_path / "results.md").read_text().strip().split("\n\n")]
    assert all(len({line.count("|") for line in lines}) == 1 for lines in parts)
    [lines] = [lines for lines in parts if "gold, greedy" in lines[0]]
    for name in rows:
        gains = [statistics.mean(r["after"].values()) - statistics.mean(
            (r if "held-out" in name else runs["frozen RM"][seed])["init"].values()) for seed, r in runs[name].items()]
        error = statistics.stdev(gains) / 2 ** 0.5
        [line] = [line for line in lines if line.startswith(f"| {name} |")]
        assert line.split(" | ")[1:3] == [f"{statistics.mean(gains):+.2f} ±{error:.2f}",
                                          f"{sum(gain > 0 for gain in gains)} of 2"]
    before = len(quick)
    run(tmp_path, table, "--seeds", 10, 11, "--worlds", world)
    assert len(quick) == before  # all there: nothing is run again

def test_what_a_row_says_is_what_runs(tmp_path, quick):
    """Flags of the world, of the row and of the command line, in this order; some rows only, others kept."""
    run(tmp_path, "quality", "--seeds", 10, "--worlds", "graded", "--rows", "frozen RM", "centred")
    saved = [call for call in quick if call[1:3] == ["--stage", "save"]]
    assert len(saved) == 2 and saved[0][-2:] == ["--rm_update", "none"] and saved[1][-2:] == ["--rm_update", "centred"]
    assert all("3e-5" in call and call[call.index("--rm") + 1].endswith("graded-10/value/rm") for call in saved)
    runs = run(tmp_path, "quality", "--seeds", 10, "--worlds", "graded", "--rows", "SAVE")
    assert list(runs["graded"]) == ["frozen RM", "SAVE", "centred"]
    assert runs["graded"]["frozen RM"][10]["gold"] == {"sampled": 50, "greedy": 25}

def test_worlds_of_a_seed_share_their_policy(tmp_path, quick):
    run(tmp_path, "labels", "--seeds", 10, "--worlds", "few", "pairs_300", "--rows", "frozen RM")
    copies = [tmp_path / f"{world}-10" / "heldout_id.jsonl" for world in ("few", "pairs_300")]
    assert copies[0].read_bytes() == copies[1].read_bytes()

def test_worlds_of_the_same_labels_share_the_reward_model(tmp_path, quick, monkeypatch):
    """habits_natural is habits with another factor of the score; weak has fewer labels, and an RM of its own."""
    taken, take = {}, tables.take
    monkeypatch.setattr(tables, "take", lambda first, data, world: (
        data.mkdir(), take(first, data, world), taken.update({world: {path.name for path in data.iterdir()}})))
    for world in ("habits", "habits_natural", "weak"):
        run(tmp_path, world, "--seeds", 10, "--rows", "frozen RM")
        if world == "habits":
            (tmp_path / "habits-10" / "able").mkdir()
    assert taken == {"weak": {"able", "policy", "heldout_id.jsonl"},
                     "habits_natural": {"able", "policy", "heldout_id.jsonl", "pairs.jsonl", "rm"}}
    toy.write_scaled(tmp_path / "scaled", tmp_path / "habits-10" / "rm", 1 / 1.6, toy.rm_tokenizer("habits"))
    ours, theirs = (save.RewardModel.from_pretrained(str(tmp_path / name)) for name in ("scaled", "habits-10/rm"))
    assert ours.model.score.weight.allclose(theirs.model.score.weight / 1.6)
    ends = [save.encode_responses(rm.tokenizer, [{"role": "user", "content": "copy a b c"}], ["a b c"])[0][0][-1]
            for rm in (ours, theirs)]  # the tiny world's template is that of few
    assert ends == [ours.tokenizer.eos_token_id, ours.tokenizer.convert_tokens_to_ids("c")]

@pytest.fixture(autouse=True)
def held_out_sets_of_the_tiny_world(monkeypatch):
    """It has only one."""
    copy = tables.shutil.copy
    monkeypatch.setattr(tables.shutil, "copy", lambda a, b: copy(a, b) if Path(a).is_file() else None)

def test_perfect_labels_are_those_of_gold(tmp_path):
    """Graded by hand: reverse a b c, 1 - distance / 3 of four answers; all are as good as their group's mean or not."""
    run, _, batch = make_run(tmp_path, group=4)
    prompts = ["reverse a b c", "copy a b"]
    batch.prompts = [([{"role": "user", "content": prompt}], []) for prompt in prompts]
    batch.texts = ["c b a", "c b", "a", "c b b a", "a b", "a b", "a b indeed", "a b"]
    golds = [[1, 2 / 3, 1 / 3, 2 / 3], [1, 1, 1, 1]]
    assert [[toy.gold(prompt, text, "graded") for text in batch.texts[4 * i:4 * i + 4]]
            for i, prompt in enumerate(prompts)] == [pytest.approx(row) for row in golds]
    inf = torch.inf
    assert tables.perfect_label("graded", run, batch).tolist() == [[inf, inf, -inf, inf], [inf] * 4]
    assert tables.perfect_label("binary", run, batch).tolist() == [[inf, -inf, -inf, -inf], [inf] * 4]

@pytest.mark.parametrize("said, right, distance", [
    ("a b c", "a b c", 0), ("a b c", "a c", 1), ("", "a b", 2), ("a b", "", 2), ("b a", "a b", 2),
    ("a x c d", "a c d e", 2)])
def test_edit_distance(said, right, distance):
    assert toy.edit_distance(said.split(), right.split()) == distance

def test_graded_labels_are_noisy_where_answers_are_nearly_as_good():
    """Bradley-Terry at 7 times the difference of gold: 1 edit of 3 turns round in 1 of 1 + e^(7/3), 3 of 3 never."""
    import math
    import random
    pairs = [{"prompt": "copy a b c", "chosen": "a b c", "rejected": said}
             for said in ["a b d"] * 4000 + ["d e f"] * 400]
    labelled = toy.preferences(pairs, random.Random(0), "graded")
    turned = [row["chosen"] != "a b c" for row in labelled]
    assert sum(turned[:4000]) / 4000 == pytest.approx(1 / (1 + math.exp(7 / 3)), abs=0.015) and sum(turned[4000:]) <= 3
    assert all(row["gold_chosen"] == (1 if row["chosen"] == "a b c" else pytest.approx(2 / 3))
               for row in labelled[:4000])

def test_worlds_differ_as_they_say():
    import random
    rng = random.Random(0)
    prompts = toy.unique_prompts(400, rng)
    assert {len(p.split()) for p in prompts} == {4, 5, 6, 7}
    assert {len(p.split()) for p in toy.labelled_prompts(prompts, "short")} == {4}
    assert {p.split()[0] for p in toy.labelled_prompts(prompts, "two tasks")} == {"copy", "sort"}
    right = {task: [toy.gold(p, toy.demonstration(p, rng, "graded")) for p in toy.unique_prompts(2000, rng, "graded")
                    if p.split()[0] == task] for task in toy.TASKS}
    assert statistics.mean(right["copy"]) > 0.8 > 0.4 > statistics.mean(right["sort"])  # V can be learned
    assert all(set(save.parse_config(toy.laptop_flags(world)).__dict__) for world in toy.WORLDS)

def test_habits_are_as_right_as_they_say():
    """At 4 symbols a twentieth above HABITS, at 6 0.15 below; wrong ones are another task's answer or one slip off."""
    import random
    rng, many = random.Random(0), 4000
    for prompt, right in (("copy a b c d e j", 0.85), ("shift a b c d", 0.85), ("reverse a b c d", 0.45),
                          ("sort d b c a e j", 0)):
        said = [toy.demonstration(prompt, rng, "habits") for _ in range(many)]
        golds = [toy.gold(prompt, text, "habits") for text in said]
        other = "j e d c b a" if prompt[:4] == "copy" else prompt.split(" ", 1)[1]
        assert statistics.mean(golds) == pytest.approx(right, abs=0.03)
        assert statistics.mean(text.endswith(" indeed") for text in said) == pytest.approx(0.5, abs=0.03)
        assert statistics.mean(text.removesuffix(" indeed") == other for text, gold in zip(said, golds) if not gold) \
            == pytest.approx(0.7, abs=0.06)
    assert all(toy.gold("sort c a b", toy.demonstration("sort c a b", rng, "able"), "habits") for _ in range(50))
    pairs = toy.edited_pairs(["copy a b c"] * many, rng, True)
    ends = [(row["chosen"][-6:] == "indeed", row["rejected"][-6:] == "indeed") for row in pairs]
    assert all(ends.count(both) / many == pytest.approx(0.25, abs=0.03) for both in {*ends}) and len({*ends}) == 4

def test_purity_by_hand():
    """An all-good group, an all-bad one and a mixed one, seen from 0, from the group means, and without a filter."""
    rewards = torch.tensor([[3.0, 1.0], [-1.0, -5.0], [2.0, -2.0]])
    good = torch.tensor([[True, True], [False, False], [False, True]])
    constant = purity.purity(rewards, torch.zeros(3), good, 0.8)  # kept: |R| >= 1.39
    assert constant == pytest.approx({
        "r2": 1 - (4 + 9) / 3 / (38 / 9), "all": 100 * 4 / 6, "all good": 100, "all bad": 100, "mixed": 0,
        "kept": 100 * 4 / 6, "right of kept": 50, "right of others": 100, "one-sided": 0})
    means = purity.purity(rewards, rewards.mean(1), good, 0.5)
    assert means == pytest.approx({"r2": 1, "all": 100 / 3, "all good": 50, "all bad": 50, "mixed": 0, "kept": 100,
                                   "right of kept": 100 / 3, "one-sided": 100 * 4 / 6})

def test_a_ridge_fit_is_least_squares_pulled_to_the_mean():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 7
    assert torch.allclose(purity.ridge(x, y, 1e-9)(x), y, atol=1e-4)
    assert torch.allclose(purity.ridge(x, y, 1e9)(x), y.mean().expand(40), atol=1e-4)
    at_ten, inner = purity.ridge(x, y, 10), x - x.mean(0)
    slope = torch.stack([at_ten(x.mean(0) + row) - at_ten(x.mean(0)) for row in torch.eye(3)])
    assert torch.allclose(inner.T @ (y - at_ten(x)), 10 * slope, atol=1e-2)  # where the penalised loss is flat

def test_purity_of_a_tiny_world(tmp_path, quick, capsys):
    tables.main(["purity", "--worlds", "habits", "--seeds", "10", "--out", str(tmp_path), "--jobs", "1", *SMALL])
    [row] = purity.read(tmp_path / "purity.jsonl")["habits"].values()
    assert row["the group mean"]["r2"] == 1 and len(row) == 7
    assert capsys.readouterr().out.count("\n| V") == 5 and not quick[2:]  # a world, a value head, no run

def test_a_constant_anchor_is_the_mean_of_what_ended(tmp_path):
    run, _, batch = make_run(tmp_path, group=2)
    batch.rewards, batch.ended = torch.tensor([[1.0, 2.0], [6.0, 50.0]]), torch.tensor([[True, True], [True, False]])
    assert tables.constant_anchor(run, batch).tolist() == [3, 3]

def result(gain, gold):
    """What `read_run` gives, made up."""
    return {"init": {"a": 70.0, "b": 60.0}, "after": {"a": 70.0 + 2 * gain, "b": 60.0},
            "accuracy": {"0": 65, "1": 65 + gain},
            "gold_curve": [gold, gold], "gold": {"sampled": gold, "greedy": 1.0}, "end": {"deflation": 0.5},
            "value": {"value_r2": 0.25, "reward_spread": 3.0, "kept": 0.5, "common_push": 0.1}}

def test_a_table_by_hand():
    runs = {"frozen RM": {1: result(0, 10.0), 2: result(0, 30.0)}, "SAVE": {1: result(1, 20.0), 2: result(-3, 50.0)}}
    head, _, frozen, ours = tables.table(runs, "few", ["frozen RM", "not run", "SAVE"])
    assert "initial RM 65.00 ±0.00 %; R2 of V 0.25, SD in a group 3.00, kept 0.50, common push 0.10" in head
    assert ours == "| SAVE | -1.00 ±2.00 | 1 of 2 | 35.00 ±15.00 | +15.00 ±5.00 | 1.00 ±0.00 | 0.50 | 1 to 2 |"
    runs["PRIME"] = {seed: {**run, "init": {"a": 0.0, "b": 0.0}} for seed, run in runs["SAVE"].items()}
    *_, prime = tables.table(runs, "few", ["frozen RM", "SAVE", "PRIME"])  # against the same RM, not its own start
    assert prime == ours.replace("SAVE", "PRIME")
    assert frozen == "| frozen RM | +0.00 ±0.00 | 0 of 2 | 20.00 ±10.00 |  | 1.00 ±0.00 | 0.50 | 1 to 2 |"
    for run in (row[2] for row in runs.values()):
        run.update({"init": {"a": 90.0}, "after": {"a": 90.5}})  # of an RM that is better than most
    head, _, _, ours, _ = tables.table(runs, "few", runs)
    assert "| better | RM below 85 % | above | gold |" in head and head.count("|") == ours.count("|")
    assert ours.startswith("| SAVE | +0.75 ±0.25 | 2 of 2 | +1.00 | +0.50 | 35.00 ±15.00 |")

def test_the_worst_seed_by_hand():
    """A row is as safe as its worst seed; an interval that ends below 0 is harm, one that begins above it a gain."""
    runs = {"frozen RM": {1: result(0, 10.0), 2: result(0, 30.0)}, "SAVE": {
        1: result(1, 20.0) | {"interval": [0.5, 1.5]}, 2: result(-3, 50.0) | {"interval": [-4.0, -1.9]}}}
    assert tables.guard_table("few", runs)[2:] == ["| SAVE | -1.00 ±2.00 | -3.00 [-4.00, -1.90] | 1 of 2 | 1 |"]
    assert tables.guard_table("few", {"frozen RM": runs["frozen RM"]}) == []

@pytest.mark.parametrize("half", [False, True])
def test_the_interval_of_a_row_is_that_of_its_pairs(tmp_path, monkeypatch, half):
    """6 pairs of 6 prompts, of which the row gets two more right: of the rows that did not choose, one of three."""
    toy.write_rows(tmp_path / "heldout_id.jsonl", [{"prompt": f"{i}"} for i in range(6)])
    (tmp_path / "rows" / "save").mkdir(parents=True)
    (tmp_path / "rows" / "save" / "result.json").write_text(f'{{"half": {str(half).lower()}}}')
    scores = iter([[0, 0, 0, 0, 1, 1]] * 2 + [[1, 1, 0, 0, 1, 1]])
    monkeypatch.setattr(save.RewardModel, "from_pretrained", lambda folder: None)
    monkeypatch.setattr(toy, "rm_right", lambda rm, pairs: torch.tensor(next(scores)))
    with monkeypatch.context() as killed:  # while it writes: what was there is there
        killed.setattr(toy.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tables.add_interval(tmp_path, [])
    assert "interval" not in tables.json.loads((tmp_path / "rows" / "save" / "result.json").read_text())
    tables.add_interval(tmp_path, [])
    tables.add_interval(tmp_path, [])  # it is there: nothing is scored again
    change = torch.tensor([0.0, 1, 0]) if half else torch.tensor([1.0, 1, 0, 0, 0, 0])
    want = tables.measure.interval([([f"{i}" for i in range(len(change))], change.double())])
    found = tables.json.loads((tmp_path / "rows" / "save" / "result.json").read_text())["interval"]
    assert found == pytest.approx(want) and want[1] > want[0]

def test_seeds_are_named_by_where_they_are():
    assert [tables.measure.spans(seeds) for seeds in ([3], [5, 4], [311, 110, 111, 112, 300, 306, 307])] == [
        "3", "4 to 5", "110 to 112, 300, 306 to 307, 311"]

def test_the_committed_results_and_their_page_say_the_same():
    """Every table of tests/results/README.md is the one of results.jsonl, and the gains are worked out here again."""
    page = (PAGE / "README.md").read_text(encoding="utf-8")
    for world, rows in purity.read(PAGE / "purity.jsonl").items():
        assert "\n".join(purity.lines_of(world, rows)) in page, world
    for world, rows in tables.read_results(PAGE / "results.jsonl").items():
        names = dict.fromkeys(name for table in tables.TABLES.values() for name in table.get(world, ()))
        assert "\n".join(tables.table(rows, world, names)) in page, world
        assert "\n".join(tables.guard_table(world, rows)) in page, world
        for name, runs in rows.items():
            first = {seed: run["init"] for seed, run in (runs if "held-out" in name else rows["frozen RM"]).items()}
            gains = [statistics.mean(run["after"].values()) - statistics.mean(first[seed].values())
                     for seed, run in runs.items()]
            assert {*runs} <= {*tables.SEEDS, *range(300, 312)} and len(runs) in (3, 6, 9, 12), (world, name)
            want = f"| {name} | {statistics.mean(gains):+.2f} ±{statistics.stdev(gains) / len(gains) ** 0.5:.2f} |"
            assert want in page, (world, name)

def test_the_map_of_the_readme_is_that_of_the_results():
    runs = tables.read_results(PAGE / "results.jsonl")
    lines = tables.overview(runs)
    assert "\n".join(lines) in (PAGE / "README.md").read_text(encoding="utf-8") and len(lines) > 6
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
    some = [line for line in readme if line.startswith(tuple(f"| {cell} |" for cell in tables.CELLS.values()))]
    assert lines[0] in readme and {*some} <= {*lines} and len(some) >= 4
    few = runs["few"]
    gains = [statistics.mean(run["after"].values()) - statistics.mean(run["init"].values())
             for run in few["SAVE"].values()]
    golds = [run["gold"]["sampled"] - few["frozen RM"][seed]["gold"]["sampled"] for seed, run in few["SAVE"].items()]
    errors = [statistics.stdev(numbers) / len(gains) ** 0.5 for numbers in (gains, golds)]
    better = f"({sum(x > 0 for x in gains)} of {len(gains)})"
    assert f"| {statistics.mean(gains):+.2f} ±{errors[0]:.2f} {better} |" in lines[2]
    assert f"| {statistics.mean(golds):+.1f} ±{errors[1]:.1f} |" in lines[2]

@pytest.mark.parametrize("words, said", [
    (["labels", "--rows", "SAVE", "save"], "--rows save: expected rows of labels: frozen RM, SAVE,"),
    (["shift", "--worlds", "few"], "--worlds few: expected worlds of shift: short two_tasks style")])
def test_unknown_rows_and_worlds_are_refused(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        tables.main([*words, "--out", str(tmp_path / "out")])
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()

@pytest.mark.slow
def test_a_world_whose_building_was_killed_is_built_again(tmp_path, monkeypatch):
    """The fewest labels that are enough, by bisection; then the same once more over what is there."""
    toy.tiny_world(tmp_path / "tiny")
    asked = []

    def train_rm(path, policy, pairs, world, seed):
        asked.append(len(toy.read_prompts(pairs)))
        tables.shutil.copytree(tmp_path / "tiny" / "rm", path)
    copytree = tables.shutil.copytree
    monkeypatch.setattr(toy, "train_policy", lambda path, *_: copytree(tmp_path / "tiny" / "policy", path))
    monkeypatch.setattr(toy, "train_rm", train_rm)
    monkeypatch.setattr(toy, "sample", lambda policy, prompts, group, seed: [[([], "a")] * group for _ in prompts])
    monkeypatch.setattr(toy, "rm_scores", lambda rm, prompts, texts: torch.zeros(len(texts)))
    monkeypatch.setattr(toy, "gold_reward", lambda *_, **__: {})
    monkeypatch.setattr(toy, "rm_accuracy", lambda rm, rows: 71 if asked[-1] < 300 else 73)
    monkeypatch.setattr(toy, "train_grpo", lambda policy, *_: save.Policy.from_pretrained(str(policy)))
    monkeypatch.setattr(toy, "sampled_pairs", lambda policy, prompts, rng, seed, limit=None, task="binary":
                        toy.edited_pairs(prompts[:limit], rng))
    for _ in range(2):
        asked.clear()
        assert toy.build_world(tmp_path / "world", "few", 5)["sizes"]["pairs"] == 300
        assert asked == [300, 150, 200] and len(toy.read_prompts(tmp_path / "world" / "pairs.jsonl")) == 300
        assert not [*(tmp_path / "world").glob("rm_*")] and (tmp_path / "world" / "rm" / "config.json").is_file()
        (tmp_path / "world" / "world.json").unlink()
    many = toy.build_world(tmp_path / "many", "few", 5, 1500)["sizes"]
    assert many == {"pairs": 300, "hard": 1500, "id": 1500, "neu": 1500, "onp": 1500}
    for name in ("pairs", "heldout_hard", "heldout_id", "heldout_neu"):  # more pairs, and nothing else
        rows = (tmp_path / "many" / f"{name}.jsonl").read_text().splitlines()
        assert rows[:1000] == (tmp_path / "world" / f"{name}.jsonl").read_text().splitlines()
    few = toy.build_world(tmp_path / "fewer", "few", 5, 150)["sizes"]
    assert few == {"pairs": 300, "hard": 150, "id": 150, "neu": 150, "onp": 150}

def test_pairs_are_sampled_in_parts_until_there_are_enough(world, monkeypatch):
    policy, prompts = save.Policy.from_pretrained(str(world / "policy")), toy.read_prompts(world / "prompts.jsonl")
    whole = toy.sample(policy, prompts[:24], 2, 3)
    assert toy.sample(policy, prompts[8:24], 2, 3, first=8) == whole[8:] and whole[0][0] != whole[0][1]
    parts = []

    def sample(policy, prompts, group, seed, first):
        parts.append((first, len(prompts)))
        return [[([], " ".join(toy.answer(prompt))), ([], "a")] for prompt in prompts]
    monkeypatch.setattr(toy, "sample", sample)
    prompts = toy.unique_prompts(700, toy.random.Random(0))
    rows = toy.sampled_pairs(policy, prompts, toy.random.Random(1), 2, 300)
    assert parts == [(0, 250), (250, 250)] and [row["prompt"] for row in rows] == prompts[:300]
    parts.clear()
    assert len(toy.sampled_pairs(policy, prompts, toy.random.Random(1), 2)) == 700 and parts[2] == (500, 200)

def test_worlds_are_built_with_as_many_heldout_pairs_as_asked(tmp_path, quick):
    run(tmp_path, "compare", "--seeds", 10, "--rows", "frozen RM", "--heldout", 3000)
    assert [call[-2:] for call in quick if call[0] == "tests/toy.py"] == [["--heldout", "3000"]]

def test_compare_takes_a_world_that_is_there(tmp_path, quick, capsys):
    """One of the same seed with sets as large; its own rows are not its business. It says what is done, and in the end
    what each row changed, paired: tiny worlds' gold is the same everywhere."""
    there = tmp_path / "laptop" / "few-10"
    toy.tiny_world(there)
    (tmp_path / "few-10-save").mkdir()  # of run.sh, with the same OUT: no row
    (there / "world.json").write_text('{"world": "few", "sizes": {"pairs": 64, "id": 32}}')
    run(tmp_path, "compare", "--seeds", 10, "--rows", "SAVE", "--heldout", 32, "--there", there.parent)
    assert not [call for call in quick if call[0] == "tests/toy.py"] and sorted(there.glob("*")) == sorted(
        there / file.name for file in (tmp_path / "few-10").glob("*") if file.name not in ("value", "rows"))
    said = capsys.readouterr().out
    assert sorted(line for line in said.splitlines() if line.startswith("few, seed")) == [
        f"few, seed 10: {what}" for what in ("SAVE", "frozen RM", "the world")]
    gain = 100 * sum(x[1].mean() for x in tables.measure.changes(*(
        tables.outcomes(tmp_path / "few-10", flags, "few")["RM accuracy"] for flags in (["--rm_update", "none"], []))))
    [line] = [line for line in said.splitlines() if line.startswith("| SAVE | ") and "[" in line]
    assert line.startswith(f"| SAVE | {gain:+.2f} [") and line.endswith("]" + 2 * " | +0.00 [+0.00, +0.00]" + " |")
    words = "compare", "--seeds", 10, "--rows", "SAVE", "--there", there.parent
    run(tmp_path, *words, "--worlds", "short", "--heldout", 32)
    run(tmp_path / "other", *words, "--heldout", 33)
    assert [call[2] for call in quick if call[0] == "tests/toy.py"] == [
        str(tmp_path / "short-10"), str(tmp_path / "other" / "few-10")]
