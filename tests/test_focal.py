"""FOCAL against float64 loops written from the paper, who trains whom, and whole runs on tiny datasets."""

import copy
import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SPARSE, TEST, TRAIN, WALKER, WIND, collect, ended
from torch.distributions import Normal, kl_divergence

import data
import envs
import focal
import focal_pp

TINY = "--hidden 16 --encoder-hidden 16 --batch-size 8 --context-size 8 --meta-batch-size 3 --latent 3"
TINY += " --steps 6 --eval-every 3 --eval-episodes 1 --encoder-steps 4 --device cpu --threads 1 --no-small --letter"
METRICS = focal.Agent.METRICS
RETURNS = ["return_mean", "return_std", "return_low", "return_high"]
COLUMNS = ["step", "seconds", *METRICS, *RETURNS, *(f"train_{name}" for name in RETURNS), "esr", "rms", "variance"]
COLUMNS += ["train_esr", "train_rms", "train_variance"]
REGULARISED = "--alpha 50 --tune-alpha --value-penalty"


CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def cuda(test):
    return CUDA[0](CUDA[1](test))


def load_arrays(file):
    with np.load(file) as stored:
        return {key: stored[key] for key in stored.files if key != "meta"}


def changed(file, path, name, **arrays):
    """A copy of a dataset with some arrays replaced."""
    data.save(path, load_arrays(file) | arrays, {"env": name})
    return path


def flags(name, file, more=""):
    return ["--env", name, "--data", str(file), *TINY.split(), *more.split()]


def build(name, file, more="", device="cpu", script=None):
    """What `train` builds before its loop, from the same seed."""
    script = script or focal
    k = SimpleNamespace(args=script.parse_args(flags(name, file, more)))
    k.world = focal.World(k.args, torch.device(device))
    torch.manual_seed(k.args.seed)
    k.batches = focal.Batches(k.args, k.world.train_rows, k.world.split)
    k.agent = script.Agent(k.args, k.batches)
    k.optimisers, k.update = k.agent.optimisers, k.agent.update
    return k


def run(folder, name, file, more="", script=None):
    script = script or focal
    script.main([*flags(name, file, more), "--run-dir", str(folder)])
    (path,) = folder.glob(f"{script.__name__}/*/*/seed*")
    return path


def weights(agent):
    return {key: value.detach().cpu().clone() for key, value in agent.named_parameters()}


def moved(before, after):
    """The networks of which some weights differ."""
    return {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}


