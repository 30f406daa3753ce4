"""SMAC: offline meta-reinforcement learning with online self-supervision (Pong et al.; ICML 2022; arXiv:2107.03974).

Given datasets D_i of training tasks T_i (Algorithm 1; numbers in brackets are the paper's equations):
    offline, repeat: draw tasks; for each task, two histories h, h' from D_i
        z ~ q_phi(z | h), the product of one Gaussian for each (s, a, r) of h
        phi   <- descend the error of the decoded rewards of h' + KL(q || N(0, I)) (3): encoder and decoder
        theta <- ascend log pi(a | s, z), weighted by exp(advantage / lambda) (2)  AWAC; weights and z are detached
        w     <- descend the Bellman error on h' given z (1)                      no entropy; z is detached
    self-supervised, repeat: roll out pi(. | s, z), z from the prior, in a training task, without any reward
        label the trajectory by the decoder (4) with z ~ q_phi of an OFFLINE history of D_i; append it to D_i
        w, theta as above, the actor also by PEARL's loss; h and h' now hold the labelled trajectories too
At meta-test time, with rewards, it explores two episodes with z from the prior, then acts on a z of the posterior.

    python smac.py --env cheetah-vel    # on a CPU: data 59 core-minutes, then 12; -128 (three seeds: -118; data -208)

Where we differ from the paper:
- The paper's data are the buffers of one PEARL run (benchmark/pearl.py makes such), sawyer's a script's, as here. Ours
  are the last rows of the early replay of one SAC agent for each task (point robots: the first); at small sizes, on
  MuJoCo, of half-trained policies, in two-task families of those of all stages. A context h is of the last 400 of these
  rows and of what is collected (sawyer, small two-task: of all rows); the paper's, of a buffer of exploration's alone.
- Exploration samples actions in training; at meta-test it takes tanh of the Gaussian's mean. (1) has no d; in ours
  nothing follows where d is 1, which the simulator tells online too. Q is the lower of twins; log std is in [-5, 2].
- Algorithm 1's line 8 draws any D_i to label by; here it is that of the task rolled out (`--online-tasks test`: a
  random one), as dynamics may differ. Lines 7 to 9 collect `online_envs` trajectories at once, then their updates
  follow. z is drawn once an episode (`--z-every step`: line 7's z_t). The oracle is this script with true rewards
  online, where encoder and decoder go on learning; the paper's is PEARL. `--actor bc` has no PEARL loss online.
- A bare exp in (2) overflows: the weights are N softmax(advantage / lambda) over the meta-batch; V at s, not s'.
- Observations are standardised and kept within ten standard deviations: half-trained humanoids hold a knee still (std
  0.02), so that a bent one lay 130 of them out, and labels and Q went far too high.
- Contexts hold the rewards that are learned from, dense ones on the sparse point robot.
What we learned: q collapses to the prior where the decoder can tell the task from states (data of two tasks, each of
its own policy) and where rewards hardly depend on it (humanoids); on goals an agent's own paths say little of the task.
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
from data import Count, Number, Positive, Share, Whole


# ==================================================================================================== 1. arguments
@dataclass
class Args(data.Args):
    steps: Whole = 50_000  # gradient steps of the offline phase
    eval_episodes: Count = 1  # meta-episodes of each task in an evaluation
    quality: Literal[data.QUALITIES] = "replay"
    # data
    train_tasks: Count | None = None  # number of training tasks; unless given: the family's
    test_tasks: Count | None = None  # number of test tasks; unless given: the family's
    data_size: Count = 1600  # transitions of each task
    data_until: Count | None = None  # row of the dataset after which they end; unless given: the last
    context_data: Count = 400  # how many of them, the last ones, contexts are drawn from
    # algorithm
    hidden: Count = 300  # width of the actor and the critics
    meta_batch_size: Count = 4  # tasks in a gradient step
    batch_size: Count = 256  # transitions of each task in a gradient step
    context_size: Count = 64  # transitions in a context
    lr: Number = 3e-4  # learning rate of every network
    final_lr: Share = 1.0  # share of --lr that is left at the run's last step; it falls linearly
    tau: Share = 0.005  # rate of the slow target
    discount: Share = 0.99  # discount factor
    reward_scale: Number = 5.0  # multiplies rewards in the critic's target only
    obs_bound: Positive = 10.0  # observations are kept within so many standard deviations
    latent: Count = 5  # size l of z
    encoder_hidden: Count = 200  # width of the task encoder
    kl_weight: Number = 1 / 256  # weight of the KL in Eq. 3, whose error is a sum over 256 rows, here a mean
    awac_lambda: Positive = 100.0  # temperature lambda of Eq. 2
    pearl_weight: Number = 1.0  # lambda_pearl, of PEARL's actor loss in the online phase
    online_steps: Whole = 250_000  # environment steps of the online phase (the paper: no number), in whole rounds
    online_envs: Count = 25  # trajectories collected side by side
    updates: Positive = 4.0  # gradient steps for each environment step of the online phase
    # ablations
    encoder_loss: Literal["reward", "q", "reward+q"] = "reward"  # trains the encoder; online without rewards q alone
    actor: Literal["awac", "sac", "bc"] = "awac"  # sac, bc: the paper's ablations
    online_rewards: Literal["decoder", "oracle", "none"] = "decoder"  # none: no online phase
    online_tasks: Literal["train", "test"] = "train"  # where trajectories are collected (Figure 9)
    online_contexts: Literal["all", "offline"] = "all"  # rows that contexts come from in the online phase
    z_every: Literal["episode", "step"] = "episode"  # when exploration draws z from the prior

    GROWS = ()  # not even --steps can: the online phase begins after them
    ONE_FILE = (*data.Args.ONE_FILE, "train_tasks", "test_tasks")
    ELSEWHERE = (*data.Args.ELSEWHERE, "exact")

    def complete(self, given):
        super().complete(given)
        self.exact = [key for key in ("data_size", "data_until") if key in given]  # where rows are fewer: refused
        idle, none = partial(data.refuse_idle, given), self.online_rewards == "none"
        idle("online_steps", none and self.online_steps > 0, "--online-rewards none")
        self.online_steps = 0 if none else self.online_steps
        without = "--online-rewards none" if none else "--online-steps 0"
        idle("online_envs updates online_tasks online_contexts pearl_weight", self.online_steps == 0, without)
        idle("online_rewards", not none and self.online_steps == 0, without)
        idle("awac_lambda pearl_weight", self.actor != "awac", f"--actor {self.actor}")
        if self.steps == 0 and (self.online_steps == 0 or self.online_rewards == "decoder"):
            expected = "more, or --online-rewards oracle and an online phase"
            raise data.DataError(f"--steps 0: nothing learns, or no decoder that could label; expected {expected}")


# Table 2 of the paper (the sizes of its datasets: transitions of each training task; its "AWR beta" is Eq. 2's lambda).
# On cheetah-vel the encoder's buffer stays offline (appendix C.2; RL's there is the first 1,200 rows, here all).
# What is not here is as in Args: Table 1, and of Table 2 the cheetah's column. So it is in families that are not in the
# paper, but point robots have a discount for their shorter horizon, a larger scale for their smaller rewards, and the
# replay's first rows (at its end SAC is an expert). Sawyer has one buffer for contexts and RL, and its script's data.
POINT = {"data_until": 1600, "discount": 0.9, "reward_scale": 100}
TWO = {"meta_batch_size": 2, "eval_episodes": 8}  # a mean over two test tasks needs more episodes of each
SAWYER = {"quality": "mixed", "data_size": 3750, "context_data": 3750, "reward_scale": 1}
SAWYER |= {"awac_lambda": 0.3, "pearl_weight": 0}
TABLE = {
    "sparse-point-robot": POINT,
    "point-robot-wind": POINT,
    "cheetah-vel": {"train_tasks": 100, "test_tasks": 30, "online_contexts": "offline"},
    "cheetah-fwd-back": TWO,
    "ant-fwd-back": TWO,
    "ant-dir": {"train_tasks": 100, "test_tasks": 20},
    "walker-params": {"data_size": 1200, "train_tasks": 50, "test_tasks": 5},
    "hopper-params": {"data_size": 1200},
    "humanoid-dir": {"data_size": 1200},
    "sawyer": SAWYER,
}
# What differs on a machine without a GPU; tasks are as many as the family's. (In batches of 128 kl_weight gives the KL
# half of Eq. 3's weight, on sawyer a sixteenth: chosen, as its discount, tau, cheetah-vel's contexts, on seed 0.)
SMALL_NETWORKS = {"hidden": 128, "encoder_hidden": 64, "batch_size": 128, "tau": 0.01, "lr": 1e-3, "final_lr": 0.1}
SMALL_NETWORKS |= {"threads": 1, "train_tasks": None, "test_tasks": None}
SMALL_POINT = SMALL_NETWORKS | {"hidden": 64, "steps": 6_000, "eval_every": 2_000, "eval_episodes": 4}
SMALL_POINT |= {"online_steps": 40_000, "updates": 0.2}
SMALL_MUJOCO = SMALL_NETWORKS | {"steps": 10_000, "online_steps": 60_000, "updates": 0.33, "eval_every": 5_000}
SMALL_MUJOCO |= {"quality": "medium", "online_contexts": "all"}
# Each of two tasks' half-trained policies visits states of its own, by which the decoder knows the task: z would go to
# the prior. So they have mixed data.
SMALL_TWO = SMALL_MUJOCO | {"quality": "mixed", "data_size": 10_000, "data_until": 10_000, "context_data": 10_000}
SMALL_SAWYER = SMALL_MUJOCO | {"quality": "mixed", "steps": 8_000, "online_steps": 40_000, "eval_every": 4_000}
SMALL_SAWYER |= {"discount": 0.95, "tau": 0.02, "kl_weight": 0.0005, "eval_episodes": 2}
SMALL = dict.fromkeys(TABLE, SMALL_MUJOCO) | {
    "sparse-point-robot": SMALL_POINT,
    "point-robot-wind": SMALL_POINT,
    "cheetah-fwd-back": SMALL_TWO,
    "ant-fwd-back": SMALL_TWO,
    "sawyer": SMALL_SAWYER,
}


def parse_args(argv=None):
    return data.parse(Args, TABLE, SMALL, argv)


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
        mean, log_std = self.net(torch.cat([s, z], -1)).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)


def sample_tanh_gaussian(mean, log_std):
    """tanh(u), u ~ N(mean, std^2), by reparameterisation, and its log density."""
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    return torch.tanh(u), log_density(u, noise, log_std)


def log_density(u, noise, log_std):
    """Of tanh(u), u = mean + std noise, summed over the last axis."""
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return (log_normal - log_det).sum(-1)


def gaussian_kl(mean, variance):
    """KL(N(mean, variance), N(0, I)), summed over the last axis."""
    return 0.5 * (variance + mean.square() - 1 - variance.log()).sum(-1)


class Critic(nn.Module):
    """Q(s, a, z), two of them as one batch, of rows (N, d): (2, N)."""

    def __init__(self, obs_dim, latent, act_dim, hidden):
        super().__init__()
        self.net = mlp(obs_dim + latent + act_dim, hidden, 1, partial(data.BatchedLinear, 2))

    def forward(self, s, z, a):
        x = torch.cat([s, z, a], -1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


class Decoder(nn.Module):
    """r(s, a, z), two hidden layers: (..., d) -> (...)."""

    def __init__(self, obs_dim, latent, act_dim, hidden=64):
        super().__init__()
        layers = [nn.Linear(obs_dim + act_dim + latent, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def forward(self, s, z, a):
        return self.net(torch.cat([s, a, z], -1)).squeeze(-1)


# ================================================================================================= 3. task encoder
class Encoder(nn.Module):
    """q_phi(z | h): the product of one Gaussian factor for each (s, a, r), the first columns of a row of h."""

    def __init__(self, d_in, hidden, latent):
        super().__init__()
        self.d_in, self.net = d_in, mlp(d_in, hidden, 2 * latent)

    def forward(self, history, counted=None):
        """Mean and variance (M, l) of the posterior of rows (M, B, D); `counted` (M, B) is 0 for those to leave out."""
        mean, spread = self.net(history[..., : self.d_in]).chunk(2, -1)
        precision = 1 / F.softplus(spread).clamp_min(1e-4).square()  # softplus gives the standard deviation
        precision = precision if counted is None else precision * counted[..., None]
        # prod_b N(mu_b, sigma_b^2) is a Gaussian of precision sum_b 1 / sigma_b^2
        variance = 1 / precision.sum(1)
        return variance * (precision * mean).sum(1), variance


def sample(mean, variance):
    """z by reparameterisation."""
    return mean + variance.sqrt() * torch.randn_like(mean)


# ======================================================================================================= 4. losses
def reward_loss(r, decoded):
    """Eq. 3's sum over h (Algorithm 1 and here: h') as a mean: (r - r_phi_d(s, a, z))^2, r and decoded (N,)."""
    return (r - decoded).square().mean()


def critic_target(r, done, q_next, reward_scale, discount):
    """y of Eq. 1, without entropy; q_next (2, N) of the slow target at a' ~ pi(. | s', z)."""
    # reward_scale r + gamma (1 - done) min Qbar(s', a', z), the lower of twins, where Eq. 1 has one Q
    return reward_scale * r + discount * (1 - done) * q_next.amin(0)


def critic_loss(q, y):
    """Eq. 1: (Q(s, a, z) - y)^2, mean over rows, sum over the twins; q (2, N), y (N,)."""
    return (q - y).square().mean(1).sum()


def awac_loss(log_pi, q_data, q_pi, temperature):
    """Eq. 2, V at s for its s': -log pi(a | s, z) exp((Q(s, a, z) - V(s, z)) / lambda); log_pi (N,), q (2, N).

    V by one sample. The exponentials are divided by their mean over the N rows, lest they overflow, and are detached.
    """
    advantage = (q_data.amin(0) - q_pi.amin(0)).detach()
    weight = len(advantage) * torch.softmax(advantage / temperature, 0)
    return -(log_pi * weight).mean()


def pearl_loss(log_pi, q_pi):
    """PEARL's actor loss, C.3's KL without log Z: log pi(a|s, z) - min Q(s, a, z), a ~ pi; log_pi (N,), q_pi (2, N)."""
    return (log_pi - q_pi.amin(0)).mean()


# ======================================================================================================= 5. update
class Replay(nn.Module):
    """The buffers D_i: every task's offline rows s, a, r, s', d (1: the MDP ended), then those collected online."""

    def __init__(self, args, world):
        super().__init__()
        self.context_data, self.split = args.context_data, world.split
        n, count, _ = world.train_rows.shape
        joining = np.bincount(world.buffers.ravel(), minlength=n)  # trajectories that are to join each buffer
        space, others = int(joining.max()) * world.row.horizon, len(joining) - n  # empty at first: test tasks' (oracle)
        self.register_buffer("rows", F.pad(world.train_rows, (0, 0, 0, space, 0, others)))
        self.register_buffer("offline", torch.tensor([count] * n + [0] * others))  # how many rows are offline data
        self.register_buffer("filled", self.offline.clone())  # how many there are

    def append(self, task, rows):
        """Trajectories (E, H, D) to the ends of the buffers of tasks (E,)."""
        earlier = (task[:, None] == task[None]).tril(-1).sum(1)  # trajectories of the same task before this one
        place = (self.filled[task] + earlier * rows.shape[1])[:, None] + torch.arange(rows.shape[1], device=task.device)
        self.rows[task[:, None], place] = rows
        self.filled.index_add_(0, task, torch.full_like(task, rows.shape[1]))

    def tasks(self, m):
        """m distinct tasks, of those that have data."""
        return (torch.rand(len(self.filled), device=self.rows.device) + (self.filled == 0)).argsort()[:m]

    def transitions(self, task, size):
        """s, a, r, s', d (M x size, ...) of tasks (M,), h' of Algorithm 1: drawn from all that there are."""
        rows = self._draw(task, size, torch.zeros_like(self.filled), self.filled).flatten(0, 1)
        s, a, r, s2, d = rows.split(self.split, -1)
        return s, a, r[:, 0], s2, d[:, 0]

    def histories(self, task, size, offline=False):
        """(M, size, D) rows of tasks (M,), h of Algorithm 1: from the encoder's buffer (appendix C.2), here the last
        `context_data` offline rows and what was collected; `offline`: from the former alone, where there are any."""
        last = torch.where(self.offline > 0, self.offline, self.filled) if offline else self.filled
        return self._draw(task, size, (self.offline - self.context_data).clamp_min(0), last)

    def _draw(self, task, size, first, last):
        """Drawn uniformly from the rows between first and last (n,) of each task's buffer."""
        share = torch.rand(len(task), size, device=task.device, dtype=torch.float64)
        index = (first[task, None] + share * (last - first)[task, None]).long()
        index += task[:, None] * self.rows.shape[1]
        return self.rows.view(-1, self.rows.shape[2]).index_select(0, index.flatten()).unflatten(0, index.shape)


