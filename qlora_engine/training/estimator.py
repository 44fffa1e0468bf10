"""The memory that fine-tuning takes, from a model's configuration alone, and what to turn where it does not fit.

Allocated bytes are those of `torch.cuda.max_memory_allocated`; `benchmarks/bench_memory.py` measures them beside it.
"""

import dataclasses
from dataclasses import dataclass

from qlora_engine.models.config import QLoRAConfig
from qlora_engine.reference.adamw import EIGHT_BIT_STATE, page_bytes
from qlora_engine.training import activation_memory
from qlora_engine.training.architecture import Architecture, read_architecture
from qlora_engine.training.memory import GIB
from qlora_engine.training.options import FinetuneOptions, flag, recomputation_policy

MIN_8BIT_SIZE = 4096  # PagedAdamW's default
CUBLAS_WORKSPACE = 32 << 20  # on a GPU of compute capability 9.0, each of a thread that calls cuBLAS
WORKSPACES = 2  # the main thread's and autograd's
# what is not torch's: the CUDA context with its kernels, and memory that the allocator holds in pieces
CONTEXT, FRAGMENTATION = 640 << 20, 0.03
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "auto": 2}


@dataclass(frozen=True)
class Estimate:
    """Bytes on the GPU.

    Attributes:
        weights: 4-bit matrices with their scales.
        rest: embeddings, head, norms and biases.
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


def estimate(
    model: Architecture, options: FinetuneOptions, *, padded: bool = False, recomputed: int | None = None
) -> Estimate:
    """What a run takes of a GPU.

    Args:
        model: read with the quantization and the adapters of `options`: see `architecture_for`.
        options: of the run; `data` and `output` are not read.
        padded: whether sequences are padded to the longest of a batch.
        recomputed: layers whose activations are computed again; default: see `recomputed_layers`.
    """
    element = ELEMENT_BYTES[options.dtype]
    layers = len(model.layers)
    if recomputed is None:
        recomputed = recomputed_layers(model, options, padded)
    step = activation_memory.Step(
        batch=options.batch_size,
        length=options.max_length,
        element=element,
        recomputed=min(recomputed, layers),
        offloaded=options.offload_activations,
        padded=padded and not options.packing,
        accumulating=options.grad_accum > 1,
    )
    adapters = 4 * sum(model.adapters)
    state = optimizer_bytes(model.adapters, options.optimizer)
    budget = options.optimizer_gpu_gib
    on_device = state if budget is None else min(state, int(budget * GIB))
    rest = element * (model.rest - model.rest_float32) + 4 * model.rest_float32
    moving = max(activation_memory.peak(model, step), adapters + optimizer_working(model.adapters, options.optimizer))
    workspace = WORKSPACES * CUBLAS_WORKSPACE
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


def recomputed_layers(model: Architecture, options: FinetuneOptions, padded: bool = False) -> int:
    """How many layers a run on a GPU recomputes: as `training/step.py` and `training/activations.py` decide."""
    layers = len(model.layers)
    policy = recomputation_policy(options, on_gpu=True)
    if policy != "selective" or options.activation_gib is None:
        return {"none": 0, "full": layers, "selective": layers - 1}[policy]
    step = activation_memory.Step(
        options.batch_size,
        options.max_length,
        ELEMENT_BYTES[options.dtype],
        offloaded=options.offload_activations,
        padded=padded and not options.packing,
    )
    kept = activation_memory.kept_by_layer(model.layers[0], step)
    inputs = activation_memory.kept_by_checkpoint(model.layers[0], step)
    return next(
        (n for n in range(layers) if n * inputs + (layers - n) * kept <= options.activation_gib * GIB), layers - 1
    )


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


def changes(model: Architecture, options: FinetuneOptions, gpu: int, padded: bool = False) -> list[Change]:
    """What to turn, one after another, until a run fits; the least harmful first. Empty where it fits.

    Args:
        model, options, padded: as in `estimate`.
        gpu: bytes of the GPU.
    """
    found: list[Change] = []
    changed: dict[str, object] = {}
    fits = estimate(model, options, padded=padded).total <= gpu
    for step in _knobs(options):
        if fits:
            break
        total = estimate(model, dataclasses.replace(options, **changed | step), padded=padded).total
        if total < (found[-1].total if found else estimate(model, options, padded=padded).total):
            changed |= step
            found.append(Change(_command_line(changed), total))
            fits = total <= gpu
    return found


def _command_line(changed: dict[str, object]) -> str:
    """Options as they are written; one that is None is left out of the command."""
    words = (
        flag(name) if value is True else f"{flag(name)} {value}"
        for name, value in changed.items()
        if value is not None
    )
    return " ".join(words)


def _knobs(options: FinetuneOptions):
    """Single changes, in the order in which they are tried."""
    if recomputation_policy(options, on_gpu=True) == "none" or options.activation_gib is not None:
        yield {"gradient_checkpointing": "selective", "activation_gib": None}
    batch, passes = options.batch_size, options.grad_accum
    while batch > 1:
        batch, passes = -(-batch // 2), passes * 2
        yield {"batch_size": batch, "grad_accum": passes}
    if not options.offload_activations and not options.cuda_graphs:
        yield {"offload_activations": True}
    if options.optimizer != "paged_adamw_8bit":
        yield {"optimizer": "paged_adamw_8bit"}
    if options.optimizer_gpu_gib != 0:
        yield {"optimizer": "paged_adamw_8bit", "optimizer_gpu_gib": 0}
    length = options.max_length
    while length >= 512:
        length //= 2
        yield {"max_length": length}


def largest_batch(model: Architecture, options: FinetuneOptions, gpu: int, padded: bool = False) -> int:
    """The most sequences of `options.max_length` a forward pass that fit; 0 where not even one does."""

    def fits(batch: int) -> bool:
        return estimate(model, dataclasses.replace(options, batch_size=batch), padded=padded).total <= gpu

    return _largest(fits, 4096)


def fewest_recomputed(model: Architecture, options: FinetuneOptions, gpu: int, padded: bool = False) -> int | None:
    """The fewest layers that must be recomputed for a run to fit; None where all are not enough."""
    for count in range(len(model.layers) + 1):
        if estimate(model, options, padded=padded, recomputed=count).total <= gpu:
            return count
    return None


def _largest(fits, limit: int) -> int:
    """The largest number up to a limit for which `fits`, which holds for all below one that it holds for."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def advice(options: FinetuneOptions, gpu: int, padded: bool = True) -> str:
    """What an out-of-memory error of a run says: the estimate, and the changes with which it would fit.

    Args:
        options: of the run.
        gpu: bytes of the GPU.
        padded: as in `estimate`.

    Raises:
        UsageError: where the model's configuration cannot be read.
    """
    model = architecture_for(options)
    found = estimate(model, options, padded=padded)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.rows() if size)
    text = f"By estimate the run takes {found.total / GIB:.1f} GiB ({parts}) of {gpu / GIB:.1f}"
    turned = changes(model, options, gpu, padded)
    if not turned:
        return f"{text}: it fits, if nothing else is on the GPU; see nvidia-smi"
    last = turned[-1]
    words = "With" if last.total <= gpu else "It is too large even with"
    return f"{text}. {words} {last.flags}: {last.total / GIB:.1f} GiB. `qlora estimate` shows more"
