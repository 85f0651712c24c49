"""Cell colours: the viridis scale, which keeps its order in grey and for colour-blind eyes, and letters fit for it."""

STOPS = ((68, 1, 84), (68, 57, 131), (49, 104, 142), (33, 145, 140), (53, 183, 121), (144, 215, 67), (253, 231, 37))
KEPT = "#c8cdd3"


def shade(share: float) -> str:
    """The colour at a share in `[0, 1]` of the scale, `#rrggbb`; values outside are clamped."""
    place = min(max(share, 0.0), 1.0) * (len(STOPS) - 1)
    below = min(int(place), len(STOPS) - 2)
    part = place - below
    mixed = (round(a + (b - a) * part) for a, b in zip(STOPS[below], STOPS[below + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def width_colour(bits: int) -> str:
    """The colour of a width from 2 to 8 bits."""
    return shade((bits - 2) / 6)


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two `#rrggbb` colours, 1 to 21 (WCAG 2.2)."""
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def letters_on(colour: str) -> str:
    """Black or white, whichever is read better on a colour; never under a contrast of 4.5."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))
