"""A whole training step at Llama-3-8B's layer shapes, beside PEFT on bitsandbytes: tokens a second, memory, parts.

    python benchmarks/bench_finetune.py --check
    python benchmarks/bench_finetune.py --layers 32 --quick

Random weights, vocabulary 128,256, r=16 on all linear layers, random tokens of full length; forward, backward and
AdamW with float32 state (paged on both sides), one step at a time with a wait for the GPU after each; medians. Peak
memory is what torch's allocator gave out, weights and optimizer included. Recomputed layers keep their input alone:
all but the last (selective) or none; "offload" lets it wait on the host; "graph" is one CUDA graph of forward and
backward. --check compares the first step's loss with PEFT's on the 16-bit weights that ours decode to, to 1e-3, and
the gradients of both with those in float32.
"""

import contextlib
import gc
import sys
import time

import harness
import llama_shapes
import step_profile
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qlora_engine.optim import PagedAdamW
from qlora_engine.training.activations import recompute_layers
from qlora_engine.training.cuda_graphs import CapturedStep, causal_attention
from qlora_engine.training.liger import use_liger, why_no_liger
from qlora_engine.training.loss import causal_lm_loss

# rows, tokens a row, and how: a policy of recomputation, "graph" for a CUDA graph, "offload" for inputs on the host,
# "cudnn" for cuDNN's attention before FlashAttention
CASES = [
    (1, 512, ("selective, graph", "none, graph", "none")),
    (2, 2048, ("selective", "selective, graph", "selective, offload", "none, graph")),
    (4, 2048, ("selective", "selective, cudnn", "selective, graph", "selective, offload")),
]
LOSS_BOUND = 1e-3  # relative
GRADIENT_BOUND = 1.2  # error of our gradients over PEFT's, both in bfloat16 against float32
LEARNING_RATE = 1e-4
GIB = 2**30


def batch(rows: int, length: int) -> torch.Tensor:
    numbers = torch.Generator("cuda").manual_seed(rows * length)
    return torch.randint(llama_shapes.VOCABULARY, (rows, length), device="cuda", generator=numbers)


def loss_of(model: nn.Module):
    def loss(input_ids):
        with causal_attention(model):
            return causal_lm_loss(model, input_ids, input_ids).loss

    return loss


