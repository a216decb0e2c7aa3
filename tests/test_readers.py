"""Logs as they are in the wild: every quirk is handled, or named in a message."""

import gzip
import json
import math
import os
import re
import shutil
import sqlite3
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

import gradclip as gc
from gradclip.readers.assemble import assemble
from gradclip.readers.columns import Columns
from gradclip.readers.runs import split_runs
from gradclip.record import LogError

FIXTURES = Path(__file__).parent / "fixtures"
FEW = ("1,148", "0,594", "1,002")
MEGATRON = (
    " iteration {step:8d}/     500 | consumed samples: {step:12d} | elapsed time per "
    "iteration (ms): 6779.2 | learning rate: 4.687E-08 | global batch size:    32 | lm "
    "loss: 3.010825E+00 | loss scale: 1.0 | grad norm: {norm:.3f} | number of skipped "
    "iterations:   0 | number of nan iterations:   0 |"
)
TITAN = (
    "\x1b[31mstep: {step:2d}  \x1b[38;2;180;60;0mloss: -1.00000  \x1b[33mgrad_norm: "
    "{norm:7.4f}  \x1b[36mmemory: 35.61GiB(37.49%)  tps: 7,718  mfu: 12.5%\x1b[39m"
)
FAIRSEQ = (
    "[2024-01-02 03:04:05,678][train_inner][INFO] - "
    '{{"epoch": 1, "update": 0.5, "loss": "8.1", "gnorm": "{norm}", '
    '"num_updates": "{step}", "lr": "1e-05"}}'
)
VERL = (
    "(TaskRunner pid=1) step:{step} - critic/grad_norm:377.5 - "
    "actor/grad_norm:{norm} - actor/lr:1e-06 - perf/throughput:1,234.5"
)
SWIN = (
    "[2021 swin] (main.py 212): INFO Train: [0/300][{step}/1251]\teta 1:02 lr 0.1\t"
    "time 0.5 (0.6)\tloss 6.9 (6.9)\tgrad_norm {norm} (inf)\tmem 100MB"
)
DEEPSPEED = (
    "[2024-01-02 03:04:05,678] [INFO] [logging.py:96:log_dist] [Rank 0] step={step}, "
    "skipped=0, lr=[1e-05], mom=[(0.9, 0.95)], grad_norm: {norm}"
)
MMDET = (
    "2022-01-01 00:00:00,123 - mmdet - INFO - Epoch [1][{step}/7330]\tlr: 1.9e-03, "
    "eta: 1 day, time: 0.3, loss_cls: 1.2, loss: 3.9, grad_norm: {norm}"
)
TQDM = (
    "Steps:  12%|██  | {step}/2000 [00:00<1:00:00,  1.44s/it, loss=2.5, "
    "grad_norm={norm}, lr=1e-5]"
)
OLMO = (
    "2024-05-01T10:00:00Z [INFO] [olmo.train, rank 0] [step={step}/739328,epoch=0]\n"
    "    optim/total_grad_norm={norm}\n    train/CrossEntropyLoss=2.5\n"
    "    throughput/total_tokens=4,194,304\n    time/left=1:00:00"
)
OLMO_CORE = (
    "INFO\t[step={step}/1000,epoch=1,eta=1:00:00]\n    optim/LR (group 0)=0.0004\n"
    "    optim/total grad norm={norm}\n    train/CE loss=2.5"
)
COMPOSER = (
    "[batch={step}/4800]:\n\t Train time/batch: 9\n"
    "\t Train l2_norm/moment/global: 0.1\n\t Train l2_norm/grad/global: {norm}\n"
    "\t Train loss/train/total: 2.5"
)
HF = "Hugging Face console"
NORMS = [2.5, 1.25, 4.0]


def load(path, text, **options):
    path.write_text(text, "utf-8")
    return gc.History.load(path, **options)


def printed(form, norms=NORMS, first=1, end="\n"):
    return end.join(form.format(step=i, norm=n) for i, n in enumerate(norms, first))


@pytest.mark.parametrize(
    ("form", "tool"),
    [
        (MEGATRON, "Megatron-LM console"),
        (TITAN, "torchtitan console"),
        (FAIRSEQ, "fairseq console"),
        (SWIN, "Swin console"),
        (DEEPSPEED, "steps console"),
        ("it {step}: loss 3.1, grad norm {norm}", "steps console"),
        (MMDET, "OpenMMLab console"),
        (
            "step {step:4d}/19 | train loss 10.9 | norm {norm} | lr 1e-6",
            "nanoGPT console",
        ),
        ("step  {step} | loss: 10.9 | norm: {norm:.4f} | dt: 9ms", "nanoGPT console"),
        ("{{'grad_norm': '{norm}', 'global_step/max_steps': '{step}/294'}}", HF),
        ("grad_norm={norm} loss=2.0 step={step}", "norms console"),
        (TQDM, "tqdm console"),
        (
            "Epoch 0:   3%|█ | {step}/30 [00:01, v_num=0, grad_norm={norm}]",
            "tqdm console",
        ),
        ("Steps: 12.5%|█ | {step}/8 [00:01, grad_norm={norm}]", "tqdm console"),
        (OLMO, "headed block console"),
        (OLMO_CORE, "headed block console"),
        (COMPOSER, "headed block console"),
        (
            "{{'grad_norm': {norm}, 'loss': nan, 'step': {step}}}",
            HF,
        ),
    ],
)
def test_what_trainers_print(tmp_path, form, tool):
    history = load(tmp_path / "out.log", f"starting\n{printed(form)}\ndone\n")
    assert history.norm.tolist() == NORMS
    assert history.step.tolist() == [1, 2, 3]
    assert history.recorded.format == tool


@pytest.mark.parametrize(
    ("form", "loss"),
    [
        (MEGATRON, 3.010825),
        (TITAN, -1.0),
        (SWIN, 6.9),
        (MMDET, 3.9),
        ("step {step} loss 2.5 grad_norm {norm}", 2.5),
        ("it {step}: train loss 3.1, val loss 2.0, grad norm {norm}", 3.1),
        ("loss=2.0 step={step} grad_norm={norm}", 2.0),
        (TQDM, 2.5),
        (OLMO, 2.5),
        (OLMO_CORE, 2.5),
        (COMPOSER, 2.5),
        ("global_step: {step} | grad_norm: {norm} | reduced_train_loss: 2.5 |", 2.5),
        ("2%|█ | {step}/9 [00:01, train_loss_step=2.5, grad_norm={norm}]", 2.5),
        ("step {step} - loss: 2.3 - val loss: 3.3 - grad_norm: {norm}", 2.3),
        ("step {step} val loss 2.5 grad_norm {norm}", math.nan),
        ("step {step} [eval] loss: 3.0 grad_norm: {norm}", math.nan),
        ("step {step} grad_norm={norm} validation: loss=3.0", math.nan),
        ("step {step} aux loss: 0.1 grad_norm {norm}", math.nan),
        ("step {step} loss scale: 65536 grad_norm {norm}", math.nan),
        ("step {step} d_loss: 0.1 grad_norm {norm}", math.nan),
    ],
)
def test_the_loss_of_a_step_is_read_and_no_other(tmp_path, form, loss):
    history = load(tmp_path / "out.log", printed(form))
    assert history.norm.tolist() == NORMS
    np.testing.assert_array_equal(history.recorded.loss, [loss] * 3)


MMENGINE = (
    "2023/01/01 00:00:00 - mmengine - INFO - {at}  lr: 1.0e-04  eta: 1:00:00  time: "
    "0.5  data_time: 0.01  memory: 5000  grad_norm: {norm}  loss: 5.0  loss_cls: 0.2"
)


@pytest.mark.parametrize(
    ("forms", "steps"),
    [
        (["Epoch(train) [1][ 1/20]", "Epoch(train) [1][20/20]"], [1, 20]),
        (["Epoch(train)  [2][10/20]", "Epoch(train)  [3][ 1/20]"], [30, 41]),
        (["Epoch [1][50/7330]", "Epoch [2][50/7330]"], [50, 7380]),
        (["Iter(train) [   50/80000]", "Iter(train) [  100/80000]"], [50, 100]),
        (["Iter [50/80000]", "Iter [100/80000]"], [50, 100]),
    ],
)
def test_openmmlab_counts_epochs_from_1(tmp_path, forms, steps):
    lines = [MMENGINE.format(at=at, norm=1 + i) for i, at in enumerate(forms)]
    history = load(tmp_path / "out.log", "\n".join(lines))
    assert history.norm.tolist() == [1, 2]
    assert history.step.tolist() == steps
    assert history.loss.tolist() == [5.0, 5.0]
    assert history.notes == ()


def test_swin_counts_epochs_from_0(tmp_path):
    first = SWIN.format(step=1250, norm=1.0)
    then = SWIN.replace("[0/300]", "[1/300]").format(step=0, norm=2.0)
    history = load(tmp_path / "out.log", f"{first}\n{then}\n")
    assert history.step.tolist() == [1250, 1251]


