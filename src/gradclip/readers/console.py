"""What trainers print: one table of patterns for the lines that hold a norm."""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from gradclip.readers.bars import settled
from gradclip.readers.choice import is_before_clipping, network_of
from gradclip.readers.columns import Columns, number
from gradclip.record import LogError

NUMBER = (
    # Windows once printed 1.#INF and -1.#IND; and no word begins with a number.
    r"[-+]?(?:1\.#\w+|\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?|\.\d+"
    r"|(?i:nan|inf(?:inity)?)\b)"
)
# Colours of 24 bits may be written with colons.
COLOURS = re.compile(r"\x1b\[[0-9;:?]*[A-Za-z]")
WRAPPED = re.compile(rf"(?:tensor|Array|np\.float\d+)\(\s*({NUMBER})\s*(?:,[^()]*)?\)")
"""How a number is printed that is an array of a library."""
BARE = re.compile(r"(?<=[:\s\[,])([-+]?)(?i:nan|inf(?:inity)?)(?=\s*[,}\]])")
LIMIT = re.compile(
    r"(?<![a-zA-Z])(?:max_grad_norm|clip[-_]grad(?:_norm)?|grad(?:ient)?[-_]clip(?:ping"
    r"|_val|_norm)?|clip[-_]norm)['\"]?(?:\s*[=:]\s*|\s*\.{2,}\s*|['\"]?,?\s+)['\"]?"
    rf"(?P<limit>{NUMBER})(?![\w.])"
)


BEFORE = (
    r"(?<!max_)(?<!max )(?i:(?<!(?<!pre[-_ ])(?<!before[-_ ])clip[-_ ])"
    r"(?<!(?<!un)clipped[-_ ]))"
)
"""Not behind what makes it a limit, or the norm after clipping."""
APART = r"(?<![a-zA-Z])(?<!s/)(?<!sec/)(?<!per[ _])"
"""Not the end of another word, nor of a time per step."""
WORD = (
    r"(?i:grad(?:ient)?s?[ _/-]?norm|(?<![a-z])g[ _]?norm|(?<![\w/.])total_norm"
    r"|l2_norm/grad/global)"
)
NORM = (
    rf"{BEFORE}{WORD}(?i:[ _/]*\(?(?:before|pre|un)[ _-]?clip(?:ping|ped)?\)?|_before)?"
)
"""A norm, and whatever says that it is the one before clipping."""
AFTER = re.compile(
    rf"(?P<name>(?i:(?<!un)clipped|(?:after|post)[ _-]?clip(?:ping)?)[ _/-]+{WORD}"
    rf"|{WORD}(?i:[ _/]*\(?(?:after|post|clipped)(?:[ _-]?clip(?:ping)?)?\)?))"
    rf"['\"]?\s*[=:|]?\s*['\"]?(?P<norm>{NUMBER})"
)
SHORT = r"\d+(?:\.\d+)?[kKMG]\b"
"""A count such as 1.2k, that many steps share."""
EPOCH = r"(?:(?i:\bepoch)[\s=:#\[(|]*(?P<epoch>\d+)\b.*?)?"


class Pattern(NamedTuple):
    """How one tool prints a step."""

    tool: str
    line: re.Pattern[str]
    epoch: int
    """The number of its first epoch."""


def _pattern(tool: str, text: str, epoch: int = 0) -> Pattern:
    return Pattern(tool, re.compile(text.replace("NUMBER", NUMBER)), epoch)


