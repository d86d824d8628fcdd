"""The classifier's loss: label smoothing, noise on the images, and that it learns."""

from __future__ import annotations

import torch
from support.training import BATCH, FAST, classifier, images, micro_batch, trainer
from torch.nn import functional

from softdimo_fast.data.source import ImageSource
from softdimo_fast.trainers import ClassifierConfig, ClassifierMethod, Phase


def test_the_loss() -> None:
    source = ImageSource(*images(), BATCH)
    method = ClassifierMethod(
        classifier(), source, ClassifierConfig(input_noise=0.2, label_smoothing=0.1)
    )
    batch = micro_batch(step=3)
    pictures, classes = source(batch.draws)
    noise = batch.draws.normal("classifier/noise", 1, 4, 4)
    logits = method.classifier(pictures + 0.2 * noise)
    expected = functional.cross_entropy(logits, classes, label_smoothing=0.1)
    loss = method.loss(Phase("classifier"), batch)
    torch.testing.assert_close(loss.value, expected)
    accuracy = (logits.argmax(1) == classes).float().mean()
    torch.testing.assert_close(loss.metrics["accuracy"], accuracy)


def test_it_learns() -> None:
    method = ClassifierMethod(
        classifier(), ImageSource(*images(), BATCH), ClassifierConfig(optimizer=FAST)
    )
    trainer(method, steps=120, log_every=1000, checkpoint_every=1000).run()
    pictures, classes = images()
    assert float((method.classifier(pictures).argmax(1) == classes).float().mean()) > 0.9
