// The table of contents: every compiled operator, and nothing else.
//
// Arguments named row_* hold one value per row of the logits (logits.shape[:-1]); `wanted` says which gradients
// are computed. An output that is not wanted is an empty tensor. `seed` is int64 [2] = (seed, offset); noise is
// added exactly when it is given.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(softdimo, m) {
  m.def("cpu_isa() -> str");
  m.def("compiled_cpu_isas() -> str");

  // soft: the soft value in the statistics' dtype, where `output` is not it (a half codebook, or hard).
  // row_threshold, row_last: what truncation keeps, x > threshold and x = threshold up to index last; empty without.
  m.def(
      "soft_embedding(Tensor logits, Tensor codebook, float temperature, Tensor? row_temperature, Tensor? mask, "
      "Tensor? mask_embedding, Tensor? seed, Tensor? row_ids, int? top_k, float? top_p, bool high_precision, "
      "bool hard) -> (Tensor output, Tensor row_max, Tensor row_sum, Tensor soft, Tensor row_threshold, "
      "Tensor row_last)");
  // wanted: gradients to logits, codebook, row_temperature, mask_embedding.
  m.def(
      "soft_embedding_backward(Tensor grad, Tensor logits, Tensor codebook, float temperature, "
      "Tensor? row_temperature, Tensor? mask, Tensor? mask_embedding, Tensor? seed, Tensor? row_ids, int? top_k, "
      "float? top_p, bool high_precision, Tensor row_max, Tensor row_sum, Tensor soft, Tensor row_threshold, "
      "Tensor row_last, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  // The loss of every row, or their sum or mean; max and rest are saved for backward.
  m.def(
      "masked_cross_entropy(Tensor logits, Tensor targets, Tensor? mask, float label_smoothing, str reduction) "
      "-> (Tensor loss, Tensor row_max, Tensor row_rest)");
  m.def(
      "masked_cross_entropy_backward(Tensor grad, Tensor logits, Tensor targets, Tensor? mask, "
      "float label_smoothing, str reduction, Tensor row_max, Tensor row_rest) -> Tensor");
  // log_prob: empty unless asked for.
  m.def(
      "sample_tokens(Tensor logits, float temperature, Tensor? row_temperature, int? top_k, float? top_p, Tensor seed, "
      "Tensor? row_ids, bool log_prob) -> (Tensor tokens, Tensor log_prob)");
  // keep: 0 nothing; 1 row_max, row_sum and, where `output` is not it, the soft value in their dtype; 2 the logits too.
  m.def(
      "linear_soft_embedding(Tensor hidden, Tensor weight, Tensor codebook, Tensor? bias, float temperature, "
      "Tensor? row_temperature, Tensor? mask, Tensor? mask_embedding, bool high_precision, int keep) "
      "-> (Tensor output, Tensor logits, Tensor row_max, Tensor row_sum, Tensor soft)");
  // wanted: gradients to hidden, weight, codebook, bias, row_temperature, mask_embedding.
  m.def(
      "linear_soft_embedding_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor codebook, Tensor? bias, "
      "float temperature, Tensor? row_temperature, Tensor? mask, Tensor? mask_embedding, bool high_precision, "
      "Tensor? logits, Tensor row_max, Tensor row_sum, Tensor soft, bool[] wanted) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // statistics: what the backward needs of each row, [..., 9].
  m.def(
      "token_divergence(Tensor teacher_logits, Tensor model_logits, Tensor? teacher_uncond_logits, "
      "float guidance_scale, Tensor? row_guidance, float teacher_temperature, float model_temperature, "
      "float forward_weight, float reverse_weight, Tensor? mask, Tensor? weight, str reduction) "
      "-> (Tensor value, Tensor statistics)");
  // wanted: gradients to teacher_logits, model_logits, teacher_uncond_logits.
  m.def(
      "token_divergence_backward(Tensor grad, Tensor teacher_logits, Tensor model_logits, "
      "Tensor? teacher_uncond_logits, float guidance_scale, Tensor? row_guidance, float teacher_temperature, "
      "float model_temperature, float forward_weight, float reverse_weight, Tensor? mask, Tensor? weight, "
      "str reduction, Tensor statistics, bool[] wanted) -> (Tensor, Tensor, Tensor)");
  m.def(
      "distribution_matching_loss(Tensor student_logits, Tensor teacher_logits, Tensor auxiliary_logits, Tensor mask, "
      "Tensor? teacher_uncond_logits, float guidance_scale, Tensor? row_guidance, float teacher_temperature, "
      "float auxiliary_temperature, float forward_weight, float reverse_weight, Tensor? weight, str normalization) "
      "-> (Tensor value, Tensor statistics)");
  // wanted: the gradient to student_logits.
  m.def(
      "distribution_matching_loss_backward(Tensor grad, Tensor student_logits, Tensor teacher_logits, "
      "Tensor auxiliary_logits, Tensor mask, Tensor? teacher_uncond_logits, float guidance_scale, "
      "Tensor? row_guidance, float teacher_temperature, float auxiliary_temperature, float forward_weight, "
      "float reverse_weight, Tensor? weight, str normalization, Tensor statistics, bool[] wanted) -> Tensor");
  m.def(
      "token_statistics(Tensor logits, float temperature, Tensor? row_temperature, Tensor? mask) "
      "-> (Tensor log_normalizer, Tensor entropy, Tensor max_prob)");

  m.def(
      "masked_attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? query_mask, float scale) "
      "-> (Tensor output, Tensor row_max, Tensor row_sum)");
  // wanted: gradients to query, key, value.
  m.def(
      "masked_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? key_mask, "
      "Tensor? query_mask, float scale, Tensor row_max, Tensor row_sum, bool[] wanted) -> (Tensor, Tensor, Tensor)");
}
