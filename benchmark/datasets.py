"""What the datasets hold: for each family that is built, tasks, mean return of each quality, size of a file; beside
them what doing nothing returns, an action of zeros in every step.

for env in cheetah-vel ant-dir; do time python data.py --env $env --quality random medium expert mixed; done
python benchmark/datasets.py            # a table of what is under datasets/, added to results/datasets.csv

What the table held of other datasets, which need not be on this machine, it keeps.
"""

import argparse
from pathlib import Path

import numpy as np
import report

import envs

QUALITIES = ("random", "medium", "expert", "mixed")
COLUMNS = ["env", "tasks", "transitions", "still", *QUALITIES, "megabytes"]


def describe(env, folder):
    """Mean over all tasks of the mean return over the family's horizon; and their size."""
    row = {"env": env}
    for quality in QUALITIES:
        path = folder / f"{quality}.npz"
        if path.exists():
            with np.load(path) as file:
                returns, shape = file["returns"], file["rewards"].shape
            row |= {quality: round(float(returns.mean()), 1), "tasks": shape[0], "transitions": shape[1]}
            row["megabytes"] = round(path.stat().st_size / 1e6)
    return row


def still(env, tasks):
    """Mean return of doing nothing in so many tasks, those of a dataset."""
    world = envs.make(env, envs.sample_tasks(env, tasks, 0))
    nothing = np.zeros(world.action_space.shape, np.float32)
    return round(float(world.returns(lambda obs: nothing, seed=0).mean()), 1)


def collect(root, path):
    """The table's rows, {(env, number of tasks): row}, those under `root` over those of `path`; written there."""
    rows = {(row["env"], int(row["tasks"])): row for row in report.read(path)} if path.exists() else {}
    for env in envs.FAMILIES:
        for folder in sorted((root / env).glob("*-seed0")):
            row = describe(env, folder)
            if len(row) > 1:
                rows[env, row["tasks"]] = rows.get((env, row["tasks"]), {}) | row
    rows = {key: row | {"still": still(*key)} for key, row in rows.items()}
    rows = dict(sorted(rows.items(), key=lambda item: list(envs.FAMILIES).index(item[0][0])))
    report.write(path, list(rows.values()), COLUMNS)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=report.ROOT / "datasets", help="where the datasets are")
    rows = collect(parser.parse_args().data_dir, report.ROOT / "results" / "datasets.csv").values()
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        print("| " + " | ".join(str(row.get(column, "")) for column in COLUMNS) + " |")


if __name__ == "__main__":
    main()
