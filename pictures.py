"""Pictures of a run: its curve, its embeddings, the paths of point robots. A `data.Run` keeps them in its folder.

Those named draw_... draw on axes of matplotlib, and may be used in your own figures.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import envs


def picture(draw: Callable, *size: float, **panels: Any) -> bytes:
    """The PNG of what `draw` draws on its panels, side by side, of `size` inches."""
    from matplotlib.figure import Figure

    figure, file = Figure(figsize=size, layout="constrained"), io.BytesIO()
    draw(figure.subplots(1, **panels))
    figure.savefig(file, dpi=130, bbox_inches="tight")
    return file.getvalue()


def curve(run: Any) -> bytes | None:
    """See `draw_curve`; None before the first evaluation."""
    known = any(math.isfinite(row["return_mean"]) for row in run.rows)
    return picture(lambda axes: draw_curve(axes, run), 5.2, 3.6) if known else None


def draw_curve(axes: Any, run: Any) -> None:
    """Returns against steps: a line for each prefix in `run.curve`, its band from low to high; the data's return, the
    optimum."""
    rows = [row for row in run.rows if math.isfinite(row["return_mean"])]
    step, none = [row["step"] for row in rows], math.nan
    for (prefix, label), colour in zip(run.curve.items(), ("tab:gray", "tab:blue", "tab:cyan"), strict=False):
        low, high = ([row.get(f"{prefix}return_{end}", none) for row in rows] for end in ("low", "high"))
        axes.fill_between(step, low, high, color=colour, alpha=0.15, linewidth=0)
        mean, marker = [row[f"{prefix}return_mean"] for row in rows], "o" if len(step) == 1 else None
        axes.plot(step, mean, color=colour, marker=marker, label=label)
    for mark in sorted(run.marks)[:-1]:
        axes.axvline(mark, color="black", linewidth=0.6)
    if run.world.behaviour is not None:
        axes.axhline(run.world.behaviour, color="tab:orange", linestyle=":", label="the test tasks' data")
    if run.world.optimum is not None:
        axes.axhline(run.world.optimum, color="tab:green", linestyle="--", label="the test tasks' optimum")
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
    return [own.view(*part.shape[:2], -1) for own, part in zip(points, z, strict=True)], share


def embeddings(env: envs.TaskVectorEnv, z_train: torch.Tensor, z_test: torch.Tensor) -> bytes:
    """Embeddings (n, E, l) of several contexts of each training and each test task on their first principal components
    (FOCAL's Figures 4a, 7), in the colours of the tasks' parameters (directions: on a circle), and these themselves:
    where z tells tasks apart like colours lie together. `env` has them, training tasks first, each as often as another.
    """
    tasks = env.tasks[:: env.num_envs // (len(z_train) + len(z_test))]
    tasks = env.family.goal(tasks)[:, :2] if env.family.goal and tasks.shape[1] == 1 else tasks

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

    return picture(draw, 9, 3.4, ncols=3)


def paths(run: Any) -> bytes | None:
    """See `draw_paths`; None of bodies, or before they moved."""
    env = getattr(run.world, "env", None)
    if env is None or not env.trail:
        return None
    return picture(lambda axes: draw_paths(axes, env, len(run.world.test_rows), run.args.eval_episodes), 4, 3.6)


def draw_paths(axes: Any, env: envs.TaskVectorEnv, tasks: int, each: int) -> None:
    """What point robots did last in the last `tasks`, the test tasks, of which each has so many sub-environments: the
    path in the first of them, in the task's colour, and a star where its goal is."""
    mine = slice(-each * tasks, None, each)
    colours = task_colours(env.tasks)[0][mine]
    paths = np.stack([*env.trail[-env.horizon :], env.reached], 1)[mine, :, 1:3]
    for path, colour in zip(paths, colours, strict=True):
        axes.plot(*path.T, ".-", color=colour, linewidth=1, markersize=2)
    if env.family.goal:
        goals = env.family.goal(env.tasks[mine])
        axes.scatter(*goals.T[:2], c=colours if np.ptp(goals, 0).any() else "black", marker="*", s=70, zorder=3)
    axes.set(title=f"paths in {tasks} unseen tasks", xlabel="x", ylabel="y", aspect="equal")
