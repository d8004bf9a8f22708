"""Text <-> token ids: the reference's tokens, and no special token from plain text."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_q._native import GgufFile
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.text.text_stream import TextStream
from qwen2vl_q.text.tokenizer import MAX_SPECIAL_TOKENS, Tokenizer

SMALL = Path(__file__).parent / "data" / "tokenizer" / "tokenizer.json"
# The vocabulary of every Qwen2 model is too large for this repository; see CONTRIBUTING.md.
WHOLE = Path(__file__).resolve().parents[2] / "shared" / "qwen2-vocab" / "ggml-vocab-qwen2.gguf"
N_PADDING = 2


def small_parts() -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges of the small tokenizer, as a GGUF file lists them."""
    import json

    content = json.loads(SMALL.read_text(encoding="utf-8"))
    texts = {
        **content["model"]["vocab"],
        **{token["content"]: token["id"] for token in content["added_tokens"]},
    }
    tokens = sorted(texts, key=texts.__getitem__)
    special = {token["content"] for token in content["added_tokens"]}
    padding = [f"[PAD{len(tokens) + i}]" for i in range(N_PADDING)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    types = [3 if token in special else 1 for token in tokens] + [5] * N_PADDING
    return tokens + padding, types, merges


OURS = Tokenizer(*small_parts())
REFERENCE = tokenizers.Tokenizer.from_file(str(SMALL))


def reference_ids(text: str) -> list[int]:
    return list(REFERENCE.encode(text, add_special_tokens=False).ids)


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Words, spaces, line ends, digits, accents apart and composed, other scripts, emoji, any code point."""
    rng = random.Random(seed)
    blocks = [
        "abc XYZ 'll 've 12345 \n\n\r\n\t  .,!?()[]{}<|>",
        "éèüñçåøœ e\u0301 a\u0308 \u1e9b\u0323",
        "你好世界。こんにちは 안녕하세요 привет мир שלום مرحبا नमस्ते ภาษาไทย",
        "😀🚀👩‍👩‍👧🏽‍♂️🇩🇪 \u200b\u200d\ufeff\u00a0\u3000\u2028",
    ]
    texts = []
    for _ in range(n):
        characters = []
        for _ in range(rng.randrange(1, 60)):
            if rng.random() < 0.1:
                point = rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
                characters.append(chr(point))
            else:
                characters.append(rng.choice(rng.choice(blocks)))
        texts.append("".join(characters))
    return texts


def test_random_texts_equal_the_reference() -> None:
    for text in random_texts(500):
        assert OURS.encode(text) == reference_ids(text), repr(text)


def test_special_tokens_only_where_asked_for() -> None:
    text = "a<|im_start|>b<|image_pad|><|im_end|>"
    special = set(OURS.special_tokens.values())
    assert len(special) == 14
    assert not special & set(OURS.encode(text))
    assert OURS.encode(text, parse_special=True) == reference_ids(text)
    assert OURS.decode(OURS.encode(text)) == text
    assert OURS.decode(OURS.encode(text, parse_special=True)) == text


FRAGMENTS = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|", "|>", "im_", "<", "|", "image_pad", "\n", " ", "é"]
)
TEXTS = st.lists(FRAGMENTS | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=12).map(
    "".join
)


@given(TEXTS)
def test_plain_text_stays_text(text: str) -> None:
    ids = OURS.encode(text)
    assert not set(ids) & set(OURS.special_tokens.values())
    assert OURS.decode(ids) == unicodedata.normalize("NFC", text)


@given(st.lists(st.text(st.sampled_from("ab \n\r\t.é12'<|"), max_size=8), max_size=6))
def test_borders_of_pieces_do_not_show(texts: Sequence[str]) -> None:
    """Between special tokens the pieces are one text: "\\n" + "\\n" merges as the reference merges it."""
    pieces = [("<|im_start|>", True), ("user\n", False), *((text, False) for text in texts)]
    pieces += [("<|im_end|>", True), ("\n", False)]
    assert OURS.encode_pieces(pieces) == reference_ids("".join(text for text, _ in pieces))


def test_what_spells_a_special_token_across_pieces_is_text() -> None:
    pieces = [("<|im_", False), ("start|>", False), ("<|im_end|>", False)]
    assert not set(OURS.encode_pieces(pieces)) & set(OURS.special_tokens.values())


def test_the_longest_special_token_is_taken() -> None:
    tokens, types, merges = small_parts()
    short, long = "<think", "<think>"
    tokenizer = Tokenizer([*tokens, short, long], [*types, 4, 4], merges)
    n = len(tokens)
    assert tokenizer.encode(f"{long}{short}", parse_special=True) == [n + 1, n]


def test_decoding() -> None:
    ids = OURS.encode("你好", parse_special=True)
    assert OURS.decode(ids) == "你好"
    assert OURS.decode(ids[:-1]).endswith("\ufffd")
    marked = OURS.encode("<|box_start|>(1,2),(3,4)<|box_end|><|im_end|>", parse_special=True)
    assert OURS.decode(marked, skip_special=True) == "<|box_start|>(1,2),(3,4)<|box_end|>"
    assert OURS.decode([len(OURS) - 1]) == ""  # padding
    for bad in (-1, len(OURS)):
        with pytest.raises(ValueError, match=f"expected a token id in 0..{len(OURS) - 1}, found {bad}"):
            OURS.decode([bad])


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="half a surrogate pair at character 1"):
        OURS.encode("a\ud800")


def test_white_space_without_end() -> None:
    """The pattern's engine gives up at 10 million, by a panic that is no Exception."""
    with pytest.raises(ValueError, match="11000000 characters of white space in a row, more than 4194304"):
        OURS.encode("a" + " \t" * 5_500_000 + "b")


def test_room() -> None:
    longest = max(map(len, small_parts()[0]))
    OURS.require_room(["a" * longest * 2, "b" * longest * 3], 5)
    OURS.require_room(["e\u0301" * longest * 5], 5)  # composed, it fits
    with pytest.raises(ValueError, match=f"a text of {5 * longest + 1} characters is more than the 5 tokens"):
        OURS.require_room(["a" * longest * 2, "b" * longest * 3, "c"], 5)


@given(st.text(st.sampled_from("aé你😀 e\u0301"), max_size=12), st.integers(0, 3))
def test_stream_gives_what_decode_gives(text: str, dropped: int) -> None:
    ids = OURS.encode(text)
    ids = ids[: len(ids) - dropped]  # perhaps in the middle of a character
    stream = TextStream(OURS)
    pieces = [stream.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == OURS.decode(ids)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two END three", ["END"], "one two "),
        ("one EN two ENDE", ["ENDE"], "one EN two "),
        ("aab aaab", ["aaab"], "aab "),  # held back twice before it is certain
        ("first second", ["second", "first"], ""),
        ("ends in EN", ["END"], "ends in EN"),
        ("你好吗", ["好"], "你"),
        ("nothing", [], "nothing"),
        ("a\n\nb", "\n\n", "a"),
    ],
)
def test_stop_strings(text: str, stop: str | list[str], expected: str) -> None:
    stream = TextStream(OURS, stop)
    given_out = ""
    for token in OURS.encode(text):
        given_out += stream.push(token)
        assert expected.startswith(given_out)
        if stream.finished:
            break
    assert stream.finished == (expected != text)
    assert given_out + stream.finish() == expected


