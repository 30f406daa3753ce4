"""What the datasets hold: for each family that is built, tasks, mean return of each quality, size of a file.

for env in cheetah-vel ant-dir; do time python data.py --env $env --quality random medium expert mixed; done
python benchmark/datasets.py            # a table of what is under datasets/, and results/datasets.csv
"""

import csv
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs

QUALITIES = ("random", "medium", "expert", "mixed")
COLUMNS = ["env", "tasks", "transitions", *QUALITIES, "megabytes"]


def describe(env, folder):
    """Mean over all tasks of the mean return over the family's horizon."""
    row = {"env": env}
    for quality in QUALITIES:
        path = folder / f"{quality}.npz"
        if path.exists():
            with np.load(path) as file:
                returns, shape = file["returns"], file["rewards"].shape
            row |= {quality: round(float(returns.mean()), 1), "tasks": shape[0], "transitions": shape[1]}
            row["megabytes"] = round(path.stat().st_size / 1e6)
    return row


def main(root=ROOT / "datasets"):
    rows = []
    for env in envs.FAMILIES:
        for folder in sorted((root / env).glob("*-seed0")):
            row = describe(env, folder)
            if len(row) > 1:
                rows.append(row)
    with open(ROOT / "results" / "datasets.csv", "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        print("| " + " | ".join(str(row.get(column, "")) for column in COLUMNS) + " |")


if __name__ == "__main__":
    main()
