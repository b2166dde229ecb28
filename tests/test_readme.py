"""Every command and every snippet of README.md runs, on untrained tiny models and for a step or two."""
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import toy
from torch.distributed.run import get_args_parser

import save

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.S)
COMMANDS = [line.split("  #")[0].strip() for kind, text in BLOCKS if kind == "bash"
            for line in text.replace("\\\n", " ").strip().split("\n") if not line.startswith("#")]
SNIPPETS = [text for kind, text in BLOCKS if kind == "python"]
SMALL = ("--steps 2 --batch 4 --group 8 --m0 0 --value_prompts 4 --value_k 2 --max_new_tokens 16 "
         "--max_prompt_tokens 32 --save_every 0 --device cpu --dtype float32").split()
WORLD = "--policy policy --rm rm --prompts prompts.jsonl".split()

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the README's commands name."""
    path = tmp_path_factory.mktemp("readme")
    toy.tiny_world(path)
    (path / "path/to").mkdir(parents=True)
    shutil.copytree(path / "policy", path / "path/to/policy")
    for name in ("reward_model", "model"):
        shutil.copytree(path / "rm", path / "path/to" / name)
    shutil.copy(path / "heldout_id.jsonl", path / "heldout.jsonl")
    return path

def read(file):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in pathlib.Path(file).read_text().splitlines()]

def test_the_readme_is_what_these_tests_look_for():
    assert len(COMMANDS) == 12 and len(SNIPPETS) == 1
    assert all(command.split()[0] in ("bash", "python", "torchrun") for command in COMMANDS), COMMANDS

def test_names_in_the_readme_exist():
    """Flags, functions of the drawing and of the tables: none is left over from before."""
    flags = {"--" + name for name in save.Config.__dataclass_fields__}
    known = flags | {"--nproc-per-node", "--ranks"} | set(re.findall(r"--\w+", " ".join(
        command for command in COMMANDS if "eval.py" in command))) | {"--max_length"}
    assert set(re.findall(r"--[a-z][\w-]+", README)) <= known
    for name in re.findall(r"`([a-zA-Z_]+)`", README.split("## From the paper")[1].split("## When something")[0]):
        assert hasattr(save, name), name
    drawn = re.findall(r'(?:"|, | the )([a-z]+_[a-z_]+)', README.split("```mermaid")[1].split("```")[0])
    assert len(drawn) >= 5 and all(hasattr(save, name) for name in drawn), drawn

def test_the_forks_in_the_readme_exist():
    files = re.findall(r"`(?:tests/forks/)?(\w+\.py)`", README.split("## From the paper")[1].split("## Where")[0])
    assert len(files) == 8 and [name for name in files if not (ROOT / "tests/forks" / name).is_file()] == []

def test_commands_of_save(folder, monkeypatch):
    """In the README's order, so that later ones find what earlier ones wrote; torchrun's as one process."""
    monkeypatch.chdir(folder)
    logged = set()
    for words in (shlex.split(command) for command in COMMANDS if " save.py " in command):
        flags = words[words.index("save.py") + 1:]
        if words[0] == "torchrun":
            assert get_args_parser().parse_args(words[1:]).nproc_per_node == "4"
        named = "--policy" in flags or "preference" in flags  # otherwise the hub defaults, which need the network
        save.main(flags + ([] if named else WORLD) + SMALL)
        out = pathlib.Path(flags[flags.index("--out") + 1])
        assert (out / "rm" / "config.json").is_file(), words
        logged |= {column for record in read(out / "metrics.jsonl")[1:] for column in record}
    table = README.split("| column |")[1].split("\n\n")[0]
    explained = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    phases = {"rollout", "score", "rm_update", "log_probs", "policy_update"}
    logged = {re.sub(f"^({'|'.join(phases)})_", "PHASE_", re.sub("^accuracy_.*", "accuracy_NAME", name))
              for name in logged}
    assert explained - {"PHASE_gb"} == logged

