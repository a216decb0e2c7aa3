"""The packages themselves fail as `tests/published.py` says, and agree until then.

They have an environment of their own, which `make test-published` sets up.
"""

import importlib.metadata
import importlib.util
import sys
import types

import AdamWClip
import autoclip.torch
import drytorch.lib.gradient_ops
import pytest
import pytorch_optimizer
import smartclip
import torch
import zclip

import published
from test_defects import DEFECTS, after, noise

VERSIONS = {
    "adamwclip": "0.1.4",
    "ai2-olmo-core": "3.0.0",
    "autoclip": "0.2.1",
    "drytorch": "0.1.0rc11",
    "pytorch_optimizer": "4.1.0",
    "smartclip": "0.1.1",
    "zclip": "1.0.0",
}


@pytest.mark.parametrize("name", VERSIONS)
def test_versions(name):
    assert importlib.metadata.version(name) == VERSIONS[name]


class Peer:
    """A package that clips the gradients of parameters, as a step of gradients."""

    def __init__(self, begin):
        self.begin, self.params = begin, None

    def __call__(self, grads):
        if self.params is None:
            self.params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
            self.clip = self.begin(self.params)
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.clone()
        return self.clip() or [p.grad for p in self.params]


def by_zclip(**options):
    def begin(params):
        clipper, model = zclip.ZClip(**options), torch.nn.ParameterList(params)
        return lambda: clipper.step(model) and None

    return begin


def by_autoclip(kind):
    return lambda params: kind(params, global_threshold=True).step


def by_drytorch(params):
    clipper = drytorch.lib.gradient_ops.HistClipper()
    return lambda: clipper(params)


def by_smartclip(params):
    model, clipper = torch.nn.ParameterList(params), smartclip.AutoClip()
    return lambda: smartclip.apply(model, clipper) and None


def by_optimizer(kind, **options):
    """Read the clipped gradients off a first moment that remembers nothing."""

    def begin(params):
        optimizer = kind(params, lr=1e-9, betas=(0.0, 0.999), **options)

        def clip():
            optimizer.step()
            return [optimizer.state[p]["exp_avg"].clone() for p in params]

        return clip

    return begin


def by_adamwclip(**options):
    def begin(params):
        # It clips the gradients where they lie.
        return AdamWClip.AdamWClip(params, lr=1e-9, **options).step

    return begin


def skip_step():
    """Return OLMo-core's class, without the rest of the package and what that needs."""
    files = importlib.metadata.files("ai2-olmo-core")
    path = next(f for f in files if str(f).endswith("optim/skip_step_optimizer.py"))
    utils = types.ModuleType("olmo_core.utils")
    utils.get_default_device = lambda: torch.device("cpu")
    utils.move_to_device = lambda x, device: x
    sys.modules["olmo_core.utils"] = utils
    spec = importlib.util.spec_from_file_location("skip_step", path.locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SkipStepOptimizer


def by_olmo(params):
    optimizer = skip_step()(params, {})

    def clip():
        optimizer.latest_loss = torch.tensor(1.0)
        optimizer.latest_grad_norm = torch.stack([p.grad.norm() for p in params]).norm()
        return [p.grad * optimizer.get_step_factor() for p in params]

    return clip


PEERS = {
    "autoclip 0.2.1, QuantileClip": by_autoclip(autoclip.torch.QuantileClip),
    "autoclip 0.2.1, StandardClip": by_autoclip(autoclip.torch.StandardClip),
    "zclip 1.0.0: after": by_zclip(max_grad_norm=None),
    "zclip 1.0.0: a norm": by_zclip(),
    "OLMo-core": by_olmo,
    "AdamWClip": by_adamwclip(),
    "SPAM-Optimizer": by_optimizer(pytorch_optimizer.SPAM),
    "pytorch_optimizer 4.1.0, AdaGC": by_optimizer(pytorch_optimizer.AdaGC),
    "smartclip": by_smartclip,
    "drytorch": by_drytorch,
}
SHOWN = [(name, peer) for name in DEFECTS for peer in PEERS if name.startswith(peer)]


def test_most_rows_are_witnessed():
    assert {peer for _, peer in SHOWN} == set(PEERS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "peer"), SHOWN)
def test_the_package_fails_as_well(name, peer):
    assert not DEFECTS[name].healthy(lambda: Peer(PEERS[peer]))


EXACT = {
    "autoclip 0.2.1, QuantileClip": published.QuantileClip,
    "zclip 1.0.0: after": lambda: published.ZClip(None),
    "zclip 1.0.0: a norm": published.ZClip,
    "OLMo-core": published.SkipStep,
    "AdamWClip": published.AdamWClip,
    "SPAM-Optimizer": published.Spam,
    "pytorch_optimizer 4.1.0, AdaGC": published.AdaGC,
    "drytorch": published.HistClipper,
}


@pytest.mark.parametrize("peer", EXACT)
def test_what_is_written_down_is_what_the_package_does(peer):
    norms = noise(300)
    norms[40::29] = [40 * n for n in norms[40::29]]
    got, want = after(EXACT[peer](), norms), after(Peer(PEERS[peer]), norms)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=0)
    assert min(got) < min(norms) or max(got) < max(norms)
