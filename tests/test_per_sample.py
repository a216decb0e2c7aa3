"""Sums of clipped per-sample gradients equal a loop over samples, optax, and ghosts."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.utils.prune
from torch.utils.checkpoint import checkpoint

import gradclip as gc
from gradclip.per_sample import clipped_sum
from gradclip.torch.ghost import PerSample

SAMPLES = 6
RULES = {
    "flat": gc.Norm(1.5),
    "tight": gc.Norm(1e-3),
    "loose": gc.Norm(1e3),
    "per layer": gc.Norm(1.5 / 3**0.5, over="tensor"),
    "AUTO-S": gc.Normalize(eps=0.01),
    "smooth": gc.Smooth(1.0),
}
MAKE = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}


def batch(size=1.0):
    rng = np.random.default_rng(0)
    shapes = [(SAMPLES, 3, 4), (SAMPLES, 5), (SAMPLES,)]
    grads = [rng.normal(size=shape).astype(np.float32) * size for shape in shapes]
    return [
        g
        * np.logspace(-2, 1, SAMPLES, dtype=np.float32)[(...,) + (None,) * (g.ndim - 1)]
        for g in grads
    ]


def by_hand(grads, rule):
    """Return the sum of gradients that were clipped one sample at a time."""
    samples = [[np.asarray(g[i], np.float64) for g in grads] for i in range(SAMPLES)]
    clipped = [gc.clip(sample, rule)[0] for sample in samples]
    return [np.sum([c[k] for c in clipped], axis=0) for k in range(len(grads))]


@pytest.mark.parametrize("library", MAKE)
@pytest.mark.parametrize("name", RULES)
def test_equal_to_a_loop_over_samples(library, name):
    grads = batch()
    got, info = clipped_sum([MAKE[library](g) for g in grads], RULES[name])
    for a, b in zip(got, by_hand(grads, RULES[name]), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=2e-5, atol=1e-6)
    assert info.norm.shape[-1] == SAMPLES


@pytest.mark.parametrize("limit", [0.01, 1.5, 1e3])
def test_equal_to_optax(limit):
    grads = [jnp.asarray(g) for g in batch()]
    want, clipped = optax.per_example_global_norm_clip(grads, limit)
    got, info = clipped_sum(grads, gc.Norm(limit))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert int((info.scale < 1).sum()) == int(clipped)
    want, _ = optax.per_example_layer_norm_clip(grads, limit, uniform=True)
    got, _ = clipped_sum(grads, gc.Norm(limit / 3**0.5, over="tensor"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("library", MAKE)
@pytest.mark.parametrize("over", ["all", "tensor"])
def test_a_broken_sample_adds_nothing(library, over):
    grads = batch()
    grads[1][2, 0] = np.nan
    total, info = clipped_sum(
        [MAKE[library](g) for g in grads], gc.Norm(1.0, over=over)
    )
    assert not bool(info.finite)
    others = [np.delete(g, 2, axis=0) for g in grads]
    want, _ = clipped_sum(others, gc.Norm(1.0, over=over))
    np.testing.assert_allclose(np.asarray(total[1]), want[1], rtol=1e-5)


def test_samples_of_any_size():
    for size in (1e-30, 1e20):
        grads = [jnp.asarray(g) for g in batch(size)]
        _, info = clipped_sum(grads, gc.Norm(1.0))
        exact = np.sqrt(
            sum((g.astype(float).reshape(SAMPLES, -1) ** 2).sum(1) for g in batch(size))
        )
        np.testing.assert_allclose(info.norm, exact, rtol=1e-5)


def test_what_is_refused():
    with pytest.raises(TypeError, match="no memory"):
        clipped_sum(np.ones((2, 3)), gc.ZScore())
    with pytest.raises(ValueError, match="such as"):
        clipped_sum(np.ones((2, 3)), gc.Value(1.0))
    with pytest.raises(ValueError, match=r"shapes \(2, 3\), \(3,\)"):
        clipped_sum([np.ones((2, 3)), np.ones(3)], gc.Norm(1.0))


class Bag(torch.nn.Module):
    """Embedding, normalisation, a layer on sequences and one on vectors."""

    def __init__(self, padding_idx=None):
        super().__init__()
        self.words = torch.nn.Embedding(7, 4, padding_idx=padding_idx)
        self.norm = torch.nn.LayerNorm(4)
        self.inner = torch.nn.Linear(4, 3)
        self.outer = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(self.norm(self.words(x)))).mean(1))


class Picture(torch.nn.Module):
    """A convolution, whose per-sample gradients are formed."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.head = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.conv(x[:, None].double()).mean((2, 3)))


