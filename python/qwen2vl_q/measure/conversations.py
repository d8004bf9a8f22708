"""Conversations over which models are compared: pictures, questions, and what is answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2vl_q.chat.messages import Message, TextPart
from qwen2vl_q.demo import cards
from qwen2vl_q.model import Qwen2VL
from qwen2vl_q.vision.image_processor import ProcessedImage

IMAGE_QUESTION = "Describe this picture in detail."
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_CARDS = 8
_TEXTS = (
    (
        "How does a lighthouse help ships?",
        "It stands where the coast is dangerous and shows a light that can be seen from far away. Every "
        "lighthouse has its own pattern of flashes, so a sailor who counts the seconds between them knows "
        "which one it is, finds it on the map, and keeps away from the rocks below.",
    ),
    (
        "Write a Python function that counts the words of a text.",
        "def count_words(text):\n    counts = {}\n    for word in text.lower().split():\n"
        "        counts[word] = counts.get(word, 0) + 1\n    return counts",
    ),
    (
        "A train leaves at 9:40 and arrives at 12:15. How long does it take?",
        "From 9:40 to 12:00 are 2 hours and 20 minutes, to 12:15 are 15 more: 2 hours and 35 minutes.",
    ),
    ("Was ist die Hauptstadt von Frankreich?", "Die Hauptstadt von Frankreich ist Paris."),
)


@dataclass(frozen=True)
class Conversation:
    """Messages up to a question, and its answer; None: what the reference answers."""

    name: str
    messages: Sequence[Mapping[str, Any]]
    answer: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A conversation as tokens, the last `answer` of which are predicted."""

    name: str
    token_ids: Sequence[int]
    answer: int
    images: Sequence[ProcessedImage]


def built_in(pictures: bool = True) -> Iterator[Conversation]:
    """Cards of the demo, and texts."""
    for seed in range(_CARDS if pictures else 0):
        card, things = cards.example(seed)
        yield Conversation(f"card {seed}", [_question(card, "What is in the picture?")], _described(things))
    for question, answer in _TEXTS:
        yield Conversation(question, [{"role": "user", "content": question}], answer)


def of_folder(folder: Path, max_pixels: int | None = None) -> list[Conversation]:
    """A question about each picture in it, scaled down to `max_pixels`. ValueError where there are none."""
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not pictures:
        raise ValueError(f"{folder}: expected pictures ({', '.join(_SUFFIXES)}), found none")
    return [Conversation(path.name, [_question(str(path), IMAGE_QUESTION, max_pixels)]) for path in pictures]


def of_messages(name: str, messages: Sequence[Message]) -> list[Conversation]:
    """One for each answer in it."""
    given = [{"role": m.role, "content": _content(m)} for m in messages]
    return [
        Conversation(name, given[:k], message.text)
        for k, message in enumerate(messages)
        if message.role == "assistant"
    ]


def _content(message: Message) -> str | list[dict[str, Any]]:
    if isinstance(message.content, str):
        return message.content
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else part.for_message()
        for part in message.content
    ]


def _question(picture: Any, text: str, max_pixels: int | None = None) -> dict[str, Any]:
    image = {"type": "image", "image": picture, "max_pixels": max_pixels}
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


def _described(things: Sequence[cards.Thing]) -> str:
    listing = cards.listing([cards.article(thing.full_name) for thing in things])
    places = [
        f"The {thing.name} is {thing.colour}, at ({round(thing.box[0])}, {round(thing.box[1])})."
        for thing in things
    ]
    return f"{listing[0].upper()}{listing[1:]}. There are {len(things)} shapes. {' '.join(places)}"


def prompt_of(reference: Qwen2VL, conversation: Conversation, max_new_tokens: int) -> Prompt:
    """As the reference reads it: with its template and its preprocessing. An answer that is not there is the
    reference's own, greedy and of so many tokens at most. Errors as of `Qwen2VL.chat`."""
    ids, images = reference.encode_chat(conversation.messages)
    if conversation.answer is None:
        answer = list(reference.generate(ids, images, max_new_tokens=max_new_tokens))
    else:
        end = reference.tokenizer.special_tokens.get("<|im_end|>")
        answer = [*reference.tokenize(conversation.answer), *([] if end is None else [end])]
    return Prompt(conversation.name, [*ids, *answer], len(answer), images)
