"""`qlora search`: trials of method, rank, scaling and learning rate on one base, compared by their held-out loss."""

import contextlib
import dataclasses
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_engine.models.files import atomic_write
from qlora_engine.training import data, memory
from qlora_engine.training.checkpoints import ADAPTER, OPTIONS_FILE
from qlora_engine.training.device import choose_device, choose_dtype, see_one_gpu
from qlora_engine.training.errors import OptionError, UsageError, as_usage_error, one_sentence
from qlora_engine.training.finetune import load_data
from qlora_engine.training.options import FinetuneOptions
from qlora_engine.training.search_space import DEFAULT_SPACE, grid, options_at, parse_space, suggest
from qlora_engine.training.source import resolve_model

STRATEGIES = ("bayes", "random", "grid")
JOURNAL, SETTINGS = "search.journal", "search.yaml"
BEST, TRIALS, PICTURE = "best.yaml", "trials.json", "search.png"
STUDY = "search"
# before a trial is stopped early: trials to compare it with, as optuna's own default is 5
STARTUP_TRIALS = 4


@dataclass(frozen=True)
class SearchOptions:
    """How a search goes.

    Attributes:
        space: texts such as `r=4,8,16` and `learning_rate=1e-4..1e-2`; empty: `DEFAULT_SPACE`.
        strategy: "bayes" (tree-structured Parzen estimator), "random", or "grid" (every point of the space).
        trials: how many in all, those of an earlier call included; a grid has as many as it has points.
        prune: stops a trial whose held-out loss is above the median of the others' at the same step.
    """

    space: tuple[str, ...] = ()
    strategy: str = "bayes"
    trials: int = 20
    prune: bool = True

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise OptionError(f"--strategy is {self.strategy!r}; expected one of {', '.join(STRATEGIES)}")
        if self.trials < 1:
            raise OptionError(f"--trials is {self.trials}; expected at least 1")


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        output: the folder, with `best.yaml` for `qlora finetune --config`, `trials.json` and `search.png`.
        best: the trial with the lowest held-out loss; None where none was completed.
        trials: every trial, in order.
    """

    output: Path
    best: dict | None
    trials: list[dict]


def search(options: FinetuneOptions, how: SearchOptions) -> SearchResult:
    """Tries points of a space and writes what came of them into `options.output`.

    The base is read and quantized once; each trial puts its method on it, trains with the same data, order and seed,
    and takes it off again. Trials are kept in `search.journal`: with `options.resume` the search goes on from there,
    and a trial that was cut short is made again. Since the best point is chosen by the held-out data, its loss there
    is lower than on other data; to report a figure, evaluate on rows that the search has not seen.

    Raises:
        UsageError: for what the user can put right: the space, data, model, options.
    """
    from qlora_engine.training.search_report import write_report

    options.check()
    space = parse_space(how.space or DEFAULT_SPACE, options)
    points = grid(space, options.method) if how.strategy == "grid" else None
    train_rows, held_out = load_data(options)
    if held_out is None:
        raise OptionError("a search needs held-out data; pass --eval-data, or an --eval-fraction above 0")
    study = _open_study(options, how)
    runner = _Runner(options, train_rows, held_out)
    _requeue(study, points)
    wanted = len(points) if points is not None else how.trials
    while (done := _finished(study)) < wanted:
        trial = study.ask()
        point = suggest(trial, space, options.method)
        _say(f"trial {done + 1}/{wanted}: {', '.join(f'{name}={_short(value)}' for name, value in point.items())}")
        _try(study, trial, runner, options_at(options, point))
        write_report(Path(options.output), study, options, picture=False)
    return write_report(Path(options.output), study, options)


def settings_before(options: FinetuneOptions) -> dict:
    """`space`, `strategy` and `prune` of the search in the output folder.

    Raises:
        OptionError: where there is none.
    """
    import yaml

    output = Path(options.output)
    if not all((output / name).is_file() for name in (JOURNAL, SETTINGS, OPTIONS_FILE)):
        raise OptionError(f"--resume: there is no search in {output}; run without --resume to begin")
    found = yaml.safe_load((output / SETTINGS).read_text(encoding="utf-8"))
    return found | {"space": tuple(found["space"])}


def _open_study(options: FinetuneOptions, how: SearchOptions):
    """The study in the output folder, new or old.

    Raises:
        OptionError: where one is there unasked, is not there, or was made with other settings.
    """
    import optuna
    import yaml
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise OptionError(f"--output {output} is a file; expected a folder, new or old")
    journal = output / JOURNAL
    own = {"space": list(how.space or DEFAULT_SPACE), "strategy": how.strategy, "prune": how.prune}
    if options.resume:
        before = settings_before(options)
        changed = [name for name, value in (own | {"space": tuple(own["space"])}).items() if before[name] != value]
        begun = yaml.safe_load((output / OPTIONS_FILE).read_text(encoding="utf-8"))
        now = yaml.safe_load(options.to_yaml())
        changed += [name for name, value in now.items() if name != "output" and begun.get(name) != value]
        if changed:
            raise OptionError(f"--resume: the search in {output} was begun with another {', '.join(changed)}")
    else:
        if (journal.exists() or (output / ADAPTER).exists()) and not options.overwrite:
            raise OptionError(
                f"{output} already holds a search or a run; pass --resume, --overwrite, or another --output"
            )
        with as_usage_error(OptionError):
            output.mkdir(parents=True, exist_ok=True)
        for name in (JOURNAL, f"{JOURNAL}.lock", BEST, TRIALS, PICTURE):
            (output / name).unlink(missing_ok=True)
        texts = {SETTINGS: yaml.safe_dump(own, sort_keys=False), OPTIONS_FILE: options.to_yaml()}
        for name, text in texts.items():
            with atomic_write(output / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal))))
    return optuna.create_study(
        study_name=STUDY,
        storage=storage,
        sampler=_sampler(how.strategy, options.seed, storage),
        pruner=_pruner(how.prune),
        load_if_exists=True,
    )


def _sampler(strategy: str, seed: int, storage):
    """Draws anew after every trial that is there already: a resumed search must not repeat its first points."""
    import optuna

    studies = storage.get_all_studies()
    seed += storage.get_n_trials(studies[0]._study_id) if studies else 0
    if strategy == "bayes":
        return optuna.samplers.TPESampler(seed=seed, multivariate=False)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(prune: bool):
    import optuna

    if not prune:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=1)


def _finished(study) -> int:
    from optuna.trial import TrialState

    return sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) or _has_failed(t) for t in study.trials)


def _has_failed(trial) -> bool:
    """Whether a trial has an error of its own; one that was cut short has none, and is made again."""
    return "error" in trial.user_attrs


def _requeue(study, points: list[dict] | None) -> None:
    """Puts into the queue what was cut short, and the points of a grid that have had no trial."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)
    known = [t.params for t in study.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED) or _has_failed(t)]
    known += [t.system_attrs.get("fixed_params") for t in study.get_trials(states=(TrialState.WAITING,))]
    for point in points or ():
        if point not in known:
            study.enqueue_trial(point)


