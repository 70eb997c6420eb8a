"""Names that the literature uses for several methods. A recipe must say which one it means."""

from __future__ import annotations

from po.errors import suggest
from po.heads import HEADS

# name -> (what a recipe writes, which method that is); "" where po has no head for it
AMBIGUOUS: dict[str, tuple[tuple[str, str], ...]] = {
    "apo": (
        ("apo_zero", "Anchored Preference Optimization, D'Oosterlinck et al. 2024, for chosen above the model's level"),
        ("apo_down", "the same, for chosen below the model's level"),
        ("", "Adversarial Preference Optimization"),
    ),
    "dro": (
        ("dro_v", "Direct Reward Optimisation, Richemond et al. 2024"),
        ("", "distributionally robust optimization (Dr. DPO)"),
    ),
    "gcpo": (
        ("gcpo_gold", "GRPO with a gold answer where a whole group has failed, arXiv:2510.07790"),
        ("grpo with the reward group_contrast", "Group Contrastive PO of GeometryZero, arXiv:2506.07160"),
    ),
    "hypo": (
        ("hypo_kl", "DPO with an online KL term, Song et al. 2024"),
        ("hybrid_dpo", "Hybrid-DPO's clipped reference margin, arXiv:2602.11902"),
    ),
    "irpo": (
        ("irpo_incontext", "In-context Ranking Preference Optimization, arXiv:2504.15477"),
        ("dpo and sft as two terms", "Iterative Reasoning Preference Optimization, Pang et al. 2024"),
    ),
    "mdpo": (
        ("mdpo_multisample", "multi-sample comparisons, arXiv:2410.12138"),
        ("", "DPO for multimodal models (conditional and anchored)"),
    ),
    "mipo": (
        ("mipo_multisample", "multi-sample IPO, arXiv:2410.12138"),
        ("", "Modulated Intervention Preference Optimization"),
    ),
    "mpo": (
        ("mpo_multi", "Multi-Preference Optimization (SWEPO), arXiv:2412.04628"),
        ("", "Mixed Preference Optimization (DPO, paired BCO and SFT in one sum)"),
    ),
    "r_dpo": (
        ("rdpo", "robust DPO, Chowdhury et al. 2024"),
        ("", "DPO with a length regulariser"),
    ),
    "rpo": (
        ("rpo_sft", "Regularised PO: DPO and an SFT loss on the chosen response, Liu et al. 2024"),
        ("rpo_contrast", "Relative PO: contrast over different prompts, Yin et al. 2024"),
        ("", "Reward-aware PO"),
    ),
    "sdpo": (
        ("hindsight", "self-distillation from the user's next message, logged conversations, arXiv:2603.12273"),
        ("hindsight_online", "the same on fresh samples"),
        ("sdft", "Self-Distilled Policy Optimization from feedback, arXiv:2601.20802; TRL's sdpo, sampled tokens"),
        ("", "stepwise DPO (sDPO)"),
    ),
    "spo": (
        ("spo_degree", "self-supervised PO with preference degrees, arXiv:2409.17791"),
        ("sppo_hard", "Self-Play Preference Optimization, Wu et al. 2024"),
        ("", "self-regularised PO (SiLU)"),
    ),
    "tpo": (
        ("tpo_triple", "Triple Preference Optimization, arXiv:2405.16681"),
        ("", "tied-ranking or tree PO"),
    ),
}


def which(name: str) -> str | None:
    """A sentence that asks which method an ambiguous name means; None for other names. Case, - and _ do not matter."""
    methods = AMBIGUOUS.get(name.lower().replace("-", "_")) or AMBIGUOUS.get(name.lower().replace("-", ""))
    if methods is None:
        return None
    offered = [f"{write!r} ({what})" if write else f"{what}, which po does not have" for write, what in methods]
    return f"{name!r} is the name of {len(methods)} methods. Write the one you mean: {'; '.join(offered)}."


def no_such(name: str) -> str:
    """What is wrong with a head's name that po does not know, or that several methods have."""
    return which(name) or f"no head is called {name!r}.{suggest(name, HEADS)} Heads: {', '.join(HEADS)}."