def test_the_batches_below_headings_are_counted_through_epochs(tmp_path):
    text = "".join(
        f"[epoch={epoch}][batch={batch}/4]:\n\t Train l2_norm/grad/global: {norm}\n"
        for norm, (epoch, batch) in enumerate(np.ndindex(2, 4), 1)
    )
    history = load(tmp_path / "out.log", text)
    assert history.norm.tolist() == list(range(1, 9))
    assert history.step.tolist() == list(range(8))


@pytest.mark.parametrize(
    "form",
    [
        "step {step} grad_norm_before={norm} grad_norm_after=1",
        "step {step} | grad_norm (pre-clip) {norm} | grad_norm (post-clip) 1",
        "step {step} grad_norm_after=1 grad_norm/before_clip={norm}",
        "step {step} grad norm before clipping: {norm}",
        "step {step} grad_norm_unclipped={norm} grad_norm_clipped=1",
        "step={step} loss=2.0 grads_norm={norm}",
        "step={step} avg_norm=3 grad/norm={norm}",
        "step={step} total_norm={norm}",
        "step={step} l2_norm/grad/global: {norm}",
    ],
)
def test_a_norm_has_many_names(tmp_path, form):
    history = load(tmp_path / "out.log", printed(form))
    assert history.norm.tolist() == NORMS
    assert history.step.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "name",
    [
        "grad_norm_clipped",
        "grad_norm_after",
        "grad_norm (post-clip)",
        "clipped_grad_norm",
        "grad norm after clipping",
    ],
)
def test_printed_norms_after_clipping_are_refused_with_the_reason(tmp_path, name):
    reason = re.escape(f"only norms after clipping ({name})")
    with pytest.raises(LogError, match=reason):
        load(tmp_path / "out.log", printed(f"step {{step}} {name}=1.0 loss=2"))


@pytest.mark.parametrize("every", [1, 2])
def test_two_networks_on_a_plain_line(tmp_path, every):
    lines = [
        f"step {i} d_grad_norm: {2 + i / 100} "
        + (f"g_grad_norm: {7 + i / 100}" if i % every == 0 else "")
        for i in range(40)
    ]
    text = "\n".join(lines)
    history = load(tmp_path / "out.log", text)
    assert history.recorded.column == "d_grad_norm"
    assert history.recorded.networks == ("g_grad_norm",)
    assert len(history) == 40
    other = load(tmp_path / "out.log", text, column="g_grad_norm")
    assert other.norm.tolist() == [7 + i / 100 for i in range(0, 40, every)]


@pytest.mark.parametrize(
    "parts",
    [
        "encoder_grad_norm 0.4 decoder_grad_norm 0.7",
        "model/layer0/grad_norm=0.2",
        "ema_grad_norm: 0.3",
    ],
)
def test_norms_of_parts_beside_that_of_all_are_no_networks(tmp_path, parts):
    form = "step {step} | loss 2.1 | grad_norm {norm} | "
    lines = printed(form, NORMS).splitlines()
    lines[-1] += parts
    history = load(tmp_path / "out.log", "\n".join(lines))
    assert history.recorded.column == "grad_norm"
    assert history.norm.tolist() == NORMS
    assert not history.recorded.networks


@pytest.mark.parametrize(
    ("form", "steps"),
    [
        ("[{step}/90] loss: 2.5 | grad: {norm:.4f}", True),
        ("step {step}, loss=2.5, grad = {norm:.4f}, lr 0.1", True),
        ("loss: 2.5 - 'grad': '{norm:.4f}' - 12 % - ngrad: 7", False),
    ],
)
def test_the_number_behind_a_word_is_taken_where_it_is_asked_for(tmp_path, form, steps):
    lines = (form.format(step=i + 5, norm=x) for i, x in enumerate(NORMS))
    path = tmp_path / "out.txt"
    path.write_text("\n".join(lines))
    with pytest.raises(LogError, match=r"column=… \(--column\) takes that word"):
        gc.History.load(path)
    found = gc.History.load(path, column="grad")
    np.testing.assert_allclose(found.norm, NORMS, atol=1e-4)
    np.testing.assert_array_equal(found.loss, 2.5)
    assert found.step[0] == (5 if steps else 0)


def test_torch_calls_it_total_norm(tmp_path):
    rows = "".join(f"{i},2.5,{x}\n" for i, x in enumerate(NORMS))
    path = tmp_path / "log.csv"
    path.write_text(f"step,param/total_norm,total_norm\n{rows}")
    np.testing.assert_allclose(gc.History.load(path).norm, NORMS)


def test_a_table_without_a_heading_is_told_from_one_without_a_norm(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("2.7631\n0.4394\n")
    with pytest.raises(LogError, match=r"heading, its first line is '2\.7631'\. Put"):
        gc.History.load(path, format="csv")


def test_an_export_of_runs_has_ranges_beside_its_columns(tmp_path):
    names = [f"{run} - train/grad_norm" for run in "abcd"]
    heads = ["Step", *(f"{x}{end}" for x in names for end in ("", "__MIN", "__MAX"))]
    rows = [[i, *(x for n in [*NORMS, 9.0] for x in (n, n / 2, 2 * n))] for i in (0, 1)]
    history = load(tmp_path / "wandb.csv", table([heads, *rows]))
    assert {history.recorded.column, *history.recorded.networks} == set(names)
    assert set(history.norm.tolist()) == {2.5}


def export(*runs):
    """Return the table that Weights & Biases exports for runs of these names."""
    heads = (f"{run} - grad_norm" for run in runs)
    names = ["Step", *(f"{x}{end}" for x in heads for end in ("", "__MIN", "__MAX"))]
    rows = [[i, *([1 + i] * 3 * len(runs))] for i in range(30)]
    return table([[json.dumps(name) for name in names], *rows])


@pytest.mark.parametrize(
    "runs",
    [
        ("lr=1e-3,wd=0.1",),
        ("['a', 'b']",),
        ("finetune-after-sft",),
        ("baseline", "total-clipped"),
        ("max-norm-1", "mean", "train"),
        ("train", "debug", "raw"),
        ("gnorm-of-a", "grad_norm_clipped"),
    ],
)
def test_the_name_of_a_run_says_nothing_of_its_column(tmp_path, runs):
    record = load(tmp_path / "wandb.csv", export(*runs)).recorded
    found = [record.column, *record.networks]
    assert found == [f"{run} - grad_norm" for run in runs]
    assert np.isnan(record.limit).all()


@pytest.mark.parametrize("run", ["a", "b"])
def test_the_loss_and_the_limit_of_an_export_are_those_of_the_run(tmp_path, run):
    kinds = ["grad_norm", "train/loss", "max_grad_norm"]
    heads = ["Step", *(f"{name} - {kind}" for name in "ab" for kind in kinds)]
    rows = [[i, 1 + i, 9 - i, 5, 2 + i, 7 - i, 3] for i in range(4)]
    path = tmp_path / "wandb.csv"
    path.write_text(table([heads, *rows]))
    record = gc.History.load(path, column=f"{run} - grad_norm").recorded
    first = {"a": 9, "b": 7}[run]
    assert record.loss.tolist() == [first - i for i in range(4)]
    assert set(record.limit.tolist()) == {{"a": 5, "b": 3}[run]}


@pytest.mark.parametrize(
    "name",
    [
        "train_loss_step",
        "Train/Samples/train_loss",
        "learning/loss",
        "reduced_train_loss",
        "loss/train/total",
    ],
)
def test_the_loss_has_many_names(tmp_path, name):
    rows = [[i, 2.5 + i, 9.0 - i] for i in range(3)]
    history = load(tmp_path / "log.csv", table([["step", "grad_norm", name], *rows]))
    assert history.loss.tolist() == [9.0, 8.0, 7.0]


def test_the_newest_step_may_stand_first(tmp_path):
    rows = [[i, float(10 + i)] for i in (30, 20, 10)]
    history = load(tmp_path / "log.csv", table([["step", "grad_norm"], *rows]))
    assert history.step.tolist() == [10, 20, 30]
    assert history.norm.tolist() == [20.0, 30.0, 40.0]
    assert "turned round" in history.recorded.notes[0]


def test_of_two_columns_under_one_heading_the_first_counts(tmp_path):
    rows = [[0, 1.5, 9.0], [1, 2.5, 9.0]]
    history = load(
        tmp_path / "log.csv", table([["step", "grad_norm", "grad_norm"], *rows])
    )
    assert history.norm.tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    ("cells", "norms"),
    [(["1,234", "0,512"], [1.234, 0.512]), (["1,234", "2,512"], [1234.0, 2512.0])],
)
def test_between_tabs_a_comma_is_what_all_cells_make_of_it(tmp_path, cells, norms):
    rows = [[i, cell] for i, cell in enumerate(cells)]
    text = table([["step", "grad_norm"], *rows], "\t")
    assert load(tmp_path / "log.tsv", text).norm.tolist() == norms


