"""The work list, and the results that the READMEs show: they are what report.py makes of the committed tables."""

import contextlib
import csv
import json
import re
import sys

import numpy as np
import pytest
from conftest import ROOT, script

import data
import focal


@pytest.fixture
def report():
    return script("report")


@pytest.fixture
def run():
    return script("run")


def arguments(run, monkeypatch, words=""):
    monkeypatch.setattr(sys, "argv", ["run.py", *words.split()])
    return run.arguments()


def test_every_run_of_the_work_list_is_one_that_its_script_accepts(run, monkeypatch):
    runs = run.plan(arguments(run, monkeypatch))
    parsed = [run.SCRIPTS[name].parse_args(words) for name, words in runs]
    assert len({(name, args.env, args.seed) for (name, _), args in zip(runs, parsed, strict=True)}) == len(runs)
    assert all(args.small and args.threads == 1 for args in parsed)
    last = int(re.search(r"--array=0-(\d+)", run.__doc__).group(1))
    assert last == len(runs) - 1
    one = run.plan(arguments(run, monkeypatch, "--scripts smac --envs ant-dir --seeds 2 --full"))
    words = "--env ant-dir --seed {} --threads 1 --no-small"
    assert [words for _, words in one] == [words.format(seed).split() for seed in range(2)]


