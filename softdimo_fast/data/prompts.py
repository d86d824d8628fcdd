"""Prompts to train on without images: a text file, and the conditions that a text encoder makes of it.

A condition carries the number of its prompt in the file (``condition.prompt``). A reward that reads the words
(:mod:`softdimo_fast.rewards.clip`) is built with the same prompts and finds them by that number, so that
conditions stay plain tensors, whatever is done to a batch.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from softdimo_fast._files import write_atomically
from softdimo_fast.data.source import step_rows
from softdimo_fast.diffusion.draws import Draws, send
from softdimo_fast.models.conditions import Condition, concatenate, map_condition, rows

BYTE_ORDER_MARK = "\ufeff"


class PromptFile(Sequence[str]):
    """The prompts of a text file, UTF-8, one a line; prompt i is line i + 1.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the file. White space around a prompt is no part of it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not UTF-8, holds no prompt, or a line is empty; the message names the line.
        """
        self.path = Path(path)
        try:
            text = self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ValueError(
                f"{path}, line {line}: prompts must be UTF-8 ({error.reason})"
            ) from error
        # Only line feeds end a line: a prompt may hold what str.splitlines takes for an end of line.
        lines = text.removeprefix(BYTE_ORDER_MARK).removesuffix("\n").split("\n")
        self._prompts = [line.strip() for line in lines]
        if self._prompts == [""]:
            raise ValueError(f"{path} holds no prompt")
        if "" in self._prompts:
            raise ValueError(
                f"{path}, line {self._prompts.index('') + 1}: a prompt must not be empty (the model would be "
                "told what guidance tells it for 'no condition')"
            )

    @classmethod
    def write(cls, path: str | Path, prompts: Sequence[str]) -> PromptFile:
        """Makes a file, whole or not at all, and opens it.

        Raises:
            ValueError: there is no prompt, or one is empty.
            OSError: it could not be written.
        """
        write_atomically(Path(path), "".join(f"{prompt}\n" for prompt in prompts).encode())
        return cls(path)

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._prompts[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._prompts)

    def __repr__(self) -> str:
        return f"PromptFile({str(self.path)!r}), {len(self)} prompts"


def prompts_digest(prompts: Sequence[str]) -> str:
    """The sha256 of the prompts, a line feed behind each: a token file whose labels number them holds it."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt}\n".encode())
    return digest.hexdigest()


class EncodedPrompts:
    """What an encoder makes of numbered prompts, the most recent ones kept.

    Prompts that are not kept are encoded in batches of always ``chunk`` of them, the last one filled up: the
    same matrix sizes give a prompt the same bits, whichever prompts it is encoded with. A resumed run, whose
    cache is empty, therefore goes on as the one that was stopped.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encode: Callable[[Sequence[str]], Condition],
        *,
        capacity: int = 1024,
        chunk: int = 16,
    ) -> None:
        """
        Args:
            prompts: all of them.
            encode: prompts -> a tensor or a NamedTuple of tensors, prompts first.
            capacity: how many prompts are kept. Of MaskGen one takes 0.5 MB, of Meissonic 0.3 MB.
            chunk: how many are encoded at a time.

        Raises:
            ValueError: there is no prompt, or a number is out of range.
        """
        if not len(prompts):
            raise ValueError("EncodedPrompts: prompts must hold at least one prompt")
        if capacity < 0:
            raise ValueError(f"EncodedPrompts: capacity must not be negative, got {capacity}")
        if chunk < 1:
            raise ValueError(f"EncodedPrompts: chunk must be positive, got {chunk}")
        self.prompts, self._encode = prompts, encode
        self._capacity, self._chunk = capacity, chunk
        self._kept: OrderedDict[int, Condition] = OrderedDict()

    def __call__(self, numbers: Sequence[int]) -> Condition:
        """Of prompts number ``numbers``, in that order, at least one; they may repeat.

        Raises:
            ValueError: there is no such prompt.
        """
        for number in numbers:
            if not 0 <= number < len(self.prompts):
                raise ValueError(
                    f"there is no prompt number {number}: there are {len(self.prompts)}, counted from 0"
                )
        wanted = dict.fromkeys(numbers)
        found = {number: self._kept[number] for number in wanted if number in self._kept}
        missing = [number for number in wanted if number not in found]
        for first in range(0, len(missing), self._chunk):
            found |= self._encoded(missing[first : first + self._chunk])
        for number in wanted:  # the most recently used one stands last
            self._kept[number] = found[number]
            self._kept.move_to_end(number)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return concatenate(*(found[number] for number in numbers))

    def _encoded(self, numbers: list[int]) -> dict[int, Condition]:
        texts = [self.prompts[number] for number in numbers]
        with torch.no_grad():
            batch = self._encode(texts + [texts[-1]] * (self._chunk - len(texts)))
        return {
            number: map_condition(_own, rows(batch, slice(i, i + 1)))
            for i, number in enumerate(numbers)
        }


def _own(row: Tensor) -> Tensor:
    """``row``, without the batch that it was cut from.

    What all prompts share (the text of the empty prompt, expanded from one row) is not copied.
    """
    row = row.detach()
    return row if row.untyped_storage().nbytes() == row.nbytes else row.clone()


class PromptConditions:
    """The conditions of a text-to-image run: which prompt a sample has is a function of the sample's number.

    The prompts are visited as the images of a :class:`~softdimo_fast.data.source.TokenSource` are: every
    epoch each once, in an order that only the run's seed decides.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encoder: Callable[[Sequence[str]], Condition],
        batch_size: int,
        *,
        capacity: int = 1024,
        chunk: int = 16,
    ) -> None:
        """
        Args:
            prompts: a :class:`PromptFile`, or a list.
            encoder: a :class:`~softdimo_fast.models.text_encoders.TextEncoder`; conditions with a field
                ``prompt`` get the prompts' numbers there.
            batch_size: the global one, of the trainer.
            capacity: how many encoded prompts are kept.
            chunk: how many are encoded at a time.

        Raises:
            ValueError: there is no prompt, or a number is out of range.
        """
        if batch_size < 1:
            raise ValueError(f"PromptConditions: batch_size must be positive, got {batch_size}")
        self.batch_size = batch_size
        self._encoded = EncodedPrompts(prompts, encoder, capacity=capacity, chunk=chunk)

    @property
    def prompts(self) -> Sequence[str]:
        """All prompts."""
        return self._encoded.prompts

    def __call__(self, draws: Draws) -> Condition:
        """The condition of a micro-batch's samples, on the draws' device."""
        return self.of(step_rows(draws, self.batch_size, len(self.prompts)), draws.samples.device)

    def texts(self, draws: Draws) -> list[str]:
        """The prompts of a micro-batch's samples."""
        numbers = step_rows(draws, self.batch_size, len(self.prompts))
        return [self.prompts[number] for number in numbers.tolist()]

    def of(self, numbers: Tensor, device: torch.device | None = None) -> Condition:
        """The condition of prompts number ``numbers``, int64 ``[B]`` on the CPU."""
        condition: Any = self._encoded(numbers.tolist())
        if device is not None:
            condition = map_condition(lambda t: send(t, device), condition)
        if "prompt" in getattr(condition, "_fields", ()):
            condition = condition._replace(prompt=send(numbers, condition.prompt.device))
        return condition