def _try(study, trial, runner: "_Runner", options: FinetuneOptions) -> None:
    """One trial; what is wrong with its point alone ends the trial and not the search."""
    from optuna.trial import TrialState

    began = time.perf_counter()
    try:
        facts = runner(options, trial)
    except (UsageError, torch.OutOfMemoryError) as error:
        trial.set_user_attr("error", one_sentence(error)[:300])
        study.tell(trial, state=TrialState.FAIL)
        _say(f"  failed: {one_sentence(error)[:300]}")
        return
    for name, value in (facts | {"seconds": round(time.perf_counter() - began, 2)}).items():
        trial.set_user_attr(name, value)
    if not math.isfinite(facts["eval_loss"]):
        trial.set_user_attr("error", f"the held-out loss is {facts['eval_loss']}")
        study.tell(trial, state=TrialState.FAIL)
    elif facts["stopped"]:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, facts["eval_loss"])
    ending = f", stopped at step {facts['steps']}" if facts["stopped"] else ""
    _say(f"  held-out loss {facts['eval_loss']:.4f}{ending}")


class _Runner:
    """Trains at points of the space, on a base that is read once."""

    def __init__(self, options: FinetuneOptions, train_rows: data.Rows, held_out: data.Rows):
        from qlora_engine.training import recipe, sampling

        self.device = choose_device(see_one_gpu(options.device))
        self.dtype = choose_dtype(options.dtype, self.device)
        folder = resolve_model(options.model)
        need = memory.estimate(
            folder,
            compute_bytes=self.dtype.itemsize,
            r=0,
            blocksize=options.blocksize,
            double_quant=options.double_quant,
            quantize_embeddings=options.quantize_embeddings,
            quantize_head=options.quantize_head,
        )
        memory.check_memory(need, str(self.device))
        self.model, self.tokenizer = recipe.load_base(options, folder, self.device, self.dtype)
        if options.chat or train_rows.format in data.CONVERSATIONS:
            sampling.check_chat_template(self.tokenizer)
        if options.chat:
            train_rows, held_out = data.as_chat(train_rows), data.as_chat(held_out)
        self.rows = train_rows, held_out

    def __call__(self, options: FinetuneOptions, trial) -> dict:
        """Held-out loss, steps, trained parameters, and whether the trial was stopped early.

        Raises:
            UsageError: where the model cannot carry the method, or a setting does not fit it.
        """
        from transformers import set_seed

        from qlora_engine import peft
        from qlora_engine.training import methods, recipe

        config = methods.method_config(options) or _lora_config(options)
        set_seed(options.seed)
        with as_usage_error():
            method = peft.apply(self.model, config)
        try:
            recipe.check_head(self.model)
            with tempfile.TemporaryDirectory() as folder:  # where the trainer would write; a trial leaves nothing
                here = dataclasses.replace(options, output=folder, save_every=0)
                loop = recipe.build_trainer(
                    here,
                    self.model,
                    self.tokenizer,
                    *self.rows,
                    device=self.device,
                    dtype=self.dtype,
                    keep=Path(options.output),
                )
                watch = _watch(trial)
                loop.add_callback(watch)
                methods.choose(loop)
                loop.train()
                if not watch.stopped:
                    method.finish()
                    watch.last = loop.evaluate()["eval_loss"]
            return {
                "eval_loss": watch.last,
                "steps": loop.state.global_step,
                "stopped": watch.stopped,
                "trainable": method.report().trainable,
            }
        finally:
            self.model.__dict__.pop("forward", None)  # TRL's fused head
            with contextlib.suppress(peft.MethodError):
                method.remove()
            self.model.zero_grad(set_to_none=True)


def _lora_config(options: FinetuneOptions):
    """LoRA, or LoRA+, with the options of `qlora finetune`, as a method that can be taken off again."""
    from qlora_engine import peft

    settings = {name: getattr(options, name) for name in ("r", "alpha", "dropout", "rslora")}
    settings |= {"target_modules": options.target_modules, "exclude_modules": options.exclude_modules}
    with as_usage_error():
        if options.lora_plus != 1:
            return peft.LoRAPlus(**settings, ratio=options.lora_plus)
        return peft.LoRA(**settings)


def _watch(trial):
    """A callback that tells optuna each held-out loss, and ends the training where it says so."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        last, stopped, reports = math.nan, False, 0

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.last = metrics["eval_loss"]
            if state.global_step < state.max_steps and math.isfinite(self.last):
                self.reports += 1
                trial.report(self.last, self.reports)
                if trial.should_prune():
                    self.stopped = control.should_training_stop = True
            return control

    return Watch()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _short(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
