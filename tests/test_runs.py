"""Whole runs through the command line on the tiny world: what they write, two ranks, resume, every choice, refusals."""
import gzip
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import save

SMALL = {"steps": 2, "batch": 4, "group": 8, "m0": 1, "max_new_tokens": 12, "max_prompt_tokens": 32, "temperature": 1,
         "top_k": 0, "top_p": 1, "value_prompts": 16, "value_k": 4, "value_epochs": 40, "value_lr": 0.02,
         "lr_rm": 1e-5, "lr_policy": 1e-5, "micro_tokens": 128, "device": "cpu"}
BY_CLOCK = ("_seconds", "_per_second")
RM, HEAD, POLICY = MODELS = "rm/model.safetensors", "rm/value_head.safetensors", "policy/model.safetensors"

def argv(world, out, **flags):
    """The command line of a small run; True and False are --name and --no-name."""
    words, inputs = [], {"policy": world / "policy", "rm": world / "rm", "prompts": world / "prompts.jsonl"}
    for name, value in {**inputs, "out": out, **SMALL, **flags}.items():
        values = [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
        words += [f"--{'no-' if value is False else ''}{name}", *map(str, values)]
    return words

def run(world, out, **flags):
    save.main(argv(world, out, **flags))
    return out

def refusal(capsys, words):
    """Run what must be refused: exit code 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        save.main(words)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("save.py: error: "), lines
    return lines[0]

def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]

def metrics(out):
    """metrics.jsonl by stage and step, without the numbers that a clock decides."""
    return {(row.pop("stage"), row.pop("step")): {name: x for name, x in row.items() if not name.endswith(BY_CLOCK)}
            for row in rows_of(out / "metrics.jsonl") if "stage" in row}

def samples(out):
    """samples.jsonl as {step: [rows of a prompt]}."""
    steps = {}
    for row in rows_of(out / "samples.jsonl"):
        steps.setdefault(row["step"], {}).setdefault(row["prompt"][0]["content"], []).append(row)
    return {step: list(prompts.values()) for step, prompts in steps.items()}

def distance(a, b, file, part=""):
    """Mean difference of two weight files, of the tensor where it is largest, and of the same names. Not the largest
    difference: where a gradient is 0 but for rounding, Adam makes a whole step of the rounding."""
    a, b = ({name: x for name, x in load_file(out / file).items() if name.startswith(part)} for out in (a, b))
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().mean().item() for name in a)

# ---------------------------------------------------------------- one process and two ranks
CASES = {  # some steps leave a rank nothing to train on, as asserted below
    "gspo": {"algo": "gspo", "steps": 6, "num_minibatches": 2, "save_every": 2, "resume": True},
    "grpo": {"steps": 3, "num_minibatches": 2, "group": 3, "seed": 6},
    "rloo": {"algo": "rloo", "steps": 3, "batch": 2, "group": 3, "seed": 5},
    "preference": {"stage": "preference", "steps": 4, "batch": 8, "lr_rm": 1e-4, "micro_tokens": 64}}

def case(world, out, name):
    """The command line of a case; "stopped" is gspo, whose rank 1 gets a SIGTERM in step 3."""
    flags = CASES[name.replace("stopped", "gspo")]
    return argv(world, out / name, heldout=[world / "heldout_id.jsonl"], pairs=world / "pairs.jsonl", **flags)

def as_rank(rank, port, lines):
    """In a process of its own: run command lines as one rank of two."""
    signal.alarm(100)  # ends ranks that wait for each other
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    save.RANK, save.WORLD, save_step = rank, 2, save.save_step

    def terminated(run, prompts):
        save_step(run, prompts)
        if run.step == 3 and rank == 1 and run.cfg.out.endswith("stopped"):
            os.kill(os.getpid(), signal.SIGTERM)

    save.save_step = terminated
    for words in lines:
        try:
            save.main(words)
        except SystemExit as stop:
            assert stop.code == 0 and "stopped" in str(words)

def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """Folder of the cases on one process."""
    out = tmp_path_factory.mktemp("alone")
    for name in CASES:
        save.main(case(world, out, name))
    return out

@pytest.fixture(scope="module")
def together(world, tmp_path_factory):
    """The same on two gloo ranks, and one that is stopped."""
    out, port, fork = tmp_path_factory.mktemp("together"), free_port(), multiprocessing.get_context("fork")
    lines = [case(world, out, name) for name in [*CASES, "stopped"]]
    ranks = [fork.Process(target=as_rank, args=(rank, port, lines)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return out

@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(world, alone, together, name):
    a, b = alone / name, together / name
    for file in (RM,) if name == "preference" else MODELS:
        assert distance(a, b, file) < (1e-6 if file == HEAD else 3e-8), file
        assert file == HEAD or distance(a, world, file) > 1e-5, file
    one, two = metrics(a), metrics(b)
    assert one.keys() == two.keys() and rows_of(b / "metrics.jsonl")[0]["world"] == 2
    for key in one:  # every number is that of all ranks
        assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key
    if name != "preference":  # samples.jsonl holds rank 0's prompts
        assert samples(a).keys() == samples(b).keys()
        for step, prompts in samples(b).items():
            for row, other in zip(sum(samples(a)[step][::2], []), sum(prompts, []), strict=True):
                assert row == {**other, **{key: pytest.approx(other[key], abs=1e-4) for key in ("reward", "value")}}

def test_the_cases_have_steps_in_which_a_rank_has_nothing_to_train_on(alone):
    """Rank r has prompts r, r + 2, ...; a lonely survivor counts as none. If this fails choose another --seed."""
    def trained(name, both_signs):
        """Which prompts train the reward model (those with both signs), or the policy."""
        prompts = [[[row["side"] for row in prompt] for prompt in step] for step in samples(alone / name).values()]
        return [[{"+", "-"} <= set(sides) if both_signs else sum(map(bool, sides)) > 1 for sides in step]
                for step in prompts]

    assert all(any(a != b for a, b in trained("rloo", both)) for both in (False, True))
    # within one of the two minibatches, while the rank trains on the other
    assert any(a != b and c != d for a, b, c, d in trained("grpo", False))

def test_the_folders_load_in_plain_transformers(alone):
    out = alone / "gspo"
    assert {p.name for p in out.iterdir()} == {"rm", "policy", "metrics.jsonl", "samples.jsonl", "checkpoints"}
    for name, kind in (("rm", AutoModelForSequenceClassification), ("policy", AutoModelForCausalLM)):
        model, info = kind.from_pretrained(out / name, dtype="auto", output_loading_info=True)
        assert {p.dtype for p in model.parameters()} == {torch.float32} and not any(info.values())
        assert AutoTokenizer.from_pretrained(out / name).chat_template and (name == "policy" or model.num_labels == 1)
    shapes = {name: (x.dtype, *x.shape) for name, x in load_file(out / HEAD).items()}
    assert shapes == {"weight": (torch.float32, 1, model.config.hidden_size), "bias": (torch.float32, 1)}

def test_metrics_begin_with_what_made_the_run_and_have_one_record_a_step(alone):
    first, *records = rows_of(alone / "gspo" / "metrics.jsonl")
    assert first.keys() == {"config", "world", "torch", "transformers", "argv", "sha256", "rows"}
    assert first["torch"] == torch.__version__ and first["argv"] == sys.argv and "gspo" in first["rows"]
    assert records.pop().keys() == {"closing", "try"}
    assert first["config"].keys() == vars(save.Config()).keys() and first["world"] == 1
    assert [first["config"][name] for name in ("algo", "dtype", "lr_rm")] == ["gspo", "float32", 1e-5]  # as used
    assert [(row["stage"], row["step"]) for row in records] == [("value", 0)] + [("save", t) for t in range(7)]
    assert records[1]["accuracy_heldout_id"] and records[7]["accuracy_heldout_id"]
    for step, row in enumerate(records[2:], 1):
        assert {"reward", "reward_spread", "valid", "truncated", "kl", "value_bias", "survivors", "clipped", "rm_loss",
                "policy_grad_norm"} <= set(row)
        phases = [row[f"{phase}_seconds"] for phase in ("rollout", "score", "log_probs", "policy_update")]
        phases += [row["rm_update_seconds"]] if row["valid"] else []
        assert min(phases) > 0 and sum(phases) <= row["step_seconds"]
        assert row["threshold"] == save.curriculum_threshold(step, 6, 1)
    assert records[2]["kl"] < records[7]["kl"]

def test_samples_agree_with_the_method_and_with_the_metrics(alone):
    for name in ("gspo", "rloo"):
        for step, prompts in samples(alone / name).items():
            rows = [row for prompt in prompts for row in prompt]
            mu = save.curriculum_threshold(step, CASES[name]["steps"], 1)
            for row in rows:
                a = row["reward"] - row["value"]
                assert row["kept"] == (1 / (1 + math.exp(-abs(a))) >= mu and not row["truncated"])
                assert row["side"] == (("+" if a >= 0 else "-") if row["kept"] else "")
            want = {key: sum(row[key] for row in rows) / len(rows) for key in ("reward", "kept", "truncated")}
            want["valid"] = sum({"+", "-"} <= {row["side"] for row in p} for p in prompts) / len(prompts)
            want["reward_spread"] = torch.tensor([[row["reward"] for row in p] for p in prompts]).std(1).mean().item()
            ended = [[row["reward"] for row in p if not row["truncated"]] for p in prompts]
            bias = [p[0]["value"] - sum(r) / len(r) for p, r in zip(prompts, ended) if r]  # without any: no target
            want["value_bias"] = sum(bias) / max(len(bias), 1)
            got = metrics(alone / name)["save", step]
            assert {key: got[key] for key in want} == pytest.approx(want, rel=1e-5, abs=1e-5)
            assert len(rows) == CASES[name].get("group", 8) * CASES[name].get("batch", 4)
            assert len({row["response"] for row in rows}) > 4

def test_the_preference_stage_learns_the_pairs(world, tmp_path):
    out = run(world, tmp_path / "out", stage="preference", pairs=world / "pairs.jsonl", lr_rm=1e-3, steps=24, batch=16,
              heldout=[world / "pairs.jsonl"], micro_tokens=2048)
    logged = [row for (_, step), row in metrics(out).items() if step]
    assert sum(row["rm_loss"] for row in logged[-4:]) < 0.5 * sum(row["rm_loss"] for row in logged[:4])
    before, after = (metrics(out)["preference", step]["accuracy_pairs"] for step in (0, 24))
    assert after > max(90, before)
    assert AutoModelForSequenceClassification.from_pretrained(out / "rm").config.num_labels == 1
    assert not (out / HEAD).exists()  # else the next stage would take an untrained anchor for a trained one

@pytest.fixture(scope="module")
def anchored(world, tmp_path_factory):
    """A folder like `world` whose RM has a value head, by stage value."""
    out = run(world, tmp_path_factory.mktemp("anchored") / "world", stage="value", dtype="bfloat16", value_prompts=20)
    shutil.copytree(world / "policy", out / "policy")
    shutil.copy(world / "prompts.jsonl", out)
    return out

def test_the_value_stage_adds_a_head_and_touches_nothing_else(world, anchored, tmp_path):
    assert load_file(anchored / HEAD)["weight"].any() and not (anchored / "checkpoints").exists()
    (key, record), = metrics(anchored).items()
    assert key == ("value", 0)
    assert record["value_r2"] == pytest.approx(1 - record["value_loss"] / record["value_target_variance"], abs=1e-6)
    assert {"kept", "valid", "value_bias", "reward_spread"} <= record.keys()
    for rm, stages in ((anchored, {"save"}), (world, {"value", "save"})):  # a head that is there is used
        for stage in ([], ["--stage", "save"]):
            out = tmp_path / f"{len(stages)}{len(stage)}"
            save.main(argv(rm, out, steps=1) + stage)
            assert {stage for stage, _ in metrics(out)} == stages
    assert distance(world, anchored, RM) == 0  # in fp32, although it worked in bf16

def test_two_ranks_stop_at_a_signal_to_one_and_one_process_goes_on(world, alone, together, tmp_path):
    out = shutil.copytree(together / "stopped", tmp_path / "gspo")
    ranks = {str(path.relative_to(out / "checkpoints")) for path in out.glob("checkpoints/*/*")}
    assert ranks == {f"step_00000{step}/rank_0000{rank}.pt" for step in (2, 3) for rank in (0, 1)}
    save.main(case(world, tmp_path, "gspo"))
    assert max(distance(alone / "gspo", out, file) for file in MODELS) < 1e-6
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_000004", "step_000006"]

def test_what_resume_refuses(world, alone, capsys):
    out, words = alone / "gspo", case(world, alone, "gspo")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for flag, value in (("--lr_policy", "2e-5"), ("--seed", "1"), ("--steps", "7"), ("--batch", "8")):
        line = refusal(capsys, [*words, flag, value])
        assert "--resume" in line and flag in line and "--group" not in line
    line = refusal(capsys, [*words, "--no-resume"])
    assert "--resume" in line and f"--out {out}" in line
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before

# ---------------------------------------------------------------- every choice does what it should, and only that
@pytest.fixture(scope="module")
def plain(anchored, tmp_path_factory):
    return run(anchored, tmp_path_factory.mktemp("plain") / "out", save_every=1)

def test_without_m0_nothing_is_set_aside(anchored, plain, tmp_path):
    out = run(anchored, tmp_path / "out", m0=0)
    ours, filtered = ({name: metrics(path)["save", 1][name] for name in ("threshold", "kept", "truncated")}
                      for path in (out, plain))
    assert ours["threshold"] == 0.5 and filtered["threshold"] == 0.75
    assert ours["kept"] == pytest.approx(1 - ours["truncated"]) and ours["kept"] >= filtered["kept"]
    assert max(distance(plain, out, file) for file in (RM, POLICY)) > 1e-7

def first_masters(out, part):
    """The fp32 weights of a model after step 1, by name."""
    state = torch.load(out / "checkpoints/step_000001/rank_00000.pt", weights_only=True)["optimizers"]
    return {name: x["master"] for name, x in state[part].items()}

@pytest.mark.parametrize("flags, changed", [
    ({"offload": True}, ()), ({"micro_tokens": 1}, ()), ({"cache_tokens": 8 * 44}, ()),
    ({"algo": "gspo"}, ()),  # one optimizer step per rollout: every ratio is 1
    ({"algo": "rloo"}, (POLICY,)), ({"kl_coef": 1e4}, (POLICY,)), ({"lr_schedule": "linear"}, (HEAD, POLICY)),
    ({"rm_update": "mean_reward"}, (RM, POLICY)), ({"rm_update": "none"}, (POLICY,))], ids=str)
def test_each_choice_changes(anchored, plain, tmp_path, flags, changed):
    out = run(anchored, tmp_path / "out", save_every=1, **flags)
    trained = {"policy": POLICY} if flags == {"rm_update": "none"} else {"rm": RM, "value": HEAD, "policy": POLICY}
    if flags == {"rm_update": "mean_reward"}:  # V of the RM as it came would be a wrong anchor for the next stage
        assert not (out / trained.pop("value")).exists() and (anchored / HEAD).exists()
    for part, file in trained.items():
        if file in changed:
            assert distance(plain, out, file) > 1e-7, file
        else:  # in step 1: step 2 may see other responses
            before, after = first_masters(plain, part), first_masters(out, part)
            assert max((before[name] - after[name]).abs().mean() for name in before) < 1e-8, file
    assert (out / "rm").exists() == ("rm" in trained) and metrics(out).keys() == metrics(plain).keys()

def test_a_learning_rate_of_0_leaves_the_policy_as_it_was(anchored, tmp_path):
    out = run(anchored, tmp_path / "out", lr_policy=0)
    assert distance(anchored, out, POLICY) == 0 and distance(anchored, out, RM) > 0

def test_bfloat16_trains_fp32_masters(anchored, tmp_path):
    out = run(anchored, tmp_path / "out", dtype="bfloat16", lr_rm=1e-7)
    before, after = load_file(anchored / RM), load_file(out / RM)
    for name, x in before.items():
        assert after[name].dtype is torch.float32 and 0 < (x - after[name]).abs().max() < 1e-6
        assert (x.bfloat16() == after[name].bfloat16()).float().mean() > 0.9  # training in bf16 would lose these
    assert {x.dtype for x in load_file(out / POLICY).values()} == {torch.bfloat16}

# ---------------------------------------------------------------- the command line
def test_help_shows_every_flag_with_its_default_and_new_rows_as_choices(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setitem(save.RM_UPDATES, "my_update", save.RM_UPDATES["save"])
    monkeypatch.setitem(save.ALGORITHMS, "my_algo", save.ALGORITHMS["grpo"])
    with pytest.raises(SystemExit) as stop:
        save.main(["--help"])
    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    assert stop.value.code == 0
    for name, field in save.Config.__dataclass_fields__.items():
        default = "none" if field.default in (None, "") or name == "heldout" else re.escape(str(field.default))
        assert re.search(rf" --{name}[ ,](HELDOUT \[HELDOUT ...\])?[^\[\]]* \[{default}\]", text), name
    assert re.search(r" --rm_update \{save,[^}]*,my_update\}", text)
    assert re.search(r" --algo \{grpo,[^}]*,my_algo\}", text)

ROW = '{"prompt": "copy a", "chosen": "a", "rejected": "b"}\n'
FILES = {
    "good": ROW, "empty": "", "broken": ROW + "{\n" + ROW, "unnamed": ROW + '{"text": "copy a"}\n',
    "typed": ROW * 2 + '{"prompt": 7}\n', "long": ROW + f'"{"copy " * 40}"\n', "blank": '{"prompt": " "}\n',
    "named": '[{"role": "user", "content": "a", "name": "b"}]\n', "human": '[{"role": "human", "content": "a"}]\n',
    "mute": '{"prompt": [{"role": "user"}]}\n', "answered": '[{"role": "assistant", "content": "a"}]\n',
    "single": ROW + '{"prompt": "copy a", "chosen": "a"}\n', "null": ROW.replace('"b"', "null"),
    "hollow": ROW + ROW.replace('"b"', '" "'), "plain.jsonl.gz": ROW,
    "list": ROW + '["copy a", "a", "b"]\n', "aside": '{"chosen": "a", "rejected": "b"}\n', "latin1": '"café"\n',
    "seven": ROW.replace('"b"', "7"), "rows.ndjson": ROW, "object.json": '{"data": [%s]}' % ROW}

@pytest.fixture(scope="module")
def bad(anchored, tmp_path_factory):
    path = shutil.copytree(anchored, tmp_path_factory.mktemp("bad") / "world")
    for name, text in FILES.items():
        (path / (name if "." in name else f"{name}.jsonl")).write_text(text, encoding="latin1")
    (path / "cut.jsonl.gz").write_bytes(gzip.compress(ROW.encode() * 50)[:-12])
    two = AutoModelForSequenceClassification.from_pretrained(path / "rm", num_labels=2, ignore_mismatched_sizes=True)
    two.save_pretrained(shutil.copytree(path / "rm", path / "two"))
    lacks = shutil.copytree(path / "policy", path / "lacks") / "model.safetensors"
    save_file({name: x for name, x in load_file(lacks).items() if "q_proj" not in name}, lacks, {"format": "pt"})
    for name, source, file, text in (
            ("no_config", "policy", "config.json", None), ("no_weights", "policy", "model.safetensors", None),
            ("no_head", "rm", "value_head.safetensors", None), ("no_template", "rm", "chat_template.jinja", None),
            ("picky", "policy", "chat_template.jinja", "{{ raise_exception('no system prompt') }}"),
            ("reversed", "rm", "chat_template.jinja", "{% for m in messages[::-1] %}{{ m.content }} {% endfor %}")):
        target = shutil.copytree(path / source, path / name) / file
        target.write_text(text) if text else target.unlink()
    return path

@pytest.mark.parametrize("words, said", [  # run in the folder above; the line holds the first word and what is said
    ("--nonsense 1", ""), ("--step 3", ""), ("--steps", "argument"), ("--steps x", "int"), ("--algo ppo", "grpo"),
    ("--stage all", "preference"), ("--steps -1", "-1: expected 1 to "), ("--lr_rm nan", "nan: expected 0 to "),
    ("--kl_coef inf", "inf: expected 0 to "), ("--m0 2", "2.0: expected 0 to 1"), ("--group 1", "1: expected 2 to "),
    ("--seed -1", "-1: expected "), ("--batch 3", "a multiple of"), ("--batch 4 --num_minibatches 3", "a multiple of"),
    ("--out good.jsonl", "good.jsonl"), ("--prompts none.jsonl", "none.jsonl: expected JSON"),
    ("--prompts object.json", "object.json"), ("--prompts cut.jsonl.gz", "cut.jsonl.gz"),
    ("--max_prompt_tokens 32 --max_new_tokens 2040", "expected at most 6: "),
    ("--prompts nobody/nothing", "nobody/nothing"), ("--prompts empty.jsonl", "expected rows that can be used"),
    ("--prompts plain.jsonl.gz", "gz"), ("--prompts latin1.jsonl", "utf-8"), ("--prompts rows.ndjson", "parquet"),
    ("--prompts broken.jsonl", "broken.jsonl row 2: expected JSON"), ("--prompts typed.jsonl", "typed.jsonl row 3: "),
    ("--prompts unnamed.jsonl", "unnamed.jsonl row 2: "), ("--prompts blank.jsonl", "blank.jsonl row 1: "),
    ("--prompts mute.jsonl", "mute.jsonl row 1: "), ("--prompts answered.jsonl", "answered.jsonl row 1: "),
    ("--prompts named.jsonl", "{'name'} would be lost"), ("--prompts human.jsonl", "{'human'} would be lost"),
    ("--steps 0", "0: expected 1 to "), ("--steps 0 --stage preference --pairs good.jsonl", "0: expected 1 to "),
    ("--prompts long.jsonl", "long.jsonl row 2: 42 tokens, expected at most 32: "),
    ("--pairs single.jsonl", "single.jsonl row 2: "), ("--pairs null.jsonl", "null.jsonl row 1: "),
    ("--pairs list.jsonl", "list.jsonl row 2: "), ("--pairs seven.jsonl", "seven.jsonl row 1: "),
    ("--pairs hollow.jsonl", "hollow.jsonl row 2: rejected"), ("--pairs aside.jsonl", "aside.jsonl row 1: "),
    ("--pairs long.jsonl", "long.jsonl row 2: "),
    ("--heldout good.jsonl broken.jsonl", "broken.jsonl row 2: "), ("--heldout list.jsonl", "list.jsonl row 2: "),
    ("--rm reversed", "prefix"), ("--rm reversed --stage preference --pairs good.jsonl", "prefix"),
    ("--prompts good.jsonl --policy picky", "good.jsonl row 1: "), ("--policy ./none", "./none"),
    ("--policy no_config", "no_config"), ("--policy no_weights", "no_weights"), ("--policy lacks", "it lacks "),
    ("--rm ./none", "./none"), ("--rm no_template", "chat template"), ("--rm two", "1 label"),
    ("--rm policy", "score.weight")])
def test_bad_input_is_refused_in_one_line_before_anything_is_written(bad, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(bad)
    monkeypatch.setattr(save, "WORLD", 2 if words == "--batch 3" else 1)
    monkeypatch.setattr(os, "_exit", sys.exit)
    stage = ["--stage", "preference"] if words.startswith("--pairs") else []
    line = refusal(capsys, argv(bad, tmp_path / "out") + stage + words.split())
    assert words.split()[0] in line and said in line and not (tmp_path / "out").exists(), line
