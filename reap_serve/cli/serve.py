"""`reap-serve serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import note
from reap_serve.errors import RequestError

if TYPE_CHECKING:
    from reap_serve.records import JsonValue


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model directory or hub id.", metavar="MODEL")],
    observe: Annotated[
        str | None,
        typer.Option("--observe", metavar="DIR", help="Record, and write statistics files to DIR or an fsspec URL."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", metavar="PLAN", help="Serve as if PLAN were pruned; see also --plan.")
    ] = None,
    plans: Annotated[
        list[str] | None,
        typer.Option("--plan", metavar="NAME=PLAN", help="A plan that requests choose by vllm_xargs.reap_plan."),
    ] = None,
    mask_phase: Annotated[
        Literal["all", "decode"],
        typer.Option(help="decode: the full model reads prompts, and plans write the answers alone."),
    ] = "all",
    mask_places: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            max=32,
            help="Plans that CUDA graphs have room for at a time, at most 32; each may cost time in every step. By "
            "default one more than the plans given here, and none where none is given.",
        ),
    ] = None,
    recorder: Annotated[
        Literal["auto", "inline", "deferred", "moe_sum"],
        typer.Option(help="How to record; auto takes for each layer what is exact and costs least."),
    ] = "auto",
    sample_fraction: Annotated[float, typer.Option(help="Probability of recording a token, at most.")] = 1.0,
    overhead_budget: Annotated[
        str,
        typer.Option(
            metavar="FRACTION|none",
            help="Fraction of the engine's time that recording may take; it lowers the probability. "
            "none records every token.",
        ),
    ] = "0.02",
    slices: Annotated[
        list[str] | None,
        typer.Option(
            "--slice",
            metavar="NAME",
            help="A slice that requests may name; others count as `other`. Repeatable; without it any name is taken.",
        ),
    ] = None,
    flush_seconds: Annotated[float, typer.Option(help="Time between two statistics files.")] = 60.0,
    minimum_tokens: Annotated[
        int, typer.Option(help="A slice with fewer recorded tokens waits for the next file; 0 writes all there is.")
    ] = 1000,
    keep_kernel: Annotated[
        bool,
        typer.Option(
            "--keep-kernel", help="Leave the experts' kernel to vLLM, and refuse where it cannot be observed."
        ),
    ] = False,
) -> None:
    """Run vLLM's OpenAI server with observation on; options after MODEL that are not below are those of `vllm serve`.

    Routes under /v1/reap start and stop recording, flush and switch plans; /metrics has metrics called reap_serve_*.
    """
    if model.startswith("-"):
        raise RequestError(f"{model} stands where MODEL should", "write reap-serve serve MODEL [options]")
    budget = _budget(overhead_budget)
    if minimum_tokens < 0:
        raise RequestError(f"--minimum-tokens {minimum_tokens} is negative", "give 0 or more")
    from reap_serve import model as files_of_model
    from reap_serve.adapter.fit import require_fit
    from reap_serve.serve.become import become, shell_line
    from reap_serve.serve.command import server_command
    from reap_serve.serve.plan_files import named_plan_files, require_fitting
    from reap_serve.statistics.storage import is_url, require_folder

    # Of hub ids vLLM judges itself; a name without a slash is none of a model with experts.
    if model.startswith(("/", "./", "../")) or "/" not in model:
        files_of_model.require_path(model)
    if Path(model).is_dir():
        files_of_model.require_utf8_path(Path(model))
        if observe is not None:
            from reap_serve.adapter.defects import refuse_misrouted_family

            refuse_misrouted_family(files_of_model.open_model(model).config)
    files, active = named_plan_files(plans or [], mask)
    if mask_places is not None and mask_places < len(files):
        raise RequestError(
            f"--mask-places {mask_places} has no room for {len(files)} plans", f"give {len(files)} or more"
        )
    require_fitting(model, files)
    if observe is not None:
        require_folder(observe)
    settings: dict[str, JsonValue] = {
        "recording": observe is not None,
        "recorder": recorder,
        "sample_fraction": sample_fraction,
        "overhead_budget": budget,
        "flush_seconds": flush_seconds,
        "minimum_tokens": minimum_tokens,
        "keep_kernel": keep_kernel,
        "plans": files,
        "mask": active,
        "mask_phase": mask_phase,
        "mask_places": mask_places,
    }
    if slices:
        settings |= {"slices": _slice_names(slices), "max_slices": max(16, len(set(slices)) + 2)}
    if observe is not None:
        settings["directory"] = observe if is_url(observe) else str(Path(observe).resolve())
    command = server_command(model, settings, context.args)
    require_fit()
    if observe is not None and budget is not None:
        note(f"recording takes at most {budget:g} of the engine's time; --overhead-budget none records every token")
    note(shell_line(command))
    become(command)


def _budget(text: str) -> float | None:
    """The value of --overhead-budget; None records every token."""
    if text == "none":
        return None
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not 0.0 < budget < 1.0:
        raise RequestError(f"--overhead-budget {text} is not in (0, 1)", "give a fraction such as 0.02, or none")
    return budget


def _slice_names(names: list[str]) -> list[str]:
    from reap_serve.slice_name import RULE, is_slice_name

    for name in names:
        if not is_slice_name(name):
            raise RequestError(f"--slice {name} is not {RULE}", "give a shorter or a plainer name")
    return sorted(set(names))
