"""tests/forks/prime.py: Eq. 5 and the cross-entropy against loops and hand values, its step against plain graphs, whole
runs."""
import copy
import math
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch
from test_models import gradients, plain_log_probs, same, weights
from test_runs import argv, metrics, refusal, rows_of, samples
from test_training import Recording, changed, make_run, noisy_steps
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

import save

sys.path.insert(0, str(Path(__file__).resolve().parent / "forks"))
import prime  # noqa: E402

# ---------------------------------------------------------------- Eq. 5
def padded(groups, filler):
    """Groups of lists of token rewards -> token_rewards, mask (P,G,T); `filler` beyond the end of a response."""
    width = max(len(row) for group in groups for row in group)
    full = [[row + [filler] * (width - len(row)) for row in group] for group in groups]
    mask = [[[t < len(row) for t in range(width)] for row in group] for group in groups]
    return torch.tensor(full, dtype=torch.float64), torch.tensor(mask)

def loops(group, labels):
    """Eq. 5 letter by letter for one group: a list of advantages for each response."""
    K, result = len(group), []
    for i, own in enumerate(group):
        others = [j for j in range(K) if j != i]
        outcome = labels[i] - sum(labels[j] for j in others) / (K - 1)
        result.append([outcome + sum(own[s] - sum(statistics.mean(group[j]) for j in others) / (K - 1)
                                     for s in range(t, len(own))) for t in range(len(own))])
    return result

@pytest.mark.parametrize("filler", (0.0, math.nan))
@pytest.mark.parametrize("K", (2, 3, 8))
def test_advantages_are_eq_5_written_as_loops(K, filler):
    torch.manual_seed(K)
    groups = [[torch.randn(n).tolist() for n in torch.randint(1, 9, (K,)).tolist()] for _ in range(5)]
    labels = torch.rand(5, K).double()
    got = prime.prime_advantages(*padded(groups, filler), labels)
    want, mask = padded([loops(group, row.tolist()) for group, row in zip(groups, labels)], 0.0)
    same(got, want, 1e-12)
    assert not got[~mask].any() and not mask.all()

# ---------------------------------------------------------------- labels, filter, cross-entropy
def test_labels_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [-1.0, -1.0, -1.0, 7.0], [2.0, 4.0, 3.0, 3.0]])  # means 3, 1, 3
    assert prime.outcome_labels(rewards, "hard").tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]]
    soft = prime.outcome_labels(rewards, "soft")
    want = [[1 / (1 + math.exp(mean - x)) for x in row] for row, mean in zip(rewards.tolist(), (3, 1, 3))]
    same(soft, torch.tensor(want), 1e-6)
    assert soft[0, 2] == soft[2, 2] == 0.5

def test_equal_rewards_are_ties_with_their_mean_and_all_good():
    rewards = torch.tensor([[x] * 7 for x in (0.1, -0.1, 1 / 3, 23.456, -7.0001)])
    assert (rewards < rewards.mean(1, keepdim=True)).any()  # what a mean in fp32 would do
    assert prime.outcome_labels(rewards, "hard").all()
    assert (prime.outcome_labels(rewards, "soft") == 0.5).all()

@pytest.mark.parametrize("K, passing", [(5, range(1, 5)), (10, range(2, 9)), (16, range(4, 13)), (2, [1])])
def test_the_filter_keeps_accuracies_from_two_to_eight_tenths(K, passing):
    labels = torch.tensor([[1.0] * good + [0.0] * (K - good) for good in range(K + 1)])
    assert prime.accuracy_filter(labels).nonzero()[:, 0].tolist() == list(passing)
    soft = torch.tensor([[0.1, 0.2], [0.1, 0.4], [0.9, 0.8], [0.9, 0.6]])
    assert prime.accuracy_filter(soft).tolist() == [False, True, False, True]

