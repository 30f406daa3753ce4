"""Films one trained agent in unseen tasks side by side: each film starts with one context of the task's data.

python benchmark/animate.py runs/focal/walker-params/small/seed0       # results/focal-walker-params.gif
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from retest import load_run, whole

import envs


@torch.no_grad()
def film(run, path, count, size):
    """`count` of the run's test tasks, each with an embedding of `context_size` transitions of its data."""
    script, args, world, agent = load_run(run)
    tasks = world.env.tasks[:: args.eval_episodes][len(world.train_rows) :]
    shown = np.unique(np.linspace(0, len(tasks) - 1, count).round().astype(int))
    generator = torch.Generator().manual_seed(args.seed)
    index = torch.randint(world.test_rows.shape[1], (args.context_size,), generator=generator)
    context = script.context_of(world.test_rows[shown][:, index], world.split, args)
    z = agent.encoder(context, generator)[0]
    vector = envs.make(args.env, tasks[shown], seed=args.seed, render_mode="rgb_array", render_size=size)
    envs.film(vector, lambda obs: agent.act(world.scaled(obs), z, generator).numpy(), path)
    vector.close()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of FOCAL or FOCAL++")
    parser.add_argument("--tasks", type=whole, default=5, help="how many test tasks")
    parser.add_argument("--size", type=whole, default=160, help="of a picture, in pixels")
    parser.add_argument("--out", type=Path, help="default: results/<script>-<env>.gif")
    args = parser.parse_args(argv)
    run = args.run.resolve()
    path = args.out or ROOT / "results" / f"{'-'.join(run.parts[-4:-2])}.gif"
    if not path.parent.is_dir():
        raise SystemExit(f"animate.py: --out {path}: there is no folder {path.parent}")
    film(run, path, args.tasks, args.size)
    print(path)


if __name__ == "__main__":
    main()
