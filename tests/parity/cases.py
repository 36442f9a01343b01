"""List the layouts that are compared with one process: the parity table."""

import re
from dataclasses import dataclass
from math import prod

from runs import CHUNKS, CP, INSTANCES, PP, SCHEDULE, SP, STRATEGY, TP, ZERO1

FIRST = "--decoder-first-pipeline-num-layers"
LAYOUT = "--pipeline-model-parallel-layout"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 3000"
# Stages of 3 and of 7 layers.
TWO = f"{PP} 2 {FIRST} 2"
FOUR = f"{PP} 4 {LAYOUT} Ett|tt|tt|tL"
# Two chunks on each rank, the last one of them the head alone.
V2 = f"{PP} 2 {LAYOUT} Et|t|t|L"
V4 = f"{PP} 4 {LAYOUT} Et|t|t|t|t|t|t|L"
SIZES = re.compile(r"(?:tensor-model|pipeline-model|context)-parallel-size (\d)")

# What the table in docs/parallelism.md writes for flags, the longer ones first.
SHORT = {
    V4: "pp 4x2",
    V2: "pp 2x2",
    FOUR: "pp 4",
    TWO: "pp 2",
    OVERLAP: "overlap",
    f"{STRATEGY} optim_grads_params": "zero-3",
    f"{STRATEGY} optim_grads": "zero-2",
    ZERO1: "zero-1",
    f"{INSTANCES} 2": "2 instances",
    f"{CHUNKS} 3": "3 chunks",
    f"{TP} ": "tp ",
    f"{CP} ": "cp ",
    SP: "sp",
    f"{SCHEDULE} ": "",
    "--cp-comm-type ": "",
    "--ddp-bucket-size ": "bucket ",
    "--recompute-granularity ": "recompute ",
    "--recompute-method ": "",
    "--recompute-num-layers 2": "every 2",
    "--compile": "compile",
}


@dataclass(frozen=True)
class Case:
    """One layout and the model that runs under it.

    ranks: number of processes; those that the flags do not use are data parallel
    flags: the layout
    model: a key of harness.MODELS
    core: part of `make test`
    """

    ranks: int
    flags: str
    model: str = "llama"
    core: bool = False

    @property
    def arguments(self) -> str:
        """Return the flags of the run.

        Where tensor or context ranks share all the work, each of four micro-batches has two
        samples: half as many messages.
        """
        data_parallel = self.ranks // prod(int(size) for size in SIZES.findall(self.flags))
        if data_parallel == 1 and (TP in self.flags or CP in self.flags):
            return f"{self.flags} --micro-batch-size 2"
        return self.flags

    @property
    def short(self) -> str:
        """Return the layout in the words of the table in docs/parallelism.md."""
        text = self.flags
        for flags, word in SHORT.items():
            text = text.replace(flags, word)
        return text or "-"

    def __str__(self) -> str:
        text = self.flags
        for dropped in ("-model-parallel-size", "-parallel-size", "--"):
            text = text.replace(dropped, "")
        words = "-".join(text.split())
        return f"{self.model}-{self.ranks}-{words}".replace("|", "!")


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
    # some ranks hold no row of some parameter
    Case(4, f"{STRATEGY} optim_grads_params", "narrow"),
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
