"""What full size needs: one rank of many in one process, the longest batch first, little host memory."""
import dataclasses
import os
import random
import shutil

import pytest
import torch
from test_models import same, weights
from test_runs import MODELS, anchored, argv, distance, metrics, refusal, rows_of, run  # noqa: F401

import save

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")

# ---------------------------------------------------------------- --emulate_world
def test_an_emulated_rank_holds_the_states_that_rank_0_of_as_many_holds(world, monkeypatch):
    cfg = save.Config(device="cpu", dtype="float32", stage="save")
    emulated = save.ShardedAdamW(save.Policy.from_pretrained(str(world / "policy")), 1e-3,
                                 dataclasses.replace(cfg, emulate_world=4), keep_initial=True)
    monkeypatch.setattr(save, "WORLD", 4)
    real = save.ShardedAdamW(save.Policy.from_pretrained(str(world / "policy")), 1e-3, cfg, keep_initial=True)
    assert emulated.masters.keys() == real.masters.keys() == emulated.initial.keys()
    everything = sum(p.numel() for _, p in emulated.named)
    assert 0.2 < sum(p.numel() for p in emulated.masters.values()) / everything < 0.4  # whole parameters are dealt

def test_an_emulated_rank_does_its_share_of_the_rollouts_and_writes_no_model(anchored, tmp_path, capsys):  # noqa: F811
    out = run(anchored, tmp_path / "out", batch=8, emulate_world=4, save_every=1, steps=2)
    assert len(rows_of(out / "samples.jsonl")) == 2 * 2 * 8  # steps x a quarter of the prompts x group
    assert "no model is written" in capsys.readouterr().out
    assert not any((out / name).exists() for name in ("rm", "policy", "checkpoints"))
    assert metrics(out)["save", 2]["usable"] > 0

def test_emulation_is_for_one_process(monkeypatch):
    monkeypatch.setattr(save, "WORLD", 2)
    with pytest.raises(save.UsageError, match="--emulate_world 4: expected one process, not 2 ranks"):
        save.Config(device="cpu", stage="save", emulate_world=4).checked()

# ---------------------------------------------------------------- the longest batch first
@pytest.fixture
def rehearsed(monkeypatch):
    """As on a GPU: every run begins with the rehearsal. Yields the runs."""
    runs, stage = [], save.save_stage

    def with_rehearsal(run, *inputs):
        runs.append(run)
        before = {name: weights(model) for name, model in (("rm", run.rm), ("policy", run.policy))}
        save.rehearse(run)
        for name, model in (("rm", run.rm), ("policy", run.policy)):
            same(weights(model), before[name])
            assert not model.training and all(p.grad is None for p in model.parameters())
        stage(run, *inputs)
    monkeypatch.setattr(save, "save_stage", with_rehearsal)
    return runs