def test_cross_entropy_by_hand_and_as_torch_has_it():
    got = prime.cross_entropy(torch.tensor([0.0, math.log(3)]), torch.tensor([1.0, 0.0]))  # sigmoids 1/2 and 3/4
    assert got.item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    torch.manual_seed(0)
    rewards = torch.cat([torch.randn(20) * 5, torch.tensor([-1e4, 1e4, -1e4, 1e4])]).double().requires_grad_()
    labels = torch.cat([torch.rand(10), torch.randint(0, 2, (10,)), torch.tensor([0, 1, 1, 0])]).double()
    ours, torchs = prime.cross_entropy(rewards, labels), binary_cross_entropy_with_logits(rewards, labels)
    same(ours, torchs, 1e-12)
    same(*(torch.autograd.grad(loss, rewards)[0] for loss in (ours, torchs)), 1e-12)
    assert torch.autograd.gradcheck(lambda r: prime.cross_entropy(r, labels[:20]), rewards[:20])

# ---------------------------------------------------------------- one step
def make_prime(out, monkeypatch, moved=True, **options):
    """A Run with a PRM and its first batch; `moved`: the PRM has left the reference. Also the reference."""
    monkeypatch.setattr(save, "Config", prime.Config)
    run, _, batch = make_run(out, **{"lr_prm": 1e-3, "prime_beta": 0.5, **options})
    run.prm, reference = copy.deepcopy(run.policy), copy.deepcopy(run.policy.model)
    prm = run.optimizers["prm"] = Recording(run.prm.model, run.cfg.lr_prm, run.cfg, keep_initial=True)
    prm.seen = []
    if moved:
        noisy_steps(run.prm.model, prm, range(3))
        prm.seen.clear()
    return run, batch, reference

def plain_rewards(beta, model, reference, batch):
    """r_phi of the tokens of each response, from the whole logits of plain transformers at temperature 1."""
    return [beta * (plain_log_probs(model, *row, 1.0) - plain_log_probs(reference, *row, 1.0).detach())
            for row in batch.sequences]

KEEP = torch.tensor([[True] * 4, [False] * 4, [True] * 4, [False, True, True, False]])
KEPT = KEEP.flatten().nonzero()[:, 0].tolist()

@pytest.mark.parametrize("micro_tokens", (60, 10**6))
def test_the_prm_step_has_the_gradient_of_the_plain_graph_and_moves_the_prm_alone(tmp_path, monkeypatch, micro_tokens):
    run, batch, reference = make_prime(tmp_path, monkeypatch, micro_tokens=micro_tokens)
    others, prm, labels = (run.policy, run.rm), weights(run.prm.model), torch.rand(4, 4)
    before = [weights(model) for model in others]
    rewards = torch.stack([row.sum() for row in plain_rewards(0.5, run.prm.model, reference, batch)])[KEPT]
    loss = binary_cross_entropy_with_logits(rewards, labels.flatten()[KEPT])
    want = gradients(run.prm.model, loss)
    prime.prm_step(run, batch, prime.token_log_probs(run, batch.sequences)[1], labels, KEEP)
    assert run.log.record["rm_loss"] == pytest.approx(loss.item(), rel=1e-5) and loss.item() != pytest.approx(0.693)
    [(_, got)] = run.optimizers["prm"].seen
    same(got, want, 2e-5)
    assert changed(run.prm.model, prm) == set(want) and [changed(*pair) for pair in zip(others, before)] == [set()] * 2

