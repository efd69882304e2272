"""The same question, answer and picture in each layout that rows may have. Not here: what is tested with them."""


def turn(role, content):
    return {"role": role, "content": content}


def said(speaker, value):
    return {"from": speaker, "value": value}


def part_row(picture):
    """Rows whose question names its picture in one of its parts."""
    return lambda question, answer, name: {
        "messages": [
            turn("user", [picture(name), {"type": "text", "text": question}]),
            *answered(answer, lambda: turn("assistant", answer)),
        ]
    }


def answered(answer, make):
    """Nothing for an answer that is None: it is still to be given."""
    return [] if answer is None else [make()]


def fields_row(picture, question, answer):
    """Rows with a field for each of the three."""

    def write(asked, label, name):
        row = {picture: name, question: asked, answer: label}
        return {field: value for field, value in row.items() if value is not None}

    return write


# Each writes a row of a question, an answer or None, and the name of a picture.
LAYOUTS = {
    "the original's": fields_row("img", "prompt", "label"),
    "messages with images": lambda question, answer, picture: {
        "messages": [turn("user", question), *answered(answer, lambda: turn("assistant", answer))],
        "images": [picture],
    },
    "messages with marks": lambda question, answer, picture: {
        "messages": [turn("user", f"<image>{question}"), *answered(answer, lambda: turn("assistant", answer))],
        "image": picture,
        "id": 7,
    },
    "parts with a path": part_row(lambda name: {"type": "image", "path": name}),
    "parts with an image": part_row(lambda name: {"type": "image", "image": name}),
    "parts with an image_url": part_row(lambda name: {"type": "image_url", "image_url": {"url": name}}),
    "parts with an image_url and a detail": part_row(
        lambda name: {"type": "image_url", "image_url": {"url": name, "detail": "low"}}
    ),
    "parts with an image_url that is a text": part_row(lambda name: {"type": "image_url", "image_url": name}),
    "LLaVA's": lambda question, answer, picture: {
        "id": "000",
        "image": picture,
        "conversations": [said("human", f"<image>\n{question}"), *answered(answer, lambda: said("gpt", answer))],
    },
    "ShareGPT's": lambda question, answer, picture: {
        "images": [picture],
        "system": "",
        "conversations": [said("human", question), *answered(answer, lambda: said("gpt", answer))],
    },
    "TRL's texts": fields_row("image", "prompt", "completion"),
    "TRL's messages": lambda question, answer, picture: {
        "images": [picture],
        "prompt": [turn("user", question)],
        **({} if answer is None else {"completion": [turn("assistant", answer)]}),
    },
    "questions": fields_row("image", "question", "answer"),
}
