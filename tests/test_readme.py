"""The commands of both READMEs parse, their files exist, and shared promises hold."""

import argparse
import contextlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import envs
import focal
import focal_pp
import merpo
import smac

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FIGURES = (ROOT / "benchmark/README.md").read_text()
PAGES = README + FIGURES
SCRIPTS = {f"{module.__name__}.py": module for module in (focal, focal_pp, smac, merpo)}
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", PAGES, re.S)
    for line in block.splitlines()
    if line.strip()
] + re.findall(r"`(python (?:focal|focal_pp|smac|merpo|data|envs)\.py [^`]+)`", PAGES)


def parts(command):
    return [shlex.split(part, comments=True) for part in command.split("&&")]


def test_there_are_commands():
    assert any("focal.py --env sparse-point-robot --small" in command for command in COMMANDS)
    assert any("python -m pytest" in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    for words in parts(command):
        if words[0] == "python" and words[1] in SCRIPTS and "--help" not in words:
            args = SCRIPTS[words[1]].parse_args(words[2:])
            assert args.small == ("--small" in words)
        elif words[:2] == ["python", "data.py"]:
            assert data.parse_args(words[2:]).env in envs.FAMILIES
        elif words[0] == "python" and words[1].endswith(".py") and words[1] != "disc.py":  # the example's
            assert (ROOT / words[1]).exists()
        elif words[:2] == ["pip", "install"] and "-r" in words:
            assert (ROOT / words[words.index("-r") + 1]).exists()


def test_the_ablation_is_one_more_line_and_two_commands(monkeypatch):
    (line,) = re.findall(r"```python\n( +\"inverse-fourth\".*)\n```", README)
    (block,) = re.findall(r"```\n(python focal.*?)```", README, re.S)
    run, picture = (shlex.split(command) for command in block.replace("\\\n", " ").splitlines())
    with pytest.raises(SystemExit):
        focal.parse_args(run[2:])
    monkeypatch.setattr(focal, "LAWS", focal.LAWS | eval("{" + line.strip() + "}"))
    args = focal.parse_args(run[2:])
    assert f"runs/focal/{args.env}/{args.variant}" == picture[3]
    d2 = torch.tensor([0.1, 0.25, 1.0])
    cost, square = (focal.LAWS[law](d2, 0.1) for law in ("inverse-fourth", "inverse-square"))
    assert (cost.diff() < 0).all() and abs(cost[1] / square[1] - 1) < 0.1  # alike near |d| = 0.5, as the others


@pytest.mark.parametrize("command", re.findall(r"python (benchmark/\w+\.py[^`\n]*)", PAGES.replace("\\\n", " ")))
def test_benchmarks_take_their_flags(command, monkeypatch):
    """And what a figure, a script or a family is called: everything that is checked before anything is done."""

    class Parsed(Exception):
        pass

    def stop(*_):
        raise Parsed

    words = shlex.split(command, comments=True)
    parse = argparse.ArgumentParser.parse_args
    if words[0] not in ("benchmark/paper.py", "benchmark/run.py"):  # these check more than argparse does
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *rest: parse(*rest) and stop())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    monkeypatch.setattr(sys, "argv", words)
    main = runpy.run_path(str(ROOT / words[0]))
    with contextlib.suppress(Parsed):
        main["arguments" if words[0] in ("benchmark/paper.py", "benchmark/run.py") else "main"]()


def anchors(page):
    """Of the headings, as GitHub writes them: the second of a name has a number."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.M):
        name = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        same = sum(re.fullmatch(rf"{name}(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{same}" if same else name)
    return found


@pytest.mark.parametrize("page", ["README.md", "benchmark/README.md"])
def test_links_exist(page):
    links = re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / page).read_text())
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("script", [*SCRIPTS, "data.py", "envs.py"])
def test_help(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
    assert "--env" in done.stdout and not done.stderr


def test_help_of_benchmarks_does_nothing_else(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    for path in sorted((ROOT / "benchmark").glob("*.py")):
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        assert end.value.code == 0 and capsys.readouterr().out.startswith("usage:"), path


def test_imports_only_what_the_house_allows():
    allowed = {"data", "envs", "numpy", "torch", "matplotlib"} | set(sys.stdlib_module_names)
    for script in SCRIPTS:
        for line in re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / script).read_text(), re.M):
            assert line in allowed, line
    assert not re.search(r"^\s*(import|from) data\b", (ROOT / "envs.py").read_text(), re.M)
    for name in ("focal", "smac", "merpo"):
        assert name not in (ROOT / "data.py").read_text() + (ROOT / "envs.py").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_first_screen_and_function_lengths(script):
    import ast

    source = (ROOT / script).read_text()
    assert len(ast.get_docstring(ast.parse(source)).splitlines()) <= 45
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and not re.match("make_update|algorithm_arg", node.name):
            assert node.end_lineno - node.lineno + 1 <= 40, node.name


def test_the_example_of_a_family_of_your_own_runs_as_written(tmp_path):
    """As in the README, with fewer gradient steps."""
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "envs.FAMILIES[" in block)
    (command,) = (shlex.split(command) for command in COMMANDS if "disc.py" in command)
    (tmp_path / "disc.py").write_text(example)
    path = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command[1:], "--steps", "20"]
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    final = tmp_path / "runs/focal/point-robot-disc/small,steps=20/seed0/final.json"
    assert json.loads(final.read_text())["return_mean"] < 0
    dataset = data.load(tmp_path / "datasets/point-robot-disc/20+5-seed0/mixed.npz")
    goal = dataset.tasks[:, None]
    r = -np.linalg.norm(dataset.next_observations.numpy() - goal, axis=-1)
    np.testing.assert_allclose(dataset.rewards, r, atol=1e-5)
    place, returns = dataset.observations.shape[1], dataset.rewards.view(25, 50, 200)[..., :20].sum(-1)
    assert place == 10_000 and returns[:, 40:].mean() > returns[:, :5].mean() + 5  # the behaviour has learned
