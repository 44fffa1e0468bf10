"""How a run's steps are made fast: liger's kernels, recomputation, CUDA graphs, as the options ask."""

import torch

from qlora_engine.training import activations, liger, loss
from qlora_engine.training.cuda_graphs import CapturedStep, bucket_length, causal_attention, padded_batch
from qlora_engine.training.errors import UsageError, as_usage_error
from qlora_engine.training.options import LORA, FinetuneOptions, recomputation_policy

BATCH = {"input_ids", "labels", "attention_mask"}  # what a batch that can be captured holds


def leaves_recomputation_to_transformers(options: FinetuneOptions, model: torch.nn.Module) -> bool:
    """Whether transformers decides: for methods other than LoRA, and models of which it recomputes no single layers.

    Raises:
        UsageError: where an option asks for what only this engine's recomputation does.
    """
    own = options.method == LORA and activations.decoder_layers(model)
    asked = options.activation_gib is not None or options.offload_activations
    if asked and not own:
        raise UsageError(
            "--activation-gib and --offload-activations are for --method lora and models whose layers transformers "
            "recomputes one by one; use --gradient-checkpointing full"
        )
    return not own


def set_up(options: FinetuneOptions, trainer, device: torch.device) -> None:
    """Does what the options ask of a trainer's steps.

    Raises:
        UsageError: for what this model, method or device does not support.
    """
    model = trainer.model
    set_up_liger(options, model, device)
    if not leaves_recomputation_to_transformers(options, model):
        with as_usage_error():
            activations.recompute_layers(
                model,
                recomputation_policy(options, device.type == "cuda"),
                budget_gib=options.activation_gib,
                tokens=options.sequences * options.max_length,
                offload=options.offload_activations,
            )
    why_no_loss = why_not_own_loss(options, trainer)
    trainer.own_loss = why_no_loss is None
    # causal attention needs no mask for batches that are padded on the right, as TRL's are; packed ones need theirs
    trainer.needs_masks = options.packing or model.config._attn_implementation != "sdpa"
    if options.cuda_graphs:
        trainer.captured = captured_training(options, trainer, device, why_no_loss)


def set_up_liger(options: FinetuneOptions, model: torch.nn.Module, device: torch.device) -> None:
    """Liger's kernels, where they are asked for or can be had.

    Raises:
        UsageError: where they are asked for and cannot be had.
    """
    reason = liger.why_no_liger(device)
    if options.liger == "on" and reason:
        raise UsageError(f"--liger on: {reason}")
    if options.liger != "off" and not reason:
        liger.use_liger(model)


def why_not_own_loss(options: FinetuneOptions, trainer) -> str | None:
    """Why the training loss stays TRL's, or None."""
    if options.method != LORA:
        return f"it is that of --method {options.method}"
    if trainer.accelerator.num_processes > 1:
        return "several processes share the batch"
    if trainer.aux_loss_enabled or trainer.args.loss_type != "nll":
        return "there is more in it than the next token's"
    return loss.why_no_causal_loss(trainer.model)


def captured_training(
    options: FinetuneOptions, trainer, device: torch.device, why_no_loss: str | None
) -> "CapturedTraining":
    """What makes a trainer's steps CUDA graphs.

    Raises:
        UsageError: where they cannot be.
    """
    reason = None
    if device.type != "cuda":
        reason = f"the device is {device}; a GPU is needed"
    elif options.method != LORA:
        reason = f"--method {options.method} decides on the host what its steps do; only lora's are captured"
    elif why_no_loss:
        reason = f"the loss cannot be captured: {why_no_loss}"
    elif trainer.model.config._attn_implementation != "sdpa":
        reason = f"the attention is {trainer.model.config._attn_implementation!r}; expected 'sdpa'"
    if reason:
        raise UsageError(f"--cuda-graphs: {reason}")
    return CapturedTraining(trainer, options.batch_size, options.max_length)


class CapturedTraining:
    """A trainer's forward and backward passes as CUDA graphs, one for each padded length.

    Args:
        trainer: the `QLoRATrainer`; it makes the batches, and its accelerator runs autocast and backward.
        rows: sequences a batch at most.
        longest: tokens a sequence at most.
    """

    def __init__(self, trainer, rows: int, longest: int):
        self.trainer, self.rows, self.longest = trainer, rows, longest
        self.graphs: CapturedStep | None = None

    def __call__(self, inputs: dict[str, torch.Tensor], num_items: torch.Tensor | int | None) -> loss.CausalLoss:
        """The loss of a batch, detached, and what was counted; its gradients are in `.grad`.

        Raises:
            UsageError: for a batch that cannot be captured.
        """
        trainer = self.trainer
        if self.graphs is None:
            self.graphs = CapturedStep(self._loss, trainer.model, backward=trainer.accelerator.backward)
        unknown = inputs.keys() - BATCH
        if unknown:
            raise UsageError(f"--cuda-graphs: batches hold {', '.join(sorted(unknown))}, which are not captured")
        ids, labels = inputs["input_ids"], inputs["labels"]
        if num_items is None:
            counted = (labels[:, 1:] != loss.IGNORED).sum().clamp(min=1)
            num_items = counted * trainer.current_gradient_accumulation_steps
        num_items = torch.as_tensor(num_items, dtype=torch.float32, device=ids.device).reshape(())
        length = bucket_length(ids.shape[1], self.longest)
        padded = padded_batch(ids, labels, max(self.rows, ids.shape[0]), length)
        try:
            return loss.CausalLoss(*self.graphs(input_ids=padded[0], labels=padded[1], num_items=num_items))
        except RuntimeError as error:
            if "captured" not in str(error):
                raise
            raise UsageError(f"{error}; leave out --cuda-graphs") from error

    def _loss(self, input_ids, labels, num_items):
        with self.trainer.accelerator.autocast(), causal_attention(self.trainer.model):
            return tuple(loss.causal_lm_loss(self.trainer.model, input_ids, labels, num_items))
