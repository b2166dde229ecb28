"""Everything of save.py that touches a tokenizer or a model, against plain transformers and torch: what goes into the
models, what comes out, how it is sampled, how it is trained, and the three steps of Algorithm 2 on small batches."""
import copy
import dataclasses
import gzip
import json
import math
import random
import statistics

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Gemma2Config,
                          GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config)
from transformers.generation.logits_process import (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

import save

SPECIAL = ["<pad>", "<s>", "<system>", "<user>", "<assistant>", "<end>"]
END, LETTERS = SPECIAL.index("<end>"), "abcdefghij"
CHAT = ("{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
        "{{ '<assistant>' if add_generation_prompt else '' }}")
ASK = [{"role": "user", "content": "abc"}]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenizer(template=CHAT, letters=None, bos=None, adds_bos=False):
    """One token for each special word and each byte (or only for `letters`); BOS in front if adds_bos."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if letters is None else letters
    core = Tokenizer(models.BPE({word: i for i, word in enumerate([*SPECIAL, *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, bos_token=bos, eos_token="<end>",
                                   pad_token="<pad>")


def config(kind, vocab, **other):
    """A model small enough for a test, with weights large enough for differences to show."""
    shape = dict(vocab_size=vocab, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
                 max_position_embeddings=96, pad_token_id=None, bos_token_id=None, eos_token_id=END)
    if kind != "gpt2":
        shape.update(intermediate_size=32, num_key_value_heads=1)
    if kind == "gemma2":
        shape.update(head_dim=8, query_pre_attn_scalar=8, sliding_window=4, final_logit_softcapping=2.0)
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config, "gpt2": GPT2Config}
    return kinds[kind](**{**shape, **other})


def reward_model(kind="llama", seed=0, words=None, **other):
    """A reward model with random weights everywhere, in the value head too."""
    words = words or tokenizer(bos="<s>", adds_bos=True)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config(kind, len(words), num_labels=1, **other))
    return save.RewardModel(model, words, {"weight": torch.randn(1, 16), "bias": torch.randn(1)})


def policy(kind="llama", seed=0, words=None, **other):
    words = words or tokenizer(letters=LETTERS)
    torch.manual_seed(seed)
    return save.Policy(AutoModelForCausalLM.from_config(config(kind, len(words), **other)), words)


def ragged(seed=0, vocab=16, count=6):
    """[(ids, prompt_length)] with prompts of 1 to 9 tokens and responses of 1 to 12."""
    rng = random.Random(seed)
    sizes = [(rng.randint(1, 9), rng.randint(1, 12)) for _ in range(count)]
    return [([rng.randrange(vocab) for _ in range(p + r)], p) for p, r in sizes]


def chats(rm, seed=0, count=6):
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices("ab é😀\n", k=rng.randint(1, 9)))  # noqa: E731
    return [save.encode_responses(rm.tokenizer, [{"role": "user", "content": word()}], [word()])[0] for _ in range(count)]


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def same(left, right, tol=0.0):
    """Two dicts of tensors, or two tensors, are equal to `tol`."""
    if not isinstance(left, dict):
        left, right = {"": left}, {"": right}
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=tol, atol=tol), (name, left[name], right[name])


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# ---------------------------------------------------------------- text
BOS_CASES = {"the template writes it": ("{{ bos_token }}" + CHAT, "<s>", False), "tokenizer": (CHAT, "<s>", True),
             "both": ("{{ bos_token }}" + CHAT, "<s>", True), "neither, no BOS": (CHAT, None, False),
             "has one, wants none": (CHAT, "<s>", False)}


@pytest.mark.parametrize("case", BOS_CASES)
def test_a_chat_begins_with_exactly_one_bos_where_one_is_wanted(case):
    words = tokenizer(*BOS_CASES[case][:1], None, *BOS_CASES[case][1:])
    body = words.convert_tokens_to_ids(["<user>", "a", "b", "c", "<end>"])
    first = [] if "no" in case else [1]
    assert save.encode_chat(words, ASK) == first + body
    assert save.encode_chat(words, ASK, generation_prompt=True) == first + body + [4]


def test_the_date_of_the_llama_template_is_pinned():
    dated = ("{%- if not date_string is defined %}{%- if strftime_now is defined %}"
             "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- endif %}"
             "{{ '<system>Today Date: ' + date_string + '<end>' }}" + CHAT)
    words = tokenizer(dated)
    assert words.decode(save.encode_chat(words, ASK)) == "<system>Today Date: 26 Jul 2024<end><user>abc<end>"


def test_a_template_that_breaks_the_prefix_is_refused():
    ids, length = save.encode_responses(tokenizer(), ASK, ["d"])[0]
    assert (tokenizer().decode(ids[:length]), tokenizer().decode(ids)) == ("<user>abc<end>", "<user>abc<end><assistant>d<end>")
    counting = "{{ messages | length }}" + CHAT
    silent = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    for template in (counting, silent):
        with pytest.raises(save.UsageError, match="prefix"):
            save.encode_responses(tokenizer(template), ASK, ["d"])


@pytest.mark.parametrize("text, utf8", [("naïve 😀", "naïve 😀"), ("a\ud800b", "a?b"), ("\U0010ffff", "\U0010ffff")])
def test_any_text_can_be_encoded(text, utf8):
    ids = save.encode_chat(tokenizer(), [{"role": "user", "content": text}])
    assert len(ids) == len(utf8.encode()) + 2 and tokenizer().decode(ids) == f"<user>{utf8}<end>"


def test_micro_batches_hold_every_row_once_within_the_budget_longest_first():
    rng = random.Random(1)
    sequences = [([0] * rng.randint(1, 200), 1) for _ in range(500)] + [([0] * 5000, 1)]
    rows = [row for row in range(501) if row % 7]
    batches = save.micro_batches(rows, sequences, 2048)
    widths = [[len(sequences[row][0]) for row in batch] for batch in batches]
    assert sorted(sum(batches, [])) == rows and sum(widths, []) == sorted(sum(widths, []), reverse=True)
    assert widths[0] == [5000] and all(len(w) * max(w) <= 2048 for w in widths[1:])
    assert sum(len(w) * max(w) for w in widths) < 1.1 * sum(sum(widths, []))
    assert save.micro_batches(rows, sequences, 1) == [[row] for row in sum(batches, [])]


def test_draw_is_an_endless_stream_of_shuffled_epochs():
    items = [f"item {i}" for i in range(10)]
    stream = save.draw(items, 0, "prompts", 0, 35)
    epochs = [stream[i:i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(items) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    assert [item for start in range(0, 35, 7) for item in save.draw(items, 0, "prompts", start, 7)] == stream
    assert save.draw(items, 1, "prompts", 0, 35) != stream != save.draw(items, 0, "pairs", 0, 35)


def write(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(json.dumps(rows) if ".jsonl" not in path.name
                   else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def test_rows_are_the_same_from_every_kind_of_file(tmp_path):
    rows = [{"prompt": "a\u2028b"}, "c", [{"role": "user", "content": "😀"}]]
    for name, opener in (("x.json", open), ("x.jsonl", open), ("x.jsonl.gz", gzip.open), ("x.json.gz", gzip.open)):
        file = write(tmp_path / name, rows, opener)
        assert list(save.read_rows(file, "prompts")) == [(f"--prompts {file} row {i + 1}", rows[i]) for i in range(3)]
    (tmp_path / "bad.jsonl").write_text('"a"\n{\n')
    with pytest.raises(save.UsageError, match="--prompts .*bad.jsonl row 2: not valid JSON"):
        list(save.read_rows(str(tmp_path / "bad.jsonl"), "prompts"))
    for name, text in (("none.jsonl", None), ("empty.jsonl", ""), ("object.json", "{}")):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(save.UsageError, match=f"--pairs .*{name}: expected a"):
            list(save.read_rows(str(tmp_path / name), "pairs"))


def test_prompts_may_be_strings_messages_or_objects(tmp_path):
    rows = ["abc", ASK, {"prompt": "abc"}, {"prompt": ASK}, {"messages": ASK}, {"prompt": "abc", "chosen": "a" * 9}]
    cfg = save.Config(prompts=write(tmp_path / "p.jsonl", rows), max_response_tokens=9)
    assert save.read_prompts(cfg, tokenizer()) == [(ASK, save.encode_chat(tokenizer(), ASK, True))] * 6
    long = [{"prompt": "abc", "chosen": "a" * 9, "rejected": "a" * 10}, "a" * 1022, "abc"]  # 1022 + 3 of the template
    cfg.prompts = write(tmp_path / "long.jsonl", long)
    with pytest.raises(save.UsageError, match="row 2: 1025 tokens, expected at most 1024"):
        save.read_prompts(cfg, tokenizer())
    cfg.long_rows = "drop"
    assert [messages for messages, _ in save.read_prompts(cfg, tokenizer())] == [ASK]
    for bad in ("", [], {"text": "a"}, 3, ASK + [{"role": "assistant", "content": "a"}], [{"role": "user"}]):
        cfg.prompts = write(tmp_path / "bad.jsonl", [bad])
        with pytest.raises(save.UsageError, match="bad.jsonl row 1"):
            save.read_prompts(cfg, tokenizer())


def test_pairs_may_be_strings_or_chats_with_or_without_a_prompt_column(tmp_path):
    good, bad = (ASK + [{"role": "assistant", "content": text}] for text in ("good", "bad"))
    rows = [{"prompt": "abc", "chosen": "good", "rejected": "bad"}, {"prompt": ASK, "chosen": "good", "rejected": bad},
            {"chosen": good, "rejected": bad}, {"prompt": "abc", "chosen": good, "rejected": bad}]
    pairs = save.read_pairs(save.Config(), write(tmp_path / "pairs.jsonl", rows), "pairs", tokenizer())
    texts = [[(tokenizer().decode(ids), length) for ids, length in pair] for pair in pairs]
    assert texts == [[("<user>abc<end><assistant>good<end>", 5), ("<user>abc<end><assistant>bad<end>", 5)]] * 4
    for row in ({"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "b", "rejected": ""}, "a", {"chosen": "b"}):
        with pytest.raises(save.UsageError, match="bad.jsonl row 1: .*rejected"):
            save.read_pairs(save.Config(), write(tmp_path / "bad.jsonl", [row]), "pairs", tokenizer())


# ---------------------------------------------------------------- the reward model
KINDS = ("llama", "qwen2", "gpt2")


@torch.no_grad()
def stock_rewards(model, sequences):
    """A plain transformers classifier, one row at a time: no padding, and without a pad id it reads the last token."""
    model = copy.deepcopy(model).eval()
    model.config.pad_token_id = None
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids, _ in sequences])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad_id", (None, END))  # END: pad is the EOS and the last token of every chat
def test_rewards_are_stock_scores_however_they_are_batched(kind, pad_id):
    rm = reward_model(kind, pad_token_id=pad_id)
    rows = chats(rm)
    assert all(ids[-1] == END for ids, _ in rows) and len({len(ids) for ids, _ in rows}) > 3
    want = stock_rewards(rm.model, rows)
    assert want.std() > 0.1
    for budget in (1, 40, 10**6):
        same(save.score(rm, rows, budget)[0], want, 1e-5)
    same(rm(*save.model_inputs(rows, "cpu"))[0].detach(), want, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_v_is_that_of_the_prompt_alone(kind):
    rm = reward_model(kind)
    rows = chats(rm)
    rm.requires_grad_(False)
    hidden = torch.stack([rm.model.base_model(input_ids=torch.tensor([ids[:n]])).last_hidden_state[0, -1]
                          for ids, n in rows])
    want = (hidden @ rm.value_head.weight.T + rm.value_head.bias)[:, 0]
    same(rm(*save.model_inputs(rows, "cpu"))[1], want, 1e-5)
    same(save.score(rm, rows, 40)[1], hidden, 1e-5)


def test_each_loss_trains_its_own_part():
    rm = reward_model()
    rewards, values = rm(*save.model_inputs(chats(rm), "cpu"))
    masks = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    reward = gradients(rm, save.contrastive_loss(rewards.view(2, 3), values[:2], masks, ~masks))
    rewards, values = rm(*save.model_inputs(chats(rm), "cpu"))
    value = gradients(rm, save.value_loss(values[:2], rewards.view(2, 3)))
    for name in reward:
        assert reward[name].any() != name.startswith("value_head") and value[name].any() == name.startswith("value_head")


@pytest.mark.parametrize("kind, pad_id, words", [("llama", END, {}), ("qwen2", None, {"bos": "<s>", "adds_bos": True}),
                                                 ("gpt2", 0, {"template": "{{ bos_token }}" + CHAT, "bos": "<s>"})])
def test_a_saved_reward_model_is_a_stock_folder(tmp_path, kind, pad_id, words):
    rm = reward_model(kind, words=tokenizer(**words), pad_token_id=pad_id)
    rows = chats(rm)
    want, features = save.score(rm, rows, 40)
    values, masters = rm.value(features).detach(), weights(rm.model)
    rm.model.base_model.bfloat16()  # a working copy with less precision than its masters
    rm.save_pretrained(tmp_path / "rm", masters)
    assert next(rm.model.parameters()).dtype is torch.bfloat16 and rm.model.config.pad_token_id == pad_id

    stock, words = (kind.from_pretrained(tmp_path / "rm") for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    assert {p.dtype for p in stock.parameters()} == {torch.float32} and stock.config.dtype is torch.float32
    words.padding_side = "right"
    inputs = words.pad({"input_ids": [ids for ids, _ in rows]}, return_tensors="pt")
    assert (inputs.attention_mask == 0).any() and words.chat_template == rm.tokenizer.chat_template
    same(stock(**inputs).logits[:, 0].detach(), want, 1e-5)
    again = save.RewardModel.from_pretrained(str(tmp_path / "rm"))
    assert again.has_value_head
    same(again.value(save.score(again, rows, 40)[1]).detach(), values, 1e-5)


def test_what_is_no_reward_model_is_refused_and_a_new_head_is_deterministic(tmp_path):
    words = tokenizer()
    for name, model in (("two", AutoModelForSequenceClassification.from_config(config("llama", len(words)))),
                        ("causal", AutoModelForCausalLM.from_config(config("llama", len(words))).bfloat16())):
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    for new_head in (False, True):
        with pytest.raises(save.UsageError, match="2 labels, expected a reward model with 1"):
            save.RewardModel.from_pretrained(str(tmp_path / "two"), new_head)
    with pytest.raises(save.UsageError, match="no reward head"):
        save.RewardModel.from_pretrained(str(tmp_path / "causal"))
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(heads))
        rm = save.RewardModel.from_pretrained(str(tmp_path / "causal"), True, seed)
        heads.append(rm.model.score.weight.detach())
        same(weights(rm.model.model), weights(model.model))
        assert heads[-1].dtype is torch.float32 and not rm.has_value_head and not rm.value_head.weight.any()
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2]) and heads[0].shape == (1, 16)
    with pytest.raises(save.UsageError, match="--rm .*nowhere: no such folder"):
        save.RewardModel.from_pretrained(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("kind, rates", [("gpt2", {}), ("llama", {"attention_dropout": 0.5})])  # GPT2's own are 0.1
def test_dropout_is_removed(kind, rates):
    for model in (reward_model(kind, **rates), policy(kind, **rates)):
        inputs = save.model_inputs(ragged(), "cpu") + ((0.7,) if isinstance(model, save.Policy) else ())
        want = model.eval()(*inputs)[0]
        same(model.train()(*inputs)[0], want)


def test_a_bf16_working_copy_keeps_heads_and_buffers_in_fp32():
    cfg = save.Config(device="cpu", dtype="bfloat16")
    rm = save.to_working_copy(reward_model(), cfg)
    dtypes = {name: p.dtype for name, p in rm.named_parameters()}
    fp32 = {"model.score.weight", "value_head.weight", "value_head.bias"}
    assert {name for name, dtype in dtypes.items() if dtype is torch.float32} == fp32
    assert {b.dtype for b in rm.buffers() if b.is_floating_point()} == {torch.float32}
    rewards, _ = save.score(rm, chats(rm), 40)
    assert rewards.dtype is torch.float32 and not torch.equal(rewards, rewards.bfloat16().float())


# ---------------------------------------------------------------- the policy's log-probs
def plain_log_probs(model, ids, prompt_length, temperature):
    """Of the response tokens of one row, from the whole logits of plain transformers."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return torch.stack([(logits[t - 1] / temperature).log_softmax(-1)[ids[t]] for t in range(prompt_length, len(ids))])


POLICIES = [("llama", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False}), ("qwen2", {}),
            ("gpt2", {}), ("gemma2", {})]