def same(a, b):
    """Whether two networks have the same weights."""
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def assert_equal(a, b):
    """Bit-equal nested dictionaries and lists of tensors and values."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def checkpoint(path):
    return torch.load(path / "checkpoint.pt", weights_only=True)


def metrics(path, but=("seconds",)):
    """Rows without these columns; None for nan, which would not equal itself."""
    with open(path / "metrics.csv") as file:
        rows = [{key: float(value) for key, value in row.items() if key not in but} for row in csv.DictReader(file)]
    return [{key: None if math.isnan(value) else value for key, value in row.items()} for row in rows]


# ------------------------------------------------------------------------------------------ losses, from the page
LAWS = {"inverse-square": lambda d, eps: 1 / (d**2 + eps), "inverse": lambda d, eps: 2 / (d + eps)}
LAWS |= {"linear": lambda d, eps: -8 * d, "square": lambda d, eps: -16 * d**2}  # Table 5b


def eq13(z_i, z_j, task, beta, law, eps):
    total, m, latent = 0, *z_i.shape
    for i in range(m):
        for j in range(m):
            d2 = sum((z_i[i, k] - z_j[j, k]) ** 2 for k in range(latent)) / latent
            total = total + (d2 if task[i] == task[j] else beta * LAWS[law](d2**0.5, eps))
    return total / m**2


def random_tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("law, cost", [("inverse-square", 10), ("inverse", 20), ("linear", 0), ("square", 0)])
def test_distance_metric_loss_where_embeddings_coincide(law, cost):
    z, same = torch.full((3, 2), 0.5, requires_grad=True), torch.eye(3, dtype=torch.bool)
    loss = focal.dml_loss(z, z.detach().clone(), same, 1.0, law, 0.1)
    torch.testing.assert_close(loss.item(), 6 / 9 * cost, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_dual_kl_where_the_discriminator_is_sure():
    assert focal.kl_dual(torch.tensor([-500.0]), torch.tensor([0.0])).isfinite().all()  # g = 0


# ------------------------------------------------------------------------------------------------------- networks
def test_the_actors_spread_is_bounded():
    actor = focal.Actor(3, 2, 2, 8)
    s, z = torch.randn(50, 3), torch.randn(50, 2)
    for bias, bound in ((99, 2), (-99, -5)):
        actor.net[-1].bias.data[2:] = bias
        policy = actor(s, z)
        assert (policy[1] == bound).all() and focal.sample_tanh_gaussian(*policy)[1].isfinite().all()


# ------------------------------------------------------------------- one update against a loop over single transitions
RATE, NOISE = 0.25, 0.3
CASES = ["--alpha 0", "--alpha 2", "--alpha 2 --coupled", "--alpha 2 --value-penalty", "--alpha 2 --no-next-obs"]
CASES += [
    "--alpha 2 --tune-alpha --alpha-lr 3 --dml inverse --eps 0.3",
    "--alpha 2 --value-penalty --coupled --tune-alpha",
]
PEARL = "--encoder probabilistic --encoder-loss bellman"
CASES += ["--alpha 2 --encoder probabilistic --kl-weight 0.3", f"--alpha 0 {PEARL}", f"--alpha 2 {PEARL}"]
CASES += ["--alpha 2 --tune-alpha --alpha-max 1 --alpha-lr 0.1", "--alpha 2 --tune-alpha --target-divergence 1e3"]
CASES += ["--alpha 0 --dml linear --beta 3", "--alpha 0 --dml square", "--alpha 2 --final-lr 0.5"]
CASES += ["--actor clone", "--actor clone --coupled"]


def fixed(*shape, **_):
    """Stands for torch.randn: numbers from -1.5 to 1.5 that depend on the shape only."""
    shape = shape[0] if isinstance(shape[0], torch.Size) else shape
    return torch.linspace(0, 7.7 * math.prod(shape), math.prod(shape), dtype=torch.float64).sin().view(shape) * 1.5


def descend(network, loss, rate=RATE, retain=False):
    parameters = [p for p in network.parameters() if p.requires_grad]
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=retain), strict=True):
        p.data -= rate * g


def q_values(critic, s, z, a):
    values = []
    for twin in range(2):
        x = torch.cat([s, z, a])
        for layer in critic.net:
            x = x @ layer.weight[twin] + layer.bias[twin, 0] if hasattr(layer, "weight") else x.relu()
        values.append(x[0])
    return values


def shares(*shape, **_):
    """Stands for torch.rand."""
    return fixed(*shape) / 3 + 0.5


def policy(agent, s, z, noise=NOISE):
    """One action and its log density."""
    mu, log_std = agent.actor.net(torch.cat([s, z])).chunk(2)
    u = mu + log_std.exp() * noise
    return u.tanh(), (Normal(mu, log_std.exp()).log_prob(u) - (1 - u.tanh() ** 2).log()).sum()


def naive_divergence(agent, s, z, a_pi, a):
    g = lambda a: agent.discriminator(torch.cat([s, z, a]))[0].exp().log1p()
    return (g(a_pi) + 1e-8).log() + 1 - g(a)


def naive_value(args, agent, n, batch, z):
    """What the nth transition of the batch leads to, but for the discount."""
    i, (_, _, _, s2, _, _, a2_data, has_next) = batch[n]
    a2, log_pi = policy(agent, s2, z[i])
    value = min(q_values(agent.target, s2, z[i], a2)) - log_pi
    if args.value_penalty and has_next:
        value = value - agent.alpha.item() * naive_divergence(agent, s2, z[i], a2, a2_data)
    return value


def naive_actor(args, agent, batch, z, rate):
    """Algorithm 1, lines 15 to 18; returns what they measure."""
    mean, discriminator = lambda values: sum(values) / len(batch), torch.zeros(())
    steps = args.discriminator_steps
    noise, mix = fixed(steps, len(batch), agent.actor.net[-1].out_features // 2), shares(steps, len(batch), 1)
    for k in range(steps if agent.discriminator else 0):
        losses, norms = [], []
        for n, (i, (s, a, *_)) in enumerate(batch):
            a_pi = policy(agent, s, z[i], noise[k, n])[0].detach()
            between = (mix[k, n] * a + (1 - mix[k, n]) * a_pi).requires_grad_(True)
            logit = agent.discriminator(torch.cat([s, z[i], between]))
            norm = torch.autograd.grad(logit, between, create_graph=True)[0].norm()
            losses += [-naive_divergence(agent, s, z[i], a_pi, a) + (5 * (norm - 1) ** 2 if norm > 1 else 0)]
            norms += [norm.item()]
        assert max(norms) > 1 and (min(norms) < 1 or args.encoder == "probabilistic")
        discriminator = mean(losses)
        descend(agent.discriminator, discriminator, RATE / 1000)

    losses, divergences, alpha = [], [], agent.alpha.item()
    for i, (s, a, *_) in batch:
        a_pi, log_pi = policy(agent, s, z[i])
        divergences += [naive_divergence(agent, s, z[i], a_pi, a) if agent.discriminator else torch.zeros(())]
        losses += [log_pi - min(q_values(agent.critic, s, z[i], a_pi)) + alpha * divergences[-1]]
        if args.actor == "clone":
            mu, log_std = agent.actor.net(torch.cat([s, z[i]])).chunk(2)
            a = a.clamp(-0.999, 0.999)
            losses[-1] = -(Normal(mu, log_std.exp()).log_prob(a.atanh()) - (1 - a**2).log()).sum()
    descend(agent.actor, mean(losses), rate)
    if args.tune_alpha:
        alpha += args.alpha_lr * (mean(divergences).item() - args.target_divergence)
        agent.alpha.fill_(min(max(alpha, 0), args.alpha_max))
    noted = {"actor_loss": mean(losses), "divergence": mean(divergences)}
    return noted | ({"discriminator_loss": discriminator} if agent.discriminator else {})


def naive_embedding(args, agent, split, rows, noise):
    """z and its KL of one context."""
    out = []
    for s, a, r, s2, *_ in (row.split(split) for row in rows):
        out += [agent.encoder.net(torch.cat([s, a, s2, r] if args.next_obs else [s, a, r]))]
    if args.encoder != "probabilistic":
        return sum(torch.tanh(x) for x in out) / len(rows), torch.zeros(())
    mu, var = zip(*((x[: args.latent], x[args.latent :].exp().log1p()) for x in out), strict=True)
    var_c = 1 / sum(1 / v for v in var)
    mu_c = var_c * sum(m / v for m, v in zip(mu, var, strict=True))
    return mu_c + var_c.sqrt() * noise, kl_divergence(Normal(mu_c, var_c.sqrt()), Normal(0, 1)).sum()


def naive_update(args, agent, split, task, b, c_i, c_j, next_value, learn_actor):
    """Algorithm 1, lines 9 to 20, one transition at a time, by plain gradient descent; returns what it measures."""
    batch = [(i, transition.split(split)) for i, rows in enumerate(b) for transition in rows]
    rate = RATE * (1 - (1 - args.final_lr) / args.steps)  # of actor and critic, at the first step
    coupled = args.coupled or args.encoder_loss == "bellman"
    noise = fixed(len(task) * (2 if args.encoder_loss == "dml" else 1), args.latent)
    embed = lambda *contexts: [naive_embedding(args, agent, split, *x) for x in zip(*contexts, strict=True)]
    z_i, kl = (torch.stack(x) for x in zip(*embed(c_i, noise[: len(task)]), strict=True))
    kl, z = kl.mean(), z_i.detach()
    encoder_loss, noted = args.kl_weight * kl, {"encoder_kl": kl}
    if args.encoder_loss == "dml":
        z_j = torch.stack([z for z, _ in embed(c_j, noise[len(task) :])])
        noted["encoder_loss"] = eq13(z_i, z_j, task, args.beta, args.dml, args.eps)
        encoder_loss = encoder_loss + noted["encoder_loss"]

    errors, q_sum = [], 0
    for n, (i, (s, a, _, _, r, d, *_)) in enumerate(batch):
        with torch.no_grad():
            y = args.reward_scale * r[0] + (0 if d else args.discount * next_value(args, agent, n, batch, z))
        q = q_values(agent.critic, s, z_i[i] if coupled else z[i], a)
        errors += [(y - q[0]) ** 2 + (y - q[1]) ** 2]
        q_sum = q_sum + q[0] + q[1]
    critic = sum(errors) / len(batch)
    encoder_loss = encoder_loss + critic if coupled else encoder_loss
    descend(agent.encoder, encoder_loss, args.encoder_lr * (1 - 1 / args.encoder_steps), retain=coupled)
    descend(agent.critic, critic, rate)
    for slow, fast in zip(agent.target.parameters(), agent.critic.parameters(), strict=True):
        slow.data = (1 - args.tau) * slow + args.tau * fast.data
    noted |= {"critic_loss": critic, "q_mean": q_sum / 2 / len(batch)} | learn_actor(args, agent, batch, z, rate)
    return noted | {"alpha": agent.alpha}


def check_update(k, monkeypatch, next_value=naive_value, learn_actor=naive_actor):
    """That an update of k's agent, in float64, equals `naive_update` with the same draws."""
    agent, split = k.agent.double(), k.world.split
    rows = torch.randn(4, 9, sum(split), dtype=torch.float64)
    rows[..., [-1, -4]] = (rows[..., [-1, -4]] > 0).double()  # has_next, d
    with torch.no_grad():
        for p in agent.parameters():
            if not p.requires_grad:  # slow networks are not the fast ones
                p += 0.4 * torch.randn_like(p)
        for p in agent.encoder.parameters():
            p *= 2.5  # embeddings far apart
        if agent.discriminator is not None:  # slopes of logits on both sides of 1
            x = torch.randn(99, agent.discriminator[0].in_features, dtype=torch.float64)
            agent.discriminator[-1].weight *= 1.5 / focal.slope(agent.discriminator, x, 2).norm(dim=1).median()
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, NOISE))
    monkeypatch.setattr(torch, "randn", fixed)
    monkeypatch.setattr(torch, "rand", shares)
    batches, tasks, draws = focal.Batches(k.args, rows, split), [], {3: [], 4: []}
    batches.tasks = lambda: tasks.append(focal.Batches.tasks(batches)) or tasks[-1]
    batches.draw = lambda t, n: draws[n].append((t, focal.Batches.draw(batches, t, n))) or draws[n][-1][1]
    expected = copy.deepcopy(agent)
    rate = lambda name: torch.tensor(RATE / 1000 if name == "discriminator" else RATE, dtype=torch.float64)
    agent.optimisers = {
        name: torch.optim.SGD(getattr(agent, name).parameters(), lr=rate(name)) for name in agent.optimisers
    }
    agent.batches = batches
    agent.update()
    (task,), ((t, b),), ((t_c, contexts),) = tasks, draws[3], draws[4]
    twice = k.args.encoder_loss == "dml"  # the second contexts after the first ones, in one draw
    assert torch.equal(t, task) and torch.equal(t_c, task.repeat(2) if twice else task)
    c_i, c_j = contexts.chunk(2) if twice else (contexts, None)
    assert 1 < len(set(task.tolist())) < 5 and not (twice and torch.equal(c_i, c_j))
    noted = naive_update(k.args, expected, split, task, b, c_i, c_j, next_value, learn_actor)
    for (name, p), q in zip(agent.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    sums, counts = agent.metrics
    assert {name for name, count in zip(agent.METRICS, counts, strict=True) if count == 1} == set(noted)
    found = dict(zip(agent.METRICS, sums.tolist(), strict=True))
    noted = dict.fromkeys(found, 0.0) | {name: x.item() for name, x in noted.items()}
    assert found == pytest.approx(noted, rel=1e-5, abs=1e-6)
    assert agent.alpha.item() == pytest.approx(expected.alpha.item(), rel=1e-9)


NAIVE = "--hidden 6 --encoder-hidden 6 --batch-size 3 --context-size 4 --meta-batch-size 5"
NAIVE += f" --encoder-steps 2 --encoder-lr {RATE} --lr {RATE} --reward-scale 2 --tau 0.25"


@pytest.mark.parametrize("more", CASES)
def test_an_update_equals_a_loop_over_single_transitions(files, monkeypatch, more):
    check_update(build(WIND, files[WIND], f"{NAIVE} {more}"), monkeypatch)


# ------------------------------------------------------------------------------------------------ who trains whom
def after_updates(files, more="", count=1, name=WALKER, prepare=lambda k: None, learn=True, script=None):
    k = build(name, files[name], more, script=script)
    prepare(k)
    before = weights(k.agent)
    for _ in range(count):
        k.update(learn)
    return before, weights(k.agent), k


def check_rates(k, **expected):
    """That each optimiser begins with a learning rate of its own."""
    found = {name: optimiser.param_groups[0]["lr"].item() for name, optimiser in k.optimisers.items()}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("script", [focal, focal_pp])
def test_every_network_has_its_own_learning_rate(files, script):
    more = "--alpha 3 --lr 0.1 --encoder-lr 0.2 --discriminator-lr 0.3"
    check_rates(build(WIND, files[WIND], more, script=script), encoder=0.2, critic=0.1, actor=0.1, discriminator=0.3)


def test_the_slow_target_begins_as_the_critic(files):
    agent = build(WIND, files[WIND]).agent
    assert same(agent.target, agent.critic)


def test_what_clones_has_no_discriminator_and_no_use_for_q(files):
    before, after, k = after_updates(files, "--actor clone")
    assert k.agent.discriminator is None and moved(before, after) == {"encoder", "critic", "actor", "target"}
    plain, scaled = (after_updates(files, f"--actor clone --reward-scale {c}", 3)[1] for c in (5, 50))
    assert "actor" not in moved(plain, scaled)


def test_without_an_encoder_nothing_is_known_of_a_task(files):
    def other_contexts(k):
        contexts = k.batches.contexts
        k.batches.contexts = lambda task: 3 * contexts(task)

    before, after, k = after_updates(files, "--encoder none", 3)
    assert moved(before, after) == {"critic", "actor", "target", "discriminator"}
    assert not moved(after, after_updates(files, "--encoder none", 3, prepare=other_contexts)[1])
    k.agent.settle()
    _, _, *z = focal.evaluate(k.args, k.agent, k.world)
    assert not any(x.any() for x in (*z, k.agent.settled))


def encoder_rates(k, *steps):
    """Its learning rate at these steps, as a share of the first."""
    rates = []
    for step in steps:
        k.agent.step.fill_(step)
        k.agent.set_rates(encoder_learns=True)
        rates.append(k.optimisers["encoder"].param_groups[0]["lr"].item() / k.args.encoder_lr)
    return rates


def test_the_encoder_learns_first_and_then_stands_still(files):
    k = build(WALKER, files[WALKER], "--encoder-steps 4 --coupled")
    seen = [weights(k.agent)]
    for step in range(8):
        if step == 6:
            k.agent.settle()
        k.update(encoder_learns=step < 6)
        seen.append(weights(k.agent))
    networks = [moved(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert ["encoder" in names for names in networks] == [True] * 3 + [False] * 5
    assert all({"critic", "actor", "target", "discriminator"} <= names for names in networks)
    assert encoder_rates(k, 0, 1, 2, 3, 4, 9) == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])


# -------------------------------------------------------------------------------------------------------- batches
def test_draws_of_tasks(files):
    for size in (2, 4):
        batches = build(WIND, files[WIND], f"--meta-batch-size {size}").batches
        draws = [batches.tasks().tolist() for _ in range(200)]
        assert all(len(set(draw)) == len(draw) == size for draw in draws)
        assert np.bincount(np.concatenate(draws), minlength=4).min() > 200 * size / 4 * 0.6 - 1
    batches = build(WIND, files[WIND], "--meta-batch-size 9").batches
    draws = [batches.tasks().tolist() for _ in range(200)]
    assert all(len(draw) == 9 for draw in draws) and len({tuple(sorted(draw)) for draw in draws}) > 20
    assert np.bincount(np.concatenate(draws), minlength=4).min() > 300


def test_draws_of_rows_are_uniform_and_independent(files):
    batches = build(WIND, files[WIND], "--batch-size 8 --context-size 5").batches
    batches.rows = torch.arange(3 * 7 * 2.0).view(3, 7, 2)  # row j of task i holds 14 i + 2 j
    task = torch.tensor([2, 0, 2])
    drawn = batches.draw(task, 3000)
    assert drawn.shape == (3, 3000, 2) and (drawn[..., 1] == drawn[..., 0] + 1).all()
    place = drawn[..., 0] / 2 - 7 * task[:, None]
    counts = torch.stack([(place == j).sum(1) for j in range(7)], 1)
    assert counts.sum(1).tolist() == [3000] * 3 and counts.min() > 300 and counts.max() < 560
    assert not torch.equal(place[0], place[2]) and not torch.equal(place[0], place[1])


@pytest.mark.parametrize("name, more", [(WIND, ""), (SPARSE, ""), (SPARSE, "--no-next-obs"), (WALKER, "")])
def test_batches_hold_rows_of_their_own_training_tasks(files, tmp_path, name, more):
    arrays = load_arrays(files[name])
    stamp = np.repeat(np.arange(6.0)[:, None], arrays["rewards"].shape[1], axis=1)
    stamps = {"rewards": 10 + stamp} | ({"sparse_rewards": 20 + stamp} if name == SPARSE else {})
    k = build(name, changed(files[name], tmp_path / "d.npz", name, **stamps), more)
    d, m = k.world.split[:2]
    train = torch.tensor(TRAIN)
    for _ in range(30):
        task = k.batches.tasks()
        s, a, r, s2, terminal, a2, has_next = k.batches.transitions(task)
        shapes = [(24, d), (24, m), (24,), (24, d), (24,), (24, m), (24,)]
        assert [x.shape for x in (s, a, r, s2, terminal, a2, has_next)] == shapes
        assert (r.view(3, 8) == 10 + train[task][:, None]).all()
        context = k.batches.contexts(task)
        assert context.shape == (3, 8, d + m + 1 + (0 if more else d))
        assert (context[..., -1] == (20 if name == SPARSE else 10) + train[task][:, None]).all()
    assert k.agent.encoder.net[0].in_features == context.shape[-1]


@pytest.mark.parametrize("name", [SPARSE, WALKER])
def test_packed_rows(files, name):
    arrays, k = load_arrays(files[name]), build(name, files[name])
    obs = arrays["observations"][TRAIN].astype(np.float64).reshape(-1, k.world.split[0])
    mean, std = obs.mean(0), np.maximum(obs.std(0), 1e-3)
    np.testing.assert_allclose(k.world.mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(k.world.std, std, rtol=5e-3)
    context_rewards, seen = arrays.get("sparse_rewards", arrays["rewards"]), set()
    for rows, tasks in ((k.world.train_rows, TRAIN), (k.world.test_rows, TEST)):
        for i, task in enumerate(tasks):
            for n in range(rows.shape[1]):
                episode = arrays["episodes"][task]
                has_next = n + 1 < len(episode) and episode[n + 1] == episode[n]
                s, a, r_context, s2, r, d, a2, flag = rows[i, n].split(k.world.split)
                seen.add((bool(d), has_next))
                for x, key in ((s, "observations"), (s2, "next_observations")):
                    np.testing.assert_allclose(x, (arrays[key][task, n] - mean) / std, rtol=5e-3, atol=1e-3)
                assert (a.numpy() == arrays["actions"][task, n]).all()
                assert (r, d, flag) == (arrays["rewards"][task, n], arrays["terminals"][task, n], has_next)
                assert r_context == context_rewards[task, n]
                if has_next:
                    assert (a2.numpy() == arrays["actions"][task, n + 1]).all()
    assert seen == {(False, False), (False, True)} | ({(True, False)} if name == WALKER else set())


@pytest.mark.parametrize("name", [SPARSE, WALKER])
def test_sparse_rewards_are_in_contexts_only(files, tmp_path, name):
    arrays = load_arrays(files[name])
    arrays["rewards"] = arrays["rewards"] - 5.0 * np.isin(np.arange(6), TEST)[:, None]  # other rewards in test tasks
    k = build(name, changed(files[name], tmp_path / "d.npz", name, rewards=arrays["rewards"]), "--sparse")
    radius = -0.2 if name == SPARSE else np.quantile(arrays["rewards"][TRAIN], 0.5, method="lower")
    for rows, tasks in ((k.world.train_rows, TRAIN), (k.world.test_rows, TEST)):
        r = torch.as_tensor(arrays["rewards"][tasks])
        _, _, context_r, _, dense, *_ = rows.split(k.world.split, -1)
        expected = torch.where(r > radius, (r - radius) / abs(radius), 0.0)
        torch.testing.assert_close(context_r[..., 0], expected.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dense[..., 0], r.float())
    shown = k.world.train_rows.split(k.world.split, -1)[2]
    assert name == SPARSE or 0.4 < (shown != 0).double().mean() < 0.6


def test_the_sparse_rewards_radius_is_the_training_datas(files, tmp_path):
    folder, rewards = tmp_path / WALKER / "20+5-seed0", load_arrays(files[WALKER])["rewards"]
    for quality, shift in (("expert", 0), ("random", 10)):
        changed(files[WALKER], folder / f"{quality}.npz", WALKER, rewards=rewards + np.float32(shift))
    argv = [x for x in flags(WALKER, "") if x not in ("--data", "")] + ["--data-dir", str(tmp_path), "--sparse"]
    argv += ["--quality", "expert", "--test-quality", "random"]
    world = focal.World(focal.parse_args(argv), torch.device("cpu"))
    shown, radius = world.test_rows.split(world.split, -1)[2], np.quantile(rewards[TRAIN], 0.5, method="lower")
    expected = (rewards[TEST] + 10 - radius) / abs(radius)
    torch.testing.assert_close(shown[..., 0], torch.as_tensor(expected), rtol=1e-4, atol=1e-4)


def test_test_tasks_can_have_data_of_another_quality(files, tmp_path):
    folder = tmp_path / WIND / "40+10-seed3"
    for quality, reward in (("expert", 1), ("random", 2)):
        rewards = np.full_like(load_arrays(files[WIND])["rewards"], reward)
        changed(files[WIND], folder / f"{quality}.npz", WIND, rewards=rewards, returns=rewards.sum(1))
    argv = [x for x in flags(WIND, "", "--data-seed 3") if x not in ("--data", "")] + ["--data-dir", str(tmp_path)]
    for qualities, stamps in (("--quality expert", (1, 1)), ("--quality expert --test-quality random", (1, 2))):
        world = focal.World(focal.parse_args(argv + qualities.split()), torch.device("cpu"))
        assert (world.train_rows[..., 7] == stamps[0]).all() and (world.test_rows[..., 7] == stamps[1]).all()
        assert world.behaviour == 60 * stamps[1]


# ------------------------------------------------------------------------------------------------------- evaluate
@pytest.mark.parametrize("name, more", [(WIND, ""), (SPARSE, "--no-next-obs"), (WALKER, "")])
def test_returns_equal_one_episode_after_the_other(files, name, more):
    k = build(name, files[name], f"{more} --eval-episodes 2 --seed 3")
    arrays, tasks = load_arrays(files[name]), TRAIN + TEST
    with torch.no_grad():
        k.agent.actor.net[-1].weight *= 3  # so that the embedding and the state matter
        if name == SPARSE:  # towards one task's goal
            k.agent.actor.net[-1].weight *= 0.05
            k.agent.actor.net[-1].bias[:2] = 0.55 * torch.tensor(arrays["tasks"][TRAIN[0]])
    seen = []
    hook = k.agent.encoder.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out[0])))
    train, test, z_train, z_test = focal.evaluate(k.args, k.agent, k.world)
    hook.remove()
    assert train.shape == (4, 2) and test.shape == (2, 2) and z_train.shape == (4, 2, 3) and z_test.shape == (2, 2, 3)
    (context, z), z_all = seen[0], torch.cat([z_train, z_test]).flatten(0, 1)
    assert torch.equal(z, z_all) and context.shape[:2] == (12, 8) and not torch.equal(z_all[0], z_all[1])
    for i in range(12):  # contexts come from the task's own data
        rows = (k.world.train_rows if i < 8 else k.world.test_rows)[(i if i < 8 else i - 8) // 2]
        own = focal.context_of(rows, k.world.split, k.args)
        assert all((own == transition).all(1).any() for transition in context[i])

    def episode(i):
        env = envs.make(name, arrays["tasks"][tasks].repeat(2, axis=0), seed=3, threads=1)
        obs, total, actions = env.reset()[0], 0, np.zeros((12, k.world.split[1]))
        for length in range(1, env.horizon + 1):
            s = (torch.tensor(obs[i], dtype=torch.float32) - k.world.mean) / k.world.std
            with torch.no_grad():
                actions[i] = k.agent.actor(s, z_all[i])[0].tanh()
            obs, reward, terminated, truncated, info = env.step(actions)
            total += info["sparse_reward"][i] if name == SPARSE else reward[i]
            if terminated[i] or truncated[i]:
                return total, length

    naive = [episode(i) for i in range(12)]
    returns, lengths = (np.array(x) for x in zip(*naive, strict=True))
    np.testing.assert_allclose(np.concatenate([train, test]).ravel(), returns, rtol=1e-4, atol=1e-4)
    assert returns.std() > 0.01 and (lengths.min() < lengths.max() < 200 if name == WALKER else lengths.min() == 20)
    assert (returns >= 0).all() or name != SPARSE
    again = focal.evaluate(k.args, k.agent, k.world)
    assert all((a == b).all() for a, b in zip((train, test, z_train, z_test), again, strict=True))


def test_separation():
    z = 1.5 * torch.tanh(torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)))
    far, squares = [], []
    for i in range(5):
        for j in range(5):
            for e in range(3):
                for f in range(3):
                    if i != j:
                        distance = math.dist(z[i, e].tolist(), z[j, f].tolist())
                        far.append(distance > math.sqrt(2 * 4 / 3))
                        squares.append(distance**2 / 4)
    esr, rms, variance = focal.separation(z)
    assert 0.2 < np.mean(far) < 0.95
    assert esr == pytest.approx(np.mean(far)) and rms == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-5)
    assert variance == pytest.approx(np.mean([np.var(task.numpy(), axis=0, ddof=1) for task in z]), rel=1e-5)
    assert focal.separation(z[:, :1])[2] == 0