def data(kind):
    torch.manual_seed(0)
    shape = {"bag": (5, 9), "short": (5, 2), "picture": (5, 6, 6)}[kind]
    return torch.randint(0, 7, shape), torch.randint(0, 2, (5,))


@pytest.mark.parametrize("kind", ["bag", "short", "picture"])
@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("rule", [gc.Norm(0.1), gc.Norm(1e3), gc.Normalize(eps=0.01)])
def test_ghosts_equal_per_sample_gradients(kind, padding, rule):
    x, y = data(kind)
    torch.manual_seed(1)
    model = Picture() if kind == "picture" else Bag(padding)
    model.double()
    loss = torch.nn.CrossEntropyLoss(reduction="none")

    def one(params, x, y):
        out = torch.func.functional_call(model, params, (x[None],))
        return loss(out, y[None])[0]

    params = {n: p.detach() for n, p in model.named_parameters()}
    rows = [torch.func.grad(one)(params, a, b) for a, b in zip(x, y, strict=True)]
    each = {n: torch.stack([row[n] for row in rows]) for n in params}
    want, exact = clipped_sum(each, rule)
    with PerSample(model) as samples:
        info = samples.backward(loss(model(x), y), rule)
    torch.testing.assert_close(info.norm, exact.norm, rtol=1e-9, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-9, atol=1e-12)


class Times(torch.nn.Module):
    """Change what goes in, as an activation in place does."""

    def forward(self, x):
        return x.mul_(10.0)


class Tokens(torch.nn.Module):
    """One index for each sample, and a layer whose output nobody uses."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 6)
        self.head, self.unused = torch.nn.Linear(6, 2), torch.nn.Linear(6, 2)

    def forward(self, x):
        hidden = self.embedding(x.to(torch.int64).flatten())
        self.unused(hidden)
        return self.head(hidden)


@pytest.mark.parametrize("behind", [Times(), torch.nn.SiLU(inplace=True), "tokens"])
def test_ghosts_see_gradients_where_the_layer_ends(behind):
    torch.manual_seed(0)
    linear = torch.nn.Linear
    model = (
        Tokens()
        if behind == "tokens"
        else torch.nn.Sequential(linear(5, 6), behind, linear(6, 2))
    )
    x = torch.tensor([[1.0], [2.0], [1.0]]) if behind == "tokens" else torch.randn(3, 5)
    with PerSample(model) as samples:
        info = samples.backward(model(x).square().sum(1), gc.Norm(1.0))
    for i in range(3):
        model.zero_grad()
        model(x[i : i + 1].clone()).square().sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        norm = torch.cat(grads).double().norm()
        torch.testing.assert_close(info.norm[i], norm, rtol=1e-5, atol=0)


def test_ghosts_refuse_a_layer_without_samples():
    model = torch.nn.Embedding(4, 3)
    with PerSample(model) as samples:
        losses = (torch.ones(2, 4, 3) * model(torch.arange(4))).sum((1, 2))
        with pytest.raises(ValueError, match=r"called with 4 samples, and there are 2"):
            samples.backward(losses, gc.Norm(1.0))


LIBRARIES = pytest.mark.parametrize("make", [np.array, jnp.array, torch.tensor])


@LIBRARIES
def test_a_bad_sample_adds_nothing_to_any_array(make):
    grads = [make([[math.nan], [1.0]]), make([[1.0], [1.0]])]
    for over in ("all", "tensor"):
        sums, info = clipped_sum(grads, gc.Norm(9.0, over=over))
        assert [float(x[0]) for x in sums] == [1.0, 1.0]
        assert not np.asarray(info.finite)


@LIBRARIES
def test_a_random_batch_may_be_empty(make):
    grads = [make(np.zeros((0, 3, 2))), make(np.zeros((0,)))]
    for over in ("all", "tensor"):
        sums, _ = clipped_sum(grads, gc.Norm(1.0, over=over))
        assert [tuple(x.shape) for x in sums] == [(3, 2), ()]
        assert all(float(x.sum()) == 0 for x in sums)


def test_ghosts_see_every_pass_of_a_loop():
    """From the second one on, nothing was clipped."""
    model = torch.nn.Linear(2, 1, bias=False)
    x = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    with PerSample(model) as samples:
        for _ in range(3):
            model.zero_grad()
            info = samples.backward(model(x).squeeze(1), gc.Norm(1.0))
            assert info.norm.tolist() == [5.0, 50.0]
            torch.testing.assert_close(model.weight.grad, torch.tensor([[1.2, 1.6]]))
        with pytest.raises(ValueError, match="2-norms"):
            samples.backward(model(x).squeeze(1), gc.Norm(1.0, p=1.0))
    losses = model(x).squeeze(1)
    with pytest.raises(ValueError, match="outside of its `with`"):
        samples.backward(losses, gc.Norm(1.0))
    with PerSample(model) as samples, pytest.raises(ValueError, match="called before"):
        samples.backward(losses, gc.Norm(1.0))


class Tied(torch.nn.Module):
    """A head that uses the weight of the embedding, which may not be called itself."""

    def __init__(self, called):
        super().__init__()
        self.embedding, self.called = torch.nn.Embedding(5, 3), called

    def forward(self, x):
        hidden = self.embedding(x) if self.called else self.embedding.weight[x]
        return torch.nn.functional.linear(hidden, self.embedding.weight)


@pytest.mark.parametrize("called", [True, False])
def test_ghosts_refuse_a_weight_that_a_function_uses(called):
    model = Tied(called)
    with PerSample(model) as samples:
        losses = model(torch.arange(4)).square().sum(1)
        with pytest.raises(ValueError, match="used beside the layer"):
            samples.backward(losses, gc.Norm(1.0))
    assert model.embedding.weight.grad is None


class Twice(torch.nn.Module):
    """A weight that a function uses beside its layer."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4)

    def forward(self, x):
        return torch.nn.functional.linear(torch.relu(self.a(x)), self.a.weight)


