"""Against llama-quantize, tensor by tensor of the same source."""

from __future__ import annotations

import pytest

from quantization_errors import INTEROP, compare

pytestmark = pytest.mark.skipif(not INTEROP.is_dir(), reason="needs llama.cpp's files in ../shared/interop")


@pytest.mark.parametrize(
    "name",
    [
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K_M",
        "IQ4_NL",
        "IQ4_XS",
        "Q4_K_S",
        "Q4_K_M",
        "Q5_K_M",
        "Q6_K",
    ],
)
def test_no_tensor_loses_more_than_in_llama_quantize(name: str) -> None:
    """Neither of plain squares nor of those that llama.cpp's own search minimises."""
    found = list(compare(INTEROP / f"interop-{name}.gguf"))
    assert len(found) == 15
    for errors in found:
        for ours, theirs in (errors.plain, errors.weighted):
            assert ours <= theirs, errors
