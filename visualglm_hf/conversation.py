# SPDX-License-Identifier: Apache-2.0
"""The prompt grammar: the one place that knows what a conversation with VisualGLM looks like.

A prompt is a plain string. Three Unicode specials that no tokenizer piece contains stand for what is not text:
`IMAGE_MARK` for the features of a picture, `ANSWER_MARK` for `[gMASK]<sop>` and `END_MARK` for `<eop>`. Everything
else in the string is text, also when a user types `<img>` or `<sop>`. `chat()`, the chat template and the processor
all build their prompts here.

Source: `build_inputs_with_image` and `process_response` in the original `modeling_chatglm.py`; `Q:`/`A:` in its
`chat.py` for SwissArmyTransformer.
"""

import re
import reprlib
from collections.abc import Iterable, Sequence


IMAGE_MARK = "\ufffc"  # OBJECT REPLACEMENT CHARACTER: one soft prompt embedding once the processor has expanded it
ANSWER_MARK = "\ufff9"  # INTERLINEAR ANNOTATION ANCHOR: the context ends, the answer begins
END_MARK = "\ufffb"  # INTERLINEAR ANNOTATION TERMINATOR: the answer is complete
MARKS = (IMAGE_MARK, ANSWER_MARK, END_MARK)
MARKS_TO_BLANKS = dict.fromkeys(map(ord, MARKS), " ")

IMAGE_PROMPT = f"<img>{IMAGE_MARK}</img>"
CHINESE = ("问：", "答：")
ENGLISH = ("Q:", "A:")
# What was read in a picture stands at the head of the question, in its language: our own wording, not the original's.
CHINESE_READING = "图片中的文字：“{}”\n"
ENGLISH_READING = 'Text in the picture: "{}"\n'
LINE_BREAK = " / "  # between the lines that were read: a line of the prompt can begin a turn, so they share one
MORE = "…"  # ends what was read where that is not all
# What was read has neither the quotes that stand around it nor the sign that it goes on.
AS_READ = str.maketrans({"“": "‘", "”": "’", '"': "''", MORE: "..."})
CUT_NOTICE = ("（太长了，后面的没有放进去）", " (there is more, which was left out)")  # Chinese, English
NOTHING_READ = ("图片中没有读到文字。", "No text was found in the picture.")

FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
CHINESE_CHARACTER = re.compile("[\u4e00-\u9fff]")
CHINESE_BESIDE_HALF_WIDTH = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


def brief(value) -> str:
    """`repr(value)` for an error, of at most a line or two: what users pass may be a megabyte of base64."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 100  # characters
    return shortened.repr(value)


def has_chinese(text: str) -> bool:
    return CHINESE_CHARACTER.search(text) is not None


def is_english(text: str) -> bool:
    """Whether `text` asks for the `Q:`/`A:` prompt: it has a Latin letter and no Chinese character."""
    return not has_chinese(text) and any("a" <= character <= "z" for character in text.lower())


def check_text(text: str, what: str) -> str:
    """Return `text`, or raise a `ValueError` if it is no string or contains a character reserved for the prompt."""
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a string, found {type(text).__name__}: {brief(text)}.")
    for mark in MARKS:
        if mark in text:
            raise ValueError(
                f"{what} contains the reserved character U+{ord(mark):04X} at index {text.index(mark)}; remove it. "
                "Pictures are given as images, not as text."
            )
    return text


def check_query(query: str) -> str:
    """Return the user's question, or raise a `ValueError` if it is empty, no string, or has a reserved character."""
    if not check_text(query, "The query").strip():
        raise ValueError("The query is empty; ask something, for example '描述这张图片。'.")
    return query


