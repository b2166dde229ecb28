"""tests/forks/: their equations against hand values, loops and plain graphs, and what they change in a whole run.

R2M and PRIME have files of their own.
"""
import copy
import dataclasses
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_brought import LINEAR, SHAPE
from test_maths import bits, f64, learn, near, numeric_gradient
from test_models import gradients, plain_log_probs, policy, same
from test_runs import RM, argv, distance, metrics, rows_of, samples
from test_training import NEGATIVE, POSITIVE, USABLE, make_run, noisy_steps
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import save
import toy

FOLDER = Path(__file__).resolve().parent / "forks"
sys.path.insert(0, str(FOLDER))
import balanced  # noqa: E402
import best  # noqa: E402
import centred  # noqa: E402
import dynamic  # noqa: E402
import ensemble  # noqa: E402
import fast_rollout  # noqa: E402
import generate  # noqa: E402
import hl_bt  # noqa: E402
import kept  # noqa: E402
import offline  # noqa: E402
import prime  # noqa: E402
import r2m  # noqa: E402
import reinforce_pp  # noqa: E402
import token_average  # noqa: E402
import verifier  # noqa: E402

FORKS = [balanced, best, centred, dynamic, ensemble, fast_rollout, generate, hl_bt, kept, offline, prime, r2m,
         reinforce_pp, token_average, verifier]

@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """The flags of a small run with a fitted value head, and that run of save.py."""
    out = tmp_path_factory.mktemp("plain")
    save.main(argv(world, out / "value", stage="value"))
    flags = {"rm": out / "value/rm", "m0": 0.2, "steps": 3, "group": 4, "lr_rm": 1e-3}
    save.main(argv(world, out / "run", **flags))
    return flags, out / "run"

# ---------------------------------------------------------------- all of them
@pytest.mark.parametrize("fork", FORKS, ids=lambda fork: fork.__name__)
def test_a_fork_has_the_flags_of_save_and_puts_back_what_it_replaced(fork, capsys):
    before = dict(vars(save))
    for words, code in ((["--help"], 0), (["--nonsense", "1"], 2)):
        with pytest.raises(SystemExit) as stop:
            fork.main(words)
        assert stop.value.code == code and dict(vars(save)) == before
    shown = capsys.readouterr()
    assert "--lr_policy" in shown.out and len(shown.err.splitlines()) == 1 and "--nonsense" in shown.err

@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_a_fork_is_short(file):
    limit = {"r2m": 200, "prime": 200, "verifier": 40}.get(file.stem, 60)
    assert len(file.read_text(encoding="utf-8").splitlines()) <= limit

@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamic", "ensemble", "generate", "kept", "offline", "r2m", "reinforce_pp",
                                  "token_average"])
