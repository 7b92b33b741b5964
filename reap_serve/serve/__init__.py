"""A checkpoint, or a plan as a mask, behind vLLM's OpenAI endpoint."""
