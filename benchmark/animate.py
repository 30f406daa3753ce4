"""Films one trained agent in unseen tasks side by side: each knows one context, or has adapted.

python benchmark/animate.py runs/focal/walker-params/small/seed0       # film.gif there
"""

import argparse
from pathlib import Path

import numpy as np
from retest import FLAGS, load_run, main_of, whole

import data
import envs
import trained


def film(run, path, count, size):
    """`count` of the run's test tasks, under what acted in its last evaluation."""
    script, args, world, agent = load_run(run, FLAGS, single=True)
    every = args.eval_episodes
    tasks = world.env.tasks[-every * len(world.test_rows) :: every]
    shown = np.unique(np.linspace(0, len(tasks) - 1, count).round().astype(int))
    vector = envs.make(args.env, tasks[shown], seed=args.seed, render_mode="rgb_array", render_size=size)
    act = trained.policy_of(script, args, world, agent)
    everywhere = np.zeros((every * len(tasks), world.env.family.obs_dim))

    def policy(obs):
        everywhere[shown * every] = obs
        return act(everywhere)[shown * every]

    data.write(path, lambda file: envs.film(vector, policy, file))
    vector.close()


@main_of
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--tasks", type=whole, default=5, help="how many test tasks")
    parser.add_argument("--size", type=whole, default=160, help="of a picture, in pixels")
    parser.add_argument("--out", type=Path, help="unless given: film.gif in that folder")
    args = parser.parse_args(argv)
    path = args.out or args.run / "film.gif"
    data.refuse((args.out and not path.parent.is_dir(), f"--out {path}: there is no folder {path.parent}"))
    film(args.run, path, args.tasks, args.size)
    print(path)


if __name__ == "__main__":
    main()
