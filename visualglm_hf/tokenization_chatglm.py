# SPDX-License-Identifier: Apache-2.0
"""Text <-> token ids: the sentencepiece tokenizer of ChatGLM-6B and VisualGLM-6B (`ice_text.model`).

It makes ids, padding on the left and a plain attention mask. It does not make position ids (the model derives them),
does not know the prompt grammar (`conversation.py` does), and has no vocabulary besides the sentencepiece model's.

Source: the original `tokenization_chatglm.py` on the slow tokenizers of transformers 4.27 - 4.33, whose treatment of
special tokens and of spaces is kept here on v5's Python backend.
"""

import os
import re
from itertools import pairwise

import sentencepiece
from transformers import AddedToken, PreTrainedTokenizer
from transformers.utils import to_py_obj

from .code_links import replace_links
from .conversation import ANSWER_MARK, END_MARK, IMAGE_MARK


NEWLINE_PIECE = "<n>"
TAB_PIECE = "<|tab|>"
MAX_BLANKS = 80  # longest run of blanks that has a piece of its own
SPECIAL_PIECES = ("<unk>", "<pad>", "</s>", "[MASK]", "[gMASK]", "<sop>", "<eop>")
WHITESPACE_PIECES = (NEWLINE_PIECE, TAB_PIECE, *(f"<|blank_{length}|>" for length in range(2, MAX_BLANKS + 1)))

BLANKS = re.compile(f" {{2,{MAX_BLANKS}}}")  # greedy: a run of 161 blanks is 80 + 80 + 1, as in the original
WHITESPACE = re.compile("|".join(map(re.escape, WHITESPACE_PIECES)))
MARK = re.compile(f"([{IMAGE_MARK}{ANSWER_MARK}{END_MARK}])")

REMEDY = "Copy `ice_text.model` from the original visualglm-6b (or chatglm-6b, version 1.1) repository there."


def encode_whitespace(text: str) -> str:
    """Write newlines, tabs and runs of blanks as the pieces that stand for them."""
    text = text.replace("\n", NEWLINE_PIECE).replace("\t", TAB_PIECE)
    return BLANKS.sub(lambda run: f"<|blank_{len(run.group())}|>", text)


def decode_whitespace(text: str) -> str:
    """Write the pieces for whitespace as whitespace."""
    return WHITESPACE.sub(lambda piece: whitespace_of(piece.group()), text)


def whitespace_of(piece: str) -> str:
    """The whitespace that one of `WHITESPACE_PIECES` stands for."""
    if piece == NEWLINE_PIECE:
        return "\n"
    if piece == TAB_PIECE:
        return "\t"
    return " " * int(piece.removeprefix("<|blank_").removesuffix("|>"))


