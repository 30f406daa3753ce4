"""The benchmark scripts: every run they plan is one that focal.py accepts, and their tables are what the runs wrote."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import focal

ROOT = Path(focal.__file__).resolve().parent


@pytest.fixture
def paper(monkeypatch):
    spec = importlib.util.spec_from_file_location("paper", ROOT / "benchmark" / "paper.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
