"""How a response's tokens are averaged in the policy's loss: DAPO's and Dr. GRPO's way. Not in the paper.

    python tests/forks/token_average.py --average token [flags of save.py]     DAPO (arXiv 2503.14476)
    python tests/forks/token_average.py --average length [flags of save.py]    Dr. GRPO (arXiv 2503.20783)

save.py takes the mean of a row's tokens, then of rows. Clipping commutes with a positive factor, so the advantage times
length / mean length of the trained rows of its minibatch makes that the mean over all tokens, and times length /
--max_new_tokens the sum of tokens over this constant. Exact for the surrogate. A KL term in the loss stays a mean by
rows: both methods have none. Dr. GRPO also leaves out the standard deviation: a row of ALGORITHMS (README).
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
    """Averages over tokens: flags of save.py and one more."""
    kl_coef: float = 0.0  # KL to the initial policy, by rows (DAPO, Dr. GRPO: none)
    average: str = "token"  # token: over all of a minibatch (DAPO); length: by --max_new_tokens (Dr. GRPO)

    def checked(self):
        """The checks of save.py, and its own flag's."""
        save.expect(self.average in ("token", "length"), f"--average {self.average}: expected token or length")
        return super().checked()

def policy_advantages(run, batch, trained, old, reference, plain=save.policy_advantages):
    """In the place of save.policy_advantages: (N/W,). A minibatch is of all ranks: `trained` (P,G) and lengths are."""
    parts = (x.chunk(run.cfg.num_minibatches) for x in (batch.lengths.float(), trained))
    means = [save.masked_mean(lengths, rows).expand(lengths.shape) for lengths, rows in zip(*parts)]
    by = torch.cat(means).clamp(min=1) if run.cfg.average == "token" else run.cfg.max_new_tokens
    return plain(run, batch, trained, old, reference) * save.mine(batch.lengths / by).flatten()

def main(argv=None):
    """save.main with these advantages until it returns."""
    with mock.patch.object(save, "policy_advantages", policy_advantages):
        save.main(argv, Config)

if __name__ == "__main__":
    main()
