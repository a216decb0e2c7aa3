"""docs/trainers.md: every block is run, and each row of the table that can be."""

import re
from pathlib import Path

import jax.numpy as jnp
import keras
import lightning.pytorch
import numpy as np
import optax
import pytest
import torch
import transformers

import gradclip as gc
from gradclip.ruletext import rule_from
from test_docs import SHOWN_ONLY, blocks, output_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "trainers.md"


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "page"}, ""
    for (kind, *_), text in blocks(PAGE):
        if kind == "python":
            printed = output_of(text, names)
        elif kind == "text":
            assert printed == text
        else:
            assert kind in SHOWN_ONLY
    assert len(gc.History.load("lightning.jsonl")) == 10
    assert len(gc.History.load("hf.jsonl")) == 15
    assert (tmp_path / "mlflow.db").exists()
    assert list((tmp_path / "tensorboard").iterdir())
    assert list((tmp_path / "wandb").glob("offline-run-*"))


ROW = re.compile(r"^\| ([^|`]+) \| `([^|]+)` \| `([^|]+)` \|$", re.M)
ROWS = ROW.findall(PAGE.read_text())
WEIGHTS = [np.full((3, 2), 0.5), np.ones(3)]
GRADS = [np.array([[3.0, -4.0], [0.1, 0.2], [0.0, 1.0]]), np.array([0.3, -0.6, 2.0])]


def by_torch(text, **_):
    params = [torch.nn.Parameter(torch.zeros(g.shape).double()) for g in GRADS]
    for p, g in zip(params, GRADS, strict=True):
        p.grad = torch.tensor(g)
    eval(text, {"torch": torch, "params": params})
    return [p.grad.numpy() for p in params]


def by_optax(text):
    given, weights = ([jnp.asarray(x) for x in part] for part in (GRADS, WEIGHTS))
    transform = eval(text, {"optax": optax})
    return transform.update(given, transform.init(weights), weights)[0]


def by_keras(text):
    variables = [keras.Variable(np.zeros_like(g), dtype="float64") for g in GRADS]
    optimizer = eval(text, {"SGD": keras.optimizers.SGD})
    optimizer.apply([keras.ops.convert_to_tensor(g) for g in GRADS], variables)
    return [-keras.ops.convert_to_numpy(v) for v in variables]


def by_hugging_face(text):
    def arguments(**options):
        return transformers.TrainingArguments("out", report_to=[], **options)

    args = eval(text, {"TrainingArguments": arguments})
    return by_torch(f"torch.nn.utils.clip_grad_norm_(params, {args.max_grad_norm})")


def by_lightning(text):
    trainer = eval(text, {"Trainer": lightning.pytorch.Trainer})
    how = trainer.gradient_clip_algorithm or "norm"
    name = f"torch.nn.utils.clip_grad_{getattr(how, 'value', how)}_"
    return by_torch(f"{name}(params, {trainer.gradient_clip_val})")


THERE = {
    "torch": by_torch,
    "optax": by_optax,
    "Keras": by_keras,
    "Keras, per variable": by_keras,
    "Hugging Face": by_hugging_face,
    "Lightning": by_lightning,
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[1]}")
def test_both_sides_of_a_row(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, there, here = row
    rule = rule_from(here)
    clipped, info = gc.Clipper(rule).clip(GRADS, params=WEIGHTS)
    assert bool(info.finite)
    if source in THERE:
        for a, b in zip(clipped, THERE[source](there), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_all_rows_are_found():
    assert len(ROWS) == 22
    assert sum(source in THERE for source, *_ in ROWS) == 12
