"""eval.py's runs on reward models: scores beside plain transformers, caching, ranks, tables, refusals."""
import functools
import gzip
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import toy
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eval as evaluation
import save

ROOT = Path(__file__).resolve().parents[1]

def run(*words):
    evaluation.main([str(word) for word in words])

def refusal(capsys, *words):
    """Run what must be refused: exit code 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py: error: ")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]

def results(out):
    return json.loads((out / "results.json").read_text())

def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]

def words(rng, low=1, high=9):
    return " ".join(rng.choices("abcdefgh", k=rng.randint(low, high)))

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("data"))

def write_benchmarks(path):
    """Small benchmarks in the official local formats: a folder for --data."""
    rng = random.Random(0)

    def write(name, rows):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rows) if ".json." in name + "." else "".join(json.dumps(row) + "\n" for row in rows)
        (gzip.open if name.endswith(".gz") else open)(path / name, "wt").write(text)

    def prompt():
        return f"copy {words(rng)}"

    subsets = [subset for section in evaluation.REWARDBENCH_SECTIONS.values() for subset in section]
    write("reward-bench/filtered.jsonl", [
        {"prompt": prompt(), "chosen": words(rng), "rejected": words(rng), "subset": subset, "id": i}
        for i, subset in enumerate(subsets * 2)])
    rows = [{"id": str(i), "prompt": prompt(), "chosen": [words(rng)], "rejected": [words(rng) for _ in range(3)],
             "subset": subset, "num_correct": 1}
            for i, subset in enumerate(("Factuality", "Precise IF", "Math", "Safety", "Focus") * 2)]
    rows += [{"id": f"{form}:{n}", "prompt": prompt(), "chosen": [words(rng) for _ in range(count)], "subset": "Ties",
              "rejected": [words(rng) for _ in range(3)], "num_correct": count}
             for n in range(3) for form, count in (("ref", 1), ("tied", 4))]
    write("rewardbench2.json", rows)
    for domain in ("chat", "math", "code", "safety-refuse", "safety-response"):
        write(f"RM-Bench/{domain}_filtered.json.gz", [
            {"id": i, "prompt": prompt(), "chosen": [words(rng) for _ in range(3)],
             "rejected": [words(rng) for _ in range(3)]} for i in range(3)])
    write("PPE-Human-Preference-V1/data/test.jsonl", [
        {"question_id": i, "prompt": prompt(), "response_1": words(rng), "response_2": words(rng), "winner": winner}
        for i, winner in enumerate(("model_a", "model_b", "tie", "tie (bothbad)") * 3)])
    for name in ("MMLU-Pro", "MATH"):
        write(f"PPE-{name}-Best-of-K/data/train.jsonl", [
            {"question_id": i, "prompt": prompt(), "scores": [j % 2 == 0 for j in range(8)],
             "sampled_conflict_pairs": [[0, 1], [3, 2], [0, 5]], **{f"response_{j + 1}": words(rng) for j in range(8)}}
            for i in range(4)])
    write("judgebench/gpt.jsonl", [
        {"pair_id": str(i), "source": source, "question": prompt(), "response_A": words(rng), "response_B": words(rng),
         "label": ("A>B", "B>A")[i % 2]}
        for i, source in enumerate(("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench") * 2)])
    return path

@pytest.fixture(scope="module")
def rms(world, tmp_path_factory):
    """Two reward models: the tiny world's, and one with other weights."""
    other = tmp_path_factory.mktemp("rms") / "other"
    shutil.copytree(world / "rm", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
               for name, x in weights.items()}, other / "model.safetensors", {"format": "pt"})
    return world / "rm", other

@pytest.fixture(scope="module")
def everything(rms, data, tmp_path_factory):
    """One run of both reward models on all six benchmarks."""
    out = tmp_path_factory.mktemp("everything")
    run("--rm", *rms, "--bench", "all", "--data", data, "--out", out, "--draws", 200)
    return out

@functools.lru_cache
def plain_model(path):
    return AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path)

def plain_score(path, prompt, response):
    """The stock model on one text, without padding, mask or cache."""
    tokenizer, model = plain_model(path)
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=ids["input_ids"]).logits[0, 0].item()

