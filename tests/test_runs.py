"""What data.py does for every script, once, with a toy that learns: flags, folders, checkpoints, failures, pictures.

FUZZ=3000 python -m pytest tests/test_runs.py -k fuzz      # that many mutations of each kind; a hundred otherwise
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import ROOT, SPARSE, WALKER, WIND, ended
from matplotlib.axes import Axes
from test_focal import assert_equal, changed, checkpoint, load_arrays, metrics
from torch import nn

import data
import envs
import pictures

HERE = sys.modules[__name__]
FUZZ = int(os.environ.get("FUZZ", 100))


# ------------------------------------------------------------------------------------------------------------- the toy
@dataclass
class Args(data.Args):
    env: str = WIND  # task family
    steps: data.Count = 6  # gradient steps
    eval_every: data.Count = 3  # gradient steps between evaluations
    # algorithm
    width: data.Count = 4  # inputs of the network
    lr: data.Number = 0.1  # learning rate
    tau: data.Share = 0.5  # not used
    eps: data.Positive = 0.1  # not used
    half: data.Count | None = None  # not used; unless given: steps / 2
    # ablations
    law: Literal["square", "linear"] = "square"  # of the loss
    bias: bool = True  # whether the network has one

    GROWS = ("steps", "half")

    def complete(self, given):
        super().complete(given)
        self.half = self.half or max(1, self.steps // 2)


TABLE = {WIND: {"width": 8}, SPARSE: {"width": 8, "law": "linear"}, WALKER: {}}
SMALL = {WIND: {"width": 3}, SPARSE: {"width": 3}, WALKER: {}}


class Toy(data.Learner):
    METRICS = ("loss", "even")

    def __init__(self, args):
        super().__init__()
        self.args, self.net = args, nn.Linear(args.width, 1, bias=args.bias)
        self.optimisers = {"net": data.adam(self.net, args.lr)}

    def update(self):
        self.step += 1
        error = self.net(torch.randn(5, self.args.width)) - 1
        loss = error.square().mean() if self.args.law == "square" else error.abs().mean()
        data.descend(self.optimisers["net"], loss)
        self.note(loss=loss)
        if self.step % 2 == 0:
            self.note(even=loss)
        self.record()


def make_world(args, device="cpu"):
    world = data.World()
    train, test = data.open_datasets(args, torch.device(device))
    world.know(train, test)
    world.mean, world.std = data.standardisation(train.observations)
    return world


def train(args, run):
    world = make_world(args)
    torch.manual_seed(args.seed)
    toy = Toy(args)
    run.begin(toy, world)
    for step in run.steps(args.steps):
        toy.update()
        if run.due(step):
            run.log({"return_mean": toy.net.weight.sum().item(), "train_return_mean": 0.0})
    run.end()


def parse_args(argv=None):
    return data.parse(Args, TABLE, SMALL, argv)


def main(argv=None):
    data.start(train, parse_args, argv)


def words(files, folder, more=""):
    return ["--data", str(files[WIND]), "--run-dir", str(folder), "--threads", "1", *more.split()]


def run(files, folder, more=""):
    """The folder of a run of the toy that ends well."""
    main(words(files, folder, more))
    return data.Run(parse_args(words(files, folder, more)), Path(__file__)).folder


@pytest.fixture(autouse=True)
def _no_curves(request, monkeypatch):
    if not any(word in request.node.name for word in ("curve", "full_disk", "embeddings", "paths")):
        monkeypatch.setattr(data, "plot", lambda *args: None)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------ command line
def test_what_is_given_wins_over_sizes_over_the_environment_over_defaults():
    read = lambda text: vars(parse_args(text.split()))
    assert read(f"--env {WIND}")["width"] == 3 and read(f"--env {WIND} --no-small")["width"] == 8
    assert read(f"--env {WALKER}")["width"] == 4 and read(f"--env {SPARSE} --no-small")["law"] == "linear"
    assert read(f"--width 5 --env {WIND}")["width"] == read(f"--env {WIND} --no-small --width 5")["width"] == 5
    values = read("--lr 1 --no-bias --law linear --run-dir a/b --half 7 --seed 4294967295 --tau 0")
    assert values | {"lr": 1.0, "bias": False, "law": "linear", "run_dir": Path("a/b"), "half": 7, "tau": 0} == values
    assert type(values["lr"]) is float and values["seed"] == 2**32 - 1
    assert (read("")["half"], read("--steps 9")["half"]) == (3, 4)
    for more, width in (("--no-small", 6), ("--no-small --letter", 4), ("--small", 4), ("--no-small --width 5", 5)):
        argv = ["--env", WALKER, *more.split()]
        assert data.parse(Args, TABLE, SMALL, argv, {WALKER: {"width": 6}}).width == width
    with pytest.raises(data.DataError, match="^--letter: small sizes .*expected --no-small with it$"):
        parse_args(["--small", "--letter"])


@pytest.mark.parametrize("cuda_is_there", [False, True])
def test_small_sizes_are_the_default_where_there_is_no_cuda_device(monkeypatch, cuda_is_there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_is_there)
    expected = {"": not cuda_is_there, "--device cpu": True, "--small": True, "--no-small": False}
    expected |= {"--device cpu --no-small": False, "--device cuda": not cuda_is_there, "--device cuda --small": True}
    for flags, small in expected.items():
        args = parse_args(flags.split())
        assert args.small == small and args.width == (3 if small else 8), flags
        assert args.variant == ("small" if small else "paper")


def test_help_is_in_groups_with_the_defaults_of_the_environment_and_the_size(capsys):
    def shown(text):
        with pytest.raises(SystemExit) as end:
            parse_args([*text.split(), "--help"])
        out, err = capsys.readouterr()
        assert end.value.code == 0 and err == ""
        return out

    text = shown("")
    assert re.findall(r"^(\w+):$", text, re.M) == ["run", "data", "algorithm", "ablations"]
    groups = dict(re.findall(r"^(\w+):$(.*?)(?=^\w+:$|\Z)", text, re.M | re.S))
    expected = {"run": "env small letter seed device threads graph compile eval-every eval-episodes"}
    expected["run"] += " run-dir resume overwrite"
    expected |= {"data": "data data-dir data-seed quality test-quality", "algorithm": "steps width lr tau eps half"}
    expected |= {"ablations": "law bias"}
    for name, flags in expected.items():
        found = re.findall(r"^  (?:-h, )?--([a-z-]+)", groups[name], re.M)
        assert set(found) - {"help"} == set(flags.split()), name
    flat = " ".join(text.split())
    assert __doc__.splitlines()[0] in flat and "--bias, --no-bias whether the network has one (True)" in flat
    assert "--law {square,linear} of the loss (square)" in flat and "where runs are kept (runs)" in flat
    assert "unless given: steps / 2 --" in flat + " --" or "unless given: steps / 2 ablations:" in flat  # no default
    for more, width in ((f"--env {WIND}", 3), (f"--env {WIND} --no-small", 8), (f"--env {WALKER}", 4)):
        assert f"inputs of the network ({width})" in " ".join(shown(more).split())
    assert f"task family ({SPARSE})" in " ".join(shown(f"--env {SPARSE}").split())


BAD = ["--env nowhere", "--quality superb", "--test-quality superb", "--steps -3", "--steps 2.5", "--steps 0", "--nope"]
BAD += ["--tau 1.5", "--tau inf", "--tau -0.1", "--law cubic", "--lr -1", "--lr nan", "--lr 1e31", "--lr 1e999"]
BAD += ["--eps 0", "--width x", "--width 1e3", f"--width {'9' * 5000}", "--width 1_000", "--width ٣", "--width 0x10"]
BAD += ["--seed 4294967296", "--seed -1", "--seed x", "--device tpu", "--device cuda", "--bias=no", "--steps", "more"]


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:30])
def test_bad_flags_end_in_one_line_that_names_them(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    flag, *value = re.split("[ =]", text, maxsplit=1)
    ended(capsys, HERE, text.split(" "), flag, *(value if "=" not in text else []))
    assert list(tmp_path.iterdir()) == []


def test_flags_that_do_not_go_together(files, capsys):
    for flag in ("--quality expert", "--test-quality expert", "--data-seed 1"):
        ended(capsys, HERE, words(files, "nowhere", flag), flag, "--data has the data of all tasks")
    ended(capsys, HERE, words(files, "nowhere", "--resume --overwrite"), "--resume", "--overwrite", "one of them")


# ------------------------------------------------------------------------------------------------------------- names
def variant(text, *more):
    return parse_args([*text.split(), *more]).variant


def test_what_changes_a_run_is_in_its_name_and_nothing_else():
    assert variant("") == variant("--width 3 --lr 0.1 --law square --bias") == "small"
    assert variant("--small --seed 3 --device cpu --threads 2 --no-graph --resume --run-dir a --data-dir b") == "small"
    assert variant("--no-small --width 8") == "paper" and variant("--no-small --width 3") == "paper,width=3"
    assert variant("--lr 1e-3 --steps 7 --no-bias") == "small,lr=0.001,bias=False,steps=7"  # --steps last
    assert variant("--eval-every 4") == "small,eval-every=4"  # other rows in metrics.csv
    assert variant("--quality expert --test-quality expert") == "small,quality=expert"
    assert variant("--test-quality mixed") == "small"
    assert variant("--test-quality random") == "small,test-quality=random"
    assert variant("--half 3") != variant("")  # what it would be depends on other flags


def test_names_are_safe_and_short_on_every_file_system(tmp_path, monkeypatch):
    """Of a path only its own name is shown, and no character that a file system may refuse; its hash tells it apart."""
    names = {r"C:\data\mine.npz", r"data\mine.npz", "数据.npz", "データ" * 20 + ".npz", "a b:c?.npz"}
    names |= {"é.npz", "e.npz", "a,b.npz", "a=b.npz", "a-b.npz", "\udcff.npz", "x,steps=9.npz", "x" * 250 + ".npz"}
    found = {variant("", "--data", str(tmp_path / name)) for name in names}
    found |= {variant("", "--data", str(tmp_path / "b" / name)) for name in names}  # other files of the same name
    found |= {variant("--lr 0.01 --eps 0.01 --tau 0.01 --law linear --no-bias --eval-every 7 --width 999 --half 99999")}
    assert len(found) == 2 * len(names) + 1
    for name in found:
        assert re.fullmatch(r"[A-Za-z0-9.,=_-]+", name) and len(name) <= 105 and "steps=" not in name.lower()
    monkeypatch.chdir(tmp_path)  # the same data by another path
    assert variant("", "--data", str(tmp_path / "x")) == variant("", "--data", "b/../x") == variant("--data ./x")


def test_names_that_were_cut_differ_and_keep_their_steps(tmp_path):
    path = str(tmp_path / ("数" * 80 + ".npz"))
    long, longer = (variant(f"--lr 0.02 {more}", "--data", path) for more in ("--steps 7", "--steps 8"))
    assert long != longer and long.partition(",steps=")[0] == longer.partition(",steps=")[0] and len(long) < 120
    assert variant("--lr 0.03 --steps 7", "--data", path) != long


@pytest.mark.parametrize("name", [f"{'数' * 30}/{'据' * 80}.npz", "\udcff.npz", r"C:\data\mine.npz", "a,steps=1.npz"])
def test_data_with_an_odd_name_can_be_run_on_and_gone_on_with(files, tmp_path, capsys, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(files[WIND].read_bytes())
    run({WIND: path}, tmp_path / "runs")
    run({WIND: path}, tmp_path / "runs", "--resume")
    assert "going on from step 6" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- what a run writes
def test_what_a_run_writes(files, tmp_path, capsys, monkeypatch):
    mine = tmp_path / "mine.py"
    mine.write_text("import focal\nfocal.main()\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(mine), raising=False)
    path = run(files, tmp_path, "--seed 2 --lr 0.2")
    assert path == tmp_path / "test_runs" / WIND / path.parent.name / "seed2" and ",lr=0.2" in str(path)
    names = {"args.json", "metrics.csv", "final.json", "checkpoint.pt", "source.py", "started.py"}
    assert {file.name for file in path.iterdir()} == names | {".lock"}
    assert (path / "source.py").read_text() == Path(__file__).read_text()
    assert (path / "started.py").read_text() == mine.read_text()
    args, final = (json.loads((path / name).read_text()) for name in ("args.json", "final.json"))
    assert (args["lr"], args["data"], args["seed"], args["half"]) == (0.2, str(files[WIND]), 2, 3)
    rows = metrics(path, but=())
    assert [list(row) for row in rows] == [["step", "seconds", "loss", "even", "return_mean", "train_return_mean"]] * 2
    assert [row["step"] for row in rows] == [3, 6] and {key: final[key] for key in rows[-1]} == rows[-1]
    checksum = json.loads(str(np.load(files[WIND])["meta"]))["checksum"]
    checksums = args.pop("checksums")
    assert checksums == {m: hashlib.sha256((ROOT / m).read_bytes()).hexdigest() for m in ("data.py", "envs.py")}
    assert final["args"] == args and final["dataset_checksums"] == [checksum] * 2
    assert final["versions"]["torch"] == torch.__version__ and final["wall_clock_seconds"] >= rows[-1]["seconds"]
    returns = load_arrays(files[WIND])["returns"]
    assert final["behaviour_return"] == pytest.approx(returns[[4, 1]].mean(), rel=1e-5)
    stored = checkpoint(path)
    assert stored["step"] == 6 and stored["rows"] == rows and stored["args"] == args
    assert str(path) in capsys.readouterr().out.splitlines()[-1]


def test_no_copy_of_what_was_started_where_it_is_the_script(files, tmp_path, monkeypatch):
    for i, started in enumerate((__file__, os.path.relpath(__file__), str(tmp_path / "gone.py"), None)):
        monkeypatch.setattr(sys.modules["__main__"], "__file__", started, raising=False)
        path = run(files, tmp_path / str(i))
        assert (path / "source.py").exists() and not (path / "started.py").exists()


def test_the_first_line_says_what_runs_where_in_which_sizes(files, tmp_path, capsys):
    no_cuda = "no CUDA device: small sizes; --no-small for the papers'"
    for more, sizes in (("", no_cuda), ("--device cpu", "small sizes")):
        path = run(files, tmp_path, f"--seed {len(more)} {more}")
        first = capsys.readouterr().out.splitlines()[0]
        assert first == f"test_runs.py on {WIND}, cpu ({sizes}): {path}"
    run(files, tmp_path, "--no-small")
    assert "cpu (the papers' sizes): " in capsys.readouterr().out.splitlines()[0]


def test_the_metrics_are_means_over_the_steps_that_noted_them_since_the_last_evaluation(files, tmp_path):
    rows = metrics(run(files, tmp_path, "--steps 9 --eval-every 4"))
    args = parse_args(words(files, tmp_path, "--steps 9 --eval-every 4"))
    torch.manual_seed(0)
    toy, losses = Toy(args), []
    for _ in range(9):
        toy.update()
        losses.append(toy.metrics[0, 0].item())
        toy.metrics.zero_()
    assert [row["step"] for row in rows] == [4, 8, 9]  # the last step too
    for row, steps in zip(rows, (range(4), range(4, 8), [8]), strict=True):
        assert row["loss"] == pytest.approx(np.mean([losses[i] for i in steps]), rel=1e-5)
        even = [losses[i] for i in steps if i % 2]
        assert row["even"] == (pytest.approx(np.mean(even), rel=1e-5) if even else None)
    assert json.loads((next(tmp_path.glob("*/*/*/*")) / "final.json").read_text())["even"] is None


def test_evaluations_are_due_at_marks_too(files, tmp_path):
    run = data.Run(parse_args(words(files, tmp_path, "--eval-every 5")), Path(__file__))
    run.agent = Toy(run.args)
    assert [step for step in run.steps(12, 3, 7) if run.due(step)] == [3, 5, 7, 10, 12]


# ------------------------------------------------------------------------------------------ what stands is kept, resume
def test_a_finished_run_says_so_and_is_left_alone(files, tmp_path, capsys):
    path = run(files, tmp_path)
    before = contents(path)
    for gone in ("", "checkpoint.pt"):  # which one may delete to have the space
        (path / gone).unlink() if gone else None
        for more in ("", "--resume") if gone else ("",):
            capsys.readouterr()
            with pytest.raises(SystemExit) as end:
                main(words(files, tmp_path, more))
            out, err = capsys.readouterr()
            assert end.value.code == 0 and err == "" and f"this run is finished: {path} (--overwrite" in out
            assert contents(path).items() == {key: x for key, x in before.items() if key != gone}.items()


def test_a_finished_run_that_is_resumed_only_gets_back_what_it_lost(files, tmp_path):
    path = run(files, tmp_path)
    first, rows = checkpoint(path), (path / "metrics.csv").read_bytes()
    (path / "source.py").write_text("# as it was when the run was made")
    for text in ((path / "final.json").read_text(), ""):
        (path / "final.json").write_text(text)
        run(files, tmp_path, "--resume")
        assert_equal(checkpoint(path), first)
        assert (path / "metrics.csv").read_bytes() == rows and (path / "final.json").stat().st_size
        assert (path / "source.py").read_text().startswith("# as it was")


def test_a_finished_run_whose_default_steps_have_grown_goes_on_as_what_it_is_now(files, tmp_path, monkeypatch):
    path = run(files, tmp_path)
    (path / "source.py").write_text("# as it was when the run was made")
    monkeypatch.setitem(SMALL, WIND, SMALL[WIND] | {"steps": 9})
    assert run(files, tmp_path, "--resume") == path and checkpoint(path)["step"] == 9
    assert json.loads((path / "args.json").read_text())["steps"] == 9
    assert (path / "source.py").read_bytes() == Path(__file__).read_bytes()


def interrupt(monkeypatch, where, nth=1, error=KeyboardInterrupt):
    """From now on the nth call of data.Run's method ends in Ctrl-C before it does anything."""
    real, calls = getattr(data.Run, where), []

    def broken(*args):
        calls.append(0)
        if len(calls) == nth:
            raise error
        return real(*args)

    monkeypatch.setattr(data.Run, where, broken)


