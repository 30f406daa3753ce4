"""Everything that needs a CUDA device, in one command: tests, speed, the walkers' data from nothing, results.

python benchmark/cuda.py --out cuda-results --minutes 9

The parts run in order of value, each at most as long as its limit, the seeds of a part side by side on the one device.
Into --out go a few small files, written as results come: log.txt, tables of speed (compiled too), profile.txt,
results.csv (every evaluation of every run), pictures.tar, logs.tar and parts.json, how each part ended. The same
command goes on where the last one ended, also on another machine if --out came along: what succeeded is not done again,
but for data that are gone and still needed; nor are tests and speeds that failed or ran past their own limit, but for
those that --only names. Data and runs stay in --work, and the two archives hold what is there.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
COLUMNS = ["part", "run", "step", "seconds", "return_mean", "return_std", "train_return_mean", "offline_return_mean"]
COLUMNS += ["meta_return_mean", "esr", "q_mean", "critic_loss", "actor_loss"]
DATA = "walker-params/20+5-seed0", "point-robot-wind/40+10-seed0"
SCRIPTS = "focal.py", "focal_pp.py", "smac.py", "merpo.py"
GRACE = 3.0  # seconds that a command has to end once it is told to


@dataclass
class Part:
    """Commands that run side by side: {name: words}; `limit` in seconds."""

    name: str
    limit: float
    commands: dict[str, list[str]]
    once: bool = False  # not again if it failed or ran past its limit, only if no time was left
    needs: list[Path] = field(default_factory=list)  # without these it is left out
    makes: list[Path] = field(default_factory=list)  # without these it is done again, if they are needed


def parts(args):
    """What there is to do, the most valuable first."""
    walker, wind = (args.work / "datasets" / name / "mixed.npz" for name in DATA)
    place = ["--data-dir", str(args.work / "datasets"), "--device", args.device]

    def seeds(script, words):
        command = [f"{script}.py", "--env", *words.split(), *place, "--run-dir", str(args.work / "runs"), "--resume"]
        return {f"{script} seed {k}": [*command, "--seed", str(k)] for k in range(args.seeds)}

    def build(name, limit, path, *more):
        words = ["data.py", "--env", path.parent.parent.name, *place, *more]
        return Part(name, limit, {path.parent.parent.name: words}, makes=[path])

    def speed(name, limit, *more):
        words = ["benchmark/speed.py", "--out", str(args.out / f"{name}.csv"), "--seconds", "0.5", *more]
        return Part(name, limit, {name: words}, once=True)

    profile = ["benchmark/speed.py", "--profile", str(args.out / "profile.txt"), "--size", "paper"]
    pytest = ["-m", "pytest", "-q", "-n", "0", "--tb=short", "-rf", "-p", "no:cacheprovider", "-m", "cuda", "tests"]
    tasks = "--train-tasks 20 --test-tasks 5 --quality mixed"
    plan = [
        build("walker data", 330, walker),
        speed("speed", 100, "--size", "paper"),
        Part("focal", 200, seeds("focal", "walker-params"), needs=[walker]),
        speed("compiled", 150, "--size", "paper", "--compile", "--only", "focal"),
        Part("tests", 100, {"tests": pytest}, once=True),
        speed("compiled-focal_pp", 200, "--size", "paper", "--compile", "--only", "focal_pp"),
        Part("profile", 60, {"profile": profile}, once=True),
        speed("speed-wider", 40, "--size", "paper", "--only", "focal", "--flags", "--hidden 320"),  # fits tiles
        Part("focal_pp", 240, seeds("focal_pp", "walker-params"), needs=[walker]),
        Part("smac", 240, seeds("smac", f"walker-params {tasks} --steps 20000 --online-steps 20000 --updates 1"),
             needs=[walker]),
        Part("merpo", 240, seeds("merpo", "walker-params --steps 200 --model-steps 400"), needs=[walker]),
        Part("building", 45, {"building": ["benchmark/building.py", "--wider", "1", "2", "4"]}, once=True),
        speed("speed-small", 60, "--size", "small"),
        build("wind data", 60, wind),
    ]  # fmt: skip
    return shrunk(plan, wind) if args.tiny else plan


TINY = {
    "data.py": "--sac-steps 800 --checkpoints 2 --trajectories 4 --workers 1",
    "benchmark/building.py": "--env cheetah-fwd-back --tasks 2 --seconds 0.1 --device cpu --wider 1",
    "benchmark/speed.py": "--only sac --size small --env point-robot-wind --seconds 0.01 --device cpu",
    "focal.py": "--encoder-hidden 8 --context-size 8 --eval-every 1",
    "focal_pp.py": "--encoder-hidden 16 --blocks 1 --context-size 8 --eval-every 1",
    "smac.py": "--train-tasks 40 --test-tasks 10 --data-size 40 --data-until 40 --online-steps 40 --updates 0.01"
    " --eval-every 1",
    "merpo.py": "--model-steps 1 --rollouts 5 --layers 2 --model-hidden 8 --adapt-steps 1 --inner-steps 1",
}
TINY_RUN = "--hidden 8 --meta-batch-size 2 --batch-size 8 --eval-episodes 1 --threads 1 --steps 2"


def shrunk(plan, wind):
    """The same parts with sizes that take seconds on a CPU, all on winds."""
    for part in plan:
        for name, command in part.commands.items():
            script = command[0]
            if script == "-m":
                part.commands[name] = ["-c", "print('no tests')"]
                continue
            if "--env" in command:
                command[command.index("--env") + 1] = "point-robot-wind"
            command += TINY[script].split() + (TINY_RUN.split() if script in SCRIPTS else [])
        part.makes, part.needs = [wind] if part.makes else [], [wind] if part.needs else []
    return plan


class Results:
    """What is kept in --out."""

    def __init__(self, args):
        self.args, self.ended, self.rows = args, {}, {}
        args.out.mkdir(parents=True, exist_ok=True)
        if (args.out / "parts.json").exists():
            self.ended = json.loads((args.out / "parts.json").read_text())
        if (args.out / "results.csv").exists():
            with open(args.out / "results.csv") as file:
                self.rows = {(row["part"], row["run"], row["step"]): row for row in csv.DictReader(file)}

    def say(self, text):
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        with open(self.args.out / "log.txt", "a") as file:
            file.write(line + "\n")

    def gather(self, part, folders):
        """The evaluations so far of the runs in `folders`, {name: folder}, beside those of before."""
        for name, folder in folders.items():
            path = folder / "metrics.csv"
            if path.exists():
                with open(path) as file:
                    for row in csv.DictReader(file):
                        self.rows[part, name, row["step"]] = row | {"part": part, "run": name}
        self.write("results.csv", self.write_rows)

    def write_rows(self, file):
        table = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows.values())

    def write(self, name, save):
        with open(self.args.out / f".{name}", "w") as file:
            save(file)
        os.replace(self.args.out / f".{name}", self.args.out / name)

    def end(self, part, status, seconds):
        self.ended[part.name] = {"status": status, "seconds": round(seconds, 1), "commands": list(part.commands)}
        self.write("parts.json", lambda file: json.dump(self.ended, file, indent=1))
        self.say(f"{part.name}: {status} after {seconds:.0f} s")

    def pack(self, folders):
        """All curves so far in one file, and whatever the commands printed in another."""
        found = [folder / name for folder in folders for name in ("curve.png", "embeddings.png")]
        with tarfile.open(self.args.out / "pictures.tar", "w") as tar:
            for path in filter(Path.exists, found):
                tar.add(path, "-".join(path.parts[-5:]))
        with tarfile.open(self.args.out / "logs.tar", "w:gz") as tar:
            tar.add(self.args.work / "logs", "logs")


def folder_of(words):
    """Where a run writes, None if these are no script's words."""
    if words[0] not in SCRIPTS:
        return None
    # not at the top: torch, for whom this file is on its path, asks for a module named cuda
    module = __import__(words[0].removesuffix(".py"))
    args = module.parse_args([word if word != "cuda" else "auto" for word in words[1:]])
    return args.run_dir / module.__name__ / args.env / args.variant / f"seed{args.seed}"


