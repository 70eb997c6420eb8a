"""Every head that a recipe can name. To add one: write the file, add the line (docs/add-a-head.md)."""

from po.heads.a_lol import ALoL
from po.heads.a_lol_kl import ALoLKL
from po.heads.a_lol_ref_free import ALoLRefFree
from po.heads.a_lol_seq import ALoLSeq
from po.heads.adpa import ADPA
from po.heads.alphapo import AlphaPO
from po.heads.ampo import AMPO
from po.heads.aot import AOT
from po.heads.aot_unpaired import AOTUnpaired
from po.heads.apo_down import APODown
from po.heads.apo_zero import APOZero
from po.heads.apo_zero_unpaired import APOZeroUnpaired
from po.heads.aqfl import AQFL
from po.heads.aql import AQL
from po.heads.bco import BCO
from po.heads.bco_matched import BCOMatched
from po.heads.bcpg_nsa import BCPGNSA
from po.heads.beta_dpo import BetaDPO
from po.heads.bmc import BMC
from po.heads.bvpo import BVPO
from po.heads.capo import CAPO
from po.heads.cell import CELL
from po.heads.cispo import CISPO
from po.heads.copg import CoPG
from po.heads.cpo import CPO
from po.heads.cream import CREAM
from po.heads.d2o import D2O
from po.heads.dapo import DAPO
from po.heads.dbaql import DBAQL
from po.heads.dckd import DCKD
from po.heads.discopop import DiscoPOP
from po.heads.dpo import DPO
from po.heads.dpo_norm import DPONorm
from po.heads.dpop import DPOP
from po.heads.dr_grpo import DrGRPO
from po.heads.dro_v import DROV
from po.heads.exo_pref import EXOPref
from po.heads.exo_rw import EXORw
from po.heads.fdpo import FDPO
from po.heads.feasible_dpo import FeasibleDPO
from po.heads.gcpo_gold import GCPOGold
from po.heads.gjsd import GJSD
from po.heads.grpo import GRPO
from po.heads.grpo2 import GRPO2
from po.heads.grpo_kl import GRPOKL
from po.heads.gspo import GSPO
from po.heads.hindsight import Hindsight
from po.heads.hindsight_online import HindsightOnline
from po.heads.hinge import Hinge
from po.heads.hybrid_dpo import HybridDPO
from po.heads.hypo_kl import HyPOKL
from po.heads.infonca import InfoNCA
from po.heads.ipo import IPO
from po.heads.irpo_incontext import IRPOInContext
from po.heads.kto import KTO
from po.heads.ld_dpo import LDDPO
from po.heads.luspo import LUSPO
from po.heads.mapo import MaPO
from po.heads.mdpo_multisample import MDPOMultisample
from po.heads.mipo_multisample import MIPOMultisample
from po.heads.mpo_multi import MPOMulti
from po.heads.nat import NAT
from po.heads.nca import NCA
from po.heads.neg_distill import NegDistill
from po.heads.nft import NFT
from po.heads.npo import NPO
from po.heads.npo_kl import NPOKL
from po.heads.npo_nll import NPONLL
from po.heads.opsd import OPSD
from po.heads.orpo import ORPO
from po.heads.padll import PADLL
from po.heads.pfl import PFL
from po.heads.pi_distill import PiDistill
from po.heads.plackett_luce import PlackettLuce
from po.heads.pmpo import PMPO
from po.heads.ppo import PPO
from po.heads.prob_sft import ProbSFT
from po.heads.prob_sft_threshold import ProbSFTThreshold
from po.heads.ranklist import RankList
from po.heads.rdpo import RDPO
from po.heads.redi import REDI
from po.heads.refa import REFA
from po.heads.reinforce_pp import ReinforcePP
from po.heads.rloo import RLOO
from po.heads.rloo_ref_free import RLOORefFree
from po.heads.rltf_sd import RLTFSD
from po.heads.rpo_contrast import RPOContrast
from po.heads.rpo_contrast_unpaired import RPOContrastUnpaired
from po.heads.rpo_diagonal import RPODiagonal
from po.heads.rpo_sft import RPOSft
from po.heads.sapo import SAPO
from po.heads.sdft import SDFT
from po.heads.selm import SELM
from po.heads.sem_dpo import SemDPO
from po.heads.sft import SFT
from po.heads.simpo import SimPO
from po.heads.slic import SLiC
from po.heads.sparsepo import SparsePO
from po.heads.spo_degree import SPODegree
from po.heads.sppo_hard import SPPOHard
from po.heads.sspo import SSPO
from po.heads.tdpo1 import TDPO1
from po.heads.tdpo2 import TDPO2
from po.heads.topr import TOPR
from po.heads.tpo_l import TPOL
from po.heads.tpo_triple import TPOTriple
from po.heads.unisd import UniSD
from po.heads.vespo import VESPO
from po.heads.wpo import WPO
from po.heads.wpo_unaligned import WPOUnaligned
from po.heads.xpo import XPO
from po.types import Head