@pytest.mark.parametrize("kind", ("hard", "soft"))
def test_a_step_scores_then_trains_the_prm_then_the_policy(tmp_path, monkeypatch, kind):
    run, batch, reference = make_prime(tmp_path, monkeypatch, prime_labels=kind)
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.5] * 4, [-9.0, 1.0, 1.0, 1.0], [9.0, 8.0, -8.0, -9.0]])
    if kind == "soft":
        rewards[1] = torch.tensor([-4.0, -4.0, -4.0, 12.0])  # labels .02, .02, .02, 1: a mean of .26
    monkeypatch.setattr(save, "score_batch", lambda run, batch: setattr(batch, "rewards", rewards))
    run.log.put(rollout_seconds=1.0)
    labels, valid, seen = prime.outcome_labels(rewards, kind), [True, kind == "soft", True, True], {}
    rows = [row.tolist() for row in plain_rewards(0.5, run.prm.model, reference, batch)]  # before the PRM's step
    advantages = [torch.tensor(row) for p in range(4) for row in loops(rows[4 * p:4 * p + 4], labels[p].tolist())]
    losses = [-(log_probs - log_probs.detach()).exp() * advantages[row] for row in range(16) if valid[row // 4]
              for log_probs in [plain_log_probs(run.policy.model, *batch.sequences[row], run.cfg.temperature)]]
    want = gradients(run.policy.model, sum(row.mean() for row in losses) / len(losses))

    def step(run, batch, reference, labels, keep, inner=prime.prm_step):
        seen.update(labels=labels, keep=keep)
        assert not run.optimizers["policy"].seen
        inner(run, batch, reference, labels, keep)
    monkeypatch.setattr(prime, "prm_step", step)
    before = [weights(model) for model in (run.prm, run.policy, run.rm)]
    prime.learn(run, batch)
    assert torch.equal(seen["labels"], labels) and seen["keep"].tolist() == [[ok] * 4 for ok in valid]
    assert not batch.ended.all()  # truncated responses train, too
    [(_, got)] = run.optimizers["policy"].seen
    same(got, want, 5e-5)
    moved = [changed(*pair) for pair in zip((run.prm, run.policy, run.rm), before)]
    assert moved == [{f"model.{name}" for name in want}] * 2 + [set()] and len(run.optimizers["prm"].seen) == 1
    assert run.log.record["valid"] == run.log.record["kept"] == sum(valid) / 4

def test_prompts_outside_the_filter_train_nothing(tmp_path, monkeypatch):
    run, batch, _ = make_prime(tmp_path, monkeypatch)
    monkeypatch.setattr(save, "score_batch", lambda run, batch: setattr(batch, "rewards", torch.ones(4, 4)))
    run.log.put(rollout_seconds=1.0)
    before = [weights(model) for model in (run.prm, run.policy, run.rm)]
    prime.learn(run, batch)
    assert [changed(*pair) for pair in zip((run.prm, run.policy, run.rm), before)] == [set()] * 3
    assert run.log.record["kept"] == 0

# ---------------------------------------------------------------- whole runs
RUN = {"lr_prm": 1e-3, "lr_policy": 1e-4, "m0": 0.5, "save_every": 1}

@pytest.fixture(scope="module")
def ran(world, tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("prime") / "out"
    prime.main(argv(world, out, heldout=[world / "heldout_id.jsonl"], **RUN))
    return out

def test_a_run_writes_its_files_with_finite_numbers(ran):
    assert {"rm", "policy", "metrics.jsonl", "samples.jsonl", "checkpoints"} <= {p.name for p in ran.iterdir()}
    config = rows_of(ran / "metrics.jsonl")[0]["config"]
    assert config["prime_beta"] == 0.05 and config["prime_labels"] == "hard" and config["rm_update"] == "none"
    logged = metrics(ran)
    assert list(logged) == [("save", 0), ("save", 1), ("save", 2)]
    numbers = [x for row in logged.values() for x in row.values() if not isinstance(x, list)]
    assert all(math.isfinite(x) for x in numbers)
    first, last = logged["save", 1], logged["save", 2]
    assert first["implicit_reward"] == 0 and first["rm_loss"] == pytest.approx(math.log(2)) and last["implicit_spread"]
    assert logged["save", 0]["accuracy_heldout_id"] == 0 and last["accuracy_heldout_id"] > 0  # phi = ref: only ties
    for step, prompts in samples(ran).items():
        for rows in prompts:
            mean = statistics.mean(row["reward"] for row in rows)
            good = [row["reward"] >= mean for row in rows]
            inside = 0.2 <= sum(good) / len(good) <= 0.8
            assert [row["side"] for row in rows] == [("+" if x else "-") if inside else "" for x in good]

def test_the_folders_load_in_plain_transformers_and_give_the_logged_accuracy(ran, world):
    models = {}
    for name, path in (("phi", ran / "rm"), ("ref", world / "policy"), ("policy", ran / "policy")):
        models[name], info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(info.values())
    assert models["phi"].config.dtype == torch.float32
    start = weights(models["ref"])
    assert changed(models["phi"], start) == changed(models["policy"], start) == set(start)
    words, right, pairs = AutoTokenizer.from_pretrained(ran / "rm"), 0, rows_of(world / "heldout_id.jsonl")
    for pair in pairs:
        ask, rewards = f"<user> {pair['prompt']} <assistant> ", []
        for side in ("chosen", "rejected"):
            ids, length = words(f"{ask}{pair[side]} <end>")["input_ids"], len(words(ask)["input_ids"])
            rewards.append(sum((plain_log_probs(models[m], ids, length, 1.0).sum().item()) * sign
                               for m, sign in (("phi", 1), ("ref", -1))))
        right += rewards[0] > rewards[1]
    assert metrics(ran)["save", 2]["accuracy_heldout_id"] == pytest.approx(100 * right / len(pairs))

def test_a_template_may_go_on_after_the_end_of_a_response(tmp_path, monkeypatch):
    run, batch, _ = make_prime(tmp_path, monkeypatch)
    end, pairs = run.policy.eos_ids[0], list(zip(batch.sequences[0::2], batch.sequences[1::2]))
    plain = [tuple((ids + [end], length) for ids, length in pair) for pair in pairs]
    longer = [tuple((ids + [6, 7, 8], length) for ids, length in pair) for pair in plain]
    prime.heldout_accuracy(run, {"plain": plain, "longer": longer})
    assert run.log.record["accuracy_plain"] == run.log.record["accuracy_longer"] > 0

def test_resume_goes_on_as_if_nothing_had_happened(ran, world, tmp_path):
    out = shutil.copytree(ran, tmp_path / "out")
    for name in ("checkpoints/step_000002", "rm", "policy"):
        shutil.rmtree(out / name)
    prime.main(argv(world, out, heldout=[world / "heldout_id.jsonl"], resume=True, **RUN))
    assert metrics(out) == metrics(ran)
    for name in ("rm", "policy"):
        same(*(weights(AutoModelForCausalLM.from_pretrained(root / name)) for root in (out, ran)))

def test_bf16_keeps_the_prms_masters(world, tmp_path):
    flags = {**RUN, "lr_prm": 1e-6, "save_every": 0, "steps": 1, "prime_labels": "soft", "dtype": "bfloat16"}
    prime.main(argv(world, tmp_path / "out", **flags))
    now, start = (AutoModelForCausalLM.from_pretrained(path, dtype="auto")
                  for path in (tmp_path / "out/rm", world / "policy"))
    assert {p.dtype for p in now.parameters()} == {torch.float32}
    moved = torch.cat([(a - b).abs().flatten() for a, b in zip(now.parameters(), start.parameters())])
    assert moved.max() < 2e-6 and (moved > 0).float().mean() > 0.5

@pytest.mark.parametrize("words, said", [
    ("--rm_update save", "PRIME expects none"), ("--algo rloo", "grpo"), ("--stage value", "save"),
    ("--prime_labels loud", "hard"), ("--prime_beta -1", "-1"), ("", "2 ranks")])
def test_what_prime_is_not_is_refused_in_one_line(world, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr("test_runs.save", prime)  # whose main `refusal` calls
    monkeypatch.setattr("os._exit", sys.exit)
    if not words:
        monkeypatch.setattr(save, "WORLD", 2)
    line = refusal(capsys, argv(world, tmp_path / "out") + words.split())
    assert words[:5] in line and said in line and not (tmp_path / "out").exists(), line

def test_the_prm_starts_as_the_policy_with_its_own_learning_rate_and_clipping(world, tmp_path):
    run, *_ = prime.prepare(save.parse_config(argv(world, tmp_path / "out"), prime.Config).checked())
    same(weights(run.prm), weights(run.policy))
    assert run.prm.model is not run.policy.model
    settings = [(run.optimizers[name].lr, run.optimizers[name].max_norm) for name in ("prm", "policy")]
    assert settings == [(1e-6, 10.0), (1e-5, 1.0)] and set(run.optimizers) == {"prm", "policy"}
    assert run.cfg.kl_coef == 0 and not run.optimizers["policy"].initial
