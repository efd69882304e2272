"""How likely the tokens of an answer were, in the shapes of OpenAI's routes.

They are the model's: before temperature, penalties, biases and masks. A token is told as what it adds to the text
before the clean-up of the answer; one that is no text, such as the end, by its name and without bytes.
"""

import math
from collections.abc import Sequence

from pydantic import BaseModel

from visualglm_tools.serving.engine.sampling import TokenLogprob
from visualglm_tools.serving.engine.vocabulary import Vocabulary


LEAST = -9999.0  # JSON has no infinity; OpenAI's own


class LikelyToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    content: list[ChosenToken]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Of `/v1/completions`: lists, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Words:
    """Tells the tokens of an answer, from its first one on.

    Args:
        vocabulary: what they stand for.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.told, self.length = 0, 0  # tokens, and their characters

    def chosen(self, tokens: Sequence[TokenLogprob]) -> list[ChosenToken]:
        """The next tokens as chat and responses have them."""
        found = []
        for token in tokens:
            top = [LikelyToken(**self.fields(*each)) for each in token.top]
            found.append(ChosenToken(**self.fields(token.token_id, token.logprob), top_logprobs=top))
            self.told += 1
        return found

    def lists(self, tokens: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """The next tokens as completions have them."""
        offsets = []
        for index, each in enumerate(tokens, self.told):
            offsets.append(self.length)
            self.length += self.vocabulary.length_of(each.token_id, is_begin=not index)
        chosen = self.chosen(tokens)
        return CompletionLogprobs(
            tokens=[each.token for each in chosen],
            token_logprobs=[each.logprob for each in chosen],
            top_logprobs=[{other.token: other.logprob for other in each.top_logprobs} for each in chosen],
            text_offset=offsets,
        )

    def fields(self, token_id: int, logprob: float) -> dict:
        text = self.vocabulary.bytes_of([token_id], is_begin=not self.told)
        name = text.decode(errors="replace")
        if token_id in self.vocabulary.control_ids:
            name, text = self.vocabulary.name_of(token_id), None
        logprob = logprob if math.isfinite(logprob) else LEAST
        return {"token": name, "logprob": logprob, "bytes": None if text is None else list(text)}
