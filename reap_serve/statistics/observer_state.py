"""Statistics to and from the observer of the reference implementation, CerebrasResearch/reap.

`observer.save_state`: a `torch.save` file, index of the decoder layer to tensors over experts.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reap_serve.errors import InputFileError
from reap_serve.model import Fingerprint
from reap_serve.statistics.foreign import imported_header, require_layers
from reap_serve.statistics.record import EXPERT_SUMS, ExpertSums, Floats, Layer, Statistics
from reap_serve.statistics.saliency import mix_slices, saliency
from reap_serve.statistics.sums import Merge, Sum

if TYPE_CHECKING:
    import torch

# A float64 holds every count up to here.
MAX_COUNT = 2**53
MAX_SUM = float(np.finfo(np.float32).max)


def observer_state_of(statistics: Statistics) -> dict[int, dict[str, torch.Tensor]]:
    """The reference implementation's observer state, all slices and phases added up.

    `max_activations` is the largest absolute component here, where the reference takes the largest signed one.
    `pairwise_expert_frequency` of two experts is the sum of their frequencies, as there.
    """
    import torch

    sums = mix_slices(statistics)
    means = {name: saliency(sums, name) for name in ("reap", "ean_mean")}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for row, layer in enumerate(statistics.header.layers):
        counts_E = torch.from_numpy(sums.token_count_LE[row].astype(np.int64))
        tensors = {
            each.reference: torch.from_numpy(getattr(sums, f"{each.name}_LE")[row].astype(_dtype(each)))
            for each in EXPERT_SUMS
            if each.reference is not None
        }
        state[layer.index] = tensors | {
            "total_tokens": torch.tensor(int(sums.layer_token_count_L[row])),
            "pairwise_expert_frequency": counts_E.unsqueeze(0) + counts_E.unsqueeze(1),
            **{name: torch.from_numpy(mean_LE[row].astype(np.float32)) for name, mean_LE in means.items()},
        }
    return state


def _dtype(each: Sum) -> type[np.generic]:
    """The reference's dtypes: counts are integers, sums double, maxima single."""
    if each.is_count:
        return np.int64
    return np.float32 if each.merge is Merge.MAX else np.float64


def write_observer_state(statistics: Statistics) -> bytes:
    """The bytes of the reference implementation's file."""
    import torch

    content = io.BytesIO()
    torch.save(observer_state_of(statistics), content)
    return content.getvalue()


def statistics_of_observer(path: Path, model: Fingerprint, moe_layers: Sequence[int]) -> Statistics:
    """Statistics from the reference implementation's observer state.

    It holds no second moments: these sums stay 0, and no standard error is given. Its gates are the softmax of the
    logits, which for other routers are not the weights that the model applies.

    Args:
        path: The file.
        model: Fingerprint of the model that it was made of.
        moe_layers: Indices of its layers with routed experts, ascending.

    Raises:
        InputFileError: It is no observer state, or of other layers or experts than the model has, or a sum in it is
            none: not finite, negative, or there without a token.
    """
    state = _load_state(path)
    require_layers(path, state, moe_layers)
    layers = [Layer(index=index, name=f"model.layers.{index}.mlp.experts") for index in moe_layers]
    sums = ExpertSums.zeros(1, len(layers), model.num_experts)
    layer_token_count_SPL = np.zeros((1, 2, len(layers)), np.int64)
    targets = {
        each.reference: getattr(sums, each.field)
        for each in EXPERT_SUMS
        if each.reference is not None and not each.is_count
    }
    for row, layer in enumerate(layers):
        tensors = state[layer.index]
        place = f"{path}: layer {layer.index}"
        count_E = _values(tensors, "expert_frequency", (model.num_experts,), place)
        tokens = _values(tensors, "total_tokens", (), place)
        for what, counts in (("expert_frequency", count_E), ("total_tokens", tokens)):
            if (counts != np.floor(counts)).any() or (counts > MAX_COUNT).any():
                raise _wrong(f"{place}: {what} holds what is no count")
        if (count_E > tokens).any():
            raise _wrong(f"{place}: an expert has {count_E.max():.0f} of {float(tokens):.0f} tokens")
        sums.token_count_SPLE[0, 0, row] = count_E
        layer_token_count_SPL[0, 0, row] = tokens
        for key, target in targets.items():
            sum_E = _values(tensors, key, (model.num_experts,), place)
            if (sum_E[count_E == 0] > 0).any():
                raise _wrong(f"{place}: {key} has a sum of an expert without a token")
            target[0, 0, row] = sum_E
    header = imported_header(path, model, layers, "CerebrasResearch/reap observer", complete=True)
    return Statistics(header, sums, layer_token_count_SPL)


def _values(tensors: Mapping[str, object], key: str, shape: tuple[int, ...], place: str) -> Floats:
    """A tensor of the state, or a number where the shape is that of one, as float64: finite and not negative."""
    import torch

    value = tensors.get(key)
    if type(value) in (int, float) and shape == ():
        value = torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, torch.Tensor):
        raise _wrong(f"{place}: {key} is {'missing' if value is None else 'no tensor'}")
    found = tuple(value.shape)
    if found not in ((shape, (1,)) if shape == () else (shape,)):
        raise _wrong(f"{place}: {key} has shape {list(found)} where the model needs {list(shape)}")
    if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
        raise _wrong(f"{place}: {key} is not a plain tensor of numbers")
    if value.dtype == torch.bool:
        raise _wrong(f"{place}: {key} holds truth values")
    values: Floats = value.detach().to(torch.float64).reshape(shape).numpy()
    # NaN compares as false.
    if not ((values >= 0) & (values <= MAX_SUM)).all():
        raise _wrong(f"{place}: {key} holds a value that is negative, not finite or beyond float32")
    return values


def _wrong(what: str) -> InputFileError:
    return InputFileError(what, "give the observer state of this model")


def _load_state(path: Path) -> dict[int, dict[str, object]]:
    import torch

    problem = InputFileError(
        f"{path} is no observer state that torch can load without running code", "give the file that the observer saved"
    )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputFileError(f"{path} does not exist", "check the path") from None
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from None
    try:
        _require_stored(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - an unpickler fails in any way on what is no pickle
        raise problem from None
    if not isinstance(state, dict):
        raise problem
    for index, tensors in state.items():
        if type(index) is not int or not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
            raise problem
    return state


def _require_stored(content: bytes) -> None:
    """`torch.save` compresses nothing: entries larger than the file would be unpacked into any memory."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("a compressed entry")
    if sum(entry.file_size for entry in entries) > len(content):
        raise ValueError("entries larger than the file")
