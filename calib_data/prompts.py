"""Prompts: the project's own short list, and files of others."""

from __future__ import annotations

from pathlib import Path

from ptq_tdq.errors import ConfigError
from ptq_tdq.files import read_file, reason

DEFAULT_PROMPTS = (
    "A red fox asleep in fresh snow at dawn",
    "An old fishing boat on a still lake, oil on canvas",
    "A bowl of ripe peaches on a kitchen table, soft window light",
    "A narrow street in the rain at night with neon signs",
    "A close-up of a dragonfly on a blade of grass",
    "A wooden cabin in a pine forest under the Milky Way",
    "A portrait of an elderly violin maker in his workshop",
    "A field of sunflowers under a stormy sky",
    "A tabby cat looking out of a train window",
    "A glass of iced tea with mint and lemon",
    "A lighthouse on a rocky coast, long exposure",
    "Hot-air balloons over a desert valley at sunrise",
    "A child flying a kite on a windy beach",
    "A blueprint of a mechanical clock",
    "A snow leopard on a cliff, telephoto photograph",
    "A market stall with spices in many colours",
    "A watercolour of a village square in spring",
    "A vintage motorcycle in an empty garage",
    "Northern lights over a frozen river",
    "A stack of old books beside a brass lamp",
    "An astronaut planting a tree on the moon",
    "A waterfall in a tropical jungle",
    "A ceramic teapot shaped like an elephant",
    "A chess game in a park in autumn",
    "A city skyline reflected in a puddle",
    "A loaf of rye bread, cut, on linen",
    "A flock of starlings at dusk",
    "A robot gardener watering tomatoes, children's book illustration",
    "A stained-glass window of a blue whale",
    "A mountain road winding through fog",
    "A jar of honey in the sun",
    "A blacksmith hammering glowing iron",
    "An isometric drawing of a small library",
    "A goldfish in a round bowl on a windowsill",
    "Cherry blossoms along a canal",
    "A paper boat in a gutter after the rain",
    "A suspension bridge in morning mist, black and white",
    "A horse galloping through shallow water",
    "A slice of chocolate cake on a blue plate",
    "A spiral staircase seen from above",
    "A scarecrow in a pumpkin field",
    "A submarine among coral and tropical fish",
    "A knitted owl on a shelf",
    "Wind turbines on green hills",
    "A cellist on an empty stage",
    "An aerial photograph of a river delta",
    "A barn owl in flight at night",
    "A desk with a typewriter and a cup of coffee",
)
"""Written for this project: things, places, animals and styles, none of a living artist."""

MOST_BYTES = 1 << 24


def read_prompts(path: Path) -> list[str]:
    """One prompt per line of a UTF-8 text file, with a byte order mark or without; empty lines do not count.

    Raises :class:`ConfigError` for a file that cannot be read or holds no prompt.
    """
    try:
        text = read_file(path, MOST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The prompts in '{path}' cannot be read ({reason(error)}); give a text file in UTF-8."
        ) from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"The file '{path}' holds no prompt; write one per line.")
    return prompts