# ---- scores ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [1, 64, 100000])
def test_scores_are_those_of_plain_transformers(world, tmp_path, budget):
    run("--rm", world / "rm", "--bench", world / "heldout_id.jsonl", "--out", tmp_path, "--micro_tokens", budget)
    pairs, scored = rows_of(world / "heldout_id.jsonl"), rows_of(tmp_path / "scores.jsonl")
    assert len(pairs) == len(scored) == 32
    for pair, row in list(zip(pairs, scored))[:4 if budget > 1 else 32]:
        for side in ("chosen", "rejected"):
            plain = plain_score(world / "rm", pair["prompt"], pair[side])
            assert row[f"score_{side}"] == pytest.approx(plain, abs=1e-5)

def test_the_result_has_the_promised_shape(world, tmp_path):
    run("--rm", world / "rm", "--bench", world / "heldout_id.jsonl", "--out", tmp_path)
    scored = rows_of(tmp_path / "scores.jsonl")
    right = sum(row["score_chosen"] > row["score_rejected"] for row in scored)
    result = results(tmp_path)[str(world / "rm")][str(world / "heldout_id.jsonl")]
    assert result["average"] == pytest.approx(100 * right / 32)
    assert result["interval"]["average"][0] <= result["average"] <= result["interval"]["average"][1]
    assert result["rows"] == 32 and result["texts"] == 64 and result["truncated"] == 0

def test_each_different_text_is_scored_once(world, tmp_path, monkeypatch):
    rows = [{"prompt": "copy a", "chosen": "a", "rejected": "b"}, {"prompt": "copy a", "chosen": "b", "rejected": "c"},
            {"prompt": "copy a", "chosen": "a", "rejected": "a"}]
    toy.write_rows(tmp_path / "pairs.jsonl", rows)
    seen = []
    forward = save.RewardModel.forward
    monkeypatch.setattr(save.RewardModel, "forward", lambda self, ids, lengths, prompts:
                        seen.extend(map(tuple, ids.tolist())) or forward(self, ids, lengths, prompts))
    run("--rm", world / "rm", "--bench", tmp_path / "pairs.jsonl", "--out", tmp_path / "out")
    assert len(seen) == len(set(seen)) == 3
    assert results(tmp_path / "out")[str(world / "rm")][str(tmp_path / "pairs.jsonl")]["ties"] == 1

def test_a_chat_and_a_string_are_the_same_text(world, tmp_path):
    chat = [{"role": "user", "content": "copy a b"}]
    reply = [{"role": "assistant", "content": "a b"}]
    rows = [{"prompt": "copy a b", "chosen": "a b", "rejected": "c"},
            {"prompt": chat, "chosen": "a b", "rejected": "c"},
            {"chosen": chat + reply, "rejected": chat + [{"role": "assistant", "content": "c"}]}]
    toy.write_rows(tmp_path / "pairs.jsonl", rows)
    run("--rm", world / "rm", "--bench", tmp_path / "pairs.jsonl", "--out", tmp_path)
    first, *others = [{key: x for key, x in row.items() if "score" in key}
                      for row in rows_of(tmp_path / "scores.jsonl")]
    assert others == [first, first] and first["score_chosen"] != first["score_rejected"]

def test_long_texts_are_cut_on_the_left_and_keep_one_bos(world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world / "rm")
    whole = evaluation.encode(tokenizer, "copy a b c d", "a b c d", 100)
    cut = evaluation.encode(tokenizer, "copy a b c d", "a b c d", 8)
    bos = tokenizer.bos_token_id
    assert bos is not None and whole.count(bos) == 1 and cut == [bos] + whole[-7:]
    for side in ("left", "right"):
        assert evaluation.encode(tokenizer, "copy a b c d", "a b c d", len(whole), side) == whole
    assert evaluation.encode(tokenizer, "copy a b c d", "a b c d", 8, "right") == whole[:8]
    toy.write_rows(tmp_path / "pairs.jsonl", [{"prompt": "copy a b c d", "chosen": "a b c d", "rejected": "a"}] * 2)
    limit = len(whole) - 1
    run("--rm", world / "rm", "--bench", tmp_path / "pairs.jsonl", "--out", tmp_path, "--max_length", limit)
    result = results(tmp_path)[str(world / "rm")][str(tmp_path / "pairs.jsonl")]
    assert result["truncated"] == 2 and result["texts"] == 4

