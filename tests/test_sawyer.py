"""The Sawyer family: what a task is, the physics of its scene, the script and the data it collects."""

import dataclasses
import json
from itertools import product

import numpy as np
import pytest
import torch
from conftest import collect, ended

import data
import envs
import smac

ROW = envs.family("sawyer")
PARTS = ("top", "bottom", "button", "tray", "object")
SEEN = dict(zip(PARTS, ([5], [6], [7], [9], [10, 11, 12]), strict=True))  # where an observation shows a part
EVERYTHING = [1, 1, 1, 1, 1, 1, 0, 3]  # drawers right, button left, tray on the left, object on the right


def task(behaviour=0, target=(0, 0, 0), scene=EVERYTHING):
    return np.array([*scene, behaviour, *target], float)


def build(tasks, **kwargs):
    return envs.make("sawyer", np.atleast_2d(tasks), threads=1, **kwargs)


def scenes(n, seed=0):
    """n scenes with every behaviour that can be wanted in them, and the carrying: (m, P) tasks."""
    rng, rows = np.random.default_rng(seed), []
    for row in envs.sample_tasks("sawyer", n, seed):
        for behaviour in [0, *[1] * int(row[0]), *[2] * int(row[1] * row[2]), *[3] * int(row[4])]:
            target = envs.HAND_PLACES[rng.integers(4)] if behaviour == 0 else (0, 0, 0)
            rows.append([*row[:8], behaviour, *target])
    return np.array(rows)


def play(env, policy, steps):
    """Observations (steps + 1, B, 13), rewards (steps, B) and full states (steps + 1, B, n); nothing blows up."""
    seen, rewards, states = [env.reset()[0]], [], [env._full]
    for _ in range(steps):
        obs, reward, terminated, _, info = env.step(policy(seen[-1]))
        assert not terminated.any() and not info["blew_up"].any()
        seen.append(info.get("final_obs", obs)), rewards.append(reward), states.append(env._full)
    return np.stack(seen), np.stack(rewards), np.stack(states)


def at_random(env, seed=0):
    rng = np.random.default_rng(seed)
    return lambda obs: rng.uniform(-1, 1, (env.num_envs, 4))


# ------------------------------------------------------------------------------------------------------------- tasks
def test_what_a_task_is():
    tasks = envs.sample_tasks("sawyer", 400, 3)
    flags, side, places, behaviour, target = np.split(tasks, [5, 6, 8, 9], axis=1)
    assert set(np.unique(flags)) == {0, 1}
    np.testing.assert_allclose(flags.mean(0), 0.5, atol=0.12)  # tasks of bare scenes are few, and tasks do not repeat
    assert len(np.unique(tasks, axis=0)) == 400
    anything = flags[:, :3].any(1)
    assert set(side[anything, 0]) == {-1, 1} and not side[~anything].any()
    for flag, place in ((3, 0), (4, 1)):
        there = flags[:, flag] == 1
        assert set(places[there, place]) == {0, 1, 2, 3} and not places[~there, place].any()
    move, top, bottom = (behaviour[:, 0] == k for k in range(3))
    assert (move | top | bottom).all() and top.sum() > 50 and bottom.sum() > 20
    assert flags[top, 0].all() and flags[bottom, 1:3].all()
    assert not target[~move].any() and {tuple(x) for x in target[move]} == {tuple(x) for x in envs.HAND_PLACES}
    only = move[(flags[:, 0] == 0) & (flags[:, 1] * flags[:, 2] == 0)]
    assert only.all() and 0.5 < move.mean() < 0.8


NO_TASKS = [(envs.TOP, 0.5), (envs.BUTTON, -1), (envs.SIDE, 2), (envs.SIDE, -0.5), (envs.TRAY_PLACE, 4)]
NO_TASKS += [(envs.OBJECT_PLACE, -1), (envs.BEHAVIOUR, 7), (envs.BEHAVIOUR, -1), (9, np.nan)]


