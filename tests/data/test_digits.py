"""The digits: real scans, the promised split, and a clear error without scikit-learn."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
import torch
from sklearn import datasets, model_selection
from support.process import run_python

from softdimo_fast.data.digits import LabelledImages, load_digits, parity


def test_shapes_dtypes_and_range() -> None:
    split = load_digits()
    for part, count in ((split.train, 1297), (split.held_out, 500)):
        assert part.images.shape == (count, 1, 8, 8)
        assert part.images.dtype == torch.float32
        assert part.digits.shape == (count,)
        assert part.digits.dtype == torch.int64
        assert len(part) == count
        assert float(part.images.min()) == -1
        assert float(part.images.max()) == 1


def test_the_split_is_scikit_learns_and_never_changes() -> None:
    split = load_digits()
    bunch = datasets.load_digits()
    pixels, held_out_pixels, digits, held_out_digits = model_selection.train_test_split(
        bunch.images, bunch.target, test_size=500, stratify=bunch.target, random_state=0
    )
    for part, images, labels in (
        (split.train, pixels, digits), (split.held_out, held_out_pixels, held_out_digits)
    ):  # fmt: skip
        assert np.array_equal((part.images[:, 0].numpy() + 1) * 8, images)
        assert np.array_equal(part.digits.numpy(), labels)
    # Of the held-out pixels: a library that shuffles differently must not go unnoticed.
    digest = hashlib.sha256(held_out_pixels.astype(np.uint8).tobytes()).hexdigest()
    assert digest[:16] == "6b259e4b4d2cd106"


def test_the_split_is_stratified_and_disjoint() -> None:
    split = load_digits()
    whole = torch.bincount(torch.cat([split.train.digits, split.held_out.digits])) / 1797
    for part in (split.train, split.held_out):
        shares = torch.bincount(part.digits, minlength=10) / len(part)
        assert float((shares - whole).abs().max()) < 1 / 500
    both = torch.cat([split.train.images, split.held_out.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(datasets.load_digits().images) == len(both)


def test_parity_is_the_condition() -> None:
    labelled = LabelledImages(torch.zeros(10, 1, 8, 8), torch.arange(10))
    assert labelled.parity.tolist() == [0, 1] * 5
    assert parity(torch.tensor([7, 8])).tolist() == [1, 0]


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "softdimo-fast\[demo\]"'):
        load_digits()


def test_importing_the_packages_does_not_import_scikit_learn() -> None:
    code = (
        "import sys, softdimo_fast.data, softdimo_fast.metrics, softdimo_fast.rewards; "
        "print(sorted({'sklearn', 'scipy', 'PIL', 'matplotlib', 'torchmetrics'} & set(sys.modules)))"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
