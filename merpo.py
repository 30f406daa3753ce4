"""MerPO: model-based offline meta-RL with regularised policy optimisation (Lin et al.; ICLR 2022; arXiv:2202.02929).

Given datasets D_n of training tasks (Algorithm 2; numbers in brackets are the paper's equations):
    stage 1, repeat: draw tasks; theta_n <- h steps on -log T_theta(s', r | s, a) + eta |theta_n - phi|^2 from phi (3)
        phi <- phi - xi (phi - mean theta_n)                            the meta-model; -log T, where (3) has log T
    adapt every task's models from phi (4); the best 5 of 7 by held-out error are kept
    stage 2, repeat: draw tasks; their policies and critics start from the meta-policy pi_c and Q_meta; J times RAC:
        roll the models out from states of D_n, actions of pi_n, into D_model             (Algorithm 1)
        Q_n  <- conservative evaluation on D_n and D_model (1)          beta rises where Q(rho) - Q(D) is large
        pi_n <- ascend Q_n + lambda alpha log pi_n(data) - lambda (1 - alpha) KL(pi_n || pi_c) (9)
        lambda rises where pi_n is far from the behaviour and from pi_c
    pi_c <- descend lambda (1 - alpha) KL(pi_n || pi_c) (10); Q_meta towards the mean of Q_n; alpha_n by (11)
A new task adapts its models and runs RAC for 100 steps from pi_c and Q_meta on its own data.

    python merpo.py --env point-robot-wind --small    # one thread, 8 minutes: -7.4, adapted -6.3 (data -7.7)

Choices where the paper is silent:
- Entropy is in the critic's target (A.2.1), not in (9), which has none (`--actor-entropy` puts it there too).
- Seven meta-models on bootstrapped data; a policy fitted to each task's data stands for the behaviour in lambda, (11).
- The states of rho in (1) are those at which D_model's transitions begin: with H = 1, all in D_n.
- Each of the five models makes an equal share of the rollouts. log beta moves by its rate up or down (Adam on a
  scalar does little else); lambda is clipped at ten times its initial value, its divergences at 10.
- With pi_n and Q_n fixed only the KL of (10) depends on pi_c: the outer step distils the task policies, with weights
  of mean 1. xi_q is 1, Q_meta takes the mean of Q_n whole: with Table 2's 1e-3 it moves 1e-5 a meta-iteration.
- Observations are standardised; so are, for the models, rewards and changes of observations.
What we learned: lambda's rate of 1 takes lambda = 5 to its bound within fifty steps, where winds learn less and walkers
hardly. Where beta falls to nothing (the difference of Q stays below the threshold) Eq. 1 is no more conservative.
Larger outer steps (xi_q = 1, five on Eq. 10; also a longer stage 1) took walkers from 124 to 220 (their data: 243).
What adapts is then about as good as cloning the new task's data (see `clone_return_mean` of benchmark/retest.py).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import envs

# ==================================================================================================== 1. arguments
# Table 2 of the paper. Of families that are not in it sparse-point-robot has the wind's row, cheetah-vel the cheetah's
# rates and, with many tasks, the walker's lambda and task batch.
TWO = {"meta_batch_size": 2, "lambda_initial": 100, "threshold": 10}
TABLE = {
    "sparse-point-robot": {"discount": 0.9, "threshold": 10},
    "point-robot-wind": {"discount": 0.9, "threshold": 10},
    "cheetah-vel": {"lr": 1e-3, "actor_lr": 5e-4, "threshold": 10},
    "cheetah-fwd-back": TWO | {"lr": 1e-3, "actor_lr": 5e-4},
    "ant-fwd-back": TWO | {"lr": 8e-4, "actor_lr": 5e-4},
    "walker-params": {},
}
# Table 1, RAC alone on one task (`--single`). Not on `mixed` data: they hold many gaits, and RAC loses what it learns.
# Stage 1 trains its models by maximum likelihood: one Adam from end to end, no outer step (line 6), no proximal term.
SINGLE = {
    "hidden": 256, "layers": 4, "model_task_lr": 1e-3, "lambda_initial": 1, "meta_batch_size": 1, "beta_initial": 1,
    "eta": 0.0, "beta_lr": 0.0, "lambda_lr": 0.0, "quality": "medium",
    "steps": 20_000,  # of J steps of RAC: the paper's 200 epochs of 1,000
}  # fmt: skip
TABLE |= {
    "halfcheetah": SINGLE | {"rollout_length": 5, "lr": 3e-4, "actor_lr": 1e-4},
    "hopper": SINGLE | {"rollout_length": 5, "lr": 3e-4, "actor_lr": 1e-4},
    "walker2d": SINGLE | {"rollout_length": 1, "beta_initial": 10, "lr": 1e-4, "actor_lr": 1e-5},
}
# --small: what differs on a machine without a GPU. With Table 2's rate of 1 lambda is at its bound within fifty steps
# and learning on wind is slower; here it stays where it begins. Point robots: rewards, and so differences of Q, are
# tenths, and lambda, beta and the entropy's weight have to be small beside them. (Chosen by test returns of one seed.)
SMALL_ALL = {"hidden": 64, "layers": 3, "model_hidden": 64, "model_layers": 3, "batch_size": 64, "threads": 1}
SMALL_ALL |= {"model_task_lr": 1e-3, "model_lr": 0.5, "model_steps": 400, "steps": 800, "eval_every": 200}
SMALL_ALL |= {"lambda_lr": 0.0, "outer_steps": 5}
SMALL = dict.fromkeys(TABLE, SMALL_ALL)
for name in ("sparse-point-robot", "point-robot-wind"):
    SMALL[name] = SMALL_ALL | {"model_steps": 200, "lambda_initial": 0.05, "beta_initial": 0.05, "ent": 0.01}
    SMALL[name] |= {"final_lr": 0.1}
for name in ("halfcheetah", "hopper", "walker2d"):
    SMALL[name] = SMALL_ALL | {"steps": 1_000, "lr": 1e-3, "actor_lr": 3e-4, "tau": 0.02}


# What does not change the result of a run (but for rounding), or is in its path anyway.
ELSEWHERE = {"env", "small", "seed", "device", "data_dir", "run_dir", "resume", "no_graph", "threads"}
GROWS = {"steps", "variant"}  # may differ from those of the checkpoint that a run goes on from


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def fail(message, code=2):
    """Ends the run with one line."""
    print(f"{Path(__file__).name}:", *str(message).splitlines(), file=sys.stderr)
    raise SystemExit(code)


def natural(text):
    if not text.isascii() or not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^32 - 1, found {text!r}")
    return int(text)


def whole(text):
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0 and below 2^32, found {text!r}")
    return int(text)


def number(text):
    try:
        if 0 <= float(text) <= 1e30:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1e30, found {text!r}")


def positive(text):
    if number(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return float(text)


def share(text):
    if number(text) > 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return float(text)


def parse_args(argv=None):
    """A flag on the command line wins over the table's row for --env, which wins over the defaults here."""
    choose = Parser(add_help=False)
    choose.add_argument("--env", default="walker-params")
    choose.add_argument("--small", action="store_true")
    known, _ = choose.parse_known_args(argv)
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shared_arguments(parser.add_argument)
    algorithm_arguments(parser.add_argument)
    parser.set_defaults(**TABLE.get(known.env, {}) | (SMALL.get(known.env, {}) if known.small else {}))
    args = parser.parse_args(argv)
    args.test_quality = None if args.test_quality == args.quality else args.test_quality
    args.variant = variant(args, parser)
    for key in ("quality", "test_quality", "data_seed"):
        if args.data and getattr(args, key) != parser.get_default(key):
            flag = f"--{key.replace('_', '-')} {getattr(args, key)}"
            fail(f"{flag}: --data has the data of all tasks; expected one or the other")
    check_single(args, parser)
    args.test_quality = args.test_quality or args.quality
    if not args.adapt_steps and not STARTS[args.test_start][0]:
        fail(f"--adapt-steps 0: --test-start {args.test_start} has no policy before its first step; expected 1 or more")
    args.alpha = 0.0 if args.single == "combo-3" else args.alpha
    args.adaptive, args.alpha = args.alpha == "adaptive", 0.4 if args.alpha == "adaptive" else args.alpha
    if not args.no_model and not Tasks.KEPT <= args.rollouts <= args.rollout_buffer // args.rollout_length:
        most = args.rollout_buffer // args.rollout_length
        fail(f"--rollouts {args.rollouts}: expected {Tasks.KEPT} (one for each model) to {most} (what D_model holds)")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device was found; expected one, or --device cpu")
    return args


