"""Prompts: the file, their order, and that what is cached changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.checks import assert_same_bits
from support.clip import ByteTower
from torch import Tensor

from softdimo_fast.data.order import sample_indices
from softdimo_fast.data.prompts import EncodedPrompts, PromptConditions, PromptFile
from softdimo_fast.diffusion import Draws
from softdimo_fast.models.text_encoders import MaskGenTextEncoder, MeissonicTextEncoder

PROMPTS = [f"a picture of {n} cats" for n in range(13)]
BATCH = 8


# ---------------------------------------------------------------------------------------------------
# the file


def test_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat \r\nnaïve café\n\tone\u2028prompt\n".encode())
    prompts = PromptFile(path)
    assert list(prompts) == ["a cat", "naïve café", "one\u2028prompt"]
    assert (len(prompts), prompts[-1], prompts[:1]) == (3, "one\u2028prompt", ["a cat"])
    assert "a cat" in prompts
    assert repr(prompts).endswith("3 prompts")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\n", "holds no prompt"),
        (b"a\n\nb\n", "line 2: a prompt must not be empty"),
        (b"a\nb\n \n", "line 3: a prompt must not be empty"),
        (b"a\nb\xff\n", r"line 2: prompts must be UTF-8 \(invalid start byte\)"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PromptFile(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        PromptFile(tmp_path / "none")


# ---------------------------------------------------------------------------------------------------
# conditions


@pytest.mark.parametrize("family", [MaskGenTextEncoder, MeissonicTextEncoder])
def test_conditions_are_those_of_the_prompts(family: Any) -> None:
    encoder = family(ByteTower())
    source = PromptConditions(PROMPTS, encoder, BATCH)
    for step in range(4):
        draws = Draws.of(5, step, BATCH)
        numbers = sample_indices(5, step * BATCH, BATCH, len(PROMPTS))
        condition = source(draws)
        assert torch.equal(condition.prompt, numbers)
        texts = [PROMPTS[n] for n in numbers]
        assert source.texts(draws) == texts
        expected = encoder(texts)._replace(prompt=numbers)
        for found, wanted in zip(condition, expected, strict=True):
            assert_same_bits(found, wanted)


def test_every_epoch_shows_each_prompt_once() -> None:
    source = PromptConditions(PROMPTS, MaskGenTextEncoder(ByteTower()), 13)
    for step in range(2):
        assert sorted(source(Draws.of(0, step, 13)).prompt.tolist()) == list(range(13))


@pytest.mark.parametrize("cut", [1, 3])
def test_no_condition_depends_on_the_cut_of_the_batch(cut: int) -> None:
    source = PromptConditions(PROMPTS, MaskGenTextEncoder(ByteTower()), BATCH)
    whole = Draws.of(3, 2, BATCH)
    together = source(whole)
    apart = [source(whole.part(first, cut)) for first in range(0, BATCH, cut)]
    for found, *parts in zip(together, *apart, strict=True):
        assert_same_bits(found, torch.cat(parts))


def test_a_batch_size_that_is_not_the_trainers() -> None:
    source = PromptConditions(PROMPTS, MaskGenTextEncoder(ByteTower()), BATCH)
    with pytest.raises(ValueError, match="batch_size is 8"):
        source(Draws.of(0, 0, 9))
    with pytest.raises(ValueError, match="batch_size must be positive"):
        PromptConditions(PROMPTS, MaskGenTextEncoder(ByteTower()), 0)


# ---------------------------------------------------------------------------------------------------
# the cache


class Recorder:
    """Prompts to their lengths; what a prompt is told depends on its neighbours, as rounding may."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, prompts: Any) -> Tensor:
        self.calls.append(list(prompts))
        return torch.tensor([[float(len(prompt)), float(len(prompts))] for prompt in prompts])


def test_prompts_are_encoded_once_and_always_in_batches_of_one_size() -> None:
    encode = Recorder()
    cache = EncodedPrompts(["", "a", "bb", "ccc", "dddd"], encode, chunk=2)
    assert cache([3, 1, 3, 0])[:, 0].tolist() == [3, 1, 3, 0]
    assert encode.calls == [["ccc", "a"], ["", ""]]
    assert cache([0, 4])[:, 0].tolist() == [0, 4]
    assert encode.calls[2:] == [["dddd", "dddd"]]
    assert cache([4, 4, 3]).unique(dim=0).tolist() == [[3, 2], [4, 2]]
    assert len(encode.calls) == 3


def test_the_least_recently_used_prompt_goes() -> None:
    encode = Recorder()
    cache = EncodedPrompts(["", "a", "bb", "ccc"], encode, capacity=2, chunk=1)
    for numbers in ([0], [1], [0], [2], [0]):
        cache(numbers)
    assert encode.calls == [[""], ["a"], ["bb"]]
    cache([1])
    assert encode.calls[3:] == [["a"]]
    everything = cache([3, 2, 1, 0])  # more than are kept
    assert everything[:, 0].tolist() == [3, 2, 1, 0]
    nothing_kept = EncodedPrompts(["", "a"], encode, capacity=0)
    assert nothing_kept([1, 0, 1])[:, 0].tolist() == [1, 0, 1]


class Shared(NamedTuple):
    own: Tensor
    all: Tensor


def test_what_is_kept_holds_no_whole_batch_and_no_copies_of_what_all_share() -> None:
    null = torch.ones(3, 4, requires_grad=True)

    def encode(prompts: Any) -> Shared:
        return Shared(torch.zeros(len(prompts), 3, 4), null.expand(len(prompts), 3, 4))

    cache = EncodedPrompts(["a", "b", "c"], encode)
    cache([0, 1, 2])
    kept = list(cache._kept.values())
    assert all(row.own.untyped_storage().nbytes() == 3 * 4 * 4 for row in kept)
    assert {row.all.data_ptr() for row in kept} == {null.data_ptr()}
    assert not any(row.all.requires_grad for row in kept)


def test_numbers_that_are_none() -> None:
    cache = EncodedPrompts(["a", "b"], Recorder())
    for number in (-1, 2):
        with pytest.raises(ValueError, match=f"no prompt number {number}: there are 2"):
            cache([0, number])
    with pytest.raises(ValueError, match="at least one prompt"):
        EncodedPrompts([], Recorder())
    with pytest.raises(ValueError, match="capacity must not be negative"):
        EncodedPrompts(["a"], Recorder(), capacity=-1)
    with pytest.raises(ValueError, match="chunk must be positive"):
        EncodedPrompts(["a"], Recorder(), chunk=0)
