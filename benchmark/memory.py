"""Whether memory grows in long runs: the resident size of each script over many small gradient steps.

python benchmark/memory.py                          # 20,000 steps of each, the size at every evaluation
python benchmark/memory.py smac --steps 4000 --no-pictures
"""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
from kill import COUNT, FLAGS, FORK, NAMES, WIND, data, dataset_in, without_pictures

TINY = "--hidden 8 --batch-size 4 --meta-batch-size 2 --eval-episodes 1"
LENGTH = {
    "focal": "--encoder-steps {half} --steps {steps} --context-size 4 --alpha 50",
    "focal_pp": "--encoder-steps {tenth} --steps {steps} --context-size 4 --alpha 50",
    "smac": "--steps {half} --online-steps {half} --updates 1 --online-envs 4 --context-size 4",
    "merpo": "--model-steps {half} --steps {half} --inner-steps 1 --model-adapt-steps 1 --rollouts 5",
}


def resident():
    """Megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(name, steps, folder, dataset):
    """Runs a script; prints the resident size at every evaluation, and how far it moved over the last half."""
    module, sizes = NAMES[name], []
    log = data.Run.log
    data.Run.log = lambda *args: (log(*args), sizes.append(resident()))
    length = LENGTH[name].format(steps=steps, half=steps // 2, tenth=steps // 10)
    flags = f"{FLAGS[module]} {TINY} {length} --eval-every {max(1, steps // 40)} --env {WIND} --data {dataset}"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    module.main([*flags.split(), "--run-dir", str(folder)])
    half = sizes[len(sizes) // 2 :]
    moved = max(half) / half[0] - 1
    words = " ".join(f"{size:.0f}" for size in sizes)
    print(f"{name:<8} MB at each evaluation: {words}; over the last half {moved:+.2%}", file=sys.stderr)
    sys.exit(0 if moved < 0.01 and math.isfinite(moved) else 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs="*", metavar="program", help="scripts; default: all")
    parser.add_argument("--steps", type=COUNT, default=20_000, help="gradient steps (MerPO: iterations)")
    parser.add_argument("--no-pictures", action="store_true", help="without matplotlib, which grows over many pictures")
    args = parser.parse_args()
    if not set(args.programs) <= set(LENGTH):
        parser.error(f"expected some of {', '.join(LENGTH)}")
    if args.no_pictures:
        without_pictures()
    torch.set_num_threads(1)
    flat = True
    with tempfile.TemporaryDirectory() as root:
        dataset = dataset_in(Path(root) / "dataset")
        for name in args.programs or LENGTH:
            process = FORK.Process(target=measure, args=(name, args.steps, Path(root) / name, dataset))
            process.start()
            process.join()
            flat &= process.exitcode == 0
    print("flat within 1%" if flat else "NOT flat within 1%")
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    main()