def check_single(args, parser):
    """Flags that go with --single, and those that do not."""
    if envs.family(args.env).differs == "nothing" and not args.single:
        fail(f"--env {args.env}: has one task; expected --single combo, combo-3 or rac beside it")
    if args.single and envs.family(args.env).differs != "nothing":
        fail(f"--single {args.single}: expected an environment of one task, found {args.env}")
    if args.single and args.test_start != "meta":
        fail(f"--test-start {args.test_start}: --single has no test tasks that adapt; expected one or the other")
    if args.single and (
        args.alpha == "adaptive" or (args.single != "rac" and args.alpha != parser.get_default("alpha"))
    ):
        fail(f"--alpha {args.alpha}: expected a number with --single rac, none with --single {args.single}")
    stage_2 = "model_lr", "outer_lr", "outer_steps", "meta_q_lr"
    for key in (*stage_2, "adapt_steps", "adapt_lr", "test_quality", "test_trajectories"):
        flag, value = f"--{key.replace('_', '-')}", getattr(args, key)
        if args.single and value != parser.get_default(key):
            fail(f"{flag} {value}: --single has no outer step and no new tasks; expected one or the other")
    if args.meta_policy and not args.single:
        fail("--meta-policy: is of one task; expected --single beside it")
    if args.no_model and args.real_ratio != parser.get_default("real_ratio"):
        fail("--real-ratio: with --no-model all is real; expected one or the other")


def mixture(text):
    return text if text == "adaptive" else share(text)


def variant(args, parser):
    """The name of the run's folder: the size, and every setting that is not this environment's default."""
    parts = ["small" if args.small else "paper"]
    for key, value in vars(args).items():
        if key not in ELSEWHERE and value != parser.get_default(key):
            parts.append(f"{key.replace('_', '-')}={str(value).removesuffix('.npz') if key == 'data' else value}")
    name = ",".join(parts).replace("/", "_")
    return name if len(name) < 120 else f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def shared_arguments(add):
    add("--env", default="walker-params", choices=list(TABLE), help="task family")
    add("--small", action="store_true", help="sizes for a machine without a GPU")
    add("--seed", type=natural, default=0, help="fixes everything the run draws")
    add("--steps", type=whole, default=2_000, help="meta-iterations of stage 2; the paper does not say how many")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="where the networks and the data are")
    add("--threads", type=natural, default=0, help="PyTorch's threads on the CPU; 0: one for each core")
    add("--data", type=Path, default=None, metavar="FILE", help="a dataset of your own (.npz, see data.py)")
    add("--data-dir", type=Path, default=Path("datasets"), help="where datasets are kept and built")
    add("--data-seed", type=natural, default=0, help="seed of the tasks and of their datasets")
    add("--quality", choices=data.QUALITIES, default="mixed", help="quality of the training tasks' data")
    add("--test-quality", choices=data.QUALITIES, default=None, help="of the test tasks' data; unless given: --quality")
    add("--eval-every", type=whole, default=100, help="iterations between evaluations")
    add("--eval-episodes", type=whole, default=4, help="episodes of each task in an evaluation")
    add("--run-dir", type=Path, default=Path("runs"), help="where runs are kept")
    add("--resume", action="store_true", help="go on from the run's checkpoint, if there is one")
    add("--no-graph", action="store_true", help="on CUDA: run every operation by itself instead of one graph")
    add("--hidden", type=whole, default=300, help="width of policies and critics")
    add("--meta-batch-size", type=whole, default=8, help="tasks in a meta-iteration")
    add("--batch-size", type=whole, default=256, help="transitions of each task in a gradient step")
    add("--lr", type=number, default=1e-3, help="learning rate of task critics")
    add("--tau", type=share, default=0.005, help="rate of the slow target")
    add("--discount", type=share, default=0.99, help="discount factor")


def algorithm_arguments(add):
    add("--layers", type=whole, default=5, help="hidden layers of policies and critics")
    add("--actor-lr", type=number, default=1e-3, help="learning rate of task policies")
    add("--outer-lr", type=number, default=1e-3, help="learning rate of the meta-policy")
    add("--final-lr", type=share, default=1.0, help="share of the rates left at the last meta-iteration, or test step")
    add("--outer-steps", type=whole, default=1, help="gradient steps on Eq. 10 in a meta-iteration")
    add("--meta-q-lr", type=share, default=1.0, help="xi_q, the plain outer step of meta-Q")
    add("--inner-steps", type=whole, default=10, help="J, steps of RAC in a meta-iteration")
    add("--adapt-steps", type=natural, default=100, help="steps of RAC on a test task")
    add("--adapt-lr", type=number, default=None, help="of its critic and policy; unless given: --lr and --actor-lr")
    add("--ent", type=number, default=0.2, help="temperature of the entropy in the critic's target")
    add("--actor-entropy", action="store_true", help="the same in Eq. 9, as in SAC; the paper has it in the target")
    add("--alpha", type=mixture, default=0.4, help="weight of the behaviour in Eq. 9, 0 to 1, or adaptive (MerPO-Adp)")
    add("--alpha-lr", type=number, default=1e-4, help="of Eq. 11")
    add("--beta-initial", type=number, default=1.0, help="of the conservative term in Eq. 1")
    add("--beta-lr", type=number, default=1e-3, help="step of log beta; 0 with --single")
    add("--threshold", type=number, default=5.0, help="difference of Q above which beta rises")
    add("--lambda-initial", type=number, default=5.0, help="of the regularisers in Eq. 9")
    add("--lambda-lr", type=number, default=1.0, help="its plain step; 0 with --single")
    add("--target-divergence", type=number, default=0.05, help="above which lambda rises")
    add("--real-ratio", type=share, default=0.5, help="f, the share of data from D_n in a batch (Figure 9a)")
    add("--no-model", action="store_true", help="no rollouts at all: CQL within tasks (Figure 7b)")
    add("--rollout-length", type=whole, default=1, help="H, steps of a model rollout")
    add("--rollouts", type=whole, default=250, help="rollouts of each task before a step of RAC")
    add("--rollout-buffer", type=whole, default=10_000, help="transitions that D_model holds")
    add("--model-hidden", type=whole, default=256, help="width of the dynamics models")
    add("--model-layers", type=whole, default=4, help="their hidden layers")
    add("--model-steps", type=whole, default=2_000, help="iterations of stage 1; the paper does not say how many")
    add("--model-lr", type=number, default=5e-2, help="xi, the meta-model's plain outer step; not with --single")
    add("--model-task-lr", type=number, default=1e-4, help="learning rate of a task's models")
    add("--model-adapt-steps", type=whole, default=25, help="h, their steps")
    add("--eta", type=number, default=0.1, help="of the proximal term of Eqs. 3 and 4")
    few = "task's to learn from, blocks of as many steps as one has that does not end early; unless given: all"
    add("--trajectories", type=whole, default=None, help=f"of each training {few}")
    add("--test-trajectories", type=whole, default=None, help=f"of each test {few} (Figure 10)")
    add("--test-start", choices=list(STARTS), default="meta", help="how a test task begins (Figures 7c and 9b)")
    add(
        "--single",
        choices=["combo", "combo-3", "rac"],
        default=None,
        help="one task, a fixed meta-policy (section 5.1)",
    )
    add(
        "--meta-policy",
        type=Path,
        default=None,
        metavar="RUN",
        help="with --single: the last policy of such a run, on these data or others; default: random",
    )


