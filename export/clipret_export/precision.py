"""Lower precision, layer by layer: matrix products in fp16, bf16 or int8, everything between them in float32.

A CLIP tower that is converted as a whole overflows where its residual stream exceeds 65,504, and loses digits in
LayerNorm. The matrix products take nearly all the time and are safe to convert. So a Linear, Conv2d or Embedding gets
smaller weights and casts around it, as does scaled_dot_product_attention, and nothing else changes. The conversion
happens in torch, because converters of ONNX graphs fail on the uint8 input. It selects layers by their names in the
model, so it works for every architecture.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipret.bundle import Precision
from clipret_export.calibration import Ranges
from clipret_export.layers import Kind, attention_as, kind_of

__all__ = ["FLOATS", "convert", "round_attention", "round_layer"]

Attend = Callable[..., Tensor]
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class _Cast(nn.Module):
    """A layer with smaller weights: float32 in, the product in the dtype of the weights, float32 out."""

    # open_clip's blocks read the dtype of the residual stream from their first linear layer; this attribute takes
    # precedence over the dtype of its weight.
    int8_original_dtype = torch.float32
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x if x.dtype == torch.int64 else x.to(self.weight.dtype))  # ids stay int64
        return y.to(torch.float32)


class _CastLinear(_Cast, nn.Linear):
    pass


class _CastConv2d(_Cast, nn.Conv2d):
    pass


class _CastEmbedding(_Cast, nn.Embedding):
    pass


class _Int8(nn.Module):
    """A layer with int8 weights, one scale per channel, and a fixed scale and zero point for its input: static QDQ.

    The input scale is a constant of the graph, so an embedding does not depend on the rest of its batch, as it would
    with dynamic quantization. The layer can be exported, but does not run in torch.
    """

    int8_original_dtype = torch.float32
    weight: Tensor
    weight_scale: Tensor
    scale: Tensor
    zero: Tensor

    def quantize(self, ranges: Ranges) -> None:
        weight, scale = _int8_weight(self.weight.data)
        del self.weight
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        step, zero = ranges.uint8()
        self.register_buffer("scale", torch.tensor(step))
        self.register_buffer("zero", torch.tensor(zero, dtype=torch.uint8))

    def _input(self, x: Tensor) -> Tensor:
        return _dequantize(_onnx("QuantizeLinear", x, self.scale, self.zero, like=x, dtype=torch.uint8), self)


class _Int8Linear(_Int8, nn.Linear):
    def quantize(self, ranges: Ranges) -> None:
        super().quantize(ranges)
        self.weight = self.weight.t().contiguous()  # [in,out] for MatMul

    def forward(self, x: Tensor) -> Tensor:
        weight = _onnx("DequantizeLinear", self.weight, self.weight_scale, like=self.weight, attrs={"axis": 1})
        y = self._input(x) @ weight
        return y if self.bias is None else y + self.bias


class _Int8Conv2d(_Int8, nn.Conv2d):
    """A convolution whose output has a fixed scale, too: integer convolutions have integer output only."""

    int_bias: Tensor
    bias_scale: Tensor
    out_scale: Tensor
    out_zero: Tensor

    def quantize(self, ranges: Ranges) -> None:
        super().quantize(ranges)
        step, zero = ranges.output_uint8()
        self.register_buffer("out_scale", torch.tensor(step))
        self.register_buffer("out_zero", torch.tensor(zero, dtype=torch.uint8))
        scale = self.scale * self.weight_scale
        bias = torch.zeros_like(scale) if self.bias is None else self.bias.data
        self.bias = None
        self.register_buffer("int_bias", (bias / scale).round().clamp(-(2**31), 2**31 - 1).to(torch.int32))
        self.register_buffer("bias_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        axis = {"axis": 0}
        weight = _onnx("DequantizeLinear", self.weight, self.weight_scale, like=self.weight, attrs=axis)
        bias = _onnx("DequantizeLinear", self.int_bias, self.bias_scale, like=self.int_bias, attrs=axis)
        y = F.conv2d(self._input(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)
        q = _onnx("QuantizeLinear", y, self.out_scale, self.out_zero, like=y, dtype=torch.uint8)
        return _onnx("DequantizeLinear", q, self.out_scale, self.out_zero, like=q)


def _dequantize(q: Tensor, layer: _Int8) -> Tensor:
    return _onnx("DequantizeLinear", q, layer.scale, layer.zero, like=q)


def _onnx(
    operator: str,
    *inputs: Tensor,
    like: Tensor,
    dtype: torch.dtype = torch.float32,
    attrs: dict[str, Any] | None = None,
) -> Tensor:
    output: Tensor = torch.onnx.ops.symbolic(operator, inputs, attrs=attrs or {}, dtype=dtype, shape=like.shape)
    return output


def _int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 weight, within ±127, and float32 scale [out] of a layer's weight [out,...]."""
    scale = weight.abs().flatten(1).amax(dim=1).clamp_min(1e-12) / 127
    shape = (-1, *[1] * (weight.dim() - 1))
    return (weight / scale.view(shape)).round().clamp(-127, 127).to(torch.int8), scale


