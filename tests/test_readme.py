"""Every command and every snippet of README.md runs, on untrained tiny models and for a step or two."""
import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import report
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
    assert len(COMMANDS) == 11 and len(SNIPPETS) == 1
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
    files = re.findall(r"`(?:tests/forks/)?(\w+\.py)`", README.split("## Fork it")[1].split("## Where")[0])
    files.remove("save.py")
    assert len(files) == 16 and [name for name in files if not (ROOT / "tests/forks" / name).is_file()] == []

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
    logged = {re.sub(f"^({'|'.join(phases)})_", "PHASE_", re.sub("^(accuracy|loss)_.*", r"\1_NAME", name))
              for name in logged}
    assert explained == logged
    report.main(re.findall(r"`python tests/report.py (runs/mine)`", README))
    assert pathlib.Path("runs/mine/report.svg").read_text(encoding="utf-8").startswith("<svg")

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
    for what in ("RM accuracy, mean", "policy gold reward, sampled", "policy gold reward, greedy"):
        assert re.search(rf"^{what} +\d+\.\d\d +\d+\.\d\d +\d+\.\d\d +[+-]\d", done.stdout, re.M), done.stdout
    mean = re.search(r"^RM accuracy, mean +(\S+) +\S+ +(\S+)", done.stdout, re.M)
    assert mean[1] == mean[2] and "The reward model " in done.stdout  # before, and frozen
    picture, following = done.stdout.splitlines()[-2:]
    assert picture.endswith(f"{old}-2/report.svg") and following.endswith(f"OUT={tmp_path} bash run.sh compare")
    assert max(record.get("step", 0) for record in read(tmp_path / "few-0-frozen-2/metrics.jsonl")) == 3
    assert f"{old} is an earlier result and stays: this one goes to {old}-2" in done.stdout
    assert [path.name for path in old.iterdir()] == ["mine.txt"]
    assert (tmp_path / "few-0-save-2/rm/value_head.safetensors").is_file()
    assert max(record.get("step", 0) for record in read(tmp_path / "few-0-save-2/metrics.jsonl")) == 3
    assert (done.stdout + done.stderr).count("\n") <= 80

@pytest.fixture
def laptop(tmp_path):
    """Popen of `bash run.sh` with a stand-in for Python: `slow` is what it does as save.py on the RM that learns,
    `control` as that with the frozen RM."""
    def start(slow, control="sleep 1"):
        python = tmp_path / "python"
        python.write_text(f"""#!/bin/sh
            echo "$*" >> {tmp_path}/calls
            case "$*" in
              *--flags*) echo --steps 80 ;;
              *--steps" "80*"--rm_update none") echo $$ > {tmp_path}/frozen; exec {control} ;;
              save.py*) {slow} ;;
              *) echo "$1 says this" ;;
            esac""")
        python.chmod(0o755)
        (tmp_path / "few-0").mkdir()
        (tmp_path / "few-0" / "world.json").write_text("{}")
        return subprocess.Popen(["bash", str(ROOT / "run.sh")], env=os.environ | {"PYTHON": str(python), "OUT": str(
            tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return start

def gone(file):
    """Has the process whose id the file holds ended within five seconds?"""
    with contextlib.suppress(ProcessLookupError):
        for _ in range(50):
            os.kill(int(file.read_text()), 0)
            time.sleep(0.1)
        return False
    return True

def test_run_sh_prints_as_it_goes(laptop, tmp_path):
    """Not when a buffer of the filter is full; accuracies stay out, report and next command come last."""
    run = laptop('echo "save 1"; echo "  accuracy on x: 1 %"; sleep 1.5; echo "save 2"; '
                 f"mkdir -p {tmp_path}/few-0-save/rm")
    lines = [(line.strip(), time.monotonic()) for line in run.stdout]
    assert run.wait(20) == 0
    said, times = [line for line, _ in lines], dict(lines)
    assert times["save 2"] - times["save 1"] > 1
    assert said[1:] == ["save 1", "save 2", "tests/report.py says this", "next, its rivals there: "
                        f"OUT={tmp_path} bash run.sh compare"] and "few-0-frozen.log" in said[0]

@pytest.mark.parametrize("slow, control, code", [
    ("sleep 0.5; exit 3", "sleep 60", 3), ("mkdir -p {}/few-0-save/rm", "true", 0),
    ("echo '  accuracy on x: 1 %'; mkdir -p {}/few-0-save/rm", "true", 0),
    ("sleep 0.5; mkdir -p {}/few-0-save/rm", "false", 1)])
def test_run_sh_ends_as_save_py_does(laptop, tmp_path, slow, control, code):
    """A line that the filter drops, or none at all, is no failure. Where one of the two runs fails, all does, and the
    control does not go on alone."""
    run = laptop(slow.format(tmp_path), control)
    assert run.wait(20) == code and gone(tmp_path / "frozen")
    assert ("tests/report.py" in (tmp_path / "calls").read_text()) == (code == 0)

def test_ctrl_c_is_for_save_py_to_answer(laptop, tmp_path):
    run = laptop('trap \'echo "stopped after step 1"; exit 0\' INT; echo "save 1"; sleep 3 & wait', "sleep 60")
    while run.stdout.readline() != "save 1\n":
        assert run.poll() is None
    os.killpg(run.pid, signal.SIGINT)
    assert run.stdout.read() == "stopped after step 1\n" and run.wait(20) == 0 and gone(tmp_path / "frozen")
    assert "few-0-save/rm" not in (tmp_path / "calls").read_text()

@pytest.mark.parametrize("words, command", [
    ("test -m slow", "-m pytest -q -m slow"),
    ("paper --algo rloo", "-m torch.distributed.run --standalone --nproc-per-node 4 save.py --out OUT --seed 3 "
                          "--algo rloo"),
    ("tables labels --jobs 2", "tests/tables.py --out OUT labels --jobs 2"),
    ("compare --jobs 1", "tests/tables.py compare --worlds habits --seeds 3 --heldout 3000 --out OUT --there OUT "
                         "--jobs 1"),
])
def test_what_run_sh_starts(words, command):
    env = os.environ | {"PYTHON": "echo", "OUT": "OUT", "SEED": "3", "WORLD": "habits"}
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