def unfinished(files, folder, monkeypatch, capsys, more=""):
    """The folder of a run that was interrupted after its first checkpoint, of step 3."""
    with monkeypatch.context() as patch:
        interrupt(patch, "_save", 2)
        ended(capsys, HERE, words(files, folder, more), code=130)
    (path,) = folder.glob("*/*/*/*/checkpoint.pt")
    return path.parent


def test_a_finished_run_of_other_settings_is_not_called_finished(files, tmp_path, monkeypatch, capsys):
    """As where a script's table was edited: the folder's name is the same."""
    run(files, tmp_path)
    monkeypatch.setitem(SMALL, WIND, SMALL[WIND] | {"lr": 0.4})
    ended(capsys, HERE, words(files, tmp_path), "made with --lr 0.1, asked for [0.4]", "--overwrite")


def test_two_runs_in_one_folder_are_refused(files, tmp_path, capsys):
    path = run(files, tmp_path)
    with data.locked(path):
        ended(capsys, HERE, words(files, tmp_path, "--overwrite"), f"{path}: a run is under way there")
    (path / ".checkpoint.pt.999.tmp").write_text("of one that was killed")
    run(files, tmp_path, "--overwrite")
    assert not list(path.glob(".*.tmp"))


def test_a_run_needs_no_standard_output(files, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    main(words(files, tmp_path))
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*/*/*/seed0/final.json"))) == 1


@pytest.mark.parametrize("done", [False, True])
def test_overwrite_begins_anew(files, tmp_path, monkeypatch, capsys, done):
    path = run(files, tmp_path) if done else unfinished(files, tmp_path, monkeypatch, capsys)
    (path / "adaptation.png").write_text("of the old run")
    (path / "notes").mkdir()
    expected = metrics(run(files, tmp_path / "other"))
    run(files, tmp_path, "--overwrite")
    assert metrics(path) == expected and (path / "final.json").exists()
    assert not (path / "adaptation.png").exists() and (path / "notes").is_dir()
    run(files, tmp_path / "empty", "--overwrite")  # where nothing stands


def test_a_longer_run_goes_on_from_a_shorter_one(files, tmp_path, capsys):
    """From the longest that is no longer than it, and not from one of other settings, seed or script."""
    for more in ("--steps 15", "", "--steps 3", "--steps 9 --lr 0.2", "--steps 8 --seed 1", "--steps 7 --half 5"):
        run(files, tmp_path, more)
    path = run(files, tmp_path, "--steps 12 --resume")
    assert "going on from step 6 of" in capsys.readouterr().out
    run(files, tmp_path, "--steps 4 --resume --seed 2")
    assert "no checkpoint yet" in capsys.readouterr().out
    whole = run(files, tmp_path / "whole", "--steps 12")
    assert metrics(path) == metrics(whole)
    assert_equal(checkpoint(path)["agent"], checkpoint(whole)["agent"])
    (path / "args.json").write_text("{")
    ended(capsys, HERE, words(files, tmp_path, "--steps 13 --resume"), "damaged args.json in a run there")


@pytest.mark.parametrize("more, says", [("", "no checkpoint yet"), ("--resume", "going on from step 4 of")])
def test_a_run_that_was_begun_does_not_go_on_from_another(files, tmp_path, monkeypatch, capsys, more, says):
    """From the start, where it had no checkpoint; or from its own copy, once it took up a shorter run's."""
    shorter = run(files, tmp_path, "--steps 4")
    with monkeypatch.context() as patch:
        interrupt(patch, "steps")
        ended(capsys, HERE, words(files, tmp_path, f"--steps 9 {more}"), code=130)
    (shorter / "checkpoint.pt").unlink() if more else None
    path = run(files, tmp_path, "--steps 9 --resume")
    assert says in capsys.readouterr().out
    assert more or metrics(path) == metrics(run(files, tmp_path / "whole", "--steps 9"))


def test_a_shorter_run_does_not_end_with_the_steps_of_a_longer_one(files, tmp_path, capsys):
    run(files, tmp_path)
    argv = words(files, tmp_path, "--steps 3 --resume")
    ended(capsys, HERE, argv, "made with --steps 6", "asked for [3, ", "--overwrite")
    assert len(list(tmp_path.rglob("metrics.csv"))) == 1


def test_a_setting_that_the_checkpoint_does_not_know_had_its_default(files, tmp_path, monkeypatch, capsys):
    path = unfinished(files, tmp_path, monkeypatch, capsys)
    stored = checkpoint(path)
    for key in ("tau", "law", "bias"):
        del stored["args"][key]
    torch.save(stored | {"args": stored["args"] | {"forgotten": 1}}, path / "checkpoint.pt")
    (path.parent.with_name("small,tau=0.3") / "seed0").mkdir(parents=True)
    run(files, tmp_path, "--resume")
    torch.save(stored | {"args": stored["args"] | {"tau": 0.25}}, path / "checkpoint.pt")
    ended(capsys, HERE, words(files, tmp_path, "--resume"), "checkpoint.pt: made with --tau 0.25, asked for [0.5]")


def test_settings_of_the_checkpoint_must_be_those_of_the_run(files, tmp_path, monkeypatch, capsys):
    path = unfinished(files, tmp_path, monkeypatch, capsys)
    stored = checkpoint(path)
    for key, then, now in (("lr", 0.5, 0.1), ("width", 9, 3), ("law", "linear", "square"), ("half", 4, 3)):
        torch.save(stored | {"args": stored["args"] | {key: then}}, path / "checkpoint.pt")
        says = f"made with --{key} {then}, asked for {[now]}"
        ended(capsys, HERE, words(files, tmp_path, "--resume"), says)
    for key, then in (("run_dir", "x"), ("device", "cuda"), ("threads", 4), ("data", "elsewhere.npz")):
        torch.save(stored | {"args": stored["args"] | {key: then}}, path / "checkpoint.pt")
        with monkeypatch.context() as patch:
            interrupt(patch, "steps")
            ended(capsys, HERE, words(files, tmp_path, "--resume"), "checkpoint of step 3", code=130)


@pytest.mark.parametrize("done", [False, True])
def test_a_run_on_other_data_never_replaces_one(files, tmp_path, monkeypatch, capsys, done):
    """Data that are built here have no name of their own in the folder's."""
    rewards = load_arrays(files[WIND])["rewards"]
    for name, shift in (("A", 0), ("B", 1)):
        folder = tmp_path / name / WIND / "40+10-seed0"
        changed(files[WIND], folder / "mixed.npz", WIND, rewards=rewards + np.float32(shift))
    argv = lambda name, more="": [*words(files, tmp_path / "runs", more)[2:], "--data-dir", str(tmp_path / name)]
    with monkeypatch.context() as patch:
        interrupt(patch, "end" if done else "_save", 9 if done else 2)
        main(argv("A")) if done else ended(capsys, HERE, argv("A"), code=130)
    (path,) = tmp_path.glob("runs/*/*/*/seed0")
    before = contents(path)
    ended(capsys, HERE, argv("B"), str(path), "--overwrite", *(["other data"] if done else []))
    ended(capsys, HERE, argv("B", "--resume"), "made with other data", "--overwrite")
    assert contents(path) == before
    main(argv("B", "--overwrite"))
    assert contents(path) != before


# ------------------------------------------------------------------------------------------------- ways to fail, Ctrl-C
def test_ctrl_c_says_what_is_kept_and_not_gone_on_with_unasked(files, tmp_path, monkeypatch, capsys):
    argv = words(files, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(HERE, "parse_args", lambda argv: (_ for _ in ()).throw(KeyboardInterrupt))
        ended(capsys, HERE, argv, "interrupted; nothing was begun", code=130)
    for where, step in (("begin", 0), ("due", 1), ("_save", 3)):
        with monkeypatch.context() as patch:
            interrupt(patch, where)
            says = f"at step {step} there is no checkpoint yet; what is built of the data is kept"
            ended(capsys, HERE, argv, says, code=130)
    path = unfinished(files, tmp_path, monkeypatch, capsys)
    before = contents(path)
    ended(capsys, HERE, argv, f"{path / 'checkpoint.pt'}: --resume goes on from there, --overwrite begins anew")
    assert contents(path) == before
    for where, step in (("due", 4), ("_save", 6)):
        with monkeypatch.context() as patch:
            interrupt(patch, where)
            says = f"at step {step} the checkpoint of step 3 is kept in {path}; --resume goes on"
            ended(capsys, HERE, [*argv, "--resume"], says, code=130)


NO_MEMORY = [MemoryError(), np._core._exceptions._ArrayMemoryError((10**12,), np.dtype(float))]
NO_MEMORY += [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes.\nat x")]
NO_MEMORY += [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_running_out_of_memory_ends_in_one_line(files, tmp_path, monkeypatch, capsys, error):
    interrupt(monkeypatch, "begin", 1, error)
    ended(capsys, HERE, words(files, tmp_path), "out of memory", "expected smaller sizes")


def test_a_mistake_in_a_script_is_no_failure_of_its_user(files, tmp_path, monkeypatch):
    for error in (RuntimeError("shapes do not fit"), ValueError("x"), KeyError("x")):
        with monkeypatch.context() as patch:
            interrupt(patch, "begin", 1, error)
            with pytest.raises(type(error)):
                main(words(files, tmp_path))


def test_a_folder_that_cannot_be_written(files, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "runs", "/proc/nowhere", tmp_path / ("x" * 300)):
        ended(capsys, HERE, words(files, folder), str(folder)[:100])
    argv = ["--run-dir", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "file")]
    ended(capsys, HERE, argv, str(tmp_path / "file"))


def test_a_terminal_that_cannot_show_a_path_is_no_reason_to_end(tmp_path):
    """Standard output of Windows, redirected: neither before training nor for the line that says what is wrong."""
    folder = tmp_path / "数据"
    argv = ["-c", "import test_runs; test_runs.main()", "--data", str(folder / "no.npz"), "--run-dir", str(folder)]
    env = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, *argv], env=env, capture_output=True, encoding="cp1252")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and r"\u6570\u636e" in done.stderr
    assert done.stdout.count("\n") == 1 and r"\u6570\u636e" in done.stdout


# ---------------------------------------------------------------------------------------------------------- divergence
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_value_that_is_not_finite_is_named(value):
    toy = Toy(parse_args([]))
    for step in range(1, 6):
        toy.step += 1
        values = value if step == 4 else 0.0, value if step in (3, 5) else 0.0
        toy.note(**dict(zip(toy.METRICS, torch.tensor(values), strict=True)))
        toy.record()
    with pytest.raises(FloatingPointError, match="^even is not finite since step 3$"):
        toy.check()


def test_weights_are_looked_at_too():
    toy = Toy(parse_args([]))
    toy.check()
    toy.step.fill_(7)
    toy.net.bias.data.fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"^the weights net\.bias are not finite at step 7$"):
        toy.check()


