"""A small world with a known truth, to try preference optimization in: `python -m po.sandbox --help`."""

from po.sandbox.evaluation import Estimate, Evaluation, evaluate
from po.sandbox.pretrain import Pretraining
from po.sandbox.questions import World, reward, world
from po.sandbox.sampling import Sample, sample
from po.sandbox.store import Sandbox, Size, build

__all__ = ["Estimate", "Evaluation", "Pretraining", "Sample", "Sandbox", "Size", "World"]
__all__ += ["build", "evaluate", "reward", "sample", "world"]
