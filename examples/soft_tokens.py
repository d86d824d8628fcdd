"""Gradients through tokens: pictures are fitted by optimising token logits through ``soft_embedding``.

A picture is a grid of tokens; a token is one of V patches of 4 x 4 pixels, the codebook. The loss looks
at the decoded picture alone. Three ways to get a gradient to the logits are compared at equal steps: the
soft embedding (Soft-Di[M]O), Gumbel-softmax, and its straight-through form. What counts is the error of
the hard decode, codebook[argmax]. The bound is the best token for every patch, by exhaustive search.

    python examples/soft_tokens.py
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from softdimo_fast import explain, soft_embedding, token_statistics

PATCH, GRID, VOCABULARY, PICTURES, STEPS = 4, 6, 256, 32, 200


def pictures(count: int, generator: torch.Generator) -> Tensor:
    """Rings of random centre, radius and width, ``[count, side, side]`` in [0, 1]."""
    side = PATCH * GRID
    axis = torch.linspace(-1, 1, side)
    centre = torch.rand(2, count, 1, 1, generator=generator) * 0.6 - 0.3
    radius = torch.rand(count, 1, 1, generator=generator) * 0.4 + 0.35
    distance = ((axis[:, None] - centre[0]) ** 2 + (axis - centre[1]) ** 2).sqrt()
    return torch.sigmoid((0.14 - (distance - radius).abs()) * 30)


def patches(images: Tensor) -> Tensor:
    """``[B, side, side]`` -> ``[B, GRID * GRID, PATCH * PATCH]``."""
    cut = images.unflatten(2, (GRID, PATCH)).unflatten(1, (GRID, PATCH))
    return cut.transpose(2, 3).flatten(3).flatten(1, 2)


def decode(embeddings: Tensor) -> Tensor:
    """The inverse of :func:`patches`: the picture that a grid of (expected) patches makes."""
    grid = embeddings.unflatten(2, (PATCH, PATCH)).unflatten(1, (GRID, GRID))
    return grid.transpose(2, 3).flatten(3).flatten(1, 2)


def fit(target: Tensor, codebook: Tensor, **options: Any) -> Tensor:
    """Logits whose decoded picture is near ``target``; options go to ``soft_embedding``."""
    logits = torch.zeros(*target.shape[:1], GRID * GRID, VOCABULARY, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for step in range(STEPS):
        noise = {"seed": step} if "noise" in options else {}
        loss = (
            (decode(soft_embedding(logits, codebook, **options, **noise)) - target).square().sum()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach()


def draw(*images: Tensor) -> str:
    """Pictures side by side, two characters a pixel row."""
    shades = " .:-=+*#%@"
    rows = torch.cat([torch.nn.functional.pad(image, (0, 3)) for image in images], dim=1)[::2]
    return "\n".join(
        "".join(shades[int(v * 9.99)] for v in row.clamp(0, 1).tolist()).rstrip() for row in rows
    )


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    target = pictures(PICTURES, generator)
    pool = patches(pictures(512, generator)).flatten(0, 1)
    codebook = pool[torch.randperm(len(pool), generator=generator)[:VOCABULARY]].contiguous()
    best = codebook[torch.cdist(patches(target), codebook).argmin(-1)]
    print(explain(soft_embedding, torch.zeros(PICTURES, GRID * GRID, VOCABULARY), codebook))
    print(f"\nmean squared error of the hard decode after {STEPS} steps, {PICTURES} pictures")
    print(f"  {'best token per patch (bound)':34}{(decode(best) - target).square().mean():.4f}")
    decoded = {}
    for name, options in {
        "soft embedding": {},
        "Gumbel-softmax": {"noise": "gumbel"},
        "Gumbel-softmax, straight-through": {"noise": "gumbel", "hard": True},
    }.items():
        started = time.perf_counter()
        logits = fit(target, codebook, **options)
        decoded[name] = decode(codebook[logits.argmax(-1)])
        error = (decoded[name] - target).square().mean()
        entropy = token_statistics(logits).entropy.mean()
        seconds = time.perf_counter() - started
        print(f"  {name:34}{error:.4f}   entropy {entropy:.2f} nats   {seconds:.1f} s")
    print("\ntarget, before, after (soft embedding)\n")
    print(draw(target[0], decode(codebook[torch.zeros_like(best[..., 0], dtype=torch.long)])[0],
               decoded["soft embedding"][0]))  # fmt: skip


if __name__ == "__main__":
    main()
