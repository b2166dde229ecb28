"""R2M (arXiv 2601.22664) as a fork of save.py: a reward model (RM) that also looks at the policy's hidden states.

    python tests/forks/r2m.py [flags of save.py] [--r2m_alpha 0.3 --r2m_omega 0.7 --r2m_width 2048]
    torchrun --nproc-per-node 2 tests/forks/r2m.py ...

h (T,D_p): last-layer hidden states of the policy; H_last (D,): the RM's at its last token; d = --r2m_width:
    q = H_last W_q,  k = h W_k,  v = h W_v,  H_hat = softmax(q k^T / sqrt(d)) v W_o
    R = phi(H_fin),  H_fin = (1 - w) H_hat + w H_last,  w(t) = max(cos(pi t/T)/2 + 1/2, --r2m_omega)
After each policy step on these R, one step on W_q, W_k, W_v, W_o and phi:  L = (1 - alpha) L_BT + alpha L_GRE.

Everything else is plain GRPO (--rm_update none): data, flags, logs, checkpoints, evaluation, ranks. `main` lists what
is replaced. rm/ is the RM with its new phi, and with the four matrices in r2m.safetensors, without which its rewards
are those at w = 1.

Known     the formulas above and below; h over prompt and response but the last token; the backbone stays frozen;
          alpha .3, d 2048, lr 1e-6, omega .7 (Qwen2.5-3B; .6 for Llama3-8B). Held-out pairs use the w of their step.
Inferred  h carries no gradient; W_o does not begin at 0 (the paper's untrained model ranks worse than its RM); L_BT's
          pair is chosen by the rewards that the policy was trained on, the loss is taken on rewards after its step.
Guessed   The matrices begin as torch's nn.Linear would: uniform in +-1/sqrt(inputs), from --seed, no bias. One head,
          fp32, h after the final norm. t counts from 1. Adam and clipping as in save.py. Means over groups, without
          those of equal rewards; truncated responses take part. To the letter, the std in L_GRE carries gradient:
          L_GRE is blind to the scale of R (the paper says that it widens the spread). After the policy step h is the
          new policy's (the paper: from the last of its 2 epochs; the default here is one, which begins with the old
          h). A held-out response is rendered as the policy would have said it: its template, its tokens and its EOS.
"""
import dataclasses
import math
import sys
import types
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

plain = types.SimpleNamespace(**vars(save))  # what `main` replaces, as it was

# ---- maths
def own_share(step, total_steps, omega):
    """w(t): how much of H_fin is the RM's own state."""
    return max(math.cos(math.pi * step / total_steps) / 2 + 0.5, omega)

def highest_and_lowest(rewards):
    """rewards (P,G) -> two masks (P,G) with one response of each group; none where all rewards are equal."""
    differ = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)
    return [F.one_hot(i, rewards.shape[1]).bool() & differ for i in (rewards.argmax(1), rewards.argmin(1))]

def pair_loss(rewards, highest, lowest):
    """L_BT = -log sigmoid(r_w - r_l), mean over groups that have a pair. All (P,G)."""
    margin = (rewards * highest).sum(1) - (rewards * lowest).sum(1)
    return save.masked_mean(-F.logsigmoid(margin), highest.any(1))

def entropy_loss(rewards):
    """L_GRE = -sum_j p_j log p_j, p = softmax((r - mean) / std), std of the population. rewards (P,G).
    Mean over groups with a spread; fp64, where the std of equal rewards is exactly 0."""
    rewards = rewards.double()
    variance = rewards.var(1, correction=0)
    std = torch.where(variance > 0, variance, 1).sqrt()
    log_p = ((rewards - rewards.mean(1, keepdim=True)) / std[:, None]).log_softmax(1)
    return save.masked_mean(-(log_p.exp() * log_p).sum(1), variance > 0)

# ---- the reward model
class R2M(save.RewardModel):
    """The frozen RM, its trained head phi (`model.score`), and the four trained matrices."""

    def __init__(self, rm, policy, cfg):
        super().__init__(rm.model, rm.tokenizer)  # without a value head it may have had: that belongs to other rewards
        self.path, self.w = cfg.rm, 1.0  # w(0)
        # the policy stays outside of this module's parameters, hence a function
        self.policy_states = lambda ids: policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        self.requires_grad_(False)
        self.model.score.requires_grad_(True)
        outer, inner, d = rm.model.score.in_features, policy.model.config.get_text_config().hidden_size, cfg.r2m_width
        shapes = {"W_q": (outer, d), "W_k": (inner, d), "W_v": (inner, d), "W_o": (d, outer)}
        self.matrices = nn.ParameterDict()
        for name, shape in shapes.items():
            numbers = torch.Generator().manual_seed(save.seed_for(cfg.seed, "r2m", name))
            self.matrices[name] = (2 * torch.rand(shape, generator=numbers) - 1) / shape[0] ** 0.5
        self.to(cfg.device)

    def attend(self, last, states, mask):
        """H_last (N,D), h (N,T,D_p), mask (N,T) -> H_hat (N,D). k and v (N,T,d) are multiplied out: none is formed."""
        w_q, w_k, w_v, w_o = (self.matrices[name] for name in ("W_q", "W_k", "W_v", "W_o"))
        scores = (states @ (last @ w_q @ w_k.T)[:, :, None])[:, :, 0] / w_q.shape[1] ** 0.5
        share = scores.masked_fill(~mask, -math.inf).softmax(1)
        return (share[:, None] @ states)[:, 0] @ w_v @ w_o

    def features(self, input_ids, lengths, prompt_lengths, policy_ids, policy_lengths):
        """As in save.py, with H_fin (N,D) in place of H_last; gradients go to the matrices only."""
        with torch.no_grad():
            last, prompt = super().features(input_ids, lengths, prompt_lengths)
            states = self.policy_states(policy_ids).float()
        mask = torch.arange(policy_ids.shape[1], device=last.device) < policy_lengths[:, None] - 1
        return (1 - self.w) * self.attend(last, states, mask) + self.w * last, prompt

    def forward(self, *inputs):
        """`model_inputs` -> rewards (N,), values (N,)."""
        last, prompt = self.features(*inputs)
        return self.model.score(last).squeeze(-1), self.value(prompt)

    def save_pretrained(self, path):
        """The RM as it was before it was rounded to --dtype, with the new phi, and the matrices."""
        stock = save.RewardModel.from_pretrained(self.path)
        stock.model.score.load_state_dict(self.model.score.state_dict())
        stock.has_value_head = False
        with save.replaced_folder(path) as folder:
            stock.save_pretrained(folder)
            if save.RANK == 0:
                state = {name: p.detach().cpu() for name, p in self.matrices.items()}
                safetensors.torch.save_file(state, folder / "r2m.safetensors")