# --test-start: whether policy and critic start from the meta-policy and meta-Q; alpha, if not --alpha; whether lambda
# stays at 0 (`free`)
STARTS = {
    "meta": (True, None, False),
    "meta-no-init": (False, None, False),
    "behaviour": (False, 1.0, False),
    "behaviour-init": (True, 1.0, False),
    "combo": (False, None, True),
}


# ===================================================================================================== 2. networks
class BatchedLinear(nn.Module):
    """n independent linear layers: (n, B, d_in) -> (n, B, d_out)."""

    def __init__(self, n, d_in, d_out):
        super().__init__()
        bound = 1 / math.sqrt(d_in)
        self.weight = nn.Parameter(torch.empty(n, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, d_out).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class BatchedMLP(nn.Module):
    """n independent networks: (n, B, d_in) -> (n, B, d_out)."""

    def __init__(self, n, d_in, hidden, layers, d_out):
        super().__init__()
        sizes = [d_in, *[hidden] * layers, d_out]
        self.layers = nn.ModuleList(BatchedLinear(n, i, o) for i, o in zip(sizes, sizes[1:], strict=False))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


class Policy(nn.Module):
    """n tanh-Gaussian policies pi(a | s): (n, B, d) -> (n, B, m)."""

    def __init__(self, n, obs_dim, act_dim, hidden, layers):
        super().__init__()
        self.net = BatchedMLP(n, obs_dim, hidden, layers, 2 * act_dim)

    def forward(self, s):
        mean, log_std = self.net(s).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)

    def sample(self, s):
        """An action (n, B, m) that carries gradients, and its log density (n, B)."""
        mean, log_std = self(s)
        u = mean + log_std.exp() * torch.randn_like(mean)
        return torch.tanh(u), tanh_normal(u, mean, log_std)

    def log_density(self, s, a):
        """log pi(a | s) (n, B) of given actions, which are kept off the rim."""
        return tanh_normal(torch.atanh(a.clamp(-0.999, 0.999)), *self(s))