_KINDS: dict[Kind, tuple[type[_Cast], type[_Int8] | None]] = {
    "linear": (_CastLinear, _Int8Linear),
    "convolution": (_CastConv2d, _Int8Conv2d),
    "embedding": (_CastEmbedding, None),
}


def convert(model: nn.Module, precision: Precision, ranges: dict[str, Ranges], keep: Collection[str]) -> None:
    """Convert layers and attentions to a lower precision.

    For int8, embedding tables become fp16 and attention stays in float32: they take little time, and int8 would cost
    them much accuracy.

    Args:
        model: The tower to change in place, in float32.
        precision: The new precision.
        ranges: The ranges of the layers and attentions to convert, by the name of the submodule.
        keep: Names of submodules that stay in float32.
    """
    if precision == "fp32":
        return
    for name in ranges:
        if name in keep:
            continue
        module = model.get_submodule(name)
        kind = kind_of(module)
        if kind is None:
            if precision in FLOATS:
                _wrap_attention(module, FLOATS[precision])
            continue
        cast, int8 = _KINDS[kind]
        if precision == "int8" and int8 is not None:
            module.__class__ = int8
            module.quantize(ranges[name])  # type: ignore[operator]
        else:
            module.__class__ = cast
            module.to(FLOATS.get(precision, torch.float16))


def _wrap_attention(module: nn.Module, dtype: torch.dtype) -> None:
    inner = module.forward

    def compute(attend: Attend, *args: Any, **options: Any) -> Tensor:
        return round_attention(dtype, attend, *args, **options)

    def forward(*args: Any, **options: Any) -> Any:
        with attention_as(compute):
            return inner(*args, **options)

    module.forward = forward


def round_attention(
    dtype: torch.dtype, attend: Attend, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Compute scaled_dot_product_attention in lower precision.

    Args:
        dtype: float16 or bfloat16.
        attend: The original function.
        q: Queries, float32 [...,L,D].
        k: Keys, float32 [...,S,D].
        v: Values, float32 [...,S,D].
        attn_mask: Additive float32 mask or bool mask.
        options: Further arguments of the original function.

    Returns:
        float32 [...,L,D].
    """
    mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    return attend(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, **options).to(torch.float32)


def round_layer(module: Any, precision: Precision, ranges: Ranges, x: Tensor) -> Tensor:
    """Compute in float32 what a layer would return in a lower precision.

    Args:
        module: A Linear, Conv2d or Embedding with float32 weights.
        precision: The lower precision.
        ranges: The ranges of the layer, with samples for int8.
        x: Its input, float32 or int64 ids.

    Returns:
        Its output, float32.
    """
    weight: Tensor = module.weight
    if precision == "int8" and isinstance(module, nn.Embedding):
        precision = "fp16"
    if precision == "int8":
        q, scale = _int8_weight(weight)
        rounded = q * scale.view(-1, *[1] * (q.dim() - 1))
        x = _fake_uint8(x, *ranges.uint8())
    else:
        rounded = weight.to(FLOATS[precision]).to(torch.float32)
        x = x if x.dtype == torch.int64 else x.to(FLOATS[precision]).to(torch.float32)
    if isinstance(module, nn.Linear):
        y = F.linear(x, rounded, module.bias)
    elif isinstance(module, nn.Conv2d):
        y = module._conv_forward(x, rounded, module.bias)
    else:
        y = F.embedding(x, rounded)
    if precision != "int8":
        return y.to(FLOATS[precision]).to(torch.float32)
    return _fake_uint8(y, *ranges.output_uint8()) if isinstance(module, nn.Conv2d) else y


def _fake_uint8(x: Tensor, step: float, zero: int) -> Tensor:
    return ((x / step).round().add_(zero).clamp_(0, 255) - zero) * step
