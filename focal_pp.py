"""FOCAL++: improved offline meta-RL with attention and contrastive learning (Li et al.; ICLR 2022; arXiv:2102.10774).

Given fixed datasets D_i of training tasks T_i (Algorithm 1; equations are FOCAL's where no paper is named):
    repeat: draw a meta-batch of tasks; for each task draw two contexts c_i, c_j and an RL minibatch b_i from D_i
        z_i = mean of W(c) E_q(c) over c_i (FOCAL++'s 18)                attention weighs the transitions
        z_k = the same of c_j by the key encoder E_k                     phi_k <- m phi_k + (1 - m) phi, no gradient
        phi   <- descend the momentum contrast loss (FOCAL++'s 7, 8)     its own task's z_k against other tasks'
        psi   <- descend the Bellman error of Q_psi(s, z_i, a) (27)      z_i detached: it does not train the encoder
        theta <- descend alpha D(pi, behaviour) - min Q (28) + log pi    behaviour regularisation (BRAC); entropy
        D is the dual form of KL with a discriminator g, which learns beside them
At test time (Algorithm 2) z comes from a context of the test task's own offline data.

    python focal_pp.py --env sparse-point-robot --small  # 3 more minutes, 11.9; compare: diff focal.py focal_pp.py

(On these goals FOCAL++'s Table 1 has FOCAL at 11.84, FOCAL++ at 12.96; optimum 13.09. Contexts and returns are sparse
there; actor and critic learn from dense rewards.) Where we differ from the paper:
- Observations are standardised; the encoder learns first and then stands still (see `encoder_rate`), since a policy
  cannot settle while z moves under it. |d|^2 in (13) is a mean over latent dimensions, as FOCAL's Table 5b presupposes.
- (7) and (8) read literally give gamma^2 alpha D; BRAC's gamma alpha D is meant, D(s') with the data's next action.
- The critic steps before the actor, which sees it updated; the paper's Algorithm 1 lists the actor first. Q has a twin;
  the entropy (FOCAL's appendix F) has weight 1 in target and actor; g, in D, has a penalty on its slope.
What we learned: alpha too small lets Q diverge, too large holds the policy at the data's return; a policy that learns
faster than the discriminator outruns it; the point robots' experts are too narrow as data (see the table).
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
# FOCAL's Table 4, and from its Table 2 the quality of the data, except on the point robots: our expert data come
# from one checkpoint, the paper's from fourteen or more, and leave Q ignorant of actions that lead away from the goal.
# (alpha_max, for --tune-alpha, is the authors' code's.)
TABLE = {
    "sparse-point-robot": {
        "reward_scale": 100, "beta": 1, "alpha": 0, "value_penalty": False, "meta_batch_size": 16, "latent": 5,
        "discount": 0.9, "quality": "mixed",
    },
    "point-robot-wind": {
        "reward_scale": 100, "beta": 1, "alpha": 0, "value_penalty": False, "meta_batch_size": 16, "latent": 5,
        "discount": 0.9, "quality": "mixed",
    },
    "cheetah-vel": {
        "reward_scale": 5, "beta": 10, "alpha": 50, "value_penalty": False, "meta_batch_size": 16, "latent": 20,
        "discount": 0.99, "quality": "expert",
    },
    "cheetah-fwd-back": {
        "reward_scale": 5, "beta": 1, "alpha": 500, "value_penalty": True, "meta_batch_size": 4, "latent": 5,
        "discount": 0.99, "quality": "mixed",
    },
    "ant-fwd-back": {
        "reward_scale": 5, "beta": 1, "alpha": 1e6, "value_penalty": True, "meta_batch_size": 4, "latent": 20,
        "discount": 0.99, "quality": "mixed", "alpha_max": 5e6,
    },
    "walker-params": {
        "reward_scale": 5, "beta": 10, "alpha": 50, "value_penalty": False, "meta_batch_size": 16, "latent": 20,
        "discount": 0.99, "quality": "mixed", "alpha_max": 1e4,
    },
}  # fmt: skip
# --small: what differs on a machine without a GPU.
SMALL_NETWORKS = {"hidden": 128, "encoder_hidden": 128, "meta_batch_size": 8, "batch_size": 64}
SMALL_NETWORKS |= {"tau": 0.02, "final_lr": 0.1, "threads": 1}
SMALL_POINT = SMALL_NETWORKS | {"hidden": 64, "encoder_hidden": 64, "steps": 10_000, "encoder_steps": 400}
SMALL_MUJOCO = SMALL_NETWORKS | {"steps": 16_000, "encoder_steps": 800, "context_size": 64}
SMALL_MUJOCO |= {"discriminator_steps": 1, "discriminator_lr": 1e-3}
# FOCAL's alpha = 50 holds small runs at the data's return; without the value penalty a smaller one lets Q diverge.
SMALL_WALKER = SMALL_MUJOCO | {"alpha": 20, "value_penalty": True, "encoder_steps": 3_000}
SMALL_WALKER |= {"steps": 24_000, "final_lr": 0.02}
# FOCAL's alpha of 500 and 1e6, times one sample of D, drowns the target. A policy that learns faster than the
# discriminator outruns it: cheetah-fwd-back then stays at 200 to 700, ant-fwd-back below its data.
SMALL_TWO = SMALL_MUJOCO | {"meta_batch_size": 4, "batch_size": 128, "alpha": 100}
SMALL_TWO |= {"steps": 12_000, "lr": 3e-4, "discriminator_steps": 3, "discriminator_lr": 1e-3}
SMALL = {
    "sparse-point-robot": SMALL_POINT | {"eval_every": 1_000},
    "point-robot-wind": SMALL_POINT | {"eval_every": 1_000},
    "cheetah-vel": SMALL_MUJOCO | {"eval_every": 2_000, "alpha": 50},
    "cheetah-fwd-back": SMALL_TWO | {"eval_every": 2_000},
    "ant-fwd-back": SMALL_TWO | {"eval_every": 2_000},
    "walker-params": SMALL_WALKER | {"eval_every": 2_000},
}
# FOCAL++'s Table 6 over FOCAL's Table 4. Ours: alpha is not tuned in SMALL; two tasks are 2 x 512, as they are distinct
for name, row in TABLE.items():
    row |= {"beta": 1, "hidden": 256, "context_size": 512} | ({"latent": 20} if envs.family(name).xml else {})
    row |= {"alpha": 500, "tune_alpha": True, "lr": 3e-3, "encoder_lr": 3e-3} if envs.family(name).xml else {}
    row |= {"meta_batch_size": 2, "batch_size": 512} if envs.family(name).only else {}
    SMALL[name] = {"tune_alpha": False, "lr": 1e-3, "encoder_lr": 1e-3, "context_size": 64} | SMALL[name]
    SMALL[name]["encoder_hidden"] = 32
    SMALL[name] |= {"meta_batch_size": 2, "batch_size": 256} if envs.family(name).only else {}


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
    if critic_trains_encoder(args):  # its loss changes as long as the policy does
        parser.set_defaults(encoder_steps=args.steps)
        args = parser.parse_args(argv)
    args.test_quality = None if args.test_quality == args.quality else args.test_quality  # the same is no variant
    args.variant = variant(args, parser)
    for key in ("quality", "test_quality", "data_seed"):
        if args.data and getattr(args, key) != parser.get_default(key):
            flag = f"--{key.replace('_', '-')} {getattr(args, key)}"
            fail(f"{flag}: --data has the data of all tasks; expected one or the other")
    args.test_quality = args.test_quality or args.quality
    if args.sparse and "relabelled" in (args.quality, args.test_quality):
        fail("--sparse: the contexts of relabelled data are sparse by themselves; expected one or the other")
    args.encoder_steps = args.encoder_steps or max(2, args.steps // 5)  # at the last one its rate is 0
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device was found; expected one, or --device cpu")
    return args


def critic_trains_encoder(args):
    """In the ablations: by --coupled beside the encoder's own loss, by --encoder-loss bellman instead of it."""
    return args.coupled or args.encoder_loss == "bellman"


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
    add("--steps", type=whole, default=200_000, help="gradient steps; the papers do not say how many")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="where the networks and the data are")
    add("--threads", type=natural, default=0, help="PyTorch's threads on the CPU; 0: one for each core")
    add("--data", type=Path, default=None, metavar="FILE", help="a dataset of your own (.npz, see data.py)")
    add("--data-dir", type=Path, default=Path("datasets"), help="where datasets are kept and built")
    add("--data-seed", type=natural, default=0, help="seed of the tasks and of their datasets")
    add("--quality", choices=data.QUALITIES, default="mixed", help="quality of the training tasks' data")
    add("--test-quality", choices=data.QUALITIES, default=None, help="of the test tasks' data; unless given: --quality")
    add("--eval-every", type=whole, default=10_000, help="gradient steps between evaluations")
    add("--eval-episodes", type=whole, default=4, help="episodes of each task in an evaluation")
    add("--run-dir", type=Path, default=Path("runs"), help="where runs are kept")
    add("--resume", action="store_true", help="go on from the run's checkpoint, if there is one")
    add("--no-graph", action="store_true", help="on CUDA: run every operation by itself instead of one graph")
    add("--hidden", type=whole, default=300, help="width of the actor, the critics and the discriminator")
    add("--meta-batch-size", type=whole, default=16, help="tasks in a gradient step")
    add("--batch-size", type=whole, default=256, help="transitions of each task in a gradient step")
    add("--context-size", type=whole, default=256, help="transitions in a context")
    add("--lr", type=number, default=1e-3, help="learning rate of actor and critic")
    add("--final-lr", type=share, default=1.0, help="its share that is left at the last step; it falls linearly")
    add("--tau", type=share, default=0.005, help="rate of the slow target")
    add("--discount", type=share, default=0.99, help="discount factor")
    add("--reward-scale", type=number, default=5.0, help="multiplies rewards in the critic's target only")