@pytest.mark.parametrize("kind, options", POLICIES)
def test_log_probs_and_gradients_are_those_of_the_whole_logits(kind, options):
    pi, rows = policy(kind, **options), ragged()
    want = [plain_log_probs(pi.model, ids, n, 0.7) for ids, n in rows]
    coefficients = [torch.randn(len(w)) for w in want]
    want_grads = gradients(pi, sum((w * c).sum() for w, c in zip(want, coefficients)))
    assert pi.check_logits("") is None and torch.cat(want).std() > 0.2
    for chunk, recompute in ((1024, False), (1, False), (7, False), (7, True)):
        if recompute:  # as accumulate does: transformers recomputes in training mode only
            pi.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            pi.train()
        got, mask = pi(*save.model_inputs(rows, "cpu"), 0.7, chunk)
        assert mask.sum(1).tolist() == [len(w) for w in want] and not got[~mask].any()
        for line, hit, w in zip(got, mask, want):
            same(line[hit].detach(), w.detach(), 1e-5)
        same(gradients(pi, sum((line[hit] * c).sum() for line, hit, c in zip(got, mask, coefficients))), want_grads, 2e-5)


def test_an_unknown_scaling_of_the_logits_is_refused(monkeypatch):
    pi = policy()
    forward = pi.model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.1
        return output

    monkeypatch.setattr(pi.model, "forward", scaled)
    with pytest.raises(save.UsageError, match="Policy.logits does not know"):
        pi.check_logits("x")


