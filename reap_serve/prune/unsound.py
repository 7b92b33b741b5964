"""Experts of a checkpoint that serve wrong or cannot be served: pruning repairs a checkpoint by dropping them."""

from __future__ import annotations

from collections.abc import Mapping

from reap_serve.architectures.names import TensorNames
from reap_serve.architectures.resolve import resolve
from reap_serve.model import ModelSource
from reap_serve.prune.checkpoint import read_checkpoint
from reap_serve.prune.experts import LayerTensors, lacks
from reap_serve.prune.scales import doubts, read_small_scales


def unsound_experts(source: ModelSource) -> Mapping[tuple[int, int], str]:
    """What speaks against experts of the trunk, by layer and id, ascending; the first reason of each.

    An expert is unsound when it is stored in another form than most of its layer, lacks a tensor that they have, has a
    scale of which no value can be used, or other global scales for gate and up where kernels take one. Headers are read
    whole, and scales of up to 64 KiB.

    Raises:
        ArchitectureError: The family is unknown.
        InputFileError: The checkpoint cannot be read.
    """
    architecture = resolve(source.config)
    limits = architecture.limits(source.config)
    names = TensorNames(architecture, architecture.num_layers(source.config))
    checkpoint = read_checkpoint(source.path)
    layers = {layer: LayerTensors() for layer in limits.moe_layers}
    for tensor in checkpoint.tensors.values():
        role = names.role(tensor.name)
        if role.layer in layers and not role.is_mtp:
            layers[role.layer].add(role, tensor)
    found: dict[tuple[int, int], str] = {}
    for layer, tensors in layers.items():
        for lack in lacks(tensors, limits.experts_in(layer)):
            found.setdefault((layer, lack.index), str(lack))
    values = read_small_scales(checkpoint, checkpoint.tensors.values())
    for doubt in doubts(values, names, architecture.projections):
        if doubt.layer in layers and not doubt.is_mtp and doubt.expert is not None:
            found.setdefault((doubt.layer, doubt.expert), doubt.what)
    return dict(sorted(found.items()))
