"""The scripts of the real-data table and of the benchmarks, on tiny models: every stage runs, and on what it says."""
import contextlib
import gzip
import json
import shutil

import sys
from pathlib import Path

import bench
import eval as evaluation
import pytest
import real
import torch

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
    monkeypatch.setattr(real, "QUICK", small)
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "preferences").mkdir()
    for name in ("train", "heldout"):
        with gzip.open(tmp_path / "preferences" / f"preferences_{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs[:20])
    out = tmp_path / "out"
    words = ["--model", world / "policy", "--data", tmp_path, "--out", out, "--quick",
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
