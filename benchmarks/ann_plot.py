"""Curves of recall against throughput from the rows of `benchmarks.ann`.

python -m benchmarks.ann_plot docs/
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results" / "ann.csv"
STYLES = {"ours": "-", "ours, Searcher": "--"}


def main() -> None:
    """One PNG for each data set: one query at a time, and batches of 256, or of 64 where fewer queries were asked.

    One thread, the machine of its latest row; of each index the rows of its latest commit.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    folder: Path = parser.parse_args().folder
    with RESULTS.open(encoding="utf-8", newline="") as file:
        every = [row for row in csv.DictReader(file) if row["threads"] == "1"]
    for data, machine in {row["data"]: row["hardware"] for row in every}.items():
        rows = [row for row in every if (row["data"], row["hardware"]) == (data, machine)]
        latest = {(row["library"], row["index"]): row["commit"] for row in rows}
        rows = [row for row in rows if row["commit"] == latest[row["library"], row["index"]]]
        largest = 256 if all(float(row["queries_per_second_256"]) for row in rows) else 64
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
        colours: dict[str, str] = {}
        for row in rows:
            index = row["index"] if row["library"].startswith("ours") else f"{row['library']} {row['index']}"
            colours.setdefault(index, f"C{len(colours) % 10}")
        for axis, batch in zip(axes, (1, largest), strict=True):
            curves = dict.fromkeys((row["library"], row["index"]) for row in rows)
            for library, index in curves:
                points = _front(
                    [
                        (float(row["recall"]), float(row[f"queries_per_second_{batch}"]))
                        for row in rows
                        if (row["library"], row["index"]) == (library, index)
                    ]
                )
                name = index if library.startswith("ours") else f"{library} {index}"
                label = f"{library}: {index}" if library.startswith(("ours", "faiss")) else library
                style = STYLES.get(library, ":")
                marker = "s" if index == "Flat" else "o"
                axis.plot(*zip(*points, strict=True), style, color=colours[name], marker=marker, ms=3.5, label=label)
            axis.set(xlabel="recall@100", yscale="log", xlim=(0.8, 1.004), title=f"batches of {batch}")
            axis.grid(which="both", alpha=0.25)
        axes[0].set_title("one query at a time")
        axes[0].set_ylabel("queries per second, one thread")
        axes[1].legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        figure.suptitle(f"{data}, {machine}")
        target = folder / f"ann-{data.split()[0]}.png"
        figure.savefig(target, dpi=110)
        print(target)


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that nothing beats in both, by rising recall."""
    kept: list[tuple[float, float]] = []
    for recall, rate in sorted(points, reverse=True):
        if not kept or rate > kept[-1][1]:
            kept.append((recall, rate))
    return kept[::-1]


if __name__ == "__main__":
    main()
