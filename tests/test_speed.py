"""On a machine without CUDA: whether each update is one that a CUDA graph can hold.

Every update runs on a device whose tensors have no values (PyTorch's "meta"). What would make the host wait for the
device, or bring data from the host, or mix the two, fails there as it would under capture.
"""

import sys

import pytest
import test_focal
import test_focal_pp
import test_merpo
import test_smac
import torch
from conftest import WALKER, WIND
from torch.utils._python_dispatch import TorchDispatchMode

import data
import envs
import focal
import focal_pp
import merpo
import smac

META = torch.device("meta")
REGULARISED = "--alpha 50 --tune-alpha --value-penalty"
PEARL = "--encoder probabilistic --encoder-loss bellman --alpha 0"
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


def without_values(thing):
    """Moves its tensors to the device without values."""
    for key, value in vars(thing).items():
        if isinstance(value, torch.Tensor):
            setattr(thing, key, value.to(META))


class Adam(torch.optim.Adam):
    """Adam whose constructor does not look at the value of its learning rate, which has none here."""

    def __init__(self, params, lr=None, **options):
        super().__init__(params, lr=0.0, **options)
        for group in self.param_groups:
            group["lr"] = torch.zeros((), device=META)


@pytest.fixture(autouse=True)
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


@pytest.mark.parametrize("more", ["--alpha 0", REGULARISED, "--coupled --final-lr 0.1", PEARL, "--policy bcq"])
def test_an_update_of_focal(files, more):
    k = test_focal.build(WALKER, files[WALKER], more)
    without_values(k.world)
    agent = focal.Agent(k.args, *k.world.split[:2], len(k.world.train_rows)).to(META)
    batches = focal.Batches(k.args, k.world.train_rows, k.world.split)
    update = focal.make_update(k.args, agent, focal.make_optimisers(k.args, agent, META), batches)
    holds(update, lambda: update(learn_encoder=False))


@pytest.mark.parametrize("more", ["", "--tune-alpha --encoder-loss dml", "--attention none --encoder-loss bellman"])
def test_an_update_of_focal_pp(files, monkeypatch, more):
    monkeypatch.setattr(test_focal, "focal", focal_pp)
    k = test_focal_pp.build(WALKER, files[WALKER], more)
    without_values(k.world)
    agent = focal_pp.Agent(k.args, *k.world.split[:2], len(k.world.train_rows)).to(META)
    batches = focal_pp.Batches(k.args, k.world.train_rows, k.world.split)
    update = focal_pp.make_update(k.args, agent, focal_pp.make_optimisers(k.args, agent, META), batches)
    holds(update, lambda: update(learn_encoder=False))


@pytest.mark.parametrize("more", ["", "--actor sac --final-lr 0.1", "--actor bc", "--encoder-loss reward+q"])
@pytest.mark.parametrize("rewards", ["decoder", "oracle"])
def test_an_update_of_smac(files, more, rewards):
    k = test_smac.build(WALKER, files[WALKER], f"{more} --online-rewards {rewards}")
    without_values(k.world)
    _, _, update = smac.build(k.args, k.world, META)
    holds(update, lambda: update(online=True))


@pytest.mark.parametrize("name, more", [(WALKER, ""), (WIND, "--alpha adaptive"), (WALKER, "--no-model")])
def test_an_update_of_merpo(files, name, more):
    k = test_merpo.build(name, files[name], more)
    without_values(k.world)
    agent = merpo.Agent(k.args, k.world).to(META)
    holds(*merpo.make_updates(k.args, agent, merpo.make_optimisers(k.args, agent, META), k.world))


def test_an_update_of_sac():
    settings = data.Settings(steps=400, envs=2, episode=20, batch=8, hidden=16)
    trainer = data.Trainer(WALKER, envs.sample_tasks(WALKER, 3, 0), 0, settings, torch.device("cpu"), 1)
    without_values(trainer)
    trainer.generator, trainer.device = None, META
    trainer.agent.to(META)
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


def test_a_checkpoint_of_another_device_keeps_this_ones_optimisers(files, tmp_path, monkeypatch):
    """What a run on CUDA stored as capturable is not so on the CPU, and the other way round."""
    monkeypatch.undo()
    for name in ("plot_curve", "plot_embeddings"):
        monkeypatch.setattr(focal, name, lambda *_: None)
    path = test_focal.run(tmp_path, WIND, files[WIND])
    stored = test_focal.checkpoint(path)
    for state in stored["optimisers"].values():
        assert state["param_groups"][0]["capturable"] is False
        state["param_groups"][0]["capturable"] = True
    torch.save(stored, path / "checkpoint.pt")
    test_focal.run(tmp_path, WIND, files[WIND], "--steps 9 --resume")
    stored = test_focal.checkpoint(path)
    assert stored["step"] == 9
    assert not any(state["param_groups"][0]["capturable"] for state in stored["optimisers"].values())
