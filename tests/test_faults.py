"""What goes wrong in a night: kills, preemption, full disks, damaged files, bad values, odd responses."""
import contextlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from test_runs import MODELS, RM, argv, metrics, refusal, rows_of, samples

import save

FLAGS = {"steps": 6, "save_every": 2, "resume": True, "value_epochs": 8}

def words(world, out, **flags):
    return argv(world, out, **{**FLAGS, **flags})

@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """The run that nothing happens to."""
    out = tmp_path_factory.mktemp("straight") / "out"
    save.main(words(world, out))
    return out

def same_as(straight, out):
    """Bit for bit the models, and every step once in the logs."""
    for file in MODELS:
        ours, theirs = load_file(straight / file), load_file(out / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
    assert metrics(out) == metrics(straight) and samples(out) == samples(straight)
    steps = [(row["stage"], row["step"]) for row in rows_of(out / "metrics.jsonl") if "stage" in row]
    assert len(steps) == len(set(steps))

def at_step(monkeypatch, number, do):
    """Call do() at the end of a step."""
    save_step = save.save_step

    def step_and_do(run, prompts):
        save_step(run, prompts)
        if run.step == number:
            do()
    monkeypatch.setattr(save, "save_step", step_and_do)

def fails(error):
    """A function that raises it."""
    def raises(*_, **__):
        raise error
    return raises

def ends(capsys, code, words):
    """Run what ends with an exit code. Returns its one line on stderr, or none."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        save.main(words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert stop.value.code == code and len(lines) == (code > 0), lines
    return lines[0] if lines else ""

def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())

# ---- kills ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well(world, straight, tmp_path, monkeypatch, capsys, number):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        ends(capsys, 0, words(world, out))
    assert names(out) == ["step_000002", "step_000003"] and not (out / "rm").exists()
    save.main(words(world, out))
    said = capsys.readouterr().out
    assert "save: from step 4 on\n" in said and re.search(r"the RM learned in \d of 6 steps", said)
    same_as(straight, out)

@pytest.mark.parametrize("where", ["prepare", "value_stage"])
def test_ctrl_c_before_the_steps_is_one_line(world, tmp_path, monkeypatch, capsys, where):
    monkeypatch.setattr(save, where, fails(KeyboardInterrupt()))
    assert "stopped by Ctrl-C" in ends(capsys, 130, words(world, tmp_path / "out"))

def test_a_broken_run_resumes_to_the_same_bits(world, straight, tmp_path, monkeypatch):
    """It broke in step 5, after checkpoint 4: what the logs held of step 5 comes again."""
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="power cut"):
        patch.setattr(save, "policy_step", lambda run, *rest, step=save.policy_step:
                      step(run, *rest) if run.step < 5 else fails(AssertionError("power cut"))())
        save.main(words(world, tmp_path / "out"))
    assert samples(tmp_path / "out").keys() == {1, 2, 3, 4, 5} and names(tmp_path / "out")[-1] == "step_000004"
    save.main(words(world, tmp_path / "out"))
    same_as(straight, tmp_path / "out")

def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "rm"

    def write(text, harm=lambda: None):
        with contextlib.suppress(OSError), save.replaced_folder(folder) as new:
            (new / "file").write_text(text)
            harm()

    def texts():
        return {path.read_text() for path in tmp_path.glob("*rm*/file")}
    write("old")
    write("half", fails(OSError()))
    assert (folder / "file").read_text() == "old"
    for module, name in ((shutil, "rmtree"), (os, "replace")):  # killed there: the old one or .rm.new is complete
        with monkeypatch.context() as patch:
            write("new", lambda: patch.setattr(module, name, fails(OSError())))
        assert texts() in ({"old", "new"}, {"new"})
    write("newer")  # and the next one finds its way
    assert [path.name for path in tmp_path.iterdir()] == ["rm"] and texts() == {"newer"}

def killed_at_random(world, out, kills, seed, **flags):
    """Start, SIGKILL after a random time, resume, ... until `kills` of them, then let it end. Returns their number."""
    rng, done, longest, fork = random.Random(seed), 0, 4.0, multiprocessing.get_context("fork")
    while True:
        process = fork.Process(target=save.main, args=(words(world, out, **flags),))
        start = time.monotonic()
        process.start()
        process.join(rng.uniform(0.05, longest) if done < kills else 300)
        if process.exitcode is None:
            process.kill()
            process.join()
            done += 1
            if not (out / "checkpoints").exists():
                longest = min(longest * 1.3, 20)  # the value stage starts over: give it time
        elif done >= kills:
            assert process.exitcode == 0
            return done
        else:  # it ended before its kill
            longest = time.monotonic() - start

@pytest.mark.slow
def test_twenty_kills(world, tmp_path):
    flags = {"steps": 40, "save_every": 1}
    save.main(words(world, tmp_path / "straight", **flags))
    assert killed_at_random(world, tmp_path / "out", kills=20, seed=1, **flags) == 20
    same_as(tmp_path / "straight", tmp_path / "out")

# ---- disks ----------------------------------------------------------------------------------------------------------
def test_a_full_disk_leaves_the_checkpoint_before(world, straight, tmp_path, monkeypatch, capsys):
    """A limit on the size of files, from step 3 on: the checkpoint of step 4 does not fit."""
    out, limit = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (straight / "checkpoints/step_000004/rank_00000.pt").stat().st_size // 2
    assert all((straight / name).stat().st_size < size for name in ("samples.jsonl", "metrics.jsonl"))
    try:
        with monkeypatch.context() as patch:
            at_step(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1])))
            line = ends(capsys, 2, words(world, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert line.startswith("save.py: error: rank 0: no checkpoint: ")
    assert [name for name in names(out) if name[0] != "."] == ["step_000002"]
    save.main(words(world, out))
    same_as(straight, out)

def test_a_damaged_checkpoint_is_named_and_nothing_is_written(world, tmp_path, capsys):
    out = tmp_path / "out"
    save.main(words(world, out, steps=2))
    file, log = out / "checkpoints/step_000002/rank_00000.pt", (out / "metrics.jsonl").read_bytes()
    for harm in (lambda: file.write_bytes(file.read_bytes()[:-70]), lambda: file.write_bytes(b""), file.unlink):
        harm()
        assert f"{file.parent} is damaged" in refusal(capsys, words(world, out, steps=2))
        assert (out / "metrics.jsonl").read_bytes() == log

# ---- bad values and too little memory -------------------------------------------------------------------------------
def bad_reward(monkeypatch, value):
    score = save.score

    def scored(rm, sequences, budget):
        rewards, features = score(rm, sequences, budget)
        return rewards.index_fill(0, torch.tensor([3]), value), features
    monkeypatch.setattr(save, "score", scored)

def bad_loss(monkeypatch, value):
    row = save.RM_UPDATES["save"]
    monkeypatch.setitem(save.RM_UPDATES, "save", row._replace(loss=lambda *inputs: row.loss(*inputs) * value))

def bad_weight(monkeypatch, value):
    decode = save.decode

    def spoils(policy, *inputs):
        tokens = decode(policy, *inputs)
        policy.model.get_output_embeddings().weight.data[5, 0] = value  # after sampling, before its log-probs
        return tokens
    monkeypatch.setattr(save, "decode", spoils)

@pytest.mark.parametrize("spoil, value", [(bad_reward, -math.inf), (bad_loss, math.nan), (bad_weight, math.nan)])
def test_a_bad_value_stops_the_run_before_an_optimizer_sees_it(world, tmp_path, monkeypatch, capsys, spoil, value):
    out, stepped, step = tmp_path / "out", [], save.ShardedAdamW.step

    def finite(self, scale=1.0):
        norm = step(self, scale)
        stepped.append(all(master.isfinite().all() for master in self.masters.values()))
        return norm
    monkeypatch.setattr(save.ShardedAdamW, "step", finite)
    at_step(monkeypatch, 2, lambda: spoil(monkeypatch, value))
    # without the reference pass, which would put the weight back from its master
    line = ends(capsys, 1, words(world, out, save_every=1, kl_coef=0))
    assert "not finite" in line or "gradient norm is" in line
    assert stepped and all(stepped) and names(out) == ["step_000001", "step_000002"] and not (out / "rm").exists()

def test_out_of_memory_is_one_line_with_the_flags_to_lower(world, tmp_path, monkeypatch, capsys):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")
    monkeypatch.setattr(save, "policy_step", fails(full))
    line = ends(capsys, 1, words(world, tmp_path / "out"))
    assert "rank 0: " in line and "CUDA out of memory. Tried to allocate 20.00 GiB" in line
    assert all(flag in line for flag in ("--micro_tokens", "--cache_tokens", "--max_new_tokens", "--offload"))

# ---- odd responses --------------------------------------------------------------------------------------------------
def rigged(monkeypatch, respond):
    """Replace sampling: respond(row number, eos id) -> token ids and whether it ended."""
    def rollout(policy, prompt_ids, group, seeds, **knobs):
        rows = [respond(i, policy.eos_ids[0]) for i in range(len(prompt_ids) * group)]
        return [tokens for tokens, _ in rows], [ended for _, ended in rows]

    def trained(*inputs, train=save.train):  # after the policy was loaded and tried
        monkeypatch.setattr(save, "rollout", rollout)
        train(*inputs)
    monkeypatch.setattr(save, "train", trained)

@pytest.mark.parametrize("algo, respond, truncated, equal", [
    ("grpo", lambda i, eos: ([eos], True), 0, True),            # nothing but EOS
    ("rloo", lambda i, eos: ([7, 8, eos], True), 0, True),      # all the same
    ("gspo", lambda i, eos: ([7 + i % 5] * 12, False), 1, False),
    ("grpo", lambda i, eos: ([7 + i % 9] * (1 + i % 12) + [eos], True), 0, False),
    ("rloo", lambda i, eos: (([eos], True) if i % 2 else ([6], False)), 0.5, False)],
    ids=["eos", "same", "cut", "mixed", "half"])
def test_odd_responses_make_no_bad_numbers(world, tmp_path, monkeypatch, algo, respond, truncated, equal):
    rigged(monkeypatch, respond)
    out = tmp_path / "out"
    save.main(words(world, out, steps=2, save_every=0, algo=algo))
    for record in metrics(out).values():
        assert all(math.isfinite(x) for x in record.values() if isinstance(x, (int, float))), record
    first, second = (metrics(out)["save", step] for step in (1, 2))
    assert first["truncated"] == truncated and (first["reward_spread"] == 0) == equal
    assert not equal or second.get("reward_shift", 0) == 0
    assert all(x.isfinite().all() for file in MODELS for x in load_file(out / file).values())

def test_any_text_goes_through(world, tmp_path):
    """Lone surrogates, four-byte characters, zero bytes and a prompt as long as is allowed."""
    prompts = ["copy a\ud800b", "copy 😀 𝔸", "copy \x00 \u202e x", "copy " + "a " * 20, "reverse é", "\ufeffcopy",
               "copy a", "sort \U0010ffff"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    out = tmp_path / "out"
    save.main(words(world, out, steps=2, save_every=0, prompts=tmp_path / "prompts.jsonl"))
    assert all(x.isfinite().all() for x in load_file(out / RM).values()) and samples(out).keys() == {1, 2}

# ---- soak -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_two_thousand_steps_stay_as_they_were(world, tmp_path, monkeypatch):
    """Peak memory, CPU time of a step and the number of files do not grow."""
    out, seconds, memory, save_step = tmp_path / "out", [], [], save.save_step

    def timed(run, prompts):
        start = time.process_time()
        save_step(run, prompts)
        if "rm_update_seconds" not in run.log.record:  # more and more steps have one, V gets better
            seconds.append(time.process_time() - start)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    monkeypatch.setattr(save, "save_step", timed)
    save.main(words(world, out, steps=2000, save_every=100, group=4, batch=2))
    early, late = statistics.median(seconds[:200]), statistics.median(seconds[-200:])
    assert memory[-1] <= 1.05 * memory[200] and late <= 1.5 * early, (memory[200], memory[-1], early, late)
    assert names(out) == ["step_001900", "step_002000"] and len(list(out.rglob("*"))) < 40

def test_a_run_on_ranks_leaves_its_group_before_python_ends(tmp_path):
    """Else gloo's threads are still there when it is torn down: exit code -6 now and then, after all is saved."""
    script = tmp_path / "ranks.py"
    script.write_text(f"import sys\nsys.path.insert(0, {save.__file__[:-8]!r})\nimport save\nimport atexit\n"
                      "atexit.register(lambda: save.os.write(1, f'group {save.dist.is_initialized()}\\n'.encode()))\n"
                      "save.start_ranks('cpu')\nassert save.total(1) == [2]\n")
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run([sys.executable, *launch, script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("group False") == 2, done.stderr[-2000:]
