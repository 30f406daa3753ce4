"""One picture of a run on point robots, for the README: paths to unseen goals, embeddings, the curve.

python benchmark/figure.py runs/focal/sparse-point-robot/small/seed0
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import paper
from matplotlib.figure import Figure
from retest import load_run, main_of

import data
import pictures


def draw_embeddings(axes, tasks, z_train, z_test):
    """Training tasks as dots, test tasks as stars; means over contexts."""
    (colours, _), (points, share) = pictures.task_colours(tasks), pictures.components(z_train, z_test)
    train, test = (own.mean(1) for own in points)
    axes.scatter(*train.T, c=colours[: len(train)], s=10, linewidths=0, label="training tasks")
    axes.scatter(*test.T, c=colours[len(train) :], s=60, marker="*", edgecolors="black", linewidths=0.5, label="unseen")
    axes.set(title="what z knows of each goal", xlabel=f"first component of z ({share[0]:.0%})")
    axes.set_ylabel(f"second component ({share[1]:.0%})")
    axes.legend(fontsize="small")


def draw(run, path):
    """Evaluates the run's agent once more and draws it twice as fine as it is shown, 800 pixels wide."""
    script, args, world, agent = load_run(run)
    *_, z_train, z_test = script.evaluate(args, agent, world)
    matplotlib.rcParams.update({"font.size": 8, "axes.titlesize": "medium"})
    figure = Figure(figsize=(8, 2.8), dpi=200, layout="constrained")
    paths, embeddings, curve = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    pictures.draw_paths(paths, world.env, len(world.test_rows), args.eval_episodes)
    paths.set_title(f"paths to {len(world.test_rows)} unseen goals")
    draw_embeddings(embeddings, world.tasks, z_train, z_test)
    kinds = {"train_": "training tasks", "": "unseen tasks"}
    known = SimpleNamespace(rows=paper.metrics(run), curve=kinds, marks=(), unit="gradient steps", world=world)
    known.args, known.script = args, Path(f"{script.__name__}.py")
    pictures.draw_curve(curve, known)
    curve.set_title("return while it learns")
    figure.savefig(path)


@main_of
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="<run-dir>/<script>/<env>/<variant>/seed<k>")
    parser.add_argument("--out", type=Path, help="unless given: figure.png in that folder")
    args = parser.parse_args(argv)
    run = args.run.absolute()
    path = args.out or run / "figure.png"
    missing = not (run / "paths.png").exists()
    data.refuse((missing, f"{run}: no paths.png there; expected the folder of a run on point robots"))
    draw(run, path)
    print(path)


if __name__ == "__main__":
    main()