def test_a_heading_may_hold_what_parts_others(tmp_path):
    text = '\n\n"step";"grad_norm, L2, total";"loss"\n0;1,5;2,0\n1;2,5;2,0\n9;9\n'
    history = load(tmp_path / "log.csv", text)
    assert history.norm.tolist() == [1.5, 2.5]
    assert any("the first is line 6" in note for note in history.recorded.notes)


def test_a_comma_in_one_column_says_nothing_of_another(tmp_path):
    rows = [[f"{100 * i:,}", f"1.{i + 100}", "0,1"] for i in range(30)]
    text = table([["step", "grad_norm", "gpus"], *rows], "\t")
    history = load(tmp_path / "log.tsv", text)
    assert history.step.tolist() == [100 * i for i in range(30)]
    assert history.norm.tolist() == [float(f"1.{i + 100}") for i in range(30)]


@pytest.mark.parametrize(
    "document",
    [
        {"nbformat": 4, "cells": None},
        {
            "nbformat": 4,
            "cells": ["a", {"outputs": [None, {"data": [], "text": None}]}],
        },
    ],
)
def test_a_notebook_of_another_make_is_refused(tmp_path, document):
    with pytest.raises(LogError, match="no gradient norm in any line"):
        load(tmp_path / "odd.ipynb", json.dumps(document))


def table(rows, sign=","):
    return "\n".join(sign.join(map(str, row)) for row in rows)


@pytest.mark.parametrize(
    ("line", "limit"),
    [
        ("  clip_grad ....................................... 1.0", 1.0),
        ("Namespace(lr=0.1, max_grad_norm=0.5, seed=1)", 0.5),
        ("python train.py --clip-grad 2.0 --lr 1e-5", 2.0),
        ("cmd: ['--clip-grad', '1.5', '--optimizer', 'adam']", 1.5),
        ('  "gradient_clipping": 0.25,', 0.25),
        ("max_grad_norm: 0.0", math.inf),
    ],
)
def test_the_limit_in_force_is_read_and_is_no_norm(tmp_path, line, limit):
    history = load(tmp_path / "out.log", f"{line}\n{printed(MEGATRON)}\n")
    assert history.norm.tolist() == NORMS
    assert history.limit.tolist() == [limit] * 3
    np.testing.assert_allclose(history.scale, [min(1, limit / n) for n in NORMS])


def test_hugging_face_between_carriage_returns_of_a_progress_bar(tmp_path):
    bar = "\r".join(
        f"{i:3d}%|██        | {i}/100 [00:01<00:09, 9.9it/s]" for i in range(99)
    )
    row = "{{'loss': '2.029', 'grad_norm': '{norm}', 'epoch': '0.0{step}'}}"
    text = "\r".join(
        f"{bar}\r{row.format(norm=n, step=i)}" for i, n in enumerate(NORMS)
    )
    history = load(tmp_path / "out.log", text)
    assert history.norm.tolist() == NORMS
    assert history.step.tolist() == [0, 1, 2]
    assert any("epochs but no steps" in note for note in history.notes)


def bar(count, norm=None, end="4"):
    """Return what tqdm prints; its numbers come with the first `set_postfix`."""
    numbers = "" if norm is None else f", grad_norm={norm}, loss=1"
    at = f"{25 * count:3d}%|██  | {count}/{end}" if end else f"{count}it"
    return f"\rSteps: {at} [00:01<00:07,  8.33it/s{numbers}]"


@pytest.mark.parametrize(
    "shown",
    [
        # update(1), then set_postfix(), as diffusers has it.
        "1:- 1:5 2:5 2:3 3:3 3:7 4:7 4:2 4:2",
        # The same where it is not drawn before it has its numbers.
        "1:5 2:3 2:3 3:7 4:2 4:2",
        # for x in bar: bar.set_postfix()
        "0:- 0:5 1:5 1:3 2:3 2:7 3:7 3:2 4:2 4:2",
        # The same in a loop that is faster than its bar.
        "0:5 0:3 2:3 2:7 2:2 4:2 4:2",
        "0:5 1:5 1:3 1:7 1:2 4:2 4:2",
    ],
)
def test_a_bar_that_moves_on_has_the_numbers_of_the_step_before(tmp_path, shown):
    pairs = [pair.split(":") for pair in shown.split()]
    bars = [bar(int(count), None if n == "-" else n) for count, n in pairs]
    history = load(tmp_path / "out.log", "".join(bars))
    assert history.norm.tolist() == [5, 3, 7, 2]
    first = int(shown[0])
    assert history.step.tolist() == list(range(first, first + 4))
    assert history.notes == ()


def test_a_bar_without_an_end_has_a_count_too(tmp_path):
    pairs = [(1, 5), (2, 5), (2, 3), (3, 3), (3, 7)]
    text = "".join(bar(count, norm, end="") for count, norm in pairs)
    history = load(tmp_path / "out.log", text)
    assert history.norm.tolist() == [5, 3, 7]
    assert history.step.tolist() == [1, 2, 3]


def test_the_bars_of_epochs_are_counted_on(tmp_path):
    bars = [
        bar(count, norm).replace("Steps", f"Epoch {epoch}")
        for epoch in (1, 2)
        for norm, count in enumerate([0, 1, 2, 3], 4 * epoch)
    ]
    # Each has its last numbers once more when it ends.
    bars = [*bars[:4], bars[3].replace("3/4", "4/4"), *bars[4:]]
    bars.append(bars[-1].replace("3/4", "4/4"))
    history = load(tmp_path / "out.log", "".join(bars))
    assert history.norm.tolist() == list(range(4, 12))
    assert history.step.tolist() == list(range(8))


def test_what_else_is_printed_ends_no_step_of_a_bar(tmp_path):
    bars = [bar(1, 5), "\nsaved to a file\n", bar(2, 5), bar(2, "nan"), bar(3, "nan")]
    text = "".join([*bars, bar(3, "nan"), "\nstep 9 grad_norm 8.0\n"])
    history = load(tmp_path / "out.log", text.replace("grad_norm=", "gnorm="))
    np.testing.assert_array_equal(history.norm, [5, np.nan, np.nan, 8])
    assert history.step.tolist() == [1, 2, 3, 9]
    assert history.recorded.format == "tqdm console"


def test_the_averages_that_fairseq_ends_an_epoch_with_are_left_out(tmp_path):
    inner = "epoch 001: {step} / 9 loss=9.1, num_updates={step}, gnorm={norm}, clip=0"
    total = "2021 | INFO | train | epoch 001 | num_updates 3 | gnorm 99.0 | clip 0"
    history = load(tmp_path / "train.log", f"{printed(inner)}\n{total}\n")
    assert history.norm.tolist() == NORMS
    assert history.notes == ()
    rows = [{"gnorm": "2.5", "num_updates": "1"}, {"train_gnorm": "99.0"}]
    lines = "\n".join(f"[train][INFO] - {json.dumps(row)}" for row in rows)
    assert load(tmp_path / "hydra.log", lines).norm.tolist() == [2.5]


def test_global_step_of_max_steps_and_a_last_step_repeated_with_null(tmp_path):
    rows = [
        {"grad_norm": n, "global_step/max_steps": f"{i}/294"}
        for i, n in enumerate(NORMS, 1)
    ]
    rows.append({"grad_norm": None, "global_step/max_steps": "3/294"})
    history = load(tmp_path / "log.jsonl", "\n".join(map(json.dumps, rows)))
    assert history.step.tolist() == [1, 2, 3]
    assert history.norm.tolist() == NORMS
    assert any("1 row repeats" in note for note in history.notes)


def test_two_networks_on_a_line_are_read_one_by_one(tmp_path):
    path = tmp_path / "out.log"
    history = load(path, printed(VERL))
    assert {history.recorded.column, *history.recorded.networks} == {
        "critic/grad_norm",
        "actor/grad_norm",
    }
    actor = gc.History.load(path, column="actor/grad_norm")
    assert actor.norm.tolist() == NORMS


def test_boxed_tables_whose_steps_are_rounded(tmp_path):
    rows = ("-----", "| grad_norm | {norm:.3g} |", "| step      | {step:.3g} |", "")
    box = "\n".join(rows)
    norms = np.linspace(1, 2, 400)
    text = "".join(box.format(norm=n, step=10.0 * i) for i, n in enumerate(norms))
    history = load(tmp_path / "log.txt", text)
    assert history.step.tolist() == list(range(0, 4000, 10))
    np.testing.assert_allclose(history.norm, norms, rtol=5e-3)
    assert any("printed rounded" in note for note in history.notes)


