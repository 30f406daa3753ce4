"""Gradient steps per second of every script, eagerly and as one CUDA graph, and how far that is from the floor.

python benchmark/speed.py                                    # what this machine has: CUDA, else the CPU
python benchmark/speed.py --only focal --size paper --profile profile.txt

A row is one kind of update: while FOCAL's encoder learns and once it stands still, SMAC's two phases, an iteration of
MerPO's stage 1 and one inner step of its stage 2, one gradient step of SAC for all tasks that data.py trains at once.
`ops` is how many operations PyTorch dispatches for it, without views. The floor is the time of the update's matrix
products (counted by PyTorch's FLOP counter) at the rate that one large product reaches on the same device just before
and after. `--profile` writes instead how many kernels a step has (on the CPU: operations), how long they take and which
twelve take longest. Data are random numbers: speed does not depend on them.
"""

import argparse
import gc
import statistics
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch
from report import write
from retest import main_of, whole
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
import envs
import focal
import focal_pp
import merpo
import smac
import trained

SCRIPTS = {script.__name__: script for script in (focal, focal_pp, smac, merpo)}
UPDATES = dict.fromkeys(("focal", "focal_pp"), ("encoder learns", "encoder stands still"))
UPDATES |= {"smac": ("offline", "online"), "merpo": ("meta-model", "inner step")}
COLUMNS = ["script", "update", "size", "device", "threads", "ops", "eager_per_s", "graph_per_s", "gflop", "floor_ms"]
COLUMNS += ["fraction_of_floor", "peak_mb", "compiled_per_s", "compile_s"]
clock = time.perf_counter


