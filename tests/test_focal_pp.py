"""FOCAL++: its loss against a loop, its attention, its key encoder. (test_focal.py holds what it shares with FOCAL.)"""

import copy
import math

import pytest
import test_focal
import torch
import torch.nn.functional as F
from conftest import SPARSE, WALKER, WIND
from test_focal import checkpoint, cuda, same, weights

import data
import focal
import focal_pp

PP = "--encoder-hidden 16 --blocks 2"
pytestmark = pytest.mark.usefixtures("no_plots")


def build(name, file, more="", device="cpu"):
    return test_focal.build(name, file, f"{PP} {more}", device, focal_pp)


def run(folder, name, file, more=""):
    return test_focal.run(folder, name, file, f"{PP} {more}", focal_pp)


def disturbed(module, scale=0.3):
    """Some weights that training might reach; fresh blocks are the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return module.double()


# ------------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("task", [[0, 1, 2, 3], [2, 0, 2, 1], [1, 1, 1]])
def test_contrast_loss(task):
    z_q, z_k = (z.tanh().requires_grad_(True) for z in test_focal.random_tensors((len(task), 3), (len(task), 3)))
    total, tau = 0, 0.7
    for i in range(len(task)):
        score = lambda j, i=i: sum(z_q[i, k] * z_k[j, k] for k in range(3)) / tau
        others = [j for j in range(len(task)) if task[j] != task[i]]
        total = total - (score(i).exp() / sum(score(j).exp() for j in [i, *others])).log()
    task = torch.tensor(task)
    ours = focal_pp.contrast_loss(z_q, z_k, task[:, None] == task[None], tau)
    torch.testing.assert_close(ours, total, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, [z_q, z_k]), torch.autograd.grad(total, [z_q, z_k]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_slow_networks_begin_as_the_fast_ones(files):
    agent = build(WIND, files[WIND]).agent
    assert same(agent.target, agent.critic) and same(agent.key_encoder, agent.encoder)


def test_a_clone_of_the_data_has_no_alpha_to_tune(files):
    k = build(WALKER, files[WALKER], "--actor clone")
    k.update()
    assert k.args.tune_alpha and k.agent.alpha == k.args.alpha == 500


def test_the_update_descends_the_contrast_loss_of_its_own_draws(files):
    more = "--dropout 0.5 --encoder-steps 1000000 --meta-batch-size 4 --temperature 0.4"
    k = build(WIND, files[WIND], more)
    disturbed(k.agent.key_encoder).float()  # a key is made without dropout, which a fresh block does not show
    tasks, contexts, losses, loss = [], [], [], focal_pp.contrast_loss
    draw = k.batches.contexts
    k.batches.contexts = lambda task: tasks.append(task) or contexts.append(draw(task)) or contexts[-1]
    focal_pp.contrast_loss = lambda *args: losses.append(args) or loss(*args)
    before = copy.deepcopy(k.agent)
    try:
        k.update()
    finally:
        focal_pp.contrast_loss = loss
    ((z_q, z_k, same, tau),) = losses
    c_q, c_k = contexts
    assert torch.equal(*tasks)  # a task's key is its own
    torch.testing.assert_close(z_q, before.encoder(c_q)[0])
    with torch.no_grad():
        torch.testing.assert_close(z_k, before.key_encoder(c_k)[0])
    assert z_q.requires_grad and not z_k.requires_grad
    assert torch.equal(same, torch.eye(4, dtype=torch.bool)) and tau == 0.4 and not torch.equal(c_q, c_k)
    assert k.agent.metrics[0, 0] == loss(z_q, z_k, same, tau)
    with torch.no_grad():
        after = loss(k.agent.encoder(c_q)[0], before.key_encoder(c_k)[0], same, tau)
    assert after < loss(z_q, z_k, same, tau)


@pytest.mark.parametrize("more", ["", "--coupled --value-penalty", "--encoder-loss bellman"])
def test_with_focals_encoder_and_loss_an_update_is_focals(files, monkeypatch, more):
    class Encoder(focal.Encoder):
        def __init__(self, widths, args):
            args.encoder, args.kl_weight, args.momentum = "deterministic", 0.0, 1.0  # the key encoder stands still
            super().__init__(widths, args)

    monkeypatch.setattr(focal_pp, "Encoder", Encoder)
    more = f"{test_focal.NAIVE} --alpha 2 --no-tune-alpha --encoder-loss dml {more}"
    more = more.replace("--encoder-hidden 6", "--encoder-hidden 16")
    test_focal.check_update(test_focal.build(WIND, files[WIND], more, script=focal_pp), monkeypatch)


def test_flags_without_effect_are_refused():
    for flag in ("--temperature 0.2", "--momentum 0.2"):
        with pytest.raises(data.DataError, match=f"{flag.split()[0]} .*no effect with --encoder-loss dml"):
            focal_pp.parse_args(f"--env {WALKER} --encoder-loss dml {flag}".split())


def test_what_is_kept_of_a_task_has_no_dropout(files):
    k = build(WALKER, files[WALKER], "--dropout 0.5")
    disturbed(k.agent.encoder).float()
    k.batches.rows[:] = k.batches.rows[:, :1].clone()  # all contexts of a task are the same
    k.agent.settle()
    assert k.agent.settled.std(1).max() < 1e-6 and not k.agent.settled.requires_grad


def test_dropout_of_a_block(monkeypatch):
    seen, drop = [], F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p, on: seen.append((p, on)) or drop(x, p, on))
    focal_pp.Block(16, "both", 0.2)(torch.randn(1, 3, 4, 16))
    assert seen == [(0.2, True)] * 3


# ------------------------------------------------------------------------------------------------------- key encoder
@pytest.mark.parametrize("loss", ["contrast", "dml"])
def test_the_key_encoder_follows_and_gets_no_gradient(files, loss):
    k = build(WIND, files[WIND], f"--encoder-loss {loss}")
    k.args.momentum = m = 0.8
    for _ in range(3):
        slow = {key: p.clone() for key, p in k.agent.key_encoder.named_parameters()}
        k.update()
        for key, p in k.agent.key_encoder.named_parameters():
            fast = k.agent.encoder.get_parameter(key)
            torch.testing.assert_close(p, m * slow[key] + (1 - m) * fast, rtol=1e-6, atol=1e-7)
            assert p.grad is None and not p.requires_grad
    stood = copy.deepcopy(k.agent.key_encoder.state_dict())
    k.update(encoder_learns=False)
    assert all(torch.equal(p, stood[key]) for key, p in k.agent.key_encoder.state_dict().items())


# --------------------------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("attention", ["both", "batch", "seq", "none"])
def test_a_fresh_block_is_the_identity(attention):
    block, x = focal_pp.Block(16, attention, 0.5), torch.randn(2, 5, 4, 16)
    y, w = block(x)
    assert torch.equal(y, x) and (w == 1).all() and w.shape == (2, 5)


@pytest.mark.parametrize("attention", ["both", "batch", "seq", "none"])
def test_order_does_not_matter_and_weights_have_mean_one(files, attention):
    k = build(WALKER, files[WALKER], f"--attention {attention}")
    encoder, context = disturbed(k.agent.encoder), k.batches.contexts(torch.tensor([0, 1, 2])).double()
    order = torch.randperm(context.shape[1])
    with torch.no_grad():
        (z, w), (z2, w2) = encoder.transitions(context), encoder.transitions(context[:, order])
        torch.testing.assert_close(z[:, order], z2)
        torch.testing.assert_close(w[:, order], w2)
        torch.testing.assert_close(encoder(context)[0], encoder(context[:, order])[0])
        torch.testing.assert_close(encoder(context)[0], (z * w[..., None]).mean(1))
        alone = torch.stack([encoder.transitions(context[:, [i]])[0][:, 0] for i in range(context.shape[1])], 1)
    torch.testing.assert_close(w.mean(1), torch.ones(3, dtype=torch.float64))
    assert (w.std(1) > 0.01).all() == (attention in ("both", "batch")) and (w > 0).all()
    mixes = not torch.allclose(alone, z)  # whether a transition's embedding depends on the others
    assert mixes == (attention in ("both", "batch"))


@pytest.mark.parametrize("attention", ["both", "seq"])
def test_attention_is_over_tokens(files, attention):
    k = build(WALKER, files[WALKER], f"--attention {attention} --no-next-obs")
    assert k.agent.encoder.widths == [17, 6, 1] and build(WALKER, files[WALKER]).agent.encoder.widths == [17, 6, 17, 1]
    block = disturbed(focal_pp.Block(16, attention, 0.0))
    x = torch.randn(2, 5, 4, 16, dtype=torch.float64)
    with torch.no_grad():
        full, without = block(x)[0], block(x[:, :, :3])[0]
        assert (full[:, :, 0] - without[:, :, 0]).abs().min(-1).values.max() > 1e-3
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(block(x[:, :, order])[0], full[:, :, order])


def test_dropout_only_while_the_encoder_learns(files):
    k = build(WALKER, files[WALKER], "--dropout 0.5")
    encoder, context = disturbed(k.agent.encoder), k.batches.contexts(torch.tensor([0, 1])).double()
    assert not torch.equal(encoder(context)[0], encoder(context)[0])
    with torch.no_grad():
        assert torch.equal(encoder(context)[0], encoder(context)[0])


def naive_attention(x, block, heads=8):
    """One task's tokens attend to those of their own transition: x (B, tokens, h)."""
    size = x.shape[-1] // heads
    out = torch.zeros_like(x)
    for b in range(len(x)):
        q, k, v = (x[b] @ block.qkv.weight.T + block.qkv.bias).chunk(3, -1)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            out[b, :, part] = (q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1) @ v[:, part]
    return out @ block.out.weight.T + block.out.bias


