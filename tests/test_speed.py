"""On a machine without CUDA: whether each update is one that a CUDA graph can hold.

Every update runs on a device whose tensors have no values (PyTorch's "meta"). What would make the host wait for the
device, or bring data from the host, or mix the two, fails there as it would under capture.
"""

import csv
import json
import os
import re
import shutil
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
import test_focal
import torch
from conftest import WALKER, WIND, script
from torch.utils._python_dispatch import TorchDispatchMode

import data
import envs
import focal
import focal_pp
import merpo
import smac
import trained

META = torch.device("meta")
PEARL = "--encoder probabilistic --encoder-loss bellman --alpha 0"
SIZES = "--hidden 16 --batch-size 8 --meta-batch-size 3 --eval-episodes 1 --threads 1 --no-small --letter"
CONTEXT = f"{SIZES} --encoder-hidden 16 --context-size 8 --latent 3"
TINY = {focal: CONTEXT, focal_pp: CONTEXT, smac: f"{CONTEXT} --data-size 60 --context-data 40 --online-envs 2"}
TINY[merpo] = f"{SIZES} --layers 2 --model-hidden 8 --inner-steps 2"
# what waits for the device, or gives a shape that depends on values
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique_dim"}
WAITING |= {"_unique2", "unique_consecutive", "bincount", "nonzero_static", "repeat_interleave.Tensor", "lift_fresh"}


class NoWaiting(TorchDispatchMode):
    """Raises at any operation that a CUDA graph cannot hold; counts the others."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert name not in WAITING and str(func).removeprefix("aten.") not in WAITING, f"{func} waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(x is None or x.dtype not in (torch.bool, torch.uint8) for x in args[1]), f"{func} by a mask"
        out = func(*args, **(kwargs or {}))
        outs = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in [*tensors, *outs]} <= {"meta"}, f"{func}: from or to the host"
        self.count += 1
        return out


def updates_of(script, file, more="", device=META, name=WALKER, tiny=None):
    """What a script makes graphs of."""
    words = f"--env {name} --data {file} {TINY[tiny or script]} {more}"
    return trained.Rehearsal(script, script.parse_args(words.split()), device).updates


def without_values(trainer):
    """Moves SAC, its replay and its counts to the device without values."""
    for key, value in vars(trainer).items():
        if isinstance(value, torch.Tensor):
            setattr(trainer, key, value.to(META))
    trainer.generator, trainer.device = None, META
    trainer.agent.to(META)


class Adam(torch.optim.Adam):
    """Adam whose constructor does not look at the value of its learning rate, which has none here."""

    def __init__(self, params, lr=None, **options):
        super().__init__(params, lr=0.0, **options)
        for group in self.param_groups:
            group["lr"] = torch.zeros((), device=META)


@pytest.fixture
def adam(monkeypatch):
    """Its fused kernel has a rule for this device only for learning rates that are numbers."""
    fused = torch._fused_adam_

    def step(*args, lr, **options):
        assert lr.device == META
        fused(*args, lr=0.0, **options)

    monkeypatch.setattr(torch, "_fused_adam_", step)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_: None)
    monkeypatch.setattr(torch.optim, "Adam", Adam)


def holds(*updates):
    """Each twice: the first time optimisers make their states."""
    for update in updates:
        update()
        with NoWaiting() as mode:
            update()
        assert mode.count > 50


@pytest.mark.parametrize("more", ["--alpha 0", test_focal.REGULARISED, "--coupled --final-lr 0.1", PEARL])
def test_an_update_of_focal(adam, files, more):
    holds(*updates_of(focal, files[WALKER], more))


@pytest.mark.parametrize("more", ["", "--encoder-loss bellman"])
def test_an_update_of_contextual_bcq(adam, files, more):
    holds(*updates_of(script("bcq"), files[WALKER], more, tiny=focal))


@pytest.mark.parametrize("more", ["", "--tune-alpha --encoder-loss dml", "--attention none --encoder-loss bellman"])
def test_an_update_of_focal_pp(adam, files, more):
    holds(*updates_of(focal_pp, files[WALKER], more))


@pytest.mark.parametrize("more", ["", "--actor sac --final-lr 0.1", "--actor bc", "--encoder-loss reward+q"])
@pytest.mark.parametrize("rewards", ["decoder", "oracle"])
def test_an_update_of_smac(adam, files, monkeypatch, more, rewards):
    monkeypatch.setattr(smac, "data_return", lambda *_: None)  # it looks at values
    holds(*updates_of(smac, files[WALKER], f"{more} --online-rewards {rewards}"))


@pytest.mark.parametrize("name, more", [(WALKER, ""), (WIND, "--adaptive"), (WALKER, "--no-model")])
def test_an_update_of_merpo(adam, files, name, more):
    holds(*updates_of(merpo, files[name], more, name=name))


def test_an_update_of_sac(adam):
    settings = data.Settings(steps=400, envs=2, episode=20, batch=8, hidden=16)
    trainer = data.Trainer(WALKER, envs.sample_tasks(WALKER, 3, 0), 0, settings, torch.device("cpu"), 1)
    without_values(trainer)
    trainer.optimiser = trainer.agent.optimiser()
    holds(trainer.learn_eagerly)


def test_what_waits_is_noticed():
    x = torch.ones(3, device=META)
    waiting = [lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x.sum()), lambda: x.nonzero(), lambda: x.tolist()]
    waiting += [lambda: x.cpu(), lambda: x + torch.ones(3), lambda: torch.tensor(1.0).to(META), lambda: x.unique()]
    waiting += [lambda: x.repeat_interleave(x.long()), lambda: x.masked_select(x > 0), lambda: torch.zeros(3)]
    for call in waiting:
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWaiting():
            call()


@pytest.mark.parametrize("name, ceilings", [("focal", (585, 515)), ("focal_pp", (955, 520))])
def test_operations_of_an_update(tmp_path, name, ceilings):
    """With the papers' settings, but for widths, on which they do not depend: while the encoder learns, and then."""
    speed = script("speed")
    widths = ["--letter", "--hidden", "8", "--batch-size", "4", "--context-size", "4", "--encoder-hidden", "16"]
    file = speed.random_data(WALKER, tmp_path)
    kinds = speed.build(name, WALKER, "paper", torch.device("cpu"), file, widths)
    for (_, update, *_), ceiling in zip(kinds.values(), ceilings, strict=True):
        update()
        with speed.Operations() as operations:
            update()
        assert ceiling / 2 < operations.count <= ceiling


