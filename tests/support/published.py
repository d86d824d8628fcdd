"""Small sizes of the published families, for tests that need every one of them."""

from __future__ import annotations

from typing import Any

# Small sizes of every published family, under the names of its constructor.
VIT = {"width": 32, "layers": 1, "heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "maskgit": {
        "img_size": 32, "hidden_dim": 16, "codebook_size": 12, "depth": 1, "heads": 2, "mlp_dim": 24,
        "nclass": 3,
    },
    "maskgit_vqgan": {
        "ddconfig": {
            "z_channels": 8, "resolution": 16, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1,
            "attn_resolutions": [8],
        },
        "n_embed": 20, "embed_dim": 6,
    },
    "maskbit": {
        "img_size": 32, "hidden_dim": 16, "codebook_size": 256, "codebook_splits": 2, "depth": 1,
        "heads": 2, "mlp_dim": 24, "nclass": 3,
    },
    "maskbit_tokenizer": {
        "config": {
            "codebook_size": 256, "token_size": 8, "hidden_channels": 32, "channel_mult": [1, 1],
            "num_resolutions": 2, "num_res_blocks": 1,
        }
    },
    "maskgen_vq": {
        "codebook_size": 20, "num_latent_tokens": 6, "text_embed_dim": 12, "condition_num_classes": 4,
        "decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2,
    },
    "tatitok_vq": {
        "model": {
            "vq_model": {
                "quantize_mode": "vq", "codebook_size": 20, "token_size": 6, "use_l2_norm": False,
                "clustering_vq": True, "vit_enc_model_size": "base", "vit_dec_model_size": "large",
                "vit_enc_patch_size": 8, "vit_dec_patch_size": 8, "num_latent_tokens": 6,
                "is_legacy": False, "text_context_length": 5, "text_embed_dim": 12,
            }
        },
        "dataset": {"preprocessing": {"crop_size": 16}},
        "vit_sizes": {"base": VIT, "large": VIT},
    },
    "meissonic": {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 12, "pooled_projection_dim": 32, "axes_dims_rope": [4, 6, 6],
        "vocab_size": 24, "codebook_size": 20, "downsample": True, "upsample": True,
    },
    "meissonic_vqvae": {
        "block_out_channels": [8, 16], "norm_num_groups": 8, "latent_channels": 6,
        "vq_embed_dim": 6, "num_vq_embeddings": 20,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
}  # fmt: skip
