"""Make rows of the train suite's results and print them."""

from typing import Any

from benchmarks.candidate import Result
from benchmarks.engine import vocabulary
from benchmarks.limits import Peaks
from benchmarks.table import Column, Row, Table, number, ratio, share
from trivium.config import Config
from trivium.estimate.flops import flops_per_token

# Largest relative distance of a loss. Measured over 12 updates: 2e-6 and 1.4e-3; where a layer is
# left out, 3e-2.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
VERDICTS = {
    True: "",
    False: "  DISAGREES: does not compute the same",
    None: "  NOT CHECKED: the reference had no time for its batch",
}


def rows_of(results: dict[str, Result], absent: dict[str, str], peaks: Peaks) -> dict[str, Row]:
    """Return a row for each candidate, with how many times faster Trivium is at that precision.

    results: of the candidates that were to run, by name
    absent: why others were left out, by name
    peaks: FLOP/s of a matrix product, by number format
    """
    rows = {name: row_of(result, peaks) for name, result in results.items()}
    for name, why in absent.items():
        rows[name] = {"left_out": why}
    for row in rows.values():
        ours = rows.get(f"Trivium {row.get('precision')}", {})
        our_rate = ours.get("tokens_per_second")
        rate = row.get("tokens_per_second")
        if rate and our_rate:
            row["trivium_is_faster"] = our_rate / rate
    return rows


def row_of(result: Result, peaks: Peaks) -> Row:
    """Return everything that is known of one candidate.

    peaks: FLOP/s of a matrix product, by number format
    """
    if result.failure is not None:
        return {"left_out": result.failure.reason}
    precision = "bf16" if result.config.precision.bf16 else "fp32"
    # A machine whose bf16 products are slower computes them in fp32, so the faster peak counts.
    peak = max(peaks.values()) if precision == "bf16" else peaks["fp32"]
    faults = sorted(update.faults for update in result.timed)
    deviation = result.deviation
    agrees = deviation <= TOLERANCE[precision] if result.expected else None
    config = result.config
    rate = result.tokens_per_second
    return {
        "precision": precision,
        "batch": result.batch,
        "updates": len(result.timed),
        "milliseconds": result.seconds * 1e3,
        "spread": result.spread,
        "seconds": [update.seconds for update in result.timed],
        "tokens_per_second": rate,
        "mfu_full": utilization(config, rate, peak, causal=False),
        "mfu_causal": utilization(config, rate, peak, causal=True),
        "memory": result.memory.total,
        "own_memory": result.memory.own,
        "page_faults": faults[len(faults) // 2],
        "losses": result.losses,
        "held_against": result.reference,
        "deviation": deviation,
        "agrees": agrees,
    }


def utilization(config: Config, tokens_per_second: float, peak: float, *, causal: bool) -> float:
    """Return the share of the peak that the model's own operations make up.

    peak: FLOP per second
    causal: count causal attention (6N + 6LhT a token) instead of full attention (6N + 12LhT)
    """
    length = config.batch.seq_length
    flops = flops_per_token(config.model, vocabulary(config), length, causal=causal)
    return tokens_per_second * flops / peak


TABLE = Table(
    "",
    32,
    [
        Column("batch", 6, number("batch")),
        Column("updates", 8, number("updates")),
        Column("ms/update", 11, number("milliseconds", 1)),
        Column("spread", 8, lambda row: f"{row['spread']:.1%}" if row["updates"] > 1 else "-"),
        Column("tokens/s", 10, number("tokens_per_second")),
        Column("Trivium x", 10, ratio("trivium_is_faster")),
        Column("MFU", 7, share("mfu_full", 1)),
        Column("causal", 8, share("mfu_causal", 1)),
        Column("MB", 7, number("own_memory", scale=1e-6)),
        Column("total", 7, number("memory", scale=1e-6)),
        Column("faults", 9, number("page_faults")),
        Column("loss", 9, number("shown_loss", 4)),
        Column("off by", 9, lambda row: f"{row['deviation']:.1e}"),
    ],
)


def report(shape: str, config: Config, rows: dict[str, Row]) -> None:
    """Print the table of one model and what its columns mean.

    shape: the name of the model
    config: its configuration, with the whole batch
    rows: by candidate
    """
    whole_batch = config.batch.global_batch_size
    print(f"\n{shape}: {describe(config)}")
    print(TABLE.header())
    whole = [row for row in rows.values() if row.get("batch") == whole_batch]
    # Losses are shown after as many updates as every candidate with the whole batch has done.
    common = min((len(row["losses"]) for row in whole), default=1)
    for name, row in rows.items():
        if "left_out" in row:
            print(f"{name:<32}left out: {row['left_out']}")
            continue
        shown = row | {"shown_loss": row["losses"][:common][-1]}
        print(TABLE.line(name, shown) + VERDICTS[row["agrees"]])
    smaller = [name for name, row in rows.items() if row.get("batch", whole_batch) < whole_batch]
    if smaller:
        print(
            "fewer sequences an update, since all of them would take too long here; "
            f"tokens/s compare: {', '.join(smaller)}"
        )
    references = [row["held_against"] for row in rows.values() if "held_against" in row]
    print(
        "MB: highest memory of the process above what it held after its imports, and in total; "
        "faults: pages mapped in by an update"
    )
    print(
        f"loss: of update {common}; "
        f"every loss was held against that of {references[0]} "
        f"on the same sequences: {verdict(rows)}"
    )


def describe(config: Config) -> str:
    """Return the model and the batch in words."""
    model = config.model
    batch = config.batch
    return (
        f"{model.num_layers} layers, {model.hidden_size} wide, "
        f"{model.num_attention_heads} heads, feed-forward {model.ffn_hidden_size}, "
        f"vocabulary {vocabulary(config)}, "
        f"{batch.global_batch_size} sequences of {batch.seq_length} tokens"
    )


def verdict(rows: dict[str, dict[str, Any]]) -> str:
    """Return which candidates' losses are too far from the reference's."""
    wrong = [name for name, row in rows.items() if row.get("agrees") is False]
    limits = " and ".join(f"{limit:g} in {name}" for name, limit in TOLERANCE.items())
    if wrong:
        return f"{', '.join(wrong)} beyond {limits}"
    return f"all that were checked within {limits}"