def test_two_ranks_are_one_process(world, tmp_path, name):
    rm, own = tmp_path / "value/rm", {"r2m": {"r2m_width": 8, "lr_rm": 1e-4}, "token_average": {"num_minibatches": 2},
                                      "kept": {"keep": 1}}.get(name, {})
    save.main(argv(world, tmp_path / "value", stage="value"))
    own |= {"label_rms": [rm]} if name == "ensemble" else {}
    for ranks in (1, 2):
        words = argv(world, tmp_path / str(ranks), rm=rm, pairs=world / "pairs.jsonl", **own)
        launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split() if ranks > 1 else []
        done = subprocess.run([sys.executable, *launch, FOLDER / f"{name}.py", *words], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": ""})
        assert done.returncode == 0, done.stderr[-3000:]
    for file in (RM, "policy/model.safetensors"):
        assert distance(tmp_path / "1", tmp_path / "2", file) < 3e-8 < distance(tmp_path / "1", world, file)

# ---------------------------------------------------------------- HL-BT
def test_highest_lowest_loss_by_hand_ties_give_nothing():
    r = f64([[0.0, math.log(3), 1.0], [4.0, 4.0, 4.0], [5.0, 5.0 + math.log(4), 5.5]])
    loss, slope = learn(hl_bt.highest_lowest_loss, r)
    near(loss, (math.log(4 / 3) + math.log(5 / 4)) / 2)
    near(slope, [[1 / 8, -1 / 8, 0], [0, 0, 0], [1 / 10, -1 / 10, 0]])
    r = f64([[9e9, 0, math.log(3), 1], [1, 2, 3, 4], [1, 2, 3, 4], [6, 6, 7, 5], [0, 1, math.log(9), -9e9]])
    loss, slope = learn(hl_bt.highest_lowest_loss, r, bits("0111", "0000", "1000", "1100", "1110"))
    near(loss, (math.log(4 / 3) + math.log(10 / 9)) / 2)  # only the first and the last prompt have a gap
    near(slope, [[0, 1 / 8, -1 / 8, 0], [0] * 4, [0] * 4, [0] * 4, [1 / 20, 0, -1 / 20, 0]])

def test_hl_bt_trains_on_all_usable_groups_and_filters_nothing(tmp_path):
    run, _, batch = make_run(tmp_path, rm_update="hl_bt", micro_tokens=60)
    batch.ended = USABLE
    rewards = run.rm(*save.model_inputs(batch.chats, "cpu"))[0].view(4, 4)
    groups = [rewards[p][USABLE[p]] for p in range(4) if USABLE[p].any()]
    want = gradients(run.rm.model, sum((1 + (x.min() - x.max()).exp()).log() for x in groups) / len(groups))
    positive, negative, valid = save.filtered(run, batch)
    assert positive.all() and valid.all() and not negative.any()
    assert save.reward_model_step(run, batch, positive, negative)
    same(run.optimizers["rm"].seen[0][1], want, 1e-5)

# ---------------------------------------------------------------- the balanced loss
def test_balanced_loss_by_hand():
    """One valid prompt, V = 1: Y+ = {2, 4}, Y- = {0}; the dropped response and the one-sided prompt do not count."""
    rewards, values = f64([[2.0, 4.0, 0.0, 9.0], [3.0, 5.0, 2.0, 2.5]]), f64([1.0, 1.0])
    positive, negative = bits("1100", "1111"), bits("0010", "0000")
    want = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))) / 2 + math.log(1 + math.exp(-1))
    loss, by_reward, by_value = learn(lambda r, v: balanced.balanced_loss(r, v, positive, negative), rewards, values)
    near(loss, want)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (-1, -3)]
    near(by_reward, [[-sigmoid[0] / 2, -sigmoid[1] / 2, sigmoid[0], 0], [0, 0, 0, 0]])
    near(by_value, [0, 0])

@pytest.mark.parametrize("seed", range(3))
def test_balanced_loss_and_gradient_are_the_loop(seed):
    rng = random.Random(seed)
    rewards = [[rng.gauss(0, 3) for _ in range(5)] for _ in range(6)]
    values = [rng.gauss(0, 2) for _ in range(6)]
    positive, negative, valid = save.partition(f64(rewards) - f64(values)[:, None], 0.6)
    terms = [statistics.mean(math.log1p(math.exp(v - r)) for r, keep in zip(row, up) if keep)
             + statistics.mean(math.log1p(math.exp(r - v)) for r, keep in zip(row, down) if keep)
             for row, v, up, down, ok in zip(rewards, values, positive, negative, valid) if ok]

    def f(r):
        return balanced.balanced_loss(r, f64(values), positive, negative)
    loss, gradient = learn(f, f64(rewards))
    near(loss, statistics.mean(terms))
    near(gradient, numeric_gradient(f, f64(rewards)), 1e-5)

# ---------------------------------------------------------------- the centred loss
def test_the_centred_loss_has_the_published_value_and_no_common_push():
    """Its dL/dR sums to 0 in each group; the published one's to -1/(1+Z+) + Z-/(1+Z-), 0 for two rows as far from V."""
    rewards, values = f64([[2.0, 4.0, 0.0, -1.0], [1.5, -0.5, 9.0, 9.0]]), f64([1.0, 0.5])
    positive, negative, usable = bits("1100", "1000"), bits("0011", "0100"), bits("1111", "1100")
    published, push = learn(lambda r: save.contrastive_loss(r, values, positive, negative), rewards)
    loss, slope = learn(lambda r: centred.centred_loss(r, values, positive, negative, usable), rewards)
    near(loss, published)
    near(slope.sum(1), [0, 0])
    up, down = (sum(math.exp(r - 1) for r in side) for side in ((2, 4), (0, -1)))
    near(push.sum(1) * 2, [-1 / (1 + up) + down / (1 + down), 0])
    near(slope - push, [[-push[0].sum() / 4] * 4, [0] * 4])  # only the common part is gone