def check_history(history: Iterable) -> list[tuple[str, str]]:
    """Return `history` as a list of (query, response), or raise a `ValueError` that names the first bad entry."""
    if isinstance(history, (str, bytes, dict)) or not isinstance(history, Iterable):
        raise ValueError(f"history must be a list of (query, response) pairs, found {type(history).__name__}.")
    turns = []
    for index, turn in enumerate(history):
        if isinstance(turn, (str, bytes, dict)) or not isinstance(turn, Sequence) or len(turn) != 2:
            raise ValueError(f"history[{index}] must be a (query, response) pair, found {brief(turn)}.")
        query, response = turn
        turns.append(
            (check_text(query, f"history[{index}]'s query"), check_text(response, f"history[{index}]'s response"))
        )
    return turns


def one_line_of(lines: Iterable[str]) -> str:
    """Lines that were read in a picture as one line that may stand in a prompt, whatever is written in them.

    Nobody at hand has typed them, so nothing is refused: line breaks, control characters and the marks of the prompt,
    which could end the question or stand for a picture, become blanks.
    """
    printable = ("".join(each if each.isprintable() else " " for each in line) for line in lines)
    kept = (" ".join(line.translate(MARKS_TO_BLANKS).split()) for line in printable)
    return LINE_BREAK.join(filter(None, kept)).translate(AS_READ)


def quote_reading(reading: str, english: bool) -> str:
    """What was read in a picture, of `one_line_of`, as it stands before the question; "" where there was nothing."""
    return (ENGLISH_READING if english else CHINESE_READING).format(reading) if reading else ""


def describe_reading(reading: str, english: bool) -> str:
    """What was read in a picture as it is shown to whoever asked, in one line."""
    if not reading:
        return NOTHING_READ[english]
    return quote_reading(reading, english).rstrip() + CUT_NOTICE[english] * reading.endswith(MORE)


def build_prompt(
    query: str,
    history: Iterable = (),
    image_turns: Sequence[int] = (),
    english: bool | None = None,
    readings: Sequence[str] = (),
) -> str:
    """Write the prompt that asks `query` after `history`.

    Args:
        query: the user's question.
        history: (query, response) pairs, oldest first.
        image_turns: for each picture, in order, the index of the turn that it stands before (`len(history)` is the
            current one). A picture of turn 0 stands where the original put its only one.
        english: whether to prompt with `Q:`/`A:`; None looks at the language of `query`.
        readings: for each picture, what was read in it, see `one_line_of`; none for no picture at all.

    Returns:
        The prompt with one `IMAGE_MARK` for each picture, ending in `ANSWER_MARK`.

    Raises:
        ValueError: an empty query, a history of the wrong shape, a reserved character in a text, another `english`.
    """
    check_query(query)
    turns = check_history(history)
    if english not in (None, True, False):
        raise ValueError(f"english must be True, False or None for the language of the query, found {brief(english)}.")
    english = is_english(query) if english is None else english
    question, answer = ENGLISH if english else CHINESE
    prompt = ""
    for index, (asked, answered) in enumerate([*turns, (query, None)]):
        read = "".join(
            quote_reading(reading, english)
            for turn, reading in zip(image_turns, readings, strict=bool(readings))
            if turn == index
        )
        prompt += IMAGE_PROMPT * list(image_turns).count(index) + f"{question}{read}{asked}\n{answer}"
        prompt += ANSWER_MARK if answered is None else f"{answered}\n"
    return prompt


def expand_images(prompt: str, num_images: int, num_query_tokens: int) -> str:
    """Repeat each `IMAGE_MARK` of `prompt` once for each of the `num_query_tokens` embeddings of its picture.

    Raises:
        ValueError: the number of marks is not `num_images`.
    """
    found = prompt.count(IMAGE_MARK)
    if found != num_images:
        raise ValueError(
            f"The prompt has {found} image placeholder(s) for {num_images} image(s). Put one `processor.image_token` "
            f"(written {IMAGE_PROMPT!r}) where each image belongs, or build the prompt with `apply_chat_template`."
        )
    return prompt.replace(IMAGE_MARK, IMAGE_MARK * num_query_tokens)


