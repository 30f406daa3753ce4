"""Nothing is lost and nothing is silent: kills, full disks, divergence, damaged input, long play, threads.

What data.py does for every script's runs is tested in test_runs.py.

FUZZ=3000 python -m pytest tests/test_trust.py -k fuzz      # that many mutations of each kind; a hundred otherwise
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from conftest import BENCHMARK, WIND, ended
from test_data import names, run_here, sample
from test_data import prepare as prepare_tiny
from test_focal import metrics
from test_runs import FUZZ, contents, mangled

import data
import envs
import focal
import focal_pp
import merpo
import smac

SIZES = "--hidden 16 --batch-size 8 --meta-batch-size 3 --eval-episodes 1 --device cpu --threads 1"
CONTEXT = f"{SIZES} --encoder-hidden 16 --context-size 8 --latent 3"
FLAGS = {
    focal: f"{CONTEXT} --steps 6 --eval-every 3 --encoder-steps 4 --alpha 50 --value-penalty",
    focal_pp: f"{CONTEXT} --steps 6 --eval-every 3 --encoder-steps 4 --alpha 50 --value-penalty",
    smac: f"{CONTEXT} --steps 4 --eval-every 2 --data-size 60 --data-until 60 --context-data 40 --online-envs 3"
    " --online-steps 60 --updates 0.04",
    merpo: f"{SIZES} --steps 4 --eval-every 2 --layers 2 --model-hidden 16 --model-layers 2 --model-steps 2"
    " --model-adapt-steps 3 --inner-steps 2 --adapt-steps 3 --rollouts 10 --rollout-buffer 40",
}
SCRIPTS = pytest.mark.parametrize("script", FLAGS, ids=lambda script: script.__name__)


def flags(script, files, folder, more=""):
    words = ["--env", WIND, "--data", str(files[WIND]), "--run-dir", str(folder)]
    return [*FLAGS[script].split(), *words, *more.split()]


def folder_of(script, argv):
    return data.Run(script.parse_args(argv), Path(script.__file__)).folder


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(data, "_run_jobs", run_here)


# --------------------------------------------------------------------------------------------------------------- kills
def test_killed_at_random_moments_nothing_is_lost():
    """The campaign of benchmark/kill.py, small: real kills of data building and of every script."""
    command = [sys.executable, BENCHMARK / "kill.py", "--kills", "1", "--seed", "2", "--no-pictures"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1].endswith("the same every time"), done.stdout + done.stderr
    assert [line.split()[0] for line in lines[:-1]] == ["data", *(script.__name__ for script in FLAGS)]
    assert sum("killed at" in line for line in lines) >= 3  # the others had ended before


def test_what_a_kill_left_beside_a_whole_behaviour_is_removed(here, tmp_path):
    folder = prepare_tiny(tmp_path).parent
    for name in ("behaviour-part0.pt", ".behaviour-part0.pt.1.tmp", ".behaviour.pt.1.tmp", ".mixed.npz.1.tmp"):
        (folder / name).write_bytes(b"anything")
    prepare_tiny(tmp_path, quality="expert")
    assert names(folder) == {"behaviour.pt", "mixed.npz", "expert.npz"}


# ----------------------------------------------------------------------------------------------------------- full disk
@pytest.mark.parametrize("size", [60, 3_000])
@pytest.mark.parametrize("what", ["torch.save", "savez", "write"])
def test_a_full_disk_leaves_the_old_file(full, tmp_path, what, size):
    save = {
        "torch.save": lambda file: torch.save({str(i): torch.zeros(1000) for i in range(5)}, file),
        "savez": lambda file: np.savez(file, a=np.zeros(2000)),
        "write": lambda file: file.write(bytes(9_000)),
    }[what]
    (tmp_path / "x").write_bytes(b"old")
    full("x", size=size)
    with pytest.raises(OSError, match=rf"File too large: '{tmp_path / 'x'}'"):
        data.write(tmp_path / "x", save)
    assert contents(tmp_path) == {"x": b"old"}


@pytest.mark.parametrize("name", ["behaviour-part1.pt", "behaviour.pt", "mixed.npz"])
def test_a_full_disk_while_a_dataset_is_made(full, here, tmp_path, name):
    full(name)
    with pytest.raises(OSError, match=f"File too large.*{name}"):
        prepare_tiny(tmp_path)
    (folder,) = tmp_path.glob("*/*")
    for path in folder.glob("*.pt"):
        data.read(path)
    assert name not in names(folder) and not list(folder.glob("*.tmp"))
    full("")
    assert data.load(prepare_tiny(tmp_path)).meta["checksum"]


# ---------------------------------------------------------------------------------------------------------- divergence
RATES = {focal: "--lr 1e30", focal_pp: "--lr 1e30", smac: "--lr 1e30", merpo: "--lr 1e30 --actor-lr 1e30"}


@SCRIPTS
def test_a_run_that_diverges_names_loss_and_step_within_an_interval(files, tmp_path, no_plots, capsys, script):
    argv = flags(script, files, tmp_path, RATES[script])
    line = ended(capsys, script, argv, code=3)
    name, step = re.search(r"diverged: (?:the weights )?([\w.]+) .*?step (\d+)", line).groups()
    start = 3 if script is merpo else 1  # its first stage has a rate of its own
    assert name in (*script.Agent.METRICS, "actions") or "." in name, line
    assert start <= int(step) <= start + 2, line
    assert not (folder_of(script, argv) / "final.json").exists()


def test_the_first_stage_diverges_too(files, tmp_path, no_plots, capsys):
    line = ended(capsys, merpo, flags(merpo, files, tmp_path, "--model-task-lr 1e30"), "no checkpoint yet", code=3)
    assert re.search(r"diverged: model_loss .*step [12]\b", line)


@pytest.mark.parametrize("script, after", [(focal, 2), (smac, 1), (smac, 3), (merpo, 1), (merpo, 3)])
def test_the_last_good_checkpoint_is_kept(files, tmp_path, no_plots, capsys, monkeypatch, script, after):
    """Weights are spoilt after some saves: in SMAC's online phase and MerPO's second stage as well."""
    log, kept = data.Run.log, []

    def spoil(run, *rest):
        log(run, *rest)
        kept.append((run.step, contents(run.folder)))
        if len(kept) == after:
            for optimiser in run.agent.optimisers.values():
                optimiser.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(data.Run, "log", spoil)
    more = "--encoder-steps 9 --steps 15" if script in (focal, focal_pp) else "--steps 8"
    argv = flags(script, files, tmp_path, more)
    line, run = ended(capsys, script, argv, code=3), folder_of(script, argv)
    step, stored = kept[-1]
    assert f"checkpoint of step {step} is kept in {run}" in line and contents(run) == stored
    assert step < int(re.search(r"step (\d+)", line)[1]) <= step + 3
    monkeypatch.setattr(data.Run, "log", log)
    script.main([*argv, "--resume"])
    assert (run / "final.json").exists()


def test_an_adaptation_that_diverges_is_not_scored(files, tmp_path, no_plots, capsys):
    """Weights are finite, then RAC on the test tasks' data explodes inside an evaluation."""
    line = ended(capsys, merpo, flags(merpo, files, tmp_path, "--adapt-lr 1e30"), code=3)
    assert re.search(r"actions are not finite.*step 4\b", line)