def test_rewardbench2_cuts_on_the_right_as_its_script_does(rms, data, tmp_path, monkeypatch):
    seen = count_texts(monkeypatch)
    run("--rm", rms[0], "--bench", "rewardbench2", "--data", data, "--max_length", 12, "--draws", 20)
    tokenizer = AutoTokenizer.from_pretrained(rms[0])
    want = {tuple((evaluation.encode(tokenizer, row["prompt"], text, 1000) + [0] * 12)[:12])
            for row in json.loads((data / "rewardbench2.json").read_text()) for text in row["chosen"] + row["rejected"]}
    assert set(map(tuple, seen)) == want  # one batch, padded with 0

# ---- six benchmarks -------------------------------------------------------------------------------------------------
def test_all_six_and_their_average(everything, rms):
    for rm in map(str, rms):
        result = results(everything)[rm]
        assert list(result) == [*evaluation.BENCHMARKS, "all"]
        averages = [result[name]["average"] for name in evaluation.BENCHMARKS]
        assert result["all"]["average"] == pytest.approx(sum(averages) / 6)
        assert result["ppe_preference"]["rows"] == 6  # the undecided are not scored
        assert set(result["ppe_correctness"]) >= {"MMLU-Pro", "MATH", "average"}
        assert set(result["rmbench"]) >= {"chat", "math", "code", "safety", "easy", "normal", "hard"}

def test_scores_file_gives_the_results_again(everything, rms):
    """The public functions on scores.jsonl: what a reader of the file would compute."""
    scored = rows_of(everything / "scores.jsonl")
    for rm in map(str, rms):
        for name in evaluation.BENCHMARKS:
            rows = [row for row in scored if row["rm"] == rm and row["bench"] == name]
            want = getattr(evaluation, f"{name}_scores")(rows)
            got = results(everything)[rm][name]
            assert {key: got[key] for key in want} == pytest.approx(want) and len(rows) == got["rows"]

def test_scores_sit_at_their_texts(everything, rms, data):
    """One row of each benchmark against the stock model: no side, index or domain is swapped."""
    rows = {row["bench"]: row for row in reversed(rows_of(everything / "scores.jsonl")) if row["rm"] == str(rms[0])}

    def score(prompt, response):
        return pytest.approx(plain_score(rms[0], prompt, response), abs=1e-5)

    row = rows_of(data / "reward-bench/filtered.jsonl")[0]
    assert rows["rewardbench"]["score_chosen"] == score(row["prompt"], row["chosen"])
    assert rows["rewardbench"]["score_rejected"] == score(row["prompt"], row["rejected"])
    row = json.loads((data / "rewardbench2.json").read_text())[0]
    assert rows["rewardbench2"]["scores"] == [score(row["prompt"], text) for text in row["chosen"] + row["rejected"]]
    row = json.load(gzip.open(data / "RM-Bench/chat_filtered.json.gz"))[0]
    assert rows["rmbench"]["domain"] == "chat"
    assert rows["rmbench"]["score_chosen"] == [score(row["prompt"], text) for text in row["chosen"]]
    assert rows["rmbench"]["score_rejected"] == [score(row["prompt"], text) for text in row["rejected"]]
    row = rows_of(data / "PPE-Human-Preference-V1/data/test.jsonl")[0]
    assert rows["ppe_preference"]["score_1"] == score(row["prompt"], row["response_1"])
    assert rows["ppe_preference"]["score_2"] == score(row["prompt"], row["response_2"])
    row = rows_of(data / "PPE-MATH-Best-of-K/data/train.jsonl")[0]
    got = rows["ppe_correctness"]
    assert got["benchmark"] == "MATH" and [got["rewards"][i] for i in (4, 6, 7)] == [None] * 3
    assert [got["rewards"][i] for i in (0, 5)] == [score(row["prompt"], row[f"response_{i + 1}"]) for i in (0, 5)]
    row = rows_of(data / "judgebench/gpt.jsonl")[0]
    assert rows["judgebench"]["score_A"] == score(row["question"], row["response_A"])
    assert rows["judgebench"]["score_B"] == score(row["question"], row["response_B"])

def test_the_length_baseline_reads_no_model(everything, rms, data):
    rows = rows_of(data / "judgebench/gpt.jsonl")
    scored = [{**row, **{f"score_{side}": len(row[f"response_{side}"]) for side in "AB"}} for row in rows]
    want = evaluation.judgebench_scores(scored)["average"]
    assert {results(everything)[str(rm)]["judgebench"]["length_only"] for rm in rms} == {want}