def test_a_run_that_is_not_in_the_list_is_refused(run, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        arguments(run, monkeypatch, "--scripts smac --envs ant-dir --task 3")
    assert "--task 3: expected 0 to 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        arguments(run, monkeypatch, "--scripts merpo --envs humanoid-dir --list")
    assert "none of merpo has humanoid-dir" in capsys.readouterr().err


def test_a_run_that_is_not_done_is_not_in_the_table(run, tmp_path):
    words = ["--env", "point-robot-wind", "--small", "--run-dir", str(tmp_path)]
    assert run.describe("focal", words) is None
    args, folder = focal.parse_args(words), run.paper.path_of("focal", words)
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(f"step,return_mean\n1,-7\n2,-5\n{args.steps},-6\n")
    assert run.describe("focal", words) is None
    final = {"step": args.steps, "behaviour_return": -8, "optimal_return": -4, "wall_clock_seconds": 90}
    final["args"] = json.loads(json.dumps(data.plain(args)))
    (folder / "final.json").write_text(json.dumps(final))
    row = run.describe("focal", words)
    assert (row["offline_last"], row["offline_best"], row["data_return"], row["minutes"]) == (-6, -5, -8, 1.5)
    assert "online_last" not in row
    online = '{"online_return": -6.5, "step": %d}'
    (folder / "online.json").write_text(online % (args.steps - 1))  # of a shorter run
    assert "online_last" not in run.describe("focal", words)
    (folder / "online.json").write_text(online % args.steps)
    assert run.describe("focal", words)["online_last"] == -6.5
    final["args"] |= {"lr": 0.5, "threads": 7}  # a default was another then
    (folder / "final.json").write_text(json.dumps(final))
    message = f"{folder}: made with --lr 0.5, now {args.lr}; delete it to run it anew"
    for look in (run.describe, run.execute):
        with pytest.raises(data.DataError, match=re.escape(message)):
            look("focal", words)


def test_smac_has_returns_on_its_own_and_on_the_datas_contexts(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run.paper, "is_done", lambda *_: True)
    monkeypatch.setattr(run.paper, "path_of", lambda *_: tmp_path)
    (tmp_path / "metrics.csv").write_text("step,return_mean,offline_return_mean\n1,3,4\n2,1,2\n")
    final = {"step": 2, "behaviour_return": 0, "optimal_return": None, "wall_clock_seconds": 60}
    (tmp_path / "final.json").write_text(json.dumps(final))
    row = run.describe("smac", ["--env", "point-robot-wind", "--small"])
    columns = ("online_last", "online_best", "offline_last", "offline_best")
    assert [row[column] for column in columns] == [1, 3, 2, 4]


def test_the_table_grows_and_what_was_run_elsewhere_stays(run, tmp_path, monkeypatch):
    path = tmp_path / "runs.csv"

    def collect(**returns):
        monkeypatch.setattr(run, "describe", lambda script, words: returns.get(script))
        run.collect([("smac", []), ("merpo", []), ("focal", [])], path)
        return [(row["script"], row["env"], row["seed"], row["offline_last"]) for row in run.read(path)]

    def row(script, env, seed, value):
        return {"script": script, "env": env, "seed": seed, "offline_last": value}

    assert collect(smac=row("smac", "ant-dir", 10, 1.5)) == [("smac", "ant-dir", "10", "1.5")]
    assert collect() == [("smac", "ant-dir", "10", "1.5")]  # a clone without runs
    collect(smac=row("smac", "ant-dir", 9, 2.5), focal=row("focal", "ant-fwd-back", 0, 3.5))
    assert collect(smac=row("smac", "ant-dir", 10, 4.5), focal=row("focal", "point-robot-wind", 0, 5.5)) == [
        ("focal", "point-robot-wind", "0", "5.5"),  # in the order of the work list
        ("focal", "ant-fwd-back", "0", "3.5"),
        ("smac", "ant-dir", "9", "2.5"),
        ("smac", "ant-dir", "10", "4.5"),
    ]


def test_the_table_of_datasets_grows(monkeypatch, tmp_path):
    datasets, path = script("datasets"), tmp_path / "datasets.csv"
    np.savez(tmp_path / "random.npz", returns=np.array([1.0, 2.0, 6.0]), rewards=np.zeros((3, 5)))
    assert datasets.describe("ant-dir", tmp_path) | {"megabytes": 0} == {
        "env": "ant-dir", "random": 3, "tasks": 3, "transitions": 5, "megabytes": 0,
    }  # fmt: skip
    found = {"medium": 5.0, "tasks": 2, "megabytes": 3}
    monkeypatch.setattr(
        datasets, "describe", lambda env, folder: {"env": env} | (found if "7+7" in str(folder) else {})
    )
    path.write_text("env,tasks,random,medium\nhopper,1,1.5,2.5\nant-dir,2,1.0,\n")
    for folder in ("ant-dir/7+7-seed0", "cheetah-vel/3+3-seed0", "cheetah-vel/7+7-seed0"):
        (tmp_path / folder).mkdir(parents=True)
    datasets.collect(tmp_path, path)
    with open(path) as file:
        seen = [(row["env"], row["tasks"], row["random"], row["medium"]) for row in csv.DictReader(file)]
    assert seen == [("cheetah-vel", "2", "", "5.0"), ("ant-dir", "2", "1.0", "5.0"), ("hopper", "1", "1.5", "2.5")]


def test_interquartile_mean_and_its_interval(report):
    assert report.interquartile_mean(np.array([9.0, 1, 2, 3, 4, 5, 6, -50])) == pytest.approx(3.5)
    assert report.interquartile_mean(np.array([3.0])) == 3
    families = {"a": np.array([0.0, 1.0, 0.5]), "b": np.array([0.9, 0.2, 0.4])}
    mean, low, high = report.interval(families)
    assert mean == pytest.approx(np.sort([0, 1, 0.5, 0.9, 0.2, 0.4])[1:5].mean())
    assert 0.1 < low < mean < high < 1
    same = report.interval({"a": np.full(3, 0.7)})
    assert same == pytest.approx((0.7,) * 3)


def test_scores_are_between_random_and_expert_of_their_own_family(report):
    row = {"script": "smac", "data_return": "1", "minutes": "2", "online_last": "", "online_best": ""}
    runs = [row | {"env": "a", "offline_last": "15", "offline_best": "16"},
            row | {"env": "b", "offline_last": "-3", "offline_best": "-2"},
            row | {"env": "c", "offline_last": "5", "offline_best": "5"}]  # fmt: skip
    datasets = [{"env": "a", "random": "10", "expert": "20"}, {"env": "b", "random": "-4", "expert": "-2"},
                {"env": "c", "random": "", "expert": ""}]  # fmt: skip
    text, scores = report.report(runs, datasets)
    families, mean, low, high = scores["smac", "offline"]
    assert {env: list(values) for env, values in families.items()} == {"a": [0.5], "b": [0.5]}
    assert mean == low == high == 0.5 and list(scores) == [("smac", "offline")]


def test_scripts_stand_side_by_side(report):
    row = {"data_return": "1", "minutes": "2", "offline_best": "", "online_best": "", "env": "a"}
    runs = [row | {"script": "focal", "offline_last": last, "online_last": "3"} for last in ("10", "12")]
    runs += [row | {"script": "smac", "offline_last": "99", "online_last": "99"}]  # on data of its own
    same = [row | {"script": "smac", "offline_last": "5", "online_last": "4", "data_return": "0.5"}]
    text, scores = report.report(runs, [{"env": "a", "random": "0", "expert": "20"}], same)
    assert "| `a` | 1 | 11 (1); 3 (0) |  |  | 1 | 99; 99 | 5; 4 |" in text.splitlines()
    assert list(scores["smac", "offline"][0]["a"]) == [99 / 20]


def test_smac_has_the_data_of_the_others(run, monkeypatch):
    runs = run.plan(arguments(run, monkeypatch, "--same-data"))
    families = {words[1] for _, words in runs}
    assert {script for script, _ in runs} == {"smac"} and len(runs) == 3 * len(families)
    points, bodies = {"sparse-point-robot", "point-robot-wind"}, {"walker-params", "hopper-params", "humanoid-dir"}
    assert families == points | bodies | {"ant-dir"}  # of two tasks and sawyer they are mixed as it is
    for _, words in runs:
        mine = run.SCRIPTS["smac"].parse_args(words)
        for other in ("focal", "focal_pp", *(["merpo"] if mine.env in run.SCRIPTS["merpo"].TABLE else [])):
            theirs = run.SCRIPTS[other].parse_args(["--env", mine.env, "--small"])
            assert mine.quality == mine.test_quality == theirs.quality == theirs.test_quality
        assert mine.data_size == mine.data_until == mine.context_data == 10_000  # all that data.py makes of a task


def test_the_page_shows_what_the_committed_tables_say(report):
    text, _ = report.report(*(report.read(ROOT / "results" / f"{name}.csv") for name in report.TABLES))
    shown = (ROOT / "benchmark/README.md").read_text().split(report.BEGIN)[1].split(report.END)[0]
    assert shown.strip() == text


def test_the_figure_is_drawn(report, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    for name in report.TABLES:
        (tmp_path / "results" / f"{name}.csv").write_text((ROOT / "results" / f"{name}.csv").read_text())
    (tmp_path / "benchmark").mkdir()
    page = tmp_path / "benchmark/README.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["report.py"])
    report.main(tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert (tmp_path / "results" / "report.png").stat().st_size > 5_000


def statistics(file):
    """{(env, variant): [(mean, population std) over seeds of each column]} of a file in results/.

    Where there are "a, b" and "a, c" but no "a" that is each seed's mean over both.
    """
    with open(file, newline="") as rows:
        rows = list(csv.DictReader(rows))
    seeds, name = {}, lambda row: row["variant"] if "variant" in row else row["script"] + ".py"
    for row in rows:
        parts = name(row).split(", ")
        for variant in {", ".join(parts[:n]) for n in range(1, len(parts))} - set(map(name, rows)) | {name(row)}:
            seeds.setdefault((row["env"], variant), {}).setdefault(row["seed"], []).append(row)
    found = {}
    for key, by_seed in seeds.items():
        for column in rows[0].keys() | {"share"}:
            with contextlib.suppress(ValueError, KeyError):  # text, or empty, or not in this file
                values = [np.mean([value(row, column) for row in group]) for group in by_seed.values()]
                found.setdefault(key, []).append((np.mean(values), np.std(values)))
    return found


def value(row, column):
    """A number of a row; "share" is that of z's variance within a task, see benchmark/README.md's terms."""
    if column == "share":
        return 2 * float(row["train_variance"]) / float(row["train_rms"]) ** 2
    return float(row[column])


def tables(page):
    """(files named by the comment above a table, columns that are not from them, header, row) of a page's rows."""
    for comment, table in re.findall(r"^<!-- from (.*) -->\n((?:\|.*\n)+)", (ROOT / page).read_text(), re.M):
        names, _, others = comment.partition("; not ")
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        for row in rows:
            yield names.split(), others.split(", "), header, row


def rounded(text):
    value, exponent = text.replace(",", "").split("e") if "e" in text else (text.replace(",", ""), "0")
    return float(f"{value}e{exponent}"), 0.5 * 10.0 ** (int(exponent) - len(value.partition(".")[2])) * (1 + 1e-6)


@pytest.mark.parametrize("page, least", [("README.md", 25), ("benchmark/README.md", 340)])
def test_tables_say_what_the_committed_files_do(page, least):
    checked, wrong, env = 0, [], None
    for names, others, header, row in tables(page):
        found = {}
        for name in names:
            for key, pairs in statistics(ROOT / "results" / f"{name}.csv").items():
                found.setdefault(key, []).extend(pairs)
        env = row[0].strip("`") if row[0].strip("`") in {key[0] for key in found} else env if not row[0] else None
        labels = {cell.strip("`") for cell in row} & {key[1] for key in found}
        pairs = [pair for key, all_of in found.items() for pair in all_of
                 if env in (None, key[0]) and (not labels or key[1] in labels)]  # fmt: skip
        for column, cell in zip(header, row, strict=True):
            if column in ("paper", "alpha", *others):
                continue
            alone = re.findall(r"^(-?[\d,.]+(?:e-\d+)?)()$", cell)
            for shown in alone or re.findall(r"(-?\d[\d,.]*(?:e-\d+)?) \(([\d,.]+)\)", cell):
                (mean, near), (std, close) = rounded(shown[0]), rounded(shown[1]) if shown[1] else (0, np.inf)
                checked += 1
                if not any(abs(a - mean) <= near and abs(b - std) <= close for a, b in pairs):
                    wrong.append((names, row[0], column, shown))
    assert not wrong, wrong
    assert checked >= least
