"""Where the answer begins is known or asked for, never guessed; and no answer sees itself."""

import pytest
import torch

from tests.helpers import FLOAT32_TOLERANCE, load_float32, relative_error
from visualglm_hf.glm_positions import build_glm_position_ids


ANSWER = [700, 701, 702, 703]
DESCRIBE, GREET, WHICH = "问：描述这张图片。\n答：", "问：你好\n答：", "问：哪个更好看，第一张还是第二张？\n答："
PACKED = "give each answer a row of its own"


@pytest.fixture(scope="module")
def rows(processor, pictures) -> list[tuple[str, list]]:
    picture = f"<img>{processor.image_token}</img>"
    return [(picture + DESCRIBE, pictures[:1]), (GREET, []), (picture + picture + WHICH, pictures[1:3])]


@pytest.fixture(scope="module")
def prompts(processor, rows) -> dict:
    """Rows with one picture, none and two, padded on the left."""
    texts, images = zip(*rows, strict=True)
    return dict(processor(text=list(texts), images=list(images), padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def greeting(processor) -> torch.Tensor:
    return processor(text=GREET, return_tensors="pt")["input_ids"]


def answered(batch: dict, answers: list[list[int]] | None = None) -> dict:
    """The batch with an answer in each row."""
    answers = torch.tensor(answers or [ANSWER] * len(batch["input_ids"]))
    return {
        **batch,
        "input_ids": torch.cat((batch["input_ids"], answers), dim=1),
        "attention_mask": torch.cat((batch["attention_mask"], torch.ones_like(answers)), dim=1),
    }


def padded_on_the_right(batch: dict) -> dict:
    """The same rows with their padding at the other end."""
    order = torch.argsort(batch["attention_mask"], dim=1, descending=True, stable=True)
    return batch | {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask")}


def embedded(model, batch: dict) -> dict:
    """The batch with embeddings instead of ids."""
    others = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    return {**others, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach()}


def answer_labels(batch: dict, start: int) -> torch.Tensor:
    """The ids after `<sop>`."""
    is_answer = (batch["input_ids"] == start).cumsum(-1).roll(1, -1) * batch["attention_mask"] > 0
    is_answer[:, 0] = False
    return batch["input_ids"].masked_fill(~is_answer, -100)


# By embeddings


@pytest.mark.parametrize("padded", [lambda batch: batch, padded_on_the_right], ids=["left", "right"])
def test_the_loss_by_embeddings_is_the_loss_by_ids(model, prompts, padded):
    batch = padded(answered(prompts))
    labels = answer_labels(batch, model.config.text_config.bos_token_id)
    assert (labels != -100).sum() == 3 * len(ANSWER)
    with torch.no_grad():
        expected = model(**batch, labels=labels)
        found = model(**embedded(model, batch), labels=labels)
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-4)
    assert relative_error(found.logits, expected.logits) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_marks_are_found_in_any_precision_of_the_embeddings(model, half_model, greeting, dtype):
    batch = answered({"input_ids": greeting, "attention_mask": torch.ones_like(greeting)})
    with torch.no_grad():
        for one in (model, half_model):
            embeds = one.get_input_embeddings()(batch["input_ids"]).to(dtype)
            assert one.know_ids(None, embeds)[0].tolist() == [
                id if id in (1101, 1104) else -1 for id in batch["input_ids"][0].tolist()
            ]


@pytest.mark.parametrize(
    "change",
    [lambda embeds: embeds + 0.01, lambda embeds: embeds[:, :-1], lambda embeds: torch.zeros_like(embeds)],
    ids=["noise", "no <sop>", "nothing"],
)
@pytest.mark.parametrize("door", ["forward", "labels", "generate"])
def test_embeddings_without_marks_are_refused(model, greeting, change, door):
    embeds = change(model.get_input_embeddings()(greeting).detach())
    call = model.generate if door == "generate" else model
    labels = {"labels": torch.ones(embeds.shape[:2], dtype=torch.long)} if door == "labels" else {}
    with pytest.raises(ValueError, match="not among inputs_embeds.*pass input_ids too, or glm_position_ids"):
        call(inputs_embeds=embeds, **labels)


def test_embeddings_with_positions_or_ids_need_no_marks(model, greeting):
    batch = answered({"input_ids": greeting, "attention_mask": torch.ones_like(greeting)})
    noisy = model.get_input_embeddings()(batch["input_ids"]).detach() + 0.01
    positions = build_glm_position_ids(batch["input_ids"], None, model.config.text_config)
    with torch.no_grad():
        one = model(inputs_embeds=noisy, glm_position_ids=positions).logits
        other = model(input_ids=batch["input_ids"], inputs_embeds=noisy).logits
    assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_embeddings_generate_what_their_ids_generate(model, prompts, options):
    """Of answers that have begun, at a place of its own in each row."""
    begun = [[3, 3, 3], [700, 3, 3], [700, 701, 702]]
    batch = answered(prompts, begun)
    order = torch.tensor([[id == 3 for id in row] for row in begun]).int()
    for row, padding in enumerate(order.sum(-1).tolist()):  # what has not begun is padding on the left
        for name in ("input_ids", "attention_mask"):
            batch[name][row] = batch[name][row].roll(padding)
        batch["attention_mask"][row, :padding] = 0
    assert len(set((batch["input_ids"] == 1104).int().argmax(-1).tolist())) == 3
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    expected = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(model.generate(**embedded(model, batch), **options), expected)


def test_embeddings_continue_from_a_cache(model, processor, rows):
    batch = dict(processor(text=rows[0][0], images=rows[0][1], return_tensors="pt"))
    options = {"min_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"]).pooler_output
        embeds = model.embed(batch["input_ids"], features)
        expected = model.generate(inputs_embeds=embeds, max_new_tokens=8, **options).sequences
        begun = model.generate(inputs_embeds=embeds, max_new_tokens=4, **options | {"min_new_tokens": 4})
        embeds = torch.cat((embeds, model.embed(begun.sequences)), dim=1)
        cache = {"past_key_values": begun.past_key_values}
        rest = model.generate(inputs_embeds=embeds, max_new_tokens=4, **cache, **options | {"min_new_tokens": 4})
    assert torch.equal(torch.cat((begun.sequences, rest.sequences), dim=1), expected)


# Behind PEFT's virtual tokens

VIRTUAL = {
    "prompt tuning": ("PromptTuningConfig", {}),
    "P-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 32}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3}),
    "CPT": (
        "CPTConfig",
        {"cpt_token_ids": [40, 41, 42, 43, 44], "cpt_mask": [1] * 5, "cpt_tokens_type_mask": [1, 2, 3, 3, 4]},
    ),
    "prefix tuning": ("PrefixTuningConfig", {}),
}


@pytest.fixture(scope="module", params=list(VIRTUAL))
def tuned(request, tiny_original):
    """A model with virtual tokens that say something, and what its calls need beside the batch."""
    peft = pytest.importorskip("peft")
    name, options = VIRTUAL[request.param]
    config = getattr(peft, name)(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, **options})
    tuned = peft.get_peft_model(load_float32(tiny_original), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.prompt_encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    return tuned, {"task_ids": torch.tensor([0, 1, 2])} if request.param == "multitask" else {}


def generate_naively(model, batch: dict, steps: int) -> torch.Tensor:
    """Greedy answers [B, steps], each token by a forward pass over all before it; none ends."""
    eos = torch.tensor([model.config.text_config.eos_token_id])
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        for _ in range(steps):
            scores = model(**batch).logits[:, -1].index_fill(1, eos, -torch.inf)
            batch = answered(batch, scores.argmax(-1, keepdim=True).tolist())
    return batch["input_ids"][:, length:]


def test_virtual_tokens_answer_with_a_cache_as_without(tuned, prompts, model):
    tuned, extra = tuned
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = generate_naively(tuned, {**prompts, **extra}, 5)
    length = prompts["input_ids"].shape[1]
    for more in ({}, {"use_cache": False}):
        assert torch.equal(tuned.generate(**prompts, **extra, **options, **more)[:, length:], expected)
    assert not torch.equal(model.generate(**prompts, **options)[:, length:], expected)


def test_virtual_tokens_answer_a_batch_as_its_rows_alone(tuned, processor, rows, prompts):
    tuned, extra = tuned
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    together = tuned.generate(**prompts, **extra, **options)[:, -5:]
    for row, (text, images) in enumerate(rows):
        single = processor(text=text, images=images or None, return_tensors="pt")
        own = {name: tensor[row : row + 1] for name, tensor in extra.items()}
        assert tuned.generate(**single, **own, **options)[0, -5:].tolist() == together[row].tolist()


def test_virtual_tokens_are_trained_and_the_answer_does_not_see_itself(tuned, prompts, model):
    tuned, extra = tuned
    batch = answered(prompts)
    labels = answer_labels(batch, model.config.text_config.bos_token_id)
    tuned.zero_grad()
    tuned(**batch, **extra, labels=labels).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in tuned.parameters() if p.requires_grad and p.grad is not None)
    assert any(p.grad is not None for p in tuned.parameters())
    with torch.no_grad():
        before = tuned(**batch, **extra).logits
        batch["input_ids"][:, -1] = 900
        after = tuned(**batch, **extra).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


