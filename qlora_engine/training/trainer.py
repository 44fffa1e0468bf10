"""TRL's SFTTrainer over a model prepared by this engine: what it saves, how it is interrupted, what it reports."""

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainerCallback
from trl import SFTTrainer

from qlora_engine.models.adapter import load_adapter, save_adapter
from qlora_engine.models.files import atomic_write
from qlora_engine.optim import lora_plus_groups
from qlora_engine.training.cuda_graphs import causal_attention
from qlora_engine.training.loss import decoded_head
from qlora_engine.training.memory import GIB, peak_memory
from qlora_engine.training.methods import MethodSteps, load_checkpoint, method_of, save_checkpoint
from qlora_engine.training.objective import REWARDS, Objective
from qlora_engine.training.parallel import ParallelTraining, Ranks, agree
from qlora_engine.training.step import CapturedTraining


class QLoRATrainer(ParallelTraining, SFTTrainer):
    """SFTTrainer whose checkpoints hold the adapter, or what another method learnt, and not the model.

    A checkpoint folder has the adapter in PEFT's format, optimizer, scheduler, random states and the trainer's
    state; the frozen base is read from where it came from.

    Args:
        objective: what is minimised.
        lora_plus: learning rate of the adapters' B factors over that of everything else.
        ranks: the processes of the run.
        *args, **kwargs: SFTTrainer's.
    """

    def __init__(self, *args, objective: Objective, lora_plus: float = 1.0, ranks: Ranks | None = None, **kwargs):
        self.objective, self._lora_plus, self.ranks = objective, lora_plus, ranks or Ranks()
        self.needs_masks = True  # whether attention has to see which tokens are padding
        self.own_loss = False  # whether the loss is this engine's chunked one and not TRL's
        self.captured: CapturedTraining | None = None  # where the steps are CUDA graphs
        super().__init__(*args, data_collator=objective.collator, **kwargs)
        self.method = method_of(self.model)
        if self.method is not None:
            self.add_callback(MethodSteps(self.method))

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            self.prepare_parallel()
        optimizer, options = self.optimizer_cls_and_kwargs
        decay = {"weight_decay": self.args.weight_decay}
        if self.optimizer is None and self.method is not None:
            self.optimizer = optimizer(self.method.parameter_groups(options["lr"], **decay), **options)
        elif self.optimizer is None and self._lora_plus != 1:
            groups = lora_plus_groups(self.model, options["lr"], self._lora_plus, **decay)
            self.optimizer = optimizer(groups, **options)
        return super().create_optimizer(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            found = self.trl_loss(model, inputs, num_items_in_batch, True)
        else:
            found = self.objective.loss(self, model, inputs, num_items_in_batch)
        penalty = self.method.penalty() if self.method is not None and model.training else None
        if penalty is None:
            return found
        # the loss of a part of a batch whose size is known is a share of the step's; the penalty is of the step
        share = penalty if num_items_in_batch is None else penalty / self.args.gradient_accumulation_steps
        return (found[0] + share, found[1]) if return_outputs else found + share

    def trl_loss(self, model, inputs, num_items_in_batch=None, return_outputs=False):
        """TRL's loss of a batch, with its own figures."""
        with decoded_head(self.model):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @contextlib.contextmanager
    def own_pass(self, inputs: dict) -> Iterator[dict]:
        """Around a forward pass of this engine: autocast, and no mask where none is needed; yields its inputs."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.accelerator.autocast())
            if not self.needs_masks:
                stack.enter_context(causal_attention(self.model))
                inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
            yield inputs

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.captured is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        own = self.captured(inputs, num_items_in_batch)
        self.objective.counts.add(own, inputs)
        return own.loss

    def log(self, logs, start_time=None):
        metrics = self._metrics["train" if self.model.training else "eval"]
        figures, tokens = self.objective.take(self.model.training)
        for name, values in figures.items():
            metrics[name] += values
        if tokens is not None:
            self._total_train_tokens += tokens
            metrics["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save and self.method is not None:
            save_checkpoint(self.method, output_dir or self.args.output_dir)
        elif self.args.should_save or self.ranks.sharded:  # a sharded one is gathered by all
            save_adapter(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.method is not None:
            load_checkpoint(self.method, resume_from_checkpoint)
        else:
            load_adapter(model or self.model, resume_from_checkpoint)

    def create_model_card(self, *args, **kwargs):
        """Nothing: the report writes the card, with what was measured."""


class StopRequest:
    """Whether the user asked to stop."""

    def __init__(self):
        self.asked = False


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """Within this context the first Ctrl-C asks for a stop after the current step; the second ends at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to that one only
        yield request
        return

    def ask(signum, frame):
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        print(
            "\nstopping after this step, to save a checkpoint (Ctrl-C again: stop at once)",
            file=sys.stderr,
            flush=True,
        )

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)