def stop(process):
    """Ends a command and what it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


def execute(part, limit, results, args):
    """Runs a part's commands side by side; returns its status."""
    logs = args.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    folders = {name: folder for name, words in part.commands.items() if (folder := folder_of(words))}
    processes, began = {}, time.time()
    how = {"cwd": ROOT, "env": os.environ | {"PYTHONUNBUFFERED": "1"}, "start_new_session": True}
    for name, words in part.commands.items():
        with open(logs / f"{part.name}-{name}.txt".replace(" ", "-"), "w") as log:
            processes[name] = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, **how)
    seen = began
    while any(process.poll() is None for process in processes.values()) and time.time() - began < limit:
        time.sleep(0.1)
        if time.time() - seen > 10:
            results.gather(part.name, folders)
            seen = time.time()
    late = [name for name, process in processes.items() if process.poll() is None]
    for process in processes.values():
        stop(process)
    results.gather(part.name, folders)
    failed = [name for name, process in processes.items() if name not in late and process.returncode]
    for name in part.commands:
        text = (logs / f"{part.name}-{name}.txt".replace(" ", "-")).read_text(errors="replace").splitlines()
        for line in text[-60 if name in failed or part.once else -6 :]:
            results.say(f"  {name} | {line[-300:]}")
    if failed:
        return f"failed: {', '.join(failed)}"
    reached = "stopped at its limit" if limit == part.limit else "stopped, no time left"
    return f"{reached}: {', '.join(late)}" if late else "done"