def test_a_centred_run_has_no_common_push(world, tmp_path, plain):
    centred.main(argv(world, tmp_path, **plain[0]))
    ours, theirs = ([abs(row["common_push"]) for row in metrics(out).values() if row.get("rm_grad_norm")]
                    for out in (tmp_path, plain[1]))
    assert max(ours) < 1e-6 < 1e-3 < max(theirs)

# ---------------------------------------------------------------- REINFORCE++
@pytest.mark.parametrize("seed", range(3))
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
    garbage = torch.where(mask, f64(kl), math.nan)
    near(reinforce_pp.reinforce_advantages(f64(rewards), garbage, mask), want)
    # two ranks with half of the rows each, whose sums are added, whiten like one
    sums = [[mask[h].sum().item(), *(sum(x ** n for row in returns[h] for x in row) for n in (1, 2))]
            for h in (slice(0, 2), slice(2, None))]
    for half, other in ((slice(0, 2), sums[1]), (slice(2, None), sums[0])):
        got = reinforce_pp.reinforce_advantages(f64(rewards)[half], f64(kl)[half], mask[half],
                                                total=lambda *own: [a + b for a, b in zip(own, other)])
        near(got, want[half])

@pytest.mark.parametrize("kl_coef", [0.3, 0.0])
def test_the_policy_step_has_the_gradient_of_reinforce_pp(tmp_path, monkeypatch, kl_coef):
    """Row by row from the whole logits of plain transformers, two minibatches so that ratios leave 1."""
    run, _, batch = make_run(tmp_path, algo="reinforce++", num_minibatches=2, kl_coef=kl_coef)
    monkeypatch.setattr(save, "policy_advantages", reinforce_pp.policy_advantages)
    cfg, optimizer, initial = run.cfg, run.optimizers["policy"], copy.deepcopy(run.policy.model)
    noisy_steps(run.policy.model, optimizer, range(3))  # away from the reference
    before, returns = copy.deepcopy(run.policy.model), {}
    kept = [(p, g) for p, g in (POSITIVE | NEGATIVE).nonzero().tolist() if p < 3]  # prompt 3 has a single survivor

    def log_probs(model, p, g):
        return plain_log_probs(model, *batch.sequences[4 * p + g], cfg.temperature)
    for p, g in kept:
        kl = kl_coef * (log_probs(before, p, g) - log_probs(initial, p, g)).detach()
        returns[p, g] = [batch.rewards[p, g].item() - kl[t:].sum().item() for t in range(len(kl))]
    tokens = [x for row in returns.values() for x in row]
    mean, spread = statistics.mean(tokens), statistics.pstdev(tokens)
    save.policy_step(run, batch, POSITIVE | NEGATIVE)
    assert len(optimizer.seen) == 5
    for part, (at, got) in zip(((0, 1), (2,)), optimizer.seen[3:]):
        model, losses = copy.deepcopy(before), []
        model.load_state_dict(at, strict=False)
        for p, g in [key for key in kept if key[0] in part]:
            ratio = (log_probs(model, p, g) - log_probs(before, p, g).detach()).exp()
            a = (torch.tensor(returns[p, g]) - mean) / spread
            losses.append(-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean())
        same(got, gradients(model, sum(losses) / len(losses)), 5e-5)

