"""The scripts of the real-data table and of the benchmarks, on tiny models: every stage runs, and on what it says."""
import contextlib
import gzip
import json
import math
import shutil
import sys
from pathlib import Path

import bench
import eval as evaluation
import pytest
import real
import real_quick as quick
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

import save

sys.path.insert(0, str(Path(__file__).resolve().parent / "forks"))
import balanced  # noqa: E402
import centred  # noqa: E402
import hl_bt  # noqa: E402

class InThisThread(contextlib.nullcontext):
    """save.main sets a signal handler, which only the main thread may."""

    def __enter__(self):
        return self

    map = staticmethod(map)

@pytest.mark.parametrize("given_rm", [pytest.param(True, marks=pytest.mark.slow), False])
def test_real_trains_every_method_from_one_reward_model_and_judges_all(world, tmp_path, monkeypatch, given_rm):
    scripts = {"save.py": save.main, "eval.py": evaluation.main, **{
        f"tests/forks/{fork.__name__}.py": fork.main for fork in (balanced, centred, hl_bt)}}
    monkeypatch.setattr(real, "call", lambda script, *words: scripts[script]([str(word) for word in words]))
    monkeypatch.setattr(real.concurrent.futures, "ThreadPoolExecutor", InThisThread)
    small = {"tokens": 64, "prompt": 8, "pairs": 16, "bench": [], "suffix": " x",
             "preference": "--batch 4 --device cpu",
             "save": "--steps 1 --batch 4 --group 4 --max_new_tokens 4 --value_prompts 4 --value_k 2 --device cpu"}
    monkeypatch.setattr(real, "FULL", small)
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "preferences").mkdir()
    for name in ("train", "heldout"):
        with gzip.open(tmp_path / "preferences" / f"preferences_{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs[:20])
    out = tmp_path / "out"
    words = ["--model", world / "policy", "--data", tmp_path, "--out", out,
             *(["--rm", world / "rm"] if given_rm else [])]
    real.main(list(map(str, words)))

    results = json.loads((out / "eval" / "results.json").read_text())
    folders = [str(out / name / "rm") for name in ("value", *real.METHODS)]
    assert [results[rm][str(out / "heldout.jsonl")]["rows"] for rm in folders] == [20] * 6
    for method in real.METHODS:
        config = json.loads((out / method / "metrics.jsonl").read_text().splitlines()[0])["config"]
        assert config["rm_update"] == method and config["rm"] == folders[0]
    prompts = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    short = [f"{row['prompt']} x" for row in map(json.loads, (out / "train.jsonl").read_text().splitlines())
             if len(row["prompt"].split()) <= 5]  # two words of the template, one of the suffix: at most 8
    assert prompts == short and 0 < len(prompts) < 16
    assert (out / "preference").exists() is not given_rm
    shutil.rmtree(out / "eval")
    monkeypatch.setitem(scripts, "save.py", lambda words: pytest.fail("a finished stage ran again"))
    real.main(list(map(str, [*words, "--methods", "hl_bt", "save"])))
    results = json.loads((out / "eval" / "results.json").read_text())
    assert [*results] == [str(out / name / "rm") for name in ("value", "hl_bt", "save")]

def test_both_forms_of_a_benchmark_do_the_same(world, capsys, monkeypatch):
    monkeypatch.setattr(bench, "memory_mb", lambda what: 0.0)
    monkeypatch.setattr(bench.pathlib.Path, "write_text", lambda *_: None)  # /proc/self/clear_refs
    monkeypatch.setattr(bench.torch, "randint", lambda low, high, *rest, randint=torch.randint, **more:
                        randint(*((5, 20) if high == 1000 else (low, high)), *rest, **more))

    def printed(measure, what, **args):
        measure(bench.argparse.Namespace(policy=str(world / "policy"), rm=str(world / "rm"), layers=2, **args))
        return json.loads(capsys.readouterr().out)[what]
    sums = [printed(bench.log_probs_variant, "sum", variant=variant, direction=direction)
            for variant in ("ours", "whole") for direction in ("forward", "backward")]
    assert sums == pytest.approx([sums[0]] * 4, rel=1e-5) and sums[0] < 0
    norms = [printed(bench.rm_memory_variant, "norm", variant=variant) for variant in ("held", "ours")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0
    bench.bench_cache(bench.argparse.Namespace(policy=str(world / "policy"), repeats=1, new=3))  # or it is refused
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == "40 40 300 300 800 800".split()

def test_a_larger_head_ranks_the_same(world, tmp_path):
    chats = [([0, 5, 6, 7, 8, 9][:n], 2) for n in (4, 5, 6)]
    before, after = (save.score(save.RewardModel.from_pretrained(str(path)), chats, 64)[0] for path in (
        world / "rm", real.scaled(world / "rm", tmp_path / "rm", 3.0)))
    assert after.tolist() == pytest.approx([3 * x for x in before.tolist()], rel=1e-5)

# ---- real_quick.py
@pytest.fixture
def small(world, tmp_path, monkeypatch):
    """The quick mode's sizes for the tiny world, its --data, and its scripts in this process -> words of real.main."""
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "preferences").mkdir()
    for name, own in (("train", pairs[:40]), ("heldout", pairs[40:60])):
        with gzip.open(tmp_path / "preferences" / f"preferences_{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in own)
    sizes = {"TOP": 1, "LAYERS": 2, "GROUP": 4, "BLOCK": 4, "OWN": 8, "PROMPTS": {"value": 6, "0": 6, "1": 4},
             "SIZE": {"tokens": 64, "prompt": 40, "pairs": 30, "suffix": " x"},
             "FLAGS": "--device cpu --save_every 0 --steps 2 --eval_every 1 --batch 2 --max_new_tokens 24 "
                      "--max_prompt_tokens 40 --value_k 2 --value_epochs 3 --micro_tokens 512"}
    for name, x in sizes.items():
        monkeypatch.setattr(quick, name, x)
    scripts = {"save.py": save.main, "tests/forks/centred.py": centred.main, "eval.py": evaluation.main}
    monkeypatch.setattr(real, "call", lambda script, *words: scripts[script]([str(word) for word in words]))
    monkeypatch.setattr(quick.concurrent.futures, "ProcessPoolExecutor", lambda *_: InThisThread(InThisThread()))
    return ["--quick", "--model", str(world / "policy"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]

CHATS = [([0, 5, 6, 7, 8, 9, 10][:n], 2 + n % 2) for n in (4, 5, 6, 7, 5)]  # the last is the second again

@pytest.fixture
def cached(world, tmp_path, monkeypatch):
    """The tiny RM of two layers -> whole, and the last of them on a table."""
    monkeypatch.setattr(quick, "TOP", 1)
    whole = save.RewardModel.from_pretrained(str(world / "rm"))
    torch.nn.init.normal_(whole.value_head.weight, generator=torch.Generator().manual_seed(0))
    rows = quick.numbered(tmp_path, whole, "a", CHATS)
    quick.numbered(tmp_path, whole, "b", CHATS[2:3])
    table, begins = quick.table_of(tmp_path, ["b", "a"])
    assert begins == {"b": 0, "a": 6} and len(table) == 6 + 4 + 5 + 6 + 7  # each different chat once
    rows = [(range(ids.start + 6, ids.stop + 6), n) for ids, n in rows]
    top = quick.top_of(world / "rm", table, whole.model.score.weight.data[0], whole.value_head.state_dict())
    return whole, top, rows

def test_the_fit_of_a_head_is_the_minimum():
    numbers = torch.Generator().manual_seed(0)
    gaps, weights = torch.randn(40, 6, generator=numbers).double(), torch.rand(40, generator=numbers).double()
    w = quick.bradley_terry_fit(gaps, weights / weights.sum(), 0.01).requires_grad_()
    loss = (weights / weights.sum() * -F.logsigmoid(gaps @ w)).sum() + 0.005 * (w ** 2).sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-12 and w.norm() > 0.1  # convex: this is the one minimum

def test_the_fit_is_chosen_on_prompts_that_it_has_not_seen(monkeypatch):
    prompts, numbers, seen = [f"p{i % 12}" for i in range(60)], torch.Generator().manual_seed(0), []
    gaps, weights = torch.randn(60, 3, generator=numbers).double(), torch.full((60,), 1 / 60).double()
    gaps[:, 2] = torch.arange(60) % 12  # which prompt it is
    plain = quick.bradley_terry_fit
    monkeypatch.setattr(quick, "bradley_terry_fit", lambda gaps, weights, strength: (
        seen.append((set(gaps[:, 2].tolist()), len(gaps), weights.sum().item())), plain(gaps, weights, strength))[1])
    w, best = quick.head_of(gaps, weights, prompts)
    assert all(5 * len(of) == rows and total == pytest.approx(1) for of, rows, total in seen)  # prompts are whole
    assert len(seen) % 11 == 1 and seen[-1][1] == 60 and {rows for _, rows, _ in seen[:-1]} - {60}
    assert torch.equal(w, plain(gaps, weights, best["strength"]))

def test_pairs_are_weighted_so_that_length_says_nothing():
    longer = torch.tensor([True, True, True, False])
    assert quick.even(longer).tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])
    gaps = torch.where(longer, 1.0, -1.0).double()[:, None]
    assert abs(quick.bradley_terry_fit(gaps, quick.even(longer), 0.1).item()) < 1e-12

def test_the_last_layers_on_a_table_are_the_whole_model(cached):
    whole, top, rows = cached
    for ours, known in zip(save.score(top, rows, 16), save.score(whole, CHATS, 16)):
        assert torch.allclose(ours, known, atol=1e-5) and ours.std() > 0.01
    assert torch.allclose(quick.last_states(top, rows) @ whole.model.score.weight[0], save.score(whole, CHATS, 64)[0],
                          atol=1e-5)
    assert {name for name, p in top.model.named_parameters() if not p.requires_grad} == {"model.embed_tokens.weight"}
    assert {name.split(".")[2] for name, _ in top.model.named_parameters() if "layers" in name} == {"0"}

def test_the_mlp_of_tokens_that_nothing_reads_is_not_missed(cached):
    grads, seen = [], []
    for rm, chats in zip(cached[:2], (CHATS, cached[2])):
        last = rm.model.base_model.layers[-1]
        last.mlp.gate_proj.register_forward_hook(lambda _, x, y: seen.append(x[0].shape[:-1].numel()))
        rewards, _ = rm(*save.model_inputs(chats, "cpu"))
        (rewards ** 2).sum().backward()
        grads.append([p.grad for p in last.parameters()])
    assert seen == [5 * 7, 5 * 2]  # every token, padding too; the end of each answer and each prompt
    for ours, known in zip(*grads):
        assert torch.allclose(ours, known, rtol=1e-4, atol=1e-6 * known.abs().max().item()) and known.abs().max() > 0

def test_a_trained_part_is_saved_as_a_stock_folder(world, cached, tmp_path):
    _, top, rows = cached
    cfg = save.parse_config(["--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "log")]).checked()
    run = save.Run(cfg, top, log=save.Log(cfg), optimizers={"rm": save.ShardedAdamW(top.model, 1e-2, cfg)})
    before = save.score(top, rows, 64)[0]
    save.train_on(run, "rm", [[0, 1]], lambda model, own: (
        model(*save.model_inputs([rows[i] for i in own], "cpu"))[0].sum(), ()))
    after, values = save.score(top, rows, 64)[0], top.value(save.score(top, rows, 64)[1])
    assert (after - before).abs().min() > 1e-3
    quick.whole_of(world / "rm", top, tmp_path / "rm")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    logits = [stock(input_ids=torch.tensor([ids])).logits.item() for ids, _ in CHATS]
    assert logits == pytest.approx(after.tolist(), abs=1e-5)
    ours = save.RewardModel.from_pretrained(str(tmp_path / "rm"))
    assert ours.value(save.score(ours, CHATS, 64)[1]).tolist() == pytest.approx(values.tolist(), abs=1e-5)

def test_the_labels_of_the_controls(monkeypatch):
    rewards = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    run = save.Run(save.parse_config(["--rm_update", "mean_reward"]), None)
    batch = save.Batch([], [], [], [], None, torch.ones(30, 6, dtype=torch.bool), rewards)
    own, flipped, drawn = (quick.labels_of(kind)(run, batch) for kind in ("own", "flipped", "random"))
    assert torch.allclose(own, rewards - rewards.mean(1, keepdim=True)) and torch.equal(flipped, -own)
    assert torch.equal(drawn.sort(1)[0], own.sort(1)[0])  # of a group: only which answer has which
    agree = ((drawn > 0) == (own > 0)).float().mean().item()
    assert 0.35 < agree < 0.65 and torch.equal(drawn, quick.labels_of("random")(run, batch))
    run.step = 2
    assert not torch.equal(drawn, quick.labels_of("random")(run, batch))
    pairs = save.Batch([], [], [], [], None, torch.ones(30, 2, dtype=torch.bool), rewards[:, :2])
    assert quick.labels_of("gpt4")(run, pairs).tolist() == [[math.inf, -math.inf]] * 30
    firsts = quick.labels_of("gpt4 random")(run, pairs)[:, 0]
    assert 5 < (firsts > 0).sum() < 25 and firsts.isinf().all()

def test_intervals_are_over_prompts():
    numbers = torch.Generator().manual_seed(0)
    change, prompts = torch.randn(40, generator=numbers), [f"p{i}" for i in range(40)]
    mean, low, high = quick.with_interval(prompts, change)
    assert mean == pytest.approx(change.mean().item(), abs=1e-3)
    assert (high - low) / 2 == pytest.approx(1.96 * change.std().item() / 40 ** 0.5, rel=0.1)
    copies = quick.with_interval(prompts * 10, change.repeat(10))  # ten copies of each pair say nothing new
    assert copies == pytest.approx([mean, low, high], abs=2e-3)
    alone = quick.with_interval([f"{i}" for i in range(400)], change.repeat(10))
    assert alone[2] - alone[1] < 0.4 * (high - low)
    cells = [True] * 30 + [False] * 10
    halves = (change[:30].mean() + change[30:].mean()).item() / 2
    assert quick.with_interval(prompts, change, cells)[0] == pytest.approx(halves, abs=1e-3)

def test_r2_of_v():
    means = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert quick.r2_of(means, means) == [1, 1, 1]
    r2, low, high = quick.r2_of(means.mean().expand(50), means)
    assert abs(r2) < 1e-6 and low < high <= 1e-6
    assert quick.r2_of(means.mean().expand(50) + means.std(correction=0), means)[0] == pytest.approx(-1, abs=1e-5)

def test_the_loss_at_the_best_temperature_knows_no_scale():
    rewards = torch.randn(80, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.5, 0.0])
    ours = quick.loss_at_best(rewards).mean()
    assert torch.allclose(ours, quick.loss_at_best(7 * rewards).mean(), atol=1e-5)
    raw = [-100 * F.logsigmoid(t * (rewards[:, 0] - rewards[:, 1]).double()).mean() for t in torch.logspace(-2, 2, 400)]
    assert ours.item() == pytest.approx(min(raw).item(), abs=1e-3)

def test_the_best_checkpoint_is_chosen_on_other_prompts():
    prompts = [f"p{i}" for i in range(40)]
    half = torch.tensor([save.seed_for(prompt) % 2 for prompt in prompts])
    curve = torch.zeros(3, 40, 2)
    curve[1, half == 0, 0], curve[2, half == 1, 0] = 2.0, 3.0  # best on half 0 is 1, on half 1 it is 2
    curve[1, half == 1, 1] = curve[2, half == 0, 1] = 1.0
    guarded, chosen = quick.best_of(curve, prompts)
    assert chosen == [2, 1] and torch.equal(guarded[half == 0], curve[2, half == 0])
    assert torch.equal(guarded[half == 1], curve[1, half == 1])
    assert quick.best_of(torch.stack([curve[0], -curve[1] - curve[2]]), prompts)[1] == [0, 0]  # or none of them

def test_pairs_that_v_splits():
    rewards = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.2, 1.0], [3.0, 2.5]])
    found = quick.splits(rewards, torch.full((4,), 2.0), 1.0, list("abcd"))
    assert found["0"][:2] == [3, pytest.approx(200 / 3, abs=1e-3)] and found["0.5"][:2] == found["1"][:2] == [2, 50.0]
    assert found["1"][2:] == [0.0, 100.0] and quick.splits(rewards, torch.zeros(4), 1.0, list("abcd"))["0"] == [0]