# ---------------------------------------------------------------- rollout
PROMPTS = [[3, 6, 7, 8, 5, 4], [3, 9, 5, 4], [3] + [7, 8] * 6 + [5, 4], [4], [3, 12, 11, 10, 5, 4]]
SAMPLING = dict(max_new_tokens=10, temperature=1.0, top_p=0.9, top_k=8)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2"])  # gemma2: sliding window shorter than the prompts
def test_greedy_is_what_generate_does(kind):
    pi = policy(kind)
    got, ended = save.rollout(pi, PROMPTS, 1, range(5), max_new_tokens=10, temperature=0, top_p=1.0, top_k=0)
    for prompt, response, end in zip(PROMPTS, got, ended):
        want = pi.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
                                 do_sample=False, max_new_tokens=10, eos_token_id=END, pad_token_id=0)[0].tolist()
        assert response == want[len(prompt):] and end == (response[-1] == END)
    assert len({tuple(response) for response in got}) > 2


def test_a_response_stops_at_every_eos_and_nowhere_else():
    pi = policy()
    pi.model.generation_config.eos_token_id = [7, 9]
    pi = save.Policy(pi.model, pi.tokenizer)
    stops = {7, 9, END}  # the tokenizer's own counts too
    responses, ended = save.rollout(pi, PROMPTS, 30, range(150), **{**SAMPLING, "top_k": 0, "top_p": 1.0})
    assert {row[-1] for row, end in zip(responses, ended) if end} == stops and 0.1 < sum(ended) / 150 < 0.95
    for row, end in zip(responses, ended):
        assert not stops & set(row[:-1]) and end == (row[-1] in stops) and (end or len(row) == 10)
    assert any(end and len(row) == 10 for row, end in zip(responses, ended)) and min(map(len, responses)) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_response_depends_on_its_seed_and_on_nothing_else(kind):
    pi = policy(kind)
    want, ended = save.rollout(pi, PROMPTS, 4, range(20), **SAMPLING)
    for max_rows in (1, 4, 9, 100):
        assert save.rollout(pi, PROMPTS, 4, range(20), **SAMPLING, max_rows=max_rows) == (want, ended)
    for p in range(5):
        alone, _ = save.rollout(pi, PROMPTS[p:p + 1], 4, range(4 * p, 4 * p + 4), **SAMPLING)
        assert alone == want[4 * p:4 * p + 4] and len({tuple(row) for row in alone}) > 2
    assert save.rollout(pi, PROMPTS[:1], 4, [3, 2, 1, 0], **SAMPLING)[0] == want[3::-1]
    assert sum(a == b for a, b in zip(save.rollout(pi, PROMPTS, 4, range(20, 40), **SAMPLING)[0], want)) < 5


