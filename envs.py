"""Task families for meta-reinforcement learning, stepped as one batch.

A *family* is a distribution over MDPs that share their state and action spaces and differ in the reward (a goal, a
target speed) or in the dynamics (wind, body parameters). A *task* is one row of numbers, its parameters. Everything
that describes a family is one row of `FAMILIES`; to add one, write that row, its reward and, if the body can fall,
its termination rule.

    tasks = sample_tasks("walker-params", 25, seed=0)       # (25, P) parameters, from the seed alone
    env = make("walker-params", tasks.repeat(4, axis=0))    # 100 sub-environments, four for each task
    obs, _ = env.reset()
    obs, reward, terminated, truncated, info = env.step(actions)          # arrays over the batch

    gymnasium.make("walker-params-v0", task=3, seed=0)      # one task, gymnasium's ordinary interface

MuJoCo families step through `mujoco.rollout.Rollout`, a thread pool in C++ that takes one model per sub-environment;
point robots are plain arrays. Actions lie in [-1, 1] for every family and are clipped to it. `terminated` is the MDP's
own end, `truncated` the horizon's (or a physics blow-up: `info["blew_up"]` marks it, and it must not be stored).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np

if sys.platform == "linux" and not os.environ.get("DISPLAY"):  # off-screen rendering, chosen before mujoco is imported
    with contextlib.suppress(OSError):
        ctypes.CDLL("libEGL.so.1")
        os.environ.setdefault("MUJOCO_GL", "egl")

import mujoco  # noqa: E402
import mujoco.rollout  # noqa: E402

_log = mujoco.MjLogConfig.get()  # loading half_cheetah.xml warns, and would write MUJOCO_LOG.TXT where the user works
_log.logto_file = _log.logto_console = False
_log.set()

Array = np.ndarray
TASKS, EPISODES = 1, 2  # the last number of a generator's seed: tasks and initial states never share a generator


# Terminations use operators and methods that arrays and torch tensors share: model rollouts are tensors.
def _never(obs: Array) -> Array:
    return obs[:, 0] < -np.inf


@dataclass(frozen=True)
class Script:
    """A controller for the behaviours of a family; which one is performed stands in the task's parameters."""

    act: Callable  # (task (B, P), obs (B, d)) -> actions (B, m)
    achieved: Callable  # (task, obs) -> (B,) bool
    another: Callable  # (rng, task (P,)) -> the same task, but for a behaviour drawn from those possible in it
    column: int  # of the task's parameters: the behaviour
    names: tuple  # of the behaviours that can be wanted


@dataclass(frozen=True)
class Family:
    """One row of `FAMILIES`. B is the number of sub-environments, P the number of task parameters.

    `state` is (B, nq + nv): MuJoCo's qpos, qvel, then what `derived` adds; of point robots the position (B, act_dim).
    """

    papers: str  # what the papers call it, and which papers
    obs_dim: int
    act_dim: int
    horizon: int  # steps of an evaluation episode
    data_horizon: int  # steps of a trajectory in the offline data
    train: int  # number of training tasks
    test: int  # number of test tasks
    differs: str  # "reward", "dynamics", "layout and reward" or "nothing"
    discount: float
    observe: Callable  # (state) -> (B, obs_dim)
    reward: Callable  # (task (B, P), state, action (B, m), next_state, dt in seconds) -> (B,)
    means: str = "its parameters"  # what a task's parameters are, in words
    sample: Callable | None = None  # (rng, n) -> (n, P)
    valid: Callable | None = None  # (task (B, P)) -> (B,) bool: is it a task? None: any finite numbers are
    drawn: Callable | None = None  # (task (B, P)) -> (B,) bool: can `sample` give it?
    only: tuple = ()  # instead of `sample`: a fixed list of tasks, all of them both for training and for testing
    terminated: Callable = _never  # (obs (B, obs_dim)) -> (B,) bool; a function of observations, for model rollouts
    out_of_range: Callable = _never  # (state) -> (B,) bool: termination that observations cannot show
    sparse_reward: Callable | None = None  # as reward; where there is one, it is what the papers report
    sparse_threshold: float | None = None  # of a point robot: R of FOCAL++'s sparse contexts (Eq. 35), its Table 5's
    optimum: Callable | None = None  # (tasks (n, P), horizon) -> (n,) best possible reported return, where known
    script: Script | None = None  # what the data are collected by, instead of SAC agents
    goal: Callable | None = None  # (task (B, P)) -> (B, 2 or more): a point robot's goal, a body's direction
    drift: Callable | None = None  # (task (B, P)) -> (B, act_dim), added to every move of a point robot
    # MuJoCo
    velocity: tuple = ()  # where the torso's x (and y) velocity stands in an observation, for pictures
    xml: str = ""  # the name of one of gymnasium's files, the path of another, or a model's text
    frame_skip: int = 1
    timestep: float | None = None  # seconds; None: the XML's own
    reset_noise: Callable = lambda rng, nq, nv: (np.zeros(nq), np.zeros(nv))  # -> noise on qpos (nq,) and qvel (nv,)
    modify: Callable | None = None  # (model, parameters (P,)): changes a compiled model in place
    derived: Callable | None = None  # (model, data after mj_forward) -> (k,) more of `state`


# ---------------------------------------------------------------------------------------------------- point robots
# State = position, from the origin; a step moves by 0.1 x action + drift. FOCAL's D.2, the half circle FOCAL++'s D.1.
STEP, GOAL_RADIUS, WIND = 0.1, 0.2, 0.05


def _between(low, high):
    """A family's `drawn`: all parameters lie between these, but for rounding."""
    return lambda task: ((task >= low - 1e-6) & (task <= high + 1e-6)).all(1)


def _goal_at_one_zero(task):
    return np.broadcast_to([1.0, 0.0], (len(task), 2))


def _distance_reward(goal):
    """r = -|s' - goal|."""
    return lambda task, state, action, next_state, dt: -np.linalg.norm(next_state - goal(task), axis=1)


def _sparse_reward(distance):
    """1 - distance to the goal inside its radius, else 0 (FOCAL appendix D.2)."""
    return np.where(distance <= GOAL_RADIUS, 1 - distance, 0.0)


def _reachable_distance(goal, drift, horizon):
    """(n, horizon) smallest possible distance to the goal after 1..horizon steps."""
    # after k steps the robot can be anywhere in a box of half-width 0.1 k around k x drift, and a path that heads for
    # the goal at full speed on each axis is as close as possible at every k at once
    k = np.arange(1, horizon + 1)[None, :, None]
    moved = np.cumsum(np.full(horizon, STEP))[None, :, None]  # a sum, for the rounding of play: 8 steps reach < 0.8
    gap = np.maximum(np.abs(goal[:, None] - k * drift[:, None]) - moved, 0)
    return np.linalg.norm(gap, axis=2)


# -------------------------------------------------------------------------------------------------- MuJoCo families
def _velocity(state, next_state, dt):
    """The torso's x velocity, metres per second, over the whole control step."""
    return (next_state[:, 0] - state[:, 0]) / dt


def _noise_with_normal_velocity(scale):
    return lambda rng, nq, nv: (rng.uniform(-scale, scale, nq), scale * rng.standard_normal(nv))