def test_the_committed_table_is_that_of_its_numbers():
    results = Path(quick.__file__).with_name("results")
    lines = list(map(json.loads, (results / "real.jsonl").read_text().splitlines()))
    table = quick.table(lines)
    assert "\n".join(table) in (results / "README.md").read_text(encoding="utf-8")
    runs = {spec: line for line in lines if "update" in line
            for spec in [quick.Spec(**{name: line[name] for name in quick.Spec._fields})]}
    assert {*runs} == {*quick.PLAN}
    two = [runs[quick.Spec("hl_bt", seed=seed)] for seed in (0, 1)]
    known = [f"{line['accuracy'][-1] - line['accuracy'][0]:+.1f}" for line in two]  # of 318 pairs, in percent
    assert [row for row in table if row.startswith(f"| HL-BT | {', '.join(known)}: ")]
    assert "| centred, lambda 0.3 (seed 0) |" in "\n".join(table) and "| SAVE, even head (seed 0) |" in "\n".join(table)

def test_what_is_made_is_not_made_again(tmp_path):
    with pytest.raises(ZeroDivisionError):
        quick.made(tmp_path, "a/b.pt", lambda: 1 / 0)
    assert quick.made(tmp_path, "a/b.pt", lambda: [1, torch.ones(2)])[0] == 1
    assert quick.made(tmp_path, "a/b.pt", lambda: 1 / 0)[0] == 1
    assert [row["stage"] for row in map(json.loads, (tmp_path / "cpu.jsonl").read_text().splitlines())] == ["a"]

