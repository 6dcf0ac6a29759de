"""Pictures of attention: what each head attends to, and what it adds.

`plot_*` writes a picture to a file, `*_figure` gives it to a notebook or to code that changes it.
Letters: T time, H heads, L layers. Sizes are in inches.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gptfast.heads import Shares, entropy
from gptfast.pictures import COLOURS, GREY, SCREEN_DPI, check_matplotlib, save_picture, visible

BLUE, ORANGE = COLOURS[:2]
LIGHT_ORANGE = "#EBA675"
LONGEST = 12  # characters of a token's label
UNSEEN = "#eeeeee"  # keys that the causal mask hides
FONT = 7  # points
POINTS = 72  # per inch


def plot_attention(weights: Tensor, labels: Sequence[str], path: str | Path) -> Path:
    """Draws a heat map per layer and head, the entropy of each of its rows beside it.

    Args:
        weights: (L, H, T, T), the attention weights.
        labels: T characters, or what T tokens write, on both axes.
        path: The picture, PNG, SVG or PDF by its suffix; its directory is made if missing.

    Returns:
        The path.

    Raises:
        ConfigError: An unknown suffix, or matplotlib is missing.
        DataError: The picture cannot be written.
    """
    return save_picture(path, lambda: attention_figure(weights, labels))


def attention_figure(weights: Tensor, labels: Sequence[str]) -> Any:
    """Draws the picture that `plot_attention` writes.

    Args:
        weights: (L, H, T, T), the attention weights.
        labels: T characters, or what T tokens write, on both axes.

    Returns:
        A matplotlib Figure, which a notebook shows after `%matplotlib inline`.

    Raises:
        ConfigError: Matplotlib is missing.
    """
    check_matplotlib()
    return _draw_maps(weights.detach().float().cpu(), labels)


def plot_contributions(shares: Shares, where: str, path: str | Path) -> Path:
    """Draws, per layer, each term's norm and its projection on the attention's output.

    Args:
        shares: The terms of the attention's output at a position.
        where: The position, in words.
        path: The picture, PNG, SVG or PDF by its suffix; its directory is made if missing.

    Returns:
        The path.

    Raises:
        ConfigError: An unknown suffix, or matplotlib is missing.
        DataError: The picture cannot be written.
    """
    return save_picture(path, lambda: contributions_figure(shares, where))


def contributions_figure(shares: Shares, where: str) -> Any:
    """Draws the picture that `plot_contributions` writes.

    Args:
        shares: The terms of the attention's output at a position.
        where: The position, in words.

    Returns:
        A matplotlib Figure, which a notebook shows after `%matplotlib inline`.

    Raises:
        ConfigError: Matplotlib is missing.
    """
    check_matplotlib()
    return _draw_bars(shares, where)


class _Grid(NamedTuple):
    """Where the maps of a picture are: L rows and H columns of squares, a strip beside each."""

    L: int
    H: int
    side: float  # of a map
    left: float = 0.75
    right: float = 0.85
    top: float = 0.75
    bottom: float = 0.45
    gap: float = 0.12

    @property
    def strip(self) -> float:
        """The width of the bars of entropy."""
        return 0.22 * self.side

    @property
    def step(self) -> float:
        """From a map to the next one on its right."""
        return self.side + self.strip + 2 * self.gap

    @property
    def width(self) -> float:
        return max(self.left + self.H * self.step + self.right, 5.2)

    @property
    def height(self) -> float:
        return self.top + self.L * (self.side + self.gap) + self.bottom

    def corner(self, layer: int, head: int) -> tuple[float, float]:
        """The lower left corner of a map."""
        above = self.L - 1 - layer
        return self.left + head * self.step, self.bottom + above * (self.side + self.gap)

    def add_axes(self, figure: Any, x: float, y: float, width: float) -> Any:
        """Axes as high as a map."""
        return figure.add_axes(
            (x / self.width, y / self.height, width / self.width, self.side / self.height)
        )


def _draw_maps(weights: Tensor, labels: Sequence[str]) -> Any:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    L, H, T, _ = weights.shape
    side, longer = min(3.2, max(1.2, 8 / max(L, H))), 0.0
    if max(map(len, labels)) > 1:  # of tokens
        labels = [each if len(each) <= LONGEST else f"{each[: LONGEST - 1]}…" for each in labels]
        longer = max(map(len, labels)) * 0.7 * FONT / POINTS
    grid = _Grid(L, H, side, left=0.75 + longer, bottom=0.45 + longer)
    figure = Figure(figsize=(grid.width, grid.height), dpi=SCREEN_DPI)
    hidden = weights.new_ones(T, T).triu(1).bool()
    norm = PowerNorm(0.5, 0, 1)  # so that small weights, of long texts, are seen
    shown = weights.masked_fill(hidden, math.nan).numpy()
    entropies = entropy(weights).tolist()  # (L, H, T)
    for layer in range(L):
        for head in range(H):
            x, y = grid.corner(layer, head)
            axes = grid.add_axes(figure, x, y, grid.side)
            axes.set_facecolor(UNSEEN)
            image = axes.imshow(shown[layer, head], cmap="Blues", norm=norm, aspect="auto")
            _label_maps(axes, labels, grid, layer, head)
            _draw_entropies(figure, grid, entropies[layer][head], x + grid.side, y)
    scale = grid.add_axes(figure, *grid.corner(0, H), 0.12)
    bar = figure.colorbar(image, cax=scale, ticks=[0, 0.05, 0.2, 0.5, 1], format="%g")
    bar.set_label("attention weight", color=GREY, fontsize=FONT)
    _soften(scale)
    lines = [
        f"Row: the {'token' if longer else 'character'} that attends."
        " Column: the one that it attends to.",
        f"Bar: the entropy of the row, at most ln {T} = {math.log(T):.2f} nats. Line: if all"
        " weights were equal.",
    ]
    _caption(figure, lines, grid.left)
    return figure


def _label_maps(axes: Any, names: Sequence[str], grid: _Grid, layer: int, head: int) -> None:
    """Names the layer, the head and the tokens, at the borders of the grid alone."""
    _soften(axes)
    places, labels = _ticks(names, grid.side)
    numbered = len(places) < len(names)
    before = [f"{i} {c}" if numbered else c for i, c in zip(places, labels, strict=True)]
    axes.set_xticks([])
    axes.set_yticks([])
    if layer == 0:
        axes.set_title(f"head {head}", fontsize=FONT + 2, pad=4)
    if layer == grid.L - 1:
        if max(map(len, names)) > 1:
            axes.set_xticks(places, before, rotation=90)
        else:
            below = [f"{c}\n{i}" if numbered else c for i, c in zip(places, labels, strict=True)]
            axes.set_xticks(places, below)
    if head == 0:
        axes.set_yticks(places, before)
        axes.set_ylabel(f"layer {layer}", fontsize=FONT + 2)
        axes.yaxis.set_label_coords((0.25 - grid.left) / grid.side, 0.5)


def _ticks(text: Sequence[str], side: float) -> tuple[list[int], list[str]]:
    """The tokens that have room on an axis, evenly spaced, and where they are."""
    room = side * POINTS / FONT  # in characters
    step = 1 if len(text) * 1.15 <= room else 2  # numbers, beside thinned ones, are wider
    while len(text) / step * 1.6 > room and step > 1:
        step = next(each for each in _round_numbers() if each > step)
    places = list(range(0, len(text), step))
    return places, ["␣" if text[i] == " " else visible(text[i]) for i in places]


def _round_numbers() -> Any:
    """1, 2, 5, 10, 20, 50, ..."""
    scale = 1
    while True:
        yield from (scale, 2 * scale, 5 * scale)
        scale *= 10


def _draw_entropies(
    figure: Any, grid: _Grid, entropies: Sequence[float], x: float, y: float
) -> None:
    """Bars of the entropies at the right border of a map, whose corner (x, y) is."""
    from matplotlib.patches import StepPatch

    T = len(entropies)
    edges = [(y + grid.side * (1 - i / T)) / grid.height for i in range(T + 1)]
    x, strip = x / grid.width, grid.strip / grid.width
    even = [math.log(i + 1) for i in range(T)]
    fill: dict[str, Any] = {"fill": True, "color": LIGHT_ORANGE, "linewidth": 0, "baseline": x}
    line: dict[str, Any] = {"fill": False, "color": GREY, "linewidth": 0.6, "baseline": None}
    for values, style in ((entropies, fill), (even, line)):
        ends = [x + strip * value / max(even[-1], 0.1) for value in values]
        bars = StepPatch(ends[::-1], edges[::-1], orientation="horizontal", zorder=-1, **style)
        figure.add_artist(bars)  # one axes per map takes long enough
        bars.set_transform(figure.transFigure)  # unlike inches, it follows when a picture is cut


def _draw_bars(shares: Shares, where: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    L, N = shares.norms.shape
    height = 1.0 if L > 4 else 1.6
    width = max(5.5, 1.6 + 0.45 * (N + 1))
    top, bottom = 0.8, 0.4
    figure = Figure(figsize=(width, top + L * height + bottom), dpi=SCREEN_DPI)
    panels = figure.subplots(L, 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(
        left=0.85 / width,
        right=1 - 0.15 / width,
        top=1 - top / figure.get_figheight(),
        bottom=bottom / figure.get_figheight(),
        hspace=0.25,
    )
    totals = shares.projections.sum(1, keepdim=True)
    projections = [*shares.projections.T.tolist(), totals[:, 0].tolist()]
    norms = [*shares.norms.T.tolist(), shares.output.tolist()]
    for layer, axes in enumerate(panels):
        places = [float(i) if i < N else N + 0.4 for i in range(N + 1)]  # the sum stands apart
        for offset, values, colour, label in (
            (-0.2, norms, BLUE, "norm"),
            (0.2, projections, ORANGE, "projection on the output"),
        ):
            heights = [each[layer] for each in values]
            axes.bar([x + offset for x in places], heights, 0.4, color=colour, label=label)
        axes.axhline(0, color=GREY, linewidth=0.7, clip_on=False)
        axes.set_ylabel(f"layer {layer}", fontsize=FONT + 2)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4 if height > 1.2 else 3))
        axes.yaxis.set_label_coords(-0.55 / width, 0.5)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        _soften(axes)
        axes.tick_params(axis="x", length=0)
    names = [f"head {name}" if N <= 6 and name.isdigit() else name for name in shares.names]
    panels[-1].set_xticks(places, [*names, "sum"])
    panels[0].legend(
        frameon=False, fontsize=FONT + 1, ncols=2, loc="lower right", bbox_to_anchor=(1, 1)
    )
    lines = [
        f"What each head adds to the attention's output at {where}.",
        f"The terms sum to the output (largest difference {shares.difference:.1e}).",
    ]
    _caption(figure, lines, 0.85)
    return figure


def _caption(figure: Any, lines: Sequence[str], left: float) -> None:
    """Text at the top; matplotlib must not read any of it as a formula."""
    figure.text(
        left / figure.get_figwidth(),
        1 - 0.1 / figure.get_figheight(),
        "\n".join(lines),
        va="top",
        fontsize=FONT + 1,
        color=GREY,
        parse_math=False,
    )


def _soften(axes: Any) -> None:
    """Thin grey spines, small grey ticks."""
    axes.tick_params(labelsize=FONT, colors=GREY, length=2, width=0.5, pad=2)
    for spine in axes.spines.values():
        spine.set(color=GREY, linewidth=0.5)
