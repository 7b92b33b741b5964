"""The model's side of the limits: from a fingerprint alone where that is enough, else from the model's config."""

from __future__ import annotations

from reap_serve.architectures.resolve import known_architectures, resolve
from reap_serve.errors import PlanError
from reap_serve.model import Fingerprint, ModelSource, fingerprint, require_same_model
from reap_serve.plan.limits import ModelLimits
from reap_serve.statistics.record import Header


def limits_of_statistics(header: Header) -> ModelLimits:
    """The limits that the statistics tell of.

    Raises:
        PlanError: Layers are missing, or the family's routers may be limited to groups, which no fingerprint tells.
    """
    model = header.model
    require_all_layers(header)
    family = known_architectures().get(model.architecture)
    if family is None or family.num_groups_keys:
        raise PlanError(
            f"routers of {model.architecture} may choose among groups of experts, which the statistics do not tell",
            "add --model MODEL",
        )
    return ModelLimits(model.architecture, model.num_experts, model.top_k, quantization=model.quantization)


def limits_of_model(header: Header, source: ModelSource) -> ModelLimits:
    """The limits that the model's config tells of.

    Raises:
        MismatchError: The statistics are of another model.
        PlanError: Layers are missing.
    """
    require_same_model(header.model, fingerprint(source), "the statistics", source.reference)
    require_all_layers(header)
    return limits_of_source(source)


def limits_of_source(source: ModelSource) -> ModelLimits:
    """The limits that a model's config tells of, whatever was observed."""
    found: Fingerprint = fingerprint(source)
    routing = resolve(source.config).limits(source.config)
    return ModelLimits(
        found.architecture,
        routing.num_experts,
        routing.top_k,
        routing.num_groups,
        routing.top_k_groups,
        found.quantization,
    )


def require_all_layers(header: Header) -> None:
    """Refuses statistics of a part of the model, such as those of one pipeline rank.

    Raises:
        PlanError: Layers are missing.
    """
    if len(header.layers) != header.model.num_layers:
        raise PlanError(
            f"the statistics cover {len(header.layers)} of {header.model.num_layers} layers with routed experts",
            "give the files of all pipeline ranks together",
        )
