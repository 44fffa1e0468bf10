"""QLoRA on several GPUs: replicated (DDP) and sharded (FSDP2) training steps, beside PEFT on bitsandbytes with FSDP.

    python benchmarks/bench_distributed.py                       # every number of GPUs that is here
    python benchmarks/bench_distributed.py --device cpu --quick  # two processes over gloo, a tiny model

Rank-16 adapters on every linear layer, weights drawn as 4-bit bytes, every layer recomputed, the loss without whole
logits. Each configuration is a run of its own under torchrun. "efficiency" is tokens/s of a GPU over those of the
single GPU's run. "gathered" is what each process receives of all-gathers in a step, embeddings, head and adapters
included, and "of 16 bits" its share of what FSDP would gather of the linear layers in 16 bits, twice a step as here.
The peak includes building, when each process has the whole 4-bit model; "of steps" does not. Losses of the first
steps, for which all processes get the same sequences, must be those of one GPU.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import bench_scale
import harness
import peers
import torch
import torch.distributed as dist

from qlora_engine.models.sharding import shard
from qlora_engine.nn import NF4Linear
from qlora_engine.optim import PagedAdamW
from qlora_engine.training.activations import recompute_layers
from qlora_engine.training.loss import causal_lm_loss

CHECKED_STEPS = 3
WARM_STEPS = 2
LOSS_BOUND = 1e-3  # relative: sums over processes in another order, in bfloat16
GIB = 2**30
MARK = "bench_distributed row: "


def work_of(args) -> list[dict]:
    """Configurations: model, how it is spread, over how many processes, a process's batch, a cap of its memory."""
    if args.device == "cpu":
        sizes = [n for n in (1, 2, 4) if n <= args.most]
        tiny = {"model": "tiny", "rows": 2, "length": 64, "cap_gib": None}
        return [{**tiny, "kind": kind, "ranks": n} for n in sizes for kind in _kinds(n, ("replicated", "sharded"))]
    found = []
    for n in (1, 2, 4, 8):
        if n > min(args.most, torch.cuda.device_count()):
            continue
        common = {"model": "8B", "rows": 4, "length": 2048, "cap_gib": None, "ranks": n}
        rivals = ("peft",) if peers.bitsandbytes_functional() and harness.version_of("peft") != peers.MISSING else ()
        found += [{**common, "kind": kind} for kind in _kinds(n, ("replicated", "sharded", *rivals))]
        if not args.quick:
            large = {"model": "70B", "rows": 1, "length": 2048, "cap_gib": 48.0, "ranks": n}
            found += [{**large, "kind": kind} for kind in _kinds(n, ("sharded",))]
    return found


def _kinds(ranks: int, several: tuple[str, ...]) -> tuple[str, ...]:
    return ("alone",) if ranks == 1 else several


def measure(work: dict, args) -> dict:
    """One configuration under torchrun; its row, or why there is none."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={work['ranks']}", "--standalone"]
    command = [*launcher, str(Path(__file__).resolve()), "--device", args.device, "--worker", json.dumps(work)]
    command += ["--steps", str(args.steps)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout, env=environment)
    except subprocess.TimeoutExpired:
        return work | {"failure": f"no result in {args.timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line]
        return work | {"failure": (errors or [f"exit code {done.returncode}"])[0][:200]}
    return work | json.loads(lines[-1].removeprefix(MARK))


def worker(work: dict, args) -> None:
    """What every process of a configuration does; the first prints the row."""
    on_gpu = args.device == "cuda"
    local = int(os.environ["LOCAL_RANK"])
    device = f"cuda:{local}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(local)
        bench_scale.limit(work["cap_gib"])
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=torch.device(device) if on_gpu else None)
    torch.manual_seed(0)
    call, params, sizes = (peft_model if work["kind"] == "peft" else our_model)(work, device)
    optimizer = PagedAdamW(params, lr=1e-3) if work["kind"] != "peft" else torch.optim.AdamW(params, lr=1e-3)
    built = torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def step(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        shape = (work["rows"], work["length"])
        loss = call(torch.randint(bench_scale.MODELS[work["model"]].vocabulary, shape, device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    with Gathered() as gathered:
        losses = [float(step(seed)) for seed in range(CHECKED_STEPS)]
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    for seed in range(WARM_STEPS):
        step(1000 * dist.get_rank() + seed)
    synchronize()
    dist.barrier()
    began = time.perf_counter()
    for seed in range(args.steps):
        step(2000 + 1000 * dist.get_rank() + seed)
    synchronize()
    dist.barrier()
    seconds = (time.perf_counter() - began) / args.steps
    peaks = torch.tensor([built, torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0], device=device)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    tokens = work["ranks"] * work["rows"] * work["length"]
    row = {
        "losses": losses,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "peak_gib": float(peaks.max()) if on_gpu else None,
        "steps_gib": float(peaks[1]) if on_gpu else None,
        "gathered_gb": gathered.nbytes / CHECKED_STEPS / 1e9,
        **sizes,
    }
    if dist.get_rank() == 0:
        print(MARK + json.dumps(row), flush=True)
    dist.destroy_process_group()


def our_model(work: dict, device: str):
    """(what computes the loss of token ids, parameters to train, sizes): this engine's model, spread as asked."""
    model = bench_scale.build(bench_scale.MODELS[work["model"]], torch.device(device).type, 1 << 14)
    recompute_layers(model, "full")
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    sizes = {
        "linear_parameters": sum(layer.in_features * layer.out_features for layer in layers),
        "four_bit_bytes": sum(layer.nf4_weight.nbytes for layer in layers),
    }
    # inside the model's own call, which is where DDP and FSDP2 do their part
    model.forward = lambda input_ids: causal_lm_loss(model, input_ids, input_ids).loss
    called = model
    if work["kind"] == "sharded":
        shard(model)
    elif work["kind"] == "replicated":
        ids = [torch.device(device)] if device != "cpu" else None
        called = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
    return called, [p for p in model.parameters() if p.requires_grad], sizes


