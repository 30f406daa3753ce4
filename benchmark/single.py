"""Cuts tasks out of a dataset: a file for --data that holds nothing else, to learn and be tested on the same tasks.

python benchmark/single.py --env walker-params --tasks 20 --out walker20.npz
python focal.py --env walker-params --data walker20.npz --meta-batch-size 1 --batch-size 256 --steps 8000

The first thing to try when an algorithm does not learn, and a way to see what the other tasks' data are worth.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from retest import main_of

import data
import envs


def cut(path, env, tasks):
    """The arrays of these tasks, each of them a training and a test task, and what is said of them."""
    whole = data.load(path, env=env)  # checks it
    if not 0 <= min(tasks) <= max(tasks) < len(whole.tasks):
        raise data.DataError(f"--tasks: expected numbers from 0 to {len(whole.tasks) - 1}, found {tasks}")
    wanted = (data.REQUIRED | data.OPTIONAL).keys() - {"train_tasks", "test_tasks"}
    with np.load(path) as file:
        arrays = {key: file[key][tasks] for key in wanted & {*file.files}}
    arrays |= dict.fromkeys(("train_tasks", "test_tasks"), np.arange(len(tasks)))
    kept = ["env"] + ["quality"] * (whole.meta.get("quality") == "relabelled")  # whose contexts are sparse
    return arrays, {key: whole.meta[key] for key in kept if key in whole.meta}


@main_of
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", choices=list(envs.FAMILIES), help="whose `mixed` data; with --data what that is for")
    number = partial(data.parse_value, data.Whole)
    parser.add_argument("--tasks", nargs="+", type=number, required=True, help="their numbers in the dataset")
    parser.add_argument("--data", type=Path, metavar="FILE", help="a dataset of your own or of another quality")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    data.refuse((not (args.env or args.data), "expected --env or --data"))
    arrays, meta = cut(args.data or data.prepare(args.env, "mixed"), args.env, args.tasks)
    data.save(args.out, arrays, meta)
    returns = ", ".join(f"{x:.1f}" for x in arrays["returns"]) if "returns" in arrays else "not known"
    print(f"{args.out}: {arrays['observations'].shape[1]} transitions of each task, return {returns}")


if __name__ == "__main__":
    main()
