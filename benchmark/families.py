"""A picture of every family of tasks: one task each, a moment after its start; a wind is an arrow.

python benchmark/families.py       # results/families.png
"""

import argparse

import numpy as np
from matplotlib.figure import Figure
from report import ROOT
from retest import main_of

import envs

STEPS, SIZE, COLUMNS = 12, 320, 5


def moment(name):
    """The picture of a task after some steps, towards the goal, by the family's script, or random ones; its wind."""
    row, rng = envs.family(name), np.random.default_rng(0)
    env = envs.make(name, envs.sample_tasks(name, 2, 0)[1:], render_mode="rgb_array", render_size=SIZE)
    obs = env.reset()[0]
    for _ in range(STEPS):
        action = rng.uniform(-1, 1, (1, row.act_dim))
        if row.script:
            action = row.script.act(env.tasks, obs)
        elif not row.xml:
            action = 2 * (row.goal(env.tasks) - obs) + 0.5 * action
        obs = env.step(action)[0]
    picture = env.render()[0]
    env.close()
    return picture, row.drift(env.tasks)[0] if row.drift else None


@main_of
def main(argv):
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    path = ROOT / "results" / "families.png"
    names = [name for name, row in envs.FAMILIES.items() if row.differs != "nothing"]
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(8, 1.9 * rows), dpi=150, layout="constrained")
    for axes, name in zip(figure.subplots(rows, COLUMNS).flat, names, strict=False):
        picture, drift = moment(name)
        axes.imshow(picture)
        if drift is not None:  # twenty steps of it, from the middle; the picture is 3.2 wide
            x, y = drift * 20 * SIZE / 3.2
            axes.arrow(SIZE / 2, SIZE / 2, x, -y, color="tab:red", width=3, length_includes_head=True)
        axes.set_title(f"{name}\ndiffers in {envs.family(name).differs}", fontsize=7)
        axes.set(xticks=[], yticks=[])
    figure.savefig(path)
    print(path)


if __name__ == "__main__":
    main()
