"""Owns the cut of the model into pipeline stages: which layers each stage has, and which stages embed and predict."""

import re
from dataclasses import dataclass
from itertools import accumulate

from ..config import FlagError
from .plan import Placement

PP, LAYERS = "--pipeline-model-parallel-size", "--num-layers"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
WITH_EMBEDDING, WITH_LOSS = (
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
)
LAYOUT = "--pipeline-model-parallel-layout"


@dataclass(frozen=True)
class StageSpec:
    """One stage: its layers, counted from 0 over the whole model, and whether the embedding is before them and the head and loss behind."""

    layers: range
    embeds: bool
    predicts: bool


def split_layers(
    num_layers: int,
    placement: Placement,
    *,
    first: int | None = None,
    last: int | None = None,
    account_for_embedding: bool = False,
    account_for_loss: bool = False,
    layout: str | None = None,
) -> tuple[StageSpec, ...]:
    """The stages in the order in which a micro-batch passes them. The choices and what they mean are Megatron-LM's.

    `first`, `last`: layers of the first and last pipeline rank, over all its chunks; the other ranks share the rest evenly.
    `account_for_...`: the embedding, the loss weigh as much as one layer. `layout`: every stage by hand, as in `parse_layout`.
    Raises FlagError, with a remedy, where the numbers do not fit.
    """
    uneven = [flag for flag, given in ((FIRST, first), (LAST, last)) if given is not None]
    accounts = [
        flag
        for flag, given in ((WITH_EMBEDDING, account_for_embedding), (WITH_LOSS, account_for_loss))
        if given
    ]
    if layout is not None and uneven + accounts:
        raise FlagError(
            f"{LAYOUT} says all about the stages; leave out {' and '.join(uneven + accounts)}"
        )
    if uneven and accounts:
        raise FlagError(
            f"{' and '.join(uneven)} cannot be had with {' and '.join(accounts)}; use {LAYOUT} for such a split"
        )
    if layout is not None:
        counts = _counts_of_layout(num_layers, placement, layout)
    elif uneven:
        counts = _counts_with_uneven_ends(num_layers, placement, first, last)
    else:
        counts = _even_counts(num_layers, placement, account_for_embedding, account_for_loss)
    ends = list(accumulate(counts))
    return tuple(
        StageSpec(range(end - count, end), embeds=stage == 0, predicts=stage == len(counts) - 1)
        for stage, (count, end) in enumerate(zip(counts, ends, strict=True))
    )


def parse_layout(layout: str) -> list[str]:
    """A string of E (embedding), t (layer) and L (loss) for each stage, from Megatron-LM's notation.

    `|` stands between stages, `x*3` and `(...)*3` repeat, commas and spaces are for the eye:
    "Et*2|(tt|)*2,L" is ["Ett", "tt", "tt", "L"]. Raises FlagError at other characters.
    """
    text = re.sub(r"[,\s]", "", layout)
    for repeated in (r"\(([^()]*)\)\*(\d+)", r"([^()*])\*(\d+)"):
        text = re.sub(repeated, lambda found: found[1] * int(found[2]), text)
    if "m" in text:
        raise FlagError(
            f"{LAYOUT} {layout} has m, a multi-token prediction layer, and there are none; leave it out"
        )
    if wrong := sorted(set(text) - set("EtL|")):
        raise FlagError(
            f"{LAYOUT} {layout} has {' '.join(wrong)} where E, t, L, |, x*n or (...)*n is expected"
        )
    return text.split("|")


def _stages(placement: Placement) -> str:
    if placement.num_chunks == 1:
        return f"{PP} {placement.num_ranks} stages"
    return f"{PP} {placement.num_ranks} x {placement.num_chunks} model chunks = {placement.num_stages} stages"


