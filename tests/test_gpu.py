"""What a GPU would find fault with, on a pretended one (pretend_gpu.py): devices, NCCL, waiting, memory."""
import collections
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import unittest.mock

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.testing._internal.distributed.fake_pg import FakeStore

import bench
import eval as evaluation
import pretend_gpu
import save
from pretend_gpu import Pretence

SMALL = {"steps": 2, "batch": 4, "group": 4, "m0": 0.7, "max_new_tokens": 8, "max_prompt_tokens": 8, "temperature": 1,
         "top_k": 0, "top_p": 1, "value_prompts": 4, "value_k": 2, "value_epochs": 4, "value_lr": 0.02, "lr_rm": 1e-4,
         "lr_policy": 1e-3, "micro_tokens": 128, "cache_tokens": 0, "dtype": "float32", "seed": 5, "save_every": 0}
CASES = {"grpo": {}, "rloo": {"algo": "rloo", "offload": True, "save_every": 1},
         "gspo": {"algo": "gspo", "num_minibatches": 2},
         "preference": {"stage": "preference", "batch": 16}}
FILES = ["rm/model.safetensors", "rm/value_head.safetensors", "policy/model.safetensors", "samples.jsonl"]
WAITS = {  # function of save.py: how often the host may wait in it, for each call of what
    "decode": {"sample_tokens": 2, "decode": 3}, "rollout": {"decode": 2},
    "Policy.forward": {"Policy.forward": 3}, "RewardModel.features": {"RewardModel.features": 1},
    "ShardedAdamW.step": {"ShardedAdamW.step": 1}, "total": {"total": 4}, "Log.time": {"Log.time": 1},
    "score_batch": {"score_batch": 1}, "value_step": {"value_step": 2}, "value_stage": {"value_step": 1},
    "Log.put": {"save_step": 20, "sample": 1, "value_stage": 6}, "learn": {"save_step": 3},
    "record": {"save_step": 5, "value_stage": 5},
    "reward_model_step": {"save_step": 3}, "policy_step": {"save_step": 7}, "response_log_probs": {"save_step": 2}}
ONCE = {"diagnose", "Policy.from_pretrained", "expect", "RewardModel.save_pretrained", "replaced_folder",
        "ShardedAdamW.__init__"}

def argv(world, out, **flags):
    """The command line of a small run; True is --name."""
    files = {name: world / f"{name}.jsonl" for name in ("prompts", "pairs")}
    flags = {"policy": world / "policy", "rm": world / "rm", **files, "out": out, **SMALL, **flags}
    return [word for name, x in flags.items()
            for word in ([f"--{name}"] if x is True else [f"--{name}", str(x)]) if x is not False]

def on_gpu(world, out, **flags):
    """A run on the pretended GPU, and what must hold of every one."""
    peaks = unittest.mock.patch.object(save.Log, "time", pretend_gpu.time_with_peak)
    with peaks, counted() as calls, Pretence() as gpu:
        save.main(argv(world, out, **flags))
    check_waits(gpu, calls)
    check_memory(world, out, **flags)

@contextlib.contextmanager
def counted():
    """Count the calls of the functions of save.py that WAITS goes by."""
    calls = collections.Counter()
    with contextlib.ExitStack() as stack:
        for name in {name for share in WAITS.values() for name in share}:
            def call(*inputs, name=name, old=eval(f"save.{name}"), **options):
                calls[name] += 1
                return old(*inputs, **options)
            stack.enter_context(unittest.mock.patch(f"save.{name}", call))
        yield calls

def check_waits(gpu, calls):
    """The host waits where, and as often as, WAITS says: an .item() more fails here. Offload may copy gradients."""
    for (function, what), times in gpu.waits.items():
        if function not in ONCE and (function, what) != ("ShardedAdamW.step", "a copy to the host"):
            assert function in WAITS, f"{function}: the host waits for the GPU ({what}, {times} times)"
    for function, share in WAITS.items():
        times = sum(n for (name, what), n in gpu.waits.items() if name == function and "copy to the host" not in what)
        allowed = sum(n * calls[name] for name, n in share.items())
        assert times <= allowed, f"{function}: the host waits {times} times for the GPU, expected at most {allowed}"

