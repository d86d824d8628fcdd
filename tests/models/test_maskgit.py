"""The MaskGIT transformer: its table, its tied head, its [MASK] column."""

from __future__ import annotations

import pytest
import torch
from support.checks import assert_same_bits
from torch import Tensor
from torch.nn import functional

from softdimo_fast import _config, linear_soft_embedding
from softdimo_fast.diffusion import perturb
from softdimo_fast.models.maskgit import MaskGitConfig, MaskGitTransformer
from softdimo_fast.models.seeding import seeded

CONFIG = MaskGitConfig(
    img_size=48, hidden_dim=12, codebook_size=10, depth=2, heads=3, mlp_dim=20, nclass=4
)
LABELS = torch.tensor([0, 3, 2])


@pytest.fixture
def model() -> MaskGitTransformer:
    with seeded(0):
        model = MaskGitTransformer(CONFIG)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def codes(model: MaskGitTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.mask_id + 1, (3, 9), generator=generator)


def test_the_rows_of_the_table(model: MaskGitTransformer) -> None:
    """V codes, [MASK], the classes, the null class: 10 + 1 + 4 + 1."""
    table = model.tok_emb.weight
    assert len(table) == 16
    assert_same_bits(model.token_table, table[:10])
    assert_same_bits(model.mask_embedding, table[10])
    tokens = codes(model)
    assert_same_bits(model.embed(tokens), table[tokens])
    for labels, rows in ((LABELS, 11 + LABELS), (model.unconditional(LABELS), [15] * 3)):
        entered = model.first_layer(
            torch.cat([model.embed(tokens), table[rows][:, None]], 1) + model.pos_emb
        )
        assert_same_bits(model.first_rows(model.embed(tokens), labels), entered)


def test_classes_are_no_tokens(model: MaskGitTransformer) -> None:
    with pytest.raises(IndexError):
        model.embed(torch.full((1, 9), model.mask_id + 1))


def test_a_sliced_head_is_the_slice_of_the_whole_one(model: MaskGitTransformer) -> None:
    """Oracle 13. The head is tied to the table, with a bias for each position."""
    hidden = model(model.embed(codes(model)), LABELS)
    last = model.last_layer(hidden)
    whole = last @ model.tok_emb.weight.T + model.bias[:9]
    torch.testing.assert_close(model.head(hidden), whole[..., :10])
    torch.testing.assert_close(model.head_with_mask(hidden), whole[..., :11])
    assert model.head_weight.data_ptr() == model.tok_emb.weight.data_ptr()


def test_the_head_fuses_with_the_soft_embedding(model: MaskGitTransformer) -> None:
    hidden = model(model.embed(codes(model)), LABELS)
    fused = linear_soft_embedding(
        model.head_input(hidden), model.head_weight, model.token_table, bias=model.head_bias
    )
    torch.testing.assert_close(fused, model.soft_embed(model.head(hidden)))


def test_the_soft_embedding_is_the_expected_row(model: MaskGitTransformer) -> None:
    logits = 3 * torch.randn(3, 9, 10, generator=torch.Generator().manual_seed(5))
    expected = logits.softmax(-1) @ model.tok_emb.weight[:10]
    torch.testing.assert_close(model.soft_embed(logits), expected)
    mask = torch.arange(9).expand(3, 9) % 2 == 0
    expected = torch.where(mask[..., None], model.tok_emb.weight[10], expected)
    torch.testing.assert_close(model.soft_embed(logits, mask=mask), expected)


def test_noise_acts_on_visual_rows_before_positions(model: MaskGitTransformer) -> None:
    embeddings, labels = model.embed(codes(model)), LABELS
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(6))
    noisy = perturb(embeddings, noise, 0.3)
    label = model.tok_emb.weight[11 + labels][:, None]  # not perturbed
    entered = model.first_layer(torch.cat([noisy, label], 1) + model.pos_emb)
    assert_same_bits(model.first_rows(model.generator_input(noisy), labels), entered)


def test_table_positions_and_bias_are_the_frozen_part(model: MaskGitTransformer) -> None:
    frozen = {id(parameter) for parameter in model.embedding_parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in frozen}
    assert names == {"tok_emb.weight", "pos_emb", "bias"}


def test_the_training_loss_reaches_every_parameter(model: MaskGitTransformer) -> None:
    tokens = codes(model)
    logits = model.logits(model.embed(tokens), LABELS)
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens.clamp(max=9).flatten())
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_the_config_takes_the_published_names() -> None:
    published = {
        "img_size": 48, "hidden_dim": 40, "codebook_size": 75, "depth": 3, "heads": 2,
        "mlp_dim": 72, "dropout": 0.1, "nclass": 7,
    }  # fmt: skip
    model = MaskGitTransformer(_config.from_dict(MaskGitConfig, published))
    assert len(model.state_dict()) == 53
    assert model.token_shape == (9,)
    assert model.bias.shape == (10, 84)
    with pytest.raises(_config.ConfigError, match="img_size: must be a multiple of 16"):
        MaskGitConfig(img_size=250)