class Falling(data.Learner):
    """A little that learns, at a rate that falls."""

    METRICS = ("loss",)

    def __init__(self, device):
        super().__init__()
        self.net = torch.nn.Linear(3, 1).double()
        self.to(device)
        self.optimisers = {"net": data.adam(self.net, 0.1)}

    def update(self):
        self.step += 1
        data.set_rate(self.optimisers["net"], 0.1 * (1 - 0.09 * self.step))
        loss = (self.net(torch.randn(5, 3, dtype=torch.float64, device=self.step.device)) - 1).square().mean()
        data.descend(self.optimisers["net"], loss)
        self.note(loss=loss)
        self.record()


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=test_focal.CUDA)])
def test_what_is_compiled_learns_what_single_operations_do(monkeypatch, capsys, device):
    """Weights, steps and rates, for ten steps; after three nothing is compiled any more. On CUDA in a graph."""
    best = data.fuse if device == "cpu" else partial(data.capture, compiled=True)
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    compiled, ends = torch._dynamo.utils.counters["stats"], []
    for change in (lambda update: update, best):
        torch.manual_seed(0)
        learner = Falling(device)
        update = change(learner.update)
        for i in range(10):
            before = compiled["unique_graphs"]
            update()
            assert i < 3 or compiled["unique_graphs"] == before
        ends.append(learner.state_dict() | {"lr": learner.optimisers["net"].param_groups[0]["lr"]})
    assert before > 0 and capsys.readouterr().out == ""
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)  # sums of metrics are float32
    assert ends[1]["step"] == 10 and ends[1]["lr"].item() == pytest.approx(0.01)


