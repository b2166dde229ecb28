"""A balanced loss in the place of Eq. 18-20. Not in the paper.

    python tests/forks/balanced.py [flags of save.py]

Eq. 18 pushes down any response of Y+ that has more than 1/|Y+| of the softmax, which makes good answers equal. This is
the negative log-likelihood of the signs instead, P(y in Y+) = sigmoid(R - V), each side weighing one half: every
response is pushed away from V, those near it most. Filter, anchor and value head stay those of SAVE.
"""
import sys
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

def balanced_loss(rewards, values, positive, negative, usable=None):
    """mean_{Y+} softplus(V - R) + mean_{Y-} softplus(R - V), mean over valid prompts, 0 if there is none.
    rewards, masks (P,G); values (P,), without gradient. `usable`: Y+ and Y- are within it already.
    dL/dR = -sigmoid(V - R) / |Y+| on Y+, sigmoid(R - V) / |Y-| on Y-."""
    margin = save.at_least_fp32(rewards) - save.at_least_fp32(values.detach())[:, None]
    loss = save.masked_mean(F.softplus(-margin), positive, 1) + save.masked_mean(F.softplus(margin), negative, 1)
    return save.masked_mean(loss, positive.any(1) & negative.any(1))

save.RM_UPDATES["balanced"] = save.RMUpdate(balanced_loss, "value head")

def main(argv=None):
    """save.main with the new row as the default."""
    save.main(["--rm_update", "balanced", *(sys.argv[1:] if argv is None else argv)])

if __name__ == "__main__":
    main()
