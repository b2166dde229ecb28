"""Dynamic sampling of groups (DAPO, arXiv 2503.14476): prompts without both signs give their place to other prompts.

    python tests/forks/dynamic.py --tries 3 [flags of save.py]

DAPO samples until the batch is full of groups that teach something. With an RM in the place of right and wrong that is
a group with a Y+ and a Y-. A place keeps its rank, so every rank samples the same number of times. Seeds are a function
of (seed, purpose, step, row): the same purpose again would be the same responses.
"""
import dataclasses
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

@dataclasses.dataclass
class Config(save.Config):
    """Dynamic sampling: flags of save.py and one more."""
    tries: int = 3  # at most as many prompts for a place in the batch; 1: save.py

    def checked(self):
        """The checks of save.py, and its own flag's."""
        save.expect(self.tries >= 1, f"--tries {self.tries}: expected 1 or more")
        return super().checked()

def filled(batch, new, full):
    """The batch, with the places that are not `full` (P,) from `new`."""
    parts = {name: torch.where(full[:, None], getattr(batch, name), getattr(new, name))
             for name in ("lengths", "ended")}
    for name in ("prompts", "texts", "chats", "sequences"):  # this rank's places
        pairs, own = list(zip(getattr(batch, name), getattr(new, name))), save.mine(full).tolist()
        parts[name] = [pair[not own[i * len(own) // len(pairs)]] for i, pair in enumerate(pairs)]
    return save.Batch(**parts)

def save_step(run, prompts):
    """save.save_step, with other prompts in the places that teach nothing."""
    cfg, batch, full = run.cfg, None, None
    for number in range(cfg.tries):
        start = ((run.step - 1) * cfg.tries + number) * cfg.batch
        drawn = save.draw(prompts, cfg.seed, "prompts", start, cfg.batch)
        new = save.sample(run, drawn, cfg.group, run.step, "rollout" + f" {number}" * bool(number))
        save.score_batch(run, new)
        valid = save.filtered(run, new, new.ended)[2]
        batch, full = (new, valid) if full is None else (filled(batch, new, full), full | valid)
        if full.all():
            break
    run.log.put(tries=number + 1, full=full.float().mean())
    save.learn(run, batch)

def main(argv=None):
    """save.main with this step until it returns."""
    with mock.patch.object(save, "save_step", save_step):
        save.main(argv, Config)

if __name__ == "__main__":
    main()
