"""MerPO against loops written from the paper: models, RAC, the outer step, and that tasks do not mix."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import test_focal
import torch
from conftest import SPARSE, TEST, TRAIN, WALKER, WIND, collect, ended
from test_focal import checkpoint, cuda, metrics, moved, random_tensors, weights
from torch.distributions import Normal, kl_divergence

import data
import envs
import merpo
import trained

TINY = "--no-small --hidden 16 --layers 2 --model-hidden 16 --model-layers 2 --batch-size 8 --steps 4 --model-steps 2"
TINY += " --eval-every 2 --eval-episodes 1 --threads 1 --inner-steps 2 --model-adapt-steps 3 --device cpu"


def flags(name, file, more=""):
    one = envs.family(name).differs == "nothing"  # rollouts are longer
    own = f"--rollouts {8 if one else 10} --rollout-buffer 40" if "--no-model" not in more else ""
    own += "" if one else " --meta-batch-size 3 --adapt-steps 3"
    return [*f"--env {name} --data {file} {TINY} {own}".split(), *more.split()]


def build(name, file, more="", device="cpu"):
    """What main builds before its loop, from the same seed."""
    k = SimpleNamespace(args=merpo.parse_args(flags(name, file, more)))
    k.world = merpo.World(k.args, torch.device(device))
    torch.manual_seed(k.args.seed)
    k.agent = merpo.Agent(k.args, k.world)
    k.learn_model, k.learn_policy = k.agent.learn_model, k.agent.learn_policy
    k.rac, k.tasks, k.adam = k.agent.rac, k.agent.rac.tasks, k.agent.rac.optimisers
    return k


def settle(k):
    for tasks in (k.tasks, k.agent.test_tasks):
        tasks.adapt(k.agent.meta_model)


def run(folder, name, file, more=""):
    merpo.main([*flags(name, file, more), "--run-dir", str(folder)])
    (path,) = folder.glob("merpo/*/*/seed*")
    return path


def one_hopper(folder):
    """The file of a dataset of one task."""
    arrays = collect("hopper", [0], [], 120, 40) | {"train_tasks": np.array([0]), "test_tasks": np.array([0])}
    data.save(folder / "d.npz", arrays, {"env": "hopper"})
    return folder / "d.npz"


@pytest.fixture(autouse=True)
def short_fits(monkeypatch):
    """Behaviours are fitted in fewer steps."""
    monkeypatch.setattr(merpo, "BEHAVIOUR_STEPS", 50)


# ------------------------------------------------------------------------------------------ losses, from the page
def test_model_loss_is_minus_log_likelihood():
    mean, log_var, target = random_tensors((2, 5, 3), (2, 5, 3), (2, 5, 3))
    likelihood = Normal(mean, (0.5 * log_var).exp()).log_prob(target).sum(-1).mean(-1)
    constant = 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(merpo.model_loss(mean, log_var, target), -likelihood - constant)


def test_task_models_descend_the_likelihood_and_the_proximal_term(files):
    """The gradients of the last of three adaptation steps against those of Eq. 3's sum, written out."""
    k = build(WALKER, files[WALKER], "--eta 3")
    tasks, index = k.tasks, torch.tensor([2, 0])
    theta = merpo.Models(14, k.world.row.obs_dim, k.world.row.act_dim, 16, 2)
    drawn, seen, phi = [], [], k.agent.meta_model
    optimiser = torch.optim.SGD(theta.parameters(), lr=1e-2)
    step = optimiser.step
    optimiser.step = lambda: seen.append([(p.detach().clone(), p.grad.clone()) for p in theta.parameters()]) or step()
    data_of = k.world.model_data
    k.world.model_data = lambda rows: drawn.append(data_of(rows)) or drawn[-1]
    merpo.start_from(phi, theta, optimiser)
    tasks.fit_models(theta, optimiser, index)
    theta.load_state_dict(dict(zip(theta.state_dict(), (p for p, _ in seen[-1]), strict=True)))
    x, target = drawn[-1]
    anchor = [p.detach().repeat(2, *[1] * (p.dim() - 1)) for p in phi.parameters()]
    loss = merpo.model_loss(*theta(x), target).sum()
    loss = loss + 3 * sum((a - b).square().sum() for a, b in zip(theta.parameters(), anchor, strict=True))
    expected = torch.autograd.grad(loss, list(theta.parameters()))
    assert max((a - b).abs().max() for a, b in zip(theta.parameters(), anchor, strict=True)) > 0
    for (_, ours), theirs in zip(seen[-1], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_models_are_chosen_by_what_they_did_not_learn_from(files, monkeypatch):
    k, seen, model_data = build(WIND, files[WIND]), [], merpo.World.model_data
    monkeypatch.setattr(merpo.World, "model_data", lambda world, rows: seen.append(rows) or model_data(world, rows))
    theta = merpo.Models(len(k.tasks.rows) * merpo.MODELS, *k.world.model_sizes)
    k.tasks.held_out_error(theta)
    ((rows, held),) = zip(seen, [k.tasks.held_out], strict=True)
    assert torch.equal(rows[:: merpo.MODELS], k.tasks.rows[:, -held:])
    place = (k.world.train_rows[0][:, None] == k.tasks.rows[0, -held:]).all(-1).any(1).nonzero()
    assert len(place) == held and place.min() < len(k.world.train_rows[0]) - held  # not the data's last


def test_spreads_are_bounded():
    models, policy = merpo.Models(1, 2, 2, 8, 2), merpo.Policy(1, 2, 2, 8, 2)
    for bias, variance, std in ((99.0, 0.5, 2), (-99.0, -8.0, -5)):
        models.net[-1].bias.data[..., 3:] = policy.net[-1].bias.data[..., 2:] = bias
        assert (models(torch.randn(1, 5, 4))[1] - variance).abs().max() < 1e-3
        assert (policy(torch.randn(5, 2))[1] == std).all()


def test_packed_rows_are_the_datas(files):
    k, stored = build(WALKER, files[WALKER]), data.load(files[WALKER])
    assert stored.terminals[TRAIN].any() and stored.terminals[TEST].any()
    seen = stored.observations[TRAIN].flatten(0, 1)  # no test task's
    torch.testing.assert_close((k.world.mean, k.world.std), (seen.mean(0), seen.std(0)), atol=1e-4, rtol=1e-3)
    for rows, tasks in ((k.world.train_rows, TRAIN), (k.world.test_rows, TEST)):
        s, a, r, s2, d = rows.split(k.world.split, -1)
        for ours, theirs in ((s, stored.observations), (s2, stored.next_observations)):
            torch.testing.assert_close(ours, (theirs[tasks] - k.world.mean) / k.world.std, atol=1e-4, rtol=1e-4)
        assert torch.equal(a, stored.actions[tasks]) and torch.equal(r[..., 0], stored.rewards[tasks])
        assert torch.equal(d[..., 0], stored.terminals[tasks])


# ----------------------------------------------------------------- one iteration against a loop over single transitions
def naive_network(net, n, x):
    layers = [layer for layer in net if hasattr(layer, "weight")]
    for layer in layers:
        x = x @ layer.weight[n] + layer.bias[n, 0]
        x = x if layer is layers[-1] else x.relu()
    return x


def naive_policy(policy, n, s):
    mean, log_std = naive_network(policy.net, n, s).chunk(2)
    return mean, log_std.clamp(-5, 2)


def naive_q(critic, n, tasks, s, a):
    return [naive_network(critic.net, 2 * n + twin, torch.cat([s, a]))[0] for twin in range(2)]


def density(policy, u):
    """Of tanh(u), by 1 - tanh(u)^2 = cosh(u)^-2."""
    return (Normal(policy[0], policy[1].exp()).log_prob(u) + 2 * u.cosh().log()).sum()


def kl(p, q):
    return kl_divergence(Normal(p[0], p[1].exp()), Normal(q[0], q[1].exp())).sum()


def descend(network, loss, rate):
    for p, g in zip(network.parameters(), torch.autograd.grad(loss, list(network.parameters())), strict=True):
        p.data -= rate * g


def naive_step(args, k, index, real, rho, rates, free):
    """Algorithm 1, lines 4 and 5, for tasks one after the other; returns what is recorded."""
    tasks, size, mean = len(index), real.shape[1], lambda values: sum(values) / len(values)
    fixed, m = test_focal.fixed, k.world.split[1]
    count = args.actions
    once, many = fixed(tasks, size, m), fixed(tasks, count * size, m)
    before_tanh = lambda policy, noise: policy[0] + policy[1].exp() * noise
    pi = lambda n, s: naive_policy(k.rac.actor, n, s)
    kept, losses, gaps, qs, betas = k.tasks, [], [], [], []
    for n, task in enumerate(index.tolist()):
        q = lambda s, a, n=n: naive_q(k.rac.critic, n, tasks, s, a)
        share = round(args.real_ratio * size) if args.model else size
        mixed = [row.split(k.world.split) for row in [*real[n, :share], *rho[n, : size - share]]]
        data_rows, rho_rows = ([row.split(k.world.split) for row in rows[n]] for rows in (real, rho))
        errors = []
        for i, (s, a, r, s2, d) in enumerate(mixed):
            with torch.no_grad():
                u2 = before_tanh(pi(n, s2), once[n, i])
                value = min(naive_q(k.rac.target, n, tasks, s2, u2.tanh())) - args.ent * density(pi(n, s2), u2)
                y = r[0] + (0 if d else args.discount * value)
            qs += [q(s, a)]
            errors += [0.5 * sum((x - y) ** 2 for x in qs[-1])]
        with torch.no_grad():
            fresh = [(s, before_tanh(pi(n, s), many[n, count * i + j]))
                     for i, (s, *_) in enumerate(rho_rows) for j in range(count)]  # fmt: skip
        gap = mean([sum(q(s, u.tanh())) for s, u in fresh]) - mean([sum(q(s, a)) for s, a, *_ in data_rows])
        gaps += [gap.item() / 2]
        kept.log_beta[task] += args.beta_lr * (1 if gaps[-1] > args.threshold else -1)
        betas += [kept.log_beta[task].exp().item()]
        unit = mean([abs(x.detach()) for pair in qs[-size:] for x in pair]) if args.relative else 1
        losses += [betas[-1] * unit * gap + mean(errors)]
    descend(k.rac.critic, sum(losses), rates["critic"])
    for slow, fast in zip(k.rac.target.parameters(), k.rac.critic.parameters(), strict=True):
        slow.data = (1 - args.tau) * slow + args.tau * fast.data

    gains, metas = [], []
    for n, task in enumerate(index.tolist()):
        values, kls, sizes = [], [], []
        for i, row in enumerate(rho[n]):
            s = row[: k.world.split[0]]
            u, policy = before_tanh(pi(n, s), once[n, i]), pi(n, s)
            meta = [x.detach() for x in naive_policy(k.agent.meta_policy, 0, s)]
            entropy = args.ent * density(policy, u) if args.actor_entropy else 0
            pair = naive_q(k.rac.critic, n, tasks, s, u.tanh())
            values += [min(pair) - entropy]
            sizes += [abs(x.detach()) for x in pair]
            kls += [kl(policy, meta)]
        likelihood = mean([density(pi(n, s), a.atanh()) for s, a, *_ in (row.split(k.world.split) for row in real[n])])
        lam, alpha = 0 if free else kept.lam[task].item(), kept.alpha[task].item()
        unit = mean(sizes) if args.relative else 1
        held = lam * alpha * likelihood - lam * (1 - alpha) * mean(kls)
        gains += [mean(values) + unit * held]
        metas += [min(mean(kls).item(), 10)]
    behaviours = []
    for n, task in enumerate(index.tolist()):
        states, alpha = [row[: k.world.split[0]] for row in real[n]], kept.alpha[task].item()
        far = mean([kl(naive_policy(k.tasks.behaviour, task, s), pi(n, s)) for s in states])
        behaviours += [min(far.item(), 10)]
        divergence = alpha * behaviours[n] + (1 - alpha) * metas[n]
        kept.lam[task] += args.lambda_lr * (divergence - args.target_divergence)
        kept.lam[task].clamp_(0, 10 * args.lambda_initial)
    descend(k.rac.actor, -sum(gains), rates["actor"])
    log = {"critic_loss": sum(losses) / tasks, "actor_loss": -sum(gains) / tasks, "q_gap": mean(gaps)}
    log |= {"q_mean": mean([x for pair in qs for x in pair]), "beta": mean(betas), "lambda": kept.lam[index].mean()}
    log |= {"alpha": kept.alpha[index].mean().clone(), "d_meta": mean(metas), "d_behaviour": mean(behaviours)}
    return log


def naive_outer(args, k, index, drawn, rate):
    """Algorithm 2, line 17, and Eq. 11; `drawn` are the minibatches in their order."""
    tasks, mean, width = len(index), lambda values: sum(values) / len(values), k.world.split[0]
    for i in range(args.outer_steps):
        rows = drawn.pop(0)
        pi = lambda n, s: [x.detach() for x in naive_policy(k.rac.actor, n, s)]
        far = [mean([kl(pi(n, row[:width]), naive_policy(k.agent.meta_policy, 0, row[:width])) for row in rows[n]])
               for n in range(tasks)]  # fmt: skip
        if args.adaptive and i == 0:
            own = drawn.pop(0)
            for n, task in enumerate(index.tolist()):
                states = [row[:width] for row in own[n]]
                near = mean([kl(naive_policy(k.tasks.behaviour, task, s), pi(n, s)) for s in states])
                alpha = k.tasks.alpha[task] + args.alpha_lr * (near.item() - far[n].item())
                k.tasks.alpha[task] = min(max(alpha.item(), 0.1), 0.5)
        weight = [(k.tasks.lam[task] * (1 - k.tasks.alpha[task])).item() for task in index.tolist()]
        weight = weight if sum(weight) else [1] * tasks  # held to the behaviour only: distilled all the same
        loss = sum(w * x for w, x in zip(weight, far, strict=True)) / sum(weight)
        descend(k.agent.meta_policy, loss, rate)
    for meta, own in (k.agent.meta_q, k.rac.critic), (k.agent.meta_target, k.rac.target):
        for p, q in zip(meta.parameters(), own.parameters(), strict=True):
            for twin in range(2):
                p.data[twin] += args.meta_q_lr * (mean([q.data[2 * n + twin] for n in range(tasks)]) - p.data[twin])
    return {"meta_policy_loss": loss}


ITERATIONS = ["", "--no-model", "--alpha 0 --real-ratio 0.25", "--actor-entropy --inner-steps 2", "--adaptive"]
ITERATIONS += ["--adaptive --alpha-lr 10", "--adaptive --alpha-lr 1e4", "--lambda-lr 1e3", "--target-divergence 1e3"]
ITERATIONS += ["--final-lr 0.5 --outer-steps 2 --actions 3 --relative", "--relative --actor-entropy"]
ITERATIONS += ["--threshold 0 --outer-steps 2 --adaptive --no-model"]
FREE = [("", True), ("--relative --actor-entropy", True)]


@pytest.mark.parametrize(("more", "free"), [*((more, False) for more in ITERATIONS), *FREE])
def test_an_iteration_equals_a_loop_over_single_transitions(files, monkeypatch, more, free):
    sizes = "--hidden 5 --batch-size 4 --inner-steps 1 --ent 0.7 --tau 0.25 --meta-q-lr 0.6 --lambda-initial 2"
    rates = "--lr 0.05 --actor-lr 0.03 --outer-lr 0.2 --beta-lr 0.1 --lambda-lr 0.5"
    rates += " --alpha-lr 0.01" if "--adaptive" in more else ""
    k = build(WIND, files[WIND], f"{sizes} {rates} {more}")
    agent, (d, m) = k.agent.double(), k.world.split[:2]
    with torch.no_grad():
        for net in (k.tasks.behaviour, agent.meta_policy, agent.meta_q, agent.meta_target):
            for p in net.parameters():
                p += 0.3 * torch.randn_like(p)
        for values in (k.tasks.log_beta, k.tasks.lam):  # not the same for all tasks
            values += 0.3 * torch.rand_like(values)
        if "--alpha-lr 1e4" in more:  # nearer to the behaviour than to the meta-policy, or not
            merpo.start_from(agent.meta_policy, k.tasks.behaviour, k.adam["actor"])
        k.tasks.alpha += 0.1 * torch.rand_like(k.tasks.alpha)

    def rows(*shape):
        x = torch.randn(*shape, sum(k.world.split), dtype=torch.float64)
        x[..., d : d + m].tanh_()
        x[..., -1] = (x[..., -1] > 0).double()
        return x

    k.tasks.rows = rows(*k.tasks.rows.shape[:2])
    monkeypatch.setattr(merpo.RAC, "roll_out", lambda self, real: rows(*real.shape[:2]))
    sgd = lambda module, rate: torch.optim.SGD(module.parameters(), lr=torch.tensor(rate, dtype=torch.float64))
    k.rac.optimisers = {"critic": sgd(k.rac.critic, 0.05), "actor": sgd(k.rac.actor, 0.03)}
    agent.optimisers = k.rac.optimisers | {"meta_policy": sgd(agent.meta_policy, 0.2)}
    k.rac.combo = free
    drawn, seen = [], {name: getattr(merpo.Tasks, name) for name in ("draw", "imagined")}
    for name, draw in seen.items():
        note = lambda self, index, n, name=name, draw=draw: (
            drawn.append((name, index, draw(self, index, n))) or drawn[-1][2]
        )
        monkeypatch.setattr(merpo.Tasks, name, note)
    agent.step.fill_(k.args.model_steps)  # stage 1 is over
    agent.metrics.zero_()
    expected = SimpleNamespace(agent=copy.deepcopy(agent, {id(k.world): k.world}), world=k.world)
    expected.rac, expected.tasks = expected.agent.rac, expected.agent.rac.tasks
    monkeypatch.setattr(torch, "randn_like", lambda x: test_focal.fixed(*x.shape))
    agent.learn_policy()

    names, index = [name for name, *_ in drawn], drawn[0][1]
    assert len(set(index.tolist())) == 3 and all(torch.equal(index, other) for _, other, _ in drawn)
    rho, inner = ("imagined", ["draw", "draw", "imagined"]) if k.args.model else ("draw", ["draw"])
    outer = [rho] + ["draw"] * k.args.adaptive + [rho] * (k.args.outer_steps - 1)
    assert names == inner * k.args.inner_steps + outer
    drawn = [batch for *_, batch in drawn]
    fall = 1 - (1 - k.args.final_lr) / k.args.steps
    rates = {"critic": 0.05 * fall, "actor": 0.03 * fall}
    with torch.no_grad():  # the tasks' policies and critics begin at the meta ones
        pairs = (expected.rac.actor, expected.agent.meta_policy), (expected.rac.critic, expected.agent.meta_q)
        for own, meta in (*pairs, (expected.rac.target, expected.agent.meta_target)):
            for p, q in zip(own.parameters(), meta.parameters(), strict=True):
                p.copy_(q.repeat(3, 1, 1))
    for _ in range(k.args.inner_steps):
        batches = [drawn.pop(0) for _ in range(3 if k.args.model else 1)][-2:]  # the first starts the rollouts
        log = naive_step(k.args, expected, index, batches[0], batches[-1], rates, free)
    log |= naive_outer(k.args, expected, index, drawn, 0.2 * fall)
    assert not drawn
    for name, p in agent.named_parameters():
        if not name.startswith(("rac.models", "rac.behaviour")):
            note = lambda text, name=name: f"{name}: {text}"
            torch.testing.assert_close(p, expected.agent.get_parameter(name), rtol=1e-7, atol=1e-9, msg=note)
    for name in ("log_beta", "lam", "alpha"):
        torch.testing.assert_close(getattr(k.tasks, name), getattr(expected.tasks, name), rtol=1e-6, atol=1e-8)
    values = [float(torch.as_tensor(log.get(name, 0)).detach()) for name in merpo.Agent.METRICS]
    assert agent.metrics[0].tolist() == pytest.approx(values, rel=1e-5, abs=1e-6)
    assert agent.metrics[1].tolist() == [name in log for name in merpo.Agent.METRICS]


# ---------------------------------------------------------------------------------------------------------- stage 1
def test_models_recover_the_dynamics_of_each_task(tmp_path):
    """s' = s + 0.1 a + wind: the wind of a task, which no other model knows, is in its own models."""
    arrays = collect(WIND, list(range(6)), [6, 7], 400, 20)
    data.save(tmp_path / "d.npz", arrays, {"env": WIND})
    more = "--model-steps 60 --model-adapt-steps 25 --model-task-lr 0.003 --batch-size 64 --model-hidden 32"
    k = build(WIND, tmp_path / "d.npz", f"{more} --meta-batch-size 6 --model-lr 1 --eta 0")
    for _ in range(60):
        k.learn_model()
    settle(k)
    for tasks, winds in ((k.tasks, arrays["tasks"][:6]), (k.agent.test_tasks, arrays["tasks"][6:])):
        assert tasks.errors[1] < 0.5 * tasks.errors[0]
        n = len(winds)
        x, _ = k.world.model_data(tasks.rows)
        mean = tasks.models(x.repeat_interleave(5, 0))[0] * k.world.change_std + k.world.change_mean
        moved_by = (mean[..., :2] * k.world.std).view(n, 5, -1, 2)
        wind = (moved_by - 0.1 * tasks.rows[:, None, :, 2:4]).mean(2)
        assert (wind - torch.as_tensor(winds)[:, None]).abs().max() < 0.012


def test_the_best_five_by_held_out_error_are_kept(files, monkeypatch):
    monkeypatch.setattr(merpo.Tasks, "fit_models", lambda *args: None)
    k = build(WIND, files[WIND])
    for j, p in enumerate(k.agent.meta_model.net[-1].bias):  # models 1 and 4 are far off
        p.data += 50.0 if j in (1, 4) else 0.0
    settle(k)
    kept = k.tasks.models.net[0].weight.view(4, 5, -1)
    source = k.agent.meta_model.net[0].weight.flatten(1)
    for task in kept:
        chosen = {int((source == w).all(1).nonzero()[0]) for w in task}
        assert chosen == {0, 2, 3, 5, 6}


def test_held_out_rows_are_never_trained_on(files):
    k = build(WIND, files[WIND])
    seen, model_data = [], k.world.model_data
    k.world.model_data = lambda rows: seen.append(rows) or model_data(rows)
    for _ in range(20):
        k.learn_model()
    held = k.tasks.rows[:, -k.tasks.held_out :].flatten(0, 1)
    used = torch.cat([rows.flatten(0, -2) for rows in seen])
    assert k.tasks.held_out == 6 and not (used[:, None] == held[None]).all(-1).any()
    assert k.tasks.bootstrap.max() < 54 and 0.5 < len(k.tasks.bootstrap[0].unique()) / 54 < 0.8
    for rows in seen:  # and each model on its own bootstrap, in every task
        for i, drawn in enumerate(rows):
            own = k.tasks.rows[:, k.tasks.bootstrap[i % 7]].flatten(0, 1)
            assert (drawn[:, None] == own[None]).all(-1).any(1).all()


# -------------------------------------------------------------------------------------------------------------- RAC
def started(files, name=WIND, more=""):
    k = build(name, files[name], more)
    settle(k)
    k.index = torch.tensor([2, 0, 3])
    k.rac.take_up(k.index)
    k.rac.start(k.agent.meta_policy, k.agent.meta_q, k.agent.meta_target)
    return k


def step(k):
    return k.rac.step(k.agent.meta_policy)


def test_tasks_start_from_the_meta_policy_with_their_own_models(files):
    k = started(files)
    step(k)
    k.agent.meta_target.net[0].bias.data += 1  # as if Q_meta had moved on from it
    assert all(float(state["step"]) > 0 for adam in k.adam.values() for state in adam.state.values())
    k.rac.start(k.agent.meta_policy, k.agent.meta_q, k.agent.meta_target)
    assert not any(value.any() for adam in k.adam.values() for state in adam.state.values() for value in state.values())
    pairs = (k.rac.actor, k.agent.meta_policy), (k.rac.critic, k.agent.meta_q), (k.rac.target, k.agent.meta_target)
    for slots, source in pairs:
        for a, b in zip(slots.parameters(), source.parameters(), strict=True):
            for i in range(3):
                assert torch.equal(a.view(3, -1, *a.shape[1:])[i], b)
    own = k.tasks.models.net[0].weight.view(4, 5, -1)
    assert torch.equal(k.rac.models.net[0].weight.view(3, 5, -1), own[k.index])
    own = k.tasks.behaviour.net[0].weight
    assert torch.equal(k.rac.behaviour.net[0].weight, own[k.index])


def test_tasks_do_not_mix(files):
    def after(change):
        k = started(files)
        if change:
            k.tasks.rows[3] = k.tasks.rows[3].flip(0) + 1.0
        torch.manual_seed(1)
        for _ in range(3):
            step(k)
        return k

    plain, other = after(False), after(True)
    for (name, a), b in zip(plain.rac.named_parameters(), other.rac.parameters(), strict=True):
        if name.startswith("tasks."):
            continue
        a, b = a.view(3, -1), b.view(3, -1)  # what is a task's lies side by side
        assert torch.equal(a[:2], b[:2])
    networks = moved(weights(plain.rac), weights(other.rac))
    assert {"actor", "critic", "target"} <= networks
    for key in ("lam", "log_beta", "model_rows", "model_count"):
        a, b = getattr(plain.tasks, key), getattr(other.tasks, key)
        assert torch.equal(a[:3], b[:3]) and torch.equal(a[1], getattr(started(files).tasks, key)[1])


def test_model_rollouts(files):
    k = started(files, WALKER, "--rollout-length 3")
    with torch.no_grad():
        k.rac.actor.net[-1].bias[..., k.world.split[1] :] = -5  # hardly any noise
        k.rac.actor.net[-1].weight[..., k.world.split[1] :] = 0
    rows = k.rac.roll_out(k.tasks.draw(k.index, 10))
    noise = rows.split(k.world.split, -1)[1].atanh() - k.rac.actor(rows.split(k.world.split, -1)[0])[0]
    assert noise.std().item() == pytest.approx(math.exp(-5), rel=0.2)  # it acts by samples
    assert rows.shape == (3, 30, k.tasks.rows.shape[-1])
    s, a, r, s2, d = rows.split(k.world.split, -1)
    fell = envs.family(WALKER).terminated((s2 * k.world.std + k.world.mean).flatten(0, 1).numpy())
    assert torch.equal(d.flatten() > 0, torch.as_tensor(fell)) and a.abs().max() <= 1
    torch.testing.assert_close(a, k.rac.actor(s)[0].tanh(), atol=0.05, rtol=0)  # the policy's own
    starts = s[:, :10]
    stored = k.tasks.rows.split(k.world.split, -1)[0]
    for i, task in enumerate(k.index):
        assert all((row == stored[task]).all(1).any() for row in starts[i])
        for t in (10, 20):  # goes on from where it was, or begins anew
            expected = torch.where(d[i, t - 10 : t] > 0, starts[i], s2[i, t - 10 : t])
            assert torch.equal(s[i, t : t + 10], expected)
    k.rac.models.net[-1].weight.data.zero_()
    bias = k.rac.models.net[-1].bias.data.zero_()
    bias[..., 18:] = -50.0  # no noise
    bias[..., 0] = -((1.3 / k.world.std[0] + k.world.change_mean[0]) / k.world.change_std[0])  # the height drops
    assert k.rac.roll_out(k.tasks.draw(k.index, 10))[..., -1].all()


def test_rollouts_go_where_the_models_say(files, monkeypatch):
    k = started(files, WIND, "--rollout-length 2")
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    s, a, r, s2, _ = k.rac.roll_out(k.tasks.draw(k.index, 10)).split(k.world.split, -1)
    for i in (0, 10):
        part = slice(i, i + 10)
        x = torch.cat([s, a], -1)[:, part].reshape(15, 2, -1)  # five models a task
        change = k.rac.models(x)[0].view(3, 10, -1) * k.world.change_std + k.world.change_mean
        ours = torch.cat([s2 - s, r], -1)[:, part]
        torch.testing.assert_close(ours, change, rtol=1e-3, atol=1e-4)
        assert ours.std() > 0.01


def test_the_models_noise_is_as_wide_as_they_say(files):
    k = started(files)
    k.rac.models.net[-1].weight.data.zero_()
    k.rac.models.net[-1].bias.data[..., :3] = 0.0
    k.rac.models.net[-1].bias.data[..., 3:] = -2.0
    std = (0.5 * k.rac.models(torch.zeros(15, 1, 4))[1]).exp()[0, 0, 2]
    r = k.rac.roll_out(k.tasks.draw(k.index, 2_000)).split(k.world.split, -1)[2]
    assert 0.3 < std < 0.4 and (r.std() / k.world.change_std[2]).item() == pytest.approx(std.item(), rel=0.05)


def test_each_model_makes_an_equal_share(files):
    k = started(files)
    k.rac.models.net[-1].weight.data.zero_()
    bias = k.rac.models.net[-1].bias.data.zero_()
    bias[..., 3:] = -50.0
    bias.view(3, 5, -1)[..., 2] = torch.arange(15.0).view(3, 5)  # the reward says which model it was
    rows = k.rac.roll_out(k.tasks.draw(k.index, 10))
    which = (rows[..., 4] - k.world.change_mean[2]) / k.world.change_std[2]
    for i in range(3):
        values, counts = which[i].round(decimals=1).unique(return_counts=True)
        assert counts.tolist() == [2] * 5
        torch.testing.assert_close(values, torch.arange(5.0) + 5 * i, atol=0.1, rtol=0.02)


def test_the_imagined_buffer_forgets_the_oldest(files):
    k = build(WIND, files[WIND])
    for value in range(1, 6):
        k.tasks.imagine(torch.tensor([2, 0]), torch.full((2, 10, k.tasks.rows.shape[-1]), float(value)))
    assert k.tasks.model_count.tolist() == [50, 0, 50, 0]
    assert k.tasks.model_rows[2, :, 0].tolist() == [5.0] * 10 + [2.0] * 10 + [3.0] * 10 + [4.0] * 10
    assert not k.tasks.model_rows[1].any()
    drawn = k.tasks.imagined(torch.tensor([0]), 300)
    assert set(drawn.flatten().tolist()) == {2.0, 3.0, 4.0, 5.0}
    k.tasks.imagine(torch.tensor([1]), torch.full((1, 10, k.tasks.rows.shape[-1]), 7.0))
    assert set(k.tasks.imagined(torch.tensor([1]), 300).flatten().tolist()) == {7.0}  # none of what is still empty


# --------------------------------------------------------------------------------------------------- the outer step
def test_who_learns(files):
    k = build(WIND, files[WIND], "--model-lr 0.05")
    before, phi = weights(k.agent), [p.clone() for p in k.agent.meta_model.parameters()]
    k.learn_model()
    assert moved(before, weights(k.agent)) == {"meta_model"}
    for p, old, theta in zip(k.agent.meta_model.parameters(), phi, k.agent.task_models[0].parameters(), strict=True):
        mean = theta.unflatten(0, (-1, len(old))).mean(0)  # of a model's copies in the tasks of the meta-batch
        torch.testing.assert_close(p, old + 0.05 * (mean - old))  # line 6
    settle(k)
    before = weights(k.agent)
    k.learn_policy()
    after = weights(k.agent)
    assert moved(before, after) == {"meta_policy", "meta_q", "meta_target", "rac"}
    changed = [key.split(".")[:2] for key in before if not torch.equal(before[key], after[key])]
    assert {rest for first, rest in changed if first == "rac"} == {"actor", "critic", "target", "models", "behaviour"}


@pytest.mark.parametrize(("tau", "low", "high"), [(0, 0.8, 1.2), (0.005, 1.2, 2.5), (1, 8, 10.5)])
def test_the_target_is_slow_across_meta_iterations(files, tau, low, high):
    """Each step is worth 1, so that Q is at most 10. In 200 steps of tau the target makes 200 tau backups, whether or
    not the critics begin anew at Q_meta every ten of them."""
    more = "--ent 0 --beta-initial 0 --beta-lr 0 --no-model --inner-steps 10 --steps 20 --lr 0.01"
    k = build(WIND, files[WIND], f"{more} --tau {tau} --batch-size 32 --meta-batch-size 4")
    k.tasks.rows[..., 4], k.tasks.rows[..., -1] = 1.0, 0.0
    settle(k)
    for _ in range(20):
        k.learn_policy()
    s, a = k.tasks.rows[:1, :, :2], k.tasks.rows[:1, :, 2:4]
    assert low < k.agent.meta_q(s, a).mean() < high


def test_every_network_has_its_own_learning_rate(files):
    k = build(WIND, files[WIND], "--lr 0.1 --actor-lr 0.2 --outer-lr 0.3 --model-task-lr 0.4")
    test_focal.check_rates(k.agent, critic=0.1, actor=0.2, meta_policy=0.3)
    assert k.agent.task_models[1].param_groups[0]["lr"].item() == pytest.approx(0.4)


def test_rates_fall_to_their_last_share_in_training_and_on_test_tasks(files, monkeypatch):
    k = started(files, WIND, "--final-lr 0.1 --model-steps 2 --steps 4 --adapt-steps 4 --actor-lr 0.01 --outer-lr 0.1")
    rate = lambda optimiser: optimiser.param_groups[0]["lr"].item()
    seen = []
    k.agent.step.fill_(2)  # stage 1 is over
    for _ in range(4):
        k.learn_policy()
        seen.append((rate(k.adam["actor"]), rate(k.agent.optimisers["meta_policy"])))
    share = [0.775, 0.55, 0.325, 0.1]
    assert seen == [pytest.approx((0.01 * x, 0.1 * x)) for x in share]
    used, step_of = [], merpo.RAC.step
    note = lambda self, meta: used.append(rate(self.optimisers["actor"])) or step_of(self, meta)
    monkeypatch.setattr(merpo.RAC, "step", note)
    merpo.evaluate(k.args, k.agent, k.world)
    assert used == pytest.approx([0.01 * x for x in share])


# ----------------------------------------------------------------------------------------------------- evaluation
def test_evaluation_adapts_on_the_task_s_own_data_and_leaves_no_trace(files):
    k = started(files)
    step(k)
    before, state = {key: x.clone() for key, x in k.agent.state_dict().items()}, torch.get_rng_state()
    first = merpo.evaluate(k.args, k.agent, k.world)
    assert sorted(first) == [0, 3] and first[3].shape == (2, 1)
    for key, value in k.agent.state_dict().items():
        assert torch.equal(value, before[key]) or key.startswith("test_tasks")
    assert torch.equal(torch.get_rng_state(), state)
    again = merpo.evaluate(k.args, k.agent, k.world)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    k.agent.test_tasks.rows[0, :, 2:4] = 1.0
    other = merpo.evaluate(k.args, k.agent, k.world)
    assert other[3][0] != first[3][0] and other[3][1] == first[3][1] and np.array_equal(other[0], first[0])


STARTS = [("meta", True, 0.3, False), ("meta-no-init", False, 0.3, False), ("behaviour", False, 1, False)]
STARTS += [("behaviour-init", True, 1, False), ("combo", False, 0.3, True)]


@pytest.mark.parametrize(("start", "initialise", "alpha", "free"), STARTS)
def test_starts_at_test_time(files, monkeypatch, start, initialise, alpha, free):
    """And with the training tasks' mean alpha, lambda and beta."""
    k = started(files, WIND, f"--test-start {start}")
    for values in (k.tasks.alpha, k.tasks.lam, k.tasks.log_beta):
        values.copy_(torch.tensor([0.1, 0.2, 0.3, 0.6]))
    seen = []

    class Watched(merpo.RAC):
        def step(self, meta_policy):
            assert meta_policy is k.agent.meta_policy
            if not seen:
                like_meta = torch.equal(self.actor.net[0].weight[1:], k.agent.meta_policy.net[0].weight)
                seen.extend((like_meta, self.combo))
                for values in (self.tasks.alpha, self.tasks.lam, self.tasks.log_beta):
                    seen.append(values.tolist())
            return super().step(meta_policy)

    monkeypatch.setattr(merpo, "RAC", Watched)
    merpo.evaluate(k.args, k.agent, k.world)
    assert seen == [initialise, free, *(pytest.approx([x, x]) for x in (alpha, 0.3, 0.3))]


def test_a_short_try_out_is_short():
    stages = lambda flags: (lambda args: (args.model_steps, args.steps))(merpo.parse_args(flags.split()))
    assert stages("--small") == (200, 800) and stages("--no-small") == (2_000, 2_000)
    assert stages("--small --steps 40") == (40, 40) and stages("--small --steps 40 --model-steps 90") == (90, 40)
    assert merpo.parse_args(["--small"]).test_start == "behaviour-init"
    assert stages("--small --no-model") == (0, 800) and stages("--small --no-model --model-steps 3") == (3, 800)


def test_a_policy_that_copies_the_data_gets_their_return(tmp_path, monkeypatch):
    monkeypatch.undo()
    policy = lambda obs, rng: np.clip(2 * ([1, 0] - obs) + 0.1 * rng.standard_normal(obs.shape), -1, 1)
    arrays = collect(WIND, [0, 1, 2], [3, 4], 200, 20, policy)
    arrays["returns"] = arrays["rewards"].sum(1) / 10
    data.save(tmp_path / "d.npz", arrays, {"env": WIND})
    k = build(WIND, tmp_path / "d.npz", "--batch-size 64 --hidden 32")
    settle(k)
    returns = merpo.play(k.args, k.agent.test_tasks.behaviour, k.world)
    assert returns.mean(1) == pytest.approx(arrays["returns"][3:], abs=0.8)


# ----------------------------------------------------------------------------------------------------- whole runs
def test_what_a_run_writes(files, tmp_path, capsys):
    path = run(tmp_path, SPARSE, files[SPARSE], "--seed 2")
    names = ["args.json", "metrics.csv", "final.json", "curve.png", "checkpoint.pt", "source.py", "paths.png"]
    left = {"started.py", ".lock"}  # the first is pytest, in some of its modes
    assert {file.name for file in path.iterdir()} - left == set(names)
    rows = metrics(path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[0]["return_mean"] is rows[0]["q_mean"] is rows[1]["model_loss"] is None
    assert all(0 <= row["return_mean"] <= 20 and row["error_after"] > 0 for row in rows[1:])
    assert "meta-policy" in capsys.readouterr().out


@pytest.mark.parametrize("more", ["", "--adaptive", "--no-model"])
def test_same_seed_same_run_and_a_killed_one_goes_on(files, tmp_path, no_plots, monkeypatch, more):
    test_focal.check_resumed(monkeypatch, run, (1, 2), tmp_path, WIND, files[WIND], more)


def test_one_task_goes_on_within_stage_1(tmp_path, no_plots, monkeypatch):
    monkeypatch.setattr(merpo, "play", lambda *args: np.zeros((1, 1)))  # thousand steps in the simulator
    more = "--single rac --model-steps 4 --eval-every 1"
    test_focal.check_resumed(monkeypatch, run, (1, 2), tmp_path, "hopper", one_hopper(tmp_path), more)


def test_test_tasks_never_train(files, tmp_path, no_plots, short_trajectories):
    plain = run(tmp_path / "a", WIND, files[WIND])
    arrays = test_focal.load_arrays(files[WIND])
    arrays["actions"][TEST] = 0.5
    arrays["rewards"][TEST] += 3.0
    data.save(tmp_path / "other.npz", arrays, {"env": WIND})
    other = run(tmp_path / "b", WIND, tmp_path / "other.npz")
    a, b = (checkpoint(path)["agent"] for path in (plain, other))
    for key in a:
        assert torch.equal(a[key], b[key]) or key.startswith("test_tasks"), key
    assert metrics(plain)[-1]["return_mean"] != metrics(other)[-1]["return_mean"]
    flags = "--test-trajectories 2 --adapt-lr 1e-4 --test-start behaviour --adapt-steps 2"
    tested = checkpoint(run(tmp_path / "c", WIND, files[WIND], flags))["agent"]  # benchmark/retest.py relies on this
    assert all(torch.equal(a[key], tested[key]) for key in a if not key.startswith("test_tasks"))


@pytest.mark.parametrize("single", ["combo", "combo-3", "rac"])
def test_one_task_alone(tmp_path, no_plots, capsys, single):
    file = one_hopper(tmp_path)
    path = run(tmp_path / "a", "hopper", file, f"--single {single}")
    last = metrics(path)[-1]
    assert last["lambda"] == last["beta"] == 1 and last["alpha"] == pytest.approx(0 if single == "combo-3" else 0.4)
    assert 0 < last["return_mean"] != last["meta_return_mean"]
    a, b = (checkpoint(path)["agent"][f"{who}.net.0.weight"] for who in ("meta_policy", "rac.actor"))
    assert not torch.equal(a, b)
    _, args, _, agent = trained.load_run(path)
    assert args.single == single and torch.equal(agent.rac.actor.net[0].weight, b)
    assert agent.rac.combo == (single == "combo")
    good = run(tmp_path / "b", "hopper", file, f"--single rac --meta-policy {path}")
    assert torch.equal(checkpoint(good)["agent"]["meta_policy.net.0.weight"], b)
    stored = checkpoint(path)
    stored["args"]["env"] = "walker2d"
    torch.save(stored, path / "checkpoint.pt")
    argv = [*flags("hopper", file, f"--single rac --meta-policy {path}"), "--run-dir", str(path)]
    ended(capsys, merpo, argv, f"{path}: not a run of hopper with --single")


def test_a_meta_policy_from_other_data_does_the_same_in_the_same_state(tmp_path, no_plots):
    """Though observations are standardised otherwise there."""
    more = "--single rac"
    path = run(tmp_path / "a", "hopper", one_hopper(tmp_path), more)
    arrays = test_focal.load_arrays(tmp_path / "d.npz")
    scale = {key: 2 * arrays[key] + np.arange(11) for key in ("observations", "next_observations")}
    data.save(tmp_path / "other.npz", arrays | scale, {"env": "hopper"})
    k = build("hopper", tmp_path / "other.npz", f"{more} --meta-policy {path}")
    merpo.load_policy(k.args, k.agent.meta_policy, k.world)
    stored = checkpoint(path)
    mean, std = stored["standardisation"]
    assert not torch.allclose(mean, k.world.mean) and not torch.allclose(std, k.world.std)
    s = torch.as_tensor(arrays["observations"])
    there, here = (s - mean) / std, (s - k.world.mean) / k.world.std
    policy = copy.deepcopy(k.agent.meta_policy)
    policy.load_state_dict({key: stored["agent"][f"rac.actor.{key}"] for key in policy.state_dict()})
    for a, b in zip(policy(there), k.agent.meta_policy(here), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert a.std(1).max() > 1e-3  # it depends on the state


def test_the_models_of_one_task_learn_from_end_to_end(tmp_path):
    """By one Adam, without a pull back to where an iteration began."""
    k = build("hopper", one_hopper(tmp_path), "--single rac --model-adapt-steps 3")
    plain, drawn, data_of = copy.deepcopy(k.agent.meta_model), [], k.world.model_data
    adam = torch.optim.Adam(plain.parameters(), lr=k.args.model_task_lr)
    k.world.model_data = lambda rows: drawn.append(data_of(rows)) or drawn[-1]
    for _ in range(4):
        k.learn_model()
    assert len(drawn) == 12
    for x, target in drawn:
        adam.zero_grad()
        merpo.model_loss(*plain(x), target).sum().backward()
        adam.step()
    for ours, theirs in zip(k.agent.meta_model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_test_task_s_own_rates_and_batches(files, monkeypatch):
    k = build(WIND, files[WIND], "--adapt-steps 3 --lr 1e-2 --actor-lr 1e-2 --adapt-batch-size 7")
    settle(k)
    seen, begin = [], merpo.begin_test
    monkeypatch.setattr(merpo, "begin_test", lambda *args: seen.append(begin(*args)) or seen[-1])
    for k.args.adapt_lr, rate in ((None, 1e-2), (8e-5, 8e-5)):
        merpo.evaluate(k.args, k.agent, k.world)
        assert k.args.lr == k.args.actor_lr == 1e-2 and k.args.batch_size != 7
        rac = seen.pop()
        rac.evaluate_policy = lambda s_rho, s, a, rows: {"sizes": [x.shape[:2] for x in (s_rho, s, a, rows)]}
        rac.improve_policy = lambda s_rho, s, a, policy: {}
        assert rac.step(k.agent.meta_policy)["sizes"] == [(2, 7)] * 4
        for adam in rac.optimisers.values():
            assert adam.param_groups[0]["lr"].item() == pytest.approx(rate)


def test_one_task_is_one_task(tmp_path):
    arrays = {key: np.concatenate([value, value]) for key, value in collect("hopper", [0], [], 40, 20).items()}
    arrays |= {"train_tasks": np.array([0, 1]), "test_tasks": np.array([0, 1])}
    data.save(tmp_path / "d.npz", arrays, {"env": "hopper"})
    with pytest.raises(data.DataError, match="--single: expected data of one training task, found 2"):
        build("hopper", tmp_path / "d.npz", "--single rac")


def test_few_trajectories(files, short_trajectories):
    with pytest.raises(data.DataError, match="--test-trajectories.*4 of 20 steps each, of the 60 rows"):
        build(WIND, files[WIND], "--test-trajectories 4")
    k, stored = build(WIND, files[WIND], "--test-trajectories 2"), data.load(files[WIND])
    assert k.world.train_rows.shape[1] == 60 and k.world.test_rows.shape[1] == 40
    s = k.world.test_rows[..., :2] * k.world.std + k.world.mean
    expected = stored.observations[TEST][:, [*range(20), *range(40, 60)]]
    torch.testing.assert_close(s, expected, atol=1e-5, rtol=1e-4)
    assert k.world.behaviour == pytest.approx(stored.returns[TEST].mean(), rel=1e-5)
    assert len(k.world.train_rows) == len(TRAIN)


TABLE_2 = {
    "hidden": 300, "layers": 5, "batch_size": 256, "inner_steps": 10, "adapt_steps": 100, "model_lr": 5e-2, "ent": 0.2,
    "model_task_lr": 1e-4, "model_adapt_steps": 25, "lambda_lr": 1, "target_divergence": 0.05, "beta_lr": 1e-3,
    "alpha": 0.4, "outer_lr": 1e-3, "real_ratio": 0.5, "rollout_length": 1, "beta_initial": 1, "steps": 2_000,
}  # fmt: skip
COLUMNS = ("discount", "meta_batch_size", "lr", "actor_lr", "lambda_initial", "threshold")
BY_FAMILY = {
    WALKER: (0.99, 8, 1e-3, 1e-3, 5, 5),
    "cheetah-fwd-back": (0.99, 2, 1e-3, 5e-4, 100, 10),
    "ant-fwd-back": (0.99, 2, 8e-4, 5e-4, 100, 10),
    WIND: (0.9, 8, 1e-3, 1e-3, 5, 10),
}


@pytest.mark.parametrize("name", BY_FAMILY)
def test_defaults_are_the_papers(name):
    args = vars(merpo.parse_args(["--env", name, "--no-small"]))
    assert {key: args[key] for key in TABLE_2} == TABLE_2
    assert tuple(args[key] for key in COLUMNS) == BY_FAMILY[name]


@cuda
@pytest.mark.parametrize("more", ["", "--adaptive"])
def test_graph_replay_equals_eager_updates(files, tmp_path, no_plots, more):
    more = f"--device cuda --model-steps 6 --steps 8 {more}"
    eager = run(tmp_path / "eager", WIND, files[WIND], f"{more} --no-graph")
    graph = run(tmp_path / "graph", WIND, files[WIND], more)
    for x, y in zip(metrics(eager), metrics(graph), strict=True):
        for key in merpo.Agent.METRICS:
            assert x[key] is y[key] is None or math.isclose(x[key], y[key], rel_tol=1e-2, abs_tol=1e-4)