def algorithm_arguments(add):
    add("--sparse", action="store_true", help="FOCAL++'s sparse rewards (Eq. 35) in contexts; dense ones to learn from")
    add("--latent", type=whole, default=20, help="size l of the task embedding")
    add("--encoder-hidden", type=int, choices=[16, 32, 64, 128, 256], default=128, help="of the task encoder")
    add("--blocks", type=whole, default=3, help="attention blocks of the task encoder")
    add("--attention", choices=["both", "batch", "seq", "none"], default="both", help="rows of Tables 1 and 2")
    add("--dropout", type=share, default=0.1, help="in the encoder while it learns")
    add("--temperature", type=positive, default=0.5, help="tau of FOCAL++'s Eq. 8, with contrast")
    add("--momentum", type=share, default=0.9, help="m of the key encoder, with contrast")
    add("--encoder-lr", type=number, default=1e-3, help="learning rate of the task encoder")
    add("--encoder-steps", type=whole, default=None,
        help="its rate falls to 0 by this step; unless given: steps / 5, or steps if the critic trains it")  # fmt: skip
    add("--no-next-obs", action="store_true", help="leave s' out of the context, as PEARL does")
    add("--encoder-loss", choices=["contrast", "dml", "bellman"], default="contrast", help="or FOCAL's, the critic's")
    add("--coupled", action="store_true", help="the critic's loss trains the encoder too (FOCAL, section 5.2.3)")
    add("--dml", choices=list(LAWS), default="inverse-square", help="law of Eq. 13's negative pairs, of loss dml")
    add("--beta", type=number, default=1.0, help="multiplies their weight in LAWS, which is that of FOCAL's Table 5b")
    add("--eps", type=positive, default=0.1, help="epsilon of FOCAL's Eq. 13")
    add("--policy", choices=["brac", "bcq"], default="brac", help="bcq: Contextual BCQ's, with --encoder-loss bellman")
    add("--alpha", type=number, default=50.0, help="of brac's regularisation; 0 without --tune-alpha: no discriminator")
    add(
        "--tune-alpha",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let alpha seek the target divergence (FOCAL++)",
    )
    add("--alpha-lr", type=number, default=1.0, help="with --tune-alpha, its plain step")
    add("--alpha-max", type=number, default=2e3, help="with --tune-alpha, its bound")
    add("--target-divergence", type=number, default=0.05, help="with --tune-alpha, above which alpha rises")
    add("--value-penalty", action=argparse.BooleanOptionalAction, default=False, help="D in the target (FOCAL's Eq. 7)")
    add("--discriminator-lr", type=number, default=1e-4, help="learning rate of the discriminator g")
    add("--discriminator-steps", type=whole, default=3, help="its gradient steps in an update")


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


