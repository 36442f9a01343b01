"""Assign the stages of a model to the chunks of pipeline ranks."""

from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """The place of a stage: a pipeline rank, and one of its model chunks."""

    rank: int
    chunk: int


@dataclass(frozen=True)
class Placement:
    """The stages of a schedule, laid out over its ranks. With 3 ranks and 2 chunks on each:

                     rank 0   rank 1   rank 2
    in rounds          0        1        2      chunk 0
    (interleaved)      3        4        5      chunk 1

    as a V             0        1        2      chunk 0, down the ranks
    (zb-v)             5        4        3      chunk 1, up again
    """

    schedule: str
    num_ranks: int
    num_chunks: int

    @property
    def num_stages(self) -> int:
        """Return the number of stages of the whole pipeline."""
        return self.num_ranks * self.num_chunks

    def stage(self, rank: int, chunk: int) -> int:
        """Return the number of the stage that is `chunk` of `rank`."""
        if self._goes_up(chunk):
            return 2 * self.num_ranks - 1 - rank
        return chunk * self.num_ranks + rank

    def rank_and_chunk(self, stage: int) -> Place:
        """Return where a stage is."""
        chunk, rank = divmod(stage, self.num_ranks)
        if self._goes_up(chunk):
            rank = self.num_ranks - 1 - rank
        return Place(rank, chunk)

    def _goes_up(self, chunk: int) -> bool:
        return self.schedule == "zb-v" and chunk == 1
