"""What a training step keeps of its layers for backward: how many are recomputed, and where their inputs wait.

A recomputed layer (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost") keeps its input alone. The last
layers are the ones not recomputed: what they keep is gone before backward reaches the others, and the very last is
never recomputed, since its recomputation would follow its forward at once and need the same memory. Inputs may wait
in pinned host memory; copies there and back run on a stream of their own, one layer ahead of their use.
"""

import contextlib
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_engine.adapter_nodes import unread_mlp_outputs

GIB = 2**30
PROBE_TOKENS = 64
POLICIES = ("none", "full", "selective")
FUNCTION = "_gradient_checkpointing_func"  # through which transformers calls a layer that is recomputed
LEAST_OFFLOADED = 1 << 16  # bytes; a copy of less costs more than it saves


class ActivationPlan(NamedTuple):
    """How a model's layers keep their activations.

    Attributes:
        layers: layers in all.
        recomputed: how many of them, the first ones, are recomputed in backward.
        bytes_per_token: what a layer that is not recomputed keeps, and its input alone; 0 where not measured.
        offloaded: whether the inputs of recomputed layers wait in host memory.
    """

    layers: int
    recomputed: int
    bytes_per_token: tuple[int, int]
    offloaded: bool


def recompute_layers(
    model: nn.Module,
    policy: str = "selective",
    *,
    budget_gib: float | None = None,
    tokens: int | None = None,
    offload: bool = False,
) -> ActivationPlan:
    """Decides which layers of a transformers model are recomputed in backward. In place; a later call replaces it.

    Args:
        model: a model whose layers are transformers' `GradientCheckpointingLayer`.
        policy: "none" recomputes no layer, "full" all, "selective" all but the last, or with a budget only as many as
            it takes.
        budget_gib: GiB that the layers' kept activations may take; needs `tokens`. Logits, gradients and weights come
            on top.
        tokens: of the largest batch, rows times length.
        offload: let the inputs of recomputed layers wait in pinned host memory; needs a GPU.

    Returns:
        What was decided.

    Raises:
        ValueError: where the model has no such layers, an argument does not fit, or the budget cannot be kept.
    """
    if policy not in POLICIES:
        raise ValueError(f"the policy is {policy!r}; expected one of {', '.join(POLICIES)}")
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers that transformers can recompute")
    device = next(model.parameters()).device
    if offload and device.type != "cuda":
        raise ValueError(f"activations are offloaded from a GPU; the model is on {device}")
    measured = (0, 0)
    if budget_gib is not None:
        if policy != "selective" or not tokens:
            raise ValueError("a budget of activation memory is for the policy 'selective', and needs the tokens")
        measured = bytes_per_token(model)
        recomputed = recomputed_within(budget_gib, len(layers), tokens, *measured, offload)
    else:
        recomputed = {"none": 0, "full": len(layers), "selective": len(layers) - 1}[policy]
    host = HostStack() if offload and recomputed else None
    ends = recomputed > 0 and ends_with_mlp(model)
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < recomputed
        layer._gradient_checkpointing_func = Recomputation(host, ends)
    return ActivationPlan(len(layers), recomputed, measured, host is not None)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers can recompute, in their order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recomputed_within(budget_gib: float, layers: int, tokens: int, kept: int, inputs: int, offload: bool) -> int:
    """How many layers have to be recomputed."""
    kept, inputs = kept * tokens, 0 if offload else inputs * tokens
    # while one layer is recomputed it keeps everything, whichever it is
    least = kept + (layers - 1) * inputs
    if least > budget_gib * GIB:
        raise ValueError(
            f"the activations of {layers} layers take {least / GIB:.2f} GiB for {tokens} tokens when all are "
            f"recomputed; the budget is {budget_gib:g} GiB. Raise it, or take fewer tokens a batch"
        )
    more = (budget_gib * GIB - least) // max(1, kept - inputs)
    return max(0, layers - 1 - int(more))


