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
            for line in text.replace("\\\n", " ").strip().split("\n")]
SNIPPETS = [text for kind, text in BLOCKS if kind == "python"]
SMALL = ("--steps 2 --batch 2 --group 4 --value_prompts 2 --value_k 2 --max_new_tokens 4 --max_prompt_tokens 32 "
         "--save_every 0 --device cpu --dtype float32").split()


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


def test_the_readme_has_what_these_tests_look_for():
    assert len(COMMANDS) >= 7 and len(SNIPPETS) == 2
    assert all(command.split()[0] in ("bash", "python", "torchrun") for command in COMMANDS), COMMANDS


def test_commands_of_save(folder, monkeypatch):
    """In the README's order, so that later ones find what earlier ones wrote; torchrun's as one process."""
    monkeypatch.chdir(folder)
    for command in COMMANDS:
        words = shlex.split(command)
        if "save.py" not in words:
            continue
        at = words.index("save.py")
        if words[0] == "torchrun":
            assert get_args_parser().parse_args(words[1:]).nproc_per_node in ("4", "8")
        flags = words[at + 1:]
        named = "--policy" in flags or "preference" in flags  # otherwise the hub defaults, which need the network
        files = [] if named else ["--policy", "policy", "--rm", "rm", "--prompts", "prompts.jsonl"]
        save.main(flags + files + SMALL)
        out = pathlib.Path(flags[flags.index("--out") + 1])
        assert (out / "metrics.jsonl").is_file() and (out / "rm" / "config.json").is_file(), command


def test_commands_of_the_benchmark(folder, monkeypatch):
    """Tiny shapes instead of the paper's, on the CPU."""
    monkeypatch.chdir(folder)
    commands = [shlex.split(command) for command in COMMANDS if "tests/bench.py" in command]
    assert [words[2] for words in commands] == ["models", "phases"]
    models, phases = ([sys.executable, str(ROOT / words[1]), *words[2:]] for words in commands)
    models = ["tiny" if word == "full" else word for word in models]
    subprocess.run([*models, "--prompt_tokens", "8", "--mean_tokens", "4"], check=True, capture_output=True)
    small = "--repeats 1 --device cpu --batch 8 --group 4 --max_new_tokens 8 --max_prompt_tokens 16".split()
    done = subprocess.run([*phases, *small], check=True, capture_output=True, text=True)
    for phase in ("8 rows of 8 + ", "rollout", "score", "rm_update", "log_probs", "policy_update"):
        assert phase in done.stdout, done.stdout


def test_commands_of_eval(folder, monkeypatch, tmp_path):
    """The same for eval.py: on two reward models that are there, on small benchmarks, with a judge of our own."""
    import test_eval
    import test_policies
    monkeypatch.chdir(folder)
    monkeypatch.setattr(test_policies.evaluation.Judge, "pause", 0.01)
    shutil.copytree("rm", "runs/save/rm", dirs_exist_ok=True)
    test_eval.write_benchmarks(folder / "data")
    pathlib.Path("data/alpaca_eval.json").write_text('[{"instruction": "copy a", "dataset": "x"}]')
    test_policies.write_arena(folder / "arena-hard-auto")
    judge = test_policies.JudgeServer()
    ran = 0
    for command in COMMANDS:
        words = shlex.split(command)
        if "eval.py" not in words:
            continue
        flags = ["runs/save/rm" if word == "runs/paper/rm" else "path/to/model" if word.startswith("Skywork/") else word
                 for word in words[words.index("eval.py") + 1:]]
        out = pathlib.Path(flags[flags.index("--out") + 1])
        shutil.rmtree(out, ignore_errors=True)
        small = ["--max_new_tokens", "4", "--judge_url", judge.url] if "--policy" in flags else ["--draws", "20"]
        data = ["--data", "data"] if "--data" not in flags and "all" in flags else []
        test_eval.evaluation.main([*flags, *small, *data, "--device", "cpu"])
        assert json.loads((out / "results.json").read_text()), command
        ran += 1
    assert ran == 5


def test_the_saved_reward_model_snippet(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    if not pathlib.Path("runs/save/rm").is_dir():
        pytest.skip("needs test_commands_of_save, which writes runs/save/rm")
    capsys.readouterr()
    exec(SNIPPETS[1], {})  # the README's own text
    printed = float(capsys.readouterr().out)
    rm = save.RewardModel.from_pretrained("runs/save/rm")
    rows = save.encode_responses(rm.tokenizer, [{"role": "user", "content": "reverse a b c"}], ["c b a"])
    assert printed == pytest.approx(save.score(rm, rows, 100)[0].item(), abs=1e-5)


def test_the_loss_of_your_own_snippet(monkeypatch):
    monkeypatch.setattr(save, "RM_LOSSES", dict(save.RM_LOSSES))
    exec(SNIPPETS[0], vars(save))
    rewards = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
    positive, negative = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    loss = save.RM_LOSSES["mine"](rewards, torch.zeros(1), positive, negative, positive | negative)
    loss.backward()
    expected = (torch.log1p(torch.exp(torch.tensor(-2.0))) + torch.log1p(torch.exp(torch.tensor(-1.0)))) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert rewards.grad[0, 0] < 0 < rewards.grad[0, 1] and rewards.grad[0, 2] == 0
    del save.my_loss


def test_run_sh(folder, tmp_path):
    """`bash run.sh` on a world that is there already, `bash run.sh test`, and its one line for a wrong word."""
    assert {"bash run.sh", "bash run.sh test"} <= set(COMMANDS)
    shutil.copytree(folder, tmp_path / "annealed-0", ignore=shutil.ignore_patterns("path", "runs"))
    (tmp_path / "annealed-0" / "world.json").write_text("{}")
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}

    def run(*words):
        return subprocess.run(["bash", str(ROOT / "run.sh"), *words], env=env, capture_output=True, text=True)

    done = run(*SMALL[:-4])
    assert done.returncode == 0, done.stderr
    assert re.search(r"RM accuracy, heldout_id +\d", done.stdout) and re.search(r"gold reward, greedy +\d", done.stdout)
    assert (tmp_path / "annealed-0-save" / "rm" / "value_head.safetensors").is_file()
    assert "minus the first, paired" in done.stdout and (tmp_path / "annealed-0-save/eval/results.json").is_file()
    collected = run("test", "--collect-only", "-q", "tests/test_maths.py")
    assert collected.returncode == 0 and "test_maths" in collected.stdout
    wrong = run("tests")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
