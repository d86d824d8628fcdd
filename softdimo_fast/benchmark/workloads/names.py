"""What implementations are called in tables, bars and guards."""

from __future__ import annotations

OURS = "softdimo_fast"
EAGER = "eager"
COMPILED = "torch.compile"
PUBLISHED = "published loop"
GUMBEL_SOFTMAX = "F.gumbel_softmax @ E"
CROSS_ENTROPY = "F.cross_entropy"
MULTINOMIAL, GUMBEL_MAX = "softmax + multinomial", "Gumbel-max"
SDPA, GATHERED = "SDPA", "gather + SDPA"
LIGER, CCE = "Liger", "cut-cross-entropy"

# What each of them is, for a reader.
MEANINGS = {
    OURS: "this package, with the backend that it chooses",
    f"{OURS}, recompute": "the same with memory='recompute': the logits are never held",
    EAGER: "the shortest plain PyTorch that a careful user writes",
    COMPILED: "torch.compile of that expression; its seconds of compilation are in the table of results",
    PUBLISHED: "as the public training loop of Di[M]O writes it, written anew from its description: for the "
    "loss, guidance as a mix, four softmaxes, NaN filters, kl_div and a squared-distance surrogate; for "
    "sampling, a Categorical",
    GUMBEL_SOFTMAX: "the relaxation of PyTorch, then the product",
    CROSS_ENTROPY: "PyTorch's, with ignored targets",
    MULTINOMIAL: "softmax, then torch.multinomial",
    GUMBEL_MAX: "softmax, exponential noise, argmax",
    SDPA: "scaled_dot_product_attention; with half of the keys it gets the mask",
    GATHERED: "the kept tokens copied together, then scaled_dot_product_attention",
    LIGER: "linkedin/Liger-Kernel",
    CCE: "apple/ml-cross-entropy",
}
