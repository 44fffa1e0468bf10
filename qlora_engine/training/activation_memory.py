"""Bytes that a training step's activations take: what layers keep for backward, and what comes and goes.

Every formula is here. `e` is the bytes of an element of the compute dtype, `n` what a normalization keeps of an
element of its input (e with liger-kernel's, else 4), T the tokens of a batch.

kept by a layer        n norms + e (inputs + 2 queries + 2 keys + mlp_kept + ranks) + 4 heads, times T: attention
                       keeps queries, keys, values, its output and a float32 number a head; the MLP keeps gate and up
                       (`adapter_nodes.py`); with queries, keys and values in one projection its output as well;
                       attention that is written out in torch keeps all its scores
... recomputed         e hidden T: its input alone; nothing where it waits in host memory
backward of a layer    what it keeps, three tensors of its width (its output or the gradient of it, that of the
                       residual stream, that of the MLP's input), what the MLP works in, and a decoded weight
loss, this engine's    the final normalization; its output and the gradient of that; some rows of logits (`loss.py`);
                       of a head in 4 bits a decoded part, its logits by themselves, and a float32 gradient of rows
loss, TRL's            in float32 and e: the final normalization; the hidden states, those with a label, and the
                       float32 gradient of these; a tile of 4096 x 32768 logits; a head in 4 bits decoded
"""

from dataclasses import dataclass

from qlora_engine.training.architecture import Architecture, Layer
from qlora_engine.training.loss import SLICE_BYTES, rows_at_a_time

FLOAT32 = 4
TRL_TOKENS, TRL_COLUMNS = 4096, 32768  # of a tile of logits
DECODED_FROM = 2048  # tokens beyond which products decode the weight: csrc/cuda/dispatch.h


@dataclass(frozen=True)
class Step:
    """A forward and backward pass.

    Attributes:
        batch: sequences.
        length: tokens of each.
        element: bytes of an element of the compute dtype.
        recomputed: layers, the first ones, that keep their input alone and compute the rest again in backward.
        offloaded: whether these inputs wait in host memory.
        masked: whether attention takes a mask, and with it copies of keys and values for every query head.
        own_loss: whether the loss is this engine's and not TRL's.
        liger: whether normalizations are liger-kernel's.
        accumulating: whether gradients of earlier passes are there already.
    """

    batch: int
    length: int
    element: int = 2
    recomputed: int = 0
    offloaded: bool = False
    masked: bool = False
    own_loss: bool = True
    liger: bool = False
    accumulating: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def norm_bytes(self) -> int:
        """What a normalization keeps of an element of its input."""
        return self.element if self.liger else FLOAT32


def kept_by_layer(layer: Layer, step: Step) -> int:
    """What a layer keeps between forward and backward where nothing is recomputed."""
    keys = layer.queries if step.masked else layer.keys
    elements = layer.inputs + 2 * layer.queries + 2 * keys + layer.mlp_kept + layer.ranks
    elements += (layer.queries + layer.keys) * layer.packed_attention
    scores = layer.score * layer.heads * step.length
    floats = step.norm_bytes * layer.norms + FLOAT32 * layer.heads
    return step.tokens * (floats + step.element * elements + scores)


def kept_by_checkpoint(layer: Layer, step: Step) -> int:
    """What a recomputed layer keeps on the GPU: its input, unless it waits elsewhere."""
    return 0 if step.offloaded else step.tokens * step.element * layer.hidden


def backward_of_layer(layer: Layer, step: Step) -> int:
    """The most that the backward of a layer takes beside what the layer keeps."""
    e, hidden = step.element, layer.hidden
    decoded = e * layer.largest_weight if step.tokens > DECODED_FROM else 0
    through_mlp = step.tokens * e * (3 * hidden + layer.mlp_working) + decoded
    # a normalization has four such tensors; unless it is behind it, what the MLP kept is gone by then
    kept = 0 if layer.norm_after_mlp else layer.mlp_kept
    through_norm = step.tokens * (4 * step.norm_bytes * hidden + e * (2 * hidden - kept))
    return max(through_mlp, through_norm)


def shared_by_layers(model: Architecture, step: Step) -> int:
    """Token numbers; masks that all layers read, in one byte and in e; inputs on their way from host memory."""
    mask = step.batch * step.length**2 * (1 + step.element) if step.masked else 0
    travelling = 2 * step.tokens * step.element * model.hidden if step.offloaded and step.recomputed else 0
    return step.tokens * 4 * 8 + mask + travelling


def loss(model: Architecture, step: Step) -> int:
    """Final normalization, head and loss, at their peak."""
    e, T, hidden = step.element, step.tokens, model.hidden
    if step.own_loss:
        row = e * model.vocabulary
        rows = min(T, rows_at_a_time(T, row))
        decoded = min(SLICE_BYTES, row * hidden) if model.packed_head else 0
        of_part = decoded + decoded // hidden * rows + FLOAT32 * rows * hidden * model.packed_head
        return T * hidden * (step.norm_bytes + 2 * e) + row * rows + of_part
    tile = e * min(T, TRL_TOKENS) * TRL_COLUMNS + e * model.vocabulary * hidden * model.packed_head
    return T * hidden * (step.norm_bytes + 2 * e) + T * hidden * (FLOAT32 + e) + tile


def peak(model: Architecture, step: Step) -> int:
    """The most bytes that activations and the adapters' gradients take at once in a forward and backward pass."""
    layers = model.layers
    recomputed = [index < step.recomputed for index in range(len(layers))]
    kept = [
        (kept_by_checkpoint if again else kept_by_layer)(layer, step)
        for layer, again in zip(layers, recomputed, strict=True)
    ]
    gradients = FLOAT32 * sum(model.adapters) if step.accumulating else 0
    alive = sum(kept)
    highest = alive + loss(model, step) + gradients
    for layer, again in zip(reversed(layers), reversed(recomputed), strict=True):
        own = kept_by_layer(layer, step) if again else 0
        highest = max(highest, alive + own + backward_of_layer(layer, step) + gradients)
        alive -= kept.pop()
        gradients += 0 if step.accumulating else FLOAT32 * layer.adapter
    return highest + shared_by_layers(model, step)
