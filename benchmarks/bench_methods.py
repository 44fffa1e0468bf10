"""Every parameter-efficient method on one real model, one task and one budget: what it costs and what it learns.

    make demo STEPS=1                      # once: SmolLM2-135M-Instruct, into .demo/
    pip download --no-deps --no-binary :all: --dest .demo vadersentiment==3.3.2
    python benchmarks/bench_methods.py

The task is to say whether a film review is positive or negative (benchmarks/sentiment.py). Each method trains with
the same batches, steps, optimizer (32-bit PagedAdamW) and schedule (linear, behind a tenth of the steps of warm-up,
gradients clipped to norm 1), on the model in NF4; for comparison there are the model as it comes, and full
fine-tuning and LoRA on 16-bit weights. Learning rates are those that papers and PEFT's documentation give for a
method, never chosen by the held-out reviews. A seed decides the method's first values and the order of the data; the
held-out reviews are the same in all runs. Finished runs are kept: the same command goes on where it was stopped. With
--untimed runs may share the GPU; a step's time is then the mean of the other runs alone.
"""

import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import harness
import sentiment
import torch
from methods_plan import CONTENDERS, Contender
from methods_report import columns, draw, summarize

from qlora_engine import peft
from qlora_engine.models.checkpoint import load_quantized
from qlora_engine.models.config import QLoRAConfig
from qlora_engine.optim import PagedAdamW

MODEL = harness.ROOT / ".demo" / "SmolLM2-135M-Instruct"
WARM_UP = 0.1  # share of the steps
UNTIMED = 3  # first steps, in which kernels are compiled and memory is taken


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every method gets.

    Attributes:
        steps: optimizer steps.
        batch: reviews a step.
        held_out: reviews of the evaluation.
        eval_batch: reviews a forward pass of it.
        fisher_samples: reviews by which FishMask chooses.
    """

    steps: int = 120
    batch: int = 32
    held_out: int = 2000
    eval_batch: int = 250
    fisher_samples: int = 32


QUICK = Budget(steps=3, batch=4, held_out=16, eval_batch=16, fisher_samples=2)


class Bench:
    """Runs contenders, one after another, on a base that is read once."""

    def __init__(
        self,
        model: Path,
        task: sentiment.Task,
        rows: list[sentiment.Row],
        budget: Budget,
        device: str,
        timed: bool = True,
    ):
        self.folder, self.task, self.budget, self.device = model, task, budget, torch.device(device)
        self.timed = timed
        self.train, self.held_out = sentiment.split(rows, budget.held_out)
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._base: tuple[str, torch.nn.Module] | None = None

    def base(self, kind: str) -> torch.nn.Module:
        """The model in "nf4", "16-bit", or "float32"; one at a time, so that a peak of memory is of that one."""
        if self._base is None or self._base[0] != kind:
            self._base = None
            self._empty_cache()
            if kind == "nf4":
                model = load_quantized(self.folder, QLoRAConfig(r=0), device=self.device, dtype=self.dtype)
            else:
                from transformers import AutoModelForCausalLM

                dtype = self.dtype if kind == "16-bit" else torch.float32
                model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype).to(self.device)
                model.requires_grad_(False)
            self._base = kind, model
        return self._base[1]

    def run(self, contender: Contender, seed: int) -> dict:
        """Trains and measures once. The base is afterwards what it was, which is checked."""
        torch.manual_seed(seed)
        model = self.base(contender.base)
        kept = {name: tensor.clone().cpu() for name, tensor in model.state_dict().items()}
        self._empty_cache()
        method, row = None, {"method": contender.name, "seed": seed, "base": contender.base}
        if contender.config is not None:
            config = contender.config(self.budget.steps, seed)
            if isinstance(config, peft.FishMask):
                config = dataclasses.replace(config, loss=self.task.loss)
            method = peft.apply(model, config)
            if hasattr(method, "select"):
                with self._autocast():
                    method.select(self._fisher_batches())
            trained = method.trainable_parameters().values()
        elif contender.learning_rate:
            trained = list(model.requires_grad_(True).parameters())
        if contender.learning_rate:
            row |= self._train(model, method, list(trained), contender.learning_rate, seed)
        if method is not None:
            method.finish()
            row |= {"trainable": method.report().trainable, "file_bytes": _file_bytes(method)}
        elif contender.learning_rate:
            count = sum(p.numel() for p in model.parameters())
            row |= {"trainable": count, "file_bytes": count * torch.bfloat16.itemsize}
        with self._autocast():
            row["loss"], row["accuracy"] = self.task.evaluate(model.eval(), self.held_out, self.budget.eval_batch)
        if method is not None:
            method.remove()
            for name, param in model.named_parameters():
                param.data = param.data.to(kept[name].dtype)
            changed = [
                name for name, tensor in model.state_dict().items() if not torch.equal(tensor.cpu(), kept[name])
            ]
            if changed:
                raise RuntimeError(f"{contender.name} left the base changed: {', '.join(changed[:5])}")
        else:
            model.requires_grad_(False).load_state_dict(kept)
        return row

    def _train(self, model, method, trained, learning_rate: float, seed: int) -> dict:
        budget = self.budget
        for param in trained:  # parameters of the base itself: steps may be smaller than bfloat16 can tell apart
            param.data = param.data.float()
        groups = method.parameter_groups(learning_rate) if method else [{"params": trained, "lr": learning_rate}]
        optimizer = PagedAdamW(groups)
        peaks = [group["lr"] for group in optimizer.param_groups]
        batches = self.task.training_batches(self.train, budget.batch, seed)
        warm_up, seconds = max(1, round(WARM_UP * budget.steps)), []
        model.train()
        self._reset_peak()
        for step in range(1, budget.steps + 1):
            batch = next(batches)
            share = min(step / warm_up, (budget.steps + 1 - step) / (budget.steps + 1 - warm_up))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            began = self._now()
            with self._autocast():  # anew for each step: it keeps what it casts, parameters too, until it is left
                loss = self.task.loss(model, batch)
                penalty = method.penalty() if method else None
            (loss if penalty is None else loss + penalty).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if method:
                method.after_step(step)
            optimizer.zero_grad()
            seconds.append(self._now() - began)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()} after {budget.steps} steps")
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        optimizer.close()
        if not self.timed:
            return {"peak_bytes": peak}
        warm = seconds[UNTIMED:] or seconds
        return {"step_ms": 1e3 * statistics.median(warm), "peak_bytes": peak, "train_seconds": sum(seconds)}

    def _fisher_batches(self) -> list[dict[str, torch.Tensor]]:
        return [self.task.batch([row]) for row in self.train[: self.budget.fisher_samples]]

    def _autocast(self):
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=self.dtype)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _empty_cache(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


def _file_bytes(method: peft.Method) -> int:
    with tempfile.TemporaryDirectory() as folder:
        method.save(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def kept_runs(path: Path, setting: dict) -> list[dict]:
    """Runs in a file of an earlier call with the same setting.

    Raises:
        SystemExit: where the file is of another setting.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    different = [key for key, value in setting.items() if found.get("setting", {}).get(key) != value]
    if different:
        sys.exit(f"{path} holds runs with another {', '.join(different)}; pass --fresh to replace it, or --out")
    return found["runs"]


