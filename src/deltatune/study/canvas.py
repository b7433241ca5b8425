"""From a plot of matplotlib to SVG text that stands inside a page, light or dark.

Lengths are pixels: a canvas has 72 of them to the inch, the unit of matplotlib's SVG.
"""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from deltatune.core.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "INCH",
    "INK",
    "LONGEST_NAME",
    "WIDTH",
    "as_svg",
    "blank",
    "colour",
    "dash",
    "line_height",
    "plotting",
    "printable",
    "short",
    "text_size",
    "wrapped",
]

# The palette of Okabe and Ito: told apart with any kind of colour vision, on light and on dark.
COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#8c8c8c",
    "#b8a800",
    "#7a4fbf",
    "#a05a2c",
)
# What is beyond the palette repeats its colours with other dashes.
DASHES = ((), (6, 3), (2, 3), (8, 3, 2, 3))
# Text and axes. Black becomes the colour of the text of the page.
INK = "#000000"
INCH = 72
WIDTH = 340.0  # of the axes of a plot
LONGEST_NAME = 30  # characters in a line
COLUMN = 480  # of the two of a page; what is wider has both to itself

SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # travels with matplotlib: layouts are the same everywhere
    "font.size": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "text.parse_math": False,  # a dollar sign in a name is one
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "svg.hashsalt": "deltatune",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.7,
    "axes.linewidth": 0.8,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
}

SPACE = "http://www.w3.org/2000/svg"
# What XML forbids, and halves of characters, which UTF-8 cannot write.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_LONG_FRACTION = re.compile(r"-?\d+\.\d{3,}")
_REFERENCE = re.compile(r"#([\w-]+)")


def colour(number: int) -> str:
    """Returns the colour of the series with this number."""
    return COLOURS[number % len(COLOURS)]


def dash(number: int) -> tuple[int, tuple[int, ...] | None]:
    """Returns the dashes of the series with this number, as matplotlib takes them."""
    return (0, DASHES[number // len(COLOURS) % len(DASHES)] or None)


def printable(text: str) -> str:
    """Returns the text with a replacement character for each that cannot be written down."""
    return _UNPRINTABLE.sub("\ufffd", text)


def wrapped(text: str, width: int) -> str:
    """Returns the text in lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(printable(text), width))


def line_height(names: Iterable[str], least: float) -> float:
    """Returns how far names stand apart, each below or beside the other, that have such lines."""
    return max([least, *(13.0 * (1 + name.count("\n")) + 5 for name in names)])


def short(value: float, digits: int = 4) -> str:
    """Writes a number in little space: "93.35", "0.0003", "11.5M"."""
    for suffix, least, unit in (("G", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e4, 1e3)):
        if least <= abs(value) < 1e13:
            return f"{value / unit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


@contextmanager
def plotting() -> Iterator[None]:
    """Our settings of matplotlib for a while, whatever those of the user are.

    Raises:
        UnsupportedError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UnsupportedError(
            "The figures of a report need matplotlib. Install it with: pip install"
            " 'deltatune[study]'"
        ) from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The browser has a glyph for what the font of the layout has not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        current: Any = matplotlib.rcParams  # its keys have a type that grows with every version
        current.update(SETTINGS)
        yield


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """Returns a plot whose axes have this size. What stands outside makes its canvas larger."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / INCH, height / INCH), dpi=INCH)
    FigureCanvasAgg(figure)
    return figure, figure.add_axes((0, 0, 1, 1))


def text_size(figure: Figure, texts: Sequence[str], size: float) -> list[tuple[float, float]]:
    """Returns the width and height of each text in letters of `size`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    found = []
    for text in texts:
        artist = figure.text(0, 0, text, fontsize=size)
        box = artist.get_window_extent(renderer)
        artist.remove()
        found.append((box.width, box.height))
    return found


def as_svg(figure: Figure, title: str) -> str:
    """Returns the plot as one SVG element; the same bytes for the same plot.

    It has the colour and the font of the text around it and the width of what is around it, from
    three quarters of its own to a little more than that. Its class is "wide" if it wants more than
    a column of a page. Its ids are its own, so that many stand in one page.

    Args:
        figure: what is drawn.
        title: says what it shows to those who cannot see it.
    """
    file = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(
        file,
        format="svg",
        bbox_inches="tight",
        pad_inches=3 / INCH,
        transparent=True,
        metadata=nothing,
    )
    text = file.getvalue()
    root = ElementTree.fromstring(text)
    _strip(root, prefix=f"f{hashlib.sha256(text).hexdigest()[:8]}-")
    width = float(root.get("viewBox", "").split()[2])
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("xmlns", SPACE)
    root.set("role", "img")
    root.set("aria-label", printable(title))
    root.set(
        "style",
        "fill:currentColor;stroke-linejoin:round;stroke-linecap:butt;"
        f"width:100%;min-width:{0.75 * width:.0f}px;max-width:{1.15 * width:.0f}px",
    )
    if width > COLUMN:
        root.set("class", "wide")
    return ElementTree.tostring(root, encoding="unicode")


def _strip(root: ElementTree.Element, prefix: str) -> None:
    """Leaves of an SVG what a page needs, and puts the prefix before the ids that are used."""
    for parent in list(root.iter()):
        for child in list(parent):
            # Its one rule is that of every element of the page; the root has it as a style.
            if child.tag == f"{{{SPACE}}}style":
                parent.remove(child)
    used = {
        name
        for element in root.iter()
        for value in element.attrib.values()
        for name in _REFERENCE.findall(value)
    }
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{SPACE}}}")
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key != "id":
                element.set(key.rpartition("}")[2], _rewritten(key, value, prefix))
            elif value in used:
                element.set("id", prefix + value)


def _rewritten(key: str, value: str, prefix: str) -> str:
    if key in ("d", "x", "y", "width", "height", "transform", "viewBox"):
        return _LONG_FRACTION.sub(lambda found: f"{float(found[0]):.2f}", value)
    if key == "style":
        value = re.sub(r"font-family:[^;]*;?", "", value)
        return value.replace(f"stroke: {INK}", "stroke: currentColor").strip()
    if key.endswith("href") or key == "clip-path":
        return value.replace("#", f"#{prefix}", 1)
    return value