HEADS: dict[str, type[Head]] = {
    "a_lol": ALoL,
    "a_lol_kl": ALoLKL,
    "a_lol_ref_free": ALoLRefFree,
    "a_lol_seq": ALoLSeq,
    "adpa": ADPA,
    "alphapo": AlphaPO,
    "ampo": AMPO,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "apo_down": APODown,
    "apo_zero": APOZero,
    "apo_zero_unpaired": APOZeroUnpaired,
    "aqfl": AQFL,
    "aql": AQL,
    "bco": BCO,
    "bco_matched": BCOMatched,
    "bcpg_nsa": BCPGNSA,
    "beta_dpo": BetaDPO,
    "bmc": BMC,
    "bvpo": BVPO,
    "capo": CAPO,
    "cell": CELL,
    "cispo": CISPO,
    "copg": CoPG,
    "cpo": CPO,
    "cream": CREAM,
    "d2o": D2O,
    "dapo": DAPO,
    "dbaql": DBAQL,
    "dckd": DCKD,
    "discopop": DiscoPOP,
    "dpo": DPO,
    "dpo_norm": DPONorm,
    "dpop": DPOP,
    "dr_grpo": DrGRPO,
    "dro_v": DROV,
    "exo_pref": EXOPref,
    "exo_rw": EXORw,
    "fdpo": FDPO,
    "feasible_dpo": FeasibleDPO,
    "gcpo_gold": GCPOGold,
    "gjsd": GJSD,
    "grpo": GRPO,
    "grpo2": GRPO2,
    "grpo_kl": GRPOKL,
    "gspo": GSPO,
    "hindsight": Hindsight,
    "hindsight_online": HindsightOnline,
    "hinge": Hinge,
    "hybrid_dpo": HybridDPO,
    "hypo_kl": HyPOKL,
    "infonca": InfoNCA,
    "ipo": IPO,
    "irpo_incontext": IRPOInContext,
    "kto": KTO,
    "ld_dpo": LDDPO,
    "luspo": LUSPO,
    "mapo": MaPO,
    "mdpo_multisample": MDPOMultisample,
    "mipo_multisample": MIPOMultisample,
    "mpo_multi": MPOMulti,
    "nat": NAT,
    "nca": NCA,
    "neg_distill": NegDistill,
    "nft": NFT,
    "npo": NPO,
    "npo_kl": NPOKL,
    "npo_nll": NPONLL,
    "opsd": OPSD,
    "orpo": ORPO,
    "padll": PADLL,
    "pfl": PFL,
    "pi_distill": PiDistill,
    "plackett_luce": PlackettLuce,
    "pmpo": PMPO,
    "ppo": PPO,
    "prob_sft": ProbSFT,
    "prob_sft_threshold": ProbSFTThreshold,
    "ranklist": RankList,
    "rdpo": RDPO,
    "redi": REDI,
    "refa": REFA,
    "reinforce_pp": ReinforcePP,
    "rloo": RLOO,
    "rloo_ref_free": RLOORefFree,
    "rltf_sd": RLTFSD,
    "rpo_contrast": RPOContrast,
    "rpo_contrast_unpaired": RPOContrastUnpaired,
    "rpo_diagonal": RPODiagonal,
    "rpo_sft": RPOSft,
    "sapo": SAPO,
    "sdft": SDFT,
    "selm": SELM,
    "sem_dpo": SemDPO,
    "sft": SFT,
    "simpo": SimPO,
    "slic": SLiC,
    "sparsepo": SparsePO,
    "spo_degree": SPODegree,
    "sppo_hard": SPPOHard,
    "sspo": SSPO,
    "tdpo1": TDPO1,
    "tdpo2": TDPO2,
    "topr": TOPR,
    "tpo_l": TPOL,
    "tpo_triple": TPOTriple,
    "unisd": UniSD,
    "vespo": VESPO,
    "wpo": WPO,
    "wpo_unaligned": WPOUnaligned,
    "xpo": XPO,
}