def test_the_table_says_what_a_reader_must_know(rms, data, tmp_path, capsys):
    named = tmp_path / "Skywork-Reward-V2-Llama-3.2-3B"
    shutil.copytree(rms[0], named)
    run("--rm", named, rms[1], "--bench", "judgebench", "--data", data, "--draws", 50)
    text = capsys.readouterr().out
    assert "minus the first" in text
    assert "the longer answer wins" in text and "only 8 of 350 rows" in text
    assert "mean of categories, which in the paper only 69.2 is" in text

def test_part_of_rmbench_is_said_to_be_a_part(rms, data, tmp_path, capsys):
    shutil.copytree(data / "RM-Bench", tmp_path / "RM-Bench")
    (tmp_path / "RM-Bench/math_filtered.json.gz").unlink()
    run("--rm", rms[0], "--bench", "rmbench", "--data", tmp_path, "--out", tmp_path)
    result = results(tmp_path)[str(rms[0])]["rmbench"]
    assert "math" not in result and result["rows"] == 12
    assert result["average"] == pytest.approx(sum(result[name] for name in ("chat", "code", "safety")) / 3)
    assert "only 12 of 1327 rows, not comparable" in capsys.readouterr().out

# ---- two reward models ----------------------------------------------------------------------------------------------
def test_the_difference_is_paired(world, rms, tmp_path):
    same = tmp_path / "same"
    shutil.copytree(rms[0], same)
    bench = world / "heldout_id.jsonl"
    run("--rm", rms[0], same, rms[1], "--bench", bench, "--out", tmp_path)
    first, copy, other = (results(tmp_path)[str(rm)][str(bench)] for rm in (rms[0], same, rms[1]))
    assert "difference" not in first and copy["difference"]["average"] == [0, 0]
    low, high = other["difference"]["average"]
    assert low <= other["average"] - first["average"] <= high and low < high
    # pairing: the two disagree on few pairs only, so the difference is known better than either number
    assert high - low < (other["interval"]["average"][1] - other["interval"]["average"][0]) * 2 ** 0.5

def test_pairs_of_one_prompt_stay_together(world, rms, tmp_path, capsys):
    """Ten copies of each pair do not narrow an interval, nor that of a difference; prompts as texts and as chats."""
    pairs, found = rows_of(world / "heldout_id.jsonl"), []
    chat = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in pairs]
    apart = [{**row, "prompt": f"{row['prompt']} {'a ' * i}"} for i in range(10) for row in pairs]
    for name, rows in (("once", pairs), ("copies", pairs + chat + pairs * 8), ("apart", apart)):
        toy.write_rows(tmp_path / f"{name}.jsonl", rows)
        run("--rm", *rms, "--bench", tmp_path / f"{name}.jsonl", "--out", tmp_path / name)
        found += [results(tmp_path / name)[str(rm)][str(tmp_path / f"{name}.jsonl")] for rm in rms]
        assert f"{len(rows)} rows{' of 32 prompts' * (name == 'copies')}\n" in capsys.readouterr().out
    once, copies, wide, narrow = found[1], found[3], *(x["interval"]["average"] for x in found[1::4])
    for key in ("interval", "difference"):
        assert once[key]["average"] == pytest.approx(copies[key]["average"], abs=1e-9)
    assert narrow[1] - narrow[0] < 0.5 * (wide[1] - wide[0])

# ---- cache and ranks ------------------------------------------------------------------------------------------------
def count_texts(monkeypatch, stop_after=None):
    """Count the texts that pass the model; raise after some, as a kill would."""
    seen, forward = [], save.RewardModel.forward

    def counted(self, ids, lengths, prompts):
        if stop_after is not None and len(seen) >= stop_after:
            raise KeyboardInterrupt
        seen.extend(ids.tolist())
        return forward(self, ids, lengths, prompts)

    monkeypatch.setattr(save.RewardModel, "forward", counted)
    return seen

