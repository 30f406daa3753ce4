"""The benchmark scripts: every run they plan is one that focal.py accepts, and their tables are what the runs wrote."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import bcq
import numpy as np
import pytest
import torch
from conftest import SPARSE, WALKER, WIND, collect, ended, script
from matplotlib.axes import Axes
from PIL import Image
from test_focal import changed, load_arrays

import data
import envs
import focal
import focal_pp
import merpo
import smac
import trained


@pytest.fixture
def paper():
    return script("paper")


def ran(module, folder, words):
    """The folder of a small run of a script."""
    module.main(f"--small --run-dir {folder} {words}".split())
    (path,) = folder.glob(f"{module.__name__}/*/*/seed*")
    return path


def test_the_variance_of_weighted_embeddings(monkeypatch):
    """On transitions whose embeddings and weights are known: a goal and noise where rewarded, only noise where not."""
    attention = script("attention")
    monkeypatch.setattr(attention, "SPARSITY", np.array([0.25, 0.75]))
    monkeypatch.setattr(attention, "CONTEXTS", 400)
    generator = torch.Generator().manual_seed(0)
    split, noise, goal = [3, 1, 1, 3, 1, 1, 1, 1], (0.2, 0.4), torch.eye(3) * 0.5
    rewarded = torch.arange(2000) % 2 == 0
    rows = torch.randn(3, 2000, sum(split), generator=generator)
    rows[..., 4] = rewarded.float()  # the contexts' reward
    rows[..., 3] = torch.arange(3.0)[:, None]  # the action tells the task

    class Encoder:
        def transitions(self, context):  # s is noise; weights are as 3 to 0.5
            s, r = context[..., :3], context[..., -1:]
            w = torch.where(r[..., 0] > 0, 3, 0.5)
            z = torch.where(r > 0, goal[int(context[0, 0, 3])] + noise[0] * s, noise[1] * s)
            return z, w / w.mean(1, keepdim=True)

    args = type("Args", (), {"next_obs": True, "context_size": 64})
    world = type("World", (), {"train_rows": rows, "split": split})
    found = attention.variances(focal_pp, args, world, Encoder(), rewarded.expand(3, -1), ~rewarded)
    for i, silent in enumerate((0.25, 0.75)):
        for j, w in enumerate((1, 3)):
            low = 1 if w == 1 else 0.5
            p = (1 - silent) * w / ((1 - silent) * w + silent * low)  # the share of weight on rewards
            variance = (p**2 * noise[0] ** 2 / (1 - silent) + (1 - p) ** 2 * noise[1] ** 2 / silent) / attention.SIZE
            between = 2 * variance + (p * 0.5) ** 2 * 2 / 3  # mean square distance of two tasks, for each dimension
            assert found[0, j, i] == pytest.approx(variance, rel=0.15), (silent, w)
            assert found[1, j, i] == pytest.approx(2 * variance / between, rel=0.15), (silent, w)


def plan(paper, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["paper.py", *words.split()])
    args = paper.arguments()
    return args, paper.plan(args)


@pytest.mark.parametrize("size", ["", "--full"])
@pytest.mark.parametrize("script", ["focal", "focal_pp", "smac", "merpo"])
def test_every_run_of_every_figure_has_a_folder_of_its_own(paper, monkeypatch, script, size):
    module, figures = paper.SCRIPTS[script], paper.FIGURES[script]
    for figure, (families, _, variants, columns) in figures.items():
        _, runs = plan(paper, monkeypatch, f"{script} {figure} {size}")
        for run in runs:
            args = paper.SCRIPTS[run.script].parse_args(run.words)
            assert figure != "table6" or f"{args.quality} / {args.test_quality}" == run.variant
            assert figure != "figure7b" or args.model == (run.variant == "with model")
        folders = [paper.path_of(run.script, run.words) for run in runs]
        pairs = zip(folders, runs, strict=True)
        places = {paper.result_of(folder, run.tested) if run.tested else folder for folder, run in pairs}
        twice = 3 * len(families) * 3 if (script, figure) == paper.AVERAGED else 0  # alpha = 1 has no use for META
        assert len(places) + twice == len(runs) == 3 * len(families) * len(variants)
        tested = [run.tested for run in runs if run.tested]
        assert len(tested) in (0, len(runs))  # draw() has one kind of picture for a figure
        for words in tested:  # flags of retest.py that this script has
            kind = paper.retest.kind_of(vars(module.parse_args(["--env", families[0]])))
            assert set(paper.retest.arguments(words)[1]) <= set(paper.retest.FLAGS[kind])
        assert all(("small" in folder.parent.name) == (not size) for folder in folders)
        header = {"return_mean", "train_esr", "esr", "train_rms", "variance", "train_variance", *module.Agent.METRICS}
        header |= {"smac": {"offline_return_mean", "short_kl"}, "merpo": {"meta_return_mean"}}.get(script, set())
        assert set(columns) <= header


@pytest.mark.parametrize("size", ["", "--full", "--steps 7"])
@pytest.mark.parametrize("figure, plain, needing", [("figure4", 6, 4), ("figure5", 24, 18)])
def test_the_good_meta_policy_is_that_of_a_run_of_the_same_figure(
    paper, monkeypatch, tmp_path, size, figure, plain, needing
):
    """Runs that need it come after all others."""
    args, runs = plan(paper, monkeypatch, f"merpo {figure} --env hopper --seeds 2 --jobs 1 {size}")
    folders = {str(paper.path_of(run.script, run.words)): run for run in runs}
    needed = [run.words[run.words.index("--meta-policy") + 1] for run in runs if "--meta-policy" in run.words]
    random = {"figure4": "RAC, random meta-policy", "figure5": "alpha = 0.4, medium data, random meta-policy"}
    assert len(needed) == needing and {folders[path].variant for path in needed} == {random[figure]}
    assert {folders[path].seed for path in needed} == {0} and ("small" in needed[0]) == (size != "--full")
    done = []
    monkeypatch.setattr(paper, "build_data", lambda parsed: None)
    monkeypatch.setattr(paper, "path_of", lambda script, words: tmp_path / str(words))
    monkeypatch.setattr(paper, "execute", lambda script, words: done.append(words))
    monkeypatch.setattr(paper, "summarise", lambda *_: sys.exit())
    with pytest.raises(SystemExit):
        paper.main()
    assert ["--meta-policy" in words for words in done] == [False] * plain + [True] * needing


def test_returns_over_meta_policies(paper, monkeypatch, tmp_path):
    _, runs = plan(paper, monkeypatch, "merpo figure5 --env hopper --seeds 3")
    rows = [{"variant": run.variant, "seed": run.seed, "return_mean": float(i), "data_return": 7.0} for i, run in
            enumerate(runs)]  # fmt: skip
    means = paper.over_meta_policies(rows)
    assert list(means)[:2] == [("alpha = 0", "random data"), ("alpha = 0.4", "random data")] and len(means) == 12
    np.testing.assert_array_equal(means["alpha = 0.4", "random data"], [[6, 7, 8], [9, 10, 11]])
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    paper.draw("merpo", "figure5", "hopper", runs, [tmp_path] * len(runs), "", rows)
    assert (tmp_path / "results" / "merpo-figure5-hopper.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "words, message",
    [
        ("focal table1", "focal has no table1"),
        ("focal figure2 --env walker-params", "figure2 is not of --env walker-params; expected cheetah-vel"),
        ("focal figure2 --jobs 0", "--jobs: expected a whole number above 0"),
        ("focal figure2 --seeds 0", "--seeds: expected a whole number above 0"),
    ],
)
def test_a_figure_that_there_is_not_is_refused(paper, monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit):
        plan(paper, monkeypatch, words)
    assert message in capsys.readouterr().err


def test_a_run_is_done_once_it_has_ended_and_goes_on_from_its_own_checkpoint_only(paper, monkeypatch, tmp_path):
    words, started = f"--env {WIND} --steps 4 --run-dir {tmp_path}".split(), []
    folder, longer = (paper.path_of("focal", [*words, "--steps", str(steps)]) for steps in (4, 8))
    end = type("Done", (), {"returncode": 0})
    monkeypatch.setattr(paper.subprocess, "run", lambda command, **_: started.append(command[2:]) or end)
    for path in (longer, folder):
        paper.execute("focal", words)  # beside a run of another length
        path.mkdir(parents=True, exist_ok=True)
        (path / "checkpoint.pt").write_text("")
    paper.execute("focal", words)
    assert started == [words, words, [*words, "--resume"]] and not paper.is_done("focal", words)
    settings = json.loads(json.dumps(data.plain(focal.parse_args(words))))
    (folder / "final.json").write_text(json.dumps({"step": 4, "args": settings}))
    paper.execute("focal", words)
    assert len(started) == 3 and paper.is_done("focal", words)
    (folder / "final.json").write_text(json.dumps({"step": 4, "args": settings | {"lr": 1.0}}))
    with pytest.raises(data.DataError, match="made with --lr 1.0, now"):
        paper.execute("focal", words)


def test_summary_of_a_run_that_ended_and_of_one_that_diverged(paper, monkeypatch, tmp_path):
    _, runs = plan(paper, monkeypatch, "focal figure5 --seeds 1 --steps 4")
    keys = ["step", "return_mean", "train_return_mean", "esr", "train_esr", "rms", "train_rms"]
    keys += ["train_variance", "q_mean"]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, steps in zip(folders, ([1, 2, 3, 4], [1, 2]), strict=True):
        folder.mkdir()
        with open(folder / "metrics.csv", "w") as file:
            before = [0, *["nan"] * 8]  # as in stage 1 of MerPO
            csv.writer(file).writerows([keys, before, *([step, *[10.0 * step] * 8] for step in steps)])
    (tmp_path / "a" / "final.json").write_text(json.dumps({"behaviour_return": 7.0}))
    ended, diverged = paper.summarise("focal", runs, folders)
    assert ended["return_mean"] == ended["q_mean"] == 30 and ended["diverged"] == 0 and ended["data_return"] == 7
    assert diverged["return_mean"] == 15 and diverged["diverged"] == 1 and diverged["data_return"] is None
    assert [row["variant"] for row in (ended, diverged)] == ["FOCAL", "coupled"]
    (tmp_path / "b" / "metrics.csv").unlink()
    assert np.isnan(paper.summarise("focal", runs, folders)[1]["return_mean"])
    keys = ["step", "online_steps", *paper.COLUMNS["smac"]]
    with open(tmp_path / "b" / "metrics.csv", "w") as file:
        later = [[i, online, *[10.0 * i] * len(paper.COLUMNS["smac"])] for i, online in enumerate((0, 0, 60))]
        csv.writer(file).writerows([keys, *later])
    (row,) = paper.summarise("smac", runs[:1], folders[1:])
    assert row["return_mean_after_offline_phase"] == row["offline_return_mean_after_offline_phase"] == 10


def test_runs_of_ones_own_are_compared(monkeypatch, tmp_path, capsys):
    compare, drawn = script("compare"), []
    for law, returns in {"inverse": [[1, 2, 3, 4], [2, 3, 4, 5]], "square": [[1, 1, 1, 7], []]}.items():
        for seed, values in enumerate(returns):
            folder = tmp_path / f"small,dml={law}" / f"seed{seed}"
            folder.mkdir(parents=True)
            with open(folder / "metrics.csv", "w") as file:
                csv.writer(file).writerows([["step", "return_mean"], *enumerate(values)])
    folders = [str(tmp_path / f"small,dml={law}") for law in ("inverse", "square")]
    text = "step,return_mean\n0,1\n1,1\n1.5,9\n2,1\n3,7\n"  # resumed to more steps, with a row where it had ended
    (tmp_path / "small,dml=square" / "seed1" / "metrics.csv").write_text(text)
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, *_, **__: drawn.append((list(x), list(y))))
    compare.main([*folders, "--out", str(tmp_path / "both.png")])
    assert drawn == [([0, 1, 2, 3], [1.5, 2.5, 3.5, 4.5]), ([0, 1, 2, 3], [1, 1, 1, 7])]
    inverse, square, _ = capsys.readouterr().out.splitlines()
    assert inverse.split() == ["small,dml=inverse", "return_mean", "3.5", "(0.5),", "2", "seeds"]  # last three of each
    assert square.split()[:2] == ["small,dml=square", "return_mean"]
    assert (tmp_path / "both.png").stat().st_size > 8_000
    wrong = {"no column esr": ["--columns", "esr"], "no seed*/metrics.csv there": [str(tmp_path)]}
    wrong |= {"nowhere/x.png: ": ["--out", str(tmp_path / "nowhere" / "x.png")], "x.foo: ": ["--out", "x.foo"]}
    for message, words in wrong.items():
        ended(capsys, compare, [*folders, *words], message)


FILMED = [(focal, ""), (focal_pp, ""), (bcq, ""), (smac, "--online-steps 0")]
FILMED += [(merpo, "--model-steps 1 --adapt-steps 1")]


@pytest.mark.parametrize(("module", "more"), FILMED)
def test_an_agent_is_filmed_in_test_tasks(monkeypatch, tmp_path, files, module, more, capsys):
    animate, seen, film = script("animate"), {}, envs.film
    monkeypatch.setattr(envs, "film", lambda vector, *rest: (seen.update(tasks=vector.tasks), film(vector, *rest)))
    run = ran(module, tmp_path, f"--env {SPARSE} --data {files[SPARSE]} --steps 2 --eval-every 1 --seed 1 {more}")
    animate.main([str(run), "--tasks", "2", "--size", "40", "--out", str(tmp_path / "agent.gif")])
    picture = Image.open(tmp_path / "agent.gif")
    dataset = data.load(files[SPARSE])
    np.testing.assert_array_equal(seen["tasks"], dataset.tasks[dataset.test_tasks])
    assert picture.size == (80, 40) and picture.n_frames == 20  # both test tasks, an episode of 20 steps
    ended(capsys, animate, [str(tmp_path)], "args.json: No such file or directory; expected the folder of a run")
    (run / "checkpoint.pt").unlink()
    ended(capsys, animate, [str(run)], "expected the folder of a run")


def test_one_task_is_filmed_and_not_tested_again(monkeypatch, tmp_path, capsys):
    arrays = collect("hopper", [0], [], 40, 20) | dict.fromkeys(("train_tasks", "test_tasks"), np.zeros(1, int))
    data.save(tmp_path / "d.npz", arrays, {"env": "hopper"})
    words = f"--env hopper --single rac --data {tmp_path / 'd.npz'} --steps 1 --model-steps 1 --hidden 8"
    with monkeypatch.context() as patch:  # an episode has a thousand steps in the simulator
        patch.setattr(merpo, "play", lambda *args: np.zeros((1, 1)))
        patch.setattr(merpo, "BEHAVIOUR_STEPS", 1)
        run, seen = ran(merpo, tmp_path, words), []
    monkeypatch.setattr(envs, "film", lambda vector, act, file: seen.append((obs, act(obs))))
    obs = np.random.default_rng(0).normal(size=(1, 11))
    script("animate").main([str(run)])
    _, _, world, agent = trained.load_run(run)
    expected = torch.tanh(agent.rac.actor(world.scaled(obs))[0]).detach()
    np.testing.assert_allclose(seen[0][1], expected, atol=1e-6)
    assert (run / "film.gif").exists()
    monkeypatch.setattr(data, "prepare", lambda *_, **__: 1 / 0)  # and builds no data for it
    for words in ([], ["--test-quality", "random"]):
        ended(capsys, script("retest"), [str(run), *words], "a run with --single has no test tasks")


def test_what_is_said_of_attention(monkeypatch, tmp_path, files):
    """Silent is what no task rewards; weights above those of the silent count as seen, lower variances as lower."""
    attention, kept = script("attention"), []
    own = tmp_path / "relabelled.npz"
    arrays = load_arrays(files[SPARSE])
    arrays["sparse_rewards"] = np.random.default_rng(0).random(arrays["rewards"].shape) < 0.2
    data.save(own, arrays, {"env": SPARSE, "quality": "relabelled"})
    run = ran(focal_pp, tmp_path, f"--env {SPARSE} --data {own} --steps 2 --eval-every 2")
    weights = lambda *args: kept.extend(args[-2:]) or (np.array([0.0, 1.0]), np.array([1.5, 2.0, 0.5]))
    without, weighted = np.full(len(attention.SPARSITY), 1.0), np.full(len(attention.SPARSITY), 2.0)
    weighted[0] = 0.5
    monkeypatch.setattr(attention, "weights_of", weights)
    monkeypatch.setattr(attention, "variances", lambda *_: np.array([[without, weighted], [weighted, without]]))
    attention.main([str(run), "--out", str(tmp_path / "attention.csv")])
    (row,) = csv.DictReader((tmp_path / "attention.csv").read_text().splitlines())
    assert float(row["auc"]) == pytest.approx(5 / 6, abs=1e-4)  # five of six pairs the right way round
    first, *others = [f"{share:.2f}" for share in attention.SPARSITY]
    assert row["lower_at"] == first and row["share_lower_at"] == ", ".join(others)
    informative, silent = kept
    stored = data.load(own)
    rewards = stored.context_rewards[torch.from_numpy(stored.train_tasks)]
    assert torch.equal(silent, (rewards != 0).sum(0) == 0) and torch.equal(informative, rewards != 0)
    assert 0 < silent.double().mean() < 1 and not (silent & informative).any()


@pytest.mark.parametrize("module", [focal, focal_pp])
def test_online_contexts_are_what_the_agent_itself_met(tmp_path, files, module):
    online, seen = script("online"), []
    run = ran(module, tmp_path, f"--env {SPARSE} --data {files[SPARSE]} --steps 2 --eval-every 2")
    _, args, world, agent = online.load_run(run)

    def context_of(rows, split, args):
        seen.append(rows)
        return module.context_of(rows, split, args)

    own, first = online.evaluate(SimpleNamespace(context_of=context_of), args, agent, world)
    assert own.shape == first.shape == (2, args.eval_episodes)  # two test tasks
    *known, context = seen
    pool = {row.numpy().tobytes() for row in world.train_rows.flatten(0, 1)}
    assert len(known) == 2 and all(row.numpy().tobytes() in pool for x in known for row in x.flatten(0, 1))
    whose = {row.numpy().tobytes(): i for i, rows in enumerate(world.train_rows) for row in rows}
    tasks = [[{whose[row.numpy().tobytes()] for row in rows} for rows in x] for x in known]
    assert all(len(found) == 1 for x in tasks for found in x) and tasks[0] != tasks[1]  # each context of one task
    assert len(set.union(*tasks[0], *tasks[1])) > 1
    to_goal = lambda s: torch.as_tensor(5 * (world.env.tasks - (s * world.std + world.mean).numpy())).clamp(-1, 1)
    rows, counted, total = online.play(lambda s: to_goal(s).float(), world, 0)
    np.testing.assert_allclose(total, (rows[..., 4] * counted).sum(1), rtol=1e-5)
    assert (total >= 0).all() and total.max() > 0  # as reported: sparse
    s, a, r, s2, *rest = context.split(world.split, -1)  # (tasks x E, B, .) of the two episodes
    assert context.shape[:2] == (world.env.num_envs, args.context_size) and not any(x.any() for x in rest)
    s, s2 = (x * world.std + world.mean for x in (s, s2))
    torch.testing.assert_close(s2, s + 0.1 * a, atol=1e-5, rtol=0)
    distance = (s2 - torch.as_tensor(world.env.tasks[:, None], dtype=torch.float32)).norm(dim=-1)  # each in its task
    assert ((r[..., 0] > 0) == (distance < 0.2)).all()
    again = online.evaluate(module, args, agent, world)
    np.testing.assert_array_equal(again[0], own)  # draws nothing from the global stream
    online.main([str(run)])
    saved = json.loads((run / "online.json").read_text())
    assert saved["online_return"] == round(own.mean(), 4) and saved["step"] == 2
    final = json.loads((run / "final.json").read_text())
    assert saved["offline_return"] == pytest.approx(final["return_mean"], abs=1e-3)
    args.sparse = True
    with pytest.raises(data.DataError, match="do not give --sparse rewards"):
        online.evaluate(module, args, agent, world)
    args.sparse = False
    online.data = SimpleNamespace(load=lambda _: SimpleNamespace(meta={"quality": "relabelled"}), refuse=data.refuse)
    with pytest.raises(data.DataError, match="as relabelled data have"):
        online.evaluate(module, args, agent, world)


def test_the_third_episode_is_scored_on_a_context_of_the_first_two(monkeypatch, tmp_path, files):
    online = script("online")
    run = ran(focal, tmp_path, f"--env {WIND} --data {files[WIND]} --steps 2 --eval-every 2")
    _, args, world, agent = online.load_run(run)
    episodes, taken, play, experience = [], [], online.play, online.experience

    def play_and_number(act, world, seed):
        episodes.append(play(act, world, seed))
        return *episodes[-1][:2], np.full(world.env.num_envs, len(episodes))

    monkeypatch.setattr(online, "play", play_and_number)
    monkeypatch.setattr(online, "experience", lambda *rest: taken.extend(rest[:2]) or experience(*rest))
    own, first = online.evaluate(focal, args, agent, world)
    assert (own == 3).all() and (first == 1).all() and len(episodes) == 3
    assert [x[0] is y[0] for x, y in zip(taken, episodes, strict=False)] == [True, True]


def test_what_the_kills_are_checked_by_sees_a_difference(tmp_path, files):
    kill = script("kill")
    whole = {"weights": [torch.ones(2), torch.zeros(1)], "step": 3}
    for other in ({"weights": [torch.ones(2), torch.ones(1)], "step": 3}, whole | {"step": 4}, {"step": 3}):
        assert kill.same(whole, {"weights": [torch.ones(2), torch.zeros(1)], "step": 3}) and not kill.same(whole, other)
    (tmp_path / "final.json").write_text('{"step": 3}')
    (tmp_path / "metrics.csv").write_text("step,seconds\n1,2\n")
    (tmp_path / "mixed.npz").write_bytes(files[WIND].read_bytes())
    (tmp_path / ".hidden").write_text("a temporary file")
    assert kill.broken(tmp_path) == []
    for name in ("final.json", "metrics.csv", "mixed.npz"):
        path = tmp_path / name
        text = path.read_bytes()
        path.write_bytes(text[:-4])
        assert [found.split()[0] for found in kill.broken(tmp_path)] == [name]
        path.write_bytes(text)


def test_an_online_context_ends_where_the_episode_does(files):
    """Rows of the next episode, which a fallen walker begins, are not part of it."""
    online = script("online")
    args = focal.parse_args(f"--env {WALKER} --small --data {files[WALKER]} --seed 3".split())
    world = focal.World(args, torch.device("cpu"))
    agent = focal.Agent(args, focal.Batches(args, world.train_rows, world.split))
    z = torch.zeros(world.env.num_envs, args.latent)
    generator = torch.Generator().manual_seed(0)
    rows, counted, total = online.play(lambda s: agent.act(s, z, generator).detach(), world, 0)
    obs = world.env.reset(seed=0)[0]
    total2, length = np.zeros(len(obs)), np.full(len(obs), world.env.horizon)
    for t in range(world.env.horizon):
        a = agent.act((torch.as_tensor(obs, dtype=torch.float32) - world.mean) / world.std, z, generator)
        obs, reward, terminated, truncated, _ = world.env.step(a.detach().numpy())
        total2 += np.where(t < length, reward, 0)
        length = np.where((terminated | truncated) & (t < length), t + 1, length)
    assert length.min() < world.env.horizon  # an untrained walker falls
    np.testing.assert_array_equal(counted.sum(1), length)
    np.testing.assert_allclose(total, total2)
    ended = [row[keep][:, -1] for row, keep in zip(rows, counted, strict=True)]
    assert all(not d[:-1].any() for d in ended)  # terminals: the last row of those that fell, no time limit
    assert [bool(d[-1]) for d in ended] == [bool(n < world.env.horizon) for n in length]
    drawn = online.experience((rows, counted), (rows + 1000, counted), generator, 500)
    later = drawn[..., 0] > 500
    assert 0.4 < later.float().mean() < 0.6  # of the second episode
    drawn = online.experience((rows, counted), (rows, counted), generator, 500)
    for row, keep, mine in zip(rows, counted, drawn, strict=True):
        assert {x.numpy().tobytes() for x in mine} <= {x.numpy().tobytes() for x in row[keep]}


@pytest.mark.parametrize("module", [focal, focal_pp, merpo])
def test_a_trained_agent_is_tested_again_under_other_conditions(monkeypatch, tmp_path, files, module, capsys):
    retest, name = script("retest"), WIND if module is merpo else SPARSE
    monkeypatch.setattr(merpo, "BEHAVIOUR_STEPS", 20)
    folder = tmp_path / "datasets" / name / ("40+10-seed0" if name == WIND else "80+20-seed0")
    for quality, shift in (("mixed", 0), ("random", 1)):
        changed(files[name], folder / f"{quality}.npz", name, returns=np.full(6, -9.0 - shift))
    more = "--model-steps 2 --adapt-steps 3" if module is merpo else ""
    run = ran(module, tmp_path, f"--env {name} --data-dir {tmp_path / 'datasets'} --steps 2 --eval-every 2 {more}")
    settings = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(settings | {"device": "cuda"}))  # as if trained there; this is the CPU
    retest.main([str(run)])
    as_trained = json.loads((run / "retest" / "as-trained.json").read_text())
    final = json.loads((run / "final.json").read_text())
    assert as_trained["step"] == final["step"]
    assert as_trained["data_return"] == pytest.approx(final["behaviour_return"], rel=1e-5)
    if module is merpo:  # its test tasks adapt their models anew, from other random numbers
        assert as_trained["meta_return_mean"] == pytest.approx(final["meta_return_mean"], rel=1e-5)
        assert as_trained["return_mean"] == pytest.approx(as_trained["returns"]["3"], abs=1e-3)
        _, args, world, agent = retest.load_run(run, ["MerPO"])
        torch.manual_seed(args.seed)
        played, play = [], merpo.play
        monkeypatch.setattr(merpo, "play", lambda *given: played.append(play(*given)) or played[-1])
        clones = retest.clone_return(merpo, args, agent, world)
        assert as_trained["clone_return_mean"] == pytest.approx(clones, rel=1e-5)
        assert len({returns.mean() for returns in played}) == 5  # fits from scratch, each by itself
        assert clones == pytest.approx(np.mean(played))
        assert list(as_trained["returns"]) == ["0", "3"] and as_trained["returns"]["3"] != as_trained["returns"]["0"]
    else:
        assert as_trained["return_mean"] == pytest.approx(final["return_mean"], rel=1e-5)
        assert as_trained["variance"] == pytest.approx(final["variance"], rel=1e-5)
    seen, world = [], module.World
    monkeypatch.setattr(module, "World", lambda args, device: seen.append(args) or world(args, device))
    retest.main([str(run), "--test-quality", "random", "--eval-episodes", "2"])
    assert (seen[0].test_quality, seen[0].quality, seen[0].eval_episodes) == ("random", "mixed", 2)
    row = json.loads((run / "retest" / "eval-episodes=2,test-quality=random.json").read_text())
    assert (as_trained["data_return"], row["data_return"]) == (-9, -10)
    other = load_arrays(files[name])
    other["rewards"] += 1
    data.save(folder / "mixed.npz", other, {"env": name})
    ended(capsys, retest, [str(run)], "its data have changed")
    (run / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:1000])
    ended(capsys, retest, [str(run)], "a damaged run")


def test_a_file_of_ones_own_has_no_other_quality(tmp_path, files, capsys):
    run = ran(focal, tmp_path, f"--env {WIND} --data {files[WIND]} --steps 2 --eval-every 2")
    argv = [str(run), "--test-quality", "random"]
    ended(capsys, script("retest"), argv, f"--test-quality: {run} has its data from --data")
    ended(capsys, script("retest"), argv[1:], "expected the folder of a run")


def watch_settling(monkeypatch):
    """Grows with every settling: (tasks, how far their models moved)."""
    settled, adapt = [], merpo.Tasks.adapt

    def watched(tasks, meta_model):
        before = next(tasks.models.parameters()).clone()
        adapt(tasks, meta_model)
        settled.append((tasks, (before - next(tasks.models.parameters())).abs().max()))

    monkeypatch.setattr(merpo.Tasks, "adapt", watched)
    return settled


def test_a_test_task_of_merpo_learns_from_its_data(monkeypatch, tmp_path, capsys, files, short_trajectories):
    retest = script("retest")
    monkeypatch.setattr(merpo, "BEHAVIOUR_STEPS", 20)
    run = ran(merpo, tmp_path, f"--env {WIND} --data {files[WIND]} --steps 1 --model-steps 1 --adapt-steps 1")
    settled, evaluate, steps = watch_settling(monkeypatch), merpo.evaluate, []
    monkeypatch.setattr(merpo, "evaluate", lambda args, *rest: steps.append(args.test_start) or evaluate(args, *rest))
    retest.main([str(run), "--test-trajectories", "2", "--test-start", "behaviour", "--adapt-steps", "2"])
    tasks, moved = settled[0]
    assert tasks.rows.shape[:2] == (2, 40) and moved > 0 and steps == ["behaviour"]
    (path,) = (run / "retest").iterdir()
    assert path.name == "adapt-steps=2,test-start=behaviour,test-trajectories=2.json"
    assert list(json.loads(path.read_text())["returns"]) == ["2"]  # it does not start from the meta-policy, which is 0
    argv = [str(run), "--adapt-steps", "50", "--adapt-lr", "1e30"]
    ended(capsys, retest, argv, f"retest.py: diverged: {run}: ", code=3)


def test_smac_is_tested_in_more_meta_episodes(tmp_path, files):
    retest = script("retest")
    words = f"--env {WIND} --data {files[WIND]} --data-size 60 --data-until 60 --context-data 60 --steps 4"
    run = ran(smac, tmp_path, f"{words} --online-steps 0 --eval-episodes 2")
    with open(run / "metrics.csv") as file:
        (last,) = csv.DictReader(file)
    retest.main([str(run)])
    found = json.loads((run / "retest" / "as-trained.json").read_text())
    for name in ("", "short_", "prior_", "offline_"):
        assert found[f"{name}return_mean"] == pytest.approx(float(last[f"{name}return_mean"]), rel=1e-4)
    retest.main([str(run), "--eval-episodes", "5"])
    more = json.loads((run / "retest" / "eval-episodes=5.json").read_text())
    assert more["step"] == 4 and more["return_mean"] != found["return_mean"]


@pytest.mark.parametrize(
    "saved, words, message",
    [
        (None, "", "expected the folder of a run"),
        ({"online_steps": 1}, "--test-quality random", "--test-quality: SMAC has no such flag of its tests"),
        ({}, "--test-start combo", "--test-start: FOCAL has no such flag of its tests"),
        ({"data": None}, "", "checkpoint.pt: No such file or directory; expected the folder of a run"),
    ],
)
def test_what_cannot_be_tested_again_is_refused(tmp_path, saved, words, message, capsys):
    if saved is not None:
        (tmp_path / "args.json").write_text(json.dumps(saved))
    ended(capsys, script("retest"), [str(tmp_path), *words.split()], message)


FEW = "--small --steps 2 --eval-every 2 --eval-episodes 1 --hidden 8 --encoder-hidden 8 --context-size 8"


def test_a_copy_of_a_script_is_a_script_to_the_tools(monkeypatch, tmp_path, files):
    """It is taken from the working directory, and from the run's folder once it is gone; paths may be relative, and
    the runs on another disk."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "another" / "disk").mkdir(parents=True)
    Path("runs").symlink_to(tmp_path / "another" / "disk")
    Path("mine.py").write_text(Path(focal.__file__).read_text())
    Path("mine.npz").write_bytes(files[SPARSE].read_bytes())
    script("mine", tmp_path).main(f"--env {SPARSE} --data mine.npz {FEW}".split())
    del sys.modules["mine"]
    (run,) = tmp_path.glob(f"runs/mine/{SPARSE}/*/seed0")
    decode, returned = script("decode"), json.loads((run / "final.json").read_text())["return_mean"]
    monkeypatch.setattr(decode, "STEPS", 2)
    for source in (tmp_path / "mine.py", run / "source.py"):
        script("retest").main([str(run)])
        assert sys.modules.pop("mine").__file__ == str(source)
        tested = json.loads((run / "retest" / "as-trained.json").read_text())
        assert tested["return_mean"] == pytest.approx(returned, rel=1e-5)
        Path("mine.py").unlink(missing_ok=True)
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
    script("online").main([str(run)])
    decode.main([str(run)])


