"""Qwen2's byte-level BPE, built from a GGUF file's metadata.

Special tokens (`<|im_start|>` and its like) are kept out of the BPE: plain text never becomes one, whatever
it spells. They arise only where a caller names them as allowed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.printable import printable

# transformers, models/qwen2/tokenization_qwen2.py, PRETOKENIZE_REGEX
PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOOL_CALL_TOKENS = ("<tool_call>", "</tool_call>")  # special in the files of later models
# The markers of found objects and of calls: part of an answer's text, not of the conversation's frame.
ANSWER_TOKENS = frozenset(TOOL_CALL_TOKENS) | {
    f"<|{kind}_{edge}|>" for kind in ("object_ref", "box", "quad") for edge in ("start", "end")
}
EOS_TOKENS = ("<|im_end|>", "<|endoftext|>")
MAX_WHITE_SPACE = 2**22  # in a row: at 10 million the pattern above meets its engine's limit, and that panics
MAX_SPECIAL_TOKENS = 2048  # the released files have 14, fine-tunes for boxes a thousand

# tokenizer.ggml.token_type
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_PADDING = re.compile(r"\[PAD\d+\]")  # rows that only fill up the embedding table, as llama.cpp names them


def _byte_symbols() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_symbols()


class Tokenizer:
    """Text <-> token ids. `special_tokens` maps the text of each special token to its id."""

    def __init__(
        self,
        tokens: Sequence[str],
        token_types: Sequence[int],
        merges: Sequence[str],
        name: str = "tokenizer",
    ) -> None:
        """FormatError, beginning with `name`, where the parts do not make a byte-level BPE."""
        if len(token_types) != len(tokens):
            raise FormatError(f"{name}: expected {len(tokens)} token types, found {len(token_types)}")
        self._size = len(tokens)
        self.special_tokens = {
            text: i
            for i, (text, kind) in enumerate(zip(tokens, token_types, strict=True))
            if text and kind in (_CONTROL, _USER_DEFINED) and not _PADDING.fullmatch(text)
        }
        if len(self.special_tokens) > MAX_SPECIAL_TOKENS:
            raise FormatError(
                f"{name}.token_type: expected at most {MAX_SPECIAL_TOKENS} special tokens, "
                f"found {len(self.special_tokens)}"
            )
        self._specials = re.compile(f"({any_of(self.special_tokens)})")
        self._special_texts = {i: text for text, i in self.special_tokens.items()}
        vocab: dict[str, int] = {}
        for i, (text, kind) in enumerate(zip(tokens, token_types, strict=True)):
            if kind == _NORMAL:
                if not text or text in vocab:
                    raise FormatError(
                        f"{name}: token {i} ('{printable(text)}') is empty or already token {vocab.get(text)}"
                    )
                vocab[text] = i
        self._longest = max(map(len, tokens), default=0)  # a character of the BPE's is a byte
        missing = [symbol for symbol in _BYTE_OF if symbol not in vocab]
        if missing:
            raise FormatError(
                f"{name}: {len(missing)} of the 256 byte tokens are missing, first {missing[0]!r}"
            )
        self._bpe = tokenizers.Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=_checked_merges(merges, vocab, name),
                unk_token=None,
                fuse_unk=False,
                byte_fallback=False,
            )
        )
        self._bpe.normalizer = normalizers.NFC()
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str) -> Tokenizer:
        """From the `tokenizer.ggml.*` keys; errors name the file `path` and the key."""
        for key, expected in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "qwen2")):
            if metadata.get(key) != expected:
                raise UnsupportedError(
                    f"{path}: {key}: expected {expected}, found {printable(metadata.get(key))}"
                )
        parts: list[list[Any]] = []
        for key, kind in (("tokens", str), ("token_type", int), ("merges", str)):
            value = metadata.get(f"tokenizer.ggml.{key}")
            if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
                raise FormatError(f"{path}: tokenizer.ggml.{key}: expected an array of {kind.__name__}")
            parts.append(value)
        return cls(parts[0], parts[1], parts[2], f"{path}: tokenizer.ggml")

    def __len__(self) -> int:
        return self._size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(self.special_tokens[text] for text in EOS_TOKENS if text in self.special_tokens)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Token ids of `text`. What spells a special token becomes that token only with `parse_special`."""
        if not parse_special:
            return self._encode_plain(text)
        return self.encode_pieces((piece, i % 2 == 1) for i, piece in enumerate(self._specials.split(text)))

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Token ids of pieces (text, is_special): special tokens by name, and the texts between them.
        Texts side by side are tokenized as one."""
        ids: list[int] = []
        run: list[str] = []
        for text, is_special in pieces:
            if is_special:
                ids += self._encode_plain("".join(run))
                ids.append(self.special_tokens[text])
                run = []
            else:
                run.append(text)
        return ids + self._encode_plain("".join(run))

    def require_room(self, texts: Iterable[str], n_tokens: int) -> None:
        """ValueError, before anything is tokenized, for texts that cannot be so few tokens."""
        most = n_tokens * self._longest
        whole = list(texts)
        if sum(map(len, whole)) <= most:
            return
        length = sum(len(unicodedata.normalize("NFC", text)) for text in whole)  # as they are tokenized
        if length > most:
            raise ValueError(
                f"a text of {length} characters is more than the {n_tokens} tokens of context hold"
            )

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids; what is not UTF-8 becomes U+FFFD. ValueError for an id out of range."""
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """The bytes that a token stands for: none for padding; for a special token its name, or none with
        `skip_special` (but for the markers that belong to an answer's text)."""
        if not 0 <= token_id < self._size:
            raise ValueError(f"expected a token id in 0..{self._size - 1}, found {token_id}")
        if (special := self._special_texts.get(token_id)) is not None:
            return b"" if skip_special and special not in ANSWER_TOKENS else special.encode()
        text = self._bpe.id_to_token(token_id)
        if text is None:
            return b""
        if all(symbol in _BYTE_OF for symbol in text):
            return bytes(_BYTE_OF[symbol] for symbol in text)
        return text.encode()  # as the reference's decoder does

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        require_characters(text)
        if len(text) > MAX_WHITE_SPACE:
            longest = max((len(match.group()) for match in re.finditer(r"\s+", text)), default=0)
            if longest > MAX_WHITE_SPACE:
                raise ValueError(
                    f"text with {longest} characters of white space in a row, more than {MAX_WHITE_SPACE}"
                )
        return self._bpe.encode(text, add_special_tokens=False).ids


def any_of(texts: Collection[str]) -> str:
    """A pattern of the longest of them that fits; of nothing where there are none."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"


def require_characters(text: str) -> None:
    """ValueError for what no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text with half a surrogate pair at character {error.start}") from None


def _checked_merges(merges: Sequence[str], vocab: Mapping[str, int], name: str) -> list[tuple[str, str]]:
    """The pairs to merge. All parts and results must be tokens: the BPE does not survive others."""
    pairs = []
    for i, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise FormatError(
                f"{name}.merges: merge {i} ('{printable(merge)}') does not join two tokens to a third"
            )
        pairs.append((left, right))
    return pairs
