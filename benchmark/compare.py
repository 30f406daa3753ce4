"""Draws runs of yours over each other: one curve for each folder of seeds, its band from the lowest to the highest.

python benchmark/compare.py runs/focal/sparse-point-robot/small runs/focal/sparse-point-robot/small,dml=linear
python benchmark/compare.py runs/smac/*/small --columns return_mean offline_return_mean --out smac.png
"""

import argparse
from pathlib import Path

import numpy as np
import paper
from retest import main_of

import data


def seeds(folder):
    """The runs in a folder that holds seed0, seed1, ..."""
    runs = sorted(path.parent for path in folder.glob("seed*/metrics.csv"))
    data.refuse((not runs, f"{folder}: no seed*/metrics.csv there; expected the folder of a variant's seeds"))
    return runs


def labels(folders):
    """What tells folders apart: the parts of their paths that are not the same in all."""
    parts = [folder.resolve().parts for folder in folders]
    depth = min(map(len, parts))
    different = [i for i in range(-depth, 0) if len({p[i] for p in parts}) > 1] or [-1]
    return ["/".join(p[i] for i in different) for p in parts]


@main_of
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="<run-dir>/<script>/<env>/<variant>")
    parser.add_argument("--columns", nargs="+", default=["return_mean"], help="of metrics.csv, a panel each")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the picture")
    args = parser.parse_args(argv)
    groups = {label: seeds(folder) for label, folder in zip(labels(args.folders), args.folders, strict=True)}
    first = {run: row for runs in groups.values() for run in runs for row in paper.metrics(run)[:1]}
    for run, row in first.items():
        for column in args.columns:
            data.refuse((column not in row, f"{run}: no column {column}; expected one of {', '.join(row)}"))
    stages = any("model_loss" in row for row in first.values())
    try:
        paper.draw_curves(args.out, "", groups, args.columns, paper.STEPS["merpo" if stages else "focal"])
    except (OSError, ValueError) as error:  # no such folder, no such format
        raise data.DataError(f"--out {args.out}: {error}") from None
    for label, runs in groups.items():
        for column in args.columns:
            last = [paper.last(paper.metrics(run), column) for run in runs]
            print(f"{label:<40} {column} {np.mean(last):.4g} ({np.std(last):.2g}), {len(last)} seeds")
    print(args.out)


if __name__ == "__main__":
    main()