def _uniform_noise(scale):
    return lambda rng, nq, nv: (rng.uniform(-scale, scale, nq), rng.uniform(-scale, scale, nv))


def _observe_cheetah(state):
    """qpos[1:], qvel and the torso's position, from qpos: after a step MuJoCo's `xpos` is one physics step old."""
    x, z = state[:, :1], state[:, 1:2]
    return np.concatenate([state[:, 1:], x, np.zeros_like(x), z + 0.7], axis=1)


def _cheetah_vel_reward(task, state, action, next_state, dt):
    """r = -|v - v*| - 0.05 |a|^2."""
    return -np.abs(_velocity(state, next_state, dt) - task[:, 0]) - 0.05 * np.square(action).sum(1)


def _cheetah_direction_reward(task, state, action, next_state, dt):
    """r = d v - 0.05 |a|^2, d = -1 or 1."""
    return task[:, 0] * _velocity(state, next_state, dt) - 0.05 * np.square(action).sum(1)


def _forward_reward(bonus, cost):
    """gymnasium's r = v + bonus - cost |a|^2."""
    return lambda task, s, action, s2, dt: _velocity(s, s2, dt) + bonus - cost * np.square(action).sum(1)


def _observe_walker(state):
    """qpos[1:] and qvel clipped to [-10, 10]; the hopper's too."""
    n = state.shape[1] // 2
    return np.concatenate([state[:, 1:n], np.clip(state[:, n:], -10, 10)], axis=1)


def _walker_fell(obs):
    height, pitch = obs[:, 0], obs[:, 1]
    return ~((height > 0.8) & (height < 2.0) & (abs(pitch) < 1.0))


def _hopper_fell(obs):
    height, pitch = obs[:, 0], obs[:, 1]
    return ~((height > 0.7) & (height < np.inf) & (abs(pitch) < 0.2) & (abs(obs[:, 1:]) < 100).all(1))


def _heading(task):
    """(B, 2): the wanted direction t, as a unit vector."""
    return np.concatenate([np.cos(task), np.sin(task)], axis=1)


def _ant_reward(task, state, action, next_state, dt):
    """r = (vx, vy) . (cos t, sin t) - 0.5 |a|^2 + 1."""
    velocity = (next_state[:, :2] - state[:, :2]) / dt
    return (velocity * _heading(task)).sum(1) - 0.5 * np.square(action).sum(1) + 1


def _ant_fell(obs):
    return ~((obs[:, 0] >= 0.2) & (obs[:, 0] <= 1.0) & (abs(obs) < np.inf).all(1))


def _humanoid_quantities(model, data):
    """cinert 140, cvel 84 and qfrc_actuator 23 for the observation, the centre of mass (x, y) for the reward."""
    centre = model.body_mass @ data.xipos[:, :2] / model.body_mass.sum()
    return np.concatenate([data.cinert.ravel(), data.cvel.ravel(), data.qfrc_actuator, centre])


def _observe_humanoid(state):
    """Humanoid-v4's 376 numbers; the last 84, contact forces, are zero, as in the MuJoCo of the papers."""
    return np.concatenate([state[:, 2:-2], np.zeros((len(state), 84))], axis=1)


def _humanoid_reward(task, state, action, next_state, dt):
    """r = 0.25 (displacement of the centre of mass . direction) / timestep - 0.1 |ctrl|^2 + 5; ctrl = 0.4 a."""
    # the published reward divides by the timestep of the physics, a fifth of dt; its contact cost is zero here
    along = ((next_state[:, -2:] - state[:, -2:]) * _heading(task)).sum(1) / (dt / 5)
    return 0.25 * along - 0.1 * np.square(0.4 * action).sum(1) + 5


def _body_multipliers(nbody, nv, ngeom):
    """Multipliers of body mass, body inertia, dof damping and geom friction, in this order, each drawn on its own:
    1.5^u (damping: 1.3^u), u uniform in [-3, 3]."""
    base = np.repeat([1.5, 1.5, 1.3, 1.5], [nbody, 3 * nbody, nv, 3 * ngeom])
    means = "multipliers of masses, inertias, damping and friction"
    sample = lambda rng, n: base ** rng.uniform(-3, 3, size=(n, len(base)))
    return {"sample": sample, "drawn": _between(base**-3, base**3), "means": means}


def _multiply_body(model, multipliers):
    """Scales a compiled model's arrays. As in the published environments `mj_setConst` is not called, so quantities
    that the compiler derived from the nominal masses (inverse weights) stay nominal."""
    fields = (model.body_mass, model.body_inertia, model.dof_damping, model.geom_friction)
    parts = np.split(multipliers, np.cumsum([field.size for field in fields])[:-1])
    for field, part in zip(fields, parts, strict=True):
        field *= part.reshape(field.shape)


# ---------------------------------------------------------------------------------------------- the table of families
# What families have in common: a body, with gymnasium's noise on its initial state, and an episode.
POINT = {"obs_dim": 2, "act_dim": 2, "horizon": 20, "data_horizon": 200, "discount": 0.9, "observe": np.copy}
CHEETAH = {
    "obs_dim": 20, "act_dim": 6, "observe": _observe_cheetah, "velocity": (8,), "xml": "half_cheetah.xml",
    "frame_skip": 5, "reset_noise": _noise_with_normal_velocity(0.1),
}  # fmt: skip
ANT = {
    "obs_dim": 27, "act_dim": 8, "observe": lambda state: state[:, 2:], "terminated": _ant_fell, "velocity": (13, 14),
    "xml": "ant.xml", "frame_skip": 5, "reset_noise": _noise_with_normal_velocity(0.1),
}  # fmt: skip
WALKER = {
    "obs_dim": 17, "act_dim": 6, "observe": _observe_walker, "terminated": _walker_fell, "velocity": (8,),
    "xml": "walker2d.xml", "frame_skip": 4, "reset_noise": _uniform_noise(0.005),
}  # fmt: skip
HOPPER = {
    "obs_dim": 11, "act_dim": 3, "observe": _observe_walker, "terminated": _hopper_fell,
    "out_of_range": lambda state: ~(np.abs(state[:, 2:]) < 100).all(1),  # speeds that the observation clips away
    "velocity": (5,), "xml": "hopper.xml", "frame_skip": 4, "reset_noise": _uniform_noise(0.005),
}  # fmt: skip
HUMANOID = {
    "obs_dim": 376, "act_dim": 17, "observe": _observe_humanoid, "velocity": (22, 23), "xml": "humanoid.xml",
    "terminated": lambda obs: ~((obs[:, 0] > 1.0) & (obs[:, 0] < 2.0)), "derived": _humanoid_quantities,
    "frame_skip": 5, "reset_noise": _uniform_noise(0.01),
}  # fmt: skip
EPISODE = {"horizon": 200, "data_horizon": 200, "discount": 0.99}
DIRECTION = {"differs": "reward", "goal": _heading, "drawn": _between(0, 2 * np.pi), "means": "a direction in radians"}
DIRECTIONS = DIRECTION | {"sample": lambda rng, n: rng.uniform(0, 2 * np.pi, size=(n, 1))}
PARAMETERS = {"differs": "dynamics", "reward": _forward_reward(1, 0.001), "timestep": 0.004, "modify": _multiply_body}
# one task, with gymnasium's own reward, for MerPO's section 5.1; its one parameter means nothing
SINGLE = EPISODE | {"horizon": 1000, "data_horizon": 1000, "train": 1, "test": 1, "differs": "nothing", "only": ((0,),)}

