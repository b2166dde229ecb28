"""tests/forks/r2m.py: its head against a loop over tokens, its two losses against numbers worked by hand, what its
step trains and when, and whole runs. Tiny random models; states of the policy and of the RM differ in width."""
import copy
import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_models import chats, gradients, policy, ragged, reward_model, same, weights
from test_runs import argv, metrics, refusal, rows_of
from test_training import Recording, changed, make_run

import save
import toy

sys.path.insert(0, str(Path(__file__).resolve().parent / "forks"))
import r2m  # noqa: E402

CFG = r2m.Config(device="cpu", r2m_width=12, steps=4)
TRAINED = {"model.score.weight", *(f"matrices.W_{name}" for name in "qkvo")}

@pytest.fixture(autouse=True)
def inputs(monkeypatch):
    """What `main` replaces and these tests need outside of it."""
    monkeypatch.setattr(save, "model_inputs", r2m.model_inputs)

def model(w, plain=None):
    """R2M on tiny models, with matrices large enough to matter."""
    rm = r2m.R2M(plain or reward_model(), policy(hidden_size=24), CFG)
    rm.w = w
    for name, p in rm.matrices.items():
        p.data *= 3
    return rm

def rows(rm):
    """Six rows (ids, (prompt_length, policy ids)) of many lengths in both models' tokens."""
    return [(ids, (length, tuple(said))) for (ids, length), (said, _) in zip(chats(rm), ragged())]

def slow_reward(rm, states_of, ids, said):
    """R of one row, token by token, with numbers instead of matrices."""
    last = rm.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1].tolist()
    states = states_of(torch.tensor([said]))[0, :-1].tolist()
    w_q, w_k, w_v, w_o = (rm.matrices[f"W_{name}"].T.tolist() for name in "qkvo")

    def times(vector, columns):
        return [math.fsum(a * b for a, b in zip(vector, column)) for column in columns]

    query, mixed, total = times(last, w_q), [0.0] * len(w_v), 0.0
    for state in states:
        share = math.exp(sum(a * b for a, b in zip(query, times(state, w_k))) / math.sqrt(len(query)))
        mixed, total = [m + share * v for m, v in zip(mixed, times(state, w_v))], total + share
    hat = times([m / total for m in mixed], w_o)
    final = [(1 - rm.w) * a + rm.w * b for a, b in zip(hat, last)]
    return times(final, rm.model.score.weight.tolist())[0]

@pytest.mark.parametrize("budget", (1, 40, 10**6))
@torch.no_grad()
def test_rewards_are_the_loop_over_tokens_in_any_batches_and_padding(budget):
    rm = model(w=0.6)
    some = rows(rm)
    want = torch.tensor([slow_reward(rm, rm.policy_states, ids, said) for ids, (_, said) in some])
    assert len({len(said) for _, (_, said) in some}) > 3 and min(len(said) for _, (_, said) in some) >= 2
    same(save.score(rm, some, budget)[0], want, 1e-4)
    same(save.score(rm, some[::-1] + some[:1], budget)[0], torch.cat([want.flip(0), want[:1]]), 1e-4)
    hat = want - 0.6 * save.score(model(1.0), some, budget)[0]
    assert hat.abs().min() > 1e-3 and hat.std() > 0.01  # the policy's states matter

def test_equal_texts_of_different_tokens_are_scored_apart_and_equal_rows_once():
    rm = model(w=0.6)
    (ids, (length, said)), *_ = rows(rm)
    rewards, _ = save.score(rm, [(ids, (length, said)), (ids, (length, said + (3,))), (ids, (length, said))], 1)
    assert rewards[0] == rewards[2] != rewards[1]
    unlike = said[:-1] + ((said[-1] + 1) % 16,)  # h of the last token, as a rule EOS, is not looked at
    assert save.score(rm, [(ids, (length, unlike))], 1)[0] == rewards[0]

def test_with_w_1_it_is_the_plain_reward_model():
    plain = reward_model()
    rm = model(1.0, copy.deepcopy(plain))
    for budget in (1, 10**6):
        same(save.score(rm, rows(rm), budget)[0], save.score(plain, chats(plain), budget)[0])

def test_the_share_of_the_reward_models_own_state():
    assert [r2m.own_share(t, 8, 0.2) for t in (0, 4, 8)] == pytest.approx([1, 0.5, 0.2])
    assert [r2m.own_share(t, 8, 0) for t in (2, 8)] == pytest.approx([0.5 + math.sqrt(0.125), 0])
    assert [r2m.own_share(t, 8, 0.7) for t in (4, 5, 8)] == [0.7] * 3 and r2m.own_share(2, 8, 0.7) > 0.7

