"""SMAC: offline meta-reinforcement learning with online self-supervision (Pong et al.; ICML 2022; arXiv:2107.03974).

Given datasets D_i of training tasks T_i (Algorithm 1; numbers in brackets are the paper's equations):
    offline, repeat: draw tasks; for each task, two histories h, h' from D_i
        z ~ q_phi(z | h), the product of one Gaussian for each (s, a, r) of h
        w     <- descend the Bellman error on h' given z (1)                      no entropy; z is detached
        theta <- ascend log pi(a | s, z), weighed by exp(advantage / lambda) (2)  AWAC; the weights are detached
        phi   <- descend the error of the decoded rewards of h' + KL(q || N(0, I)) (3): encoder and decoder
    self-supervised, repeat: roll out pi(. | s, z), z from the prior, in a training task, without any reward
        label the trajectory by the decoder (4) with z ~ q_phi of an OFFLINE history of D_i; append it to D_i
        w, theta as above, the actor also by PEARL's loss; h and h' now hold the labelled trajectories too
At meta-test time the agent explores for two episodes with z from the prior, then acts on its posterior.

    python smac.py --env cheetah-vel --small    # data 59 core-minutes, then 12: -216 offline, -128 in the end

Where we differ from the paper:
- Data are the last rows of the early replay of one SAC agent for each task, in the paper's sizes (with `--small` on
  MuJoCo those of half-trained policies); the paper's are one PEARL run's, on cheetah-vel its first. (`--from-nothing`
  runs that, `--save-replay` keeps its buffers as a dataset.) One buffer serves contexts and RL; the encoder's buffer is
  its last 400 offline rows and what is collected.
- Line 8 of Algorithm 1 labels by any D_i; here by that of the task rolled out, whose dynamics may differ from others'
  (a test task's trajectory, `--online-tasks test`, by some training task's). An oracle is this script with true rewards
  online, the paper's is PEARL with them. z is drawn once an episode (`--z-every step`: line 7's once a step).
- A bare exp in (2) overflows: the weights are N softmax(advantage / lambda) over the meta-batch; V at s, not s'.
- Observations are standardised and kept within ten standard deviations: half-trained humanoids hardly bend a knee, and
  without the bound labels and Q went far too high once the agent did. (Elsewhere hardly a number reaches it.)
- Contexts hold the rewards that are learned from, dense ones on the sparse point robot.
- `--from-nothing` is PEARL with (1) for its critic, so without the entropy in the target; its KL has this script's
  weight, not PEARL's 0.1, contexts come from all that was collected, which is all on z of the prior (but for
  `--posterior-share`), and observations are as they are.
What we learned: where (s, a) alone predicts the reward (near-expert data, humanoids) q collapses to the prior; what an
encoder that stands still cannot read from the agent's own paths (point robots) no labelling brings back.
"""

from __future__ import annotations

import argparse
import copy
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
# Table 2 of the paper (the sizes of its datasets: transitions of each training task; its "AWR beta" is Eq. 2's lambda).
# On cheetah-vel the encoder's buffer stays offline (appendix C.2).
# Families that are not in the paper take the cheetah's row but for its contexts, point robots a discount for their
# shorter horizon, a larger scale for their smaller rewards, and SAC's first rows, since it is an expert by the last.
TABLE = {
    "sparse-point-robot": {"data_size": 1600, "data_until": 1600, "discount": 0.9, "reward_scale": 100},
    "point-robot-wind": {"data_size": 1600, "data_until": 1600, "discount": 0.9, "reward_scale": 100},
    "cheetah-vel": {"data_size": 1600, "train_tasks": 100, "test_tasks": 30, "online_contexts": "offline"},
    "cheetah-fwd-back": {"data_size": 1600, "meta_batch_size": 2, "eval_episodes": 8},
    "ant-fwd-back": {"data_size": 1600, "meta_batch_size": 2, "eval_episodes": 8},
    "ant-dir": {"data_size": 1600},
    "walker-params": {"data_size": 1200, "train_tasks": 50, "test_tasks": 5},
    "hopper-params": {"data_size": 1200},
    "humanoid-dir": {"data_size": 1200},
    "sawyer": {"data_size": 3750, "context_data": 3750, "reward_scale": 1, "awac_lambda": 0.3, "pearl_weight": 0},
}
TABLE["sawyer"] |= {"quality": "mixed"}  # one buffer for contexts and RL; the script's data have no other quality
# --small: what differs on a machine without a GPU. (Beside batches of 128, the KL has half of Eq. 3's weight; sawyer's
# discount, target and KL were chosen on seed 0, and so were online contexts on cheetah-vel too.)
SMALL_NETWORKS = {"hidden": 128, "encoder_hidden": 64, "batch_size": 128, "tau": 0.01, "lr": 1e-3, "final_lr": 0.1}
SMALL_NETWORKS |= {"threads": 1, "train_tasks": None, "test_tasks": None}
SMALL_POINT = SMALL_NETWORKS | {"hidden": 64, "steps": 6_000, "eval_every": 2_000, "eval_episodes": 4}
SMALL_POINT |= {"online_steps": 40_000, "updates": 0.2}
SMALL_MUJOCO = SMALL_NETWORKS | {"steps": 10_000, "online_steps": 60_000, "updates": 0.33, "eval_every": 5_000}
SMALL_MUJOCO |= {"quality": "medium", "online_contexts": "all"}
SMALL = {name: SMALL_MUJOCO if envs.family(name).xml else SMALL_POINT for name in TABLE}
# Two tasks' half-way policies visit states of their own, by which the decoder knows the task: z goes to the prior.
SMALL_TWO = SMALL_MUJOCO | {"quality": "mixed"} | dict.fromkeys(["data_size", "data_until", "context_data"], 10_000)
SMALL |= {"cheetah-fwd-back": SMALL_TWO, "ant-fwd-back": SMALL_TWO}
SMALL["ant-dir"] = SMALL_MUJOCO | {"train_tasks": 40, "test_tasks": 10}  # ants take long to learn to walk
SMALL["sawyer"] = SMALL_MUJOCO | {"quality": "mixed", "steps": 8_000, "online_steps": 40_000, "eval_every": 4_000}
SMALL["sawyer"] |= {"discount": 0.95, "tau": 0.02, "kl_weight": 0.0005, "eval_episodes": 2}


