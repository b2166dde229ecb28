"""How save.py trains: the sharded optimizer against torch's, and the steps of Algorithm 2 against plain graphs over
all rows at once and the papers' formulas as loops."""
import copy
import dataclasses
import json
import math
import statistics
import weakref

import pytest
import torch
from test_models import (END, chats, gradients, plain_log_probs, policy, prompt_features, reward_model, same,
                         stock_rewards, weights)
from torch import nn

import save

CPU = save.Config(device="cpu", dtype="float32")

# ---------------------------------------------------------------- the optimizer
def noisy_steps(model, optimizer, steps):
    """Steps from random gradients of very different size; one parameter once has none, one step has another lr."""
    norms = []
    for i in steps:
        numbers = torch.Generator().manual_seed(i)
        for j, p in enumerate(model.parameters()):
            p.grad = None if j == i == 1 else torch.randn(p.shape, generator=numbers) * 10.0 ** (i % 4 - 2)
        norms.append(optimizer.step(0.5 if i == 3 else 1.0))
    return norms

class Plain:
    """torch's own AdamW and clipping."""

    def __init__(self, model, lr):
        self.parameters, self.lr = list(model.parameters()), lr
        self.adamw = torch.optim.AdamW(self.parameters, lr, weight_decay=0.0)

    def step(self, scale):
        self.adamw.param_groups[0]["lr"] = self.lr * scale
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0).item()
        self.adamw.step()
        return norm

def state_of(optimizer):
    """What a checkpoint holds of it."""
    masters, moments = optimizer.masters, optimizer.adamw.state
    return copy.deepcopy({name: {"master": p.detach(), **moments[p]} for name, p in masters.items()})

def test_sharded_adamw_is_adamw_with_clipping():
    ours, plain = reward_model(), reward_model()
    before = weights(ours)
    norms = noisy_steps(ours, save.ShardedAdamW(ours, 1e-2, CPU), range(6))
    assert norms == pytest.approx(noisy_steps(plain, Plain(plain, 1e-2), range(6)), rel=1e-5)
    assert min(norms) < 1 < max(norms) and all(p.grad is None for p in ours.parameters())
    same(weights(ours), weights(plain), 1e-6)
    assert not any(torch.equal(p, before[name]) for name, p in ours.named_parameters())

