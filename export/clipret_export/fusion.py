"""Fused operators of onnxruntime where its own optimizer misses the pattern, for its CUDA and CPU providers.

The export writes plain ONNX, which every backend reads. In such a graph, onnxruntime recognizes neither the attention
nor most of the residual additions, and in half precision not the GELU either. On a GPU each of these costs one more
pass over memory. The fused operators are contribution operators of onnxruntime (docs/ContribOperators.md in its
repository): `MultiHeadAttention`, which runs as flash attention on CUDA if there is no mask, `SkipLayerNormalization`
and `BiasGelu`. A graph with them runs in onnxruntime only.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir

__all__ = ["fuse"]

_DOMAIN = "com.microsoft"
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def fuse(path: Path, out: Path | None = None) -> Counter[str]:
    """Replace the patterns in a tower's graph by fused operators. Other nodes stay as they are.

    Args:
        path: The tower, an ONNX file.
        out: Where to write the result, in the same folder, because external weights stay in their file; by default
            the tower is replaced.

    Returns:
        The number of nodes of each operator.
    """
    model = ir.load(path)
    graph = model.graph
    rewrites = {"Softmax": _attention, "Gelu": _bias_gelu, "LayerNormalization": _skip_norm}
    if sum(rewrites[node.op_type](graph, node) for node in list(graph) if node.op_type in rewrites):
        graph.opset_imports[_DOMAIN] = 1
    _remove_unused(graph)
    target = out or path
    written = target.with_name(f".{target.name}.new")
    ir.save(model, written)
    written.replace(target)
    return Counter(node.op_type for node in graph.all_nodes())


def _attention(graph: ir.Graph, softmax: ir.Node) -> bool:
    """Fuse softmax(scale q k' [+ mask]) v over heads as `graph` writes it: seven or more nodes become one."""
    scores, mask = softmax.inputs[0], None
    if (added := _producer(scores, "Add")) is not None:
        scores, mask = added.inputs
    product = _producer(scores, "MatMul")
    scaled = _producer(product.inputs[0], "Mul") if product else None
    values = _only_user(softmax.outputs[0], "MatMul")
    if product is None or scaled is None or values is None or values.inputs[0] is not softmax.outputs[0]:
        return False
    merged = _only_user(values.outputs[0], "Transpose")
    scale = _constant(scaled.inputs[1])
    query = _heads_first(scaled.inputs[0])
    key = _heads_first(product.inputs[1], transposed=True)
    value = _heads_first(values.inputs[1])
    if merged is None or _permutation(merged) != [0, 2, 1, 3] or scale is None or scale.size != 1:
        return False
    if query is None or key is None or value is None or (heads := _heads(query)) is None:
        return False
    if mask is not None and not _last_two_only(mask):
        return False
    # [B,L,H,D] -> [B,L,H*D]: the operator takes the heads of a token in one row.
    shape = _initializer(graph, "clipret_heads_side_by_side", np.array([0, 0, -1]))
    new = [ir.node("Reshape", [part, shape]) for part in (query, key, value)]
    inputs: list[ir.Value | None] = [node.outputs[0] for node in new]
    if mask is not None:
        # The operator takes a mask of [1,1,L,L].
        ones = _initializer(graph, "clipret_one_mask", np.array([1, 1]))
        shape_of = ir.node("Shape", [mask], attributes={"start": -2})
        joined = ir.node("Concat", [ones, shape_of.outputs[0]], attributes={"axis": 0})
        viewed = ir.node("Reshape", [mask, joined.outputs[0]])
        new += [shape_of, joined, viewed]
        inputs += [None, None, viewed.outputs[0]]
    attended = ir.node(
        "MultiHeadAttention",
        inputs,
        attributes={"num_heads": heads, "scale": float(scale.reshape(()))},
        domain=_DOMAIN,
    )
    graph.insert_before(merged, [*new, attended])
    for use in list(merged.outputs[0].uses()):  # the following reshape gets the same values in the same order
        use.node.replace_input_with(use.idx, attended.outputs[0])
    return True


def _last_two_only(mask: ir.Value) -> bool:
    """Whether a mask is the same for all inputs and heads: [L,L], or with leading dimensions of 1."""
    if mask.shape is None:
        node = mask.producer()  # slices of a mask keep its rank
        return (
            node is not None
            and node.op_type == "Slice"
            and node.inputs[0] is not None
            and _last_two_only(node.inputs[0])
        )
    return all(size == 1 for size in list(mask.shape)[:-2])


def _bias_gelu(graph: ir.Graph, gelu: ir.Node) -> bool:
    """Fuse gelu(x + bias), also if the addition is in half precision and the GELU in float32 between two casts.

    The operator takes half precision. Where the input of a GELU fits into a half, its output fits as well.
    """
    if (kind := gelu.attributes.get("approximate")) is not None and kind.as_string() != "none":
        return False
    source, result = gelu.inputs[0], gelu.outputs[0]
    if (widened := _producer(source, "Cast")) is not None:
        narrowed = _only_user(result, "Cast")
        if narrowed is None or ir.DataType(narrowed.attributes["to"].as_int()) not in _HALVES:
            return False
        source, result = widened.inputs[0], narrowed.outputs[0]
        if source is None or _only_user(source, "Cast") is None:
            return False
    added = _producer(source, "Add")
    if added is None:
        return False
    x, bias = added.inputs
    constant = _constant(bias)
    if constant is None or constant.ndim != 1:
        return False
    fused = ir.node("BiasGelu", [x, bias], domain=_DOMAIN)
    graph.insert_before(gelu, fused)
    ir.convenience.replace_all_uses_with(result, fused.outputs[0])
    return True


def _skip_norm(graph: ir.Graph, norm: ir.Node) -> bool:
    """Fuse LayerNorm(x + y) where the sum continues as the residual stream: the operator returns both."""
    added = _producer(norm.inputs[0], "Add")
    if added is None or any(value is None or _constant(value) is not None for value in added.inputs):
        return False
    if len(norm.inputs) < 3 or norm.inputs[2] is None:
        return False
    if norm.attributes["axis"].as_int() != -1:
        return False
    fused = ir.node(
        "SkipLayerNormalization",
        [*added.inputs, norm.inputs[1], norm.inputs[2]],
        attributes={"epsilon": norm.attributes["epsilon"].as_float()},
        domain=_DOMAIN,
        num_outputs=4,
    )
    graph.insert_before(added, fused)
    ir.convenience.replace_all_uses_with(norm.outputs[0], fused.outputs[0])
    ir.convenience.replace_all_uses_with(added.outputs[0], fused.outputs[3])
    return True


def _heads_first(value: ir.Value | None, transposed: bool = False) -> ir.Value | None:
    """The value [B,L,H,D] that was transposed to [B,H,L,D], or, with `transposed`, to [B,H,D,L] in one step or two."""
    node = _producer(value, "Transpose")
    if node is None:
        return None
    order = _permutation(node)
    if transposed and order == [0, 1, 3, 2]:
        return _heads_first(node.inputs[0])
    return node.inputs[0] if order == ([0, 2, 3, 1] if transposed else [0, 2, 1, 3]) else None


def _heads(value: ir.Value) -> int | None:
    """H of a value [B,L,H,D], from the target shape of its reshape."""
    node = _producer(value, "Reshape")
    if node is None:
        return None
    sizes = _constant(node.inputs[1])
    if sizes is not None:
        return int(sizes[2]) if sizes.size == 4 and sizes[2] > 0 else None
    joined = _producer(node.inputs[1], "Concat")
    size = _constant(joined.inputs[2]) if joined is not None and len(joined.inputs) == 4 else None
    return int(size.reshape(-1)[0]) if size is not None and size.size == 1 else None


def _permutation(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _only_user(value: ir.Value, kind: str) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == kind else None


def _constant(value: ir.Value | None) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None:
    """The array of a weight or constant, None for any other value."""
    tensor = None if value is None else value.const_value
    return None if tensor is None else tensor.numpy()


def _initializer(graph: ir.Graph, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> ir.Value:
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        graph.register_initializer(value)
    return graph.initializers[name]


def _remove_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