class Agent(data.Learner):
    """Every network of the algorithm, its update, and the buffers that it learns from."""

    METRICS = ("reward_loss", "encoder_kl", "critic_loss", "actor_loss", "log_density", "q_mean")

    def __init__(self, args, world):
        super().__init__()
        self.args, self.split, self.total = args, world.split, args.steps + math.prod(rounds(args))  # gradient steps
        obs_dim, act_dim, *_ = world.split
        sizes = obs_dim, args.latent, act_dim
        self.encoder = Encoder(obs_dim + act_dim + 1, args.encoder_hidden, args.latent)
        self.decoder = Decoder(*sizes)
        self.actor, self.critic = Actor(*sizes, args.hidden), Critic(*sizes, args.hidden)
        self.target = Critic(*sizes, args.hidden).requires_grad_(False)
        self.target.load_state_dict(self.critic.state_dict())
        # the encoder of the end of the offline phase labels, even where the encoder goes on learning (Figure 7)
        self.labeller = copy.deepcopy(self.encoder).requires_grad_(False)
        self.offline_actor = copy.deepcopy(self.actor).requires_grad_(False)  # for benchmark/shift.py to compare with
        self.replay = Replay(args, world)
        self.to(world.train_rows.device)
        learning = {"phi": nn.ModuleList([self.encoder, self.decoder]), "critic": self.critic, "actor": self.actor}
        self.optimisers = {name: data.adam(module, args.lr) for name, module in learning.items()}

    def update(self, online=False):
        """One gradient step of every network that learns. It never waits for the device."""
        args, optimisers, replay = self.args, self.optimisers, self.replay
        self.step += 1
        data.anneal(optimisers, dict.fromkeys(optimisers, args.lr), args.final_lr, self.step, self.total)  # both phases
        taught = not online or args.online_rewards == "oracle"  # true rewards teach decoder and, unless q, encoder
        by_reward, by_q = taught and "reward" in args.encoder_loss, "q" in args.encoder_loss
        # Algorithm 1, lines 3 and 4 (10 and 11 online): histories h and h' of tasks, z ~ q_phi(z | h)
        task = replay.tasks(args.meta_batch_size)
        h = replay.histories(task, args.context_size, offline=args.online_contexts == "offline")
        s, a, r, s2, d = replay.transitions(task, args.batch_size)
        mean, variance = self.encoder(h)
        kl = gaussian_kl(mean, variance).mean()
        z = sample(mean, variance).repeat_interleave(args.batch_size, 0)  # (M x B, l)
        with torch.no_grad():
            q2 = self.target(s2, z, sample_tanh_gaussian(*self.actor(s2, z))[0])
            y = critic_target(r, d, q2, args.reward_scale, args.discount)
        q = self.critic(s, z if by_q else z.detach(), a)  # the Bellman error trains the encoder only in ablations
        bellman = critic_loss(q, y)  # Eq. 1
        loss, learning = bellman, [optimisers["critic"]]
        if taught or by_q:  # phi too: encoder and decoder
            loss, learning = bellman + args.kl_weight * kl, [optimisers["phi"], optimisers["critic"]]
        if taught:
            reward = reward_loss(r, self.decoder(s, z if by_reward else z.detach(), a))
            loss = loss + reward  # Eq. 3
            self.note(reward_loss=reward)
        data.gradients(learning, loss)
        self.learn_actor(s, a, z.detach(), q.detach(), online)
        for optimiser in learning:  # only now: the actor has used the critic as it was
            optimiser.step()
        data.follow(self.target, self.critic, args.tau)
        self.note(encoder_kl=kl, critic_loss=bellman, q_mean=q.mean())
        self.record()

    def learn_actor(self, s, a, z, q, online):
        """Eq. 2, in the online phase PEARL's loss too; q (2, N) are the values of the data's actions."""
        args, (mean, log_std) = self.args, self.actor(s, z)
        u = torch.atanh(a.clamp(-1 + 1e-6, 1 - 1e-6))  # the data's actions, kept off the rim
        log_pi_data = log_density(u, (u - mean) / log_std.exp(), log_std)
        if args.actor == "bc":
            loss = -log_pi_data.mean()
        else:
            a_pi, log_pi = sample_tanh_gaussian(mean, log_std)
            q_pi = self.critic(s, z, a_pi)
            if args.actor == "sac":
                loss = pearl_loss(log_pi, q_pi)
            else:
                loss = awac_loss(log_pi_data, q, q_pi, args.awac_lambda)  # Eq. 2
                if online and args.pearl_weight > 0:
                    loss = loss + args.pearl_weight * pearl_loss(log_pi, q_pi)  # appendix C.3
        data.descend(self.optimisers["actor"], loss)  # only the policy learns from it
        self.note(actor_loss=loss, log_density=log_pi_data.mean())

    @torch.no_grad()
    def label(self, task, rows):
        """Rewards (E, H) for trajectories (E, H, D) by the buffers (E,) that they join; their own are not read (Eq. 4).

        r = r_phi_d(s, a, z), z ~ q_phi_e(z | h), h of a buffer's offline rows, one z for a trajectory.
        """
        z = sample(*self.labeller(self.replay.histories(task, self.args.context_size, offline=True)))
        s, a, *_ = rows.split(self.split, -1)
        return self.decoder(s, z[:, None].expand(-1, rows.shape[1], -1), a)

    def act(self, s, z, sampled=False):
        """The action (N, m): a sample, or tanh of the Gaussian's mean."""
        policy = self.actor(s, z)
        return sample_tanh_gaussian(*policy)[0] if sampled else torch.tanh(policy[0])


