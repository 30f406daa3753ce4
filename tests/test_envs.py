"""The task families against gymnasium's own environments, numbers worked out by hand, and themselves."""

import os
import subprocess
import sys
from itertools import product

import gymnasium
import numpy as np
import pytest
import torch
from conftest import ended
from gymnasium.utils.env_checker import check_env

import envs

mujoco = envs.mujoco  # envs chooses the GL back end before it imports mujoco
NAMES = list(envs.FAMILIES)
POINTS = ["sparse-point-robot", "point-robot-wind"]
BODIES = [name for name in NAMES if name not in POINTS]
MULTIPLIED = ["walker-params", "hopper-params"]
DRAWN = ["cheetah-vel", "ant-dir", "walker-params", "hopper", "humanoid-dir", "sawyer"]  # one family for each body
FIXED = {"cheetah-fwd-back": [[-1], [1]], "ant-fwd-back": [[0], [np.pi]]}  # families with a fixed list of tasks
FIXED |= dict.fromkeys(("halfcheetah", "hopper", "walker2d"), [[0]])
GYMNASIUM = {
    **dict.fromkeys(["cheetah-vel", "cheetah-fwd-back", "halfcheetah"], "HalfCheetah-v4"),
    **dict.fromkeys(["ant-fwd-back", "ant-dir"], "Ant-v4"),  # v5 with contact forces off, but 1 at a fall too
    **dict.fromkeys(["walker-params", "walker2d"], "Walker2d-v4"),
    **dict.fromkeys(["hopper-params", "hopper"], "Hopper-v4"),
    "humanoid-dir": "Humanoid-v4",
}
SCALE = {"humanoid-dir": 0.4, "sawyer": [0.5, 0.5, 0.5, 1]}  # of actions
SUBSTEPS = {"walker-params": 4, "hopper-params": 4, "hopper": 4, "walker2d": 4, "sawyer": 10}  # others: 5
NOISE = {"HalfCheetah-v4": 0.1, "Ant-v4": 0.1, "Walker2d-v4": 0.005, "Hopper-v4": 0.005, "Humanoid-v4": 0.01}
FAMILY_TABLE = {  # observation, action, horizon, data horizon, training tasks, test tasks, parameters, what differs
    "sparse-point-robot": (2, 2, 20, 200, 80, 20, 2, "reward"),
    "point-robot-wind": (2, 2, 20, 200, 40, 10, 2, "dynamics"),
    "cheetah-vel": (20, 6, 200, 200, 80, 20, 1, "reward"),
    "cheetah-fwd-back": (20, 6, 200, 200, 2, 2, 1, "reward"),
    "ant-fwd-back": (27, 8, 200, 200, 2, 2, 1, "reward"),
    "ant-dir": (27, 8, 200, 200, 20, 5, 1, "reward"),
    "walker-params": (17, 6, 200, 200, 20, 5, 65, "dynamics"),
    "hopper-params": (11, 3, 200, 200, 50, 5, 41, "dynamics"),
    "humanoid-dir": (376, 17, 200, 200, 50, 5, 1, "reward"),
    "sawyer": (13, 4, 50, 75, 50, 10, 12, "layout and reward"),
    "halfcheetah": (17, 6, 1000, 1000, 1, 1, 1, "nothing"),
    "hopper": (11, 3, 1000, 1000, 1, 1, 1, "nothing"),
    "walker2d": (17, 6, 1000, 1000, 1, 1, 1, "nothing"),
}
DAMPING = {"walker-params": slice(32, 41), "hopper-params": slice(20, 26)}  # among the multipliers
TILT = 3  # place in a body's full state: the pitch of a torso, or the height of the ant's or humanoid's; 2.5 is a fall

old_version = pytest.mark.filterwarnings("ignore:.*is out of date")


def available(name, n):
    return min(n, len(FIXED.get(name, range(n))))


def tasks_of(name, n=3, seed=1):
    """n tasks; those of a short list over again."""
    return np.resize(envs.sample_tasks(name, available(name, n), seed), (n, FAMILY_TABLE[name][6]))


def build(name, n=3, seed=0, threads=1, **kwargs):
    return envs.make(name, tasks_of(name, n), seed, threads=threads, **kwargs)


def random_actions(env, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, env.num_envs, env.family.act_dim))


def play(env, actions):
    """The step results in order, each stacked over time; the infos as a list."""
    *arrays, infos = zip(*(env.step(action) for action in actions), strict=True)
    return [np.stack(array) for array in arrays] + [list(infos)]


def assert_same(a, b, rows=slice(None)):
    """Bit-equal observations, rewards, terminated and truncated in these rows."""
    for x, y in zip(a[:4], b[:4], strict=True):
        np.testing.assert_array_equal(x[:, rows], y[:, rows])


# ------------------------------------------------------------------------------------------- gymnasium's own bodies
def gymnasium_body(name):
    body = gymnasium.make(GYMNASIUM[name]).unwrapped
    if name in MULTIPLIED:
        body.model.opt.timestep = 0.004
    return body


def forward(model, state):
    """MuJoCo's data at one row of `state`; `xpos` and the like are a sub-step old after a step."""
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = state[: model.nq], state[model.nq : model.nq + model.nv]
    mujoco.mj_forward(model, data)
    return data


def side_by_side(env, bodies, steps):
    """Steps env and, each time from the same states with the same actions, one gymnasium environment per row."""
    env.reset()
    for action in random_actions(env, steps):
        before = env.state_dict()["_full"]
        obs, reward, terminated, truncated, info = env.step(action)
        after, obs = env.state_dict()["_full"], info.get("final_obs", obs)
        assert not info["blew_up"].any() and not truncated.any()
        for i, body in enumerate(bodies):
            nq, nv = body.model.nq, body.model.nv
            body.set_state(before[i, 1 : 1 + nq], before[i, 1 + nq : 1 + nq + nv])
            body.data.time = before[i, 0]
            body.data.qacc_warmstart[:] = 0
            theirs = body.step(action[i] * (0.4 if env.name == "humanoid-dir" else 1))
            assert terminated[i] == theirs[2]
            if not terminated[i]:
                full = np.concatenate([[body.data.time], body.data.qpos, body.data.qvel])
                np.testing.assert_allclose(after[i, : 1 + nq + nv], full, rtol=1e-9, atol=1e-9)
            yield i, before[i, 1:], action[i], (obs[i], reward[i], terminated[i]), theirs


def assert_steps_equal(env, bodies, steps):
    """Observations and rewards too. Returns how often a body fell and how often a velocity was clipped."""
    falls = clipped = 0
    for _, _, _, ours, (obs, reward, terminated, _, _) in side_by_side(env, bodies, steps):
        np.testing.assert_allclose(ours[0], obs, rtol=1e-9, atol=1e-9)
        assert ours[1] == pytest.approx(reward, abs=1e-9)
        falls, clipped = falls + terminated, clipped + (np.abs(obs) == 10).any()
    return falls, clipped


@old_version
@pytest.mark.parametrize("name", [*MULTIPLIED, "walker2d", "hopper", "halfcheetah"])
def test_bodies_with_parameters_one_are_gymnasiums(name):
    env = envs.make(name, np.ones((1, FAMILY_TABLE[name][6])), threads=1)
    falls, clipped = assert_steps_equal(env, [gymnasium_body(name)], 150)
    assert falls == clipped == 0 if name == "halfcheetah" else 3 < falls < 75 and (clipped > 3 or "hopper" in name)


