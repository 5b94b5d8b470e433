"""`retrieval evaluate`: recall@K, NDCG@K and MRR of a trained encoder, exactly and through an index."""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from retrieval.cli.console import OUT, progress, say
from retrieval.cli.options import add_index_options, add_json_option, index_spec
from retrieval.errors import InputError

if TYPE_CHECKING:
    from retrieval.data.dataset import Dataset
    from retrieval.evaluation.offline import Report
    from retrieval.index.choice import AutoIndex
    from retrieval.index.spec import IndexSpec

__all__ = ["add_parser", "evaluate_run", "report_table"]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure recall@K, NDCG@K and MRR of a trained encoder",
        description="Rank each held-out item among the whole catalogue, under the split that the run was trained on.",
    )
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder made by `retrieval ingest`")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder made by `retrieval train`")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where report.json and recall.png go (default: RUN)")
    add_index_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Evaluate."""
    from retrieval.data.dataset import Dataset

    dataset = Dataset(parsed.dataset)
    report = evaluate_run(dataset, parsed.run_dir, index_spec(parsed))
    out = parsed.out or parsed.run_dir
    write_report(report, out, title=f"{parsed.dataset.name}: {report.split.protocol}, {report.queries:,} users")
    if parsed.json:
        print(report.model_dump_json())
        return
    OUT.print(report_table(report))
    say(f"report in {out / 'report.json'}, plot in {out / 'recall.png'}")


def evaluate_run(dataset: "Dataset", run_dir: Path, spec: "IndexSpec | AutoIndex") -> "Report":
    """Evaluate a training run under its own split, showing progress."""
    from retrieval.data.splits import SplitInfo, split_dataset
    from retrieval.encoder.inference import embed_users, item_vectors
    from retrieval.evaluation.offline import evaluate
    from retrieval.index.searcher import Searcher
    from retrieval.jobs.index_choice import built_index
    from retrieval.jobs.publish import current_user_embeddings, load_trained

    encoder, info = load_trained(dataset, run_dir)
    split_info = SplitInfo.parse(info.split, str(run_dir))
    if split_info.protocol == "all":
        raise InputError(f"{run_dir}: was trained on every event, so none is left to evaluate on")
    split = split_dataset(dataset, split_info)
    vectors = item_vectors(encoder)
    built = built_index(vectors, current_user_embeddings(dataset, encoder), spec, run_dir, say)
    searcher = Searcher(built.index, dataset.vocabulary.rank_by_id)
    with progress("evaluate") as update:
        report = evaluate(
            dataset,
            split,
            partial(embed_users, encoder),
            vectors,
            encoder.config.max_length,
            name=encoder.config.title,
            searcher=searcher,
            on_queries=lambda done, total: update(done, total, "users"),
        )
    return report.model_copy(update={"tables": info.training.get("tables", {})})


def write_report(report: "Report", out: Path, *, title: str, possible: Mapping[int, float] | None = None) -> None:
    """Write `report.json` and `recall.png`."""
    from retrieval.evaluation.offline import KS
    from retrieval.evaluation.plot import plot_recall

    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(report.model_dump_json(indent=2), encoding="utf-8")
    plot_recall(report, out / "recall.png", title=title, ks=KS, possible=possible)


def report_table(report: "Report", possible: Mapping[int, float] | None = None) -> Table:
    """A report as a table: one ranker a row, intervals in brackets."""
    from retrieval.evaluation.offline import KS

    columns = [f"recall@{k}" for k in KS] + ["ndcg@10", "mrr"]
    moment = f" at {report.split.time}" if report.split.time is not None else ""
    title = f"{report.split.protocol}{moment}: {report.queries:,} users, {report.candidates:,} candidates"
    targets = f"targets: {', '.join(report.positive)}; " if any(report.positive) else ""
    caption = f"{targets}equal times by {report.tie_order}; own history hidden; ± half of the 95% interval"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("ranker")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        estimates = [row.metrics[column] for column in columns]
        table.add_row(row.ranker, *(f"{e.mean:.4f} ±{(e.high - e.low) / 2:.3f}".replace("0.", ".") for e in estimates))
    if possible:
        table.add_row("possible", *(f"{possible[k]:.4f}      ".replace("0.", ".") for k in KS), "", "")
    return table
