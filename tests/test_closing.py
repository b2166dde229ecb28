"""What a run says of itself: closing words, labels and rows that cannot work, its trace, what stage value keeps, and
that the bf16 working copy shows what was learned."""
import copy
import hashlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from test_models import same
from test_runs import HEAD, POLICY, RM, argv, free_port, metrics, multiprocessing, refusal, rows_of, run

import save

README = Path(save.__file__).with_name("README.md").read_text(encoding="utf-8")
FINE = {"learned": 1, "kept": 0.9, "valid": 0.6, "value_r2": 0.2, "value_bias": -1.0, "reward_spread": 3.0,
        "common_push": 0.02, "spread_after": 3.0}

def closing(out, rows, stage="save"):
    """closing_words on records that are given -> what was printed, its record."""
    lines = [{"config": {}}, *({"step": i, "stage": stage, **row} for i, row in enumerate(rows))]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = SimpleNamespace(append=lambda name, record: lines.append(record))
    with mock.patch.object(save, "say", lambda *words, sep=" ": lines.append(sep.join(map(str, words)))):
        save.closing_words(SimpleNamespace(cfg=save.Config(out=str(out)), log=log), stage)
    return lines[-2:]

def test_closing_words_are_medians_of_the_first_and_the_last_quarter(tmp_path):
    rows = [{}, *({**FINE, "kept": i / 10, "spread_after": 3.0 + 0.3 * (i == 4)} for i in range(1, 9))]
    del rows[8]["learned"], rows[8]["spread_after"]
    said, record = closing(tmp_path, rows)
    assert said.startswith("the RM learned in 7 of 8 steps; first and last quarter: learned 1, 1; kept 0.2, 0.7; valid")
    assert record["closing"]["kept"] == [0.2, 0.7]  # of 0.1 0.2 0.3 and of 0.6 0.7 0.8
    assert record["closing"]["spread_times"] == [1, pytest.approx(1.1)]  # 3.3 over 3, once
    assert record["try"] == [] and len(said.splitlines()) == 1
    assert closing(tmp_path, [{}, {"rm_loss": 1.0}], "preference")[-1].keys() == {"step", "stage", "rm_loss"}  # nothing

@pytest.mark.parametrize("name, low, high, words", [row for row in save.TRY if row[3]])
def test_what_is_out_of_its_range_gets_words_that_the_readme_has_too(tmp_path, name, low, high, words):
    for x in (low - 0.01, high + 0.01):
        column = {"spread_after": 3.0 * max(x, 0) ** 0.25} if name == "spread_times" else {name: x}
        _, record = closing(tmp_path, [{}] + [{**FINE, **column}] * 4)
        assert record["try"] == ([f"try: {words} ({name})"] if name != "spread_times" or x > 1 else [])
    assert re.search(rf"^\| `{name}` \|.*{re.escape(words)}", README, re.M)

# ---- four runs that teach nothing -----------------------------------------------------------------------------------
def hinge(rewards, values, positive, negative, usable):
    """Of margin 1 between the means of both sides, where the filter leaves at least 2 logit(mu)."""
    gap = save.masked_mean(rewards, positive, 1) - save.masked_mean(rewards, negative, 1)
    return save.masked_mean((1 - gap).clamp(min=0), positive.any(1) & negative.any(1))

def zero_or_one(run, batch):
    """A verifier's verdicts as numbers, without a sign."""
    return (batch.rewards > 0).float()

@pytest.mark.parametrize("name, what", [("learned", {"rm_update": "hinge"}), ("valid", {}), ("kept", {"m0": 1})])
def test_a_run_whose_rm_learns_nothing_says_so(world, tmp_path, capsys, name, what):
    labels = {"valid": zero_or_one, "kept": lambda run, batch: batch.rewards * 1e-3}.get(name, save.label)
    with mock.patch.dict(save.RM_UPDATES, hinge=save.RMUpdate(hinge, "value head")), \
            mock.patch.object(save, "label", labels):
        out = run(world, tmp_path / "out", **{"steps": 6, "m0": 0.9, "save_every": 0, "lr_policy": 0, **what})
    said, end = capsys.readouterr().out, rows_of(out / "metrics.jsonl")[-1]
    steps = int(name == "kept")  # the last one, in which all is kept
    assert said.count("five steps in a row trained no RM") == 1 and f"the RM learned in {steps} of 6 steps" in said
    assert end["closing"]["learned"][0] == 0 and any(f"({name})" in words for words in end["try"])
    assert len(said[said.index("the RM learned"):said.index("models:")].splitlines()) <= 6