# What does not change the result of a run (but for rounding), or is in its path anyway.
ELSEWHERE = {"env", "small", "seed", "device", "data_dir", "run_dir", "resume", "no_graph", "threads", "save_replay"}
GROWS = {"variant"}  # may differ from that of the checkpoint that a run goes on from; its phases begin at their steps


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
    for key in ("quality", "test_quality", "data_seed", "train_tasks", "test_tasks"):
        if args.data and getattr(args, key) != parser.get_default(key):
            flag = f"--{key.replace('_', '-')} {getattr(args, key)}"
            fail(f"{flag}: --data has the data of all tasks; expected one or the other")
    args.test_quality = args.test_quality or args.quality
    check_pearl(args, parser)
    if args.online_rewards == "none":
        args.online_steps = 0
    if args.steps + args.online_steps == 0:
        fail("--steps, --online-steps: nothing to do; expected at least one of them above 0")
    if args.updates * args.online_steps >= 2**32:
        fail(f"--updates {args.updates}: expected fewer than 2^32 gradient steps in all")
    if args.save_replay and not args.save_replay.parent.is_dir():
        fail(f"--save-replay {args.save_replay}: there is no such folder; expected one that exists")
    if args.from_nothing and args.online_envs < args.meta_batch_size:
        fail(f"--online-envs {args.online_envs}: no data for a meta-batch; expected at least {args.meta_batch_size}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device was found; expected one, or --device cpu")
    return args


def check_pearl(args, parser):
    """What --from-nothing fixes, and what only it has."""
    if args.from_nothing:  # PEARL
        pearl = {"online_rewards": "oracle", "actor": "sac", "encoder_loss": "q", "online_tasks": "train"}
        pearl |= {"obs_bound": 1e30, "data": None}
        pearl |= {"steps": 0, "online_contexts": "all"}
        pearl |= {key: parser.get_default(key) for key in ("quality", "data_size", "data_until")}  # there are no data
        for key, value in pearl.items():
            if getattr(args, key) not in (value, parser.get_default(key)):
                fail(f"--{key.replace('_', '-')}: --from-nothing is PEARL; expected {value}, or nothing")
        vars(args).update(pearl)
    elif args.save_replay:
        fail("--save-replay: keeps what PEARL collects; expected --from-nothing too")


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
    add("--steps", type=natural, default=50_000, help="gradient steps of the offline phase")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="where the networks and the data are")
    add("--threads", type=natural, default=0, help="PyTorch's threads on the CPU; 0: one for each core")
    add("--data", type=Path, default=None, metavar="FILE", help="a dataset of your own (.npz, see data.py)")
    add("--data-dir", type=Path, default=Path("datasets"), help="where datasets are kept and built")
    add("--data-seed", type=natural, default=0, help="seed of the tasks and of their datasets")
    add("--quality", choices=data.QUALITIES, default="replay", help="quality of the training tasks' data")
    add("--test-quality", choices=data.QUALITIES, default=None, help="of the test tasks' data; unless given: --quality")
    add("--eval-every", type=whole, default=10_000, help="gradient steps between evaluations")
    add("--eval-episodes", type=whole, default=1, help="meta-episodes of each task in an evaluation")
    add("--run-dir", type=Path, default=Path("runs"), help="where runs are kept")
    add("--resume", action="store_true", help="go on from the run's checkpoint, if there is one")
    add("--no-graph", action="store_true", help="on CUDA: run every operation by itself instead of one graph")
    add("--hidden", type=whole, default=300, help="width of the actor and the critics")
    add("--meta-batch-size", type=whole, default=4, help="tasks in a gradient step")
    add("--batch-size", type=whole, default=256, help="transitions of each task in a gradient step")
    add("--context-size", type=whole, default=64, help="transitions in a context")
    add("--lr", type=number, default=3e-4, help="learning rate of every network")
    add("--final-lr", type=share, default=1.0, help="its share that is left at the last step; it falls linearly")
    add("--tau", type=share, default=0.005, help="rate of the slow target")
    add("--discount", type=share, default=0.99, help="discount factor")
    add("--reward-scale", type=number, default=5.0, help="multiplies rewards in the critic's target only")


def algorithm_arguments(add):
    add("--train-tasks", type=whole, default=None, help="number of training tasks; None: the family's")
    add("--test-tasks", type=whole, default=None, help="number of test tasks; None: the family's")
    add("--data-size", type=whole, default=1600, help="transitions of each task")
    add("--data-until", type=whole, default=None, help="row of the dataset after which they end; None: the last")
    add("--context-data", type=whole, default=400, help="of them, the last ones, contexts are drawn from these")
    add("--latent", type=whole, default=5, help="size of z")
    add("--encoder-hidden", type=whole, default=200, help="width of the task encoder")
    add("--encoder-loss", choices=["reward", "q", "reward+q"], default="reward",
        help="what trains the encoder offline; with q in it the critic's loss goes on online (Figure 7)")  # fmt: skip
    add("--kl-weight", type=number, default=1 / 256, help="of the KL in Eq. 3, whose sum over 256 rows is a mean here")
    add("--actor", choices=["awac", "sac", "bc"], default="awac", help="sac, bc: the paper's ablations")
    add("--awac-lambda", type=positive, default=100.0, help="temperature lambda of Eq. 2")
    add("--pearl-weight", type=number, default=1.0, help="lambda_pearl, of PEARL's actor loss in the online phase")
    add("--online-rewards", choices=["decoder", "oracle", "none"], default="decoder", help="none: no online phase")
    add("--online-steps", type=natural, default=250_000, help="environment steps of the online phase")
    add("--online-envs", type=whole, default=25, help="trajectories collected side by side")
    add("--online-tasks", choices=["train", "test"], default="train", help="where they are collected (Figure 9)")
    add("--online-contexts", choices=["all", "offline"], default="all", help="rows that online contexts come from")
    add("--updates", type=positive, default=4.0, help="gradient steps for each environment step of the online phase")
    add("--z-every", choices=["episode", "step"], default="episode", help="when exploration draws z from the prior")
    add("--posterior-share", type=share, default=0.0, help="of the trajectories that act on the posterior instead")
    add("--obs-bound", type=positive, default=10.0, help="observations are kept within so many standard deviations")
    add("--from-nothing", action="store_true", help="PEARL: no data and no offline phase, true rewards online")
    add("--save-replay", type=Path, default=None, metavar="FILE", help="write the buffers as a dataset (.npz)")


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

    def sample(self, s, z):
        """An action (..., m) that carries gradients, and its log density (...)."""
        return sample_tanh_gaussian(*self(s, z))