def test_what_a_step_moves(monkeypatch):
    run, batch = save.Run(save.parse_config([]), None), save.Batch([], [], [], [], None, None)
    run.log = save.Log.__new__(save.Log)
    run.log.record = {}
    rewards = iter([torch.tensor([[0.0, 2.0], [1.0, 5.0]]), torch.tensor([[5.0, 7.2], [1.0, 5.4]])])
    def plain(run, batch):
        batch.rewards = next(rewards)
    quick.score_batch(run, batch, plain)
    assert not run.log.record
    quick.score_batch(run, batch, plain)
    assert run.log.record["moved"] == pytest.approx(0.1, abs=1e-5)  # what all rewards do together is not in it

def test_the_quick_mode_takes_no_flags_that_it_would_not_use(small, monkeypatch):
    monkeypatch.setattr(quick, "main", lambda args: pytest.fail("it ran"))
    for words in (["--rm", "x"], ["--head", "3"], ["--methods", "save"], ["--steps", "3"]):
        with pytest.raises(SystemExit):
            real.main([*small, *words])

@pytest.mark.slow
def test_the_quick_mode_goes_on_where_it_was(small, tmp_path, monkeypatch):
    plan = [quick.Spec("save", labels, lr=1e-3, seed=seed) for labels in ("own", "flipped") for seed in (0, 1)]
    plan += [quick.Spec("offline", "gpt4"), quick.Spec("centred", "gpt4"), quick.Spec(keep=1e4),
             quick.Spec("hl_bt", head=5.0, rm="even")]
    monkeypatch.setattr(quick, "PLAN", plan)  # noise has no best fit: any, with rewards that differ
    monkeypatch.setattr(quick, "head_of", lambda *of: (10 * quick.bradley_terry_fit(*of[:2], 1.0), {"cv_accuracy": 1}))
    monkeypatch.setattr(quick, "WHOLE", {"save_1e-06": quick.WHOLE["save_1e-06"]})
    real.main(small)
    out = tmp_path / "out"
    text = (out / "real.jsonl").read_text()
    frozen, *runs, own, flipped, less, whole, minutes = map(json.loads, text.splitlines())
    assert [*frozen["frozen"]] == ["all_1", "even_5"] and len(runs) == len(plan) and whole["whole"] == "save_1e-06"
    assert own["nll"][0] - flipped["nll"][0] == pytest.approx(less["nll"][0], abs=2e-3) and less["nll"][0]
    assert own["nll"][0] == pytest.approx((runs[0]["nll"][0] + runs[1]["nll"][0]) / 2, abs=2e-3)
    assert {*minutes["cpu_minutes"]} >= {"answers", "hidden", "value", "base", "runs", "whole"}
    for spec, run in zip(plan, runs):
        log = (out / "logs" / quick.name_of(spec) / "metrics.jsonl").read_text()
        config = json.loads(log.splitlines()[0])["config"]
        named = {"rm_update": spec.update, "lr_rm": spec.lr, "seed": spec.seed, "keep": spec.keep,
                 "group": 2 if "gpt4" in spec.labels else 4, "m0": 0.0 if spec.head == 1 else 0.5}
        assert {name: config[name] for name in named} == named and len(run["accuracy"]) == 3
    learned = [run["learned"] for run in runs]
    assert learned[0] and learned[2] and learned[4] == learned[5] == 2
    monkeypatch.setattr(save, "learn", lambda *_: pytest.fail("a finished run ran again"))
    monkeypatch.setattr(save, "sample", lambda *_: pytest.fail("answers were sampled again"))
    real.main(small)
    assert (out / "real.jsonl").read_text() == text
    monkeypatch.undo()