class BCQActor(nn.Module):
    """Contextual BCQ (Fujimoto et al. 2019): actions like the data's, from a VAE given (s, z), shifted a little."""

    def __init__(self, obs_dim, latent, act_dim, hidden):
        super().__init__()
        self.code_dim = 2 * act_dim
        self.encode = mlp(obs_dim + latent + act_dim, hidden, 2 * self.code_dim)
        self.decode = mlp(obs_dim + latent + self.code_dim, hidden, act_dim)
        self.shift = mlp(obs_dim + latent + act_dim, hidden, act_dim)
        self.slow_shift = copy.deepcopy(self.shift).requires_grad_(False)

    def vae_loss(self, s, z, a):
        """Squared error of the action, plus half the KL of its code from N(0, I) for each dimension, mean over rows."""
        mean, log_std = self.encode(torch.cat([s, z, a], -1)).chunk(2, -1)
        log_std = log_std.clamp(-4, 15)
        code = mean + log_std.exp() * torch.randn_like(mean)
        error = (torch.tanh(self.decode(torch.cat([s, z, code], -1))) - a).square().mean()
        return error + 0.5 * gaussian_kl(mean, (2 * log_std).exp()).mean() / self.code_dim

    def propose(self, s, z, noise, slow=False):
        """Actions (..., m) from codes near 0; noise (..., 2 m) is N(0, I)."""
        with torch.no_grad():
            a = torch.tanh(self.decode(torch.cat([s, z, noise.clamp(-0.5, 0.5)], -1)))
        shift = (self.slow_shift if slow else self.shift)(torch.cat([s, z, a], -1))
        return (a + 0.05 * torch.tanh(shift)).clamp(-1, 1)


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


# ================================================================================================= 3. task encoder
class Block(nn.Module):
    """Attention over a transition's tokens and over a minibatch's transitions, side by side; starts as the identity."""

    def __init__(self, hidden, attention, dropout):
        super().__init__()
        self.norms, self.dropout = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)]), dropout
        self.feed_forward = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        last = [self.feed_forward[-1]]
        if attention in ("both", "seq"):
            self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
            last.append(self.out)
        if attention in ("both", "batch"):
            self.gate = nn.Sequential(nn.Linear(hidden, hidden // 16), nn.Tanh(), nn.Linear(hidden // 16, 1))
            last.append(self.gate[-1])
        for p in nn.ModuleList(last).parameters():
            nn.init.zeros_(p)

    def forward(self, x):
        """Tokens x (M tasks, B, tokens, h) and weights W (M, B), whose mean over B is 1 (Definition 3.7)."""
        p = self.dropout if torch.is_grad_enabled() else 0.0  # none in keys and evaluations
        n = self.norms[0](x)
        y, w = torch.zeros_like(x), torch.ones_like(x[..., 0, 0])
        if hasattr(self, "gate"):
            w = torch.sigmoid(self.gate(n.mean(2)))[..., 0]
            w = w / w.mean(1, keepdim=True)
            y = (w[..., None, None] - 1) * x  # so that x + y = w x
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(n).flatten(0, 1).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)
            y = y + self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).reshape(x.shape))
        x = x + F.dropout(y, p, p > 0)
        return x + F.dropout(self.feed_forward(self.norms[1](x)), p, p > 0), w