def _even_counts(num_layers: int, placement: Placement, embedding: bool, loss: bool) -> list[int]:
    num_stages, extra = placement.num_stages, embedding + loss
    if (num_layers + extra) % num_stages:
        below = (num_layers + extra) // num_stages * num_stages - extra
        remedies = [
            f"use {' or '.join(str(count) for count in (below, below + num_stages) if count > 0)}"
        ]
        first = [
            n
            for n in _counts_that_fit(num_layers, placement.num_ranks - 1, placement.num_chunks)
            if n <= num_layers // placement.num_ranks
        ]
        if first and not extra:
            remedies.append(f"set {FIRST} {max(first)}")
        counted = (
            f" with {' and '.join([WITH_EMBEDDING] * embedding + [WITH_LOSS] * loss)} makes {num_layers + extra}, which"
            if extra
            else ""
        )
        raise FlagError(
            f"{LAYERS} {num_layers}{counted} cannot be cut into {_stages(placement)}; {', or '.join(remedies)}"
        )
    counts = [(num_layers + extra) // num_stages] * num_stages
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


def _counts_that_fit(num_layers: int, others: int, chunks: int) -> list[int]:
    """How many layers one rank can have for `others` to share the rest evenly, each at least one for every chunk."""
    return [
        n
        for n in range(chunks, num_layers, chunks)
        if others
        and num_layers - n >= others * chunks
        and (num_layers - n) % (others * chunks) == 0
    ]


def _counts_with_uneven_ends(
    num_layers: int, placement: Placement, first: int | None, last: int | None
) -> list[int]:
    ranks, chunks = placement.num_ranks, placement.num_chunks
    given = {flag: count for flag, count in ((FIRST, first), (LAST, last)) if count is not None}
    if ranks == 1:
        raise FlagError(f"{' and '.join(given)} cannot be had with {PP} 1; use 2 or more")
    for flag, count in given.items():
        if count < 1 or count % chunks:
            near = max(count // chunks, 1) * chunks
            raise FlagError(
                f"{flag} {count} cannot be cut into {chunks} model chunk{'s' * (chunks > 1)}; use {near} or {near + chunks}"
            )
    rest, others = num_layers - sum(given.values()), ranks - len(given)
    said = f"{LAYERS} {num_layers} less {' and '.join(f'{flag} {count}' for flag, count in given.items())} leaves {rest} layers"
    if others == 0 and rest != 0:
        raise FlagError(f"{said} and no stage for them; the two must add up to {LAYERS}")
    if others > 0 and (rest < others * chunks or rest % (others * chunks)):
        flag, count = next(iter(given.items()))
        near = sorted(
            _counts_that_fit(rest + count, others, chunks), key=lambda n: (abs(n - count), n)
        )[:2]
        remedy = (
            f"{flag} {' or '.join(map(str, near))}"
            if near
            else f"{LAYERS} {num_layers - rest + others * chunks}"
        )
        raise FlagError(
            f"{said}, which cannot be cut into {others} x {chunks} stages; use {remedy}"
        )
    of_rank = [rest // others if others else 0] * ranks
    of_rank[0] = of_rank[0] if first is None else first
    of_rank[-1] = of_rank[-1] if last is None else last
    return [
        of_rank[placement.rank_and_chunk(stage)[0]] // chunks
        for stage in range(placement.num_stages)
    ]


def _counts_of_layout(num_layers: int, placement: Placement, layout: str) -> list[int]:
    stages = parse_layout(layout)
    said = f"{LAYOUT} {layout}"
    if len(stages) != placement.num_stages:
        raise FlagError(
            f"{said} has {len(stages)} stages for {_stages(placement)}; add or join some"
        )
    whole = "".join(stages)
    if (
        whole.count("E") != 1
        or whole.count("L") != 1
        or not stages[0].startswith("E")
        or not stages[-1].endswith("L")
    ):
        raise FlagError(
            f"{said} has {' | '.join(stages)}; the first stage begins with the only E, the last one ends with the only L"
        )
    if whole.count("t") != num_layers:
        raise FlagError(
            f"{said} has {whole.count('t')} layers for {LAYERS} {num_layers}; make them equal"
        )
    return [stage.count("t") for stage in stages]
