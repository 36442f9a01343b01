"""Break the engine on purpose, to prove that the parity table notices.

A mutation changes the text of one function inside the ranks of a run; the layout named with it must
turn red. Each is a bug that other engines have had, and that no error message would tell.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from runs import CHUNKS, CP, INSTANCES, SCHEDULE, SP, STRATEGY, TP, ZERO1

from parity.cases import OVERLAP, TWO, V2, Case
from trivium import comm, rng
from trivium.model import norm
from trivium.optim import buckets, fully_sharded, optimizer
from trivium.parallel import context, layers, loss
from trivium.parallel.sharding import Sharding
from trivium.pipeline import runtime
from trivium.train import passes, step


@dataclass(frozen=True)
class Mutation:
    """A change of a function's source: `old`, which occurs in it once, becomes `new`."""

    function: Callable
    old: str
    new: str
    case: Case


MUTATIONS = {
    "norm gradients not summed over tp": Mutation(
        buckets.Shard.__init__, "partial.size > 1", "partial.size > 9", Case(2, f"{TP} 2 {SP}")
    ),
    "QK norm gradients not summed over tp": Mutation(
        buckets.Shard.__init__, "partial.size > 1", "partial.size > 9", Case(2, f"{TP} 2")
    ),
    "copies of key-value heads not summed": Mutation(
        buckets.Shard.__init__, "partial.size > 1", "partial.size > 9", Case(4, f"{TP} 4", "untied")
    ),
    "replicated tensors counted on every rank": Mutation(
        buckets.Shard.__init__, "part.primary and", "", Case(2, f"{TP} 2")
    ),
    "tied weight counted on both stages": Mutation(
        buckets.Shard.__init__, "part.primary and", "", Case(2, TWO, "gpt")
    ),
    "copies of a shard all counted": Mutation(
        buckets.Shard.__init__,
        "and reduction.copies.rank == 0",
        "",
        Case(4, f"{ZERO1} {INSTANCES} 2"),
    ),
    "clip factor halved": Mutation(
        step.Trainer.step, "* clip_factor", "* 0.5 * clip_factor", Case(2, "")
    ),
    "tied gradients not added up": Mutation(
        buckets.Bucket.finish,
        "self.twins)",
        "self.twins) if False else None",
        Case(2, TWO),
    ),
    "shards not summed over instances": Mutation(
        buckets.Bucket.finish,
        "comm.all_reduce(self._gradients, self.reduction.copies)",
        "pass",
        Case(4, f"{ZERO1} {INSTANCES} 2"),
    ),
    "ZeRO-3 not summed over instances": Mutation(
        fully_sharded.ShardedParameter.finish,
        "comm.all_reduce(self.gradients, self.reduction.copies)",
        "pass",
        Case(4, f"{STRATEGY} optim_grads_params {INSTANCES} 2"),
    ),
    "ZeRO-3 averages instead of summing": Mutation(
        fully_sharded._cut_unit,
        "set_gradient_divide_factor(1.0)",
        "set_gradient_divide_factor(2.0)",
        Case(2, f"{STRATEGY} optim_grads_params"),
    ),
    "updated weights not gathered": Mutation(
        optimizer.Optimizer._gather, "bucket.start_gather()", "pass", Case(2, ZERO1)
    ),
    "bucket reduced before its last gradient": Mutation(
        buckets.Bucket.is_ready,
        "self._written == self._expected",
        "self._written == self._expected - 1",
        Case(2, f"{ZERO1} {OVERLAP}"),
    ),
    "ZeRO-2 forgets all but the last micro-batch": Mutation(
        buckets.Bucket.settle, "self._sum +=", "self._sum =", Case(2, f"{STRATEGY} optim_grads")
    ),
    "one weight-gradient product lost": Mutation(
        runtime._Pass.backward_weight,
        "product()",
        "product() if action.microbatch else None",
        Case(2, f"{TWO} {SCHEDULE} zb-h1"),
    ),
    "gradients of two micro-batches exchanged": Mutation(
        runtime._Pass.receive_gradient,
        "action.microbatch] =",
        "action.microbatch ^ 1] =",
        Case(2, f"{TWO} {SCHEDULE} gpipe"),
    ),
    "input gradient not summed over tp": Mutation(
        layers._ColumnParallel.backward,
        "comm.start_all_reduce(dx, tp)",
        "comm.Pending(dx)",
        Case(2, f"{TP} 2", "untied"),
    ),
    "gathered gradient in the wrong order": Mutation(
        comm.start_gather_tokens,
        "pending.wait()",
        "pending.wait().flip(0)",
        Case(2, f"{TP} 2 {SP}"),
    ),
    "sum of a row-parallel layer left out": Mutation(
        layers._RowParallel.forward, "comm.all_reduce(y, sharding.tp)", "y", Case(2, f"{TP} 2")
    ),
    "bias added on every tp rank": Mutation(
        layers.RowParallelLinear.forward,
        "y + use(self.bias)",
        "y + self.sharding.tp.size * use(self.bias)",
        Case(2, f"{TP} 2", "gpt"),
    ),
    "padding of the vocabulary in the sum": Mutation(
        loss._own_columns,
        "real = min(max(task.vocab_size - first, 0), count)",
        "real = count",
        Case(2, f"{TP} 2"),
    ),
    "maximum of the local vocabulary alone": Mutation(
        loss._over,
        "comm.all_reduce(highest.clone(), tp, 'max')",
        "highest.clone()",
        Case(2, f"{TP} 2"),
    ),
    "sum of the local vocabulary alone": Mutation(
        loss._over,
        "comm.all_reduce(torch.stack([rest * torch.exp(highest - top), target]), tp)",
        "rest, target",
        Case(2, f"{TP} 2"),
    ),
    "the head's input gradient not summed over tp": Mutation(
        loss._sum_over_tp, "comm.all_reduce(dx, sharding.tp)", "dx", Case(2, f"{TP} 2")
    ),
    "tokens of other ranks looked up": Mutation(
        layers.VocabParallelEmbedding.forward,
        "masked_fill(elsewhere.unsqueeze(-1), 0.0)",
        "clone()",
        Case(2, f"{TP} 2"),
    ),
    "one dropout mask for all tp ranks": Mutation(
        Sharding.own_tokens, "[self.tp.rank]", "[0]", Case(2, f"{TP} 2 {SP}")
    ),
    "dropout by the place in the slice": Mutation(
        rng.DropoutStream.keep,
        "self.positions.unsqueeze",
        "self.positions.argsort().unsqueeze",
        Case(2, f"{CP} 2"),
    ),
    "positions counted from zero on every cp rank": Mutation(
        passes.PrepareBatch.__call__,
        "TokenContext(positions",
        "TokenContext(positions.argsort()",
        Case(2, f"{CP} 2"),
    ),
    "labels of another slice": Mutation(
        passes.PrepareBatch.__call__,
        "local_tokens(labels, cp)",
        "local_tokens(labels.roll(1, 1), cp)",
        Case(2, f"{CP} 2"),
    ),
    "predictions counted on every tp rank": Mutation(
        passes.Passes.__init__, "tp.rank == 0", "tp.rank >= 0", Case(2, f"{TP} 2")
    ),
    "mean of the ranks' means": Mutation(
        step.Trainer.step,
        "to_true = tokens",
        "num_predictions = num_predictions * 0 + tokens; to_true = tokens",
        Case(2, ""),
    ),
    "ring sees later keys of earlier ranks": Mutation(
        context._visible,
        "(_EVERYTHING, slice(half))",
        "(_EVERYTHING, _EVERYTHING)",
        Case(2, f"{CP} 2"),
    ),
    "ring forgets the gradients of other ranks": Mutation(
        context._Ring.backward,
        "summed() if summed else torch",
        "summed() * 0 if summed else torch",
        Case(2, f"{CP} 2"),
    ),
    "ring forgets the window": Mutation(
        context._told, "rule.window is None", "True", Case(2, f"{CP} 2", "gemma")
    ),
    "window one token too long in the ring": Mutation(
        context._told,
        "_sees(queries, keys, rule.window)",
        "_sees(queries, keys, rule.window + 1)",
        Case(2, f"{CP} 2", "gemma"),
    ),
    "ring forgets the cap of the scores": Mutation(
        context._told, "'softcap': rule.softcap", '"softcap": None', Case(2, f"{CP} 2", "gemma")
    ),
    "window of the slice instead of the sequence": Mutation(
        context.causal,
        "places[past:]",
        "places[: q.shape[1]]",
        Case(2, f"{CP} 2 --cp-comm-type allgather", "gemma"),
    ),
    "projection normalized over the heads of one rank": Mutation(
        norm.ProjectionNorm.forward,
        "comm.reduce_from(squares, self.tp)",
        "self.tp.size * squares",
        Case(2, f"{TP} 2", "olmo"),
    ),
    "gradient of the norm over all heads stays on its rank": Mutation(
        norm.ProjectionNorm.forward,
        "comm.copy_to(",
        "(lambda x, _: x)(",
        Case(2, f"{TP} 2", "olmo"),
    ),
    "heads that several ranks hold counted on each": Mutation(
        norm.ProjectionNorm.forward,
        "self.numel * self.copies",
        "self.numel",
        Case(4, f"{TP} 4", "olmo"),
    ),
    "norms after the branches not summed over tp": Mutation(
        buckets.Shard.__init__,
        "partial.size > 1",
        "partial.size > 9",
        Case(2, f"{TP} 2 {SP}", "olmo"),
    ),
    "documents of the slice instead of the sequence": Mutation(
        passes.document_indices,
        "ends.cumsum(dim=1) - ends",
        "ends.cumsum(dim=1) * 0",
        Case(2, f"{CP} 2 --cp-comm-type allgather", "documents"),
    ),
    "chunks of a rank in the wrong order": Mutation(
        passes.Passes.run_chunk,
        "model = self.chunks[chunk]",
        "model = self.chunks[chunk % 2 and 3 - chunk or chunk]",
        Case(1, f"{CHUNKS} 3"),
    ),
    "tied weight used once is counted twice": Mutation(
        buckets.Bucket.begin,
        "micro_batches * self.uses",
        "micro_batches * len(self.parameters)",
        Case(2, f"{V2} {SCHEDULE} zb-v"),
    ),
}


@contextmanager
def applied(name: str | None) -> Iterator[None]:
    """Break the engine in the way `name` says, until the end of the block; None changes nothing."""
    if name is None:
        yield
        return
    function = inspect.unwrap(MUTATIONS[name].function)
    honest = function.__code__
    function.__code__ = mutated(MUTATIONS[name]).__code__
    try:
        yield
    finally:
        function.__code__ = honest


def mutated(mutation: Mutation) -> Callable:
    """Compile the function again from its changed text, among the same globals.

    The text is the function's statements as `ast.unparse` writes them, one a line, so that a
    mutation does not depend on where lines are broken. Exchanging the code object reaches
    whoever has imported the function.
    """
    function = inspect.unwrap(mutation.function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    tree.body[0].decorator_list = []
    source = ast.unparse(tree)
    times = source.count(mutation.old)
    assert times == 1, f"{mutation.old!r} stands {times} times in {function.__qualname__}"
    made: dict[str, Callable] = {}
    text = source.replace(mutation.old, mutation.new)
    changed = compile(text, inspect.getsourcefile(function), "exec")
    exec(changed, function.__globals__, made)
    return made[function.__name__]