class Encoder(nn.Module):
    """E: C transitions (M tasks, C, width) -> z (M, l) in (-1, 1), their weighted mean; and 0 (M,), as it has no KL."""

    def __init__(self, widths, args):
        super().__init__()
        self.widths = widths if args.attention in ("both", "seq") else [sum(widths)]  # of the tokens
        self.embed = nn.ModuleList(nn.Linear(width, args.encoder_hidden) for width in self.widths)
        self.position = nn.Parameter(0.02 * torch.randn(len(self.widths), args.encoder_hidden))
        block = args.encoder_hidden, args.attention, args.dropout
        self.blocks = nn.ModuleList(Block(*block) for _ in range(args.blocks))
        self.head = nn.Linear(args.encoder_hidden, args.latent)

    def forward(self, context, generator=None):
        z, w = self.transitions(context)
        z = (w[..., None] * z).mean(1)  # FOCAL++'s Eq. 18
        return z, torch.zeros_like(z[:, 0])

    def transitions(self, context):
        """Each transition's embedding (M, B, l) and weight (M, B)."""
        tokens = context.split(self.widths, -1)
        x = torch.stack([embed(token) for embed, token in zip(self.embed, tokens, strict=True)], 2) + self.position
        for block in self.blocks:
            x, w = block(x)
        return torch.tanh(self.head(x.mean(2))), w


# ======================================================================================================= 4. losses
# What a pair of different tasks costs, given |d|^2, with the weights of FOCAL's Table 5b, which make the four alike in
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
    # FOCAL's Eq. 13: 1{y_i = y_j} |q_i - q_j|^2 + 1{y_i != y_j} w / (|q_i - q_j|^n + eps), w = beta times LAWS' weight
    return torch.where(same, d2, beta * LAWS[law](d2, eps)).mean()


def contrast_loss(z_q, z_k, same, temperature):
    """Matrix-form momentum contrast; z_q, z_k (M, l); a task drawn twice is no negative of itself, same (M, M)."""
    # FOCAL++'s Eqs. 7, 8: -sum_i log( exp(z_q_i . z_k_i / tau) / sum_j exp(z_q_i . z_k_j / tau) )
    own = torch.eye(len(z_q), dtype=torch.bool, device=z_q.device)
    logits = (z_q @ z_k.T / temperature).masked_fill(same & ~own, -math.inf)
    return -logits.log_softmax(1).diagonal().sum()


def critic_target(r, done, q_next, log_pi_next, divergence_next, reward_scale, discount, alpha):
    """y of FOCAL's Eq. 27 with Eq. 7's value penalty and the entropy of appendix F, weighted as in `actor_loss`; q_next
    (2, N) of the slow target, divergence_next (N,) or 0."""
    # reward_scale r + gamma (1 - done) (min Qbar(s', z, a') - log pi(a'|s', z) - alpha D(s'))
    return reward_scale * r + discount * (1 - done) * (q_next.amin(0) - log_pi_next - alpha * divergence_next)


def bcq_target(r, done, q_next, reward_scale, discount):
    """y of BCQ: the best of the proposed actions by 3/4 of the lower and 1/4 of the higher twin; q_next (2, K, N)."""
    value = (0.75 * q_next.amin(0) + 0.25 * q_next.amax(0)).amax(0)
    return reward_scale * r + discount * (1 - done) * value


def critic_loss(q, y):
    """FOCAL's Eq. 27: (y - Q(s, z, a))^2, mean over rows, sum over the twins; q (2, N), y (N,)."""
    return (y - q).square().mean(1).sum()


def actor_loss(log_pi, q, divergence, alpha):
    """FOCAL's Eq. 28, -Q + alpha D, and the entropy of its appendix F, whose weight of 1 is ours (the scale of rewards
    sets it): log pi(a''|s, z) - min Q(s, z, a'') + alpha D(s); q (2, N)."""
    return (log_pi - q.amin(0) + alpha * divergence).mean()


def kl_dual(logit_pi, logit_data):
    """D = KL(pi || behaviour) = max over g > 0 of E_pi[log g(a)] + 1 - E_data[g(a)], at its maximum g = pi / behaviour
    (Nowozin et al. 2016); here one sample of each expectation a row, g = softplus(logit)."""
    return torch.log(F.softplus(logit_pi) + 1e-8) + 1 - F.softplus(logit_data)


def discriminator_loss(divergence, grad_a):
    """-mean D + 5 mean max(|grad_a logit| - 1, 0)^2; grad_a (N, m) at actions between the policy's and the data's.
    The penalty is of BRAC's code (Wu et al. 2019): a smooth g has a slope that tells the actor where the data are."""
    return -divergence.mean() + 5 * (grad_a.norm(dim=-1) - 1).clamp_min(0).square().mean()


def slope(net, x):
    """The gradient (N, d) by x (N, d) of net(x), a network that `mlp` made. Where its ReLUs are active is piecewise
    constant in x, so a gradient of this gradient reaches the weights only; autograd would carry zeros to x as well."""
    active = []
    with torch.no_grad():
        for layer in net[:-1]:
            x = layer(x)
            active += [(x > 0).float()] if isinstance(layer, nn.ReLU) else []
    grad = net[-1].weight
    for layer, mask in zip(net[-3::-2], reversed(active), strict=True):
        grad = (grad * mask) @ layer.weight
    return grad


