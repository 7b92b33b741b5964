"""The prompt that vLLM and transformers are both asked."""

PROMPT = list(range(3, 35))
