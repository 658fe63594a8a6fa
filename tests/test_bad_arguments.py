"""Every bad argument of the functions: the exception, and a message of its name, what was wanted and what came."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastqat import functional

X, S = torch.zeros(4, 6), torch.ones(1)
CODES = torch.zeros(4, 6, dtype=torch.int8)
STEP = torch.zeros(1, dtype=torch.int64)


def fq(x=X, scale=S, qmin=-8, qmax=7, **options) -> torch.Tensor:
    """fake_quantize with one thing wrong."""
    return functional.fake_quantize(x, scale, qmin=qmin, qmax=qmax, **options)


def q(x=X, scale=S, qmin=-8, qmax=7, **options) -> torch.Tensor:
    """quantize with one thing wrong."""
    return functional.quantize(x, scale, qmin=qmin, qmax=qmax, **options)


def search(scales=S[None], **options) -> torch.Tensor:
    """range_search with one thing wrong."""
    return functional.range_search(X, scales, qmin=-8, qmax=7, **options)


# call, exception, name, wanted, got
GRID = (
    (lambda: fq(x=[1.0]), TypeError, "x", "a tensor", "list"),
    (lambda: fq(x=X.int()), TypeError, "x", "float32, bfloat16 or float16", "torch.int32"),
    (lambda: fq(x=X.double()), TypeError, "x", "float32, bfloat16 or float16", "torch.float64"),
    (lambda: fq(scale=None), TypeError, "scale", "a float32 tensor", "NoneType"),
    (lambda: fq(scale=0.1), TypeError, "scale", "a float32 tensor", "float"),
    (lambda: fq(scale=S.double()), TypeError, "scale", "float32", "torch.float64"),
    (lambda: fq(scale=S.half()), TypeError, "scale", "float32", "torch.float16"),
    (lambda: fq(scale=torch.ones(())), ValueError, "scale", "shape [1]", "[]"),
    (lambda: fq(scale=torch.ones(4)), ValueError, "scale", "shape [1]", "[4]"),
    (lambda: fq(scale=torch.ones(4), axis=1), ValueError, "scale", "shape [6]", "[4]"),
    (lambda: fq(scale=torch.ones(4), axis=0, group_size=3), ValueError, "scale", "shape [4, 2]", "[4]"),
    (lambda: fq(scale=S.to("meta")), ValueError, "scale", "device cpu", "meta"),
    (lambda: fq(scale=-S), ValueError, "scale", "positive finite", "-1.0"),
    (lambda: fq(scale=0 * S), ValueError, "scale", "positive finite", "0.0"),
    (lambda: fq(scale=S * torch.nan), ValueError, "scale", "positive finite", "nan"),
    (lambda: fq(scale=S * torch.inf), ValueError, "scale", "positive finite", "inf"),
    (lambda: fq(scale=torch.tensor([1, 1, -2.0, 1]), axis=0), ValueError, "scale", "positive finite", "-2.0"),
    (lambda: fq(zero_point=0), TypeError, "zero_point", "a float32 tensor", "int"),
    (lambda: fq(zero_point=STEP), TypeError, "zero_point", "float32", "torch.int64"),
    (lambda: fq(zero_point=torch.ones(2)), ValueError, "zero_point", "shape [1]", "[2]"),
    (lambda: fq(zero_point=S.to("meta")), ValueError, "zero_point", "device cpu", "meta"),
    (lambda: fq(offset=torch.ones(2)), ValueError, "offset", "shape [1]", "[2]"),
    (lambda: fq(zero_point=S, offset=S), ValueError, "zero_point, offset", "at most one", "both"),
    (lambda: fq(qmin=-8.0), TypeError, "qmin", "an int", "-8.0"),
    (lambda: fq(qmin=[-8]), TypeError, "qmin", "an int", "[-8]"),
    (lambda: fq(qmax=True), TypeError, "qmax", "an int", "True"),
    (lambda: fq(qmin=7), ValueError, "qmin, qmax", "qmin < qmax", "7, 7"),
    (lambda: fq(qmin=-1, qmax=255), ValueError, "qmin, qmax", "256 codes", "-1, 255"),
    (lambda: fq(qmin=-129, qmax=0), ValueError, "qmin, qmax", "between -128 and 255", "-129, 0"),
    (lambda: fq(axis=2), ValueError, "axis", "a dimension of a tensor of shape [4, 6]", "2"),
    (lambda: fq(axis=-3), ValueError, "axis", "a dimension of a tensor of shape [4, 6]", "-3"),
    (lambda: fq(axis="0"), TypeError, "axis", "None or an int", "'0'"),
    (lambda: fq(group_size=3), ValueError, "group_size", "an axis", "group_size=3"),
    (lambda: fq(axis=0, group_size=4), ValueError, "group_size", "a divisor of the 6", "4"),
    (lambda: fq(axis=0, group_size=0), ValueError, "group_size", "a divisor of the 6", "0"),
    (lambda: fq(eps=0.0), ValueError, "eps", "a positive number", "0.0"),
    (lambda: fq(eps=float("nan")), ValueError, "eps", "a positive number", "nan"),
    (lambda: fq(eps="tiny"), TypeError, "eps", "a number", "'tiny'"),
)
OPTIONS = (
    (lambda: fq(ste_mask="round"), ValueError, "ste_mask", "'rounded', 'unrounded'", "'round'"),
    (lambda: fq(grad_scale="lsq+"), ValueError, "grad_scale", "'lsq'", "'lsq+'"),
    (lambda: fq(grad_scale=[1]), TypeError, "grad_scale", "a number", "[1]"),
    (lambda: fq(out_dtype=torch.int8), ValueError, "out_dtype", "torch.bfloat16", "torch.int8"),
    (lambda: fq(out=X[:2].clone()), ValueError, "out", "shape [4, 6] on cpu", "[2, 6] on cpu"),
    (lambda: fq(out=X.to("meta")), ValueError, "out", "on cpu", "on meta"),
    (lambda: fq(out=CODES.clone()), TypeError, "out", "float32, bfloat16 or float16", "torch.int8"),
    (lambda: fq(out=3), TypeError, "out", "a tensor", "int"),
    (lambda: fq(x=X.clone().requires_grad_(), out=X.clone()), ValueError, "out", "no argument that requires", "one"),
    (lambda: q(x=CODES), TypeError, "x", "float32, bfloat16 or float16", "torch.int8"),
    (lambda: q(dtype=torch.int64), ValueError, "dtype", "torch.uint8", "torch.int64"),
    (lambda: q(dtype=torch.uint8), ValueError, "dtype", "holds -8 to 7", "torch.uint8"),
    (lambda: q(qmin=0, qmax=255, dtype=torch.int8), ValueError, "dtype", "holds 0 to 255", "torch.int8"),
    (lambda: q(out=X.clone()), TypeError, "out", "int8, uint8 or int32", "torch.float32"),
    (lambda: functional.dequantize(X, S), TypeError, "codes", "int8, uint8 or int32", "torch.float32"),
    (lambda: functional.dequantize(3, S), TypeError, "codes", "a tensor of integer codes", "int"),
    (lambda: functional.dequantize(CODES, -S), ValueError, "scale", "positive finite", "-1.0"),
    (lambda: functional.dequantize(CODES, S, dtype=torch.float64), ValueError, "dtype", "float16", "torch.float64"),
    (lambda: functional.dequantize(CODES, S, out=CODES.clone()), TypeError, "out", "float32", "torch.int8"),
    (lambda: functional.pack(X, 4), TypeError, "codes", "int8, uint8 or int32", "torch.float32"),
    (lambda: functional.pack(CODES, 0), ValueError, "bits", "1 to 8", "0"),
    (lambda: functional.pack(CODES, 9), ValueError, "bits", "1 to 8", "9"),
    (lambda: functional.pack(CODES, 4.0), TypeError, "bits", "an int", "4.0"),
    (lambda: functional.unpack(CODES, 4, (2,)), TypeError, "packed", "a uint8 tensor", "torch.int8"),
    (lambda: functional.unpack(CODES[0].byte(), 4, (5,)), ValueError, "packed", "3 bytes for 5 codes", "6 bytes"),
    (lambda: functional.unpack(CODES[0].byte(), 9, (5,)), ValueError, "bits", "1 to 8", "9"),
    (lambda: functional.minmax(CODES), TypeError, "x", "float32, bfloat16 or float16", "torch.int8"),
    (lambda: functional.minmax(X, axis=0, group_size=4), ValueError, "group_size", "a divisor of the 6", "4"),
    (lambda: search([1.0]), TypeError, "scales", "a float32 tensor", "list"),
    (lambda: search(S), ValueError, "scales", "shape [1, 1]", "[1]"),
    (lambda: search(torch.ones(5, 4), axis=1), ValueError, "scales", "shape [5, 6]", "[5, 4]"),
    (lambda: search(-S[None]), ValueError, "scales", "positive finite", "-1.0"),
    (lambda: search(zero_points=torch.ones(2, 1)), ValueError, "zero_points", "shape [1, 1]", "[2, 1]"),
    (lambda: functional.philox_uniform((2,), seed=0, step=0), TypeError, "step", "an int64 tensor", "int"),
    (lambda: functional.philox_uniform((2,), seed=0, step=S), TypeError, "step", "an int64 tensor", "torch.float32"),
    (lambda: functional.philox_uniform((2,), seed=0, step=STEP[0]), ValueError, "step", "shape [1]", "[]"),
)


@pytest.mark.parametrize(
    "call, exception, name, wanted, got", GRID + OPTIONS, ids=[f"{c[2]}-{c[4]}" for c in GRID + OPTIONS]
)
def test_bad_argument(call: Callable, exception: type[Exception], name: str, wanted: str, got: str) -> None:
    """One wrong argument, one message of the form "name: wanted ...; got ..."."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert type(caught.value) is exception
    message = str(caught.value)
    assert message.startswith(f"{name}: wanted ")
    before, after = message.split("; got ")
    assert wanted in before and got in after


