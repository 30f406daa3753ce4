"""Batched stepping against a bare loop around `Rollout.rollout` with the same models, interleaved in one run.

python benchmark/stepping.py
"""

import argparse
from timeit import timeit

import numpy as np
from retest import main_of

import envs


@main_of
def main(argv):
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    print("environment steps per second")
    print(f"{'family':<16} {'threads':>7} {'bare loop':>10} {'vector env':>10} {'ratio':>6}")
    for name in (name for name, row in envs.FAMILIES.items() if row.xml):
        for threads in sorted({1, envs.cores()}):
            distinct = len(envs.family(name).only) or 25
            tasks = envs.sample_tasks(name, distinct, seed=0).repeat(200 // distinct, axis=0)
            env = envs.make(name, tasks, threads=threads)
            env.reset()
            physics, action = env.physics, np.random.default_rng(0).uniform(-1, 1, env.action_space.shape)
            control = np.repeat((action * physics.control_scale)[:, None], physics.row.frame_skip, axis=1)
            start = env._full[:, : physics.size].copy()

            def bare(physics=physics, control=control, state=start):
                physics.pool.rollout(
                    physics.models, physics.data, state, control, skip_checks=True,
                    nstep=physics.row.frame_skip, state=physics.out, sensordata=physics.sensors,
                )  # fmt: skip
                state[:] = physics.out[:, -1]

            pairs, full = [], lambda: env.step(action)
            for _ in range(5):
                start[:] = env._full[:, : physics.size]  # both step the same states
                pairs.append([40 * len(tasks) / timeit(call, "gc.enable()", number=40) for call in (bare, full)])
            slow, fast = np.median(pairs, axis=0)
            ratio = np.median([full / bare for bare, full in pairs])
            print(f"{name:<16} {threads:>7} {slow:>10,.0f} {fast:>10,.0f} {ratio:>6.0%}")


if __name__ == "__main__":
    main()