# ======================================================================================================= 5. update
class Agent(nn.Module):
    """Every network of the algorithm, and what else its update keeps."""

    METRICS = ("encoder_loss", "encoder_kl", "critic_loss", "actor_loss", "discriminator_loss", "vae_loss", "q_mean")
    METRICS += ("divergence", "alpha")
    PROPOSALS = 10  # actions that BCQ chooses from
    SETTLED = 64  # contexts of each task that are embedded for good once the encoder stands still

    def __init__(self, args, obs_dim, act_dim, tasks):
        super().__init__()
        sizes = obs_dim, args.latent, act_dim, args.hidden
        widths = [obs_dim, act_dim, 1] if args.no_next_obs else [obs_dim, act_dim, obs_dim, 1]
        self.encoder = Encoder(widths, args)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.actor, self.critic = Actor(*sizes) if args.policy == "brac" else BCQActor(*sizes), Critic(*sizes)
        self.target = Critic(*sizes).requires_grad_(False)
        self.target.load_state_dict(self.critic.state_dict())
        regularised = args.policy == "brac" and (args.alpha > 0 or args.tune_alpha)
        self.discriminator = mlp(obs_dim + args.latent + act_dim, args.hidden, 1) if regularised else None
        self.register_buffer("settled", torch.zeros(tasks, self.SETTLED, args.latent))
        self.register_buffer("alpha", torch.tensor(float(args.alpha)))
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))
        self.register_buffer("metrics", torch.zeros(len(self.METRICS)))  # sums since the last evaluation
        self.register_buffer("bad_step", torch.full((len(self.METRICS),), math.inf, dtype=torch.float64))

    @property
    def judges(self):
        """What scores actions, and stands still while the actor learns from it."""
        return nn.ModuleList([self.critic] + ([self.discriminator] if self.discriminator is not None else []))

    def act(self, s, z, generator):
        """The action (N, m) that is scored: the policy's mean, or BCQ's best proposal."""
        if isinstance(self.actor, Actor):
            return torch.tanh(self.actor(s, z)[0])
        a = self.propose(s, z, generator=generator)  # (K, N, m)
        s, z = (x.expand(len(a), *x.shape) for x in (s, z))
        best = self.critic(s, z, a)[0].argmax(0)
        return a[best, torch.arange(a.shape[1], device=a.device)]

    def propose(self, s, z, slow=False, generator=None):
        """BCQ's actions for s, z (N, ...): (K, N, m)."""
        noise = torch.randn(self.PROPOSALS, len(s), self.actor.code_dim, generator=generator, device=s.device)
        s, z = (x.expand(self.PROPOSALS, *x.shape) for x in (s, z))
        return self.actor.propose(s, z, noise, slow)

    def logit(self, s, z, a):
        return self.discriminator(torch.cat([s, z, a], -1)).squeeze(-1)

    def divergence(self, s, z, a_pi, a_data):
        return kl_dual(self.logit(s, z, a_pi), self.logit(s, z, a_data))

    @torch.no_grad()
    def settle(self, batches):
        """Embeds contexts of every task, from which later updates draw: the encoder does not change any more."""
        tasks = torch.arange(len(self.settled), device=self.step.device)
        for i in range(self.SETTLED):
            self.settled[:, i] = self.encoder(batches.contexts(tasks))[0]

    @torch.no_grad()
    def settled_embedding(self, task, batches):
        """z (M, l). Where z is a sample it is drawn afresh: from 64 samples that are kept, the policy could recognise a
        task by their noise."""
        if not isinstance(self.encoder, Encoder):
            return self.encoder(batches.contexts(task))[0]
        return self.settled[task, torch.randint(self.SETTLED, task.shape, device=task.device)]

    def record(self, **values):
        """Adds to the sums, and notes the first step at which a value was not finite, without looking at it."""
        zero = torch.zeros_like(self.metrics[0])
        values = torch.stack([values.get(name, zero).float() for name in self.METRICS])
        self.metrics += values
        self.bad_step.copy_(torch.where(values.isfinite(), self.bad_step, self.bad_step.minimum(self.step)))


def make_optimisers(args, agent, device):
    def adam(module, lr):
        lr = torch.tensor(lr, device=device)  # a tensor, so that a captured graph can change it
        return torch.optim.Adam(module.parameters(), lr=lr, fused=True, capturable=device.type == "cuda")

    optimisers = {
        "encoder": adam(agent.encoder, args.encoder_lr),
        "critic": adam(agent.critic, args.lr),
        "actor": adam(agent.actor, args.lr),
    }
    if agent.discriminator is not None:
        optimisers["discriminator"] = adam(agent.discriminator, args.discriminator_lr)
    return optimisers


def step_down(optimiser, loss):
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


class Batches:
    """The training tasks' transitions, one row each, on the device; every draw from them is made there."""

    def __init__(self, args, rows, split):
        self.args, self.rows, self.split = args, rows, split  # (n tasks, N, D), widths of the parts of a row
        self.replace = args.meta_batch_size > len(rows)  # of fewer tasks than M each is drawn several times

    def tasks(self):
        n, m = len(self.rows), self.args.meta_batch_size
        if self.replace:
            return torch.randint(n, (m,), device=self.rows.device)
        return torch.rand(n, device=self.rows.device).argsort()[:m]

    def draw(self, task, size):
        """(M, size, D) rows drawn uniformly for each task."""
        n, count, width = self.rows.shape
        index = torch.randint(count, (len(task), size), device=task.device) + task[:, None] * count
        return self.rows.view(n * count, width).index_select(0, index.flatten()).view(len(task), size, width)

    def contexts(self, task):
        """(M, C, width): s, a, s' and r of C transitions, as the encoder sees them."""
        return context_of(self.draw(task, self.args.context_size), self.split, self.args)

    def transitions(self, task):
        """s, a, r, s', done and, for the value penalty, the data's next action and whether it has one; (M x B, ...)."""
        rows = self.draw(task, self.args.batch_size).flatten(0, 1)
        s, a, _, s2, r, done, a2, has_next = rows.split(self.split, -1)
        return s, a, r[:, 0], s2, done[:, 0], a2, has_next[:, 0]


