"""Figures and tables of the papers: runs what they need, side by side on the cores, and draws them into results/.

python benchmark/paper.py focal figure2 table6          # three seeds, small sizes
python benchmark/paper.py focal_pp table1 --env point-robot-wind --seeds 5

A run that is done is not run again, one that was killed goes on. Each writes results/<script>-<figure>-<env>.csv, one
row for each run, and a PNG: bands of learning curves go from the lowest to the highest seed, those of tests are the
standard deviation. A curve has the steps that all of its seeds have.
Variants with flags behind | are one trained agent, tested under all of them (retest.py).
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import bcq
import numpy as np
import report
import retest
from matplotlib.figure import Figure

import data
import envs
import focal
import focal_pp
import merpo
import smac

ROOT = report.ROOT
PEARL = "--encoder probabilistic --encoder-loss bellman"
# figure: (environments, flags of every run, {variant: its flags}, columns of metrics.csv to draw); a variant may begin
# with the name of another script; flags behind | are those of retest.py
COUPLED = {"FOCAL": "", "coupled": "--coupled"}
SEPARATED = ["return_mean", "train_esr", "q_mean"]
FOCAL = {
    "figure2": (
        ["cheetah-vel"],
        "--latent 5 --alpha 500 --value-penalty --beta 1",
        {law: f"--dml {law}" for law in focal.LAWS},
        ["return_mean", "train_esr", "train_rms"],
    ),
    "figure4": (
        ["walker-params", "cheetah-vel", "point-robot-wind", "sparse-point-robot"],
        "",
        {
            "FOCAL": "",
            "probabilistic encoder": "--encoder probabilistic",
            "Batch PEARL, regularised": f"{PEARL} --alpha 20 --value-penalty",
            "Batch PEARL": f"{PEARL} --alpha 0",
            "Contextual BCQ": "bcq --encoder-loss bellman",
            "z is noise": "--encoder probabilistic --kl-weight 1000",  # not in the paper: what is there without z?
        },
        SEPARATED,
    ),
    "baselines": (  # not in the paper
        ["sparse-point-robot", "point-robot-wind", "walker-params"],
        "",
        {"FOCAL": "", "z = 0": "--encoder none", "behaviour cloning given z": "--actor clone"},
        SEPARATED,
    ),
    "figure5": (["walker-params"], "--value-penalty", COUPLED, SEPARATED),
    "figure9": (["walker-params"], "--no-value-penalty --alpha 50", COUPLED, SEPARATED),
    "figure10": (
        ["walker-params", "ant-fwd-back"],
        "",
        {"FOCAL": "", "without regularisation": "--alpha 0", "Batch PEARL": f"{PEARL} --alpha 0"},
        ["return_mean", "q_mean", "critic_loss"],
    ),
    "table6": (
        ["sparse-point-robot"],
        "",
        {
            f"{a} / {b}": f"--quality {a} --test-quality {b}"
            for a, b in [
                ("expert", "expert"), ("medium", "medium"), ("random", "random"), ("mixed", "mixed"),
                ("expert", "medium"), ("expert", "random"), ("medium", "expert"), ("medium", "random"),
            ]
        },
        ["return_mean", "esr"],
    ),
}  # fmt: skip
ROWS = {
    "FOCAL": "--attention none --encoder-loss dml",
    "contrastive": "--attention none",
    "batch-wise": "--attention batch",
    "seq-wise": "--attention seq",
    "FOCAL++": "",
}
# on relabelled data: the paper's temperature, and contexts as on MuJoCo
RELABELLED = {row: f"{flags} --context-size 64" for row, flags in ROWS.items()}
RELABELLED |= {row: f"{flags} --temperature 0.5" for row, flags in RELABELLED.items() if row != "FOCAL"}
SHIFTS = {
    f"{row}, {quality} test data": f"{ROWS[row]} | --test-quality {quality}"
    for row in ("FOCAL", "FOCAL++")
    for quality in ("mixed", "expert", "medium", "random")
}
VARIANCE = ["return_mean", "train_variance"]
FOCAL_PP = {
    # Tables 1 and 2: sparse contexts on the MuJoCo families whose rewards differ; on sparse-point-robot they always are
    "table1": (["sparse-point-robot", "point-robot-wind", "walker-params"], "", ROWS, VARIANCE),
    "table1-sparse": (["cheetah-vel", "cheetah-fwd-back", "ant-fwd-back"], "--sparse", ROWS, VARIANCE),
    "table3": (["sparse-point-robot", "walker-params"], "", SHIFTS, ["return_mean", "variance"]),
    "figure5": (["sparse-point-robot"], "--quality relabelled --encoder-steps 4000", RELABELLED, SEPARATED[:2]),
}
BOTH = ["return_mean", "offline_return_mean", "short_kl"]
SMAC = {
    "figure5": (
        ["sparse-point-robot", "cheetah-vel", "ant-dir", "walker-params", "hopper-params", "humanoid-dir", "sawyer"],
        "",
        {
            "SMAC": "",
            "online oracle": "--online-rewards oracle",
            "SAC ablation": "--actor sac",
            "meta behaviour cloning": "--actor bc",
        },
        BOTH,
    ),
    "figure7": (
        ["walker-params", "hopper-params", "humanoid-dir", "sparse-point-robot"],
        "",
        {"SMAC": "", "only Q loss": "--encoder-loss q", "Q and reward loss, online Q only": "--encoder-loss reward+q"},
        BOTH,
    ),
    "figure9": (
        ["sawyer", "sparse-point-robot"],  # where dynamics are alike, so are training and test tasks without rewards
        "",
        {
            "training tasks": "",
            "test tasks": "--online-tasks test",
            "oracle on test tasks": "--online-tasks test --online-rewards oracle",
        },
        BOTH,
    ),
}
GOOD = "--seed 0 --threads 1 --single rac"  # of this run of Figures 4 and 5 the last policy is the good meta-policy
META = {"random": "", "good": "--meta-policy GOOD"}
SHARES = {0: "--single combo-3"} | {alpha: f"--single rac --alpha {alpha}" for alpha in (0.4, 0.7, 1)}
TRAJECTORIES = 1, 5, 20, 50
ADAPTED = ["return_mean", "meta_return_mean", "q_mean"]
FAMILIES = ["point-robot-wind", "walker-params", "cheetah-fwd-back", "ant-fwd-back"]
# nothing of how test tasks begin reaches training: figures that compare such ways share the runs of figure7a
MERPO = {
    "figure4": (
        ["halfcheetah", "hopper", "walker2d"],
        "",
        {"COMBO": "--single combo"}
        | {
            f"{name}, {kind} meta-policy": f"--single {name.lower()} {flags}"
            for kind, flags in META.items()
            for name in ("COMBO-3", "RAC")
        },
        ["return_mean", "q_mean"],
    ),
    "figure5": (  # a mean over meta-policies; alpha = 0 is COMBO-3, alpha = 1 the same with any meta-policy
        ["halfcheetah", "hopper"],
        "",
        {
            f"alpha = {a}, {quality} data, {kind} meta-policy": f"{share} --quality {quality} {flags if a < 1 else ''}"
            for quality in ("random", "medium", "expert")
            for a, share in SHARES.items()
            for kind, flags in META.items()
        },
        ["return_mean"],
    ),
    "figure6": (FAMILIES, "--test-start meta", {"MerPO": "", "MerPO-Adp": "--adaptive"}, [*ADAPTED[:2], "alpha"]),
    "figure7a": (FAMILIES[:2], "--test-start meta", {"MerPO": "", "Eq. 5 alone": "--alpha 0"}, ADAPTED),
    "figure7b": (FAMILIES[:2], "", {"with model": "", "without": "--no-model"}, ADAPTED),
    "figure7c": (
        FAMILIES[:2],
        "--test-start meta",
        {
            f"{name}, {quality} test data": f"| --test-start {start} --test-quality {quality}"
            for name, start in (("with meta", "meta"), ("behaviour only", "behaviour-init"))
            for quality in ("random", "medium", "expert")
        },
        ADAPTED,
    ),
    "figure9a": (FAMILIES[:1], "", {f"real ratio {f}": f"--real-ratio {f}" for f in (0.2, 0.5, 0.8)}, ADAPTED),
    "figure9b": (
        FAMILIES[:2],
        "--test-start meta",
        {start: f"| --test-start {start}" for start in merpo.STARTS},
        ADAPTED,
    ),
    "figure10": (FAMILIES[:1], "", {f"trajectories: {n}": f"| --test-trajectories {n}" for n in TRAJECTORIES}, ADAPTED),
}
AVERAGED = "merpo", "figure5"  # over meta-policies
FIGURES = {"focal": FOCAL, "focal_pp": FOCAL_PP, "smac": SMAC, "merpo": MERPO}
SCRIPTS = {script.__name__: script for script in (focal, focal_pp, smac, merpo, bcq)}
COLUMNS = dict.fromkeys(("focal", "focal_pp"), ["return_mean", "train_return_mean", "esr", "train_esr", "rms"])
COLUMNS = {script: [*keys, "train_rms", "train_variance", "q_mean"] for script, keys in COLUMNS.items()}
COLUMNS["smac"] = ["return_mean", "offline_return_mean", "short_return_mean", "prior_return_mean"]
COLUMNS["smac"] += ["train_return_mean", "train_offline_return_mean", "kl", "short_kl", "offline_kl", "q_mean"]
COLUMNS["merpo"] = ["return_mean", "meta_return_mean", "q_mean", "lambda", "alpha", "beta", "d_behaviour", "d_meta"]
STEPS = dict.fromkeys(FIGURES, "gradient steps") | {"merpo": "iterations of both stages"}
SHOWN = {"return_mean", "meta_return_mean", "offline_return_mean", "train_esr", "train_variance", "q_mean"}
LABELS = {"return_mean": "return on test tasks", "train_return_mean": "return on training tasks", "q_mean": "Q"}
LABELS |= {"train_esr": "ESR of training tasks", "esr": "ESR of test tasks", "train_rms": "RMS"}
LABELS |= {"offline_return_mean": "return, offline context", "short_kl": "KL of online posteriors"}
LABELS |= {"meta_return_mean": "return of the meta-policy itself"}
LABELS |= {"train_variance": "variance of a task's embedding", "variance": "variance of a test task's embedding"}


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", choices=list(FIGURES))
    parser.add_argument("figures", nargs="+", choices=[name for figures in FIGURES.values() for name in figures])
    parser.add_argument("--env", choices=list(envs.FAMILIES), help="this environment only")
    parser.add_argument("--seeds", type=retest.whole, default=3)
    parser.add_argument("--steps", type=retest.whole, help="the script's own --steps, of each run")
    parser.add_argument("--jobs", type=retest.whole, default=envs.cores(), help="runs side by side, one thread each")
    parser.add_argument("--full", action="store_true", help="the paper's sizes")
    args = parser.parse_args(argv)
    for figure in set(args.figures) - set(FIGURES[args.script]):
        parser.error(f"{args.script} has no {figure}; expected {', '.join(FIGURES[args.script])}")
    for figure in args.figures:
        families = FIGURES[args.script][figure][0]
        if args.env and args.env not in families:
            parser.error(f"{figure} is not of --env {args.env}; expected {', '.join(families)}")
    return args


class Run(NamedTuple):
    figure: str
    env: str
    variant: str
    seed: int
    script: str
    words: list  # its command line
    tested: list  # flags of retest.py, if the row is a test of the run


def plan(args):
    """Every run of the figures."""
    runs = []
    for figure in args.figures:
        families, shared, variants, _ = FIGURES[args.script][figure]
        for env in [env for env in families if args.env in (None, env)]:
            for variant, flags in variants.items():
                trained, _, tested = flags.partition("|")
                first, _, rest = trained.partition(" ")
                script, trained = (first, rest) if first in SCRIPTS else (args.script, trained)
                for seed in range(args.seeds):
                    words = f"--env {env} --seed {seed} --threads 1 {shared} {trained}".split()
                    size = ["--no-small" if args.full else "--small"]
                    size += ["--steps", str(args.steps)] if args.steps else []
                    if "GOOD" in words:
                        good = path_of(script, ["--env", env, *GOOD.split(), *size])
                        words[words.index("GOOD")] = str(good)
                    runs.append(Run(figure, env, variant, seed, script, words + size, tested.split()))
    return runs


def path_of(script, words):
    """The folder of a run, whether it exists or not."""
    args = SCRIPTS[script].parse_args(words)
    return args.run_dir / script / args.env / args.variant / f"seed{args.seed}"


def is_done(script, words):
    """Whether a run is finished; DataError if it was made with what are other defaults by now."""
    folder, args = path_of(script, words), SCRIPTS[script].parse_args(words)
    if not (folder / "final.json").exists():
        return False
    then = json.loads((folder / "final.json").read_text())["args"]
    for key, now in json.loads(json.dumps(data.plain(args))).items():
        if key not in (*args.ELSEWHERE, "variant") and then.get(key, now) != now:
            message = f"made with {data.option(key)} {then[key]}, now {now}; delete it to run it anew"
            raise data.DataError(f"{folder}: {message}")
    return True


def execute(script, words):
    """Runs the script unless that run is done. A run that diverges keeps what it had."""
    folder = path_of(script, words)
    if not is_done(script, words):
        folder.mkdir(parents=True, exist_ok=True)
        begun = ["--resume"] if (folder / "checkpoint.pt").exists() else []  # never from a run of another length
        command = [sys.executable, SCRIPTS[script].__file__, *words, *begun]
        with open(folder / "log.txt", "w") as log:
            done = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        last = (folder / "log.txt").read_text().splitlines()[-1:]
        print(script, *words, "|", *last, flush=True)
        if done.returncode not in (0, 3):
            raise SystemExit(done.returncode)


def execute_tool(name, folder, *words):
    """A tool of this folder on a run; ends the program unless it went well or an adaptation diverged."""
    command = [sys.executable, ROOT / "benchmark" / name, folder, *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode not in (0, 3):
        raise SystemExit(done.returncode)


def execute_test(folder, tested):
    """retest.py on a run that is done, unless that was done since, or the run diverged before it had an agent."""
    path, checkpoint = result_of(folder, tested), folder / "checkpoint.pt"
    if checkpoint.exists() and not (path.exists() and path.stat().st_mtime >= checkpoint.stat().st_mtime):
        path.unlink(missing_ok=True)  # an adaptation that diverges leaves none
        execute_tool("retest.py", folder, *tested)


def result_of(folder, tested):
    return retest.result(folder, retest.arguments(tested)[1])


def build_data(parsed):
    """The datasets of runs with these arguments, before the runs: they would wait for one another."""
    wanted = {(p.env, q, *(getattr(p, f"{part}_tasks", None) for part in ("train", "test")))
              for p in parsed for q in (p.quality, p.test_quality)}  # fmt: skip
    for env, quality, train, test in sorted(wanted, key=str):
        data.prepare(env, quality, train=train, test=test)


def metrics(folder):
    path = folder / "metrics.csv"
    if not path.exists():  # diverged before the first evaluation
        return []
    return [{key: float(value) for key, value in row.items()} for row in report.read(path)]


def scored(history, key="return_mean"):
    """A column of the evaluations that had test tasks to score: stage 1 of MerPO has none."""
    return [row.get(key, np.nan) for row in history if not np.isnan(row["return_mean"])]


def last(history, key):
    """Its mean over the last three."""
    return float(np.mean(scored(history, key)[-3:] or np.nan))


def summarise(script, runs, folders):
    """One row for each run: means over its last three evaluations, or what retest.py found."""
    rows = []
    for run, folder in zip(runs, folders, strict=True):
        row = {"env": run.env, "variant": run.variant, "seed": run.seed}
        if run.tested:
            path = result_of(folder, run.tested)
            found = json.loads(path.read_text()) if path.exists() else {"step": 0, "return_mean": np.nan}
            whole = path.exists() and (folder / "final.json").exists()
            row |= {"steps": found["step"], "diverged": int(not whole)}
            row |= {f"return_after_{steps}": value for steps, value in found.get("returns", {}).items()}
            rows.append(row | {key: value for key, value in found.items() if key not in ("flags", "step", "returns")})
            continue
        history, final = metrics(folder), folder / "final.json"
        row["steps"] = int(history[-1]["step"]) if history else 0
        row["diverged"] = int(not final.exists())
        for key in COLUMNS[script]:
            row[key] = float(f"{last(history, key):.6g}")
        offline = [x for x in history if x.get("online_steps") == 0][-1:]
        for key in ("return_mean", "offline_return_mean", "short_kl") if offline else ():
            row[f"{key}_after_offline_phase"] = float(f"{offline[0][key]:.6g}")
        row["data_return"] = json.loads(final.read_text())["behaviour_return"] if final.exists() else None
        rows.append(row)
    return rows


def draw(script, figure, env, runs, folders, suffix, rows):
    _, _, variants, columns = FIGURES[script][figure]
    path = ROOT / "results" / f"{script}-{figure}-{env}{suffix}.png"
    title = f"{script}, {figure} on {env}"
    if (script, figure) == AVERAGED:
        draw_shares(path, title, rows)
    elif runs[0].tested or all(len(scored(metrics(folder))) < 2 for folder in folders):  # there is no curve
        draw_tests(path, title, {name: [row for row in rows if row["variant"] == name] for name in variants})
    else:
        pairs = list(zip(folders, runs, strict=True))
        groups = {name: [folder for folder, run in pairs if run.variant == name] for name in variants}
        draw_curves(path, title, groups, columns, STEPS[script])


def draw_curves(path, title, groups, columns, step_of):
    """A panel for each column of metrics.csv, in it a curve for each {label: folders of its seeds}, their mean, and as
    a band the lowest and the highest of them."""
    picture = Figure(figsize=(4.2 * len(columns), 3.4), layout="constrained")
    panels = picture.subplots(1, len(columns), squeeze=False)[0]
    for colour, (label, folders) in enumerate(groups.items()):
        histories = [metrics(folder) for folder in folders]
        step = sorted(set.intersection(*({row["step"] for row in history} for history in histories)))
        if not step:
            continue
        histories = [[row for row in history if row["step"] in step] for history in histories]
        for axes, column in zip(panels, columns, strict=True):
            values = np.array([[row.get(column, np.nan) for row in history] for history in histories])
            axes.fill_between(step, values.min(0), values.max(0), color=f"C{colour}", alpha=0.15, linewidth=0)
            axes.plot(step, values.mean(0), f"{'osD^vPX*'[colour % 8]}-", color=f"C{colour}", markersize=3, label=label)
    for axes, column in zip(panels, columns, strict=True):
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel=step_of, title=LABELS.get(column, column.replace("_", " ")))
        if column == "return_mean" and "offline_return_mean" in columns:
            axes.set_title("return, online context")
        low, high = axes.get_ylim()
        if column in ("q_mean", "critic_loss") and max(abs(low), abs(high)) > 1e4:  # something diverges
            axes.set_yscale("log") if column == "critic_loss" else axes.set_yscale("symlog", linthresh=100)
    handles, columns_of = panels[0].get_legend_handles_labels(), min(2 * len(columns) - 1, 4, len(groups))
    picture.legend(*handles, loc="outside lower center", ncols=columns_of, fontsize="small")
    picture.suptitle(title, fontsize="medium")
    picture.savefig(path, dpi=110)


def over_meta_policies(rows):
    """{(alpha, quality of the data): returns (meta-policies, seeds)} of MerPO's Figure 5."""
    groups = {}
    for row in rows:
        alpha, quality, kind = row["variant"].split(", ")
        groups.setdefault((alpha, quality), {}).setdefault(kind, []).append(row["return_mean"])
    return {key: np.array(list(kinds.values())) for key, kinds in groups.items()}