def bytes_per_token(model: nn.Module) -> tuple[int, int]:
    """Bytes a token that a layer keeps for backward, and that its input takes: the largest of the model's layers.

    Measured by a forward of a few tokens in training mode; parameters and buffers do not count.
    """
    layers = decoder_layers(model)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: list[dict[int, int]] = [{} for _ in layers]
    inputs, current, handles = [0] * len(layers), [None], []

    def enter(index):
        def hook(_, arguments, named):
            current[0] = index
            inputs[index] = next(t.nbytes for t in (*arguments, *named.values()) if isinstance(t, torch.Tensor))

        return hook

    def leave(*_):
        current[0] = None

    def pack(tensor):
        storage = tensor.untyped_storage()
        if current[0] is not None and storage.data_ptr() not in own:
            kept[current[0]][storage.data_ptr()] = max(storage.nbytes(), kept[current[0]].get(storage.data_ptr(), 0))
        return tensor

    flags = [(layer, layer.gradient_checkpointing) for layer in layers]
    training = [module for module in model.modules() if not module.training]
    device = next(model.parameters()).device
    embedding = model.get_input_embeddings()
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device=device)
    try:
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = False
            handles.append(layer.register_forward_pre_hook(enter(index), with_kwargs=True))
            handles.append(layer.register_forward_hook(leave))
        model.train()
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            hidden = embedding(ids).detach().requires_grad_()  # every layer's input has a gradient, as in training
            outputs = getattr(model, model.base_model_prefix)(inputs_embeds=hidden, use_cache=False)
        del outputs
    finally:
        for handle in handles:
            handle.remove()
        for layer, flag in flags:
            layer.gradient_checkpointing = flag
        for module in training:
            module.training = False
    return max(sum(sizes.values()) for sizes in kept) // PROBE_TOKENS, max(inputs) // PROBE_TOKENS


def ends_with_mlp(model: nn.Module) -> bool:
    """Whether nothing that backward needs depends on the outputs of a model's gated MLPs, by numbers.

    All layers are recomputed for a few tokens with NaN in the place of these outputs; no gradient may show it. Of
    a model that is not one of transformers' nothing is known, as it takes no tokens: no.
    """
    layers = decoder_layers(model)
    before = [(layer, layer.gradient_checkpointing, layer.__dict__.get(FUNCTION)) for layer in layers]
    idle = [module for module in model.modules() if not module.training]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters or not hasattr(model, "base_model_prefix"):
        return False
    device = parameters[0].device
    ids = torch.arange(PROBE_TOKENS // 8, device=device).unsqueeze(0)
    try:
        model.train()
        for layer in layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, Recomputation(None, True)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
            gradients = torch.autograd.grad(hidden.float().square().sum(), parameters, allow_unused=True)
    finally:
        for layer, flag, function in before:
            layer.gradient_checkpointing = flag
            if function is not None:
                layer._gradient_checkpointing_func = function
        for module in idle:
            module.training = False
    return all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)


class Recomputation:
    """What a layer is called through: `torch.utils.checkpoint`, with random numbers that a CUDA graph can repeat.

    Outside a capture the generators' states are saved and restored, which reads them on the host. Within one, the
    layer draws from a generator of its own, and its recomputation from a twin that starts and advances alike.

    Args:
        host: where the layer's input, its first argument, waits; None: it stays on the GPU.
        ends_with_mlp: whether nothing that backward needs depends on the output of the layer's gated MLP, so that its
            last product, a quarter of a Llama layer's, is not computed again.
    """

    def __init__(self, host: "HostStack | None" = None, ends_with_mlp: bool = False):
        self.host, self.ends_with_mlp = host, ends_with_mlp
        self.twins: tuple[torch.Generator, torch.Generator] | None = None

    def __call__(self, function: Callable, *arguments):
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        twins = self.twins if capturing else None
        options = {
            "use_reentrant": False,
            "preserve_rng_state": not capturing,
            "context_fn": lambda: self.contexts(twins),
        }
        hidden, *rest = arguments or (None,)
        offloads = self.host is not None and hidden is not None and hidden.nbytes >= LEAST_OFFLOADED
        if not offloads or not torch.is_grad_enabled():
            return checkpoint(function, *arguments, **options)
        waiting = self.host.push(hidden)
        device = hidden.new_empty(0)  # whose random state is kept: of tensors that it is not given, torch cannot know
        output = checkpoint(lambda _: function(waiting.take(), *rest), device, **options)
        waiting.release()
        return output

    def contexts(self, twins: tuple[torch.Generator, torch.Generator] | None):
        """What forward runs in, and what recomputation does."""
        forward, again = [drawing_from(twin) for twin in twins] if twins else [contextlib.nullcontext()] * 2
        return forward, _both(again, unread_mlp_outputs()) if self.ends_with_mlp else again

    def prepare_capture(self, device: torch.device, seed: int) -> tuple[torch.Generator, torch.Generator]:
        """Makes the two generators; a graph has to know them before it captures."""
        self.twins = tuple(torch.Generator(device).manual_seed(seed) for _ in range(2))
        return self.twins


