"""Parse, call, print. No logic, and no import of torch or vLLM before a command needs it."""
