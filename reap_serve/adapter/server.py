"""vLLM's API server: what an endpoint plugin reads of the engine behind it, and where requests pass on their way in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reap_serve.adapter import engine_view
from reap_serve.adapter.all_engines import call_workers, wake
from reap_serve.adapter.fit import settings_of
from reap_serve.adapter.releases.check import attribute_or_none
from reap_serve.record.settings import ObserveSettings

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

# Makes the engine's arguments of a request's own, and what sets its cached prefixes apart from those of others (None
# where nothing has to); AdmissionError when the request's arguments are wrong.
Settle = Callable[[Mapping[str, Any] | None], tuple[dict[str, Any] | None, str | None]]


class AdmissionError(ValueError):
    """The request's own arguments are wrong.

    Args:
        field: The one that is wrong, as a path in the body.
        problem: What is wrong with it.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field


class ServedEngine:
    """The engine behind an API server.

    Args:
        client: vLLM's `EngineClient`.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    @property
    def settings(self) -> ObserveSettings | None:
        """What the engine is asked to observe; None on engines without observation."""
        return settings_of(self._client.vllm_config)

    @property
    def model_name(self) -> str:
        """The model as the server was started on it."""
        return str(self._client.vllm_config.model_config.model)

    @property
    def model_reference(self) -> str:
        """The served model as `open_model` takes it."""
        return engine_view.model_reference(self._client.vllm_config)

    @property
    def api_server_rank(self) -> int:
        """Which of the API servers in front of one engine this process is, from 0."""
        return max(0, int(self._client.vllm_config.parallel_config._api_process_rank))

    @property
    def kv_cache_tokens(self) -> int | None:
        """Tokens that the KV cache holds, right for hybrid models too; None before vLLM knows."""
        tokens = self._client.vllm_config.cache_config.kv_cache_size_tokens
        return None if tokens is None else int(tokens)

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[object, ...] = (), kwargs: None = None
    ) -> Sequence[object]:
        """Runs a method on every worker of every engine: the replies, engine after engine, of each its ranks in order.

        Raises:
            EngineError: Names the engines that failed or did not answer; the others have done what was asked.
        """
        return await call_workers(self._client, method, args, timeout)

    async def wake(self) -> None:
        """Has every engine run a forward pass, which idle ones do not."""
        await wake(self._client)

    @property
    def errored(self) -> bool:
        """Whether the engine is dead: it answers nothing any more."""
        return bool(self._client.errored)

    def before_shutdown(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Puts something in front of the engine's shutdown: `wrap` gets vLLM's and gives what is called instead."""
        self._client.shutdown = wrap(self._client.shutdown)

    def install_admission(self, settle: Settle, salt_prefix: str) -> None:
        """Lets every request of every endpoint pass `settle` before it enters the engine.

        `generate` asks, too: it is called before a streaming answer has begun, so that the refusal is still a 400.

        Args:
            settle: See above.
            salt_prefix: Of the cache salts that `settle` makes; requests may not bring such a one.
        """
        from vllm.exceptions import VLLMValidationError
        from vllm.utils.async_utils import make_async

        processor, generate = self._client.input_processor, self._client.generate
        process_inputs = processor.process_inputs

        def admitted(*arguments: Any, **keywords: Any) -> Any:
            request = process_inputs(*arguments, **keywords)
            try:
                admit(request, settle, salt_prefix)
            except AdmissionError as error:
                raise VLLMValidationError(str(error), parameter=error.field) from None
            return request

        def checked_generate(*arguments: Any, **keywords: Any) -> Any:
            parameters = keywords.get("sampling_params", arguments[1] if len(arguments) > 1 else None)
            try:
                settle(attribute_or_none(parameters, "extra_args"))
            except AdmissionError as error:
                raise VLLMValidationError(str(error), parameter=error.field) from None
            return generate(*arguments, **keywords)

        processor.process_inputs = admitted
        processor.process_inputs_async = make_async(admitted, executor=processor.renderer._executor)
        self._client.generate = checked_generate


def admit(request: EngineCoreRequest, settle: Settle, salt_prefix: str) -> None:
    """Settles the arguments of a request that is about to enter the engine.

    Raises:
        AdmissionError: They are wrong, or the request brings a salt that is not its own.
    """
    parameters = request.sampling_params
    if parameters is None:
        return
    if (request.cache_salt or "").startswith(salt_prefix):
        raise AdmissionError("cache_salt", f"begins with {salt_prefix}, which is reserved")
    parameters.extra_args, salt = settle(parameters.extra_args)
    if salt is not None:
        request.cache_salt = f"{salt_prefix}{salt}:{request.cache_salt or ''}"
