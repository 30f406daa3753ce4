"""Offline datasets for every task of a family: made here, stored, checked, loaded.

Two stages, each cached, resumable and atomic, under `<data-dir>/<env>/<train>+<test>-seed<k>/`:

1. *Behaviour* (`behaviour.pt`): one SAC agent for each task, all trained at once. Every weight carries a leading task
   axis and one batched matrix product serves all tasks, so a gradient step of 100 agents is one step; no information
   passes between tasks. Policies are kept from the untrained one to the last.
2. *Rollouts* (`<quality>.npz`): the kept policies act in their tasks, actions sampled, and their trajectories become
   the dataset. `random` is the untrained policy, `expert` the last, `medium` the one nearest half-way between them in
   return, `mixed` all of them, evenly spread over training; `replay` is what SAC itself collected first; `relabelled`
   (point robots with goals) pools mixed data of all training tasks and gives every task the same transitions, with
   its own rewards.

Families with a script (sawyer) need no SAC: a controller that does not know what is wanted performs what can be done in
the scene, in random order, and its trajectories are the `mixed` data.

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
import difflib
import gc
import glob
import hashlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import envs

try:
    import fcntl
except ImportError:  # not on Windows; then nothing keeps two builders apart
    fcntl = None

Arrays = dict[str, np.ndarray]
Procedure = Callable[[], None]
FORMAT = 1
QUALITIES = ("random", "medium", "expert", "mixed", "replay", "relabelled")
BEHAVIOURS = ("sac", "scripted")
RELABELLED_RADIUS = -0.5  # R of the relabelled data, FOCAL++ Table 5
SAVE_EVERY = 60.0  # seconds between saves of a behaviour in the making
GRAPHS = True  # on CUDA: SAC's update is one graph; --no-graph: not so
STALE = 600.0  # seconds after which a temporary file that does not change was left behind by a killed process
PATIENCE, LINGER = 50, 5  # steps after which a script gives a behaviour up, and that it stays once it is achieved
GAIN, NOISE = 0.85, 0.1  # what a script's actions are multiplied by, and what is added: few reach the rim of [-1, 1],
# where a tanh-Gaussian has no density


class DataError(Exception):
    """A dataset that cannot be used or made; the message is one line for the user."""

    code = 2  # of the program that ends with it


class Diverged(DataError):
    """The behaviour's losses or weights are not finite any more."""

    code = 3


def refuse(*checks: tuple[Any, str]) -> None:
    """DataError with the words beside the first of these that is true."""
    for wrong, words in checks:
        if wrong:
            raise DataError(words)


def refuse_idle(given: dict[str, Any], names: str, idle: bool, why: str) -> None:
    """DataError if one of these flags was given, though it is idle."""
    for key in names.split():
        refused = idle and given.get(key, False) is not False
        refuse((refused, f"{option(key)} {given.get(key)}: has no effect with {why}; expected it without"))


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cuda" or "cpu" stands for; DataError if it is not there. On CUDA float32 matrix products
    are TF32 from then on."""
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
Positive = Annotated[float, "a number above 0", lambda x: 0 < x <= 1e30]
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
    core_minutes: Number = 40.0  # what this costs on one core for the family's usual tasks, to tell the user
    replay: Count = 10_000  # first transitions of each task that become the `replay` dataset


# What differs from the class's defaults, for each family: `small` is for a machine without a GPU.
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
    "cheetah-vel": CHEETAH | {"steps": 80_000, "core_minutes": 80.0},
    "cheetah-fwd-back": CHEETAH | ONE,
    "ant-fwd-back": WARM | ONE | {"steps": 400_000},
    "ant-dir": WARM | {"steps": 300_000, "core_minutes": 480.0},
    "walker-params": {"steps": 170_000, "hidden": 128, "alpha": 0.2},
    "hopper-params": HOPPER | {"steps": 100_000, "core_minutes": 120.0},
    "humanoid-dir": {"steps": 30_000, "core_minutes": 40.0, "replay": 2_000},  # rows of 772 numbers: 3 kB each
    "sawyer": {"episode": 50},  # for SAC; its script has no use for it
    "halfcheetah": CHEETAH | ONE | {"episode": 1000},
    "hopper": ONE | {"episode": 1000},
    "walker2d": ONE | {"episode": 1000},
}
FULL = {"hidden": 256, "batch": 256, "steps": 400_000, "tau": 0.01, "lr": 3e-4}  # on CUDA, but for a family's own tau
WIDER = 4  # on CUDA, times the sub-environments and gradient steps of an iteration: most of its cost is fixed


def flag(name: str) -> str:
    """Of a number on the command line."""
    return f"--{'sac-' if name in ('lr', 'batch', 'steps', 'hidden', 'envs') else ''}{name}".replace("_", "-")


def check_numbers(numbers: dict[str, Any]) -> None:
    """DataError, which names the flag, if one of these (None: not given) is out of its range."""
    kinds = dict.fromkeys(("train", "test", "workers"), Count) | get_type_hints(Settings, include_extras=True)
    for name, value in numbers.items():
        words, good = kinds.get(name, Whole).__metadata__
        refuse((value is not None and not good(value), f"{flag(name)}: expected {words}, found {value}"))


def settings_for(env: str, device: torch.device, **changes: Any) -> Settings:
    """The family's settings for this device, with `changes` (those that are not None) on top; DataError, which names
    the flag, where they are out of range or nothing would be learned."""
    check_numbers(changes)
    row = SMALL.get(env, {})
    if device.type == "cuda" and not envs.family(env).xml:
        row = row | {"hidden": 256, "batch": 256}
    elif device.type == "cuda":
        own = {"tau": row["tau"]} if "tau" in row else {}
        row = row | FULL | own | ({"steps": 100_000} if env == "humanoid-dir" else {})  # its replay: 17 GB
        row |= {key: WIDER * row.get(key, getattr(Settings, key)) for key in ("envs", "updates")}
    s = Settings(**(row | {key: value for key, value in changes.items() if value is not None}))
    each = s.steps // s.envs  # steps of each sub-environment
    most = min(s.steps, each * s.envs + 1)  # all of them step at once
    refuse(
        (s.envs > s.steps, f"--sac-envs: expected at most the {s.steps} of --sac-steps, found {s.envs}"),
        (s.checkpoints < 2, "--checkpoints: expected at least 2, the untrained policy and the last one, found 1"),
        (s.start >= most, f"--start: expected less than {most} with these --sac-steps, found {s.start}"),
        (s.nstep > each, f"--nstep: expected at most the {each} steps of each environment, found {s.nstep}"),
    )
    return s


# --------------------------------------------------------------------------------------- SAC for all tasks at once
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


def twins(critic: BatchedMLP, obs: torch.Tensor, action: torch.Tensor, frozen: bool = False) -> torch.Tensor:
    """(2, T, B) values of twin critics, stacked as 2T networks; obs (T, B, d), action (T, B, m)."""
    x = torch.cat([obs, action], dim=-1)
    return critic(torch.cat([x, x]), frozen).view(2, *x.shape[:2])


def gaussian(actor_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log standard deviation, kept in [-5, 2], of the Gaussian before tanh."""
    mean, log_std = actor_out.chunk(2, dim=-1)
    return mean, log_std.clamp(-5, 2)