def settled(part, results, again):
    """How a part ended before, if there is nothing more to do for it; with `again` what failed is tried once more."""
    if part.makes:
        return "done" if all(path.exists() for path in part.makes) else None
    before = results.ended.get(part.name, {"status": "", "commands": []})
    if not set(before["commands"]) >= set(part.commands):
        return None
    final = ("done",) if again or not part.once else ("done", "failed", "stopped at its limit")
    return before["status"] if before["status"].startswith(final) else None


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--work", type=Path, default=f"{tempfile.gettempdir()}/cuda-benchmark", help="data and runs")
    parser.add_argument("--minutes", type=float, default=9, help="for everything; nothing starts or goes on after that")
    parser.add_argument("--seeds", type=int, default=1, help="runs of a part, side by side")
    parser.add_argument("--only", nargs="+", help="these parts")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds on a CPU, to try this script out")
    args = parser.parse_args(argv)
    args.out, args.work = args.out.resolve(), args.work.resolve()
    known = [part.name for part in parts(args)]
    if not set(args.only or []) <= set(known):
        parser.error(f"--only {' '.join(args.only)}: expected some of {', '.join(known)}")
    return args


def main(argv=None):
    args = arguments(argv)
    deadline, results, undone = time.time() + 60 * args.minutes, Results(args), []
    # imports the scripts, which takes seconds the first time: before anything is told how long it may take
    folders = [folder for part in parts(args) for words in part.commands.values() if (folder := folder_of(words))]
    plan = [part for part in parts(args) if part.name in (args.only or [part.name])]
    wanted = {path: False for part in plan for path in part.needs}
    wanted |= {path: True for part in plan if not settled(part, results, args.only) for path in part.needs}
    for part in plan:
        if before := settled(part, results, args.only):
            results.say(f"{part.name}: {before} before")
            undone += [] if before == "done" else [part.name]
            continue
        if part.makes and not any(wanted.get(path, True) for path in part.makes):
            results.say(f"{part.name}: nothing left needs it")
            continue
        undone += [part.name]
        left = deadline - time.time() - 2 * GRACE
        if left < (0 if args.tiny else 15):
            results.say(f"{part.name}: no time left")
        elif missing := [str(path) for path in part.needs if not path.exists()]:
            results.say(f"{part.name}: left out, there is no {missing[0]}")
        else:
            results.say(f"{part.name}: at most {min(part.limit, left):.0f} s")
            began = time.time()
            status = execute(part, min(part.limit, left), results, args)
            results.end(part, status, time.time() - began)
            undone = undone[: -1 if status == "done" else None]
            results.pack(folders)
    undone += [name for name, end in results.ended.items() if end["status"] != "done" and name not in undone]
    if undone:
        results.say(f"not done: {', '.join(undone)}")
    return 1 if undone else 0


if __name__ == "__main__":
    raise SystemExit(main())
