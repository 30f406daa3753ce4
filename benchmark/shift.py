"""What SMAC's online phase changes: the paper's Figures 2, 6 and 8 for runs of smac.py, before that phase and after it.

python benchmark/shift.py runs/smac/sparse-point-robot/small/seed0

Writes shift-offline-phase.png and, where there was one, shift-online-phase.png into each run's folder: KL(q(z | h) ||
prior) of the test tasks, for contexts that the agent collects (`short_` in metrics.csv) and for those of the data, and,
where tasks lie in the plane, the paths of exploration and of the policy on both contexts, a colour for each task, stars
where to.
"""

import numpy as np
import torch
from matplotlib.figure import Figure
from retest import load_run, main_of, runs_of

import data
import pictures

NAMES = {"prior_": "exploration", "short_": "on online contexts", "offline_": "on offline contexts"}


@torch.no_grad()
def play(script, args, agent, world):
    """Of the test tasks, as in an evaluation: {name: KLs (tasks x E,)} and {name: paths}."""
    first = slice(world.seen * args.eval_episodes, None, args.eval_episodes)  # each test task's first meta-episode
    with torch.random.fork_rng([]):
        torch.manual_seed(args.seed)
        rows, counted, _ = script.explore(args, agent, world)
        found = script.posteriors(args, agent, world, rows, counted)
        once = slice(world.env.horizon)
        kls, walked = {}, {"prior_": paths(rows[first, once], counted[first, once], world)}
        for name, (mean, variance) in found.items():
            z = script.sample(mean, variance)
            if name in NAMES:
                kls[name] = script.gaussian_kl(mean, variance)[first.start :].numpy()
                rows, counted, *_ = script.play(agent, world, world.env, z, args.seed)
                walked[name] = paths(rows[first], counted[first], world)
    return kls, walked


def paths(rows, counted, world):
    """(2, t) positions in each trajectory of rows (n, H, D), up to its end; none where tasks are not in the plane."""
    row, found = world.row, []
    for own, alive in zip(rows, counted, strict=True):
        where = own.split(world.split, -1)[3][alive] * world.std + world.mean  # s'
        if row.xml:  # observations tell velocities, not places
            where = where[:, list(row.velocity)].cumsum(0) * world.env.physics.dt
        found.append(where[:, :2].T.numpy())
    return found if not row.xml or len(row.velocity) == 2 else []


def plot(seen, world):
    """The pictures of {path: what `play` returned}, on the same axes."""
    own = [path for _, walked in seen.values() for found in walked.values() for path in found]
    points = np.concatenate(own, 1) if own else None
    bins = np.linspace(0, max(kl.max() for kls, _ in seen.values() for kl in kls.values()) * 1.02, 30)
    for path, (kls, walked) in seen.items():
        walked = {name: found for name, found in walked.items() if found}
        figure = Figure(figsize=(4.2 * (1 + len(walked)), 3.8), layout="constrained")
        left, *others = figure.subplots(1, 1 + len(walked), squeeze=False)[0]
        for name, kl in kls.items():
            left.hist(kl, bins, color="tab:orange" if name == "short_" else "tab:blue", alpha=0.5, label=NAMES[name])
        left.set(title=path.stem.removeprefix("shift-"), xlabel="KL(q(z | h) || p(z))", ylabel="contexts of test tasks")
        left.legend(fontsize="small")
        for axes, (name, found) in zip(others, walked.items(), strict=True):
            plot_paths(axes, found, points, world)
            axes.set_title(NAMES[name])
        data.write(path, lambda file: figure.savefig(file, dpi=110, format="png"))


def plot_paths(axes, found, points, world):
    """The paths `found` of the test tasks on axes that show all `points` (2, n)."""
    goal = world.row.goal(world.test_tasks)[:, :2].T if world.row.goal else np.full((2, len(found)), np.nan)
    goal = goal * (np.abs(points).max() if world.row.xml else 1)  # a body's is a direction
    colour = pictures.task_colours(world.test_tasks)[0]
    for path, own in zip(found, colour, strict=True):
        axes.plot(*path, color=own, linewidth=0.9)
    axes.scatter(*goal, c=colour, marker="*", s=60, zorder=3)
    points = np.concatenate([points, goal], 1)
    low, high = np.nanmin(points, 1), np.nanmax(points, 1)
    low, high = low - 0.05 * (high - low).max(), high + 0.05 * (high - low).max()
    axes.set(xlabel="x", ylabel="y", aspect="equal", xlim=(low[0], high[0]), ylim=(low[1], high[1]))


def draw(run):
    """The pictures of one run; returns where they are."""
    script, args, world, agent = load_run(run, ("SMAC",))
    phases = ["offline-phase"] * (args.steps > 0) + ["online-phase"] * (int(agent.step) > args.steps)
    files = [run / f"shift-{phase}.png" for phase in phases]
    seen = {}
    for file in reversed(files):
        if file.stem == "shift-offline-phase" and len(files) > 1:  # what the agent was then
            agent.encoder, agent.actor = agent.labeller, agent.offline_actor
        seen[file] = play(script, args, agent, world)
    plot(seen, world)
    return files


@main_of
def main(argv):
    for run in runs_of(argv, __doc__, "smac.py"):
        print(*draw(run), flush=True)


if __name__ == "__main__":
    main()
