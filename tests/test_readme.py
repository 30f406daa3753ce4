"""The commands of both READMEs parse, their files exist, what they show runs as written, and shared promises hold."""

import argparse
import contextlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SPARSE, WIND, script

import data
import envs
import focal
import focal_pp
import merpo
import smac
import trained

README = (ROOT / "README.md").read_text()
FIGURES = (ROOT / "benchmark/README.md").read_text()
PAGES = README + FIGURES
SCRIPTS = {f"{module.__name__}.py": module for module in (focal, focal_pp, smac, merpo)}
LINES = "\n".join(re.findall(r"```bash\n(.*?)```", PAGES, re.S)).splitlines()
COMMANDS = [line.strip() for line in LINES if line.strip()]
COMMANDS += re.findall(r"`(python (?:focal|focal_pp|smac|merpo|data|envs)\.py [^`]+)`", PAGES)
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def example(word):
    """The one block of Python in the README that holds this word."""
    (found,) = (block for block in EXAMPLES if word in block)
    return found


def parts(command):
    return [shlex.split(part, comments=True) for part in command.split("&&")]


def test_there_are_commands():
    assert any("focal.py --env sparse-point-robot" in command for command in COMMANDS)
    assert any("python -m pytest" in command for command in COMMANDS)


@pytest.mark.layout
def test_the_readme_is_short():
    assert len(README.split()) <= 3_500


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    for words in parts(command):
        if words[0] == "python" and words[1] in SCRIPTS and "--help" not in words:
            args = SCRIPTS[words[1]].parse_args(words[2:])
            assert args.small == ("--no-small" not in words)
        elif words[:2] == ["python", "data.py"]:
            assert data.parse_args(words[2:]).env in envs.FAMILIES
        elif words[0] == "python" and words[1].endswith(".py") and words[1] != "disc.py":  # the example's
            assert (ROOT / words[1]).exists()
        elif words[:2] == ["pip", "install"] and "-r" in words:
            assert (ROOT / words[words.index("-r") + 1]).exists()


@pytest.mark.layout
def test_the_ablation_is_a_line_and_two_commands(tmp_path):
    law = example("d2.square() + eps").strip("\n")
    (block,) = re.findall(r"```\n(python focal.*?)```", README, re.S)
    run, picture = (shlex.split(command) for command in block.replace("\\\n", " ").splitlines())
    with pytest.raises(data.DataError):
        focal.parse_args(run[2:])
    source = (ROOT / "focal.py").read_text().replace("LAWS = {\n", f"LAWS = {{\n{law}\n", 1)
    (tmp_path / "changed.py").write_text(source)
    changed = script("changed", tmp_path)
    args = changed.parse_args(run[2:])
    assert f"runs/focal/{args.env}/{args.variant}" == picture[3] and changed.LAWS.keys() - focal.LAWS == {args.dml}
    d2 = torch.tensor([0.1, 0.25, 1.0])
    cost, square = (changed.LAWS[law](d2, 0.1) for law in (args.dml, "inverse-square"))
    assert (cost.diff() < 0).all() and abs(cost[1] / square[1] - 1) < 0.1  # alike near |d| = 0.5, as the others


@pytest.mark.parametrize("command", re.findall(r"python (benchmark/\w+\.py[^`\n]*)", PAGES.replace("\\\n", " ")))
def test_benchmarks_take_their_flags(command, monkeypatch):
    """And what a figure, a script or a family is called: everything that is checked before anything is done."""

    class Parsed(Exception):
        pass

    def stop(*_):
        raise Parsed

    words = shlex.split(command, comments=True)
    module, parse = script(Path(words[0]).stem), argparse.ArgumentParser.parse_args
    if hasattr(module, "parse_args"):  # a script like those at the top
        assert module.parse_args(words[1:]).small == ("--no-small" not in words)
        return
    if words[0] not in ("benchmark/paper.py", "benchmark/run.py"):  # these check more than argparse does
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *rest: parse(*rest) and stop())
    monkeypatch.setattr(sys, "argv", words)
    with contextlib.suppress(Parsed):
        (module.arguments if words[0] in ("benchmark/paper.py", "benchmark/run.py") else module.main)()


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