def tanh_normal(u, mean, log_std):
    """Log density of tanh(u), u ~ N(mean, std)."""
    log_normal = -0.5 * ((u - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return (log_normal - log_det).sum(-1)


class Critic(nn.Module):
    """Twin Q(s, a) of n tasks: (n, B, d), (n, B, m) -> (2, n, B)."""

    def __init__(self, n, obs_dim, act_dim, hidden, layers):
        super().__init__()
        self.net = BatchedMLP(2 * n, obs_dim + act_dim, hidden, layers, 1)

    def forward(self, s, a):
        x = torch.cat([s, a], -1)
        return self.net(torch.cat([x, x])).view(2, *x.shape[:2])


# ================================================================================================= 3. task encoder
# MerPO has none: what tells tasks apart are their dynamics models, adapted from one meta-model.
class Models(nn.Module):
    """n Gaussian models T(s', r | s, a) of the standardised change of state and reward."""

    def __init__(self, n, obs_dim, act_dim, hidden, layers):
        super().__init__()
        self.net = BatchedMLP(n, obs_dim + act_dim, hidden, layers, 2 * (obs_dim + 1))

    def forward(self, x):
        """Mean and log variance (n, B, d + 1), the latter softly kept in [-8, 0.5]; x (n, B, d + m) is s, a."""
        mean, log_var = self.net(x).chunk(2, -1)
        log_var = 0.5 - F.softplus(0.5 - log_var)
        return mean, -8 + F.softplus(log_var + 8)


# ======================================================================================================= 4. losses
def model_loss(mean, log_var, target):
    """-log T of Eqs. 3 and 4 but for a constant, sum over dimensions, mean over rows: (n, B, k) -> (n,)."""
    return 0.5 * ((target - mean).square() * (-log_var).exp() + log_var).sum(-1).mean(-1)


def proximal_gradient(theta, phi):
    """The gradient by theta of |theta - phi|^2 in Eqs. 3 and 4; lists of tensors."""
    return torch._foreach_mul(torch._foreach_sub(theta, phi), 2.0)


def critic_target(r, d, q_next, log_pi_next, discount, ent):
    """B Q of Eq. 1, clipped double Q with maximum entropy; q_next (2, n, B) of the slow target at a' ~ pi_n(. | s')."""
    return r + discount * (1 - d) * (q_next.amin(0) - ent * log_pi_next)


def critic_loss(q_rho, q_data, q, y, beta):
    """Eq. 1: beta (E_rho[Q] - E_D[Q]) + 1/2 E_df[(Q - B Q)^2], summed over tasks and twins.

    q (2, n, .), y (n, B), beta (n,).
    """
    return (beta * (q_rho.mean(-1) - q_data.mean(-1)) + 0.5 * (q - y).square().mean(-1)).sum()


def actor_loss(q, log_pi_data, kl_meta, lam, alpha):
    """Minus Eq. 9: E_rho[Q] + lambda alpha E_D[log pi_n] - lambda (1 - alpha) E_rho[KL(pi_n || pi_c)]; sum over tasks.

    q (2, n, B), log_pi_data and kl_meta (n, .), lam and alpha (n,).
    """
    gain = q.amin(0).mean(-1) + lam * alpha * log_pi_data.mean(-1) - lam * (1 - alpha) * kl_meta.mean(-1)
    return -gain.sum()


def gaussian_divergence(p, q):
    """KL(p || q) (...) of diagonal Gaussians before tanh, each (mean, log_std); tanh leaves it as it is."""
    (mean_p, log_p), (mean_q, log_q) = p, q
    ratio = ((mean_p - mean_q).square() + (2 * log_p).exp()) * (-2 * log_q).exp()
    return (log_q - log_p + 0.5 * ratio - 0.5).sum(-1)


def meta_policy_loss(kl_meta, lam, alpha):
    """Eq. 10 for pi_c: mean of w_n KL(pi_n || pi_c), w_n = lambda_n (1 - alpha_n) of mean 1, uniform if all are 0."""
    weight = lam * (1 - alpha)
    mean = weight.mean()
    weight = torch.where(mean > 0, weight / mean.clamp_min(1e-12), torch.ones_like(weight))
    return (weight * kl_meta.mean(-1)).mean()


# ======================================================================================================= 5. update
def copy_networks(target, source, shape, source_shape):
    """Copies networks: the first axis of `target`, read as `shape`, takes that of `source`, read as `source_shape`."""
    for a, b in zip(target.parameters(), source.parameters(), strict=True):
        a.data.view(*shape, *a.shape[1:]).copy_(b.detach().view(*source_shape, *b.shape[1:]))


def pick(target, source, index):
    """Copies the networks `index` of `source` into `target`."""
    for a, b in zip(target.parameters(), source.parameters(), strict=True):
        a.data.copy_(b.detach().index_select(0, index))


def forget(optimiser):
    """Adam as it was before its first step."""
    for state in optimiser.state.values():
        for value in state.values():
            value.zero_()


class Tasks(nn.Module):
    """What is kept of n tasks: data, models, fitted behaviour, D_model, and beta, lambda, alpha."""

    KEPT = 5  # models of 7

    def __init__(self, args, rows, obs_dim, act_dim):
        super().__init__()
        n, count, width = rows.shape
        # the last tenth (in a random order, the same for every task) is held out from the models
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(rows.device)
        self.register_buffer("rows", rows[:, order], persistent=False)
        self.held_out = max(1, count // 10)
        drawn = np.random.default_rng(0).integers(count - self.held_out, size=(7, count - self.held_out))
        self.register_buffer("bootstrap", torch.from_numpy(drawn).to(rows.device), persistent=False)
        self.models = Models(n * self.KEPT, obs_dim, act_dim, args.model_hidden, args.model_layers)
        self.behaviour = Policy(n, obs_dim, act_dim, args.hidden, args.layers)
        self.requires_grad_(False)
        add = self.register_buffer
        add("model_rows", torch.zeros(n, args.rollout_buffer, width))
        add("model_count", torch.zeros(n, dtype=torch.long))
        add("log_beta", torch.full((n,), math.log(max(args.beta_initial, 1e-9))))
        add("lam", torch.full((n,), float(args.lambda_initial)))
        add("alpha", torch.full((n,), float(args.alpha)))
        add("errors", torch.zeros(2))  # of the models on held-out data, before and after they adapted

    def draw(self, index, size):
        """(T, size, D) rows of D_n."""
        i = torch.randint(self.rows.shape[1], (len(index), size), device=index.device)
        return self.rows[index[:, None], i]

    def imagine(self, index, rows):
        """Appends (T, R, D) to D_model of tasks (T,); the oldest make room."""
        rows = rows[:, -self.model_rows.shape[1] :]
        place = self.model_count[index, None] + torch.arange(rows.shape[1], device=index.device)
        self.model_rows[index[:, None], place % self.model_rows.shape[1]] = rows
        self.model_count.index_add_(0, index, torch.full_like(index, rows.shape[1]))

    def imagined(self, index, size):
        """(T, size, D) rows of D_model."""
        held = self.model_count[index].clamp_max(self.model_rows.shape[1])
        i = (torch.rand(len(index), size, device=index.device, dtype=torch.float64) * held[:, None]).long()
        return self.model_rows[index[:, None], i]


class Agent(nn.Module):
    """Meta-model, meta-policy, meta-Q, and what is kept of the tasks."""

    METRICS = ("model_loss", "critic_loss", "actor_loss", "meta_policy_loss", "q_mean", "q_gap", "beta", "lambda")
    METRICS += ("alpha", "d_behaviour", "d_meta")
    MODELS = 7

    def __init__(self, args, world):
        super().__init__()
        d, m = world.row.obs_dim, world.row.act_dim
        sizes = d, m, args.hidden, args.layers
        self.meta_model = Models(self.MODELS, d, m, args.model_hidden, args.model_layers)
        self.meta_model.requires_grad_(bool(args.single))  # else it moves by plain outer steps
        self.meta_policy, self.meta_q = Policy(1, *sizes), Critic(1, *sizes)
        self.train_tasks = Tasks(args, world.train_rows, d, m)
        self.test_tasks = Tasks(args, world.test_rows, d, m)
        self.inner = Inner(args, min(args.meta_batch_size, len(world.train_rows)), world)
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))
        self.register_buffer("metrics", torch.zeros(len(self.METRICS)))  # sums since the last evaluation
        self.register_buffer("bad_step", torch.full((len(self.METRICS),), math.inf, dtype=torch.float64))

    def record(self, **values):
        """Adds to the sums, and notes the first step at which a value was not finite, without looking at it."""
        zero = torch.zeros_like(self.metrics[0])
        values = torch.stack([values.get(name, zero).float() for name in self.METRICS])
        self.metrics += values
        self.bad_step.copy_(torch.where(values.isfinite(), self.bad_step, self.bad_step.minimum(self.step)))


class Inner(nn.Module):
    """RAC (Algorithm 1) for T tasks at once: their policies, critics and slow targets."""

    def __init__(self, args, n, world):
        super().__init__()
        d, m = world.row.obs_dim, world.row.act_dim
        self.args, self.world, self.n, sizes = args, world, n, (n, d, m, args.hidden, args.layers)
        self.actor, self.critic = Policy(*sizes), Critic(*sizes)
        self.target = Critic(*sizes).requires_grad_(False)
        self.target.load_state_dict(self.critic.state_dict())
        self.models = Models(n * Tasks.KEPT, d, m, args.model_hidden, args.model_layers).requires_grad_(False)
        self.behaviour = Policy(*sizes).requires_grad_(False)

    def start(self, tasks, index, agent, optimisers):
        """Takes up tasks (T,): their models and behaviour; policies and critics from the meta-policy and meta-Q."""
        kept = index[:, None] * Tasks.KEPT + torch.arange(Tasks.KEPT, device=index.device)
        pick(self.models, tasks.models, kept.flatten())
        pick(self.behaviour, tasks.behaviour, index)
        if agent is not None:
            copy_networks(self.actor, agent.meta_policy, (self.n,), (1,))
            copy_networks(self.critic, agent.meta_q, (2, self.n), (2, 1))
            forget(optimisers["actor"])
            forget(optimisers["critic"])
        self.target.load_state_dict(self.critic.state_dict())

    def step(self, tasks, index, meta_policy, optimisers, free=False):
        """One step of RAC; returns what is worth recording. `free`: no regulariser at all (COMBO)."""
        args, world = self.args, self.world
        if not args.no_model:  # line 3 of Algorithm 1, 12 of Algorithm 2
            tasks.imagine(index, self.roll_out(tasks.draw(index, args.rollouts)))
        real = tasks.draw(index, args.batch_size)
        rho = real if args.no_model else tasks.imagined(index, args.batch_size)
        count = round((1.0 if args.no_model else args.real_ratio) * args.batch_size)
        d_f = torch.cat([real[:, :count], rho[:, : args.batch_size - count]], 1)
        s_data, a_data = real.split(world.split, -1)[:2]
        s_rho = rho.split(world.split, -1)[0]
        # line 4 of Algorithm 1, 13 of Algorithm 2: Eq. 1; in a batch f of D_n and 1 - f of D_model
        log = self.evaluate_policy(tasks, index, s_rho, s_data, a_data, d_f, optimisers["critic"])
        return log | self.improve_policy(tasks, index, s_rho, s_data, a_data, meta_policy, optimisers["actor"], free)

    @torch.no_grad()
    def roll_out(self, rows):
        """H steps of the models from the states of rows (T, R, D): (T, R' H, D); each model makes an equal share."""
        world, kept = self.world, Tasks.KEPT
        each = rows.shape[1] // kept
        start = rows[:, : each * kept].split(world.split, -1)[0]
        s, made = start, []
        for _ in range(self.args.rollout_length):
            a, _ = self.actor.sample(s)
            mean, log_var = self.models(torch.cat([s, a], -1).view(self.n * kept, each, -1))
            change = (mean + (0.5 * log_var).exp() * torch.randn_like(mean)).view(self.n, each * kept, -1)
            change = change * world.change_std + world.change_mean
            s2, r = s + change[..., :-1], change[..., -1:]
            d = world.row.terminated((s2 * world.std + world.mean).flatten(0, 1)).view(*r.shape).float()
            made.append(torch.cat([s, a, r, s2, d], -1))
            s = torch.where(d > 0, start, s2)
        return torch.cat(made, 1)

    def evaluate_policy(self, tasks, index, s_rho, s_data, a_data, d_f, optimiser):
        args = self.args
        s, a, r, s2, done = d_f.split(self.world.split, -1)
        with torch.no_grad():
            a2, log_pi2 = self.actor.sample(s2)
            y = critic_target(r[..., 0], done[..., 0], self.target(s2, a2), log_pi2, args.discount, args.ent)
            mean, log_std = (x.repeat_interleave(10, 1) for x in self.actor(s_rho))  # ten fresh actions for each state
            a_rho = torch.tanh(mean + log_std.exp() * torch.randn_like(mean))
        parts = (s_rho.repeat_interleave(10, 1), a_rho), (s_data, a_data), (s, a)
        values = self.critic(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))  # one pass for all three
        q_rho, q_data, q = values.split([part[0].shape[1] for part in parts], -1)
        with torch.no_grad():
            gap = (q_rho.mean(-1) - q_data.mean(-1)).mean(0)  # (T,)
            # appendix A.2.2, "Tune beta": up where the gap is above the threshold, else down
            log_beta = tasks.log_beta[index] + args.beta_lr * torch.sign(gap - args.threshold)
            tasks.log_beta.index_copy_(0, index, log_beta)
        loss = critic_loss(q_rho, q_data, q, y, log_beta.exp())  # Eq. 1
        step_down(optimiser, loss)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), args.tau)
        log = {"critic_loss": loss.detach() / self.n, "q_mean": q.detach().mean(), "q_gap": gap.mean()}
        return log | {"beta": log_beta.exp().mean()}

    def improve_policy(self, tasks, index, s_rho, s_data, a_data, meta_policy, optimiser, free):
        # line 5 of Algorithm 1, 14 of Algorithm 2: Eq. 7, made computable by Eq. 9. At alpha = 0 it is Eq. 6 (COMBO-3)
        # and, over many tasks, Eq. 5; `free` it is Eq. 2 (COMBO). Eq. 8 is Eq. 1 for tables.
        args, alpha, lam = self.args, tasks.alpha[index], tasks.lam[index]
        self.critic.requires_grad_(False)
        mean, log_std = policy = self.actor(s_rho)
        u = mean + log_std.exp() * torch.randn_like(mean)
        a = torch.tanh(u)
        with torch.no_grad():  # pi_c is fixed here; one network for all tasks' states
            meta = [x.view_as(a) for x in meta_policy(s_rho.flatten(0, 1)[None])]
        d_meta = gaussian_divergence(policy, meta)
        weight = torch.zeros_like(lam) if free else lam
        q = self.critic(s_rho, a)
        if args.actor_entropy:
            q = q - args.ent * tanh_normal(u, mean, log_std)
        loss = actor_loss(q, self.actor.log_density(s_data, a_data), d_meta, weight, alpha)  # Eq. 9
        step_down(optimiser, loss)
        self.critic.requires_grad_(True)
        with torch.no_grad():
            d_behaviour = gaussian_divergence(self.behaviour(s_data), self.actor(s_data)).mean(-1).clamp_max(10)
            d_meta = d_meta.mean(-1).clamp_max(10)
            # A.2.2, "Tune lambda": + lr (alpha D(pi_n, pi_beta) + (1 - alpha) D(pi_n, pi_c) - target); the first D is
            # KL(pi_beta || pi_n), which Eq. 9 descends by log pi_n(data)
            lam = lam + args.lambda_lr * (alpha * d_behaviour + (1 - alpha) * d_meta - args.target_divergence)
            lam = lam.clamp(0, 10 * args.lambda_initial)
            tasks.lam.index_copy_(0, index, lam)
        log = {"actor_loss": loss.detach() / self.n, "lambda": lam.mean(), "alpha": alpha.mean()}
        return log | {"d_behaviour": d_behaviour.mean(), "d_meta": d_meta.mean()}


