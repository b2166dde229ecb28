"""PRIME, process reinforcement through implicit rewards (arXiv 2502.01456), as a fork of save.py: only what differs.

    python tests/forks/prime.py [flags of save.py] [--prime_beta .05 --lr_prm 1e-6 --prime_labels hard|soft]

The implicit process reward model (PRM) is a causal LM phi that starts as the policy; ref is the policy at the start.
    r_phi(y_t) = beta (log pi_phi(y_t) - log pi_ref(y_t))    a reward for each token, at temperature 1
    r_phi(y)   = sum_t r_phi(y_t)                            trained as the logit of "y is good", beside the policy

PRIME has a verifier. For open-ended prompts the frozen --rm stands in: a response is good if R is at least its group's
mean (hard), or good to the degree sigmoid(R - mean) (soft). Every response of a prompt that passes the filter trains,
truncated ones too, as under --rm_update none. As Eq. 5 says: PRIME's code also scales the implicit rewards over the
batch, leaves beta out of them and whitens the returns. Its policy loss is a mean over all tokens; here it is save.py's,
over a response's tokens and then over responses. Settings that both have are save.py's, but for the KL term: none.

out/rm is the PRM as a stock causal LM in fp32. It gives rewards only together with the reference, the first --policy.
"""
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

plain = SimpleNamespace(**vars(save))  # what `main` replaces, as it was

@dataclasses.dataclass
class Config(save.Config):
    """PRIME: flags of save.py and its own. Those of the RM update and the value head have no effect."""
    rm_update: str = "none"  # only none: the RM labels, the PRM learns
    kl_coef: float = 0.0  # KL to the initial policy (PRIME: none)
    prime_beta: float = 0.05  # beta, the scale of the implicit rewards (PRIME)
    lr_prm: float = 1e-6  # the PRM's learning rate (PRIME)
    prime_labels: str = "hard"  # hard: R >= group mean; soft: sigmoid(R - group mean)

    def checked(self):
        """The checks of save.py, after what PRIME is not."""
        for name, allowed in {"rm_update": ["none"], "algo": ["grpo"], "stage": ["", "save"],
                              "prime_labels": ["soft", "hard"]}.items():
            value = getattr(self, name)
            save.expect(value in allowed, f"--{name} {value}: PRIME expects {' or '.join(filter(None, allowed))}")
        save.expect(save.WORLD == 1, f"{save.WORLD} ranks: PRIME runs on one")
        return super().checked()

# ---- maths: P prompts, G responses each, N = P*G rows, T tokens -----------------------------------------------------
def outcome_labels(rewards, kind):
    """r_o (P,G) from the RM's rewards (P,G). fp64: the fp32 mean of equal rewards may lie above them."""
    centred = rewards.double() - rewards.double().mean(1, keepdim=True)
    return (centred >= 0).float() if kind == "hard" else centred.sigmoid().float()

def accuracy_filter(labels):
    """Prompts (P,) whose mean label is within .2 and .8, both included."""
    accuracy = labels.double().mean(1)
    return (accuracy >= 0.2) & (accuracy <= 0.8)

def prime_advantages(token_rewards, mask, labels):
    """Eq. 5, gamma 1. token_rewards, mask (P,G,T), labels (P,G) -> (P,G,T), 0 where masked.
    A_t^i = sum_{s>=t} [r_phi(y_s^i) - mean_{j!=i} rbar_phi(y^j)] + r_o^i - mean_{j!=i} r_o^j, where rbar is the mean
    over the tokens of a response: each later token has its own baseline taken off."""
    def others_mean(x):
        return (x.sum(1, keepdim=True) - x) / (x.shape[1] - 1)

    baseline = others_mean(save.masked_mean(token_rewards, mask, 2))
    process = torch.where(mask, token_rewards - baseline[..., None], 0)
    returns = process.flip(-1).cumsum(-1).flip(-1)
    return torch.where(mask, returns + (labels - others_mean(labels))[..., None], 0)

def cross_entropy(rewards, labels):
    """Mean of -[r_o log sigmoid(r) + (1 - r_o) log(1 - sigmoid(r))] over rewards r = r_phi(y) (n,), labels r_o (n,)."""
    return -(labels * F.logsigmoid(rewards) + (1 - labels) * F.logsigmoid(-rewards)).mean()

# ---- the step: Algorithm 1 with "update=after" ----------------------------------------------------------------------
def token_log_probs(run, sequences):
    """The responses' log-probs under the PRM and under ref, 0 after a response's end, and their mask; all (N,T)."""
    as_policy = dataclasses.replace(run, policy=run.prm, cfg=dataclasses.replace(run.cfg, temperature=1.0))
    lengths = torch.tensor([len(ids) - prompt_length for ids, prompt_length in sequences], device=run.cfg.device)
    batches = save.micro_batches(range(len(sequences)), sequences, run.cfg.micro_tokens)
    arguments = as_policy, SimpleNamespace(sequences=sequences, lengths=lengths), batches
    log_probs = save.response_log_probs(*arguments)
    optimizer = run.optimizers["prm"]
    optimizer.publish(optimizer.initial)  # the PRM's initial weights are the reference
    reference = save.response_log_probs(*arguments)
    optimizer.publish(optimizer.masters)
    return log_probs, reference, torch.arange(log_probs.shape[1], device=lengths.device) < lengths[:, None]