@pytest.mark.parametrize("where", ["actor", "critic", "log_alpha"])
def test_behaviour_that_diverges_is_not_stored(where, here, tmp_path, monkeypatch, capsys):
    """A NaN anywhere in one task's networks is noticed a few steps later, and no file holds one."""
    learn, broken = data.Trainer.learn_eagerly, []

    def spoil(trainer):
        learn(trainer)
        if trainer.iteration == 60:
            broken.append(0)
            value = getattr(trainer.agent, where)
            (value if where == "log_alpha" else next(value.parameters())).data[1] = math.nan

    monkeypatch.setattr(data.Trainer, "learn_eagerly", spoil)
    monkeypatch.setattr(data, "SAVE_EVERY", 0)
    with pytest.raises(FloatingPointError, match="not finite"):
        prepare_tiny(tmp_path)
    (folder,) = tmp_path.glob("*/*")
    assert broken and names(folder) == {"behaviour-part0.pt"}
    stored = data.read(folder / "behaviour-part0.pt")["trainer"]
    assert stored["iteration"] <= 61 and all(x.isfinite().all() for x in stored["agent"].values())
    monkeypatch.undo()
    monkeypatch.setattr(data, "_run_jobs", run_here)
    assert data.load(prepare_tiny(tmp_path)).rewards.isfinite().all()  # the last save was good


