"""What a GPU would find fault with, on a pretended one (pretend_gpu.py): devices, NCCL, waiting, memory."""
import collections
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import types
import unittest.mock

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.testing._internal.distributed.fake_pg import FakeStore

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
    "Log.put": {"save_step": 20, "sample": 1}, "learn": {"save_step": 3}, "record": {"save_step": 5},
    "reward_model_step": {"save_step": 3}, "policy_step": {"save_step": 5}, "response_log_probs": {"save_step": 2}}
ONCE = {"diagnose", "Policy.check_logits", "expect", "RewardModel.save_pretrained", "replaced_folder",
        "ShardedAdamW.__init__"}

def argv(world, out, **flags):
    """The command line of a small run; True is --name."""
    files = {name: world / f"{name}.jsonl" for name in ("prompts", "pairs")}
    flags = {"policy": world / "policy", "rm": world / "rm", **files, "out": out, **SMALL, **flags}
    return [word for name, x in flags.items()
            for word in ([f"--{name}"] if x is True else [f"--{name}", str(x)]) if x is not False]

def on_gpu(world, out, **flags):
    """A run on the pretended GPU, and what must hold of every one."""
    with counted() as calls, Pretence() as gpu:
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
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
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
def test_two_ranks_are_the_same_byte_for_byte(world, tmp_path):
    assert two_ranks(rank_of_two, world, tmp_path) == [0, 0]
    for case in ("grpo", "gspo"):
        same_files(tmp_path / f"{case} cpu", tmp_path / f"{case} gpu")

# ---------------------------------------------------------------- it can fail
def inputs_on_the_host(old, *inputs):
    return tuple(x.cpu() for x in old(*inputs))

def uniforms_on_the_host(old, logits, uniforms, *sampling):
    return old(logits, uniforms.cpu(), *sampling)

def moments_on_the_host(old, optimizer, state):
    device, optimizer.device = optimizer.device, "cpu"
    old(optimizer, state)
    optimizer.device = device

def a_wait_a_token(old, logits, *inputs):
    return old(logits / logits.max().item(), *inputs)

def a_wait_a_micro_batch(old, policy, hidden, *inputs):
    return old(policy, hidden if hidden.norm().item() else hidden * 0, *inputs)

def weights_held_twice(old, optimizer, *inputs, **options):
    old(optimizer, *inputs, **options)
    optimizer.copies = [p.detach().clone() for _, p in optimizer.named]

@pytest.mark.parametrize("target, bug, said", [
    ("model_inputs", inputs_on_the_host, "operands on"), ("sample_tokens", uniforms_on_the_host, "operands on"),
    ("ShardedAdamW.load_state_dict", moments_on_the_host, "operands on"),
    ("sample_tokens", a_wait_a_token, "decode: the host waits"),
    ("Policy.token_log_probs", a_wait_a_micro_batch, "the host waits"),
    ("ShardedAdamW.__init__", weights_held_twice, "bytes, expected at most")])
def test_an_injected_bug_is_found(world, tmp_path, monkeypatch, target, bug, said):
    resumed = target == "ShardedAdamW.load_state_dict"
    flags = {"steps": 1 if "token" in target else 2, "save_every": 1 if resumed else 0}
    if resumed:
        save.main(argv(world, tmp_path / "out", device="cpu", **flags))
        for part in ("rm", "policy", "checkpoints/step_000002"):
            shutil.rmtree(tmp_path / "out" / part)
    owner, _, name = f"save.{target}".rpartition(".")
    owner = eval(owner)
    monkeypatch.setattr(owner, name, lambda *inputs, old=getattr(owner, name), **options: bug(old, *inputs, **options))
    with pytest.raises(AssertionError, match=said):
        on_gpu(world, tmp_path / "out", resume=resumed, **flags)

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
    """`accumulate` over three micro-batches -> peaks before and in the backward passes, in sizes of the gradients."""
    one, before, built = sum(4 * p.numel() for p in model.parameters()), gpu.live, []
    inputs = torch.linspace(-1, 1, 3 * width).view(3, 1, width).to("cuda")

    def micro_loss(model, rows):
        if not built:
            built.append(gpu.peak)
            torch.cuda.reset_peak_memory_stats()
        loss = (model(inputs[rows[0]]) ** 2).mean()
        return loss, (loss,)
    save.accumulate(model, [[0], [1], [2]], micro_loss)
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