def test_what_is_no_task_is_refused(tmp_path):
    rows = scenes(20)
    assert envs.is_task("sawyer", rows).all()
    arrays = collect("sawyer", [0, 1], [2], 4, 75)
    for place, value in NO_TASKS:
        rows[3, place], before = value, rows[3, place]
        assert envs.is_task("sawyer", rows).tolist() == [i != 3 for i in range(len(rows))]
        with pytest.raises(ValueError, match="sawyer: task 3 has numbers that no task can have"):
            build(rows)
        changed = {**arrays, "tasks": arrays["tasks"].copy()}
        changed["tasks"][1, place] = value
        data.save(tmp_path / "own.npz", changed, {})
        with pytest.raises(data.DataError, match="not finite|task 1 is .* expected tasks of sawyer, each a scene"):
            data.load(tmp_path / "own.npz", "sawyer")
        rows[3, place] = before


def test_a_family_without_enough_tasks_says_so(monkeypatch):
    few = dataclasses.replace(ROW, sample=lambda rng, n: rng.integers(3, size=(n, 1)).astype(float))
    monkeypatch.setitem(envs.FAMILIES, "few", few)
    assert sorted(envs.sample_tasks("few", 3, 0)[:, 0]) == [0, 1, 2]
    with pytest.raises(ValueError, match="few: found 3 different tasks, asked for 4"):
        envs.sample_tasks("few", 4, 0)


def test_parts_stand_where_the_task_says():
    places = product((-1, 1), range(4), range(4))  # the side, the tray's, the object's
    rows = np.array([task(scene=[1, 1, 1, 1, 1, *place]) for place in places])
    env = build(rows)
    obs = env.reset()[0]
    np.testing.assert_array_equal(obs[:, 8], 0.2 * rows[:, 5])
    np.testing.assert_array_equal(obs[:, 9], envs.TRAY_PLACES[rows[:, 6].astype(int), 0])
    np.testing.assert_array_equal(obs[:, 10:13], envs.OBJECT_PLACES[rows[:, 7].astype(int)])
    assert not obs[:, 5:8].any() and np.abs(obs[:, :3] - envs.HOME).max() < 0.02
    np.testing.assert_array_equal(obs[:, 3:5], 0.026)
    for row, model in zip(rows, env.physics.models, strict=True):
        data = envs.mujoco.MjData(model)
        envs.mujoco.mj_forward(model, data)
        assert np.sign(data.body("drawers").xpos[0]) == row[5] == -np.sign(data.body("button").xpos[0])
        assert data.ncon == 4  # the object's corners on the table: nothing else touches anything
    first = {tuple(hand) for hand in obs[:, :3]}
    again = {tuple(hand) for hand in env.reset()[0][:, :3]}
    assert len(first | again) == 2 * len(rows)  # only the hand starts elsewhere in every episode


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_absent_stays_at_zero_whatever_happens(seed):
    rows = envs.sample_tasks("sawyer", 60, seed)
    for policy in (lambda env: at_random(env, seed), lambda env: data.Performer(ROW, rows, seed).act):
        env = build(rows, horizon=75)
        seen = play(env, policy(env), 75)[0]
        for flag, part in enumerate(PARTS):
            np.testing.assert_array_equal(seen[:, rows[:, flag] == 0][..., SEEN[part]], 0)
        np.testing.assert_array_equal(seen[..., 8], np.broadcast_to(0.2 * rows[:, 5], (76, 60)))


def test_a_button_without_its_drawer_can_be_pressed():
    env = build(task(2, scene=[1, 0, 1, 0, 0, 1, 0, 0]))
    seen, rewards, _ = play(env, lambda obs: ROW.script.act(env.tasks, obs), 50)
    assert seen[-1, 0, 7] > 0.015 and not seen[..., 6].any() and (rewards == -1).all()


def test_rewards_by_hand():
    state = np.zeros((6, 33))
    state[0, :3], state[1, :3] = (0.1, 0.2, 0.349), (0.1, 0.2, 0.351)
    state[2, 5], state[3, 5] = 0.081, 0.079
    state[4, 6], state[5, 6] = 0.081, 0.079
    rows = np.array([task(k, (0.1, 0.2, 0.3) if k == 0 else (0, 0, 0)) for k in (0, 0, 1, 1, 2, 2)])
    reward = ROW.reward(rows, np.zeros((6, 33)), np.ones((6, 4)), state, 0.04)
    assert reward.tolist() == [0, -1, 0, -1, 0, -1]
    np.testing.assert_array_equal(ROW.script.achieved(rows, ROW.observe(state)), reward == 0)
    assert not ROW.terminated(torch.zeros(3, 13)).any()