def test_plain_rl_gets_no_advice_on_how_its_rm_learns(world, tmp_path, capsys):
    out = run(world, tmp_path / "out", rm_update="none", steps=1)
    assert "the RM learned" not in capsys.readouterr().out
    assert rows_of(out / "metrics.jsonl")[-1]["try"] == []

# ---- rows, labels, traces -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("table, row, bad", [
    ("RM_UPDATES", "save", {"anchor": "value_head"}), ("ALGORITHMS", "grpo", {"ratio": "tokens"}),
    ("ALGORITHMS", "grpo", {"kl": "k3"})])
def test_a_word_of_a_row_that_is_not_known_is_refused(world, tmp_path, capsys, table, row, bad):
    with mock.patch.dict(getattr(save, table), {row: getattr(save, table)[row]._replace(**bad)}):
        line = refusal(capsys, argv(world, tmp_path / "out"))
    assert repr(*bad.values()) in line and "expected one of" in line and not (tmp_path / "out").exists()

@pytest.mark.parametrize("labels", [lambda run, batch: batch.rewards > 0, lambda run, batch: batch.rewards[:, 0],
                                    lambda run, batch: batch.rewards.long()])
def test_labels_that_are_not_floats_of_all_responses_are_refused(world, tmp_path, capsys, labels):
    with mock.patch.object(save, "label", labels):
        assert "label: expected floats of (P,G)" in refusal(capsys, argv(world, tmp_path / "out"))

def test_the_log_begins_with_what_was_started(world, tmp_path):
    with mock.patch.dict(save.ALGORITHMS, mine=save.ALGORITHMS["rloo"]):
        out = run(world, tmp_path / "out", steps=1, rm_update="none", algo="mine")
    first = rows_of(out / "metrics.jsonl")[0]
    script = Path(sys.modules["__main__"].__file__).read_bytes()
    assert first["argv"] == sys.argv and first["sha256"] == hashlib.sha256(script).hexdigest()
    assert set(first["rows"]) - {"mine"} == {*save.RM_UPDATES, *save.ALGORITHMS} and "mine" in first["rows"]

# ---- stage value ----------------------------------------------------------------------------------------------------
def test_a_killed_value_stage_goes_on_to_the_same_head(world, tmp_path, monkeypatch):
    asked, plain = [], save.sample

    def sample(run, prompts, group, start, purpose="rollout"):
        asked.append(start)
        if len(asked) == 3:
            raise RuntimeError("power cut")
        return plain(run, prompts, group, start, purpose)
    monkeypatch.setattr(save, "sample", sample)
    flags = {"stage": "value", "value_epochs": 3}
    with pytest.raises(RuntimeError):
        run(world, tmp_path / "cut", **flags)
    assert asked == [0, 4, 8]
    run(world, tmp_path / "cut", **flags, resume=True)
    assert asked[3:] == [8, 12]  # what was there is not sampled again
    straight = run(world, tmp_path / "straight", **flags)
    assert metrics(tmp_path / "cut") == metrics(straight)
    for name, x in load_file(straight / HEAD).items():
        assert torch.equal(x, load_file(tmp_path / "cut" / HEAD)[name]) and x.any()
    del asked[1:]
    with pytest.raises(RuntimeError):  # other flags: nothing is taken over
        run(world, tmp_path / "cut", **flags, resume=True, seed=1)
    assert asked == [0, 0, 4]

def test_stage_value_begins_at_zero_and_keeps_prompts_out_of_the_fit_however_few(world, tmp_path, monkeypatch):
    few, seen = tmp_path / "few.jsonl", []
    few.write_text("".join((world / "prompts.jsonl").read_text().splitlines(True)[:12]))
    monkeypatch.setattr(save, "sample", lambda run, prompts, *rest, plain=save.sample, **named: (
        seen.extend(messages[0]["content"] for messages, _ in prompts), plain(run, prompts, *rest, **named))[1])
    flags = {"stage": "value", "prompts": few, "value_prompts": 32}
    first = run(world, tmp_path / "first", **flags)
    again = run(world, tmp_path / "again", rm=first / "rm", **flags)  # it has a head
    assert torch.equal(load_file(first / HEAD)["weight"], load_file(again / HEAD)["weight"])
    assert len(seen) == 64 and len(set(seen)) == 12 and seen[31] not in seen[:31]  # a tenth of 12 is 1