def context_of(rows, split, args):
    s, a, r, s2, *_ = rows.split(split, -1)
    return torch.cat([s, a, r] if args.no_next_obs else [s, a, s2, r], -1)


def make_update(args, agent, optimisers, batches):
    """update(): one gradient step of every network (of g: several). It never waits, so CUDA can replay it whole."""

    def update(learn_encoder=True):
        agent.step += 1
        if args.final_lr != 1:
            for name in ("critic", "actor"):
                rate = 1 - (1 - args.final_lr) * (agent.step / args.steps).clamp_max(1)
                optimisers[name].param_groups[0]["lr"].copy_(args.lr * rate)
        # Algorithm 1, its loop over tasks: M tasks, for each two contexts c_i, c_j and a minibatch b_i of its own draw
        task = batches.tasks()
        b, log = batches.transitions(task), {"alpha": agent.alpha}
        if not learn_encoder:
            z_i = agent.settled_embedding(task, batches)
        else:
            z_i, kl = agent.encoder(batches.contexts(task))  # (M, l), (M,)
            log["encoder_kl"] = kl.detach().mean()
            optimisers["encoder"].zero_grad()
            loss = 0
            if args.encoder_loss == "contrast":
                with torch.no_grad():  # and so without dropout
                    z_k, same = agent.key_encoder(batches.contexts(task))[0], task[:, None] == task[None]
                loss = contrast_loss(z_i, z_k, same, args.temperature)  # FOCAL++'s Eqs. 7, 8
                log["encoder_loss"] = loss.detach()
            if args.encoder_loss == "dml":
                z_j, same = agent.encoder(batches.contexts(task))[0], task[:, None] == task[None]
                dml = dml_loss(z_i, z_j, same, args.beta, args.dml, args.eps)  # Eq. 13
                log["encoder_loss"], loss = dml.detach(), loss + dml
            if torch.is_tensor(loss):  # the critic's loss may add to these gradients, or be all there is
                loss.backward(retain_graph=critic_trains_encoder(args))
        z = z_i.repeat_interleave(args.batch_size, 0)  # (M x B, l)
        # (27) has z without a gradient: the Bellman error does not reach the encoder, except in the ablations
        log |= learn_critic(b, z if critic_trains_encoder(args) else z.detach())
        if learn_encoder:
            optimisers["encoder"].param_groups[0]["lr"].copy_(args.encoder_lr * encoder_rate(args, agent.step))
            optimisers["encoder"].step()
            with torch.no_grad():  # phi_k <- m phi_k + (1 - m) phi_q
                slow, fast = list(agent.key_encoder.parameters()), list(agent.encoder.parameters())
                torch._foreach_lerp_(slow, fast, 1 - args.momentum)
        log |= (learn_actor if args.policy == "brac" else learn_bcq_actor)(b, z.detach())
        with torch.no_grad():
            torch._foreach_lerp_(list(agent.target.parameters()), list(agent.critic.parameters()), args.tau)
            agent.record(**log)

    def learn_critic(b, z):
        s, a, r, s2, done, a2_data, has_next = b
        with torch.no_grad():
            if args.policy == "brac":
                a2, log_pi2 = agent.actor.sample(s2, z)
                penalty = args.value_penalty and agent.discriminator is not None
                divergence2 = has_next * agent.divergence(s2, z, a2, a2_data) if penalty else 0  # Eq. 7
                q2 = agent.target(s2, z, a2)
                y = critic_target(r, done, q2, log_pi2, divergence2, args.reward_scale, args.discount, agent.alpha)
            else:
                a2 = agent.propose(s2, z, slow=True)
                q2 = agent.target(s2.expand(len(a2), *s2.shape), z.expand(len(a2), *z.shape), a2)
                y = bcq_target(r, done, q2, args.reward_scale, args.discount)
        q = agent.critic(s, z, a)
        loss = critic_loss(q, y)  # Eq. 27
        step_down(optimisers["critic"], loss)
        return {"critic_loss": loss.detach(), "q_mean": q.detach().mean()}

    def learn_actor(b, z):
        s, a = b[:2]
        policy = agent.actor(s, z)  # mean and log std; they stand still while g learns
        discriminator, divergence = torch.zeros_like(agent.alpha), torch.zeros_like(agent.alpha)
        if agent.discriminator is not None:
            for _ in range(args.discriminator_steps):
                with torch.no_grad():
                    a_pi = sample_tanh_gaussian(*policy)[0]
                discriminator = learn_discriminator(s, z, a, a_pi)
        agent.judges.requires_grad_(False)  # only the policy learns from Eq. 28
        a_pi, log_pi = sample_tanh_gaussian(*policy)
        if agent.discriminator is not None:
            divergence = agent.divergence(s, z, a_pi, a)
        loss = actor_loss(log_pi, agent.critic(s, z, a_pi), divergence, agent.alpha)  # Eq. 28
        step_down(optimisers["actor"], loss)
        agent.judges.requires_grad_(True)
        if args.tune_alpha:
            with torch.no_grad():
                agent.alpha += args.alpha_lr * (divergence.mean() - args.target_divergence)
                agent.alpha.clamp_(0, args.alpha_max)
        divergence = divergence.detach().mean()
        return {"actor_loss": loss.detach(), "discriminator_loss": discriminator, "divergence": divergence}

    def learn_bcq_actor(b, z):
        s, a = b[:2]
        agent.judges.requires_grad_(False)
        vae = agent.actor.vae_loss(s, z, a)
        noise = torch.randn(len(s), agent.actor.code_dim, device=s.device)
        loss = -agent.critic(s, z, agent.actor.propose(s, z, noise))[0].mean()
        step_down(optimisers["actor"], vae + loss)  # the VAE learns from its own loss only, the shift from Q only
        agent.judges.requires_grad_(True)
        with torch.no_grad():
            slow, fast = list(agent.actor.slow_shift.parameters()), list(agent.actor.shift.parameters())
            torch._foreach_lerp_(slow, fast, args.tau)
        return {"actor_loss": loss.detach(), "vae_loss": vae.detach()}

    def learn_discriminator(s, z, a, a_pi):
        mix = torch.rand_like(a[:, :1])
        grad = slope(agent.discriminator, torch.cat([s, z, mix * a + (1 - mix) * a_pi], -1))[:, -a.shape[1] :]
        logit_pi, logit_data = agent.logit(s.repeat(2, 1), z.repeat(2, 1), torch.cat([a_pi, a])).chunk(2)
        loss = discriminator_loss(kl_dual(logit_pi, logit_data), grad)
        step_down(optimisers["discriminator"], loss)
        return loss.detach()

    return update