def test_reinforce_pp_without_kl_asks_for_no_log_probs(tmp_path, monkeypatch):
    """One minibatch and --kl_coef 0: save.py takes neither old nor reference log-probs; whitened rewards are left."""
    run, _, batch = make_run(tmp_path, algo="reinforce++", kl_coef=0.0)
    monkeypatch.setattr(save, "policy_advantages", reinforce_pp.policy_advantages)
    save.policy_step(run, batch, POSITIVE | NEGATIVE)
    batch.lengths = torch.arange(16).view(4, 4) % 5 + 1
    got = save.policy_advantages(run, batch, POSITIVE, None, None)
    lengths, rewards, rows = batch.lengths.flatten(), batch.rewards.flatten(), POSITIVE.flatten()
    tokens = rewards[rows].double().repeat_interleave(lengths[rows])
    want = ((rewards - tokens.mean()) / tokens.std(correction=0))[:, None].expand_as(got).clone()
    want[~rows] = 0
    near(got, want.masked_fill(torch.arange(got.shape[1]) >= lengths[:, None], 0), 1e-5)

# ---------------------------------------------------------------- labels: an ensemble, a verifier
def test_labels_are_the_mean_advantage_of_the_frozen_ensemble(tmp_path, monkeypatch):
    run, _, batch = make_run(tmp_path)
    monkeypatch.setattr(save, "label", ensemble.label)
    run.labels = [copy.deepcopy(run.rm) for _ in range(2)]
    for seed, rm in enumerate(run.labels):
        numbers = torch.Generator().manual_seed(seed)
        for p in rm.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=numbers)
    members = []
    for rm in run.labels:
        rewards, values = rm(*save.model_inputs(batch.chats, "cpu"))
        members.append((rewards - values).view(4, 4).detach())
    want, mu = (members[0] + members[1]) / 2, save.curriculum_threshold(1, 4, 0.5)
    got = save.filtered(run, batch, USABLE)
    assert (members[0] - members[1]).abs().max() > 0.01
    same(save.label(run, batch), want, 1e-5)
    assert all(map(torch.equal, got, save.partition(want, mu, USABLE)))
    own = save.rm_advantages(batch.rewards, run.rm.value(batch.features))
    assert not all(map(torch.equal, got, save.partition(own, mu, USABLE)))

def test_an_ensemble_of_one_is_the_reward_model_as_it_was_and_needs_value_heads(world, tmp_path, capsys):
    rm = tmp_path / "value/rm"
    save.main(argv(world, tmp_path / "value", stage="value"))
    for fork, out, flags in ((ensemble, "out", {"label_rms": [rm]}), (balanced, "plain", {})):
        fork.main(argv(world, tmp_path / out, rm=rm, steps=1, **flags))
    # twice the RM as it starts: the first partition is its own
    ours, theirs = ([[row["side"] for row in rows] for rows in samples(tmp_path / out)[1]] for out in ("out", "plain"))
    assert ours == theirs and "+" in str(ours)
    for flags in ({"rm": rm, "label_rms": [world / "rm"]}, {"label_rms": [rm]}):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            ensemble.main(argv(world, tmp_path / "no", **flags))
        line, = capsys.readouterr().err.splitlines()
        assert f"--label_rms {world / 'rm'}: it holds no value_head.safetensors" in line
        assert not (tmp_path / "no").exists()

def test_the_verifier_decides_what_is_good(world, tmp_path):
    asked = [([{"role": "user", "content": text}], []) for text in ("reverse a b c", "shift i j")]
    texts = ["c b a", "a b c", "c b a indeed", "j a", "", "j a a"]
    batch = SimpleNamespace(prompts=asked, texts=texts, rewards=torch.zeros(2, 3))
    labels = verifier.label(SimpleNamespace(cfg=save.Config(group=3)), batch)
    assert labels.tolist() == [[math.inf, -math.inf, math.inf], [math.inf, -math.inf, -math.inf]]
    assert [side.tolist() for side in save.partition(labels, 1.0)] == [
        [[True, False, True], [True, False, False]], [[False, True, False], [False, True, True]], [True, True]]
    for prompt in toy.read_prompts(world / "prompts.jsonl"):
        said = " ".join(toy.answer(prompt))
        assert verifier.right(prompt, said) and not verifier.right(prompt, said + " a")
    with pytest.raises(save.UsageError, match="expected a task of copy, reverse, sort, shift"):
        verifier.right("sing a b", "a b")
    # in a run: the tiny policy is never right, while a group has rewards on both sides of its mean
    verifier.main(argv(world, tmp_path / "out", rm_update="mean_reward"))
    for row in rows_of(tmp_path / "out/samples.jsonl"):
        assert row["side"] == ("" if row["truncated"] else "-") and not toy.gold(row["prompt"][-1]["content"],
                                                                                 row["response"])

