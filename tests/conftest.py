"""Tiny datasets that the tests of the scripts share."""

import dataclasses
import importlib.util
import os
import resource
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: as many processes as cores run tests side by side

import numpy as np
import pytest
import torch

import data
import envs

TRAIN, TEST = [0, 2, 3, 5], [4, 1]
WIND, SPARSE, WALKER = "point-robot-wind", "sparse-point-robot", "walker-params"
ROOT = Path(data.__file__).resolve().parent
BENCHMARK = ROOT / "benchmark"
OF_A_TEST = pytest.MonkeyPatch()
sys.path.append(str(BENCHMARK))  # last: there is a cuda.py


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """But for tests of CUDA, `--device auto` is the CPU on every machine; where modules come from is as before."""
    OF_A_TEST.setattr(sys, "path", list(sys.path))
    if not item.get_closest_marker("cuda"):
        OF_A_TEST.setattr(torch.cuda, "is_available", lambda: False)
    try:
        return (yield)
    finally:
        OF_A_TEST.undo()


def script(name, folder=BENCHMARK):
    """A script as a module, loaded afresh and forgotten after the test."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    OF_A_TEST.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def collect(name, train, test, count, length, policy=None, seed=0):
    """The arrays of a dataset: `count` real transitions of each task, random actions or those of policy(obs, rng)."""
    tasks, rng, rows = envs.sample_tasks(name, len(train) + len(test), 1), np.random.default_rng(seed), []
    env = envs.make(name, tasks, seed=seed, horizon=length, threads=1)
    obs, episode = env.reset()[0], np.zeros(len(tasks), int)
    for _ in range(count):
        action = policy(obs, rng) if policy else rng.uniform(-1, 1, (len(tasks), env.family.act_dim))
        after, reward, terminated, truncated, info = env.step(action)
        rows.append({"observations": obs, "actions": action, "rewards": reward, "terminals": terminated})
        rows[-1] |= {"next_observations": info.get("final_obs", after), "episodes": episode}
        rows[-1] |= {"sparse_rewards": info["sparse_reward"]} if "sparse_reward" in info else {}
        obs, episode = after, episode + (terminated | truncated)
    env.close()
    arrays = {key: np.stack([row[key] for row in rows], 1) for key in rows[0]}
    return arrays | {"tasks": tasks, "train_tasks": train, "test_tasks": test, "returns": arrays["rewards"].sum(1)}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """One tiny dataset for each family: four training tasks, two test tasks, their indices mixed."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in ((WIND, 60), (SPARSE, 60), (WALKER, 120)):
        data.save(folder / f"{name}.npz", collect(name, TRAIN, TEST, count, 20), {"env": name})
    return {name: folder / f"{name}.npz" for name in (WIND, SPARSE, WALKER)}


def ended(capsys, script, argv, *says, code=2):
    """The one line on standard error, of this script and with these words, with which its main(argv) ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        script.main(argv)
    line = capsys.readouterr().err
    assert end.value.code == code and line.count("\n") == 1 and line.startswith(f"{Path(script.__file__).name}: "), line
    assert all(word in line for word in says), line
    return line


@pytest.fixture
def no_plots(monkeypatch):
    """Runs without their pictures, which take most of such small ones."""
    monkeypatch.setattr(data, "plot", lambda *args: None)


@pytest.fixture
def full(monkeypatch):
    """A function: from its nth writing on the disk has no room for more than `size` bytes of the file `name`."""
    before, write = resource.getrlimit(resource.RLIMIT_FSIZE), data.write

    def fill(name, nth=1, size=60):
        calls = []

        def limited(path, save):
            calls.extend([0] * (path.name == name))
            if path.name == name and len(calls) >= nth:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            try:
                write(path, save)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        monkeypatch.setattr(data, "write", limited)

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def short_trajectories(monkeypatch):
    """The tiny data's trajectories are as long as an episode."""
    monkeypatch.setitem(envs.FAMILIES, WIND, dataclasses.replace(envs.FAMILIES[WIND], data_horizon=20))


@pytest.fixture(scope="session")
def has_gl():
    try:
        envs.mujoco.Renderer(envs.mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()
    except Exception:
        return False
    return True


@pytest.fixture(scope="session")
def picture():
    """benchmark/picture.py, as a module."""
    return script("picture")