def test_crlf_and_wide_spaces(tmp_path):
    path = tmp_path / "out.log"
    path.write_bytes("step:\u30001\u3000loss: 2.0\u3000grad_norm: 2.5\r\n".encode() * 1)
    assert gc.History.load(path).norm.tolist() == [2.5]


def test_not_a_number_is_kept_in_every_spelling(tmp_path):
    words = ["nan", "inf", "NaN", "Infinity", "-inf", "null"]
    lines = "\n".join(
        f'{{"step": {i}, "grad_norm": "{w}"}}' for i, w in enumerate(words)
    )
    bare = '\n{"step": 6, "grad_norm": NaN}\n{"step": 7, "grad_norm": Infinity}'
    history = load(tmp_path / "log.jsonl", f"{lines}{bare}\n{{'damaged'")
    expected = [math.nan, math.inf, math.nan, math.inf, -math.inf, math.nan]
    np.testing.assert_array_equal(history.norm, [*expected, math.nan, math.inf])
    assert any("1 damaged lines" in note for note in history.notes)


NOT_FINITE = {
    "inf Inf INF +Inf Infinity INFINITY 1.#INF 1.#INF00": math.inf,
    "-inf -Inf -INF -Infinity -1.#INF": -math.inf,
    "nan NaN NAN Nan -nan +NaN 1.#QNAN 1.#QNAN0 -1.#IND -1.#IND00 1.#SNAN": math.nan,
}


@pytest.mark.parametrize("words", NOT_FINITE)
@pytest.mark.parametrize(
    "form",
    [
        "step {step} loss 1.0 grad_norm {norm}",
        "step {step} | grad_norm: {norm} | lr 0.1",
        "step: {step} grad_norm=tensor({norm})",
        " iteration {step}/ 500 | lm loss: 1.0 | grad norm: {norm} | skipped: 0 |",
        "step:{step} - actor/grad_norm:{norm} - actor/lr:1e-06",
        "{{'step': {step}, 'grad_norm': '{norm}'}}",
    ],
)
def test_what_is_not_finite_is_read_in_every_spelling(tmp_path, form, words):
    spellings = words.split()
    history = load(tmp_path / "out.log", printed(form, [*spellings, 2.5]))
    expected = [NOT_FINITE[words]] * len(spellings)
    np.testing.assert_array_equal(history.norm, [*expected, 2.5])
    rows = [["step", "grad_norm"], [0, 2.5], *enumerate(spellings, 1)]
    history = load(tmp_path / "log.csv", table(rows))
    np.testing.assert_array_equal(history.norm, [2.5, *expected])


def test_python_prints_what_is_not_finite_without_quotes(tmp_path):
    rows = [f"{{'step': {i}, 'grad_norm': {x}}}" for i, x in enumerate(["Inf", "NAN"])]
    history = load(tmp_path / "out.log", "start\n" + "\n".join(rows))
    np.testing.assert_array_equal(history.norm, [math.inf, math.nan])


@pytest.mark.parametrize("word", ["INFO", "nano", "Info:"])
def test_a_word_that_begins_like_infinity_is_no_norm(tmp_path, word):
    text = f"step 1 grad norm {word}\nstep 2 grad norm 2.5\n"
    assert load(tmp_path / "out.log", text).norm.tolist() == [2.5]


@pytest.mark.parametrize(
    "form",
    ["step {step}/100k loss 1.0 grad_norm {norm}", "grad_norm: {norm} step: {step}"],
)
@pytest.mark.parametrize("digits", ["{:.1f}k", "{:.0f}k"])
def test_a_step_in_thousands_is_shared_by_many_and_is_none(tmp_path, form, digits):
    lines = [
        form.format(step=digits.format(1 + i / 20), norm=1 + i / 10) for i in range(40)
    ]
    history = load(tmp_path / "out.log", "\n".join(lines))
    assert history.norm.tolist() == [1 + i / 10 for i in range(40)]
    assert history.step.tolist() == list(range(40))
    assert "the log has no steps; they were counted from 0." in history.notes


def test_rows_behind_the_last_step_that_was_told_whole_are_counted_on(tmp_path):
    steps = [*range(990, 1000), "1.0k", "1.0k", "1.1k"]
    lines = [f"step {step} grad_norm {1 + i}.5" for i, step in enumerate(steps)]
    history = load(tmp_path / "out.log", "\n".join(lines))
    assert history.step.tolist() == list(range(990, 1003))
    told = "3 rows have no step and were counted on from the row before."
    assert history.notes == (told,)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("grad_norm_avg", "grad_norm_val"), "grad_norm_val"),
        (("grad/AFTER_clip", "grad/BEFORE_clip"), "grad/BEFORE_clip"),
        (("max_grad_norm", "train/grad_norm"), "train/grad_norm"),
        (("param_norm", "gnorm"), "gnorm"),
        (("grad_2.0_norm/a", "grad_2.0_norm_total"), "grad_2.0_norm_total"),
        (("weight_norm", "norm"), "norm"),
        (("total_gradient_norm", "loss"), "total_gradient_norm"),
        (("grad_norm", "grad_norm_unclipped"), "grad_norm_unclipped"),
        (("clipped_grad_norm", "unclipped_grad_norm"), "unclipped_grad_norm"),
        (("gradNormAfterClip", "gradNormBeforeClip"), "gradNormBeforeClip"),
        (("loss", "crafter-v1 - train/grad_norm"), "crafter-v1 - train/grad_norm"),
        (
            ("learning/grad_norm", "learning/raw_grad_norm"),
            "learning/raw_grad_norm",
        ),
    ],
)
def test_which_column_is_the_norm_before_clipping(tmp_path, names, chosen):
    rows = "\n".join(f"{i},7.0,8.0" for i in range(3))
    history = load(tmp_path / "log.csv", f"step,{','.join(names)}\n{rows}\n")
    assert history.recorded.column == chosen
    assert history.recorded.networks == ()


@pytest.mark.parametrize(
    "line",
    [
        "step {step} loss 0.5 clipped_grad_norm: 1.0 grad_norm: {norm}",
        "step {step} | clipped grad norm: 0.93 | raw grad norm: {norm}",
        "step {step} pre_clip_grad_norm: {norm} post_clip_grad_norm: 1.0",
        "split 1 | step {step} | loss 2 | grad_norm {norm}",
        "time per step: 0.31 | step: {step} | grad_norm {norm}",
        "ms/step: 312.4 | step: {step} | grad_norm {norm}",
        "s/it: 0.35 step={step} grad_norm={norm}",
        "train/step: {step} grad_norm={norm}",
    ],
)
def test_a_word_within_another_is_no_name(tmp_path, line):
    lines = [line.format(step=7 + i, norm=norm) for i, norm in enumerate(NORMS)]
    history = load(tmp_path / "out.log", "\n".join(lines))
    assert history.step.tolist() == list(range(7, 7 + len(NORMS)))
    assert history.norm.tolist() == NORMS


def test_the_range_of_another_method_is_no_limit(tmp_path):
    rows = "".join(f"{i},0.2,2.0,{1 + i}\n" for i in range(4))
    history = load(tmp_path / "log.csv", f"step,eps_clip,policy/clip,grad_norm\n{rows}")
    assert np.isnan(history.limit).all()


def test_a_limit_that_is_not_in_every_row_stays(tmp_path):
    rows = "".join(f"{i},{'' if i % 2 else 0.5},{1 + i}\n" for i in range(4))
    history = load(tmp_path / "log.csv", f"step,max_grad_norm,grad_norm\n{rows}")
    assert history.limit.tolist() == [0.5] * 4


@pytest.mark.parametrize("name", ["grad_limit", "grad/limit", "train/grad_limit"])
def test_the_limit_that_our_adapters_log_is_read(tmp_path, name):
    rows = [[0, 4.0, 2.0], [1, 1.0, 2.0], [2, 8.0, 1.0]]
    history = load(tmp_path / "log.csv", table([["step", "grad_norm", name], *rows]))
    assert history.limit.tolist() == [2.0, 2.0, 1.0]
    assert history.scale.tolist() == [0.5, 1.0, 0.125]


def test_steps_with_all_their_digits_are_not_rounded(tmp_path):
    steps = [*range(0, 50_000, 10), *range(50_010, 60_000, 10)]
    rows = "".join(f"{step:.18e},{1 + step:.18e}\n" for step in steps)
    history = load(tmp_path / "log.csv", f"step,grad_norm\n{rows}")
    assert history.step.tolist() == steps
    assert history.notes == ()