# ---------------------------------------------------------------- memory at full size
@pytest.mark.skipif(transformers.__version__ < "5.23", reason="the cache of transformers before 5.23 copies more")
@pytest.mark.parametrize("ranks, offload", [(1, False), (4, True)])
def test_the_table_of_full_size_counts_every_byte_that_is_always_there(ranks, offload):
    """bench.py memory beside the sum by hand: bf16 copies; fp32 masters and moments, and the initial weights."""
    import bench
    shape = bench.llm(2, 512, 4, 1024, 4096, True) | {"num_key_value_heads": 2}
    peaks = bench.full_size_peaks(shape, shape, ranks, offload)
    layer = 2 * 512 * 4 * 128 + 2 * 512 * 2 * 128 + 3 * 512 * 1024 + 2 * 512  # q and o, k and v, MLP, norms
    policy = 4096 * 512 + 2 * layer + 512 + 2 * 2 * 128  # Qwen3 also normalises heads of q and k
    rm = 4096 * 512 + 2 * layer + 512 + 512
    states = 0 if offload else 12 * (policy + rm) + 2 * policy
    assert peaks["always"] * 1e9 == pytest.approx(2 * (policy + rm) + states, rel=1e-3)
    cache = 8 * 16 * 1215 * 2 * 2 * 2 * 128 * 2  # rows, tokens, keys and values, layers, heads, their width, bf16
    assert cache < (peaks["rollout"] - peaks["always"]) * 1e9 < 1.5 * cache
    assert peaks["policy_update"] - peaks["always"] > 2e-9 * policy  # its gradients

# ---------------------------------------------------------------- what cannot fit is refused before it starts
def measured_and_needed(monkeypatch, policy, rm, ranks, offload):
    """Peaks in GB as bench.py memory measures them, and what save.py says to the same run before its first step."""
    import bench
    go_through_phases, needed = bench.go_through_phases, {}

    def go(run, gpu, prompts):
        go_through_phases(run, gpu, prompts)
        for optimizer in run.optimizers.values():
            optimizer.adamw.state.clear()  # as before the first step
        tokens = run.cfg.batch // ranks * run.cfg.group * (192 + run.cfg.max_new_tokens)
        needed.update({phase: need / 1e9 for phase, need in save.memory_needed(run, tokens).items()})
    monkeypatch.setattr(bench, "go_through_phases", go)
    peaks = bench.full_size_peaks(policy, rm, ranks, offload)
    assert [*needed] == ["always", "rollout", "rm_update", "policy_update"]
    assert needed["always"] == pytest.approx(peaks["always"], rel=1e-3)
    return [(phase, peaks[phase], need) for phase, need in needed.items()]

@pytest.mark.skipif(transformers.__version__ < "5.23", reason="the cache of transformers before 5.23 copies more")
@pytest.mark.parametrize("ranks, offload", [(1, False), (8, True)])
def test_the_need_of_small_models_is_not_overstated(monkeypatch, ranks, offload):
    """Of 16 layers; the fewer there are, the more weighs the one under way."""
    import bench
    shape = bench.llm(16, 512, 4, 1024, 4096, True) | {"num_key_value_heads": 2}
    for phase, peak, need in measured_and_needed(monkeypatch, shape, shape, ranks, offload):
        assert 0.75 * peak < need < 1.001 * peak, phase

@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ < "5.23", reason="the cache of transformers before 5.23 copies more")
@pytest.mark.parametrize("models, ranks, offload", [
    ("4B + 3B", 1, False), ("4B + 3B", 2, False), ("4B + 3B", 4, False), ("4B + 3B", 4, True), ("4B + 3B", 8, False),
    ("8B + 8B", 4, False), ("8B + 8B", 8, True)])
def test_the_need_of_large_models_is_that_of_the_table(monkeypatch, models, ranks, offload):
    import bench
    for phase, peak, need in measured_and_needed(monkeypatch, *bench.MODELS[models], ranks, offload):
        assert 0.95 * peak < need < 1.001 * peak, phase

@pytest.fixture
def needed(monkeypatch):
    """What save.memory_needed said last, as if the models were 100,000 times as large."""
    said, memory_needed = {}, save.memory_needed

    def scaled(*inputs):
        said.clear()
        said.update({phase: 1e5 * need for phase, need in memory_needed(*inputs).items()})
        return said
    monkeypatch.setattr(save, "memory_needed", scaled)
    return said

def refused(words, capsys, size):
    """What a run says that is refused on a GPU of `size` bytes."""
    capsys.readouterr()
    with Pretence(size=size), pytest.raises(SystemExit) as stop:
        save.main(words)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line

@pytest.mark.parametrize("phase, flags, others, helps", [
    ("always", {}, "rollout rm_update policy_update", "--offload, more GPUs, smaller models"),
    ("always", {"offload": True}, "rollout rm_update policy_update", "smaller models"),
    ("always", {"stage": "value"}, "rollout", "smaller models"),
    ("rollout", {}, "always rm_update policy_update", "--offload, more GPUs, lower --cache_tokens"),
    ("rollout", {"offload": True}, "always rm_update policy_update", "lower --cache_tokens"),
    ("rollout", {"stage": "value", "value_k": 8}, "always", "lower --cache_tokens"),
    ("rm_update", {"stage": "preference"}, "always", "--offload, more GPUs, lower --micro_tokens"),
    ("rm_update", {"cache_tokens": 1}, "always rollout policy_update", "--offload, more GPUs, lower --micro_tokens"),
    ("policy_update", {"cache_tokens": 1, "rm_update": "none", "offload": True}, "always rollout",
     "lower --micro_tokens")])