@pytest.mark.parametrize("amp", [True, False])
def test_ghosts_refuse_a_weight_that_is_converted_once_for_two_uses(amp):
    model = Twice()
    with PerSample(model) as samples, torch.autocast("cpu", torch.bfloat16, amp):
        losses = model(torch.randn(3, 4)).square().sum(1)
        with pytest.raises(ValueError, match="used beside the layer"):
            samples.backward(losses, gc.Norm(1.0))


def test_ghosts_refuse_a_penalty_on_gradients():
    model = torch.nn.Linear(4, 1)
    x = torch.randn(3, 4, requires_grad=True)
    with PerSample(model) as samples:
        out = torch.tanh(model(x)).squeeze(1)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(ValueError, match="used beside the layer"):
            samples.backward(out + g.square().sum(1), gc.Norm(1.0))


@pytest.mark.parametrize("amp", [True, False])
def test_ghosts_take_embeddings_and_sequences_under_autocast(amp):
    model = torch.nn.Sequential(torch.nn.Embedding(7, 5), torch.nn.Linear(5, 3))
    with PerSample(model) as samples, torch.autocast("cpu", torch.bfloat16, amp):
        out = model(torch.arange(6).view(2, 3))
        info = samples.backward((out + out).square().sum((1, 2)), gc.Norm(1.0))
    assert info.finite


def test_ghosts_refuse_gradients_that_depend_on_other_samples():
    with pytest.raises(ValueError, match="scale_grad_by_freq mixes samples"):
        PerSample(torch.nn.Embedding(5, 3, scale_grad_by_freq=True))


def test_ghosts_refuse_what_they_cannot_do():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with PerSample(model) as samples:
        losses = model(torch.ones(3, 2)).sum(1)
        with pytest.raises(ValueError, match="one loss per sample"):
            samples.backward(losses.mean(), gc.Norm(1.0))
        with pytest.raises(ValueError, match="over 'all'"):
            samples.backward(losses, gc.Norm(1.0, over="tensor"))
    with PerSample(model), pytest.raises(ValueError, match="called twice"):
        model[0](model(torch.ones(3, 2)))
    model[0].weight = model[1].weight
    with pytest.raises(ValueError, match="share a parameter"):
        PerSample(model)