# No answer sees itself


@pytest.mark.parametrize("door", ["ids", "embeddings", "positions", "padding on the right", "cache", "labels"])
def test_another_answer_token_changes_nothing_before_it(model, prompts, door):
    config = model.config.text_config

    def logits_of(batch):
        if door == "padding on the right":
            batch = padded_on_the_right(batch)
        if door == "positions":
            positions = build_glm_position_ids(batch["input_ids"], batch["attention_mask"], config)
            batch = {**batch, "position_ids": positions}
        if door == "embeddings":
            batch = embedded(model, batch)
        if door == "labels":
            batch = {**batch, "labels": answer_labels(batch, config.bos_token_id)}
        with torch.no_grad():
            if door != "cache":
                return model(**batch).logits
            context = {name: tensor[:, : -len(ANSWER)] for name, tensor in batch.items() if name != "pixel_values"}
            cache = model(**context, pixel_values=batch["pixel_values"], use_cache=True).past_key_values
            positions = build_glm_position_ids(batch["input_ids"], batch["attention_mask"], config)
            ids, places = batch["input_ids"][:, -len(ANSWER) :], positions[..., -len(ANSWER) :]
            mask = batch["attention_mask"]
            return model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits

    before = logits_of(answered(prompts))
    for changed in range(len(ANSWER)):
        other = [*ANSWER[:changed], 900, *ANSWER[changed + 1 :]]
        after = logits_of(answered(prompts, [other] * 3))
        differs = (before != after).any(-1)
        place = differs.shape[1] - len(ANSWER) + changed
        if door == "padding on the right":
            ends = answered(prompts)["attention_mask"].sum(-1)
            assert [row.int().argmax().item() for row in differs] == (ends - len(ANSWER) + changed).tolist()
        else:
            assert differs.int().argmax(-1).tolist() == [place] * 3


