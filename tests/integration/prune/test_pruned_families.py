"""Every family that transformers can build: prune, verify, load, and compare logits with the masked base in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from masked_base import masked  # noqa: E402
from pruned_pairs import make_pair  # noqa: E402
from tiny_families import FAMILIES, NUM_EXPERTS  # noqa: E402

from reap_serve.architectures.resolve import resolve  # noqa: E402
from reap_serve.prune.verify import verify  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("fraction_dropped", [0.25, 0.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_logits_are_those_of_the_masked_base(
    name: str, fraction_dropped: float, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """max |pruned - masked base| <= 1e-5, and the mask changes the base: the comparison is not empty."""
    base_path = tiny_checkpoint(name)
    pair = make_pair(base_path, tmp_path, fraction_dropped)
    report = verify(pair.pruned, str(base_path), None)
    # transformers leaves draft layers out of what it writes, and their number in config.json.
    assert [each for each in report.findings if each.check != "promised"] == []
    assert verify(pair.pruned, None, None).findings == report.findings
    auto_class = getattr(transformers, FAMILIES[name].auto_class)
    base = auto_class.from_pretrained(base_path, dtype=torch.float32, attn_implementation="eager")
    pruned, loading = auto_class.from_pretrained(
        pair.pruned, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    tokens = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        unmasked_logits = base(tokens).logits
        with masked(base, pair.dropped, NUM_EXPERTS):
            masked_logits = base(tokens).logits
        pruned_logits = pruned(tokens).logits
    assert (masked_logits - unmasked_logits).abs().max() > 1e-3
    torch.testing.assert_close(pruned_logits, masked_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_alias_of_the_count_is_updated(name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers reads the new count whichever key it was written under, and no key keeps the old one."""
    pair = make_pair(tiny_checkpoint(name), tmp_path, 0.5)
    written = json.loads((pair.pruned / "config.json").read_text())
    assert resolve(written).limits(written).num_experts == NUM_EXPERTS // 2
    read = transformers.AutoConfig.from_pretrained(pair.pruned).get_text_config()
    stated = [
        getattr(read, key)
        for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        if isinstance(getattr(read, key, None), int)
    ]
    assert stated
    assert set(stated) == {NUM_EXPERTS // 2}
