"""transformers' generate in the place of save.py's rollout: how to bring a generator of your own.

    python tests/forks/generate.py [flags of save.py]

What a generator must keep: the sampling that --temperature, --top_p and --top_k ask for and nothing else (log-probs are
taken at this temperature), the EOS in the response, `ended` only with it, no padding, and randomness from `seeds`. It
comes in after the models are loaded: loading one compares save.py's own samples with the model's forward.
"""
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

@torch.no_grad()
def rollout(policy, prompt_ids, group, seeds, *, max_new_tokens, temperature, top_p, top_k, cache_tokens=0):
    """As save.rollout: `group` responses to P token lists -> P*group token lists (with EOS), whether each ended."""
    responses, ended, stops = [], [], policy.eos_ids
    config = save.transformers.GenerationConfig(  # in the place of the folder's, which may have a repetition penalty
        do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens,
        num_return_sequences=group, eos_token_id=stops, pad_token_id=stops[0])
    with mock.patch.object(policy.model, "generation_config", config):
        for i, ids in enumerate(prompt_ids):
            torch.manual_seed(seeds[i * group])
            inputs = torch.tensor([ids], device=policy.model.device)
            rows = policy.model.generate(inputs, attention_mask=torch.ones_like(inputs))[:, len(ids):].tolist()
            for row in rows:
                length = next((t + 1 for t, token in enumerate(row) if token in stops), len(row))
                responses.append(row[:length])
                ended.append(row[length - 1] in stops)
    return responses, ended

def train(*prepared, plain=save.train):
    """save.train with this generator."""
    with mock.patch.object(save, "rollout", rollout):
        plain(*prepared)

def main(argv=None):
    """save.main with this generator from the first rollout until it returns."""
    with mock.patch.object(save, "train", train):
        save.main(argv)

if __name__ == "__main__":
    main()