@pytest.mark.parametrize("steps", [200, 96])
def test_a_behaviour_driven_to_nan_ends_in_one_line(here, tmp_path, capsys, steps):
    """With a huge learning rate, and one whose only gradient steps are its last."""
    argv = f"--env {WIND} --train 2 --test 1 --device cpu --data-dir {tmp_path} --sac-lr 1e9 --sac-steps {steps}"
    argv += " --sac-envs 4 --episode 40 --updates 1 --start 88 --sac-hidden 8 --sac-batch 8 --checkpoints 3"
    ended(capsys, data, argv.split(), "data.py: diverged: ", code=3)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".npz")]


def test_rewards_that_are_not_finite_are_not_stored(here, tmp_path, monkeypatch):
    """Of a family of one's own, with a reward that goes wrong where nobody looked while the behaviour was trained."""
    step = envs.TaskVectorEnv.step

    def wrong(env, actions):
        obs, reward, *rest = step(env, actions)
        return obs, np.where(env._elapsed == 150, np.nan, reward), *rest

    monkeypatch.setattr(envs.TaskVectorEnv, "step", wrong)
    with pytest.raises(data.DataError, match=r"mixed\.npz: not stored, rewards holds values that are not finite"):
        prepare_tiny(tmp_path)
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_environments_refuse_actions_that_are_not_finite(value):
    for name in (WIND, "walker-params"):
        env = envs.make(name, envs.sample_tasks(name, 2, 0), threads=1)
        obs, actions = env.reset()[0], np.zeros((2, env.family.act_dim))
        actions[1, 1] = value
        with pytest.raises(FloatingPointError, match="actions are not finite"):
            env.step(actions)
        assert np.array_equal(env.observe(), obs)
        env.close()


# ------------------------------------------------------------------------------------------------------- damaged input
def loaded(path, env=None):
    """The dataset, or None if it is refused in one line; no warning either way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return data.load(path, env)
        except data.DataError as error:
            assert "\n" not in str(error) and len(str(error)) < 400 and str(path) in str(error)


def test_fuzz_bytes_of_a_dataset(tmp_path):
    """Refused, or every array is the original's."""
    rng, path, refused = np.random.default_rng(0), tmp_path / "x.npz", 0
    data.save(path, sample(), {"env": WIND})
    whole, expected = path.read_bytes(), data.load(path)
    for _ in range(FUZZ):
        path.write_bytes(mangled(whole, rng))
        found = loaded(path, WIND)
        refused += found is None
        for key, value in vars(expected).items() if found else ():
            assert value == vars(found)[key] if key == "meta" else np.array_equal(value, vars(found)[key])
    assert refused > 0.8 * FUZZ


