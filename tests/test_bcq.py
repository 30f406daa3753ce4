"""Contextual BCQ, benchmark/bcq.py: an update against a loop over single transitions, who trains whom, whole runs."""

from pathlib import Path

import bcq
import pytest
import test_focal
import torch
from conftest import SPARSE, WALKER, WIND
from test_focal import checkpoint, cuda, fixed, metrics, q_values, same, weights
from torch.distributions import Normal, kl_divergence

import data
import focal

BELLMAN = "--encoder-loss bellman"  # the critic trains the encoder, as in PEARL
CASES = ["", BELLMAN, f"{BELLMAN} --encoder probabilistic", "--coupled"]


def build(name, file, more="", device="cpu"):
    return test_focal.build(name, file, more, device, bcq)


def run(folder, name, file, more=""):
    return test_focal.run(folder, name, file, more, bcq)


# ------------------------------------------------------------------- one update against a loop over single transitions
def proposed(agent, shift, s, z, noise):
    a = agent.actor.decode(torch.cat([s, z, noise.clamp(-0.5, 0.5)])).tanh().detach()
    return (a + 0.05 * shift(torch.cat([s, z, a])).tanh()).clamp(-1, 1)


def best_value(args, agent, n, batch, z):
    """Of ten proposed actions where the nth transition leads."""
    i, (_, _, _, s2, *_) = batch[n]
    values = []
    for noise in fixed(10, len(batch), agent.actor.code_dim)[:, n]:
        q = q_values(agent.target, s2, z[i], proposed(agent, agent.actor.slow_shift, s2, z[i], noise))
        values.append(0.75 * min(q) + 0.25 * max(q))
    return max(values)


def naive_actor(args, agent, batch, z, rate):
    errors, losses, noise = 0, 0, fixed(len(batch), agent.actor.code_dim)
    for n, (i, (s, a, *_)) in enumerate(batch):
        mu, log_std = agent.actor.encode(torch.cat([s, z[i], a])).chunk(2)
        code = mu + log_std.exp() * test_focal.NOISE
        again = agent.actor.decode(torch.cat([s, z[i], code])).tanh()
        kl = kl_divergence(Normal(mu, log_std.exp()), Normal(0, 1))
        errors = errors + (again - a).square().mean() + 0.5 * kl.mean()
        losses = losses - q_values(agent.critic, s, z[i], proposed(agent, agent.actor.shift, s, z[i], noise[n]))[0]
    vae, loss = errors / len(batch), losses / len(batch)
    test_focal.descend(agent.actor, vae + loss, rate)
    for slow, fast in zip(agent.actor.slow_shift.parameters(), agent.actor.shift.parameters(), strict=True):
        slow.data = (1 - args.tau) * slow + args.tau * fast.data
    return {"actor_loss": loss, "vae_loss": vae}


@pytest.mark.parametrize("more", CASES)
def test_an_update_equals_a_loop_over_single_transitions(files, monkeypatch, more):
    k = build(WIND, files[WIND], f"{test_focal.NAIVE} {more}")
    test_focal.check_update(k, monkeypatch, best_value, naive_actor)


# --------------------------------------------------------------------------------------------------- who trains whom
def test_slow_networks_begin_as_the_fast_ones(files):
    agent = build(WIND, files[WIND]).agent
    assert same(agent.target, agent.critic) and same(agent.actor.slow_shift, agent.actor.shift)


def test_the_best_of_ten_proposed_actions_is_taken(files):
    k = build(WALKER, files[WALKER])
    s, z = torch.randn(5, k.world.split[0]), torch.randn(5, k.args.latent)
    generator = lambda: torch.Generator().manual_seed(4)
    with torch.no_grad():
        a, *_ = k.agent.propose(s, z, generator=generator())
        chosen = k.agent.act(s, z, generator())
        values = [[q_values(k.agent.critic, s[n], z[n], a[i, n])[0].item() for n in range(5)] for i in range(10)]
    best = [max(range(10), key=lambda i: values[i][n]) for n in range(5)]
    assert len(set(best)) > 1 and torch.equal(chosen, torch.stack([a[i, n] for n, i in enumerate(best)]))


# --------------------------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("name, more", [(WALKER, BELLMAN), (WALKER, "--encoder probabilistic"), (SPARSE, "--sparse")])
def test_a_run_trains_every_network(files, tmp_path, no_plots, name, more):
    path, k = run(tmp_path, name, files[name], f"{more} --eval-every 6"), build(name, files[name], more)
    trained = checkpoint(path)["agent"]
    assert all(not torch.equal(value, trained[key]) for key, value in weights(k.agent).items())
    assert "discriminator.0.weight" not in trained and path.parts[-4] == "bcq"
    (row,) = metrics(path)
    assert row["vae_loss"] > 0 and row["discriminator_loss"] is None
    assert (path / "source.py").read_text() == Path(bcq.__file__).read_text()


@pytest.mark.parametrize("more", ["--alpha 3", "--tune-alpha", "--value-penalty", "--actor clone"])
def test_flags_of_brac_are_refused(files, more):
    with pytest.raises(data.DataError, match=more.split()[0]):
        bcq.parse_args(test_focal.flags(WIND, files[WIND], more))


@pytest.mark.parametrize("size", ["--small", "--no-small", "--no-small --letter"])
def test_what_is_not_of_the_regularised_policy_is_as_in_focal(size):
    words = f"--env {WALKER} --device cpu {size}".split()
    mine, theirs = (vars(script.parse_args(words)) for script in (bcq, focal))
    assert {key for key in theirs if mine[key] != theirs[key]} <= {*bcq.Args.WITHOUT, "variant"}


# --------------------------------------------------------------------------------------------------------------- CUDA
@cuda
def test_graph_replay_equals_eager_updates(files, tmp_path, no_plots):
    test_focal.check_graph(tmp_path, WALKER, files[WALKER], BELLMAN, bcq)