OWN = (envs, "FAMILIES"), (focal, "TABLE"), (focal, "SMALL")


def test_a_family_of_ones_own_is_registered_by_what_was_started(monkeypatch, tmp_path, files):
    known = [(owner, name, dict(getattr(owner, name))) for owner, name in OWN]
    monkeypatch.chdir(tmp_path)
    lines = ["import envs, focal", 'envs.FAMILIES["gusts"] = envs.family("point-robot-wind")']
    lines += ['focal.TABLE["gusts"] = focal.POINT', 'focal.SMALL["gusts"] = focal.SMALL_POINT']
    Path("gusts.py").write_text("\n".join([*lines, 'if __name__ == "__main__":', "    focal.main()"]))
    data.save(tmp_path / "gusts.npz", load_arrays(files[WIND]), {})
    for owner, name, table in known:
        monkeypatch.setattr(owner, name, dict(table))
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "gusts.py"), raising=False)
    script("gusts", tmp_path)
    focal.main(f"--env gusts --data gusts.npz {FEW}".split())
    (run,) = tmp_path.glob("runs/focal/gusts/*/seed0")
    for owner, name, table in known:
        monkeypatch.setattr(owner, name, table)
    monkeypatch.chdir("/")
    loaded, args, _, agent = trained.load_run(run)
    assert loaded is focal and args.env == "gusts" and agent.step == 2 and "gusts" in envs.FAMILIES
    del focal.SMALL["gusts"]  # else a CPU gets the papers' sizes under the name of small ones
    with pytest.raises(data.DataError, match="--env gusts: the script's SMALL has no such row; expected one, or --no"):
        focal.parse_args(["--env", "gusts", "--small"])
    assert focal.parse_args(["--env", "gusts", "--no-small"]).steps == 200_000
    del envs.FAMILIES["gusts"], focal.TABLE["gusts"]