def sample_tanh_gaussian(mean, log_std):
    """tanh(u), u ~ N(mean, std), by reparameterisation, and its log density."""
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return torch.tanh(u), (log_normal - log_det).sum(-1)


def gaussian_kl(mean, variance):
    """KL(N(mean, variance), N(0, I)), summed over the last axis."""
    return 0.5 * (variance + mean.square() - 1 - variance.log()).sum(-1)


class Critic(nn.Module):
    """Q(s, z, a), two of them as one batch: (..., d) -> (2, ...)."""

    def __init__(self, obs_dim, latent, act_dim, hidden):
        super().__init__()
        self.net = mlp(obs_dim + latent + act_dim, hidden, 1, lambda a, b: BatchedLinear(2, a, b))

    def forward(self, s, z, a):
        x = torch.cat([s, z, a], -1)
        rows = x.flatten(0, -2)
        return self.net(rows.expand(2, *rows.shape)).view(2, *x.shape[:-1])


class Decoder(nn.Module):
    """r(s, a, z), two hidden layers: (..., d) -> (...)."""

    def __init__(self, obs_dim, latent, act_dim, hidden=64):
        super().__init__()
        sizes = obs_dim + act_dim + latent, hidden
        first, second, last = nn.Linear(*sizes), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

    def forward(self, s, z, a):
        return self.net(torch.cat([s, a, z], -1)).squeeze(-1)


# ================================================================================================= 3. task encoder
class Encoder(nn.Module):
    """q_phi(z | h): the product of one Gaussian factor for each (s, a, r) of a history (M, B, d)."""

    def __init__(self, d_in, hidden, latent):
        super().__init__()
        self.net = mlp(d_in, hidden, 2 * latent)

    def forward(self, history, counted=None):
        """Mean and variance (M, l) of the posterior; `counted` (M, B) is 1 for rows that are there, 0 for padding."""
        mean, spread = self.net(history).chunk(2, -1)
        precision = 1 / F.softplus(spread).clamp_min(1e-4).square()  # softplus gives the standard deviation
        if counted is not None:
            precision = precision * counted[..., None]
        # prod_b N(mu_b, sigma_b^2) is a Gaussian of precision sum_b 1 / sigma_b^2
        variance = 1 / precision.sum(1)
        return variance * (precision * mean).sum(1), variance


def sample(mean, variance):
    """z by reparameterisation."""
    return mean + variance.sqrt() * torch.randn_like(mean)


# ======================================================================================================= 4. losses
def reward_loss(r, decoded):
    """The sum of Eq. 3 as a mean: (r - r_phi(s, a, z))^2, r and decoded (N,)."""
    return (r - decoded).square().mean()


def critic_target(r, done, q_next, reward_scale, discount):
    """y of Eq. 1, without entropy; q_next (2, N) of the slow target at a' ~ pi(. | s', z)."""
    # reward_scale r + gamma (1 - done) min Qbar(s', a', z), the lower of twins, where Eq. 1 has one Q
    return reward_scale * r + discount * (1 - done) * q_next.amin(0)


def critic_loss(q, y):
    """Eq. 1: (Q(s, a, z) - y)^2, mean over rows, sum over the twins; q (2, N), y (N,)."""
    return (q - y).square().mean(1).sum()


def log_density(mean, log_std, a):
    """log pi(a | s, z) (N,) of a tanh-Gaussian at given actions (N, m), which are kept off the rim."""
    u = torch.atanh(a.clamp(-1 + 1e-6, 1 - 1e-6))
    log_normal = -0.5 * ((u - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return (log_normal - log_det).sum(-1)


def awac_loss(log_pi, q_data, q_pi, temperature):
    """Eq. 2: -log pi(a | s, z) exp((Q(s, a, z) - V(s, z)) / lambda), V by one sample; log_pi (N,), q (2, N).

    The exponentials are divided by their mean over the N rows, so that they cannot overflow; no gradient passes them.
    """
    advantage = (q_data.amin(0) - q_pi.amin(0)).detach()
    weight = len(advantage) * torch.softmax(advantage / temperature, 0)
    return -(log_pi * weight).mean()


def pearl_loss(log_pi, q_pi):
    """PEARL's actor loss (appendix C.3): log pi(a|s, z) - min Q(s, a, z), a ~ pi; log_pi (N,), q_pi (2, N)."""
    return (log_pi - q_pi.amin(0)).mean()


# ======================================================================================================= 5. update
class Replay(nn.Module):
    """The buffers D_i: rows s, a, r, s', d of every task, offline data first, then what is collected online."""

    def __init__(self, rows, tasks, capacity):
        super().__init__()
        n, count, width = rows.shape
        self.register_buffer("rows", torch.zeros(tasks, count + capacity, width, device=rows.device))
        self.rows[:n, :count] = rows
        held = torch.zeros(tasks, dtype=torch.long, device=rows.device)
        held[:n] = count
        self.register_buffer("offline", held)  # how many rows of a buffer are offline data
        self.register_buffer("filled", held.clone())  # how many there are

    def append(self, task, rows):
        """Trajectories (E, H, D) to the ends of the buffers task (E,)."""
        earlier = (task[:, None] == task[None]).tril(-1).sum(1)  # trajectories of the same task before this one
        place = (self.filled[task] + earlier * rows.shape[1])[:, None] + torch.arange(rows.shape[1], device=task.device)
        self.rows[task[:, None], place] = rows
        self.filled.index_add_(0, task, torch.full_like(task, rows.shape[1]))

    def draw(self, task, size, held, part=None):
        """(M, size, D) rows, drawn uniformly from the first held (n,) of each task's buffer; with `part` only from its
        last so many offline rows and what was collected: the paper's buffer of the encoder."""
        first = torch.zeros_like(held) if part is None else (self.offline - part).clamp_min(0)
        share = torch.rand(len(task), size, device=task.device, dtype=torch.float64)
        index = (first[task, None] + share * (held - first)[task, None]).long()
        index += task[:, None] * self.rows.shape[1]
        return self.rows.view(-1, self.rows.shape[2]).index_select(0, index.flatten()).unflatten(0, index.shape)


class Agent(nn.Module):
    """Every network of the algorithm, and what else its update keeps."""

    METRICS = ("reward_loss", "encoder_kl", "critic_loss", "actor_loss", "log_density", "q_mean")

    def __init__(self, args, obs_dim, act_dim, rows, tasks, capacity):
        super().__init__()
        sizes = obs_dim, args.latent, act_dim
        self.encoder = Encoder(obs_dim + act_dim + 1, args.encoder_hidden, args.latent)
        self.decoder = Decoder(*sizes)
        self.actor, self.critic = Actor(*sizes, args.hidden), Critic(*sizes, args.hidden)
        self.target = Critic(*sizes, args.hidden).requires_grad_(False)
        self.target.load_state_dict(self.critic.state_dict())
        # the encoder at the end of the offline phase: it labels, even where the encoder goes on learning (Figure 7)
        self.labeller = copy.deepcopy(self.encoder).requires_grad_(False)
        self.replay = Replay(rows, tasks, capacity)
        self.split = [obs_dim, act_dim, 1, obs_dim, 1]  # widths of the parts of a row
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))
        self.register_buffer("metrics", torch.zeros(len(self.METRICS)))  # sums since the last evaluation
        self.register_buffer("bad_step", torch.full((len(self.METRICS),), math.inf, dtype=torch.float64))

    def history(self, rows):
        """What the encoder sees of rows (..., D): s, a, r."""
        return rows[..., : sum(self.split[:3])]

    @torch.no_grad()
    def label(self, task, rows, size, part):
        """Rewards (E, H) for trajectories (E, H, D) of tasks (E,), whose own are not looked at (Eq. 4).

        r = r_phi(s, a, z), z ~ q_phi(z | h), h from the offline rows of the task's buffer, one z for a trajectory.
        """
        z = sample(*self.labeller(self.history(self.replay.draw(task, size, self.replay.offline, part))))
        s, a = rows.split(self.split, -1)[:2]
        return self.decoder(s, z[:, None].expand(-1, rows.shape[1], -1), a)

    def act(self, s, z, explore=False):
        """The action (N, m): the policy's mean, or a sample."""
        return self.actor.sample(s, z)[0] if explore else torch.tanh(self.actor(s, z)[0])

    def record(self, **values):
        """Adds to the sums, and notes the first step at which a value was not finite, without looking at it."""
        zero = torch.zeros_like(self.metrics[0])
        values = torch.stack([values.get(name, zero).float() for name in self.METRICS])
        self.metrics += values
        self.bad_step.copy_(torch.where(values.isfinite(), self.bad_step, self.bad_step.minimum(self.step)))