def odd(array, rng):
    """Another type, shape or value."""
    types = ["f2", "f8", "i4", "i8", "U5", "c8", ">f4", ">i4", "S3", "bool"]
    ways = [
        lambda: array.astype(rng.choice(types)), lambda: array[..., None], lambda: array[:0], lambda: array[:1],
        lambda: np.concatenate([array, array], rng.integers(array.ndim)), lambda: array.T, lambda: np.array(3.0),
        lambda: np.asfortranarray(array), lambda: array[..., :1],
    ]  # fmt: skip
    way = rng.integers(2 * len(ways))
    if way < len(ways):
        return ways[way]()
    array, value = array.copy(), rng.choice([np.nan, np.inf, -1, 2, 1e30, 0.5, 2**31 - 1, -(2**31)])
    with contextlib.suppress(OverflowError, ValueError, TypeError):
        array.flat[rng.integers(array.size)] = value
    return array


ODD_META = [[], {}, 1, None, "x", True, 1.5, {"a": [1]}, "x" * 10_000, -1, 10**400, "\n", [["["] * 9] * 9]
ODD_TEXT = ["", "[", "null", "[" * 100_000, '{"env": NaN}', '{"env": ' + "[" * 100_000]


def odd_dataset(path, rng):
    arrays = dict(sample())
    for _ in range(rng.integers(3)):
        key = rng.choice(list(arrays))
        with np.errstate(all="ignore"):
            arrays[key] = odd(arrays[key], rng)
    if rng.random() < 0.1:
        del arrays[rng.choice(list(arrays))]
    if rng.random() < 0.2 and len(arrays) > 1:
        a, b = rng.choice(list(arrays), 2)
        arrays[a], arrays[b] = arrays[b], arrays[a]
    if rng.random() < 0.1:
        arrays["extra"] = [np.zeros((0, 3)), np.array(["2020-01-01"], "M8[D]"), np.array(["a"])][rng.integers(3)]
    if rng.random() < 0.7:
        meta = {"env": WIND, "format": data.FORMAT}
        if rng.random() < 0.5:
            name = rng.choice(["env", "format", "quality", "checksum", "seed", "settings"])
            meta[name] = ODD_META[rng.integers(len(ODD_META))]
        arrays["meta"] = np.array(json.dumps(meta) if rng.random() < 0.9 else ODD_TEXT[rng.integers(len(ODD_TEXT))])
    np.savez(path, **arrays)
    if rng.random() < 0.1:  # a member that is no array
        with zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
        members[rng.choice(list(members))] = rng.bytes(40)
        with zipfile.ZipFile(path, "w") as file:
            for name, value in members.items():
                file.writestr(name, value)