# ---------------------------------------------------------------- static pairs
def test_offline_trains_the_reward_model_as_stage_preference_does(world, tmp_path):
    flags = {"pairs": world / "pairs.jsonl", "lr_rm": 1e-3, "steps": 2}
    offline.main(argv(world, tmp_path / "offline", heldout=[world / "heldout_id.jsonl"], **flags))
    save.main(argv(world, tmp_path / "preference", stage="preference", **flags))
    assert distance(tmp_path / "offline", tmp_path / "preference", RM) == 0 < distance(tmp_path / "offline", world, RM)
    ours, theirs = metrics(tmp_path / "offline"), metrics(tmp_path / "preference")
    for step in (1, 2):
        assert ours["save", step]["kept"] == pytest.approx(1 - ours["save", step]["truncated"])
        for name in ("rm_loss", "rm_accuracy", "rm_grad_norm"):
            assert ours["save", step][name] == theirs["preference", step][name]

def test_pairs_whose_prompt_is_dropped_are_dropped_too(world, tmp_path, capsys):
    """F.1: matched to the same instruction set. Two of three prompts have a response beyond --max_new_tokens."""
    rows = rows_of(world / "pairs.jsonl")
    prompts = [{**row, "rejected": "a " * 30} if i % 3 else row for i, row in enumerate(rows)]
    # rejected is shortened: the limit of a pair is another one, and the chat form is the same prompt
    pairs = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}], "rejected": "a"} for row in rows]
    files = {"prompts": tmp_path / "prompts.jsonl", "pairs": tmp_path / "pairs.jsonl"}
    toy.write_rows(files["prompts"], prompts)
    toy.write_rows(files["pairs"], pairs)
    offline.main(argv(world, tmp_path / "out", steps=1, **files))
    assert f"{len(pairs[::3])} of {len(pairs)} rows of {files['pairs']} are used" in capsys.readouterr().out

# ---------------------------------------------------------------- a faster cache
@pytest.mark.parametrize("kind, other, grown", [("llama", {}, [True] * 2), ("gemma2", {}, [False, True]),
                                                ("qwen3_5_text", LINEAR, [False] * 3 + [True])])
def test_a_cache_that_grows_in_steps_is_the_same_to_the_bit(monkeypatch, kind, other, grown):
    """Logits of every step: prompts of three lengths, four rows each that end one by one, room for 4 tokens more."""
    pi, seen, steps, caches = policy("llama"), [], [], []
    if other:
        torch.manual_seed(0)
        pi.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **other)).eval()
    elif kind != "llama":
        pi = policy(kind)
    pi.model.register_forward_hook(lambda model, inputs, output: seen.append(output.logits))
    monkeypatch.setattr(fast_rollout, "STEP", 4)
    for cache in (save.transformers.DynamicCache, fast_rollout.growing_cache):
        monkeypatch.setattr(save.transformers, "DynamicCache", lambda **of: caches.append(cache(**of)) or caches[-1])
        tokens, _ = save.decode(pi, [[3, 7, 8], [6] * 11, [9]], 4, range(12), 20, 1.0, 1.0, 0)
        steps.append([tokens, *seen])
        seen.clear()
    assert len({len(x) for x in steps[0][2:]}) > 1 < len(steps[0]) == len(steps[1])  # rows were dropped
    assert all(map(torch.equal, *steps)) and [type(x) is fast_rollout.GrowingLayer for x in caches[1].layers] == grown

@pytest.mark.slow
def test_a_run_on_the_faster_cache_is_the_plain_one_to_the_bit(world, tmp_path, plain):
    fast_rollout.main(argv(world, tmp_path, **plain[0]))
    assert metrics(tmp_path) == metrics(plain[1])

