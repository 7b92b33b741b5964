"""`reap-serve demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import note, print_json, stdout

if TYPE_CHECKING:
    from reap_serve.demo.run import DemoResult


@app.command("demo")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for every artifact.")] = Path("demo-output"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run the whole loop on the small real model that ships with the project, on a CPU."""
    from reap_serve.demo.run import run_demo
    from reap_serve.publish import new_directory

    with new_directory(output, overwrite=overwrite) as directory:
        # Shown under the name that the directory will have.
        result = run_demo(directory, lambda line: note(line.replace(str(directory), str(output)))).at(directory, output)
        (directory / "demo.json").write_text(result.model_dump_json(indent=2) + "\n")
    if as_json:
        print_json(result)
    else:
        _print(result)


def _print(result: DemoResult) -> None:
    from rich.table import Table

    table = Table(
        title="Perplexity of held-out answers: all 32 experts a layer, and 16 of them chosen from the observed domain"
    )
    table.add_column("domain")
    table.add_column("base", justify="right")
    for criterion in result.table[0].masked:
        table.add_column(f"{criterion}, masked", justify="right")
    table.add_column("reap, pruned and served", justify="right")
    for row in result.table:
        cells = [f"{value:.2f} ({value / row.base - 1:+.0%})" for value in (*row.masked.values(), row.served)]
        table.add_row(f"{row.domain} (observed)" if row.observed else row.domain, f"{row.base:.2f}", *cells)
    stdout.print(table)
    base, candidate = result.compare.memory.base, result.compare.memory.candidate
    if base.weights_bytes and candidate.weights_bytes:
        stdout.print(
            f"weights {base.weights_bytes / 1e6:.1f} MB -> {candidate.weights_bytes / 1e6:.1f} MB; "
            f"KV cache {base.kv_cache_tokens} -> {candidate.kv_cache_tokens} tokens"
        )
    stdout.print(f"asked through the openai client: {result.question}")
    stdout.print(f"the pruned model answered:       {result.answer}")
    stdout.print(f"took {result.seconds / 60:.1f} minutes")
    stdout.print("next, on your own model: reap-serve observe MODEL TRAFFIC.jsonl --output my.stats.safetensors")