def go_on(path, files, more):
    """The folder of a longer run, from the checkpoint of the one at `path`, beside it."""
    argv = [*test_focal.flags(WIND, files[WIND], more), "--run-dir", str(path.parents[3]), "--resume"]
    args, stored = focal.parse_args(argv), test_focal.checkpoint(path)
    longer = data.Run(args, Path(focal.__file__)).folder
    torch.save(stored | {"args": data.plain(args)}, longer / "checkpoint.pt")
    focal.main(argv)
    return longer


def test_a_checkpoint_of_another_device_keeps_this_ones_optimisers(files, tmp_path):
    """What a run on CUDA stored as capturable is not so on the CPU, and the other way round."""
    path = test_focal.run(tmp_path, WIND, files[WIND])
    stored = test_focal.checkpoint(path)
    for state in stored["optimisers"].values():
        assert state["param_groups"][0]["capturable"] is False
        state["param_groups"][0]["capturable"] = True
    torch.save(stored, path / "checkpoint.pt")
    stored = test_focal.checkpoint(go_on(path, files, "--steps 9"))
    assert stored["step"] == 9
    assert not any(state["param_groups"][0]["capturable"] for state in stored["optimisers"].values())


# ------------------------------------------------------------------------------------------------------------ CUDA
@test_focal.cuda
@pytest.mark.parametrize("script", [focal, focal_pp, smac, merpo])
def test_replays_neither_wait_nor_allocate(files, script):
    updates = updates_of(script, files[WALKER], device=torch.device("cuda"))
    for replay in [data.capture(update) for update in updates]:  # the second beside the first one's graph
        for _ in range(4):
            replay()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@test_focal.cuda
def test_a_run_goes_on_with_graphs_after_it_was_resumed(files, tmp_path):
    more = "--device cuda --encoder-steps 6 --eval-every 8"
    whole = test_focal.run(tmp_path / "whole", WIND, files[WIND], f"{more} --steps 24")
    short = test_focal.run(tmp_path / "parts", WIND, files[WIND], f"{more} --steps 8")
    parts = go_on(short, files, f"{more} --steps 24")
    for x, y in zip(test_focal.metrics(whole)[1:], test_focal.metrics(parts)[1:], strict=True):
        for key in ("step", "critic_loss", "actor_loss", "q_mean"):
            assert x[key] == pytest.approx(y[key], rel=5e-2, abs=1e-3)


@test_focal.cuda
def test_sac_graph_replay_equals_eager_updates():
    settings, device = data.Settings(steps=400, envs=2, episode=20, batch=8, hidden=16), torch.device("cuda")
    weights, start = [], None
    for eager in (True, False):
        trainer = data.Trainer(WALKER, envs.sample_tasks(WALKER, 3, 0), 0, settings, device, 1)
        trainer.replay.copy_(torch.rand(trainer.replay.shape, generator=torch.Generator().manual_seed(0)))
        trainer.filled.fill_(trainer.replay.shape[1] * settings.envs)
        start = torch.cat([p.detach().flatten() for p in trainer.agent.parameters()])
        for _ in range(12):
            (trainer.learn_eagerly if eager else trainer.learn)()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.agent.parameters()]))
    change = (weights[0] - start).abs().mean()
    assert change > 0 and (weights[0] - weights[1]).abs().mean() < 0.02 * change


@test_focal.cuda
def test_sac_on_cuda_learns_beside_its_environments(tmp_path):
    """A whole dataset on CUDA: policies move, and rows are finite."""
    path = data.prepare(WIND, "mixed", data_dir=tmp_path, train=3, test=1, device="cuda", steps=1600, checkpoints=4,
                        trajectories=4)  # fmt: skip
    policies = torch.load(path.parent / "behaviour.pt", weights_only=True)["policies"]
    assert policies.isfinite().all() and (policies[1:] - policies[:1]).abs().amax((1, 2)).min() > 0
    assert data.load(path).rewards.isfinite().all()