def test_tensors_belong_to_the_run_that_they_stand_in(tmp_path):
    lines = []
    for run in range(2):
        lines += ['{"gradclip": 1, "rule": "", "run": {}}', '{"names": ["a", "b"]}']
        for step in range(30):
            norm = [80.0 if (run, step) == (0, 15) else 1 + 0.01 * step, 1.0]
            lines.append(json.dumps({"step": step, "tensors": norm}))
            whole = {"norm": math.hypot(*norm), "limit": None, "scale": 1}
            lines.append(json.dumps({"step": step, **whole}))
    history = load(tmp_path / "run.jsonl", "\n".join(lines))
    first, second = history.runs
    assert first.tensors.norm[15].tolist() == [80.0, 1.0]
    assert second.tensors.norm[15].tolist() == [1.15, 1.0]
    assert gc.advise(history).spikes[0].tensors == (("a", 80.0), ("b", 1.0))
    again = gc.replay(first, gc.Norm(40.0, over="tensor"))
    assert again.scale[15] == 0.5


@pytest.mark.parametrize("kind", ["gzip", "utf-16", "pipe"])
def test_what_is_no_plain_file_is_read_whole(tmp_path, kind):
    text = "step,grad_norm\n" + "".join(f"{i},{1 + i}\n" for i in range(20_000))
    path = tmp_path / "log.csv"
    if kind == "gzip":
        path = tmp_path / "log.csv.gz"
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "utf-16":
        path.write_text(text, encoding="utf-16")
    else:
        os.mkfifo(path)
        threading.Thread(target=path.write_text, args=(text,)).start()
    assert gc.History.load(path).norm.tolist() == list(range(1, 20_001))


@pytest.mark.parametrize("kind", ["csv", "console"])
def test_steps_are_counted_through_epochs(tmp_path, kind):
    line = {
        "csv": "{epoch},{step},{norm}",
        "console": "Epoch [{epoch}/3], Step [{step}/4], grad_norm: {norm}",
    }[kind]
    pairs = [(epoch, step) for epoch in (1, 2, 3) for step in (1, 2, 3, 4)]
    lines = ["epoch,step,grad_norm"] if kind == "csv" else []
    lines += [
        line.format(epoch=epoch, step=step, norm=1 + i)
        for i, (epoch, step) in enumerate(pairs)
    ]
    history = load(tmp_path / "log.txt", "\n".join(lines))
    assert history.step.tolist() == list(range(1, 13))
    assert history.norm.tolist() == list(range(1, 13))
    assert len(history.runs) == 1


def test_a_run_started_afresh_is_no_epoch(tmp_path):
    rows = "".join(f"0,{i},{1 + i}\n" for i in [*range(30), *range(30)])
    history = load(tmp_path / "log.csv", f"epoch,step,grad_norm\n{rows}")
    assert len(history.runs) == 2


def test_cells_that_hold_no_number_are_counted(tmp_path):
    rows = "".join(f"{i},{'#NUM!' if i % 3 else 1 + i}\n" for i in range(9))
    history = load(tmp_path / "log.csv", f"step,grad_norm\n{rows}")
    assert history.norm.tolist() == [1.0, 4.0, 7.0]
    assert any("6 cells of grad_norm hold no number" in x for x in history.notes)
    assert any("'#NUM!'" in note for note in history.notes)


def test_points_may_part_thousands_where_commas_are_decimal_signs(tmp_path):
    text = "step;grad_norm\n0;0,5\n1;2.076,88\n2;1.234.567,5\n3;1.5\n"
    history = load(tmp_path / "de.csv", text)
    assert history.norm.tolist() == [0.5, 2076.88, 1234567.5, 1.5]


def test_a_zero_begins_no_group_of_thousands(tmp_path):
    history = load(tmp_path / "log.tsv", "step\tgrad_norm\n0\t0,470\n1\t0,520\n")
    assert history.norm.tolist() == [0.47, 0.52]


@pytest.mark.parametrize("name", ["trainer_state.json", "metrics.csv"])
def test_of_a_folder_the_newest_log_is_read_and_named(tmp_path, name):
    for number in (9, 10, 100):
        folder = tmp_path / f"version_{number}"
        folder.mkdir()
        entries = [{"step": 1, "grad_norm": number}]
        text = json.dumps({"log_history": entries})
        if name == "metrics.csv":
            text = f"step,grad_norm\n1,{number}\n2,{number}\n"
        (folder / name).write_text(text)
    history = gc.History.load(tmp_path)
    assert history.norm[0] == 100
    assert any(str(Path("version_100", name)) in note for note in history.notes)


def events(folder, at, norms):
    folder.mkdir(exist_ok=True)
    writer = EventFileWriter(str(folder))
    for step, norm in enumerate(norms):
        value = Summary.Value(tag="grad_norm", simple_value=norm)
        writer.add_event(Event(step=step, summary=Summary(value=[value])))
    writer.close()
    (file,) = folder.glob("*tfevents*")
    file.rename(folder / f"events.out.tfevents.{at}.host.1.0")


def test_the_newest_of_several_event_folders_is_the_last_run(tmp_path):
    events(tmp_path / "lr_0.1", 1_700_000_000, [1.0, 2.0] * 20)
    events(tmp_path / "lr_0.01", 1_700_009_000, [30.0, 40.0] * 20)
    (tmp_path / "lr_0.1" / "events.out.tfevents.1800000000.host").touch()
    history = gc.History.load(tmp_path)
    assert history.runs[-1].norm.max() == 40.0
    assert any("is empty" in note for note in history.notes)


def test_scalars_of_several_names_are_several_networks(tmp_path):
    """`add_scalars` writes each of its names into a folder of its own."""
    with SummaryWriter(tmp_path) as writer:
        for step in range(1200):
            both = {"actor": 1 + step, "critic": 5000 + step}
            writer.add_scalars("train/grad_norm", both, step)
    history = gc.History.load(tmp_path)
    assert history.recorded.column == "actor/train/grad_norm"
    assert history.recorded.networks == ("critic/train/grad_norm",)
    assert history.norm.tolist() == [1 + step for step in range(1200)]


def test_a_loss_in_another_file_than_its_norm_belongs_to_its_step(tmp_path):
    for name in ("loss", "grad_norm"):
        with SummaryWriter(tmp_path / f"run_{name}") as writer:
            for step in range(1500):
                writer.add_scalar(name, 1 + step, step)
    record = gc.History.load(tmp_path).recorded
    assert record.norm.tolist() == record.loss.tolist() == [*range(1, 1501)]


@pytest.mark.parametrize("steps", [300, 1500])
def test_tags_that_count_samples_move_no_steps(tmp_path, steps):
    with SummaryWriter(tmp_path) as writer:
        for step in range(1, steps + 1):
            for tag in ("lm loss", "grad-norm"):
                writer.add_scalar(tag, step, step)
                writer.add_scalar(f"{tag} vs samples", step, 4 * step)
    record = gc.History.load(tmp_path).recorded
    assert record.column == "grad-norm"
    assert record.step.tolist() == record.norm.tolist() == [*range(1, steps + 1)]
    assert record.loss.tolist() == record.norm.tolist()
    assert record.notes == ()


