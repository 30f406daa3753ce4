"""SMAC against float64 loops written from the paper, who trains whom in each phase, and no reward online."""

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pearl
import pytest
import shift
import test_data
import test_focal
import torch
from conftest import SPARSE, TEST, TRAIN, WALKER, WIND, collect, ended
from matplotlib.figure import Figure
from test_focal import checkpoint, cuda, metrics, moved, q_values, random_tensors, same, weights
from torch.distributions import Normal, kl_divergence

import data
import envs
import smac

TINY = "--hidden 16 --encoder-hidden 16 --batch-size 8 --context-size 8 --meta-batch-size 3 --latent 3 --device cpu"
TINY += " --eval-every 3 --eval-episodes 1 --threads 1"
ALL = {"encoder", "decoder", "critic", "target", "actor"}


def flags(name, file, more=""):
    online = 2 * 3 * envs.family(name).horizon  # two iterations
    updates = 6 / (3 * envs.family(name).horizon)
    until = "" if envs.family(name).xml else "--data-until 60"
    file = f"--data {file} --data-size 60 --context-data 40 {until} --steps 6" if file else ""
    words = f"--env {name} {file} {TINY} --no-small"
    if "--online-rewards none" not in more:
        words += f" --online-envs 3 --online-steps {online} --updates {updates}"
    return [*words.split(), *more.split()]


def build(name, file, more="", device="cpu", script=smac):
    """What `train` builds before its loop, from the same seed."""
    k = SimpleNamespace(args=script.parse_args(flags(name, file, more)))
    k.world = script.World(k.args, torch.device(device))
    torch.manual_seed(k.args.seed)
    k.agent = smac.Agent(k.args, k.world)
    k.optimisers, k.update = k.agent.optimisers, k.agent.update
    return k


def run(folder, name, file, more="", script=smac):
    script.main([*flags(name, file, more), "--run-dir", str(folder)])
    (path,) = folder.glob(f"{script.__name__}/*/*/seed*")
    return path


# ------------------------------------------------------------------------------------------ losses, from the page
def test_log_std_is_bounded():
    actor = smac.Actor(2, 3, 1, 8)
    for bias, bound in ((1e3, 2), (-1e3, -5), (1.0, 1)):
        actor.net[-1].weight.data[1], actor.net[-1].bias.data[1] = 0, bias
        assert actor(torch.randn(4, 2), torch.randn(4, 3))[1].tolist() == [[bound]] * 4


def test_weights_of_large_advantages_are_finite():
    log_pi, q_data, q_pi = random_tensors((5,), (2, 5), (2, 5))
    assert smac.awac_loss(log_pi, 3e4 * q_data, 3e4 * q_pi, 0.7).isfinite()


# ------------------------------------------------------------------- one update against a loop over single transitions
RATE, NOISE = 0.25, 0.3
OFFLINE = ["", "--actor sac", "--actor bc --final-lr 0.5", "--encoder-loss q", "--encoder-loss reward+q"]
ONLINE = ["--pearl-weight 0.6 --final-lr 0.5", "--pearl-weight 0", "--actor sac", "--actor bc", "--encoder-loss q"]
ONLINE += ["--encoder-loss reward+q", "--online-rewards oracle", "--online-rewards oracle --encoder-loss reward+q"]
ONLINE += ["--online-rewards oracle --encoder-loss q --actor sac"]
LOOPS = [*((more, False) for more in OFFLINE), *((more, True) for more in ONLINE)]


def descend(network, gradients, rate):
    for p, g in zip(network.parameters(), gradients, strict=True):
        p.data -= rate * g


