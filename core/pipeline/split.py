"""The cut of the model into pipeline stages: which layers each has, which embed and predict."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from ..config import FlagError
from .placement import Placement

PP = "--pipeline-model-parallel-size"
LAYERS = "--num-layers"
FIRST = "--decoder-first-pipeline-num-layers"
LAST = "--decoder-last-pipeline-num-layers"
WITH_EMBEDDING = "--account-for-embedding-in-pipeline-split"
WITH_LOSS = "--account-for-loss-in-pipeline-split"
LAYOUT = "--pipeline-model-parallel-layout"


@dataclass(frozen=True)
class StageSpec:
    """The contents of one stage.

    layers: counted from 0 over the whole model.
    embeds: the embedding comes before the layers.
    predicts: head and loss come after the layers.
    """

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
    """Cut the layers into stages, in the order in which a micro-batch passes them.

    The choices and their meanings are Megatron-LM's:
    first, last: layers of the first and the last pipeline rank, over all its chunks; the other
        ranks share the rest evenly.
    account_for_embedding, account_for_loss: count the embedding, the loss as one layer each.
    layout: every stage by hand, as in `parse_layout`.

    Raises FlagError, with a remedy, where the numbers do not fit.
    """
    uneven = _given({FIRST: first is not None, LAST: last is not None})
    accounts = _given({WITH_EMBEDDING: account_for_embedding, WITH_LOSS: account_for_loss})
    if layout is not None and uneven + accounts:
        others = " and ".join(uneven + accounts)
        raise FlagError(f"{LAYOUT} says all about the stages; leave out {others}")
    if uneven and accounts:
        raise FlagError(
            f"{' and '.join(uneven)} cannot be had with {' and '.join(accounts)}; "
            f"use {LAYOUT} for such a split"
        )
    if layout is not None:
        counts = _counts_of_layout(num_layers, placement, layout)
    elif uneven:
        counts = _counts_with_uneven_ends(num_layers, placement, first, last)
    else:
        counts = _even_counts(num_layers, placement, account_for_embedding, account_for_loss)
    ends = accumulate(counts)
    final = len(counts) - 1
    stages = []
    for stage, (count, end) in enumerate(zip(counts, ends, strict=True)):
        layers = range(end - count, end)
        stages.append(StageSpec(layers, embeds=stage == 0, predicts=stage == final))
    return tuple(stages)


def parse_layout(layout: str) -> list[str]:
    """Return each stage as a string of E (embedding), t (layer) and L (loss).

    The notation is Megatron-LM's: `|` stands between stages, `x*3` and `(...)*3` repeat, commas
    and spaces are for the eye. "Et*2|(tt|)*2,L" is ["Ett", "tt", "tt", "L"].
    Raises FlagError at other characters.
    """
    text = re.sub(r"[,\s]", "", layout)
    # Groups first: a repeat inside one is then expanded in each of its copies.
    text = re.sub(r"\(([^()]*)\)\*(\d+)", _written_out, text)
    text = re.sub(r"([^()*])\*(\d+)", _written_out, text)
    if "m" in text:
        raise FlagError(
            f"{LAYOUT} {layout} has m, a multi-token prediction layer, and there are none; "
            "leave it out"
        )
    wrong = sorted(set(text) - set("EtL|"))
    if wrong:
        raise FlagError(
            f"{LAYOUT} {layout} has {' '.join(wrong)} where E, t, L, |, x*n or (...)*n is expected"
        )
    return text.split("|")


def _written_out(repeated: re.Match[str]) -> str:
    """Return a repetition in full: tt*3 is tttttt, given as the match (tt, 3)."""
    times = int(repeated[2])
    return repeated[1] * times


def _given(flags: dict[str, bool]) -> list[str]:
    return [flag for flag, given in flags.items() if given]


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(str(number) for number in numbers)


def _stages(placement: Placement) -> str:
    """Return the flags and numbers that make the stages, for an error message."""
    ranks = f"{PP} {placement.num_ranks}"
    if placement.num_chunks == 1:
        return f"{ranks} stages"
    return f"{ranks} x {placement.num_chunks} model chunks = {placement.num_stages} stages"


def _even_counts(num_layers: int, placement: Placement, embedding: bool, loss: bool) -> list[int]:
    """Return the layers of each stage, all with the same weight."""
    num_stages = placement.num_stages
    # An end that is counted takes the place of a layer in its stage.
    units = num_layers + embedding + loss
    if units % num_stages:
        raise FlagError(_uneven(num_layers, placement, embedding, loss))
    counts = [units // num_stages] * num_stages
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


def _uneven(num_layers: int, placement: Placement, embedding: bool, loss: bool) -> str:
    """Return the message for layers that cannot be cut evenly, with what can be done."""
    num_stages = placement.num_stages
    extra = embedding + loss
    units = num_layers + extra
    # The nearest numbers of layers on both sides that can be cut evenly.
    below = units // num_stages * num_stages - extra
    above = below + num_stages
    fitting = [above]
    if below > 0:
        fitting = [below, above]
    remedies = [f"use {_either(fitting)}"]
    counted = ""
    if extra:
        flags = _given({WITH_EMBEDDING: embedding, WITH_LOSS: loss})
        counted = f" with {' and '.join(flags)} makes {units}, which"
    else:
        # A first rank with fewer layers than the others, which also embeds.
        even_share = num_layers // placement.num_ranks
        fits = _counts_that_fit(num_layers, placement.num_ranks - 1, placement.num_chunks)
        smaller = [count for count in fits if count <= even_share]
        if smaller:
            remedies.append(f"set {FIRST} {max(smaller)}")
    cannot = f"{LAYERS} {num_layers}{counted} cannot be cut into {_stages(placement)}"
    return f"{cannot}; {', or '.join(remedies)}"


def _counts_that_fit(num_layers: int, others: int, chunks: int) -> list[int]:
    """Return how many layers one rank can have for `others` to share the rest evenly.

    Each chunk has at least one layer.
    """
    if not others:
        return []
    fitting = []
    stages = others * chunks
    for count in range(chunks, num_layers, chunks):
        rest = num_layers - count
        if rest >= stages and rest % stages == 0:
            fitting.append(count)
    return fitting


def _counts_with_uneven_ends(
    num_layers: int, placement: Placement, first: int | None, last: int | None
) -> list[int]:
    """Return the layers of each stage where the first or the last rank has a number of its own."""
    ranks, chunks = placement.num_ranks, placement.num_chunks
    given: dict[str, int] = {}
    if first is not None:
        given[FIRST] = first
    if last is not None:
        given[LAST] = last
    if ranks == 1:
        raise FlagError(f"{' and '.join(given)} cannot be had with {PP} 1; use 2 or more")
    for flag, count in given.items():
        _check_end(flag, count, chunks)
    rest = num_layers - sum(given.values())
    others = ranks - len(given)
    _check_rest(num_layers, given, rest, others, chunks)
    share = rest // others if others else 0
    of_rank = [share] * ranks
    if first is not None:
        of_rank[0] = first
    if last is not None:
        of_rank[-1] = last
    counts = []
    for stage in range(placement.num_stages):
        rank = placement.rank_and_chunk(stage).rank
        counts.append(of_rank[rank] // chunks)
    return counts


def _check_end(flag: str, count: int, chunks: int) -> None:
    """Raise FlagError if a rank's layers cannot be cut into its chunks."""
    if count >= 1 and count % chunks == 0:
        return
    # At least one layer in each chunk.
    near = max(count // chunks, 1) * chunks
    plural = "s" if chunks > 1 else ""
    raise FlagError(
        f"{flag} {count} cannot be cut into {chunks} model chunk{plural}; "
        f"use {near} or {near + chunks}"
    )


def _check_rest(
    num_layers: int, given: dict[str, int], rest: int, others: int, chunks: int
) -> None:
    """Raise FlagError if the other ranks cannot share the layers that are left."""
    ends = " and ".join(f"{flag} {count}" for flag, count in given.items())
    said = f"{LAYERS} {num_layers} less {ends} leaves {rest} layers"
    if others == 0:
        if rest != 0:
            raise FlagError(f"{said} and no stage for them; the two must add up to {LAYERS}")
        return
    stages = others * chunks
    if rest >= stages and rest % stages == 0:
        return
    flag, count = next(iter(given.items()))
    fits = _counts_that_fit(rest + count, others, chunks)
    nearest = sorted(fits, key=lambda fit: (abs(fit - count), fit))[:2]
    if nearest:
        remedy = f"{flag} {_either(nearest)}"
    else:
        remedy = f"{LAYERS} {num_layers - rest + stages}"
    raise FlagError(f"{said}, which cannot be cut into {others} x {chunks} stages; use {remedy}")


def _counts_of_layout(num_layers: int, placement: Placement, layout: str) -> list[int]:
    """Return the layers of each stage as written by hand."""
    stages = parse_layout(layout)
    said = f"{LAYOUT} {layout}"
    if len(stages) != placement.num_stages:
        raise FlagError(
            f"{said} has {len(stages)} stages for {_stages(placement)}; add or join some"
        )
    whole = "".join(stages)
    one_of_each = whole.count("E") == 1 and whole.count("L") == 1
    if not (one_of_each and stages[0].startswith("E") and stages[-1].endswith("L")):
        raise FlagError(
            f"{said} has {' | '.join(stages)}; the first stage begins with the only E, "
            "the last one ends with the only L"
        )
    layers = whole.count("t")
    if layers != num_layers:
        raise FlagError(f"{said} has {layers} layers for {LAYERS} {num_layers}; make them equal")
    return [stage.count("t") for stage in stages]