def test_a_run_that_was_moved_does_not_have_its_data_built_anew(monkeypatch, tmp_path, files):
    monkeypatch.chdir(tmp_path)
    focal.main(f"--env {WIND} --data {files[WIND]} --run-dir runs/deep {FEW}".split())
    (made,) = Path("runs/deep/focal").glob("*/*/seed0")
    args = json.loads((made / "args.json").read_text())
    (made / "args.json").write_text(json.dumps(args | {"data": None}))
    moved = Path("runs/focal", *made.parts[3:])
    moved.parent.mkdir(parents=True)
    made.rename(moved)
    monkeypatch.setattr(data, "prepare", lambda *_, **__: 1 / 0)
    with pytest.raises(data.DataError, match="made in runs/deep, and there is no .*datasets for its data"):
        trained.load_run(moved)
    assert trained.load_run(moved, data=files[WIND])[3].step == 2
    (moved / "args.json").write_text(json.dumps(args | {"data": None, "run_dir": str(tmp_path / "elsewhere")}))
    with pytest.raises(data.DataError, match="made in .*elsewhere, and there is no datasets for its data"):
        trained.load_run(moved)


def test_copies_of_a_script_are_loaded_each_with_its_own_code_and_family(monkeypatch, tmp_path, files):
    """Forks of one name in two places, one of which has a family that nobody else knows."""
    for owner, name in OWN:
        monkeypatch.setattr(owner, name, dict(getattr(owner, name)))
    folders = []
    for k, family in enumerate(('envs.FAMILIES["gusts"] = envs.family("point-robot-wind")', "")):
        place, env = tmp_path / str(k), "gusts" if family else WIND
        place.mkdir()
        rows = 'TABLE["gusts"], SMALL["gusts"] = POINT, SMALL_POINT' if family else ""
        text = (
            Path(focal.__file__)
            .read_text()
            .replace("\ndef parse_args", f"\nMARK = {k}\n{family}\n{rows}\n\ndef parse_args")
        )
        (place / "fork.py").write_text(text)
        data.save(place / "own.npz", load_arrays(files[WIND]), {})
        fork = script("fork", place)
        fork.main(f"--env {env} --data {place / 'own.npz'} --run-dir {place} {FEW}".split())
        folders += place.glob("fork/*/*/seed0")
        envs.FAMILIES.pop("gusts", None)
    monkeypatch.delitem(sys.modules, "fork")
    assert [trained.load_run(folder)[0].MARK for folder in folders] == [0, 1]
    monkeypatch.delitem(sys.modules, "fork")
    monkeypatch.delitem(envs.FAMILIES, "gusts")
    monkeypatch.syspath_prepend(tmp_path / "0")
    assert trained.load_run(folders[0])[0].__file__ == str(tmp_path / "0" / "fork.py")


