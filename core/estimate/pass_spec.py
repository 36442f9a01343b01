"""One micro-batch as one rank runs it: what its memory and its time depend on beside the model.

Letters as in docs/design.md. The estimates add a few of their own:
    b  samples of a micro-batch
    t  tokens of a sequence on this rank, T / cp
    s  tokens of a sequence in its norms and dropouts: t / tp with sequence parallel, else t
    q  width of its queries A D / tp
    k  width of its keys, and of its values, K D / tp
    f  width of its feed-forward layer F / tp
    e  bytes of a number in the working dtype
"""

from dataclasses import dataclass

from ..config import Config, ModelConfig

FP32 = 4  # bytes

# The ops that can run as kernels of our own. A kernel keeps its input alone for the backward pass;
# the same op in PyTorch is several operations, and each of them keeps something.
FUSIBLE = ("rms_norm", "layer_norm", "rope", "activation", "cross_entropy")


@dataclass(frozen=True)
class PassSpec:
    """The forward and backward pass of one micro-batch on one rank: its sizes and how it is cut.

    micro_batch: samples b.
    seq_length: tokens T of a whole sequence.
    itemsize: bytes e of a number in the working dtype.
    tp, cp: ranks that share a layer, and a sequence.
    sequence_parallel: whether norms and dropouts are cut over tp; False where tp is 1.
    cp_comm_type: how keys and values reach the other ranks of cp.
    recompute: --recompute-granularity, with its method and its number of layers.
    flash: whether attention avoids storing its scores. Masks force it; CPUs cannot with dropout.
    documents: whether attention stays inside a document, and so takes a mask for every sample.
    device: "cpu" or "gpu".
    fused: the ops that run as kernels of our own, names out of FUSIBLE.
    widens: whether products are made of fp32 copies, as on a CPU without instructions for 16-bit
        products. A configuration cannot tell: only the machine knows.
    """

    micro_batch: int
    seq_length: int
    itemsize: int = 2
    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    cp_comm_type: str = "p2p"
    recompute: str | None = None
    recompute_method: str = "uniform"
    recompute_layers: int = 1
    flash: bool = True
    documents: bool = False
    device: str = "gpu"
    fused: frozenset[str] = frozenset({"rms_norm"})
    widens: bool = False

    @staticmethod
    def of(config: Config) -> "PassSpec":
        """Read it off a resolved configuration."""
        parallel = config.parallel
        on_cpu = parallel.device == "cpu"
        tp = parallel.tensor_model_parallel_size
        return PassSpec(
            micro_batch=config.batch.micro_batch_size,
            seq_length=config.batch.seq_length,
            itemsize=itemsize(config),
            tp=tp,
            cp=parallel.context_parallel_size,
            sequence_parallel=parallel.sequence_parallel and tp > 1,
            cp_comm_type=parallel.cp_comm_type,
            recompute=parallel.recompute_granularity,
            recompute_method=parallel.recompute_method,
            recompute_layers=parallel.recompute_num_layers,
            flash=_is_flash(config, on_cpu),
            documents=config.data.reset_attention_mask,
            device="cpu" if on_cpu else "gpu",
            fused=fused_ops(parallel.kernels, on_cpu, config.precision.fp16),
        )

    @property
    def tokens(self) -> int:
        """Return b t: the tokens of the micro-batch on this rank."""
        return self.micro_batch * self.seq_length // self.cp

    @property
    def norm_tokens(self) -> int:
        """Return b s: the tokens that this rank's norms see."""
        return self.tokens // (self.tp if self.sequence_parallel else 1)

    @property
    def attention_comm(self) -> str | None:
        """Return how keys and values are exchanged over cp; None where one rank has them all."""
        return self.cp_comm_type if self.cp > 1 else None

    def hidden_bytes(self, model: ModelConfig) -> int:
        """Return e b s H: the hidden states between two layers, or two stages."""
        return self.itemsize * self.norm_tokens * model.hidden_size


def itemsize(config: Config) -> int:
    """Return the bytes of a weight or an activation in the working dtype."""
    return 2 if config.precision.bf16 or config.precision.fp16 else FP32


def fused_ops(kernels: str, on_cpu: bool, fp16: bool) -> frozenset[str]:
    """Return which ops run as kernels of our own.

    kernels: --kernels, one implementation for all and exceptions such as rope=torch. The native
    ones cover every fusible op in fp32 and bf16, Triton's cover RMSNorm.
    """
    general, *exceptions = kernels.split(",")
    if general == "auto":
        general = _automatic(on_cpu, fp16)
    chosen = dict.fromkeys(FUSIBLE, general)
    for exception in exceptions:
        op, implementation = exception.split("=")
        chosen[op] = implementation
    native = {op for op, implementation in chosen.items() if implementation == "native"}
    triton = {"rms_norm"} if chosen["rms_norm"] == "triton" else set()
    return frozenset(native | triton)


def _automatic(on_cpu: bool, fp16: bool) -> str:
    """Return the implementation that --kernels auto takes."""
    if not on_cpu:
        return "triton"
    return "torch" if fp16 else "native"


def _is_flash(config: Config, on_cpu: bool) -> bool:
    """Return whether attention stores no scores."""
    model, parallel = config.model, config.parallel
    always_windowed = window_share(model, config.batch.seq_length) == 1
    masked = config.data.reset_attention_mask or always_windowed
    stores_scores = parallel.attention_backend in ("unfused", "local")
    drops_on_cpu = on_cpu and model.attention_dropout > 0
    return (masked or not stores_scores) and not drops_on_cpu


def window_share(model: ModelConfig, seq_length: int) -> float:
    """Return the share of the layers whose window is shorter than a sequence.

    Such a layer needs a mask; one mask serves all samples.
    """
    windows = [model.window(layer) for layer in range(model.num_layers)]
    masked = [window for window in windows if window is not None and window < seq_length]
    return len(masked) / model.num_layers
