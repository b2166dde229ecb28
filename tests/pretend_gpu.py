"""A GPU pretended on a CPU. `Pretence()` computes real numbers, with storages tagged as being on cuda:N;
`Pretence("meta")` computes no numbers, only bytes, for models of any size. Both follow every operation and storage.
`memory_peaks` is what a step takes of a GPU's memory, by way of the second."""
import collections
import contextlib
import copy
import dataclasses
import sys
import tempfile
import types
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import save
import toy

aten, Tensor, DDP = torch.ops.aten, torch.Tensor, torch.nn.parallel.DistributedDataParallel
ITEM, NONZERO, COPY = aten._local_scalar_dense.default, aten.nonzero.default, aten.copy_.default
WAITING = {ITEM, NONZERO, aten.masked_select.default, aten.equal.default, aten.repeat_interleave.Tensor}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}

class Memory:
    """Where a storage is, and its bytes for as long as it lives."""

    def __init__(self, gpu, place, storage):
        self.gpu, self.place, self.size = gpu, place, storage.nbytes()
        gpu.live += self.size
        gpu.peak = max(gpu.peak, gpu.live)

    def __del__(self):
        self.gpu.live -= self.size

class Calls(TorchFunctionMode):
    """What Python asks for by the name of a device."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.gpu.call(func, args, kwargs or {})

class Operations(TorchDispatchMode):
    """Every operation, also those of the backward pass and of DDP's reducer."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return self.gpu.operation(func, args, kwargs or {})

class Pretence(contextlib.ExitStack):
    """Inside, save.py finds a GPU; what it would refuse is an AssertionError. `waits` counts how often the host waited,
    by (function of save.py, what); `live`, `peak`, `size`: bytes; `numbers`: what .item() says if there is no data."""

    def __init__(self, real="cpu", size=10 ** 15):
        super().__init__()
        self.real, self.size, self.current, self.building, self.live, self.peak = real, size, 0, False, 0, 0
        self.waits, self.numbers, self.modes = collections.Counter(), {}, (Calls(), Operations())
        self.modes[0].gpu = self.modes[1].gpu = self

        def build(ddp, *args, old=DDP.__init__, backend=dist.get_backend, **options):
            self.building = True  # its buckets are where the parameters say that they are
            old(ddp, *args, **options)
            self.building = False
            if backend() == "fake":  # one process is a rank of many: nothing is sent, not even divided
                ddp.register_comm_hook(None, noop_hook)
        # loaded in here, the rotary frequencies, which are in no file, would be garbage
        patches = [*(patch.object(kind, "from_pretrained", self.outside(kind.from_pretrained)) for kind in (
            save.AutoModelForCausalLM, save.AutoModelForSequenceClassification)), patch.multiple(
            torch.cuda, is_available=lambda: True, max_memory_allocated=lambda: self.peak, synchronize=self.wait,
            is_current_stream_capturing=lambda: False,  # a torch for GPUs would ask the driver
            reset_peak_memory_stats=lambda: setattr(self, "peak", self.live), memory_allocated=lambda: self.live,
            memory_reserved=lambda: self.live, mem_get_info=lambda: (self.size - self.live, self.size),
            set_device=lambda device: setattr(self, "current", torch.device(device).index or 0)), patch.multiple(
            dist, get_backend=lambda *_: "nccl",
            init_process_group=lambda _, old=dist.init_process_group, **rest: old("gloo", **rest),
            barrier=self.outside(dist.barrier), all_gather_object=self.outside(dist.all_gather_object)),
            patch.object(DDP, "__init__", build), patch.object(
                torch, "Generator", lambda device="cpu", kind=torch.Generator: kind("cpu"))]
        for part in [*patches, *self.modes]:
            self.enter_context(part)

    def outside(self, work):
        """The function, run without the pretence."""
        def run(*args, **options):
            with contextlib.ExitStack() as stack:
                for mode in reversed(self.modes):
                    mode.__exit__(None, None, None)
                    stack.callback(mode.__enter__)
                return work(*args, **options)
        return run

    def wait(self, what="synchronize"):
        """Note that the host waits for the GPU, and in which function of save.py."""
        frame = sys._getframe()
        while frame.f_back and frame.f_code.co_filename != save.__file__:
            frame = frame.f_back
        self.waits[frame.f_code.co_qualname.split(".<locals>.<")[0], str(what)] += 1

    def place(self, tensor):
        """Index of the GPU that a tensor is on, None for the host."""
        return getattr(getattr(tensor.untyped_storage(), "memory", None), "place", None)

    def move(self, tensor, place):
        """Put a new tensor on a GPU, or a copied one on the host (None)."""
        tensor.untyped_storage().memory = None if place is None else Memory(self, place, tensor.untyped_storage())

    def call(self, func, args, kwargs):
        """A call from Python: say where a tensor is, move it, or make it on the device that is asked for."""
        if func is Tensor.tolist and self.place(args[0]) is not None:
            self.wait("tolist")
        if func == Tensor.device.__get__ and (self.real == "meta" or self.place(args[0]) is not None):
            return torch.device("cpu") if self.place(args[0]) is None else torch.device("cuda", self.place(args[0]))
        if func in (Tensor.cuda, Tensor.cpu):
            func, kwargs = Tensor.to, {"device": func.__name__}
        moving = func is Tensor.to
        if moving and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            kwargs, args = {**dict(zip(("device", "dtype", "non_blocking", "copy"), args[1:])), **kwargs}, args[:1]
        device = torch.device(kwargs.get("device") or "meta")
        if device.type == "meta":
            return func(*args, **kwargs)
        place = None if device.type == "cpu" else self.current if device.index is None else device.index
        unreal = self.real == "meta" and (place is not None or moving and args[0].is_meta)
        if unreal:
            kwargs = {name: x for name, x in kwargs.items() if name != "generator"}
        out = func(*args, **{**kwargs, "device": "meta" if unreal else "cpu"})
        if self.place(out) != place:
            if moving and out.untyped_storage() is args[0].untyped_storage():
                out = out.clone()
            if place is None:
                self.wait("a copy to the host")
            self.move(out, place)
        return out

    def operation(self, func, args, kwargs):
        """An operation: are its operands on one device, does the host wait for it, what memory does it take?"""
        tensors, indices = tensors_of([*args, *kwargs.values()]), tensors_of(args[1]) if func in INDEXING else []
        places = [self.place(x) for x in tensors]
        there, numbers = set(places) - {None}, [x for x in tensors if not x.dim()]
        mixed = {place for x, place in zip(tensors, places) if not any(x is y for y in indices + numbers)} | there
        if func is not COPY and len(mixed) > 1:  # only numbers and indices may come from the host
            raise AssertionError(f"{func}: operands on {places}, shapes {[list(x.shape) for x in tensors]}")
        if func.namespace == "c10d" and None in places:
            raise AssertionError(f"{func}: NCCL takes no tensor of the host")
        if there and (func in WAITING or func is COPY and places[0] is None or any(x.dtype is torch.bool
                                                                                  for x in indices)):
            self.wait(func)
        if self.real == "meta" and func is ITEM and args[0].is_meta:
            return self.numbers.get(args[0].dtype, 1)
        if self.real == "meta" and func is NONZERO:  # without data all is true
            func, args = aten.empty_like.default, (args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.long),)
        made = self.building and func is not aten.zeros.default  # that is DDP's map of used parameters, on the host
        out, home = func(*args, **kwargs), max(there) if there else self.current if made else None
        for x in tensors_of([out]) if home is not None and func is not COPY else ():
            if self.place(x) is None:
                self.move(x, home)
        return out