# ========================================================================================== 6. data and evaluation
def pack(dataset, tasks, scaled, part):
    """The rows of each task in the slice `part`, (n, N, D): s, a, r, s', d; observations `scaled`."""
    s, s2 = (scaled(obs[tasks, part]) for obs in (dataset.observations, dataset.next_observations))
    r, d = (column[tasks, part, None] for column in (dataset.rewards, dataset.terminals))
    return torch.cat([s, dataset.actions[tasks, part], r, s2, d], -1)


def choose_rows(args, found, exact):
    """The slice of a task's `found` rows that --data-size and --data-until ask for; where there are fewer, those not in
    `exact` (the flags that were given) ask for what there is."""
    until = args.data_until if "data_until" in exact else min(args.data_until or found, found)
    size = args.data_size if "data_size" in exact else min(args.data_size, until)
    words = f"expected {size} rows up to row {until}, found {found} rows a task"
    data.refuse((size > until or until > found, f"--data-size, --data-until: {words}"))
    return slice(until - size, until)


def data_return(dataset, tasks, part):
    """Mean return of the episodes that begin in these rows of these tasks; None if there are none."""
    task, place, total = data.episode_returns(dataset)
    row = place * (dataset.rewards.shape[1] - 1) + 0.5
    seen = np.isin(task, tasks) & (row >= part.start) & (row < part.stop)
    return float(total[seen].mean()) if seen.any() else None


