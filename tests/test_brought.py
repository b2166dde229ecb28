"""What people bring: folders, rows and templates that broke a run late, or its numbers in silence."""
import multiprocessing
import shutil
import string
import sys

import pytest
import torch
import toy
from test_models import ASK, CHAT, reward_model, same, stock_rewards, tokenizer, write, written
from test_runs import argv, as_rank, free_port, metrics, refusal
from tokenizers import Tokenizer, models, pre_tokenizers as pre
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          PreTrainedTokenizerFast)

import eval as evaluation
import save

END, OPEN = "<end>", CHAT.replace("<end>", " ")  # the second ends with text
SHAPE = dict(vocab_size=21, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
             head_dim=8, num_key_value_heads=1, initializer_range=0.3, eos_token_id=1)
LINEAR = {f"linear_{name}": 4 for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}

@pytest.mark.parametrize("template, special, names, other, pad", [
    (CHAT, ["<p>", END], {"eos_token": END, "pad_token": "<p>"}, {}, "<p>"),  # Qwen
    (CHAT, ["<p>", END], {"eos_token": END, "pad_token": END}, {"pad_token_id": 257}, "<p>"),  # it ends a chat
    (CHAT, ["<s>", END], {"eos_token": END, "bos_token": "<s>"}, {"pad_token_id": -1}, "<s>"),  # Llama
    (CHAT, [END, "<p>", "<q>"], {"eos_token": END, "pad_token": "<q>"}, {"vocab_size": 258}, "<p>"),  # <q> has no row
    (OPEN, [END], {"eos_token": END}, {"pad_token_id": 1}, END)])  # GPT-2
