"""Continual offline training, a baseline of the paper's Table 1: more Bradley-Terry steps on static pairs.

    python tests/forks/offline.py --pairs FILE [flags of save.py]

Step 2 of Algorithm 2 is a step of stage preference (Eq. 11) on the next --batch pairs; responses train the policy only,
all of them. The paper's pairs are "matched to the same instruction set" (F.1): a pair goes where its prompt goes, so
those whose prompt is dropped from --prompts are dropped too. Its learning rate is unknown: here that of SAVE, --lr_rm.
"""
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

save.RM_UPDATES["offline"] = save.RMUpdate(save.bradley_terry_loss, "")  # any loss: the reward model is in training

def prompt_of(row):
    """What identifies a row's prompt; none where it has none."""
    with save.blamed("", refuse=False):
        row = row if isinstance(row, dict) else {"prompt": row}
        return repr(save.as_messages(row.get("prompt") or row["chosen"][:-1], "prompt"))

def main(argv=None):
    """save.main with the new row as the default, and two of its functions replaced until it returns."""
    pairs, prepare = [], save.prepare

    def with_pairs(cfg):
        """Also read the pairs that match the prompts, before anything is written."""
        run, prompts, *others = prepare(cfg)
        limit = cfg.max_prompt_tokens + cfg.max_new_tokens
        dropped = {prompt_of(row) for _, row in save.read_rows(cfg.prompts, "prompts")}
        dropped -= {repr(messages) for messages, _ in prompts}
        pairs[:] = save.used_rows(cfg.pairs, "pairs", lambda row: (
            [] if prompt_of(row) in dropped else save.pair_of(row, run.rm, limit)))
        return run, prompts, *others

    def reward_model_step(run, *_):
        """Step 2 on static pairs: there is always something to learn from."""
        save.preference_step(run, pairs)
        return True

    with mock.patch.multiple(save, prepare=with_pairs, reward_model_step=reward_model_step):
        save.main(["--rm_update", "offline", *(sys.argv[1:] if argv is None else argv)])

if __name__ == "__main__":
    main()