class Masked(torch.nn.Module):
    """A parameter beside a layer, and an input that may come by name."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))

    def forward(self, x, mask=1.0):
        return x * self.scale * mask


OTHER_CALLS = {
    "name": (Masked(), lambda m, x: m(x, mask=x), r"\(Tensor, mask=Tensor\) and ret"),
    "number": (Masked(), lambda m, x: m(x, 2.0), r"\(Tensor, float\) and returns Ten"),
    "only names": (torch.nn.Linear(4, 4), lambda m, x: m(input=x), r"\(input=Tensor\)"),
    "tuple": (torch.nn.GRU(4, 4), lambda m, x: m(x)[0], "returns tuple.*as through nn"),
    "twice": (torch.nn.Linear(4, 4), lambda m, x: m(m(x)), "is called twice, so"),
}


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_ghosts_say_which_call_they_cannot_follow(call):
    model, use, told = OTHER_CALLS[call]
    with PerSample(model), pytest.raises(ValueError, match=told):
        use(model, torch.randn(3, 4))


def equal_to_a_loop(model, x, limit=0.5):
    """See that norms, and what is let through, are those of a loop over samples."""
    params = [p for p in model.parameters() if p.requires_grad]
    with PerSample(model) as samples:
        info = samples.backward(model(x).square().flatten(1).sum(1), gc.Norm(limit))
    got = [p.grad for p in params]
    each = []
    for i in range(len(x)):
        loss = model(x[i : i + 1]).square().sum()
        each.append(torch.autograd.grad(loss, params))
    want, exact = clipped_sum(
        [torch.stack(g) for g in zip(*each, strict=True)], gc.Norm(limit)
    )
    torch.testing.assert_close(info.norm, exact.norm, rtol=1e-5, atol=0)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def pruned():
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    return torch.nn.utils.prune.random_unstructured(layer, "weight", 0.5)


def normed():
    layer = torch.nn.utils.weight_norm(torch.nn.Linear(4, 3))
    layer.weight_g.data *= 3
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("make", [pruned, normed])
def test_a_weight_that_is_made_of_parameters_is_no_ghost(make):
    layer = make()
    with PerSample(layer) as samples:
        samples.backward(layer(torch.randn(5, 4)).square().sum(1), gc.Norm(1.0))
    # Not one of those that the gradients were formed with.
    assert layer.weight.sum().requires_grad
    layer.zero_grad()
    equal_to_a_loop(layer, torch.randn(5, 4))


@pytest.mark.parametrize("where", ["before", "behind", "both"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_hooks_of_others_are_taken_into_account(kind, where):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4) if kind == "linear" else torch.nn.Conv1d(4, 4, 1)
    x = torch.randn(5, 4) if kind == "linear" else torch.randn(5, 4, 3)
    if where != "behind":
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3,))
    if where != "before":
        layer.register_forward_hook(lambda _, inputs, output: output.square() * 2)
    equal_to_a_loop(layer, x)


USED_BESIDE = {
    "function": lambda m, x: m(x) + torch.nn.functional.conv1d(x, m[0].weight),
    "function before": lambda m, x: m(torch.nn.functional.conv1d(x, m[0].weight)),
    "decay": lambda m, x: m(x) + m[0].weight.square().sum(),
    "decay of a norm": lambda m, x: m(x) + m[1].weight.square().sum(),
}


@pytest.mark.parametrize("use", USED_BESIDE)
def test_ghosts_refuse_another_use_of_what_a_layer_has_formed(use):
    model = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1), torch.nn.LayerNorm(3))
    with PerSample(model) as samples:
        out = USED_BESIDE[use](model, torch.randn(5, 4, 3))
        with pytest.raises(ValueError, match="used beside the layer"):
            samples.backward(out.square().sum((1, 2)), gc.Norm(1.0))


class Again(torch.nn.Module):
    """A parameter that its layer uses several times, around another layer."""

    def __init__(self):
        super().__init__()
        self.size, self.inner = torch.nn.Parameter(torch.ones(4)), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x * self.size) * self.size.exp() + self.size


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_may_use_its_parameters_as_it_likes(first):
    torch.manual_seed(0)
    layers = [] if first else [torch.nn.Linear(4, 4)]
    equal_to_a_loop(torch.nn.Sequential(*layers, Again()), torch.randn(5, 4))


def test_ghosts_follow_what_is_unfrozen():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    x, limit = torch.randn(5, 4), 0.1
    with (samples := PerSample(model)):
        samples.backward(model(x).square().sum(1), gc.Norm(limit))
        model[0].requires_grad_(True)
        with pytest.raises(ValueError, match="or was unfrozen since"):
            samples.backward(model(x).square().sum(1), gc.Norm(limit))
    model.zero_grad()
    with samples:
        samples.backward(model(x).square().sum(1), gc.Norm(limit))
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(total) <= 5 * limit * (1 + 1e-5)


def test_ghosts_say_that_compiled_code_shows_no_calls():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 4)
    compiled(x)
    with PerSample(model) as samples:
        losses = compiled(x).square().sum(1)
        with pytest.raises(ValueError, match="compiled code"):
            samples.backward(losses, gc.Norm(1.0))


@pytest.mark.parametrize("kind", [torch.nn.Linear, torch.nn.Bilinear])
def test_ghosts_refuse_complex_parameters(kind):
    sizes = (4, 2) if kind is torch.nn.Linear else (4, 4, 2)
    with pytest.raises(ValueError, match=r"complex parameters.*clipped_sum"):
        PerSample(kind(*sizes, dtype=torch.complex64))
    grads = torch.tensor([[3.0 + 4.0j], [0.1j]])
    assert clipped_sum([grads], gc.Norm(1.0))[1].norm.tolist() == [
        5.0,
        pytest.approx(0.1),
    ]


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: torch.no_grad()(m)(x),
        lambda m, x: checkpoint(m, x, use_reentrant=True),
    ],
)
def test_ghosts_refuse_a_call_without_a_graph(call):
    model, x = torch.nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    with PerSample(model), pytest.raises(ValueError, match="use_reentrant=False"):
        call(model, x)


def test_ghosts_go_through_checkpoints():
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(4, 4), Again())
    x, limit = torch.randn(5, 4), gc.Norm(0.5)
    with PerSample(inner) as samples:
        expected = samples.backward(inner(x).square().sum(1), limit)
        out = checkpoint(inner, x, use_reentrant=False)
        got = samples.backward(out.square().sum(1), limit)
    torch.testing.assert_close(got.norm, expected.norm)


class Dropping(torch.nn.Module):
    """A parameter beside a dropout, as of a transformer's embedding."""

    def __init__(self):
        super().__init__()
        self.place, self.drop = torch.nn.Parameter(torch.ones(4)), torch.nn.Dropout()

    def forward(self, x):
        return self.drop(x + self.place)