def naive_update(args, agent, online, rate, batch, histories):
    """Lines 4 and 5 (online 11 and 12) of Algorithm 1, one transition at a time, by plain gradient descent; returns the
    metrics."""
    batch = [(i, x.split(agent.split)) for i, rows in enumerate(batch) for x in rows]
    mean = lambda values: sum(values) / len(batch)

    def embed(rows):
        """The product of Gaussians by completing squares, one factor after the other."""
        mu = var = None
        for s, a, r, *_ in (row.split(agent.split) for row in rows):
            out = agent.encoder.net(torch.cat([s, a, r]))
            m, v = out[: args.latent], out[args.latent :].exp().log1p() ** 2
            mu, var = (m, v) if mu is None else ((mu * v + m * var) / (var + v), var * v / (var + v))
        return mu + var.sqrt() * NOISE, kl_divergence(Normal(mu, var.sqrt()), Normal(0, 1)).sum()

    def policy(s, z):
        out = agent.actor.net(torch.cat([s, z]))
        return out[: len(out) // 2], out[len(out) // 2 :]

    def density(mu, log_std, a):
        return (Normal(mu, log_std.exp()).log_prob(a.atanh()) - (1 - a**2).log()).sum()

    def act(s, z):
        mu, log_std = policy(s, z)
        a = (mu + log_std.exp() * NOISE).tanh()
        return a, density(mu, log_std, a)

    embedded, kls = zip(*(embed(rows) for rows in histories), strict=True)
    kl, taught = sum(kls) / len(kls), not online or args.online_rewards == "oracle"
    by_reward, by_q = taught and args.encoder_loss != "q", args.encoder_loss != "reward"
    fixed = [z.detach() for z in embedded]
    reward = torch.zeros(())
    if taught:
        z = embedded if by_reward else fixed
        reward = mean([(r[0] - agent.decoder.net(torch.cat([s, a, z[i]]))[0]) ** 2 for i, (s, a, r, _, _) in batch])
    errors, qs, z = [], [], embedded if by_q else fixed
    for i, (s, a, r, s2, d) in batch:
        with torch.no_grad():
            value = min(q_values(agent.target, s2, fixed[i], act(s2, fixed[i])[0]))
            y = args.reward_scale * r[0] + (0 if d else args.discount * value)
        qs += [q_values(agent.critic, s, z[i], a)]
        errors += [(y - qs[-1][0]) ** 2 + (y - qs[-1][1]) ** 2]
    critic = mean(errors)

    data_density, weights, pearl = [], [], []
    for n, (i, (s, a, *_)) in enumerate(batch):
        data_density += [density(*policy(s, fixed[i]), a)]
        a_pi, log_pi = act(s, fixed[i])
        v = min(q_values(agent.critic, s, fixed[i], a_pi))
        weights += [((min(qs[n]) - v) / args.awac_lambda).exp().item()]
        pearl += [log_pi - v]
    actor = {"sac": 0, "bc": -mean(data_density)}.get(args.actor)
    if args.actor == "awac":
        actor = -mean([p * w for p, w in zip(data_density, weights, strict=True)]) / (sum(weights) / len(weights))
    if args.actor == "sac" or (args.actor == "awac" and online):
        actor = actor + (1 if args.actor == "sac" else args.pearl_weight) * mean(pearl)

    gradients = lambda loss, network: torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    steps = [(agent.critic, critic), (agent.actor, actor)]
    steps += [(agent.decoder, reward)] if taught else []
    if by_reward or by_q:
        steps += [(agent.encoder, args.kl_weight * kl + (reward if by_reward else 0) + (critic if by_q else 0))]
    for network, g in [(network, gradients(loss, network)) for network, loss in steps]:  # all of them, then all steps
        descend(network, g, rate)
    for slow, fast in zip(agent.target.parameters(), agent.critic.parameters(), strict=True):
        slow.data = (1 - args.tau) * slow + args.tau * fast.data
    return [x.item() for x in (reward, kl, critic, actor, mean(data_density), mean([(a + b) / 2 for a, b in qs]))]


@pytest.mark.parametrize(("more", "online"), LOOPS)
def test_an_update_equals_a_loop_over_single_transitions(files, monkeypatch, more, online):
    sizes = "--hidden 6 --encoder-hidden 6 --batch-size 3 --context-size 4 --kl-weight 0.3"
    sizes += "" if "--actor" in more else " --awac-lambda 0.5"
    k = build(WIND, files[WIND], f"{sizes} --reward-scale 2 --tau 0.25 --lr {RATE} {more}")
    agent = k.agent.double()
    agent.replay.rows.normal_()
    agent.replay.rows[..., 2:4].tanh_()  # actions
    agent.replay.rows[..., -1] = (agent.replay.rows[..., -1] > 0).double()
    with torch.no_grad():
        for p in [*agent.target.parameters(), *agent.encoder.parameters()]:
            p += 0.3 * torch.randn_like(p)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, NOISE))
    rate = lambda: torch.tensor(RATE, dtype=torch.float64)
    for name, optimiser in agent.optimisers.items():
        agent.optimisers[name] = torch.optim.SGD(optimiser.param_groups[0]["params"], lr=rate())
    draws, draw = {3: [], 4: []}, agent.replay._draw
    agent.replay._draw = lambda t, n, *more: draws[n].append((t, draw(t, n, *more))) or draws[n][-1][1]
    expected = copy.deepcopy({name: network for name, network in agent._modules.items() if name != "replay"})
    expected = SimpleNamespace(split=agent.split, **expected)
    agent.update(online)
    ((t, batch),), ((t_h, histories),) = draws[3], draws[4]
    assert torch.equal(t, t_h) and len(set(t.tolist())) == 3
    falling = RATE * (1 - (1 - k.args.final_lr) / 18)  # at the first of 6 steps offline and 12 online
    values = naive_update(k.args, expected, online, falling, batch, histories)
    for name in ALL:
        ours, theirs = (dict(getattr(owner, name).named_parameters()) for owner in (agent, expected))
        for key, p in ours.items():
            note = lambda text, at=f"{name}.{key}": f"{at}: {text}"
            torch.testing.assert_close(p, theirs[key], rtol=1e-8, atol=1e-9, msg=note)
    assert agent.metrics[0].tolist() == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_actions_at_their_bounds_have_a_density(files):
    agent = build(WIND, files[WIND]).agent
    agent.replay.rows[..., 2:4].sign_()
    agent.update()
    assert agent.metrics.isfinite().all()


def test_the_slow_target_begins_as_the_critic(files):
    agent = build(WIND, files[WIND]).agent
    assert same(agent.target, agent.critic)


# ------------------------------------------------------------------------------------------------------- buffers
def buffers(rows, joining, horizon=3, context_data=4):
    """The buffers of three tasks."""
    world = SimpleNamespace(train_rows=rows, buffers=np.array(joining, int), split=[1, 1, 1, 1, 1])
    world.row = SimpleNamespace(horizon=horizon)
    return smac.Replay(SimpleNamespace(context_data=context_data), world)


def test_buffers_grow_as_said():
    rows = torch.arange(3).float()[:, None, None].expand(3, 4, 5).clone()
    assert buffers(rows, [[]]).rows.shape == (3, 4, 5)
    replay = buffers(rows, [[1, 4], [1, 0]])  # room for two trajectories
    assert replay.rows.shape == (5, 10, 5) and replay.filled.tolist() == replay.offline.tolist() == [4, 4, 4, 0, 0]
    new = 10 + torch.arange(4).float()[:, None, None].expand(4, 3, 5)
    replay.append(torch.tensor([1, 4, 1, 0]), new)
    assert replay.filled.tolist() == [7, 10, 4, 0, 3] and replay.offline.tolist() == [4, 4, 4, 0, 0]
    assert replay.rows[1, :, 0].tolist() == [1] * 4 + [10] * 3 + [12] * 3
    assert replay.rows[4, :3, 0].tolist() == [11] * 3 and replay.rows[0, 4:7, 0].tolist() == [13] * 3


