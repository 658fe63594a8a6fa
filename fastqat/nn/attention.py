"""Twins of torch's attention modules, which compute with the weights of their sub-modules and never call those.

``nn.MultiheadAttention`` hands ``out_proj.weight`` to a function, and in evaluation ``nn.TransformerEncoderLayer`` does
so with all of its weights: quantizers on those layers would never run. The twins call every layer that has one, and
leave the fused kernels to the state in which nothing is quantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastqat.nn.layers import QuantizedLayer
from fastqat.ops import checks


def is_active(layer: object) -> bool:
    """True if a quantizer of this layer does anything: it quantizes, or looks at what passes."""
    return isinstance(layer, QuantizedLayer) and any(not q.is_idle() for _, q in layer.quantizers())


class MultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with quantized projections; the two products and the softmax stay in float.

    One activation quantizer takes query, key and value (their projections, where it is outputs that are quantized);
    ``out_proj`` is a layer with quantizers of its own. The axis 0 of ``in_proj_weight`` counts the 3 * embed_dim output
    channels of the three projections.
    """

    original = nn.MultiheadAttention
    weight_names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention; arguments and results are those of ``torch.nn.MultiheadAttention``.

        Raises:
            TypeError: nested tensors, which only torch's fused kernel takes.
            ValueError: a mask of the wrong shape, or is_causal without attn_mask.
        """
        if not is_active(self) and not is_active(self.out_proj):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if query.is_nested or key.is_nested or value.is_nested:
            checks.fail(TypeError, "query, key, value", "strided tensors while quantizing", "nested ones")
        batched = query.dim() == 3
        # [L, N, E] each, quantized, and one tensor where they were one
        q, k, v = _each(lambda x: self.quantized_input(self._sequence_first(x, batched)), query, key, value)
        length, batch, _ = q.shape
        source = k.shape[0]
        q, k, v = self._project(q, k, v)
        mask = _masks(attn_mask, key_padding_mask, (batch, self.num_heads, length, source), q.dtype)
        causal = is_causal and key_padding_mask is None and not need_weights
        if is_causal and attn_mask is None:
            checks.fail(ValueError, "attn_mask", "a mask beside is_causal=True", None)
        k, v, added = self._extended(k, v)
        if mask is not None:
            mask = F.pad(mask, (0, added))
        y, weights = self._attend(q, k, v, None if causal else mask, need_weights, causal)
        y = self.out_proj(y).view(length, batch, -1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return y.squeeze(1), None if weights is None else weights.squeeze(0)
        return y.transpose(1, 0) if self.batch_first else y, weights

    def _sequence_first(self, x: Tensor, batched: bool) -> Tensor:
        """[L, E], [N, L, E] or [L, N, E] -> [L, N, E]."""
        if not batched:
            return x.unsqueeze(1)
        return x.transpose(1, 0) if self.batch_first else x

    def _project(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project [L, N, E], with the products that torch takes: one where query, key and value are one tensor."""
        device, bias, width = q.device.type, self.in_proj_bias, self.embed_dim
        if not self._qkv_same_embed_dim:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            projected = [
                F.linear(x, self.quantized_weight(device, name), b)
                for x, name, b in zip((q, k, v), names, biases, strict=True)
            ]
            return _triple(self.quantized_output(x) for x in projected)
        weight = self.quantized_weight(device, "in_proj_weight")
        sizes = [width] * 3 if k is not v else [3 * width] if q is k else [width, 2 * width]
        biases = (None,) * len(sizes) if bias is None else bias.split(sizes)
        projected = []
        for x, w, b, size in zip((q, k, v), weight.split(sizes), biases, sizes, strict=False):
            y = self.quantized_output(F.linear(x, w, b))
            projected += list(y.unflatten(-1, (-1, width)).movedim(-2, 0).contiguous()) if size > width else [y]
        return _triple(projected)

    def _extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values, [S, N, E], with the pairs that the options add, and how many those are."""
        batch, added = k.shape[1], 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.repeat(1, batch, 1)])
            v = torch.cat([v, self.bias_v.repeat(1, batch, 1)])
            added += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
            added += 1
        return k, v, added

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of projections [L, N, E], [S, N, E] under a mask [1 or N * heads, 1 or L, S].

        Returns:
            [L * N, E], and the weights [N, heads, L, S] where they are wanted.
        """
        length, batch, _ = q.shape
        rows, source = batch * self.num_heads, k.shape[0]
        q, k, v = (x.view(-1, rows, self.head_dim).transpose(0, 1) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            if mask is not None:
                mask = mask.unsqueeze(0) if len(mask) == 1 else mask.view(batch, self.num_heads, -1, source)
            q, k, v = (x.view(batch, self.num_heads, -1, self.head_dim) for x in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
            return y.permute(2, 0, 1, 3).reshape(length * batch, self.embed_dim), None
        scores = q * math.sqrt(1.0 / self.head_dim)
        scores = (
            torch.bmm(scores, k.transpose(-2, -1)) if mask is None else torch.baddbmm(mask, scores, k.transpose(-2, -1))
        )
        weights = scores.softmax(dim=-1)
        if dropout > 0.0:
            weights = F.dropout(weights, dropout)
        y = torch.bmm(weights, v).transpose(0, 1).reshape(length * batch, self.embed_dim)
        return y, weights.view(batch, self.num_heads, length, source)


def _each(f: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f of the three, computed once for tensors that are one."""
    q = f(query)
    k = q if key is query else f(key)
    return q, k, k if value is key else f(value)


def _triple(tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tensors
    return q, k, v


def _masks(
    attn_mask: Tensor | None, padding: Tensor | None, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Tensor | None:
    """One additive mask, [1 or N * heads, 1 or L, S], from boolean (True hides) or additive ones.

    Args:
        attn_mask: [L, S] or [N * heads, L, S].
        padding: [N, S]; [S] without a batch.
        shape: (N, heads, L, S).
        dtype: of the additive mask that a boolean one becomes.
    """
    batch, heads, length, source = shape
    mask = None
    if attn_mask is not None:
        wanted = (length, source) if attn_mask.dim() == 2 else (batch * heads, length, source)
        if attn_mask.shape != wanted:
            checks.fail(ValueError, "attn_mask", f"shape {list(wanted)}", list(attn_mask.shape))
        mask = _additive(attn_mask, dtype).view(-1, length, source)
    if padding is not None:
        if padding.numel() != batch * source or padding.shape[-1] != source:
            checks.fail(ValueError, "key_padding_mask", f"shape {[batch, source]}", list(padding.shape))
        rows = _additive(padding, dtype).view(batch, 1, 1, source).expand(-1, heads, -1, -1)
        rows = rows.reshape(batch * heads, 1, source)
        mask = rows if mask is None else mask + rows
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` that takes no fused kernel past the quantizers of its layers."""

    original = nn.TransformerEncoderLayer

    def has_active_quantizers(self) -> bool:
        """True if its layers must be called."""
        return any(map(is_active, (self.self_attn, self.self_attn.out_proj, self.linear1, self.linear2)))

    @property
    def activation_relu_or_gelu(self) -> int:  # type: ignore[override]
        """What torch reads before it takes the fused kernel: 1 is relu, 2 is gelu, 0 keeps to the layers."""
        return 0 if self.has_active_quantizers() else self.__dict__["activation_relu_or_gelu"]

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder`` that makes no nested tensors, which fused kernels alone take, for quantizers."""

    original = nn.TransformerEncoder

    @property
    def use_nested_tensor(self) -> bool:  # type: ignore[override]
        """What torch reads before it packs a padded batch into a nested tensor."""
        layers = [layer for layer in self.layers if isinstance(layer, TransformerEncoderLayer)]
        active = any(layer.has_active_quantizers() for layer in layers)
        return not active and self.__dict__["use_nested_tensor"]

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value