def main():
    p = harness.parser(__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1])
    p.add_argument("--model", type=Path, default=MODEL, help="folder of a causal language model")
    p.add_argument("--sentiment", type=Path, default=sentiment.DEFAULT_PATH, help="vadersentiment's source package")
    p.add_argument("--words", nargs=2, default=sentiment.WORDS, help="label words of the negative and the positive")
    p.add_argument("--methods", nargs="+", metavar="NAME", help=f"of {', '.join(c.name for c in CONTENDERS)}")
    p.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    for field in dataclasses.fields(Budget):
        p.add_argument("--" + field.name.replace("_", "-"), type=int, help=f"default: {field.default}")
    p.add_argument("--untimed", action="store_true", help="other work shares the GPU: record no step times")
    p.add_argument("--fresh", action="store_true", help="do not go on from an earlier call's file")
    args = p.parse_args()
    if not (args.model / "config.json").is_file():
        sys.exit(f"there is no model in {args.model}; `make demo STEPS=1` makes the default, --model names another")
    chosen = [c for c in CONTENDERS if not args.methods or c.name in args.methods]
    unknown = set(args.methods or ()) - {c.name for c in CONTENDERS}
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(c.name for c in CONTENDERS)}")
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Budget)}
    budget = dataclasses.replace(QUICK if args.quick else Budget(), **{k: v for k, v in given.items() if v})

    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    task = sentiment.Task(AutoTokenizer.from_pretrained(args.model), args.device, tuple(args.words))

    def new_bench() -> Bench:
        return Bench(args.model, task, sentiment.read(args.sentiment), budget, args.device, timed=not args.untimed)

    bench = new_bench()
    name = f"bench_methods_{harness.slug(args.device)}"
    setting = {"model": args.model.name, "words": list(args.words)} | dataclasses.asdict(budget)
    setting["device"] = harness.environment(args.device)["device"]
    path = args.out / f"{name}.json"
    runs = [] if args.fresh else kept_runs(path, setting)

    began, failed = time.perf_counter(), {}
    # all methods with a seed before the next: a call that is stopped leaves a comparison; 16-bit bases come last
    order = sorted(chosen, key=lambda c: c.base != "nf4")
    todo = [(c, seed) for seed in range(args.seeds) for c in order if c.learning_rate or seed == 0]
    done = {(run["method"], run["seed"]) for run in runs}
    args.out.mkdir(parents=True, exist_ok=True)
    for number, (contender, seed) in enumerate(todo, 1):
        if (contender.name, seed) in done or contender.name in failed:
            continue
        try:
            run = bench.run(contender, seed)
        except (peft.MethodError, RuntimeError, ValueError) as error:  # the others are still worth their time
            failed[contender.name] = f"{type(error).__name__}: {error}"
            print(f"{contender.name}, seed {seed}: failed: {failed[contender.name]}", file=sys.stderr, flush=True)
            bench = new_bench()
            continue
        runs.append(run)
        harness.write_json(path, args.device, summarize(runs), setting=setting, runs=runs, say=False)
        step = f", {run['step_ms']:.1f} ms a step" if "step_ms" in run else ""
        print(
            f"[{number}/{len(todo)}, {time.perf_counter() - began:.0f} s] {contender.name}, seed {seed}: loss "
            f"{run['loss']:.4f}, accuracy {run['accuracy']:.2%}{step}",
            flush=True,
        )
    rows = summarize(runs)
    print(harness.table(rows, columns(args.device)))
    draw(args.out / f"{name}.png", rows, runs, f"{args.model.name}, film reviews, {budget.steps} x {budget.batch}")
    print(f"results in {path}")
    if failed:
        sys.exit(f"failed: {failed}")


if __name__ == "__main__":
    main()