# ---------------------------------------------------------------- the losses
def test_entropy_by_hand_and_as_a_loop():
    p = 1 / (1 + math.exp(-2))  # (0, 2) has mean 1 and population std 1, and so have twice these
    hand = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert r2m.entropy_loss(torch.tensor([[0.0, 2.0]])).item() == pytest.approx(hand)
    assert r2m.entropy_loss(torch.tensor([[0.0, 2, 0, 2]])).item() == pytest.approx(hand + math.log(2))
    groups = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 4
    want = []
    for group in groups.tolist():
        powers = [math.exp((r - statistics.mean(group)) / statistics.pstdev(group)) for r in group]
        want.append(-sum(x / sum(powers) * math.log(x / sum(powers)) for x in powers))
    assert r2m.entropy_loss(groups).item() == pytest.approx(statistics.mean(want))
    tied = torch.cat([groups, torch.full((3, 7), 0.1)])  # groups of equal rewards count for nothing
    assert r2m.entropy_loss(tied).item() == pytest.approx(statistics.mean(want))

def test_the_pair_is_that_of_the_rewards_given_and_ties_give_nothing():
    before = torch.tensor([[1.0, 3, 2], [5, 5, 5], [0, 0, 4]])
    highest, lowest = r2m.highest_and_lowest(before)
    assert highest.int().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert lowest.int().tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]
    now = torch.tensor([[9.0, 8, 7], [1, 2, 3], [1, 5, 1]], requires_grad=True)
    loss = r2m.pair_loss(now, highest, lowest)
    assert loss.item() == pytest.approx((math.log(1 + math.e) + math.log(2)) / 2)  # margins -1 and 0, two pairs
    grad, = torch.autograd.grad(loss, now)
    slope = 1 / (1 + math.exp(-1)) / 2
    same(grad, torch.tensor([[slope, -slope, 0], [0, 0, 0], [0.25, 0, -0.25]]), 1e-6)
    tied = torch.full((2, 3), 0.1, requires_grad=True)
    loss = r2m.pair_loss(tied, *r2m.highest_and_lowest(tied)) + r2m.entropy_loss(tied)
    assert loss == 0 and not torch.autograd.grad(loss, tied)[0].any()

# ---------------------------------------------------------------- a step
@pytest.fixture
def run_and_batch(tmp_path):
    """A run as r2m.prepare leaves it to save.py, and the responses of step 1."""
    run, prompts, _ = make_run(tmp_path, rm_update="none", lr_policy=0.1, micro_tokens=60)
    run.cfg = r2m.Config(**vars(run.cfg), r2m_width=12)
    run.rm = r2m.R2M(run.rm, run.policy, run.cfg)
    for p in run.rm.matrices.values():
        p.data *= 4
    run.optimizers["rm"] = Recording(run.rm, run.cfg.lr_rm, run.cfg)
    run.optimizers["rm"].seen, run.log.record = [], {}
    return run, r2m.sample(run, prompts, run.cfg.group, 1)

def test_the_step_has_the_gradient_of_the_plain_graph_and_trains_nothing_else(run_and_batch):
    run, batch = run_and_batch
    run.rm.w = 0.6
    save.score_batch(run, batch)
    pair = r2m.highest_and_lowest(batch.rewards.flip(1))
    rewards = run.rm(*save.model_inputs(batch.chats, "cpu"))[0].view(4, 4)
    want = gradients(run.rm, 0.7 * r2m.pair_loss(rewards, *pair) + 0.3 * r2m.entropy_loss(rewards))
    before, policy_before = weights(run.rm), weights(run.policy)
    assert r2m.reward_model_step(run, batch, *pair) is True
    seen = run.optimizers["rm"].seen[0][1]
    assert seen.keys() == TRAINED and all(g.abs().max() > 1e-6 for g in seen.values())
    same(seen, {name: want[name] for name in TRAINED}, 1e-5)
    assert changed(run.rm, before) == TRAINED
    assert not changed(run.policy, policy_before) and all(p.grad is None for p in run.policy.parameters())

def test_the_policy_learns_first_and_the_pair_is_of_the_rewards_it_saw(run_and_batch, monkeypatch):
    run, batch = run_and_batch
    rm, seen, step = copy.copy(run.rm), {}, r2m.reward_model_step
    rm.w = r2m.own_share(1, 4, 0.7)
    annotated = save.score(rm, batch.chats, 10**6)[0].view(4, 4)

    def policy_step(run, batch, keep, plain=save.policy_step):
        same(batch.rewards, annotated, 1e-5)
        assert keep.all()
        plain(run, batch, keep)
        seen["rewards"] = save.score(rm, batch.chats, 10**6)[0].view(4, 4)

    def reward_model_step(run, batch, highest, lowest):
        seen["pair"] = highest, lowest
        same(batch.rewards, seen["rewards"], 1e-5)  # h is the new policy's
        return step(run, batch, highest, lowest)

    monkeypatch.setattr(save, "policy_step", policy_step)
    monkeypatch.setattr(r2m, "reward_model_step", reward_model_step)
    r2m.learn(run, batch)
    same(torch.stack(seen["pair"]), torch.stack(r2m.highest_and_lowest(annotated)))
    assert not torch.equal(torch.stack(seen["pair"]), torch.stack(r2m.highest_and_lowest(seen["rewards"])))
    assert len(run.optimizers["rm"].seen) == 1 and run.log.record["state_shift"] > 0.01