@pytest.mark.parametrize("temperature, top_p, top_k", [(0.7, 0.8, 20), (1.0, 1.0, 0), (1.5, 0.6, 0), (0.5, 1.0, 7),
                                                       (2.0, 0.95, 500), (1.0, 0.01, 5), (3.0, 0.8, 4)])
def test_sampling_follows_the_distribution_of_transformers(temperature, top_p, top_k):
    logits, n = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(3)), 20_000
    logits[0, 0] = -math.inf  # never to be drawn, not even at 0
    want = TemperatureLogitsWarper(temperature)(None, logits)
    want = TopKLogitsWarper(top_k)(None, want) if top_k else want
    want = TopPLogitsWarper(top_p)(None, want)[0].double().softmax(-1)
    grid = (torch.arange(n) + 0.5) / n  # an even grid: each token is drawn n * p times, to within one
    counts = save.sample_tokens(logits.expand(n, -1), grid, temperature, top_p, top_k).bincount(minlength=50)
    assert (counts - n * want).abs().max() < 1.1 and torch.equal(counts > 0, n * want > 0.5)
    edges = save.sample_tokens(logits.expand(2, -1), torch.tensor([0.0, 1 - 2**-24]), temperature, top_p, top_k)
    assert (want[edges] > 0).all()
    order = sorted(range(50), key=lambda i: -want[i]) if top_k or top_p < 1 else range(50)
    for u, token in zip(grid[::997].tolist(), save.sample_tokens(logits.expand(21, -1), grid[::997], temperature, top_p,
                                                                 top_k).tolist()):
        passed = 0.0  # walk along the cumulative distribution until it exceeds u
        for i in order:
            passed += want[i].item()
            if passed > u:
                break
        assert token == i