def test_runs_that_are_evaluated_once_become_bars(paper, monkeypatch, tmp_path):
    """Also if one diverged before that."""
    args, runs = plan(paper, monkeypatch, "merpo figure6 --env point-robot-wind --seeds 2")
    folders = [tmp_path / str(i) for i in range(len(runs))]
    for i, folder in enumerate(folders):
        folder.mkdir()
        (folder / "metrics.csv").write_text("step,return_mean,meta_return_mean\n200,nan,nan\n")
        if i:
            with open(folder / "metrics.csv", "a") as file:
                file.write(f"1000,-{i},-8\n")
            (folder / "final.json").write_text('{"behaviour_return": -9}')
    rows = paper.summarise(args.script, runs, folders)
    assert [row["diverged"] for row in rows] == [1, 0, 0, 0]
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    marks = []
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, mark, **_: marks.append((x, y, mark)))
    paper.draw(args.script, args.figures[0], runs[0][1], runs, folders, "", rows)
    assert marks == [(-9, 0, "k|"), (-8, 0, "ko"), (-9, 1, "k|"), (-8, 1, "ko")]


@pytest.mark.parametrize("adapts", [True, False])
def test_tests_of_one_agent_become_rows_and_a_picture(paper, monkeypatch, tmp_path, adapts):
    words = "merpo figure10 --seeds 2" if adapts else "focal_pp table3 --env sparse-point-robot --seeds 2"
    args, runs = plan(paper, monkeypatch, words)
    folders = [tmp_path / str(run.seed) for run in runs]
    for i, (run, folder) in enumerate(zip(runs, folders, strict=True)):
        path = paper.result_of(folder, run.tested)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"flags": {}, "step": 8, "data_return": -3.0, "return_mean": float(i)}
        path.write_text(json.dumps(found | ({"returns": {"0": 1.0, "10": float(i)}} if adapts else {})))
    rows = paper.summarise(args.script, runs, folders)
    distinct = [row["return_mean"] for row in rows]
    assert distinct == sorted(distinct) if adapts else len({*distinct}) == 8  # FOCAL's and FOCAL++'s share folders
    assert all(row.get("return_after_10") == (row["return_mean"] if adapts else None) for row in rows)
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    paper.draw(args.script, args.figures[0], runs[0][1], runs, folders, "", rows)
    (picture,) = (tmp_path / "results").iterdir()
    for folder in folders:
        (folder / "final.json").touch()
    paper.result_of(folders[0], runs[0].tested).unlink()  # an adaptation that diverged
    lost = [not paper.result_of(folder, run.tested).exists() for run, folder in zip(runs, folders, strict=True)]
    assert [row["diverged"] for row in paper.summarise(args.script, runs, folders)] == lost and sum(lost) in (1, 2)
    assert picture.stat().st_size > 8_000


