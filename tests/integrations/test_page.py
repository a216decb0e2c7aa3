"""docs/trainers.md: every block is run, and each row of the table that can be."""

import math
import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import keras
import lightning.pytorch
import mlflow
import numpy as np
import optax
import pytest
import smartclip
import torch
import transformers
from autoclip.torch import QuantileClip
from zclip import ZClip

import gradclip as gc
from gradclip.record import LogError
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
    assert gc.History.load("mlflow.db").step.tolist() == [10]
    assert list((tmp_path / "tensorboard").iterdir())
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    for log in (run, *run.glob("*.wandb")):
        with pytest.raises(LogError, match="a run of Weights & Biases"):
            gc.History.load(log)


def test_a_database_that_mlflow_has_written(tmp_path):
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_experiment(
        experiment_id=mlflow.create_experiment(
            "clip", artifact_location=tmp_path.as_uri()
        )
    )
    norms = [1.5, math.nan, math.inf, 2.5]
    for name, sign in (("first", -1), ("second", 1)):
        with mlflow.start_run(run_name=name):
            for step, norm in enumerate(norms):
                mlflow.log_metrics({"grad_norm": sign * norm, "loss": 0.5}, step=step)
    history = gc.History.load(tmp_path / "mlflow.db")
    assert np.array_equal(history.norm, norms, equal_nan=True)
    assert history.loss.tolist() == [0.5] * 4
    assert any("read the newest, second" in note for note in history.notes)


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


def by_timm(text):
    mode, value = re.fullmatch(r"--clip-mode (\w+) --clip-grad ([\d.]+)", text).groups()
    params = torch.nn.ParameterList(map(torch.tensor, WEIGHTS))
    for p, g in zip(params, GRADS, strict=True):
        p.grad = torch.tensor(g)
    if mode == "agc":
        # Importing timm as a whole needs torchvision.
        source = Path(find_spec("timm").origin).with_name("utils") / "agc.py"
        runpy.run_path(source)["adaptive_clip_grad"](params, float(value))
    else:
        getattr(torch.nn.utils, f"clip_grad_{mode}_")(params, float(value))
    return [p.grad.numpy() for p in params]


def by_smartclip(text):
    model = torch.nn.ParameterList(map(torch.tensor, WEIGHTS))
    for p, g in zip(model, GRADS, strict=True):
        p.grad = torch.tensor(g)
    smartclip.apply(model, eval(text, vars(smartclip)))
    return [p.grad.numpy() for p in model]


NAMED = r"(?:clipping\"|clip-(?:grad|norm)|CLIP_VALUE|max_(?:grad_)?norm|clip_value)"


def by_stand_in(text):
    """Call torch's function, as these do, with the number that they are given."""
    value = re.search(NAMED + r"(?:: |=| )([\d.]+)", text)[1]
    how = "value" if "value" in text else "norm"
    return by_torch(f"torch.nn.utils.clip_grad_{how}_(params, {value})")


def by_detectron2(text):
    if '"value"' in text:
        return by_stand_in(text)
    value = re.search(r"CLIP_VALUE: ([\d.]+)", text)[1]
    each = f"[torch.nn.utils.clip_grad_norm_(p, {value}) for p in params]"
    return by_torch(each)


THERE = {
    "torch": by_torch,
    "optax": by_optax,
    "Keras": by_keras,
    "Keras, per variable": by_keras,
    "Hugging Face": by_hugging_face,
    "Lightning": by_lightning,
    "DeepSpeed": by_stand_in,
    "Megatron": by_stand_in,
    "fairseq": by_stand_in,
    "mmengine": by_stand_in,
    "Stable-Baselines3": by_stand_in,
    "detectron2": by_detectron2,
    "detectron2, per parameter": by_detectron2,
    "timm": by_timm,
    "timm, but for the head, which it leaves out": by_timm,
}
# Those that remember are run over many steps.
NORMS = np.random.default_rng(0).lognormal(-1.0, 0.5, 400)
NORMS[50::40] *= 6


def norms_after(step, model):
    """Return the norms that a clip which is called at each step lets through."""
    (p,) = model
    for norm in NORMS:
        p.grad = torch.full_like(p, norm / 2)
        step()
        yield float(p.grad.norm())


def remembering(source, text):
    """Return the norms after each step, by a program that remembers."""
    model = torch.nn.ParameterList([torch.ones(4, dtype=torch.float64)])
    if source == "autoclip (2020)":
        q = float(re.search(r"percentile=(\d+)", text)[1])
        seen = [NORMS[: i + 1] for i in range(len(NORMS))]
        return np.minimum(NORMS, [np.percentile(x, q) for x in seen])
    if source == "autoclip (package)":
        clipper = eval(text, {"QuantileClip": QuantileClip, "params": model})
        return np.array(list(norms_after(clipper.step, model)))
    if source == "smartclip":
        clipper = eval(text, vars(smartclip))
        after = norms_after(lambda: smartclip.apply(model, clipper), model)
        return np.array(list(after))
    clipper = eval(text, {"ZClip": ZClip})
    return np.array(list(norms_after(lambda: clipper.step(model), model)))


SAME_FROM = {"ZClip(": 0, "AutoClip(percentile": 0, "AutoClip(mode": 100}
# From this step on their limits are between so many and so many times as high.
CLOSE_FROM = {"QuantileClip(": (100, 0.98, 1.0), "ZScoreClip(": (150, 1.0, 1.5)}


def start_of(text, starts):
    return next((x for call, x in starts.items() if text.startswith(call)), None)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[1]}")
def test_both_sides_of_a_row(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, there, here = row
    rule = rule_from(here)
    clipped, info = gc.Clipper(rule).clip(GRADS, params=WEIGHTS)
    assert bool(info.finite)
    if not is_remembered(row) and source != "bitsandbytes, removed there":
        run = by_smartclip if source == "smartclip" else THERE[source]
        for a, b in zip(clipped, run(there), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def is_remembered(row):
    return any(start_of(row[1], x) is not None for x in (SAME_FROM, CLOSE_FROM))


@pytest.mark.parametrize(
    "row", filter(is_remembered, ROWS), ids=lambda row: f"{row[0]}: {row[1]}"
)
def test_both_sides_of_a_row_that_remembers(row):
    source, there, here = row
    theirs, clipper = remembering(source, there), gc.Clipper(rule_from(here))
    infos = [clipper.clip([np.full(4, norm / 2)])[1] for norm in NORMS]
    ours = np.array([float(np.max(info.norm_after)) for info in infos])
    start = start_of(there, SAME_FROM)
    if start is not None:
        np.testing.assert_allclose(ours[start:], theirs[start:], rtol=1e-4)
        assert 0 < (theirs[start:] < NORMS[start:] * 0.999).sum() < len(NORMS)
    else:
        start, least, most = start_of(there, CLOSE_FROM)
        spikes = [i for i in range(50, len(NORMS), 40) if i >= start]
        ratio = theirs[spikes] / ours[spikes]
        assert least <= ratio.min() < ratio.max() <= most


def test_all_rows_are_found():
    assert len(ROWS) == 30
    assert sum(map(is_remembered, ROWS)) == 5
