"""How save.py is forked: a file that imports it adds a row to each table, and what the rows say is what runs."""
import re

import pytest
import torch
from safetensors.torch import load_file
from test_runs import HEAD, POLICY, RM, distance, metrics, rows_of, run, samples

import save

SEEN = {}

def my_loss(rewards, values, positive, negative, usable):
    """Pull Y+ above V and Y- below it."""
    loss = torch.where(negative, rewards, 0).sum() - torch.where(positive, rewards, 0).sum()
    SEEN.setdefault("loss", []).append((values.tolist(), positive.clone(), negative.clone(), loss.item()))
    return loss

def my_advantages(rewards, keep):
    """The rewards as they are."""
    SEEN.setdefault("rewards", []).append(rewards.clone())
    return torch.where(keep, rewards, 0)

@pytest.fixture
def rows(monkeypatch):
    """A new row of each table, and the flags that choose them."""
    SEEN.clear()
    monkeypatch.setitem(save.RM_UPDATES, "my_update", save.RMUpdate(my_loss, "value head"))
    mine = save.Algorithm(my_advantages, "mean", "loss", (0.125, 0.25))
    monkeypatch.setitem(save.ALGORITHMS, "my_algo", mine)
    return {"rm_update": "my_update", "algo": "my_algo", "lr_policy": 1e-3, "lr_rm": 1e-3}

def test_new_rows_run_as_they_say(world, tmp_path, rows):
    out = run(world, tmp_path / "out", **rows)
    assert [*metrics(out)] == [("value", 0), ("save", 0), ("save", 1), ("save", 2)] and load_file(out / HEAD)
    assert [rows_of(out / "metrics.jsonl")[0]["config"][name] for name in ("clip_low", "clip_high")] == [0.125, 0.25]
    start = run(world, tmp_path / "value", stage="value")
    assert distance(start, out, HEAD) > 1e-6  # it goes on learning
    rm = save.RewardModel.from_pretrained(start / "rm")  # as it was in step 1
    (values, positive, negative, loss), _ = SEEN["loss"]  # of steps 1 and 2
    for value, prompt in zip(values, samples(out)[1], strict=True):
        chats = save.encode_responses(rm.tokenizer, prompt[0]["prompt"], [row["response"] for row in prompt])
        rewards, of_head = rm(*save.model_inputs(chats, "cpu"))
        assert value == pytest.approx(of_head[0].item(), abs=1e-4) == prompt[0]["value"]
        assert abs(value - rewards.mean().item()) > 0.1  # the value head's, not the group mean
    sides = [[row["side"] for row in prompt] for prompt in samples(out)[1]]
    assert positive.tolist() == [[side == "+" for side in row] for row in sides] and positive.any()
    assert negative.tolist() == [[side == "-" for side in row] for row in sides] and negative.any()
    assert metrics(out)["save", 1]["rm_loss"] == pytest.approx(loss) and metrics(out)["save", 1]["reward_shift"] > 0
    assert all(distance(world, out, file) > 1e-5 for file in (RM, POLICY))

@pytest.mark.parametrize("kl", ["loss", "reward"])
def test_the_kl_of_a_new_row_is_where_it_says(world, tmp_path, rows, kl):
    save.ALGORITHMS["my_algo"] = save.ALGORITHMS["my_algo"]._replace(kl=kl)
    without, with_kl = (run(world, tmp_path / str(beta), **rows, kl_coef=beta) for beta in (0.0, 5.0))
    assert distance(without, with_kl, RM) == 0 == metrics(without)["save", 2]["kl"] < metrics(with_kl)["save", 2]["kl"]
    assert distance(without, with_kl, POLICY) > 1e-5  # from step 2 on: in step 1 the policy is the reference
    first, second, first_with_kl, second_with_kl = SEEN["rewards"]
    assert first.equal(first_with_kl) and second.equal(second_with_kl) == (kl == "loss")

def test_help_shows_every_flag_with_its_default_and_new_rows_as_choices(rows, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as stop:
        save.main(["--help"])
    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    assert stop.value.code == 0
    for name, field in save.Config.__dataclass_fields__.items():
        default = "none" if field.default in (None, "") or name == "heldout" else re.escape(str(field.default))
        assert re.search(rf" --{name}[ ,](HELDOUT \[HELDOUT ...\])?[^\[\]]* \[{default}\]", text), name
    assert re.search(r" --rm_update \{save,[^}]*,my_update\}", text)
    assert re.search(r" --algo \{grpo,[^}]*,my_algo\}", text)
