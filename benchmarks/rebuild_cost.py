"""What a night costs as the log and the catalogue grow: seconds and peak memory of every stage.

    python -m benchmarks.rebuild_cost --work /tmp/cost --sizes 1:10 10:100 10:1000

A size is millions of events and thousands of items. For each a synthetic world is made once (`retrieval world`'s own
generator). Two nights follow, each a process of its own with the options of a user: the first from scratch over all
but the last day, the second from its weights with that day. Items that no user has met are in the catalogue as well, so
that it has the size asked for.

Every stage sees everything that it is to see: an epoch of the first night is a pass over the whole log, one of the
second over the users of the last day and a quarter as many others (the defaults of `rebuild` but for one epoch each).
The gates judge and do not refuse, since one epoch is not there for its quality.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from benchmarks.harness import append_rows, environment
from retrieval.data.synthetic import generate_world, large
from retrieval.data.synthetic_catalogue import DAY

RESULTS = Path(__file__).parent / "results" / "rebuild_cost.csv"
STAGES = ("ingest", "train", "evaluate", "finish", "index", "publish")
_MOST_ITEMS = 1_000_000
_OPEN_GATES = {"worse_by": 0.999, "min_ann_recall": 0, "min_catalogue": 0, "min_coverage": 0, "min_overlap": 0}
_OPEN_GATES |= {"max_search_ms": 60_000}


def main() -> None:
    """Run the nights of every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for worlds, registries and nights")
    parser.add_argument("--sizes", nargs="+", default=["1:10"], metavar="EVENTS:ITEMS", help="in millions : thousands")
    parser.add_argument("--index", default="Flat", help="as for rebuild (default: Flat)")
    parser.add_argument("--preset", default="demo", help="encoder (default: demo)")
    parser.add_argument("--keep", action="store_true", help="leave a size's folder when it is done")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    for size in parsed.sizes:
        events, items = (float(part) for part in size.split(":"))
        folder = parsed.work / f"{events:g}M-{items:g}k"
        old, new, items_file = _world(folder / "world", round(events * 1e6), round(items * 1e3))
        (folder / "log").mkdir(exist_ok=True)
        (folder / "gates.json").write_text(json.dumps(_OPEN_GATES), encoding="utf-8")
        for night, part in (("scratch", old), ("warm", new)):
            link = folder / "log" / part.name
            if not link.exists():
                link.symlink_to(part.resolve())
            report = _night(parsed, folder, items_file)
            assert report["start"] == ("scratch" if night == "scratch" else "live weights"), report["start"]
            row = _row(night, report) | {"index": parsed.index, "preset": parsed.preset}
            append_rows(parsed.out, [row | environment(torch.device("cpu"))])
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if not parsed.keep:
            shutil.rmtree(folder)


def _world(folder: Path, events: int, items: int) -> tuple[Path, Path, Path]:
    """Events before the last day, those of the last day, and items; made if they are not there."""
    old, new, items_file = (folder / name for name in ("old.parquet", "new.parquet", "items.parquet"))
    if items_file.exists():
        return old, new, items_file
    base = large()
    known = min(items, _MOST_ITEMS)
    config = base.model_copy(
        update={
            "users": max(100, round(events / base.events_per_user)),
            "items": known,
            "categories": min(base.categories, known // 20),
            "oracle_users": 1,
        }
    )
    world = generate_world(type(config).model_validate(config.model_dump()), folder / "made")
    parts = sorted(world.events_folder.glob("*.parquet"))
    latest = max(pc.max(pq.read_table(part, columns=["timestamp"])["timestamp"]).as_py() for part in parts)
    writers: dict[Path, pq.ParquetWriter] = {}
    for part in parts:
        table = pq.read_table(part)
        before = pc.less(table["timestamp"], latest - DAY)
        for path, mask in ((old, before), (new, pc.invert(before))):
            if path not in writers:
                writers[path] = pq.ParquetWriter(path, table.schema)
            writers[path].write_table(table.filter(mask))
    for writer in writers.values():
        writer.close()
    ids = [pq.read_table(world.items_file, columns=["item_id"])["item_id"].combine_chunks().cast(pa.string())]
    ids.append(pa.array([f"unmet{number}" for number in range(items - known)], pa.string()))
    # Last: whoever finds this file finds the others.
    pq.write_table(pa.table({"item_id": pa.concat_arrays(ids)}), items_file)
    shutil.rmtree(folder / "made")
    return old, new, items_file


def _night(parsed: argparse.Namespace, folder: Path, items: Path) -> dict[str, object]:
    command = [sys.executable, "-m", "retrieval.cli.main", "rebuild", str(folder / "log"), "--items", str(items)]
    command += ["--registry", str(folder / "registry"), "--work", str(folder / "work"), "--preset", parsed.preset]
    command += ["--gates", str(folder / "gates.json"), "--index", parsed.index, "--json", "--keep", "1"]
    command += ["--epochs", "1", "--warm-epochs", "1", "--finish-epochs", "1"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    report: dict[str, object] = json.loads(ran.stdout)["report"]
    return report


def _row(night: str, report: dict[str, object]) -> dict[str, object]:
    seconds, cpu = report["seconds"], report["cpu_seconds"]
    memory, vocabulary = report["memory_mb"], report["vocabulary"]
    assert isinstance(seconds, dict)
    assert isinstance(cpu, dict)
    assert isinstance(memory, dict)
    assert isinstance(vocabulary, dict)
    row: dict[str, object] = {"night": night, "events": report["events"], "users": report["users"]}
    row["items"] = vocabulary["items"]
    row["seconds"] = round(sum(seconds.values()), 1)
    row["cpu_seconds"] = round(sum(cpu.values()), 1)
    row |= {f"{stage}_s": seconds[stage] for stage in STAGES}
    row |= {f"{stage}_cpu_s": cpu[stage] for stage in STAGES}
    return row | {f"{stage}_mb": memory[stage] for stage in STAGES}


if __name__ == "__main__":
    main()