# ----------------------------------------------------------------------------------------------------------- full disk
@pytest.mark.parametrize("name", ["args.json", "source.py", "metrics.csv", "curve.png", "checkpoint.pt", "final.json"])
def test_a_full_disk_ends_a_run_in_one_line_and_spoils_nothing(full, files, tmp_path, capsys, monkeypatch, name):
    seen = []
    full(name, 2 if name in ("metrics.csv", "checkpoint.pt", "curve.png") else 1)
    write = data.write

    def watch(path, save):
        if path.name == name:
            seen.append(contents(path.parent))
        write(path, save)

    monkeypatch.setattr(data, "write", watch)
    line = ended(capsys, HERE, words(files, tmp_path), "File too large")
    (path,) = tmp_path.glob("*/*/*/*")
    assert str(path / name) in line
    assert contents(path) == seen[-1]  # what stood there before still does, and no temporary file
    full("")
    run(files, tmp_path, "--resume")
    assert (path / "final.json").exists()


# ------------------------------------------------------------------------------------------------- damaged checkpoints
@pytest.fixture
def resuming(files, tmp_path):
    """A checkpoint, and a function that resumes from it: the toy as it is then, or None if it was refused in a line."""
    path, args = run(files, tmp_path), parse_args(words(files, tmp_path, "--resume"))
    world = make_world(args)

    def resume():
        run, toy = data.Run(args, Path(__file__)), Toy(args)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                run.begin(toy, world)
            except data.DataError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                return None
        return toy

    return path / "checkpoint.pt", resume


