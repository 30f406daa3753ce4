"""The tables and the figure of all results, from results/runs.csv, runs-same-data.csv and datasets.csv alone.

python benchmark/report.py      # rewrites the part of benchmark/README.md between its two marks, and results/report.png

A return is normalised between the random and the expert data of its family (0 and 1). The interquartile mean of a
script's runs, over families and seeds, comes with a 95% bootstrap interval: runs are drawn anew within each family.
"""

import argparse
import csv
import io
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data

BEGIN, END = "<!-- report: made by benchmark/report.py -->", "<!-- report: end -->"
PROTOCOLS = ("offline", "online")
TABLES = ("runs", "datasets", "runs-same-data")
SCRIPTS = {"focal": "FOCAL", "focal_pp": "FOCAL++", "merpo": "MerPO"}  # the columns before SMAC's


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def write(path, rows, columns=None):
    """A CSV of these rows, whole or not at all; its columns, unless given, are all that there are."""
    text, columns = io.StringIO(), columns or dict.fromkeys(key for row in rows for key in row)
    table = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    data.write(path, text.getvalue().encode())


def digits(values):
    """How returns of a family are written: with two decimals if all are small."""
    return ".2f" if max(map(abs, values)) < 30 else ".0f"


def grouped(runs):
    """{(script, env, protocol): rows} of the runs that have this protocol."""
    groups = defaultdict(list)
    for row in runs:
        for protocol in PROTOCOLS:
            if row[f"{protocol}_last"]:
                groups[row["script"], row["env"], protocol].append(row)
    return groups


def with_spread(values, form):
    """Mean and, of several, standard deviation."""
    spread = f" ({values.std():{'.0f' if values.std() >= 10 else '.2g'}})" if len(values) > 1 else ""
    return f"{values.mean():{form}}{spread}"


def table(groups, same, scale):
    """Markdown: a line for each family, a cell for each script: its returns on contexts of the data and, behind a
    semicolon, on its own; `same` has SMAC's on the data that the others learn from."""
    names = ["family", "data", *SCRIPTS.values(), "SMAC's data", "SMAC", "SMAC on the others' data"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    numbers = lambda rows, key: np.array([float(row[key]) for row in rows if row[key]])
    for env in dict.fromkeys(env for _, env, _ in groups):
        found = [*((groups, script) for script in SCRIPTS), (groups, "smac"), (same, "smac")]
        found = [[source.get((script, env, kind), []) for kind in PROTOCOLS] for source, script in found]
        values = [[numbers(rows, f"{kind}_last") for rows, kind in zip(each, PROTOCOLS, strict=True)] for each in found]
        known = [numbers(next(filter(None, each), []), "data_return")[:1] for each in found]
        ends = [x for x in scale.get(env, ()) if x is not None]
        form = digits(np.concatenate([*(x for each in values for x in each), ends]))
        cells = ["; ".join(with_spread(x, form) for x in each if len(x)) for each in values]
        data_return, smac_data = (f"{x[0]:{form}}" if len(x) else "" for x in (np.concatenate(known[:3])[:1], known[3]))
        lines.append(f"| `{env}` | {' | '.join([data_return, *cells[:3], smac_data, *cells[3:]])} |")
    return "\n".join(lines)


def normalised(groups, scale, script, protocol):
    """[runs of a family (seeds,)] between random (0) and expert (1), of the families whose ends are known."""
    return {
        env: (np.array([float(row[f"{protocol}_last"]) for row in rows]) - scale[env][0])
        / (scale[env][1] - scale[env][0])
        for (name, env, kind), rows in groups.items()
        if (name, kind) == (script, protocol) and None not in scale.get(env, (None,))
    }


def interquartile_mean(values):
    """Mean of what is left without the lowest and the highest quarter, along the last axis."""
    values, cut = np.sort(values, axis=-1), values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(-1)


def interval(families, draws=2000):
    """Interquartile mean of all runs, and its 95% interval over bootstraps within families."""
    rng = np.random.default_rng(0)
    drawn = [rng.choice(runs, (draws, len(runs))) for runs in families.values()]
    low, high = np.quantile(interquartile_mean(np.concatenate(drawn, axis=1)), (0.025, 0.975))
    return interquartile_mean(np.concatenate(list(families.values()))), low, high


def draw(scores, path):
    figure = Figure(figsize=(8, 0.8 * len(scores) + 1.2), layout="constrained")
    axes = figure.add_subplot(xlabel="return, from that of random (0) to that of expert behaviour (1)")
    names = list(dict.fromkeys(env for families, *_ in scores.values() for env in families))
    for y, (families, mean, low, high) in enumerate(scores.values()):
        axes.plot([low, high], [y, y], color="black", linewidth=5, alpha=0.3, solid_capstyle="butt")
        axes.plot(mean, y, "|", color="black", markersize=16, markeredgewidth=2)
        for env, runs in families.items():
            colour, seen = f"C{names.index(env)}", axes.get_legend_handles_labels()[1]
            label = None if env in seen else env
            row, mark = y + 0.12 + 0.07 * names.index(env), "osD^vPX*<>"[names.index(env) % 10]
            axes.plot(runs, np.full(len(runs), row), mark, color=colour, label=label, markersize=3)
    axes.axvline(1, color="gray", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(scores)), [f"{script}.py, {protocol} contexts" for script, protocol in scores])
    axes.invert_yaxis()
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title("Interquartile mean over families and seeds, 95% interval", fontsize="medium")
    figure.savefig(path, dpi=110)


def report(runs, datasets, same=()):
    """The part between the marks, and the scores {(script, protocol): (families, mean, low, high)}."""
    ends = {}  # of a family's datasets of several sizes, the first that has both
    for row in datasets:
        found = [float(row[key]) if row[key] else None for key in ("random", "expert")]
        if None in ends.get(row["env"], [None]):
            ends[row["env"]] = found
    groups = grouped(runs)
    scores = {}
    for script, protocol in dict.fromkeys((script, protocol) for script, _, protocol in groups):
        families = normalised(groups, ends, script, protocol)
        if families:
            scores[script, protocol] = (families, *interval(families))
    lines = ["| script | contexts of the data | its own | families |", "|---|---|---|---|"]
    for script in dict.fromkeys(script for script, _ in scores):
        each = [scores.get((script, protocol)) for protocol in PROTOCOLS]
        cells = [f"{x[1]:.2f} ({x[2]:.2f} to {x[3]:.2f})" if x else "" for x in each]
        lines.append(f"| `{script}.py` | {' | '.join(cells)} | {max(len(x[0]) for x in each if x)} |")
    return f"{table(groups, grouped(same), ends)}\n\n" + "\n".join(lines), scores


def main(root=ROOT):
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    text, scores = report(*(read(root / "results" / f"{name}.csv") for name in TABLES))
    page = root / "benchmark" / "README.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    draw(scores, root / "results" / "report.png")
    print(text)


if __name__ == "__main__":
    main()