# ----------------------------------------------------------------------------------------------------- whole runs
def test_what_a_run_writes(files, tmp_path):
    path = run(tmp_path, WIND, files[WIND], "--seed 2 --eval-episodes 2")
    names = {"args.json", "metrics.csv", "final.json", "curve.png", "embeddings.png", "checkpoint.pt", "source.py"}
    names.add("paths.png")
    assert path.name == "seed2" and names <= {file.name for file in path.iterdir()} <= names | {"started.py", ".lock"}
    assert (path / "embeddings.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = metrics(path, but=())
    assert list(rows[0]) == COLUMNS and [row["step"] for row in rows] == [3, 6]
    never = {"discriminator_loss"}  # alpha is 0 here
    assert all((value is None) == (key in never) for row in rows for key, value in row.items())
    k = build(WIND, files[WIND], "--seed 2 --eval-episodes 2")
    stored = checkpoint(path)
    k.agent.load_state_dict(stored["agent"])
    train, test, z_train, z_test = focal.evaluate(k.args, k.agent, k.world)
    last = dict(zip(["esr", "rms", "variance"], focal.separation(z_test), strict=True))
    last |= {"return_mean": test.mean(), "return_std": test.mean(1).std(), "train_return_mean": train.mean()}
    last["train_return_std"] = train.mean(1).std()
    last |= dict(zip(["train_esr", "train_rms", "train_variance"], focal.separation(z_train), strict=True))
    assert {key: rows[-1][key] for key in last} == pytest.approx(last, rel=1e-6)
    assert torch.equal(stored["standardisation"][0], k.world.mean) and stored["step"] == 6
    assert (stored["agent"]["settled"] != 0).any(-1).all()  # z of every task was kept as the encoder came to stand
    optimum = envs.family(WIND).optimum(data.load(files[WIND]).tasks[TEST], 20).mean()
    assert k.world.optimum == pytest.approx(optimum)


def test_once_it_stands_still_every_task_keeps_embeddings_of_its_own_contexts(files):
    k = build(WIND, files[WIND])
    k.batches.rows.copy_(k.batches.rows[:, :1].expand_as(k.batches.rows).clone())  # a task's rows are all alike
    k.agent.settle()
    for task in range(len(k.batches.rows)):
        row = focal.context_of(k.batches.rows[task : task + 1, :1], k.world.split, k.args)
        expected = k.agent.encoder(row)[0].expand(k.agent.SETTLED, -1)
        torch.testing.assert_close(k.agent.settled[task], expected, rtol=1e-4, atol=1e-6)
    k.agent.settled.copy_(torch.arange(len(k.batches.rows))[:, None, None].expand_as(k.agent.settled))
    seen, forward = [], k.agent.actor.forward
    k.agent.actor.forward = lambda s, z: seen.append(z) or forward(s, z)
    k.batches.tasks = lambda: torch.tensor([2, 0])
    k.update(encoder_learns=False)
    own = torch.tensor([2.0, 0.0]).repeat_interleave(k.args.batch_size)[:, None].expand(-1, k.args.latent)
    assert len(seen) == 2 and all(torch.equal(z, own) for z in seen)
    k.agent.settled.copy_(torch.arange(64.0)[None, :, None].expand_as(k.agent.settled))
    drawn = torch.cat([k.agent.settled_embedding(torch.tensor([0, 1])) for _ in range(400)])
    assert len(drawn[:, 0].unique()) == k.agent.SETTLED  # each of them is drawn


def test_the_noise_of_a_probabilistic_embedding_stays_fresh(files):
    k = build(WIND, files[WIND], "--encoder probabilistic")
    k.agent.settle()
    task = torch.arange(len(k.batches.rows))
    context = k.batches.contexts(task)
    k.batches.contexts = lambda tasks: context  # always the same
    seen = torch.stack([k.agent.settled_embedding(task) for _ in range(2 * k.agent.SETTLED)])
    assert len(seen[:, 0, 0].unique()) == len(seen) and not seen.requires_grad
    with torch.no_grad():
        mean, spread = k.agent.encoder.net(k.batches.contexts(task)).double().chunk(2, -1)
    precision = 1 / torch.nn.functional.softplus(spread)
    expected = (precision * mean).sum(1) / precision.sum(1)
    standard_error = (1 / precision.sum(1) / len(seen)).sqrt()
    assert ((seen.mean(0) - expected).abs() < 5 * standard_error).all()


def test_flags_win_over_what_follows_from_other_flags():
    words = ["--env", WALKER, "--small", "--coupled"]
    told, not_told = focal.parse_args([*words, "--encoder-steps", "3000"]), focal.parse_args(words)
    assert (told.encoder_steps, not_told.encoder_steps) == (3000, not_told.steps)
    assert focal.parse_args(words[:-1]).encoder_steps == 3000 and "encoder-steps" not in not_told.variant
    assert "encoder-steps=3000" in told.variant


def test_in_a_short_run_the_policy_has_half_of_the_steps_after_the_encoder():
    read = lambda more: focal.parse_args(["--env", WALKER, "--small", *more.split()]).encoder_steps
    assert [read(f"--steps {n}") for n in (40, 3_000, 6_000, 24_000, 90_000)] == [20, 1_500, 3_000, 3_000, 3_000]
    assert read("--no-small --letter --steps 1000") == 200
    assert read("--steps 40 --encoder-steps 35") == 35 and read("--steps 40 --coupled") == 40


IDLE = {
    "--value-penalty": "--alpha 0", "--discriminator-lr 1e-3": "--alpha 0", "--discriminator-steps 2": "--actor clone",
    "--alpha-lr 2": "", "--alpha-max 3": "", "--target-divergence 0.1": "", "--alpha 3": "--actor clone",
    "--tune-alpha": "--actor clone", "--dml square": "--encoder-loss bellman", "--beta 3": "--encoder-loss bellman",
    "--eps 1": "--encoder none", "--coupled": "--encoder none", "--kl-weight 1": "--encoder none",
    "--kl-weight 2": "", "--encoder-loss dml": "--encoder none", " --coupled": "--encoder-loss bellman",
    "--sparse": "--encoder none", "--encoder-lr 0.1": "--encoder none",
    "--alpha-max 4": "--actor clone", "--compile": "--no-graph",
}  # fmt: skip


@pytest.mark.parametrize("idle", IDLE)
def test_flags_without_effect_are_refused(idle):
    words = ["--env", WALKER, "--small", *IDLE[idle].split()]
    with pytest.raises(data.DataError, match=f"^{idle.split()[0]} .*: has no effect with {IDLE[idle]}"):
        focal.parse_args([*words, *idle.split()])
    useful = "--tune-alpha --encoder probabilistic" if "kl" in idle else "--tune-alpha"
    focal.parse_args(["--env", WALKER, "--small", *useful.split(), *idle.split()])
    focal.parse_args(["--env", WALKER, "--alpha", "0", "--no-value-penalty"])  # what is off needs nothing


def test_sparse_contexts_are_made_once(files, tmp_path, capsys):
    """Relabelled data's are sparse by themselves: data that are built here, and those in a file of one's own."""
    data.save(tmp_path / "d.npz", load_arrays(files[SPARSE]), {"env": SPARSE, "quality": "relabelled"})
    own = [*flags(SPARSE, tmp_path / "d.npz", "--sparse"), "--run-dir", str(tmp_path)]
    for argv in (["--env", SPARSE, "--sparse", "--quality", "relabelled"], own):
        ended(capsys, focal, argv, "--sparse", "relabelled data")


def test_the_shortest_run_has_a_step_of_the_encoder(files):
    k = build(WIND, files[WIND])
    k.args = k.agent.args = focal.parse_args(["--env", WIND, "--no-small", "--steps", "3"])
    assert encoder_rates(k, 1, 2, 3) == pytest.approx([0.5, 0, 0])


def test_an_update_notes_what_was_measured(files):
    """And nothing of what does not learn: no mean is diluted by steps that had no such loss."""
    for more, never in (("", {"discriminator_loss"}), ("--alpha 3", set()), (PEARL, {"discriminator_loss"})):
        k = build(WIND, files[WIND], more)
        never = never | ({"encoder_loss"} if more == PEARL else set())
        counts = lambda: dict(zip(METRICS, k.agent.metrics[1].tolist(), strict=True))
        for _ in range(3):
            k.update()
        assert counts() == {name: 0 if name in never else 3 for name in METRICS}
        k.agent.settle()
        k.update(encoder_learns=False)
        assert counts() == {name: 0 if name in never else 3 + ("encoder" not in name) for name in METRICS}


VARIANTS = [(SPARSE, "--meta-batch-size 7"), (WALKER, PEARL)]
VARIANTS += [(WALKER, "--alpha 0 --tune-alpha --alpha-lr 2 --alpha-max 9 --target-divergence 0.01 --value-penalty")]
SMALLER = "--no-letter --small --hidden 8 --encoder-hidden 8"
VARIANTS += [(WIND, f"{SMALLER} --tau 0.1 --discount 0.5 --reward-scale 3 --lr 1e-2")]


@pytest.mark.parametrize("name, more", VARIANTS)
def test_every_variant_trains_every_network(files, tmp_path, no_plots, name, more):
    more += " --eval-every 6"
    path, k = run(tmp_path, name, files[name], more), build(name, files[name], more)
    trained = checkpoint(path)["agent"]
    assert all(not torch.equal(value, trained[key]) for key, value in weights(k.agent).items())
    regularised = k.args.alpha > 0 or k.args.tune_alpha
    assert ("discriminator.0.weight" in trained) == regularised
    assert len(metrics(path)) == 1


# ------------------------------------------------------------------------------------- seeds, interruptions, resume
def test_another_seed_is_another_run(files, tmp_path, no_plots):
    """That one seed fixes a run is seen by `check_resumed`."""
    more = f"{REGULARISED} --seed "
    first, other = (metrics(run(tmp_path / seed, WALKER, files[WALKER], more + seed)) for seed in "12")
    assert all(a[key] != b[key] for a, b in zip(first, other, strict=True) for key in ("critic_loss", "return_mean"))


@pytest.mark.parametrize("more", ["", "--encoder probabilistic"])
def test_evaluations_do_not_disturb_learning(files, tmp_path, no_plots, more):
    often, once = (run(tmp_path / str(n), WIND, files[WIND], f"--eval-every {n} {more}") for n in (1, 6))
    assert_equal(checkpoint(often)["agent"], checkpoint(once)["agent"])
    assert_equal(checkpoint(often)["random"], checkpoint(once)["random"])
    assert len(metrics(often)) == 6 and len(metrics(once)) == 1


def check_resumed(monkeypatch, run, kills, folder, name, file, more=""):
    """That a run which is killed after its nth save, for n of `kills`, and resumed ends as if it had never stopped."""
    whole, save = run(folder / "whole", name, file, more), data.Run._save
    for nth in kills:
        saved, killed = [], folder / f"killed{nth}"

        def save_and_die(*args):
            save(*args)
            saved.append(0)
            if len(saved) == nth:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(data.Run, "_save", save_and_die)
            run(killed, name, file, more)
        assert end.value.code == 130
        torch.manual_seed(99)
        resumed = run(killed, name, file, f"{more} --resume")
        assert metrics(resumed) == metrics(whole) and len(metrics(whole)) > nth
        for key in ("step", "agent", "optimisers", "random"):
            assert_equal(checkpoint(resumed)[key], checkpoint(whole)[key])


@pytest.mark.parametrize("name, more", [(WIND, ""), (WALKER, REGULARISED)])
def test_a_killed_run_goes_on_as_if_it_had_never_stopped(files, tmp_path, no_plots, monkeypatch, name, more):
    check_resumed(monkeypatch, run, (1, 2), tmp_path, name, files[name], f"{more} --steps 9 --encoder-steps 5")


# -------------------------------------------------------------------------------------------------------- failures
def test_in_a_longer_run_a_coupled_encoder_learns_on(files, tmp_path, no_plots, capsys):
    words = flags(WIND, files[WIND], "--coupled")
    i = words.index("--encoder-steps")
    words[i : i + 2] = ["--run-dir", str(tmp_path)]  # it learns to the last of --steps
    focal.main([*words, "--steps", "3"])
    (short,) = tmp_path.glob("focal/*/*/seed0")
    focal.main([*words, "--steps", "6", "--resume"])
    assert "going on from step 3 of" in capsys.readouterr().out
    (path,) = (x for x in tmp_path.glob("focal/*/*/seed0") if x != short)
    assert {"encoder", "critic"} <= moved(*(checkpoint(x)["agent"] for x in (short, path)))
    assert [row["encoder_loss"] is None for row in metrics(path)] == [False, False]


def test_data_of_your_own_needs_no_description(files, tmp_path, no_plots):
    arrays = load_arrays(files[WALKER])
    del arrays["returns"]
    np.savez(tmp_path / "own.npz", **arrays)
    path = run(tmp_path, WALKER, tmp_path / "own.npz")
    stored = run(tmp_path / "stored", WALKER, files[WALKER])
    assert_equal(checkpoint(path)["agent"], checkpoint(stored)["agent"])


# --------------------------------------------------------------------------------------------------- the paper's table
TABLE_4 = {  # reward scale, beta, alpha, value penalty, meta-batch, latent size, discount
    "sparse-point-robot": (100, 1, 0, False, 16, 5, 0.9),
    "point-robot-wind": (100, 1, 0, False, 16, 5, 0.9),
    "cheetah-vel": (5, 10, 50, False, 16, 20, 0.99),
    "cheetah-fwd-back": (5, 1, 500, True, 4, 5, 0.99),
    "ant-fwd-back": (5, 1, 1e6, True, 4, 20, 0.99),
    "walker-params": (5, 10, 50, False, 16, 20, 0.99),
}
SIZES = {"hidden": 300, "encoder_hidden": 200, "batch_size": 256, "context_size": 256, "tau": 0.005, "final_lr": 1}
SIZES |= {"lr": 1e-3, "encoder_lr": 1e-3, "discriminator_lr": 1e-4, "encoder": "deterministic", "eps": 0.1}
EXPERT = {"cheetah-vel"}  # of Table 2's expert data, those that are taken as such here
NAMES = "reward_scale", "beta", "alpha", "value_penalty", "meta_batch_size", "latent", "discount"


@pytest.mark.parametrize("name", list(focal.TABLE))
def test_the_papers_settings(name):
    args = focal.parse_args(["--env", name, "--no-small", "--letter"])
    paper = TABLE_4.get(name, TABLE_4["walker-params"])  # families that are not in it have the walkers' row
    assert tuple(getattr(args, key) for key in NAMES) == paper
    assert set(focal.TABLE) > set(TABLE_4) and args.test_quality == args.quality
    assert args.quality == ("expert" if name in EXPERT else "mixed")
    assert {key: getattr(args, key) for key in SIZES} == SIZES


# ------------------------------------------------------------------------------------------------------------ CUDA
def check_graph(folder, name, file, more="", script=None):
    """That a run with a graph equals one without, but for rounding."""
    more += " --device cuda --steps 16 --encoder-steps 8 --eval-every 8"
    eager = run(folder / "eager", name, file, f"{more} --no-graph", script)
    graph = run(folder / "graph", name, file, more, script)
    before = weights(build(name, file, more, "cuda", script).agent)
    a, b = (checkpoint(path)["agent"] for path in (eager, graph))
    for key, start in before.items():
        change = (a[key].cpu() - start).abs().mean()
        assert change > 0 and (a[key] - b[key]).abs().mean().cpu() < 0.02 * change, key
    losses = (script or focal).Agent.METRICS
    for x, y in zip(metrics(eager), metrics(graph), strict=True):
        x, y = ([math.nan if row[key] is None else row[key] for key in losses] for row in (x, y))
        assert x == pytest.approx(y, rel=1e-2, abs=1e-4, nan_ok=True)


@cuda
@pytest.mark.parametrize("name, more", [(WIND, ""), (WALKER, REGULARISED), (WALKER, "--coupled"), (WALKER, PEARL)])
def test_graph_replay_equals_eager_updates(files, tmp_path, no_plots, name, more):
    check_graph(tmp_path, name, files[name], more)


# -------------------------------------------------------------------------------------------------------- learning
def test_it_learns_to_reach_the_goal_in_new_winds(tmp_path):
    policy = lambda obs, rng: np.clip(2 * ([1, 0] - obs) + 0.7 * rng.standard_normal(obs.shape), -1, 1)
    arrays = collect(WIND, list(range(10)), [10, 11, 12], 1000, 20, policy)
    data.save(tmp_path / "d.npz", arrays, {"env": WIND})
    sizes = "--hidden 64 --encoder-hidden 64 --batch-size 64 --context-size 64 --meta-batch-size 8 --latent 5"
    k = build(WIND, tmp_path / "d.npz", f"{sizes} --encoder-steps 200 --eval-episodes 4")
    untrained = focal.evaluate(k.args, k.agent, k.world)[1].mean()
    for step in range(600):
        if step == 200:
            k.agent.settle()
        k.update(encoder_learns=step < 200)
    _, trained, z, _ = focal.evaluate(k.args, k.agent, k.world)
    best = envs.family(WIND).optimum(arrays["tasks"][10:], 20).mean()
    assert trained.mean() > untrained + 10 and trained.mean() > best - 3
    assert z.std(1).mean() < 0.3 * z.mean(1).std(0).mean()  # contexts of one task agree, tasks differ