def test_the_pad_token_that_is_saved_is_not_text(tmp_path, template, special, names, other, pad):
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(sorted(pre.ByteLevel.alphabet()) + special)}, []))
    core.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    core.add_special_tokens(special)  # behind the text: "!" is 0
    words = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **names)
    rows = [[*ASK, {"role": "assistant", "content": mark * n}] for mark in string.punctuation for n in (1, 2)]
    texts = words.apply_chat_template(rows, tokenize=False)
    ids = [(words(text)["input_ids"], 1) for text in texts]
    rm = reward_model(words=words, **other)
    rm.save_pretrained(tmp_path)
    stock, words = (auto.from_pretrained(tmp_path) for auto in (AutoModelForSequenceClassification, AutoTokenizer))
    padded = words(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    same(stock(**padded).logits[:, 0].detach(), stock_rewards(rm.model, ids), 1e-5)
    assert words.pad_token == pad and words.pad_token_id == stock.config.pad_token_id

@pytest.mark.parametrize("kind, other", [("lfm2", {"layer_types": ["conv", "full_attention"] * 2}), ("mamba", {}),
                                         ("qwen3_5_text", LINEAR), ("rwkv", {})])
def test_a_policy_samples_as_its_forward_says_or_is_refused(tmp_path, kind, other):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, **other)
    path = written(tmp_path, AutoModelForCausalLM.from_config(config), tokenizer(letters="abcdefghij"))
    if not other:
        pytest.raises(save.UsageError, save.Policy.from_pretrained, path).match("its cache is not supported")
        return
    pi, prompts, knobs = save.Policy.from_pretrained(path), [[3, 7, 8], [6] * 11, [9]], (1.0, 1.0, 0)
    for seed, row in enumerate(save.decode(pi, prompts, 4, range(12), 20, *knobs)[0].tolist()):  # they end one by one
        row = [token for token in row if token >= 0]
        logits = pi.model(input_ids=torch.tensor([prompts[seed // 4] + row])).logits[0, -len(row) - 1:-1].detach()
        uniforms = torch.rand(20, generator=torch.Generator().manual_seed(seed))[:len(row)]
        assert save.sample_tokens(logits, uniforms, *knobs).tolist() == row

def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(("system", *["user", "assistant"] * 3), texts)]

def test_a_prompt_said_twice_is_the_whole_head_or_refused():
    """By save.py and eval.py alike. Keys without a value say nothing, others would be lost."""
    rm, head, twice = reward_model(), turns(*"sabc"), {"chosen": turns(*"sabcy"), "rejected": turns(*"sabcz")}
    rm.tokenizer.model_max_length = 8  # many folders say too little: the model's positions count
    silent = [{**message, "name": None, "tool_calls": []} for message in twice["chosen"]]
    for row in [{"prompt": x, **twice} for x in (None, "a", "c", head, head[1:])] + [{**twice, "chosen": silent}]:
        assert save.pair_of(row, rm) == [save.encode_responses(rm.tokenizer, head, ["y", "z"])]
        assert evaluation.prepare_pair(row, "", "") == {"prompt": head, "chosen": "y", "rejected": "z"}
    several = {side: chat[2:] for side, chat in twice.items()}  # completions of three turns
    for row, said in (({"prompt": "b", **twice}, "with it in"), ({"prompt": "a", **several}, "with it in"),
                      *(({**twice, "chosen": [{**silent[1], x: "x"}]}, x) for x in ("tool_calls", "thinking", "name"))):
        for read in (lambda row: save.pair_of(row, rm), lambda row: evaluation.prepare_pair(row, "", "")):
            pytest.raises(save.UsageError, read, row).match(said)

def test_what_only_the_rm_refuses_is_named_before_the_first_step(world, tmp_path, capsys):
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + toy.RM_TEMPLATE
    (shutil.copytree(world / "rm", tmp_path / "rm") / "chat_template.jinja").write_text(picky)
    flags = {"rm": tmp_path / "rm", "prompts": write(tmp_path / "prompts.jsonl", ["copy a", turns("copy", "copy b")])}
    assert f"{flags['prompts']} row 2: no system" in refusal(capsys, argv(world, tmp_path / "out", **flags))

def on_two_ranks(tmp_path, words, **on_rank_1):
    def child(rank):
        sys.stderr = open(tmp_path / str(rank), "w", buffering=1)
        vars(save).update(on_rank_1 if rank else {})
        as_rank(rank, port, [words])
    port, ranks = free_port(), [multiprocessing.get_context("fork").Process(target=child, args=(i,)) for i in (0, 1)]
    [rank.start() for rank in ranks], [rank.join(60) for rank in ranks]
    return [rank.exitcode for rank in ranks], [(tmp_path / name).read_text() for name in "01"]

def test_a_part_that_text_does_not_use_changes_nothing_on_two_ranks(world, tmp_path):
    """Gemma 3 reads images too; what a text model has in its config is in text_config."""
    vision = {**SHAPE, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=SHAPE, vision_config=vision, num_labels=1)
    rm = written(tmp_path / "rm", AutoModelForSequenceClassification.from_config(config), toy.rm_tokenizer())
    runs = [argv(world, tmp_path / x, rm=rm, stage="preference", pairs=world / "pairs.jsonl") for x in "ab"]
    save.main(runs[0])
    assert on_two_ranks(tmp_path, runs[1])[0] == [0, 0]
    one, two = ([row["rm_grad_norm"] for (_, step), row in metrics(tmp_path / x).items() if step] for x in "ab")
    assert one == pytest.approx(two, rel=1e-6) and save.RewardModel.from_pretrained(str(tmp_path / "b/rm"))

@pytest.mark.parametrize("at, error", [("prepare", KeyError), ("save_step", KeyError), ("save_step", save.UsageError)])
def test_a_rank_that_fails_says_why_and_nobody_waits(world, tmp_path, at, error):
    def fail(*_):
        raise error("why")
    codes, said = on_two_ranks(tmp_path, argv(world, tmp_path / "out", rm_update="none"), **{at: fail})
    assert min(codes) and "why" in said[1]  # a traceback is what nobody expected
    assert (codes[1] == 2) == (said[1] == "save.py: error: rank 1: why\n") == (error == save.UsageError)
