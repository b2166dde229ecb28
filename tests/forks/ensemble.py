"""Labels of a frozen ensemble in the place of R - V. Not in the paper.

    python tests/forks/ensemble.py --rm RM --label_rms RM2 RM3 [flags of save.py]

With a_k = a* + e_k for reward model k, a split by the sign of the student's own a confirms its error e_1. Models of one
recipe and other seeds have errors that are partly independent: the mean of M of them, --rm as it was among them, has
the true sign more often, and where it differs from the student's the loss corrects the student.
"""
import dataclasses
import sys
from pathlib import Path
from unittest import mock

import balanced  # noqa: F401  the row of RM_UPDATES
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

@dataclasses.dataclass
class Config(save.Config):
    """Labels of an ensemble: flags of save.py and one more."""
    rm_update: str = "balanced"  # the loss that learns from the labels
    label_rms: list = dataclasses.field(default_factory=list)  # RMs with a value head; --rm is one more

def prepare(cfg, plain=save.prepare):
    """As in save.py, with the frozen reward models, which are loaded before anything is written."""
    def frozen(path):
        rm = save.RewardModel.from_pretrained(path, cfg.device)
        save.expect(rm.has_value_head, f"--label_rms {path}: it holds no value_head.safetensors; run save.py "
                    f"--stage value --rm {path} first (--rm is one of the ensemble)")
        return save.to_working_copy(rm, cfg)

    run, *inputs = plain(cfg)
    run.labels = [frozen(path) for path in (cfg.rm, *cfg.label_rms)]
    return run, *inputs

@torch.no_grad()
def label(run, batch):
    """(P,G): the mean over the ensemble of R - V, Eq. 13. None of it is trained: once a batch."""
    def advantages(rm):
        rewards, features = (x.unflatten(0, (len(batch.prompts), -1))
                             for x in save.score(rm, batch.chats, run.cfg.micro_tokens))
        return save.gather(save.rm_advantages(rewards, rm.value(features[:, 0])))

    if not hasattr(batch, "labels"):
        batch.labels = sum(map(advantages, run.labels)) / len(run.labels)
    return batch.labels

def main(argv=None):
    """save.main with these two names of its module replaced until it returns."""
    with mock.patch.multiple(save, prepare=prepare, label=label):
        save.main(argv, Config)

if __name__ == "__main__":
    main()