def prm_step(run, batch, reference, labels, keep):
    """One cross-entropy step of the PRM on the responses `keep` (P,G). reference (N,T), labels (P,G)."""
    cfg, labels, kept = run.cfg, labels.flatten(), keep.flatten().nonzero()[:, 0].tolist()

    def micro_loss(model, rows):
        log_probs, _ = model(*save.model_inputs([batch.sequences[row] for row in rows], cfg.device), 1.0)
        rewards = cfg.prime_beta * (log_probs - reference[rows, :log_probs.shape[1]]).sum(1)
        loss = cross_entropy(rewards, labels[rows]) * len(rows) / len(kept)
        return loss, (loss,)

    loss, = save.train_on(run, "prm", save.micro_batches(kept, batch.sequences, cfg.micro_tokens), micro_loss)
    run.log.put(rm_loss=loss, rm_grad_norm=run.log.record.pop("prm_grad_norm"))

def learn(run, batch):
    """Label, drop prompts by accuracy, score the tokens, train the PRM, train the policy on the scores from before."""
    cfg = run.cfg
    save.score_batch(run, batch)
    labels = outcome_labels(batch.rewards, cfg.prime_labels)
    valid = accuracy_filter(labels)
    keep = valid[:, None].expand_as(labels)
    save.record(run, batch, keep & (labels >= 0.5), keep & (labels < 0.5), valid)
    if valid.any():
        with run.log.time("log_probs"):
            log_probs, reference, mask = token_log_probs(run, batch.sequences)
        rewards, mask = (x.view(*keep.shape, -1) for x in (cfg.prime_beta * (log_probs - reference), mask))
        run.log.put(implicit_reward=rewards.sum(2).mean(), implicit_spread=rewards.sum(2).std(1).mean())
        advantages = prime_advantages(rewards, mask, labels).flatten(0, 1)
        prm_step(run, batch, reference, labels, keep)
        with mock.patch.object(save, "policy_advantages", lambda *_: advantages):  # a number for each token
            save.policy_step(run, batch, keep)

# ---- the run --------------------------------------------------------------------------------------------------------
def prepare(cfg):
    """As in save.py, with the PRM, and with --heldout in its template and tokens. Checkpoints hold its optimizer."""
    prm = save.Policy.from_pretrained(cfg.policy, cfg.device)
    with mock.patch.object(save, "pair_of", lambda row, rm: plain.pair_of(row, prm)):
        run, *inputs = plain.prepare(cfg)
    run.prm, run.optimizers["prm"] = prm, save.ShardedAdamW(prm.model, cfg.lr_prm, cfg, keep_initial=True)
    run.optimizers["prm"].max_norm = 10.0  # PRIME's for the PRM
    save.to_working_copy(prm, cfg)
    return run, *inputs

def train(run, *inputs):
    """As in save.py; then the PRM is written, too."""
    plain.train(run, *inputs)
    run.prm.model.float()  # bf16 would lose steps as small as 1e-6
    run.optimizers["prm"].publish(run.optimizers["prm"].masters)
    with save.replaced_folder(Path(run.cfg.out, "rm"), run.prm.model, run.prm.tokenizer):
        pass
    save.say(f"implicit reward model: {Path(run.cfg.out, 'rm')}")

def heldout_accuracy(run, heldout):
    """Share of pairs with r_phi(chosen) > r_phi(rejected), in percent; a tie is wrong: 0 at the start, where phi = ref.
    The generation prompt counts as response here: the same tokens and rewards on both sides. What a template puts
    after the last EOS does not, a policy never writes it."""
    def until_eos(ids, length):
        ends = [i + 1 for i in range(length, len(ids)) if ids[i] in run.prm.eos_ids]
        return ids[:ends[-1] if ends else None], length

    for name, pairs in heldout.items():
        log_probs, reference, _ = token_log_probs(run, [until_eos(*side) for pair in pairs for side in pair])
        rewards = run.cfg.prime_beta * (log_probs - reference).sum(1)
        accuracy = 100 * (rewards[0::2] > rewards[1::2]).float().mean().item()
        run.log.put(**{f"accuracy_{name}": accuracy})
        save.say(f"  accuracy of the PRM on {name}: {accuracy:.2f} % of {len(pairs)} pairs")

def main(argv=None):
    """save.main with these names of its module replaced until it returns; everything else is save.py's."""
    with mock.patch.multiple(save,
                             prepare=prepare,                    # the PRM; --heldout in its tokens, not in the RM's
                             train=train,                        # writes the PRM at the end
                             heldout_accuracy=heldout_accuracy,  # by implicit rewards
                             learn=learn):                       # a step, after its responses were sampled
        save.main(argv, Config)

if __name__ == "__main__":
    main()
