"""Break one verb or one line of the pipeline, and a law must fail: the tests can see.

Each mutation runs in a process of its own, so that nothing of it stays behind.
"""

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from gradclip import backends, decision, rules
from gradclip.torch import norms, verbs

NUMPY = "test_twins.py::test_numpy_equals_twin"
TORCH = "test_twins.py::test_torch_equals_twin"
ATTACH, LAWS = "test_attach.py", "test_laws.py"
MUTATIONS = {
    "the formula": (
        NUMPY + "[norm]",
        "decision.clip_scale = lambda norm, limit, xp, most=1.0: "
        "xp.where(norm > limit, limit / norm * 1.01, 1.0)",
    ),
    "NumPy.norm": (
        NUMPY + "[norm]",
        "backends.NumPy.norm = lambda self, x, p: np.sqrt(np.sum(np.abs(x)))",
    ),
    "NumPy._product": (
        NUMPY + "[norm]",
        "backends.NumPy._product = lambda self, x, factor: x",
    ),
    "NumPy.clamped": (
        NUMPY + "[value]",
        "backends.NumPy.clamped = lambda self, x, limit: x",
    ),
    "Backend.unit_norms": (
        NUMPY + "[norm-unit]",
        "backends.Backend.unit_norms = lambda self, x, p: "
        "self.row_norms(self.xp.reshape(x, (1, -1)), p).repeat(self.units(x))",
    ),
    "Backend.spread": (
        NUMPY + "[norm-tensor]",
        "spread = backends.Backend.spread; backends.Backend.spread = "
        "lambda self, s, leaves, over: spread(self, s, leaves, over)[::-1]",
    ),
    "Backend.each": (NUMPY + "[sign]", "backends.Backend.each = lambda self, x, s: x"),
    "Backend.discard": (
        NUMPY + "[norm]",
        "backends.Backend.discard = lambda self, leaves, finite: leaves",
    ),
    "TorchArrays.times": (
        LAWS + "::test_backends_agree",
        "backends.TorchArrays.times = lambda self, x, scale: x",
    ),
    "host_total": (
        TORCH,
        "norms.host_total = lambda tensors, p: "
        "norms.tensor_norms(tensors, p).max().item()",
    ),
    "tensor_norms": (
        TORCH,
        "norms.tensor_norms = lambda tensors, p: torch.ones(len(tensors)).double()",
    ),
    "unit_norms": (
        TORCH,
        "norms._unit_norms = lambda t, p: norms.exact_norm(t, p)"
        ".repeat(len(norms.as_units(t)))",
    ),
    "InPlace.multiply": (
        TORCH,
        "verbs.InPlace.multiply = lambda self, leaves, scale, over: leaves",
    ),
    "InPlace.clamp": (
        TORCH,
        "verbs.InPlace.clamp = lambda self, leaves, limit: leaves",
    ),
    "InPlace.each": (TORCH, "verbs.InPlace.each = lambda self, leaves, scale: leaves"),
    "ZScore": (
        NUMPY + "[zscore]",
        "rules.ZScore.update = lambda self, seen, state: (seen.norm * 0 + 1.0, state)",
    ),
    "Percentile": (
        NUMPY + "[percentile]",
        "rules.Percentile.update = lambda self, seen, state: "
        "(seen.norm * 0 + 1.0, state)",
    ),
    "skipping": (
        ATTACH + "::test_skip_changes_nothing",
        "attach.Attached._keep_gradients = lambda self: None",
    ),
    "the fused route": (
        ATTACH + "::test_equals_clip_then_step",
        "attach.Attached._set_flags = lambda self, *args: None",
    ),
    "the loss scale": (
        ATTACH + "::test_grad_scaler",
        "measure = verbs.InPlace.measure; verbs.InPlace.measure = verbs.InPlace.weigh",
    ),
    "the loss scale of one number": (
        ATTACH + "::test_grad_scaler",
        "verbs.OneNumber.measure = lambda self, leaves, over, p: "
        "np.float64(norms.host_total(leaves, p))",
    ),
}
BROKEN = 99
QUIET = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
# Its copies start with torch imported, which takes longer than most of the tests.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["gradclip.torch"])


def run(mutation, tests, report):
    """Break what is told, run the tests, and leave with pytest's code."""
    names = {
        "np": np,
        "torch": torch,
        "backends": backends,
        "decision": decision,
        "rules": rules,
        "norms": norms,
        "verbs": verbs,
        "attach": sys.modules["gradclip.torch.attach"],
    }
    # An exception must not look like a test that fails, whose code is 1.
    code = BROKEN
    # One example that fails is enough; the smallest would take longer to find.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("first", phases=phases)
    hypothesis.settings.load_profile("first")
    try:
        exec(mutation, names)
        with report.open("w") as out, contextlib.redirect_stdout(out):
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *QUIET, tests])
    finally:
        os._exit(code)


def outcome(tests, mutation, folder):
    """Return the code that pytest leaves with, and what it said."""
    where, report = str(Path(__file__).parent / tests), folder / "report.txt"
    process = SERVER.Process(target=run, args=(mutation, where, report))
    process.start()
    process.join()
    return process.exitcode, report.read_text()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_verb_fails_a_law(name, tmp_path):
    code, said = outcome(*MUTATIONS[name], tmp_path)
    assert code == pytest.ExitCode.TESTS_FAILED, said[-2000:]


def test_without_a_mutation_the_same_tests_pass(tmp_path):
    code, said = outcome(NUMPY + "[norm]", "pass", tmp_path)
    assert code == pytest.ExitCode.OK, said[-2000:]