def test_a_loss_that_is_logged_late_belongs_to_its_step(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        for step in range(50):
            writer.add_scalar("grad_norm", 1 + step, step)
            if step >= 5:
                writer.add_scalar("loss", step - 4, step - 5)
    record = gc.History.load(tmp_path).recorded
    assert record.step.tolist() == [*range(50)]
    assert record.loss[:45].tolist() == [*range(1, 46)]


@pytest.mark.parametrize("name", ["grad_norm_study", "loss_ablation"])
def test_a_folder_may_be_called_like_a_tag(tmp_path, name):
    with SummaryWriter(tmp_path / name) as writer:
        for step in range(5):
            writer.add_scalar("grad_norm", 2 + step, step)
            writer.add_scalar("loss", 1 + step, step)
    for path in (tmp_path, tmp_path / name):
        record = gc.History.load(path).recorded
        assert record.column == "grad_norm"
        assert record.loss.tolist() == [1, 2, 3, 4, 5]


def test_an_mlflow_run_that_was_started_again_is_two_runs(tmp_path):
    metrics = tmp_path / "mlruns" / "0" / "abc" / "metrics"
    metrics.mkdir(parents=True)
    steps = [*range(50), *range(20)]
    lines = [f"17000 {1 + i} {step}" for i, step in enumerate(steps)]
    (metrics / "grad_norm").write_text("\n".join(lines))
    first, second = gc.History.load(tmp_path / "mlruns").runs
    assert (len(first), len(second)) == (50, 20)
    (metrics / "grad_norm").write_text("\n".join([*lines, "17000 1.1"]))
    with pytest.raises(LogError, match="line 71: not 'time value step'"):
        gc.History.load(tmp_path / "mlruns")


def test_a_damaged_metric_of_mlflow_is_named_with_its_line(tmp_path):
    metrics = tmp_path / "mlruns" / "0" / "abc" / "metrics"
    metrics.mkdir(parents=True)
    (metrics / "grad_norm").write_bytes(b"17000 1.0 0\n17000 \xff 1\n")
    with pytest.raises(LogError, match=r"grad_norm, line 2: not 'time value step'"):
        gc.History.load(tmp_path / "mlruns")


def test_mlflow_without_steps_is_counted(tmp_path):
    metrics = tmp_path / "mlruns" / "0" / "abc" / "metrics"
    metrics.mkdir(parents=True)
    (metrics / "grad_norm").write_text("".join(f"17000 {1 + i} 0\n" for i in range(9)))
    history = gc.History.load(tmp_path / "mlruns")
    assert history.step.tolist() == list(range(9))
    assert history.norm.tolist() == list(range(1, 10))


def stored(run, norms, mark=True):
    """Write a run as MLflow does."""
    (run / "metrics").mkdir(parents=True)
    lines = [f"17000 {norm} {step}\n" for step, norm in enumerate(norms)]
    (run / "metrics" / "grad_norm").write_text("".join(lines))
    if mark:
        (run / "meta.yaml").write_text("run_id: a\n")


@pytest.mark.parametrize("name", ["trainer_state.json", "metrics.csv", "run.jsonl"])
def test_a_folder_called_metrics_makes_no_store_of_another_log(tmp_path, name):
    stored(tmp_path / "project", [9.0], mark=False)
    (tmp_path / "project" / "metrics" / "accuracy.py").write_text("import math\n")
    text = {
        "trainer_state.json": '{"log_history": [{"step": 1, "grad_norm": 2.5}]}',
        "metrics.csv": "step,grad_norm\n1,2.5\n",
        "run.jsonl": '{"gradclip": 1, "rule": ""}\n{"step": 1, "norm": 2.5}\n',
    }[name]
    (tmp_path / name).write_text(text)
    assert gc.History.load(tmp_path).norm.tolist() == [2.5]


def test_a_store_of_mlflow_is_read_beside_what_it_keeps_of_others(tmp_path):
    stored(tmp_path / "mlruns" / "0" / "abc", [1.5, 2.5])
    kept = tmp_path / "mlruns" / "0" / "abc" / "artifacts" / "metrics"
    kept.mkdir(parents=True)
    (kept / "metrics.csv").write_text("step,grad_norm\n1,9.0\n")
    history = gc.History.load(tmp_path)
    assert history.recorded.format == "MLflow"
    assert history.norm.tolist() == [1.5, 2.5]


def test_the_run_that_mlflow_appended_to_last_is_the_newest(tmp_path):
    for i, name in enumerate(["first", "second"]):
        stored(tmp_path / name, [1.0 + i])
        # Appending to a file leaves the time of its folder.
        os.utime(tmp_path / name / "metrics" / "grad_norm", (100 - i, 100 - i))
        os.utime(tmp_path / name / "metrics", (50 + i, 50 + i))
    history = gc.History.load(tmp_path)
    assert history.norm.tolist() == [1.0]
    assert any("read the newest, first" in note for note in history.notes)


def test_a_torn_gzip_file_is_refused_by_its_own_name(tmp_path):
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(b"step,grad_norm\n1,2\n" * 9)[:-9])
    with pytest.raises(LogError, match=f"^{path}: not a whole gzip file"):
        gc.History.load(path)


