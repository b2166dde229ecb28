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

def main(argv=None):
    """save.main with the new row as the default, and two of its functions replaced until it returns."""
    pairs, used, read_all, read_prompts = [], {}, save.read_all, save.read_prompts

    def read_matched(source, flag, parse):
        """Note which prompts are used; drop the pairs of those that are not."""
        def matched(row):
            prompt = row.get("prompt") or row.get("messages") or [*(row.get("chosen") or ())][:-1]
            prompt = repr(save.as_messages(prompt, "prompt"))
            if flag == "pairs":
                return parse(row) if used.get(prompt, True) else None
            used.setdefault(prompt, False)  # as it stays if the next line refuses the row
            parsed = parse(row)
            used[prompt] |= parsed is not None
            return parsed
        return read_all(source, flag, matched)

    def read_both(cfg, tokenizer):
        """The prompts, then the pairs, before anything is written."""
        with mock.patch.object(save, "read_all", read_matched):
            prompts = read_prompts(cfg, tokenizer)
            pairs[:] = save.read_pairs(cfg, cfg.pairs, "pairs", save.load_tokenizer(cfg.rm))
        return prompts

    def reward_model_step(run, *_):
        """Step 2 on static pairs: there is always something to learn from."""
        save.preference_step(run, pairs)
        return True

    with mock.patch.multiple(save, read_prompts=read_both, reward_model_step=reward_model_step):
        save.main(["--rm_update", "offline", *(sys.argv[1:] if argv is None else argv)])

if __name__ == "__main__":
    main()