def make_optimisers(args, agent, device):
    def adam(module):
        lr = torch.tensor(args.lr, device=device)  # a tensor, so that a captured graph can change it
        return torch.optim.Adam(module.parameters(), lr=lr, fused=True, capturable=device.type == "cuda")

    return {name: adam(getattr(agent, name)) for name in ("encoder", "decoder", "critic", "actor")}


def step_down(optimiser, loss):
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def make_update(args, agent, optimisers):
    """update(): one gradient step of every network that learns. It never waits for the device."""
    replay, total = agent.replay, args.steps + online_updates(args)

    def tasks():
        """A meta-batch of distinct tasks, of those that have data."""
        chance = torch.rand(len(replay.filled), device=replay.rows.device) + (replay.filled == 0)
        return chance.argsort()[: args.meta_batch_size]

    def update(online=False):
        agent.step += 1
        if args.final_lr != 1:
            rate = 1 - (1 - args.final_lr) * (agent.step / total).clamp_max(1)
            for optimiser in optimisers.values():
                optimiser.param_groups[0]["lr"].copy_(args.lr * rate)
        # true rewards train encoder and decoder: offline ones, and the oracle's
        taught = not online or args.online_rewards == "oracle"
        by_reward, by_q = taught and "reward" in args.encoder_loss, "q" in args.encoder_loss
        # Algorithm 1, lines 3 and 4 (10 and 11 online): histories h and h' from D_i, z ~ q_phi(z | h)
        task = tasks()
        held = replay.filled
        if online and args.online_contexts == "offline":  # where there are any: an oracle's test tasks have none
            held = torch.where(replay.offline > 0, replay.offline, replay.filled)
        h = agent.history(replay.draw(task, args.context_size, held, args.context_data))
        s, a, r, s2, d = replay.draw(task, args.batch_size, replay.filled).flatten(0, 1).split(agent.split, -1)
        r, d = r[:, 0], d[:, 0]
        with torch.set_grad_enabled(by_reward or by_q):
            mean, variance = agent.encoder(h)
            kl = gaussian_kl(mean, variance).mean()
            z = sample(mean, variance).repeat_interleave(args.batch_size, 0)  # (M x B, l)
        log = {"encoder_kl": kl.detach()}
        if by_reward or by_q:
            optimisers["encoder"].zero_grad()
            (args.kl_weight * kl).backward(retain_graph=True)
        if taught:
            loss = reward_loss(r, agent.decoder(s, z if by_reward else z.detach(), a))  # Eq. 3
            optimisers["decoder"].zero_grad()
            loss.backward(retain_graph=by_q)
            optimisers["decoder"].step()
            log["reward_loss"] = loss.detach()
        q = critic_backward(s, a, r, s2, d, z if by_q else z.detach(), log)
        if by_reward or by_q:
            optimisers["encoder"].step()
        learn_actor(s, a, z.detach(), q, online, log)
        optimisers["critic"].step()  # only now: an advantage is the difference of two values of one critic
        with torch.no_grad():
            torch._foreach_lerp_(list(agent.target.parameters()), list(agent.critic.parameters()), args.tau)
            agent.record(**log)

    def critic_backward(s, a, r, s2, d, z, log):
        """Q(s, a, z), and the gradient of the critic's loss, with which it steps only after the actor."""
        with torch.no_grad():
            q2 = agent.target(s2, z, agent.actor.sample(s2, z)[0])
            y = critic_target(r, d, q2, args.reward_scale, args.discount)
        q = agent.critic(s, z, a)
        loss = critic_loss(q, y)  # Eq. 1
        optimisers["critic"].zero_grad()
        loss.backward()
        log |= {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}
        return q.detach()

    def learn_actor(s, a, z, q, online, log):
        agent.critic.requires_grad_(False)
        policy = agent.actor(s, z)
        log_density_data = log_density(*policy, a)
        pearl = args.actor == "sac" or (args.actor == "awac" and online and args.pearl_weight > 0)
        if args.actor != "bc":
            with torch.set_grad_enabled(pearl):
                a_pi, log_pi = sample_tanh_gaussian(*policy)
                q_pi = agent.critic(s, z, a_pi)
        loss = 0
        if args.actor == "awac":
            loss = awac_loss(log_density_data, q, q_pi, args.awac_lambda)  # Eq. 2
        if args.actor == "bc":
            loss = -log_density_data.mean()
        if pearl:
            loss = loss + (args.pearl_weight if args.actor == "awac" else 1) * pearl_loss(log_pi, q_pi)
        step_down(optimisers["actor"], loss)
        agent.critic.requires_grad_(True)
        log |= {"actor_loss": loss.detach(), "log_density": log_density_data.detach().mean()}

    return update


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


