"""Count what attention keeps for the backward pass, by how keys and values reach the queries.

Attention takes one fused projection [b, t, q + 2 k], cuts it into q, k and v, may normalize q and
k, turns them by rope, and computes o [b, t, q], the input of the output projection.

The three parts are views. As long as nothing moves them, whoever keeps one of them keeps the whole
projection. Norms and PyTorch's rope make new tensors for q and k instead (they are `moved`); our
own rope turns them where they stand. So the core of attention keeps

    projection                e b t (q + 2 k)
    rotated q and k           e b t (q + k)     only if moved
    o                         e b t q
    log-sum-exp of scores     4 b t A / tp      flash attention's only record of its scores

and each way of exchanging keys and values over cp adds copies of its own:

    one rank    nothing
    p2p         nothing: the ring sends k and v again in backward
    allgather   k and v of the whole sequence
    a2a         q, k and v of the whole sequence, for 1 / cp of the heads
"""

from math import gcd

from ..config import ModelConfig
from .ops_kept import NormKept
from .parameters import local_widths
from .pass_spec import FP32, PassSpec, window_share


class AttentionKept:
    """The bytes that attention keeps of one layer and micro-batch, from its projection to o."""

    def __init__(self, model: ModelConfig, spec: PassSpec):
        self.model = model
        self.spec = spec
        widths = local_widths(model, spec.tp)
        self.q = widths.query
        self.k = widths.key
        self.heads = model.num_attention_heads // spec.tp
        # Scores with a cap are computed by our own operation, which makes them again in backward.
        self.capped = model.attn_logit_softcapping is not None
        has_rope = model.position_embedding_type == "rope"
        self.moved = model.qk_layernorm or (has_rope and "rope" not in spec.fused)

        # Bytes of one number for every token: all tensors below are this times a width.
        tokens = spec.itemsize * spec.tokens
        self.projection = tokens * widths.qkv
        self.output = tokens * self.q
        # What attention itself is given: the projection, and q and k again if they moved.
        self.inputs = self.projection
        if self.moved:
            self.inputs += tokens * (self.q + self.k)

    def total(self) -> int:
        """Return all bytes, those of the norms of q and k and of rope's tables included."""
        norms, views_projection = self._qk_norms()
        kept = rope_tables_per_layer(self.model, self.spec) + norms
        if self.spec.recompute == "selective":
            return kept + self.inputs + self.output
        # If a norm keeps a view of the projection, that stays beside whatever replaced it.
        viewed = self.projection if views_projection else 0
        if self._stores_scores():
            return kept + viewed + self._scores() + self.output
        match self.spec.attention_comm:
            case "p2p":
                # The ring makes its masks, and wide copies, again in backward.
                return kept + self._result(self.spec.itemsize) + self.inputs
            case "allgather":
                exchanged = self._gathered()
            case "a2a":
                exchanged = self._redistributed()
            case _:
                return kept + self._on_one_rank(viewed)
        kept += self._result(self._number()) + self._masks()
        # o is put together from the parts that come back: a second tensor.
        return kept + viewed + self.output + exchanged

    # Pieces that several ways share.

    def _number(self) -> int:
        """Return the bytes of a number in flash attention: fp32 where products are widened."""
        return FP32 if self.spec.widens else self.spec.itemsize

    def _result(self, number: int) -> int:
        """Return o, and the log-sum-exp of each head and token in fp32."""
        bt = self.spec.tokens
        return number * bt * self.q + FP32 * bt * self.heads

    def _masks(self) -> int:
        """Return masks, in the dtype of the scores; scores with a cap take a mask of bytes.

        Documents, and attention in plain PyTorch, take one for every sample and layer. Windows
        alone take one that serves all samples, in the layers that have a window.
        """
        spec = self.spec
        every_sample = spec.documents or not (spec.flash or self.capped)
        share: float = 1
        if not every_sample:
            share = window_share(self.model, spec.seq_length) / spec.micro_batch
        number = 1 if self.capped else self._number()
        # [t, T] for each sample; after an all-to-all a rank has the queries of a whole sequence.
        size = number * spec.tokens * spec.seq_length
        if spec.attention_comm == "a2a":
            size *= spec.cp
        return int(size * share)

    # The ways.

    def _stores_scores(self) -> bool:
        """Return whether all scores are kept. With a cap they are made again in backward."""
        in_one_piece = self.spec.attention_comm in (None, "a2a")
        return not self.spec.flash and not self.capped and in_one_piece

    def _scores(self) -> int:
        """Return scores [b, A / tp, t, T] in fp32, and q, k and v in fp32.

        With dropout also the scores' mask and their product. Keys and values are repeated, one head
        for each query head.
        """
        bt = self.spec.tokens
        scores = FP32 * bt * self.spec.seq_length * self.heads
        tensors = 3 if self.model.attention_dropout > 0 else 1
        operands = 3 * FP32 * bt * self.q
        return operands + tensors * scores

    def _on_one_rank(self, viewed: int) -> int:
        """Return what flash attention keeps without an exchange.

        Where products are widened: q, k, v and o in fp32, and o in 16 bits for what comes next.
        """
        kept = self._result(self._number()) + self._masks()
        if not self.spec.widens:
            return kept + self.inputs
        wide = FP32 * self.spec.tokens * (self.q + 2 * self.k)
        return kept + wide + viewed + self.output

    def _gathered(self) -> int:
        """Return q, and the keys and values of the whole sequence.

        In fp32 each of the two chunks of queries has a copy of the keys that it sees.
        """
        bt, cp = self.spec.tokens, self.spec.cp
        if self.spec.widens:
            return FP32 * bt * (self.q + (2 * cp + 1) * self.k)
        # q that did not move is a view, which keeps this rank's whole projection.
        queries = self.output if self.moved else self.projection
        gathered = self.spec.itemsize * bt * cp * 2 * self.k
        return queries + gathered

    def _redistributed(self) -> int:
        """Return q, k and v of the whole sequence for 1 / cp of the heads.

        Fewer key-value heads than ranks are repeated until each rank has one.
        """
        cp = self.spec.cp
        kv_heads = self.k // self.model.head_size
        # kv_heads 2, cp 4: 2 divides 4, so that each head is there twice.
        repeats = cp // gcd(kv_heads, cp)
        width = self.q + 2 * self.k * repeats
        return self._number() * self.spec.tokens * width

    def _qk_norms(self) -> tuple[int, bool]:
        """Return the bytes that the norms of q and k keep, and whether they view the projection."""
        model, bt = self.model, self.spec.tokens
        if not model.qk_layernorm:
            return 0, False
        elements = bt * (self.q + self.k)
        if model.qk_layernorm_width == "projection":
            # Always plain PyTorch: what was normalized, x if it is an fp32 copy, two statistics.
            normalized = self.spec.itemsize
            copies = normalized != FP32
            kept = normalized + FP32 if copies else normalized
            statistics = 2 * FP32 * bt
            return kept * elements + statistics, not copies
        # One norm over each head of each token.
        norm = NormKept.of(model, self.spec)
        rows = elements // model.head_size
        kept = norm.bytes(rows, model.head_size, of_view=True)
        return kept, not norm.copies


def rope_tables(model: ModelConfig, spec: PassSpec) -> int:
    """Return how many numbers cos and sin together have, [t, D x rotary percent] of each pair.

    Layers with a window have a second pair where --rotary-base-local is given.
    """
    if model.position_embedding_type != "rope":
        return 0
    pairs = 1 if model.rotary_base_local is None else 2
    tokens = pairs * spec.seq_length // spec.cp
    return tokens * int(model.head_size * model.rotary_percent)


def casts_rope_tables(spec: PassSpec) -> bool:
    """Return whether every layer casts cos and sin for itself: PyTorch's rope does in 16 bits.

    Otherwise all layers share one fp32 pair.
    """
    return spec.itemsize != FP32 and "rope" not in spec.fused


def rope_tables_per_layer(model: ModelConfig, spec: PassSpec) -> int:
    """Return the bytes of cos and sin as a layer casts them, once for q and once for k."""
    if not casts_rope_tables(spec):
        return 0
    return 2 * rope_tables(model, spec) * spec.itemsize


def shared_rope_tables(model: ModelConfig, spec: PassSpec) -> int:
    """Return the bytes of cos and sin in fp32, one pair for all layers."""
    return FP32 * rope_tables(model, spec)
