"""The sets of gradients that are timed."""

import torch

_BLOCK = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,)]
_BLOCK += [(3072, 768), (3072,), (768, 3072), (768,)]
GPT2 = [(50257, 768), (1024, 768), *_BLOCK * 12, (768,), (768,)]


def _resnet50():
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for mid, out, blocks in (
        (64, 256, 3),
        (128, 512, 4),
        (256, 1024, 6),
        (512, 2048, 3),
    ):
        for i in range(blocks):
            shapes += [(mid, width, 1, 1), (mid,), (mid,), (mid, mid, 3, 3), (mid,)]
            shapes += [(mid,), (out, mid, 1, 1), (out,), (out,)]
            if i == 0:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (1000, 2048), (1000,)]


SETS = {
    "gpt2": (GPT2, torch.float32),
    "2000 of 64": ([(64,)] * 2000, torch.float32),
    "400 of 128x128": ([(128, 128)] * 400, torch.float32),
    "resnet50": (_resnet50(), torch.float32),
    "20000 of 16": ([(16,)] * 20_000, torch.float32),
    "tiny network": (
        [(64, 8), (64,), (64, 64), (64,), (2, 64), (2,)],
        torch.float32,
    ),
    "small network": (
        [(256, 784), (256,), (256, 256), (256,), (10, 256), (10,)],
        torch.float32,
    ),
    "middle network": (
        [(1024, 784), (1024,), (1024, 1024), (1024,), (10, 1024), (10,)],
        torch.float32,
    ),
    "100 of 20000": ([(20_000,)] * 100, torch.float32),
    "one of 64M": ([(64 << 20,)], torch.float32),
    "gpt2 bfloat16": (GPT2, torch.bfloat16),
    "gpt2 float16": (GPT2, torch.float16),
    "resnet50 float64": (_resnet50(), torch.float64),
}


def parameters(shapes, dtype, scale=1e-3):
    """Return parameters of these shapes with random gradients."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.full(shape, 0.02, dtype=dtype))
        p.grad = (scale * torch.randn(shape, generator=generator)).to(dtype)
        params.append(p)
    return params
