"""Pictures of nothing: areas of colour with a few forms, to ask about what no training picture shows.

Not here: what is asked about them (`asking.py`).
"""

import io
import random

from PIL import Image, ImageDraw


SIZE = 224  # pixels
MOST_FORMS = 4


def draw_nothing(number: int) -> bytes:
    """A PNG file, always the same one for a number."""
    chance = random.Random(number)

    def colour() -> tuple[int, ...]:
        return tuple(chance.randrange(256) for _ in range(3))

    size = (SIZE, SIZE)
    slope = Image.linear_gradient("L").resize(size).rotate(90 * chance.randrange(4))
    picture = Image.composite(Image.new("RGB", size, colour()), Image.new("RGB", size, colour()), slope)
    pencil = ImageDraw.Draw(picture)
    for _ in range(chance.randrange(MOST_FORMS + 1)):
        draw = chance.choice((pencil.ellipse, pencil.rectangle))
        x, y = chance.randrange(SIZE), chance.randrange(SIZE)
        across, down = chance.randrange(10, 60), chance.randrange(10, 60)
        draw((x - across, y - down, x + across, y + down), fill=colour())
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()
