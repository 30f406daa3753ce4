"""What runs have learned: an agent from a run's folder, its policy on raw observations. No script needs this file.

import trained

script, args, world, agent = trained.load_run("runs/focal/sparse-point-robot/small/seed0")
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import numpy as np
import torch

import data
import envs


class Begun(Exception):
    """A script came to its first step."""


class Rehearsal:
    """In the place of a `Run`: keeps what a script hands over before its first step, and ends there. Writes nothing
    but data that are missing."""

    def __init__(self, script: ModuleType, args: data.Args, device: torch.device):
        self.args, self.device, self.updates = args, device, []
        with torch.random.fork_rng(), contextlib.suppress(Begun):
            script.train(args, self)

    def begin(self, agent: data.Learner, world: Any) -> None:
        self.agent, self.world = agent, world

    def graph(self, fn: Callable[[], None]) -> Callable[[], None]:
        self.updates.append(fn)
        return fn

    def steps(self, *_: int):
        raise Begun


def with_context(dataset: data.Dataset, context: data.Arrays, env: str, sparse: bool) -> data.Dataset:
    """The dataset, but what is known of every task are these transitions of one: arrays (N, ...) named as at the
    top of data.py (without terminals and episodes: one that did not end). `sparse`: the agent's contexts have sparse
    rewards where the data have some. DataError for what does not fit."""
    sparse = sparse and dataset.context_rewards is not dataset.rewards
    known = [name for name, (axes, _) in (data.REQUIRED | data.OPTIONAL).items() if axes.startswith("TN")]
    strange = ", ".join(context.keys() - known)
    data.refuse(
        (not context, "context: expected arrays of transitions, found none"),
        (strange, f"context: expected arrays named {', '.join(known)}, found {strange}"),
        (sparse and "sparse_rewards" not in context, "context: the agent's are sparse; expected sparse_rewards"),
    )
    n = len(next(iter(context.values())))
    arrays = {"terminals": np.zeros(n), "episodes": np.zeros(n)} | context
    arrays = {name: np.asarray(array)[None] for name, array in arrays.items()}
    one = {"tasks": dataset.tasks[:1], "train_tasks": np.zeros(1, int), "test_tasks": np.zeros(1, int)}
    data._check(arrays | one, env)
    of_all = lambda array: array.expand(len(dataset.tasks), *array.shape[1:]).to(dataset.rewards.device)
    own = {name: of_all(torch.tensor(array, dtype=torch.float32)) for name, array in arrays.items()}
    own["context_rewards"] = own.pop("sparse_rewards", own["rewards"])
    return dataclasses.replace(dataset, **own)


def load_run(
    folder: Path | str, device: str = "cpu", **changes: Any
) -> tuple[ModuleType, data.Args, Any, data.Learner]:
    """The script (or the one that it builds on), the arguments, the world and the trained agent of a run; `changes`
    replace arguments that no training step saw, as test_quality; `context`, see `with_context`, is all that it knows of
    test tasks then.
    `data.DataError` if the data are not those of the run, and whatever a reader raises.

    Code is executed: the script of the run's name if it can be imported, else the run's own copy; and where the family
    is not known the file that was started, which registers it.
    """
    folder, on = Path(os.path.abspath(folder)), data.choose_device(device)  # links stay: a run's data lie beside them
    saved, checkpoint = json.loads((folder / "args.json").read_text()), data.read(folder / "checkpoint.pt", on)
    name, runs = folder.parts[-4], Path(saved["run_dir"])
    loaded = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    if loaded.name == "source.py" or importlib.util.find_spec(name) is None:  # the loaded copy may be another run's
        spec = importlib.util.spec_from_file_location(name, folder / "source.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    script = importlib.import_module(name)  # it may register the family itself
    if saved["env"] not in envs.FAMILIES:
        runpy.run_path(str(folder / "started.py"), run_name="started")
    words = ["--single", saved["single"]] if saved.get("single") else []  # merpo.py asks for it where there is one task
    args = script.parse_args(["--env", saved["env"], "--small" if saved["small"] else "--no-small", *words])
    elsewhere = runs.is_absolute() or ".." in runs.parts
    hints, root = get_type_hints(type(args)), Path() if elsewhere else folder.parents[3 + len(runs.parts)]
    for key in vars(args).keys() & saved.keys():  # a relative path begins where the run was started, or else here
        is_path = saved[key] and Path in (hints.get(key), *get_args(hints.get(key)))
        setattr(args, key, root / saved[key] if is_path else saved[key])
    if "context" in changes:
        about = {"env": args.env, "sparse": hasattr(args, "sparse")}  # FOCAL's and FOCAL++'s
        args.known = partial(with_context, context=changes.pop("context"), **about)
    moved = elsewhere or folder.parts[-4 - len(runs.parts) : -4] != runs.parts  # so `root` may not be where it was
    placed = args.data or changes.keys() & {"data", "data_dir"} or not checkpoint["dataset"]  # PEARL has none
    lost = moved and not placed and not args.data_dir.is_dir()
    strange = ", ".join(changes.keys() - vars(args).keys())
    quality = saved["data"] and changes.get("test_quality", saved["test_quality"]) != saved["test_quality"]
    data.refuse(
        (lost, f"{folder}: made in {runs}, and there is no {args.data_dir} for its data; expected it where it was"),
        (strange, f"{name} has no argument {strange}"),
        (quality, f"--test-quality: {folder} has its data from --data {saved['data']}"),
    )
    vars(args).update(changes, device=device)
    rehearsal = Rehearsal(script, args, on)
    agent, world = rehearsal.agent, rehearsal.world
    agent.load_state_dict(checkpoint["agent"])
    same = slice(1 if args.test_quality != saved["test_quality"] else 2)  # of the training and of the test tasks' data
    changed = checkpoint["dataset"][same] != world.checksum[same]
    data.refuse((changed, f"{folder}: its data have changed; expected {checkpoint['dataset']}, found {world.checksum}"))
    modules = [script, *(sys.modules.get(base.__module__) for base in type(agent).__mro__)]
    return next((module for module in modules if hasattr(module, "evaluate")), script), args, world, agent


def policy_of(
    script: ModuleType, args: data.Args, world: Any, agent: data.Learner
) -> Callable[[np.ndarray], np.ndarray]:
    """Raw observations (B, d) -> actions (B, m): what acts in an evaluation, in the first B of its sub-environments of
    test tasks (B: no more than there are). Contexts, adaptation and the rest are as there; SMAC's are the data's."""
    env, policies, first = world.env, [], -args.eval_episodes * len(world.test_rows)
    env.returns = lambda policy, seed: policies.append(policy) or np.zeros(env.num_envs)
    try:
        script.evaluate(args, agent, world)
    finally:
        del env.returns

    @torch.no_grad()
    def act(observations: np.ndarray) -> np.ndarray:
        data.refuse((len(observations) > -first, f"{len(observations)} observations; expected {-first} at most"))
        everywhere = env.observe()
        everywhere[first:][: len(observations)] = observations
        return policies[-1](everywhere)[first:][: len(observations)]

    return act