C = torch.ones(4)
# name, a good call, and a bad one that might pass for it
ALIKE = (
    ("qmax", lambda: fq(qmax=1), lambda: fq(qmax=True)),
    ("qmin", lambda: fq(qmin=-8), lambda: fq(qmin=-8.0)),
    ("axis", lambda: fq(axis=0, scale=C), lambda: fq(axis=False, scale=C)),
    ("group_size", lambda: fq(axis=0, scale=torch.ones(4, 6), group_size=1), lambda: fq(axis=0, group_size=True)),
    ("eps", lambda: fq(eps=1), lambda: fq(eps=True)),
    ("grad_scale", lambda: fq(grad_scale=1.0), lambda: fq(grad_scale=True)),
    ("scale", lambda: fq(scale=S), lambda: fq(scale=-S)),
    ("zero_point", lambda: fq(zero_point=S), lambda: fq(zero_point=torch.ones(2))),
    ("zero_point", lambda: fq(), lambda: fq(zero_point=STEP)),
    ("offset", lambda: fq(offset=S), lambda: fq(offset=S.to("meta"))),
    ("offset", lambda: fq(), lambda: fq(offset=S.half())),
)


@pytest.mark.parametrize("name, good, bad", ALIKE, ids=[name for name, *_ in ALIKE])
def test_bad_argument_after_a_good_call(name: str, good: Callable, bad: Callable) -> None:
    """What is remembered of a good call hides no error, and a bad call is remembered as no good one."""
    for _ in range(2):
        good()
        with pytest.raises((TypeError, ValueError), match=f"^{name}: wanted "):
            bad()


def test_scale_on_a_device_is_not_read() -> None:
    """With eps the values of a scale are not looked at: what is below eps counts as eps."""
    assert fq(x=torch.tensor([3.0]), scale=-S, eps=0.5).item() == 3.0
