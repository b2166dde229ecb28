"""eval.py's policy benchmarks: answers, and the files that the official tools of AlpacaEval and Arena-Hard read."""
import json
import sys
import types
from pathlib import Path

import pytest
import toy

import eval as evaluation
import save

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

def write_questions(path):
    """A folder for --data: five instructions of AlpacaEval and eight questions in an Arena-Hard checkout's place."""
    prompts = [f"copy {' '.join('abcdefgh'[:i + 1])}" for i in range(8)]
    rows = [{"dataset": "helpful_base", "instruction": prompt, "output": "a"} for prompt in prompts[:5]]
    (path / "arena-hard-v2.0").mkdir(parents=True, exist_ok=True)
    (path / "alpaca_eval.json").write_text(json.dumps(rows))
    toy.write_rows(path / "arena-hard-v2.0" / "question.jsonl", [
        {"uid": f"u{i}", "category": ("hard_prompt", "creative_writing")[i % 4 == 3], "prompt": prompt}
        for i, prompt in enumerate(prompts)])
    return path

@pytest.fixture
def data(tmp_path):
    return write_questions(tmp_path / "data")

def run(world, data, *words):
    """eval.py on both benchmarks; words may override flags -> the folder with its files."""
    out = data.parent / "out"
    evaluation.main([str(word) for word in (
        "--policy", world / "policy", "--bench", "all", "--data", data, "--out", out, "--name", "mine",
        "--max_new_tokens", 6, *words)])
    return out

def arena_rows(out):
    lines = (out / "arena_hard/model_answer/mine.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]

def refusal(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*words)
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("eval.py: error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and not any("Traceback" in line for line in lines)
    return errors[0]

# ---- answers --------------------------------------------------------------------------------------------------------
def test_answers_are_the_rollouts_and_do_not_depend_on_the_batch(world, data):
    first = arena_rows(run(world, data))
    again = data.parent / "again"
    run(world, data, "--max_rows", 3, "--out", again)
    second = arena_rows(again)
    assert [row["messages"] for row in first] == [row["messages"] for row in second]
    policy = save.Policy.from_pretrained(str(world / "policy"))
    for row in first[:3]:
        [ids] = save.encode_chats(policy.tokenizer, [row["messages"][:1]], True)
        tokens, _ = save.rollout(policy, [ids], 1, [save.seed_for(0, "answer", row["uid"])], max_new_tokens=6,
                                 temperature=0.7, top_p=0.8, top_k=20)
        assert row["messages"][1]["content"]["answer"] == policy.tokenizer.decode(tokens[0], skip_special_tokens=True)

def test_a_killed_run_goes_on_and_another_policy_starts_anew(world, data, monkeypatch):
    asked, rollout = [], save.rollout

    def counted(policy, prompts, *args, **kwargs):
        if len(asked) >= 6 and kill:
            raise KeyboardInterrupt
        asked.extend(prompts if kwargs["max_new_tokens"] == 6 else [])  # loading a policy tries a few tokens
        return rollout(policy, prompts, *args, **kwargs)

    monkeypatch.setattr(save, "rollout", counted)
    kill = True
    with pytest.raises(KeyboardInterrupt):
        run(world, data, "--max_rows", 2)
    kill = False
    out = run(world, data)
    assert len(asked) == 13 and [row["uid"] for row in arena_rows(out)] == [f"u{i}" for i in range(8)]
    run(world, data)
    assert len(asked) == 13
    run(world, data, "--seed", 1)
    assert len(asked) == 26

@pytest.mark.parametrize("text, answer", [
    ("a < b <think", "a < b <think"), ("", ""), (" a\n", " a\n"),        # no thinking: as it is
    ("<think>\nb\n</think>\n\na\n", "a"), ("Use <think>x</think>", "Use <think>x</think>"),  # words about it
    ("<think>b</think>c<think>d</think>a", "a"), ("<think>b</think>", ""),
    ("<think>b", ""), ("<think>b</think>c<think>d", "")])                 # cut while thinking: no answer yet
def test_thinking_is_cut_out_of_the_answer_and_kept_beside_it(text, answer):
    assert evaluation.without_thinking(text) == (answer, {} if text == answer else {"with_thinking": text})

@pytest.mark.parametrize("opened", [False, True])
def test_the_judges_do_not_see_the_thinking(world, data, monkeypatch, capsys, opened):
    """Answers of a thinking model, in turn whole and cut off; some templates open the thinking in the prompt."""
    tokenizer = save.Policy.from_pretrained(str(world / "policy")).tokenizer
    start, decode = "" if opened else "<think>", type(tokenizer).decode
    says = iter([f"{start}x</think> a", f"{start}x"] * 20)
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda self, rows, **_: [next(says) for _ in rows])
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **options: decode(self, ids, **options) + (
        "<think>\n" if opened else ""))
    out = run(world, data, "--max_rows", 1)
    rows = {"alpaca": [(row["output"], row["with_thinking"]) for row in json.loads(
        (out / "alpaca_eval/model_outputs.json").read_text())], "arena": [
        (row["messages"][1]["content"]["answer"], row["with_thinking"]) for row in arena_rows(out)]}
    for written in rows.values():
        assert {*written} == {("a", "<think>x</think> a"), ("", "<think>x")}
    assert [said.split()[-2:] for said in capsys.readouterr().out.splitlines() if " answers, " in said] == [
        ["2", "empty"], ["4", "empty"]]

