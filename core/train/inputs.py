"""One micro-batch as this rank sees it: its tokens of each sample, and what its layers need to know of them."""

from dataclasses import dataclass

import torch

from .. import rng
from ..config import Config
from ..data.loader import Batch
from ..model.tokens import TokenContext
from ..parallel.context import local_tokens, token_positions
from ..parallel.sharding import Sharding


@dataclass(frozen=True)
class Inputs:
    """On the device. tokens and labels: int64 [B, T/cp]; mask: [B, T/cp]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    context: TokenContext


@dataclass(frozen=True)
class PrepareBatch:
    """From whole samples on the host to Inputs; the copies do not wait. eod: the id that ends a document."""

    config: Config
    sharding: Sharding
    device: torch.device
    eod: int

    def __call__(self, batch: Batch, iteration: int | None) -> Inputs:
        """iteration: of the update, which dropout depends on; None in evaluation."""
        config, cp = self.config, self.sharding.cp
        tokens, labels, mask = (
            tensor.to(self.device, non_blocking=True)
            for tensor in (batch.tokens, batch.labels, batch.loss_mask)
        )
        positions = token_positions(tokens.shape[1], cp, self.device)
        stream = None
        if iteration is not None and config.model.hidden_dropout > 0:
            stream = rng.DropoutStream.of(
                config.batch.seed, iteration, batch.samples, self.sharding.own_tokens(positions)
            )
        documents = None
        if config.data.reset_attention_mask or config.data.reset_position_ids:
            documents = document_indices(tokens, self.eod)
        if config.data.reset_position_ids:
            positions = local_tokens(positions_in_documents(documents), cp)
        context = TokenContext(
            positions,
            documents if config.data.reset_attention_mask else None,
            stream,
            tokens.shape[1],
        )
        return Inputs(*(local_tokens(tensor, cp) for tensor in (tokens, labels, mask)), context)


def document_indices(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """For each token of [B, T], how many documents ended before it: an end-of-document token belongs to the document it ends."""
    ends = (tokens == eod).long()
    return ends.cumsum(dim=1) - ends


def positions_in_documents(documents: torch.Tensor) -> torch.Tensor:
    """int64 [B, T]: the distance of each token from the first one of its document in the sample."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.where(documents.diff(dim=1, prepend=documents[:, :1] - 1) > 0, places, 0)
    return places - starts.cummax(dim=1).values
