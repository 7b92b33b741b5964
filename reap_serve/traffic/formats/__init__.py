"""The formats of traffic by name, in the order in which a record is tried against them."""

from __future__ import annotations

from reap_serve.traffic.formats.langfuse import LANGFUSE
from reap_serve.traffic.formats.lengths import AZURE, BURSTGPT, MOONCAKE
from reap_serve.traffic.formats.litellm import LITELLM
from reap_serve.traffic.formats.openai import OPENAI_BATCH, REQUESTS
from reap_serve.traffic.formats.otel import OTEL
from reap_serve.traffic.formats.sharegpt import SHAREGPT
from reap_serve.traffic.formats.spec import Format

# The more specific first: `requests` takes every record with messages or a prompt.
FORMATS: dict[str, Format] = {
    item.name: item for item in (OPENAI_BATCH, SHAREGPT, OTEL, LITELLM, LANGFUSE, MOONCAKE, AZURE, BURSTGPT, REQUESTS)
}