@pytest.mark.filterwarnings("ignore:.*already in registry")  # gymnasium's, as envs.py runs once more
def test_help_does_nothing_else(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    for path in (*(ROOT / name for name in (*SCRIPTS, "data.py", "envs.py")), *(ROOT / "benchmark").glob("*.py")):
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        said, errors = capsys.readouterr()
        assert end.value.code == 0 and said.startswith("usage:") and not errors, path
        assert path.name not in SCRIPTS or said.rstrip().splitlines()[-1].startswith("python ")


def elsewhere(folder, *command):
    """Runs Python in another folder, with the modules of this one, as they are once they are installed."""
    path = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_a_family_of_your_own_runs_as_written(tmp_path):
    """As in the README, with fewer tasks and gradient steps."""
    (command,) = (shlex.split(command) for command in COMMANDS if command.startswith("python disc.py"))
    (tmp_path / "disc.py").write_text(example("envs.FAMILIES[").replace("train=80, test=20", "train=4, test=2"))
    elsewhere(tmp_path, *command[1:], "--steps", "20")
    folder = tmp_path / "runs/focal/point-robot-disc/small,steps=20/seed0"
    assert json.loads((folder / "final.json").read_text())["return_mean"] < 0
    dataset = data.load(tmp_path / "datasets/point-robot-disc/4+2-seed0/mixed.npz")
    goal = dataset.tasks[:, None]
    r = -np.linalg.norm(dataset.next_observations.numpy() - goal, axis=-1)
    np.testing.assert_allclose(dataset.rewards, r, atol=1e-5)
    place, returns = dataset.observations.shape[1], dataset.rewards.view(6, 50, 200)[..., :20].sum(-1)
    assert place == 10_000 and returns[:, 40:].mean() > returns[:, :5].mean() + 5  # the behaviour has learned


def test_the_example_of_your_own_data_runs_as_written(tmp_path, monkeypatch):
    """On flat arrays of 25 walkers, not equally many each, in the types that others use."""
    rng, flats = np.random.default_rng(0), []
    for length in rng.integers(60, 80, 25):
        obs, step = rng.normal(size=(length + 1, 17)), np.arange(length)
        flat = {"observations": obs[:-1], "next_observations": obs[1:], "actions": rng.uniform(-1, 1, (length, 6))}
        flats.append(flat | {"rewards": step / 2, "terminals": step % 20 == 9, "timeouts": step % 20 == 19})
    monkeypatch.chdir(tmp_path)
    exec(example("np.savez"), {"flats": flats, "parameters": envs.sample_tasks("walker-params", 25, 0)})
    loaded = data.load(tmp_path / "mine.npz", env="walker-params")
    n = min(len(flat["rewards"]) for flat in flats)
    assert loaded.rewards.shape == (25, n) and loaded.rewards.dtype == torch.float32
    assert loaded.episodes.tolist() == [[i // 10 for i in range(n)]] * 25
    assert loaded.terminals.sum(1).tolist() == [sum(i % 20 == 9 for i in range(n))] * 25


TINY = {
    "focal": "--steps 4 --context-size 4 --encoder-hidden 8",
    "focal_pp": "--steps 4 --context-size 4",
    "smac": "--steps 4 --online-steps 0 --context-size 4 --data-size 60 --data-until 60 --context-data 60",
    "merpo": "--model-steps 2 --steps 2 --model-hidden 8 --adapt-steps 2",
}


@pytest.mark.parametrize("name", TINY)
def test_the_example_of_loading_runs_as_written(name, files, tmp_path, monkeypatch, capsys, no_plots):
    """In another folder than the run was started in; it returns what the run did at its end."""
    begun, read = tmp_path / "begun", tmp_path / "read"
    begun.mkdir(), read.mkdir()

    def here(folder, file, *words):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [file, *words])
        runpy.run_path(file, run_name="__main__")
        return capsys.readouterr().out

    execute = elsewhere if name == "focal" else here
    sizes = f"--meta-batch-size 2 --batch-size 4 --hidden 8 --eval-episodes 2 {TINY[name]}"
    flags = f"--env {WIND} --data {files[WIND]} {sizes}"
    execute(begun, str(ROOT / f"{name}.py"), *shlex.split(flags))
    (final,) = begun.glob("runs/**/final.json")
    (read / "load.py").write_text(f"folder = {str(final.parent)!r}\n" + example("trained.load_run(folder)"))
    *_, first, second = execute(read, "load.py").splitlines()
    assert first.startswith(f"{name} {WIND} step") and len(example("trained.load_run(folder)").splitlines()) <= 12
    returned = float(re.findall(r"-\d+\.\d+", second)[-1 if name == "merpo" else 0])
    assert returned == pytest.approx(json.loads(final.read_text())["return_mean"], rel=1e-5)
    before = BEFORE_ACTING.format(folder=str(final.parent), file=str(files[WIND]))
    after = "print(total, *act(s[:2])[0], *act(s[:1])[0])\n"
    (read / "act.py").write_text(before + example("context=mine") + after)
    total, *twice = map(float, execute(read, "act.py").split("\n")[-2].split())
    assert -60 < total < 0 and twice[:2] == pytest.approx(twice[2:], rel=1e-4) and max(map(abs, twice)) <= 1


BEFORE_ACTING = f"""
import gymnasium, numpy, envs
folder, file = {{folder!r}}, numpy.load({{file!r}})
s, a, r, s2 = (file[name][4][:40] for name in ("observations", "actions", "rewards", "next_observations"))
env = gymnasium.make("{WIND}-v0", task=file["tasks"][4])
"""


def test_own_transitions_are_the_context_in_which_an_agent_acts(files, tmp_path, no_plots):
    """All alike, so that it does not matter which are drawn: z is that of one of them, observations are raw."""
    sizes = f"--meta-batch-size 2 --batch-size 4 --hidden 8 --eval-episodes 2 {TINY['focal']}"
    focal.main(["--env", SPARSE, "--data", str(files[SPARSE]), "--run-dir", str(tmp_path), *sizes.split()])
    (folder,) = tmp_path.glob("focal/*/*/seed0")
    rng = np.random.default_rng(0)
    own = {"observations": rng.normal(size=2), "actions": rng.uniform(-1, 1, 2)}
    own["next_observations"] = rng.normal(size=2)
    mine = {key: np.tile(row, (7, 1)) for key, row in own.items()} | {"rewards": np.full(7, -9.0)}
    for wrong, words in (
        (mine, "the agent's are sparse; expected sparse_rewards"),
        (mine | {"sparse_reward": np.full(7, 0.3)}, "found sparse_reward$"),
        (mine | {"tasks": np.zeros(2)}, "found tasks$"),
    ):
        with pytest.raises(data.DataError, match=words):
            trained.load_run(folder, context=wrong)
    with pytest.raises(data.DataError, match="focal has no argument test_qualty"):
        trained.load_run(folder, test_qualty="random")
    mine["sparse_rewards"] = np.full(7, 0.3)
    script, args, world, agent = trained.load_run(folder, context=mine)
    seen, act = rng.normal(size=(3, 2)), trained.policy_of(script, args, world, agent)
    scaled = lambda obs: (obs - world.mean.numpy()) / world.std.numpy()
    row = [scaled(own["observations"]), own["actions"], scaled(own["next_observations"]), [0.3]]
    with torch.no_grad():
        z = agent.encoder(torch.tensor(np.concatenate(row), dtype=torch.float32)[None, None])[0]
        expected = agent.act(torch.tensor(scaled(seen), dtype=torch.float32), z.expand(3, -1))
    np.testing.assert_allclose(act(seen), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(data.DataError, match="actions has shape"):
        trained.load_run(folder, context=mine | {"actions": np.zeros((7, 3))})
    with pytest.raises(data.DataError, match="context: expected arrays"):
        trained.load_run(folder, context={})


@pytest.mark.layout
def test_all_modules_are_installed():
    """By `pip install -e .`: whatever the scripts import from here."""
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert sorted(f"{name}.py" for name in modules) == sorted(path.name for path in ROOT.glob("*.py"))