def pack(dataset, tasks, scaled, part):
    """The rows of each task in the slice `part`, (n, N, D): s, a, r, s', d; observations `scaled`."""
    s, s2 = (scaled(obs[tasks, part]) for obs in (dataset.observations, dataset.next_observations))
    r, d = (column[tasks, part, None] for column in (dataset.rewards, dataset.terminals))
    return torch.cat([s, dataset.actions[tasks, part], r, s2, d], -1)


def data_return(dataset, tasks, part):
    """Mean return of the episodes that begin in these rows of these tasks; None if there are none."""
    task, place, total = data.episode_returns(dataset)
    row = place * (dataset.rewards.shape[1] - 1) + 0.5
    seen = np.isin(task, tasks) & (row >= part.start) & (row < part.stop)
    return float(total[seen].mean()) if seen.any() else None


class World:
    """The tasks, their offline data as packed rows, and a sub-environment for each meta-episode of an evaluation."""

    def __init__(self, args, device):
        self.row = envs.family(args.env)
        row = self.row
        self.behaviour, self.optimum, self.checksum, self.bound = None, None, [], args.obs_bound
        if args.from_nothing:
            n, k = (len(row.only),) * 2 if row.only else (args.train_tasks or row.train, args.test_tasks or row.test)
            tasks = envs.sample_tasks(args.env, n if row.only else n + k, args.data_seed)
            self.train_tasks, self.test_tasks = tasks[:n], tasks[-k:]
            self.mean, self.std = torch.zeros(row.obs_dim, device=device), torch.ones(row.obs_dim, device=device)
            width = 2 * row.obs_dim + row.act_dim + 2
            self.train_rows, self.test_rows = (torch.zeros(n, 0, width, device=device) for n in (n, k))
        else:
            train = open_data(args, args.quality, device)
            test = open_data(args, args.test_quality, device) if args.test_quality != args.quality else train
            until = args.data_until or train.rewards.shape[1]
            part = slice(until - args.data_size, until)
            for dataset in (train, test):
                if part.start < 0 or part.stop > dataset.rewards.shape[1]:
                    found = f"found {dataset.rewards.shape[1]} rows a task"
                    fail(f"--data-size, --data-until: expected {args.data_size} rows up to row {until}, {found}")
            self.train_tasks, self.test_tasks = train.tasks[train.train_tasks], test.tasks[test.test_tasks]
            self.mean, self.std = standardisation(train.observations[train.train_tasks, part])
            self.train_rows = pack(train, train.train_tasks, self.scaled, part)
            self.test_rows = pack(test, test.test_tasks, self.scaled, part)
            self.behaviour = data_return(test, test.test_tasks, part)
            self.checksum = [train.meta["checksum"], test.meta["checksum"]]
        self.seen = np.arange(min(len(self.train_tasks), len(self.test_tasks)))  # training tasks that are evaluated
        tasks = np.concatenate([self.train_tasks[self.seen], self.test_tasks])
        self.env = envs.make(args.env, tasks.repeat(args.eval_episodes, axis=0), seed=args.seed)
        if row.optimum:
            self.optimum = float(row.optimum(self.test_tasks, row.horizon).mean())

    def scaled(self, obs):
        """Observations (..., d) in standard deviations from the training tasks' mean, kept within --obs-bound."""
        obs = (torch.as_tensor(obs, dtype=torch.float32).to(self.mean.device) - self.mean) / self.std
        return obs.clamp(-self.bound, self.bound)


def open_data(args, quality, device):
    """The dataset of this quality, built on the spot if it is missing; tensors on the device."""
    path = args.data or data.prepare(
        args.env,
        quality,
        seed=args.data_seed,
        data_dir=args.data_dir,
        device=args.device,
        train=args.train_tasks,
        test=args.test_tasks,
    )
    return data.load(path, env=args.env, device=device)


@torch.no_grad()
def play(agent, world, env, z, seed, explore=False, redraw="", kept=None):
    """One trajectory of `horizon` steps in every sub-environment, acting on z (B, l).

    Returns rows (B, H, D) with the rewards that `env` gives, whether each row comes before the first end of an episode
    (B, H), the return up to there (B,), and whether the physics held (B,).

    Where an episode ends early the next begins, with a new z from the prior if `redraw` is "episode"; "step" draws one
    at every step. Not so where z is `kept` (B,).
    """
    device, obs = z.device, env.reset(seed=seed)[0]
    rows, counted, alive, total = [], [], np.ones(len(obs), bool), np.zeros(len(obs))
    sound = np.ones(len(obs), bool)
    for _ in range(env.horizon):
        action = agent.act(world.scaled(obs), z, explore).cpu()
        following, reward, terminated, truncated, info = env.step(action.numpy())
        ended = terminated | truncated
        after = np.where(ended[:, None], info.get("final_obs", following), following)
        columns = (torch.as_tensor(x[:, None], dtype=torch.float32, device=device) for x in (reward, terminated))
        r, d = columns
        rows.append(torch.cat([world.scaled(obs), action.to(device), r, world.scaled(after), d], -1))
        counted.append(alive & ~info["blew_up"])
        total += alive * info.get("sparse_reward", reward)  # sparse-point-robot reports the sparse return
        alive &= ~ended
        sound &= ~info["blew_up"]
        if redraw == "step" or (redraw == "episode" and ended.any()):
            new = torch.as_tensor(ended | (redraw == "step"), device=device)
            new = new if kept is None else new & ~kept
            z = torch.where(new[:, None], torch.randn_like(z), z)
        obs = following
    counted = torch.as_tensor(np.stack(counted, 1), device=device)
    return torch.stack(rows, 1), counted, total, torch.as_tensor(sound, device=device)