@pytest.mark.parametrize(
    "layer",
    [Dropping(), torch.nn.InstanceNorm1d(4, affine=True, track_running_stats=True)],
)
def test_ghosts_refuse_a_layer_that_cannot_be_called_for_one_sample(layer):
    with PerSample(layer) as samples:
        losses = layer(torch.randn(3, 4, 4)).square().sum((1, 2))
        with pytest.raises(ValueError, match="for one sample at a time"):
            samples.backward(losses, gc.Norm(1.0))
    assert all(p.grad is None for p in layer.parameters())


class Positions(torch.nn.Module):
    """Words and where they stand; `expand` gives each sample its own positions."""

    def __init__(self, expand):
        super().__init__()
        self.words, self.places = torch.nn.Embedding(9, 4), torch.nn.Embedding(5, 4)
        self.expand = expand

    def forward(self, x):
        places = torch.arange(x.shape[1])
        return self.words(x) + self.places(
            places.expand(x.shape) if self.expand else places
        )


def test_ghosts_see_that_a_row_is_no_sample_also_where_there_are_as_many():
    torch.manual_seed(0)
    x = torch.randint(0, 9, (5, 5))
    equal_to_a_loop(Positions(expand=True), x)
    first, model = torch.nn.Linear(4, 4), Positions(expand=False)
    with PerSample(model) as samples:
        losses = model(x).square().sum((1, 2))
        with pytest.raises(
            ValueError, match=r"behind Embedding\(5, 4\).*expand\(batch"
        ):
            samples.backward(losses, gc.Norm(1.0))
    assert all(p.grad is None for p in model.parameters())
    with PerSample(first) as samples:
        out = first(torch.randn(6, 6, 4))
        with pytest.raises(ValueError, match="with the batch first"):
            samples.backward(out.square().sum((0, 2)), gc.Norm(1.0))


def test_ghosts_see_samples_that_meet():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 4), torch.randn(6, 4)
    with PerSample(model) as samples:
        out = model(x)
        losses = torch.nn.functional.cross_entropy(
            out @ out.T, torch.arange(6), reduction="none"
        )
        with pytest.raises(ValueError, match="samples meet behind Linear"):
            samples.backward(losses, gc.Norm(1.0))


class Energy(torch.nn.Module):
    """One number for each sample."""

    def __init__(self):
        super().__init__()
        self.size = torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x @ self.size


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ghosts_take_batches_of_any_size_and_losses_as_they_are(count):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Energy())
    with PerSample(model) as samples:
        info = samples.backward(model(torch.ones(count, 4)), gc.Norm(1.0))
    assert info.norm.shape == (count,)
    assert model[1].size.grad is not None


def test_rounding_is_no_sign_of_samples_that_meet():
    """The losses are constant in the convolution, whose gradient is rounding alone."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1), torch.nn.LayerNorm(5))
    with PerSample(model) as samples, torch.autocast("cpu", torch.bfloat16):
        losses = model(torch.randn(3, 4, 5)).float().square().sum((1, 2))
        assert samples.backward(losses, gc.Norm(1.0)).finite
