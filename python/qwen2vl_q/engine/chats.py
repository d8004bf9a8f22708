"""`chat` and `achat`: what they take and give."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from qwen2vl_q.chat.grounding import Region, parse_grounding
from qwen2vl_q.chat.messages import Messages
from qwen2vl_q.engine.answer import Answer, complete, complete_async, texts, texts_async
from qwen2vl_q.engine.calls import Calls
from qwen2vl_q.engine.generation import TokenIds
from qwen2vl_q.engine.options import ChatOptions, CompleteOptions
from qwen2vl_q.vision.image_processor import ImageInput, Picture, load_image

if TYPE_CHECKING:
    from typing_extensions import Unpack

GROUND = "Give the box of {}."


class Chats:
    """A model that holds conversations."""

    _calls: Calls

    @overload
    def chat(
        self, messages: Messages, stream: Literal[True] = True, **options: Unpack[ChatOptions]
    ) -> Iterator[str]: ...
    @overload
    def chat(self, messages: Messages, stream: Literal[False], **options: Unpack[ChatOptions]) -> str: ...
    @overload
    def chat(
        self, messages: Sequence[Messages], stream: bool = ..., **options: Unpack[ChatOptions]
    ) -> list[str]: ...
    @overload
    def chat(
        self, messages: Messages, stream: bool = ..., *, n: int, **options: Unpack[ChatOptions]
    ) -> list[str]: ...
    @overload
    def chat(
        self,
        messages: Messages,
        stream: bool = ...,
        *,
        details: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> Answer: ...
    @overload
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        stream: bool = ...,
        *,
        details: Literal[True],
        n: int,
        **options: Unpack[ChatOptions],
    ) -> list[Answer]: ...
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        stream: bool = True,
        *,
        details: bool = False,
        n: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> Iterator[str] | str | list[str] | Answer | list[Answer]:
        """The model's answer to a conversation: pieces of text as they come, or the whole with stream=False.

        `messages` as transformers and the OpenAI API write them (see `qwen2vl_q.chat.messages`). Answers have
        at most max_new_tokens (1,024) tokens, drawn as the file says where the options do not. All options:
        `ChatOptions`. Arguments are checked at once; errors as of `generate`.

        With `n`, or of a list of conversations, the answers come in a list, computed together as far as the
        cache has room; of a seed, the i-th of n has seed + i. With `details` each is an `Answer`: an iterator
        over its parts that knows tool calls, log-probabilities, why it ended and what it took, complete where
        stream is False. Without them a tool call is text.
        """
        conversations: Any = messages if _are_several(messages) else [messages]
        several = n is not None or conversations is messages
        answers = self._calls.answers(conversations, 1 if n is None else n, details, options)
        if details:
            if not stream:
                complete(answers)
            return answers if several else answers[0]
        if stream and not several:
            return texts(answers[0])
        complete(answers)
        whole = [answer.text for answer in answers]
        return whole if several else whole[0]

    @overload
    def achat(
        self, messages: Messages, stream: Literal[True] = True, **options: Unpack[ChatOptions]
    ) -> AsyncIterator[str]: ...
    @overload
    def achat(
        self, messages: Messages, stream: Literal[False], **options: Unpack[ChatOptions]
    ) -> Awaitable[str]: ...
    @overload
    def achat(
        self, messages: Sequence[Messages], stream: bool = ..., **options: Unpack[ChatOptions]
    ) -> Awaitable[list[str]]: ...
    @overload
    def achat(
        self, messages: Messages, stream: bool = ..., *, n: int, **options: Unpack[ChatOptions]
    ) -> Awaitable[list[str]]: ...
    @overload
    def achat(
        self,
        messages: Messages,
        stream: bool = ...,
        *,
        details: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> Answer: ...
    @overload
    def achat(
        self,
        messages: Messages | Sequence[Messages],
        stream: bool = ...,
        *,
        details: Literal[True],
        n: int,
        **options: Unpack[ChatOptions],
    ) -> list[Answer]: ...
    def achat(
        self,
        messages: Messages | Sequence[Messages],
        stream: bool = True,
        *,
        details: bool = False,
        n: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncIterator[str] | Awaitable[str] | Awaitable[list[str]] | Answer | list[Answer]:
        """`chat` for asyncio: `async for` over the pieces, or `await` of the whole with stream=False and of
        several answers. An `Answer` takes both. Where its task is cancelled, or it is closed (`aclose`, an
        Answer's `close`), the call ends."""
        conversations: Any = messages if _are_several(messages) else [messages]
        several = n is not None or conversations is messages
        answers = self._calls.answers(conversations, 1 if n is None else n, details, options)
        if details:
            return answers if several else answers[0]
        if several:
            return _whole_texts(answers)
        return texts_async(answers[0]) if stream else _whole_text(answers[0])

    def ground(
        self, image: Picture, phrase: str, *, question: str = GROUND, **options: Unpack[ChatOptions]
    ) -> list[Region]:
        """Where a thing is in a picture: boxes and points in the pixels of the picture as it stands upright,
        none where the model names none.

        question: what is asked, with {} for the phrase. Greedy, where the options say nothing; they and
        errors are `chat`'s.
        """
        picture = load_image(image)
        asked: ChatOptions = {"temperature": 0, **options}
        text = question.replace("{}", phrase)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
        answer = self.chat([{"role": "user", "content": content}], stream=False, **asked)
        return parse_grounding(answer, picture.size)

    @overload
    def complete(
        self, prompt: str | TokenIds, images: Iterable[ImageInput] = ..., **options: Unpack[CompleteOptions]
    ) -> Answer: ...
    @overload
    def complete(
        self,
        prompt: str | TokenIds,
        images: Iterable[ImageInput] = ...,
        *,
        n: int,
        **options: Unpack[CompleteOptions],
    ) -> list[Answer]: ...
    def complete(
        self,
        prompt: str | TokenIds,
        images: Iterable[ImageInput] = (),
        *,
        n: int | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Answer | list[Answer]:
        """What follows a text, or tokens, as they are: no template. An `Answer`, or `n` of them, computed as
        they are read. Images stand in tokens as of `generate`; a text's special tokens stay text."""
        answers = self._calls.completions(prompt, images, 1 if n is None else n, options)
        return answers[0] if n is None else answers


def _are_several(messages: Any) -> bool:
    """Whether it is a list of conversations."""
    lists = (list, tuple)
    return isinstance(messages, lists) and bool(messages) and all(isinstance(m, lists) for m in messages)


async def _whole_texts(answers: Sequence[Answer]) -> list[str]:
    await complete_async(answers)
    return [answer.text for answer in answers]


async def _whole_text(answer: Answer) -> str:
    return (await answer).text
