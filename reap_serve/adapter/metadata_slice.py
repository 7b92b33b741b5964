"""The slice of a served request, where its body names it as OpenAI's clients tag their requests: `metadata.reap_slice`.

Target: `to_sampling_params` of `ChatCompletionRequest`, `CompletionRequest` and `ResponsesRequest`, in the API server.
Why: recorded traffic names its slice in `metadata`, and an application names it there once for its logs and for us;
    vLLM hands `vllm_xargs` to the engine and drops `metadata`.
How: the parameters that vLLM makes of a body get the slice as the extra argument `reap_slice`, which wins over that of
    `vllm_xargs`. A name that breaks the rule is refused here, where the error can name the field.
Upstream: none carries metadata into the engine.
Remove when: vLLM puts a request's metadata into its sampling parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from reap_serve.record.requests import SLICE_ARGUMENT
from reap_serve.slice_name import RULE, is_slice_name


def read_slices_of_metadata() -> None:
    """Reads them from every request that this process makes parameters of from now on; once a process."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    request_classes: tuple[Any, ...] = (ChatCompletionRequest, CompletionRequest, ResponsesRequest)
    for request_class in request_classes:
        if not hasattr(request_class.to_sampling_params, "reap_slices"):
            request_class.to_sampling_params = _naming_slices(request_class.to_sampling_params)


def _naming_slices(to_sampling_params: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    @functools.wraps(to_sampling_params)
    def named(self: Any, *arguments: Any, **keywords: Any) -> Any:
        parameters = to_sampling_params(self, *arguments, **keywords)
        metadata = _metadata(self)
        if isinstance(metadata, Mapping) and metadata.get(SLICE_ARGUMENT) is not None:
            if not is_slice_name(metadata[SLICE_ARGUMENT]):
                field = f"metadata.{SLICE_ARGUMENT}"
                raise VLLMValidationError(f"{field} is not {RULE}", parameter=field)
            # vLLM's dictionary is the body's own `vllm_xargs`.
            parameters.extra_args = {**(parameters.extra_args or {}), SLICE_ARGUMENT: metadata[SLICE_ARGUMENT]}
        return parameters

    vars(named)["reap_slices"] = True
    return named


def _metadata(request: Any) -> object:
    """The body's metadata: a field of the responses' requests, among the fields that the others do not know."""
    if "metadata" in type(request).model_fields:
        return request.metadata
    return (request.model_extra or {}).get("metadata")