def test_what_embeddings_say_about_tasks(monkeypatch, tmp_path, files, capsys):
    decode, generator = script("decode"), torch.Generator().manual_seed(0)
    monkeypatch.setattr(decode, "STEPS", 600)
    tasks, unseen = (5 + 3 * torch.randn(n, 2, generator=generator) for n in (60, 10))
    noise = lambda n, scale: scale * torch.randn(n, 8, 3, generator=generator)
    mix = torch.randn(2, 3, generator=generator)
    say = lambda tasks: (tasks @ mix)[:, None] + noise(len(tasks), 0.1)
    (seen, wide, bias), (test, *_), linear, guess = decode.errors(say(tasks), say(tasks), say(unseen), tasks, unseen)
    assert guess == pytest.approx((unseen - tasks.mean(0)).norm(dim=1).mean().item())
    assert linear < 0.5 and seen < 0.5 and test < 0.8 and guess > 3 and bias < seen < wide + bias
    (seen, *_), _, linear, _ = decode.errors(say(tasks), say(tasks.flip(0)), say(unseen), tasks, unseen)
    assert seen > 2 and linear > 2  # scored on contexts of its own, here of other tasks
    _, (swapped, wide_too, bias), *_ = decode.errors(say(tasks), say(tasks), say(unseen), tasks, unseen.flip(0))
    assert swapped > 2 and wide_too < 0.5 and bias > 2  # the wrong task, always
    bent = lambda tasks: torch.tanh(say(tasks) / 4)
    (seen, *_), _, linear, _ = decode.errors(bent(tasks), bent(tasks), bent(unseen), tasks, unseen)
    assert linear > 2 * seen
    (seen, *_), (test, *_), linear, guess = decode.errors(noise(60, 1), noise(60, 1), noise(10, 1), tasks, unseen)
    assert seen > 2 and linear > 2 and test > 0.8 * guess  # noise says nothing
    apart = say(tasks[:3]) + torch.tensor([0.0, 1e3, 2e3])[:, None, None]
    mixed = torch.cat([apart[:, :6], apart.roll(1, 0)[:, 6:]], 1)  # of each task two contexts of eight are another's
    assert [decode.own(z) for z in (apart, mixed)] == [1, 0.75] and decode.own(noise(60, 1)) < 0.2
    at = lambda env, *tasks: decode.described(env, np.array(tasks)).tolist()
    assert at("ant-dir", [0.0], [np.pi / 2]) == [pytest.approx(x, abs=1e-6) for x in ([1, 0], [0, 1])]
    assert at("point-robot-wind", [0.5, 2.0]) == at(SPARSE, [0.5, 2.0]) == [[0.5, 2]]
    assert at("cheetah-vel", [2.0]) == [[2]]
    run = ran(focal, tmp_path, f"--env {SPARSE} --data {files[SPARSE]} --steps 2 --eval-every 2")
    dataset, given = data.load(files[SPARSE]), []
    answer = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.7, 0.8
    monkeypatch.setattr(decode, "errors", lambda *args: given.append(args) or answer)
    decode.main([str(run)])
    expected = "  training tasks 0.100 (noise 0.200, bias 0.300)  test tasks 0.400 (noise 0.500, bias 0.600)"
    assert f"{expected}  linear 0.700  guess 0.800  own " in capsys.readouterr().out
    ((train, again, test, tasks, test_tasks),) = given
    assert train.shape == again.shape == (4, 64, 5) and test.shape == (2, 64, 5) and not torch.equal(train, again)
    for found, chosen in ((tasks, dataset.train_tasks), (test_tasks, dataset.test_tasks)):
        np.testing.assert_allclose(found, dataset.tasks[chosen], rtol=1e-6)


