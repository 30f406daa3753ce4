"""Where an iteration of SAC goes while data.py builds a dataset, for some numbers of sub-environments.

python benchmark/building.py                                    # walker-params, on CUDA if it is there
python benchmark/building.py --env ant-dir --wider 2 4 --seconds 5 --no-graph

`--wider k` has k times the sub-environments and the gradient steps of the small defaults, in as many fewer iterations.
"ms" is an iteration as it is, "minutes" what all iterations of the build would take at that rate. The other columns are
its parts, in milliseconds, from a second measurement in which each is timed: `wait` for the device to end the gradient
steps, `act` until the host has actions, `launch` of the gradient steps (on a CPU: the steps themselves), `physics` of
all sub-environments, `store` of their rows, `other`. On CUDA `gradient` is what the gradient steps take on the device,
beside the physics, and `waits` is how often the host waits for the device, as PyTorch counts it. On a CPU data.py
trains a few tasks in each of its processes: `--tasks 7 --threads 1` is one of them.
"""

import argparse
import time
import warnings
from collections import Counter

import torch
from retest import main_of, whole

import data
import envs

PARTS = ["wait", "act", "launch", "physics", "store", "other"]
COLUMNS = ["wider", "envs", "updates", "ms", "minutes", *PARTS, "gradient", "waits"]


def build(args, device, wider):
    """A trainer of all tasks, past its first random actions and, on CUDA, with its graphs captured."""
    small = data.settings_for(args.env, torch.device("cpu"))
    changes = {"envs": wider * small.envs, "updates": wider * small.updates, "start": 1}
    settings = data.settings_for(args.env, device, **changes)
    row = envs.family(args.env)
    count = args.tasks or len(row.only) or row.train + row.test
    tasks = envs.sample_tasks(args.env, len(row.only) or count, 0)[:count]
    trainer = data.Trainer(args.env, tasks, 0, settings, device, args.threads or envs.cores())
    for _ in range(settings.nstep + 10):
        trainer.step()
    return trainer


def per_iteration(trainer, seconds):
    """Mean seconds of an iteration, and how many were measured."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or count < 3:
        trainer.step()
        count += 1
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count, count


def time_parts(trainer):
    """From now on the trainer's parts are timed: a Counter of seconds, and pairs of events around gradient steps."""
    spent, events, cuda = Counter(), [], trainer.device.type == "cuda"

    def timed(name, fn):
        def call(*arguments):
            began = time.perf_counter()
            result = fn(*arguments)
            spent[name] += time.perf_counter() - began
            return result

        return call

    def learn(fn=trainer.learn):
        if not cuda:
            return fn()
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        fn()
        events[-1][1].record()

    wait, act = timed("wait", torch.cuda.synchronize if cuda else lambda: None), timed("act", trainer.act)
    trainer.act = lambda: wait() or act()
    trainer.learn = timed("launch", learn)
    trainer.vector.step = timed("physics", trainer.vector.step)
    trainer.collect = timed("store", trainer.collect)
    return spent, events


def waits_of(trainer, count=5):
    """How often the host waits for the device in an iteration."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(count):
                trainer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen) / count


def measure(args, device, wider):
    """A row of the table."""
    trainer = build(args, device, wider)
    settings = trainer.settings
    mean, _ = per_iteration(trainer, args.seconds)
    row = {"wider": wider, "envs": settings.envs, "updates": settings.updates, "ms": 1e3 * mean}
    row["minutes"] = mean * trainer.iterations / 60
    if device.type == "cuda":
        row["waits"] = waits_of(trainer)
    spent, events = time_parts(trainer)
    mean, count = per_iteration(trainer, args.seconds)
    spent["store"] -= spent["physics"]  # which is a part of it
    spent["other"] = mean * count - spent.total()
    row |= {part: 1e3 * spent[part] / count for part in PARTS}
    if events:
        row["gradient"] = sum(first.elapsed_time(last) for first, last in events) / len(events)
    trainer.vector.close()
    return row


@main_of
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bodies = [name for name, row in envs.FAMILIES.items() if row.xml]
    parser.add_argument("--env", choices=bodies, default="walker-params")
    parser.add_argument("--wider", nargs="+", type=whole, default=[1, 2, 4], help="times the small sub-environments")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each of a row's two measurements")
    parser.add_argument("--tasks", type=whole, help="how many; default: all of the family")
    parser.add_argument("--threads", type=whole, help="of the physics; default: one for each core")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--no-graph", action="store_true", help="on CUDA: every operation by itself, not in graphs")
    args = parser.parse_args(argv)
    device = data.choose_device(args.device)
    data.GRAPHS = not args.no_graph
    print(" ".join(f"{column:>8}" for column in COLUMNS), flush=True)
    for wider in args.wider:
        row = measure(args, device, wider)
        print(" ".join(f"{row.get(column, ''):>8.4g}" if column in row else " " * 8 for column in COLUMNS), flush=True)


if __name__ == "__main__":
    main()
