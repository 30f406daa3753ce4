"""Contextual BCQ, a baseline of FOCAL's section 5: Batch-Constrained Q-learning (Fujimoto et al. 2019) given z.

    python benchmark/bcq.py --env walker-params --encoder-loss bellman      # the critic trains the encoder, as in PEARL

It is focal.py with another policy and another target: actions like the data's come from a VAE given (s, z), a small
network shifts them, and the best of ten by the critic is taken.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import focal

PROPOSALS = 10  # actions that are chosen from


class BCQActor(nn.Module):
    """Actions like the data's, from a VAE given (s, z), shifted a little."""

    def __init__(self, obs_dim, latent, act_dim, hidden):
        super().__init__()
        self.code_dim = 2 * act_dim
        self.encode = focal.mlp(obs_dim + latent + act_dim, hidden, 2 * self.code_dim)
        self.decode = focal.mlp(obs_dim + latent + self.code_dim, hidden, act_dim)
        self.shift = focal.mlp(obs_dim + latent + act_dim, hidden, act_dim)
        self.slow_shift = copy.deepcopy(self.shift).requires_grad_(False)

    def vae_loss(self, s, z, a):
        """Squared error of the action, plus half the KL of its code from N(0, I) for each dimension, mean over rows."""
        mean, log_std = self.encode(torch.cat([s, z, a], -1)).chunk(2, -1)
        log_std = log_std.clamp(-4, 15)
        code = mean + log_std.exp() * torch.randn_like(mean)
        error = (torch.tanh(self.decode(torch.cat([s, z, code], -1))) - a).square().mean()
        variance = (2 * log_std).exp()
        kl = 0.5 * (variance + mean.square() - 1 - variance.log()).sum(-1)
        return error + 0.5 * kl.mean() / self.code_dim

    def propose(self, s, z, noise, slow=False):
        """Actions (..., m) from codes near 0; noise (..., 2 m) is N(0, I)."""
        with torch.no_grad():
            a = torch.tanh(self.decode(torch.cat([s, z, noise.clamp(-0.5, 0.5)], -1)))
        shift = (self.slow_shift if slow else self.shift)(torch.cat([s, z, a], -1))
        return (a + 0.05 * torch.tanh(shift)).clamp(-1, 1)


def bcq_target(r, done, q_next, reward_scale, discount):
    """y of BCQ: the best of the proposed actions by 3/4 of the lower and 1/4 of the higher twin; q_next (2, K, N)."""
    value = (0.75 * q_next.amin(0) + 0.25 * q_next.amax(0)).amax(0)
    return reward_scale * r + discount * (1 - done) * value


class Agent(focal.Agent):
    METRICS = (*focal.Agent.METRICS, "vae_loss")
    ACTOR = BCQActor

    def propose(self, s, z, slow=False, generator=None):
        """Actions for s, z (N, ...): (K, N, m); and s and z, as often."""
        noise = torch.randn(PROPOSALS, len(s), self.actor.code_dim, generator=generator, device=s.device)
        s, z = (x.expand(PROPOSALS, *x.shape) for x in (s, z))
        return self.actor.propose(s, z, noise, slow), s, z

    def bellman_loss(self, b, z):
        s, a, r, s2, done, *_ = b
        with torch.no_grad():
            a2, s2, z2 = self.propose(s2, z, slow=True)
            y = bcq_target(r, done, self.target(s2, z2, a2), self.args.reward_scale, self.args.discount)
        q = self.critic(s, z, a)
        loss = focal.critic_loss(q, y)
        self.note(critic_loss=loss, q_mean=q.mean())
        return loss

    def learn_actor(self, b, z):
        s, a, *_ = b
        vae = self.actor.vae_loss(s, z, a)
        noise = torch.randn(len(s), self.actor.code_dim, device=s.device)
        loss = -self.critic(s, z, self.actor.propose(s, z, noise))[0].mean()
        self.note(actor_loss=loss, vae_loss=vae)
        data.descend(self.optimisers["actor"], vae + loss)  # the VAE learns from its own loss only, the shift from Q
        data.follow(self.actor.slow_shift, self.actor.shift, self.args.tau)

    def act(self, s, z, generator=None):
        """The best of the proposed actions, (N, m)."""
        a, s, z = self.propose(s, z, generator=generator)
        best = self.critic(s, z, a)[0].argmax(0)
        return a[best, torch.arange(a.shape[1], device=a.device)]


class Args(focal.Args):
    """FOCAL's, but for what regularises its policy."""

    WITHOUT = {"actor": "brac", "alpha": 0, "tune_alpha": False, "value_penalty": False}

    def complete(self, given):
        super().complete(given)
        for key in self.WITHOUT.keys() & given.keys():
            raise data.DataError(f"{data.option(key)}: BCQ does not regularise its policy; expected it left out")


def parse_args(argv=None):
    rows = focal.TABLE, focal.SMALL, {"walker-params": focal.OURS}
    table, small, ours = ({env: row | Args.WITHOUT for env, row in part.items()} for part in rows)
    return data.parse(Args, table, small, argv, ours)


def train(args, run):
    focal.train(args, run, Agent)


def main(argv=None):
    data.start(train, parse_args, argv)


if __name__ == "__main__":
    main()