class StopCallback(TrainerCallback):
    """Ends training with a checkpoint after the step in which a stop was asked for."""

    def __init__(self, request: StopRequest, ranks: Ranks | None = None):
        self.request, self.ranks = request, ranks or Ranks()

    def on_step_end(self, args, state, control, **kwargs):
        if agree(self.ranks, self.request.asked) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


class MetricsLog(TrainerCallback):
    """Appends each step's and each evaluation's figures to metrics.jsonl, so that a crash loses none.

    Args:
        path: the file.
        resumed_at: the step that the run goes on from, or None.
        writes: False keeps the figures, and writes nothing: one process of a run writes.

    Attributes:
        records: every figure of the run, those from before a resumption included.
    """

    BOTH = ("loss", "mean_token_accuracy", *REWARDS)  # in training and in evaluation
    FIGURES = (*BOTH, *map("eval_{}".format, BOTH), "learning_rate", "grad_norm")

    def __init__(self, path: Path, resumed_at: int | None, writes: bool = True):
        self.path, self.writes = path, writes
        self.records: list[dict] = []
        if resumed_at is not None and path.exists():
            written = [json.loads(line) for line in path.read_text().splitlines() if line.strip().endswith("}")]
            self.records = [record for record in written if record["step"] <= resumed_at]
        if writes:
            with atomic_write(path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        last = next((record for record in reversed(self.records) if "tokens" in record), {})
        self.tokens_before, self.seconds_before = last.get("tokens", 0), last.get("train_seconds", 0.0)
        self.tokens, self.seconds = self.tokens_before, self.seconds_before
        self._step_began = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._step_began

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or not ({"loss", "eval_loss"} & logs.keys()):
            return
        record = {"step": state.global_step, "epoch": round(logs.get("epoch", 0.0), 4)}
        record |= {key: float(logs[key]) for key in self.FIGURES if key in logs}
        if "loss" in logs:
            self.tokens = self.tokens_before + int(logs.get("num_tokens", 0))
            record |= {"tokens": self.tokens, "train_seconds": round(self.seconds, 3)}
        self.records.append(record)
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of this session's steps, evaluations and saves left out."""
        seconds = self.seconds - self.seconds_before
        return (self.tokens - self.tokens_before) / seconds if seconds else 0.0


class ProgressBar(TrainerCallback):
    """A bar with loss, tokens a second and memory; lines of text where there is no terminal."""

    LINES = 20

    def __init__(self, metrics: MetricsLog, device: str, stream=None):
        self.metrics, self.device, self.stream = metrics, device, stream or sys.stderr
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.stream.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, file=self.stream, unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        memory = max(peak_memory(self.device).items(), key=lambda item: item[0] != "cpu")[1] / GIB
        if "eval_loss" in logs:
            text = f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}"
            if "eval_rewards/accuracies" in logs:
                text += f", reward accuracy {logs['eval_rewards/accuracies']:.0%}"
            self._line(text)
        elif "loss" in logs:
            figures = f"loss {float(logs['loss']):.4f}, {self.metrics.tokens_per_second:.0f} tok/s, {memory:.2f} GiB"
            if self.bar:
                self.bar.update(state.global_step - self.bar.n)
                self.bar.set_postfix_str(figures)
            elif state.global_step % max(1, state.max_steps // self.LINES) == 0 or state.global_step == 1:
                self._line(f"step {state.global_step}/{state.max_steps}: {figures}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.close()
            self.bar = None

    def _line(self, text: str) -> None:
        if self.bar:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)