@contextlib.contextmanager
def _both(first, second):
    with first, second:
        yield


@contextlib.contextmanager
def drawing_from(generator: torch.Generator):
    """Within this context a GPU's default generator is another's state: it draws from there and advances it."""
    default = torch.cuda.default_generators[generator.device.index]
    before = default.graphsafe_get_state()
    default.graphsafe_set_state(generator)
    try:
        yield
    finally:
        default.graphsafe_set_state(before)


class HostStack:
    """Tensors that wait in pinned host memory from forward to backward, last in, first out.

    Each copy to the host runs on a side stream beside the layer that reads the tensor; each copy back starts when the
    layer after it begins its backward, so one tensor more than the one in use is on the GPU. Pinned buffers are used
    again: all copies are on one stream, and so the next user's follow the last one's.
    """

    def __init__(self):
        self.stream: torch.cuda.Stream | None = None
        self.free: dict[tuple, list[torch.Tensor]] = {}
        self.last: weakref.ref | None = None

    def push(self, tensor: torch.Tensor) -> "Waiting":
        """Starts the copy of a GPU tensor to the host.

        Raises:
            RuntimeError: while a CUDA graph is captured.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("activations cannot be offloaded within a CUDA graph; turn one of the two off")
        if self.stream is None:
            self.stream = torch.cuda.Stream(tensor.device)
        tensor = tensor.contiguous()
        pool = self.free.setdefault((tensor.shape, tensor.dtype), [])
        buffer = pool.pop() if pool else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            buffer.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self.stream)  # its memory is free when the copy is done
        waiting = Waiting(self, tensor, buffer, self.last)
        self.last = weakref.ref(waiting)
        return waiting


class Waiting:
    """A tensor of a `HostStack`: on the GPU until `release`, and again from `take` on."""

    def __init__(self, stack: HostStack, tensor: torch.Tensor, buffer: torch.Tensor, previous: weakref.ref | None):
        self.stack, self.buffer, self.previous = stack, buffer, previous
        self.device, self.requires_grad = tensor.device, tensor.requires_grad
        self.tensor: torch.Tensor | None = tensor
        self.arrived: torch.cuda.Event | None = None

    def release(self) -> None:
        """Lets go of the tensor on the GPU; forward is done with it."""
        self.tensor = None

    def take(self) -> torch.Tensor:
        """The tensor, on the GPU for the current stream; starts the copy of the one that backward needs next."""
        if self.tensor is not None and self.arrived is None:
            return self.tensor
        self.fetch()
        tensor, self.tensor = self.tensor, None
        torch.cuda.current_stream(self.device).wait_event(self.arrived)
        self.arrived = None
        before = self.previous and self.previous()
        if before is not None:
            before.fetch()
        return tensor

    def fetch(self) -> None:
        """Starts the copy back, unless it is under way or there was none away."""
        if self.tensor is not None:
            return
        stream, self.arrived = self.stack.stream, torch.cuda.Event()
        tensor = torch.empty(self.buffer.shape, dtype=self.buffer.dtype, device=self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # whoever had this memory before is done with it
        with torch.cuda.stream(stream):
            tensor.copy_(self.buffer, non_blocking=True)
            self.arrived.record()
        self.tensor = tensor.requires_grad_(self.requires_grad)

    def __del__(self):
        self.stack.free[self.buffer.shape, self.buffer.dtype].append(self.buffer)
