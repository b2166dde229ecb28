"""What goes into the models of save.py and what comes out: text, rewards, values, log-probs and sampled responses,
against plain transformers one row at a time. Tiny random models with weights large enough for differences to show."""
import copy
import gzip
import json
import math
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, CohereConfig,
                          Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import save

SPECIAL = ["<pad>", "<s>", "<system>", "<user>", "<assistant>", "<end>"]
END, LETTERS = SPECIAL.index("<end>"), "abcdefghij"
CHAT = ("{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
        "{{ '<assistant>' if add_generation_prompt else '' }}")
ASK = [{"role": "user", "content": "abc"}]

def tokenizer(template=CHAT, bos=None, adds_bos=False, letters=None):
    """One token for each special word and each byte (or only for `letters`), after a BOS if adds_bos."""
    letters = letters or sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({word: i for i, word in enumerate([*SPECIAL, *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, bos_token=bos, eos_token="<end>",
                                   pad_token="<pad>")

def config(kind, vocab, **other):
    shape = dict(vocab_size=vocab, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
                 max_position_embeddings=96, pad_token_id=None, bos_token_id=None, eos_token_id=END)
    if kind != "gpt2":
        shape.update(intermediate_size=32, num_key_value_heads=1)
    if kind == "gemma2":
        shape.update(head_dim=8, query_pre_attn_scalar=8, sliding_window=4, final_logit_softcapping=2.0)
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config, "gpt2": GPT2Config,
             "cohere": CohereConfig, "granite": GraniteConfig}
    return kinds[kind](**{**shape, **other})

def reward_model(kind="llama", seed=0, words=None, **other):
    words = words or tokenizer(bos="<s>", adds_bos=True)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config(kind, len(words), num_labels=1, **other)).eval()
    model.positions = 2048
    return save.RewardModel(model, words, {"weight": torch.randn(1, 16) / 4, "bias": torch.randn(1) / 4})

def policy(kind="llama", **other):
    words = tokenizer(letters=LETTERS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(kind, len(words), **other)).eval()
    model.positions = 2048
    return save.Policy(model, words)

def written(path, model, words):
    """A model folder."""
    model.save_pretrained(path)
    words.save_pretrained(path)
    return str(path)

def ragged():
    """[(ids, prompt_length)] with prompts of 1 to 9 and responses of 1 to 12 tokens."""
    rng = random.Random(0)
    sizes = [(rng.randint(1, 9), rng.randint(1, 12)) for _ in range(6)]
    return [([rng.randrange(16) for _ in range(p + r)], p) for p, r in sizes]

def chats(rm):
    """Six prompts with a response in the reward model's tokens, [(ids, prompt_length)]."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab é😀\n", k=rng.randint(1, 9))) for _ in range(12)]
    return [save.encode_responses(rm.tokenizer, [{"role": "user", "content": prompt}], [response])[0]
            for prompt, response in zip(texts[::2], texts[1::2])]

def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}

def gradients(module, loss):
    loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    return grads

def same(left, right, tol=0.0):
    """Two tensors, or two dicts of tensors, are equal to `tol`."""
    if not isinstance(left, dict):
        left, right = {"": left}, {"": right}
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tol, atol=tol, msg=lambda text: f"{name}: {text}")

# ---------------------------------------------------------------- text
@pytest.mark.parametrize("template, bos, adds_bos, count", [
    ("{{ bos_token }}" + CHAT, "<s>", False, 1), (CHAT, "<s>", True, 1), ("{{ bos_token }}" + CHAT, "<s>", True, 1),
    (CHAT, "<s>", False, 0), (CHAT, None, False, 0)])
def test_a_chat_has_exactly_one_bos_where_one_is_wanted(template, bos, adds_bos, count):
    words = tokenizer(template, bos, adds_bos)
    ids = [1] * count + words.convert_tokens_to_ids(["<user>", "a", "b", "c", "<end>"])
    assert save.encode_chats(words, [ASK])[0] == ids
    assert save.encode_chats(words, [ASK], True)[0] == ids + [SPECIAL.index("<assistant>")]

@pytest.mark.parametrize("date", [
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}",
    "{{ strftime_now(format='%d %b %Y') }}", "{% set f = '%d %b ' %}{% set now = strftime_now %}{{ now(f + '%Y') }}"])
def test_the_date_in_a_template_is_pinned(date):
    words = tokenizer("{{ '<system>Today Date: ' }}" + date + CHAT)
    assert words.decode(save.encode_chats(words, [ASK])[0]) == "<system>Today Date: 26 Jul 2024<user>abc<end>"

def test_a_template_that_does_not_keep_the_prompt_as_prefix_is_refused():
    [(ids, length)] = save.encode_responses(tokenizer(), ASK, ["d"])
    assert tokenizer().decode(ids[:length]) == "<user>abc<end>"
    assert tokenizer().decode(ids[length:]) == "<assistant>d<end>"
    counting = "{{ messages | length }}" + CHAT
    silent = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(save.UsageError, match="prefix"):
        save.encode_responses(tokenizer(counting), ASK, ["d"])
    with pytest.raises(save.UsageError, match="leaves out the response"):
        reward_model(words=tokenizer(silent))

def test_micro_batches_hold_every_row_once_within_the_budget_longest_first():
    rng = random.Random(1)
    sequences = [([0] * rng.randint(1, 200), 1) for _ in range(500)] + [([0] * 5000, 1)]
    rows = [row for row in range(501) if row % 7]
    batches = save.micro_batches(rows, sequences, 2048)
    widths = [[len(sequences[row][0]) for row in batch] for batch in batches]
    padded = [len(w) * max(w) for w in widths]
    assert sorted(sum(batches, [])) == rows and sum(widths, []) == sorted(sum(widths, []), reverse=True)
    assert widths[0] == [5000] and max(padded[1:]) <= 2048 and sum(padded) < 1.1 * sum(sum(widths, []))
    assert save.micro_batches(rows, sequences, 1) == [[row] for row in sum(batches, [])]

def test_draw_is_an_endless_stream_of_shuffled_epochs():
    items = [f"item {i}" for i in range(10)]
    stream = save.draw(items, 0, "prompts", 0, 35)
    epochs = [stream[i:i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == items for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    assert [item for start in range(0, 35, 7) for item in save.draw(items, 0, "prompts", start, 7)] == stream
    assert save.draw(items, 1, "prompts", 0, 35) != stream != save.draw(items, 0, "pairs", 0, 35)

def write(path, rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(lines if ".jsonl" in path.name else json.dumps(rows))
    return str(path)

def test_rows_are_the_same_from_every_kind_of_file(tmp_path):
    rows = [{"prompt": "a\u2028b"}, "c", [{"role": "user", "content": "😀"}]]
    for name in ("x.json", "x.jsonl", "x.json.gz", "x.jsonl.gz"):
        file = write(tmp_path / name, rows)
        assert list(save.read_rows(file, "prompts")) == [(f"--prompts {file} row {i + 1}", rows[i]) for i in range(3)]

def test_prompts_may_be_strings_messages_or_objects():
    pi, rm, cfg = policy(), reward_model(), save.Config(max_new_tokens=9)
    pi.tokenizer = tokenizer(bos="<s>", adds_bos=True)  # which is not one of the 9
    want = [(ASK, save.encode_chats(pi.tokenizer, [ASK], True)[0])]
    for row in ("abc", ASK, {"prompt": "abc"}, {"prompt": ASK}, {"prompt": "abc", "chosen": "a" * 9}):
        assert save.prompt_of(row, cfg, pi, rm) == want
    assert save.prompt_of({"prompt": "abc", "chosen": "a", "rejected": "a" * 10}, cfg, pi, rm) == []  # F.1
    turns = [{"role": "system", "content": "s"}, *ASK]  # chats have more of the prompt than the column
    sides = {side: turns + [{"role": "assistant", "content": "a"}] for side in ("chosen", "rejected")}
    assert save.prompt_of({"prompt": "abc", **sides}, cfg, pi, rm)[0][0] == turns

@pytest.mark.parametrize("positions, rm_positions, most", [(2048, 2048, 1024), (109, 2048, 100), (2048, 109, 98)])
def test_prompts_that_leave_no_room_for_a_response_are_refused(positions, rm_positions, most):
    """It may have 9 tokens. The RM's chat is two longer than the policy's prompt and response: a BOS and the end."""
    pi, rm, cfg = policy(), reward_model(), save.Config(max_new_tokens=9)
    pi.model.positions, rm.model.positions = positions, rm_positions
    [(_, ids)] = save.prompt_of("a" * (most - 3), cfg, pi, rm)
    assert len(ids) == most
    with pytest.raises(save.UsageError, match=f"^{most + 1} tokens, expected at most {most}: "):
        save.prompt_of("a" * (most - 2), cfg, pi, rm)

def test_a_bad_row_of_a_file_is_refused_and_one_of_a_hub_set_is_left_out(tmp_path, monkeypatch):
    def use(row):
        return [save.expect(row, "bad")]
    file = write(tmp_path / "rows.jsonl", ["a", "", "b"])
    with pytest.raises(save.UsageError, match=f"--prompts {file} row 2: bad"):
        save.used_rows(file, "prompts", use)
    monkeypatch.setattr(save, "read_rows", lambda source, flag: [("row 1", "a"), ("row 2", ""), ("row 3", "b")])
    assert save.used_rows("nobody/set", "prompts", use) == ["a", "b"]

def test_pairs_may_be_strings_or_chats_with_or_without_a_prompt_column():
    good, bad = (ASK + [{"role": "assistant", "content": text}] for text in ("good", "bad"))
    rm = reward_model(words=tokenizer())
    for row in ({"prompt": "abc", "chosen": "good", "rejected": "bad"}, {"chosen": good, "rejected": bad},
                {"prompt": ASK, "chosen": "good", "rejected": bad}, {"prompt": "abc", "chosen": good, "rejected": bad},
                {"prompt": ASK, "chosen": good[-1:], "rejected": bad[-1:]}):
        [pair] = save.pair_of(row, rm)
        texts = [(tokenizer().decode(ids), length) for ids, length in pair]
        assert texts == [("<user>abc<end><assistant>good<end>", 5), ("<user>abc<end><assistant>bad<end>", 5)]
    for row in ({"prompt": "other", "chosen": good, "rejected": bad}, {"chosen": good[-1:], "rejected": bad[-1:]}):
        with pytest.raises(save.UsageError, match="expected a prompt, or chats with it"):
            save.pair_of(row, rm)

# ---------------------------------------------------------------- the reward model
@torch.no_grad()
def stock_rewards(model, sequences):
    """A plain transformers classifier, one row at a time: no padding, and without a pad id it reads the last token."""
    model = copy.deepcopy(model).eval()
    model.config.pad_token_id = None
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids, _ in sequences])

@torch.no_grad()
def prompt_features(model, sequences):
    """The last hidden state of a pass over the prompt alone."""
    return torch.stack([model.base_model(input_ids=torch.tensor([ids[:length]])).last_hidden_state[0, -1]
                        for ids, length in sequences])

@pytest.mark.parametrize("kind", ("llama", "qwen2", "gpt2"))
@pytest.mark.parametrize("pad_id", (None, END))  # END: the pad id is the EOS and the last token of every chat
def test_rewards_and_values_are_those_of_single_rows_however_they_are_batched(kind, pad_id):
    rm = reward_model(kind, pad_token_id=pad_id)
    rows = chats(rm)
    rewards, features = stock_rewards(rm.model, rows), prompt_features(rm.model, rows)
    values = (features @ rm.value_head.weight.T + rm.value_head.bias)[:, 0].detach()
    assert all(ids[-1] == END for ids, _ in rows) and len({len(ids) for ids, _ in rows}) > 3
    assert rewards.std() > 0.1 and values.std() > 0.1
    for batch_rewards, batch_features in (save.score(rm, rows, budget) for budget in (1, 40, 10**6)):
        same(batch_rewards, rewards, 1e-5)
        same(batch_features, features, 1e-5)
    for got, want in zip(rm(*save.model_inputs(rows, "cpu")), (rewards, values)):
        same(got.detach(), want, 1e-5)

@pytest.mark.parametrize("kind, pad_id, words", [("llama", END, ()), ("qwen2", None, (CHAT, "<s>", True)),
                                                 ("gpt2", 1, (CHAT, "<s>", True))])  # the tokenizer pads with 0
def test_a_saved_reward_model_is_a_stock_folder(tmp_path, kind, pad_id, words):
    rm = reward_model(kind, words=tokenizer(*words), pad_token_id=pad_id)
    rows = chats(rm)
    for p in rm.model.base_model.parameters():
        p.data = p.data.bfloat16().float()
    rewards, features = save.score(rm, rows, 40)
    for p in rm.model.base_model.parameters():  # in whatever precision it works, the folder is fp32
        p.data = p.data.bfloat16()
    rm.save_pretrained(tmp_path / "rm")

    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    words = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert {p.dtype for p in stock.parameters()} == {stock.config.dtype} == {torch.float32}
    padded = words.pad({"input_ids": [ids for ids, _ in rows]}, return_tensors="pt", padding_side="right")
    assert (padded["attention_mask"] == 0).any() and words.chat_template == rm.tokenizer.chat_template
    same(stock(**padded).logits[:, 0].detach(), rewards, 1e-5)
    again = save.RewardModel.from_pretrained(str(tmp_path / "rm"))
    same(again.value(save.score(again, rows, 40)[1]), rm.value(features), 1e-5)
    assert again.has_value_head and [path.name for path in tmp_path.iterdir()] == ["rm"]

@pytest.mark.parametrize("kind, rates", [("gpt2", {}), ("llama", {"attention_dropout": 0.5})])  # GPT2's own are 0.1
def test_dropout_is_removed(tmp_path, kind, rates):
    for model, temperature in ((reward_model(kind, **rates), ()), (policy(kind, **rates), (0.7,))):
        loaded = type(model).from_pretrained(written(tmp_path / kind, model.model, model.tokenizer))
        inputs = *save.model_inputs(ragged(), "cpu"), *temperature
        want = loaded(*inputs)[0]
        same(loaded.train()(*inputs)[0], want)
        assert not torch.equal(model.train()(*inputs)[0], want)

def test_a_bf16_working_copy_keeps_heads_and_buffers_in_fp32():
    model, words = reward_model().model, tokenizer()
    for p in model.parameters():  # as a bf16 checkpoint is loaded
        p.data = p.data.bfloat16()
    rm = save.to_working_copy(save.RewardModel(model, words), save.Config(device="cpu", dtype="bfloat16"))
    fp32 = {name for name, p in rm.named_parameters() if p.dtype is torch.float32}
    assert fp32 == {"model.score.weight", "value_head.weight", "value_head.bias"} != set(weights(rm))
    assert {b.dtype for b in rm.buffers() if b.is_floating_point()} == {torch.float32}
    rewards, _ = save.score(rm, chats(rm), 40)
    assert rewards.dtype is torch.float32 and not torch.equal(rewards, rewards.bfloat16().float())

# ---------------------------------------------------------------- the policy's log-probs
def plain_log_probs(model, ids, prompt_length, temperature):
    """Of the response tokens of one row, from the whole logits of plain transformers."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return torch.stack([(logits[t - 1] / temperature).log_softmax(-1)[ids[t]] for t in range(prompt_length, len(ids))])

@pytest.mark.parametrize("kind, options", [
    ("llama", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False}), ("qwen2", {}),
    ("gpt2", dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0))])
