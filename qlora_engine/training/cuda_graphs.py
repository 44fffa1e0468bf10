"""Forward and backward of a training step as CUDA graphs: one launch where a small batch is bound by the host.

`CapturedStep` serves any training loop. Its graphs have fixed shapes, so batches are padded to a few lengths
(`padded_batch`); causal attention needs no mask for padding on the right (`causal_attention`).
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator

import torch
from torch import nn

from qlora_engine.training.activations import Recomputation, decoder_layers
from qlora_engine.training.loss import IGNORED

WARMUPS = 2  # kernels compile in the first, and memory settles in the second
BUCKETS = 4  # lengths to which batches are padded
LENGTH_STEP = 64  # of which every length is a multiple
ATTENTION = "qlora_engine_causal_sdpa"


class CapturedStep:
    """Runs `function(**inputs)` and the backward of its loss as a CUDA graph, captured at the first call of a shape.

    The gradients of a model's trainable parameters add up in `.grad` as they do without a graph, so gradient
    accumulation, clipping and any optimizer work as usual; `zero_grad()` with or without `set_to_none` too. Dropout
    draws new numbers at each call. What is captured must not read a tensor on the host, and reads everything but
    `inputs` where it was: parameters may change in place, not be replaced.

    Args:
        function: takes tensors by name and returns the loss, or a tuple of the loss and further tensors. It enters
            autocast itself where it is wanted.
        model: the module whose parameters are trained; its layers are recomputed by `recompute_layers`, if they are.
        backward: starts the backward pass of the loss.
        limit: graphs at most, one for each combination of shapes.

    Raises:
        RuntimeError: where there is no GPU, the model recomputes layers in another way, or offloads activations.

    Example::

        step = CapturedStep(lambda input_ids, labels: causal_lm_loss(model, input_ids, labels).loss, model)
        for batch in batches:
            (loss,) = step(input_ids=batch["input_ids"], labels=batch["labels"])
            optimizer.step()
            optimizer.zero_grad()
    """

    def __init__(
        self,
        function: Callable,
        model: nn.Module,
        *,
        backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
        limit: int = 16,
    ):
        self.function, self.model, self.backward, self.limit = function, model, backward, limit
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters or not all(p.is_cuda for p in self.parameters):
            raise RuntimeError("a CUDA graph needs trainable parameters, all on a GPU")
        self.device = self.parameters[0].device
        self.recomputations = _recomputations(model)
        self.generators: list[torch.Generator] = []
        self.gradients: list[torch.Tensor] | None = None
        self.graphs: dict[tuple, tuple] = {}
        self.pool = None
        # warm-up and captures share it: cuBLAS keeps a workspace of 32 MiB for each stream
        self.stream = torch.cuda.Stream(self.device)

    def __call__(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Adds a batch's gradients to `.grad`; returns what the function returned, detached.

        Raises:
            TypeError: for an input that is no GPU tensor.
            RuntimeError: where the step cannot be captured, there are too many shapes, or autocast is on outside.
        """
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor) or value.device != self.device:
                raise TypeError(f"{name} is {type(value).__name__}; a captured step takes tensors on {self.device}")
        if torch.is_autocast_enabled("cuda"):
            raise RuntimeError("autocast is on outside of a captured step; enter it in the function instead")
        kind = tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(inputs.items()))
        if kind not in self.graphs:
            if len(self.graphs) >= self.limit:
                raise RuntimeError(
                    f"{len(self.graphs)} combinations of shapes are captured already; pad batches to fewer shapes, "
                    "or raise the limit"
                )
            self.graphs[kind] = self._capture(inputs)
        graph, places, outputs = self.graphs[kind]
        for name, value in inputs.items():
            places[name].copy_(value, non_blocking=True)
        self._attach()
        graph.replay()
        return tuple(output.clone() for output in outputs)

    def _attach(self) -> None:
        """Makes `.grad` the memory that the graphs add to, with what it held before."""
        pairs = list(zip(self.parameters, self.gradients, strict=True))
        absent = [gradient for parameter, gradient in pairs if parameter.grad is None]
        if absent:
            torch._foreach_zero_(absent)
        for parameter, gradient in pairs:
            if parameter.grad is not gradient:
                if parameter.grad is not None:
                    gradient.copy_(parameter.grad)
                parameter.grad = gradient

    def _run(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        found = self.function(**inputs)
        outputs = tuple(found) if isinstance(found, tuple) else (found,)
        self.backward(outputs[0])
        return tuple(output.detach() for output in outputs)

    def _capture(self, inputs: dict[str, torch.Tensor]) -> tuple:
        places = {name: value.detach().clone() for name, value in inputs.items()}
        if self.gradients is None:
            self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
            numbers = random.Random(torch.cuda.initial_seed())
            for one in self.recomputations:
                self.generators += one.prepare_capture(self.device, numbers.getrandbits(62))
        graph = torch.cuda.CUDAGraph()
        with self._fresh_parameters() as fresh:
            self._warm_up(places, fresh)
            for parameter, gradient in zip(fresh, self.gradients, strict=True):
                parameter.grad = gradient
            for generator in self.generators:
                graph.register_generator_state(generator)
            try:
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    outputs = self._run(places)
            except Exception as error:
                raise RuntimeError(
                    f"this step cannot be captured into a CUDA graph ({' '.join(str(error).split())[:300]}); it must "
                    "not read a tensor on the host or depend on its values, nor copy from memory that is not pinned"
                ) from error
        self.pool = graph.pool()
        return graph, places, outputs

    @contextlib.contextmanager
    def _fresh_parameters(self) -> Iterator[list[nn.Parameter]]:
        """Within this context the model has other parameters in the same memory.

        Autograd adds a gradient on the stream on which a parameter was first used, and remembers it for as long as
        any graph with the parameter lives, such as that of a loss somebody keeps. These were never used.
        """
        fresh = {id(p): nn.Parameter(p.detach()) for p in self.parameters}
        places = [
            (module._parameters, name)
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in fresh
        ]
        before = [owner[name] for owner, name in places]
        try:
            for owner, name in places:
                owner[name] = fresh[id(owner[name])]
            yield list(fresh.values())
        finally:
            for (owner, name), parameter in zip(places, before, strict=True):
                owner[name] = parameter

    def _warm_up(self, inputs: dict[str, torch.Tensor], parameters: list[nn.Parameter]) -> None:
        """Calls without a graph, which leave no trace in the random numbers."""
        numbers = torch.cuda.get_rng_state(self.device)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                for _ in range(WARMUPS):
                    for parameter in parameters:
                        parameter.grad = None
                    self._run(inputs)
        finally:
            current.wait_stream(self.stream)
            torch.cuda.set_rng_state(numbers, self.device)


def _recomputations(model: nn.Module) -> list[Recomputation]:
    """How the layers of a model are recomputed."""
    found = []
    for layer in decoder_layers(model):
        if not layer.gradient_checkpointing:
            continue
        one = layer._gradient_checkpointing_func
        if not isinstance(one, Recomputation):
            raise RuntimeError(
                "the model's gradient checkpointing reads random states on the host, which a CUDA graph cannot; turn "
                "it on with qlora_engine.training.activations.recompute_layers"
            )
        if one.host is not None:
            raise RuntimeError("activations cannot be offloaded within a CUDA graph; turn one of the two off")
        found.append(one)
    return found


def bucket_length(length: int, longest: int) -> int:
    """The length to which a batch is padded: one of at most BUCKETS, multiples of LENGTH_STEP where they can be.

    >>> [bucket_length(length, 1000) for length in (3, 256, 257, 1000)]
    [256, 256, 512, 1000]
    """
    step = math.ceil(math.ceil(longest / BUCKETS) / LENGTH_STEP) * LENGTH_STEP
    return max(length, min(longest, math.ceil(length / step) * step))


def padded_batch(
    input_ids: torch.Tensor, labels: torch.Tensor, rows: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of `[rows, length]`, with tokens that count for nothing on the right and rows of them below.

    Args:
        input_ids: int64 `[B, T]`, padded on the right if at all.
        labels: int64 `[B, T]`, -100 where a token does not count.
        rows, length: at least B and T.
    """
    margins = (0, length - input_ids.shape[1], 0, rows - input_ids.shape[0])
    return nn.functional.pad(input_ids, margins), nn.functional.pad(labels, margins, value=IGNORED)


@contextlib.contextmanager
def causal_attention(model: nn.Module) -> Iterator[None]:
    """Within this context a transformers model that uses SDPA attends causally, without a mask in memory.

    For batches that are padded on the right or not at all: no token sees one to its right, and the outputs of padding
    are nobody's input. Without a mask PyTorch takes its fastest kernels, and nothing is read on the host to find that
    out. Sliding windows shorter than the batch keep their masks.

    Raises:
        RuntimeError: where the model's attention is another.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def no_mask(*arguments, q_length: int, local_size: int | None = None, **options):
        if local_size is not None and q_length >= local_size:
            options["allow_is_causal_skip"] = False
            return sdpa_mask(*arguments, q_length=q_length, local_size=local_size, **options)
        return None

    config = model.config
    if config._attn_implementation != "sdpa":
        raise RuntimeError(
            f"the model's attention is {config._attn_implementation!r}; expected 'sdpa', the default of transformers"
        )
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, no_mask)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
