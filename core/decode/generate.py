"""Generation: a model continues a prompt, token by token."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..model.gpt import GPT
from .cache import KVCache
from .sampling import Sampling, sample

_LAST = slice(-1, None)


class Decoder:
    """A model that is fed a few tokens at a time, and remembers those before.

    Arguments:
        model: a whole model in one process
        batch: number of sequences
        capacity: tokens that each sequence may come to
    """

    def __init__(self, model: GPT, batch: int, capacity: int):
        self.model = model
        self.batch = batch
        self.capacity = capacity
        self.cache = self._empty_cache()
        self.sequence: Tensor | None = None  # int64 [B, T], all tokens so far

    def logits(self, tokens: Tensor, predicted: slice | None = _LAST) -> Tensor:
        """Feed tokens int64 [B, T] that continue the sequences; return logits [B, 1, V].

        predicted: the tokens of this call whose logits are returned; the last one by default, all
        if None.
        """
        sequence = tokens
        if self.sequence is not None:
            sequence = torch.cat((self.sequence, tokens), dim=1)
            if self._turn_otherwise(self.sequence.shape[1], sequence.shape[1]):
                # The keys so far were rotated for a shorter sequence: all tokens once more.
                self.cache = self._empty_cache()
                tokens = sequence
        self.sequence = sequence
        count = tokens.shape[1]
        context = self.cache.context(count, tokens.device)
        logits = self.model(tokens, context, predicted=predicted)
        self.cache.advance(count)
        return logits

    def _empty_cache(self) -> KVCache:
        return KVCache(self.model.layers, self.batch, self.capacity)

    def _turn_otherwise(self, length: int, longer: int) -> bool:
        """Return whether sequences of these two lengths are rotated by other frequencies."""
        rotary = self.model.rotary
        if rotary is None:
            return False
        return rotary.is_long(longer) != rotary.is_long(length)


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Yield the tokens int64 [B], one position at a time, that continue prompt int64 [B, T].

    The caller stops when it has enough. The generator lives on the CPU, so that a seed means the
    same on every device.
    """
    model.eval()
    batch, length = prompt.shape
    decoder, tokens = Decoder(model, batch, length + max_new_tokens), prompt
    for _ in range(max_new_tokens):
        logits = decoder.logits(tokens)[:, -1, : model.vocab_size].float()
        chosen = sample(logits, sampling, generator)
        yield chosen
        tokens = chosen.unsqueeze(1)
