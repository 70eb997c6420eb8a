"""Every head that a recipe can name. To add one: write the file, add the line (docs/add-a-head.md)."""

from po.heads.apo_down import APODown
from po.heads.apo_zero import APOZero
from po.heads.dpo import DPO
from po.heads.infonca import InfoNCA
from po.heads.ipo import IPO
from po.heads.mpo_multi import MPOMulti
from po.heads.nca import NCA
from po.heads.sft import SFT
from po.types import Head

HEADS: dict[str, type[Head]] = {
    "apo_down": APODown,
    "apo_zero": APOZero,
    "dpo": DPO,
    "infonca": InfoNCA,
    "ipo": IPO,
    "mpo_multi": MPOMulti,
    "nca": NCA,
    "sft": SFT,
}
