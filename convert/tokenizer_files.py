"""A checkpoint's tokenizer (byte-level BPE: tokenizer.json or vocab.json + merges.txt) and chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from gguf import TokenType

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.json_files import quoted, read_json, read_json_if_present, read_text
from qwen2vl_q.base.printable import printable
from qwen2vl_q.chat.chat_template import ChatTemplate
from qwen2vl_q.convert.config import CheckpointConfig
from qwen2vl_q.text.tokenizer import Tokenizer as RuntimeTokenizer

# How Qwen2 splits text before BPE; the file only says "qwen2", so another pattern cannot be kept.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The tokens that prompts are built from, with the key of config.json that names their ids.
_NEEDED = {
    "<|im_start|>": None,
    "<|im_end|>": None,
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
}
_MAX_NAME = 100  # of a chat template


@dataclass(frozen=True)
class Tokenizer:
    tokens: list[str]  # one a row of the embedding; rows without a token are "[PAD<row>]"
    token_types: list[int]  # gguf.TokenType
    merges: list[str]  # "left right"
    special_ids: Mapping[str, int]  # "eos", "padding", "bos": those that are known
    add_bos: bool | None
    chat_templates: Mapping[str, str]  # "default" and others by name


@dataclass(frozen=True)
class _Added:
    content: str
    special: bool


def read_tokenizer(folder: Path, config: CheckpointConfig) -> Tokenizer:
    """Raises FormatError or UnsupportedError, naming the file, for a tokenizer that is not Qwen2's kind."""
    settings = read_json_if_present(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        source = folder / "tokenizer.json"
        vocab, merges, added = _from_tokenizer_json(source)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        source = folder / "vocab.json"
        vocab, merges, added = _from_vocab_and_merges(folder)
    else:
        raise FormatError(f"{folder}: neither tokenizer.json nor vocab.json with merges.txt")
    added |= _added_of_settings(folder / "tokenizer_config.json", settings)
    tokens, types = _rows(source, vocab, added, config.text.vocab_size)
    ids = {token: row for row, token in enumerate(tokens)}
    _check_needed(source, ids, config)
    files = source if source.name == "tokenizer.json" else f"{source} and merges.txt"
    RuntimeTokenizer(tokens, types, merges, f"{files}: tokenizer")  # raises where it cannot be used
    special_ids = _special_ids(settings, ids, config, read_json_if_present(folder / "generation_config.json"))
    add_bos = settings.get("add_bos_token")
    return Tokenizer(
        tokens,
        types,
        merges,
        special_ids,
        add_bos if isinstance(add_bos, bool) else None,
        _chat_templates(folder, settings),
    )


def _from_tokenizer_json(path: Path) -> tuple[dict[str, int], list[str], dict[int, _Added]]:
    root = read_json(path)
    model = root.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise UnsupportedError(f"{path}: expected a model of type BPE")
    pattern = _split_pattern(root.get("pre_tokenizer"))
    if pattern != _QWEN2_SPLIT:
        raise UnsupportedError(
            f"{path}: pre_tokenizer: expected Qwen2's split pattern, found {quoted(pattern)}"
        )
    merges = model.get("merges")
    if not isinstance(merges, list) or not merges:
        raise FormatError(f"{path}: model.merges: expected a list of merges")
    added = root.get("added_tokens") or []
    if not isinstance(added, list):
        raise FormatError(f"{path}: added_tokens: expected a list")
    return (
        _vocab(path, model.get("vocab")),
        [_merge(path, merge) for merge in merges],
        dict(_added(path, item.get("id") if isinstance(item, dict) else None, item) for item in added),
    )


def _split_pattern(pre_tokenizer: object) -> object:
    """The pattern of Sequence[Split, ByteLevel], None for any other pre-tokenizer."""
    match pre_tokenizer:
        case {
            "type": "Sequence",
            "pretokenizers": [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel"}],
        }:
            return pattern
    return None


def _from_vocab_and_merges(folder: Path) -> tuple[dict[str, int], list[str], dict[int, _Added]]:
    path = folder / "merges.txt"
    lines = read_text(path).split("\n")  # not splitlines: the byte alphabet has characters that it splits at
    if lines[0].startswith("#version"):
        del lines[0]
    merges = [_merge(path, line.rstrip("\r")) for line in lines if line.strip("\r")]
    added_path = folder / "added_tokens.json"
    added = dict(
        _added(added_path, id, {"content": content})
        for content, id in read_json_if_present(added_path).items()
    )
    return _vocab(folder / "vocab.json", read_json(folder / "vocab.json")), merges, added


def _added_of_settings(path: Path, settings: Mapping[str, object]) -> dict[int, _Added]:
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise FormatError(f"{path}: added_tokens_decoder: expected an object")
    return dict(
        _added(path, int(id) if re.fullmatch("[0-9]{1,9}", id) else None, item)
        for id, item in decoder.items()
    )


def _vocab(path: Path, vocab: object) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise FormatError(f"{path}: expected a vocabulary (an object from tokens to ids)")
    for token, id in vocab.items():
        if not token or not _is_unicode(token) or not _is_id(id):
            raise FormatError(f"{path}: expected a token and its id, found {quoted(token)}: {quoted(id)}")
    return vocab


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _merge(path: Path, merge: object) -> str:
    """`merge` as "left right"; files have it so or as a pair."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if (
        not isinstance(parts, list)
        or len(parts) != 2
        or not all(isinstance(p, str) and p and " " not in p for p in parts)
    ):
        raise FormatError(f"{path}: expected a merge of two tokens, found {quoted(merge)}")
    return f"{parts[0]} {parts[1]}"


def _added(path: Path, id: object, item: object) -> tuple[int, _Added]:
    content = item.get("content") if isinstance(item, dict) else None
    if (
        not isinstance(item, dict)
        or not isinstance(content, str)
        or not content
        or not _is_unicode(content)
        or not _is_id(id)
    ):
        raise FormatError(f"{path}: expected an added token with content and id, found {quoted(item)}")
    # As llama.cpp: what is spelled like a control token is one, whatever the flag says.
    special = bool(item.get("special")) or (content.startswith("<|") and content.endswith("|>"))
    return id, _Added(content, special)


def _rows(
    source: Path, vocab: Mapping[str, int], added: Mapping[int, _Added], rows: int
) -> tuple[list[str], list[int]]:
    """The token and the type of each row of the embedding."""
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    by_id = {id: token for token, id in vocab.items()}
    if len(by_id) != len(vocab):
        raise FormatError(f"{source}: two tokens have the same id")
    highest = max([*by_id, *added])
    if highest >= rows:
        raise FormatError(
            f"{source}: token id {printable(highest)} has no row in the embedding, which has {rows}"
        )
    for id, token in by_id.items():
        tokens[id], types[id] = token, int(TokenType.NORMAL)
    for id, item in added.items():
        if id in by_id and by_id[id] != item.content:
            raise FormatError(
                f"{source}: id {id} is both {quoted(by_id[id])} and the added token {quoted(item.content)}"
            )
        tokens[id] = item.content
        types[id] = int(TokenType.CONTROL if item.special else TokenType.USER_DEFINED)
    return tokens, types


def _check_needed(source: Path, ids: Mapping[str, int], config: CheckpointConfig) -> None:
    for token, key in _NEEDED.items():
        if token not in ids:
            raise FormatError(
                f"{source} and tokenizer_config.json: no token {token}, so this is not Qwen2-VL's tokenizer"
            )
        if key is not None and config.token_ids.get(key, ids[token]) != ids[token]:
            raise FormatError(
                f"{config.path}: {key}: expected {ids[token]}, the id of {token} in {source.name}, "
                f"found {printable(config.token_ids[key])}"
            )


def _special_ids(
    settings: Mapping[str, object],
    ids: Mapping[str, int],
    config: CheckpointConfig,
    generation: Mapping[str, object],
) -> dict[str, int]:
    """The tokenizer's own settings first, then config.json, then generation_config.json's first."""
    found = {}
    for name, short in (("eos", "eos"), ("padding", "pad"), ("bos", "bos")):
        token = settings.get(f"{short}_token")
        if isinstance(token, dict):
            token = token.get("content")
        id = ids.get(token) if isinstance(token, str) else None
        if id is None:
            id = config.token_ids.get(f"{short}_token_id")
        if id is None:
            value = generation.get(f"{short}_token_id")
            first = value[0] if isinstance(value, list) and value else value
            id = first if _is_id(first) else None
        if id is not None and 0 <= id < len(ids):
            found[name] = id
    return found


def _chat_templates(folder: Path, settings: Mapping[str, object]) -> dict[str, str]:
    """The template, from the first place that has one, in transformers' order for a processor."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        return _named_templates(jinja, read_text(jinja))
    for path, section in (
        (folder / "chat_template.json", read_json_if_present(folder / "chat_template.json")),
        (folder / "tokenizer_config.json", settings),
    ):
        template = section.get("chat_template")
        if template is not None:
            return _named_templates(path, template)
    return {}


def _named_templates(path: Path, template: object) -> dict[str, str]:
    """One template as a string, several as a list of {name, template} or an object from names."""
    match template:
        case str():
            named: list[tuple[object, object]] = [("default", template)]
        case list():
            named = [(t.get("name"), t.get("template")) if isinstance(t, dict) else ("", t) for t in template]
        case dict():
            named = list(template.items())
        case _:
            named = []
    if not named or not all(_is_text(n) and len(str(n)) <= _MAX_NAME and _is_text(t) for n, t in named):
        raise FormatError(f"{path}: chat_template: expected a template or a list of named ones")
    # Names become parts of keys: letters, digits and underscores only, as llama.cpp writes them.
    templates = {re.sub(r"[^A-Za-z0-9]", "_", str(name)): str(text) for name, text in named}
    if "default" in templates:
        ChatTemplate(templates["default"], f"{path}: chat_template")  # raises where it is none
    return templates


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != "" and _is_unicode(value)


def _is_unicode(text: str) -> bool:
    """Whether it has no halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
