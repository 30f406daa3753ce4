"""A dataset at a glance: returns in the order of the data, and what its tasks are about; or a film of who acted.

python benchmark/picture.py datasets/cheetah-vel/80+20-seed0/mixed.npz       # mixed.png beside it
python benchmark/picture.py datasets/cheetah-vel/80+20-seed0/expert.npz --film expert.gif

A film shows tasks side by side under the last policies, the untrained ones (of `random` data), or the script.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from retest import main_of

import data
import envs


def plot(path):
    """Writes the picture of a dataset beside its file; where it is."""
    dataset, picture = data.load(path), path.with_suffix(".png")
    row = envs.FAMILIES.get(dataset.meta.get("env"))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if row is not None and row.script:
        plot_behaviours(left, right, dataset, row)
    else:
        plot_returns(left, dataset, path.stem)
        plot_tasks(right, dataset, row)
    data.write(picture, lambda file: figure.savefig(file, dpi=110, format="png"))
    return picture


def plot_returns(axes, dataset, name):
    """Of every episode that was seen to its end, a dot each, and their mean."""
    task, place, returns = data.episode_returns(dataset)
    axes.scatter(place, returns, c=task, cmap="turbo", s=4, alpha=0.5, linewidths=0)
    if len(returns):
        bins = np.minimum((place * 20).astype(int), 19)
        count = np.bincount(bins, minlength=20)
        mean = np.bincount(bins, returns, 20)[count > 0] / count[count > 0]
        axes.plot((np.flatnonzero(count) + 0.5) / 20, mean, color="black", label="mean over tasks")
        axes.legend(fontsize="small")
    axes.set_title(f"{dataset.meta.get('env', name)}, {dataset.meta.get('quality', 'your own data')}")
    axes.set_xlabel("place in the data (mixed: untrained policies left, last ones right)")
    axes.set_ylabel("return of an episode")


def successes(dataset):
    """(T, N) numbers of episodes from 0, and (T, episodes) whether what is wanted, a reward of 0, was ever achieved."""
    episodes = dataset.episodes.cpu().numpy()
    episodes = (np.diff(episodes, axis=1, prepend=episodes[:, :1]) != 0).cumsum(1)
    task, i = np.nonzero(dataset.rewards.cpu().numpy() == 0)
    achieved = np.zeros((len(episodes), episodes.max() + 1), bool)
    achieved[task, episodes[task, i]] = True
    return episodes, achieved


def plot_behaviours(left, right, dataset, row):
    """Which share of each task's trajectories achieve what is wanted there, and the hand's paths in those that do."""
    wanted, (episodes, achieved) = dataset.tasks[:, row.script.column].astype(int), successes(dataset)
    share, place = achieved.mean(1), 0
    for k, name in enumerate(row.script.names):
        rows = np.flatnonzero(wanted == k)
        order, colour = rows[np.argsort(share[rows])], f"C{k}"
        label = f"{name}: {share[rows].mean():.0%}" if len(rows) else f"{name}: no task"
        left.bar(place + np.arange(len(rows)), share[order], color=colour, width=0.8, label=label)
        place += len(rows) + 1
        for i in rows:
            for episode in np.flatnonzero(achieved[i])[:3]:
                path = dataset.next_observations[i].cpu().numpy()[episodes[i] == episode, :2]
                right.plot(*path.T, color=colour, linewidth=0.5, alpha=0.5)
    left.legend(fontsize="small")
    title = f"{dataset.meta['env']}: {achieved.mean():.0%} of the trajectories achieve what is wanted"
    left.set(title=title, xlabel="tasks, by what is wanted", ylabel="share of trajectories", xticks=[], ylim=(0, 1))
    right.set(title="paths of the hand, from above, in some of these", xlabel="x", ylabel="y", aspect="equal")


def plot_tasks(axes, dataset, row):
    """Paths in the plane where the body moves in one; else each task's speed, against its parameter if it has one."""
    if row is None or (row.xml and not row.velocity):
        axes.hist(dataset.rewards.flatten().numpy(), bins=60, color="tab:gray")
        axes.set(title="rewards", xlabel="reward", ylabel="transitions")
    elif not row.xml or len(row.velocity) == 2:
        plot_paths(axes, dataset, row)
    else:
        tail = dataset.next_observations[:, -max(1, dataset.rewards.shape[1] // 5) :, row.velocity[0]].numpy()
        known = dataset.tasks.shape[1] == 1 and len(dataset.tasks) > 2
        target = dataset.tasks[:, 0] if known else np.arange(len(dataset.tasks))
        style = {"fmt": "o", "markersize": 3, "linewidth": 0.6, "color": "tab:blue", "label": "last fifth"}
        axes.errorbar(target, tail.mean(1), tail.std(1), **style)
        if known:
            axes.plot(target, target, color="black", linewidth=0.8, label="target")
        axes.legend(fontsize="small")
        axes.set(title="speed of the torso, mean and std", xlabel="task (parameter)", ylabel="m/s")


def plot_paths(axes, dataset, row):
    """The last episode of some tasks, from above, and where each was to go."""
    t, n = dataset.rewards.shape
    obs, episodes = dataset.next_observations.numpy(), dataset.episodes.numpy()
    shown = np.unique(np.linspace(0, t - 1, min(t, 24)).round().astype(int))
    colours = matplotlib.colormaps["turbo"](np.linspace(0, 1, max(len(shown), 2)))[: len(shown)]
    dt = envs.make(dataset.meta["env"], dataset.tasks[:1], threads=1).physics.dt
    for i, colour in zip(shown, colours, strict=True):
        last = np.flatnonzero(episodes[i] == episodes[i, -1])
        rows, style = (last, "-") if len(last) > 1 else (np.arange(n), ",")
        path = np.cumsum(obs[i][rows][:, row.velocity] * dt, axis=0) if row.xml else obs[i, rows]
        axes.plot(*path.T, style, color=colour, linewidth=0.8)
    if row.goal:
        reach = np.abs(np.array([axes.get_xlim(), axes.get_ylim()])).max() if row.xml else 1
        axes.scatter(*row.goal(dataset.tasks[shown]).T * reach, c=colours, marker="*", s=50)
    axes.set(title="paths of last episodes, a colour a task", xlabel="x", ylabel="y", aspect="equal")


def film(path, gif, count=4, seed=0):
    """Writes a GIF of `count` tasks of the dataset at `path` side by side, under the last policies, the untrained
    ones of `random` data, or the script."""
    dataset, trained = data.load(path), path.with_name("behaviour.pt")
    row = envs.family(dataset.meta.get("env"))
    shown = np.unique(np.linspace(0, len(dataset.tasks) - 1, count).round().astype(int))
    scripted = dataset.meta.get("behaviour") == "scripted"
    horizon = row.data_horizon if scripted else row.horizon
    vector = envs.make(dataset.meta["env"], dataset.tasks[shown], seed, horizon=horizon, render_mode="rgb_array")
    if scripted:
        act = data.Performer(row, dataset.tasks[shown], seed).act
        return data.write(gif, lambda file: envs.film(vector, act, file))
    with data.believing(trained, "no policies to film there", "expected those that made the data"):
        agents = data.read(trained)
        policies = agents["policies"][0 if dataset.meta["quality"] == "random" else -1, shown]
        actor = data.load_policies(policies, row, agents["settings"]["hidden"])

    @torch.no_grad()
    def policy(obs):
        return torch.tanh(actor(torch.as_tensor(obs, dtype=torch.float32)[:, None]).chunk(2, -1)[0])[:, 0].numpy()

    data.write(gif, lambda file: envs.film(vector, policy, file))


@main_of
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path, help="a dataset's .npz")
    parser.add_argument("--film", type=Path, metavar="GIF", help="write a film instead of a picture")
    parser.add_argument("--tasks", type=int, default=4, help="how many tasks a film shows")
    args = parser.parse_args(argv)
    try:
        if args.film:
            film(args.dataset, args.film, args.tasks)
        print(args.film or plot(args.dataset))
    except ValueError as error:  # no such family, no such format
        raise data.DataError(str(error)) from None


if __name__ == "__main__":
    main()