def adam(module, lr, device):
    lr = torch.tensor(lr, device=device)  # a tensor, so that a captured graph can change it
    return torch.optim.Adam(module.parameters(), lr=lr, fused=True, capturable=device.type == "cuda")


def inner_optimisers(args, inner, device):
    return {"actor": adam(inner.actor, args.actor_lr, device), "critic": adam(inner.critic, args.lr, device)}


def make_optimisers(args, agent, device):
    optimisers = {f"inner_{name}": adam for name, adam in inner_optimisers(args, agent.inner, device).items()}
    optimisers["meta_policy"] = adam(agent.meta_policy, args.outer_lr, device)
    if args.single:
        optimisers["meta_model"] = adam(agent.meta_model, args.model_task_lr, device)
    return optimisers


def anneal(args, optimisers, done):
    """Learning rates fall linearly to --final-lr of their initial values; `done` is the share of the steps made."""
    initial = {"actor": args.actor_lr, "critic": args.lr, "meta_policy": args.outer_lr}
    for name, optimiser in optimisers.items():
        optimiser.param_groups[0]["lr"].copy_(initial[name] * (1 - (1 - args.final_lr) * done))


def step_down(optimiser, loss):
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def adapt_models(args, world, theta, phi, tasks, index, optimiser):
    """h steps of Eq. 3 (or 4): 7 models of each task (T,), from phi, on bootstrapped data; returns -log T (T x 7,)."""
    copy_networks(theta, phi, (len(index), Agent.MODELS), (1, Agent.MODELS))
    forget(optimiser)
    return fit_models(args, world, theta, tasks, index, optimiser)


def fit_models(args, world, theta, tasks, index, optimiser):
    """The same from where they are."""
    n, models = len(index), Agent.MODELS
    mine = torch.arange(models, device=index.device).repeat(n)[:, None]  # (T x 7, 1)
    task = index.repeat_interleave(models)[:, None]
    weights, anchor = list(theta.parameters()), [p.detach().clone() for p in theta.parameters()]  # phi, as they start
    for _ in range(args.model_adapt_steps):
        i = torch.randint(tasks.bootstrap.shape[1], (n * models, args.batch_size), device=index.device)
        i = tasks.bootstrap[mine, i]
        x, target = world.model_data(tasks.rows[task, i])
        loss = model_loss(*theta(x), target)
        optimiser.zero_grad()
        loss.sum().backward()
        with torch.no_grad():
            torch._foreach_add_([p.grad for p in weights], proximal_gradient(weights, anchor), alpha=args.eta)
        optimiser.step()
    return loss.detach()


@torch.no_grad()
def held_out_error(world, models, tasks, index):
    """Mean squared error of predicted means on held-out rows, (T, models of each)."""
    x, target = world.model_data(tasks.rows[index, -tasks.held_out :])
    n = models.net.layers[0].weight.shape[0] // len(index)
    mean, _ = models(x.repeat_interleave(n, 0))
    return (mean - target.repeat_interleave(n, 0)).square().mean((1, 2)).view(len(index), n)


def settle_tasks(args, agent, world, tasks, device):
    """Between the stages (line 8 of Algorithm 2): every task's models adapt (Eq. 4), the best are kept, and its
    behaviour is fitted."""
    n, index = len(tasks.rows), torch.arange(len(tasks.rows), device=device)
    d, m = world.row.obs_dim, world.row.act_dim
    theta = Models(n * Agent.MODELS, d, m, args.model_hidden, args.model_layers).to(device)
    optimiser = adam(theta, args.model_task_lr, device)
    copy_networks(theta, agent.meta_model, (n, Agent.MODELS), (1, Agent.MODELS))
    before = held_out_error(world, theta, tasks, index)
    if not args.single:  # its models are trained whole in stage 1
        adapt_models(args, world, theta, agent.meta_model, tasks, index, optimiser)
    after = held_out_error(world, theta, tasks, index)
    best = after.argsort(1)[:, : Tasks.KEPT] + index[:, None] * Agent.MODELS
    pick(tasks.models, theta, best.flatten())
    tasks.errors.copy_(torch.stack([before.mean(), after.mean()]))
    tasks.behaviour.requires_grad_(True)
    optimiser = adam(tasks.behaviour, 1e-3, device)
    for _ in range(500):
        s, a = tasks.draw(index, args.batch_size).split(world.split, -1)[:2]
        step_down(optimiser, -tasks.behaviour.log_density(s, a).mean(-1).sum())
    tasks.behaviour.requires_grad_(False)