def clean_response(response: str) -> str:
    """Give a decoded answer the original's finish: full-width punctuation beside Chinese characters, trimmed ends."""
    response = response.strip().replace("[[训练时间]]", "2023年")
    return CHINESE_BESIDE_HALF_WIDTH.sub(lambda match: FULL_WIDTH[match.group()], response)


def uncleaned(text: str) -> str:
    """`text` as the model writes it before `clean_response`: it knows punctuation of half width alone."""
    return text.translate({ord(full): half for half, full in FULL_WIDTH.items()})


# What the functions above do, in Jinja for `apply_chat_template`; tests hold the two equal.
CHAT_TEMPLATE = r"""
{%- set image_mark, answer_mark, end_mark = '%IMAGE%', '%ANSWER%', '%END%' -%}
{%- macro brief(value) -%}{{- (value | string)[:40] -}}{%- endmacro -%}
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}
        {%- set text = message['content'] -%}
    {%- else -%}
        {%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | list -%}
        {%- for part in texts if part is not string -%}
            {{- raise_exception('The text of a part must be a string, found ' + brief(part) + '.') -}}
        {%- endfor -%}
        {%- set text = texts | join('\n') -%}
    {%- endif -%}
    {%- for mark in [image_mark, answer_mark, end_mark] if mark in text -%}
        {{- raise_exception('A message contains a character that is reserved for the prompt; remove it.') -}}
    {%- endfor -%}
    {{- text -}}
{%- endmacro -%}
{%- if tools or documents -%}
    {{- raise_exception('This model knows no tools and no documents. Leave them out, or write them into a message.') -}}
{%- endif -%}
{%- set ns = namespace(messages=messages, last='', chinese=false, latin=false) -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {{- text_of(messages[0]) + '\n' -}}
    {%- set ns.messages = messages[1:] -%}
{%- endif -%}
{%- for message in ns.messages -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception(
            'After at most one system message, user and assistant must alternate; found ' + brief(message['role']) + '.'
        ) -}}
    {%- endif -%}
    {%- if message['content'] is not string -%}
        {%- set allowed = ['text', 'image'] if message['role'] == 'user' else ['text'] -%}
        {%- for part in message['content'] if part['type'] not in allowed -%}
            {{- raise_exception('A message of ' + message['role'] + ' cannot have ' + brief(part['type']) + '.') -}}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- set ns.last = text_of(message) -%}
    {%- endif -%}
{%- endfor -%}
{%- if not ns.last.strip() -%}
    {{- raise_exception('The last question is empty; ask something.') -}}
{%- endif -%}
{%- for character in ns.last.lower() -%}
    {%- if '\u4e00' <= character <= '\u9fff' -%}{%- set ns.chinese = true -%}{%- endif -%}
    {%- if 'a' <= character <= 'z' -%}{%- set ns.latin = true -%}{%- endif -%}
{%- endfor -%}
{%- if english is undefined or english is none -%}
    {%- set english = ns.latin and not ns.chinese -%}
{%- endif -%}
{%- set question, answer = ('Q:', 'A:') if english else ('问：', '答：') -%}
{%- for message in ns.messages -%}
    {%- if message['role'] == 'user' -%}
        {%- if message['content'] is not string -%}
            {%- for part in message['content'] if part['type'] == 'image' -%}
                {{- '<img>' + image_mark + '</img>' -}}
            {%- endfor -%}
        {%- endif -%}
        {{- question + text_of(message) + '\n' -}}
        {%- if loop.last and add_generation_prompt -%}
            {{- answer + answer_mark -}}
        {%- endif -%}
    {%- elif loop.last -%}
        {{- answer + answer_mark + text_of(message) + end_mark -}}
    {%- else -%}
        {{- answer + text_of(message) + '\n' -}}
    {%- endif -%}
{%- endfor -%}
""".strip()
for name, mark in {"%IMAGE%": IMAGE_MARK, "%ANSWER%": ANSWER_MARK, "%END%": END_MARK}.items():
    CHAT_TEMPLATE = CHAT_TEMPLATE.replace(name, mark)