@torch.no_grad()
def evaluate(args, agent, world):
    """Both protocols on the test tasks and on as many training tasks; each (task, meta-episode) is a sub-environment.

    *Online*: two episodes with z from the prior, then one that acts on the posterior of all their transitions (and one
    on the posterior of as many as contexts hold in training). *Offline*: z from a context of the task's own data. The
    deterministic action is scored. What is drawn is the same at every evaluation and takes nothing from the run's own
    random numbers.
    """
    e, device, horizon = args.eval_episodes, world.mean.device, world.env.horizon
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(args.seed)
        prior = lambda: torch.randn(world.env.num_envs, args.latent, device=device)
        first = play(agent, world, world.env, prior(), args.seed + 1, redraw=args.z_every)
        second = play(agent, world, world.env, prior(), args.seed + 2, redraw=args.z_every)
        h, counted = (torch.cat([x, y], 1) for x, y in zip(first[:2], second[:2], strict=True))
        h, counted = agent.history(h), counted.float()
        again = args.context_size > 2 * horizon  # as many as in training, even where there are fewer
        index = torch.multinomial(counted.clamp_min(1e-9), args.context_size, replacement=again)
        some = h.gather(1, index[..., None].expand(-1, -1, h.shape[-1])), counted.gather(1, index)
        posteriors = {"": agent.encoder(h, counted), "short_": agent.encoder(*some)}
        if world.train_rows.shape[1]:
            own = torch.cat([world.train_rows[world.seen], world.test_rows])[:, -args.context_data :]
            own = own.repeat_interleave(e, 0)
            index = torch.randint(own.shape[1], (len(own), args.context_size, 1), device=device)
            posteriors["offline_"] = agent.encoder(agent.history(own.gather(1, index.expand(-1, -1, own.shape[-1]))))
        result = {"prior_": {"return": first[2], "path": first[0], "counted": first[1]}}
        for name, (mean, variance) in posteriors.items():
            rows, alive, total, _ = play(agent, world, world.env, sample(mean, variance), args.seed)
            kl = gaussian_kl(mean, variance).cpu().numpy()
            result[name] = {"return": total, "path": rows, "counted": alive, "kl": kl, "z": mean.cpu()}
    n = len(world.seen)
    split = lambda x: (x.reshape(-1, e, *x.shape[1:])[:n], x.reshape(-1, e, *x.shape[1:])[n:])
    return {name: {key: split(x) for key, x in values.items()} for name, values in result.items()}  # (train, test)


# ------------------------------------------------------------------------------- the online phase, lines 6 to 9
def online_updates(args):
    return iterations(args) * updates_each(args)


def iterations(args):
    return math.ceil(args.online_steps / (args.online_envs * envs.family(args.env).horizon))


def updates_each(args):
    return max(1, round(args.updates * args.online_envs * envs.family(args.env).horizon))


def schedule(args, n, stream):
    """(iterations, E) tasks below n: a random order of all, then another one, and so on."""
    wanted = iterations(args) * args.online_envs
    orders = [np.random.default_rng([args.seed, i, stream]).permutation(n) for i in range(math.ceil(wanted / n))]
    return np.concatenate([*orders, np.zeros(0, int)])[:wanted].astype(int).reshape(-1, args.online_envs)


def capacity(args, n):
    """Rows that the online phase can add to one of n buffers."""
    return math.ceil(iterations(args) * args.online_envs / n) * envs.family(args.env).horizon


@torch.no_grad()
def collect(args, agent, world, iteration):
    """Lines 7 to 9: trajectories with z from the prior, labelled by the buffers of their tasks and appended to them (in
    test tasks, whose buffers hold no rewards, by and to those of training tasks; an oracle's to their own).

    Unless rewards are the oracle's, the environment that acts here does not know any.
    """
    oracle, device = args.online_rewards == "oracle", world.mean.device
    buffers = schedule(args, len(world.train_tasks), 0)[iteration]
    tasks = world.train_tasks[buffers]
    if args.online_tasks == "test":
        chosen = schedule(args, len(world.test_tasks), 1)[iteration]
        tasks = world.test_tasks[chosen]
        buffers = len(world.train_tasks) + chosen if oracle else buffers
    env = envs.make(args.env, tasks, rewards=oracle)
    buffers = torch.as_tensor(buffers, device=device)
    z = torch.randn(len(tasks), args.latent, device=device)
    informed = torch.arange(len(tasks), device=device) < round(args.posterior_share * len(tasks))
    informed &= agent.replay.filled[buffers] > 0
    history = agent.history(agent.replay.draw(buffers, args.context_size, agent.replay.filled, args.context_data))
    z = torch.where(informed[:, None], sample(*agent.encoder(history)), z)
    seed = 1_000_003 * args.seed + iteration
    rows, _, _, sound = play(agent, world, env, z, seed, explore=True, redraw=args.z_every, kept=informed)
    env.close()
    buffers, rows = buffers[sound], rows[sound]  # a trajectory in which the physics blew up is dropped
    if not oracle:
        rows[..., agent.split[0] + agent.split[1]] = agent.label(buffers, rows, args.context_size, args.context_data)
    agent.replay.append(buffers, rows)