# Places and pictures

WITHOUT_PICTURES = {
    "forward": lambda model, batch, embeds, positions: model(**batch),
    "embeddings": lambda model, batch, embeds, positions: model(**embeds),
    "ids and embeddings": lambda model, batch, embeds, positions: model(**batch | embeds),
    "positions": lambda model, batch, embeds, positions: model(**batch, position_ids=positions),
    "our positions": lambda model, batch, embeds, positions: model(**batch, glm_position_ids=positions),
    "beginning": lambda model, batch, embeds, positions: model(**batch, prompt_embeds=torch.zeros(3, 4, 64)),
    "labels": lambda model, batch, embeds, positions: model(**batch, labels=batch["input_ids"]),
    "base model": lambda model, batch, embeds, positions: model.base_model(**batch),
    "generate": lambda model, batch, embeds, positions: model.generate(**batch, max_new_tokens=1),
    "generate, embeddings": lambda model, batch, embeds, positions: model.generate(**embeds, max_new_tokens=1),
    "generate, beams": lambda model, batch, embeds, positions: model.generate(**batch, max_new_tokens=1, num_beams=2),
}


@pytest.mark.parametrize("door", list(WITHOUT_PICTURES))
def test_places_without_pictures_are_refused(model, prompts, door):
    batch = {name: tensor for name, tensor in answered(prompts).items() if name != "pixel_values"}
    positions = build_glm_position_ids(batch["input_ids"], batch["attention_mask"], model.config.text_config)
    with pytest.raises(ValueError, match=r"image tokens \(id 0\), but there is no picture. Give pixel_values"):
        WITHOUT_PICTURES[door](model, batch, embedded(model, batch), positions)


