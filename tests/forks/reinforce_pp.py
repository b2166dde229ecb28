"""REINFORCE++ (arXiv 2501.03262), of the paper's section 2 and Table 3: no group baseline, whitened over the batch.

    python tests/forks/reinforce_pp.py [--rm_update none] [flags of save.py]

A fork of the advantages where rewards alone do not make them: KL is in the reward, token by token. This is the plain
variant (the other centres by group and has KL in the loss), with --kl_coef as for GRPO; its authors have .01.
"""
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

def reinforce_advantages(rewards, kl, mask, total=None):
    """A_t = r - sum_{s>=t} kl_s, then (A - mean) / std over all tokens. rewards (N,), kl, mask (N,T) -> (N,T).
    No discount; population variance, so long responses weigh more. `total` sums numbers over ranks, which whiten
    together. 0 where masked."""
    to_go = torch.where(mask, kl, 0).flip(1).cumsum(1).flip(1)
    returns = torch.where(mask, rewards[:, None] - to_go, 0).double()
    sums = [mask.sum().item(), returns.sum().item(), returns.square().sum().item()]
    count, first, second = total(*sums) if total else sums
    mean = first / max(count, 1)
    variance = max(second / max(count, 1) - mean ** 2, 0.0)
    return torch.where(mask, (returns - mean) / max(variance, 1e-8) ** 0.5, 0).to(rewards.dtype)

def policy_advantages(run, batch, trained, old, reference, plain=save.policy_advantages):
    """In the place of save.policy_advantages: (N/W,R), a number for each token of this rank's rows."""
    if run.cfg.algo != "reinforce++":
        return plain(run, batch, trained, old, reference)
    columns = torch.arange(int(batch.lengths.max()), device=trained.device)
    mask = (columns < save.mine(batch.lengths).flatten()[:, None]) & save.mine(trained).flatten()[:, None]
    kl = 0.0 if reference is None else run.cfg.kl_coef * (old - reference)  # --kl_coef 0 has neither
    return reinforce_advantages(save.mine(batch.rewards).flatten(), kl, mask, save.total)

save.ALGORITHMS["reinforce++"] = save.Algorithm(reinforce_advantages, "token", "reward", (0.2, 0.2))

def main(argv=None):
    """save.main with the new row as the default and these advantages until it returns."""
    with mock.patch.object(save, "policy_advantages", policy_advantages):
        save.main(["--algo", "reinforce++", *(sys.argv[1:] if argv is None else argv)])

if __name__ == "__main__":
    main()
