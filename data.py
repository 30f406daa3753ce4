"""Offline datasets for every task of a family: made here, stored, checked, loaded.

Two stages, each cached and atomic, the first resumable, under `<data-dir>/<env>/<train>+<test>-seed<k>/`:

1. *Behaviour* (`behaviour.pt`): one SAC agent for each task, all trained at once. Every weight carries a leading task
   axis and one batched matrix product serves all tasks, so a gradient step of 100 agents is one step; no information
   passes between tasks. Policies are kept from the untrained one to the last.
2. *Rollouts* (`<quality>.npz`): the kept policies act in their tasks, actions sampled, and their trajectories become
   the dataset. `random` is the untrained policy, `expert` the last, `medium` the one nearest half-way between them in
   return, `mixed` all of them, evenly spread over training; `replay` is what SAC itself collected first; `relabelled`
   (point robots with goals) pools mixed data of all training tasks and gives every task the same transitions, with
   its own rewards.

Families with a script (sawyer) need no SAC: a controller that does not know what is wanted does what can be done in the
scene, in random order, and its trajectories are the `mixed` data.

A dataset is one `.npz` without pickled objects. Leading axes are (task, transition); rows are in time order within an
episode. Your own data needs the same arrays (those marked * may be left out). Other types of number (float64, integers,
bool) become these when a file is loaded, and whatever else is in the file is not read:

    observations, next_observations  (T, N, d) float32      actions  (T, N, m) float32, in [-1, 1]
    rewards, terminals               (T, N)    float32      terminals: 1 where the MDP itself ended, not at a time limit
    episodes                         (T, N)    int32        the episode of its task that a row belongs to
    tasks                            (T, P)    float64      task parameters, as in envs.py
    train_tasks, test_tasks          (n,)      int64        indices into the task axis
    sparse_rewards *                 (T, N)    float32      what the task encoder sees, where it is not `rewards`
    returns *                        (T,)      float32      mean over each task's trajectories of the return of their
                                                            first episodes (replay: of all), over envs' horizon
    meta *                           JSON text              environment, quality, settings, versions, checksum

    python data.py --env walker-params                      # builds (or finds) the mixed dataset and describes it
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import errno
import gc
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import envs
import pictures

try:
    import fcntl
except ImportError:  # not on Windows; then nothing keeps two builders apart
    fcntl = None

Arrays = dict[str, np.ndarray]
Procedure = Callable[[], None]
FORMAT = 1
QUALITIES = ("random", "medium", "expert", "mixed", "replay", "relabelled")
SAVE_EVERY = 60.0  # seconds between saves of a behaviour in the making
GRAPHS = True  # on CUDA: SAC's update is one graph, its choice of actions another


class DataError(Exception):
    """A dataset that cannot be used or made, or flags that cannot be; the message is one line for the user."""


def refuse(*checks: tuple[Any, str]) -> None:
    """DataError with the words beside the first of these that is true."""
    for wrong, words in checks:
        if wrong:
            raise DataError(words)


def option(key: str) -> str:
    """The flag of a field."""
    return f"--{key.replace('_', '-')}"


def refuse_idle(given: dict[str, Any], names: str, idle: bool, why: str) -> None:
    """DataError if one of these flags was given, though it is idle."""
    for key in names.split():
        refused = idle and given.get(key, False) is not False
        refuse((refused, f"{option(key)} {given.get(key)}: has no effect with {why}; expected it without"))


def choose_device(name: str) -> torch.device:
    """The device that is meant; DataError if it is not there. On CUDA float32 matrix products are TF32 from then on."""
    cuda = torch.cuda.is_available()
    refuse((name == "cuda" and not cuda, "--device cuda: no CUDA device was found; expected one, or --device cpu"))
    device = torch.device(name if name != "auto" else "cuda" if cuda else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        # Adam says so before a graph is captured: in its warm-up
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    return device


# Kinds of numbers: type, range in words, and as a test.
Whole = Annotated[int, "a whole number from 0 to 2^32 - 1", lambda x: 0 <= x < 2**32]
Count = Annotated[int, "a whole number above 0 and below 2^32", lambda x: 0 < x < 2**32]
Number = Annotated[float, "a number from 0 to 1e30", lambda x: 0 <= x <= 1e30]
Positive = Annotated[float, "a number above 0, at most 1e30", lambda x: 0 < x <= 1e30]
Share = Annotated[float, "a number from 0 to 1", lambda x: 0 <= x <= 1]


@dataclass(frozen=True)
class Settings:
    """How the behaviour of a family is trained and rolled out."""

    steps: Count = 200_000  # environment steps for each task
    envs: Count = 8  # sub-environments for each task
    episode: Count = 200  # steps of an episode while SAC learns
    updates: Count = 2  # gradient steps for each step of all sub-environments
    start: Whole = 1_000  # first steps of each task, with uniformly random actions
    hidden: Count = 64
    batch: Count = 64
    lr: Number = 1e-3
    alpha: Positive = 0.1  # initial temperature
    alpha_lr: Number = 1e-3
    tau: Share = 0.02  # of the slow targets
    discount: Share = 0.99
    nstep: Count = 3  # rewards summed before the target bootstraps
    checkpoints: Count = 50
    trajectories: Count = 50  # of each task in a dataset
    shard: Count = 7  # most tasks of one process on a CPU; fixed, so that results do not depend on the number of cores
    core_minutes: Number = 60.0  # what this costs on one core for the family's usual tasks, to tell the user
    replay: Count = 10_000  # first transitions of each task that become the `replay` dataset


# What differs from the class's defaults in each family; on CUDA `FULL` goes on top (point robots: `WIDE`).
POINT = {"steps": 6_400, "episode": 40, "start": 400, "updates": 4, "hidden": 32, "batch": 32, "lr": 3e-3, "tau": 0.05}
POINT |= {"nstep": 1, "alpha": 0.01, "discount": 0.9, "shard": 25, "core_minutes": 2.0}
ONE = {"shard": 1, "hidden": 128, "batch": 128, "core_minutes": 12.0}  # few tasks: a process for each
WARM = {"nstep": 1, "alpha": 1.0, "alpha_lr": 3e-4}  # a temperature that falls fast leaves cheetah and ant standing
CHEETAH = WARM | {"envs": 4}
# with a faster target network, or fewer gradient steps, most hoppers leap and fall
HOPPER = WARM | {"updates": 8, "discount": 0.995, "tau": 0.005}
SMALL = {
    "sparse-point-robot": POINT,
    "point-robot-wind": POINT | {"steps": 9_600},
    "cheetah-vel": CHEETAH | {"steps": 80_000, "core_minutes": 90.0},
    "cheetah-fwd-back": CHEETAH | ONE,
    "ant-fwd-back": WARM | ONE | {"steps": 400_000, "core_minutes": 20.0},
    "ant-dir": WARM | ONE | {"shard": 7, "steps": 400_000, "core_minutes": 250.0},  # of 64 units: hardly walks
    "walker-params": {"steps": 170_000, "hidden": 128, "alpha": 0.2},
    "hopper-params": HOPPER | {"steps": 100_000, "core_minutes": 120.0},
    "humanoid-dir": {"steps": 30_000, "core_minutes": 85.0, "replay": 2_000},  # rows of 772 numbers: 3 kB each
    "halfcheetah": CHEETAH | ONE | {"episode": 1000},
    "hopper": ONE | {"episode": 1000},
    "walker2d": ONE | {"episode": 1000},
}
WIDE = {"hidden": 256, "batch": 256}
FULL = WIDE | {"steps": 400_000, "lr": 3e-4}  # on CUDA
WIDER = 4  # on CUDA, times the sub-environments and gradient steps of an iteration: most of its cost is fixed


def flag(name: str) -> str:
    """The flag of a setting on the command line of this file."""
    return f"--{'sac-' if name in ('lr', 'batch', 'steps', 'hidden', 'envs') else ''}{name}".replace("_", "-")


def settings_for(env: str, device: torch.device, **changes: Any) -> Settings:
    """The family's settings for this device, with `changes` (those that are not None) on top; DataError, which names
    the flag, where nothing would be learned."""
    row = SMALL.get(env, {})
    if device.type == "cuda" and not envs.family(env).xml:
        row = row | WIDE
    elif device.type == "cuda":
        row = {"tau": 0.01} | row | FULL | ({"steps": 100_000} if env == "humanoid-dir" else {})  # its replay: 17 GB
        row |= {key: WIDER * row.get(key, getattr(Settings, key)) for key in ("envs", "updates")}
    s = Settings(**(row | {key: value for key, value in changes.items() if value is not None}))
    most = s.steps // s.envs * s.envs  # steps of each task, all its sub-environments together
    words = f"--sac-steps: with {s.steps} nothing would be learned; expected more, or less --start, --nstep, --sac-envs"
    refuse(
        (s.checkpoints < 2, "--checkpoints: expected at least 2, the untrained policy and the last one, found 1"),
        (most - s.envs * (device.type == "cuda") < max(s.start, s.nstep * s.envs), words),  # CUDA learns first
        (s.replay < s.envs, f"--replay {s.replay}: expected {s.envs} or more, a step of each of the --sac-envs"),
    )
    return s


# -------------------------------------------------------------------------------------- networks and gradient steps
class BatchedLinear(nn.Module):
    """n independent linear layers: (n, B, d_in) -> (n, B, d_out)."""

    def __init__(self, n: int, d_in: int, d_out: int, generator: torch.Generator | None = None):
        super().__init__()
        bound = 1 / math.sqrt(d_in)
        self.weight = nn.Parameter(torch.empty(n, d_in, d_out).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(n, 1, d_out).uniform_(-bound, bound, generator=generator))

    def forward(self, x: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        """`frozen`: gradients reach x only."""
        weight, bias = (p.detach() if frozen else p for p in (self.weight, self.bias))
        return torch.baddbmm(bias, x, weight)


class BatchedMLP(nn.Module):
    """n independent networks with two hidden layers."""

    def __init__(self, n: int, d_in: int, hidden: int, d_out: int, generator: torch.Generator | None = None):
        super().__init__()
        sizes = [d_in, hidden, hidden, d_out]
        self.layers = nn.ModuleList(BatchedLinear(n, i, o, generator) for i, o in zip(sizes, sizes[1:], strict=False))

    def forward(self, x: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu_(layer(x, frozen))
        return self.layers[-1](x, frozen)


def adam(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam for a module on its device; its learning rate is a tensor, so that a captured graph can change it."""
    parameters = list(module.parameters())
    rate = torch.tensor(lr, device=parameters[0].device)
    return torch.optim.Adam(parameters, lr=rate, fused=True, capturable=parameters[0].is_cuda)