# ------------------------------------------------------------------------------------------------------ benchmark/
def test_the_speed_table(tmp_path):
    speed, out = script("speed"), tmp_path / "speed.csv"
    flags = "--hidden 16 --batch-size 8 --meta-batch-size 3 --eval-episodes 1 --threads 1"
    words = ["--only", "focal", "--size", "small", "--device", "cpu", "--seconds", "0.05", "--out", str(out)]
    rows = speed.main([*words, "--env", WIND, "--flags", f"{flags} --encoder-hidden 16 --context-size 8 --alpha 1"])
    with open(out) as file:
        stored = list(csv.DictReader(file))
    kinds = ["encoder learns", "encoder stands still"]
    assert [row["update"] for row in stored] == [row["update"] for row in rows] == kinds
    learns, stands_still = rows
    assert learns["gflop"] > stands_still["gflop"] > 0
    # 3 tasks x 8 rows; products of 16-wide layers over 2 + 2 + 5 inputs at the least: one pass of the critics
    assert stands_still["gflop"] * 1e9 > 24 * 2 * 2 * (9 * 16 + 16 * 16 + 16 * 16 + 16)
    assert all(0 < row["fraction_of_floor"] <= 1 and row["eager_per_s"] > 0 for row in rows)
    assert stands_still["ops"] < learns["ops"]