def test_heldout_pairs_are_in_the_tokens_that_the_policy_would_have_sampled(world, tmp_path):
    cfg = save.parse_config(argv(world, tmp_path / "out", heldout=[tmp_path / "pairs.jsonl"]), r2m.Config).checked()
    run, prompts, *_ = r2m.prepare(dataclasses.replace(cfg, heldout=[]))
    run.log = save.Log(dataclasses.replace(cfg, out=str(tmp_path / "log")))
    batch = r2m.sample(run, prompts[:16], 8, 1)
    special = set(run.policy.tokenizer.all_special_ids)  # which a text loses, wherever the policy said them
    said = [i for i, (ids, length) in enumerate(batch.sequences)
            if batch.texts[i] and batch.ended.flatten()[i] and not special & set(ids[length:-1])]
    pairs = [{"prompt": batch.prompts[i // 8][0], "chosen": batch.texts[i], "rejected": "a b"} for i in said]
    toy.write_rows(tmp_path / "pairs.jsonl", pairs)
    _, _, heldout, _ = r2m.prepare(cfg)
    assert [chosen for chosen, _ in heldout["pairs"]] == [batch.chats[i] for i in said] and len(said) > 4
    assert save.encode_responses is r2m.plain.encode_responses

# ---------------------------------------------------------------- whole runs
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_run_writes_both_models_and_the_matrices(world, tmp_path, dtype):
    out = tmp_path / "out"
    r2m.main(argv(world, out, lr_rm=1e-3, dtype=dtype, heldout=[world / "heldout_id.jsonl"]) + ["--r2m_width", "8"])
    assert save.RM_UPDATES["none"].loss is None
    config, records = rows_of(out / "metrics.jsonl")[0]["config"], metrics(out)
    assert (config["rm_update"], config["r2m_alpha"], config["r2m_width"]) == ("none", 0.3, 8)
    assert list(records) == [("save", 0), ("save", 1), ("save", 2)]
    for step, row in list(records.items())[1:]:
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, (int, float)))
        assert row["rm_grad_norm"] > 0 and row["policy_grad_norm"] > 0 and row["own_share"] == 0.7
        assert len([sample for sample in rows_of(out / "samples.jsonl") if sample["step"] == step[1]]) == 32
    if dtype == "float32":  # w(0) = 1
        pairs = rows_of(world / "heldout_id.jsonl")
        plain = save.RewardModel.from_pretrained(str(world / "rm"))
        assert records["save", 0]["accuracy_heldout_id"] == pytest.approx(toy.rm_accuracy(plain, pairs))
    assert "accuracy_heldout_id" in records["save", 2]

    before, after = (load_file(folder / "rm" / "model.safetensors") for folder in (world, out))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"score.weight"}
    matrices, cfg = load_file(out / "rm" / "r2m.safetensors"), dataclasses.replace(CFG, r2m_width=8)
    start = r2m.R2M(save.RewardModel.from_pretrained(str(world / "rm")),
                    save.Policy.from_pretrained(str(world / "policy")), cfg).matrices
    for name, p in start.items():
        assert 1e-5 < (matrices[name] - p).abs().max() < 3e-3  # two steps of Adam at 1e-3
        assert p.std().item() == pytest.approx(1 / math.sqrt(3 * p.shape[0]), rel=0.2)
    loaded = save.RewardModel.from_pretrained(str(out / "rm"))
    assert not loaded.has_value_head and torch.equal(loaded.model.score.weight, after["score.weight"])
    assert save.Policy.from_pretrained(str(out / "policy")).eos_ids and json.loads((out / "rm/config.json").read_text())

@pytest.mark.parametrize("words, said", [
    ("--rm_update save", "--rm_update save"), ("--stage value", "--stage value"), ("--r2m_omega 1.1", "--r2m_omega"),
    ("--r2m_alpha -1", "--r2m_alpha"), ("--r2m_width 0", "--r2m_width")])
def test_what_it_refuses(world, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr("test_runs.save", r2m)  # whose main `refusal` calls
    assert said in refusal(capsys, argv(world, tmp_path / "out") + words.split())
    assert not (tmp_path / "out").exists()