class Operations(TorchDispatchMode):
    """Counts what is dispatched, but for views, which compute nothing."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


def random_data(env, folder, count=2000):
    """A dataset of the family's tasks whose transitions are random numbers."""
    row, rng = envs.family(env), np.random.default_rng(0)
    tasks = envs.sample_tasks(env, len(row.only) or row.train + row.test, 0)
    t, path = len(tasks), folder / f"{env}.npz"
    if not path.exists():
        train = np.arange(t if row.only else row.train)
        arrays = {key: rng.standard_normal((t, count, row.obs_dim)) for key in ("observations", "next_observations")}
        arrays |= {"actions": rng.uniform(-1, 1, (t, count, row.act_dim)), "rewards": rng.standard_normal((t, count))}
        arrays |= {"terminals": np.zeros((t, count)), "episodes": np.tile(np.arange(count) // row.data_horizon, (t, 1))}
        arrays |= {"tasks": tasks, "train_tasks": train, "test_tasks": train if row.only else np.arange(row.train, t)}
        data.save(path, arrays, {"env": env})
    return path


def build_sac(env, size, device):
    """The paper's size: all tasks, as on CUDA; the small one: what one process trains on a CPU."""
    settings = data.settings_for(env, torch.device("cpu" if size == "small" else "cuda"), steps=4000)
    n = len(envs.family(env).only) or envs.family(env).train + envs.family(env).test
    tasks = envs.sample_tasks(env, n, 0)[: settings.shard if size == "small" else n]
    trainer = data.Trainer(env, tasks, 0, settings, device, threads=1)
    trainer.replay.uniform_()
    trainer.filled.fill_(trainer.replay.shape[1] * settings.envs)
    return {"all tasks": (settings.updates, trainer.learn_eagerly, lambda _: trainer.learn)}


def build(script, env, size, device, path, more=()):
    """{name of an update: (how many steps it is, the update, what captures it)}"""
    if script == "sac":
        return build_sac(env, size, device)
    words = ["--env", env, "--data", str(path), *(["--small"] if size == "small" else ["--no-small", "--letter"])]
    args = SCRIPTS[script].parse_args([*words, *more])
    torch.manual_seed(0)
    run = trained.Rehearsal(SCRIPTS[script], args, device)
    steps = {"inner step": getattr(args, "inner_steps", 1)}
    kinds = dict(zip(UPDATES[script], run.updates, strict=True))
    return {name: (steps.get(name, 1), fn, data.capture) for name, fn in kinds.items()}


def seconds_of(call, device, limit, rounds=5):
    """Median seconds of one call; about `limit` seconds in all, at least one call a round."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    count, times = 1, []
    for _ in range(rounds):
        wait()
        began = clock()
        for _ in range(count):
            call()
        wait()
        times.append((clock() - began) / count)
        if len(times) == 1:
            count = max(1, int(limit / rounds / times[0]))
        if sum(times) > limit and count == 1 and len(times) >= 3:
            break
    return statistics.median(times[1:])


def matmul_rate(device):
    """FLOP per second of one large float32 product (TF32 on CUDA)."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    a @ b
    return 2 * n**3 / seconds_of(lambda: a @ b, device, 0.5)


def graph_of(update, capture):
    """The update as one CUDA graph, captured."""
    replay = capture(update)
    for _ in range(4):  # three warm-up calls, one that captures
        replay()
    return replay


def measure(script, name, size, device, kind, limit, compiled=False):
    """One row of the table."""
    steps, update, capture = kind
    rate = matmul_rate(device)
    if device.type == "cuda":  # from here on, so without that product's own matrices and other rows' workspaces
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    update()
    with FlopCounterMode(display=False) as counter, Operations() as operations:
        update()
    flop = counter.get_total_flops() / steps
    eager = seconds_of(update, device, limit) / steps
    row = {"script": script, "update": name, "size": size, "threads": torch.get_num_threads()}
    row |= {"device": device.type, "ops": operations.count // steps, "eager_per_s": 1 / eager, "gflop": flop / 1e9}
    best = eager
    if device.type == "cuda":
        best = seconds_of(graph_of(update, capture), device, limit) / steps
        row |= {"graph_per_s": 1 / best, "peak_mb": torch.cuda.max_memory_allocated() / 1e6}
        row["device"] = torch.cuda.get_device_name()
        if compiled and script != "sac":  # which data.py never compiles
            began = clock()
            replay = graph_of(update, partial(data.capture, compiled=True))
            row |= {"compile_s": clock() - began, "compiled_per_s": steps / seconds_of(replay, device, limit)}
    floor = flop / ((rate + matmul_rate(device)) / 2)
    return row | {"floor_ms": 1e3 * floor, "fraction_of_floor": floor / best}


def profile(script, name, size, device, kind, calls=10, most=12):
    """Lines of text: what a step runs on the device, on CUDA as one graph."""
    steps, update, capture = kind
    cuda = device.type == "cuda"
    call, activity = (graph_of(update, capture), ProfilerActivity.CUDA) if cuda else (update, ProfilerActivity.CPU)
    call()
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(calls):
            call()
        if cuda:
            torch.cuda.synchronize()
    time_of = lambda event: event.self_device_time_total if cuda else event.self_cpu_time_total
    spent = [(time_of(event), event) for event in profiler.key_averages() if cuda or event.key.startswith("aten::")]
    spent = [pair for pair in spent if pair[0] > 0]  # not the host's calls
    spent.sort(key=lambda pair: -pair[0])
    total, count = sum(own for own, _ in spent), sum(event.count for _, event in spent)
    what, n = "kernels" if cuda else "operations", calls * steps
    lines = [f"== {script}, {name}, {size}: {count / n:.0f} {what} and {total / n:.0f} us a step"]
    for own, event in spent[:most]:
        lines.append(f"{own / total:7.1%} {event.count / n:8.1f}x {own / event.count:9.1f} us  {event.key:.110}")
    return lines


def show(row):
    text = {key: f"{value:,.3g}" if isinstance(value, float) and value < 100 else value for key, value in row.items()}
    text = {key: f"{value:,.0f}" if isinstance(value, float) else str(value or "") for key, value in text.items()}
    print(f"| {' | '.join(text.get(key, '') for key in COLUMNS)} |", flush=True)


def each(args, device, work):
    """Calls work(script, name, size, device, kind) for every update that is asked for. A script that fails does not
    keep the others from it; the program ends, with the names of those, after the last."""
    failed = []
    for size in args.size:
        for script in args.only:
            kinds = {}
            try:
                with tempfile.TemporaryDirectory() as folder:
                    file = random_data(args.env, Path(folder))
                    kinds |= build(script, args.env, size, device, file, args.flags.split())
                for name, kind in kinds.items():
                    work(script, name, size, device, kind)
            except (RuntimeError, data.DataError):  # MerPO has not every family
                traceback.print_exc()
                failed.append(f"{script}, {size}")
            kinds = kind = None
            gc.collect()
    if failed:
        raise SystemExit(f"speed.py: not measured: {'; '.join(failed)}")


def table(args, device):
    """Prints and returns all rows, and writes them to --out as they come."""
    global clock
    clock = time.process_time if args.cpu_time else time.perf_counter
    rows = []

    def work(script, name, size, device, kind):
        for threads in args.threads or [torch.get_num_threads()]:
            torch.set_num_threads(threads)
            row = measure(script, name, size, device, kind, args.seconds, args.compile)
            rows.append(row)
            show(row)
            if args.out:
                short = [{key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows]
                write(args.out, short, COLUMNS)

    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    each(args, device, work)
    return rows


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*SCRIPTS, "sac"], default=[*SCRIPTS, "sac"], help="these scripts")
    parser.add_argument("--size", nargs="+", choices=["paper", "small"], default=["paper", "small"])
    parser.add_argument("--env", choices=list(focal.TABLE), default="walker-params")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--threads", nargs="+", type=whole, help="numbers of PyTorch's threads to compare on the CPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, where others compute too")
    parser.add_argument("--compile", action="store_true", help="on CUDA: compiled too, which takes a minute an update")
    parser.add_argument("--flags", default="", help="more flags for the scripts, as one string")
    parser.add_argument("--out", type=Path, help="write the rows to this CSV as they come")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write instead what runs in a step")
    args = parser.parse_args(argv)
    if args.cpu_time and (args.device != "cpu" or args.threads != [1]):
        parser.error("--cpu-time: expected --device cpu --threads 1 beside it")
    if args.profile and (args.threads or args.compile or args.cpu_time or args.out):
        parser.error("--profile: expected none of --threads, --compile, --cpu-time and --out beside it")
    return args


@main_of
def main(argv):
    args = arguments(argv)
    device = data.choose_device(args.device)
    for flag, path in ("--out", args.out), ("--profile", args.profile):
        if path and not path.parent.is_dir():
            raise data.DataError(f"{flag} {path}: there is no folder {path.parent}")
    if not args.profile:
        return table(args, device)
    with open(args.profile, "w") as file:
        each(args, device, lambda *kind: print(*profile(*kind), sep="\n", file=file, flush=True))


if __name__ == "__main__":
    main()