def read_vocabulary(vocab_file: str | os.PathLike | None, folder: str) -> bytes:
    """Read the sentencepiece model, or raise a `ValueError` that says which file is missing or what it is instead."""
    if vocab_file is None:
        raise ValueError(f"Found no tokenizer model `ice_text.model` in {folder or 'the checkpoint'!r}. {REMEDY}")
    try:
        with open(vocab_file, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ValueError(f"Cannot read the tokenizer model {vocab_file!r} ({error.strerror}). {REMEDY}") from error
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{vocab_file!r} is a Git LFS pointer, not the tokenizer model. Run `git lfs pull` beside it.")
    return content


def build_sentencepiece(content: bytes, vocab_file: str | os.PathLike) -> sentencepiece.SentencePieceProcessor:
    """Parse the sentencepiece model, or raise a `ValueError` if it is none or lacks a piece that ChatGLM needs."""
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise ValueError(
            f"{vocab_file!r} ({len(content):,} bytes) is no sentencepiece model; the download may be cut. {REMEDY}"
        ) from error
    pieces = {model.IdToPiece(index) for index in range(model.vocab_size())}
    missing = [piece for piece in (*SPECIAL_PIECES, *WHITESPACE_PIECES) if piece not in pieces]
    if missing:
        raise ValueError(
            f"{vocab_file!r} is a sentencepiece model of {len(pieces):,} pieces, but not ChatGLM-6B's: it lacks "
            f"{len(missing)} of the special pieces, among them {missing[:4]}. {REMEDY}"
        )
    return model


class ChatGLMTokenizer(PreTrainedTokenizer):
    """The tokenizer of VisualGLM-6B: sentencepiece, with pieces for whitespace, and `[gMASK]<sop>` after each context.

    The characters of `conversation.MARKS` stand for tokens wherever they occur in a text: `IMAGE_MARK` for `<unk>`
    (the place of one picture embedding), `ANSWER_MARK` for `[gMASK]<sop>`, `END_MARK` for `<eop>`. The texts between
    them are encoded each on its own. Of typed tokens, `<sop>`, `<eop>`, `<unk>`, `<pad>` and `[MASK]` become control
    tokens, as in the original; with `split_special_tokens=True` none does, which is the choice for untrusted text, what
    `apply_chat_template` chooses for messages, and what is chosen for a text with marks where nobody chooses.

    Args:
        vocab_file: path of `ice_text.model`.
        do_lower_case: lower-case the text first.
        remove_space: trim each text and squeeze its whitespace, newlines included, to single blanks.
        bos_token, eos_token, end_token, mask_token, gmask_token, pad_token, unk_token: the original's special tokens.
        num_image_tokens: must be 0; ids of the first ChatGLM-6B checkpoints started at 20,000.
        clean_up_tokenization_spaces: whether `decode` removes blanks before punctuation, as transformers 4.x did.

    Raises:
        ValueError: the model file is missing, is no sentencepiece model, or is another model's.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    image_token = IMAGE_MARK

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        do_lower_case: bool = False,
        remove_space: bool = False,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int = 0,
        clean_up_tokenization_spaces: bool = True,
        **kwargs,
    ):
        if num_image_tokens:
            raise ValueError(
                f"num_image_tokens must be 0, found {num_image_tokens}: this is the tokenizer of an early ChatGLM-6B, "
                "whose ids are shifted by that number. Use the tokenizer files of the VisualGLM-6B checkpoint."
            )
        self.vocab_file = vocab_file
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        # The base class asks for the vocabulary while it is built, so the pieces come first.
        self._model_bytes = read_vocabulary(vocab_file, str(kwargs.get("name_or_path", "")))
        self.sp_model = build_sentencepiece(self._model_bytes, vocab_file)
        self._pieces = [self.sp_model.IdToPiece(index) for index in range(self.sp_model.vocab_size())]
        self._piece_ids = {piece: index for index, piece in enumerate(self._pieces)}

        # v5 makes a special token of every `*_token` it is given; the original left these two in text as they are.
        named = dict(kwargs.pop("model_specific_special_tokens", None) or {})
        self.end_token = str(named.pop("end_token", end_token))
        self.gmask_token = str(named.pop("gmask_token", gmask_token))
        kwargs.pop("auto_map", None)  # may name files that are not here; saving remote code writes it anew
        special = (bos_token, eos_token, unk_token, pad_token, mask_token)
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            mask_token=mask_token,
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            num_image_tokens=num_image_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            model_specific_special_tokens=named,
            added_tokens_decoder={**self._stripping(special), **kwargs.pop("added_tokens_decoder", {})},
            **kwargs,
        )
        if "split_special_tokens" not in kwargs:
            self.split_special_tokens = None  # see `tokenize`
        self.init_kwargs.pop("model_specific_special_tokens")
        self.init_kwargs.update(end_token=self.end_token, gmask_token=self.gmask_token)  # what save_pretrained writes

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> tuple[str, ...]:
        """Save it as [`PreTrainedTokenizer.save_pretrained`] does, with the code that loads it."""
        replace_links(save_directory)
        self.register_for_auto_class()
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _stripping(self, tokens) -> dict[int, AddedToken]:
        """Special tokens of the vocabulary that eat the whitespace beside them, as all did in transformers 4.x."""
        return {
            self._piece_ids[str(token)]: token
            if isinstance(token, AddedToken)
            else AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=True)
            for token in tokens
            if token is not None and str(token) in self._piece_ids
        }

    def __getstate__(self) -> dict:
        # Some sentencepiece releases cannot be pickled: the bytes travel, the object is rebuilt.
        return {**self.__dict__, "sp_model": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.sp_model = build_sentencepiece(self._model_bytes, self.vocab_file)

    @property
    def gmask_token_id(self) -> int:
        """Id of `[gMASK]`, which stands where the answer will be generated."""
        return self.convert_tokens_to_ids(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        """Id of `</s>`, which VisualGLM does not use (answers end in `eos_token_id`)."""
        return self.convert_tokens_to_ids(self.end_token)

    @property
    def vocab_size(self) -> int:
        """Number of sentencepiece pieces; the model's embedding has a few more rows."""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        """The pieces and the tokens added to them, as {token: id}."""
        return {**self._piece_ids, **self.added_tokens_encoder}

    def tokenize(self, text: str, **kwargs) -> list[str]:
        """Split `text` into tokens; no special tokens are added.

        Args:
            text: any text, with the characters of `conversation.MARKS` where tokens that are no text belong.
            kwargs: `split_special_tokens=True` treats typed special tokens as text. None, the default, does so in a
                text with marks, whose writer had them for what is no text, but for an `<eop>` at the end of an answer,
                which is how trainers end it.

        Raises:
            ValueError: the text has half of a surrogate pair, so it has no UTF-8 form.
        """
        check_encodable(text)
        marked = {
            IMAGE_MARK: [self.unk_token],
            ANSWER_MARK: [self.gmask_token, self.bos_token],
            END_MARK: [self.eos_token],
        }
        if kwargs.setdefault("split_special_tokens", self.split_special_tokens) is None:
            kwargs["split_special_tokens"] = MARK.search(text) is not None
            if ANSWER_MARK in text and text.endswith(self.eos_token):
                text = text.removesuffix(self.eos_token).removesuffix(END_MARK) + END_MARK
        tokens = []
        for segment in MARK.split(text):
            tokens += marked[segment] if segment in marked else super().tokenize(segment, **kwargs)
        return tokens

    def apply_chat_template(self, conversation, *args, tokenizer_kwargs: dict | None = None, **kwargs):
        """transformers' `apply_chat_template`, for which special tokens typed in a message are text.

        Args:
            conversation: a list of messages, or a list of such lists.
            tokenizer_kwargs: for the call of the tokenizer; `{"split_special_tokens": False}` makes control tokens of
                what is typed, where the rendered text has no mark.
            args, kwargs: as in transformers.

        Raises:
            ValueError: `return_assistant_tokens_mask`, which needs the offsets of a fast tokenizer.
        """
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError(
                "return_assistant_tokens_mask needs a fast tokenizer, and this one is sentencepiece. An answer begins "
                "behind [gMASK]<sop> and ends with <eop>: look for bos_token_id and eos_token_id in the input_ids."
            )
        tokenizer_kwargs = {"split_special_tokens": True, **(tokenizer_kwargs or {})}
        return super().apply_chat_template(conversation, *args, tokenizer_kwargs=tokenizer_kwargs, **kwargs)

    def prepare_for_tokenization(self, text: str, is_split_into_words: bool = False, **kwargs) -> tuple[str, dict]:
        """Lower-case `text`, if that is asked for, before special tokens are looked for in it.

        Source: `PreTrainedTokenizer.tokenize` of transformers 4.33, which lower-cased character by character.
        """
        if self.do_lower_case:
            special = re.compile("(" + "|".join(map(re.escape, self.added_tokens_encoder)) + ")")
            parts = special.split(text)
            parts[::2] = ["".join(map(str.lower, part)) for part in parts[::2]]
            text = "".join(parts)
        return text, kwargs

    def preprocess_text(self, text: str) -> str:
        """Apply `remove_space` and `do_lower_case` to a text without special tokens."""
        if self.remove_space:
            text = " ".join(text.split())
        return text.lower() if self.do_lower_case else text

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.sp_model.EncodeAsPieces(encode_whitespace(self.preprocess_text(text)))

    def _convert_token_to_id(self, token: str) -> int:
        return self._piece_ids.get(token, self.sp_model.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._pieces):
            raise IndexError(f"Token id {index} is out of range: the tokenizer has {len(self._pieces):,} pieces.")
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to text. Control tokens give nothing, `<unk>` gives ' ⁇ ', byte pieces join to characters."""
        return decode_whitespace(self.sp_model.DecodePieces(tokens))

    def decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:
        """Turn ids into text; padding is dropped first.

        Args:
            token_ids: an id, a sequence of ids, or a batch of sequences; lists, arrays or tensors.
            skip_special_tokens: whether to leave out `<unk>` too (the others give no text anyway).
            kwargs: `clean_up_tokenization_spaces` overrides the tokenizer's own setting.

        Returns:
            The text, or a list of texts for a batch.

        Raises:
            IndexError: an id that the vocabulary does not have.
        """
        token_ids = to_py_obj(token_ids)
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        if token_ids and isinstance(token_ids[0], (list, tuple)):
            return [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in token_ids]
        pad_token_id = self.pad_token_id
        kept = [index for index in token_ids if index != pad_token_id]
        return super().decode(kept, skip_special_tokens=skip_special_tokens, **kwargs)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Append `[gMASK]<sop>` to a context, and to that an answer with its `<eop>`.

        A context that has its `[gMASK]<sop>` (from an `ANSWER_MARK`) is left as it is; one that truncation has left
        with `[gMASK]` alone gets its `<sop>`.

        Args:
            token_ids_0: ids of the context; not modified.
            token_ids_1: ids of the answer.
        """
        context = list(token_ids_0)
        start = (self.gmask_token_id, self.bos_token_id)
        if start not in pairwise(context):
            if context[-1:] == [self.gmask_token_id]:
                context.pop()
            context += start
        return context if token_ids_1 is None else [*context, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Mark with 1 what `build_inputs_with_special_tokens` adds, or what is special in a finished sequence."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        num_added = len(self.build_inputs_with_special_tokens(token_ids_0)) - len(token_ids_0)
        mask = [0] * len(token_ids_0) + [1] * num_added
        return mask if token_ids_1 is None else [*mask, *[0] * len(token_ids_1), 1]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `ice_text.model`, byte for byte as it was read, and return its path in a tuple.

        Raises:
            ValueError: `save_directory` is no directory.
        """
        if not os.path.isdir(save_directory):
            raise ValueError(f"Cannot save the tokenizer model: {save_directory!r} is no directory. Create it first.")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = os.path.join(save_directory, prefix + self.vocab_files_names["vocab_file"])
        with open(path, "wb") as file:
            file.write(self._model_bytes)
        return (path,)


def check_encodable(text: str) -> None:
    """Raise a `ValueError` if `text` has no UTF-8 form, which sentencepiece would report as a failed type cast."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text has half of a surrogate pair, {text[error.start]!r}, at index {error.start}: a character was "
            "cut in two before it came here. Join the halves or remove them."
        ) from error
