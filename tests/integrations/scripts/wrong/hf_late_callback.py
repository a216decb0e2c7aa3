"""A callback clips when the step is over."""

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


class Late(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


args = TrainingArguments(
    "out",
    max_grad_norm=0,
    gradient_accumulation_steps=2,
    max_steps=20,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)
rows = [{"x": torch.randn(4), "labels": torch.randn(1)} for _ in range(64)]
Trainer(Net(), args, train_dataset=rows, callbacks=[Late()]).train()