def make_updates(args, agent, optimisers, world):
    """learn_model() and learn_policy(): one iteration of stage 1 and of stage 2. Neither waits for the device."""
    device, inner, tasks = world.mean.device, agent.inner, agent.train_tasks
    inner_adam = {name: optimisers[f"inner_{name}"] for name in ("actor", "critic")}
    policy_adam = inner_adam | {"meta_policy": optimisers["meta_policy"]}
    if not args.single:
        models = Agent.MODELS * inner.n, world.row.obs_dim, world.row.act_dim, args.model_hidden, args.model_layers
        theta = Models(*models).to(device)
        theta_adam = adam(theta, args.model_task_lr, device)

    def draw_tasks():
        return torch.rand(len(tasks.rows), device=device).argsort()[: inner.n]

    def learn_model():
        agent.step += 1
        if args.single:
            loss = fit_models(args, world, agent.meta_model, tasks, draw_tasks(), optimisers["meta_model"])
        else:  # Algorithm 2, lines 3 to 5
            loss = adapt_models(args, world, theta, agent.meta_model, tasks, draw_tasks(), theta_adam)
            for phi, p in zip(agent.meta_model.parameters(), theta.parameters(), strict=True):
                # line 6: phi <- phi - xi_1 (phi - mean_n theta_n)
                phi.lerp_(p.detach().view(inner.n, Agent.MODELS, *p.shape[1:]).mean(0), args.model_lr)
        with torch.no_grad():
            agent.record(model_loss=loss.mean())

    def learn_policy():
        agent.step += 1
        if args.final_lr != 1:
            anneal(args, policy_adam, (agent.step - args.model_steps) / args.steps)
        index = draw_tasks()
        if not args.single:
            inner.start(tasks, index, agent, inner_adam)
        for _ in range(args.inner_steps):  # lines 10 to 16, all tasks at once
            log = inner.step(tasks, index, agent.meta_policy, inner_adam, args.single == "combo")
        if not args.single:
            log |= learn_meta(index)
        with torch.no_grad():
            agent.record(**log)

    def learn_meta(index):
        for i in range(args.outer_steps):
            s = tasks.imagined(index, args.batch_size) if not args.no_model else tasks.draw(index, args.batch_size)
            s = s.split(world.split, -1)[0]
            with torch.no_grad():
                policy = inner.actor(s)
            mean, log_std = agent.meta_policy(s.flatten(0, 1)[None])  # one network for all tasks' states
            kl = gaussian_divergence(policy, (mean.view_as(policy[0]), log_std.view_as(policy[0])))
            if args.adaptive and i == 0:
                adapt_alpha(index, kl.detach().mean(-1))
            loss = meta_policy_loss(kl, tasks.lam[index], tasks.alpha[index])  # line 17: Eq. 10
            step_down(optimisers["meta_policy"], loss)
        with torch.no_grad():
            for p, q in zip(agent.meta_q.parameters(), inner.critic.parameters(), strict=True):
                # Q_meta <- Q_meta - xi_q (Q_meta - mean_n Q_n)
                p.lerp_(q.detach().view(2, inner.n, *q.shape[1:]).mean(1), args.meta_q_lr)
        return {"meta_policy_loss": loss.detach()}

    @torch.no_grad()
    def adapt_alpha(index, d_meta):
        real = tasks.draw(index, args.batch_size).split(world.split, -1)[0]
        d_behaviour = gaussian_divergence(inner.behaviour(real), inner.actor(real)).mean(-1)
        # Eq. 11: alpha <- alpha + lr (D(pi_n, pi_beta) - D(pi_n, pi_c)), in [0.1, 0.5], with
        # D(pi_n, pi_beta) = KL(pi_beta || pi_n), which Eq. 9 descends by log pi_n(data)
        alpha = tasks.alpha[index] + args.alpha_lr * (d_behaviour - d_meta)
        tasks.alpha.index_copy_(0, index, alpha.clamp(0.1, 0.5))

    return learn_model, learn_policy


def capture(fn):
    """`fn`, without arguments, as one CUDA graph; three warm-up calls run eagerly and are steps like any other."""
    graph, stream, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0

    def replay():
        nonlocal calls
        calls += 1
        if calls <= 3:  # on a side stream, as capture asks for
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                fn()
            torch.cuda.current_stream().wait_stream(stream)
            return
        if calls == 4:
            gc.collect()  # a graph that is freed while another is recorded ends the recording
            with torch.cuda.graph(graph):  # records, does not run
                fn()
        graph.replay()

    return replay


# ===================================================================================================== 6. evaluate
def standardisation(observations):
    """Mean and standard deviation (d,) of the training tasks' observations (n, N, d)."""
    flat = observations.flatten(0, 1).double()
    return flat.mean(0).float(), flat.std(0).clamp_min(1e-3).float()


def pack(dataset, tasks, rows, mean, std):
    """(n, N, D), of these rows (N,) of tasks (n,): s, a, r, s', d; observations standardised."""
    s, s2 = ((obs[tasks][:, rows] - mean) / std for obs in (dataset.observations, dataset.next_observations))
    r, d = (column[tasks][:, rows, None] for column in (dataset.rewards, dataset.terminals))
    return torch.cat([s, dataset.actions[tasks][:, rows], r, s2, d], -1)


def choose_rows(count, trajectories, length):
    """All of a task's `count` rows, or those of so many `trajectories`, of `length` rows each, spread over them."""
    rows = torch.arange(count)
    if trajectories is None:
        return rows
    if count % length:
        fail(f"--trajectories, --test-trajectories: expected trajectories of {length} steps, found {count} rows")
    parts = rows.unflatten(0, (-1, length))
    if trajectories > len(parts):
        fail(f"--trajectories, --test-trajectories: the data hold {len(parts)} of each task, found {trajectories}")
    return parts[torch.linspace(0, len(parts) - 1, trajectories).round().long()].flatten()


class World:
    """The data of every task as packed rows, their statistics, and sub-environments for the evaluation."""

    def __init__(self, args, device):
        train = open_data(args, args.quality, device)
        test = open_data(args, args.test_quality, device) if args.test_quality != args.quality else train
        self.row, e = envs.family(args.env), args.eval_episodes
        if args.single and len(train.train_tasks) > 1:
            fail(f"--single {args.single}: the data hold {len(train.train_tasks)} training tasks; expected one")
        d, m = self.row.obs_dim, self.row.act_dim
        self.split = [d, m, 1, d, 1]
        rows = choose_rows(train.rewards.shape[1], args.trajectories, self.row.data_horizon)
        test_rows = choose_rows(test.rewards.shape[1], args.test_trajectories, self.row.data_horizon)
        self.mean, self.std = standardisation(train.observations[train.train_tasks][:, rows])
        self.train_rows = pack(train, train.train_tasks, rows, self.mean, self.std)
        self.test_rows = pack(test, test.test_tasks, test_rows, self.mean, self.std)
        if min(self.train_rows.shape[1], self.test_rows.shape[1]) < 2:
            fail("--trajectories, --test-trajectories: one transition of a task; expected at least two")
        s, _, r, s2, _ = self.train_rows.split(self.split, -1)
        self.change_mean, self.change_std = standardisation(torch.cat([s2 - s, r], -1))
        tasks = test.tasks[test.test_tasks]
        self.env = envs.make(args.env, tasks.repeat(e, axis=0), seed=args.seed)
        returns = test.returns[test.test_tasks]
        self.behaviour = float(returns.mean()) if np.isfinite(returns).all() else None
        self.optimum = float(self.row.optimum(tasks, self.row.horizon).mean()) if self.row.optimum else None
        self.checksum = [train.meta["checksum"], test.meta["checksum"]]

    def model_data(self, rows):
        """Inputs (.., d + m) and standardised targets (.., d + 1) of the models, from rows (.., D)."""
        s, a, r, s2, _ = rows.split(self.split, -1)
        return torch.cat([s, a], -1), (torch.cat([s2 - s, r], -1) - self.change_mean) / self.change_std