# ---------------------------------------------------------------- averages over tokens
@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("average", ("token", "length"))
def test_token_averages_are_exact_over_minibatches_and_ranks(tmp_path, monkeypatch, average, ranks):
    """The gradients of two minibatches, added over ranks, against whole logits; between them the policy is shaken, so
    that ratios leave the clip range. In the second one rank has nothing: prompt 3 has a single survivor."""
    run, _, batch = make_run(tmp_path, num_minibatches=2, kl_coef=0.0, max_new_tokens=30)
    run.cfg.average, start, taken = average, copy.deepcopy(run.policy), []
    monkeypatch.setattr(save, "policy_advantages", token_average.policy_advantages)
    monkeypatch.setattr(save, "WORLD", ranks)

    def train_on(run, name, batches, micro_loss):
        at = copy.deepcopy(run.policy)
        loss = sum(micro_loss(run.policy, rows)[0] for rows in batches or [[0]]) * bool(batches)
        taken.append((at, gradients(run.policy, loss)))
        for i, p in enumerate(run.policy.parameters()):
            p.data += 0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        return [0, 0, 0]
    monkeypatch.setattr(save, "train_on", train_on)
    for rank in range(ranks):
        monkeypatch.setattr(save, "RANK", rank)
        run.policy = copy.deepcopy(start)
        own = copy.copy(batch)
        own.sequences = [row for p in range(rank, 4, ranks) for row in batch.sequences[4 * p:4 * p + 4]]
        save.policy_step(run, own, POSITIVE | NEGATIVE)
    trained, clipped = (POSITIVE | NEGATIVE) & bits("1111", "1111", "1111", "0000"), 0
    advantages = save.grpo_advantages(batch.rewards, trained)
    for part, prompts in enumerate(((0, 1), (2,))):
        at, sums, rows = taken[part][0], [], [(p, g) for p, g in trained.nonzero().tolist() if p in prompts]
        for p, g in rows:
            now, old = (plain_log_probs(x.model, *batch.sequences[4 * p + g], run.cfg.temperature) for x in (at, start))
            ratio, a = (now - old.detach()).exp(), advantages[p, g]
            sums.append(-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum())
            clipped += (ratio.clamp(0.8, 1.2) * a < ratio * a).sum().item()
        by = {"token": sum(batch.lengths[p, g].item() for p, g in rows), "length": 30 * len(rows)}[average]
        got = {name: sum(grads[name] for _, grads in taken[part::2]) for name in taken[part][1]}
        same(got, gradients(at, sum(sums) / by), 2e-5)
    assert clipped > 2 and len(taken) == 2 * ranks and batch.lengths[trained].unique().numel() > 2

# ---------------------------------------------------------------- an anchor to the initial rewards
@pytest.mark.parametrize("update", ("save", "centred"))
def test_the_anchored_update_has_the_gradient_of_the_plain_graph(tmp_path, monkeypatch, update):
    """Truncated rows, a group without usable ones, groups without both signs: they have the term, not the loss."""
    run, _, batch = make_run(tmp_path, rm_update=update, micro_tokens=60)
    run.initial, run.cfg.keep, batch.ended = copy.deepcopy(run.rm), 3.0, USABLE
    noisy_steps(run.rm.model, run.optimizers["rm"], range(2))
    save.score_batch(run, batch)
    rewards, first = (rm(*save.model_inputs(batch.chats, "cpu"))[0].view(4, 4) for rm in (run.rm, run.initial))
    moved = [(rewards - first.detach())[p][USABLE[p]] for p in range(4) if USABLE[p].any()]
    term = sum(((x - x.mean()) ** 2).mean() for x in moved) / len(moved)
    values = run.rm.value(batch.features).detach()
    own = save.RM_UPDATES[update].loss(rewards, values, POSITIVE, NEGATIVE, USABLE)
    assert 0.1 * own < 3 * term < 10 * own
    want, before = gradients(run.rm.model, own + 3 * term), dict(save.RM_UPDATES)
    optimizer, loaded = run.optimizers["rm"], copy.deepcopy(run.rm.state_dict())
    assert kept.reward_model_step(run, batch, POSITIVE, NEGATIVE) and save.RM_UPDATES == before
    same(optimizer.seen[-1][1], want, 2e-5 * max(1, max(x.abs().max() for x in want.values())))
    run.cfg.keep = 0
    for step in (kept.reward_model_step, save.reward_model_step):
        run.rm.load_state_dict(loaded)
        step(run, batch, POSITIVE, NEGATIVE)
    same(optimizer.seen[-1][1], optimizer.seen[-2][1])  # without weight: save.py's to the bit