@old_version
@pytest.mark.parametrize("name", MULTIPLIED)
def test_parameters_multiply_gymnasiums_model_in_order(name):
    tasks = envs.sample_tasks(name, 3, seed=4)[[0, 1, 0, 2, 2]]
    tasks[4, -1] *= 2
    bodies = [gymnasium_body(name) for _ in tasks]
    nbody = bodies[0].model.nbody
    for body, task in zip(bodies, tasks, strict=True):
        body.model.body_mass[:] *= task[:nbody]
        body.model.body_inertia[:] *= task[nbody : 4 * nbody].reshape(nbody, 3)
        body.model.dof_damping[:] *= task[DAMPING[name]]
        body.model.geom_friction[:] *= task[DAMPING[name].stop :].reshape(-1, 3)
    env = envs.make(name, tasks, threads=1)
    assert_steps_equal(env, bodies, 50)
    assert env.physics.models[0] is env.physics.models[2]  # equal tasks share a model
    for model, body in zip(env.physics.models, bodies, strict=True):
        for field in ("body_mass", "body_inertia", "dof_damping", "geom_friction", "body_invweight0", "dof_invweight0"):
            np.testing.assert_array_equal(getattr(model, field), getattr(body.model, field))


@old_version
@pytest.mark.parametrize(
    "name, edges",  # values of entries of qpos and qvel
    [
        ("walker2d", {1: [0.5, 0.8, 0.8001, 1.9999, 2, 2.5], 2: [-1.5, -1, -0.9999, 0, 0.9999, 1], 10: [0, 150]}),
        ("hopper", {1: [0.5, 0.7, 0.7001, 9, np.inf], 2: [-0.3, -0.2, -0.1999, 0, 0.1999, 0.2]}),
        ("hopper", {1: [1.25, 150], 0: [0, 150], **{i: [-100, -99.999, 99.999, 100, np.nan] for i in (3, 6, 11)}}),
        ("ant-dir", {2: [0, 0.1999, 0.2, 1, 1.0001], 0: [-9, 9], 6: [0, np.inf, np.nan], 28: [0, 200, np.inf]}),
        ("humanoid-dir", {2: [0.5, 1, 1.0001, 1.9999, 2, 2.5, np.nan], 0: [-9, 9], 46: [0, 200]}),
    ],
)
def test_bodies_fall_where_gymnasiums_do(name, edges):
    body, row = gymnasium_body(name), envs.family(name)
    fallen = []
    for values in product(*edges.values()):
        state = np.zeros(body.model.nq + body.model.nv)
        state[list(edges)] = values
        body.data.qpos[:], body.data.qvel[:] = np.split(state, [body.model.nq])
        wide = np.pad(state, (0, 249 * (name == "humanoid-dir")))[None]
        fallen.append(bool(row.terminated(row.observe(wide))[0] | row.out_of_range(wide)[0]))
        assert fallen[-1] == body.terminated, values
    assert 0 < sum(fallen) < len(fallen)
    assert row.terminated(np.full((1, row.obs_dim), np.nan)).all()


def test_a_hopper_faster_than_its_observations_show_terminates():
    env = build("hopper", 4)
    env.reset()
    env._full[:, 1:] = 0
    env._full[:, 2] = 5  # in the air: gravity alone changes the vertical speed, by -0.08
    env._full[:, 8] = -99.95, -99.9, 100.05, 100.1
    _, _, terminated, _, info = env.step(np.zeros((4, 3)))
    assert terminated.tolist() == info["_final_obs"].tolist() == [True, False, False, True]
    assert info["final_obs"][:, 6].tolist() == [-10, -10, 10, 10] and not info["blew_up"].any()
    angles = np.array([[1.25, 0, 0, angle, *[0] * 7] for angle in (-100, -99.99, 99.99, 100)])
    assert env.family.terminated(angles).tolist() == [True, False, False, True]  # seen without the state


@old_version
@pytest.mark.parametrize("name", ["cheetah-vel", "cheetah-fwd-back"])
def test_cheetah_is_gymnasiums_cheetah(name):
    env, body = build(name, 2), gymnasium_body(name)
    for i, _, action, (obs, reward, terminated), theirs in side_by_side(env, [body, body], 100):
        np.testing.assert_allclose(obs[:17], theirs[0], rtol=1e-9, atol=1e-9)
        after = forward(body.model, np.concatenate([body.data.qpos, body.data.qvel]))
        np.testing.assert_allclose(obs[17:], after.body("torso").xpos, rtol=1e-9, atol=1e-9)
        v = theirs[4]["x_velocity"]
        gained = -abs(v - env.tasks[i, 0]) if name == "cheetah-vel" else (-v, v)[i]
        assert reward == pytest.approx(gained - 0.05 * sum(a * a for a in action), abs=1e-9)
        assert not terminated


@old_version
@pytest.mark.parametrize("name", ["ant-fwd-back", "ant-dir"])
def test_ant_is_gymnasiums_ant(name):
    env, body, falls = build(name, 2), gymnasium_body(name), 0
    for i, before, _, (obs, reward, terminated), theirs in side_by_side(env, [body, body], 60):
        np.testing.assert_allclose(obs, theirs[0], rtol=1e-9, atol=1e-9)
        (vx, vy), angle = (body.data.qpos[:2] - before[:2]) / 0.05, env.tasks[i, 0]
        along = vx * np.cos(angle) + vy * np.sin(angle) if name == "ant-dir" else (vx, -vx)[i]
        assert reward == pytest.approx(theirs[1] - theirs[4]["reward_forward"] + along, abs=1e-9)
        falls += terminated
    assert falls


def test_direction_rewards_by_hand():
    angles = np.array([0, 0.5, 1, 1.5, 2]) * np.pi
    angles[4] = np.arctan2(-0.8, 0.6)
    along = np.array([0.6, -0.8, -0.6, 0.8, 1])
    before, after = np.full((5, 29), 7.0), np.full((5, 29), 8.0)
    after[:, :2] = 7.03, 6.96
    reward = envs.family("ant-dir").reward(angles[:, None], before, np.full((5, 8), 0.25), after, 0.05)
    np.testing.assert_allclose(reward, along - 0.25 + 1, atol=1e-12)
    for name in ("ant-fwd-back", "ant-dir", "humanoid-dir"):  # what pictures show as wanted
        np.testing.assert_allclose(envs.family(name).goal(angles[:, None]) @ [0.6, -0.8], along, atol=1e-12)
    before, after = np.full((5, 296), 7.0), np.full((5, 296), 8.0)
    after[:, -2:] = 7.03, 6.96
    reward = envs.family("humanoid-dir").reward(angles[:, None], before, np.full((5, 17), 0.5), after, 0.015)
    np.testing.assert_allclose(reward, 0.25 * along * 0.05 / 0.003 - 0.1 * 17 * 0.04 + 5, atol=1e-12)


