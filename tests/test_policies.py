"""eval.py's policy benchmarks against a local judge server that is slow, busy, broken and sometimes right."""
import collections
import gzip
import http.server
import importlib.util
import json
import math
import re
import shutil
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest
import toy

import eval as evaluation
import save

KEY = "sk-test-secret-0123456789"
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
JUDGE_UTILS = '''PROMPT = "judge these"
JUDGE_SETTINGS = {"hard_prompt": {"baseline": "o3", "system_prompt": PROMPT},
                  "creative_writing": {"baseline": "gem", "system_prompt": "be creative"}}
'''
CONFIG = r'''
judge_model: gpt-4.1
temperature: 0.0
max_tokens: 16000
bench_name: arena-hard-v2.0
reference: null
regex_patterns:
  - \[\[([AB<>=]+)\]\]
  - \[([AB<>=]+)\]
prompt_template: "<|User|>{QUESTION}<|A|>{ANSWER_A}<|B|>{ANSWER_B}<|end|>"
'''

class JudgeServer(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible server. Faults: what to do on the 1st, 2nd, ... request for the same messages."""
    daemon_threads = True

    def __init__(self, faults=(), verdict=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.verdict = list(faults), verdict or longer_is_better
        self.seen, self.bodies, self.lock = collections.Counter(), [], threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):
        """A client that gave up waiting is part of the test."""

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, code, body, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, name = self.server, json.dumps(body["messages"])
        with server.lock:
            turn = server.seen[name]
            server.seen[name] += 1
            server.bodies.append((body, self.headers.get("Authorization"), self.path))
        probe = "are you there" in name
        fault = server.faults[turn] if turn < len(server.faults) and not probe else None
        if fault == "slow":
            time.sleep(1.5)
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return
        elif fault == "not json":
            return self.send(200, b"<html>busy</html>")
        elif fault == "no choices":
            return self.send(200, {"choices": []})
        elif fault == "no text":
            return self.send(200, {"choices": [{"message": {"content": None}}]})
        elif fault == "redirect":
            return self.send(302, b"", Location="http://127.0.0.1:9/v1/chat/completions")
        elif isinstance(fault, int):
            return self.send(fault, {"error": {"message": f"wrong key {KEY}"}}, Retry_After=0)
        text = fault[5:] if str(fault).startswith("say: ") else "yes" if probe else server.verdict(body)
        choice = text if isinstance(text, dict) else {"message": {"role": "assistant", "content": text}}
        self.send(200, {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "usage": USAGE,
                        "choices": [{"index": 0, "finish_reason": "stop", **choice}]})

def answers_in(body):
    return re.search(r"<\|A\|>(.*)<\|B\|>(.*)<\|end\|>", body["messages"][1]["content"], re.S).groups()

def longer_is_better(body):
    """[[A>B]] and so on, much better from four characters on."""
    a, b = map(len, answers_in(body))
    sign = "=" if a == b else ">" if a > b else "<"
    return f"They differ. My final verdict is [[A{sign * 2 if abs(a - b) >= 4 else sign}B]]"

@pytest.fixture
def arena(tmp_path):
    return write_arena(tmp_path / "arena")

def write_arena(path):
    """What a checkout of arena-hard-auto holds, with eight short questions."""
    folder = path / "data/arena-hard-v2.0"
    for name in ("config", "utils"):
        (path / name).mkdir(parents=True)
    (path / "config/arena-hard-v2.0.yaml").write_text(CONFIG)
    (path / "utils/judge_utils.py").write_text(JUDGE_UTILS)
    rows = [{"uid": f"u{i}", "category": ("hard_prompt", "creative_writing")[i % 4 == 3], "subcategory": "x",
             "prompt": f"copy {' '.join('abcdefgh'[:i + 1])}"} for i in range(8)]
    for name in ("o3", "gem"):
        (folder / "model_answer").mkdir(parents=True, exist_ok=True)
        toy.write_rows(folder / f"model_answer/{name}.jsonl", [
            {"uid": row["uid"], "model": name, "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": {"answer": "a b c" if name == "o3" else "a"}}]} for row in rows])
    toy.write_rows(folder / "question.jsonl", rows)
    return path

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(evaluation.Judge, "pause", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

def flags(world, arena, server, **other):
    named = {"policy": world / "policy", "bench": "arena_hard", "arena_dir": arena, "judge": "local/judge",
             "name": "mine", "judge_url": server.url, "judge_timeout": 1, "judge_retries": 4, "judge_workers": 4,
             "max_new_tokens": 6, "out": arena / "out", **other}
    return [str(word) for name, value in named.items() for word in (f"--{name}", value)]

def judgments(arena):
    file = arena / "data/arena-hard-v2.0/model_judgment/local/judge/mine.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

def expected(arena):
    """Scores worked out from the two models' answers, without eval.py."""
    folder = arena / "data/arena-hard-v2.0/model_answer"
    texts = {name: {row["uid"]: row["messages"][-1]["content"]["answer"]
                    for row in map(json.loads, open(folder / f"{name}.jsonl"))} for name in ("mine", "o3", "gem")}
    points = collections.defaultdict(list)
    for row in map(json.loads, open(arena / "data/arena-hard-v2.0/question.jsonl")):
        base = "o3" if row["category"] == "hard_prompt" else "gem"
        gap = len(texts["mine"][row["uid"]]) - len(texts[base][row["uid"]])
        # both games agree: the judge only looks at lengths
        points[row["category"]] += [0.5 if gap == 0 else float(gap > 0)] * (2 if abs(gap) < 4 else 6)
    return {name: 100 * sum(values) / len(values) for name, values in points.items()}

def results(arena, bench="arena_hard"):
    return next(iter(json.loads((arena / "out/results.json").read_text()).values()))[bench]

def refusal(capsys, words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(words)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("eval.py: error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in err and KEY not in err
    return lines[0]

# ---- arena-hard -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("faults", [
    (), ("slow",), (429, 429), (500, 503), ("cut", "not json"), ("no choices", "no text"), ("say: I cannot decide",),
    (429, "slow", "not json", "say: [[A]]", "say: A is better")], ids=str)
def test_whatever_the_judge_does_nothing_is_lost_or_counted_twice(world, arena, faults):
    server = JudgeServer(faults)
    evaluation.main(flags(world, arena, server))
    rows = judgments(arena)
    assert sorted(row["uid"] for row in rows) == [f"u{i}" for i in range(8)]
    assert all(game["score"] in evaluation.ARENA_POINTS for row in rows for game in row["games"])
    want = expected(arena)
    assert {name: results(arena)[name] for name in want} == pytest.approx(want) and len(want) == 2
    assert results(arena)["questions"] == 8 and results(arena)["without_verdict"] == 0
    assert set(server.seen.values()) == {1, 1 + len(faults)}  # each game until it had its verdict; the probe once

def test_what_the_judge_is_sent(world, arena):
    server = JudgeServer()
    evaluation.main(flags(world, arena, server))
    probe, *bodies = server.bodies
    assert len(bodies) == 16 and {path for _, _, path in server.bodies} == {"/v1/chat/completions"}
    assert {auth for _, auth, _ in server.bodies} == {f"Bearer {KEY}"}
    rows, base = {row["uid"]: row for row in judgments(arena)}, {"hard_prompt": "a b c", "creative_writing": "a"}
    for body, _, _ in bodies:
        assert body["model"] == "local/judge" and body["temperature"] == 0 and body["max_tokens"] == 16000
    for row in rows.values():
        first, second = (game["prompt"] for game in row["games"])
        assert first[0]["content"] == ("judge these" if row["category"] == "hard_prompt" else "be creative")
        assert answers_in({"messages": first})[0] == base[row["category"]]       # game 1: the baseline is A
        assert answers_in({"messages": second})[::-1] == answers_in({"messages": first})
        assert row["baseline"] == ("o3" if row["category"] == "hard_prompt" else "gem") and row["model"] == "mine"
        assert row["judge"] == "local/judge" and "[[" in row["games"][0]["judgment"]["answer"]

def test_the_last_label_of_the_first_pattern_counts():
    settings = {"patterns": [re.compile(p) for p in (r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]")]}
    for text, want in [("[[A>B]] no, [[B>>A]]", "B>>A"), ("first [B>A] then [[A=B]]", "A=B"), ("[a>b]", "A>B"),
                       ("[[A]]", None), ("[[A>>>B]]", None), ("A>B", None), ("", None), ("[[a<<b]]", "A<<B")]:
        assert evaluation.verdict(settings, text) == want, text

def test_a_judge_without_verdict_drops_the_question_and_says_so(world, arena, capsys):
    server = JudgeServer(verdict=lambda body: "no idea" if "copy a b<" in body["messages"][1]["content"] else
                         longer_is_better(body))
    evaluation.main(flags(world, arena, server))
    assert [row["uid"] for row in judgments(arena) if row["games"][0]["score"] is None] == ["u1"]
    assert results(arena)["without_verdict"] == 1 and "1 of 8 questions left out" in capsys.readouterr().out
    assert max(server.seen.values()) == 3

def test_a_killed_run_goes_on_and_asks_nothing_twice(world, arena, capsys):
    calls = []

    def dies_after_six(body):
        calls.append(body)
        return longer_is_better(body) if len(calls) <= 6 else 1 / 0  # the connection breaks from here on

    line = refusal(capsys, flags(world, arena, JudgeServer(verdict=dies_after_six), judge_workers=1, judge_retries=1))
    assert "no usable reply in 2 tries" in line
    assert len(judgments(arena)) == 3  # two games each
    path = arena / "data/arena-hard-v2.0/model_judgment/local/judge/mine.jsonl"
    path.write_text(path.read_text() + '{"uid": "u7", "games": [')  # a kill in the middle of a line
    server = JudgeServer()
    evaluation.main(flags(world, arena, server))
    assert sorted(row["uid"] for row in judgments(arena)) == [f"u{i}" for i in range(8)]
    assert sum(server.seen.values()) == 1 + 2 * 5
    want = expected(arena)
    assert {name: results(arena)[name] for name in want} == pytest.approx(want)
    again = JudgeServer()
    evaluation.main(flags(world, arena, again))
    assert sum(again.seen.values()) == 1 and len(judgments(arena)) == 8  # only the probe

def test_other_answers_under_the_same_name_are_judged_anew(world, arena):
    evaluation.main(flags(world, arena, JudgeServer()))
    server = JudgeServer()
    evaluation.main(flags(world, arena, server, seed=1))
    assert len(judgments(arena)) == 8 and sum(server.seen.values()) > 1
    want = expected(arena)
    assert {name: results(arena)[name] for name in want} == pytest.approx(want)

@pytest.mark.parametrize("fault, said", [(401, "refuses the key in OPENAI_API_KEY (HTTP 401)"), (403, "HTTP 403"),
                                         (404, "refuses the request (HTTP 404)"), ("redirect", "HTTP 302")])
def test_a_refusal_is_final(world, arena, capsys, fault, said):
    server = JudgeServer([fault] * 9)
    line = refusal(capsys, flags(world, arena, server))
    assert said in line and server.url in line
    answers = list((arena / "out/arena_hard/answers").glob("*.jsonl"))
    assert answers and answers[0].read_text().count("u") >= 8  # the answers are kept
    assert max(server.seen.values()) == 1

def test_an_unreachable_judge_is_noticed_before_the_answers(world, arena, capsys):
    server = JudgeServer()
    server.shutdown()
    server.server_close()
    line = refusal(capsys, flags(world, arena, server))
    assert "no usable reply in 5 tries (ConnectionRefusedError)" in line and not (arena / "out").exists()

def test_a_certificate_that_nobody_signed_is_refused(world, arena, tmp_path, capsys):
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    files = [str(tmp_path / name) for name in ("key.pem", "cert.pem")]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1",
                    "-addext", "subjectAltName=DNS:localhost", "-keyout", files[0], "-out", files[1]],
                   check=True, capture_output=True)
    server = JudgeServer()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.url = f"https://localhost:{server.server_port}/v1"
    line = refusal(capsys, flags(world, arena, server, judge_retries=0))
    assert "SSLCertVerificationError" in line and not server.bodies

def test_the_key_is_written_nowhere(world, arena, capfd):
    evaluation.main(flags(world, arena, JudgeServer((500, 429))))
    out, err = capfd.readouterr()
    assert KEY not in out + err
    assert not any(KEY.encode() in path.read_bytes() for path in arena.rglob("*") if path.is_file())

BASELINE = "data/arena-hard-v2.0/model_answer/o3.jsonl"

@pytest.mark.parametrize("file, text, said", [
    ("config/arena-hard-v2.0.yaml", None, "expected a checkout of arena-hard-auto"),
    ("utils/judge_utils.py", "x = (", "expected a checkout of arena-hard-auto"),
    ("data/arena-hard-v2.0/question.jsonl", None, "question.jsonl: expected a JSON file"),
    ("data/arena-hard-v2.0/question.jsonl", '{"uid": "u0"}', "row 1: expected columns"),
    ("data/arena-hard-v2.0/question.jsonl", '{"uid": "u0", "category": "x", "prompt": "a"}', "category 'x', expected"),
    (BASELINE, '{"uid": "u0"}', "row 1: expected uid and messages"),
    (BASELINE, '{"uid": "u0", "messages": [{"content": "a"}]}', "model_answer/o3.jsonl has no answer to question u1"),
])
def test_a_checkout_that_is_none(world, arena, capsys, file, text, said):
    (arena / file).unlink() if text is None else (arena / file).write_text(text)
    assert said in refusal(capsys, flags(world, arena, JudgeServer()))

# ---- answers --------------------------------------------------------------------------------------------------------

def test_answers_are_the_rollouts_and_do_not_depend_on_the_batch(world, arena):
    evaluation.main(flags(world, arena, JudgeServer()))
    folder = arena / "data/arena-hard-v2.0/model_answer/mine.jsonl"
    first = [json.loads(line) for line in folder.read_text().splitlines()]
    evaluation.main(flags(world, arena, JudgeServer(), max_rows=3, out=arena / "again"))
    second = [json.loads(line) for line in folder.read_text().splitlines()]
    assert [row["messages"] for row in first] == [row["messages"] for row in second]
    assert [row["uid"] for row in first] == [f"u{i}" for i in range(8)]
    policy = save.Policy.from_pretrained(str(world / "policy"))
    for row in first[:3]:
        ids = save.encode_chat(policy.tokenizer, row["messages"][:1], True)
        tokens, _ = save.rollout(policy, [ids], 1, [save.seed_for(0, "answer", row["uid"])], max_new_tokens=6,
                                 temperature=0.7, top_p=0.8, top_k=20)
        assert row["messages"][1]["content"]["answer"] == policy.tokenizer.decode(tokens[0], skip_special_tokens=True)

def test_a_question_that_does_not_fit(world, arena, capsys):
    line = refusal(capsys, flags(world, arena, JudgeServer(), max_new_tokens=100000))
    assert "--max_new_tokens 100000" in line and "context" in line

# ---- alpaca_eval ----------------------------------------------------------------------------------------------------

@pytest.fixture
def alpaca(tmp_path):
    """--data with five instructions, and reference outputs for them."""
    rows = [{"dataset": "helpful_base", "instruction": f"copy {' '.join('abcdefgh'[:i + 1])}", "output": "a b c",
             "generator": "reference"} for i in range(5)]
    for name in ("alpaca_eval.json", "reference.json"):
        (tmp_path / name).write_text(json.dumps(rows))
    return tmp_path

def alpaca_flags(world, alpaca, *other):
    words = ["--policy", world / "policy", "--bench", "alpaca_eval", "--data", alpaca, "--out", alpaca / "out",
             "--max_new_tokens", 6, "--name", "mine", *other]
    return [str(word) for word in words]

def test_the_official_files_and_command(world, alpaca, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    evaluation.main(alpaca_flags(world, alpaca, "--judge", "some/judge", "--judge_url", "http://127.0.0.1:1/v1",
                                 "--reference", alpaca / "alpaca_eval.json"))
    outputs = json.loads((alpaca / "out/alpaca_eval/model_outputs.json").read_text())
    source = json.loads((alpaca / "alpaca_eval.json").read_text())
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in source]
    assert all(set(row) == {"dataset", "instruction", "output", "generator"} for row in outputs)
    assert {row["generator"] for row in outputs} == {"mine"}
    command = capsys.readouterr().out
    assert "pip install alpaca_eval" in command and "alpaca_eval.main evaluate --model_outputs" in command
    assert f"--reference_outputs {alpaca / 'alpaca_eval.json'}" in command and KEY not in command
    assert str(alpaca / "out/alpaca_eval/model_outputs.json") in command

def test_real_instructions_in_their_order(world, monkeypatch, tmp_path):
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not data.is_dir():
        pytest.skip("needs the real AlpacaEval instructions in ../shared/data")
    rows = evaluation.alpaca_questions(evaluation.EvalConfig(data=str(data)))
    assert len(rows) == 805 and rows["0"]["prompt"].startswith("What are the names of some famous actors")

SHARED = Path(__file__).resolve().parents[2] / "shared"

def prefers_longer(body):
    """One token, as the official annotator asks for: log-probs 3 to 1 for the longer of its two outputs."""
    m, big = map(len, re.findall(r'"output": """(.*?)"""\n', body["messages"][-1]["content"], re.S))
    p = 0.5 if m == big else 0.75 if m > big else 0.25
    tokens = [{"token": token, "logprob": math.log(q), "bytes": None} for token, q in (("m", p), ("M", 1 - p))]
    first = {**tokens[0], "top_logprobs": tokens}
    return {"message": {"role": "assistant", "content": "m"}, "logprobs": {"content": [first]}}

@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("alpaca_eval") is None, reason="the alpaca_eval package is not installed")
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data and ../shared/oracles")
def test_the_official_package_with_a_local_judge(world, tmp_path, monkeypatch):
    """All 805 instructions through the real package: every request fails twice, the win rate is known beforehand."""
    data, oracle = SHARED / "data/alpaca_eval", SHARED / "oracles/alpaca_eval/df_gamed_RECONSTRUCTED.csv.gz"
    reference = json.load(gzip.open(data / "baseline_gpt4_1106_preview_outputs.json.gz"))
    for row in reference:
        row["output"] = row["output"][:len(row["instruction"]) % 12]  # about as long as the tiny policy's answers
    (tmp_path / "reference.json").write_text(json.dumps(reference))
    cached = tmp_path / "hf/hub/datasets--tatsu-lab--alpaca_eval"  # a hub cache with the file that length control reads
    (cached / "refs").mkdir(parents=True)
    (cached / "snapshots/1").mkdir(parents=True)
    (cached / "refs/main").write_text("1")
    (cached / "snapshots/1/df_gamed.csv").write_bytes(gzip.decompress(oracle.read_bytes()))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    server = JudgeServer([429, 500], verdict=prefers_longer)
    evaluation.main(alpaca_flags(world, tmp_path, "--data", data.parent, "--judge", "judge", "--judge_url", server.url,
                                 "--reference", tmp_path / "reference.json"))
    result = results(tmp_path, "alpaca_eval")
    outputs = json.loads((tmp_path / "out/alpaca_eval/model_outputs.json").read_text())
    gaps = [len(ours["output"]) - len(theirs["output"]) for ours, theirs in zip(outputs, reference, strict=True)]
    assert result["n_total"] == 805 and len(set(gaps)) > 5
    preferences = [50 if gap == 0 else 75 if gap > 0 else 25 for gap in gaps]
    assert result["win_rate"] == pytest.approx(sum(preferences) / 805, abs=0.01)
    assert 0 < result["length_controlled_winrate"] < 100
    assert set(server.seen.values()) == {3}  # two faults, one answer: nothing is asked for twice
