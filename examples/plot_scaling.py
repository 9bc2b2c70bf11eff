"""Draw what `textrl-gym bench --scaling` measured: python examples/plot_scaling.py scaling.json --out scaling.svg"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

PARTS = ("all", "update", "rollout", "reference")


def draw(measured: list[dict], file: Path) -> None:
    """Microseconds a token by rows and by new tokens, both axes logarithmic: a level line costs the same a token."""
    mpl.rcParams.update({"svg.hashsalt": "textrl-gym", "svg.fonttype": "none", "font.size": 9})
    names = list(dict.fromkeys(point["axis"] for point in measured))
    figure, panels = plt.subplots(1, len(names), figsize=(7.5, 3.2), sharey=True, layout="constrained", squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        points = [point for point in measured if point["axis"] == name]
        for part in PARTS:
            values = [point["value"] for point in points]
            axes.plot(values, [point[part] for point in points], marker="o", label=part, linewidth=1.4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.set_xlabel(name)
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("microseconds a token")
    panels[0][-1].legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(json.loads(args.record.read_text(encoding="utf-8"))["measured"], args.out)
    print(args.out)


if __name__ == "__main__":
    main()
