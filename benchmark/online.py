"""FOCAL and FOCAL++ without data of the test tasks: runs' agents under the protocol that SMAC is made for.

python benchmark/online.py runs/focal/*/small/seed*

In each test task the agent acts for two episodes on the embedding of a training task drawn at random, as it knows no
other, and for a third one on the embedding of a context drawn from those two episodes. The third is scored: the mean
return over test tasks and repetitions, beside the one with a context from the data. Writes online.json into each run's
folder, from where run.py takes it.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from retest import load_run


@torch.no_grad()
def play(args, agent, world, z, seed, generator):
    """One episode on z (B, l): rows (B, H, D) as the encoder's contexts are cut from, which of them are of the episode
    (B, H), and its return (B,)."""
    env, rows, counted = world.env, [], []
    obs, alive, total = env.reset(seed=seed)[0], np.ones(env.num_envs, bool), np.zeros(env.num_envs)
    scaled = lambda x: (torch.as_tensor(x, dtype=torch.float32) - world.mean) / world.std
    for _ in range(env.horizon):
        a = agent.act(scaled(obs), z, generator)
        following, reward, terminated, truncated, info = env.step(a.numpy())
        reward, ended = info.get("sparse_reward", reward), terminated | truncated
        after = np.where(ended[:, None], info.get("final_obs", following), following)
        r = torch.as_tensor(reward[:, None], dtype=torch.float32)
        row = torch.cat([scaled(obs), a, r, scaled(after)], -1)  # the rest of a row is the critic's
        rows.append(torch.cat([row, row.new_zeros(len(row), sum(world.split) - row.shape[1])], -1))
        counted.append(alive & ~info["blew_up"])
        total += alive * reward
        alive &= ~ended
        obs = following
    return torch.stack(rows, 1), torch.as_tensor(np.stack(counted, 1)), total


@torch.no_grad()
def evaluate(args, agent, world, context_of):
    """Returns (n_test, E) with contexts that the agent collected, and of the first episode, on a training task's z."""
    if args.sparse:
        raise SystemExit("online.py: the environments do not give --sparse rewards; expected a run without")
    e, generator = args.eval_episodes, torch.Generator().manual_seed(args.seed)
    n, count, width = world.train_rows.shape

    def known():
        """(B, l) embeddings of training tasks, one drawn for each sub-environment."""
        task = torch.randint(n, (world.env.num_envs,), generator=generator)
        index = torch.randint(count, (len(task), args.context_size), generator=generator)
        return agent.encoder(context_of(world.train_rows[task[:, None], index], world.split, args), generator)[0]

    first = play(args, agent, world, known(), args.seed + 1, generator)
    second = play(args, agent, world, known(), args.seed + 2, generator)
    rows, counted = (torch.cat(pair, 1) for pair in zip(first[:2], second[:2], strict=True))
    index = torch.multinomial(counted.float(), args.context_size, replacement=True, generator=generator)
    own = rows.gather(1, index[..., None].expand(-1, -1, width))
    z = agent.encoder(context_of(own, world.split, args), generator)[0]
    total = play(args, agent, world, z, args.seed, generator)[2]
    return tuple(returns.reshape(-1, e)[n:] for returns in (total, first[2]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of focal.py or focal_pp.py")
    for run in parser.parse_args(argv).runs:
        module, args, world, agent = load_run(run)
        own, blind = evaluate(args, agent, world, module.context_of)
        offline = module.evaluate(args, agent, world)[1]
        row = {"online_return": own.mean(), "first_episode": blind.mean(), "offline_return": offline.mean()}
        row = {key: round(float(value), 4) for key, value in row.items()}
        (run / "online.json").write_text(json.dumps(row | {"step": int(agent.step)}, indent=1))
        print(run, *(f"{key} {value:.2f}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