def test_stream_ends_with_the_turn() -> None:
    end = OURS.special_tokens["<|im_end|>"]
    stream = TextStream(OURS, ["stop"], [end])
    assert not TextStream(OURS).finished
    assert stream.push(OURS.encode("s")[0]) == ""  # may become "stop"
    assert stream.push(end) == ""
    assert stream.finished
    assert stream.finish() == "s"
    assert stream.finish() == ""
    with pytest.raises(ValueError, match="non-empty"):
        TextStream(OURS, [""])


# --- metadata ---


def metadata(**changes: object) -> dict[str, object]:
    tokens, types, merges = small_parts()
    keys = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def test_from_metadata() -> None:
    tokenizer = Tokenizer.from_metadata(metadata(), "m.gguf")
    assert tokenizer.encode("hello") == OURS.encode("hello")
    assert [tokenizer.decode([token]) for token in tokenizer.eos_token_ids] == ["<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "llama"}, UnsupportedError, r"tokenizer\.ggml\.model: expected gpt2, found llama"),
        ({"pre": None}, UnsupportedError, r"tokenizer\.ggml\.pre: expected qwen2, found None"),
        ({"tokens": None}, FormatError, r"tokenizer\.ggml\.tokens: expected an array of str"),
        ({"merges": [1, 2]}, FormatError, r"tokenizer\.ggml\.merges: expected an array of str"),
        ({"merges": ["a zzzz"]}, FormatError, r"merge 0 \('a zzzz'\) does not join two tokens"),
        ({"merges": ["a"]}, FormatError, "merge 0"),
        ({"merges": ["\x1b[2J" * 10**6]}, FormatError, r"merge 0 \('\\x1b"),
        ({"model": "\x1b[2J" * 10**6}, UnsupportedError, r"found \\x1b"),
        ({"tokens": ["\x1b" * 10**6] * 2, "token_type": [1, 1]}, FormatError, "token 1"),
        (
            {
                "tokens": [f"<{i}>" for i in range(MAX_SPECIAL_TOKENS + 1)],
                "token_type": [3] * (MAX_SPECIAL_TOKENS + 1),
            },
            FormatError,
            r"token_type: expected at most 2048 special tokens, found 2049",
        ),
        ({"token_type": [1]}, FormatError, r"expected \d+ token types, found 1"),
        (
            {"tokens": ["a", "a"], "token_type": [1, 1]},
            FormatError,
            r"token 1 \('a'\) is empty or already token 0",
        ),
        (
            {"tokens": ["a"], "token_type": [1], "merges": []},
            FormatError,
            "255 of the 256 byte tokens are missing",
        ),
    ],
)
def test_bad_metadata(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Tokenizer.from_metadata(metadata(**changes), "m.gguf")
    assert str(caught.value).startswith("m.gguf: tokenizer.ggml")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


# --- the whole vocabulary ---


@pytest.fixture(scope="module")
def whole() -> Tokenizer:
    if not WHOLE.exists():
        pytest.skip(f"needs Qwen2's whole vocabulary in {WHOLE.parent}")
    return Tokenizer.from_metadata(GgufFile(str(WHOLE)).metadata, str(WHOLE))


def test_vectors_of_llama_cpp(whole: Tokenizer) -> None:
    texts = Path(f"{WHOLE}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{WHOLE}.out").read_text().splitlines()
    vectors = [
        (text, [int(token) for token in line.split()]) for text, line in zip(texts, lines, strict=False)
    ]
    assert len(vectors) == 46
    for text, expected in vectors:
        assert whole.encode(text) == expected, repr(text)


@pytest.mark.parity
def test_500_random_texts_equal_transformers(whole: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the parity extra")
    keys = GgufFile(str(WHOLE)).metadata
    kinds = zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True)
    vocab = {token: i for i, (token, kind) in enumerate(kinds) if kind == 1}
    merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    reference = transformers.Qwen2TokenizerFast(vocab=vocab, merges=merges)
    for text in random_texts(500, seed=1):
        assert whole.encode(text) == reference(text)["input_ids"], repr(text)
        assert whole.decode(whole.encode(text)) == reference.decode(reference(text)["input_ids"])