def sample_action(actor_out: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tanh-Gaussian action (..., m) and its log density (...)."""
    mean, log_std = gaussian(actor_out)
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
        hidden = settings.hidden
        self.actor = BatchedMLP(tasks, obs_dim, hidden, 2 * act_dim, generator)
        self.critic = BatchedMLP(2 * tasks, obs_dim + act_dim, hidden, 1, generator)  # twins: two blocks of T
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.full((tasks,), math.log(settings.alpha)))

    def optimiser(self) -> torch.optim.Optimizer:
        """One fused Adam for everything; learning rates are tensors, so that a captured graph can change them."""
        s, device = self.settings, self.log_alpha.device
        networks = [*self.actor.parameters(), *self.critic.parameters()]
        groups = [
            {"params": networks, "lr": torch.tensor(s.lr, device=device)},
            {"params": [self.log_alpha], "lr": torch.tensor(s.alpha_lr, device=device)},
        ]
        return torch.optim.Adam(groups, fused=True, capturable=device.type == "cuda")

    def loss(self, rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Losses of critics, actor and temperature: means over the minibatch, sums over tasks.

        rows (T, B, D), noise (2, T, B, m). Each network gets the gradient of its own loss only.
        """
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
        optimiser.zero_grad()
        self.loss(rows, noise).backward()
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), self.settings.tau)


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
        self.filled = torch.zeros((), device=device)  # how many rows; on the device, where a graph can read it
        self.host_obs, self.host_rows = (torch.zeros(self.n, e, k, pin_memory=cuda) for k in (row.obs_dim, width))
        self.seen, self.action = self.host_obs.to(device), torch.zeros(self.n, e, row.act_dim, device=device)
        self.marks = np.linspace(0, self.iterations, settings.checkpoints).round().astype(int)
        self.policies: list[torch.Tensor] = []
        self.iteration = 0
        self.obs = self.vector.reset()[0]
        self.score = np.zeros(len(self.obs))  # running return of each sub-environment
        self.last_score = np.full(len(self.obs), np.nan)  # of the last episode that ended
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
        action = self.action.flatten(0, 1).cpu().numpy().copy()  # waits for the device
        self.check(np.isfinite(action).reshape(self.n, -1).all(1))
        return action

    @torch.no_grad()
    def choose_eagerly(self) -> None:
        """From the observations in `seen` to actions in `action`."""
        noise = torch.randn(self.action.shape, generator=self.generator, device=self.device)
        self.action.copy_(sample_action(self.agent.actor(self.seen), noise)[0])

    def check(self, finite: np.ndarray) -> None:
        """Diverged if one of the tasks (T,) is not finite."""
        if not finite.all():
            where = f"{self.vector.name}, {(~finite).sum()} of these {self.n} tasks, step {self.iteration:,}"
            raise Diverged(f"SAC diverged: its policy is not finite ({where}); expected other settings, as --sac-lr")

    def check_weights(self) -> None:
        """Diverged if any weight is not finite: a NaN anywhere is in the policies two gradient steps later."""
        finite = [p.isfinite().view(-1, self.n, p[0].numel()).all(2).all(0) for p in self.agent.parameters()]
        self.check(torch.stack(finite).all(0).cpu().numpy())

    def collect(self, action: np.ndarray) -> None:
        """One step of every sub-environment into the replay."""
        obs = self.obs
        self.obs, reward, terminated, truncated, info = self.vector.step(action)
        ended = terminated | truncated
        after = np.where(ended[:, None], info.get("final_obs", self.obs), self.obs)
        parts = obs, action, reward[:, None], after, terminated[:, None], ended[:, None]
        self.host_rows.copy_(torch.from_numpy(np.concatenate(parts, axis=1)).view_as(self.host_rows))
        rows = self.host_rows.to(self.device, non_blocking=True)
        if info["blew_up"].any():  # no step was taken: the one before stands in its place too, and ends its episode
            refuse((not self.iteration, f"{self.vector.name}: the physics blew up in the first step of an episode"))
            blown = torch.from_numpy(info["blew_up"]).view(self.n, -1, 1).to(self.device)
            before = self.replay[:, self.iteration - 1]
            before[..., -1:] = torch.where(blown, 1.0, before[..., -1:])
            rows = torch.where(blown, before, rows)
        self.replay[:, self.iteration] = rows
        self.score += reward
        self.last_score[ended] = self.score[ended]
        self.score[ended] = 0

    def anneal(self) -> None:
        """The networks' learning rate falls linearly to a tenth, so that the last policies are steady."""
        self.optimiser.param_groups[0]["lr"].fill_(self.settings.lr * (1 - 0.9 * self.iteration / self.iterations))

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
        """Keeps the policy if one is due; then one step of every sub-environment and its gradient steps.

        On CUDA the gradient steps come first, from the replay as it is: the device is busy with them while the
        environments step.
        """
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
        if self.iteration * self.settings.envs >= self.settings.start and self.iteration >= self.settings.nstep:
            self.anneal()
            self.learn()

    def mean_return(self) -> float:
        """Of the last episode of each sub-environment; not a number before the first has ended."""
        ended = self.last_score[np.isfinite(self.last_score)]
        return float(ended.mean()) if len(ended) else math.nan

    def keep(self) -> None:
        """Notes the policies of now, a row (T, parameters), where a checkpoint is due."""
        while len(self.policies) < len(self.marks) and self.marks[len(self.policies)] <= self.iteration:
            flat = [p.detach().reshape(self.n, -1) for p in self.agent.actor.parameters()]
            self.policies.append(torch.cat(flat, dim=1).cpu())  # (tasks, parameters)

    @property
    def finished(self) -> bool:
        return self.iteration >= self.iterations

    def result(self) -> dict[str, torch.Tensor]:
        """Every kept policy (checkpoints, T, parameters), and the first transitions of each task. Diverged."""
        self.check_weights()
        self.keep()
        early = self.replay[:, : self.settings.replay // self.settings.envs].cpu().clone()
        return {"policies": torch.stack(self.policies), "early": early}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here exactly. Diverged."""
        self.check_weights()
        return {
            "iteration": self.iteration,
            "agent": self.agent.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "replay": self.replay[:, : self.iteration].contiguous().cpu(),  # a view would be saved with all its storage
            "policies": torch.stack(self.policies),
            "generator": self.generator.get_state(),
            "vector": {key: torch.from_numpy(value) for key, value in self.vector.state_dict().items()},
            "score": torch.from_numpy(np.stack([self.score, self.last_score])),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.agent.load_state_dict(state["agent"])
        self.optimiser.load_state_dict(state["optimiser"])
        for group in self.optimiser.param_groups:  # load_state_dict moves all but these
            group["lr"] = group["lr"].to(self.device)
        self.replay[:, : self.iteration].copy_(state["replay"].view_as(self.replay[:, : self.iteration]))
        self.filled.fill_(self.iteration * self.settings.envs)
        self.policies = list(state["policies"])
        self.generator.set_state(state["generator"])
        self.vector.load_state_dict({key: value.numpy() for key, value in state["vector"].items()})
        self.obs = self.vector.observe()
        self.score, self.last_score = (row.copy() for row in state["score"].numpy())


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
    """`fn` compiled by TorchInductor, which makes one kernel of many small operations; random draws stay PyTorch's own.
    Where that fails one line says so, and `fn` goes on as it is."""
    torch._inductor.config.fallback_random = True
    compiled = torch.compile(fn, dynamic=False)

    def call():
        nonlocal compiled
        try:
            compiled()
        except Exception as error:  # each layer of the compiler has its own; later calls compile nothing
            print(f"torch.compile failed ({type(error).__name__}); going on without", flush=True)
            compiled = fn
            fn()

    return call


# ------------------------------------------------------------------------------------------------- files and locks
def write(path: Path, save) -> None:
    """Calls save(file) on a temporary name, then renames: no half-written file ever stands under the final one.

    OSError, which names the file, if that fails; what stood there before still does. Temporary files that a killed
    process left behind are removed when the same file is next written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - old.stat().st_mtime > STALE:
                    old.unlink()
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # on a full disk torch.save raises the latter on top of the former
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def kind(value: Any) -> Any:
    """Shapes and types of nested values, as they are compared before a checkpoint is believed."""
    if isinstance(value, dict):
        return {key: kind(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [kind(x) for x in value]
    return (value.shape, value.dtype) if torch.is_tensor(value) else type(value)


def read(path: Path, device: torch.device | str = "cpu") -> Any:
    """What `torch.save` wrote. Nothing in the file is run, and it is refused if any byte of a record has changed
    (torch.load does not look at the records' checksums); raises whatever the reader does."""
    with zipfile.ZipFile(path) as file:
        if any(info.compress_type != zipfile.ZIP_STORED for info in file.infolist()):
            raise zipfile.BadZipFile("torch.save compresses nothing")
        if file.testzip() is not None:
            raise zipfile.BadZipFile("a record does not match its checksum")
    return torch.load(path, map_location=device, weights_only=True)


@contextlib.contextmanager
def believing(path: Path, wrong: str, remedy: str):
    """DataError in the place of any error that comes of what a file holds."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{path}: {wrong} ({type(error).__name__}); {remedy}") from None


def check_checkpoint(checkpoint: dict, agent: nn.Module, optimisers: dict) -> None:
    """ValueError unless everything in a run's checkpoint has the shapes and types of this run, and is finite."""
    step, rows, stored = checkpoint["step"], checkpoint["rows"], checkpoint["agent"]
    parts = stored, checkpoint["random"], checkpoint["optimisers"], *checkpoint["optimisers"].values(), *rows
    if not all(isinstance(part, dict) for part in parts):  # a tensor with a name for an index warns before it fails
        raise ValueError
    good = kind([step, checkpoint["seconds"]]) == [int, float] and step > 0
    good &= bool(rows) and rows[-1]["step"] == step and all(list(row) == list(rows[0]) for row in rows)
    good &= all(isinstance(value, int | float) for row in rows for value in row.values())
    good &= kind(dict(stored)) == kind(dict(agent.state_dict())) and bool(stored["step"] == step)
    good = good and all(value.isfinite().all() for key, value in stored.items() if key != "bad_step")
    for key, optimiser in optimisers.items():
        then, now = checkpoint["optimisers"][key], optimiser.state_dict()
        for group, own in zip(then["param_groups"], now["param_groups"], strict=True):
            good = good and all(kind(group[name]) == kind(own[name]) for name in own if name in group)
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        for i, state in then["state"].items():
            like = {"step": torch.zeros(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
            good = good and kind(state) == kind(like)
            good = good and all(value.isfinite().all() for value in state.values())
    if not good:
        raise ValueError


@contextlib.contextmanager
def locked(folder: Path):
    """Only one process at a time builds in a folder; another one says so and waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that builds in {folder}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                print(f"{folder}: no locks there ({error.strerror}); let only one process build", flush=True)
        yield


class Progress:
    """A line on long work, none on short: share done, rate, time left; rewritten on a terminal, seldom in a log."""

    def __init__(self, title: str, total: int, unit: str = "steps", shorter: str = ""):
        self.title, self.total, self.unit = title, total, unit
        self.tty = sys.stdout is not None and sys.stdout.isatty()  # none where it is closed
        self.shorter = shorter  # said while more than an hour is left
        self.shown, self.open = time.time(), False  # since when no line was due; whether one stands to be rewritten
        self.samples = []  # of (time, done), for the rate over the last minute

    def show(self, done: int, restored: int = 0, note: str = "") -> None:
        """So much is done; what an earlier process did of it, `restored`, says nothing about the rate."""
        now = time.time()
        if done < self.total and self.samples and now - self.samples[-1][0] < 0.2:
            return
        self.samples = [sample for sample in self.samples if now - sample[0] < 60] + [(now, done - restored)]
        if now - self.shown < (1.0 if self.tty else 20.0) and not (self.open and done >= self.total):
            return
        then, before = self.samples[0]
        rate = (done - restored - before) / max(now - then, 1e-9)
        left = (self.total - done) / rate / 60 if rate > 0 else 0.0
        known = f", {rate:,.{0 if rate >= 10 else 2}f} {self.unit}/s, {left:,.1f} min left" if rate > 0 else ""
        note += self.shorter if left > 60 else ""
        self.say(f"{self.title}: {done / self.total:4.0%}{known}{note}", self.tty and done < self.total)

    def say(self, line: str, rewritten: bool = False) -> None:
        """Shows a line, over one that stands there to be rewritten; the next one is due a while later."""
        print(f"\r{line:<110}" if self.tty else line, end="" if rewritten else "\n", flush=True)
        self.shown, self.open = time.time(), rewritten


# ------------------------------------------------------------------------------------------------ stage 1: behaviour
BUILT_IN = dict(envs.FAMILIES)  # the families that a worker, which never runs the user's script, knows too
WORKER = (
    "import sys; sys.path[0] = sys.argv[1]; import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    "import data; data.work()"
)  # Ctrl-C is for the parent to answer


def _train_shard(path: Path, env: str, tasks: np.ndarray, seed: int, settings: dict, device: str, threads: int):
    """Trains one shard's agents, from its last save if there is one, and leaves its result in `path`.

    Yields twice a second how many iterations are done, how many of them by an earlier process, and the mean return.
    """
    settings = Settings(**settings)
    label, iterations = _label(env, settings, tasks), settings.steps // settings.envs
    saved = _load_checkpoint(path, label) if path.exists() else {}
    if "policies" in saved:
        yield iterations, iterations, math.nan
        return
    trainer = Trainer(env, tasks, seed, settings, torch.device(device), threads)
    if saved:
        with believing(path, "damaged", "delete it to build it anew"):
            trainer.load_state_dict(saved["trainer"])
    restored, saved_at, told_at, pause = trainer.iteration, time.time(), time.time(), SAVE_EVERY
    while not trainer.finished:
        trainer.step()
        if time.time() - told_at > 0.5:
            told_at = time.time()
            yield trainer.iteration, restored, trainer.mean_return()
        if time.time() - saved_at > pause and not trainer.finished:
            began = time.time()
            write(path, lambda file: torch.save(label | {"trainer": trainer.state_dict()}, file))
            saved_at = time.time()
            pause = SAVE_EVERY * max(1, (saved_at - began) / 6)  # gigabytes on CUDA: at most a tenth of the time
    write(path, lambda file: torch.save(label | trainer.result(), file))
    yield iterations, restored, trainer.mean_return()
    trainer.choose = trainer.learn = None  # they refer to the trainer: without the cycle its memory is free at once


def work() -> None:
    """All that a worker does: trains the shards that standard input holds, and reports how far each is, a line of JSON
    in one piece on standard output. Once nobody reads that, the parent was stopped or killed, and the worker ends."""

    def report(*parts: Any) -> None:
        os.write(1, f"{json.dumps(parts)}\n".encode())

    torch.set_num_threads(1)
    try:
        for i, job in pickle.load(sys.stdin.buffer):
            for progress in _train_shard(**job):
                report(i, *progress)
    except BrokenPipeError:
        return
    except (DataError, OSError, MemoryError, RuntimeError) as error:
        known = _cannot_build(error, job["path"]) if isinstance(error, OSError) else error
        with contextlib.suppress(BrokenPipeError):
            report(type(known).__name__, str(known))


def _run_in_workers(jobs: list[dict[str, Any]], workers: int, show: Callable) -> None:
    """Shares the shards out among processes of one thread each, which all report through one pipe; raises what one of
    them does, DataError if one is killed."""
    reader, writer = os.pipe()
    command = [sys.executable, "-c", WORKER, str(Path(envs.__file__).resolve().parent)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    running: list[subprocess.Popen] = []
    try:
        with open(reader) as reports:  # once it is closed, each worker's next report fails and ends it
            with open(writer, "wb") as pipe:
                for k in range(workers):
                    running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=pipe, env=one_thread))
                    with contextlib.suppress(BrokenPipeError), running[-1].stdin as file:
                        pickle.dump([*enumerate(jobs)][k::workers], file)
            for line in reports:
                i, *report = json.loads(line)
                if isinstance(i, str):
                    known = {"DataError": DataError, "Diverged": Diverged, "MemoryError": MemoryError}
                    raise known.get(i, RuntimeError)(*report)
                show(i, *report)
                if any(worker.poll() for worker in running):
                    break
    finally:
        codes = [worker.wait() for worker in running]
    if any(codes):
        where = jobs[0]["path"].parent
        raise DataError(f"{where}: a process was killed (no memory?) or failed; the same command goes on from its save")


def _label(env: str, settings: Settings, tasks: np.ndarray) -> dict[str, Any]:
    """What a behaviour file says it was made for."""
    return {"env": env, "settings": dataclasses.asdict(settings), "tasks": torch.from_numpy(tasks)}


def _load_checkpoint(path: Path, label: dict) -> dict:
    """A behaviour file, whole or in the making; DataError if it is damaged or made with other settings than `label`."""
    with believing(path, "damaged", "delete it to build it anew"):
        saved = read(path)
        then, same_tasks = dict(saved["settings"]), torch.equal(saved["tasks"], label["tasks"])
        same_tasks &= bool(saved["env"] == label["env"])
    then |= {key: label["settings"][key] for key in ("core_minutes", "trajectories")}  # no agent in training sees them
    for key in sorted(then.keys() | label["settings"].keys(), key=str):
        old, new = then.get(key), label["settings"].get(key)
        if not isinstance(old, int | float | None) or old != new:
            raise DataError(f"{path}: made with {key} = {old!r}, asked for {new}; delete it or use another --data-dir")
    refuse((not same_tasks, f"{path}: made for other tasks; delete it or use another --data-dir"))
    with believing(path, "damaged", "delete it to build it anew"):
        if "policies" in saved:
            check_behaviour(saved)
        elif not isinstance(saved["trainer"], dict):
            raise TypeError
    return saved


def _cannot_build(error: OSError, place: Path) -> DataError:
    return DataError(f"{error.filename or place}: cannot build there ({error.strerror or error})")


def check_behaviour(saved: dict) -> None:
    """ValueError unless policies and early transitions have the shapes that settings and tasks give, all finite."""
    row, settings, count = envs.family(saved["env"]), Settings(**saved["settings"]), len(saved["tasks"])
    actor = BatchedMLP(1, row.obs_dim, settings.hidden, 2 * row.act_dim)
    iterations = min(settings.replay, settings.steps) // settings.envs
    shapes = {
        "policies": (settings.checkpoints, count, sum(p.numel() for p in actor.parameters())),
        "early": (count, iterations, settings.envs, 2 * row.obs_dim + row.act_dim + 3),
    }
    for key, shape in shapes.items():
        if saved[key].shape != shape or saved[key].dtype != torch.float32 or not saved[key].isfinite().all():
            raise ValueError(key)


def build_behaviour(
    env: str, tasks: np.ndarray, seed: int, settings: Settings, folder: Path, device: torch.device, workers: int | None
) -> dict:
    """Trains one SAC agent for each task, or goes on where an earlier call stopped; returns `behaviour.pt`.

    On a CPU shards of tasks are spread over processes of one thread each, the fastest way found to use the cores; on
    CUDA all tasks are one batch. "policies" is (checkpoints, T, parameters), "early" SAC's first transitions.
    """
    path, label = folder / "behaviour.pt", _label(env, settings, tasks)
    if path.exists():
        whole = _load_checkpoint(path, label)
        for part in folder.glob("behaviour-part*.pt"):  # killed before it could remove them
            part.unlink(missing_ok=True)
        return whole
    on_cpu = device.type == "cpu"
    shards = np.array_split(np.arange(len(tasks)), math.ceil(len(tasks) / settings.shard) if on_cpu else 1)
    job = {"env": env, "settings": label["settings"], "device": str(device), "threads": 1 if on_cpu else envs.cores()}
    jobs = [
        job | {"path": folder / f"behaviour-part{i}.pt", "tasks": tasks[shard], "seed": 1_000_003 * seed + i}
        for i, shard in enumerate(shards)
    ]
    _run_jobs(jobs, min(workers or envs.cores(), len(jobs)))
    parts = [_load_checkpoint(job["path"], _label(env, settings, job["tasks"])) for job in jobs]
    whole = label | {
        "policies": torch.cat([part["policies"] for part in parts], dim=1),
        "early": torch.cat([part["early"] for part in parts]),
    }
    write(path, lambda file: torch.save(whole, file))
    for job in jobs:
        job["path"].unlink(missing_ok=True)
    return whole


def _run_jobs(jobs: list[dict[str, Any]], workers: int) -> None:
    """Trains all shards, see `_train_shard`, and shows how far they are."""
    env, settings, tasks = jobs[0]["env"], jobs[0]["settings"], np.array([len(job["tasks"]) for job in jobs])
    state = np.array([[0, 0, math.nan]] * len(jobs))
    per_iteration = tasks * settings["envs"]
    total = settings["steps"] // settings["envs"] * per_iteration.sum()
    bar = Progress(f"SAC on {env}, {tasks.sum()} tasks", int(total))

    def show(i: int, *report: float) -> None:
        state[i] = report
        done, restored, score = state.T
        known = np.isfinite(score)
        note = f", return {np.average(score[known], weights=tasks[known]):.1f}" if known.any() else ""
        bar.show(int(done @ per_iteration), int(restored @ per_iteration), note)

    if workers > 1 and envs.family(env) is BUILT_IN.get(env):
        return _run_in_workers(jobs, workers, show)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i, job in enumerate(jobs):
            for report in _train_shard(**job):
                show(i, *report)
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- stage 2: rollouts
def collect(env: str, tasks: np.ndarray, policies: torch.Tensor, settings: Settings, seed: int) -> Arrays:
    """Rolls out policies (T, k, parameters), `settings.trajectories` / k trajectories each, with sampled actions; what
    `record` returns. Diverged if an action is not finite."""
    row, (count, k), s = envs.family(env), policies.shape[:2], settings.trajectories
    actor = load_policies(policies.flatten(0, 1), row, settings.hidden)
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        x = torch.as_tensor(obs, dtype=torch.float32).view(count * k, s // k, row.obs_dim)
        noise = torch.randn(count * k, s // k, row.act_dim, generator=generator)
        action = sample_action(actor(x), noise)[0].view(-1, row.act_dim).numpy()
        if not np.isfinite(action).all():
            raise Diverged(f"{env}: actions of SAC's policies are not finite; expected other settings, as --sac-lr")
        return action

    return record(env, tasks, act, s, seed)


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
        action = GAIN * self.script.act(self.doing, obs)
        return np.clip(action + NOISE * self.rng.standard_normal(action.shape), -1, 1)


def perform(env: str, tasks: np.ndarray, trajectories: int, seed: int) -> Arrays:
    """So many trajectories of the script in each task, see `record`."""
    stream = 1_000_003 * seed + 1_000 + QUALITIES.index("mixed")
    performer = Performer(envs.family(env), tasks.repeat(trajectories, axis=0), stream)
    return record(env, tasks, performer.act, trajectories, stream)


def record(env: str, tasks: np.ndarray, act: Any, trajectories: int, seed: int) -> Arrays:
    """So many trajectories of each task under act: (n, d) observations -> (n, m) actions.

    Every trajectory is `data_horizon` steps long; where an episode ends early the next one begins, and the last may be
    cut short. Returns the arrays of a dataset, and "first_return" (T, trajectories): the return of each trajectory's
    first episode over the family's horizon.
    """
    row = envs.family(env)
    steps, n = row.data_horizon, len(tasks) * trajectories
    vector = envs.make(env, tasks.repeat(trajectories, axis=0), seed=seed, horizon=steps)
    d, m = row.obs_dim, row.act_dim
    out = np.zeros((n, steps, 2 * d + m + 4), np.float32)  # s, a, r, s', terminal, sparse r, episode of the trajectory
    filled, episode, slots = np.zeros(n, int), np.zeros(n), np.arange(n)
    obs = vector.reset()[0]
    bar = Progress(f"rolling out {env}, {len(tasks)} tasks", n * steps)
    for _ in range(2 * steps):
        action = act(obs)
        following, reward, terminated, truncated, info = vector.step(action)
        ended = terminated | truncated
        after = np.where(ended[:, None], info.get("final_obs", following), following)
        reported = info.get("sparse_reward", reward)
        good = ~info["blew_up"] & (filled < steps)
        columns = obs, action, reward[:, None], after, terminated[:, None], reported[:, None], episode[:, None]
        out[slots[good], filled[good]] = np.concatenate(columns, axis=1)[good]
        filled += good
        episode += ended
        obs = following
        if filled.min() == steps:
            break
        bar.show(int(filled.sum()))
    else:
        raise DataError(f"{env}: the physics blew up in more than half of the steps of a trajectory")
    vector.close()
    return _arrays(out.reshape(len(tasks), trajectories, steps, -1), row)


def load_policies(flat: torch.Tensor, row: envs.Family, hidden: int) -> BatchedMLP:
    """The actors (n, parameters) as one module."""
    actor = BatchedMLP(len(flat), row.obs_dim, hidden, 2 * row.act_dim).requires_grad_(False)
    parts = flat.split([p[0].numel() for p in actor.parameters()], dim=1)
    for parameter, value in zip(actor.parameters(), parts, strict=True):
        parameter.copy_(value.view_as(parameter))
    return actor


def _columns(rows: np.ndarray, row: envs.Family) -> Arrays:
    """Dataset arrays from rows (T, N, D) of s, a, r, s', terminal, ..."""
    d, m = row.obs_dim, row.act_dim
    s, a, r, s2, terminal, _ = np.split(rows, np.cumsum([d, m, 1, d, 1]), axis=-1)
    rest = {"rewards": r[..., 0], "next_observations": s2, "terminals": terminal[..., 0]}
    return {"observations": s, "actions": a} | rest


def _arrays(out: np.ndarray, row: envs.Family) -> Arrays:
    """Dataset arrays from rows (T, trajectories, steps, D) of s, a, r, s', terminal, sparse r, episode."""
    t, s, steps = out.shape[:3]
    episode = out[..., -1].astype(int)
    first = np.ones((t, s, steps), bool)
    first[..., 1:] = episode[..., 1:] != episode[..., :-1]
    counted = (episode == episode[..., :1]) & (np.arange(steps) < row.horizon)
    flat = out.reshape(t, s * steps, -1)
    return {
        **_columns(flat, row),
        **({"sparse_rewards": flat[..., -2]} if row.sparse_reward else {}),
        "episodes": first.reshape(t, -1).cumsum(1) - 1,
        "first_return": (out[..., -2] * counted).sum(2, dtype=np.float64),
    }


def roll_out(env: str, tasks: np.ndarray, quality: str, behaviour: dict, settings: Settings, seed: int) -> dict:
    """The arrays of the dataset of this quality, see the top of this file."""
    policies = behaviour["policies"].transpose(0, 1)  # (T, checkpoints, parameters)
    stream = 1_000_003 * seed + 1_000 + QUALITIES.index(quality)
    if quality == "replay":
        return _replay(env, tasks, behaviour["early"])
    count = max(settings.trajectories, Settings.trajectories if quality == "medium" else 0)
    spread = np.linspace(0, policies.shape[1] - 1, count).round().astype(int)  # of `mixed`
    if quality == "mixed":
        return collect(env, tasks, policies[:, spread], settings, stream)
    chosen = torch.zeros(len(tasks), dtype=torch.long) if quality == "random" else torch.full((len(tasks),), -1)
    if quality == "medium":  # chosen among 50 policies or more, even where fewer trajectories of it are wanted
        probe = dataclasses.replace(settings, trajectories=count)
        returns = roll_out(env, tasks, "mixed", behaviour, probe, seed)["first_return"]
        smooth = np.apply_along_axis(lambda r: np.convolve(np.pad(r, 1, "edge"), np.ones(3) / 3, "valid"), 1, returns)
        half = (smooth[:, :1] + smooth[:, -1:]) / 2
        chosen = torch.from_numpy(spread[np.abs(smooth - half).argmin(1)])
    return collect(env, tasks, policies[torch.arange(len(tasks)), chosen][:, None], settings, stream)


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
    s, a, s2 = (arrays[key][task, i] for key in ("observations", "actions", "next_observations"))
    rewards = np.stack([row.reward(np.repeat(task[None], n, axis=0), s, a, s2, 1.0) for task in tasks])
    return {
        **{key: np.repeat(value[None], t, axis=0) for key, value in
           (("observations", s), ("actions", a), ("next_observations", s2))},
        "rewards": rewards, "sparse_rewards": sparse(rewards, RELABELLED_RADIUS),
        "terminals": np.zeros((t, n)), "episodes": np.repeat(np.arange(n)[None], t, axis=0),
    }  # fmt: skip


def _replay(env: str, tasks: np.ndarray, early: torch.Tensor) -> Arrays:
    """SAC's first transitions (T, iterations, envs, [s, a, r, s', terminal, ended]), episode by episode, in the order
    in which they began."""
    row, (t, steps, e, width) = envs.family(env), early.shape
    rows, n = early.transpose(1, 2).numpy(), e * steps
    first = np.concatenate([np.ones((t, e, 1), bool), rows[:, :, :-1, -1] > 0], axis=2)
    began = np.maximum.accumulate(np.where(first, np.arange(steps), 0), axis=2)  # the iteration of its first step
    order = (began * e + np.arange(e)[:, None]).reshape(t, n).argsort(axis=1, kind="stable")
    arrays = _columns(np.take_along_axis(rows.reshape(t, n, width), order[..., None], axis=1), row)
    arrays["episodes"] = np.take_along_axis(first.reshape(t, n), order, axis=1).cumsum(1) - 1
    if row.sparse_reward:
        each = (arrays[key].reshape(t * n, -1) for key in ("observations", "actions", "next_observations"))
        reported = row.sparse_reward(tasks.repeat(n, axis=0), *each, 1.0)
        arrays["sparse_rewards"] = reported.reshape(t, n).astype(np.float32)
    rewards = arrays.get("sparse_rewards", arrays["rewards"])
    task, _, total = _episode_returns(rewards, arrays["episodes"], arrays["terminals"], row.horizon)
    whole = np.bincount(task, minlength=t)
    mean = np.bincount(task, total, t) / np.maximum(whole, 1)
    return arrays | {"returns": np.where(whole > 0, mean, np.nan)}


# --------------------------------------------------------------------------------------------------- stored datasets
REQUIRED = {
    "observations": (3, np.float32), "actions": (3, np.float32), "rewards": (2, np.float32),
    "next_observations": (3, np.float32), "terminals": (2, np.float32), "episodes": (2, np.int32),
    "tasks": (2, np.float64), "train_tasks": (1, np.int64), "test_tasks": (1, np.int64),
}  # fmt: skip
OPTIONAL = {"sparse_rewards": (2, np.float32), "returns": (1, np.float32)}


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
        digest.update(memoryview(array.reshape(-1)).cast("B"))
    return digest.hexdigest()


def _as_stored(arrays: Arrays) -> Arrays:
    """What a file holds of these, in its types."""
    return {name: np.asarray(arrays[name], kind[1]) for name, kind in (REQUIRED | OPTIONAL).items() if name in arrays}


def save(path: Path, arrays: Arrays, meta: dict) -> None:
    """Writes a dataset, arrays as at the top, whole or not at all, with format and checksum beside `meta`. OSError."""
    arrays = _as_stored(arrays)
    text = json.dumps(meta | {"format": FORMAT, "checksum": checksum(arrays)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda file: np.savez(file, meta=np.array(text), **arrays))


def load(path: Path | str, env: str | None = None, device: torch.device | str = "cpu") -> Dataset:
    """Reads a dataset onto `device`; DataError, in one sentence, if the file cannot be trusted or is not for `env`.

    A line on standard error says so where rows of your own data do not follow each other as episodes do.
    """
    path = Path(path)
    arrays, meta = _read(path)
    try:
        _check(arrays, meta, env)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if "settings" not in meta and (doubt := _doubt(arrays)):
        print(f"{path}: {doubt}", file=sys.stderr)
    meta.setdefault("checksum", checksum(arrays))
    if env is not None:
        meta.setdefault("env", env)
    unknown = np.full(len(arrays["tasks"]), np.nan, np.float32)
    on_host = {name: arrays.pop(name, unknown) for name in ("tasks", "train_tasks", "test_tasks", "returns")}
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    context_rewards = tensors.pop("sparse_rewards", tensors["rewards"])
    return Dataset(**tensors, **on_host, context_rewards=context_rewards, meta=meta)


def sparsify(dataset: Dataset, threshold: float | None = None) -> float:
    """Makes the rewards that contexts show sparse, FOCAL++'s Eq. 35 on the full rewards, and returns its R.

    Without a threshold R is the one that leaves half of the training tasks' transitions non-zero, as the paper chose
    its own (for point robots, whose goal has a radius, the paper's); it is noted in `meta`. Rewards themselves, which
    actor, critic and returns use, stay as they are. DataError where there is no such R.
    """
    row = envs.FAMILIES.get(dataset.meta.get("env"))
    if threshold is None and row is not None and not row.xml:
        threshold = row.sparse_threshold
    if threshold is None:
        threshold = dataset.rewards[torch.from_numpy(dataset.train_tasks)].flatten().double().median().item()
    refuse((threshold == 0, "no sparse rewards: half of the rewards are 0 or less, and Eq. 35 divides by |R| = 0"))
    dataset.context_rewards = sparse(dataset.rewards, threshold)
    dataset.meta["sparse_threshold"] = threshold
    return threshold


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays that a dataset needs, and `meta`; DataError where they cannot be read."""
    names, arrays, name = ["meta", *REQUIRED, *OPTIONAL], {}, ""
    try:
        with zipfile.ZipFile(path) as file:  # a zip tells the sizes of what it holds, and cannot grow beyond them
            size = sum(info.file_size for info in file.infolist() if info.filename.removesuffix(".npy") in names)
            for info in file.infolist():
                file.open(info).close()  # a zip says each name twice: a damaged one cannot hide an array
        if size > _memory():
            raise DataError(f"{path}: holds {size / 1e9:,.0f} GB, this machine has {_memory() / 1e9:,.0f} GB of memory")
        with np.load(path, allow_pickle=False) as file:
            for name in (name for name in names if name in file.files):
                arrays[name] = np.asarray(file[name])
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a dataset (.npz)") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # np.load raises a different error for each way a file can be damaged
        if "Object arrays" in str(error):
            raise DataError(f"{path}: {name} holds Python objects, expected numbers (of meta: JSON text)") from None
        raise DataError(f"{path}: not a readable .npz dataset, damaged or cut short ({type(error).__name__})") from None
    text = str(arrays.pop("meta", "{}"))
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(meta := json.loads(text), dict):
            return arrays, meta
    raise DataError(f"{path}: meta is {text!r:.60}, expected a JSON object, or no meta")


def _memory() -> float:
    """Bytes of memory that this machine has."""
    names = getattr(os, "sysconf_names", {})
    known = "SC_PAGE_SIZE" in names and "SC_PHYS_PAGES" in names
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else math.inf


def _check(arrays: Arrays, meta: dict, env: str | None) -> None:
    """Gives each array its type; DataError, which says what is wrong, if this is no dataset, or not one of `env`."""
    names = [meta.get(key, "") for key in ("env", "quality", "checksum")]
    missing = [name for name in REQUIRED if name not in arrays]
    refuse(
        (meta.get("format", FORMAT) != FORMAT, f"format {meta.get('format')!r:.40}, expected {FORMAT}; build it anew"),
        (any(not isinstance(name, str) for name in names), f"meta: found {names!r:.80}, expected three texts"),
        (env and meta.get("env", env) != env, f"made for {repr(names[0])[1:-1][:40]}, expected {env}"),
        (missing, f"lacks {', '.join(missing)}"),
    )
    if "checksum" in meta and checksum(arrays) != meta["checksum"]:
        raise DataError("the checksum does not match: the file was changed or damaged")
    for name, array in arrays.items():
        ndim, dtype = (REQUIRED | OPTIONAL)[name]
        if array.ndim != ndim or array.dtype.kind not in "biuf":
            expected = f"{np.dtype(dtype)} with {ndim}"
            raise DataError(f"{name} is {array.dtype} with {array.ndim} axes, expected {expected}")
        with np.errstate(all="ignore"):
            arrays[name] = array.astype(dtype, copy=False)
        if np.issubdtype(dtype, np.integer) and (changed := arrays[name] != array).any():
            raise DataError(f"{name} holds {array[changed][0]}, expected whole numbers ({np.dtype(dtype)})")
    _check_shapes(arrays, env)
    _check_values(arrays, env)


def _check_shapes(arrays: Arrays, env: str | None) -> None:
    t, n, d = arrays["observations"].shape
    m = arrays["actions"].shape[2]
    expected = dict.fromkeys(("rewards", "terminals", "episodes", "sparse_rewards"), (t, n)) | {
        "actions": (t, n, m), "next_observations": (t, n, d), "tasks": (t, arrays["tasks"].shape[1]), "returns": (t,),
    }  # fmt: skip
    if env is not None:
        row = envs.family(env)
        expected |= {"observations": (t, n, row.obs_dim), "actions": (t, n, row.act_dim)}
        expected |= {"tasks": (t, envs.sample_tasks(env, 1, 0).shape[1])}
    empty = t == 0 or n < 2 or d == 0 or m == 0
    shapes = f"observations have shape {(t, n, d)} and actions {(t, n, m)}"
    refuse((empty, f"{shapes}, expected at least one task, two transitions and a number in each"))
    for name, array in arrays.items():
        shape = expected.get(name, array.shape)
        refuse((array.shape != shape, f"{name} has shape {array.shape}, expected {shape}"))


def _check_values(arrays: Arrays, env: str | None) -> None:
    for name, array in arrays.items():
        finite = array.dtype.kind != "f" or name == "returns" or np.isfinite(array).all()
        refuse((not finite, f"{name} holds values that are not finite"))
    largest, episodes = np.abs(arrays["actions"]).max(), arrays["episodes"]
    refuse(
        (largest > 1, f"actions reach {largest!s}, expected them in [-1, 1]"),
        (not np.isin(arrays["terminals"], (0, 1)).all(), "terminals hold values other than 0 and 1"),
        ((episodes[:, 1:] < episodes[:, :-1]).any(), "episodes are not in order"),
    )
    t, (train, test) = len(arrays["tasks"]), (arrays[name].tolist() for name in ("train_tasks", "test_tasks"))
    for name, index in (("train_tasks", train), ("test_tasks", test)):
        refuse((not index, f"{name} is empty, expected at least one of the {t} tasks"))
        low, high, common = min(index), max(index), statistics.mode(index)
        refuse(
            (low < 0 or high >= t, f"{name} holds {low if low < 0 else high}, expected indices from 0 to {t - 1}"),
            (len({*index}) < len(index), f"{name} holds {common} more than once"),
        )
    both = sorted({*train} & {*test})
    refuse((both and {*train} != {*test}, f"tasks {both} are both training and test tasks"))
    if env is not None:
        known = envs.is_task(env, arrays["tasks"], drawn=True)
        i, means = known.argmin(), envs.family(env).means
        found = f"task {i} is {str(arrays['tasks'][i].tolist()):.60}"
        refuse((not known.all(), f"{found}; expected tasks of {env}, each {means}"))


def _doubt(arrays: Arrays) -> str | None:
    """What looks wrong where one row follows another, in words, or None."""
    apart = inside = led_on = ends = 0
    rows = (arrays[key] for key in ("observations", "next_observations", "episodes"))
    for obs, following, episodes in zip(*rows, strict=True):
        same = episodes[1:] == episodes[:-1]
        apart += (~np.isclose(following[:-1], obs[1:], rtol=1e-4, atol=1e-5).all(1))[same].sum()
        led_on += (following[:-1] == obs[1:]).all(1)[~same].sum()
        inside, ends = inside + same.sum(), ends + (~same).sum()
    if led_on > ends / 2:
        found = f"{led_on:,} of {ends:,} last rows of an episode lead to the next one's first observation"
        return f"warning: {found}; are next_observations shifted by a row, or episodes too short?"
    found = f"{apart:,} of {inside:,} rows inside an episode do not end where the next row begins"
    return f"warning: {found}; look at episodes and next_observations (fine if rows are shuffled)" if apart else None


def prepare(
    env: str,
    quality: str,
    seed: int = 0,
    data_dir: Path | str = "datasets",
    train: int | None = None,
    test: int | None = None,
    device: str = "auto",
    workers: int | None = None,
    behaviour: str | None = None,
    **changes: Any,
) -> Path:
    """The path of the dataset of this quality; builds what is missing, one step after the other, and says so.

    `behaviour` is "sac" or "scripted"; without it, the script of families that have one. `changes` are of `Settings`.
    DataError, in one sentence, for what there is not or cannot be written, and where another setting made what is
    there; Diverged if the agents do.
    """
    row, device = envs.family(env), choose_device(device)
    own = "scripted" if row.script else "sac"
    behaviour = behaviour or own
    check_numbers({"seed": seed, "train": train, "test": test, "workers": workers})
    settings = settings_for(env, device, **changes)
    _check_possible(env, quality, behaviour, bool(train or test), settings)
    train, test = train or row.train, test or row.test
    folder = Path(data_dir) / env / f"{train}+{test}-seed{seed}{'' if behaviour == own else f'-{behaviour}'}"
    path = folder / f"{quality}.npz"
    if path.exists():
        return _made_with(path, changes)
    try:
        tasks = envs.sample_tasks(env, len(row.only) or train + test, seed)
    except ValueError as error:
        raise DataError(error) from None
    every = np.arange(len(tasks))
    index = {"train_tasks": every[:train], "test_tasks": every if row.only else every[train:]}
    try:
        with locked(folder):
            if path.exists():
                return _made_with(path, changes)  # another process built it meanwhile
            if behaviour == "scripted":
                print(f"building {path}: the script in every task", flush=True)
                arrays = perform(env, tasks, settings.trajectories, seed)
            else:
                _announce(path, settings, env, device, workers, len(tasks))
                agents = build_behaviour(env, tasks, seed, settings, folder, device, workers)
                arrays = roll_out(env, tasks, "mixed" if quality == "relabelled" else quality, agents, settings, seed)
            if quality == "relabelled":
                arrays = relabel(env, tasks, index["train_tasks"], arrays, seed)
            meta = {"env": env, "quality": quality, "seed": seed, "settings": dataclasses.asdict(settings)}
            _store(path, arrays | {"tasks": tasks} | index, meta | {"behaviour": behaviour, "device": str(device)})
    except OSError as error:
        raise _cannot_build(error, folder) from None
    return path


def _made_with(path: Path, changes: dict[str, Any]) -> Path:
    """The path; DataError if the dataset there was made with other settings than these (None: any)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            then = dict(json.loads(str(file["meta"]))["settings"])
    except Exception:
        return path  # `load` says what is wrong with it
    for name, value in changes.items():
        if name != "core_minutes" and value is not None and then.get(name, value) != value:
            raise DataError(f"{path}: made with {flag(name)} {then[name]}, asked for {value}; use another --data-dir")
    return path


def _store(path: Path, arrays: Arrays, meta: dict) -> None:
    """Saves a dataset with its tasks' returns, unless something in it is not finite or not in its range."""
    if "first_return" in arrays and "returns" not in arrays:
        arrays["returns"] = arrays["first_return"].mean(1)
    stored = _as_stored(arrays)
    try:
        _check_shapes(stored, meta["env"])
        _check_values(stored, meta["env"])
    except DataError as error:
        raise DataError(f"{path}: not stored, {error}") from None
    versions = {"torch": torch.__version__, "numpy": np.__version__, "mujoco": envs.mujoco.__version__}
    save(path, arrays, meta | {"versions": versions})
    print(f"{path}: {arrays['rewards'].shape[1]:,} transitions a task")


def _check_possible(env: str, quality: str, behaviour: str, counts: bool, settings: Settings) -> None:
    """DataError, which says why, if there is no such dataset. `counts`: numbers of tasks are asked for."""
    row, scripted, several = envs.family(env), behaviour == "scripted", quality in ("mixed", "relabelled")
    goals = not row.xml and row.differs == "reward"  # then a transition's reward can be told from it and a task
    refuse(
        (quality not in QUALITIES, f"unknown quality {quality!r}; expected one of {', '.join(QUALITIES)}"),
        (quality == "relabelled" and not goals, f"{env} cannot be relabelled, only point robots with goals can"),
        (behaviour not in BEHAVIOURS, f"unknown behaviour {behaviour!r}; expected one of {', '.join(BEHAVIOURS)}"),
        (scripted and row.script is None, f"{env} has no script; expected behaviour sac"),
        (scripted and quality != "mixed", f"{env}: scripted data are mixed, found {quality}; expected behaviour sac"),
        (row.only and counts, f"{env} has {len(row.only)} tasks, all for training and testing; their number is fixed"),
        (quality == "replay" and settings.replay < settings.envs,
         f"--replay: expected at least the {settings.envs} of --sac-envs, found {settings.replay}"),
        (several and not scripted and settings.trajectories < 2,
         f"--trajectories: {quality} data are of several policies; expected at least 2, found 1"),
    )  # fmt: skip


def _announce(path: Path, settings: Settings, env: str, device: torch.device, workers: int | None, tasks: int) -> None:
    row, folder = envs.family(env), path.parent
    if (folder / "behaviour.pt").exists():
        print(f"building {path}: rolling out the policies that are there", flush=True)
        return
    parts = "going on with" if any(folder.glob("behaviour-part*.pt")) else "building"
    cores = min(workers or envs.cores(), 64, math.ceil(tasks / settings.shard))
    share = tasks / (len(row.only) or row.train + row.test) * settings.steps / settings_for(env, device).steps
    minutes = math.ceil(settings.core_minutes * share / cores)
    about = f", about {minutes} min on {cores} cores" if device.type == "cpu" else ""
    print(f"{parts} {path}: SAC in every task ({settings.steps:,} steps each), then rollouts{about}", flush=True)


# ------------------------------------------------------------------------------------------------ what data are like
def episode_returns(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Task, place in the data (0 first row, 1 last) and return of every episode that was seen to its end.

    Returns are those that the papers report (sparse ones for sparse-point-robot), over the family's horizon.
    """
    row = envs.FAMILIES.get(dataset.meta.get("env"))
    reported = dataset.context_rewards if row is not None and row.sparse_reward else dataset.rewards
    horizon = row.horizon if row is not None else None
    arrays = (x.cpu().numpy() for x in (reported, dataset.episodes, dataset.terminals))
    return _episode_returns(*arrays, horizon)


def numbered(episodes: np.ndarray) -> np.ndarray:
    """Episode numbers (T, N) of any kind, as from 0 and without gaps in every task."""
    return (np.diff(episodes, axis=1, prepend=episodes[:, :1]) != 0).cumsum(1)


def _episode_returns(rewards: np.ndarray, episodes: np.ndarray, terminals: np.ndarray, horizon: int | None):
    t, n = rewards.shape
    episodes = numbered(episodes)
    count = int(episodes.max()) + 1
    key = (np.arange(t)[:, None] * count + episodes.astype(np.int64)).ravel()
    first = np.full(t * count, t * n)
    np.minimum.at(first, key, np.tile(np.arange(n), t))
    age = np.tile(np.arange(n), t) - first[key]
    total = np.bincount(key, rewards.ravel() * (age < (horizon or n)), t * count)
    length = np.bincount(key, minlength=t * count)
    whole = np.bincount(key, terminals.ravel(), t * count) > 0
    whole |= length >= (horizon or 1)
    index = np.flatnonzero(whole)
    return index // count, first[index] / max(n - 1, 1), total[index]


def successes(dataset: Dataset) -> np.ndarray:
    """(T, episodes) whether a behaviour that ends in a reward of 0 (and has less before) was ever achieved."""
    episodes = numbered(dataset.episodes.cpu().numpy())
    task, i = np.nonzero(dataset.rewards.cpu().numpy() == 0)
    achieved = np.zeros((len(episodes), episodes.max() + 1), bool)
    achieved[task, episodes[task, i]] = True
    return achieved


# --------------------------------------------------------------------------------------------- runs: the command line
# From here to the end of this section stands what every script needs and what is no part of any algorithm: flags from
# a dataclass, the run's folder, metrics, curve, checkpoint and resume, the check for divergence, one line for every
# failure, the CUDA graph. A reader of a script may skip it.
@dataclass
class Args:
    """The flags that every script has. A script's own `Args(data.Args)` adds its flags, one line each.

    A field's name and default are the flag's, its annotation gives type and range, `bool` a --flag and a --no-flag, the
    comment behind it is the help. A comment of one word on a line of its own begins a group of the help.
    """

    # run
    env: str = "walker-params"  # task family
    small: bool | None = None  # sizes for a machine without a GPU; unless given: where there is no CUDA device
    letter: bool = False  # the papers' tables to the letter, also where a script has other settings at their sizes
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
    film: bool = False  # write film.gif at the end: the agent in unseen tasks
    # data
    data: Path | None = None  # a dataset of your own (.npz, see data.py)
    data_dir: Path = Path("datasets")  # where datasets are kept and built
    data_seed: Whole = 0  # seed of the tasks and of their datasets
    quality: Literal[QUALITIES] = "mixed"  # quality of the training tasks' data
    test_quality: Literal[QUALITIES] | None = None  # of the test tasks' data; unless given: --quality

    # Flags that do not change the result of a run (but for rounding), or are in its path anyway; flags that may differ
    # from those of the checkpoint that a run goes on from.
    ELSEWHERE = ("env", "small", "seed", "device", "threads", "graph", "compile", "run_dir", "resume", "overwrite")
    ELSEWHERE += ("film", "data_dir")
    GROWS = ("steps",)
    ONE_FILE = ("quality", "test_quality", "data_seed")  # flags that choose among data that are built here

    def complete(self, given: dict[str, Any]) -> None:
        """Fills in what depends on other flags; DataError where flags do not go together. `given`: the command line."""
        both = [f"{option(key)} {given[key]}" for key in self.ONE_FILE if self.data and key in given]
        refuse(
            (both, f"{' '.join(both)}: --data has the data of all tasks; expected one or the other"),
            (self.resume and self.overwrite, "--resume goes on, --overwrite begins anew; expected one of them"),
        )
        self.test_quality = self.test_quality or self.quality


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise DataError(message)


def option(key: str) -> str:
    """The flag of a field."""
    return f"--{key.replace('_', '-')}"


def parse(
    cls: type[Args],
    table: dict[str, dict],
    small: dict[str, dict],
    argv: list[str] | None = None,
    ours: dict[str, dict] | None = None,
) -> Args:
    """The arguments: the command line's, over small[env]'s if the sizes are small, else ours[env]'s unless --letter,
    over table[env]'s, over the defaults of `cls`. Also names the variant. DataError, in one line, for what cannot be.
    """
    doc = sys.modules[cls.__module__].__doc__ or ""  # none under python -OO
    how = {"usage": "%(prog)s [flags]", "add_help": False, "argument_default": argparse.SUPPRESS}
    how["allow_abbrev"] = False
    parser = Parser(description=doc.partition("\n")[0], **how)
    flags = _add_flags(parser, cls, list(table))
    space, unknown = parser.parse_known_args(argv)
    if unknown:
        raise DataError(f"unrecognized arguments: {' '.join(unknown)}{_did_you_mean(unknown[0], map(option, flags))}")
    given, env = vars(space), getattr(space, "env", cls.env)
    show_help, sized = given.pop("help", False), given.get("small")
    if sized is None:
        sized = given.get("device") == "cpu" or not torch.cuda.is_available()
    row = {field.name: field.default for field in dataclasses.fields(cls)} | table.get(env, {})
    changes = small if sized else {} if given.get("letter") else ours or {}
    row |= changes.get(env, {}) | {"env": env, "small": sized}
    if show_help:
        for key, action in flags.items():
            action.help += f" ({row[key]})" if row[key] is not None else ""
        parser.print_help()
        raise SystemExit(0)
    refuse((env not in table, f"argument --env: expected one of {', '.join(table)}, found {env!r}"))
    if given.get("test_quality") == given.get("quality", row["quality"]):
        given.pop("test_quality", None)  # the same is no variant
    args = cls(**row | given)
    follow_others = {field.name for field in dataclasses.fields(cls) if field.default is None}
    changed = {key: value for key, value in given.items() if value != row[key] or key in follow_others}
    args.variant = variant(args, changed)
    args.complete(given)
    return args


def _add_flags(parser: Parser, cls: type[Args], families: list[str]) -> dict[str, argparse.Action]:
    """A flag for every field of the dataclass, in groups, and --help."""
    hints, comments = get_type_hints(cls, include_extras=True), _comments(cls)
    groups = {name: parser.add_argument_group(name) for name in ("run", "data", "algorithm", "ablations")}
    groups["run"].add_argument("-h", "--help", action="store_true", help="show these lines and the defaults here")
    flags = {}
    for field in dataclasses.fields(cls):
        text, name = comments.get(field.name, ("", "algorithm"))
        kind = Literal[tuple(families)] if field.name == "env" else hints[field.name]
        if type(None) in get_args(kind):
            kind = next(part for part in get_args(kind) if part is not type(None))
        how = {"type": partial(parse_value, kind)}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            how["metavar"] = "{" + ",".join(map(str, get_args(kind))) + "}"
        group = groups.setdefault(name, groups["algorithm"])
        flags[field.name] = group.add_argument(option(field.name), help=text.replace("%", "%%"), **how)
    return flags


@cache
def _comments(cls: type) -> dict[str, tuple[str, str]]:
    """Of every field: the comment behind it, and the group in which it stands."""
    found: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            lines, group = inspect.getsource(base).splitlines(), "algorithm"
        except (OSError, TypeError):  # its source is nowhere, as under python -c: help without words
            continue
        for line in lines:
            if heading := re.fullmatch(r"    # (\w+)", line):
                group = heading[1]
            elif field := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
                text, place = found.get(field[1], ("", group))
                found[field[1]] = (field[2] or text, place)
    return found


def parse_value(kind: Any, text: str) -> Any:
    """The value of a flag on the command line; argparse.ArgumentTypeError if it is not of this kind."""
    if get_origin(kind) is Literal:
        for value in get_args(kind):
            if str(value) == text:
                return value
        names = [str(value) for value in get_args(kind)]
        close = _did_you_mean(text, names)
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, found {text!r}{close}")
    if not hasattr(kind, "__metadata__"):
        return kind(text)
    number, (words, good) = get_args(kind)[0], kind.__metadata__
    with contextlib.suppress(ValueError):
        if text.isascii() and "_" not in text and good(number(text)):
            return number(text)
    raise argparse.ArgumentTypeError(f"expected {words}, found {text!r}")


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word.partition("=")[0], list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def variant(args: Args, changed: dict[str, Any]) -> str:
    """The name of the run's folder: the size, and every setting that is not this environment's default, --steps last
    (`Run` finds runs of other lengths). Safe, and short in bytes, on every file system."""
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


def settings(args: Args) -> dict[str, Any]:
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
    return train, with_context(test, args.context, args.env) if hasattr(args, "context") else test


def with_context(dataset: Dataset, context: Arrays, env: str) -> Dataset:
    """The dataset, but what is known of every task are these transitions of one: arrays (N, ...) named as at the top
    (without terminals and episodes: one that did not end). DataError for what does not fit."""
    n = len(next(iter(context.values())))
    arrays = {"terminals": np.zeros(n), "episodes": np.zeros(n)} | context
    arrays = {name: np.asarray(array)[None] for name, array in arrays.items() if name in REQUIRED | OPTIONAL}
    one = {"tasks": dataset.tasks[:1], "train_tasks": np.zeros(1, int), "test_tasks": np.zeros(1, int)}
    _check(arrays | one, {}, env)
    of_all = lambda array: array.expand(len(dataset.tasks), *array.shape[1:]).to(dataset.rewards.device)
    own = {name: of_all(torch.tensor(array, dtype=torch.float32)) for name, array in arrays.items()}
    own["context_rewards"] = own.pop("sparse_rewards", own["rewards"])
    return dataclasses.replace(dataset, **own)


def standardisation(observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (d,) of the training tasks' observations (n, N, d)."""
    flat = observations.flatten(0, 1).double()
    return flat.mean(0).float(), flat.std(0).clamp_min(1e-3).float()


def known_return(dataset: Dataset) -> float | None:
    """Mean return of the test tasks' data, where the file tells it."""
    returns = dataset.returns[dataset.test_tasks]
    return float(returns.mean()) if np.isfinite(returns).all() else None


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
        """Of this step, without looking at them."""
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
        for name, value in zip(self.METRICS, self.metrics[0].tolist(), strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"the sum of {name} is not finite at step {int(self.step)}")


def adam(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam for a module on its device; its learning rate is a tensor, so that a captured graph can change it."""
    parameters = list(module.parameters())
    rate = torch.tensor(lr, device=parameters[0].device)
    return torch.optim.Adam(parameters, lr=rate, fused=True, capturable=parameters[0].is_cuda)


@torch.compiler.disable  # compiled, the change of a tensor that only the optimiser holds can be lost
def set_rate(optimiser: torch.optim.Optimizer, lr: torch.Tensor) -> None:
    optimiser.param_groups[0]["lr"].copy_(lr)


def gradients(optimisers: Iterable[torch.optim.Optimizer], loss: torch.Tensor) -> None:
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


# ----------------------------------------------------------------------------------------------- runs: their folders
class Run:
    """<run-dir>/<script>/<env>/<variant>/seed<k>/ and what is written there: args.json, source.py, metrics.csv,
    curve.png, checkpoint.pt, final.json. On the CPU a run that is killed and resumed gives what it would have given."""

    def __init__(self, args: Args, script: Path):
        self.args, self.script, self.device = args, script, choose_device(args.device)
        self.folder = args.run_dir / script.stem / args.env / args.variant / f"seed{args.seed}"
        self.agent = self.world = None
        self.step, self.rows, self.marks = 0, [], ()
        self.saved = None  # step and folder of the checkpoint that stands
        self.curve = {"train_": "training tasks", "": "test tasks"}  # prefixes of return_mean and _std in the rows
        self.unit = "gradient steps"  # what a step is
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.folder / ".writable", lambda file: None)
            (self.folder / ".writable").unlink()
        except OSError as error:
            raise DataError(f"--run-dir {args.run_dir}: cannot write there ({error.strerror})") from None
        sizes = "small sizes" if args.small else "the papers' sizes"
        if args.small and not torch.cuda.is_available() and args.device == "auto":
            sizes = "no CUDA device: small sizes; --no-small for the papers'"
        print(f"{script.name} on {args.env}, {self.device} ({sizes}): {self.folder}", flush=True)

    def begin(self, agent: Learner, world: Any) -> None:
        """Takes the learner up, and with --resume where its checkpoint left it; ends here if the run is finished."""
        args, self.agent, self.world = self.args, agent, world
        torch.set_num_threads(min(args.threads, 1024) or envs.cores())
        seconds, checkpoint = 0.0, self._checkpoint()
        if args.overwrite:
            for old in filter(Path.is_file, list(self.folder.iterdir())):
                old.unlink()
        elif checkpoint and args.resume:
            seconds = self._resume(checkpoint)
            print(f"going on from step {self.step} of {checkpoint}", flush=True)
        elif checkpoint or (self.folder / "final.json").exists():
            self._standing()
        elif args.resume:
            print("no checkpoint yet: from the start", flush=True)
        self.began = time.time() - seconds
        self._write_text("args.json", json.dumps(settings(args) | {"checksums": self._sources()}, indent=1))

    def _standing(self) -> None:
        """What stands in the folder is never replaced unasked."""
        path = self.folder / "final.json"
        either = "--resume goes on from there, --overwrite begins anew; expected one of them"
        refuse((not path.exists(), f"{self.folder / 'checkpoint.pt'}: {either}"))
        try:
            checksums = json.loads(path.read_text())["dataset_checksums"]
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path}: damaged; --resume mends it from the checkpoint, --overwrite begins anew"
            ) from None
        if checksums != self.world.checksum:
            raise DataError(f"{self.folder}: a run on other data; expected --overwrite, or another --run-dir")
        print(f"this run is finished: {self.folder} (--overwrite begins anew)")
        raise SystemExit(0)

    def _sources(self) -> dict[str, str]:
        """Copies the script, and the file that was started if it is another; returns checksums of the other modules."""
        started = getattr(sys.modules["__main__"], "__file__", None) or self.script
        for name, path in ("source.py", self.script), ("started.py", Path(started)):
            if path.is_file() and (name == "source.py" or path.resolve() != self.script.resolve()):
                write(self.folder / name, lambda file, path=path: file.write(path.read_bytes()))
        files = Path(__file__), Path(envs.__file__)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def graph(self, fn: Procedure) -> Callable[[], None]:
        """`fn`, without arguments, on CUDA as one graph."""
        return capture(fn, compiled=self.args.compile) if self.device.type == "cuda" and self.args.graph else fn

    def steps(self, total: int, *marks: int) -> Iterator[int]:
        """The steps that are left of 1 to `total`; besides every --eval-every steps an evaluation is due at `marks`."""
        self.total, self.marks = total, {*marks, total}
        shorter = "; fewer --steps are shorter" if self.args.small else "; --small sizes are shorter"
        self.bar, restored = Progress(self.script.stem, total, shorter=shorter), self.step
        print(f"{total - restored:,} {self.unit}, an evaluation every {self.args.eval_every:,}", flush=True)
        for step in range(restored + 1, total + 1):
            self.step = step
            yield step
            self.bar.show(step, restored)

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
        self._write_metrics()
        plot_curve(self)
        plot_paths(self)
        self._save(seconds)
        known = {"data": self.world.behaviour, "optimum": self.world.optimum}
        known = ", ".join(f"{name} {value:.2f}" for name, value in known.items() if value is not None)
        rate = self.step / max(seconds, 0.1)
        left = f"{rate:.3g} steps/s  {(self.total - self.step) / rate / 60:.1f} min left"
        shown = f"test return {row['return_mean']:8.2f} ({known})" if math.isfinite(row["return_mean"]) else ""
        self.bar.say(f"step {self.step:>7}/{self.total}  {shown}  {note}  {left}")

    def _write_metrics(self) -> None:
        lines = [",".join(self.rows[0])] + [",".join(map(repr, row.values())) for row in self.rows]
        self._write_text("metrics.csv", "\n".join(lines) + "\n")

    def end(self) -> None:
        """Writes final.json: the last row, settings, versions, seconds and what the data gave."""
        self._write_metrics()  # a run that was resumed at its end may have lost it
        world, seconds = self.world, round(time.time() - self.began, 1)
        final = self.rows[-1] | {
            "args": settings(self.args), "wall_clock_seconds": seconds, "dataset_checksums": world.checksum,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "behaviour_return": world.behaviour, "optimal_return": world.optimum,
        }  # fmt: skip
        bad = [key for key, value in final.items() if isinstance(value, float) and not math.isfinite(value)]
        self._write_text("final.json", json.dumps(final | dict.fromkeys(bad), indent=1))
        if self.args.film:
            film = str(Path(__file__).resolve().parent / "benchmark/animate.py"), str(self.folder)
            subprocess.run([sys.executable, *film, "--out", str(self.folder / "film.gif")])
        print(f"curve, metrics and checkpoint: {self.folder}")

    def _write_text(self, name: str, text: str) -> None:
        write(self.folder / name, lambda file: file.write(text.encode()))

    def _save(self, seconds: float) -> None:
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        checkpoint = {
            "step": self.step, "seconds": seconds, "rows": self.rows, "args": settings(self.args),
            "dataset": self.world.checksum, "agent": self.agent.state_dict(),
            "optimisers": {key: optimiser.state_dict() for key, optimiser in self.agent.optimisers.items()},
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "standardisation": [self.world.mean, self.world.std],  # of observations: all that networks need besides
        }  # fmt: skip
        write(self.folder / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
        self.saved = self.step, self.folder

    def _checkpoint(self) -> Path | None:
        """The checkpoint to go on from: this run's own or, to --resume, the last of the same run with other --steps, if
        they may grow."""
        own = self.folder / "checkpoint.pt"
        if own.exists() or not self.args.resume or "steps" not in self.args.GROWS:
            return own if own.exists() else None
        runs = self.folder.parent.parent.glob(f"*/{self.folder.name}/checkpoint.pt")
        base = self.args.variant.partition(",steps=")[0]
        found = [path for path in runs if path.parts[-3].partition(",steps=")[0] == base]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)

    def _resume(self, path: Path) -> float:
        """Loads a checkpoint; returns the seconds that it took."""
        args, agent, anew = self.args, self.agent, "--overwrite begins anew"
        with believing(path, "not a checkpoint of this script", anew):
            checkpoint = read(path, self.device)
            then, dataset = dict(checkpoint["args"]), list(checkpoint["dataset"])
        now, skip = settings(args), {*args.ELSEWHERE, "data"}  # of the data their checksums tell more
        for key, default in [(field.name, field.default) for field in dataclasses.fields(args)]:
            value, found = now[key], then.get(key, default)  # a flag that is newer than the checkpoint had its default
            grew = key in args.GROWS and kind([found, value]) == [int, int] and found < value
            if key not in skip and not grew and (torch.is_tensor(found) or found != value):
                raise DataError(f"{option(key)}: the checkpoint was made with {found!r:.80}, found {value!r}; {anew}")
        if dataset != self.world.checksum:
            raise DataError(f"{path}: made with other data, of checksums {dataset!r:.200}; {anew}")
        with believing(path, "its weights are not this script's", anew):
            check_checkpoint(checkpoint, agent, agent.optimisers)
            agent.load_state_dict(checkpoint["agent"])
            for key, optimiser in agent.optimisers.items():
                optimiser.load_state_dict(checkpoint["optimisers"][key])
                optimiser.param_groups[0]["capturable"] = self.device.type == "cuda"  # it may come from a CPU
            torch.set_rng_state(checkpoint["random"]["cpu"].cpu())
            if self.device.type == "cuda" and checkpoint["random"]["cuda"] is not None:
                torch.cuda.set_rng_state(checkpoint["random"]["cuda"].cpu())
        self.step, self.rows = checkpoint["step"], checkpoint["rows"]
        self.saved = self.step, path.parent
        return checkpoint["seconds"]

    def where(self) -> str:
        """What an interrupted run has, in words."""
        if self.agent is None:
            return "no step was made yet; the same command goes on building data from the last save"
        if not self.saved:
            return "there is no checkpoint yet"
        step, folder = self.saved
        return f"the checkpoint of step {step} is kept in {folder}; --resume goes on from it"


@contextlib.contextmanager
def endings(program: str, smaller: str, interrupted: Callable[[], str]):
    """Every way to fail ends in one line on standard error and an exit code."""
    try:
        yield
        return
    except DataError as error:
        message, code = str(error), error.code
    except OSError as error:
        message, code = f"{error.filename or 'the output'}: {error.strerror or error}", 2
    except (MemoryError, RuntimeError) as error:
        text = str(error) or "MemoryError"
        if not any(word in text for word in ("out of memory", "allocate", "MemoryError")):
            raise
        message, code = f"out of memory ({text.splitlines()[0]:.100}); expected smaller sizes, as {smaller}", 2
    except KeyboardInterrupt:
        message, code = f"interrupted; {interrupted()}", 130
    print(f"{program}:", *message.splitlines(), file=sys.stderr)
    raise SystemExit(code)


def start(train: Callable, parse_args: Callable, argv: list[str] | None = None) -> None:
    """train(args, run) with the arguments of the command line: every way to fail ends in one line and an exit code."""
    script, run = Path(inspect.getsourcefile(train) or "script.py"), None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show is no reason to end
    with endings(script.name, "--batch-size or --hidden", lambda: run.where() if run else "nothing was begun"):
        args = parse_args(argv)
        run = Run(args, script)
        try:
            train(args, run)
        except FloatingPointError as error:
            raise Diverged(f"diverged: {error} (step {run.step}); {run.where()}") from None


# ------------------------------------------------------------------------------------- runs: what they have learned
class Rehearsal:
    """In the place of a `Run`: keeps what a script hands over before its first step, and ends there. Writes nothing."""

    def __init__(self, script: ModuleType, args: Args, device: torch.device):
        self.args, self.device, self.updates = args, device, []
        with torch.random.fork_rng(), contextlib.suppress(StopIteration):
            script.train(args, self)

    def begin(self, agent: Learner, world: Any) -> None:
        self.agent, self.world = agent, world

    def graph(self, fn: Procedure) -> Callable[[], None]:
        self.updates.append(fn)
        return fn

    def steps(self, *_: int):
        raise StopIteration


def load_run(folder: Path | str, device: str = "cpu", **changes: Any) -> tuple[ModuleType, Args, Any, Learner]:
    """The script, the arguments, the world and the trained agent of a run; `changes` replace arguments that no training
    step saw, as test_quality; `context`, see `with_context`, is all that it knows of test tasks then. DataError if the
    data are not those of the run, and whatever a reader raises.

    Code is executed: the script of the run's name, from the working directory or from beside this file, else the run's
    own copy; and where the family is not known the file that was started, which registers it.
    """
    folder, on = Path(folder).resolve(), choose_device(device)
    saved, checkpoint = json.loads((folder / "args.json").read_text()), read(folder / "checkpoint.pt", on)
    name, here = folder.parts[-4], Path(__file__).resolve().parent
    if name not in sys.modules:
        places = [place / f"{name}.py" for place in (Path.cwd(), here, here / "benchmark")]
        _execute(name, next(filter(Path.is_file, places), folder / "source.py"))
    if saved["env"] not in envs.FAMILIES:
        _execute("started", folder / "started.py")
    script, runs = sys.modules[name], Path(saved["run_dir"])
    args = script.parse_args(["--env", saved["env"], "--small" if saved["small"] else "--no-small"])
    hints, root = get_type_hints(type(args)), Path() if runs.is_absolute() else folder.parents[3 + len(runs.parts)]
    for key in vars(args).keys() & saved.keys():  # a relative path begins where the run was started
        is_path = saved[key] and Path in (hints.get(key), *get_args(hints.get(key)))
        setattr(args, key, root / saved[key] if is_path else saved[key])
    vars(args).update(changes, device=device)
    rehearsal = Rehearsal(script, args, on)
    agent, world = rehearsal.agent, rehearsal.world
    agent.load_state_dict(checkpoint["agent"])
    same = slice(1 if args.test_quality != saved["test_quality"] else 2)  # of the training and of the test tasks' data
    if checkpoint["dataset"][same] != world.checksum[same]:
        raise DataError(f"{folder}: its data have changed; expected {checkpoint['dataset']}, found {world.checksum}")
    return script, args, world, agent


def policy_of(script: ModuleType, args: Args, world: Any, agent: Learner) -> Callable[[np.ndarray], np.ndarray]:
    """Raw observations (B, d) -> actions (B, m): what acts in an evaluation, in the first B of its sub-environments of
    test tasks. Contexts, adaptation and the rest are as there."""
    env, policies, first = world.env, [], -args.eval_episodes * len(world.test_rows)
    env.returns = lambda policy, seed: policies.append(policy) or np.zeros(env.num_envs)
    script.evaluate(args, agent, world)
    del env.returns

    @torch.no_grad()
    def act(observations: np.ndarray) -> np.ndarray:
        everywhere = env.observe()
        everywhere[first:][: len(observations)] = observations
        return policies[-1](everywhere)[first:][: len(observations)]

    return act


def _execute(name: str, path: Path) -> None:
    """Imports a file as the module of this name. Where it goes on to a `main` that ends the program, it is over."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with contextlib.suppress(SystemExit):
            spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise


# ---------------------------------------------------------------------------------------------- runs: their pictures
def describe_returns(returns: np.ndarray, prefix: str = "") -> dict[str, float]:
    """Columns of metrics.csv: the mean of returns (n tasks, E), and over tasks their standard deviation, their tenth
    (low) and ninetieth (high) percentile."""
    each = returns.mean(1)
    low, high = np.quantile(each, (0.1, 0.9))
    row = {"mean": returns.mean(), "std": each.std(), "low": low, "high": high}
    return {f"{prefix}return_{name}": value for name, value in row.items()}


def save_picture(path: Path, draw: Callable, *size: float, **panels: Any) -> None:
    """Writes what `draw` draws on its panels, side by side, of `size` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots(1, **panels))
    write(path, lambda file: figure.savefig(file, dpi=130, bbox_inches="tight"))


def plot_curve(run: Run) -> None:
    if any(math.isfinite(row["return_mean"]) for row in run.rows):
        save_picture(run.folder / "curve.png", lambda axes: draw_curve(axes, run), 5.2, 3.6)


def draw_curve(axes: Any, run: Run) -> None:
    """Returns against steps: a line for each prefix in `run.curve`, its band from low to high; the data's return, the
    optimum."""
    rows = [row for row in run.rows if math.isfinite(row["return_mean"])]
    step, none = [row["step"] for row in rows], math.nan
    for (prefix, label), colour in zip(run.curve.items(), ("tab:gray", "tab:blue", "tab:cyan"), strict=False):
        low, high = ([row.get(f"{prefix}return_{end}", none) for row in rows] for end in ("low", "high"))
        axes.fill_between(step, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(step, [row[f"{prefix}return_mean"] for row in rows], color=colour, label=label)
    for mark in sorted(run.marks)[:-1]:
        axes.axvline(mark, color="black", linewidth=0.6)
    if run.world.behaviour is not None:
        axes.axhline(run.world.behaviour, color="tab:orange", linestyle=":", label="the test tasks' data")
    if run.world.optimum is not None:
        axes.axhline(run.world.optimum, color="tab:green", linestyle="--", label="optimum")
    axes.legend(fontsize="small", framealpha=0.8)
    axes.set(xlabel=run.unit, ylabel="return", title=f"{run.script.stem} on {run.args.env}")


def task_colours(tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A colour (n, 3) for each task (n, P), and its place (n, 2) on the map of colours: its two parameters, or else how
    far along their first principal component it is, and 0."""
    from matplotlib import colormaps
    from matplotlib.colors import hsv_to_rgb

    if tasks.shape[1] == 2:  # the hue is the direction from the middle, where it is palest
        away = tasks - (tasks.max(0) + tasks.min(0)) / 2
        far = np.linalg.norm(away, axis=1) / max(np.linalg.norm(away, axis=1).max(), 1e-12)
        return hsv_to_rgb(np.c_[np.arctan2(*away.T) / (2 * np.pi) % 1, 0.3 + 0.7 * far, 0.85 + 0 * far]), tasks
    along = tasks[:, 0] if tasks.shape[1] == 1 else tasks @ np.linalg.svd(tasks - tasks.mean(0), False)[2][0]
    return colormaps["turbo"]((along - along.min()) / max(np.ptp(along), 1e-12))[:, :3], np.c_[along, 0 * along]


def components(*z: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Embeddings (n, E, l) on the first two principal components of them all, (n, E, 2), and these' shares of the
    variance."""
    flat = torch.cat([F.pad(part, (0, max(0, 2 - part.shape[-1]))) for part in z]).flatten(0, 1).double()
    _, size, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    share = size.square() / size.square().sum().clamp_min(1e-12)
    points = ((flat - flat.mean(0)) @ directions[:2].T).split([len(part) * part.shape[1] for part in z])
    return [own.view(*part.shape[:2], -1) for own, part in zip(points, z, strict=True)], F.pad(share, (0, 1))


def plot_embeddings(run: Run, tasks: np.ndarray, z_train: torch.Tensor, z_test: torch.Tensor) -> None:
    """Embeddings (n, E, l) of several contexts of each training and each test task on their first principal components
    (FOCAL's Figures 4a, 7), in the colours of the tasks' parameters (n, P), training tasks first, and these themselves:
    where z tells tasks apart like colours lie together."""

    def draw(panels):
        (colours, place), (points, share) = task_colours(tasks), components(z_train, z_test)
        for axes, own, kind in zip(panels, points, ("training", "test"), strict=False):
            own_colours, colours = np.split(colours, [len(own)])
            axes.scatter(*own.flatten(0, 1).T, c=own_colours.repeat(own.shape[1], 0), s=14, linewidths=0)
            axes.set(title=f"z of {len(own)} {kind} tasks", xlabel=f"first component ({share[0]:.0%})")
        panels[1].sharex(panels[0]), panels[1].sharey(panels[0])
        panels[0].set_ylabel(f"second component ({share[1]:.0%})")
        panels[2].scatter(*place.T, c=task_colours(tasks)[0], s=14, linewidths=0)
        panels[2].set(title="their parameters", xlabel="" if tasks.shape[1] < 3 else "first principal component")
        panels[2].set(**({"aspect": "equal"} if tasks.shape[1] == 2 else {"yticks": []}))

    save_picture(run.folder / "embeddings.png", draw, 9, 3.4, ncols=3)


def plot_paths(run: Run) -> None:
    """See `draw_paths`; of bodies there are none."""
    env = getattr(run.world, "env", None)
    if env is not None and env.trail:
        draw = lambda axes: draw_paths(axes, env, len(run.world.test_rows), run.args.eval_episodes)
        save_picture(run.folder / "paths.png", draw, 4, 3.6)


def draw_paths(axes: Any, env: envs.TaskVectorEnv, tasks: int, each: int) -> None:
    """What point robots did last in the last `tasks`, the test tasks, of which each has so many sub-environments: the
    path in the first of them, in the task's colour, and a star where its goal is."""
    mine = slice(-each * tasks, None, each)
    colours, paths = task_colours(env.tasks)[0][mine], np.stack(env.trail[-env.horizon :], 1)[mine, :, 1:3]
    for path, colour in zip(paths, colours, strict=True):
        axes.plot(*path.T, ".-", color=colour, linewidth=1, markersize=2)
    if env.family.goal:
        goals = env.family.goal(env.tasks[mine])
        axes.scatter(*goals.T[:2], c=colours if np.ptp(goals, 0).any() else "black", marker="*", s=70, zorder=3)
    axes.set(title=f"paths in {tasks} unseen tasks", xlabel="x", ylabel="y", aspect="equal")


# ------------------------------------------------------------------------------------------------------ command line
def describe(path: Path, env: str | None = None) -> str:
    """A few lines on a dataset."""
    dataset = load(path, env)
    t, n, d = dataset.observations.shape
    length = n / ((dataset.episodes.diff(dim=1) != 0).sum(1).double().mean().item() + 1)
    lines = [
        f"{path}  ({path.stat().st_size / 1e6:.0f} MB)",
        f"  {dataset.meta.get('env', 'your own data')}, {dataset.meta.get('quality', 'your own data')}: {t} tasks "
        f"({len(dataset.train_tasks)} training, {len(dataset.test_tasks)} test), {n:,} transitions each, "
        f"episodes of {length:.0f} steps, {dataset.terminals.mean().item():.2%} terminal",
    ]
    for name, index in (("training", dataset.train_tasks), ("test", dataset.test_tasks)):
        r = dataset.returns[index]
        if np.isfinite(r).all():  # relabelled data and your own may have none
            lines.append(f"  return, {name} tasks: mean {r.mean():.2f}, worst {r.min():.2f}, best {r.max():.2f}")
    if dataset.meta.get("behaviour") == "scripted":
        lines.append(f"  {successes(dataset).mean():.0%} of the trajectories achieve what is wanted")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    numbers = [field for field in dataclasses.fields(Settings) if field.name not in ("core_minutes", "shard")]
    kinds = get_type_hints(Settings, include_extras=True)
    epilog = f"How SAC learns and is rolled out (see Settings): {', '.join(flag(n.name) for n in numbers)}"
    parser = Parser(description="Builds (or finds) offline datasets and describes them.", epilog=epilog)
    parser.add_argument("--env", required=True, choices=list(envs.FAMILIES), help="task family")
    parser.add_argument("--quality", nargs="+", default=["mixed"], choices=QUALITIES, help="which datasets")
    parser.add_argument("--seed", type=int, default=0, help="seed of the tasks and of everything drawn")
    parser.add_argument("--train", type=int, help="number of training tasks; default: the papers'")
    parser.add_argument("--test", type=int, help="number of test tasks; default: the papers'")
    parser.add_argument("--data-dir", type=Path, default=Path("datasets"), help="where datasets are kept")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="where SAC learns")
    parser.add_argument("--no-graph", action="store_true", help="on CUDA: every operation by itself, not one graph")
    parser.add_argument("--workers", type=int, help="processes on a CPU; default: one for each core")
    parser.add_argument("--behaviour", choices=BEHAVIOURS, help="who acts; default: the family's script, else sac")
    parser.add_argument("--sparse", action="store_true", help="say what FOCAL++'s sparse context rewards would be")
    for field in numbers:
        how = {"type": partial(parse_value, kinds[field.name]), "help": argparse.SUPPRESS}
        parser.add_argument(flag(field.name), dest=field.name, **how)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    global GRAPHS
    with endings("data.py", "--sac-hidden, or fewer --workers", lambda: "the same command goes on from the last save"):
        args = vars(parse_args(argv))
        sparse_too, GRAPHS = args.pop("sparse"), not args.pop("no_graph")
        for quality in args.pop("quality"):
            path = prepare(quality=quality, **args)
            print(describe(path, args["env"]))
            if sparse_too:
                dataset = load(path)
                threshold, share = sparsify(dataset), (dataset.context_rewards > 0).double().mean()
                print(f"  sparse contexts: R = {threshold:.3g}, {share:.0%} non-zero")


if __name__ == "__main__":
    main()