def set_rate(optimiser: torch.optim.Optimizer, lr: torch.Tensor) -> None:
    optimiser.param_groups[0]["lr"].copy_(lr)


def anneal(optimisers: dict, rates: dict[str, float], final: float, step: torch.Tensor, total: int) -> None:
    """Learning rates fall linearly from `rates`, at step 0, to the share `final` of them at step `total`."""
    if final != 1:
        share = 1 - (1 - final) * (step / total).clamp_max(1)
        for name in rates.keys() & optimisers.keys():
            set_rate(optimisers[name], rates[name] * share)


def gradients(optimisers: list[torch.optim.Optimizer], loss: torch.Tensor) -> None:
    """The gradients of a loss by the optimisers' own parameters; no other network gets any."""
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    for optimiser in optimisers:
        optimiser.zero_grad()
    loss.backward(inputs=[p for group in groups for p in group["params"] if p.requires_grad])


def descend(optimisers: torch.optim.Optimizer | list[torch.optim.Optimizer], loss: torch.Tensor) -> None:
    """One gradient step of the parameters of an optimiser, or of several."""
    optimisers = optimisers if isinstance(optimisers, list) else [optimisers]
    gradients(optimisers, loss)
    for optimiser in optimisers:
        optimiser.step()


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """slow <- (1 - rate) slow + rate fast, of all weights."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), rate)


def capture(fn: Procedure, generator: torch.Generator | None = None, compiled: bool = False) -> Procedure:
    """`fn`, a function without arguments, as one CUDA graph; the first calls run eagerly and count like any other.
    `generator` is what it draws from, unless from the device's own; `compiled`: by torch.compile before that."""
    graph, stream, calls = None, torch.cuda.Stream(), 0
    run = fuse(fn) if compiled else fn

    def replay():
        nonlocal graph, calls
        calls += 1
        if calls <= 3:  # warm-up on a side stream, as capture asks for; what is compiled is compiled here
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            return
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            if generator is not None:
                graph.register_generator_state(generator)
            gc.collect()  # a graph that is freed while another is recorded ends the recording
            with torch.cuda.graph(graph):
                run()
        graph.replay()

    return replay


def fuse(fn: Procedure) -> Procedure:
    """`fn` compiled by TorchInductor, which makes one kernel of many small operations; random draws stay PyTorch's.
    Where that fails one line says so, and `fn` goes on as it is."""
    # compiled, the change of a tensor that only the optimiser holds can be lost (not a decorator: its import is slow)
    globals()["set_rate"] = torch.compiler.disable(set_rate)
    torch._inductor.config.fallback_random = True
    best = torch.compile(fn, dynamic=False)

    def call():
        nonlocal best
        try:
            best()
        except Exception as error:  # each layer of the compiler has its own; later calls compile nothing
            print(f"torch.compile failed ({type(error).__name__}); going on without", flush=True)
            best = fn
            fn()

    return call


# --------------------------------------------------------------------------------------- SAC for all tasks at once
def twins(critic: BatchedMLP, obs: torch.Tensor, action: torch.Tensor, frozen: bool = False) -> torch.Tensor:
    """(2, T, B) values of twin critics, stacked as 2T networks; obs (T, B, d), action (T, B, m)."""
    x = torch.cat([obs, action], dim=-1)
    return critic(torch.cat([x, x]), frozen).view(2, *x.shape[:2])