class World(data.World):
    """The tasks, their offline data as packed rows, and a sub-environment for each meta-episode of an evaluation."""

    CONTEXTS = {"train_": "training tasks, online context", "": "online context", "offline_": "offline context"}

    def __init__(self, args, device):
        self.row = row = envs.family(args.env)
        self.split = [row.obs_dim, row.act_dim, 1, row.obs_dim, 1]  # widths of the parts of a row: s, a, r, s', d
        self.bound = args.obs_bound
        self.open_data(args, device)
        n, k = len(self.train_tasks), len(self.test_tasks)
        if args.meta_batch_size > n:
            raise data.DataError(f"--meta-batch-size {args.meta_batch_size}: expected at most {n}, the training tasks")
        self.seen = min(n, k)  # so many of the training tasks are evaluated
        self.tasks = np.concatenate([self.train_tasks[: self.seen], self.test_tasks])
        self.env = envs.make(args.env, self.tasks.repeat(args.eval_episodes, axis=0), seed=args.seed)
        # of every online round (R): the tasks (R, E, P) to roll out in, and the buffers (R, E) that the trajectories
        # join; in test tasks those of random training tasks or, with true rewards, buffers of their own
        self.buffers, chosen = schedule(args, n, 0), schedule(args, k, 1)
        self.online_tasks = self.test_tasks[chosen] if args.online_tasks == "test" else self.train_tasks[self.buffers]
        if args.online_tasks == "test" and args.online_rewards == "oracle":
            self.buffers = n + chosen

    def open_data(self, args, device):
        train, test = data.open_datasets(args, device, train=args.train_tasks, test=args.test_tasks)
        part = choose_rows(args, train.rewards.shape[1], args.exact)
        test_part = choose_rows(args, test.rewards.shape[1], args.exact if test is train else ())
        self.train_tasks, self.test_tasks = train.tasks[train.train_tasks], test.tasks[test.test_tasks]
        self.mean, self.std = data.standardisation(train.observations[train.train_tasks, part])
        self.train_rows = pack(train, train.train_tasks, self.scaled, part)
        self.test_rows = pack(test, test.test_tasks, self.scaled, test_part)
        self.know(train, test)
        self.behaviour = data_return(test, test.test_tasks, test_part)

    def scaled(self, obs):
        """Observations (..., d) in standard deviations from the training tasks' mean, kept within --obs-bound."""
        return super().scaled(obs).clamp(-self.bound, self.bound)