def peft_model(work: dict, device: str):
    """PEFT's LoRA on bitsandbytes as its guide to FSDP sets it up: FSDP1, 4-bit storage and adapters in bfloat16."""
    import bitsandbytes
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import LlamaForCausalLM

    shapes = bench_scale.MODELS[work["model"]]
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(bench_scale.configuration(shapes, 1 << 14))
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                quant_storage=torch.bfloat16,
                device="meta",
            )
            drawn = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(std=bench_scale.STD)
            layer.weight = bitsandbytes.nn.Params4bit(
                drawn,
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=True,
                quant_storage=torch.bfloat16,
                module=layer,
            ).to(device)
            model.set_submodule(path, layer)
    bench_scale.fill_rest(model, device)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=bench_scale.RANK, lora_alpha=bench_scale.RANK, target_modules=names)
    model = get_peft_model(model.to(device), settings).to(torch.bfloat16).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), device_id=torch.device(device), use_orig_params=False
    )
    return (
        lambda ids: wrapped(input_ids=ids, labels=ids).loss,
        [p for p in wrapped.parameters() if p.requires_grad],
        {},
    )


class Gathered:
    """Counts the bytes that this process receives of all-gathers."""

    NAMES = ("all_gather_into_tensor", "all_gather_single")  # the second is torch's name for it since 2.13

    def __enter__(self):
        self.nbytes = 0
        self.originals = {name: getattr(dist, name) for name in self.NAMES if hasattr(dist, name)}
        for name, original in self.originals.items():
            setattr(dist, name, self._counting(original))
        return self

    def _counting(self, original):
        def counted(*arguments, **options):
            sizes = [t.nbytes for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor)]
            self.nbytes += max(sizes) - min(sizes)  # the whole, and what this process had of it
            return original(*arguments, **options)

        return counted

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def compare(rows: list[dict]) -> bool:
    """Adds efficiency, and whether losses are those of one process; False where they are not."""
    good = True
    alone = {row["model"]: row for row in rows if row["kind"] == "alone" and "failure" not in row}
    for row in rows:
        base = alone.get(row["model"])
        if "failure" in row or base is None:
            continue
        row["efficiency"] = row["tokens_per_s"] / row["ranks"] / base["tokens_per_s"]
        if row["kind"] == "sharded":
            received = (row["ranks"] - 1) / row["ranks"]
            row["of_16_bits"] = row["gathered_gb"] * 1e9 / (2 * 2 * row["linear_parameters"] * received)
        if row["kind"] != "peft":
            pairs = zip(row["losses"], base["losses"], strict=True)
            row["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
            good &= math.isfinite(row["loss_difference"]) and row["loss_difference"] <= LOSS_BOUND
    return good


def draw(rows: list[dict], title: str):
    """Tokens a second by number of GPUs, one line a model and kind; the dotted lines are the ideal."""

    def make(plt):
        fig, ax = plt.subplots(figsize=(7, 4.5))
        for model in dict.fromkeys(row["model"] for row in rows):
            alone = [row for row in rows if row["model"] == model and row["kind"] == "alone"]
            for kind in ("replicated", "sharded", "peft"):
                own = [row for row in rows if row["model"] == model and row["kind"] == kind and "failure" not in row]
                points = [(r["ranks"], r["tokens_per_s"]) for r in [*alone * (kind != "peft"), *own]]
                if own:
                    ax.plot(*zip(*points, strict=True), "o-", label=f"{model} {kind}")
            if alone:
                most = max(row["ranks"] for row in rows)
                ax.plot([1, most], [alone[0]["tokens_per_s"], most * alone[0]["tokens_per_s"]], "k:", lw=0.8)
        ax.set_xlabel("processes")
        ax.set_ylabel("tokens/s")
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
        return fig

    return make


def main() -> int:
    p = harness.parser(*__doc__.split("\n\n", 1))
    p.add_argument("--most", type=int, default=None, help="at most so many processes (default: 8; on a CPU: 2)")
    p.add_argument("--steps", type=int, default=5, help="timed steps")
    p.add_argument("--timeout", type=int, default=600, help="seconds that a configuration may take")
    p.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        worker(args.worker, args)
        return 0
    args.most = args.most or (8 if args.device == "cuda" else 2)
    rows = []
    for work in work_of(args):
        rows.append(measure(work, args))
        print(rows[-1], flush=True)
    good = compare(rows)
    columns = {"model": "shapes", "kind": "spread", "ranks": "processes", "tokens_per_s": "tok/s"}
    columns |= {
        "efficiency": "efficiency",
        "peak_gib": "peak GiB",
        "steps_gib": "of steps",
        "gathered_gb": "gathered GB",
    }
    columns |= {"of_16_bits": "of 16 bits", "loss_difference": "loss differs", "failure": "failure"}
    print(harness.table(rows, columns))
    name = args.out / f"bench_distributed_{harness.slug(args.device)}"
    harness.write_json(name.with_suffix(".json"), args.device, rows)
    harness.figure(name.with_suffix(".png"), draw(rows, "QLoRA r=16 training steps over several processes"))
    if args.check:
        print(f"--check: losses {'are those of one process' if good else 'DIFFER from those of one process'}")
    failed = [row for row in rows if "failure" in row and row["kind"] != "peft"]
    return bool(failed or (args.check and not good))


if __name__ == "__main__":
    sys.exit(main())