def encoder_rate(args, step):
    """The share of --encoder-lr at this step. The encoder's loss does not depend on the policy, but the policy depends
    on z: so the encoder learns first, then stands still, and z comes from the contexts that `settle` keeps."""
    return (1 - step / args.encoder_steps).clamp_min(0)


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


def pack(dataset, tasks, mean, std):
    """Rows (n, N, D): s, a, context r, s', r, d, next a, whether there is one; observations standardised."""
    episodes = dataset.episodes[tasks]
    has_next = torch.zeros_like(dataset.rewards[tasks])
    has_next[:, :-1] = (episodes[:, 1:] == episodes[:, :-1]).float()
    a = dataset.actions[tasks]
    s, s2 = ((obs[tasks] - mean) / std for obs in (dataset.observations, dataset.next_observations))
    columns = dataset.context_rewards[tasks], dataset.rewards[tasks], dataset.terminals[tasks], has_next
    r_context, r, done, has_next = (column[..., None] for column in columns)
    return torch.cat([s, a, r_context, s2, r, done, a.roll(-1, 1), has_next], -1)


class World:
    """The data of every task as packed rows, and one sub-environment for each task and evaluation episode."""

    def __init__(self, args, device):
        train = open_data(args, args.quality, device)
        test = open_data(args, args.test_quality, device) if args.test_quality != args.quality else train
        if args.sparse and "relabelled" in (train.meta.get("quality"), test.meta.get("quality")):  # from --data
            raise data.DataError("--sparse: the contexts of relabelled data are sparse by themselves; leave it out")
        if args.sparse:  # in contexts only; the goal radius R of FOCAL++'s Eq. 35 is fitted to the training tasks
            radius = data.sparsify(train)
            data.sparsify(test, radius)
        row, e = envs.family(args.env), args.eval_episodes
        obs_dim, act_dim = row.obs_dim, row.act_dim
        self.split = [obs_dim, act_dim, 1, obs_dim, 1, 1, act_dim, 1]
        self.mean, self.std = standardisation(train.observations[train.train_tasks])
        self.train_rows = pack(train, train.train_tasks, self.mean, self.std)
        self.test_rows = pack(test, test.test_tasks, self.mean, self.std)
        tasks = np.concatenate([train.tasks[train.train_tasks], test.tasks[test.test_tasks]])
        self.env = envs.make(args.env, tasks.repeat(e, axis=0), seed=args.seed)
        returns = test.returns[test.test_tasks]
        self.behaviour = float(returns.mean()) if np.isfinite(returns).all() else None
        self.optimum = None
        if row.optimum:
            self.optimum = float(row.optimum(test.tasks[test.test_tasks], row.horizon).mean())
        self.checksum = [train.meta["checksum"], test.meta["checksum"]]


def open_data(args, quality, device):
    """The dataset of this quality, built on the spot if it is missing; tensors on the device."""
    path = args.data or data.prepare(args.env, quality, seed=args.data_seed, data_dir=args.data_dir, device=args.device)
    return data.load(path, env=args.env, device=device)


@torch.no_grad()
def evaluate(args, agent, world):
    """Mean return of each task's episodes, and their embeddings: (n_train, E), (n_test, E), each with z (n, E, l).

    Every task and episode is one batch, with one z for a whole episode. Contexts (Algorithm 2, which draws one at every
    step) and initial states are the same at every evaluation.
    """
    e, device = args.eval_episodes, world.train_rows.device
    generator = torch.Generator(device).manual_seed(args.seed)
    contexts = []
    for rows in (world.train_rows, world.test_rows):
        n, count, width = rows.shape
        index = torch.randint(count, (n, e * args.context_size), generator=generator, device=device)
        drawn = rows.gather(1, index[..., None].expand(-1, -1, width)).view(n * e, args.context_size, width)
        contexts.append(context_of(drawn, world.split, args))
    z = agent.encoder(torch.cat(contexts), generator)[0]  # (n_all x E, l)
    obs, _ = world.env.reset(seed=args.seed)
    total, alive = np.zeros(len(obs)), np.ones(len(obs), bool)
    for _ in range(world.env.horizon):
        s = (torch.as_tensor(obs, dtype=torch.float32).to(device) - world.mean) / world.std
        action = agent.act(s, z, generator).cpu().numpy()
        obs, reward, terminated, truncated, info = world.env.step(action)
        total += alive * info.get("sparse_reward", reward)  # sparse-point-robot reports the sparse return
        alive &= ~(terminated | truncated)
    n = len(world.train_rows)
    returns, z = total.reshape(-1, e), z.view(-1, e, args.latent).cpu()
    return returns[:n], returns[n:], z[:n], z[n:]


