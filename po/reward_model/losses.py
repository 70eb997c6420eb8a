"""The objectives of reward models as functions of scores: one number per pair, not yet averaged, in fp32.

r are scores, d = r_chosen - r_rejected. Every form stays finite at any gap: log sigmoid is computed as -softplus.
log(sigmoid(d) + 1e-5), as found in public code, ends at 11.5 nats and has no gradient left where the model is most
wrong; log(1 + exp(-d)) overflows there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def bradley_terry(
    chosen_N: Tensor,
    rejected_N: Tensor,
    margin_N: Tensor | None = None,
    preference_N: Tensor | None = None,
    label_smoothing: float = 0.0,
    center: float = 0.0,
) -> Tensor:
    """-q log sigmoid(d - m) - (1 - q) log sigmoid(m - d) + center (r_chosen + r_rejected)^2

    with q = p (1 - a) + (1 - p) a, m the margin (0), p the preference (1) and a the label smoothing.

    Bradley and Terry 1952. Margin, and smoothing without one: Wang et al. 2024, Secrets of RLHF in Large Language
    Models Part II: Reward Modeling, arXiv:2401.06080. Centering: Eisenstein et al. 2023, Helping or Herding?,
    arXiv:2312.09244, eq. 2, as TRL's RewardTrainer has it.

    Unverified: that soft labels and smoothing keep the margin in both of their terms.
    """
    chosen_N, rejected_N = _up(chosen_N), _up(rejected_N)
    d_N = chosen_N - rejected_N if margin_N is None else chosen_N - rejected_N - margin_N
    p_N = torch.ones_like(d_N) if preference_N is None else preference_N.to(d_N.dtype)
    q_N = p_N * (1 - label_smoothing) + (1 - p_N) * label_smoothing
    loss_N = q_N * F.softplus(-d_N) + (1 - q_N) * F.softplus(d_N)
    return loss_N + center * (chosen_N + rejected_N).square() if center else loss_N


def contrastive(first_ND: Tensor, second_ND: Tensor, temperature: float) -> Tensor:
    """-log exp(cos(h_i, h'_i) / t) / sum_j exp(cos(h_i, h'_j) / t)

    h and h' are the features of the same texts in two passes with different dropout; the others of the batch are the
    negatives, so the batch must hold more than one. Gao et al. 2021, SimCSE, arXiv:2104.08821.

    Unverified: that Secrets of RLHF II adds this form to the reward loss, and on which features.
    """
    first_ND, second_ND = F.normalize(_up(first_ND), dim=-1), F.normalize(_up(second_ND), dim=-1)
    cosine_NN = first_ND @ second_ND.T / temperature
    return torch.logsumexp(cosine_NN, -1) - cosine_NN.diagonal()


def ordinal(chosen_NS: Tensor, rejected_NS: Tensor, allowed_NSS: Tensor | None = None) -> Tensor:
    """-log P(c > r), P(c > r) = sum_{i > j} p_c(i) p_r(j)

    p are the softmaxes over the S ratings, worst first; summed in log space. A tie counts as a loss, so the loss is
    above 0 unless the two distributions part. allowed: the cells (i, j) of the sum, from `region`.

    Learning Ordinal Probabilistic Reward from Preferences, arXiv:2602.12660.
    """
    logp_c_NS, logp_r_NS = _up(chosen_NS).log_softmax(-1), _up(rejected_NS).log_softmax(-1)
    joint_NSS = logp_c_NS[:, :, None] + logp_r_NS[:, None, :]
    above_SS = torch.ones_like(joint_NSS[0], dtype=torch.bool).tril(-1)
    cells_NSS = above_SS if allowed_NSS is None else above_SS & allowed_NSS
    return -torch.logsumexp(joint_NSS.masked_fill(~cells_NSS, -torch.inf).flatten(1), -1)


def wins(chosen_NS: Tensor, rejected_NS: Tensor) -> Tensor:
    """P(c > r) / (P(c > r) + P(r > c)): the probability that the chosen answer is rated higher, ties apart."""
    return torch.sigmoid(ordinal(rejected_NS, chosen_NS) - ordinal(chosen_NS, rejected_NS))


def region(chosen_N: Tensor, rejected_N: Tensor, levels: int, ratings: int, triangle: bool) -> Tensor:
    """Which cells (i, j) of `ordinal`'s sum two levels of quality allow, (N, S, S); level 0 allows all.

    The S ratings are cut into `levels` equal parts, level 1 the lowest. Region: i in the chosen answer's part, j in the
    rejected one's. Triangle: every i and j from the bottom of the lower part to the top of the higher one, so that an
    answer rated outside its part still has gradient towards it (i > j remains `ordinal`'s own).

    Unverified: both; the paper's Region Flooding Tuning was seen only described: labels bad, normal, good restrict the
    sum to a part of it, which is expanded to a lower triangle.
    """
    index_S = torch.arange(ratings, device=chosen_N.device)
    part_S = torch.div(index_S * levels, ratings, rounding_mode="floor") + 1
    c_N1, r_N1 = chosen_N[:, None].long(), rejected_N[:, None].long()
    if triangle:
        low_N1, high_N1 = torch.minimum(c_N1, r_N1), torch.maximum(c_N1, r_N1)
        within_NS = (part_S >= low_N1) & (part_S <= high_N1)
        free_N1 = (c_N1 == 0) | (r_N1 == 0)
        return (within_NS | free_N1)[:, :, None] & (within_NS | free_N1)[:, None, :]
    i_NS, j_NS = (part_S == c_N1) | (c_N1 == 0), (part_S == r_N1) | (r_N1 == 0)
    return i_NS[:, :, None] & j_NS[:, None, :]