@old_version
def test_humanoid_is_gymnasiums_humanoid():
    env, body, falls = build("humanoid-dir", 2), gymnasium_body("humanoid-dir"), 0
    model, mass = body.model, body.model.body_mass / body.model.body_mass.sum()
    for i, before, _, (obs, reward, terminated), theirs in side_by_side(env, [body, body], 60):
        mujoco.mj_forward(model, body.data)
        body.data.cfrc_ext[:] = 0
        np.testing.assert_allclose(obs, body._get_obs(), rtol=1e-9, atol=1e-9)
        assert (obs[292:] == 0).all() and np.abs(obs[269:292]).max() > 1
        moved = mass @ (body.data.xipos - forward(model, before).xipos)
        along = moved[0] * np.cos(env.tasks[i, 0]) + moved[1] * np.sin(env.tasks[i, 0])
        expected = 0.25 * along / model.opt.timestep + theirs[4]["reward_quadctrl"] + theirs[4]["reward_alive"]
        assert reward == pytest.approx(expected, abs=1e-8)
        falls += terminated
    assert falls > 1


@old_version
def test_a_humanoids_first_observation_is_that_of_its_state():
    env, body = build("humanoid-dir", horizon=2), gymnasium_body("humanoid-dir")

    def check(obs):
        for i in range(3):
            mujoco.mj_resetData(body.model, body.data)
            body.set_state(env._full[i, 1:25], env._full[i, 25:48])
            np.testing.assert_allclose(obs[i], body._get_obs(), rtol=1e-12, atol=1e-12)

    check(env.reset()[0])
    check(play(env, random_actions(env, 2))[0][1])  # the next episode's, not with the actuators' last forces
    env.step(np.ones((3, 17)))
    check(env.reset(seed=4)[0])


@pytest.mark.parametrize("name", DRAWN)
def test_a_step_is_a_loop_of_mj_steps_from_a_cold_start(name):
    env = build(name)
    env.reset()
    datas = [mujoco.MjData(model) for model in env.physics.models]
    for action in random_actions(env, 60):
        before = env.state_dict()["_full"]
        ended = np.logical_or(*env.step(action)[2:4])
        for i, (model, data) in enumerate(zip(env.physics.models, datas, strict=True)):
            size = 1 + model.nq + model.nv
            mujoco.mj_setState(model, data, before[i, :size], mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
            data.qacc_warmstart[:], data.ctrl[:] = 0, action[i] * SCALE.get(name, 1)
            for _ in range(SUBSTEPS.get(name, 5)):
                mujoco.mj_step(model, data)
            if not ended[i]:
                np.testing.assert_array_equal(env._full[i, :size], np.concatenate([[data.time], data.qpos, data.qvel]))


@pytest.mark.parametrize("name", [name for name in DRAWN if name in GYMNASIUM])
def test_initial_states_of_bodies(name):
    env = envs.make(name, np.repeat(envs.sample_tasks(name, 1, 0), 500, axis=0), threads=1)
    env.reset()
    nq, nv, noise = env.physics.base.nq, env.physics.base.nv, NOISE[GYMNASIUM[name]]
    state = env._full[:, 1 : 1 + nq + nv] - np.concatenate([env.physics.base.qpos0, np.zeros(nv)])
    position, velocity = state[:, :nq] / noise, state[:, nq:] / noise
    assert (env._full[:, 0] == 0).all()
    for part in [position] if noise == 0.1 else [position, velocity]:
        assert np.abs(part).max() <= 1 and (part.min(0) < -0.95).all() and (part.max(0) > 0.95).all()
        np.testing.assert_allclose(part.mean(0), 0, atol=0.12)
    if noise == 0.1:
        np.testing.assert_allclose(velocity.std(0), 1, atol=0.15)
        assert 2.5 < np.abs(velocity).max() < 6
    assert np.abs(np.corrcoef(state.T) - np.eye(nq + nv)).max() < 0.25


# ---------------------------------------------------------------------------------------------------- tasks and rows
@pytest.mark.parametrize("name", NAMES)
def test_family_rows(name):
    row, env = envs.family(name), build(name)
    size = envs.sample_tasks(name, 1, 0).shape[1]
    numbers = (row.obs_dim, row.act_dim, row.horizon, row.data_horizon, row.train, row.test, size, row.differs)
    assert numbers == FAMILY_TABLE[name]
    assert row.discount == (0.9 if name in POINTS else 0.99)
    assert row.sparse_threshold == (-0.2 if name == "sparse-point-robot" else None)
    obs, info = env.reset()
    result = env.step(np.zeros((3, row.act_dim)))
    np.testing.assert_array_equal(env.observe(), result[0])
    if name in GYMNASIUM:
        first, flat = 1 + env.physics.base.nq, 2 if GYMNASIUM[name] in ("Ant-v4", "Humanoid-v4") else 1
        np.testing.assert_array_equal(result[0][:, row.velocity], env._full[:, first : first + flat])
    for array in (obs, result[0]):
        assert array.shape == (3, row.obs_dim) and array.dtype == np.float64
    assert [(x.shape, x.dtype) for x in result[1:4]] == [((3,), np.float64), ((3,), bool), ((3,), bool)]
    assert info == {} and set(result[4]) == {"blew_up"} | ({"sparse_reward"} if name == "sparse-point-robot" else set())
    assert env.observation_space.contains(result[0]) and env.horizon == row.horizon
    assert env.single_action_space == gymnasium.spaces.Box(-1, 1, (row.act_dim,), np.float32)
    assert env.action_space.shape == (3, row.act_dim)
    assert env.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.SAME_STEP


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FIXED])
def test_tasks_come_from_the_seed_alone(name):
    tasks = envs.sample_tasks(name, 7, 5)
    assert tasks.shape == (7, FAMILY_TABLE[name][6]) and tasks.dtype == np.float64
    np.testing.assert_array_equal(tasks, envs.sample_tasks(name, 7, 5))
    np.testing.assert_array_equal(tasks[:3], envs.sample_tasks(name, 3, 5))
    assert envs.sample_tasks(name, 0, 5).shape == (0, tasks.shape[1])
    several = np.concatenate([envs.sample_tasks(name, 20, seed) for seed in range(5)])
    assert len(np.unique(several, axis=0)) == 100 or name == "sawyer"  # a finite number, different in one list only


@pytest.mark.parametrize("name, tasks", FIXED.items())
def test_fixed_lists_of_tasks(name, tasks):
    assert envs.sample_tasks(name, len(tasks), 0).dtype == np.float64
    for seed, n in product([0, 5], range(len(tasks) + 1)):
        np.testing.assert_array_equal(envs.sample_tasks(name, n, seed), np.reshape(tasks[:n], (n, 1)))
    for call in (lambda n: envs.sample_tasks(name, n, 0), lambda n: gymnasium.make(f"{name}-v0", task=n - 1)):
        with pytest.raises(ValueError, match=f"{name} has {len(tasks)} tasks, asked for {len(tasks) + 1}"):
            call(len(tasks) + 1)


