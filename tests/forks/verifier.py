"""A verifier decides which responses are good, in the place of R - V. Not in the paper: an example of a fork.

    bash run.sh                                          # builds the laptop world, whose tasks `right` can check
    python tests/forks/verifier.py [flags of save.py]

Y+ is what is right and Y- what is wrong, with certainty: a label of inf passes any threshold. V still is the anchor of
Eq. 18-20, and the policy still gets the reward model's rewards. For tasks of your own edit `right`.
"""
import math
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

def right(prompt, response):
    """Whether a response answers a prompt of the laptop world, for example "reverse a b c" with "c b a"."""
    task, *words = prompt.split()
    tasks = {"copy": words, "reverse": words[::-1], "sort": sorted(words),
             "shift": [word.translate(str.maketrans("abcdefghij", "bcdefghija")) for word in words]}
    save.expect(task in tasks, f"--prompts: {prompt!r}, expected a task of {', '.join(tasks)}")
    return response.replace("indeed", "").split() == tasks[task]

def label(run, batch):
    """(P,G) inf or -inf. `texts` are this rank's responses, prompt by prompt."""
    asked = [messages[-1]["content"] for messages, _ in batch.prompts for _ in range(run.cfg.group)]
    labels = [math.inf if right(*pair) else -math.inf for pair in zip(asked, batch.texts)]
    return save.gather(torch.tensor(labels, device=batch.rewards.device).view(-1, run.cfg.group))

def main(argv=None):
    """save.main with `label` replaced until it returns."""
    with mock.patch.object(save, "label", label):
        save.main(argv)

if __name__ == "__main__":
    main()
