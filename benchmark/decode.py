"""How much a run's embeddings say about their tasks, and what they do not: a small network learns the task from z.

python benchmark/decode.py runs/focal_pp/sparse-point-robot/*/seed*

Fits the parameters of the training tasks (a goal, a wind; a direction as a unit vector) from embeddings of 64 contexts
of each. Prints the mean distance between the fit and the truth, in the parameters' own units, on other contexts of the
same tasks and on the test tasks. In brackets what it is made of: noise, the distance of a context's fit from the mean
fit of its task, and bias, that of the mean fit from the truth. Beside them the distance on the training tasks of a
linear fit, which grows where z bends, and on the test tasks that of always guessing the training tasks' mean. `own` is
the share of contexts whose z lies nearest to the mean z of its own task, among training tasks and among test tasks.
"""

import numpy as np
import torch
from retest import load_run, main_of, runs_of

import data
import envs
import focal

STEPS, CONTEXTS = 4_000, 64


@torch.no_grad()
def embeddings(script, args, world, agent, seed):
    """z (n, CONTEXTS, l) of every training and of every test task, of contexts drawn from their data."""
    generator, out = torch.Generator().manual_seed(seed), []
    for rows in (world.train_rows, world.test_rows):
        drawn = [task[torch.randint(len(task), (CONTEXTS, args.context_size), generator=generator)] for task in rows]
        contexts = (script.context_of(rows, world.split, args) for rows in drawn)
        out.append(torch.stack([agent.encoder(context, generator)[0] for context in contexts]))
    return out


def described(env, tasks):
    """What z is read for (T, k): the tasks' parameters (T, P), or where in the plane goals or directions are."""
    row = envs.family(env)
    return torch.as_tensor(row.goal(tasks) if row.goal and row.differs == "reward" else tasks).float().flatten(1)


def own(z):
    """The share of embeddings (n, C, l) that lie nearest to the mean of their own task's."""
    return (torch.cdist(z, z.mean(1)).argmin(-1) == torch.arange(len(z))[:, None]).double().mean().item()


def fit(z, target):
    """A network (l) -> (k) that fits the target (n, k) of each task from z (n, C, l) by squared error."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = focal.mlp(z.shape[-1], 64, target.shape[-1])
        adam = torch.optim.Adam(net.parameters(), lr=1e-3)
        flat, wanted = z.flatten(0, 1), target.repeat_interleave(z.shape[1], 0)
        for step in range(STEPS):
            adam.param_groups[0]["lr"] = 1e-3 * (1 - step / STEPS)
            i = torch.randint(len(flat), (256,))
            loss = (net(flat[i]) - wanted[i]).square().sum(-1).mean()
            data.descend(adam, loss)
    return net


def linear_fit(z, target):
    """The same by least squares: an affine map (..., l) -> (..., k)."""
    extended = lambda z: torch.cat([z, torch.ones_like(z[..., :1])], -1).double()
    wanted = target.repeat_interleave(z.shape[1], 0).double()
    matrix = torch.linalg.lstsq(extended(z.flatten(0, 1)), wanted).solution
    return lambda z: (extended(z) @ matrix).float()


def parts(found, truth):
    """Mean distances of fits (n, C, k) from the truth (n, k) and from their task's mean, and of that from the truth."""
    mean, distance = found.mean(1, keepdim=True), lambda x: x.norm(dim=-1).mean().item()
    return distance(found - truth[:, None]), distance(found - mean), distance(mean[:, 0] - truth)


@torch.no_grad()
def errors(train, again, test, tasks, test_tasks):
    """From embeddings (n, C, l) and task parameters (n, k): `parts` on other contexts of the training tasks and on the
    test tasks, and the distances of a linear fit and of the guess."""
    mean, std = tasks.mean(0), tasks.std(0, correction=0).clamp_min(1e-6)
    centre, scale = train.flatten(0, 1).mean(0), train.flatten(0, 1).std(0).clamp_min(1e-6)
    train, again, test = ((z - centre) / scale for z in (train, again, test))
    with torch.enable_grad():
        net = fit(train, (tasks - mean) / std)
    linear = parts(linear_fit(train, tasks)(again), tasks)[0]
    seen, unseen = (parts(net(z) * std + mean, truth) for z, truth in ((again, tasks), (test, test_tasks)))
    return seen, unseen, linear, (mean - test_tasks).norm(dim=-1).mean().item()


@main_of
def main(argv):
    for run in runs_of(argv, __doc__, "FOCAL or FOCAL++"):
        script, args, world, agent = load_run(run)
        n, tasks = len(world.train_rows), described(args.env, np.asarray(world.tasks))
        train, test = embeddings(script, args, world, agent, seed=0)
        again = embeddings(script, args, world, agent, seed=1)[0]
        seen, unseen, linear, guess = errors(train, again, test, tasks[:n], tasks[n:])
        split = "{:.3f} (noise {:.3f}, bias {:.3f})"
        print(f"{run}  training tasks {split.format(*seen)}  test tasks {split.format(*unseen)}", end="  ")
        print(f"linear {linear:.3f}  guess {guess:.3f}  own {own(again):.2f}, {own(test):.2f}", flush=True)


if __name__ == "__main__":
    main()
