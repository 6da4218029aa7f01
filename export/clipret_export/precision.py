"""Lower precision, layer by layer: matrix products in fp16, bf16 or int8, everything between them in float32.

A CLIP tower converted whole overflows where its residual stream grows past 65,504 and loses digits in LayerNorm;
the products themselves, which take nearly all the time, are harmless. So a Linear, Conv2d or Embedding gets smaller
weights and a cast at its border, scaled_dot_product_attention likewise, and nothing else changes. The conversion
happens in torch, since converters that work on the ONNX graph trip over its uint8 input, and it is the same for every
architecture: what is converted are layers, by their names in the model, whatever stands around them.
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
    """A layer with smaller weights: float32 in, the layer's product in its weights' dtype, float32 out."""

    # open_clip's blocks ask their first linear layer for the dtype of the residual stream; a layer may answer
    # with this name instead of its weight's dtype.
    int8_original_dtype = torch.float32
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x if x.dtype == torch.int64 else x.to(self.weight.dtype))  # ids stay ids
        return y.to(torch.float32)


class _CastLinear(_Cast, nn.Linear):
    pass


class _CastConv2d(_Cast, nn.Conv2d):
    pass


class _CastEmbedding(_Cast, nn.Embedding):
    pass


class _Int8(nn.Module):
    """A layer of int8 weights, one scale a channel, whose input has one fixed scale and zero point: static QDQ.

    The scale of the input is a constant of the graph, so that no embedding depends on what else is in its batch, as it
    does where the scale is taken from the batch (dynamic quantisation). Exports only; it does not run in torch.
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
        return _dequantise(_onnx("QuantizeLinear", x, self.scale, self.zero, like=x, dtype=torch.uint8), self)


class _Int8Linear(_Int8, nn.Linear):
    def quantize(self, ranges: Ranges) -> None:
        super().quantize(ranges)
        self.weight = self.weight.t().contiguous()  # as MatMul takes it: [in,out]

    def forward(self, x: Tensor) -> Tensor:
        weight = _onnx("DequantizeLinear", self.weight, self.weight_scale, like=self.weight, attrs={"axis": 1})
        y = self._input(x) @ weight
        return y if self.bias is None else y + self.bias


class _Int8Conv2d(_Int8, nn.Conv2d):
    """Integer convolutions exist with integer output only, so the output has a fixed scale too."""

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


def _dequantise(q: Tensor, layer: _Int8) -> Tensor:
    return _onnx("DequantizeLinear", q, layer.scale, layer.zero, like=q)


def _onnx(
    operator: str,
    *inputs: Tensor,
    like: Tensor,
    dtype: torch.dtype = torch.float32,
    attrs: dict[str, Any] | None = None,
) -> Tensor:
    made: Tensor = torch.onnx.ops.symbolic(operator, inputs, attrs=attrs or {}, dtype=dtype, shape=like.shape)
    return made


def _int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weight within ±127 and float32 scale [out] of a layer's weight [out,...]."""
    scale = weight.abs().flatten(1).amax(dim=1).clamp_min(1e-12) / 127
    shape = (-1, *[1] * (weight.dim() - 1))
    return (weight / scale.view(shape)).round().clamp(-127, 127).to(torch.int8), scale


_KINDS: dict[Kind, tuple[type[_Cast], type[_Int8] | None]] = {
    "linear": (_CastLinear, _Int8Linear),
    "convolution": (_CastConv2d, _Int8Conv2d),
    "embedding": (_CastEmbedding, None),
}


def convert(model: nn.Module, precision: Precision, ranges: dict[str, Ranges], keep: Collection[str]) -> None:
    """Convert in place the layers and attentions of `ranges` (names of submodules) but those named in `keep`.

    For int8, tables become fp16 and attention stays float32: their share of the time is small, their loss is not.
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
    """scaled_dot_product_attention in `dtype` for float32 queries, keys, values and mask; float32 out."""
    mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    return attend(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, **options).to(torch.float32)


def round_layer(module: Any, precision: Precision, ranges: Ranges, x: Tensor) -> Tensor:
    """What a layer of float32 weights would give for x in `precision`, computed in float32."""
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