def test_an_interrupted_run_goes_on(world, tmp_path, monkeypatch):
    flags = ("--rm", world / "rm", "--bench", world / "heldout_id.jsonl", "--micro_tokens", 64)
    run(*flags, "--out", tmp_path / "straight")
    with monkeypatch.context() as patch:
        before = count_texts(patch, stop_after=20)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, "--out", tmp_path / "killed")
    file = next((tmp_path / "killed/cache").glob("*.jsonl"))
    file.write_bytes(file.read_bytes()[:-5])  # killed while writing its last line
    after = count_texts(monkeypatch)
    run(*flags, "--out", tmp_path / "straight")
    assert not after  # a second run scores nothing
    run(*flags, "--out", tmp_path / "killed")
    assert results(tmp_path / "killed") == results(tmp_path / "straight")
    assert 0 < len(after) < len(before) + len(after) <= 64 + 8  # the torn line's few texts again, no others

def test_other_weights_in_the_same_folder_are_scored_anew(rms, tmp_path, monkeypatch):
    shutil.copytree(rms[0], tmp_path / "rm")
    toy.write_rows(tmp_path / "pairs.jsonl", [{"prompt": "copy a", "chosen": "a", "rejected": "b"}])
    flags = ("--rm", tmp_path / "rm", "--bench", tmp_path / "pairs.jsonl", "--out", tmp_path)
    run(*flags)
    first = rows_of(tmp_path / "scores.jsonl")
    shutil.copy(rms[1] / "model.safetensors", tmp_path / "rm/model.safetensors")
    run(*flags)
    assert rows_of(tmp_path / "scores.jsonl")[0]["score_chosen"] != first[0]["score_chosen"]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    seen = count_texts(monkeypatch)
    run(*flags, "--dtype", "bfloat16")
    assert len(seen) == 2  # another precision is another model

@pytest.mark.slow
def test_two_ranks_give_the_same_as_one(everything, rms, data, tmp_path):
    command = [sys.executable, ROOT / "eval.py", "--rm", rms[0], "--bench", "all", "--data", data, "--out", tmp_path,
               "--draws", "200", "--device", "cpu"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env={
        **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for rank in range(2)]  # what torchrun sets
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0][-2000:]
    shares = [{key for row in rows_of_cache(file) for key in row} for file in sorted((tmp_path / "cache").iterdir())]
    assert len(shares) == 2 and min(map(len, shares)) > 50 and not shares[0] & shares[1]
    one = [row for row in rows_of(everything / "scores.jsonl") if row["rm"] == str(rms[0])]
    for ours, theirs in zip(rows_of(tmp_path / "scores.jsonl"), one, strict=True):
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():  # scores up to rounding, which depends on what else is in a batch
            for got, want in zip(flat(ours[key]), flat(value), strict=True):
                assert got == (pytest.approx(want, abs=1e-5) if isinstance(want, float) else want)
    for name, result in results(tmp_path)[str(rms[0])].items():
        assert result["average"] == pytest.approx(results(everything)[str(rms[0])][name]["average"])

def rows_of_cache(file, torn=False):
    lines = [line for line in file.read_text().splitlines() if line]
    return [json.loads(line) for line in (lines[:-1] if torn else lines)]

def flat(value):
    return [x for item in value for x in flat(item)] if isinstance(value, list) else [value]

@pytest.mark.parametrize("other", ["judgebench/gpt.jsonl.gz", "copy/gpt.jsonl"])
def test_no_row_counts_twice(rms, data, tmp_path, capsys, other):
    shutil.copytree(data / "judgebench", tmp_path / "judgebench")
    (tmp_path / other).parent.mkdir(exist_ok=True)
    with (gzip.open if other.endswith(".gz") else open)(tmp_path / other, "wt") as file:
        file.write((data / "judgebench/gpt.jsonl").read_text())
    line = refusal(capsys, "--rm", rms[0], "--bench", "judgebench", "--data", tmp_path)
    assert "expected one of" in line and other in line and "judgebench/gpt.jsonl" in line

# ---- bad input ------------------------------------------------------------------------------------------------------
GOOD = {"prompt": "copy a", "chosen": "a", "rejected": "b"}

def said_by(*turns):
    """A chat of (role, text) in turn."""
    return [{"role": role, "content": text} for role, text in zip(turns[::2], turns[1::2])]