REFUSED = {
    "only norms after clipping": "step,grad_norm_after_clip\n1,1.0\n2,1.0\n",
    "no gradient norm in it; it has loss, step": "step,loss\n1,1.0\n2,1.0\n",
    "the norms of 9 modules": "step,"
    + ",".join(f"grad_norm/layer{i}" for i in range(9))
    + "\n1"
    + ",2.0" * 9
    + "\n2"
    + ",2.0" * 9,
    "the file is empty": " \n\x1c",
    "no gradient norm in any line": "hello\nworld\n",
    "quartiles of its norms": "Clipping_scale=2.0, grad-norm quartiles 1 2 3 4 5, x\n",
    r"line 3: .*cut off": '{\n "log_history": [\n  {"grad_norm": 1.0, "step',
    "holds no list of steps; it has a": '{"a": 1}',
    r"holds no list of steps; it has \{\}": "{}",
    "holds no list of steps; it has null": "null\n",
    'holds no list of steps; it has "text"': '"text"',
    "a table without a row; its heading is step, loss": "step,loss\n",
    "a table without a row; its heading is time, grad_norm": "\ntime;grad_norm\n",
    "without steps": '{"gradclip": 1, "rule": "Norm(1.0)", "run": {}}\n',
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_used_is_refused_with_file_and_reason(tmp_path, message):
    path = tmp_path / "some.log"
    with pytest.raises(LogError, match=message) as error:
        load(path, REFUSED[message])
    assert str(error.value).startswith(str(path))


def test_binary_files_and_missing_ones(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\x93NUMPY\0\0\1" * 100)
    with pytest.raises(LogError, match="binary file"):
        gc.History.load(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.log: there is no such file"):
        gc.History.load("nowhere.log")
    with pytest.raises(ValueError, match="format='xml': use one of gradclip"):
        gc.History.load(path, format="xml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(LogError, match="a folder without a log"):
        gc.History.load(tmp_path / "folder")


def test_a_wrong_guess_is_correctable(tmp_path):
    path = tmp_path / "odd.log"
    text = "step,big number\n1,2.5\n2,1.25\n"
    with pytest.raises(LogError, match=r"big number, step.*column="):
        load(path, text)
    history = gc.History.load(path, format="csv", column="big number")
    assert history.norm.tolist() == [2.5, 1.25]
    with pytest.raises(LogError, match="no numbers in a column 'small'"):
        gc.History.load(path, column="small")


def test_another_column_of_our_own_history(tmp_path):
    lines = [
        '{"gradclip": 1, "rule": "", "run": {}}',
        '{"step": 0, "norm": 1, "mine": 7}',
    ]
    path = tmp_path / "run.jsonl"
    assert load(path, "\n".join(lines)).norm.tolist() == [1.0]
    assert gc.History.load(path, column="mine").norm.tolist() == [7.0]


@pytest.mark.parametrize("step", ["1e999", "Infinity", "9" * 400, "NaN", "-1e300"])
def test_a_step_that_is_none_is_counted_on_or_left_out(tmp_path, step):
    rows = f'{{"step": 0, "norm": 1.0}}\n{{"step": {step}, "norm": 2.0}}\n'
    history = load(tmp_path / "a.jsonl", rows)
    assert history.step.tolist() == [0, 1]
    own = load(tmp_path / "b.jsonl", f'{{"gradclip": 1}}\n{rows}')
    assert own.step.tolist() == [0]
    assert any("line 3" in note for note in own.notes)


def steps_of(sequence):
    step = np.array(sequence)
    norm = np.arange(step.size) + 1.0
    runs, notes = split_runs(step, norm)
    return [step[run].tolist() for run in runs], " ".join(notes)


def test_a_resume_repeats_steps_and_the_newest_branch_counts():
    first, again = range(1, 131), range(101, 151)
    runs, notes = steps_of([*first, *again])
    assert runs == [list(range(1, 151))]
    assert "30 steps that it replaces" in notes
    runs, _ = steps_of([*first, *again, *again])
    assert runs == [list(range(1, 151))]


def test_a_fresh_start_is_a_run_of_its_own():
    runs, notes = steps_of([*range(1, 401), *range(1, 51)])
    assert runs == [list(range(1, 401)), list(range(1, 51))]
    assert "2 runs, one after the other" in notes


def test_jobs_that_take_turns_are_told_apart():
    a, b = range(454, 480), range(241, 267)
    runs, notes = steps_of([x for pair in zip(a, b, strict=True) for x in pair])
    assert runs == [list(a), list(b)]
    assert "jobs that took turns" in notes


def test_jobs_at_the_same_steps_are_told_apart():
    step = np.repeat(np.arange(30), 3)
    runs, _ = split_runs(step, np.arange(90.0))
    assert runs == [list(range(i, 90, 3)) for i in range(3)]


def test_one_step_that_was_tried_again_is_a_resume():
    runs, notes = steps_of([*range(10), *range(9, 20)])
    assert runs == [list(range(20))]
    assert "the 1 step that it replaces was" in notes


def test_lines_that_every_process_prints_count_once(tmp_path):
    twice = "\n".join(
        f"step {i} grad_norm {n}" for i, n in enumerate(NORMS) for _ in "ab"
    )
    history = load(tmp_path / "out.log", twice)
    assert history.norm.tolist() == NORMS
    assert any("3 rows repeat the step before" in note for note in history.notes)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=60))
def test_telling_runs_apart_never_loses_or_invents_rows(sequence):
    step = np.array(sequence, np.int64)
    runs, _ = split_runs(step, np.arange(step.size) + 1.0)
    rows = [row for run in runs for row in run]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(step.size))
    assert bool(rows) == bool(sequence)
    for run in runs:
        assert all(np.diff(step[run]) > 0)


def test_the_trainer_state_and_the_events_of_one_run_give_the_same_advice():
    state = gc.History.load(FIXTURES / "trainer_state.json")
    events = gc.History.load(FIXTURES / "tensorboard")
    assert len(state) == len(events) == 120
    np.testing.assert_allclose(events.norm, state.norm, rtol=1e-6)
    one, other = gc.advise(state), gc.advise(events)
    assert str(one) == str(other)
    assert one.limit == other.limit > 0


def test_what_hugging_face_printed_is_that_run_in_four_digits():
    state = gc.History.load(FIXTURES / "trainer_state.json")
    printed_log = gc.History.load(FIXTURES / "huggingface.log")
    np.testing.assert_allclose(printed_log.norm, state.norm, rtol=1e-3)


# As MLflow 3 makes them, but for what nobody reads here.
TABLES = """
    create table runs (
        run_uuid varchar(32) not null primary key, name varchar(250),
        status varchar(9), lifecycle_stage varchar(20), experiment_id integer
    );
    create table metrics (
        "key" varchar(250) not null, value float not null, timestamp bigint not null,
        run_uuid varchar(32) not null, step bigint default '0' not null,
        is_nan boolean default '0' not null,
        primary key ("key", timestamp, step, run_uuid, value, is_nan)
    );
"""


def in_database(path, rows, runs=(("a", "first", "active"),)):
    """Write metrics (key, value, timestamp, run, step, is_nan) as MLflow does."""
    with closing(sqlite3.connect(path)) as database:
        database.executescript(TABLES)
        database.executemany("insert into runs values (?, ?, 'FINISHED', ?, 0)", runs)
        database.executemany("insert into metrics values (?, ?, ?, ?, ?, ?)", rows)
        database.commit()
    return path


def test_the_newest_run_in_a_database_of_mlflow_is_read(tmp_path):
    rows = [("grad_norm", 9.0, 500, "a", 1, 0), ("grad_norm", 9.0, 510, "c", 1, 0)]
    rows += [("grad_norm", 1.5 + i, 501 + i, "b", 10 * i, 0) for i in range(3)]
    rows += [("loss", 0.5 - i, 501 + i, "b", 10 * i, 0) for i in range(3)]
    runs = [("a", "x", "active"), ("b", "sly-ox-4", "active"), ("c", "z", "deleted")]
    # A sign that would end the path in an address.
    (tmp_path / "a?b").mkdir()
    path = in_database(tmp_path / "a?b" / "mlflow.db", rows, runs)
    for log in (path, path.parent, tmp_path):
        for format in (None, "mlflow"):
            history = gc.History.load(log, format=format)
            assert history.recorded.format == "MLflow"
            assert history.norm.tolist() == [1.5, 2.5, 3.5]
            assert history.loss.tolist() == [0.5, -0.5, -1.5]
            assert history.step.tolist() == [0, 10, 20]
            assert "2 runs are in this database; read the newest, sly-ox-4 (b)" in (
                "".join(history.notes)
            )


def test_nan_and_infinity_are_read_as_mlflow_keeps_them(tmp_path):
    rows = [("grad_norm", 0.0, 1, "a", 0, 1), ("grad_norm", 2.0, 2, "a", 1, 0)]
    rows += [("grad_norm", sys.float_info.max, 3, "a", 2, 0)]
    norm = gc.History.load(in_database(tmp_path / "x.sqlite", rows)).norm
    assert np.array_equal(norm, [np.nan, 2.0, np.inf], equal_nan=True)


def test_a_run_in_a_database_that_was_started_again_is_two_runs(tmp_path):
    steps = [*range(50), *range(20)]
    rows = [("grad_norm", 1.0 + i, i, "a", step, 0) for i, step in enumerate(steps)]
    first, second = gc.History.load(in_database(tmp_path / "mlflow.db", rows)).runs
    assert (len(first), len(second)) == (50, 20)


def test_other_databases_are_refused_with_the_reason(tmp_path):
    with pytest.raises(LogError, match="without a metric of any run"):
        gc.History.load(in_database(tmp_path / "empty.db", []))
    with closing(sqlite3.connect(tmp_path / "other.db")) as database:
        database.execute("create table metrics (grad_norm float)")
    with pytest.raises(LogError, match="a database of SQLite that is not MLflow's"):
        gc.History.load(tmp_path / "other.db")
    whole = (tmp_path / "other.db").read_bytes()
    (tmp_path / "cut.db").write_bytes(whole[:2000])
    with pytest.raises(LogError, match=r"cut\.db: a database that SQLite cannot read"):
        gc.History.load(tmp_path / "cut.db")


def test_a_run_of_weights_and_biases_is_named(tmp_path):
    run = tmp_path / "wandb" / "offline-run-20260101_000000-abc"
    run.mkdir(parents=True)
    (run / "run-abc.wandb").write_bytes(b":W&B\xe1\xbe\x00\x12\x34")
    for log in (run / "run-abc.wandb", run, tmp_path):
        with pytest.raises(LogError, match=r"a run of Weights & Biases.*wandb sync"):
            gc.History.load(log)


def test_lightning_and_mlflow():
    history = gc.History.load(FIXTURES / "metrics.csv")
    assert history.recorded.column == "grad_2.0_norm_total"
    assert history.step.tolist() == list(range(60))
    assert np.isfinite(history.loss).all()
    store = gc.History.load(FIXTURES / "mlruns")
    assert store.recorded.format == "MLflow"
    assert store.recorded.column == "train/grad_norm"
    assert store.step.tolist() == list(range(40))


def test_damaged_events_end_there_and_say_so(tmp_path):
    path = tmp_path / "events.out.tfevents.1"
    data = bytearray((FIXTURES / "tensorboard" / path.name).read_bytes())
    data[200:260] = b"\xff" * 60
    path.write_bytes(data)
    history = gc.History.load(path)
    assert len(history) == 1
    assert any("damaged or cut off at byte" in note for note in history.notes)
    data = (FIXTURES / "tensorboard" / path.name).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert 20 < len(gc.History.load(path)) < 100
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(LogError, match="no whole event"):
        gc.History.load(path)


def test_other_forms_of_json_and_parquet(tmp_path):
    columns = {"step": [1, 2, 3], "grad_norm": NORMS}
    rows = [{"step": i, "train": {"grad_norm": n}} for i, n in enumerate(NORMS, 1)]
    notebook = {
        "nbformat": 4,
        "cells": [{"outputs": [{"text": printed(MEGATRON).splitlines(True)}]}, {}],
    }
    for name, document in {"a": columns, "b": rows, "c": notebook}.items():
        history = load(tmp_path / f"{name}.json", json.dumps(document))
        assert history.norm.tolist() == NORMS
        assert history.step.tolist() == [1, 2, 3]
    import pyarrow
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
    assert gc.History.load(tmp_path / "d.parquet").norm.tolist() == NORMS
    (tmp_path / "e.parquet").write_bytes(b"PAR1broken")
    with pytest.raises(LogError, match=r"e\.parquet"):
        gc.History.load(tmp_path / "e.parquet")


def test_a_renamed_trainer_state(tmp_path):
    shutil.copy(FIXTURES / "trainer_state.json", tmp_path / "training_logs.json")
    history = gc.History.load(tmp_path / "training_logs.json")
    assert history.recorded.format == "Hugging Face trainer state"


def test_rows_of_another_width_are_left_out_and_counted(tmp_path):
    text = "step,grad_norm\n1,2.5\n2,1.25,7\n3\n4,4.0\n"
    history = load(tmp_path / "log.csv", text)
    assert history.norm.tolist() == [2.5, 4.0]
    assert any("2 rows" in n and "line 3" in n for n in history.notes)


@pytest.mark.parametrize("sign", [",", "\t", ";"])
@pytest.mark.parametrize(
    "names",
    [
        ["step", "lr", "grad_norm", "loss"],
        ["step", "grad_norm"],
        ["step", " ", "grad_norm", "val_loss", "", "loss"],
        ["step", "grad_norm", "loss"],
        ["step", "loss", "grad_norm"],
    ],
)
def test_a_resumed_table_may_have_other_columns(tmp_path, names, sign):
    rows = [["step", "loss", "grad_norm"], *([i, 9, 20 + i] for i in range(5))]
    cells = {"step": [4, 5, 6], "grad_norm": [4, 5, 6], "loss": [3, 3, 3]}
    added = [[cells.get(name, ["", "", ""])[i] for name in names] for i in range(3)]
    history = load(tmp_path / "log.csv", table([*rows, names, *added], sign))
    assert history.norm.tolist() == [20, 21, 22, 23, 4, 5, 6]
    assert history.step.tolist() == list(range(7))
    loss = [3] * 3 if "loss" in names else [math.nan] * 3
    np.testing.assert_array_equal(history.recorded.loss, [9] * 4 + loss)
    (note,) = history.notes
    assert "the newest branch counts" in note


def test_words_of_another_width_are_no_heading(tmp_path):
    text = "step,loss,grad_norm\n1,9,2.5\nall,done\nsaved,to,step,4\n2,8,3.5\n"
    history = load(tmp_path / "log.csv", text)
    assert history.norm.tolist() == [2.5, 3.5]
    assert any("2 rows have another number of cells" in x for x in history.notes)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_to_any_fixture_is_survived_or_refused(tmp_path_factory, data):
    name = data.draw(
        st.sampled_from(["trainer_state.json", "metrics.csv", "huggingface.log"])
    )
    content = bytearray(
        (FIXTURES / name).read_bytes()[: data.draw(st.integers(1, 3000))]
    )
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + 3] = data.draw(st.binary(max_size=6))
    path = tmp_path_factory.mktemp("damage") / name
    path.write_bytes(content)
    refused = False
    try:
        history = gc.History.load(path)
    except LogError:
        refused = True
    assert refused or len(history) == history.step.size > 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("log.csv", 'step,grad_norm\n0,"1,148"\n1,"0,594"\n2,"1,002"\n'),
        ("log.tsv", "step\tgrad_norm\n0\t1,148\n1\t0,594\n2\t1,002\n"),
        ("log.txt", "".join(f"step {i} grad_norm {x}\n" for i, x in enumerate(FEW))),
        ("log.jsonl", "".join(f'{{"grad_norm": "{x}"}}\n' for x in FEW)),
    ],
)
def test_a_comma_is_the_decimal_sign_where_one_cell_can_mean_nothing_else(
    tmp_path, name, text
):
    (tmp_path / name).write_text(text)
    assert gc.History.load(tmp_path / name).norm.tolist() == [1.148, 0.594, 1.002]


