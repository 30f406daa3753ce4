"""PEARL from nothing, SMAC's own way to its data: one agent, online, with true rewards, whose buffers become a dataset.

    python benchmark/pearl.py --env point-robot-wind    # on a CPU: -6.7, in three minutes
    python smac.py --env point-robot-wind --data-size 1000 --data-until 1000 \\
        --data runs/pearl/point-robot-wind/small/seed0/replay.npz

It is smac.py without data and offline phase, as PEARL (Rakelly et al. 2019) but for the critic, which is Eq. 1's, so
without the entropy in the target; the KL has the weight of smac.py, not 0.1; contexts come from all that was collected,
which is all on z of the prior; observations are as they are. Beside what every run writes
there is replay.npz: the buffers of the training tasks, and as many trajectories of the test tasks.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import envs
import smac

PEARL = {"steps": 0, "online_rewards": "oracle", "online_tasks": "train", "online_contexts": "all"}
PEARL |= {"actor": "sac", "encoder_loss": "q", "obs_bound": 1e30}
WITHOUT = {*PEARL, "data", "quality", "test_quality", "data_size", "data_until", "context_data"}


@dataclass
class Args(smac.Args):
    def complete(self, given):
        for key in sorted(given.keys() & WITHOUT):
            raise data.DataError(f"{data.option(key)}: PEARL has neither data nor this choice; expected no such flag")
        super().complete(given)
        if self.online_envs < self.meta_batch_size:
            least = f"at least {self.meta_batch_size}, a meta-batch, have data"
            raise data.DataError(f"--online-envs {self.online_envs}: expected so many that {least}")


class World(smac.World):
    """Tasks without data."""

    CONTEXTS = {key: label for key, label in smac.World.CONTEXTS.items() if key != "offline_"}

    def __init__(self, args, device):
        super().__init__(args, device)
        n = len(self.train_tasks)
        least = f"at least {2 * n * self.row.horizon}, two trajectories in each of {n} tasks"
        data.refuse((self.buffers.size < 2 * n, f"--online-steps {args.online_steps}: expected {least}"))

    def open_data(self, args, device):
        fixed = self.row.only and (args.train_tasks or args.test_tasks)
        data.refuse((fixed, f"{args.env}: all its tasks are for training and for testing; their number is fixed"))
        row, n, k = self.row, args.train_tasks or self.row.train, args.test_tasks or self.row.test
        try:
            tasks = envs.sample_tasks(args.env, len(row.only) or n + k, args.data_seed)
        except ValueError as error:
            raise data.DataError(error) from None
        self.train_tasks, self.test_tasks = tasks[:n], tasks[-k:]
        self.mean, self.std = torch.zeros(row.obs_dim, device=device), torch.ones(row.obs_dim, device=device)
        self.train_rows, self.test_rows = (torch.zeros(m, 0, sum(self.split), device=device) for m in (n, k))
        self.behaviour, self.optimum, self.checksum = None, None, []


@torch.no_grad()
def play_test_tasks(args, agent, world, each):
    """Rows (n_test, each x H, D) of `each` trajectories a task: half on their posterior, then half on z of the prior
    (appendix C.2: contexts, which are the last rows, are of exploration alone)."""
    device = world.mean.device
    with torch.random.fork_rng([device] if world.mean.is_cuda else []):
        torch.manual_seed(args.seed)
        env = envs.make(args.env, world.test_tasks.repeat(each, axis=0))
        prior = torch.randn(env.num_envs, args.latent, device=device)
        rows, _, _, sound = smac.play(agent, world, env, prior, args.seed, sampled=True, anew="episode")
        z = smac.sample(*agent.encoder(rows))
        informed, _, _, sound_too = smac.play(agent, world, env, z, args.seed + 1, sampled=True)
        env.close()
    if not (sound | sound_too).all():
        raise data.DataError("replay.npz: the physics blew up twice in the same test task; nothing was written")
    last = torch.arange(len(rows), device=device) % each >= each // 2
    last = (last | ~sound_too) & sound  # a trajectory in which the physics blew up gives way to the other
    return torch.where(last[:, None, None], rows, informed).view(len(world.test_tasks), -1, rows.shape[-1])


def save_replay(path, args, agent, world):
    """The buffers as a dataset, test tasks' data beside them."""
    horizon, n, replay, only = world.row.horizon, len(world.train_tasks), agent.replay, world.row.only
    count = int(replay.filled.min()) // horizon * horizon
    if count < 2 * horizon:
        raise data.DataError("replay.npz: the physics blew up too often in the same task; nothing was written")
    last = replay.filled[:, None] - count + torch.arange(count, device=replay.rows.device)
    rows, tasks = torch.take_along_dim(replay.rows, last[..., None], 1), world.train_tasks
    if not only:
        rows = torch.cat([rows, play_test_tasks(args, agent, world, count // horizon)])
        tasks = np.concatenate([tasks, world.test_tasks])
    s, a, r, s2, d = (x.cpu().numpy() for x in rows.split(agent.split, -1))
    ended = (np.arange(count) % horizon == horizon - 1) | (d[..., 0] > 0)
    arrays = {"observations": s, "actions": a, "rewards": r[..., 0], "next_observations": s2, "terminals": d[..., 0]}
    arrays |= {"episodes": np.pad(ended, ((0, 0), (1, 0)))[:, :-1].cumsum(1), "tasks": tasks}
    arrays |= {"train_tasks": np.arange(n), "test_tasks": np.arange(n) if only else np.arange(n, len(tasks))}
    if world.row.sparse_reward:
        flat = (x.reshape(len(tasks) * count, -1) for x in (s, a, s2))
        arrays["sparse_rewards"] = world.row.sparse_reward(tasks.repeat(count, axis=0), *flat, 1.0).reshape(-1, count)
    data.save(path, arrays, {"env": args.env, "quality": "replay", "seed": args.seed, "script": "pearl.py"})


def parse_args(argv=None):
    """SMAC's arguments, but for what makes it PEARL."""
    table, small = ({env: row | PEARL for env, row in rows.items()} for rows in (smac.TABLE, smac.SMALL))
    return data.parse(Args, table, small, argv)


def train(args, run):
    def end():  # in this order: a run that has final.json is finished
        save_replay(run.folder / "replay.npz", args, run.agent, run.world)
        print(f"its buffers as a dataset: {run.folder / 'replay.npz'}")
        data.Run.end(run)

    run.end = end
    smac.train(args, run, World)


def main(argv=None):
    data.start(train, parse_args, argv)


if __name__ == "__main__":
    main()
