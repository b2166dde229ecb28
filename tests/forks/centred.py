"""SAVE's loss without its common push, in the place of Eq. 18-20. Not in the paper.

    python tests/forks/centred.py [flags of save.py]

Eq. 18-20 moves all rewards of a group together: dL/dR sums to Z-/(1 + Z-) - 1/(1 + Z+), with Z the sum of e^(R-V) over
a side, mostly down, and V follows. Here that sum is 0. Filter, anchor and value head stay those of SAVE; usable rows
that the filter sets aside get a gradient too.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

def centred_loss(rewards, values, positive, negative, usable):
    """save.contrastive_loss at rewards - mean + mean.detach(), the mean over usable rows. (P,G), values (P,)."""
    rewards = save.at_least_fp32(rewards)
    mean = save.masked_mean(rewards, usable, 1)[:, None]
    return save.contrastive_loss(rewards - mean + mean.detach(), values, positive, negative)

save.RM_UPDATES["centred"] = save.RMUpdate(centred_loss, "value head")

def main(argv=None):
    """save.main with the new row as the default."""
    save.main(["--rm_update", "centred", *(sys.argv[1:] if argv is None else argv)])

if __name__ == "__main__":
    main()
