"""MerPO: model-based offline meta-RL with regularised policy optimisation (Lin et al.; ICLR 2022; arXiv:2202.02929).

Given datasets D_n of training tasks (Algorithm 2; numbers in brackets are the paper's equations):
    stage 1, repeat: draw tasks; theta_n <- h steps on -log T_theta(s', r | s, a) + eta |theta_n - phi_m|^2 from
        phi_m (3, but for the sign of its log T); phi_m <- phi_m - xi_1 (phi_m - mean theta_n)     the meta-model
    adapt every task's models from phi_m (4); the best 5 of 7 by held-out error are kept
    stage 2, repeat: draw tasks; policies start from pi_c, critics from Q_meta, slow targets from Q_meta's; J times RAC:
            roll the models out from states of D_n, actions of pi_n, into D_model             (Algorithm 1)
            Q_n  <- conservative evaluation on D_n and D_model (1)      beta rises where Q(rho) - Q(D) is large
            pi_n <- ascend Q_n + lambda alpha log pi_n(data) - lambda (1 - alpha) KL(pi_n || pi_c) (9)
            lambda rises where pi_n is far from the behaviour and from pi_c
        with --adaptive alpha_n by (11); pi_c <- descend lambda (1 - alpha) KL(pi_n || pi_c) (10)
        Q_meta's weights <- mean of the Q_n's, its slow target's <- mean of theirs
A new task adapts its models and runs RAC from pi_c and Q_meta on its own data, 100 steps in the paper.

    python merpo.py --env point-robot-wind    # no GPU, 25 minutes: the meta-policy -7.9, adapted -5.9 (data -7.70)

Where we differ from the paper:
- There are seven meta-models, on bootstrapped data, not one; each of a task's five makes a fifth of its rollouts (the
  paper draws a model for each). Task batches are Table 2's, in both stages; Algorithm 2 has all tasks.
- A policy fitted to each task's data is pi_beta in lambda's rule and (11), where the paper does not say what is.
- xi_q is 1: with Table 2's 1e-3 a weight of Q_meta moves 1e-5 an iteration. Table 2's outer critic lr is not used.
- Observations are standardised, for the models also rewards and changes of observations. Goals give dense rewards.
Where it is silent, or says two things:
- Entropy, of a fixed temperature, is in the critic's target (A.2.1), not in (9) (`--actor-entropy`: there too).
- In (1) E_rho is over fresh actions of pi_n at states where D_model's transitions begin (H = 1: states of D_n). D_model
  is never emptied: d_f holds what earlier policies did, too. Rollouts end by envs' rule. The actor ascends min Q.
- log beta moves by its rate up or down, as by Adam if its gradient keeps its sign; lambda is clipped at ten times its
  initial value, its divergences at 10. h steps adapt a task's models in stage 1 and after it.
- With pi_n and Q_n fixed only the KL of (10) depends on pi_c: the outer step distils the task policies, with weights
  of mean 1. The paper has no number for eta, our tau, ent, actions, rollouts, rollout_buffer, steps and model_steps.
What we learned. Only the first is done at every size, the rest in small runs of many tasks (where, too, rates fall,
beta and lambda stay fixed, there is no entropy, (10) has five steps, the meta-model goes half-way to its tasks' mean):
- Q_meta needs a slow target that lasts: copied from it in each meta-iteration it is not slow, and cheetahs' Q explodes.
- beta and, in (9), lambda are shares of mean |Q| (`--relative`), whatever the scale of rewards. Lambda is 0.01, for
  two tasks 0.04 (Table 2 has more there, too); at 0.04 new speeds hardly leave pi_c and walkers end below their data.
- A new task takes 4,000 steps of 256 transitions, at falling rates, from pi_c but not held to it (alpha in (9) is 1).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import envs
from data import Count, DataError, Number, Share


# ==================================================================================================== 1. arguments
@dataclass
class Args(data.Args):
    steps: Count = 2_000  # meta-iterations of stage 2; the paper does not say how many
    eval_every: Count = 100  # iterations between evaluations
    # data
    test_trajectories: Count | None = None  # of each test task, spread over its data (Figure 10); unless given: all
    # algorithm
    hidden: Count = 300  # width of policies and critics
    layers: Count = 5  # hidden layers of policies and critics
    meta_batch_size: Count = 8  # tasks in a meta-iteration
    batch_size: Count = 256  # transitions of each task in a gradient step
    lr: Number = 1e-3  # learning rate of task critics
    actor_lr: Number = 1e-3  # learning rate of task policies
    outer_lr: Number = 1e-3  # learning rate of the meta-policy
    final_lr: Share = 1.0  # share of the rates that is left at the last meta-iteration, or test step
    outer_steps: Count = 1  # gradient steps on Eq. 10 in a meta-iteration
    meta_q_lr: Share = 1.0  # xi_q, the plain outer step of meta-Q
    inner_steps: Count = 10  # J, steps of RAC in a meta-iteration
    adapt_steps: Count = 100  # steps of RAC on a test task
    adapt_batch_size: Count = 256  # transitions of a test task in each of --adapt-steps
    adapt_lr: Number | None = None  # of a test task's networks (A.2.2, of one task: 8e-5); or --lr, --actor-lr
    tau: Share = 0.005  # rate of the slow target (the paper's tau is --threshold)
    discount: Share = 0.99  # discount factor
    ent: Number = 0.2  # temperature of the entropy in the critic's target
    alpha: Share = 0.4  # weight of the behaviour in Eq. 9; with --adaptive where it begins
    alpha_lr: Number = 1e-4  # learning rate of alpha in Eq. 11
    relative: bool = False  # beta in Eq. 1 and lambda in Eq. 9 are shares of the batch's mean |Q|, in Eq. 10 not
    beta_initial: Number = 1.0  # initial weight of the conservative term in Eq. 1
    beta_lr: Number = 1e-3  # step of log beta
    actions: Count = 10  # actions of pi_n at each state of rho in the conservative term
    threshold: Number = 5.0  # difference of Q above which beta rises
    lambda_initial: Number = 5.0  # initial weight of the regularisers in Eq. 9
    lambda_lr: Number = 1.0  # plain step of lambda
    target_divergence: Number = 0.05  # divergence above which lambda rises
    real_ratio: Share = 0.5  # f, the share of data from D_n in a batch (Figure 9a)
    rollout_length: Count = 1  # H, steps of a model rollout
    rollouts: Count = 250  # rollouts of each task before a step of RAC; rounded down to a multiple of 5
    rollout_buffer: Count = 10_000  # transitions that D_model holds
    model_hidden: Count = 256  # width of the dynamics models
    model_layers: Count = 4  # hidden layers of the models
    model_steps: Count = 2_000  # iterations of stage 1; unless given at most --steps, and 0 with --no-model
    model_lr: Number = 5e-2  # xi_1, the plain outer step of the meta-model
    model_task_lr: Number = 1e-4  # learning rate of a task's models
    model_adapt_steps: Count = 25  # h, gradient steps of a task's models in an adaptation
    eta: Number = 0.1  # weight of the proximal term in Eqs. 3 and 4
    # ablations
    adaptive: bool = False  # MerPO-Adp: alpha of each task by Eq. 11
    actor_entropy: bool = False  # the entropy in Eq. 9 too, as in SAC
    model: bool = True  # --no-model: no rollouts at all, CQL within tasks (Figure 7b)
    test_start: Literal[tuple(STARTS)] = "meta"  # where a test task begins, and towards what it is regularised
    single: Literal["combo", "combo-3", "rac"] | None = None  # one task with a fixed meta-policy (section 5.1)
    meta_policy: Path | None = None  # with --single: a run whose last policy it is; unless given: random

    MANY = "meta_batch_size model_lr outer_lr outer_steps meta_q_lr adaptive alpha_lr eta"  # flags without use for
    NEW = "test_quality test_trajectories test_start adapt_steps adapt_batch_size adapt_lr"  # --single

    def complete(self, given):
        super().complete(given)
        one_task, most = envs.family(self.env).differs == "nothing", self.rollout_buffer // self.rollout_length
        pair = f"--env {self.env} --single {self.single}: expected --single with a family of one task, and only there"
        sizes = f"--rollouts {self.rollouts}: expected {KEPT} (one for each model) to {most} (D_model's size by H)"
        data.refuse((one_task != bool(self.single), pair), (self.model and not KEPT <= self.rollouts <= most, sizes))
        idle = partial(data.refuse_idle, given)
        idle(f"{self.MANY} {self.NEW}", bool(self.single), f"--single {self.single}")
        idle("alpha", self.single in ("combo", "combo-3"), f"--single {self.single}")
        idle("meta_policy", not self.single, "many tasks")
        idle("lambda_initial lambda_lr target_divergence meta_policy", self.single == "combo", "--single combo")
        idle("real_ratio rollouts rollout_length rollout_buffer eta model_task_lr", not self.model, "--no-model")
        idle("alpha_lr", not self.adaptive, "a fixed alpha")
        idle("actor_entropy", self.ent == 0, "--ent 0")
        idle("threshold", self.beta_lr == 0, "--beta-lr 0")
        idle("target_divergence", self.lambda_lr == 0, "--lambda-lr 0")
        if "model_steps" not in given:  # without rollouts nothing asks the models
            self.model_steps = min(self.model_steps, self.steps) if self.model else 0
        self.alpha = 0.0 if self.single == "combo-3" else self.alpha
        self.real_ratio = self.real_ratio if self.model else 1.0


# --test-start (Figures 7c, 9b): whether from pi_c and Q_meta; alpha, unless that of training; whether lambda is 0
STARTS = {
    "meta": (True, None, False),
    "meta-no-init": (False, None, False),
    "behaviour": (False, 1.0, False),
    "behaviour-init": (True, 1.0, False),
    "combo": (False, None, True),
}
# Table 2 of the paper. Of families that are not in it sparse-point-robot has the wind's row, cheetah-vel the cheetah's
# but the walker's task batch.
TWO = {"meta_batch_size": 2, "lambda_initial": 100, "threshold": 10}
TABLE = {
    "sparse-point-robot": {"discount": 0.9, "threshold": 10},
    "point-robot-wind": {"discount": 0.9, "threshold": 10},
    "cheetah-vel": {"actor_lr": 5e-4, "lambda_initial": 100, "threshold": 10},
    "cheetah-fwd-back": TWO | {"actor_lr": 5e-4},
    "ant-fwd-back": TWO | {"lr": 8e-4, "actor_lr": 5e-4},
    "walker-params": {},
}
# Table 1 and A.2.1, RAC alone on one task (`--single`). On `mixed` data, which hold many gaits, RAC unlearns again.
# Stage 1 trains its models by maximum likelihood: one Adam from end to end, no proximal term; theta is phi_m.
SINGLE = {
    "hidden": 256, "layers": 4, "model_task_lr": 1e-3, "lambda_initial": 1, "eta": 0.0,
    "beta_lr": 0.0, "lambda_lr": 0.0, "quality": "medium",
    "steps": 20_000,  # of J steps of RAC: 200 episodes of 1,000, as 5.1's good meta-policy
}  # fmt: skip
TABLE |= {
    **dict.fromkeys(("halfcheetah", "hopper"), SINGLE | {"rollout_length": 5, "lr": 3e-4, "actor_lr": 1e-4}),
    "walker2d": SINGLE | {"beta_initial": 10, "lr": 1e-4, "actor_lr": 1e-5},
}
# What differs on a machine without a GPU: sizes, fewer iterations, faster slow targets and models; with many tasks one
# action at a state of rho and what the header says was learned; with one task higher rates. Chosen by test returns.
SMALL_ALL = {"hidden": 64, "layers": 3, "model_hidden": 64, "model_layers": 3, "batch_size": 64, "threads": 1}
SMALL_ALL |= {"model_task_lr": 1e-3, "tau": 0.02}
SMALL_MANY = SMALL_ALL | {"steps": 800, "actions": 1, "adapt_steps": 4_000, "final_lr": 0.1, "eval_every": 1_000}
SMALL_MANY |= {"lambda_lr": 0.0, "beta_lr": 0.0, "outer_steps": 5, "model_steps": 200, "test_start": "behaviour-init"}
SMALL_MANY |= {"relative": True, "lambda_initial": 0.01, "beta_initial": 0.01, "ent": 0.0, "model_lr": 0.5}
SMALL_SINGLE = SMALL_ALL | {"steps": 1_000, "model_steps": 400, "eval_every": 200, "lr": 1e-3, "actor_lr": 3e-4}
SMALL = dict.fromkeys(TABLE, SMALL_MANY) | dict.fromkeys(("halfcheetah", "hopper", "walker2d"), SMALL_SINGLE)
SMALL |= dict.fromkeys(("cheetah-fwd-back", "ant-fwd-back"), SMALL_MANY | {"lambda_initial": 0.04})
SMALL |= {"cheetah-vel": SMALL_MANY | {"actor_lr": 1e-3}}  # twice Table 2's cheetah


def parse_args(argv=None):
    return data.parse(Args, TABLE, SMALL, argv)


# ===================================================================================================== 2. networks
def mlp(n, d_in, hidden, layers, d_out):
    """n independent networks: (n, B, d_in) -> (n, B, d_out), with ReLU between layers."""
    sizes = [d_in, *[hidden] * layers, d_out]
    pairs = ((data.BatchedLinear(n, i, o), nn.ReLU()) for i, o in zip(sizes[:-1], sizes[1:], strict=True))
    return nn.Sequential(*(layer for pair in pairs for layer in pair))[:-1]


class Policy(nn.Module):
    """n tanh-Gaussian policies pi(a | s): (n, B, d) -> (n, B, m)."""

    def __init__(self, n, obs_dim, act_dim, hidden, layers):
        super().__init__()
        self.n = n
        self.net = mlp(n, obs_dim, hidden, layers, 2 * act_dim)

    def forward(self, s):
        """Mean and log std (..., m) before tanh, at s (..., d), read as n blocks of rows, one for each policy."""
        rows = self.net(s.reshape(self.n, -1, s.shape[-1]))
        mean, log_std = rows.view(*s.shape[:-1], -1).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)

    def log_density(self, s, a):
        """log pi(a | s) (n, B) of given actions, kept off the rim, where atanh is infinite."""
        return tanh_normal(torch.atanh(a.clamp(-0.999, 0.999)), *self(s))


def sample_tanh_gaussian(mean, log_std):
    """tanh(u), u ~ N(mean, std^2), by reparameterisation, and its log density."""
    u = mean + log_std.exp() * torch.randn_like(mean)
    return torch.tanh(u), tanh_normal(u, mean, log_std)


def tanh_normal(u, mean, log_std):
    """Log density of tanh(u), u ~ N(mean, std^2)."""
    log_normal = -0.5 * ((u - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return (log_normal - log_det).sum(-1)


class Critic(nn.Module):
    """Twin Q(s, a) of n tasks: (n, B, d), (n, B, m) -> (2, n, B)."""

    def __init__(self, n, obs_dim, act_dim, hidden, layers):
        super().__init__()
        self.net = mlp(2 * n, obs_dim + act_dim, hidden, layers, 1)

    def forward(self, s, a):
        x = torch.cat([s, a], -1).repeat_interleave(2, 0)
        return self.net(x).view(-1, 2, x.shape[1]).transpose(0, 1)


# ================================================================================================= 3. task encoder
# MerPO has none: what tells tasks apart are their dynamics models, adapted from the meta-models.
MODELS, KEPT = 7, 5  # of a task: those that learn, and the best of them
BEHAVIOUR_STEPS = 500  # gradient steps on a behaviour


class Models(nn.Module):
    """n Gaussian models T(s', r | s, a) of the standardised change of state and reward."""

    def __init__(self, n, obs_dim, act_dim, hidden, layers):
        super().__init__()
        self.net = mlp(n, obs_dim + act_dim, hidden, layers, 2 * (obs_dim + 1))

    def forward(self, x):
        """Mean and log variance (n, B, d + 1), the latter softly kept in [-8, 0.5]; x (n, B, d + m) is s, a."""
        mean, log_var = self.net(x).chunk(2, -1)
        log_var = 0.5 - F.softplus(0.5 - log_var)
        return mean, -8 + F.softplus(log_var + 8)


# ======================================================================================================= 4. losses
def model_loss(mean, log_var, target):
    """-log T of Eqs. 3 and 4 but for a constant, sum over dimensions, mean over rows: (n, B, k) -> (n,).
    `Tasks.fit_models` adds the proximal term."""
    return 0.5 * ((target - mean).square() * (-log_var).exp() + log_var).sum(-1).mean(-1)


def critic_target(r, done, q_next, log_pi_next, discount, ent):
    """B Q of Eq. 1, clipped double Q with maximum entropy; q_next (2, n, B) of the slow target at a' ~ pi_n(. | s')."""
    return r + discount * (1 - done) * (q_next.amin(0) - ent * log_pi_next)


def critic_loss(q_rho, q_data, q, y, beta):
    """Eq. 1: beta (E_rho[Q] - E_D[Q]) + 1/2 E_df[(Q - B Q)^2], summed over tasks and twins; each q (2, n, .), y (n, B),
    beta (n,)."""
    return (beta * (q_rho.mean(-1) - q_data.mean(-1)) + 0.5 * (q - y).square().mean(-1)).sum()


def actor_loss(q, log_pi_data, kl_meta, lam, alpha):
    """Minus Eq. 9: E_rho[Q] + lambda alpha E_D[log pi_n] - lambda (1 - alpha) E_rho[KL(pi_n || pi_c)]; sum over tasks;
    q (2, n, B), log_pi_data and kl_meta (n, .), lam and alpha (n,)."""
    gain = q.amin(0).mean(-1) + lam * alpha * log_pi_data.mean(-1) - lam * (1 - alpha) * kl_meta.mean(-1)
    return -gain.sum()


def gaussian_divergence(p, q):
    """KL(p || q) (...) of diagonal Gaussians before tanh, each (mean, log_std); tanh leaves it as it is."""
    (mean_p, log_p), (mean_q, log_q) = p, q
    ratio = ((mean_p - mean_q).square() + (2 * log_p).exp()) * (-2 * log_q).exp()
    return (log_q - log_p + 0.5 * ratio - 0.5).sum(-1)


def meta_policy_loss(kl_meta, lam, alpha):
    """Eq. 10 for pi_c: mean of w_n KL(pi_n || pi_c), w_n = lambda_n (1 - alpha_n) scaled to mean 1, 1 if all are 0."""
    weight = lam * (1 - alpha)
    weight = torch.where(weight.mean() > 0, weight / weight.mean(), torch.ones_like(weight))
    return (weight * kl_meta.mean(-1)).mean()


# ======================================================================================================= 5. update
# Networks of M tasks lie in one batch, a task's own side by side: models M x 7 (M x 5 kept), critics M x 2, policies M.
def by_task(networks, meta):
    """Pairs of weights: of M tasks' networks (M, k, ...), and of the k meta-networks (k, ...); k: 7, 2 or 1."""
    for own, shared in zip(networks.parameters(), meta.parameters(), strict=True):
        yield own.data.unflatten(0, (-1, len(shared))), shared.data


def start_from(meta, networks, optimiser=None):
    """Every task's network becomes the meta-network; Adam is as it was before its first step."""
    for own, shared in by_task(networks, meta):
        own.copy_(shared)
    for state in optimiser.state.values() if optimiser else ():
        for value in state.values():
            value.zero_()


def outer_step(meta, networks, rate):
    """meta <- meta - rate (meta - mean_n networks_n)."""
    for own, shared in by_task(networks, meta):
        shared.lerp_(own.mean(0), rate)


def pick(target, source, index):
    """Copies the networks `index` of `source` into `target`."""
    for a, b in zip(target.parameters(), source.parameters(), strict=True):
        a.data.copy_(b.detach().index_select(0, index))


def set_rates(args, optimisers, step, total):
    """Rates fall to --final-lr of what they were."""
    rates = {"actor": args.actor_lr, "critic": args.lr, "meta_policy": args.outer_lr}
    data.anneal(optimisers, rates, args.final_lr, step, total)


class Tasks(nn.Module):
    """What is kept of n tasks: data, models, fitted behaviour, D_model, and beta, lambda, alpha."""

    def __init__(self, args, world, rows):
        super().__init__()
        self.args, self.world = args, world
        n, count, width = rows.shape
        # the last tenth (in a random order, the same for every task and seed) is held out from the models
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(rows.device)
        self.rows, self.held_out = rows[:, order], max(1, count // 10)
        drawn = np.random.default_rng(0).integers(count - self.held_out, size=(MODELS, count - self.held_out))
        self.bootstrap = torch.from_numpy(drawn).to(rows.device)  # (7, rows): what each model sees, alike in all tasks
        self.models, self.behaviour = Models(n * KEPT, *world.model_sizes), Policy(n, *world.sizes)
        add = self.register_buffer
        add("model_rows", torch.zeros(n, args.rollout_buffer, width))
        add("model_count", torch.zeros(n, dtype=torch.long))
        add("log_beta", torch.full((n,), math.log(max(args.beta_initial, 1e-9))))
        add("lam", torch.full((n,), float(args.lambda_initial)))
        add("alpha", torch.full((n,), float(args.alpha)))
        add("errors", torch.zeros(2))  # of the models on held-out data, before and after they adapted

    def draw(self, index, size):
        """(M, size, D) rows of D_n."""
        i = torch.randint(self.rows.shape[1], (len(index), size), device=index.device)
        return self.rows[index[:, None], i]

    def imagine(self, index, rows):
        """Appends (M, R, D) to D_model of tasks (M,); the oldest make room."""
        place = self.model_count[index, None] + torch.arange(rows.shape[1], device=index.device)
        self.model_rows[index[:, None], place % self.model_rows.shape[1]] = rows
        self.model_count[index] += rows.shape[1]

    def imagined(self, index, size):
        """(M, size, D) rows of D_model."""
        held = self.model_count[index].clamp_max(self.model_rows.shape[1])
        i = (torch.rand(len(index), size, device=index.device, dtype=torch.float64) * held[:, None]).long()
        return self.model_rows[index[:, None], i]

    def fit_models(self, theta, optimiser, index):
        """h steps of Eq. 3, or 4: 7 models of each task (M,) on bootstrapped data; returns their losses (M x 7,)."""
        task = index.repeat_interleave(MODELS)[:, None]  # (M x 7, 1)
        model = torch.arange(MODELS, device=index.device).repeat(len(index))[:, None]  # which of the 7
        phi = [p.detach().clone() for p in theta.parameters()]  # where they start
        for _ in range(self.args.model_adapt_steps):
            i = torch.randint(self.bootstrap.shape[1], (len(task), self.args.batch_size), device=index.device)
            x, target = self.world.model_data(self.rows[task, self.bootstrap[model, i]])
            loss = model_loss(*theta(x), target)
            data.gradients([optimiser], loss.sum())
            # the gradient of eta |theta - phi|^2, added by hand: fewer operations
            away = torch._foreach_sub([p.data for p in theta.parameters()], phi)
            torch._foreach_add_([p.grad for p in theta.parameters()], away, alpha=2 * self.args.eta)
            optimiser.step()
        return loss.detach()

    @torch.no_grad()
    def held_out_error(self, theta):
        """Mean squared error of predicted means on held-out rows, (n, 7)."""
        x, target = self.world.model_data(self.rows[:, -self.held_out :].repeat_interleave(MODELS, 0))
        return (theta(x)[0] - target).square().mean((1, 2)).view(-1, MODELS)

    def adapt(self, meta_model):
        """Line 8 of Algorithm 2: every task's models adapt (Eq. 4), the best are kept, and its behaviour is fitted."""
        args, index = self.args, torch.arange(len(self.rows), device=self.rows.device)
        theta = Models(len(index) * MODELS, *self.world.model_sizes).to(index.device)
        optimiser = data.adam(theta, args.model_task_lr)
        start_from(meta_model, theta)
        before = self.held_out_error(theta)
        if args.model and not args.single:  # of one task they are trained whole in stage 1
            self.fit_models(theta, optimiser, index)
        after = self.held_out_error(theta)
        pick(self.models, theta, (after.argsort(1)[:, :KEPT] + index[:, None] * MODELS).flatten())
        self.errors.copy_(torch.stack([before.mean(), after.mean()]))
        optimiser = data.adam(self.behaviour, 1e-3)
        for _ in range(BEHAVIOUR_STEPS):
            s, a = self.draw(index, args.batch_size).split(self.world.split, -1)[:2]
            data.descend(optimiser, -self.behaviour.log_density(s, a).mean(-1).sum())


class RAC(nn.Module):
    """Algorithm 1, the meta-regularised model-based actor-critic, for M tasks at once: policies, critics, targets."""

    def __init__(self, args, world, tasks, count, combo):
        super().__init__()
        self.args, self.world, self.tasks, self.combo = args, world, tasks, combo  # combo: lambda = 0
        self.actor, self.critic = Policy(count, *world.sizes), Critic(count, *world.sizes)
        self.target = Critic(count, *world.sizes)
        self.target.load_state_dict(self.critic.state_dict())
        self.models, self.behaviour = Models(count * KEPT, *world.model_sizes), Policy(count, *world.sizes)
        self.to(world.mean.device)
        self.optimisers = {"actor": data.adam(self.actor, args.actor_lr), "critic": data.adam(self.critic, args.lr)}

    def take_up(self, index):
        """From now on it is on tasks (M,), with their models and behaviour."""
        self.index = index
        kept = index[:, None] * KEPT + torch.arange(KEPT, device=index.device)
        pick(self.models, self.tasks.models, kept.flatten())
        pick(self.behaviour, self.tasks.behaviour, index)

    def start(self, meta_policy, meta_q, meta_target):
        """Policies, critics and their slow targets start from the meta-policy, meta-Q and its slow target."""
        start_from(meta_policy, self.actor, self.optimisers["actor"])
        start_from(meta_q, self.critic, self.optimisers["critic"])
        start_from(meta_target, self.target)

    def step(self, meta_policy):
        """Lines 3 to 5 of Algorithm 1, 12 to 14 of Algorithm 2; returns what is worth recording."""
        args, tasks, index = self.args, self.tasks, self.index
        if args.model:
            tasks.imagine(index, self.roll_out(tasks.draw(index, args.rollouts)))
        real = tasks.draw(index, args.batch_size)
        rho = tasks.imagined(index, args.batch_size) if args.model else real
        count = round(args.real_ratio * args.batch_size)
        d_f = torch.cat([real[:, :count], rho[:, : args.batch_size - count]], 1)  # f of D_n and 1 - f of D_model
        s_data, a_data = real.split(self.world.split, -1)[:2]
        s_rho = rho.split(self.world.split, -1)[0]
        log = self.evaluate_policy(s_rho, s_data, a_data, d_f)
        return log | self.improve_policy(s_rho, s_data, a_data, meta_policy)

    @torch.no_grad()
    def roll_out(self, rows):
        """H steps of the models from the states of rows (M, R, D): (M, R H, D); each model makes an equal share."""
        world, count, each = self.world, len(rows), rows.shape[1] // KEPT
        start = rows[:, : each * KEPT].split(world.split, -1)[0]
        s, made = start, []
        for _ in range(self.args.rollout_length):
            a, _ = sample_tanh_gaussian(*self.actor(s))
            mean, log_var = self.models(torch.cat([s, a], -1).view(count * KEPT, each, -1))
            change = (mean + (0.5 * log_var).exp() * torch.randn_like(mean)).view(count, each * KEPT, -1)
            change = change * world.change_std + world.change_mean
            s2, r = s + change[..., :-1], change[..., -1:]
            d = world.row.terminated((s2 * world.std + world.mean).flatten(0, 1)).view(*r.shape).float()
            made.append(torch.cat([s, a, r, s2, d], -1))
            s = torch.where(d > 0, start, s2)  # one that ended begins again at its start
        return torch.cat(made, 1)

    def evaluate_policy(self, s_rho, s_data, a_data, d_f):
        """Eq. 1, at states of rho with fresh actions for each, at the data, and at transitions d_f (M, B, D)."""
        args, tasks, index = self.args, self.tasks, self.index
        s, a, r, s2, done = d_f.split(self.world.split, -1)
        with torch.no_grad():
            a2, log_pi2 = sample_tanh_gaussian(*self.actor(s2))
            y = critic_target(r[..., 0], done[..., 0], self.target(s2, a2), log_pi2, args.discount, args.ent)
            a_rho, _ = sample_tanh_gaussian(*(x.repeat_interleave(args.actions, 1) for x in self.actor(s_rho)))
        parts = (s_rho.repeat_interleave(args.actions, 1), a_rho), (s_data, a_data), (s, a)
        values = self.critic(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))  # one pass for all three
        q_rho, q_data, q = values.split([part[0].shape[1] for part in parts], -1)
        gap = (q_rho.mean(-1) - q_data.mean(-1)).detach().mean(0)  # (M,)
        # appendix A.2.2, "Tune beta": up where the gap is above the threshold, else down
        log_beta = tasks.log_beta[index] + args.beta_lr * torch.sign(gap - args.threshold)
        tasks.log_beta[index] = log_beta
        loss = critic_loss(q_rho, q_data, q, y, log_beta.exp() * self.unit(q))
        data.descend(self.optimisers["critic"], loss)
        data.follow(self.target, self.critic, args.tau)
        return {"critic_loss": loss / len(gap), "q_mean": q.mean(), "q_gap": gap.mean(), "beta": log_beta.exp().mean()}

    def improve_policy(self, s_rho, s_data, a_data, meta_policy):
        """Eq. 7 in the form of Eq. 9; alpha = 0: Eq. 6 (COMBO-3), over many tasks Eq. 5; `combo`: Eq. 2 (COMBO)."""
        args, tasks, index = self.args, self.tasks, self.index
        alpha, lam = tasks.alpha[index], tasks.lam[index]
        policy = self.actor(s_rho)
        a, log_pi = sample_tanh_gaussian(*policy)
        d_meta = gaussian_divergence(policy, meta_policy(s_rho))  # pi_c stays: `descend` moves the actor alone
        q = self.critic(s_rho, a)
        weight = torch.zeros_like(lam) if self.combo else lam * self.unit(q)
        q = q - args.ent * log_pi if args.actor_entropy else q
        loss = actor_loss(q, self.actor.log_density(s_data, a_data), d_meta, weight, alpha)  # Eq. 9
        # divergences of the policy before its step
        d_behaviour, d_meta = self.from_behaviour(s_data).clamp_max(10), d_meta.detach().mean(-1).clamp_max(10)
        data.descend(self.optimisers["actor"], loss)
        # A.2.2, "Tune lambda": + lr (alpha D(pi_n, pi_beta) + (1 - alpha) D(pi_n, pi_c) - target)
        lam = lam + args.lambda_lr * (alpha * d_behaviour + (1 - alpha) * d_meta - args.target_divergence)
        lam = lam.clamp(0, 10 * args.lambda_initial)
        tasks.lam[index] = lam
        log = {"actor_loss": loss / len(lam), "lambda": lam.mean(), "alpha": alpha.mean()}
        return log | {"d_behaviour": d_behaviour.mean(), "d_meta": d_meta.mean()}

    def unit(self, q):
        """In what beta and lambda are measured (M,): 1 or, if they are relative, mean |Q|; q (2, M, B)."""
        mean = q.detach().abs().mean((0, 2))
        return mean if self.args.relative else torch.ones_like(mean)

    @torch.no_grad()
    def from_behaviour(self, s):
        """D(pi_n, pi_beta) (M,) of A.2.2 and Eq. 11: KL(pi_beta || pi_n), which Eq. 9 descends by log pi_n(data)."""
        return gaussian_divergence(self.behaviour(s), self.actor(s)).mean(-1)


class Agent(data.Learner):
    """Algorithm 2: meta-networks, RAC on the training tasks, and the test tasks. No update waits for the device."""

    METRICS = ("model_loss", "critic_loss", "actor_loss", "meta_policy_loss", "q_mean", "q_gap", "beta", "lambda")
    METRICS += ("alpha", "d_behaviour", "d_meta")

    def __init__(self, args, world):
        super().__init__()
        self.args, self.world, device = args, world, world.mean.device
        self.meta_model = Models(MODELS, *world.model_sizes)
        self.meta_policy, self.meta_q = Policy(1, *world.sizes), Critic(1, *world.sizes)
        self.meta_target = copy.deepcopy(self.meta_q)
        train_tasks, self.test_tasks = Tasks(args, world, world.train_rows), Tasks(args, world, world.test_rows)
        count = min(args.meta_batch_size, len(world.train_rows))
        self.rac = RAC(args, world, train_tasks, count, args.single == "combo")
        self.to(device)
        self.optimisers = self.rac.optimisers | {"meta_policy": data.adam(self.meta_policy, args.outer_lr)}
        # of one task theta is phi_m itself; of many it begins anew each time, and a tuple keeps it out of checkpoints
        theta = self.meta_model if args.single else Models(count * MODELS, *world.model_sizes).to(device)
        self.task_models = theta, data.adam(theta, args.model_task_lr)
        self.optimisers |= {"meta_model": self.task_models[1]} if args.single else {}

    def draw_tasks(self):
        """(M,) different training tasks."""
        return torch.rand(len(self.rac.tasks.rows), device=self.step.device).argsort()[: self.rac.actor.n]

    def learn_model(self):
        """An iteration of stage 1 (lines 3 to 6 of Algorithm 2)."""
        self.step += 1
        index, (theta, optimiser) = self.draw_tasks(), self.task_models
        if not self.args.single:
            start_from(self.meta_model, theta, optimiser)
        loss = self.rac.tasks.fit_models(theta, optimiser, index)  # line 4: Eq. 3
        outer_step(self.meta_model, theta, self.args.model_lr)  # line 6: phi_m <- phi_m - xi_1 (phi_m - mean theta_n)
        self.note(model_loss=loss.mean())
        self.record()

    def learn_policy(self):
        """A meta-iteration of stage 2 (lines 10 to 17 of Algorithm 2), its tasks all at once."""
        args, rac = self.args, self.rac
        self.step += 1
        set_rates(args, self.optimisers, self.step - args.model_steps, args.steps)
        rac.take_up(self.draw_tasks())
        if not args.single:
            rac.start(self.meta_policy, self.meta_q, self.meta_target)
        for _ in range(args.inner_steps):
            log = rac.step(self.meta_policy)
        self.note(**log)  # of the last of the J steps
        if not args.single:
            self.learn_meta()
        self.record()

    def learn_meta(self):
        """Line 17 of Algorithm 2: Eq. 10 for pi_c; then Q_meta's outer step (A.2.2). With --adaptive Eq. 11 before."""
        args, rac, tasks, index = self.args, self.rac, self.rac.tasks, self.rac.index
        draw = tasks.imagined if args.model else tasks.draw  # rho
        for i in range(args.outer_steps):
            s = draw(index, args.batch_size).split(self.world.split, -1)[0]
            kl = gaussian_divergence(rac.actor(s), self.meta_policy(s))  # pi_n stays
            if args.adaptive and i == 0:
                real = tasks.draw(index, args.batch_size).split(self.world.split, -1)[0]
                # Eq. 11: alpha <- alpha + lr (D(pi_n, pi_beta) - D(pi_n, pi_c)), in [0.1, 0.5]
                alpha = tasks.alpha[index] + args.alpha_lr * (rac.from_behaviour(real) - kl.detach().mean(-1))
                tasks.alpha[index] = alpha.clamp(0.1, 0.5)
            loss = meta_policy_loss(kl, tasks.lam[index], tasks.alpha[index])  # line 17: Eq. 10
            data.descend(self.optimisers["meta_policy"], loss)
        outer_step(self.meta_q, rac.critic, args.meta_q_lr)  # Q_meta <- Q_meta - xi_q (Q_meta - mean_n Q_n)
        outer_step(self.meta_target, rac.target, args.meta_q_lr)
        self.note(meta_policy_loss=loss)


# ========================================================================================== 6. data and evaluation
def pack(dataset, tasks, rows, mean, std):
    """(n, N, D), of these rows (N,) of tasks (n,): s, a, r, s', d; observations standardised."""
    s, s2 = ((obs[tasks][:, rows] - mean) / std for obs in (dataset.observations, dataset.next_observations))
    r, d = (column[tasks][:, rows, None] for column in (dataset.rewards, dataset.terminals))
    return torch.cat([s, dataset.actions[tasks][:, rows], r, s2, d], -1)


def choose_rows(dataset, trajectories, row):
    """All rows of a task, or those of so many `trajectories` of the family's length, spread over them."""
    rows, length = torch.arange(dataset.rewards.shape[1]), row.data_horizon
    if trajectories is not None:
        if len(rows) % length or len(rows) < trajectories * length:
            found = f"{trajectories} of {length} steps each, of the {len(rows)} rows of a task"
            raise DataError(f"--test-trajectories: expected whole ones that are there, found {found}")
        parts = rows.unflatten(0, (-1, length))  # the middle of as many equal parts: mixed data begin with the worst
        rows = parts[((torch.arange(trajectories) + 0.5) * len(parts) / trajectories).long()].flatten()
    return rows


class World(data.World):
    """The data of every task as packed rows, their statistics, and sub-environments for the evaluation."""

    def __init__(self, args, device):
        train, test = data.open_datasets(args, device)
        row, e = envs.family(args.env), args.eval_episodes
        if args.single and len(train.train_tasks) > 1:
            raise DataError(f"--single: expected data of one training task, found {len(train.train_tasks)}")
        d, m, self.row = row.obs_dim, row.act_dim, row
        self.split = [d, m, 1, d, 1]
        self.sizes, self.model_sizes = (d, m, args.hidden, args.layers), (d, m, args.model_hidden, args.model_layers)
        rows, test_rows = choose_rows(train, None, row), choose_rows(test, args.test_trajectories, row)
        self.mean, self.std = data.standardisation(train.observations[train.train_tasks][:, rows])
        self.train_rows = pack(train, train.train_tasks, rows, self.mean, self.std)
        self.test_rows = pack(test, test.test_tasks, test_rows, self.mean, self.std)
        s, _, r, s2, _ = self.train_rows.split(self.split, -1)
        self.change_mean, self.change_std = data.standardisation(torch.cat([s2 - s, r], -1))
        self.env = envs.make(args.env, test.tasks[test.test_tasks].repeat(e, axis=0), seed=args.seed)
        self.know(train, test)

    def model_data(self, rows):
        """Inputs (.., d + m) and standardised targets (.., d + 1) of the models, from rows (.., D)."""
        s, a, r, s2, _ = rows.split(self.split, -1)
        return torch.cat([s, a], -1), (torch.cat([s2 - s, r], -1) - self.change_mean) / self.change_std


@torch.no_grad()
def play(args, policy, world):
    """Undiscounted returns (n_test, E) of the policies' means; `policy` has one network, or one for each test task."""
    act = lambda obs: torch.tanh(policy(world.scaled(obs))[0]).cpu().numpy()
    return world.env.returns(act, seed=args.seed).reshape(-1, args.eval_episodes)


def evaluate(args, agent, world):
    """Every test task adapts, all as one batch, by RAC on its own data (--test-start); then its policy is scored.

    Returns {0: returns (n_test, E) of the meta-policy, --adapt-steps: of the adapted policies}, or with --single, where
    nothing adapts, {0: of the meta-policy, 1: of the policy}. Draws are the same each time, none is the run's.
    """
    returns, device = {0: play(args, agent.meta_policy, world)}, world.mean.device
    if args.single:
        return returns | {1: play(args, agent.rac.actor, world)}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(args.seed)
        rac = begin_test(args, agent, world)
        for step in range(1, args.adapt_steps + 1):
            set_rates(rac.args, rac.optimisers, torch.tensor(step, device=device), args.adapt_steps)
            rac.step(agent.meta_policy)
        return returns | {args.adapt_steps: play(args, rac.actor, world)}


def begin_test(args, agent, world):
    """RAC on the test tasks before its first step (--test-start); beta, lambda, alpha are the training tasks' means."""
    tasks, trained, n = agent.test_tasks, agent.rac.tasks, len(world.test_rows)
    initialise, alpha, combo = STARTS[args.test_start]
    args = copy.copy(args)
    args.batch_size = args.adapt_batch_size
    if args.adapt_lr is not None:
        args.lr = args.actor_lr = args.adapt_lr
    rac = RAC(args, world, tasks, n, combo)
    tasks.model_count.zero_()
    for name in ("log_beta", "lam", "alpha"):
        getattr(tasks, name).copy_(getattr(trained, name).mean())
    if alpha is not None:
        tasks.alpha.fill_(alpha)
    rac.take_up(torch.arange(n, device=world.mean.device))
    if initialise:
        rac.start(agent.meta_policy, agent.meta_q, agent.meta_target)
    return rac


def summarise(agent, returns):
    """Columns of metrics.csv: returns after and before adaptation, models' errors; stage 1 has no `returns`."""
    adapted, meta = (returns[max(returns)], returns[0]) if returns else [np.full((1, 1), math.nan)] * 2
    row = data.describe_returns(adapted) | {"meta_return_mean": meta.mean()}
    before, after = agent.test_tasks.errors.tolist() if returns else (math.nan, math.nan)
    return row | {"error_before": before, "error_after": after}


# =========================================================================================================== 7. main
def load_policy(args, policy, world):
    """The last policy of another run with --single is the meta-policy. If that learned from other data, its first layer
    is made to take observations that are standardised as here."""
    wrong = f"not a run of {args.env} with --single and the same sizes"
    with data.believing(args.meta_policy, wrong, "--meta-policy: expected one"), torch.no_grad():
        checkpoint = data.read(args.meta_policy / "checkpoint.pt", world.mean.device)
        policy.load_state_dict({key: checkpoint["agent"][f"rac.actor.{key}"] for key in policy.state_dict()})
        mean, std = checkpoint["standardisation"]
        if checkpoint["args"]["env"] != args.env:
            raise ValueError
        first = policy.net[0]  # what it saw: (world.std s + world.mean - mean) / std
        first.bias += (world.mean - mean) / std @ first.weight
        first.weight *= (world.std / std)[:, None]


def train(args, run):
    world = World(args, run.device)
    torch.manual_seed(args.seed)
    agent = Agent(args, world)
    if args.meta_policy:
        load_policy(args, agent.meta_policy, world)
    run.begin(agent, world)
    adapted = "policy" if args.single else f"test tasks after {args.adapt_steps} steps of RAC"
    run.unit, run.curve = "iterations of both stages", {"meta_": "the meta-policy itself", "": adapted}
    learn_model, learn_policy = run.graph(agent.learn_model), run.graph(agent.learn_policy)
    for step in run.steps(args.model_steps + args.steps, args.model_steps):
        if step == args.model_steps + 1:
            for tasks in (agent.rac.tasks, agent.test_tasks):
                tasks.adapt(agent.meta_model)
        learn_model() if step <= args.model_steps else learn_policy()
        if run.due(step):
            returns = evaluate(args, agent, world) if step > args.model_steps else {}
            row = summarise(agent, returns)
            run.log(row, f"stage 2  meta-policy {row['meta_return_mean']:.2f}" if returns else "stage 1")
    run.end()


def main(argv=None):
    data.start(train, parse_args, argv)


if __name__ == "__main__":
    main()