@pytest.mark.parametrize("row, said", [
    ({"prompt": "copy a", "chosen": "a"}, "row 2: expected columns prompt, chosen, rejected"),
    ({"prompt": "copy a", "chosen": 3, "rejected": "b"}, "row 2: chosen: expected text or"),
    ({"chosen": "a", "rejected": "b"}, "row 2: expected "),
    ("copy a", "row 2: expected columns prompt, chosen, rejected"),
    ('{"prompt": ', "row 2: expected JSON"),
    ({"chosen": said_by("user", "copy a", "assistant", "a"), "rejected": said_by("user", "copy b", "assistant", "b")},
     "row 2: expected chosen and rejected to answer the same chat"),
    ({"chosen": said_by("user", "copy a"), "rejected": said_by("user", "copy b")}, "to answer the same chat"),
    ({"prompt": "copy a", "chosen": said_by("assistant", "a", "user", "b", "assistant", "a"),
      "rejected": said_by("assistant", "a", "user", "b", "assistant", "b")}, "row 2: expected "),
])
def test_a_bad_row_names_file_and_row(world, tmp_path, capsys, row, said):
    lines = [json.dumps(GOOD), row if isinstance(row, str) and row.startswith("{") else json.dumps(row)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    line = refusal(capsys, "--rm", world / "rm", "--bench", tmp_path / "pairs.jsonl", "--out", tmp_path / "out")
    assert str(tmp_path / "pairs.jsonl") in line and said in line and not (tmp_path / "out").exists()

def test_a_row_that_the_chat_template_refuses_is_named(world, tmp_path, capsys):
    """Some have no system role; save.py refuses such a row as well."""
    shutil.copytree(world / "rm", tmp_path / "rm")
    template = AutoTokenizer.from_pretrained(world / "rm")
    template.chat_template = ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
                              + template.chat_template)
    template.save_pretrained(tmp_path / "rm")
    toy.write_rows(tmp_path / "pairs.jsonl", [GOOD, {**GOOD, "prompt": said_by("system", "s", "user", "copy a")}])
    line = refusal(capsys, "--rm", tmp_path / "rm", "--bench", tmp_path / "pairs.jsonl")
    assert f"--bench {tmp_path}/pairs.jsonl row 2: the chat template of {tmp_path}/rm: no system role" in line

def test_pairs_may_be_parquet_and_help_says_so(world, tmp_path, capsys):
    import datasets
    file = tmp_path / "pairs.parquet"
    datasets.Dataset.from_list([GOOD] * 3).to_parquet(file)
    run("--rm", world / "rm", "--bench", file, "--out", tmp_path)
    assert results(tmp_path)[str(world / "rm")][str(file)]["rows"] == 3
    with pytest.raises(SystemExit):
        run("--help")
    assert "parquet" in capsys.readouterr().out

@pytest.mark.parametrize("name, file, change, said", [
    ("rmbench", "RM-Bench/chat_filtered.json", {"chosen": ["a"]}, "expected three chosen and three rejected"),
    ("rmbench", "RM-Bench/other_filtered.json", {}, "column domain ((chat|math|code|safety).*), got 'other'"),
    ("judgebench", "gpt.jsonl", {"label": "A=B"}, "column label (A>B|B>A), got 'A=B'"),
    ("rewardbench2", "rewardbench2.jsonl", {"id": "7", "subset": "Ties"}, "column id ((ref|tied):"),
    ("rmbench", "RM-Bench/chat_filtered.json", {"chosen": ["a", "b", 3]}, "column chosen (list of str)"),
    ("ppe_correctness", "ppe_correctness.jsonl", {"sampled_conflict_pairs": [[0, 2]]}, "expected a right and a wrong"),
    ("ppe_correctness", "ppe_correctness.jsonl", {"sampled_conflict_pairs": [[0, 9]]}, "expected a right and a wrong"),
    ("ppe_correctness", "ppe_correctness.jsonl", {"sampled_conflict_pairs": [[0]]}, "expected a right and a wrong"),
    ("ppe_correctness", "ppe_correctness.jsonl", {"sampled_conflict_pairs": [[-1, 1]]}, "expected a right and a wrong"),
    ("ppe_correctness", "ppe_correctness.jsonl", {"benchmark": None}, "column benchmark (MMLU-Pro|MATH|GPQA|"),
    ("rewardbench2", "rewardbench2.jsonl", {"subset": "Poetry"}, "column subset ((?i:Factuality|Precise IF|"),
    ("rewardbench", "rewardbench.jsonl", {"chosen": "a", "rejected": "b"}, "column subset (alpacaeval-easy|"),
])
def test_a_bad_official_row_is_named(world, tmp_path, capsys, name, file, change, said):
    row = {"prompt": "copy a", "question": "copy a", "chosen": ["a"] * 3, "rejected": ["b"] * 3, "response_A": "a",
           "response_B": "b", "source": "livecodebench", "label": "A>B", "id": "ref:1", "subset": "Ties",
           "scores": [True, False, True], "sampled_conflict_pairs": [[0, 1]], "benchmark": "MATH",
           **{f"response_{i}": "a" for i in (1, 2, 3)}}
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**row, **change} if file.endswith("l") else [{**row, **change}]) + "\n")
    line = refusal(capsys, "--rm", world / "rm", "--bench", name, "--data", tmp_path)
    assert said in line and "row 1" in line and path.name in line

