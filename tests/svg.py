"""Just enough SVG for tests/report.py: elements as text, a panel with axes, curves with their names at their ends."""
import html
import math
import re
from typing import NamedTuple

INK, SOFT, GRID = "#1a1a1a", "#5a5a5a", "#e3e3e3"
BLUE, ORANGE, GREEN, YELLOW, GREY = "#0072b2", "#d55e00", "#009e73", "#f8f3ab", "#b3b3b3"  # of Okabe and Ito
FONTS = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"

def clean(words, longest=300):
    """Text that XML takes: one line, without what models say that no text may hold."""
    words = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", words)
    return html.escape(words if len(words) <= longest else words[:longest - 3] + "...")

def tag(name, inside="", **attributes):
    """An element. In a name _ stands for -, at its end for nothing."""
    words = "".join(f' {key.rstrip("_").replace("_", "-")}="{round(x, 1) if isinstance(x, float) else x}"'
                    for key, x in attributes.items())
    return f"<{name}{words}>{inside}</{name}>" if inside else f"<{name}{words}/>"

def text(x, y, words, size=13, fill=INK, **attributes):
    """A line of text, its baseline at y."""
    return tag("text", clean(words), x=x, y=y, font_size=size, fill=fill, **attributes)

def bold(x, y, words, size=14):
    """A heading."""
    return text(x, y, words, size, font_weight="bold")

def ticks(low, high):
    """Some four to seven round numbers from low to high."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = min((unit, 2 * unit, 5 * unit, 10 * unit), key=lambda step: abs(step - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]

def around(numbers):
    """A range that holds all the numbers, with some air."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    air = max(0.08 * (high - low), 0.5)
    return low - air, high + air

class Panel(NamedTuple):
    """A rectangle of the page, in pixels, and the ranges of the numbers that it shows."""
    x: float
    y: float
    width: float
    height: float
    xs: tuple
    ys: tuple = (0, 1)

    def at(self, x, y=0):
        """Numbers -> pixels."""
        (left, right), (low, high) = self.xs, self.ys
        return self.x + self.width * (x - left) / (right - left), self.y + self.height * (high - y) / (high - low)

    def axis(self, label):
        """Vertical grid lines, their numbers where there is a label."""
        parts, foot = [], self.y + self.height
        for x, at in ((x, self.at(x)[0]) for x in ticks(*self.xs)):
            parts.append(tag("path", d=f"M{at:.1f} {self.y}v{self.height}", stroke=GRID))
            parts += [text(at, foot + 17, f"{x:g}", 12, SOFT, text_anchor="middle")] if label else []
        return parts + [text(self.x + self.width / 2, foot + 34, label, 12, SOFT, text_anchor="middle")] * bool(label)

    def axes(self, title, label):
        """Both axes, with a title."""
        parts = [bold(self.x, self.y - 12, title), *self.axis(label)]
        for y, at in ((y, self.at(0, y)[1]) for y in ticks(*self.ys)):
            parts += [tag("path", d=f"M{self.x} {at:.1f}h{self.width}", stroke=GRID),
                      text(self.x - 7, at + 4, f"{y:g}", 12, SOFT, text_anchor="end")]
        return parts

    def curves(self, curves):
        """{name: (colour, dashes, points)}, each with its name and last number at its end."""
        parts, last = [], math.inf
        for name, (colour, dashes, points) in sorted(curves.items(), key=lambda curve: curve[1][2][-1][1]):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
            last = min(last - 16, self.at(*points[-1])[1] + 4)
            parts += [tag("polyline", points=path, fill="none", stroke=colour, stroke_width=2.5,
                          stroke_dasharray=dashes),
                      text(self.x + self.width + 8, last, f"{name} {points[-1][1]:.1f}", 13, colour)]
        return parts