def test_the_image_token_is_a_word_in_an_answer(model, prompts, greeting):
    """`<unk>`, which the model may say; trainers then ask how likely it was."""
    with torch.no_grad():
        for batch in (prompts, {"input_ids": greeting, "attention_mask": torch.ones_like(greeting)}):
            said = answered(batch, [[700, 0, 701]] * len(batch["input_ids"]))
            logits = model(**said).logits
            assert torch.equal(logits, model(**embedded(model, said)).logits)
            before = model(**answered(batch, [[700]] * len(batch["input_ids"]))).logits
            assert relative_error(logits[:, :-2], before) < FLOAT32_TOLERANCE
            assert model.generate(**said, max_new_tokens=2).shape[1] == said["input_ids"].shape[1] + 2


def test_a_cache_that_has_seen_the_pictures_needs_them_no_more(model, processor, rows):
    batch = dict(processor(text=rows[0][0], images=rows[0][1], return_tensors="pt"))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch, **options)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = build_glm_position_ids(ids, None, model.config.text_config)
    with torch.no_grad():
        picture = {"pixel_values": batch["pixel_values"], "position_ids": positions[..., :-1]}
        cache = model(ids[:, :-1], **picture, use_cache=True).past_key_values
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options), expected)


def test_positions_of_fewer_ids_than_there_are_are_refused(model, greeting):
    positions = build_glm_position_ids(greeting, None, model.config.text_config)
    with pytest.raises(ValueError, match=f"{greeting.shape[1]} input_ids, but positions for {greeting.shape[1] - 1}"):
        model(greeting, glm_position_ids=positions[..., :-1])


def test_a_prompt_that_ends_with_padding_is_not_answered(model, prompts):
    with pytest.raises(ValueError, match="pad prompts on the left"):
        model.generate(**padded_on_the_right(prompts), max_new_tokens=1)


# Several answers in a row


@pytest.fixture
def packed(greeting) -> torch.Tensor:
    """Two prompts with their answers in one row."""
    one = torch.cat((greeting, torch.tensor([[*ANSWER, 1105]])), dim=1)
    return torch.cat((one, one), dim=1)


@pytest.mark.parametrize("door", ["forward", "embeddings", "labels", "label embeddings", "base model", "generate"])
def test_a_row_with_two_prompts_is_refused(model, packed, door):
    embeds = model.get_input_embeddings()(packed).detach()
    doors = {
        "forward": lambda: model(packed),
        "embeddings": lambda: model(inputs_embeds=embeds),
        "labels": lambda: model(packed, labels=packed),
        "label embeddings": lambda: model(inputs_embeds=embeds, labels=packed),
        "base model": lambda: model.base_model(input_ids=packed),
        "generate": lambda: model.generate(input_ids=packed, max_new_tokens=1),
    }
    with pytest.raises(ValueError, match=PACKED):
        doors[door]()


def test_a_start_may_be_said_in_an_answer_but_not_learned(model, greeting):
    said = torch.cat((greeting, torch.tensor([[700, 1104, 701]])), dim=1)
    with torch.no_grad():
        assert torch.equal(model(said).logits[:, :-2], model(said[:, :-2]).logits)
    with pytest.raises(ValueError, match=r"row with labels has more than one <sop> \(1104\)"):
        model(said, labels=said)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}, "position_ids begin anew within a row"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "cu_seq_lens_q names several sequences in a row"),
    ],
)
def test_what_says_that_a_row_is_packed_is_heeded(model, arguments, complaint):
    ids = torch.tensor([[7, 8, 9, 1105, 7, 8, 1101, 1104, 700]])
    with pytest.raises(ValueError, match=complaint):
        model(ids, **arguments)


def test_positions_that_libraries_make_up_from_the_mask_are_no_packing(model, prompts):
    batch = answered(prompts)
    made_up = (batch["attention_mask"].cumsum(-1) - 1).masked_fill(batch["attention_mask"] == 0, 1)
    with torch.no_grad():
        assert torch.equal(model(**batch, position_ids=made_up).logits, model(**batch).logits)