# ------------------------------------------------------------------------------------------------- physics of the scene
def test_the_script_does_every_behaviour_in_200_scenes():
    rows = scenes(200)
    env = build(rows, horizon=75)
    wanted = rows[:, 8] < 3
    seen, _, states = play(env, lambda obs: ROW.script.act(rows, obs), 75)
    done = np.stack([ROW.script.achieved(rows, obs) for obs in seen[1:]])
    assert done[:50, wanted].any(0).all()  # within the horizon of an evaluation
    assert done[-1, wanted].all()  # and it stays so
    assert done[:, ~wanted].any(0).mean() > 0.95 and (~wanted).sum() > 80  # carrying, which no task wants
    assert_sound(rows, states)


def assert_sound(rows, states):
    """Nothing is fast or far away, and the object is nowhere inside the table, the button's foot or the shell."""
    assert np.isfinite(states).all()
    assert np.abs(states[..., 1:14]).max() < 2.5 and np.abs(states[..., 18:]).max() < 60
    hand, thing = states[..., 1:4], states[..., 11:14]
    assert (hand[..., 2] > 0.01).all() and np.abs(hand[..., 0]).max() < 0.34
    assert (states[..., 6:8] > -0.01).all() and (states[..., 6:8] < 0.13).all()
    there = rows[:, 4] == 1
    assert thing[:, there, 2].min() > 0.012
    mirror = rows[:, 5]
    inside = (np.abs(thing - [[[0, 0.2, 0.03]]]) < [[[9, 0.05, 0.035]]]).all(-1)
    inside &= np.abs(thing[..., 0] + 0.2 * mirror) < 0.05
    assert not (inside & (there & (rows[:, 2] == 1))).any()


def test_random_actions_do_not_achieve_anything():
    rows = envs.sample_tasks("sawyer", 200, 5)
    env = build(rows)
    _, rewards, states = play(env, at_random(env), 49)
    assert set(np.unique(rewards)) <= {-1, 0} and (rewards == 0).any(0).mean() < 0.02
    assert_sound(rows, states)


@pytest.mark.parametrize("side", [-1, 1])
def test_the_button_opens_the_bottom_drawer_and_it_stays_open(side):
    env = build(task(2, scene=[1, 1, 1, 0, 0, side, 0, 0]), horizon=100)
    obs = play(env, lambda obs: ROW.script.act(env.tasks, obs), 45)[0][-1]
    assert obs[0, 6] > 0.08 and obs[0, 7] > 0.01
    opened = obs[0, 6]
    for _ in range(15):
        obs = env.step(np.array([[0, 0, 1, 0]]))[0]
    assert obs[0, 7] < 0.002 and obs[0, 6] == pytest.approx(opened, abs=0.02) and abs(obs[0, 5]) < 1e-3


def placed(thing, hand, top=0.0, steps=0, action=(0, 0, 0, 0), scene=(1, 1, 1, 0, 1, 1, 0, 0)):
    """Where the object is, (steps, 3), from a state with the object, the hand and the top drawer at these places."""
    env = build(task(0, scene=scene), horizon=200)
    env.reset()
    env._full[0, 1:4], env._full[0, 6], env._full[0, 11:14] = hand, top, thing
    found = []
    for _ in range(steps):
        obs, *_, info = env.step(np.array([action]))
        assert not info["blew_up"].any()
        found.append(obs[0])
    return np.stack(found)


BOTTOM_ONLY = (0, 1, 1, 0, 1, 1, 0, 0)  # the handle of the top drawer stops the hand before


def test_the_hand_cannot_push_the_object_through_a_drawer():
    front = envs.DRAWERS[1] - 0.086
    seen = placed((0.2, 0.15, 0.018), (0.2, 0.1, 0.025), steps=40, action=(0, 1, 0, 1), scene=BOTTOM_ONLY)
    assert seen[:, 11].max() > front - 0.025 and seen[:, 11].max() < front - 0.012  # its half width is 0.018
    assert np.abs(seen[:, 6]).max() < 0.01


