"""An anchor to the initial rewards: a price on what the RM's update changes within a group. Not in the paper.

    python tests/forks/kept.py --keep 0.1 [--rm_update centred] [flags of save.py]

L_R + keep * mean of ((R - mean R) - (R0 - mean R0))^2 over the usable rows of a group, then over groups, filtered or
not. R0: of a frozen copy of the RM as it came. Squares of rewards: what fits depends on their spread.
"""
import copy
import dataclasses
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import centred  # noqa: E402, F401  a row of RM_UPDATES

import save  # noqa: E402

@dataclasses.dataclass
class Config(save.Config):
    """An anchor to the initial rewards: flags of save.py and one more."""
    keep: float = 0.0  # weight of the change of a group's centred rewards; 0: save.py

def change(rewards, initial, usable):
    """Mean squared change of centred rewards, of a group, then of groups. (P,G) -> scalar."""
    moved = rewards - initial - save.masked_mean(rewards - initial, usable, 1)[:, None]
    return save.masked_mean(save.masked_mean(moved ** 2, usable, 1), usable.any(1))

def reward_model_step(run, batch, *sides, plain=save.reward_model_step):
    """Step 2 with the term in the loss of --rm_update, for this batch."""
    name, initial = run.cfg.rm_update, save.score(run.initial, batch.chats, run.cfg.micro_tokens)[0]
    row, initial = save.RM_UPDATES[name], save.gather(initial.unflatten(0, (len(batch.prompts), -1)))
    def loss(rewards, *of):
        return row.loss(rewards, *of) + run.cfg.keep * change(rewards, initial, batch.ended)
    with mock.patch.dict(save.RM_UPDATES, {name: row._replace(loss=loss)}):
        return plain(run, batch, *sides)

def main(argv=None, plain=save.train):
    """save.main with two functions replaced until it returns; `train` keeps the RM, before a checkpoint is read."""
    def train(run, *inputs):
        run.initial = copy.deepcopy(run.rm)
        plain(run, *inputs)
    with mock.patch.multiple(save, train=train, reward_model_step=reward_model_step):
        save.main(argv, Config)

if __name__ == "__main__":
    main()