def draw_shares(path, title, rows):
    """A bar for each alpha and quality of the data: the mean over meta-policies, with the standard deviation of that
    over seeds; triangles are the random meta-policy alone (down) and the good one (up)."""
    picture, groups = Figure(figsize=(6.4, 3.6), layout="constrained"), over_meta_policies(rows)
    axes = picture.add_subplot(title=title, ylabel="return")
    alphas, qualities = (list(dict.fromkeys(column)) for column in zip(*groups, strict=True))
    for (alpha, quality), returns in groups.items():
        i, j = alphas.index(alpha), qualities.index(quality)
        x, label = j + (i + 0.5) / (len(alphas) + 1) - 0.4, None if j else alpha
        axes.bar(x, returns.mean(), 0.17, yerr=returns.mean(0).std(), color=f"C{i}", alpha=0.7, label=label)
        for own, marker, meta in zip(returns, "v^", META, strict=True):
            axes.plot(x, own.mean(), "k" + marker, markersize=4, label=None if i or j else f"{meta} meta-policy")
    behaviour = {row["variant"].split(", ")[1]: row["data_return"] for row in rows}
    for j, quality in enumerate(qualities):
        axes.hlines(behaviour[quality], j - 0.4, j + 0.4, "k", "dotted", label=None if j else "the data")
    axes.set_xticks(range(len(qualities)), qualities)
    picture.legend(loc="outside right center", fontsize="small")
    picture.savefig(path, dpi=110)