def test_fuzz_bytes_of_a_checkpoint(resuming):
    """Refused, or every weight is the original's."""
    path, resume = resuming
    rng, whole, went_on, expected = np.random.default_rng(2), path.read_bytes(), 0, resume().state_dict()
    for _ in range(FUZZ):
        path.write_bytes(mangled(whole, rng))
        toy = resume()
        if toy is not None:
            went_on += 1
            assert all(torch.equal(value, expected[key]) for key, value in toy.state_dict().items())
    assert went_on < 0.3 * FUZZ


def mangled(whole, rng):
    """Some bytes flipped, perhaps cut short or with something in between."""
    raw = bytearray(whole)
    for _ in range(rng.integers(1, 6)):
        raw[rng.integers(len(raw))] = rng.integers(256)
    if rng.random() < 0.2:
        raw = raw[: rng.integers(len(raw))]
    if rng.random() < 0.1:
        place = rng.integers(len(raw) + 1)
        raw[place:place] = rng.bytes(rng.integers(1, 50))
    return bytes(raw)


def test_nothing_in_a_checkpoint_is_run(resuming, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trodden"),)

    path, resume = resuming
    for trap in (Trap(), {"args": Trap()}):
        for zipped in (True, False):
            torch.save(trap, path, _use_new_zipfile_serialization=zipped)
            assert resume() is None
    assert not (tmp_path / "trodden").exists()


def test_a_changed_weight_is_noticed(resuming):
    """torch.load does not look at the records' checksums."""
    path, resume = resuming
    weight, raw = resume().net.weight.detach(), bytearray(path.read_bytes())
    raw[raw.find(weight.numpy().tobytes()) + 2] ^= 0x40
    path.write_bytes(raw)
    assert resume() is None


def test_a_checkpoint_that_is_damaged_is_refused_in_words(files, tmp_path, monkeypatch, capsys):
    path = unfinished(files, tmp_path, monkeypatch, capsys) / "checkpoint.pt"
    stored = checkpoint(path.parent)
    other = stored | {"agent": stored["agent"] | {"net.bias": torch.zeros(2)}}
    for what, says in ((b"half", "not a checkpoint"), ({}, "not a checkpoint"), (other, "not a checkpoint")):
        path.write_bytes(what) if isinstance(what, bytes) else torch.save(what, path)
        ended(capsys, HERE, words(files, tmp_path, "--resume"), f"{path}: {says}", "--overwrite begins anew")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", "{}", '{"a": NaN}', "é\xff"])
def test_a_final_json_that_is_damaged_is_refused_in_words(files, tmp_path, capsys, text):
    path = run(files, tmp_path)
    (path / "final.json").write_bytes(text.encode("latin-1"))
    ended(capsys, HERE, words(files, tmp_path), f"{path / 'final.json'}: damaged", "--overwrite begins anew")


# ------------------------------------------------------------------------------------------------------------ pictures
def test_the_curve(files, tmp_path, monkeypatch):
    drawn, plot, line = {}, Axes.plot, Axes.axhline
    record = lambda label, *values: drawn.update({label: values})
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **how: record(how["label"], *x, *y) or plot(axes, x, y, **how))
    monkeypatch.setattr(Axes, "axhline", lambda axes, y, **how: record(how["label"], y) or line(axes, y, **how))
    path = run(files, tmp_path, "--steps 4 --eval-every 2")
    assert (path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    returns = [row["return_mean"] for row in metrics(path)]
    final = json.loads((path / "final.json").read_text())
    known = {"the test tasks' data": final["behaviour_return"], "the test tasks' optimum": final["optimal_return"]}
    curves = {"training tasks": (2, 4, 0, 0), "test tasks": (2, 4, *returns)}
    assert drawn == curves | {label: (value,) for label, value in known.items()}


def test_the_band_of_a_curve_is_where_most_tasks_are(tmp_path, monkeypatch):
    returns, bands, seen = np.arange(22.0).reshape(11, 2) ** 2, [], []
    row = {"step": 5} | data.describe_returns(returns, "train_") | data.describe_returns(returns + 1)
    each = returns.mean(1)  # over a task's episodes
    expected = {"mean": returns.mean(), "std": each.std(), "low": each[1], "high": each[9]}
    assert {key: row[f"train_return_{key}"] for key in expected} == pytest.approx(expected)
    monkeypatch.setattr(Axes, "fill_between", lambda axes, x, low, high, **how: bands.append([*x, *low, *high]))
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **how: seen.append((x, how["marker"])))
    world = SimpleNamespace(behaviour=None, optimum=None)
    how = {"marks": (), "unit": "steps", "script": Path("toy.py"), "args": SimpleNamespace(env=WIND), "world": world}
    how |= {"curve": {"train_": "training tasks", "": "test tasks"}, "rows": [row]}
    data.plot(SimpleNamespace(folder=tmp_path, **how), "curve")
    assert seen == 2 * [([5], "o")]  # a line of one point cannot be seen
    np.testing.assert_allclose(bands, [[5, each[1], each[9]], [5, each[1] + 1, each[9] + 1]])


