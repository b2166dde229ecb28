"""The published loss without its common push. Ours, not in the paper: a fork of one row.

    python tests/forks/centred.py [flags of save.py]

With Z+ = sum over Y+ of e^(R-V), and Z- over Y-, the pushes of Eq. 18-20 on the rewards of a group sum to

    sum dL+/dR = Z+ / (1 + Z+) - 1 = -1 / (1 + Z+)     up, little where Y+ is far above V or large
    sum dL-/dR = Z- / (1 + Z-)                         down, near 1 where Y- is large: Z- grows with |Y-|

One positive and one negative at the same distance d from V cancel: Z+ = e^d, Z- = e^-d, so -1/(1 + e^d) + 1/(1 + e^d).
With many rows the sum is mostly downwards, V follows the fallen mean, and it never ends. A common shift of a prompt's
rewards means nothing to a ranking (Bradley-Terry and HL-BT do not see it), so it is taken out: the loss at
R - mean(R) + stop_gradient(mean(R)) has the same value, and its dL/dR sums to 0 in each group.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

def centred_loss(rewards, values, positive, negative, usable):
    """Eq. 18-20 on differences of rewards only. rewards and masks (P,G), values (P,) -> scalar."""
    rewards = save.at_least_fp32(rewards)
    mean = save.masked_mean(rewards, usable, 1)[:, None]
    return save.contrastive_loss(rewards - mean + mean.detach(), values, positive, negative)

save.RM_UPDATES["centred"] = save.RMUpdate(centred_loss, "value head")

def main(argv=None):
    """save.main with the new row as the default."""
    save.main(["--rm_update", "centred", *(sys.argv[1:] if argv is None else argv)])

if __name__ == "__main__":
    main()
