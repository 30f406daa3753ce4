"""Trained agents under other test conditions, without training them again.

python benchmark/retest.py runs/focal/sparse-point-robot/small/seed* --test-quality random
python benchmark/retest.py runs/merpo/point-robot-wind/small/seed* --test-start behaviour-init --adapt-steps 400
python benchmark/retest.py runs/smac/walker-params/small/seed* --eval-episodes 20

The flags are the scripts' own, those that no training step sees. MerPO's test tasks adapt their models anew to the data
that they are given; `clone_return_mean` is the return of policies fitted to the same data by maximum likelihood. Prints
a line for each run and writes retest/<flags>.json into its folder.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import focal
import focal_pp
import merpo
import smac

SCRIPTS = {"focal": focal, "focal_pp": focal_pp, "smac": smac, "merpo": merpo}
FLAGS = dict.fromkeys(("focal", "focal_pp"), ["test_quality", "context_size", "eval_episodes"])
FLAGS["smac"] = ["eval_episodes"]
FLAGS["merpo"] = ["test_quality", "test_trajectories", "test_start", "adapt_steps", "adapt_lr", "eval_episodes"]


def load_run(folder, scripts=("focal", "focal_pp"), **changes):
    """The module, settings, tasks' data and environments, and trained agent of a run; `changes` replace settings."""
    program, parts = Path(sys.argv[0]).name, folder.resolve().parts
    if len(parts) < 4 or parts[-4] not in scripts:
        wanted = f"<run-dir>/<script>/<env>/<variant>/seed<k> of {', '.join(scripts)}"
        raise SystemExit(f"{program}: {folder}: expected {wanted}")
    module = SCRIPTS[parts[-4]]
    if ",single=" in parts[-2]:
        raise SystemExit(f"{program}: {folder}: a run with --single has no test tasks; expected another")
    for key in sorted(changes.keys() - set(FLAGS[parts[-4]])):
        raise SystemExit(f"{program}: --{key.replace('_', '-')}: {parts[-4]}.py has no such flag of its tests")
    try:
        saved = json.loads((folder / "args.json").read_text())
        checkpoint = data.read(folder / "checkpoint.pt", "cpu")
    except OSError as error:
        raise SystemExit(f"{program}: {error.filename}: {error.strerror}; expected the folder of a run") from None
    except Exception as error:
        raise SystemExit(f"{program}: {folder}: a damaged run ({type(error).__name__}); run it again") from None
    if saved["data"] and changes.get("test_quality", saved["test_quality"]) != saved["test_quality"]:
        raise SystemExit(f"{program}: --test-quality: {folder} has its data from --data {saved['data']}")
    paths = {key: saved[key] and Path(saved[key]) for key in ("data_dir", "data")}
    since = vars(module.parse_args(["--env", saved["env"]]))  # flags that the script did not have then, by default
    args = argparse.Namespace(**since | saved | paths | changes | {"device": "cpu"})
    try:
        world = module.World(args, torch.device("cpu"))
        if module is smac:
            agent = smac.build(args, world, torch.device("cpu"))[0]
        else:
            agent = module.Agent(args, *((world,) if module is merpo else (*world.split[:2], len(world.train_rows))))
        agent.load_state_dict(checkpoint["agent"])
        learned_from = checkpoint["dataset"]
    except data.DataError as error:
        raise SystemExit(f"{program}: {error}") from None
    except (AttributeError, KeyError, RuntimeError):
        raise SystemExit(f"{program}: {folder}: a run of another version of the script; run it again") from None
    same = slice(1 if args.test_quality != saved["test_quality"] else 2)  # of training and test tasks
    if learned_from[same] != world.checksum[same]:
        raise SystemExit(f"{program}: {folder}: its data have changed; expected {learned_from}, found {world.checksum}")
    return module, args, world, agent


def test(folder, changes):
    """What retest/<flags>.json holds: returns of the test tasks, and by steps of adaptation with MerPO."""
    module, args, world, agent = load_run(folder, SCRIPTS, **changes)
    torch.manual_seed(args.seed)
    row = {"flags": changes, "step": int(agent.step), "data_return": world.behaviour}
    if module is merpo:
        merpo.settle_tasks(args, agent, world, agent.test_tasks, torch.device("cpu"))
        row["clone_return_mean"] = merpo.play(args, agent.test_tasks.behaviour, world).mean()
        returns = merpo.evaluate(args, agent, world)
        row |= {"return_mean": returns[args.adapt_steps].mean(), "meta_return_mean": returns[0].mean()}
        if not merpo.STARTS[args.test_start][0]:
            del returns[0]  # that is the meta-policy's, from which such a task does not start
        row |= {"returns": {step: round(float(value.mean()), 4) for step, value in returns.items()}}
    elif module is smac:  # returns on contexts of its own, and on others
        tested = {name: values["return"][1] for name, values in smac.evaluate(args, agent, world).items()}
        row |= {f"{name}return_mean": float(value.mean()) for name, value in tested.items()}
    else:
        _, returns, _, z = module.evaluate(args, agent, world)
        row |= {"return_mean": returns.mean(), "variance": module.separation(z)[2]}
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def result(folder, changes):
    """Where the outcome is kept."""
    name = ",".join(f"{key.replace('_', '-')}={value}" for key, value in sorted(changes.items()))
    return folder / "retest" / f"{name or 'as-trained'}.json"


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--test-quality", choices=data.QUALITIES, help="of the test tasks' data")
    parser.add_argument("--context-size", type=merpo.whole, help="FOCAL, FOCAL++: transitions in a test context")
    parser.add_argument("--test-trajectories", type=merpo.whole, help="MerPO: of each test task's data")
    parser.add_argument("--test-start", choices=list(merpo.STARTS), help="MerPO: how a test task begins")
    parser.add_argument("--adapt-steps", type=merpo.whole, help="MerPO: steps of RAC on a test task")
    parser.add_argument("--adapt-lr", type=merpo.number, help="MerPO: learning rate of those steps")
    parser.add_argument("--eval-episodes", type=merpo.whole, help="episodes (SMAC: meta-episodes) of each task")
    args = parser.parse_args(argv)
    changes = {key: value for key, value in vars(args).items() if key != "runs" and value is not None}
    return args.runs, changes


def main(argv=None):
    runs, changes = arguments(argv)
    if not runs:
        raise SystemExit(f"{Path(sys.argv[0]).name}: expected the folder of a run, or several")
    torch.set_num_threads(1)
    for run in runs:
        try:
            row, path = test(run, changes), result(run, changes)
        except FloatingPointError as error:
            print(f"{Path(sys.argv[0]).name}: {run}: {error}", file=sys.stderr)
            raise SystemExit(3) from None
        path.parent.mkdir(exist_ok=True)
        data.write(path, lambda file, row=row: file.write(json.dumps(row, indent=1).encode()))
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        print(run, *(f"{key} {value:.4g}" for key, value in numbers.items()), flush=True)


if __name__ == "__main__":
    main()
