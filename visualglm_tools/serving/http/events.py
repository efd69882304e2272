"""Answers as server-sent events, as they grow; they are cancelled when their client leaves.

Not here: what the events of a route look like.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from fastapi.responses import StreamingResponse

from visualglm_tools.serving.engine.answers import Answer, Completion, EngineError
from visualglm_tools.serving.engine.sampling import TokenLogprob
from visualglm_tools.serving.engine.vocabulary import Vocabulary
from visualglm_tools.serving.http.answering import check_complete
from visualglm_tools.serving.http.errors import ApiError, of_answer


class EventStream(StreamingResponse):
    """`events` about `answers`."""

    def __init__(self, answers: Sequence[Answer], events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answers = answers

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self.answers:
                answer.cancel()


@dataclass(frozen=True)
class Piece:
    """What one of several answers has become since its last piece.

    Args:
        index: of the answer.
        text: that is new.
        tokens: that are new, with how likely they were, if that was asked for.
        completion: the whole answer, at its end.
    """

    index: int
    text: str
    tokens: Sequence[TokenLogprob] = ()
    completion: Completion | None = None


async def pieces(answers: Sequence[Answer], vocabulary: Vocabulary) -> AsyncIterator[Piece]:
    """The pieces of all answers as they come.

    Raises:
        EngineError, ValueError: what an answer raises; there are no more pieces then.
    """
    queue: asyncio.Queue[Piece | asyncio.Task] = asyncio.Queue()
    tasks = [asyncio.create_task(feed(index, answer, vocabulary, queue)) for index, answer in enumerate(answers)]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    running = len(tasks)
    try:
        while running:
            found = await queue.get()
            if isinstance(found, Piece):
                yield found
            else:
                found.result()
                running -= 1
    finally:
        for task in tasks:
            task.cancel()


async def feed(index: int, answer: Answer, vocabulary: Vocabulary, queue: asyncio.Queue) -> None:
    """Put the pieces of one answer into the queue."""
    shown, told = "", Told(vocabulary)
    async for text in answer:
        queue.put_nowait(Piece(index, text[len(shown) :], told.take(answer.logprobs, len(text))))
        shown = text
    completion = check_complete(await answer.completion())
    queue.put_nowait(Piece(index, "", completion.logprobs[told.count :], completion))


class Told:
    """Which tokens of a growing answer are told: those whose text is shown, so none that a stop text takes back."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.count = 0  # of tokens that are told
        self.read, self.length = 0, 0  # tokens whose text is shown, and its characters before the clean-up

    def take(self, tokens: Sequence[TokenLogprob], characters: int) -> Sequence[TokenLogprob]:
        """The next of the `tokens` if so many characters of the text are shown; none without a text at their end."""
        begin = self.count
        while self.read < len(tokens):
            more = self.vocabulary.length_of(tokens[self.read].token_id, is_begin=not self.read)
            if self.length + more > characters:
                break
            self.read, self.length = self.read + 1, self.length + more
            self.count = self.read if more else self.count
        return tokens[begin : self.count]


async def with_errors(events: AsyncIterator[str], tell: Callable[[ApiError], str]) -> AsyncIterator[str]:
    """The events; what goes wrong between them is one more, and the last: the response has begun."""
    try:
        async for each in events:
            yield each
    except (EngineError, ValueError) as error:
        yield tell(of_answer(error))


# Line breaks of Unicode that JSON leaves in texts: no ends of lines of an event, but many clients split at them.
LINE_BREAKS = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}


def event(content: dict, name: str | None = None) -> str:
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(content, ensure_ascii=False).translate(LINE_BREAKS)}\n\n"


def error_event(error: ApiError) -> str:
    """As the streams of chat and completions have it."""
    return event(error.as_json())


DONE = "data: [DONE]\n\n"