@torch.no_grad()
def play(agent, world, env, z, seed, sampled=False, anew=None):
    """One trajectory of `horizon` steps in every sub-environment, acting on z (B, l).

    Returns rows (B, H, D) with the rewards that `env` gives, whether each row is of the first episode and sound (B, H),
    the first episode's return (B,), and whether the physics never blew up (B,). Where an episode ends early the next
    begins. z is drawn anew from the prior at every `anew`, "episode" or "step"; without it, never.
    """
    device, obs = z.device, env.reset(seed=seed)[0]
    rows, counted, alive, total = [], [], np.ones(len(obs), bool), np.zeros(len(obs))
    sound = np.ones(len(obs), bool)
    for _ in range(env.horizon):
        s = world.scaled(obs)
        a = agent.act(s, z, sampled)
        following, reward, terminated, truncated, info = env.step(a.cpu().numpy())
        ended = terminated | truncated
        r, d = (torch.as_tensor(x[:, None], dtype=torch.float32, device=device) for x in (reward, terminated))
        rows.append(torch.cat([s, a, r, world.scaled(info.get("final_obs", following)), d], -1))
        counted.append(alive & ~info["blew_up"])
        total += alive * info.get("sparse_reward", reward)  # sparse-point-robot reports the sparse return
        alive &= ~ended | info["blew_up"]  # after a blow-up the steps that are left count
        sound &= ~info["blew_up"]
        if anew == "step" or (anew and ended.any()):
            new = torch.as_tensor(ended | (anew == "step"), device=device)
            z = torch.where(new[:, None], torch.randn_like(z), z)
        obs = following
    counted = torch.as_tensor(np.stack(counted, 1), device=device)
    return torch.stack(rows, 1), counted, total, torch.as_tensor(sound, device=device)