FAMILIES: dict[str, Family] = {
    "sparse-point-robot": Family(
        papers="Sparse-Point-Robot (FOCAL, FOCAL++)", **POINT, means="a goal (x, y) on the half circle, y from 0 to 1",
        train=80, test=20, differs="reward", sample=lambda rng, n: _heading(rng.uniform(0, np.pi, size=(n, 1))),
        reward=_distance_reward(lambda task: task), goal=lambda task: task, sparse_threshold=-0.2,
        drawn=lambda task: (abs(np.linalg.norm(task, axis=1) - 1) < 1e-6) & (task[:, 1] > -1e-6),
        sparse_reward=lambda task, s, a, s2, dt: _sparse_reward(np.linalg.norm(s2 - task, axis=1)),
        optimum=lambda tasks, horizon: _sparse_reward(_reachable_distance(tasks, np.zeros_like(tasks), horizon)).sum(1),
    ),
    "point-robot-wind": Family(
        papers="Point-Robot-Wind (FOCAL, FOCAL++, MerPO)", **POINT,
        train=40, test=10, differs="dynamics", sample=lambda rng, n: rng.uniform(-WIND, WIND, size=(n, 2)),
        drawn=_between(-WIND, WIND), means="a wind (x, y), added to every move", drift=lambda task: task,
        reward=_distance_reward(_goal_at_one_zero), goal=_goal_at_one_zero,
        optimum=lambda tasks, horizon: -_reachable_distance(_goal_at_one_zero(tasks), tasks, horizon).sum(1),
    ),
    "cheetah-vel": Family(
        papers="Half-Cheetah-Vel (FOCAL, FOCAL++), Cheetah Velocity (SMAC)", **CHEETAH, **EPISODE,
        train=80, test=20, differs="reward", sample=lambda rng, n: rng.uniform(0, 3, size=(n, 1)),
        reward=_cheetah_vel_reward, drawn=_between(0, 3), means="a target speed in m/s",
    ),
    "cheetah-fwd-back": Family(
        papers="Half-Cheetah-Fwd-Back (FOCAL, FOCAL++, MerPO)", **CHEETAH, **EPISODE,
        train=2, test=2, differs="reward", only=((-1.0,), (1.0,)),
        reward=_cheetah_direction_reward, means="a direction, -1 or 1",
    ),
    "ant-fwd-back": Family(
        papers="Ant-Fwd-Back (FOCAL, FOCAL++, MerPO)", **ANT, **EPISODE, **DIRECTION,
        train=2, test=2, only=((0.0,), (np.pi,)), reward=_ant_reward,
    ),
    "ant-dir": Family(
        papers="Ant Direction (SMAC)", **ANT, **EPISODE, **DIRECTIONS, train=20, test=5, reward=_ant_reward,
    ),
    "walker-params": Family(
        papers="Walker-2D-Params (FOCAL, FOCAL++, MerPO), Walker Param (SMAC)", **WALKER, **EPISODE, **PARAMETERS,
        train=20, test=5, **_body_multipliers(nbody=8, nv=9, ngeom=8),
    ),
    "hopper-params": Family(
        papers="Hopper Param (SMAC)", **HOPPER, **EPISODE, **PARAMETERS,
        train=50, test=5, **_body_multipliers(nbody=5, nv=6, ngeom=5),
    ),
    "humanoid-dir": Family(
        papers="Humanoid (SMAC)", **HUMANOID, **EPISODE, **DIRECTIONS, train=50, test=5, reward=_humanoid_reward,
    ),
    "sawyer": None,  # long, and therefore at the end of this file
    "halfcheetah": Family(
        papers="HalfCheetah (MerPO)", **CHEETAH | {"obs_dim": 17, "observe": lambda state: state[:, 1:]}, **SINGLE,
        reward=_forward_reward(0, 0.1),
    ),
    "hopper": Family(papers="Hopper (MerPO)", **HOPPER, **SINGLE, reward=_forward_reward(1, 0.001)),
    "walker2d": Family(papers="Walker2d (MerPO)", **WALKER, **SINGLE, reward=_forward_reward(1, 0.001)),
}  # fmt: skip


def cores() -> int:
    """The number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _whole(value: Any, least: int, what: str) -> int:
    """value as a Python integer; ValueError if it is not a whole number from `least` below 2**63."""
    if not isinstance(value, int | np.integer) or not least <= value < 2**63:
        raise ValueError(f"{what} must be a whole number from {least} below 2**63, got {value!r}")
    return int(value)


def family(name: str) -> Family:
    """The row of `FAMILIES` called `name`; ValueError, with the names there are, if there is none."""
    if name not in FAMILIES:
        raise ValueError(f"unknown environment {name!r}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def sample_tasks(name: str, n: int, seed: int) -> Array:
    """(n, P) float64 parameters of n tasks; the first n of a longer list with the same seed are the same tasks.

    Tasks of one list are all different. Families with a fixed list of tasks return its first n whatever the seed;
    ValueError if it is shorter, or where there are not so many different tasks.
    """
    row, n = family(name), _whole(n, 0, "the number of tasks")
    if row.only:
        if n > len(row.only):
            raise ValueError(f"{name} has {len(row.only)} tasks, asked for {n}")
        return np.array(row.only, np.float64)[:n]
    rows: dict[bytes, Array] = {}
    for i in range(n):
        rng = np.random.default_rng([_whole(seed, 0, "seed"), i, TASKS])
        draws = (row.sample(rng, 1) for _ in range(1000))  # only discrete tasks ever need the second
        task = next((task for task in draws if task.tobytes() not in rows), None)
        if task is None:
            raise ValueError(f"{name}: found {i} different tasks, asked for {n}")
        rows[task.tobytes()] = task
    return np.concatenate(list(rows.values())) if rows else row.sample(np.random.default_rng(), 0)


def is_task(name: str, tasks: Array, drawn: bool = False) -> Array:
    """(n,) bool: whether each row, (P,), has numbers that a task of this family has; `drawn`: one from `sample`."""
    row = family(name)
    listed = drawn and row.only and row.differs != "nothing"
    checks = [check(tasks) for check in (row.valid, drawn and row.drawn) if check]
    checks += [np.isclose(tasks[:, None], np.array(row.only)).all(2).any(1)] if listed else []
    return np.isfinite(tasks).all(1) & np.all(checks, axis=0)


# ----------------------------------------------------------------------------------------------------------- physics
# A physics steps the full state (B, 1 + nq + nv ...): time in seconds, then `state` as rewards see it.


class PointPhysics:
    """Point robots as array arithmetic."""

    dt = 1.0

    def __init__(self, row: Family, tasks: Array, threads: int):
        self.row, self.tasks, self.drift = row, tasks, row.drift(tasks) if row.drift else 0.0

    def initial(self, rows: Array, seeds: Array) -> Array:
        """The full states in which episodes of these rows begin, see `MujocoPhysics.initial`."""
        return np.zeros((len(rows), 1 + self.row.act_dim))

    def step(self, full: Array, action: Array) -> tuple[Array, Array]:
        """The next full state and which rows of it are sound."""
        after = full + np.concatenate([np.ones((len(full), 1)), STEP * action + self.drift], axis=1)
        return after, np.isfinite(after).all(1)

    def render(self, i: int, full: Array, trail: list[Array], size: int) -> Array:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Circle

        figure = Figure(figsize=(size / 100, size / 100), dpi=100)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[])
        if self.row.goal:
            axes.add_patch(Circle(self.row.goal(self.tasks)[i, :2], GOAL_RADIUS, color=("tab:green", 0.6), linewidth=0))
        path = np.array([*trail, full])[:, 1:3]
        axes.plot(*path.T, color="tab:blue", linewidth=1.5)
        axes.add_patch(Circle(path[-1], 0.05, color=("tab:blue", 0.6), linewidth=0))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _compile(xml):
    """A model from its text, or from a file, gymnasium's if it has one of this name."""
    if xml.lstrip().startswith("<"):
        return mujoco.MjModel.from_xml_string(xml)
    path = os.path.join(os.path.dirname(gymnasium.__file__), "envs", "mujoco", "assets", xml)
    return mujoco.MjModel.from_xml_path(path if os.path.exists(path) else xml)