def test_an_object_dropped_into_an_open_drawer_stays_in_it():
    """Nor does it fall through when the drawer is pushed shut and pulled open."""
    x, y = 0.2, envs.DRAWERS[1] - 0.1 - 0.02
    seen = placed((x, y, 0.25), (-0.2, 0, 0.3), top=0.1, steps=30)
    floor = envs.TOP_HEIGHT - 0.026 + 0.018
    assert seen[-1, 12] == pytest.approx(floor, abs=0.003) and seen[:, 12].min() > floor - 0.01
    assert abs(seen[-1, 10] - x) < 0.02 and abs(seen[-1, 11] - y) < 0.03
    shut = placed((x, y, floor), (0.2, 0.03, 0.13), top=0.1, steps=25, action=(0, 1, 0, 1))
    assert shut[-1, 5] < 0.02 and shut[-1, 11] > y + 0.04 and shut[:, 12].min() > floor - 0.01


def test_an_object_dropped_on_the_shell_stays_on_top():
    seen = placed((0.2, 0.3, 0.3), (-0.2, 0, 0.3), steps=30)
    assert seen[-1, 12] == pytest.approx(0.18 + 0.018, abs=0.003) and seen[:, 12].min() > 0.185


def test_full_speed_into_everything_does_no_harm():
    rows = envs.sample_tasks("sawyer", 60, 2)
    env = build(rows, horizon=80)
    rng = np.random.default_rng(0)
    held = np.sign(rng.uniform(-1, 1, (10, 60, 4)))
    held[..., 2] = -1  # into the table and what stands on it
    actions = iter(held.repeat(8, axis=0))
    states = play(env, lambda obs: next(actions), 79)[2]
    assert_sound(rows, states)


# -------------------------------------------------------------------------------------------------- the script's data
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sawyer")
    data.main(f"--env sawyer --train 24 --test 6 --trajectories 4 --data-dir {folder}".split())
    return folder


def test_what_is_collected(folder, picture, capsys):
    path = folder / "sawyer" / "24+6-seed0" / "mixed.npz"
    dataset = data.load(path, "sawyer")
    assert dataset.observations.shape == (30, 300, 13) and dataset.actions.shape == (30, 300, 4)
    assert dataset.meta["behaviour"] == "scripted" and not dataset.terminals.any()
    np.testing.assert_array_equal(np.bincount(dataset.episodes[3]), 75)
    np.testing.assert_array_equal(dataset.tasks, envs.sample_tasks("sawyer", 30, 0))
    for i in range(30):
        rows = np.broadcast_to(dataset.tasks[i], (300, 12))
        achieved = ROW.script.achieved(rows, dataset.next_observations[i].numpy().astype(float))
        assert (achieved == (dataset.rewards[i].numpy() == 0)).mean() > 0.99  # float32 at a rim
    _, found = picture.successes(dataset)
    expected = (dataset.rewards.view(30, 4, 75) == 0).any(2).numpy()
    np.testing.assert_array_equal(found, expected)
    other = dataclasses.replace(dataset, episodes=dataset.episodes * 7 + 3)  # numbered in another way
    np.testing.assert_array_equal(picture.successes(other)[1], expected)
    assert 0.3 < found.mean() < 0.62  # the paper: 46%
    first = dataset.rewards.view(30, 4, 75)[..., :50].sum(-1).mean(-1)
    np.testing.assert_allclose(dataset.returns, first, rtol=1e-6)
    assert picture.plot(path).stat().st_size > 10_000
    data.main(f"--env sawyer --train 24 --test 6 --data-dir {folder}".split())
    assert "building" not in capsys.readouterr().out


def test_the_script_does_not_know_what_is_wanted():
    two = data.Settings(trajectories=2)
    rows = scenes(8, seed=4)
    same = {}
    for row in rows[rows[:, 8] < 3]:
        same.setdefault(tuple(row[:8]), []).append(row)
    pairs = [wanted[:2] for wanted in same.values() if len(wanted) > 1]
    a, b = (data.roll_out("sawyer", np.array(tasks), "mixed", {}, two, 1) for tasks in zip(*pairs, strict=True))
    for key in ("observations", "actions", "next_observations"):
        np.testing.assert_array_equal(a[key], b[key])
    assert len(pairs) > 2 and (a["rewards"] != b["rewards"]).any()


