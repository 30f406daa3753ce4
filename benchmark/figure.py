"""A run's curve and embeddings side by side, and its metrics, into results/ for the README.

python benchmark/figure.py runs/focal/sparse-point-robot/small/seed0
"""

import argparse
import shutil
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="<run-dir>/<script>/<env>/<variant>/seed<k>")
    run = parser.parse_args().run.resolve()
    script, env = ("", "", *run.parts)[-4:-2]
    for name in ("curve.png", "embeddings.png", "metrics.csv"):
        if not (run / name).exists():
            raise SystemExit(f"figure.py: {run}: no {name} there; expected the folder of a run of an encoder's script")
    pictures = [imread(run / name) for name in ("curve.png", "embeddings.png")]
    height, widths = pictures[0].shape[0], [p.shape[1] * pictures[0].shape[0] / p.shape[0] for p in pictures]
    figure = Figure(figsize=(sum(widths) / 100, height / 100), dpi=100)
    left = 0.0
    for picture, width in zip(pictures, widths, strict=True):
        axes = figure.add_axes((left / sum(widths), 0, width / sum(widths), 1))
        axes.imshow(picture, aspect="auto")
        axes.axis("off")
        left += width
    figure.savefig(RESULTS / f"{script}-{env}.png")
    shutil.copy(run / "metrics.csv", RESULTS / f"{script}-{env}.csv")
    print(RESULTS / f"{script}-{env}.png")


if __name__ == "__main__":
    main()