# The first that fits counts, so that those for any tool stand last.
PATTERNS = (
    _pattern(
        "Megatron-LM",
        r"iteration\s+(?P<step>\d+)\s*/.*?(?:lm loss: (?P<loss>NUMBER).*?)?"
        r"grad norm: (?P<norm>NUMBER)",
    ),
    _pattern(
        "torchtitan",
        r"step:\s*(?P<step>[\d,]+)\s+loss:\s*(?P<loss>NUMBER).*?"
        r"grad_norm:\s*(?P<norm>NUMBER)",
    ),
    _pattern(
        "Swin",
        r"Train: \[(?P<epoch>\d+)/\d+\]\[(?P<at>\d+)/(?P<of>\d+)\].*?"
        r"(?:\bloss (?P<loss>NUMBER) .*?)?grad_norm (?P<norm>NUMBER)",
    ),
    _pattern(
        "OpenMMLab",
        r"Epoch\s*(?:\(train\))?\s*\[(?P<epoch>\d+)\]\[\s*(?P<at>\d+)/(?P<of>\d+)\].*?"
        r"grad_norm: (?P<norm>NUMBER)",
        epoch=1,
    ),
    _pattern(
        "OpenMMLab",
        r"Iter\s*\(train\)\s*\[\s*(?P<step>\d+)/\d+\].*?"
        r"grad_norm: (?P<norm>NUMBER)",
    ),
    _pattern(
        "nanoGPT",
        # Looked for first, since a line without it would be gone through many times.
        r"(?i:step|iter)\s*(?P<step>\d+)[/ :|](?=.*\|\s*norm)"
        r".*?(?:loss:? (?P<loss>NUMBER).*?)?"
        r"\|\s*norm:?\s+(?P<norm>NUMBER)",
    ),
    _pattern(
        "steps",
        rf"{EPOCH}{APART}"
        r"(?i:num_updates|(?:global|train)[ _]?step|steps?|iter(?:ation)?s?|(?<!\d)it)"
        # What comes to percent is how far a progress bar has come.
        rf"['\"]?[\s=:#\[(|]*(?:{SHORT}|(?P<step>\d[\d,]*)\b(?![\d.]*\s*%)).*?"
        rf"{NORM}['\"]?\s*[=:|]?\s*['\"]?(?P<norm>NUMBER)",
    ),
    _pattern(
        "tqdm",
        # Without an end there is no bar, but '12it'. fairseq's has its own steps.
        rf"{EPOCH}(?:\d%\|[^|]*\|\s*(?=\d+/)|(?<![\w.])(?=\d+it))"
        r"(?P<step>\d{1,15})(?:/(?P<of>\d{1,15})|it) \[(?!.*num_updates).*?"
        rf"{NORM}['\"]?\s*[=:]\s*['\"]?(?P<norm>NUMBER)",
    ),
    _pattern(
        "fairseq",
        r"(?:\bloss[=: ]+(?P<loss>NUMBER).*?)?\bgnorm[=: ]+(?P<norm>NUMBER)"
        r"(?:.*?num_updates[=: ]+(?P<step>\d+))?",
    ),
    _pattern(
        "norms",
        rf"{NORM}['\"]?\s*[=:]\s*"
        r"['\"]?(?P<norm>NUMBER)"
        r"(?:.*?\b(?i:step|iter(?:ation)?)[\s=:]+"
        rf"(?!{SHORT})(?P<step>\d[\d,]*))?",
    ),
)
LOSS = re.compile(
    r"(?:^|[^a-zA-Z_\s/.-]\s*|-\s+)(?i:(?:(?:reduced_)?train(?:ing)?|total|lm)[ _/])?"
    rf"[lL]oss(?:_step)?['\"]?\s*[=:|]?\s*['\"]?(?P<loss>{NUMBER})(?!\w)"
)
"""The loss of a step, and not a part of it."""
STEP = re.compile(
    r"(?i)\b(?:step|iter(?:ation)?)s?['\"]?[\s=:#\[(|]*(?P<step>\d[\d,]*)\b(?![\d.]*\s*%)"
    r"|^\W*(?P<first>\d+)\s*/\s*\d+\b"
)
"""The step, where it has its name or leads the line beside how many there will be."""
EVALUATION = re.compile(r"(?i)\b(?:eval|val|valid|validation|evaluation|test|dev)\b")
"""What makes it the loss of something else."""
NETWORKS = re.compile(
    r"\b(?P<name>[a-zA-Z][\w/.]*[_/.](?:grad(?:ient)?[_-]?norm))['\"]?\s*[=:|]?\s*['\"]?"
    rf"(?P<norm>{NUMBER})"
)
GRADIENT = re.compile(r"[_/.]grad")
"""A cheap look, since most lines name no network."""
BOX = re.compile(r"^\s*\|\s*(?P<name>[^|]+?)\s*\|\s*(?P<value>[^|]*?)\s*\|\s*$")
HEADER = re.compile(
    r"^(?!.*norm).*?(?:\[epoch=(?P<epoch>\d+)\])?\[(?:step|batch)=(?P<step>\d+)/[^\]]*"
    r"\]:?\s*$"
)
"""What OLMo and Composer print above the numbers of a step."""
BELOW = re.compile(r"^\s+(?:Train )?(?P<name>\S.*?)\s*[=:]\s*(?P<value>\S+)\s*$")
QUARTILES = re.compile(r"grad-norm quartiles")
SUMMARY = re.compile(r"\|\s*train\s*\|")
"""fairseq ends an epoch with the average of its norms."""


