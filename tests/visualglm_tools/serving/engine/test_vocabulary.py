"""What tokens stand for: the same text as the tokenizer's own decoding, and tokens found by their texts."""

import random

import pytest

from visualglm_tools.serving.engine.text import RawText
from visualglm_tools.serving.engine.vocabulary import Vocabulary


@pytest.fixture(scope="module", params=["trained", "original"])
def vocabulary(request, loaded, tokenizer):
    """Of the tiny model, and of the checkpoint that the original code wrote: their pieces differ."""
    return Vocabulary(loaded[1] if request.param == "trained" else tokenizer)


@pytest.mark.parametrize("seed", range(3))
def test_the_text_of_tokens_is_what_the_tokenizer_decodes_without_clean_up(vocabulary, seed):
    choice = random.Random(seed)
    texts = [index for index in range(len(vocabulary)) if not vocabulary.tokenizer.sp_model.IsByte(index)]
    for _ in range(200):
        tokens = choice.choices(texts, k=choice.randint(1, 12))
        expected = vocabulary.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        assert vocabulary.text_of(tokens) == expected
        growing = RawText(vocabulary, ())
        for end in range(1, len(tokens) + 1):
            growing.update(tokens[:end])
            assert expected.startswith(growing.shown)
        assert growing.shown == expected


def test_characters_of_several_tokens_are_shown_when_they_are_whole(vocabulary):
    word = "a龘\n"
    tokens = [vocabulary.tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in word.encode()]
    growing, shown = RawText(vocabulary, ()), []
    for end in range(1, len(tokens) + 1):
        growing.update(tokens[:end])
        shown.append(growing.shown)
    assert shown == ["a", "a", "a", "a龘", "a龘\n"]
    assert vocabulary.text_of(tokens[:3]) == "a"
    assert [vocabulary.length_of(token) for token in tokens] == [1, 1, 0, 0, 1]


def test_raw_text_ends_before_a_stop_text(vocabulary):
    growing = RawText(vocabulary, ("cd",))
    tokens = [vocabulary.tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in b"abcde"]
    growing.update(tokens[:3])
    assert growing.shown == "ab" and not growing.is_stopped
    growing.update(tokens)
    assert growing.shown == "ab" and growing.is_stopped
    assert growing.final(tokens) == ("ab", True)


def test_a_token_is_found_by_its_number_and_by_its_text(vocabulary):
    eos = vocabulary.tokenizer.eos_token_id
    assert vocabulary.token_ids(str(eos)) == [eos]
    for text, token_id in list(vocabulary.ids_of_texts.items())[::50]:
        name = text.decode(errors="replace")
        if name.encode() == text and not name.isdecimal():
            found = vocabulary.token_ids(name)
            assert token_id in found
            texts = {vocabulary.bytes_of([each], is_begin=False) for each in found}
            assert texts <= {text, b" " + text} and len(texts) == len(found)
    byte = vocabulary.tokenizer.convert_tokens_to_ids("<0x73>")
    assert byte not in vocabulary.token_ids("s")  # a piece comes before the byte of its letter
    assert vocabulary.token_ids("\n") == [vocabulary.tokenizer.convert_tokens_to_ids("<n>")]


@pytest.mark.parametrize("name", ["", "zzzzqqq", "<eop>", "99999", "9" * 5000, "\ud800", "-1", "[gMASK]"])
def test_what_is_not_exactly_one_token_is_refused(vocabulary, name):
    with pytest.raises(ValueError, match="token"):
        vocabulary.token_ids(name)
