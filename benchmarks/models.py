"""Hold the models that the suites train: as flags of pretrain_gpt.py."""

COMMON = (
    "--num-layers 6 --hidden-size 384 --num-attention-heads 6 --disable-bias-linear"
    " --seq-length 256 --max-position-embeddings 256"
    " --micro-batch-size 16 --global-batch-size 16"
    " --attention-dropout 0 --hidden-dropout 0"
    " --mock-data --tokenizer-type NullTokenizer --vocab-size 31999"
    " --train-iters 1000 --lr 3e-4 --lr-decay-style constant"
    " --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0"
)
GPT = f"{COMMON} --exact-gelu"
LLAMA = (
    f"{COMMON} --normalization RMSNorm --swiglu --ffn-hidden-size 1024"
    " --position-embedding-type rope --untie-embeddings-and-output-weights"
)
SHAPES = {"gpt": GPT, "llama": LLAMA}

# On a GPU: as large as GPT-2, and a Llama of the same width.
LARGER = (
    "--num-layers 12 --hidden-size 768 --num-attention-heads 12"
    " --seq-length 1024 --max-position-embeddings 1024 --vocab-size 50303"
)
LARGER_FFN = {"gpt": "", "llama": "--ffn-hidden-size 2048"}
BF16 = "--bf16"


def shape_flags(shape: str, device: str) -> str:
    """Return the flags of one of SHAPES, in the size that suits a device ("cpu" or "cuda")."""
    if device == "cuda":
        return f"{SHAPES[shape]} {LARGER} {LARGER_FFN[shape]}"
    return SHAPES[shape]
