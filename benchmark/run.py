"""Every script on every family it has, with several seeds: results/runs.csv, from which report.py makes the tables.

python benchmark/run.py                                        # everything, side by side on the cores, CPU sizes
python benchmark/run.py --scripts focal smac --envs cheetah-vel --seeds 5
sbatch --array=0-107 --wrap 'python benchmark/run.py --task $SLURM_ARRAY_TASK_ID'   # on a cluster: a job for each run

A run that is done is not run again, one that was killed goes on. `--list` numbers the runs, as --task takes them. The
table keeps the rows of runs that are not in runs/, so it can grow over machines and clones. Each row is one run: its
last and its best evaluation on the test tasks, with contexts from the data (offline) and with contexts that the agent
collected itself (online): SMAC's own evaluations; FOCAL's and FOCAL++'s by online.py, on their last agents.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor

import paper
from paper import FIGURES, ROOT, SCRIPTS, envs, focal, smac
from report import read, write
from retest import main_of, whole

COLUMNS = ["script", "env", "seed", "steps", "offline_last", "offline_best", "online_last", "online_best"]
COLUMNS += ["data_return", "optimum", "minutes"]
# SMAC's own data are few and poor, as in its paper; so it has the 10,000 transitions a task that the others have
SAME_DATA = ["--quality", "mixed", "--data-size", "10000", "--data-until", "10000", "--context-data", "10000"]


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", choices=list(FIGURES), default=list(FIGURES))
    parser.add_argument("--envs", nargs="+", choices=list(envs.FAMILIES), default=list(envs.FAMILIES))
    parser.add_argument("--seeds", type=whole, default=3)
    parser.add_argument("--jobs", type=whole, default=envs.cores(), help="runs side by side, one thread each")
    parser.add_argument("--full", action="store_true", help="the papers' sizes")
    parser.add_argument("--same-data", action="store_true", help="SMAC only, on the other scripts' data")
    parser.add_argument("--list", action="store_true", help="number the runs, and run nothing")
    parser.add_argument("--task", type=int, metavar="I", help="only the run of this number")
    parser.add_argument("--collect", action="store_true", help="run nothing, only write the table")
    args = parser.parse_args(argv)
    if args.same_data and args.scripts not in (list(FIGURES), ["smac"]):
        parser.error("--same-data is of SMAC only; expected no other --scripts")
    if args.same_data and args.full:
        parser.error("--same-data: at the papers' sizes SMAC learns other tasks; expected no --full")
    if not plan(args):
        has = f"{', '.join(args.scripts)} has {' or '.join(args.envs)}"
        parser.error(f"none of {has} among its families of several tasks")
    if args.task is not None and not 0 <= args.task < len(plan(args)):
        parser.error(f"--task {args.task}: expected 0 to {len(plan(args)) - 1}")
    return args


def plan(args):
    """[(script, command line)] of every run: the families of each script's table that have several tasks."""
    more = ["--no-small" if args.full else "--small"] + (SAME_DATA if args.same_data else [])
    return [
        (script, ["--env", env, "--seed", str(seed), "--threads", "1", *more])
        for script in (["smac"] if args.same_data else args.scripts)
        for env in SCRIPTS[script].TABLE
        if env in args.envs and envs.family(env).differs != "nothing"
        if not args.same_data or quality(focal, env) == "mixed" != quality(smac, env)  # else no need
        for seed in range(args.seeds)
    ]


def quality(script, env):
    """Of the data from which a script learns the family at CPU sizes."""
    return script.parse_args(["--env", env, "--small"]).quality


def describe(script, words):
    """The table's row of a run that is done, or None."""
    if not paper.is_done(script, words):
        return None
    args, folder = SCRIPTS[script].parse_args(words), paper.path_of(script, words)
    final, rows = json.loads((folder / "final.json").read_text()), paper.metrics(folder)
    row = {"script": script, "env": args.env, "seed": args.seed, "steps": final["step"]}
    names = {"online": "return_mean", "offline": "offline_return_mean"}
    for protocol, name in names.items() if script == "smac" else [("offline", "return_mean")]:
        returns = [x[name] for x in rows if x[name] == x[name]]
        row |= {f"{protocol}_last": round(returns[-1], 4), f"{protocol}_best": round(max(returns), 4)}
    if (folder / "online.json").exists():
        online = json.loads((folder / "online.json").read_text())
        row |= {"online_last": online["online_return"]} if online["step"] == final["step"] else {}
    row |= {"data_return": final["behaviour_return"], "optimum": final["optimal_return"]}
    return row | {"minutes": round(final["wall_clock_seconds"] / 60, 1)}


def execute(script, words):
    """The run, and its agent under the online protocol where the script does not evaluate that itself."""
    paper.execute(script, words)
    folder = paper.path_of(script, words)
    path, final = folder / "online.json", folder / "final.json"
    online = path.stat().st_mtime if path.exists() else 0
    if script in ("focal", "focal_pp") and final.exists() and final.stat().st_mtime >= online:
        paper.execute_tool("online.py", folder)


def place(row):
    """Where a row of the table stands: by script, family, seed."""
    return list(SCRIPTS).index(row["script"]), list(SCRIPTS[row["script"]].TABLE).index(row["env"]), int(row["seed"])


def collect(runs, path):
    """Writes the runs that are done into the table, over their older rows; the rows of other runs stay."""
    found = [row for row in (describe(*run) for run in runs) if row]
    rows = {place(row): row for row in (read(path) if path.exists() else [])}
    for row in found:  # its online_last may be of another machine's online.py
        before = rows.get(place(row), {})
        same = before.get("offline_last") == str(row["offline_last"])
        rows[place(row)] = ({"online_last": before["online_last"]} if same else {}) | row
    write(path, [rows[key] for key in sorted(rows)], COLUMNS)
    print(f"{path}: {len(found)} of {len(runs)} runs found, {len(rows) - len(found)} rows more from before")


@main_of
def main(argv):
    paper.os.chdir(ROOT)
    args = arguments(argv)
    runs = plan(args)
    if args.list:
        for i, (script, words) in enumerate(runs):
            print(i, f"python {script}.py", *words)
        return
    if not args.collect:
        chosen = runs if args.task is None else [runs[args.task]]
        for run in chosen:
            paper.is_done(*run)
        paper.build_data([SCRIPTS[script].parse_args(words) for script, words in chosen])
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda run: execute(*run), chosen))
    if args.task is None or args.collect:
        kind = "-same-data" if args.same_data else "-full" if args.full else ""
        collect(runs, ROOT / "results" / f"runs{kind}.csv")


if __name__ == "__main__":
    main()
