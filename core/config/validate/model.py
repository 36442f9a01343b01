"""Checks of the model: its shape, its switches, attention and rotation."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import FlagError
from ..fields import (
    ACTIVATIONS,
    EXACT_GELU,
    ROPE_OPTIONS,
    ROPE_SCALINGS,
    Config,
    ModelConfig,
    flag_of,
)
from .words import nearest_multiples, positive, share


def check_model(config: Config, world_size: int) -> Iterator[str]:
    """Yield the problems of the model, whatever it is trained on and how it is cut."""
    shape = config.model
    yield from _sizes(shape)
    yield from _feed_forward(shape)
    yield from _norms(shape)
    rotates = shape.position_embedding_type == "rope"
    if shape.use_rope_scaling and not rotates:
        kind = shape.position_embedding_type
        yield f"--use-rope-scaling needs --position-embedding-type rope, not {kind}"
    length, longest = config.batch.seq_length, shape.max_position_embeddings
    if length and longest and length > longest:
        yield (
            f"--seq-length {length} is longer than --max-position-embeddings {longest}; "
            f"raise the latter to {length}"
        )
    yield from _attention(shape)
    yield from _rotary(shape) if rotates else _rotary_flags_without_rotation(shape)
    yield from share(shape, "attention_dropout", "hidden_dropout")


def _sizes(model: ModelConfig) -> Iterator[str]:
    yield from positive(
        model,
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_channels",
        "num_query_groups",
        "make_vocab_size_divisible_by",
        "rotary_base",
        "rope_scaling_factor",
        "init_method_std",
    )
    if model.norm_epsilon < 0:
        yield f"--norm-epsilon {model.norm_epsilon} must not be negative"
    hidden, heads = model.hidden_size, model.num_attention_heads
    groups = model.num_query_groups
    # Only where --kv-channels follows from the two: given by itself, heads need not fill the width.
    if hidden and heads and heads > 0 and hidden % heads and hidden // heads == model.kv_channels:
        near = nearest_multiples(hidden, heads)
        yield (
            f"--hidden-size {hidden} is not a multiple of --num-attention-heads {heads}; "
            f"use {near}, or set --kv-channels"
        )
    if model.group_query_attention and heads and groups > 0 and heads % groups:
        divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        yield (
            f"--num-query-groups {groups} does not divide --num-attention-heads {heads}; "
            f"use one of {divisors}"
        )
    if groups > 1 and not model.group_query_attention:
        yield f"--num-query-groups {groups} needs --group-query-attention"


def _feed_forward(model: ModelConfig) -> Iterator[str]:
    given = [flag_of(switch) for switch in ACTIVATIONS if getattr(model, switch)]
    if len(given) > 1:
        yield f"{' and '.join(given)} exclude each other; give one"
    if model.exact_gelu and model.activation != EXACT_GELU:
        yield f"--exact-gelu has no GELU to act on with {given[0]}; leave one out"


def _norms(model: ModelConfig) -> Iterator[str]:
    if model.qk_layernorm_width == "projection":
        if not model.qk_layernorm:
            yield "--qk-layernorm-width projection needs --qk-layernorm"
        if model.normalization != "RMSNorm" or model.apply_layernorm_1p:
            yield (
                "--qk-layernorm-width projection is an RMSNorm with a plain weight; "
                "give --normalization RMSNorm without --apply-layernorm-1p"
            )
    if model.parallel_residual and model.norm_placement == "post":
        yield (
            "--parallel-residual needs the norms before the branches; "
            "give --norm-placement pre or both"
        )


def _attention(model: ModelConfig) -> Iterator[str]:
    """Yield the problems of scores and windows."""
    yield from positive(model, "softmax_scale", "attn_logit_softcapping", "final_logit_softcapping")
    # No implementation of attention has both: the cap is in the kernels without dropout.
    if model.attn_logit_softcapping and model.attention_dropout > 0:
        yield (
            f"--attn-logit-softcapping {model.attn_logit_softcapping} has no attention dropout; "
            f"give --attention-dropout 0, not {model.attention_dropout}"
        )
    if model.window_attn_skip_freq is not None and model.window_size is None:
        yield f"--window-attn-skip-freq {model.window_attn_skip_freq} needs --window-size"
    # Both flags are read for every layer alike: if they can be read for one, they can for all.
    try:
        model.window(0)
    except FlagError as error:
        yield str(error)


def _rotary_flags_without_rotation(model: ModelConfig) -> Iterator[str]:
    kind = model.position_embedding_type
    for name in ("rope_scaling", "rotary_base_local"):
        value = getattr(model, name)
        if value is not None:
            yield f"{flag_of(name)} {value} needs --position-embedding-type rope, not {kind}"


def _rotary(model: ModelConfig) -> Iterator[str]:
    if not model.kv_channels:
        return
    yield from positive(model, "rotary_base_local")
    if model.rotary_base_local and model.window_size is None:
        yield (
            f"--rotary-base-local {model.rotary_base_local} is for layers with a window; "
            "give --window-size, or leave it out"
        )
    rotated = int(model.kv_channels * model.rotary_percent)
    given = f"--rotary-percent {model.rotary_percent}"
    if not 0 < model.rotary_percent <= 1:
        yield f"{given} is not in (0, 1]"
    elif rotated % 2:  # dims are rotated in pairs
        head = f"a head of {model.kv_channels}"
        yield f"{given} of {head} rotates {rotated} dims; the number must be even"
    if model.rope_scaling is not None:
        yield from _rope_scaling(model, rotated // 2)


def _rope_scaling(model: ModelConfig, pairs: int) -> Iterator[str]:
    """Yield the problems of --rope-scaling. pairs: how many frequencies there are."""
    if model.use_rope_scaling:
        yield "--use-rope-scaling and --rope-scaling exclude each other; give one"
        return
    rule = _rope_rule(model)
    if rule is None:
        example = '{"rope_type":"linear","factor":2.0}'
        yield f"--rope-scaling {model.rope_scaling} is no JSON object such as {example}"
        return
    kind = rule.get("rope_type")
    if kind not in ROPE_SCALINGS:
        yield f"--rope-scaling: rope_type {kind!r} is none of {', '.join(ROPE_SCALINGS)}"
        return
    for key in ROPE_SCALINGS[kind]:
        yield from _needed_number(kind, key, rule.get(key), pairs)
    yield from _optional_numbers(kind, rule)
    if kind == "yarn" and model.rotary_base <= 1:
        yield f"--rope-scaling yarn needs --rotary-base above 1, not {model.rotary_base}"


def _rope_rule(model: ModelConfig) -> dict[str, Any] | None:
    """Return what --rope-scaling says; None for what is no JSON object."""
    try:
        rule = model.rope_rule
        return None if rule is None else dict(rule)
    except (ValueError, TypeError):
        return None


def _needed_number(kind: str, key: str, value: Any, pairs: int) -> Iterator[str]:
    if not key.endswith(("short_factor", "long_factor")):
        if not _is_positive(value):
            yield f"--rope-scaling: {kind} needs {key}, a number above 0, not {value}"
        return
    numbers = value if isinstance(value, list) else []
    if len(numbers) != pairs or not all(_is_positive(number) for number in numbers):
        yield (
            f"--rope-scaling: {kind} needs {key}, {pairs} numbers above 0 "
            f"(half of the dims of a head that are rotated), not {value}"
        )


def _optional_numbers(kind: str, rule: dict[str, Any]) -> Iterator[str]:
    options: Sequence[str] = ROPE_OPTIONS if kind in ("yarn", "longrope") else ()
    known = (*ROPE_SCALINGS[kind], *options)
    for key, value in rule.items():
        if key not in ("rope_type", *known):
            takes = ", ".join(known) or "nothing"
            yield f"--rope-scaling: {key} is nothing that {kind} has; it takes {takes}"
        is_number = key in options and key != "truncate"
        if is_number and value is not None and not _is_positive(value):
            yield f"--rope-scaling: {key} must be a number above 0, not {value}"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