def sample_action(actor_out: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tanh-Gaussian action (..., m) and its log density (...)."""
    mean, log_std = actor_out.chunk(2, dim=-1)
    log_std = log_std.clamp(-5, 2)
    u = mean + log_std.exp() * noise
    # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u))
    log_pi = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - u - F.softplus(-2 * u))
    return torch.tanh(u), log_pi.sum(-1)


class SAC(nn.Module):
    """Soft actor-critic (Haarnoja et al. 2018) with tuned temperature for T tasks at once.

    Losses are summed over tasks and nothing is normalised or clipped across them, so a task's weights are the same
    whatever the other tasks are. A minibatch row is [s, a, R, s', weight]: R sums the discounted rewards of up to
    `nstep` steps, s' is where they end and `weight` is what the value there counts, gamma^n or 0 if terminal.
    """

    def __init__(self, tasks: int, obs_dim: int, act_dim: int, settings: Settings, generator: torch.Generator | None):
        super().__init__()
        self.tasks, self.obs_dim, self.act_dim, self.settings = tasks, obs_dim, act_dim, settings
        self.actor = BatchedMLP(tasks, obs_dim, settings.hidden, 2 * act_dim, generator)
        self.critic = BatchedMLP(2 * tasks, obs_dim + act_dim, settings.hidden, 1, generator)  # twins: two blocks of T
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.full((tasks,), math.log(settings.alpha)))

    def optimiser(self) -> torch.optim.Optimizer:
        """One fused Adam for everything; learning rates are tensors, so that a captured graph can change them."""
        s, device = self.settings, self.log_alpha.device
        networks = [*self.actor.parameters(), *self.critic.parameters()]
        rates = ((networks, s.lr), ([self.log_alpha], s.alpha_lr))
        groups = [{"params": params, "lr": torch.tensor(rate, device=device)} for params, rate in rates]
        return torch.optim.Adam(groups, fused=True, capturable=device.type == "cuda")

    def loss(self, rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Losses of critics, actor and temperature: means over the minibatch, sums over tasks. rows (T, B, D), noise
        (2, T, B, m). Each network gets the gradient of its own loss only."""
        d, m = self.obs_dim, self.act_dim
        obs, action, reward, next_obs, weight = rows.split([d, m, 1, d, 1], dim=-1)
        alpha = self.log_alpha.exp()
        with torch.no_grad():
            # y = R + weight (min Qbar(s', a') - alpha log pi(a'|s'))
            next_action, next_log_pi = sample_action(self.actor(next_obs), noise[0])
            value = twins(self.target, next_obs, next_action).amin(0) - alpha[:, None] * next_log_pi
            y = reward[..., 0] + weight[..., 0] * value
        critic_loss = (twins(self.critic, obs, action) - y).square().mean(-1).sum()
        # alpha log pi(a|s) - min Q(s, a), the critic's weights held fixed
        a, log_pi = sample_action(self.actor(obs), noise[1])
        actor_loss = (alpha.detach()[:, None] * log_pi - twins(self.critic, obs, a, frozen=True).amin(0)).mean(-1).sum()
        # the entropy is driven to -m
        alpha_loss = -(alpha * (log_pi.detach().mean(-1) - m)).sum()
        return critic_loss + actor_loss + alpha_loss

    def update(self, rows: torch.Tensor, noise: torch.Tensor, optimiser: torch.optim.Optimizer) -> None:
        """One gradient step of every network of every task."""
        descend(optimiser, self.loss(rows, noise))
        follow(self.target, self.critic, self.settings.tau)


def n_step(rows: torch.Tensor, d: int, m: int, discount: float) -> torch.Tensor:
    """Folds k consecutive rows (k, ..., [s, a, r, s', terminal, ended]) into one [s, a, R, s', weight] (...)."""
    s_a, total, following, terminal, ended = rows[0].split([d + m, 1, d, 1, 1], dim=-1)
    power, going = torch.full_like(total, discount), 1 - ended
    for row in rows[1:]:
        _, r, s2, d2, ended = row.split([d + m, 1, d, 1, 1], dim=-1)
        total = total + going * power * r
        following, terminal = torch.lerp(following, s2, going), torch.lerp(terminal, d2, going)
        power, going = torch.where(going > 0, power * discount, power), going * (1 - ended)
    return torch.cat([s_a, total, following, power * (1 - terminal)], dim=-1)


class Trainer:
    """SAC, its replay and its environments for some tasks; may be saved after any iteration, and goes on exactly.

    On CUDA the host waits for the device once in a step: for the actions. What goes there lies in pinned memory, so
    that its copies are only queued; by the next wait they are done and the memory is free to be written again.
    """

    def __init__(self, env: str, tasks: np.ndarray, seed: int, settings: Settings, device: torch.device, threads: int):
        row, cuda = envs.family(env), device.type == "cuda"
        self.settings, self.device, self.n, e = settings, device, len(tasks), settings.envs
        self.vector = envs.make(env, tasks.repeat(e, axis=0), seed, horizon=settings.episode, threads=threads)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.agent = SAC(self.n, row.obs_dim, row.act_dim, settings, torch.Generator().manual_seed(seed)).to(device)
        self.optimiser = self.agent.optimiser()
        self.iterations = settings.steps // e
        width = 2 * row.obs_dim + row.act_dim + 3  # s, a, r, s', terminal, ended
        # row t of the replay is the t-th step of every sub-environment
        self.replay = torch.zeros(self.n, self.iterations, e, width, device=device)  # nothing is ever dropped
        self.filled = torch.zeros((), device=device)  # transitions of each task; there, so that a graph can read it
        self.host_obs, self.host_rows = (torch.zeros(self.n, e, k, pin_memory=cuda) for k in (row.obs_dim, width))
        self.seen, self.action = self.host_obs.to(device), torch.zeros(self.n, e, row.act_dim, device=device)
        self.marks = np.linspace(0, self.iterations, settings.checkpoints).round().astype(int)
        self.policies: list[torch.Tensor] = []
        self.iteration = 0
        self.obs = self.vector.reset()[0]
        self.choose, self.learn = self.choose_eagerly, self.learn_eagerly
        if GRAPHS and cuda:
            self.choose, self.learn = (capture(fn, self.generator) for fn in (self.choose, self.learn))

    def act(self) -> np.ndarray:
        """Sampled actions (n x envs, m)."""
        if self.iteration * self.settings.envs < self.settings.start:
            self.action.copy_(2 * torch.rand(self.action.shape, generator=self.generator, device=self.device) - 1)
        else:
            self.host_obs.copy_(torch.from_numpy(self.obs).view_as(self.host_obs))
            self.seen.copy_(self.host_obs, non_blocking=True)
            self.choose()
        return self.action.flatten(0, 1).cpu().numpy().copy()  # waits for the device

    @torch.no_grad()
    def choose_eagerly(self) -> None:
        """From the observations in `seen` to actions in `action`."""
        noise = torch.randn(self.action.shape, generator=self.generator, device=self.device)
        self.action.copy_(sample_action(self.agent.actor(self.seen), noise)[0])

    def check(self) -> None:
        """FloatingPointError unless all weights are finite. A NaN anywhere is in the policies two steps later."""
        if not all(p.isfinite().all() for p in self.agent.parameters()):
            where = f"{self.vector.name}, step {self.iteration * self.settings.envs:,}"
            raise FloatingPointError(f"SAC's weights are not finite ({where}); expected another --sac-lr of data.py")

    def collect(self, action: np.ndarray) -> None:
        """One step of every sub-environment into the replay."""
        obs = self.obs
        self.obs, reward, terminated, truncated, info = self.vector.step(action)
        ended = terminated | truncated
        parts = obs, action, reward[:, None], info.get("final_obs", self.obs), terminated[:, None], ended[:, None]
        self.host_rows.copy_(torch.from_numpy(np.concatenate(parts, axis=1)).view_as(self.host_rows))
        rows = self.host_rows.to(self.device, non_blocking=True)
        if info["blew_up"].any():  # no step was taken: the one before stands in its place too, and ends its episode
            refuse((not self.iteration, f"{self.vector.name}: the physics blew up in the very first step"))
            blown = torch.from_numpy(info["blew_up"]).view(self.n, -1, 1).to(self.device)
            before = self.replay[:, self.iteration - 1]
            before[..., -1:] = torch.where(blown, 1.0, before[..., -1:])
            rows = torch.where(blown, before, rows)
        self.replay[:, self.iteration] = rows

    def learn_eagerly(self) -> None:
        """`settings.updates` gradient steps on minibatches drawn uniformly, for each task on its own."""
        n, (u, b, k, e) = self.n, (getattr(self.settings, name) for name in ("updates", "batch", "nstep", "envs"))
        per_task = self.replay.shape[1] * e
        draw = torch.rand(u, n, b, generator=self.generator, device=self.device, dtype=torch.float64)
        start = (draw * (self.filled - (k - 1) * e)).long() + torch.arange(n, device=self.device)[:, None] * per_task
        index = start.flatten() + torch.arange(k, device=self.device)[:, None] * e  # the next step is e rows further
        rows = self.replay.view(n * per_task, -1).index_select(0, index.flatten()).view(k, u, n, b, -1)
        rows = n_step(rows, self.agent.obs_dim, self.agent.act_dim, self.settings.discount)
        noise = torch.randn(u, 2, n, b, self.agent.act_dim, generator=self.generator, device=self.device)
        for i in range(u):
            self.agent.update(rows[i], noise[i], self.optimiser)

    def step(self) -> None:
        """Keeps the policy if one is due; then one step of every sub-environment and its gradient steps. On CUDA these
        come first, from the replay as it is: the device is busy with them while the environments step."""
        self.keep()
        action, at_once = self.act(), self.device.type == "cuda"
        if at_once:
            self.learn_if_due()
        self.collect(action)
        self.iteration += 1
        self.filled.fill_(self.iteration * self.settings.envs)
        if not at_once:
            self.learn_if_due()

    def learn_if_due(self) -> None:
        s = self.settings
        if self.iteration * s.envs >= s.start and self.iteration >= s.nstep:
            # the networks' rate falls linearly to a tenth, so that the last policies are steady
            self.optimiser.param_groups[0]["lr"].fill_(s.lr * (1 - 0.9 * self.iteration / self.iterations))
            self.learn()

    def keep(self) -> None:
        """Notes the policies of now, a row (T, parameters), where a checkpoint is due."""
        while len(self.policies) < len(self.marks) and self.marks[len(self.policies)] <= self.iteration:
            flat = [p.detach().reshape(self.n, -1) for p in self.agent.actor.parameters()]
            self.policies.append(torch.cat(flat, dim=1).cpu())

    def result(self) -> dict[str, torch.Tensor]:
        """Every kept policy (checkpoints, T, parameters), and the first transitions of each task."""
        self.check()
        self.keep()
        early = self.replay[:, : self.settings.replay // self.settings.envs].cpu().clone()
        return {"policies": torch.stack(self.policies), "early": early}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here exactly."""
        self.check()
        return {
            "iteration": self.iteration,
            "agent": self.agent.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "replay": self.replay[:, : self.iteration].contiguous().cpu(),  # a view would be saved with all its storage
            "policies": torch.stack(self.policies),
            "generator": self.generator.get_state(),
            "vector": {key: torch.from_numpy(value) for key, value in self.vector.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.agent.load_state_dict(state["agent"])
        self.optimiser.load_state_dict(state["optimiser"])
        for group in self.optimiser.param_groups:  # load_state_dict moves all but these
            group["lr"] = group["lr"].to(self.device)
        self.replay[:, : self.iteration] = state["replay"].to(self.device)
        self.filled.fill_(self.iteration * self.settings.envs)
        self.policies = list(state["policies"])
        self.generator.set_state(state["generator"])
        self.vector.load_state_dict({key: value.numpy() for key, value in state["vector"].items()})
        self.obs = self.vector.observe()


# ------------------------------------------------------------------------------------------------- files and locks
def write(path: Path, save: Callable | bytes) -> None:
    """Writes bytes, or calls save(file), under a temporary name, then renames: no final name ever has half a file.
    OSError, which names the file, if that fails; what stood there before still does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file) if callable(save) else file.write(save)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # on a full disk torch.save raises the latter on top of the former
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read(path: Path, device: torch.device | str = "cpu") -> Any:
    """What `torch.save` wrote. Nothing in the file is run, and it is refused if any byte of a record has changed
    (torch.load does not look at the records' checksums); raises whatever the reader does."""
    with zipfile.ZipFile(path) as file:
        if any(info.compress_type != zipfile.ZIP_STORED for info in file.infolist()) or file.testzip() is not None:
            raise zipfile.BadZipFile("a record is compressed, as torch.save's are not, or does not match its checksum")
    return torch.load(path, map_location=device, weights_only=True)


def out_of_memory(error: Exception) -> bool:
    """Whether it says that memory is short, as PyTorch on a CPU does by a plain RuntimeError."""
    return bool(re.search("MemoryError|out of memory|allocate|ALLOC_FAILED", f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def believing(path: Path, wrong: str, remedy: str):
    """DataError in the place of any error that comes of what a file holds."""
    try:
        yield
    except Exception as error:
        unread = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if isinstance(error, DataError) or unread or out_of_memory(error):  # said already, or of no file's doing
            raise
        raise DataError(f"{path}: {wrong} ({type(error).__name__}); {remedy}") from None


def check_same(path: Path, then: dict, now: dict, name_of: Callable[[str], str], remedy: str) -> None:
    """DataError if a file was made with other settings than those of now (None: any, as of a newer setting)."""
    other = {key: then[key] for key, x in now.items() if x is not None and then.get(key, x) != x}
    found = ", ".join(f"{name_of(key)} {value}" for key, value in other.items())
    refuse((other, f"{path}: made with {found:.80}, asked for {[now[key] for key in other]}; {remedy}"))


@contextlib.contextmanager
def locked(folder: Path, run: bool = False):
    """Only one process at a time works in a folder. Another says so and waits, or, of a `run`, ends with DataError."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse((run, f"{folder}: a run is under way there; expected its end, or another --run-dir"))
            print(f"waiting for another process that builds in {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except (AttributeError, OSError):  # Windows, or a network file system without locks: others may be writing
            yield
            return
        for left in folder.glob(".*.tmp"):  # by a process that was killed as it wrote
            left.unlink(missing_ok=True)
        yield


class Progress:
    """A line on long work, none on short: share done, rate since the last line, time left. On a terminal it is
    rewritten every second, in a log one follows the other every twenty."""

    def __init__(self, title: str, total: int):
        self.title, self.total = title, total
        self.tty = sys.stdout is not None and sys.stdout.isatty()  # none where it is closed
        self.said, self.last = time.monotonic(), None  # when a line was said; the last call that made one, or the first

    def show(self, done: int) -> None:
        """So much is done; what was before the first call says nothing about the rate."""
        now = time.monotonic()
        then, before = self.last = self.last or (now, done)
        if now - self.said < (1 if self.tty else 20) or done <= before or now <= then:
            return
        rate, self.last = (done - before) / (now - then), (now, done)
        left = (self.total - done) / rate / 60
        how_fast = f"{rate:,.{0 if rate >= 10 else 2}f} steps/s, {left:,.1f} min left"
        self.say(f"{self.title}: {done / self.total:4.0%}, {how_fast}", "\r" if self.tty else "\n")

    def say(self, line: str, end: str = "\n") -> None:
        """Shows a line; the next one is due a while later."""
        print(f"{line:<110}" if self.tty else line, end=end, flush=True)
        self.said = time.monotonic()


# ------------------------------------------------------------------------------------------------ stage 1: behaviour
WORKER = "import sys; sys.path[0] = sys.argv[1]; import data; data.work()"


def _train_shard(path: Path, env: str, tasks: np.ndarray, seed: int, settings: dict, device: str, threads: int):
    """Trains one shard's agents, from its last save if there is one, and leaves its result in `path`. Yields twice a
    second how many iterations are done."""
    settings = Settings(**settings)
    label = _label(env, settings, tasks)
    saved = _load_behaviour(path, label) if path.exists() else {}
    if "policies" in saved:
        yield settings.steps // settings.envs
        return
    trainer = Trainer(env, tasks, seed, settings, torch.device(device), threads)
    if saved:
        with believing(path, "damaged", "delete it to build it anew"):
            trainer.load_state_dict(saved["trainer"])
    told_at, saved_at, pause = time.time(), time.time(), SAVE_EVERY
    while trainer.iteration < trainer.iterations:
        trainer.step()
        if time.time() - told_at > 0.5:
            told_at = time.time()
            yield trainer.iteration
        if time.time() - saved_at > pause:
            began = time.time()
            write(path, lambda file: torch.save(label | {"trainer": trainer.state_dict()}, file))
            saved_at = time.time()
            pause = max(SAVE_EVERY, 10 * (saved_at - began))  # on CUDA a save is gigabytes
    write(path, lambda file: torch.save(label | trainer.result(), file))
    yield trainer.iteration
    trainer.choose = trainer.learn = None  # they refer to the trainer: without the cycle its memory is free at once


def work() -> None:
    """All that a worker does: trains the shards that standard input holds, and reports how far each is, a line of JSON
    in one piece on standard output. Once nobody reads that, the parent was stopped or killed, and the worker ends."""
    report = lambda value: os.write(1, f"{json.dumps(value)}\n".encode())
    torch.set_num_threads(1)
    with contextlib.suppress(BrokenPipeError):
        try:
            for i, job in pickle.load(sys.stdin.buffer):
                for done in _train_shard(**job):
                    report([i, done])
        except Exception as error:
            if not (isinstance(error, DataError | FloatingPointError | OSError) or out_of_memory(error)):
                raise
            report(str(error) or "out of memory")
            sys.exit(3 if isinstance(error, FloatingPointError) else 2)


def _run_in_workers(jobs: list[dict[str, Any]], workers: int, show: Callable) -> None:
    """Trains the shards in processes of one thread each; raises what one of them does, DataError if one is killed."""
    reader, writer = os.pipe()
    command = [sys.executable, "-c", WORKER, str(Path(envs.__file__).resolve().parent)]
    how = {"env": os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, "stdin": subprocess.PIPE}
    how["start_new_session"] = True  # Ctrl-C is for the parent to answer
    # files that are there are whole, or nearly: so what is left is shared out evenly
    order = sorted(enumerate(jobs), key=lambda job: job[1]["path"].exists())
    running, said = [], ["a process failed or was killed (no memory?); the same command goes on from its save"]
    try:
        with open(reader) as reports:  # once it is closed, each worker's next report fails and ends it
            with open(writer, "wb") as pipe:
                for k in range(workers):
                    running.append(subprocess.Popen(command, stdout=pipe, **how))
                    with contextlib.suppress(BrokenPipeError), running[-1].stdin as file:
                        pickle.dump(order[k::workers], file)
            for line in reports:
                report = json.loads(line)
                said.append(report) if isinstance(report, str) else show(*report)
                if any(worker.poll() for worker in running):
                    for worker in running:
                        worker.terminate()
    finally:
        codes = [worker.wait() for worker in running]
    if any(codes):
        raise (FloatingPointError if 3 in codes else DataError)(said[-1])


def _label(env: str, settings: Settings, tasks: np.ndarray) -> dict[str, Any]:
    """What a behaviour file says it was made for."""
    return {"env": env, "settings": dataclasses.asdict(settings), "tasks": torch.from_numpy(tasks)}


def _load_behaviour(path: Path, label: dict, flags: dict | None = None) -> dict:
    """A behaviour file, whole or in the making; DataError if it is damaged or made for anything else than `label`, of
    whose settings all count, or only the `flags` that were given."""
    with believing(path, "damaged", "delete it to build it anew"):
        saved = read(path)
        asked, remedy = label["settings"] if flags is None else flags, "delete it or use another --data-dir"
        asked = asked | dict.fromkeys(("core_minutes", "trajectories"))  # those no agent in training sees
        check_same(path, saved["settings"], asked, flag, remedy)
        Settings(**saved["settings"])  # TypeError if another version made it
        same = saved["env"] == label["env"] and torch.equal(saved["tasks"], label["tasks"])
        refuse((not same, f"{path}: made for other tasks; {remedy}"))
    return saved


def build_behaviour(
    env: str, tasks: np.ndarray, seed: int, settings: Settings, folder: Path, device: torch.device, **how: Any
) -> dict:
    """Trains one SAC agent for each task, or goes on where an earlier call stopped; returns `behaviour.pt`, whose own
    settings hold (it may come from another kind of device); DataError where `flags` ask for others.

    On a CPU shards of tasks are spread over processes of one thread each, the fastest way found to use the cores; on
    CUDA all tasks are one batch. "policies" is (checkpoints, T, parameters), "early" SAC's first transitions.
    """
    path, label, cpu = folder / "behaviour.pt", _label(env, settings, tasks), device.type == "cpu"
    if not path.exists():
        job = {"env": env, "settings": label["settings"], "device": str(device), "threads": 1 if cpu else envs.cores()}
        jobs = [
            job | {"path": folder.resolve() / f"behaviour-part{i}.pt", "tasks": shard, "seed": 1_000_003 * seed + i}
            for i, shard in enumerate(np.array_split(tasks, math.ceil(len(tasks) / settings.shard) if cpu else 1))
        ]
        _run_jobs(jobs, min(how["workers"] or envs.cores(), len(jobs)))
        parts = [_load_behaviour(job["path"], _label(env, settings, job["tasks"])) for job in jobs]
        whole = {key: torch.cat([part[key] for part in parts], axis) for key, axis in (("policies", 1), ("early", 0))}
        write(path, lambda file: torch.save(label | whole, file))
    for part in folder.glob("behaviour-part*.pt"):
        part.unlink(missing_ok=True)
    return _load_behaviour(path, label, how["flags"])


def _run_jobs(jobs: list[dict[str, Any]], workers: int) -> None:
    """Trains all shards, see `_train_shard`, and shows how far they are."""
    env, settings, done = jobs[0]["env"], jobs[0]["settings"], {}
    tasks = sum(len(job["tasks"]) for job in jobs)
    bar = Progress(f"SAC on {env}, {tasks} tasks", settings["steps"] // settings["envs"] * settings["envs"] * tasks)

    def show(i: int, iterations: int) -> None:
        bar.last = bar.last if i in done else None  # what a shard had saved says nothing about the rate
        done[i] = iterations * settings["envs"] * len(jobs[i]["tasks"])
        bar.show(sum(done.values()))

    if workers > 1 and envs.family(env) is envs.BUILT_IN.get(env):
        return _run_in_workers(jobs, workers, show)
    for i, job in enumerate(jobs):
        for iterations in _train_shard(**job):
            show(i, iterations)


# ------------------------------------------------------------------------------------------------- stage 2: rollouts
def play_policies(env: str, tasks: np.ndarray, policies: torch.Tensor, settings: Settings, seed: int) -> Arrays:
    """Rolls out policies (T, k, parameters), `settings.trajectories` / k trajectories each, with sampled actions; what
    `trajectories_of` returns."""
    row, (count, k), s = envs.family(env), policies.shape[:2], settings.trajectories
    actor = load_policies(policies.flatten(0, 1), row, settings.hidden)
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        x = torch.as_tensor(obs, dtype=torch.float32).view(count * k, s // k, row.obs_dim)
        noise = torch.randn(count * k, s // k, row.act_dim, generator=generator)
        return sample_action(actor(x), noise)[0].view(-1, row.act_dim).numpy()

    return trajectories_of(env, tasks, act, s, seed)


PATIENCE, LINGER = 50, 5  # steps after which a script gives a behaviour up, and that it stays once it is achieved


class Performer:
    """The scripted behaviour: in each of these tasks (n, P) it does what can be done there, one thing after the other,
    drawn at random. It reads the scene from a task's parameters but not what is wanted, and sees no rewards."""

    def __init__(self, row: envs.Family, tasks: np.ndarray, seed: int):
        self.script, self.tasks = row.script, tasks
        self.rng = np.random.default_rng(seed)
        self.doing = np.stack([self.script.another(self.rng, task) for task in tasks])
        self.left = np.full(len(tasks), PATIENCE)

    def act(self, obs: np.ndarray) -> np.ndarray:
        """(n, d) observations -> (n, m) actions."""
        achieved = self.script.achieved(self.doing, obs)
        self.left = np.where(achieved, np.minimum(self.left, LINGER), self.left) - 1
        for i in np.flatnonzero(self.left < 0):
            self.doing[i], self.left[i] = self.script.another(self.rng, self.tasks[i]), PATIENCE
        action = 0.85 * self.script.act(self.doing, obs)  # few reach the rim, where a tanh-Gaussian has no density
        return np.clip(action + 0.1 * self.rng.standard_normal(action.shape), -1, 1)


def trajectories_of(env: str, tasks: np.ndarray, act: Any, trajectories: int, seed: int) -> Arrays:
    """So many trajectories of each task under act: (n, d) observations -> (n, m) actions.

    Each is `data_horizon` steps long; where an episode ends early the next one begins, and the last may be cut short.
    Returns a dataset's arrays and "first_return" (T, trajectories): of first episodes, over the family's horizon.
    """
    row = envs.family(env)
    steps, n = row.data_horizon, len(tasks) * trajectories
    vector = envs.make(env, tasks.repeat(trajectories, axis=0), seed=seed, horizon=steps)
    filled, episode, obs, out = np.zeros(n, int), np.zeros(n), vector.reset()[0], {}
    bar = Progress(f"rolling out {env}, {len(tasks)} tasks", n * steps)
    for _ in range(2 * steps):
        action = act(obs)
        following, reward, terminated, truncated, info = vector.step(action)
        rows = {"observations": obs, "actions": action, "rewards": reward}
        rows |= {"next_observations": info.get("final_obs", following), "terminals": terminated}
        rows |= {"sparse_rewards": info.get("sparse_reward", reward), "episodes": episode}
        good = np.flatnonzero(~info["blew_up"] & (filled < steps))
        out = out or {key: np.zeros((n, steps, *value.shape[1:]), np.float32) for key, value in rows.items()}
        for key, value in rows.items():
            out[key][good, filled[good]] = value[good]
        filled[good] += 1
        episode += terminated | truncated
        obs = following
        if filled.min() == steps:
            break
        bar.show(int(filled.sum()))
    else:
        raise DataError(f"{env}: the physics blew up in more than half of the steps of a trajectory")
    vector.close()
    counted = (out["episodes"] == out["episodes"][:, :1]) & (np.arange(steps) < row.horizon)
    first_return = (out["sparse_rewards"] * counted).sum(1, dtype=np.float64).reshape(len(tasks), trajectories)
    out["episodes"] = np.diff(out["episodes"], axis=1, prepend=-1) != 0  # where one begins
    if not row.sparse_reward:
        del out["sparse_rewards"]
    arrays = {key: value.reshape(len(tasks), trajectories * steps, *value.shape[2:]) for key, value in out.items()}
    return arrays | {"episodes": arrays["episodes"].cumsum(1) - 1, "first_return": first_return}


def load_policies(flat: torch.Tensor, row: envs.Family, hidden: int) -> BatchedMLP:
    """The actors (n, parameters) as one module."""
    actor = BatchedMLP(len(flat), row.obs_dim, hidden, 2 * row.act_dim).requires_grad_(False)
    parts = flat.split([p[0].numel() for p in actor.parameters()], dim=1)
    for parameter, value in zip(actor.parameters(), parts, strict=True):
        parameter.copy_(value.view_as(parameter))
    return actor


def roll_out(env: str, tasks: np.ndarray, quality: str, behaviour: dict, settings: Settings, seed: int) -> dict:
    """The arrays of the dataset of this quality, see the top of this file; a family's script needs no `behaviour`."""
    row, stream = envs.family(env), 1_000_003 * seed + 1_000 + QUALITIES.index(quality)
    if row.script:
        performer = Performer(row, tasks.repeat(settings.trajectories, axis=0), stream)
        return trajectories_of(env, tasks, performer.act, settings.trajectories, stream)
    if quality == "replay":
        return _replay(env, tasks, behaviour["early"])
    policies = behaviour["policies"].transpose(0, 1)  # (T, checkpoints, parameters)
    count = max(settings.trajectories, Settings.trajectories if quality == "medium" else 0)
    spread = np.linspace(0, policies.shape[1] - 1, count).round().astype(int)  # of `mixed`
    chosen = {"random": np.array([[0]]), "expert": np.array([[-1]]), "mixed": spread[None]}.get(quality)
    if quality == "medium":  # chosen among 50 policies or more, even where fewer trajectories of it are wanted
        probe = dataclasses.replace(settings, trajectories=count)
        returns = roll_out(env, tasks, "mixed", behaviour, probe, seed)["first_return"]
        smooth = np.apply_along_axis(lambda r: np.convolve(np.pad(r, 1, "edge"), np.ones(3) / 3, "valid"), 1, returns)
        half = (smooth[:, :1] + smooth[:, -1:]) / 2
        chosen = spread[np.abs(smooth - half).argmin(1)][:, None]
    return play_policies(env, tasks, policies[np.arange(len(tasks))[:, None], chosen], settings, stream)  # (T, k, ...)


def sparse(rewards: Any, threshold: float) -> Any:
    """FOCAL++'s sparse context reward, its Eq. 35 with goal radius R: (r - R) / |R| where r > R, else 0."""
    return (rewards - threshold) / abs(threshold) * (rewards > threshold)


def relabel(env: str, tasks: np.ndarray, train: np.ndarray, arrays: dict, seed: int) -> Arrays:
    """Merge, relabel, sparsify (FOCAL++ appendix D.2): what a transition's (s, a, s') is says nothing about its task.

    N transitions drawn from all training tasks' data become every task's, test tasks included, each row an episode of
    its own, with the task's own rewards; sparse_rewards are Eq. 35's with R = -0.5 (its Table 5).
    """
    row = envs.family(env)
    t, n = len(tasks), arrays["rewards"].shape[1]
    drawn = np.random.default_rng(seed).choice(len(train) * n, n, replace=False)
    task, i = train[drawn // n], drawn % n
    alike = {key: arrays[key][task, i] for key in ("observations", "actions", "next_observations")}  # s, a, s'
    rewards = np.stack([row.reward(np.repeat(task[None], n, axis=0), *alike.values(), 1.0) for task in tasks])
    alike |= {"terminals": np.zeros(n), "episodes": np.arange(n)}
    arrays = {key: np.repeat(value[None], t, axis=0) for key, value in alike.items()}
    return arrays | {"rewards": rewards, "sparse_rewards": sparse(rewards, -0.5)}


def _replay(env: str, tasks: np.ndarray, early: torch.Tensor) -> Arrays:
    """SAC's first transitions (T, iterations, envs, [s, a, r, s', terminal, ended]), episodes in order of beginning."""
    row, (t, steps, e, width) = envs.family(env), early.shape
    rows, n = early.transpose(1, 2).numpy(), e * steps
    first = np.concatenate([np.ones((t, e, 1), bool), rows[:, :, :-1, -1] > 0], axis=2)
    began = np.maximum.accumulate(np.where(first, np.arange(steps), 0), axis=2)  # the iteration of its first step
    order = (began * e + np.arange(e)[:, None]).reshape(t, n).argsort(axis=1, kind="stable")
    rows = np.take_along_axis(rows.reshape(t, n, width), order[..., None], axis=1)
    s, a, r, s2, terminal, _ = np.split(rows, np.cumsum([row.obs_dim, row.act_dim, 1, row.obs_dim, 1]), axis=2)
    arrays = {"observations": s, "actions": a, "rewards": r[..., 0], "next_observations": s2}
    arrays["terminals"] = terminal[..., 0]
    arrays["episodes"] = np.take_along_axis(first.reshape(t, n), order, axis=1).cumsum(1) - 1
    if row.sparse_reward:
        reported = row.sparse_reward(tasks.repeat(n, axis=0), *(x.reshape(t * n, -1) for x in (s, a, s2)), 1.0)
        arrays["sparse_rewards"] = reported.reshape(t, n).astype(np.float32)
    rewards = arrays.get("sparse_rewards", arrays["rewards"])
    task, _, total = _episode_returns(rewards, arrays["episodes"], arrays["terminals"], row.horizon)
    with np.errstate(invalid="ignore"):  # not a number where no episode was seen to its end
        return arrays | {"returns": np.bincount(task, total, t) / np.bincount(task, minlength=t)}


# --------------------------------------------------------------------------------------------------- stored datasets
# Axes: T tasks, N transitions, d and m numbers in an observation and an action, P parameters of a task.
REQUIRED = {
    "observations": ("TNd", np.float32), "actions": ("TNm", np.float32), "rewards": ("TN", np.float32),
    "next_observations": ("TNd", np.float32), "terminals": ("TN", np.float32), "episodes": ("TN", np.int32),
    "tasks": ("TP", np.float64), "train_tasks": ("n", np.int64), "test_tasks": ("k", np.int64),
}  # fmt: skip
OPTIONAL = {"sparse_rewards": ("TN", np.float32), "returns": ("T", np.float32)}


@dataclass
class Dataset:
    """A dataset on its device; T tasks, N transitions of each. See the top of this file for the arrays."""

    observations: torch.Tensor  # (T, N, d)
    actions: torch.Tensor  # (T, N, m)
    rewards: torch.Tensor  # (T, N)
    next_observations: torch.Tensor  # (T, N, d)
    terminals: torch.Tensor  # (T, N)
    episodes: torch.Tensor  # (T, N)
    context_rewards: torch.Tensor  # (T, N) sparse rewards where the file has them, else the rewards
    tasks: np.ndarray  # (T, P)
    train_tasks: np.ndarray  # (n,) which of the T
    test_tasks: np.ndarray  # (k,)
    returns: np.ndarray  # (T,), not a number where not known
    meta: dict


def checksum(arrays: Arrays) -> str:
    """SHA-256 of names, types, shapes and contents; the order of the dictionary does not count."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def save(path: Path, arrays: Arrays, meta: dict) -> None:
    """Writes a dataset, arrays as at the top, whole or not at all, with format and checksum beside `meta`. OSError."""
    arrays = {name: np.asarray(arrays[name], kind[1]) for name, kind in (REQUIRED | OPTIONAL).items() if name in arrays}
    text = json.dumps(meta | {"format": FORMAT, "checksum": checksum(arrays)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda file: np.savez(file, meta=np.array(text), **arrays))


def load(path: Path | str, env: str | None = None, device: torch.device | str = "cpu") -> Dataset:
    """Reads a dataset onto `device`; DataError, in one sentence, if the file cannot be trusted or is not for `env`."""
    path = Path(path)
    try:
        arrays, meta = _read(path)
        made_for, found = meta.get("env", env), meta.get("format", FORMAT)
        refuse(
            (found != FORMAT, f"format {found!r:.40}, expected {FORMAT}; build it anew"),
            (env and made_for != env, f"made for {made_for!s:.40}, expected {env}"),
            ("checksum" in meta and checksum(arrays) != meta["checksum"], "its checksum differs: the file was changed"),
        )
        _check(arrays, env)
    except (DataError, ValueError) as error:  # the latter if there is no such family
        raise DataError(f"{path}: {error}") from None
    meta = ({"env": env} if env else {}) | meta | {"checksum": meta.get("checksum") or checksum(arrays)}
    unknown = np.full(len(arrays["tasks"]), np.nan, np.float32)
    on_host = {name: arrays.pop(name, unknown) for name in ("tasks", "train_tasks", "test_tasks", "returns")}
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    context_rewards = tensors.pop("sparse_rewards", tensors["rewards"])
    return Dataset(**tensors, **on_host, context_rewards=context_rewards, meta=meta)


def sparsify(dataset: Dataset, threshold: float | None = None) -> float:
    """Makes the rewards that contexts show sparse, FOCAL++'s Eq. 35 on the full rewards, and returns its R.

    Without a threshold R is the one that leaves half of the training tasks' transitions non-zero, as the paper chose
    its own (on sparse-point-robot: the paper's). Rewards themselves, which actor, critic and returns use, stay as
    they are. DataError where there is no such R.
    """
    if threshold is None:
        threshold = getattr(envs.FAMILIES.get(dataset.meta.get("env")), "sparse_threshold", None)
    if threshold is None:
        threshold = dataset.rewards[torch.from_numpy(dataset.train_tasks)].flatten().double().median().item()
    refuse(
        (dataset.meta.get("quality") == "relabelled", "--sparse: contexts of relabelled data are sparse by themselves"),
        (threshold == 0, "no sparse rewards: half of the rewards are 0 or less, and Eq. 35 divides by |R| = 0"),
    )
    dataset.context_rewards = sparse(dataset.rewards, threshold)
    return threshold


def _read(path: Path) -> tuple[Arrays, dict]:
    """The arrays that a dataset needs, and `meta`; DataError where they cannot be read."""
    arrays, name = {}, "the file"
    try:
        with zipfile.ZipFile(path) as file:
            for info in file.infolist():
                file.open(info).close()  # a zip says each name twice: a damaged one cannot hide an array
        with np.load(path, allow_pickle=False) as file:
            for name in [key for key in (*REQUIRED, *OPTIONAL, "meta") if key in file.files]:
                arrays[name] = np.asarray(file[name])
        meta = json.loads(str(arrays.pop("meta", "{}")))
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a different one for each way a file can be damaged
        if out_of_memory(error):
            raise
        words = f"not a readable .npz dataset: {name} is damaged or not numbers"
        raise DataError(f"{words} ({type(error).__name__})") from None
    good = isinstance(meta, dict) and isinstance(meta.get("env", ""), str)
    refuse((not good, f"meta is {str(meta)!r:.60}, expected a JSON object with the name of an environment, or no meta"))
    return arrays, meta


def _check(arrays: Arrays, env: str | None) -> None:
    """Gives each array its type; DataError, which says what is wrong, if this is no dataset, or not one of `env`."""
    missing = [name for name in REQUIRED if name not in arrays]
    refuse((missing, f"lacks {', '.join(missing)}"))
    row = None if env is None else envs.family(env)
    sizes = {"d": row.obs_dim, "m": row.act_dim, "P": envs.sample_tasks(env, 1, 0).shape[1]} if row else {}
    for name in [name for name in REQUIRED | OPTIONAL if name in arrays]:
        given, (axes, dtype) = arrays[name], (REQUIRED | OPTIONAL)[name]
        wrong = given.ndim != len(axes) or given.dtype.kind not in "biuf"
        expected = f"{np.dtype(dtype)} with {len(axes)}"
        refuse((wrong, f"{name} is {given.dtype} with {given.ndim} axes, expected {expected}"))
        shape = tuple(sizes.setdefault(*axis) for axis in zip(axes, given.shape, strict=True))
        with np.errstate(all="ignore"):
            arrays[name] = array = given.astype(dtype, copy=False)
        changed = dtype in (np.int32, np.int64) and (array != given).any()
        refuse(
            (given.shape != shape, f"{name} has shape {given.shape}, expected {shape}"),
            (changed, f"{name} holds other than whole numbers ({np.dtype(dtype)})"),
            (name != "returns" and not np.isfinite(array).all(), f"{name} holds values that are not finite"),
        )
    too_few = 0 in sizes.values() or sizes["N"] < 2
    refuse((too_few, f"found {sizes}, expected at least one of each and two transitions (N)"))
    episodes, t = arrays["episodes"], len(arrays["tasks"])
    train, test = (arrays[name].tolist() for name in ("train_tasks", "test_tasks"))
    largest = np.abs(arrays["actions"]).max()
    refuse(
        (largest > 1, f"actions reach {largest!s}, expected them in [-1, 1]"),
        (not np.isin(arrays["terminals"], (0, 1)).all(), "terminals hold values other than 0 and 1"),
        ((episodes[:, 1:] < episodes[:, :-1]).any(), "episodes are not in order"),
    )
    for name, index in (("train_tasks", train), ("test_tasks", test)):
        good = {*index} <= {*range(t)} and len({*index}) == len(index)
        refuse((not good, f"{name} holds {index!s:.60}, expected different numbers from 0 to {t - 1}"))
    both = sorted({*train} & {*test})
    refuse((both and {*train} != {*test}, f"tasks {both!s:.60} are both training and test tasks"))
    if row:
        known = envs.is_task(env, arrays["tasks"], drawn=True)
        i = known.argmin()
        found = f"task {i} is {str(arrays['tasks'][i].tolist()):.60}"
        refuse((not known.all(), f"{found}; expected tasks of {env}, each {row.means}"))


def prepare(env: str, quality: str, seed: int = 0, data_dir: Path | str = "datasets", **flags: Any) -> Path:
    """The path of the dataset of this quality; builds what is missing, one step after the other, and says so.

    `flags` are `train`, `test`, `device` and `workers` (see `Build`), and changes of `Settings`. DataError for what
    there is not, and where another setting made what is there; FloatingPointError if the agents diverge.
    """
    train, test, workers = (flags.pop(key, None) for key in ("train", "test", "workers"))
    row, device = envs.family(env), choose_device(flags.pop("device", "auto"))
    settings, several = settings_for(env, device, **flags), quality in ("mixed", "relabelled") and not row.script
    goals = not row.xml and row.differs == "reward"  # then a transition's reward can be told from it and a task
    refuse(
        (quality not in QUALITIES, f"unknown quality {quality!r}; expected one of {', '.join(QUALITIES)}"),
        (quality == "relabelled" and not goals, f"{env} cannot be relabelled, only point robots with goals can"),
        (row.script and (quality != "mixed" or {*flags} - {"trajectories"}), f"{env}: mixed data of a script, no SAC"),
        (row.only and (train or test), f"{env}: all its tasks are for training and for testing; their number is fixed"),
        (several and settings.trajectories < 2, f"--trajectories: {quality} data are of several policies, found 1"),
    )
    train, test = train or row.train, test or row.test
    path = Path(data_dir) / env / f"{train}+{test}-seed{seed}" / f"{quality}.npz"
    if not path.exists():
        with locked(path.parent), contextlib.ExitStack() as after:
            after.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)  # what several compute may differ in its last bits, even from one time to the next
            if not path.exists():  # another process may have built it meanwhile
                _build(path, env, train, test, seed, settings, device, workers=workers, flags=flags)
                return path
    if flags:
        flags["core_minutes"] = None  # only said to users
        check_same(path, load(path).meta.get("settings", {}), flags, flag, "use another --data-dir")
    return path


def _build(path, env, train, test, seed, settings, device, **how):
    """Makes the dataset of `path` and saves it, unless something in it is not finite or not in its range."""
    row, quality = envs.family(env), path.stem
    try:
        tasks = envs.sample_tasks(env, len(row.only) or train + test, seed)
    except ValueError as error:
        raise DataError(error) from None
    every = np.arange(len(tasks))
    index = {"train_tasks": every[:train], "test_tasks": every if row.only else every[train:]}
    _announce(path, settings, env, device, how["workers"], len(tasks))
    agents = {} if row.script else build_behaviour(env, tasks, seed, settings, path.parent, device, **how)
    settings = dataclasses.replace(settings, **agents.get("settings", {}) | {"trajectories": settings.trajectories})
    arrays = roll_out(env, tasks, "mixed" if quality == "relabelled" else quality, agents, settings, seed)
    if quality == "relabelled":
        arrays = relabel(env, tasks, index["train_tasks"], arrays, seed)
    elif "first_return" in arrays:
        arrays["returns"] = arrays["first_return"].mean(1)
    arrays |= {"tasks": tasks} | index
    try:
        _check(arrays, env)
    except DataError as error:
        raise DataError(f"{path}: not stored, {error}") from None
    versions = {"torch": torch.__version__, "numpy": np.__version__, "mujoco": envs.mujoco.__version__}
    made = {"behaviour": "scripted" if row.script else "sac", "device": str(device), "versions": versions}
    save(path, arrays, {"env": env, "quality": quality, "seed": seed, "settings": dataclasses.asdict(settings)} | made)
    print(f"{path}: {arrays['rewards'].shape[1]:,} transitions a task")


def _announce(path: Path, settings: Settings, env: str, device: torch.device, workers: int | None, tasks: int) -> None:
    row, begun = envs.family(env), any(path.parent.glob("behaviour-part*.pt"))
    cores = min(workers or envs.cores(), math.ceil(tasks / settings.shard)) if row is envs.BUILT_IN.get(env) else 1
    share = tasks / (len(row.only) or row.train + row.test) * settings.steps / settings_for(env, device).steps
    about = f", about {math.ceil(settings.core_minutes * share / cores)} min on {cores} core{'s' * (cores > 1)}"
    how = f"SAC in every task ({settings.steps:,} steps each), then rollouts{about if device.type == 'cpu' else ''}"
    if row.script:
        how = "the script in every task"
    elif (path.parent / "behaviour.pt").exists():
        how = "rolling out the policies that are there"
    print(f"{'going on with' if begun else 'building'} {path}: {how}", flush=True)


def episode_returns(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Task, place in the data (0 first row, 1 last) and return of every episode that was seen to its end. Returns are
    those that the papers report (sparse ones for sparse-point-robot), over the family's horizon."""
    row = envs.FAMILIES.get(dataset.meta.get("env"))
    reported = dataset.context_rewards if row is not None and row.sparse_reward else dataset.rewards
    arrays = (x.cpu().numpy() for x in (reported, dataset.episodes, dataset.terminals))
    return _episode_returns(*arrays, None if row is None else row.horizon)


def _episode_returns(rewards: np.ndarray, episodes: np.ndarray, terminals: np.ndarray, horizon: int | None):
    t, n = rewards.shape
    first = np.diff(episodes, axis=1, prepend=episodes[:, :1] - 1) != 0
    start, number = np.flatnonzero(first), first.cumsum() - 1  # of all episodes of all tasks, one after the other
    age, length = np.arange(t * n) - start[number], np.bincount(number)
    total = np.bincount(number, rewards.ravel() * (age < (horizon or n)))
    whole = (np.bincount(number, terminals.ravel()) > 0) | (length >= (horizon or 1))
    task, place = np.divmod(start[whole], n)
    return task, place / max(n - 1, 1), total[whole]


# --------------------------------------------------------------------------------------------- runs: the command line
# From here on stands what every script needs and what is no part of any algorithm. A reader of a script may skip it.
@dataclass
class Args:
    """The flags that every script has. A script's own `Args(data.Args)` adds its flags, one line each.

    A field's name and default are the flag's, its annotation gives type and range, `bool` a --flag and a --no-flag, the
    comment behind it is the help. A comment of one word on a line of its own begins a group of the help.
    """

    # run
    env: str = "walker-params"  # task family
    small: bool | None = None  # sizes for a machine without a GPU; unless given: where a run is on the CPU
    letter: bool = False  # the paper's table at its sizes where the script has another (walkers); see beside TABLE
    seed: Whole = 0  # fixes everything the run draws
    device: Literal["auto", "cuda", "cpu"] = "auto"  # where the networks and the data are
    threads: Whole = 0  # PyTorch's threads on the CPU; 0: one for each core
    graph: bool = True  # on CUDA: an update is one graph; --no-graph: every operation by itself
    compile: bool = False  # on CUDA: torch.compile an update before its graph is captured; takes a minute
    eval_every: Count = 10_000  # gradient steps between evaluations
    eval_episodes: Count = 4  # episodes of each task in an evaluation
    run_dir: Path = Path("runs")  # where runs are kept
    resume: bool = False  # go on from the run's checkpoint, if there is one
    overwrite: bool = False  # begin anew where a run stands already
    # data
    data: Path | None = None  # a dataset of your own (.npz, see data.py)
    data_dir: Path = Path("datasets")  # where datasets are kept and built
    data_seed: Whole = 0  # seed of the tasks and of their datasets
    quality: Literal[QUALITIES] = "mixed"  # quality of the training tasks' data
    test_quality: Literal[QUALITIES] | None = None  # of the test tasks' data; unless given: --quality

    # Flags that do not change the result of a run (but for rounding), or are in its path anyway.
    ELSEWHERE = ("env", "small", "seed", "device", "threads", "graph", "compile", "run_dir", "resume", "overwrite")
    ELSEWHERE += ("data_dir",)
    GROWS = ("steps",)  # flags that may be larger than those of the checkpoint that a run goes on from
    ONE_FILE = ("quality", "test_quality", "data_seed")  # flags that choose among data that are built here

    def complete(self, given: dict[str, Any]) -> None:
        """Fills in what depends on other flags; DataError where flags do not go together. `given`: the command line."""
        both = [f"{option(key)} {given[key]}" for key in self.ONE_FILE if self.data and key in given]
        refuse(
            (both, f"{' '.join(both)}: --data has the data of all tasks; expected one or the other"),
            (self.resume and self.overwrite, "--resume goes on, --overwrite begins anew; expected one of them"),
        )
        refuse_idle(given, "compile", not self.graph, "--no-graph")
        self.test_quality = self.test_quality or self.quality


def parse(cls: type[Args], table: dict, small: dict, argv: list[str] | None = None, ours: dict | None = None) -> Args:
    """The arguments: the command line's, over small[env]'s if the sizes are small, else ours[env]'s unless --letter,
    over table[env]'s, over the defaults of `cls`. Also names the variant. DataError for what cannot be."""
    parser, flags = flags_of(cls, list(table), sys.modules[cls.__module__].__doc__)
    given = vars(parser.parse_args(argv))
    env, show_help, sized = given.get("env", cls.env), given.pop("help", False), given.get("small")
    if sized is None:
        sized = given.get("device") == "cpu" or not torch.cuda.is_available()
    refuse(
        (sized and given.get("letter"), "--letter: small sizes are not the papers'; expected --no-small with it"),
        (sized and env not in small, f"--env {env}: the script's SMALL has no such row; expected one, or --no-small"),
    )
    row = {field.name: field.default for field in dataclasses.fields(cls)} | table[env]
    changes = small if sized else {} if given.get("letter") else ours or {}
    row |= changes.get(env, {}) | {"env": env, "small": sized}
    if show_help:
        for key, action in flags.items():
            action.help += f" ({row[key]})" if row[key] is not None else ""
        parser.print_help()
        raise SystemExit(0)
    if given.get("test_quality") == given.get("quality", row["quality"]):
        given.pop("test_quality")  # the same is no variant
    args = cls(**row | given)
    changed = {key: value for key, value in given.items() if value != row[key] or getattr(cls, key) is None}
    args.variant = variant(args, changed)
    args.complete(given)
    return args


def flags_of(
    cls: type, families: list[str], doc: str | None, name_of: Callable[[str], str] = option
) -> tuple[argparse.ArgumentParser, dict[str, argparse.Action]]:
    """A parser with a flag for every field of the dataclass, in groups, and --help; and the flags. Those that are not
    given are not in its result. `doc` begins the help, its example ends it."""
    how = {"usage": "%(prog)s [flags]", "add_help": False, "argument_default": argparse.SUPPRESS}
    lines = (doc or "").splitlines() or [""]
    example = next((line.partition("#")[0].strip() for line in lines if line.startswith("    python ")), None)
    parser = argparse.ArgumentParser(description=lines[0], epilog=example, allow_abbrev=False, **how)
    parser.error = lambda message: refuse((True, message))
    hints, comments = get_type_hints(cls, include_extras=True), _comments(cls)
    groups = {name: parser.add_argument_group(name) for name in ("run", "data", "algorithm", "ablations")}
    groups["run"].add_argument("-h", "--help", action="store_true", help="show these lines and the defaults here")
    flags = {}
    for field in dataclasses.fields(cls):
        kind, (text, group) = hints[field.name], comments[field.name]
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
        how = {"type": partial(parse_value, kind) if hasattr(kind, "__metadata__") else kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif field.name == "env" or get_origin(kind) is Literal:
            known = families if field.name == "env" else get_args(kind)
            how = {"type": type(known[0]), "choices": known}
        add = groups.get(group, groups["algorithm"]).add_argument
        flags[field.name] = add(name_of(field.name), dest=field.name, help=text.replace("%", "%%"), **how)
    return parser, flags


@cache
def _comments(cls: type) -> dict[str, tuple[str, str]]:
    """Of every field: the comment behind it, and the group in which it stands."""
    found: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__[:-1]):
        group, pattern = "algorithm", r"^    (?:# (\w+)|(\w+): .*?(?:  # (.*))?)$"
        for heading, name, text in re.findall(pattern, inspect.getsource(base), re.M):
            group = heading or group
            if name:
                before, place = found.get(name, ("", group))
                found[name] = (text or before, place)
    return found


def parse_value(kind: Any, text: str) -> Any:
    """The value of a flag on the command line; argparse.ArgumentTypeError if it is not of this kind."""
    number, (words, good) = get_args(kind)[0], kind.__metadata__
    with contextlib.suppress(ValueError):
        if text.isascii() and "_" not in text and good(number(text)):
            return number(text)
    raise argparse.ArgumentTypeError(f"expected {words}, found {text!r}")


def variant(args: Args, changed: dict[str, Any]) -> str:
    """The name of the run's folder: the size, and every setting that is not this environment's default, --steps last.
    Safe, and short in bytes, on every file system."""
    parts = ["small" if args.small else "paper"]
    for key in [key for key in vars(args) if key in changed.keys() - {*args.ELSEWHERE, "steps"}]:
        value = changed[key]
        if isinstance(value, Path):  # files of one name in different folders are different data
            value = f"{re.sub('[,=]', '-', value.stem)}-{hashlib.sha256(os.fsencode(value.resolve())).hexdigest()[:6]}"
        parts.append(f"{key.replace('_', '-')}={value}")
    name = ",".join(parts)
    safe = re.sub(r"[^A-Za-z0-9.,=_-]", "-", name)
    if safe != name or len(safe) > 100:
        safe = f"{safe[:90]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"
    return f"{safe},steps={args.steps}" if "steps" in changed else safe


def plain(args: Args) -> dict[str, Any]:
    """The resolved arguments as plain values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def open_datasets(args: Args, device: torch.device, **counts: Any) -> tuple[Dataset, Dataset]:
    """The data of the training and of the test tasks, built on the spot if they are missing; tensors on the device."""

    def opened(quality):
        path = args.data or prepare(args.env, quality, args.data_seed, args.data_dir, device=args.device, **counts)
        return load(path, env=args.env, device=device)

    train = opened(args.quality)
    if args.data:
        first = train.tasks[train.train_tasks[0]].tolist()
        print(f"{args.data}: of {args.env} a task is {envs.family(args.env).means}; the first one {str(first):.60}")
    test = opened(args.test_quality) if args.test_quality != args.quality else train
    return train, args.known(test) if hasattr(args, "known") else test  # see trained.py


def standardisation(observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (d,) of the training tasks' observations (n, N, d)."""
    flat = observations.flatten(0, 1).double()
    return flat.mean(0).float(), flat.std(0).clamp_min(1e-3).float()


class World:
    """What a run has besides its agent. A script's own adds `mean` and `std` (d,) of observations and rows of the data;
    for pictures and loading `env` and `test_rows`."""

    def know(self, train: Dataset, test: Dataset) -> None:
        """What a run reports: the data's checksums and, where known, the mean return of the test tasks' data
        (`behaviour`) and the best that is possible there (`optimum`)."""
        row, returns, tasks = envs.family(test.meta["env"]), test.returns[test.test_tasks], test.tasks[test.test_tasks]
        self.checksum = [train.meta["checksum"], test.meta["checksum"]]
        self.behaviour = float(returns.mean()) if np.isfinite(returns).all() else None
        self.optimum = float(row.optimum(tasks, row.horizon).mean()) if row.optimum else None

    def scaled(self, obs: Any) -> torch.Tensor:
        """Observations (..., d) in standard deviations from the training tasks' mean."""
        return (torch.as_tensor(obs, dtype=torch.float32).to(self.mean.device) - self.mean) / self.std


# ------------------------------------------------------------------------------------------------- runs: the learner
class Learner(nn.Module):
    """What learns: networks, their `optimisers`, the number of the step, and sums of the METRICS that a step notes."""

    METRICS: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        self.noted: dict[str, torch.Tensor] = {}
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))
        self.register_buffer("metrics", torch.zeros(2, len(self.METRICS)))  # since the last evaluation: sums, counts
        self.register_buffer("bad_step", torch.full((len(self.METRICS),), math.inf, dtype=torch.float64))

    def note(self, **values: torch.Tensor) -> None:
        """Keeps these values of the step for `record`, without a look at them."""
        self.noted |= {name: value.detach() for name, value in values.items()}

    @torch.no_grad()
    def record(self) -> None:
        """Adds what was noted to the sums, and marks the first step at which a value was not finite."""
        zero, one = torch.zeros_like(self.metrics[0, 0]), torch.ones_like(self.metrics[0, 0])
        values = [self.noted.get(name, zero).to(zero.dtype) for name in self.METRICS]
        seen = [one if name in self.noted else zero for name in self.METRICS]
        values = torch.stack(values + seen).view_as(self.metrics)
        self.noted.clear()
        self.metrics += values
        self.bad_step.copy_(torch.where(values[0].isfinite(), self.bad_step, self.bad_step.minimum(self.step)))

    def check(self) -> None:
        """FloatingPointError, which says what, if a metric or a weight is not finite."""
        bad = self.bad_step.tolist()
        if min(bad, default=math.inf) < math.inf:
            raise FloatingPointError(f"{self.METRICS[bad.index(min(bad))]} is not finite since step {int(min(bad))}")
        for name, parameter in self.named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(f"the weights {name} are not finite at step {int(self.step)}")


# ----------------------------------------------------------------------------------------------- runs: their folders
class Run:
    """<run-dir>/<script>/<env>/<variant>/seed<k>/ and what is written there: args.json, source.py, metrics.csv,
    curve.png, checkpoint.pt, final.json; of some embeddings.png, paths.png, and started.py, the file that was
    run where it is not the script. On the CPU a run that is killed and resumed gives what it would have given."""

    def __init__(self, args: Args, script: Path):
        self.args, self.script, self.device = args, script, choose_device(args.device)
        self.folder = args.run_dir / script.stem / args.env / args.variant / f"seed{args.seed}"
        self.step, self.rows, self.marks = 0, [], ()
        self.saved = None  # step of the checkpoint that stands
        self.curve = {"train_": "training tasks", "": "test tasks"}  # prefixes of return_mean, _low, _high in the rows
        self.unit = "gradient steps"  # what a step is
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = "small sizes" if args.small else "the papers' sizes"
        if args.small and not torch.cuda.is_available() and args.device == "auto":
            sizes = "no CUDA device: small sizes; --no-small for the papers'"
        print(f"{script.name} on {args.env}, {self.device} ({sizes}): {self.folder}", flush=True)

    def begin(self, agent: Learner, world: World) -> None:
        """Takes the learner up, and with --resume where its checkpoint left it; ends here if the run is finished."""
        args, self.agent, self.world = self.args, agent, world
        torch.set_num_threads(min(args.threads, 1024) or envs.cores())
        checkpoint, final, self.began = self._checkpoint(), self.folder / "final.json", time.time()
        if args.overwrite:
            for old in [path for path in self.folder.iterdir() if path.is_file() and path.name != ".lock"]:
                old.unlink()
        elif checkpoint.exists() and args.resume:
            grown = self._resume(checkpoint)
            print(f"going on from step {self.step} of {checkpoint}", flush=True)
            if checkpoint.parent != self.folder:  # from now on it is this run's
                write(self.folder / "checkpoint.pt", checkpoint.read_bytes())
        elif final.exists():
            with believing(final, "damaged", "--resume mends it from the checkpoint, --overwrite begins anew"):
                then, otherwise = json.loads(final.read_text()), "expected --overwrite, or another --run-dir"
                check_same(self.folder, then["args"], self._seen(), option, otherwise)
                other = then["dataset_checksums"] != world.checksum
                refuse((other, f"{self.folder}: a run on other data; {otherwise}"))
            print(f"this run is finished: {self.folder} (--overwrite begins anew)")
            raise SystemExit(0)
        elif checkpoint.exists():
            raise DataError(f"{checkpoint}: --resume goes on from there, --overwrite begins anew; expected one of them")
        elif args.resume:
            print("no checkpoint yet: from the start", flush=True)
        if args.resume and final.exists() and not grown:  # nothing is left to train: files tell of the code that did it
            return
        sources = {Path(f).name: hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in (__file__, envs.__file__)}
        write(self.folder / "args.json", json.dumps(plain(args) | {"checksums": sources}, indent=1).encode())
        started = Path(getattr(sys.modules["__main__"], "__file__", None) or self.script)  # it may register a family
        for name, path in ("source.py", self.script), ("started.py", started):
            if path.is_file() and (name == "source.py" or path.resolve() != self.script.resolve()):
                write(self.folder / name, path.read_bytes())

    def _checkpoint(self) -> Path:
        """Of this run or, to --resume one not yet begun, of such a run of other --steps: the longest with no more."""
        own = self.folder / "checkpoint.pt"
        begun = own.exists() or (self.folder / "args.json").exists()
        if begun or not self.args.resume or "steps" not in self.args.GROWS:
            return own
        same = self.args.variant.partition(",steps=")[0]
        runs = self.folder.parent.parent.glob(f"*/{self.folder.name}/checkpoint.pt")
        found = [path for path in runs if path.parts[-3].partition(",steps=")[0] == same]
        with believing(self.folder.parent.parent, "there is a damaged args.json in a run there", "delete that run"):
            steps = {path: json.loads((path.parent / "args.json").read_text())["steps"] for path in found}
        return max(found, key=lambda path: (steps[path] <= self.args.steps, steps[path]), default=own)

    def _seen(self) -> dict[str, Any]:
        """The settings that training sees; checksums tell more of the data than their path."""
        return plain(self.args) | dict.fromkeys((*self.args.ELSEWHERE, "data", "variant"))

    def graph(self, fn: Procedure) -> Procedure:
        """`fn`, without arguments, on CUDA as one graph."""
        return capture(fn, compiled=self.args.compile) if self.device.type == "cuda" and self.args.graph else fn

    def steps(self, total: int, *marks: int) -> Iterator[int]:
        """The steps that are left of 1 to `total`; besides every --eval-every steps an evaluation is due at `marks`."""
        self.total, self.marks = total, {*marks, total}
        self.bar = Progress(self.script.stem, total)
        print(f"{total - self.step:,} {self.unit}, an evaluation every {self.args.eval_every:,}", flush=True)
        for step in range(self.step + 1, total + 1):
            self.step = step
            yield step
            self.bar.show(step)

    def due(self, step: int) -> bool:
        """Whether an evaluation is due. A run that diverged ends here, before anything is saved over what was good."""
        due = step % self.args.eval_every == 0 or step in self.marks
        if due:
            self.agent.check()
        return due

    def log(self, row: dict[str, float], note: str = "") -> None:
        """A row of metrics.csv: the means of the metrics since the last evaluation, then `row`; curve, checkpoint."""
        sums, counts = self.agent.metrics.cpu()
        means = dict(zip(self.agent.METRICS, (sums / counts).tolist(), strict=True))
        seconds = time.time() - self.began
        row = {"step": self.step, "seconds": round(seconds, 1)} | means | row
        self.rows.append({key: value if isinstance(value, int) else float(value) for key, value in row.items()})
        self.agent.metrics.zero_()
        lines = [",".join(self.rows[0])] + [",".join(map(repr, row.values())) for row in self.rows]
        write(self.folder / "metrics.csv", "\n".join([*lines, ""]).encode())
        plot(self, "curve")
        plot(self, "paths")
        self._save(seconds)
        known = {"data": self.world.behaviour, "optimum": self.world.optimum}
        known = ", ".join(f"{name} {value:.2f}" for name, value in known.items() if value is not None)
        rate = self.step / max(seconds, 0.1)
        left = f"{rate:.3g} steps/s  {(self.total - self.step) / rate / 60:.1f} min left"
        shown = f"test return {row['return_mean']:8.2f} ({known})" if math.isfinite(row["return_mean"]) else ""
        self.bar.say(f"step {self.step:>7}/{self.total}  {shown}  {note}  {left}")

    def end(self) -> None:
        """Writes final.json: the last row, settings, versions, seconds and what the data gave."""
        world, seconds = self.world, round(time.time() - self.began, 1)
        final = self.rows[-1] | {
            "args": plain(self.args), "wall_clock_seconds": seconds, "dataset_checksums": world.checksum,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
            "behaviour_return": world.behaviour, "optimal_return": world.optimum,
        }  # fmt: skip
        bad = [key for key, value in final.items() if isinstance(value, float) and not math.isfinite(value)]
        write(self.folder / "final.json", json.dumps(final | dict.fromkeys(bad), indent=1).encode())
        print(f"curve, metrics and checkpoint: {self.folder}")

    def _save(self, seconds: float) -> None:
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        checkpoint = {
            "step": self.step, "seconds": seconds, "rows": self.rows, "args": plain(self.args),
            "dataset": self.world.checksum, "agent": self.agent.state_dict(),
            "optimisers": {key: optimiser.state_dict() for key, optimiser in self.agent.optimisers.items()},
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "standardisation": [self.world.mean, self.world.std],  # of observations: all that networks need besides
        }  # fmt: skip
        write(self.folder / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
        self.saved = self.step

    def _resume(self, path: Path) -> list[str]:
        """Takes up the checkpoint; returns the flags that are larger now."""
        args, agent, now, anew = self.args, self.agent, self._seen(), "--overwrite begins anew"
        with believing(path, "not a checkpoint of this script", anew):
            checkpoint = read(path, self.device)
            grown = [key for key in args.GROWS if checkpoint["args"].get(key, now[key]) < now[key]]
            check_same(path, checkpoint["args"], now | dict.fromkeys(grown), option, anew)
            refuse((checkpoint["dataset"] != self.world.checksum, f"{path}: made with other data; {anew}"))
            agent.load_state_dict(checkpoint["agent"])
            agent.check()
            for key, optimiser in agent.optimisers.items():
                optimiser.load_state_dict(checkpoint["optimisers"][key])
                optimiser.param_groups[0]["capturable"] = self.device.type == "cuda"  # it may come from a CPU
            torch.set_rng_state(checkpoint["random"]["cpu"].cpu())
            if self.device.type == "cuda" and checkpoint["random"]["cuda"] is not None:
                torch.cuda.set_rng_state(checkpoint["random"]["cuda"].cpu())
            self.step = self.saved = checkpoint["step"]
            self.rows, self.began = checkpoint["rows"], time.time() - checkpoint["seconds"]
        return grown

    def where(self) -> str:
        """What an interrupted run has, in words."""
        if not self.saved:
            return f"at step {self.step} there is no checkpoint yet; what is built of the data is kept"
        return f"at step {self.step} the checkpoint of step {self.saved} is kept in {self.folder}; --resume goes on"


@contextlib.contextmanager
def endings(program: str, kept: Callable[[], str]):
    """What a user can mend, a full disk, too little memory, divergence and Ctrl-C end in one line on standard error and
    an exit code; `kept` says what is left."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show is no reason to end
    try:
        yield
        return
    except DataError as error:
        message, code = str(error), 2
    except OSError as error:
        message = f"{error.filename or 'the output'}: {error.strerror}" if error.strerror else str(error)
        code = 2
        if isinstance(error, BrokenPipeError):  # nobody reads: Python shall not try once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        message, code = f"out of memory ({first:.100}); expected smaller sizes", 2
    except FloatingPointError as error:
        message, code = f"diverged: {error}; {kept()}", 3
    except KeyboardInterrupt:
        message, code = f"interrupted; {kept()}", 130
    print(f"{program}:", *message.splitlines(), file=sys.stderr)
    raise SystemExit(code)


def start(train: Callable, parse_args: Callable, argv: list[str] | None = None) -> None:
    """train(args, run) with the arguments of the command line; see `endings`."""
    script, run = Path(inspect.getsourcefile(train) or "script.py"), None
    with endings(script.name, lambda: run.where() if run else "nothing was begun"):
        args = parse_args(argv)
        run = Run(args, script)
        with locked(run.folder, run=True):
            train(args, run)


# ---------------------------------------------------------------------------------------------- runs: their pictures
def describe_returns(returns: np.ndarray, prefix: str = "") -> dict[str, float]:
    """Columns of metrics.csv: mean of returns (n tasks, E); over tasks std, low and high (10th, 90th percentile)."""
    each = returns.mean(1)
    low, high = np.quantile(each, (0.1, 0.9))
    row = {"mean": returns.mean(), "std": each.std(), "low": low, "high": high}
    return {f"{prefix}return_{name}": value for name, value in row.items()}


def plot(run: Run, name: str, *what: Any) -> None:
    """Keeps the function `name` of pictures.py, of `what` or of the run, as a picture, if there is something to see."""
    png = getattr(pictures, name)(*what or [run])
    if png:
        write(run.folder / f"{name}.png", png)


# ------------------------------------------------------------------------------------------------------ command line
@dataclass(frozen=True)
class Build(Settings):
    """The flags of this file's own command line: those of `prepare`, and of SAC, which by default are the family's."""

    # run
    env: str = ""  # task family
    seed: Whole = 0  # of the tasks and of everything drawn
    device: Literal["auto", "cuda", "cpu"] = "auto"  # where SAC learns
    workers: Count | None = None  # processes on a CPU; unless given: one for each core
    # data
    train: Count | None = None  # number of training tasks; unless given: the papers'
    test: Count | None = None  # number of test tasks; unless given: the papers'
    data_dir: Path = Path("datasets")  # where datasets are kept


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, _ = flags_of(Build, list(envs.FAMILIES), "Builds (or finds) offline datasets and describes them.", flag)
    parser.add_argument("--quality", nargs="+", default=["mixed"], choices=QUALITIES, help="which datasets")
    given = parser.parse_args(argv)
    if "help" in given:
        parser.print_help()
        raise SystemExit(0)
    refuse(("env" not in given, f"--env: expected one of {', '.join(envs.FAMILIES)}"))
    return given


def main(argv: list[str] | None = None) -> None:
    with endings("data.py", lambda: "what is built is kept, and the same command goes on from there"):
        args = vars(parse_args(argv))
        for quality in args.pop("quality"):
            path = prepare(quality=quality, **args)
            dataset = load(path, args["env"])
            for name, index in (("training", dataset.train_tasks), ("test", dataset.test_tasks)):
                mean = dataset.returns[index].mean()
                print(f"{path}: {len(index)} {name} tasks, mean return {f'{mean:.2f}' if mean == mean else 'unknown'}")


if __name__ == "__main__":
    main()