def timed(step, repeats: int) -> float:
    """Median seconds of a step that ends when the GPU is done."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def measured(name: str, rows: int, length: int, make_step, repeats: int) -> dict:
    """A row of the table. `make_step()` returns the step; None where memory does not reach."""
    release()
    torch.cuda.reset_peak_memory_stats()
    row = {"case": f"{rows}x{length}", "what": name}
    try:
        step = make_step()
        for _ in range(3):
            step()
        seconds = timed(step, repeats)
    except torch.OutOfMemoryError:
        return row | {"note": "out of memory"}
    peak = torch.cuda.max_memory_allocated() / GIB
    return row | {"ms": seconds * 1e3, "tokens_per_second": rows * length / seconds, "peak_gib": peak}


def our_step(model: nn.Module, optimizer, rows: int, length: int, way: str):
    """A step of this engine's model."""
    policy, *more = way.split(", ")
    recompute_layers(model, policy, offload="offload" in more)
    ids, loss = batch(rows, length), loss_of(model)
    captured = CapturedStep(loss, model) if "graph" in more else None

    prefer = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def step():
        with sdpa_kernel(prefer, set_priority=True) if "cudnn" in more else contextlib.nullcontext():
            if captured:
                captured(input_ids=ids)
            else:
                loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(model: nn.Module, optimizer, rows: int, length: int):
    """A step of the rival's, under autocast as its trainers run it."""
    ids = batch(rows, length)

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def first_step(model: nn.Module, loss: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(loss, all gradients of the adapters in one vector)"""
    flat = [matrix for pair in llama_shapes.adapters_of(model) for matrix in pair]
    grads = torch.autograd.grad(loss, flat)
    return float(loss), torch.cat([g.float().flatten() for g in grads])


def compared(model: nn.Module, layers: int) -> dict:
    """The first step's loss and gradients beside PEFT's on the decoded weights, in bfloat16 and in float32."""
    ids = batch(1, 512)
    loss, gradients = first_step(model, loss_of(model)(ids))
    release()
    reference = llama_shapes.peft_on_16_bits(model, layers, "cuda")
    peft_loss, peft_gradients = first_step(reference, reference(input_ids=ids, labels=ids, use_cache=False).loss)
    reference.float()
    wide_loss, wide = first_step(reference, reference(input_ids=ids, labels=ids, use_cache=False).loss)
    del reference
    release()
    errors = [float((g - wide).norm() / wide.norm()) for g in (gradients, peft_gradients)]
    losses = {"loss": loss, "peft_loss": peft_loss, "float32_loss": wide_loss}
    error = max(abs(loss - other) / other for other in (peft_loss, wide_loss))
    wrong = not (error <= LOSS_BOUND and errors[0] <= GRADIENT_BOUND * errors[1])
    return {**losses, "error": error, "gradient_errors": errors, "wrong": wrong}


def measure_ours(layers: int, repeats: int, cases, check: bool) -> tuple[list[dict], dict]:
    """Rows of the table, and what else there is to record."""
    release()
    model = llama_shapes.ours(layers, "cuda")
    more = {"weights_gib": torch.cuda.memory_allocated() / GIB}
    reason = why_no_liger(torch.device("cuda"))
    more["liger"] = reason or use_liger(model)._asdict()
    if check:
        more["check"] = compared(model, layers)
        print("first step beside PEFT on the decoded weights:", more["check"], flush=True)
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    rows = []
    for count, length, ways in cases:
        for way in ways:
            arguments = model, optimizer, count, length, way
            rows.append(measured(way, count, length, lambda a=arguments: our_step(*a), repeats))
            print(harness.table(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    count, length, ways = cases[-1]
    release()
    more["profile"] = step_profile.profiled(our_step(model, optimizer, count, length, ways[0]))
    more["profile_case"] = f"{count}x{length}, {ways[0]}"
    return rows, more


def measure_peft(layers: int, repeats: int, cases) -> list[dict]:
    import bitsandbytes

    release()
    model = llama_shapes.peft_on_bitsandbytes(layers, "cuda")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.PagedAdamW32bit(parameters, lr=LEARNING_RATE)
    rows = []
    for count, length, _ in cases:
        arguments = model, optimizer, count, length
        rows.append(measured("PEFT + bitsandbytes", count, length, lambda a=arguments: peft_step(*a), repeats))
        print(harness.table(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    return rows


COLUMNS = {"case": "batch", "what": "how", "ms": "ms", "tokens_per_second": "tok/s", "peak_gib": "peak GiB"}
COLUMNS |= {"note": "note"}


def main() -> int:
    p = harness.parser(*__doc__.split("\n\n", 1))
    p.add_argument("--layers", type=int, default=8, help="decoder layers (default: %(default)s; Llama-3-8B has 32)")
    p.add_argument("--no-rivals", action="store_true", help="this engine alone")
    args = p.parse_args()
    if args.device != "cuda":
        raise SystemExit("bench_finetune.py measures a GPU; there is none here")
    harness.require_compiled(["linear_nf4", "linear_nf4_backward", "adamw_step"], args.device)
    print(harness.environment(args.device), flush=True)
    cases, repeats = CASES, 5 if args.quick else 11
    rows, more = measure_ours(args.layers, repeats, cases, args.check)
    reason = "--no-rivals" if args.no_rivals else llama_shapes.why_no_peft()
    if reason is None:
        rows += measure_peft(args.layers, repeats, cases)
    else:
        print(f"PEFT + bitsandbytes is left out: {reason}")
    rows.sort(key=lambda row: [f"{count}x{length}" for count, length, _ in cases].index(row["case"]))
    best = {row["case"]: row.get("ms") for row in rows if row["what"].startswith("PEFT")}
    for row in rows:
        if best.get(row["case"]) and row.get("ms"):
            row["speedup"] = best[row["case"]] / row["ms"]
    print(harness.table(rows, COLUMNS | {"speedup": "PEFT/this"}), flush=True)
    print(step_profile.table(more["profile"], more["profile_case"]), flush=True)
    path = args.out / f"bench_finetune_{args.layers}layers_{harness.slug(args.device)}"
    harness.write_json(path.with_suffix(".json"), args.device, rows, layers=args.layers, **more)
    title = f"{args.layers} layers of Llama-3-8B, {harness.environment(args.device)['device']}"
    for row in rows:
        row["label"] = f"{row['case']}\n{row['what']}"
    harness.bars(path.with_suffix(".png"), rows, "label", {"tokens_per_second": "tokens a second"}, "tok/s", title)
    step_profile.picture(
        path.with_name(path.name + "_profile.png"), more["profile"], f"{title}, {more['profile_case']}"
    )
    if args.check and more["check"]["wrong"]:
        print("--check: the first step differs from PEFT's")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
