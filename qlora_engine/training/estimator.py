"""The memory that fine-tuning takes, from a model's configuration alone, and what to turn where it does not fit.

Allocated bytes are those of `torch.cuda.max_memory_allocated`; `benchmarks/bench_memory.py` measures them beside it.
"""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass

from qlora_engine.models.config import QLoRAConfig
from qlora_engine.reference.adamw import EIGHT_BIT_STATE, page_bytes
from qlora_engine.training import activation_memory
from qlora_engine.training.activations import recomputed_within
from qlora_engine.training.architecture import Architecture, read_architecture
from qlora_engine.training.errors import UsageError, as_usage_error
from qlora_engine.training.memory import GIB
from qlora_engine.training.options import FinetuneOptions, flag, recomputation_policy

MIN_8BIT_SIZE = 4096  # PagedAdamW's default
# measured on an H100: cuBLAS's memory for each thread that calls it, and what a CUDA graph's pool holds besides
WORKSPACE, GRAPHS = 128 << 20, 104 << 20
# what is not torch's: the CUDA context with its kernels, and memory that the allocator holds in pieces
CONTEXT, FRAGMENTATION = 640 << 20, 0.03
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "auto": 2}


@dataclass(frozen=True)
class Estimate:
    """Bytes on the GPU.

    Attributes:
        weights: 4-bit matrices with their scales.
        rest: embeddings, head, norms and biases, as far as they are not in 4 bits.
        adapters: the adapters' parameters.
        optimizer: its state on the GPU.
        optimizer_host: its state in host memory, which is not in `allocated`.
        activations: activations and the adapters' gradients at their peak, the loss included.
        workspace: memory of the libraries.
        allocated: the most that torch allocates at once.
        notes: what the estimate leaves out.
    """

    weights: int
    rest: int
    adapters: int
    optimizer: int
    optimizer_host: int
    activations: int
    workspace: int
    allocated: int
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """What the GPU must have free: `allocated`, the CUDA context, and what the allocator cannot use."""
        return CONTEXT + int(self.allocated * (1 + FRAGMENTATION))

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes), as far as they add up to `total`."""
        named = [
            ("4-bit weights", self.weights),
            ("embeddings, head, norms", self.rest),
            ("adapters", self.adapters),
            ("optimizer state", self.optimizer),
            ("activations and gradients", self.activations),
            ("library workspace", self.workspace),
        ]
        return [*named, ("CUDA context, fragments", self.total - sum(size for _, size in named))]


def estimate(model: Architecture, options: FinetuneOptions, *, recomputed: int | None = None) -> Estimate:
    """What a run takes of a GPU.

    Args:
        model: read with the quantization and the adapters of `options`: see `architecture_for`.
        options: of the run with `method="lora"`; `data` and `output` are not read. With `liger="auto"` it has
            liger-kernel where that is installed here.
        recomputed: layers whose activations are computed again; default: what `options` ask for.

    Raises:
        UsageError: where `activation_gib` is less than the layers take with all recomputed.
    """
    step = step_of(model, options)
    if recomputed is not None:
        step = dataclasses.replace(step, recomputed=recomputed)
    element = step.element
    adapters = 4 * sum(model.adapters)
    state = optimizer_bytes(model.adapters, options.optimizer)
    budget = options.optimizer_gpu_gib
    on_device = state if budget is None else min(state, int(budget * GIB))
    rest = element * (model.rest - model.rest_float32) + 4 * model.rest_float32
    moving = max(activation_memory.peak(model, step), adapters + optimizer_working(model.adapters, options.optimizer))
    workspace = WORKSPACE + GRAPHS * options.cuda_graphs
    return Estimate(
        weights=model.quantized,
        rest=rest,
        adapters=adapters,
        optimizer=on_device,
        optimizer_host=state - on_device,
        activations=moving,
        workspace=workspace,
        allocated=model.quantized + rest + adapters + on_device + workspace + moving,
        notes=model.notes,
    )


def step_of(model: Architecture, options: FinetuneOptions) -> activation_memory.Step:
    """The forward and backward pass of a run on a GPU.

    Raises:
        UsageError: as in `estimate`.
    """
    # packed sequences are one row, whose attention takes a mask
    batch, length = options.sequences, options.max_length
    step = activation_memory.Step(
        batch=1 if options.packing else batch,
        length=batch * length if options.packing else length,
        element=ELEMENT_BYTES[options.dtype],
        offloaded=options.offload_activations,
        masked=options.packing and model.fused_attention,
        own_loss=model.plain_head,
        liger=options.liger == "on"
        or (options.liger == "auto" and importlib.util.find_spec("liger_kernel") is not None),
        accumulating=options.grad_accum > 1,
    )
    return dataclasses.replace(step, recomputed=_recomputed(model, options, step))


def _recomputed(model: Architecture, options: FinetuneOptions, step: activation_memory.Step) -> int:
    """How many layers the options ask to recompute."""
    layers = len(model.layers)
    policy = recomputation_policy(options, on_gpu=True)
    if options.activation_gib is None:
        return {"none": 0, "full": layers, "selective": layers - 1}[policy]
    kept, inputs = _of_largest_layer(model, step)
    with as_usage_error():
        return recomputed_within(
            options.activation_gib, layers, step.tokens, kept, inputs, options.offload_activations
        )


def _of_largest_layer(model: Architecture, step: activation_memory.Step) -> tuple[int, int]:
    """(bytes a token that a layer keeps, bytes of its input)"""
    kept = max(activation_memory.kept_by_layer(layer, step) for layer in model.layers)
    return kept // step.tokens, step.element * model.hidden


def optimizer_bytes(sizes: tuple[int, ...], optimizer: str) -> int:
    """State of an optimizer for float32 parameters of these sizes, wherever it lies."""
    if not optimizer.startswith("paged"):
        return 8 * sum(sizes)
    eight = optimizer.endswith("8bit")
    return sum(page_bytes(n, EIGHT_BIT_STATE if eight and n >= MIN_8BIT_SIZE else 0) for n in sizes)


def optimizer_working(sizes: tuple[int, ...], optimizer: str) -> int:
    """What an optimizer's step takes beside state and gradients: torch's foreach holds a copy of a moment."""
    return 4 * sum(sizes) if optimizer == "adamw_foreach" else 0


def architecture_for(options: FinetuneOptions) -> Architecture:
    """The architecture of `options.model` under the quantization and the adapters of `options`.

    Raises:
        ModelError, UsageError: as `read_architecture`.
    """
    return read_architecture(
        options.model,
        QLoRAConfig(
            r=options.r,
            target_modules=options.target_modules,
            exclude_modules=options.exclude_modules,
            blocksize=options.blocksize,
            double_quant=options.double_quant,
            quantize_embeddings=options.quantize_embeddings,
            quantize_head=options.quantize_head,
        ),
    )


@dataclass(frozen=True)
class Change:
    """Options that take less memory.

    Attributes:
        flags: what to add to the command line, with all changes before this one.
        total: bytes that the GPU must have free then.
    """

    flags: str
    total: int


def changes(model: Architecture, options: FinetuneOptions, gpu: int) -> list[Change]:
    """What to turn, one after another, until a run fits; the least harmful first. Empty where it fits.

    Args:
        model, options: as in `estimate`.
        gpu: bytes of the GPU.
    """
    found: list[Change] = []
    changed: dict[str, object] = {}
    lowest = _total(model, options)
    for step in _knobs(options):
        if lowest <= gpu:
            break
        total = _total(model, dataclasses.replace(options, **changed | step))
        if total < lowest:
            lowest = total
            changed |= step
            found.append(Change(_as_flags(changed), total))
    return found


def _total(model: Architecture, options: FinetuneOptions) -> int | float:
    """What the GPU must have free; infinity where a budget of the options cannot be kept."""
    try:
        return estimate(model, options).total
    except UsageError:
        return math.inf


def _knobs(options: FinetuneOptions):
    """Single changes, in the order in which they are tried."""
    if options.gradient_checkpointing in ("off", "none") or options.activation_gib is not None:
        yield {"gradient_checkpointing": "selective", "activation_gib": None}
    batch, passes = options.batch_size, options.grad_accum
    while batch > 1:
        batch, passes = -(-batch // 2), passes * 2
        yield {"batch_size": batch, "grad_accum": passes}
    if options.optimizer != "paged_adamw_8bit":
        yield {"optimizer": "paged_adamw_8bit"}
    if not options.cuda_graphs and not options.offload_activations:
        yield {"offload_activations": True}
    if options.optimizer_gpu_gib != 0:
        yield {"optimizer": "paged_adamw_8bit", "optimizer_gpu_gib": 0}
    length = options.max_length
    while length >= 512:
        length //= 2
        yield {"max_length": length}


def _as_flags(changed: dict[str, object]) -> str:
    words = [
        flag(name) if value is True else f"{flag(name)} {value}"
        for name, value in changed.items()
        if value is not None
    ]
    return " ".join(words)


def largest_batch(model: Architecture, options: FinetuneOptions, gpu: int) -> int:
    """The most sequences of `options.max_length` a forward pass that fit; 0 where not even one does."""

    def fits(batch: int) -> bool:
        return _total(model, dataclasses.replace(options, batch_size=batch)) <= gpu

    return _largest(fits, 4096)


def fewest_recomputed(model: Architecture, options: FinetuneOptions, gpu: int) -> int | None:
    """The fewest layers that must be recomputed for a run to fit; None where all but the last are not enough."""
    for count in range(len(model.layers)):
        if estimate(model, options, recomputed=count).total <= gpu:
            return count
    return None


def activation_budget(model: Architecture, options: FinetuneOptions, recomputed: int) -> float:
    """The `activation_gib` with which so many layers are recomputed, in GiB, to two places."""
    step = step_of(model, dataclasses.replace(options, activation_gib=None))
    kept, inputs = (size * step.tokens for size in _of_largest_layer(model, step))
    waiting = 0 if step.offloaded else inputs
    layers = len(model.layers)
    least = kept + (layers - 1) * waiting + (layers - 1 - recomputed) * (kept - waiting)
    return math.ceil(100 * least / GIB) / 100


def _largest(fits, limit: int) -> int:
    """The largest number up to a limit for which `fits`, which holds for all below one that it holds for."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def advice(options: FinetuneOptions, gpu: int) -> str:
    """What an out-of-memory error of a run says: the estimate, and the changes with which it would fit.

    Args:
        options: of the run.
        gpu: bytes of the GPU.

    Raises:
        UsageError: where the model's configuration cannot be read.
    """
    model = architecture_for(options)
    found = estimate(model, options)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.rows() if size)
    text = f"By estimate the run takes {found.total / GIB:.1f} GiB ({parts}) of {gpu / GIB:.1f}"
    turned = changes(model, options, gpu)
    if not turned:
        return f"{text}: it fits, if nothing else is on the GPU; see nvidia-smi"
    last = turned[-1]
    words = "With" if last.total <= gpu else "It is too large even with"
    return f"{text}. {words} {last.flags}: {last.total / GIB:.1f} GiB. `qlora estimate` shows more"
