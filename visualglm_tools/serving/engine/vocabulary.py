"""What each token of a vocabulary stands for, in bytes: what grammars, log-probabilities and biases speak about.

Not here: how a text becomes tokens, and how an answer is cleaned up (`visualglm_hf`).
"""

import codecs
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from visualglm_hf.tokenization_chatglm import WHITESPACE_PIECES, whitespace_of


BLANK_MARK = "\u2581"  # sentencepiece's sign for a blank
UNKNOWN = " \u2047 "  # what sentencepiece decodes <unk> to


class Vocabulary:
    """The tokens of a sentencepiece tokenizer; what is costly is computed when it is first asked for.

    Args:
        tokenizer: a `ChatGLMTokenizer`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.tokenizer)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each token adds to a text, by its id; nothing for control tokens, half a character for some."""
        return [self._bytes_of(token_id) for token_id in range(len(self))]

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that no text consists of: `<unk>`, control tokens, and what somebody has added."""
        model = self.tokenizer.sp_model
        checks = (model.IsControl, model.IsUnknown, model.IsUnused)
        named = [index for index in range(model.vocab_size()) if any(check(index) for check in checks)]
        return frozenset([*named, *range(model.vocab_size(), len(self))])

    @cached_property
    def ids_of_texts(self) -> dict[bytes, int]:
        """The token that stands for some bytes; of several, the one that is a piece and no single byte."""
        is_byte = self.tokenizer.sp_model.IsByte
        ids = {index: text for index, text in enumerate(self.token_bytes) if text and index not in self.control_ids}
        return {text: index for index, text in sorted(ids.items(), key=lambda item: not is_byte(item[0]))}

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of an answer as its tokens say it: no clean-up, and no half character at its end."""
        return codecs.getincrementaldecoder("utf-8")("replace").decode(self.bytes_of(token_ids))

    def bytes_of(self, token_ids: Sequence[int], is_begin: bool = True) -> bytes:
        """What tokens add to a text; if it has none yet, sentencepiece's blank before them is no part of it."""
        text = b"".join(self.token_bytes[index] for index in token_ids)
        first = next((index for index in token_ids if self.token_bytes[index]), None)
        has_mark = first is not None and self.name_of(first).startswith(BLANK_MARK)
        return text[1:] if is_begin and has_mark else text

    def length_of(self, token_id: int, is_begin: bool = False) -> int:
        """How many characters begin with a token."""
        return sum(byte & 0xC0 != 0x80 for byte in self.bytes_of([token_id], is_begin))

    def name_of(self, token_id: int) -> str:
        """A token as the vocabulary has it."""
        return self.tokenizer.convert_ids_to_tokens(token_id)

    def token_ids(self, name: str) -> list[int]:
        """The tokens that a client means by their number or by a text that is one token, behind a blank or not.

        Raises:
            ValueError: no number of a token, and not the text of one.
        """
        if name.isascii() and name.isdecimal() and len(name) <= len(str(len(self))):
            if int(name) >= len(self):
                raise ValueError(f"there is no token {name}; the last one is {len(self) - 1}")
            return [int(name)]
        texts = [blank + name.encode(errors="surrogatepass") for blank in (b"", b" ")]
        found = [self.ids_of_texts[text] for text in texts if text in self.ids_of_texts]
        if not found or not name:
            raise ValueError(f"{name[:60]!r} is not exactly one token; /tokenize tells the tokens of a text")
        return found

    def _bytes_of(self, token_id: int) -> bytes:
        model = self.tokenizer.sp_model
        if token_id >= model.vocab_size():
            return str(self.tokenizer.added_tokens_decoder[token_id]).encode()
        piece = model.IdToPiece(token_id)
        if model.IsByte(token_id):
            return bytes([int(piece[3:-1], 16)])  # <0x0A>
        if model.IsUnknown(token_id):
            return UNKNOWN.encode()
        if model.IsControl(token_id):
            return b""
        return (whitespace_of(piece) if piece in WHITESPACE_PIECES else piece.replace(BLANK_MARK, " ")).encode()
