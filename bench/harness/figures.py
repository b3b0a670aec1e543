"""Medians, ratios paired round by round, and tables."""

from statistics import median

MIB = 1 << 20
GB = 1e9


def middle(values, digits=3):
    """`median [smallest-largest]`, or the one value."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    text = f"{median(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def paired(ours, theirs, digits=2):
    """The ratio of two contenders, taken in each round and only then summed up."""
    ratios = [one / other for one, other in zip(ours, theirs) if one is not None and other]
    return middle(ratios, digits)


def column(rounds, key):
    """One figure of each round; a round without it counts as None."""
    return [one.get(key) for one in rounds]


def mib(values):
    return middle([value / MIB for value in values], 0)


def table(title, head, rows):
    """Markdown, padded so that it reads on a terminal too."""
    lines = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"**{title}**", "", padded[0], rule, *padded[1:], ""])
