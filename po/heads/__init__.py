"""Every head that a recipe can name. To add one: write the file, add the line (docs/add-a-head.md)."""

from po.heads.adpa import ADPA
from po.heads.alphapo import AlphaPO
from po.heads.aot import AOT
from po.heads.aot_unpaired import AOTUnpaired
from po.heads.apo_down import APODown
from po.heads.apo_zero import APOZero
from po.heads.aqfl import AQFL
from po.heads.aql import AQL
from po.heads.beta_dpo import BetaDPO
from po.heads.bmc import BMC
from po.heads.bvpo import BVPO
from po.heads.cell import CELL
from po.heads.cpo import CPO
from po.heads.cream import CREAM
from po.heads.dbaql import DBAQL
from po.heads.dckd import DCKD
from po.heads.discopop import DiscoPOP
from po.heads.dpo import DPO
from po.heads.dpo_norm import DPONorm
from po.heads.dpop import DPOP
from po.heads.exo_pref import EXOPref
from po.heads.exo_rw import EXORw
from po.heads.fdpo import FDPO
from po.heads.feasible_dpo import FeasibleDPO
from po.heads.hinge import Hinge
from po.heads.hybrid_dpo import HybridDPO
from po.heads.infonca import InfoNCA
from po.heads.ipo import IPO
from po.heads.ld_dpo import LDDPO
from po.heads.mapo import MaPO
from po.heads.mpo_multi import MPOMulti
from po.heads.nca import NCA
from po.heads.orpo import ORPO
from po.heads.padll import PADLL
from po.heads.pfl import PFL
from po.heads.rdpo import RDPO
from po.heads.rpo_sft import RPOSft
from po.heads.sem_dpo import SemDPO
from po.heads.sft import SFT
from po.heads.simpo import SimPO
from po.heads.slic import SLiC
from po.heads.sparsepo import SparsePO
from po.heads.sppo_hard import SPPOHard
from po.heads.tdpo1 import TDPO1
from po.heads.tdpo2 import TDPO2
from po.heads.tpo import TPO
from po.heads.tpo_l import TPOL
from po.heads.wpo import WPO
from po.heads.wpo_unaligned import WPOUnaligned
from po.types import Head

HEADS: dict[str, type[Head]] = {
    "adpa": ADPA,
    "alphapo": AlphaPO,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "apo_down": APODown,
    "apo_zero": APOZero,
    "aqfl": AQFL,
    "aql": AQL,
    "beta_dpo": BetaDPO,
    "bmc": BMC,
    "bvpo": BVPO,
    "cell": CELL,
    "cpo": CPO,
    "cream": CREAM,
    "dbaql": DBAQL,
    "dckd": DCKD,
    "discopop": DiscoPOP,
    "dpo": DPO,
    "dpo_norm": DPONorm,
    "dpop": DPOP,
    "exo_pref": EXOPref,
    "exo_rw": EXORw,
    "fdpo": FDPO,
    "feasible_dpo": FeasibleDPO,
    "hinge": Hinge,
    "hybrid_dpo": HybridDPO,
    "infonca": InfoNCA,
    "ipo": IPO,
    "ld_dpo": LDDPO,
    "mapo": MaPO,
    "mpo_multi": MPOMulti,
    "nca": NCA,
    "orpo": ORPO,
    "padll": PADLL,
    "pfl": PFL,
    "rdpo": RDPO,
    "rpo_sft": RPOSft,
    "sem_dpo": SemDPO,
    "sft": SFT,
    "simpo": SimPO,
    "slic": SLiC,
    "sparsepo": SparsePO,
    "sppo_hard": SPPOHard,
    "tdpo1": TDPO1,
    "tdpo2": TDPO2,
    "tpo": TPO,
    "tpo_l": TPOL,
    "wpo": WPO,
    "wpo_unaligned": WPOUnaligned,
}
