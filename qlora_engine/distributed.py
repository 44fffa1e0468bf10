"""Training on several GPUs: sharded models, their checkpoints, and what happens when a process dies.

    torchrun --nproc-per-node 8 train.py

    from torch import distributed
    import qlora_engine as qe

    distributed.init_process_group()
    model = qe.load_quantized(folder, qe.QLoRAConfig(r=16), device=f"cuda:{local_rank}", dtype=torch.bfloat16)
    qe.distributed.shard(model)
    optimizer = qe.optim.PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    with qe.distributed.watch_peers():
        ...

docs/scale.md has the whole. `qlora finetune` does all of this by itself under torchrun and accelerate launch.
"""

from qlora_engine.models.distributed_checkpoint import load_checkpoint, save_checkpoint
from qlora_engine.models.sharding import find_blocks, is_sharded_model, shard
from qlora_engine.models.watch import PeerLost, watch_peers

__all__ = [
    "PeerLost",
    "find_blocks",
    "is_sharded_model",
    "load_checkpoint",
    "save_checkpoint",
    "shard",
    "watch_peers",
]