# ---- what takes the place of save.py's functions of the same names
@dataclasses.dataclass
class Config(save.Config):
    """R2M: save.py's flags, two of them with other defaults, and three more."""
    rm_update: str = "none"  # only none: R2M is what updates the reward model
    lr_rm: float = 1e-6  # the matrices and the scoring head (R2M's own)
    r2m_alpha: float = 0.3  # weight of L_GRE
    r2m_omega: float = 0.7  # smallest w(t)
    r2m_width: int = 2048  # d

    def checked(self):
        """The checks of save.py, after R2M's own."""
        save.expect(self.rm_update == "none" and self.stage in ("", "save"),
                    f"--rm_update {self.rm_update} --stage {self.stage}: R2M replaces them, leave both out")
        save.expect(0 <= self.r2m_alpha <= 1 and 0 <= self.r2m_omega <= 1 and self.r2m_width > 0,
                    "--r2m_alpha, --r2m_omega, --r2m_width: expected 0 to 1, 0 to 1 and more than 0")
        return super().checked()

def sample(run, *args):
    """The reward model's rows become (ids, (prompt_length, policy's ids)): equal texts may differ in tokens and h."""
    batch = plain.sample(run, *args)
    batch.chats = [(ids, (length, tuple(said))) for (ids, length), (said, _) in zip(batch.chats, batch.sequences)]
    return batch

def prepare(cfg):
    """As in save.py, with the same for held-out pairs, which come as text. Then R2M takes the RM's place."""
    words = save.AutoTokenizer.from_pretrained(cfg.policy, trust_remote_code=False)

    def pair_of(row, rm):
        with mock.patch.object(save, "encode_responses", encode_responses):
            return plain.pair_of(row, rm)

    def encode_responses(tokenizer, messages, responses):
        prompt = save.encode_chats(words, [messages], generation_prompt=True)[0]
        said = [words(text, add_special_tokens=False)["input_ids"] for text in responses]
        return [(ids, (length, (*prompt, *reply, words.eos_token_id))) for (ids, length), reply in
                zip(plain.encode_responses(tokenizer, messages, responses), said)]

    with mock.patch.object(save, "pair_of", pair_of):
        run, *inputs = plain.prepare(cfg)
    run.rm = R2M(run.rm, run.policy, cfg)
    run.optimizers["rm"] = save.ShardedAdamW(run.rm, cfg.lr_rm, cfg)
    return run, *inputs

def model_inputs(sequences, device):
    """For a reward model's rows also policy_ids (n,S) right-padded and policy_lengths (n,)."""
    if isinstance(sequences[0][1], int):  # the policy's
        return plain.model_inputs(sequences, device)
    rows = [(ids, length) for ids, (length, _) in sequences]
    said = [(said, len(said)) for _, (_, said) in sequences]
    return *plain.model_inputs(rows, device), *plain.model_inputs(said, device)[:2]

def reward_model_step(run, batch, highest, lowest):
    """One step on the matrices and phi. highest, lowest (P,G): the pairs of L_BT."""
    def loss(rewards, values, highest, lowest, usable):
        alpha = run.cfg.r2m_alpha
        return (1 - alpha) * pair_loss(rewards, highest, lowest) + alpha * entropy_loss(rewards)

    with mock.patch.dict(save.RM_UPDATES, none=save.RMUpdate(loss, "")):
        return save.reward_model_step(run, batch, highest, lowest)

def learn(run, batch):
    """One step of plain GRPO on R(x, y, h), then one step of the reward model on the same responses."""
    run.rm.w = own_share(run.step, run.cfg.steps, run.cfg.r2m_omega)
    plain.learn(run, batch)
    pair, before = highest_and_lowest(batch.rewards), batch.rewards
    save.score_batch(run, batch)  # h is the new policy's
    run.log.put(own_share=run.rm.w, state_shift=(batch.rewards - before).abs().mean())
    reward_model_step(run, batch, *pair)

def main(argv=None):
    """save.main with these names of its module replaced until it returns."""
    with mock.patch.multiple(save,
                             prepare=prepare,            # R2M; held-out pairs in the policy's tokens too
                             sample=sample,              # responses: keep the policy's tokens with the RM's
                             model_inputs=model_inputs,  # so that both reach R2M.features
                             learn=learn):               # a step of the reward model after that of the policy
        save.main(argv, Config)

if __name__ == "__main__":
    main()