def test_a_performer_tries_everything_that_can_be_done():
    rows = np.repeat(task()[None], 60, axis=0)
    performer, seen = data.Performer(ROW, rows, 0), []
    env = build(rows, horizon=200)
    obs = env.reset()[0]
    for _ in range(150):
        obs = env.step(performer.act(obs))[0]
        seen.append(performer.doing.copy())
    kinds = np.stack(seen)[..., 8]
    assert set(np.unique(kinds)) == {0, 1, 2, 3}
    assert 3 < (np.diff(kinds, axis=0) != 0).sum(0).mean() < 8  # one after the other
    assert {tuple(x) for x in np.stack(seen)[kinds == 0][:, 9:]} == {tuple(x) for x in envs.HAND_PLACES}


@pytest.mark.parametrize("words", ["--quality random", "--quality replay", "--quality relabelled", "--sac-hidden 32"])
def test_what_the_script_does_not_have_is_refused_in_one_line(words, tmp_path, capsys):
    argv = ["--env", "sawyer", *words.split(), "--data-dir", str(tmp_path)]
    ended(capsys, data, argv, "sawyer", "relabelled" if "relabelled" in words else "mixed data of a script, no SAC")
    assert list(tmp_path.iterdir()) == []


def test_pictures_show_what_is_there_and_films_the_script(has_gl, picture, tmp_path, folder):
    from PIL import Image

    if not has_gl:
        pytest.skip("no GL context")
    rows = np.array([task(1, scene=[k == i for k in range(5)] + [k < 3 for k in [i]] + [0, 0]) for i in range(5)])
    rows = np.concatenate([rows, task(1, scene=[0] * 8)[None]])
    env = build(rows, render_mode="rgb_array", render_size=96)
    env._seed[:] = 0  # all begin alike
    env.reset()
    pictures = [picture.astype(int) for picture in env.render()]
    for a, b in product(range(6), range(6)):
        if a < b:
            assert 10 < (np.abs(pictures[a] - pictures[b]).max(-1) > 40).sum() < 96 * 96 / 4
    env.close()
    envs.main(["--env", "sawyer", "--render", str(tmp_path / "a.gif"), "--tasks", "1"])
    picture.film(folder / "sawyer" / "24+6-seed0" / "mixed.npz", tmp_path / "b.gif", count=1)
    for name in "ab":
        with Image.open(tmp_path / f"{name}.gif") as film:
            assert film.size == (240, 240) and film.n_frames > 20  # like frames become one


# ---------------------------------------------------------------------------------------------------------------- SMAC
def test_smac_runs_on_sawyer_with_the_papers_settings(tmp_path):
    args = vars(smac.parse_args(["--env", "sawyer", "--no-small"]))
    table_2 = {"data_size": 3750, "context_data": 3750, "awac_lambda": 0.3, "reward_scale": 1, "pearl_weight": 0}
    assert {key: args[key] for key in table_2} == table_2 and args["quality"] == "mixed"
    assert (args["train_tasks"] or ROW.train, args["test_tasks"] or ROW.test) == (50, 10)
    assert args["discount"] == 0.99 and ROW.horizon == 50 and args["hidden"] == 300
    data.save(tmp_path / "d.npz", collect("sawyer", [0, 1, 3, 4], [2, 5], 150, 75), {"env": "sawyer"})
    sizes = "--steps 4 --online-steps 200 --online-envs 4 --updates 0.02 --eval-every 4 --data-size 150 --hidden 8"
    sizes += " --context-data 150 --context-size 16 --batch-size 8 --eval-episodes 1 --threads 1"
    smac.main(f"--env sawyer --small {sizes} --data {tmp_path / 'd.npz'} --run-dir {tmp_path}".split())
    (final,) = (json.loads(path.read_text()) for path in tmp_path.glob("smac/sawyer/*/seed0/final.json"))
    assert final["online_steps"] == 200 and -50 <= final["return_mean"] <= 0
