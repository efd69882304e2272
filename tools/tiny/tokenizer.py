"""The vocabulary of `models/visualglm-tiny`: an `ice_text.model` in the layout of ChatGLM-6B's, only much smaller.

A sentencepiece file is one protobuf message. The few fields that matter are written here by hand, so no protobuf
package is needed and the same texts give the same bytes. Only the normaliser's table, which sentencepiece compiles
from Unicode's NFKC, is taken out of a model that sentencepiece trains in passing.

The layout: <unk> <s> </s> <pad> <n>, ordinary pieces beginning with the space, the control pieces, `<|tab|>` and
`<|blank_2|>` to `<|blank_80|>`, then one piece for each byte.
"""

import io
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from tools.tiny import questions, words, world
from visualglm_hf import ChatGLMTokenizer


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # sentencepiece's piece types
SPACE = "\u2581"
SCORE_STEP = 0.005  # log probability between neighbours; all scores stay so close that fewer pieces always win

FIRST_PIECES = (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("<pad>", CONTROL), ("<n>", USER_DEFINED))
CONTROL_PIECES = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
BLANK_PIECES = ("<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81)))
PROMPT_PIECES = (f"{SPACE}<", f"{SPACE}</", "img", ">", f"{SPACE}Q", f"{SPACE}问")
CHINESE_WORDS = (  # between blanks
    "图片 图形 描述 这张 什么 形状 颜色 位置 数量 背景 内容 可能 场所 拍摄 哪里 地方 左边 右边 上边 下边 中间 在 "
    "不同的 户外 室内 公园 海上 海边 夜晚 桌子 天空中 几个 多少个 一共 一下 一个 请 先给我 再说 一遍 你好 "
    "是谁 叫什么 名字 能做 谢谢 不客气 再见 我是 很小的 看图 模型 我能 回答 问题 场景 它是 有 那 的 是 里 中 问 答"
)
ADDED_CHINESE_WORDS = "写着 牌子 文字 图里 图中 上面 没有 看不清 看见 是的 不是 是不是 有没有 它们 图形是 一块 吗 和 、"
QUOTES = ("“", "”", f'{SPACE}"', "‘", "’")
WORD = re.compile(r"[A-Za-z]+")


def varint(number: int) -> bytes:
    """Encode a non-negative integer as protobuf does: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def field(number: int, value: int | float | str | bytes) -> bytes:
    """Encode one protobuf field."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield (number, value) for each field of a protobuf message; nested messages and strings come as bytes."""
    position = 0
    while position < len(message):
        key, position = read_varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = read_varint(message, position)
        elif wire_type == 2:
            length, position = read_varint(message, position)
            value, position = message[position : position + length], position + length
        elif wire_type == 5:
            value, position = struct.unpack_from("<f", message, position)[0], position + 4
        else:
            raise ValueError(f"Field {number} has wire type {wire_type}; a sentencepiece model has only 0, 2 and 5.")
        yield number, value


def read_varint(message: bytes, position: int) -> tuple[int, int]:
    """Return the integer at `position` and the position after it."""
    number = shift = 0
    while message[position] > 127:
        number |= (message[position] & 127) << shift
        position, shift = position + 1, shift + 7
    return number | message[position] << shift, position + 1


def normalizer_spec() -> bytes:
    """Return sentencepiece's own normaliser message: NFKC, line ends to spaces, dummy prefix, single spaces."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"]),
        model_writer=trained,
        model_type="char",
        vocab_size=8,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    return next(value for number, value in fields(trained.getvalue()) if number == 3)


def trainer_spec(num_pieces: int) -> bytes:
    """Return the trainer message; at run time sentencepiece reads the model type, byte fallback and special ids."""
    return b"".join(
        (
            field(2, "ice_text"),  # model_prefix
            field(3, 1),  # model_type: unigram
            field(4, num_pieces),  # vocab_size
            field(25, 1),  # split_digits
            field(31, "<n>"),  # user_defined_symbols
            field(35, 1),  # byte_fallback
            *(field(40 + index, index) for index in range(4)),  # unk_id, bos_id, eos_id, pad_id
            *(field(45 + index, FIRST_PIECES[index][0]) for index in range(4)),  # and their pieces
        )
    )


def ordinary_pieces(texts: Iterable[str]) -> list[str]:
    """Return the pieces for `texts`: whole words, their characters, and printable ASCII for what users type."""
    texts = list(texts)
    words = sorted({word for text in texts for word in WORD.findall(text)})
    # A text begins without a space behind "Q:" and "A:", and with one at the start of an answer.
    first_words = sorted({match.group() for text in texts if (match := WORD.match(text))})
    ascii_characters = [chr(code) for code in range(0x21, 0x7F)]
    chinese_names = [names[0] for table in (world.SHAPES, world.COLOURS, world.BACKGROUNDS) for names in table.values()]
    chinese_names += [chinese for chinese, _ in world.COUNTS.values()]
    characters = sorted({character for text in texts for character in text if "\u3000" <= character <= "\u9fff"})
    pieces = [SPACE, *PROMPT_PIECES, *(SPACE + word for word in words), *first_words]
    pieces += [word[0].lower() + word[1:] for word in first_words]
    pieces += [*chinese_names, *CHINESE_WORDS.split(), *characters, *ascii_characters]
    return list(dict.fromkeys(pieces))


def added_pieces(texts: Iterable[str]) -> list[str]:
    """Return the pieces for texts that came later; they stand behind the first ones, which keep their numbers."""
    characters = words.CHINESE_CHARACTERS
    return [*ordinary_pieces(texts), *ADDED_CHINESE_WORDS.split(), *QUOTES, *characters]


def build_model(texts: Iterable[str], added_texts: Iterable[str] = ()) -> bytes:
    """Return the serialized sentencepiece model for `texts`, the same bytes each time."""
    ordinary = list(dict.fromkeys([*ordinary_pieces(texts), *added_pieces(added_texts)]))
    pieces = [(piece, 0.0, kind) for piece, kind in FIRST_PIECES]
    pieces += [(piece, -4.0 - SCORE_STEP * index, NORMAL) for index, piece in enumerate(ordinary)]
    pieces += [(piece, 0.0, CONTROL) for piece in CONTROL_PIECES]
    pieces += [(piece, 0.0, USER_DEFINED) for piece in BLANK_PIECES]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    messages = [field(1, field(1, piece) + field(2, score) + field(3, kind)) for piece, score, kind in pieces]
    return b"".join(messages) + field(2, trainer_spec(len(pieces))) + field(3, normalizer_spec())


def write_model(path: str | Path) -> None:
    """Write the world's `ice_text.model` to `path`."""
    Path(path).write_bytes(build_model(world.all_texts(), questions.all_texts()))


def write_tokenizer(folder: Path) -> ChatGLMTokenizer:
    """Build the vocabulary in `folder` and return its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "ice_text.model")
    return ChatGLMTokenizer(str(folder / "ice_text.model"))