def explore(args, agent, world):
    """Two episodes in every sub-environment with z from the prior: rows (B, 2 H, D), which of them are of the two
    (B, 2 H), and the return of the first (B,)."""
    draw = lambda: torch.randn(world.env.num_envs, args.latent, device=world.mean.device)
    episodes = [play(agent, world, world.env, draw(), args.seed + i, anew=args.z_every) for i in (1, 2)]
    rows, counted, total, _ = zip(*episodes, strict=True)
    return torch.cat(rows, 1), torch.cat(counted, 1), total[0]


def posteriors(args, agent, world, rows, counted):
    """Mean and variance (B, l) of q_phi(z | h) by the prefix that their columns have in metrics.csv: "" where h is all
    that was explored, "short_" as many rows as in training (missing ones weigh 0), "offline_" of the data."""
    size, counted = args.context_size, counted.float()
    index = torch.multinomial(counted.clamp_min(1e-9), size, replacement=size > rows.shape[1])
    found = {"": agent.encoder(rows, counted)}
    found["short_"] = agent.encoder(torch.take_along_dim(rows, index[..., None], 1), counted.gather(1, index))
    if "offline_" in world.CONTEXTS:
        parts = world.train_rows[: world.seen], world.test_rows  # of test tasks there may be fewer rows
        draw = lambda x: torch.take_along_dim(x, torch.randint(x.shape[1], (len(x), size, 1), device=x.device), 1)
        own = [draw(x[:, -args.context_data :].repeat_interleave(args.eval_episodes, 0)) for x in parts]
        found["offline_"] = agent.encoder(torch.cat(own))
    return found