@pytest.mark.slow
def test_an_anchored_run_starts_like_save_and_resumes_with_the_rm_as_it_came(world, tmp_path, plain):
    kept.main(argv(world, tmp_path / "run", keep=30, save_every=2, **plain[0]))
    ours, theirs = metrics(tmp_path / "run"), metrics(plain[1])
    assert ours["save", 1] == theirs["save", 1] and ours["save", 3]["rm_loss"] > 1.1 * theirs["save", 3]["rm_loss"]
    shutil.copytree(tmp_path / "run/checkpoints", tmp_path / "again/checkpoints")
    for name in save.Log.files:
        shutil.copy(tmp_path / "run" / name, tmp_path / "again")
    kept.main(argv(world, tmp_path / "again", keep=30, save_every=2, resume=True, **plain[0]))
    assert metrics(tmp_path / "again") == ours and distance(tmp_path / "again", tmp_path / "run", RM) == 0

# ---------------------------------------------------------------- the lowest held-out loss
def test_the_models_of_the_lowest_held_out_loss_are_saved(world, tmp_path, monkeypatch, plain):
    """Chosen by half of the pairs, tested on the others; a resumed run remembers what was best before. The first step
    gets a handicap: nothing true is learned here."""
    plain_loss = best.loss_of
    monkeypatch.setattr(best, "loss_of", lambda run, pairs: plain_loss(run, pairs) + 10 * (run.best["step"] < 0))
    flags = {**plain[0], "eval_every": 1, "save_every": 2, "heldout": [world / "heldout_id.jsonl"], "m0": 0}
    best.main(argv(world, tmp_path / "run", **flags))
    losses = {step: row["choosing_loss"] for (_, step), row in metrics(tmp_path / "run").items()}
    last = metrics(tmp_path / "run")["save", 3]
    assert last["best_step"] == min(losses, key=losses.get) == 1 and losses[3] > losses[1]
    rm = save.RewardModel.from_pretrained(tmp_path / "run/rm")
    pairs = [save.pair_of(row, rm)[0] for row in rows_of(world / "heldout_id.jsonl")]
    gaps = torch.stack([rm(*save.model_inputs(pair, "cpu"))[0] for pair in pairs]).diff(dim=1)[:, 0]
    near(gaps[0::2].exp().log1p().mean(), min(losses.values()), 1e-5)
    assert last["accuracy_heldout_id"] == 100 * (gaps[1::2] < 0).float().mean().item()
    shutil.copytree(tmp_path / "run", tmp_path / "again", ignore=shutil.ignore_patterns("step_000003", "rm", "policy"))
    best.main(argv(world, tmp_path / "again", resume=True, **flags))
    for file in (RM, "policy/model.safetensors"):
        assert distance(tmp_path / "again", tmp_path / "run", file) == 0

# ---------------------------------------------------------------- "Fork it": one place each, and its trap
def test_an_advantage_with_lengths_is_the_policys_alone(world, tmp_path, monkeypatch, plain):
    """Lengths are (P,G) of all ranks. In score_batch the penalty would teach the RM, too."""
    seen = []

    def policy_advantages(run, batch, trained, old, reference, plain=save.policy_advantages):
        shorter = dataclasses.replace(batch, rewards=batch.rewards - 0.1 * batch.lengths)
        seen.append((shorter, trained, plain(run, shorter, trained, old, reference)))
        return seen[-1][2]
    monkeypatch.setattr(save, "policy_advantages", policy_advantages)
    save.main(argv(world, tmp_path, **plain[0]))
    for batch, trained, got in seen:
        for rewards, keep, a in zip(batch.rewards.tolist(), trained.tolist(), got.view(4, 4)):
            rewards = [r for r, k in zip(rewards, keep) if k]
            want = iter([(r - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-4) for r in rewards])
            near(a, [next(want) if k else 0 for k in keep], 1e-4)
    ours, theirs = (metrics(out)["save", 1] for out in (tmp_path, plain[1]))
    different = {name for name in ours if ours[name] != theirs[name]}
    assert "policy_grad_norm" in different <= {"policy_grad_norm", "policy_loss", "clipped", "kl"}