# ---------------------------------------------------------------- the optimizer
CPU = save.Config(device="cpu", dtype="float32")


def noisy_steps(model, optimizer, steps, seed=0):
    """Steps with random gradients of very different size; one parameter sometimes has none."""
    for i in steps:
        numbers = torch.Generator().manual_seed(1000 * seed + i)
        for j, p in enumerate(model.parameters()):
            p.grad = None if j == i == 1 else torch.randn(p.shape, generator=numbers) * 10.0 ** (i % 4 - 2)
        yield optimizer.step(*([0.5] if i == 3 else []))


def test_sharded_adamw_is_adamw_with_clipping():
    ours, plain = reward_model(), reward_model()
    start, optimizer = weights(ours), save.ShardedAdamW(ours, 1e-2, CPU)
    adamw = torch.optim.AdamW(plain.parameters(), 1e-2, weight_decay=0.0)
    norms = list(noisy_steps(ours, optimizer, range(6)))

    class Clipping:
        def step(self, scale=1.0):
            adamw.param_groups[0]["lr"] = 1e-2 * scale
            norm = nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item()
            adamw.step()
            return norm

    assert norms == pytest.approx(list(noisy_steps(plain, Clipping(), range(6))), rel=1e-5)
    assert min(norms) < 1 < max(norms) and all(p.grad is None for p in ours.parameters())
    same(weights(ours), weights(plain), 1e-6)
    assert not any(torch.equal(p, start[name]) for name, p in ours.named_parameters())


def test_masters_move_where_bf16_weights_cannot():
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    model.weight.data = (torch.randn(64, 64) * 0.02).bfloat16().float()
    start, plain = model.weight.detach().clone(), nn.Parameter(model.weight.detach().bfloat16())
    optimizer = save.ShardedAdamW(model, 1e-7, dataclasses.replace(CPU, dtype="bfloat16"), keep_initial=True)
    save.to_working_copy(nn.ModuleDict({"model": model}), dataclasses.replace(CPU, dtype="bfloat16"))
    adamw = torch.optim.AdamW([plain], 1e-7, weight_decay=0.0)
    for _ in range(300):
        model.weight.grad, plain.grad = torch.ones_like(model.weight), torch.ones_like(plain)
        optimizer.step()
        adamw.step()
    same(start - optimizer.masters["weight"], torch.full((64, 64), 300e-7), 1e-6)
    assert torch.equal(model.weight, optimizer.masters["weight"].bfloat16())
    changed, without = ((w.float() != start).float().mean() for w in (model.weight, plain))
    assert changed > 0.3 and without < 0.02
    assert torch.equal(optimizer.full_state()["weight"], optimizer.masters["weight"])
    with optimizer.swapped():
        assert torch.equal(model.weight.float(), start)
    assert torch.equal(model.weight, optimizer.masters["weight"].bfloat16())