def read(lines: Iterable[str], source: str, column: str | None) -> tuple[Columns, str]:
    """Return the columns of a console log, and the tool that printed it.

    Args:
        lines: The lines; carriage returns end one, too.
        source: The file, for messages.
        column: The column to keep, whatever it is called.

    Raises:
        LogError: If no line holds a gradient norm.
    """
    columns = Columns(column)
    tools: Counter[str] = Counter()
    for tool, row in settled(_rows(lines, columns)):
        columns.add(row)
        tools[tool] += 1
    if not tools.keys() - {"icefall"}:
        raise LogError(_nothing(source, "icefall" in tools))
    ((most, _),) = tools.most_common(1)
    return columns, f"{most} console"


def _nothing(source: str, quartiles: bool) -> str:
    if quartiles:
        return (
            f"{source}: icefall prints the quartiles of its norms, not the norms; log "
            "them one by one for advice."
        )
    return (
        f"{source}: no gradient norm in any line. Known are the lines of Megatron-LM, "
        "DeepSpeed, torchtitan, fairseq, verl, Swin, Hugging Face and whatever prints "
        "`step … grad_norm …`. If a number behind another word is the norm, column=… "
        "(--column) takes that word; files of other kinds need format=… (--format)."
    )


def _rows(
    lines: Iterable[str], columns: Columns
) -> Iterator[tuple[str, dict[str, Any]]]:
    tool, box = "boxed table", dict[str, Any]()
    # A box ends with the first line that is no row of it; its rows are one step.
    for raw in lines:
        # torchtitan colours its fields, and some logs are padded with wide spaces.
        line = COLOURS.sub("", raw) if "\x1b" in raw else raw
        line = line.replace("\u3000", " ")
        line = WRAPPED.sub(r"\1", line) if "(" in line else line
        if cell := BOX.match(line) or (box and BELOW.match(line)):
            box[cell["name"]] = cell["value"]
            continue
        # A heading that no number followed is no step.
        if box.keys() - {"step", "epoch"}:
            yield tool, box
        tool, box = "boxed table", {}
        if header := HEADER.match(line):
            tool, box = "headed block", header.groupdict()
        _mind_limit(line, columns)
        if columns.wanted and (row := _behind(columns.wanted, line)):
            yield "named", row
        # A cheap look first: lines of a progress bar may have 40,000 characters.
        elif "norm" in line.lower() and not SUMMARY.search(line):
            yield from _from_line(line)
    if box.keys() - {"step", "epoch"}:
        yield tool, box


