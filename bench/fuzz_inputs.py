"""The sound inputs that the fuzzer damages: small ones of every kind that a command reads."""

from __future__ import annotations

import io
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_mutations import document_bytes, join_safetensors, mutated_bytes, mutated_document, split_safetensors
from fuzz_traffic import traffic_lines

from reap_serve.model import Fingerprint, fingerprint, open_model
from reap_serve.plan.decision import decide, gather
from reap_serve.plan.model_limits import limits_of_statistics
from reap_serve.plan.planner import format_plan, make_plan
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.records import provenance
from reap_serve.statistics.file import CHECKSUM_MODULUS, checksum, encode
from reap_serve.statistics.observer_state import observer_state_of, write_observer_state
from reap_serve.statistics.record import ExpertSums, Header, Layer, Statistics, Window

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN = 2, 4, 2, 8
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": NUM_LAYERS,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "hidden_size": HIDDEN,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.mlp.gate"]},
}
REPORT = {f"model.layers.{layer}.mlp": [0, layer + 1] for layer in range(NUM_LAYERS)}


def write_checkpoint(directory: Path) -> None:
    """A model of a few kilobytes, in two files with an index."""
    from safetensors.numpy import save

    rng = np.random.default_rng(0)

    def weight(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float16)

    directory.mkdir(parents=True)
    shards: list[dict[str, Any]] = [
        {"model.embed_tokens.weight": weight(4, HIDDEN)},
        {"lm_head.weight": weight(4, HIDDEN)},
    ]
    for layer in range(NUM_LAYERS):
        shards[layer][f"model.layers.{layer}.mlp.gate.weight"] = weight(NUM_EXPERTS, HIDDEN)
        for expert in range(NUM_EXPERTS):
            for name in ("gate_proj", "up_proj", "down_proj"):
                shards[layer][f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = weight(2, HIDDEN)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        (directory / file).write_bytes(save(tensors))
        weight_map.update(dict.fromkeys(tensors, file))
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")


def statistics(model: Fingerprint, window: str = "w0") -> Statistics:
    """Statistics of two slices."""
    rng = np.random.default_rng(int(window[1:]))
    sums = ExpertSums.zeros(2, NUM_LAYERS, NUM_EXPERTS)
    count = rng.integers(1, 50, sums.token_count_SPLE.shape) * TOP_K
    sums.token_count_SPLE[:] = count
    for name in ("gate_sum", "norm_sum", "norm_sq_sum", "weighted_norm_sum", "weighted_norm_sq_sum"):
        getattr(sums, f"{name}_SPLE")[:] = rng.uniform(0.5, 2.0, count.shape) * count
    for name in ("norm_max", "activation_max"):
        getattr(sums, f"{name}_SPLE")[:] = rng.uniform(1.0, 3.0, count.shape)
    header = Header(
        schema_version=1,
        model=model,
        layers=tuple(Layer(index=i, name=f"model.layers.{i}.mlp.experts") for i in range(NUM_LAYERS)),
        slices=("chat", "code"),
        windows=(
            Window(
                id=window,
                started="2026-01-01T00:00:00+00:00",
                ended="2026-01-01T00:01:00+00:00",
                recorder="inline",
                requests=3,
                prompt_tokens_total=9,
                prompt_tokens_computed=9,
                sample_fraction=1.0,
                complete=True,
            ),
        ),
        engine={"vllm": "0.32.0"},
        provenance=provenance(),
    )
    return Statistics(header, sums, count.sum(axis=-1) // TOP_K)


def plan_of(sound: Statistics) -> bytes:
    """The plan that keeps half of the experts."""
    request = PlanRequest(Size(keep_experts=2))
    evidence = gather(sound, request, limits_of_statistics(sound.header))
    return format_plan(make_plan(sound.header, evidence, decide(evidence, request.size), None))


class Inputs:
    """Sound files below a directory, and their damaged likes."""

    def __init__(self, sound: Path) -> None:
        self.model = sound / "model"
        write_checkpoint(self.model)
        made = statistics(fingerprint(open_model(str(self.model))))
        self.statistics = encode(made)
        self.plan = plan_of(made)
        self.observer = write_observer_state(made)
        self._observer_state = observer_state_of(made)
        (sound / "other.safetensors").write_bytes(encode(statistics(made.header.model, "w1")))
        (sound / "plan.json").write_bytes(self.plan)
        self.traffic = traffic_lines()

    def damaged_statistics(self, random_: random.Random) -> bytes:
        """A statistics file whose checksum is right, but for what is damaged."""
        if random_.random() < 0.1:
            return mutated_bytes(self.statistics, random_)
        entries, data = split_safetensors(self.statistics)
        if random_.random() < 0.5:
            data = _with_odd_values(entries, data, random_)
        if random_.random() < 0.6:
            header = mutated_document(json.loads(entries["__metadata__"]["header"]), random_)
            entries["__metadata__"]["header"] = document_bytes(header, random_).decode("utf-8", "replace")
        if random_.random() < 0.2:
            entries = mutated_document(entries, random_)
        metadata = entries.get("__metadata__") if isinstance(entries, dict) else None
        if isinstance(metadata, dict) and random_.random() < 0.95:
            # The sum over the file is the sum over its tensors where each is a whole number of words.
            metadata["checksum"] = str(_checksum(entries, data) % CHECKSUM_MODULUS)
        return join_safetensors(entries, data, random_)

    def damaged_observer(self, random_: random.Random) -> bytes:
        """An observer state that torch loads, with a tensor of another kind in it."""
        import torch

        if random_.random() < 0.3:
            return mutated_bytes(self.observer, random_)
        state: dict[Any, Any] = {index: dict(tensors) for index, tensors in self._observer_state.items()}
        for _ in range(random_.choice((1, 1, 2))):
            tensors = state[random_.choice(list(state))] if random_.random() < 0.9 else state
            if not isinstance(tensors, dict) or not tensors:
                continue
            key = random_.choice(list(tensors))
            tensors[key] = random_.choice(_ODD_TENSORS)(tensors[key], random_)
        content = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(state, content)
        return content.getvalue()

    def damaged_report(self, random_: random.Random) -> bytes:
        """llm-compressor's report."""
        return document_bytes(mutated_document(REPORT, random_), random_)

    def damaged_plan(self, random_: random.Random) -> bytes:
        """A plan."""
        return document_bytes(mutated_document(json.loads(self.plan), random_), random_)

    def damaged_config(self, random_: random.Random) -> bytes:
        """A config.json."""
        return document_bytes(mutated_document(CONFIG, random_), random_)

    def damaged_index(self, random_: random.Random) -> bytes:
        """An index of weight files."""
        index = json.loads((self.model / "model.safetensors.index.json").read_bytes())
        return document_bytes(mutated_document(index, random_), random_)

    def damaged_weights(self, name: str, random_: random.Random) -> bytes:
        """A weight file: its header damaged, its length right."""
        content = (self.model / name).read_bytes()
        if random_.random() < 0.15:
            return mutated_bytes(content, random_)
        header, data = split_safetensors(content)
        return join_safetensors(mutated_document(header, random_), data, random_)

    def damaged_traffic(self, random_: random.Random) -> bytes:
        """Some lines of one format, one of them damaged."""
        lines = list(random_.choice(self.traffic))
        position = random_.randrange(len(lines))
        damaged = mutated_document(lines[position], random_)
        content = [
            document_bytes(line, random_) if random_.random() < 0.02 else json.dumps(line).encode() for line in lines
        ]
        content[position] = document_bytes(damaged, random_)
        whole = b"\n".join(content) + b"\n"
        return whole if random_.random() < 0.9 else mutated_bytes(whole, random_)


def _checksum(entries: dict[str, Any], data: bytes) -> int:
    total = 0
    for name, entry in entries.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        sound = isinstance(offsets, list) and len(offsets) == 2 and all(type(end) is int for end in offsets)
        if name != "__metadata__" and sound and 0 <= offsets[0] <= offsets[1] <= len(data):
            total += checksum(memoryview(data)[offsets[0] : offsets[1]])
    return total


def _with_odd_values(entries: dict[str, Any], data: bytes, random_: random.Random) -> bytes:
    """The tensors with a value that is no sum of anything."""
    changed = bytearray(data)
    for _ in range(random_.choice((1, 2, 8))):
        name = random_.choice([name for name in entries if name != "__metadata__"])
        entry = entries[name]
        dtype = {"U16": "<u2", "U32": "<u4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}[entry["dtype"]]
        begin, end = entry["data_offsets"]
        values = np.frombuffer(changed, dtype, (end - begin) // np.dtype(dtype).itemsize, begin)
        odd = (0, 1, 2**16 - 1) if "U" in entry["dtype"] else (0, -1, 2**62, -(2**62))
        if "F" in entry["dtype"]:
            odd = (0.0, -1.0, 1e-320, 1e30, 1e150, 1e300, np.inf, -np.inf, np.nan)  # type: ignore[assignment]
        where = slice(None) if random_.random() < 0.3 else random_.randrange(len(values))
        with np.errstate(all="ignore"):
            values[where] = np.array(random_.choice(odd)).astype(dtype)
    return bytes(changed)


def _odd_value(tensor: Any, random_: random.Random) -> Any:
    changed = tensor.clone().double() if hasattr(tensor, "clone") else tensor
    if hasattr(changed, "dim"):
        value = random_.choice((-1.0, 0.5, 1e300, float("nan"), float("inf"), 2.0**60))
        if changed.dim():
            changed[random_.randrange(len(changed))] = value
        else:
            changed.fill_(value)
    return changed


_ODD_TENSORS: tuple[Callable[[Any, random.Random], Any], ...] = (
    _odd_value,
    _odd_value,
    lambda tensor, random_: None,
    lambda tensor, random_: "text",
    lambda tensor, random_: [1, 2],
    lambda tensor, random_: random_.choice((0, -1, 2**70, True, 0.5, float("nan"))),
    lambda tensor, random_: {"a": tensor},
    lambda tensor, random_: tensor[None] if hasattr(tensor, "dim") else tensor,
    lambda tensor, random_: tensor.repeat(2) if hasattr(tensor, "dim") else tensor,
    lambda tensor, random_: tensor.bool() if hasattr(tensor, "dim") else tensor,
    lambda tensor, random_: tensor.to_sparse() if getattr(tensor, "dim", int)() else tensor,
    lambda tensor, random_: tensor.cfloat() if hasattr(tensor, "dim") else tensor,
    lambda tensor, random_: tensor.bfloat16() if hasattr(tensor, "dim") else tensor,
    lambda tensor, random_: tensor.to("meta") if hasattr(tensor, "dim") else tensor,
    lambda tensor, random_: tensor.float().requires_grad_() if hasattr(tensor, "dim") else tensor,
    lambda tensor, random_: tensor.expand(2**20, *tensor.shape) if hasattr(tensor, "dim") else tensor,
)
