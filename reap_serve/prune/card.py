"""The model card of a pruned checkpoint: its origin, what was dropped, how to serve it, its limits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from reap_serve.errors import PlanError
from reap_serve.model import ModelSource
from reap_serve.plan.record import Plan
from reap_serve.prune.manifest import Manifest, ParameterCount
from reap_serve.shown_text import shown

# What would be markup; an underscore within a word is none.
MARKUP = re.compile(r"[\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_])")
# What the table says already, and what says nothing of the traffic.
SAID = ("num_experts", "keep_experts", "python")
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
        f"# {_escaped(name)}, {stay} of {manifest.experts_before} experts",
        "",
        f"{fraction:.0%} of the routed experts of {'every layer' if is_uniform else 'the layers'} "
        f"were dropped by {_as_code(manifest.plan.criterion)} with "
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
        f"| quantisation | {_escaped(manifest.source_fingerprint.quantization or 'none')} | unchanged |",
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
        *_traffic(manifest.plan),
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


def _traffic(plan: Plan) -> Iterator[str]:
    """What the plan rests on, in numbers: the names of slices are the user's own, and a card is read by all."""
    lines = [*_observed(plan), *_retained(plan)]
    for key, value in {**plan.provenance, **plan.summary}.items():
        if isinstance(value, str | int | float) and not isinstance(value, bool) and key not in SAID:
            lines.append(f"- {_escaped(key.replace('_', ' '))}: {_escaped(str(value))}")
    yield from lines or ["The plan states nothing of its traffic."]


def _observed(plan: Plan) -> Iterator[str]:
    observed = plan.provenance.get("observed")
    tokens = observed.get("tokens") if isinstance(observed, Mapping) else None
    counts = [count for count in tokens.values() if isinstance(count, int)] if isinstance(tokens, Mapping) else []
    if not isinstance(observed, Mapping) or not counts:
        return
    requests = observed.get("requests")
    of_requests = f" of {requests:,} requests" if isinstance(requests, int) and requests else ""
    if len(counts) == 1:
        yield f"- {counts[0]:,} tokens{of_requests}, in one slice"
    else:
        spread = f"from {min(counts):,} to {max(counts):,} tokens in each"
        yield f"- {sum(counts):,} tokens{of_requests}, in {len(counts)} slices: {spread}"


def _retained(plan: Plan) -> Iterator[str]:
    from reap_serve.plan.summary import summary_of

    try:
        retained = summary_of(plan).retained_saliency
    except PlanError:
        return
    worst = retained.slices.get(retained.worst_slice)
    of_worst = "" if worst is None or len(retained.slices) == 1 else f", {worst:.1%} of the slice that keeps least"
    yield f"- saliency by {_as_code(retained.criterion)} of the experts that stay: {retained.mixture:.1%}{of_worst}"


def _as_code(text: str) -> str:
    """Text that is not ours, as it stands; a backtick would end it."""
    return f"`{shown(text).replace('`', chr(39))}`"


def _escaped(text: str) -> str:
    """Text that is not ours, as one line without markup."""
    return MARKUP.sub(r"\\\g<0>", shown(text))


def _mtp_lines(manifest: Manifest) -> Iterator[str]:
    if manifest.mtp == "cut":
        yield (
            "- The multi-token-prediction layers were cut to the experts that the last layer keeps, without statistics "
            "of their own: drafts may be accepted less often; outputs are not affected."
        )
    elif manifest.mtp == "drop":
        yield "- The multi-token-prediction layers were dropped."