def open_data(args, quality, device):
    """The dataset of this quality, built on the spot if it is missing; tensors on the device."""
    path = args.data or data.prepare(args.env, quality, seed=args.data_seed, data_dir=args.data_dir, device=args.device)
    return data.load(path, env=args.env, device=device)


@torch.no_grad()
def play(args, policy, world):
    """Undiscounted returns (n_test, E) of the policies' means; `policy` has one network, or one for each test task."""
    e, device = args.eval_episodes, world.mean.device
    obs, _ = world.env.reset(seed=args.seed)
    n = len(obs) // e
    total, alive = np.zeros(len(obs)), np.ones(len(obs), bool)
    for _ in range(world.env.horizon):
        s = (torch.as_tensor(obs, dtype=torch.float32).to(device) - world.mean) / world.std
        networks = policy.net.layers[0].weight.shape[0]
        action = torch.tanh(policy(s.view(networks, -1, s.shape[-1]))[0]).view(n * e, -1).cpu().numpy()
        obs, reward, terminated, truncated, info = world.env.step(action)
        total += alive * info.get("sparse_reward", reward)  # sparse-point-robot reports the sparse return
        alive &= ~(terminated | truncated)
    return total.reshape(n, e)


def evaluate(args, agent, world):
    """Every test task adapts, all as one batch: RAC from the meta-policy on its own data; then its policy is scored.

    Returns {steps of RAC: returns (n_test, E)}, from the meta-policy itself (0) on; with --single, where nothing
    adapts, {1: of the policy, 0: of the meta-policy}. What is drawn is the same at every evaluation, and nothing of it
    is of the run's own random numbers.
    """
    device = world.mean.device
    if args.single:
        return {1: play(args, agent.inner.actor, world), 0: play(args, agent.meta_policy, world)}
    if args.adapt_lr is not None:
        args = argparse.Namespace(**vars(args) | {"lr": args.adapt_lr, "actor_lr": args.adapt_lr})
    tasks, n = agent.test_tasks, len(world.test_rows)
    initialise, alpha, free = STARTS[args.test_start]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(args.seed)
        inner = Inner(args, n, world).to(device)
        optimisers, index = inner_optimisers(args, inner, device), torch.arange(n, device=device)
        with torch.no_grad():
            tasks.model_count.zero_()
            tasks.log_beta.copy_(agent.train_tasks.log_beta.mean().expand(n))
            tasks.lam.copy_(agent.train_tasks.lam.mean().expand(n))
            tasks.alpha.copy_((agent.train_tasks.alpha.mean() if alpha is None else torch.tensor(alpha)).expand(n))
        inner.start(tasks, index, agent if initialise else None, optimisers)
        returns = {0: play(args, agent.meta_policy, world)}
        for step in range(1, args.adapt_steps + 1):
            if args.final_lr != 1:
                anneal(args, optimisers, torch.tensor(step / args.adapt_steps, device=device))
            inner.step(tasks, index, agent.meta_policy, optimisers, free)
            if step in (10, 25, 50) or step % 100 == 0 or step == args.adapt_steps:
                returns[step] = play(args, inner.actor, world)
    return returns


# ================================================================================================ 7. plots and files
def summarise(step, seconds, agent, count, returns):
    """One row of metrics.csv: means of the losses since the last evaluation, returns after and before adaptation."""
    row = {"step": step, "seconds": round(seconds, 1)}
    row |= dict(zip(agent.METRICS, (agent.metrics / max(1, count)).tolist(), strict=True))
    for name in agent.METRICS:  # a stage has no metrics of the other
        if (name == "model_loss") == bool(returns):
            row[name] = math.nan
    adapted, meta = (returns[max(returns)], returns[0]) if returns else (np.full((1, 1), np.nan),) * 2
    row |= {"return_mean": adapted.mean(), "return_std": adapted.mean(1).std(), "meta_return_mean": meta.mean()}
    for prefix, tasks in (("", agent.test_tasks), ("train_", agent.train_tasks)):
        errors = tasks.errors.tolist() if returns else [math.nan] * 2
        row |= dict(zip((f"{prefix}error_before", f"{prefix}error_after"), errors, strict=True))
    return {key: float(value) if key != "step" else value for key, value in row.items()}


def check_finite(agent, run, rows):
    """Ends a run that diverged, before anything is saved over its last good checkpoint."""
    kept = f"the last good checkpoint is kept in {run}" if rows else "there is no checkpoint yet"
    bad = agent.bad_step.tolist()
    if min(bad) < math.inf:
        fail(f"diverged: {agent.METRICS[bad.index(min(bad))]} is not finite since step {int(min(bad))}; {kept}", 3)
    for name, parameter in agent.named_parameters():
        if not parameter.isfinite().all():
            fail(f"diverged: the weights {name} are not finite at step {int(agent.step)}; {kept}", 3)
    for name, value in zip(agent.METRICS, agent.metrics.tolist(), strict=True):
        if not math.isfinite(value):
            fail(f"diverged: the sum of {name} is not finite at step {int(agent.step)}; {kept}", 3)


def unless_diverged(play, args, agent, *rest):
    """play(args, agent, ...) where the policy acts; environments refuse actions that are not finite."""
    try:
        return play(args, agent, *rest)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error} in {play.__name__} at step {int(agent.step)}") from None


def write_text(path, text):
    data.write(path, lambda file: file.write(text.encode()))


def write_metrics(run, rows):
    lines = [",".join(rows[0])] + [",".join(repr(value) for value in row.values()) for row in rows]
    write_text(run / "metrics.csv", "\n".join(lines) + "\n")


def plot_curve(run, args, rows, world):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="meta-iterations", ylabel="return", title=f"{Path(__file__).stem} on {args.env}")
    rows = [row for row in rows if math.isfinite(row["return_mean"])]
    step = np.array([row["step"] - args.model_steps for row in rows])
    mean, std = (np.array([row[f"return_{part}"] for row in rows]) for part in ("mean", "std"))
    axes.fill_between(step, mean - std, mean + std, color="tab:blue", alpha=0.15, linewidth=0)
    label = "policy" if args.single else f"test tasks after {args.adapt_steps} steps of RAC"
    axes.plot(step, mean, color="tab:blue", label=f"{label} (band: std over tasks)")
    axes.plot(step, [row["meta_return_mean"] for row in rows], color="tab:gray", label="the meta-policy itself")
    if world.behaviour is not None:
        axes.axhline(world.behaviour, color="tab:orange", linestyle=":", label="the test tasks' data")
    if world.optimum is not None:
        axes.axhline(world.optimum, color="tab:green", linestyle="--", label="optimum")
    axes.legend(fontsize="x-small", framealpha=0.8)
    data.write(run / "curve.png", lambda file: figure.savefig(file, dpi=130))