def draw_tests(path, title, groups):
    """A bar for each {label: rows of its seeds}: the mean return, with its standard deviation; marks are the return of
    the test tasks' data and, where a task begins at the meta-policy, that of this."""
    picture = Figure(figsize=(6.4, 0.9 + 0.4 * len(groups)), layout="constrained")
    axes, kinds = picture.add_subplot(title=title), list(dict.fromkeys(label.partition(",")[0] for label in groups))
    marks = {"data_return": ("k|", "the test tasks' data"), "return_after_0": ("ko", "the meta-policy")}
    marks["meta_return_mean"] = marks["return_after_0"]
    for i, (label, rows) in enumerate(groups.items()):
        returns = np.array([row["return_mean"] for row in rows])
        axes.barh(i, returns.mean(), xerr=returns.std(), color=f"C{kinds.index(label.partition(',')[0])}", alpha=0.8)
        for key, (mark, name) in marks.items():
            seen = axes.get_legend_handles_labels()[1]
            known = np.array([row.get(key) for row in rows], float)  # a run that diverged has no return of its data
            tested = key == "meta_return_mean" and "clone_return_mean" in rows[0]  # not where such a task begins
            if not (tested or np.isnan(known).all()):
                mean, size = np.nanmean(known), 14 if mark == "k|" else 5
                axes.plot(mean, i, mark, markersize=size, label=None if name in seen else name)
    axes.set(xlabel="return on test tasks", yticks=range(len(groups)), yticklabels=list(groups))
    axes.invert_yaxis()
    picture.legend(loc="outside lower left", ncols=2, fontsize="small")
    picture.savefig(path, dpi=110)