@pytest.mark.slow
def test_commands_of_eval(folder, monkeypatch):
    """The same for eval.py: on two reward models that are there, on small benchmarks."""
    import test_eval
    monkeypatch.chdir(folder)
    for name in ("save", "paper"):
        shutil.copytree("rm", f"runs/{name}/rm", dirs_exist_ok=True)
    test_eval.write_benchmarks(folder / "data")
    pathlib.Path("data/alpaca_eval.json").write_text('[{"instruction": "copy a", "dataset": "x"}]')
    question = {"uid": "1", "category": "hard_prompt", "subcategory": "x", "prompt": "copy a"}
    pathlib.Path("data/question.jsonl").write_text(json.dumps(question) + "\n")
    for words in (shlex.split(command) for command in COMMANDS if " eval.py " in command):
        flags = words[words.index("eval.py") + 1:]
        out = pathlib.Path(flags[flags.index("--out") + 1])
        shutil.rmtree(out, ignore_errors=True)
        small = ["--max_new_tokens", "4"] if "--policy" in flags else ["--draws", "20"]
        data = ["--data", "data"] if "--data" not in flags else []
        test_eval.evaluation.main([*flags, *small, *data, "--device", "cpu"])
        assert any(out.iterdir()), words

@pytest.fixture
def fork(folder, monkeypatch):
    """fork(snippet, flags...) -> metrics.jsonl and samples.jsonl of the snippet, run as its file would run."""
    monkeypatch.chdir(folder)
    for name in ("RM_UPDATES", "ALGORITHMS"):
        monkeypatch.setattr(save, name, dict(getattr(save, name)))

    def run(snippet, *flags):
        out = pathlib.Path("runs/fork")
        shutil.rmtree(out, ignore_errors=True)
        monkeypatch.setattr(sys, "argv", ["fork.py", "--out", str(out), *WORLD, *SMALL, *flags])
        exec(compile(snippet, "fork.py", "exec"), {"__name__": "__main__"})
        return read(out / "metrics.jsonl"), read(out / "samples.jsonl")
    return run

def test_a_loss_of_your_own_is_what_trains(fork):
    """Its value in step 1 is worked out again from what samples.jsonl says of that step."""
    metrics, samples = fork(SNIPPETS[0], "--rm_update", "mine")
    margins = [(row["reward"] - row["value"]) * (1 if row["side"] == "+" else -1)
               for row in samples if row["step"] == 1 and row["kept"]]
    expected = torch.nn.functional.softplus(-torch.tensor(margins, dtype=torch.float64)).mean().item()
    first = next(record for record in metrics if record.get("step") == 1)
    assert first["rm_loss"] == pytest.approx(expected, rel=1e-4) and first["reward_shift"] > 0

def test_an_advantage_of_your_own_is_what_trains(fork):
    metrics, _ = fork(SNIPPETS[0], "--algo", "mine")
    rewards, keep = torch.tensor([[4.0, 1.0, 9.0], [1.0, 2.0, 3.0]]), torch.tensor([[1, 1, 0], [0, 1, 0]]).bool()
    assert save.ALGORITHMS["mine"].advantages(rewards, keep).tolist() == [[1.5, -1.5, 0], [0, 0, 0]]
    plain, _ = fork("import save\nsave.main()", "--algo", "grpo")
    mine, grpo = (next(record for record in run if record.get("step") == 1) for run in (metrics, plain))
    assert mine["reward"] == grpo["reward"]  # the same responses
    assert mine["policy_grad_norm"] > 0 and mine["policy_grad_norm"] != pytest.approx(grpo["policy_grad_norm"], 0.01)

