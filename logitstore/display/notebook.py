"""A sample as one piece of HTML for notebooks: the viewer's heat map without script or network.

Choosing a measure and opening what a position keeps are done by the style sheet, so that it also
works where a notebook forbids scripts, and in one that was saved and opened elsewhere.

Letters: P positions, V vocabulary.
"""

from __future__ import annotations

import uuid
from html import escape
from importlib import resources

import numpy as np

from logitstore.display.entries import EXPLAINED, Entries, SampleEntries
from logitstore.display.glyphs import Glyphs, header_glyphs, readable
from logitstore.display.measures import MEASURES, Measured, measure_sample
from logitstore.record import Record
from logitstore.spec.errors import UsageError
from logitstore.spec.header import Header
from logitstore.spec.tokenizer_table import TokenizerTable

__all__ = ["MAX_SHOWN", "ShownSample"]

# Positions of one view at most, and ids of a position.
MAX_SHOWN = 2048
TOP = 8

# As in the viewer, from sure to unsure.
_COLOURS = ("#fff", "#fff6e5", "#ffe8c4", "#ffd69e", "#ffbe7a", "#fca55f", "#f58a4e", "#ec7048")


class ShownSample:
    """What a notebook shows for one sample; `_repr_html_` is what notebooks ask for.

    Args:
        record: of one sample.
        header: of its store.
        table: of its tokenizer, where the store keeps one.
        sample: its number.
        measure: shown first; the others are a click away.
        start, positions: the part of the sample that is shown.

    Raises: UsageError bad-argument.
    """

    def __init__(
        self,
        record: Record,
        header: Header,
        table: TokenizerTable | None,
        *,
        sample: int,
        measure: str = "entropy",
        start: int = 0,
        positions: int = 512,
    ) -> None:
        if measure not in MEASURES:
            raise UsageError(
                "bad-argument",
                "no such measure",
                where="measure",
                got=measure,
                expected=", ".join(MEASURES),
            )
        if start < 0 or positions < 1:
            raise UsageError(
                "bad-argument",
                "no such part",
                where="start, positions",
                got=f"{start}, {positions}",
            )
        self._record = record
        self._header = header
        self._glyphs = header_glyphs(header, table)
        self._entries = SampleEntries(record, header)
        self._measures = measure_sample(self._entries)
        self._measure = measure
        self._shown = range(record.num_positions)[start : start + min(positions, MAX_SHOWN)]
        self.sample = sample

    def __repr__(self) -> str:
        key = next(iter(self._record.sample_keys()), "")
        return f"<sample {self.sample} {key!r}: {self._record.num_positions:,} positions>"

    def _repr_html_(self) -> str:
        name = f"ls{uuid.uuid4().hex[:12]}"
        has = [m for m in self._measures.values() if m.values is not None]
        first = next((m.scale.name for m in has if m.scale.name == self._measure), None)
        first = first or (has[0].scale.name if has else None)
        rules, chooser, how = [], [], []
        for number, found in enumerate(has):
            chosen = f".{name} #{name}-{number}:checked"
            rules += [
                f"{chosen}~.heat .m{number}-{level}{{background:{colour}"
                + (";text-decoration:underline" if level > 5 else "")
                + "}"
                for level, colour in enumerate(_COLOURS)
            ]
            rules.append(f"{chosen}~.how{number}{{display:block}}")
            checked = " checked" if found.scale.name == first else ""
            chooser.append(
                f'<input type="radio" name="{name}" id="{name}-{number}"{checked}>'
                f'<label for="{name}-{number}">{escape(found.scale.title)}</label>'
            )
            how.append(f'<p class="how how{number}">{escape(_explained(found))}</p>')
        css = resources.files("logitstore.display").joinpath("notebook.css")
        style = css.read_text(encoding="utf-8").replace(".U", f".{name}") + "\n".join(rules)
        tokens = "".join(self._token(p, has) for p in self._shown)
        return (
            f'<div class="{name}"><style>{style}</style>{self._title()}'
            + "".join(chooser)
            + "".join(how)
            + f'<div class="heat">{tokens}</div></div>'
        )

    def _title(self) -> str:
        total = self._record.num_positions
        key = next(iter(self._record.sample_keys()), "")
        part = f"{total:,} position{'' if total == 1 else 's'}"
        if len(self._shown) < total:
            part = (
                f"showing {len(self._shown):,} of {part}, from {self._shown.start:,}: "
                f"show({self.sample}, start=…, positions=…) shows others"
            )
        signal = escape(str(self._header.signal))
        return (
            f"<p><b>Sample {self.sample:,}</b> <bdi>{escape(readable(key))}</bdi> "
            f"<small>{signal} · {escape(part)}</small></p>"
        )

    def _token(self, position: int, has: list[Measured]) -> str:
        tokens = self._record.get("tokens")
        label = int(self._entries.labels[position])
        glyphs = Glyphs("the teacher's answer", "text")
        if tokens is not None:
            glyphs = self._glyphs(int(tokens[position]))
        levels, told = [], []
        for number, found in enumerate(has):
            assert found.values is not None
            value = found.values[position]
            level = int(found.scale.levels(np.array([value]))[0])
            if level >= 0:
                levels.append(f"m{number}-{level}")
                told.append(f"{found.scale.title} {value:.{found.scale.digits}f}")
        tip = [f"<b>position {position:,}</b> " + escape(" · ".join(told))]
        entries = self._entries.at(position)
        if label >= 0:
            came = "came" if tokens is not None else "label"
            tip.append(f"{came}: <bdi>{escape(self._glyphs(label).text)}</bdi> (id {label})")
        if entries is not None:
            tip += self._kept(entries)
        inside = "".join(f"<span class='line'>{line}</span><br>" for line in tip[:2])
        inside += "".join(tip[2:]) if len(tip) > 2 else ""
        classes = " ".join(["t", glyphs.kind, *levels])
        after = "<br>" if glyphs.kind == "newline" else ""
        return (
            f'<span class="{classes}" tabindex="0"><bdi>{escape(glyphs.text)}</bdi>'
            f'<span class="tip">{inside}</span></span>{after}'
        )

    def _kept(self, entries: Entries) -> list[str]:
        scores = entries.outside_kind == "undefined"
        rows = []
        for i, value in zip(entries.ids[:TOP].tolist(), entries.values[:TOP].tolist(), strict=True):
            width = 0.0 if scores else 100 * min(max(value, 0.0), 1.0)
            mark = ' label" title="the label' if i == entries.label else ""
            shown = f"{value:.3f}" if scores or value >= 0.001 else f"{value:.1e}"
            rows.append(
                f'<span class="row{mark}"><bdi>{escape(self._glyphs(i).text)}</bdi>'
                f'<span class="track"><span class="fill" style="width:{width:.1f}%"></span></span>'
                f"<span>{shown}{' ✓' if i == entries.label else ''}</span></span>"
            )
        if len(entries.ids) > TOP:
            rows.append(f"<small>showing {TOP} of {len(entries.ids):,} ids</small><br>")
        outside = "" if entries.outside is None else f"{entries.outside:.4f}, "
        rows.append(
            f"<small>mass outside: {outside}{escape(EXPLAINED[entries.outside_kind])}</small>"
        )
        return rows


def _explained(found: Measured) -> str:
    scale = found.scale
    sign = "<" if scale.rising else ">"
    return (
        f"{scale.title}, {found.source}: {found.how}. Colours from sure ({sign} "
        f"{scale.breaks[0]:g}) to unsure, at {', '.join(f'{b:g}' for b in scale.breaks)}"
        + (f" {scale.unit}" if scale.unit else "")
        + "."
    )