def columns(args, world, name, returns, kl=None):
    """What one kind of context gave, as columns of metrics.csv; returns and KLs (B,) of all sub-environments."""
    row = {}
    for prefix, part in (("train_", slice(world.seen)), ("", slice(world.seen, None))):
        own = returns.reshape(-1, args.eval_episodes)[part]  # (tasks, meta-episodes)
        row |= data.describe_returns(own, f"{prefix}{name}")
        if kl is not None:
            row[f"{prefix}{name}kl"] = kl.reshape(-1, args.eval_episodes)[part].mean()
    return row


@torch.no_grad()
def evaluate(args, agent, world):
    """Columns of metrics.csv, and the means (tasks, meta-episodes, l) of the last kind of posteriors.

    Each meta-episode of a task is a sub-environment: two episodes with z from the prior, then one on each kind of
    posterior, where the deterministic action is scored. It has random numbers of its own, from one seed each time.
    """
    with torch.random.fork_rng([world.mean.device] if world.mean.is_cuda else []):
        torch.manual_seed(args.seed)
        *explored, first = explore(args, agent, world)
        row = columns(args, world, "prior_", first)
        for name, (mean, variance) in posteriors(args, agent, world, *explored).items():
            z = sample(mean, variance)
            policy = lambda obs, z=z: agent.act(world.scaled(obs), z).cpu().numpy()
            returns = world.env.returns(policy, args.seed)
            row |= columns(args, world, name, returns, gaussian_kl(mean, variance).cpu().numpy())
    return row, mean.view(-1, args.eval_episodes, args.latent).cpu()


