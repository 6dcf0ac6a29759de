"""Pictures of attention: what is drawn where, which labels there are, the files, the errors."""

import io
import math
import subprocess
import sys
import warnings

import pytest
import torch

from gptfast import attention_plots, heads
from gptfast.attention_plots import (
    attention_figure,
    contributions_figure,
    plot_attention,
    plot_contributions,
)
from gptfast.errors import ConfigError, DataError
from gptfast.pictures import DPI

pytest.importorskip("matplotlib")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, which are saved as ever."""
    drawn, save = [], attention_plots.save_picture

    def note(path, draw):
        return save(path, lambda: drawn.append(draw()) or drawn[-1])

    monkeypatch.setattr(attention_plots, "save_picture", note)
    return drawn


def weights(L, H, T):
    scores = torch.randn(L, H, T, T, generator=torch.Generator().manual_seed(1))
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)


def shares(L, H):
    parts = torch.randn(L, 1, H, 1, 8, generator=torch.Generator().manual_seed(1))
    bias = torch.ones(L, 1, 1, 8)
    return heads.shares(heads.AttentionTerms(parts, bias, parts.sum(2) + bias), 0, 0)


def texts(ticks):
    return [tick.get_text() for tick in ticks]


def test_a_map_per_head_has_the_weights_and_the_characters(tmp_path, figures):
    W, text = weights(2, 3, 4), "a \n$"
    plot_attention(W, text, tmp_path / "a.png")
    *maps, scale = figures[0].axes
    assert len(maps) == 6 and scale.get_ylabel() == "attention weight"
    for i, axes in enumerate(maps):
        layer, head = divmod(i, 3)
        shown = torch.tensor(axes.images[0].get_array().filled(0.0))
        assert torch.equal(shown, W[layer, head])
        assert axes.get_title() == (f"head {head}" if layer == 0 else "")
        assert axes.get_ylabel() == (f"layer {layer}" if head == 0 else "")
        characters = ["a", "␣", "⏎", "$"]
        assert texts(axes.get_xticklabels()) == (characters if layer == 1 else [])
        assert texts(axes.get_yticklabels()) == (characters if head == 0 else [])


def test_bars_show_the_entropies(tmp_path, figures):
    W = weights(1, 2, 5)
    plot_attention(W, "abcde", tmp_path / "a.png")
    bars = [patch for patch in figures[0].artists if patch.get_fill()]
    for head, each in enumerate(bars):
        data = each.get_data()
        lengths = torch.tensor(data.values[::-1] - data.baseline)
        ratio = lengths / heads.entropy(W)[0, head].clamp(min=1e-9)
        assert lengths[0] == 0 and torch.allclose(ratio[1:], ratio[1].expand(4), atol=1e-6)
    assert len(bars) == 2


def test_long_texts_have_numbered_labels_with_room(tmp_path, figures):
    plot_attention(weights(12, 12, 64), "abcdefgh" * 8, tmp_path / "a.png")
    maps = figures[0].axes[:-1]
    assert texts(maps[0].get_yticklabels()) == [
        "0 a",
        "10 c",
        "20 e",
        "30 g",
        "40 a",
        "50 c",
        "60 e",
    ]
    assert texts(maps[-1].get_xticklabels())[:2] == ["a\n0", "c\n10"]
    assert max(figures[0].get_size_inches()) < 25


def test_bars_of_contributions_add_up(tmp_path, figures):
    found = shares(2, 3)
    plot_contributions(found, "position 0, '$x$'", tmp_path / "a.png")
    for layer, axes in enumerate(figures[0].axes):
        norms, projections = ([bar.get_height() for bar in each] for each in axes.containers)
        assert norms[:-1] == pytest.approx(found.norms[layer].tolist())
        assert projections[:-1] == pytest.approx(found.projections[layer].tolist())
        assert norms[-1] == pytest.approx(sum(projections[:-1]))
        assert norms[-1] == pytest.approx(projections[-1])
    names = ["head 0", "head 1", "head 2", "bias", "sum"]
    assert texts(figures[0].axes[-1].get_xticklabels()) == names
    assert "'$x$'" in figures[0].texts[0].get_text() and not figures[0].texts[0].get_parse_math()


@pytest.mark.parametrize(
    "suffix, start", [(".png", b"\x89PNG"), (".SVG", b"<?xml"), (".pdf", b"%PDF")]
)
def test_the_suffix_chooses_the_format(tmp_path, suffix, start):
    path = tmp_path / "new" / f"picture{suffix}"
    assert plot_attention(weights(1, 1, 1), "a", path) == path
    assert path.read_bytes().startswith(start)
    assert plot_contributions(shares(1, 1), "position 0", str(path)) == path
    assert path.read_bytes().startswith(start)


def test_a_figure_is_what_is_written(tmp_path):
    from matplotlib.figure import Figure

    for draw, plot, arguments in (
        (attention_figure, plot_attention, (weights(1, 2, 3), "abc")),
        (contributions_figure, plot_contributions, (shares(1, 2), "position 0")),
    ):
        figure = draw(*arguments)
        assert isinstance(figure, Figure)
        figure.savefig(tmp_path / "figure.png", dpi=DPI)
        written = plot(*arguments, tmp_path / "plot.png").read_bytes()
        assert (tmp_path / "figure.png").read_bytes() == written


def test_bars_stay_beside_their_rows_when_a_picture_is_cut():
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    W = torch.tensor([[1.0, 0.0], [0.5, 0.5]])  # the bar is that of the lower row
    picture = io.BytesIO()
    attention_figure(W[None, None], "ab").savefig(picture, bbox_inches="tight")
    picture.seek(0)
    pixels = torch.tensor(imread(picture))[..., :3]
    hidden, bar = (
        (pixels - torch.tensor(to_rgb(colour)))
        .abs()
        .amax(-1)
        .lt(0.01)
        .sum(1)
        .gt(50)
        .nonzero()[:, 0]
        for colour in (attention_plots.UNSEEN, attention_plots.LIGHT_ORANGE)
    )
    assert abs(hidden.max() - bar.min()) <= 2  # the upper row ends where the lower one begins
    assert abs((hidden.max() - hidden.min()) - (bar.max() - bar.min())) <= 2


def test_without_matplotlib_a_figure_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        lambda: attention_figure(weights(1, 1, 1), "a"),
        lambda: contributions_figure(shares(1, 1), "position 0"),
    ):
        with pytest.raises(ConfigError, match="pictures need matplotlib"):
            draw()


def test_characters_that_the_font_lacks_are_no_noise(tmp_path, figures):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = plot_attention(weights(1, 1, 3), "字\ud800\0", tmp_path / "a.png")
    unknown = "\N{REPLACEMENT CHARACTER}"  # what nothing can draw
    assert texts(figures[0].axes[0].get_xticklabels()) == ["字", unknown, unknown]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"must end in \.png, \.svg, \.pdf"):
        plot_attention(weights(1, 1, 1), "a", tmp_path / "a.txt")
    with pytest.raises(ConfigError, match=r"must end in \.png, \.svg, \.pdf"):
        plot_contributions(shares(1, 1), "position 0", tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        plot_attention(weights(1, 1, 1), "a", tmp_path / "file" / "a.png")


def test_importing_the_module_does_not_load_matplotlib():
    code = "import gptfast.attention_plots, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
