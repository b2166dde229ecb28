"""Rows of the tables beyond SAVE itself: balanced loss, REINFORCE++, label ensembles, static pairs, ablations."""
import copy
import math
import random
import statistics

import pytest
import torch
from test_maths import bits, f64, learn, near, numeric_gradient
from test_runs import argv, refusal, run, samples
from test_training import NEGATIVE, POSITIVE, USABLE, changed, make_run, same, weights

import save

# ---- the balanced loss ----------------------------------------------------------------------------------------------

def test_balanced_loss_by_hand():
    """One valid prompt, V = 1: Y+ = {2, 4}, Y- = {0}; the dropped response and the one-sided prompt do not count."""
    rewards, values = f64([[2.0, 4.0, 0.0, 9.0], [3.0, 5.0, 2.0, 2.5]]), f64([1.0, 1.0])
    positive, negative = bits("1100", "1111"), bits("0010", "0000")
    want = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))) / 2 + math.log(1 + math.exp(-1))
    loss, by_reward, by_value = learn(lambda r, v: save.balanced_loss(r, v, positive, negative), rewards, values)
    near(loss, want)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (-1, -3)]
    near(by_reward, [[-sigmoid[0] / 2, -sigmoid[1] / 2, sigmoid[0], 0], [0, 0, 0, 0]])
    near(by_value, [0, 0])

@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_balanced_loss_and_gradient_are_the_loop(seed, tau):
    rng = random.Random(seed)
    rewards = [[rng.gauss(0, 3) for _ in range(5)] for _ in range(6)]
    values = [rng.gauss(0, 2) for _ in range(6)]
    positive, negative, valid = save.partition(f64(rewards) - f64(values)[:, None], 0.6)
    terms = [statistics.mean(math.log1p(math.exp(-(r - v) / tau)) for r, keep in zip(row, up) if keep)
             + statistics.mean(math.log1p(math.exp((r - v) / tau)) for r, keep in zip(row, down) if keep)
             for row, v, up, down, ok in zip(rewards, values, positive, negative, valid) if ok]

    def f(r):
        return save.balanced_loss(r, f64(values), positive, negative, tau)
    loss, gradient = learn(f, f64(rewards))
    near(loss, statistics.mean(terms) if terms else 0.0)
    near(gradient, numeric_gradient(f, f64(rewards)), 1e-5)

def test_balanced_does_not_pull_the_best_answers_together_as_the_published_loss_does():
    """Two positives far apart: Eq. 18 pushes the better one down, the balanced loss pushes both up."""
    rewards, values, positive, negative = f64([[8.0, 2.0, -3.0]]), f64([0.0]), bits("110"), bits("001")
    published = learn(lambda r: save.contrastive_loss(r, values, positive, negative), rewards)[1]
    balanced = learn(lambda r: save.balanced_loss(r, values, positive, negative), rewards)[1]
    assert published[0, 0] > 0 > published[0, 1] and (balanced[0, :2] < 0).all() and balanced[0, 2] > 0

# ---- REINFORCE++ ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(6))
def test_reinforce_advantages_are_the_definition(seed):
    """Per token r - sum of the later and own KL, then the z-score over all tokens, population variance."""
    rng = random.Random(seed)
    lengths = [rng.randint(0, 5) for _ in range(4)] + [3]
    rewards, kl = [rng.gauss(3, 2) for _ in lengths], [[rng.gauss(0, 1) for _ in range(6)] for _ in lengths]
    returns = [[r - sum(row[t:n]) for t in range(n)] for r, row, n in zip(rewards, kl, lengths)]
    tokens = [x for row in returns for x in row]
    mean, spread = statistics.mean(tokens), statistics.pstdev(tokens)
    want = [[(x - mean) / spread for x in row] + [0.0] * (6 - len(row)) for row in returns]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    near(save.reinforce_advantages(f64(rewards), f64(kl), mask), want)
    garbage = torch.where(mask, f64(kl), math.nan)
    near(save.reinforce_advantages(f64(rewards), garbage, mask), want)
    # two ranks with half of the rows each, whose sums are added, whiten like one
    sums = [[mask[h].sum().item(), *(sum(x ** n for row in returns[h] for x in row) for n in (1, 2))]
            for h in (slice(0, 2), slice(2, None))]
    for half, other in ((slice(0, 2), sums[1]), (slice(2, None), sums[0])):
        got = save.reinforce_advantages(f64(rewards)[half], f64(kl)[half], mask[half],
                                        total=lambda *own: [a + b for a, b in zip(own, other)])
        near(got, want[half])

def test_reinforce_advantages_without_spread_or_rows_are_zero():
    mask = torch.ones(2, 3, dtype=torch.bool)
    near(save.reinforce_advantages(f64([2.0, 2.0]), f64(torch.zeros(2, 3)), mask), torch.zeros(2, 3))
    near(save.reinforce_advantages(f64([2.0, 1.0]), f64(torch.zeros(2, 3)), ~mask), torch.zeros(2, 3))