def test_what_is_drawn_from_the_buffers():
    rows = torch.arange(3).float()[:, None, None].expand(3, 4, 5).clone()
    replay = buffers(rows, [[1, 4], [1, 0]], context_data=2)
    replay.append(torch.tensor([1, 4, 1, 0]), 10 + torch.arange(4).float()[:, None, None].expand(4, 3, 5))
    parts = replay.transitions(torch.tensor([1, 0]), 400)
    assert [part.shape for part in parts] == [(800, 1), (800, 1), (800,), (800, 1), (800,)]
    drawn = parts[0].view(2, 400)
    assert all(torch.equal(part.view(2, 400), drawn) for part in parts)
    assert set(drawn[0].tolist()) == {1, 10, 12} and set(drawn[1].tolist()) == {0, 13}
    assert (drawn[0] == 1).float().mean().item() == pytest.approx(0.4, abs=0.1)
    replay.rows[1, :4, 0] = torch.tensor([5.0, 6, 7, 8])
    latest, others = replay.histories(torch.tensor([1, 4]), 200)[..., 0]
    assert set(latest.tolist()) == {7, 8, 10, 12} and set(others.tolist()) == {11}
    latest, others = replay.histories(torch.tensor([1, 4]), 200, offline=True)[..., 0]
    assert set(latest.tolist()) == {7, 8} and set(others.tolist()) == {11}  # where there are no offline rows: any


def test_the_oracle_of_test_tasks_has_buffers_of_their_own_not_drawn_from_while_they_are_empty(files):
    k = build(WIND, files[WIND], "--online-tasks test --online-rewards oracle --meta-batch-size 4")
    assert k.agent.replay.filled.tolist() == [60] * 4 + [0] * 2
    drawn, draw = [], k.agent.replay._draw
    k.agent.replay._draw = lambda *args: drawn.append(args[0]) or draw(*args)
    k.update(online=True)
    assert [set(task.tolist()) for task in drawn] == [{0, 1, 2, 3}] * 2
    smac.collect(k.args, k.agent, k.world, 0)
    counts = np.bincount(smac.schedule(k.args, 2, 1)[0], minlength=2)
    assert k.agent.replay.filled.tolist() == [60] * 4 + [20 * count for count in counts]


def test_all_networks_have_the_flag_s_learning_rate(files):
    test_focal.check_rates(build(WIND, files[WIND], "--lr 0.1"), phi=0.1, critic=0.1, actor=0.1)


def test_the_schedule_visits_all_tasks_alike():
    args = smac.parse_args(flags(WIND, "x", "--online-envs 5 --online-steps 2000 --seed 3"))
    assert smac.rounds(args) == (20, 10)
    plan = smac.schedule(args, 7, 0)
    assert plan.shape == (20, 5)
    counts = np.bincount(plan.ravel(), minlength=7)
    assert counts.max() == 15 and counts.min() == 14
    assert (np.sort(plan.ravel()[:7]) == np.arange(7)).all() and not np.array_equal(plan, smac.schedule(args, 7, 1))


@pytest.mark.parametrize("contexts", ["all", "offline"])
def test_the_rows_that_an_update_takes_as_contexts(files, contexts):
    k, seen = build(WIND, files[WIND], f"--online-contexts {contexts}"), []
    draw = k.agent.replay.histories
    k.agent.replay.histories = lambda task, size, offline: seen.append(offline) or draw(task, size, offline)
    for online in (False, True):
        k.update(online=online)
    assert seen == [contexts == "offline"] * 2


# ----------------------------------------------------------------------------------------------- the online phase
class MeanReward(torch.nn.Module):
    """A posterior that is the mean reward of the history, almost surely."""

    def forward(self, rows, counted=None):
        mean = rows[..., 4:5].mean(1).expand(-1, 3)  # s, a, r, s', d
        return mean, torch.full_like(mean, 1e-12)


