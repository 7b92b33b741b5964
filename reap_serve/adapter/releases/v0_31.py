"""vLLM 0.31: every name is where 0.32 has it."""

from __future__ import annotations

from reap_serve.adapter.releases.names import ClassNames
from reap_serve.adapter.releases.v0_32 import V0_32

V0_31 = V0_32.derive(
    "0.31",
    # A mega MoE kernel whose name ends otherwise than its base class's: refused like that.
    added=(ClassNames("vllm.models.deepseek_v4.nvidia.fi_moe", "DeepseekV4MegaMoEExpertsFI"),),
)
