"""Environment variables of vLLM, wherever it is started: their names, and what small machines need.

`adapter` checks the names in each release.
"""

from __future__ import annotations

from pathlib import Path

# GiB of a CPU's KV cache.
CPU_KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
# "0" runs an offline engine in its caller's process.
PROCESSES_VARIABLE = "VLLM_ENABLE_V1_MULTIPROCESSING"
# "1" sends its makers nothing.
SILENCE_VARIABLE = "VLLM_NO_USAGE_STATS"
# Names of the plugins that load, of all groups.
PLUGINS_VARIABLE = "VLLM_PLUGINS"


def cpu_environment() -> dict[str, str]:
    """Defaults for vLLM on a CPU: by itself it takes nine tenths of the memory for the KV cache.

    The KV cache gets an eighth of the free memory, 1 to 16 GiB; empty where there is a GPU.
    """
    import psutil

    if Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists():
        return {}
    return {CPU_KV_CACHE_VARIABLE: str(int(min(16, max(1, psutil.virtual_memory().available // (8 * 2**30)))))}
