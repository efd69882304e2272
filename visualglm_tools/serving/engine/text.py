"""The text of an answer while its tokens come: what later tokens will not change, and nothing after a stop text."""

import codecs
import re
from collections.abc import Sequence


# The end of a growing answer that later words may rewrite: `,` becomes `，` before Chinese, " n't" and " ' " lose their
# blanks, and the original's training date is filled in.
UNSTABLE_END = re.compile(r"(?: [^ ]{0,3}|\[{1,2}[^\[\]]{0,4}\]?|[,!:;?'])$")


def stable_part(response: str) -> str:
    """The part of a growing answer that will not change any more."""
    return UNSTABLE_END.sub("", response).rstrip()


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first of the `stops`, and whether there was one."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def without_begun_stop(text: str, stops: Sequence[str]) -> str:
    """`text` without an end that may become one of the `stops`."""
    begun = (
        length
        for stop in stops
        for length in range(min(len(stop) - 1, len(text)), 0, -1)
        if text.endswith(stop[:length])
    )
    return text[: len(text) - max(begun, default=0)]


class GrowingText:
    """What may be shown of an answer so far; it only ever grows, and is always the beginning of the `final` text."""

    def __init__(self, tokenizer, stops: Sequence[str]):
        # Here and not above: the terminal needs `stable_part` before it loads torch.
        from visualglm_hf.chat import IncrementalDecoder

        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = IncrementalDecoder(tokenizer)
        self.shown = ""
        self.is_stopped = False

    def update(self, token_ids: Sequence[int]) -> None:
        """Take in all tokens of the answer so far; each is decoded once."""
        from visualglm_hf.conversation import clean_response

        for token_id in token_ids[len(self.decoder.token_ids) :]:
            self.decoder.add([token_id])
        text = stable_part(clean_response(self.tokenizer.clean_up_tokenization(self.decoder.text)))
        text, self.is_stopped = cut_at_stop(text, self.stops)
        if not self.is_stopped:
            text = without_begun_stop(text, self.stops)
        if text.startswith(self.shown):
            self.shown = text

    def final(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """The whole text of a complete answer up to its stop text, and whether there was one."""
        from visualglm_hf.conversation import clean_response

        return cut_at_stop(clean_response(self.tokenizer.decode(list(token_ids))), self.stops)


class RawText:
    """As `GrowingText`, of an answer that is given as its tokens say it, without the original's clean-up.

    Args:
        vocabulary: what the tokens stand for, a `vocabulary.Vocabulary`.
        stops: the answer ends before the first of these texts.
    """

    def __init__(self, vocabulary, stops: Sequence[str]):
        self.vocabulary, self.stops = vocabulary, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.read, self.text, self.shown = 0, "", ""
        self.has_begun = self.is_stopped = False

    def update(self, token_ids: Sequence[int]) -> None:
        """Take in all tokens of the answer so far; each is decoded once."""
        new = self.vocabulary.bytes_of(token_ids[self.read :], is_begin=not self.has_begun)
        self.has_begun |= bool(new)
        self.text += self.decoder.decode(new)
        self.read = len(token_ids)
        text, self.is_stopped = cut_at_stop(self.text, self.stops)
        self.shown = text if self.is_stopped else without_begun_stop(text, self.stops)

    def final(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """The whole text of a complete answer up to its stop text, and whether there was one."""
        return cut_at_stop(self.vocabulary.text_of(token_ids), self.stops)
