"""The table of layouts that are held against one process."""

import re
from dataclasses import dataclass
from math import prod

from runs import CHUNKS, CP, INSTANCES, PP, SCHEDULE, SP, STRATEGY, TP, ZERO1

FIRST, LAYOUT = "--decoder-first-pipeline-num-layers", "--pipeline-model-parallel-layout"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 3000"
TWO, FOUR = f"{PP} 2 {FIRST} 2", f"{PP} 4 {LAYOUT} Ett|tt|tt|tL"  # of 3 and of 7 layers
V2, V4 = (
    f"{PP} 2 {LAYOUT} Et|t|t|L",
    f"{PP} 4 {LAYOUT} Et|t|t|t|t|t|t|L",
)  # two chunks on each rank, the last one the head alone


@dataclass(frozen=True)
class Case:
    """flags on `ranks` processes; the rest is data parallel. `core`: part of `make test`."""

    ranks: int
    flags: str
    model: str = "llama"
    core: bool = False

    @property
    def arguments(self) -> str:
        """The flags; where tensor or context ranks share all the work, two samples in each of four micro-batches: half as many messages."""
        copies = self.ranks // prod(
            int(size)
            for size in re.findall(
                r"(?:tensor-model|pipeline-model|context)-parallel-size (\d)", self.flags
            )
        )
        return (
            f"{self.flags} --micro-batch-size 2"
            if copies == 1 and (TP in self.flags or CP in self.flags)
            else self.flags
        )

    def __str__(self) -> str:
        words = (
            self.flags.replace("-model-parallel-size", "")
            .replace("-parallel-size", "")
            .replace("--", "")
            .split()
        )
        return f"{self.model}-{self.ranks}-{'-'.join(words)}".replace("|", "!")


