"""The report of a run: its numbers against others, its picture against a run folder made by hand."""
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import measure
import pytest
import report
import svg
import torch
import toy

import save

def scores(folder, before, after):
    """scores.jsonl of two reward models: each letter a pair, + right and - wrong; sets are split at spaces. Pair i of
    each set is of prompt i."""
    rows = [{"rm": rm, "bench": str(folder / f"heldout_{name}.jsonl"), "score_chosen": {"+": 1, "-": -1, "0": 0}[mark],
             "score_rejected": 0} for rm, sets in (("a", before), ("b", after))
            for name, marks in zip("xy", sets.split()) for mark in marks]
    for name, marks in zip("xy", before.split()):
        toy.write_rows(folder / f"heldout_{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(len(marks))])
    toy.write_rows(folder / "scores.jsonl", rows)
    return measure.right_pairs(folder / "scores.jsonl").values()

@pytest.mark.parametrize("before, after, what, than", [
    ("--------++ " + "-" * 100, "++++++++++ " + "-" * 50 + "+" * 50, "got better: +65.00", "is better than that: "),
    ("++++++++++ ++++", "---------- ++++", "got worse: -50.00", "is worse than that: "),
    ("+-+-+-+-+- ++00", "-++-+-+-+- ++00", "did not clearly change: +0.00", "is not clearly different from that: "),
])
def test_the_sentence_follows_the_interval_of_the_mean(tmp_path, before, after, what, than):
    changes = measure.changes(*scores(tmp_path, before, after))
    assert measure.verdict("It", changes).startswith("It " + what)
    assert measure.verdict("It", changes, "that").startswith("It " + than)

def test_the_interval_is_that_of_the_normal_approximation():
    """Two sets of 400 and 900 pairs: the variance of the mean of means is a quarter of the sum of theirs."""
    changes = [torch.tensor([1.0, 0, 0, -1] * 100).double(), torch.tensor([1.0, 0, 0] * 300).double()]
    error = (sum(x.var(correction=0) / len(x) for x in changes) / 4).sqrt().item()
    low, high = measure.interval([(range(400), changes[0]), (range(400, 1300), changes[1])], 4000)
    assert [low, high] == pytest.approx([100 * (1 / 6 - 1.96 * error), 100 * (1 / 6 + 1.96 * error)], abs=0.25)

def test_sets_that_share_their_prompts_are_no_more_certain_than_one():
    """The same 400 prompts with the same changes twice; with opposite ones nothing is left to chance."""
    change = torch.tensor([1.0, 0, 0, -1] * 100).double()
    alone, twice = (measure.interval([(range(400), change)] * n, 4000) for n in (1, 2))
    apart = measure.interval([(range(400), change), (range(400, 800), change)], 4000)
    assert twice == pytest.approx(alone) and apart[1] == pytest.approx(alone[1] / math.sqrt(2), abs=0.3)
    assert measure.interval([(range(400), change), (range(400), -change)]) == pytest.approx([0, 0])

def test_prompts_may_differ_in_their_number_of_pairs():
    """200 prompts with 1 to 200 pairs, so that none is like another: the error of a ratio of means (delta method)."""
    counts = torch.arange(1, 201)
    means = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    mean = (counts * means).sum() / counts.sum()
    error = ((counts * (means - mean)) ** 2).sum().sqrt() / counts.sum()
    low, high = measure.interval([(counts.repeat_interleave(counts).tolist(), means.repeat_interleave(counts))], 4000)
    wanted = [100 * (mean - 1.96 * error).item(), 100 * (mean + 1.96 * error).item()]
    assert [low, high] == pytest.approx(wanted, abs=1) and high - low > 25

def test_trend_lines():
    assert measure.trend([1.0, 2.0, 3.0, 8.0]) == "▁▂▃█  1.00 to 8.00"
    assert measure.trend([5.0, 5.0]) == "▄▄  5.00 to 5.00"

def test_points_are_means_of_blocks():
    assert measure.blocks([(step, step) for step in (*range(1, 11), *range(21, 26))]) == {0: 5.5, 2: 23.0}
    assert measure.blocks([]) == {}

@pytest.mark.parametrize("low, high, want", [
    (0, 80, [0, 20, 40, 60, 80]), (-3.5, 3.5, [-3, -2, -1, 0, 1, 2, 3]), (-0.5, 0.5, [-0.4, -0.2, 0, 0.2, 0.4]),
    (64.1, 65.3, [64.2, 64.4, 64.6, 64.8, 65, 65.2])])
def test_ticks_are_round(low, high, want):
    assert svg.ticks(low, high) == pytest.approx(want)

def hand_made(folder, world="few", heldout=True, update="save", names="acdefghijk"):
    """A run of ten steps of two prompts x four responses; mu is 0.7 in step 1 and 0.5 in step 10.
    "copy X b": V 0, rewards -3, -0.5, 1.5, 2, the second set aside; "reverse X b": V 1, rewards -1, 3, 3, 3."""
    folder.mkdir()
    records = [{"config": {"rm_update": update, "prompts": str(folder / "prompts.jsonl"), "steps": 10, "m0": 0.5,
                           "batch": 2, "group": 4}}, {"stage": "value", "step": 0, "value_r2": 0.1}]
    for step in range(11):
        tested = {"accuracy_heldout_x": 60 + step, "accuracy_heldout_y": 70.0} if heldout and step % 5 == 0 else {}
        records.append({"step": step, "stage": "save", "kept": 0.875, "valid": 1.0, **tested})
    records.append({"closing": {"kept": [0.875, 1.0]}, "try": ["try: <something>"]})
    samples = []
    for step, x in enumerate(names, 1):
        for prompt, value, rows in (
                (f"copy {x} b", 0, [(-3, f"b {x}", "-"), (-0.5, f"{x} b", ""), (1.5, f"{x} b", "+"), (2, "c c", "+")]),
                (f"reverse {x} b", 1, [(-1, f"{x} c", "-"), *3 * [(3, f"b {x}", "+")]])):
            samples += [{"step": step, "prompt": [{"role": "user", "content": prompt}], "response": said, "reward": r,
                         "truncated": False, "value": value, "side": side if update == "save" else "+",
                         "kept": side != ""} for r, said, side in rows]
    toy.write_rows(folder / "metrics.jsonl", records)
    toy.write_rows(folder / "samples.jsonl", samples)
    if world:
        (folder / "world.json").write_text(json.dumps({"world": world}))
    return folder

def drawn(run, *words):
    """The picture of a run folder: {class or tag: its elements} and its texts. It is XML, and nothing lies outside it
    or comes from elsewhere."""
    report.main([str(run), *map(str, words)])
    page = (run / "report.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(page)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and page.count("http") == 1
    assert not re.search("script|href|url\\(|@import|foreignObject|<style|<image", page)
    found, sizes = {}, [float(root.get(name)) for name in ("width", "height")]
    for element in root.iter():
        places = [element.get(name) or element.get("c" + name) or 0 for name in "xy"]
        assert all(0 <= float(place) <= size for place, size in zip(places, sizes))
        found.setdefault(element.get("class") or element.tag.split("}")[1], []).append(element)
    return found, [element.text for element in found["text"]]

def numbers(element, *names):
    return [float(element.get(name)) for name in names]

def test_the_picture_by_hand(tmp_path):
    """Rewards and V of the groups shown span -3 to 3, with 0.5 of air: 60 pixels a unit from x = 60 or 540 on."""
    frozen = hand_made(tmp_path / "frozen", update="none", heldout=False)
    found, texts = drawn(hand_made(tmp_path / "run"), "--control", frozen)
    assert [len(found[name]) for name in ("dot", "ring", "band", "anchor", "mean")] == [4 * 3, 4 * 5, 8, 8, 4]
    copy = found["dot"][0], *found["ring"][:2], found["dot"][1]  # of step 1
    assert [numbers(x, "cx") for x in copy] == [[90], [240], [360], [390]]
    assert [x.get("fill") for x in copy] == [svg.ORANGE, svg.GREY, svg.BLUE, svg.BLUE]
    assert [x[0].text for x in copy] == ["R -3.00, Y-: b a", "R -0.50, set aside, gold: a b", "R 1.50, Y+, gold: a b",
                                         "R 2.00, Y+: c c"]
    (x, y), *others = (numbers(x, "cx", "cy") for x in found["ring"][2:5])
    assert x == 540 + 60 * 6.5 and others == [[x, y - 10], [x, y - 20]]  # equal rewards are stacked
    half = 60 * math.log(0.7 / 0.3)
    assert [numbers(x, "x", "width") for x in found["band"][:2]] == [
        pytest.approx([middle - half, 2 * half], abs=0.06) for middle in (60 + 60 * 3.5, 540 + 60 * 4.5)]
    assert numbers(found["band"][-1], "width") == [0] and found["anchor"][1].get("d").startswith("M810.0 ")
    told = [text for text in texts if text.startswith("step ")]
    assert told == [f"step {step}: {task} {x} b, {right} labels right" for step, x in zip((1, 4, 7, 10), "aehk")
                    for task, right in (("copy", "2 of 3"), ("reverse", "4 of 4"))]
    assert texts.count("R2 0.50") == 2  # V 0 and 1, means 0 and 2
    for name in ("SAVE 70.0", "frozen RM 65.0", "SAVE 62.5", "frozen RM 62.5", "kept 87.5", "valid 100.0",
                 "labels right 85.7", "kept: 0.875, in the last quarter 1", "try: <something>"):
        assert texts.count(name) == 1, name
    flat, tests = ([point.split(",") for point in line.get("points").split()] for line in found["polyline"][:2])
    assert [x for x, _ in tests] == ["60.0", "210.0", "360.0"] and flat[0] == tests[0] and flat[0][1] == flat[1][1]
    assert float(tests[0][1]) - float(tests[1][1]) == pytest.approx(float(tests[1][1]) - float(tests[2][1]), abs=0.11)

def test_the_picture_does_with_what_there_is(tmp_path):
    found, texts = drawn(hand_made(tmp_path / "a", world=None, heldout=False))
    assert "ring" not in found and len(found["dot"]) == 32 and "reward of the responses" in texts
    assert not [text for text in texts if "gold" in text or "right" in text or "accuracy" in text]
    found, texts = drawn(hand_made(tmp_path / "b", update="none"))
    assert not {"dot", "ring", "band", "mean"} & found.keys() and "gold of the responses, %" in texts
    run = hand_made(tmp_path / "c")
    (run / "samples.jsonl").unlink()
    found, texts = drawn(run)
    assert "dot" not in found and "RM accuracy on held-out pairs, %" in texts and "try: <something>" in texts
    toy.write_rows(run / "metrics.jsonl", measure.read_rows(run / "metrics.jsonl")[:3])  # stopped before its first step
    assert "SAVE 65.0" in drawn(run)[1]

@pytest.mark.parametrize("flags", [["--rm_update", "mean_reward", "--m0", "0"], ["--rm_update", "none"],
                                   ["--stage", "value"], ["--stage", "preference"]])
def test_the_picture_of_what_save_py_writes(world, tmp_path, flags):
    save.main(["--policy", f"{world}/policy", "--rm", f"{world}/rm", "--prompts", f"{world}/prompts.jsonl", "--pairs",
               f"{world}/pairs.jsonl", "--out", f"{tmp_path}/out", "--device", "cpu", "--max_prompt_tokens", "32",
               *"--steps 2 --batch 4 --group 4 --value_prompts 4 --max_new_tokens 8 --save_every 0".split(), *flags])
    found, texts = drawn(tmp_path / "out")
    assert ("mean" in found) == ("mean_reward" in flags) and texts[0].endswith(" of 4 prompts x 4 responses")

@pytest.mark.parametrize("name", ["laptop", "habits"])
def test_the_committed_pictures_are_small_and_sound(name):
    file = Path(__file__).with_name("results") / f"{name}.svg"
    page = file.read_text(encoding="utf-8")
    assert len(page) < 60_000 and ElementTree.fromstring(page).get("viewBox") and 'class="ring"' in page

def test_prompts_that_come_again_are_followed(tmp_path):
    often = measure.Logs(hand_made(tmp_path / "run", names="a" * 10))
    assert often.telling() == [(step, f"{task} a b") for step in (1, 4, 7, 10) for task in ("copy", "reverse")]

def test_labels_of_graded_answers_are_right_above_the_mean(tmp_path):
    """Gold of "copy a b": 0 for "b a", 1, 1, 0 for "c c"; of "reverse a b" 0 for "a c", 1, 1, 1: mean 0.625."""
    logs = measure.Logs(hand_made(tmp_path / "run", world="graded", names="a"), "graded")
    assert [row["gold"] for row in logs.samples] == [0, 1, 1, 0, 0, 1, 1, 1]
    assert [row.get("right") for row in logs.samples] == [True, None, True, False, True, True, True, True]

def test_whatever_a_model_says_is_drawn(tmp_path):
    run = hand_made(tmp_path / "run", world=None)
    rows = measure.read_rows(run / "samples.jsonl")
    for row in rows:
        row.update(response="\0\x0b\ud800<b>&\u4f60\U0001f600" + "x" * 5000, prompt=[{"content": "\x1b" + "y" * 5000}])
    toy.write_rows(run / "samples.jsonl", rows)
    found, texts = drawn(run)
    assert found["dot"][0][0].text.startswith("R -3.00, Y-: <b>&\u4f60\U0001f600xxx") and f"step 1: {'y' * 39}" in texts

def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path)])
    assert f"{tmp_path}: no metrics.jsonl, expected --out of save.py" in capsys.readouterr().err
