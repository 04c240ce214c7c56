"""What a model will see of its data, on the screen: numbers as a table, and examples with what is learnt marked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_peft.analysis.data_summary import Cut, DataSummary, Piece, Shown, SplitSummary, Spread, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = ".:-=+*#@"
_MARKS = ("⟦", "⟧")
_PLAIN_MARKS = ("[[", "]]")
_LABELS = 12  # more are counted in one line
_PIECE = 240  # characters of a piece; of a longer one both ends are shown


def print_data(summary: DataSummary, console: Console | None = None) -> None:
    """Prints a summary.

    Args:
        summary: the summary.
        console: where to; None takes the terminal.
    """
    console = console or Console(highlight=False)
    console.print(Text(summary.heading, style="bold"))
    console.print(_numbers(summary, _is_unicode(console)))
    for line in _labels(summary, console):
        console.print(line)
    for note in summary.notes:
        console.print(Text(note, style="yellow"))
    for number, example in enumerate(summary.examples, start=1):
        console.print()
        _print_example(number, example, console)
    if summary.examples and any(e.text and e.text.supervised is not None for e in summary.examples):
        console.print(Text("The marked text is what is learnt.", style="dim"))


def _is_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _numbers(summary: DataSummary, is_unicode: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("")
    splits = list(summary.splits.values())
    for name in summary.splits:
        table.add_column(name, justify="right", no_wrap=True)

    def row(name: str, say: Callable[[SplitSummary], str]) -> None:
        said = [say(split) for split in splits]
        if any(said):
            table.add_row(name, *said)

    row("examples", lambda s: f"{s.examples:,}{' and on' if s.streamed else ''}")
    row("rows", lambda s: f"{s.rows:,}" if any(x.rows != x.examples for x in splits) else "")
    row("tokens", lambda s: f"{s.tokens.all:,}" if s.tokens else "")
    row("supervised", lambda s: f"{s.tokens.supervised:,}" if s.tokens and s.tokens.supervised is not None else "")
    row("  share", _share_supervised)
    for name in dict.fromkeys(name for s in splits for name in s.spreads):
        _add_spread(table, name, [s.spreads.get(name) for s in splits], is_unicode)
    row("rows cut", lambda s: percent(cut.rows, cut.looked_at) if (cut := _cut(s)) else "")
    row("  of looked at", lambda s: f"{cut.looked_at:,}" if (cut := _cut(s)) and cut.looked_at < s.rows else "")
    row("  tokens lost", lambda s: percent(cut.tokens_lost, cut.tokens) if (cut := _cut(s)) and cut.rows else "")
    row("  supervised lost", _supervised_lost)
    row("duplicates", lambda s: f"{s.duplicates:,}")
    row("  inputs only", lambda s: f"{s.same_inputs:,}" if s.same_inputs else "")
    others = [s for name, s in summary.splits.items() if name != "train"]
    if "train" in summary.splits and others:
        row("also in train", lambda s: f"{s.in_training:,}" if s in others else "")
        row("  inputs only", lambda s: f"{s.inputs_in_training:,}" if s.inputs_in_training else "")
    return table


def _cut(split: SplitSummary) -> Cut | None:
    return None if split.tokens is None else split.tokens.cut


def _share_supervised(split: SplitSummary) -> str:
    tokens = split.tokens
    return "" if tokens is None or tokens.supervised is None else percent(tokens.supervised, tokens.all)


def _supervised_lost(split: SplitSummary) -> str:
    cut = _cut(split)
    return percent(cut.supervised_lost, cut.supervised) if cut is not None and cut.rows and cut.supervised else ""


def _add_spread(table: Table, name: str, spreads: Sequence[Spread | None], is_unicode: bool) -> None:
    unit = next((s.unit for s in spreads if s is not None), "")
    table.add_row(f"{name} ({unit})" if unit else name)
    rows: dict[str, Callable[[Spread], float]] = {
        "  smallest": lambda s: s.smallest,
        "  median": lambda s: s.median,
        "  95% up to": lambda s: s.high,
        "  largest": lambda s: s.largest,
    }
    for title, value in rows.items():
        table.add_row(title, *("" if s is None else f"{value(s):,.6g}" for s in spreads))
    table.add_row("", *("" if s is None else Text(bars(s, is_unicode), style="cyan") for s in spreads))


def bars(spread: Spread, is_unicode: bool = True) -> str:
    """A histogram of one line, a character a bin; what is not empty is seen.

    Args:
        spread: the numbers.
        is_unicode: whether the terminal can show blocks.
    """
    shades, most = _BARS if is_unicode else _PLAIN_BARS, max(spread.counts)
    return "".join(shades[-(-n * len(shades) // most) - 1] if n else " " for n in spread.counts)


def _labels(summary: DataSummary, console: Console) -> list[Text]:
    first = next((s for s in summary.splits.values() if s.labels), None)
    if first is None or first.labels is None:
        return []
    rest = [s.labels for s in summary.splits.values() if s is not first and s.labels]
    total, most = sum(first.labels.values()), max(first.labels.values())
    names = list(first.labels)[:_LABELS]
    width = min(max(map(len, names)), max(8, console.width - 34))
    room = max(4, min(24, console.width - width - 20 - 8 * len(rest)))
    block = "█" if _is_unicode(console) else "#"
    lines = [Text()]
    for name in names:
        count = first.labels[name]
        line = Text(f"{_shortened(name, width):<{width}}  {count:>7,} {percent(count, total):>6} ")
        for other in rest:
            line.append(f" {percent(other.get(name, 0), sum(other.values())):>6}", style="dim")
        line.append(" " + block * max(1, round(room * count / most)), style="cyan")
        lines.append(line)
    if len(first.labels) > _LABELS:
        others = list(first.labels.values())[_LABELS:]
        lines.append(Text(f"and {len(others)} labels more, of {max(others):,} to {min(others):,} rows", style="dim"))
    return lines


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 3] + "..."


def _print_example(number: int, example: Shown, console: Console) -> None:
    where = f" ({example.place})" if example.place else ""
    console.print(Text(f"{example.split} {number}{where}: {example.size}", style="bold"))
    sequences = {} if example.text is None else example.text.sequences
    for name, pieces in sequences.items():
        text = Text(f"{name}: " if len(sequences) > 1 else "")
        for piece in pieces:
            text.append_text(_marked(piece, console))
        console.print(text)
    for name, value in example.targets.items():
        console.print(Text(f"{name}: ").append_text(_marked(Piece(value, supervised=True), console)))


def _marked(piece: Piece, console: Console) -> Text:
    said = piece.text
    if len(said) > _PIECE:
        said = f"{said[: _PIECE // 2]} ... {said[-_PIECE // 2 :]}"
    if piece.tag is not None:
        said = f"{said}/{piece.tag}"
    if not piece.supervised:
        return Text(said, style="dim")
    if console.color_system is not None and not console.no_color:
        return Text(said, style="bold green")
    begin, end = _MARKS if _is_unicode(console) else _PLAIN_MARKS
    inner = said.strip(" ")
    return Text(said.replace(inner, f"{begin}{inner}{end}", 1) if inner else said)
