"""The benchmark scripts: every run they plan is one that focal.py accepts, and their tables are what the runs wrote."""

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SPARSE
from PIL import Image

import data
import envs
import focal
import focal_pp

ROOT = Path(focal.__file__).resolve().parent


def script(name):
    """A benchmark script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmark" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def paper():
    return script("paper")


def plan(paper, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["paper.py", *words.split()])
    args = paper.arguments()
    return args, paper.plan(args)


@pytest.mark.parametrize("size", ["", "--full"])
@pytest.mark.parametrize("script", ["focal", "focal_pp", "smac", "merpo"])
def test_every_run_of_every_figure_has_a_folder_of_its_own(paper, monkeypatch, tmp_path, script, size):
    module, figures = paper.SCRIPTS[script]
    for figure, (families, _, variants, columns) in figures.items():
        _, runs = plan(paper, monkeypatch, f"{script} {figure} {size}")
        folders = [module.prepare_run(module.parse_args([*run[4], "--run-dir", str(tmp_path)])) for run in runs]
        assert len(set(folders)) == len(runs) == 3 * len(families) * len(variants)
        assert all(("small" in folder.parent.name) == (not size) for folder in folders)
        header = {"return_mean", "train_esr", "esr", "train_rms", "variance", "train_variance", *module.Agent.METRICS}
        header |= {"smac": {"offline_return_mean", "short_kl"}, "merpo": {"meta_return_mean"}}.get(script, set())
        assert set(columns) <= header


def test_a_figure_of_another_script_is_refused(paper, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        plan(paper, monkeypatch, "focal table1")
    assert "focal has no table1" in capsys.readouterr().err


def test_summary_of_a_run_that_ended_and_of_one_that_diverged(paper, monkeypatch, tmp_path):
    _, runs = plan(paper, monkeypatch, "focal figure5 --seeds 1 --steps 4")
    keys = ["step", "return_mean", "train_return_mean", "esr", "train_esr", "rms", "train_rms"]
    keys += ["train_variance", "q_mean"]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, steps in zip(folders, ([1, 2, 3, 4], [1, 2]), strict=True):
        folder.mkdir()
        with open(folder / "metrics.csv", "w") as file:
            csv.writer(file).writerows([keys, *([step, *[10.0 * step] * 8] for step in steps)])
    (tmp_path / "a" / "final.json").write_text(json.dumps({"behaviour_return": 7.0}))
    ended, diverged = paper.summarise("focal", runs, folders)
    assert ended["return_mean"] == ended["q_mean"] == 30 and ended["diverged"] == 0 and ended["data_return"] == 7
    assert diverged["return_mean"] == 15 and diverged["diverged"] == 1 and diverged["data_return"] is None
    assert [row["variant"] for row in (ended, diverged)] == ["FOCAL", "coupled"]
    (tmp_path / "b" / "metrics.csv").unlink()
    assert np.isnan(paper.summarise("focal", runs, folders)[1]["return_mean"])


def test_runs_of_ones_own_are_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    compare = script("compare")
    for law, returns in {"inverse": [[1, 2, 3, 4], [2, 3, 4, 5]], "square": [[1, 1, 1, 7]]}.items():
        for seed, values in enumerate(returns):
            folder = tmp_path / f"small,dml={law}" / f"seed{seed}"
            folder.mkdir(parents=True)
            with open(folder / "metrics.csv", "w") as file:
                csv.writer(file).writerows([["step", "return_mean"], *enumerate(values)])
    folders = [str(tmp_path / f"small,dml={law}") for law in ("inverse", "square")]
    compare.main([*folders, "--out", str(tmp_path / "both.png")])
    inverse, square, _ = capsys.readouterr().out.splitlines()
    assert inverse.split() == ["small,dml=inverse", "return_mean", "3.5", "(0.5),", "2", "seeds"]  # last three of each
    assert square.split()[:3] == ["small,dml=square", "return_mean", "3"]
    assert (tmp_path / "both.png").stat().st_size > 10_000
    for words, message in ((["--columns", "esr"], "no column esr"), ([str(tmp_path)], "no seed*/metrics.csv there")):
        with pytest.raises(SystemExit, match=re.escape(message)):
            compare.main([*folders, *words])


@pytest.mark.parametrize("module", [focal, focal_pp])
def test_an_agent_is_filmed_in_test_tasks(monkeypatch, tmp_path, files, module):
    monkeypatch.setattr(sys, "path", list(sys.path))
    animate, seen, film = script("animate"), {}, envs.film
    monkeypatch.setattr(envs, "film", lambda vector, *rest: (seen.update(tasks=vector.tasks), film(vector, *rest)))
    flags = f"--env {SPARSE} --small --data {files[SPARSE]} --steps 2 --eval-every 1 --run-dir {tmp_path} --seed 1"
    module.main(flags.split())
    (run,) = tmp_path.glob(f"{module.__name__}/{SPARSE}/*/seed1")
    animate.main([str(run), "--tasks", "2", "--size", "40", "--out", str(tmp_path / "agent.gif")])
    picture = Image.open(tmp_path / "agent.gif")
    dataset = data.load(files[SPARSE])
    np.testing.assert_array_equal(seen["tasks"], dataset.tasks[dataset.test_tasks])
    assert picture.size == (80, 40) and picture.n_frames == 20  # both test tasks, an episode of 20 steps
    with pytest.raises(SystemExit, match="expected <run-dir>/focal"):
        animate.main([str(tmp_path)])
    (run / "checkpoint.pt").unlink()
    with pytest.raises(SystemExit, match="expected the folder of a run"):
        animate.main([str(run)])