def test_swapped_shows_the_initial_weights_and_a_reloaded_optimizer_continues_alike():
    model = reward_model()
    start, optimizer = weights(model), save.ShardedAdamW(model, 1e-2, CPU, keep_initial=True)
    list(noisy_steps(model, optimizer, range(3)))
    after, state = weights(model), {name: x.clone() for name, x in optimizer.state_dict().items()}
    with optimizer.swapped():
        same(weights(model), start)
    same(weights(model), after)
    assert not torch.equal(after["value_head.weight"], start["value_head.weight"])

    other = reward_model(seed=1)
    resumed = save.ShardedAdamW(other, 1e-2, CPU)
    for name, x in state.items():
        resumed.load(*name.split(".", 1), lambda: x.clone())
    resumed.publish(resumed.masters)
    same(weights(other), after)
    for pair in ((model, optimizer), (other, resumed)):
        list(noisy_steps(*pair, range(3, 6)))
    same(weights(other), weights(model))


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = reward_model()
    optimizer = save.ShardedAdamW(model, 1e-2, CPU)
    list(noisy_steps(model, optimizer, range(2)))
    before, state = weights(model), {name: x.clone() for name, x in optimizer.state_dict().items()}
    for bad in (math.nan, math.inf):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.value_head.bias.grad.fill_(bad)
        with pytest.raises(FloatingPointError, match="gradient norm"):
            optimizer.step()
        same(weights(model), before)
        same(optimizer.state_dict(), state)


def test_ranks_own_disjoint_balanced_shares_that_make_one_adamw(monkeypatch):
    def build():
        torch.manual_seed(0)
        return nn.ParameterDict({str(n): nn.Parameter(torch.randn(n)) for n in (1, 2, 3, 5, 6, 7)})

    plain = build()
    list(noisy_steps(plain, save.ShardedAdamW(plain, 1e-2, CPU), range(3)))
    monkeypatch.setattr(save, "broadcast", lambda tensor, source: None)
    for world, loads in ((2, [12, 12]), (8, [7, 6, 5, 3, 2, 1, 0, 0])):
        monkeypatch.setattr(save, "WORLD", world)
        owned = {}
        for rank in range(world):
            monkeypatch.setattr(save, "RANK", rank)
            model = build()
            optimizer = save.ShardedAdamW(model, 1e-2, CPU)
            list(noisy_steps(model, optimizer, range(3)))
            assert sum(m.numel() for m in optimizer.masters.values()) == loads[rank]
            assert not owned.keys() & optimizer.masters.keys()
            owned.update(optimizer.masters)
        same({name: m.detach() for name, m in sorted(owned.items())}, weights(plain), 1e-7)