# ---- bf16 -----------------------------------------------------------------------------------------------------------
def test_the_bf16_copy_moves_as_its_masters_do_at_lr_1e_7():
    numbers = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(2000, 1000, bias=False)
    model.weight.data = (0.02 * torch.randn(1000, 2000, generator=numbers)).bfloat16()
    start = model.weight.detach().float()
    optimizer = save.ShardedAdamW(model, 1e-7, save.Config(device="cpu", dtype="bfloat16"))
    optimizer.publish(optimizer.masters)
    same(model.weight.detach().float(), start)
    for _ in range(10):
        model.weight.grad = torch.randn(1000, 2000, generator=numbers).bfloat16()
        optimizer.step()
        change = optimizer.masters["weight"].detach() - start
        shown, nearest = ((change * (copy.float() - start)).sum() / (change ** 2).sum() for copy in (
            model.weight.detach(), optimizer.masters["weight"].detach().bfloat16()))
    assert shown == pytest.approx(1, abs=0.05) and 0 <= nearest < 0.04

def test_a_dither_is_unbiased_for_every_sign_and_size_and_keeps_zeros():
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.2345, -1.2345, 3e-39, -3e-39, 65504.3, 1e-20])
    empty = torch.empty_like(x, dtype=torch.bfloat16)
    draws = torch.stack([save.dithered(empty.clone(), x, str(i)).double() for i in range(4000)])
    step = (x.abs() * 2 ** -7).clamp(min=2 ** -133).double()  # of bf16, at most
    assert ((draws.mean(0) - x.double()).abs() <= 0.05 * step).all()
    assert (draws[:, :4] == x[:4]).all() and ((draws - x).abs() <= step).all()

def test_a_bf16_run_resumes_to_the_same_bits_also_with_offload(world, tmp_path):
    flags = {"dtype": "bfloat16", "lr_rm": 1e-4, "save_every": 2, "value_prompts": 8}
    straight = run(world, tmp_path / "straight", steps=4, **flags)
    with mock.patch.object(save, "save_step", lambda run, rows, plain=save.save_step: (
            plain(run, rows) if run.step < 4 else exec("raise RuntimeError"))), pytest.raises(RuntimeError):
        run(world, tmp_path / "cut", steps=4, **flags)
    run(world, tmp_path / "cut", steps=4, resume=True, offload=True, **flags)
    for file in (RM, HEAD, POLICY):
        one, two = (load_file(tmp_path / name / file) for name in ("straight", "cut"))
        assert all(torch.equal(x, two[name]) for name, x in one.items()), file
    assert metrics(straight) == metrics(tmp_path / "cut")

def as_rank(rank, world, port, out):
    """One rank of an optimizer on bf16 weights; writes its copies after a step."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    save.RANK, save.WORLD = rank, world
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20)).bfloat16()
    optimizer = save.ShardedAdamW(model, 1e-4, save.Config(device="cpu", dtype="bfloat16"))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(copy.deepcopy(model.state_dict()), f"{out}/{world}{rank}.pt")

def test_all_ranks_have_the_copy_of_one_process(tmp_path):
    for world in (1, 2):
        port, fork = free_port(), multiprocessing.get_context("fork")
        ranks = [fork.Process(target=as_rank, args=(rank, world, port, tmp_path)) for rank in range(world)]
        [rank.start() for rank in ranks]
        [rank.join(60) for rank in ranks]
    one, *others = (torch.load(file) for file in sorted(tmp_path.glob("*.pt")))
    assert len(others) == 2 and all(torch.equal(x, other[name]) for other in others for name, x in one.items())

def test_the_loss_of_heldout_pairs_is_eq_11(world, tmp_path):
    out = run(world, tmp_path / "out", steps=1, rm_update="none", heldout=world / "heldout_id.jsonl")
    record = metrics(out)["save", 0]
    rm = save.RewardModel.from_pretrained(str(world / "rm"))
    losses = []
    for row in rows_of(world / "heldout_id.jsonl"):
        (chosen, rejected), _ = save.score(rm, save.pair_of(row, rm)[0], 4096)
        losses.append(math.log(1 + math.exp(rejected.item() - chosen.item())))
    assert record["loss_heldout_id"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