def test_log_probs_and_gradients_are_those_of_the_whole_logits(kind, options):
    pi, rows = policy(kind, **options), ragged()
    want = [plain_log_probs(pi.model, ids, length, 0.7) for ids, length in rows]
    coefficients = [torch.randn(len(line)) for line in want]
    grads = gradients(pi, sum((line * c).sum() for line, c in zip(want, coefficients)))
    assert torch.cat(want).std() > 0.2
    for chunk, recompute in ((1024, False), (1, False), (7, False), (7, True)):
        if recompute:  # as on a GPU: transformers recomputes in training mode only
            pi.model.gradient_checkpointing_enable({"use_reentrant": False})
            pi.train()
        log_probs, mask = pi(*save.model_inputs(rows, "cpu"), 0.7, chunk)
        assert mask.sum(1).tolist() == [len(line) for line in want] and not log_probs[~mask].any()
        got = [line[hit] for line, hit in zip(log_probs, mask)]
        same(torch.cat(got).detach(), torch.cat(want).detach(), 1e-5)
        same(gradients(pi, sum((line * c).sum() for line, c in zip(got, coefficients))), grads, 2e-5)

@pytest.mark.parametrize("kind, options", [("gemma2", {}), ("cohere", {"logit_scale": 0.5}),
                                           ("granite", {"logits_scaling": 3.0})])