CASES = [
    # what the families of Hugging Face have beside the three models
    Case(4, f"{TP} 4 {SP}", "olmo", core=True),
    Case(4, f"{TP} 2 {SP} {TWO} {SCHEDULE} zb-h1", "olmo"),
    Case(2, f"{STRATEGY} optim_grads_params", "olmo"),
    Case(2, f"{CP} 2", "gemma", core=True),
    Case(4, f"{CP} 4", "gemma"),
    Case(2, f"{CP} 2 --cp-comm-type allgather", "gemma"),
    Case(2, f"{CP} 2 --cp-comm-type a2a --recompute-granularity selective", "gemma"),
    Case(4, f"{TP} 2 {SP} {TWO} {SCHEDULE} 1f1b", "gemma"),
    Case(4, f"{TP} 4 {ZERO1}", "gemma"),
    Case(4, f"{CP} 4", "neox"),
    Case(4, f"{TP} 2 {V2} {SCHEDULE} zb-v", "neox"),
    Case(2, f"{TP} 2 --recompute-granularity full", "neox"),
    # every axis alone, at 2 and at 4
    Case(2, "", core=True),
    Case(4, ""),
    Case(2, ZERO1),
    Case(4, f"{ZERO1} {OVERLAP}", core=True),
    Case(4, f"{ZERO1} {INSTANCES} 2", core=True),
    Case(2, f"{STRATEGY} optim_grads --ddp-bucket-size 3000"),
    Case(4, f"{STRATEGY} optim_grads {OVERLAP}", core=True),
    Case(4, f"{STRATEGY} optim_grads {INSTANCES} 2 {OVERLAP}", "untied"),
    Case(2, f"{STRATEGY} optim_grads_params", core=True),
    Case(4, f"{STRATEGY} optim_grads_params"),
    Case(4, f"{STRATEGY} optim_grads_params {INSTANCES} 2"),
    Case(4, f"{STRATEGY} optim_grads_params", "narrow"),  # some ranks hold no row of some parameter
    Case(2, f"{TP} 2"),
    Case(2, f"{TP} 2", "gpt"),
    Case(2, f"{TP} 2", "untied"),
    Case(4, f"{TP} 4"),
    Case(2, f"{TP} 2 {SP}", core=True),
    Case(2, f"{TP} 2 {SP}", "gpt", core=True),
    Case(4, f"{TP} 4 {SP}"),
    Case(4, f"{TP} 4 {SP}", "gpt"),
    Case(4, f"{TP} 4 {SP}", "untied"),
    Case(2, f"{CP} 2", core=True),
    Case(4, f"{CP} 4"),
    Case(2, f"{CP} 2", "gpt"),
    Case(2, f"{CP} 2 --cp-comm-type allgather"),
    Case(4, f"{CP} 4 --cp-comm-type allgather"),
    Case(2, f"{CP} 2 --cp-comm-type a2a"),
    Case(4, f"{CP} 4 --cp-comm-type a2a"),
    Case(2, f"{CP} 2 --cp-comm-type allgather", "documents", core=True),
    Case(4, f"{CP} 4 --cp-comm-type a2a", "documents"),
    Case(2, f"{TWO} {SCHEDULE} gpipe"),
    Case(2, f"{TWO} {SCHEDULE} 1f1b", core=True),
    Case(2, f"{TWO} {SCHEDULE} zb-h1"),
    Case(2, f"{V2} {SCHEDULE} interleaved", core=True),
    Case(2, f"{V2} {SCHEDULE} zb-v"),
    Case(2, f"{TWO}", "gpt"),
    Case(2, f"{TWO}", "untied"),
    Case(2, f"{V2} {SCHEDULE} zb-v", "untied"),
    Case(1, f"{CHUNKS} 3"),
    Case(4, f"{FOUR} {SCHEDULE} gpipe", "deep"),
    Case(4, f"{FOUR} {SCHEDULE} 1f1b", "deep"),
    Case(4, f"{FOUR} {SCHEDULE} zb-h1", "deep", core=True),
    Case(4, f"{V4} {SCHEDULE} interleaved", "deep"),
    Case(4, f"{V4} {SCHEDULE} zb-v", "deep", core=True),
    # all pairs of axes
    Case(4, f"{TP} 2 {ZERO1}"),
    Case(4, f"{TP} 2 {SP} {STRATEGY} optim_grads {OVERLAP}"),
    Case(4, f"{TP} 2 {SP} {STRATEGY} optim_grads_params", core=True),
    Case(4, f"{TP} 2 {SP} {CP} 2"),
    Case(4, f"{TP} 2 {SP} {CP} 2", "gpt"),
    Case(4, f"{TP} 2 {CP} 2 --cp-comm-type a2a", "documents"),
    Case(4, f"{TP} 2 {SP} {TWO}"),
    Case(4, f"{TP} 2 {SP} {V2} {SCHEDULE} zb-v", core=True),
    Case(4, f"{TP} 2 {TWO} {SCHEDULE} zb-h1", "untied"),
    Case(4, f"{CP} 2 {ZERO1}"),
    Case(4, f"{CP} 2 {STRATEGY} optim_grads_params"),
    Case(4, f"{CP} 2 {TWO} {SCHEDULE} zb-h1"),
    Case(4, f"{CP} 2 {V2} {SCHEDULE} interleaved"),
    Case(4, f"{TWO} {ZERO1} {OVERLAP}"),
    Case(4, f"{V2} {SCHEDULE} zb-v {STRATEGY} optim_grads {OVERLAP}"),
    # three at once, with each schedule
    Case(8, f"{TP} 2 {SP} {TWO} {ZERO1} {SCHEDULE} gpipe"),
    Case(8, f"{TP} 2 {SP} {TWO} {ZERO1} {OVERLAP} {SCHEDULE} 1f1b", core=True),
    Case(8, f"{TP} 2 {SP} {TWO} {ZERO1} {SCHEDULE} zb-h1"),
    Case(8, f"{TP} 2 {SP} {V2} {ZERO1} {SCHEDULE} interleaved"),
    Case(8, f"{TP} 2 {SP} {V2} {ZERO1} {OVERLAP} {SCHEDULE} zb-v"),
    Case(8, f"{TP} 2 {SP} {TWO} {ZERO1}", "gpt"),
    Case(8, f"{CP} 2 {TP} 2 {SP} {TWO}", core=True),
    Case(8, f"{CP} 2 {TP} 2 {TWO} --cp-comm-type allgather", "documents"),
    Case(8, f"{CP} 2 {TP} 2 {SP} {STRATEGY} optim_grads_params"),
    # recompute, alone and where collectives are computed again
    Case(1, "--recompute-granularity full", core=True),
    Case(1, "--recompute-granularity selective"),
    Case(4, f"{TP} 2 {SP} {TWO} --recompute-granularity full --recompute-method block"),
    Case(4, f"{TP} 2 {CP} 2 --recompute-granularity full --recompute-num-layers 2"),
    Case(4, f"{TP} 2 {SP} {V2} {SCHEDULE} zb-v --recompute-granularity selective"),
    Case(2, f"{STRATEGY} optim_grads_params --recompute-granularity full"),
    # one process on the native kernels alone, and what torch.compile makes of the layers
    *(Case(1, "", model) for model in ("llama", "gpt", "untied", "olmo", "gemma", "neox")),
    Case(1, "--compile", "gpt", core=True),
    Case(1, "--compile --recompute-granularity full", "llama"),
    Case(2, f"{TP} 2 {SP} --compile", "olmo"),
    Case(2, f"{TWO} {SCHEDULE} zb-h1 --compile", "untied"),
    Case(2, f"{CP} 2 --compile", "gemma"),
    Case(2, f"{STRATEGY} optim_grads_params --compile", "neox"),
]
