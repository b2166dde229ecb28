"""What goes wrong in a night: kills, preemption, full disks, damaged files, bad values, odd responses."""
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

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

def at_step(monkeypatch, number, do, after=True):
    """Call do() at the end (or the beginning) of a step."""
    save_step = save.save_step

    def step_and_do(run, step, prompts):
        if step == number and not after:
            do()
        save_step(run, step, prompts)
        if step == number and after:
            do()
    monkeypatch.setattr(save, "save_step", step_and_do)

def names(out):
    return [path.name for path in save.checkpoints(out)]

# ---- kills ----------------------------------------------------------------------------------------------------------

def test_sigterm_saves_and_ends_well(world, straight, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        save.main(words(world, out))
    assert stop.value.code == 0 and names(out) == ["step_000002", "step_000003"]
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().out
    save.main(words(world, out))
    same_as(straight, out)

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
            longest = min(longest * 1.3, 20) if not names(out) else longest  # the value stage starts over: give it time
        elif done >= kills:
            assert process.exitcode == 0
            return done
        else:  # it ended before its kill
            longest = time.monotonic() - start

def test_a_process_that_is_killed_again_and_again_ends_at_the_right_weights(world, straight, tmp_path):
    assert killed_at_random(world, tmp_path / "out", kills=3, seed=0) == 3
    same_as(straight, tmp_path / "out")

@pytest.mark.slow
def test_twenty_kills(world, tmp_path):
    flags = {"steps": 40, "save_every": 1}
    save.main(words(world, tmp_path / "straight", **flags))
    assert killed_at_random(world, tmp_path / "out", kills=20, seed=1, **flags) == 20
    same_as(tmp_path / "straight", tmp_path / "out")

def test_a_rank_that_dies_is_reported_and_the_run_comes_back(world, straight, tmp_path):
    """SIGKILL of rank 1 of 2 in step 5; torchrun starts both again and they go on from step 4."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "1", __file__, json.dumps(words(world, tmp_path / "out"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(Path(save.__file__).parent)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "save.py: error: rank 0 lost another rank, start again with --resume" in done.stderr
    assert "resumed from" in done.stdout and "step_000004" in done.stdout
    for file in MODELS:
        ours, theirs = load_file(straight / file), load_file(tmp_path / "out" / file)
        assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5, file
    steps = [row["step"] for row in rows_of(tmp_path / "out/metrics.jsonl") if row.get("stage") == "save"]
    assert steps == list(range(7))

# ---- disks ----------------------------------------------------------------------------------------------------------

def test_a_full_disk_costs_one_checkpoint_and_nothing_else(world, straight, tmp_path, monkeypatch, capsys):
    """A limit on the size of files, from step 3 on: the checkpoint of step 4 and the final models do not fit."""
    out, limit = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    smallest = min(path.stat().st_size for path in straight.rglob("*.safetensors") if path.stat().st_size > 10000)
    size = (straight / "samples.jsonl").stat().st_size + (straight / "metrics.jsonl").stat().st_size
    assert size < smallest - 5000
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            at_step(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (smallest - 5000, limit[1])))
            save.main(words(world, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    text = capsys.readouterr()
    assert stop.value.code == 1 and "File too large" in text.err and "Traceback" not in text.err
    assert "the checkpoint of step 4 could not be written; the newest is" in text.out and "step_000002" in text.out
    assert names(out) == ["step_000002"] and not list((out / "checkpoints").glob(".*"))
    save.main(words(world, out))
    same_as(straight, out)

def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))

def cut(path):
    path.write_bytes(path.read_bytes()[:-7])

def interrupt():
    raise KeyboardInterrupt

@pytest.mark.parametrize("file, harm", [("rank_00000_000.safetensors", flip_a_bit), ("rank_00000_000.safetensors", cut),
                                        ("state.json", flip_a_bit), ("state.json", cut), ("SHA256SUMS", cut),
                                        ("SHA256SUMS", flip_a_bit), ("rank_00000_000.safetensors", Path.unlink)])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(world, straight, tmp_path, monkeypatch, capsys,
                                                                    file, harm):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 5, interrupt)  # no SIGINT: a shell's background jobs ignore it
        save.main(words(world, out))
    harm(out / "checkpoints/step_000004" / file)
    save.main(words(world, out))
    text = capsys.readouterr().out
    assert "step_000004 is damaged" in text and re.search(r"resumed from \S+step_000002", text)
    same_as(straight, out)

def test_when_all_checkpoints_are_damaged_nothing_is_started(world, straight, tmp_path, capsys):
    out = tmp_path / "out"
    save.main(words(world, out, steps=2))
    flip_a_bit(out / "checkpoints/step_000002/rank_00000_000.safetensors")
    before = (out / "metrics.jsonl").read_bytes()
    assert "all 1 checkpoints" in refusal(capsys, words(world, out)) and (out / "metrics.jsonl").read_bytes() == before

def test_sha256sum_agrees(straight):
    folder = straight / "checkpoints/step_000006"
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2

def test_resume_anyway_takes_other_flags(world, tmp_path, capsys):
    save.main(words(world, tmp_path / "out", steps=2))
    line = refusal(capsys, words(world, tmp_path / "out", lr_policy=3e-5))
    assert "--lr_policy was 1e-05, is 3e-05" in line and "--steps was 2, is 6" in line and "--resume_anyway" in line
    save.main(words(world, tmp_path / "out", lr_policy=3e-5, resume_anyway=True))
    assert names(tmp_path / "out")[-1] == "step_000006"

# ---- bad values -----------------------------------------------------------------------------------------------------

def bad_reward(monkeypatch, value):
    score = save.score

    def scored(rm, sequences, budget):
        rewards, features = score(rm, sequences, budget)
        return rewards.index_fill(0, torch.tensor([3]), value), features
    monkeypatch.setattr(save, "score", scored)

def bad_loss(monkeypatch, value):
    loss = save.RM_LOSSES["save"]
    monkeypatch.setitem(save.RM_LOSSES, "save", lambda *inputs: loss(*inputs) * value)

def bad_gradient(monkeypatch, value):
    accumulate = save.accumulate

    def spoiled(model, batches, micro_loss):
        accumulate(model, batches, micro_loss)
        next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = value
    monkeypatch.setattr(save, "accumulate", spoiled)

def bad_weight(monkeypatch, value):
    decode = save.decode

    def spoils(policy, *inputs):
        tokens = decode(policy, *inputs)
        policy.model.get_output_embeddings().weight.data[5, 0] = value  # after sampling, before its log-probs
        return tokens
    monkeypatch.setattr(save, "decode", spoils)

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoil", [bad_reward, bad_loss, bad_gradient, bad_weight])
def test_a_bad_value_stops_the_run_before_an_optimizer_sees_it(world, tmp_path, monkeypatch, capsys, spoil, value):
    out = tmp_path / "out"
    save.main(words(world, out, steps=2, save_every=1))  # a value head, and two good steps
    weights = {name: load_file(out / name) for name in MODELS}
    stepped, step = [], save.ShardedAdamW.step

    def finite(self, scale=1.0):
        norm = step(self, scale)
        stepped.append(all(master.isfinite().all() for master in self.masters.values()))
        return norm
    monkeypatch.setattr(save.ShardedAdamW, "step", finite)
    spoil(monkeypatch, value)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        # without the reference pass, which would put the weight back from its master
        save.main([*words(world, out, save_every=1, kl_coef=0), "--resume_anyway"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("save.py: error: ")]
    assert stop.value.code == 1 and len(lines) == 1 and "step 3 rank 0: " in lines[0]
    dump = json.loads((out / "nonfinite_rank_0.json").read_text())
    assert dump["step"] == 3 and dump["rank"] == 0 and len(dump["rows"]) == 32
    assert {"prompt", "response", "reward"} <= dump["rows"][0].keys() and str(out / "nonfinite_rank_0.json") in lines[0]
    if spoil is bad_reward:
        assert [i for i, row in enumerate(dump["rows"]) if not math.isfinite(row["reward"])] == [3]
    assert all(stepped) and names(out)[-1] == "step_000002"
    for name, before in weights.items():
        after = load_file(out / name)
        assert all(torch.equal(before[key], after[key]) for key in before)

# ---- odd responses --------------------------------------------------------------------------------------------------

def rigged(monkeypatch, respond):
    """Replace sampling: respond(row number, eos id) -> token ids and whether it ended."""
    def rollout(policy, prompt_ids, group, seeds, **_):
        rows = [respond(i, policy.eos_ids[0]) for i in range(len(prompt_ids) * group)]
        return [tokens for tokens, _ in rows], [ended for _, ended in rows]
    monkeypatch.setattr(save, "rollout", rollout)

@pytest.mark.parametrize("respond, said", [
    (lambda i, eos: ([eos], True), "the rewards of each group are equal"),                 # nothing but EOS
    (lambda i, eos: ([7, 8, eos], True), "the rewards of each group are equal"),           # all the same
    (lambda i, eos: ([7 + i % 5] * 12, False), "more than half of the responses are truncated"),
    (lambda i, eos: ([7 + i % 9] * (1 + i % 12) + [eos], True), ""),
    (lambda i, eos: (([eos], True) if i % 2 else ([6], False)), "")], ids=["eos", "same", "cut", "mixed", "half"])
@pytest.mark.parametrize("algo", ["grpo", "rloo", "gspo"])
def test_odd_responses_neither_crash_nor_make_bad_numbers(world, tmp_path, monkeypatch, capsys, respond, said, algo):
    rigged(monkeypatch, respond)
    out = tmp_path / "out"
    save.main(words(world, out, steps=2, save_every=0, algo=algo, resume=False))
    for record in metrics(out).values():
        assert all(math.isfinite(x) for x in record.values() if isinstance(x, (int, float))), record
    assert said in capsys.readouterr().out
    assert all(x.isfinite().all() for file in MODELS for x in load_file(out / file).values())
    if said.startswith("the rewards"):
        assert metrics(out)["save", 1]["reward_spread"] == 0 and metrics(out)["save", 2].get("reward_shift", 0) == 0

def test_any_text_goes_through(world, tmp_path):
    """Lone surrogates, four-byte characters, zero bytes and a prompt as long as is allowed."""
    prompts = ["copy a\ud800b", "copy 😀 𝔸", "copy \x00 \u202e x", "copy " + "a " * 20, "reverse é", "\ufeffcopy",
               "copy a", "sort \U0010ffff"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    out = tmp_path / "out"
    save.main(words(world, out, steps=2, save_every=0, resume=False, prompts=tmp_path / "prompts.jsonl"))
    assert all(x.isfinite().all() for x in load_file(out / RM).values()) and samples(out).keys() == {1, 2}

# ---- random groups --------------------------------------------------------------------------------------------------

def random_group(rng):
    """Rewards (P,G), values (P,), usable (P,G) with ties, extremes, empty and one-sided groups."""
    prompts, group = rng.randint(1, 5), rng.randint(2, 6)
    number = rng.choice([lambda: rng.gauss(0, 1), lambda: float(rng.randint(-1, 1)),
                         lambda: rng.gauss(0, 1) * 10 ** rng.randint(-6, 4)])
    rewards = torch.tensor([[number() for _ in range(group)] for _ in range(prompts)])
    values = torch.tensor([rng.choice([number(), row.mean().item(), row[0].item()]) for row in rewards])
    share = rng.choice([0.0, 0.3, 0.9, 1.0])
    return rewards, values, torch.tensor([[rng.random() < share for _ in range(group)] for _ in range(prompts)])

@pytest.mark.parametrize("seed", range(200))
def test_random_groups(seed):
    """Finite, zero where nothing may be learnt, and the same whatever the order of prompts and responses."""
    rng = random.Random(seed)
    rewards, values, usable = random_group(rng)
    threshold = save.curriculum_threshold(rng.randint(1, 9), 9, rng.random())
    positive, negative, valid = save.partition(save.rm_advantages(rewards, values), threshold, usable)
    keep = positive | negative
    assert not (positive & negative).any() and not (keep & ~usable).any()
    assert valid.tolist() == [bool(p.any() and n.any()) for p, n in zip(positive, negative)]
    p, g = torch.randperm(len(rewards)), torch.randperm(rewards.shape[1])

    def shuffled(x):
        return x[p][:, g] if x.dim() == 2 else x[p]

    losses = {"save": lambda r, v, a, b, u: save.contrastive_loss(r, v, a, b), "hl_bt": lambda r, v, a, b, u:
              save.highest_lowest_loss(r, u), "value": lambda r, v, a, b, u: save.value_loss(v, r, u)}
    for name, loss in losses.items():
        inputs = [rewards.clone().requires_grad_(), values.clone().requires_grad_(), positive, negative, usable]
        result = loss(*inputs)
        moved = loss(*map(shuffled, (rewards, values, positive, negative, usable)))
        assert math.isfinite(result) and result.item() == pytest.approx(moved.item(), rel=1e-4, abs=1e-5), name
        if not result.requires_grad:
            continue
        gradients = torch.autograd.grad(result, inputs[:2], allow_unused=True)
        assert all(x is None or x.isfinite().all() for x in gradients), name
        if name == "save":  # only kept responses of valid prompts learn
            assert not gradients[0][~(keep & valid[:, None])].any() and gradients[1] is None
            if not valid.any():
                assert result == 0
        if name == "value" and gradients[1] is not None:
            assert not gradients[1][~usable.any(1)].any()
    for advantages in (save.grpo_advantages, save.rloo_advantages):
        a = advantages(rewards, keep)
        assert a.isfinite().all() and not a[~keep].any() and not a[keep.sum(1) < 2].any()
        assert torch.allclose(shuffled(a), advantages(shuffled(rewards), shuffled(keep)), rtol=1e-4, atol=1e-5)
        assert (a.double().sum(1).abs() <= 1e-3 * (1 + a.abs().max())).all()
        equal = torch.tensor([len(set(r[k].tolist())) < 2 for r, k in zip(rewards, keep)])
        assert not a[equal].any()

# ---- soak -----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_two_thousand_steps_stay_as_they_were(world, tmp_path, monkeypatch):
    """Peak memory, CPU time of a step and the number of files do not grow."""
    out, seconds, save_step = tmp_path / "out", [], save.save_step

    def timed(*inputs):  # CPU time: other work on the machine does not count
        start = time.process_time()
        save_step(*inputs)
        seconds.append(time.process_time() - start)
    monkeypatch.setattr(save, "save_step", timed)
    save.main(words(world, out, steps=2000, save_every=100, keep=2, group=4, batch=2, show_every=0))
    rows = {row["step"]: row for row in rows_of(out / "metrics.jsonl") if row.get("stage") == "save"}
    assert rows[2000]["host_gb"] <= 1.05 * rows[200]["host_gb"]

    early, late = statistics.median(seconds[100:300]), statistics.median(seconds[1800:2000])
    print(f"peak {rows[200]['host_gb']:.4f} and {rows[2000]['host_gb']:.4f} GB, {early:.4f}, {late:.4f} CPU s a step")
    assert late <= 1.25 * early
    assert names(out) == ["step_001900", "step_002000"] and len(list(out.rglob("*"))) < 40

if __name__ == "__main__":  # what torchrun starts on each rank
    signal.alarm(280)
    torch.set_num_threads(1)
    save_step = save.save_step

    def dies_once(run, step, prompts):
        if step == 5 and save.RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        save_step(run, step, prompts)

    save.save_step = dies_once
    save.main(json.loads(sys.argv[1]))
