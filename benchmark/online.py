"""FOCAL and FOCAL++ without data of the test tasks: runs' agents under the protocol that SMAC is made for.

python benchmark/online.py runs/focal/*/small/seed*

In each test task the agent acts for two episodes on the embedding of a training task, drawn anew for each of the two,
and for a third one on the embedding of a context drawn from those. The third is scored: the mean return over test tasks
and repetitions, beside the one with contexts of others' making. Writes online.json into each run's folder, for run.py.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
from retest import load_run, main_of, runs_of

import data


@torch.no_grad()
def play(act, world, seed):
    """One episode of a = act(s): rows (B, H, D) of s, a, r, s', d (s standardised, r as reported), which of them
    are of the episode (B, H), and its return (B,)."""
    env, rows, counted, scaled = world.env, [], [], world.scaled
    obs, alive, total = env.reset(seed=seed)[0], np.ones(env.num_envs, bool), np.zeros(env.num_envs)
    column = lambda x: torch.as_tensor(x[:, None], dtype=torch.float32)
    for _ in range(env.horizon):
        a = act(scaled(obs))
        following, reward, terminated, truncated, info = env.step(a.numpy())
        reported, after = info.get("sparse_reward", reward), info.get("final_obs", following)
        rows.append(torch.cat([scaled(obs), a, column(reported), scaled(after), column(terminated)], -1))
        counted.append(alive & ~info["blew_up"])
        total += alive * reported
        alive &= ~(terminated | truncated) | info["blew_up"]
        obs = following
    return torch.stack(rows, 1), torch.as_tensor(np.stack(counted, 1)), total


def experience(first, second, generator, size):
    """(B, size, D) rows drawn from two episodes, and not from what came after their ends."""
    rows, counted = (torch.cat(pair, 1) for pair in zip(first[:2], second[:2], strict=True))
    index = torch.multinomial(counted.float(), size, replacement=True, generator=generator)
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


@torch.no_grad()
def evaluate(script, args, agent, world):
    """Returns (n_test, E) of FOCAL or FOCAL++ with contexts that the agent collected, and of the first episode, on a
    training task's z."""
    qualities = {args.quality, args.test_quality, data.load(args.data).meta.get("quality") if args.data else None}
    data.refuse(
        (args.sparse, "the environments do not give --sparse rewards; expected a run without"),
        ("relabelled" in qualities, "the environments do not give rewards as relabelled data have; expected others"),
    )
    e, generator = args.eval_episodes, torch.Generator().manual_seed(args.seed)
    n, count, width = world.train_rows.shape
    on = lambda z: lambda s: agent.act(s, z, generator)

    def known():
        """(B, l) embeddings of training tasks, one drawn for each sub-environment."""
        task = torch.randint(n, (world.env.num_envs,), generator=generator)
        index = torch.randint(count, (len(task), args.context_size), generator=generator)
        return agent.encoder(script.context_of(world.train_rows[task[:, None], index], world.split, args), generator)[0]

    first = play(on(known()), world, args.seed + 1)
    second = play(on(known()), world, args.seed + 2)
    own = experience(first, second, generator, args.context_size)
    own = F.pad(own, (0, width - own.shape[-1]))  # the rest of a row is the critic's
    total = play(on(agent.encoder(script.context_of(own, world.split, args), generator)[0]), world, args.seed)[2]
    return tuple(returns.reshape(-1, e)[n:] for returns in (total, first[2]))


@main_of
def main(argv):
    for run in runs_of(argv, __doc__, "FOCAL or FOCAL++"):
        script, args, world, agent = load_run(run)
        own, blind = evaluate(script, args, agent, world)
        offline = script.evaluate(args, agent, world)[1]
        row = {"online_return": own.mean(), "first_episode": blind.mean(), "offline_return": offline.mean()}
        row = {key: round(float(value), 4) for key, value in row.items()}
        data.write(run / "online.json", json.dumps(row | {"step": int(agent.step)}, indent=1).encode())
        print(run, *(f"{key} {value:.2f}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