def test_tasks_are_cut_out_of_a_dataset(tmp_path, files, capsys):
    single, out = script("single"), tmp_path / "two.npz"
    with np.load(files[WALKER]) as file:
        np.savez(tmp_path / "more.npz", note=np.array("mine"), **file)  # which data.py does not read
    single.main(f"--data {tmp_path / 'more.npz'} --tasks 4 2 --out {out}".split())  # whose --env is in the file
    assert "120 transitions of each task" in capsys.readouterr().out
    whole, mine = data.load(files[WALKER]), data.load(out, env=WALKER)
    for key in ("tasks", "observations", "actions", "rewards", "next_observations", "terminals", "returns"):
        np.testing.assert_array_equal(getattr(mine, key), getattr(whole, key)[[4, 2]])
    assert list(mine.train_tasks) == list(mine.test_tasks) == [0, 1]
    ran(focal, tmp_path, f"--env {WALKER} --data {out} --steps 1 --eval-episodes 1")
    arrays = dict(np.load(files[SPARSE]))
    del arrays["meta"]
    for quality, kept in (("relabelled", {"quality": "relabelled"}), ("mixed", {})):  # those contexts are sparse
        data.save(tmp_path / "x.npz", arrays, {"env": SPARSE, "quality": quality})
        single.main(f"--data {tmp_path / 'x.npz'} --tasks 1 --out {out}".split())
        meta = data.load(out).meta
        assert {key: meta[key] for key in ("env", "quality") if key in meta} == {"env": SPARSE} | kept
    argv = f"--env {WALKER} --data {files[WALKER]} --tasks 6 --out {out}".split()
    ended(capsys, single, argv, "--tasks: expected numbers from 0 to 5, found [6]")
    ended(capsys, single, f"--tasks 6 --out {out}".split(), "expected --env or --data")


def test_doing_nothing_returns_what_a_still_body_is_paid():
    still = script("datasets").still
    assert still("sawyer", 2) == -50 and 190 < still("ant-dir", 2) < 210  # -1 and about +1 a step