# ---- who decides what is kept ---------------------------------------------------------------------------------------

def test_labels_are_the_mean_advantage_of_the_frozen_ensemble(tmp_path):
    run, _, batch = make_run(tmp_path)
    for seed in (1, 2):
        rm = copy.deepcopy(run.rm)
        generator = torch.Generator().manual_seed(seed)
        for p in rm.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
        run.labels.append(rm)
    save.label_batch(run, batch)
    members = []
    for rm in run.labels:
        rewards, features = save.score(rm, batch.chats, 10 ** 6)
        values = rm.value(features[::4])
        members.append(rewards.view(4, 4) - values[:, None])
    assert (members[0] - members[1]).abs().max() > 0.01
    same(batch.label_advantages, (members[0] + members[1]) / 2, 1e-5)
    mu = save.curriculum_threshold(batch.step, run.cfg.steps, run.cfg.m0)
    for got, want in zip(save.filtered(run, batch, USABLE), save.partition(batch.label_advantages, mu, USABLE)):
        assert torch.equal(got, want)
    batch.label_advantages = None
    own = save.partition(batch.rewards - run.rm.value(batch.features)[:, None], mu, USABLE)
    assert all(torch.equal(got, want) for got, want in zip(save.filtered(run, batch, USABLE), own))

def test_without_curriculum_the_sign_alone_decides(tmp_path):
    run, _, batch = make_run(tmp_path, no_curriculum=True)
    positive, negative, _ = save.filtered(run, batch)
    assert (positive | negative).all()
    assert torch.equal(positive, batch.rewards >= run.rm.value(batch.features)[:, None])

# ---- the steps ------------------------------------------------------------------------------------------------------

def test_balanced_trains_reward_model_and_value_head_like_save_with_another_loss(tmp_path):
    run, _, batch = make_run(tmp_path, rm_update="balanced")
    before = copy.deepcopy(run.rm)
    assert save.reward_model_step(run, batch, POSITIVE, NEGATIVE)
    rewards, _ = before(*save.model_inputs(batch.chats, "cpu"))
    values = before.value(batch.features)
    loss = save.balanced_loss(rewards.view(4, 4), values, POSITIVE, NEGATIVE)
    want = torch.autograd.grad(loss, [p for p in before.model.parameters()], allow_unused=True)
    got = run.optimizers["rm"].seen[0][1]
    for (name, _), gradient in zip(before.model.named_parameters(), want):
        same(got[name], gradient, 2e-5)

def test_offline_trains_on_the_pairs_of_the_step_and_not_on_the_responses(tmp_path):
    run, _, batch = make_run(tmp_path, rm_update="offline")
    rows = batch.chats
    run.pairs = list(zip(rows[:8], rows[8:]))
    before, drawn = copy.deepcopy(run.rm), save.draw(run.pairs, run.cfg.seed, "pairs", (batch.step - 1) * run.cfg.batch,
                                                     run.cfg.batch)
    assert save.reward_model_step(run, batch, POSITIVE, NEGATIVE)
    rewards = before(*save.model_inputs([side for pair in drawn for side in pair], "cpu"))[0]
    loss = (1 + (rewards[1::2] - rewards[0::2]).exp()).log().mean()
    want = torch.autograd.grad(loss, list(before.model.parameters()), allow_unused=True)
    got = run.optimizers["rm"].seen[0][1]
    for (name, _), gradient in zip(before.model.named_parameters(), want):
        same(got[name], gradient, 2e-5)

def test_a_frozen_policy_is_sampled_from_and_does_not_move(tmp_path, monkeypatch):
    run, prompts, _ = make_run(tmp_path, freeze_policy=True, group=8, lr_rm=0.02)
    before, seen = weights(run.policy), []
    monkeypatch.setattr(save, "policy_step", lambda *_: seen.append(True))
    save.save_step(run, 2, prompts)
    assert not changed(run.policy, before) and not seen and len(run.optimizers["rm"].seen) == 1

def test_label_rms_through_the_command_line(world, tmp_path, capsys):
    save.main(argv(world, tmp_path / "value", stage="value"))
    rm = tmp_path / "value/rm"
    capsys.readouterr()
    save.main(argv(world, tmp_path / "out", rm=rm, label_rms=[rm], rm_update="balanced"))
    plain = run(world, tmp_path / "plain", rm=rm, rm_update="balanced")
    # the ensemble is twice the RM as it starts: the first partition is its own
    ours, theirs = samples(tmp_path / "out")[1], samples(plain)[1]
    assert [[row["side"] for row in rows] for rows in ours] == [[row["side"] for row in rows] for rows in theirs]
    line = refusal(capsys, argv(world, tmp_path / "no", rm=rm, label_rms=[world / "rm"]))
    assert f"--label_rms {world / 'rm'}: it holds no value_head.safetensors" in line and not (tmp_path / "no").exists()
    line = refusal(capsys, argv(world, tmp_path / "no", label_rms=[rm]))
    assert "it holds no value_head.safetensors; run --stage value first" in line and not (tmp_path / "no").exists()
