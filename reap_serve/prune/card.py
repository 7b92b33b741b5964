"""The model card of a pruned checkpoint: its origin, what was dropped, how to serve it, its limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from reap_serve.model import ModelSource
from reap_serve.prune.manifest import Manifest, ParameterCount
from reap_serve.records import JsonValue

TAGS = ["moe", "pruned", "expert-pruning", "reap", "reap-serve", "vllm"]


def model_card(manifest: Manifest, source: ModelSource) -> str:
    """The card's text, with the metadata that the hub reads at its head.

    What the source's card states is taken over where it can be read and written again; else the card goes without it.
    """
    from yaml import YAMLError

    try:
        return _card(manifest, _inherited(source.path))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, YAMLError):
        return _card(manifest, {})


def _card(manifest: Manifest, inherited: Mapping[str, str]) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    is_hub_id = manifest.source_revision is not None
    data = ModelCardData(
        base_model=manifest.source.partition("@")[0] if is_hub_id else None,
        library_name="transformers",
        pipeline_tag=inherited.get("pipeline_tag", "text-generation"),
        license=inherited.get("license"),
        license_name=inherited.get("license_name"),
        license_link=inherited.get("license_link"),
        language=inherited.get("language"),
        tags=TAGS,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(manifest)}"))


def _inherited(directory: Path) -> Mapping[str, str]:
    """The licence and its like, which the source's card states for the weights."""
    from huggingface_hub import ModelCard

    path = directory / "README.md"
    if not path.is_file():
        return {}
    card = ModelCard.load(path, ignore_metadata_errors=True)
    return {key: value for key, value in card.data.to_dict().items() if value}


def _text(manifest: Manifest) -> str:
    name = manifest.source.rstrip("/").rpartition("/")[2].partition("@")[0]
    counts = [len(layer.old_ids) for layer in manifest.layers]
    fraction = 1 - sum(counts) / (len(counts) * manifest.experts_before)
    is_uniform = min(counts) == max(counts)
    stay = f"{max(counts)}" if is_uniform else f"{min(counts)} to {max(counts)}"
    lines = [
        f"# {name}, {stay} of {manifest.experts_before} experts",
        "",
        f"{fraction:.0%} of the routed experts of {'every layer' if is_uniform else 'the layers'} "
        f"were dropped by `{manifest.plan.criterion}` with "
        "[REAP](https://arxiv.org/abs/2510.13999) expert pruning. The weights that stay are those of the source, "
        "byte for byte.",
        "",
        "| | source | this model |",
        "|---|---|---|",
        f"| routed experts per layer | {manifest.experts_before} | {stay} |",
        f"| experts per token | {manifest.source_fingerprint.top_k} | {manifest.source_fingerprint.top_k} |",
        *_parameter_rows(manifest.parameters_before, manifest.parameters_after),
        f"| layers with routed experts | {manifest.source_fingerprint.num_layers} | "
        f"{manifest.source_fingerprint.num_layers} |",
        f"| quantisation | {manifest.source_fingerprint.quantization or 'none'} | unchanged |",
        "",
        "## Serve",
        "",
        "```",
        "vllm serve <this directory or repository>",
        "```",
        *(
            []
            if is_uniform
            else [
                "",
                "Layers have different numbers of experts: stock vLLM does not load it. See",
                "`patches/` of reap-serve for the change that does.",
            ]
        ),
        "",
        "## Traffic behind the choice",
        "",
        *_traffic(manifest.plan.summary, manifest.plan.provenance),
        "",
        "## Limits",
        "",
        "- Experts that the observed traffic did not use may be gone: other languages, domains and tools can be worse "
        "than the table of any benchmark shows. Compare on your own traffic before serving.",
        "- `reap_manifest.json` holds the plan and the old id of every expert; `reap_router.sidecar` holds the "
        "source's full routers, for watching drift. No loader reads them.",
        *_mtp_lines(manifest),
    ]
    return "\n".join(lines) + "\n"


def _parameter_rows(before: ParameterCount, after: ParameterCount) -> Iterator[str]:
    yield f"| parameters | {_readable(before.total)} | {_readable(after.total)} |"
    yield f"| of them active per token | {_readable(before.active)} | {_readable(after.active)} |"


def _readable(count: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def _traffic(summary: Mapping[str, JsonValue], origin: Mapping[str, JsonValue]) -> Iterator[str]:
    numbers = {**origin, **summary}
    simple = {key: value for key, value in numbers.items() if isinstance(value, str | int | float)}
    if not simple:
        yield "The plan states nothing of its traffic."
    for key, value in simple.items():
        yield f"- {key.replace('_', ' ')}: {value}"


def _mtp_lines(manifest: Manifest) -> Iterator[str]:
    if manifest.mtp == "cut":
        yield (
            "- The multi-token-prediction layers were cut to the experts that the last layer keeps, without statistics "
            "of their own: drafts may be accepted less often; outputs are not affected."
        )
    elif manifest.mtp == "drop":
        yield "- The multi-token-prediction layers were dropped."