def test_ranges_of_tasks():
    goals = envs.sample_tasks("sparse-point-robot", 300, 0)
    np.testing.assert_allclose(np.linalg.norm(goals, axis=1), 1)
    angles = np.arctan2(goals[:, 1], goals[:, 0])
    assert 0 <= angles.min() < 0.1 and np.pi - 0.1 < angles.max() <= np.pi and abs(angles.mean() - np.pi / 2) < 0.2
    winds = envs.sample_tasks("point-robot-wind", 300, 0)
    assert np.abs(winds).max() <= 0.05
    assert (winds.min(0) < -0.047).all() and (winds.max(0) > 0.047).all() and abs(np.corrcoef(winds.T)[0, 1]) < 0.2
    speeds = envs.sample_tasks("cheetah-vel", 300, 0)
    assert 0 <= speeds.min() < 0.05 and 2.95 < speeds.max() <= 3 and abs(speeds.mean() - 1.5) < 0.2
    for name in ("ant-dir", "humanoid-dir"):
        angles = envs.sample_tasks(name, 300, 0) / np.pi
        assert 0 <= angles.min() < 0.05 and 1.95 < angles.max() <= 2 and abs(angles.mean() - 1) < 0.15


@pytest.mark.parametrize("name, damping", DAMPING.items())
def test_ranges_of_multipliers(name, damping):
    tasks = envs.sample_tasks(name, 300, 0)
    for part, base in [(slice(damping.start), 1.5), (damping, 1.3), (slice(damping.stop, None), 1.5)]:
        exponents = np.log(tasks[:, part]) / np.log(base)
        assert np.abs(exponents).max() <= 3 + 1e-12
        assert (exponents.min(0) < -2.8).all() and (exponents.max(0) > 2.8).all()
        np.testing.assert_allclose(np.abs(exponents).mean(0), 1.5, atol=0.25)
    assert np.abs(np.corrcoef(tasks.T) - np.eye(tasks.shape[1])).max() < 0.3


def test_unknown_names_and_bad_arguments():
    for call in (lambda: envs.sample_tasks("cheetah", 3, 0), lambda: envs.make("cheetah", np.ones((1, 1)))):
        with pytest.raises(ValueError) as error:
            call()
        assert all(name in str(error.value) for name in [*NAMES, "'cheetah'"])
    for tasks in (np.ones((2, 3)), np.ones(2), np.ones((1, 2, 2))):
        with pytest.raises(ValueError, match="point-robot-wind"):
            envs.make("point-robot-wind", tasks)
    with pytest.raises(ValueError, match="human"):
        build("point-robot-wind", render_mode="human")