def test_fuzz_arrays_of_a_dataset(tmp_path):
    """Refused, or a dataset that can be used: all of it finite, its shapes fitting."""
    rng, path, used = np.random.default_rng(1), tmp_path / "x.npz", 0
    for _ in range(FUZZ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            odd_dataset(path, rng)
        found = loaded(path, WIND if rng.random() < 0.5 else None)
        if found is not None:
            used += 1
            rows = focal.pack(found, found.train_tasks, *data.standardisation(found.observations[found.train_tasks]))
            assert rows.shape[1] == found.rewards.shape[1]
            assert data.episode_returns(found)[0].max(initial=0) < len(found.tasks)
    assert 0.05 * FUZZ < used < 0.6 * FUZZ


def test_episodes_may_be_numbered_in_any_way(tmp_path):
    """From a huge or negative number, with gaps: what is made of them neither fails nor grows."""
    arrays = sample()
    np.savez(tmp_path / "x.npz", **arrays)
    expected = data.episode_returns(data.load(tmp_path / "x.npz"))
    for first, second in ((-(2**31), 2**31 - 1), (7, 2**31 - 1), (-3, -2)):
        arrays["episodes"] = np.int32([[first] * 3 + [second] * 3] * 3)
        np.savez(tmp_path / "x.npz", **arrays)
        for x, y in zip(data.episode_returns(data.load(tmp_path / "x.npz")), expected, strict=True):
            assert np.array_equal(x, y)


OWN = {focal: ["--eps 0"], focal_pp: ["--eps 0", "--temperature 0"], smac: ["--awac-lambda 0", "--updates 0"]}
OWN[smac] += ["--updates 1e300", *(f"{flag} --data x.npz" for flag in ("--train-tasks 3", "--test-tasks 3"))]
OWN[smac] += ["--steps 0 --online-steps 0", "--updates 2 --online-steps 0", "--steps 0"]
OWN[smac] += ["--online-rewards oracle --online-steps 0"]
OWN[smac] += [f"--{flag} --online-rewards none" for flag in ("steps 0", "online-steps 20", "online-envs 2")]
OWN[smac] += ["--pearl-weight 2 --online-rewards none", "--awac-lambda 2 --actor bc", "--actor td3"]
OWN[merpo] = ["--meta-policy runs", "--real-ratio 0.3 --no-model", "--rollouts 4", "--rollouts 10001"]
OWN[merpo] += ["--rollouts 5001 --rollout-length 2", "--rollouts 20 --no-model", "--alpha-lr 1", "--alpha 1.5"]
OWN[merpo] += ["--eta 1 --no-model"]
OWN[merpo] += ["--actor-entropy --ent 0", "--threshold 3 --beta-lr 0", "--target-divergence 1 --lambda-lr 0"]
OWN[merpo] += ["--lambda-initial 2 --env halfcheetah --single combo", "--alpha 0.7 --env hopper --single combo-3"]
OWN[merpo] += ["--single rac", "--env hopper", "--test-start nowhere", "--adapt-steps 0"]
SINGLE = "outer-lr 1", "adapt-lr 1", "adapt-steps 9", "test-quality random", "test-trajectories 3"
SINGLE += "adaptive", "model-lr 0.5", "test-start behaviour"
OWN[merpo] += [f"--{flag} --env halfcheetah --single combo" for flag in SINGLE]


@SCRIPTS
def test_flags_that_make_no_sense_are_refused_in_one_line(script):
    for words in OWN[script]:
        with pytest.raises(data.DataError) as error:
            script.parse_args(["--env", WIND, *words.split()])
        assert words.split()[0] in str(error.value) and "\n" not in str(error.value), words


def test_fuzz_a_behaviour(here, tmp_path):
    """Refused, or the same dataset is made of it."""
    expected = prepare_tiny(tmp_path / "a", quality="random", trajectories=5)
    path, rng = expected.with_name("behaviour.pt"), np.random.default_rng(4)
    whole, wanted, refused = path.read_bytes(), data.load(expected).meta["checksum"], 0
    for _ in range(FUZZ // 2):
        expected.unlink(missing_ok=True)
        path.write_bytes(mangled(whole, rng))
        try:
            made = prepare_tiny(tmp_path / "a", quality="random", trajectories=5)
        except data.DataError as error:
            assert "\n" not in str(error) and "behaviour.pt" in str(error)
            refused += 1
        else:
            assert data.load(made).meta["checksum"] == wanted
    assert refused > 0.3 * FUZZ


VALUES = ["", "-1", "0", "1", "2.5", "1e999", "nan", "-inf", "x\ny", "1" * 30, "9" * 5000, "é", "٣", "0x10", "1_000"]
VALUES += ["--", "walker-params", WIND, "mixed", "rac", "none", "sac", ".", "a b", "%s", "{}", "[1]", "-", "="]


def flags_of(script):
    """Names, and what may follow each."""
    hints = get_type_hints(script.Args)
    for field in dataclasses.fields(script.Args):
        parts = [part for kind in (hints[field.name], *get_args(hints[field.name])) for part in get_args(kind)]
        yield f"--{field.name.replace('_', '-')}", {"choices": [x for x in parts if isinstance(x, str)]}


def random_words(known, rng):
    words = []
    for _ in range(rng.integers(1, 4)):
        name, more = known[rng.integers(len(known))]
        name = name[: rng.integers(3, len(name) + 1)] if rng.random() < 0.1 else name
        choices = [str(x) for x in more.get("choices") or VALUES]
        value = rng.choice(choices if rng.random() < 0.5 else VALUES)
        words += [f"{name}={value}"] if rng.random() < 0.2 else [name, value] if rng.random() < 0.9 else [name]
    return [str(word) for word in words]


@SCRIPTS
def test_fuzz_command_lines(script, capsys, tmp_path, monkeypatch):
    """Settings, or one line and exit code 2."""
    monkeypatch.chdir(tmp_path)
    known, rng, good = list(flags_of(script)), np.random.default_rng(5), 0
    for _ in range(FUZZ):
        words = random_words(known, rng)
        try:
            args = script.parse_args(words)
            good += 1
            assert "/" not in args.variant and len(args.variant) < 120
        except data.DataError as error:
            assert re.match(r"argument |unrecog|ambiguous|-", str(error)), (words, error)
    assert capsys.readouterr() == ("", "") and 0 < good < FUZZ and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- environments, played
def bang(rng, shape, hold):
    """Actions of -1 and 1, held for some steps."""
    action = np.zeros(shape)
    while True:
        for _ in range(hold):
            yield action
        action = rng.choice([-1.0, 1.0], shape)


def play(name, steps, batch=40, seed=0):
    """Random and extreme actions; how many physics blew up. What is returned is finite, and soundly so."""
    distinct = len(envs.family(name).only) or 5
    env = envs.make(name, envs.sample_tasks(name, distinct, seed).repeat(batch // distinct, axis=0), seed, threads=1)
    rng, obs, blown = np.random.default_rng(seed), env.reset()[0], 0
    ways = [bang(rng, (batch, env.family.act_dim), hold) for hold in (1, 5, 40)]
    for t in range(steps // batch):
        way = t // env.horizon % 4
        action = rng.uniform(-1, 1, (batch, env.family.act_dim)) if way == 3 else next(ways[way])
        obs, reward, terminated, truncated, info = env.step(action)
        assert np.isfinite(obs).all() and np.isfinite(reward).all() and np.isfinite(info.get("final_obs", 0)).all()
        assert not (info["blew_up"] & ~truncated).any() and not (info["blew_up"] & terminated).any()
        assert (reward[info["blew_up"]] == 0).all() and np.abs(obs).max() < 1e5
        blown += info["blew_up"].sum()
    env.close()
    return blown


@pytest.mark.parametrize("name", envs.FAMILIES)
def test_environments_stay_finite_whatever_is_done(name):
    steps = int(os.environ.get("PLAY", 1_000 if name == "humanoid-dir" else 2_400))
    assert play(name, steps) <= 1e-4 * steps


# ------------------------------------------------------------------------------------------------------------- threads
def test_the_same_number_of_threads_gives_the_same_run(files, tmp_path, no_plots):
    """With two threads too. Between one and two FOCAL++'s weights differ in their last bits."""
    rows = []
    for i in range(2):
        argv = [*flags(focal_pp, files, tmp_path / str(i)), "--threads", "2"]
        focal_pp.main(argv)
        rows.append(metrics(folder_of(focal_pp, argv)))
    torch.set_num_threads(1)
    assert rows[0] == rows[1]


def test_datasets_do_not_depend_on_workers_or_threads(tmp_path, monkeypatch):
    """One process and one thread; two more processes and two threads."""
    threads, rolled_out = [], data.roll_out
    monkeypatch.setattr(data, "roll_out", lambda *a: threads.append(torch.get_num_threads()) or rolled_out(*a))
    torch.set_num_threads(2)
    many = data.load(prepare_tiny(tmp_path / "a", workers=2))
    assert (threads, torch.get_num_threads()) == ([1], 2)
    torch.set_num_threads(1)
    monkeypatch.setattr(data, "_run_jobs", run_here)
    assert data.load(prepare_tiny(tmp_path / "b")).meta["checksum"] == many.meta["checksum"]
