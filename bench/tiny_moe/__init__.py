"""Recipe of the embedded model: a Qwen3-MoE trained from scratch on a CPU, with its traffic."""
