"""Environment variables that vLLM needs on small machines, wherever the engine runs."""

from __future__ import annotations

from pathlib import Path


def cpu_environment() -> dict[str, str]:
    """Defaults for vLLM on a CPU: by itself it takes nine tenths of the memory for the KV cache.

    The KV cache gets an eighth of the free memory, 1 to 16 GiB; empty where there is a GPU.
    """
    import psutil

    if Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists():
        return {}
    return {"VLLM_CPU_KVCACHE_SPACE": str(int(min(16, max(1, psutil.virtual_memory().available // (8 * 2**30)))))}
