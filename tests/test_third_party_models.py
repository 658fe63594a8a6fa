"""Networks of other packages: all that ``prepare``, ``report``, ``calibrate`` and ``remove`` promise holds for each."""

from __future__ import annotations

import pytest
import third_party
import torch
from third_party import CONFIG, FULL, SMALL, Model
from torch._dynamo.utils import counters

import fastqat

pytestmark = pytest.mark.usefixtures("one_thread")


def importable(model: Model) -> None:
    """Skip, with the reason, where its package does not import."""
    reason = third_party.why_not(model.package)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("model", SMALL, ids=lambda model: f"{model.package} {model.name}")
def test_small(model: Model) -> None:
    importable(model)
    third_party.check(model)


@pytest.mark.slow
@pytest.mark.parametrize("model", FULL, ids=lambda model: f"{model.package} {model.name}")
def test_full_size(model: Model) -> None:
    importable(model)
    third_party.check(model)


@pytest.mark.parametrize("model", SMALL[1:3], ids=lambda model: model.name)
def test_compiled_without_more_graph_breaks(model: Model) -> None:
    """As many graphs as the float model, and the same values."""
    importable(model)
    net, inputs = model.build().eval(), model.inputs()
    graphs = []
    for prepared in (False, True):
        if prepared:
            fastqat.calibrate(fastqat.prepare(net, CONFIG), [inputs])
        expected = net(**inputs).logits
        torch.compiler.reset()
        counters.clear()
        y = torch.compile(net, backend="aot_eager")(**inputs).logits
        torch.testing.assert_close(y, expected)
        graphs.append((sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]))
    assert graphs[0] == graphs[1] and graphs[0][1] > 0


def test_layers_that_tie_their_weights() -> None:
    """BERT and Llama project back with their embedding: one quantizer."""
    for model, tied in ((SMALL[4], ("embeddings.word_embeddings", "decoder")), (SMALL[5], ("embed_tokens", "lm_head"))):
        importable(model)
        net = fastqat.prepare(model.build(), CONFIG, first_last_bits=8)
        rows = [row for row in fastqat.report(net).quantizers if row.tensor == "weight" and row.shared_with]
        assert [row.layer.endswith(name) for row, name in zip(rows, tied, strict=True)] == [True, True]
        assert [row.bits for row in rows] == [8, 8]