def test_a_models_gradients_are_gone_when_adamw_steps():
    """Each makes room for its fp32 copy: two bytes a parameter that set the peak of an update."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).bfloat16()
    optimizer, alive = save.ShardedAdamW(model, 1e-2, CPU), []
    model(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    gradients = [weakref.ref(p.grad) for p in model.parameters()]
    step = optimizer.adamw.step
    optimizer.adamw.step = lambda: (alive.extend(ref() is not None for ref in gradients), step())
    optimizer.step()
    assert alive == [False] * 4

def test_masters_move_where_bf16_weights_cannot():
    torch.manual_seed(0)
    model, cfg = nn.Linear(64, 64, bias=False), dataclasses.replace(CPU, dtype="bfloat16")
    model.weight.data = (torch.randn(64, 64) * 0.02).bfloat16()  # a bf16 checkpoint
    start, plain = model.weight.detach().float(), nn.Parameter(model.weight.detach().clone())
    optimizer = save.ShardedAdamW(model, 1e-7, cfg, keep_initial=True)
    adamw = torch.optim.AdamW([plain], 1e-7, weight_decay=0.0)
    for _ in range(300):
        model.weight.grad, plain.grad = torch.ones_like(model.weight), torch.ones_like(plain)
        optimizer.step()
        adamw.step()
    masters = optimizer.masters["weight"].detach()
    same(start - masters, torch.full((64, 64), 300e-7), 1e-6)
    changed, without = ((w.float() != start).float().mean() for w in (model.weight, plain))
    assert without < 0.02 and 0.1 < changed < 0.9
    after = model.weight.detach().clone()
    assert ((after.float() - masters).abs() <= masters.abs() / 128).all()  # a neighbour in bf16
    optimizer.publish(optimizer.initial)  # the reference model
    same(model.weight.detach().float(), start)
    optimizer.publish(optimizer.masters)
    same(model.weight.detach(), after)

def test_bf16_copies_show_every_change_on_average_and_keep_what_they_can_hold():
    grid = torch.randn(2 ** 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    moved = grid.float() * (1 - 2 ** -12)  # a sixteenth to an eighth of a step of bf16: rounding to nearest undoes it
    copies = [save.dithered(torch.empty_like(grid), moved, name) for name in "aab"]
    change = ((copies[0].float() - grid.float()) / grid.float()).mean().item()
    assert torch.equal(moved.bfloat16(), grid) and change == pytest.approx(-2 ** -12, rel=0.1)
    assert torch.equal(copies[0], copies[1]) and not torch.equal(copies[0], copies[2])
    same(save.dithered(torch.empty_like(grid), grid, "a"), grid)

@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = reward_model()
    optimizer = save.ShardedAdamW(model, 1e-2, CPU)
    noisy_steps(model, optimizer, range(2))
    before, state = weights(model), state_of(optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.value_head.bias.grad.fill_(bad)
    with pytest.raises(FloatingPointError, match="gradient norm"):
        optimizer.step()
    same(weights(model), before)
    for name, after in state_of(optimizer).items():
        same(after, state[name])

@pytest.mark.parametrize("world, loads", [(2, [12, 12]), (8, [7, 6, 5, 3, 2, 1, 0, 0])])
def test_ranks_own_disjoint_balanced_shares_that_make_one_adamw(monkeypatch, world, loads):
    def build():
        return nn.ParameterDict({str(n): nn.Parameter(torch.linspace(-1, 1, n)) for n in (1, 2, 3, 5, 6, 7)})

    plain, owned = build(), {}
    noisy_steps(plain, Plain(plain, 1e-2), range(3))
    monkeypatch.setattr(save, "WORLD", world)
    monkeypatch.setattr(save, "broadcast", lambda tensor, source: None)
    for rank in range(world):
        monkeypatch.setattr(save, "RANK", rank)
        model = build()
        optimizer = save.ShardedAdamW(model, 1e-2, CPU)
        noisy_steps(model, optimizer, range(3))
        assert sum(p.numel() for p in optimizer.masters.values()) == loads[rank]
        assert not owned.keys() & optimizer.masters.keys()
        owned.update({name: model[name].detach() for name in optimizer.masters})
    same(owned, {name: plain[name].detach() for name in owned}, 1e-7)
    assert owned.keys() == weights(plain).keys()

def test_a_linear_schedule_ends_at_0(tmp_path, monkeypatch):
    scales = []
    monkeypatch.setattr(save, "save_step", lambda run, prompts: scales.append(run.lr_scale))
    for name, want in (("linear", [1, 3 / 4, 1 / 2, 1 / 4]), ("constant", [1, 1, 1, 1])):  # a fifth would be 0
        cfg = dataclasses.replace(CPU, lr_schedule=name, steps=4, save_every=0, out=str(tmp_path / name))
        save.each_step(save.Run(cfg, None, log=save.Log(cfg)), "save", [], {}, [])
        assert scales == want
        scales.clear()

# ---------------------------------------------------------------- the three steps
def bits(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])

# four groups of four responses: both signs, one sign only, both, a single survivor
POSITIVE, NEGATIVE = bits("1010", "1100", "1000", "0010"), bits("0100", "0000", "0011", "0000")
USABLE = bits("1111", "1110", "0000", "1101")
TEXTS = ("abc", "ja", "dddddddd", "h")

class Recording(save.ShardedAdamW):
    """Keeps the weights and the gradients of each of its steps."""

    def step(self, *args):
        named = [(name, p) for name, p in self.named if p.grad is not None]
        self.seen.append(({name: p.detach().clone() for name, p in named}, {name: p.grad for name, p in named}))
        return super().step(*args)

def make_run(out, **options):
    """A Run as save.train makes it, its prompts and its first batch."""
    defaults = dict(stage="save", device="cpu", out=str(out), batch=4, group=4, steps=4, max_new_tokens=10, top_p=1.0,
                    lr_rm=1e-2, lr_policy=1e-3, lr_value=1e-2, save_every=0)
    cfg = save.Config(**{**defaults, **options}).checked()
    run = save.Run(cfg, reward_model(), policy(), save.Log(cfg))
    run.optimizers = {"rm": Recording(run.rm.model, cfg.lr_rm, cfg),
                      "value": Recording(run.rm.value_head, cfg.lr_value, cfg),
                      "policy": Recording(run.policy.model, cfg.lr_policy, cfg, keep_initial=True)}
    for optimizer in run.optimizers.values():
        optimizer.seen = []
    asked = [[{"role": "user", "content": text}] for text in TEXTS]
    prompts = [(messages, save.encode_chats(run.policy.tokenizer, [messages], True)[0]) for messages in asked]
    batch = save.sample(run, prompts, cfg.group, 1)
    save.score_batch(run, batch)
    return run, prompts, batch

def changed(module, before):
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}

def test_responses_are_put_into_the_words_of_both_models(tmp_path):
    run, prompts, batch = make_run(tmp_path)
    for row, ((ids, length), (chat, prompt_length)) in enumerate(zip(batch.sequences, batch.chats)):
        text, response, ended = TEXTS[row // 4], ids[length:], ids[-1] == END
        said = run.policy.tokenizer.decode(response, skip_special_tokens=True)
        assert run.policy.tokenizer.decode(ids[:length]) == f"<user>{text}<end><assistant>"
        assert run.rm.tokenizer.decode(chat) == f"<s><user>{text}<end><assistant>{said}<end>"
        assert run.rm.tokenizer.decode(chat[:prompt_length]) == f"<s><user>{text}<end>"
        assert [x.flatten()[row].item() for x in (batch.lengths, batch.ended)] == [len(response), ended]
    assert 0 < batch.ended.sum() < 16 and len({tuple(ids) for ids, _ in batch.sequences}) == 16
    same(batch.rewards.flatten(), stock_rewards(run.rm.model, batch.chats), 1e-5)
    same(batch.features, prompt_features(run.rm.model, batch.chats[::4]), 1e-5)
    draws = [save.sample(run, prompts, 4, *key).sequences for key in ((1,), (2,), (1, "value"))]
    assert draws[0] == batch.sequences and draws[0] != draws[1] != draws[2] != draws[0]

@pytest.mark.parametrize("micro_tokens", (1, 60, 10**6))
@pytest.mark.parametrize("update", ("save", "mean_reward"))
def test_the_reward_model_step_has_the_gradient_of_the_plain_graph(tmp_path, update, micro_tokens):
    run, _, batch = make_run(tmp_path, rm_update=update, micro_tokens=micro_tokens)
    batch.ended, before, forwarded = USABLE, weights(run.rm), []
    rewards, values = run.rm(*save.model_inputs(batch.chats, "cpu"))
    groups = [rewards.view(4, 4)[p][USABLE[p]] for p in range(4)]
    means = torch.stack([(group if len(group) else row).mean() for group, row in zip(groups, rewards.view(4, 4))])
    loss = save.contrastive_loss(rewards.view(4, 4), values[::4] if update == "save" else means, POSITIVE, NEGATIVE)
    rewards.retain_grad()
    want = gradients(run.rm.model, loss)

    def before_forward(rm, inputs):
        forwarded.append(len(inputs[0]))
        assert rm.training  # where transformers recomputes activations

    run.rm.register_forward_pre_hook(before_forward)
    assert save.reward_model_step(run, batch, POSITIVE, NEGATIVE) is True
    same(run.optimizers["rm"].seen[0][1], want, 1e-5)
    assert run.log.record["common_push"] == pytest.approx(rewards.grad.sum().item(), abs=1e-6)
    assert sum(forwarded) == 6  # rows with a gradient: the kept ones of both valid prompts
    assert changed(run.rm, before) == {f"model.{name}" for name in want}
    assert not run.rm.training

def test_without_valid_prompts_only_the_value_head_learns(tmp_path):
    run, _, batch = make_run(tmp_path)
    before = weights(run.rm)
    assert save.reward_model_step(run, batch, POSITIVE, torch.zeros_like(NEGATIVE)) is False
    assert not changed(run.rm, before) and not run.optimizers["rm"].seen
    some, values = [p for p in range(4) if USABLE[p].any()], run.rm.value(batch.features).tolist()
    errors = [values[p] - batch.rewards[p][USABLE[p]].mean().item() for p in some]
    save.value_step(run, batch.rewards, batch.features, USABLE)
    assert run.log.record["value_loss"] == pytest.approx(sum(e * e for e in errors) / 3, rel=1e-5)
    want = sum(2 * e * batch.features[p] for e, p in zip(errors, some)) / 3
    same(run.optimizers["value"].seen[0][1]["weight"][0], want, 1e-4)
    assert changed(run.rm, before) == {"value_head.weight", "value_head.bias"}

def plain_policy_loss(cfg, batch, trained, model, old_model, initial, prompts):
    """Step 3 row by row, from the whole logits of plain transformers."""
    losses = []
    for p in prompts:
        kept = [g for g in range(4) if trained[p][g]]
        lp, old, ref = ({g: plain_log_probs(m, *batch.sequences[4 * p + g], cfg.temperature) for g in kept}
                        for m in (model, old_model, initial))
        rewards = {g: batch.rewards[p, g].item() for g in kept}
        if cfg.algo == "rloo":
            rewards = {g: r - cfg.kl_coef * (old[g] - ref[g]).sum().item() for g, r in rewards.items()}
        for g in kept:
            advantage = rewards[g] - statistics.mean(r for h, r in rewards.items() if h != g)
            if cfg.algo != "rloo":
                spread = statistics.stdev(rewards.values())
                advantage = (rewards[g] - statistics.mean(rewards.values())) / (spread + 1e-4)
            change, gap = lp[g] - old[g].detach(), ref[g].detach() - lp[g]
            ratio = {"grpo": change, "gspo": change.mean(), "rloo": change.sum()}[cfg.algo].exp()
            low, high = {"grpo": (0.8, 1.2), "gspo": (0.9997, 1.0004), "rloo": (0.8, 1.2)}[cfg.algo]
            gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
            kl = 0 if cfg.algo == "rloo" else cfg.kl_coef * (gap.exp() - gap - 1)
            losses.append((kl - gain).mean())
    return sum(losses) / len(losses)

@pytest.mark.parametrize("algo", ("grpo", "gspo", "rloo"))
@pytest.mark.parametrize("options", [{}, {"num_minibatches": 2}, {"micro_tokens": 1}, {"kl_coef": 0.0}], ids=str)
def test_the_policy_step_has_the_gradient_of_the_formulas(tmp_path, algo, options):
    run, _, batch = make_run(tmp_path, algo=algo, **{"kl_coef": 0.3, **options})
    cfg, optimizer, initial = run.cfg, run.optimizers["policy"], copy.deepcopy(run.policy.model)
    noisy_steps(run.policy.model, optimizer, range(3))  # away from the reference
    old, trained = copy.deepcopy(run.policy.model), (POSITIVE | NEGATIVE) & bits("1111", "1111", "1111", "0000")
    save.policy_step(run, batch, POSITIVE | NEGATIVE)
    parts = [range(2), range(2, 4)] if cfg.num_minibatches == 2 else [range(4)]
    assert len(optimizer.seen) == 3 + len(parts)
    for part, (at, got) in zip(parts, optimizer.seen[3:]):
        model = copy.deepcopy(old)
        model.load_state_dict(at, strict=False)
        same(got, gradients(model, plain_policy_loss(cfg, batch, trained, model, old, initial, part)), 2e-5)
    assert changed(run.policy.model, weights(old)) == set(got)

def test_single_survivors_train_nothing(tmp_path):
    run, _, batch = make_run(tmp_path)
    before = weights(run.policy)
    save.policy_step(run, batch, bits("1000", "0001", "0000", "0010"))
    assert not changed(run.policy, before) and not run.optimizers["policy"].seen

@pytest.mark.parametrize("options", [{}, {"m0": 0}, {"rm_update": "mean_reward"}, {"rm_update": "none"}], ids=str)
def test_a_step_filters_trains_and_scores_again_as_algorithm_2_says(tmp_path, monkeypatch, options):
    run, prompts, _ = make_run(tmp_path, group=8, lr_rm=0.02, steps=8, **options)
    update, calls, anchors, before = run.cfg.rm_update, {}, [], weights(run.rm)
    for name in ("reward_model_step", "policy_step"):
        def call(run, batch, *masks, name=name, inner=getattr(save, name)):
            calls[name] = copy.copy(batch), masks
            anchors.append(run.rm.value(batch.features).tolist())
            return inner(run, batch, *masks)
        monkeypatch.setattr(save, name, call)
    run.step, mixed = 2, [None] * 8
    for place, prompt in zip(save.draw(range(8), 0, "prompts", 4, 4), prompts):  # step 2 takes the second four
        mixed[place] = prompt
    save.save_step(run, mixed)
    batch, (kept,) = calls["policy_step"]
    assert batch.prompts == prompts
    same(batch.rewards.flatten(), stock_rewards(run.rm.model, batch.chats), 1e-5)  # by the reward model as it is now
    assert len(run.optimizers["policy"].seen) == 1 and 0 < batch.ended.sum() < 32
    if update == "none":
        assert not changed(run.rm, before) and kept.all() and "reward_model_step" not in calls
        return
    first, (positive, negative) = calls["reward_model_step"]
    shift = (batch.rewards - first.rewards).abs().mean().item()
    assert run.log.record["reward_shift"] == pytest.approx(shift) and shift > 0.01
    for name, at in (("reward_spread", first), ("spread_after", batch)):
        assert run.log.record[name] == pytest.approx(at.rewards.std(1).mean().item())
    assert len(run.optimizers["rm"].seen) == 1
    mu = (2 - min(1 - run.cfg.m0 + 2 / 8, 1)) / 2
    for at, masks, allowed in ((first, positive | negative, batch.ended),
                               (batch, kept, torch.ones_like(batch.ended))):
        values = anchors[at is batch] if update == "save" else [at.rewards[p][at.ended[p]].mean() for p in range(4)]
        keep = [[allowed[p][g] and abs(at.rewards[p][g] - values[p]) >= math.log(mu / (1 - mu)) for g in range(8)]
                for p in range(4)]
        assert masks.tolist() == keep and 0 < masks.sum() <= (31 if run.cfg.m0 else 32)
        if at is first:
            assert positive.tolist() == [[k and r >= v for r, k in zip(*row)] for *row, v in
                                         zip(at.rewards.tolist(), keep, map(float, values))]
    if update == "save":  # Eq. 21 with the new rewards and features: the gradient of the bias is 2 (V - mean R)
        head, grads = run.optimizers["value"].seen[0]
        values = (prompt_features(run.rm.model, batch.chats[::8]) @ head["weight"].T + head["bias"])[:, 0]
        errors = [values[p] - batch.rewards[p][batch.ended[p]].mean() for p in range(4)]
        same(grads["bias"], 2 * torch.stack(errors).mean()[None], 1e-5)
    assert len(run.optimizers["value"].seen) == (update == "save")

def test_the_preference_step_has_the_gradient_of_the_plain_graph(tmp_path):
    run, _, _ = make_run(tmp_path, stage="preference", steps=1, micro_tokens=150)
    rows = chats(run.rm) + chats(run.rm)[::-1]
    pairs, forwarded = list(zip(rows[:4], rows[4:8])), []
    rewards = run.rm(*save.model_inputs(rows[:8], "cpu"))[0]
    margins = rewards[:4] - rewards[4:]
    want = gradients(run.rm.model, (1 + (-margins).exp()).log().mean())
    run.rm.register_forward_pre_hook(lambda module, inputs: forwarded.append(len(inputs[0])))
    save.preference_step(run, pairs)
    assert sum(forwarded) == 8 and len(forwarded) > 1 and max(forwarded) > 2
    same(run.optimizers["rm"].seen[0][1], want, 1e-5)
    accuracy = (margins > 0).float().mean()
    assert run.log.record["rm_accuracy"] == accuracy and 0 < accuracy < 1

def test_stage_value_judges_v_on_prompts_that_it_was_not_fitted_to(tmp_path, monkeypatch):
    """Of 64 prompts the last six, worked out by hand: three have no response that ended: no target, not one of 0."""
    run, prompts, batch = make_run(tmp_path, value_prompts=64, value_k=4, value_epochs=2,
                                   lr_schedule="linear")
    rewards, ended = torch.arange(256.0).view(64, 4) % 7, torch.ones(64, 4, dtype=torch.bool)
    rewards[-6:] = torch.tensor([*[[9.0, 9, 9, 9]] * 4, [4, 1, 0, -3], [2, 2.2, 5, 6]])
    ended[-6:] = bits("0000", "0000", "0000", "0000", "1111", "1110")
    features, fitted, scales = torch.eye(64), [], []

    def sampled(run, prompts, group, start, purpose):
        rows = slice(4 * (start // 4), 4 * (start // 4) + 4)
        batch.rewards, batch.features, batch.ended = rewards[rows], features[rows], ended[rows]
        return batch
    monkeypatch.setattr(save, "sample", sampled)
    monkeypatch.setattr(save, "score_batch", lambda run, batch: None)
    monkeypatch.setattr(save, "value_step", lambda run, rewards, features, usable: (
        fitted.append(features.argmax(1)), scales.append(run.lr_scale),
        torch.nn.init.ones_(run.rm.value_head.bias)))  # V = 1
    run.rm.value_head = torch.nn.Linear(64, 1)
    save.value_stage(run, prompts * 16)
    assert torch.cat(fitted).tolist() == [*range(58)] * 2  # each of the others twice, these never
    assert scales == pytest.approx([1, 0.75, 0.5, 0.25])  # of 32 and 26 prompts, twice
    record = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    means = 0.5, 9.2 / 3
    error = ((1 - means[0]) ** 2 + (1 - means[1]) ** 2) / 2
    assert record["value_r2"] == pytest.approx(1 - error / ((means[1] - means[0]) / 2) ** 2, rel=1e-5)
