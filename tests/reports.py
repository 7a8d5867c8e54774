"""For tests of reports: small results, a strict HTML reader, and a check that figures are readable."""

import itertools
from html.parser import HTMLParser

from calm.evaluation.brier import BrierResult
from calm.evaluation.held_out import Scorecard
from calm.report.measured import Checkpoint, Comparison, ModelResult, TemperaturePoint

STRONG = BrierResult((0.5, 0.3, 0.2, 0.1), 100, 64, (0.01,) * 4, 0.7)
WEAK = BrierResult((0.12, 0.01, 0.002, -0.001), 100, 64, (0.01,) * 4)
WEAKER = BrierResult((0.1, 0.01, -0.004, 0.001), 100, 64, (0.01,) * 4)
_VOID = {"meta", "link", "img", "br", "hr", "source", "input", "line"}


def result_of(
    name="K4", brier=STRONG, checkpoints=(), *, head="energy", chunk_size=4, **changes
) -> ModelResult:
    """A model of a comparison."""
    points = [TemperaturePoint(t, (1 - t / 2,) * 4, (0.9 - t / 2,) * 4, 3.0, 1e6 / t) for t in (1.0, 0.5)]
    values = {
        "name": name,
        "chunk_size": chunk_size,
        "head": head,
        "parameters": 10**6,
        "card": Scorecard("CALM" if head else "autoregressive", brier),
        "training_flops": 1e12,
        "seconds": 60.0,
        "checkpoints": list(checkpoints),
        "temperature_points": points,
        "texts": ["text"],
        **changes,
    }
    return ModelResult(**values)


def comparison_of(*results, **changes) -> Comparison:
    """A comparison with one n-gram floor and one prompt."""
    values = {
        "results": list(results),
        "floors": {"3-gram": STRONG},
        "temperature": 0.5,
        "prompts": ["prompt"],
        "protocol": "protocol",
        **changes,
    }
    return Comparison(**values)


def rising(flops=1e12, cross_entropy=None) -> list[Checkpoint]:
    """Checkpoints of a model that improves."""
    return [
        Checkpoint(
            flops * k / 4, 5.0 * k, 10.0 * k, None if cross_entropy is None else cross_entropy - 0.1 * k
        )
        for k in (1, 2, 3, 4)
    ]


class Page(HTMLParser):
    """A page, read strictly: every element is closed, in the right order.

    `elements` are (name, attributes, text inside) in the order in which they open.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[list] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert not self._open, [self.elements[index][0] for index in self._open]

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        self.elements.append([tag, dict(attrs), ""])
        if tag not in _VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.elements[self._open.pop()][0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        for index in self._open:
            self.elements[index][2] += data

    def texts(self, tag: str, **attributes) -> list[str]:
        """The text of each element with this tag and these attributes."""
        return [
            " ".join(text.split())
            for name, attrs, text in self.elements
            if name == tag and attributes.items() <= attrs.items()
        ]

    def attributes(self, tag: str, name: str) -> list[str]:
        """The values of an attribute, of all elements with this tag that have it."""
        return [attrs[name] for element, attrs, _ in self.elements if element == tag and name in attrs]


def check_readable(figure) -> None:
    """No text of a figure overlaps another or leaves the figure, and no legend covers axes."""
    figure.draw_without_rendering()
    inside = figure.bbox.padded(1)
    for axis in figure.axes:
        texts = [axis.xaxis.label, axis.yaxis.label, axis._left_title, *axis.texts]
        for side, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            ticks = side.get_major_ticks() + side.get_minor_ticks()
            labels = [
                tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()
            ]
            assert len(labels) >= 2, "an axis needs at least two numbers"
            texts += labels
        boxes = {
            f"{index} {text.get_text()}": text.get_window_extent()
            for index, text in enumerate(texts)
            if text.get_text()
        }
        for (name, box), (other, other_box) in itertools.combinations(boxes.items(), 2):
            assert not box.overlaps(other_box), f"'{name}' overlaps '{other}'"
        for name, box in boxes.items():
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1, f"'{name}' leaves the figure"
            assert inside.y0 <= box.y0 and box.y1 <= inside.y1, f"'{name}' leaves the figure"
        assert axis.get_legend() is None, "a legend inside the axes covers data"
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and box.y1 <= inside.y1, (
            "the legend leaves the figure"
        )
        for axis in figure.axes:
            assert not box.overlaps(axis.get_window_extent()), "the legend covers data"
            assert not any(box.overlaps(t.get_window_extent()) for t in [axis._left_title] if t.get_text())
