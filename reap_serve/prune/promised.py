"""What a configuration promises and the weights lack: towers and draft layers that an engine would start without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reap_serve.architectures.names import TensorNames
from reap_serve.architectures.spec import Architecture
from reap_serve.prune.checkpoint import Checkpoint
from reap_serve.prune.findings import Finding, warning
from reap_serve.records import JsonValue

# Beginnings of the modules that hold what a part of config.json describes.
TOWERS: Mapping[str, tuple[str, ...]] = {
    "vision_config": ("vis", "vit", "image", "img", "patch", "mm_", "siglip", "clip"),
    "audio_config": ("audio", "speech", "sound", "whisper", "conformer"),
    "speech_config": ("speech", "audio"),
    "talker_config": ("talker",),
    "code2wav_config": ("code2wav",),
}


def inspect_promises(
    config: Mapping[str, JsonValue], architecture: Architecture, names: TensorNames, checkpoint: Checkpoint
) -> Iterator[Finding]:
    """Warns of towers and of multi-token-prediction layers without a tensor."""
    segments = {segment for name in checkpoint.tensors for segment in name.split(".")}
    for key, value in _parts(config):
        if key in TOWERS and value and not any(segment.startswith(TOWERS[key]) for segment in segments):
            yield warning("promised", f"config.json has a {key}, and no tensor belongs to it")
    text = architecture.text_config(config)
    count_keys = ("num_nextn_predict_layers",) if architecture.mtp is None else architecture.mtp.count_keys
    stated = next((key for key in count_keys if isinstance(count := text.get(key), int) and count > 0), None)
    if stated is not None and not any(names.role(name).is_mtp for name in checkpoint.tensors):
        yield warning("promised", f"config.json has {stated} {text[stated]}, and no tensor belongs to such a layer")


def _parts(config: Mapping[str, JsonValue]) -> Iterator[tuple[str, Mapping[str, JsonValue]]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield key, value
            yield from _parts(value)