def test_what_cannot_fit_is_refused_in_one_line(world, tmp_path, capsys, needed, phase, flags, others, helps):
    words = argv(world, tmp_path / "out", **{**flags, "steps": 1})
    assert "1 ranks, always: needs " in refused(words, capsys, -1)
    assert {*needed} == {phase, *others.split()}
    need, there = needed[phase], needed[phase] - 2e8
    figures = f"needs {need / 1e9:.1f} GB on each GPU, {there / 1e9:.1f} GB are free"
    assert refused(words, capsys, there) == f"save.py: error: 1 ranks, {phase}: {figures}: {helps}"
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("stage", ["preference", "value"])
def test_what_fits_exactly_is_not_refused(world, tmp_path, capsys, needed, stage):
    words = argv(world, tmp_path / "out", stage=stage, steps=1)
    refused(words, capsys, -1)
    refused(words, capsys, max(needed.values()) - 1)
    with Pretence(size=max(needed.values())):
        save.main(words)
    assert (tmp_path / "out/rm").exists()

@pytest.mark.parametrize("flags, rows", [
    ({"stage": "preference", "batch": 8}, lambda prompt, pair: 8 * 2 * pair),
    ({"stage": "value"}, lambda prompt, pair: 4 * SMALL["value_k"] * (prompt + 8)),
    ({}, lambda prompt, pair: 4 * SMALL["group"] * (prompt + 8))])
def test_the_need_is_that_of_the_rows_of_a_rank(world, tmp_path, monkeypatch, flags, rows):
    """A mean prompt and longest responses; two ranks have half of the rows each."""
    cfg, words = save.parse_config(argv(world, "")), save.load_tokenizer(world / "rm", "rm")
    prompts = [len(ids) for _, ids in save.read_prompts(cfg, save.load_tokenizer(world / "policy"))]
    chosen = [len(ids) for (ids, _), _ in save.read_pairs(cfg, cfg.pairs, "pairs", words)]
    want, asked = rows(sum(prompts) / len(prompts), sum(chosen) / len(chosen)), []

    def check_memory(run, tokens):
        asked.append(tokens)
        save.fail("enough")
    monkeypatch.setattr(save, "check_memory", check_memory)
    for ranks in (1, 2):
        monkeypatch.setattr(save, "WORLD", ranks)
        monkeypatch.setattr(save, "together", lambda work, **_: work())
        monkeypatch.setattr(save, "start_ranks", lambda device: None)
        with Pretence(), pytest.raises(SystemExit):
            save.main(argv(world, tmp_path / "out", **flags))
    assert asked == [pytest.approx(want), pytest.approx(want / 2)]

@pytest.mark.parametrize("kind, config", [
    (transformers.LlamaForCausalLM, transformers.LlamaConfig()),
    (transformers.MistralForCausalLM, transformers.MistralConfig(sliding_window=8)),
    (transformers.GPT2LMHeadModel, transformers.GPT2Config())])
def test_what_is_not_known_of_a_model_counts_nothing(kind, config):
    """Layers that keep a window only, and parts of other names: no run is refused for what it may not need."""
    policy = torch.nn.Module()
    with torch.device("meta"):
        policy.model, master = kind(config).bfloat16(), torch.empty(10 ** 12)
    run = types.SimpleNamespace(cfg=save.Config(offload=True, micro_tokens=100, cache_tokens=0), policy=policy,
                                optimizers={"policy": types.SimpleNamespace(masters={"": master})})
    needed, llama = save.memory_needed(run, 1000), kind is transformers.LlamaForCausalLM
    gradients, (layers, hidden) = 2 * policy.model.num_parameters(), (config.num_hidden_layers, config.hidden_size)
    graph = 0 if kind is transformers.GPT2LMHeadModel else 100 * 2 * layers * hidden * 2
    assert needed["policy_update"] - needed["always"] == gradients + graph
    cache = needed.get("rollout", needed["always"]) - needed["always"]
    assert cache == (1000 * 2 * layers * hidden * 2 if llama else 0)  # keys and values, no fewer heads of them
    assert ("rollout" in needed) == (kind is not transformers.MistralForCausalLM)
    run.cfg.offload = False  # now there are moments, and in the step fp32 gradients instead of all that
    more = save.memory_needed(run, 1000)
    assert more["always"] - needed["always"] == 8e12 and more["policy_update"] - more["always"] == 4e12

def rank_beside_a_small_gpu(rank, port, world, out):
    """Rank 1's GPU holds nothing."""
    as_rank(rank, port)
    sys.stderr = open(out / str(rank), "w")
    with Pretence(size=0 if rank else float("inf")):
        save.main(argv(world, out / "out"))

@pytest.mark.skipif(torch.cuda.is_available(), reason="with a real GPU autograd has threads, which do not fork")
def test_what_one_gpu_cannot_hold_all_ranks_refuse(world, tmp_path):
    assert two_ranks(rank_beside_a_small_gpu, world, tmp_path) == [2, 2]
    [line] = (tmp_path / "0").read_text().splitlines()
    assert line.startswith("save.py: error: 2 ranks, always: needs 0.0 GB on each GPU, 0.0 GB are free: --offload, ")
    assert not (tmp_path / "1").read_text() and not (tmp_path / "out").exists()
