"""Count the memory that a pass needs on top of what is kept: its temporaries at the fullest moment.

A pass is fullest at one of these moments, each looked at by itself:

    loss        logits of some tokens, copies of them, the gradient of the head's input
    down        backward of the last layer's down projection, beside what a recomputed group made
    activation  backward of its activation: the gradient of its input is made, its own not yet gone
    up          backward of its up projection
    embedding   the gradient of its rows, when everything else of the chunk is gone

Whatever a moment no longer needs of the kept memory is subtracted, so that "kept + working" is the
peak of the whole pass.
"""

from ..config import ModelConfig
from ..config.sizes import LOGITS_AT_A_TIME, LOGITS_IN_CACHE
from .ops_kept import activation_widths
from .parameters import ModelChunk, local_vocabulary, local_widths
from .pass_spec import FP32, PassSpec


def working_bytes(
    model: ModelConfig,
    vocab_size: int,
    chunk: ModelChunk,
    spec: PassSpec,
    *,
    recomputed: int,
    layers: int,
    head: int,
) -> int:
    """Return the bytes on top of the kept ones at the fullest moment of a pass.

    recomputed: what a group of recomputed layers makes again. layers, head: what the chunk's layers
    keep, and its last norm and head.
    """
    moments = [0]
    if chunk.predicts:
        moments.append(_at_the_loss(model, vocab_size, spec))
    if chunk.layers:
        # The head's memory is gone when the last layer goes backward.
        moments += [recomputed - head + extra for extra in _in_the_last_layer(model, spec)]
    if chunk.embeds:
        moments.append(_at_the_embedding(model, vocab_size, spec) - layers - head)
    return max(moments)


def _in_the_last_layer(model: ModelConfig, spec: PassSpec) -> list[int]:
    """Return the bytes of three moments of the last layer's feed-forward backward pass."""
    widths = local_widths(model, spec.tp)
    h = model.hidden_size
    tokens = spec.itemsize * spec.tokens  # bytes of one number for every token
    # The gradient that arrives; with sequence parallel it is gathered over all tokens too.
    dy = spec.hidden_bytes(model)
    gathered = _gathered(model, spec)

    down = dy + gathered + _linear(spec, widths.feed_forward, h)

    pre_activation_gradient = tokens * widths.up
    activation = dy + pre_activation_gradient

    # What the activation kept is gone when its input's gradient goes through the up projection.
    freed = tokens * widths.feed_forward * activation_widths(model, spec)
    up = dy + gathered + pre_activation_gradient - freed + _linear(spec, h, widths.up)
    return [down, activation, up]


def _gathered(model: ModelConfig, spec: PassSpec) -> int:
    """Return the bytes of hidden states gathered over tp: none unless they were cut by tokens."""
    if not spec.sequence_parallel:
        return 0
    return spec.itemsize * spec.tokens * model.hidden_size


def _linear(spec: PassSpec, inputs: int, outputs: int) -> int:
    """Return the bytes that the backward pass of a linear layer makes.

    16 bits    dx, and the weight's gradient before it joins the fp32 sum
    fp32       dx alone, since the product adds to the sum itself
    widened    dx as it comes out in fp32, and fp32 copies of dy and the weight
    """
    dx = spec.tokens * inputs
    dy = spec.tokens * outputs
    weight = inputs * outputs
    if spec.widens:
        return FP32 * (dx + weight + dy)
    if spec.itemsize == FP32:
        return FP32 * dx
    return spec.itemsize * (dx + weight)


def _at_the_embedding(model: ModelConfig, vocab_size: int, spec: PassSpec) -> int:
    """Return the bytes of the gradients of the embedding's output [b, t, H] and of its rows."""
    rows = spec.tokens + local_vocabulary(model, vocab_size, spec.tp)
    return spec.itemsize * model.hidden_size * rows


def _at_the_loss(model: ModelConfig, vocab_size: int, spec: PassSpec) -> int:
    """Return the bytes that the head and its loss make beside the head's input.

    The gradient of that input, whole; the logits of some tokens; and on top the larger of two:
    fp32 tensors of the size of the logits (a cap's derivative; in PyTorch two copies of the logits,
    three from 16 bits), or the weight's gradient in 16 bits.
    """
    h = model.hidden_size
    words = local_vocabulary(model, vocab_size, spec.tp)
    narrow = spec.itemsize != FP32 and not spec.widens
    number = FP32 if spec.widens else spec.itemsize

    # A cap's derivative stays from the logits to their gradient; making it takes another copy.
    logits = _logits_at_a_time(words, spec)
    slope = 0
    if model.final_logit_softcapping is not None:
        slope = FP32 * logits
    copies = 3 if narrow else 2
    losses = slope + copies * FP32 * _copied_logits(logits, spec)
    # In fp32 the product adds to the weight's gradient itself.
    weight_gradient = number * words * h if narrow else 0
    extra = max(2 * slope, losses, slope + weight_gradient)

    # The head's operands in fp32: its input, and this rank's rows of the weight.
    wide_operands = 0
    if spec.widens:
        wide_operands = FP32 * h * (spec.tokens + words)
    gradient = number * spec.tokens * h
    operands = wide_operands + _gathered(model, spec)
    return operands + gradient + number * logits + extra


def _logits_at_a_time(words: int, spec: PassSpec) -> int:
    """Return how many logits exist at a time: those of a few tokens, over this rank's words."""
    tokens = max(1, LOGITS_AT_A_TIME[spec.device] // words)
    return min(spec.tokens, tokens) * words


def _copied_logits(logits: int, spec: PassSpec) -> int:
    """Return how many logits are copied to fp32 at a time.

    None in our own kernel; in PyTorch all of them, or on a CPU as many as stay in its cache.
    """
    if "cross_entropy" in spec.fused:
        return 0
    if spec.device == "cpu":
        return min(logits, LOGITS_IN_CACHE)
    return logits
