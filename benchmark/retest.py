"""Trained agents under other test conditions, without training them again.

python benchmark/retest.py runs/focal/sparse-point-robot/small/seed* --test-quality random
python benchmark/retest.py runs/merpo/point-robot-wind/small/seed* --test-start behaviour-init --adapt-steps 400
python benchmark/retest.py runs/smac/walker-params/small/seed* --eval-episodes 20

The flags are the scripts' own, those that no training step sees. MerPO's test tasks adapt their models anew to the data
that they are given; `clone_return_mean` is the return of policies fitted to the same data by maximum likelihood, over
five fits. Prints a line for each run and writes retest/<flags>.json into its folder.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path.cwd())]
import data
import merpo
import trained

FLAGS = {
    "FOCAL": ["test_quality", "eval_episodes"],
    "SMAC": ["eval_episodes"],
    "MerPO": ["test_quality", "test_trajectories", "test_start", "eval_episodes"],
}
FLAGS["MerPO"] += ["adapt_steps", "adapt_batch_size", "adapt_lr"]
whole, number = (partial(data.parse_value, kind) for kind in (data.Count, data.Number))
CLONES = 5  # fits of policies to the test tasks' data; the return of one by itself swings


def kind_of(settings):
    """How a script is tested, by the flags that it has: so it goes for copies under other names too."""
    return "MerPO" if "test_start" in settings else "SMAC" if "online_steps" in settings else "FOCAL"


def load_run(folder, kinds=("FOCAL",), single=False, **changes):
    """`trained.load_run` on one thread, or DataError for what keeps it from that; `single`: also MerPO's --single."""
    torch.set_num_threads(1)
    try:
        with data.believing(folder, "a damaged run, or one of another version of the script", "run it again"):
            saved = json.loads((folder / "args.json").read_text())
            kind = kind_of(saved)
            alone = saved.get("single") and not single
            strange = ", ".join(map(data.option, sorted(changes.keys() - {*FLAGS[kind]})))
            data.refuse(
                (kind not in kinds, f"{folder}: a run of {kind}; expected one of {' or '.join(kinds)}"),
                (alone, f"{folder}: a run with --single has no test tasks; expected another"),
                (strange, f"{strange}: {kind} has no such flag of its tests"),
            )
            return trained.load_run(folder, **changes)
    except OSError as error:
        raise data.DataError(f"{error.filename}: {error.strerror}; expected the folder of a run") from None


def main_of(tool):
    """`tool(argv)` as a command: what a user can mend ends in one line."""

    def main(argv=None):
        with data.endings(Path(tool.__code__.co_filename).name, lambda: "nothing more was written"):
            return tool(argv)

    return main


def runs_of(argv, doc, scripts):
    """The folders on the command line of a tool that takes nothing else."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"folder of a run of {scripts}")
    return parser.parse_args(argv).runs


def test(folder, changes):
    """What retest/<flags>.json holds: returns of the test tasks, and by steps of adaptation with MerPO."""
    script, args, world, agent = load_run(folder, FLAGS, **changes)
    torch.manual_seed(args.seed)
    row = {"flags": changes, "step": int(agent.step), "data_return": world.behaviour}
    kind = kind_of(vars(args))
    if kind == "MerPO":
        row["clone_return_mean"] = clone_return(script, args, agent, world)
        returns = script.evaluate(args, agent, world)
        row |= {"return_mean": returns[args.adapt_steps].mean(), "meta_return_mean": returns[0].mean()}
        if not script.STARTS[args.test_start][0]:
            del returns[0]  # that is the meta-policy's, from which such a task does not start
        row |= {"returns": {step: round(float(value.mean()), 4) for step, value in returns.items()}}
    elif kind == "SMAC":  # returns on contexts of its own, and on others
        tested = script.evaluate(args, agent, world)[0]
        row |= {f"{name}return_mean": tested[f"{name}return_mean"] for name in ("", "short_", "prior_", "offline_")
                if f"{name}return_mean" in tested}  # fmt: skip
    else:
        _, returns, _, z = script.evaluate(args, agent, world)
        row |= {"return_mean": returns.mean(), "variance": script.separation(z)[2]}
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def clone_return(script, args, agent, world):
    """Mean return of policies fitted to the test tasks' data, over CLONES fits from scratch; models adapt, too."""
    tasks, returns = agent.test_tasks, []
    for _ in range(CLONES):
        tasks.behaviour = script.Policy(len(tasks.rows), *world.sizes)
        tasks.adapt(agent.meta_model)
        returns.append(script.play(args, tasks.behaviour, world).mean())
    return sum(returns) / CLONES


def result(folder, changes):
    """Where the outcome is kept."""
    name = ",".join(f"{key.replace('_', '-')}={value}" for key, value in sorted(changes.items()))
    return folder / "retest" / f"{name or 'as-trained'}.json"


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--test-quality", choices=data.QUALITIES, help="of the test tasks' data")
    parser.add_argument("--test-trajectories", type=whole, help="MerPO: of each test task's data")
    parser.add_argument("--test-start", choices=list(merpo.STARTS), help="MerPO: how a test task begins")
    parser.add_argument("--adapt-steps", type=whole, help="MerPO: steps of RAC on a test task")
    parser.add_argument("--adapt-batch-size", type=whole, help="MerPO: transitions of it in each")
    parser.add_argument("--adapt-lr", type=number, help="MerPO: learning rate of those steps")
    parser.add_argument("--eval-episodes", type=whole, help="episodes (SMAC: meta-episodes) of each task")
    args = parser.parse_args(argv)
    changes = {key: value for key, value in vars(args).items() if key != "runs" and value is not None}
    return args.runs, changes


@main_of
def main(argv):
    runs, changes = arguments(argv)
    data.refuse((not runs, "expected the folder of a run, or several"))
    for run in runs:
        try:
            row, path = test(run, changes), result(run, changes)
        except FloatingPointError as error:
            raise FloatingPointError(f"{run}: {error}") from None
        path.parent.mkdir(exist_ok=True)
        data.write(path, json.dumps(row, indent=1).encode())
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        print(run, *(f"{key} {value:.4g}" for key, value in numbers.items()), flush=True)


if __name__ == "__main__":
    main()