def standing_for(tasks, each=4, goal=None):
    """What embeddings take of a vector env."""
    family = SimpleNamespace(goal=goal)
    return SimpleNamespace(tasks=tasks.repeat(each, axis=0), num_envs=each * len(tasks), family=family)


def test_embeddings_have_the_colours_of_their_tasks(tmp_path, monkeypatch):
    speed = np.array([3.0, 1.0, 2.5, 0.5, 2.0])  # three training tasks, two test tasks; z is the speed, three times
    z, drawn = torch.tensor(speed)[:, None, None].expand(5, 6, 3), []  # from six contexts of each
    monkeypatch.setattr(Axes, "scatter", lambda axes, x, y, c, **how: drawn.append((np.asarray(x), np.asarray(y), c)))
    data.plot(SimpleNamespace(folder=tmp_path), "embeddings", standing_for(speed[:, None]), z[:3], z[3:])
    key, colours = drawn[2], pictures.task_colours(speed[:, None])[0]
    for (x, _, c), own in zip(drawn, (slice(3), slice(3, 5)), strict=False):
        np.testing.assert_allclose(abs(x), math.sqrt(3) * abs(speed[own] - speed.mean()).repeat(6), atol=1e-12)
        np.testing.assert_array_equal(c, colours[own].repeat(6, 0))
    np.testing.assert_array_equal(key[0], speed)  # what the colours are
    np.testing.assert_array_equal(key[2], colours)
    assert len(drawn) == 3 and (tmp_path / "embeddings.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_colours_of_tasks_with_two_parameters_tell_both(tmp_path):
    x, y = np.meshgrid(np.linspace(-1, 1, 5), np.linspace(0, 2, 5))
    tasks = np.stack([x.ravel(), y.ravel()], 1)
    colours, place = pictures.task_colours(tasks)
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + np.eye(25)
    assert apart.min() > 0.05 and place is tasks
    assert len(np.unique(pictures.task_colours(np.zeros((3, 2)))[0], axis=0)) == 1  # tasks that are one
    assert np.isfinite(pictures.task_colours(np.zeros((2, 1)))[0]).all()
    assert pictures.task_colours(np.eye(4))[1].shape == (4, 2)


def test_embeddings_of_directions_have_the_colours_of_a_circle(tmp_path, monkeypatch):
    angles, drawn = np.array([[0.05], [3.0], [6.23], [1.5]]), []
    monkeypatch.setattr(Axes, "scatter", lambda axes, x, y, c, **how: drawn.append((np.asarray(x), np.asarray(y), c)))
    env = standing_for(angles, goal=envs.family("ant-dir").goal)
    data.plot(SimpleNamespace(folder=tmp_path), "embeddings", env, *torch.rand(2, 2, 3, 4))
    x, y, colours = drawn[2]
    np.testing.assert_allclose([x, y], [np.cos(angles[:, 0]), np.sin(angles[:, 0])], atol=1e-12)
    assert np.abs(colours[0] - colours[2]).max() < 0.1 < np.abs(colours[0] - colours[1]).max()


def test_paths_of_point_robots_are_of_test_tasks(tmp_path, monkeypatch):
    tasks, drawn = envs.sample_tasks(SPARSE, 5, 0), []
    world = SimpleNamespace(env=envs.make(SPARSE, tasks.repeat(3, axis=0), threads=1), test_rows=[0, 0])
    run = SimpleNamespace(folder=tmp_path, world=world, args=SimpleNamespace(eval_episodes=3))
    data.plot(run, "paths")
    assert not list(tmp_path.iterdir())  # before the first evaluation
    world.env.returns(lambda obs: tasks.repeat(3, axis=0) * 0.5, seed=0)
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, *_, **how: drawn.append((x[-1], y[-1], how["color"])))
    data.plot(run, "paths")
    np.testing.assert_allclose([(x, y) for x, y, _ in drawn], tasks[3:] * 0.05 * 20)  # to where the last step led
    np.testing.assert_array_equal([c for *_, c in drawn], pictures.task_colours(tasks)[0][3:])
    assert (tmp_path / "paths.png").exists()


def test_embeddings_of_one_number_and_of_one_context_are_shown_too(tmp_path):
    for shape in ((3, 4, 1), (3, 1, 5), (1, 1, 1)):
        tasks = standing_for(np.zeros((2 * shape[0], 2)))
        data.plot(SimpleNamespace(folder=tmp_path), "embeddings", tasks, *torch.rand(2, *shape))