class MujocoPhysics:
    """MuJoCo bodies, one compiled model per distinct task, stepped by a pool of `threads` threads. The solver starts
    every step cold (gymnasium: from the last one's forces), so that a state alone determines what follows."""

    def __init__(self, row: Family, tasks: Array, threads: int):
        self.row, self.base = row, _compile(row.xml)
        base, count = self.base, len(tasks)
        if row.timestep is not None:
            base.opt.timestep = row.timestep
        self.dt = base.opt.timestep * row.frame_skip
        self.models = [base] * count
        if row.modify:  # equal tasks share a model
            keys = [task.tobytes() for task in tasks]
            models = {key: copy.copy(base) for key in set(keys)}
            for key, model in models.items():
                row.modify(model, np.frombuffer(key))
            self.models = [models[key] for key in keys]
        low, self.control_scale = base.actuator_ctrlrange.copy().T
        if base.nu != row.act_dim or (self.control_scale <= 0).any() or (low != -self.control_scale).any():
            raise ValueError(f"expected a model with {row.act_dim} actuators, each with a ctrlrange of -x to x")
        self.threads = max(1, min(threads, count))
        self.data = [mujoco.MjData(base) for _ in range(self.threads)]
        self.pool = mujoco.rollout.Rollout(nthread=self.threads if self.threads > 1 else 0)
        self.workers = ThreadPoolExecutor(self.threads) if row.derived else None
        self.size = mujoco.mj_stateSize(base, mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
        if self.size != 1 + base.nq + base.nv:
            raise ValueError("expected a model without activations and plugins, whose state is qpos and qvel alone")
        self.control = np.empty((count, row.frame_skip, base.nu))
        self.out = np.empty((count, row.frame_skip, self.size))  # written in place, if C-contiguous float64
        self.sensors = np.empty((count, row.frame_skip, base.nsensordata))
        self.renderer = None  # made at the first picture

    def initial(self, rows: Array, seeds: Array) -> Array:
        """The full states (k, size) in which episodes of these rows begin, each drawn from its own of seeds (k, 4)."""
        full = np.zeros((len(rows), self.size))
        for state, i, seed in zip(full, rows, seeds, strict=True):
            qpos, qvel = self.row.reset_noise(np.random.default_rng(seed), self.base.nq, self.base.nv)
            state[1:] = np.concatenate([self.models[i].qpos0 + qpos, qvel])
        return full if self.workers is None else self._derive(rows, full, np.zeros((len(rows), self.base.nu)))

    def step(self, full: Array, action: Array) -> tuple[Array, Array]:
        """The next full state and which rows of it are sound."""
        self.control[:] = (action * self.control_scale)[:, None]
        self.pool.rollout(
            self.models, self.data, np.ascontiguousarray(full[:, : self.size]), self.control,
            nstep=self.row.frame_skip, state=self.out, sensordata=self.sensors, skip_checks=True,
        )  # fmt: skip
        after = self.out[:, -1].copy()
        if self.workers is not None:
            after = self._derive(np.arange(len(after)), after, self.control[:, -1])
        # when the physics blows up, MuJoCo starts again from the initial pose and time 0: the time alone tells
        on_time = np.abs(after[:, 0] - full[:, 0] - self.dt) < 0.5 * self.base.opt.timestep
        return after, on_time & np.isfinite(after).all(1)

    def _derive(self, rows: Array, full: Array, control: Array) -> Array:
        """Appends `derived` to the full states of these rows: one mj_forward for each, by several threads."""

        def forward(share: Array, data: Any) -> list[Array]:
            found = []
            for i in share:
                model = self.models[rows[i]]
                mujoco.mj_setState(model, data, full[i], mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
                data.ctrl[:], data.qacc_warmstart[:] = control[i], 0
                mujoco.mj_forward(model, data)
                found.append(self.row.derived(model, data))
            return found

        shares = np.array_split(np.arange(len(full)), self.threads)
        found = [row for share in self.workers.map(forward, shares, self.data) for row in share]
        return np.concatenate([full, found], axis=1)

    def render(self, i: int, full: Array, trail: list[Array], size: int) -> Array:
        if self.renderer is None:
            self.base.vis.global_.offwidth = self.base.vis.global_.offheight = max(size, 480)
            try:
                self.renderer = mujoco.Renderer(self.base, size, size)
            except Exception as error:  # another kind for each back end
                raise OSError(f"no OpenGL for pictures of bodies ({error}); expected EGL or a display") from None
        model = copy.copy(self.models[i])
        data = mujoco.MjData(model)
        mujoco.mj_setConst(model, data)  # sums up the masses, by which a camera finds what it follows
        mujoco.mj_setState(model, data, full[: self.size], mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
        mujoco.mj_forward(model, data)
        self.renderer.update_scene(data, camera=0 if model.ncam else -1)
        return self.renderer.render()

    def close(self):
        if self.renderer:
            self.renderer.close()
        if self.workers is not None:
            self.workers.shutdown()
        self.pool.close()


# ------------------------------------------------------------------------------------------------------ environments
class TaskVectorEnv(gymnasium.vector.VectorEnv):
    """One sub-environment for each row of `tasks` (B, P), all stepped together by `threads` threads (default: a thread
    for each core). Episodes have `horizon` steps (default: the family's), pictures `render_size` pixels a side.

    With `autoreset` a sub-environment that ends is reset within the same step, alone (gymnasium's SAME_STEP): its row
    of the returned observation starts the next episode, and `info["final_obs"]`, (B, d), holds the observations before
    that: where `info["_final_obs"]`, what the episode ended with. `info["sparse_reward"]` (B,) is there if the family
    has one. Sub-environment i draws its initial states from (seed, i, number of the episode) alone, so what
    the others do never changes it. A step in which the physics blows up has reward 0, ends where it began and is
    marked in `info["blew_up"]` (B,). With `rewards` off it does not even hold the family's reward functions: all other
    rewards are NaN, and there is no sparse one. ValueError for what is not a task, a seed, a horizon.
    """

    def __init__(
        self,
        name: str,
        tasks: Array,
        seed: int = 0,
        horizon: int | None = None,
        threads: int | None = None,
        autoreset: bool = True,
        render_mode: str | None = None,
        render_size: int = 240,
        rewards: bool = True,
    ):
        self.name, self.family, self.tasks = name, family(name), np.array(tasks, np.float64, order="C", ndmin=1)
        size = sample_tasks(name, 1, 0).shape[1]
        if self.tasks.shape != (max(1, len(self.tasks)), size):
            raise ValueError(f"{name}: tasks have shape {self.tasks.shape}, expected one or more of {size} parameters")
        if not is_task(name, self.tasks).all():
            raise ValueError(f"{name}: task {is_task(name, self.tasks).argmin()} has numbers that no task can have")
        if not rewards:
            none = dict.fromkeys(("sparse_reward", "optimum", "script"))
            self.family = replace(self.family, reward=lambda task, *_: np.full(len(task), np.nan), **none)
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        self.num_envs, self.autoreset = len(self.tasks), autoreset
        self.horizon = self.family.horizon if horizon is None else _whole(horizon, 1, "horizon")
        self.render_mode, self.render_size = render_mode, render_size
        self._seed = np.column_stack([np.full(self.num_envs, _whole(seed, 0, "seed")), np.arange(self.num_envs)])
        self._episode, self._elapsed = np.full(self.num_envs, -1), np.zeros(self.num_envs, int)
        kind = MujocoPhysics if self.family.xml else PointPhysics
        self.physics = kind(self.family, self.tasks, threads or cores())
        self._full = self.physics.initial(np.arange(self.num_envs), np.zeros((self.num_envs, 4), int))
        self.trail, self.reached = [], self._full  # of point robots: full states before the last steps, and after them
        if self.observe().shape != (self.num_envs, self.family.obs_dim):
            raise ValueError(f"{name}: obs_dim is {self.family.obs_dim}, but observe gives {self.observe().shape}")
        mode = gymnasium.vector.AutoresetMode["SAME_STEP" if autoreset else "DISABLED"]
        fps = max(1, round(1 / self.physics.dt)) if self.family.xml else 10
        self.metadata = {"autoreset_mode": mode, "render_modes": ["rgb_array"], "render_fps": fps}
        box, several = gymnasium.spaces.Box, gymnasium.vector.utils.batch_space
        self.single_observation_space = box(-np.inf, np.inf, (self.family.obs_dim,), np.float64)
        self.single_action_space = box(-1.0, 1.0, (self.family.act_dim,), np.float32)
        self.observation_space = several(self.single_observation_space, self.num_envs)
        self.action_space = several(self.single_action_space, self.num_envs)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """New episodes, everywhere or where options["reset_mask"] says so; a seed (ValueError) restarts their count."""
        rows = np.flatnonzero((options or {}).get("reset_mask", np.ones(self.num_envs)))
        if seed is not None:
            self._seed[rows, 0] = _whole(seed, 0, "seed")
            self._episode[rows] = -1
        self._reset_rows(rows)
        return self.observe(), {}

    def observe(self) -> Array:
        """(B, d) current observations."""
        return np.array(self.family.observe(self._full[:, 1:]))  # a family may give a view of the state

    def _reset_rows(self, rows: Array):
        self._episode[rows] += 1
        self._elapsed[rows] = 0
        seeds = np.column_stack([self._seed[rows], self._episode[rows], np.full(len(rows), EPISODES)])
        self._full[rows] = self.physics.initial(rows, seeds)

    def step(self, actions: Array):
        """Steps every sub-environment with `actions` (B, m). Returns observations (B, d) float64, rewards (B,) float64,
        terminated and truncated (B,) bool, and info.

        ValueError if they have another shape, FloatingPointError if they are not finite: a policy that diverged.
        """
        action = np.asarray(actions, np.float64)
        if action.shape != (self.num_envs, self.family.act_dim):
            raise ValueError(f"actions have shape {action.shape}, expected {(self.num_envs, self.family.act_dim)}")
        if not np.isfinite(action).all():
            raise FloatingPointError("actions are not finite")
        action = np.clip(action, -1, 1)
        before = self._full
        after, sound = self.physics.step(before, action)
        after[~sound] = before[~sound]
        state, next_state = before[:, 1:], after[:, 1:]
        arguments = self.tasks, state, action, next_state, self.physics.dt
        obs, reward = np.array(self.family.observe(next_state)), np.where(sound, self.family.reward(*arguments), 0.0)
        terminated = (self.family.terminated(obs) | self.family.out_of_range(next_state)) & sound
        self._elapsed += 1
        truncated = (self._elapsed >= self.horizon) & ~terminated | ~sound
        info: dict[str, Any] = {"blew_up": ~sound}
        if self.family.sparse_reward:
            info["sparse_reward"] = np.where(sound, self.family.sparse_reward(*arguments), 0.0)
        if not self.family.xml:
            self.trail, self.reached = [*self.trail[-self.horizon :], before], after.copy()
        self._full = after
        ended = terminated | truncated
        if self.autoreset and ended.any():
            info["final_obs"], info["_final_obs"] = obs, ended
            self._reset_rows(np.flatnonzero(ended))
            obs = self.observe()
        return obs, reward, terminated, truncated, info

    def returns(self, policy: Callable, seed: int) -> Array:
        """Undiscounted return (B,) of one episode in every sub-environment under policy: observations (B, d) -> actions
        (B, m), as the papers report it: the sparse one where the family has one. Errors are those of reset and step."""
        obs, _ = self.reset(seed=seed)
        total, alive = np.zeros(self.num_envs), np.ones(self.num_envs, bool)
        for _ in range(self.horizon):
            obs, reward, terminated, truncated, info = self.step(policy(obs))
            total += alive * info.get("sparse_reward", reward)
            alive &= ~(terminated | truncated) | info["blew_up"]  # after a blow-up the steps that are left count
        return total

    def render(self) -> tuple[Array, ...]:
        """One (size, size, 3) uint8 picture for each sub-environment."""
        age = np.minimum(self._elapsed, len(self.trail))
        trails = [[full[i] for full in self.trail[len(self.trail) - age[i] :]] for i in range(self.num_envs)]
        return tuple(self.physics.render(i, self._full[i], trails[i], self.render_size) for i in range(self.num_envs))

    def close_extras(self, **kwargs: Any):
        if self.family.xml:  # point robots hold nothing
            self.physics.close()

    def state_dict(self) -> dict[str, Array]:
        """Everything needed to go on from here exactly."""
        return {k: getattr(self, k).copy() for k in ("_seed", "_episode", "_elapsed", "_full")}

    def load_state_dict(self, state: dict[str, Array]):
        for key in self.state_dict():
            getattr(self, key)[:] = state[key]


make = TaskVectorEnv


class TaskEnv(gymnasium.Env):
    """One task of a family behind gymnasium's single-environment interface.

    `task` is a row of parameters or an index into `sample_tasks(name, ..., seed)`. As in gymnasium's own environments
    initial states are drawn from fresh entropy until `reset` is given a seed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, name: str, task: int | Array = 0, seed: int = 0, render_mode: str | None = None, **kwargs: Any):
        if np.ndim(task) == 0:
            task = sample_tasks(name, _whole(task, 0, "task, unless a row of parameters,") + 1, seed)[-1]
        entropy = int(np.random.default_rng().integers(2**63))
        self._vector = make(name, [task], entropy, threads=1, autoreset=False, render_mode=render_mode, **kwargs)
        self.render_mode = render_mode
        self.metadata = {key: self._vector.metadata[key] for key in ("render_modes", "render_fps")}
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        obs, info = self._vector.reset(seed=seed)  # refuses what is no seed
        super().reset(seed=None if seed is None else int(seed))
        return obs[0], info

    def step(self, action: Array):
        obs, reward, terminated, truncated, info = self._vector.step(np.asarray(action)[None])
        info = {key: value[0] for key, value in info.items()}
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self):
        return self._vector.render()[0]

    def close(self):
        self._vector.close()


for _name in FAMILIES:
    gymnasium.register(id=f"{_name}-v0", entry_point=TaskEnv, kwargs={"name": _name})


# ----------------------------------------------------------------------------------------------- Sawyer manipulation
# SMAC's section 6 and appendix C.2 (there in PyBullet), in metres. Every scene has the same bodies and joints; a part
# that is absent stands far away, where nothing touches it and its joints stay 0. The joints of the hand, the tray and
# the object are places on the table, so that `qpos` begins with the observation, the 13 numbers of the paper's state:
#     hand x, y, z | 2 fingers | top drawer | bottom drawer | button | drawers x | tray x | object x, y, z
# (the object's turn follows, unobserved). The paper leaves two of them open: here these are the x of the drawers, which
# alone tells on which side they are before one is opened, and the x of the tray.
# A task is 12 numbers: five flags for what is there (in the order of the names below), the side of the drawers (-1 or
# 1; the button stands on the other), the place of the tray and of the object (0 to 3; all three 0 where absent), the
# behaviour, and for MOVE_HAND where to (x, y, z).
TOP, BOTTOM, BUTTON, TRAY, OBJECT, SIDE, TRAY_PLACE, OBJECT_PLACE, BEHAVIOUR = range(9)
TARGET = slice(9, 12)
MOVE_HAND, OPEN_TOP, OPEN_BOTTOM, CARRY = range(4)  # CARRY, the object into the tray, is never rewarded
HOME, ABOVE = (0.0, -0.08, 0.2), 0.24  # where the hand starts, and the height at which it travels
DRAWERS, BUTTON_AT = np.array([0.2, 0.29, 0.0]), np.array([-0.2, 0.2, 0.0])  # x is multiplied by the side
TRAY_PLACES = np.array([[x, -0.19, 0.0] for x in (-0.27, -0.09, 0.09, 0.27)])
OBJECT_PLACES = np.array([[x, -0.04, 0.018] for x in (-0.24, -0.08, 0.08, 0.24)])
HAND_PLACES = np.array([[x, y, 0.32] for x in (-0.25, 0.25) for y in (-0.2, 0.15)])
TRAVEL, OPEN, NEAR = 0.12, 0.08, 0.05  # how far a drawer slides, from where on it is open; what is near a place
SPEED, STRIDE = 0.5, 0.02  # the hand's most along an axis: in m/s, and in metres a step
HANDLE, TOP_HEIGHT, BOTTOM_HEIGHT = -0.136, 0.135, 0.045  # y of the handle from the drawers' middle; z of both drawers
AWAY = np.array([[10.0 * i, 50.0, 1.0] for i in range(6)])


def _drawer(name, height, handle=""):
    """A drawer's front, floor and walls, on rails in the shell that it never touches."""
    return f"""
      <body name="{name}" pos="0 0 {height}">
        <joint name="{name}"/>
        <geom size="0.098 0.006 0.036" pos="0 -0.08 0" material="{name}"/>
        <geom size="0.092 0.07 0.004" pos="0 -0.004 -0.03" material="shell"/>
        <geom size="0.004 0.07 0.022" pos="-0.09 -0.004 -0.008" material="shell"/>
        <geom size="0.004 0.07 0.022" pos="0.09 -0.004 -0.008" material="shell"/>
        <geom size="0.092 0.004 0.022" pos="0 0.068 -0.008" material="shell"/>{handle}
      </body>"""


BAR = f"""
        <geom type="capsule" size="0.007" fromto="-0.045 {HANDLE} 0 0.045 {HANDLE} 0" material="steel"/>
        <geom type="capsule" size="0.005" fromto="-0.045 -0.08 0 -0.045 {HANDLE} 0" material="steel"/>
        <geom type="capsule" size="0.005" fromto="0.045 -0.08 0 0.045 {HANDLE} 0" material="steel"/>"""
SAWYER_XML = f"""
<mujoco model="sawyer">
  <option timestep="0.004" integrator="implicitfast" cone="elliptic" impratio="5"/>
  <visual>
    <headlight ambient="0.35 0.35 0.35" diffuse="0.35 0.35 0.35" specular="0 0 0"/>
    <global fovy="33"/>
  </visual>
  <statistic center="0 0 0.1" extent="1"/>
  <asset>
    <texture type="skybox" builtin="gradient" rgb1="0.93 0.95 0.97" rgb2="0.72 0.78 0.84" width="64" height="384"/>
    <material name="wood" rgba="0.79 0.68 0.53 1" specular="0.1"/>
    <material name="shell" rgba="0.45 0.32 0.22 1" specular="0.1"/>
    <material name="top" rgba="0.93 0.57 0.16 1" specular="0.2"/>
    <material name="bottom" rgba="0.20 0.45 0.80 1" specular="0.2"/>
    <material name="steel" rgba="0.85 0.87 0.9 1" specular="0.8" shininess="0.8"/>
    <material name="arm" rgba="0.62 0.10 0.14 1" specular="0.4"/>
    <material name="dark" rgba="0.15 0.15 0.17 1" specular="0.4"/>
    <material name="tray" rgba="0.55 0.75 0.55 1" specular="0.2"/>
  </asset>
  <default>
    <geom type="box" friction="0.8 0.01 0.001" condim="4" solref="0.01 1" solimp="0.95 0.99 0.001"/>
    <default class="fixture"><geom contype="0"/></default>
    <default class="drawer"><geom contype="0" mass="0.1"/><joint type="slide" axis="0 -1 0" range="0 {TRAVEL}"
      damping="6" frictionloss="2"/></default>
    <default class="hand"><geom friction="1.5 0.02 0.001" mass="0.1"/>
      <joint type="slide" solreflimit="0.01 1"/></default>
    <default class="finger"><joint type="slide" range="0 0.026" ref="0.026" damping="10" armature="0.3"
      solreflimit="0.01 1"/></default>
    <default class="seen"><geom contype="0" conaffinity="0" mass="0"/></default>
  </default>
  <worldbody>
    <light directional="true" pos="-0.5 -0.8 2" dir="0.25 0.4 -1" diffuse="0.55 0.55 0.52" specular="0.2 0.2 0.2"/>
    <camera name="front" pos="0.26 -0.98 0.95" xyaxes="0.968 0.251 0 -0.157 0.605 0.781"/>
    <geom name="table" type="plane" size="0.4 0.345 0.1" pos="0 0.06 0" material="wood" conaffinity="1" contype="0"/>
    <body name="goal"><geom class="seen" type="sphere" size="{NEAR}" rgba="0.1 0.9 0.25 0.4"/></body>
    <body name="hand" pos="{HOME[0]} {HOME[1]} {HOME[2]}" gravcomp="1" childclass="hand">
      <joint name="x" axis="1 0 0" ref="{HOME[0]}" range="-0.33 0.33"/>
      <joint name="y" axis="0 1 0" ref="{HOME[1]}" range="-0.27 0.28"/>
      <joint name="z" axis="0 0 1" ref="{HOME[2]}" range="0.02 0.36"/>
      <geom size="0.026 0.042 0.012" pos="0 0 0.054" material="dark"/>
      <geom type="cylinder" size="0.022 0.05" pos="0 0 0.112" material="arm"/>
      <geom class="seen" type="cylinder" size="0.034 0.03" pos="0 0 0.19" material="dark"/>
      <geom class="seen" type="capsule" size="0.026" fromto="0 0 0.21 0 0.2 0.5" material="arm"/>
      <body name="left" pos="0 0.026 0" gravcomp="1">
        <joint name="left" class="finger" axis="0 1 0"/>
        <geom size="0.01 0.005 0.027" pos="0 0.005 0.015" material="steel" mass="0.05"/>
      </body>
      <body name="right" pos="0 -0.026 0" gravcomp="1">
        <joint name="right" class="finger" axis="0 -1 0"/>
        <geom size="0.01 0.005 0.027" pos="0 -0.005 0.015" material="steel" mass="0.05"/>
      </body>
    </body>
    <body name="drawers" childclass="drawer">
      <geom size="0.005 0.08 0.085" pos="-0.105 0 0.085" material="shell"/>
      <geom size="0.005 0.08 0.085" pos="0.105 0 0.085" material="shell"/>
      <geom size="0.11 0.08 0.005" pos="0 0 0.175" material="shell"/>
      <geom size="0.1 0.08 0.004" pos="0 0 0.088" material="shell"/>
      <geom size="0.1 0.005 0.085" pos="0 0.075 0.085" material="shell"/>
      {_drawer("top", TOP_HEIGHT, BAR)}
      {_drawer("bottom", BOTTOM_HEIGHT)}
    </body>
    <body name="button" childclass="fixture">
      <geom size="0.045 0.045 0.03" pos="0 0 0.03" material="dark"/>
      <body name="cap" pos="0 0 0.075" gravcomp="1">
        <joint name="button" type="slide" axis="0 0 -1" range="0 {TRAVEL / 5}" stiffness="60" damping="6"/>
        <geom type="cylinder" size="0.032 0.015" material="bottom" mass="0.05"/>
      </body>
    </body>
    <body name="sign" pos="0 50 1" gravcomp="1">
      <joint name="sign" type="slide" axis="1 0 0"/>
      <geom class="seen" size="0.01 0.01 0.01" mass="1"/>
    </body>
    <body name="tray">
      <joint name="tray" type="slide" axis="1 0 0" range="-0.34 0.34" damping="3" frictionloss="1"/>
      <geom size="0.056 0.05 0.003" pos="0 0 0.005" material="tray"/>
      <geom size="0.056 0.003 0.01" pos="0 -0.05 0.015" material="tray"/>
      <geom size="0.056 0.003 0.01" pos="0 0.05 0.015" material="tray"/>
      <geom size="0.003 0.05 0.01" pos="-0.056 0 0.015" material="tray"/>
      <geom size="0.003 0.05 0.01" pos="0.056 0 0.015" material="tray"/>
    </body>
    <body name="object">
      <joint name="object_x" type="slide" axis="1 0 0"/>
      <joint name="object_y" type="slide" axis="0 1 0"/>
      <joint name="object_z" type="slide" axis="0 0 1"/>
      <joint name="object_turn" type="ball" damping="1e-5"/>
      <geom size="0.018 0.018 0.018" rgba="0.80 0.15 0.45 1" mass="0.05" friction="1.5 0.02 0.001"/>
    </body>
  </worldbody>
  <tendon>
    <fixed name="grip"><joint joint="left" coef="-1"/><joint joint="right" coef="-1"/></fixed>
    <fixed name="rack" limited="true" range="-1 0">
      <joint joint="button" coef="5"/><joint joint="bottom" coef="-1"/>
    </fixed>
  </tendon>
  <equality><joint joint1="left" joint2="right"/></equality>
  <actuator>
    <velocity joint="x" kv="200" ctrlrange="-{SPEED} {SPEED}" forcerange="-30 30"/>
    <velocity joint="y" kv="200" ctrlrange="-{SPEED} {SPEED}" forcerange="-30 30"/>
    <velocity joint="z" kv="200" ctrlrange="-{SPEED} {SPEED}" forcerange="-30 30"/>
    <motor tendon="grip" gear="4" ctrlrange="-1 1"/>
  </actuator>
</mujoco>"""


def _ask_for(rng, task, more=()):
    """Writes a behaviour into a task, drawn from those that can be wanted in its scene and `more`."""
    wanted = [MOVE_HAND] + [OPEN_TOP] * int(task[TOP]) + [OPEN_BOTTOM] * int(task[BOTTOM] * task[BUTTON])
    task[BEHAVIOUR] = rng.choice([*wanted, *more])
    task[TARGET] = rng.choice(HAND_PLACES) if task[BEHAVIOUR] == MOVE_HAND else 0
    return task


def _scenes(rng, n):
    """What is there, then where, then what is wanted (appendix C.2)."""
    tasks = np.zeros((n, 12))
    for task in tasks:
        task[TOP : OBJECT + 1] = rng.integers(2, size=5)
        task[SIDE] = rng.choice((-1, 1)) * task[TOP : BUTTON + 1].any()
        task[TRAY_PLACE], task[OBJECT_PLACE] = rng.integers(4, size=2) * task[[TRAY, OBJECT]]
        _ask_for(rng, task)
    return tasks


def _furnish(model, task):
    """Puts every part of the scene in its place, or away."""
    mirror = np.array([task[SIDE], 1, 1])
    model.body("drawers").pos = mirror * DRAWERS if task[TOP] or task[BOTTOM] else AWAY[0]
    model.body("top").pos += AWAY[1] * (1 - task[TOP])
    model.body("bottom").pos += AWAY[2] * (1 - task[BOTTOM])
    model.tendon_limited[model.tendon("rack").id] = task[BOTTOM] * task[BUTTON]
    model.body("button").pos = mirror * BUTTON_AT if task[BUTTON] else AWAY[3]
    tray, thing = TRAY_PLACES[int(task[TRAY_PLACE])], OBJECT_PLACES[int(task[OBJECT_PLACE])]
    model.body("tray").pos = tray if task[TRAY] else AWAY[4]
    model.qpos0[8:10] = task[SIDE] * DRAWERS[0], tray[0] * task[TRAY]  # "sign", unseen, holds the drawers' x
    model.body("object").pos = thing if task[OBJECT] else AWAY[5]
    model.qpos0[10:13] = thing * task[OBJECT]
    model.body_gravcomp[model.body("object").id] = 1 - task[OBJECT]
    handle, cap = mirror * (DRAWERS + [0, HANDLE, TOP_HEIGHT]), mirror * (BUTTON_AT + [0, 0, 0.1])
    model.body("goal").pos = (task[TARGET], handle, cap, thing)[int(task[BEHAVIOUR])]  # for pictures only


def _above_tray(obs, height):
    """(B, 3); the tray slides along x only."""
    return obs[:, 9:10] * [1, 0, 0] + [0, TRAY_PLACES[0, 1], height]


def _achieved(task, obs):
    """(B,) whether each task's behaviour is achieved."""
    hand, top, bottom, thing = obs[:, :3], obs[:, 5], obs[:, 6], obs[:, 10:13]
    there = np.linalg.norm(hand - task[:, TARGET], axis=1) < NEAR
    in_tray = (np.abs(thing - _above_tray(obs, 0.03)) < [0.045, 0.045, 0.03]).all(1)
    carried = np.where(task[:, TRAY] > 0, in_tray, thing[:, 2] > 0.12)  # without a tray: lifted
    return np.choose(task[:, BEHAVIOUR].astype(int), [there, top > OPEN, bottom > OPEN, carried])


def _act_by_script(task, obs):
    """(B, 4) actions that perform each task's behaviour; what to do next follows from the observation alone."""
    # the hand rises, travels, sinks onto its place (handle, button, object or tray) with open fingers, and works there
    hand, fingers, thing = obs[:, :3], obs[:, 3], obs[:, 10:13]
    move, top, bottom, carry = (task[:, BEHAVIOUR] == i for i in range(4))
    mirror = np.stack([task[:, SIDE], *np.ones((2, len(task)))], axis=1)
    # where each behaviour has its work
    handle = mirror * (DRAWERS + [0, HANDLE, TOP_HEIGHT]) - obs[:, 5:6] * [0, 1, 0]
    cap = mirror * (BUTTON_AT + [0, 0, 0.04])  # deeper than it can be pressed
    gap = np.abs(thing - hand)
    held = carry & (gap.max(1) < 0.02) & (fingers < 0.0195)
    over = np.where(task[:, [TRAY]] > 0, _above_tray(obs, 0.06), hand + [0, 0, 0.1])
    place = np.select([x[:, None] for x in (move, top, bottom, held)], [task[:, TARGET], handle, cap, over], thing)
    # what it does there
    off = np.abs(place - hand)
    pull = top & (off < [0.02, 0.024, 0.015]).all(1)
    grasp = carry & ~held & (gap.max(1) < 0.012)
    drop = held & (task[:, TRAY] > 0) & (off < 0.012).all(1)
    done = _achieved(task, obs) & ~move
    grip = (pull | bottom | grasp | held) & ~drop & ~done
    # how it gets there: up, across, down
    travel = (off[:, :2] > 0.01).any(1) & ~pull
    low = hand[:, 2] < ABOVE - 0.02
    goal = np.where((travel & low)[:, None], hand, place)
    goal[:, 2] = np.where(travel, np.maximum(ABOVE, place[:, 2]), place[:, 2])
    goal[:, 1] -= pull
    goal = np.where((grasp | done)[:, None], hand, goal)
    return np.clip(np.column_stack([(goal - hand) / STRIDE, np.where(grip, 1, -1)]), -1, 1)


def _is_scene(task):
    number, least, most = task[:, : TARGET.start], (0, 0, 0, 0, 0, -1, 0, 0, 0), (1, 1, 1, 1, 1, 1, 3, 3, CARRY)
    return ((number == number.round()) & (number >= least) & (number <= most)).all(1)


FAMILIES["sawyer"] = Family(
    papers="Sawyer Manipulation (SMAC)", obs_dim=13, act_dim=4, horizon=50, data_horizon=75, train=50, test=10,
    differs="layout and reward", discount=0.99, sample=_scenes, valid=_is_scene,
    observe=lambda state: state[:, :13], means="a scene and what is wanted there",
    reward=lambda task, state, action, next_state, dt: np.where(_achieved(task, next_state), 0.0, -1.0),
    xml=SAWYER_XML, frame_skip=10, modify=_furnish,
    reset_noise=lambda rng, nq, nv: (np.pad(rng.uniform(-0.02, 0.02, 3), (0, nq - 3)), np.zeros(nv)),  # of the hand
    script=Script(
        _act_by_script, _achieved, lambda rng, task: _ask_for(rng, task.copy(), [CARRY] * int(task[OBJECT])),
        BEHAVIOUR, ("move hand", "open top drawer", "open bottom drawer"),
    ),
)  # fmt: skip
BUILT_IN = dict(FAMILIES)  # those that a process which never runs the user's script knows too


# ------------------------------------------------------------------------------------------------------ command line
def film(vector: TaskVectorEnv, policy: Callable, path: Any):
    """Writes a GIF of all sub-environments side by side; policy: (B, d) observations -> (B, m) actions. Where an
    episode ends early, by a fall, the picture stands still."""
    from PIL import Image  # comes with matplotlib

    obs, pictures, shown, alive = vector.reset()[0], [], [None] * vector.num_envs, np.ones(vector.num_envs, bool)
    every = max(1, vector.horizon // 50)
    for t in range(vector.horizon):
        if t % every == 0:
            shown = [now if on else then for now, then, on in zip(vector.render(), shown, alive, strict=True)]
            pictures.append(Image.fromarray(np.concatenate(shown, axis=1)))
        obs, _, ended, *_ = vector.step(policy(obs))
        alive &= ~ended
    pause = 1000 * every / vector.metadata["render_fps"]
    pictures[0].save(path, format="GIF", save_all=True, append_images=pictures[1:], duration=pause, loop=0)


def describe(name: str) -> str:
    """One line on a family."""
    row = family(name)
    tasks = f"the same {row.train}" if row.only else f"{row.train} + {row.test}"
    sizes = f"obs {row.obs_dim:>3}  act {row.act_dim:>2}  horizon {row.horizon:>4}"
    return f"{name:<20} {sizes}  training + test tasks: {tasks}, {row.differs} differs; {row.papers}"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Lists task families, or films tasks of one: its script, or random.")
    parser.add_argument("--env", choices=list(FAMILIES), help="task family")
    parser.add_argument("--render", metavar="FILE", help="write a GIF (benchmark/picture.py films trained behaviour)")
    parser.add_argument("--tasks", type=int, default=4, help="tasks side by side")
    parser.error = lambda message: parser.exit(2, f"envs.py: {message}\n")
    args = parser.parse_args(argv)
    if not args.render:
        print("\n".join(describe(name) for name in FAMILIES if args.env in (None, name)))
        return
    try:
        row, rng = family(args.env), np.random.default_rng(0)
        tasks = sample_tasks(args.env, min(args.tasks, len(row.only) or args.tasks), 0)
        policy = lambda obs: row.script.act(tasks, obs) if row.script else rng.uniform(-1, 1, (len(obs), row.act_dim))
        film(make(args.env, tasks, render_mode="rgb_array"), policy, args.render)
    except (OSError, ValueError) as error:
        parser.error(f"--render {args.render}: not written ({getattr(error, 'strerror', None) or error})")
    except KeyboardInterrupt:
        parser.exit(130, "envs.py: interrupted\n")
    print(args.render)


if __name__ == "__main__":
    main()
