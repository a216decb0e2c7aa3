"""Kill and resume at any step equals the uninterrupted run, in every format."""

import copy
import functools
import itertools
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import gradclip as gc
from gradclip.torch import Clipper, attach
from table import ROWS, STATEFUL


def run(net, optimizer, clipper, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 5, generator=generator) * (40 if step % 7 == 5 else 1)
        optimizer.zero_grad()
        net(x).square().sum().backward()
        if step == 11:
            net.weight.grad[0, 0] = float("nan")
        optimizer.step()


def fresh(name):
    torch.manual_seed(0)
    net = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    return net, optimizer, attach(optimizer, ROWS[name].make())


def by_torch_save(state, blank, folder):
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def by_safetensors(state, blank, folder):
    safetensors.torch.save_file(state, folder / "state.safetensors")
    return safetensors.torch.load_file(folder / "state.safetensors")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def by_distributed_checkpoint(state, blank, folder):
    dcp.save({"clipper": state}, checkpoint_id=folder / "dcp", no_dist=True)
    dcp.load({"clipper": blank}, checkpoint_id=folder / "dcp", no_dist=True)
    return blank


FORMATS = [by_torch_save, by_safetensors, by_distributed_checkpoint]
CUTS, END = [0, 1, 12, 25], 30


@functools.cache
def uninterrupted(name):
    """Return what there is to save of one run, at each cut and at its end."""
    (net, optimizer, clipper), saved = fresh(name), {}
    for start, cut in itertools.pairwise([0, *CUTS, END]):
        run(net, optimizer, clipper, range(start, cut))
        # What models and optimizers save follows the run.
        saved[cut] = copy.deepcopy(
            [x.state_dict() for x in (net, optimizer, clipper)],
        )
    return saved


@pytest.mark.parametrize("name", [*STATEFUL, "norm"])
@pytest.mark.parametrize("through", FORMATS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.filterwarnings("ignore:torch.distributed:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_resume(name, through, cut, tmp_path):
    saved = copy.deepcopy(uninterrupted(name)[cut])
    net, optimizer, clipper = fresh(name)
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    clipper.load_state_dict(through(saved[2], clipper.state_dict(), tmp_path))
    run(net, optimizer, clipper, range(cut, END))

    weights, _, memory = uninterrupted(name)[END]
    for key, value in weights.items():
        assert torch.equal(value, net.state_dict()[key]), key
    for key, value in memory.items():
        assert torch.equal(value, clipper.state_dict()[key]), key


def test_a_clipper_is_stateful_for_distributed_checkpoints(tmp_path):
    from torch.distributed.checkpoint.stateful import Stateful

    _, _, clipper = fresh("zscore")
    assert isinstance(clipper, Stateful)


def test_a_saved_state_does_not_follow_the_run():
    net, optimizer, clipper = fresh("zscore")
    run(net, optimizer, clipper, range(3))
    saved = clipper.state_dict()
    copies = {key: value.clone() for key, value in saved.items()}
    run(net, optimizer, clipper, range(3, 10))
    for key, value in copies.items():
        assert torch.equal(saved[key], value)
    assert not torch.equal(clipper.state_dict()["0.mean"], saved["0.mean"])


def test_a_loaded_state_does_not_follow_its_arrays():
    first, second = gc.Clipper(gc.ZScore()), gc.Clipper(gc.ZScore())
    first.clip(np.array([3.0, 4.0]))
    saved = first.state_dict()
    second.load_state_dict(saved)
    saved["0.mean"][...] = 99.0
    assert float(second.state_dict()["0.mean"]) == 5.0


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", [gc.ZScore(), gc.EMA(), gc.SPAM()])
@pytest.mark.parametrize("used", [True, False])
def test_a_state_that_was_cast_comes_back_in_its_own_types(kind, rule, used):
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    clipper, into = (Clipper([p], rule, doctor=()) for _ in range(2))
    clipper.clip_()
    if used:
        into.clip_()
    saved = clipper.state_dict()
    cast = {k: x.to(kind) if x.is_floating_point() else x for k, x in saved.items()}
    into.load_state_dict(cast)
    types = {k: x.dtype for k, x in into.state_dict().items()}
    assert types == {k: x.dtype for k, x in saved.items()}
    into.clip_()


@pytest.mark.parametrize("rule", [gc.ZScore(), gc.EMA()])
def test_a_state_through_json_is_the_same_to_the_bit(rule):
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([0.1, 0.7])
    clipper, into = (Clipper([p], rule, doctor=()) for _ in range(2))
    clipper.clip_()
    saved = clipper.state_dict()
    into.load_state_dict(
        json.loads(json.dumps({k: x.tolist() for k, x in saved.items()}))
    )
    for key, x in saved.items():
        assert torch.equal(into.state_dict()[key], x), key


def test_a_refused_state_changes_nothing():
    net, optimizer, clipper = fresh("zscore")
    run(net, optimizer, clipper, range(3))
    before = clipper.state_dict()
    wrong = dict(before)
    other = Clipper(net, gc.ZScore(over="tensor"))
    with pytest.raises(ValueError, match="belongs to"):
        clipper.load_state_dict(other.state_dict())
    del wrong["0.count"]
    with pytest.raises(ValueError, match="lacks 'count'"):
        clipper.load_state_dict(wrong)
    for key, value in before.items():
        assert torch.equal(clipper.state_dict()[key], value)