def test_labels_come_from_the_offline_history_of_the_trajectory_s_own_buffer(files):
    k = build(WIND, files[WIND])
    k.agent.labeller = MeanReward()
    k.agent.decoder.forward = lambda s, z, a: z[..., 0] + 10 * s[..., 0] + 100 * a[..., 1]
    reward = k.agent.split[0] + k.agent.split[1]
    k.agent.replay.rows[..., reward] = torch.arange(4.0)[:, None]
    k.agent.replay.rows[:, :20, reward] = -1e6  # nor what is not in the encoder's buffer
    k.agent.replay.rows[:, 60:, reward] = 1e6  # what is collected online must not be looked at
    k.agent.replay.filled += 20
    task = torch.tensor([2, 0, 3])
    rows = torch.randn(3, 20, k.agent.replay.rows.shape[-1])
    rows[..., reward] = math.nan
    expected = task[:, None] + 10 * rows[..., 0] + 100 * rows[..., 3]
    torch.testing.assert_close(k.agent.label(task, rows), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("more", ["", "--online-tasks test", "--online-rewards oracle"])
@pytest.mark.parametrize("name", [WIND, WALKER])
def test_collected_trajectories_are_real_and_go_where_they_belong(files, name, more):
    k = build(name, files[name], more)
    before = k.agent.replay.rows.clone()
    smac.collect(k.args, k.agent, k.world, 1)
    horizon, n = envs.family(name).horizon, 60
    buffers = smac.schedule(k.args, 4, 0)[1]
    tasks = k.world.train_tasks[buffers]
    if "test" in more:
        tasks = k.world.test_tasks[smac.schedule(k.args, 2, 1)[1]]
    counts = np.bincount(buffers, minlength=4)
    assert k.agent.replay.filled.tolist() == [n + horizon * count for count in counts]
    assert torch.equal(k.agent.replay.rows[:, :n], before[:, :n]) and k.agent.replay.rows.isfinite().all()
    place = np.full(4, n)
    for buffer, task in zip(buffers, tasks, strict=True):
        rows = k.agent.replay.rows[buffer, place[buffer] : place[buffer] + horizon]
        place[buffer] += horizon
        s, a, r, s2, d = rows.split(k.agent.split, -1)
        inside = d[:-1, 0] == 0
        assert torch.equal(s2[:-1][inside], s[1:][inside]) and inside.float().mean() > 0.8
        if name == WIND:  # in the wind of its own task
            s, s2 = (x * k.world.std + k.world.mean for x in (s, s2))
            torch.testing.assert_close(s2 - s, 0.1 * a + torch.as_tensor(task).float(), rtol=1e-4, atol=1e-5)
            true = -(s2 - torch.tensor([1.0, 0.0])).norm(dim=-1)
            assert torch.allclose(r[:, 0], true, atol=1e-5) == ("oracle" in more)
            assert not d.any()  # a time limit is not the MDP's end
        else:
            fell = envs.family(name).terminated((s2 * k.world.std + k.world.mean).numpy())
            assert torch.equal(d[:, 0] > 0, torch.from_numpy(fell))


def test_the_collector_s_environment_knows_no_reward(files, monkeypatch):
    k = build(SPARSE, files[SPARSE])
    made, make, act = [], envs.make, k.agent.act
    k.agent.act = lambda s, z, sampled: act(s, z, sampled) if sampled else None  # it explores
    monkeypatch.setattr(envs, "make", lambda *args, **kw: made.append(make(*args, **kw)) or made[-1])
    seen, label = [], k.agent.label
    k.agent.label = lambda task, rows: seen.append(rows.clone()) or label(task, rows)
    smac.collect(k.args, k.agent, k.world, 0)
    (env,), (rows,) = made, seen
    assert env.family.reward is not envs.FAMILIES[SPARSE].reward and env.family.sparse_reward is None
    assert rows[..., k.agent.split[0] + k.agent.split[1]].isnan().all() and rows.isnan().sum() == rows[..., 0].numel()
    assert k.agent.replay.rows.isfinite().all()


def test_labels_are_of_a_sample_of_the_posterior_one_for_a_trajectory(files, monkeypatch):
    k, seen = build(WIND, files[WIND]), []
    monkeypatch.setattr(smac, "sample", lambda mean, variance: seen.append((mean, variance)) or mean + 7 + variance)
    k.agent.decoder.forward = lambda s, z, a: z.sum(-1)
    labels = k.agent.label(torch.tensor([2, 0]), torch.zeros(2, 20, k.agent.replay.rows.shape[-1]))
    ((mean, variance),) = seen
    torch.testing.assert_close(labels, (mean + 7 + variance).sum(-1)[:, None].expand(2, 20))


@pytest.mark.parametrize("at", [(), (2,)])
def test_what_followed_a_blow_up_is_marked(files, monkeypatch, at):
    monkeypatch.setattr(envs, "make", test_data.Fragile)
    monkeypatch.setattr(test_data.Fragile, "at", at)
    k = build(WALKER, files[WALKER])
    k.agent.act = lambda s, z, sampled=False: torch.zeros(len(s), 6)
    _, counted, _, sound = smac.play(k.agent, k.world, k.world.env, torch.zeros(k.world.env.num_envs, 3), 0)
    assert sound.tolist() == [True, not at, True, True]
    assert counted[:, :5].tolist() == [[True] * 5, [True, True, not at, True, True], [True] * 5, [True] * 5]


def test_a_trajectory_whose_physics_blew_up_is_dropped(files, monkeypatch):
    k, play = build(WIND, files[WIND]), smac.play
    monkeypatch.setattr(smac, "play", lambda *args, **more: (*play(*args, **more)[:3], torch.arange(3) != 1))
    smac.collect(k.args, k.agent, k.world, 0)
    kept = k.world.buffers[0][[0, 2]]
    assert k.agent.replay.filled.tolist() == (60 + 20 * np.bincount(kept, minlength=4)).tolist()


def test_every_round_has_tasks_of_its_own(files, tmp_path, no_plots, monkeypatch):
    rounds, collect = [], smac.collect
    monkeypatch.setattr(smac, "collect", lambda *args: rounds.append(args[3]) or collect(*args))
    run(tmp_path, WIND, files[WIND])
    assert rounds == [0, 1]


@pytest.mark.parametrize("more", ["", "--encoder-loss reward+q", "--online-tasks test", "--z-every step"])
def test_no_true_reward_reaches_the_online_phase(files, tmp_path, no_plots, monkeypatch, more):
    """Other rewards change what evaluations report, and nothing that is learnt, drawn or stored."""
    honest = run(tmp_path / "a", WIND, files[WIND], more)
    lies = lambda task, *_: np.random.default_rng().normal(size=len(task))
    monkeypatch.setitem(envs.FAMILIES, WIND, dataclasses.replace(envs.FAMILIES[WIND], reward=lies))
    lying = run(tmp_path / "b", WIND, files[WIND], more)
    test_focal.assert_equal(checkpoint(honest)["agent"], checkpoint(lying)["agent"])
    for x, y in zip(metrics(honest), metrics(lying), strict=True):
        assert x["return_mean"] != y["return_mean"]
        assert all(x[key] == y[key] for key in smac.Agent.METRICS)


@pytest.mark.parametrize("more", ["", "--encoder-loss reward+q"])
def test_encoder_and_decoder_stand_still_online(files, tmp_path, no_plots, more):
    """But for an encoder that Q trains; labels come from the encoder at the end of the offline phase."""
    offline = run(tmp_path / "a", WIND, files[WIND], f"{more} --online-rewards none")
    whole = run(tmp_path / "b", WIND, files[WIND], more)
    assert [row["online_steps"] for row in metrics(whole)] == [0, 0, 60, 60, 120, 120] and len(metrics(offline)) == 2
    a, b = (checkpoint(x)["agent"] for x in (offline, whole))
    for key in a:
        if key.startswith("encoder"):
            assert torch.equal(a[key], b[key.replace("encoder", "labeller", 1)])
            assert torch.equal(a[key], b[key]) == (not more)
    assert "decoder" not in moved(a, b) and moved(a, b) >= {"actor", "critic", "target"}


# ----------------------------------------------------------------------------------------------------- evaluation
def test_evaluation_follows_both_protocols(files, monkeypatch):
    k = build(WIND, files[WIND], "--eval-episodes 2")
    seen, played, scored, play, returns = [], [], [], smac.play, k.world.env.returns

    def record(agent, world, env, z, seed, **more):
        result = play(agent, world, env, z, seed, **more)
        played.append(SimpleNamespace(seed=seed, more=more, rows=result[0], total=result[2]))
        return result

    monkeypatch.setattr(smac, "play", record)
    k.world.env.returns = lambda policy, seed: scored.append((returns(policy, seed), seed)) or scored[-1][0]
    forward = k.agent.encoder.forward
    k.agent.encoder.forward = lambda h, counted=None: seen.append(h) or forward(h, counted)
    state = torch.get_rng_state()
    row, z = smac.evaluate(k.args, k.agent, k.world)
    assert torch.equal(state, torch.get_rng_state())  # it takes nothing from the run's random numbers
    first, second = played
    assert all(p.more == {"anew": "episode"} for p in played) and first.seed != second.seed
    stored = test_focal.load_arrays(files[WIND])["tasks"][TRAIN[:2] + TEST]
    assert np.array_equal(k.world.env.tasks, stored.repeat(2, axis=0)) and np.array_equal(k.world.tasks, stored)
    assert {seed for _, seed in scored} == {k.args.seed}
    assert torch.equal(seen[0], torch.cat([first.rows, second.rows], 1))
    assert seen[1].shape[1] == seen[2].shape[1] == k.args.context_size
    own = torch.cat([k.world.train_rows[: k.world.seen], k.world.test_rows])
    for i, history in enumerate(seen[2]):  # two meta-episodes of each of two training and two test tasks
        assert all((drawn == own[i // 2, -40:]).all(1).any() for drawn in history)
        assert len({tuple(drawn.tolist()) for drawn in history}) > k.args.context_size // 2
    for i, history in enumerate(seen[1]):
        assert all((drawn == seen[0][i]).all(1).any() for drawn in history)
    torch.testing.assert_close(z, forward(seen[2])[0].view(4, 2, 3))
    for name, total in zip(("prior_", "", "short_", "offline_"), (first.total, *(x for x, _ in scored)), strict=True):
        for prefix, part in (("train_", slice(4)), ("", slice(4, None))):
            own = total[part].reshape(2, 2)
            assert row[f"{prefix}{name}return_mean"] == own.mean()
            assert row[f"{prefix}{name}return_std"] == own.mean(1).std()
    for i, name in enumerate(("", "short_", "offline_")):
        kl = smac.gaussian_kl(*forward(seen[i])).detach()
        assert row[f"train_{name}kl"] == pytest.approx(kl[:4].mean().item(), rel=1e-5)
        assert row[f"{name}kl"] == pytest.approx(kl[4:].mean().item(), rel=1e-5)
    assert row == smac.evaluate(k.args, k.agent, k.world)[0]


def test_what_acts_on_a_posterior_acts_on_a_sample_of_it(files, monkeypatch):
    k, seen = build(WIND, files[WIND]), []
    act = k.agent.act
    k.agent.act = lambda s, z, sampled=False: seen.append(z) or act(s, z, sampled)
    samples = []  # none is taken where agents are tested
    monkeypatch.setattr(smac, "sample_tanh_gaussian", lambda *args: samples.append(args))
    monkeypatch.setattr(smac, "sample", lambda mean, variance: mean + 100 * variance.sqrt())
    expected, found = [], smac.posteriors
    monkeypatch.setattr(smac, "posteriors", lambda *args: expected.append(found(*args)) or expected[0])
    smac.evaluate(k.args, k.agent, k.world)
    for i, (mean, variance) in enumerate(expected[0].values()):
        assert all(torch.equal(z, mean + 100 * variance.sqrt()) for z in seen[40 + 20 * i : 60 + 20 * i])
    assert not samples


def test_rows_after_a_fall_are_not_in_the_context_nor_in_the_return(files):
    k = build(WALKER, files[WALKER])
    k.args.context_size = 200
    k.agent.act = lambda s, z, sampled=False: torch.ones(len(s), 6)
    z = torch.zeros(k.world.env.num_envs, 3)
    rows, counted, total, _ = smac.play(k.agent, k.world, k.world.env, z, 0)
    ended = rows[..., -1] > 0
    assert ended.any(1).all() and counted.shape == (4, 200)
    for i in range(4):
        first = int(ended[i].float().argmax())
        assert counted[i].tolist() == [True] * (first + 1) + [False] * (199 - first)
        reward = rows[i, :, k.agent.split[0] + k.agent.split[1]]
        assert total[i] == pytest.approx(reward[: first + 1].double().sum().item(), rel=1e-4)
        found, own = smac.posteriors(k.args, k.agent, k.world, rows, counted), rows[i : i + 1, : first + 1]
        for name in ("", "short_"):  # which are drawn, here as many as there are
            torch.testing.assert_close(tuple(x[i : i + 1] for x in found[name]), k.agent.encoder(own))


def test_exploration_draws_z_from_the_prior(files, monkeypatch):
    k, seen, play = build(WIND, files[WIND], "--online-envs 40 --z-every step"), [], smac.play
    note = lambda *args, **more: seen.append((args[3], more)) or play(*args, **more)
    monkeypatch.setattr(smac, "play", note)
    smac.collect(k.args, k.agent, k.world, 0)
    smac.explore(k.args, k.agent, k.world)
    (z, more), (z_1, _), (z_2, _) = seen
    assert more == {"sampled": True, "anew": "step"} and len(z.unique(dim=0)) == 40 and 0.7 < z.std() < 1.3
    assert len(torch.cat([z_1, z_2]).unique(dim=0)) == 2 * k.world.env.num_envs


@pytest.mark.parametrize(("every", "expected"), [(None, "once"), ("episode", "after falls"), ("step", "always")])
def test_when_exploration_draws_z(files, every, expected):
    k = build(WALKER, files[WALKER])
    seen = []
    k.agent.act = lambda s, z, sampled=False: seen.append(z.clone()) or torch.ones(len(s), 6)
    z = torch.zeros(k.world.env.num_envs, 3)
    rows, *_ = smac.play(k.agent, k.world, k.world.env, z, 0, anew=every)
    changes = torch.stack([(a != b).any(1) for a, b in zip(seen, seen[1:], strict=False)], 1)
    fell = rows[:, :-1, -1] > 0
    assert fell.any() and not fell.all()
    assert torch.equal(changes, {"once": fell & False, "after falls": fell, "always": fell | True}[expected])


# ----------------------------------------------------------------------------------------------------- whole runs
def test_what_a_run_writes(files, tmp_path, capsys):
    path = run(tmp_path, SPARSE, files[SPARSE], "--seed 2")
    names = ["args.json", "metrics.csv", "final.json", "curve.png", "embeddings.png", "checkpoint.pt", "source.py"]
    names.append("paths.png")
    assert {file.name for file in path.iterdir()} - {"started.py", ".lock"} == set(names)
    rows = metrics(path)
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 15, 18]
    expected = {f"{name}return_mean" for name in ("", "offline_", "short_", "prior_")} | {"kl", "offline_kl"}
    assert expected <= rows[0].keys()
    assert all(0 <= row[f"{name}return_mean"] <= 20 for row in rows for name in ("", "prior_"))  # the sparse return
    assert "offline context" in capsys.readouterr().out


@pytest.mark.parametrize("more", ["", "--online-rewards oracle", "--actor sac --encoder-loss reward+q"])
def test_same_seed_same_run_and_a_killed_one_goes_on(files, tmp_path, no_plots, monkeypatch, more):
    kills = (3,) if more else (1, 2, 3, 4)  # within the offline phase, at its end, within a round, at its end
    test_focal.check_resumed(monkeypatch, run, kills, tmp_path, WIND, files[WIND], more)


def test_packed_rows_are_the_datas(files):
    k, stored = build(WALKER, files[WALKER], "--data-size 120"), data.load(files[WALKER])
    assert np.array_equal(k.world.train_tasks, stored.tasks[TRAIN]) and stored.terminals[TRAIN].any()
    for rows, tasks in ((k.world.train_rows, TRAIN), (k.world.test_rows, TEST)):
        s, a, r, s2, d = rows.split(k.world.split, -1)
        for ours, theirs in ((a, stored.actions), (r[..., 0], stored.rewards), (d[..., 0], stored.terminals)):
            assert torch.equal(ours, theirs[tasks])
        for ours, theirs in ((s, stored.observations), (s2, stored.next_observations)):
            torch.testing.assert_close(ours, k.world.scaled(theirs[tasks]))


def test_data_are_built_of_as_many_tasks_as_were_asked_for(files, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "prepare", lambda *words, **more: asked.append((words, more)) or files[WIND])
    args = smac.parse_args(f"--env {WIND} --device cpu --data-seed 3 --train-tasks 4 --test-tasks 2".split())
    smac.World(args, torch.device("cpu"))
    assert asked == [((WIND, "replay", 3, args.data_dir), {"device": "cpu", "train": 4, "test": 2})]


def test_the_data_are_cut(files):
    k = build(WIND, files[WIND], "--data-size 20 --data-until 50")
    stored = data.load(files[WIND])
    seen = stored.observations[TRAIN, 30:50].flatten(0, 1)  # no test task's
    torch.testing.assert_close((k.world.mean, k.world.std), (seen.mean(0), seen.std(0)), atol=1e-4, rtol=0.02)
    s = k.world.train_rows[..., :2] * k.world.std + k.world.mean
    torch.testing.assert_close(s, stored.observations[TRAIN, 30:50], atol=1e-5, rtol=1e-4)
    s = k.world.test_rows[..., :2] * k.world.std + k.world.mean
    torch.testing.assert_close(s, stored.observations[TEST, 30:50], atol=1e-5, rtol=1e-4)
    expected = stored.rewards[TEST, 40:60].sum(1).mean()  # the one episode of 20 steps that begins in these rows
    assert k.world.behaviour == pytest.approx(expected.item(), rel=1e-5)
    assert k.world.optimum == pytest.approx(envs.family(WIND).optimum(stored.tasks[TEST], 20).mean())
    k = build(WIND, files[WIND], "--data-size 20 --data-until 60")  # and that is their first
    assert k.world.behaviour == pytest.approx(expected.item(), rel=1e-5)


def test_rows_that_are_fewer_than_a_default_wants_are_all_taken(files):
    """60 rows a task, in data of one's own; defaults want 1,600, and 400 of them for contexts."""
    words = ["--env", WIND, "--data", str(files[WIND]), *TINY.split(), "--no-small", "--online-envs", "3"]
    world = smac.World(smac.parse_args(words), torch.device("cpu"))
    stored = data.load(files[WIND])
    for rows, tasks in ((world.train_rows, TRAIN), (world.test_rows, TEST)):
        s = rows[..., :2] * world.std + world.mean
        torch.testing.assert_close(s, stored.observations[tasks], atol=1e-5, rtol=1e-4)
    for more, kept in (("--data-size 20", slice(40, 60)), ("--data-until 50", slice(0, 50))):
        rows = smac.World(smac.parse_args([*words, *more.split()]), torch.device("cpu")).train_rows
        assert torch.equal(rows[..., 4], stored.rewards[TRAIN, kept])


def test_observations_are_kept_within_a_bound(files):
    """Of the data, where the policy acts, and in what it collects."""
    k, free = (build(WIND, files[WIND], f"--obs-bound {bound}") for bound in (0.5, 1e30))
    for rows, whole in ((k.world.train_rows, free.world.train_rows), (k.world.test_rows, free.world.test_rows)):
        for part in (slice(0, 2), slice(5, 7)):  # s and s'
            assert whole[..., part].abs().max() > 1
            torch.testing.assert_close(rows[..., part], whole[..., part].clamp(-0.5, 0.5))
    seen, act = [], k.agent.act
    k.agent.act = lambda s, z, sampled=False: seen.append(s) or act(s, z, sampled)
    rows = smac.play(k.agent, k.world, k.world.env, torch.zeros(k.world.env.num_envs, k.args.latent), 0)[0]
    assert torch.equal(rows[..., :2], torch.stack(seen, 1))
    for x in (rows[..., :2], rows[..., 5:7]):
        assert x.abs().max() == 0.5
    far = 1e6 * torch.ones(1, 2)
    assert build(WIND, files[WIND]).world.scaled(far).tolist() == [[10.0, 10.0]]


MORE = [("--data-size 61", "--data-size.*expected 61 rows.*found 60 rows")]
MORE += [("--data-until 90", "--data-until.*up to row 90, found 60 rows")]
MORE += [("--meta-batch-size 5", "--meta-batch-size.*at most 4")]


@pytest.mark.parametrize(("more", "message"), MORE)
def test_more_than_the_data_have_is_refused(files, more, message):
    with pytest.raises(data.DataError, match=message):
        build(WIND, files[WIND], more)


def test_a_run_of_another_length_is_not_looked_for(files, tmp_path, no_plots, capsys):
    run(tmp_path, WIND, files[WIND], "--online-rewards none")
    smac.main([*flags(WIND, files[WIND], "--steps 9 --online-rewards none --resume"), "--run-dir", str(tmp_path)])
    assert "from the start" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- PEARL, and the pictures
COUNTS = "--train-tasks 3 --test-tasks 2 --online-steps 240"


def test_pearl_from_nothing_leaves_its_replay(tmp_path, no_plots):
    path = run(tmp_path, WIND, None, COUNTS, pearl)
    (row, *_), dataset = metrics(path), data.load(path / "replay.npz", WIND)
    assert "offline_return_mean" not in row and row["step"] == 3 and row["online_steps"] == 60
    assert moved(weights(build(WIND, None, COUNTS, script=pearl).agent), checkpoint(path)["agent"]) >= ALL
    assert dataset.rewards.shape == (5, 80) and dataset.train_tasks.tolist() == [0, 1, 2]
    assert np.array_equal(dataset.tasks, envs.sample_tasks(WIND, 5, 0))
    for i, task in enumerate(dataset.tasks):
        s, a, s2 = (x[i].numpy() for x in (dataset.observations, dataset.actions, dataset.next_observations))
        np.testing.assert_allclose(s2 - s, 0.1 * a + task, atol=1e-5)
        np.testing.assert_allclose(dataset.rewards[i], -np.linalg.norm(s2 - [1, 0], axis=1), atol=1e-4)
        assert dataset.episodes[i].tolist() == [t // 20 for t in range(80)]
    more = "--data-size 80 --data-until 80 --online-rewards none"
    assert metrics(run(tmp_path / "smac", WIND, path / "replay.npz", more))[0]["offline_return_mean"] < 0


def test_pearl_without_its_replay_is_not_finished(tmp_path, no_plots, monkeypatch):
    monkeypatch.setattr(pearl, "save_replay", lambda *_: (_ for _ in ()).throw(KeyError()))
    with pytest.raises(KeyError):
        run(tmp_path, WIND, None, COUNTS, pearl)
    assert list(tmp_path.rglob("checkpoint.pt")) and not list(tmp_path.rglob("final.json"))


def test_pearl_learns_by_its_own_losses(monkeypatch):
    k, calls = build(WIND, None, COUNTS, script=pearl), []
    for name in ("awac_loss", "pearl_loss", "critic_loss", "reward_loss"):
        loss = getattr(smac, name)
        monkeypatch.setattr(smac, name, lambda *args, name=name, loss=loss: calls.append(name) or loss(*args))
    smac.collect(k.args, k.agent, k.world, 0)
    assert k.agent.replay.filled.tolist() == [20, 20, 20]
    before = weights(k.agent)
    k.update(online=True)
    assert sorted(calls) == ["critic_loss", "pearl_loss", "reward_loss"] and moved(before, weights(k.agent)) == ALL
    far = 1e6 * torch.ones(1, 2)
    assert torch.equal(k.world.scaled(far), far)  # it has no data to standardise by


def test_contexts_of_a_saved_replay_are_of_exploration(files, monkeypatch):
    """The last rows of a test task: SMAC takes them as its offline contexts."""
    k, play, calls = build(WIND, files[WIND]), smac.play, []

    def marked(agent, world, env, z, *args, **kwargs):
        rows, *rest = play(agent, world, env, z, *args, **kwargs)
        rows[..., 4] = len(calls)  # the reward: whether it was the second call
        calls.append(z)
        return rows, *rest

    monkeypatch.setattr(smac, "play", marked)
    rows = pearl.play_test_tasks(k.args, k.agent, k.world, 4)
    assert len(calls) == 2 and rows.shape[:2] == (len(TEST), 80)
    assert rows[..., 4].unflatten(1, (4, 20))[:, :, 0].tolist() == [[1, 1, 0, 0]] * len(TEST)


def test_a_saved_replay_of_a_family_with_sparse_rewards_holds_them(tmp_path, no_plots):
    dataset = data.load(run(tmp_path, SPARSE, None, COUNTS, pearl) / "replay.npz", SPARSE)
    distance = np.linalg.norm(dataset.next_observations.numpy() - dataset.tasks[:, None], axis=-1)
    expected = np.where(distance < 0.2, 1 - distance, 0)
    np.testing.assert_allclose(dataset.context_rewards, expected, atol=1e-5)
    np.testing.assert_allclose(dataset.rewards, -distance, atol=1e-5)


NOT_PEARL = [(more, [f"{more.split()[0]}: PEARL"])
             for more in ("--actor bc", "--obs-bound 5", "--steps 5", "--data-size 7")]  # fmt: skip
NOT_PEARL += [("--online-envs 2", ["--online-envs 2", "at least 3"])]
NOT_PEARL += [("--online-steps 60", ["--online-steps 60", "at least 120"])]


@pytest.mark.parametrize(("more", "words"), NOT_PEARL)
def test_pearl_says_in_one_line_what_it_cannot(tmp_path, no_plots, capsys, more, words):
    ended(capsys, pearl, [*flags(WIND, None, f"{COUNTS} {more}"), "--run-dir", str(tmp_path)], *words)


def test_the_picture_of_paths(files, tmp_path, monkeypatch):
    """A path of each test task in each panel, as it was walked, and a star of its colour where it should lead."""
    monkeypatch.setattr(data, "write", lambda path, save: save(drawn.append))
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file(figure))
    drawn, played, play, k = [], [], smac.play, build(SPARSE, files[SPARSE], "--eval-episodes 2")
    monkeypatch.setattr(smac, "play", lambda *args, **more: played.append(play(*args, **more)) or played[-1])
    posteriors, found = smac.posteriors, {}
    monkeypatch.setattr(smac, "posteriors", lambda *args: found.update(posteriors(*args)) or found)
    kls, walked = shift.play(smac, k.args, k.agent, k.world)
    for name, kl in kls.items():  # of the test tasks, which come last
        np.testing.assert_array_equal(kl, smac.gaussian_kl(*found[name]).detach()[-4:])
    shift.plot({tmp_path / "shift-offline-phase.png": (kls, walked)}, k.world)
    histogram, *panels = drawn[0].axes
    assert len(histogram.patches) == 2 * 29 and len(panels) == 3
    assert sum(patch.get_height() for patch in histogram.patches) == 2 * 4  # both kinds, test tasks, meta-episodes
    first, _, *others = played
    for (rows, *_), axes in zip((first, *others), panels, strict=True):
        (stars,) = axes.collections
        np.testing.assert_allclose(stars.get_offsets(), k.world.test_tasks)
        assert len(axes.lines) == len(k.world.test_tasks)
        for i, line in enumerate(axes.lines):
            walked = rows[4 + 2 * i, :, 5:7] * k.world.std + k.world.mean  # s, a, r, s', d
            np.testing.assert_allclose(line.get_xydata(), walked)
            np.testing.assert_allclose(line.get_color(), stars.get_facecolors()[i, :3])


def test_pictures_are_of_the_agent_before_and_after_the_online_phase(files, tmp_path, no_plots, monkeypatch):
    offline = run(tmp_path / "a", WIND, files[WIND], "--online-rewards none --encoder-loss reward+q")
    whole = run(tmp_path / "b", WIND, files[WIND], "--encoder-loss reward+q")
    seen = []
    monkeypatch.setattr(shift, "play", lambda _, __, agent, ___: seen.append(weights(agent)) or [])
    monkeypatch.setattr(shift, "plot", lambda *_: None)
    names = [[file.name for file in shift.draw(path)] for path in (offline, whole)]
    assert names == [["shift-offline-phase.png"], ["shift-offline-phase.png", "shift-online-phase.png"]]
    alone, after, before = seen
    acting = [key for key in alone if key.startswith(("encoder", "actor"))]
    assert all(torch.equal(alone[key], before[key]) for key in acting)
    assert not any(torch.equal(alone[key], after[key]) for key in acting)


def test_the_pictures_of_a_run(files, tmp_path, no_plots, capsys):
    path = run(tmp_path, SPARSE, files[SPARSE])
    shift.main([str(path)])
    assert all(Path(name).stat().st_size > 5_000 for name in capsys.readouterr().out.splitlines()[-1].split())
    ended(capsys, shift, [str(tmp_path)], "args.json: No such file or directory; expected the folder of a run")


TABLE_1 = {
    "hidden": 300, "encoder_hidden": 200, "batch_size": 256, "context_size": 64, "meta_batch_size": 4, "lr": 3e-4,
    "discount": 0.99, "tau": 0.005, "updates": 4.0, "steps": 50_000, "reward_scale": 5, "awac_lambda": 100,
    "pearl_weight": 1, "latent": 5, "kl_weight": 1 / 256, "quality": "replay",
}  # fmt: skip
TABLE_2 = {"cheetah-vel": (1600, 100, 30), "ant-dir": (1600, 100, 20)}
TABLE_2 |= dict.fromkeys(("walker-params", "hopper-params", "humanoid-dir"), (1200, 50, 5))


@pytest.mark.parametrize("name", TABLE_2)
def test_defaults_are_the_papers(name):
    args = vars(smac.parse_args(["--env", name, "--no-small"]))
    assert {key: args[key] for key in TABLE_1} == TABLE_1
    row = envs.family(name)
    assert (args["data_size"], args["train_tasks"] or row.train, args["test_tasks"] or row.test) == TABLE_2[name]
    assert args["online_contexts"] == ("offline" if name == "cheetah-vel" else "all")


# -------------------------------------------------------------------------------------------------------- learning
def test_it_learns_to_reach_the_goal_in_new_winds(tmp_path):
    policy = lambda obs, rng: np.clip(2 * ([1, 0] - obs) + 0.7 * rng.standard_normal(obs.shape), -1, 1)
    arrays = collect(WIND, list(range(10)), [10, 11, 12], 400, 20, policy)
    data.save(tmp_path / "d.npz", arrays, {"env": WIND})
    sizes = "--hidden 64 --encoder-hidden 64 --batch-size 64 --context-size 64 --meta-batch-size 4"
    sizes += " --data-size 400 --data-until 400"
    k = build(WIND, tmp_path / "d.npz", f"{sizes} --eval-episodes 4 --lr 0.001")
    untrained, _ = smac.evaluate(k.args, k.agent, k.world)
    for _ in range(600):
        k.update()
    trained, _ = smac.evaluate(k.args, k.agent, k.world)
    for protocol in ("", "offline_"):
        assert trained[f"{protocol}return_mean"] > untrained[f"{protocol}return_mean"] + 5
    rows = k.world.test_rows
    z = k.agent.encoder(rows)[0][:, None].expand(-1, rows.shape[1], -1)
    s, a, r = rows.split(k.agent.split, -1)[:3]
    error = (k.agent.decoder(s, z, a) - r[..., 0]).square().mean()
    assert error < 0.1 * r.var()


@cuda
def test_graph_replay_equals_eager_updates(files, tmp_path, no_plots):
    eager = run(tmp_path / "eager", WIND, files[WIND], "--device cuda --no-graph")
    graph = run(tmp_path / "graph", WIND, files[WIND], "--device cuda")
    for x, y in zip(metrics(eager), metrics(graph), strict=True):
        for key in smac.Agent.METRICS:
            assert x[key] is y[key] is None or math.isclose(x[key], y[key], rel_tol=1e-2, abs_tol=1e-4)
