"""The sizes that are measured: those of the published teachers, and some that are awkward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Named sizes.

    Attributes:
        name: as filters and files have it.
        title: as a reader has it.
        cpu: sizes by letter. N rows, V vocabulary, D width, G groups, H hidden width; for attention B
            samples, H heads, L tokens, d head width.
        cuda: what is different on a GPU: the rows of a training step there.
        tiny: what is different in the tests, which only look whether all of it works.
    """

    name: str
    title: str
    cpu: Mapping[str, int]
    cuda: Mapping[str, int]
    tiny: Mapping[str, int]

    def sizes(self, device: str, *, tiny: bool = False) -> dict[str, int]:
        """The sizes on a kind of device, ``"cpu"`` or ``"cuda"``."""
        sizes = dict(self.cpu)
        if device == "cuda":
            sizes.update(self.cuda)
        if tiny:
            sizes.update(self.tiny)
        return sizes


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "maskgit", "MaskGIT",
            {"N": 4096, "V": 1024, "D": 768, "H": 768}, {"N": 16384},
            {"N": 24, "V": 40, "D": 12, "H": 8},
        ),
        Shape(
            "maskbit", "MaskBit",
            {"N": 8192, "G": 2, "V": 128, "D": 7}, {"N": 16384}, {"N": 24, "V": 16},
        ),
        Shape(
            "maskgen-64", "MaskGen",
            {"N": 2048, "V": 8192, "D": 64, "H": 1024}, {"N": 8192},
            {"N": 16, "V": 72, "D": 8, "H": 12},
        ),
        Shape(
            "maskgen-1024", "MaskGen",
            {"N": 2048, "V": 8192, "D": 1024, "H": 1024}, {"N": 8192},
            {"N": 16, "V": 72, "D": 20, "H": 12},
        ),
        Shape(
            "meissonic-64", "Meissonic",
            {"N": 4096, "V": 8192, "D": 64}, {"N": 32768}, {"N": 16, "V": 72, "D": 8},
        ),
        Shape(
            "meissonic-1024", "Meissonic",
            {"N": 4096, "V": 8192, "D": 1024}, {"N": 32768}, {"N": 16, "V": 72, "D": 20},
        ),
        Shape(
            "digits", "digits",
            {"N": 1024, "V": 128, "D": 64}, {}, {"N": 24, "V": 16, "D": 8},
        ),
        Shape(
            "v1025", "MaskGIT + mask column",
            {"N": 4096, "V": 1025, "D": 768}, {"N": 16384}, {"N": 24, "V": 41, "D": 12},
        ),
        Shape(
            "v16384", "V 16384",
            {"N": 1024, "V": 16384, "D": 8}, {"N": 8192}, {"N": 16, "V": 144, "D": 8},
        ),
        Shape(
            "one-image", "MaskGIT, one image",
            {"N": 256, "V": 1024, "D": 768}, {}, {"N": 8, "V": 40, "D": 12},
        ),
        Shape(
            "attention", "attention",
            {"B": 8, "H": 12, "L": 256, "d": 64}, {"B": 64}, {"B": 2, "H": 2, "L": 16, "d": 8},
        ),
    )
}  # fmt: skip
