"""The callback of gradclip in the Trainer of Hugging Face."""

import torch
from transformers import Trainer, TrainingArguments

import gradclip as gc
from gradclip.integrations.transformers import GradientClippingCallback


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


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
callback = GradientClippingCallback(gc.ZScore())
Trainer(Net(), args, train_dataset=rows, callbacks=[callback]).train()