# ------------------------------------------------------------------------------------------------------ point robots
def test_point_robot_by_hand():
    env = envs.make("sparse-point-robot", np.array([[0.0, 1.0], [1.0, 0.0]]))
    obs, _ = env.reset()
    np.testing.assert_array_equal(obs, np.zeros((2, 2)))
    obs, reward, _, _, info = env.step(np.array([[1.0, -0.5], [0.3, 0.4]]))
    np.testing.assert_allclose(obs, [[0.1, -0.05], [0.03, 0.04]], atol=1e-12)
    np.testing.assert_allclose(reward, [-((0.01 + 1.1025) ** 0.5), -((0.9409 + 0.0016) ** 0.5)], atol=1e-12)
    np.testing.assert_array_equal(info["sparse_reward"], [0, 0])
    obs, reward, _, _, _ = env.step(np.array([[-1.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose(obs, [[0, -0.05], [0.13, 0.14]], atol=1e-12)
    np.testing.assert_allclose(reward, [-1.05, -((0.7569 + 0.0196) ** 0.5)], atol=1e-12)


def test_sparse_reward_around_the_radius():
    distances = [0, 0.1, 0.2, np.nextafter(0.2, 1), 0.5]
    at = np.array([[0.0, d] for d in distances])
    sparse = envs.family("sparse-point-robot").sparse_reward(np.zeros((5, 2)), at, at, at, 1.0)
    np.testing.assert_allclose(sparse, [1, 0.9, 0.8, 0, 0], atol=1e-12)


def test_wind_drifts_every_move():
    env = envs.make("point-robot-wind", np.array([[0.03, -0.05], [0.0, 0.02]]))
    env.reset()
    obs, reward, _, _, info = env.step(np.array([[1.0, 0.5], [0.0, 0.0]]))
    np.testing.assert_allclose(obs, [[0.13, 0], [0, 0.02]], atol=1e-12)
    np.testing.assert_allclose(reward, [-0.87, -(1.0004**0.5)], atol=1e-12)
    obs, reward, _, _, _ = env.step(np.zeros((2, 2)))
    np.testing.assert_allclose(obs, [[0.16, -0.05], [0, 0.04]], atol=1e-12)
    np.testing.assert_allclose(reward, [-((0.84**2 + 0.0025) ** 0.5), -(1.0016**0.5)], atol=1e-12)
    assert "sparse_reward" not in info


@pytest.mark.parametrize("name, horizon", list(product(POINTS, [20, 9])))
def test_optimum_is_what_greedy_play_earns(name, horizon):
    tasks = envs.sample_tasks(name, 50, 3)
    goal, drift = (tasks, 0) if name == "sparse-point-robot" else (np.array([1.0, 0.0]), tasks)
    env = envs.make(name, tasks, horizon=horizon)
    position, returns = env.reset()[0], 0
    for _ in range(horizon):
        position, reward, _, truncated, info = env.step(np.clip((goal - position - drift) / 0.1, -1, 1))
        returns = returns + info.get("sparse_reward", reward)
    assert truncated.all()
    np.testing.assert_allclose(env.family.optimum(tasks, horizon), returns, atol=1e-9)


# ------------------------------------------------------------------------------------------- families of one's own
def own_point(**changes):
    """A point robot in space: goals on a sphere."""

    def sphere(rng, n):
        goals = rng.normal(size=(n, 3))
        return goals / np.linalg.norm(goals, axis=1, keepdims=True)

    row = {
        **envs.POINT, "papers": "none", "obs_dim": 3, "act_dim": 3, "train": 4, "test": 2, "differs": "reward",
        "sample": sphere, "reward": lambda task, state, action, after, dt: -np.linalg.norm(after - task, axis=1),
        "goal": lambda task: task,
    }  # fmt: skip
    return envs.Family(**row | changes)


def test_a_point_robot_in_space(monkeypatch):
    monkeypatch.setitem(envs.FAMILIES, "ball", own_point())
    tasks = envs.sample_tasks("ball", 5, 0)
    env = envs.make("ball", tasks, render_mode="rgb_array", render_size=64)
    obs, _ = env.reset()
    np.testing.assert_array_equal(obs, np.zeros((5, 3)))
    for k in range(1, 4):
        obs, reward, terminated, truncated, _ = env.step(tasks)
        np.testing.assert_allclose(obs, 0.1 * k * tasks, atol=1e-12)
        np.testing.assert_allclose(reward, 0.1 * k - 1, atol=1e-12)
    assert not terminated.any() and not truncated.any()
    assert [picture.shape for picture in env.render()] == [(64, 64, 3)] * 5
    returns = env.returns(lambda obs: np.clip(10 * (tasks - obs), -1, 1), seed=0)
    assert returns.shape == (5,) and (returns > env.returns(lambda obs: np.zeros((5, 3)), seed=0) + 10).all()
    single = envs.TaskEnv("ball", task=2)
    assert single.reset()[0].shape == (3,) and single.action_space.shape == (3,)
    assert "obs   3  act  3" in envs.describe("ball")


def test_a_drift_and_no_goal_in_space(monkeypatch):
    monkeypatch.setitem(envs.FAMILIES, "ball", own_point(goal=None, drift=lambda task: 0.02 * task))
    env = envs.make("ball", np.array([[1.0, 0, -1], [0, 2, 0]]), render_mode="rgb_array", render_size=32)
    env.reset()
    np.testing.assert_allclose(env.step(np.ones((2, 3)))[0], [[0.12, 0.1, 0.08], [0.1, 0.14, 0.1]], atol=1e-12)
    assert env.render()[0].std() > 0


SLIDER = """
<mujoco><option timestep="0.01"/>
  <worldbody><body><joint name="x" type="slide" axis="1 0 0"/><geom size="0.1" mass="1"/></body></worldbody>
  <actuator><motor joint="x" ctrlrange="{} 2"/></actuator>
</mujoco>"""


def slider(low, **changes):
    row = {
        **envs.EPISODE, "papers": "none", "obs_dim": 2, "act_dim": 1, "train": 3, "test": 1, "differs": "reward",
        "sample": lambda rng, n: rng.normal(size=(n, 1)), "observe": np.copy, "xml": SLIDER.format(low),
        "reward": lambda task, state, action, after, dt: -np.abs(after[:, 0] - task[:, 0]),
    }  # fmt: skip
    return envs.Family(**row | changes)


def test_a_body_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setitem(envs.FAMILIES, "slider", slider(-2))
    (tmp_path / "slider.xml").write_text(SLIDER.format(-2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(envs.FAMILIES, "file", slider(-2, xml="slider.xml"))
    for name in ("slider", "file"):
        env = envs.make(name, np.array([[0.0], [1.0]]), threads=1)
        assert not env.reset()[0].any()  # no noise of its own
        obs, reward, _, _, _ = env.step(np.array([[1.0], [-0.5]]))
        np.testing.assert_allclose(obs[:, 1], [0.02, -0.01], atol=1e-9)  # forces of 2 and -1 for 0.01 s on 1 kg
        np.testing.assert_allclose(reward, -np.abs(obs[:, 0] - [0, 1]), atol=1e-12)


@pytest.mark.parametrize(
    "row, message",
    [
        (slider(0), "1 actuators, each with a ctrlrange of -x to x"),
        (slider(-2, act_dim=2), "2 actuators"),
        (slider(-2, obs_dim=3), r"own: obs_dim is 3, but observe gives \(1, 2\)"),
        (own_point(obs_dim=2), r"own: obs_dim is 2, but observe gives \(1, 3\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(monkeypatch, row, message):
    monkeypatch.setitem(envs.FAMILIES, "own", row)
    with pytest.raises(ValueError, match=message):
        envs.make("own", envs.sample_tasks("own", 1, 0))


# --------------------------------------------------------------------------------------- episodes of the vector kind
@pytest.mark.parametrize("name", POINTS + DRAWN)
def test_horizon_truncates_and_starts_again(name):
    env, longer = build(name, horizon=3), build(name, horizon=30)
    start = longer.reset()[0]
    np.testing.assert_array_equal(env.reset()[0], start)
    actions = 0.1 * random_actions(env, 6)
    obs, _, terminated, truncated, infos = play(env, actions)
    np.testing.assert_array_equal(truncated, np.repeat([[0, 0, 1, 0, 0, 1]], 3, axis=0).T.astype(bool))
    assert not terminated.any()
    assert [("final_obs" in info, "_final_obs" in info) for info in infos] == [(t, t) for t in truncated[:, 0]]
    assert infos[2]["_final_obs"].all()
    expected = play(longer, actions[:3])[0]
    np.testing.assert_array_equal(infos[2]["final_obs"], expected[2])
    np.testing.assert_array_equal(obs[:2], expected[:2])
    np.testing.assert_array_equal(obs[2], longer.reset()[0])
    np.testing.assert_array_equal(obs[3:5], play(longer, actions[3:5])[0])
    if name in BODIES:
        assert not (obs[2] == start).all(1).any()


@pytest.mark.parametrize("name", ["point-robot-wind", "hopper-params"])
@pytest.mark.parametrize("seed", [None, 4])
def test_single_rows_are_reset_by_a_mask(name, seed):
    env, quiet = build(name, autoreset=False, horizon=9), build(name, autoreset=False, horizon=9)
    env.reset(), quiet.reset()
    actions = 0.3 * random_actions(env, 5)
    for action in actions[:2]:
        env.step(action), quiet.step(action)
    obs, _ = env.reset(seed=seed, options={"reset_mask": np.array([False, True, False])})
    first = build(name)
    np.testing.assert_array_equal(obs[1], [first.reset(seed=seed), first.reset(seed=seed)][seed is None][0][1])
    expected = quiet.observe()
    np.testing.assert_array_equal(obs[[0, 2]], expected[[0, 2]])
    assert_same(play(env, actions[2:]), play(quiet, actions[2:]), rows=[0, 2])


@pytest.mark.parametrize("autoreset", [True, False])
@pytest.mark.parametrize("name", ["sparse-point-robot", "point-robot-wind", "hopper-params"])
def test_returns_are_those_of_a_naive_loop(name, autoreset):
    env, loop = (build(name, horizon=40, autoreset=autoreset) for _ in range(2))
    assert env.metadata["autoreset_mode"].name == ("SAME_STEP" if autoreset else "DISABLED")
    weights = np.random.default_rng(0).normal(size=(env.family.obs_dim, env.family.act_dim))
    policy = lambda obs: np.sin(obs @ weights + 1)
    obs, _ = loop.reset(seed=3)
    sums, lengths = [0.0] * 3, [None] * 3
    for t in range(40):
        obs, reward, terminated, truncated, info = loop.step(policy(obs))
        for i in range(3):
            if lengths[i] is None:
                sums[i] += (info["sparse_reward"] if name == "sparse-point-robot" else reward)[i]
                lengths[i] = t + 1 if terminated[i] or truncated[i] else None
    env.reset(), env.step(np.ones((3, env.family.act_dim)))  # whatever went before does not matter
    for _ in range(2):
        returns = env.returns(policy, seed=3)
        assert returns.dtype == np.float64 and returns.tolist() == sums
    assert None not in lengths and (max(lengths) < 40 if name == "hopper-params" else min(lengths) == 40)


@pytest.mark.parametrize("name", [*MULTIPLIED, "ant-dir", "humanoid-dir"])
def test_a_fallen_body_terminates_and_resets_alone(name):
    env, quiet = build(name, horizon=4), build(name, horizon=4)
    env.reset(), quiet.reset()
    actions = 0.1 * random_actions(env, 7)
    calm = play(quiet, actions)
    first = env.step(actions[0])
    assert not first[2].any() and not first[3].any()
    env._full[1, TILT] = 2.5
    obs, _, terminated, truncated, info = env.step(actions[1])
    assert terminated.tolist() == info["_final_obs"].tolist() == [False, True, False]
    assert not truncated.any() and not info["blew_up"].any()
    assert info["final_obs"][1, int(name in MULTIPLIED)] > 2
    np.testing.assert_array_equal(info["final_obs"][[0, 2]], obs[[0, 2]])
    np.testing.assert_array_equal(obs[1], calm[0][3][1])  # the row's second initial state
    rest = play(env, actions[2:])
    assert_same(rest, [x[2:] for x in calm[:4]], rows=[0, 2])
    assert np.argwhere(rest[3].T).tolist() == [[0, 1], [1, 3], [2, 1]]  # the fallen row's new episode lasts four steps


def test_a_fall_at_the_horizon_is_terminated_not_truncated():
    env = build("walker-params", horizon=1)
    env.reset()
    env._full[1, TILT] = 2.5
    _, _, terminated, truncated, _ = env.step(np.zeros((3, 6)))
    assert terminated.tolist() == [False, True, False] and truncated.tolist() == [True, False, True]


@pytest.mark.parametrize("name", POINTS + DRAWN)
def test_a_row_does_not_depend_on_the_others(name):
    tasks, other = tasks_of(name, 3, 0), tasks_of(name, 3, 9)
    other[1] = tasks[1]
    a, b = (envs.make(name, t, seed=2, horizon=15, threads=1) for t in (tasks, other))
    a.reset(), b.reset()
    actions, changed = random_actions(a, 40), random_actions(a, 40, seed=1)
    changed[:, 1] = actions[:, 1]
    first, second = play(a, actions), play(b, changed)
    assert_same(first, second, rows=1)
    assert not np.array_equal(first[0][:, 0], second[0][:, 0])
    fewer = envs.make(name, tasks[:2], seed=2, horizon=15, threads=1)
    fewer.reset()
    assert_same([x[:, :2] for x in first[:4]], play(fewer, actions[:, :2]))


@pytest.mark.parametrize("name", DRAWN)
def test_initial_states_come_from_seed_row_and_episode(name):
    tasks = np.repeat(envs.sample_tasks(name, 1, 0), 3, axis=0)
    env, again = envs.make(name, tasks, seed=7, threads=1), envs.make(name, tasks, seed=0, threads=1)
    starts = [env.reset()[0], env.reset()[0], env.reset(seed=8)[0], env.reset(seed=7)[0], env.reset()[0]]
    np.testing.assert_array_equal(starts[3:], starts[:2])
    np.testing.assert_array_equal(again.reset(seed=7)[0], starts[0])
    assert len(np.unique(np.concatenate(starts[:3]), axis=0)) == 9
    env.step(np.ones((3, env.family.act_dim)))
    np.testing.assert_array_equal(env.reset(seed=7)[0], starts[0])


def test_initial_states_do_not_repeat_the_draws_of_tasks():
    """Else the first observation of an episode would tell the task."""
    tasks = envs.sample_tasks("cheetah-vel", 200, 0)
    env = envs.make("cheetah-vel", tasks, seed=0, threads=1)
    for _ in range(3):
        first = env.reset()[0]
        varying = first[:, first.std(0) > 0]
        assert varying.shape[1] == 19  # all but the torso's y
        assert np.abs(np.corrcoef(tasks.T, varying.T)[0, 1:]).max() < 0.3


@pytest.mark.parametrize("seed", [-1, 2**63, np.uint64(2**63), 1.0, "3", [1, 2, 3]])
def test_what_is_no_seed_is_refused(seed):
    """In one clear sentence; a reset has changed nothing."""
    env = build("cheetah-vel")
    env.reset()
    env.step(np.ones((3, 6)))
    before, make = env.state_dict(), lambda: envs.make("cheetah-vel", [[1.0]], seed)
    for call in (lambda: env.reset(seed=seed), make, lambda: envs.sample_tasks("cheetah-vel", 2, seed)):
        with pytest.raises(ValueError, match="seed must be a whole number from 0") as error:
            call()
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
    for key, value in env.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def test_numpys_whole_numbers_are_seeds():
    kind, env, other = np.uint64, build("cheetah-vel"), build("cheetah-vel")
    expected = env.reset(seed=7)[0]
    np.testing.assert_array_equal(other.reset(seed=kind(7))[0], expected)
    np.testing.assert_array_equal(other.reset()[0], env.reset()[0])
    np.testing.assert_array_equal(envs.sample_tasks("ant-dir", 3, kind(7)), envs.sample_tasks("ant-dir", 3, 7))
    single = gymnasium.make("cheetah-vel-v0", task=kind(2), seed=kind(1))
    np.testing.assert_array_equal(single.reset(seed=kind(7))[0], single.reset(seed=7)[0])


NOTHING = [({"tasks": [[1.0], [np.nan]]}, "task 1 has numbers that no task can have")]
NOTHING += [({"tasks": np.zeros((0, 1))}, "expected one or more of 1 parameters")]
NOTHING += [({"seed": None}, "seed must be a whole number from 0")]
NOTHING += [({"horizon": x}, "horizon must be a whole number from 1") for x in (0, 1.5)]


@pytest.mark.parametrize("changes, message", NOTHING)
def test_what_is_no_task_no_seed_no_horizon_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        envs.make("cheetah-vel", **{"tasks": np.ones((2, 1)), "threads": 1} | changes)


def test_fewer_than_no_tasks_are_refused():
    for name in ("cheetah-fwd-back", "cheetah-vel"):
        with pytest.raises(ValueError, match="the number of tasks must be a whole number from 0 .*, got -1"):
            envs.sample_tasks(name, -1, 0)
    for task in (-1, 1.5, None):
        with pytest.raises(ValueError, match=f"task, unless a row of parameters, must be a whole .*, got {task}"):
            envs.TaskEnv("cheetah-vel", task=task)


def test_without_opengl_a_picture_ends_in_one_line(monkeypatch, tmp_path, capsys):
    def no_display(*_):
        raise OSError("no display")

    monkeypatch.setattr(envs.mujoco, "Renderer", no_display)
    argv = ["--env", "cheetah-vel", "--render", str(tmp_path / "x.gif"), "--tasks", "1"]
    ended(capsys, envs, argv, "no OpenGL for pictures of bodies (no display)")


def test_the_camera_follows_whatever_a_robot_weighs(has_gl):
    """A walker of twice the masses looks the same where it stands the same."""
    if not has_gl:
        pytest.skip("no GL context")
    tasks = np.ones((2, 65))
    tasks[1, :8] = 2
    env = envs.make("walker-params", tasks, threads=1, render_mode="rgb_array", render_size=64)
    env.reset()
    env._full[:, 1:] = 0
    env._full[:, [1, 2]] = 8, 1.25
    plain, heavy = env.render()
    assert plain.std() > 0 and (plain == heavy).all()


def test_bad_words_end_in_one_line(tmp_path, capsys):
    render = ["--render", str(tmp_path / "x.gif")]
    ended(capsys, envs, ["--env", "nowhere"], "nowhere")
    ended(capsys, envs, ["--env", "cheetah-vel", *render, "--tasks", "0"], "expected one or more of 1 parameters")
    ended(capsys, envs, render, "unknown environment None")


@pytest.mark.parametrize("name", POINTS + DRAWN)
def test_a_saved_state_goes_on_exactly(name):
    env, other = build(name, horizon=12), build(name, seed=5, horizon=12)
    env.reset()
    play(env, random_actions(env, 17))
    saved = env.state_dict()
    expected = play(env, random_actions(env, 20, seed=1))
    for target in (env, other):
        target.load_state_dict(saved)
        assert_same(play(target, random_actions(env, 20, seed=1)), expected)


@pytest.mark.parametrize("name", DRAWN)
def test_the_number_of_threads_changes_nothing(name):
    results = []
    for threads in (1, 2):
        env = build(name, 5, threads=threads, horizon=20)
        assert env.physics.threads == threads
        env.reset()
        results.append(play(env, random_actions(env, 40)))
        env.close()
    assert_same(*results)


@pytest.mark.parametrize("name, huge, steps", [(name, *how) for name in DRAWN for how in ((1e9, 2), (1e12, 0))])
def test_a_blow_up_ends_only_its_own_episode(name, huge, steps):
    env, quiet = build(name), build(name)
    env.reset(), quiet.reset()
    actions = 0.1 * random_actions(env, 8)
    expected = play(quiet, actions)
    for action in actions[:steps]:
        env.step(action)
    joint = env.physics.size - 3  # a speed
    env._full[1, [TILT, joint]] = 2.5, huge
    last = env.observe()[1]
    obs, reward, terminated, truncated, info = env.step(actions[steps])
    for marked in (truncated, info["blew_up"], info["_final_obs"]):
        assert marked.tolist() == [False, True, False]
    assert not terminated.any() and reward[1] == 0
    assert np.isfinite(obs).all() and np.isfinite(info["final_obs"]).all() and np.isfinite(reward).all()
    np.testing.assert_array_equal(info["final_obs"][1], last)
    np.testing.assert_array_equal(obs[[0, 2]], expected[0][steps][[0, 2]])
    np.testing.assert_array_equal(reward[[0, 2]], expected[1][steps][[0, 2]])
    np.testing.assert_array_equal(obs[1], quiet.reset()[0][1])
    rest = play(env, actions[steps + 1 :])
    assert_same(rest, [x[steps + 1 :] for x in expected[:4]], rows=[0, 2])
    assert np.isfinite(rest[0]).all() and not any(info["blew_up"].any() for info in rest[4])


@pytest.mark.parametrize("name", ["cheetah-vel", "sparse-point-robot"])
def test_a_blow_up_is_no_way_to_a_high_return(name):
    """Where rewards are negative, or on a goal; the steps after it count."""
    env = envs.make(name, tasks_of(name, 1).repeat(2, axis=0), horizon=20, threads=1)
    step, calls = env.physics.step, []

    def blow_up_once(*args):
        after, sound = step(*args)
        calls.append(after)
        return after, sound & [True, len(calls) > 1]

    env.physics.step = blow_up_once
    if env.family.sparse_reward:
        env.reset()
        env._full[:, 1:] = env.tasks
        assert env.step(np.zeros((2, 2)))[4]["sparse_reward"].tolist() == [1, 0]
    else:
        sound, blown = env.returns(lambda obs: np.zeros((2, 6)), seed=0)
        assert sound < -1 and blown == pytest.approx(sound * 19 / 20, rel=0.05)


def test_observations_may_be_views_of_the_state(monkeypatch):
    """As a slice of it is, which families of one's own may well give."""
    row = envs.replace(envs.FAMILIES["sparse-point-robot"], observe=lambda state: state[:, :2])
    monkeypatch.setitem(envs.FAMILIES, "sliced", row)
    env = envs.make("sliced", tasks_of("sparse-point-robot", 1), horizon=2, threads=1)
    first = env.reset()[0]
    env.step(np.ones((1, 2)))
    obs, *_, info = env.step(np.ones((1, 2)))
    np.testing.assert_allclose(info["final_obs"], [[0.2, 0.2]])
    obs += 9  # what was given away is the caller's
    assert not env.observe().any() and not first.any()


@pytest.mark.parametrize("name", ["point-robot-wind", "sawyer"])
def test_actions_of_the_wrong_shape_are_refused(name):
    env = build(name, 5)
    obs, _ = env.reset()
    m = env.family.act_dim
    for shape in [(m,), (5, m + 1), (5, m - 1), (2, m), (1, m), (m, 5), (5 * m,), (5, m, 1), ()]:
        with pytest.raises(ValueError, match=rf"actions have shape .*expected \(5, {m}\)"):
            env.step(np.zeros(shape))
    np.testing.assert_array_equal(env.observe(), obs)


@pytest.mark.parametrize("name", POINTS + DRAWN)
def test_actions_are_clipped(name):
    wild, tame = build(name), build(name)
    wild.reset(), tame.reset()
    actions = 3 * random_actions(wild, 12)
    assert_same(play(wild, actions), play(tame, np.clip(actions, -1, 1)))
    assert np.abs(actions).max() > 2.5  # what step was given is left alone


# ---------------------------------------------------------------------------------------- one task, pictures, files
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("error", "ignore:.*space (minimum|maximum) value is -?infinity")
def test_one_task_passes_gymnasiums_checks(name, has_gl):
    env = gymnasium.make(f"{name}-v0", task=available(name, 4) - 1, seed=0)
    check_env(env.unwrapped, skip_render_check=name in BODIES and not (has_gl and name in DRAWN))
    env.close()


@pytest.mark.parametrize("name", [*POINTS, *DRAWN, "cheetah-fwd-back"])
def test_one_task_is_a_row_of_the_vector_kind(name):
    last = available(name, 4) - 1
    task = envs.sample_tasks(name, last + 1, 0)[last]
    for given in (last, task):
        single = gymnasium.make(f"{name}-v0", task=given, seed=0, horizon=12)
        vector = envs.make(name, task[None], seed=0, horizon=12, threads=1)
        np.testing.assert_array_equal(single.reset(seed=0)[0], vector.reset()[0][0])
        for action in 0.3 * random_actions(vector, 12):
            obs, reward, terminated, truncated, info = single.step(action[0].astype(np.float32))
            theirs = vector.step(action.astype(np.float32))
            ended = theirs[2][0] or theirs[3][0]
            np.testing.assert_array_equal(obs, theirs[4]["final_obs"][0] if ended else theirs[0][0])
            assert (reward, terminated, truncated) == tuple(x[0] for x in theirs[1:4])
            assert info == {k: v[0] for k, v in theirs[4].items() if "final_obs" not in k}
            if ended:
                break
        assert ended
        np.testing.assert_array_equal(single.reset(seed=6)[0], vector.reset(seed=6)[0][0])


def test_one_task_starts_anew_until_it_is_given_a_seed():
    starts = [gymnasium.make_vec("walker-params-v0", num_envs=3).reset()[0] for _ in range(2)]
    assert len(np.unique(np.concatenate(starts), axis=0)) == 6
    env, other = gymnasium.make("walker-params-v0"), gymnasium.make("walker-params-v0")
    assert (env.reset()[0] != other.reset()[0]).any() and (env.reset()[0] != env.reset()[0]).any()
    again = [[e.reset(seed=5)[0], e.reset()[0], e.reset()[0]] for e in (env, other)]
    np.testing.assert_array_equal(*again)
    assert len(np.unique(again[0], axis=0)) == 3
    for seed in (-1, 1.5, 2**63):
        with pytest.raises(ValueError, match="seed must be a whole number from 0"):
            env.reset(seed=seed)
    np.testing.assert_array_equal(env.reset()[0], other.reset()[0])


@pytest.mark.parametrize("name", [*POINTS, "cheetah-vel", "walker-params", "humanoid-dir"])
def test_pictures(name, has_gl):
    size = 96 if name in ("point-robot-wind", "walker-params") else 57
    if name in BODIES and not has_gl:
        pytest.skip("no GL context")
    env, quiet = (build(name, 2, render_mode=mode, render_size=size) for mode in ("rgb_array", None))
    env.reset(), quiet.reset()
    actions = random_actions(env, 6)
    first = env.render()
    for action in actions:
        seen, unseen = env.step(action), quiet.step(action)
        last = env.render()
        np.testing.assert_array_equal(seen[0], unseen[0])
    for pictures in (first, last):
        assert isinstance(pictures, tuple) and len(pictures) == 2
        for picture in pictures:
            assert picture.shape == (size, size, 3) and picture.dtype == np.uint8 and picture.std() > 5
    assert (last[0] != last[1]).any()
    assert (first[0] != first[1]).any() == (name != "point-robot-wind")  # there the goal and the start are the same
    assert all((a != b).any() for a, b in zip(first, last, strict=True))
    env.close(), quiet.close()


def test_a_point_robots_picture_shows_this_episodes_trail():
    env = build("point-robot-wind", 1, render_mode="rgb_array", horizon=4)
    env.reset()
    empty = env.render()[0]
    for _ in range(3):
        env.step(np.ones((1, 2)))
    with_trail, trail, env.trail = env.render()[0], env.trail, []
    assert (with_trail != env.render()[0]).any()
    env.trail = trail
    assert env.step(np.ones((1, 2)))[3].all()
    np.testing.assert_array_equal(env.render()[0], empty)
    play(env, random_actions(env, 20))
    assert len(env.trail) <= 5  # it does not grow
    env.reset()
    np.testing.assert_array_equal(env.render()[0], empty)


def test_no_log_file_in_the_working_directory(tmp_path):
    program = """
import numpy as np, envs
for name in envs.FAMILIES:
    for threads in (1, 2):
        env = envs.make(name, envs.sample_tasks(name, 1, 0).repeat(3, axis=0), threads=threads)
        env.reset()
        env._full[1, 1:] = 1e12
        env.step(np.zeros((3, env.family.act_dim)))
        env.close()
"""
    root = os.path.dirname(envs.__file__)
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True
    )
    assert result.returncode == 0, result.stderr.decode()
    assert list(tmp_path.iterdir()) == [] and b"WARN" not in result.stdout + result.stderr


# --------------------------------------------------------------------------------------------- tasks that can be drawn
NOT_DRAWN = {
    "sparse-point-robot": [[0.0, -1.0], [0.6, 0.7], [0.0, 0.0]], "point-robot-wind": [[0.051, 0.0], [0.0, -0.06]],
    "cheetah-vel": [[-0.1], [3.1]], "cheetah-fwd-back": [[2.0], [0.5]], "ant-fwd-back": [[-1.0], [1.0]],
    "ant-dir": [[7.0]], "humanoid-dir": [[-0.1]],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_tasks_are_told_from_other_families_tasks(name):
    tasks = tasks_of(name, 200)
    assert envs.is_task(name, tasks, drawn=True).all()
    assert envs.is_task(name, tasks.astype(np.float32), drawn=True).all()  # as others may have stored them
    others = np.array(NOT_DRAWN.get(name, np.empty((0, tasks.shape[1]))))
    if name.endswith("-params"):
        others = np.stack([np.where(np.arange(tasks.shape[1]) == 9, x, tasks[0]) for x in (0.0, -1.0, 4.0)])
    assert envs.is_task(name, others).all() and not envs.is_task(name, others, drawn=True).any()


# ------------------------------------------------------------------------------------------------------- command line
def test_a_film_stands_still_after_a_fall(tmp_path, has_gl, monkeypatch):
    from PIL import Image

    if not has_gl:
        pytest.skip("no GL context")
    env = build("walker-params", 2, render_mode="rgb_array", render_size=40)
    seen, made = [], Image.fromarray
    monkeypatch.setattr(Image, "fromarray", lambda array: seen.append(array.astype(int)) or made(array))
    envs.film(env, lambda obs: np.repeat([[1.0], [0.0]], 6, axis=1), tmp_path / "x.gif")
    moved = np.abs(np.diff(seen, axis=0)).max((1, 3)).reshape(-1, 2, 40).max(2) > 0  # (49, 2)
    assert len(seen) == 50 and moved[:5].all()
    for walker in moved.T:  # each moves until it falls, and then never again
        fell = walker.argmin()
        assert 5 <= fell < 45 and not walker[fell:].any()


def test_a_film_shows_all_tasks_side_by_side(tmp_path, capsys):
    from PIL import Image

    envs.main(["--env", "point-robot-wind", "--render", str(tmp_path / "out.gif"), "--tasks", "3"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out.gif")
    with Image.open(tmp_path / "out.gif") as film:
        assert film.size == (720, 240) and film.n_frames > 10
        first = np.asarray(film.convert("RGB"))
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("RGB"))
    assert all((first[:, i : i + 240] != last[:, i : i + 240]).any() for i in (0, 240, 480))


def test_the_command_line_lists_families_and_refuses_in_one_line(tmp_path, capsys):
    envs.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(envs.FAMILIES)
    assert "the same 2" in lines[list(envs.FAMILIES).index("ant-fwd-back")] and "80 + 20" in "".join(lines)
    ended(capsys, envs, ["--env", "point-robot-wind", "--render", str(tmp_path / "none" / "out.gif")])


# ------------------------------------------------------------------------------------- without rewards, and on tensors
@pytest.mark.parametrize("name", ["sparse-point-robot", "walker-params", "ant-dir", "sawyer"])
def test_an_environment_without_rewards_steps_alike_and_knows_none(name):
    open_book, closed = (build(name, seed=1, horizon=30, rewards=rewards) for rewards in (True, False))
    assert np.array_equal(open_book.reset()[0], closed.reset()[0])
    for action in random_actions(open_book, 40):
        a, b = open_book.step(action), closed.step(action)
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[2], b[2]) and np.array_equal(a[3], b[3])
        assert np.isfinite(a[1]).all() and np.isnan(b[1]).all() and "sparse_reward" not in b[4]
    row = envs.FAMILIES[name]
    held = [getattr(closed.family, field) for field in ("reward", "sparse_reward", "optimum", "script")]
    assert row.reward not in held and held[1:] == [None, None, None]


@pytest.mark.parametrize("name", list(envs.FAMILIES))
def test_terminations_are_the_same_on_tensors(name):
    row = envs.family(name)
    obs = np.random.default_rng(0).normal(size=(400, row.obs_dim)) * 0.6
    obs[:, :2] *= 0.3 if "hopper" in name else 1.0
    obs[:, 0] += {"walker2d": 1.25, "walker-params": 1.25, "hopper": 1.25, "hopper-params": 1.25}.get(name, 0.0)
    obs[:, 0] += {"humanoid-dir": 1.4, "ant-dir": 0.6, "ant-fwd-back": 0.6}.get(name, 0.0)
    obs[0, 0], obs[1, 0], obs[2, -1] = np.nan, np.inf, -np.inf
    found = row.terminated(torch.from_numpy(obs))
    assert found.dtype == torch.bool and np.array_equal(found.numpy(), row.terminated(obs))
    if row.terminated is not envs._never:
        assert found[:2].all() and 20 < found.sum() < 400
    else:
        assert not found.any()