@retest.main_of
def main(argv):
    os.chdir(ROOT)
    args = arguments(argv)
    runs = plan(args)
    build_data([SCRIPTS[run.script].parse_args(run.words + run.tested) for run in runs])
    folders = [path_of(run.script, run.words) for run in runs]
    once = dict(zip(folders, ((run.script, run.words) for run in runs), strict=True))  # figures share runs
    for run in once.values():
        is_done(*run)  # what other defaults made is told before hours of runs
    with ThreadPoolExecutor(args.jobs) as pool:
        for after in (False, True):  # runs that need another run's policy come after it
            chosen = [run for run in once.values() if ("--meta-policy" in run[1]) == after]
            list(pool.map(lambda run: execute(*run), chosen))
        tests = [(folder, run.tested) for folder, run in zip(folders, runs, strict=True) if run.tested]
        list(pool.map(lambda test: execute_test(*test), tests))
    suffix = "-full" if args.full else ""
    for figure, env in dict.fromkeys(run[:2] for run in runs):
        chosen = [i for i, run in enumerate(runs) if run[:2] == (figure, env)]
        mine, places = [runs[i] for i in chosen], [folders[i] for i in chosen]
        rows = summarise(args.script, mine, places)
        report.write(ROOT / "results" / f"{args.script}-{figure}-{env}{suffix}.csv", rows)
        draw(args.script, figure, env, mine, places, suffix, rows)
        for variant in FIGURES[args.script][figure][2]:
            each = [row for row in rows if row["variant"] == variant]
            keys = dict.fromkeys(key for row in each for key in row if key in SHOWN or key.endswith("phase"))
            show = {key: np.array([row.get(key, np.nan) for row in each], float) for key in keys}
            text = "  ".join(f"{key} {value.mean():.6g} ({value.std():.4g})" for key, value in show.items())
            print(f"{figure} {env:<18} {variant:<26} {text}  diverged {sum(row['diverged'] for row in each)}")
        for key, returns in over_meta_policies(rows).items() if (args.script, figure) == AVERAGED else ():
            text = f"{returns.mean():.6g} ({returns.mean(0).std():.4g})"
            print(f"{figure} {env:<18} {', '.join(key):<26} mean over meta-policies {text}")


if __name__ == "__main__":
    main()
