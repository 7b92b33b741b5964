"""`reap-serve prune`: a checkpoint and a plan to a smaller checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import note, print_json, progress_bar, stdout

if TYPE_CHECKING:
    from reap_serve.prune.job import Job

GIB = 1 << 30


@app.command("prune")
def prune_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub id (org/name[@revision]).")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan, from `reap-serve plan` or by hand.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory to make.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    mtp: Annotated[
        str,
        typer.Option("--mtp", metavar="cut|drop", help="Multi-token-prediction layers: cut with the trunk, or drop."),
    ] = "cut",
    max_shard_gib: Annotated[
        float, typer.Option("--max-shard-gib", min=0.001, help="Size of a weight file, about.")
    ] = 5,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=64, help="Weight files copied at a time.")] = 2,
    low_disk: Annotated[
        bool,
        typer.Option("--low-disk", help="Fetch weight files from the hub one at a time and delete each after use."),
    ] = False,
    unequal_layers: Annotated[
        bool,
        typer.Option(
            "--unequal-layers", help="Take a plan with other counts per layer; vLLM needs a patch to serve it."
        ),
    ] = False,
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter", metavar="DIR", help="Cut this LoRA adapter of MODEL to OUTPUT, and not MODEL itself."
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="REPOSITORY", help="Upload OUTPUT, private when it is new.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a checkpoint without the experts that a plan drops, byte for byte, without loading it."""
    from reap_serve.errors import RequestError
    from reap_serve.prune.decide import MtpChoice
    from reap_serve.prune.hub import HubRepository, push
    from reap_serve.prune.job import PruneOptions
    from reap_serve.prune.run import Watcher, prune

    if mtp not in {choice.value for choice in MtpChoice}:
        raise RequestError(f"--mtp is {mtp!r}", "give cut or drop")
    if adapter is not None:
        if low_disk or push_to_hub is not None or unequal_layers:
            raise RequestError("--adapter is given with an option of whole models", "give --adapter alone")
        _prune_adapter(adapter, model, plan, output, overwrite=overwrite, as_json=as_json)
        return
    if low_disk and Path(model).exists():
        raise RequestError(f"--low-disk is given and {model} is on this disk", "give a hub id, or leave --low-disk out")
    remote = HubRepository(model) if low_disk else None
    options = PruneOptions(MtpChoice(mtp), int(max_shard_gib * GIB), jobs, unequal_layers)
    with progress_bar(of_bytes=True) as bar:
        task = bar.add_task("copying")

        def started(job: Job) -> None:
            bar.update(task, total=job.layout.data_bytes)
            _warn(job)

        watcher = Watcher(started, lambda num_bytes: bar.advance(task, num_bytes))
        result = prune(model, plan, output, options, overwrite=overwrite, watcher=watcher, remote=remote)
    pushed = push(result.output, push_to_hub) if push_to_hub is not None else None
    document: dict[str, object] = {
        "output": str(result.output),
        "tensors": result.tensors,
        "bytes_read": result.bytes_read,
        "bytes_written": result.bytes_written,
        "seconds": round(result.seconds, 3),
        "experts_before": result.experts_before,
        "experts_after": result.experts_after,
        "left_out": list(result.left_out),
    }
    if pushed is not None:
        document["pushed"] = pushed
    if as_json:
        print_json(document)
        return
    fewest, most = result.fewest_after, result.experts_after
    kept = str(most) if fewest == most else f"{fewest} to {most}"
    stdout.print(
        f"{result.output}: {kept} of {result.experts_before} experts a layer, "
        f"{result.tensors} tensors, {result.bytes_written / 1e9:.2f} GB in {result.seconds:.1f} s"
    )


def _prune_adapter(adapter: Path, model: str, plan: Path, output: Path, *, overwrite: bool, as_json: bool) -> None:
    from reap_serve.prune.adapter import prune_adapter

    result = prune_adapter(adapter, model, plan, output, overwrite=overwrite)
    if as_json:
        print_json(
            {
                "adapter": str(adapter),
                "output": None if result.output is None else str(result.output),
                "changed": result.output is not None,
                "tensors": result.tensors,
                "dropped": result.dropped,
                "bytes_written": result.bytes_written,
                "seconds": round(result.seconds, 3),
                "experts_before": result.experts_before,
                "experts_after": result.experts_after,
            }
        )
    elif result.output is None:
        stdout.print(f"{adapter} changes neither experts nor routers: it needs no change, and nothing was written")
    else:
        stdout.print(f"{result.output}: {result.tensors} tensors, {result.dropped} went with their experts")


def _warn(job: Job) -> None:
    if not job.plan_is_bound:
        note("warning: the plan is bound to no model; only its layers and counts were compared")
    doubts = [f"{lack}, which other experts of its layer have" for lack in job.lacking]
    doubts += [doubt.what for doubt in job.doubts]
    for doubt in doubts[:5]:
        note(f"warning: {doubt}")
    if len(doubts) > 5:
        note(f"warning: {len(doubts) - 5} more scales are lacking or wrong; `reap-serve verify` names all")
    for name in job.companions.left_out[:20]:
        note(f"warning: {name} is left out{_why(name)}")
    if len(job.companions.left_out) > 20:
        note(f"warning: {len(job.companions.left_out) - 20} more files are left out; --json lists all")


def _why(name: str) -> str:
    from reap_serve.prune.recipe import RECIPE_NAME

    if name.rpartition("/")[2].startswith("adapter_"):
        return ": it belongs to an adapter of the uncut model, which `prune --adapter` cuts"
    if name == RECIPE_NAME:
        return ": it names experts by the numbers that they had"
    return ""