@pytest.mark.parametrize("flags, said", [
    (["--bench", "judgebench"], "either --rm or --policy"),
    (["--rm", "x", "--policy", "y", "--bench", "all"], "either --rm or --policy"),
    (["--rm", "x"], "--bench: expected one or more of rewardbench"),
    (["--rm", "x", "--bench", "mmlu"], "--bench mmlu: expected one or more of rewardbench"),
    (["--rm", "x", "x", "--bench", "judgebench"], "--rm x x: expected different names"),
    (["--rm", "x", "--bench", "a/pairs.jsonl", "b/pairs.jsonl"], "--bench pairs.jsonl pairs.jsonl: expected different"),
    (["--rm", "x", "--bench", "arena_hard"], "--bench arena_hard: expected one or more of rewardbench"),
    (["--policy", "x", "--bench", "judgebench"], "--bench judgebench: expected one or more of alpaca_eval"),
    (["--policy", "x", "--bench", "alpaca_eval"], "--policy: expected --data"),
    (["--rm", "x", "--bench", "judgebench", "--data", "nowhere"], "--data nowhere: expected a folder"),
    (["--rm", "x", "--bench", "judgebench", "--draws", "0"], "--draws 0: expected more than 0"),
    (["--rm", "x", "--bench", "judgebench", "--max_length", "-1"], "--max_length -1: expected 0 or more"),
    (["--rm", "x", "--bench", "judgebench", "--draws", "many"], "invalid int value"),
    (["--rm", "x", "--bench", "judgebench", "--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    (["--rm", "x", "--bench", "nowhere.jsonl"], "nowhere.jsonl: expected JSON"),
])
def test_bad_flags(capsys, flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, *flags) and not list(tmp_path.iterdir())

def test_what_is_no_reward_model(world, data, tmp_path, capsys):
    flags = ("--bench", "judgebench", "--data", data)
    assert "reward model" in refusal(capsys, "--rm", world / "policy", *flags)
    assert "expected a reward model" in refusal(capsys, "--rm", tmp_path / "missing", *flags)
    (tmp_path / "empty").mkdir()
    assert "expected a reward model" in refusal(capsys, "--rm", tmp_path / "empty", *flags)
    line = refusal(capsys, "--rm", world / "rm", "--bench", "judgebench", "--data", tmp_path)
    assert "nothing for --bench judgebench" in line and "gpt.jsonl" in line

def test_the_second_model_fails_and_the_first_is_kept(world, data, tmp_path, capsys):
    shutil.copytree(world / "rm", tmp_path / "broken")
    weights = load_file(tmp_path / "broken/model.safetensors")
    weights["score.weight"] = weights["score.weight"] * float("nan")
    save_file(weights, tmp_path / "broken/model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    line = refusal(capsys, "--rm", world / "rm", tmp_path / "broken", "--bench", "judgebench", "--data", data,
                   "--out", out)
    assert "not finite" in line and results(out)[str(world / "rm")]["judgebench"]["rows"] == 8

def test_a_full_disk_is_one_line_and_keeps_what_is_done(world, tmp_path, capsys):
    """A limit on the size of files, which the cache reaches half-way; without it the run goes on from there."""
    flags = ("--rm", world / "rm", "--bench", world / "heldout_id.jsonl", "--out", tmp_path, "--micro_tokens", 64)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limit[1]))
        line = refusal(capsys, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "File too large" in line
    assert sum(map(len, rows_of_cache(next((tmp_path / "cache").iterdir()), torn=True))) > 10
    run(*flags)
    assert results(tmp_path)[str(world / "rm")][str(world / "heldout_id.jsonl")]["rows"] == 32
