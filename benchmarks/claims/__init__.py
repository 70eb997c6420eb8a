"""Small reproductions of what papers claim, by name. Each takes (lab, seeds) and returns a Finding."""

from claims.lab import Finding, Lab
from claims.likelihood import apo, nca
from claims.negatives import npo
from claims.noise import flipped, overoptimisation, sspo
from claims.sets import more_answers
from claims.tokens import sparse_masks

CLAIMS = {
    "nca": nca,
    "more_answers": more_answers,
    "apo": apo,
    "sparsepo": sparse_masks,
    "npo": npo,
    "rpo_sft": overoptimisation,
    "flipped": flipped,
    "sspo": sspo,
}
__all__ = ["CLAIMS", "Finding", "Lab"]
