"""`reap-serve merge`: statistics and a checkpoint to one with merged experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import print_json, progress_bar, stdout
from reap_serve.cli.plan_options import parse_mix


@app.command("merge")
def merge_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub id; not quantised.")],
    stats: Annotated[list[str], typer.Argument(metavar="STATS...", help="Statistics with the sums that METHOD takes.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    keep_experts: Annotated[int, typer.Option("--keep-experts", min=1, help="Experts of each layer of the output.")],
    method: Annotated[
        str,
        typer.Option(metavar="m-smoe|hc-smoe|ream", help="How experts are grouped; see reap_serve/merge/grouping.py."),
    ] = "hc-smoe",
    mix: Annotated[
        str | None, typer.Option(metavar="SLICE=WEIGHT,...", help="Share of each slice; as observed by default.")
    ] = None,
    align: Annotated[
        bool | None, typer.Option("--align/--no-align", help="Permute hidden units to fit; by default as METHOD does.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Merge experts, as a baseline to compare pruning with: a checkpoint of the pruned one's size."""
    from reap_serve.merge.grouping import method_named
    from reap_serve.merge.run import MergeRequest, merge
    from reap_serve.publish import refuse_existing_directory
    from reap_serve.statistics.merge import merge_files

    method_named(method)
    refuse_existing_directory(output, overwrite, [model, *stats])
    request = MergeRequest(method, keep_experts, {} if mix is None else parse_mix(mix), align)
    statistics = merge_files(stats)
    with progress_bar() as bar:
        task = bar.add_task("layers", total=len(statistics.header.layers))
        result = merge(
            model, statistics, output, request, overwrite=overwrite, advance=lambda layers: bar.advance(task, layers)
        )
    document: dict[str, object] = {
        "output": str(result.output),
        "method": method,
        "tensors": result.tensors,
        "bytes_written": result.bytes_written,
        "seconds": round(result.seconds, 3),
        "experts_before": result.experts_before,
        "experts_after": result.experts_after,
        "experts_averaged": result.experts_averaged,
    }
    if as_json:
        print_json(document)
        return
    stdout.print(
        f"{result.output}: {result.experts_after} of {result.experts_before} experts a layer by {method}, "
        f"{result.experts_averaged} of them averages, {result.bytes_written / 1e9:.2f} GB in {result.seconds:.1f} s"
    )