def separation(z):
    """ESR and RMS of FOCAL's Table 1 over all pairs of embeddings of different tasks; z (n, E, l). Also a task's
    variance over its contexts, mean over tasks and dimensions (FOCAL++'s Table 2)."""
    n, e, latent = z.shape
    flat, task = z.flatten(0, 1), torch.arange(n).repeat_interleave(e)
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")[task[:, None] != task[None]]
    far = math.sqrt(2 * latent / 3)  # root mean square distance of two uniform points of (-1, 1)^l
    esr, rms = (distance > far).double().mean().item(), (distance.square().mean() / latent).sqrt().item()
    return esr, rms, z.var(1, correction=0).mean().item() * e / max(1, e - 1)  # unbiased; 0 of one context


# ================================================================================================ 7. plots and files
def summarise(step, seconds, args, agent, count, result):
    """One row of metrics.csv: means of the losses since the last evaluation, returns and separation."""
    train, test, z_train, z_test = result
    row = {"step": step, "seconds": round(seconds, 1)}
    row |= dict(zip(agent.METRICS, (agent.metrics / max(1, count)).tolist(), strict=True))
    learnt = max(0, min(step, args.encoder_steps) - (step - count))  # steps of the encoder since then
    for name in ("encoder_loss", "encoder_kl"):
        row[name] *= count / learnt if learnt else math.nan
    row |= {"return_mean": test.mean(), "return_std": test.mean(1).std()}
    row |= {"train_return_mean": train.mean(), "train_return_std": train.mean(1).std()}
    row["esr"], row["rms"], row["variance"] = separation(z_test)
    row["train_esr"], row["train_rms"], row["train_variance"] = separation(z_train)
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
    axes = figure.add_subplot(xlabel="gradient steps", ylabel="return", title=f"{Path(__file__).stem} on {args.env}")
    step = np.array([row["step"] for row in rows])
    for prefix, label, colour in (("train_", "training tasks", "tab:gray"), ("", "test tasks", "tab:blue")):
        mean, std = (np.array([row[f"{prefix}return_{part}"] for row in rows]) for part in ("mean", "std"))
        axes.fill_between(step, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
        axes.plot(step, mean, color=colour, label=f"{label} (band: std over tasks)")
    if world.behaviour is not None:
        axes.axhline(world.behaviour, color="tab:orange", linestyle=":", label="the test tasks' data")
    if world.optimum is not None:
        axes.axhline(world.optimum, color="tab:green", linestyle="--", label="optimum")
    axes.legend(fontsize="small", loc="lower right", framealpha=0.8)
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
    agent = Agent(args, world.split[0], world.split[1], len(world.train_rows)).to(device)
    optimisers = make_optimisers(args, agent, device)
    batches = Batches(args, world.train_rows, world.split)
    update = make_update(args, agent, optimisers, batches)
    learn, learn_settled = update, lambda: update(learn_encoder=False)
    if device.type == "cuda" and not args.no_graph:
        learn, learn_settled = capture(learn), capture(learn_settled)
    start, seconds, rows = resume(run, args, agent, optimisers, world, device)
    write_settings(run, args)
    began, last = time.time() - seconds, start
    for step in range(start + 1, args.steps + 1):
        if step == args.encoder_steps + 1:
            agent.settle(batches)
        learn() if step <= args.encoder_steps else learn_settled()
        if step % args.eval_every == 0 or step == args.steps:
            check_finite(agent, run, rows)
            result = unless_diverged(evaluate, args, agent, world)
            rows.append(summarise(step, time.time() - began, args, agent, step - last, result))
            agent.metrics.zero_()
            last = step
            write_metrics(run, rows)
            plot_curve(run, args, rows, world)
            plot_embeddings(run, world, *result[2:])
            save(run, step, time.time() - began, args, agent, optimisers, rows, world)
            report(rows[-1], world, args)
    write_final(run, args, rows, world, time.time() - began)
    print(f"curve, embeddings, metrics and checkpoint: {run}")


def report(row, world, args):
    best = f" of {world.optimum:.2f}" if world.optimum is not None else ""
    behaviour = f", data {world.behaviour:.2f}" if world.behaviour is not None else ""
    rate = row["step"] / max(row["seconds"], 0.1)
    print(
        f"step {row['step']:>7}/{args.steps}  test return {row['return_mean']:8.2f}{best}  (train "
        f"{row['train_return_mean']:.2f}{behaviour})  ESR {row['train_esr']:.2f} (test {row['esr']:.2f})  "
        f"Q {row['q_mean']:.1f}  {rate:.0f} steps/s  {(args.steps - row['step']) / rate / 60:.1f} min left",
        flush=True,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; --resume goes on from the last checkpoint", 130)
