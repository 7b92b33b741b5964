"""`reap-serve stats subspace`: where the experts' outputs lie before and after pruning or merging."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reap_serve.cli.output import keep_stdout_for, note, print_json, stdout
from reap_serve.cli.stats import stats
from reap_serve.errors import RequestError


@stats.command("subspace")
def subspace(
    original: Annotated[str, typer.Argument(metavar="ORIGINAL", help="Statistics of the original, with output_sum.")],
    models: Annotated[
        list[str],
        typer.Argument(metavar="NAME=FILE...", help="Statistics of models made from it, on the same traffic."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write, for `compare --subspace`.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Project the experts' mean outputs on the original's principal components; say how far they have shrunk."""
    from rich.table import Table

    from reap_serve.compare.subspace import ORIGINAL, analyse_subspace
    from reap_serve.file_kinds import SUBSPACE
    from reap_serve.publish import refuse_existing, write_file
    from reap_serve.statistics.merge import merge_files

    named: dict[str, str] = {}
    for model in models:
        name, separator, file = model.partition("=")
        if not separator or not name or not file or name in named or name == ORIGINAL:
            raise RequestError(
                f"{model} is not NAME=FILE with a name of its own", "write it as pruned=stats.safetensors"
            )
        named[name] = file
    if output is not None:
        keep_stdout_for(output)
        refuse_existing(output, overwrite, SUBSPACE, [original, *named.values()])
    found = analyse_subspace(merge_files([original]), {name: merge_files([file]) for name, file in named.items()})
    if output is not None:
        write_file(output, (found.model_dump_json() + "\n").encode(), overwrite=overwrite)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    table = Table("layer", f"{ORIGINAL}: directions", *(f"{name}: spread, directions" for name in named))
    for layer in found.layers:
        first, *others = layer.models
        cells = (f"{model.spread / first.spread:.2f}, {model.participation:.1f}" for model in others)
        table.add_row(str(layer.index), f"{first.participation:.1f}", *cells)
    stdout.print(table)
    if output is not None:
        note(f"wrote {output}")
