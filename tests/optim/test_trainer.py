"""PagedAdamW in transformers' Trainer: parameter groups, clipping, checkpoints, resuming."""

import pytest
import torch

from qlora_engine.optim import PagedAdamW

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Rows(torch.utils.data.Dataset):
    """Sixteen points of a line."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        x = torch.full((8,), index / 16.0)
        return {"x": x, "labels": 3 * x[:1] + 1}


class Line(torch.nn.Module):
    """A small network with its loss, as Trainer wants it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 700), torch.nn.Linear(700, 1)

    def forward(self, x, labels):
        predicted = self.second(self.first(x).tanh())
        return {"loss": (predicted - labels).square().mean(), "logits": predicted}


def train(folder, optimizer, options, max_steps, resume=None):
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        learning_rate=3e-3,
        weight_decay=0.1,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = transformers.Trainer(
        model=Line(), args=arguments, train_dataset=Rows(), optimizer_cls_and_kwargs=(optimizer, options)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("bits", [32, 8])
def test_trains_like_torch_and_resumes_bit_exactly(tmp_path, bits):
    options = {"lr": 3e-3, "bits": bits}
    whole = train(tmp_path / "whole", PagedAdamW, options, 8)
    inner = whole.optimizer.optimizer
    assert isinstance(inner, PagedAdamW)
    assert len(inner.param_groups) == 2, "decay, and none for biases"
    torchs = train(tmp_path / "torch", torch.optim.AdamW, {"lr": 3e-3}, 8)
    for mine, theirs in zip(whole.model.parameters(), torchs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4 if bits == 32 else 0.1, atol=1e-5 if bits == 32 else 1e-2)

    resumed = train(tmp_path / "whole", PagedAdamW, options, 8, resume=str(tmp_path / "whole" / "checkpoint-4"))
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
