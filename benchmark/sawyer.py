"""The Sawyer tasks: what the script and random actions achieve in 200 of them, a picture of eight.

python benchmark/sawyer.py              # prints a table; writes results/sawyer-tasks.png
"""

import argparse
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from report import ROOT
from retest import main_of

import envs

SCRIPT = envs.family("sawyer").script


def table(n=200):
    tasks, rng = envs.sample_tasks("sawyer", n, 1), np.random.default_rng(0)
    policies = partial(SCRIPT.act, tasks), lambda obs: rng.uniform(-1, 1, (n, 4))
    returns = np.stack([envs.make("sawyer", tasks, seed=1).returns(policy, seed=1) for policy in policies])
    print("| wanted | tasks | script: achieved | return | random: achieved |\n|---|---|---|---|---|")
    for k, name in enumerate(SCRIPT.names):
        rows = tasks[:, SCRIPT.column] == k
        shares = (returns[:, rows] > -envs.family("sawyer").horizon).mean(1)
        print(f"| {name} | {rows.sum()} | {shares[0]:.1%} | {returns[0, rows].mean():.1f} | {shares[1]:.1%} |")


def choose(tasks, counts):
    """So many of each behaviour, the first ones."""
    return np.concatenate([tasks[tasks[:, SCRIPT.column] == k][:n] for k, n in enumerate(counts)])


def picture(size=300):
    tasks, (train, test) = envs.sample_tasks("sawyer", 60, 0), (50, 10)
    shown = np.concatenate([choose(tasks[:train], (1, 2, 1)), choose(tasks[-test:], (2, 1, 1))])
    env = envs.make("sawyer", shown, render_mode="rgb_array", render_size=size)
    obs = env.reset()[0]
    for _ in range(30):
        obs = env.step(SCRIPT.act(shown, obs))[0]
    figure = Figure(figsize=(4 * size / 100, 2 * (size / 100 + 0.28)), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for i, (axes, image) in enumerate(zip(figure.subplots(2, 4).flat, env.render(), strict=True)):
        axes.imshow(image)
        kind = "training" if i < 4 else "test"
        axes.set_title(f"{SCRIPT.names[int(shown[i, SCRIPT.column])]} ({kind})", fontsize=11)
        axes.axis("off")
    figure.savefig(ROOT / "results" / "sawyer-tasks.png")
    env.close()


@main_of
def main(argv):
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    table()
    picture()


if __name__ == "__main__":
    main()
