"""Batched SAC against loops over tasks, builds that are killed and go on, what is in a dataset, and files refused."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SPARSE, WALKER, WIND, ended
from test_speed import NoWaiting, without_values
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import data
import envs

CPU = torch.device("cpu")
TINY = {"steps": 400, "envs": 4, "episode": 40, "updates": 1, "start": 80, "hidden": 16, "batch": 16, "lr": 0.003}
TINY |= {"alpha": 0.1, "alpha_lr": 0.003, "tau": 0.05, "discount": 0.9, "nstep": 1}
TINY |= {"checkpoints": 5, "trajectories": 5, "shard": 3, "core_minutes": 0.1, "replay": 200}
PITCH, SPEED = 3, -3  # places in a walker's full state; a huge speed makes the physics blow up


def tiny(**changes):
    return data.Settings(**(TINY | changes))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_equal(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --------------------------------------------------------------------------------------------------- SAC's arithmetic
def make_agent(tasks=3, d=3, m=2, **changes):
    """In float64; the slow targets differ from the critics, the temperatures from each other."""
    generator = torch.Generator().manual_seed(0)
    agent = data.SAC(tasks, d, m, tiny(**changes), generator).double()
    with torch.no_grad():
        for p in [*agent.target.parameters(), agent.log_alpha]:
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return agent


def draws(agent, batch=5, seed=1):
    """A minibatch (T, B, [s, a, R, s', weight]) and noise (2, T, B, m)."""
    generator = torch.Generator().manual_seed(seed)
    d, m = agent.obs_dim, agent.act_dim
    rows = torch.randn(agent.tasks, batch, 2 * d + m + 2, generator=generator, dtype=torch.float64)
    rows[..., d : d + m] = rows[..., d : d + m].tanh()
    rows[..., -1] = torch.tensor([0.9, 0, 0.729, 0.81, 0])[:batch]
    return rows, torch.randn(2, agent.tasks, batch, m, generator=generator, dtype=torch.float64)


def forward(net, i, x):
    """Network i on one input, layer by layer."""
    for k, layer in enumerate(net.layers):
        x = (x if k == 0 else x.clamp(min=0)) @ layer.weight[i] + layer.bias[i, 0]
    return x


def tanh_gaussian(out, noise):
    """The action that noise picks and its log density, as torch has them."""
    mean, log_std = out.chunk(2, dim=-1)
    normal, squash = Normal(mean, log_std.exp()), TanhTransform(cache_size=1)
    action = squash(mean + log_std.exp() * noise)
    return action, TransformedDistribution(normal, squash).log_prob(action).sum(-1)


def naive_losses(agent, i, rows, noise):
    """Critic's, actor's and temperature's loss of task i, one transition after the other."""
    d, m, alpha, total = agent.obs_dim, agent.act_dim, agent.log_alpha[i].exp(), torch.zeros(3, dtype=torch.float64)
    twins = i, agent.tasks + i
    for row, first, second in zip(rows[i], *noise[:, i], strict=True):
        s, a, r, s2, weight = row.split([d, m, 1, d, 1])
        a2, log_pi2 = tanh_gaussian(forward(agent.actor, i, s2), first)
        low = min(forward(agent.target, k, torch.cat([s2, a2])) for k in twins)
        y = (r + weight * (low - alpha * log_pi2)).detach()
        critic = sum((forward(agent.critic, k, torch.cat([s, a])) - y) ** 2 for k in twins)
        b, log_pi = tanh_gaussian(forward(agent.actor, i, s), second)
        actor = alpha.detach() * log_pi - min(forward(agent.critic, k, torch.cat([s, b])) for k in twins)
        total = total + torch.cat([critic, actor, -alpha[None] * (log_pi.detach() - m)]) / len(rows[i])
    return total


def test_losses_and_gradients_are_those_of_a_loop():
    agent = make_agent()
    rows, noise = draws(agent)
    critic, actor, temperature = sum(naive_losses(agent, i, rows, noise) for i in range(3))
    loss = agent.loss(rows, noise)
    loss.backward()
    torch.testing.assert_close(loss, critic + actor + temperature, rtol=1e-10, atol=1e-10)
    parts = [*agent.critic.parameters()], [*agent.actor.parameters()], [agent.log_alpha]
    for own, params in zip((critic, actor, temperature), parts, strict=True):
        for p, expected in zip(params, torch.autograd.grad(own, params, retain_graph=True), strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-10)
            assert p.grad.flatten(1).any(1).all() if p.dim() > 1 else p.grad.all()
    assert all(p.grad is None for p in agent.target.parameters())


def test_log_density_is_torchs():
    out = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-1.9, 1.9)
    noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(data.sample_action(out, noise), tanh_gaussian(out, noise), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    far, log_pi = data.sample_action(torch.tensor([[40.0, 0.0]]), torch.zeros(1, 1))  # where tanh is one
    assert far == 1 and log_pi == pytest.approx(-0.5 * np.log(2 * np.pi) + 80 - 2 * np.log(2), abs=1e-3)


def test_log_standard_deviation_is_kept_in_range():
    stds = torch.tensor([[0.0, -30.0], [0.0, 30.0], [0.0, -1.0]])  # log std of an action around 0
    actions, _ = data.sample_action(stds, torch.full((3, 1), 0.1))
    expected = np.tanh(0.1 * np.exp([-5, 2, -1]))
    np.testing.assert_allclose(actions[:, 0], expected, rtol=1e-6)


def test_slow_target_follows_by_tau_and_steps_have_their_own_rates():
    agent = make_agent(tau=0.3, lr=0.01, alpha_lr=0.05)
    optimiser, start = agent.optimiser(), {k: v.clone() for k, v in agent.state_dict().items()}
    for i in range(3):
        before = [p.clone() for p in agent.target.parameters()]
        agent.update(*draws(agent, seed=i), optimiser)
        for p, old, new in zip(agent.target.parameters(), before, agent.critic.parameters(), strict=True):
            torch.testing.assert_close(p, 0.7 * old + 0.3 * new, rtol=1e-12, atol=1e-12)
        if i == 0:  # Adam's first step is the learning rate
            for key, value in agent.state_dict().items():
                rate = 0.05 if key == "log_alpha" else 0.01
                assert "target" in key or (value - start[key]).abs().max().item() == pytest.approx(rate, rel=1e-3)


def test_slow_target_starts_as_the_critic():
    agent = data.SAC(2, 3, 2, tiny(), torch.Generator().manual_seed(0))
    for p, q in zip(agent.critic.parameters(), agent.target.parameters(), strict=True):
        assert_equal(p.detach(), q)
        assert not q.requires_grad and p.data_ptr() != q.data_ptr() and len(p.unique(dim=0)) == 4  # none are alike
    torch.testing.assert_close(agent.log_alpha.exp().tolist(), [TINY["alpha"]] * 2)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_n_step_rows_are_those_of_a_loop(k):
    d, m, gamma = 3, 2, 0.9
    ways = list(product(["on", "cut", "end"], repeat=k))
    rows = torch.randn(k, len(ways), 2 * d + m + 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    rows[..., -2] = torch.tensor([[way[j] == "end" for way in ways] for j in range(k)])
    rows[..., -1] = torch.tensor([[way[j] != "on" for way in ways] for j in range(k)])
    result = data.n_step(rows, d, m, gamma)
    for i, way in enumerate(ways):
        total, n = 0, 0
        for row in rows[:, i]:
            total, n = total + gamma**n * row[d + m], n + 1
            if way[n - 1] != "on":
                break
        weight = torch.tensor([0 if way[n - 1] == "end" else gamma**n], dtype=torch.float64)
        last = rows[n - 1, i, d + m + 1 : 2 * d + m + 1]
        expected = torch.cat([rows[0, i, : d + m], total[None], last, weight])
        torch.testing.assert_close(result[i], expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ the trainer
def make_trainer(env, tasks, seed=0, **changes):
    return data.Trainer(env, tasks, seed, tiny(**changes), CPU, 1)


def finish(trainer):
    while trainer.iteration < trainer.iterations:
        trainer.step()
    return trainer


def assert_same_runs(a, b, tasks=slice(None)):
    """Bit-equal policies and replay of these tasks."""
    for x, y in zip(a.result()["policies"], b.result()["policies"], strict=True):
        assert_equal(x[tasks], y[tasks])
    assert_equal(a.replay[tasks], b.replay[tasks])


@pytest.mark.parametrize("env, nstep", [(WIND, 1), (WALKER, 3)])
def test_no_cross_talk_between_tasks_in_training(env, nstep):
    a, b, c = envs.sample_tasks(env, 3, 0)
    first, second = (finish(make_trainer(env, np.stack([a, x]), steps=240, nstep=nstep)) for x in (b, c))
    assert_same_runs(first, second, tasks=[0])
    assert not torch.equal(first.result()["policies"][-1, 1], second.result()["policies"][-1, 1])


@pytest.mark.parametrize("env, nstep", [(WIND, 1), (WALKER, 3)])
def test_a_saved_trainer_goes_on_exactly(env, nstep):
    """Saved while actions are still random, in the middle of an episode, and at the end of one."""
    tasks, changes, files = envs.sample_tasks(env, 2, 0), {"steps": 240, "nstep": nstep}, []
    whole = make_trainer(env, tasks, **changes)
    while whole.iteration < whole.iterations:
        whole.step()
        if whole.iteration in (7, 33, 40):
            files.append(io.BytesIO())
            torch.save(whole.state_dict(), files[-1])
    assert len(files) == 3
    for file in files:
        file.seek(0)
        other = make_trainer(env, tasks, seed=99, **changes)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert_same_runs(finish(other), whole)
        for key, value in whole.agent.state_dict().items():
            assert_equal(value, other.agent.state_dict()[key])


def test_policies_are_kept_from_the_untrained_to_the_last_and_the_rate_falls_to_a_tenth():
    trainer, seen = make_trainer(WIND, envs.sample_tasks(WIND, 2, 0), checkpoints=6), []
    for _ in range(101):
        seen.append(torch.cat([p.detach().flatten(1) for p in trainer.agent.actor.parameters()], 1))
        if trainer.iteration < 100:
            trainer.step()
            assert (trainer.filled == 4 * trainer.iteration).all()
    assert trainer.iterations == 100
    assert_equal(trainer.result()["policies"], torch.stack(seen[::20]))
    moved = [not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert moved == [False] * 19 + [True] * 81  # learning begins with the 80th transition of each task
    assert trainer.optimiser.param_groups[0]["lr"].item() == pytest.approx(0.1 * TINY["lr"], rel=0.1)


def test_minibatches_come_from_a_tasks_own_steps_in_a_row():
    trainer = make_trainer(WIND, envs.sample_tasks(WIND, 3, 0), nstep=3, batch=500, updates=2, discount=0.5)
    task, step, e = torch.meshgrid(torch.arange(3), torch.arange(100), torch.arange(4), indexing="ij")
    trainer.replay.zero_()
    trainer.replay[..., 0], trainer.replay[..., 1], trainer.replay[..., 2] = task, step, e
    trainer.replay[..., 4], trainer.replay[..., 5], trainer.replay[..., 6] = 1, task, step + 1
    trainer.filled.fill_(20 * 4)
    seen = []
    trainer.agent.update = lambda rows, noise, optimiser: seen.append((rows, noise))
    trainer.learn_eagerly()
    assert len(seen) == 2 and not torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][1], seen[1][1])
    for i in range(3):
        rows = torch.cat([rows[i] for rows, _ in seen])
        assert (rows[:, 0] == i).all() and (rows[:, 5] == i).all()
        assert (rows[:, 6] == rows[:, 1] + 3).all()
        assert (rows[:, 4] == 1 + 0.5 + 0.25).all() and (rows[:, 7] == 0.5**3).all()
        assert len(rows[:, 1:3].unique(dim=0)) == 18 * 4 and rows[:, 6].max() == 20


def test_exploration_samples_the_policy():
    trainer = make_trainer(WIND, envs.sample_tasks(WIND, 2, 0), start=0)
    with torch.no_grad():
        for p in trainer.agent.actor.parameters():
            p.zero_()  # then an action is tanh of its noise
    noise = np.arctanh(np.stack([trainer.act() for _ in range(1500)])[500:].astype(float)).reshape(1000, 16)
    assert noise.mean() == pytest.approx(0, abs=0.1) and noise.std() == pytest.approx(1, abs=0.05)
    assert (noise[1:] * noise[:-1]).mean() == pytest.approx(0, abs=0.05)
    assert np.abs(np.corrcoef(noise.T) - np.eye(16)).max() < 0.3


def test_the_first_actions_of_each_task_are_uniform():
    """As many as `start`, over all sub-environments together."""
    trainer = make_trainer(WIND, envs.sample_tasks(WIND, 2, 0), start=8, envs=4)
    with torch.no_grad():
        for p in trainer.agent.actor.parameters():
            p.zero_()
        p[..., 2:] = -20  # the bias of log std: as small as it gets
    for uniform in (True, True, False, False):
        assert (np.abs(trainer.act()).max() > 0.3) == uniform
        trainer.iteration += 1


def test_choosing_actions_fits_into_a_graph():
    """No operation waits for the device, or reads from the host."""
    trainer = make_trainer(WALKER, envs.sample_tasks(WALKER, 2, 0))
    without_values(trainer)
    with NoWaiting() as mode:
        trainer.choose_eagerly()
    assert mode.count > 10


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_actions_from_a_graph_are_those_of_the_policy(monkeypatch):
    """Before it is captured and after, with the same draws as one operation after the other."""
    trainers = []
    for graphs in (True, False):
        monkeypatch.setattr(data, "GRAPHS", graphs)
        tasks = envs.sample_tasks(WALKER, 2, 0)
        trainers.append(data.Trainer(WALKER, tasks, 0, tiny(start=0), torch.device("cuda"), 1))
    for _ in range(8):
        a, b = (trainer.act() for trainer in trainers)
        np.testing.assert_allclose(a, b, atol=1e-5)
        for trainer in trainers:
            trainer.obs = trainer.obs + 0.1


def test_a_blow_up_is_not_learned_from():
    trainer = make_trainer(WALKER, envs.sample_tasks(WALKER, 2, 0), envs=2)
    for _ in range(3):
        trainer.step()
    trainer.vector._full[1, [PITCH, SPEED]] = 1.5, 1e12
    trainer.step()
    before, blown = trainer.replay[:, 2], trainer.replay[:, 3]
    assert trainer.replay.isfinite().all() and trainer.replay[:, :4].abs().max() < 100
    assert_equal(before[0, 1], blown[0, 1])
    assert before[0, 1, -1] == 1 and before[0, 1, -2] == 0  # cut, not terminal
    for i, j in ((0, 0), (1, 0), (1, 1)):
        assert before[i, j, -1] == 0 and not torch.equal(before[i, j], blown[i, j])
    assert_equal(trainer.vector._elapsed, [4, 0, 4, 4])


# ---------------------------------------------------------------------------------------------------- whole builds
def prepare(folder, env=WIND, quality="mixed", seed=3, train=3, test=2, workers=1, **changes):
    changes = TINY | {"train": train, "test": test, "workers": workers} | changes
    return data.prepare(env, quality, seed, folder, device="cpu", **changes)


def run_here(jobs, *_):
    """In place of processes."""
    for job in jobs:
        list(data._train_shard(**job))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture
def copied(folder, tmp_path):
    """A folder with a behaviour in it and nothing else."""
    made = prepare(folder)
    there = tmp_path / made.relative_to(folder).parent
    there.mkdir(parents=True)
    shutil.copy(made.with_name("behaviour.pt"), there)
    return there


def start(words, cwd, **more):
    """A process that can import what is here."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(words, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, **more)


def wait_for(condition, process):
    until = time.time() + 60
    while not condition():
        assert process.poll() is None and time.time() < until
        time.sleep(0.005)


def names(folder):
    return {path.name for path in folder.iterdir()} - {".lock"}


@pytest.mark.parametrize("quality", sorted({*data.QUALITIES} - {"relabelled"}))
def test_every_quality_builds(quality, folder):
    path = prepare(folder, quality=quality)
    assert path == folder / WIND / "3+2-seed3" / f"{quality}.npz"
    dataset = data.load(path, WIND)
    n = 200 if quality == "replay" else 1000
    assert dataset.observations.shape == dataset.next_observations.shape == dataset.actions.shape == (5, n, 2)
    assert dataset.rewards.shape == dataset.terminals.shape == dataset.episodes.shape == (5, n)
    assert dataset.train_tasks.tolist() == [0, 1, 2] and dataset.test_tasks.tolist() == [3, 4]
    assert_equal(dataset.tasks, envs.sample_tasks(WIND, 5, 3))
    assert [dataset.meta[key] for key in ("env", "quality", "seed")] == [WIND, quality, 3]
    assert dataset.meta["settings"] == dataclasses.asdict(tiny())
    assert dataset.meta["versions"]["torch"] == torch.__version__
    random = data.load(prepare(folder, quality="random")).observations
    assert quality == "random" or not torch.equal(random[:, :n], dataset.observations)


def test_nothing_is_built_twice(folder, monkeypatch):
    mixed, expert = prepare(folder), prepare(folder, quality="expert")
    stamps = [path.stat().st_mtime_ns for path in sorted(mixed.parent.iterdir())]
    assert prepare(folder) == mixed and prepare(folder, quality="expert") == expert
    assert stamps == [path.stat().st_mtime_ns for path in sorted(mixed.parent.iterdir())]
    assert all(name.endswith(".npz") for name in names(mixed.parent) - {"behaviour.pt"})
    monkeypatch.setattr(data, "_run_jobs", None)
    before = expert.read_bytes()
    expert.unlink()
    assert prepare(folder, quality="expert").read_bytes()[:2] == b"PK"
    assert data.load(expert).meta["checksum"] in before.decode("latin1").replace("\0", "")


# ---------------------------------------------------------------------------------------------------------- workers
UNGUARDED = (
    f"import data; print(data.prepare({WIND!r}, 'mixed', 3, '.', train=3, test=2, device='cpu', workers=2, **{TINY}))"
)


def output_of(process):
    """What a process wrote, standard output and error; it has two minutes."""
    said = process.communicate(timeout=120)
    return [text.decode() for text in said]


def test_a_script_without_a_guard_builds_with_workers(folder, tmp_path):
    """Workers do not run it again: it would build, in each of them, what its first run builds."""
    (tmp_path / "script.py").write_text("print('once')\n" + UNGUARDED)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    out, err = output_of(start([sys.executable, "script.py"], tmp_path, **pipes))
    assert out.count("once") == 1 and out.splitlines()[-1].endswith("mixed.npz") and err == ""
    made = tmp_path / WIND / "3+2-seed3" / "mixed.npz"
    assert data.load(made).meta["checksum"] == data.load(prepare(folder)).meta["checksum"]


def worker(patch):
    """What a worker runs, with something that happens to it."""
    return data.WORKER.replace("data.work()", f"\nimport os, time\n{patch}\ndata.work()")


def test_a_killed_worker_ends_the_build_in_one_line_and_it_goes_on(folder, tmp_path, monkeypatch, capfd):
    """Out of memory kills a worker, not the whole; what it had saved is not done again, even by fewer workers."""
    patch = "step, data.SAVE_EVERY = data.Trainer.step, 0\n"
    patch += "data.Trainer.step = lambda t: os.kill(os.getpid(), 9) if t.n == 2 and t.iteration == 50 else step(t)"
    with monkeypatch.context() as killed, pytest.raises(data.DataError, match="a process failed or was killed"):
        killed.setattr(data, "WORKER", worker(patch))
        prepare(tmp_path, workers=2)
    assert not list(tmp_path.rglob("*.npz"))
    part = torch.load(tmp_path / WIND / "3+2-seed3" / "behaviour-part1.pt", weights_only=True)
    assert 0 < part["trainer"]["iteration"] <= 50
    again = data.load(prepare(tmp_path))
    assert "going on" in capfd.readouterr().out
    assert names(tmp_path / WIND / "3+2-seed3") == {"behaviour.pt", "mixed.npz"}
    assert again.meta["checksum"] == data.load(prepare(folder)).meta["checksum"]


def test_what_is_left_of_a_build_is_shared_out_evenly(tmp_path, monkeypatch):
    """Though every second part is done, which would be one worker's."""
    jobs, seen = [{"path": tmp_path / str(i)} for i in range(12)], {}
    for job in jobs[::2]:
        job["path"].touch()
    who = "for i, _ in pickle.load(sys.stdin.buffer): os.write(1, f'{json.dumps([i, os.getpid()])}\\n'.encode())"
    monkeypatch.setattr(data, "WORKER", f"import json, os, pickle, sys\n{who}")
    data._run_in_workers(jobs, 2, seen.__setitem__)
    left = [pid for i, pid in sorted(seen.items()) if i % 2]
    assert len(seen) == 12 and len({*left}) == 2 and left.count(left[0]) == 3


@pytest.mark.parametrize(
    ("patch", "error"),
    [
        ("data.Trainer.step = lambda t: t.vector.step(t.obs / 0)", FloatingPointError),
        ("data.write = lambda path, _: open(path / 'x', 'wb')", data.DataError),
        ("data.Trainer.step = lambda t: bytearray(2**62)", data.DataError),
    ],
)
def test_what_a_worker_raises_is_raised(patch, error, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "WORKER", worker(patch))
    with pytest.raises(error) as raised:
        prepare(tmp_path, workers=2)
    said = str(raised.value)
    assert "\n" not in said and (error is not data.DataError or "part" in said or said == "out of memory")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_a_build(number, tmp_path):
    """Killed, or interrupted at a terminal, whose Ctrl-C reaches workers too; the last save stands."""
    ran = "[step(t), open(f'ran{os.getpid()}', 'w').close(), time.sleep(0.1)]"
    slow = worker(f"step = data.Trainer.step\ndata.Trainer.step = lambda t: {ran}\n")
    code = f"import data\ndata.WORKER = {slow!r}\n{UNGUARDED}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    process = start([sys.executable, "-c", code], tmp_path, **pipes)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: len(list(tmp_path.glob("ran*"))) == 2, process)  # their imports take seconds
    workers = [Path(f"/proc/{pid}") for pid in children.read_text().split()]
    (process.kill if number == signal.SIGKILL else lambda: os.killpg(process.pid, number))()
    err = output_of(process)[1]
    until = time.time() + 60
    while any(path.exists() and "State:\tZ" not in (path / "status").read_text() for path in workers):
        assert time.time() < until
        time.sleep(0.05)
    assert err.count("Traceback") == (number == signal.SIGINT)  # of the parent alone


def test_a_family_of_ones_own_needs_no_worker(tmp_path, monkeypatch):
    """It is known in this process only."""
    monkeypatch.setitem(envs.FAMILIES, "mine", dataclasses.replace(envs.FAMILIES[WIND], data_horizon=20))
    monkeypatch.setattr(data, "_run_in_workers", None)
    assert data.load(prepare(tmp_path, env="mine", workers=2)).rewards.shape == (5, 100)


def test_a_family_that_was_changed_before_data_is_imported_has_no_worker_either(tmp_path):
    mine = f"envs.FAMILIES[{WIND!r}] = dataclasses.replace(envs.FAMILIES[{WIND!r}], train=3)"
    code = f"import dataclasses, envs\n{mine}\nimport data\ndata._run_in_workers = None\n{UNGUARDED}"
    out, err = output_of(start([sys.executable, "-c", code], tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    assert out.splitlines()[-1].endswith("mixed.npz") and err == ""


# ------------------------------------------------------------------------------------------------ parts of a behaviour
@pytest.fixture
def part(tmp_path):
    """A function that makes one part of a behaviour, two tasks, in this process."""

    def train(**changes):
        tasks, settings = envs.sample_tasks(WIND, 2, 0), dataclasses.asdict(tiny(**changes))
        reports = list(data._train_shard(tmp_path / "part.pt", WIND, tasks, 5, settings, "cpu", 1))
        assert reports[-1] == settings["steps"] // settings["envs"]
        return tmp_path / "part.pt"

    return train


def test_a_finished_part_is_kept_and_its_settings_are_checked(part):
    path = part()
    stamp = path.stat().st_mtime_ns
    assert part() == path and path.stat().st_mtime_ns == stamp
    with pytest.raises(data.DataError, match=r"part\.pt: .*steps.*400.*800"):
        part(steps=800)
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("often", [0, 1000])
def test_a_part_whose_last_write_failed_is_completed(part, monkeypatch, often):
    whole = data.read(part())["policies"]
    part().unlink()
    monkeypatch.setattr(data, "SAVE_EVERY", often)
    with monkeypatch.context() as full, pytest.raises(OSError):
        full.setattr(data.Trainer, "result", lambda _: data.read(Path("nowhere")))
        part()
    assert torch.equal(data.read(part())["policies"], whole)


def test_a_resumed_builds_rate_is_that_of_this_process(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    bar = data.Progress("x", 1000)
    for done in (500, 520, 560):
        bar.show(done)
        now[0] += 20
    assert capsys.readouterr().out.splitlines()[-1] == "x:  56%, 2.00 steps/s, 3.7 min left"


TOO_LITTLE = {"envs": 500}, {"envs": 150, "start": 350}, {"envs": 4, "nstep": 101}
IDLE = [(changes, "--sac-steps: with 400 nothing would be learned") for changes in TOO_LITTLE]
IDLE += [({"checkpoints": 1}, "--checkpoints: expected at least 2")]
IDLE += [({"trajectories": 1}, "--trajectories: mixed data are of several policies")]
IDLE += [({"quality": "replay", "envs": 8, "replay": 7}, "--replay 7: expected 8 or more")]


@pytest.mark.parametrize(("changes", "said"), IDLE)
def test_settings_with_which_nothing_would_be_learned_are_refused_at_once(tmp_path, changes, said):
    with pytest.raises(data.DataError, match=said):
        prepare(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_on_cuda_a_step_learns_before_it_collects_and_needs_one_step_more():
    settings = lambda device, steps: data.settings_for(WIND, torch.device(device), steps=steps, start=400, envs=8)
    assert settings("cpu", 400) and settings("cuda", 408)
    with pytest.raises(data.DataError, match="--sac-steps: with 400 nothing would be learned"):
        settings("cuda", 400)


def test_another_settings_is_refused(copied):
    for change in ({"discount": 0.8}, {"hidden": 8}, {"steps": 800}):
        (key, value), before = *change.items(), (copied / "behaviour.pt").read_bytes()
        with pytest.raises(data.DataError) as error:
            prepare(copied.parent.parent, **change)
        text = str(error.value)
        assert all(str(x) in text for x in (copied / "behaviour.pt", key, value, TINY[key])) and "\n" not in text
        assert (copied / "behaviour.pt").read_bytes() == before and names(copied) == {"behaviour.pt"}
    assert prepare(copied.parent.parent, core_minutes=7.0, trajectories=10).exists()  # these change no agent
    with pytest.raises(data.DataError, match=r"mixed.npz: made with --trajectories 10, asked for \[5\]; use another"):
        prepare(copied.parent.parent)
    assert prepare(copied.parent.parent, trajectories=None, discount=None).exists()  # whatever they are


def test_agents_that_are_there_are_used_unless_a_flag_asks_for_others(copied):
    """As those made on another kind of device, whose defaults differ."""
    how = {"env": WIND, "seed": 3, "data_dir": copied.parent.parent, "device": "cpu"}
    how |= {"train": 3, "test": 2, "workers": 1}
    path = data.prepare(**how, quality="expert", trajectories=5)
    assert data.load(path).meta["settings"] | {"core_minutes": 0} == vars(data.Settings(**TINY)) | {"core_minutes": 0}
    with pytest.raises(data.DataError, match="made with --sac-hidden"):
        data.prepare(**how, quality="random", hidden=9)


def test_settings_on_cuda():
    """A family's own, where it has some, the larger sizes elsewhere."""
    hopper, walker = (data.settings_for(env, torch.device("cuda")) for env in ("hopper-params", WALKER))
    assert (hopper.tau, hopper.hidden, hopper.steps) == (0.005, 256, 400_000)
    assert (walker.tau, walker.alpha, walker.hidden, walker.lr) == (0.01, 0.2, 256, 3e-4)
    for found, updates in ((hopper, 8), (walker, 2)):  # as many gradient steps for a transition
        assert (found.envs, found.updates) == (8 * data.WIDER, updates * data.WIDER)


def test_more_tasks_than_there_are_is_refused(tmp_path):
    with pytest.raises(data.DataError, match="different tasks"):
        data.prepare("sawyer", "mixed", data_dir=tmp_path, train=2500, test=10, device="cpu")


def test_what_a_build_will_take_is_in_proportion(tmp_path, capsys, monkeypatch):
    """A family of one's own is built on one core."""
    monkeypatch.setitem(envs.FAMILIES, "mine", dataclasses.replace(envs.FAMILIES[WALKER]))
    monkeypatch.setitem(data.SMALL, "mine", data.SMALL[WALKER])
    cases = [(WALKER, 1, 25, 170_000, "40 min on 1 core"), (WALKER, 1, 5, 170_000, "8 min on 1 core")]
    cases += [(WALKER, 1, 25, 17_000, "4 min on 1 core"), (WALKER, 4, 25, 170_000, "10 min on 4 cores")]
    for env, cores, tasks, steps, about in (*cases, ("mine", 4, 25, 170_000, "40 min on 1 core")):
        settings = data.settings_for(WALKER, CPU, steps=steps, core_minutes=40.0)
        data._announce(tmp_path / "mixed.npz", settings, env, CPU, cores, tasks)
        assert f"about {about}" in capsys.readouterr().out


def test_a_save_holds_what_was_met_and_no_more():
    trainer = make_trainer(WIND, envs.sample_tasks(WIND, 2, 0), steps=40_000)
    for _ in range(3):
        trainer.step()
    replay = trainer.state_dict()["replay"]
    assert replay.shape[1] == 3 and replay.untyped_storage().nbytes() == 4 * replay.numel()


def test_shards_qualities_and_seeds_draw_each_their_own(folder, monkeypatch):
    policies = torch.load(prepare(folder).with_name("behaviour.pt"), weights_only=True)["policies"]
    assert not torch.equal(policies[0, 0], policies[0, 3])  # the first tasks of the two shards, untrained
    agents = {"policies": policies[:1].expand(5, -1, -1), "early": None}
    tasks = envs.sample_tasks(WIND, 5, 3)
    kinds = ("random", 3), ("expert", 3), ("mixed", 3), ("mixed", 4)
    seeds, make = [], envs.make
    monkeypatch.setattr(envs, "make", lambda *args, seed, **more: seeds.append(seed) or make(*args, seed=seed, **more))
    a, b, c, d = (data.roll_out(WIND, tasks, kind, agents, tiny(), seed)["actions"] for kind, seed in kinds)
    assert (a != b).mean() > 0.9 and (c != d).mean() > 0.9 and len({*seeds}) == 4  # initial states too


@pytest.mark.parametrize("way", ["empty", "cut", "noise", "a list", "no tasks", "another version", "other tasks"])
def test_a_damaged_behaviour_is_refused(way, copied):
    path = copied / "behaviour.pt"
    whole, saved = path.read_bytes(), torch.load(path, weights_only=True)
    raw = {"empty": b"", "cut": whole[: len(whole) // 2], "noise": np.random.default_rng(0).bytes(5000)}
    made = {"a list": [1, 2], "no tasks": {key: saved[key] for key in saved if key != "tasks"}}
    made["another version"] = saved | {"settings": saved["settings"] | {"n_critics": 3}}
    made["other tasks"] = saved | {"tasks": saved["tasks"] + 0.01}
    path.write_bytes(raw[way]) if way in raw else torch.save(made[way], path)
    with pytest.raises(data.DataError) as error:
        prepare(copied.parent.parent)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert names(copied) == {"behaviour.pt"}


NO_FAULT = [MemoryError(), RuntimeError("can't allocate memory"), PermissionError(errno.EACCES, "Permission denied")]
NO_FAULT += [OSError(errno.EIO, "Input/output error", "x")]


@pytest.mark.parametrize("error", NO_FAULT)
def test_a_behaviour_that_cannot_be_read_is_not_called_damaged(error, copied, monkeypatch):
    """Nobody is told to delete good work."""

    def fail(*_):
        raise error

    monkeypatch.setattr(data, "read", fail)
    with pytest.raises(type(error)) as raised:
        prepare(copied.parent.parent)
    assert raised.value is error


def test_what_another_process_built_meanwhile_is_looked_at(folder, tmp_path, monkeypatch):
    built = prepare(folder).parent
    monkeypatch.setattr(data, "locked", lambda there: contextlib.nullcontext(shutil.copytree(built, there)))
    with pytest.raises(data.DataError, match="made with --trajectories 5"):
        prepare(tmp_path, trajectories=9)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(data.DataError, match="'best'.*mixed"):
        prepare(tmp_path, quality="best")
    with pytest.raises(ValueError, match="unknown environment 'cheetah'; expected one of "):
        prepare(tmp_path, env="cheetah")
    assert names(tmp_path) == set()


@pytest.mark.skipif(data.fcntl is None, reason="needs file locks")
def test_one_builder_at_a_time(tmp_path, capsys):
    def other():
        with data.locked(tmp_path):
            entered.set()

    entered, thread = threading.Event(), threading.Thread(target=other)
    with data.locked(tmp_path):
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(10)
    thread.join()
    assert str(tmp_path) in capsys.readouterr().out


@pytest.mark.skipif(data.fcntl is None, reason="needs file locks")
def test_a_file_system_without_locks_is_built_on(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(data.fcntl, "flock", flock)
    assert data.prepare("sawyer", "mixed", data_dir=tmp_path, train=1, test=1, trajectories=1).exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(error, tmp_path):
    def fail(file):
        file.write(b"half of the n")
        assert path.read_bytes() == b"old"
        raise error

    path = tmp_path / "file"
    data.write(path, lambda file: file.write(b"old"))
    with pytest.raises(error):
        data.write(path, fail)
    assert path.read_bytes() == b"old" and names(tmp_path) == {"file"}
    data.write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and names(tmp_path) == {"file"}


# ---------------------------------------------------------------------------------------------- what a dataset holds
CONTENT = [(WIND, quality) for quality in sorted({*data.QUALITIES} - {"relabelled"})]
CONTENT += product([SPARSE, WALKER], ["mixed", "replay"])


@pytest.fixture
def dataset(request, folder):
    env, quality = request.param
    changes = {"shard": 2} | ({"nstep": 3, "trajectories": 3} if env == WALKER else {})
    return env, quality, data.load(prepare(folder, env, quality, train=2, test=1, **changes), env)


def slots(env, quality, dataset):
    """Rows of one trajectory, and the longest episode in it."""
    return (50, 40) if quality == "replay" else (envs.family(env).data_horizon, envs.family(env).data_horizon)


def step_again(env, dataset, tasks):
    """Errors of stored next observations and rewards, were the rows those of these tasks."""
    obs, action = (x.flatten(0, 1).numpy().astype(float) for x in (dataset.observations, dataset.actions))
    after, reward = dataset.next_observations.flatten(0, 1), dataset.rewards.flatten()
    vector = envs.make(env, tasks.repeat(len(obs) // len(tasks), axis=0), threads=1, horizon=9, autoreset=False)
    vector.reset()
    vector._full[:] = np.concatenate([np.zeros((len(obs), vector._full.shape[1] - obs.shape[1])), obs], axis=1)
    after2, reward2, *_ = vector.step(action)
    vector.close()
    sound = np.abs(obs).max(1) < 10  # a walker's clipped velocities cannot be set again
    assert sound.sum() > 50
    return np.abs(after2 - after.numpy()).max(1)[sound], np.abs(reward2 - reward.numpy())[sound]


@pytest.mark.parametrize("dataset", CONTENT, indirect=True)
def test_transitions_are_those_of_their_own_task(dataset):
    env, _, dataset = dataset
    share, tolerance = (90, 1e-3) if env == WALKER else (100, 1e-6)
    for errors in step_again(env, dataset, dataset.tasks):
        assert np.percentile(errors, share) < tolerance
    other = step_again(env, dataset, np.roll(dataset.tasks, 1, axis=0))
    assert np.median(np.maximum(*other)) > 10 * tolerance


@pytest.mark.parametrize("dataset", CONTENT, indirect=True)
def test_episodes_are_in_order_and_end_where_they_should(dataset):
    env, quality, dataset = dataset
    slot, longest = slots(env, quality, dataset)
    episodes, terminals = dataset.episodes.numpy(), dataset.terminals.numpy()
    assert episodes.shape[1] % slot == 0
    for task, ends in zip(episodes, terminals, strict=True):
        if quality == "replay":  # episodes of 4 sub-environments, in the order in which they began
            length = np.bincount(task)
            last = np.cumsum(length) - 1
            assert_equal(task, np.repeat(np.arange(len(length)), length))
            assert ((ends[last] == 1) | (length == longest)).sum() >= len(length) - 4 and length.max() <= longest
            assert ends.sum() == ends[last].sum()
            continue
        number, length = -1, 0
        for t, found in enumerate(task):
            if t % slot == 0 or length == longest or ends[t - 1]:
                number, length = number + 1, 0
            length += 1
            assert found == number, t
    inside = episodes[:, 1:] == episodes[:, :-1]
    assert_equal(dataset.next_observations[:, :-1][inside], dataset.observations[:, 1:][inside])
    assert not (dataset.next_observations[:, :-1][~inside] == dataset.observations[:, 1:][~inside]).all(1).any()
    starts = dataset.observations[:, 1:][~inside]
    assert (starts == 0).all() if env != WALKER else ((starts[:, 0] - 1.25).abs() < 0.006).all()
    fell = [envs.family(env).terminated(x.numpy()) for x in dataset.next_observations]
    assert_equal(terminals.astype(bool), np.stack(fell))
    if env == WALKER:
        assert 5 < terminals.sum() < 0.3 * terminals.size
    else:
        assert not terminals.any()  # a time limit is not the MDP's end


@pytest.mark.parametrize("dataset", CONTENT, indirect=True)
def test_returns_are_those_of_first_episodes(dataset):
    """Of every trajectory; in replay, of all episodes that were seen to their end."""
    env, quality, dataset = dataset
    if quality == "replay":
        task, _, returns = data.episode_returns(dataset)
        return assert_equal(dataset.returns, [np.float32(returns[task == i].mean()) for i in range(3)])
    slot, _ = slots(env, quality, dataset)
    for i, rewards in enumerate(dataset.context_rewards.double()):
        returns = []
        for start in range(0, len(rewards), slot):
            rows = range(start, start + min(slot, envs.family(env).horizon))
            returns.append(sum(rewards[t].item() for t in rows if dataset.episodes[i, t] == dataset.episodes[i, start]))
        assert dataset.returns[i] == pytest.approx(np.mean(returns), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dataset", [c for c in CONTENT if c[1] == "replay"], indirect=True)
def test_replay_begins_with_uniform_actions(dataset):
    dataset = dataset[2]
    began_first = zip(dataset.actions, dataset.episodes, strict=True)  # the first episode of each of 4 sub-environments
    first = torch.cat([actions[episode == k][:20] for actions, episode in began_first for k in range(4)]).flatten()
    assert first.abs().max() <= 1 and abs(first.mean()) < 0.15 and first.var().item() == pytest.approx(1 / 3, rel=0.2)


def constant(actions, log_std=-5.0, hidden=16, d=2):
    """Policies (checkpoints, T, parameters) with these mean actions (checkpoints, T, m) everywhere."""
    actions = torch.as_tensor(actions)
    last = torch.cat([actions.atanh(), torch.full_like(actions, log_std)], dim=-1)
    sizes = [d * hidden, hidden, hidden * hidden, hidden, hidden * last.shape[-1]]
    return torch.cat([torch.zeros(*last.shape[:2], sum(sizes)), last.float()], dim=-1)


def test_each_quality_plays_its_own_policies():
    """Five checkpoints that move faster and faster towards the goal, and two tasks that learn at different times."""
    tasks, speed = np.array([[0.0, 0.0], [0.01, 0.0]]), 0.1 * np.array([[0, 1, 2, 3, 4], [0, 2, 4, 4, 4]])
    actions = np.stack([speed, [[0.5] * 5, [-0.5] * 5]], axis=-1)  # (T, checkpoints, m)
    behaviour = {"policies": constant(actions.swapaxes(0, 1))}
    chosen = {"random": [[0] * 10] * 2, "expert": [[4] * 10] * 2, "medium": [[2] * 10, [1] * 10]}
    chosen["mixed"] = [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 2
    for quality, checkpoints in chosen.items():
        arrays = data.roll_out(WIND, tasks, quality, behaviour, tiny(trajectories=10), 0)
        played = arrays["actions"].reshape(2, 10, 200, 2)
        np.testing.assert_allclose(played.mean(2), actions[[[0], [1]], checkpoints], atol=0.005, err_msg=quality)
        assert len(np.unique(played[..., 0])) > 3000  # every trajectory has draws of its own


def test_a_single_lucky_policy_is_not_the_medium_one(monkeypatch):
    """Its return is the mean of three neighbours in time."""
    played, returns, policies = [], np.arange(50.0), torch.arange(50.0)[:, None, None]  # (checkpoints, T, parameters)
    returns[3] = 24.5  # half-way from the first to the last
    found = {"first_return": returns[None]}
    monkeypatch.setattr(data, "play_policies", lambda *args: played.append(args[2].flatten().tolist()) or found)
    data.roll_out(WIND, np.zeros((1, 2)), "medium", {"policies": policies}, tiny(), 0)
    assert played == [list(range(50)), [24]]


def test_constant_observations_are_not_blown_up():
    mean, std = data.standardisation(torch.full((2, 3, 1), 5.0))
    assert mean.item() == 5 and std.item() == pytest.approx(1e-3)


def test_actions_are_sampled():
    behaviour = {"policies": constant([[[0.2, -0.2]]], log_std=-1.0)}
    arrays = data.roll_out(WIND, np.zeros((1, 2)), "expert", behaviour, tiny(), 0)
    noise = (np.arctanh(arrays["actions"]) - np.arctanh([0.2, -0.2])) * np.e
    assert abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1, abs=0.05)
    assert abs((noise[..., 0] * noise[..., 1]).mean()) < 0.1


def naive_sparse(goal, position):
    distance = np.linalg.norm(goal - position)
    return 1 - distance if distance <= 0.2 else 0.0


def test_sparse_rewards_and_their_returns():
    tasks = envs.sample_tasks(SPARSE, 2, 0)
    arrays = data.roll_out(SPARSE, tasks, "expert", {"policies": constant(0.6 * tasks[None])}, tiny(), 0)
    expected = [[naive_sparse(g, s) for s in rows] for g, rows in zip(tasks, arrays["next_observations"], strict=True)]
    np.testing.assert_allclose(arrays["sparse_rewards"], expected, atol=1e-5)
    returns = np.reshape(expected, (2, 5, 200))[..., :20].sum(2)
    np.testing.assert_allclose(arrays["first_return"], returns, atol=1e-4)
    assert (returns > 2).all() and (arrays["rewards"] < 0).all()


def test_replay_dataset_is_made_of_the_first_steps():
    """Two tasks, two sub-environments, four steps, rows by hand."""
    tasks, rng = envs.sample_tasks(SPARSE, 2, 0), np.random.default_rng(0)
    early = rng.uniform(-1, 1, (2, 4, 2, 9)).astype(np.float32)  # (T, iterations, envs, D)
    early[..., 5:7] = tasks[:, None, None] + 0.2 * early[..., 5:7]
    early[..., 7:] = 0
    early[0, 1, 1, 8] = early[1, 0, 0, 8] = early[1, 2, 0, 7] = early[1, 2, 0, 8] = 1
    behaviour = {"early": torch.from_numpy(early), "policies": torch.zeros(5, 2, 1)}
    arrays = data.roll_out(SPARSE, tasks, "replay", behaviour, tiny(), 0)
    by_env = early.swapaxes(1, 2).reshape(2, 8, 9)
    rows = np.stack([by_env[0], by_env[1, [0, 4, 5, 6, 7, 1, 2, 3]]])  # episodes in the order in which they began
    for key, part in (("observations", slice(2)), ("actions", slice(2, 4)), ("next_observations", slice(5, 7))):
        assert_equal(arrays[key], rows[..., part])
    assert_equal(arrays["rewards"], rows[..., 4])
    assert_equal(arrays["terminals"], rows[..., 7])
    assert arrays["episodes"].tolist() == [[0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 2, 2, 3]]
    sparse = [[naive_sparse(g, row[5:7]) for row in task] for g, task in zip(tasks, rows, strict=True)]
    np.testing.assert_allclose(arrays["sparse_rewards"], sparse, atol=1e-6)
    assert 3 < np.count_nonzero(sparse) < 16


class Fragile(envs.TaskVectorEnv):
    """Walkers whose second row, or all, blow up at the given steps."""

    at, rows = (), slice(1, 2)

    def step(self, actions):
        self.count = getattr(self, "count", -1) + 1
        if self.count in self.at:
            self._full[self.rows, PITCH], self._full[self.rows, SPEED] = 1.5, 1e12
        return super().step(actions)


def roll_out_walkers():
    torch.manual_seed(0)
    actor = data.BatchedMLP(1, 17, 16, 12)
    policies = torch.cat([p.detach().flatten(1) for p in actor.parameters()], 1)[None]
    tasks = envs.sample_tasks(WALKER, 1, 0)
    return data.roll_out(WALKER, tasks, "expert", {"policies": policies}, tiny(trajectories=2), 0)


def test_blown_up_steps_are_not_stored(monkeypatch):
    calm = roll_out_walkers()
    monkeypatch.setattr(envs, "make", Fragile)
    monkeypatch.setattr(Fragile, "at", (3, 4))
    blown = roll_out_walkers()
    assert all(np.isfinite(array).all() and array.shape == calm[key].shape for key, array in blown.items())
    for key in ("observations", "next_observations", "actions", "rewards", "terminals"):
        assert_equal(blown[key][0, :203], calm[key][0, :203])
    assert np.abs(blown["next_observations"]).max() < 20
    assert (blown["observations"] != blown["next_observations"]).any(2).all()
    episodes, terminals = blown["episodes"][0], blown["terminals"][0]
    assert episodes[203] == episodes[202] + 1 and terminals[202] == 0  # a cut
    assert blown["first_return"][0, 1] == pytest.approx(blown["rewards"][0, 200:203].sum(), rel=1e-5)
    assert abs(blown["observations"][0, 203, 0] - 1.25) < 0.006


def test_physics_that_always_blows_up_is_an_error(monkeypatch):
    monkeypatch.setattr(envs, "make", Fragile)
    monkeypatch.setattr(Fragile, "at", range(1000))
    with pytest.raises(data.DataError, match=WALKER):
        roll_out_walkers()


# ------------------------------------------------------------------------------------------------------ stored files
def sample(seed=0):
    """Three tasks of point-robot-wind, six transitions of each in two episodes."""
    rng = np.random.default_rng(seed)
    arrays = {"observations": (3, 6, 2), "actions": (3, 6, 2), "rewards": (3, 6), "next_observations": (3, 6, 2)}
    arrays = {key: rng.uniform(-1, 1, shape).astype(np.float32) for key, shape in arrays.items()}
    arrays["terminals"] = np.float32([[0, 0, 1, 0, 0, 0]] * 3)
    arrays["episodes"] = np.int32([[0, 0, 0, 1, 1, 1]] * 3)
    arrays |= {"tasks": rng.uniform(-0.05, 0.05, (3, 2)), "train_tasks": np.array([2, 0]), "test_tasks": np.array([1])}
    return arrays | {"sparse_rewards": arrays["rewards"] + 1, "returns": np.float32([1, 2, 3])}


def refused(path, *words, env=None):
    with pytest.raises(data.DataError) as error:
        data.load(path, env)
    text = str(error.value)
    assert str(path) in text and "\n" not in text and len(text) < len(str(path)) + 150
    assert all(word in text.replace(str(path), "") for word in words), text


def test_what_is_saved_is_loaded(tmp_path):
    arrays, path = sample(), tmp_path / "new" / "x.npz"
    data.save(path, arrays | {"first_return": np.zeros(3)}, {"env": WIND, "note": "mine"})
    dataset = data.load(str(path), WIND)
    for key, (axes, kind) in (data.REQUIRED | data.OPTIONAL).items():
        found = np.asarray(getattr(dataset, {"sparse_rewards": "context_rewards"}.get(key, key)))
        assert_equal(found, arrays[key])
        assert found.dtype == kind and found.ndim == len(axes)
    assert dataset.meta["note"] == "mine" and names(path.parent) == {"x.npz"}
    assert isinstance(dataset.observations, torch.Tensor) and isinstance(dataset.tasks, np.ndarray)
    assert set(np.load(path, allow_pickle=False).files) == {*arrays, "meta"}


def test_your_own_file_loads(tmp_path):
    arrays = {key: value for key, value in sample().items() if key in data.REQUIRED}
    np.savez(tmp_path / "own.npz", **arrays)
    for env in (None, WIND):
        dataset = data.load(tmp_path / "own.npz", env)
        assert np.isnan(dataset.returns).all() and dataset.returns.shape == (3,)
        assert_equal(dataset.context_rewards, arrays["rewards"])
        known = {"env": env} if env else {}  # the family decides how contexts are made sparse
        assert dataset.meta == known | {"checksum": data.checksum(arrays)}  # computed, for what resumes on it


def test_numbers_of_other_types_are_cast(tmp_path):
    arrays = sample()
    arrays["actions"] = np.ones_like(arrays["actions"])
    arrays["rewards"] = np.round(3 * arrays["rewards"])
    types = dict.fromkeys(("observations", "next_observations", "returns"), float) | {"actions": int, "rewards": "i1"}
    types |= {"terminals": bool, "episodes": float, "train_tasks": "u2", "test_tasks": float, "tasks": ">f8"}
    np.savez(tmp_path / "x.npz", **arrays | {key: arrays[key].astype(kind) for key, kind in types.items()})
    np.savez(tmp_path / "y.npz", **arrays)
    x, y = (vars(data.load(tmp_path / name)) for name in ("x.npz", "y.npz"))
    for key in y.keys() - {"meta"}:
        assert (x[key] == y[key]).all() and x[key].dtype == y[key].dtype


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    refused(tmp_path / ("x" * 300 + ".npz"), "cannot be read (File name too long)")
    monkeypatch.setattr(data.zipfile, "ZipFile", forbidden)
    refused(tmp_path / "x.npz", "cannot be read (Permission denied)")
    monkeypatch.setattr(data.zipfile, "ZipFile", lambda *_: bytearray(2**62))
    with pytest.raises(MemoryError):
        data.load(tmp_path / "x.npz")


def test_tasks_may_be_both_training_and_test_tasks_if_all_are(tmp_path):
    np.savez(tmp_path / "x.npz", **sample() | {"train_tasks": np.arange(3), "test_tasks": np.array([2, 1, 0])})
    assert data.load(tmp_path / "x.npz").test_tasks.tolist() == [2, 1, 0]


def put(array, value, *place):
    array = array.copy()
    array[place or (1,) * array.ndim] = value
    return array


FLOATS = ["observations", "actions", "rewards", "next_observations", "terminals", "tasks", "sparse_rewards"]
DAMAGE = {f"{key} {value}": (lambda a, k=key, v=value: {k: put(a[k], v)}, [key])
          for key, value in product(FLOATS, [np.nan, np.inf])}  # fmt: skip
DAMAGE |= {f"{key} longer": (lambda a, k=key: {k: np.concatenate([a[k]] * 2, 0)}, ["shape"])
           for key in (*FLOATS, "episodes", "returns")}  # fmt: skip
DAMAGE |= {f"{key} wider": (lambda a, k=key: {k: np.concatenate([a[k]] * 2, 1)}, ["shape"])
           for key in (*FLOATS, "episodes") if key != "tasks"}  # fmt: skip
DAMAGE |= {f"{key} of another type": (lambda a, k=key, t=kind: {k: a[k].astype(t)}, [key, kind])
           for key, kind in zip(data.REQUIRED | data.OPTIONAL, ["complex64", "<U32"] * 9, strict=False)}  # fmt: skip
DAMAGE |= {f"{key} flat": (lambda a, k=key: {k: a[k][..., None]}, [key, "axes"])
           for key in data.REQUIRED | data.OPTIONAL}  # fmt: skip
DAMAGE |= {
    "no rows": (lambda a: {k: a[k][:, :0] for k in a if a[k].ndim > 1 and k != "tasks"}, ["expected at least one"]),
    "action too small": (lambda a: {"actions": put(a["actions"], -1.01)}, ["actions", "1.01"]),
    "half terminal": (lambda a: {"terminals": put(a["terminals"], 0.5)}, ["terminals"]),
    "episodes fall": (lambda a: {"episodes": put(a["episodes"], 0, 2, 5)}, ["episodes"]),
    "both kinds of task": (lambda a: {"test_tasks": np.array([1, 2])}, ["2", "training", "test"]),
    "an action one rounding too large": (lambda a: {"actions": put(a["actions"], np.nextafter(np.float32(1), 2))},
                                         ["actions reach 1.0000001,"]),
    "task beyond": (lambda a: {"train_tasks": np.array([0, 3])}, ["train_tasks holds [0, 3]", "from 0 to 2"]),
    "task below": (lambda a: {"test_tasks": np.array([-1])}, ["test_tasks holds [-1]"]),
    "task twice": (lambda a: {"train_tasks": np.array([0, 0])}, ["train_tasks holds [0, 0], expected different"]),
    "no test tasks": (lambda a: {"test_tasks": np.zeros(0, int)}, ["expected at least one"]),
    "half a task": (lambda a: {"test_tasks": np.array([0.5])}, ["test_tasks holds other than whole numbers"]),
    "reward too large for float32": (lambda a: {"rewards": put(a["rewards"].astype(float), 1e300)}, ["not finite"]),
}  # fmt: skip


@pytest.mark.parametrize("way", DAMAGE)
def test_damaged_arrays_are_refused(way, tmp_path):
    """With and without a checksum that fits them."""
    change, words = DAMAGE[way]
    arrays = sample()
    damaged = arrays | change(arrays)
    np.savez(tmp_path / "x.npz", **damaged)
    refused(tmp_path / "x.npz", *words)
    if all(array.size for array in damaged.values()):
        meta = json.dumps({"format": data.FORMAT, "env": WIND, "checksum": data.checksum(damaged)})
        np.savez(tmp_path / "x.npz", meta=np.array(meta), **damaged)
        refused(tmp_path / "x.npz", *words)


@pytest.mark.parametrize("key", data.REQUIRED)
def test_a_missing_array_is_refused(key, tmp_path):
    arrays = sample()
    del arrays[key]
    np.savez(tmp_path / "x.npz", **arrays)
    refused(tmp_path / "x.npz", key)


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "x.npz")
    refused(tmp_path)


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "trodden").mkdir, ()

    for key in ("observations", "meta", "extra"):
        np.savez(tmp_path / "x.npz", **sample() | {key: np.array([Trap()], dtype=object)})
        if key == "extra":
            data.load(tmp_path / "x.npz")  # what no dataset needs is not read
        else:
            refused(tmp_path / "x.npz", f"{key} is damaged or not numbers")
    assert names(tmp_path) == {"x.npz"}


def test_what_are_no_numbers_is_refused_with_a_checksum_too(tmp_path):
    dates = np.zeros_like(sample()["rewards"], "M8[D]")
    meta = np.array(json.dumps({"format": data.FORMAT, "checksum": "abc"}))
    np.savez(tmp_path / "x.npz", meta=meta, **sample() | {"rewards": dates})
    refused(tmp_path / "x.npz", "its checksum differs")


def test_another_environment_is_refused(tmp_path):
    path, arrays = tmp_path / "x.npz", sample()
    data.save(path, arrays, {"env": WIND})
    refused(path, WIND, SPARSE, env=SPARSE)  # though the shapes are the same
    np.savez(path, **arrays)
    with pytest.raises(data.DataError, match="unknown environment 'bogus'"):
        data.load(path, env="bogus")
    refused(path, "shape", env=WALKER)
    np.savez(path, **arrays | {"tasks": np.zeros((3, 4))})
    refused(path, "tasks", "shape", env=WIND)


def test_another_format_and_bad_meta_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, meta=np.array(json.dumps({"format": data.FORMAT + 1})), **sample())
    refused(path, "format", str(data.FORMAT), str(data.FORMAT + 1))
    for meta in ("{", "", "[1, 2]", "null", "3", "collected in spring", '{"env": [1]}'):
        np.savez(path, meta=np.array(meta), **sample())
        refused(path, "meta is")


@pytest.mark.parametrize("key", data.REQUIRED | data.OPTIONAL)
def test_changed_arrays_do_not_match_the_checksum(key, tmp_path):
    path = tmp_path / "x.npz"
    data.save(path, sample(), {"env": WIND})
    with np.load(path) as file:
        arrays = dict(file)
    raw = bytearray(arrays[key].tobytes())
    raw[0] ^= 1
    np.savez(path, **arrays | {key: np.frombuffer(raw, arrays[key].dtype).reshape(arrays[key].shape)})
    refused(path, "checksum")


# ------------------------------------------------------------------------------------------------------ command line
BAD = {
    "unknown environment": (["--env", "cheetah"], ["--env", "cheetah", WALKER]),
    "no environment": ([], ["--env"]),
    "unknown quality": (["--env", WIND, "--quality", "best"], ["--quality", "best", "mixed"]),
    "negative count": (["--env", WIND, "--train", "-3"], ["--train", "-3"]),
    "no such device": (["--env", WIND, "--device", "cuda"], ["--device cuda: no CUDA device was found"]),
    "file for a folder": (["--env", WIND, "--data-dir", "file"], ["file"]),
}


@pytest.mark.parametrize("way", BAD)
def test_bad_arguments_end_with_one_line(way, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    arguments, words = BAD[way]
    ended(capsys, data, arguments, *words)
    assert names(tmp_path) == {"file"}


def test_command_builds_and_describes(capsys, tmp_path):
    flags = f"--env {WIND} --seed 1 --train 2 --test 1 --device cpu --data-dir {tmp_path} --quality random replay"
    flags += " --sac-steps 200 --sac-envs 4 --episode 40 --updates 1 --start 80 --sac-hidden 8 --sac-batch 8"
    flags += " --checkpoints 3 --trajectories 3 --nstep 1 --replay 160"
    data.main(flags.split())
    out = capsys.readouterr().out
    for quality, rows in (("random", 600), ("replay", 160)):
        path = tmp_path / WIND / "2+1-seed1" / f"{quality}.npz"
        assert f"{path}: {rows} transitions a task" in out
        assert data.load(path, WIND).meta["settings"]["hidden"] == 8
    assert "2 training tasks, mean return -" in out and "1 test tasks, mean return -" in out
    data.main(flags.split())
    assert "building" not in capsys.readouterr().out


# -------------------------------------------------------------------------- sparse contexts, relabelled data, pictures
def test_relabelled_data_say_nothing_of_the_task_but_by_reward(folder):
    changes = {"env": SPARSE, "train": 3, "test": 2}
    dataset = data.load(prepare(folder, quality="relabelled", **changes), SPARSE)
    mixed = data.load(prepare(folder, **changes), SPARSE)
    triple = torch.cat([dataset.observations, dataset.actions, dataset.next_observations], -1).numpy()
    source = torch.cat([mixed.observations, mixed.actions, mixed.next_observations], -1).numpy()
    assert all((triple[0] == rows).all() for rows in triple)  # the same transitions in every task
    pools = [{row.tobytes() for row in rows} for rows in source]
    drawn = [row.tobytes() for row in triple[0]]
    assert len(set(drawn)) == len(drawn) and set(drawn) <= pools[0] | pools[1] | pools[2]  # none from test tasks
    assert all(0.2 < np.mean([row in pool for row in drawn]) < 0.5 for pool in pools[:3])
    rewarded = 0
    for task, goal in enumerate(dataset.tasks):
        near = np.flatnonzero(dataset.rewards[task] > -0.5)
        rewarded += len(near)
        for i in {*range(0, len(drawn), 50), *near.tolist()}:
            r = -np.hypot(*(dataset.next_observations[task, i].numpy() - goal))
            assert dataset.rewards[task, i].item() == pytest.approx(r, abs=1e-6)
            wanted = (r + 0.5) / 0.5 if r > -0.5 else 0
            assert dataset.context_rewards[task, i].item() == pytest.approx(wanted, abs=1e-5)
    assert rewarded > 5
    assert (np.diff(dataset.episodes.numpy(), axis=1) == 1).all() and np.isnan(dataset.returns).all()


def test_what_cannot_be_relabelled_is_refused(tmp_path):
    for env in (WIND, WALKER):
        with pytest.raises(data.DataError, match="cannot be relabelled"):
            data.prepare(env, "relabelled", data_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_rewards_that_are_all_alike_have_no_sparse_kind(tmp_path):
    data.save(tmp_path / "x.npz", sample() | {"rewards": np.zeros_like(sample()["rewards"])}, {"env": WALKER})
    dataset = data.load(tmp_path / "x.npz")
    with pytest.raises(data.DataError, match="half of the rewards are 0"):
        data.sparsify(dataset, 0.0)


def test_families_with_fixed_tasks_train_and_test_on_all_of_them(tmp_path):
    path = prepare(tmp_path, env="cheetah-fwd-back", train=None, test=None, steps=40, start=40, episode=10)
    dataset = data.load(path, "cheetah-fwd-back")
    assert dataset.tasks.tolist() == [[-1], [1]]
    assert dataset.train_tasks.tolist() == dataset.test_tasks.tolist() == [0, 1]
    with pytest.raises(data.DataError, match="number is fixed"):
        prepare(tmp_path, env="cheetah-fwd-back")


def test_returns_of_episodes_by_hand(tmp_path, monkeypatch):
    arrays = sample()
    arrays["terminals"] = np.float32([[0, 0, 1, 0, 0, 0], [0] * 6, [0, 0, 1, 0, 0, 1]])  # cut-off episodes do not count
    data.save(tmp_path / "x.npz", arrays, {"env": WALKER})
    task, place, returns = data.episode_returns(data.load(tmp_path / "x.npz"))
    assert task.tolist() == [0, 2, 2] and place.tolist() == pytest.approx([0, 0, 0.6])
    r = arrays["rewards"]
    np.testing.assert_allclose(returns, [r[0, :3].sum(), r[2, :3].sum(), r[2, 3:].sum()], rtol=1e-6)
    monkeypatch.setitem(envs.FAMILIES, WALKER, dataclasses.replace(envs.FAMILIES[WALKER], horizon=2))
    task, _, returns = data.episode_returns(data.load(tmp_path / "x.npz"))
    assert task.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(returns, r.reshape(6, 3)[:, :2].sum(1), rtol=1e-6)


def wide(env):
    """A small dataset of random numbers for any family."""
    row, arrays = envs.FAMILIES[env], sample()
    rng = np.random.default_rng(1)
    tasks = envs.sample_tasks(env, len(row.only) or 3, 0)
    some = slice(len(tasks))
    arrays = {key: value[some] if value.ndim > 1 else value for key, value in arrays.items()}
    arrays |= {"tasks": tasks, "returns": np.zeros(len(tasks), np.float32)}
    for key, width in (("observations", row.obs_dim), ("next_observations", row.obs_dim), ("actions", row.act_dim)):
        arrays[key] = rng.uniform(-1, 1, (len(tasks), 6, width)).astype(np.float32)
    index = np.arange(len(tasks))
    return arrays | ({"train_tasks": index, "test_tasks": index} if row.only else {})


@pytest.mark.parametrize("env", [SPARSE, "cheetah-vel", "ant-dir", WALKER, "halfcheetah", "sawyer"])
def test_every_kind_of_family_has_a_picture_of_its_data(env, picture, tmp_path):
    data.save(tmp_path / "x.npz", wide(env), {"env": env})
    drawn = picture.plot(tmp_path / "x.npz")
    assert drawn == tmp_path / "x.png" and drawn.read_bytes().startswith(b"\x89PNG")
    assert names(tmp_path) == {"x.npz", "x.png"}


def test_your_own_data_have_a_picture(picture, tmp_path, capsys):
    np.savez(tmp_path / "own.npz", **{key: value for key, value in sample().items() if key in data.REQUIRED})
    picture.main([str(tmp_path / "own.npz")])
    assert capsys.readouterr().out == f"{tmp_path / 'own.png'}\n"
    assert (tmp_path / "own.png").stat().st_size > 5_000
    for words in (["nothing.npz"], [str(tmp_path / "own.npz"), "--film", str(tmp_path / "x.gif")]):
        ended(capsys, picture, words)


def test_films_of_behaviour(folder, picture, tmp_path, monkeypatch):
    from PIL import Image

    seen, render = [], envs.TaskVectorEnv.render
    monkeypatch.setattr(envs.TaskVectorEnv, "render", lambda self: seen.append(self.observe()) or render(self))
    for quality in ("random", "expert"):
        picture.film(prepare(folder, env=SPARSE, quality=quality), tmp_path / f"{quality}.gif", count=2)
        with Image.open(tmp_path / f"{quality}.gif") as film:
            assert film.size == (480, 240) and film.n_frames > 10
    assert not np.allclose(seen[19], seen[39])  # the untrained policy and the last one end elsewhere
