"""Bytes that a training step's activations take: what layers keep for backward, and what comes and goes.

Every formula is here. `e` is the bytes of an element of the compute dtype, T the tokens of a batch.

kept by a layer        4 norms + e (inputs + 2 queries + 2 keys + mlp_kept + ranks) + 4 heads, times T: normalizations
                       keep their input in float32, attention keeps queries, keys, values, its output and a float32
                       number a head; the MLP keeps gate and up (`adapter_nodes.py`)
... recomputed         e hidden T: its input alone
backward of a layer    what it keeps, three tensors of its width (its output or the gradient of it, that of the
                       residual stream, that of the MLP's input), what the MLP works in, and a decoded weight
... offloaded          nothing, but for the inputs of two layers
loss, chunked          in float32 and e: the final normalization; the gradient of the hidden states; the logits that
                       `training/loss.py` holds at a time
loss, whole            logits in e and three times in float32
"""

from dataclasses import dataclass

from qlora_engine.training.architecture import Architecture, Layer
from qlora_engine.training.loss import rows_at_a_time

FLOAT32 = 4
DECODED_FROM = 2048  # tokens beyond which products decode the weight: csrc/cuda/dispatch.h


@dataclass(frozen=True)
class Step:
    """A forward and backward pass.

    Attributes:
        batch: sequences.
        length: tokens of each.
        element: bytes of an element of the compute dtype.
        recomputed: layers that keep their input alone and compute the rest again in backward.
        offloaded: whether those inputs wait in host memory.
        padded: whether sequences have padding, for which attention takes a mask and copies of keys and values.
        chunked_loss: whether logits are computed a tile at a time.
        accumulating: whether gradients of earlier passes are there already.
    """

    batch: int
    length: int
    element: int = 2
    recomputed: int = 0
    offloaded: bool = False
    padded: bool = False
    chunked_loss: bool = True
    accumulating: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def kept_by_layer(layer: Layer, step: Step) -> int:
    """What a layer keeps between forward and backward where nothing is recomputed."""
    keys = layer.queries if step.padded else layer.keys
    elements = layer.inputs + 2 * layer.queries + 2 * keys + layer.mlp_kept + layer.ranks
    return step.tokens * (FLOAT32 * (layer.norms + layer.heads) + step.element * elements)


def kept_by_checkpoint(layer: Layer, step: Step) -> int:
    """What a recomputed layer keeps on the GPU: its input."""
    return 0 if step.offloaded else step.tokens * step.element * layer.hidden


def backward_of_layer(layer: Layer, step: Step) -> int:
    """The most that the backward of a layer takes beside what the layer keeps."""
    e, hidden = step.element, layer.hidden
    decoded = e * layer.largest_weight if step.tokens > DECODED_FROM else 0
    through_mlp = step.tokens * e * (3 * hidden + layer.mlp_working) + decoded
    # what the MLP kept is gone when the gradient comes to its normalization, which has four tensors in float32
    through_norm = step.tokens * (4 * FLOAT32 * hidden + e * (2 * hidden - layer.mlp_kept))
    return max(through_mlp, through_norm)


def shared_by_layers(model: Architecture, step: Step) -> int:
    """Token numbers; with padding the mask of all layers, in a byte and in the compute dtype; inputs on their way."""
    mask = step.batch * step.length**2 * (1 + step.element) if step.padded else 0
    moving = 2 * step.tokens * step.element * model.hidden if step.offloaded and step.recomputed else 0
    return step.tokens * 4 * 8 + mask + moving


def loss(model: Architecture, step: Step) -> int:
    """Final normalization, head and loss, at their peak."""
    e, T, hidden = step.element, step.tokens, model.hidden
    if not step.chunked_loss:
        return T * (hidden * (FLOAT32 + e) + model.vocabulary * (e + 3 * FLOAT32))
    tile = e * model.vocabulary * min(T, rows_at_a_time(T, e * model.vocabulary))
    return T * hidden * (FLOAT32 + 2 * e) + T * hidden * e + tile


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
