"""FOCAL++'s Figures 5c and 6: what its batch-wise attention looks at, from finished runs of focal_pp.py.

python benchmark/attention.py runs/focal_pp/sparse-point-robot/*quality=relabelled,*/seed*

Writes results/focal_pp-attention.csv or --out, one row for each run, and a PNG of the first run: the distribution of W
over transitions that no task rewards and over those that their task does; the variance of a task's embedding against
the share of transitions that no task rewards; and that variance beside the distance between tasks, which is what
decides whether a task can be told from another.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from report import ROOT, write
from retest import load_run, main_of

import data

WEIGHTS = "unweighted", "weighted"
SPARSITY = np.linspace(0, 0.95, 20)
CONTEXTS, SIZE = 16, 512  # contexts of each task at each sparsity, and transitions in each, as in the paper's Table 6


def area_under_curve(negative, positive):
    """Chance that a random positive is above a random negative; ties count half."""
    negative = np.sort(negative)
    below, not_above = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return (below + not_above).mean() / 2 / len(negative)


@torch.no_grad()
def weights_of(script, args, world, encoder, informative, silent):
    """W of transitions that no task rewards, and of those that their task does, in contexts drawn as in training."""
    generator = torch.Generator().manual_seed(0)
    n, count, _ = world.train_rows.shape
    index = torch.randint(count, (n, 8 * args.context_size), generator=generator)
    drawn = [torch.take_along_dim(world.train_rows, i[..., None], 1) for i in index.split(args.context_size, 1)]
    w = torch.cat([encoder.transitions(script.context_of(rows, world.split, args))[1] for rows in drawn], 1)
    return w[silent[index]].numpy(), w[informative.gather(1, index)].numpy()


@torch.no_grad()
def variances(script, args, world, encoder, informative, silent):
    """Variance of a task's embedding over contexts with a given share of silent transitions, and that variance as a
    share of z's: (2, 2, len(SPARSITY)), each without and with the last block's weights."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda pool, n: pool[torch.randint(len(pool), (CONTEXTS, n), generator=generator)]
    useless, result = silent.nonzero()[:, 0], []
    for share in SPARSITY:
        n, unweighted, weighted = round(share * SIZE), [], []
        for rows, useful in zip(world.train_rows, informative, strict=True):
            index = torch.cat([draw(useless, n), draw(useful.nonzero()[:, 0], SIZE - n)], 1)
            z, w = encoder.transitions(script.context_of(rows[index], world.split, args))
            unweighted.append(z.mean(1))
            weighted.append((w[..., None] * z).mean(1))
        parts = [script.separation(torch.stack(means)) for means in (unweighted, weighted)]
        result.append([[variance for *_, variance in parts], [2 * variance / rms**2 for _, rms, variance in parts]])
    return np.array(result).transpose(1, 2, 0)


def draw(zero, nonzero, curves, auc, path):
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    left, *others = figure.subplots(1, 3)
    bins = np.linspace(0, max(zero.max(), nonzero.max()), 50)
    for values, label in ((zero, "no task rewards it"), (nonzero, "its task rewards it")):
        left.hist(values, bins, density=True, alpha=0.6, label=label)
    left.set(xlabel="weight W of a transition", ylabel="density", title=f"Figure 5c, AUC {auc:.3f}", yscale="log")
    names = {"Figure 6": "variance of a task's embedding", "beside other tasks": "share of z's variance within a task"}
    for axes, curve, (title, label) in zip(others, curves, names.items(), strict=True):
        for values, weights in zip(curve, WEIGHTS, strict=True):
            axes.plot(SPARSITY, values, label=weights)
        axes.set(xlabel="share of transitions no task rewards", ylabel=label, title=title, yscale="log")
    for axes in (left, *others):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


@main_of
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run on relabelled data")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "focal_pp-attention.csv", help="the rows")
    parsed, rows = parser.parse_args(argv), []
    for folder in parsed.runs:
        script, args, world, agent = load_run(folder)
        encoder = agent.encoder
        ungated = not hasattr(getattr(encoder, "blocks", [None])[-1], "gate")
        quality = data.load(args.data).meta.get("quality") if args.data else args.quality
        data.refuse(
            (quality != "relabelled", f"{folder}: a run on {quality} data; expected relabelled"),
            (ungated, f"{folder}: a run without batch-wise attention; expected --attention both or batch"),
        )
        reward = world.train_rows.split(world.split, -1)[2][..., 0]  # (n, N), what contexts hold
        informative, silent = reward != 0, (reward == 0).all(0)
        zero, nonzero = weights_of(script, args, world, encoder, informative, silent)
        auc = area_under_curve(zero, nonzero)
        curves = variances(script, args, world, encoder, informative, silent)
        rows.append({"attention": args.attention, "seed": args.seed, "auc": round(float(auc), 4)})
        rows[-1] |= {"silent": round(silent.double().mean().item(), 3)}
        for key, (without, weighted) in zip(("lower_at", "share_lower_at"), curves, strict=True):
            rows[-1][key] = ", ".join(f"{share:.2f}" for share in SPARSITY[weighted < without])
        print(rows[-1], flush=True)
        for prefix, curve in zip(("", "share_"), curves, strict=True):
            for name, values in zip(WEIGHTS, curve, strict=True):
                columns = [f"{prefix}{name}_{share:.2f}" for share in SPARSITY]
                rows[-1] |= {column: float(f"{x:.4g}") for column, x in zip(columns, values, strict=True)}
        if len(rows) == 1:
            draw(zero, nonzero, curves, auc, parsed.out.with_suffix(".png"))
        write(parsed.out, rows)


if __name__ == "__main__":
    main()
