"""Table of docs/coverage.md: each architecture is quantized to 98 %, or the table says what is not, and why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import third_party
from third_party import Model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import coverage_table

pytestmark = pytest.mark.usefixtures("one_thread")
OF_TRANSFORMERS = {model.name: model for model in coverage_table.TRANSFORMERS}


def check(model: Model) -> coverage_table.Row:
    """One row; skipped, with the reason, where the package does not import."""
    reason = third_party.why_not(model.package)
    if reason:
        pytest.skip(reason)
    row = coverage_table.row_of(model)
    shares = (row.coverage.parameters, row.coverage.multiplications)
    assert all(share is not None and 0 <= share <= 1 for share in shares)
    enough = all(share >= coverage_table.ENOUGH for share in shares)
    assert enough == (row.reasons == "") and all(kind.reason for kind in row.coverage.left)
    return row


def test_counts() -> None:
    names = [model.name for model in coverage_table.models()]
    assert len(coverage_table.TIMM) >= 40 and len(OF_TRANSFORMERS) >= 30 and len(set(names)) == len(names)


def test_llama() -> None:
    """By hand, for each token: q and o 128 x 128, k and v 128 x 64, three of 128 x 512; the head; keys and values."""
    row = check(OF_TRANSFORMERS["Llama (CausalLM)"])
    weights = 2 * (3 * 128 * 128 + 3 * 128 * 512) + 128 * 200
    attention = 2 * 2 * 8 * 128
    assert row.coverage.multiplications == pytest.approx(weights / (weights + attention))
    assert row.reasons == ""


def test_experts() -> None:
    """Two of four experts for each token, in Parameters of three dimensions."""
    row = check(OF_TRANSFORMERS["Mixtral (CausalLM)"])
    assert "2 MixtralExperts: parameters gate_up_proj, down_proj that it uses directly" in row.reasons
    (experts,) = (kind for kind in row.coverage.left if kind.kind == "MixtralExperts")
    assert experts.multiplications == 8 * 2 * 2 * 3 * 128 * 512
    assert experts.parameters == 2 * 4 * 3 * 128 * 512


@pytest.mark.slow
@pytest.mark.parametrize("model", coverage_table.models(), ids=lambda model: f"{model.package} {model.name}")
def test_each_row(model: Model) -> None:
    coverage_table.declare_operators()
    check(model)
