"""Tables of ratios: what was reached, and between which marks of a page they stand."""


def reached(ratio, target):
    """Return whether a ratio is on the right side of its target."""
    side, value = target.split()
    return ratio >= float(value) if side == ">=" else ratio <= float(value)


def put_between(page, marks, lines):
    """Replace what stands between two marks of a page."""
    before, begin, rest = page.read_text().partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (begin and end):
        raise SystemExit(f"{page} lacks the marks {marks[0]} and {marks[1]}.")
    text = "\n".join(lines)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")