def test_a_policy_that_scales_or_caps_its_logits_is_refused(tmp_path, kind, options):
    pi = policy(kind, **options)
    with pytest.raises(save.UsageError, match=f"--policy {tmp_path}: .*logits are scaled"):
        save.Policy.from_pretrained(written(tmp_path, pi.model, pi.tokenizer))

@pytest.mark.parametrize("part", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_policy_with_weights_that_are_not_finite_is_refused(tmp_path, part, value):
    pi = policy(tie_word_embeddings=False)
    pi.model.get_parameter(part).data[5, 0] = value
    with pytest.raises(save.UsageError, match=f"--policy {tmp_path}: expected a causal language model"):
        save.Policy.from_pretrained(written(tmp_path, pi.model, pi.tokenizer))

# ---------------------------------------------------------------- rollout
PROMPTS = [[3, 6, 7, 8, 5, 4], [3, 9, 5, 4], [3] + [7, 8] * 6 + [5, 4], [4], [3, 12, 11, 10, 5, 4]]
SAMPLING = dict(max_new_tokens=10, temperature=1.0, top_p=0.9, top_k=8)

@pytest.mark.parametrize("kind", ("llama", "gpt2", "qwen2", "gemma2"))  # gemma2's window is shorter than the prompts
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
    pi, stops = save.Policy(pi.model, pi.tokenizer), {7, 9, END}  # the tokenizer's own counts too
    responses, ended = save.rollout(pi, PROMPTS, 30, range(150), **{**SAMPLING, "top_k": 0, "top_p": 1.0})
    assert {row[-1] for row, end in zip(responses, ended) if end} == stops
    for row, end in zip(responses, ended):
        assert not stops & set(row[:-1]) and end == (row[-1] in stops) and (end or len(row) == 10)
    assert {(end, len(row) == 10) for row, end in zip(responses, ended)} == {(True, True), (True, False), (False, True)}
    assert min(map(len, responses)) == 1

@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_a_response_depends_on_its_seed_and_on_nothing_else(kind):
    pi = policy(kind)
    want, ended = save.rollout(pi, PROMPTS, 4, range(20), **SAMPLING)
    for cache_tokens in (1, 2 * 4 * (SAMPLING["max_new_tokens"] + 6), 10 ** 6):  # one prompt a wave, about two, all
        assert save.rollout(pi, PROMPTS, 4, range(20), **SAMPLING, cache_tokens=cache_tokens) == (want, ended)
    for p in range(5):
        alone, _ = save.rollout(pi, PROMPTS[p:p + 1], 4, range(4 * p, 4 * p + 4), **SAMPLING)
        assert alone == want[4 * p:4 * p + 4] and len({tuple(row) for row in alone}) > 2
    assert save.rollout(pi, PROMPTS[:1], 4, [3, 2, 1, 0], **SAMPLING)[0] == want[3::-1]
    assert sum(a == b for a, b in zip(save.rollout(pi, PROMPTS, 4, range(20, 40), **SAMPLING)[0], want)) < 5

@pytest.mark.parametrize("temperature, top_p, top_k", [(0.7, 0.8, 20), (1.0, 1.0, 0), (1.5, 0.6, 0), (0.5, 1.0, 7),
                                                       (2.0, 0.95, 500), (1.0, 0.01, 5), (2.0, 0.5, 10)])
def test_sampling_inverts_the_distribution_of_transformers(temperature, top_p, top_k):
    logits, n = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(3)), 20_000
    logits[0, 0] = -math.inf  # not to be drawn, not even at 0
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    probs = TopPLogitsWarper(top_p)(None, warped)[0].double().softmax(-1)

    def sampled(uniforms):
        return save.sample_tokens(logits.expand(len(uniforms), -1), uniforms, temperature, top_p, top_k)

    grid = (torch.arange(n) + 0.5) / n  # even: each token is drawn n * p times, to within one
    counts = sampled(grid).bincount(minlength=50)
    assert (counts - n * probs).abs().max() < 1.1 and torch.equal(counts > 0, n * probs > 0.5)
    assert (probs[sampled(torch.tensor([0.0, 1 - 2**-24]))] > 0).all()
    order = sorted(range(50), key=lambda i: -probs[i]) if top_k or top_p < 1 else range(50)
    for u, token in zip(grid[::997].tolist(), sampled(grid[::997]).tolist()):
        for i in order:  # walk along the distribution until u is used up
            u -= probs[i].item()
            if u < 0:
                break
        assert token == i
