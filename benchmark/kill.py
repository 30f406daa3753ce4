"""Kills data building and the four scripts at random moments: what goes on from there ends as if nothing had happened.

python benchmark/kill.py                       # 20 kills of each; a line for each kill, then a verdict
python benchmark/kill.py smac merpo --kills 5 --seed 1 --no-pictures

Each kill is a run from nothing, ended by SIGKILL, then the same command again (with --resume) to its end. Compared with
an uninterrupted run: metrics.csv but for its column `seconds`, the checkpoint's weights, optimisers and random states;
of data building the datasets' bytes. At the moment of the kill no file may stand half-written under a final name. Runs
are forks of this process, which has everything imported, on one thread.
"""

import argparse
import contextlib
import csv
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib.figure  # noqa: F401  (before the forks)
import torch
from retest import whole

import data
import focal
import focal_pp
import merpo
import smac

FORK = multiprocessing.get_context("fork")
WIND, SIZES = "point-robot-wind", {"train": 4, "test": 2, "device": "cpu"}
BEHAVIOUR = {"steps": 800, "envs": 4, "updates": 1, "start": 80, "hidden": 16, "batch": 16, "checkpoints": 10}
BEHAVIOUR |= {"trajectories": 200, "shard": 2}
SMALL = "--hidden 16 --batch-size 16 --meta-batch-size 3 --eval-episodes 1 --device cpu --threads 1"
CONTEXT = " --encoder-hidden 16 --context-size 16 --latent 3"
FLAGS = {
    focal: SMALL + CONTEXT + " --steps 60 --encoder-steps 30 --eval-every 20 --alpha 50 --value-penalty",
    focal_pp: SMALL + CONTEXT + " --steps 45 --encoder-steps 20 --eval-every 15 --alpha 50 --value-penalty",
    smac: SMALL + CONTEXT + " --steps 20 --eval-every 20 --data-size 400 --context-data 200"
    " --online-steps 240 --online-envs 4 --updates 0.25",
    merpo: SMALL + " --layers 2 --model-hidden 16 --model-layers 2 --model-steps 12 --steps 12 --eval-every 6"
    " --inner-steps 2 --adapt-steps 5 --model-adapt-steps 5 --rollouts 20 --rollout-buffer 400",
}  # fmt: skip
NAMES = {"data": None} | {module.__name__: module for module in FLAGS}
STORED = "step", "agent", "optimisers", "random", "dataset", "policies", "early"  # of a checkpoint and of behaviour


# ------------------------------------------------------------------------------------------------- runs and their ends
def build(folder):
    """Both stages, in this process, which saves many times."""
    data.SAVE_EVERY = 0.05
    for quality in ("mixed", "replay"):
        data.prepare(WIND, quality, 1, folder, workers=1, **SIZES, **BEHAVIOUR)


def learn(module, folder, dataset):
    flags = [*FLAGS[module].split(), "--env", WIND, "--data", str(dataset), "--run-dir", str(folder), "--resume"]
    module.main(flags)


def spent(pid):
    """Seconds of processor time of a process, so that moments do not depend on what else runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def run(job, log, seconds=math.inf):
    """Runs job() in a process of its own; ends it after so much processor time. Its exit code, and how much it took."""

    def silently():
        with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            job()

    process, took = FORK.Process(target=silently), 0.0
    process.start()
    while process.is_alive() and took < seconds:
        process.join(0.005)
        took = max(took, spent(process.pid))
    process.kill()
    process.join()
    return process.exitcode, took


def run_whole(name, job, log):
    """The processor time that job() takes."""
    code, took = run(job, log)
    if code != 0:
        sys.exit(f"kill.py: {name} ended with exit code {code}: {log.read_text()[-300:]}")
    return took


def outcome(folder):
    """What must be the same: every final file, without what tells the time."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        key = str(path.relative_to(folder))
        if path.suffix == ".npz":
            found[key] = path.read_bytes()
        elif path.name == "metrics.csv":
            with open(path) as file:
                found[key] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
        elif path.suffix == ".pt":
            found[key] = {part: value for part, value in data.read(path).items() if part in STORED}
        else:
            found[key] = None  # it is there
    return found


def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def broken(folder):
    """Files that stand half-written under their final names."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        try:
            if path.suffix == ".npz":
                data.load(path, WIND)
            elif path.suffix == ".pt":
                data.read(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
            elif path.suffix == ".csv":
                header, *rows = csv.reader(path.read_text().splitlines())
                assert rows and all(len(row) == len(header) for row in rows) and path.read_text().endswith("\n")
            elif path.suffix == ".py":
                compile(path.read_text(), path, "exec")
            else:
                raise AssertionError
        except Exception as error:
            found.append(f"{path.name} ({type(error).__name__})")
    return found


# ------------------------------------------------------------------------------------------------------------- campaign
def campaign(name, kills, rng, root, dataset):
    """Kills one program; True if every kill ended well."""
    module = NAMES[name]
    job = lambda folder: lambda: learn(module, folder, dataset) if module else build(folder)
    took = run_whole(name, job(root / "whole"), root / "log")
    expected, well = outcome(root / "whole"), True
    for kill in range(kills):
        # one in each part of the run, but for its last tenth: runs differ a little in the time they take
        folder, moment = root / f"kill{kill}", 0.9 * took * (kill + rng.random()) / kills
        killed, _ = run(job(folder), root / "log", moment)
        half, saved = broken(folder), sorted(path.name for path in folder.rglob("*") if path.suffix in (".pt", ".npz"))
        left = sum(1 for _ in folder.rglob("*.tmp"))
        code, _ = run(job(folder), root / "log")
        good = killed in (0, -9) and code == 0 and not half and same(outcome(folder), expected)
        kind = "killed" if killed == -9 else f"ended before ({killed})"
        print(
            f"{name:<8} {kind} at {moment:5.2f} of {took:.2f} s, {', '.join(saved) or 'nothing'} saved; "
            f"{left} temporary files left; half-written: {', '.join(half) or 'none'}; resumed (exit code {code}): "
            f"{'the same' if good else 'NOT the same'}",
            flush=True,
        )
        well &= good
        shutil.rmtree(folder)
    return well


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs="*", metavar="program", help=", ".join(NAMES) + "; default: all")
    parser.add_argument("--kills", type=whole, default=20, help="of each program")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--no-pictures", action="store_true", help="leave out what takes most of the time")
    args = parser.parse_args()
    if not set(args.programs) <= set(NAMES):
        parser.error(f"expected some of {', '.join(NAMES)}")
    if args.no_pictures:
        data.plot = lambda *_: None
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)]).step()  # imports much, once
    well, rng = {}, random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        # in a process of its own: the threads of its pool must not be forked
        run_whole("data building", lambda: build(root / "dataset"), root / "log")
        dataset = next((root / "dataset").rglob("mixed.npz"))
        for name in args.programs or NAMES:
            (root / name).mkdir()
            well[name] = campaign(name, args.kills, rng, root / name, dataset)
    verdict = "the same every time" if all(well.values()) else "NOT THE SAME"
    print(f"{args.kills} kills of each of {', '.join(well)}: {verdict}")
    sys.exit(0 if all(well.values()) else 1)


if __name__ == "__main__":
    main()