def test_a_block_and_the_encoder_against_plain_loops():
    args = focal_pp.parse_args(["--env", WIND, "--encoder-hidden", "16", "--latent", "3", "--blocks", "2"])
    encoder = disturbed(focal_pp.Encoder([2, 2, 2, 1], args))
    assert len(encoder.blocks) == 2
    (context,) = test_focal.random_tensors((2, 5, 7))
    with torch.no_grad():
        z, w = encoder.transitions(context)
        for task in range(2):
            x, start = torch.empty(5, 4, 16, dtype=torch.double), 0
            for i, (width, embed) in enumerate(zip([2, 2, 2, 1], encoder.embed, strict=True)):
                x[:, i] = context[task, :, start : start + width] @ embed.weight.T + embed.bias + encoder.position[i]
                start += width
            for block in encoder.blocks:
                n = block.norms[0](x)
                gate = torch.tensor([torch.sigmoid(block.gate(row.mean(0))).item() for row in n], dtype=torch.double)
                weight = gate / (gate.sum() / len(gate))
                x = weight[:, None, None] * x + naive_attention(n, block)
                inner = torch.nn.functional.gelu(
                    block.norms[1](x) @ block.feed_forward[0].weight.T + block.feed_forward[0].bias
                )
                assert inner.shape[-1] == 64
                x = x + inner @ block.feed_forward[2].weight.T + block.feed_forward[2].bias
            torch.testing.assert_close(w[task], weight, rtol=1e-10, atol=1e-12)
            expected = torch.tanh(x.mean(1) @ encoder.head.weight.T + encoder.head.bias)
            torch.testing.assert_close(z[task], expected, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------ who trains whom, runs
VARIANTS = ["", "--attention batch", "--attention seq", "--attention none", "--encoder-loss dml"]
VARIANTS += ["--sparse", "--encoder-loss bellman", "--coupled", "--no-next-obs"]


@pytest.mark.parametrize("more", VARIANTS)
def test_every_variant_trains_every_network(files, tmp_path, more):
    path, k = run(tmp_path, WALKER, files[WALKER], f"{more} --steps 8"), build(WALKER, files[WALKER], more)
    trained = checkpoint(path)["agent"]
    # softmax does not see a shift of all keys; the mean weight hides a shift of all gates
    blind = ("qkv.bias", "gate.2.bias") + (("norms.0.weight", "norms.0.bias") if "none" in more else ())
    still = [key for key, p in weights(k.agent).items() if torch.equal(p, trained[key]) and not key.endswith(blind)]
    assert still == []


def test_a_killed_run_goes_on_as_if_it_had_never_stopped(files, tmp_path, monkeypatch):
    test_focal.check_resumed(monkeypatch, run, [1], tmp_path, WALKER, files[WALKER])


TABLE_6 = {"blocks": 3, "encoder_hidden": 128, "dropout": 0.1, "attention": "both", "encoder_loss": "contrast"}
TABLE_6 |= {"beta": 1, "hidden": 256, "context_size": 512, "temperature": 0.5, "momentum": 0.9}
MUJOCO = {"alpha": 500, "tune_alpha": True, "target_divergence": 0.05, "lr": 3e-3, "encoder_lr": 3e-3, "discount": 0.99}
MUJOCO["latent"] = 20
POINT = {"alpha": 0, "tune_alpha": False, "lr": 1e-3, "encoder_lr": 1e-3, "discount": 0.9, "latent": 5}


@pytest.mark.parametrize("name", list(focal_pp.TABLE))
def test_the_papers_settings(name):
    args = vars(focal_pp.parse_args(["--env", name, "--no-small", "--letter"]))
    expected = TABLE_6 | (POINT if name in (SPARSE, WIND) else MUJOCO)
    assert {key: args[key] for key in expected} == expected
    assert args["batch_size"] * args["meta_batch_size"] == 256 * (4 if "fwd-back" in name else 16)


@pytest.mark.parametrize("name", list(focal_pp.TABLE))
def test_tuning_does_not_begin_above_its_bound(name):
    for module in (focal, focal_pp):
        for size in ("--no-small", "--small"):
            args = module.parse_args(["--env", name, "--tune-alpha", size])
            assert args.alpha <= args.alpha_max


@cuda
@pytest.mark.parametrize("size", ["--dropout 0", "--encoder-hidden 128 --dropout 0.1"])  # fused kernels ask for widths
def test_graph_replay_equals_eager_updates(files, tmp_path, size):
    test_focal.check_graph(tmp_path, WALKER, files[WALKER], f"{PP} {size}", focal_pp)
