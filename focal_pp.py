"""FOCAL++: improved offline meta-RL with attention and contrastive learning (Li et al.; ICLR 2022; arXiv:2102.10774).

Given fixed datasets D_i of training tasks T_i (Algorithm 1; numbers in brackets are FOCAL's equations):
    repeat: draw a meta-batch of tasks; for each task draw two contexts c_i, c'_i and an RL minibatch b_i from D_i
        z_i = mean of W(c) E_q(c) over c_i (FOCAL++'s 18)                attention: W and E_q, of parameters phi
        z_k = the same of c'_i by the key encoder E_k, no gradient       those of other tasks are the negatives
        phi   <- descend the momentum contrast loss (FOCAL++'s 7, 8)     then phi_k <- m phi_k + (1 - m) phi
        psi   <- descend the Bellman error of Q_psi(s, z_i, a) (27)      z_i detached: it does not train the encoder
        theta <- descend alpha D(pi, behaviour) - min Q (28) + log pi    behaviour regularisation (BRAC); entropy
        D is the dual form of KL with a discriminator g, which learns beside them; none where alpha = 0 (point robots)
At test time (Algorithm 2) z comes from a context of the test task's own offline data.

    python focal_pp.py --env sparse-point-robot  # 6 minutes, 12.3 (temperature 0.1, not 0.5); diff focal.py focal_pp.py

(FOCAL's Table 6 has 8.16 there, on experts' data; FOCAL++'s Table 1 11.84, FOCAL++ 12.96; optimum 13.09. Ours are small
networks on data of all stages of SAC. Contexts and returns are sparse, RL has dense rewards, as in FOCAL++'s paper.)
Where we differ from the paper:
- Every step draws its tasks, and from D_i contexts and minibatches: there are no buffers C_i; b_i is drawn apart from
  c_i (FOCAL++: the same rows). (13), (27), (28) are means, not sums; |d|^2 too, or the laws' factors 8 and 16 (FOCAL's
  Table 5b) unbalance them. Contexts have dense rewards, sparse-point-robot's FOCAL's sparse; `--sparse`: FOCAL++'s.
- Observations are standardised. The encoder learns for `encoder_steps`, at a rate that falls to 0, since a policy
  cannot settle while z moves under it; z is then one of 64 kept for each task. Other settings: SMALL, OURS.
- D in the target (`--value-penalty`): FOCAL's (7) in its (8) gives it the weight gamma^2 alpha; its (6), as BRAC, means
  gamma alpha. D(s') compares pi with the data's next action, and is 0 where an episode ends.
- The critic steps before the actor (Algorithm 1: after it). One c'_j serves all pairs (i, j). Q has a twin; the
  entropy (FOCAL's appendix F) has weight 1 in target and actor; g, in D, has a penalty on its slope.
What we learned: alpha too small lets Q diverge, too large holds the policy at the data's return; a policy that learns
faster than the discriminator outruns it; the point robots' experts are too narrow as data (see TABLE).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import envs
from data import Count, Number, Positive, Share


# ==================================================================================================== 1. arguments
@dataclass
class Args(data.Args):
    steps: Count = 200_000  # gradient steps; the papers do not say how many
    # algorithm
    hidden: Count = 256  # width of the actor, the critics and the discriminator
    meta_batch_size: Count = 16  # tasks in a gradient step
    batch_size: Count = 256  # transitions of each task in a gradient step
    context_size: Count = 512  # transitions in a context
    lr: Number = 1e-3  # learning rate of actor and critic
    final_lr: Share = 1.0  # share of the learning rate that is left at the last step; it falls linearly
    tau: Share = 0.005  # rate of the slow target
    discount: Share = 0.99  # discount factor
    reward_scale: Number = 5.0  # multiplies rewards in the critic's target only
    sparse: bool = False  # contexts of sparse rewards (FOCAL++'s Eq. 35); dense ones to learn from
    latent: Count = 20  # size l of the task embedding
    encoder_hidden: Literal[16, 32, 64, 128, 256] = 128  # width of the task encoder; the batch-wise gate has a 16th
    blocks: Count = 3  # attention blocks of the task encoder
    dropout: Share = 0.1  # in the encoder while it learns
    temperature: Positive = 0.5  # tau of FOCAL++'s Eq. 8 (not the target's rate), with contrast
    momentum: Share = 0.9  # m of the key encoder, with contrast
    encoder_lr: Number = 1e-3  # learning rate of the task encoder
    encoder_steps: Count | None = None  # its gradient steps; or --steps / 5, half at most; all if Q trains it
    beta: Number = 1.0  # weight of FOCAL's Eq. 13's negative pairs, times that in LAWS (its Table 5b)
    eps: Positive = 0.1  # epsilon of FOCAL's Eq. 13
    alpha: Number = 50.0  # weight of the divergence; 0 without --tune-alpha: no discriminator
    value_penalty: bool = False  # D in the target (FOCAL's Eq. 7)
    discriminator_lr: Number = 1e-4  # learning rate of the discriminator g
    discriminator_steps: Count = 3  # gradient steps of the discriminator in an update; 3 is the authors' code's
    tune_alpha: bool = False  # let alpha seek the target divergence (FOCAL++)
    alpha_lr: Number = 1.0  # with --tune-alpha, the size of alpha's plain gradient step
    alpha_max: Number = 2e3  # with --tune-alpha, the largest alpha
    target_divergence: Number = 0.05  # with --tune-alpha, the mean D above which alpha rises
    # ablations
    actor: Literal["brac", "clone"] = "brac"  # clone: behaviour cloning given z; Q learns, unused
    attention: Literal["both", "batch", "seq", "none"] = "both"  # over transitions (batch), their parts (seq)
    next_obs: bool = True  # s' in the context; in PEARL's code only where dynamics differ
    encoder_loss: Literal["contrast", "dml", "bellman"] = "contrast"  # contrast: FOCAL++; dml: FOCAL; bellman: PEARL
    coupled: bool = False  # the critic's loss trains the encoder too (FOCAL, section 5.2.3)
    dml: Literal[tuple(LAWS)] = "inverse-square"  # law of FOCAL's Eq. 13's negative pairs

    GROWS = ("steps", "encoder_steps")

    @property
    def critic_trains_encoder(self):
        """In the ablations: by --coupled beside the encoder's own loss, by --encoder-loss bellman instead of it."""
        return self.coupled or self.encoder_loss == "bellman"

    @property
    def regularised(self):
        """Whether there is a divergence from the behaviour, and a discriminator that estimates it."""
        return self.actor == "brac" and (self.alpha > 0 or self.tune_alpha)

    def complete(self, given):
        super().complete(given)
        if "encoder_steps" not in given:  # half of the run at most: the policy is to learn on with a z that rests
            last = max(2, min(self.encoder_steps or self.steps // 5, self.steps // 2))  # the last step has rate 0
            self.encoder_steps = self.steps if self.critic_trains_encoder else last  # Q changes as the policy does
        idle = partial(data.refuse_idle, given)
        idle("sparse", "relabelled" in (self.quality, self.test_quality), "relabelled data, whose contexts are sparse")
        without = "--actor clone" if self.actor == "clone" else "--alpha 0"
        idle("alpha tune_alpha alpha_lr alpha_max target_divergence", self.actor == "clone", without)
        idle("value_penalty discriminator_lr discriminator_steps", not self.regularised, without)
        idle("alpha_lr alpha_max target_divergence", not self.tune_alpha, "--no-tune-alpha")
        idle("coupled", self.encoder_loss == "bellman", "--encoder-loss bellman")
        idle("beta eps dml", self.encoder_loss != "dml", f"--encoder-loss {self.encoder_loss}")
        idle("eps", self.dml in ("linear", "square"), f"--dml {self.dml}")
        idle("temperature momentum", self.encoder_loss != "contrast", f"--encoder-loss {self.encoder_loss}")


# FOCAL's Table 4, and from its Table 2 the quality of the data, except on the point robots: our expert data come
# from one checkpoint (the paper's: fourteen or more) and leave Q ignorant of actions that lead away from the goal.
# (alpha_max is the authors' code's.) What is not here has its default; families of neither paper: the walkers' row.
POINT = {"reward_scale": 100, "alpha": 0, "latent": 5, "discount": 0.9}
MUJOCO = {"alpha": 500, "tune_alpha": True, "lr": 3e-3, "encoder_lr": 3e-3}  # of FOCAL++'s Table 6
TWO = MUJOCO | {"value_penalty": True, "meta_batch_size": 2, "batch_size": 512}  # (there 4 x 256)
TABLE = {
    "sparse-point-robot": POINT,
    "point-robot-wind": POINT,
    "cheetah-vel": MUJOCO | {"quality": "expert"},
    "cheetah-fwd-back": TWO,
    "ant-fwd-back": TWO | {"alpha_max": 5e6},
}
WALKER = MUJOCO | {"alpha_max": 1e4}
TABLE |= dict.fromkeys(("walker-params", "hopper-params", "ant-dir", "humanoid-dir", "sawyer"), WALKER)
# What differs on a machine without a GPU; chosen by returns on these tasks, mostly on seed 0.
SMALL_NETWORKS = {"hidden": 128, "meta_batch_size": 8, "batch_size": 64, "tau": 0.02, "final_lr": 0.1, "threads": 1}
SMALL_NETWORKS |= {"encoder_hidden": 32, "lr": 1e-3, "encoder_lr": 1e-3, "tune_alpha": False}
SMALL_POINT = SMALL_NETWORKS | {"hidden": 64, "steps": 10_000, "encoder_steps": 400, "eval_every": 1_000}
SMALL_POINT |= {"context_size": 256, "temperature": 0.1}  # at 0.5 near goals are not pushed apart
SMALL_MUJOCO = SMALL_NETWORKS | {"steps": 12_000, "encoder_steps": 800, "context_size": 64, "eval_every": 2_000}
SMALL_MUJOCO |= {"discriminator_steps": 1, "discriminator_lr": 1e-3, "alpha": 50}
# FOCAL's alpha = 50 holds small runs at the data's return; a smaller one without value penalty lets Q diverge.
SMALL_WALKER = SMALL_MUJOCO | {"alpha": 20, "value_penalty": True, "encoder_steps": 3_000, "final_lr": 0.02}
# A table's alpha drowns the rewards; at rate 1e-3 the policy outruns the discriminator: cheetahs end at 200 to 700.
SMALL_TWO = SMALL_MUJOCO | {"lr": 3e-4, "discriminator_steps": 3, "alpha": 100}
SMALL_TWO |= {"meta_batch_size": 2, "batch_size": 256}
# Of a longer z unseen walkers' lie far from all that the policy has learned on.
SMALL_BODIES = SMALL_WALKER | {"latent": 2, "beta": 1}
SMALL = dict.fromkeys(TABLE, SMALL_BODIES) | dict.fromkeys(("sparse-point-robot", "point-robot-wind"), SMALL_POINT)
SMALL |= dict.fromkeys(("cheetah-fwd-back", "ant-fwd-back"), SMALL_TWO)
# Experts of 80 speeds take a high rate to fit; FOCAL's z says more of new ones after 6,000 steps, FOCAL++'s less.
SMALL |= {"cheetah-vel": SMALL_MUJOCO | {"discriminator_steps": 3, "final_lr": 0.02}}
# Ants' policy, too, outruns the discriminator at the walkers' rate; a larger alpha holds humanoids to their data.
SMALL |= {"humanoid-dir": SMALL_WALKER, "ant-dir": SMALL_WALKER | {"alpha": 50, "lr": 3e-4, "discriminator_steps": 3}}
SMALL |= {"sawyer": SMALL_WALKER | {"discount": 0.95, "encoder_steps": 1_500}}
# What is ours at the papers' sizes, on walkers alone: there FOCAL's Table 4 (focal.py --letter) ends below its data.
OURS = {"alpha": 20, "value_penalty": True, "tau": 0.02, "latent": 5, "context_size": 64, "encoder_steps": 4_000}
OURS |= {"discriminator_steps": 1, "discriminator_lr": 1e-3, "final_lr": 0.02, "steps": 8_000, "eval_every": 1_000}
OURS |= {"tune_alpha": False, "lr": 1e-3, "encoder_lr": 1e-3}  # where FOCAL++ has others


def parse_args(argv=None):
    return data.parse(Args, TABLE, SMALL, argv, {"walker-params": OURS})


# ===================================================================================================== 2. networks
def mlp(d_in, hidden, d_out, linear=nn.Linear):
    """Three hidden layers, with ReLU between."""
    layers = [linear(d_in, hidden), nn.ReLU(), linear(hidden, hidden), nn.ReLU(), linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, linear(hidden, d_out))


class Actor(nn.Module):
    """pi(a | s, z): a tanh-Gaussian."""

    def __init__(self, obs_dim, latent, act_dim, hidden):
        super().__init__()
        self.net = mlp(obs_dim + latent, hidden, 2 * act_dim)

    def forward(self, s, z):
        """Mean and log std (..., m) before tanh."""
        mean, log_std = self.net(torch.cat([s, z], -1)).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)


def sample_tanh_gaussian(mean, log_std):
    """tanh(u) (..., m), u ~ N(mean, std^2), by reparameterisation, and its log density (...)."""
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_pi = log_density(u, noise, log_std)
    return torch.tanh(u), log_pi


def log_density(u, noise, log_std):
    """Of tanh(u), u = mean + std noise, summed over the last axis."""
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return (log_normal - log_det).sum(-1)


class Critic(nn.Module):
    """Q(s, z, a), two of them as one batch: (..., d) -> (2, ...)."""

    def __init__(self, obs_dim, latent, act_dim, hidden):
        super().__init__()
        self.net = mlp(obs_dim + latent + act_dim, hidden, 1, partial(data.BatchedLinear, 2))

    def forward(self, s, z, a):
        x = torch.cat([s, z, a], -1)
        rows = x.flatten(0, -2)
        return self.net(rows.expand(2, *rows.shape)).view(2, *x.shape[:-1])


# ================================================================================================= 3. task encoder
class Encoder(nn.Module):
    """q_phi: C transitions (M tasks, C, width) -> z (M, l) in (-1, 1), a mean over them; and 0 (M,): it has no KL."""

    stochastic = False  # whether z is drawn (focal.py's ProbabilisticEncoder)

    def __init__(self, widths, args):
        super().__init__()
        self.widths = widths if args.attention in ("both", "seq") else [sum(widths)]  # of the tokens
        self.embed = nn.ModuleList(nn.Linear(width, args.encoder_hidden) for width in self.widths)
        self.position = nn.Parameter(0.02 * torch.randn(len(self.widths), args.encoder_hidden))
        blocks = (Block(args.encoder_hidden, args.attention, args.dropout) for _ in range(args.blocks))
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(args.encoder_hidden, args.latent)

    def forward(self, context, generator=None):
        z, w = self.transitions(context)
        z = (w[..., None] * z).mean(1)  # FOCAL++'s Eq. 18: mean over c of W(c) E(c); W also scales tokens in its block
        return z, torch.zeros_like(z[:, 0])

    def transitions(self, context):
        """Each transition's embedding (M, C, l) and weight W (M, C), the last block's."""
        tokens = zip(self.embed, context.split(self.widths, -1), strict=True)
        x = torch.stack([embed(token) for embed, token in tokens], 2) + self.position
        for block in self.blocks:
            x, w = block(x)
        return torch.tanh(self.head(x.mean(2))), w


class Block(nn.Module):
    """Attention over a transition's tokens and, beside it, a context's transitions; begins as the identity (B.2)."""

    def __init__(self, hidden, attention, dropout):
        super().__init__()
        self.norms, self.dropout = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)]), dropout
        self.feed_forward = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        if attention in ("both", "seq"):
            self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        if attention in ("both", "batch"):
            self.gate = nn.Sequential(nn.Linear(hidden, hidden // 16), nn.Tanh(), nn.Linear(hidden // 16, 1))
        for name, p in self.named_parameters():
            if name.startswith(("feed_forward.2.", "out.", "gate.2.")):  # the last layers
                nn.init.zeros_(p)

    def forward(self, x):
        """Tokens x (M tasks, C, tokens, h) -> the same, and weights W (M, C) of mean 1 over C (Definition 3.7)."""
        p = self.dropout if torch.is_grad_enabled() else 0.0  # none in keys and evaluations
        n = self.norms[0](x)
        if hasattr(self, "gate"):
            w = torch.sigmoid(self.gate(n.mean(2)))[..., 0]
            w = w / w.mean(1, keepdim=True)
            y = (w[..., None, None] - 1) * x  # so that x + y = w x, but for dropout
        else:
            y, w = torch.zeros_like(x), torch.ones_like(x[..., 0, 0])
        if hasattr(self, "qkv"):
            # softmax(q k^T / sqrt(e)) v over a transition's tokens, in 8 heads of size e; q, k, v (M, C, tokens, 8, e)
            q, k, v = self.qkv(n).unflatten(-1, (3, 8, -1)).unbind(3)
            attention = ((q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) / math.sqrt(q.shape[-1])).softmax(3)
            v = (F.dropout(attention, p, p > 0)[..., None] * v.unsqueeze(2)).sum(3)
            y = y + self.out(v.flatten(3))
        x = x + F.dropout(y, p, p > 0)
        return x + F.dropout(self.feed_forward(self.norms[1](x)), p, p > 0), w


# ======================================================================================================= 4. losses
# What a pair of different tasks costs, given |d|^2, with the weights of FOCAL's Table 5b (the minus is ours): alike in
# size near |d| = 0.5. All fall as the distance grows: inverse powers towards 0, the others without bound.
LAWS = {
    "inverse-square": lambda d2, eps: 1 / (d2 + eps),
    "inverse": lambda d2, eps: 2 / ((d2 + 1e-12).sqrt() + eps),
    "linear": lambda d2, eps: -8 * (d2 + 1e-12).sqrt(),
    "square": lambda d2, eps: -16 * d2,
}


def dml_loss(z_i, z_j, same, beta, law, eps):
    """Distance metric loss over all pairs of a meta-batch; z_i, z_j (M, l) from independent contexts, same (M, M).

    |d|^2 is the mean over the latent dimensions, as the weights in LAWS presuppose.
    """
    d2 = (z_i[:, None] - z_j[None]).square().mean(-1)  # (M, M)
    # FOCAL's Eq. 13: 1{y_i = y_j} |q_i - q_j|^2 + 1{y_i != y_j} beta / (|q_i - q_j|^n + eps), or another of LAWS
    return torch.where(same, d2, beta * LAWS[law](d2, eps)).mean()


def contrast_loss(z_q, z_k, same, temperature):
    """Momentum contrast (Algorithm 1 lacks its minus); z_q, z_k (M, l); same (M, M): no task is its own negative."""
    # FOCAL++'s Eqs. 7, 8: -sum_i log( exp(z_q_i . z_k_i / tau) / sum_j exp(z_q_i . z_k_j / tau) )
    logits = (z_q @ z_k.T / temperature).masked_fill(same.clone().fill_diagonal_(False), -math.inf)
    return -logits.log_softmax(1).diagonal().sum()


def critic_target(r, done, q_next, log_pi_next, divergence_next, reward_scale, discount, alpha):
    """y of FOCAL's Eq. 27 with Eq. 7's value penalty and the entropy of appendix F, weighted as in `actor_loss`; q_next
    (2, N) of the slow target, divergence_next (N,) or 0."""
    # reward_scale r + gamma (1 - done) (min Qbar(s', z, a') - log pi(a'|s', z) - alpha D(s'))
    return reward_scale * r + discount * (1 - done) * (q_next.amin(0) - log_pi_next - alpha * divergence_next)


def critic_loss(q, y):
    """FOCAL's Eq. 27: (y - Q(s, z, a))^2, mean over rows, sum over the twins; q (2, N), y (N,)."""
    return (y - q).square().mean(1).sum()


def actor_loss(log_pi, q, divergence, alpha):
    """FOCAL's Eq. 28, -Q + alpha D, and the entropy of its appendix F; its weight of 1 is ours (`reward_scale` decides
    what that is worth): log pi(a''|s, z) - min Q(s, z, a'') + alpha D(s); q (2, N)."""
    return (log_pi - q.amin(0) + alpha * divergence).mean()


def clone_loss(mean, log_std, a):
    """-log pi(a | s, z), mean over the data's actions (N, m), which are kept off the rim: behaviour cloning."""
    u = torch.atanh(a.clamp(-0.999, 0.999))
    return -log_density(u, (u - mean) / log_std.exp(), log_std).mean()


def kl_dual(logit_pi, logit_data):
    """D = KL(pi || behaviour) = max over g > 0 of E_pi[log g(a)] + 1 - E_data[g(a)], at its maximum g = pi / behaviour
    (Nowozin et al. 2016); here one sample of each expectation a row, g = softplus(logit)."""
    return torch.log(F.softplus(logit_pi) + 1e-8) + 1 - F.softplus(logit_data)


def discriminator_loss(divergence, grad_a):
    """-mean D + 5 mean max(|grad_a logit| - 1, 0)^2; grad_a (N, m) at actions between the policy's and the data's.
    The penalty is of BRAC's code (Wu et al. 2019): a smooth g has a slope that tells the actor where the data are."""
    return -divergence.mean() + 5 * (grad_a.norm(dim=-1) - 1).clamp_min(0).square().mean()


def slope(net, x, m):
    """The gradient (N, m) of net(x), a network that `mlp` made, by the last m of the inputs x (N, d).

    By hand, for speed. Small changes of the weights leave the same ReLUs active: masks have no gradient of their own.
    """
    with torch.no_grad():
        h_1 = net[:2](x)
        h_2 = net[2:4](h_1)
        h_3 = net[4:6](h_2)
        on_1, on_2, on_3 = ((h > 0).to(x.dtype) for h in (h_1, h_2, h_3))
    # w_4 [h_3 > 0] W_3 [h_2 > 0] W_2 [h_1 > 0] W_1
    w_1, w_2, w_3, w_4 = (layer.weight for layer in net[::2])
    return (((on_3 @ (w_4.T * w_3)) * on_2) @ w_2 * on_1) @ w_1[:, -m:]


# ======================================================================================================= 5. update
class Agent(data.Learner):
    """Every network of the algorithm, and its update."""

    METRICS = ("encoder_loss", "encoder_kl", "critic_loss", "actor_loss", "discriminator_loss", "q_mean", "divergence")
    METRICS += ("alpha",)
    SETTLED = 64  # contexts of each task that are embedded for good once the encoder stands still
    ACTOR = Actor  # benchmark/bcq.py has another

    def __init__(self, args, batches):
        super().__init__()
        self.args, self.batches = args, batches
        obs_dim, act_dim, *_ = batches.split
        sizes, device = (obs_dim, args.latent, act_dim, args.hidden), batches.rows.device
        widths = [obs_dim, act_dim, obs_dim, 1] if args.next_obs else [obs_dim, act_dim, 1]  # of a context's parts
        self.encoder = Encoder(widths, args)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.actor, self.critic, self.target = self.ACTOR(*sizes), Critic(*sizes), Critic(*sizes).requires_grad_(False)
        self.target.load_state_dict(self.critic.state_dict())
        self.discriminator = mlp(obs_dim + args.latent + act_dim, args.hidden, 1) if args.regularised else None
        self.register_buffer("settled", torch.zeros(len(batches.rows), self.SETTLED, args.latent))
        self.register_buffer("alpha", torch.tensor(float(args.alpha)))
        self.to(device)
        rates = {"encoder": args.encoder_lr, "critic": args.lr, "actor": args.lr}
        rates |= {"discriminator": args.discriminator_lr} if args.regularised else {}
        self.optimisers = {name: data.adam(getattr(self, name), rate) for name, rate in rates.items()}

    def update(self, encoder_learns=True):
        """One gradient step of every network (of g: several). It never waits for the device."""
        args = self.args
        self.step += 1
        self.set_rates(encoder_learns)
        # Algorithm 1's loop over tasks, as one batch: M tasks, their b_i and, in `embed`, c_i and c'_i, drawn apart
        task = self.batches.tasks()
        b = self.batches.transitions(task)
        z, encoder_loss = self.embed(task) if encoder_learns else (self.settled_embedding(task), 0)
        z = z.repeat_interleave(args.batch_size, 0)  # (M x B, l)
        coupled = encoder_learns and args.critic_trains_encoder
        bellman_loss = self.bellman_loss(b, z if coupled else z.detach())  # detached, it does not train the encoder
        learning = ["encoder", "critic"] if encoder_learns else ["critic"]
        data.descend([self.optimisers[name] for name in learning], encoder_loss + bellman_loss)
        if encoder_learns:
            data.follow(self.key_encoder, self.encoder, 1 - args.momentum)  # phi_k <- m phi_k + (1 - m) phi
        self.learn_actor(b, z.detach())
        data.follow(self.target, self.critic, args.tau)
        self.note(alpha=self.alpha)
        self.record()

    def set_rates(self, encoder_learns):
        """Actor's, critic's rates fall linearly, the encoder's to 0: it stands still from then on; g's stays."""
        args = self.args
        data.anneal(self.optimisers, {"critic": args.lr, "actor": args.lr}, args.final_lr, self.step, args.steps)
        if encoder_learns:
            data.anneal(self.optimisers, {"encoder": args.encoder_lr}, 0, self.step, args.encoder_steps)

    def embed(self, task):
        """z (M, l) of contexts c_i of tasks (M,), and the loss of the encoder."""
        args, m = self.args, len(task)
        twice = args.encoder_loss == "dml"  # contexts c_i, then c'_i, in one pass
        z, kl = self.encoder(self.batches.contexts(task.repeat(2) if twice else task))  # (M, l), (M,)
        z_i, kl = z[:m], kl[:m].mean()
        self.note(encoder_kl=kl)
        same = task[:, None] == task[None]
        loss = 0
        if args.encoder_loss == "dml":
            dml = dml_loss(z_i, z[m:], same, args.beta, args.dml, args.eps)  # FOCAL's Eq. 13
            self.note(encoder_loss=dml)
            loss = loss + dml
        if args.encoder_loss == "contrast":
            with torch.no_grad():  # and so without dropout
                z_k, _ = self.key_encoder(self.batches.contexts(task))
            loss = contrast_loss(z_i, z_k, same, args.temperature)  # FOCAL++'s Eqs. 7, 8
            self.note(encoder_loss=loss)
        return z_i, loss

    @torch.no_grad()
    def settle(self):
        """Embeds contexts of every task, from which later updates draw: the encoder does not change any more."""
        tasks = torch.arange(len(self.settled), device=self.settled.device)
        for i in range(self.SETTLED):
            self.settled[:, i] = self.encoder(self.batches.contexts(tasks))[0]

    @torch.no_grad()
    def settled_embedding(self, task):
        """z (M, l)."""
        if self.encoder.stochastic:  # a fresh one: the policy could learn the noise of 64 kept ones by heart
            return self.encoder(self.batches.contexts(task))[0]
        return self.settled[task, torch.randint(self.SETTLED, task.shape, device=task.device)]

    def bellman_loss(self, b, z):
        s, a, r, s2, done, a2_data, has_next = b
        with torch.no_grad():
            a2, log_pi2 = sample_tanh_gaussian(*self.actor(s2, z))
            penalised = self.args.value_penalty and self.discriminator is not None  # FOCAL's Eq. 7
            divergence2 = has_next * self.divergence(s2, z, a2, a2_data) if penalised else 0
            q2, scale, discount = self.target(s2, z, a2), self.args.reward_scale, self.args.discount
            y = critic_target(r, done, q2, log_pi2, divergence2, scale, discount, self.alpha)
        q = self.critic(s, z, a)
        loss = critic_loss(q, y)  # FOCAL's Eq. 27
        self.note(critic_loss=loss, q_mean=q.mean())
        return loss

    def learn_actor(self, b, z):
        args, (s, a, *_) = self.args, b
        policy = self.actor(s, z)  # mean and log std
        if self.discriminator is not None:
            self.learn_discriminator(s, z, a, *policy)
        a_pi, log_pi = sample_tanh_gaussian(*policy)
        divergence = torch.zeros_like(self.alpha) if self.discriminator is None else self.divergence(s, z, a_pi, a)
        loss = actor_loss(log_pi, self.critic(s, z, a_pi), divergence, self.alpha)  # FOCAL's Eq. 28
        loss = clone_loss(*policy, a) if args.actor == "clone" else loss
        data.descend(self.optimisers["actor"], loss)  # only the policy learns from it
        if args.tune_alpha and args.regularised:  # the authors': alpha + lr (mean D - target), in [0, alpha_max]
            with torch.no_grad():
                self.alpha += args.alpha_lr * (divergence.mean() - args.target_divergence)
                self.alpha.clamp_(0, args.alpha_max)
        self.note(actor_loss=loss, divergence=divergence.mean())

    def learn_discriminator(self, s, z, a, mean, log_std):
        """Steps of g, while the policy stands still: its actions for all of them are drawn at once."""
        steps, x = self.args.discriminator_steps, torch.cat([s, z], -1)
        with torch.no_grad():
            a_pi = torch.tanh(mean + log_std.exp() * torch.randn(steps, *mean.shape, device=a.device))
            mix = torch.rand(steps, len(a), 1, device=a.device)
            between = torch.cat([x.expand(steps, *x.shape), mix * a + (1 - mix) * a_pi], -1)  # (steps, N, d)
            # (steps, 2, N, d): the policy's actions, the data's
            both = torch.cat([x.expand(steps, 2, *x.shape), torch.stack([a_pi, a.expand_as(a_pi)], 1)], -1)
        for k in range(steps):
            logit_pi, logit_data = self.discriminator(both[k]).squeeze(-1)
            grad_a = slope(self.discriminator, between[k], a.shape[1])
            loss = discriminator_loss(kl_dual(logit_pi, logit_data), grad_a)
            data.descend(self.optimisers["discriminator"], loss)
        self.note(discriminator_loss=loss)

    def divergence(self, s, z, a_pi, a_data):
        return kl_dual(*(self.discriminator(torch.cat([s, z, a], -1)).squeeze(-1) for a in (a_pi, a_data)))

    def act(self, s, z, generator=None):
        """The action (N, m) that is scored: the policy's mean."""
        return torch.tanh(self.actor(s, z)[0])


# ========================================================================================== 6. data and evaluation
class Batches:
    """The training tasks' transitions, one row each, on the device; every draw from them is made there."""

    def __init__(self, args, rows, split):
        self.args, self.rows, self.split = args, rows, split  # (n tasks, N, D), widths of the parts of a row

    def tasks(self):
        n, m = len(self.rows), self.args.meta_batch_size
        if m > n:  # fewer tasks than M: drawn with replacement
            return torch.randint(n, (m,), device=self.rows.device)
        return torch.rand(n, device=self.rows.device).argsort()[:m]

    def draw(self, task, size):
        """(M, size, D) rows of each task, drawn uniformly with replacement; `evaluate` draws its own."""
        n, count, width = self.rows.shape
        index = torch.randint(count, (len(task), size), device=task.device) + task[:, None] * count
        return self.rows.view(n * count, width).index_select(0, index.flatten()).view(len(task), size, width)

    def contexts(self, task):
        """(M, C, width): s, a, s' and r of C transitions, as the encoder sees them."""
        return context_of(self.draw(task, self.args.context_size), self.split, self.args)

    def transitions(self, task):
        """s, a, r, s', done and, for the value penalty, the data's next action, whether there is one; (M x B, ...)."""
        rows = self.draw(task, self.args.batch_size).flatten(0, 1)
        s, a, _, s2, r, done, a2, has_next = rows.split(self.split, -1)
        return s, a, r[:, 0], s2, done[:, 0], a2, has_next[:, 0]


def context_of(rows, split, args):
    s, a, r, s2, *_ = rows.split(split, -1)
    return torch.cat([s, a, s2, r] if args.next_obs else [s, a, r], -1)


def pack(dataset, tasks, mean, std):
    """Rows (n, N, D): s, a, context r, s', r, d, next a, whether there is one; observations standardised."""
    has_next = F.pad((dataset.episodes[tasks].diff(dim=1) == 0).float(), (0, 1))
    a = dataset.actions[tasks]
    s, s2 = ((obs[tasks] - mean) / std for obs in (dataset.observations, dataset.next_observations))
    columns = dataset.context_rewards[tasks], dataset.rewards[tasks], dataset.terminals[tasks], has_next
    r_context, r, done, has_next = (column[..., None] for column in columns)
    return torch.cat([s, a, r_context, s2, r, done, a.roll(-1, 1), has_next], -1)


class World(data.World):
    """The data of every task as packed rows, and one sub-environment for each task and evaluation episode."""

    def __init__(self, args, device):
        train, test = data.open_datasets(args, device)
        if args.sparse:  # in contexts only; FOCAL++'s R on sparse-point-robot, else the rewards' median
            data.sparsify(test, data.sparsify(train))
        row = envs.family(args.env)
        self.split = [row.obs_dim, row.act_dim, 1, row.obs_dim, 1, 1, row.act_dim, 1]  # widths, as in `pack`
        self.mean, self.std = data.standardisation(train.observations[train.train_tasks])
        self.train_rows = pack(train, train.train_tasks, self.mean, self.std)
        self.test_rows = pack(test, test.test_tasks, self.mean, self.std)
        self.tasks = np.concatenate([train.tasks[train.train_tasks], test.tasks[test.test_tasks]])
        self.env = envs.make(args.env, self.tasks.repeat(args.eval_episodes, axis=0), seed=args.seed)
        self.know(train, test)


@torch.no_grad()
def evaluate(args, agent, world):
    """Returns (n_train, E), (n_test, E) of each task's episodes, and their z (n_train, E, l), (n_test, E, l).

    Every task and episode is one batch, with one z for a whole episode (Algorithm 2: a new one in every pass). Contexts
    and initial states are the same at every evaluation.
    """
    e, device = args.eval_episodes, world.train_rows.device
    generator = torch.Generator(device).manual_seed(args.seed)
    contexts = []
    for rows in (world.train_rows, world.test_rows):
        index = torch.randint(rows.shape[1], (len(rows), e * args.context_size, 1), generator=generator, device=device)
        drawn = rows.take_along_dim(index, 1).view(len(rows) * e, args.context_size, -1)
        contexts.append(context_of(drawn, world.split, args))
    z = agent.encoder(torch.cat(contexts), generator)[0]  # (n_all x E, l)
    policy = lambda obs: agent.act(world.scaled(obs), z, generator).cpu().numpy()
    returns = world.env.returns(policy, seed=args.seed).reshape(-1, e)
    n, each = len(world.train_rows), z.view(-1, e, args.latent).cpu()
    return returns[:n], returns[n:], each[:n], each[n:]


def separation(z):
    """ESR and RMS of FOCAL's Table 1 over all pairs of embeddings of different tasks; z (n, E, l). Also a task's
    variance over its contexts, mean over tasks and dimensions (of training tasks FOCAL++'s Table 2)."""
    n, e, latent = z.shape
    flat, task = z.flatten(0, 1), torch.arange(n).repeat_interleave(e)
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")[task[:, None] != task[None]]
    far = math.sqrt(2 * latent / 3)  # root mean square distance of two uniform points of (-1, 1)^l
    esr, rms = (distance > far).double().mean().item(), (distance.square().mean() / latent).sqrt().item()
    return esr, rms, z.var(1, correction=0).mean().item() * e / max(1, e - 1)  # unbiased; 0 of one context


def summarise(train, test, z_train, z_test):
    """What an evaluation found, as columns of metrics.csv."""
    row = data.describe_returns(test) | data.describe_returns(train, "train_")
    row["esr"], row["rms"], row["variance"] = separation(z_test)
    row["train_esr"], row["train_rms"], row["train_variance"] = separation(z_train)
    return row


# =========================================================================================================== 7. main
def train(args, run, kind=Agent):
    world = World(args, run.device)
    torch.manual_seed(args.seed)
    agent = kind(args, Batches(args, world.train_rows, world.split))
    run.begin(agent, world)
    learn, learn_settled = run.graph(agent.update), run.graph(lambda: agent.update(encoder_learns=False))
    for step in run.steps(args.steps):
        if step == args.encoder_steps + 1:
            agent.settle()
        learn() if step <= args.encoder_steps else learn_settled()
        if run.due(step):
            result = evaluate(args, agent, world)
            row = summarise(*result)
            data.plot(run, "embeddings", world.env, *result[2:])
            run.log(row, f"train {row['train_return_mean']:.2f}  ESR {row['train_esr']:.2f} (test {row['esr']:.2f})")
    run.end()


def main(argv=None):
    data.start(train, parse_args, argv)


if __name__ == "__main__":
    main()