def test_the_rehearsal_leaves_no_trace(anchored, tmp_path, rehearsed):  # noqa: F811
    out = run(anchored, tmp_path / "rehearsed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "rehearse", lambda run: None)
        plain = run(anchored, tmp_path / "plain")
    assert len(rehearsed) == 2
    assert metrics(out) == metrics(plain)
    assert all((out / file).read_bytes() == (plain / file).read_bytes() for file in MODELS)

@pytest.mark.parametrize("cache_tokens, wave", [(0, 32), (16 * 44, 16), (20 * 44, 16), (3, 8)])
def test_the_rehearsal_is_as_large_as_a_batch_can_be(anchored, tmp_path, rehearsed, monkeypatch,  # noqa: F811
                                                     cache_tokens, wave):
    """The last decoding step of --max_new_tokens tokens in `decode` and its stand-in see caches of one shape."""
    seen, shapes, caches = [], {}, save.DynamicCache

    class Cache(caches):
        def __init__(self, **options):
            super().__init__(**options)
            seen.append(self)
    monkeypatch.setattr(save, "DynamicCache", Cache)
    monkeypatch.setattr(save.Policy, "forward", lambda self, ids, *rest, old=save.Policy.forward: (
        shapes.setdefault("policy", ids.shape), old(self, ids, *rest))[1])
    monkeypatch.setattr(save.RewardModel, "forward", lambda self, ids, *rest, old=save.RewardModel.forward: (
        shapes.setdefault("rm", ids.shape), old(self, ids, *rest))[1])
    run(anchored, tmp_path / "out", steps=1, cache_tokens=cache_tokens)
    cfg = rehearsed[0].cfg
    width = cfg.max_prompt_tokens + cfg.max_new_tokens
    assert seen[0].layers[0].keys.shape[0] == wave and seen[0].get_seq_length() == width - 1
    assert shapes["rm"] == shapes["policy"] == (cfg.micro_tokens // width, width)
    policy = rehearsed[0].policy
    policy.eos_ids = [10 ** 6]  # no response ends
    seen.clear()
    save.decode(policy, [[1] * cfg.max_prompt_tokens] * 2, 4, range(8), cfg.max_new_tokens, 1.0, 1.0, 0)
    assert seen[0].get_seq_length() == width - 1

@pytest.mark.parametrize("target, said", [
    ("longest_cache", "the rollout"), ("RewardModel.forward", "the update of --rm"),
    ("Policy.forward", "the update of --policy")])
def test_too_little_memory_is_one_line_with_the_flags_to_lower(anchored, tmp_path, rehearsed, monkeypatch,  # noqa: F811
                                                               capsys, target, said):
    def full(*inputs):
        raise OUT_OF_MEMORY
    owner, _, name = f"save.{target}".rpartition(".")
    monkeypatch.setattr(save if owner == "save" else getattr(save, owner.removeprefix("save.")), name, full)
    line = refusal(capsys, argv(anchored, tmp_path / "out"))
    assert said in line and "20.00 GiB" in line and "the longest batch has 32 rows of 44 tokens" in line
    assert all(flag in line for flag in ("--micro_tokens", "--cache_tokens", "--max_new_tokens", "--offload"))

def test_running_out_of_memory_later_is_one_line_too(anchored, tmp_path, monkeypatch, capsys):  # noqa: F811
    def full(*inputs):
        raise OUT_OF_MEMORY
    monkeypatch.setattr(save, "policy_step", full)
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as stop:
        save.main(argv(anchored, tmp_path / "out"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("save.py: error: ")]
    assert stop.value.code == 1 and len(lines) == 1 and "rank 0 ran out of GPU memory" in lines[0], lines
    assert "--micro_tokens" in lines[0]

# ---------------------------------------------------------------- host memory
def test_checkpoints_go_through_host_memory_in_parts():
    state = {f"x{i}": torch.randn(n) for i, n in enumerate((10, 300, 5, 5, 200, 60))}  # 4 bytes each
    parts = list(save.in_host_memory(state, limit=1024))
    assert [list(part) for part in parts] == [["x0", "x1"], ["x2", "x3", "x4", "x5"]]
    joined = {name: x for part in parts for name, x in part.items()}
    assert list(joined) == list(state) and all(torch.equal(joined[name], x) for name, x in state.items())
    assert all(sum(x.nbytes for x in part.values()) < 1024 + max(x.nbytes for x in state.values()) for part in parts)
    assert not list(save.in_host_memory({}))

def test_a_checkpoint_in_parts_resumes_as_one(anchored, tmp_path, monkeypatch):  # noqa: F811
    whole = run(anchored, tmp_path / "whole", save_every=1, steps=2)
    monkeypatch.setattr(save.in_host_memory, "__defaults__", (4096,))
    parts = run(anchored, tmp_path / "parts", save_every=1, steps=2)
    assert len(list((parts / "checkpoints/step_000001").glob("rank_*"))) > 3
    for path in (parts / "rm", parts / "policy", parts / "checkpoints/step_000002"):
        shutil.rmtree(path)
    run(anchored, parts, save_every=1, steps=2, resume=True)
    assert all(distance(whole, parts, file) == 0 for file in MODELS)

# ---------------------------------------------------------------- padding
@pytest.mark.parametrize("seed", range(5))
def test_padding_is_a_tenth_at_most(seed):
    """8 prompts x 16 responses of log-normal lengths, a rank's rows at full size; batches of 8 in order pad by half."""
    rng, rows = random.Random(seed), []
    for _ in range(8):
        prompt = min(1024, int(rng.lognormvariate(4.8, 0.7)))
        rows += [(range(prompt + min(1024, int(rng.lognormvariate(6.2, 0.6)))), prompt) for _ in range(16)]

    def padded(batches):
        return sum(len(batch) * max(len(rows[row][0]) for row in batch) for batch in batches)
    real = sum(len(ids) for ids, _ in rows)
    assert padded(save.micro_batches(range(128), rows, 8192)) / real < 1.1
    assert padded([range(i, i + 8) for i in range(0, 128, 8)]) / real > 1.4