# ================================================================================================ 7. plots and files
def summarise(step, online_steps, seconds, args, agent, count, result):
    """One row of metrics.csv: means of the losses since the last evaluation, returns and KLs of both protocols."""
    row = {"step": step, "online_steps": online_steps, "seconds": round(seconds, 1)}
    row |= dict(zip(agent.METRICS, (agent.metrics / max(1, count)).tolist(), strict=True))
    if online_steps and args.online_rewards != "oracle":
        row["reward_loss"] = math.nan  # the decoder does not learn
    for index, prefix in ((1, ""), (0, "train_")):
        for name in ("", "short_", "prior_", "offline_"):
            values = result.get(name)
            returns = values["return"][index] if values else np.full((1, 1), np.nan)
            row |= {f"{prefix}{name}return_mean": returns.mean(), f"{prefix}{name}return_std": returns.mean(1).std()}
        for name in ("", "short_", "offline_"):
            row[f"{prefix}{name}kl"] = result[name]["kl"][index].mean() if name in result else np.nan
    return {key: float(value) if key not in ("step", "online_steps") else value for key, value in row.items()}


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
    axes = figure.add_subplot(xlabel="gradient steps", ylabel="return", title=f"{Path(__file__).stem} on {args.env}")
    step = np.array([row["step"] for row in rows])
    kinds = ("offline_", "offline context", "tab:cyan"), ("", "online context", "tab:blue")
    for prefix, label, colour in (("train_", "training tasks, online context", "tab:gray"), *kinds):
        mean, std = (np.array([row[f"{prefix}return_{part}"] for row in rows]) for part in ("mean", "std"))
        axes.fill_between(step, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
        axes.plot(step, mean, color=colour, label=label)
    if 0 < args.steps < step[-1]:
        axes.axvline(args.steps, color="black", linewidth=0.6, label="the online phase begins")
    if world.behaviour is not None:
        axes.axhline(world.behaviour, color="tab:orange", linestyle=":", label="the test tasks' data")
    if world.optimum is not None:
        axes.axhline(world.optimum, color="tab:green", linestyle="--", label="optimum")
    axes.legend(fontsize="x-small", framealpha=0.8)
    data.write(run / "curve.png", lambda file: figure.savefig(file, dpi=130))


def plot_embeddings(run, world, z_train, z_test):
    """Embeddings of several contexts of each task on their first principal components (FOCAL's Figures 4a, 7); colour
    is the task's parameters on theirs, so where z tells tasks apart like colours lie together."""
    from matplotlib.figure import Figure

    tasks = world.env.tasks[:: len(world.env.tasks) // (len(z_train) + len(z_test))]
    hue = (tasks - tasks.mean(0)) @ np.linalg.svd(tasks - tasks.mean(0), full_matrices=False)[2][0]
    hues = hue[: len(z_train)], hue[len(z_train) :], hue[: len(z_train)]
    z_train, z_test = (F.pad(z, (0, max(0, 3 - z.shape[-1]))) for z in (z_train, z_test))  # three axes even for l = 1
    flat = torch.cat([z_train, z_test]).flatten(0, 1)
    centre = flat.mean(0)
    _, size, axes_3d = torch.linalg.svd((flat - centre).double(), full_matrices=False)
    share = size.square() / size.square().sum().clamp_min(1e-12)
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left = figure.add_subplot(1, 3, 1, ylabel=f"second component ({share[1]:.0%})" if len(share) > 1 else "")
    panels = [left, figure.add_subplot(1, 3, 2, sharex=left, sharey=left), figure.add_subplot(1, 3, 3, projection="3d")]
    titles = f"{len(z_train)} training tasks, by parameter", f"{len(z_test)} test tasks, same colours", "training tasks"
    for axes, z, own, title in zip(panels, (z_train, z_test, z_train), hues, titles, strict=True):
        point, dimensions = (z.double() - centre) @ axes_3d[:3].T, 3 if axes is panels[2] else 2  # (n, E, 3)
        colour = {"c": own.repeat(z.shape[1]), "vmin": hue.min(), "vmax": hue.max(), "cmap": "turbo"}
        axes.scatter(*point.flatten(0, 1).T[:dimensions], **colour, s=14, linewidths=0)
        axes.set(title=title)
        if dimensions == 2:
            axes.set_xlabel(f"first component ({share[0]:.0%})")
    data.write(run / "embeddings.png", lambda file: figure.savefig(file, dpi=130))


def plot_shift(run, name, result, world):
    """KL(q(z | h) || prior) for histories from both sources (Figure 2), and, where tasks live in the plane, the paths
    of exploration and of the policy on both contexts (Figures 6, 8); test tasks, a colour each, stars where to."""
    from matplotlib.figure import Figure

    plane = not world.row.xml or len(world.row.velocity) == 2
    names = {"prior_": "exploration", "short_": "on online contexts", "offline_": "on offline contexts"}
    found = {key: paths(result[key], world) for key in names if plane and key in result}
    figure = Figure(figsize=(4.2 * (1 + len(found)), 3.8), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(found), squeeze=False)[0]
    kls = {key: result[key]["kl"][1].ravel() for key in ("short_", "offline_") if key in result}
    bins = np.linspace(0, max(kl.max() for kl in kls.values()) * 1.02, 30)
    for key, kl in kls.items():
        left.hist(kl, bins, color="tab:orange" if key == "short_" else "tab:blue", alpha=0.5, label=names[key])
    left.set(title=name, xlabel="KL(q(z | h) || p(z))", ylabel="contexts of test tasks")
    left.legend(fontsize="small")
    for axes, (key, each) in zip(others, found.items(), strict=True):
        plot_paths(axes, each, np.concatenate([path for paths in found.values() for path in paths], 1), world)
        axes.set_title(names[key])
    data.write(run / f"shift-{name}.png", lambda file: figure.savefig(file, dpi=110))


def plot_paths(axes, found, points, world):
    """The paths `found` of the test tasks on axes that show all `points` (2, n)."""
    from matplotlib import colormaps

    goal = world.row.goal(world.test_tasks).T if world.row.goal else np.full((2, len(found)), math.nan)
    goal = goal * (np.abs(points).max() if world.row.xml else 1)  # a body's is a direction
    colour = colormaps["turbo"](np.linspace(0.05, 0.95, len(found))[np.arctan2(*goal).argsort().argsort()])
    for path, own in zip(found, colour, strict=True):
        axes.plot(*path, color=own, linewidth=0.9)
    axes.scatter(*goal, c=colour, marker="*", s=60, zorder=3)
    points = np.concatenate([points, goal], 1)
    low, high = np.nanmin(points, 1), np.nanmax(points, 1)
    low, high = low - 0.05 * (high - low).max(), high + 0.05 * (high - low).max()
    axes.set(xlabel="x", ylabel="y", aspect="equal", xlim=(low[0], high[0]), ylim=(low[1], high[1]))


def paths(values, world):
    """(2, t) positions of the first meta-episode of every test task, up to its end."""
    d, found = world.row.obs_dim, []
    for rows, alive in zip(values["path"][1][:, 0], values["counted"][1][:, 0], strict=True):
        obs = rows[alive, d + world.row.act_dim + 1 :][:, :d] * world.std + world.mean
        if not world.row.xml:
            found.append(obs.T.cpu().numpy())
        else:
            found.append((obs[:, list(world.row.velocity)].cumsum(0) * world.env.physics.dt).T.cpu().numpy())
    return found


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


def play_test_tasks(args, agent, world, each):
    """Rows (n_test, each x H, D) of `each` trajectories a task: half on their posterior, then half on z of the prior
    (appendix C.2: contexts, which are the last rows, are of exploration alone)."""
    with torch.random.fork_rng([world.mean.device] if world.mean.is_cuda else []), torch.no_grad():
        torch.manual_seed(args.seed)
        env = envs.make(args.env, world.test_tasks.repeat(each, axis=0))
        prior = torch.randn(env.num_envs, args.latent, device=world.mean.device)
        rows, _, _, sound = play(agent, world, env, prior, args.seed, explore=True, redraw="episode")
        z = sample(*agent.encoder(agent.history(rows)))
        informed, _, _, sound_too = play(agent, world, env, z, args.seed + 1, explore=True)
        env.close()
    if not (sound | sound_too).all():
        fail("--save-replay: the physics blew up twice in the same test task; nothing was written")
    half = torch.arange(len(rows), device=rows.device) % each >= each // 2
    half = (half | ~sound_too) & sound  # a trajectory in which the physics blew up gives way to the other
    return torch.where(half[:, None, None], rows, informed).view(len(world.test_tasks), -1, rows.shape[-1])


def save_replay(args, agent, world):
    """The buffers as a dataset, test tasks' data beside them."""
    if args.save_replay is None:
        return
    horizon, n = world.row.horizon, len(world.train_tasks)
    count = int(agent.replay.filled[:n].min()) // horizon * horizon
    if count < 2 * horizon:
        fail(f"--save-replay: the smallest buffer holds {count} transitions, expected at least {2 * horizon}")
    test = unless_diverged(play_test_tasks, args, agent, world, count // horizon)
    stored = agent.replay.rows[:n]
    last = agent.replay.filled[:n, None] - count + torch.arange(count, device=stored.device)
    train = stored.gather(1, last[..., None].expand(-1, -1, stored.shape[-1]))
    rows = torch.cat([train, test]) if not world.row.only else train
    s, a, r, s2, d = rows.split(agent.split, -1)
    ended = torch.zeros_like(d[..., 0], dtype=torch.bool)
    ended[:, horizon - 1 :: horizon] = True
    ended |= d[..., 0] > 0
    episodes = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], 1).cumsum(1)
    tasks = np.concatenate([world.train_tasks, world.test_tasks]) if not world.row.only else world.train_tasks
    train_index = np.arange(n)
    arrays = {
        "observations": s * world.std + world.mean, "next_observations": s2 * world.std + world.mean, "actions": a,
        "rewards": r[..., 0], "terminals": d[..., 0], "episodes": episodes,
    }  # fmt: skip
    arrays = {key: x.cpu().numpy() for key, x in arrays.items()} | {"tasks": tasks, "train_tasks": train_index}
    if world.row.sparse_reward:
        keys = "observations", "actions", "next_observations"
        flat = tasks.repeat(count, axis=0), *(arrays[key].reshape(len(tasks) * count, -1) for key in keys)
        arrays["sparse_rewards"] = world.row.sparse_reward(*flat, 1.0).reshape(len(tasks), count)
    arrays["test_tasks"] = train_index if world.row.only else np.arange(n, len(tasks))
    data.save(args.save_replay, arrays, {"env": args.env, "quality": "replay", "seed": args.seed, "script": "smac.py"})


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
    agent, optimisers, update = build(args, world, device)
    learn, practise = update, lambda: update(online=True)
    if device.type == "cuda" and not args.no_graph:
        learn, practise = capture(learn), capture(practise)
    start, seconds, rows = resume(run, args, agent, optimisers, world, device)
    write_settings(run, args)
    began, last, each, total = time.time() - seconds, start, updates_each(args), args.steps + online_updates(args)
    for step in range(start + 1, total + 1):
        iteration, rest = divmod(step - args.steps - 1, each)
        if iteration == 0 and rest == 0:
            agent.labeller.load_state_dict(agent.encoder.state_dict())
        if iteration >= 0 and rest == 0:
            unless_diverged(collect, args, agent, world, iteration)
        learn() if iteration < 0 else practise()
        if step % args.eval_every == 0 or step in (args.steps, total):
            check_finite(agent, run, rows)
            result = unless_diverged(evaluate, args, agent, world)
            online_steps = max(0, iteration + 1) * args.online_envs * world.row.horizon
            rows.append(summarise(step, online_steps, time.time() - began, args, agent, step - last, result))
            agent.metrics.zero_()
            last = step
            write_metrics(run, rows)
            plot_curve(run, args, rows, world)
            plot_embeddings(run, world, *result["offline_" if "offline_" in result else ""]["z"])
            plot_shift(run, "offline-phase" if iteration < 0 else "online-phase", result, world)
            save(run, step, time.time() - began, args, agent, optimisers, rows, world)
            report(rows[-1], world, total)
    write_final(run, args, rows, world, time.time() - began)
    save_replay(args, agent, world)
    print(f"curve, embeddings, metrics and checkpoint: {run}")


def build(args, world, device):
    """The agent, its optimisers and its update, fresh."""
    row, n = world.row, len(world.train_tasks)
    if args.meta_batch_size > n:
        fail(f"--meta-batch-size {args.meta_batch_size}: expected at most {n}, the number of training tasks")
    own = args.online_tasks == "test" and args.online_rewards == "oracle"  # test tasks' true rewards: their own buffers
    buffers = n + (len(world.test_tasks) if own else 0)
    space = capacity(args, len(world.test_tasks) if own else n)
    agent = Agent(args, row.obs_dim, row.act_dim, world.train_rows, buffers, space).to(device)
    optimisers = make_optimisers(args, agent, device)
    return agent, optimisers, make_update(args, agent, optimisers)


def report(row, world, total):
    best = f" of {world.optimum:.2f}" if world.optimum is not None else ""
    behaviour = f", data {world.behaviour:.2f}" if world.behaviour is not None else ""
    rate = row["step"] / max(row["seconds"], 0.1)
    print(
        f"step {row['step']:>7}/{total}  online {row['online_steps']:>7}  test return: online context "
        f"{row['return_mean']:8.2f}{best}, offline context {row['offline_return_mean']:8.2f}{behaviour}  (train "
        f"{row['train_return_mean']:.2f})  Q {row['q_mean']:.1f}  {rate:.0f} steps/s  "
        f"{(total - row['step']) / rate / 60:.1f} min left",
        flush=True,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; --resume goes on from the last checkpoint", 130)