# ---------------------------------------------------------------- the three steps
def bits(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


# four groups of four responses: both signs, one sign only, both, a single survivor
POSITIVE, NEGATIVE = bits("1010", "1100", "1000", "0010"), bits("0100", "0000", "0011", "0000")
USABLE, VALID = bits("1111", "1110", "0000", "1101"), torch.tensor([True, False, True, False])
TALKS = [("abc",), ("ja",), ("dddddddd",), ("h",)]


class Recording(save.ShardedAdamW):
    """Remembers weights and gradients as they are before each step."""

    def step(self, *args):
        named = [(name, p) for name, p in self.named if p.grad is not None]
        pair = {name: p.detach().clone() for name, p in named}, {name: p.grad.clone() for name, p in named}
        self.seen = [*getattr(self, "seen", []), pair]
        return super().step(*args)


def make_run(out, **options):
    """A Run as save.train makes it, and its first batch."""
    defaults = dict(stage="save", device="cpu", out=str(out), batch=4, group=4, steps=4, max_new_tokens=10, top_p=1.0,
                    lr_rm=1e-2, lr_policy=1e-3, lr_value=1e-2, max_grad_norm=0.0, save_every=0, show_every=0)
    cfg = save.Config(**{**defaults, **options}).checked()
    run = save.Run(cfg, reward_model(), policy(), save.Log(cfg))
    run.optimizers = {"rm": Recording(run.rm.model, cfg.lr_rm, cfg), "value": Recording(run.rm.value_head, cfg.lr_value, cfg),
                      "policy": Recording(run.policy.model, cfg.lr_policy, cfg, keep_initial=True)}
    prompts = [([{"role": "user", "content": text}], save.encode_chat(run.policy.tokenizer, ASK[:0] + [
        {"role": "user", "content": text}], True)) for text, in TALKS]
    batch = save.sample(run, prompts, cfg.group, 1)
    save.score_batch(run, batch)
    return run, batch, prompts


def test_responses_are_put_into_the_words_of_both_models(tmp_path):
    run, batch, prompts = make_run(tmp_path)
    for row, ((ids, n), (chat, m)) in enumerate(zip(batch.sequences, batch.chats)):
        text, response = TALKS[row // 4][0], ids[n:]
        letters = run.policy.tokenizer.decode(response, skip_special_tokens=True)
        assert run.policy.tokenizer.decode(ids[:n]) == f"<user>{text}<end><assistant>"
        assert run.rm.tokenizer.decode(chat) == f"<s><user>{text}<end><assistant>{letters}<end>" and m == len(text) + 3
        ended = response[-1] == END
        cell = (batch.lengths, batch.ended, batch.usable)
        assert [x.flatten()[row].item() for x in cell] == [len(response), ended, ended]
    assert 0 < batch.ended.sum() < 16 and len({tuple(ids) for ids, _ in batch.sequences}) == 16
    same(batch.rewards.flatten(), stock_rewards(run.rm.model, batch.chats), 1e-5)
    draws = [save.sample(run, prompts, 4, *key).sequences for key in ((1,), (2,), (1, "value"))]
    assert draws[0] == batch.sequences and draws[0] != draws[1] != draws[2] != draws[0]


@pytest.mark.parametrize("micro_tokens", (1, 60, 10**6))
@pytest.mark.parametrize("update, rows", [("save", 6), ("mean_reward", 6), ("hl_bt", 6)])
def test_the_reward_model_step_has_the_gradient_of_the_plain_graph(tmp_path, update, rows, micro_tokens):
    run, batch, _ = make_run(tmp_path, rm_update=update, micro_tokens=micro_tokens)
    batch.usable, before = USABLE, weights(run.rm)
    rewards, values = run.rm(*save.model_inputs(batch.chats, "cpu"))
    rewards = rewards.view(4, 4)
    groups = [rewards[p][USABLE[p]] for p in range(4)]
    if update == "hl_bt":
        loss = sum((1 + (g.min() - g.max()).exp()).log() for g in groups if len(g)) / 3
    else:
        means = torch.stack([g.mean() if len(g) else torch.tensor(0.0) for g in groups])
        loss = save.contrastive_loss(rewards, values[::4] if update == "save" else means, POSITIVE, NEGATIVE)
    want, forwarded = gradients(run.rm.model, loss), []
    run.rm.register_forward_pre_hook(lambda module, inputs: forwarded.append(len(inputs[0])))
    assert save.reward_model_step(run, batch, POSITIVE, NEGATIVE) is True
    same(run.optimizers["rm"].seen[0][1], want, 1e-6)
    assert sum(forwarded) == rows and all(p.requires_grad for p in run.rm.parameters()) and not run.rm.training
    moved = {name for name, p in run.rm.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"model.{name}" for name in want}


def test_without_valid_prompts_only_the_value_head_learns(tmp_path):
    run, batch, _ = make_run(tmp_path, value_coef=3.0)
    before = weights(run.rm)
    assert save.reward_model_step(run, batch, POSITIVE, torch.zeros_like(NEGATIVE)) is False
    same(weights(run.rm), before)
    assert not hasattr(run.optimizers["rm"], "seen") and not run.optimizers["rm"].adamw.state
    values = run.rm.value(batch.features).tolist()
    error = [values[p] - batch.rewards[p][USABLE[p]].mean().item() for p in (0, 1, 3)]  # the third has no usable row
    loss = save.value_step(run, batch.rewards, batch.features, USABLE)
    assert loss == pytest.approx(sum(e * e for e in error) / 3, rel=1e-5)
    want = 3 * sum(2 * e * batch.features[p] for e, p in zip(error, (0, 1, 3))) / 3
    same(run.optimizers["value"].seen[0][1]["weight"][0], want, 1e-4)
    assert {n for n, p in run.rm.named_parameters() if not torch.equal(p, before[n])} == {"value_head.weight",
                                                                                         "value_head.bias"}


def plain_policy_loss(cfg, batch, trained, model, old_model, initial, prompts):
    """Step 3 as loops over rows, with plain transformers and the formulas of the papers."""
    losses = []
    for p in prompts:
        kept = [g for g in range(4) if trained[p][g]]
        base = kept if cfg.adv_group == "survivors" else range(4)
        rows = {g: batch.sequences[4 * p + g] for g in base}
        lp, old, ref = ({g: plain_log_probs(m, *row, cfg.temperature) for g, row in rows.items()}
                        for m in (model, old_model, initial))
        reward = {g: batch.rewards[p, g].item() for g in base}
        if cfg.algo == "rloo":
            reward = {g: r - cfg.kl_coef * (old[g] - ref[g]).sum().item() for g, r in reward.items()}
        for g in kept:
            others = [r for h, r in reward.items() if h != g]
            advantage = reward[g] - sum(others) / len(others) if cfg.algo == "rloo" else \
                (reward[g] - statistics.mean(reward.values())) / (statistics.stdev(reward.values()) + 1e-4)
            change, gap = lp[g] - old[g].detach(), ref[g].detach() - lp[g]
            ratio = {"grpo": change, "gspo": change.mean(), "rloo": change.sum()}[cfg.algo].exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * advantage).mean()
            losses.append((cfg.kl_coef * (gap.exp() - gap - 1).mean() if cfg.algo != "rloo" else 0) - gain)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("algo", ("grpo", "gspo", "rloo"))
@pytest.mark.parametrize("options", [{}, {"num_minibatches": 2}, {"adv_group": "full", "micro_tokens": 1}, {"kl_coef": 0.0},
                                     {"policy_requires_both_signs": True, "micro_tokens": 60}], ids=str)
def test_the_policy_step_has_the_gradient_of_the_formulas(tmp_path, algo, options):
    run, batch, _ = make_run(tmp_path, algo=algo, **{"kl_coef": 0.3, **options})
    cfg, optimizer, initial = run.cfg, run.optimizers["policy"], copy.deepcopy(run.policy.model)
    list(noisy_steps(run.policy.model, optimizer, range(3)))  # away from the reference
    old, trained = copy.deepcopy(run.policy.model), (POSITIVE | NEGATIVE) & bits("1111", "1111", "1111", "0000")
    if cfg.policy_requires_both_signs:
        trained = trained & VALID[:, None]
    save.policy_step(run, batch, POSITIVE | NEGATIVE, VALID)
    parts = [range(4)] if cfg.num_minibatches == 1 else [range(2), range(2, 4)]
    assert len(optimizer.seen) == 3 + len(parts)
    for part, (at, got) in zip(parts, optimizer.seen[3:]):
        model = copy.deepcopy(old)
        model.load_state_dict(at, strict=False)
        same(got, gradients(model, plain_policy_loss(cfg, batch, trained, model, old, initial, part)), 2e-5)
    assert not torch.equal(weights(run.policy.model)["model.norm.weight"], weights(old)["model.norm.weight"])


def test_one_update_of_gspo_is_one_of_grpo_and_single_survivors_are_no_update(tmp_path):
    after = {}
    for algo in ("grpo", "gspo"):
        run, batch, _ = make_run(tmp_path, algo=algo)
        before = weights(run.policy)
        save.policy_step(run, batch, bits("1000", "0001", "0000", "0010"), VALID)
        same(weights(run.policy), before)
        save.policy_step(run, batch, POSITIVE | NEGATIVE, VALID)
        after[algo] = weights(run.policy)
    same(after["grpo"], after["gspo"], 1e-5)
    assert not torch.allclose(after["grpo"]["model.lm_head.weight"], before["model.lm_head.weight"], atol=5e-4)


@pytest.mark.parametrize("update", ("save", "mean_reward", "hl_bt", "none"))
def test_a_step_filters_scores_and_trains_in_the_order_of_algorithm_2(tmp_path, monkeypatch, update):
    run, batch, prompts = make_run(tmp_path, rm_update=update, group=8, lr_rm=0.02, m0=0.5, steps=8)
    calls, before = {}, weights(run.rm)
    for name in ("reward_model_step", "policy_step"):
        def wrapped(run, batch, *masks, name=name, inner=getattr(save, name)):
            calls[name] = batch.rewards.clone(), run.rm.value(batch.features).tolist(), masks
            return inner(run, batch, *masks)
        monkeypatch.setattr(save, name, wrapped)
    save.save_step(run, 1, prompts)
    first, last = calls.get("reward_model_step"), calls["policy_step"]
    assert run.optimizers["policy"].seen and 0 < batch.usable.sum() < 32
    same(last[0].flatten(), stock_rewards(run.rm.model, batch.chats), 1e-5)  # step 3 sees the improved reward model
    if update == "none":
        same(weights(run.rm), before)
        assert first is None
    else:
        assert (last[0] - first[0]).abs().mean() > 0.01 and len(run.optimizers["rm"].seen) == 1
    if update in ("none", "hl_bt"):
        assert last[2][0].all()
        return
    for (rewards, values, masks), usable in ((first, batch.usable), (last, torch.ones_like(batch.usable))):
        means = [rewards[p][batch.usable[p]].mean().item() for p in range(4)]
        keep = [[abs(rewards[p][g] - (values if update == "save" else means)[p]) >= math.log(mu / (1 - mu)) and usable[p][g]
                 for g in range(8)] for p in range(4)]
        assert 0 < sum(map(sum, keep)) < 32 and (masks[0] | masks[1] if len(masks) == 3 else masks[0]).tolist() == keep
    if update == "save":  # Eq. 21 with the new rewards and the new features
        head, got = run.optimizers["value"].seen[0]
        errors = (features @ head["weight"].T + head["bias"])[:, 0] - torch.tensor(means)
        same(got["bias"], 2 * errors.mean(0, True), 1e-4)
    assert hasattr(run.optimizers["value"], "seen") == (update == "save")
