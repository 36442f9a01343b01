"""Tokenizers: ids and back, the real vocabulary, the end of document, and one line for whatever is
wrong with a file."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trivium.data import tokenizer as tokenizer_module
from trivium.data.errors import DataError
from trivium.data.tokenizer import END_OF_TEXT, build_tokenizer

TEXTS = ["def f(x):\n    return x  # café\n", "", "世界 <|endoftext|> 🙂\t\x00", " the the the"]


def train(folder, special=(END_OF_TEXT,)):
    """A byte-level BPE of 300 ids as a folder with tokenizer.json, and as GPT-2's two files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat returns the def of the thing"] * 9, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    return tokenizer


def test_hugging_face_and_gpt2_files_of_one_model_agree(tmp_path):
    reference = train(tmp_path / "tok")
    folder = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tok"))
    file = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tok" / "tokenizer.json"))
    gpt2 = build_tokenizer(
        "GPT2BPETokenizer",
        vocab_file=str(tmp_path / "tok" / "vocab.json"),
        merge_file=str(tmp_path / "tok" / "merges.txt"),
    )
    expected = [reference.encode(text).ids for text in TEXTS]
    for tokenizer in (folder, file, gpt2):
        assert (
            tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS] == expected
        )
        assert [tokenizer.decode(ids) for ids in expected] == TEXTS
        assert (tokenizer.vocab_size, tokenizer.eod) == (reference.get_vocab_size(), 0)
    assert [path.name for path in folder.files] == ["tokenizer.json", "vocab.json", "merges.txt"]
    assert folder.fingerprint == file.fingerprint


def test_a_folder_with_the_two_files_alone_is_read(tmp_path):
    train(tmp_path / "tok")
    (tmp_path / "tok" / "tokenizer.json").unlink()
    assert build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tok")).eod == 0


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>"}])
def test_the_end_of_document_is_the_eos_token_where_there_is_no_end_of_text(tmp_path, eos):
    train(tmp_path / "tok", special=("<s>", "</s>"))
    with pytest.raises(DataError, match="no end of document"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tok"))
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tok")).eod == 1


def test_no_token_is_put_around_a_text(tmp_path):
    train(tmp_path / "tok")
    content = json.loads((tmp_path / "tok" / "tokenizer.json").read_text())
    piece = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}},
    }
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tok"))
    assert 0 not in tokenizer.encode("the") and 0 not in tokenizer.encode_batch(["the"])[0]


def test_gaps_between_ids_count_to_the_vocabulary(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({END_OF_TEXT: 0, "a": 41}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert build_tokenizer("HuggingFaceTokenizer", str(tmp_path)).vocab_size == 42


def test_null_tokenizer_has_ids_below_n_and_n_as_the_end_of_document():
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=10)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.files) == (11, 10, ())
    assert tokenizer.encode(" 3 1\n10 ") == [3, 1, 10] and tokenizer.decode([3, 1]) == "3 1"
    for text in ("11", "-1", "x", "1.5", "²"):
        with pytest.raises(DataError, match="is no id from 0 to 10"):
            tokenizer.encode(text)


def test_the_vocabulary_may_only_be_enlarged(tmp_path):
    real = train(tmp_path / "tok").get_vocab_size()
    assert (
        build_tokenizer(
            "HuggingFaceTokenizer", str(tmp_path / "tok"), vocab_size=real + 5
        ).vocab_size
        == real + 5
    )
    with pytest.raises(DataError, match=f"--vocab-size {real - 1} is below the {real} ids"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tok"), vocab_size=real - 1)


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", special=(END_OF_TEXT, "<x>"))
    a, b = (
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / name)).fingerprint for name in "ab"
    )
    nulls = [build_tokenizer("NullTokenizer", vocab_size=n).fingerprint for n in (5, 5, 6)]
    assert a != b and nulls[0] == nulls[1] != nulls[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("HuggingFaceTokenizer",),
            "--tokenizer-model is missing; --tokenizer-type HuggingFaceTokenizer needs it",
        ),
        (
            ("HuggingFaceTokenizer", "{tmp}/none"),
            "--tokenizer-model .*none: no such file or folder",
        ),
        (
            ("HuggingFaceTokenizer", "{tmp}"),
            "--tokenizer-model .*: no tokenizer.json in this folder",
        ),
        (
            ("HuggingFaceTokenizer", "{tmp}/broken.json"),
            r"--tokenizer-model .*broken\.json: cannot be read as a tokenizer",
        ),
        (("GPT2BPETokenizer", None, "{tmp}/broken.json"), "--merge-file is missing"),
        (
            ("GPT2BPETokenizer", None, "{tmp}/none", "{tmp}/none"),
            "--vocab-file .*none: no such file",
        ),
        (
            ("GPT2BPETokenizer", None, "{tmp}/broken.json", "{tmp}/broken.json"),
            r"--vocab-file .*broken\.json: cannot be read as a tokenizer",
        ),
        (("NullTokenizer",), "needs --vocab-size"),
        (("Nonsense",), "--tokenizer-type Nonsense is unknown; use one of HuggingFaceTokenizer"),
        (("SentencePieceTokenizer", "{tmp}/none"), "--tokenizer-model .*none: no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_that_begins_with_the_flag(arguments, message, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=message) as caught:
        build_tokenizer(*(argument and argument.format(tmp=tmp_path) for argument in arguments))
    assert str(caught.value).startswith("--") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "library"), [("SentencePieceTokenizer", "sentencepiece"), ("TikTokenizer", "tiktoken")]
)
def test_a_missing_library_is_named_with_its_remedy(kind, library, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    (tmp_path / "model").write_text("")
    monkeypatch.setattr(tokenizer_module.importlib, "import_module", missing)
    with pytest.raises(
        DataError,
        match=f"--tokenizer-type {kind} needs the package {library}; "
        f"install it with: pip install {library}",
    ):
        build_tokenizer(kind, str(tmp_path / "model"))


def test_sentencepiece_encodes_and_decodes(tmp_path):
    library = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("the cat sat on the mat\n" * 50)
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(tmp_path / "m.model"))
    assert tokenizer.eod == 2 and tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"
    assert tokenizer.encode_batch(["the", "mat"]) == [
        tokenizer.encode("the"),
        tokenizer.encode("mat"),
    ]
    with pytest.raises(DataError, match="not a model of sentencepiece"):
        build_tokenizer("SentencePieceTokenizer", str(tmp_path / "text"))


def test_tiktoken_reads_megatron_s_vocabulary_file(tmp_path):
    pytest.importorskip("tiktoken")
    base64 = tokenizer_module.base64
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for i, token in enumerate(tokens)
    ]
    (tmp_path / "vocab.json").write_text(json.dumps(entries))
    tokenizer = build_tokenizer("TikTokenizer", str(tmp_path / "vocab.json"))
    assert (tokenizer.vocab_size, tokenizer.eod) == (1259, 2)
    assert (
        tokenizer.encode("the a") == [1257, 1032, 1097]
        and tokenizer.decode(tokenizer.encode("the café")) == "the café"
    )
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match="not a JSON list of rank"):
        build_tokenizer("TikTokenizer", str(tmp_path / "vocab.json"))
