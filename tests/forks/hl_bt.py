"""HL-BT, a baseline of the paper's Table 1: Bradley-Terry on the highest and the lowest reward of each group.

    python tests/forks/hl_bt.py [flags of save.py]

A fork that is one row: a loss of the rewards alone and no anchor, so nothing is filtered and the policy trains on all.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

def highest_lowest_loss(rewards, usable=None):
    """Eq. 2 on the highest and the lowest usable reward of each group: mean of -log sigmoid(R_max - R_min).
    rewards, usable (P,G) -> scalar. Groups of equal rewards give nothing and do not count."""
    rewards = save.at_least_fp32(rewards)
    usable = torch.ones_like(rewards, dtype=torch.bool) if usable is None else usable
    # index the two rows (amax would share the gradient among equals); groups without a usable row become a tie
    highest = rewards.gather(1, rewards.masked_fill(~usable, -math.inf).argmax(1, keepdim=True))[:, 0]
    lowest = rewards.gather(1, rewards.masked_fill(~usable, math.inf).argmin(1, keepdim=True))[:, 0]
    margin = highest - lowest
    return save.masked_mean(-F.logsigmoid(margin), usable.any(1) & (margin > 0))

save.RM_UPDATES["hl_bt"] = save.RMUpdate(
    lambda rewards, values, positive, negative, usable: highest_lowest_loss(rewards, usable), "")

def main(argv=None):
    """save.main with the new row as the default."""
    save.main(["--rm_update", "hl_bt", *(sys.argv[1:] if argv is None else argv)])

if __name__ == "__main__":
    main()
