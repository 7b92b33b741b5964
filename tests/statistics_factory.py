"""Headers of statistics that no engine made: one place for what every test of a stage behind `observe` needs."""

from __future__ import annotations

from collections.abc import Sequence

from reap_serve.model import Fingerprint
from reap_serve.records import Provenance
from reap_serve.statistics.record import SCHEMA_VERSION, Header, Layer, Window

STARTED, ENDED = "2026-01-01T00:00:00+00:00", "2026-01-01T00:01:00+00:00"


def fingerprint(
    num_layers: int,
    num_experts: int,
    top_k: int,
    *,
    architecture: str = "qwen3_moe",
    dtype: str = "bfloat16",
    weights: str = "d",
) -> Fingerprint:
    """A model that is nowhere; `weights` is the digit of which its weights' digest is made."""
    return Fingerprint(
        architecture=architecture,
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        dtype=dtype,
        quantization=None,
        config_sha256="c" * 64,
        weights_sha256=weights * 64,
    )


def window(
    id_: str = "w0",
    *,
    started: str = STARTED,
    ended: str = ENDED,
    recorder: str = "inline",
    requests: int = 1,
    prompt_tokens: tuple[int, int] = (1, 1),
) -> Window:
    """A complete window of every token; `prompt_tokens` are those of its requests, and of these the computed ones."""
    return Window(
        id=id_,
        started=started,
        ended=ended,
        recorder=recorder,
        requests=requests,
        prompt_tokens_total=prompt_tokens[0],
        prompt_tokens_computed=prompt_tokens[1],
        sample_fraction=1.0,
        complete=True,
    )


def header(
    model: Fingerprint,
    slices: Sequence[str] = ("default",),
    of: Window | None = None,
    layers: Sequence[int] | None = None,
) -> Header:
    """The header of one window's statistics; all decoder layers have experts unless `layers` names those that do."""
    indices = range(model.num_layers) if layers is None else layers
    return Header(
        schema_version=SCHEMA_VERSION,
        model=model,
        layers=tuple(Layer(index=index, name=f"model.layers.{index}.mlp.experts") for index in indices),
        slices=tuple(slices),
        windows=(window() if of is None else of,),
        engine={"vllm": "0.32.0"},
        provenance=Provenance(created=STARTED, tool="t", python="p", packages={}),
    )