# ------------------------------------------------------------------------------- the online phase, lines 6 to 9
def rounds(args):
    """How many rounds the online phase has, and how many gradient steps each of them."""
    steps = args.online_envs * envs.family(args.env).horizon  # in the environments
    return math.ceil(args.online_steps / steps), max(1, round(args.updates * steps))


def schedule(args, n, stream):
    """(R, E) tasks below n: a random order of all, then another one, and so on."""
    wanted = rounds(args)[0] * args.online_envs
    orders = [np.random.default_rng([args.seed, i, stream]).permutation(n) for i in range(wanted // n + 1)]
    return np.concatenate(orders)[:wanted].reshape(-1, args.online_envs)


@torch.no_grad()
def collect(args, agent, world, i):
    """Round i of lines 7 to 9: trajectories with z from the prior, labelled by the buffers that they join.

    Unless rewards are the oracle's, the environment here knows none.
    """
    oracle, device = args.online_rewards == "oracle", world.mean.device
    tasks, buffers = world.online_tasks[i], torch.as_tensor(world.buffers[i], device=device)
    z = torch.randn(len(tasks), args.latent, device=device)
    env, seed = envs.make(args.env, tasks, rewards=oracle), 1_000_003 * args.seed + i
    rows, _, _, sound = play(agent, world, env, z, seed, sampled=True, anew=args.z_every)
    env.close()
    buffers, rows = buffers[sound], rows[sound]  # a trajectory in which the physics blew up is dropped
    if not oracle:
        rows[..., agent.split[0] + agent.split[1]] = agent.label(buffers, rows)
    agent.replay.append(buffers, rows)


# =========================================================================================================== 7. main
def train(args, run, make_world=World):
    world = make_world(args, run.device)
    torch.manual_seed(args.seed)
    agent = Agent(args, world)
    run.curve = world.CONTEXTS
    run.begin(agent, world)
    learn, practise = run.graph(agent.update), run.graph(lambda: agent.update(online=True))
    first = range(args.steps + 1, agent.total + 1, rounds(args)[1])  # the first step of every round of the online phase
    for step in run.steps(agent.total, args.steps):
        if step <= args.steps:  # the offline phase: Algorithm 1, lines 2 to 5
            learn()
        else:  # the self-supervised phase, lines 6 to 12
            if step == first[0]:
                agent.labeller.load_state_dict(agent.encoder.state_dict())
                agent.offline_actor.load_state_dict(agent.actor.state_dict())
            if step in first:
                collect(args, agent, world, first.index(step))
            practise()
        if run.due(step):
            row, z = evaluate(args, agent, world)
            data.plot(run, "embeddings", world.env, z[: world.seen], z[world.seen :])
            row["online_steps"] = sum(start <= step for start in first) * args.online_envs * world.row.horizon
            others = [f"{label} {row[f'{key}return_mean']:.2f}" for key, label in run.curve.items() if key]
            run.log(row, "; ".join(others))
    run.end()


def main(argv=None):
    data.start(train, parse_args, argv)


if __name__ == "__main__":
    main()