def test_a_question_that_the_template_refuses(world, data, capsys, monkeypatch):
    monkeypatch.setattr(save, "encode_chats", lambda *_: 1 / 0)
    assert "--bench alpaca_eval question 0: the chat template of " in refusal(capsys, world, data)

def test_a_question_that_does_not_fit(world, data, capsys):
    line = refusal(capsys, world, data, "--max_new_tokens", 100000)
    assert "--max_new_tokens 100000" in line and "context" in line

@pytest.mark.parametrize("file, text, said", [
    ("alpaca_eval.json", '[{"prompt": "a"}]', "row 1: expected a column instruction (str)"),
    ("arena-hard-v2.0/question.jsonl", '{"uid": "u0"}', "row 1: expected a column prompt (str)"),
    ("arena-hard-v2.0/question.jsonl", '{"uid": "u0", "prompt": "a", "category": "x"}', "category (hard_prompt|"),
    ("arena-hard-v2.0/question.jsonl", None, "nothing for --bench arena_hard")])
def test_questions_that_are_none(world, data, capsys, file, text, said):
    (data / file).unlink() if text is None else (data / file).write_text(text)
    assert said in refusal(capsys, world, data)

def test_real_questions_in_their_order():
    if not SHARED.is_dir():
        pytest.skip("needs the real questions in ../shared/data")
    cfg = evaluation.EvalConfig(data=str(SHARED))
    alpaca, arena = (evaluation.read_questions(cfg, name) for name in ("alpaca_eval", "arena_hard"))
    assert len(alpaca) == 805 and alpaca["0"]["prompt"].startswith("What are the names of some famous actors")
    assert len(arena) == 750 and {row["category"] for row in arena.values()} == {"hard_prompt", "creative_writing"}

# ---- the official files ---------------------------------------------------------------------------------------------
def test_alpaca_eval_gets_its_file_and_names_its_command(world, data, capsys):
    out = run(world, data)
    outputs = json.loads((out / "alpaca_eval/model_outputs.json").read_text())
    source = json.loads((data / "alpaca_eval.json").read_text())
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in source]
    assert all(set(row) == {"dataset", "instruction", "output", "generator"} for row in outputs)
    assert {row["generator"] for row in outputs} == {"mine"}
    said = capsys.readouterr().out
    official, paper = [line for line in said.splitlines() if line.startswith("  alpaca_eval ")]
    for command in (official, paper):
        assert f"alpaca_eval --model_outputs '{out}/alpaca_eval/model_outputs.json'" in command
    assert official.endswith("--annotators_config weighted_alpaca_eval_gpt4_turbo")
    assert paper.endswith("--annotators_config JUDGE --reference_outputs FILE")
    assert "with model_name: gpt-4.1-mini-2025-04-14, FILE such a file of answers of gpt-5.2-2025-12-11" in said

def test_arena_hard_gets_its_file_and_names_its_commands(world, data, capsys, monkeypatch):
    encoding = types.SimpleNamespace(encode=lambda text, disallowed_special: text.split())
    tiktoken = types.SimpleNamespace(encoding_for_model=lambda name: encoding if name == "gpt-4o" else None)
    monkeypatch.setitem(sys.modules, "tiktoken", tiktoken)
    out = run(world, data)
    rows, said = arena_rows(out), capsys.readouterr().out
    assert all(set(row) == {"uid", "ans_id", "model", "messages", "metadata"} for row in rows)
    assert {row["model"] for row in rows} == {"mine"} and len({row["ans_id"] for row in rows}) == 8
    for row in rows:
        assert row["metadata"]["token_len"] == len(row["messages"][-1]["content"]["answer"].split())
    assert "model_list: [mine]" in said and "python gen_judgment.py" in said and "--judge-names gpt-4.1\n" in said
    assert "--judge-names gpt-4.1-mini-2025-04-14\n" in said and "judge_model: gpt-4.1-mini-2025-04-14 in" in said
    assert f"cp '{out}/arena_hard/model_answer/mine.jsonl' data/arena-hard-v2.0/model_answer/" in said
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # not installed
    assert all("metadata" not in row for row in arena_rows(run(world, data)))

@pytest.mark.parametrize("text, counts", [  # h1, ordered, unordered, **, __: by hand from the official removal
    ("# T\n```py\n# no\n- no\n```\n* x\n1. y\n**b** __c__ ## no", (1, 1, 1, 1, 1)),
    ("a# T\n```a```\n", (1, 0, 0, 0, 0)),                 # the block's text goes everywhere: the line begins with #
    ("# T\n```# T\n```\n# U\n", (1, 0, 0, 0, 0)),        # so does a header that the block repeats
    ("# T\n- x\n```\n```", (1, 0, 0, 0, 0)),              # a block of a newline: one line is left
    ("```x```# T\n", (0, 0, 0, 0, 0))])                    # the fences stay
def test_markdown_is_counted_as_in_the_official_code(monkeypatch, text, counts):
    encoding = types.SimpleNamespace(encode=lambda text, disallowed_special: text.split())
    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(encoding_for_model=lambda name: encoding))
    got = evaluation.style_metadata(text)["metadata"]
    assert list(got) == ["token_len", "header_count", "list_count", "bold_count"]
    assert (got["header_count"]["h1"], *got["list_count"].values(), *got["bold_count"].values()) == counts
    assert sum(got["header_count"].values()) == counts[0]
