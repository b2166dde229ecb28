"""The pure functions of save.py against answers that come from elsewhere: numbers worked by hand, the paper's formulas
as loops over Python floats (math only, no torch), closed-form gradients, finite differences in float64, identities."""

import math
import random

import pytest
import torch

import save

INF, NAN = float("inf"), float("nan")

def f64(x):
    return x.detach().double() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64)

def bits(*rows):
    """bits("10", "01") is the boolean mask [[True, False], [False, True]]."""
    return torch.tensor([[c == "1" for c in row] for row in rows])

def near(got, want, tol=1e-9):
    got, want = f64(got), f64(want)
    assert got.shape == want.shape and torch.allclose(got, want, rtol=tol, atol=tol), f"\n{got}\nis not\n{want}"

def learn(f, *inputs):
    """The loss, then its gradient for every floating input: exact zeros where none flows. Every loss must have a graph,
    also when it is 0, because under DDP every rank has to call backward."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    loss = f(*inputs)
    assert loss.shape == ()
    loss.backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs if x.is_floating_point()]
    assert all(g.isfinite().all() for g in grads)
    return loss.detach(), *grads

def numeric_gradient(f, x, eps=1e-6):
    steps = eps * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    return torch.stack([(f(x + e) - f(x - e)) / (2 * eps) for e in steps]).view(x.shape)

def groups(seed, p=6, g=5, scale=2.0):
    """Rewards (P,G), values (P,) and a mask (P,G), as nested lists."""
    rng = random.Random(seed)
    rewards = [[rng.gauss(1.0, scale) for _ in range(g)] for _ in range(p)]
    values = [rng.gauss(1.0, scale / 2) for _ in range(p)]
    return rewards, values, [[rng.random() < 0.7 for _ in range(g)] for _ in range(p)]

def split(rewards, values, mask, threshold=0.5):
    """Eq. 15-17 as loops."""
    rows = [[(r - v, k and 1 / (1 + math.exp(-abs(r - v))) >= threshold) for r, k in zip(row, keep)]
            for row, v, keep in zip(rewards, values, mask)]
    positive = [[k and a >= 0 for a, k in row] for row in rows]
    negative = [[k and a < 0 for a, k in row] for row in rows]
    return positive, negative, [any(p) and any(n) for p, n in zip(positive, negative)]

# ---------------------------------------------------------------- curriculum, Eq. 14
@pytest.mark.parametrize("m0, first_margin, opens", [(0.3, 0.612, 96), (0.5, 1.090, 160), (0.7, 1.722, 224)])
def test_the_curriculum_starts_at_the_margin_and_opens_at_m0_times_T(m0, first_margin, opens):
    mu = [save.curriculum_threshold(t, 320, m0) for t in range(1, 321)]
    assert math.log(mu[0] / (1 - mu[0])) == pytest.approx(first_margin, abs=6e-4)
    assert mu[opens - 2] > 0.5 and all(m == 0.5 for m in mu[opens - 1:])  # p is capped at 1, so mu stays at 1/2
    assert all(a > b for a, b in zip(mu[:opens], mu[1:opens]))

def test_the_curriculum_by_hand():
    for step, total, m0, mu in [(1, 320, 0.5, 0.7484375), (80, 320, 0.5, 0.625), (1, 10, 1.0, 0.95), (1, 10, 0.0, 0.5)]:
        assert save.curriculum_threshold(step, total, m0) == pytest.approx(mu, abs=1e-12)

# ---------------------------------------------------------------- advantages and partition, Eq. 13, 15-17
def test_rm_advantages_subtract_each_prompts_own_value():
    near(save.rm_advantages(f64([[3.0, 1.0], [0.5, -2.0]]), f64([2.0, -1.0])), [[1.0, -1.0], [1.5, -1.0]])
    near(save.rm_advantages(f64([[3.0, 1.0, 0.0]]), f64([2.0])), [[1.0, -1.0, -2.0]])

@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7484375, 0.9])
def test_partition_is_the_papers_loop(threshold, masked):
    rewards, values, usable = groups(int(threshold * 100), p=40, g=4)
    want = split(rewards, values, usable if masked else [[True] * 4] * 40, threshold)
    assert 0 < sum(want[2]) < 40 and any(any(p) and not any(n) for p, n in zip(*want[:2]))
    a = f64(rewards) - f64(values)[:, None]
    got = save.partition(a, threshold, torch.tensor(usable)) if masked else save.partition(a, threshold)
    assert [x.dtype for x in got] == [torch.bool] * 3 and [x.tolist() for x in got] == list(want)

def test_an_advantage_on_the_boundary_is_kept_and_zero_counts_as_positive():
    positive, negative, valid = save.partition(torch.tensor([[0.0, -0.0, -1e-3]]), 0.5)
    assert positive.equal(bits("110")) and negative.equal(bits("001")) and valid.all()
    edge = math.log(0.7484375 / 0.2515625)  # sigma(edge) = mu(1) of the paper
    positive, negative, _ = save.partition(f64([[edge + 1e-6, edge - 1e-6, -edge - 1e-6, 1e-6 - edge]]), 0.7484375)
    assert positive.equal(bits("1000")) and negative.equal(bits("0010"))

def test_table_7_both_answers_lie_above_the_anchor_so_save_does_not_pit_them_against_each_other():
    rewards, value = f64([[7.469, 7.719]]), f64([5.375])
    positive, negative, valid = save.partition(save.rm_advantages(rewards, value), 0.7484375)
    assert positive.all() and not negative.any() and not valid.any()
    loss, slope, _ = learn(save.contrastive_loss, rewards, value, positive, negative)
    assert loss == 0 and not slope.any()

# ---------------------------------------------------------------- the contrastive loss, Eq. 18-20
def contrastive_by_loop(rewards, values, positive, negative):
    """The loss and dL/dR: -1/n + e^R/S+ on Y+, e^R/S- on Y-."""
    loss, slope = 0.0, [[0.0] * len(row) for row in rewards]
    count = sum(any(p) and any(n) for p, n in zip(positive, negative))
    for r, v, pos, neg, out in zip(rewards, values, positive, negative, slope):
        if any(pos) and any(neg):
            s_up = math.exp(v) + sum(math.exp(x) for x, p in zip(r, pos) if p)
            s_down = math.exp(v) + sum(math.exp(x) for x, n in zip(r, neg) if n)
            loss -= math.log(math.exp(v) / s_down) / count
            for j, x in enumerate(r):
                if pos[j]:
                    loss -= math.log(math.exp(x) / s_up) / sum(pos) / count
                    out[j] = (math.exp(x) / s_up - 1 / sum(pos)) / count
                if neg[j]:
                    out[j] = math.exp(x) / s_down / count
    return loss, slope

def test_contrastive_loss_by_hand():
    """e^V = 1, Y+ = {log 2, log 5}, Y- = {-log 4}: L+ = -(log 2/8 + log 5/8)/2, L- = -log 1/(1 + 1/4)."""
    r = f64([[math.log(2), math.log(5), -math.log(4), 9.0]])
    loss, slope, _ = learn(save.contrastive_loss, r, f64([0.0]), bits("1100"), bits("0010"))
    near(loss, -(math.log(2 / 8) + math.log(5 / 8)) / 2 + math.log(5 / 4))
    near(slope, [[2 / 8 - 1 / 2, 5 / 8 - 1 / 2, 1 / 5, 0.0]])  # the best answer is pushed down: L+ equalises Y+

@pytest.mark.parametrize("seed", range(5))
def test_contrastive_loss_and_gradient_are_the_papers(seed):
    rewards, values, mask = groups(seed, p=8)
    positive, negative, valid = split(rewards, values, mask)
    if seed % 2:  # the loss must take the sets as given (Step 1's), not recompute them from today's rewards
        rewards = groups(seed + 100, p=8)[0]
    assert 0 < sum(valid) < 8 and len({(sum(p), sum(n)) for p, n in zip(positive, negative)}) > 3
    pos, neg, v = torch.tensor(positive), torch.tensor(negative), f64(values)
    want, want_slope = contrastive_by_loop(rewards, values, positive, negative)
    loss, slope, slope_v = learn(save.contrastive_loss, f64(rewards), v, pos, neg)
    near(loss, want)
    near(slope, want_slope)
    near(slope, numeric_gradient(lambda r: save.contrastive_loss(r, v, pos, neg), f64(rewards)), 1e-7)
    used = (pos | neg) & torch.tensor(valid)[:, None]
    assert (slope[~used] == 0).all() and (slope[used] != 0).all()
    assert (slope_v == 0).all()  # SG[V]

def test_filtered_rows_and_one_sided_prompts_do_not_matter_however_large():
    pos, neg, s = bits("100", "110", "000", "000"), bits("010", "000", "011", "000"), 1 / (1 + math.e)
    r = torch.tensor([[1.0, -1.0, 1e30], [1e30, 3.0, -1e30], [1e30, 2.0, 1e30], [1e30, 1e30, 0.0]])
    loss, slope, _ = learn(save.contrastive_loss, r, torch.zeros(4), pos, neg)
    near(loss, 2 * math.log(1 + math.exp(-1)), 1e-6)
    near(slope[0, :2], [-s, s], 1e-6)
    assert (slope[1:] == 0).all() and slope[0, 2] == 0

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_contrastive_loss_survives_rewards_of_ten_thousand(dtype, shift):
    """One row on each side. Right side: loss 0. Wrong side: the margin itself, slope -1 and +1."""
    for r, want, want_slope in [([1e4, -1e4], 0.0, [0.0, 0.0]), ([-1e4, 1e4], 2e4, [-1.0, 1.0])]:
        r, v = torch.tensor([r], dtype=dtype) + shift, torch.tensor([shift], dtype=dtype)
        loss, slope, _ = learn(save.contrastive_loss, r, v, bits("10"), bits("01"))
        near(loss, want)
        near(slope, [want_slope])

# ---------------------------------------------------------------- the value loss, Eq. 12 and 21
def test_value_loss_by_hand():
    v, r = f64([1.0, -2.0]), f64([[2.0, 4.0, 3.0], [0.0, 0.0, -3.0]])
    loss, slope_v, slope_r = learn(save.value_loss, v, r)
    near(loss, (4 + 1) / 2)  # targets 3 and -1
    near(slope_v, [-2.0, -1.0])  # 2 (V - target) / 2
    near(slope_v, numeric_gradient(lambda x: save.value_loss(x, r), v), 1e-7)
    assert (slope_r == 0).all()  # SG[R]
    v, r = f64([1.0, 10.0, -2.0]), f64([[2.0, 4.0, 9e9], [7.0, -9e9, 9e9], [0.0, -3.0, -9.0]])
    loss, slope_v, slope_r = learn(save.value_loss, v, r, bits("110", "000", "111"))
    near(loss, (4 + 4) / 2)  # targets 3, none, -4: a prompt without a usable row is not in the mean
    near(slope_v, [-2.0, 0.0, 2.0])
    assert slope_v[1] == 0 and (slope_r == 0).all()

# ---------------------------------------------------------------- Bradley-Terry, Eq. 2 and 11
def test_bradley_terry_by_hand():
    chosen, rejected = f64([2.0, math.log(3), 0.0]), f64([2.0, 0.0, math.log(3)])
    loss, slope_chosen, slope_rejected = learn(save.bradley_terry_loss, chosen, rejected)
    near(loss, (math.log(2) + math.log(4 / 3) + math.log(4)) / 3)  # P(chosen wins) = 1/2, 3/4, 1/4
    near(slope_chosen, [-1 / 6, -1 / 12, -1 / 4])
    near(slope_rejected, [1 / 6, 1 / 12, 1 / 4])
    far = torch.tensor([1e4, -1e4])  # margins of 2e4: losses 0 and 2e4
    loss, slope_chosen, _ = learn(save.bradley_terry_loss, far, -far)
    near(loss, 1e4)
    near(slope_chosen, [0.0, -0.5])

NOTHING, SOME = bits("000", "000"), bits("110", "000")

@pytest.mark.parametrize("loss", [lambda r, v: save.contrastive_loss(r, v, NOTHING, NOTHING),
                                  lambda r, v: save.contrastive_loss(r, v, SOME, NOTHING),
                                  lambda r, v: save.contrastive_loss(r, v, NOTHING, SOME),
                                  lambda r, v: save.value_loss(v, r, NOTHING)])
def test_with_nothing_to_learn_from_a_loss_is_zero_with_a_zero_gradient(loss):
    assert not any(x.any() for x in learn(loss, f64([[1.0, 2.0, 4.0], [3.0, 3.0, 5.0]]), f64([0.0, 5.0])))

# ---------------------------------------------------------------- group advantages
def advantages_by_loop(rewards, keep, algo):
    out = [[0.0] * len(r) for r in rewards]
    for i, (row, kept) in enumerate(zip(rewards, keep)):
        mine = [r for r, k in zip(row, kept) if k]
        for j, r in enumerate(row):
            if kept[j] and len(mine) > 1 and algo == "grpo":
                mean = sum(mine) / len(mine)
                out[i][j] = (r - mean) / (math.sqrt(sum((x - mean) ** 2 for x in mine) / (len(mine) - 1)) + 1e-4)
            if kept[j] and len(mine) > 1 and algo == "rloo":
                siblings = [x for k, x in enumerate(row) if kept[k] and k != j]
                out[i][j] = r - sum(siblings) / len(siblings)
    return out

@pytest.mark.parametrize("algo", ["grpo", "rloo"])
@pytest.mark.parametrize("scale", [2.0, 1e-4])  # at 1e-4 the 1e-4 beside the std is half of the divisor
def test_group_advantages_are_the_loop_over_kept_rows(algo, scale):
    rewards, _, keep = groups(7, p=30, g=4, scale=scale)
    keep[0] = [False] * 4
    assert {sum(k) for k in keep} == {0, 1, 2, 3, 4}
    f = {"grpo": save.grpo_advantages, "rloo": save.rloo_advantages}[algo]
    r, k = f64(rewards), torch.tensor(keep)
    got = f(r, k)
    near(got, advantages_by_loop(rewards, keep, algo), 1e-7)
    near(got.sum(1), [0.0] * 30, 1e-8)
    assert (got[~k] == 0).all() and (got[k.sum(1) < 2] == 0).all()
    near(f(r.where(k, f64(9e9)), k), got)  # filtered rewards do not leak in
    if algo == "rloo":
        near(f(r, r == r), 4 / 3 * (r - r.mean(1, keepdim=True)))  # G/(G-1) (r - mean)

@pytest.mark.parametrize("f", [save.grpo_advantages, save.rloo_advantages])
@pytest.mark.parametrize("reward", [0.0, 5.375, 7.7, -0.1])
def test_equal_rewards_give_exactly_zero(f, reward):
    for kept in range(8):  # in fp32 the mean of 7 equal numbers need not be that number
        got = f(torch.full((1, 7), reward), torch.arange(7)[None] < kept)
        assert (got == 0).all(), f"{kept} rewards of {reward}: {got}"

# ---------------------------------------------------------------- the policy loss
ALGOS = [*save.ALGORITHMS]
def algorithm(name):
    """The row of that name, with a range that is not the same on both sides."""
    return save.ALGORITHMS[name]._replace(clip=(0.2, 0.28))

def policy_loss_by_loop(lp, old, ref, adv, mask, algo, kl_coef, clip_low=0.2, clip_high=0.28):
    rows = []
    for i in range(len(lp)):
        tokens = [t for t in range(len(lp[i])) if mask[i][t]]
        logs, total = [lp[i][t] - old[i][t] for t in tokens], 0.0
        for t, log in zip(tokens, logs):
            ratio = math.exp({"rloo": sum(logs), "gspo": sum(logs) / len(logs)}.get(algo, log))
            a = adv[i][t] if isinstance(adv[i], list) else adv[i]
            total += min(ratio * a, min(max(ratio, 1 - clip_low), 1 + clip_high) * a)
            if algo in ("grpo", "gspo"):
                total -= kl_coef * (math.exp(ref[i][t] - lp[i][t]) - (ref[i][t] - lp[i][t]) - 1)
        if tokens:
            rows.append(total / len(tokens))
    return -sum(rows) / len(rows)

def batch(seed=0, on_policy=False):
    """Six ragged rows: the ratio above, below and inside the clip, for either sign of the advantage; row 6 is empty."""
    rng = random.Random(seed)
    lengths, offset, sign = [5, 3, 4, 2, 3, 5, 0], [0.4, -0.4, 0.01, 0.4, -0.4, -0.01, 0.4], [1, 1, 1, -1, -1, -1, 1]
    lp = [[rng.uniform(-3, -0.1) for _ in range(5)] for _ in lengths]
    old = [[x - (0 if on_policy else o + rng.uniform(-0.005, 0.005)) for x in row] for row, o in zip(lp, offset)]
    ref = [[x + rng.uniform(-0.8, 0.8) for x in row] for row in lp]
    return lp, old, ref, [s * rng.uniform(0.5, 2) for s in sign], [[t < n for t in range(5)] for n in lengths]

def policy(lp, old, ref, adv, mask, algo, kl_coef=0.04):
    """The loss and its gradient for log_probs; the old and the reference log-probs must have none."""
    def f(*inputs):
        masks = f64(adv), torch.as_tensor(mask)
        return save.policy_loss(*inputs, *masks, algo=algorithm(algo), kl_coef=kl_coef)[0]
    loss, slope, slope_old, slope_ref = learn(f, f64(lp), f64(old), f64(ref))
    assert (slope_old == 0).all() and (slope_ref == 0).all()
    return loss, slope

@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.04, 2.0])
def test_policy_loss_and_gradient_are_the_loop(algo, kl_coef):
    lp, *rest = batch()
    loss, slope = policy(lp, *rest, algo, kl_coef)
    near(loss, policy_loss_by_loop(lp, *rest, algo, kl_coef))
    near(slope, numeric_gradient(lambda x: f64(policy_loss_by_loop(x.tolist(), *rest, algo, kl_coef)), f64(lp)), 1e-7)
    assert (slope[~torch.tensor(rest[-1])] == 0).all()
    if kl_coef == 0 or algo == "rloo":  # clipped rows, and only they, are left alone
        assert slope.any(1).tolist() == [False, True, True, True, False, True, False]

@pytest.mark.parametrize("algo", ALGOS)
def test_policy_loss_takes_an_advantage_per_token(algo):
    lp, old, ref, adv, mask = batch(1)
    near(policy(lp, old, ref, [[a] * 5 for a in adv], mask, algo)[0], policy(lp, old, ref, adv, mask, algo)[0])
    if algo == "grpo":
        rng = random.Random(1)
        adv = [[a * rng.uniform(-1, 2) for _ in range(5)] for a in adv]
        near(policy(lp, old, ref, adv, mask, algo)[0], policy_loss_by_loop(lp, old, ref, adv, mask, algo, 0.04))

@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("ratio, adv, want", [(1.5, 1.0, -1.28), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8),
                                              (1.1, 2.0, -2.2), (0.9, -2.0, 1.8)])
def test_the_clip_by_hand(algo, ratio, adv, want):
    near(policy([[math.log(ratio)]], [[0.0]], [[math.log(ratio)]], [adv], [[True]], algo)[0], want)

@pytest.mark.parametrize("algo", ALGOS)
def test_the_kl_by_hand(algo):
    """pi = 2 ref on one token of two: k3 = 1/2 + log 2 - 1 there, 0 on the other; second row on the reference."""
    lp, ref = [[-1.0, -2.0], [-1.0, -1.0]], [[-1.0 - math.log(2), -2.0], [-1.0, -1.0]]
    mask, k3 = [[True, True], [True, False]], (math.log(2) - 0.5) / 2 / 2
    near(policy(lp, lp, ref, [0.0, 0.0], mask, algo, kl_coef=0.4)[0], 0.0 if algo == "rloo" else 0.4 * k3)
    inputs = map(f64, (lp, [[-2.0, -2.0], [-1.0, -1.0]], ref, [1.0, 1.0]))  # e of the old on one token of one row
    stats = save.policy_loss(*inputs, torch.tensor(mask), algo=algorithm(algo), kl_coef=0.0)[1]
    near(stats["kl"], k3)
    near(stats["clipped"], 1 / 2 / 2 if algo == "grpo" else 1 / 2)  # a row's ratio is that of each of its tokens

@pytest.mark.parametrize("algo", ALGOS)
def test_the_first_step_is_the_policy_gradient(algo):
    """At ratio 1 a token's gradient is -A/|o|, or -A for rloo (the log-prob of the whole answer); the slope of k3 is
    1 - ref/pi; mean over the 6 rows that have tokens. So grpo and gspo take the same first step."""
    lp, old, ref, adv, mask = batch(3, on_policy=True)
    kl = 0.5 if algo in ("grpo", "gspo") else 0.0
    want = [[(kl * (1 - math.exp(r - x)) - a) / (1 if algo == "rloo" else sum(m)) / 6 if k else 0.0
             for x, r, k in zip(xs, rs, m)] for xs, rs, a, m in zip(lp, ref, adv, mask)]
    near(policy(lp, old, ref, adv, mask, algo, kl_coef=0.5)[1], want)

@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("garbage", [-INF, NAN, 1e30])
def test_what_stands_under_the_mask_does_not_matter(algo, garbage):
    lp, old, ref, adv, mask = batch(5)
    per_token = [[a] * 5 for a in adv]
    dirty = [f64(x).where(torch.tensor(mask), f64(garbage)) for x in (lp, old, ref, per_token)]
    for got, want in zip(policy(*dirty, mask, algo), policy(lp, old, ref, adv, mask, algo)):
        near(got, want)
    assert not any(x.any() for x in policy(*dirty, [[False] * 5] * 7, algo))  # no row at all: 0, gradient 0

# ---------------------------------------------------------------- all of them
def test_no_function_writes_into_its_inputs():
    rewards, values, mask = groups(9)
    r, v, keep, (pos, neg, _) = f64(rewards), f64(values), torch.tensor(mask), map(torch.tensor, split(*groups(9)))
    calls = [(save.rm_advantages, r, v), (save.partition, r, 0.7, keep), (save.bradley_terry_loss, r[:, 0], r[:, 1]),
             (save.contrastive_loss, r, v, pos, neg), (save.value_loss, v, r, keep),
             (save.grpo_advantages, r, keep), (save.rloo_advantages, r, keep)]
    calls += [(lambda *x, a=a: save.policy_loss(*x, algo=a, kl_coef=0.04), *map(torch.tensor, batch()))
              for a in save.ALGORITHMS.values()]
    for f, *inputs in calls:
        before = [torch.as_tensor(x).clone() for x in inputs]
        f(*inputs)
        assert all(torch.equal(torch.as_tensor(x), y) for x, y in zip(inputs, before))