def check_memory(world, out, offload=False, stage="", **_):
    """The table of tests/results/README.md, in bytes, with this world's sizes in fp32."""
    sizes = [json.loads((world / name / "config.json").read_text()) for name in ("rm", "policy")]
    hidden, inner, layers, words = (sizes[1][name] for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    # q, k, v and o, three of the MLP, the norms; tied embeddings
    rm, policy = (layers * (4 * hidden ** 2 + 3 * hidden * inner + 2 * hidden) + hidden * (1 + size["vocab_size"])
                  for size in sizes)
    rm, policy = rm + hidden, 0 if stage == "preference" else policy
    always = 4 * (rm + policy) + (0 if offload else 12 * (rm + policy) + 4 * policy) + 16 * (hidden + 1)
    tokens, rows = SMALL["micro_tokens"], SMALL["batch"] * SMALL["group"]
    cache = rows * (SMALL["max_prompt_tokens"] + SMALL["max_new_tokens"]) * 2 * layers * hidden * 4
    one_layer = tokens * 4 * (4 * hidden + 4 * inner)
    graph = tokens * 4 * (layers * hidden + 10 * hidden + 6 * inner)
    logits = tokens * 4 * 4 * words
    allowed = {"rollout": always + cache * (1 + 1 / (2 * layers)) + one_layer, "score": always + one_layer,
               "rm_update": always + 4 * rm + graph, "log_probs": always + one_layer + logits,
               "policy_update": always + 4 * policy + graph + logits}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("rm_update_gb" in line for line in lines)
    for line in lines:
        for phase in [phase for phase in allowed if f"{phase}_gb" in line]:
            peak = line[f"{phase}_gb"] * 1e9
            assert peak <= allowed[phase], f"{phase}: {peak:.0f} bytes, expected at most {allowed[phase]:.0f}"

def same_files(a, b):
    for name in FILES:
        assert (a / name).exists() == (b / name).exists(), name
        assert not (a / name).exists() or (a / name).read_bytes() == (b / name).read_bytes(), name

# ---------------------------------------------------------------- whole runs
@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_same_byte_for_byte(world, tmp_path, name):
    save.main(argv(world, tmp_path / "cpu", device="cpu", **CASES[name]))
    on_gpu(world, tmp_path / "gpu", **CASES[name])
    same_files(tmp_path / "cpu", tmp_path / "gpu")
    if name == "rloo":  # and once more from step 1
        for part in ("rm", "policy", "checkpoints/step_000002"):
            shutil.rmtree(tmp_path / "gpu" / part)
        on_gpu(world, tmp_path / "gpu", resume=True, **CASES[name])
        same_files(tmp_path / "cpu", tmp_path / "gpu")

def test_eval_py_is_the_same_byte_for_byte(world, tmp_path, monkeypatch):
    """Scores of a reward model, answers of a policy."""
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    (tmp_path / "alpaca_eval.json").write_text(json.dumps([{"instruction": f"copy {word}"} for word in "abcd"]))
    flags = {"--rm": world / "rm", "--bench": world / "heldout_id.jsonl"}, {
        "--policy": world / "policy", "--bench": "alpaca_eval", "--data": tmp_path, "--max_new_tokens": 6}
    for each in flags:
        words = [str(word) for pair in each.items() for word in pair]
        evaluation.main([*words, "--out", str(tmp_path / "cpu"), "--device", "cpu"])
        with Pretence():
            evaluation.main([*words, "--out", str(tmp_path / "gpu")])
    assert set_to == ["high"] * 2
    for file in ("scores.jsonl", "alpaca_eval/model_outputs.json"):
        assert (tmp_path / "cpu" / file).read_bytes() == (tmp_path / "gpu" / file).read_bytes()

def as_rank(rank, port):
    """What torchrun would set, in a process that it would start, but without importing everything again."""
    save.RANK, save.WORLD, save.LOCAL_RANK, save.NO_BAR = rank, 2, rank, True
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

def two_ranks(work, *inputs):
    """Exit codes of work(rank, port, *inputs) in two processes; none outlives a minute."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=work, args=(rank, port, *inputs)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        rank.kill()
    return [rank.exitcode for rank in ranks]

def rank_of_two(rank, port, world, out):
    """Two algorithms on the CPU and on the pretended GPU."""
    as_rank(rank, port)
    for case in ("grpo", "gspo"):
        save.main(argv(world, out / f"{case} cpu", device="cpu", **CASES[case]))
        with counted() as calls, Pretence() as gpu:
            save.main(argv(world, out / f"{case} gpu", **CASES[case]))
        check_waits(gpu, calls)

@pytest.mark.skipif(torch.cuda.is_available(), reason="with a real GPU autograd has threads, which do not fork")
@pytest.mark.slow
def test_two_ranks_are_the_same_byte_for_byte(world, tmp_path):
    assert two_ranks(rank_of_two, world, tmp_path) == [0, 0]
    for case in ("grpo", "gspo"):
        same_files(tmp_path / f"{case} cpu", tmp_path / f"{case} gpu")

# ---------------------------------------------------------------- it can fail
def values_on_the_host(old, *inputs):
    return old(*inputs).cpu()

def uniforms_on_the_host(old, logits, uniforms, *sampling):
    return old(logits, uniforms.cpu(), *sampling)

def moments_on_the_host(old, optimizer, source):
    for state in optimizer.adamw.state.values():
        state["exp_avg"] = state["exp_avg"].cpu()
    old(optimizer, source)

def a_wait_a_token(old, logits, *inputs):
    return old(logits / logits.max().item(), *inputs)

def a_wait_a_micro_batch(old, logits, *inputs, **options):
    logits.detach().max().item()
    return old(logits, *inputs, **options)

def weights_held_twice(old, optimizer, *inputs, **options):
    old(optimizer, *inputs, **options)
    optimizer.copies = [p.detach().clone() for _, p in optimizer.named]

@pytest.mark.parametrize("target, bug, said", [
    ("anchor", values_on_the_host, "operands on"), ("sample_tokens", uniforms_on_the_host, "operands on"),
    ("ShardedAdamW.publish", moments_on_the_host, "operands on"),
    ("sample_tokens", a_wait_a_token, "decode: the host waits"),
    ("F.cross_entropy", a_wait_a_micro_batch, "Policy.forward: the host waits"),
    ("ShardedAdamW.__init__", weights_held_twice, "bytes, expected at most")])
def test_an_injected_bug_is_found(world, tmp_path, monkeypatch, target, bug, said):
    owner, _, name = f"save.{target}".rpartition(".")
    owner = eval(owner)
    old, train = getattr(owner, name), save.train

    def put(work, *inputs):
        monkeypatch.setattr(owner, name, lambda *inputs, **options: bug(old, *inputs, **options))
        return work(*inputs)
    if target == "sample_tokens":  # not yet when a policy is tried: there it would be a refusal
        monkeypatch.setattr(save, "train", lambda *inputs: put(train, *inputs))
    else:
        put(lambda: None)
    with pytest.raises(AssertionError, match=said):
        on_gpu(world, tmp_path / "out")

@pytest.fixture
def ranks(monkeypatch):
    """Rank 0 of two: the reducer is DDP's own, but nothing is exchanged."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    monkeypatch.setattr(save, "WORLD", 2)
    yield
    dist.destroy_process_group()

def test_a_tensor_of_the_host_is_not_for_nccl(ranks):
    with Pretence():
        assert save.total(2.0, 3.0) == [2, 3]
        with unittest.mock.patch.object(dist, "get_backend", lambda *_: "gloo"), \
                pytest.raises(AssertionError, match="NCCL takes no tensor of the host"):
            save.total(2.0, 3.0)

# ---------------------------------------------------------------- gradients are held once
def gradients(gpu, model, width):
    """`train_on` three micro-batches -> peaks before and in the backward passes, in sizes of the gradients."""
    model.zero_grad()
    one, before, built = sum(4 * p.numel() for p in model.parameters()), gpu.live, []
    inputs = torch.linspace(-1, 1, 3 * width).view(3, 1, width).to("cuda")

    def micro_loss(model, rows):
        if not built:
            built.append(gpu.peak)
            torch.cuda.reset_peak_memory_stats()
        loss = (model(inputs[rows[0]]) ** 2).mean()
        return loss, (loss,)
    save.train_on(unittest.mock.MagicMock(model=model), "model", [[0], [1], [2]], micro_loss)  # without a step
    return (built[0] - before) / one, (gpu.peak - before) / one

def test_gradients_are_held_once(ranks, monkeypatch):
    """DDP's buckets and p.grad beside each other would be 2. The gradients are those of one process."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(128, 128) for _ in range(8)])
    with Pretence() as gpu:
        model.to("cuda")
        _, backward = gradients(gpu, model, 128)
        together = [p.grad.clone() for p in model.parameters()]
        monkeypatch.setattr(save, "WORLD", 1)
        gradients(gpu, model, 128)
        assert all(torch.equal(a, 2 * p.grad) for a, p in zip(together, model.parameters()))  # no mean over ranks here
    assert 1 <= backward <= 1.3

def test_building_ddp_does_not_hold_them_twice_either(ranks, monkeypatch):
    """Left alone DDP begins with one bucket of all parameters: the gradients and this copy of them would be 2."""
    monkeypatch.setattr(save, "total", lambda *numbers: numbers)
    model = torch.nn.Sequential(*[torch.nn.Linear(4096, 4096, bias=False, device="meta") for _ in range(8)])
    with Pretence("meta") as gpu:
        model.to("cuda")
        building, backward = gradients(gpu, model, 4096)
    assert 1 <= building <= 1.3 and 1 <= backward <= 1.3

# ---------------------------------------------------------------- what fits, from two configurations
@pytest.mark.skipif(transformers.__version__ < "5.23", reason="the cache of transformers before 5.23 copies more")
@pytest.mark.parametrize("ranks, flags", [pytest.param(1, [], marks=pytest.mark.slow), (4, ["--offload"]),
                                          pytest.param(1, ["--cache_tokens", "78000"], marks=pytest.mark.slow)])
def test_bench_memory_counts_every_byte_that_is_always_there(tmp_path, capsys, ranks, flags):
    """Its table beside the sum by hand: bf16 copies; fp32 masters and moments, and the initial weights."""
    shape = bench.llm(2, 512, 4, 1024, 4096, kv_heads=2)
    transformers.Qwen3Config(**shape).save_pretrained(tmp_path / "policy")
    transformers.LlamaConfig(**shape).save_pretrained(tmp_path / "rm")
    bench.main(["memory", "--policy", f"{tmp_path}/policy", "--rm", f"{tmp_path}/rm", "--ranks", str(ranks), *flags])
    *_, row, last = capsys.readouterr().out.splitlines()
    assert row.startswith(f"| policy + rm, {ranks}{', --offload' if '--offload' in flags else ''} | ")
    configs = transformers.Qwen3Config(**shape), transformers.LlamaConfig(**shape)
    peaks = pretend_gpu.memory_peaks(*configs, ranks, save.parse_config(flags))
    assert row.split(" | ", 1)[1] == " | ".join(f"{peak:.1f}" for peak in peaks.values()) + " |"
    layer = 2 * 512 * 4 * 128 + 2 * 512 * 2 * 128 + 3 * 512 * 1024 + 2 * 512  # q and o, k and v, MLP, norms
    policy = 4096 * 512 + 2 * layer + 512 + 2 * 2 * 128  # Qwen3 also normalises heads of q and k
    rm = 4096 * 512 + 2 * layer + 512 + 512
    states = 0 if "--offload" in flags else 12 * (policy + rm) + 2 * policy
    assert peaks["always"] * 1e9 == pytest.approx(2 * (policy + rm) + states, rel=1e-3)
    prompts = 4 if "--cache_tokens" in flags else 32 // ranks  # 4 * 16 * 1216 = 77824
    cache = prompts * 16 * 1215 * 2 * 2 * 2 * 128 * 2  # rows, tokens, keys and values, layers, heads, their width, bf16
    assert cache < (peaks["rollout"] - peaks["always"]) * 1e9 < 1.5 * cache
    assert peaks["policy_update"] - peaks["always"] > 2e-9 * policy  # its gradients
    assert last == "fits 24 GB"

@pytest.mark.parametrize("change, flags, line", [
    ({}, [], "fits 24 GB"), ({"policy_update": 23}, [], "fits 40 GB"), ({"score": 78}, [], "fits 80 GB"),
    ({"rollout": 42}, [], "fits 24 GB, the rollout in 4 parts"),  # 9 prompts of 1 GB in 0.8 * (24 - 2 - 10)
    ({"rollout": 42}, ["--cache_tokens", "999999"], "fits 80 GB"),
    ({"score": 79}, [], "does not fit 80 GB, 79.0 in score: --offload, more ranks, lower --micro_tokens"),
    ({"rm_update": 79}, ["--offload"], "does not fit 80 GB, 79.0 in rm_update: lower --micro_tokens"),
    ({"rollout": 99}, ["--offload", "--cache_tokens", "999999"],
     "does not fit 80 GB, 99.0 in rollout: lower --cache_tokens or --max_new_tokens"),
    ({"rollout": 5000}, ["--offload"],
     "does not fit 80 GB, 5000.0 in rollout: lower --cache_tokens or --max_new_tokens"),
    ({"always": 79, "rollout": 80}, ["--offload"], "does not fit 80 GB, 79.0 in always: smaller models")])
def test_the_last_line_of_bench_memory(change, flags, line):
    peaks = {"always": 10, "rollout": 16, "score": 11, "rm_update": 12, "log_probs": 11, "policy_update": 22, **change}
    assert pretend_gpu.what_fits(peaks, 1, save.parse_config(flags)) == line

def test_bench_memory_refuses_in_one_line(tmp_path, capsys):
    shape = bench.llm(2, 64, 4, 128, 512)
    transformers.Qwen3Config(**shape).save_pretrained(tmp_path)
    for words, said in ((["--ranks", "3"], "--batch 32: expected a multiple of 3"), (["--rm", ""], "expected both")):
        with pytest.raises(SystemExit) as stop:
            bench.main(["memory", "--policy", str(tmp_path), "--rm", str(tmp_path), *words])
        [error] = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and error.startswith("bench.py: error: ") and said in error
