"""The image encoder in the hands of other people's tools: checkpointing, exporters, the Trainer's evaluation."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.helpers import load_float32


REENTRANT = {"use_reentrant": True}
# Linear layers of the ViT, of the Q-Former, of its cross-attention alone, and of both.
TARGETS = {
    "ViT": r"image_encoder\.vit\..*(query_key_value|dense)",
    "Q-Former": r"image_encoder\.qformer\..*(query_key_value|dense)",
    "cross-attention": r"image_encoder\.qformer\..*cross_attention\.(query|key_value)",
    "both": r"image_encoder\..*dense_h_to_4h",
}


# Checkpointed layers


def prepare_by_hand(peft, model, config):
    model.gradient_checkpointing_enable(REENTRANT)
    model.enable_input_require_grads()
    return peft.get_peft_model(model, config)


def prepare_after_peft(peft, model, config):
    model = peft.get_peft_model(model, config)
    model.gradient_checkpointing_enable(REENTRANT)
    model.enable_input_require_grads()
    return model


def prepare_for_kbit_training(peft, model, config):
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=REENTRANT)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("prepare", [prepare_by_hand, prepare_after_peft, prepare_for_kbit_training])
@pytest.mark.parametrize("part", list(TARGETS))
def test_reentrant_checkpointing_gives_gradients_to_adapters_of_the_image_encoder(
    tiny_original, described, part, prepare
):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=TARGETS[part], r=2, init_lora_weights=False)
    model = prepare(peft, load_float32(tiny_original), config).train()
    model(**described).logits[:, -1].square().sum().backward()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert adapters
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in adapters)


# Exporters


class Features(nn.Module):
    """`get_image_features` as a module, since exporters take one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values, return_dict=True).pooler_output


PARTS = {
    "ViT": lambda model: (model.image_encoder.vit, lambda output: output["last_hidden_state"]),
    "image encoder": lambda model: (model.image_encoder, lambda output: output[1]),
    "features": lambda model: (Features(model), lambda output: output),
}


def check_batch_sizes(exported, module, read):
    for batch_size in (1, 3):
        pixel_values = torch.rand(batch_size, 3, 224, 224)
        with torch.no_grad():
            torch.testing.assert_close(read(exported(pixel_values)), read(module(pixel_values)))


@pytest.mark.parametrize(("part", "attention"), [*((part, "sdpa") for part in PARTS), ("features", "eager")])
def test_exported_image_encoders_take_any_number_of_pictures(tiny_original, part, attention):
    model = load_float32(tiny_original).eval()
    model.set_attn_implementation(attention)
    module, read = PARTS[part](model)
    shapes = ({0: torch.export.Dim("pictures", max=64)},)
    exported = torch.export.export(module.eval(), (torch.rand(2, 3, 224, 224),), dynamic_shapes=shapes)
    check_batch_sizes(exported.module(), module, read)


@pytest.mark.parametrize("part", list(PARTS))
def test_traced_image_encoders_take_any_number_of_pictures(tiny_original, part):
    module, read = PARTS[part](load_float32(tiny_original).eval())
    traced = torch.jit.trace(module.eval(), torch.rand(2, 3, 224, 224), strict=False, check_trace=False)
    check_batch_sizes(traced, module, read)


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_metrics_are_computed_of_logits_alone_whatever_pictures_rows_have(
    model, processor, pictures, tmp_path, batch_size
):
    picture = f"<img>{processor.image_token}</img>"
    rows = [("答：", []), (picture + "答：", pictures[:1]), (picture * 2 + "答：", pictures[:2])] * 2
    seen = []

    def collate(chosen: list[int]) -> dict:
        texts, images = zip(*(rows[index] for index in chosen), strict=True)
        images = list(images) if any(images) else None
        batch = dict(processor(text=list(texts), images=images, padding=True, return_tensors="pt"))
        answers = torch.tensor([[700, 701]] * len(chosen))
        batch["input_ids"] = torch.cat((batch["input_ids"], answers), dim=1)
        batch["attention_mask"] = torch.cat((batch["attention_mask"], torch.ones_like(answers)), dim=1)
        batch["labels"] = nn.functional.pad(answers, (batch["input_ids"].shape[1] - 2, 0), value=-100)
        return batch

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_eval_batch_size=batch_size,
            label_names=["labels"],
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
        ),
        data_collator=collate,
        eval_dataset=list(range(len(rows))),
        compute_metrics=lambda evaluated: seen.append(evaluated.predictions) or {},
    )
    trainer.evaluate()
    [logits] = seen
    assert logits.shape[0] == len(rows)
    assert logits.shape[2] == model.config.text_config.vocab_size