def plot_adaptation(run, args, returns, world):
    """Return of test tasks against steps of RAC on their own data (Figure 9b)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="steps of RAC on a test task's data", ylabel="return", title=args.env)
    steps = sorted(step for step in returns if step or STARTS[args.test_start][0])  # at 0 stands the meta-policy
    for task in np.stack([returns[step].mean(1) for step in steps], 1):
        axes.plot(steps, task, color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot(steps, [returns[step].mean() for step in steps], color="tab:blue", marker="o", label="mean of test tasks")
    if world.behaviour is not None:
        axes.axhline(world.behaviour, color="tab:orange", linestyle=":", label="their data")
    axes.legend(fontsize="small")
    data.write(run / "adaptation.png", lambda file: figure.savefig(file, dpi=130))


def save(run, step, seconds, args, agent, optimisers, rows, world):
    cuda = torch.cuda.get_rng_state() if agent.step.is_cuda else None
    checkpoint = {
        "step": step, "seconds": seconds, "rows": rows, "args": settings(args), "dataset": world.checksum,
        "agent": agent.state_dict(),
        "optimisers": {key: optimiser.state_dict() for key, optimiser in optimisers.items()},
        "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
        "standardisation": [world.mean, world.std],  # of observations: all that the networks need besides
    }  # fmt: skip
    data.write(run / "checkpoint.pt", lambda file: torch.save(checkpoint, file))


def settings(args):
    """The resolved arguments as plain values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def resume(run, args, agent, optimisers, world, device):
    """Loads the checkpoint; the run then goes on as if it had never stopped. Returns step, seconds and rows."""
    path = run / "checkpoint.pt"
    if not args.resume or not path.exists():
        return 0, 0.0, []
    try:
        checkpoint = data.read(path, device)
        then, dataset = dict(checkpoint["args"]), list(checkpoint["dataset"])
    except Exception as error:
        fail(f"{path}: not a checkpoint of this script ({type(error).__name__}); delete it to start anew")
    for key, value in settings(args).items():
        found = then.get(key)
        if key not in ELSEWHERE | GROWS and (torch.is_tensor(found) or found != value):
            why = "" if then.get("steps") == args.steps else f"; its --steps were {then.get('steps')!r:.20}"
            fail(f"--{key.replace('_', '-')}: the checkpoint was made with {found!r:.80}, found {value!r}{why}")
    if dataset != world.checksum:
        fail(f"{path}: made with another dataset; expected checksums {dataset!r:.200}, found {world.checksum}")
    try:
        data.check_checkpoint(checkpoint, agent, optimisers)
        agent.load_state_dict(checkpoint["agent"])
        for key, optimiser in optimisers.items():
            optimiser.load_state_dict(checkpoint["optimisers"][key])
            optimiser.param_groups[0]["capturable"] = device.type == "cuda"  # the checkpoint may come from a CPU
        torch.set_rng_state(checkpoint["random"]["cpu"].cpu())
        if device.type == "cuda" and checkpoint["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"].cpu())
    except Exception as error:
        fail(f"{path}: its weights are not this script's ({type(error).__name__}); delete it to start anew")
    return checkpoint["step"], checkpoint["seconds"], checkpoint["rows"]


def prepare_run(args):
    """<run-dir>/<script>/<env>/<variant>/seed<k>/"""
    run = args.run_dir / Path(__file__).stem / args.env / args.variant / f"seed{args.seed}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        data.write(run / ".writable", lambda file: None)
        (run / ".writable").unlink()
    except OSError as error:
        fail(f"--run-dir {args.run_dir}: cannot write there ({error.strerror})")
    return run


def write_settings(run, args):
    """The resolved arguments, and the script as it runs."""
    write_text(run / "args.json", json.dumps(settings(args), indent=1))
    data.write(run / "source.py", lambda file: file.write(Path(__file__).read_bytes()))


def write_final(run, args, rows, world, seconds):
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    final = rows[-1] | {
        "args": settings(args), "versions": versions, "wall_clock_seconds": round(seconds, 1),
        "dataset_checksums": world.checksum, "behaviour_return": world.behaviour, "optimal_return": world.optimum,
    }  # fmt: skip
    final = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in final.items()
    }
    write_text(run / "final.json", json.dumps(final, indent=1))


# =========================================================================================================== 8. main
def main(argv=None):
    """Every way in which a run can fail ends in one line."""
    args = parse_args(argv)
    run = prepare_run(args)
    try:
        train(args, run)
    except data.DataError as error:
        fail(error, error.code)
    except OSError as error:
        fail(f"{error.filename or 'the output'}: cannot write there ({error.strerror or error}); what stands is whole")
    except FloatingPointError as error:
        fail(f"diverged: {error}; the last good checkpoint, if there is one, is kept in {run}", 3)
    except (MemoryError, RuntimeError) as error:
        words = "out of memory", "allocate", "MemoryError"
        lines = [line for line in str(error).splitlines() or ["MemoryError"] if any(word in line for word in words)]
        if not lines:
            raise
        fail(f"out of memory ({lines[0]:.100}); expected smaller sizes, as --batch-size or --hidden")


def train(args, run):
    device = data.choose_device(args.device)
    world = World(args, device)
    torch.set_num_threads(min(args.threads, 1024) or envs.cores())
    torch.manual_seed(args.seed)
    agent = Agent(args, world).to(device)
    optimisers = make_optimisers(args, agent, device)
    if args.meta_policy:
        load_policy(args, agent.meta_policy, world)
    learn_model, learn_policy = make_updates(args, agent, optimisers, world)
    if device.type == "cuda" and not args.no_graph:
        learn_model, learn_policy = capture(learn_model), capture(learn_policy)
    start, seconds, rows = resume(run, args, agent, optimisers, world, device)
    write_settings(run, args)
    began, last, total = time.time() - seconds, start, args.model_steps + args.steps
    for step in range(start + 1, total + 1):
        if step == args.model_steps + 1:
            for tasks in (agent.train_tasks, agent.test_tasks):
                settle_tasks(args, agent, world, tasks, device)
            # with --single for good, else until the first meta-iteration starts it from the meta-policy
            agent.inner.start(agent.train_tasks, torch.arange(agent.inner.n, device=device), None, {})
        learn_model() if step <= args.model_steps else learn_policy()
        if step % args.eval_every == 0 or step in (args.model_steps, total):
            check_finite(agent, run, rows)
            returns = unless_diverged(evaluate, args, agent, world) if step > args.model_steps else {}
            rows.append(summarise(step, time.time() - began, agent, step - last, returns))
            agent.metrics.zero_()
            last = step
            write_metrics(run, rows)
            if returns:
                plot_curve(run, args, rows, world)
            if returns and not args.single:
                plot_adaptation(run, args, returns, world)
            save(run, step, time.time() - began, args, agent, optimisers, rows, world)
            report(rows[-1], world, total)
    write_final(run, args, rows, world, time.time() - began)
    print(f"curves, metrics and checkpoint: {run}")


def load_policy(args, policy, world):
    """The last policy of another run with --single is the meta-policy. If that learned from other data, its first layer
    is made to take observations that are standardised as here."""
    try:
        checkpoint = data.read(args.meta_policy / "checkpoint.pt", world.mean.device)
        stored, env = checkpoint["agent"], checkpoint["args"]["env"]
        policy.load_state_dict({key: stored[f"inner.actor.{key}"] for key in policy.state_dict()})
        mean, std = scale = checkpoint["standardisation"]
        if data.kind(scale) != data.kind([world.mean, world.std]) or not torch.stack(scale).isfinite().all():
            raise ValueError
        first = policy.net.layers[0]
        with torch.no_grad():  # what it saw: (world.std s + world.mean - mean) / std
            first.bias += (world.mean - mean) / std @ first.weight
            first.weight *= (world.std / std)[:, None]
    except Exception as error:
        fail(f"--meta-policy {args.meta_policy}: not a run with --single of the same sizes ({type(error).__name__})")
    if env != args.env:
        fail(f"--meta-policy {args.meta_policy}: of {env!r:.80}, expected of {args.env}")


def report(row, world, total):
    best = f" of {world.optimum:.2f}" if world.optimum is not None else ""
    behaviour = f", data {world.behaviour:.2f}" if world.behaviour is not None else ""
    rate = row["step"] / max(row["seconds"], 0.1)
    first = math.isnan(row["return_mean"])
    shown = (
        f"model loss {row['model_loss']:7.2f}"
        if first
        else (
            f"test return {row['return_mean']:8.2f}{best}  (meta-policy {row['meta_return_mean']:.2f}{behaviour})  "
            f"Q {row['q_mean']:.1f}  beta {row['beta']:.2f}  lambda {row['lambda']:.1f}"
        )
    )
    left = f"{rate:.1f} steps/s  {(total - row['step']) / rate / 60:.1f} min left"
    print(f"step {row['step']:>6}/{total}  stage {1 if first else 2}  {shown}  {left}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; --resume goes on from the last checkpoint", 130)
