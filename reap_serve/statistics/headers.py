"""The header of merged statistics: what all inputs are of, and every window once."""

from __future__ import annotations

from collections.abc import Sequence

from reap_serve.errors import MismatchError, RequestError
from reap_serve.model import require_same_model
from reap_serve.records import provenance
from reap_serve.statistics.record import SCHEMA_VERSION, Header, Layer, Window
from reap_serve.traffic.receipt import SliceReceipt


def merge_headers(headers: Sequence[Header], names: Sequence[str]) -> Header:
    """The header of the sum.

    Args:
        headers: Of every input.
        names: Of the inputs, for errors.

    Raises:
        MismatchError: The models differ, a layer has two names, or a window is there twice.
        RequestError: There is nothing to merge.
    """
    if not headers:
        raise RequestError("there is nothing to merge", "give at least one statistics file")
    layers: dict[int, Layer] = {}
    windows: dict[str, Window] = {}
    engine: dict[str, set[str]] = {}
    traffic: dict[str, SliceReceipt] = {}
    for header, name in zip(headers, names, strict=True):
        require_same_model(headers[0].model, header.model, names[0], name)
        for layer in header.layers:
            if layers.setdefault(layer.index, layer) != layer:
                raise MismatchError(
                    f"{name} calls layer {layer.index} {layer.name}, {names[0]} calls it {layers[layer.index].name}",
                    "use files that were made from the same checkpoint",
                )
        for window in header.windows:
            if window.id in windows:
                raise MismatchError(
                    f"{name} holds window {window.id}, which another input holds already: it would count twice",
                    "leave one of the two out",
                )
            windows[window.id] = window
        for slice_name, receipt in header.traffic.items():
            traffic[slice_name] = traffic[slice_name] + receipt if slice_name in traffic else receipt
        for key, value in header.engine.items():
            engine.setdefault(key, set()).update(value.split(", "))
    return Header(
        schema_version=SCHEMA_VERSION,
        model=headers[0].model,
        layers=tuple(layers[index] for index in sorted(layers)),
        slices=tuple(sorted({name for header in headers for name in header.slices})),
        windows=tuple(sorted(windows.values(), key=lambda window: (window.started, window.id))),
        engine={key: ", ".join(sorted(engine[key])) for key in sorted(engine)},
        traffic={name: traffic[name] for name in sorted(traffic)},
        provenance=provenance(("numpy", "safetensors")),
    )