def _behind(word: str, line: str) -> dict[str, Any]:
    """Return the number behind a word that no pattern has, if that is asked for."""
    if word not in line or "norm" in word.lower():
        return {}
    own = rf"(?<![\w/.-]){re.escape(word)}['\"]?\s*[=:|]?\s*['\"]?({NUMBER})(?!\w)"
    if not (found := re.search(own, line)):
        return {}
    row = {word: found[1], "loss": _loss(line)}
    if step := STEP.search(line):
        row["step"] = step["step"] or step["first"]
    return {name: x for name, x in row.items() if x is not None}


def _mind_limit(line: str, columns: Columns) -> None:
    """Keep the limit in force, as argument dumps and command lines mention it."""
    if ("clip" in line or "max_grad_norm" in line) and (found := LIMIT.search(line)):
        limit = number(found["limit"])
        columns.limit = columns.limit if limit is None else limit


def _from_line(line: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if QUARTILES.search(line):
        yield "icefall", {}
    elif "{" in line and (row := _dictionary(line)):
        yield "fairseq" if "gnorm" in row else "Hugging Face", row
    elif "/grad_norm:" in line and " - " in line and (pairs := _pairs(line)):
        yield "verl", pairs
    else:
        for pattern in PATTERNS:
            if found := pattern.line.search(line):
                yield pattern.tool, _named(found, line, pattern.epoch)
                return
        if found := AFTER.search(line):
            # Under this name it is refused with the reason.
            yield "norms", {found["name"]: found["norm"]}


def _dictionary(line: str) -> dict[str, Any]:
    """Return the dictionary that a line ends with, as JSON or Python prints it."""
    # fairseq and Python's logging put a prefix before it.
    text = line[line.index("{") : line.rindex("}") + 1] if "}" in line else ""
    if "norm" not in text:
        return {}
    for parse in (json.loads, _literal):
        try:
            row = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(row, dict) and any("norm" in str(name) for name in row):
            return {str(name): x for name, x in row.items()}
    return {}


def _literal(text: str) -> Any:
    # Python prints nan and inf without quotes, and does not read them back.
    return ast.literal_eval(BARE.sub(r"'\g<0>'", text))


def _pairs(line: str) -> dict[str, Any]:
    """Return the `name:number` pairs between ` - ` that verl prints."""
    pairs = (part.rpartition(":") for part in re.split(r"\s+-\s+|\s{2,}", line))
    row = {name.rsplit(" ", 1)[-1].strip(): x for name, _, x in pairs if name}
    return {name: x for name, x in row.items() if number(x) is not None}


def _named(found: re.Match[str], line: str, first: int) -> dict[str, Any]:
    """Return a step of a line; where networks are named, each with its norm."""
    row = {name: x for name, x in found.groupdict().items() if x is not None}
    # Swin and OpenMMLab count the batches of each epoch from 0 or 1 again.
    if "at" in row:
        before = (int(row.pop("epoch")) - first) * int(row.pop("of"))
        row["step"] = str(before + int(row.pop("at")))
    if "loss" not in row and (loss := _loss(line)):
        row["loss"] = loss
    norm = row.pop("norm")
    networks = _networks(line) if GRADIENT.search(line) else []
    # Beside a norm without a name, those with one are parts of it.
    named = found.start("norm") in [x.start("norm") for x in networks]
    if named and all(network_of(x["name"]) for x in networks):
        return row | {x["name"]: x["norm"] for x in networks}
    return row | {"grad_norm": norm}


def _networks(line: str) -> list[re.Match[str]]:
    """Return the norms with a name before theirs, of networks or of parts."""
    return [x for x in NETWORKS.finditer(line) if is_before_clipping(x["name"])]


def _loss(line: str) -> str | None:
    """Return the first loss in a line that is not one of an evaluation."""
    start = 0
    for found in LOSS.finditer(line):
        # A word belongs to the loss behind it, and not to those further on.
        if not EVALUATION.search(line, start, found.end()):
            return found["loss"]
        start = found.end()
    return None