def tensors_of(values):
    """The tensors among them, and in lists among them."""
    parts = (part for x in values for part in (x if isinstance(x, (list, tuple)) else (x,)))
    return [x for x in parts if isinstance(x, Tensor)]

# ---------------------------------------------------------------- the memory of a step, for models of any size
PHASES = ("rollout", "score", "rm_update", "log_probs", "policy_update")
PLAIN_TIME = save.Log.time

@contextlib.contextmanager
def time_with_peak(log, phase):
    """save.Log.time that notes the peak memory of a phase too: column PHASE_gb, of 10^9 bytes.
    `python tests/pretend_gpu.py FLAGS` is save.py with it, on whatever device there is."""
    on_gpu, name = log.cfg.device != "cpu", f"{phase}_gb"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with PLAIN_TIME(log, phase):
        yield
    if on_gpu:
        log.record[name] = max(torch.cuda.max_memory_allocated() / 1e9, log.record.get(name, 0))

def prompts_at_once(ranks, cfg):
    """A rank's prompts that decode together: all, or what --cache_tokens holds."""
    most = cfg.cache_tokens // (cfg.group * (192 + cfg.max_new_tokens)) if cfg.cache_tokens else sys.maxsize
    return max(1, min(cfg.batch // ranks, most))

def what_fits(peaks, ranks, cfg, sizes=(24, 40, 80), context=2):
    """Which GPU, in GB, holds the phases and a CUDA context, or what to change if none does.
    A rollout without --cache_tokens is divided by save.py itself: its caches take 0.8 of what is free."""
    whole = {phase: peak for phase, peak in peaks.items() if phase != "rollout" or cfg.cache_tokens}
    worst, prompts = max(whole, key=whole.get), prompts_at_once(ranks, cfg)
    for size in sizes:
        free = size - context - peaks["always"]
        wave = prompts if cfg.cache_tokens else int(0.8 * free / (peaks["rollout"] - peaks["always"]) * prompts)
        if whole[worst] + context <= size and wave > 0:
            waves = -(-prompts // wave)
            return f"fits {size} GB" + f", the rollout in {waves} parts" * (waves > 1)
    if whole[worst] + context <= sizes[-1]:
        worst = "rollout"  # of one prompt
    lower = {"rollout": "lower --cache_tokens or --max_new_tokens", "always": "smaller models"}
    helps = [*([] if cfg.offload else ["--offload", "more ranks"]), lower.get(worst, "lower --micro_tokens")]
    return f"does not fit {sizes[-1]} GB, {peaks[worst]:.1f} in {worst}: {', '.join(helps)}"

def memory_peaks(policy, rm, ranks=1, cfg=save.Config()):
    """{"always" and each of PHASES: GB of 10^9 bytes} of rank 0, without the 1 to 2 GB of a CUDA context.
    policy and rm are configurations of transformers; of cfg all counts that decides about memory. save.py's own
    functions run on tensors without data: prompts of 192 tokens in the rollout, the longest rows in two full
    micro-batches of an update, no early end, DDP's real reducer, flash attention."""
    policy, rm = (copy.deepcopy(config.get_text_config()) for config in (policy, rm))  # of a composite model
    rm.num_labels = 1
    with torch.device("meta"):
        policy, rm = (kind.from_config(config).bfloat16().eval() for kind, config in (
            (AutoModelForCausalLM, policy), (AutoModelForSequenceClassification, rm)))
    alone = {"WORLD": ranks, "broadcast": lambda *_: None, "total": lambda *numbers: [0.0] * len(numbers)}
    with contextlib.ExitStack() as stack:
        if ranks > 1:
            dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
            stack.callback(dist.destroy_process_group)
        stack.enter_context(patch.multiple(save, **alone))
        stack.enter_context(patch.object(save.Log, "time", time_with_peak))
        stack.enter_context(patch.object(
            torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, is_causal=False, **_:
            torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]))
        gpu, out = stack.enter_context(Pretence("meta")), stack.enter_context(tempfile.TemporaryDirectory())
        cfg = dataclasses.replace(cfg, out=out).checked()
        run = save.Run(cfg, save.RewardModel(rm, toy.rm_tokenizer()).to(cfg.device),
                       save.Policy(policy, toy.policy_tokenizer()).to(cfg.device), save.Log(cfg))
        learns = save.RM_UPDATES[cfg.rm_update].loss is not None
        for name, lr in (("rm", cfg.lr_rm), ("policy", cfg.lr_policy)):
            model, initial = getattr(run, name), name == "policy" and cfg.kl_coef > 0
            if name == "policy" or learns:
                run.optimizers[name] = save.ShardedAdamW(model.model, lr, cfg, keep_initial=initial)
            save.to_working_copy(model, cfg)
        for name, optimizer in run.optimizers.items():
            for p in getattr(run, name).model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()  # from now on there are moments
        always = gpu.live / 1e9
        go_through_phases(run, gpu, prompts_at_once(ranks, cfg))
        return {"always": always, **{phase: run.log.record[f"{phase}_gb"] for phase in PHASES}}

def go_through_phases(run, gpu, prompts):
    """The phases of a step; run.log notes the peak of each. gpu.numbers: the longest prompt, then response."""
    cfg, longest = run.cfg, run.cfg.max_prompt_tokens + run.cfg.max_new_tokens
    rows = [([0] * longest, cfg.max_prompt_tokens)] * (2 * max(1, cfg.micro_tokens // longest))
    width = 192 + cfg.max_new_tokens - 2  # all but the last two tokens
    gpu.numbers = {torch.bool: False, torch.long: width}
    with run.log.time("rollout"), torch.no_grad():
        save.decode(run.policy, [[0] * width] * prompts, cfg.group, range(prompts * cfg.group), 2, cfg.temperature,
                    cfg.top_p, cfg.top_k)
    gpu.numbers[torch.long] = cfg.max_new_tokens
    with run.log.time("score"):
        save.score(run.rm, rows, cfg.micro_tokens)
    batches = save.micro_batches(range(len(rows)), rows, cfg.micro_tokens)

    def inputs(part):
        return save.model_inputs([rows[row] for row in part], cfg.device)
    with run.log.time("rm_update"):
        if "rm" in run.optimizers:
            save.train_on(run, "rm", batches, lambda model, part: (model(*inputs(part))[0].sum(), ()))
    batch = types.SimpleNamespace(sequences=rows, lengths=torch.full((len(rows),), cfg.max_new_tokens))
    advantages, optimizer = torch.zeros(len(rows), device=cfg.device), run.optimizers["policy"]
    with run.log.time("log_probs"):
        optimizer.publish(optimizer.initial or optimizer.masters)
        reference = save.response_log_probs(run, batch, batches)
        optimizer.publish(optimizer.masters)

    def micro_loss(model, part):
        log_probs, mask = model(*inputs(part), cfg.temperature)
        loss, _ = save.policy_loss(log_probs, log_probs, reference[part], advantages[part], mask,
                                   algo=save.ALGORITHMS[cfg.algo], kl_coef=cfg.kl_coef)
        return loss, ()
    save.train_on(run, "policy", batches, micro_loss)

if __name__ == "__main__":
    with patch.object(save.Log, "time", time_with_peak):
        save.main()