@pytest.mark.slow
def test_run_sh(folder, tmp_path):
    """`bash run.sh` on a world that is there already, beside an earlier result, which stays as it is."""
    assert {"bash run.sh", "bash run.sh compare", "bash run.sh test"} <= set(COMMANDS)
    shutil.copytree(folder, tmp_path / "few-0", ignore=shutil.ignore_patterns("path", "runs"))
    (tmp_path / "few-0" / "world.json").write_text('{"world": "few"}')
    old = tmp_path / "few-0-save"
    old.mkdir()
    (old / "mine.txt").write_text("kept")
    python = tmp_path / "python"  # the flags of the tiny world instead of the laptop world's
    python.write_text(f'#!/bin/sh\n[ "$*" = "tests/toy.py --flags --world few" ] && echo {" ".join(SMALL)} || '
                      f'exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path)}

    def run(*words):
        return subprocess.run(["bash", str(ROOT / "run.sh"), *words], env=env, capture_output=True, text=True)

    done = run("--steps", "3")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^RM accuracy, mean +\d+\.\d\d +\d+\.\d\d", done.stdout, re.M)
    assert re.search(r"gold reward, greedy +\d", done.stdout) and "The reward model " in done.stdout
    assert f"{old} is an earlier result and stays: this one goes to {old}-2" in done.stdout
    assert [path.name for path in old.iterdir()] == ["mine.txt"]
    assert (tmp_path / "few-0-save-2/rm/value_head.safetensors").is_file()
    assert max(record.get("step", 0) for record in read(tmp_path / "few-0-save-2/metrics.jsonl")) == 3
    assert (done.stdout + done.stderr).count("\n") <= 80

@pytest.mark.parametrize("words, command", [
    ("test -m slow", "-m pytest -q -m slow"),
    ("paper --algo rloo", "-m torch.distributed.run --standalone --nproc-per-node 4 save.py --out OUT --seed 3 "
                          "--algo rloo"),
    ("tables labels --jobs 2", "tests/tables.py --out OUT labels --jobs 2"),
    ("compare --jobs 1", "tests/tables.py compare --seeds 3 --heldout 3000 --out OUT --jobs 1"),
    ("figures", "tests/figures.py --out OUT"),
])
def test_what_run_sh_starts(words, command):
    env = os.environ | {"PYTHON": "echo", "OUT": "OUT", "SEED": "3"}
    run = ["bash", str(ROOT / "run.sh")]
    done = subprocess.run([*run, *words.split()], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == command + "\n"
    wrong = subprocess.run([*run, "tests"], env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1

def test_flags_of_the_laptop_run_are_flags_of_save(capsys):
    toy.main(["--flags"])
    cfg = save.parse_config(capsys.readouterr().out.split())
    assert (cfg.steps, cfg.batch, cfg.group, cfg.lr_rm) == (80, 16, 8, 1e-5)
    toy.main(["--flags", "--world", "graded"])
    assert save.parse_config(capsys.readouterr().out.split()).lr_rm == 3e-5

def scores(before, after):
    """scores.jsonl of two reward models: each letter a pair, + right and - wrong; sets are split at spaces."""
    return [{"rm": rm, "bench": f"heldout_{name}.jsonl", "score_chosen": {"+": 1, "-": -1, "0": 0}[mark],
             "score_rejected": 0} for rm, sets in (("a", before), ("b", after))
            for name, marks in zip("xy", sets.split()) for mark in marks]

@pytest.mark.parametrize("before, after, what", [
    ("--------++ " + "-" * 100, "++++++++++ " + "-" * 50 + "+" * 50, "got better: +65.00"),
    ("++++++++++ ++++", "---------- ++++", "got worse: -50.00"),
    ("+-+-+-+-+- ++00", "-++-+-+-+- ++00", "did not clearly change: +0.00"),
])
def test_the_sentence_follows_the_interval_of_the_mean(tmp_path, capsys, before, after, what):
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores(before, after)))
    changes = toy.print_accuracies(tmp_path / "scores.jsonl")
    assert toy.verdict(changes).startswith("The reward model " + what)
    means = [sum(100 * part.count("+") / len(part) for part in sets.split()) / 2 for sets in (before, after)]
    line = re.search(r"^RM accuracy, mean +(\S+) +(\S+)", capsys.readouterr().out, re.M)
    assert [float(x) for x in line.groups()] == pytest.approx(means, abs=0.005)

def test_the_interval_is_that_of_the_normal_approximation():
    """Two sets of 400 and 900 pairs: the variance of the mean of means is a quarter of the sum of theirs."""
    changes = [torch.tensor([1.0, 0, 0, -1] * 100).double(), torch.tensor([1.0, 0, 0] * 300).double()]
    error = (sum(x.var(correction=0) / len(x) for x in changes) / 4).sqrt().item()
    middle = (0 + 1 / 3) / 2
    low, high = toy.interval(changes, 4000)
    assert low == pytest.approx(100 * (middle - 1.96 * error), abs=0.25)
    assert high == pytest.approx(100 * (middle + 1.96 * error), abs=0.25)

def test_trend_lines():
    assert toy.trend([1.0, 2.0, 3.0, 8.0]) == "▁▂▃█  1.00 to 8.00" and toy.trend([5.0, 5.0]) == "▄▄  5.00 to 5.00"
