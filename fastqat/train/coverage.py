"""Coverage in a run: the share of the network that its bit-widths are of, and the least that is accepted."""

from __future__ import annotations

from fastqat.nn.coverage import Coverage, percent
from fastqat.ops.checks import fail

_NAMED = 3  # kinds of layers that the message names


def check_share(coverage: Coverage, least: float) -> None:
    """Check that enough of a network is quantized: a result of "W4A8" is to be one of 4 and 8 bits.

    What the options leave in float is not held against it.

    Args:
        coverage: of the prepared network, with an example.
        least: share of the multiplications, in 0..1; 0 accepts everything.

    Raises:
        ValueError: less is quantized; the message names what is in float, and why.
    """
    share = coverage.multiplications
    if share is None or share == 1:
        return
    total = sum(kind.multiplications or 0 for kind in coverage.left) / (1 - share)
    left = [kind for kind in coverage.left if kind.multiplications and not kind.chosen]
    missing = sum(kind.multiplications or 0 for kind in left)
    judged = share * total / (share * total + missing) if missing else 1.0
    if judged < least:
        wanted = f"at least {percent(least)} of the multiplications quantized (a lower share accepts it, 0 any)"
        fail(ValueError, "coverage", wanted, f"{percent(judged)}; in float: {'; '.join(map(str, left[:_NAMED]))}")