def test_what_runs_in_a_step_is_written_down(tmp_path):
    words = f"--only sac --size small --env {WIND} --device cpu --profile {tmp_path / 'profile.txt'}".split()
    script("speed").main(words)
    title, *lines = (tmp_path / "profile.txt").read_text().splitlines()
    assert re.fullmatch(r"== sac, all tasks, small: \d+ operations and \d+ us a step", title) and len(lines) == 12
    share, count, mean, _, name = lines[0].split()
    assert name.startswith("aten::") and 0 < float(share[:-1]) < 100 and float(count[:-1]) > 0 and float(mean) > 0
    shares = [float(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares, reverse=True)


def test_everything_that_needs_cuda_runs_goes_on_and_keeps_to_its_limits(monkeypatch, tmp_path):
    cuda, out = script("cuda"), tmp_path / "out"
    words = ["--out", str(out), "--work", str(tmp_path / "work"), "--device", "cpu", "--tiny", "--seeds", "1"]
    part = cuda.Part("slow", 1.0, {"sleeper": ["-c", "print('awake', flush=True); import time; time.sleep(60)"]})
    broken = cuda.Part("broken", 20.0, {"bad": ["-c", "raise SystemExit(7)"]})
    whole = cuda.parts
    monkeypatch.setattr(cuda, "parts", lambda args: [*whole(args), part, broken])
    assert cuda.main([*words, "--only", "focal", "wind data", "slow", "broken"]) == 1
    ended = {name: end["status"] for name, end in json.loads((out / "parts.json").read_text()).items()}
    assert ended == {"wind data": "done", "slow": "stopped at its limit: sleeper", "broken": "failed: bad"}
    log = (out / "log.txt").read_text()
    assert "focal: left out" in log and "awake" in log  # focal comes before its data
    assert cuda.main([*words, "--only", "focal", "wind data"]) == 1  # what failed before still counts
    assert "wind data: done before" in (out / "log.txt").read_text()
    two = [*words[:-1], "2"]
    cuda.main([*two, "--only", "wind data", "focal"])  # focal's second seed was not among those that were done
    cuda.main([*two, "--only", "broken"])  # keeps the pictures of before
    assert (out / "log.txt").read_text().count("focal: done after") == 2
    with open(out / "results.csv") as file:
        rows = list(csv.DictReader(file))
    expected = [("focal", f"focal seed {seed}", k) for seed in range(2) for k in "12"]
    assert [(row["part"], row["run"], row["step"]) for row in rows] == expected
    assert all(float(row["return_mean"]) < 0 for row in rows)
    with tarfile.open(out / "logs.tar") as tar:
        assert {"logs/slow-sleeper.txt", "logs/broken-bad.txt"} <= set(tar.getnames())
    with tarfile.open(out / "pictures.tar") as tar:
        assert any("curve.png" in name for name in tar.getnames())
    assert sum(path.is_file() for path in out.iterdir()) <= 8


def test_what_failed_once_and_what_is_there_is_not_done_again(monkeypatch, tmp_path):
    cuda, made = script("cuda"), tmp_path / "made"
    fails, makes = ["-c", "raise SystemExit(7)"], ["-c", f"open({str(made)!r}, 'w')"]
    plan = [cuda.Part("fragile", 20.0, {"bad": fails}, once=True), cuda.Part("again", 20.0, {"bad": fails})]
    plan += [cuda.Part("made", 20.0, {"good": makes}, makes=[made])]
    plan += [cuda.Part("made otherwise", 20.0, {"bad": fails}, makes=[made])]
    monkeypatch.setattr(cuda, "parts", lambda args: plan)
    words = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--device", "cpu", "--tiny"]
    assert cuda.main(words) == cuda.main(words) == cuda.main([*words, "--only", "fragile"]) == 1
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("fragile: failed: bad after") == 2 and log.count("fragile: failed: bad before") == 1
    assert log.count("again: failed: bad after") == 2
    assert log.count(" made: done after") == 1 and log.count("made otherwise: done before") == 2


def test_what_ran_past_its_own_limit_is_not_begun_again_but_what_had_no_time_left_is(monkeypatch, tmp_path):
    cuda = script("cuda")
    monkeypatch.setattr(cuda, "GRACE", 0.5)
    sleeps = ["-c", "import time; time.sleep(60)"]
    plan = [cuda.Part("hangs", 0.5, {"a": sleeps}, once=True), cuda.Part("cut", 60.0, {"b": sleeps}, once=True)]
    plan += [cuda.Part("slow", 0.5, {"c": sleeps})]
    monkeypatch.setattr(cuda, "parts", lambda args: plan)
    words = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--device", "cpu", "--tiny"]
    for _ in range(2):
        assert cuda.main([*words, "--minutes", "0.06", "--only", "hangs", "cut"]) == 1
        assert cuda.main([*words, "--minutes", "0.06"]) == 1
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("hangs: stopped at its limit: a after") == 2  # where it is named, not else
    assert log.count("hangs: stopped at its limit: a before") == 2
    assert log.count("cut: stopped, no time left: b after") == 4 and "cut: stopped, no time left: b before" not in log
    assert log.count("slow: ") >= 2 and "slow: stopped at its limit: c before" not in log


def test_data_that_nothing_left_needs_are_not_built(monkeypatch, tmp_path):
    cuda, made = script("cuda"), tmp_path / "made"
    makes, reads = [["-c", f"open({str(made)!r}, {mode!r})"] for mode in "wr"]
    plan = [cuda.Part("data", 20.0, {"a": makes}, makes=[made]), cuda.Part("reader", 20.0, {"b": reads}, needs=[made])]
    monkeypatch.setattr(cuda, "parts", lambda args: plan)
    words = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--device", "cpu", "--tiny"]
    assert cuda.main(words) == 0
    made.unlink()  # as on another machine
    assert cuda.main(words) == 0 and not made.exists()
    assert "data: nothing left needs it" in (tmp_path / "out" / "log.txt").read_text()
    plan += [cuda.Part("another reader", 20.0, {"c": reads}, needs=[made])]
    assert cuda.main(words) == 0 and made.exists()


def test_a_script_that_fails_does_not_keep_the_others_from_being_measured(monkeypatch, tmp_path, capsys):
    speed = script("speed")
    build = speed.build
    monkeypatch.setattr(speed, "build", lambda name, *rest: build(name, *rest) if name == "sac" else broken())
    words = f"--only focal sac --size small --env {WIND} --seconds 0.01 --device cpu --threads 1".split()

    def broken():
        raise RuntimeError("capture failed")

    with pytest.raises(SystemExit) as end:
        speed.main([*words, "--out", str(tmp_path / "speed.csv")])
    assert "focal, small" in end.value.code and "capture failed" in capsys.readouterr().err
    with open(tmp_path / "speed.csv") as file:
        assert {row["script"] for row in csv.DictReader(file)} == {"sac"}


def test_the_runs_on_cuda_are_runs_that_the_scripts_accept(tmp_path):
    cuda = script("cuda")
    folders = [cuda.folder_of(words) for part in cuda.parts(cuda.arguments(["--out", str(tmp_path)]))
               for words in part.commands.values() if words[0] in cuda.SCRIPTS]  # fmt: skip
    assert len(set(folders)) == len(folders) == 4
    for part in cuda.parts(cuda.arguments(["--out", str(tmp_path)])):
        for words in part.commands.values():
            if words[0] == "data.py":
                assert data.parse_args(words[1:]).device == "cuda"