def test_a_run_that_another_overlaps_almost_whole_is_not_resumed_by_it():
    runs, notes = steps_of([*range(0, 4000, 10), *range(10, 4010, 10)])
    assert runs == [list(range(0, 4000, 10)), list(range(10, 4010, 10))]
    assert "2 runs, one after the other, are in this log" in notes


def test_rows_without_an_order_are_put_in_that_of_their_steps():
    step = np.random.default_rng(0).permutation(200)
    runs, notes = steps_of(step)
    assert runs == [list(range(200))]
    assert "in no order" in notes


def test_steps_that_were_tried_again_leave_one_run():
    runs, notes = steps_of([*range(5), *range(4, 10), *range(9, 15), *range(14, 20)])
    assert runs == [list(range(20))]
    assert "resumed 3 times" in notes


def test_a_process_that_begins_with_a_repeated_row_goes_on_with_the_next():
    step = np.array([*range(50), 49, 50, 51, *range(51, 60)])
    norm = np.where(np.arange(step.size) == 50, 50.0, np.arange(step.size) + 1.0)
    runs, notes = split_runs(step, norm, heads=[0, 50, 53, step.size])
    assert [step[run].tolist() for run in runs] == [list(range(60))]
    assert "1 row repeats the step before" in notes[0]
    assert "resumed 1 time from an earlier step: the newest" in notes[1]


def test_steps_with_fractions_are_counted():
    columns = Columns()
    for i in range(30):
        columns.add({"step": i / 2, "grad_norm": 1.0 + i})
    record = assemble(columns, "log", "CSV")
    assert record.step.tolist() == list(range(30))
    assert any("0.5 are no whole numbers" in note for note in record.notes)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "a.csv",
            "step,grad_norm\n0,1.2 au\n1,1.3 au\n",
            "grad_norm holds a number.*au",
        ),
        ("a.jsonl", '{"grad_norm": [1]}\n{"grad_norm": [2]}\n', "number, but lists"),
        ("a.json", "[1.5, 2.5]", "a JSON list of float"),
        ("b.json", '{"step": [0, 1], "grad_norm": [1.5]}', "grad_norm has 1 entries"),
        ("c.csv", "step,log_grad_norm\n0,1.5\n", "it has log_grad_norm, step"),
        ("d.csv", "step,grad_norm_ratio\n0,1.5\n", "it has grad_norm_ratio, step"),
    ],
)
def test_what_is_no_norm_is_said_to_be_there(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(LogError, match=told):
        gc.History.load(tmp_path / name)


def test_another_kind_is_no_history_without_steps(tmp_path):
    (tmp_path / "a.csv").write_text("step,grad_norm\n0,1.5\n")
    with pytest.raises(LogError, match="line 1 is none of its lines"):
        gc.History.load(tmp_path / "a.csv", format="gradclip")
    with pytest.raises(LogError, match="no event file"):
        gc.History.load(tmp_path, format="tensorboard")


def test_a_folder_with_a_history_is_read(tmp_path):
    for i in (1, 2, 10):
        path = tmp_path / f"run-{i}" / "run.jsonl"
        with gc.History(path) as history:
            gc.Clipper(gc.Norm(1.0), history=history).clip(np.array([float(i)]))
    (tmp_path / "other.jsonl").write_text('{"grad_norm": 5}\n')
    history = gc.History.load(tmp_path)
    assert history.norm.tolist() == [10.0]
    assert any("run-10/run.jsonl was read" in note for note in history.notes)
    assert any("the newest of 3 by its number" in note for note in history.notes)


def test_histories_of_any_names_are_told_apart_by_their_time(tmp_path):
    for i, name in enumerate(["b", "norm-0.25", "norm-1", "a"]):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(f'{{"gradclip": 1}}\n{{"step": 0, "norm": {i}}}\n')
        os.utime(path, (100 + i, 100 + i))
    history = gc.History.load(tmp_path)
    assert history.norm.tolist() == [3.0]
    note = "of this folder, a.jsonl was read, the newest of 4 by when it was written."
    assert history.notes == (note,)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").unlink()
    os.utime(tmp_path / "norm-0.25.jsonl", (200, 200))
    assert gc.History.load(tmp_path).norm.tolist() == [1.0]


def test_what_is_read_beside_a_history_is_named(tmp_path):
    (tmp_path / "run.jsonl").write_text('{"gradclip": 1}\n{"step": 0, "norm": 5}\n')
    stored(tmp_path / "mlruns" / "0" / "abc", [1.5, 2.5])
    note = "MLflow's store was read; for gradclip's own history name run.jsonl"
    assert any(note in told for told in gc.History.load(tmp_path).notes)
    with SummaryWriter(tmp_path / "events") as writer:
        writer.add_scalar("grad_norm", 2.0, 1)
    # Neither a link to nothing nor a folder is a history.
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.jsonl").mkdir()
    history = gc.History.load(tmp_path)
    assert history.norm.tolist() == [2.0]
    assert any("TensorBoard's event files were read" in x for x in history.notes)


def test_norms_are_read_deep_in_a_row_in_one_column_and_as_arrays(tmp_path):
    (tmp_path / "a.jsonl").write_text(2 * '{"m": {"train": {"grad_norm": 1.5}}}\n')
    (tmp_path / "a.csv").write_text("grad_norm\n1.5\n2.5\n")
    (tmp_path / "a.log").write_text(
        'step 3 grad_norm tensor(1.5, device="cuda:0")\n'
        "step 4 grad_norm np.float32(2.5)\n"
    )
    names = ("a.jsonl", "a.csv", "a.log")
    found = [gc.History.load(tmp_path / name).norm.tolist() for name in names]
    assert found == [[1.5, 1.5], [1.5, 2.5], [1.5, 2.5]]


def drawn(*bars):
    return "".join(
        f"\r{n:3d}%|#  | {n}/64 [00:01<00:07, 1.0it/s, grad_norm={norm}]"
        for n, norm in bars
    )


def test_a_bar_that_counts_samples_is_drawn_twice_for_a_step(tmp_path):
    later = ((8 * i, x) for i in range(2, 6) for x in (i / 2, i / 2, (i + 1) / 2))
    text = drawn((8, 1.0), *later)
    history = load(tmp_path / "out.log", text)
    assert history.step.tolist() == [8, 16, 24, 32, 40]
    assert history.norm.tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_the_batches_of_a_bar_that_counts_epochs_are_steps(tmp_path):
    text = drawn(*((epoch, epoch * 5 + i) for epoch in range(6) for i in range(5)))
    history = load(tmp_path / "out.log", text)
    assert history.norm.tolist() == list(range(30))
    assert history.step.tolist() == list(range(30))
    assert any("counted from 0" in note for note in history.notes)


def test_a_heading_that_begins_with_another_name_is_followed(tmp_path):
    text = "loss,grad_norm,step\n9,2.0,1\n9,2.1,2\n\ufeffgrad_norm,loss,step\n2.2,9,3\n"
    history = load(tmp_path / "log.csv", text)
    assert history.norm.tolist() == [2.0, 2.1, 2.2]
    assert history.loss.tolist() == [9, 9, 9]
