"""Collects text of several workloads from what a Debian machine with Python carries.

A *workload* is a kind of text: Python, C or Perl code, English, German, French or Spanish prose.
Every workload is a list of documents, each cleaned (markup and licence headers removed) and put
into the training or the held-out part by a hash of its path, so that the split is the same on every
machine and no held-out document is ever trained on.

What is missing is skipped; ``apt-get install manpages-de manpages-de-dev manpages-fr
manpages-fr-dev manpages-es manpages-es-dev perl-doc`` adds most of what a plain machine lacks.
Packages that were unpacked elsewhere (``dpkg -x``) are read with ``--root DIR``.

Run as a script, it prints the size of each workload.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_DOCUMENT_CHARS = 400
MAX_DOCUMENT_CHARS = 100_000
MAX_FILES_PER_FAMILY = 300
MIN_LETTER_SHARE = 0.6
HELDOUT_SHARE = 0.04

TROFF_GLYPHS = {
    "aq": "'", "cq": "’", "oq": "‘", "dq": '"', "lq": "“", "rq": "”", "bu": "*", "em": "—",
    "en": "–", "hy": "-", "mi": "-", "co": "©", "ha": "^", "ti": "~", "rs": "\\", "ga": "`",
    "Fo": "«", "Fc": "»", "Bq": "„", "ss": "ß", "->": "->", "<=": "<=", ">=": ">=", "sl": "/",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One cleaned text: its workload, its path below the root it was found in, and its text."""

    workload: str
    path: str
    text: str

    @property
    def heldout(self) -> bool:
        """Whether this document is kept out of training."""
        digest = hashlib.sha256(f"{self.workload}/{self.path}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64


@dataclass(frozen=True)
class Source:
    """Files of one workload: glob patterns below ``/`` and ``--root``, and how to clean them."""

    workload: str
    patterns: tuple[str, ...]
    clean: Callable[[str], str]


def clean_python(text: str) -> str:
    """Python code as it is."""
    return text


def clean_c(text: str) -> str:
    """C code without comments that state a copyright or licence."""
    return re.sub(
        r"/\*.*?\*/",
        lambda m: "" if re.search("copyright|licen[cs]e", m[0], re.I) else m[0],
        text,
        flags=re.S,
    ).lstrip()


def clean_perl(text: str) -> str:
    """Perl code without its embedded documentation and what follows ``__END__``."""
    code = re.split(r"^__(?:END|DATA)__", text, maxsplit=1, flags=re.M)[0]
    return re.sub(r"^=[a-z]\w*.*?(?:^=cut.*?$|\Z)", "", code, flags=re.M | re.S)


def clean_pod(text: str) -> str:
    """The prose of a Perl documentation page without its markup."""
    text = re.sub(r"^=(?:encoding|over|back|cut|begin|end|for)\b.*$", "", text, flags=re.M)
    text = re.sub(r"^=(?:head\d|item) ?", "", text, flags=re.M)
    text = re.sub(r"[BCFILSX]<+ ?([^<>]*?) ?>+", r"\1", text)
    return text.replace("E<gt>", ">").replace("E<lt>", "<")


def clean_man(text: str) -> str:
    """A manual page without troff markup, each paragraph on one line."""
    paragraphs: list[list[str]] = [[]]
    in_table = False
    for line in text.splitlines():
        request = re.match(r"[.']\s*([A-Za-z]+|\\\")", line)
        if request is None:
            if line.strip() and not in_table:
                paragraphs[-1].append(line)
            elif not line.strip():
                paragraphs.append([])
            continue
        name, rest = request[1], line[request.end() :].strip().replace('"', "")
        in_table = name == "TS" or (in_table and name != "TE")
        if name in ("SH", "SS", "Sh", "Ss"):
            paragraphs += [[rest], []]
        elif name in ("PP", "P", "LP", "TP", "IP", "HP", "sp", "Pp", "br", "nf", "fi", "It"):
            paragraphs.append([])
        elif name in ("B", "I", "SM", "SB") and not in_table:
            paragraphs[-1].append(rest)
        elif name in ("BR", "RB", "IR", "RI", "BI", "IB") and not in_table:
            paragraphs[-1].append(join_alternating(line[request.end() :].strip()))
    # Paragraphs with e-mail addresses are lists of authors and translators.
    joined = (" ".join(lines) for lines in paragraphs if lines)
    text = "\n\n".join(p for p in joined if not re.search(r"\S@\S+\.\w", p))
    return re.sub(r" {2,}", " ", clean_troff_escapes(text))


def join_alternating(arguments: str) -> str:
    """The arguments of a two-font request, written together as troff sets them."""
    return "".join(quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', arguments))


def clean_troff_escapes(text: str) -> str:
    """Text with troff's escapes replaced by the characters they stand for, or removed."""
    text = re.sub(
        r"\\f(?:\[[^]]*\]|\(..|.)|\\s[+-]?\d|\\[&|^/,%:)~]|\\\*(?:\[[^]]*\]|\(..|.)", "", text
    )
    text = re.sub(r"\\(?:\[([^]]*)\]|\((..))", lambda m: TROFF_GLYPHS.get(m[1] or m[2], ""), text)
    return text.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\'", "'")


def sources() -> list[Source]:
    """Where each workload is found on a Debian machine with Python."""
    stdlib = sysconfig.get_paths()["stdlib"].lstrip("/")
    languages = {"german": "de", "french": "fr", "spanish": "es"}
    return [
        Source("python", (f"{stdlib}/**/*.py",), clean_python),
        Source("c", ("usr/include/**/*.h", "usr/src/**/*.[ch]"), clean_c),
        Source("perl", ("usr/share/perl*/**/*.p[lm]", "usr/lib/*/perl*/**/*.p[lm]"), clean_perl),
        Source("english", ("usr/share/man/man[1-8]/*.gz",), clean_man),
        Source("english", ("usr/share/perl*/**/*.pod",), clean_pod),
        *(
            Source(workload, (f"usr/share/man/{code}/man[1-8]/*.gz",), clean_man)
            for workload, code in languages.items()
        ),
    ]


def read_text(path: Path) -> str | None:
    """The file's text (gzip or plain, UTF-8 or Latin-1), or None if it cannot be read."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, gzip.BadGzipFile):
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def is_prose_or_code(text: str) -> bool:
    """Whether letters and blanks make up enough of the text for it not to be a table of data."""
    sample = text[:20_000]
    letters = sum(c.isalpha() or c.isspace() for c in sample)
    return len(text) >= MIN_DOCUMENT_CHARS and letters >= MIN_LETTER_SHARE * len(sample)


def find_documents(source: Source, roots: list[Path]) -> Iterator[Document]:
    """The documents of one source, sorted by path.

    At most `MAX_FILES_PER_FAMILY` files of one family (the same folder, and the same name up to the
    first ``-`` or ``_``) are taken, lest one large program's generated pages swamp the rest.
    """
    families: Counter[str] = Counter()
    for root in roots:
        for path in sorted({p for pattern in source.patterns for p in root.glob(pattern)}):
            relative = path.relative_to(root)
            parts = relative.parts
            if "site-packages" in parts or "unicore" in parts or not path.is_file():
                continue
            family = f"{relative.parent}/{re.split('[-_]', path.stem)[0]}"
            families[family] += 1
            if families[family] > MAX_FILES_PER_FAMILY:
                continue
            raw = read_text(path)
            if raw is None or "\0" in raw:
                continue
            text = source.clean(raw)[:MAX_DOCUMENT_CHARS].strip()
            if is_prose_or_code(text):
                # The interpreter's folder differs between machines; what is below it does not.
                stdlib = Path(sysconfig.get_paths()["stdlib"])
                yield Document(
                    source.workload,
                    str(path.relative_to(stdlib) if path.is_relative_to(stdlib) else relative),
                    text,
                )


def collect(extra_roots: list[Path], max_megabytes: float) -> dict[str, list[Document]]:
    """The documents of every workload, without duplicates, in the order of their path's hash.

    A workload is cut at `max_megabytes` million characters. Raises ValueError when one is empty.
    """
    workloads: dict[str, list[Document]] = {source.workload: [] for source in sources()}
    seen: set[bytes] = set()
    for source in sources():
        for document in find_documents(source, [Path("/"), *extra_roots]):
            digest = hashlib.sha256(document.text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                workloads[source.workload].append(document)
    for workload, documents in workloads.items():
        if not documents:
            patterns = [p for s in sources() if s.workload == workload for p in s.patterns]
            raise ValueError(
                f"no text found for workload {workload!r}: nothing matches {', '.join(patterns)} "
                "below / or --root; see the top of corpus.py for the packages that carry it"
            )
        documents.sort(key=lambda d: hashlib.sha256(d.path.encode()).digest())
        total, kept = 0, []
        for document in documents:
            if total > max_megabytes * 1e6:
                break
            total += len(document.text)
            kept.append(document)
        workloads[workload] = kept
    return workloads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say where text is looked for and how much of it is taken."""
    parser.add_argument(
        "--root",
        type=Path,
        action="append",
        default=[],
        help="also look below this folder, laid out as / is (packages unpacked with dpkg -x)",
    )
    parser.add_argument(
        "--max-megabytes",
        type=float,
        default=16.0,
        help="million characters taken per workload at most (default: %(default)s)",
    )


def main() -> None:
    """Print the number of documents and characters of each workload, training and held-out."""
    parser = argparse.ArgumentParser(description="Report the text found for each workload.")
    add_arguments(parser)
    arguments = parser.parse_args()
    print(f"{'workload':10} {'documents':>10} {'chars':>12} {'held-out':>9} {'chars':>10}")
    for workload, documents in collect(arguments.root, arguments.max_megabytes).items():
        train = [len(d.text) for d in documents if not d.heldout]
        heldout = [len(d.text) for d in documents if d.heldout]
        print(f"{workload:10} {len(train):10} {sum(train):12} {len(heldout):9} {sum(heldout):10}")


if __name__ == "__main__":
    main()