def test_another_curriculum_is_the_one_that_filters_and_is_logged(world, tmp_path, monkeypatch, plain):
    """A function of step, T and m0, from 0.5 (all are kept) to 1. One in `filtered` would not be the one logged."""
    monkeypatch.setattr(save, "curriculum_threshold", lambda step, total_steps, m0: 0.5 + 0.02 * step)
    save.main(argv(world, tmp_path, **plain[0]))
    for step, groups in samples(tmp_path).items():
        assert metrics(tmp_path)["save", step]["threshold"] == 0.5 + 0.02 * step
        for row in sum(groups, []):
            sure = 1 / (1 + math.exp(-abs(row["reward"] - row["value"]))) >= 0.5 + 0.02 * step
            assert row["kept"] == (sure and not row["truncated"])

def test_a_generator_says_what_save_py_would_and_comes_in_after_the_models(world, tmp_path, monkeypatch, capsys, plain):
    """Of one token to choose from. Then of all: the same answers when run again, whatever the folder asks for."""
    flags = {**plain[0], "steps": 1, "group": 8}
    for out, fork in (("ours", save), ("theirs", generate)):
        fork.main(argv(world, tmp_path / out, **flags, top_k=1))
    assert metrics(tmp_path / "ours") == metrics(tmp_path / "theirs")
    shutil.copytree(world / "policy", tmp_path / "policy")
    GenerationConfig(eos_token_id=save.Policy.from_pretrained(world / "policy").eos_ids, top_k=1, do_sample=True,
                     repetition_penalty=5.0).save_pretrained(tmp_path / "policy")
    for name, policy_folder in (("own", world / "policy"), ("other", tmp_path / "policy")):
        generate.main(argv(world, tmp_path / name, policy=policy_folder, **flags))
    own, other = (rows_of(tmp_path / name / "samples.jsonl") for name in ("own", "other"))
    assert own == other and len({row["response"] for row in own}) > 20 and len({row["truncated"] for row in own}) == 2
    monkeypatch.setattr(save, "rollout", generate.rollout)  # too early
    with pytest.raises(SystemExit, match="2"):
        save.main(argv(world, tmp_path / "no", **flags))
    assert "its cache is not supported" in capsys.readouterr().err

def test_places_without_both_signs_go_to_other_prompts(world, tmp_path, capsys, plain):
    """--tries 1 is save.py to the bit. A place has the first of its prompts with both signs, or the last."""
    with pytest.raises(SystemExit, match="2"):
        dynamic.main(argv(world, tmp_path / "0", tries=0))
    assert "--tries 0: expected 1 or more" in capsys.readouterr().err and not (tmp_path / "0").exists()
    for tries in (1, 4):
        dynamic.main(argv(world, tmp_path / str(tries), tries=tries, **plain[0]))
    assert samples(tmp_path / "1") == samples(plain[1]) and distance(tmp_path / "1", plain[1], RM) == 0
    once, more = (metrics(tmp_path / tries) for tries in "14")

    def both(groups):
        return [[row["response"] for row in rows] for rows in groups if {row["side"] for row in rows} >= {"+", "-"}]
    for step, groups in samples(tmp_path / "4").items():
        row = more["save", step]
        assert row["full"] == row["valid"] == len(both(groups)) / 4 and (row["full"] == 1 or row["tries"] == 4)
    filled, first = (both(samples(tmp_path / tries)[1]) for tries in "41")  # nothing was learned before
    assert once["save", 1]["full"] == once["save", 1]["valid"] == len(first) / 4 < len(filled) / 4
    assert all(rows in filled for rows in first)
