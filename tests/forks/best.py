"""The plainest guard: the models of the step at which held-out pairs have the lowest loss. Not in the paper.

    python tests/forks/best.py --heldout FILE --eval_every 20 [flags of save.py]

Every second pair of a --heldout file chooses, by Eq. 11, the mean over files; accuracy_NAME is of the others, in the
record of the last step that of the models that are saved. Step 0, the models as they came, can be chosen, too.
"""
import statistics
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

def loss_of(run, pairs):
    """Eq. 11 on pairs of all ranks."""
    rewards, _ = save.score(run.rm, [side for pair in save.mine(pairs) for side in pair], run.cfg.micro_tokens)
    return save.total(-F.logsigmoid(rewards[0::2] - rewards[1::2]).sum())[0] / len(pairs)

def prepare(cfg, plain=save.prepare):
    """As in save.py; the pairs are divided, and a resumed run remembers what was best."""
    run, rows, heldout, saved = plain(cfg)
    save.expect(heldout and min(map(len, heldout.values())) > 1, "--heldout: expected files of at least two pairs")
    run.choosing, file = [pairs[0::2] for pairs in heldout.values()], Path(cfg.out, f"best_{save.RANK}.pt")
    run.best = torch.load(file) if saved else {"loss": float("inf"), "step": -1}
    return run, rows, {name: pairs[1::2] for name, pairs in heldout.items()}, saved

def heldout_accuracy(run, heldout, plain=save.heldout_accuracy):
    """As in save.py, after the models have been compared with the best; the last time these come back."""
    loss, step = statistics.mean(loss_of(run, pairs) for pairs in run.choosing), run.step * (run.best["step"] >= 0)
    masters = {name: optimizer.masters for name, optimizer in run.optimizers.items()}
    if loss < run.best["loss"]:
        run.best = {"loss": loss, "step": step, "masters": {name: {key: p.detach().to("cpu", copy=True)
                    for key, p in of.items()} for name, of in masters.items()}}
        torch.save(run.best, Path(run.cfg.out, f"best_{save.RANK}.pt"))
    if step == run.cfg.steps:
        for name, optimizer in run.optimizers.items():
            for key, p in optimizer.masters.items():
                p.data.copy_(run.best["masters"][name][key])
            optimizer.publish(optimizer.masters)
    run.log.put(choosing_loss=loss, best_step=run.best["step"])  # loss_NAME is of the other pairs
    plain(run, heldout)

def main(argv=None):
    """save.main with these two functions replaced until it returns."""
    with mock.patch.multiple(save, prepare=prepare, heldout_accuracy=heldout_accuracy):
        save.main(argv)

if __name__ == "__main__":
    main()
