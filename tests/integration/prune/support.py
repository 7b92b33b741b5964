"""What was really run for each family: the source of the support table, and of the parametrisation of the tests.

`python tests/integration/prune/support.py` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tiny_families import FAMILIES

from reap_serve.architectures.resolve import refused_model_types


@dataclass(frozen=True, slots=True)
class Served:
    """How vLLM on the CPU serves a family.

    Attributes:
        dtype: The dtype it is served in.
        as_transformers: Whether its log-probabilities are those of transformers. Where they are not, pruned or not, the
            oracle is the base in vLLM itself, masked there.
        note: Why not, or what was left out.
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
    "qwen3_next": Served("bfloat16", False, "its linear attention takes nothing else"),
    "mixtral": Served(),
    "olmoe": Served(),
    "flex_olmo": Served(),
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "kimi_k2": MLA,
    "axk1": MLA,
    "glm4_moe": Served(),
    "glm4_moe_lite": MLA,
    "dots1": Served(),
    "gpt_oss": Served(),
    "llama4_text": Served(),
    "ernie4_5_moe": Served(as_transformers=False, note="vLLM ignores the correction bias on a CPU"),
    "granitemoe": Served(),
    "granitemoeshared": Served(),
    "granitemoehybrid": Served(note="attention layers only"),
    "phimoe": Served(),
    "hunyuan_v1_moe": Served(),
    "lfm2_moe": Served(),
    "jamba": Served(note="attention layers only: its state-space layers fail on a CPU"),
    "gemma4_text": Served(),
    "afmoe": Served(),
    "hy_v3": Served(),
    "exaone_moe": Served(),
    "cohere2_moe": Served(),
    "mellum": Served(),
    "mimo_v2_flash": Served(),
    "solar_open": Served(),
}


@dataclass(frozen=True, slots=True)
class NotServed:
    """Why vLLM on the CPU does not serve a family, pruned or not.

    Attributes:
        reason: For people.
        error: Pattern of what vLLM says.
    """

    reason: str
    error: str


NO_PROCESSOR = NotServed("not run: needs an image processor and a tokenizer", "")
NO_SIGMOID = NotServed("has no sigmoid router without groups on a CPU", "AssertionError")

NOT_SERVED: Mapping[str, NotServed] = {
    "qwen3_5_moe_text": NotServed("not run: imports torchvision, which comes built for another torch", ""),
    "qwen3_5_moe": NO_PROCESSOR,
    "qwen3_vl_moe": NO_PROCESSOR,
    "llama4": NO_PROCESSOR,
    "glm4v_moe": NO_PROCESSOR,
    "minimax_m2": NO_SIGMOID,
    "laguna": NO_SIGMOID,
    "nemotron_h": NotServed("has no experts without gate on a CPU", "is_act_and_mul=False"),
    "deepseek_v32": NotServed("has no sparse attention on a CPU", "Sparse Attention is not supported"),
    "glm_moe_dsa": NotServed("has no sparse attention on a CPU", "Sparse Attention is not supported"),
    "minimax": NotServed("has no linear attention for it", "size of tensor"),
    # The last one: its failure leaves the process unable to register other engines' kernels.
    "kimi_linear": NotServed("has no linear attention for it on a CPU", "_lib_fn_wrapper"),
}

LAYOUT_ONLY: Mapping[str, str] = {
    "bailing_moe": "has no such model",
    "longcat_flash": "cannot load the published layout",
    "qwen3_omni_moe": "not built here",
    "step3p5": "has no such model",
}

HASH_ROUTED = {"deepseek_v4": "layers that choose experts by a table of token ids need every expert"}


def rows() -> Iterator[str]:
    """The table in Markdown."""
    yield "| family | layout | transformers | vLLM |"
    yield "|---|---|---|---|"
    refused = {**refused_model_types(), **HASH_ROUTED}
    for name in sorted({*FAMILIES, *LAYOUT_ONLY, *refused}):
        if name in refused:
            yield f"| {name} | refused: {refused[name]} | - | - |"
        elif name in LAYOUT_ONLY:
            yield f"| {name} | names | {LAYOUT_ONLY[name]} | not run |"
        else:
            yield f"| {name} | written | equal | {_vllm(name)} |"


def _vllm(name: str) -> str:
    if name in NOT_SERVED:
        return NOT_SERVED[name].reason
    served = SERVED[name]
    where = "equal" if served.as_transformers else "equal in vLLM"
    details = [each for each in (served.dtype, served.note) if each and each != "float32"]
    return f"{where} ({'; '.join(details)})" if details else where


if __name__ == "__main__":
    print("\n".join(rows()))
